"""DPM-Solver: integrate the linear part exactly, and extrapolate the rest along lambda = log(alpha/sigma).

Noise form: DPM-Solver (Lu et al. 2022, arXiv:2206.00927). Data form: DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095),
with noise SDE-DPM-Solver++. Multistep methods (M) look back, singlestep methods (S) ask several times a step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import expm1, isfinite
from typing import Any, ClassVar, final

from torch import Tensor

from ..errors import UndiffuseError
from ..levels import Level
from .base import Noise, Solver, Step
from .multistep import Multistep
from .weights import Point, between, by_sample, data_gains, exponential_moments, noise_gains, weighted

# --- Multistep ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DPMpp1(Multistep):
    """SDE-DPM-Solver++(1); without noise it is Euler, with ``eta`` = 1 the ancestral step of DDPM.

    Attributes:
        eta: how much of the reverse SDE's noise, 0 to 1 (k-diffusion's eta; not DDIM's between the ends).
    """

    eta: float = 1.0
    order = 1
    points = 1  # type: ignore[assignment]

    def gains(self, there: Point, here: Point, past: Sequence[Point]) -> Sequence[float]:
        return []


@dataclass(frozen=True)
class DPMpp2M(Multistep):
    """DPM-Solver++(2M), algorithm 2, and SDE-DPM-Solver++(2M).

    Attributes:
        heun: integrate the line through two x0 exactly, which is exponential Adams-Bashforth (other libraries'
            ``solver_type="heun"``); otherwise take its value at the middle, as the paper does.
        eta: how much of the reverse SDE's noise, 0 to 1.
    """

    heun: bool = False
    eta: float = 0.0
    order = 2
    points = 2  # type: ignore[assignment]

    def gains(self, there: Point, here: Point, past: Sequence[Point]) -> Sequence[float]:
        return two_points(there, here, past[:1], self.eta, exact=self.heun)


def two_points(there: Point, here: Point, past: Sequence[Point], eta: float, exact: bool) -> Sequence[float]:
    """The gain of the line through two x0, by its integral or by its value at the middle of the step."""
    if exact or not past:
        return data_gains(there, here, past, eta)
    h, back = there.lam - here.lam, here.lam - past[0].lam
    if not isfinite(h) or not isfinite(back):
        return [0.0]
    return [there.alpha * expm1(-(1 + eta) * h) * (h / back) / 2]


@dataclass(frozen=True)
class DPMpp3M(Multistep):
    """DPM-Solver++(3M) and SDE-DPM-Solver++(3M): two divided differences D1, D2 of x0, with phi_2 and phi_3.

    D2 approximates half of the second derivative, so it must meet 2 phi_3. Every published implementation that we know
    leaves the 2 out and is second order; with it this is exponential Adams-Bashforth 3.

    Attributes:
        classic: leave the 2 out, as the others do (at few steps on a steep grid that is sometimes better).
        eta: how much of the reverse SDE's noise, 0 to 1.
    """

    classic: bool = False
    eta: float = 0.0
    points = 3  # type: ignore[assignment]

    @property
    def order(self) -> int:  # type: ignore[override]
        return 2 if self.classic or self.eta > 0 else 3

    def gains(self, there: Point, here: Point, past: Sequence[Point]) -> Sequence[float]:
        h = there.lam - here.lam
        if len(past) < 2 or not isfinite(past[1].lam) or not isfinite(h):
            return [*two_points(there, here, past[:1], self.eta, exact=True), *[0.0 for _ in past[1:]]]
        r0, r1 = (here.lam - past[0].lam) / h, (past[0].lam - past[1].lam) / h
        _, m1, m2 = exponential_moments(-(1 + self.eta) * h, 3)
        # x' += alpha' H (phi_2 D1 + c phi_3 D2), phi_2 = m1, phi_3 = m2/2, and c = 2 (classic: 1)
        scale = there.alpha * (1 + self.eta) * h
        first, second = scale * m1, scale * m2 * (0.5 if self.classic else 1.0)
        # D1_0 = (f0 - f1)/r0, D1_1 = (f1 - f2)/r1, D2 = (D1_0 - D1_1)/(r0 + r1), D1 = D1_0 + r0 D2
        d2 = (first * r0 + second) / (r0 + r1)
        d1_0, d1_1 = first + d2, -d2
        return [-d1_0 / r0 + d1_1 / r1, -d1_1 / r1]


# --- Singlestep -----------------------------------------------------------------------------------------------------


class Singlestep(Solver):
    """Abstract: an exponential Runge-Kutta method. Stage i is at ``shares[i]`` of the step in lambda, and leans on the
    estimates here and of stage i - 1 only. The step to sigma = 0, or from alpha = 0, is Euler's."""

    shares: ClassVar[tuple[float, ...]]
    data_form: ClassVar[bool]

    @abstractmethod
    def gain(self, there: Point, here: Point, latest: Point) -> float:
        """The gain of the latest stage's estimate on the way from here to there."""

    @final
    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        first = latest = yield x, here
        if there.is_data or not bool(here.alpha.any()):
            return first.at(there), None
        last = here
        for level in [*[between(here, there, share) for share in self.shares], there]:
            gain = by_sample(self.coefficient, level, here, last)[0] if last is not here else 0.0
            c_x0, c_eps = (level.alpha - gain, level.sigma) if self.data_form else (level.alpha, level.sigma - gain)
            f = latest.x0 if self.data_form else latest.eps
            x = weighted((c_x0, first.x0), (c_eps, first.eps), (gain, f))
            if level is not there:
                latest, last = (yield x, level), level
        return x, None

    @final
    def coefficient(self, there: Point, here: Point, latest: Point) -> list[float]:
        endless = there.sigma == 0 or here.alpha == 0
        return [0.0 if endless else self.gain(there, here, latest)]


@dataclass(frozen=True)
class DPMSolver2(Singlestep):
    """DPM-Solver-2 (algorithm 1, r1 = 1/2), which is also KDPM2, DPM2 of k-diffusion: Euler with the noise believed
    half way in lambda."""

    order = 2
    calls = 2
    data_form = False
    shares = (0.5,)

    def gain(self, there: Point, here: Point, latest: Point) -> float:
        return -there.sigma * expm1(there.lam - here.lam)


@dataclass(frozen=True)
class DPMSolver3(Singlestep):
    """DPM-Solver-3 (algorithm 2, r1 = 1/3, r2 = 2/3)."""

    order = 3
    calls = 3
    data_form = False
    shares = (1 / 3, 2 / 3)

    def gain(self, there: Point, here: Point, latest: Point) -> float:
        return noise_gains(there, here, [latest])[0]


@dataclass(frozen=True)
class DPMpp2S(Singlestep):
    """DPM-Solver++(2S) (algorithm 1, r = 1/2): Euler with the data believed half way in lambda."""

    order = 2
    calls = 2
    data_form = True
    shares = (0.5,)

    def gain(self, there: Point, here: Point, latest: Point) -> float:
        return -there.alpha * expm1(here.lam - there.lam)


@dataclass(frozen=True)
class DPMpp3S(Singlestep):
    """DPM-Solver++(3S): DPM-Solver-3 in data form (the authors' code, r1 = 1/3, r2 = 2/3)."""

    order = 3
    calls = 3
    data_form = True
    shares = (1 / 3, 2 / 3)

    def gain(self, there: Point, here: Point, latest: Point) -> float:
        return data_gains(there, here, [latest])[0]


def check_points(solver: str, points: int, most: int = 4) -> None:
    """Refuse a polynomial that no one has proved useful."""
    if isinstance(points, bool) or not isinstance(points, int) or not 1 <= points <= most:
        raise UndiffuseError(f"{solver}: order must be a whole number from 1 to {most}, got {points!r}")
