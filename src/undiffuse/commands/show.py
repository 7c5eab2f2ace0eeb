"""``undiffuse show``: what one run or one saved model is."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..config import from_json, load_json
from ..errors import UndiffuseError
from .ls import Run, is_run, metrics_tail, read_run, short_bytes, short_count, short_time
from .options import AnyPath

EXAMPLES = """
undiffuse show runs/demo           what was trained, how far, and where
undiffuse show demo                the same: a name is looked up in ./runs
undiffuse show runs/demo/model     a saved model alone
undiffuse show demo --json         everything, for a program
"""

CODEC = "codec.safetensors"
DIFFUSERS = "model_index.json"


@dataclass(frozen=True)
class Model:
    """What a saved pipeline's folder says without loading a weight."""

    path: Path
    parameters: int
    tensors: int
    dtypes: tuple[str, ...]
    size_bytes: int
    pipeline: dict[str, Any]
    terminal_snr: float | None  # alpha^2/sigma^2 at t = 1: 0 means that sampling starts from exactly what training saw


@dataclass(frozen=True)
class Shown:
    """A run (``run`` and what it has written) or a model alone (``run`` is None)."""

    path: Path
    run: Run | None
    config: dict[str, Any]
    command: str
    model: Model | None
    metrics: list[dict[str, Any]]  # the last lines of metrics.jsonl
    files: dict[str, Path]
    notes: list[str]  # what could not be read, and why


def show(run_or_model: Annotated[AnyPath, tyro.conf.Positional], tail: int = 5) -> Shown:
    """Describe a run or a saved model: data, settings, parameters, terminal SNR, last metrics, files.

    Args:
        run_or_model: A run folder, the name of a run in ./runs, or a folder with a pipeline.json or of diffusers.
        tail: How many of the last lines of metrics to show.

    Raises:
        UndiffuseError: it is neither a run nor a model.
    """
    path = find(Path(run_or_model))
    if not is_run(path):
        return Shown(path, None, {}, "", read_model(path), [], _files(path), [])
    run, notes = read_run(path), []
    config: dict[str, Any] = {}
    model = None
    # One broken file must not hide the rest of the run.
    try:
        if (path / "config.json").exists():
            config = dict(load_json(path / "config.json"))
    except (UndiffuseError, TypeError, ValueError) as error:
        notes.append(str(error))
    try:
        model = read_model(path / "model") if (path / "model").exists() else None
    except (UndiffuseError, OSError) as error:
        notes.append(str(error))
    command = path / "command.txt"
    text = command.read_text("utf-8", errors="replace").strip() if command.is_file() else ""
    metrics = metrics_tail(path / "metrics.jsonl", tail) if tail > 0 else []
    return Shown(path, run, config, text, model, metrics, _files(path), notes)


def report(shown: Shown) -> str:
    lines = [f"{shown.path}"]
    if run := shown.run:
        seen = f"{short_count(run.images)}" + (f" of {short_count(run.total_images)}" if run.total_images else "")
        loss = "-" if run.loss is None else f"{run.loss:.4g}"
        lines += [
            f"  state     {run.state}, {short_time(run.age_seconds)} ago" + (f" ({run.note})" if run.note else ""),
            f"  data      {run.data or '-'}",
            f"  progress  step {'-' if run.step is None else run.step}, {seen} images, loss {loss}",
            f"  size      {short_bytes(run.size_bytes)}",
            *([f"  report    {shown.files['report.html']}"] if "report.html" in shown.files else []),
        ]
    if shown.command:
        lines.append(f"  command   {shown.command}")
    if model := shown.model:
        snr = "-" if model.terminal_snr is None else f"{model.terminal_snr:.3g}"
        if model.terminal_snr:
            snr += f": {math.sqrt(model.terminal_snr):.2%} of the signal's amplitude is left in the noise at t = 1"
        lines += [
            "",
            f"model  {model.path}",
            f"  parameters    {short_count(model.parameters)} in {model.tensors} tensors, {', '.join(model.dtypes)}, "
            + short_bytes(model.size_bytes),
            *([f"  terminal SNR  {snr}"] if {"model", "diffusers"} & set(model.pipeline) else []),
            *_tree(model.pipeline),
        ]
    if shown.config:
        lines += ["", "config", *_tree(shown.config)]
    if shown.metrics:
        lines += ["", "metrics", *_table(shown.metrics)]
    if shown.files:
        width = max(map(len, shown.files))
        lines += ["", "files", *(f"  {name:<{width}}  {path}" for name, path in shown.files.items())]
    return "\n".join(lines + [f"not read: {note}" for note in shown.notes])


# --- reading ----------------------------------------------------------------------------------------------------------


def find(path: Path) -> Path:
    """The folder of a run or a model: the path itself, or the name of a run in ./runs."""
    for folder in (path, Path("runs") / path):
        if is_run(folder) or any((folder / name).is_file() for name in ("pipeline.json", CODEC, DIFFUSERS)):
            return folder
    if not path.exists():
        raise UndiffuseError(f"{path}: no such run or model; `undiffuse ls` lists the runs")
    raise UndiffuseError(f"{path}: neither a run (no config.json) nor a model (no pipeline.json)")


def read_model(folder: Path) -> Model:
    """Describe a pipeline's folder, or a codec's, from its JSON and the header of its weights; no weight is loaded."""
    if (folder / CODEC).is_file():
        from ..codecs import codec_meaning

        return _described(folder, folder / CODEC, codec_meaning(folder / CODEC), None)
    if (folder / DIFFUSERS).is_file():
        return _theirs(folder)
    pipeline = load_json(folder / "pipeline.json")
    if not isinstance(pipeline, dict):
        raise UndiffuseError(f"{folder / 'pipeline.json'}: must be a JSON object")
    return _described(folder, folder / "model.safetensors", pipeline, _terminal_snr(pipeline))


def _described(folder: Path, weights: Path, stated: dict[str, Any], terminal_snr: float | None) -> Model:
    from ..weights import read_header

    header = read_header(weights)
    return Model(
        path=folder,
        parameters=header.parameters,
        tensors=len(header.shapes),
        dtypes=tuple(sorted(set(header.dtypes.values()))),
        size_bytes=weights.stat().st_size,
        pipeline=stated,
        terminal_snr=terminal_snr,
    )


def _theirs(folder: Path) -> Model:
    """A folder of diffusers: its parts, and what its scheduler means in our words."""
    from ..asking import Sampling
    from ..config import to_json
    from ..interop.diffusers.folder import Folder
    from ..interop.diffusers.schedulers import read_scheduler
    from ..pipeline import REGISTRIES

    theirs = Folder(folder)
    parts = [part for part in theirs.parts if part != "scheduler" and theirs.inside(part, "config.json").is_file()]
    headers = {part: theirs.headers(part) for part in parts}
    meaning = read_scheduler(*theirs.scheduler())
    sampling = to_json(Sampling(meaning.solver, meaning.grid), REGISTRIES)
    every = [header for each in headers.values() for header in each]
    return Model(
        path=folder,
        parameters=sum(header.parameters for header in every),
        tensors=sum(len(header.shapes) for header in every),
        dtypes=tuple(sorted({dtype for header in every for dtype in header.dtypes.values()})),
        size_bytes=sum(path.stat().st_size for part in parts for path in theirs.files(part)),
        pipeline={
            "diffusers": theirs.family,
            "parts": {part: theirs.parts[part][1] for part in parts},
            "schedule": str(meaning.schedule),
            "prediction": type(meaning.prediction).__name__,
            "sampling": {name: sampling[name] for name in ("solver", "grid")},
        },
        terminal_snr=meaning.schedule.terminal_snr,
    )


def _terminal_snr(pipeline: dict[str, Any]) -> float | None:
    """From the schedule that the pipeline states; None where it states none that we know."""
    from ..schedules import SCHEDULES, Schedule

    model = pipeline.get("model")
    try:
        stated = model.get("schedule") if isinstance(model, dict) else None
        return from_json(Schedule, stated, "schedule", {Schedule: SCHEDULES}).terminal_snr
    except UndiffuseError:
        return None


def _files(folder: Path) -> dict[str, Path]:
    return {entry.name: entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")}


# --- what people read -------------------------------------------------------------------------------------------------


def _tree(table: dict[str, Any], indent: int = 2) -> list[str]:
    lines = []
    for name, value in table.items():
        if isinstance(value, dict) and value:
            lines += [f"{' ' * indent}{name}", *_tree(value, indent + 2)]
        else:
            text = json.dumps(value)
            lines.append(
                f"{' ' * indent}{name:<{max(1, 24 - indent)}} {text if len(text) <= 90 else text[:86] + ' ...'}"
            )
    return lines


def _table(rows: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
