"""Multistep: one call a step, and a polynomial through the estimates of earlier steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, final

from torch import Tensor

from ..levels import Level
from .base import Noise, Solver, Step
from .weights import Point, by_sample, forget, weighted


class Multistep(Solver):
    """Abstract: Euler's step plus ``sum_j gain_j (f_j - f_0)``, where f is x0 or eps, here (0) and earlier (1, 2, ...).

    Subclasses give the gains. Memory is ``((level, f), ...)``, the latest first; while it is short, so is the
    polynomial. The step to sigma = 0 is Euler's: a polynomial is nothing to trust across an infinite step of log-SNR.

    Attributes:
        points: estimates that the polynomial goes through, this one included.
        data_form: f is x0, else eps.
        eta: 0 is the ODE, 1 the reverse SDE, between them less of its noise.
    """

    data_form: ClassVar[bool] = True

    @property
    def eta(self) -> float:
        return 0.0

    @property
    @abstractmethod
    def points(self) -> int: ...

    @abstractmethod
    def gains(self, there: Point, here: Point, past: Sequence[Point]) -> Sequence[float]:
        """One gain for each earlier point."""

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.eta > 0

    @final
    def coefficients(self, there: Point, here: Point, *past: Point) -> list[float]:
        """Of x0, eps, fresh noise, and the earlier f."""
        if there.sigma == 0 or (here.alpha == 0 and self.eta == 0):
            gains: Sequence[float] = [0.0] * len(past)
        else:
            gains = self.gains(there, here, past)
        kept, fresh = forget(there, here, self.eta)
        total = sum(gains)
        pair = (there.alpha - total, kept) if self.data_form else (there.alpha, kept - total)
        return [*pair, fresh, *gains]

    @final
    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        e = yield x, here
        if there.is_data:
            return e.at(there), None
        past = memory or ()
        c_x0, c_eps, fresh, *gains = by_sample(self.coefficients, there, here, *[level for level, _ in past])
        terms = [(c_x0, e.x0), (c_eps, e.eps), *zip(gains, (f for _, f in past), strict=True)]
        if self.eta > 0:
            terms.append((fresh, noise(x, here, there)))
        latest = (here, e.x0 if self.data_form else e.eps)
        return weighted(*terms), (latest, *past)[: self.points - 1]
