"""DPM-Solver++: integrate the linear part exactly, extrapolate x0 (Lu et al. 2022, arXiv:2211.01095).

In log-SNR the ODE is ``d(x/sigma) = e^lambda x0 dlambda`` with ``lambda = log(alpha/sigma)``; holding x0 constant
over a step gives Euler, and a polynomial through past x0 gives the multistep methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..levels import Level, combine
from .base import Noise, Solver, Step


@dataclass(frozen=True)
class DPMpp2M(Solver):
    """DPM-Solver++(2M), algorithm 2: x0 is extrapolated along lambda from this step and the previous one.

    Memory is the previous ``(level, x0)``. The first step, and the one to sigma = 0, are Euler's.
    """

    order = 2

    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        e = yield x, here
        if memory is None or there.is_data:
            return there.mix(e.x0, e.eps), (here, e.x0)
        before, x0_before = memory
        # h/h_before is 0 where the previous level was pure noise (lambda = -inf): nothing to extrapolate from.
        ratio = (there.log_snr - here.log_snr) / (here.log_snr - before.log_snr)
        weight = (there.alpha - here.alpha * there.sigma / here.sigma) * ratio / 2
        weight = torch.where(there.sigma > 0, weight, 0.0)
        return combine((there.alpha + weight, e.x0), (there.sigma, e.eps), (-weight, x0_before)), (here, e.x0)
