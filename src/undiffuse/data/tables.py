"""Tables: a ``.csv`` file, with commas, semicolons or tabs.

    with a line of names    each row is a point, each column a coordinate of that name; one may be the classes, others
                            attributes or numbers that are known of it
    without                 each row is a series of one channel

Every cell of a coordinate must be a number: text, empty cells, NaN and infinity are refused with their line and column.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import TextIO

import numpy as np

from ..errors import UndiffuseError, unknown
from .arrays import from_array
from .base import ArrayDataset, digest
from .columns import check_names
from .store import printable

MAX_CELL = 1000


def open_table(
    path: Path, *, labels: str | None = None, attributes: Sequence[str] = (), numbers: Sequence[str] = ()
) -> ArrayDataset:
    """The data set in a ``.csv`` file. ``labels`` names the column that is the classes, ``attributes`` and ``numbers``
    those that say more of a point."""
    aside = ([] if labels is None else [labels], attributes, numbers)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            names, rows, cells, whole = _parse(file, str(path), *aside)
    except UnicodeDecodeError:
        raise UndiffuseError(f"{path}: not UTF-8 text; save it as CSV in UTF-8") from None
    except (OSError, csv.Error) as error:
        raise UndiffuseError(f"{path}: cannot be read ({error}); save it again as CSV") from None
    values = rows.astype(np.int64) if whole else rows
    if names:
        data = from_array(
            values,
            None if labels is None else np.asarray(cells[labels]),
            attributes={name: cells[name] for name in attributes},
            numbers={name: cells[name] for name in numbers},
            name=str(path),
        )
        data.spec = replace(data.spec, names=names)
        data.fingerprint = digest(data.fingerprint, *names)
        return data
    return from_array(values, channels=1, name=str(path))


def _parse(
    file: TextIO, name: str, labels: Sequence[str], attributes: Sequence[str], numbers: Sequence[str]
) -> tuple[tuple[str, ...], np.ndarray, dict[str, list[str]], bool]:
    """The names of the columns (none: they are series), the coordinates ``[N, D]``, the cells of the columns that are
    none, whether all coordinates are whole."""
    lines = _lines(file, name)
    number, first = next(lines, (0, []))
    if not first:
        raise UndiffuseError(f"{name}: the file is empty; give it a line of names and rows of numbers")
    named = any(_number(cell) is None for cell in first)
    columns = tuple(printable(cell.strip()) for cell in first) if named else ()
    if named and (len(set(columns)) < len(columns) or "" in columns):
        raise UndiffuseError(f"{name}: two columns have the same name, or one has none; name each")
    if labels and labels[0] not in columns:
        raise unknown("column for labels", labels[0], columns)
    check_names(attributes, numbers, columns, name)
    aside: dict[str, list[str]] = {each: [] for each in (*labels, *attributes, *numbers)}
    others = [columns.index(each) for each in aside]
    width, whole = len(first), True
    rows: list[list[float]] = []

    def take(number: int, cells: list[str]) -> None:
        nonlocal whole
        if len(cells) != width:
            raise UndiffuseError(f"{name}, line {number}: {len(cells)} cells, but {width} in the first line")
        row = []
        for index, cell in enumerate(cells):
            if index in others:
                aside[columns[index]].append(cell.strip())
                continue
            value = _number(cell)
            if value is None or not isfinite(value):
                where = f"column {columns[index]!r}" if columns else f"cell {index + 1}"
                remedy = f", or make it the classes (--labels {columns[index]})" if columns and cell.strip() else ""
                shown = printable(cell[:20]) or "nothing"
                raise UndiffuseError(
                    f"{name}, line {number}: {where} holds {shown!r}, not a number: repair it or leave the column "
                    f"out{remedy}"
                )
            whole = whole and value.is_integer() and abs(value) < 2**53
            row.append(value)
        rows.append(row)

    if not named:
        take(number, first)
    for number, cells in lines:
        take(number, cells)
    if not rows:
        raise UndiffuseError(f"{name}: names but no rows of numbers")
    if not rows[0]:
        raise UndiffuseError(f"{name}: no column is left to be a coordinate of the points")
    return tuple(each for index, each in enumerate(columns) if index not in others), np.array(rows), aside, whole


def _lines(file: TextIO, name: str) -> Iterator[tuple[int, list[str]]]:
    """``(line number, cells)`` of every line that is not empty."""
    begins = file.readline(1_000_000)
    delimiter = max(",;\t", key=re.sub('"[^"]*"', "", begins).count)
    file.seek(0)
    reader = csv.reader(file, delimiter=delimiter)
    for cells in reader:
        if cells and (len(cells) > 1 or cells[0].strip()):
            if any(len(cell) > MAX_CELL for cell in cells):
                raise UndiffuseError(f"{name}, line {reader.line_num}: a cell of more than {MAX_CELL} characters")
            yield reader.line_num, cells


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def write_table(names: tuple[str, ...], values: np.ndarray) -> bytes:
    """Points ``[N, D]`` (or ``[N]``) in original units as CSV: every number as short as it can be read back exactly."""
    table = values.reshape(len(values), -1)
    names = names or tuple(f"x{index}" for index in range(table.shape[1]))
    quoted = [f'"{each.replace(chr(34), chr(34) * 2)}"' if set(each) & set(',;"\t') else each for each in names]
    return "\n".join([",".join(quoted), *(",".join(map(str, row)) for row in table), ""]).encode()
