"""``undiffuse evaluate``: how near samples are to data, and whether they are new."""

from __future__ import annotations

import shlex
import textwrap
from pathlib import Path
from typing import Annotated, Literal, Unpack

import tyro

from ..errors import UndiffuseError
from ..evaluation.result import Evaluation
from .options import AnyPath, DataOptions, checked, words_of

EXAMPLES = """
undiffuse evaluate runs/demo --against digits
undiffuse evaluate runs/mnist/best --against mnist --held-out mnist-test
undiffuse evaluate ./samples --against ./photos --image-size 64
undiffuse evaluate samples.npy --against vectors.npy --features identity
undiffuse evaluate runs/demo --against digits -n 500 --steps 10 --extrapolate
undiffuse evaluate mnist-test --against mnist      real against real
"""


def evaluate(
    samples: Annotated[str, tyro.conf.Positional],
    against: str | None = None,
    features: str | None = None,
    weights: AnyPath | None = None,
    download: bool = False,
    number: Annotated[int | None, tyro.conf.arg(aliases=["-n"])] = None,
    metrics: str | None = None,
    held_out: str | None = None,
    extrapolate: bool = False,
    likelihood: int = 0,
    plan: Literal["data", "uniform"] = "data",
    solver: str | None = None,
    steps: int | None = None,
    grid: str | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    data_seed: int = 0,
    span: tuple[float, float] | None = None,
    out: AnyPath | None = None,
    device: str = "auto",
    allow_small: bool = False,
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH=VALUE")] = (),
    **reading: Unpack[DataOptions],
) -> Evaluation:
    """Measure samples against data: every number with its interval and the floor of real against real; whether they
    are copies of training items; whether all classes are there. Writes report.html and evaluation.json.

    Args:
        samples: A run or model folder, which is sampled from; a folder, archive or array file of samples.
        against: Real data: anything that train takes.
        features: identity, pca, classifier, autoencoder, inception, inception-clean, dinov2 or clip (default: what
            suits the data).
        weights: Of inception the file, of dinov2 and clip the folder.
        download: Fetch these weights, once: nothing is fetched otherwise.
        number: How many samples (default: 2,000 or four times the features, at most half of the data; all of files).
        metrics: Only these, with commas, such as frechet,kid (default: all that fit).
        held_out: Real data that was not trained on, such as mnist-test: the floor is theirs.
        extrapolate: Also the Frechet distance at infinitely many samples.
        likelihood: Of so many held-out items the bits a dimension (a model's; slow).
        plan: Classes asked for as often as they are in the data, or uniform.
        solver: As for sample (default: the model's).
        steps: As for sample.
        grid: As for sample.
        guidance_scale: As for sample.
        seed: Of the samples; sample i is a function of the seed and i.
        batch_size: Samples computed together (default 64); changes a sample by rounding only.
        data_seed: Of data that are drawn, such as moons: the --seed of their training.
        span: Which range of a real-valued array stands for the data's, such as 0 1.
        out: Folder for evaluations (default: evaluation/ in the run, or here).
        device: auto, cpu, cuda, mps.
        allow_small: Give the Frechet distance of fewer samples than dimensions, too.
        set: One more sampling setting, as for sample; may be repeated.
        reading: How the data are read (attributes and numbers by default as the model's were). Samples are never
            resized.

    Raises:
        UndiffuseError: samples that do not fit the data; an option that could have no effect; nothing to measure.
    """
    from ..config import override
    from ..data import open_dataset
    from ..distributed import joined
    from ..evaluation.evaluate import evaluate_samples
    from ..evaluation.samples import is_model, open_model
    from ..pipeline import BATCH, REGISTRIES

    if against is None:
        raise UndiffuseError(f"say which data to compare with: undiffuse evaluate {samples} --against DATA")
    given = {
        "--features": features,
        "--weights": weights,
        "-n": number,
        "--metrics": metrics,
        "--held-out": held_out,
        "--likelihood": likelihood or None,
        "--plan": None if plan == "data" else plan,
        "--solver": solver,
        "--steps": steps,
        "--grid": grid,
        "--guidance-scale": guidance_scale,
        "--seed": seed or None,
        "--batch-size": batch_size,
        "--data-seed": data_seed or None,
        "--out": out,
    }
    words = ["undiffuse", "evaluate", samples, "--against", against, *words_of({**given, **checked(reading)})]
    words += [] if span is None else ["--span", *map(str, span)]
    words += ["--extrapolate"] * extrapolate + ["--allow-small"] * allow_small + ["--download"] * download
    words += [word for setting in set for word in ("--set", setting)]
    with joined(device) as (team, place):
        model = open_model(samples, place) if is_model(samples) else None
        theirs: list[str] = []
        if model is not None:  # real items are asked for as they are
            spec = model.pipeline.spec
            for kind, names in (("attributes", spec.attributes), ("numbers", spec.numbers)):
                if reading.get(kind) is None:
                    theirs += (known := [name for name, *_ in names])
                    reading[kind] = ",".join(known)
        try:
            data = open_dataset(against, **reading, seed=data_seed)
        except UndiffuseError as error:
            named = [name for name in theirs if f"'{name}'" in str(error)]
            if not named:
                raise
            asked = f"{samples} is asked for {named[0]}, which these data do not say"
            raise UndiffuseError(f"{asked} ({error}); name data that do, or --attributes '' --numbers ''") from None
        apart = None
        if held_out is not None:
            apart = open_dataset(
                held_out,
                image_size=reading.get("image_size"),
                channels=reading.get("channels") or (data.spec.channels if data.spec.kind == "image" else None),
                data_root=reading.get("data_root"),
                labels=reading.get("labels"),
                length=reading.get("length"),
                frames=reading.get("frames"),
                seed=data_seed,
            )
        changes = {"solver": solver, "steps": steps, "grid": grid, "guidance_scale": guidance_scale}
        changes = {name: value for name, value in changes.items() if value is not None}
        if model is not None:
            source = model
            settings = override(source.pipeline.settings(None, **changes), set, REGISTRIES)
            folder = source.run / "evaluation" if source.run is not None else Path("evaluation")
        else:
            source, settings, folder = samples, None, Path("evaluation")
            unused = [
                *changes,
                *(["set"] if set else []),
                *(["seed"] if seed else []),
                *(["plan"] if plan != "data" else []),
            ]
            if unused:
                option = unused[0].replace("_", "-")
                raise UndiffuseError(f"{samples}: no model, so --{option} would change nothing; leave it out")
        return evaluate_samples(
            source,
            data,
            features=features,
            weights=weights,
            download=download,
            number=number,
            metrics=None if metrics is None else [name.strip() for name in metrics.split(",") if name.strip()],
            held_out=apart,
            extrapolate=extrapolate,
            likelihood=likelihood,
            plan=plan,
            seed=seed,
            sampling=settings,
            batch_size=BATCH if batch_size is None else batch_size,
            span=span,
            device=place,
            out=folder if out is None else out,
            allow_small=allow_small,
            command=shlex.join(words),
            team=team,
        )


def report(found: Evaluation) -> str:
    lines = [_fold(f"{found.samples['path']} against {found.data['name']}: {found.features['name']} features", 0)]
    width = max(map(len, found.metrics), default=0)
    lines += ["", f"{'':<{width}}  {'value':>9}  {'95 % interval':>22}  {'floor':>9}  {'n':>6}"]
    for name, each in found.metrics.items():
        interval = "[{:.4g}, {:.4g}]".format(*each["interval"])
        floor = "-" if each["floor"] is None else f"{each['floor']:.4g}"
        lines.append(f"{name:<{width}}  {each['value']:>9.4g}  {interval:>22}  {floor:>9}  {each['n']:>6,}")
    lines += [_fold(f"{name}: {why}") for name, why in found.refused.items()]
    lines += ["", _fold(f"floor        real against real: {found.data['split']}")]
    if found.samples.get("plan") == "items":
        lines.append(_fold(f"asked        {found.samples['plan_in_words']}"))
    if found.memorisation is not None:
        lines.append(_fold(f"copies       {_copies(found)}"))
    if found.classes is not None:
        missing = ", ".join(found.classes["missing"][:10])
        there = f"none of {missing}" if missing else f"all {len(found.classes['names'])} are there"
        lines.append(_fold(f"classes      {there}; as frequent as in the data: p = {found.classes['p_value']:.2g}"))
    if found.losses is not None:
        each = found.losses
        unseen = "held-out" if each["unseen"] else "known"
        levels = "; ".join(f"{level['loss']:.4f} at {level['level']}" for level in each["levels"])
        lines.append(_fold(f"loss         {each['loss']:.4f} ± {each['error']:.4f} on {unseen} items: {levels}"))
    if found.likelihood is not None:
        each = found.likelihood
        error = "" if each["error"] is None else f" ± {each['error']:.4f}"
        lines.append(
            _fold(f"likelihood   {each['bits_per_dim']:.4f}{error} bits/dim of {each['items']} items: {each['kind']}")
        )
    lines += [_fold(f"note         {note}") for note in found.notes]
    lines.append(f"fingerprint  {found.fingerprint} (numbers with another cannot be compared)")
    lines.append(f"look         {shlex.quote(str(Path(found.path) / 'report.html'))}")
    return "\n".join(lines)


def _copies(found: Evaluation) -> str:
    said = []
    for each in (found.memorisation, (found.memorisation or {}).get("pixels")):
        if each:
            space = f"in {each.get('space', 'pixel')} space"
            verdict = "MEMORISED" if each["memorised"] else "not memorised"
            near = f", {each['copies']} near copies" if each["copies"] else ""
            said.append(
                f"{space} {verdict}: {each['share']['value']:.1%} as near to a training item as "
                f"{each['chance']['value']:.1%} of real data{near}"
            )
    return "; ".join(said)


def _fold(line: str, indent: int = 13) -> str:
    return textwrap.fill(line, 80, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False)
