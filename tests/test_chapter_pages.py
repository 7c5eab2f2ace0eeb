"""Every entry of a registry is named on the page of its chapter, and every picture is on a page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

import undiffuse as u

DOCS = Path(__file__).parent.parent / "docs"
PAGES: dict[str, list[Mapping[str, object]]] = {
    "schedules": [u.SCHEDULES],
    "predictions": [u.PREDICTIONS],
    "denoiser": [u.LABELS, u.INPUT_SCALES],
    "conditions": [u.CONDITIONS],
    "sampling": [u.GRIDS],
    "objectives": [u.TIMES, u.WEIGHTS],
    "evaluation": [u.METRICS],
    "latents": [u.CODECS],
}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_every_entry_of_its_registries(page: str) -> None:
    text = (DOCS / f"{page}.md").read_text("utf-8")
    named = set(re.findall(r"`(\w+)`", text))
    missing = [name for registry in PAGES[page] for name in registry if name not in named]
    assert not missing, f"docs/{page}.md does not name {', '.join(missing)}"


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text("utf-8")
    assert [page.name for page in DOCS.glob("*.md") if page.name != "README.md" and f"({page.name})" not in index] == []


def test_every_picture_is_on_a_page() -> None:
    pages = "".join(page.read_text("utf-8") for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"])
    pictures = sorted(path.name for path in (DOCS / "images").iterdir())
    assert [name for name in pictures if f"images/{name}" not in pages] == []
