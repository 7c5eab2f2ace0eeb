"""Inversion: what is inverted and sampled again returns, exactly where that is promised."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from laws import PLANE, Gaussian, no_noise, normal, one, run, worst
from undiffuse import UndiffuseError
from undiffuse.grids import LogSNR, Uniform
from undiffuse.inversion import Anderson, Newton, invert
from undiffuse.levels import Estimate, Level
from undiffuse.schedules import EDM, SCHEDULES, Flow
from undiffuse.solvers import SOLVERS, Euler, Heun

X = PLANE.draw(48)
FINDERS = {"newton": Newton(), "anderson": Anderson()}


@pytest.mark.parametrize("finder", FINDERS.values(), ids=list(FINDERS))
@pytest.mark.parametrize("name", SCHEDULES)
def test_trap_S3_invert_then_sample_returns_exactly(name: str, finder: Newton | Anderson) -> None:
    """20 coarse steps at most, an exact denoiser, the last step to clean data included."""
    schedule = SCHEDULES[name]
    levels = Uniform().levels(schedule, 6 if name == "table" else 12)
    got = invert(PLANE, X, levels, finder=finder)
    assert got.residual is not None
    assert float(got.residual.max()) <= 1e-9
    assert worst(run(PLANE, got.x, levels, Euler()), X) < 1e-7


def test_a_single_step_is_inverted_to_rounding() -> None:
    """F2: damped Newton inverts the step of an exact denoiser to 1e-15."""
    for here, there in pairwise(LogSNR(least=0.05).levels(EDM(), 20)[:-1]):
        x = there.mix(X, normal(48, 2, seed=3))
        levels = [here, there]
        got = Newton().solve(lambda y, a=here, b=there, x=x: one(Euler(), PLANE, y, a, b, no_noise)[0] - x, x, 1.0, 0.0)
        assert worst(run(PLANE, got, levels, Euler()), x) < 1e-12 * float(x.abs().max())


def test_newton_converges_where_the_plain_fixed_point_does_not() -> None:
    """F2b: the plain iteration needs (t/s - 1)|J_D| < 1, and between modes |J_D| is large."""
    here, there = Flow()(0.6), Flow()(0.15)
    middle = (PLANE.means[0] + PLANE.means[1])[None] / 2 + normal(64, 2, seed=1) / 3
    x = there.mix(middle, normal(64, 2, seed=2))

    def residual(y: Tensor) -> Tensor:
        return one(Euler(), PLANE, y, here, there, no_noise)[0] - x

    plain, ratio = x, float(here.sigma / there.sigma)
    for _ in range(400):
        plain = plain - ratio * residual(plain)  # x = (sigma/sigma') x' + (...) x0(x)
    assert not worst(residual(plain), torch.zeros_like(x)) < 1e-6
    assert worst(residual(Newton().solve(residual, x, 1.0, 1e-12)), torch.zeros_like(x)) < 1e-11


def test_trap_S3_the_approximate_way_is_first_order() -> None:
    """F1: the median error of the round trip is O(h)."""
    errors = []
    for steps in (20, 40, 80):
        levels = LogSNR(least=0.02).levels(EDM(), steps)
        x = invert(PLANE, X, levels, exact=False).x
        errors.append(float((run(PLANE, x, levels, Euler()) - X).norm(dim=1).median()))
    slopes = [torch.tensor(a / b).log2() for a, b in pairwise(errors)]
    assert all(0.7 < slope < 1.3 for slope in slopes), errors


@pytest.mark.parametrize("exact", [True, False])
def test_trap_S3_the_level_asked_is_the_level_stepped_from(exact: bool) -> None:
    """The approximate way asks at the level where x is, the exact one at the level that sampling asks at; never below
    the first, and every level of the grid is asked."""
    levels = Uniform().levels(Flow(), 5)
    asked: list[float] = []

    def denoise(x: Tensor, level: Level) -> Estimate:
        asked.append(float(level.t))
        return PLANE(x, level)

    invert(denoise, X, levels, exact=exact)
    want = [float(level.t) for level in reversed(levels[:-1])]
    order = list(dict.fromkeys(asked))
    assert order == (want if exact else want[:-1])


def test_inversion_of_gaussian_data_is_the_closed_form() -> None:
    """Fine steps: x - alpha mu grows from c to sqrt(alpha^2 c^2 + sigma^2)."""
    data = Gaussian(0.7, 0.5)
    levels = LogSNR(least=0.001).levels(Flow(), 600)
    x = normal(16, 3) * 0.5 + 0.7
    got = invert(data, x, levels, exact=False).x
    assert worst(got, (x - 0.7) / 0.5) < 0.02


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_inverts_or_refuses(name: str, exact: bool) -> None:
    solver = SOLVERS[name]
    levels = LogSNR(least=0.02).levels(EDM(), 30)
    reason, back = None, X[:8]
    try:
        got = invert(PLANE, X[:8], levels, solver, exact=exact, finder=Newton())
        back = run(PLANE, got.x, levels, solver)
    except UndiffuseError as error:
        reason = str(error)
    if solver.stochastic:
        assert reason is not None and "deterministic" in reason  # noqa: PT018
    elif reason is None:
        assert float((back - X[:8]).norm(dim=1).median()) < (1e-6 if exact else 0.2)
    else:
        assert "leans on past steps" in reason or "steps down only" in reason


def test_heun_is_inverted_exactly_too() -> None:
    levels = Uniform().levels(Flow(), 8)
    got = invert(PLANE, X, levels, Heun())
    assert worst(run(PLANE, got.x, levels, Heun()), X) < 1e-5


def test_large_data_take_the_way_without_gradients() -> None:
    data = Gaussian(0.1, 0.5)
    x = normal(2, 3, 8, 8) / 2
    levels = Uniform().levels(Flow(), 10)

    def denoise(x: Tensor, level: Level) -> Estimate:
        assert not x.requires_grad
        return data(x.detach(), level)

    got = invert(denoise, x.float(), levels)
    assert got.x.dtype == torch.float32
    assert worst(run(data, got.x, levels, Euler()), x.float()) < 1e-3


def test_a_step_that_cannot_be_inverted_is_refused() -> None:
    """All of the data is one point: the last step forgets everything."""

    def point(x: Tensor, level: Level) -> Estimate:
        x0 = torch.zeros_like(x)
        return Estimate(x0 + 0 * x, x / float(level.sigma))

    for finder in FINDERS.values():
        with pytest.raises(UndiffuseError, match=r"cannot be inverted: 48 of 48 samples keep a residual"):
            invert(point, X, Uniform().levels(Flow(), 4), finder=finder)


@pytest.mark.parametrize(
    ("x", "levels", "message"),
    [
        (X.half(), Uniform().levels(Flow(), 2), "float32 or float64"),
        (X * torch.nan, Uniform().levels(Flow(), 2), "finite"),
        (X, Uniform().levels(Flow(), 2)[:2], "the last one clean data"),
    ],
)
def test_bad_input_is_refused(x: Tensor, levels: list[Level], message: str) -> None:
    with pytest.raises(UndiffuseError, match=message):
        invert(PLANE, x, levels)
