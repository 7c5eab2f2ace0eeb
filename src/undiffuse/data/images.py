"""One image file: is it safe and whole, how large is it, what are its pixels?

Files come from strangers and break in many ways, so nothing is decoded before its header says that it is small enough,
and only the formats below are ever given to a decoder. What the pixels become:

    16-bit grey      kept, if the caller wants 16 bits; else divided by 257 (cutting makes nearly everything white)
    palette, 1-bit, CMYK, YCbCr, Lab    RGB or grey; CMYK in JPEG of both polarities
    colour profile   RGB and CMYK are converted to sRGB
    transparency     composited on white, or kept as a fourth channel
    EXIF             turned upright
    several frames   the first
    32-bit and real-valued TIFF    refused: they do not say what their range is
"""

from __future__ import annotations

import os
import stat
import warnings
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from io import BytesIO
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageOps

from ..errors import UndiffuseError

Size = tuple[int, int] | None  # height, width
Channels = int | str | None

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 64_000_000
MAX_BYTES = 100_000_000
MIN_SIDE = 4
MAX_ASPECT = 32
SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")
GREY = ("1", "L", "LA", "La", *SIXTEEN)
COLOUR = ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB")


class BadImage(UndiffuseError):
    """This file cannot be used; the message is the reason, without the name of the file."""


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


def read_header(path: str | os.PathLike[str] | bytes) -> Header:
    """Size and kind of an image file, from its header alone. Raises :class:`BadImage`."""
    with _regular(path) as file, _foreign(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(file, formats=FORMATS) as image:
            return _header(image)


def decode(path: str | os.PathLike[str] | bytes, target: Target) -> Decoded:
    """The pixels of an image file as ``target`` wants them: uint8, or uint16 for 16 bits. Raises :class:`BadImage`."""
    with _regular(path) as file:
        data = file.read(MAX_BYTES + 1)
    notes = _check_whole(data)
    with _foreign(), Image.open(BytesIO(data), formats=FORMATS) as image:
        header = _header(image)
        deep = _bit_depth(image, data)
        image.load()
        upright = ImageOps.exif_transpose(image)
        if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
            upright = ImageChops.invert(upright)  # Pillow reads all as Adobe's, which are stored inverted
        if header.bits == 16 and target.bits == 16:
            pixels = _native(np.asarray(upright))
            key = upright.info.get("transparency")
            pixels = np.where(pixels == key, np.uint16(65535), pixels) if isinstance(key, int) else pixels
        else:
            colour, alpha, more = _straight(upright, deep)
            notes += more
            pixels = _combine(colour, alpha, target.channels)
        if _frames(image):
            notes += ("several frames, the first is read",)
        if deep == 16 and header.bits == 8:
            notes += ("16 bits a channel in colour, read as 8",)
    height, width = pixels.shape[:2]
    if (height, width) != (header.height, header.width):  # the form of all images was chosen by the headers
        raise BadImage("its orientation is stored after its pixels: save it again")
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
    planes = pixels[..., None] if pixels.ndim == 2 else pixels
    planes = [lanczos(Image.fromarray(np.ascontiguousarray(plane, np.float32))) for plane in np.moveaxis(planes, -1, 0)]
    result = np.stack(planes, axis=-1).reshape(*size, *pixels.shape[2:])
    if pixels.dtype.kind == "f":
        return result.astype(pixels.dtype)
    if pixels.dtype.kind == "b":
        return result >= 0.5
    limits = np.iinfo(pixels.dtype)
    return np.clip(np.floor(result.astype(np.float64) + 0.5), limits.min, limits.max).astype(pixels.dtype)


# ---- opening ----


@contextmanager
def _regular(path: str | os.PathLike[str] | bytes) -> Generator[BinaryIO, None, None]:
    """``path`` opened if it is a regular file of acceptable size. A FIFO would block: it is never waited for."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise BadImage((error.strerror or "cannot be opened").lower()) from error
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise BadImage("not a regular file")
    with os.fdopen(handle, "rb") as file:
        if status.st_size == 0:
            raise BadImage("the file is empty")
        if status.st_size > MAX_BYTES:
            raise BadImage(f"{status.st_size / 1e6:,.0f} MB, at most {MAX_BYTES / 1e6:,.0f} MB are read")
        yield file


@contextmanager
def _foreign() -> Generator[None, None, None]:
    """Turns whatever a decoder does with a broken file into a reason. Decoders raise nearly every kind of exception."""
    try:
        yield
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage(f"not an image ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise BadImage(f"more than {MAX_PIXELS / 1e6:.0f} million pixels") from None
    except MemoryError:
        raise BadImage("not enough memory to decode it") from None
    except Exception as error:
        raise BadImage(f"damaged: {' '.join(str(error).split())[:100] or type(error).__name__}") from error


def _header(image: Image.Image) -> Header:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}x{height}: more than {MAX_PIXELS / 1e6:.0f} million pixels")
    if min(width, height) < MIN_SIDE:
        raise BadImage(f"{width}x{height}: a side is shorter than {MIN_SIDE} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(f"{width}x{height}: one side is more than {MAX_ASPECT} times the other")
    if image.mode in ("I", "F"):
        what = "32-bit integer" if image.mode == "I" else "real-valued"
        raise BadImage(f"{what} pixels do not say their range: save 8- or 16-bit, or an .npy array")
    if image.mode not in GREY and image.mode not in COLOUR:
        raise BadImage(f"pixel mode {image.mode} is not supported")
    if _says_turned(image):
        width, height = height, width
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
            raise BadImage("truncated: the end of the JPEG is missing")
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
            raise BadImage("truncated: the file ends inside a PNG chunk")
        if zlib.crc32(memoryview(data)[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise BadImage(f"damaged: wrong checksum in PNG chunk {kind.decode('latin-1')!r}")
        if kind == b"IEND":
            return end
        at = end


# ---- from any mode to grey or RGB with an alpha ----


def _native(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels, dtype=np.uint16)


def _straight(image: Image.Image, depth: int) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
    """8-bit colour ``[H, W, 1 or 3]``, alpha ``[H, W]`` or ``None`` (not premultiplied), and notes."""
    key = image.info.get("transparency")
    if image.mode in SIXTEEN:
        wide = _native(np.asarray(image))
        alpha = _keyed(wide[..., None] == key) if isinstance(key, int) else None
        return ((wide.astype(np.uint32) + 128) // 257).astype(np.uint8)[..., None], alpha, ()
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


def _keyed(matches: np.ndarray) -> np.ndarray:
    """Alpha from "this one colour is transparent"; ``matches`` is bool ``[H, W, C]``."""
    return np.where(matches.all(axis=-1), 0, 255).astype(np.uint8)


def _combine(colour: np.ndarray, alpha: np.ndarray | None, channels: int) -> np.ndarray:
    """``[H, W]`` for one channel, else ``[H, W, channels]``. Four keep the alpha, else it is composited on white."""
    if alpha is not None and channels != 4:
        a = alpha[..., None].astype(np.uint32)
        colour = ((colour * a + 255 * (255 - a) + 127) // 255).astype(np.uint8)
    if channels == 1:
        if colour.shape[-1] == 3:  # ITU-R BT.601 luma
            red, green, blue = np.moveaxis(colour.astype(np.uint32), -1, 0)
            return ((299 * red + 587 * green + 114 * blue + 500) // 1000).astype(np.uint8)
        return np.ascontiguousarray(colour[..., 0])
    rgb = np.broadcast_to(colour, (*colour.shape[:2], 3))
    if channels == 3:
        return np.ascontiguousarray(rgb)
    full = np.full(rgb.shape[:2], 255, np.uint8) if alpha is None else alpha
    return np.concatenate([rgb, full[..., None]], axis=-1)
