"""How far a figure may be off: 95 % intervals for what the same number of rows would give on average.

Three methods, each for what it suits; none resamples with replacement, because a bootstrap's repeated rows have no
distance to their copies (precision, recall) and fewer degrees of freedom than rows (Frechet), which shifts the whole
interval away from the value:

- **Wilson** (1927) for a share of independent rows.
- **Influence** (the infinitesimal jackknife; Efron 1982, ch. 6) where the derivative of the figure by the weight of
  each row is known: ``error^2 = var(influence of samples)/n + var(influence of data)/m``.
- **Groups** (the delete-a-group jackknife; Shao & Tu 1995, section 2.3) elsewhere: the figure without each of ten
  random tenths of the rows, ``error^2 = (g - 1)/g sum (figure without j - their mean)^2``, and Student's t.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite, sqrt
from statistics import NormalDist

import numpy as np

from ..errors import UndiffuseError

Z = NormalDist().inv_cdf(0.975)  # 1.960: an interval of 95 %
GROUPS = 10
T = 2.262157  # the same quantile of Student's t with GROUPS - 1 degrees of freedom


@dataclass(frozen=True)
class Measured:
    """A number and the 95 % interval around it; ``note`` says what a reader must know, if anything."""

    value: float
    low: float
    high: float
    note: str = ""

    def __post_init__(self) -> None:
        if not (isfinite(self.value) and isfinite(self.low) and isfinite(self.high)):
            raise UndiffuseError(f"a figure of {self.value} is none: are the numbers that it is made of far too large?")


def wilson(count: float, n: int) -> Measured:
    """The share ``count / n``. The interval is never empty: 0 of 100 is not surely 0, it may be 3.7 %."""
    if not 0 <= count <= n or n < 1:
        raise UndiffuseError(f"{count} of {n} is not a share")
    share = count / n
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    reach = Z / (1 + Z**2 / n) * sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return Measured(share, max(min(middle - reach, share), 0.0), min(max(middle + reach, share), 1.0))


def around(value: float, error: float, quantile: float = Z, least: float = -inf, most: float = inf) -> Measured:
    """``value`` +- ``quantile`` standard errors, inside ``[least, most]``."""
    return Measured(value, max(value - quantile * error, least), min(value + quantile * error, most))


def from_influence(value: float, *influences: np.ndarray, least: float = -inf, note: str = "") -> Measured:
    """The interval from what each row does to the figure, one array ``[n]`` for each independent set of rows."""
    found = around(value, sqrt(sum(float(i.var(ddof=1)) / len(i) for i in influences)), least=least)
    return Measured(found.value, found.low, found.high, note)


def from_groups(value: float, without: np.ndarray, least: float = -inf, most: float = inf) -> Measured:
    """The interval from the figure ``without`` ``[g]`` each group."""
    error = sqrt((len(without) - 1) * float(without.var()))
    return around(value, error, T, least, most)


def grouped(n: int, groups: int = GROUPS, seed: int = 0) -> list[np.ndarray]:
    """The indices 0..n-1 in ``groups`` random parts of equal size, but for one row.

    At random, since rows often come sorted by class or with the classes in turn. ``seed`` is fixed: the same rows
    give the same interval.
    """
    if n < 2 * groups:
        raise UndiffuseError(f"{n} rows are too few for an interval: at least {2 * groups} are needed")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(n)
    return [np.sort(part) for part in np.array_split(order, groups)]
