"""Pictures: what people look at. Samples as one grid, a trajectory as an animation, points as a scatter.

Values become pixels by the data's fixed constants, never by each picture's own minimum and maximum (trap D4).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin
from torch import Tensor

from .config import write_bytes_atomic
from .data.spec import DataSpec
from .errors import UndiffuseError

CHUNK = "undiffuse"
"""The PNG text chunk that holds how a picture was made."""

GAP = 2
LEAST_TILE = 64
"""Small pictures are enlarged by a whole factor until a tile has about this many pixels a side."""


def drawable(spec: DataSpec) -> bool:
    """Whether samples of this data can be shown: images, and points in the plane."""
    return spec.kind == "image" or (spec.kind == "points" and spec.shape == (2,))


def grid(spec: DataSpec, x: Tensor, columns: int | None = None) -> Image.Image:
    """``x`` (``[N, *shape]``, model units) as one picture: a grid of images, row by row, or a scatter of points."""
    if spec.kind == "points" and spec.shape == (2,):
        return scatter(x)
    if not drawable(spec):
        raise UndiffuseError(f"samples of shape {list(spec.shape)} are not pictures: write them to a .npy file")
    return tile(spec.to_images(x), columns)


def tile(images: Sequence[np.ndarray], columns: int | None = None) -> Image.Image:
    """uint8 arrays ``[H, W]`` or ``[H, W, 3]``, all alike, as a grid with a light gap; a near-square grid by default."""
    columns = columns or ceil(sqrt(len(images)))
    rows = ceil(len(images) / columns)
    height, width = images[0].shape[:2]
    factor = max(1, round(LEAST_TILE / max(height, width))) if len(images) > 1 else max(1, 256 // max(height, width))
    canvas = np.full(
        (rows * (height * factor + GAP) + GAP, columns * (width * factor + GAP) + GAP, *images[0].shape[2:]),
        255,
        np.uint8,
    )
    for i, image in enumerate(images):
        top = GAP + (i // columns) * (height * factor + GAP)
        left = GAP + (i % columns) * (width * factor + GAP)
        enlarged = image.repeat(factor, 0).repeat(factor, 1)
        canvas[top : top + height * factor, left : left + width * factor] = enlarged
    return Image.fromarray(canvas)


def scatter(x: Tensor, size: int = 384, reach: float = 3.0) -> Image.Image:
    """Points ``[N, 2]`` in model units on [-reach, reach]^2, y upwards; darker where there are more."""
    place = ((x.double().numpy() / reach + 1) / 2 * size).astype(np.int64)
    inside = ((place >= 0) & (place < size)).all(1)
    count = np.zeros((size, size))
    for dx in (0, 1):
        for dy in (0, 1):
            columns, rows = np.clip(place[inside] + [dx, dy], 0, size - 1).T
            np.add.at(count, (size - 1 - rows, columns), 1)
    # A single point is always visible; many saturate.
    ink = np.where(count > 0, 0.35 + 0.65 * (1 - np.exp(-count / 3)), 0)[..., None]
    colour = np.array([38, 70, 140])
    return Image.fromarray((255 + ink * (colour - 255)).round().astype(np.uint8))


def write_png(path: str | Path, image: Image.Image, parameters: dict[str, Any] | None = None) -> Path:
    """Write a PNG atomically, with how it was made in a text chunk."""
    info = PngImagePlugin.PngInfo()
    if parameters is not None:
        info.add_itxt(CHUNK, json.dumps(parameters))
    buffer = BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    write_bytes_atomic(path, buffer.getvalue())
    return Path(path)


def read_parameters(path: str | Path) -> dict[str, Any]:
    """How a PNG written by :func:`write_png` was made; raises if it does not say."""
    path = Path(path)
    if not path.is_file():
        raise UndiffuseError(f"{path}: no such file")
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(CHUNK)
        parameters = json.loads(text) if isinstance(text, str) else None
    except (OSError, ValueError, RecursionError):
        raise UndiffuseError(f"{path}: not a PNG that can be read") from None
    if not isinstance(parameters, dict):
        raise UndiffuseError(f"{path}: does not say how it was made; only PNGs written by `undiffuse sample` do")
    return parameters


def write_animation(path: str | Path, pictures: Sequence[Image.Image], seconds: float = 3.0) -> Path:
    """Write a looping ``.gif`` or ``.webp`` that plays for ``seconds`` and then rests on the last picture."""
    path = Path(path)
    kinds = {".gif": "GIF", ".webp": "WEBP"}
    if path.suffix.lower() not in kinds:
        raise UndiffuseError(f"{path}: an animation is a .gif or a .webp")
    each = max(20, round(1000 * seconds / len(pictures)))
    durations = [each] * (len(pictures) - 1) + [1500]
    if path.suffix.lower() == ".gif":
        # One palette for all frames, or the colours flicker.
        pictures = [picture.convert("P") if picture.mode == "L" else picture for picture in pictures]
    buffer = BytesIO()
    options: dict[str, Any] = {"lossless": True} if kinds[path.suffix.lower()] == "WEBP" else {}
    pictures[0].save(
        buffer,
        kinds[path.suffix.lower()],
        save_all=True,
        append_images=list(pictures[1:]),
        duration=durations,
        loop=0,
        **options,
    )
    write_bytes_atomic(path, buffer.getvalue())
    return path
