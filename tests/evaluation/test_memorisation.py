"""Copies are found, exact, noisy and moved; what is new is left alone."""

from __future__ import annotations

import json

import numpy as np
import pytest

from undiffuse import UndiffuseError, open_dataset
from undiffuse.evaluation.memorisation import Memorisation, memorisation, nearest_rows


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """1,300 training digits ``[N, 1, 8, 8]`` and 497 others, in 0..16."""
    pytest.importorskip("sklearn")
    dataset = open_dataset("digits")
    images, _ = dataset.read(range(len(dataset)))
    images = images[np.random.Generator(np.random.PCG64(0)).permutation(len(images))].reshape(-1, 1, 8, 8)
    return images[:1300], images[1300:]


def test_distances_are_those_of_a_loop_over_rows_and_shifts(digits: tuple[np.ndarray, np.ndarray]) -> None:
    training, other = digits[0][:60].astype(float), digits[1][:20].astype(float)
    for shifts in (0, 1):
        side = range(2 * shifts + 1)
        inner = other[..., shifts : 8 - shifts, shifts : 8 - shifts]
        wanted = [
            min(
                (np.linalg.norm(x - t[:, i : i + 8 - 2 * shifts, j : j + 8 - 2 * shifts]), k)
                for k, t in enumerate(training)
                for i in side
                for j in side
            )
            for x in inner
        ]
        distances, nearest = nearest_rows(other, training, shifts)
        assert distances == pytest.approx([d for d, _ in wanted], abs=1e-6)
        assert np.mean(nearest == [k for _, k in wanted]) > 0.9  # but for ties


@pytest.mark.parametrize("shifts", [0, 1])
@pytest.mark.parametrize("held", [False, True])
def test_a_copied_training_set_is_memorised_and_a_held_out_set_is_not(
    digits: tuple[np.ndarray, np.ndarray], shifts: int, held: bool
) -> None:
    training, other = digits

    def judged(samples: np.ndarray) -> Memorisation:
        return memorisation(samples, training, other[:240] if held else None, shifts=shifts)

    copied = judged(training[:200])
    assert copied.memorised
    assert copied.share.low > 0.98
    assert copied.copies == 200
    assert [pair.training for pair in copied.closest] == [pair.sample for pair in copied.closest]
    new = judged(other[240:])
    assert not new.memorised
    assert new.copies == 0
    assert new.share.value < 0.03
    noise = np.random.Generator(np.random.PCG64(1)).standard_normal((200, 1, 8, 8))
    assert judged(training[:200] + 0.5 * noise).share.low > 0.95
    mixed = np.concatenate([other[240:], training[:30]])
    assert judged(mixed).memorised
    assert judged(mixed).copies == 30
    assert {pair.sample for pair in judged(mixed).closest} <= set(range(257, 287))


def test_copies_moved_by_a_pixel_are_found_under_shifts_only(digits: tuple[np.ndarray, np.ndarray]) -> None:
    training, _ = digits
    for move in ((0, 1), (1, 0), (-1, 1)):
        moved = np.roll(training[:200], move, axis=(-2, -1))
        assert memorisation(moved, training, shifts=1).share.low > 0.98
        assert memorisation(moved, training).share.high < 0.05  # why shifts there are


def test_duplicates_in_the_training_set_do_not_hide_copies() -> None:
    """Were they counted as each other's neighbours, the threshold would be 0."""
    random = np.random.Generator(np.random.PCG64(0))
    training = random.standard_normal((300, 6)).repeat(3, axis=0)
    found = memorisation(training[:100] + 0.01, training)
    assert found.threshold > 0.1
    assert found.memorised
    assert not memorisation(random.standard_normal((300, 6)), training).memorised


def test_held_out_rows_that_are_training_rows_do_not_hide_copies() -> None:
    training = np.random.Generator(np.random.PCG64(0)).standard_normal((300, 6)).astype(np.float32)
    honest = memorisation(training[:100], training)
    leaked = memorisation(training[:100], training, training.astype(float))
    assert honest.memorised
    assert leaked.memorised
    assert leaked.threshold == honest.threshold


def test_it_seldom_cries_wolf() -> None:
    """New rows of the same law: at most a few of 100 sets are called memorised."""
    alarms = 0
    for seed in range(100):
        rows = np.random.Generator(np.random.PCG64(seed)).standard_normal((600, 4))
        alarms += memorisation(rows[:300], rows[300:]).memorised
    assert alarms <= 3


def test_the_result_is_json_and_order_does_not_matter() -> None:
    rows = np.random.Generator(np.random.PCG64(0)).standard_normal((600, 4))
    found, turned = memorisation(rows[:300], rows[300:]), memorisation(rows[:300][::-1], rows[300:][::-1])
    assert json.loads(json.dumps(found.to_json()))["share"]["n"] == 300
    assert turned.share == found.share
    assert [299 - pair.sample for pair in turned.closest] == [pair.sample for pair in found.closest]
    assert len(found.closest) == 10
    assert [p.distance for p in found.closest] == sorted(p.distance for p in found.closest)


@pytest.mark.parametrize(
    ("samples", "training", "shifts", "said"),
    [
        (np.zeros((5, 3)), np.zeros((200, 4)), 0, "do not compare"),
        (np.zeros((5, 3)), np.ones((200, 3)), 0, "0 different real rows"),
        (np.zeros((5, 3)), np.eye(3), 0, "at least 100"),
        (np.zeros((5, 30)), np.ones((200, 30)), 1, "no pictures"),
        (np.zeros((5, 4, 4)), np.ones((200, 4, 4)), 2, "less than half"),
        (np.zeros((5, 4, 4)), np.ones((200, 4, 4)), -1, "less than half"),
        (np.full((5, 3), np.nan), np.ones((200, 3)), 0, "NaN"),
        (np.zeros((0, 3)), np.ones((200, 3)), 0, "at least 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(samples: np.ndarray, training: np.ndarray, shifts: int, said: str) -> None:
    with pytest.raises(UndiffuseError, match=said):
        memorisation(samples, training, shifts=shifts)
