"""Chapter 8, fourth part. Likelihood: how probable a model finds data.

The probability-flow ODE carries data to noise without loss, so its density is that of the noise times the change of
volume on the way (Song et al. 2021, arXiv:2011.13456, section 4.3). With the angle ``phi = atan(sigma/alpha)``, the
length ``r = hypot(alpha, sigma)`` and ``w = x/r``,

    dw/dphi = v = (alpha*eps - sigma*x0) / r        d log p(w)/dphi = -tr(dv/dw)

which is finite at both ends. The steps are equal in log-SNR, except the last one, which may be to alpha = 0 and is a
step in phi. The trace is exact (one backward pass a dimension) or estimated with random signs (Hutchinson 1990;
Grathwohl et al. 2019, arXiv:1810.01367), and then the result has an error bar.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log, pi, prod, sqrt
from typing import Protocol

import torch
from torch import Tensor

from .denoiser import Denoise
from .errors import UndiffuseError
from .grids import LogSNR
from .levels import Level, combine
from .noise import Streams
from .schedules import Schedule

EXACT_UP_TO = 64
"""Dimensions up to which the exact trace is the default."""

PROBES = 16
"""Random probes above that, unless asked otherwise."""


class Units(Protocol):
    """What a likelihood must know of the data (a ``DataSpec`` knows it): ``model units = (value - shift) / scale``."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    @property
    def scale(self) -> tuple[float, ...]: ...


@dataclass(frozen=True)
class Integrator:
    """An explicit Runge-Kutta rule in which every stage starts from the one before it.

    Attributes:
        places: where in the step each stage is asked, 0 to 1; the first is 0.
        weights: of the stages in the result.
        order: of the error.
    """

    places: tuple[float, ...]
    weights: tuple[float, ...]
    order: int


INTEGRATORS: dict[str, Integrator] = {
    "heun": Integrator((0.0, 1.0), (1 / 2, 1 / 2), 2),
    "rk4": Integrator((0.0, 1 / 2, 1 / 2, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6), 4),
}
"""The integrators by name."""


@dataclass(frozen=True, eq=False)
class Likelihood:
    """The log-likelihood of each sample, and all that it rests on. Tensors are ``[B]``, float64, in nats.

    Attributes:
        log_prob: the logarithm of what ``kind`` says.
        error: standard error from the random probes; 0 for the exact trace.
        start: sigma/alpha of the first level. The density is the model's at this level, that of data smoothed by noise
            of this deviation (in model units).
        start_cost: what that changes: an estimate, of first order, of ``log p(clean) - log_prob``; not added. It takes
            the denoiser's word for the score: a trained one is often wrong about clean data, and then a second start
            level is the way to measure it. Integers do not have this cost: their bound holds at any start.
        dims: the number of elements D.
        calls: denoiser calls, each with one backward pass a dimension or probe.
        kind: what log_prob is the logarithm of, in words.
        latent: the sample carried to t = 1, ``[B, ...]``.
    """

    log_prob: Tensor
    error: Tensor
    start: float
    start_cost: Tensor
    dims: int
    calls: int
    kind: str
    latent: Tensor

    @property
    def bits_per_dim(self) -> Tensor:
        """``-log2 p / D``. For a density it depends on the units and may be negative."""
        return self.log_prob / (-log(2) * self.dims)

    @property
    def bits_error(self) -> Tensor:
        """The standard error of :attr:`bits_per_dim`."""
        return self.error / (log(2) * self.dims)

    @staticmethod
    def join(parts: Sequence[Likelihood]) -> Likelihood:
        """The likelihoods of several batches, measured in one way, as one."""
        log_prob, error, cost, latent = (
            torch.cat(values)
            for values in zip(*((p.log_prob, p.error, p.start_cost, p.latent) for p in parts), strict=True)
        )
        first, calls = parts[0], sum(part.calls for part in parts)
        return Likelihood(log_prob, error, first.start, cost, first.dims, calls, first.kind, latent)

    def __str__(self) -> str:
        n, bits = len(self.log_prob), self.bits_per_dim
        over = float(bits.std()) / sqrt(n) if n > 1 else 0.0
        probed = float(self.bits_error.square().mean().sqrt()) / sqrt(n)
        return (
            f"{float(bits.mean()):.4f} bits/dim, mean of {n} (standard error {over:.4f} over samples, {probed:.4f} of "
            f"it from probes): {self.kind}, at noise {self.start:.3g}"
        )


def dequantise(x: Tensor, units: Units, streams: Streams) -> Tensor:
    """Integer data with uniform noise on the interval that rounds to each value (Theis et al. 2016, arXiv:1511.01844):
    ``x + (u - 1/2) / scale`` in model units, u in [0, 1). Data that are not integers are returned as they are."""
    if units.dtype.startswith("float"):
        return x
    u = torch.stack([torch.rand(x.shape[1:], generator=g) for g in streams.generators]).to(x.device, x.dtype)
    return x + (u - 0.5) / x.new_tensor(units.scale).reshape(-1, *(1,) * (x.ndim - 2))


def log_volume(units: Units) -> float:
    """``sum log(scale)`` over all elements: a density in model units minus this is one in the data's own units."""
    each = units.scale if len(units.scale) > 1 else units.scale * units.shape[0]
    return sum(map(log, each)) * prod(units.shape[1:])


def log_likelihood(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    *,
    units: Units | None = None,
    steps: int = 100,
    start: float | None = None,
    probes: int | None = None,
    seed: int = 0,
    samples: Sequence[int] | None = None,
    integrator: Integrator = INTEGRATORS["rk4"],
) -> Likelihood:
    """The log-likelihood of ``x`` (``[B, ...]``, clean data in model units) under the model that ``denoise`` samples.

    Args:
        denoise: with its condition bound; autograd must be able to follow it. Guidance changes what is measured: a
            guided denoiser is the score of no density in general.
        units: of the data. Integer data are dequantised, and the result bounds the log-probability of the integers from
            below; other data get a density in their own units (traps D6, V12). None: a density in model units.
        steps: of the integrator, from ``start`` to t = 1.
        start: sigma/alpha of the first level; raised to that of the first level of a table. None: the deviation of the
            dequantisation noise for integers, else 1e-3. For integers the bound is valid at any start: the model is
            then the one that samples down to this level and rounds.
        probes: random probes of the trace, at least 2, the same along the whole path; 0: the exact trace. None: exact
            up to 64 dimensions, else 16 probes.
        seed, samples: of the dequantisation and the probes; sample i depends on ``(seed, samples[i])``; None: 0, 1, ...

    Raises :class:`UndiffuseError` for one probe (it has no error bar, trap V12), for x that is not finite, and when
    autograd cannot follow ``denoise``.
    """
    if x.ndim < 2 or not x.is_floating_point() or not bool(x.isfinite().all()):
        raise UndiffuseError(f"likelihood needs finite real data [B, ...], got {list(x.shape)} {x.dtype}")
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    dims = x[0].numel()
    if units is not None and tuple(x.shape[1:]) != tuple(units.shape):
        raise UndiffuseError(f"likelihood of data {list(x.shape[1:])} asked in units of data {list(units.shape)}")
    probes = (0 if dims <= EXACT_UP_TO else PROBES) if probes is None else probes
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise UndiffuseError(f"a likelihood needs at least 2 steps, got {steps!r}")
    if probes < 0 or probes == 1:
        raise UndiffuseError(f"{probes} probes have no error bar: take at least 2, or 0 for the exact trace")
    if start is None:
        integers = units is not None and not units.dtype.startswith("float")
        start = 1 / (sqrt(12) * max(units.scale)) if integers else 1e-3
    if not start > 0:
        raise UndiffuseError(f"the start level of a likelihood must be above 0, got {start}: try 1e-3")
    streams = Streams(seed, range(len(x)) if samples is None else samples)
    if len(streams.generators) != len(x):
        raise UndiffuseError(f"{len(streams.generators)} sample numbers for {len(x)} samples")
    if units is not None:
        x = dequantise(x, units, streams)
    vectors = _signs(x, probes, streams) if probes else None

    levels = list(schedule(LogSNR(least=start).nodes(schedule, steps + 1).flip(0)))
    first = levels[0]
    calls = 0

    def flow(w: Tensor, level: Level) -> tuple[Tensor, Tensor, Tensor]:
        """``(v, tr dv/dw [K, B], eps)``; K = 1 for the exact trace."""
        nonlocal calls
        calls += 1
        r = torch.hypot(level.alpha, level.sigma)
        with torch.enable_grad():
            w = w.detach().requires_grad_()
            e = denoise(combine((r, w)), level)
            v = combine((level.alpha / r, e.eps), (-level.sigma / r, e.x0))
            if not v.requires_grad:
                raise UndiffuseError("likelihood differentiates the denoiser, but this one detaches its input")
            traces = torch.stack([_product(v, w, u) for u in (_basis(w) if vectors is None else vectors)])
        return v.detach(), traces.sum(0, keepdim=True) if vectors is None else traces, e.eps.detach()

    w = combine((first.alpha / torch.hypot(first.alpha, first.sigma), x))
    cos, sin = (float(c / torch.hypot(first.alpha, first.sigma)) for c in (first.alpha, first.sigma))
    log_p = torch.zeros(max(probes, 1), len(x), dtype=torch.float64)  # the change on the way, for each probe
    start_cost = None
    for h, stages in _legs(levels, integrator):
        slope, total, change = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(log_p)
        for (level, rate), place, weight in zip(stages, integrator.places, integrator.weights, strict=True):
            v, trace, eps = flow(w + h * place * slope, level)
            slope = rate * v
            total, change = total + weight * slope, change + weight * rate * trace
            if start_cost is None:
                # The heat equation: d log p / d sigma^2 = (trace of the Hessian + |score|^2) / 2, in y = x/alpha.
                square = eps.double().square().flatten(1).sum(1).cpu()
                start_cost = (sin**2 * dims + cos * sin * trace.mean(0) - square) / 2
        w, log_p = w + h * total, log_p + h * change
    assert start_cost is not None

    normal = -w.double().square().flatten(1).sum(1).cpu() / 2 - dims / 2 * log(2 * pi)
    log_p = normal + log_p + dims * log(cos)  # the last term: from w to x/alpha at the first level
    kind = "density in model units"
    if units is not None:
        log_p = log_p - log_volume(units)
        real = units.dtype.startswith("float")
        kind = "density in the data's own units" if real else "lower bound for integers (uniform dequantisation)"
    error = log_p.std(0) / sqrt(probes) if probes else torch.zeros(len(x), dtype=torch.float64)
    if not bool(log_p.isfinite().all()):
        raise UndiffuseError("the log-likelihood is not finite: take more steps, or a higher start level")
    end = levels[-1]
    latent = combine((torch.hypot(end.alpha, end.sigma), w))
    ratio = float(first.sigma / first.alpha)
    return Likelihood(log_p.mean(0), error, ratio, start_cost, dims, calls, kind, latent)


def _legs(levels: Sequence[Level], rule: Integrator) -> Iterator[tuple[float, list[tuple[Level, float]]]]:
    """Each step in its variable, and for each stage its level and dphi/d(variable).

    The variable is ``log(sigma/alpha)``, whose dphi is ``alpha*sigma/r^2``; in the last step, which may be to
    alpha = 0, it is phi itself.
    """
    schedule = levels[0].path
    snr = torch.stack([level.log_snr for level in levels])
    phi = torch.atan2(levels[-2].sigma, levels[-2].alpha)
    h = torch.atan2(levels[-1].sigma, levels[-1].alpha) - phi
    asked = {0.0: levels[:-1], 1.0: levels[1:]}
    for place in set(rule.places) - {0.0, 1.0}:
        inside = torch.lerp(snr[:-2], snr[1:-1], place)
        last = -2 * torch.log(torch.tan(phi + place * h))
        asked[place] = list(schedule(schedule.time_at(torch.cat([inside, last[None]]))))
    for i in range(len(levels) - 1):
        stages = [asked[place][i] for place in rule.places]
        if i == len(levels) - 2:
            yield float(h), [(level, 1.0) for level in stages]
        else:
            rates = [float(a.alpha * a.sigma / (a.alpha**2 + a.sigma**2)) for a in stages]
            yield float(snr[i] - snr[i + 1]) / 2, list(zip(stages, rates, strict=True))


def _product(v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """``u . (dv/dw) u`` of each sample, ``[B]`` float64."""
    (row,) = torch.autograd.grad(v, w, u.expand_as(v), retain_graph=True)
    return (row * u).double().flatten(1).sum(1).cpu()


def _basis(w: Tensor) -> Iterator[Tensor]:
    """The D unit vectors, shaped like one sample."""
    for i in range(w[0].numel()):
        unit = torch.zeros_like(w[0]).flatten()
        unit[i] = 1
        yield unit.reshape(w.shape[1:])


def _signs(x: Tensor, probes: int, streams: Streams) -> Tensor:
    """``[K, B, ...]`` random signs (Rademacher: far less deviation than Gaussian probes), one stream a sample."""
    shape = (probes, *x.shape[1:])
    signs = [torch.randint(0, 2, shape, generator=g) * 2 - 1 for g in streams.generators]
    return torch.stack(signs, 1).to(x.device, x.dtype)
