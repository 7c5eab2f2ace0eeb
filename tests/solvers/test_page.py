"""The table of docs/solvers.md is the registry."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_of_the_page_is_current() -> None:
    page = (DOCS / "solvers.md").read_text("utf-8")
    assert runpy.run_path(str(DOCS / "solvers_table.py"))["renewed"](page) == page, "run: python docs/solvers_table.py"
