"""Configuration: frozen dataclasses to JSON and back, strictly.

A configuration is a tree of frozen dataclasses. The type hints are the schema: nothing is guessed, an unknown name is
refused with the nearest one suggested, and every message says where it happened (``config.json: recipe.optimiser.lr``).

A field whose type is abstract, such as ``schedule: Schedule``, is stored as ``{"kind": "cosine", ...its fields}``. The
names come from the chapter's own registry, handed in as ``registries={Schedule: SCHEDULES}``: a dict of name to default
instance. The kind in the file is the name of that instance's type, and a field absent from the file has its value.

Files are written atomically, so a reader sees the old content or the new one and never half of either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union
from uuid import uuid4

from .errors import UndiffuseError, unknown

C = TypeVar("C")
Registries = Mapping[type, Mapping[str, Any]]

LARGEST_FILE = 10_000_000  # bytes; a configuration is a few thousand
DEEPEST = 64  # nested lists and objects; a configuration has about five


# --- dataclasses <-> JSON values --------------------------------------------------------------------------------------


def to_json(config: Any, registries: Registries | None = None) -> dict[str, Any]:
    """The JSON object of a dataclass: plain dicts, lists, numbers, strings and None.

    Raises :class:`UndiffuseError` for a number that JSON cannot hold (NaN, infinity) and for a value whose type is in
    none of the ``registries`` while its field's type asks for one.
    """
    value = _encode(type(config), config, registries or {}, type(config).__name__)
    return typing.cast(dict[str, Any], value)


def from_json(cls: type[C], data: object, where: str = "config.json", registries: Registries | None = None) -> C:
    """The dataclass ``cls`` that ``data`` describes: the inverse of :func:`to_json`.

    ``where`` names the source in error messages. Refused: an unknown key, a missing key without a default, a value of
    another type (``"8"``, ``8.0`` or ``true`` for an int), a number that is not finite.
    """
    return _decode(cls, data, registries or {}, _Place(where, ""), _json_leaf)


def override(config: C, settings: Iterable[str], registries: Registries | None = None, where: str = "--set") -> C:
    """A copy of ``config`` with each ``path.to.field=value`` applied, in order.

    The value is read by the field's type: ``true`` or ``false``; a number; ``none`` where None is allowed; text as it
    stands; ``1,2,4`` or ``[1, 2, 4]`` for a tuple; a registered name, as in ``schedule=cosine``, or a JSON object for a
    dataclass. A dict field takes ``path.to.dict.key=value``.
    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path.strip():
            raise UndiffuseError(f"{where} {setting!r}: write it as path.to.field=value")
        config = _replace(type(config), config, path.strip().split("."), text, registries or {}, _Place(where, ""))
    return config


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where in which source a value stands, for messages."""

    source: str
    path: str

    def __truediv__(self, name: str | int) -> _Place:
        step = f"[{name}]" if isinstance(name, int) else f".{name}" if self.path else name
        return _Place(self.source, self.path + step)

    def error(self, message: str) -> UndiffuseError:
        return UndiffuseError(f"{self.source}: {self.path or 'the whole'}: {message}")

    def unknown(self, name: str, choices: Iterable[str]) -> UndiffuseError:
        choices = list(choices)
        near = get_close_matches(name, choices, n=1)
        # The whole path in the suggestion, so that it can be copied.
        hint = f"did you mean {(self / near[0]).path!r}? " if near else ""
        names = ", ".join(choices) or "nothing"
        return UndiffuseError(f"{self.source}: unknown name {(self / name).path!r}: {hint}(choose from: {names})")


_Leaf = Callable[[Any, Any, _Place], Any]


@cache
def _fields(cls: type) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    return {field.name: (field, hints[field.name]) for field in dataclasses.fields(cls) if field.init}


def _registry(hint: Any, registries: Registries) -> Mapping[str, Any] | None:
    return registries.get(hint) if isinstance(hint, type) else None


def _members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union; a type that is no union is its own only alternative."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _describe(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "none"}
    if hint in names:
        return names[hint]
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(value) for value in typing.get_args(hint))
    if typing.get_origin(hint) in (tuple, list):
        return "a list"
    if len(_members(hint)) > 1:
        return " or ".join(_describe(member) for member in _members(hint))
    return "an object" if typing.get_origin(hint) is dict or dataclasses.is_dataclass(hint) else str(hint)


def _encode(hint: Any, value: Any, registries: Registries, path: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        registry = next((r for member in _members(hint) if (r := _registry(member, registries)) is not None), None)
        encoded: dict[str, Any] = {}
        if registry is not None:
            kinds = [name for name, instance in registry.items() if type(instance) is type(value)]
            if not kinds:
                raise UndiffuseError(f"{path}: {type(value).__name__} is in no registry, so a file cannot name it")
            encoded["kind"] = next((name for name in kinds if registry[name] == value), kinds[0])
        for name, (_, field_hint) in _fields(type(value)).items():
            encoded[name] = _encode(field_hint, getattr(value, name), registries, f"{path}.{name}")
        return encoded
    if isinstance(value, Mapping):
        return {str(key): _encode(Any, item, registries, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        inner = typing.get_args(hint)
        return [_encode(inner[0] if inner else Any, item, registries, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise UndiffuseError(f"{path}: {value} cannot be stored: a file holds finite numbers only")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UndiffuseError(f"{path}: a {type(value).__name__} cannot be stored in JSON")


def _decode(hint: Any, data: Any, registries: Registries, place: _Place, leaf: _Leaf) -> Any:
    registry = _registry(hint, registries)
    if registry is not None:
        return _decode_kind(registry, data, registries, place, leaf)
    if dataclasses.is_dataclass(hint):
        return _decode_dataclass(typing.cast(type, hint), {}, data, registries, place)
    members, origin, inner = _members(hint), typing.get_origin(hint), typing.get_args(hint)
    if len(members) > 1:
        return _decode_union(members, data, registries, place, leaf)
    if origin in (tuple, list):
        if not isinstance(data, list):
            raise place.error(f"must be a list, not {_shown(data)}")
        if origin is list or inner[-1] is Ellipsis:
            inner = (inner[0],) * len(data)
        if len(data) != len(inner):
            raise place.error(f"must hold {len(inner)} values, not {len(data)}")
        items = (
            _decode(t, item, registries, place / i, leaf) for i, (t, item) in enumerate(zip(inner, data, strict=True))
        )
        return origin(items)
    if origin is dict:
        if not isinstance(data, dict):
            raise place.error(f"must be an object, not {_shown(data)}")
        return {key: _decode(inner[1], item, registries, place / key, leaf) for key, item in data.items()}
    return leaf(hint, data, place)


def _decode_union(members: tuple[Any, ...], data: Any, registries: Registries, place: _Place, leaf: _Leaf) -> Any:
    errors = []
    # The narrow before the wide: "none" for `str | None` is None, 3 for `float | int` stays whole.
    for member in sorted(members, key=lambda m: {type(None): 0, float: 2, str: 3}.get(m, 1)):
        try:
            return _decode(member, data, registries, place, leaf)
        except UndiffuseError as error:
            errors.append((member, error))
    real = [error for member, error in errors if member is not type(None)]
    if len(real) == 1 and data is not None:
        raise real[0]
    raise place.error(f"must be {' or '.join(_describe(member) for member in members)}, not {_shown(data)}")


def _decode_kind(registry: Mapping[str, Any], data: Any, registries: Registries, place: _Place, leaf: _Leaf) -> Any:
    named = data if leaf is _text_leaf else data.get("kind") if isinstance(data, dict) else None
    if not isinstance(named, str):
        raise place.error(f'must be an object with a "kind" (one of: {", ".join(registry)}), not {_shown(data)}')
    if named not in registry:
        raise place.error(str(unknown("kind", named, registry)))
    default = registry[named]
    if leaf is _text_leaf:
        return default
    given = {key: item for key, item in data.items() if key != "kind"}
    # What a class leaves open (the inner schedule of a wrapper) a file must say; only the rest may be absent.
    known = {name: getattr(default, name) for name, (field, _) in _fields(type(default)).items() if not _bare(field)}
    return _decode_dataclass(type(default), known, given, registries, place)


def _decode_dataclass(cls: type, known: dict[str, Any], data: Any, registries: Registries, place: _Place) -> Any:
    """``cls`` from ``data``; a field absent there is taken from ``known``, else from the dataclass's own default."""
    if not isinstance(data, dict):
        raise place.error(f"must be an object, not {_shown(data)}")
    fields = _fields(cls)
    values = dict(known)
    for key, item in data.items():
        if key not in fields:
            raise place.unknown(key, fields)
        values[key] = _decode(fields[key][1], item, registries, place / key, _json_leaf)
    for name, (field, _) in fields.items():
        if name not in values and _bare(field):
            raise (place / name).error("is missing, and has no default")
    return _build(lambda: cls(**values), place)


def _bare(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _build(make: Callable[[], Any], place: _Place) -> Any:
    """``make()``, with the place put before what the dataclass itself objects to."""
    try:
        return make()
    except UndiffuseError as error:
        raise place.error(str(error)) from None


def _replace(hint: Any, value: Any, names: list[str], text: str, registries: Registries, place: _Place) -> Any:
    if not names:
        return _from_text(hint, text, registries, place)
    name, *rest = names
    if isinstance(value, dict):
        inner = next((typing.get_args(m) for m in _members(hint) if typing.get_origin(m) is dict), (str, Any))
        return {**value, name: _replace(inner[1], value.get(name), rest, text, registries, place / name)}
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        raise place.error(f"has no fields, so {'.'.join(names)!r} cannot be set in it")
    fields = _fields(type(value))
    if name not in fields:
        raise place.unknown(name, fields)
    new = _replace(fields[name][1], getattr(value, name), rest, text, registries, place / name)
    return _build(lambda: dataclasses.replace(value, **{name: new}), place / name)


def _from_text(hint: Any, text: str, registries: Registries, place: _Place) -> Any:
    """The value of a field from the command line: JSON where the text looks like it, else the field's own reading."""
    members = [member for member in _members(hint) if member is not type(None)]
    if text.lstrip()[:1] in ("{", "[") and members != [str]:
        return _decode(hint, parse_json(text, f"{place.source}: {place.path}"), registries, place, _json_leaf)
    empty = text.strip().lower() == "none" and type(None) in _members(hint)
    if all(typing.get_origin(member) in (tuple, list) for member in members) and not empty:
        parts = [part.strip() for part in text.split(",")] if text.strip() else []
        return _decode(hint, parts, registries, place, _text_leaf)
    return _decode(hint, text, registries, place, _text_leaf)


def _json_leaf(hint: Any, data: Any, place: _Place) -> Any:
    if hint is Any or hint is object:
        return data
    if typing.get_origin(hint) is Literal:
        # 1 == True in Python, so the type is compared too.
        if any(data == value and type(data) is type(value) for value in typing.get_args(hint)):
            return data
    elif hint is float and type(data) in (int, float):
        with contextlib.suppress(OverflowError):  # a whole number of hundreds of digits
            return _finite(float(data), place)
    elif hint is Path and isinstance(data, str):
        return Path(data)
    elif hint in (bool, int, str, type(None)) and type(data) is hint:
        return data
    raise place.error(f"must be {_describe(hint)}, not {_shown(data)}")


def _text_leaf(hint: Any, text: Any, place: _Place) -> Any:
    if isinstance(text, list):  # of an optional list, none is tried first
        raise place.error(f"must be {_describe(hint)}, not {_shown(text)}")
    text = text.strip()
    words = {"true": True, "false": False} if hint is bool else {"none": None} if hint is type(None) else {}
    if text.lower() in words:
        return words[text.lower()]
    if hint is int or hint is float:
        with contextlib.suppress(ValueError):
            number = hint(text)
            if math.isfinite(number):
                return number
    if hint is Any or hint is object:
        return _free(text)
    if typing.get_origin(hint) is Literal:
        found = [value for value in typing.get_args(hint) if str(value).lower() == text.lower()]
        if found:
            return found[0]
    if hint is str or hint is Path:
        return hint(text)
    raise place.error(f"must be {_describe(hint)}, not {text!r}")


def _free(text: str) -> Any:
    """Untyped text: what JSON makes of it, else the text itself."""
    try:
        return parse_json(text, "value")
    except UndiffuseError:
        return text


def _finite(number: float, place: _Place) -> float:
    if not math.isfinite(number):
        raise place.error(f"must be finite, not {number}")
    return number


def _shown(data: object) -> str:
    text = json.dumps(data, default=str)
    return text if len(text) <= 40 else f"{text[:36]} ..."


# --- files ------------------------------------------------------------------------------------------------------------


def load_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file; refuses what the format leaves open, in one line that names the file.

    Refused: duplicate keys, NaN and infinity (also as 1e999), text that is not UTF-8 (a byte-order mark is allowed),
    more than 10 MB, more than 64 levels of nesting.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise UndiffuseError(f"{path}: no such file") from None
    except OSError as error:
        raise UndiffuseError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > LARGEST_FILE:
        raise UndiffuseError(f"{path}: larger than {LARGEST_FILE // 1_000_000} MB, so it is not one of our JSON files")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UndiffuseError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    if not text.strip():
        raise UndiffuseError(f"{path}: empty")
    return parse_json(text, str(path))


def parse_json(text: str, where: str) -> Any:
    """JSON, strictly: a key that stands there twice, a number that is not finite and deep nesting are refused."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(items)
        if len(table) < len(items):
            names = [name for name, _ in items]
            twice = next(name for name in names if names.count(name) > 1)
            raise UndiffuseError(f"{where}: the key {twice!r} stands there twice; keep one")
        return table

    def number(literal: str) -> float:
        value = float(literal)
        if not math.isfinite(value):
            raise UndiffuseError(f"{where}: {literal} is not a finite number")
        return value

    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=number, parse_float=number)
    except UndiffuseError:
        raise
    except json.JSONDecodeError as error:
        raise UndiffuseError(f"{where}: not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise UndiffuseError(f"{where}: nested more than {DEEPEST} levels deep") from None
    except ValueError as error:  # a whole number of thousands of digits
        raise UndiffuseError(f"{where}: {error}") from None
    if any(depth > DEEPEST for depth in _depths(value)):
        raise UndiffuseError(f"{where}: nested more than {DEEPEST} levels deep")
    return value


def _depths(value: Any) -> Iterator[int]:
    """How deep each level of nesting is, without recursion."""
    level, depth = [value], 0
    while level:
        yield depth
        inner = [item for item in level if isinstance(item, (dict, list))]
        level = [child for item in inner for child in (item.values() if isinstance(item, dict) else item)]
        depth += 1


def write_json_atomic(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON, atomically (see :func:`write_bytes_atomic`); NaN and infinity are refused."""
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except ValueError as error:
        raise UndiffuseError(f"{path}: not written: {error}") from None
    write_bytes_atomic(path, (text + "\n").encode())


def write_bytes_atomic(path: str | os.PathLike[str], *content: bytes | memoryview) -> None:
    """Replace the file by ``content``, in one or more pieces, so that a reader, or a crash at any moment, finds the old
    file or the new one.

    A temporary file in the same folder, flushed to the disk, then renamed, then the folder flushed. When any of it
    fails (a full disk) the old file stands and the temporary one is removed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("xb") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Flush a folder's list of names, which makes a rename in it survive a power cut. Windows has no such call."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
