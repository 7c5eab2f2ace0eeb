"""What a solver is: it *asks*, it is not given the model.

``step(x, here, there, memory, noise)`` is a generator. It yields ``(x, level)`` wherever it wants an estimate, is
sent an :class:`Estimate` back, and returns ``(x at there, memory)``. Because a step only asks, the same step serves
one sample on a laptop and many requests at once in the server, and a step tested alone is the step that runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import Any, ClassVar, Protocol

from torch import Tensor

from ..levels import Estimate, Level

Step = Generator[tuple[Tensor, Level], Estimate, tuple[Tensor, Any]]
"""Yields ``(x, level)``, is sent an estimate, returns ``(x, memory)``."""


class Noise(Protocol):
    """``noise(x, here, there)``: standard normal numbers shaped like x for the way from ``here`` to ``there``, one
    stream a sample."""

    def __call__(self, x: Tensor, here: Level, there: Level) -> Tensor: ...


class Solver(ABC):
    """Abstract: subclasses are frozen dataclasses with a ``step``.

    Attributes:
        order: how the error falls with the step size h on smooth problems, error ~ h^order; measured by the tests.
            Of a stochastic solver, the error of the distribution.
        stochastic: whether it draws noise.
        calls: estimates asked for in one step (the last step may ask for fewer).
        extra: estimates that the first steps ask for on top of that, all together.
        adaptive: it divides a step as its tolerance demands, so ``calls`` is the least.
        distilled: it wants a model whose x0 is a sample, not a mean (consistency models); with an ordinary denoiser it
            does not converge, and ``order`` is 0.
    """

    order: int = 1
    stochastic: bool = False
    calls: int = 1
    extra: int = 0
    adaptive: ClassVar[bool] = False
    distilled: ClassVar[bool] = False

    @abstractmethod
    def step(self, x: Tensor, here: Level, there: Level, memory: Any, noise: Noise) -> Step:
        """One step from ``here`` to ``there``; ``memory`` is what the previous step returned, None at the start.

        Levels may be ``[]`` or ``[B]``. A step to sigma = 0 returns the denoised estimate exactly (traps S12, S13).
        """
