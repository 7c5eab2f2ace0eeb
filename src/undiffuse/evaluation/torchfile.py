"""The tensors of a ``.pth`` file, read without running anything in it.

Such a file is a pickle, a program for a small stack machine whose instructions may call any function of Python. Here
the instructions are only *listed* (``pickletools``) and played on a stack of plain values: a call becomes a note of
what would have been called, and the one note that is understood is "a tensor of this storage, offset, shape, stride".
"""

from __future__ import annotations

import io
import os
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..errors import UndiffuseError

LARGEST = 2**30  # bytes of file and of tensors
STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
}
BROKEN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What damaged files make of the parsers."""
REBUILD = "torch._utils _rebuild_tensor_v2"


class Name(str):
    """A function or class that the file names, as ``module name``; it is never looked up."""


class Call(NamedTuple):
    function: Any
    arguments: Any


class Stored(NamedTuple):
    """A storage that the file refers to: ``("storage", type, key, device, count, ...)``."""

    facts: tuple


def read_torch_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in ``path``, of torch's zip format or the one before it (up to torch 1.5). Nothing is called.

    Raises :class:`UndiffuseError` for anything but a dictionary of names and tensors.
    """
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"larger than {LARGEST // 2**30} GiB")
        file = io.BytesIO(path.read_bytes())  # which, unlike a file, allocates no more than it has
        zipped = zipfile.is_zipfile(file)
        file.seek(0)
        content, storage = _zipped(file) if zipped else _sequence(file)
        items = content.arguments[0] if isinstance(content, Call) and content.arguments else content
        if not isinstance(items, dict):
            raise ValueError(f"holds a {type(items).__name__}, not a dictionary of tensors")
        return {str(name): _tensor(str(name), value, storage) for name, value in items.items()}
    except (*BROKEN, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UndiffuseError(f"{path}: not a file of plain tensors ({reason})") from None


def _zipped(file: io.BytesIO) -> tuple[Any, Callable[[Stored], bytes]]:
    archive = zipfile.ZipFile(file)
    entries = {info.filename: info for info in archive.infolist()}
    pickled = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickled) != 1:
        raise ValueError(f"{len(pickled)} entries data.pkl")
    root = pickled[0].removesuffix("data.pkl")
    if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
        raise ValueError("compressed entries, which torch does not write")
    if sum(info.file_size for info in entries.values()) > len(file.getbuffer()):
        raise ValueError("entries that promise more than the file has")
    content = {name: archive.read(info) for name, info in entries.items() if name.startswith(root)}
    return play(io.BytesIO(content[f"{root}data.pkl"])), lambda stored: content[f"{root}data/{stored.facts[2]}"]


def _sequence(file: BinaryIO) -> tuple[Any, Callable[[Stored], bytes]]:
    """Magic number, version, facts of the machine, the object, keys of storages; then counts and bytes of each."""
    if play(file) != 0x1950A86A20F9469CFC6C:
        raise ValueError("not written by torch.save")
    sizes: dict[str, int] = {}

    def note(facts: tuple) -> None:
        sizes[facts[2]] = torch.empty(0, dtype=_dtype(facts[1])).element_size()

    play(file), play(file)
    content = play(file, note)
    blocks = {}
    for key in play(file):
        count = int.from_bytes(file.read(8), "little")
        blocks[key] = file.read(min(count * sizes[key], LARGEST))
    return content, lambda stored: blocks[stored.facts[2]]


def _dtype(name: str) -> torch.dtype:
    return STORAGES[name.partition(" ")[2]]


def _tensor(name: str, value: Any, storage: Callable[[Stored], bytes]) -> Tensor:
    if not isinstance(value, Call) or value.function != REBUILD:
        raise ValueError(f"{name} is no tensor")
    stored, offset, shape, stride = value.arguments[:4]
    dtype = _dtype(stored.facts[1])
    flat = torch.frombuffer(bytearray(storage(stored)), dtype=dtype)
    if not all(type(n) is int and n >= 0 for n in (offset, *shape, *stride)) or len(shape) != len(stride):
        raise ValueError(f"{name} has a shape that is not one")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if 0 in shape or last >= len(flat):
        raise ValueError(f"{name} reaches beyond its bytes")
    return flat.as_strided(shape, stride, offset).clone()


def play(file: BinaryIO, note: Callable[[tuple], None] = lambda facts: None) -> Any:
    """The value that the pickle at the position of ``file`` describes, with calls as :class:`Call`.

    Only the instructions that torch writes for a state dict are known; any other raises ``ValueError``.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def since_mark() -> list[Any]:
        at = marks.pop()
        items, stack[at:] = stack[at:], []
        return items

    for opcode, argument, _ in pickletools.genops(file):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINFLOAT":
                stack.append(argument)
            case "GLOBAL":
                stack.append(Name(argument))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPENDS":
                items = since_mark()
                stack[-1].extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][key] = value
            case "SETITEMS":
                items = since_mark()
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "BINPERSID":
                facts = stack.pop()
                note(facts)
                stack.append(Stored(facts))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                # an OrderedDict is a dict here: it is filled by the instructions that follow
                stack.append({} if function == "collections OrderedDict" else Call(function, arguments))
            case "BUILD":
                stack.pop()  # attributes of the dict (its _metadata): not needed
            case other:
                raise ValueError(f"an instruction {other} that no state dict has")
    raise ValueError("it ends early")
