"""Where what can be made again is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(given: str | os.PathLike[str] | None = None) -> Path:
    """``given``, or ``$UNDIFFUSE_CACHE``, or ``undiffuse`` in the user's cache (``$XDG_CACHE_HOME``, ``~/.cache``)."""
    chosen = given or os.environ.get("UNDIFFUSE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "undiffuse"
