"""Moments: numpy's own, in any order, in any parts, over any ranks, in constant memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from undiffuse import UndiffuseError
from undiffuse.evaluation.statistics import Moments, rows_of


def draw(n: int, d: int, seed: int = 0, mean: float = 0.0) -> np.ndarray:
    random = np.random.Generator(np.random.PCG64(seed))
    return mean + random.standard_normal((n, d)) @ random.standard_normal((d, d))


def close(found: Moments, rows: np.ndarray, rel: float = 1e-12) -> None:
    wanted = np.cov(rows.astype(np.float64), rowvar=False)
    assert found.n == len(rows)
    np.testing.assert_allclose(found.mean, rows.astype(np.float64).mean(0), rtol=rel, atol=rel)
    np.testing.assert_allclose(found.covariance, wanted, rtol=rel, atol=rel * np.abs(wanted).max())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_trap_V6_order_and_batch_size_do_not_matter(sizes: list[int], shuffle) -> None:
    rows = draw(sum(sizes) + 2, 3)
    order = list(range(len(rows)))
    shuffle.shuffle(order)
    batches = np.split(rows[order], np.cumsum(sizes))
    close(Moments.stream(batch for batch in batches if len(batch)), rows)


def test_trap_V6_a_large_mean_costs_no_digits_though_the_features_are_float32() -> None:
    rows = draw(5000, 4, mean=1e4).astype(np.float32)
    found = Moments.of(rows)
    assert found.mean.dtype == found.scatter.dtype == np.float64
    close(found, rows, rel=1e-10)
    single = rows.T @ rows / len(rows) - np.outer(rows.mean(0), rows.mean(0))  # what float32 sums would have given
    assert np.abs(single - found.covariance).max() > 1


def test_ranks_merge() -> None:
    rows = draw(1000, 5)
    ranks = [Moments.of(part) for part in np.array_split(rows, 4)]
    close(ranks[3] + (ranks[0] + ranks[2]) + ranks[1], rows)


def test_torch_and_half_precision_are_read_exactly() -> None:
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    for given_rows in (rows, rows.double(), rows.bfloat16(), rows.half()):
        close(Moments.of(given_rows), given_rows.double().numpy())


def test_the_rank_is_that_of_the_directions_seen() -> None:
    rows = draw(100, 3) @ np.ones((3, 7))  # one direction in seven numbers
    assert Moments.of(rows).rank == 1
    assert Moments.of(draw(100, 6)).rank == 6
    assert Moments.of(draw(4, 6)).rank == 3


def streamed_memory(rows: int, d: int = 64, batch: int = 500) -> int:
    """Bytes at the peak."""

    def batches() -> Iterator[np.ndarray]:
        random = np.random.Generator(np.random.PCG64(0))
        for _ in range(rows // batch):
            yield random.standard_normal((batch, d), dtype=np.float32)

    tracemalloc.start()
    try:
        assert Moments.stream(batches()).n == rows
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_rows_stream_in_constant_memory() -> None:
    assert streamed_memory(40_000) < 1.1 * streamed_memory(4_000)


@pytest.mark.slow
def test_a_million_rows_stream_in_constant_memory() -> None:
    assert streamed_memory(1_000_000) < 1.1 * streamed_memory(4_000)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (np.array([["a"]]), "numbers are needed"),
        (np.array([[1 + 2j]]), "numbers are needed"),
        (np.zeros((0, 3)), "at least 1 rows"),
        (np.zeros((3, 0)), "rows without numbers"),
        (np.float64(3), "at least 1 rows"),
        (np.array([[1.0], [np.nan]]), "row 1 holds NaN"),
        (np.array([[np.inf]] + [[0.0]] * 2000), "row 0 holds NaN"),
    ],
)
def test_what_are_no_rows_is_refused(rows: np.ndarray, said: str) -> None:
    with pytest.raises(UndiffuseError, match=said):
        rows_of(rows, "the rows")


def test_moments_of_nothing_and_of_other_widths_are_refused() -> None:
    with pytest.raises(UndiffuseError, match="no batch"):
        Moments.stream([])
    with pytest.raises(UndiffuseError, match="do not add up"):
        Moments.of(draw(5, 2)) + Moments.of(draw(5, 3))
    with pytest.raises(UndiffuseError, match="fewer than two"):
        _ = Moments.of(draw(1, 2)).covariance
