"""What is said about files: captions and attributes, in ``metadata.jsonl`` or in files beside them.

    metadata.jsonl     a line a file: {"file_name": "a/1.png", "text": "a red cat", "breed": "manx"}
    1.txt  1.cls  1.json     beside 1.png, as webdataset has it: a caption, a class, attributes (and a caption)

A caption is ``text`` or ``caption``; every other plain value is an attribute, of which one may become the classes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import UndiffuseError
from .store import BadFile, File, Store, printable

METADATA = "metadata.jsonl"
BESIDE = frozenset(("txt", "cls", "json"))
MAX_TEXT = 1_000_000
CAPTIONS = ("text", "caption")
LABELS = ("label", "class")


@dataclass
class Metadata:
    """Captions and attributes by the path of the file; ``notes`` for people; ``classes`` in their own order,
    where the source declares them."""

    texts: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    classes: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Every attribute that some file has."""
        return sorted({name for values in self.attributes.values() for name in values})

    def add(self, path: str, values: Mapping[str, Any]) -> None:
        """What one JSON object says about ``path``."""
        for name, value in values.items():
            if name in CAPTIONS and isinstance(value, str):
                self.texts[path] = value.strip()
            elif value != value:  # NaN, which says nothing
                continue
            elif isinstance(value, (str, int, float, bool)) and name not in (*CAPTIONS, "file_name"):
                self.attributes.setdefault(path, {})[name] = str(value)


def read_metadata(store: Store, paths: Sequence[str]) -> Metadata:
    """What the store says about the files ``paths``. A line that cannot be understood is refused, with its number."""
    found, known = Metadata(), set(paths)
    stems = {os.path.splitext(path)[0]: path for path in paths}
    unknown = 0
    for file, reason in store.listing:
        if file.path.rpartition("/")[2] == METADATA:
            if reason:
                raise UndiffuseError(f"{store.name}: {printable(file.path)}: {reason}")
            unknown += _lines(store, file, found, known)
        elif file.extension in BESIDE and (path := stems.get(os.path.splitext(file.path)[0])) and not reason:
            try:
                text = store.read(file, MAX_TEXT).decode("utf-8-sig")
                values = json.loads(text) if file.extension == "json" else text
            except (BadFile, ValueError, RecursionError) as error:
                found.notes.append(f"{printable(file.path)} cannot be read ({' '.join(str(error).split())[:80]})")
                continue
            if isinstance(values, dict):
                found.add(path, values)
            elif isinstance(values, str):
                found.add(path, {"class" if file.extension == "cls" else "text": values.strip()})
    if unknown:
        found.notes.append(f"{METADATA} speaks of {unknown} files that are not there")
    without = len(known) - len(found.texts)
    if found.texts and without:
        found.notes.append(f"{without} of {len(known)} files have no caption; theirs is empty")
    return found


def _lines(store: Store, file: File, found: Metadata, known: set[str]) -> int:
    """Reads a ``metadata.jsonl``; how many of its lines speak of files that are not there."""
    where = f"{store.name}: {printable(file.path)}"
    folder = file.path.rpartition("/")[0]
    try:
        lines = store.read(file).decode("utf-8-sig").splitlines()
    except (BadFile, UnicodeDecodeError) as error:
        raise UndiffuseError(f"{where}: cannot be read ({error}); it must be UTF-8 text") from None
    unknown, seen = 0, set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict) or not isinstance(values.get("file_name"), str):
            raise UndiffuseError(f'{where}, line {number}: must be an object with a "file_name"; correct the line')
        path = f"{folder}/{values['file_name']}" if folder else values["file_name"]
        path = path.removeprefix("./")
        if path in seen:
            raise UndiffuseError(f"{where}, line {number}: {printable(path)} for the second time; keep one line")
        seen.add(path)
        if path in known:
            found.add(path, values)
        else:
            unknown += 1
    return unknown
