"""``measure``: every figure has n, an interval, and the floor of a perfect generator."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from undiffuse import UndiffuseError, UndiffuseWarning
from undiffuse.config import from_json, to_json
from undiffuse.evaluation.metrics import HAD, METRICS, Examples, Figure, measure


def examples(n: int, seed: int, shift: float = 0.0) -> Examples:
    """Of everything that any metric needs."""
    random = np.random.Generator(np.random.PCG64(seed))
    rows = random.standard_normal((n, 6)) + shift
    p = random.dirichlet([0.5] * 4, size=n)
    return Examples(rows, rows[:, :2], p, p.argmax(1), rows, rows + 0.1, rows.reshape(n, 1, 2, 3, 1).repeat(2, 4))


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_has_what_it_promises(name: str) -> None:
    found = measure(examples(200, 0), examples(600, 1), [name])
    assert list(found) == list(METRICS[name].better)
    for figure in found.values():
        assert figure.low <= figure.value <= figure.high
        assert figure.n == 200
        assert figure.n_data == (400 if METRICS[name].against else None)
        assert figure.floor is not None
        assert figure.floor_low is not None
        assert figure.floor_high is not None
        assert figure.floor_low <= figure.floor <= figure.floor_high
        # Samples of the data's own law: no difference is seen, beyond one in a few hundred.
        assert (
            figure.low - (figure.high - figure.low) / 2 <= figure.floor <= figure.high + (figure.high - figure.low) / 2
        )
        assert from_json(Figure, to_json(figure)) == figure
        assert str(figure).startswith(figure.name)


def test_what_is_not_the_data_is_beyond_the_floor() -> None:
    found = measure(examples(300, 0, shift=1.0), examples(800, 1))
    for name, figure in found.items():
        assert figure.floor_low is not None
        assert figure.floor_high is not None
        if name in ("frechet", "kid", "sliced_wasserstein", "mmd"):
            assert figure.low > figure.floor_high
        if name in ("precision", "recall", "coverage"):
            assert figure.value < figure.floor_low


def test_the_floor_is_real_against_real_at_the_same_n() -> None:
    data, samples = examples(1000, 1), examples(5000, 0)
    found = measure(samples, data, ["frechet"])["frechet"]
    assert (found.n, found.n_data) == (500, 500)  # half of the data stands where the samples stand
    assert "500 rows of the data set aside at random, seed 0" in found.split
    assert found.value == pytest.approx(found.floor, rel=0.6)
    held = measure(samples, data, ["frechet"], held_out=examples(300, 2))["frechet"]
    assert (held.n, held.n_data, held.split) == (300, 1000, "300 held-out rows")
    copied = measure(examples(300, 2), data, ["frechet"], held_out=examples(300, 2))["frechet"]
    assert (copied.value, copied.low) == (copied.floor, copied.floor_low)  # the floor's set itself


def test_a_floor_of_the_data_itself_is_refused_and_a_few_shared_rows_are_stated() -> None:
    data, samples = examples(300, 1), examples(100, 0)
    with pytest.raises(UndiffuseError, match="no floor"):
        measure(samples, data, ["kid"], held_out=data)
    mixed = Examples(features=np.concatenate([np.asarray(data.features)[:7], np.asarray(examples(93, 2).features)]))
    assert "7 of them also in the data" in measure(samples, data, ["kid"], held_out=mixed)["kid"].split


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["frechet", "kid", "precision_recall"])
def test_no_figure_is_nan_or_infinite(name: str) -> None:
    random = np.random.Generator(np.random.PCG64(0))
    huge = Examples(features=1e200 * random.standard_normal((100, 3)))
    with pytest.raises(UndiffuseError, match="too large"):
        measure(huge, Examples(features=1e200 * random.standard_normal((300, 3))), [name])


def test_the_order_of_samples_does_not_matter_and_the_seed_does_only_where_rows_are_drawn() -> None:
    data, held = examples(300, 1), examples(200, 2)
    samples = examples(200, 0)
    straight = measure(samples, data, ["frechet", "kid"], held_out=held)
    turned = measure(samples.take(np.arange(200)[::-1]), data, ["frechet", "kid"], held_out=held, seed=3)
    for name, figure in straight.items():
        assert turned[name].value == pytest.approx(figure.value, rel=1e-9)
    assert measure(samples, data) == measure(samples, data)
    assert measure(samples, data, seed=1)["kid"].floor != measure(samples, data)["kid"].floor


def test_trap_V4_too_few_rows_are_refused_and_an_override_is_stated() -> None:
    random = np.random.Generator(np.random.PCG64(0))
    samples, data = (Examples(features=random.standard_normal((n, 90))) for n in (80, 300))
    with pytest.raises(UndiffuseError, match="80 rows do not span the 90 dimensions"):
        measure(samples, data)
    with pytest.warns(UndiffuseWarning, match="mostly bias"):
        found = measure(samples, data, allow_small=True)
    assert "do not span" in found["frechet"].note
    assert not found["kid"].note
    assert found["frechet"].value > 10  # of a perfect generator: why it is refused


def test_by_default_all_that_fit_are_measured() -> None:
    vectors = measure(
        Examples(vectors=np.random.Generator(np.random.PCG64(0)).standard_normal((100, 2))), examples(300, 1)
    )
    assert list(vectors) == ["sliced_wasserstein", "mmd"]
    everything = {n for name, m in METRICS.items() if not m.asked for n in m.better}
    assert set(measure(examples(200, 0), examples(400, 1))) == everything
    assert METRICS["frechet_infinity"].asked


def test_a_metric_of_samples_alone_needs_no_such_data_and_then_has_no_floor() -> None:
    data = Examples(features=np.zeros((400, 3)))
    found = measure(examples(200, 0), data, ["accuracy"])["accuracy"]
    assert (found.value, found.floor, found.n_data) == (1.0, None, None)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: measure(examples(50, 0), examples(200, 1), ["fretchet"]), "did you mean 'frechet'"),
        (lambda: measure(Examples(features=np.zeros((9, 2))), Examples(vectors=np.zeros((9, 2)))), "no metric fits"),
        (lambda: measure(Examples(features=np.zeros((9, 2))), examples(9, 0), ["mmd"]), "needs vectors of both"),
        (lambda: measure(Examples(features=np.zeros((9, 2))), examples(9, 0), ["accuracy"]), "needs probabilities"),
        (lambda: measure(examples(1, 0), examples(50, 1)), "nothing to compare"),
        (lambda: measure(examples(50, 0), examples(3, 1)), "nothing to compare"),
        (lambda: Examples(), "no arrays"),
        (lambda: Examples(features=np.zeros((3, 2)), labels=np.zeros(4)), "3 features, 4 labels"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, said: str) -> None:
    with pytest.raises(UndiffuseError, match=said):
        call()


def test_what_a_metric_needs_can_be_told() -> None:
    """A metric that is named and cannot be had says what has it."""
    assert set(HAD) == {field.name for field in fields(Examples)}
    rows = Examples(features=np.random.default_rng(0).standard_normal((40, 3)))
    with pytest.raises(UndiffuseError, match=r"clip_score needs images of samples \(.*captions.*clip\)"):
        measure(rows, rows, ["clip_score"])
