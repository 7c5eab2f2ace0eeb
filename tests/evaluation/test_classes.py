"""Inception score, accuracy, calibration, class balance, CLIP score and drift, against algebra and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from undiffuse import UndiffuseError
from undiffuse.evaluation.classes import accuracy, calibration, class_balance, clip_score, inception_score
from undiffuse.evaluation.drift import drift
from undiffuse.evaluation.intervals import T, Z, wilson


def random(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def test_the_quantiles_are_scipys_and_wilson_is_its_interval() -> None:
    assert pytest.approx(scipy.stats.norm.ppf(0.975)) == Z
    assert pytest.approx(scipy.stats.t.ppf(0.975, 9), rel=1e-6) == T
    for count, n in ((0, 10), (3, 10), (10, 10), (50, 1000)):
        wanted = scipy.stats.binomtest(count, n).proportion_ci(method="wilson")
        found = wilson(count, n)
        assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    with pytest.raises(UndiffuseError, match="not a share"):
        wilson(3, 2)


def test_the_inception_score_of_extremes() -> None:
    assert inception_score(np.eye(7).repeat(3, 0)).value == pytest.approx(7)  # sure, and every class alike
    assert inception_score(np.full((20, 7), 1 / 7)).value == pytest.approx(1)  # of nothing sure
    assert inception_score(np.eye(7)[[2] * 20]).value == pytest.approx(1)  # one class only


def test_the_inception_score_is_that_of_scipys_entropies_and_its_interval_holds_the_mean() -> None:
    p = random().dirichlet([0.3] * 5, size=200)
    wanted = np.exp(np.mean([scipy.stats.entropy(row, p.mean(0)) for row in p]))
    assert inception_score(p).value == pytest.approx(wanted, rel=1e-10)
    assert inception_score(torch.from_numpy(p[::-1].copy())).value == pytest.approx(wanted, rel=1e-10)
    draws = [inception_score(random(i).dirichlet([0.3] * 5, size=100)) for i in range(120)]
    mean = np.mean([found.value for found in draws])
    assert sum(found.low <= mean <= found.high for found in draws) >= 108


def test_accuracy_counts() -> None:
    p = np.eye(3)[[0, 1, 2, 2]] * 0.8 + 0.2 / 3
    assert accuracy(p, np.array([0, 1, 2, 0])).value == 0.75


def said_and_right(n: int, seed: int, overconfidence: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """A two-class classifier that says q and is right with probability q - overconfidence."""
    draw = random(seed)
    q = draw.uniform(0.6, 1.0, n)
    labels = (draw.uniform(size=n) >= q - overconfidence).astype(int)
    return np.stack([q, 1 - q], 1), labels


def test_calibration_sees_overconfidence_and_only_that() -> None:
    honest, boastful = (calibration(*said_and_right(20_000, 0, off)) for off in (0.0, 0.2))
    assert honest.error.value < 0.02
    assert boastful.error.low < 0.2 < boastful.error.high
    assert boastful.count.sum() == 20_000
    gap = boastful.confidence - np.array([bin.value for bin in boastful.right])
    assert gap == pytest.approx(0.2, abs=0.05)
    inside = [b.low <= c <= b.high for b, c in zip(honest.right, honest.confidence, strict=True)]
    assert sum(inside) >= len(inside) - 2


def test_the_calibration_error_is_that_of_a_loop() -> None:
    p, y = said_and_right(300, 1, 0.1)
    total = 0.0
    for i in range(15):
        rows = (p.max(1) >= i / 15) & ((p.max(1) < (i + 1) / 15) | (i == 14))
        if rows.any():
            total += rows.sum() / 300 * abs((p.argmax(1) == y)[rows].mean() - p.max(1)[rows].mean())
    assert calibration(p, y).error.value == pytest.approx(total, rel=1e-10)


def test_class_balance_is_scipys_test_of_homogeneity() -> None:
    a, b = random().integers(0, 5, 400), random(1).choice(5, 900, p=[0.1, 0.15, 0.2, 0.25, 0.3])
    found = class_balance(a, b)
    wanted = scipy.stats.chi2_contingency(np.stack([np.bincount(a), np.bincount(b)]), correction=False)
    assert (found.chi_square, found.degrees) == pytest.approx((wanted.statistic, wanted.dof))
    assert found.p_value == pytest.approx(wanted.pvalue, rel=1e-8)
    assert found.samples == tuple(np.bincount(a))
    assert sum(found.expected) == pytest.approx(400)


def test_class_balance_finds_what_collapsed_and_nothing_else() -> None:
    data = random(1).integers(0, 10, 2000)
    collapsed = random(0).integers(0, 8, 500)
    found = class_balance(collapsed, data)
    assert found.p_value < 1e-6
    assert found.missing == (8, 9)
    assert found.shares[9].high < 0.02
    p_values = [
        class_balance(random(i).integers(0, 10, 200), random(900 + i).integers(0, 10, 300)).p_value for i in range(200)
    ]
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 1e-3  # right of equal classes: as often as it says
    rare = [
        class_balance(random(i).poisson(0.3, 100), random(900 + i).poisson(0.3, 300), 12).p_value for i in range(200)
    ]
    assert np.mean(np.array(rare) < 0.05) < 0.1  # classes too rare for the test are put together


def test_class_balance_of_one_class_says_nothing() -> None:
    found = class_balance(np.zeros(50, int), np.zeros(60, int))
    assert (found.degrees, found.p_value) == (0, 1.0)


def test_the_clip_score_is_the_cosine() -> None:
    images = np.array([[1.0, 0, 0], [0, 2, 0], [1, 0, 0], [1, 1, 0]])
    texts = np.array([[3.0, 0, 0], [0, 0, 1], [-1, 0, 0], [1, 0, 0]])
    assert clip_score(images, texts).value == pytest.approx(100 * (1 + 0 + 0 + 0.5**0.5) / 4)
    a, b = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = 100 * torch.nn.functional.cosine_similarity(a, b).clamp(min=0).mean()
    assert clip_score(a, b).value == pytest.approx(float(wanted))
    with pytest.raises(UndiffuseError, match="one text an image"):
        clip_score(images, texts[:3])
    with pytest.raises(UndiffuseError, match="row 0"):
        clip_score(0 * images, texts)


def test_drift_of_a_video_that_brightens_evenly() -> None:
    t = np.arange(5.0)[None, None, :, None, None]
    found = drift(random().standard_normal((6, 3, 1, 4, 4)) + 0.5 * t * np.array([1, -1, 1])[None, :, None, None, None])
    assert [step.value for step in found.steps] == pytest.approx([0.5] * 4)
    assert [away.value for away in found.from_first] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert found.mean_step.value == pytest.approx(0.5)
    frozen = drift(random().standard_normal((6, 1, 1, 2, 2)).repeat(4, 2))
    assert frozen.mean_step.value == 0
    with pytest.raises(UndiffuseError, match="two frames or more"):
        drift(np.zeros((4, 3, 1, 2, 2)))


@pytest.mark.parametrize(
    ("p", "labels", "said"),
    [
        (np.array([[3.0, -1.0], [0.0, 1.0]]), [0, 1], "logits"),
        (np.array([[0.5, 0.1], [0.0, 1.0]]), [0, 1], "logits"),
        (np.eye(2), [0, 2], "0 to 1"),
        (np.eye(2), [-1, 0], "0 to 1"),
        (np.eye(2), [0.0, 1.0], "one integer"),
        (np.eye(2), [0], "one integer"),
        (np.array([[np.nan, 1], [0, 1]]), [0, 1], "NaN"),
    ],
)
def test_what_are_no_probabilities_or_labels_is_refused(p: np.ndarray, labels: list, said: str) -> None:
    with pytest.raises(UndiffuseError, match=said):
        accuracy(p, np.array(labels))
