from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from undiffuse.data.idx import read_idx
from undiffuse.errors import UndiffuseError

CODES = {"uint8": 8, "int8": 9, "int16": 11, "int32": 12, "float32": 13, "float64": 14}


def idx_bytes(values: np.ndarray) -> bytes:
    head = bytes([0, 0, CODES[values.dtype.name], values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return head + values.astype(values.dtype.newbyteorder(">")).tobytes()


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_reads_what_the_format_says(tmp_path: Path, dtype: str, pack) -> None:
    values = np.arange(-30, 30).reshape(3, 4, 5).astype(dtype)
    path = tmp_path / "file"
    path.write_bytes(pack(idx_bytes(values)))
    found = read_idx(path)
    assert found.dtype == np.dtype(dtype)
    assert found.dtype.isnative
    np.testing.assert_array_equal(found, values)


GOOD = idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        GOOD[:3],
        GOOD[:9],
        GOOD[:-1],
        GOOD + b"\0",
        b"\1" + GOOD[1:],
        GOOD[:2] + b"\x0a" + GOOD[3:],
        GOOD[:3] + b"\0" + GOOD[4:],
        GOOD[:4] + b"\xff" * 12 + GOOD[16:],
        b"\x1f\x8b" + GOOD,
        gzip.compress(GOOD)[:-9],
        gzip.compress(GOOD[:-1]),
        gzip.compress(GOOD)[:12] + b"\xff\xff" + gzip.compress(GOOD)[14:],
    ],
    ids=["empty", "magic", "header", "short", "long", "zero", "type", "rank", "huge", "gzip", "cut", "packed", "bits"],
)
def test_refuses_anything_else(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "digits-idx3-ubyte"
    path.write_bytes(data)
    with pytest.raises(UndiffuseError, match="digits-idx3-ubyte"):
        read_idx(path)
