"""KID, MMD, precision, recall, density, coverage and sliced Wasserstein, against plain implementations and algebra."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import scipy.stats

from undiffuse import UndiffuseError
from undiffuse.evaluation import kid as kid_module
from undiffuse.evaluation import neighbours
from undiffuse.evaluation.kid import Gaussian, Polynomial, kid, mmd
from undiffuse.evaluation.neighbours import squared_distances
from undiffuse.evaluation.precision_recall import precision_recall
from undiffuse.evaluation.wasserstein import sliced_wasserstein


def draw(n: int, d: int, seed: int, scale: float = 1.0, mean: float = 0.0) -> np.ndarray:
    return mean + scale * np.random.Generator(np.random.PCG64(seed)).standard_normal((n, d))


# --- the oracles: double loops, as the papers have them ---------------------------------------------------------------


def plain_mmd(x: np.ndarray, y: np.ndarray, k) -> float:
    n, m = len(x), len(y)
    own_x = sum(k(x[i], x[j]) for i, j in product(range(n), repeat=2) if i != j) / (n * (n - 1))
    own_y = sum(k(y[i], y[j]) for i, j in product(range(m), repeat=2) if i != j) / (m * (m - 1))
    return float(own_x + own_y - 2 * sum(k(p, q) for p, q in product(x, y)) / (n * m))


def plain_radius(rows: np.ndarray, i: int, k: int) -> float:
    return sorted(float(np.linalg.norm(rows[i] - rows[j])) for j in range(len(rows)) if j != i)[k - 1]


def plain_precision_recall(x: np.ndarray, y: np.ndarray, k: int, k_density: int) -> tuple[float, ...]:
    """``x`` generated, ``y`` real."""

    def covered(points: np.ndarray, rows: np.ndarray, k: int) -> list[int]:
        """In how many balls of ``rows`` each point lies."""
        radii = [plain_radius(rows, i, k) for i in range(len(rows))]
        return [sum(bool(np.linalg.norm(p - c) <= r) for c, r in zip(rows, radii, strict=True)) for p in points]

    precision = np.mean([count > 0 for count in covered(x, y, k)])
    recall = np.mean([count > 0 for count in covered(y, x, k)])
    density = np.mean(covered(x, y, k_density)) / k_density
    radii = [plain_radius(y, i, k_density) for i in range(len(y))]
    coverage = np.mean([any(np.linalg.norm(p - c) <= r for p in x) for c, r in zip(y, radii, strict=True)])
    return float(precision), float(recall), float(density), float(coverage)


# --- MMD --------------------------------------------------------------------------------------------------------------


def test_kid_is_that_of_a_double_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", 16)  # several blocks, the last one ragged
    x, y = draw(45, 4, 0, mean=0.3), draw(37, 4, 1)
    assert kid(x, y).value == pytest.approx(plain_mmd(x, y, lambda p, q: (p @ q / 4 + 1) ** 3), rel=1e-10)
    found = mmd(x, y, Gaussian(0.8)).value
    assert found == pytest.approx(plain_mmd(x, y, lambda p, q: np.exp(-((p - q) ** 2).sum() / 1.28)), rel=1e-10)


def test_the_median_heuristic_is_the_median_distance_of_the_data() -> None:
    y = draw(200, 3, 1)
    assert Gaussian.of(y).width == pytest.approx(np.median(scipy.spatial.distance.pdist(y)), rel=1e-10)
    assert mmd(draw(50, 3, 0, mean=1), y) == mmd(draw(50, 3, 0, mean=1), y, Gaussian.of(y))
    with pytest.raises(UndiffuseError, match="no width"):
        Gaussian.of(np.ones((20, 2)))


def test_trap_V13_the_subset_is_chosen_from_n() -> None:
    x, y = draw(60, 4, 0), draw(50, 4, 1)
    assert np.isfinite(kid(x, y).value)  # where a fixed 1,000 fails
    for subset in (51, 1000, 2, 0, -1):
        with pytest.raises(UndiffuseError, match="choose 3 to 50"):
            kid(x, y, subset=subset)
    all_of_them = kid(draw(60, 4, 0), draw(50, 4, 1), subset=50)
    assert np.isfinite(all_of_them.value)


def test_blocks_have_the_expectation_of_all_pairs_and_each_row_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = draw(3000, 4, 0, mean=0.3), draw(3000, 4, 1)
    whole = kid(x, y)
    monkeypatch.setattr(kid_module, "MOST", 500)
    parts = kid(x, y)
    assert parts.value != whole.value
    assert parts.value == pytest.approx(whole.value, abs=(whole.high - whole.low) / 2)
    assert parts.high - parts.low == pytest.approx(whole.high - whole.low, rel=0.15)


@pytest.mark.parametrize("kernel", [Polynomial(), Gaussian(2.0)])
@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_mmd_is_unbiased_and_its_intervals_hold_the_truth(kernel, shift: float) -> None:
    """The truth from 16 times as many rows; at least 90 % of 120 intervals."""
    draws = [mmd(draw(100, 3, 2 * i, mean=shift), draw(100, 3, 2 * i + 1), kernel) for i in range(120)]
    true = np.mean([mmd(draw(1600, 3, 900 + i, mean=shift), draw(1600, 3, 950 + i), kernel).value for i in range(6)])
    true = true if shift else 0.0
    values = np.array([found.value for found in draws])
    assert abs(values.mean() - true) < 4 * values.std() / 120**0.5
    assert sum(found.low <= true <= found.high for found in draws) >= 108


# --- precision, recall, density, coverage -----------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "k_density", "block"), [(3, 5, 2048), (4, 2, 3)])
def test_precision_and_recall_are_those_of_double_loops(
    k: int, k_density: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", block)  # 3: groups in pieces
    x, y = draw(70, 2, 0, scale=0.7, mean=0.4), draw(90, 2, 1)
    found = precision_recall(x, y, k, k_density)
    assert [figure.value for figure in found] == pytest.approx(plain_precision_recall(x, y, k, k_density), rel=1e-12)
    assert 0.02 < found.recall.value < 0.98  # the case tells the four apart
    assert len({round(figure.value, 6) for figure in found}) == 4


def test_the_groups_left_out_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures without each group, found in one pass, are those of the rows without it."""
    from undiffuse.evaluation import precision_recall as module

    seen: list[np.ndarray] = []
    monkeypatch.setattr(module, "from_groups", lambda v, w, least, most: seen.append(w) or module.Measured(v, v, v))
    x, y = draw(70, 2, 0, scale=0.7, mean=0.4), draw(90, 2, 1)
    precision_recall(x, y)
    groups = zip(module.grouped(70), module.grouped(90, seed=1), strict=True)
    plain = [plain_precision_recall(np.delete(x, i, 0), np.delete(y, j, 0), 3, 5) for i, j in groups]
    np.testing.assert_allclose(np.array(seen[:4]).T[:, [0, 1, 2, 3]], plain, rtol=1e-12)


def test_trap_V7_a_collapsed_set_has_high_precision_and_recall_near_zero() -> None:
    y = draw(600, 3, 0)
    collapsed = 0.05 * draw(600, 3, 1)
    found = precision_recall(collapsed, y)
    assert found.precision.low > 0.95
    assert found.recall.high < 0.05
    assert found.coverage.value < 0.2
    scattered = precision_recall(draw(600, 3, 1, scale=6), y)  # and the reverse: everywhere, seldom right
    assert scattered.precision.high < 0.3
    assert scattered.recall.low > 0.8


def test_of_a_perfect_generator_the_four_are_alike_and_density_is_one() -> None:
    found = precision_recall(draw(1000, 4, 0), draw(1000, 4, 1))
    assert found.precision.value == pytest.approx(found.recall.value, abs=0.03)
    assert found.density.low < 1 < found.density.high
    assert found.coverage.value == pytest.approx(1 - 2.0**-5, abs=0.02)  # Naeem et al., eq. 9, for N = M


def test_intervals_of_precision_and_recall_hold_the_mean() -> None:
    draws = [precision_recall(draw(150, 3, 2 * i, scale=0.8, mean=0.3), draw(150, 3, 2 * i + 1)) for i in range(40)]
    for figures in zip(*draws, strict=True):
        mean = np.mean([figure.value for figure in figures])
        assert sum(figure.low <= mean <= figure.high for figure in figures) > 33


def test_duplicates_and_copies_are_inside() -> None:
    y = np.repeat(draw(30, 2, 0), 5, axis=0)  # all radii are 0
    found = precision_recall(y, y)
    assert [found.precision.value, found.recall.value, found.coverage.value] == [1, 1, 1]
    grid = np.stack(np.meshgrid(np.arange(10.0), np.arange(10.0)), -1).reshape(-1, 2)  # all distances are ties
    found = precision_recall(grid[:70], grid[30:])
    assert [figure.value for figure in found] == pytest.approx(plain_precision_recall(grid[:70], grid[30:], 3, 5))


def test_too_few_rows_and_no_neighbours_are_refused() -> None:
    with pytest.raises(UndiffuseError, match="at least 60 samples"):
        precision_recall(draw(59, 2, 0), draw(100, 2, 1))
    with pytest.raises(UndiffuseError):
        precision_recall(draw(100, 2, 0), draw(100, 2, 1), k=0)


def test_distances_far_from_the_origin_keep_their_digits() -> None:
    a, b = draw(20, 5, 0, mean=1e6), draw(30, 5, 1, mean=1e6)
    wanted = ((a[:, None] - b[None]) ** 2).sum(2)
    np.testing.assert_allclose(squared_distances(a, b), wanted, rtol=1e-6)
    assert squared_distances(a, a).min() >= 0


# --- sliced Wasserstein -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(40, 40), (40, 60), (60, 37)])
def test_in_one_dimension_it_is_the_wasserstein_distance(n: int, m: int) -> None:
    """Exactly, by repeating the rows of both until there are equally many."""
    a, b = draw(n, 1, 0), draw(m, 1, 1, scale=2, mean=1)
    long_a, long_b = np.sort(np.repeat(a[:, 0], m)), np.sort(np.repeat(b[:, 0], n))
    assert sliced_wasserstein(a, b).value == pytest.approx(((long_a - long_b) ** 2).mean() ** 0.5, rel=1e-12)


def test_a_shift_is_seen_from_every_direction_by_its_share() -> None:
    """E (u.v)^2 = |v|^2 / D over the sphere."""
    a = draw(200, 8, 0)
    assert sliced_wasserstein(a, a + 3.0, directions=4000).value == pytest.approx(3.0, rel=0.03)
    assert sliced_wasserstein(a, a[::-1]).value == 0


def test_intervals_of_sliced_wasserstein_hold_the_mean() -> None:
    found = [sliced_wasserstein(draw(100, 2, 2 * i, mean=0.5), draw(100, 2, 2 * i + 1), 32) for i in range(100)]
    mean = np.mean([figure.value for figure in found])
    assert sum(figure.low <= mean <= figure.high for figure in found) >= 88


def test_the_order_of_rows_does_not_matter() -> None:
    x, y = draw(100, 3, 0, mean=0.3), draw(120, 3, 1)
    for function in (kid, mmd, sliced_wasserstein):
        assert function(x[::-1], y).value == pytest.approx(function(x, y).value, rel=1e-9)
    turned, straight = precision_recall(x[::-1], y), precision_recall(x, y)
    assert [figure.value for figure in turned] == [figure.value for figure in straight]
