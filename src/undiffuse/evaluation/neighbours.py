"""Distances between many rows, a block at a time: the memory is that of a block, whatever the number of rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..errors import UndiffuseError

BLOCK = 2048  # rows and columns of a block of distances: 32 MB


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``|a_i - b_j|^2``, ``[N, M]`` of ``[N, D]`` and ``[M, D]``, float64.

    By the product |a|^2 + |b|^2 - 2 a.b, after both are moved so that b's mean is 0: far from the origin its rounding
    would hide small distances. Rows that rounding cannot tell apart are at distance 0, so that copies are seen as
    copies.
    """
    b = b.astype(np.float64)
    centre = b.mean(axis=0)
    a, b = a - centre, b - centre
    lengths = np.einsum("ij,ij->i", a, a)[:, None] + np.einsum("ij,ij->i", b, b)
    if not np.isfinite(lengths).all():
        raise UndiffuseError("the numbers are too large: the squares of their distances are infinite")
    square = a @ b.T
    square *= -2
    square += lengths
    lengths *= a.shape[1] * np.finfo(np.float64).eps
    square[square < lengths] = 0
    return square


def blocks(n: int) -> Iterator[slice]:
    """0..n in slices of at most ``BLOCK``."""
    return (slice(begin, min(begin + BLOCK, n)) for begin in range(0, n, BLOCK))


def smallest(square: np.ndarray, k: int) -> np.ndarray:
    """The ``k`` smallest of each row, in order; infinity where a row has fewer."""
    if square.shape[1] < k:
        square = np.pad(square, ((0, 0), (0, k - square.shape[1])), constant_values=np.inf)
    return np.sort(np.partition(square, k - 1, axis=1)[:, :k], axis=1)
