"""Euler: the first-order step, which is DDIM, EDM's Euler and flow-matching Euler at once.

With ``x = alpha*x0 + sigma*eps`` the Euler step of the ODE, ``x + dalpha*x0 + dsigma*eps``, is ``alpha'*x0 +
sigma'*eps``: keep the beliefs, move to the next level. In that form it is exact at sigma = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..levels import Level
from .base import Noise, Solver, Step


@dataclass(frozen=True)
class Euler(Solver):
    """DDIM (Song et al. 2020, arXiv:2010.02502) without noise; Euler in the variable sigma/alpha."""

    order = 1

    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        e = yield x, here
        return e.at(there), None
