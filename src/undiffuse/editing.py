"""Chapter 8, sixth part. Editing: start from data, keep a part of it, or ask for data that explain a measurement.

All of it is made of the parts that sampling has, so that it composes with every solver:

    where to start or stop    a list of levels           below, above, image_to_image, stop_early, interpolate
    what must hold            Denoise -> Denoise         keep_known, dps, pigdm
    how to step               a solver around a solver   RePaint

Masks are called ``keep``: True where an element of the data is to stay as it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .denoiser import Denoise
from .errors import UndiffuseError
from .grids import Grid, Uniform
from .levels import Estimate, Level, combine, spread
from .noise import Streams, slerp
from .sampling import start, trajectory
from .schedules import Schedule
from .solvers import Euler, Noise, Solver, Step


def _end(denoise: Denoise, x: Tensor, levels: Sequence[Level], solver: Solver, noise: Noise) -> Tensor:
    return deque(trajectory(denoise, x, levels, solver, noise), maxlen=1).pop().x


def spare_streams(seed: int, samples: int | Sequence[int]) -> Streams:
    """Noise for what an edit draws beside the sampler: independent of ``Streams(seed, samples)`` and, like it, a
    function of (seed, sample) alone."""
    numbers = range(samples) if isinstance(samples, int) else samples
    if any(not 0 <= i < 2**31 for i in numbers):
        raise UndiffuseError("sample numbers of an edit must be below 2^31")
    return Streams(seed, [i + 2**31 for i in numbers])


# --- Where to start and to stop -------------------------------------------------------------------------------------


def below(levels: Sequence[Level], t: float) -> list[Level]:
    """The level at time ``t`` exactly, then those of ``levels`` below it: a trajectory from the middle."""
    if not 0 < t <= 1:
        raise UndiffuseError(f"a start time must be in (0, 1], got {t}")
    here = levels[0].path(t)
    return [here, *(level for level in levels if float(level.t) < t * (1 - 1e-9))]


def above(levels: Sequence[Level], t: float) -> list[Level]:
    """Those of ``levels`` above time ``t``, then the level at ``t`` exactly: a trajectory that stops on the way."""
    if not 0 <= t < float(levels[0].t):
        raise UndiffuseError(f"a stop time must be at least 0 and below the first, {float(levels[0].t):.4g}; got {t}")
    return [*(level for level in levels if float(level.t) > t * (1 + 1e-9)), levels[0].path(t)]


def stop_early(
    denoise: Denoise, x: Tensor, levels: Sequence[Level], t: float, solver: Solver, noise: Noise
) -> tuple[Tensor, Estimate]:
    """Sample from ``x`` at ``levels[0]`` to time ``t``, 0 < t < 1, and ask once more: the sample there, and what is
    believed of it. Its ``x0`` is sharp where the data are sure and blurred where they are still open."""
    if not t > 0:
        raise UndiffuseError("stopping at t = 0 is plain sampling: call that")
    levels = above(levels, t)
    x = _end(denoise, x, levels, solver, noise)
    with torch.no_grad():
        return x, denoise(x, levels[-1])


def image_to_image(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    strength: float,
    *,
    steps: int,
    solver: Solver,
    grid: Grid = Uniform(),
    seed: int = 0,
    samples: Sequence[int] | None = None,
) -> Tensor:
    """Add noise to data ``x`` (``[B, ...]``, model units) and sample from there (SDEdit, Meng et al. 2021,
    arXiv:2108.01073).

    ``strength`` in [0, 1] is a noise level, the time t = strength (trap S23): noise is added at exactly the level from
    which it is removed. 0 returns x, bit for bit; 1 ignores it and is plain sampling with this seed. The steps are
    those of the grid below that level.
    """
    if not 0 <= strength <= 1:
        raise UndiffuseError(f"strength must be from 0 (keep the input) to 1 (ignore it), got {strength}")
    if strength == 0:
        return x.clone()
    if strength < schedule.first:
        raise UndiffuseError(f"strength {strength:.3g} is below {schedule.first:.3g}, the first level of this model")
    noise = Streams(seed, range(len(x)) if samples is None else samples)
    if len(noise.generators) != len(x):
        raise UndiffuseError(f"{len(noise.generators)} sample numbers for {len(x)} samples")
    levels = grid.levels(schedule, steps)
    eps = noise.draw(x.shape[1:], x)
    if strength == 1:
        return _end(denoise, start(levels[0], eps), levels, solver, noise)
    levels = below(levels, strength)
    return _end(denoise, levels[0].mix(x, eps), levels, solver, noise)


def interpolate(
    denoise: Denoise,
    levels: Sequence[Level],
    a: Tensor,
    b: Tensor,
    weights: Sequence[float],
    solver: Solver = Euler(),
) -> Tensor:
    """``[W, ...]`` samples along the arc between the unit noises ``a`` and ``b`` (``[...]``, one sample each), one for
    each weight: 0 is the sample of a, 1 that of b (Song et al. 2020, arXiv:2010.02502, appendix D.5).

    Needs a deterministic solver. ``denoise`` is asked with W samples.
    """
    if solver.stochastic:
        raise UndiffuseError(
            f"{type(solver).__name__} adds noise on the way, so the ends do not fix the samples between them: take a "
            "deterministic solver (say, euler)"
        )
    if a.shape != b.shape or not weights:
        raise UndiffuseError(f"interpolation needs two noises of one shape and weights, got {a.shape}, {b.shape}")
    x = torch.cat([slerp(a[None], b[None], weight) for weight in weights])
    return _end(denoise, start(levels[0], x), levels, solver, _no_noise)


def _no_noise(x: Tensor, here: Level, there: Level) -> Tensor:
    raise UndiffuseError("a solver that says it is deterministic drew noise")


# --- Inpainting -----------------------------------------------------------------------------------------------------


def _check_known(known: Tensor, keep: Tensor) -> None:
    if keep.dtype != torch.bool:
        raise UndiffuseError(f"keep must be boolean, True where the data stay as they are; got {keep.dtype}")
    try:
        fits = torch.broadcast_shapes(known.shape, keep.shape) == known.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise UndiffuseError(f"keep of shape {list(keep.shape)} does not fit data of shape {list(known.shape)}")
    if not bool(known.isfinite().all()):
        raise UndiffuseError("the known data of an inpainting must be finite (fill the unknown part with zeros)")


def keep_known(denoise: Denoise, known: Tensor, keep: Tensor) -> Denoise:
    """Inpainting as a hard constraint: the estimate of x0 is ``known`` (``[B, ...]``, model units) where ``keep`` is
    True, and eps moves along (Wang et al. 2022, arXiv:2212.00490, DDNM with a mask). The last step returns x0, so kept
    elements of the samples are bit-equal to ``known``."""
    _check_known(known, keep)

    def kept(x: Tensor, level: Level) -> Estimate:
        e = denoise(x, level)
        return e if level.is_data else e.with_x0(torch.where(keep.to(x.device), known.to(x), e.x0), level)

    return kept


@dataclass(frozen=True, eq=False)
class RePaint(Solver):
    """Inpainting by replacement and resampling around any solver (Lugmayr et al. 2022, arXiv:2201.09865, algorithm 1).

    After each step the kept part is replaced by ``known`` with noise of that level (Song et al. 2021). The two parts
    then do not know of each other, so the sample goes back up and the step is made again, ``repeats`` times in all.

    Attributes:
        inner: the solver that steps.
        known: ``[B, ...]``, model units.
        keep: boolean, broadcasts against ``known``; True where it stays.
        noise: for the kept part and the way up; independent of the sampler's own (:func:`spare_streams`).
        repeats: steps made at each level, at least 1; 1 only replaces.
    """

    inner: Solver
    known: Tensor
    keep: Tensor
    noise: Noise
    repeats: int = 10

    stochastic = True

    def __post_init__(self) -> None:
        _check_known(self.known, self.keep)
        if isinstance(self.repeats, bool) or not isinstance(self.repeats, int) or self.repeats < 1:
            raise UndiffuseError(f"repeats of RePaint must be a whole number of at least 1, got {self.repeats!r}")

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.inner.order

    @property
    def calls(self) -> int:  # type: ignore[override]
        return self.inner.calls * self.repeats

    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        keep, known = self.keep.to(x.device), self.known.to(x)
        for repeat in range(self.repeats):
            # The caller's noise may be a path, the same whenever the interval is: a repeat needs noise of its own.
            end, after = yield from self.inner.step(x, here, there, memory, self.noise if repeat else noise)
            if there.is_data:
                return torch.where(keep, known, end), after
            end = torch.where(keep, there.mix(known, self.noise(x, there, there)), end)
            if repeat == self.repeats - 1:
                return end, after
            # Forward, from there to here: x = (alpha/alpha') x' + the noise that is missing.
            kept = here.alpha / there.alpha
            added = torch.sqrt((here.sigma**2 - (kept * there.sigma) ** 2).clamp(min=0))
            x = combine((kept, end), (added, self.noise(x, there, here)))
        raise AssertionError("unreachable: repeats >= 1")


def paste(edited: np.ndarray, original: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """``edited`` with the kept elements of ``original``, both in the data's own units: bit-equal there, whatever the
    way through the model rounded (trap X10)."""
    if keep.dtype != np.bool_:
        raise UndiffuseError(f"keep must be boolean, True where the data stay as they are; got {keep.dtype}")
    if edited.shape != original.shape or edited.dtype != original.dtype:
        raise UndiffuseError(
            f"cannot paste {original.shape} {original.dtype} into {edited.shape} {edited.dtype}: they must be alike"
        )
    return np.where(np.broadcast_to(keep, edited.shape), original, edited)


# --- Inverse problems -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Measurement:
    """``y = A x0 + deviation * noise``, A linear.

    Attributes:
        y: what was measured, ``[B, ...]``.
        operator: A, ``[B, *data] -> [B, *measured]``, in model units.
        adjoint: its transpose, ``[B, *measured] -> [B, *data]``; None where it is not needed.
        deviation: of the measurement's noise, >= 0.
    """

    y: Tensor
    operator: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor] | None = None
    deviation: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.deviation < float("inf"):
            raise UndiffuseError(f"deviation of a measurement must be at least 0, got {self.deviation}")

    @torch.no_grad()
    def check(self, x: Tensor) -> None:
        """Refuse an operator that is not linear on data like ``x``, or an adjoint that is not its transpose."""
        generator = torch.Generator().manual_seed(0)
        u, v = (torch.randn(x.shape, generator=generator).to(x) for _ in range(2))
        au, av = self.operator(u), self.operator(v)
        if au.shape != self.y.shape:
            raise UndiffuseError(f"the operator gives {list(au.shape)}, but y is {list(self.y.shape)}")
        slack = 1e-3 * float(au.norm() + av.norm())
        if float((self.operator(2 * u - v) - 2 * au + av).norm()) > slack:
            raise UndiffuseError("the operator of a measurement must be linear: A(2u - v) is not 2 A u - A v")
        if self.adjoint is not None:
            w = torch.randn(au.shape, generator=generator).to(au)
            left, right = float((au * w).sum()), float((u * self.adjoint(w)).sum())
            if abs(left - right) > 1e-3 * float(au.norm() * w.norm()):
                raise UndiffuseError(
                    f"the adjoint is not the operator's transpose: <A u, w> = {left:.4g}, but <u, A^T w> = {right:.4g}"
                )


def estimate_variance(level: Level, deviation: float) -> Tensor:
    """The variance of x0 given x for data of this deviation: ``c^2 sigma^2 / (alpha^2 c^2 + sigma^2)``."""
    c = deviation**2
    return c * level.sigma**2 / (level.alpha**2 * c + level.sigma**2)


def dps(denoise: Denoise, measured: Measurement, data_deviation: float = 1.0, strength: float = 1.0) -> Denoise:
    """Diffusion posterior sampling (Chung et al. 2022, arXiv:2209.14687): the score of the measurement given x is that
    given the estimate of x0, differentiated through the denoiser.

    The measurement's variance is ``deviation^2`` plus that of the estimate (:func:`estimate_variance`), where the paper
    has a step size set by hand; exact only if A^T A = I on what it sees. No adjoint is needed.
    """

    def pull(x0: Tensor, level: Level) -> Tensor:
        rest = measured.y.to(x0) - measured.operator(x0)
        variance = spread(measured.deviation**2 + estimate_variance(level, data_deviation), x0)
        weight = (1 / variance).reshape(-1, *(1,) * (rest.ndim - 1))
        (back,) = torch.autograd.grad((rest.square() * weight).sum() / -2, x0)
        return back

    return _posterior(denoise, measured, pull, strength)


def pigdm(
    denoise: Denoise, measured: Measurement, data_deviation: float = 1.0, strength: float = 1.0, iterations: int = 30
) -> Denoise:
    """Pseudo-inverse guidance (Song et al. 2023, "Pseudoinverse-guided diffusion models for inverse problems"): as
    :func:`dps`, but with the covariance that A gives to the estimate, ``A^T (r^2 A A^T + deviation^2)^-1 (y - A x0)``.

    Exact for Gaussian data with covariance ``data_deviation^2``. The system is solved by conjugate gradients with the
    operator and its adjoint, ``iterations`` at most.
    """
    adjoint = measured.adjoint
    if adjoint is None:
        raise UndiffuseError("pigdm needs the adjoint of the operator; dps does not")

    def pull(x0: Tensor, level: Level) -> Tensor:
        variance = estimate_variance(level, data_deviation)

        def system(u: Tensor) -> Tensor:
            return spread(variance, u) * measured.operator(adjoint(u)) + measured.deviation**2 * u

        with torch.no_grad():
            return adjoint(_conjugate_gradients(system, measured.y.to(x0) - measured.operator(x0), iterations))

    return _posterior(denoise, measured, pull, strength)


def _posterior(
    denoise: Denoise, measured: Measurement, pull: Callable[[Tensor, Level], Tensor], strength: float
) -> Denoise:
    """Guidance by ``g = strength * J^T pull(x0)``, J the denoiser's Jacobian: eps loses ``sigma g``, x0 gains
    ``sigma^2/alpha g``. At alpha = 0, where x says nothing of y, the estimate is left alone."""
    checked = False

    def guided(x: Tensor, level: Level) -> Estimate:
        nonlocal checked
        if not checked:
            measured.check(x)
            checked = True
        if level.is_data:
            return denoise(x, level)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            e = denoise(leaf, level)
            if not e.x0.requires_grad:
                raise UndiffuseError("this guidance differentiates the denoiser, but this one detaches its input")
            x0 = e.x0.detach().requires_grad_()
            (g,) = torch.autograd.grad(e.x0, leaf, pull(x0, level).detach())
        push = torch.where(level.alpha > 0, strength * level.sigma, 0.0)
        lift = torch.where(level.alpha > 0, push * level.sigma / level.alpha, 0.0)
        moved, eps = combine((1.0, e.x0.detach()), (lift, g)), combine((1.0, e.eps.detach()), (-push, g))
        return Estimate(moved, eps, None if e.variance is None else e.variance.detach())

    return guided


def _conjugate_gradients(system: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """``system(u) = b`` for each sample of a batch, the system symmetric and positive (semi-)definite."""

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).flatten(1).sum(1).reshape(-1, *(1,) * (u.ndim - 1))

    u, rest = torch.zeros_like(b), b
    direction, size = rest, dot(rest, rest)
    done = size * torch.finfo(b.dtype).eps ** 2
    for _ in range(iterations):
        todo = size > done
        if not bool(todo.any()):
            break
        applied = system(direction)
        curve = dot(direction, applied)
        length = torch.where(todo & (curve > 0), size / curve.clamp(min=torch.finfo(b.dtype).tiny), 0.0)
        u, rest = u + length * direction, rest - length * applied
        after = dot(rest, rest)
        direction = rest + torch.where(todo, after / size.clamp(min=torch.finfo(b.dtype).tiny), 0.0) * direction
        size = after
    return u
