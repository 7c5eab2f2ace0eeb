"""The IDX format, in which MNIST is published: a type, the sizes, then the values, big-endian.

    0x00 0x00 type rank   size_1 .. size_rank (uint32)   values in C order

The reader is strict: a file that is shorter or longer than its header says is refused.
Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits".
"""

from __future__ import annotations

import gzip
import zlib
from math import prod
from pathlib import Path

import numpy as np

from ..errors import UndiffuseError

TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
MAX_BYTES = 8 * 2**30


def read_idx(path: str | Path) -> np.ndarray:
    """The array in an IDX file, plain or gzip (recognised by content), in native byte order."""
    path = Path(path)
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            magic = file.read(4)
            if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in TYPES or magic[3] == 0:
                raise UndiffuseError(f"{path}: not an IDX file (it starts with {magic.hex(' ') or 'nothing'})")
            sizes = file.read(4 * magic[3])
            if len(sizes) < 4 * magic[3]:
                raise UndiffuseError(f"{path}: truncated inside the header; get the file again")
            shape = tuple(int(size) for size in np.frombuffer(sizes, ">u4"))
            dtype = np.dtype(TYPES[magic[2]])
            expected = prod(shape) * dtype.itemsize
            if expected > MAX_BYTES:
                raise UndiffuseError(
                    f"{path}: the header declares {expected:,} bytes, more than the {MAX_BYTES:,} allowed"
                )
            values = file.read(expected + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UndiffuseError(f"{path}: cannot be read ({error}); get the file again") from error
    if len(values) != expected:
        found = f"{len(values):,}" if len(values) < expected else "more"
        raise UndiffuseError(f"{path}: {expected:,} bytes of values declared, {found} found; get the file again")
    return np.frombuffer(values, dtype).reshape(shape).astype(dtype.newbyteorder("="))
