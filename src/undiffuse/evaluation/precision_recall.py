"""Precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991), density and coverage (Naeem et al. 2020,
arXiv:2002.09797).

Around every row lies a ball that reaches to its k-th nearest neighbour in its own set. With B the union of balls:

    precision = share of the samples inside B(data)      are they like the data?       of a collapsed model: high
    recall    = share of the data inside B(samples)      is all of the data there?     of a collapsed model: near 0
    density   = balls of the data that a sample lies in, mean, by k      about 1 for a perfect model
    coverage  = share of the data's balls that hold a sample             is not fooled by outliers

Swapping the sets swaps precision and recall, which stood swapped in a trusted library for years (trap V7). All four
depend on n: a figure is to be read beside its floor at the same n.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np

from ..errors import UndiffuseError
from .intervals import GROUPS, Measured, from_groups, grouped, wilson
from .neighbours import blocks, smallest, squared_distances
from .statistics import Array, alike


class PrecisionRecall(NamedTuple):
    precision: Measured
    recall: Measured
    density: Measured
    coverage: Measured


def precision_recall(samples: Array, data: Array, k: int = 3, k_density: int = 5) -> PrecisionRecall:
    """All four, with intervals (groups; those of the shares contain Wilson's too).

    Every pair of rows is met once: leaving a group out takes its balls away, and lets those of the others grow.

    Args:
        samples: ``[N, D]``, N at least 10 (k + 1).
        data: ``[M, D]``, likewise.
        k: Neighbours that a ball of precision and recall reaches to.
        k_density: The same for density and coverage.

    Raises:
        UndiffuseError: too few rows, or a k below 1.
    """
    a, b = alike(samples, data)
    widest = max(k, k_density)
    if min(k, k_density) < 1 or min(len(a), len(b)) < GROUPS * (widest + 1):
        raise UndiffuseError(
            f"precision and recall with {widest} neighbours: at least {GROUPS * (widest + 1)} samples and as much data "
            f"are needed, got {len(a)} and {len(b)}"
        )
    groups_a, groups_b = grouped(len(a)), grouped(len(b), seed=1)
    balls_a, balls_b, wide_b = *_radii(a, groups_a, (k,)), *_radii(b, groups_b, (k, k_density))
    inside_a, held = np.zeros((2, GROUPS + 1, len(a)))  # a sample: in any ball of the data; in how many wide ones
    inside_b, covered = np.zeros((2, GROUPS + 1, len(b)), dtype=bool)
    for (i, rows), (j, columns) in product(_pieces(groups_a), _pieces(groups_b)):
        square = squared_distances(a[rows], b[columns])
        for without in range(GROUPS + 1):  # the last is without nothing
            if without in (i, j):
                continue
            inside_a[without, rows] += (square <= balls_b[without, columns]).any(axis=1)
            inside_b[without, columns] |= (square <= balls_a[without, rows, None]).any(axis=0)
            wide = square <= wide_b[without, columns]
            held[without, rows] += wide.sum(axis=1)
            covered[without, columns] |= wide.any(axis=0)
    present_a, present_b = _present(groups_a, len(a)), _present(groups_b, len(b))
    return PrecisionRecall(
        _share(inside_a > 0, present_a),
        _share(inside_b, present_b),
        _interval(held.sum(axis=1) / present_a.sum(axis=1) / k_density),
        _share(covered, present_b),
    )


def _radii(rows: np.ndarray, groups: list[np.ndarray], ks: tuple[int, ...]) -> list[np.ndarray]:
    """For each k the squared distance to the k-th nearest other row ``[GROUPS + 1, N]``: without each group, and of
    all.

    The nearest of all but a group are among the nearest of each of the others.
    """
    most = max(ks)
    found = np.empty((len(ks), GROUPS + 1, len(rows)))
    for i, here in _pieces(groups):
        nearest = np.full((GROUPS, len(here), most), np.inf)
        for j, there in _pieces(groups):
            square = squared_distances(rows[here], rows[there])
            if i == j:
                square[here[:, None] == there] = np.inf
            nearest[j] = smallest(np.concatenate([nearest[j], smallest(square, most)], axis=1), most)
        for without in range(GROUPS + 1):
            kept = np.delete(nearest, without, axis=0) if without < GROUPS else nearest
            ordered = smallest(kept.transpose(1, 0, 2).reshape(len(here), -1), most)
            for place, k in enumerate(ks):
                found[place, without, here] = ordered[:, k - 1] * (1 + 1e-9)  # rounding leaves no tie outside
    return list(found)


def _pieces(groups: list[np.ndarray]) -> list[tuple[int, np.ndarray]]:
    """The groups in pieces that make no block of distances too large, each with the number of its group."""
    return [(i, rows[part]) for i, rows in enumerate(groups) for part in blocks(len(rows))]


def _present(groups: list[np.ndarray], n: int) -> np.ndarray:
    """Which rows there are without each group, and with all ``[GROUPS + 1, N]``."""
    present = np.ones((GROUPS + 1, n), dtype=bool)
    for without, rows in enumerate(groups):
        present[without, rows] = False
    return present


def _share(hit: np.ndarray, present: np.ndarray) -> Measured:
    found = _interval(hit.sum(axis=1) / present.sum(axis=1), most=1.0)
    counted = wilson(int(hit[-1].sum()), hit.shape[1])
    return Measured(found.value, min(found.low, counted.low), max(found.high, counted.high))


def _interval(figures: np.ndarray, most: float = np.inf) -> Measured:
    return from_groups(float(figures[-1]), figures[:-1], least=0.0, most=most)
