"""Held-out loss: the training objective on items that are never trained on, with frozen times and noise.

    items  --divide-->  train | held out        evaluate:  L = mean_k loss(x0_k, t_k, eps_k)

Draw k has the same item, time, noise and dropped condition at every evaluation of every run on these data, so two
points of the curve differ by their weights alone. The times are the midpoints of equal slices of the objective's own
distribution, in order, so L is the training loss on unseen data, and its four bands (a quarter of the draws each, from
the least noise to the most) average to it exactly. Evaluating changes nothing (trap X7).
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast, final

import numpy as np
import torch
from torch import Tensor, nn

from ..data import Dataset
from ..denoiser import Denoiser
from ..errors import UndiffuseError, UndiffuseWarning
from ..objectives import Stratified, loss, offset_noise
from ..pipeline import Pipeline
from ..schedules import Schedule
from .draws import epoch_order, generator
from .draws import told as told_of
from .recipe import Recipe, Training
from .trainer import Trainer

SEED = 0
"""Of the division and of all draws: not the run's, so that runs with other seeds can be compared."""
LOSS = "held_out_loss"
"""What the loss is called beside other figures."""
SHARE = 10
"""At most one item in so many is held out."""
LEAST = 10
"""Fewer items than this say nothing, and small data need all of theirs: then nothing is held out."""
BANDS = 4
STRATA = 8 * BANDS
"""Slices of the draws within which losses are alike, for the standard error; a multiple of the bands."""
AGO = 1.25
"""An evaluation is compared with one at a share of 1/1.25 of its images: a fifth of the run ago."""
COST = 0.05
"""Evaluating takes at most about this share of the training, where that leaves 2 draws a stratum."""
DRAWS = 1024


def divide(dataset: Dataset, training: Training) -> tuple[Dataset, Dataset | None]:
    """``(train, held out)``: a tenth of the items, at most ``training.held_out``, with the same share of every class;
    always the same ones. None where that is fewer than ten, and where nothing is ever evaluated."""
    count = min(training.held_out, len(dataset) // SHARE)
    if count < LEAST or not training.evaluate_every:
        return dataset, None
    try:
        return dataset.split(count / len(dataset), SEED)
    except UndiffuseError:  # a class for each item
        return dataset, None


def draws(training: Training) -> int:
    """How many draws an evaluation has: as many as :data:`COST` allows, 64 to 1024, a multiple of the strata.

    An update costs three forward passes of its batch, an evaluation two of its draws (raw and averaged weights).
    """
    allowed = COST * 3 * training.batch_size * training.evaluate_every / 2
    return min(DRAWS, max(2 * STRATA, int(allowed) // STRATA * STRATA))


@dataclass(frozen=True)
class Evaluation:
    """One point of the curve. A loss that is not finite is None.

    Attributes:
        raw, ema: the loss of the weights and of their average.
        error: the standard error of ``ema`` over draws and items, times being stratified: how well the held-out part
            knows the loss.
        noise: that of the change of ``ema`` since about a fifth of the images seen ago; much smaller, as the draws are
            the same. None before there was such an evaluation.
        raw_bands, ema_bands: their means over each quarter of the draws, from little noise to much.
        probes: what each probe measured, by its name.
    """

    step: int
    images: int
    raw: float | None
    ema: float | None
    error: float | None
    noise: float | None
    raw_bands: tuple[float | None, ...]
    ema_bands: tuple[float | None, ...]
    probes: dict[str, dict[str, float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Probe:
    """A quality metric during training: few samples, the same seeds each time.

    Attributes:
        name: of its numbers' chart.
        measure: ``pipeline -> {name: value}``, called at every evaluation with the averaged weights. It must not
            change the pipeline; an :class:`UndiffuseError` is a warning and leaves a gap.
        floor: what real data score against other real data, by name; drawn as lines.
        every: in updates; 0 for every evaluation.
        best: the number whose lowest value so far decides what is kept in ``best_quality/``; "" for none.
    """

    name: str
    measure: Callable[[Pipeline], Mapping[str, float]]
    floor: Mapping[str, float] = field(default_factory=dict)
    every: int = 0
    best: str = ""


@final
class HeldOut:
    """Evaluates denoisers on a held-out part, always with the same draws.

    Attributes:
        count: draws an evaluation.
        times: ``[count]``, ascending.
        items: which item each draw takes: every item once before any twice.
    """

    def __init__(self, dataset: Dataset, recipe: Recipe, device: str | torch.device = "cpu") -> None:
        objective, schedule = recipe.objective, recipe.model.schedule
        self.dataset, self.recipe, self.device = dataset, recipe, torch.device(device)
        self.count = draws(recipe.training)
        times = objective.times.inner if isinstance(objective.times, Stratified) else objective.times
        self.times = times((torch.arange(self.count, dtype=torch.float64) + 0.5) / self.count, schedule)
        passes = range(math.ceil(self.count / len(dataset)))
        self.items = np.concatenate([epoch_order(SEED, i, len(dataset)) for i in passes])[: self.count]
        self.dropped = torch.rand(self.count, generator=generator(SEED, "held-out drop", 0))

    def losses(self, denoiser: Denoiser) -> Tensor:
        """The loss of each draw, ``[count]`` float64 on the CPU, by time."""
        size = max(1, self.recipe.training.batch_size // self.recipe.training.accumulation)
        with torch.no_grad(), evaluating(denoiser):
            parts = [self._part(denoiser, slice(k, min(k + size, self.count))) for k in range(0, self.count, size)]
        return torch.cat([part.cpu() for part in parts]).double()

    def evaluate(self, trainer: Trainer, curve: Curve) -> tuple[Evaluation, Tensor]:
        """The point that a trainer as it is now would add to the curve, and the averaged weights' loss of each draw."""
        raw, ema = self.losses(trainer.weights()), self.losses(trainer.pipeline().denoiser)
        before = curve.before(trainer.images)
        row = Evaluation(
            step=trainer.step,
            images=trainer.images,
            raw=finite(raw.mean()),
            ema=finite(ema.mean()),
            error=finite(self.standard_error(ema)),
            noise=None if before is None else finite(self.standard_error(ema - before)),
            raw_bands=self.bands(raw),
            ema_bands=self.bands(ema),
        )
        return row, ema

    @staticmethod
    def bands(losses: Tensor) -> tuple[float | None, ...]:
        """Means over quarters of the draws."""
        return tuple(finite(band.mean()) for band in losses.reshape(BANDS, -1))

    def standard_error(self, losses: Tensor) -> float:
        """Of the mean, had other items and noise been drawn at the same times: residuals about each stratum's mean,
        added up over each item, since an item's draws are alike (Liang & Zeger 1986, clustered errors)."""
        strata = losses.reshape(STRATA, -1)
        residuals = (strata - strata.mean(1, keepdim=True)).flatten()
        sums = torch.zeros(len(self.dataset), dtype=torch.float64)
        sums.index_add_(0, torch.from_numpy(self.items), residuals)
        lost = self.count / (self.count - STRATA)  # degrees of freedom of the strata's means
        return float((lost * sums.square().sum()).sqrt()) / self.count

    def band_names(self, schedule: Schedule) -> list[str]:
        """``log SNR 1.4 to 13.8``: the levels of each band, from little noise to much."""
        names = []
        for band in self.times.reshape(BANDS, -1):
            low, high = (round(float(schedule(float(t)).log_snr), 1) + 0.0 for t in (band[-1], band[0]))  # no -0.0
            names.append(f"log SNR {low} to {high}")
        return names

    def describe(self, whole: Dataset) -> str:
        """One line for the header of a run."""
        training = self.recipe.training
        cost = 2 * self.count / (3 * training.batch_size * training.evaluate_every)
        return (
            f"{len(self.dataset):,} of {len(whole):,} items, never trained on; loss of weights and average on "
            f"{self.count:,} frozen draws every {training.evaluate_every:,} updates, {cost:.0%} of the computation"
        )

    def _part(self, denoiser: Denoiser, part: slice) -> Tensor:
        objective = self.recipe.objective
        x0, told = told_of(denoiser.conditions, self.dataset, self.items[part], part.start)
        streams = [generator(SEED, "held-out noise", k) for k in range(part.start, part.stop)]
        eps = torch.stack([torch.randn(x0.shape[1:], generator=each) for each in streams])
        if objective.offset_noise:
            shift = torch.stack([torch.randn(x0.shape[1], generator=each) for each in streams])
            eps = offset_noise(eps, shift, objective.offset_noise)
        given = denoiser.null(len(x0))
        if denoiser.conditions is not None:
            given |= {name: values.to(self.device) for name, values in told.items()}
            given = denoiser.conditions.drop(given, self.dropped[part], objective.condition_dropout)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.training.precision == "bf16"):
            return loss(
                denoiser,
                x0.to(self.device),
                self.times[part],
                eps.to(self.device),
                objective.weight,
                huber=objective.huber,
                **given,
            )


@final
class Curve:
    """The evaluations of a run so far and the best of them: part of every checkpoint (trap R4).

    Attributes:
        rows: by step.
        best: the row with the lowest finite averaged loss, None before the first.
        kept: ``(images, losses)`` of the few evaluations that later ones are compared with.
    """

    def __init__(self) -> None:
        self.rows: list[Evaluation] = []
        self.best: Evaluation | None = None
        self.kept: list[tuple[int, Tensor]] = []

    def add(self, row: Evaluation, losses: Tensor) -> bool:
        """Append a point; whether it is the best so far. What is not finite never is (NF-4)."""
        if row.ema is not None and (not self.kept or row.images >= 1.1 * self.kept[-1][0]):
            self.kept.append((row.images, losses.float()))
        while len(self.kept) > 1 and AGO * self.kept[1][0] <= row.images:
            del self.kept[0]  # a later one is long enough ago
        return self._append(row)

    def before(self, images: int) -> Tensor | None:
        """The losses of an evaluation a fifth of ``images`` ago or a little more."""
        found = [losses for seen, losses in self.kept if AGO * seen <= images]
        return found[-1].double() if found else None

    def to_json(self) -> dict[str, Any]:
        """The curve as JSON values, for a checkpoint."""
        kept = [[images, losses.tolist()] for images, losses in self.kept]
        return {"rows": [asdict(row) for row in self.rows], "kept": kept}

    @staticmethod
    def from_json(stated: Mapping[str, Any]) -> Curve:
        """The curve in a checkpoint."""
        curve = Curve()
        for row in stated["rows"]:
            bands = {name: tuple(row[name]) for name in ("raw_bands", "ema_bands")}
            curve._append(Evaluation(**cast(dict[str, Any], {**row, **bands})))
        curve.kept = [(images, torch.tensor(losses, dtype=torch.float32)) for images, losses in stated["kept"]]
        return curve

    def improved(self, probe: Probe) -> bool:
        """Whether the last point is the best that the probe has seen in this run, before a resume or after (R4)."""
        found = [row.probes.get(probe.name, {}).get(probe.best) for row in self.rows]
        *before, last = found or [None]
        return last is not None and all(value is None or last < value for value in before)

    def _append(self, row: Evaluation) -> bool:
        self.rows.append(row)
        better = row.ema is not None and (self.best is None or self.best.ema is None or row.ema < self.best.ema)
        if better:
            self.best = row
        return better


def probe(probes: Sequence[Probe], pipeline: Pipeline) -> dict[str, dict[str, float | None]]:
    """The numbers of every probe; what is not finite is None, and what fails is warned of and left out."""
    found: dict[str, dict[str, float | None]] = {}
    for each in probes:
        try:
            found[each.name] = {name: finite(value) for name, value in each.measure(pipeline).items()}
        except UndiffuseError as error:
            message = f"the probe {each.name} failed ({error}); training goes on"
            warnings.warn(message, UndiffuseWarning, stacklevel=2)
    return found


def read_curves(run: str | Path) -> dict[str, tuple[tuple[int, float], ...]]:
    """``(images seen, value)`` of everything that a run has measured as it went, for its averaged weights: the held-out
    loss, by the name :data:`LOSS`, and each probe's numbers. Empty for a folder that is no run."""
    path = Path(run) / "held_out.jsonl"
    found: dict[str, list[tuple[int, float]]] = {}
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        row = json.loads(line)
        values = {LOSS: row["ema"]}
        for name, numbers in row["probes"].items():
            values |= {name if len(numbers) == 1 else f"{name}: {each}": value for each, value in numbers.items()}
        for name, value in values.items():
            if value is not None:
                found.setdefault(name, []).append((row["images"], value))
    return {name: tuple(points) for name, points in found.items()}


def finite(value: float | Tensor) -> float | None:
    """A number that JSON can hold, or None."""
    number = float(value)
    return number if math.isfinite(number) else None


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside, and after it what each part had before."""
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in before:
            part.training = mode
