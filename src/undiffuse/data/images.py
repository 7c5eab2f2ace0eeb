"""One image file: is it safe and whole, how large is it, what are its pixels?

Files come from strangers and break in many ways, so nothing is decoded before its header says that it is small enough,
and only the formats below are ever given to a decoder. What the pixels become:

    16 bits          kept, if the caller wants 16 bits (grey PNG and TIFF, colour PNG); else divided by 257 and rounded
    palette, 1-bit, CMYK, YCbCr, Lab    RGB or grey; CMYK in JPEG of both polarities
    colour profile   RGB and CMYK are converted to sRGB
    transparency     composited on white, or kept as a fourth channel
    EXIF             turned upright
    several frames   the first
    32-bit and real-valued TIFF    refused: they do not say what their range is (:mod:`.tiff` reads them as arrays)
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from io import BytesIO
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageOps

from . import png
from .store import BadFile

Size = tuple[int, int] | None  # height, width
Channels = int | str | None

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 64_000_000
MIN_SIDE = 4
MAX_ASPECT = 32
SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")
GREY = ("1", "L", "LA", "La", *SIXTEEN)
COLOUR = ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB")
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
"""What turns ``[H, W, ...]`` upright, by EXIF's orientation."""


@dataclass(frozen=True)
class Header:
    """What a file says about itself before any pixel is decoded. The size is that of the upright image."""

    height: int
    width: int
    grey: bool
    bits: int  # 8 or 16


@dataclass(frozen=True)
class Target:
    """The form that all images of a data set share: ``[H, W]`` for one channel, else ``[H, W, channels]``."""

    size: tuple[int, int]
    channels: int
    bits: int


@dataclass(frozen=True)
class Decoded:
    pixels: np.ndarray
    notes: tuple[str, ...]
    digest: bytes


def read_header(file: BinaryIO) -> Header:
    """Size and kind of an image, from its header alone. Raises :class:`BadFile`."""
    with foreign(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        head = file.read(29)
        file.seek(0)
        with Image.open(file, formats=FORMATS) as image:
            return _header(image, head)


def decode(data: bytes, target: Target) -> Decoded:
    """The pixels of an image file as ``target`` wants them: uint8, or uint16 for 16 bits. Raises :class:`BadFile`."""
    notes = _check_whole(data)
    with foreign(), Image.open(BytesIO(data), formats=FORMATS) as image:
        header = _header(image, data[:29])
        depth = _bit_depth(image, data)
        if header.bits == 16 and image.mode not in SIXTEEN:
            colour, alpha, more = _deep_colour(image, data)
        else:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
                upright = ImageChops.invert(upright)  # Pillow reads all as Adobe's, which are stored inverted
            colour, alpha, more = _straight(upright, depth)
        notes += more
        if colour.dtype == np.uint16 and target.bits == 8:
            colour, alpha = _eight(colour), None if alpha is None else _eight(alpha)
        pixels = combined(colour, alpha, target.channels)
        if _frames(image):
            notes += ("several frames, the first is read",)
        if depth == 16 and header.bits == 8:
            notes += ("16 bits a channel in colour, read as 8",)
    height, width = pixels.shape[:2]
    if (height, width) != (header.height, header.width):  # the form of all images was chosen by the headers
        raise BadFile("its orientation is stored after its pixels: save it again")
    if height < target.size[0] or width < target.size[1]:
        notes += ("smaller than the image size, enlarged",)
    return Decoded(fit(pixels, target.size), notes, blake2b(data, digest_size=16).digest())


def fit(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``[H, W]`` or ``[H, W, C]`` cropped in the middle to the aspect of ``size`` (height, width) and resized to it.

    Lanczos with a support that grows with the reduction (antialiased). 8-bit pixels are resized as such (RGBA with
    premultiplied alpha), others in float32 a channel and rounded to their dtype.
    """
    height, width = pixels.shape[:2]
    if (height, width) == size:
        return pixels
    scale = min(height / size[0], width / size[1])
    crop_height, crop_width = size[0] * scale, size[1] * scale
    left, top = (width - crop_width) / 2, (height - crop_height) / 2
    box = (max(left, 0.0), max(top, 0.0), min(left + crop_width, width), min(top + crop_height, height))

    def lanczos(image: Image.Image) -> np.ndarray:
        return np.asarray(image.resize((size[1], size[0]), Image.Resampling.LANCZOS, box=box))

    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        return fit(pixels[..., 0], size)[..., None]
    if pixels.dtype == np.uint8:
        return lanczos(Image.fromarray(np.ascontiguousarray(pixels)))
    if pixels.dtype == np.uint16 and pixels.shape[2:] == (4,):  # 8-bit RGBA is premultiplied by Pillow
        alpha = fit(pixels[..., 3].astype(np.float32), size)
        wide = pixels[..., :3].astype(np.float32) * (pixels[..., 3:] / 65535)
        rgb = fit(wide, size) / np.maximum(alpha[..., None], 1) * 65535
        return np.clip(np.rint(np.concatenate([rgb, alpha[..., None]], -1)), 0, 65535).astype(np.uint16)
    planes = pixels[..., None] if pixels.ndim == 2 else pixels
    planes = [lanczos(Image.fromarray(np.ascontiguousarray(plane, np.float32))) for plane in np.moveaxis(planes, -1, 0)]
    result = np.stack(planes, axis=-1).reshape(*size, *pixels.shape[2:])
    if pixels.dtype.kind == "f":
        return result.astype(pixels.dtype)
    if pixels.dtype.kind == "b":
        return result >= 0.5
    limits = np.iinfo(pixels.dtype)
    return np.clip(np.floor(result.astype(np.float64) + 0.5), limits.min, limits.max).astype(pixels.dtype)


def is_image(head: bytes) -> bool:
    """Whether a file that begins with these 16 bytes is an image."""
    riff = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    return riff or head.startswith((png.SIGNATURE, b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*"))


# ---- opening ----


@contextmanager
def foreign() -> Generator[None, None, None]:
    """Turns whatever a decoder does with a broken file into a reason. Decoders raise nearly every kind of exception."""
    try:
        yield
    except BadFile:
        raise
    except Image.UnidentifiedImageError:
        raise BadFile(f"not an image ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise BadFile(f"more than {MAX_PIXELS / 1e6:.0f} million pixels") from None
    except MemoryError:
        raise BadFile("not enough memory to decode it") from None
    except Exception as error:
        raise BadFile(f"damaged: {' '.join(str(error).split())[:100] or type(error).__name__}") from error


def check_size(width: int, height: int) -> None:
    """Raises :class:`BadFile` for pictures that are too large, too small or too long."""
    if width * height > MAX_PIXELS:
        raise BadFile(f"{width}x{height}: more than {MAX_PIXELS / 1e6:.0f} million pixels")
    if min(width, height) < MIN_SIDE:
        raise BadFile(f"{width}x{height}: a side is shorter than {MIN_SIDE} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadFile(f"{width}x{height}: one side is more than {MAX_ASPECT} times the other")


def _header(image: Image.Image, head: bytes) -> Header:
    width, height = image.size
    check_size(width, height)
    if image.mode in ("I", "F"):
        what = "32-bit integer" if image.mode == "I" else "real-valued"
        raise BadFile(f"{what} pixels do not say their range: pip install 'undiffuse[data]' reads them as arrays")
    if image.mode not in GREY and image.mode not in COLOUR:
        raise BadFile(f"pixel mode {image.mode} is not supported")
    if _says_turned(image):
        width, height = height, width
    if png.is_deep(head):
        return Header(height, width, png.CHANNELS.get(head[25], 3) < 3, 16)
    grey = image.mode in GREY or (image.mode == "P" and _grey_palette(image))
    return Header(height, width, grey, 16 if image.mode in SIXTEEN else 8)


def _says_turned(image: Image.Image) -> bool:
    """Whether EXIF will exchange height and width."""
    if image.format == "TIFF":  # it turns itself on loading, and its size is that of the upright image already
        return False
    if image.format == "PNG" and not {"exif", "Raw profile type exif", "XML:com.adobe.xmp"} & image.info.keys():
        return False  # Pillow would decode the pixels to look for EXIF behind them
    return image.getexif().get(0x0112) in (5, 6, 7, 8)


def _grey_palette(image: Image.Image) -> bool:
    if image.palette is None:
        return False
    mode, palette = image.palette.getdata()
    if mode != "RGB" or len(palette) == 0 or len(palette) % 3:
        return False
    colours = np.frombuffer(palette, np.uint8).reshape(-1, 3)
    return bool((colours == colours[:, :1]).all())


def _bit_depth(image: Image.Image, data: bytes) -> int:
    """Bits a channel as stored; 8 where the format has no choice."""
    if image.format == "PNG":
        return data[24]  # signature 8, chunk head 8, width 4, height 4
    if image.format == "TIFF":
        bits = image.getexif().get(0x0102, 8)
        return int(bits[0] if isinstance(bits, tuple) else bits)
    return 8


def _frames(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False)) or getattr(image, "n_frames", 1) > 1
    except Exception:  # a later frame is broken; the first one is ours already
        return True


# ---- is the file whole? ----


def _check_whole(data: bytes) -> tuple[str, ...]:
    """Refuses what decoders read past silently: PNG chunks with a wrong checksum, JPEG that does not end."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        end = _check_png(data)
        return ("bytes after the end of the image, ignored",) if data[end:].strip(b"\0\r\n ") else ()
    if data.startswith(b"\xff\xd8\xff"):
        if b"\xff\xd9" not in data:
            raise BadFile("truncated: the end of the JPEG is missing")
        tail = data.rstrip(b"\0\r\n ")
        return () if tail.endswith(b"\xff\xd9") else ("bytes after the end of the image, ignored",)
    return ()


def _check_png(data: bytes) -> int:
    """Walks the chunks (length, type, content, CRC-32) and returns where the image ends."""
    at = 8
    while True:
        length = int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        end = at + 12 + length
        if len(kind) < 4 or end > len(data):
            raise BadFile("truncated: the file ends inside a PNG chunk")
        if zlib.crc32(memoryview(data)[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise BadFile(f"damaged: wrong checksum in PNG chunk {kind.decode('latin-1')!r}")
        if kind == b"IEND":
            return end
        at = end


# ---- from any mode to grey or RGB with an alpha ----


def _eight(pixels: np.ndarray) -> np.ndarray:
    """16 bits to 8: divided by 257 and rounded (cutting the low byte off darkens)."""
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _deep_colour(image: Image.Image, data: bytes) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
    """As :func:`_straight`, of a PNG with 16 bits a channel."""
    pixels, key = png.decode16(data), image.info.get("transparency")
    colour, alpha = (pixels[..., :-1], pixels[..., -1]) if pixels.shape[-1] in (2, 4) else (pixels, None)
    if isinstance(key, tuple):
        alpha = _keyed(colour == np.asarray(key), np.uint16)
    profile, notes = image.info.get("icc_profile"), ()
    if profile and _to_srgb(profile, "RGB") is not None:
        notes = ("its colour profile cannot be applied at 16 bits, read as sRGB",)
    upright = UPRIGHT.get(image.getexif().get(0x0112, 1), lambda array: array)
    return upright(colour), None if alpha is None else upright(alpha), notes


def _straight(image: Image.Image, depth: int) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
    """Colour ``[H, W, 1 or 3]`` of 8 bits (of 16 for 16-bit grey), alpha ``[H, W]`` or ``None`` (not premultiplied),
    and notes."""
    key = image.info.get("transparency")
    if image.mode in SIXTEEN:
        wide = np.ascontiguousarray(np.asarray(image), dtype=np.uint16)[..., None]
        return wide, _keyed(wide == key, np.uint16) if isinstance(key, int) else None, ()
    if image.mode in ("1", "L"):
        grey = np.asarray(image.convert("L"))[..., None]
        if isinstance(key, int) and image.mode == "L":
            key = round(key * 255 / (2 ** min(depth, 8) - 1))  # it counts stored levels, the pixels are 0..255
        return grey, _keyed(grey == key) if isinstance(key, int) else None, ()
    if image.mode in ("LA", "La"):
        both = np.asarray(image.convert("LA"))
        return both[..., :1], both[..., 1], ()
    if image.mode == "LAB":
        return np.asarray(_apply(_to_srgb(None, "LAB"), image)), None, ()
    alpha, profile = None, image.info.get("icc_profile")
    if image.mode == "RGB" and isinstance(key, tuple):
        stored = [value >> 8 if depth == 16 else value for value in key]
        alpha = _keyed(np.asarray(image) == np.asarray(stored))
    elif image.mode in ("PA", "RGBA", "RGBa") or (image.mode == "P" and key is not None):
        grey_palette = image.mode == "P" and _grey_palette(image)
        image = image.convert("RGBA")
        alpha = np.asarray(image)[..., 3]
        if grey_palette:
            return np.asarray(image)[..., :1], alpha, ()
    elif image.mode == "P" and _grey_palette(image):
        return np.asarray(image.convert("RGB"))[..., :1], None, ()
    if image.mode != "CMYK":
        image = image.convert("RGB")
    if not profile:
        return np.asarray(image.convert("RGB")), alpha, ()
    try:
        image = _apply(_to_srgb(profile, image.mode), image)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return np.asarray(image.convert("RGB")), alpha, ("its colour profile is broken, read as sRGB",)
    return np.asarray(image.convert("RGB")), alpha, ()


def _apply(transform: ImageCms.ImageCmsTransform | None, image: Image.Image) -> Image.Image:
    return image if transform is None else transform.apply(image)


@lru_cache(maxsize=64)
def _to_srgb(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The colour transform from a profile (``None``: CIE Lab) to sRGB; ``None`` if the profile is sRGB itself."""
    if profile is None:
        source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    else:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if mode == "RGB" and "srgb" in ImageCms.getProfileDescription(source).lower():
            return None
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")


def _keyed(matches: np.ndarray, dtype: type = np.uint8) -> np.ndarray:
    """Alpha from "this one colour is transparent"; ``matches`` is bool ``[H, W, C]``."""
    return np.where(matches.all(axis=-1), 0, np.iinfo(dtype).max).astype(dtype)


def combined(colour: np.ndarray, alpha: np.ndarray | None, channels: int) -> np.ndarray:
    """``[H, W]`` for one channel, else ``[H, W, channels]``. Four keep the alpha, else it is composited on white."""
    dtype, opaque = colour.dtype, np.uint32(np.iinfo(colour.dtype).max)
    if alpha is not None and channels != 4:
        a = alpha[..., None].astype(np.uint32)
        colour = ((colour * a + opaque * (opaque - a) + opaque // 2) // opaque).astype(dtype)
    if channels == 1:
        if colour.shape[-1] == 3:  # ITU-R BT.601 luma
            red, green, blue = np.moveaxis(colour.astype(np.uint32), -1, 0)
            return ((299 * red + 587 * green + 114 * blue + 500) // 1000).astype(dtype)
        return np.ascontiguousarray(colour[..., 0])
    rgb = np.broadcast_to(colour, (*colour.shape[:2], 3))
    if channels == 3:
        return np.ascontiguousarray(rgb)
    full = np.full(rgb.shape[:2], opaque, dtype) if alpha is None else alpha
    return np.concatenate([rgb, full[..., None]], axis=-1)
