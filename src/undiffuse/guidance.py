"""Chapter 6. Guidance: asking harder.

Guidance takes denoisers and returns a denoiser, so that everything composes and no solver knows of it. All of it acts
on *estimates*; as ``x = alpha*x0 + sigma*eps`` is linear, combining estimates is the same in every parametrisation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .denoiser import Denoise
from .errors import UndiffuseError
from .levels import Estimate, Level, combine, spread

Scale = float | Tensor | Callable[[Level], float | Tensor]
"""A guidance scale: one number, one a sample ``[B]``, or a function of the level that returns either."""


def scale_at(scale: Scale, level: Level) -> Tensor:
    """The scale at a level, ``[]`` or ``[B]``, float64. Raises if it is not finite."""
    s = torch.as_tensor(scale(level) if callable(scale) else scale, dtype=torch.float64)
    if not bool(s.isfinite().all()):
        raise UndiffuseError(f"guidance scale must be finite, got {s.tolist()}")
    return s


def cfg(cond: Denoise, uncond: Denoise, scale: Scale) -> Denoise:
    """Classifier-free guidance (Ho & Salimans 2022): ``uncond + scale * (cond - uncond)``, on every channel (trap G2).

    1 is the conditional model and costs one call, 0 the unconditional one; any real number works (traps G1, G3). Papers
    that write ``(1 + w) cond - w uncond`` mean ``scale = 1 + w``.
    """

    def guided(x: Tensor, level: Level) -> Estimate:
        flat = scale_at(scale, level)
        if bool((flat == 1).all()):
            return cond(x, level)
        if bool((flat == 0).all()):
            return uncond(x, level)
        c, u = cond(x, level), uncond(x, level)
        return Estimate(
            combine((1 - flat, u.x0), (flat, c.x0)),
            combine((1 - flat, u.eps), (flat, c.eps)),
            c.variance,
        )

    return guided


def autoguidance(good: Denoise, bad: Denoise, scale: Scale) -> Denoise:
    """A model guided by a worse version of itself (Karras et al. 2024, arXiv:2406.02507): the same line as
    :func:`cfg`."""
    return cfg(good, bad, scale)


def interval(scale: float, low: float, high: float) -> Callable[[Level], Tensor]:
    """``scale`` where ``low < sigma/alpha <= high``, else 1 (Kynkaanniemi et al. 2024, arXiv:2404.07724); outside the
    interval the unconditional call is not made."""
    if not 0 <= low < high:
        raise UndiffuseError(f"guidance interval needs 0 <= low < high, got {low} and {high}")

    def at(level: Level) -> Tensor:
        ratio = level.sigma / level.alpha
        return torch.where((ratio > low) & (ratio <= high), torch.tensor(scale, dtype=torch.float64), 1.0)

    return at


def remember(denoise: Denoise) -> Denoise:
    """The same denoiser, keeping its last answer: guidance that asks it twice at one place costs one call."""
    last: list[tuple[Tensor, Level, Estimate]] = []

    def remembered(x: Tensor, level: Level) -> Estimate:
        if not (last and last[0][0] is x and last[0][1] is level):
            last[:] = [(x, level, denoise(x, level))]
        return last[0][2]

    return remembered


def rescale(guided: Denoise, cond: Denoise, phi: float = 0.7) -> Denoise:
    """Bring the deviation of the guided x0 back to the conditional one (Lin et al. 2023, arXiv:2305.08891, eq. 15-16).

    ``phi`` in [0, 1]: 0 does nothing, 1 corrects fully. Done on x0, so that every parametrisation gives the same.
    """
    if not 0 <= phi <= 1:
        raise UndiffuseError(f"guidance rescale must be in [0, 1], got {phi}")

    def rescaled(x: Tensor, level: Level) -> Estimate:
        g, c = guided(x, level), cond(x, level)
        wide = _deviation(g.x0)
        factor = torch.where(wide > 0, _deviation(c.x0) / wide, 1.0)  # a constant has no deviation to bring back
        return g.with_x0(g.x0 * (phi * factor + (1 - phi)), level)

    return rescaled if phi else guided  # 0 costs nothing and changes no bit


def _deviation(x: Tensor) -> Tensor:
    return x.flatten(1).std(1, correction=0).reshape((-1,) + (1,) * (x.ndim - 1))


def threshold(denoise: Denoise, low: float, high: float, percentile: float | None = None) -> Denoise:
    """Keep x0 inside ``[low, high]`` and derive eps anew, so that the pair still explains x (trap S18).

    Static by default. With ``percentile`` (say 0.995) the dynamic form of Imagen (Saharia et al. 2022,
    arXiv:2205.11487, section 2.3), for ranges symmetric about 0: clip at that percentile of each sample's |x0| if it is
    above ``high``, then divide by it. The identity where |x0| stays inside. Off unless asked for (trap S16).
    """
    if not low < high:
        raise UndiffuseError(f"threshold needs low < high, got {low} and {high}")
    if percentile is not None and (not 0 < percentile <= 1 or low != -high):
        raise UndiffuseError("a dynamic threshold needs a percentile in (0, 1] and a range symmetric about 0")

    def limited(x: Tensor, level: Level) -> Estimate:
        e = denoise(x, level)
        if percentile is None:
            x0 = e.x0.clamp(low, high)
        else:
            # kthvalue, as torch.quantile refuses more than 16 M elements.
            flat = e.x0.abs().flatten(1)
            k = max(1, min(flat.shape[1], round(percentile * flat.shape[1])))
            s = (flat.kthvalue(k, dim=1).values / high).clamp(min=1.0)
            s = s.reshape((-1,) + (1,) * (x.ndim - 1))
            x0 = (e.x0 / s).clamp(low, high)
        return e.with_x0(x0, level)

    return limited


def classifier_guidance(denoise: Denoise, log_prob: Callable[[Tensor, Level], Tensor], scale: float) -> Denoise:
    """Guidance by the gradient of a noise-aware classifier (Dhariwal & Nichol 2021, arXiv:2105.05233, algorithm 2).

    ``log_prob(x, level) -> [B]`` is log p(y | x) of the wanted class. The score gains ``scale * grad log_prob``, so eps
    loses ``sigma * scale * grad`` and x0 gains ``sigma^2/alpha * scale * grad``. At alpha = 0, where x says nothing of
    the class, the estimate is left alone.
    """

    def guided(x: Tensor, level: Level) -> Estimate:
        e = denoise(x, level)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(log_prob(leaf, level).sum(), leaf)
        strength = torch.where(level.alpha > 0, scale * level.sigma, 0.0)
        lift = torch.where(level.alpha > 0, strength * level.sigma / level.alpha, 0.0)
        return Estimate(
            e.x0 + spread(lift, x) * gradient,
            e.eps - spread(strength, x) * gradient,
            e.variance,
        )

    return guided
