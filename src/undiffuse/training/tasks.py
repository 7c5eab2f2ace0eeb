"""What a run learns: a module with weights, its loss, what is drawn for it, and what becomes of it.

Everything else (batches, gradients, AdamW, the average, checkpoints, the run folder) does not depend on it. There are
two: a denoiser, here, and a codec (:mod:`.autoencoding`).
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, final

import numpy as np
import torch
from torch import Tensor, nn

from ..config import load_json, write_bytes_atomic
from ..data import Dataset
from ..data.columns import in_words
from ..data.shown import read_shown, write_shown
from ..denoiser import terminal_snr_report
from ..distributed import Team
from ..errors import UndiffuseError, UndiffuseWarning
from ..objectives import loss, overlap
from ..outputs import suffixes, write_samples
from ..pipeline import BATCH, Pipeline
from .draws import told
from .recipe import Recipe, kind_of

if TYPE_CHECKING:
    from .held_out import Curve, Evaluation
    from .trainer import Trainer

PREVIEW_SEED = 0
"""The noise of every preview, and ``undiffuse sample``'s default: a preview is what it would write (trap X8)."""


ITEMS = 8
"""Real items of which previews ask for the conditions."""


NO_LATENTS = (
    "model.beside is a picture made of the data, and these are latents, which have other units and places: train "
    "without a codec (--set model.network.fold=2 makes large pictures cheaper)"
)


class Product(Protocol):
    """What becomes of the averaged weights."""

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> Path: ...


class Judge(Protocol):
    """Measures the weights on items that are never trained on (:class:`.HeldOut`, where a denoiser is learned)."""

    def describe(self, whole: Dataset) -> str: ...

    def evaluate(self, trainer: Trainer, curve: Curve) -> tuple[Evaluation, Tensor]: ...

    def band_names(self, schedule: Any) -> list[str]: ...


@dataclass(frozen=True, eq=False)
class Drawn:
    """What an update computes with besides the data: values with a row an item, by position and by name, and options
    that are the same for all. ``times``: of the values those that are noise levels, if any are."""

    values: tuple[Tensor, ...] = ()
    named: Mapping[str, Tensor] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    times: Tensor | None = None

    def rows(self, rows: slice | list[int]) -> Drawn:
        """What was drawn for some of the items."""
        named = {name: value[rows] for name, value in self.named.items()}
        times = None if self.times is None else self.times[rows]
        return Drawn(tuple(value[rows] for value in self.values), named, self.options, times)


class Task(ABC):
    """Abstract: what a run learns."""

    def __init__(self, dataset: Dataset, recipe: Recipe) -> None:
        self.dataset, self.recipe = dataset, recipe

    @abstractmethod
    def build(self) -> nn.Module:
        """The module, with fresh weights from torch's global generator."""

    @abstractmethod
    def trunk(self, module: Any) -> nn.Module:
        """The part of it whose blocks an optimiser may treat as matrices (:mod:`.muon`)."""

    @abstractmethod
    def loss(self, module: Any, *values: Any, **options: Any) -> Tensor:
        """Of each item, ``[B]``; called with the data and what :meth:`drawn` has drawn."""

    @abstractmethod
    def drawn(self, trainer: Trainer, given: dict[str, Tensor], step: int, team: Team) -> Drawn:
        """What this team's process computes update ``step`` (from 0) with: a function of (seed, step)."""

    @abstractmethod
    def written(self, drawn: Drawn) -> dict[str, Tensor]:
        """What was drawn, as a file holds it."""

    @abstractmethod
    def read(self, tensors: Mapping[str, Tensor]) -> Drawn:
        """:meth:`written` backwards; ``KeyError`` where something is missing."""

    def examine(self, trainer: Trainer, module: Any, x0: Tensor, given: dict[str, Tensor]) -> None:  # noqa: B027
        """Raise, after the first update, for a module that cannot learn."""

    def after(self, trainer: Trainer) -> None:  # noqa: B027
        """What is done to the weights after an update, besides the optimiser's step."""

    @abstractmethod
    def product(self, trainer: Trainer, module: Any, info: Mapping[str, Any]) -> Any:
        """What the averaged weights in ``module`` are for (:class:`Product`)."""

    @abstractmethod
    def exported(self, folder: Path) -> int:
        """After which update the product in a folder was written; raises where there is none."""

    @abstractmethod
    def judge(self, held_out: Dataset, device: torch.device) -> Judge:
        """How the held-out items are used."""

    @abstractmethod
    def preview(self, trainer: Trainer, whole: Dataset, folder: Path, run: str) -> Path | None:
        """Write what people look at while it learns, as ``preview-STEP`` into the folder; None: there is nothing."""

    @abstractmethod
    def describe(self, trainer: Trainer, data: str) -> list[str]:
        """Lines of the header: the data and what is learned, and the objective."""


def task_of(dataset: Dataset, recipe: Recipe) -> Task:
    """What a recipe learns."""
    if recipe.codec is None:
        return Diffusion(dataset, recipe)
    from .autoencoding import Autoencoding

    return Autoencoding(dataset, recipe)


@final
class Diffusion(Task):
    """A denoiser, of data or of their latents."""

    def __init__(self, dataset: Dataset, recipe: Recipe) -> None:
        super().__init__(dataset, recipe)
        self.config = recipe.config(dataset.spec)
        if "beside" in self.config.conditions and dataset.codec is not None:
            raise UndiffuseError(NO_LATENTS)

    def build(self) -> nn.Module:
        return self.config.build()

    def trunk(self, module: Any) -> nn.Module:
        return module.network

    def loss(self, module: Any, *values: Any, **options: Any) -> Tensor:
        return loss(module, *values, **options)

    def drawn(self, trainer: Trainer, given: dict[str, Tensor], step: int, team: Team) -> Drawn:
        return self._drawn(*trainer.noised(step, given, team))

    def _drawn(self, t: Tensor, eps: Tensor, cond: Mapping[str, Tensor]) -> Drawn:
        objective = self.recipe.objective
        return Drawn((t, eps), cond, {"weight": objective.weight, "huber": objective.huber}, times=t)

    def written(self, drawn: Drawn) -> dict[str, Tensor]:
        t, eps = drawn.values
        return {"t": t, "eps": eps, **{f"cond.{name}": values for name, values in drawn.named.items()}}

    def read(self, tensors: Mapping[str, Tensor]) -> Drawn:
        cond = {name.removeprefix("cond."): v for name, v in tensors.items() if name.startswith("cond.")}
        return self._drawn(tensors["t"].cpu(), tensors["eps"], cond)

    def examine(self, trainer: Trainer, module: Any, x0: Tensor, given: dict[str, Tensor]) -> None:
        from .trainer import check_inputs_matter

        check_inputs_matter(module, x0, given)

    def product(self, trainer: Trainer, module: Any, info: Mapping[str, Any]) -> Pipeline:
        sampling = self.recipe.sampling
        if not (module.conditions and module.conditions.asked):
            sampling = replace(sampling, guidance_scale=1.0)  # nothing to guide to
        spec, codec = self.dataset.original.spec, self.dataset.codec
        return Pipeline(module, self.config, spec, sampling, dict(info), codec=codec)

    def exported(self, folder: Path) -> int:
        return int(load_json(folder / "pipeline.json")["info"]["step"])

    def judge(self, held_out: Dataset, device: torch.device) -> Judge:
        from .held_out import HeldOut

        return HeldOut(held_out, self.recipe, device)

    def preview(self, trainer: Trainer, whole: Dataset, folder: Path, run: str) -> Path:
        """What ``undiffuse sample`` would write for the average as it is now, by the very same path."""
        pipeline, number = trainer.pipeline(), self.recipe.training.previews
        target = folder / f"preview-{trainer.step:06d}{suffixes(pipeline.spec)[0]}"
        options, asked = self._asked(pipeline, whole, folder)
        if number != 64 or "beside" in options:
            options["number"] = number
        asked |= {"seed": PREVIEW_SEED}
        write_samples(target, pipeline, number, pipeline.sampling, BATCH, None, run, options, **asked)
        return target

    def _asked(self, pipeline: Pipeline, whole: Dataset, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the previews ask for, as options of ``undiffuse sample`` and as :func:`.write_samples` takes it: every
        class in turn, or what real items are where they are more than their class; the same ones in all previews of a
        run, so that a column can be read across them, and held-out ones if there are any."""
        from .held_out import divide

        conditions = pipeline.denoiser.conditions
        if conditions is None or not set(conditions.asked) - {"classes"}:
            return {}, {}
        source = divide(whole, self.recipe.training)[1] or whole
        items = range(min(ITEMS, len(source)))
        _, rows = told(conditions, source, items)
        options: dict[str, Any] = {}
        asked: dict[str, Any] = {"cond": {}}
        if "classes" in rows:
            asked["classes"] = rows["classes"].tolist()
            options["classes"] = ",".join(map(str, asked["classes"]))
        if pipeline.takes_prompts:
            options["prompt"] = asked["prompts"] = whole.captions(items)
        for name, words in in_words(pipeline.spec, {name: each.numpy() for name, each in rows.items()}).items():
            asked["cond"][name] = words
            said = [f"{name}={'none' if each is None else each}" for each in words]
            options["cond"] = [*options.get("cond", []), *said]
        if "beside" in rows and pipeline.beside is not None:
            file, buffer = folder / "beside.npy", BytesIO()
            np.save(buffer, write_shown(rows["beside"], pipeline.beside), allow_pickle=False)
            write_bytes_atomic(file, buffer.getvalue())
            options["beside"] = str(file)
            asked["cond"]["beside"] = read_shown(file, pipeline.beside, holes=pipeline.fills_holes)
        return options, asked

    def describe(self, trainer: Trainer, data: str) -> list[str]:
        recipe, dataset = self.recipe, self.dataset
        model, objective = recipe.model, recipe.objective
        dropped = f", {objective.condition_dropout:.0%} of conditions dropped" if self.config.conditions else ""
        extras = (f", Huber {objective.huber:g}" if objective.huber else "") + (
            f", offset noise {objective.offset_noise:g}" if objective.offset_noise else ""
        )
        own = " with " + ", ".join(f"{name} {value}" for name, value in model.network.items()) if model.network else ""
        visited = recipe.sampling.grid.times(model.schedule, recipe.sampling.steps)
        trained = overlap(objective.times, model.schedule, visited)
        if trained < 0.5:
            warnings.warn(
                f"training draws cover only {trained:.0%} of the noise levels that sampling visits, so some are hardly "
                "trained: choose objective.times and sampling.grid that agree",
                UndiffuseWarning,
                stacklevel=2,
            )
        return [
            f"data       {data}: {dataset.describe()}; {self.config.network} {model.size}{own}, "
            f"{recipe.cost(dataset.spec)}{f'; augmented: {recipe.augment}' if recipe.augment else ''}",
            f"objective  {kind_of(model.prediction)} prediction, {kind_of(model.schedule)} schedule with "
            f"{terminal_snr_report(model.schedule)}; {kind_of(objective.times)} times, {kind_of(objective.weight)} "
            f"weight{dropped}{extras}; covers {trained:.0%} of the levels of sampling",
        ]
