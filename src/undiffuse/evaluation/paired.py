"""Differences of pairs: is one arm better than another, as far as these few runs can tell?

Run s of arm A and run s of arm B share their seed, so they have seen the same batches, times and noise and are sampled
from the same noise: what both owe to that luck cancels in ``d_s = B_s - A_s``. The differences of S seeds have a mean,
and Student's t with S - 1 degrees of freedom gives the interval around it. With few seeds it is wide (the quantile is
12.7 for two, 4.3 for three), and that is the truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UndiffuseError

LEVEL = 0.05
"""Of a wrong "different" among all the comparisons that are made with one metric."""


def t_tail(t: float, freedom: int) -> float:
    """The probability that ``|T| > t`` for Student's t; Abramowitz & Stegun 1964, 26.7.3 and 26.7.4."""
    if t < 0 or freedom < 1:
        raise UndiffuseError(f"t={t} must be at least 0, and the degrees of freedom, {freedom}, at least 1")
    angle = math.atan2(t, math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= math.cos(angle) ** 2 * k / (k + 1)
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return max(0.0, 1 - inside)


def t_quantile(level: float, freedom: int) -> float:
    """The t with :func:`t_tail` of ``level``, by bisection."""
    low, high = 0.0, 1.0
    while t_tail(high, freedom) > level:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, freedom) > level else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Difference:
    """Arm ``b`` minus arm ``a`` in one figure.

    Attributes:
        values: one for each seed.
        mean, low, high: their mean and its interval, which for all ``comparisons`` together is wrong in 5 % of cases
            (Bonferroni); infinite with one seed.
        p: of the paired t-test, for this comparison alone; None with one seed.
        same_models: the interval for these very models, over the samples drawn; None where it was not asked for.
        comparisons: how many there are in this figure.
    """

    figure: str
    a: str
    b: str
    values: tuple[float, ...]
    mean: float
    low: float
    high: float
    p: float | None
    same_models: tuple[float, float] | None
    comparisons: int

    @property
    def seen(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def difference(
    figure: str,
    a: str,
    b: str,
    values: Sequence[float] | np.ndarray,
    comparisons: int = 1,
    errors: Sequence[float] | None = None,
) -> Difference:
    """The mean of ``values`` (one a seed) and its interval.

    ``errors``   of each value, had other samples been drawn from the same two models. The spread over seeds contains
        that already, but that of two or three seeds may be small by chance; the interval never takes it for less.
    """
    d = np.asarray(values, np.float64)
    if not len(d) or not np.isfinite(d).all():
        raise UndiffuseError(f"{figure}: {b} - {a} has {len(d)} values, and they must be finite")
    mean = float(d.mean())
    drawn = 0.0 if errors is None else float(np.sqrt(np.square(errors).sum()) / len(d))
    if len(d) == 1:
        reach, p = math.inf, None
    else:
        error = max(float(d.std(ddof=1)) / math.sqrt(len(d)), drawn)
        reach = t_quantile(LEVEL / comparisons, len(d) - 1) * error
        p = t_tail(abs(mean) / error, len(d) - 1) if error else float(mean == 0)
    z = 1.959964
    return Difference(
        figure,
        a,
        b,
        tuple(float(v) for v in d),
        mean,
        mean - reach,
        mean + reach,
        p,
        None if errors is None else (mean - z * drawn, mean + z * drawn),
        comparisons,
    )
