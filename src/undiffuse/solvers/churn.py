"""EDM's churn: add a little noise, then step from the higher level (Karras et al. 2022, algorithm 2). Wraps any
solver."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from ..levels import Level, combine
from .base import Noise, Solver, Step
from .heun import Heun


@dataclass(frozen=True)
class Churn(Solver):
    """Before each step raise sigma/alpha by the factor ``1 + gamma`` with fresh noise, gamma = min(amount, sqrt 2 - 1).
    Where the schedule ends below the raised level, the step is the inner one.

    Attributes:
        inner: the solver that then steps; one without memory, since the sample is moved off its path.
        amount: S_churn divided by the number of steps; 0 is ``inner`` alone.
        low, high: the range of sigma/alpha in which noise is added (S_tmin, S_tmax).
        deviation: S_noise, the deviation of the added noise.
    """

    inner: Solver = field(default_factory=Heun)
    amount: float = 0.1
    low: float = 0.05
    high: float = 50.0
    deviation: float = 1.003

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.inner.order

    @property
    def calls(self) -> int:  # type: ignore[override]
        return self.inner.calls

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.amount > 0 or self.inner.stochastic

    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        gamma = min(self.amount, sqrt(2) - 1)
        ratio = here.sigma / here.alpha
        end = here.path(1.0)
        inside = (
            (ratio >= self.low)
            & (ratio <= self.high)
            & (here.alpha > 0)
            & (ratio * (1 + gamma) <= end.sigma / end.alpha)
        )
        if gamma > 0 and bool(inside.any()):
            raised = torch.where(
                inside, here.log_snr - 2 * torch.log(torch.tensor(1 + gamma, dtype=torch.float64)), here.log_snr
            )
            higher = here.path(here.path.time_at(raised))
            kept = higher.alpha / here.alpha
            added = torch.sqrt((higher.sigma**2 - (kept * here.sigma) ** 2).clamp(min=0)) * self.deviation
            x, here = combine((kept, x), (torch.where(inside, added, 0.0), noise(x, here, higher))), higher
        return (yield from self.inner.step(x, here, there, memory, noise))
