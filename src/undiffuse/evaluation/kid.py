"""Maximum mean discrepancy: how far apart two sets are in the eyes of a kernel (Gretton et al. 2012, JMLR 13, eq. 3).

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

Unbiased, so that it is 0 on average for a perfect generator at any n, and below 0 half of the time. With the polynomial
kernel it is KID (Binkowski et al. 2018, arXiv:1801.01401); with a Gaussian one it serves for data of few dimensions.

Up to 5,000 rows all pairs count, the most exact way. More rows are parted into disjoint random blocks of at most that
many, whose figures are averaged: the expectation is the same (the usual 100 subsets of 1,000 overlap, and their
spread is no interval). A block is chosen from n, so none is larger than n (trap V13).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import UndiffuseError
from .intervals import Measured, from_influence, grouped
from .neighbours import BLOCK, blocks, squared_distances
from .statistics import Array, alike

MOST = 5000  # rows of a block
Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Polynomial:
    """``(x.y / D + 1)^degree``, KID's kernel."""

    degree: int = 3

    def __call__(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** self.degree


@dataclass(frozen=True)
class Gaussian:
    """``exp(-|x - y|^2 / (2 width^2))``."""

    width: float

    def __call__(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.exp(squared_distances(x, y) / (-2 * self.width**2))

    @classmethod
    def of(cls, data: Array) -> Gaussian:
        """The width is the median distance between pairs of (at most 2,048, evenly spaced) rows of the data: the median
        heuristic, Gretton et al. 2012, section 8. Of the data only, so that the kernel does not change with the
        samples."""
        rows, _ = alike(data, data)
        rows = rows[:: -(-len(rows) // BLOCK)]
        square = squared_distances(rows, rows)[np.triu_indices(len(rows), 1)]
        width = float(np.median(np.sqrt(square)))
        if not width:
            raise UndiffuseError("more than half of the data's rows are equal: a Gaussian kernel has no width there")
        return cls(width)


def kid(samples: Array, data: Array, subset: int | None = None) -> Measured:
    """The kernel inception distance of features ``[N, D]`` and ``[M, D]``, with its interval. Lower is better.

    Literature often gives it times 1,000.

    Args:
        subset: Rows of a block; by default all, or 5,000.

    Raises:
        UndiffuseError: a subset larger than either set.
    """
    return mmd(samples, data, Polynomial(), subset)


def mmd(samples: Array, data: Array, kernel: Kernel | None = None, subset: int | None = None) -> Measured:
    """The unbiased ``MMD^2`` of ``[N, D]`` and ``[M, D]``, with its interval (influence). Lower is better.

    Args:
        kernel: By default a :class:`Gaussian` of the median distance between rows of the data.
        subset: Rows of a block; by default all, or 5,000.
    """
    a, b = alike(samples, data, least=3)
    least, most = min(len(a), len(b)), max(len(a), len(b))
    if subset is not None and not 3 <= subset <= least:
        raise UndiffuseError(f"a subset of {subset} rows from {least}: choose 3 to {least}")
    count = least // subset if subset else max(1, min(-(-most // MOST), least // 3))
    kernel = kernel or Gaussian.of(b)
    pairs = zip(_parts(a, count, 0), _parts(b, count, 1), strict=True)
    figures = [_block(a[i][:subset], b[j][:subset], kernel) for i, j in pairs]
    value = float(np.mean([figure for figure, _, _ in figures]))
    # Blocks are disjoint, so each row moves the mean of all figures by 1/count of what it does to its own.
    return from_influence(
        value, np.concatenate([of_a for _, of_a, _ in figures]), np.concatenate([of_b for *_, of_b in figures])
    )


def _parts(rows: np.ndarray, count: int, seed: int) -> list[np.ndarray]:
    return grouped(len(rows), count, seed) if count > 1 else [np.arange(len(rows))]


def _block(x: np.ndarray, y: np.ndarray, kernel: Kernel) -> tuple[float, np.ndarray, np.ndarray]:
    """``MMD^2`` of all pairs, and what each row does to it."""
    n, m = len(x), len(y)
    own_x, own_y = _sums(x, x, kernel)[0] / (n - 1), _sums(y, y, kernel)[0] / (m - 1)
    cross_x, cross_y = _sums(x, y, kernel, own=False)
    cross_x, cross_y = cross_x / m, cross_y / n
    value = own_x.mean() + own_y.mean() - 2 * cross_x.mean()
    return float(value), 2 * (own_x - cross_x), 2 * (own_y - cross_y)


def _sums(x: np.ndarray, y: np.ndarray, kernel: Kernel, own: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The kernel summed over the other set, for each row of both; ``own``: x is y, and no row meets itself."""
    of_x, of_y = np.zeros(len(x)), np.zeros(len(y))
    for i in blocks(len(x)):
        for j in blocks(len(y)):
            values = kernel(x[i].astype(np.float64), y[j].astype(np.float64))
            if own and i == j:
                np.fill_diagonal(values, 0)
            of_x[i] += values.sum(axis=1)
            of_y[j] += values.sum(axis=0)
    return of_x, of_y
