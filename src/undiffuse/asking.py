"""What a network is asked while somebody samples: settings, one guided question, and many questions in one call.

A trajectory asks :class:`Question` after :class:`Question`; each is up to two rows of a network call for every sample,
one under the condition and one under what guidance leads away from. Whoever runs several trajectories answers them
together (:func:`answer_together`), and each gets what it would have got alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Literal

from torch import Tensor, nn

from .denoiser import Denoise, Denoiser
from .errors import UndiffuseError
from .grids import Grid, Uniform
from .guidance import Scale, cfg, interval, remember, rescale, scale_at, threshold
from .levels import Estimate, Level
from .networks import Network
from .prompts import PromptReading
from .reuse import Halves, Memory, check_reuse
from .solvers import DPMpp2M, Solver


@dataclass(frozen=True)
class Sampling:
    """How to sample: the defaults travel with the model, and each can be changed by name.

    Attributes:
        solver, grid, steps: which path, at which levels, in how many steps.
        guidance_scale: 1 is the conditional model, 0 the unconditional one.
        guidance_interval: guide only where ``low < sigma/alpha <= high``; None: everywhere.
        guidance_rescale: 0 to 1 (Lin et al. 2023).
        threshold: keep the x0 estimate inside the data's declared range: ``none``, ``static`` or ``dynamic``;
            refused for data without a range (trap S16).
        noise: ``independent`` numbers at every step, or increments of one ``brownian`` path a sample, with which more
            steps converge to the same sample (for stochastic solvers; about ten times the cost of the draw).
        weighted_prompts: brackets in prompts weigh words, ``(word:1.3)`` (:func:`.prompts.weighted`); otherwise they
            are brackets.
        long_prompts: ``cut`` where the text encoder's window ends, with a warning, or read in several ``windows``.
        clip_skip: how many of CLIP's last layers no text goes through, negative ones and the empty one included.
        reuse: in every so many calls of a trajectory the whole network computes, and between them its deep part is
            what it was (:mod:`undiffuse.reuse`); 1: nothing is reused. Faster, and another sample.
    """

    solver: Solver = field(default_factory=DPMpp2M)
    grid: Grid = field(default_factory=Uniform)
    steps: int = 20
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0
    threshold: Literal["none", "static", "dynamic"] = "none"
    noise: Literal["independent", "brownian"] = "independent"
    weighted_prompts: bool = False
    long_prompts: Literal["cut", "windows"] = "cut"
    clip_skip: int = 0
    reuse: int = 1

    def __post_init__(self) -> None:
        check_reuse(self.reuse)

    @property
    def reading(self) -> PromptReading:
        """How prompts are read; raises for what is no way of reading."""
        return PromptReading(self.weighted_prompts, self.long_prompts, self.clip_skip)

    def memory(self) -> Memory | None:
        """What one trajectory with these settings remembers, from its first call on."""
        return Memory(self.reuse) if self.reuse > 1 else None

    def check_reuse(self, name: str, network: nn.Module) -> None:
        """Raise for ``reuse`` with a network (called ``name``) or a solver that it cannot be used with."""
        if self.reuse == 1:
            return
        if not (isinstance(network, Network) and network.has_deep_part):
            raise UndiffuseError(
                f"reuse={self.reuse} asked of network {name}, which has no deep part that can be reused (unet, mp_unet "
                "and dit of some depth have, and ddpm_unet; networks of diffusers are not taken apart): leave reuse=1"
            )
        if self.solver.adaptive:
            raise UndiffuseError(
                f"reuse={self.reuse} with {type(self.solver).__name__}, whose steps follow an error that reuse would "
                "be a part of: leave reuse=1, or take a solver of fixed steps"
            )

    @property
    def scale(self) -> Scale:
        """The guidance scale at each level."""
        return (
            self.guidance_scale
            if self.guidance_interval is None
            else interval(self.guidance_scale, *self.guidance_interval)
        )

    def halves(self, level: Level) -> Halves:
        """Whether an estimate at ``level`` takes the conditional answer of the network, and the unconditional one."""
        scale = scale_at(self.scale, level)
        return bool((scale != 0).any()) or self.guidance_rescale > 0, bool((scale != 1).any())


def guided(cond: Denoise, uncond: Denoise, sampling: Sampling) -> Denoise:
    """``cond`` with the guidance and the threshold that ``sampling`` asks for; data in [-1, 1]."""
    cond = remember(cond)
    denoise = cfg(cond, uncond, sampling.scale)
    denoise = rescale(denoise, cond, sampling.guidance_rescale) if sampling.guidance_scale != 1 else denoise
    if sampling.threshold == "none":
        return denoise
    return threshold(denoise, -1.0, 1.0, 0.995 if sampling.threshold == "dynamic" else None)


@dataclass(frozen=True, eq=False)
class Question:
    """What somebody who samples wants to know: the guided estimate at ``x`` (``[B, ...]``) and ``level``.

    Attributes:
        cond: the condition, raw values ``[B]`` by name.
        against: what guidance leads away from; the null condition, or a negative one.
        sampling: guidance and threshold; the rest plays no part.
        memory: of the trajectory that asks; None: the whole network must compute.
    """

    x: Tensor
    level: Level
    cond: Mapping[str, Tensor]
    against: Mapping[str, Tensor]
    sampling: Sampling
    memory: Memory | None = None

    @cached_property
    def halves(self) -> Halves:
        """What it takes of guidance."""
        return self.sampling.halves(self.level)

    @property
    def reuses(self) -> bool:
        """Whether the network's deep part need not compute for it."""
        return self.memory is not None and self.memory.serves(self.halves)

    @cached_property
    def asked(self) -> list[tuple[Tensor, Level, Mapping[str, Tensor]]]:
        """What the network must be asked for it, B rows each: two where guidance takes two, the conditional first."""
        halves = zip((self.cond, self.against), self.halves, strict=True)
        return [(self.x, self.level, cond) for cond, taken in halves if taken]

    @property
    def rows(self) -> int:
        """Rows of a network call that it takes."""
        return len(self.x) * len(self.asked)

    def answer(self, estimates: Sequence[Estimate]) -> Estimate:
        """The guided estimate from those of :meth:`asked`."""
        first, last = estimates[0], estimates[-1]
        return guided(lambda x, level: first, lambda x, level: last, self.sampling)(self.x, self.level)


def answer_together(denoiser: Denoiser, questions: Sequence[Question], rows: int | None = None) -> list[Estimate]:
    """The answers to several questions, each with guidance of its own, by one network call; rows that cannot be asked
    together, and those that reuse what lies deep in the network, have one of their own. ``rows``: see
    :meth:`.Denoiser.together`."""
    deep: dict[int, Tensor] = {}  # by the number of the row
    ends = [*accumulate(question.rows for question in questions)]
    remembering = [(q, q.memory, range(end - q.rows, end)) for q, end in zip(questions, ends, strict=True) if q.memory]
    for question, memory, numbers in remembering:
        if question.reuses:
            deep.update(zip(numbers, memory.recall(question.halves), strict=True))
    asked = [half for question in questions for half in question.asked]
    estimates = iter(denoiser.together(asked, rows, deep if remembering else None))
    for question, memory, numbers in remembering:  # only now that nothing has failed: who failed asks again
        if question.reuses:
            memory.note(question.halves, None)
        else:  # copies where others are in the call, as a view of one row keeps all of them
            memory.note(question.halves, [deep[i].clone() if len(questions) > 1 else deep[i] for i in numbers])
    return [question.answer([next(estimates) for _ in question.asked]) for question in questions]
