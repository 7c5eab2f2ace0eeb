"""The Frechet distance: scipy's matrix root, exact Gaussians, the coverage of its intervals, and the traps."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from undiffuse import UndiffuseError, UndiffuseWarning
from undiffuse.evaluation.frechet import frechet, frechet_distance, frechet_infinity
from undiffuse.evaluation.statistics import Moments


def draw(n: int, d: int, seed: int, scale: float = 1.0, mean: float = 0.0) -> np.ndarray:
    """Gaussian rows whose deviations go from 0.3 to 1.5."""
    random = np.random.Generator(np.random.PCG64(seed))
    return mean + scale * random.standard_normal((n, d)) * np.linspace(0.3, 1.5, d)


def by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    cov_a, cov_b = (np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (a, b))
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root.real))


@pytest.mark.parametrize("d", [1, 5, 40])
def test_it_is_that_of_scipys_matrix_root(d: int) -> None:
    mix = np.random.Generator(np.random.PCG64(9)).standard_normal((d, d))
    a, b = draw(300, d, 0), draw(500, d, 1, scale=1.3, mean=0.2) @ mix
    wanted = by_scipy(a, b)
    assert frechet(a, b).value == pytest.approx(wanted, rel=1e-8)
    assert frechet(b, a).value == pytest.approx(wanted, rel=1e-8)
    p, q = Moments.of(a), Moments.of(b)
    assert frechet_distance(p.mean, p.covariance, q.mean, q.covariance) == pytest.approx(wanted, rel=1e-8)


def test_that_of_commuting_gaussians() -> None:
    axes = np.linalg.qr(np.random.Generator(np.random.PCG64(0)).standard_normal((5, 5)))[0]
    a, b = np.array([4.0, 1.0, 0.25, 0.0, 9.0]), np.array([1.0, 1.0, 4.0, 1.0, 0.0])
    mean = np.array([1.0, -2.0, 0, 0, 0.5])
    wanted = float(mean @ mean + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum())
    got = frechet_distance(mean, axes @ np.diag(a) @ axes.T, 0 * mean, axes @ np.diag(b) @ axes.T)
    assert got == pytest.approx(wanted, abs=1e-7)


def test_trap_V5_singular_covariances_give_a_real_number() -> None:
    flat = draw(200, 4, 0) @ np.random.Generator(np.random.PCG64(1)).standard_normal((4, 30))  # rank 4 of 30
    other = draw(200, 4, 2) @ np.random.Generator(np.random.PCG64(3)).standard_normal((4, 30))
    found = frechet(flat, other, allow_small=False)  # 200 rows do span the four directions
    assert np.isfinite([found.value, found.low, found.high]).all()
    assert frechet(flat, flat).value == pytest.approx(0, abs=1e-6)
    assert frechet(np.ones((50, 3)), np.zeros((50, 3))).value == pytest.approx(3)  # no variance at all


def test_trap_V4_a_perfect_generator_has_no_zero_and_fewer_rows_than_dimensions_are_refused() -> None:
    figures = [frechet(draw(n, 32, 0), draw(n, 32, 1)).value for n in (50, 200, 1000)]
    assert figures[0] > 3 * figures[1] > 9 * figures[2] > 0
    with pytest.raises(UndiffuseError, match="32 rows do not span the 32 dimensions"):
        frechet(draw(32, 32, 0), draw(500, 32, 1))
    with pytest.raises(UndiffuseError, match="do not span"):
        frechet(draw(500, 32, 0), draw(20, 32, 1))
    with pytest.warns(UndiffuseWarning, match="mostly bias"):
        found = frechet(draw(32, 32, 0), draw(500, 32, 1), allow_small=True)
    assert "do not span" in found.note


@pytest.mark.parametrize("seed", range(3))
def test_the_influences_are_derivatives(seed: int) -> None:
    """The error from the influences is that of the exact jackknife, which leaves one row out at a time."""
    a, b = draw(150, 3, seed), draw(120, 3, seed + 10, scale=1.4, mean=0.5)
    found = frechet(a, b)
    squares = 0.0
    for n, one in ((len(a), lambda i: (np.delete(a, i, 0), b)), (len(b), lambda i: (a, np.delete(b, i, 0)))):
        without = np.array([by_scipy(*one(i)) for i in range(n)])
        squares += (n - 1) * without.var()
    assert (found.high - found.value) / 1.959964 == pytest.approx(squares**0.5, rel=0.03)


CASES = {"perfect": (1.0, 0.0), "near": (1.1, 0.1), "far": (1.5, 0.5)}


@pytest.mark.parametrize("case", CASES)
def test_the_intervals_hold_what_they_promise(case: str) -> None:
    """Of 120 draws of 200 rows in 16 dimensions at least 90 % hold the mean figure of 200 rows, and, extrapolated, the
    true distance, which is known. (95 % promised; fewer than 108 of 120 would be a chance of 1 %.)"""
    scale, mean = CASES[case]
    deviations = np.linspace(0.3, 1.5, 16)
    true = 16 * mean**2 + ((scale - 1) ** 2 * deviations**2).sum()
    plain, infinite = [], []
    for seed in range(120):
        a, b = draw(200, 16, 2 * seed, scale, mean), draw(200, 16, 2 * seed + 1)
        plain.append(frechet(a, b))
        infinite.append(frechet_infinity(a, b))
    average = np.mean([found.value for found in plain])
    assert sum(found.low <= average <= found.high for found in plain) >= 108
    assert sum(found.low <= true <= found.high for found in infinite) >= 108
    spread = np.std([found.value for found in plain])
    assert (
        np.median([found.high - found.value for found in plain]) < 1.96 * 1.6 * spread
    )  # and they are no wider than that
    assert abs(np.mean([found.value for found in infinite]) - true) < 0.15 * (average - true)  # the bias is gone


def test_extrapolation_needs_four_times_the_rank() -> None:
    with pytest.raises(UndiffuseError, match="give 64 or more"):
        frechet_infinity(draw(60, 16, 0), draw(60, 16, 1))


def test_order_and_type_do_not_matter() -> None:
    a, b = draw(300, 8, 0).astype(np.float32), draw(300, 8, 1).astype(np.float32)
    wanted = frechet(a, b)
    assert frechet(a[::-1], b).value == pytest.approx(wanted.value, rel=1e-10)
    assert frechet(torch.from_numpy(a), torch.from_numpy(b)) == wanted
    assert frechet(a.reshape(300, 2, 2, 2), b).value == wanted.value


def test_what_has_no_frechet_distance_is_refused() -> None:
    with pytest.raises(UndiffuseError, match="3 numbers a row and the data 4"):
        frechet(draw(10, 3, 0), draw(10, 4, 0))
    with pytest.raises(UndiffuseError, match="at least 2 rows"):
        frechet(draw(1, 3, 0), draw(10, 3, 0))
    with pytest.raises(UndiffuseError, match="two means"):
        frechet_distance(np.zeros(2), np.eye(3), np.zeros(2), np.eye(2))
    with pytest.raises(UndiffuseError, match="not finite"):
        frechet_distance(np.array([np.nan]), np.eye(1), np.zeros(1), np.eye(1))
