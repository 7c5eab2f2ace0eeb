"""``undiffuse export``: a model in the format of another program."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .options import AnyPath

EXAMPLES = """
undiffuse export runs/photos photos-diffusers          a folder for diffusers
undiffuse export runs/photos shared --to undiffuse --license mit
"""


@dataclass(frozen=True)
class Exported:
    """A folder that was written."""

    folder: Path
    files: dict[str, int]  # bytes by name
    reason: str | None  # why diffusers needs code of ours for it; None where it needs none


def export(
    model: Annotated[AnyPath, tyro.conf.Positional],
    folder: Annotated[AnyPath, tyro.conf.Positional],
    to: Literal["diffusers", "undiffuse"] = "diffusers",
    license: str | None = None,
) -> Exported:
    """Write a model as a folder that another program loads, with a model card and a picture.

    A network of the family ddpm_unet that is asked for nothing becomes a folder that diffusers loads as its own; any
    other comes with a pipeline.py, which diffusers runs where that is allowed.

    Args:
        model: A run or a model folder, or one of diffusers.
        folder: To be written; it must be empty, or not there.
        to: diffusers, or undiffuse: the model as it is, with its card.
        license: Of the weights, by the Hub's name for it, such as mit or cc-by-4.0.

    Raises:
        UndiffuseError: no such model; a folder with something in it.
    """
    from ..interop.export import sizes
    from ..interop.hub import write_folder

    reason = write_folder(model, folder, form=to, license=license)
    return Exported(Path(folder), sizes(folder), reason)


def report(result: Exported) -> str:
    """The files, and how to load them."""
    lines = listed(result.files)
    if (result.folder / "model_index.json").is_file():
        custom = f', custom_pipeline="{result.folder}", trust_remote_code=True' if result.reason else ""
        lines += ["", f'DiffusionPipeline.from_pretrained("{result.folder}"{custom})']
        if result.reason:
            lines += ["", *textwrap.wrap(f"through its pipeline.py: {result.reason}", 80)]
    else:
        lines += ["", f'undiffuse.Pipeline.load("{result.folder}")']
    return "\n".join(lines)


def listed(files: dict[str, int]) -> list[str]:
    """Files with their sizes."""
    width = max(map(len, files), default=0)
    return [f"{name.ljust(width)}  {size:>13,} bytes" for name, size in files.items()]
