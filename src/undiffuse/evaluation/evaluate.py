"""One evaluation from end to end: samples against data, every number with all that it takes to have it again.

What must be equal before two numbers may stand in one table is hashed into :attr:`.Evaluation.fingerprint`: the data
and which items of it, the split that gives the floor, the features with their weights and preprocessing, how many
samples, and the class plan. How the samples were made is a second hash, ``samples["fingerprint"]``.
"""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import safetensors
import torch

from .. import __version__
from ..asking import Sampling
from ..config import write_json_atomic
from ..data import Dataset
from ..data.base import ArrayDataset, digest
from ..data.latents import latent_spec
from ..distributed import ALONE, Team
from ..errors import UndiffuseError, choose
from ..objectives import Stratified, UniformTimes
from ..pipeline import BATCH, Pipeline
from ..training.draws import told
from ..training.held_out import HeldOut
from ..training.recipe import Model, Objective, Recipe, Training
from .classes import ClassBalance, class_balance
from .extraction import Extracted, extract, make_features, pick, reference_features
from .features import Features, aligned
from .memorisation import LEAST, REFERENCE, Memorisation, memorisation
from .metrics import METRICS, Examples, Figure, fitting, measure
from .report import Evidence, write_report
from .result import FORMAT, Evaluation, earlier
from .samples import Judgeable, Judged, draw, open_samples, translated

SAMPLES = 2000
"""How many samples are drawn unless asked otherwise, at least."""
MOST_DATA = 100_000
"""So many items of the data are looked at; of more, so many drawn at random."""
LOW = 64
"""Up to so many dimensions points and arrays are also compared by metrics of low-dimensional data."""
PIXEL_WORK = 4e11
"""Multiplications that comparing pixels with the training set may take: about half a minute of one core."""
PIXEL_ROOM = 2**30
"""Bytes that its pixels may take."""


def evaluate_samples(
    samples: Judgeable | str | os.PathLike[str],
    data: Dataset,
    *,
    features: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    download: bool = False,
    number: int | None = None,
    metrics: Sequence[str] | None = None,
    held_out: Dataset | None = None,
    extrapolate: bool = False,
    likelihood: int = 0,
    plan: str = "data",
    seed: int = 0,
    sampling: Sampling | None = None,
    batch_size: int = BATCH,
    span: tuple[float, float] | None = None,
    cache: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    out: str | os.PathLike[str] = "evaluation",
    allow_small: bool = False,
    command: str = "",
    team: Team = ALONE,
) -> Evaluation:
    """Judge ``samples`` (a model, or a folder or file of them) against ``data``, and write the report.

    Args:
        features: a name of ``FEATURES``; None: what suits the data.
        weights, download: of the features, as for :func:`make_features`.
        number: how many samples of a model; None: 2,000, or four times the features if that is more, or half of the
            data if that is less. Of files, at most so many, the first ones.
        metrics: names of ``METRICS``; None: all that fit.
        held_out: real data that the model was not trained on: the floor is theirs, and memorisation is judged by them.
        extrapolate: also the Frechet distance at infinite n.
        likelihood: of so many held-out items the bits a dimension, for models.
        plan: how often each class is asked for: ``data`` or ``uniform``.
        seed: of the samples; sample i is a function of it, i and its class.
        span: the range of bare real arrays, as for :func:`extract`.
        out: a folder is made in here, named by what was measured.
        allow_small: give the Frechet distance of fewer rows than dimensions too (trap V4).
        command: for the report.
        team: the processes that share the sampling; each gets the result, and the first writes it.

    Raises:
        UndiffuseError: samples that do not fit the data; a metric that was named and cannot be had; nothing to measure.
    """
    begun, notes = time.monotonic(), []
    for name in metrics or ():
        choose("metric", name, METRICS)
    if metrics is not None and not metrics:
        raise UndiffuseError(f"no metric is named; leave --metrics out for all, or choose from: {', '.join(METRICS)}")
    if number is not None and number < 2:
        raise UndiffuseError(f"-n {number}: at least 2 samples are needed")
    model = samples if isinstance(samples, Judgeable) else None
    if model is None and likelihood:
        raise UndiffuseError("--likelihood is of a model, not of samples")
    out = Path(out)
    chosen, judged, n = None, None, number
    with team.agree():
        if team.first:  # what does not fit is refused before anything is learned or drawn
            if held_out is not None:
                _like(data, held_out)
            if isinstance(samples, Judgeable):
                spec = samples.pipeline.spec
                aligned(spec.to_data(torch.zeros(1, *spec.shape)), spec, data.spec)
            else:
                judged = open_samples(samples, data, span)
                if number is not None and number > len(judged):
                    raise UndiffuseError(f"{samples}: has {len(judged):,} samples, -n {number:,} were asked for")
            chosen = make_features(features, data, weights=weights, download=download, cache=cache, device=device)
            if model is not None:
                n = number or sensible(chosen, len(data if held_out is None else held_out), held_out is None)
    if model is not None:
        n = team.tell(n)
        judged = draw(
            model, data, n, keep=out, plan=plan, seed=seed, sampling=sampling, batch_size=batch_size, team=team
        )
    if not team.first:  # it has drawn its share; the rest is done by one
        return Evaluation(**team.tell())
    assert chosen is not None
    assert judged is not None
    if missing := judged.facts.get("missing"):
        notes.append(f"the data do not say {', '.join(missing)}, which the model takes: it was not asked for that")
    some = np.arange(len(judged) if number is None else number)
    drawn = extract(chosen, judged.source, some, span=span)
    labels = None if judged.labels is None else judged.labels[some]
    reference = min(len(data), MOST_DATA)
    if reference < len(data):
        notes.append(f"{reference:,} of {len(data):,} items of the data were drawn at random; the others play no part")
    indices = pick(data, reference)
    real = reference_features(chosen, data, reference, cache=cache)
    other = None if held_out is None else extract(chosen, held_out)

    these = _examples(chosen, judged, some, drawn, labels)
    those = _examples(chosen, data, indices, real, _labels(real))
    apart = None
    if held_out is not None and other is not None:
        theirs = _relabelled(held_out, data) if held_out.labels is not None else None
        apart = _examples(chosen, held_out, np.arange(len(held_out)), other, theirs)
    figures, refused = _figures(these, those, apart, metrics, extrapolate, allow_small)
    n = next(iter(figures.values())).n
    if n < len(drawn):
        most = "half of the data" if held_out is None else "the held-out items"
        notes.append(f"{n:,} of the {len(drawn):,} samples, drawn at random, are compared: at most as many as {most}")

    parts = None if model is None else model.parts(data)
    repeated, pairs = _memorisation(chosen, judged, some, drawn, data, indices, real, other, parts, model, notes)
    balance = None
    if drawn.probabilities is not None and real.probabilities is not None:
        guesses = drawn.probabilities.argmax(1).numpy(), real.probabilities.argmax(1).numpy()
        balance = class_balance(*guesses, classes=len(data.spec.classes))
    unseen = held_out if held_out is not None else None if parts is None else parts[1]
    losses = None if model is None else _losses(model, unseen, data, device, notes)
    bits = None if model is None or not likelihood else _likelihood(model.pipeline, unseen, data, likelihood, notes)

    split = next(iter(figures.values())).split
    fingerprint = digest(
        f"evaluation {FORMAT}",
        chosen.fingerprint,
        data.fingerprint,
        indices.tobytes(),
        "" if held_out is None else held_out.fingerprint,
        split,
        repr(sorted({figure.n for figure in figures.values()})),
        str(judged.facts.get("plan") or "data"),
    )[:16]
    told = digest(judged.fingerprint, fingerprint, repr(metrics), repr((extrapolate, likelihood, allow_small)))
    facts = {**judged.facts, "n": len(drawn), "fingerprint": judged.fingerprint}
    name = f"{data.name if '/' not in data.name else Path(data.name).name}-{chosen.name}-{len(drawn)}"
    folder = out / f"{''.join(c if c.isalnum() or c in '.-' else '-' for c in name)}-{told[:6]}"
    result = Evaluation(
        fingerprint=fingerprint,
        samples=facts,
        data=_described(data, held_out, reference, split),
        features={
            "name": chosen.name,
            "dim": chosen.dim,
            "preprocessing": chosen.preprocessing,
            "weights_sha256": chosen.weights,
            "fingerprint": chosen.fingerprint,
            **chosen.facts,
        },
        metrics={name: entry(figure) for name, figure in figures.items()},
        refused=refused,
        memorisation=repeated,
        classes=None if balance is None else _balance(balance, data.spec.classes),
        losses=losses,
        likelihood=bits,
        notes=notes,
        environment=environment(device),
        command=command,
        seconds=round(time.monotonic() - begun, 1),
        path=str(folder),
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / "evaluation.json", vars(result))
    write_report(
        result,
        Evidence(judged, drawn, data, chosen, pairs, None if model is None else model.run),
        folder,
        earlier(out, folder),
    )
    team.tell(vars(result))
    return result


def sensible(features: Features, there: int, divided: bool) -> int:
    """How many samples are worth drawing: for a Frechet distance that could be extrapolated; at most as many as there
    are real rows to stand beside them."""
    return max(2, min(max(SAMPLES, 4 * features.dim), there // 2 if divided else there))


def entry(figure: Figure) -> dict[str, Any]:
    """A figure as JSON."""
    return {
        "value": figure.value,
        "interval": [figure.low, figure.high],
        "floor": figure.floor,
        "floor_interval": None if figure.floor is None else [figure.floor_low, figure.floor_high],
        "n": figure.n,
        "n_data": figure.n_data,
        "better": figure.better,
        "interval_by": figure.interval,
        "note": figure.note,
    }


def environment(device: str) -> dict[str, Any]:
    """The versions that numbers depend on, and where they were found."""
    return {
        "undiffuse": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "safetensors": safetensors.__version__,
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
    }


# --- the two sides ----------------------------------------------------------------------------------------------------


def _examples(
    features: Features, source: Dataset | Judged, which: np.ndarray, found: Extracted, labels: np.ndarray | None
) -> Examples:
    """What the metrics look at; the values themselves in the units of the data."""
    spec, vectors, videos = features.spec, None, None
    low = spec.kind in ("points", "array") and math.prod(spec.shape) <= LOW
    moving = spec.kind == "video" and 4 * len(which) * math.prod(spec.shape) <= PIXEL_ROOM
    if low or moving:
        judged = isinstance(source, Judged)
        values = source.aligned(features, which) if judged else features.aligned(source.values(which), source.spec)
        if low:
            vectors = values.reshape(len(which), -1)
        else:
            channels = spec.layout.find("C")
            videos = np.moveaxis(values, 1 + channels, 1) if channels >= 0 else values[:, None]
    return Examples(
        features=found.features,
        vectors=vectors,
        probabilities=found.probabilities,
        labels=labels,
        images=None if found.texts is None else found.features,
        texts=found.texts,
        videos=videos,
    )


def _labels(found: Extracted) -> np.ndarray | None:
    return None if found.labels is None else found.labels.numpy()


def _like(data: Dataset, held_out: Dataset) -> None:
    """Refuses held-out data of another shape."""
    if held_out.spec.shape != data.spec.shape:
        raise UndiffuseError(
            f"--held-out {held_out.name} is of shape {list(held_out.spec.shape)}, the data {list(data.spec.shape)}"
        )


def _relabelled(source: Dataset, target: Dataset) -> np.ndarray | None:
    """The labels of ``source`` as numbers of ``target``'s classes, None if they are others."""
    names = {name: k for k, name in enumerate(target.spec.classes)}
    if source.labels is None or not set(source.spec.classes) <= set(names):
        return None
    return np.array([names[name] for name in source.spec.classes])[source.labels]


def _figures(
    samples: Examples,
    data: Examples,
    held_out: Examples | None,
    metrics: Sequence[str] | None,
    extrapolate: bool,
    allow_small: bool,
) -> tuple[dict[str, Figure], dict[str, str]]:
    """Every figure that can be had. A metric that was not asked for by name and cannot be had says why."""
    names = fitting(samples, data, held_out) if metrics is None else list(metrics)
    if extrapolate and "frechet_infinity" not in names:
        names.insert(names.index("frechet") + 1 if "frechet" in names else 0, "frechet_infinity")
    figures: dict[str, Figure] = {}
    refused: dict[str, str] = {}
    for name in names:
        try:
            figures |= measure(samples, data, [name], held_out=held_out, allow_small=allow_small)
        except UndiffuseError as error:
            if metrics is not None or len(samples) < 2:
                raise
            remedy = "; take more samples (-n), features of fewer dimensions (--features), or --allow-small"
            refused[name] = str(error).partition(": give")[0] + (remedy if ": give" in str(error) else "")
    if not figures:
        raise UndiffuseError("; ".join(dict.fromkeys(refused.values())))
    return figures, refused


# --- memorisation -----------------------------------------------------------------------------------------------------


def _memorisation(
    features: Features,
    judged: Judged,
    some: np.ndarray,
    drawn: Extracted,
    data: Dataset,
    indices: np.ndarray,
    real: Extracted,
    other: Extracted | None,
    parts: tuple[Dataset, Dataset | None] | None,
    model: Judgeable | None,
    notes: list[str],
) -> tuple[dict[str, Any] | None, tuple[tuple[int, int, float], ...]]:
    """In feature space and, for pictures, in pixels. The closest pairs are those in pixels where there are any."""
    kept = np.zeros(len(indices), bool)
    if parts is not None and parts[1] is not None:  # what the run itself held out
        kept = np.isin(indices, parts[1].origin(range(len(parts[1]))))
    trained = np.flatnonzero(~kept)
    if model is None:
        of = f"all {len(indices):,} items looked at; it is not known which of them the samples' model was trained on"
    elif parts is None:
        of = f"all {len(indices):,} items looked at; the run does not say that it was trained on these data"
    else:
        of = f"the {len(trained):,} items that the run was trained on"
    rows = real.features.numpy()
    unseen = other.features.numpy() if other is not None else rows[kept] if kept.sum() >= LEAST else None
    try:
        found = memorisation(drawn.features.numpy(), rows[trained], unseen)
    except UndiffuseError as error:
        notes.append(f"memorisation was not judged: {error}")
        return None, ()
    result = {**found.to_json(), "space": features.name, "of": of, "pixels": None}
    pairs = _pairs(found, some, indices[trained])
    if not data.spec.has_pictures:
        return result, pairs
    size = math.prod(data.spec.shape)
    work = 2.0 * len(trained) * size
    affordable = int(PIXEL_WORK / work)
    if 4 * len(indices) * size > PIXEL_ROOM or affordable < 4 * LEAST:
        notes.append("pixels were not compared with the training set, which is too large; features were")
        return result, pairs
    shifts = 1 if 9 * (len(some) + REFERENCE) <= affordable and min(data.spec.shape[1:]) > 2 else 0
    most = affordable // (9 if shifts else 1)
    judged_rows = some[: max(LEAST, most - min(REFERENCE, most // 2))]
    training = data.spec.to_model(data.values(indices[trained])).numpy()
    reference = training if not kept.any() else data.spec.to_model(data.values(indices[kept])).numpy()
    # Of the training rows themselves only some are held against the others: the same number of work as the samples.
    held = None if reference is training or len(reference) < LEAST else reference[: most // 2]
    pictures = data.spec.to_model(judged.aligned(features, judged_rows)).numpy()
    try:
        near = memorisation(pictures, training, held, shifts=shifts)
    except UndiffuseError as error:
        notes.append(f"memorisation was not judged in pixels: {error}")
        return result, pairs
    result["pixels"] = {**near.to_json(), "shifts": shifts, "n": len(judged_rows)}
    return result, _pairs(near, judged_rows, indices[trained])


def _pairs(found: Memorisation, some: np.ndarray, rows: np.ndarray) -> tuple[tuple[int, int, float], ...]:
    """By the numbers of the samples and of the data's items."""
    for pair in found.closest:
        assert pair.sample < len(some)
    return tuple((int(some[p.sample]), int(rows[p.training]), p.distance) for p in found.closest)


# --- models -----------------------------------------------------------------------------------------------------------


def _losses(
    model: Judgeable, unseen: Dataset | None, data: Dataset, device: str, notes: list[str]
) -> dict[str, Any] | None:
    """The held-out loss by noise level: the run's own objective if that is known, else the plain one."""
    pipeline = model.pipeline
    plain = Recipe("evaluation", Model(schedule=pipeline.config.schedule), Objective(Stratified(UniformTimes())))
    recipe = model.recipe or plain
    recipe = replace(recipe, training=Training(batch_size=BATCH, evaluate_every=10_000))
    try:
        items = translated(pipeline, unseen if unseen is not None else data, 1024)
    except UndiffuseError as error:
        notes.append(f"the loss by noise level was not measured: {error}")
        return None
    held = HeldOut(items if pipeline.codec is None else _latents(pipeline, items), recipe, device)
    losses = held.losses(pipeline.denoiser)
    bands = losses.reshape(len(held.bands(losses)), -1)
    return {
        "objective": "the run's own" if model.recipe is not None else "unit weight, uniform times",
        "items": len(items),
        "unseen": unseen is not None,
        "draws": held.count,
        "loss": float(losses.mean()),
        "error": held.standard_error(losses),
        "levels": [
            {"level": name, "loss": float(band.mean()), "error": float(band.std() / math.sqrt(len(band)))}
            for name, band in zip(held.band_names(pipeline.config.schedule), bands, strict=True)
        ],
    }


def _likelihood(
    pipeline: Pipeline, unseen: Dataset | None, data: Dataset, count: int, notes: list[str]
) -> dict[str, Any] | None:
    """Bits a dimension of ``count`` items (trap V12: the kind and the error of the probes are stated)."""
    try:
        items = translated(pipeline, unseen if unseen is not None else data, count)
    except UndiffuseError as error:
        notes.append(f"the likelihood was not measured: {error}")
        return None
    conditions = pipeline.denoiser.conditions
    _, rows = told(conditions, items, range(len(items)))
    rows = {name: values for name, values in rows.items() if conditions is not None and name in conditions.asked}
    found = pipeline.log_likelihood(items.values(range(len(items))), cond=rows)
    bits, n = found.bits_per_dim, len(found.log_prob)
    return {
        "bits_per_dim": float(bits.mean()),
        "error": float(bits.std() / math.sqrt(n)) if n > 1 else None,
        "error_of_probes": float(found.bits_error.square().mean().sqrt() / math.sqrt(n)),
        "kind": found.kind,
        "start": found.start,
        "items": n,
        "unseen": unseen is not None,
        "of_their_class": "classes" in rows,
        "known": list(rows),
    }


def _latents(pipeline: Pipeline, items: ArrayDataset) -> ArrayDataset:
    """What the denoiser sees of items, in memory."""
    assert pipeline.codec is not None
    z = pipeline.encode(items.batch(range(len(items)))[0]).cpu().numpy()
    spec = latent_spec(items.spec, pipeline.codec)
    found = ArrayDataset(spec, z, items.labels, name=items.name, columns=items.columns)
    found.texts = items.texts
    return found


# --- JSON -------------------------------------------------------------------------------------------------------------


def _described(data: Dataset, held_out: Dataset | None, reference: int, split: str) -> dict[str, Any]:
    spec = data.spec
    span = f" in [{spec.low:g}, {spec.high:g}]" if spec.bounded else ""
    return {
        "name": data.name,
        "fingerprint": data.fingerprint,
        "items": len(data),
        "looked_at": reference,
        "shape": list(spec.shape),
        "resize": spec.resize,
        "quantisation": f"both sides {spec.dtype}{span}",
        "split": split,
        "held_out": None if held_out is None else {"name": held_out.name, "fingerprint": held_out.fingerprint},
    }


def _balance(found: ClassBalance, names: Sequence[str]) -> dict[str, Any]:
    return {
        "names": list(names),
        "samples": list(found.samples),
        "expected": list(found.expected),
        "missing": [names[k] for k in found.missing],
        "chi_square": found.chi_square,
        "p_value": found.p_value,
    }
