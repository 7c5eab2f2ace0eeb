"""One run on several processes: the first leads, the others follow.

The leader alone has a run folder, and runs as a process alone would. What its trainer is about to do it announces, and
the others do the same with theirs; in the same breath it hears of their signals, and they of the plan. So whatever else
the leader does between two updates (previews, reports, checkpoints) needs no word about processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, final

from ..distributed import Team
from .recipe import Plan
from .trainer import Diverged, Trainer

ORDERS = ("end", "build", "restore", "update", "snapshot", "weights", "pipeline")
"""The end, the making of the trainer, and the methods of a trainer in which all take part."""


@final
class Leader:
    """The first process's side: says what its trainer does next, before it does it.

    Attributes:
        caught: signals that arrived here; those that arrived elsewhere are added.
        outcome: JSON that the others are told at the end.
    """

    def __init__(self, team: Team, make: Callable[[dict[str, str] | None], Trainer]) -> None:
        self.team = team
        self.make = make
        self.trainer: Trainer | None = None
        self.caught: list[int] = []
        self.outcome: dict[str, Any] = {}
        self._busy = False

    def build(self, chosen: dict[str, str]) -> Trainer:
        """The trainer, on all processes, as ``chosen``, which the others are told."""
        with self.announce("build"):
            self.trainer = self.make(chosen)
        self.trainer.announce = self.announce
        return self.trainer

    @contextmanager
    def announce(self, order: str) -> Iterator[None]:
        """What happens inside, happens on all processes."""
        trainer = self.trainer
        if self.team.size == 1 or (order in ("snapshot", "weights", "pipeline") and not (trainer and trainer.divided)):
            yield
            return
        plan = trainer.plan if trainer else Plan(None)
        numbers = [ORDERS.index(order), *self.caught[:1]] + [0] * (not self.caught)
        _, signal, _, _ = self.team.most([*numbers, -1 if plan.images is None else plan.images, plan.start])
        if signal and not self.caught:
            self.caught.append(signal)
        self._busy = True
        try:
            yield
        except Diverged:  # on all of them
            self._busy = False
            raise
        self._busy = False

    def end(self) -> None:
        """Dismiss the others, unless they are in the middle of something: then they notice when this process ends."""
        if self.team.size > 1 and not self._busy:
            self.team.most([ORDERS.index("end"), 0, 0, 0])
            self.team.tell(self.outcome)


def follow(team: Team, build: Callable[[dict[str, str] | None], Trainer], caught: Sequence[int]) -> dict[str, Any]:
    """The other processes' side: do what the leader does until it ends; returns its outcome."""
    trainer: Trainer | None = None
    while True:
        order, _, images, start = team.most([0, *caught[:1], *[0] * (not caught), -1, 0])
        if ORDERS[order] == "end":
            return team.tell()
        if trainer is None:
            trainer = build(None)
            continue
        trainer.plan = Plan(None if images < 0 else images, start)
        if ORDERS[order] == "restore":
            trainer.restore(None, "")
        elif ORDERS[order] == "snapshot":
            trainer.snapshot()
        elif ORDERS[order] == "weights":
            trainer.weights()
        elif ORDERS[order] == "pipeline":
            trainer.pipeline()
        else:
            with suppress(Diverged):  # the leader says so, and ends the run
                trainer.update()
