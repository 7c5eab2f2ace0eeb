"""DDIM and DDPM: from the deterministic step to the ancestral one.

Given x at ``here`` and a belief x0, what is at ``there`` (primes) is Gaussian around a mixture of the two. Its
variance, and that of the forward step it undoes, are written below so that alpha = 0 is a level like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UndiffuseError
from ..levels import Level, combine
from .base import Noise, Solver, Step


def posterior_variance(here: Level, there: Level) -> Tensor:
    """``sigma'^2 (1 - (alpha sigma' / (alpha' sigma))^2)``: DDPM's beta tilde (Ho et al. 2020, eq. 7)."""
    r = here.alpha * there.sigma / (there.alpha * here.sigma)
    return there.sigma**2 * (1 - r) * (1 + r)


def forward_variance(here: Level, there: Level) -> Tensor:
    """``sigma^2 - (alpha/alpha')^2 sigma'^2``: the noise that the forward process adds from there to here, DDPM's
    beta."""
    r = here.alpha * there.sigma / there.alpha
    return (here.sigma - r) * (here.sigma + r)


@dataclass(frozen=True)
class DDIM(Solver):
    """DDIM with noise ``eta`` (Song et al. 2020, eq. 12 and 16): 0 is Euler, 1 is DDPM's ancestral step, fixed small
    variance."""

    eta: float = 0.0
    order = 1

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise UndiffuseError(f"DDIM's eta must be in [0, 1], got {self.eta}")

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.eta > 0

    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        e = yield x, here
        if there.is_data or self.eta == 0:
            return e.at(there), None
        variance = self.eta**2 * posterior_variance(here, there)
        z = noise(x, here, there)
        kept = torch.sqrt((there.sigma**2 - variance).clamp(min=0))
        return combine((there.alpha, e.x0), (kept, e.eps), (torch.sqrt(variance), z)), None


@dataclass(frozen=True)
class DDPMLarge(Solver):
    """DDPM's ancestral step with the fixed large variance beta (Ho et al. 2020, section 3.2)."""

    order = 1
    stochastic = True

    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        e = yield x, here
        if there.is_data:
            return e.at(there), None
        kept = torch.sqrt((there.sigma**2 - posterior_variance(here, there)).clamp(min=0))
        z = noise(x, here, there)
        return combine((there.alpha, e.x0), (kept, e.eps), (torch.sqrt(forward_variance(here, there)), z)), None


@dataclass(frozen=True)
class DDPMLearned(Solver):
    """DDPM's ancestral step with the learned variance of improved DDPM (Nichol & Dhariwal 2021, eq. 15):
    ``exp(v log(beta) + (1 - v) log(beta tilde))``, v from the estimate."""

    order = 1
    stochastic = True

    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        e = yield x, here
        if e.variance is None:
            raise UndiffuseError("ddpm_learned needs a model with learned variance; use ddpm or ddpm_large")
        if there.is_data:
            return e.at(there), None
        small, large = posterior_variance(here, there), forward_variance(here, there)
        kept = torch.sqrt((there.sigma**2 - small).clamp(min=0))
        z = noise(x, here, there) * torch.exp(combine(((large.log() - small.log()) / 2, e.variance)))
        return combine((there.alpha, e.x0), (kept, e.eps), (torch.sqrt(small), z)), None
