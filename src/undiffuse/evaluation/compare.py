"""Compare: one thing varied, all else held constant, and a verdict that may be "no difference seen".

    runs/compare-NAME/
      runs/ARM-seed-0/ ...      ordinary run folders, one an arm and seed
      samples/...               what they sampled, from the same noise, 64 at a time
      result.json  report.html  written anew after every run that is finished

Everything random in training is a function of (seed, step), so runs with one seed see the same items in the same order
with the same times, noise and dropped conditions, and begin with the same weights where the network is the same. Sample
i is a function of (seed, i). So runs are paired by their seed, and their differences are judged (:mod:`.paired`).

Calling :func:`run_comparison` again goes on where it stopped: runs resume to the last bit, and samples that are there
are those of these very weights and settings, whose digest names their folder.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from io import BytesIO
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np

from ..asking import Sampling
from ..commands import plain
from ..config import to_json, write_bytes_atomic, write_json_atomic
from ..data import Dataset
from ..data.base import digest
from ..errors import UndiffuseError, UndiffuseWarning, choose
from ..pipeline import BATCH, REGISTRIES, Pipeline, resolve_device
from ..training import Progress, Recipe, run_training
from ..training.checkpoint import Lock
from ..training.held_out import LOSS as HELD_OUT
from ..training.held_out import draws, read_curves
from ..training.recipe import with_settings
from ..training.trainer import Diverged
from .compare_report import write_report
from .extraction import Extracted, extract, make_features, pick, reference_features
from .features import Features
from .intervals import GROUPS, grouped
from .metrics import HAD, METRICS, Examples, Figure, Metric, measure
from .paired import Difference, difference
from .pretrained import CLIPNetwork, text_features
from .samples import Asked, ask


@dataclass(frozen=True)
class Arm:
    """One of the recipes that are compared."""

    name: str
    recipe: Recipe


# --- which arms -------------------------------------------------------------------------------------------------------


def full_path(recipe: Recipe, path: str) -> str:
    """The whole path of a setting: ``schedule`` is ``model.schedule``, as no other part of a recipe has that name."""
    first = path.strip().partition(".")[0]
    parts = {each.name: getattr(recipe, each.name) for each in fields(recipe)}
    if first in parts:
        return path.strip()
    found = [name for name, part in parts.items() if is_dataclass(part) and first in {f.name for f in fields(part)}]
    if len(found) > 1:
        raise UndiffuseError(f"{path} may be {' or '.join(f'{name}.{path}' for name in found)}: write which")
    return f"{found[0]}.{path.strip()}" if found else path.strip()


def changed(recipe: Recipe, settings: Sequence[str], where: str = "--set") -> Recipe:
    """The recipe with every ``path=value``; paths may be short (:func:`full_path`)."""
    parts = [setting.partition("=") for setting in settings]
    whole = [f"{full_path(recipe, path)}{equals}{value}" for path, equals, value in parts]
    return with_settings(recipe, whole, where)


def options(text: str) -> tuple[str, list[str]]:
    """``path=a,b`` as its path and its values; commas within brackets, braces and quotes belong to a value."""
    path, equals, values = text.partition("=")
    parts, depth, quoted = [""], 0, False
    for letter in values:
        quoted ^= letter == '"'
        depth += 0 if quoted else (letter in "[{") - (letter in "]}")
        if letter == "," and not depth and not quoted:
            parts.append("")
        else:
            parts[-1] += letter
    parts = [part.strip() for part in parts]
    if not equals or not path.strip() or not all(parts) or len(parts) < 2:
        raise UndiffuseError(f"--vary {text!r}: write it as path=one,other")
    return path.strip(), parts


def arms_of(recipes: Mapping[str, Recipe], vary: Sequence[str] = ()) -> list[Arm]:
    """Every recipe with every combination of the values that are varied (``["schedule=linear,cosine"]``)."""
    several = [options(text) for text in vary]
    found = []
    for name, recipe in recipes.items():
        for chosen in product(*(values for _, values in several)):
            pairs = [(path, value) for (path, _), value in zip(several, chosen, strict=True)]
            said = ([name] if len(recipes) > 1 or not pairs else []) + [f"{p}={_brief(v)}" for p, v in pairs]
            found.append(Arm(" ".join(said), changed(recipe, [f"{p}={v}" for p, v in pairs], "--vary")))
    return found


def _brief(value: str) -> str:
    """A value in the name of an arm: ``{"kind": "min_snr", "gamma": 1}`` is ``min_snr gamma=1``."""
    try:
        stated = json.loads(value)
    except ValueError:
        return value
    if not isinstance(stated, dict):
        return value
    return " ".join(str(v) if k == "kind" else f"{k}={v}" for k, v in stated.items())


# --- what is held constant --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Constant:
    """One thing that the arms share, or in which they differ."""

    what: str
    same: bool
    values: tuple[str, ...]  # of each arm

    def __str__(self) -> str:
        return f"{self.what}: {'the same' if self.same else 'DIFFERS'}"


def settings_of(recipe: Recipe) -> dict[str, str]:
    """Every setting by its path, as JSON text."""
    found: dict[str, str] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                walk(item, f"{path}.{key}" if path else key)
        else:
            found[path] = json.dumps(value)

    walk(to_json(recipe, REGISTRIES), "")
    return {path: value for path, value in found.items() if path != "name"}


def differing(arms: Sequence[Arm]) -> dict[str, tuple[str | None, ...]]:
    """The settings in which the arms differ, with the value of each arm; None where it has no such setting."""
    each = [settings_of(arm.recipe) for arm in arms]
    paths = dict.fromkeys(path for settings in each for path in settings)
    values = {path: tuple(settings.get(path) for settings in each) for path in paths}
    return {path: there for path, there in values.items() if len(set(there)) > 1}


def constants(dataset: Dataset, arms: Sequence[Arm]) -> tuple[Constant, ...]:
    """What a fair comparison holds constant, each with whether these arms do."""

    def alike(what: str, say: Callable[[Recipe], object]) -> Constant:
        values = tuple(str(say(arm.recipe)) for arm in arms)
        return Constant(what, len(set(values)) == 1, values)

    def network(recipe: Recipe) -> str:
        config = recipe.config(dataset.spec)
        return f"{config.network} {json.dumps(config.network_config)} {json.dumps(config.conditions)}"

    def held_out(recipe: Recipe) -> str:
        return f"{recipe.training.held_out if recipe.training.evaluate_every else 0} items"

    return (
        alike("items trained on", held_out),
        alike("images seen", lambda r: f"{r.training.images:,}"),
        alike("batches, their order, times' quantiles and noise", lambda r: f"batches of {r.training.batch_size}"),
        alike("network and its initial weights", network),
        alike("optimiser", lambda r: json.dumps(to_json(r.optimiser, REGISTRIES))),
        alike("average of the weights", lambda r: json.dumps(to_json(r.ema, REGISTRIES))),
        alike("sampling", lambda r: json.dumps(to_json(r.sampling, REGISTRIES))),
        alike("unit of the held-out loss", lambda r: loss_unit(dataset, r)),
    )


def loss_unit(dataset: Dataset, recipe: Recipe) -> str:
    """Held-out losses are comparable between recipes where this is the same: the same error of the same items at the
    same levels, with the same weight."""
    parts = (recipe.objective, recipe.model.schedule, recipe.model.prediction)
    stated = [to_json(part, REGISTRIES) for part in parts]
    kinds = [type(part).__name__ for part in parts]
    count = draws(recipe.training)
    return f"{kinds} {json.dumps(stated)} {recipe.training.held_out} {count} {recipe.model.learned_variance}"


# --- the result -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One arm with one seed, trained, sampled from and measured."""

    arm: str
    seed: int
    path: Path
    state: str  # waiting, finished, diverged
    images: int = 0
    held_out_loss: float | None = None
    curves: dict[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)  # as read_curves has them
    figures: dict[str, Figure] = field(default_factory=dict)
    samples: Path | None = None
    asked: str = ""  # what the samples were asked for, in words (trap G6)
    error: str = ""


@dataclass(frozen=True)
class Compared:
    """What :func:`run_comparison` finds.

    Attributes:
        state: ``finished``, or ``running``: some runs are waiting.
        metric: the figure that the verdict is about, chosen before anything was measured.
        verdict: one sentence for each pair of arms.
        differences: of the arms' pairs in every figure; only those of ``metric`` are corrected for their number.
        fingerprints: of how each arm's figures were measured; where they differ, the tables are marked.
        constants: what was held constant and what was not; ``varied``: the settings in which the arms differ.
    """

    path: Path
    state: str
    data: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    samples: int
    metric: str
    features: str
    verdict: tuple[str, ...]
    differences: tuple[Difference, ...]
    runs: tuple[Run, ...]
    fingerprints: dict[str, str]
    constants: tuple[Constant, ...]
    varied: dict[str, tuple[str | None, ...]]
    command: str

    def of(self, arm: str, figure: str) -> list[float]:
        """The figure of each finished run of an arm, by seed."""
        return [value for run in self.runs if run.arm == arm and (value := _value(run, figure)) is not None]

    @property
    def figures(self) -> list[str]:
        """The names of all figures that some run has, the main one first."""
        there = dict.fromkeys([self.metric, *(name for run in self.runs for name in run.figures)])
        return [*there, *([HELD_OUT] if any(run.held_out_loss is not None for run in self.runs) else [])]


def _value(run: Run, figure: str) -> float | None:
    if figure == HELD_OUT:
        return run.held_out_loss
    return run.figures[figure].value if figure in run.figures else None


# --- training, sampling, measuring ------------------------------------------------------------------------------------


def slug(name: str) -> str:
    """A folder's name for an arm."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.") or "arm"


def run_comparison(
    dataset: Dataset,
    arms: Sequence[Arm],
    out: str | Path,
    *,
    seeds: int = 3,
    samples: int = 1000,
    against: int = 5_000,
    metric: str | None = None,
    features: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    download: bool = False,
    device: str = "auto",
    data: str | None = None,
    command: str = "",
    cache: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Compared:
    """Train every arm with every seed, sample from the same noise, measure, and judge the paired differences.

    Args:
        dataset: What all arms are trained on and measured against.
        arms: Two or more.
        out: The folder of the comparison; where there is one, it goes on.
        seeds: 0 to ``seeds - 1``: of the runs and of the noise that is sampled from.
        samples: How many are drawn from each model; at most half of ``against``.
        against: How many items of the data they are compared with, half of which at most are set aside for the floor.
        metric: The figure that the verdict is about; by default the Frechet distance.
        features: A name in ``FEATURES``; by default what suits the data.
        weights, download: Of the features, as for :func:`.make_features`.
        data, command: For the records.
        cache: Where what can be made again is kept.

    Raises:
        UndiffuseError: fewer than two arms, two that are the same, a metric that does not fit.
        KeyboardInterrupt: after the update has been saved; what is finished is in the report already.
    """
    out = Path(out)
    if len(arms) < 2:
        raise UndiffuseError("a comparison needs two arms or more: name two recipes, or --vary path=one,other")
    for arm in arms:
        if arm.recipe.codec is not None:
            raise UndiffuseError(f"{arm.name} learns a codec, which makes no samples: there is nothing to compare")
    for a, b in combinations(arms, 2):
        if settings_of(a.recipe) == settings_of(b.recipe):
            raise UndiffuseError(f"{a.name} and {b.name} are the same recipe: there is nothing to compare")
        if slug(a.name) == slug(b.name):
            raise UndiffuseError(f"{a.name} and {b.name} would share a folder: give them other names")
    if seeds < 1 or samples < 2:
        raise UndiffuseError(f"seeds={seeds} must be at least 1 and samples={samples} at least 2")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / ".lock").is_file())):
        raise UndiffuseError(f"{out}: has something else; choose another --out")
    device = resolve_device(device)
    for arm in arms:
        arm.recipe.check(dataset.spec)
    known = [name for each in METRICS.values() for name in each.better]
    main = choose("metric", metric or "frechet", {name: name for name in [*known, HELD_OUT]})
    units = {loss_unit(dataset, arm.recipe) for arm in arms}
    if main == HELD_OUT and len(units) > 1:
        raise UndiffuseError("the held-out losses of these arms are in different units: choose another --metric")
    out.mkdir(parents=True, exist_ok=True)
    with Lock(out):
        chosen = make_features(features, dataset, weights=weights, download=download, cache=cache, device=device)
        instrument = Instrument.prepare(dataset, chosen, samples, against, cache)
        instrument.check(main)
        runs = {(arm.name, s): Run(arm.name, s, _folder(out, arm, s), "waiting") for s in range(seeds) for arm in arms}

        def result() -> Compared:
            found = judged(dataset, arms, instrument, out, list(runs.values()), main, data or dataset.name, command)
            write_result(found, dataset)
            return found

        for seed in range(seeds):  # all arms with a seed before the next: pairs are complete early
            for arm in arms:
                number = list(runs).index((arm.name, seed)) + 1
                say(f"--- {arm.name}, seed {seed} ({number} of {len(runs)})")
                folder = runs[arm.name, seed].path
                try:
                    run_training(
                        dataset,
                        arm.recipe,
                        folder,
                        seed=seed,
                        device=device,
                        data=data,
                        command=command,
                        say=say,
                        progress=progress,
                    )
                except Diverged as error:
                    runs[arm.name, seed] = replace(runs[arm.name, seed], state="diverged", error=str(error))
                    say(f"{arm.name}, seed {seed}: {error}")
                    result()
                    continue
                runs[arm.name, seed] = instrument.measure(runs[arm.name, seed], arm.recipe.sampling, out, device, say)
                result()
        return result()


def _folder(out: Path, arm: Arm, seed: int) -> Path:
    return out / "runs" / f"{slug(arm.name)}-seed-{seed}"


@dataclass(frozen=True, eq=False)
class Instrument:
    """How every run is measured: the same for all.

    Attributes:
        data: what samples are compared with; ``real``: as many rows as samples, set aside for the floor.
    """

    dataset: Dataset
    features: Features
    samples: int
    data: Examples
    real: Examples
    reference: str
    kept: dict[Path, Examples] = field(default_factory=dict)  # of runs that have been measured

    @staticmethod
    def prepare(
        dataset: Dataset, features: Features, samples: int, against: int, cache: str | Path | None
    ) -> Instrument:
        """Features of the data, and their division."""
        count = min(against, len(dataset))
        samples = min(samples, count // 2)
        known = reference_features(features, dataset, count, cache=cache)
        order = np.random.Generator(np.random.PCG64(0)).permutation(count)
        real, rest = np.sort(order[:samples]), np.sort(order[samples:])
        whole = examples(dataset, known)
        where = digest(known.fingerprint, str(samples), pick(dataset, count).tobytes())
        return Instrument(dataset, features, samples, whole.take(rest), whole.take(real), where)

    def check(self, figure: str) -> None:
        """Refuse before training what would be refused after it: real rows are measured in place of samples."""
        found = measure(self.real, self.data, held_out=self.real, allow_small=figure != "frechet")
        if figure not in (HELD_OUT, *found):
            needs = ", ".join(f"{need} ({HAD[need]})" for need in entry(figure)[0].needs)
            raise UndiffuseError(f"{figure} needs {needs}, which {self.features.name} of these data lack")

    def asked(self, pipeline: Pipeline) -> Asked:
        """What is asked of each sample: a class, as frequent as in the data (trap G6), or what is known of an item."""
        return ask(pipeline, self.dataset, self.samples, "data")

    def draw(
        self, pipeline: Pipeline, sampling: Sampling, asked: Asked, seed: int, folder: Path, say: Callable[[str], None]
    ) -> np.ndarray:
        """The samples ``[n, *shape]`` in the data's units; those that are in the folder are read."""
        parts = []
        for start in range(0, self.samples, BATCH):
            numbers = range(start, min(start + BATCH, self.samples))
            path = folder / f"{start:06d}-{numbers[-1]:06d}.npy"
            if not path.is_file():
                if start == 0:
                    say(f"sampling   {self.samples:,} samples in {sampling.steps} steps")
                folder.mkdir(parents=True, exist_ok=True)
                told: dict[str, Any] = {"classes": asked.classes, "cond": asked.cond}
                drawn = pipeline.draw(numbers, seed=seed, sampling=sampling, **told)
                buffer = BytesIO()
                np.save(buffer, pipeline.spec.to_data(drawn), allow_pickle=False)
                write_bytes_atomic(path, buffer.getvalue())
            try:
                parts.append(np.load(path, allow_pickle=False))
            except (OSError, ValueError, EOFError):
                raise UndiffuseError(f"{path}: cannot be read; remove it, and it is made again") from None
        return np.concatenate(parts)

    def measure(self, run: Run, sampling: Sampling, out: Path, device: str, say: Callable[[str], None]) -> Run:
        """The run with its figures and samples."""
        pipeline = Pipeline.load(run.path, device)
        stated = json.dumps(to_json(sampling, REGISTRIES), sort_keys=True)
        asked = self.asked(pipeline)
        more = [asked.content] * (asked.cond is not None)
        key = digest(pipeline.fingerprint, stated, str(run.seed), json.dumps(asked.classes), *more)
        folder = out / "samples" / f"{run.path.name}-{self.samples}-{key[:12]}"
        values = self.draw(pipeline, sampling, asked, run.seed, folder, say)
        known = extract(self.features, values)
        if asked.texts is not None and isinstance(self.features.network, CLIPNetwork):
            known = replace(known, texts=text_features(self.features, asked.texts))
        self.kept[run.path] = sampled = examples(self.dataset, known, asked.labels)
        figures = measure(sampled, self.data, held_out=self.real, allow_small=True)
        curves = read_curves(run.path)
        status = json.loads((run.path / "status.json").read_text())
        say(f"measured   {'; '.join(str(figure) for figure in list(figures.values())[:1])}")
        return replace(
            run,
            state="finished",
            images=int(status["images"]),
            held_out_loss=curves[HELD_OUT][-1][1] if HELD_OUT in curves else None,
            curves=curves,
            figures=figures,
            samples=folder,
            asked=asked.said,
        )


def examples(dataset: Dataset, known: Extracted, classes: np.ndarray | None = None) -> Examples:
    """Features as metrics take them; points are also vectors."""
    features = known.features.numpy()
    labels = known.labels.numpy() if known.labels is not None else None
    if classes is not None:
        labels = classes
    probabilities = None if known.probabilities is None else known.probabilities.numpy()
    return Examples(
        features=features,
        vectors=features if dataset.spec.kind == "points" else None,
        probabilities=probabilities,
        labels=labels if probabilities is not None else None,
        images=None if known.texts is None else features,
        texts=known.texts,
    )


# --- judging ----------------------------------------------------------------------------------------------------------


def entry(figure: str) -> tuple[Metric, int]:
    """The metric that gives a figure, and its place among the metric's figures."""
    return next((m, list(m.better).index(figure)) for m in METRICS.values() if figure in m.better)


def error_of_samples(figure: str, a: Examples, b: Examples, data: Examples) -> float:
    """The standard error of ``figure(b) - figure(a)`` over the samples drawn. Sample i of both came from one noise, so
    both leave out the same tenth at a time (delete-a-group jackknife, :mod:`.intervals`)."""
    metric, place = entry(figure)
    against = data.part(metric.needs) if metric.against else []

    def value(examples: Examples) -> float:
        with warnings.catch_warnings():  # of all rows there are enough, or it has been said
            warnings.simplefilter("ignore", UndiffuseWarning)
            return metric.measure(*examples.part(metric.needs), *against, True)[place].value

    without = []
    for group in grouped(len(a)):
        kept = np.setdiff1d(np.arange(len(a)), group)
        without.append(value(b.take(kept)) - value(a.take(kept)))
    return math.sqrt((GROUPS - 1) * float(np.var(without)))


def judged(
    dataset: Dataset,
    arms: Sequence[Arm],
    instrument: Instrument,
    out: Path,
    runs: Sequence[Run],
    main: str,
    data: str,
    command: str,
) -> Compared:
    """The result so far."""
    kept = constants(dataset, arms)
    names = tuple(arm.name for arm in arms)
    comparable = next(each.same for each in kept if each.what == "unit of the held-out loss")
    pairs = list(combinations(names, 2))
    by = {(run.arm, run.seed): run for run in runs}
    seeds = tuple(dict.fromkeys(run.seed for run in runs))
    seen = dict.fromkeys(name for run in runs for name in run.figures)
    figures = dict.fromkeys([main, *seen, *([HELD_OUT] if comparable else [])])
    found = []
    for figure in figures:
        for a, b in pairs:
            both = [(by[a, seed], by[b, seed]) for seed in seeds]
            both = [(x, y) for x, y in both if _value(x, figure) is not None and _value(y, figure) is not None]
            values = [_value(y, figure) - _value(x, figure) for x, y in both]  # type: ignore[operator]
            if not values:
                continue
            errors = None
            if figure == main and figure != HELD_OUT:
                errors = [
                    error_of_samples(figure, instrument.kept[x.path], instrument.kept[y.path], instrument.data)
                    for x, y in both
                ]
            found.append(difference(figure, a, b, values, len(pairs), errors))
    sampling = [json.dumps(to_json(arm.recipe.sampling, REGISTRIES), sort_keys=True) for arm in arms]
    return Compared(
        path=out,
        state="running" if any(run.state == "waiting" for run in runs) else "finished",
        data=data,
        arms=names,
        seeds=seeds,
        samples=instrument.samples,
        metric=main,
        features=instrument.features.name,
        verdict=tuple(verdict(each, runs) for each in found if each.figure == main),
        differences=tuple(found),
        runs=tuple(runs),
        fingerprints={
            name: digest(instrument.reference, each)[:16] for name, each in zip(names, sampling, strict=True)
        },
        constants=kept,
        varied=differing(arms),
        command=command,
    )


def better_of(figure: str) -> str:
    """``lower``, ``higher`` or ``as the data``."""
    return "lower" if figure == HELD_OUT else entry(figure)[0].better[figure]


def verdict(found: Difference, runs: Sequence[Run] = ()) -> str:
    """One sentence: which is better, or that no difference is seen, and how small a one would not have been."""
    what = found.figure.replace("_", " ")
    count = len(found.values)
    lost = [f"{run.arm} diverged with seed {run.seed}" for run in runs if run.error and run.arm in (found.a, found.b)]
    tail = f" ({'; '.join(lost)})" if lost else ""
    if count < 2:
        return (
            f"{found.b} - {found.a}: {found.mean:+.4g} in {what} with one seed; how much runs differ by chance is not "
            f"known, so nothing follows{tail}"
        )
    over = f"{found.mean:+.4g} in {what}, 95 % [{found.low:+.4g}, {found.high:+.4g}] over {count} seeds"
    if not found.seen:
        reach = (found.high - found.low) / 2
        return (
            f"no difference seen between {found.a} and {found.b}: {over}; one smaller than about {reach:.2g} would "
            f"not be seen{tail}"
        )
    better = better_of(found.figure)
    if better == "as the data":
        return f"{found.a} and {found.b} differ: {over}{tail}"
    winner, loser = (found.b, found.a) if (found.mean < 0) == (better == "lower") else (found.a, found.b)
    return f"{winner} is better than {loser}: {over} ({found.b} - {found.a}){tail}"


def write_result(found: Compared, dataset: Dataset) -> None:
    """``result.json`` and ``report.html``."""
    write_json_atomic(found.path / "result.json", plain(found))
    write_report(found, dataset.spec)
