"""Where what can be made again is kept."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import UndiffuseError


def cache_folder(given: str | os.PathLike[str] | None = None) -> Path:
    """``given``, or ``$UNDIFFUSE_CACHE``, or ``undiffuse`` in the user's cache (``$XDG_CACHE_HOME``, ``~/.cache``)."""
    chosen = given or os.environ.get("UNDIFFUSE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "undiffuse"


def cache_file(given: str | os.PathLike[str] | None, name: str) -> Path:
    """The path of ``name`` in :func:`cache_folder`, which is made if need be."""
    folder = cache_folder(given)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or "it cannot be made").lower()
        raise UndiffuseError(f"{folder}: cannot be the cache ({reason}); set $UNDIFFUSE_CACHE to a folder") from None
    return folder / name
