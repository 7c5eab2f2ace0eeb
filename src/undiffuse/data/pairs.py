"""Pairs: items, and for each one a picture that a model is shown beside it (a sketch of it, another view, a map).

A picture belongs to the item whose file has its name, whatever the endings are: ``photos/cats/1.jpg`` and
``sketches/cats/1.png``. In arrays the order tells. Pictures keep units of their own, and are moved and mirrored with
their items.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import final

import numpy as np

from ..errors import UndiffuseError, UndiffuseWarning
from .base import Dataset, Subset, digest, positions
from .folder import Files
from .shown import picture_spec


def paired(items: Dataset, pictures: Dataset) -> Pairs:
    """The pairs of these; what has no partner is left out, with a note. Raises where nothing has one."""
    if len(items.spec.shape) < 2 or len(items.spec.shape) != len(pictures.spec.shape):
        raise UndiffuseError(
            f"{pictures.name}: of shape {list(pictures.spec.shape)}, cannot be shown beside {list(items.spec.shape)}"
        )
    if not (isinstance(items, Files) and isinstance(pictures, Files)):
        if len(items) != len(pictures):
            raise UndiffuseError(f"{items.name} has {len(items)} items and {pictures.name} {len(pictures)}: no pairs")
        return Pairs(items, pictures)
    mine, theirs = _places(items), _places(pictures)
    names = [name for name in mine if name in theirs]
    if not names:
        first = next(iter(theirs))
        raise UndiffuseError(f"{items.name} and {pictures.name}: no names in common ({next(iter(mine))}, {first})")
    lost = [
        f"{len(all_) - len(names)} of {len(all_)} files have no partner in {other.name}"
        for all_, other in ((mine, pictures), (theirs, items))
        if len(all_) > len(names)
    ]
    for note in lost:
        warnings.warn(f"{items.name}: {note}; they are left out", UndiffuseWarning, stacklevel=3)
    where = ([mine[name] for name in names], [theirs[name] for name in names])
    return Pairs(Subset(items, where[0]), Subset(pictures, where[1]), lost)


def _places(files: Files) -> dict[str, int]:
    """Where the file of each name, without its ending, is."""
    found: dict[str, int] = {}
    for index in range(len(files)):
        name = os.path.splitext(files.called(index))[0]
        if name in found:
            raise UndiffuseError(f"{files.name}: {files.called(found[name])} and {files.called(index)} have one name")
        found[name] = index
    return found


@final
class Pairs(Dataset):
    """``items``, each with the picture in the same place of ``pictures`` as what the condition ``beside`` is told."""

    def __init__(self, items: Dataset, pictures: Dataset, notes: Sequence[str] = ()) -> None:
        self._items, self._pictures = items, pictures
        self.spec = replace(items.spec, beside=picture_spec(pictures.spec, pictures.spec.shape))
        self.name, self.labels, self.texts, self.columns = items.name, items.labels, items.texts, items.columns
        self.duplicates, self.notes = items.duplicates, (*items.notes, *pictures.notes, *notes)
        self.fingerprint = digest("pairs", items.fingerprint, pictures.fingerprint)

    def __len__(self) -> int:
        return len(self._items)

    @property
    def streams(self) -> bool:
        return self._items.streams or self._pictures.streams

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        return (*self._items.skipped, *self._pictures.skipped)

    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        found = self._items.read(indices)
        self._check(self._items, indices)
        return found

    def told(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        x = self._pictures.spec.to_model(self._pictures.values(indices)).numpy()
        self._check(self._pictures, indices)
        return {**self._items.told(indices), "beside": x}

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[str] | None:
        return self._items.captions(indices)

    def called(self, index: int) -> str:
        return self._items.called(index)

    def _check(self, part: Dataset, indices: Sequence[int] | np.ndarray) -> None:
        """Another file in the place of one that broke would make a wrong pair."""
        if (lost := part.lost(indices)).any():
            name = part.called(int(positions(indices, len(self))[int(np.argmax(lost))]))
            raise UndiffuseError(f"{part.name}: {name} can no longer be read, so its pair is broken: restore it")
