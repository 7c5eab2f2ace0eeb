"""What is judged: a model's samples, drawn now and kept, or samples that somebody has made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import header_data_from_array_1_0, write_array_header_1_0
from tqdm import tqdm

from ..asking import Sampling
from ..codecs import FILE as CODEC
from ..config import from_json, load_json, to_json, write_bytes_atomic
from ..data import DATASETS, Dataset, columns
from ..data.base import ArrayDataset, digest
from ..distributed import ALONE, Team
from ..errors import UndiffuseError, choose
from ..outputs import describe
from ..pipeline import BATCH, REGISTRIES, Pipeline, find_pipeline, is_pipeline
from ..training.draws import told
from ..training.held_out import divide
from ..training.recipe import Recipe
from .extraction import PLANS, opened, pick
from .features import Features, aligned, described, fills_little, units_unknown


@dataclass(frozen=True, eq=False)
class Judged:
    """Samples: where they are, which classes they should be of, and all that it takes to have them again.

    ``source``   a data set, or an array ``[N, ...]``
    ``labels``   int64 ``[N]``, classes of the *reference*; None where nothing is known of them
    ``facts``   JSON, for the report
    ``fingerprint``   of the samples' making: weights and settings, or the content of the files
    ``span``   the range of a bare real array, as for :func:`extract`
    """

    source: Dataset | np.ndarray
    labels: np.ndarray | None
    facts: dict[str, Any]
    fingerprint: str
    span: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def values(self, rows: np.ndarray) -> np.ndarray:
        """Some samples in their own units."""
        return self.source.values(rows) if isinstance(self.source, Dataset) else np.asarray(self.source[rows])

    def aligned(self, features: Features, rows: np.ndarray) -> np.ndarray:
        """Some samples in the units of the data, as the features saw them."""
        spec = self.source.spec if isinstance(self.source, Dataset) else features.described(self.source, self.span)[1]
        return features.aligned(self.values(rows), spec)


# --- a model ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Judgeable:
    """A model that is to be judged, and the run that it is of, if there is one.

    ``run``   the run folder; ``recipe`` and ``trained_on`` (the fingerprint of its data) are None where it says nothing
    """

    pipeline: Pipeline
    folder: Path
    run: Path | None = None
    recipe: Recipe | None = None
    trained_on: str | None = None

    def parts(self, data: Dataset) -> tuple[Dataset, Dataset | None] | None:
        """What of ``data`` the run was trained on and what it held out; None if it was trained on others, or if it is
        not known on what."""
        if self.recipe is None or self.trained_on != data.fingerprint:
            return None
        return divide(data, self.recipe.training)


def is_model(path: str | os.PathLike[str]) -> bool:
    """Whether this names a model: a folder of one, a run folder, or a run in ./runs (but no data set). Raises for a run
    that has none: its previews are no samples."""
    folders = [Path(path)] + ([] if str(path) in DATASETS or Path(path).exists() else [Path("runs") / path])
    places = [folder / inner for folder in folders for inner in ("", "model")]
    if any(is_pipeline(place) for place in places):
        return True
    if any((place / name).is_file() for place in places for name in ("status.json", CODEC)):
        find_pipeline(os.fspath(path))  # says why it is none
    return False


def open_model(path: str | os.PathLike[str], device: str) -> Judgeable:
    """The model that ``path`` names, and what its run says of itself. Runs of versions whose recipes cannot be read any
    more are models without a run."""
    folder = find_pipeline(os.fspath(path))
    pipeline = Pipeline.load(folder, device)
    run = folder.parent
    try:
        stated = load_json(run / "config.json")
        held_out = "held_out" in stated  # earlier versions held nothing out
        recipe = from_json(Recipe, stated["recipe"], str(run / "config.json"), REGISTRIES) if held_out else None
        trained_on = stated["dataset"].get("original", stated["dataset"]["fingerprint"])  # latents are of something
        return Judgeable(pipeline, folder, run, recipe, str(trained_on))
    except (UndiffuseError, OSError, KeyError, TypeError):
        return Judgeable(pipeline, folder, run if (run / "config.json").is_file() else None)


def class_plan(model: Pipeline, data: Dataset, n: int, plan: str) -> tuple[list[int] | None, str]:
    """The class that each of ``n`` samples is asked for, and what the report says of it (trap G6).

    With the shares of the data, or equal ones, mixed evenly so that the first samples are of all classes. None for a
    model without classes.
    """
    choose("class plan", plan, PLANS)
    if model.denoiser.conditions is None or "classes" not in model.denoiser.conditions.names:
        return None, "the model has no classes"
    names, known = model.spec.classes, {name: k for k, name in enumerate(data.spec.classes)}
    if plan == "data" and (data.labels is None or not set(names) <= set(known)):
        raise UndiffuseError(
            f"{data.name} does not have the classes of the model, so they cannot be as frequent as there; take "
            "--plan uniform"
        )
    present = np.bincount(data.labels, minlength=len(known)) if data.labels is not None else np.zeros(0, np.int64)
    sizes = np.array([present[known[name]] if plan == "data" else 1 for name in names])
    counts = PLANS[plan](sizes, n)
    order = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    asked = np.repeat(np.arange(len(names)), counts)[np.argsort(order, kind="stable")]
    return asked.tolist(), {"data": "as frequent as in the data", "uniform": "equally many of each"}[plan]


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked of the samples.

    ``plan``, ``said``   for the report, None where there is no choice
    ``classes``, ``cond``   as :meth:`.Pipeline.draw` takes them
    ``labels``   the classes of the data that the samples should be of, int64 ``[N]``, where that is known
    ``texts``   the captions that they are asked for ``[N]``
    ``missing``   what the model could be asked for, and the data do not say
    """

    plan: str | None
    said: str
    classes: list[int] | None = None
    cond: dict[str, torch.Tensor] | None = None
    labels: np.ndarray | None = None
    texts: tuple[str, ...] | None = None
    missing: tuple[str, ...] = ()

    @property
    def content(self) -> str:
        """A hash of the conditions beyond classes; empty if there are none."""
        return digest(*(f"{k} {v.numpy().tobytes().hex()}" for k, v in self.cond.items())) if self.cond else ""


def ask(model: Pipeline, data: Dataset, n: int, plan: str, source: Dataset | None = None) -> Asked:
    """What ``n`` samples are asked for that are to be judged against ``data``: of a model of classes, these by the
    class plan; of one that takes more, what is known of real items, those of ``source`` (by default the data), each
    once before any twice."""
    conditions, names = model.denoiser.conditions, {name: k for k, name in enumerate(data.spec.classes)}
    known = np.array([names.get(name, -1) for name in model.spec.classes], np.int64)
    if conditions is None or not set(conditions.asked) - {"classes"}:
        classes, said = class_plan(model, data, n, plan)
        labels = known[classes] if classes is not None and (known >= 0).all() else None
        return Asked(plan if classes is not None else None, said, classes, None, labels)
    if choose("class plan", plan, PLANS) is not PLANS["data"]:
        raise UndiffuseError(
            f"--plan {plan} is for models of classes alone; this one takes {', '.join(conditions.asked)}"
        )
    source = data if source is None else source
    items = translated(model, source, n)
    _, rows = told(conditions, items, range(len(items)))
    rows = {name: values for name, values in rows.items() if name in conditions.asked}
    missing = tuple(name for name in conditions.asked if name not in rows)
    of = f"what is known of {len(items):,} {'items of the data' if source is data else 'held-out items'}"
    said = f"{of}: {', '.join(rows)}" if rows else "nothing in particular"
    said += f" (these data have no {', '.join(missing)})" if missing else ""
    each, labels = np.arange(n) % len(items), None
    if "classes" in rows and (known >= 0).all():
        labels = known[rows["classes"].numpy()[each]]
    texts = items.captions(each) if "text" in rows else None
    return Asked("items", said, None, rows, labels, None if texts is None else tuple(texts), missing)


def translated(pipeline: Pipeline, data: Dataset, most: int) -> ArrayDataset:
    """At most ``most`` items, in memory, in the model's own units, and what is known of them in its own terms."""
    rows = pick(data, min(most, len(data)))
    values = data.values(rows)
    pipeline.spec.to_model(values[:1])  # refuses another kind, shape or range
    names = {name: k for k, name in enumerate(pipeline.spec.classes)}
    labels = None
    if data.labels is not None and set(data.spec.classes) <= set(names):
        labels = np.array([names[name] for name in data.spec.classes])[data.labels[rows]]
    known = columns.translated(data.told(rows), data.spec, pipeline.spec)
    found = ArrayDataset(pipeline.spec, values, labels, name=data.name, columns=known)
    found.texts = data.captions(rows)
    return found


def draw(
    model: Judgeable,
    data: Dataset,
    n: int,
    *,
    keep: Path,
    plan: str = "data",
    seed: int = 0,
    sampling: Sampling | None = None,
    batch_size: int = BATCH,
    team: Team = ALONE,
) -> Judged | None:
    """``n`` samples of ``model`` as an ``.npy`` in the folder ``keep``: from there if they were drawn before. Each
    process of a ``team`` draws its share of the batches, and the first has them all; the others get None.

    Sample i is a function of the seed, i and its class, so the file's name holds all that decides them.
    """
    pipeline, settings = model.pipeline, sampling or model.pipeline.settings()
    if batch_size < 1:
        raise UndiffuseError(f"--batch-size {batch_size}: at least 1")
    parts = model.parts(data)
    asked = ask(pipeline, data, n, plan, None if parts is None else parts[1])
    more = [asked.content] * (asked.cond is not None)
    stated = to_json(settings, REGISTRIES)
    config = pipeline.config
    meaning = [to_json(part, REGISTRIES) for part in (config.schedule, config.prediction, config.label)]
    of = digest(pipeline.fingerprint, repr(meaning), repr(config.input_scale), pipeline.spec.stated)
    made = digest(of, repr(stated), repr((seed, asked.classes)), *more)[:16]
    what = repr((seed, n, asked.classes))
    key = digest("samples 2", of, repr(stated), what, str(pipeline.device.type), *more)
    # Refuses what cannot be sampled, before any file.
    pipeline.begin(1, seed=seed, classes=asked.classes, cond=asked.cond, sampling=settings)
    path = keep / f"samples-{key[:16]}.npy"
    if not team.tell(path.is_file()):
        _draw(pipeline, n, seed, asked, settings, batch_size, path, team)
    if not team.first:
        return None
    facts = {
        "kind": "model",
        "path": str(model.folder),
        "weights": pipeline.fingerprint,
        "of": pipeline.info,
        **describe(settings),
        "calls": pipeline.calls(settings),
        "sampling": stated,
        "seed": seed,
        "plan": asked.plan,
        "plan_in_words": asked.said,
        "missing": list(asked.missing),
        "kept": str(path),
    }
    values = np.load(path, mmap_mode="r", allow_pickle=False)
    known = ArrayDataset(pipeline.spec, values, None, name=str(model.folder), content=key)
    known.texts = asked.texts
    return Judged(known, asked.labels, facts, made)


def _draw(
    pipeline: Pipeline,
    n: int,
    seed: int,
    asked: Asked,
    sampling: Sampling,
    batch_size: int,
    path: Path,
    team: Team,
) -> None:
    """The samples, a batch in model units at a time. The file appears when it is whole."""
    mine = team.mine(range(n), batch_size)
    values = np.empty((len(mine), *pipeline.spec.original_shape), np.dtype(pipeline.spec.dtype))
    with (
        team.agree(),
        tqdm(total=len(mine), desc="sampling", unit="sample", leave=False, disable=None if team.first else True) as bar,
    ):
        for start in range(0, len(mine), batch_size):
            numbers = mine[start : start + batch_size]

            def tick(done: int, total: int, start: int = start, count: int = len(numbers)) -> None:
                bar.update(start + count * done // total - bar.n)

            x = pipeline.draw(
                numbers,
                seed=seed,
                classes=asked.classes,
                cond=asked.cond,
                sampling=sampling,
                batch_size=batch_size,
                progress=tick,
            )
            values[start : start + len(numbers)] = pipeline.spec.to_data(x)
    values = team.gather(values)
    with team.agree():
        if team.first:
            path.parent.mkdir(parents=True, exist_ok=True)
            header = BytesIO()
            write_array_header_1_0(header, header_data_from_array_1_0(values))
            write_bytes_atomic(path, header.getvalue(), np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


# --- samples that are there -------------------------------------------------------------------------------------------


def open_samples(source: str | os.PathLike[str], data: Dataset, span: tuple[float, float] | None = None) -> Judged:
    """Samples in a folder, an array file, or whatever else ``train`` takes; with classes where they say of which they
    are, and the data know these. Refuses those of another shape, or in units that nobody has said."""
    found = opened(data.spec, str(source))
    labels, content = None, ""
    if isinstance(found, Dataset):
        if span is not None:
            raise UndiffuseError(f"{source}: --span is for bare arrays (.npy), these samples say their own range")
        aligned(found.values(range(1)), found.spec, data.spec)
        content = found.fingerprint
        names = {name: k for k, name in enumerate(data.spec.classes)}
        if found.labels is not None and data.labels is not None and set(found.spec.classes) <= set(names):
            labels = np.array([names[name] for name in found.spec.classes])[found.labels]
    else:
        values, spec = described(found, data.spec, span)
        aligned(values[:1], spec, data.spec)
        whole = values.dtype.kind in "ui" and span is None
        if whole and fills_little(float(values.min()), float(values.max()), spec):
            raise units_unknown(values, data.spec)
        rows = 1 + (1 << 24) // max(1, found[:1].nbytes)
        parts = (np.ascontiguousarray(found[i : i + rows]).tobytes() for i in range(0, len(found), rows))
        content = digest(str(found.dtype), repr(found.shape), *parts)
    facts = {"kind": "files", "path": str(source), "content": content}
    return Judged(found, labels, facts, content[:16], span)
