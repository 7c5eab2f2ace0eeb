"""Exponential Adams-Bashforth: a polynomial in lambda through past estimates, integrated exactly against the linear
part.

In data form of order 2 it is DPM-Solver++(2M, heun), of order 3 DPM-Solver++(3M) as it should be. In noise form it is
DEIS as other libraries ship it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .dpm import check_points
from .multistep import Multistep
from .weights import Point, data_gains


@dataclass(frozen=True)
class ExponentialAdams(Multistep):
    """Exponential Adams-Bashforth on x0 (Hochbruck & Ostermann 2011, BIT 51, eq. 2.4).

    Attributes:
        order: 1 to 4; 1 is Euler.
    """

    order: int = 3  # type: ignore[misc]

    def __post_init__(self) -> None:
        check_points("exponential Adams-Bashforth", self.order)

    @property
    def points(self) -> int:
        return self.order

    def gains(self, there: Point, here: Point, past: Sequence[Point]) -> Sequence[float]:
        return data_gains(there, here, past)
