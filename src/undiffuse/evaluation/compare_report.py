"""``report.html`` of a comparison: the verdict, the figures of every arm, curves, samples from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from .. import __version__
from ..config import write_bytes_atomic
from ..data.spec import DataSpec
from ..outputs import drawable, grid
from ..page import Chart, Charts, Code, Facts, Line, Notice, Part, Picture, Section, Table, Words, short, write
from ..training.held_out import LOSS
from .paired import difference

if TYPE_CHECKING:
    from .compare import Compared, Run

SHOWN = 12
"""Samples of each arm in the picture."""


def write_report(found: Compared, spec: DataSpec) -> None:
    """Write the page."""
    done = sum(run.state != "waiting" for run in found.runs)
    main = found.metric.replace("_", " ")
    parts: list[Part] = []
    if found.state == "running":
        parts.append(Notice("info", f"{done} of {len(found.runs)} runs are finished; the same command goes on"))
    seen = {(each.a, each.b): each.seen for each in found.differences if each.figure == found.metric}
    for sentence, clear in zip(found.verdict, seen.values(), strict=True):
        parts.append(Notice("good" if clear else "info", sentence))
    for run in found.runs:
        if run.error:
            parts.append(Notice("bad", f"{run.arm}, seed {run.seed}: {run.error}"))
    images = sorted({run.images for run in found.runs if run.state == "finished"})
    parts.append(
        Facts(
            [
                ("arms", len(found.arms)),
                ("seeds each", len(found.seeds)),
                ("images seen", " or ".join(map(short, images)) or "-"),
                ("samples each", f"{found.samples:,}"),
                ("judged by", main),
                ("features", found.features),
            ]
        )
    )
    parts.append(Section(f"{main.capitalize()} of each arm", [headline(found), Words(how_read(found))]))
    parts.append(Section("Differences", [differences(found), Words(how_tested(found))]))
    picture = samples(found, spec)
    if picture is not None:
        parts.append(Section("Samples from the same noise", [picture]))
    parts.append(Section("Curves", [Charts(curves(found))]))
    parts.append(Section("All figures", [everything(found)]))
    same = [[each.what, "the same" if each.same else "differs"] for each in found.constants]
    parts.append(Section("Held constant", [Table(["", ""], same)]))
    varied = [[path, *(v or "-" for v in values)] for path, values in found.varied.items()]
    parts.append(Section("Settings in which the arms differ", [Table(["setting", *found.arms], varied)]))
    said = {run.arm: run.asked for run in found.runs if run.asked}
    prints = [[arm, said.get(arm), found.fingerprints[arm]] for arm in found.arms]
    header = ["arm", "what its samples were asked for", "fingerprint"]
    parts.append(Section("How it was measured", [Table(header, prints)], folded=True))
    parts.append(Section("Command", [Code(found.command)], folded=True))
    lead = f"{found.data}, {found.state}, undiffuse {__version__}"
    write(found.path / "report.html", " against ".join(found.arms), parts, lead=lead)


def mark(found: Compared, arm: str) -> str:
    """The arm's name, with a sign where its figures were measured differently from those of the first."""
    return arm if found.fingerprints[arm] == found.fingerprints[found.arms[0]] else f"{arm} †"


def headline(found: Compared) -> Table:
    """The figure that the verdict is about."""
    rows = []
    for arm in found.arms:
        values = found.of(arm, found.metric)
        runs = [run for run in found.runs if run.arm == arm and found.metric in run.figures]
        floor = runs[0].figures[found.metric].floor if runs else None
        mean, span = None, None
        if values:
            spread = difference(found.metric, arm, arm, values)
            mean = spread.mean
            span = f"{short(spread.low)} to {short(spread.high)}" if len(values) > 1 else "one seed"
        rows.append([mark(found, arm), mean, span, ", ".join(map(short, values)) or None, floor])
    return Table(["arm", "mean over seeds", "95 % interval over seeds", "each seed", "floor"], rows)


def how_read(found: Compared) -> str:
    """What the headline's numbers mean."""
    note = (
        "The floor is what real items score against real items at the same numbers: no generator is better. The "
        "interval is for the arm's mean; arms are compared by their paired differences, which are usually better known."
    )
    if len(set(found.fingerprints.values())) > 1:
        note += " † sampled with other settings than the first arm: that is part of what is compared."
    return note


def differences(found: Compared) -> Table:
    """Paired differences of the figure that the verdict is about."""
    rows = []
    for each in found.differences:
        if each.figure == found.metric:
            same = None if each.same_models is None else " to ".join(map(short, each.same_models))
            span = f"{short(each.low)} to {short(each.high)}" if len(each.values) > 1 else "unknown: one seed"
            values = ", ".join(map(short, each.values))
            rows.append([f"{each.b} - {each.a}", each.mean, span, same, values, each.p, "yes" if each.seen else "no"])
    names = ["difference", "mean", "95 % interval over seeds", "these models, other samples", "each seed", "p", "seen"]
    return Table(names, rows)


def how_tested(found: Compared) -> str:
    """The test, in words."""
    pairs = len(found.arms) * (len(found.arms) - 1) // 2
    corrected = (
        f" The intervals are Bonferroni's for {pairs} pairs of arms: all of them together are right in 95 % of cases; "
        "p is of each pair alone."
        if pairs > 1
        else ""
    )
    return (
        f"Student's t ({len(found.seeds)} seeds) on the differences of runs with the same seed "
        "(same items in the same order, same noise, same noise to sample from). A difference is seen where the "
        "interval excludes 0."
        + corrected
        + " The figure was chosen before anything was measured; the figures below are not "
        "corrected for their number."
    )


def curves(found: Compared) -> list[Chart]:
    """The held-out loss, and the quality of samples where the runs have measured it, against images."""
    comparable = next(each.same for each in found.constants if each.what == "unit of the held-out loss")
    charts = []
    for figure in dict.fromkeys(name for run in found.runs for name in run.curves):
        note, title = "averaged weights; mean over seeds, and the least and the largest", figure
        if figure == LOSS:
            title = "Held-out loss" if comparable else "Held-out loss, each arm in a unit of its own"
            if not comparable:
                note += ". NOT comparable between these arms: their objectives measure different errors"
        lines = [
            spread(arm, [dict(run.curves.get(figure, ())) for run in found.runs if run.arm == arm])
            for arm in found.arms
        ]
        charts.append(Chart(title, lines, "images seen", settle=0.1 if figure == LOSS else 0.0, note=note))
    return charts


def spread(arm: str, runs: Sequence[dict[int, float]]) -> Line:
    """The mean over an arm's runs where all of those that have a curve were measured, between the extremes."""
    runs = [run for run in runs if run]
    at = sorted(set.intersection(*map(set, runs))) if runs else []
    each = [[run[x] for run in runs] for x in at]
    return Line(arm, at, [sum(v) / len(v) for v in each], [min(v) for v in each], [max(v) for v in each])


def everything(found: Compared) -> Table:
    """Every figure: means over seeds, and for two arms their difference."""
    two = len(found.arms) == 2
    by = {each.figure: each for each in found.differences} if two else {}
    unit = next(each.same for each in found.constants if each.what == "unit of the held-out loss")
    rows = []
    for figure in found.figures:
        means: list[object] = []
        for arm in found.arms:
            values = found.of(arm, figure)
            mean = sum(values) / len(values) if values else None
            means.append(mean if unit or figure != "held_out_loss" or mean is None else f"{short(mean)} ‡")
        run = next((run for run in found.runs if figure in run.figures), None)
        floor = run.figures[figure].floor if run else None
        better = run.figures[figure].better if run else "lower"
        row = [figure.replace("_", " "), better, floor, *means]
        if two:
            each = by.get(figure)
            span = f"{short(each.low)} to {short(each.high)}" if each and len(each.values) > 1 else None
            row.append(span)
        rows.append(row)
    if not unit:
        rows.append(["‡ each in its own unit: not comparable", "", "", *("" for _ in found.arms), *([""] * two)])
    header = ["figure", "better", "floor", *(mark(found, arm) for arm in found.arms)]
    return Table([*header, "difference, 95 %"] if two else header, rows)


def samples(found: Compared, spec: DataSpec) -> Picture | None:
    """One row an arm, the same noise and class in each column."""
    if not drawable(spec):
        return None
    seed = found.seeds[0]
    runs = [run for run in found.runs if run.seed == seed and run.samples is not None]
    if not runs:
        return None
    label, tiles = 16, [_row(run, spec) for run in runs]
    width, height = tiles[0].width + 4, tiles[0].height + label
    across = len(tiles) if spec.kind == "points" else 1  # scatter plots beside, rows of pictures below each other
    canvas = Image.new("RGB", (across * width, len(tiles) // across * height), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (run, tile) in enumerate(zip(runs, tiles, strict=True)):
        left, top = i % across * width, i // across * height
        pen.text((left + 3, top + 2), run.arm, fill=(60, 60, 60))
        canvas.paste(tile.convert("RGB"), (left, top + label))
    buffer = BytesIO()
    canvas.save(buffer, "PNG")
    write_bytes_atomic(found.path / "samples.png", buffer.getvalue())
    caption = f"seed {seed}; all arms begin at the same noise"
    if spec.kind == "image":
        alike = len({run.asked for run in runs}) == 1
        caption += (
            ", and a column asks for the same" if alike else "; a column is one noise, of which arms ask differently"
        )
    return Picture(caption, buffer.getvalue())


def _row(run: Run, spec: DataSpec) -> Image.Image:
    assert run.samples is not None
    paths = sorted(run.samples.glob("*.npy"))
    if spec.kind == "points":
        return grid(spec, spec.to_model(np.concatenate([np.load(path) for path in paths])))
    first = spec.to_model(np.load(paths[0])[:SHOWN])
    return grid(spec, first, columns=len(first))
