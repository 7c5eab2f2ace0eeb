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
from ..editing import spare_streams
from ..errors import UndiffuseError
from ..inversion import invert
from ..levels import Level, combine
from ..noise import Streams, slerp
from ..pipeline import Pipeline, Start, finished
from ..sampling import Frame, start, walk
from ..solvers import Euler, Noise, Step

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
class Trace:
    """A trajectory as the page shows it; F frames, noise first.

    Attributes:
        levels: F of them.
        x: ``[F, B, *shape]``, what the denoiser sees; :func:`seen` makes data of it.
        x0, eps: the estimate *at* that x; at clean data x itself, and the noise last believed in.
        calls: estimates that the solver asked for.
        drawn: how often the solver drew noise on the way to each frame.
    """

    levels: Sequence[Level]
    x: Tensor
    x0: Tensor
    eps: Tensor
    calls: int
    drawn: Sequence[int]


def begin(pipeline: Pipeline, ask: Ask, image: Tensor | None = None, strength: float = 1.0) -> Start:
    """The walk that ``ask`` describes, from noise or from an ``image``: see :meth:`.Pipeline.begin`."""
    return pipeline.begin(
        ask.numbers,
        seed=ask.seed,
        cond=ask.cond,
        against=ask.against,
        sampling=ask.sampling,
        image=image,
        strength=strength,
    )


@dataclass
class Counted:
    """Noise, and how often it was drawn."""

    noise: Noise
    times: int = 0

    def __call__(self, x: Tensor, here: Level, there: Level) -> Tensor:
        self.times += 1
        return self.noise(x, here, there)


def run(pipeline: Pipeline, walks: Sequence[Start], check: Check = lambda: None) -> list[Trace]:
    """All walks to their ends; each round of questions is answered by as few network calls as ``ROWS`` allows."""
    frames: list[list[tuple[Frame, int]]] = [[] for _ in walks]

    def steps_of(begun: Start, seen: list[tuple[Frame, int]]) -> Step:
        noise = Counted(begun.noise)

        def watch(frame: Frame) -> None:
            seen.append((frame, noise.times))

        return walk(begun.x, begun.levels, begun.sampling.solver, noise, watch)

    steps = [steps_of(each, seen) for each, seen in zip(walks, frames, strict=True)]
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


def _trace(seen: list[tuple[Frame, int]], kept: tuple[Tensor, Tensor] | None) -> Trace:
    """A frame's estimate is that of the step that led *to* it; the page shows what is believed *at* it. What is
    ``kept`` is in the last one as it was."""
    frames, drawn = [frame for frame, _ in seen], [times for _, times in seen]
    last = frames[-1]
    if kept is not None:
        last = replace(last, x=torch.where(kept[1], kept[0], last.x))
        frames = [*frames[:-1], last]
    finished(last.x)
    said = [frame.estimate for frame in frames[1:] if frame.estimate is not None]
    x = torch.stack([frame.x for frame in frames]).cpu()
    x0 = torch.stack([*(each.x0 for each in said), last.x]).cpu()
    eps = torch.stack([*(each.eps for each in said), said[-1].eps]).cpu()
    return Trace([frame.level for frame in frames], x, x0, eps, last.calls, drawn)


def seen(pipeline: Pipeline, x: Tensor) -> Tensor:
    """``[F, B, *spec.shape]`` on the CPU: data of what the denoiser sees, ``[F, B, *shape]``."""
    if pipeline.codec is None:
        return x.cpu()
    return pipeline.decode(x.flatten(0, 1).to(pipeline.device)).unflatten(0, x.shape[:2]).cpu()


def branch(pipeline: Pipeline, base: Trace, index: int, ask: Ask, fresh: bool, check: Check = lambda: None) -> Trace:
    """Go on from frame ``index`` of ``base`` as ``ask`` says.

    With ``fresh`` noise x first becomes ``alpha x0_hat + sigma eps'``: what is believed there is kept and the noise is
    drawn anew from ``ask.seed``; otherwise a solver that draws noise goes on where it was in its stream, so that no
    number is drawn twice. The solver begins without a memory of steps before.
    """
    if not 0 <= index < len(base.levels) - 1:
        raise UndiffuseError(f"a branch begins at frame 0 to {len(base.levels) - 2}, not {index}")
    level, x = base.levels[index], base.x[index]
    begun = begin(pipeline, ask)
    if fresh:
        x = level.mix(base.x0[index], Streams(ask.seed, ask.numbers).draw(pipeline.shape, x))  # the stream's first
    else:
        for _ in range(base.drawn[index]):
            begun.noise.draw(pipeline.shape)
    return run(pipeline, [replace(begun, x=x.to(pipeline.device), levels=[*base.levels[index:]])], check)[0]


def inverted(pipeline: Pipeline, ask: Ask, x: Tensor, check: Check = lambda: None) -> tuple[Start, int]:
    """``x`` (``[B, *shape]``, clean, as the denoiser sees it) carried up to noise by Euler's method, unguided, and the
    walk back down; and the calls that it took."""
    sampling = replace(ask.sampling, solver=Euler(), guidance_scale=1.0, guidance_interval=None)
    plain = replace(ask, sampling=sampling, against=None)
    down = begin(pipeline, plain)

    def denoise(x: Tensor, level: Level):
        check()
        return pipeline.denoiser(x, level, **down.cond)

    found = invert(denoise, x.to(pipeline.device), down.levels, Euler(), exact=False)
    return replace(down, x=found.x), found.calls


# --- the guidance lab -------------------------------------------------------------------------------------------------


def strip(pipeline: Pipeline, ask: Ask, scales: Sequence[float], check: Check = lambda: None) -> Tensor:
    """``[S, B, *spec.shape]``: the same noises under each guidance scale."""
    asks = [replace(ask, sampling=replace(ask.sampling, guidance_scale=scale)) for scale in scales]
    # At scale 1 nothing is led away from.
    walks = [
        begin(pipeline, replace(each, against=None) if each.sampling.guidance_scale == 1 else each) for each in asks
    ]
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
    eps = spare_streams(seed, len(x)).draw(pipeline.shape, x)  # and not the very noise that they were made of
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
    begun = begin(pipeline, ask)
    x = start(begun.levels[0], torch.cat(noises)).to(pipeline.device)
    # What a solver draws on the way is the same everywhere: neighbours differ by where they begin, and by nothing else.
    noise = pipeline.begin([0] * len(x), seed=ask.seed, sampling=ask.sampling).noise
    return seen(pipeline, run(pipeline, [replace(begun, x=x, noise=noise)], check)[0].x[-1:])[0]


def velocity(level: Level, x0: Tensor, eps: Tensor) -> Tensor:
    """``dx/dt`` at a level of a flow, towards noise: ``x0 dalpha/dt + eps dsigma/dt``."""
    t = float(level.t)
    low, high = level.path(max(0.0, t - 1e-4)), level.path(min(1.0, t + 1e-4))
    span = float(high.t - low.t)
    return combine((float(high.alpha - low.alpha) / span, x0), (float(high.sigma - low.sigma) / span, eps))
