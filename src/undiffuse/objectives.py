"""Chapter 9. Objectives: learning.

    loss = weight * |network output - target|^2     at  x = alpha*x0 + sigma*eps

Pure functions: the caller draws t and eps. Three choices are separate: which times are drawn (:data:`TIMES`), how much
each level counts (:data:`WEIGHTS`), and what the network predicts (chapter 3). A weight is declared for the error of
one prediction and converts exactly to that of any other, so min-SNR on eps, v or x0 is the same loss (trap O1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from math import log
from typing import final

import torch
from torch import Tensor

from .denoiser import Denoiser
from .errors import UndiffuseError
from .levels import Level, spread
from .predictions import X0, EDMOutput, Prediction
from .schedules import Schedule
from .solvers.ddim import forward_variance, posterior_variance

# --- Which times are drawn ------------------------------------------------------------------------------------------


class Times(ABC):
    """Abstract: a distribution of t, given as its quantile function, so that the caller's uniform numbers decide."""

    @abstractmethod
    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        """``[B]`` times for uniform numbers ``u`` in (0, 1), float64."""

    @final
    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        """As :meth:`quantile`, kept inside the levels that the schedule has: [first, 1]."""
        # torch.rand does return 0 once in 2^24 times, where a quantile may be infinite.
        u = u.cpu().double().clamp(1e-9, 1 - 1e-9)
        return self.quantile(u, schedule).clamp(schedule.first, 1.0)


@dataclass(frozen=True)
class UniformTimes(Times):
    """Every t alike (Ho et al. 2020)."""

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        return u


@dataclass(frozen=True)
class LogitNormalTimes(Times):
    """``logit(t) ~ N(mean, deviation^2)`` (Esser et al. 2024, arXiv:2403.03206, eq. 19)."""

    mean: float = 0.0
    deviation: float = 1.0

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        return torch.sigmoid(self.mean + self.deviation * torch.special.ndtri(u))


@dataclass(frozen=True)
class LogNormalTimes(Times):
    """``log(sigma/alpha) ~ N(mean, deviation^2)`` (Karras et al. 2022, table 1), cut at the schedule's end."""

    mean: float = -1.2
    deviation: float = 1.2

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        log_snr = -2 * (self.mean + self.deviation * torch.special.ndtri(u))
        return schedule.time_at(log_snr.clamp(schedule(1.0).log_snr, schedule(schedule.first).log_snr))


@dataclass(frozen=True)
class Stratified(Times):
    """One draw in each of B equal slices of the inner distribution: the batch covers all levels, with less variance
    (Kingma et al. 2021, arXiv:2107.00630, appendix I). The batch must be the global one, in random order."""

    inner: Times = field(default_factory=UniformTimes)

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        slices = torch.arange(len(u), dtype=torch.float64)
        return self.inner.quantile((slices + u) / len(u), schedule)


TIMES: dict[str, Times] = {
    "uniform": UniformTimes(),
    "logit_normal": LogitNormalTimes(),
    "log_normal": LogNormalTimes(),
    "stratified": Stratified(),
}
"""Every distribution of times by name."""


def overlap(times: Times, schedule: Schedule, visited: Tensor) -> float:
    """How far training's times cover those that sampling visits: ``sum_i min(p_i, 1/N)`` over the N visited times.

    p_i is the share of training draws nearer to time i than to another: 1 when each gets its part, near 0 when training
    and sampling are at different levels (trap S11). ``visited`` is a grid's times; its last, 0, is never asked.
    """
    asked = visited[:-1].flip(0)
    draws = times((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096, schedule)
    cells = torch.bucketize(draws, (asked[:-1] + asked[1:]) / 2)
    shares = torch.bincount(cells, minlength=len(asked)) / len(draws)
    return float(shares.clamp(max=1 / len(asked)).sum())


# --- How much each level counts -------------------------------------------------------------------------------------


class Weight(ABC):
    """Abstract: ``value(level)`` times the squared error of one reference prediction."""

    def reference(self) -> Prediction | None:
        """The prediction whose squared error the value weighs; None: the network's own, whatever it is."""
        return None

    @abstractmethod
    def value(self, level: Level) -> Tensor:
        """The weight on the squared error of :meth:`reference`."""

    @final
    def __call__(self, level: Level, prediction: Prediction) -> Tensor:
        """The same weight on the squared error of ``prediction``: ``value * (det_ref / det)^2``.

        Raises where that is not finite.
        """
        weight, reference = self.value(level), self.reference()
        if reference is not None and reference != prediction:
            weight = weight * (reference.det(level) / prediction.det(level)) ** 2
        if not bool(weight.isfinite().all()):
            raise UndiffuseError(
                f"the weight {type(self).__name__} on {type(prediction).__name__} prediction is not finite "
                f"at t = {float(level.t.min()):.4g}..{float(level.t.max()):.4g}"
            )
        return weight


@dataclass(frozen=True)
class Unit(Weight):
    """1 on the network's own output (``on=None``) or on the error of ``on``: ``Unit(Eps())`` is DDPM's simple loss."""

    on: Prediction | None = None

    def reference(self) -> Prediction | None:
        return self.on

    def value(self, level: Level) -> Tensor:
        return torch.ones_like(level.alpha)


@dataclass(frozen=True)
class MinSNR(Weight):
    """``min(SNR, gamma)`` on the x0 error (Hang et al. 2023, arXiv:2303.09556): min(SNR, g)/SNR on eps, min(SNR,
    g)/(SNR + 1) on v."""

    gamma: float = 5.0

    def reference(self) -> Prediction:
        return X0()

    def value(self, level: Level) -> Tensor:
        return level.snr.clamp(max=self.gamma)


@dataclass(frozen=True)
class Sigmoid(Weight):
    """``sigmoid(bias - log SNR)`` on the eps error (Kingma & Gao 2023, arXiv:2303.00848; bias 2 in Hoogeboom et al.
    2024), written on x0, ``e^bias sigmoid(log SNR - bias)``, where it is finite everywhere."""

    bias: float = 2.0

    def reference(self) -> Prediction:
        return X0()

    def value(self, level: Level) -> Tensor:
        return torch.exp(torch.tensor(self.bias, dtype=torch.float64)) * torch.sigmoid(level.log_snr - self.bias)


@dataclass(frozen=True)
class EDMWeight(Weight):
    """1 on the error of EDM's F, that is ``1/c_out^2`` on x0 (Karras et al. 2022, table 1)."""

    sigma_data: float = 0.5

    def reference(self) -> Prediction:
        return EDMOutput(self.sigma_data)

    def value(self, level: Level) -> Tensor:
        return torch.ones_like(level.alpha)


WEIGHTS: dict[str, Weight] = {"unit": Unit(), "min_snr": MinSNR(), "sigmoid": Sigmoid(), "edm": EDMWeight()}
"""Every weight by name."""


# --- The loss -------------------------------------------------------------------------------------------------------


def loss(
    denoiser: Denoiser,
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    weight: Weight = WEIGHTS["unit"],
    *,
    huber: float | None = None,
    **cond: Tensor,
) -> Tensor:
    """The training loss of each sample, ``[B]``, float32.

    Args:
        x0: data in model units ``[B, ...]``; t: times ``[B]``; eps: standard normal noise like x0 (add
            :func:`offset_noise` for a wider mean).
        weight: how much each level counts.
        huber: the constant c of the pseudo-Huber distance ``sqrt(|e|^2 + c^2) - c`` on the whole sample's error
            (Song & Dhariwal 2023, arXiv:2310.14189, eq. 7; about ``0.00054 sqrt(D)``), here divided by sqrt(D) so that
            its size does not grow with the sample; None: the mean squared error.
        cond: the conditions, with some already dropped to null.

    With learned variance the variational bound is added as in improved DDPM's hybrid objective: 0.001 times the sum of
    :func:`variance_loss` over all steps (those of a table, or 1000).
    """
    if x0.dtype in (torch.float16, torch.bfloat16):
        x0, eps = x0.float(), eps.float()  # the target deserves what mix does to x
    level = denoiser.schedule(t)
    x = level.mix(x0, eps)
    y, variance = denoiser.output(x, level, **cond)
    error = (y - denoiser.prediction.target(x0, eps, level)).float().flatten(1)
    distance = error.square().mean(1)
    if huber is not None:
        if not huber > 0:
            raise UndiffuseError(f"the Huber constant must be positive, got {huber}")
        squared = error.square().sum(1)
        distance = (torch.sqrt(squared + huber**2) - huber) / error.shape[1] ** 0.5
    result = spread(weight(level, denoiser.prediction), distance) * distance
    if variance is not None:
        x0_hat = denoiser.prediction.estimate(x, y.detach(), level).x0
        # The bound is the sum over all steps, of which one is drawn.
        first = denoiser.schedule.first
        steps = round(1 / first) if first else 1000
        result = result + 0.001 * steps * variance_loss(denoiser.schedule, x0, level, x0_hat, variance, steps)
    return result


def variance_loss(
    schedule: Schedule, x0: Tensor, here: Level, x0_hat: Tensor, variance: Tensor, steps: int = 1000
) -> Tensor:
    """The variational bound of one step of ``1/steps`` in t, in bits a dimension, ``[B]`` (Nichol & Dhariwal 2021,
    eq. 16); its gradients reach only the variance. The last step, which has no posterior, counts as the one before
    it."""
    here = schedule(here.t.clamp(min=2 / steps))
    there = schedule(here.t - 1 / steps)
    small, large = posterior_variance(here, there), forward_variance(here, there)
    # The two posterior means differ by the x0 error times their coefficient of x0.
    pull = there.alpha - here.alpha**2 * there.sigma**2 / (there.alpha * here.sigma**2)
    gap = spread(pull, x0) * (x0_hat.detach() - x0)
    log_ratio = variance * spread(large.log() - small.log(), x0)  # learned over true variance
    kl = 0.5 * (log_ratio - 1 + torch.exp(-log_ratio) * (1 + gap**2 / spread(small, x0)))
    return kl.float().flatten(1).mean(1) / log(2)


def offset_noise(eps: Tensor, per_channel: Tensor, strength: float) -> Tensor:
    """``eps`` plus ``strength`` times one number a channel ``[B, C]``, so that the model also learns to move the mean
    (N. Guttenberg 2023, "Diffusion with offset noise")."""
    return eps + strength * per_channel.reshape(per_channel.shape + (1,) * (eps.ndim - 2)).to(eps)
