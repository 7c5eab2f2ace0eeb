"""The doctor for a run folder: is the run that is there well?"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..codecs import FILE, codec_meaning
from ..config import load_json
from ..errors import UndiffuseError
from ..pipeline import resolve_device
from ..weights import read_weights
from . import checkpoint, forensics
from .doctor import Finding

AGAIN = "run its command again (command.txt): it goes on from the newest whole checkpoint"


def examine_run(run: Path, *, device: str = "auto", nan: bool = False) -> list[Finding]:
    """State, checkpoints, losses, average, disk; with ``nan`` also a replay of the update that was not finite.

    Raises:
        UndiffuseError: with ``nan``, where there is no such update.
    """
    found = [*_state(run), *_checkpoints(run), *_losses(run), *_model(run), *_disk(run), *_nan(run)]
    if nan:
        found += _replayed(run, resolve_device(device))
    return found


def _state(run: Path) -> Iterator[Finding]:
    try:
        status = load_json(run / "status.json")
        state, step = str(status["state"]), int(status["step"])
    except (UndiffuseError, KeyError, TypeError, ValueError) as error:
        yield Finding("state", "yellow", f"status.json says nothing ({error})", AGAIN)
        return
    measured = f"{state}, update {step:,}"
    if state == "failed":
        why = _last_failure(run)
        yield Finding("state", "red", measured + (f": {why}" if why else ""), "mend that, then " + AGAIN)
    elif state == "running" and not checkpoint.held(run):
        yield Finding("state", "yellow", measured + ", but its process is gone", AGAIN)
    elif state == "stopped":
        yield Finding("state", "green", measured + ": the same command goes on")
    else:
        yield Finding("state", "green", measured)


def _last_failure(run: Path) -> str:
    try:
        lines = (run / "log.txt").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    said = [line.partition("failed: ")[2] for line in lines if line.startswith("failed: ")]
    return said[-1][:300] if said else ""


def _checkpoints(run: Path) -> Iterator[Finding]:
    paths, whole = checkpoint.listed(run / "checkpoints"), []
    for path in paths:
        try:
            whole.append(checkpoint.verify(path).step)
        except (UndiffuseError, OSError, KeyError, TypeError) as error:
            last = path == paths[-1]
            yield Finding("checkpoints", "red" if last else "yellow", str(error), f"remove {path}; {AGAIN}")
    if whole:
        names = ", ".join(f"{step:,}" for step in whole[-4:])
        yield Finding("checkpoints", "green", f"{len(whole)} whole, every byte as written: update {names}")
    elif not paths:
        yield Finding("checkpoints", "yellow", "none yet", "let it reach its first, or lower training.checkpoint_every")


def _losses(run: Path) -> Iterator[Finding]:
    rows: list[dict[str, Any]] = []
    try:
        for line in (run / "metrics.jsonl").read_bytes().splitlines():
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) and "loss" in row else []
    except (OSError, ValueError):
        pass  # the last line may be half written
    if not rows:
        yield Finding("losses", "yellow", "no line of metrics yet", "wait for training.log_every updates")
        return
    bad = [row.get("step") for row in rows if not _finite(row["loss"]) or not _finite(row.get("grad_norm", 0.0))]
    losses = [float(row["loss"]) for row in rows if _finite(row["loss"])]
    few = max(1, len(losses) // 10)
    if bad:
        yield Finding(
            "losses", "yellow", f"not finite in {len(bad)} of {len(rows)} lines, first at update {bad[0]}", "--nan"
        )
    if not losses:
        return
    before, now = sum(losses[:few]) / few, sum(losses[-few:]) / few
    measured = f"{before:.3g} at first, {now:.3g} at last, {len(rows)} lines"
    if len(losses) >= 10 and now > 1.5 * min(
        sum(losses[i : i + few]) / few for i in range(0, len(losses) - few + 1, few)
    ):
        yield Finding(
            "losses", "yellow", measured + ": it has risen again", "lower optimiser.lr, or take the checkpoint before"
        )
    elif not bad:
        yield Finding("losses", "green", measured + ", all finite")


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _model(run: Path) -> Iterator[Finding]:
    """The averaged weights, which are what is sampled from."""
    folder = run / "model"
    if not folder.is_dir():
        yield Finding("average", "yellow", "no model/ yet", "it is written with the first checkpoint")
        return
    codec = folder / FILE
    try:
        if codec.is_file():
            weights, step = read_weights(codec), codec_meaning(codec)["info"]["step"]
        else:
            weights = read_weights(folder / "model.safetensors")
            step = load_json(folder / "pipeline.json")["info"]["step"]
    except (UndiffuseError, OSError, KeyError, TypeError) as error:
        yield Finding("average", "red", f"model/ cannot be read: {error}", AGAIN)
        return
    wrong = [
        name for name, tensor in weights.items() if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]
    still = [name for name, tensor in weights.items() if tensor.numel() and not bool(tensor.any())]
    measured = f"model/ is of update {step:,}, {len(weights)} tensors"
    if wrong:
        yield Finding(
            "average", "red", f"{measured}; {wrong[0]} is not finite", "take the average of an earlier checkpoint"
        )
    elif len(still) > len(weights) / 2:
        yield Finding("average", "red", f"{measured}; {len(still)} of them are 0", AGAIN)
    else:
        yield Finding("average", "green", measured + ", all finite")


def _disk(run: Path) -> Iterator[Finding]:
    paths = checkpoint.listed(run / "checkpoints")
    one = max((sum(file.stat().st_size for file in path.iterdir() if file.is_file()) for path in paths), default=0)
    free = shutil.disk_usage(run).free
    measured = f"{free / 1e9:,.1f} GB free, a checkpoint has {one / 1e9:.2g} GB"
    if free < 2 * one:
        yield Finding("disk", "red", measured, "free some space: the next checkpoint will not fit")
    else:
        yield Finding("disk", "green", measured)


def _nan(run: Path) -> Iterator[Finding]:
    if not (run / forensics.FOLDER).is_dir():
        yield Finding("finite", "green", "every loss and gradient was")
        return
    try:
        report = load_json(run / forensics.FOLDER / "report.json")
        measured, cause = f"update {report['step']} was not finite", str(report["cause"])
    except (UndiffuseError, KeyError, TypeError) as error:
        measured, cause = f"an update was not finite ({error})", "unknown cause"
    yield Finding("finite", "yellow", f"{measured}: {cause}", f"undiffuse doctor {run} --nan looks closer")


def _replayed(run: Path, device: str) -> Iterator[Finding]:
    report, found = forensics.investigate(run, device)
    if not found.repeated:
        yield Finding("replay", "yellow", f"update {found.step}: {found.cause}", "test the memory, or try --device cpu")
        return
    which = ", ".join(map(str, found.items[:5])) + (f" and {len(found.items) - 5} more" if len(found.items) > 5 else "")
    times = f", t = {min(found.times):.4f} to {max(found.times):.4f}" if found.times else ""
    some = f"{len(found.items)} samples (item {which}){times}" if found.items else "no sample alone"
    yield Finding(
        "replay",
        "red",
        f"update {found.step} of seed {found.seed} is not finite again: {some}",
        found.cause,
    )
    where = f"the output of {found.module}" if found.module else "no module's output"
    behind = f", then the gradient at the output of {found.backward}" if found.backward else ""
    some = ", ".join(found.gradients[:2]) + (
        f" and {len(found.gradients) - 2} more" if len(found.gradients) > 2 else ""
    )
    yield Finding(
        "replay",
        "red",
        f"first: {where}{behind}; gradients that are not finite: {some or 'none'}",
        f"the last good checkpoint is {report['last_good'] or 'none'}",
    )
