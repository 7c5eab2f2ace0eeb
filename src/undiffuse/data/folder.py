"""A folder of images: flat, or with one folder a class.

Three steps: :func:`scan` lists the files and reads their headers only; the headers decide the common form (size,
channels, bits) that all pictures get; the pixels are decoded at once and kept, or, if they would not fit in memory,
when they are asked for. A bad file is skipped and named; too many of them, and the folder is refused.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UndiffuseError, UndiffuseWarning
from .base import Dataset, digest, positions
from .images import BadImage, Channels, Decoded, Header, Size, Target, decode, read_header
from .spec import DataSpec, units_between

EXTENSIONS = frozenset(("png", "apng", "jpg", "jpeg", "jpe", "jfif", "webp", "bmp", "dib", "tif", "tiff", "gif"))
UNSUPPORTED = frozenset(("avif", "heic", "heif", "jxl", "jp2", "svg", "psd", "exr", "hdr", "raw", "dng", "cr2", "nef"))
JUNK = frozenset(("thumbs.db", "desktop.ini", "__macosx"))
SPLITS = frozenset(("train", "training", "test", "testing", "val", "valid", "validation", "eval"))
MEMORY_BYTES = 2 * 2**30
MANY_BAD = 100
FEW_BAD = 3


@dataclass(frozen=True)
class Entry:
    """A usable file: its path below the folder, the two facts that tell whether it changed, and its header."""

    path: str
    size: int
    modified: int
    header: Header


@dataclass(frozen=True)
class Scan:
    """What :func:`scan` found, in the order of the paths' bytes."""

    root: Path
    entries: tuple[Entry, ...]
    skipped: tuple[tuple[str, str], ...]


def printable(name: str) -> str:
    """``name`` on one line: line breaks, text-direction marks and bytes that are not UTF-8 are escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode() for char in name
    )


def scan(root: str | Path, *, strict: bool = False) -> Scan:
    """Every image file below ``root`` with its header; those that cannot be used with the reason.

    Hidden files and system litter are ignored, as are files that do not call themselves images. Links are followed
    inside ``root`` only, and each folder is visited once. ``strict`` raises at the first bad file.
    """
    root = Path(root).resolve()
    entries: list[Entry] = []
    skipped: list[tuple[str, str]] = []
    for path in _walk(root, skipped):
        full = os.path.join(root, path)
        try:
            extension = os.path.splitext(path)[1][1:].lower()
            if extension in UNSUPPORTED:
                raise BadImage(f".{extension} is not supported: convert it to PNG or JPEG")
            if os.path.islink(full) and not Path(os.path.realpath(full)).is_relative_to(root):
                raise BadImage("a link to outside of the folder: copy the file")
            try:
                status = os.stat(full)
            except OSError as error:
                raise BadImage("a link that leads nowhere" if os.path.islink(full) else str(error.strerror)) from None
            if not stat.S_ISREG(status.st_mode):
                raise BadImage("not a regular file")
            entries.append(Entry(path, status.st_size, status.st_mtime_ns, read_header(full)))
        except BadImage as reason:
            skipped.append((path, str(reason)))
        if strict and skipped:
            raise UndiffuseError(f"{printable(str(root))}: {_named(skipped)} (refused because of --strict)")
    return Scan(root, tuple(entries), tuple(skipped))


def _walk(root: Path, skipped: list[tuple[str, str]]) -> list[str]:
    """Paths of image candidates below ``root``, sorted. Real folders first, links to folders after them, each once."""
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    folders, links = [""], []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        full = os.path.join(root, folder)
        try:
            status = os.stat(full)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            children = sorted(os.scandir(full), key=lambda child: os.fsencode(child.name))
        except OSError as error:
            skipped.append((folder, f"the folder cannot be read: {error.strerror}"))
            continue
        for child in children:
            if child.name.startswith(".") or child.name.lower() in JUNK:
                continue
            path = os.path.join(folder, child.name)
            if child.is_dir(follow_symlinks=False):
                folders.append(path)
            elif child.is_dir():
                if Path(os.path.realpath(child.path)).is_relative_to(root):
                    links.append(path)
                else:
                    skipped.append((path, "a link to a folder outside: copy it"))
            else:
                extension = os.path.splitext(child.name)[1][1:].lower()
                if extension in EXTENSIONS or extension in UNSUPPORTED or (not extension and _looks_like_image(child)):
                    found.append(path)
    return sorted(found, key=os.fsencode)


def _looks_like_image(child: os.DirEntry[str]) -> bool:
    """Files without an extension are images if their header says so; nothing else is opened on suspicion."""
    if not child.is_file():
        return False
    try:
        read_header(child.path)
    except BadImage:
        return False
    return True


class ImageFolder(Dataset):
    """The images of a folder, all in one form."""

    def __init__(
        self,
        root: str | Path,
        *,
        image_size: Size = None,
        channels: Channels = None,
        strict: bool = False,
        memory: int = MEMORY_BYTES,
        name: str | None = None,
    ) -> None:
        """``memory``: decoded pixels are kept if they need at most this many bytes."""
        self.name = name or printable(str(root))
        found = scan(root, strict=strict)
        self._root, self._strict, self._skipped = found.root, strict, list(found.skipped)
        self._entries, self._pixels = found.entries, None
        self._pool = ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1), thread_name_prefix="images")
        self._enough_left()
        _classes(self._entries, self.name)  # before the long work: is the folder laid out in a way that we understand?
        target, notes = _target(self._entries, image_size, channels, self.name)
        self._target = target
        dtype = np.dtype(np.uint16 if target.bits == 16 else np.uint8)
        item = (*target.size, target.channels) if target.channels > 1 else target.size
        if len(self._entries) * int(np.prod(item)) * dtype.itemsize <= memory:
            self._pixels, more = self._decode_all(np.empty((len(self._entries), *item), dtype))
            notes += more
        classes, self.labels = _classes(self._entries, self.name)
        shift, scale = units_between(0.0, float(np.iinfo(dtype).max))
        same = all((entry.header.height, entry.header.width) == target.size for entry in self._entries)
        self.spec = DataSpec(
            kind="image",
            shape=(target.channels, *target.size),
            dtype=dtype.name,
            low=0.0,
            high=float(np.iinfo(dtype).max),
            shift=shift,
            scale=scale,
            layout="HW" if target.channels == 1 else "HWC",
            classes=classes,
            resize=None if same else "lanczos",
        )
        facts = [f"{entry.path}\0{entry.size}\0{entry.modified}" for entry in self._entries]
        self.fingerprint = digest(repr(self.spec), *facts)
        if (found.root / "metadata.jsonl").exists():
            notes.append("metadata.jsonl is not read: captions are not supported yet")
        if self._skipped:
            notes.insert(0, f"{len(self._skipped)} files skipped: {_named(self._skipped)}")
        for note in notes:
            warnings.warn(f"{self.name}: {note}", UndiffuseWarning, stacklevel=3)

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        return tuple((printable(path), reason) for path, reason in self._skipped)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """As :meth:`Dataset.read`. A file that became unreadable since the scan is skipped like any bad one: the next
        good file takes its place, with its own label, and :attr:`skipped` names it.
        """
        where = positions(indices, len(self))
        if self._pixels is not None:
            values = self._pixels[where]
        else:
            values = np.empty((len(where), *self.spec.original_shape), np.dtype(self.spec.dtype))
            for place, outcome in enumerate(self._pool.map(self._decode, [self._entries[index] for index in where])):
                while isinstance(outcome, BadImage):
                    self._skip(self._entries[where[place]], outcome)
                    where[place] = (where[place] + 1) % len(self)
                    outcome = self._decode(self._entries[where[place]])
                values[place] = outcome.pixels
        return values, None if self.labels is None else self.labels[where]

    def _decode(self, entry: Entry) -> Decoded | BadImage:
        """The image, or why there is none; as a value, since threads hand it over."""
        path = os.path.join(self._root, entry.path)
        try:
            status = os.stat(path)
            if (status.st_size, status.st_mtime_ns) != (entry.size, entry.modified):
                raise BadImage("the file has changed since it was found")
            return decode(path, self._target)
        except OSError as error:
            return BadImage(str(error.strerror).lower())
        except BadImage as reason:
            return reason

    def _decode_all(self, pixels: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Fills ``pixels`` with the good images in order and forgets the others. Returns its filled part and notes."""
        good: list[Entry] = []
        remarks: dict[str, list[str]] = {}
        first_of: dict[bytes, str] = {}
        entries = self._entries
        for start in range(0, len(entries), 256):  # in portions: a refusal must not wait for all the others
            portion = entries[start : start + 256]
            for entry, outcome in zip(portion, self._pool.map(self._decode, portion), strict=True):
                if isinstance(outcome, BadImage):
                    self._skip(entry, outcome)
                    continue
                pixels[len(good)] = outcome.pixels
                good.append(entry)
                for note in outcome.notes:
                    remarks.setdefault(note, []).append(entry.path)
                if first_of.setdefault(outcome.digest, entry.path) != entry.path:
                    remarks.setdefault("the same file as another one", []).append(entry.path)
        self._entries = tuple(good)
        self._enough_left()
        kept = pixels[: len(good)]
        notes = [
            f"{note}: {printable(paths[0])}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
            for note, paths in remarks.items()
        ]
        largest, full = int(kept.max()), np.iinfo(pixels.dtype).max
        if largest <= full // 2:
            notes.append(f"the brightest pixel is {largest} of {full}: save the values as .npy to use their own range")
        return kept, notes

    def _skip(self, entry: Entry, reason: BadImage) -> None:
        if entry.path not in {path for path, _ in self._skipped}:
            self._skipped.append((entry.path, str(reason)))
            self._enough_left()

    def _enough_left(self) -> None:
        """Refuses to go on with a folder that is mostly, or suspiciously often, unreadable."""
        bad = len(self._skipped)
        known = {path for path, _ in self._skipped}
        good = sum(entry.path not in known for entry in self._entries)
        if not good:
            raise _nothing(self._root, self._skipped, self.name)
        if bad and self._strict:
            raise UndiffuseError(f"{self.name}: {_named(self._skipped)} (refused because of --strict)")
        if bad > MANY_BAD or (bad > FEW_BAD and bad > 0.01 * (good + bad)):
            raise UndiffuseError(
                f"{self.name}: {bad} of {good + bad} files cannot be used: {_named(self._skipped)}; "
                "repair or remove them (more than 1 % are not skipped silently)"
            )


def _named(skipped: Sequence[tuple[str, str]], most: int = 3) -> str:
    first = ", ".join(f"{printable(path)} ({reason})" for path, reason in skipped[:most])
    return first + (f" and {len(skipped) - most} more" if len(skipped) > most else "")


def _nothing(root: Path, skipped: Sequence[tuple[str, str]], name: str) -> UndiffuseError:
    if skipped:
        return UndiffuseError(f"{name}: none of the {len(skipped)} images can be used: {_named(skipped)}")
    others = Counter(path.suffix.lower() or "(no extension)" for path in root.iterdir() if path.is_file())
    if not any(root.iterdir()):
        return UndiffuseError(f"{name}: the folder is empty; put PNG, JPEG, WebP, BMP, TIFF or GIF images into it")
    has = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(3))
    return UndiffuseError(
        f"{name}: no images (PNG, JPEG, WebP, BMP, TIFF, GIF) in the folder" + (f"; it has files: {has}" if has else "")
    )


def _target(entries: Sequence[Entry], image_size: Size, channels: Channels, name: str) -> tuple[Target, list[str]]:
    """The common form of all images, and what had to give way for it."""
    notes: list[str] = []
    grey = sum(entry.header.grey for entry in entries)
    deep = sum(entry.header.bits == 16 for entry in entries)
    if channels in (None, "keep"):
        count = 1 if grey == len(entries) else 3
        if 0 < grey < len(entries):
            notes.append(f"{grey} grey images among {len(entries) - grey} in colour: all become RGB")
    elif isinstance(channels, int) and channels in (1, 3, 4):
        count = channels
    else:
        raise UndiffuseError(f"channels={channels!r}: choose 1 (grey), 3 (RGB), 4 (RGB and alpha) or keep")
    bits = 16 if deep == len(entries) and count == 1 else 8
    if deep and bits == 8:
        notes.append(f"{deep} images of 16 bits become 8 bits, as not all are 16-bit grey")
    if image_size is None:
        sizes = Counter((entry.header.height, entry.header.width) for entry in entries)
        if len(sizes) > 1:
            common = ", ".join(f"{width}x{height} ({n})" for (height, width), n in sizes.most_common(3))
            more = f" and {len(sizes) - 3} more" if len(sizes) > 3 else ""
            raise UndiffuseError(
                f"{name}: images of {len(sizes)} sizes: {common}{more}; choose one: image_size=64 (--image-size 64)"
            )
        image_size = next(iter(sizes))
    return Target(image_size, count, bits), notes


def _classes(entries: Sequence[Entry], name: str) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Class names and labels from the folders; none if all files lie in one. Folders around everything do not count."""
    parts = [entry.path.split(os.sep)[:-1] for entry in entries]
    depth = 0
    while all(len(folders) > depth and folders[depth] == parts[0][depth] for folders in parts):
        depth += 1
    groups = [folders[depth] if len(folders) > depth else "" for folders in parts]
    names = sorted(set(groups), key=os.fsencode)
    if len(names) == 1:
        return (), None
    if "" in names:
        loose = groups.count("")
        raise UndiffuseError(
            f"{name}: {loose} images beside class folders ({printable(names[1])}, ...): move them into one, or away"
        )
    if {each.lower() for each in names} <= SPLITS:
        raise UndiffuseError(f"{name}: {' and '.join(names)} are parts of a data set, not classes: open one of them")
    index = {each: number for number, each in enumerate(names)}
    return tuple(map(printable, names)), np.array([index[group] for group in groups], np.int64)
