"""What the labs compute.

Everything is walks side by side: several samplers, each with its own start, levels, solver, guidance and classes, of
which every round of questions is one network call (:func:`undiffuse.pipeline.answer_together`). A trajectory is one
walk, a strip of guidance scales is one walk a scale, A|B is two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..errors import UndiffuseError
from ..inversion import invert
from ..levels import Level, combine
from ..noise import Streams, slerp
from ..pipeline import Pipeline, Question, Sampling, answer_together, finished
from ..sampling import Frame, start, walk
from ..solvers import Euler, Step

ROWS = 256
"""The most rows of one network call."""

Check = Callable[[], None]
"""Called between network calls; raises when nobody waits for the result any more."""


@dataclass(frozen=True)
class Ask:
    """What is asked of a model.

    Attributes:
        sampling: solver, grid, steps and guidance.
        numbers: of the samples; sample i is a function of ``(seed, i)``.
        classes: of the samples, in turn; None: every class in turn; a class of None: of no class in particular.
        against: the class that guidance leads away from; None: no class in particular.
    """

    sampling: Sampling
    numbers: Sequence[int] = (0,)
    seed: int = 0
    classes: Sequence[int | None] | None = None
    against: int | None = None


@dataclass(frozen=True, eq=False)
class Walk:
    """One sampler of several: where it begins, and all that it needs but the network."""

    x: Tensor
    levels: Sequence[Level]
    sampling: Sampling
    noise: Streams
    cond: Mapping[str, Tensor]
    against: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Trace:
    """A trajectory as the page shows it; F frames, noise first.

    Attributes:
        levels: F of them.
        x: ``[F, B, *shape]``.
        x0, eps: the estimate *at* that x; at clean data x itself, and the noise last believed in.
        calls: estimates that the solver asked for.
    """

    levels: Sequence[Level]
    x: Tensor
    x0: Tensor
    eps: Tensor
    calls: int


def begin(pipeline: Pipeline, ask: Ask, x: Tensor | None = None, levels: Sequence[Level] | None = None) -> Walk:
    """The walk that ``ask`` describes: from noise at the grid's first level, or from ``x`` along ``levels``."""
    sampling = ask.sampling
    cond = pipeline.conditions(ask.numbers, ask.classes)
    against = pipeline.denoiser.null(len(ask.numbers))
    if ask.against is not None:
        against = pipeline.conditions(ask.numbers, [ask.against])
    pipeline.check(cond, sampling)
    noise = Streams(ask.seed, ask.numbers)
    path = sampling.grid.levels(pipeline.config.schedule, sampling.steps) if levels is None else levels
    if x is None:
        x = start(path[0], noise.draw(pipeline.spec.shape, torch.empty(0, device=pipeline.device)))
    return Walk(x, path, sampling, noise, cond, against)


def run(pipeline: Pipeline, walks: Sequence[Walk], check: Check = lambda: None) -> list[Trace]:
    """All walks to their ends; each round of questions is answered by as few network calls as ``ROWS`` allows."""
    frames: list[list[Frame]] = [[] for _ in walks]
    steps: list[Step] = [
        walk(each.x, each.levels, each.sampling.solver, each.noise, seen.append)
        for each, seen in zip(walks, frames, strict=True)
    ]
    asked: dict[int, Question] = {}

    def go_on(i: int, estimate: object) -> None:
        try:
            x, level = steps[i].send(estimate)  # pyrefly: ignore  (the first is None)
            asked[i] = Question(x, level, walks[i].cond, walks[i].against, walks[i].sampling)
        except StopIteration:
            asked.pop(i, None)

    for i in range(len(walks)):
        go_on(i, None)
    while asked:
        check()
        batch: list[int] = []
        rows = 0
        for i in sorted(asked):
            rows += 2 * len(asked[i].x)
            if batch and rows > ROWS:
                break
            batch.append(i)
        with torch.no_grad():
            estimates = answer_together(pipeline.denoiser, [asked[i] for i in batch])
        for i, estimate in zip(batch, estimates, strict=True):
            go_on(i, estimate)
    return [_trace(each) for each in frames]


def _trace(frames: Sequence[Frame]) -> Trace:
    """A frame's estimate is that of the step that led *to* it; the page shows what is believed *at* it."""
    last = frames[-1]
    finished(last.x)
    said = [frame.estimate for frame in frames[1:] if frame.estimate is not None]
    x = torch.stack([frame.x for frame in frames]).cpu()
    x0 = torch.stack([*(each.x0 for each in said), last.x]).cpu()
    eps = torch.stack([*(each.eps for each in said), said[-1].eps]).cpu()
    return Trace([frame.level for frame in frames], x, x0, eps, last.calls)


def branch(pipeline: Pipeline, base: Trace, index: int, ask: Ask, fresh: bool, check: Check = lambda: None) -> Trace:
    """Go on from frame ``index`` of ``base`` as ``ask`` says.

    With ``fresh`` noise x first becomes ``alpha x0_hat + sigma eps'``: what is believed there is kept and the noise is
    drawn anew from ``ask.seed``. The solver begins without a memory of steps before.
    """
    if not 0 <= index < len(base.levels) - 1:
        raise UndiffuseError(f"a branch begins at frame 0 to {len(base.levels) - 2}, not {index}")
    level, x = base.levels[index], base.x[index]
    if fresh:
        x = level.mix(base.x0[index], Streams(ask.seed, ask.numbers).draw(pipeline.spec.shape, x))
    return run(pipeline, [begin(pipeline, ask, x.to(pipeline.device), base.levels[index:])], check)[0]


def inverted(pipeline: Pipeline, ask: Ask, x: Tensor, check: Check = lambda: None) -> tuple[Walk, int]:
    """``x`` (``[B, *shape]``, clean) carried up to noise by Euler's method, unguided, and the walk back down; and the
    calls that it took."""
    sampling = replace(ask.sampling, solver=Euler(), guidance_scale=1.0, guidance_interval=None)
    plain = replace(ask, sampling=sampling, against=None)
    down = begin(pipeline, plain, x.to(pipeline.device))

    def denoise(x: Tensor, level: Level):
        check()
        return pipeline.denoiser(x, level, **down.cond)

    found = invert(denoise, down.x, down.levels, Euler(), exact=False)
    return replace(down, x=found.x), found.calls


# --- the guidance lab -------------------------------------------------------------------------------------------------


def strip(pipeline: Pipeline, ask: Ask, scales: Sequence[float], check: Check = lambda: None) -> Tensor:
    """``[S, B, *shape]``: the same noises under each guidance scale."""
    walks = [begin(pipeline, replace(ask, sampling=replace(ask.sampling, guidance_scale=scale))) for scale in scales]
    return torch.stack([trace.x[-1] for trace in run(pipeline, walks, check)])


def variety(x: Tensor, labels: Sequence[int | None]) -> float | None:
    """How unlike the samples ``[B, ...]`` of one class are: the root mean square of the difference of two, over all
    pairs; None without a pair."""
    flat = x.flatten(1)
    pairs = [(i, j) for i in range(len(x)) for j in range(i) if labels[i] == labels[j]]
    if not pairs:
        return None
    left, right = (flat[list(side)] for side in zip(*pairs, strict=True))
    return float((left - right).square().mean().sqrt())


@torch.no_grad()
def recognised(
    pipeline: Pipeline, x: Tensor, labels: Sequence[int | None], seed: int = 0, check: Check = lambda: None
) -> float | None:
    """The share of samples that the model itself takes for the class that was asked: for each class the error of its
    x0 estimate at three levels with the same noise; the least wins (Li et al. 2023, arXiv:2303.16203). None where no
    class was asked."""
    places = [i for i, label in enumerate(labels) if label is not None]
    count = len(pipeline.spec.classes)
    if not places or "classes" not in pipeline.denoiser.null(1):
        return None
    x = x[places].to(pipeline.device)
    errors = torch.zeros(len(x), count)
    eps = Streams(seed, len(x)).draw(pipeline.spec.shape, x)
    for t in (0.3, 0.5, 0.7):
        level = pipeline.config.schedule(t)
        noisy = level.mix(x, eps)
        for label in range(count):
            check()
            cond = pipeline.conditions(range(len(x)), [label])
            estimate = pipeline.denoiser(noisy, level, **cond)
            errors[:, label] += (estimate.x0 - x).square().flatten(1).mean(1).cpu()
    wanted = torch.tensor([labels[i] for i in places])
    return float((errors.argmin(1) == wanted).float().mean())


# --- the latent walk --------------------------------------------------------------------------------------------------


def between(
    pipeline: Pipeline,
    ask: Ask,
    corners: Sequence[int],
    columns: int,
    rows: int,
    down: Literal["noise", "classes"],
    check: Check = lambda: None,
) -> Tensor:
    """``[rows * columns, *shape]``: noises on the great circles between those of four seeds, made into data.

    Across it goes from ``corners[0]`` to ``corners[1]``; down to the circle from ``corners[2]`` to ``corners[3]``, or
    through the classes with the noise of a column unchanged.
    """
    shape = pipeline.spec.shape
    a, b, c, d = (Streams(seed, 1).draw(shape) for seed in corners)
    across = [i / max(1, columns - 1) for i in range(columns)]
    top = [slerp(a, b, u) for u in across]
    chosen: list[int | None]
    if down == "noise":
        bottom = [slerp(c, d, u) for u in across]
        heights = [i / max(1, rows - 1) for i in range(rows)]
        noises = [slerp(t, s, v) for v in heights for t, s in zip(top, bottom, strict=True)]
        chosen = [(ask.classes or [None])[0]] * len(noises)
    else:
        labels = range(len(pipeline.spec.classes))[:rows]
        noises = [each for _ in labels for each in top]
        chosen = [label for label in labels for _ in across]
    has_classes = "classes" in pipeline.denoiser.null(1)
    ask = replace(ask, numbers=range(len(noises)), classes=chosen if has_classes else None)
    levels = ask.sampling.grid.levels(pipeline.config.schedule, ask.sampling.steps)
    x = start(levels[0], torch.cat(noises)).to(pipeline.device)
    return run(pipeline, [begin(pipeline, ask, x, levels)], check)[0].x[-1]


def velocity(level: Level, x0: Tensor, eps: Tensor) -> Tensor:
    """``dx/dt`` at a level of a flow, towards noise: ``x0 dalpha/dt + eps dsigma/dt``."""
    t = float(level.t)
    low, high = level.path(max(0.0, t - 1e-4)), level.path(min(1.0, t + 1e-4))
    span = float(high.t - low.t)
    return combine((float(high.alpha - low.alpha) / span, x0), (float(high.sigma - low.sigma) / span, eps))
