"""What the labs compute.

Everything is walks side by side: several samplers, each with its own start, levels, solver, guidance and classes, of
which every round of questions is one network call (:func:`undiffuse.asking.answer_together`). A trajectory is one
walk, a strip of guidance scales is one walk a scale, A|B is two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..asking import Question, Sampling, answer_together
from ..conditions import LISTS, Rows
from ..errors import UndiffuseError
from ..inversion import invert
from ..levels import Level, combine
from ..noise import Streams, slerp
from ..pipeline import Pipeline, finished
from ..reuse import Memory
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
        cond: what is asked for, by the condition's name; see :meth:`.Pipeline.conditions`.
        against: what guidance leads away from; what is not named is left open.
    """

    sampling: Sampling
    numbers: Sequence[int] = (0,)
    seed: int = 0
    cond: Rows | None = None
    against: Rows | None = None


@dataclass(frozen=True, eq=False)
class Walk:
    """One sampler of several: where it begins, and all that it needs but the network."""

    x: Tensor
    levels: Sequence[Level]
    sampling: Sampling
    noise: Streams
    cond: Mapping[str, Tensor]
    against: Mapping[str, Tensor]
    memory: Memory | None
    kept: tuple[Tensor, Tensor] | None
    """See :meth:`.Pipeline.known`."""


@dataclass(frozen=True, eq=False)
class Trace:
    """A trajectory as the page shows it; F frames, noise first.

    Attributes:
        levels: F of them.
        x: ``[F, B, *shape]``, what the denoiser sees; :func:`seen` makes data of it.
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
    cond = pipeline.conditions(ask.numbers, None, cond=ask.cond, reading=sampling.reading)
    against = pipeline.against(len(ask.numbers), cond=ask.against, reading=sampling.reading)
    pipeline.check(cond, sampling)
    noise = Streams(ask.seed, ask.numbers)
    path = sampling.grid.levels(pipeline.config.schedule, sampling.steps) if levels is None else levels
    if x is None:
        x = start(path[0], noise.draw(pipeline.shape, torch.empty(0, device=pipeline.device)))
    return Walk(x, path, sampling, noise, cond, against, sampling.memory(), pipeline.known(cond))


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
            asked[i] = Question(x, level, walks[i].cond, walks[i].against, walks[i].sampling, walks[i].memory)
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
            estimates = answer_together(pipeline.asked, [asked[i] for i in batch])
        for i, estimate in zip(batch, estimates, strict=True):
            go_on(i, estimate)
    return [_trace(seen, each.kept) for seen, each in zip(frames, walks, strict=True)]


def _trace(frames: list[Frame], kept: tuple[Tensor, Tensor] | None) -> Trace:
    """A frame's estimate is that of the step that led *to* it; the page shows what is believed *at* it. What is
    ``kept`` is in the last one as it was."""
    last = frames[-1]
    if kept is not None:
        last = replace(last, x=torch.where(kept[1], kept[0], last.x))
        frames = [*frames[:-1], last]
    finished(last.x)
    said = [frame.estimate for frame in frames[1:] if frame.estimate is not None]
    x = torch.stack([frame.x for frame in frames]).cpu()
    x0 = torch.stack([*(each.x0 for each in said), last.x]).cpu()
    eps = torch.stack([*(each.eps for each in said), said[-1].eps]).cpu()
    return Trace([frame.level for frame in frames], x, x0, eps, last.calls)


def seen(pipeline: Pipeline, x: Tensor) -> Tensor:
    """``[F, B, *spec.shape]`` on the CPU: data of what the denoiser sees, ``[F, B, *shape]``."""
    if pipeline.codec is None:
        return x.cpu()
    return pipeline.decode(x.flatten(0, 1).to(pipeline.device)).unflatten(0, x.shape[:2]).cpu()


def branch(pipeline: Pipeline, base: Trace, index: int, ask: Ask, fresh: bool, check: Check = lambda: None) -> Trace:
    """Go on from frame ``index`` of ``base`` as ``ask`` says.

    With ``fresh`` noise x first becomes ``alpha x0_hat + sigma eps'``: what is believed there is kept and the noise is
    drawn anew from ``ask.seed``. The solver begins without a memory of steps before.
    """
    if not 0 <= index < len(base.levels) - 1:
        raise UndiffuseError(f"a branch begins at frame 0 to {len(base.levels) - 2}, not {index}")
    level, x = base.levels[index], base.x[index]
    if fresh:
        x = level.mix(base.x0[index], Streams(ask.seed, ask.numbers).draw(pipeline.shape, x))
    return run(pipeline, [begin(pipeline, ask, x.to(pipeline.device), base.levels[index:])], check)[0]


def inverted(pipeline: Pipeline, ask: Ask, x: Tensor, check: Check = lambda: None) -> tuple[Walk, int]:
    """``x`` (``[B, *shape]``, clean, as the denoiser sees it) carried up to noise by Euler's method, unguided, and the
    walk back down; and the calls that it took."""
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
    """``[S, B, *spec.shape]``: the same noises under each guidance scale."""
    walks = [begin(pipeline, replace(ask, sampling=replace(ask.sampling, guidance_scale=scale))) for scale in scales]
    return seen(pipeline, torch.stack([trace.x[-1] for trace in run(pipeline, walks, check)]))


def groups(cond: Mapping[str, Tensor], samples: int) -> list[bytes]:
    """What is asked of each sample; those of whom the same is asked are equal."""
    return [b"".join(rows[i].cpu().numpy().tobytes() for rows in cond.values()) for i in range(samples)]


def variety(x: Tensor, labels: Sequence[object]) -> float | None:
    """How unlike the samples ``[B, ...]`` are of which the same is asked (equal ``labels``): the root mean square of
    the difference of two, over all pairs; None without a pair."""
    flat = x.flatten(1)
    pairs = [(i, j) for i in range(len(x)) for j in range(i) if labels[i] == labels[j]]
    if not pairs:
        return None
    left, right = (flat[list(side)] for side in zip(*pairs, strict=True))
    return float((left - right).square().mean().sqrt())


@torch.no_grad()
def recognised(
    pipeline: Pipeline, x: Tensor, cond: Mapping[str, Tensor], seed: int = 0, check: Check = lambda: None
) -> float | None:
    """The share of samples ``[B, *spec.shape]`` that the model itself takes for what was asked: for each rival the
    error of its x0 estimate at three levels with the same noise; the least wins (Li et al. 2023, arXiv:2303.16203). The
    rivals of a class are the other classes; of anything else, nothing in particular. None where nothing was asked."""
    null = pipeline.against(len(x))
    if "classes" in cond and bool((cond["classes"] != null["classes"]).any()):
        rivals = [{**cond, "classes": torch.full_like(cond["classes"], k)} for k in range(int(null["classes"][0]))]
        asked, wanted = cond["classes"] != null["classes"], cond["classes"]
    else:
        rivals, wanted = [cond, null], torch.zeros(len(x), dtype=torch.int64)
        asked = torch.tensor(
            [one != none for one, none in zip(groups(cond, len(x)), groups(null, len(x)), strict=True)]
        )
    if not bool(asked.any()):
        return None
    x = pipeline.encode(x.to(pipeline.device))
    errors = torch.zeros(len(x), len(rivals))
    eps = Streams(seed, len(x)).draw(pipeline.shape, x)
    for t in (0.3, 0.5, 0.7):
        level = pipeline.config.schedule(t)
        noisy = level.mix(x, eps)
        for k, rival in enumerate(rivals):
            check()
            errors[:, k] += (pipeline.denoiser(noisy, level, **rival).x0 - x).square().flatten(1).mean(1).cpu()
    return float((errors.argmin(1) == wanted.cpu())[asked.cpu()].float().mean())


# --- the latent walk --------------------------------------------------------------------------------------------------


def between(
    pipeline: Pipeline,
    ask: Ask,
    corners: Sequence[int],
    columns: int,
    rows: int,
    down: tuple[str, Sequence[Any]] | None,
    check: Check = lambda: None,
) -> Tensor:
    """``[rows * columns, *spec.shape]``: noises on the great circles between those of four seeds, made into data.

    Across it goes from ``corners[0]`` to ``corners[1]``; down to the circle from ``corners[2]`` to ``corners[3]``, or
    with the noise of a column unchanged through some values of a condition, ``down = (name, values)``.
    """
    a, b, c, d = (Streams(seed, 1).draw(pipeline.shape) for seed in corners)
    across = [i / max(1, columns - 1) for i in range(columns)]
    top = [slerp(a, b, u) for u in across]
    said = (ask.cond or {}).items()
    cond: dict[str, Any] = {name: given[:1] if isinstance(given, LISTS) else given for name, given in said}
    if "classes" in pipeline.denoiser.null(1):
        cond.setdefault("classes", [None])  # and not all in turn
    if down is None:
        bottom = [slerp(c, d, u) for u in across]
        heights = [i / max(1, rows - 1) for i in range(rows)]
        noises = [slerp(t, s, v) for v in heights for t, s in zip(top, bottom, strict=True)]
    else:
        name, values = down
        noises = [each for _ in values for each in top]
        cond[name] = [value for value in values for _ in across]
    ask = replace(ask, numbers=range(len(noises)), cond=cond)
    levels = ask.sampling.grid.levels(pipeline.config.schedule, ask.sampling.steps)
    x = start(levels[0], torch.cat(noises)).to(pipeline.device)
    return seen(pipeline, run(pipeline, [begin(pipeline, ask, x, levels)], check)[0].x[-1:])[0]


def velocity(level: Level, x0: Tensor, eps: Tensor) -> Tensor:
    """``dx/dt`` at a level of a flow, towards noise: ``x0 dalpha/dt + eps dsigma/dt``."""
    t = float(level.t)
    low, high = level.path(max(0.0, t - 1e-4)), level.path(min(1.0, t + 1e-4))
    span = float(high.t - low.t)
    return combine((float(high.alpha - low.alpha) / span, x0), (float(high.sigma - low.sigma) / span, eps))
