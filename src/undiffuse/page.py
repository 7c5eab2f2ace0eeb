"""One self-contained HTML page: what was measured, readable at a glance on a phone or a desk, in light and dark.

    render("digits", [Facts([("loss", "0.34")]), Charts([Chart("loss", [Line("training", x, y)])])])

A page is a list of parts, each a value that knows its HTML. It asks the network for nothing and says so (a content
security policy forbids it), and text is never markup: every string passes :func:`text`. The one script moves the slider
through pictures; its hash is in the policy, so no other script can run.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby, pairwise
from pathlib import Path
from typing import Literal

from .config import write_bytes_atomic

WIDTH, HEIGHT = 380, 230
"""A chart's own units: text of 11 of them is 11 pixels on a phone, where a chart fills the width."""
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 8, 32
POINTS = 400
"""The most points of a line that are drawn; more are averaged in groups."""


def text(value: object) -> str:
    """Any text as HTML that shows just this text; half characters and NUL, which no page may hold, become marks."""
    whole = str(value).replace("\0", "\ufffd").encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return escape(whole, quote=True)


class Part(ABC):
    """Abstract: a piece of a page."""

    @abstractmethod
    def html(self) -> str:
        """Its HTML, every string in it escaped."""


# --- words and numbers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts(Part):
    """Names and their values, large: what is read first."""

    rows: Sequence[tuple[str, object]]

    def html(self) -> str:
        cells = (f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in self.rows)
        return f'<dl class="facts">{"".join(cells)}</dl>'


@dataclass(frozen=True)
class Table(Part):
    """A table; numbers (not text) are aligned to the right and written with four digits, None as a dash."""

    header: Sequence[str]
    rows: Sequence[Sequence[object]]

    def html(self) -> str:
        head = "".join(f"<th>{text(name)}</th>" for name in self.header)
        body = "".join(f"<tr>{''.join(map(self._cell, row))}</tr>" for row in self.rows)
        return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'

    @staticmethod
    def _cell(value: object) -> str:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return f'<td class="number">{short(value)}</td>'
        return f"<td>{'–' if value is None else text(value)}</td>"


@dataclass(frozen=True)
class Notice(Part):
    """One line with a coloured edge and a sign: ``good``, ``warn``, ``bad`` or plain ``info``."""

    kind: Literal["good", "warn", "bad", "info"]
    message: str

    def html(self) -> str:
        sign = {"good": "✓", "warn": "!", "bad": "✗", "info": "i"}[self.kind]
        return f'<p class="notice {self.kind}"><b>{sign}</b> <span>{text(self.message)}</span></p>'


@dataclass(frozen=True)
class Words(Part):
    """A paragraph."""

    message: str

    def html(self) -> str:
        return f"<p>{text(self.message)}</p>"


@dataclass(frozen=True)
class Code(Part):
    """Text as it is: a command, a configuration."""

    content: str

    def html(self) -> str:
        return f"<pre>{text(self.content)}</pre>"


@dataclass(frozen=True)
class Section(Part):
    """Parts under a heading; ``folded`` ones open on a click."""

    title: str
    parts: Sequence[Part]
    folded: bool = False

    def html(self) -> str:
        inner = "".join(part.html() for part in self.parts)
        if self.folded:
            return f"<details><summary>{text(self.title)}</summary>{inner}</details>"
        return f"<section><h2>{text(self.title)}</h2>{inner}</section>"


# --- pictures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture(Part):
    """An image file's bytes, embedded, with a caption."""

    caption: str
    data: bytes
    kind: Literal["png", "webp", "jpeg", "gif"] = "png"

    def html(self) -> str:
        return f"<figure>{self.image()}<figcaption>{text(self.caption)}</figcaption></figure>"

    def image(self) -> str:
        """The ``img`` alone."""
        source = f"data:image/{self.kind};base64,{base64.b64encode(self.data).decode()}"
        return f'<img alt="{text(self.caption)}" src="{source}">'


@dataclass(frozen=True)
class Slides(Part):
    """Pictures through time under one slider; the last is shown first, and alone where no script runs."""

    pictures: Sequence[Picture]

    def html(self) -> str:
        if not self.pictures:
            return ""
        last = len(self.pictures) - 1
        slides = "".join(
            f"<div{'' if i == last else ' hidden'}>{picture.html()}</div>" for i, picture in enumerate(self.pictures)
        )
        slider = f'<input type="range" min="0" max="{last}" value="{last}" aria-label="which picture">' if last else ""
        return f'<div class="slides">{slider}{slides}</div>'


# --- charts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A curve. Where ``y`` is None or not finite it is interrupted. ``low`` and ``high`` shade a band around it."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None


@dataclass(frozen=True)
class Chart(Part):
    """Curves over one axis.

    Attributes:
        lines: drawn in this order; the legend states the last value of each.
        x_label: what the horizontal axis counts.
        log: logarithmic heights (values that are not positive are left out); None: where the values span a factor of
            five or more.
        floors: dashed horizontal lines by name, such as what real data would score.
        marks: dashed vertical lines by name.
        settle: this share of each line's points, its first, does not set the heights: a loss falls far at first, and
            what matters comes later.
        note: a sentence below.
    """

    title: str
    lines: Sequence[Line]
    x_label: str = ""
    log: bool | None = None
    floors: Mapping[str, float] = field(default_factory=dict)
    marks: Mapping[str, float] = field(default_factory=dict)
    settle: float = 0.0
    note: str = ""

    def html(self) -> str:
        drawn = [_finite(line) for line in self.lines]
        widths = [x for line in drawn for x in line.x]
        curves = [ys for line in drawn for ys in (line.y, line.low or (), line.high or ())]
        heights = [v for ys in curves for v in ys[int(self.settle * len(ys)) :] if v is not None]
        heights += [v for v in self.floors.values() if math.isfinite(v)]
        log = self.log
        if log is None:
            log = bool(heights) and min(heights) > 0 and max(heights) >= 5 * min(heights)
        if log:
            heights = [v for v in heights if v > 0]
        note = f'<p class="note">{text(self.note)}</p>' if self.note else ""
        title = f"<h3>{text(self.title)}</h3>"
        if not heights or not widths:
            return f'<figure class="chart">{title}<p class="note">nothing to draw yet</p>{note}</figure>'
        start = 0 if 0 < min(widths) < 0.3 * max(widths) else min(widths)  # counts begin at 0
        across = Axis.of(start, max(widths), LEFT, WIDTH - RIGHT, padded=False)
        up = Axis.of(min(heights), max(heights), HEIGHT - BOTTOM, TOP, log=log)
        body = [self._frame(across, up), f'<svg x="{LEFT}" y="{TOP}" width="{WIDTH - RIGHT - LEFT}" ']  # it clips
        body.append(f'height="{HEIGHT - BOTTOM - TOP}" viewBox="{LEFT} {TOP} {WIDTH - RIGHT - LEFT} ')
        body.append(f'{HEIGHT - BOTTOM - TOP}">')
        body += [_curve(line, i % COLOURS, across, up) for i, line in enumerate(drawn)] + ["</svg>"]
        for value in self.floors.values():
            if math.isfinite(value) and (value > 0 or not log):
                y = up(value)
                body.append(f'<path class="floor" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        for value in self.marks.values():
            if across.low <= value <= across.high:
                body.append(f'<path class="floor" d="M{across(value):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        label = f"{self.title}: " + ", ".join(line.name for line in self.lines)
        svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(label)}">{"".join(body)}</svg>'
        return f'<figure class="chart">{title}{svg}{self._legend(drawn)}{note}</figure>'

    def _frame(self, across: Axis, up: Axis) -> str:
        parts = []
        for value, label in up.ticks():
            y = up(value)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text(label)}</text>')
        for value, label in across.ticks():
            x = across(value)
            anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="{anchor}">{text(label)}</text>')
        parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{text(self.x_label)}</text>'
        )
        return "".join(parts)

    def _legend(self, drawn: Sequence[Line]) -> str:
        entries = []
        for i, line in enumerate(drawn):
            last = next((v for v in reversed(line.y) if v is not None), None)
            value = "" if last is None else f" <b>{short(last)}</b>"
            entries.append(f'<li><i class="s{i % COLOURS}"></i>{text(line.name)}{value}</li>')
        for name, value in self.floors.items():
            entries.append(f'<li><i class="dash"></i>{text(name)} <b>{short(value)}</b></li>')
        entries += [f'<li><i class="dash up"></i>{text(name)}</li>' for name in self.marks]
        return f'<ul class="legend">{"".join(entries)}</ul>'


@dataclass(frozen=True)
class Bars(Part):
    """Counts by name, beside each other: what was found as bars, what was expected as a line across each."""

    title: str
    names: Sequence[str]
    found: Sequence[float]
    expected: Sequence[float]
    found_name: str = "found"
    expected_name: str = "expected"
    note: str = ""

    def html(self) -> str:
        up = Axis.of(0.0, max([1.0, *self.found, *self.expected]) * 1.04, HEIGHT - BOTTOM, TOP, padded=False)
        width = (WIDTH - RIGHT - LEFT) / max(1, len(self.names))
        body = []
        for value, label in up.ticks():
            y = up(value)
            body.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            body.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text(label)}</text>')
        room = max(1, math.ceil(len(self.names) * max(map(len, self.names), default=1) * 7 / (WIDTH - RIGHT - LEFT)))
        for i, (name, found, expected) in enumerate(zip(self.names, self.found, self.expected, strict=True)):
            x, y, line = LEFT + i * width, up(found), up(expected)
            bar = f'x="{x + 0.15 * width:.1f}" y="{y:.1f}" width="{0.7 * width:.1f}" height="{up(0.0) - y:.1f}"'
            body.append(f'<rect class="f0" {bar}><title>{text(name)}: {short(found)}</title></rect>')
            body.append(f'<path class="line l1" d="M{x + 0.05 * width:.1f} {line:.1f}h{0.9 * width:.1f}"/>')
            if i % room == 0:
                place = f'x="{x + width / 2:.1f}" y="{HEIGHT - BOTTOM + 14}"'
                body.append(f'<text {place} text-anchor="middle">{text(name)}</text>')
        body.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
        svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(self.title)}">{"".join(body)}</svg>'
        keys = ((0, self.found_name), (1, self.expected_name))
        legend = "".join(f'<li><i class="s{k}"></i>{text(name)}</li>' for k, name in keys)
        note = f'<p class="note">{text(self.note)}</p>' if self.note else ""
        return f'<figure class="chart"><h3>{text(self.title)}</h3>{svg}<ul class="legend">{legend}</ul>{note}</figure>'


@dataclass(frozen=True)
class Charts(Part):
    """Charts, or pictures, beside each other where there is room."""

    charts: Sequence[Part]

    def html(self) -> str:
        return f'<div class="charts">{"".join(chart.html() for chart in self.charts)}</div>'


@dataclass(frozen=True)
class Axis:
    """Values from ``low`` to ``high`` on pixels from ``begin`` to ``end``."""

    low: float
    high: float
    begin: float
    end: float
    log: bool

    @staticmethod
    def of(low: float, high: float, begin: float, end: float, *, log: bool = False, padded: bool = True) -> Axis:
        """An axis for values of this range; ``padded`` leaves a little room, and one value alone gets some."""
        if log:
            room = max((high / low) ** 0.04, 1.02)
            return Axis(low / room, high * room, begin, end, True)
        room = (high - low) * 0.04 if padded else 0.0
        if high - low <= 1e-9 * max(abs(high), abs(low)):
            room = abs(high) * 0.1 or 1.0
        return Axis(low - room, high + room, begin, end, False)

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        place = math.log(value) if self.log else value
        return self.begin + (place - low) / (high - low) * (self.end - self.begin)

    def ticks(self) -> list[tuple[float, str]]:
        """Three to eight round numbers and their names."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1, 3), (1,)):
                values = [d * 10.0**p for p in powers for d in digits if self.low <= d * 10.0**p <= self.high]
                if 3 <= len(values) <= 8:
                    return [(value, short(value)) for value in values]
            if len(values) > 8:
                return [(value, short(value)) for value in values[:: math.ceil(len(values) / 8)]]
        rough = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        decimals = max(0, -math.floor(math.log10(step)))
        plain = step >= 1e-4 and max(abs(self.low), abs(self.high)) < 1e4
        named = [(i * step, f"{i * step:.{decimals}f}" if plain else short(i * step)) for i in range(first, last + 1)]
        return [(value, label) for value, label in named if not self.log or value > 0]


def short(value: float) -> str:
    """A number in few characters: 0.3442, 128k, 1.5M, 1e-05."""
    if not math.isfinite(value):
        return str(value)
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if size <= abs(value) < 1e12 and (unit != "k" or abs(value) >= 1e4):
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}" if abs(value) < 1e3 or abs(value) >= 1e12 else f"{value:.0f}"


def thin(line: Line, points: int = POINTS) -> Line:
    """The line in at most ``points`` points: means of equal groups, and the extremes of its band."""
    if len(line.x) <= points:
        return line
    edges = [i * len(line.x) // points for i in range(points + 1)]
    groups = [slice(a, b) for a, b in pairwise(edges)]

    def each(values: Sequence[float | None], how: Literal["mean", "min", "max"]) -> list[float | None]:
        result: list[float | None] = []
        for group in groups:
            some = [v for v in values[group] if v is not None]
            mean = sum(some) / len(some) if some else None
            result.append(mean if how == "mean" or not some else min(some) if how == "min" else max(some))
        return result

    return Line(
        line.name,
        [sum(line.x[group]) / (group.stop - group.start) for group in groups],
        each(line.y, "mean"),
        None if line.low is None else each(line.low, "min"),
        None if line.high is None else each(line.high, "max"),
    )


def _finite(line: Line) -> Line:
    """The line, thinned, with None for what is not a finite number."""

    def clean(values: Sequence[float | None]) -> list[float | None]:
        return [v if v is not None and math.isfinite(v) else None for v in values]

    low = None if line.low is None else clean(line.low)
    high = None if line.high is None else clean(line.high)
    return thin(Line(line.name, line.x, clean(line.y), low, high))


def _curve(line: Line, colour: int, across: Axis, up: Axis) -> str:
    """Its pieces between gaps; a piece of one point is a dot."""

    def pieces(values: Sequence[float | None]) -> list[list[tuple[float, float]]]:
        places = [(x, None if v is None or (up.log and v <= 0) else v) for x, v in zip(line.x, values, strict=True)]
        runs = [list(run) for known, run in groupby(places, lambda p: p[1] is not None) if known]
        return [[(across(x), up(v)) for x, v in run if v is not None] for run in runs]

    parts = []
    if line.low is not None and line.high is not None:
        for below, above in zip(pieces(line.low), pieces(line.high), strict=False):
            outline = " ".join(f"{x:.1f} {y:.1f}" for x, y in [*above, *reversed(below)])
            parts.append(f'<path class="band f{colour}" d="M{outline}Z"/>')
    for piece in pieces(line.y):
        path = " ".join(f"{x:.1f} {y:.1f}" for x, y in piece)
        if len(piece) == 1:
            x, y = piece[0]
            parts.append(f'<circle class="f{colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>')
        else:
            parts.append(f'<path class="line l{colour}" d="M{path}"/>')
    return "".join(parts)


# --- the page ---------------------------------------------------------------------------------------------------------

LIGHT = ("#1f6fb2", "#c2410c", "#15803d", "#7e3ff2", "#a16207", "#be185d")
DARK = ("#6cb2eb", "#fb923c", "#4ade80", "#b794f6", "#facc15", "#f472b6")
COLOURS = len(LIGHT)

_BASE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b1f24; --soft: #5b6470; --rule: #dfe3e8;
  --good: #15803d; --warn: #b45309; --bad: #b91c1c; --info: #5b6470; %(light)s }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1d2126; --ink: #e6e9ed; --soft: #9aa4b0;
  --rule: #333a42; --good: #4ade80; --warn: #fbbf24; --bad: #f87171; --info: #9aa4b0; %(dark)s } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1240px; padding: 16px; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 0 2px; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 28px 0 10px } h3 { font-size: .95rem; margin: 0 0 6px }
p { margin: 8px 0; overflow-wrap: anywhere } .lead, .note, figcaption { color: var(--soft) } .note { font-size: .85rem }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); margin: 16px 0;
  background: var(--card); border: 1px solid var(--rule); border-radius: 8px; overflow: hidden }
.facts div { padding: 10px 12px; box-shadow: 0 0 0 .5px var(--rule) } dt { color: var(--soft); font-size: .8rem }
dd { margin: 0; font-size: 1rem; font-weight: 600; overflow-wrap: anywhere; font-variant-numeric: tabular-nums }
.notice { background: var(--card); border: 1px solid var(--rule); border-left: 4px solid var(--tone); padding: 8px 12px;
  border-radius: 6px } .notice b { color: var(--tone); display: inline-block; min-width: 1em }
.good { --tone: var(--good) } .warn { --tone: var(--warn) } .bad { --tone: var(--bad) } .info { --tone: var(--info) }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%%, 350px), 1fr)); gap: 14px }
figure { margin: 0 } .chart { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 12px }
.chart > svg { display: block; width: 100%%; height: auto } svg text { font-size: 11px; fill: var(--soft) }
.grid { stroke: var(--rule) } .axis { stroke: var(--soft); fill: none } .line { fill: none; stroke-width: 1.8;
  stroke-linejoin: round } .band { opacity: .2 } .floor { stroke: var(--soft); stroke-dasharray: 5 4; fill: none }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 6px 0 0; padding: 0;
  font-size: .82rem }
.legend i { display: inline-block; width: 14px; height: 3px; margin-right: 6px; vertical-align: middle }
.legend .dash { height: 0; border-top: 2px dashed var(--soft) }
.legend .up { width: 0; height: 12px; border: 0; border-left: 2px dashed var(--soft) }
.legend b { font-variant-numeric: tabular-nums }
.slides input { width: min(100%%, 640px); display: block; margin: 0 0 8px; accent-color: var(--c0) }
img { max-width: 100%%; height: auto; border-radius: 4px; background: #fff; display: block }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--rule); vertical-align: top }
th { color: var(--soft); font-weight: 500 } .number { text-align: right }
details { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 8px 12px;
  margin: 10px 0 }
summary { cursor: pointer; font-weight: 600 }
pre { overflow-x: auto; font-size: .82rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: 8px 0 }
"""


def _style() -> str:
    colours = {
        name: " ".join(f"--c{i}: {colour};" for i, colour in enumerate(table))
        for name, table in (("light", LIGHT), ("dark", DARK))
    }
    each = " ".join(
        f".l{i} {{ stroke: var(--c{i}) }} .f{i} {{ fill: var(--c{i}) }} .s{i} {{ background: var(--c{i}) }}"
        for i in range(COLOURS)
    )
    return _BASE % colours + each


# A page that refreshes itself keeps what was open, and where a slider stood unless that was its end.
SCRIPT = """
const keep = (key, value) => { try { sessionStorage.setItem(location.pathname + key, value) } catch {} }
const kept = key => { try { return sessionStorage.getItem(location.pathname + key) } catch { return null } }
document.querySelectorAll(".slides").forEach((box, i) => {
  const slider = box.querySelector("input"), slides = box.querySelectorAll(":scope > div")
  if (!slider) return
  const show = () => slides.forEach((slide, k) => slide.hidden = k != slider.value)
  slider.oninput = () => { show(); keep("slide" + i, slider.value == slider.max ? "" : slider.value) }
  if (kept("slide" + i)) { slider.value = kept("slide" + i); show() }
})
document.querySelectorAll("details").forEach((box, i) => {
  if (kept("open" + i)) box.open = true
  box.ontoggle = () => keep("open" + i, box.open ? "1" : "")
})
"""


def render(title: str, parts: Sequence[Part], *, lead: str = "", refresh: int | None = None) -> str:
    """The whole page. ``lead`` stands below the title; ``refresh`` reloads it every so many seconds."""
    seal = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{seal}'"
    again = f'<meta http-equiv="refresh" content="{int(refresh)}">' if refresh else ""
    under = f'<p class="lead">{text(lead)}</p>' if lead else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{again}'
        f"<title>{text(title)}</title><style>{_style()}</style></head>\n<body>"
        f"<header><h1>{text(title)}</h1>{under}</header>\n<main>"
        + "\n".join(part.html() for part in parts)
        + f"</main>\n<script>{SCRIPT}</script></body></html>\n"
    )


def write(
    path: str | os.PathLike[str], title: str, parts: Sequence[Part], *, lead: str = "", refresh: int | None = None
) -> Path:
    """:func:`render` into a file that is whole at any moment."""
    write_bytes_atomic(Path(path), render(title, parts, lead=lead, refresh=refresh).encode("utf-8", "replace"))
    return Path(path)
