"""A run folder: one training run from its first update to its last, through any number of interruptions.

    config.json  command.txt  env.json      what was asked for, and where it ran
    log.txt  metrics.jsonl  status.json     what happened; the metrics are those of a run that was never stopped
    held_out.jsonl  report.html             loss on what is not trained on; all of it as one page
    samples/  checkpoints/  model/  best/   previews from fixed noise; the state; the averaged weights as a pipeline,
                                            and those with the lowest held-out loss
    best_quality/                           those with the best samples, where that is measured
    nan/                                    what is known of an update that was not finite (forensics)

Calling :func:`run_training` again with the same arguments continues it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import socket
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import numpy
import safetensors
import torch

from .. import __version__
from ..config import from_json, to_json, write_bytes_atomic, write_json_atomic
from ..crew import Crew, called, is_called
from ..data import Dataset
from ..distributed import Team, joined
from ..errors import Deserted, UndiffuseError, UndiffuseWarning
from ..pipeline import REGISTRIES
from . import checkpoint, forensics, memory, speed
from .convergence import Forecast, constant_from, cool_down, forecast
from .distributed import Leader, follow
from .doctor import glance
from .engine import check_divisible
from .held_out import Curve, Probe, divide, probe
from .muon import TITLES
from .recipe import Optimiser, Plan, Recipe, stored_recipe
from .report import REFRESH, Report
from .tasks import Judge, Product
from .track import TensorBoard
from .trainer import Diverged, Snapshot, Trainer, Update

STATUS = 2.0
"""Seconds between two writings of status.json."""

MOST_FAILURES = 3
"""Checkpoints in a row that may fail to be written before the run stops."""

FREE = (
    *(f"recipe.training.{name}" for name in ("log_every", "preview_every", "checkpoint_every", "milestone_every")),
    *("recipe.training.keep", "recipe.training.previews", "recipe.training.shard", "recipe.sampling"),
    "recipe.training.quality",
)
"""Settings that decide nothing of what is trained: they may be other ones when a run is continued."""

CHANGEABLE = (
    *(f"recipe.optimiser.{each.name}" for each in fields(Optimiser) if each.name != "kind"),  # its state is another one
    *("recipe.ema", "recipe.objective"),
    *("recipe.training.images", "recipe.training.accumulation", "recipe.training.precision", "minutes"),
    "recipe.training.compile",
    *("recipe.training.until_converged", "recipe.training.evaluate_every"),
    *("recipe.training.nonfinite", "recipe.training.skip"),
)
"""Settings that may be other ones from here on, if asked for (``change``)."""


class SaveFailed(UndiffuseError):
    """Checkpoints could not be written; the older ones are untouched."""

    exit_code = 74  # EX_IOERR


@dataclass(frozen=True)
class Progress:
    """Where a run is. ``loss`` is the mean in the last line of the metrics; ``total_images`` is None while a run with a
    time budget measures its speed."""

    step: int
    images: int
    total_images: int | None
    loss: float | None
    images_per_second: float
    seconds_left: float | None


@dataclass(frozen=True)
class Result:
    """A finished run."""

    path: Path
    state: str
    step: int
    images: int
    seconds: float  # of training, over all its parts
    loss: float | None  # mean over the last lines of metrics
    model: Path
    resumed_from: int  # 0: begun anew


def run_training(
    dataset: Dataset,
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    device: str = "auto",
    minutes: float | None = None,
    change: bool = False,
    workers: int | None = None,
    data: str | None = None,
    command: str = "",
    probes: Sequence[Probe] = (),
    tensorboard: bool = False,
    crew: Crew | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Result:
    """Train by ``recipe`` into the folder ``out``, or continue the run that is there.

    Args:
        seed: of everything that is drawn.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        minutes: how long it may take; the speed of the first tenth decides the number of images, so that the learning
            rate still ends where the recipe says. None: the recipe's number of images.
        change: go on with the run that is there although its length, optimiser, objective or average were others: from
            its last checkpoint on they are these, and the learning rate is that of a run planned with the new length.
        workers: threads that read coming batches, None for what suits the data and the device; changes only the speed.
        data: what the user called the data, for the records.
        command: the command line, for the records.
        probes: quality metrics, measured with the held-out loss.
        tensorboard: also write the curves and previews for TensorBoard, into ``tensorboard/``.
        crew: how other processes that make this same call are started. As many as it says; if it leaves that open, as
            many as the run had when it was stopped, or what a trial says is faster (:func:`.speed.choose_team`).
        say: called with each line for people; progress: called after each update.

    Raises:
        UndiffuseError: a folder that belongs to another run, or that another process trains into; a loss that is not
            finite.
        SaveFailed: three checkpoints in a row, or the last one, that could not be written.
        KeyboardInterrupt, SystemExit(143): SIGINT, SIGTERM, after the update has been finished and saved. A second
            signal ends the process at once.
    """
    out = Path(out)
    if minutes is not None and not minutes > 0:
        raise UndiffuseError(f"minutes={minutes} must be positive")
    if out.exists() and not out.is_dir():
        raise UndiffuseError(f"{out}: a file; --out names a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file() and not (out / ".lock").is_file():
        raise UndiffuseError(f"{out}: has files of something else; choose another --out")
    if recipe.training.until_converged and minutes is not None:
        raise UndiffuseError("a run until convergence has no time budget: give it --images or --steps as the longest")
    with joined(device) as (team, device):
        with team.agree():  # all that can be refused is refused before anything is written
            recipe.check(dataset.spec)
            check_divisible(recipe.training.batch_size, recipe.training.accumulation, team)
            speaks = team.first and not is_called()
            if crew is not None and crew.size is not None:
                check_crew(crew.size, recipe, team, device)
            tracker = TensorBoard(out / "tensorboard") if tensorboard and speaks else None
            train, held_out = divide(dataset, recipe.training)
            if recipe.training.until_converged and held_out is None:
                raise UndiffuseError(
                    f"{dataset.name}: convergence is judged on held-out items, and there are none: it needs 100 items, "
                    "training.held_out of 10 or more and training.evaluate_every"
                )
            if recipe.training.quality_every and held_out is None:
                raise UndiffuseError(
                    f"{dataset.name}: training.quality_every needs 100 items, training.held_out of 10 or more and "
                    "training.evaluate_every: quality is measured with the held-out loss"
                )
            if recipe.training.quality_every and speaks:
                from ..evaluation.quality import quality_probe  # which is built on this package

                probes = (*probes, quality_probe(dataset.original, recipe.training, device))

        def make(team: Team, chosen: dict[str, str] | None) -> Trainer:
            plan = Plan(None) if minutes is not None or recipe.training.until_converged else None
            settled = speed.settle(recipe, team.tell(chosen))
            return Trainer(train, settled, seed=seed, device=device, plan=plan, team=team, workers=workers)

        if not speaks:
            with called() if is_called() else nullcontext(team) as team, _signals() as caught:
                return _dismissed(follow(team, make, caught))
        with Leader(team, make, crew) as leader:
            try:
                out.mkdir(parents=True, exist_ok=True)
                with checkpoint.Lock(out):
                    run = _Run(
                        dataset,
                        held_out,
                        recipe,
                        out,
                        seed,
                        leader,
                        device,
                        minutes,
                        change,
                        data or dataset.name,
                        say,
                        progress,
                    )
                    run.probes, run.tracker = probes, tracker
                    result = run.train(command)
                leader.outcome = to_json(result)
                return result
            except (KeyboardInterrupt, SystemExit):
                leader.outcome = {"signal": leader.caught[0] if leader.caught else int(signal.SIGINT)}
                raise
            finally:
                if tracker is not None:
                    tracker.close()


def check_crew(size: int, recipe: Recipe, team: Team, device: str) -> None:
    """Refuse a number of processes that this one cannot lead."""
    if team.size not in (1, size):
        raise UndiffuseError(f"--processes {size}: torchrun has started {team.size}, which decides it; leave it out")
    if size > 1 and team.size == 1 and device != "cpu":
        raise UndiffuseError(
            f"--processes {size} is for CPUs; start one for each GPU: torchrun --nproc-per-node {size}"
        )
    check_divisible(recipe.training.batch_size, recipe.training.accumulation, Team(0, size))


def _dismissed(outcome: dict[str, Any]) -> Result:
    """What a process that followed returns or raises: what the leader did."""
    if "signal" in outcome:
        raise _stopped(outcome["signal"])
    if not outcome:
        raise Deserted("the first process has failed")
    return from_json(Result, outcome)


def _stopped(number: int) -> BaseException:
    """How a signal ends the process, after it has been obeyed."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


class _Run:
    """The state of :func:`run_training`."""

    def __init__(
        self,
        dataset: Dataset,
        held_out: Dataset | None,
        recipe: Recipe,
        out: Path,
        seed: int,
        leader: Leader,
        device: str,
        minutes: float | None,
        change: bool,
        data: str,
        say: Callable[[str], None],
        progress: Callable[[Progress], None],
    ) -> None:
        self.out = out
        self.minutes = minutes
        self.data = data
        self.progress = progress
        self.checkpoints = out / "checkpoints"
        found = checkpoint.newest(self.checkpoints)
        if found is None and checkpoint.listed(self.checkpoints):
            raise UndiffuseError(
                f"{self.checkpoints}: none of the checkpoints is whole; restore one, or remove the folder to begin anew"
            )
        self.ways = ""  # why it is computed as it is
        begun = time.monotonic()
        if found is None:
            items = divide(dataset, recipe.training)[0]
            if leader.crew is not None and leader.crew.size is not None:
                leader.take_on(leader.crew.size)
            recipe, said = speed.choose(items, recipe, seed=seed, device=device, team=leader.team, minutes=minutes)
            more = speed.choose_team(leader, items, recipe, seed=seed, device=device, minutes=minutes)
            self.ways = "; ".join(filter(None, (said, more)))
        else:
            recipe = speed.as_before(recipe, found.state)
        tried = time.monotonic() - begun
        self.recipe = recipe
        self.identity: dict[str, Any] = {
            "recipe": to_json(recipe, REGISTRIES),
            "seed": seed,
            "minutes": minutes,
            "dataset": {"fingerprint": dataset.fingerprint, "items": len(dataset), "spec": dataset.spec.to_json()},
            "held_out": None if held_out is None else {"fingerprint": held_out.fingerprint, "items": len(held_out)},
        }
        if dataset.codec is not None:
            self.identity["dataset"] |= {"original": dataset.original.fingerprint}
        changes = []
        if found is not None:
            changes = self._changes(found, change)
            leader.take_on(speed.team_before(leader, found.state))
        self.leader = leader
        self.trainer = leader.build(speed.settled(recipe))
        self.machine = {
            "torch": torch.__version__,
            "device": self.trainer.device.type,
            "threads": torch.get_num_threads(),
            "processes": self.trainer.team.size,
        }
        self.seconds_before = 0.0
        self.last_loss: float | None = None
        self.changed: list[str] = []  # what was changed, and after which update
        self.held_out = None if held_out is None else self.trainer.task.judge(held_out, self.trainer.device)
        self.curve = Curve()
        self.whole = dataset
        self.probes: Sequence[Probe] = ()
        self.tracker: TensorBoard | None = None
        if found is not None:
            self.trainer.restore(found.snapshot(), str(found.path))
            self._recall(found)
            if any(change.startswith(("recipe.training.images", "minutes")) for change in changes):
                self._replan()
            if any(change.startswith("recipe.objective") for change in changes):
                self.curve = Curve()  # losses of another objective cannot be compared
            self.changed += [f"{change}, after update {self.trainer.step:,}" for change in changes]
        self.resumed_from = self.saved = self.trainer.step
        self.last_good = found.path if found else None
        self.writer = ThreadPoolExecutor(1, "undiffuse-save")
        self.writing: tuple[int, Future[None]] | None = None  # the checkpoint in flight, and its update
        self.failures = 0  # in a row
        self.speed = 0.0
        self.pace = _Pace(self.trainer.step)
        self.planning: tuple[int, float] | None = None  # from which update, and when, the time budget is measured
        self.stated, self.reported = 0.0, time.monotonic() - 0.9 * REFRESH  # the first page soon
        self.log = _Lines(out / "log.txt")
        self.metrics = _Lines(out / "metrics.jsonl")
        self.evaluations = _Lines(out / "held_out.jsonl")
        self.report = Report(out, recipe)
        self.tell = say
        self.begun = time.monotonic() - tried

    def say(self, line: str) -> None:
        """A line for people, also kept in log.txt."""
        self.log.append(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {line}")
        self.tell(line)

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.begun

    # --- from the first update to the last ----------------------------------------------------------------------------

    def train(self, command: str) -> Result:
        trainer, training = self.trainer, self.recipe.training
        if trainer.finished:
            self._export_if_older()
            self._status("finished")
            self._report("finished")
            self.say(
                f"{self.out}: finished already, after {trainer.images:,} images; choose another --out to train anew"
            )
            return self._result()
        self._describe(command)
        for line in header(trainer, self.out, self.data, self._held_out_line()):
            self.say(line)
        if self.ways:
            self.say(textwrap.fill(f"speed      {self.ways}", 80, subsequent_indent=" " * 11))
        if self.resumed_from:
            self.say(f"resumed    after update {trainer.step:,}, {trainer.images:,} images")
            for change in self.changed:
                self.say(textwrap.fill(f"changed    {change}", 80, subsequent_indent=" " * 11))
        else:
            for finding in glance(self.trainer.dataset, self.recipe, minutes=self.minutes, out=self.out):
                line = f"{finding.light:<10} {finding.check}: {finding.measured}; {finding.remedy}"
                self.say(textwrap.fill(line, 80, subsequent_indent=" " * 11, break_on_hyphens=False))
        self.metrics.truncate(lambda line: json.loads(line)["step"] <= trainer.step)
        if self.held_out is not None:
            self.evaluations.rewrite([json.dumps(row, allow_nan=False) for row in self.curve.to_json()["rows"]])
        self._status("running")
        if self.tracker is not None:
            self.tracker.begin(trainer.step)
        self.pace = _Pace(trainer.step)
        with self.writer, _signals() as caught:
            self.leader.caught = caught  # signals that reach other processes arrive there too
            try:
                for update in trainer.updates():
                    if update.skipped:
                        self.say(f"warning: update {update.step} was not finite and is skipped: {self._examine()}")
                    if self.minutes is not None and trainer.plan.images is None:
                        self._plan(update)
                    if update.step % training.log_every == 0 or trainer.finished:
                        self._log(update)
                    with self.pace.aside():
                        self._beside(update.step, trainer.finished)
                    self.progress(self._where())
                    if caught:
                        break
                self._settle(wait=True)
                if self.saved < trainer.step:
                    self._save()
                    self._settle(wait=True, must=True)
                if caught and not trainer.finished:
                    self._status("stopped")
                    self._report("stopped")
                    self.say(f"stopped    after update {trainer.step:,}, saved; resume with the same command")
                    raise _stopped(caught[0])
            except Diverged as error:
                self._close()
                message = f"{self.out}: {error}; likely cause: {self._examine()}; {self._last_good()}"
                self.log.append(f"failed: {message}")
                self._report("failed", message)
                raise Diverged(message) from None
            except Exception as error:
                self._close()
                message = str(error)
                if out_of_memory := memory.is_out_of_memory(error):
                    remedy = memory.smaller_batch(training.batch_size, training.accumulation)
                    message = f"{self.out}: out of memory after update {trainer.step}; {remedy}; {self._last_good()}"
                    self.log.append(f"failed: {message}")
                self._report("failed", message)
                if not out_of_memory:
                    raise
                raise UndiffuseError(message) from None
        self._status("finished")
        self._report("finished")
        return self._result()

    def _last_good(self) -> str:
        return f"the last good checkpoint is {self.last_good}" if self.last_good else "there is no checkpoint yet"

    def _examine(self) -> str:
        """Write ``nan/`` about the update that was not finite, and return its likely cause."""
        trainer = self.trainer
        if trainer.divided:
            return "not looked for, since no process has all the weights"
        # The last update was skipped, or one since the last check was bad; else a weight is, which the next will show.
        step = trainer.diverged_at or (trainer.step if trainer.skipped_in_row else trainer.step + 1)
        cause = "unknown"
        with _tolerant(f"{self.out / forensics.FOLDER} is not complete"):
            cause = forensics.keep(trainer, step, self.out, self.last_good).cause
        return cause

    def _result(self) -> Result:
        trainer = self.trainer
        return Result(
            path=self.out,
            state="finished",
            step=trainer.step,
            images=trainer.images,
            seconds=self.seconds,
            loss=self.last_loss,
            model=self.out / "model",
            resumed_from=self.resumed_from,
        )

    def _beside(self, step: int, last: bool) -> None:
        """What is done beside training after update ``step``, as far as it is due."""
        trainer, training = self.trainer, self.recipe.training

        def due(*every: int) -> bool:
            return any(each and step % each == 0 for each in every)

        if self.held_out is not None and (last or due(training.evaluate_every, training.quality_every)):
            trainer.check()
            self._evaluate(self.held_out, last)
        if training.until_converged and trainer.plan.images is None:
            self._cool_down()
        if last or due(training.preview_every):
            trainer.check()
            self._preview()
        self._settle()
        if due(training.checkpoint_every, training.milestone_every) and not last:
            self._save()
        now = time.monotonic()
        if now - self.stated > STATUS:
            self._status("running")
        if now - self.reported > REFRESH and not last:
            self._report("running")

    def _plan(self, update: Update) -> None:
        """Once a tenth of the time budget (at most 30 s) has been measured, decide how many images the run will see."""
        assert self.minutes is not None
        float(update.loss)  # waits for the device, so that the clock is right
        if self.planning is None or update.step <= self.resumed_from + 2:  # the first updates are slower than the rest
            self.planning = update.step, time.monotonic()
            return
        updates, seconds = update.step - self.planning[0], time.monotonic() - self.planning[1]
        budget, batch = 60 * self.minutes, self.recipe.training.batch_size
        if seconds < min(0.1 * budget, 30):
            return
        left = max(0.0, budget - self.seconds) * 0.97  # previews and checkpoints take time too
        more = max(1, int(left * updates / seconds))
        total = self.trainer.images + more * batch
        self.trainer.plan = Plan(total, self.trainer.images)
        self.say(
            f"planned    {total:,} images for {self.minutes:g} minutes at {updates * batch / seconds:,.0f} a second"
        )

    # --- what is written ----------------------------------------------------------------------------------------------

    def _describe(self, command: str) -> None:
        config = {"data": self.data, **self.identity, "undiffuse": __version__}
        write_json_atomic(self.out / "config.json", config)
        write_bytes_atomic(self.out / "command.txt", (command + "\n").encode())
        environment = {
            "undiffuse": __version__,
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "safetensors": safetensors.__version__,
            "platform": platform.platform(),
            "device": str(self.trainer.device),
            "threads": torch.get_num_threads(),
            "processes": self.trainer.team.size,
            "host": socket.gethostname(),
        }
        write_json_atomic(self.out / "env.json", environment)

    def _status(self, state: str) -> None:
        status = {
            "state": state,
            "step": self.trainer.step,
            "images": self.trainer.images,
            "total_images": self.trainer.plan.images,
            "loss": _finite(self.last_loss),
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        self.stated = time.monotonic()
        with _tolerant(f"{self.out / 'status.json'} could not be written"):
            write_json_atomic(self.out / "status.json", status)

    def _log(self, update: Update) -> None:
        """A line of metrics."""
        self.trainer.check()
        self.last_loss = self.trainer.mean_loss()
        self.speed = self.pace.lap(update.step) * self.recipe.training.batch_size
        row = {
            "step": update.step,
            "images": update.images,
            "seconds": round(self.seconds, 3),
            "loss": _finite(self.last_loss),
            "lr": update.lr,
            "grad_norm": _finite(float(update.norm)),
            "images_per_second": round(self.speed, 1),
        }
        self.metrics.append(json.dumps(row, allow_nan=False))
        if self.tracker is not None:
            self.tracker.scalars(self.trainer.step, {f"training/{k}": v for k, v in row.items() if k != "step"})

    def _held_out_line(self) -> str:
        if self.held_out is None:
            return "nothing: all items are trained on, so there is no held-out loss and no best/"
        return self.held_out.describe(self.whole)

    def _evaluate(self, held_out: Judge, last: bool) -> None:
        """One point of the held-out curve; the averaged weights as ``best/`` and ``best_quality/`` if they are."""
        row, losses = held_out.evaluate(self.trainer, self.curve)
        probes = [each for each in self.probes if not each.every or row.step % each.every == 0 or last]
        if probes:
            row = replace(row, probes=probe(probes, self.trainer.pipeline()))
        if self.curve.add(row, losses):
            with _tolerant(f"{self.out / 'best'} could not be written"):
                self.trainer.pipeline({"held_out_loss": row.ema}).save(self.out / "best")
        for each in probes:
            if each.best and self.curve.improved(each):
                with _tolerant(f"{self.out / 'best_quality'} could not be written"):
                    self.trainer.pipeline({each.name: row.probes[each.name]}).save(self.out / "best_quality")
        self.evaluations.append(json.dumps(asdict(row), allow_nan=False))
        if self.tracker is not None:
            self.tracker.evaluation(row)

    def _forecast(self) -> Forecast | None:
        begin = constant_from(self.recipe, self.trainer.plan)
        return None if begin is None else forecast(self.curve.rows, begin)

    def _cool_down(self) -> None:
        """Once a run until convergence has converged, or must end, plan its end."""
        trainer, estimate = self.trainer, self._forecast()
        plan = cool_down(self.recipe, trainer.images, estimate)
        if plan is None or plan.images is None:
            return
        trainer.plan = plan
        why = "the longest run allowed is near" if estimate is None or not estimate.converged else str(estimate)
        line = f"cool-down  {why}; the learning rate falls to 0 over {plan.images - plan.start:,} images"
        self.say(textwrap.fill(line, 80, subsequent_indent=" " * 11, break_on_hyphens=False))

    def _report(self, state: str, error: str = "") -> None:
        with _tolerant(f"{self.out / 'report.html'} could not be written"):
            self.report.write(state, self._where(), self.curve, self._forecast(), self.held_out, self.probes, error)
        self.reported = time.monotonic()

    def _preview(self) -> None:
        """What people look at while it learns."""
        folder = self.out / "samples"
        with _tolerant(f"no preview at update {self.trainer.step}"):
            folder.mkdir(exist_ok=True)
            path = self.trainer.task.preview(self.trainer, self.whole, folder, str(self.out))
            if path is not None and self.tracker is not None and path.suffix == ".png":
                self.tracker.picture(self.trainer.step, path)

    def _save(self) -> None:
        """Begin to write a checkpoint, and the averaged weights as ``model/``: copied now, written by a thread while
        training goes on. One at a time: on a disk that is slower than ``checkpoint_every`` the next save waits."""
        self._settle(wait=True)
        trainer = self.trainer
        run = {
            "identity": self.identity,
            "changed": self.changed,
            "machine": self.machine,
            "seconds": self.seconds,
            "loss": _finite(self.last_loss),
            "held_out": self.curve.to_json(),
        }
        written = self.writer.submit(self._write, trainer.snapshot().copy(), trainer.pipeline(), run)
        self.writing = trainer.step, written

    def _write(self, snapshot: Snapshot, pipeline: Product, run: Mapping[str, Any]) -> None:
        """In the writer's thread."""
        self.metrics.flush()
        self.evaluations.flush()
        keep, milestone_every = self.recipe.training.keep, self.recipe.training.milestone_every
        self.last_good = checkpoint.save(self.checkpoints, snapshot, run, keep, milestone_every)
        self.saved = snapshot.numbers["step"]
        pipeline.save(self.out / "model", snapshot.tensors["ema"])

    def _settle(self, wait: bool = False, must: bool = False) -> None:
        """What became of the save in flight, if it is done. A failure is a warning; the third in a row, or that of a
        save that ``must`` succeed, is an error."""
        if self.writing is None or not (wait or self.writing[1].done()):
            return
        (step, written), self.writing = self.writing, None
        try:
            written.result()
            self.failures = 0
        except OSError as error:
            self.failures += 1
            reason = f"{error.filename or self.out}: {error.strerror or error}"
            kept = f"the last good one is {self.last_good}" if self.last_good else "there is none yet"
            if must or self.failures >= MOST_FAILURES:
                times = "" if must else f" {self.failures} times in a row"
                raise SaveFailed(f"the checkpoint could not be saved{times} ({reason}); {kept}") from None
            self.say(f"warning: no checkpoint at update {step} ({reason}); {kept}; training goes on")

    def _close(self) -> None:
        """The end of a run that failed: the save in flight is still finished."""
        try:
            self._settle(wait=True)
        except UndiffuseError as error:
            self.say(f"warning: {error}")
        self._status("failed")

    def _export_if_older(self) -> None:
        """A crash between the last checkpoint and the export of its model leaves an older model, or none."""
        try:
            fresh = self.trainer.task.exported(self.out / "model") == self.trainer.step
        except (UndiffuseError, KeyError, TypeError):
            fresh = False
        if not fresh:
            self.trainer.pipeline().save(self.out / "model")

    def _where(self) -> Progress:
        trainer = self.trainer
        total = trainer.plan.images
        left = (total - trainer.images) / self.speed if total is not None and self.speed else None
        return Progress(trainer.step, trainer.images, total, self.last_loss, self.speed, left)

    def _changes(self, found: checkpoint.Checkpoint, change: bool) -> list[str]:
        """The settings that are other ones than in the checkpoint, if the run can go on with them (traps R6, RS-8)."""
        try:
            there, here = found.state["identity"], json.loads(json.dumps(self.identity))
            data, stored = there["dataset"], stored_recipe(there, str(found.path))
        except (KeyError, TypeError) as error:
            raise UndiffuseError(f"{found.path}: does not say of which run it is ({error} is missing)") from None
        if data != here["dataset"]:
            before, now = data["items"], here["dataset"]["items"]
            counts = f"{before:,} items then, {now:,} now" if before != now else "other items, or prepared differently"
            raise UndiffuseError(
                f"{self.out}: its data have changed ({counts}); restore them, or start a new run with another --out"
            )
        there = {**there, "recipe": json.loads(json.dumps(to_json(stored, REGISTRIES)))}
        changes = [each for each in _differences(there, here) if not each.startswith(FREE)]
        fixed = [each for each in changes if not each.startswith(CHANGEABLE)]
        if fixed or (changes and not change):
            perhaps = "" if fixed else "add --change to go on with the new ones from here, "
            first = (fixed or changes)[0]
            back = first.removeprefix("recipe.").partition(" there")[0].replace(": ", "=") if "recipe." in first else ""
            back = f" with --set {back}" if re.fullmatch(r"[\w.]+=[\w.+-]+", back) else ""
            raise UndiffuseError(
                f"{self.out}: holds a run with other settings ({first}); repeat its command "
                f"({self.out / 'command.txt'}){back} to continue it, {perhaps}or start a new run with another --out"
            )
        return changes

    def _replan(self) -> None:
        """The run is to have another length: the learning rate is, from here on, that of a run planned so (trap R6)."""
        trainer, images = self.trainer, self.recipe.training.images
        if self.minutes is not None or self.recipe.training.until_converged:
            trainer.plan = Plan(None)  # its speed is measured, or its convergence judged, anew
            return
        trainer.plan = Plan(images, trainer.plan.start)
        if trainer.finished:
            raise UndiffuseError(
                f"{self.out}: has seen {trainer.images:,} images already; a new length must be more than that"
            )

    def _recall(self, found: checkpoint.Checkpoint) -> None:
        """What the run itself remembers; a checkpoint that leaves something out is refused."""
        try:
            self.seconds_before, self.last_loss = found.state["seconds"], found.state["loss"]
            self.changed = list(found.state["changed"])
            if self.held_out is not None:  # a checkpoint from before there was a held-out part has no curve
                self.curve = Curve.from_json(found.state["held_out"])
            machine = found.state["machine"]
        except KeyError as error:
            raise UndiffuseError(f"{found.path}: lacks {error}, so the run cannot go on exactly") from None
        others = [
            f"{name} {machine.get(name)} there, {value} here"
            for name, value in self.machine.items()
            if machine.get(name) != value
        ]
        if others:
            warnings.warn(
                f"{found.path}: written on another machine ({', '.join(others)}): the run goes on, but not bit by bit "
                "as it would have there",
                UndiffuseWarning,
                stacklevel=5,
            )


def header(trainer: Trainer, out: Path, data: str, held_out: str) -> list[str]:
    """Five lines, folded at 80 columns: run, data and model, what is held out, objective, optimiser."""
    recipe, dataset, plan = trainer.recipe, trainer.dataset, trainer.plan
    optimiser, training = recipe.optimiser, recipe.training
    if plan.images is None and training.until_converged:
        length = f"until the held-out loss has converged, at most {training.images:,} images"
    elif plan.images is None:
        length = "as many images as the time allows"
    else:
        epochs = plan.images / len(dataset)
        length = f"{plan.images:,} images ({epochs:.3g} epochs)"
    parts = f" in {training.accumulation} parts" if training.accumulation > 1 else ""
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' * (count > 1)}" if trainer.device.type == "cpu" else ""
    threads += " each" if threads and trainer.team.size > 1 else ""
    processes = f"{trainer.team.size} processes, " if trainer.team.size > 1 else ""
    processes += "state divided among them, " if trainer.divided else ""
    compiled = ", compiled" if training.compile == "always" else ""
    ramp = "" if recipe.ema.ramp is None else f" (at most {recipe.ema.ramp:.0%} of the images seen)"
    what, objective = trainer.task.describe(trainer, data)
    lines = [
        f"run        {out}: {length} in batches of {training.batch_size}{parts}, recipe {recipe.name}, seed "
        f"{trainer.seed}, {processes}{trainer.device}{threads}, {training.precision}{compiled}",
        what,
        f"held out   {held_out}",
        objective,
        f"optimiser  {TITLES[optimiser.kind]}, learning rate {optimiser.lr:g}, warm-up {optimiser.warmup:,} images, "
        f"{optimiser.decay} decay, gradient norm at most {optimiser.clip:g}; EMA half-life "
        f"{recipe.ema.half_life:,} images{ramp}",
    ]
    return [textwrap.fill(line, 80, subsequent_indent=" " * 11, break_on_hyphens=False) for line in lines]


def _differences(there: Any, here: Any, path: str = "") -> Iterator[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        for name in [*there, *(key for key in here if key not in there)]:
            yield from _differences(there.get(name), here.get(name), f"{path}.{name}" if path else name)
    elif there != here:
        yield f"{path}: {json.dumps(there)} there, {json.dumps(here)} here"


def _finite(value: float | None) -> float | None:
    return value if value is not None and numpy.isfinite(value) else None


@contextmanager
def _tolerant(what: str) -> Iterator[None]:
    """What is convenient but not needed: a failure is a warning, and training goes on."""
    try:
        yield
    except (OSError, UndiffuseError) as error:
        warnings.warn(f"{what} ({error}); training goes on", UndiffuseWarning, stacklevel=3)


class _Lines:
    """A text file that grows by whole lines; what cannot be written (disk full) is left out, with one warning."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.warned = False

    def append(self, line: str) -> None:
        try:
            with self.path.open("ab") as file:
                begin = file.tell()
                try:
                    file.write((line + "\n").encode())
                    file.flush()
                except OSError:
                    with suppress(OSError):
                        os.truncate(self.path, begin)
                    raise
        except OSError as error:
            if not self.warned:
                self.warned = True
                warnings.warn(f"{self.path}: {error.strerror}; lines are missing", UndiffuseWarning, stacklevel=3)

    def rewrite(self, lines: Sequence[str]) -> None:
        """Replace all lines."""
        write_bytes_atomic(self.path, "".join(f"{line}\n" for line in lines).encode())

    def truncate(self, keep: Callable[[str], bool]) -> None:
        """Keep the lines up to the first that should not be, or that is not whole."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                if not line.endswith(b"\n") or not keep(line.decode()):
                    break
            except (ValueError, KeyError, TypeError):
                break
            kept.append(line)
        write_bytes_atomic(self.path, b"".join(kept))

    def flush(self) -> None:
        """To the disk."""
        if self.path.exists():
            with self.path.open("ab") as file:
                os.fsync(file.fileno())


class _Pace:
    """Updates a second of training alone: what is done beside it does not count."""

    def __init__(self, step: int) -> None:
        self.step, self.begun = step, time.monotonic()

    @contextmanager
    def aside(self) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.begun += time.monotonic() - begun

    def lap(self, step: int) -> float:
        """The speed since the last lap."""
        now = time.monotonic()
        speed = (step - self.step) / max(1e-9, now - self.begun)
        self.step, self.begun = step, now
        return speed


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The list of signals received: the first asks to stop after the update, the second ends the process at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread may have handlers
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if caught:
            os._exit(128 + number)
        caught.append(number)

    wanted = [signal.SIGINT, signal.SIGTERM] + ([signal.SIGHUP] if os.name != "nt" else [])
    before = {number: signal.signal(number, handle) for number in wanted}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
