"""The arithmetic that all solvers share: polynomials through past estimates, integrated exactly.

Between two levels the ODE ``dx = x0 d(alpha) + eps d(sigma)`` is one integral, in either of two forms,

    x'/sigma' = x/sigma + int x0 d(alpha/sigma)         (data form)
    x'/alpha' = x/alpha + int eps d(sigma/alpha)        (noise form)

Hold the estimate and both give Euler's step. Replace it by the polynomial through the estimates f_0 (here), f_1, ...
and both give Euler's step plus ``sum_j W_j (f_j - f_0)``: a method is nothing but its *gains* W_j. They are computed
here in Python floats, which is float64 and, for a handful of numbers, faster than any tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from math import exp, expm1, inf, isfinite, log, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from ..levels import Coefficient, Level, Path, combine


class Point(NamedTuple):
    """A level of one sample, in floats, and its schedule."""

    t: float
    alpha: float
    sigma: float
    path: Path

    @property
    def lam(self) -> float:
        """``log(alpha/sigma)``, half the log-SNR: -inf at alpha = 0, inf at sigma = 0."""
        return -inf if self.alpha == 0 else inf if self.sigma == 0 else log(self.alpha / self.sigma)

    @property
    def ratio(self) -> float:
        """``sigma/alpha``, inf at alpha = 0."""
        return self.sigma / self.alpha if self.alpha > 0 else inf


def by_sample(formula: Callable[..., Sequence[float]], *levels: Level) -> Sequence[Coefficient]:
    """``formula`` at the points of ``levels``: once when the batch has one level, else once a sample.

    A formula is written for one sample, with plain ``if`` where an end needs it. Returns its numbers, as floats or as
    float64 ``[B]``.
    """
    batch = max((level.t.shape[0] for level in levels if level.t.ndim), default=None)
    if batch is None:
        return formula(*[Point(float(level.t), float(level.alpha), float(level.sigma), level.path) for level in levels])
    points = [
        map(Point, *[c.expand(batch).tolist() for c in (level.t, level.alpha, level.sigma)], repeat(level.path))
        for level in levels
    ]
    columns = zip(*[formula(*row) for row in zip(*points, strict=False)], strict=True)
    return [torch.tensor(column, dtype=torch.float64) for column in columns]


def weighted(*terms: tuple[Coefficient, Tensor]) -> Tensor:
    """:func:`combine` without the terms whose coefficient is exactly 0, each a pass over memory saved."""
    kept = [(c, x) for c, x in terms if isinstance(c, Tensor) or c != 0]
    return combine(*kept) if kept else torch.zeros_like(terms[0][1])


def quadrature(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """The w with ``sum_j w_j nodes_j^k = moments_k`` for k < n: the integral of the polynomial through values at
    ``nodes`` is then ``sum_j w_j value_j``. Bjorck and Pereyra 1970; n is at most 5."""
    n, w = len(nodes), list(moments)
    for k in range(n - 1):
        for i in range(n - 1, k, -1):
            w[i] -= nodes[k] * w[i - 1]
    for k in range(n - 2, -1, -1):
        for i in range(k + 1, n):
            w[i] /= nodes[i] - nodes[i - k - 1]
        for i in range(k, n - 1):
            w[i] -= w[i + 1]
    return w


def exponential_moments(z: float, n: int) -> list[float]:
    """``int_0^1 e^(z (1 - u)) u^k du = k! phi_{k+1}(z)`` for k < n, z finite; phi are the functions of exponential
    integrators (Hochbruck & Ostermann 2010, eq. 2.10)."""
    if abs(z) < 1:
        # m_k = sum_i z^i k!/(i+k+1)!; the recurrence below would lose the small difference of large numbers.
        moments = []
        for k in range(n):
            term = total = 1 / (k + 1)
            for i in range(1, 19):
                term *= z / (i + k + 1)
                total += term
            moments.append(total)
        return moments
    moments = [expm1(z) / z]
    for k in range(1, n):
        moments.append((k * moments[-1] - 1) / z)
    return moments


def lagrange(
    start: float, end: float, others: Sequence[float], moments: Callable[[int], Sequence[float]]
) -> list[float]:
    """The weights of values at ``others``, in ``int f`` from start to end over ``end - start``, of the polynomial
    through them and the value at ``start``. A node at infinity has nothing to say about a slope: its weight is 0."""
    used = [u for u in others if isfinite(u)]
    nodes = [0.0, *[(u - start) / (end - start) for u in used]]
    weights = iter(quadrature(nodes, moments(len(nodes)))[1:])
    return [next(weights) if isfinite(u) else 0.0 for u in others]


def data_gains(there: Point, here: Point, others: Sequence[Point], eta: float = 0.0) -> list[float]:
    """Gains of a polynomial in lambda through x0, data form. ``eta`` > 0: the mean of the reverse SDE with that much
    of its noise, where the weight is ``e^((1 + eta) lambda)``."""
    h = (1 + eta) * (there.lam - here.lam)
    if not others or not isfinite(h):
        return [0.0] * len(others)
    scale = there.alpha * h
    lams = [p.lam for p in others]
    return [scale * w for w in lagrange(here.lam, there.lam, lams, lambda n: exponential_moments(-h, n))]


def noise_gains(there: Point, here: Point, others: Sequence[Point]) -> list[float]:
    """Gains of a polynomial in lambda through eps, noise form."""
    h = there.lam - here.lam
    if not others or not isfinite(h):
        return [0.0] * len(others)
    scale = -there.sigma * h
    lams = [p.lam for p in others]
    return [scale * w for w in lagrange(here.lam, there.lam, lams, lambda n: exponential_moments(h, n))]


def plain_moments(n: int) -> list[float]:
    """``int_0^1 u^k du``."""
    return [1 / (k + 1) for k in range(n)]


def forget(there: Point, here: Point, eta: float) -> tuple[float, float]:
    """``(kept, fresh)``: of the noise in x the share ``e^(-eta h)`` stays on the way, and as much comes anew; the
    deviation at ``there`` is sigma' again. h is the step of lambda, eta = 1 the reverse SDE, 0 the ODE."""
    if eta == 0 or there.sigma == 0:
        return there.sigma, 0.0
    h = there.lam - here.lam
    return there.sigma * exp(-eta * h), there.sigma * sqrt(-expm1(-2 * eta * h))


def between(here: Level, there: Level, share: float) -> Level:
    """The level ``share`` of the way in lambda; ``here`` itself for samples whose way is endless."""
    middle = torch.lerp(here.log_snr, there.log_snr, share)
    finite = here.log_snr.isfinite() & there.log_snr.isfinite()
    return here.path(here.path.time_at(torch.where(finite, middle, here.log_snr)))
