"""The doctor: what can be known of a run before its first long hour.

    the data      range, depth, files, duplicates, near-constant items, classes
    the plan      terminal SNR, learning rate, average, levels of training and of sampling, disk
    the trial     a few real updates: do the inputs matter, does one batch overfit, memory, speed

Each check says what it measured with a green, yellow or red light; yellow and red come with a remedy. The first two
groups cost less than a second where data are in memory, and ``undiffuse train`` looks at the most of them by itself.
"""

from __future__ import annotations

import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..data import Dataset
from ..data.augment import advice
from ..denoiser import Denoiser, UnitVariance
from ..errors import UndiffuseError, UndiffuseWarning
from ..objectives import EDMWeight, loss, overlap
from ..pipeline import BATCH, resolve_device
from ..predictions import EDMOutput
from . import memory
from .draws import generator, lent, told
from .muon import make_optimiser
from .recipe import Plan, Recipe
from .trainer import Diverged, Trainer, ignored_inputs

Light = Literal["green", "yellow", "red"]
LIGHTS: tuple[Light, ...] = ("green", "yellow", "red")


@dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        check: its name.
        light: green: as it should be; yellow: it will run, but probably not as hoped; red: mend it first.
        measured: what was seen.
        remedy: what to do; empty when green.
    """

    check: str
    light: Light
    measured: str
    remedy: str = ""


def worst(findings: Sequence[Finding]) -> Light:
    """The light of a whole report."""
    return max((finding.light for finding in findings), key=LIGHTS.index, default="green")


@dataclass(frozen=True, eq=False)
class Patient:
    """A run that has not begun.

    Attributes:
        dataset, recipe, seed, minutes: what it would be called with; device: resolved.
        out: where it would write.
        notes: what was warned of when the data were opened, and the recipe made.
        most: how many items of the data to look at; seconds: for how long at most.
    """

    dataset: Dataset
    recipe: Recipe
    seed: int = 0
    device: str = "cpu"
    minutes: float | None = None
    out: Path = Path("runs")
    notes: tuple[str, ...] = ()
    most: int = 4096
    seconds: float = 5.0

    @cached_property
    def looked(self) -> np.ndarray:
        """The indices of the items that are looked at: all, or blocks of neighbours, spread evenly."""
        count = len(self.dataset)
        if count <= self.most:
            return np.arange(count)
        block = 64
        starts = np.linspace(0, count - block, max(1, self.most // block)).astype(np.int64)
        return np.unique(starts[:, None] + np.arange(block))

    @cached_property
    def values(self) -> np.ndarray:
        """Those items in original units, as far as time and memory (256 MB) allow; at least one block."""
        begun, parts, total = time.monotonic(), [], 0
        for start in range(0, len(self.looked), 64):
            parts.append(self.dataset.values(self.looked[start : start + 64]))
            total += parts[-1].nbytes
            if time.monotonic() - begun > self.seconds or total > 2**28:
                break
        return np.concatenate(parts)

    @cached_property
    def x(self) -> Tensor:
        """Those items in model units."""
        return self.dataset.spec.to_model(self.values)

    @property
    def plan(self) -> Plan:
        """The run's length, unknown while it is only known in minutes."""
        return Plan(None if self.minutes is not None else self.recipe.training.images)

    def items(self, rows: Sequence[int]) -> str:
        """The first of these items by name: ``item 3, item 17, item 20 and 5 more``, or their files."""
        shown = ", ".join(self.dataset.called(int(self.looked[row])) for row in rows[:3])
        return shown + (f" and {len(rows) - 3} more" if len(rows) > 3 else "")


# --- the data ---------------------------------------------------------------------------------------------------------


def check_range(patient: Patient) -> Iterator[Finding]:
    """Values and units: do the data fill the range that they are said to have, and are there outliers?"""
    spec, x = patient.dataset.spec, patient.x
    deviation, mean, reach = float(x.std()), float(x.mean()), x.flatten(1).abs().amax(1)
    span = f"of [{spec.low:g}, {spec.high:g}]" if spec.low is not None else "unbounded"
    measured = (
        f"{patient.values.min():g} to {patient.values.max():g} {span}, {spec.dtype}; in model units mean {mean:.2f}, "
        f"deviation {deviation:.2f}"
    )
    whole = (
        spec.dtype.startswith("float")
        and spec.kind != "points"
        and bool((patient.values == np.round(patient.values)).all())
    )
    if float(reach.max()) > 10:
        rows = torch.argsort(reach, descending=True)[: int((reach > 10).sum())].tolist()
        yield Finding(
            "range",
            "yellow",
            f"{measured}; {patient.items(rows)} reaches {float(reach.max()):.3g} deviations",
            "clip or repair the outliers, or take the logarithm of values that spread over decades",
        )
    elif deviation < 0.1:
        quiet = f"quiet, {20 * math.log10(max(deviation, 1e-9)):.0f} dB" if spec.kind == "sound" else ""
        yield Finding("range", "yellow", f"{measured}: {quiet or 'most of the range is not used'}", _louder(patient))
    elif whole:
        yield Finding(
            "range",
            "yellow",
            measured + ": whole numbers stored as real ones",
            "save them as integers: only then are samples bounded and rounded like the data",
        )
    else:
        yield Finding("range", "green", measured)
    model, objective = patient.recipe.model, patient.recipe.objective
    parts = (model.prediction, model.input_scale, objective.weight)
    assumed = [part.sigma_data for part in parts if isinstance(part, (EDMOutput, UnitVariance, EDMWeight))]
    if assumed and not all(0.5 < s / deviation < 2 for s in assumed):
        yield Finding(
            "sigma_data",
            "yellow",
            f"the recipe assumes a deviation of {assumed[0]:g}, the data have {deviation:.2f}",
            f"set sigma_data={deviation:.2g} in model.prediction, model.input_scale and objective.weight",
        )


def _louder(patient: Patient) -> str:
    """What to do about values so small that noise drowns them."""
    x, sound = patient.x, patient.dataset.spec.kind == "sound"
    if float(x.abs().max()) < 0.5:
        how = "make all sounds louder by one factor" if sound else "save the values as .npy in a range of their own"
        return f"{how}: noise will drown such small differences"
    return (
        "most of the noise levels will show nothing of them: let the network see them in their own scale, with EDM's "
        f"prediction, input scale and weight at sigma_data={float(x.std()):.2g}"
    )


def check_depth(patient: Patient) -> Iterator[Finding]:
    """Bit depth, channels and size: what is kept and what is lost."""
    spec, values = patient.dataset.spec, patient.values
    levels = ""
    if np.dtype(spec.dtype).kind in "ui":
        distinct = len(np.unique(values))
        levels = f", {distinct:,} distinct values" if distinct > 256 else f", {distinct} distinct values"
    size = "x".join(map(str, spec.shape[1:]))
    kept = f"{spec.channels} channel{'s' if spec.channels > 1 else ''}" + (f" of {size}" if size else "") + levels
    kept += f", resized ({spec.resize})" if spec.resize else ", kept as they are"
    x = patient.x
    if spec.kind == "image" and spec.channels == 3 and bool((x == x[:, :1]).all()):
        yield Finding("depth", "yellow", f"{kept}; the three channels are equal", "convert the pictures to grey")
    else:
        yield Finding("depth", "green", kept)


def check_files(patient: Patient) -> Iterator[Finding]:
    """Files that could not be used, and all else that was said when the data were opened."""
    skipped = patient.dataset.skipped
    if skipped:
        names = ", ".join(f"{file} ({reason})" for file, reason in skipped[:3])
        more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        yield Finding("files", "yellow", f"{len(skipped)} skipped: {names}{more}", "repair or remove them")
    for note in patient.notes:
        if "skipped:" not in note:
            yield Finding("files", "yellow", note, "if this is not what you meant, prepare the data first")
    if not skipped and not patient.notes:
        yield Finding("files", "green", f"{len(patient.dataset):,} items, all can be used")


def check_count(patient: Patient) -> Iterator[Finding]:
    """How many items there are, and how often each is seen."""
    count, images = len(patient.dataset), patient.plan.images
    epochs = "" if images is None else f", each seen {images / count:,.3g} times"
    if count < 100:
        yield Finding(
            "count", "yellow", f"{count} items{epochs}", "the model will learn them by heart: find more, or fine-tune"
        )
    elif images is not None and images < count:
        yield Finding("count", "yellow", f"{count:,} items{epochs}", "train longer, or it will not see all of the data")
    else:
        yield Finding("count", "green", f"{count:,} items{epochs}")


def check_duplicates(patient: Patient) -> Iterator[Finding]:
    """Items that are the same, or nearer to another (as thumbnails) than a tenth of the usual distance."""
    x = patient.x
    looked = "" if len(x) == len(patient.dataset) else f" of the {len(x):,} looked at"
    first: dict[bytes, int] = {}
    exact = [row for row, item in enumerate(patient.values) if first.setdefault(item.tobytes(), row) != row]
    kept = sorted(set(range(len(x))) - set(exact))
    near: list[int] = []
    if patient.dataset.spec.kind != "points" and len(kept) >= 16:
        nearest = _nearest(_thumbnails(x[kept]))
        near = [kept[row] for row in torch.nonzero(nearest < 0.1 * nearest.median()).flatten().tolist()]
    remedy = "remove the copies: what is there often is learned by heart, and held-out data are no longer unseen"
    share = (len(exact) + len(near)) / len(x)
    if exact:
        light: Light = "red" if len(exact) > len(x) / 2 else "yellow" if len(exact) > 0.001 * len(x) else "green"
        copy = exact[0]
        which = f"{patient.items([copy])} is {patient.items([first[patient.values[copy].tobytes()]])}"
        yield Finding(
            "duplicates",
            light,
            f"{len(exact):,}{looked} are exact copies ({which})",
            remedy if light != "green" else "",
        )
    if near:
        light = "yellow" if len(near) > 0.01 * len(x) else "green"
        yield Finding(
            "near-duplicates",
            light,
            f"{len(near):,}{looked} are nearly the same as another ({patient.items(near)})",
            remedy if light != "green" else "",
        )
    if not share:
        yield Finding("duplicates", "green", f"none{looked}")


def _thumbnails(x: Tensor) -> Tensor:
    """``[N, C, *spatial]`` averaged down to at most 8 a side, flat."""
    pools: dict[int, Callable[..., Tensor]] = {
        1: nn.functional.adaptive_avg_pool1d,
        2: nn.functional.adaptive_avg_pool2d,
        3: nn.functional.adaptive_avg_pool3d,
    }
    sides = tuple(min(8, side) for side in x.shape[2:])
    return pools[len(sides)](x, sides).flatten(1)


def _nearest(x: Tensor) -> Tensor:
    """The distance of each row to its nearest other, ``[N]``."""
    found = []
    for start in range(0, len(x), 512):
        rows = torch.cdist(x[start : start + 512], x)
        rows[torch.arange(len(rows)), start + torch.arange(len(rows))] = float("inf")
        found.append(rows.amin(1))
    return torch.cat(found)


def check_constant(patient: Patient) -> Iterator[Finding]:
    """Items without content: black pages, silence."""
    if patient.dataset.spec.kind == "points":
        return
    flat = torch.nonzero(patient.x.flatten(1).std(1) < 0.01).flatten().tolist()
    if not flat:
        yield Finding("constant", "green", "no item is empty")
        return
    light: Light = "red" if len(flat) > len(patient.x) / 2 else "yellow"
    yield Finding("constant", light, f"{len(flat):,} items are one flat value ({patient.items(flat)})", "remove them")


def check_classes(patient: Patient) -> Iterator[Finding]:
    """Are there enough items of each class?"""
    spec, labels = patient.dataset.spec, patient.dataset.labels
    if labels is None or not spec.classes:
        yield Finding("classes", "green", "none: the model will be unconditional")
        return
    counts = np.bincount(labels, minlength=len(spec.classes))
    least, most = int(counts.argmin()), int(counts.argmax())
    rare, common = f"{counts[least]:,} items ({spec.classes[least]})", f"{counts[most]:,} ({spec.classes[most]})"
    measured = f"{len(spec.classes)}: {rare} to {common}"
    if counts[least] < 10 or counts[most] > 10 * counts[least]:
        yield Finding("classes", "yellow", measured, "find more of the rare classes, or put them together")
    else:
        yield Finding("classes", "green", measured)


def check_mirroring(patient: Patient) -> Iterator[Finding]:
    """Mirroring where pictures have a left and a right."""
    said, flip = advice(patient.dataset.spec, patient.recipe.augment), patient.recipe.augment.flip
    if flip and said:
        yield Finding("mirroring", "yellow", said.partition("; ")[0], "--set augment.flip=0")
    elif patient.dataset.spec.has_pictures:
        yield Finding("mirroring", "green", said or (f"{flip:.0%} are mirrored" if flip else "none, right for digits"))


# --- the plan ---------------------------------------------------------------------------------------------------------


def check_terminal_snr(patient: Patient) -> Iterator[Finding]:
    """How much of the data is left at t = 1, where sampling starts from noise alone (trap S5)."""
    end = patient.recipe.model.schedule(1.0)
    share = float(end.alpha / torch.hypot(end.alpha, end.sigma))
    measured = f"{share:.2%} of the amplitude is still data at t = 1"
    if share > 0.03:
        light: Light = "red" if share > 0.3 else "yellow"
        yield Finding("terminal SNR", light, measured, "wrap the schedule: --set model.schedule=zero_terminal_snr")
    else:
        yield Finding("terminal SNR", "green", measured)


def check_learning_rate(patient: Patient, plan: Plan | None = None) -> Iterator[Finding]:
    """The learning rate over the real number of updates."""
    choice, training = patient.recipe.optimiser, patient.recipe.training
    plan = plan or patient.plan
    if plan.images is None:
        yield Finding("learning rate", "green", f"up to {choice.lr:g}; the number of updates follows from the speed")
        return
    updates, batch = math.ceil(plan.images / training.batch_size), training.batch_size
    places = np.unique(np.linspace(0, updates - 1, 1000).astype(np.int64))
    rates = [choice.rate(int(i) * batch, (int(i) + 1) * batch, plan) for i in places]
    top, last = max(rates), rates[-1]
    warm = min(1.0, choice.warmup / plan.images)
    measured = (
        f"{updates:,} updates: up over the first {warm:.0%}, at most {top:.2g}, {choice.decay}, {last:.2g} in the last"
    )
    shorter = f"train longer, or --set optimiser.warmup={max(1, plan.images // 10)}"
    if choice.warmup >= plan.images:
        yield Finding("learning rate", "red", measured + ": the warm-up is longer than the run", shorter)
    elif warm > 0.5 or top < 0.5 * choice.lr:
        yield Finding("learning rate", "yellow", measured + f": it is to be {choice.lr:g}", shorter)
    elif updates < 100:
        yield Finding(
            "learning rate", "yellow", measured, "so few updates test the machinery, not the model: train longer"
        )
    else:
        yield Finding("learning rate", "green", measured)


def check_average(patient: Patient, plan: Plan | None = None) -> Iterator[Finding]:
    """How far back the average reaches at the end of the run, and whether the random first weights are in it (E4)."""
    average, batch = patient.recipe.ema, patient.recipe.training.batch_size
    images = (plan or patient.plan).images
    if images is None:
        yield Finding("average", "green", "its half-life follows the images seen")
        return
    left = average.first_weights(images, batch)
    half = average.half_life if average.ramp is None else min(average.half_life, average.ramp * images)
    measured = f"half-life {half:,.0f} images at the end of {images:,}; {left:.0%} of it are the random first weights"
    if left > math.exp(-5):
        light: Light = "red" if left > 0.5 else "yellow"
        yield Finding("average", light, measured, f"--set ema.ramp=0.05, or --set ema.half_life={max(1, images // 20)}")
    else:
        yield Finding("average", "green", measured)


def check_overlap(patient: Patient) -> Iterator[Finding]:
    """Does training draw the levels that sampling visits (trap S11)?"""
    recipe = patient.recipe
    visited = recipe.sampling.grid.times(recipe.model.schedule, recipe.sampling.steps)
    trained = overlap(recipe.objective.times, recipe.model.schedule, visited)
    measured = f"training covers {trained:.0%} of the levels of sampling"
    if trained < 0.5:
        light: Light = "red" if trained < 0.2 else "yellow"
        yield Finding("levels", light, measured, "choose objective.times and sampling.grid that agree")
    else:
        yield Finding("levels", "green", measured)


def check_disk(patient: Patient) -> Iterator[Finding]:
    """Is there room for the checkpoints?"""
    spec, training = patient.dataset.spec, patient.recipe.training
    parameters = sum(p.numel() for p in patient.recipe.modules(spec).parameters())
    one = 16 * parameters  # weights, average and two moments, float32
    need = (training.keep + 1) * one + 8 * parameters  # one more while it is written; the model, twice
    place = patient.out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    measured = f"{free / 1e9:,.1f} GB free, {need / 1e9:,.2g} GB needed for {training.keep} checkpoints and the model"
    remedy = f"free some space, choose another --out, or --set training.keep=1 ({one / 1e9:,.2g} GB each)"
    light: Light = "red" if free < need else "yellow" if free < 2 * need else "green"
    yield Finding("disk", light, measured, "" if light == "green" else remedy)


Check = Callable[[Patient], Iterator[Finding]]

DATA: tuple[Check, ...] = (
    check_range,
    check_depth,
    check_files,
    check_count,
    check_duplicates,
    check_constant,
    check_classes,
    check_mirroring,
)
PLAN: tuple[Check, ...] = (check_terminal_snr, check_overlap, check_disk)


# --- the trial --------------------------------------------------------------------------------------------------------


def trial(patient: Patient, seconds: float = 20.0) -> Iterator[Finding]:
    """A few real updates, in batches that grow to the recipe's as far as ``seconds`` allow; then one preview; then one
    batch by heart. What was not reached is extrapolated, and said to be."""
    recipe, training = patient.recipe, patient.recipe.training
    device, target = torch.device(patient.device), training.batch_size
    with lent(patient.seed, "weights", 0):
        denoiser = recipe.config(patient.dataset.spec).build()
    trainer = None
    done: list[tuple[int, float, int]] = []  # batch, seconds an update, peak bytes
    try:
        begun = time.monotonic()
        for batch in _growing(target):
            if done and time.monotonic() - begun + 3 * done[-1][1] * batch / done[-1][0] > seconds:
                break
            part = replace(training, batch_size=batch, accumulation=min(training.accumulation, batch), nonfinite="stop")
            memory.reset_peak(device)
            trainer = Trainer(
                patient.dataset,
                replace(recipe, training=part),
                seed=patient.seed,
                device=patient.device,
                plan=Plan(None),
                denoiser=denoiser,
            )
            try:
                _timed(trainer)
            except Diverged:
                raise
            except UndiffuseError as error:
                if trainer.step != 1:
                    raise
                yield Finding("inputs", "red", str(error).partition(";")[0], str(error).partition("; ")[2])
            spent = [_timed(trainer)]
            while batch == target and len(spent) < 10 and sum(spent) < 3:
                spent.append(_timed(trainer))
            done.append((batch, float(np.median(spent)), memory.peak(device)))
        assert trainer is not None
        x0, given = trainer.read(0)
        cond = {name: values.to(device) for name, values in given.items()}
        if not ignored_inputs(trainer.denoiser, x0.to(device), cond):
            names = " and ".join(["the level", *cond])
            yield Finding("inputs", "green", f"the output depends on {names} after {trainer.step} updates")
        preview = _preview(trainer, done[-1][1] / done[-1][0])
        peak = max(memory.peak(device), done[-1][2])
    except Diverged as error:
        yield Finding("trial", "red", str(error), "lower optimiser.lr, or choose another prediction or weight")
        return
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
        reached = done[-1][0] if done else 0
        remedy = memory.smaller_batch(target, training.accumulation)
        yield Finding("memory", "red", f"not enough for a batch of {target} ({reached} was possible)", remedy)
        return
    yield from _memory(patient, done, peak)
    yield from _speed(patient, done, preview)
    del trainer
    yield from check_overfit(patient)


def _growing(target: int) -> Iterator[int]:
    batch = 1
    while batch < target:
        yield batch
        batch *= 8
    yield target


def _timed(trainer: Trainer) -> float:
    begun = time.monotonic()
    update = trainer.update()
    float(update.loss)  # waits for the device
    trainer.check()
    return time.monotonic() - begun


def _at(target: int, done: Sequence[tuple[int, float]]) -> float:
    """The value at batch ``target``: measured, or on the line through the last two."""
    batch, value = done[-1]
    if batch == target or len(done) < 2:
        return value * target / batch
    before, smaller = done[-2]
    return value + max(0.0, value - smaller) / (batch - before) * (target - batch)


def _preview(trainer: Trainer, seconds_an_image: float) -> float:
    """How long a preview takes; a forward pass is at most a third of an update, and two steps tell the rest."""
    number = trainer.recipe.training.previews
    count = max(1, min(number, BATCH, int(5 / max(1e-9, 2 * seconds_an_image))))
    pipeline = trainer.pipeline()
    begun = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndiffuseWarning)
        pipeline.sample(count, steps=2)
    return (time.monotonic() - begun) / 2 * pipeline.sampling.steps * number / count


def _memory(patient: Patient, done: Sequence[tuple[int, float, int]], peak: int) -> Iterator[Finding]:
    target, room = patient.recipe.training.batch_size, memory.limit(torch.device(patient.device))
    need = max(peak, int(_at(target, [(batch, float(used)) for batch, _, used in done])) if len(done) > 1 else peak)
    how = "measured" if done[-1][0] == target else f"extrapolated from a batch of {done[-1][0]}"
    measured = f"{need / 1e9:.2f} GB at most, with a preview ({how})" + (f", of {room / 1e9:.1f}" if room else "")
    remedy = memory.smaller_batch(target, patient.recipe.training.accumulation)
    light: Light = "green" if not room or need < 0.8 * room else "yellow" if need < room else "red"
    yield Finding("memory", light, measured, "" if light == "green" else remedy)


def _speed(patient: Patient, done: Sequence[tuple[int, float, int]], preview: float) -> Iterator[Finding]:
    training = patient.recipe.training
    update = _at(training.batch_size, [(batch, seconds) for batch, seconds, _ in done])
    speed = training.batch_size / update
    how = "" if done[-1][0] == training.batch_size else f" (extrapolated from a batch of {done[-1][0]})"
    if patient.minutes is None:
        images = training.images
    else:
        images = max(1, int(60 * patient.minutes * 0.97 / update)) * training.batch_size
    updates = math.ceil(images / training.batch_size)
    pictures = 1 + (updates // training.preview_every if training.preview_every else 0)
    total = updates * update + pictures * preview
    measured = (
        f"{speed:,.3g} images/s{how}: {images:,} images in about {_duration(total)}, of which {pictures} previews are "
        f"{_duration(pictures * preview)}"
    )
    faster = "take a GPU, a smaller model (--model-size), smaller images (--image-size), or fewer images (--images)"
    if pictures * preview > 0.3 * total and total > 60:
        fewer = max(1, 4 * training.preview_every)
        yield Finding("time", "yellow", measured, f"--set training.preview_every={fewer}, or fewer training.previews")
    else:
        yield Finding("time", "yellow" if total > 86_400 else "green", measured, faster if total > 86_400 else "")
    if patient.minutes is not None:
        yield from check_learning_rate(patient, Plan(images))
        yield from check_average(patient, Plan(images))
        if images < len(patient.dataset):
            yield Finding(
                "length", "yellow", f"{images:,} images in that time, the data have {len(patient.dataset):,}", faster
            )


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} seconds"


class _Silent(nn.Module):
    """The trivial predictor: 0, whatever it is asked."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], self.channels * x.shape[1], *x.shape[2:])


def check_overfit(patient: Patient, updates: int = 150, seconds: float = 12.0) -> Iterator[Finding]:
    """Can the network learn a few items with fixed times and noise by heart, at the recipe's learning rate?

    Green when the loss falls below a quarter of that of the predictor that always says 0, within ``updates`` and
    ``seconds``; red when it is not finite, or not below 95 % of it after 50 updates or more; yellow between.
    """
    recipe, spec = patient.recipe, patient.dataset.spec
    objective, choice = recipe.objective, recipe.optimiser
    count = min(len(patient.dataset), recipe.training.batch_size, 32 if spec.kind == "points" else 8)
    with lent(patient.seed, "weights", 0):
        denoiser = recipe.config(spec).build().to(patient.device).train()
    silent = _Silent(2 if denoiser.learned_variance else 1)
    trivial = Denoiser(
        silent,
        denoiser.schedule,
        denoiser.prediction,
        denoiser.label,
        denoiser.input_scale,
        learned_variance=denoiser.learned_variance,
    )
    items = np.unique(np.linspace(0, len(patient.dataset) - 1, count).astype(np.int64))
    x0, given = told(denoiser.conditions, patient.dataset, items)
    eps = torch.randn(x0.shape, generator=generator(patient.seed, "doctor", 0))
    t = objective.times((torch.arange(len(x0), dtype=torch.float64) + 0.5) / len(x0), denoiser.schedule)
    cond = denoiser.null(len(x0))  # what the data do not say, such as how they were augmented
    cond |= {name: values.to(patient.device) for name, values in given.items()}
    bar = float(loss(trivial, x0, t, eps, objective.weight, huber=objective.huber).mean())
    x0, eps = x0.to(patient.device), eps.to(patient.device)
    optimiser = make_optimiser(denoiser, denoiser.network, replace(choice, weight_decay=0.0))
    begun, now, step, lowest = time.monotonic(), math.inf, 0, math.inf
    for step in range(1, updates + 1):
        with lent(patient.seed, "doctor dropout", step, patient.device):
            now_loss = loss(denoiser, x0, t, eps, objective.weight, huber=objective.huber, **cond).mean()
        now = float(now_loss.detach())
        lowest = min(lowest, now) if math.isfinite(now) else lowest
        if not math.isfinite(now) or now < 0.25 * bar or time.monotonic() - begun > seconds:
            break
        now_loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), choice.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    measured = f"loss {now:.3g} on {len(x0)} fixed items after {step} updates; always saying 0 has {bar:.3g}"
    if math.isfinite(now) and now < 0.25 * bar:
        yield Finding("overfit", "green", measured)
    elif not math.isfinite(now) or (step >= 50 and now >= 0.95 * bar):
        remedy = f"the learning rate {choice.lr:g} is too high or far too low, or the network cannot say what is asked"
        yield Finding("overfit", "red", measured, remedy)
    else:
        slow = "it learns, slowly" if lowest < 0.95 * bar else "too few updates in the time to tell"
        yield Finding(
            "overfit", "yellow", measured, f"{slow}; a larger optimiser.lr may help, if the loss falls smoothly"
        )


# --- all of it --------------------------------------------------------------------------------------------------------


def examine(
    dataset: Dataset,
    recipe: Recipe,
    *,
    seed: int = 0,
    device: str = "auto",
    minutes: float | None = None,
    out: str | os.PathLike[str] = "runs",
    notes: Sequence[str] = (),
    quick: bool = False,
) -> tuple[Finding, ...]:
    """Everything that can be known of ``run_training(dataset, recipe, out, ...)`` before it is begun.

    Args:
        minutes: the run's length in time, if that is how it is given.
        notes: what was warned of besides the notes of the data set.
        quick: without the trial.

    Raises:
        UndiffuseError: what the run itself would refuse.
    """
    if minutes is not None and not minutes > 0:
        raise UndiffuseError(f"minutes={minutes} must be positive")
    recipe.check(dataset.spec)
    patient = Patient(dataset, recipe, seed, resolve_device(device), minutes, Path(out), (*dataset.notes, *notes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndiffuseWarning)  # they are findings here
        # The trial comes first, so that its memory is that of training.
        denoises = recipe.codec is None
        tried = list(trial(patient)) if denoises and not quick else []
        found = [finding for check in DATA for finding in check(replace(patient, dataset=dataset.original))]
        found += [finding for check in (PLAN if denoises else (check_disk,)) for finding in check(patient)]
        if minutes is None or quick:
            found += [*check_learning_rate(patient), *check_average(patient)]
    return (*found, *tried)


def glance(
    dataset: Dataset, recipe: Recipe, *, minutes: float | None = None, out: Path = Path("runs")
) -> list[Finding]:
    """The yellow and red findings that cost less than a second: what ``undiffuse train`` says by itself.

    Terminal SNR, average and levels are left out: denoiser, trainer and header warn of them.
    """
    patient = Patient(dataset, recipe, minutes=minutes, out=out, most=512, seconds=0.2)
    seen = replace(patient, dataset=dataset.original)
    found = [finding for check in DATA if check is not check_files for finding in check(seen)]
    found += [*check_disk(patient), *check_learning_rate(patient)]
    return [finding for finding in found if finding.light != "green"]
