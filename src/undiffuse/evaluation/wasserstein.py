"""Sliced Wasserstein distance: how far rows must be moved, seen from random directions."""

from __future__ import annotations

import numpy as np

from ..errors import UndiffuseError
from .intervals import GROUPS, Measured, from_groups, grouped
from .statistics import Array, alike


def sliced_wasserstein(samples: Array, data: Array, directions: int = 128, seed: int = 0) -> Measured:
    """``(mean over directions of W_2^2)^(1/2)`` of ``[N, D]`` and ``[M, D]``, in the units of the data, with its
    interval (groups) (Rabin et al. 2011, LNCS 6667; Bonneel et al. 2015). Lower is better.

    Exact on each line: the k-th smallest goes to the k-th smallest, in proportion where N and M differ. It is above 0
    for any two finite sets: compare it with its floor.

    Args:
        directions: Random unit vectors, the same for every pair of sets of a ``seed``.
    """
    a, b = alike(samples, data, 2 * GROUPS)
    if directions < 1:
        raise UndiffuseError(f"{directions} directions: at least 1")
    axes = np.random.Generator(np.random.PCG64(seed)).standard_normal((a.shape[1], directions))
    axes /= np.linalg.norm(axes, axis=0)
    on_a, on_b = (rows.astype(np.float64) @ axes for rows in (a, b))
    value = _distance(on_a, on_b)
    pairs = zip(grouped(len(a)), grouped(len(b), seed=1), strict=True)
    without = [_distance(np.delete(on_a, i, 0), np.delete(on_b, j, 0)) for i, j in pairs]
    return from_groups(value, np.array(without), least=0.0)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """The integral of the squared difference of the columns' quantile functions, which are steps."""
    a, b = np.sort(a, axis=0), np.sort(b, axis=0)
    ends = np.unique(np.concatenate([np.arange(1, len(a) + 1) * len(b), np.arange(1, len(b) + 1) * len(a)]))
    begins = np.concatenate([[0], ends[:-1]])  # in units of 1/(N M): whole numbers, so no step is missed by rounding
    square = (a[begins // len(b)] - b[begins // len(a)]) ** 2
    return float(np.sqrt((ends - begins) @ square.mean(axis=1) / (len(a) * len(b))))
