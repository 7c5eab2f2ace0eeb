"""What run folders say, for the page. A request names a run; it never names a path."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from ..commands import plain
from ..commands.ls import is_run, ls, read_run
from ..errors import UndiffuseError

POINTS = 600
"""The most points of a curve that are sent."""
PREVIEWS = 12


@final
class Runs:
    """The runs that were named, and those in ./runs.

    Args:
        named: folders by name.
        around: the folder whose runs are listed too.
    """

    def __init__(self, named: Mapping[str, Path], around: Path = Path("runs")) -> None:
        self.named = {name: folder for name, folder in named.items() if is_run(folder)}
        self.around = around
        self._lights: dict[str, tuple[object, list[dict[str, Any]]]] = {}

    def folders(self) -> dict[str, Path]:
        """Every run by name; those that were named come first."""
        found = dict(self.named)
        if self.around.is_dir() and not is_run(self.around):
            for run in ls(self.around):
                if run.path.resolve() not in {each.resolve() for each in found.values()}:
                    found.setdefault(run.name, run.path)
        return found

    def listed(self) -> list[dict[str, Any]]:
        rows = []
        for name, folder in self.folders().items():
            row = plain(read_run(folder))
            rows.append({**row, "name": name, "path": str(folder)})
        return rows

    def curves(self, folder: Path) -> dict[str, Any]:
        """Metrics, held-out losses, and how many previews there are."""
        metrics, held_out = lines(folder / "metrics.jsonl"), lines(folder / "held_out.jsonl")

        def series(rows: list[dict[str, Any]], key: str) -> list[list[float]]:
            kept = [row for row in rows if _number(row.get("images")) and _number(row.get(key))]
            kept = kept[:: max(1, -(-len(kept) // POINTS))]
            return [[row["images"] for row in kept], [row[key] for row in kept]]

        return {
            "run": {**plain(read_run(folder)), "path": str(folder)},
            "loss": series(metrics, "loss"),
            "rate": series(metrics, "images_per_second"),
            "gradient": series(metrics, "grad_norm"),
            "held_out": series(held_out, "ema"),
            "held_out_raw": series(held_out, "raw"),
            "previews": len(previews(folder)),
        }

    def lights(self, folder: Path) -> list[dict[str, Any]]:
        """The doctor's findings; looked for again when the run has moved on."""
        from ..training.aftercare import examine_run

        state = plain(read_run(folder))
        now = (state["step"], state["state"])
        before = self._lights.get(str(folder))
        if before is None or before[0] != now:
            before = self._lights[str(folder)] = (now, plain(examine_run(folder)))
        return before[1]


def previews(folder: Path) -> list[Path]:
    """The pictures of what the run's model made, in order; the latest few."""
    samples = folder / "samples"
    if not samples.is_dir():
        return []
    files = [file for file in sorted(samples.glob("preview-*.png")) if file.is_file() and not file.is_symlink()]
    return files[-PREVIEWS:]


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file that hold an object; the last may be half written."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UndiffuseError(f"{path.name} cannot be read: {error.strerror}") from None
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
