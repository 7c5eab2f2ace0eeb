"""Many files in one form: a folder, or an archive, of images, sounds or clips; flat, or with one folder a class.

Three steps: :func:`scan` lists the files and reads their headers only; the headers decide the common form (size,
channels, bits) that all items get; the contents are decoded at once and kept, or, if they would not fit in memory,
when they are asked for. A bad file is skipped and named; too many of them, and the folder is refused.
"""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np

from ..errors import UndiffuseError, UndiffuseWarning, unknown
from ..tokens import learn
from .arrays import Values
from .base import Dataset, digest, positions
from .columns import Columns, check_names, columns
from .images import Channels, Decoded, Header, Size, Target, decode, is_image, read_header
from .metadata import LABELS, Metadata, read_metadata
from .spec import DataSpec, units_between
from .store import BadFile, File, Store, printable

SPLITS = frozenset(("train", "training", "test", "testing", "val", "valid", "validation", "eval"))
MEMORY_BYTES = 2 * 2**30
MANY_BAD = 100
FEW_BAD = 3


@dataclass(frozen=True)
class Entry:
    """A usable item: its name, its files (one, but for a clip of frames), its header, what its fingerprint keeps."""

    path: str
    files: tuple[File, ...]
    header: Any
    fact: str


@dataclass(frozen=True)
class Form:
    """What all items become: ``target`` is for :meth:`Reader.decode`, ``notes`` say what had to give way for it."""

    target: Any
    spec: DataSpec
    notes: tuple[str, ...] = ()


class Reader(ABC):
    """A kind of file.

    ``noun``   what the items are called; ``known``, ``unsupported``   extensions; ``formats``   for people
    """

    noun: str
    formats: str
    known: frozenset[str]
    unsupported: frozenset[str] = frozenset()

    def is_one(self, store: Store, file: File) -> bool:
        """Whether a file without an extension is of this kind. Nothing else is opened on suspicion."""
        return False

    def group(self, store: Store, files: Sequence[File]) -> list[tuple[str, tuple[File, ...]]]:
        """The items: each file is one, called by its path."""
        return [(file.path, (file,)) for file in files]

    @abstractmethod
    def header(self, store: Store, files: tuple[File, ...]) -> Any:
        """What the files say about themselves before anything is decoded. Raises :class:`BadFile`."""

    @abstractmethod
    def form(self, headers: Sequence[Any], name: str) -> Form:
        """The common form of items with these headers; its spec has no classes yet."""

    @abstractmethod
    def decode(self, store: Store, files: tuple[File, ...], target: Any) -> Decoded:
        """One item in that form. Raises :class:`BadFile`."""

    def measured(self, values: Values, spec: DataSpec, name: str) -> tuple[DataSpec, list[str]]:
        """The spec of the form once the values can be looked at, for kinds of file that do not state their range; and
        notes."""
        return spec, []

    def remarks(self, values: np.ndarray, spec: DataSpec) -> list[str]:
        """What is odd about all values together."""
        return []


@dataclass(frozen=True)
class Scan:
    """What :func:`scan` found, in the order of the paths' bytes."""

    entries: tuple[Entry, ...]
    skipped: tuple[tuple[str, str], ...]


def scan(store: Store, reader: Reader, *, strict: bool = False) -> Scan:
    """Every item of the store with its header; those that cannot be used with the reason.

    Files that do not call themselves by one of the reader's extensions are left alone. ``strict`` raises at the first
    bad one.
    """
    good: list[File] = []
    skipped: list[tuple[str, str]] = []

    def skip(path: str, reason: str) -> None:
        skipped.append((path.rstrip("/"), reason))
        if strict:
            raise UndiffuseError(f"{store.name}: {_named(skipped)} (refused because of --strict)")

    for file, reason in store.listing:
        if file.path.endswith("/"):
            skip(file.path, reason)
        elif file.extension in reader.unsupported:
            skip(file.path, f".{file.extension} is not supported: convert it ({reader.formats})")
        elif (
            store.chosen
            or file.extension in reader.known
            or (not file.extension and not reason and reader.is_one(store, file))
        ):
            if reason:
                skip(file.path, reason)
            else:
                good.append(file)
    entries: list[Entry] = []
    for path, files in reader.group(store, good):
        try:
            entries.append(Entry(path, files, reader.header(store, files), "\0".join(map(store.fact, files))))
        except BadFile as reason:
            skip(path, str(reason))
        except OSError as error:
            skip(path, str(error.strerror).lower())
    return Scan(tuple(entries), tuple(skipped))


@final
class Files(Dataset):
    """The items of a store, all in one form."""

    def __init__(
        self,
        store: Store,
        reader: Reader,
        *,
        labels: str | None = None,
        attributes: Sequence[str] = (),
        numbers: Sequence[str] = (),
        about: Metadata | None = None,
        strict: bool = False,
        memory: int = MEMORY_BYTES,
        threads: int | None = None,
    ) -> None:
        """``memory``: decoded items are kept if they need at most this many bytes. ``threads`` decode (default: as many
        as there are processors, at most 16); their number changes only the speed. ``labels``, ``attributes``,
        ``numbers``: see :func:`undiffuse.data.open_dataset`. ``about``: what is known of the files, where no file says
        it.
        """
        self.name, self._store, self._reader, self._strict = store.name, store, reader, strict
        found = scan(store, reader, strict=strict)
        self._entries, self._skipped = found.entries, list(found.skipped)
        self._kept: np.ndarray | None = None
        self._moved: dict[int, int] = {}  # items that could not be read, and those that took their places
        self._pool = ThreadPoolExecutor(threads or min(16, os.cpu_count() or 1), "undiffuse-files")
        self._enough_left()
        about = about or read_metadata(store, [entry.path for entry in self._entries])
        used = (*attributes, *numbers)
        check_names(attributes, numbers, about.names, self.name)
        _classes(self._entries, about, labels, self.name, used)  # before the long work: is it all understood?
        self._known(about, attributes, numbers)
        form = reader.form([entry.header for entry in self._entries], self.name)
        self._target, self.spec, self.labels = form.target, form.spec, None
        shape, dtype = form.spec.original_shape, np.dtype(form.spec.dtype)
        notes, contents = [*form.notes], []
        if len(self._entries) * int(np.prod(shape)) * dtype.itemsize <= memory:
            contents, more = self._decode_all(np.empty((len(self._entries), *shape), dtype))
            notes += more
        spec, measured = reader.measured(_Slices(self) if self._kept is None else self._kept, form.spec, self.name)
        classes, self.labels, more = _classes(self._entries, about, labels, self.name, used)
        told = self._known(about, attributes, numbers)
        self.columns = told.values
        notes += [*measured, *about.notes, *more, *told.notes]
        self.texts = tuple(about.texts.get(entry.path, "") for entry in self._entries) if about.texts else None
        vocabulary = learn(self.texts or ())
        self.spec = replace(
            spec, classes=classes, vocabulary=vocabulary, attributes=told.attributes, numbers=told.numbers
        )
        self.fingerprint = digest(
            self.spec.stated,
            *(entry.fact for entry in self._entries),
            *contents,
            *(self.texts or ()),
            b"" if self.labels is None else self.labels.tobytes(),
            *(column.tobytes() for column in told.values.values()),
        )
        if self._skipped:
            notes.insert(0, f"{len(self._skipped)} files skipped: {_named(self._skipped)}")
        self.notes = tuple(notes)
        for note in notes:
            warnings.warn(f"{self.name}: {note}", UndiffuseWarning, stacklevel=3)

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        return tuple((printable(path), reason) for path, reason in self._skipped)

    @property
    def streams(self) -> bool:
        return self._kept is None

    def __len__(self) -> int:
        return len(self._entries)

    def called(self, index: int) -> str:
        return printable(self._entries[index].path)

    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """As :meth:`Dataset.read`. A file that became unreadable since the scan is skipped like any bad one: the next
        good file takes its place, with its own label, caption and attributes, and :attr:`skipped` names it.
        """
        where = positions(indices, len(self))
        if self._kept is not None:
            values = self._kept[where]
        else:
            values = np.empty((len(where), *self.spec.original_shape), np.dtype(self.spec.dtype))
            for place, outcome in enumerate(self._pool.map(self._decode, [self._entries[index] for index in where])):
                asked = int(where[place])
                while isinstance(outcome, BadFile):
                    self._skip(self._entries[where[place]], outcome)
                    self._moved[asked] = where[place] = (where[place] + 1) % len(self)
                    outcome = self._decode(self._entries[where[place]])
                values[place] = outcome.pixels
        return values, None if self.labels is None else self.labels[where]

    def told(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        return super().told(self._really(indices))

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[str] | None:
        return super().captions(self._really(indices))

    def lost(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        return self._really(indices) != positions(indices, len(self))

    def _really(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The items that :meth:`read` has given for these."""
        return np.array([self._moved.get(int(i), int(i)) for i in positions(indices, len(self))], np.int64)

    def _known(self, about: Metadata, attributes: Sequence[str], numbers: Sequence[str]) -> Columns:
        """What the metadata say of the files by these names."""

        def cells(names: Sequence[str]) -> dict[str, list[str | None]]:
            known = [about.attributes.get(entry.path, {}) for entry in self._entries]
            return {name: [each.get(name) for each in known] for name in names}

        return columns(cells(attributes), cells(numbers), self.called, self.name)

    def _decode(self, entry: Entry) -> Decoded | BadFile:
        """The item, or why there is none; as a value, since threads hand it over."""
        try:
            return self._reader.decode(self._store, entry.files, self._target)
        except OSError as error:
            return BadFile(str(error.strerror).lower())
        except BadFile as reason:
            return reason

    def _decode_all(self, values: np.ndarray) -> tuple[list[bytes], list[str]]:
        """Keeps the good items in order and forgets the others. Returns a digest of each, and notes."""
        good: list[Entry] = []
        contents: list[bytes] = []
        remarks: dict[str, list[str]] = {}
        first_of: dict[bytes, str] = {}
        copies: list[tuple[str, str]] = []
        entries = self._entries
        for start in range(0, len(entries), 256):  # in portions: a refusal must not wait for all the others
            portion = entries[start : start + 256]
            for entry, outcome in zip(portion, self._pool.map(self._decode, portion), strict=True):
                if isinstance(outcome, BadFile):
                    self._skip(entry, outcome)
                    continue
                values[len(good)] = outcome.pixels
                good.append(entry)
                contents.append(outcome.digest)
                for note in outcome.notes:
                    remarks.setdefault(note, []).append(entry.path)
                if (first := first_of.setdefault(outcome.digest, entry.path)) != entry.path:
                    copies.append((printable(entry.path), printable(first)))
                    remarks.setdefault("the same file as another one", []).append(entry.path)
        self._entries, self.duplicates = tuple(good), tuple(copies)
        self._enough_left()
        self._kept = values[: len(good)]
        notes = [
            f"{note}: {printable(paths[0])}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
            for note, paths in remarks.items()
        ]
        return contents, notes + self._reader.remarks(self._kept, self.spec)

    def _skip(self, entry: Entry, reason: BadFile) -> None:
        if entry.path not in {path for path, _ in self._skipped}:
            self._skipped.append((entry.path, str(reason)))
            self._enough_left()

    def _enough_left(self) -> None:
        """Refuses to go on with a folder that is mostly, or suspiciously often, unreadable."""
        bad = len(self._skipped)
        known = {path for path, _ in self._skipped}
        good = sum(entry.path not in known for entry in self._entries)
        if not good:
            raise self._nothing()
        if bad and self._strict:
            raise UndiffuseError(f"{self.name}: {_named(self._skipped)} (refused because of --strict)")
        if bad > MANY_BAD or (bad > FEW_BAD and bad > 0.01 * (good + bad)):
            raise UndiffuseError(
                f"{self.name}: {bad} of {good + bad} files cannot be used: {_named(self._skipped)}; "
                "repair or remove them (more than 1 % are not skipped silently)"
            )

    def _nothing(self) -> UndiffuseError:
        noun, formats = self._reader.noun, self._reader.formats
        if self._skipped:
            listed = _named(self._skipped)
            return UndiffuseError(f"{self.name}: none of the {len(self._skipped)} {noun} can be used: {listed}")
        others = Counter(f".{file.extension}" if file.extension else "no extension" for file, _ in self._store.listing)
        if not others:
            return UndiffuseError(f"{self.name}: is empty; put {formats} {noun} into it")
        has = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(3))
        return UndiffuseError(f"{self.name}: no {noun} ({formats}) in it; it has files: {has}")


class _Slices:
    """The values of a set that streams, as :func:`.arrays.measure` reads them."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self.shape, self.dtype = (len(files), *files.spec.original_shape), np.dtype(files.spec.dtype)

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        return self._files.values(range(*rows.indices(len(self._files))))


def _named(skipped: Sequence[tuple[str, str]], most: int = 3) -> str:
    first = ", ".join(f"{printable(path)} ({reason})" for path, reason in skipped[:most])
    return first + (f" and {len(skipped) - most} more" if len(skipped) > most else "")


# ---- classes ----


def _classes(
    entries: Sequence[Entry], about: Metadata, choice: str | None, name: str, used: Sequence[str] = ()
) -> tuple[tuple[str, ...], np.ndarray | None, list[str]]:
    """Class names, labels and notes: from folders, from the files' names, or from an attribute in the metadata."""
    if choice == "none":
        return (), None, []
    if choice == "name":
        groups = [_stem(entry.path) for entry in entries]
        if len(set(groups)) > max(10, len(groups) // 2):
            raise UndiffuseError(
                f"{name}: labels=name finds {len(set(groups))} classes in {len(groups)} names: a class is what stands "
                "before the first _ or -, as in cat_1.png"
            )
        return *_indexed(groups), []
    groups = _folders(entries, name) if choice in (None, "folder") else None
    if choice is None and groups is None:
        choice = next((label for label in LABELS if label in about.names), None)
    if choice is None or choice == "folder":
        others = [each for each in about.names if each not in used]
        remedy = f"choose one with labels={others[0]}, or more with attributes or numbers" if others else ""
        notes = [f"attributes that are not used: {', '.join(map(printable, others))}; {remedy}"] if others else []
        if groups is None:
            if choice:
                raise UndiffuseError(f"{name}: labels=folder, but there are no class folders")
            return (), None, notes
        return *_indexed(groups), notes
    if choice not in about.names:
        raise unknown("attribute for labels", choice, ["folder", "name", "none", *about.names])
    lacking = [entry.path for entry in entries if choice not in about.attributes.get(entry.path, {})]
    if lacking:
        raise UndiffuseError(
            f"{name}: {len(lacking)} files have no {printable(choice)}, {printable(lacking[0])} for one: give every "
            "file its own, or take them away"
        )
    groups = [about.attributes[entry.path][choice] for entry in entries]
    if about.classes:
        return about.classes, np.array([about.classes.index(group) for group in groups], np.int64), []
    if len(set(groups)) > max(10, len(groups) // 2):
        raise UndiffuseError(
            f"{name}: {printable(choice)} has {len(set(groups))} different values: these are not classes"
        )
    return *_indexed(groups), []


def _stem(path: str) -> str:
    """What stands before the first ``_`` or ``-`` in a file's name: ``cat`` in ``pets/cat_12.png``."""
    stem = os.path.splitext(path.rpartition("/")[2])[0]
    return stem.replace("-", "_").split("_")[0]


def _indexed(groups: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    names = sorted(set(groups), key=os.fsencode)
    index = {each: number for number, each in enumerate(names)}
    return tuple(map(printable, names)), np.array([index[group] for group in groups], np.int64)


def _folders(entries: Sequence[Entry], name: str) -> list[str] | None:
    """The folder of each entry; ``None`` if all files lie in one. Folders around everything do not count."""
    parts = [entry.path.split("/")[:-1] for entry in entries]
    depth = 0
    while all(len(folders) > depth and folders[depth] == parts[0][depth] for folders in parts):
        depth += 1
    groups = [folders[depth] if len(folders) > depth else "" for folders in parts]
    names = sorted(set(groups), key=os.fsencode)
    if len(names) == 1:
        return None
    if "" in names:
        loose = groups.count("")
        raise UndiffuseError(
            f"{name}: {loose} files beside class folders ({printable(names[1])}, ...): move them into one, or away"
        )
    if {each.lower() for each in names} <= SPLITS:
        raise UndiffuseError(f"{name}: {' and '.join(names)} are parts of a data set, not classes: open one of them")
    return groups


# ---- images ----


@final
@dataclass(frozen=True)
class Images(Reader):
    """Pictures; ``image_size`` is (height, width), ``channels`` 1, 3, 4 or keep."""

    image_size: Size = None
    channels: Channels = None

    noun = "images"
    formats = "PNG, JPEG, WebP, BMP, TIFF, GIF"
    known = frozenset(("png", "apng", "jpg", "jpeg", "jpe", "jfif", "webp", "bmp", "dib", "tif", "tiff", "gif"))
    unsupported = frozenset(
        ("avif", "heic", "heif", "jxl", "jp2", "svg", "psd", "exr", "hdr", "raw", "dng", "cr2", "nef")
    )

    def is_one(self, store: Store, file: File) -> bool:
        try:
            with store.open(file) as stream:
                return is_image(stream.read(16))
        except (BadFile, OSError):
            return False

    def header(self, store: Store, files: tuple[File, ...]) -> Header:
        store.check(files[0])
        with store.open(files[0]) as stream:
            return read_header(stream)

    def decode(self, store: Store, files: tuple[File, ...], target: Target) -> Decoded:
        return decode(store.read(files[0]), target)

    def remarks(self, values: np.ndarray, spec: DataSpec) -> list[str]:
        largest, full = int(values.max()), spec.high or 0
        if largest > full // 2:
            return []
        return [f"the brightest pixel is {largest} of {full:g}: save the values as .npy to use their own range"]

    def form(self, headers: Sequence[Header], name: str) -> Form:
        target, notes = image_target(headers, self.image_size, self.channels, name)
        same = all((header.height, header.width) == target.size for header in headers)
        return Form(target, image_spec(target, resize=None if same else "lanczos"), tuple(notes))


def image_spec(target: Target, resize: str | None) -> DataSpec:
    """The spec of images of this form."""
    dtype = np.dtype(np.uint16 if target.bits == 16 else np.uint8)
    high = float(np.iinfo(dtype).max)
    return DataSpec(
        kind="image",
        shape=(target.channels, *target.size),
        dtype=dtype.name,
        low=0.0,
        high=high,
        shift=units_between(0.0, high)[0],
        scale=units_between(0.0, high)[1],
        layout="HW" if target.channels == 1 else "HWC",
        resize=resize,
    )


def image_target(
    headers: Sequence[Header], image_size: Size, channels: Channels, name: str
) -> tuple[Target, list[str]]:
    """The common form of all images, and what had to give way for it."""
    notes: list[str] = []
    grey = sum(header.grey for header in headers)
    deep = sum(header.bits == 16 for header in headers)
    if channels in (None, "keep"):
        count = 1 if grey == len(headers) else 3
        if 0 < grey < len(headers):
            notes.append(f"{grey} grey images among {len(headers) - grey} in colour: all become RGB")
    elif isinstance(channels, int) and channels in (1, 3, 4):
        count = channels
    else:
        raise UndiffuseError(f"channels={channels!r}: choose 1 (grey), 3 (RGB), 4 (RGB and alpha) or keep")
    bits = 16 if deep == len(headers) else 8
    if deep and bits == 8:
        notes.append(f"{deep} images of 16 bits become 8 bits, as {len(headers) - deep} have no more")
    if image_size is None:
        sizes = Counter((header.height, header.width) for header in headers)
        if len(sizes) > 1:
            common = ", ".join(f"{width}x{height} ({n})" for (height, width), n in sizes.most_common(3))
            more = f" and {len(sizes) - 3} more" if len(sizes) > 3 else ""
            raise UndiffuseError(
                f"{name}: images of {len(sizes)} sizes: {common}{more}; choose one: image_size=64 (--image-size 64)"
            )
        image_size = next(iter(sizes))
    return Target(image_size, count, bits), notes
