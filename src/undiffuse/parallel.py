"""Chapter 8, seventh part. Parallel in time: one sample sooner, by asking about many levels at once.

A trajectory is a sum, ``x_j = x_0 + sum_{i<j} (step_i(x_i) - x_i)``. Guess all of it, make all the steps at once (one
denoiser call with a batch of levels), sum them up, and repeat: Picard's iteration, in a window that slides along as its
beginning settles (ParaDiGMS, Shih et al. 2023, arXiv:2305.16317). The noise of every step is drawn beforehand and
stays, so that stochastic solvers converge to their own sequential sample. After k sweeps the first k steps are exact
whatever happens, so N steps take at most N sweeps; usually far fewer, of more work each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .denoiser import Denoise
from .errors import UndiffuseError
from .levels import Estimate, Level
from .sampling import answer
from .solvers import Noise, Solver


@dataclass(frozen=True, eq=False)
class Parallel:
    """What :func:`sample_parallel` found.

    Attributes:
        x: the sample at the last level, ``[1, ...]``.
        sweeps: of Picard's iteration.
        calls: denoiser calls in a row, each of a whole window.
        rows: samples that the denoiser was asked about, all in all.
        change: the greatest change, root mean square, of a sample that was taken as settled.
    """

    x: Tensor
    sweeps: int
    calls: int
    rows: int
    change: float


@torch.no_grad()
def sample_parallel(
    denoise: Denoise,
    x: Tensor,
    levels: Sequence[Level],
    solver: Solver,
    noise: Noise,
    *,
    window: int | None = None,
    tolerance: float = 1e-3,
) -> Parallel:
    """The end of ``trajectory(denoise, x, levels, solver, noise)`` for one sample ``x`` (``[1, ...]``).

    Args:
        denoise: asked with exactly ``window`` samples and ``[window]`` levels: bind its condition that many times.
        solver: one whose steps do not lean on those before (Euler, Heun, DDIM with noise, ...); others are refused.
        window: steps made at once; None: all.
        tolerance: a sample is settled when a sweep changes it by less than this, root mean square, in units of the
            deviation ``hypot(alpha, sigma)`` there. 0 gives the sequential sample, in up to as many sweeps as steps.
    """
    if x.ndim < 2 or len(x) != 1:
        raise UndiffuseError(f"parallel sampling is for one sample, [1, ...]; got {list(x.shape)} (batch the others)")
    if not tolerance >= 0:
        raise UndiffuseError(f"tolerance must be at least 0, got {tolerance}")
    steps = len(levels) - 1
    window = steps if window is None else window
    if steps < 1 or not window >= 1:
        raise UndiffuseError(f"parallel sampling needs at least 1 step and a window of 1, got {steps} and {window}")
    frozen = [_freeze(solver, x, here, there, noise) for here, there in pairwise(levels)]
    # Before anything is known, and beyond the window, the guess is the last x known, brought to the level's deviation.
    xs = [x * (_size(level) / _size(levels[0])) for level in levels]
    done = sweeps = calls = 0
    worst = 0.0
    while done < steps:
        end = min(done + window, steps)
        ends, asked = _steps_at_once(denoise, solver, xs[done:end], levels[done : end + 1], frozen[done:end], window)
        sweeps, calls = sweeps + 1, calls + asked
        value, settled, settling, news = ends[0], done + 1, True, []
        for i in range(done, end):
            if i > done:
                value = value + (ends[i - done] - xs[i])
            change = float((value - xs[i + 1]).double().square().mean().sqrt()) / _size(levels[i + 1])
            if not change < float("inf"):
                raise UndiffuseError("parallel sampling diverged: take a smaller window")
            settling = settling and (i == done or change <= tolerance)  # the first step is exact: its x had settled
            if settling and i > done:
                settled, worst = i + 1, max(worst, change)
            news.append(value)
        xs[done + 1 : end + 1] = news
        xs[end + 1 :] = [xs[end] * (_size(level) / _size(levels[end])) for level in levels[end + 1 :]]
        done = settled
    return Parallel(xs[-1], sweeps, calls, calls * window, worst)


def _steps_at_once(
    denoise: Denoise,
    solver: Solver,
    xs: Sequence[Tensor],
    levels: Sequence[Level],
    frozen: Sequence[Sequence[Tensor]],
    window: int,
) -> tuple[list[Tensor], int]:
    """Every step from its own x: ``(ends, calls)``. The questions of all steps are asked together, in rounds."""
    running = {i: solver.step(x, levels[i], levels[i + 1], None, _replay(frozen[i])) for i, x in enumerate(xs)}
    ends: dict[int, Tensor] = {}
    answers: dict[int, Estimate] = {}
    calls = 0
    while running:
        questions: dict[int, tuple[Tensor, Level]] = {}
        for i, step in list(running.items()):
            try:
                questions[i] = step.send(answers[i]) if i in answers else next(step)
            except StopIteration as stop:
                ends[i], _ = stop.value
                del running[i]
        if questions:
            answers = _ask(denoise, questions, window)
            calls += 1
    return [ends[i] for i in range(len(xs))], calls


def _ask(denoise: Denoise, questions: dict[int, tuple[Tensor, Level]], window: int) -> dict[int, Estimate]:
    """One call for all questions, filled up to ``window`` rows with copies of the last."""
    asked = list(questions.values())
    asked += [asked[-1]] * (window - len(asked))
    each = [level.rows(1) for _, level in asked]
    t, alpha, sigma = (torch.cat(values) for values in zip(*((a.t, a.alpha, a.sigma) for a in each), strict=True))
    e = denoise(torch.cat([x for x, _ in asked]), Level(t, alpha, sigma, each[0].path))
    variance = [None] * window if e.variance is None else e.variance.split(1)
    rows = [Estimate(*row) for row in zip(e.x0.split(1), e.eps.split(1), variance, strict=True)]
    return dict(zip(questions, rows, strict=False))


def _freeze(solver: Solver, x: Tensor, here: Level, there: Level, noise: Noise) -> list[Tensor]:
    """What one step draws, drawn now with a denoiser that costs nothing."""
    drawn: list[Tensor] = []

    def record(x: Tensor, here: Level, there: Level) -> Tensor:
        drawn.append(noise(x, here, there))
        return drawn[-1]

    def free(x: Tensor, level: Level) -> Estimate:
        return Estimate(torch.zeros_like(x), x / float(level.sigma), torch.full_like(x, 0.5))

    _, memory, _ = answer(solver.step(x, here, there, None, record), free)
    if memory is not None:
        raise UndiffuseError(
            f"{type(solver).__name__} leans on past steps, which are not there yet when all are made at once: take a "
            "one-step solver (euler, heun, ddpm)"
        )
    return drawn


def _replay(drawn: Sequence[Tensor]) -> Noise:
    """The same noise again, each time the step is made."""
    left = iter(drawn)
    return lambda x, here, there: next(left)


def _size(level: Level) -> float:
    """The deviation that data of unit variance has at a level."""
    return float(torch.hypot(level.alpha, level.sigma))
