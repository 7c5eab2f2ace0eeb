"""Arrays: ``.npy`` and ``.npz`` files, or a numpy array in memory.

The first axis counts the items. What the others mean:

    [N], [N, D]                  points; with ``channels=1``, [N, L] are series
    [N, H, W]                    integers: grey images; real numbers: channels first if at most 4, else one channel
    [N, C, H, W], [N, H, W, C]   images if C is 1, 3 or 4 and the values are bounded, else arrays
    [N, A, B, C]                 a volume of one channel if no axis is clearly the channels
    [N, C, A, B, D], [N, A, B, D, C]   volumes

Values of images and arrays are bounded if they are integers, or real numbers that reach exactly from 0 to 1 or from -1
to 1; a bound is never guessed from values that do not reach it. Everything else is standardised by its measured mean
and standard deviation, one pair a channel (a coordinate, for points). Integers that use less than half of the range of
their type (masks, 12-bit cameras) are bounded by the values found.
"""

from __future__ import annotations

import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np

from ..errors import UndiffuseError, UndiffuseWarning
from .base import ArrayDataset, digest
from .columns import Cells, check_names, columns
from .images import Channels, Size, fit
from .spec import DataSpec, units_between

ITEM_KEYS = ("x", "data", "images", "arr_0")
LABEL_KEYS = ("labels", "y")
CHUNK_BYTES = 2**26
MAX_LEVELS = 2**24  # model units are float32: wider integers would not come back exactly


def from_array(
    values: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    image_size: Size = None,
    channels: Channels = None,
    attributes: Mapping[str, Cells] = MappingProxyType({}),
    numbers: Mapping[str, Cells] = MappingProxyType({}),
    name: str = "array",
) -> ArrayDataset:
    """The data set of ``values`` ``[N, ...]`` (not copied), recognised as this module's text says.

    ``labels``   ``[N]`` whole numbers or names; the classes are their sorted distinct values
    ``image_size``   crops images in the middle to the aspect of this (height, width) and resizes them (Lanczos)
    ``channels``   how many channels there are, where the shape alone does not tell
    ``attributes``, ``numbers``   more that is known of each item, by name: categories, and quantities (:mod:`.columns`)
    """
    values = np.asanyarray(values)
    if values.dtype.kind not in "buif" or values.dtype.itemsize > 8:
        advice = (
            "save plain numbers; pickled objects are never loaded" if values.dtype.kind == "O" else "use real numbers"
        )
        raise UndiffuseError(f"{name}: dtype {values.dtype} cannot be used: {advice}")
    if values.ndim == 0 or len(values) == 0 or values.size == 0:
        raise UndiffuseError(f"{name}: shape {values.shape} has no items; the first axis counts the items")
    layout = _layout(values.shape[1:], values.dtype.kind in "bui", channels, name)
    spec, content, notes = measure(values, layout, name)
    for each, cells in {**attributes, **numbers}.items():
        if np.ndim(cells) != 1 or len(cells) != len(values):
            raise UndiffuseError(f"{name}: {len(values)} items, but {each} of shape {list(np.shape(cells))}")
    check_names(attributes, numbers, {**attributes, **numbers}, name)
    told = columns(attributes, numbers, lambda index: f"item {index}", name)
    spec, notes = replace(spec, attributes=told.attributes, numbers=told.numbers), [*notes, *told.notes]
    for note in notes:
        warnings.warn(f"{name}: {note}", UndiffuseWarning, stacklevel=2)
    if labels is not None:
        classes, labels = _classes(np.asarray(labels), len(values), name)
        spec = replace(spec, classes=classes)
        content = digest(content, labels.tobytes())
    result = ArrayDataset(spec, values, labels, name=name, content=content, notes=notes, columns=told.values)
    return result if image_size is None else resized(result, image_size)


def open_array(
    path: Path,
    *,
    image_size: Size = None,
    channels: Channels = None,
    attributes: Sequence[str] = (),
    numbers: Sequence[str] = (),
) -> ArrayDataset:
    """The data set in a ``.npy`` file (mapped, not read into memory) or a ``.npz`` file with its labels and, of more
    arrays ``[N]`` in it, those that are asked for as attributes or numbers."""
    more: dict[str, np.ndarray] = {}
    try:
        with path.open("rb") as file:
            begins = file.read(6)
        if path.suffix.lower() == ".npy" and begins != b"\x93NUMPY":
            raise UndiffuseError(f"{path}: not a .npy file (it does not begin like one); save it again with numpy.save")
        if path.suffix.lower() == ".npy":
            check_names(attributes, numbers, (), str(path))
            values, labels = np.load(path, mmap_mode="r", allow_pickle=False), None
        else:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                values, labels = _entries(archive, path)
                check_names(attributes, numbers, set(archive.files) - {*ITEM_KEYS, *LABEL_KEYS}, str(path))
                more = {name: archive[name] for name in (*attributes, *numbers)}
    except UndiffuseError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, SyntaxError) as error:
        if "allow_pickle" in str(error) or "Python objects" in str(error):
            raise UndiffuseError(f"{path}: holds pickled objects, which are never loaded; save plain numbers") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UndiffuseError(f"{path}: not a readable {path.suffix} file ({reason}); save it again") from error
    return from_array(
        values,
        labels,
        image_size=image_size,
        channels=channels,
        attributes={name: more[name] for name in attributes},
        numbers={name: more[name] for name in numbers},
        name=str(path),
    )


def resized(whole: ArrayDataset, image_size: Size) -> ArrayDataset:
    """``whole`` with every image cropped in the middle and resized (Lanczos); itself if the size is right already."""
    spec = whole.spec
    if image_size is None or spec.shape[1:] == image_size:
        return whole
    if spec.kind != "image":
        raise UndiffuseError(f"{whole.name}: image_size is for images, these are {spec.kind} of shape {spec.shape}")
    out = replace(spec, shape=(spec.channels, *image_size), resize="lanczos")
    values = np.empty((len(whole), *out.original_shape), np.dtype(spec.dtype))
    first = spec.layout.startswith("C")
    for index in range(len(whole)):
        item = whole.values([index])[0]
        item = fit(np.moveaxis(item, 0, -1) if first else item, image_size)
        item = np.clip(item, spec.low, spec.high)  # Lanczos overshoots at edges
        values[index] = np.moveaxis(item, -1, 0) if first else item
    return ArrayDataset(
        out,
        values,
        whole.labels,
        name=whole.name,
        content=whole.fingerprint,
        notes=whole.notes,
        columns=whole.columns,
    )


class Values(Protocol):
    """Items ``[N, ...]``: an array, or something that reads slices of one when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


def measure(values: Values, layout: str, name: str) -> tuple[DataSpec, str, list[str]]:
    """The spec of items with these axes, by the rules of this module's text; a hash of their content; notes."""
    low, high, content = _extremes(values, name)
    notes: list[str] = []
    return _spec(values, layout, low, high, name, notes), content, notes


def _chunks(values: Values) -> Iterator[tuple[int, np.ndarray]]:
    """``(start, items)`` pieces of about 64 MB, so that a mapped file is never in memory as a whole."""
    rows = max(1, CHUNK_BYTES // max(1, prod(values.shape[1:]) * values.dtype.itemsize))
    for start in range(0, values.shape[0], rows):
        yield start, np.ascontiguousarray(values[start : start + rows])


def _extremes(values: Values, name: str) -> tuple[float, float, str]:
    """Smallest and largest value and a hash of the content, in one pass that refuses NaN and infinity."""
    content = blake2b(repr((values.shape, values.dtype.str)).encode(), digest_size=16)
    low, high = np.inf, -np.inf
    for start, items in _chunks(values):
        content.update(items.view(np.uint8).data if items.dtype.kind == "b" else items.data)
        smallest, largest = items.min(), items.max()
        if not (np.isfinite(smallest) and np.isfinite(largest)):
            bad = start + int(np.argmax(~np.isfinite(items).reshape(len(items), -1).all(axis=1)))
            raise UndiffuseError(f"{name}: item {bad} has NaN or infinite values; remove or repair it")
        low, high = min(low, float(smallest)), max(high, float(largest))
    if low == high:
        raise UndiffuseError(f"{name}: every value is {low:g}: there is nothing to learn")
    return low, high, content.hexdigest()


def _layout(item: tuple[int, ...], integer: bool, channels: Channels, name: str) -> str:
    """The axes of one item as letters (see :class:`DataSpec`)."""
    rank = len(item)
    if rank > 4:
        raise UndiffuseError(f"{name}: items of shape {item}: at most three spatial axes and one of channels")
    if rank < 2:
        if isinstance(channels, int) and (channels != 1 or not rank):
            raise UndiffuseError(f"{name}: channels={channels} is for images and arrays, items here have shape {item}")
        return "L" if isinstance(channels, int) else "D" if rank else ""
    spatial = {2: "L", 3: "HW", 4: "ZYX"}[rank]
    first, last, none = "C" + spatial, spatial + "C", {2: "HW", 3: "ZYX", 4: ""}[rank]
    if isinstance(channels, int):
        found = [layout for layout, size in ((first, item[0]), (last, item[-1])) if size == channels]
        found = found or ([none] if channels == 1 and none else [])
        if not found:
            raise UndiffuseError(f"{name}: channels={channels}, but items have shape {item}")
    elif rank == 2:
        return none if integer or item[0] > 4 or item[1] <= 4 else first
    else:
        likely = (1, 3, 4) if integer and rank == 3 else (1, 2, 3, 4)
        found = [layout for layout, size in ((first, item[0]), (last, item[-1])) if size in likely]
        if not found:  # more channels than a picture has, as in latents: the axis that is shorter than the others
            found = (
                [first] if item[0] < min(item[1:]) else [last] if item[-1] < min(item[:-1]) else [none] if none else []
            )
    if len(found) == 2 and rank == 3 and (item[1] == item[2]) != (item[0] == item[1]):
        found = [first] if item[1] == item[2] else [last]  # the square one
    if len(found) != 1:
        raise UndiffuseError(
            f"{name}: which axis of {item} are the channels? Move them first, [N, C, ...], or say channels=C"
        )
    return found[0]


def _spec(values: Values, layout: str, low: float, high: float, name: str, notes: list[str]) -> DataSpec:
    item, dtype = values.shape[1:], values.dtype
    if layout in ("", "D"):
        shift, scale = _moments(values, None if layout == "" else 1, notes)
        return DataSpec("points", item or (1,), dtype.name, None, None, shift, scale, layout)
    axis = layout.index("C") if "C" in layout else None
    shape = (1, *item) if axis is None else (item[axis], *item[:axis], *item[axis + 1 :])
    bounds = _bounds(dtype, low, high, name, notes)
    pictures = len(shape) == 3 and shape[0] in (1, 3, 4)
    if bounds is not None:
        shift, scale = units_between(*bounds)
        kind = "image" if pictures else "array"
        return DataSpec(kind, shape, dtype.name, *bounds, shift, scale, layout)
    shift, scale = _moments(values, None if axis is None else 1 + axis, notes)
    return DataSpec("array", shape, dtype.name, None, None, shift, scale, layout)


def _bounds(dtype: np.dtype, low: float, high: float, name: str, notes: list[str]) -> tuple[float, float] | None:
    if dtype.kind == "b":
        return 0.0, 1.0
    if dtype.kind == "f":
        return (low, high) if (low, high) in ((0.0, 1.0), (-1.0, 1.0)) else None
    if dtype.name in ("uint8", "uint16"):
        full = float(np.iinfo(dtype).max)
        if high > full / 2:
            return 0.0, full
        # 12-bit cameras, masks of 0 and 1: with the full range everything would be nearly black
        low = 0.0
        notes.append(f"{dtype} values end at {high:g}, so the range is taken as [0, {high:g}]")
    if high - low > MAX_LEVELS:
        raise UndiffuseError(f"{name}: {dtype} values span {high - low:,.0f}: convert them to float32 or float64")
    return low, high


def _moments(values: Values, axis: int | None, notes: list[str]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation along every axis but ``axis``, in float64 and in two passes (one loses digits)."""
    kept = values.shape[axis] if axis is not None else 1
    rank = len(values.shape)
    over = tuple(a for a in range(rank) if a != axis)
    count = prod(values.shape) // kept

    def total(power: int, about: np.ndarray) -> np.ndarray:
        column = about if axis is None else about.reshape([-1 if a == axis else 1 for a in range(rank)])
        sums = np.zeros(kept)
        for _, items in _chunks(values):
            sums += ((items.astype(np.float64) - column) ** power).sum(axis=over)
        return sums / count

    mean = total(1, np.zeros(kept))
    deviation = np.sqrt(total(2, mean))
    flat = deviation <= 1e-12 * np.maximum(np.abs(mean), 1e-300)
    if flat.any():
        which = ", ".join(map(str, np.flatnonzero(flat)[:5]))
        notes.append(f"channel {which} is constant; it is kept with scale 1")
        deviation = np.where(flat, 1.0, deviation)
    return tuple(mean.tolist()), tuple(deviation.tolist())


def _classes(labels: np.ndarray, count: int, name: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names and int64 indices. Labels 1, 2, 7 become the classes "1", "2", "7"."""
    if labels.shape == (count, 1):
        labels = labels[:, 0]
    if labels.shape != (count,):
        raise UndiffuseError(f"{name}: {count} items, but labels of shape {labels.shape}")
    if labels.dtype.kind not in "buiU":
        raise UndiffuseError(f"{name}: labels of dtype {labels.dtype}: use whole numbers or names")
    names, indices = np.unique(labels, return_inverse=True)
    if len(names) > max(10, count // 2):
        raise UndiffuseError(f"{name}: {len(names)} different labels for {count} items: these are not classes")
    return tuple(str(each) for each in names), indices.reshape(-1).astype(np.int64)


def _entries(archive: np.lib.npyio.NpzFile, path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    found = [key for key in ITEM_KEYS if key in archive.files]
    if len(found) != 1:
        what = f"has {' and '.join(found)}" if found else f"has {', '.join(archive.files) or 'no arrays'}"
        raise UndiffuseError(f"{path}: {what}; name the items one of {', '.join(ITEM_KEYS)} (labels: labels or y)")
    named = [key for key in LABEL_KEYS if key in archive.files]
    if len(named) > 1:
        raise UndiffuseError(f"{path}: has both labels and y; keep one")
    return archive[found[0]], archive[named[0]] if named else None
