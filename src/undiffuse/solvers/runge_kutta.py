"""Runge-Kutta: one-step methods on the flow, ``X = x/(alpha + sigma)`` against ``tau = sigma/(alpha + sigma)``.

In these coordinates every schedule is the straight path of flow matching, ``dX/dtau = eps - x0``: tau runs from 1
(alpha = 0) to 0 (sigma = 0) and nothing is endless at either end, and an adaptive method needs half the calls that it
needs in sigma.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UndiffuseError
from ..levels import Estimate, Level, spread
from .base import Noise, Solver, Step
from .weights import weighted


@dataclass(frozen=True)
class Tableau:
    """Butcher's tableau of an explicit method.

    Attributes:
        nodes: where the stages are, as a share of the step.
        rows: what each stage after the first takes of the slopes before it.
        weights: what the step takes.
        embedded: the weights of the method of lower order that the error is measured against; () for none.
    """

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    embedded: tuple[float, ...] = ()


MIDPOINT = Tableau((0, 1 / 2), ((1 / 2,),), (0, 1))
RK4 = Tableau((0, 1 / 2, 1 / 2, 1), ((1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))
# Bogacki & Shampine 1989, Appl. Math. Lett. 2(4); the last stage is at the new point.
BOGACKI_SHAMPINE = Tableau(
    (0, 1 / 2, 3 / 4, 1),
    ((1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    (2 / 9, 1 / 3, 4 / 9, 0),
    (7 / 24, 1 / 4, 1 / 3, 1 / 8),
)
# Dormand & Prince 1980, J. Comp. Appl. Math. 6(1), table 2; the last stage is at the new point.
DORMAND_PRINCE = Tableau(
    (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    (
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0),
    (5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40),
)


def flow_time(level: Level) -> Tensor:
    """``sigma/(alpha + sigma)``: 0 at data, 1 where no data is left."""
    return level.sigma / (level.alpha + level.sigma)


def at_flow_time(tau: Tensor, near: Level) -> Level:
    """The level with this flow time, on the schedule of ``near``."""
    return near.path(near.path.time_at(2 * (torch.log1p(-tau) - torch.log(tau))))


def slope(e: Estimate) -> Tensor:
    return e.eps - e.x0


Stages = Generator[tuple[Tensor, Level], Estimate, tuple[Tensor, list[Tensor], Estimate]]


def stages(tableau: Tableau, x: Tensor, here: Level, there: Level, first: Tensor) -> Stages:
    """All slopes of one Runge-Kutta step, and the last stage's x and estimate; ``first`` is the slope here."""
    begin, way = flow_time(here), flow_time(there) - flow_time(here)
    slopes, u = [first], x
    for node, row in zip(tableau.nodes[1:], tableau.rows, strict=True):
        level = there if node == 1 else at_flow_time(begin + node * way, there)
        u = advance(x, here, level, way, row, slopes)
        last = yield u, level
        slopes.append(slope(last))
    return u, slopes, last


def advance(
    x: Tensor, here: Level, there: Level, way: Tensor, weights: Sequence[float], slopes: Sequence[Tensor]
) -> Tensor:
    """``x + way * sum w_i slope_i`` in flow coordinates, back in those of ``there``."""
    size = there.alpha + there.sigma
    used = [(size * way * w, k) for w, k in zip(weights, slopes, strict=False) if w != 0]
    return weighted((size / (here.alpha + here.sigma), x), *used)


def fixed(tableau: Tableau, x: Tensor, here: Level, there: Level) -> Step:
    """One step of a method; the step to sigma = 0 is Euler's."""
    e = yield x, here
    if there.is_data:
        return e.at(there), None
    _, slopes, _ = yield from stages(tableau, x, here, there, slope(e))
    return advance(x, here, there, flow_time(there) - flow_time(here), tableau.weights, slopes), None


def choose(condition: Tensor, yes: Level, no: Level) -> Level:
    """``yes`` for the samples where ``condition`` (``[B]``) holds, else ``no``."""
    return Level(
        torch.where(condition, yes.t, no.t),
        torch.where(condition, yes.alpha, no.alpha),
        torch.where(condition, yes.sigma, no.sigma),
        no.path,
    )


def rows(condition: Tensor, x: Tensor) -> Tensor:
    """``condition`` (``[B]``) where ``x`` (``[B, ...]``) is, shaped to choose among its samples."""
    return condition.to(x.device).reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class Midpoint(Solver):
    """The midpoint rule, the middle in flow time."""

    order = 2
    calls = 2

    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        return (yield from fixed(MIDPOINT, x, here, there))


@dataclass(frozen=True)
class RungeKutta4(Solver):
    """The classical method of fourth order."""

    order = 4
    calls = 4

    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        return (yield from fixed(RK4, x, here, there))


def adapt(
    tableau: Tableau, order: int, tolerance: float, least: float, x: Tensor, here: Level, there: Level, memory: Any
) -> Step:
    """From here to there in as many steps as each *sample* needs.

    Every sample has its own time and step, judged by its own error alone, so it does not depend on its batch; a sample
    that has arrived waits for the others. The error of a step is the root mean square over a sample of the difference
    of the two orders, and may be ``tolerance * (1 + the root mean square of X)``.
    """
    batch = x.shape[0]
    ends, level, there = there.is_data, here.rows(batch), there.rows(batch)
    goal = there
    if ends:  # to a small sigma, whose estimate is the answer
        goal = at_flow_time(flow_time(level).clamp(max=least / (1 + least)), there)
    if memory is None:
        size = torch.full((batch,), 0.1 * (tolerance / 1e-3) ** (1 / order), dtype=torch.float64)
    else:
        size = memory
    difference = [a - b for a, b in zip(tableau.weights, tableau.embedded, strict=True)]
    e = yield x, level
    k, x0 = slope(e), e.x0
    for _ in range(ATTEMPTS):
        left = flow_time(level) - flow_time(goal)
        active = left > 0
        if not bool(active.any()):
            break
        # The last bit of the way is taken whole, so that the end is met exactly.
        whole = size >= 0.999 * left
        aim = choose(whole, goal, at_flow_time(torch.where(whole, flow_time(goal), flow_time(level) - size), there))
        new, slopes, e = yield from stages(tableau, x, level, aim, k)
        way = flow_time(level) - flow_time(aim)
        error = weighted(*[(way * w, s) for w, s in zip(difference, slopes, strict=True) if w != 0])
        scale = 1 + torch.maximum(size_of(flow_coordinates(x, level)), size_of(flow_coordinates(new, aim)))
        ratio = size_of(error) / (tolerance * scale)
        if not bool(ratio.isfinite().all()):
            raise UndiffuseError("the denoiser returned numbers that are not finite: no step size helps")
        accepted = active & (ratio <= 1)
        wanted = way * (0.9 * ratio.clamp(min=1e-12) ** (-1 / order)).clamp(0.2, 5.0)
        # A step cut short by the end says nothing against the longer step that was wanted.
        size = torch.where(active, torch.where(accepted & whole, torch.maximum(size, wanted), wanted), size)
        keep = rows(accepted, x)
        x, k, x0 = torch.where(keep, new, x), torch.where(keep, slopes[-1], k), torch.where(keep, e.x0, x0)
        level = choose(accepted, aim, level)
    else:
        raise UndiffuseError(f"{ATTEMPTS} attempts did not meet a tolerance of {tolerance:g}: raise the tolerance")
    return (x0 if ends else x), size


def size_of(x: Tensor) -> Tensor:
    """``[B]`` root mean squares; how far to step is a choice, nothing to differentiate."""
    return x.detach().flatten(1).double().square().mean(1).sqrt().cpu()


def flow_coordinates(x: Tensor, level: Level) -> Tensor:
    """``x/(alpha + sigma)``."""
    return spread(1 / (level.alpha + level.sigma), x) * x


ATTEMPTS = 10_000


def check_tolerance(tolerance: float, least: float) -> None:
    if not tolerance > 0:
        raise UndiffuseError(f"tolerance must be above 0, got {tolerance}")
    if not 0 < least < 1:
        raise UndiffuseError(f"the last sigma/alpha of an adaptive solver must be in (0, 1), got {least}")


@dataclass(frozen=True)
class DormandPrince(Solver):
    """Dormand-Prince 5(4) with a step size for every sample: RK45.

    The grid's levels are met exactly; between them the solver steps as it must. One grid step is enough.

    Attributes:
        tolerance: error of a step allowed, absolute and relative; inf takes every grid step whole.
        least: sigma/alpha from which the last step to sigma = 0 returns the estimate.
    """

    tolerance: float = 1e-3
    least: float = 1e-3
    order = 5
    calls = 7
    adaptive = True

    def __post_init__(self) -> None:
        check_tolerance(self.tolerance, self.least)

    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        return (yield from adapt(DORMAND_PRINCE, 5, self.tolerance, self.least, x, here, there, memory))


@dataclass(frozen=True)
class BogackiShampine(Solver):
    """Bogacki-Shampine 3(2) with a step size for every sample: RK23, for loose tolerances.

    Attributes:
        tolerance, least: as for :class:`DormandPrince`.
    """

    tolerance: float = 1e-3
    least: float = 1e-3
    order = 3
    calls = 4
    adaptive = True

    def __post_init__(self) -> None:
        check_tolerance(self.tolerance, self.least)

    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        return (yield from adapt(BOGACKI_SHAMPINE, 3, self.tolerance, self.least, x, here, there, memory))
