"""``report.html`` in the run folder: how training goes, as one self-contained page that refreshes during the run.

Everything on it is read from the run folder's own files and the held-out curve, so it can be made again at any time.
Its size is bounded: long curves are averaged to 400 points, and of many previews 24 are kept, at most 640 pixels wide.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from PIL import Image

from ..page import Chart, Charts, Code, Facts, Line, Notice, Part, Picture, Section, Slides, Words, short, write
from .convergence import Forecast
from .held_out import Curve, Probe
from .recipe import Recipe

if TYPE_CHECKING:
    from .run import Progress
    from .tasks import Judge

PICTURES = 24
SIDE = 640
SMALL = 64_000
"""A preview of at most so many bytes is embedded as it is."""
REFRESH = 30
SEEN = "images seen"


@final
class Report:
    """Writes the page of one run folder; remembers the pictures that it has made smaller."""

    def __init__(self, out: Path, recipe: Recipe) -> None:
        self.out, self.recipe = out, recipe
        self._pictures: dict[str, Picture] = {}

    def write(
        self,
        state: str,
        where: Progress,
        curve: Curve,
        forecast: Forecast | None,
        held_out: Judge | None,
        probes: Sequence[Probe],
        error: str = "",
    ) -> None:
        """Write the page. ``state`` is the run's; ``error`` is why it failed."""
        rows = _rows(self.out / "metrics.jsonl")
        config = _text(self.out / "config.json")
        parts: list[Part] = [Notice("bad", error)] if error else []
        parts += [facts(state, where, rows, curve), *notices(where, curve, forecast, held_out)]
        parts.append(Section("Curves", [Charts(charts(self.recipe, rows, curve, held_out, probes))]))
        pictures = self.pictures()
        if pictures:
            title, after = (
                "Samples",
                "Samples of the averaged weights from the same noise; move the slider through time.",
            )
            if self.recipe.codec is not None:
                title, after = "Reconstructions", "Rows in turn: data, and what the averaged codec makes of them."
            parts.append(Section(title, [Words(after), Slides(pictures)]))
        parts += [
            Section("Command", [Code(_text(self.out / "command.txt"))], folded=True),
            Section("Configuration", [Code(config)], folded=True),
            Section("Environment", [Code(_text(self.out / "env.json"))], folded=True),
            Section("Log", [Code("\n".join(_text(self.out / "log.txt").splitlines()[-60:]))], folded=True),
        ]
        name = self.out.resolve().name
        lead = f"recipe {self.recipe.name}, {state}, as of {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        write(
            self.out / "report.html",
            name,
            parts,
            lead=lead,
            refresh=REFRESH if state in ("running", "saving") else None,
        )

    def pictures(self) -> list[Picture]:
        """The previews through time, thinned out evenly; first and last are always among them."""
        paths = sorted((self.out / "samples").glob("preview-*.png"), key=lambda path: (len(path.name), path.name))
        if len(paths) > PICTURES:
            paths = [paths[i * (len(paths) - 1) // (PICTURES - 1)] for i in range(PICTURES)]
        return [picture for picture in map(self._picture, paths) if picture is not None]

    def _picture(self, path: Path) -> Picture | None:
        if path.name not in self._pictures:
            step = int(path.stem.removeprefix("preview-"))
            images = step * self.recipe.training.batch_size
            caption = f"after {images:,} images, update {step:,}"
            try:
                self._pictures[path.name] = smaller(caption, path.read_bytes())
            except OSError:  # removed, or damaged: the others are shown
                return None
        return self._pictures[path.name]


def facts(state: str, where: Progress, rows: Sequence[dict[str, Any]], curve: Curve) -> Facts:
    """What is read first."""
    of = "" if where.total_images is None else f" of {short(where.total_images)}"
    last = curve.rows[-1] if curve.rows else None
    seconds = rows[-1].get("seconds") if rows else None
    speed = rows[-1].get("images_per_second") if rows else None
    found: list[tuple[str, object]] = [("state", state), (SEEN, f"{short(where.images)}{of}")]
    if last is not None:
        error = "" if last.error is None else f" ± {last.error:.4f}"
        found.append(("held-out loss", "not finite" if last.ema is None else f"{last.ema:.4f}{error}"))
    if curve.best is not None:
        found.append(("best", f"{curve.best.ema:.4f} at {short(curve.best.images)}"))
    found.append(("training loss", "-" if where.loss is None else f"{where.loss:.4f}"))
    if speed:
        found.append(("images/s", f"{speed:,.0f}"))
    if seconds is not None:
        found.append(("time", _time(seconds)))
    if state == "running" and where.seconds_left is not None:
        found.append(("left", _time(where.seconds_left)))
    return Facts(found)


def notices(where: Progress, curve: Curve, forecast: Forecast | None, held_out: Judge | None) -> list[Part]:
    """What the curves mean, in words."""
    if held_out is None:
        return [Notice("info", "nothing is held out, so only the training loss is known: it falls by memorising, too")]
    found: list[Part] = []
    last, best = (curve.rows[-1], curve.best) if curve.rows else (None, None)
    if last is not None and last.ema is None:
        found.append(Notice("bad", "the held-out loss is not finite"))
    if last is not None and best is not None and last.ema is not None and best.ema is not None:
        noise = last.noise or 0.0
        if last.ema > best.ema + noise and best.images < 0.8 * last.images:
            found.append(
                Notice(
                    "warn",
                    f"the held-out loss was lowest at {short(best.images)} images and has risen by "
                    f"{last.ema - best.ema:.4f} since: the model begins to memorise; best/ keeps the weights of then",
                )
            )
    if forecast is not None:
        found.append(Notice("good" if forecast.converged else "info", f"{forecast} (a fit of the averaged weights)"))
    elif where.total_images is not None and len(curve.rows) > 1:
        found.append(
            Notice(
                "info",
                "the learning rate falls to the end of this run, so its curve does not tell what more training would "
                "gain; a run with --until-converged does",
            )
        )
    return found


def charts(
    recipe: Recipe, rows: Sequence[dict[str, Any]], curve: Curve, held_out: Judge | None, probes: Sequence[Probe]
) -> list[Chart]:
    """Every curve of the run."""
    seen = [row["images"] for row in rows]

    def logged(name: str) -> list[float | None]:
        return [row.get(name) for row in rows]

    points = curve.rows
    at = [point.images for point in points]
    lines = [Line("training", seen, logged("loss"))]
    if points:
        lines += [Line("held out", at, [p.raw for p in points])]
        lines += [Line("held out, averaged weights", at, [p.ema for p in points])]
    found = [Chart("Loss", lines, SEEN, settle=0.05, marks={"best": curve.best.images} if curve.best else {})]
    if points and held_out is not None and points[-1].ema_bands:
        names = held_out.band_names(recipe.model.schedule)
        bands = [Line(name, at, [p.ema_bands[i] for p in points]) for i, name in enumerate(names)]
        note = "averaged weights; a quarter of the draws each, and their mean is the held-out loss"
        found.append(Chart("Held-out loss by noise level", bands, SEEN, settle=0.05, note=note))
    floors = {probe.name: probe.floor for probe in probes}
    for probe in dict.fromkeys(name for point in points for name in point.probes):
        probed = [point for point in points if probe in point.probes]
        names, when = dict.fromkeys(n for point in probed for n in point.probes[probe]), [p.images for p in probed]
        each = [Line(name, when, [point.probes[probe].get(name) for point in probed]) for name in names]
        floor = {f"real against real: {name}": value for name, value in floors.get(probe, {}).items()}
        found.append(Chart(probe, each, SEEN, floors=floor))
    found += [
        Chart("Learning rate", [Line("learning rate", seen, logged("lr"))], SEEN, log=False),
        Chart("Length of the gradient", [Line("norm, before clipping", seen, logged("grad_norm"))], SEEN),
        Chart("Speed", [Line("images a second", seen, logged("images_per_second"))], SEEN, log=False),
    ]
    return found


def smaller(caption: str, data: bytes) -> Picture:
    """A PNG as it is if it is small, else a WebP of at most :data:`SIDE` pixels. Raises ``OSError`` for no picture."""
    if len(data) <= SMALL and data.startswith(b"\x89PNG"):
        return Picture(caption, data)
    buffer = BytesIO()
    with Image.open(BytesIO(data)) as image:
        image.load()
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        image.save(buffer, "WEBP", quality=85)
    return Picture(caption, buffer.getvalue(), "webp")


def _rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics."""
    rows = []
    for line in _text(path).splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("images"), int):
            rows.append(row)
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""


def _time(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if seconds >= 100 else f"{seconds:.0f} s"
