"""The page: text stays text, nothing is fetched, and the charts are where their numbers say."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from undiffuse import page
from undiffuse.page import Axis, Chart, Charts, Code, Facts, Line, Notice, Picture, Section, Slides, Table, Words

EVIL = "<script>alert(1)</script>\"' onload=alert(1) x='&amp; </style></pre></title><img src=x onerror=alert(1)>"


def everything(word: str) -> list[page.Part]:
    line = Line(word, [1, 2, 3], [1.0, 2.0, 3.0])
    return [
        Facts([(word, word)]),
        Table([word], [[word], [None]]),
        Notice("warn", word),
        Words(word),
        Code(word),
        Section(word, [Section(word, [Code(word)], folded=True)]),
        Slides([Picture(word, b"abc"), Picture(word, b"def")]),
        Charts([Chart(word, [line], word, floors={word: 1.0}, marks={word: 2.0}, note=word)]),
    ]


class Reader(HTMLParser):
    """What a browser would see: tags with their attributes, and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_text_is_never_markup():
    plain, evil = Reader(page.render("x", everything("x"), lead="x")), page.render(EVIL, everything(EVIL), lead=EVIL)
    read = Reader(evil)
    assert read.tags == plain.tags, "a text has added a tag or an attribute"
    assert sum(EVIL in words for words in read.words) >= 12, "and it is shown as it is"


@pytest.mark.parametrize("word", ["\0", "\ud800", "\ufffe", "", "a\nb", "\u202e"])
def test_any_text_can_be_written(word: str, tmp_path: Path):
    path = page.write(tmp_path / "page.html", word, everything(word))
    content = path.read_bytes().decode("utf-8")
    assert "\0" not in content


def test_nothing_is_fetched():
    html = page.render("x", everything("x"), refresh=30)
    assert all(link.startswith("data:image/") for link in Reader(html).links)
    assert "default-src 'none'" in html
    assert not re.search(r"url\(|@import|https?://", html)


def paths(chart: Chart) -> list[list[tuple[float, float]]]:
    """The points of the lines as they are drawn."""
    svg = re.search(r"<svg.*</svg>", chart.html(), re.S)
    assert svg
    lines = [each for each in ElementTree.fromstring(svg[0]).iter("path") if each.get("class", "").startswith("line")]
    numbers = [[float(n) for n in re.findall(r"[-\d.]+", line.get("d", ""))] for line in lines]
    return [list(zip(each[::2], each[1::2], strict=True)) for each in numbers]


@pytest.mark.parametrize("log", [False, True])
def test_a_line_is_straight_where_its_numbers_are(log: bool):
    x = [0.0, 1.0, 2.0, 5.0]
    (points,) = paths(Chart("a", [Line("a", x, [10.0**v if log else v for v in x])], log=log))
    (x0, y0), (x1, y1) = points[0], points[-1]
    assert x1 > x0, "right is more"
    assert y1 < y0, "up is more"
    for (px, py), v in zip(points, x, strict=True):
        assert px == pytest.approx(x0 + (x1 - x0) * v / 5, abs=0.11)
        assert py == pytest.approx(y0 + (y1 - y0) * v / 5, abs=0.11)


def test_a_gap_interrupts_the_line_and_no_number_is_not_drawn():
    y = [1.0, 2.0, None, 3.0, math.nan, math.inf, 1.0, 2.0]
    html = Chart("a", [Line("a", list(range(8)), y)]).html()
    assert [len(each) for each in paths(Chart("a", [Line("a", list(range(8)), y)]))] == [2, 2]
    assert html.count("<circle") == 1
    assert "nan" not in html
    assert "inf" not in html


@pytest.mark.parametrize("y", [[], [None], [math.nan], [0.0], [0.0, 0.0], [-1e300, 1e300], [1e-300, 2e-300], [5.0] * 3])
@pytest.mark.parametrize("log", [None, False, True])
def test_any_numbers_can_be_drawn(y: list[float | None], log: bool | None):
    html = Chart("a", [Line("a", list(range(len(y))), y)], log=log).html()
    assert "nan" not in html
    assert not re.search(r"\binf\b", html)


def test_a_long_line_is_thinned_and_keeps_its_mean():
    line = Line("a", list(range(100_003)), [float(i % 7) for i in range(100_003)])
    thinned = page.thin(line)
    values = [v for v in thinned.y if v is not None]
    assert len(thinned.x) == page.POINTS
    assert sum(values) / len(values) == pytest.approx(3.0, abs=0.01)
    assert len(Chart("a", [line]).html()) < 12_000


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [(0, 1, False), (0.31, 0.34, False), (-5, 5, False), (0, 1.2e6, False), (1e-6, 3e-3, True), (0.3, 0.5, True)],
)
def test_ticks_are_few_inside_and_round(low: float, high: float, log: bool):
    axis = Axis.of(low, high, 0, 100, log=log)
    ticks = axis.ticks()
    assert 3 <= len(ticks) <= 9
    assert all(axis.low <= value <= axis.high for value, _ in ticks)
    assert len({label for _, label in ticks}) == len(ticks), "no two have the same name"
    assert all(len(label) <= 8 for _, label in ticks)
