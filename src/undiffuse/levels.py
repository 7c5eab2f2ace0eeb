"""Chapter 1. Level and Estimate: where we are between data and noise, and what we believe there.

Everything in this package is written in one equation and one ODE,

    x  = alpha * x0 + sigma * eps            (what a noisy sample is)
    dx = x0_hat * d(alpha) + eps_hat * d(sigma)   (how it flows back to data)

Nothing here divides by alpha or sigma, so both ends, clean data (sigma = 0) and pure noise (alpha = 0), are levels like
any other. The ODE is the probability-flow ODE of Song et al. 2021 (arXiv:2011.13456, eq. 13) in symmetric form.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from .errors import UndiffuseError

Coefficient = float | Tensor
"""One number for the whole batch (``float`` or ``[]``), or one number a sample (``[B]``)."""


def combine(*terms: tuple[Coefficient, Tensor]) -> Tensor:
    """The linear combination ``sum_i c_i * x_i``: all the arithmetic that solvers, predictions and guidance need.

    Coefficients are computed in float64 on the CPU and meet the tensors only here, so that no schedule is ever rounded
    to the network's precision. Coefficients of one number cost one pass over memory a term. float16 and bfloat16 are
    computed in float32 and returned in their own type.
    """
    x = terms[0][1]
    if x.dtype in (torch.float16, torch.bfloat16):
        return combine(*[(c, y.float()) for c, y in terms]).to(x.dtype)
    if any(isinstance(c, Tensor) and (c.ndim or c.requires_grad) for c, _ in terms):
        total = None
        for c, y in terms:
            term = (spread(c, y) if isinstance(c, Tensor) else c) * y
            total = term if total is None else total + term
        assert total is not None
        return total
    (c, x), *rest = [(float(c), y) for c, y in terms]
    if c == 1.0 and rest:
        (c, y), *rest = rest
        total = torch.add(x, y, alpha=c)
    else:
        total = x * c
    for c, y in rest:
        total.add_(y, alpha=c)
    return total


def spread(c: Tensor, x: Tensor) -> Tensor:
    """``c`` (``[]`` or ``[B]``) in the type and place of ``x`` (``[B, ...]``), shaped so that it broadcasts over
    samples."""
    return to_device(c.to(x.dtype), x.device).reshape(c.shape + (1,) * (x.ndim - 1 if c.ndim else 0))


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on a device. From a CPU to a GPU nothing waits: when the call returns, they have been read."""
    return values.to(device, non_blocking=values.device.type == "cpu" and device.type == "cuda")


class Path(Protocol):
    """What a level knows of the schedule that it is a point of."""

    def __call__(self, t: float | Tensor) -> Level: ...

    def time_at(self, log_snr: float | Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Level:
    """One point of a noise schedule; the time and its coefficients are one object, never two lists.

    Attributes:
        t: time in [0, 1]; 0 is data, 1 is noise.
        alpha: what is left of the data, >= 0.
        sigma: the standard deviation of the noise, >= 0.
        path: the schedule, so that a solver can ask for a level between two others.

    The three are float64 on the CPU, shaped ``[]`` (one level for the batch) or ``[B]`` (one level a sample).
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    path: Path

    @cached_property
    def log_snr(self) -> Tensor:
        """``log(alpha^2 / sigma^2)``; +inf at sigma = 0, -inf at alpha = 0."""
        return 2 * (self.alpha.log() - self.sigma.log())

    @property
    def snr(self) -> Tensor:
        """``alpha^2 / sigma^2``, inf at sigma = 0."""
        return (self.alpha / self.sigma) ** 2

    @cached_property
    def is_data(self) -> bool:
        """True when no noise is left; raises for a batch in which that is so for some samples only, since the last step
        is another one than those before it."""
        clean = self.sigma == 0
        if bool(clean.any()) and not bool(clean.all()):
            raise UndiffuseError("some samples of this batch end at sigma = 0 and others do not: step them apart")
        return bool(clean.all())

    def mix(self, x0: Tensor, eps: Tensor) -> Tensor:
        """The forward process ``alpha * x0 + sigma * eps``, in float32 or better (trap P3)."""
        if x0.dtype in (torch.float16, torch.bfloat16):
            x0, eps = x0.float(), eps.float()
        return combine((self.alpha, x0), (self.sigma, eps))

    def rows(self, batch: int) -> Level:
        """The same level written once a sample: fields ``[B]``."""
        return Level(self.t.expand(batch), self.alpha.expand(batch), self.sigma.expand(batch), self.path)

    def __iter__(self):
        """The levels of a ``[N]`` level one by one, each ``[]``."""
        for t, alpha, sigma in zip(self.t, self.alpha, self.sigma, strict=True):
            yield Level(t, alpha, sigma, self.path)


@dataclass(frozen=True, eq=False)
class Estimate:
    """What a denoiser believes about ``x``: the clean data and the noise, with ``x = alpha * x0 + sigma * eps``.

    Attributes:
        x0: the expected clean data, shaped like x.
        eps: the expected noise, shaped like x.
        variance: for denoisers with learned variance, the place between the two DDPM variances, in [0, 1]
            (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15), shaped like x; otherwise None.
    """

    x0: Tensor
    eps: Tensor
    variance: Tensor | None = None

    def __getitem__(self, rows: slice) -> Estimate:
        """What is believed about some of the samples."""
        return Estimate(self.x0[rows], self.eps[rows], None if self.variance is None else self.variance[rows])

    def at(self, level: Level) -> Tensor:
        """What x would be at ``level`` if these beliefs held, ``alpha * x0 + sigma * eps``, in x0's own type."""
        return combine((level.alpha, self.x0), (level.sigma, self.eps))

    def with_x0(self, x0: Tensor, level: Level) -> Estimate:
        """The pair that explains the same x with this x0: eps moves along, so that the two never disagree (trap S18).

        Elements that do not change keep their eps to the last bit.
        """
        if not bool(level.sigma.all()):
            raise UndiffuseError("at sigma = 0 x is the data: x0 cannot be changed there")
        return Estimate(x0, combine((1.0, self.eps), (level.alpha / level.sigma, self.x0 - x0)), self.variance)
