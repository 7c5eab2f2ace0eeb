"""``undiffuse ls``: the runs in a folder. Also the reading of a run folder, which ``show`` shares."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..config import load_json
from ..errors import UndiffuseError
from .options import AnyPath

EXAMPLES = """
undiffuse ls                       the runs in ./runs
undiffuse ls experiments           the runs in another folder
undiffuse ls --json                the same for a program
"""


@dataclass(frozen=True)
class Run:
    """One run folder, as far as it can be read. What is not known (yet) is None."""

    name: str
    path: Path
    state: str  # new, running, stopped, finished, failed or unreadable
    data: str | None = None
    step: int | None = None
    images: int | None = None
    total_images: int | None = None
    loss: float | None = None
    updated: str | None = None  # ISO 8601
    age_seconds: float | None = None
    size_bytes: int = 0
    note: str = ""  # why it is unreadable, or what else to know


def ls(folder: Annotated[AnyPath, tyro.conf.Positional] = Path("runs")) -> list[Run]:
    """List the runs in a folder, the latest first.

    A run that cannot be read is listed with the reason; it never hides the others.

    Args:
        folder: The folder that holds the run folders.

    Returns:
        One :class:`Run` a folder.

    Raises:
        UndiffuseError: the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "no such folder"
        raise UndiffuseError(f"{folder}: {what}; `undiffuse train DATA` makes runs, or name the folder that has yours")
    folders = [folder] if is_run(folder) else [entry for entry in folder.iterdir() if is_run(entry)]
    runs = [read_run(entry) for entry in sorted(folders)]
    return sorted(runs, key=lambda run: float("inf") if run.age_seconds is None else run.age_seconds)


def report(runs: list[Run]) -> str:
    if not runs:
        return "no runs here: `undiffuse train digits` makes the first"
    rows = [("RUN", "DATA", "STATE", "STEP", "IMAGES", "LOSS", "AGE", "SIZE")]
    rows += [
        (
            run.name,
            run.data or "-",
            run.state,
            "-" if run.step is None else str(run.step),
            short_count(run.images) + (f"/{short_count(run.total_images)}" if run.total_images else ""),
            "-" if run.loss is None else f"{run.loss:.4g}",
            short_time(run.age_seconds),
            short_bytes(run.size_bytes),
        )
        for run in runs
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [f"{run.name}: {run.note}" for run in runs if run.note]
    return "\n".join(lines + (["", *notes] if notes else []))


# --- reading a run folder ---------------------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    """Whether a training run has begun here."""
    return any((folder / name).is_file() for name in ("config.json", "status.json", "command.txt", "metrics.jsonl"))


def read_run(folder: Path) -> Run:
    """What a run folder says about itself; never raises for what is in it."""
    name, size, note = folder.resolve().name, 0, ""
    try:
        size = size_of(folder)
        config = _object(folder / "config.json")
        status = _object(folder / "status.json")
        tail = metrics_tail(folder / "metrics.jsonl", 1)
    except (UndiffuseError, OSError) as error:
        return Run(name, folder, "unreadable", size_bytes=size, age_seconds=_age(folder, None), note=str(error))
    known = (tail[-1] if tail else {}) | {key: value for key, value in status.items() if value is not None}
    state = str(status.get("state", "new"))
    age = _age(folder, _text(status.get("updated")))
    if state == "running" and _gone(status):
        state, note = "stopped", f"its process {status.get('pid')} is gone; the same command resumes it"
    return Run(
        name=name,
        path=folder,
        state=state,
        data=_text(config.get("data")),
        step=_whole(known.get("step")),
        images=_whole(known.get("images")),
        total_images=_whole(known.get("total_images")),
        loss=_number(known.get("loss")),
        updated=_text(status.get("updated")),
        age_seconds=age,
        size_bytes=size,
        note=note,
    )


def metrics_tail(path: Path, count: int) -> list[dict[str, Any]]:
    """The last ``count`` complete lines of a JSON-lines file; a line cut off by a crash is left out."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - 2000 * (count + 2))
        file.seek(start)
        lines = file.read().splitlines()[1 if start else 0 :]
    rows: list[dict[str, Any]] = []
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.insert(0, row)
        if len(rows) == count:
            break
    return rows


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder, links not followed."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except FileNotFoundError:  # a temporary file of a running trainer
                continue
    return total


def _object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    value = load_json(path)
    if not isinstance(value, dict):
        raise UndiffuseError(f"{path}: must be a JSON object")
    return value


def _age(folder: Path, updated: str | None) -> float | None:
    """Seconds since the trainer last wrote, by its own word or else by the clock of its files."""
    try:
        then = datetime.fromisoformat(updated) if updated else None
    except ValueError:
        then = None
    try:
        if then is None:
            files = [folder, *(entry for entry in folder.iterdir() if entry.is_file())]
            then = datetime.fromtimestamp(max(file.stat().st_mtime for file in files), UTC)
    except OSError:
        return None
    return max(0.0, (datetime.now(UTC) - then.astimezone(UTC)).total_seconds())


def _gone(status: dict[str, Any]) -> bool:
    """Whether the run's process is known to have ended; another machine's processes are not known."""
    pid, host = _whole(status.get("pid")), status.get("host", socket.gethostname())
    if not pid or pid < 0 or host != socket.gethostname() or os.name == "nt":
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # it exists and belongs to somebody else
        return False
    return False


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


# --- short words for long numbers -------------------------------------------------------------------------------------


def short_count(number: float | None) -> str:
    """1234567 -> 1.23M."""
    if number is None:
        return "-"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def short_bytes(number: int) -> str:
    """2500000 -> 2.5 MB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"


def short_time(seconds: float | None) -> str:
    """7200 -> 2 h."""
    if seconds is None:
        return "-"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
