"""``undiffuse compare``: one thing varied, all else held constant."""

from __future__ import annotations

import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Unpack

import tyro

from ..errors import UndiffuseError
from .options import AnyPath, DataOptions, checked, words_of
from .train import screen

if TYPE_CHECKING:
    from ..evaluation.paired import Difference

EXAMPLES = """
undiffuse compare digits --vary schedule=linear,cosine \\
    --set prediction=eps
undiffuse compare digits tiny --data digits          two recipes
undiffuse compare digits --vary lr=0.001,0.004 --seeds 5 --images 9000
undiffuse compare points --data moons --vary prediction=eps,flow \\
    --set schedule=cosine --metric sliced_wasserstein
undiffuse compare --experiment min-snr            see docs/experiments.md
"""


@dataclass(frozen=True)
class Comparison:
    """What was found about the figure that the verdict is about; ``result.json`` in the folder has all the rest."""

    path: Path
    state: str
    metric: str
    samples: int  # of each model
    values: dict[str, list[float]]  # of each arm, by seed
    floor: float | None
    differences: list[Difference]
    verdict: list[str]


def compare(
    recipes: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    vary: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH=ONE,OTHER")] = (),
    experiment: str | None = None,
    data: str | None = None,
    out: AnyPath | None = None,
    seeds: int | None = None,
    images: int | None = None,
    samples: int | None = None,
    against: int = 5_000,
    metric: str | None = None,
    features: str | None = None,
    weights: AnyPath | None = None,
    download: bool = False,
    batch_size: int | None = None,
    model_size: Literal["tiny", "small", "base", "large"] | None = None,
    device: str = "auto",
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH=VALUE")] = (),
    **reading: Unpack[DataOptions],
) -> Comparison:
    """Train recipes that differ in one thing, and say whether a difference is seen.

    All arms see the same items in the same order with the same noise, begin with the same weights where the network is
    the same, and are sampled from the same noise. The verdict is about one figure and may be "no difference seen". The
    same command goes on where it was stopped.

    Args:
        recipes: default, digits, mnist, points, images, tiny; each may have settings of its own: "digits schedule=vp".
        vary: A setting and its values, such as schedule=linear,cosine; two give every combination. A path may be short
            where only one part of a recipe has that name.
        experiment: linear-cosine, predictions or min-snr: see docs/experiments.md.
        data: As for train (default: what the recipe is called, if that is a data set).
        out: The folder of the comparison (default: runs/compare- and what is compared).
        seeds: Runs of each arm (default 3); with one, nothing can be concluded.
        images: Length of each run in images seen.
        samples: How many are drawn from each model (default 1000); at most half of --against.
        against: Items of the data that they are compared with.
        metric: The figure that the verdict is about: frechet (the default), kid, precision, recall, coverage, accuracy,
            sliced_wasserstein, held_out_loss ...
        features: identity, pca, classifier, autoencoder, inception ... (default: what suits the data).
        weights: Of inception the file, of dinov2 and clip the folder.
        download: Fetch these weights, once: nothing is fetched otherwise.
        batch_size: Images an update.
        model_size: tiny, small, base or large.
        device: auto, cpu, cuda, mps.
        set: Change one setting of every arm, such as sampling.steps=250; may be repeated.
        reading: How the data are read.

    Raises:
        UndiffuseError: fewer than two arms, two that are the same, a setting that does not exist.
    """
    from ..data import DATASETS, open_dataset
    from ..errors import choose
    from ..evaluation.compare import arms_of, changed, run_comparison, slug
    from ..evaluation.experiments import EXPERIMENTS
    from ..training import make_recipe
    from ..training.recipe import with_length

    given = {
        "--experiment": experiment,
        "--data": data,
        "--out": out,
        "--seeds": seeds,
        "--images": images,
        "--samples": samples,
        "--against": None if against == 5_000 else against,
        "--metric": metric,
        "--features": features,
        "--weights": weights,
        "--batch-size": batch_size,
        "--model-size": model_size,
        "--device": None if device == "auto" else device,
    }
    words = ["undiffuse", "compare", *recipes]
    words += [word for each in vary for word in ("--vary", each)]
    words += words_of({**given, **checked(reading)})
    words += [word for each in set for word in ("--set", each)] + ["--download"] * download
    if experiment is not None:
        chosen = choose("experiment", experiment, EXPERIMENTS)
        if recipes or vary:
            raise UndiffuseError("--experiment says what is compared: leave recipes and --vary out")
        recipes, vary, set = (chosen.recipe,), chosen.vary, (*chosen.set, *set)
        data, images, seeds = data or chosen.data, images or chosen.images, seeds or chosen.seeds
        samples = samples or chosen.samples
        print(textwrap.fill(chosen.question, 80), flush=True)
    if not recipes:
        raise UndiffuseError("name a recipe and --vary a setting, or two recipes: undiffuse compare --help")
    if data is None:
        data = recipes[0].split()[0]
        if data not in DATASETS:
            raise UndiffuseError(f"--data is missing: {data!r} is a recipe and no data set")
    dataset = open_dataset(data, **reading)
    made = {}
    for text in recipes:
        name, *settings = shlex.split(text)
        recipe = changed(make_recipe(name, dataset.spec, len(dataset), model_size), (*set, *settings))
        made[text] = with_length(recipe, steps=None, images=images, batch_size=batch_size)
    arms = arms_of(made, vary)
    folder = (
        Path(out) if out is not None else Path("runs") / f"compare-{experiment or slug(' '.join((*recipes, *vary)))}"
    )
    with screen() as (say, progress):
        found = run_comparison(
            dataset,
            arms,
            folder,
            seeds=3 if seeds is None else seeds,
            samples=1000 if samples is None else samples,
            against=against,
            metric=metric,
            features=features,
            weights=weights,
            download=download,
            device=device,
            data=data,
            command=shlex.join(words),
            say=say,
            progress=progress,
        )
    return Comparison(
        path=found.path,
        state=found.state,
        metric=found.metric,
        samples=found.samples,
        values={arm: found.of(arm, found.metric) for arm in found.arms},
        floor=next((run.figures[found.metric].floor for run in found.runs if found.metric in run.figures), None),
        differences=[each for each in found.differences if each.figure == found.metric],
        verdict=list(found.verdict),
    )


def report(found: Comparison) -> str:
    """The figure of each arm, and the verdict."""
    rows = [*found.values.items(), *([] if found.floor is None else [("real against real", [found.floor])])]
    width = max(len(name) for name, _ in rows)
    lines = [f"{found.metric.replace('_', ' ')}, {found.samples:,} samples of each model"]
    for name, values in rows:
        each = f"   ({', '.join(f'{value:.4g}' for value in values)})" if len(values) > 1 else ""
        lines.append(
            f"  {name:<{width}}  {sum(values) / len(values):8.4g}{each}" if values else f"  {name:<{width}}  -"
        )
    lines += [textwrap.fill(sentence, 80) for sentence in found.verdict]
    return "\n".join([*lines, f"  look: {shlex.quote(str(found.path / 'report.html'))}"])
