"""Weights on disk: safetensors, checked before they are believed.

A safetensors file is a length, a JSON header that names every tensor with its type, shape and place, and the bytes.
Nothing in it can run. It can still lie, so the header is checked against the file before anything is allocated; and
bytes can turn on a disk, so files of ours state the hash of theirs.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from .config import write_bytes_atomic
from .errors import UndiffuseError, UndiffuseWarning

LARGEST_HEADER = 10_000_000  # bytes; a model of 10,000 tensors needs about one
MOST_TENSORS = 100_000
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
HASH = "undiffuse_sha256"
"""The metadata that states the hash of all bytes after the header."""

NAMES = {dtype: name for name, dtype in TYPES.items()}


@dataclass(frozen=True)
class Header:
    """What a weights file says of itself: ``shapes`` and ``dtypes`` by tensor name, and the free-form ``metadata``."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]

    @property
    def parameters(self) -> int:
        """How many numbers the tensors hold."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of a safetensors file; no tensor is read.

    Raises :class:`UndiffuseError` naming the file for anything that is not exactly right: too short, a header that is
    not JSON or larger than 10 MB, duplicate names, an unknown type, a shape that does not fit its bytes, tensors that
    overlap or leave holes, or bytes left over.
    """
    path = Path(path)
    wrong = f"{path}: damaged or not a safetensors file"
    if not path.is_file():
        raise UndiffuseError(f"{path}: no such file" if not path.exists() else f"{path}: not a regular file")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= size - 8:
            raise UndiffuseError(f"{wrong} (a header of {length} bytes in a file of {size}); copy it again")
        if length > LARGEST_HEADER:
            raise UndiffuseError(f"{wrong} (its header has {length} bytes, the limit is {LARGEST_HEADER})")
        content = file.read(length)
    try:
        table = json.loads(content.decode(), object_pairs_hook=_no_duplicates)
        metadata = table.pop("__metadata__", {})
        if len(table) > MOST_TENSORS:
            raise ValueError(f"{len(table)} tensors, the limit is {MOST_TENSORS}")
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that is not text")
        shapes, dtypes, places = {}, {}, []
        for name, entry in table.items():
            shape, dtype, (begin, end) = entry["shape"], entry["dtype"], entry["data_offsets"]
            # Multiplied only when small: a million digits take minutes.
            if len(shape) > 64 or not all(type(n) is int and 0 <= n < 1 << 63 for n in [*shape, begin, end]):
                raise ValueError(f"{name} has a size that is not a whole number below 2^63")
            if dtype not in TYPES:
                raise ValueError(f"{name} has the unknown type {dtype}")
            if end - begin != math.prod(shape) * TYPES[dtype].itemsize:
                raise ValueError(f"{name} does not fit its bytes")
            shapes[name], dtypes[name] = tuple(shape), dtype
            places.append((begin, end))
        reached = 0
        for begin, end in sorted(places):
            if begin != reached:
                raise ValueError("tensors overlap or leave a hole")
            reached = end
        if 8 + length + reached != size:
            raise ValueError(f"{size} bytes where its header promises {8 + length + reached}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UndiffuseError(f"{wrong} ({str(error)[:120]}); copy it again") from None
    return Header(shapes, dtypes, metadata)


def _no_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(items)
    if len(table) < len(items):
        raise ValueError("the same name twice")
    return table


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU, after :func:`read_header` has found nothing wrong.

    Raises :class:`UndiffuseError` as it does, and where the file states the hash of its bytes and they have another.
    """
    stated = read_header(path).metadata.get(HASH)
    content = Path(path).read_bytes()
    body = memoryview(content)[8 + int.from_bytes(content[:8], "little") :]
    if stated is not None and sha256(body).hexdigest() != stated:
        raise UndiffuseError(f"{path}: damaged (its bytes are not those that were written); copy it again")
    return load(content)


def in_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU as they follow each other in a file: the widest first, as the format asks, so that each is
    aligned; then by name."""
    cpu = {name: tensors[name].detach().to("cpu").contiguous() for name in tensors}
    return {name: cpu[name] for name in sorted(cpu, key=lambda name: (-cpu[name].element_size(), name))}


def in_bytes(tensor: Tensor) -> memoryview:
    """A CPU tensor's own memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: its header, then each tensor's own memory.

    The library's ``save`` copies everything twice while no other thread can run, which a training step beside it feels.
    """
    cpu = in_order(tensors)
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in cpu.items():
        begin, end = end, end + tensor.nbytes
        table[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    for tensor in cpu.values():
        yield in_bytes(tensor)


def write_weights(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically, with the hash of its bytes; a reader finds the old file or the new one."""
    cpu, found = in_order(tensors), sha256()
    for tensor in cpu.values():
        found.update(in_bytes(tensor))
    write_bytes_atomic(path, *pieces(cpu, {**metadata, HASH: found.hexdigest()}))


def load_into(module: torch.nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy ``tensors`` into ``module``: all of them or, when a name, a shape or a number is wrong, none.

    ``where`` names the file in the message.
    """
    state = module.state_dict()
    check_fits(shapes(state), shapes(tensors), where)
    for name, tensor in tensors.items():
        ours = state[name].dtype
        if tensor.is_floating_point() != ours.is_floating_point or torch.promote_types(tensor.dtype, ours) != ours:
            raise UndiffuseError(f"{where}: {name} holds {tensor.dtype}, of which {ours} would lose a part")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UndiffuseError(f"{where}: {name} holds NaN or infinite numbers; take an earlier checkpoint")
    if tensors and not any(bool(tensor.any()) for tensor in tensors.values()):
        warnings.warn(
            f"{where}: all weights are 0, so it has learned nothing; is it the right file?",
            UndiffuseWarning,
            stacklevel=3,
        )
    module.load_state_dict(dict(tensors))


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The table of shapes that :func:`check_fits` compares."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_fits(wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise, in one line, unless the two tables of shapes are the same."""
    missing, extra = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    other = [name for name in wanted if name in given and wanted[name] != given[name]]
    if not (missing or extra or other):
        return
    parts = [f"{len(names)} {word} ({names[0]})" for names, word in ((missing, "missing"), (extra, "unknown")) if names]
    if other:
        name = other[0]
        parts.append(f"{len(other)} of another shape ({name}: {list(given[name])}, the model has {list(wanted[name])})")
    raise UndiffuseError(f"{where}: weights of another architecture: {', '.join(parts)} tensors")
