"""Few steps with a model whose x0 is a sample, not a mean: a consistency model, or any other that was distilled.

Jump to data, add noise again, jump again. With an ordinary denoiser this does not converge: its x0 is a blurred mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UndiffuseError
from ..levels import Level
from .base import Noise, Solver, Step
from .weights import weighted


@dataclass(frozen=True)
class Consistency(Solver):
    """Trajectory consistency sampling (Zheng et al. 2024, arXiv:2402.19159, algorithm 4): go to time (1 - gamma) t',
    then add noise up to t'.

    gamma = 1 goes all the way to data: multistep consistency sampling (Song et al. 2023, arXiv:2303.01469, algorithm
    1) and LCM (Luo et al. 2023, arXiv:2310.04378). gamma = 0 is DDIM.

    Attributes:
        gamma: how far to overshoot, 0 to 1.
    """

    gamma: float = 1.0
    distilled = True

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise UndiffuseError(f"gamma must be in [0, 1], got {self.gamma}")

    @property
    def order(self) -> int:  # type: ignore[override]
        return 0 if self.gamma > 0 else 1

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.gamma > 0

    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        e = yield x, here
        if there.is_data or self.gamma == 0:
            return e.at(there), None
        low = there.path((1 - self.gamma) * there.t)
        kept = there.alpha / low.alpha * low.sigma
        fresh = torch.sqrt(((there.sigma - kept) * (there.sigma + kept)).clamp(min=0))
        return weighted((there.alpha, e.x0), (kept, e.eps), (fresh, noise(x, here, there))), None
