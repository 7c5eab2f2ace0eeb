"""Chapter 8, fifth part. Inversion: the noise that a sampler would turn into this sample.

The usual way runs the solver up the levels. It is off by as much as one step differs from its reverse, which falls with
the step size. The exact way solves, from data to noise, one equation a step for the x at ``here``,

    step(x) = x'        where step is the solver's own, from here to there

with Newton's method, halving the update until the residual falls. For an exact denoiser the deterministic step has a
Jacobian >= (sigma'/sigma) I, so it can be inverted; a learned one need not, and then the residual says so and
:func:`invert` refuses. A fixed-point iteration alone does not always converge, even where the step is invertible.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .denoiser import Denoise
from .errors import UndiffuseError
from .levels import Estimate, Level
from .sampling import answer
from .solvers import Euler, Solver

Residual = Callable[[Tensor], Tensor]
"""``x -> step(x) - x'``, both ``[B, ...]``."""

NEWTON_UP_TO = 64
"""Dimensions up to which Newton's method, with its full Jacobian, is the default."""


@dataclass(frozen=True, eq=False)
class Inversion:
    """What :func:`invert` found.

    Attributes:
        x: the sample at the first (noisiest) level, ``[B, ...]``.
        residual: ``[B]`` float64: the greatest root mean square of ``step(x) - x'`` over the steps; None for the
            approximate way, which does not measure it.
        calls: denoiser calls.
    """

    x: Tensor
    residual: Tensor | None
    calls: int


class RootFinder(ABC):
    """Abstract: subclasses are frozen dataclasses that solve ``residual(x) = 0`` for each sample of a batch."""

    @abstractmethod
    def solve(self, residual: Residual, x: Tensor, slope: float, tolerance: float) -> Tensor:
        """The best x found from the guess ``x``; ``slope`` is a scalar guess of the residual's Jacobian."""


@dataclass(frozen=True)
class Newton(RootFinder):
    """Damped Newton with the full Jacobian, one backward pass a dimension: quadratic, for small data.

    Attributes:
        iterations: at most.
        halvings: of an update that does not lower the residual, at most.
    """

    iterations: int = 50
    halvings: int = 12

    def solve(self, residual: Residual, x: Tensor, slope: float, tolerance: float) -> Tensor:
        value = trial_value = residual(trial := x)
        for _ in range(self.iterations):
            error = rms(value)
            todo = error > tolerance
            if not bool(todo.any()):
                break
            update = torch.linalg.lstsq(_jacobian(residual, x), value.flatten(1)[..., None]).solution
            update = update.reshape(x.shape)
            factor = todo.to(x.dtype)
            for _ in range(self.halvings):
                trial = x - _rows(factor, x) * update
                trial_value = residual(trial)
                worse = todo & ~(rms(trial_value) < error)
                if not bool(worse.any()):
                    break
                factor = torch.where(worse, factor / 2, factor)
            better = rms(trial_value) < error
            x = torch.where(_rows(better, x), trial, x)
            value = torch.where(_rows(better, x), trial_value, value)
            if not bool((better & todo).any()):
                break
        return x


@dataclass(frozen=True)
class Anderson(RootFinder):
    """Fixed-point iteration ``x - residual/slope`` with Anderson's acceleration (Walker & Ni 2011): one call an
    iteration and no gradients, for large data. The best x seen is returned.

    Attributes:
        iterations: at most.
        memory: past iterates that are combined.
    """

    iterations: int = 100
    memory: int = 5

    def solve(self, residual: Residual, x: Tensor, slope: float, tolerance: float) -> Tensor:
        best, least = x, torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
        xs: list[Tensor] = []
        moves: list[Tensor] = []
        for _ in range(self.iterations):
            value = residual(x)
            error = rms(value)
            best = torch.where(_rows(error < least, x), x, best)
            least = torch.minimum(error, least)
            if not bool((least > tolerance).any()):
                break
            # A sample that went astray starts again from its best with the plain, shorter move.
            stray = _rows(~(error < 10 * least), x)
            xs, moves = [*xs[-self.memory :], x.flatten(1)], [*moves[-self.memory :], (-value / slope).flatten(1)]
            step = moves[-1]
            if len(xs) > 1:
                dm = torch.stack([moves[-1] - m for m in moves[:-1]], 2)
                dx = torch.stack([xs[-1] - y for y in xs[:-1]], 2)
                gram = dm.mT @ dm
                damping = 1e-12 * gram.diagonal(dim1=1, dim2=2).amax(1).clamp(min=torch.finfo(x.dtype).tiny)
                gram = gram + damping[:, None, None] * torch.eye(gram.shape[1], dtype=x.dtype, device=x.device)
                weights = torch.linalg.lstsq(gram, dm.mT @ moves[-1][..., None]).solution
                step = step - ((dx + dm) @ weights)[..., 0]
            x = torch.where(stray, best, x + step.reshape(x.shape))
        return best


@torch.no_grad()
def invert(
    denoise: Denoise,
    x: Tensor,
    levels: Sequence[Level],
    solver: Solver = Euler(),
    *,
    exact: bool = True,
    finder: RootFinder | None = None,
    tolerance: float | None = None,
) -> Inversion:
    """Carry clean data ``x`` (``[B, ...]``, at ``levels[-1]``) up to noise at ``levels[0]``.

    ``levels`` are those of sampling, noise first: ``trajectory(denoise, invert(...).x, levels, solver, noise)`` returns
    to x, exactly or nearly.

    Args:
        denoise: for the exact way with :class:`Newton`, autograd must be able to follow it.
        solver: a deterministic one. The exact way needs one whose steps do not lean on those before.
        exact: solve each step; False: run the solver upwards (Song et al. 2020, arXiv:2010.02502, section 5.4), each
            step from the very level at which it asks (trap S3).
        finder: of the root; None: :class:`Newton` up to 64 dimensions, else :class:`Anderson`.
        tolerance: of the residual's root mean square; None: 1e-9 in float64, 1e-4 in float32.

    Raises :class:`UndiffuseError` for stochastic solvers, and when a step cannot be inverted to ``tolerance``.
    """
    name = type(solver).__name__
    if solver.stochastic:
        raise UndiffuseError(f"{name} draws noise: only deterministic solvers can be inverted (say, euler)")
    if x.ndim < 2 or x.dtype not in (torch.float32, torch.float64) or not bool(x.isfinite().all()):
        raise UndiffuseError(f"inversion needs finite float32 or float64 data [B, ...], got {list(x.shape)} {x.dtype}")
    if len(levels) < 2 or not levels[-1].is_data:
        raise UndiffuseError("inversion needs the levels of sampling, noise first, the last one clean data")
    counted = _Counted(denoise)
    if not exact:
        x = _upwards(counted, x, levels, solver)
        return Inversion(x, None, counted.calls)

    tolerance = (1e-9 if x.dtype == torch.float64 else 1e-4) if tolerance is None else tolerance
    finder = finder or (Newton() if x[0].numel() <= NEWTON_UP_TO else Anderson())
    worst = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for there, here in pairwise(reversed(levels)):
        wanted = x

        def residual(y: Tensor, here: Level = here, there: Level = there, wanted: Tensor = wanted) -> Tensor:
            end, memory, _ = answer(solver.step(y, here, there, None, _no_noise), counted)
            if memory is not None:
                raise UndiffuseError(
                    f"{name} leans on past steps, so one step alone cannot be inverted exactly: "
                    "take a one-step solver (euler, heun), or exact=False"
                )
            return end - wanted

        # For data of unit variance the step multiplies by `slope`: a start that is right at both ends.
        size = float(here.alpha**2 + here.sigma**2)
        slope = float(here.alpha * there.alpha + here.sigma * there.sigma) / size
        x = finder.solve(residual, x / slope, slope, tolerance)
        error = rms(residual(x))
        if bad := int((error > tolerance).sum()):
            raise UndiffuseError(
                f"the step from t = {float(here.t):.4g} to {float(there.t):.4g} cannot be inverted: {bad} of {len(x)} "
                f"samples keep a residual of up to {float(error.max()):.2g} (tolerance {tolerance:.2g}); take smaller "
                "steps, a larger tolerance, or exact=False"
            )
        worst = torch.maximum(worst, error)
    return Inversion(x, worst, counted.calls)


def _upwards(denoise: Denoise, x: Tensor, levels: Sequence[Level], solver: Solver) -> Tensor:
    """The solver run from data to noise. Nothing can be asked at sigma = 0, so the first step, to the least noisy
    level, asks there about the data itself."""
    up = list(reversed(levels[:-1]))
    if not all(_climbs(solver, here, there) for here, there in pairwise(up)):
        raise UndiffuseError(f"{type(solver).__name__} steps down only, it cannot run upwards: take euler or heun")
    x = up[0].mix(x, denoise(x * float(up[0].alpha), up[0]).eps)
    memory = None
    for here, there in pairwise(up):
        x, memory, _ = answer(solver.step(x, here, there, memory, _no_noise), denoise)
    if not bool(x.isfinite().all()):
        raise UndiffuseError(f"{type(solver).__name__} does not reach the first level upwards: take euler or heun")
    return x


def _climbs(solver: Solver, here: Level, there: Level) -> bool:
    """Whether a step up is one. If all data is 0, x = sigma*eps moves to sigma'*eps, exactly, in every solver."""

    def zero(x: Tensor, level: Level) -> Estimate:
        return Estimate(torch.zeros_like(x), x / float(level.sigma), torch.full_like(x, 0.5))

    x = torch.ones(1, 1, dtype=torch.float64)
    end, _, _ = answer(solver.step(x * float(here.sigma), here, there, None, _no_noise), zero)
    return bool(((end - there.sigma).abs() < 1e-6 * there.sigma).all())


class _Counted:
    """A denoiser that counts its calls."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise, self.calls = denoise, 0

    def __call__(self, x: Tensor, level: Level) -> Estimate:
        self.calls += 1
        return self.denoise(x, level)


def _no_noise(x: Tensor, here: Level, there: Level) -> Tensor:
    raise UndiffuseError("a solver that says it is deterministic drew noise")


def rms(x: Tensor) -> Tensor:
    """The root mean square of each sample, ``[B]`` float64; inf where it is not finite."""
    return x.detach().double().square().flatten(1).mean(1).sqrt().nan_to_num(torch.inf)


def _rows(c: Tensor, x: Tensor) -> Tensor:
    return c.reshape(-1, *(1,) * (x.ndim - 1))


def _jacobian(residual: Residual, x: Tensor) -> Tensor:
    """``[B, D, D]``, one backward pass a row."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = residual(leaf).flatten(1)
        if not value.requires_grad:
            raise UndiffuseError("Newton's method differentiates the denoiser, but this one detaches its input")
        rows = [torch.autograd.grad(row.sum(), leaf, retain_graph=True)[0] for row in value.unbind(1)]
    return torch.stack(rows, 1).flatten(2)
