"""Reuse: what lies deep in a network changes little from one call to the next, so a sampler may keep it.

DeepCache (Ma et al. 2023, arXiv:2312.00858). In every k-th call of a trajectory the whole network computes, and what
its deep part has said is kept; in the calls between, only the shallow part around it computes:

    whole     h = first(x)    d = deep(h)     y = last(h, d)
    between   h = first(x)    d as it was     y = last(h, d)

Where the deep part adds to what goes through it, ``d`` is what it has added. It belongs to one trajectory and one half
of guidance: whoever samples holds a :class:`Memory`, and the network nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, final

from torch import Tensor

from .errors import UndiffuseError


class Deep(Protocol):
    """How a network goes through its deep part: ``deep(compute, beside) -> Tensor``.

    ``compute()`` is what comes out of it, ``[B, ...]``. ``beside``, of the same shape, is what went in, where the deep
    part adds to that; None where its answer is laid beside something else.
    """

    def __call__(self, compute: Callable[[], Tensor], beside: Tensor | None = None) -> Tensor: ...


def afresh(compute: Callable[[], Tensor], beside: Tensor | None = None) -> Tensor:
    """Compute it: what every call does unless it is told otherwise."""
    return compute()


@final
class Kept:
    """A :class:`Deep` for one call. Without ``features`` it computes, exactly as :func:`afresh`, and has them
    afterwards; with them (``[B, ...]``) nothing deep is computed."""

    def __init__(self, features: Tensor | None = None) -> None:
        self.features = features

    def __call__(self, compute: Callable[[], Tensor], beside: Tensor | None = None) -> Tensor:
        if self.features is not None:
            return self.features if beside is None else beside + self.features
        answer = compute()
        self.features = answer if beside is None else answer - beside
        return answer

    def rows(self) -> Sequence[Tensor]:
        """Views of the features of each row; none before they are there."""
        return () if self.features is None else self.features.unbind()


Halves = tuple[bool, bool]
"""Whether a call asks for the conditional half of guidance, and for the unconditional one."""


@final
class Memory:
    """What one trajectory keeps of its last whole call, for each half of guidance.

    A call between reuses it unless a half is asked for that the last whole call did not have, as where a guidance
    interval begins; then it is a whole call, and counting begins anew. So what is reused is never older than
    ``every - 1`` calls, and all of one age.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._age = 0  # calls since the last whole one, that one included
        self._kept: dict[int, Sequence[Tensor]] = {}  # by the number of the half, of each row

    def serves(self, halves: Halves) -> bool:
        """Whether a call for these halves need not be a whole one."""
        return self._age < self.every and all(half in self._kept for half in _taken(halves))

    def recall(self, halves: Halves) -> list[Tensor]:
        """What is kept of each row of these halves, the conditional first."""
        return [row for half in _taken(halves) for row in self._kept[half]]

    def note(self, halves: Halves, rows: Sequence[Tensor] | None) -> None:
        """After a call: what is to be kept of each row of a whole one, the conditional half first; None of one that has
        reused."""
        if rows is None:
            self._age += 1
            return
        taken = _taken(halves)
        count = len(rows) // len(taken)
        self._kept = {half: rows[i * count : (i + 1) * count] for i, half in enumerate(taken)}
        self._age = 1


def _taken(halves: Halves) -> list[int]:
    return [half for half, taken in enumerate(halves) if taken]


def check_reuse(reuse: int) -> None:
    """Raise unless it is a whole number of at least 1."""
    if isinstance(reuse, bool) or not isinstance(reuse, int) or reuse < 1:
        raise UndiffuseError(f"reuse={reuse!r} must be a whole number of calls of at least 1; 1 reuses nothing")
