"""Chapter 3: one formula for all predictions, against the algebra of each."""

from __future__ import annotations

import pytest
import torch

from laws import PLANE, normal, tensor, worst
from undiffuse.errors import UndiffuseError
from undiffuse.levels import Level
from undiffuse.predictions import PREDICTIONS, X0, EDMOutput, Eps, FlowVelocity, Prediction, Score, V
from undiffuse.schedules import EDM, SCHEDULES, VP, Cosine, Flow, Schedule

every = pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)


def at(alpha: float, sigma: float) -> Level:
    """A level anywhere in the plane."""
    return Level(tensor(0.5), tensor(alpha), tensor(sigma), VP())


@every
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_target_and_estimate_are_inverse(prediction: Prediction, schedule: Schedule) -> None:
    x0, eps = normal(9, 2), normal(9, 2, seed=1)
    level = schedule(torch.linspace(0.1, 0.9, 9, dtype=torch.float64))
    x = level.mix(x0, eps)
    e = prediction.estimate(x, prediction.target(x0, eps, level), level)
    size = 1 + (level.sigma / level.alpha + level.alpha / level.sigma).max()
    assert worst(e.x0, x0) < 1e-12 * size
    assert worst(e.eps, eps) < 1e-12 * size
    assert worst(level.mix(e.x0, e.eps), x) < 1e-9


@every
@pytest.mark.parametrize(
    ("alpha", "sigma"), [(1.0, 1e-8), (0.8, 0.6), (1e-8, 1.0), (0.0, 1.0), (0.5, 0.5), (1.0, 40.0)]
)
def test_A1_the_pair_explains_x(prediction: Prediction, alpha: float, sigma: float) -> None:
    level, x = at(alpha, sigma), normal(16, 2) * max(alpha, sigma)
    exact = PLANE(x, level)
    assert worst(level.mix(exact.x0, exact.eps), x) < 1e-9
    if abs(float(prediction.det(level))) < 1e-12:
        return
    y = prediction.target(exact.x0, exact.eps, level)
    e = prediction.estimate(x, y, level)
    assert worst(level.mix(e.x0, e.eps), x) < 1e-6
    assert worst(e.x0 * min(1.0, alpha / sigma), exact.x0 * min(1.0, alpha / sigma)) < 1e-6


def test_A2_A4_v() -> None:
    x, y = normal(8, 2), normal(8, 2, seed=1)
    for alpha, sigma in ((0.8, 0.6), (0.3, 2.0)):
        e = V().estimate(x, y, at(alpha, sigma))
        norm = alpha**2 + sigma**2
        assert worst(e.x0, (alpha * x - sigma * y) / norm) < 1e-12
        assert worst(e.eps, (sigma * x + alpha * y) / norm) < 1e-12


def test_A3_flow() -> None:
    x, u = normal(8, 2), normal(8, 2, seed=1)
    e = FlowVelocity().estimate(x, u, Flow()(0.3))
    assert worst(e.x0, x - 0.3 * u) < 1e-12
    assert worst(e.eps, x + 0.7 * u) < 1e-12


def test_the_rows_are_those_of_the_papers() -> None:
    x0, eps, level = normal(8, 2), normal(8, 2, seed=1), at(0.7, 0.9)
    x = level.mix(x0, eps)
    s = (0.9**2 + 0.7**2 * 0.25) ** 0.5
    # EDM's preconditioning in y = x/alpha at noise sigma/alpha: F = (x0 - c_skip y)/c_out
    y, sd, noise = x / 0.7, 0.5, 0.9 / 0.7
    c_skip, c_out = sd**2 / (noise**2 + sd**2), noise * sd / (noise**2 + sd**2) ** 0.5
    for prediction, target in [
        (X0(), x0),
        (Eps(), eps),
        (V(), 0.7 * eps - 0.9 * x0),
        (FlowVelocity(), eps - x0),
        (Score(), -(x - 0.7 * x0) / 0.9**2),
        (EDMOutput(0.5), (x0 - c_skip * y) / c_out),
        (EDMOutput(0.5), 0.9 / (0.5 * s) * x0 - 0.7 * 0.5 / s * eps),
    ]:
        assert worst(prediction.target(x0, eps, level), target) < 1e-12, prediction


def test_A5_pure_noise_gives_the_mean_of_the_data() -> None:
    level, x = Cosine()(1.0), normal(8, 2)
    for prediction in (V(), X0(), FlowVelocity()):
        exact = PLANE(x, level)
        e = prediction.estimate(x, prediction.target(exact.x0, exact.eps, level), level)
        assert worst(e.x0, PLANE.mean().expand(8, 2)) < 1e-10
    assert worst(V().target(exact.x0, exact.eps, level), -exact.x0) < 1e-12


def test_A6_clean_data_is_itself() -> None:
    level, x = VP()(0.0), normal(8, 2)
    assert worst(PLANE(x, level).x0, x) < 1e-12
    for prediction in (V(), Eps(), FlowVelocity(), EDMOutput()):
        assert worst(prediction.estimate(x, normal(8, 2, seed=1), level).x0, x) < 1e-12


def test_trap_S6_A7_eps_at_pure_noise_raises_and_never_returns_inf() -> None:
    x, level = normal(4, 2), Cosine()(1.0)
    for prediction in (Eps(), Score()):
        with pytest.raises(UndiffuseError, match="says nothing"):
            prediction.estimate(x, x, level)
        with pytest.raises(UndiffuseError, match="says nothing"):  # one sample of a batch is enough
            prediction.estimate(x, x, Cosine()(tensor(0.5, 0.5, 0.5, 1.0)))
    with pytest.raises(UndiffuseError, match="says nothing"):
        X0().estimate(x, x, VP()(0.0))


@every
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_trap_O4_a_pair_that_is_not_refused_works_at_both_ends(prediction: Prediction, schedule: Schedule) -> None:
    try:
        prediction.check(schedule)
    except UndiffuseError:
        assert float(schedule(1.0).alpha) == 0
        assert isinstance(prediction, Eps | Score)
        return
    x = normal(4, 2)
    for t in (1.0, schedule.first or 1e-4):
        e = prediction.estimate(x, x, schedule(t))
        assert bool(torch.stack([e.x0, e.eps]).isfinite().all())


def test_errors_convert_B1_B2_B3() -> None:
    """|x0_hat - x0| = |sigma/det| |y_hat - y| for a wrong y; the known special cases."""
    level = at(0.8, 0.6)
    x0, eps, wrong = normal(8, 2), normal(8, 2, seed=1), normal(8, 2, seed=2)
    x, snr = level.mix(x0, eps), float(level.snr)
    for prediction, factor in [(X0(), 1.0), (Eps(), snr), (V(), snr + 1), (FlowVelocity(), (1 + snr**0.5) ** 2)]:
        y = prediction.target(x0, eps, level)
        off = (prediction.estimate(x, y + wrong, level).x0 - x0).square().sum()
        assert float(wrong.square().sum() / off) == pytest.approx(factor, rel=1e-10)
        assert float((level.sigma / prediction.det(level)) ** 2) == pytest.approx(1 / factor, rel=1e-10)


def test_B4_B5_B6_B8_edm() -> None:
    sd = 0.5
    for sigma in (0.01, 0.7, 40.0):
        level = at(1.0, sigma)
        a, b = EDMOutput(sd).row(level)
        assert float(a**2 * sd**2 + b**2) == pytest.approx(1.0)  # B5: unit variance of the target
        c_out = sigma * sd / (sigma**2 + sd**2) ** 0.5
        assert float(level.sigma / EDMOutput(sd).det(level)) == pytest.approx(-c_out)  # B4
    x, f = normal(8, 2), normal(8, 2, seed=1)
    assert worst(EDMOutput(sd).estimate(x, f, at(1.0, 1e-9)).x0, x) < 1e-8  # B6
    assert worst(EDMOutput(sd).estimate(x, f, at(1.0, 1e9)).x0, sd * f) < 1e-8
    level = at(0.8, 0.6)
    assert worst(EDMOutput(1.0).target(x, f, level), -V().target(x, f, level)) < 1e-14  # B8


@every
def test_coefficients_of_a_float16_x_are_not_rounded_first(prediction: Prediction) -> None:
    level = EDM()(0.6)
    x, y = normal(4, 2).half(), normal(4, 2, seed=1).half()
    e, exact = prediction.estimate(x, y, level), prediction.estimate(x.double(), y.double(), level)
    assert e.x0.dtype == torch.float16
    assert worst(e.x0.double(), exact.x0) < 1e-3 * float(exact.x0.abs().max())
