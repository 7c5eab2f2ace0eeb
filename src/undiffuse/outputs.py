"""Outputs: what people look at. Samples as one grid, a trajectory as an animation, points as a scatter, or arrays.

Values become pixels by the data's fixed constants, never by each picture's own minimum and maximum (trap D4).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import BytesIO
from math import ceil, sqrt
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageOps, PngImagePlugin
from torch import Tensor

from .asking import Sampling
from .conditions import LISTS
from .config import to_json, write_bytes_atomic
from .data.png import encode16
from .data.sounds import encode_wav
from .data.spec import DataSpec
from .data.tables import write_table
from .data.tiff import encode_tiff
from .distributed import ALONE, Team
from .errors import UndiffuseError
from .pipeline import REGISTRIES, Asked, Attention, Pipeline, check_count

CHUNK = "undiffuse"
"""The PNG text chunk that holds how a picture was made."""

GAP = 2
LEAST_TILE = 64
"""Small pictures are enlarged by a whole factor until a tile has about this many pixels a side."""


def drawable(spec: DataSpec) -> bool:
    """Whether samples of this data can be shown: images, and points in the plane."""
    return spec.has_pictures or (spec.kind == "points" and spec.shape == (2,))


def grid(spec: DataSpec, x: Tensor, columns: int | None = None) -> Image.Image:
    """``x`` (``[N, *shape]``, model units) as one picture: a grid of images, row by row, or a scatter of points."""
    if spec.kind == "points" and spec.shape == (2,):
        return scatter(x)
    if not drawable(spec):
        raise UndiffuseError(f"samples of shape {list(spec.original_shape)} are no pictures; write a .npy")
    return tile(spec.to_images(x), columns)


def tile(images: Sequence[np.ndarray], columns: int | None = None) -> Image.Image:
    """uint8 arrays ``[H, W]`` or ``[H, W, 3]``, all alike, as a grid with a gap; near-square by default."""
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
    for dx in (-1, 0, 1):
        for dy in (-1, 0, 1):
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
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ANIMATIONS:
        raise UndiffuseError(f"{path}: an animation is a .gif or a .webp")
    write_bytes_atomic(path, encode_animation(pictures, kind, seconds))
    return path


ANIMATIONS = ("gif", "webp")


def encode_animation(pictures: Sequence[Image.Image], kind: str, seconds: float = 3.0) -> bytes:
    """The file that :func:`write_animation` writes; ``kind`` is one of ``ANIMATIONS``."""
    each = max(20, round(1000 * seconds / len(pictures)))
    durations = [each] * (len(pictures) - 1) + [1500]
    if kind == "gif":
        # One palette for all frames, or the colours flicker.
        pictures = [picture.convert("P") if picture.mode == "L" else picture for picture in pictures]
    buffer = BytesIO()
    options: dict[str, Any] = {"lossless": True} if kind == "webp" else {}
    pictures[0].save(
        buffer,
        kind.upper(),
        save_all=True,
        append_images=list(pictures[1:]),
        duration=durations,
        loop=0,
        **options,
    )
    return buffer.getvalue()


# --- What `undiffuse sample` and the previews of training write -------------------------------------------------------


WRITTEN = {"image": ("",), "sound": (".wav", ""), "points": (".csv",), "video": (".webp", ".gif"), "array": ()}
"""The kinds of file that samples of each kind of data may become, besides ``.npy`` and, if they can be drawn, pictures.
The empty one is a folder with a file (for a clip, a folder of frames) for each sample."""


def suffixes(spec: DataSpec) -> tuple[str, ...]:
    """What samples of this data can be written as; the first is what they are written as by default."""
    pictures = (".png", ".gif", ".webp") if drawable(spec) else ()
    first, others = (pictures, WRITTEN[spec.kind]) if not spec.names else (WRITTEN[spec.kind], pictures)
    arrays = (".tif", ".tiff") if spec.kind in ("image", "array") and len(spec.shape) > 2 else ()
    return tuple(dict.fromkeys((*first, *others, ".npy", *arrays)))


def check_target(target: Path, spec: DataSpec) -> None:
    """Refuse before sampling what could not be written after it; makes the folder."""
    suffix, possible = target.suffix.lower(), suffixes(spec)
    if suffix not in possible:
        *named, last = [f"a {each or 'folder'}" for each in possible]
        these = f"these samples are of kind {spec.kind}, shape {list(spec.original_shape)}"
        raise UndiffuseError(f"--out {target}: write {', '.join(named)}{' or ' if named else ''}{last}; {these}")
    folder = target if suffix == "" else target.parent
    if folder.exists() and not folder.is_dir():
        raise UndiffuseError(f"--out {target}: {folder} is not a folder")
    if suffix == "" and folder.is_dir() and any(folder.iterdir()):
        # Samples among somebody's training pictures would be learned from at the next run.
        raise UndiffuseError(f"--out {target}: the folder is not empty; name a new one for the samples")
    folder.mkdir(parents=True, exist_ok=True)


def write_samples(
    target: Path,
    pipeline: Pipeline,
    samples: int,
    sampling: Sampling,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
    model: str,
    options: dict[str, Any],
    rows: int | None = None,
    team: Team = ALONE,
    **asked: Unpack[Asked],
) -> None:
    """Sample and write to ``target``: a .png grid, a folder, a .npy, or a .gif or .webp of the trajectory; sounds one
    after another as a .wav, points as a .csv. Files have the units, the range and the bits of the data.

    ``model`` and ``options`` go into the PNGs' text chunk, so that the picture can be made again. Each process of a
    ``team`` draws its share of the batches, which are those of one process alone, and the first writes; a trajectory
    is one batch, which the first draws.
    """
    spec, suffix = pipeline.spec, target.suffix.lower()
    classes, prompts, cond = asked.get("classes"), asked.get("prompts"), asked.get("cond")
    kinds = classes if classes is not None else prompts if prompts is not None else spec.classes
    rows_of = [len(each) for each in (cond or {}).values() if isinstance(each, LISTS)]
    columns = columns_for(samples, max(rows_of, default=1) if cond and classes is prompts is None else len(kinds))
    if suffix in (".gif", ".webp") and spec.kind != "video":
        pictures = []
        if not team.first:
            return
        begun = pipeline.begin(samples, sampling=sampling, **asked)
        for frame in pipeline.walk(begun, rows):
            x = pipeline.end(begun, frame.x) if frame.level.is_data else pipeline.decode(frame.x).cpu()
            pictures.append(grid(spec, x, columns))
            if progress is not None:
                progress(frame.index, sampling.steps)
        write_animation(target, pictures)
        return
    x = drawn(pipeline, samples, sampling, batch_size, progress, rows, team, **asked)
    if not team.first:
        return
    parameters = {
        "model": model,
        "weights": pipeline.fingerprint,
        "options": options,
        "sampling": to_json(sampling, REGISTRIES),
        "arithmetic": pipeline.arithmetic,
    }
    if suffix == ".npy":
        buffer = BytesIO()
        np.save(buffer, spec.to_data(x), allow_pickle=False)
        write_bytes_atomic(target, buffer.getvalue())
    elif suffix in (".tif", ".tiff"):
        write_bytes_atomic(target, encode_tiff(spec.to_data(x), spec))
    elif suffix == ".png":
        write_png(target, grid(spec, x, columns), parameters)
    elif suffix in (".gif", ".webp"):
        still = replace(spec, kind="image", shape=(spec.channels, *spec.shape[2:]), layout=spec.layout[1:])
        clip = [tile(still.to_images(x[:, :, t]), columns) for t in range(spec.shape[1])]
        write_animation(target, clip, seconds=spec.shape[1] / 8)
    elif suffix == ".csv":
        write_bytes_atomic(target, write_table(spec.names, spec.to_data(x)))
    elif suffix == ".wav":
        values = spec.to_data(x)
        write_bytes_atomic(target, encode_wav(values.reshape(-1, *values.shape[2:]), spec))
    else:
        digits = max(5, len(str(samples - 1)))
        for i in range(samples):
            one = target / f"{i:0{digits}d}"
            if spec.kind == "sound":
                write_bytes_atomic(one.with_suffix(".wav"), encode_wav(spec.to_data(x[i : i + 1])[0], spec))
            else:
                write_image(one.with_suffix(".png"), spec, x[i], parameters)


def drawn(
    pipeline: Pipeline,
    samples: int,
    sampling: Sampling,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
    rows: int | None = None,
    team: Team = ALONE,
    **asked: Unpack[Asked],
) -> Tensor:
    """:meth:`.Pipeline.draw` by all processes of a team: ``[N, *shape]`` on the first, its own share on each other."""
    check_count(samples, batch_size)
    mine, part = team.mine(range(samples), batch_size), torch.empty(0, *pipeline.spec.shape)
    with team.agree():
        if mine:  # there may be fewer batches than processes
            part = pipeline.draw(mine, sampling=sampling, batch_size=batch_size, rows=rows, progress=progress, **asked)
    return torch.from_numpy(team.gather(part.numpy()))


def write_image(path: Path, spec: DataSpec, x: Tensor, parameters: dict[str, Any]) -> None:
    """One image ``[C, H, W]`` (model units) as a PNG with the values that the data had: 8 or 16 bits, alpha included.

    Data whose range is not that of a PNG (digits from 0 to 16) are scaled to 8 bits; a .npy has their own values.
    """
    full = {"uint8": 255.0, "uint16": 65535.0}.get(spec.dtype)
    if spec.low != 0 or spec.high != full or spec.channels not in (1, 3, 4):
        write_png(path, Image.fromarray(spec.to_images(x[None])[0]), parameters)
        return
    pixels = spec.to_data(x[None])[0]
    pixels = np.moveaxis(pixels, spec.layout.index("C"), -1) if "C" in spec.layout else pixels
    pixels = np.ascontiguousarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)
    if full == 255:
        write_png(path, Image.fromarray(pixels), parameters)
    else:
        write_bytes_atomic(path, encode16(pixels, {CHUNK: json.dumps(parameters)}))


def write_attention(path: Path, pipeline: Pipeline, attention: Attention) -> Path:
    """A PNG of a sample, and of it again once a word of its prompt, bright where the word has acted most."""
    if not pipeline.spec.has_pictures:
        raise UndiffuseError(f"--attention {path}: only attention in pictures can be drawn")
    picture = Image.fromarray(pipeline.spec.to_images(attention.x)[0]).convert("RGB")
    side = max(128, picture.width) // picture.width * picture.width
    picture = picture.resize((side, side * picture.height // picture.width), Image.Resampling.NEAREST)
    shares = attention.weights.double().numpy()
    shares = shares / shares.mean((1, 2), keepdims=True)  # a word's own mean is 1: where, and not how much
    tiles = [(picture, "")]
    for word, share in zip(attention.words, shares, strict=True):
        light = Image.fromarray((255 * np.clip(share / max(2.0, share.max()), 0, 1)).astype(np.uint8))
        light = light.resize(picture.size, Image.Resampling.BICUBIC)
        grey = ImageOps.grayscale(picture).point(lambda value: value * 0.5)
        heat = ImageOps.colorize(light, "black", "white", "#ff8c00")
        tiles.append((ImageChops.screen(grey.convert("RGB"), heat), word))
    columns = ceil(len(tiles) / ceil(len(tiles) / 7))  # rows of up to seven, as even as they can be
    width, height = picture.width + GAP, picture.height + 16
    canvas = Image.new("RGB", (columns * width + GAP, ceil(len(tiles) / columns) * height + GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (tile, word) in enumerate(tiles):
        left, top = GAP + i % columns * width, GAP + i // columns * height
        canvas.paste(tile, (left, top))
        pen.text((left + picture.width // 2, top + picture.height + 1), word, fill="black", anchor="ma")
    return write_png(path, canvas)


def columns_for(samples: int, classes: int) -> int | None:
    """One class (or prompt) a column where that makes whole rows; None: a near-square grid."""
    return classes if 1 < classes <= 16 and samples > classes and samples % classes == 0 else None


def made_by(path: Path) -> dict[str, Any]:
    """How a PNG of :func:`write_samples` was made: ``model``, ``weights``, ``options``, ``sampling``."""
    made = read_parameters(path)
    wanted = {"model": str, "weights": str, "options": dict, "sampling": dict}
    if any(not isinstance(made.get(name), kind) for name, kind in wanted.items()):
        raise UndiffuseError(f"{path}: does not say how it was made; only PNGs written by `undiffuse sample` do")
    return made


def describe(sampling: Sampling) -> dict[str, Any]:
    """Solver and grid by name, steps and guidance scale: what a report shows."""
    stated = to_json(sampling, REGISTRIES)
    return {
        "solver": stated["solver"]["kind"],
        "grid": stated["grid"]["kind"],
        "steps": sampling.steps,
        "guidance_scale": sampling.guidance_scale,
    }
