"""The configuration: a round trip is the identity, and nothing is accepted that was not written down."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from undiffuse.config import from_json, load_json, override, to_json, write_bytes_atomic, write_json_atomic
from undiffuse.errors import UndiffuseError


class Shape(ABC):  # noqa: B024
    """Stands for Schedule, Solver and the other abstract chapters."""


@dataclass(frozen=True)
class Circle(Shape):
    radius: float = 1.0


@dataclass(frozen=True)
class Box(Shape):
    width: float
    height: float = 2.0


@dataclass(frozen=True)
class Doubled(Shape):
    shape: Shape


SHAPES: dict[str, Shape] = {
    "circle": Circle(),
    "big_circle": Circle(9.0),
    "box": Box(4.0),
    "doubled": Doubled(Circle()),
}
REGISTRIES: Mapping[type, Mapping[str, Any]] = {Shape: SHAPES}


@dataclass(frozen=True)
class Optimiser:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    kind: Literal["adamw", "sgd"] = "adamw"

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise UndiffuseError(f"lr must be positive, got {self.lr}")


@dataclass(frozen=True)
class Recipe:
    steps: int
    name: str = "tiny"
    flip: bool = False
    widths: tuple[int, ...] = (16, 32)
    limit: int | None = None
    label: str | None = None
    scale: int | float = 1
    rank: Literal[1, 2, 3] = 2
    folder: Path | None = None
    extra: dict[str, int | str | list[int]] = field(default_factory=dict)
    between: tuple[float, float] | None = None
    optimiser: Optimiser = Optimiser()
    shape: Shape = Circle()
    other: Shape | None = None


def load(data: dict[str, Any]) -> Recipe:
    return from_json(Recipe, {"steps": 8} | data, registries=REGISTRIES)


def change(*texts: str) -> Recipe:
    return override(Recipe(8), texts, REGISTRIES)


# --- round trips ------------------------------------------------------------------------------------------------------

finite = st.floats(allow_nan=False, allow_infinity=False)
shapes = st.recursive(
    st.one_of(st.builds(Circle, finite), st.builds(Box, finite, finite)), lambda inner: st.builds(Doubled, inner)
)
recipes = st.builds(
    Recipe,
    steps=st.integers(-(10**12), 10**12),
    name=st.text(),
    flip=st.booleans(),
    widths=st.lists(st.integers()).map(tuple),
    limit=st.none() | st.integers(),
    label=st.none() | st.text(),
    scale=st.integers() | finite,
    folder=st.none() | st.sampled_from([Path("runs"), Path("a/b c")]),
    extra=st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.integers())),
    optimiser=st.builds(Optimiser, st.floats(1e-9, 1), st.tuples(finite, finite), st.sampled_from(["adamw", "sgd"])),
    shape=shapes,
    other=st.none() | shapes,
)


@given(recipes)
@settings(max_examples=100, deadline=None)
def test_through_json_text_and_back_is_the_identity(recipe: Recipe) -> None:
    text = json.dumps(to_json(recipe, REGISTRIES), allow_nan=False)
    again = from_json(Recipe, json.loads(text), registries=REGISTRIES)
    assert again == recipe
    assert type(again.scale) is type(recipe.scale)


def test_polymorphic_fields_carry_their_kind() -> None:
    stored = to_json(Recipe(8, shape=Doubled(Box(3.0))), REGISTRIES)
    assert stored["shape"] == {"kind": "doubled", "shape": {"kind": "box", "width": 3.0, "height": 2.0}}
    assert to_json(Recipe(8, shape=Circle(9.0)), REGISTRIES)["shape"]["kind"] == "big_circle"


def test_missing_keys_take_defaults_where_there_are_defaults() -> None:
    assert load({}) == Recipe(8)
    assert load({"shape": {"kind": "box", "width": 5}}).shape == Box(5.0)
    assert load({"shape": {"kind": "big_circle"}}).shape == Circle(9.0)
    assert load({"shape": {"kind": "circle"}}).shape == Circle(1.0)
    with pytest.raises(UndiffuseError, match=r"config\.json: steps: is missing"):
        from_json(Recipe, {}, registries=REGISTRIES)
    # Box(4.0) is in the registry, but a file that leaves the width open does not mean 4.
    with pytest.raises(UndiffuseError, match=r"config\.json: shape\.width: is missing"):
        load({"shape": {"kind": "box"}})


def test_what_json_cannot_hold_is_refused() -> None:
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UndiffuseError, match=r"Recipe\.shape\.radius"):
            to_json(Recipe(8, shape=Circle(bad)), REGISTRIES)

    @dataclass(frozen=True)
    class Stranger(Shape):
        pass

    with pytest.raises(UndiffuseError, match="in no registry"):
        to_json(Recipe(8, shape=Stranger()), REGISTRIES)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"stesp": 3}, r"unknown name 'stesp': did you mean 'steps'"),
        ({"optimiser": {"lrr": 1.0}}, r"unknown name 'optimiser\.lrr': did you mean 'optimiser\.lr'"),
        ({"steps": "8"}, r'steps: must be a whole number, not "8"'),
        ({"steps": True}, r"steps: must be a whole number, not true"),
        ({"steps": 8.0}, r"steps: must be a whole number, not 8\.0"),
        ({"steps": None}, r"steps: must be a whole number, not null"),
        ({"flip": 1}, r"flip: must be true or false, not 1"),
        ({"name": 1}, r"name: must be text, not 1"),
        ({"optimiser": {"lr": "1e-3"}}, r"optimiser\.lr: must be a number"),
        ({"optimiser": {"lr": True}}, r"optimiser\.lr: must be a number"),
        ({"optimiser": {"lr": float("nan")}}, r"optimiser\.lr: must be finite"),
        ({"optimiser": {"lr": 10**400}}, r"optimiser\.lr: must be a number"),
        ({"optimiser": {"lr": -1.0}}, r"optimiser: lr must be positive, got -1\.0"),
        ({"optimiser": {"betas": [0.9]}}, r"optimiser\.betas: must hold 2 values, not 1"),
        ({"optimiser": {"kind": "adam"}}, r"optimiser\.kind: must be 'adamw' or 'sgd'"),
        ({"rank": True}, r"rank: must be 1 or 2 or 3, not true"),
        ({"rank": 1.0}, r"rank: must be 1 or 2 or 3, not 1\.0"),
        ({"optimiser": 3}, r"optimiser: must be an object"),
        ({"widths": 3}, r"widths: must be a list"),
        ({"widths": [1, "2"]}, r"widths\[1\]: must be a whole number"),
        ({"limit": "x"}, r"limit: must be a whole number"),
        ({"extra": []}, r"extra: must be an object"),
        ({"extra": {"a": {}}}, r"extra\.a: must be"),
        ({"shape": {"kind": "cirle"}}, r"shape: unknown kind 'cirle': did you mean 'circle'"),
        ({"shape": {"radius": 3}}, r'shape: must be an object with a "kind"'),
        ({"shape": "circle"}, r'shape: must be an object with a "kind"'),
        ({"shape": {"kind": ["circle", "x"]}}, r'shape: must be an object with a "kind"'),
        ({"shape": {"kind": "circle", "_target_": "os.system"}}, r"unknown name 'shape\._target_'"),
    ],
)
def test_wrong_values_are_one_line_with_the_place(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UndiffuseError, match=rf"^config\.json: .*{message}") as caught:
        load(data)
    assert "\n" not in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["kind", "steps", "lr", "shape", "x"]), inner),
)


@given(st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(Recipe)] + ["x"]), json_values))
@settings(max_examples=200, deadline=None)
def test_any_json_is_a_recipe_or_one_error(data: dict[str, Any]) -> None:
    try:
        assert isinstance(from_json(Recipe, data, registries=REGISTRIES), Recipe)
    except UndiffuseError as error:
        assert "\n" not in str(error)  # noqa: PT017


# --- override ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps=12", Recipe(12)),
        ("name=a=b", Recipe(8, name="a=b")),
        ("flip=true", Recipe(8, flip=True)),
        ("widths=1,2,3", Recipe(8, widths=(1, 2, 3))),
        ("widths=[4, 5]", Recipe(8, widths=(4, 5))),
        ("widths=7", Recipe(8, widths=(7,))),
        ("widths=", Recipe(8, widths=())),
        ("limit=5", Recipe(8, limit=5)),
        ("limit=none", Recipe(8, limit=None)),
        ("label=none", Recipe(8, label=None)),
        ("label=3", Recipe(8, label="3")),
        ("label=[3", Recipe(8, label="[3")),
        ("scale=0.5", Recipe(8, scale=0.5)),
        ("rank=3", Recipe(8, rank=3)),
        ("folder=runs/x", Recipe(8, folder=Path("runs/x"))),
        ("extra.key=3", Recipe(8, extra={"key": 3})),
        ('extra={"a": [1]}', Recipe(8, extra={"a": [1]})),
        ("optimiser.lr=-0.0", None),
        ("optimiser.lr=3e-4", Recipe(8, optimiser=Optimiser(lr=3e-4))),
        ("optimiser.betas=0.5,0.6", Recipe(8, optimiser=Optimiser(betas=(0.5, 0.6)))),
        ("between=0.25,2", Recipe(8, between=(0.25, 2.0))),
        ("between=none", Recipe(8)),
        ("optimiser.kind=sgd", Recipe(8, optimiser=Optimiser(kind="sgd"))),
        ("shape=big_circle", Recipe(8, shape=Circle(9.0))),
        ("other=circle", Recipe(8, other=Circle())),
        ("other=none", Recipe(8, other=None)),
        ('shape={"kind": "box", "width": 1}', Recipe(8, shape=Box(1.0))),
        ("shape.radius=7", Recipe(8, shape=Circle(7.0))),
    ],
)
def test_override_reads_by_type(text: str, expected: Recipe | None) -> None:
    before = Recipe(8)
    if expected is None:
        with pytest.raises(UndiffuseError, match="must be positive"):
            override(before, [text], REGISTRIES)
        return
    assert override(before, [text], REGISTRIES) == expected
    assert before == Recipe(8)


def test_override_applies_in_order() -> None:
    assert change("shape=box", "shape.width=3", "steps=1", "steps=2") == Recipe(2, shape=Box(3.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps", "write it as path.to.field=value"),
        ("=3", "write it as path.to.field=value"),
        ("stesp=3", "unknown name 'stesp': did you mean 'steps'"),
        ("optimiser.bets=1,2", "unknown name 'optimiser.bets': did you mean 'optimiser.betas'"),
        ("optimiser.lr.x=3", "optimiser.lr: has no fields"),
        ("steps=8.5", "steps: must be a whole number, not '8.5'"),
        ("steps=true", "steps: must be a whole number"),
        ("flip=yes", "flip: must be true or false"),
        ("optimiser.lr=nan", "optimiser.lr: must be a number, not 'nan'"),
        ("optimiser.lr=1e999", "optimiser.lr: must be a number"),
        ("optimiser.lr=-1", "optimiser.lr: lr must be positive"),
        ("optimiser.kind=adam", "must be 'adamw' or 'sgd', not 'adam'"),
        ("shape=cirle", "unknown kind 'cirle': did you mean 'circle'"),
        ('shape={"kind": "box"}', "shape.width: is missing"),
        ("widths=[1,", "not JSON"),
        ("widths=1,x", r"widths[1]: must be a whole number, not 'x'"),
    ],
)
def test_override_refuses_with_the_whole_path(text: str, message: str) -> None:
    with pytest.raises(UndiffuseError) as caught:
        change(text)
    assert message in str(caught.value)
    assert str(caught.value).startswith("--set")
    assert "\n" not in str(caught.value)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"{", "not JSON"),
        (b'{"a": NaN}', "NaN is not a finite number"),
        (b'{"a": -Infinity}', "-Infinity is not a finite number"),
        (b'{"a": 1e999}', "1e999 is not a finite number"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands there twice"),
        (b"[" * 100_000, "levels deep"),
        (b"[" * 70 + b"]" * 70, "levels deep"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b'"' + b"x" * 10_000_001 + b'"', "larger than 10 MB"),
    ],
)
def test_bad_files_are_one_line_that_names_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UndiffuseError) as caught:
        load_json(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UndiffuseError, match="no such file"):
        load_json(tmp_path / "absent.json")
    with pytest.raises(UndiffuseError, match="cannot be read"):
        load_json(tmp_path)


def test_a_byte_order_mark_is_fine(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert load_json(tmp_path / "a.json") == {"a": 1}


@given(st.binary(max_size=200) | st.text(alphabet='{}[]":,0123456789.eE-+ntf\\u', max_size=60).map(str.encode))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_value_or_one_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    path.write_bytes(content)
    try:
        load_json(path)
    except UndiffuseError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_atomic_write_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json_atomic(path, {"a": 1})
    write_json_atomic(path, {"a": 2, "text": "é\ud800"})
    assert load_json(path) == {"a": 2, "text": "é\ud800"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "a.bin"
    write_bytes_atomic(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_the_bytes_reach_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (calls.append("rename"), replace(self, to))[1])
    write_bytes_atomic(tmp_path / "a", b"x")
    assert calls == ["fsync", "rename", "fsync"]


def test_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UndiffuseError, match="not written"):
        write_json_atomic(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []
