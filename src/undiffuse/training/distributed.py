"""One run on several processes: the first leads, the others follow.

The leader alone has a run folder, and runs as a process alone would. What its trainer is about to do it announces, and
the others do the same with theirs; in the same breath it hears of their signals, and they of the plan. So whatever else
the leader does between two updates (previews, reports, checkpoints) needs no word about processes. A leader that was
started alone may take on others, and dismiss them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, final

from ..crew import Crew
from ..distributed import ALONE, Team
from ..errors import UndiffuseError, UndiffuseWarning
from .recipe import Plan
from .trainer import Diverged, Trainer

ORDERS = ("end", "build", "restore", "update", "snapshot", "weights", "pipeline")
"""The end, the making of the trainer, and the methods of a trainer in which all take part."""


Make = Callable[[Team, dict[str, str] | None], Trainer]


@final
class Leader:
    """The first process's side: says what its trainer does next, before it does it.

    Args:
        make: the trainer of a team, with ``auto`` settled as told (None: as the leader says).
        crew: others that it may take on.

    Attributes:
        caught: signals that arrived here; those that arrived elsewhere are added.
        outcome: JSON that the others are told at the end.
    """

    def __init__(self, team: Team, make: Make, crew: Crew | None = None) -> None:
        self.team = team
        self.make = make
        self.crew = crew if team.size == 1 else None
        self._ending = ExitStack()
        if team.size > 1:
            self._ending.callback(self.end)
        self.trainer: Trainer | None = None
        self.caught: list[int] = []
        self.outcome: dict[str, Any] = {}
        self._busy = False

    def build(self, chosen: dict[str, str]) -> Trainer:
        """The trainer, on all processes, as ``chosen``, which the others are told."""
        self.trainer = None
        with self.announce("build"):
            self.trainer = self.make(self.team, chosen)
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

    def take_on(self, size: int) -> bool:
        """Become the first of so many processes; where they cannot be started, a warning says why."""
        if self.crew is None or self.team.size > 1:
            return False
        try:
            self.team = self._ending.enter_context(self.crew.team(size))
        except (UndiffuseError, OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            warnings.warn(
                f"{size} processes could not be started ({reason}): this one goes on alone",
                UndiffuseWarning,
                stacklevel=2,
            )
            return False
        self._ending.callback(self.end)
        return True

    def dismiss(self) -> None:
        """Go on alone, without those that were taken on."""
        self.trainer = None
        self._ending.close()
        self.team, self._busy = ALONE, False

    def __enter__(self) -> Leader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: Any) -> bool | None:
        """The end of the team."""
        return self._ending.__exit__(kind, error, where)


def follow(team: Team, make: Make, caught: Sequence[int]) -> dict[str, Any]:
    """The other processes' side: do what the leader does until it ends; returns its outcome."""
    trainer: Trainer | None = None
    while True:
        order, _, images, start = team.most([0, *caught[:1], *[0] * (not caught), -1, 0])
        if ORDERS[order] == "end":
            return team.tell()
        if trainer is None or ORDERS[order] == "build":
            trainer = None  # before there is another one
            trainer = make(team, None)
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
