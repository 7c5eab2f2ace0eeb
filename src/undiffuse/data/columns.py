"""What is known of items besides class and caption: attributes, which are categories, and numbers.

    cells, one an item        breed: manx, tabby, (nothing), manx        age: 3, 4.5, 2, (nothing)
    columns of the data set   attributes  int64 [N, K]     which of the attribute's values; nothing is their number
                              numbers     float32 [N, K]   (value - mean) / deviation; one missing: a row of NaN

The values' names, and mean and deviation, are part of the data's spec and so of a model: people ask in these words and
in their own units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from ..conditions import rows_in
from ..errors import UndiffuseError, unknown
from .spec import DataSpec
from .store import printable

TAKEN = ("classes", "text", "augmentation", "attributes", "numbers", "beside")
"""Names of conditions, which no attribute and no number can have."""


Cells = Sequence[Any] | np.ndarray
"""Of one attribute or number, one an item."""


@dataclass(frozen=True, eq=False)
class Columns:
    """``attributes`` and ``numbers`` as a spec states them; the ``values`` of each item; notes for people."""

    attributes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    numbers: tuple[tuple[str, float, float], ...] = ()
    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def names_in(text: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names in ``breed,colour`` or a list of them."""
    parts = text.split(",") if isinstance(text, str) else text or ()
    return tuple(part.strip() for part in parts if part.strip())


def check_names(attributes: Iterable[str], numbers: Iterable[str], known: Iterable[str], name: str) -> None:
    """Raise for attributes or numbers that the data do not have, and for names that mean two things."""
    known, seen = [each for each in known if each not in TAKEN], set()
    for each in (*attributes, *numbers):
        if each in TAKEN:
            raise UndiffuseError(f"{name}: {each} is the name of a condition; call the attribute something else")
        if each in seen:
            raise UndiffuseError(f"{name}: {printable(each)} is asked for twice; it is an attribute or a number")
        if each not in known:
            raise unknown(f"attribute of {name}", each, known)
        seen.add(each)


def columns(
    attributes: Mapping[str, Cells],
    numbers: Mapping[str, Cells],
    called: Callable[[int], str],
    name: str,
) -> Columns:
    """The columns of these cells, one an item; a cell that is None, NaN or empty says nothing. ``called`` names an
    item in messages."""
    listed, measured, notes = [], [], []
    chosen, scaled = [], []
    for each, cells in attributes.items():
        words = [None if _is_empty(cell) else printable(str(cell)) for cell in cells]
        known = sorted({word for word in words if word is not None})
        if not known:
            raise UndiffuseError(f"{name}: the attribute {printable(each)} is empty for every item; leave it out")
        if len(known) > max(10, len(words) // 2):
            raise UndiffuseError(
                f"{name}: {printable(each)} has {len(known)} different values in {len(words)} items: these are not "
                "categories; if they are quantities, name it among the numbers (--numbers)"
            )
        place = {value: k for k, value in enumerate(known)}
        chosen.append([len(known) if word is None else place[word] for word in words])
        listed.append((each, tuple(known)))
        if None in words:
            notes.append(f"{words.count(None)} of {len(words)} items have no {printable(each)}")
    for each, cells in numbers.items():
        row = np.array([_number(cell, each, index, called, name) for index, cell in enumerate(cells)])
        there = row[~np.isnan(row)]
        if not len(there):
            raise UndiffuseError(f"{name}: the number {printable(each)} is missing for every item; leave it out")
        mean, deviation = float(there.mean()), float(there.std())
        if deviation <= 1e-12 * abs(mean) or deviation == 0:
            notes.append(f"{printable(each)} is {mean:g} for every item; it says nothing")
            deviation = 1.0
        measured.append((each, mean, deviation))
        scaled.append((row - mean) / deviation)
    values: dict[str, np.ndarray] = {}
    if chosen:
        values["attributes"] = np.array(chosen, np.int64).T.copy()
    if scaled:
        rows = np.array(scaled, np.float32).T.copy()
        missing = np.isnan(rows).any(1)
        rows[missing] = np.nan
        values["numbers"] = rows
        if missing.any():
            notes.append(f"{missing.sum()} of {len(rows)} items lack a number; nothing is said of all their numbers")
    return Columns(tuple(listed), tuple(measured), values, tuple(notes))


def _is_empty(cell: Any) -> bool:
    return cell is None or (isinstance(cell, float) and math.isnan(cell)) or not str(cell).strip()


def _number(cell: Any, each: str, index: int, called: Callable[[int], str], name: str) -> float:
    if _is_empty(cell):
        return math.nan
    try:
        value = float(cell)
    except (TypeError, ValueError):
        value = math.inf
    if not math.isfinite(value):
        raise UndiffuseError(
            f"{name}: {called(index)}: {printable(each)} is {printable(str(cell)[:40])!r}, not a number; repair it, or "
            f"name it among the attributes (--attributes {printable(each)})"
        )
    return value


# --- Asking in people's words -----------------------------------------------------------------------------------------


def read_row(spec: DataSpec, name: str, text: str) -> list[Any] | None:
    """The rows of ``cond[name]`` that a text on the command line means: ``manx,none`` is one row of all attributes, but
    several of the attribute ``breed``. None: the spec does not know the name."""
    values = dict(spec.attributes)
    parts = [part.strip() for part in text.split(",")]
    if name == "attributes" and values:
        known: list[tuple[str, ...]] = list(values.values())
        known += [()] * (len(parts) - len(known))
        return [[_word(part, each) for part, each in zip(parts, known, strict=False)]]
    if name == "numbers" and spec.numbers:
        return [[_word(part, ()) for part in parts]]
    if name in values:
        return [text] if text in values[name] else [_word(part, values[name]) for part in parts]
    return [_word(part, ()) for part in parts] if name in [each for each, *_ in spec.numbers] else None


def _word(part: str, values: Sequence[str]) -> str | None:
    return None if part.lower() == "none" and part not in values else part


def asked(spec: DataSpec, cond: Mapping[str, Any]) -> dict[str, Any]:
    """``cond`` as the model takes it: attributes by the names of their values, numbers in their own units, and each of
    them also by its own name (``{"breed": ["manx", None], "age": 3}``), classes by name too. One row may stand without
    the list of rows. Tensors are raw values already."""
    found = dict(cond)
    for kind, parts in (("attributes", spec.attributes), ("numbers", spec.numbers)):
        names: list[str] = [name for name, *_ in parts]
        given = {name: rows_in(found.pop(name), 0) for name in names if name in found}
        if given and kind in found:
            raise UndiffuseError(f"{next(iter(given))} is given twice: by itself and among the {kind}")
        if empty := [name for name, rows in given.items() if not rows]:
            raise UndiffuseError(f"{empty[0]}: no row given; name one, or leave it out")
        if given:
            missing = [name for name in names if name not in given]
            if kind == "numbers" and missing:
                raise UndiffuseError(
                    f"the numbers {', '.join(names)} are asked for together: give {', '.join(missing)} too"
                )
            count = math.lcm(*map(len, given.values()))
            found[kind] = [[given[n][i % len(given[n])] if n in given else None for n in names] for i in range(count)]
        if parts and kind in found and not isinstance(found[kind], Tensor):
            found[kind] = [None if row is None else _raw(spec, kind, row) for row in rows_in(found[kind], 1)]
    if "classes" in found and not isinstance(found["classes"], Tensor):
        found["classes"] = [_class(each, spec.classes) for each in rows_in(found["classes"], 0)]
    return found


def _class(each: Any, names: Sequence[str]) -> Any:
    if not isinstance(each, str):
        return each
    if each not in names:
        raise unknown("class", each, names)
    return names.index(each)


def _raw(spec: DataSpec, kind: str, row: Any) -> list[Any]:
    parts = spec.attributes if kind == "attributes" else spec.numbers
    if not isinstance(row, (list, tuple, np.ndarray)) or len(row) != len(parts):
        names = ", ".join(name for name, *_ in parts)
        raise UndiffuseError(f"condition {kind}: a row has {len(parts)} values ({names}), got {row!r}")
    if all(each is None for each in row):
        return [None] * len(parts)
    result: list[Any] = []
    for k, each in enumerate(row):
        if each is None and kind == "attributes":
            result.append(None)
        elif kind == "attributes":
            name, values = spec.attributes[k]
            if str(each) not in values:
                raise unknown(name, each, values)
            result.append(values.index(str(each)))
        else:
            name, mean, deviation = spec.numbers[k]
            try:
                value = math.nan if isinstance(each, bool) else float(each)
            except (TypeError, ValueError, OverflowError):
                value = math.nan
            if not math.isfinite(value):
                raise UndiffuseError(
                    f"{name}={each!r} must be a number (around {mean:.4g}, give or take {deviation:.2g})"
                )
            result.append((value - mean) / deviation)
    return result


def in_words(spec: DataSpec, values: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
    """Raw rows ``[R, K]`` as people ask for them (:func:`asked`), R of each attribute and number; None: nothing is
    said."""
    found: dict[str, list[Any]] = {}
    if "attributes" in values:
        for (name, known), column in zip(spec.attributes, values["attributes"].T, strict=True):
            found[name] = [None if k == len(known) else known[k] for k in column]
    if "numbers" in values:
        for (name, mean, deviation), column in zip(spec.numbers, values["numbers"].T.astype(float), strict=True):
            found[name] = [None if np.isnan(v) else float(f"{v * deviation + mean:.6g}") for v in column]
    return found


def translated(values: Mapping[str, np.ndarray], data: DataSpec, model: DataSpec) -> dict[str, np.ndarray]:
    """The columns of ``data`` as a model of another spec takes them; those that it does not know, or that the data do
    not have, are left out."""
    found: dict[str, np.ndarray] = {}
    names, given = [name for name, _ in data.attributes], values.get("attributes")
    if model.attributes and given is not None:
        column = np.empty((len(given), len(model.attributes)), np.int64)
        for k, (name, known) in enumerate(model.attributes):
            column[:, k] = len(known)
            if name in names:
                have = data.attributes[names.index(name)][1]
                places = np.array([known.index(v) if v in known else len(known) for v in (*have, None)])
                column[:, k] = places[given[:, names.index(name)]]
        found["attributes"] = column
    if model.beside is not None and model.beside == data.beside:
        found["beside"] = values["beside"]
    numbers, given = [name for name, *_ in data.numbers], values.get("numbers")
    if model.numbers and given is not None and {name for name, *_ in model.numbers} <= set(numbers):
        rows = []
        for name, mean, deviation in model.numbers:
            _, mine, spread = data.numbers[numbers.index(name)]
            rows.append((given[:, numbers.index(name)] * spread + mine - mean) / deviation)
        found["numbers"] = np.stack(rows, 1).astype(np.float32)
    return found
