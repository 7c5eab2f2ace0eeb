"""Predictor-corrector in lambda: when the estimate at the new point is there, use it to correct the point itself.

The correction costs no call: the estimate was asked for the next step anyway. UniPC (Zhao et al. 2023,
arXiv:2302.04867) is exponential Adams-Bashforth and Adams-Moulton with its own two-point weights; SA-Solver (Xue et
al. 2023, arXiv:2309.05019) is the same on the reverse SDE.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import expm1
from typing import Any, final

from torch import Tensor

from ..errors import UndiffuseError
from ..levels import Level
from .base import Noise, Solver, Step
from .dpm import check_points
from .weights import Point, by_sample, data_gains, forget, weighted


@dataclass(frozen=True, eq=False)
class Before:
    """Memory: what the last step started from.

    Attributes:
        x: the (corrected) sample.
        added: the noise that was added; None without.
        points: ``((level, x0), ...)``, the latest first.
    """

    x: Tensor
    added: Tensor | None
    points: tuple[tuple[Level, Tensor], ...]


class PredictorCorrectorMultistep(Solver):
    """Abstract: subclasses give the gains of predictor and corrector, data form.

    Memory is a :class:`Before`. A step to sigma = 0
    returns the estimate there; a step from alpha = 0 is Euler's and is not corrected, as its lambda is endless.

    Attributes:
        back: earlier estimates to remember.
        eta: share of the reverse SDE's noise (0 is the ODE).
    """

    @property
    def eta(self) -> float:
        return 0.0

    @property
    @abstractmethod
    def back(self) -> int: ...

    @abstractmethod
    def predictor(self, there: Point, here: Point, past: Sequence[Point]) -> Sequence[float]:
        """A gain for each point of ``past``."""

    @abstractmethod
    def corrector(self, there: Point, here: Point, past: Sequence[Point]) -> Sequence[float]:
        """A gain for ``there`` and then for each point of ``past``; empty for no correction."""

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.eta > 0

    @final
    def predict(self, there: Point, here: Point, *past: Point) -> list[float]:
        """Coefficients of fresh noise, x, x0 here, and the past x0."""
        if there.sigma == 0:  # x0 is the answer
            return [0.0, 0.0, there.alpha, *[0.0] * len(past)]
        gains = [0.0] * len(past) if here.alpha == 0 else self.predictor(there, here, past)
        kept, fresh = forget(there, here, self.eta)
        kept /= here.sigma
        return [fresh, kept, there.alpha - kept * here.alpha - sum(gains), *gains]

    @final
    def correct(self, there: Point, here: Point, *past: Point) -> list[float]:
        """Coefficients of the prediction itself, noise, x before, x0 there, x0 here, and the past x0."""
        gains = self.corrector(there, here, past) if here.alpha > 0 and there.sigma > 0 else []
        if not gains:
            return [1.0, 0.0, 0.0, 0.0, 0.0, *[0.0] * len(past)]
        kept, fresh = forget(there, here, self.eta)
        kept /= here.sigma
        return [0.0, fresh, kept, gains[0], there.alpha - kept * here.alpha - sum(gains), *gains[1:]]

    @final
    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        e = yield x, here
        if there.is_data:
            return e.at(there), None
        past: tuple[tuple[Level, Tensor], ...] = ()
        if memory is not None:
            past = memory.points
            own, c_noise, c_before, c_new, *rest = by_sample(self.correct, here, *[level for level, _ in past])
            known = zip(rest, (x0 for _, x0 in past), strict=True)
            terms = [(own, x), (c_before, memory.x), (c_new, e.x0), *known]
            x = weighted(*terms, *([] if memory.added is None else [(c_noise, memory.added)]))
        # What the estimate here is older than `back` steps is forgotten.
        points = ((here, e.x0), *past)[: self.back + 1]
        fresh, *coefficients = by_sample(self.predict, there, *[level for level, _ in points])
        c_x, *rest = coefficients
        terms = [(c_x, x), *zip(rest, (x0 for _, x0 in points), strict=True)]
        added = noise(x, here, there) if self.eta > 0 else None
        return weighted(*terms, *([] if added is None else [(fresh, added)])), Before(x, added, points)


@dataclass(frozen=True)
class UniPC(PredictorCorrectorMultistep):
    """UniPC-p, data form; its order is p + 1.

    Attributes:
        p: points of the predictor, 1 to 4; the corrector has one more.
        bh1: B(h) = h in the two-point formulas; otherwise B(h) = e^h - 1. With more points B cancels.
    """

    p: int = 3
    bh1: bool = False

    def __post_init__(self) -> None:
        check_points("UniPC", self.p)

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.p + 1

    @property
    def back(self) -> int:
        return self.p - 1

    def half(self, there: Point, here: Point) -> float:
        """``alpha' |B(h)| / 2``: the two-point rule of UniPC, a consistent approximation of the exact integral."""
        h = there.lam - here.lam
        return there.alpha * (h if self.bh1 else -expm1(-h)) / 2

    def predictor(self, there: Point, here: Point, past: Sequence[Point]) -> Sequence[float]:
        if len(past) != 1 or past[0].alpha == 0:
            return data_gains(there, here, past)
        return [self.half(there, here) * (there.lam - here.lam) / (past[0].lam - here.lam)]

    def corrector(self, there: Point, here: Point, past: Sequence[Point]) -> Sequence[float]:
        if past:
            return data_gains(there, here, [there, *past])
        return [self.half(there, here)]


@dataclass(frozen=True)
class SASolver(PredictorCorrectorMultistep):
    """SA-Solver: stochastic exponential Adams-Bashforth, corrected by Adams-Moulton with the same noise.

    Attributes:
        points: estimates in the predictor, 1 to 4.
        corrections: estimates in the corrector, the new one included; 0 leaves it out, else 2 to 4.
        eta: tau^2, the share of the reverse SDE's noise.
    """

    points: int = 2
    corrections: int = 2
    eta: float = 1.0
    order = 2

    def __post_init__(self) -> None:
        check_points("SA-Solver", self.points)
        if self.corrections not in (0, 2, 3, 4):
            raise UndiffuseError(f"SA-Solver: corrections must be 0, 2, 3 or 4, got {self.corrections!r}")

    @property
    def back(self) -> int:
        return max(self.points - 1, self.corrections - 2)

    def predictor(self, there: Point, here: Point, past: Sequence[Point]) -> Sequence[float]:
        used = past[: self.points - 1]
        return [*data_gains(there, here, used, self.eta), *[0.0] * (len(past) - len(used))]

    def corrector(self, there: Point, here: Point, past: Sequence[Point]) -> Sequence[float]:
        if self.corrections == 0:
            return []
        used = past[: self.corrections - 2]
        return [*data_gains(there, here, [there, *used], self.eta), *[0.0] * (len(past) - len(used))]
