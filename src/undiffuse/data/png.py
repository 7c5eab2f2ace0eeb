"""PNG at 16 bits a channel, in colour: Pillow keeps 16 bits of grey only and cuts colours to 8.

A PNG is a head, rows that were filtered and deflated, and an end, each in a chunk with a checksum (W3C, PNG third
edition). The readers that keep 16 bits are large (OpenCV) or slow (pure Python, a loop over bytes); the filters are
undone here for whole diagonals at a time.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np

from .store import BadFile

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}
"""Channels by colour type: grey, RGB, grey and alpha, RGB and alpha (3 is a palette, which has no 16 bits)."""


def is_deep(head: bytes) -> bool:
    """Whether the first 29 bytes are those of a PNG with 16 bits that :func:`decode16` reads (one not interlaced)."""
    return head.startswith(SIGNATURE) and len(head) >= 29 and head[24] == 16 and head[28] == 0


def decode16(data: bytes) -> np.ndarray:
    """The pixels of a 16-bit PNG whose checksums are right: uint16 ``[H, W, 1 to 4]``, as stored."""
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    size = 2 * CHANNELS[data[25]]  # bytes a pixel
    packed, at = [], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"IDAT":
            packed.append(data[at + 8 : at + 8 + length])
        at += 12 + length
    wanted = height * (1 + width * size)
    try:
        rows = zlib.decompressobj().decompress(b"".join(packed), wanted + 1)
    except zlib.error as error:
        raise BadFile(f"damaged: {error}") from error
    if len(rows) != wanted:
        raise BadFile("damaged: another number of pixels than its header says")
    table = np.frombuffer(rows, np.uint8).reshape(height, 1 + width * size)
    if table[:, 0].max() > 4:
        raise BadFile(f"damaged: a row with filter {table[:, 0].max()}")
    pixels = _unfilter(table[:, 0], table[:, 1:].reshape(height, width, size))
    return pixels.view(">u2").astype(np.uint16)


def _unfilter(kinds: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Undo the filters ``kinds`` ``[H]`` (0 none, 1 left, 2 up, 3 mean, 4 Paeth) of ``rows`` ``[H, W, bytes]``.

    A byte was stored minus a guess from the bytes to its left, above it, and left above it. These lie on the two
    diagonals before its own, so that a whole diagonal is undone at once.
    """
    height, width, size = rows.shape
    done = np.zeros((height + 1, width + 1, size), np.uint8)  # with an edge of zeros, as the standard has it
    flat, stored = done.reshape(-1, size), rows.reshape(-1, size)
    for diagonal in range(height + width - 1):
        first, last = max(0, diagonal - width + 1), min(height - 1, diagonal)  # its rows
        count, column = last - first + 1, diagonal - first
        corner = first * (width + 1) + column  # one row down and one column back is `width` further in `flat`

        def along(start: int, array: np.ndarray = flat, step: int = width, count: int = count) -> np.ndarray:
            return array[start : start + (count - 1) * step + 1 : step] if step else array[start : start + 1]

        a = along(corner + width + 1).astype(np.int16)  # left
        b = along(corner + 1).astype(np.int16)  # above
        c = along(corner).astype(np.int16)  # left above
        pa, pb, pc = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
        paeth = np.where((pa <= pb) & (pa <= pc), a, np.where(pb <= pc, b, c))
        guess = np.choose(kinds[first : last + 1, None], [np.zeros_like(a), a, b, (a + b) >> 1, paeth])
        values = along(first * width + column, stored, width - 1)
        along(corner + width + 2)[...] = (values + guess).astype(np.uint8)
    return np.ascontiguousarray(done[1:, 1:])


def encode16(pixels: np.ndarray, texts: Mapping[str, str] | None = None) -> bytes:
    """uint16 ``[H, W]`` or ``[H, W, 1 to 4]`` as a PNG, without filters; ``texts`` go into text chunks (iTXt)."""
    height, width = pixels.shape[:2]
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    colour = {count: kind for kind, count in CHANNELS.items()}[channels]
    rows = np.zeros((height, 1 + width * channels * 2), np.uint8)
    rows[:, 1:] = np.ascontiguousarray(pixels, ">u2").view(np.uint8).reshape(height, -1)
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, colour, 0, 0, 0])
    said = b"".join(_chunk(b"iTXt", f"{key}\0\0\0\0\0{text}".encode()) for key, text in (texts or {}).items())
    packed = _chunk(b"IDAT", zlib.compress(rows.tobytes()))
    return SIGNATURE + _chunk(b"IHDR", head) + said + packed + _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
