"""The table of sizes in docs/networks.md is what the code says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

PAGE = Path(__file__).parent.parent.parent / "docs" / "networks.md"


def test_the_table_of_sizes_is_that_of_the_code():
    text = PAGE.read_text("utf-8")
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        exec("\n".join(re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)), {})
    rows = [line for line in screen.getvalue().splitlines() if line.startswith("| ")]
    assert len(rows) == 8 + 2 * 5 + 12
    for row in rows:
        assert row in text.splitlines()
