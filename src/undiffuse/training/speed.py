"""Which way of computing an update is the fastest here: in bfloat16 or float32, compiled or not, by one process with
many threads or by many with fewer. Decided by trying.

A long run whose recipe says ``auto`` makes a few real updates each way, in turn, so that what else the machine does
hits both, and takes the median of their ratios. What was measured is kept in the user's cache; what was chosen becomes
part of the run's identity, so that it goes on as it began (:func:`as_before`), to the last bit on a CPU.
"""

from __future__ import annotations

import json
import os
import platform
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from statistics import median
from typing import Any, TypeVar

import torch

from ..config import load_json, to_json, write_json_atomic
from ..data import Dataset
from ..distributed import ALONE, Team
from ..errors import UndiffuseError, UndiffuseWarning
from ..pipeline import REGISTRIES
from . import memory
from .distributed import Leader
from .engine import divides, exchange
from .recipe import Plan, Recipe
from .trainer import Trainer

LEAST_UPDATES = 200
LEAST_SECONDS = 120.0
"""Shorter runs are not worth a trial, which takes about 20 updates."""

TEAM_SECONDS = 600.0
"""Shorter runs are not worth that other processes are started, which takes several seconds."""

LEAST_SHARE = 8
"""Images of a batch that each process has at least."""

ROUNDS = 7
LEAST_GAIN = 0.05
"""A way that saves less of the time is not worth being another one."""

OWN_SHARE = 0.8
"""Of the time that passes in a trial on a CPU, this thread must have had a core for as much; or other processes have
held the cores, and what was measured is not kept for later runs."""

SETTINGS = ("precision", "compile")
"""The fields of :class:`.Training` that ``auto`` leaves to this chapter."""


@dataclass(frozen=True)
class Trial:
    """What was measured.

    Attributes:
        seconds: an update in float32 (or the precision that was asked for), not compiled.
        bf16: the time of an update in bfloat16 as a share of that; None: not tried.
        compiled: the time of a compiled update as a share of one that is not, in the precision chosen; None: not tried.
        compiling: seconds that compiling took.
        failed: why compiling did not work, in one line.
        disturbed: whether other processes held the cores.
    """

    seconds: float
    bf16: float | None = None
    compiled: float | None = None
    compiling: float = 0.0
    failed: str = ""
    disturbed: bool = False

    @property
    def half(self) -> bool:
        """Whether bfloat16 pays."""
        return self.bf16 is not None and self.bf16 < 1 - LEAST_GAIN

    @property
    def chosen_seconds(self) -> float:
        """An update that is not compiled, in the precision chosen."""
        return self.seconds * (self.bf16 if self.bf16 is not None and self.half else 1)

    def compiles(self, seconds: float) -> bool:
        """Whether compiling pays for a run that would otherwise take so long: it is done once more at each start."""
        if self.compiled is None:
            return False
        saved = seconds * (1 - self.compiled)
        return self.compiled < 1 - LEAST_GAIN and saved > 3 * self.compiling


@dataclass(frozen=True)
class TeamTrial:
    """What was measured of a team.

    Attributes:
        seconds: an update by one process with all threads.
        share: the time of an update by the team as a share of that.
        disturbed: whether other processes held the cores.
    """

    seconds: float
    share: float
    disturbed: bool = False

    @property
    def pays(self) -> bool:
        """Whether the team is faster."""
        return self.share < 1 - LEAST_GAIN


def settle(recipe: Recipe, chosen: Mapping[str, str]) -> Recipe:
    """The recipe with ``precision`` and ``compile`` as ``chosen`` wherever it says ``auto``."""
    training = recipe.training
    new = {name: chosen[name] for name in SETTINGS if getattr(training, name) == "auto"}
    return replace(recipe, training=replace(training, **new))  # type: ignore[arg-type]


def plain(recipe: Recipe) -> Recipe:
    """The recipe with float32 and nothing compiled wherever it says ``auto``."""
    return settle(recipe, {"precision": "float32", "compile": "never"})


def settled(recipe: Recipe) -> dict[str, str]:
    """What :func:`settle` needs to do to a recipe what was done to this one."""
    return {name: getattr(recipe.training, name) for name in SETTINGS}


def as_before(recipe: Recipe, state: Mapping[str, Any]) -> Recipe:
    """The recipe with ``auto`` settled as in a checkpoint with this ``state``; what does not say is float32, and not
    compiled."""
    try:
        stated = state["identity"]["recipe"]["training"]
        return plain(settle(recipe, {name: stated.get(name, "auto") for name in SETTINGS}))
    except (KeyError, TypeError, AttributeError):
        return plain(recipe)  # the run says what is wrong with the checkpoint


def choose(
    dataset: Dataset,
    recipe: Recipe,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    team: Team = ALONE,
    minutes: float | None = None,
    rounds: int = ROUNDS,
    least_seconds: float = LEAST_SECONDS,
) -> tuple[Recipe, str]:
    """The recipe with ``auto`` settled, and in one line why (empty where nothing was tried).

    Args:
        team: the processes that share the batch. Each is taken to be as fast as this one, which tries alone.
        minutes: how long the run may take, if that is what limits it.
        rounds: updates of each way.
        least_seconds: runs shorter than this are not worth a trial.
    """
    training, place = recipe.training, torch.device(device)
    updates = training.images / training.batch_size
    if updates < LEAST_UPDATES if minutes is None else 60 * minutes < least_seconds:
        return plain(recipe), ""
    whole = recipe.codec is not None or not divides(training.shard, recipe.modules(dataset.spec), team, place)
    if training.compile == "auto" and not (recipe.codec is None and whole and may_compile(place)):
        training = replace(training, compile="never")  # FSDP2's own hooks are not compiled here, nor are codecs
        recipe = replace(recipe, training=training)
    if "auto" not in (training.precision, training.compile):
        return plain(recipe), ""
    # A process alone with the share of one: what it exchanges with the others costs the same each way.
    size = max(1, training.batch_size // team.size)
    part = replace(
        training, batch_size=size, accumulation=min(size, training.accumulation), nonfinite="stop", shard="never"
    )
    shared = replace(recipe, training=part)
    with warnings.catch_warnings(), suppress(UndiffuseError):  # the run itself will say what is wrong
        warnings.simplefilter("ignore", UndiffuseWarning)
        try:
            trial = _trial(dataset, shared, seed, place, updates, minutes, rounds, least_seconds)
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
            return plain(recipe), ""
        if trial is None:
            return plain(recipe), ""
        seconds = 60 * minutes if minutes is not None else updates * trial.chosen_seconds
        chosen = {
            "precision": "bf16" if trial.half else "float32",
            "compile": "always" if trial.compiles(seconds) else "never",
        }
        return settle(recipe, chosen), explain(trial, seconds)
    return plain(recipe), ""


def explain(trial: Trial, seconds: float) -> str:
    """What was chosen and why: one line."""
    said = []
    if trial.bf16 is not None:
        said.append(f"an update in bf16 takes {trial.bf16:.0%} of the time of one in float32")
    if trial.failed:
        said.append(f"torch.compile does not work here ({trial.failed})")
    if trial.compiled is not None:
        verdict = "" if trial.compiles(seconds) else ", which does not pay"
        said.append(f"a compiled one {trial.compiled:.0%} of one that is not, after {trial.compiling:.0f} s{verdict}")
    ways = [] if trial.bf16 is None else ["bf16" if trial.half else "float32"]
    if trial.compiled is not None or trial.failed:
        ways.append("compiled" if trial.compiles(seconds) else "not compiled")
    return f"{', '.join(ways)}: {'; '.join(said)}{_noted(trial)}" if said else ""


def _noted(trial: Trial | TeamTrial) -> str:
    return " (others held the cores, so this is measured again the next time)" if trial.disturbed else ""


def may_compile(device: torch.device) -> bool:
    """Whether compiling is worth a trial: on CPUs it took a minute and saved 2 % of an update (docs/benchmarks.md)."""
    return device.type == "cuda"


def has_bf16(device: torch.device) -> bool:
    """Whether the processor multiplies in bfloat16 itself; where it only imitates it, that is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() or platform.machine() == "arm64"
    )


def _trial(
    dataset: Dataset,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    updates: float,
    minutes: float | None,
    rounds: int,
    least_seconds: float,
) -> Trial | None:
    """What was measured now or earlier; None: not worth it."""
    training = recipe.training
    file = _cached(recipe, dataset, device)
    known = _read(file, Trial)
    trainer = None
    if known is None:
        trainer = Trainer(dataset, plain(recipe), seed=seed, device=device, plan=Plan(None), workers=0)
        seconds = median([_timed(trainer) for _ in range(5)][2:])
    else:
        seconds = known.seconds
    if not _long(seconds, updates, minutes, least_seconds):
        return None
    if known is not None or trainer is None:
        return known
    trial = Trial(seconds)
    # Points are two or three numbers, of which bfloat16 keeps 8 bits each: that blurs them.
    clock = Clock()
    if training.precision == "auto" and has_bf16(device) and dataset.spec.kind != "points":
        with clock:
            ratio, seconds = _ratio(trainer, lambda: _half(trainer), rounds)
        trial = replace(trial, bf16=ratio, seconds=seconds)
        trainer.half = trial.half
    if training.compile == "auto":
        trial = _try_compiling(trainer, trial, rounds)
    trial = replace(trial, disturbed=device.type == "cpu" and clock.disturbed)
    _keep(file, trial)
    return trial


def _long(seconds: float, updates: float, minutes: float | None, least_seconds: float) -> bool:
    """Whether a run of updates that take so long is worth a trial."""
    updates = updates if minutes is None else 60 * minutes / seconds
    return updates >= LEAST_UPDATES and updates * seconds >= least_seconds


def _try_compiling(trainer: Trainer, trial: Trial, rounds: int) -> Trial:
    compiled = exchange(trainer.denoiser, trainer.team, compiled=True)
    with _engine(trainer, compiled), warnings.catch_warnings():
        warnings.simplefilter("error", UndiffuseWarning)
        try:
            first = _timed(trainer)
        except UndiffuseWarning as warning:
            return replace(trial, failed=str(warning).partition(" (")[2].partition(")")[0])
    ratio, usual = _ratio(trainer, lambda: _engine(trainer, compiled), rounds)
    return replace(trial, compiled=ratio, compiling=max(0.0, first - usual))


def _ratio(trainer: Trainer, other: Any, rounds: int) -> tuple[float, float]:
    """The time of an update inside ``other()`` as a share of one outside, and seconds of the latter: medians over
    rounds of one each."""
    with other():
        _timed(trainer)  # the first ones make plans and allocate
    pairs = []
    for _ in range(rounds):
        usual = _timed(trainer)
        with other():
            pairs.append((usual, _timed(trainer)))
    return median(there / here for here, there in pairs), median(here for here, _ in pairs)


@contextmanager
def _half(trainer: Trainer) -> Iterator[None]:
    before, trainer.half = trainer.half, True
    yield
    trainer.half = before


@contextmanager
def _engine(trainer: Trainer, engine: Any) -> Iterator[None]:
    before, trainer.engine = trainer.engine, engine
    try:
        yield
    finally:
        trainer.engine = before


class Clock:
    """The time that has passed inside ``with``, and how much of it this thread has computed."""

    def __init__(self) -> None:
        self.passed = self.own = 0.0

    def __enter__(self) -> None:
        self.passed -= time.perf_counter()
        self.own -= time.thread_time()

    def __exit__(self, *what: object) -> None:
        self.passed += time.perf_counter()
        self.own += time.thread_time()

    @property
    def disturbed(self) -> bool:
        """Whether others held the cores."""
        return self.own < OWN_SHARE * self.passed


def _timed(trainer: Trainer) -> float:
    begun = time.perf_counter()
    float(trainer.update().loss)  # waits for the device
    return time.perf_counter() - begun


def _cached(recipe: Recipe, dataset: Dataset, device: torch.device, processes: int = 1) -> Any:
    """The file for trials of this model, shape and batch on this device with this torch."""
    from ..cache import cache_folder

    training, codec = recipe.training, recipe.codec
    key = {
        "model": to_json(recipe.config(dataset.spec), REGISTRIES)
        if codec is None
        else [codec.config(recipe.model, dataset.spec), asdict(codec)],
        "shape": dataset.spec.shape,
        "batch": [training.batch_size, training.accumulation],
        "asked": [getattr(training, name) for name in SETTINGS],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {_processor()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    } | ({"processes": processes} if processes > 1 else {})
    digest = sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / "speed" / f"{digest}.json"


def _processor() -> str:
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {os.cpu_count()}"


def _keep(file: Any, trial: Trial | TeamTrial) -> None:
    """For later runs, unless it was disturbed."""
    if trial.disturbed:
        return
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(file, asdict(trial))


T = TypeVar("T", Trial, TeamTrial)


def _read(file: Any, kind: type[T]) -> T | None:
    try:
        return kind(**load_json(file)) if file.is_file() else None
    except (UndiffuseError, OSError, TypeError):
        return None  # damaged: measured again


# --- how many processes -----------------------------------------------------------------------------------------------


def team_size(threads: int, batch: int) -> int:
    """How many processes to try for a batch (or part of one) of this size instead of so many threads: one a thread,
    fewer if their shares would be too small."""
    return max(
        size for size in range(1, threads + 1) if threads % size == 0 and (size == 1 or batch >= LEAST_SHARE * size)
    )


def team_before(leader: Leader, state: Mapping[str, Any]) -> int:
    """How many processes a run goes on with from a checkpoint with this ``state``: as many as it is told; else as many
    as it had, if there are so many threads."""
    if leader.crew is None:
        return 1
    if leader.crew.size is not None:
        return leader.crew.size
    try:
        before = int(state["machine"]["processes"]) if state["machine"]["device"] == "cpu" else 1
    except (KeyError, TypeError, ValueError):
        return 1  # the run says what is wrong with the checkpoint
    return before if 1 < before <= torch.get_num_threads() else 1


def choose_team(
    leader: Leader,
    dataset: Dataset,
    recipe: Recipe,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    minutes: float | None = None,
    rounds: int = ROUNDS,
    least_seconds: float = TEAM_SECONDS,
) -> str:
    """Let the leader take on a team where that is open and pays; in one line why (empty where nothing was tried).

    What is tried are real processes, each with its share of the batch and of the threads, against this one with all.

    Args:
        recipe: with nothing left open.
    """
    training, threads, place = recipe.training, torch.get_num_threads(), torch.device(device)
    size = team_size(threads, training.batch_size // training.accumulation)
    updates = training.images / training.batch_size
    may = leader.crew is not None and leader.crew.size is None and leader.team.size == 1
    if not may or size == 1 or place.type != "cpu" or recipe.codec is not None:
        return ""
    if updates < LEAST_UPDATES if minutes is None else 60 * minutes < least_seconds:
        return ""
    file = _cached(recipe, dataset, place, size)
    known = _read(file, TeamTrial)
    alone = None
    if known is None:
        try:
            alone = Trainer(dataset, recipe, seed=seed, device=place, plan=Plan(None), workers=0)
            seconds = median([_timed(alone) for _ in range(5)][2:])
        except UndiffuseError:  # the run itself will say what is wrong
            return ""
    else:
        seconds = known.seconds
    room = memory.limit(place)
    if not _long(seconds, updates, minutes, least_seconds) or (room and size * memory.peak(place) > 0.8 * room):
        return ""
    if (known is None or known.pays) and not leader.take_on(size):
        return ""
    if known is None and alone is not None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UndiffuseWarning)
                known = _together(alone, leader.build(settled(recipe)), threads, rounds)
        except (UndiffuseError, RuntimeError, MemoryError):
            leader.dismiss()
            return ""
        _keep(file, known)
        if not known.pays:
            leader.dismiss()
    assert known is not None
    way = f"{size} processes" if known.pays else "one process"
    each = f"{size} processes that share the {threads} threads"
    return f"{way}: an update by {each} takes {known.share:.0%} of the time of one by one{_noted(known)}"


def _together(alone: Trainer, team: Trainer, threads: int, rounds: int) -> TeamTrial:
    clock = Clock()  # of the updates by one process: in a team's own, processes wait for each other

    def usual() -> float:
        torch.set_num_threads(threads)
        try:
            with clock:
                return _timed(alone)
        finally:
            torch.set_num_threads(max(1, threads // team.team.size))

    usual(), _timed(team), _timed(team)
    pairs = [(usual(), _timed(team)) for _ in range(rounds)]
    ratio = median(there / here for here, there in pairs)
    return TeamTrial(median(here for here, _ in pairs), ratio, clock.disturbed)
