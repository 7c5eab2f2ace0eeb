"""What every source of data becomes: a :class:`Dataset`.

A data set is an ordered list of items with one :class:`DataSpec`. It has no cursor, no shuffling and no randomness: the
caller says which items, and gets them in model units. That makes a training run resumable by the step number alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from types import MappingProxyType
from typing import TYPE_CHECKING, final, overload

import numpy as np
import torch

from ..errors import UndiffuseError
from .augment import Augment
from .spec import DataSpec

if TYPE_CHECKING:
    from ..codecs import Codec


class Dataset(ABC):
    """``N`` items with a spec.

    ``name``   what the user asked for
    ``labels``   int64 ``[N]``, indices into ``spec.classes``, or ``None``
    ``fingerprint``   changes when the items, their order or their preprocessing change
    ``texts``   a caption for each item, or ``None``
    ``columns``   what a condition of that name is told of each item, ``[N, ...]`` (:mod:`.columns`)
    ``skipped``   ``(file, reason)`` for each file that could not be used
    ``duplicates``   ``(file, the first one with the same content)``
    ``notes``   everything that was warned about when the data were opened
    ``codec``   by which the items were made of those of ``original``, or ``None``: these are the data themselves
    ``streams``   whether items are decoded when they are asked for (reading is then worth a thread of its own)
    """

    spec: DataSpec
    name: str
    labels: np.ndarray | None
    fingerprint: str
    texts: Sequence[str] | None = None
    columns: Mapping[str, np.ndarray] = MappingProxyType({})
    duplicates: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    codec: Codec | None = None

    @property
    def original(self) -> Dataset:
        """What people look at: the data that latents were made of, or this."""
        return self

    @property
    def streams(self) -> bool:
        return False

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        return ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Items in original units ``[B, *original_shape]`` and their labels int64 ``[B]`` (``None`` if unlabelled)."""

    def values(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Items in original units: ``[B, *spec.original_shape]`` of ``spec.dtype``."""
        return self.read(indices)[0]

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Items in model units, float32 ``[B, *spec.shape]``; the conditions, of ``{"classes": int64 [B]}`` and
        :attr:`columns` what there is."""
        values, labels = self.read(indices)
        return self.spec.to_model(values), self.conditions(indices, labels)

    def conditions(self, indices: Sequence[int] | np.ndarray, labels: np.ndarray | None) -> dict[str, torch.Tensor]:
        """What conditions are told of these items, whose ``labels`` were read with them."""
        told = {name: torch.from_numpy(column) for name, column in self.told(indices).items()}
        return told if labels is None else {"classes": torch.from_numpy(labels), **told}

    def told(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """:attr:`columns` of these items."""
        where = positions(indices, len(self))
        return {name: column[where] for name, column in self.columns.items()}

    def augmented(
        self, augment: Augment, seed: int, epochs: np.ndarray, indices: np.ndarray
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """:meth:`batch` as these ``epochs`` (one for each item) see the items, with what the network is told of it."""
        x, cond = self.batch(indices)
        x, told = augment(x, seed, epochs, indices)
        if "beside" in cond:  # the same draws: a picture is moved with its item
            cond["beside"] = augment(cond["beside"], seed, epochs, indices)[0]
        return x, cond if told is None else {**cond, "augmentation": told}

    def lost(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Which of these could not be read, so that other items took their places: bool ``[B]``."""
        return np.zeros(len(indices), bool)

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[str] | None:
        """The captions of these items, or None."""
        return None if self.texts is None else [self.texts[index] for index in positions(indices, len(self))]

    def origin(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Where these items are in the whole that was opened, int64: a part of a data set counts its own items."""
        return positions(indices, len(self))

    def called(self, index: int) -> str:
        """What people call this item: its file, or ``item 3``."""
        return f"item {index}"

    def describe(self) -> str:
        """One line: ``1,797 images 8x8x1 uint8 [0, 16], 10 classes``."""
        spec, count = self.spec, len(self)
        if self.codec is not None:
            size = "x".join(map(str, spec.shape))
            units = f" ({said})" if (said := self.codec.info.get("units")) else ""
            codec = f"{self.codec.kind} codec {self.codec.hash}{units}"
            return f"{self.original.describe()}, as latents {size} of the {codec}"
        noun = spec.kind.removesuffix("s") + ("" if count == 1 else "s")
        if spec.kind == "points":
            size = f"{spec.shape[0]}-D"
        elif spec.kind == "sound":
            length, voices = spec.shape[1], {1: "mono", 2: "stereo"}.get(spec.channels, f"{spec.channels} channels")
            size = f"of {length / (spec.rate or 1):.3g} s at {spec.rate:,} Hz, {voices}"
        elif spec.kind in ("image", "video"):
            size = "x".join(map(str, (*spec.shape[1:], spec.shape[0])))
        else:
            size = "x".join(map(str, spec.shape))
        span = f" [{spec.low:g}, {spec.high:g}]" if spec.bounded else ""
        classes = f", {len(spec.classes)} classes" if spec.classes else ""
        known = [f"{name} ({len(values)})" for name, values in spec.attributes] + [name for name, *_ in spec.numbers]
        if spec.beside is not None:
            known += ["pictures " + "x".join(map(str, (*spec.beside.shape[1:], spec.beside.shape[0])))]
        told = f", with {', '.join(known)}" if known else ""
        skipped = f", {len(self.skipped)} files skipped" if self.skipped else ""
        return f"{count:,} {noun} {size} {spec.dtype}{span}{classes}{told}{skipped}"

    def split(self, held_out: float, seed: int) -> tuple[Dataset, Dataset]:
        """``(train, held out)``: disjoint, deterministic, and with the same share of every class.

        ``held_out`` is the share, in (0, 1), that goes to the second part; each class keeps an item in the first.
        """
        if not 0 < held_out < 1:
            raise UndiffuseError(f"held_out={held_out} must be between 0 and 1, both excluded")
        if len(self) < 2:
            raise UndiffuseError(f"{self.name}: one item cannot be split into two parts")
        groups = np.zeros(len(self), np.int64) if self.labels is None else self.labels
        names, sizes = np.unique(groups, return_counts=True)
        share = sizes * held_out
        counts = np.minimum(np.floor(share).astype(np.int64), sizes - 1)
        # hand out what rounding down has left, largest remainder first, until the total is right
        target = min(max(round(len(self) * held_out), 1), int((sizes - 1).sum()))
        for group in np.argsort(-(share - np.floor(share)), kind="stable"):
            if counts.sum() < target and counts[group] < sizes[group] - 1:
                counts[group] += 1
        taken = np.zeros(len(self), bool)
        for name, count in zip(names, counts, strict=True):
            members = np.flatnonzero(groups == name)
            order = np.random.Generator(np.random.PCG64([seed, int(name)])).permutation(len(members))
            taken[members[order[:count]]] = True
        if not taken.any():
            raise UndiffuseError(f"{self.name}: every class has one item, none can be held out")
        return Subset(self, np.flatnonzero(~taken)), Subset(self, np.flatnonzero(taken))


def positions(indices: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
    """``indices`` as int64, checked: negative ones would silently count from the end."""
    result = np.asarray(indices)
    if result.ndim != 1 or (result.size and result.dtype.kind not in "ui"):
        raise TypeError(f"indices must be a list of whole numbers, got {result.dtype} of shape {result.shape}")
    if result.size and (result.min() < 0 or result.max() >= length):
        raise IndexError(f"index {result.max() if result.max() >= length else result.min()} of {length} items")
    return result.astype(np.int64)


def digest(*parts: bytes | str) -> str:
    """A fingerprint of ``parts``; their borders count."""
    result = blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogateescape")
        result.update(len(data).to_bytes(8, "little"))
        result.update(data)
    return result.hexdigest()


class ArrayDataset(Dataset):
    """Items in one array ``[N, *spec.original_shape]``, in memory or mapped from a file."""

    def __init__(
        self,
        spec: DataSpec,
        values: np.ndarray,
        labels: np.ndarray | None,
        *,
        name: str,
        content: str = "",
        notes: Sequence[str] = (),
        columns: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> None:
        """``content``: the fingerprint of ``values`` and ``labels`` if it is known already."""
        if values.shape[1:] != spec.original_shape:
            raise UndiffuseError(f"{name}: items of shape {values.shape[1:]}, spec says {spec.original_shape}")
        self.spec, self.name, self.notes = spec, name, tuple(notes)
        self.labels = None if labels is None else check_labels(labels, len(values), spec.classes, name)
        self._values, self.columns = values, columns
        for each, column in columns.items():
            if len(column) != len(values):
                raise UndiffuseError(f"{name}: {len(values)} items, but {each} of {len(column)}")
        content = content or digest(np.ascontiguousarray(values).tobytes(), b"" if labels is None else labels.tobytes())
        self.fingerprint = digest(content, spec.stated, *(column.tobytes() for column in columns.values()))

    def __len__(self) -> int:
        return len(self._values)

    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        where = positions(indices, len(self))
        values = np.asarray(self._values[where], dtype=np.dtype(self.spec.dtype))  # a copy in native byte order
        return values, None if self.labels is None else self.labels[where]


@final
class Picked(Sequence[str]):
    """Some texts of another sequence, in the given order, fetched when they are asked for."""

    def __init__(self, whole: Sequence[str], indices: np.ndarray) -> None:
        self._whole, self._indices = whole, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return Picked(self._whole, self._indices[index])
        return self._whole[int(self._indices[index])]


class Subset(Dataset):
    """Some items of another data set, in the given order."""

    def __init__(self, whole: Dataset, indices: Sequence[int] | np.ndarray) -> None:
        self._whole, self._indices = whole, positions(indices, len(whole))
        self.spec, self.name = whole.spec, whole.name
        self.labels = None if whole.labels is None else whole.labels[self._indices]
        self.texts = None if whole.texts is None else Picked(whole.texts, self._indices)
        self.columns = {name: column[self._indices] for name, column in whole.columns.items()}
        self.duplicates, self.notes = whole.duplicates, whole.notes
        self.fingerprint = digest(whole.fingerprint, self._indices.tobytes())
        self.codec = whole.codec

    @property
    def original(self) -> Dataset:
        return self if self.codec is None else Subset(self._whole.original, self._indices)

    def augmented(
        self, augment: Augment, seed: int, epochs: np.ndarray, indices: np.ndarray
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if self.codec is None:
            return super().augmented(augment, seed, epochs, indices)
        return self._whole.augmented(augment, seed, epochs, self._indices[positions(indices, len(self))])

    @property
    def streams(self) -> bool:
        return self._whole.streams

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        return self._whole.skipped

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        return self._whole.read(self._indices[positions(indices, len(self))])

    def told(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        return self._whole.told(self._indices[positions(indices, len(self))])

    def lost(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        return self._whole.lost(self._indices[positions(indices, len(self))])

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[str] | None:
        return self._whole.captions(self._indices[positions(indices, len(self))])

    def called(self, index: int) -> str:
        return self._whole.called(int(self._indices[index]))

    def origin(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        return self._whole.origin(self._indices[positions(indices, len(self))])


def check_labels(labels: np.ndarray, count: int, classes: tuple[str, ...], name: str) -> np.ndarray:
    """``labels`` as int64 ``[count]``, each an index into ``classes``."""
    if labels.shape != (count,) or labels.dtype.kind not in "ui":
        raise UndiffuseError(
            f"{name}: labels must be {count} whole numbers, got {labels.dtype} of shape {labels.shape}"
        )
    if count and (labels.min() < 0 or labels.max() >= len(classes)):
        raise UndiffuseError(f"{name}: labels span {labels.min()}..{labels.max()}, there are {len(classes)} classes")
    return labels.astype(np.int64)
