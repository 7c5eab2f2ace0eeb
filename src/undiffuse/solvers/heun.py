"""Heun: Euler's step, then the mean of the two slopes (Karras et al. 2022, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..levels import Level, combine
from .base import Noise, Solver, Step


@dataclass(frozen=True)
class Heun(Solver):
    """Second order for two calls a step; the step to sigma = 0 is Euler's, so N steps take 2N - 1 calls."""

    order = 2
    calls = 2

    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        e = yield x, here
        euler = e.at(there)
        if there.is_data:
            return euler, None
        f = yield euler, there
        alpha, sigma = (there.alpha - here.alpha) / 2, (there.sigma - here.sigma) / 2
        return combine((1.0, x), (alpha, e.x0), (sigma, e.eps), (alpha, f.x0), (sigma, f.eps)), None
