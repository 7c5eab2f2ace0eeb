"""Stochastic samplers by simulation: the reverse SDE step by step, and Langevin dynamics at a level.

``score = -eps/sigma`` turns beliefs into the gradient of the log-density. The SDE is written for y = x/alpha and
s = sigma/alpha, where every schedule is variance exploding: ``dy = -2 s score ds + sqrt(2 s ds) dW``, backwards.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from ..errors import UndiffuseError
from ..levels import Estimate, Level
from .base import Noise, Solver, Step
from .ddim import DDIM
from .weights import Point, by_sample, weighted


@dataclass(frozen=True)
class EulerMaruyama(Solver):
    """Euler-Maruyama on the reverse SDE, which is the reverse diffusion predictor of Song et al. 2021 (algorithm 2).

    It gives too much variance where the ancestral step gives too little. From alpha = 0, where s is endless, it takes
    the ancestral step.
    """

    order = 1
    stochastic = True

    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        e = yield x, here
        if there.is_data:
            return e.at(there), None
        c_eps, fresh = by_sample(self.coefficients, there, here)
        return weighted((there.alpha, e.x0), (c_eps, e.eps), (fresh, noise(x, here, there))), None

    @staticmethod
    def coefficients(there: Point, here: Point) -> tuple[float, float]:
        """y' = y - (s^2 - s'^2) eps/s + sqrt(s^2 - s'^2) z, and y = x0 + s eps."""
        if here.alpha == 0 or there.sigma == 0:
            return 0.0, there.sigma
        s, end = here.ratio, there.ratio
        return there.alpha * end * end / s, there.alpha * sqrt((s - end) * (s + end))


def langevin(x: Tensor, level: Level, e: Estimate, size: Tensor, z: Tensor) -> Tensor:
    """``x + size score + sqrt(2 size) z``, ``size`` ``[]`` or ``[B]``; nothing moves at sigma = 0."""
    drift = torch.where(level.sigma > 0, -size / level.sigma, 0.0)
    return weighted((1.0, x), (drift, e.eps), (torch.sqrt(2 * size), z))


@dataclass(frozen=True)
class PredictorCorrector(Solver):
    """Langevin steps at each level, then a step of ``inner`` (Song et al. 2021, arXiv:2011.13456, algorithms 4 and 5).

    The size of a Langevin step is ``2 (ratio sqrt(D) / |score|)^2`` for the sample's own score and its D elements, and
    at most sigma^2/2, as twice that would diverge. The paper's code has the norms of noise and score averaged over the
    batch, which would make a sample depend on its neighbours; sqrt(D) is what the norm of the noise is about.

    Attributes:
        inner: the predictor; one without memory, since the sample is moved off its path.
        corrections: Langevin steps at a level.
        ratio: the paper's signal-to-noise ratio r.
    """

    inner: Solver = field(default_factory=lambda: DDIM(eta=1.0))
    corrections: int = 1
    ratio: float = 0.16
    stochastic = True

    def __post_init__(self) -> None:
        if self.corrections < 0 or not self.ratio > 0:
            raise UndiffuseError("predictor-corrector needs corrections >= 0 and ratio > 0")

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.inner.order

    @property
    def calls(self) -> int:  # type: ignore[override]
        return self.corrections + self.inner.calls

    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        for _ in range(self.corrections):
            e = yield x, here
            squares = e.eps.flatten(1).double().square().mean(1).cpu()
            size = here.sigma**2 * (2 * self.ratio**2 / squares).clamp(max=0.5)
            x = langevin(x, here, e, size, noise(x, here, here))
        return (yield from self.inner.step(x, here, there, None, noise))


@dataclass(frozen=True)
class AnnealedLangevin(Solver):
    """Annealed Langevin dynamics (Song & Ermon 2019, arXiv:1907.05600, algorithm 1): Langevin steps at each level,
    then x/alpha is carried to the next as it is.

    It wants many close levels (a log-SNR grid). The step to sigma = 0 ends with the estimate in place of the last
    Langevin step (Jolicoeur-Martineau et al. 2020, arXiv:2009.05475).

    Attributes:
        corrections: Langevin steps at a level.
        size: the size of a Langevin step over sigma^2.
    """

    corrections: int = 3
    size: float = 0.1
    stochastic = True

    def __post_init__(self) -> None:
        if self.corrections < 1 or not 0 < self.size <= 1:
            raise UndiffuseError("annealed Langevin needs at least one correction a level, of a size in (0, 1]")

    @property
    def calls(self) -> int:  # type: ignore[override]
        return self.corrections

    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        for i in range(self.corrections):
            e = yield x, here
            if there.is_data and i == self.corrections - 1:
                return e.at(there), None
            x = langevin(x, here, e, self.size * here.sigma**2, noise(x, here, here))
        # Where no data is left x is noise, and stays noise: only its deviation moves.
        share = torch.where(here.alpha > 0, there.alpha / here.alpha, there.sigma / here.sigma)
        return weighted((share, x)), None
