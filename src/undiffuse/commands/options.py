"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from ..errors import unknown

if TYPE_CHECKING:
    import torch

AnyPath = Path | str
"""A path; in Python, text will do."""


class DataOptions(TypedDict, total=False):
    """How data are read: of ``train``, ``doctor``, ``evaluate`` and ``compare``, whose keyword arguments they are, and
    of :func:`.open_dataset`."""

    image_size: int | None
    """Side to which images are cropped and resized."""
    channels: int | None
    """1, 3 or 4 for images, 1 for mono; arrays: how many there are, where their shape does not tell."""
    data_root: AnyPath | None
    """Where files of named data sets are."""
    labels: str | None
    """What the classes of files are: folder (the default, where there are folders), name (what stands before the first
    _ or - of a file's name), none, or an attribute in metadata.jsonl."""
    attributes: str | None
    """Categories that are known of items and can be asked for, such as breed,colour: their names in metadata.jsonl, a
    table or an .npz."""
    numbers: str | None
    """The same for quantities, such as age,weight."""
    beside: AnyPath | None
    """More data of which the model is shown the picture with an item's name: a folder of sketches, say."""
    length: float | None
    """Seconds to which sounds are cropped or filled with silence (default: what 95 % of them fit into)."""
    frames: int | None
    """Makes clips of so many frames: each video, animated picture or folder of pictures is one."""


def words_of(given: Mapping[str, Any]) -> list[str]:
    """Options of the command line, with the values that are not None: ``["--image-size", "64"]``."""
    options = ((name if name.startswith("-") else f"--{name.replace('_', '-')}", given[name]) for name in given)
    return [word for name, value in options if value is not None for word in (name, str(value))]


def checked(reading: DataOptions) -> DataOptions:
    """``reading``, or an error for what is no option: of Python, which lets any name pass."""
    for name in reading:
        if name not in DataOptions.__annotations__:
            raise unknown("option", name, DataOptions.__annotations__)
    return reading


Precision = Literal["float32", "bf16", "fp16"]
"""Of what a network computes when it samples."""


def dtype_of(precision: Precision | None) -> torch.dtype | None:
    """As torch names it; None: as it is."""
    import torch

    types = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return None if precision is None else types[precision]
