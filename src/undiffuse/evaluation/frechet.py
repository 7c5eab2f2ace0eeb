"""Frechet distance: how far apart two Gaussians are, and so two sets of rows with their means and covariances.

    F(a, b) = |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))                             Dowson & Landau 1982

Of Inception features it is called FID (Heusel et al. 2017, arXiv:1706.08500). With M = C_a^(1/2) C_b C_a^(1/2), which
is symmetric and positive, the trace of the root is the sum of the roots of M's eigenvalues, and

    T_ab = C_a^(-1/2) M^(1/2) C_a^(-1/2),    T_ba = C_a^(1/2) M^(-1/2) C_a^(1/2) = T_ab^-1

are the linear maps that carry the one Gaussian into the other. They are also its derivative: dF/dC_a = I - T_ab. So
each row x = m_a + c moves the figure by

    2 (m_a - m_b).c + c.(I - T_ab) c - tr((I - T_ab) C_a),

from which the interval comes. The figure of n rows is too large by about (constant)/n, on average, even for a perfect
generator (trap V4): compare it with the floor at the same n, or extrapolate with :func:`frechet_infinity`.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np

from ..errors import UndiffuseError, UndiffuseWarning
from .intervals import Measured, from_influence, grouped
from .statistics import Array, Moments, alike, parts


def frechet_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """``F(a, b)`` of two means and covariances, at least 0.

    In float64, and with symmetric matrices only (trap V5): no eigenvalue is complex, and none negative but for
    rounding.

    Args:
        mean_a, mean_b: ``[D]``.
        cov_a, cov_b: ``[D, D]``, symmetric, positive semidefinite.
    """
    mean_a, cov_a, mean_b, cov_b = (np.asarray(v, dtype=np.float64) for v in (mean_a, cov_a, mean_b, cov_b))
    size = mean_a.shape
    if len(size) != 1 or mean_b.shape != size or cov_a.shape != size * 2 or cov_b.shape != size * 2:
        shapes = [v.shape for v in (mean_a, cov_a, mean_b, cov_b)]
        raise UndiffuseError(f"a Frechet distance needs two means [D] and two covariances [D, D], got {shapes}")
    if not all(np.isfinite(v).all() for v in (mean_a, cov_a, mean_b, cov_b)):
        raise UndiffuseError("a mean or a covariance of the Frechet distance is not finite")
    root = _power(cov_a, 0.5)
    cross = np.sqrt(np.linalg.eigvalsh(_symmetric(root @ cov_b @ root)).clip(min=0)).sum()
    off = mean_a - mean_b
    return max(float(off @ off + np.trace(cov_a) + np.trace(cov_b) - 2 * cross), 0.0)


def frechet(samples: Array, data: Array, *, allow_small: bool = False) -> Measured:
    """The Frechet distance of rows ``[N, D]`` and ``[M, D]``, with its interval.

    The interval (influence functions of both sets) is for what N and M rows give on average; it does not remove their
    bias. Lower is better, 0 is the least. Time: two eigen-decompositions and two products of all rows with ``[D, D]``.

    Args:
        allow_small: Go on with fewer rows than the features have dimensions (trap V4); it warns and leaves a note.

    Raises:
        UndiffuseError: as many rows as the features have dimensions, or fewer.
    """
    a, b = alike(samples, data)
    of_a, of_b = Moments.of(a), Moments.of(b)
    note = _enough(of_a, of_b, allow_small)
    off, root, back = of_a.mean - of_b.mean, _power(of_a.covariance, 0.5), _power(of_a.covariance, -0.5)
    middle = _symmetric(root @ of_b.covariance @ root)
    half = _power(middle, 0.5)
    value = float(off @ off + np.trace(of_a.covariance) + np.trace(of_b.covariance) - 2 * np.trace(half))
    there, again = back @ half @ back, root @ _power(middle, -0.5) @ root
    influences = _influence(a, of_a.mean, off, there), _influence(b, of_b.mean, -off, again)
    found = from_influence(max(value, 0.0), *influences, least=0.0)
    return replace(found, note=note)


def frechet_infinity(samples: Array, data: Array, *, allow_small: bool = False) -> Measured:
    """The Frechet distance extrapolated to infinitely many rows on both sides (after Chong & Forsyth 2020,
    arXiv:1911.07023), with its interval. It may fall below 0 by chance.

    The bias goes like 1/n, so the figure of k equal parts is a straight line in k, and its value at k = 0 is wanted.
    Unlike there, the subsets of a size are disjoint parts whose figures are averaged, so that every row counts once at
    every size and its first-order noise leaves the slope alone; and both sides are parted, not the samples only.

    Raises:
        UndiffuseError: fewer rows than four times the rank of the features: half of them are no basis for a line.
    """
    a, b = alike(samples, data)
    whole = frechet(a, b, allow_small=allow_small)
    rank = _rank(Moments.of(a), Moments.of(b))
    most = min(len(a), len(b)) // (2 * rank)
    if most < 2 and not allow_small:
        raise UndiffuseError(
            f"{min(len(a), len(b))} rows cannot be extrapolated in {rank} dimensions: give {4 * rank} or more"
        )
    counts = np.arange(1, max(2, min(most, 5)) + 1)
    means = [whole.value]
    for count in counts[1:]:
        pairs = zip(grouped(len(a), int(count)), grouped(len(b), int(count), seed=1), strict=True)
        figures = [(Moments.of(a[i]), Moments.of(b[j])) for i, j in pairs]
        means.append(float(np.mean([frechet_distance(p.mean, p.covariance, q.mean, q.covariance) for p, q in figures])))
    value = float(np.polynomial.polynomial.polyfit(counts, means, 1)[0])
    reach = whole.high - whole.value
    return Measured(value, value - reach, value + reach, whole.note)


def _symmetric(matrix: np.ndarray) -> np.ndarray:
    return (matrix + matrix.T) / 2


def _power(matrix: np.ndarray, power: float) -> np.ndarray:
    """A symmetric positive matrix to a power; a direction without variance stays without."""
    values, vectors = np.linalg.eigh(_symmetric(matrix))
    seen = values > max(values[-1], 0) * len(values) * np.finfo(np.float64).eps
    return (vectors[:, seen] * values[seen] ** power) @ vectors[:, seen].T


def _influence(rows: np.ndarray, mean: np.ndarray, off: np.ndarray, transport: np.ndarray) -> np.ndarray:
    """What each row does to the figure ``[N]``, but for a constant."""
    slope = np.eye(len(mean)) - transport
    centred = (part - mean for part in parts(rows))
    return np.concatenate([2 * c @ off + ((c @ slope) * c).sum(axis=1) for c in centred])


def _rank(a: Moments, b: Moments) -> int:
    """In how many dimensions the features vary: as the larger set shows, or all if it is too small to show."""
    larger = a if a.n > b.n else b
    seen = larger.rank
    return seen if seen < larger.n - 1 else len(larger.mean)


def _enough(a: Moments, b: Moments, allow_small: bool) -> str:
    """The note for too few rows, or the refusal."""
    n = min(a.n, b.n)
    if n > len(a.mean) or n > (rank := _rank(a, b)):
        return ""
    said = f"{n} rows do not span the {rank} dimensions of the features, so their Frechet distance is mostly bias"
    if not allow_small:
        raise UndiffuseError(
            f"{said}: give more than {rank} rows, or features of fewer dimensions "
            "(`undiffuse evaluate` measures them all the same with allow_small)"
        )
    warnings.warn(said, UndiffuseWarning, stacklevel=3)
    return said
