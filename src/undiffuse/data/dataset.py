"""One string opens any data: the name of a set, a folder of images, or an array file."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import UndiffuseError, UndiffuseWarning
from . import named
from .arrays import open_array, resized
from .base import ArrayDataset, Dataset
from .clips import Clips
from .columns import check_names, names_in
from .folder import Files, Images, Reader
from .huggingface import PREFIX, Rows, is_saved
from .images import MIN_SIDE, Channels, Size
from .pairs import paired
from .shapes import Shapes, shapes
from .sounds import Sounds
from .store import Folder, Store, Tar, Zip, printable
from .tables import open_table
from .tiff import Tiffs, holds_arrays
from .video import CONTAINERS

__all__ = ["DATASETS", "Dataset", "open_dataset"]

DATASETS: dict[str, Callable[..., Dataset]] = {
    "digits": named.digits,
    "mnist": named.mnist,
    "mnist-test": named.mnist_test,
    "moons": named.moons,
    "swissroll": named.swissroll,
    "checkerboard": named.checkerboard,
    "shapes": shapes,
}
"""Every factory takes ``seed`` and ``data_root``."""


def open_dataset(
    data: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int] | None = None,
    channels: Channels = None,
    data_root: str | Path | None = None,
    labels: str | None = None,
    attributes: str | Sequence[str] | None = None,
    numbers: str | Sequence[str] | None = None,
    beside: str | os.PathLike[str] | None = None,
    length: float | None = None,
    frames: int | None = None,
    strict: bool = False,
    seed: int = 0,
) -> Dataset:
    """The data set that ``data`` names: one of :data:`DATASETS`, a folder, ``.zip`` or ``.tar`` of images, an ``.npy``
    or ``.npz`` file, or ``hf:NAME`` (:mod:`.huggingface`).

    ``image_size``   brings images to this size, a side or (height, width): cropped in the middle, resized with Lanczos
    ``channels``   images of a folder: 1, 3 or 4 (alpha), or "keep" (the default: grey if all are grey, else RGB).
        Arrays: how many channels there are, if their shape does not tell
    ``data_root``   where files of named sets are looked for, before ``$UNDIFFUSE_DATA``
    ``labels``   what the classes of files are: "folder" (the default, where there are folders), "name" (what stands
        before the first _ or - of the file's name), "none", or an attribute in ``metadata.jsonl``
    ``attributes``, ``numbers``   names of what else is known of items (in ``metadata.jsonl``, as a column of a table or
        an array of an ``.npz``), with commas or as a list: categories, and quantities (:mod:`.columns`)
    ``beside``   more data, a picture of which belongs to each item (:mod:`.pairs`)
    ``length``   seconds, of sounds
    ``frames``   makes clips of so many frames: each video, animated picture or folder of pictures is one
    ``strict``   refuse a folder at its first bad file instead of skipping it
    ``seed``   of the sets that are drawn (``moons``, ``swissroll``, ``checkerboard``), 0 to 2^32 - 1
    """
    data = os.fspath(data)
    if beside is not None:
        common: dict[str, Any] = {"image_size": image_size, "data_root": data_root, "strict": strict, "seed": seed}
        more: dict[str, Any] = {"channels": channels, "labels": labels, "length": length, "frames": frames}
        items = open_dataset(data, **common, **more, attributes=attributes, numbers=numbers)
        return paired(items, open_dataset(beside, **common, labels=None if beside in DATASETS else "none"))
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise UndiffuseError(f"seed must be a whole number from 0 to 2^32 - 1, got {seed!r}")
    size = _size(image_size)
    if channels is not None and channels != "keep" and (isinstance(channels, bool) or not isinstance(channels, int)):
        raise UndiffuseError(f"channels={channels!r} must be a number of channels, or 'keep'")
    known = names_in(attributes), names_in(numbers)
    told = {"attributes": known[0], "numbers": known[1]}
    if data in DATASETS:
        check_names(*known, (), data)
        if Path(data).exists():
            message = f"{data!r} is the data set of that name; write ./{data} for the file or folder"
            warnings.warn(message, UndiffuseWarning, stacklevel=2)
        return _named(DATASETS[data](seed=seed, data_root=data_root), size, channels)
    path = Path(os.path.expanduser(data))
    if data.startswith(PREFIX) or is_saved(path):
        _refuse_unused(data, "images", length=length, frames=frames)
        rows = Rows(data, labels, (*known[0], *known[1]))
        return Files(rows, Images(size, channels), labels=rows.labels, **told, about=rows.about, strict=strict)
    if not data or not os.path.exists(path):
        raise _missing(data, path)
    store = open_store(path)
    if store is not None:
        reader = _reader(store, size, channels, length, frames)
        return Files(store, reader, labels=labels, **told, strict=strict)
    if path.suffix.lower() in (".csv", ".tsv") and path.is_file():
        return open_table(path, labels=labels, **told)
    if path.suffix.lower() in (".npy", ".npz") and path.is_file():
        return open_array(path, image_size=size, channels=channels, **told)
    what = f"{path.suffix.lower()} files are" if path.suffix else "such a file is"
    raise UndiffuseError(f"{printable(data)}: {what} not supported; {_choices()}")


def _reader(store: Store, size: Size, channels: Channels, length: float | None, frames: int | None) -> Reader:
    """What most files of the store are: images, or sounds."""
    extensions = [file.extension for file, _ in store.listing]
    kinds = {kind: sum(each in kind.known | kind.unsupported for each in extensions) for kind in (Images, Sounds)}
    if frames is None and not any(kinds.values()) and any(each in CONTAINERS for each in extensions):
        raise UndiffuseError(f"{store.name}: has videos; say how many frames a clip has: frames=16 (--frames 16)")
    if kinds[Sounds] <= kinds[Images]:
        _refuse_unused(store.name, "images", length=length)
        if frames is not None:
            if isinstance(frames, bool) or not isinstance(frames, int) or not 2 <= frames <= 4096:
                raise UndiffuseError(f"frames={frames!r} must be a whole number from 2 to 4096")
            return Clips(frames, size, channels)
        if holds_arrays(store):
            _refuse_unused(store.name, "TIFFs that are arrays", image_size=size, channels=channels)
            return Tiffs()
        return Images(size, channels)
    _refuse_unused(store.name, "sounds", image_size=size, frames=frames)
    return Sounds(length, channels)


def _refuse_unused(name: str, kind: str, **options: object) -> None:
    """An option that could not have an effect is a mistake."""
    for option, value in options.items():
        if value is not None:
            raise UndiffuseError(f"{name}: has {kind}, to which {option} does not apply; leave it out")


def open_store(path: Path) -> Store | None:
    """The files at ``path``, a folder or an archive that is read in place; ``None`` for any other file."""
    if path.is_dir():
        return Folder(path)
    name = path.name.lower() if path.is_file() else ""
    if name.endswith(".zip"):
        return Zip(path)
    return Tar(path) if re.search(r"\.(tar|tgz|tar\.\w+)$", name) else None


def _named(dataset: Dataset, size: Size, channels: Channels) -> Dataset:
    if isinstance(channels, int) and channels != dataset.spec.channels:
        raise UndiffuseError(f"{dataset.name}: has {dataset.spec.channels} channels, channels={channels} was asked for")
    if size is None:
        return dataset
    if isinstance(dataset, Shapes):
        return dataset.at(size)
    if not isinstance(dataset, ArrayDataset):
        raise TypeError(f"{dataset.name}: a named data set must be an ArrayDataset to be resized")
    return resized(dataset, size)


def _size(image_size: int | tuple[int, int] | None) -> Size:
    if image_size is None:
        return None
    sides = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    whole = all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    if len(sides) != 2 or not whole or min(sides) < MIN_SIDE or max(sides) > 8192:
        raise UndiffuseError(f"image_size={image_size!r} must be one side or (height, width), each {MIN_SIDE} to 8192")
    return sides[0], sides[1]


def _missing(data: str, path: Path) -> UndiffuseError:
    names = dict.fromkeys(DATASETS) if os.sep not in data else {}
    try:
        beside = [each.name for each in path.parent.iterdir() if not each.name.startswith(".")]
    except OSError:
        beside = []
    near = get_close_matches(path.name, [*names, *beside], n=1) if data else []
    hint = ""
    if near:
        suggestion = near[0] if near[0] in names else str(path.parent / near[0])
        hint = f" did you mean {printable(suggestion)!r}?"
    return UndiffuseError(f"no data at {printable(data)!r}:{hint} {_choices()}")


def _choices() -> str:
    return f"DATA is a folder, .zip or .tar of images, an .npy or .npz file, hf:NAME, or one of {', '.join(DATASETS)}"
