"""Weights on disk: what is written is the format, and what is not exactly that is refused without being loaded."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from test_pipeline import pipeline
from undiffuse.errors import UndiffuseError, UndiffuseWarning
from undiffuse.pipeline import Pipeline
from undiffuse.weights import TYPES, load_into, pieces, read_header, read_weights, write_weights


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(0)
    numbers = (torch.randn(4, 6, generator=source) * 9).to(dtype)
    return {"b": numbers, "a": numbers.T, "scalar": numbers[0, 0], "none": numbers[:0], "ü": numbers[::2, 1:4]}


@pytest.mark.parametrize("dtype", TYPES.values(), ids=str)
def test_the_bytes_are_those_of_the_library(dtype: torch.dtype) -> None:
    metadata = {"undiffuse": json.dumps({"a": 1})}
    contiguous = {name: tensor.clone().contiguous() for name, tensor in tensors(dtype).items()}
    assert b"".join(pieces(tensors(dtype), metadata)) == save(contiguous, metadata)
    assert b"".join(pieces(tensors(dtype))) == save(contiguous)


def test_all_types_together_are_read_by_the_library_and_by_us(tmp_path: Path) -> None:
    mixed = {f"{name} {i}": t for i, d in enumerate(TYPES.values()) for name, t in tensors(d).items()}
    write_weights(tmp_path / "w", mixed, {})
    for read in (load_file(tmp_path / "w"), read_weights(tmp_path / "w")):
        assert set(read) == set(mixed)
        assert all(
            torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in mixed.items()
        )
    assert read_header(tmp_path / "w").parameters == sum(t.numel() for t in mixed.values())


# --- the list of bad files (reliability, "Bad checkpoints and model folders") -----------------------------------------

WHOLE = b"".join(pieces(tensors()))
LENGTH = int.from_bytes(WHOLE[:8], "little")
TABLE: dict[str, Any] = json.loads(WHOLE[8 : 8 + LENGTH])
DATA = WHOLE[8 + LENGTH :]


def headed(header: bytes, data: bytes = DATA) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def table(data: bytes = DATA, **entries: Any) -> bytes:
    return headed(json.dumps({**TABLE, **entries}).encode(), data)


def entry(begin: Any, end: Any, shape: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def like_a(shape: Any, dtype: Any = "F32") -> dict[str, Any]:
    return entry(*TABLE["a"]["data_offsets"], shape, dtype)  # pyrefly: ignore


END = len(DATA)
A_AGAIN = b',"a":' + json.dumps(TABLE["a"]).encode() + b"}"
BAD: dict[str, Callable[[], bytes]] = {
    "1 empty": lambda: b"",
    "2 shorter than its length": lambda: b"1234567",
    "3 header of nothing": lambda: bytes(8),
    "4 header of 2^63": lambda: (2**63 - 1).to_bytes(8, "little") + WHOLE[8:],
    "5 header one longer than the file": lambda: (len(WHOLE) - 7).to_bytes(8, "little") + WHOLE[8:],
    "6 header in Latin-1": lambda: headed('{"ü": 1}'.encode("latin-1")),
    "7 not JSON": lambda: headed(b"{,}"),
    "8 a list": lambda: headed(b"[1, 2]"),
    "9 nested deep": lambda: headed(b"[" * 100_000),
    "10 huge metadata": lambda: table(__metadata__={"a": "x" * 11_000_000}),
    "10 metadata of numbers": lambda: table(__metadata__={"a": 1}),
    "10 metadata as a list": lambda: table(__metadata__=[1]),
    "11 a hundred thousand empty tensors": lambda: headed(
        json.dumps({f"{i}": entry(0, 0, [0]) for i in range(100_001)}).encode(), b""
    ),
    "12 a name twice": lambda: headed(
        WHOLE[8 : 8 + LENGTH].rstrip()[:-1] + b',"a":' + json.dumps(TABLE["a"]).encode() + b"}"
    ),
    "13 overlap": lambda: table(a=TABLE["b"]),
    "14 a hole": lambda: table(bytes(4) + DATA, x=entry(END, END + 4, [1])) + bytes(8),
    "15 more behind": lambda: WHOLE + b"PK\x05\x06",
    "16 shape and bytes differ": lambda: table(a=like_a([5, 5])),
    "17 shape beyond 2^64": lambda: table(a=like_a([2**40, 2**40])),
    "17 product of a million digits": lambda: table(a=like_a([int("9" * 4000)] * 2000)),
    "17 a thousand axes": lambda: table(a=like_a([1] * 1000)),
    "18 negative": lambda: table(a=like_a([-4, -6])),
    "18 float": lambda: table(a=like_a([4.0, 6])),
    "18 text": lambda: table(a=like_a(["4", 6])),
    "18 true": lambda: table(a=like_a([True, 24])),
    "18 a number for a shape": lambda: table(a=like_a(24)),
    "18 offsets of one number": lambda: table(a={**TABLE["a"], "data_offsets": [0]}),
    "18 an entry that is a list": lambda: table(a=[]),
    "18 an entry without a type": lambda: table(a={"shape": [0], "data_offsets": [0, 0]}),
    "19 unknown type": lambda: table(a=like_a([4, 6], "F8_E4M3")),
    "19 a type that is a list": lambda: table(a=like_a([4, 6], ["F32"])),
    "28 cut after a byte": lambda: WHOLE[:1],
    "28 cut in the middle": lambda: WHOLE[: len(WHOLE) // 2],
    "28 cut at the end": lambda: WHOLE[:-1],
    "29 a pickle": lambda: PICKLE,
    "29 a zip": lambda: b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("kind", BAD)
def test_LD1_a_file_that_is_not_exactly_right_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(BAD[kind]())
    with pytest.raises(UndiffuseError, match=r"w\.safetensors: damaged or not a safetensors file") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UndiffuseError, match="no such file"):
        read_weights(tmp_path / "w")
    with pytest.raises(UndiffuseError, match="not a regular file"):
        read_weights(tmp_path)


def copied(tmp_path: Path) -> tuple[Path, dict[str, Tensor], dict[str, str]]:
    folder = pipeline().save(tmp_path / "model")
    weights = folder / "model.safetensors"
    return folder, read_weights(weights), read_header(weights).metadata


def renamed(given: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in given.items()}


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "24 missing": (lambda t: dict(list(t.items())[1:]), "1 missing"),
    "24 extra": (lambda t: {**t, "x": torch.zeros(1)}, "1 unknown"),
    "25 module.": (lambda t: renamed(t, "module."), "missing .*unknown"),
    "25 _orig_mod.": (lambda t: renamed(t, "_orig_mod."), "missing .*unknown"),
    "26 float64 where float32 was": (lambda t: {n: v.double() for n, v in t.items()}, "would lose a part"),
    "26 whole numbers": (lambda t: {n: v.long() for n, v in t.items()}, "would lose a part"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_CK9_A14_weights_that_do_not_fit_are_refused_whole(kind: str, tmp_path: Path) -> None:
    folder, given, metadata = copied(tmp_path)
    change, message = WRONG[kind]
    changed = change(given)
    write_weights(folder / "model.safetensors", changed, metadata)
    with pytest.raises(UndiffuseError, match=rf"model\.safetensors: .*{message}"):
        Pipeline.load(folder)
    denoiser = pipeline(seed=4).denoiser
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    with pytest.raises(UndiffuseError):
        load_into(denoiser, changed, "here")
    assert all(torch.equal(value, before[name]) for name, value in denoiser.state_dict().items())


def test_fewer_bits_are_read_exactly_and_zeros_are_said(tmp_path: Path) -> None:
    folder, given, metadata = copied(tmp_path)
    half = {name: value.bfloat16() for name, value in given.items()}
    write_weights(folder / "model.safetensors", half, metadata)
    loaded = Pipeline.load(folder).denoiser.state_dict()
    assert all(torch.equal(loaded[name], value.float()) for name, value in half.items())
    write_weights(folder / "model.safetensors", {n: torch.zeros_like(v) for n, v in given.items()}, metadata)
    with pytest.warns(UndiffuseWarning, match="all weights are 0"):
        Pipeline.load(folder)


@pytest.mark.parametrize("said", ["{", "[1]", "1", "null", "[" * 100_000, '{"a": NaN}', '{"format": 1, "info": []}'])
def test_a_meaning_that_cannot_be_read_is_refused(said: str, tmp_path: Path) -> None:
    folder, given, _ = copied(tmp_path)
    write_weights(folder / "model.safetensors", given, {"undiffuse": said})
    with pytest.raises(UndiffuseError) as caught:
        Pipeline.load(folder)
    assert "\n" not in str(caught.value)


PICKLE = b"\x80\x04cos\nsystem\n(S'touch owned'\ntR."


def test_A18_LD2_pickles_are_refused_without_being_opened_and_nothing_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 to 35: whatever is inside a .pt, .ckpt, .bin, a sharded index or torch's own checkpoint folders."""
    folder = tmp_path / "pickles"
    folder.mkdir()
    for name in ("model.pt", "model.ckpt", "pytorch_model.bin", ".metadata"):
        (folder / name).write_bytes(PICKLE)
    with zipfile.ZipFile(folder / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(1 << 20))
    index = {"weight_map": {"a": "../../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    whole = pipeline().save(tmp_path / "whole")
    Pipeline.load(whole)
    before, opened = set(sys.modules), list[str]()
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    monkeypatch.setattr(torch, "load", lambda *rest: pytest.fail("torch.load"))
    for path, reason in (
        *((folder / name, "a pickle, which can run code") for name in ("model.pt", "model.ckpt", "bomb.pt")),
        (folder, "no model here"),
    ):
        with pytest.raises(UndiffuseError, match=reason):
            Pipeline.load(path)
    assert not [path for path in opened if str(folder) in path]
    (whole / "model.safetensors").write_bytes(PICKLE)
    with pytest.raises(UndiffuseError, match="not a safetensors file"):
        Pipeline.load(whole)
    assert not [name for name in set(sys.modules) - before if not name.startswith("undiffuse.")]
    shutil.rmtree(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pipeline.load(pipeline().save(whole))
    assert not [name for name in set(sys.modules) - before if not name.startswith("undiffuse.")]


class Halves(nn.Module):
    """Two tensors, of which one fits."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))


def test_CK9_nothing_is_half_loaded() -> None:
    module = Halves()
    for b in (torch.ones(2), torch.tensor([1.0, 2.0, float("nan")])):
        with pytest.raises(UndiffuseError):
            load_into(module, {"a": torch.ones(2), "b": b}, "here")
        assert not module.a.any()
