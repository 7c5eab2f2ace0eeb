"""``report.html`` of an evaluation: one page, readable at a glance, that asks the network for nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from ..data import Dataset
from ..outputs import drawable, grid, scatter, tile
from ..page import Bars, Chart, Charts, Code, Facts, Line, Notice, Part, Picture, Section, Table, Words, short, write
from ..training.held_out import LOSS, read_curves
from ..training.report import smaller
from .extraction import Extracted
from .features import Features
from .metrics import Better
from .result import Evaluation
from .samples import Judged

SHOWN = 64
CLASSES = 24
"""Classes in the histogram, at most; of more, those farthest off."""
READ: dict[Better, str] = {"lower": "lower", "higher": "higher", "as the data": "like the floor"}


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the numbers are of, for the pictures of the report."""

    judged: Judged
    drawn: Extracted
    data: Dataset
    features: Features
    pairs: tuple[tuple[int, int, float], ...] = ()  # sample, item of the data, distance
    run: Path | None = None  # of the model, where it has one


def write_report(found: Evaluation, evidence: Evidence, folder: Path, others: Sequence[Evaluation]) -> Path:
    """Write the page. ``others`` are evaluations to stand beside it, those that cannot be compared with a mark."""
    parts: list[Part] = [headline(found), *(Notice("warn", note) for note in found.notes)]
    parts += [Notice("bad", f"{name}: {why}") for name, why in found.refused.items()]
    noted = [Words(f"{name}: {each['note']}") for name, each in found.metrics.items() if each["note"]]
    parts.append(Section("Metrics", [table(found), *noted, Words(meaning(found))]))
    parts += pictures(found, evidence)
    parts += memorised(found, evidence)
    if found.classes is not None:
        parts.append(Section("Classes", [classes(found), *_missing(found)]))
    if found.losses is not None:
        parts.append(Section("Loss by noise level", losses(found)))
    if evidence.run is not None and (trained := training(evidence.run, found)):
        parts.append(Section("How it came to this", [Charts(trained)]))
    if found.likelihood is not None:
        parts.append(Section("Likelihood", [Words(likelihood(found))]))
    if others:
        parts.append(Section("Beside other evaluations here", beside([found, *others])))
    made = {name: found.samples[name] for name in found.samples if name != "of"}
    parts += [
        Section("Cite", [Code(citation(found))]),
        Section("Command", [Code(found.command or "(called from Python)")]),
        Section("Samples", [Code(_json(made))], folded=True),
        Section("Data and features", [Code(_json({"data": found.data, "features": found.features}))], folded=True),
        Section("Environment", [Code(_json(found.environment))], folded=True),
    ]
    title = f"{found.samples['path']} against {found.data['name']}"
    lead = f"{found.features['name']} features, n = {_n(found):,}, fingerprint {found.fingerprint}"
    return write(folder / "report.html", title, parts, lead=lead)


def headline(found: Evaluation) -> Facts:
    """What is read first: each number with its floor."""
    rows: list[tuple[str, object]] = []
    for name in ("frechet", "sliced_wasserstein", "kid", "precision", "recall", "accuracy"):
        if name in found.metrics and len(rows) < 4:
            each = found.metrics[name]
            floor = "" if each["floor"] is None else f" (floor {short(each['floor'])})"
            rows.append((name.replace("_", " "), short(each["value"]) + floor))
    if found.memorisation is not None:
        rows.append(("memorised", said(found)))
    return Facts([*rows, ("n", f"{_n(found):,}")])


def said(found: Evaluation) -> str:
    """The verdict on memorisation in a word or two."""
    spaces = [each for each in (found.memorisation, (found.memorisation or {}).get("pixels")) if each]
    if any(each["memorised"] for each in spaces):
        return "yes"
    copies = max(each["copies"] for each in spaces)
    return f"no, but {copies} near copies" if copies else "no"


def table(found: Evaluation) -> Table:
    """Every figure with its interval, floor and n."""
    rows = []
    for name, each in found.metrics.items():
        interval = "[{}, {}]".format(*map(short, each["interval"]))
        floor = None
        if each["floor"] is not None:
            floor = "{} [{}, {}]".format(short(each["floor"]), *map(short, each["floor_interval"]))
        rows.append((name, each["value"], interval, floor, f"{each['n']:,}", READ[each["better"]]))
    return Table(("metric", "value", "95 % interval", "floor", "n", "better"), rows)


def meaning(found: Evaluation) -> str:
    features = "{name} features ({dim} numbers; {preprocessing})".format(**found.features)
    return (
        f"The floor is real against real: {found.data['split']}, what a perfect generator would get at this n. All are "
        f"metrics of {features}; {found.data['quantisation']}."
    )


def pictures(found: Evaluation, evidence: Evidence) -> list[Part]:
    """The first samples, and as many real items."""
    spec = evidence.data.spec
    if not drawable(spec):
        return []
    count = min(SHOWN if spec.has_pictures else 5000, len(evidence.drawn), len(evidence.data))
    rows = np.unique(np.linspace(0, len(evidence.data) - 1, count).round().astype(np.int64))
    shown = []
    for caption, values in (
        (f"the first {count:,} samples, none chosen", _values(evidence, np.arange(count))),
        (f"{len(rows):,} of the data", evidence.data.values(rows)),
    ):
        x = spec.to_model(values)
        shown.append(_picture(caption, scatter(x) if spec.kind == "points" else grid(spec, x)))
    return [Section("Samples", [Charts(shown), Words(making(found))])]


def making(found: Evaluation) -> str:
    """How the samples came to be, in a sentence: what is sampled how, and what it was asked for (trap G6)."""
    made = found.samples
    if made["kind"] != "model":
        return f"Given: {made['path']}."
    of = made.get("of") or {}
    seen = f" after {of['images']:,} images" if "images" in of else ""
    average = f", weights averaged with a half-life of {of['ema_half_life']:,} images" if "ema_half_life" in of else ""
    asked = {"items": "asked for ", None: ""}.get(made["plan"], "asked for classes ") + made["plan_in_words"]
    return f"{made['path']}{seen}{average}; {_made(found)}; {asked}."


def memorised(found: Evaluation, evidence: Evidence) -> list[Part]:
    """The verdict with its shares, and the closest pairs."""
    if found.memorisation is None:
        return []
    verdict = said(found)
    kind = "good" if verdict == "no" else "bad" if verdict == "yes" else "warn"
    parts: list[Part] = [Notice(kind, f"copies of training items: {verdict}")]
    rows = []
    for each in (found.memorisation, found.memorisation["pixels"]):
        if each is not None:
            space = each.get("space", "pixels" + (f", moved by up to {each['shifts']}" if each.get("shifts") else ""))
            share, chance = each["share"], each["chance"]
            rows.append((space, _share(share), _share(chance), each["copies"], each["median"], each["median_real"]))
    head = ("space", "suspicious samples", "of new real data", "near copies", "median distance", "of real data")
    parts += [Table(head, rows), Words(f"Against {found.memorisation['of']}; {found.memorisation['reference']}.")]
    if evidence.pairs and evidence.data.spec.has_pictures:
        spec, (mine, theirs, _) = evidence.data.spec, zip(*evidence.pairs, strict=True)
        images = [*_images(evidence.data, _values(evidence, np.array(mine)))]
        images += _images(evidence.data, evidence.data.values(np.array(theirs)))
        caption = f"the {len(mine)} closest pairs: samples above, their nearest training items below"
        parts.append(_picture(caption, tile(images, columns=len(mine))))
        assert spec.has_pictures
    return [Section("Are they new?", parts)]


def classes(found: Evaluation) -> Part:
    """The histogram of what the classifier sees."""
    assert found.classes is not None
    names, counts, expected = (found.classes[name] for name in ("names", "samples", "expected"))
    shown = range(len(names))
    if len(names) > CLASSES:
        off = np.abs(np.array(counts) - np.array(expected)) / np.sqrt(np.maximum(expected, 1))
        shown = sorted(np.argsort(-off, kind="stable")[:CLASSES].tolist())
    note = f"chi-square {short(found.classes['chi_square'])}, p = {short(found.classes['p_value'])}"
    if len(names) > CLASSES:
        note += f"; the {CLASSES} of {len(names)} classes that are farthest off"
    if found.samples.get("plan") == "uniform":
        note += "; equally many of each class were asked for"
    bars = Bars(
        "What the classifier takes them for",
        [names[k] for k in shown],
        [counts[k] for k in shown],
        [expected[k] for k in shown],
        "samples",
        "as frequent as in the data",
        note,
    )
    return Charts([bars])


def losses(found: Evaluation) -> list[Part]:
    assert found.losses is not None
    each = found.losses
    rows = [(level["level"], level["loss"], f"± {short(level['error'])}") for level in each["levels"]]
    rows.append(("all", each["loss"], f"± {short(each['error'])}"))
    unseen = "never trained on" if each["unseen"] else "that the model may have been trained on"
    words = f"{each['draws']:,} frozen draws of {each['items']:,} items {unseen}; {each['objective']} objective."
    return [Table(("noise level", "loss", "standard error"), rows), Words(words)]


def training(run: Path, found: Evaluation) -> list[Chart]:
    """What the run has measured of itself against the images that it had seen, and where this model stands."""
    images = (found.samples.get("of") or {}).get("images")
    charts = []
    for name, points in read_curves(run).items():
        at, values = zip(*points, strict=True)
        loss = name == LOSS
        lines = [Line("averaged weights", list(at), list(values))]
        marks = {"this model": images} if images else {}
        title = "Held-out loss" if loss else name
        charts.append(Chart(title, lines, "images seen", settle=0.05 if loss else 0.0, marks=marks))
    return charts


def likelihood(found: Evaluation) -> str:
    each = found.likelihood
    assert each is not None
    error = "" if each["error"] is None else f" ± {each['error']:.4f} (of it {each['error_of_probes']:.4f} from probes)"
    unseen = "" if each["unseen"] else ", which the model may have been trained on"
    return f"{each['bits_per_dim']:.4f}{error} bits/dim of {each['items']:,} items{unseen}: {each['kind']}"


def beside(evaluations: Sequence[Evaluation]) -> list[Part]:
    """Evaluations under each other; those whose fingerprint is not the first one's are marked with ≠."""
    main = ("frechet", "kid", "precision", "recall", "sliced_wasserstein", "mmd")
    names = [name for name in main if any(name in each.metrics for each in evaluations)]
    rows, marked = [], False
    for each in evaluations:
        other = each.fingerprint != evaluations[0].fingerprint
        marked |= other
        values = [each.metrics[name]["value"] if name in each.metrics else None for name in names]
        mark = "≠" if other else ""
        made = _made(each)
        rows.append((mark, each.samples["path"], made, each.features["name"], f"{_n(each):,}", *values))
    parts: list[Part] = [Table(("", "samples", "made", "features", "n", *names), rows)]
    if marked:
        parts.append(Notice("warn", "≠: other data, features, n or class plan; not to be compared with the first"))
    return parts


def _made(found: Evaluation) -> str:
    made = found.samples
    if made["kind"] != "model":
        return "given"
    steps = f"{made['steps']} step{'s' * (made['steps'] != 1)}"
    return f"{made['solver']}, {steps}, guidance {made['guidance_scale']:g}, seed {made['seed']}"


def _n(found: Evaluation) -> int:
    """How many samples the figures are of: not more than there are real ones to stand in their place."""
    return int(next(iter(found.metrics.values()))["n"])


def citation(found: Evaluation) -> str:
    """BibTeX: what was measured, and the fingerprints under which it can be found again."""
    best = next(iter(found.metrics))
    each = found.metrics[best]
    value = f"{best} {each['value']:.4g} [{each['interval'][0]:.4g}, {each['interval'][1]:.4g}]"
    floor = "" if each["floor"] is None else f", floor {each['floor']:.4g}"
    return (
        f"@misc{{undiffuse-{found.fingerprint}-{found.samples['fingerprint'][:8]},\n"
        f"  title = {{Evaluation of {Path(found.samples['path']).as_posix()} against {found.data['name']}}},\n"
        f"  note = {{{value}{floor}, n = {each['n']}, {found.features['name']} features, "
        f"comparable with fingerprint {found.fingerprint}, samples {found.samples['fingerprint']}}},\n"
        f"  howpublished = {{undiffuse {found.undiffuse}}}\n}}"
    )


def _missing(found: Evaluation) -> list[Part]:
    assert found.classes is not None
    missing = found.classes["missing"]
    return [Notice("bad", f"no sample of: {', '.join(missing[:20])}")] if missing else []


def _share(each: dict) -> str:
    low, high = each["interval"]
    return f"{each['value']:.1%} [{low:.1%}, {high:.1%}]"


def _values(evidence: Evidence, rows: np.ndarray) -> np.ndarray:
    """Samples in the units of the data."""
    return evidence.judged.aligned(evidence.features, rows)


def _images(data: Dataset, values: np.ndarray) -> list[np.ndarray]:
    return data.spec.to_images(data.spec.to_model(values))


def _picture(caption: str, image) -> Picture:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return smaller(caption, buffer.getvalue())


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
