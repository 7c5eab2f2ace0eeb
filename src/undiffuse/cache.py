"""Where what can be made again is kept.

What is large there, latents of data and what text encoders say, has a limit: when it is reached, what was used the
longest ago goes (:class:`Room`).
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import final

from .errors import UndiffuseError

LIMIT_GB = 20.0
"""Of what is large, unless ``$UNDIFFUSE_CACHE_GB`` says otherwise."""
ENTRIES = ("latents/*", "texts/*/??/*")
"""What goes as a whole: the latents of a data set by one codec, and what is said of one text."""
BEGUN = time.time()


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


def limit() -> float:
    """Bytes that the large part of the cache may have."""
    said = os.environ.get("UNDIFFUSE_CACHE_GB", "")
    try:
        gigabytes = float(said) if said else LIMIT_GB
    except ValueError:
        gigabytes = -1.0
    if not 0 <= gigabytes < float("inf"):
        raise UndiffuseError(
            f"$UNDIFFUSE_CACHE_GB={said}: how large the cache may be, a number of gigabytes such as 20"
        )
    return gigabytes * 1e9


def used(entry: Path) -> None:
    """Note that an entry of the cache is used now."""
    with suppress(OSError):
        os.utime(entry)


@final
class Room:
    """What is left of the limit in one cache folder. The least recently used entries go when there is too little of it,
    but none that was used since this process began: what it needs now it would only have to make again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.full = folder, False
        self.left = limit() - sum(size for _, size, _ in self._entries())

    def take(self, size: int) -> bool:
        """Whether ``size`` bytes more have room, which are then counted."""
        if size > self.left and not self.full:
            self._prune(size)
        if size > self.left:
            self.full = True  # of what is in use: no use in looking again
            return False
        self.left -= size
        return True

    def _prune(self, size: int) -> None:
        """Make room for so much and a tenth of the limit more, so that this is not done for every text."""
        entries = sorted(self._entries())
        self.left = limit() - sum(each for _, each, _ in entries)
        for last, each, path in entries:
            if last >= BEGUN or self.left >= size + limit() / 10:
                return
            with suppress(OSError):  # another process may have been faster
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                self.left += each

    def _entries(self) -> list[tuple[float, int, Path]]:
        """When each was used last, and its bytes."""
        found = []
        for path in (path for pattern in ENTRIES for path in self.folder.glob(pattern)):
            with suppress(OSError):
                files = [path, *(path.iterdir() if path.is_dir() and not path.is_symlink() else ())]
                found.append((path.lstat().st_mtime, sum(file.lstat().st_size for file in files), path))
        return found
