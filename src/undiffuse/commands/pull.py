"""``undiffuse pull``: a model from the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .export import listed
from .options import AnyPath

EXAMPLES = """
undiffuse pull ada/photos --dry-run            what is there, and how large
undiffuse pull ada/photos --to models/photos
"""


@dataclass(frozen=True)
class Pulled:
    """What was fetched, or would have been."""

    repo: str
    folder: Path | None  # None after a dry run
    files: dict[str, int]  # bytes by name


def pull(
    repo: Annotated[str, tyro.conf.Positional],
    to: AnyPath | None = None,
    revision: str | None = None,
    dry_run: bool = False,
) -> Pulled:
    """Fetch a model from the Hugging Face Hub into a folder: safetensors, JSON and text, and never code.

    Args:
        repo: OWNER/NAME.
        to: The folder to be made (default: the repository's name).
        revision: A branch, a tag or a commit (default: the newest).
        dry_run: Say what would be fetched, and fetch nothing.

    Raises:
        UndiffuseError: no such repository; no safetensors in it; the Hub cannot be reached.
    """
    from ..interop import hub

    folder = Path(to) if to is not None else Path(repo.rpartition("/")[2])
    files = hub.pull(repo, folder, revision=revision, dry_run=dry_run)
    return Pulled(repo, None if dry_run else folder, files)


def report(result: Pulled) -> str:
    """The files, and where they are."""
    if result.folder is None:
        where = f"a dry run: nothing was fetched from {result.repo}"
    else:
        where = f"undiffuse sample {result.folder}"
    return "\n".join([*listed(result.files), "", where])
