"""Types of options that several verbs share."""

from __future__ import annotations

from pathlib import Path

AnyPath = Path | str
"""A path; in Python, text will do."""
