"""Adams methods on the noise: with s = sigma/alpha the ODE is ``d(x/alpha) = eps ds``, an ordinary integral.

They differ only in the variable along which eps is taken for a polynomial: s itself (LMS, DEIS rhoAB), log s (DEIS as
usually shipped), t (DEIS tAB), or the number of the step (PNDM, iPNDM).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..levels import Estimate, Level
from .base import Noise, Solver, Step
from .dpm import check_points
from .multistep import Multistep
from .weights import Point, by_sample, lagrange, noise_gains, plain_moments, quadrature, weighted


class NoiseMultistep(Multistep):
    """Abstract: a multistep method on eps, with ``order`` points."""

    data_form = False

    @property
    @abstractmethod
    def order(self) -> int: ...  # type: ignore[override]

    def __post_init__(self) -> None:
        check_points(type(self).__name__, self.order)

    @property
    def points(self) -> int:
        return self.order


@dataclass(frozen=True)
class LMS(NoiseMultistep):
    """Adams-Bashforth in sigma/alpha: k-diffusion's LMS, and rhoAB of DEIS (Zhang & Chen 2022, arXiv:2204.13902).

    Attributes:
        order: 1 to 4; 1 is Euler.
    """

    order: int = 4

    def gains(self, there: Point, here: Point, past: Sequence[Point]) -> Sequence[float]:
        scale = there.alpha * (there.ratio - here.ratio)
        return [scale * w for w in lagrange(here.ratio, there.ratio, [p.ratio for p in past], plain_moments)]


@dataclass(frozen=True)
class DEIS(NoiseMultistep):
    """DEIS along log(sigma/alpha), as diffusers has it: exponential Adams-Bashforth on eps.

    Attributes:
        order: 1 to 4; 1 is Euler.
    """

    order: int = 3

    def gains(self, there: Point, here: Point, past: Sequence[Point]) -> Sequence[float]:
        return noise_gains(there, here, past)


@dataclass(frozen=True)
class IPNDM(NoiseMultistep):
    """iPNDM (Zhang & Chen 2022, arXiv:2204.13902, eq. 21): Adams-Bashforth as if steps were even, so the weights are
    constant (55, -59, 37, -9)/24.

    Second order on an uneven grid whatever the number of points, yet hard to beat at few steps: constant weights never
    extrapolate wildly.

    Attributes:
        points: 1 to 4 estimates.
    """

    points: int = 4  # type: ignore[misc]

    def __post_init__(self) -> None:
        check_points(type(self).__name__, self.points)

    @property
    def order(self) -> int:  # type: ignore[override]
        return min(self.points, 2)

    def gains(self, there: Point, here: Point, past: Sequence[Point]) -> Sequence[float]:
        return [slope(there, here) * w for w in even_weights(len(past) + 1)[1:]]


@lru_cache(maxsize=8)
def even_weights(n: int) -> list[float]:
    """Adams-Bashforth's constants for even steps."""
    return quadrature([float(-j) for j in range(n)], plain_moments(n))


def slope(there: Point, here: Point) -> float:
    """``alpha' (s' - s)``: what one unit of eps moves x by beyond the scaling; 0 from alpha = 0, where it is endless
    and the estimate is not to be extrapolated."""
    return there.sigma - there.alpha * here.ratio if here.alpha > 0 else 0.0


# Nodes and weights of 16-point Gauss-Legendre quadrature on [0, 1].
GAUSS = tuple((float(u + 1) / 2, float(w) / 2) for u, w in zip(*np.polynomial.legendre.leggauss(16), strict=True))


@dataclass(frozen=True)
class DEISTime(Multistep):
    """DEIS tAB: eps as a polynomial in the schedule's own time t (Zhang & Chen 2022, eq. 15).

    ``int l(t) ds`` is taken by parts, ``[l s] - int s l' dt``, so that only sigma/alpha itself is needed, never its
    derivative.

    Attributes:
        order: 1 to 4; 1 is Euler.
    """

    order: int = 3  # type: ignore[misc]
    data_form = False

    def __post_init__(self) -> None:
        check_points(type(self).__name__, self.order)

    @property
    def points(self) -> int:
        return self.order

    def gains(self, there: Point, here: Point, past: Sequence[Point]) -> Sequence[float]:
        if not past:
            return []
        times = torch.tensor([here.t + u * (there.t - here.t) for u, _ in GAUSS], dtype=torch.float64)
        middle = here.path(times)
        ratios = [w * r for (_, w), r in zip(GAUSS, (middle.sigma / middle.alpha).tolist(), strict=True)]

        def moments(n: int) -> list[float]:
            """``int u^k ds`` by parts."""
            inner = [sum(r * u**k for r, (u, _) in zip(ratios, GAUSS, strict=True)) for k in range(n - 1)]
            return [there.ratio - here.ratio, *[there.ratio - (k + 1) * m for k, m in enumerate(inner)]]

        return [there.alpha * w for w in lagrange(here.t, there.t, [p.t for p in past], moments)]


# --- PNDM -----------------------------------------------------------------------------------------------------------


def transfer(first: Estimate, here: Level, there: Level, eps: Tensor) -> Tensor:
    """DDIM's step from here to there with ``eps`` in place of the noise believed here (Liu et al. 2022, eq. 11)."""
    (gain,) = by_sample(lambda there, here: [slope(there, here)], there, here)
    return weighted((there.alpha, first.x0), (there.sigma - gain, first.eps), (gain, eps))


@dataclass(frozen=True)
class PLMS(Solver):
    """PNDM without Runge-Kutta steps, the sampler of Stable Diffusion 1: iPNDM whose first step is Heun's (one call
    more)."""

    order = 2
    extra = 1

    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        if memory is not None or there.is_data:
            return (yield from IPNDM().step(x, here, there, memory, noise))
        e = yield x, here
        f = yield e.at(there), there
        return transfer(e, here, there, weighted((0.5, e.eps), (0.5, f.eps))), ((here, e.eps),)


@dataclass(frozen=True)
class PNDM(Solver):
    """PNDM (Liu et al. 2022, arXiv:2202.09778, algorithm 2): three pseudo Runge-Kutta steps of four calls, middle in t,
    then iPNDM."""

    order = 2
    extra = 9

    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        past = memory or ()
        if len(past) == 3 or there.is_data:
            return (yield from IPNDM().step(x, here, there, memory, noise))
        middle = here.path((here.t + there.t) / 2)
        e1 = yield x, here
        e2 = yield e1.at(middle), middle
        e3 = yield transfer(e1, here, middle, e2.eps), middle
        e4 = yield transfer(e1, here, there, e3.eps), there
        eps = weighted((1 / 6, e1.eps), (1 / 3, e2.eps), (1 / 3, e3.eps), (1 / 6, e4.eps))
        return transfer(e1, here, there, eps), ((here, e1.eps), *past)
