"""``undiffuse push``: a model onto the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .export import listed
from .options import AnyPath

EXAMPLES = """
undiffuse push runs/photos ada/photos --license mit --dry-run
undiffuse push runs/photos ada/photos --license cc-by-4.0 --to diffusers
"""


@dataclass(frozen=True)
class Pushed:
    """What was sent, or would have been."""

    repo: str
    files: dict[str, int]  # bytes by name
    url: str | None  # None after a dry run


def push(
    model: Annotated[AnyPath, tyro.conf.Positional],
    repo: Annotated[str, tyro.conf.Positional],
    license: str | None = None,
    to: Literal["diffusers", "undiffuse"] = "undiffuse",
    private: bool = False,
    dry_run: bool = False,
    out: AnyPath | None = None,
) -> Pushed:
    """Send a model to the Hugging Face Hub, with a card that says what it is, how good, and under which license.

    Args:
        model: A run or a model folder.
        repo: OWNER/NAME; it is made if there is none.
        license: Of the weights, by the Hub's name for it, such as mit or cc-by-4.0.
        to: Which program reads it: undiffuse, or diffusers.
        private: Make a new repository private.
        dry_run: Say what would be sent, and send nothing.
        out: Keep the folder that is sent.

    Raises:
        UndiffuseError: no such model; no license; the Hub refuses, or cannot be reached.
    """
    from ..interop import hub

    kept = None if out is None else Path(out)
    files, url = hub.push(model, repo, form=to, license=license, private=private, dry_run=dry_run, out=kept)
    return Pushed(repo, files, url)


def report(result: Pushed) -> str:
    """The files, and where they are."""
    where = f"a dry run: nothing was sent to {result.repo}" if result.url is None else result.url
    return "\n".join([*listed(result.files), "", where])
