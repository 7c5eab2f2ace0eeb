"""The laws can fail: each raises on a solver that breaks it, with a mistake that people really made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

from laws import Gaussian, law_last_step, law_order, law_rows, moments
from undiffuse.grids import Karras, Uniform
from undiffuse.levels import Level, combine
from undiffuse.schedules import EDM, VP
from undiffuse.solvers import DDIM, Euler, Noise, Solver, Step
from undiffuse.solvers.ddim import posterior_variance


@dataclass(frozen=True)
class WrongGrid(Solver):
    """S1: steps to another level than the one it is asked to."""

    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        e = yield x, here
        return e.at(there.path(there.t * 0.99)), None


@dataclass(frozen=True)
class StopsEarly(Solver):
    """S12: the last step ends at a small sigma instead of 0."""

    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        e = yield x, here
        return e.at(there.path(there.t.clamp(min=0.001))), None


@dataclass(frozen=True)
class AsksAtData(Solver):
    """Heun that evaluates at sigma = 0."""

    order = 2
    calls = 2

    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        e = yield x, here
        f = yield e.at(there), there
        alpha, sigma = (there.alpha - here.alpha) / 2, (there.sigma - here.sigma) / 2
        return combine((1.0, x), (alpha, e.x0), (sigma, e.eps), (alpha, f.x0), (sigma, f.eps)), None


@dataclass(frozen=True)
class HalfExtrapolated(Solver):
    """2M with half of its extrapolation: first order, as a factor 2 lost in a third-order method makes it second."""

    order = 2

    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        e = yield x, here
        if memory is None or there.is_data:
            return e.at(there), (here, e.x0)
        before, past = memory
        ratio = (there.log_snr - here.log_snr) / (here.log_snr - before.log_snr)
        w = (there.alpha - here.alpha * there.sigma / here.sigma) * ratio / 4
        return combine((there.alpha + w, e.x0), (there.sigma, e.eps), (-w, past)), (here, e.x0)


@dataclass(frozen=True)
class FirstRow(Solver):
    """Takes the first sample's level for all."""

    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        e = yield x, here
        one = there if there.t.ndim == 0 else there.path(there.t[0])
        return e.at(one), None


@dataclass(frozen=True)
class NoiseAtTheEnd(Solver):
    """Draws noise on the last step."""

    stochastic = True

    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        e = yield x, here
        return combine((1.0, e.at(there)), (0.0, noise(x, here, there))), None


@dataclass(frozen=True)
class WrongNoise(Solver):
    """S17: sqrt(1 - alpha_bar) in place of eq. 16 leaves the direction as it should be and the noise too great."""

    stochastic = True

    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        e = yield x, here
        if there.is_data:
            return e.at(there), None
        kept = (there.sigma**2 - posterior_variance(here, there)).clamp(min=0).sqrt()
        return combine((there.alpha, e.x0), (kept, e.eps), (there.sigma, noise(x, here, there))), None


@pytest.mark.parametrize(
    ("law", "broken"),
    [
        (lambda s: law_order(s, VP()), WrongGrid()),
        (lambda s: law_order(s, VP()), HalfExtrapolated()),
        (lambda s: law_last_step(s, VP()(0.4)), StopsEarly()),
        (lambda s: law_last_step(s, VP()(0.4)), AsksAtData()),
        (lambda s: law_last_step(s, VP()(0.4)), NoiseAtTheEnd()),
        (lambda s: law_rows(s, VP()), FirstRow()),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Solver) else "law",
)
def test_a_broken_solver_breaks_its_law(law: Callable[[Solver], None], broken: Solver) -> None:
    with pytest.raises(AssertionError):
        law(broken)


def test_trap_S19_a_wrong_step_can_look_better_and_is_found_all_the_same() -> None:
    # Too many noise levels skipped: the deviation of the samples comes out *nearer* to the truth than Euler's, because
    # two errors cancel. A statistic of the samples would praise it; the order of convergence does not.
    @dataclass(frozen=True)
    class Lagging(Solver):
        def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
            e = yield x, here
            return e.at(there if there.is_data else there.path((there.t + 0.02 * (1 - there.t)).clamp(max=1))), None

    levels = Uniform().levels(VP(), 10)
    truth = Gaussian().deviation
    right, wrong = (moments(solver, levels, Gaussian())[1] ** 0.5 for solver in (Euler(), Lagging()))
    assert abs(wrong - truth) < abs(right - truth)
    with pytest.raises(AssertionError):
        law_order(Lagging(), VP())


def test_moments_see_wrong_noise() -> None:
    levels = Karras().levels(EDM(), 50)
    right, wrong = (moments(solver, levels, data)[1] / 0.25 for solver, data in _pairs())
    assert abs(right - 1) < 0.25
    assert abs(wrong - 1) > 0.5


def _pairs():
    return [(DDIM(1.0), Gaussian()), (WrongNoise(), Gaussian())]
