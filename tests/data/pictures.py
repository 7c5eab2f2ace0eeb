"""Makes image files, good and bad, in a temporary folder: nothing binary is kept in the repository."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def ramp(height: int = 8, width: int = 8, channels: int = 3, seed: int = 0) -> np.ndarray:
    """A uint8 picture ``[H, W, C]`` (``[H, W]`` for one channel) without symmetry, another one for each ``seed``."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [(37 * seed + 50 * c + 200 * x / width + 30 * y / height) % 256 for c in range(channels)]
    picture = np.stack(planes, axis=-1).astype(np.uint8)
    return picture[..., 0] if channels == 1 else picture


def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def good_folder(root: Path, count: int, channels: int = 3, size: int = 8) -> Path:
    for index in range(count):
        save(root / f"{index:04}.png", ramp(size, size, channels, index))
    return root


def png_bytes(pixels: np.ndarray, **options: Any) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    return buffer.getvalue()


def jpeg_bytes(pixels: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def raw_png(width: int, height: int, depth: int, colour: int, rows: bytes, *before: bytes) -> bytes:
    """A PNG from its parts: colour type 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA; rows start with a 0."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return SIGNATURE + head + b"".join(before) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def rows16(pixels: np.ndarray) -> bytes:
    """Uint16 ``[H, W]`` or ``[H, W, C]`` as PNG rows, filter 0."""
    return b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


def bad_files() -> dict[str, bytes]:
    """Name to content of files that call themselves images and cannot be used (numbered as the known bad files)."""
    png, jpeg = png_bytes(ramp(32, 32)), jpeg_bytes(ramp(32, 32))
    stored = png_bytes(ramp(32, 32), compress_level=0)
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(60_000_000)))
    grey_rows = b"".join(b"\0" + bytes(8) for _ in range(8))
    float_tiff, int_tiff = BytesIO(), BytesIO()
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(float_tiff, "TIFF")
    Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8)).save(int_tiff, "TIFF")
    return {
        "01-empty.png": b"",
        "02-cut.png": png[: len(png) // 2],
        "03-cut.jpg": jpeg[: len(jpeg) // 2],
        "03-no-end.jpg": jpeg[:-2],
        "04-text.png": b"this is not a picture\n",
        "05-html.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
        "07-crc.png": _flip(png, png.index(b"IDAT") + 10),
        "07-crc-changed.png": _flip(png, png.index(b"IEND") - 6),
        "07-crc-pixel.png": _flip(stored, stored.index(b"IDAT") + 40),
        "07-crc-of-text.png": _flip(SIGNATURE + png[8:33] + chunk(b"tEXt", b"a\0b") + png[33:], 33 + 9),
        "09-30000.png": raw_png(30_000, 30_000, 1, 0, b""),
        "10-13000.png": raw_png(13_000, 13_000, 1, 0, b""),
        "11-huge.png": raw_png(2**31 - 1, 2**31 - 1, 8, 2, b""),
        "12-text-bomb.png": raw_png(8, 8, 8, 0, grey_rows, bomb),
        "15-float.tiff": float_tiff.getvalue(),
        "16-int32.tiff": int_tiff.getvalue(),
        "27-one-pixel.png": png_bytes(ramp(1, 1)),
        "28-thin.png": png_bytes(ramp(1, 5000)),
        "28-long.png": png_bytes(ramp(4, 4 * 32 + 1)),
        "29-one-less.png": png_bytes(ramp(3, 8)),
        "37-picture.avif": b"\0\0\0\x20ftypavif",
        "37-picture.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    }
