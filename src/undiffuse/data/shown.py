"""Pictures that a model is shown in sampling: a small one to enlarge, one with holes to fill, one to translate.

They are read in their own units and never resized: a picture of another size is refused. What is transparent in it, NaN
in an array, or marked by a mask is not known, and so is filled in.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from ..errors import UndiffuseError
from .folder import Images
from .images import Target, decode, read_header
from .spec import DataSpec
from .store import BadFile


def picture_spec(spec: DataSpec, shape: Sequence[int]) -> DataSpec:
    """The spec of pictures of this ``shape``, made of data of ``spec``: in the same units."""
    layout = spec.layout.replace("C", "") if shape[0] == 1 != spec.channels else spec.layout
    plain = replace(spec, classes=(), vocabulary=(), attributes=(), numbers=(), beside=None)
    return replace(plain, layout=layout, shape=tuple(shape))


@dataclass(frozen=True)
class File:
    """A picture file or a ``.npy``: what messages call it, and its bytes."""

    called: str
    data: bytes


def read_shown(
    path: str | os.PathLike[str], spec: DataSpec, mask: str | os.PathLike[str] | None = None, holes: bool = True
) -> Tensor:
    """:func:`shown_in` the file, or the folder of files in the order of their names."""
    path = Path(path)
    files = [path]
    if path.is_dir():
        known = Images.known | {"npy"}
        files = sorted(each for each in path.iterdir() if each.suffix.lower().removeprefix(".") in known)
    if not files:
        raise UndiffuseError(f"--beside {path}: holds no pictures; put {Images.formats} or .npy files into it")
    read = [_file("--beside", each) for each in files]
    return shown_in(read, spec, None if mask is None else _file("--mask", Path(mask)), holes)


def _file(option: str, path: Path) -> File:
    try:
        return File(f"{option} {path}", path.read_bytes())
    except OSError as error:
        raise UndiffuseError(f"{option} {path}: {(error.strerror or 'cannot be read').lower()}") from None


def shown_in(files: Sequence[File], spec: DataSpec, mask: File | None = None, holes: bool = True) -> Tensor:
    """The pictures in picture files, and in ``.npy`` (one, or ``[N, ...]``), as ``[N, *spec.shape]`` in model units,
    NaN where nothing is known.

    ``mask``   a picture whose transparent part (or white part, where nothing is transparent) is not known, of all
    ``holes``   whether something may be, and then must be, unknown

    Raises :class:`UndiffuseError` for files that cannot be read, are of another size, or in other units.
    """
    read = [_array(each, spec) if each.data.startswith(npy.MAGIC_PREFIX) else _image(each, spec) for each in files]
    x = replace(spec, dtype="float32").to_model(np.concatenate([values for values, _ in read]))
    unknown = np.concatenate([gaps for _, gaps in read])
    if mask is not None:
        unknown = unknown | hole_in(_pixels(mask, spec, 4, 8))
    some = unknown.reshape(len(unknown), -1).any(1)
    if not holes and (mask is not None or some.any()):
        raise UndiffuseError(f"{files[0].called}: this model was shown whole pictures; leave out mask and transparency")
    if holes and not some.all():
        raise UndiffuseError(
            f"{files[0].called}: picture {int(np.argmin(some))} has nothing to fill in: make a part of it transparent, "
            "or mark it white in a mask"
        )
    return x.masked_fill(torch.from_numpy(unknown)[:, None], torch.nan)


def hole_in(pixels: np.ndarray) -> np.ndarray:
    """What a mask, uint8 ``[H, W, 4]``, says is to be filled in: the transparent part, as OpenAI's masks have it; where
    nothing is transparent the white one, as diffusers' have it."""
    alpha = pixels[..., 3]
    return np.asarray(alpha < 128 if (alpha < 255).any() else pixels[..., :3].mean(-1) >= 128)


def write_shown(x: Tensor, spec: DataSpec) -> np.ndarray:
    """Pictures ``[N, *spec.shape]`` in model units as :func:`read_shown` reads them of a ``.npy``: rounded where the
    data are whole numbers."""
    values = spec.to_data(x.nan_to_num()).astype(np.float32)
    plain = replace(spec, dtype="float32", low=None, high=None, shift=(0.0,), scale=(1.0,))
    values[plain.to_data(x.isnan().float()) > 0] = np.nan
    return values


def _array(file: File, spec: DataSpec) -> tuple[np.ndarray, np.ndarray]:
    """``(values [N, *original_shape] float32, unknown [N, *spatial])`` of a ``.npy``, of which nothing is read before
    its head is known to be right: it may come from anybody."""
    head, form = BytesIO(file.data), spec.original_shape
    try:
        version = npy.read_magic(head)
        shape, _, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(head)
        wrong = dtype.kind in "buif" and len(file.data) - head.tell() != math.prod(shape) * dtype.itemsize
    except (ValueError, SyntaxError, TypeError, TokenError, RecursionError, MemoryError) as error:
        raise UndiffuseError(f"{file.called}: cannot be read ({' '.join(str(error).split())[:200]})") from None
    if dtype.kind not in "buif":
        raise UndiffuseError(f"{file.called}: holds no numbers")
    if wrong:
        raise UndiffuseError(f"{file.called}: does not hold all that its head says; save it again with numpy.save")
    if shape != form and (shape[1:] != form or not shape[0]):
        raise UndiffuseError(f"{file.called}: shape {shape}; this model takes [N, *{form}]")
    values = np.load(BytesIO(file.data), allow_pickle=False).reshape(-1, *form).astype(np.float32)
    gaps: np.ndarray = np.isnan(values)
    if not spec.dtype.startswith("float") and (values[np.isfinite(values)] % 1).any():
        raise UndiffuseError(f"{file.called}: the model's pictures are {spec.dtype}; give whole numbers (NaN: unknown)")
    fill = spec.shift[0] if spec.low is None else spec.low
    values = np.where(gaps, np.float32(fill), values)
    return values, np.asarray(gaps.any(1 + spec.layout.index("C"))) if "C" in spec.layout else gaps


def _image(file: File, spec: DataSpec) -> tuple[np.ndarray, np.ndarray]:
    """The same of a picture; what is transparent is unknown, unless transparency is part of the data."""
    if spec.low is None or spec.high is None or not spec.has_pictures:
        raise UndiffuseError(f"{file.called}: the model's pictures are {spec.dtype} without a range; give a .npy")
    bits = 16 if spec.dtype == "uint16" else 8
    pixels = _pixels(file, spec, spec.channels, bits).astype(np.float64)
    values = spec.low + pixels / (2**bits - 1) * (spec.high - spec.low)  # digits are 0 to 16, say
    if "C" in spec.layout:
        values = np.moveaxis(values.reshape(*values.shape[:2], -1), -1, spec.layout.index("C"))
    transparent = np.zeros(spec.shape[1:], bool)
    if spec.channels != 4:
        transparent = _pixels(file, spec, 4, 8)[..., 3] < 255
    return values[None].astype(np.float32), transparent[None]


def _pixels(file: File, spec: DataSpec, channels: int, bits: int) -> np.ndarray:
    try:
        header = read_header(BytesIO(file.data))
        if (header.height, header.width) != spec.shape[1:]:
            height, width = spec.shape[1:]
            raise UndiffuseError(
                f"{file.called}: {header.width}x{header.height} (width, height); this model takes {width}x{height}"
            )
        return decode(file.data, Target((header.height, header.width), channels, bits)).pixels
    except BadFile as error:
        raise UndiffuseError(f"{file.called}: {error}") from None
