"""A multistep method whose weights are numbers of its own at every step, learned together with its grid.

All deterministic methods of one call a step are of this form (Shaul et al. 2024, arXiv:2403.01329, theorem 3.2, with
the whole past); here the past is short and the sum is exact for a constant estimate, whatever the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import Any

from ..errors import UndiffuseError
from ..levels import Level
from .base import Noise, Solver, Step
from .weights import Point, by_sample, weighted


@dataclass(frozen=True)
class Learned(Solver):
    """Euler's step plus ``sum_j a_j S (x0_j - x0_0) + b_j Z (eps_j - eps_0)`` over earlier estimates j = 1, 2, ...

    S and Z are what one unit of x0 and of eps moves x by, beyond the scaling of the rest of x:
    ``S = alpha' - alpha sigma'/sigma`` and ``Z = sigma' - sigma alpha'/alpha``. :func:`undiffuse.tuning.tune` finds the
    weights. They belong to their times: on any other grid, or begun in the middle, the solver refuses to step.

    Attributes:
        times: the N decreasing times at which it asks; the step after the last goes to 0 and is Euler's.
        weights: N - 1 rows, row n with ``(a_j, b_j)`` for at most n earlier estimates, the latest first.
    """

    times: tuple[float, ...] = (1.0,)
    weights: tuple[tuple[tuple[float, float], ...], ...] = ()

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in pairwise(self.times))
        if not self.times or not (falling and self.times[0] <= 1 and self.times[-1] > 0):
            raise UndiffuseError("the times of a learned solver must fall, from at most 1 to above 0")
        if len(self.weights) != len(self.times) - 1 or any(len(row) > n for n, row in enumerate(self.weights)):
            raise UndiffuseError(
                "a learned solver needs a row of weights for each step but the last, the n-th (from 0) of at most n"
            )
        if not all(isfinite(w) for row in self.weights for pair in row for w in pair):
            raise UndiffuseError("the weights of a learned solver must be finite")

    def coefficients(self, there: Point, here: Point, *past: Point) -> list[float]:
        """Of x0 and eps here, then of x0 and eps of each earlier estimate."""
        row = self.weights[self.place(there, here, past)]
        own_x0, own_eps = there.alpha, there.sigma
        earlier: list[float] = []
        for (a, b), _ in zip(row, past, strict=False):
            a, b = a * data_scale(there, here), b * noise_scale(there, here)
            own_x0, own_eps = own_x0 - a, own_eps - b
            earlier += [a, b]
        return [own_x0, own_eps, *earlier]

    def place(self, there: Point, here: Point, past: Sequence[Point]) -> int:
        """Which step this is; raises when it is none of this solver's."""
        wanted = (*self.times, 0.0)
        for n in range(len(self.times)):
            if abs(wanted[n] - here.t) < 1e-9 and abs(wanted[n + 1] - there.t) < 1e-9:
                row = self.weights[n] if n < len(self.weights) else ()
                known = [p.t for p in past[: len(row)]]
                if len(known) == len(row) and all(abs(wanted[n - 1 - j] - t) < 1e-9 for j, t in enumerate(known)):
                    return n
        raise UndiffuseError(
            f"this solver was learned for {len(self.times)} steps on a grid of its own, from noise to data, and does "
            f"not step from t = {here.t:.4g} to {there.t:.4g}: choose another solver and grid"
        )

    @property
    def points(self) -> int:
        """Estimates that it remembers, this one included."""
        return 1 + max((len(row) for row in self.weights), default=0)

    def step(self, x: Any, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        past = memory or ()
        levels = [level for level, _ in past]
        if there.is_data:
            by_sample(lambda *points: [float(self.place(points[0], points[1], points[2:]))], there, here, *levels)
            e = yield x, here
            return e.at(there), None
        c_x0, c_eps, *earlier = by_sample(self.coefficients, there, here, *levels)
        e = yield x, here
        known = [f for _, old in past for f in (old.x0, old.eps)]
        terms = [(c_x0, e.x0), (c_eps, e.eps), *zip(earlier, known, strict=False)]
        return weighted(*terms), ((here, e), *past)[: self.points - 1]


def data_scale(there: Point, here: Point) -> float:
    """``alpha' - alpha sigma'/sigma``: what one unit of x0 moves x by."""
    return there.alpha - there.sigma / here.sigma * here.alpha


def noise_scale(there: Point, here: Point) -> float:
    """``sigma' - sigma alpha'/alpha``: what one unit of eps moves x by; there is an estimate before, so alpha > 0."""
    return there.sigma - there.alpha * here.ratio
