"""Chapter 8, first part. Grids: which levels a sampler visits.

A grid is a pure function ``(schedule, steps) -> times``: ``steps`` times to ask the denoiser at, then 0. Times are
continuous; the network is told exactly the level that the solver uses (trap S15).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import inf
from typing import final

import numpy as np
import torch
from torch import Tensor

from .errors import UndiffuseError
from .levels import Level
from .schedules import Schedule

MOST = 100_000
"""Steps of a trajectory; a folder that asks for more is damaged or hostile."""


class Grid(ABC):
    """Abstract: ``(schedule, steps) -> times``. Subclasses are frozen dataclasses that give the ``steps`` times to
    ask at."""

    @abstractmethod
    def nodes(self, schedule: Schedule, steps: int) -> Tensor:
        """``steps`` decreasing times, float64; the last is above 0."""

    @final
    def times(self, schedule: Schedule, steps: int) -> Tensor:
        """``[steps + 1]`` strictly decreasing times, the last exactly 0 (trap S12). Pure: the same arguments give the
        same times, however often it is called (trap S9)."""
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MOST:
            raise UndiffuseError(f"steps must be a whole number of at least 1 and at most {MOST:,}, got {steps!r}")
        times = torch.cat([self.nodes(schedule, steps), torch.zeros(1, dtype=torch.float64)])
        if not bool((times.diff() < 0).all()):
            raise UndiffuseError(
                f"{steps} steps are more than this grid has distinct times: take fewer, or another grid"
            )
        # Trap S5: a model that learned pure noise would never be shown it.
        if schedule.terminal_snr == 0 and times[0] < 1:
            raise UndiffuseError(
                f"this schedule ends in pure noise at t = 1, but the grid starts at t = {float(times[0]):.4g}: "
                "use the uniform or trailing grid"
            )
        if schedule.first > 0 and float(times[-2]) < schedule.first * (1 - 1e-9):
            raise UndiffuseError(
                f"{steps} steps ask below t = {schedule.first:.4g}, the first level of this table: take fewer steps"
            )
        return times

    @final
    def levels(self, schedule: Schedule, steps: int) -> list[Level]:
        """The ``steps + 1`` levels of :meth:`times`."""
        return list(schedule(self.times(schedule, steps)))


@dataclass(frozen=True)
class Uniform(Grid):
    """Equal steps of t from 1 (equal to ``trailing`` without its rounding)."""

    def nodes(self, schedule: Schedule, steps: int) -> Tensor:
        return torch.arange(steps, 0, -1, dtype=torch.float64) / steps


def _ratios(schedule: Schedule, least: float, most: float) -> tuple[float, float]:
    """The range of sigma/alpha to space points in: the schedule's own, where it has ends, within [least, most]."""
    end, first = schedule(1.0), schedule(schedule.first)
    return min(float(end.sigma / end.alpha), most), max(float(first.sigma / first.alpha), least)


def _from_ratios(schedule: Schedule, ratios: Tensor) -> Tensor:
    """Times of these sigma/alpha; the first is always t = 1, where the noise really starts (trap S4)."""
    times = schedule.time_at(-2 * torch.log(ratios))
    times[0] = 1.0
    return times


@dataclass(frozen=True)
class LogSNR(Grid):
    """Equal steps of log-SNR between sigma/alpha = ``most`` and ``least`` (Lu et al. 2022)."""

    least: float = 0.002
    most: float = 80.0

    def nodes(self, schedule: Schedule, steps: int) -> Tensor:
        most, least = _ratios(schedule, self.least, self.most)
        logs = torch.log(torch.tensor([most, least], dtype=torch.float64))
        return _from_ratios(schedule, torch.exp(torch.lerp(logs[0], logs[1], _unit(steps))))


@dataclass(frozen=True)
class Karras(Grid):
    """Equal steps of (sigma/alpha)^(1/rho) (Karras et al. 2022, eq. 5)."""

    rho: float = 7.0
    least: float = 0.002
    most: float = 80.0

    def nodes(self, schedule: Schedule, steps: int) -> Tensor:
        most, least = (ratio ** (1 / self.rho) for ratio in _ratios(schedule, self.least, self.most))
        return _from_ratios(schedule, (most + _unit(steps) * (least - most)) ** self.rho)


@dataclass(frozen=True)
class FlowPower(Grid):
    """Equal steps of ``tau^(1/rho)``, tau = sigma/(scale * alpha + sigma) between sigma/alpha = ``most`` and ``least``.

    rho = scale = 1 is uniform flow time, the path of flow matching whatever the schedule; a large scale is Karras's
    grid. Between them, steps are spent where sigma/alpha is near the deviations of the data, from ``least`` to about
    ``scale``, and few above, where nothing is decided.
    """

    rho: float = 3.0
    scale: float = 6.0
    least: float = 0.002
    most: float = 1e3

    def __post_init__(self) -> None:
        if not (self.rho > 0 and self.scale > 0 and 0 < self.least < self.most):
            raise UndiffuseError("a flow-power grid needs rho > 0, scale > 0 and 0 < least < most")

    def nodes(self, schedule: Schedule, steps: int) -> Tensor:
        most, least = (
            (ratio / (self.scale + ratio)) ** (1 / self.rho) for ratio in _ratios(schedule, self.least, self.most)
        )
        times = (most + _unit(steps) * (least - most)) ** self.rho
        return _from_ratios(schedule, self.scale * times / (1 - times))


@dataclass(frozen=True)
class Beta(Grid):
    """Times at quantiles of the Beta(a, b) distribution: below 1, both ends get more steps than the middle (Lee et al.
    2024, arXiv:2407.12173)."""

    a: float = 0.6
    b: float = 0.6

    def __post_init__(self) -> None:
        if not (0 < self.a <= 8 and 0 < self.b <= 8):
            raise UndiffuseError(f"a and b of a beta grid must be in (0, 8], got {self.a} and {self.b}")

    def nodes(self, schedule: Schedule, steps: int) -> Tensor:
        return beta_quantile(torch.arange(steps, 0, -1, dtype=torch.float64) / steps, self.a, self.b)


def beta_quantile(p: Tensor, a: float, b: float) -> Tensor:
    """The x with ``int_0^x u^(a-1) (1-u)^(b-1) du = p * int_0^1``, by bisection."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(64))
    nodes, weights = (nodes + 1) / 2, weights / 2

    def lower(x: Tensor, a: float, b: float) -> Tensor:
        """The integral up to x <= 1/2; for a < 1 in u^a, where it has no singularity."""
        c = min(a, 1.0)
        u = (x[:, None] ** c * nodes) ** (1 / c)
        return x**c / c * (u ** (a - c) * (1 - u) ** (b - 1) * weights).sum(1)

    half = torch.tensor([0.5], dtype=torch.float64)
    left, right = lower(half, a, b), lower(half, b, a)
    aim, low, high = p * (left + right), torch.zeros_like(p), torch.ones_like(p)
    for _ in range(60):
        x = (low + high) / 2
        below = torch.where(x <= 0.5, lower(x.clamp(max=0.5), a, b), left + right - lower((1 - x).clamp(max=0.5), b, a))
        low, high = torch.where(below < aim, x, low), torch.where(below < aim, high, x)
    return torch.where(p == 1, 1.0, (low + high) / 2)


@dataclass(frozen=True)
class ShiftedGrid(Grid):
    """Another grid with sigma/alpha multiplied by ``shift``: above 1, more steps at high noise, for larger pictures
    (Esser et al. 2024, arXiv:2403.03206, eq. 23, where it moves t of a flow).

    The first time stays where it is: alpha/sigma = w goes to ``w/shift + (1 - 1/shift) w_end``, which is the same for a
    schedule that ends in pure noise (w_end = 0), and nearly the same for one that almost does.
    """

    grid: Grid = Uniform()
    shift: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.shift < inf:
            raise UndiffuseError(f"shift of a grid must be above 0 and finite, got {self.shift}")

    def nodes(self, schedule: Schedule, steps: int) -> Tensor:
        times = self.grid.nodes(schedule, steps)
        levels, end = schedule(times), schedule(1.0)
        w, w_end = levels.alpha / levels.sigma, end.alpha / end.sigma
        shifted = schedule.time_at(2 * torch.log(w / self.shift + (1 - 1 / self.shift) * w_end))
        return torch.where(times == 1, 1.0, shifted)


def _unit(steps: int) -> Tensor:
    return torch.linspace(0, 1, steps, dtype=torch.float64)


def _table_steps(schedule: Schedule, steps: int, default: int) -> int:
    total = round(1 / schedule.first) if schedule.first > 0 else default
    if steps > total:
        raise UndiffuseError(f"{steps} steps asked of a table of {total}: take at most {total}")
    return total


@dataclass(frozen=True)
class Trailing(Grid):
    """Whole steps of a table of T counted back from its end (Lin et al. 2023, table 2)."""

    total: int = 1000

    def nodes(self, schedule: Schedule, steps: int) -> Tensor:
        total = _table_steps(schedule, steps, self.total)
        return torch.round(total - torch.arange(steps, dtype=torch.float64) * (total / steps)) / total


@dataclass(frozen=True)
class Leading(Grid):
    """Labels ``i * (T // steps) + offset``: the spacing of DDIM's code. It does not start at t = 1 (trap S4), so the
    first noise is drawn at the deviation of the level where it does start.

    ``counts_end``: as DPM-Solver's code has it, which counts the end point too and leaves it out: ``i * (T // (steps +
    1)) + offset`` for i from ``steps`` to 1.
    """

    total: int = 1000
    offset: int = 0
    counts_end: bool = False

    def nodes(self, schedule: Schedule, steps: int) -> Tensor:
        points = steps + self.counts_end
        total = _table_steps(schedule, points, self.total)
        labels = torch.arange(points - 1, self.counts_end - 1, -1, dtype=torch.float64) * (total // points)
        return ((labels + self.offset + 1) / total).clamp(max=1.0)


@dataclass(frozen=True)
class Linspace(Grid):
    """Labels evenly spaced from T - 1 to 0, rounded to ``whole`` steps or not; ``counts_end`` as for :class:`Leading`,
    label 0 being the point that is left out."""

    total: int = 1000
    whole: bool = True
    counts_end: bool = False

    def nodes(self, schedule: Schedule, steps: int) -> Tensor:
        total = _table_steps(schedule, steps, self.total)
        labels = (1 - _unit(steps + self.counts_end)[:steps]) * (total - 1)
        return ((torch.round(labels) if self.whole else labels) + 1) / total


@dataclass(frozen=True)
class Distilled(Grid):
    """Of the ``taught`` levels at which a consistency model was distilled, labels ``i * (T // taught) - 1``, as many as
    there are steps, as evenly as whole numbers allow (Luo et al. 2023, arXiv:2310.04378, section 4.3)."""

    total: int = 1000
    taught: int = 50

    def nodes(self, schedule: Schedule, steps: int) -> Tensor:
        total = _table_steps(schedule, steps, self.total)
        if steps > self.taught:
            raise UndiffuseError(f"{steps} steps asked of a model distilled at {self.taught} levels: take fewer")
        skipped = torch.floor(torch.arange(steps, dtype=torch.float64) * (self.taught / steps))
        return (self.taught - skipped) * (total // self.taught) / total


@dataclass(frozen=True)
class Times(Grid):
    """An explicit list of decreasing times in (0, 1] (say, one published for a model)."""

    values: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)

    def nodes(self, schedule: Schedule, steps: int) -> Tensor:
        if steps != len(self.values):
            raise UndiffuseError(f"this grid lists {len(self.values)} times, but {steps} steps are asked for")
        return torch.tensor(self.values, dtype=torch.float64)


GRIDS: dict[str, Grid] = {
    "uniform": Uniform(),
    "flow_uniform": FlowPower(rho=1.0, scale=1.0),
    "flow_power": FlowPower(),
    "log_snr": LogSNR(),
    "exponential": LogSNR(),  # the same under its other name
    "karras": Karras(),
    "beta": Beta(),
    "shifted": ShiftedGrid(),
    "trailing": Trailing(),
    "leading": Leading(),
    "linspace": Linspace(),
}
"""Every grid by name."""
