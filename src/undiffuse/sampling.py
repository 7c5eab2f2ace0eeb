"""Chapter 8, third part. Sampling: the one loop.

    x at t = 1  --step-->  ...  --step-->  x at t = 0

Everything that samples, from a preview in training to the server, runs :func:`walk`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .denoiser import Denoise
from .errors import UndiffuseError
from .grids import FlowPower, Grid, Uniform
from .levels import Estimate, Level
from .noise import Streams
from .schedules import Schedule
from .solvers import IPNDM, Noise, Solver, Step, UniPC


def start(level: Level, noise: Tensor) -> Tensor:
    """The sample to start from at ``level``: unit noise scaled to the deviation that data of unit variance has there,
    ``sqrt(alpha^2 + sigma^2)`` (trap S4)."""
    return noise * float(torch.hypot(level.alpha, level.sigma))


@dataclass(frozen=True, eq=False)
class Frame:
    """One moment of a trajectory.

    Attributes:
        x: the sample at ``level``, ``[B, ...]``.
        level: where it is.
        index: 0 for the start, then the number of steps taken.
        estimate: what the denoiser said first in the step that led here; None at the start.
        calls: denoiser calls so far (trap S21).
    """

    x: Tensor
    level: Level
    index: int
    estimate: Estimate | None
    calls: int


Watch = Callable[[Frame], object]
"""What is shown each frame as soon as there is one."""


def answer(step: Step, denoise: Denoise) -> tuple[Tensor, Any, list[Estimate]]:
    """Run one step to its end: ``(x, memory, the estimates it asked for)``."""
    estimates: list[Estimate] = []
    try:
        question = next(step)
        while True:
            estimates.append(denoise(*question))
            question = step.send(estimates[-1])
    except StopIteration as stop:
        x, memory = stop.value
        return x, memory, estimates


def walk(x: Tensor, levels: Sequence[Level], solver: Solver, noise: Noise, watch: Watch) -> Step:
    """The one loop, as a coroutine: yields ``(x, level)`` where it wants an :class:`Estimate` and returns ``(the last
    x, the solver's memory)``. Whoever answers decides how: one network call for one sampler (:func:`trajectory`), or
    one for many (the server's engine). ``watch`` is given each :class:`Frame`, the start included.
    """
    if solver.stochastic and any(bool((b.t > a.t).any()) for a, b in pairwise(levels)):
        raise UndiffuseError(f"{type(solver).__name__} draws noise, so it cannot go from data up to noise")
    memory, calls = None, 0
    watch(Frame(x, levels[0], 0, None, 0))
    for index, (here, there) in enumerate(pairwise(levels), start=1):
        step, first, reply = solver.step(x, here, there, memory, noise), None, None
        while True:
            try:
                with torch.no_grad():
                    question = step.send(reply)  # pyrefly: ignore  (the first is None)
            except StopIteration as stop:
                x, memory = stop.value
                break
            reply = yield question
            first = first or reply
            calls += 1
        watch(Frame(x, there, index, first, calls))
    return x, memory


def trajectory(denoise: Denoise, x: Tensor, levels: Sequence[Level], solver: Solver, noise: Noise) -> Iterator[Frame]:
    """The frames from ``x`` at ``levels[0]`` to the sample at ``levels[-1]``: ``len(levels)`` of them, the start
    included.

    Stop iterating to cancel. No gradients are recorded. Levels may also rise, from data to noise (inversion), for
    solvers that draw no noise.
    """
    frames: deque[Frame] = deque()
    steps = walk(x, levels, solver, noise, frames.append)
    reply: Estimate | None = None
    while True:
        try:
            question = steps.send(reply)  # pyrefly: ignore  (the first is None)
        except StopIteration:
            yield from frames
            return
        while frames:
            yield frames.popleft()
        with torch.no_grad():
            reply = denoise(*question)


# From so many calls on: the solver, and rho, scale and least of its flow-power grid.
_DEFAULTS: tuple[tuple[int, Solver, FlowPower], ...] = (
    (1, IPNDM(3), FlowPower(4.0, 6.0, 0.03)),
    (7, IPNDM(3), FlowPower(4.0, 10.0, 0.004)),
    (13, IPNDM(3), FlowPower(2.5, 5.0, 0.004)),
    (18, IPNDM(3), FlowPower(2.0, 4.0, 0.004)),
    (35, UniPC(4), FlowPower(4.0, 6.0, 0.002)),
)


def default_sampling(calls: int) -> tuple[Solver, Grid]:
    """The solver and grid to take when nothing is known of the model but how many calls it may have: what was found
    best on random mixtures while it is good on a Gaussian in 3072 dimensions (``benchmarks/solvers.py`` checks it on
    mixtures that were not used). One call a step, so ``calls`` is the number of steps."""
    if isinstance(calls, bool) or not isinstance(calls, int) or calls < 1:
        raise UndiffuseError(f"calls must be a whole number of at least 1, got {calls!r}")
    return next((solver, grid) for least, solver, grid in reversed(_DEFAULTS) if calls >= least)


def sample(
    denoise: Denoise,
    schedule: Schedule,
    shape: Sequence[int],
    samples: int | Sequence[int],
    *,
    steps: int,
    solver: Solver,
    grid: Grid = Uniform(),
    seed: int = 0,
    like: Tensor | None = None,
) -> Tensor:
    """``[B, *shape]`` samples: noise at the first level of the grid, then the trajectory to its end.

    ``samples`` is how many, or their numbers; sample i is a function of ``(seed, i)``. ``like`` gives the device and
    type of the result; on the way there it is float32 or better.
    """
    noise = Streams(seed, samples)
    levels = grid.levels(schedule, steps)
    x = start(levels[0], noise.draw(shape))
    if like is None:
        like = x
    x = x.to(like.device, torch.promote_types(like.dtype, x.dtype))
    return deque(trajectory(denoise, x, levels, solver, noise), maxlen=1).pop().x.to(like.dtype)
