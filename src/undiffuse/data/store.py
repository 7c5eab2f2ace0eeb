"""Where files are: a folder, or an archive that is read in place.

A store lists its files and opens them. Files come from strangers: names that lead out of the store, links to elsewhere,
devices, pipes, encrypted and absurdly compressed entries are never opened but named with the reason, and nothing is
ever extracted to the disk.
"""

from __future__ import annotations

import os
import stat
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, final

from ..errors import UndiffuseError

MAX_BYTES = 100_000_000
MAX_ENTRIES = 1_000_000
MAX_RATIO = 200
JUNK = frozenset(("thumbs.db", "desktop.ini", "__macosx"))


class BadFile(UndiffuseError):
    """This file cannot be used; the message is the reason, without the name of the file."""


@dataclass(frozen=True)
class File:
    """A file of a store.

    ``path``   below the root, with ``/`` between the folders
    ``size``   in bytes
    ``stamp``   changes when the file does: its modification time, or its checksum in an archive
    ``place``   where the store finds it: the offset in a tar file, the number of a row
    """

    path: str
    size: int
    stamp: int
    place: int = 0

    @property
    def extension(self) -> str:
        return os.path.splitext(self.path)[1][1:].lower()


def printable(name: str) -> str:
    """``name`` on one line: line breaks, text-direction marks and bytes that are not UTF-8 are escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode() for char in name
    )


class Store(ABC):
    """Files by name. ``name`` is what messages call it; ``chosen``: every file is meant, whatever its extension."""

    name: str
    chosen: bool = False

    @abstractmethod
    def entries(self) -> list[tuple[File, str]]:
        """Every file, and why it must not be opened (empty if it may be). A folder that cannot be entered is listed
        with a ``/`` at its end."""

    @cached_property
    def listing(self) -> list[tuple[File, str]]:
        """:meth:`entries`, sorted by path, without hidden files and system litter."""
        visible = [entry for entry in self.entries() if not _litter(entry[0].path)]
        return sorted(visible, key=lambda entry: os.fsencode(entry[0].path))

    @abstractmethod
    def open(self, file: File) -> BinaryIO:
        """A seekable stream of its bytes. Raises :class:`BadFile`, also if the file has changed since it was listed."""

    def read(self, file: File, most: int | None = None) -> bytes:
        """All bytes of a file. Raises :class:`BadFile` if there are more than ``most``."""
        self.check(file, most)
        with self.open(file) as stream:
            return stream.read(file.size)

    def check(self, file: File, most: int | None = None) -> None:
        """Raises :class:`BadFile` for a file of more than ``most`` bytes (:data:`MAX_BYTES`)."""
        most = MAX_BYTES if most is None else most
        if file.size > most:
            raise BadFile(f"{file.size / 1e6:,.0f} MB, at most {most / 1e6:,.0f} MB are read")

    def fact(self, file: File) -> str:
        """What a fingerprint keeps of a file: besides name, size and stamp, the bytes at both of its ends."""
        with self.open(file) as stream:
            head = stream.read(4096)
            stream.seek(max(0, file.size - 4096))
            ends = zlib.crc32(stream.read(4096), zlib.crc32(head))
        return f"{file.path}\0{file.size}\0{file.stamp}\0{ends}"


def _litter(path: str) -> bool:
    return any((part.startswith(".") and part != "..") or part.lower() in JUNK for part in path.split("/"))


@final
class Folder(Store):
    """A folder and those below it. Links are followed inside it only, and each folder is visited once."""

    def __init__(self, root: str | Path) -> None:
        self.name = printable(str(root))
        self.root = Path(root).resolve()

    def entries(self) -> list[tuple[File, str]]:
        blocked: list[tuple[File, str]] = []
        paths = self._walk(blocked)
        return [self._status(path) for path in paths] + blocked

    def open(self, file: File) -> BinaryIO:
        # A pipe would block: it is never waited for.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            handle = os.open(os.path.join(self.root, file.path), flags)
        except OSError as error:
            raise BadFile((error.strerror or "cannot be opened").lower()) from error
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or (status.st_size, status.st_mtime_ns) != (file.size, file.stamp):
            os.close(handle)
            raise BadFile("the file has changed since it was found")
        return os.fdopen(handle, "rb")

    def _status(self, path: str) -> tuple[File, str]:
        """The file, and why it must not be opened (empty if it may be)."""
        full = os.path.join(self.root, path)
        nothing = File(path, 0, 0)  # what is wrong with a file is said instead of opening it
        if os.path.islink(full) and not Path(os.path.realpath(full)).is_relative_to(self.root):
            return nothing, "a link to outside of the folder: copy the file"
        try:
            status = os.stat(full)
        except OSError as error:
            return nothing, "a link that leads nowhere" if os.path.islink(full) else str(error.strerror)
        if not stat.S_ISREG(status.st_mode):
            return nothing, "not a regular file"
        if status.st_size == 0:
            return nothing, "the file is empty"
        return File(path, status.st_size, status.st_mtime_ns), ""

    def _walk(self, blocked: list[tuple[File, str]]) -> list[str]:
        """Paths of files. Real folders first, links to folders after them, each once."""
        found: list[str] = []
        seen: set[tuple[int, int]] = set()
        folders, links = [""], []
        while folders or links:
            folder = folders.pop() if folders else links.pop(0)
            full = os.path.join(self.root, folder)
            try:
                status = os.stat(full)
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                children = sorted(os.scandir(full), key=lambda child: os.fsencode(child.name))
            except OSError as error:
                blocked.append((File(f"{folder}/", 0, 0), f"the folder cannot be read: {error.strerror}"))
                continue
            for child in children:
                if _litter(child.name):
                    continue
                path = f"{folder}/{child.name}" if folder else child.name
                if child.is_dir(follow_symlinks=False):
                    folders.append(path)
                elif child.is_dir():
                    if Path(os.path.realpath(child.path)).is_relative_to(self.root):
                        links.append(path)
                    else:
                        blocked.append((File(f"{path}/", 0, 0), "a link to a folder outside: copy it"))
                else:
                    found.append(path)
        return found


class Archive(Store, ABC):
    """What zip and tar files have in common: every entry is judged by its name and kind before it is opened."""

    def __init__(self, path: Path) -> None:
        self.name = printable(str(path))
        self.path = path

    @abstractmethod
    def stored(self) -> list[tuple[File, str]]:
        """Every entry but folders, and what is wrong with its kind (empty if nothing)."""

    def entries(self) -> list[tuple[File, str]]:
        judged, seen = [], set()
        for file, reason in self.stored():
            reason = reason or _bad_name(file.path) or ("" if file.size else "the file is empty")
            reason = reason or ("a second entry of that name" if file.path in seen else "")
            seen.add(file.path)
            judged.append((file, reason))
        return judged

    def broken(self, error: Exception) -> UndiffuseError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return UndiffuseError(f"{self.name}: the archive is damaged ({reason}); make it again")

    def too_many(self, count: int) -> None:
        if count > MAX_ENTRIES:
            raise UndiffuseError(f"{self.name}: more than {MAX_ENTRIES:,} entries; split the archive")


def _bad_name(path: str) -> str:
    parts = path.split("/")
    if ".." in parts or path.startswith("/") or "\\" in path or "\0" in path or ":" in parts[0]:
        return "a name that leads out of the archive"
    if any(len(os.fsencode(part)) > 255 for part in parts):
        return "a name of more than 255 bytes"
    return ""


@final
class Zip(Archive):
    """A zip file: entries stored or deflated."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._zip = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise self.broken(error) from error
        self._infos = [info for info in self._zip.infolist() if not info.is_dir()]
        self.too_many(len(self._infos))

    def stored(self) -> list[tuple[File, str]]:
        listed = []
        for place, info in enumerate(self._infos):
            kind = stat.S_IFMT(info.external_attr >> 16) if info.create_system == 3 else 0
            reason = ""
            if kind not in (0, stat.S_IFREG):
                reason = "not a regular file"
            elif info.flag_bits & 1:
                reason = "encrypted"
            elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                reason = "compressed in another way than deflate"
            elif info.file_size > MAX_RATIO * max(info.compress_size, 1):
                reason = f"compressed to less than 1/{MAX_RATIO} of its size"
            listed.append((File(info.orig_filename, info.file_size, info.CRC, place), reason))
        return listed

    def open(self, file: File) -> BinaryIO:
        self.check(file)
        try:  # reading to the end checks the checksum; opening, that the directory tells the truth
            with self._zip.open(self._infos[file.place]) as stream:
                data = stream.read(file.size + 1)
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
            raise BadFile(f"damaged: {' '.join(str(error).split())[:100] or type(error).__name__}") from error
        if len(data) != file.size:
            raise BadFile("damaged: not as long as the directory of the archive says")
        return BytesIO(data)


@final
class Tar(Archive):
    """A tar file without compression: only then can any entry be read without reading those before it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if self._bytes(0, 2) in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5"):
            raise UndiffuseError(f"{self.name}: a compressed tar file cannot be read in place; decompress it first")
        self._members: list[tarfile.TarInfo] = []
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    self._members.append(member)
                    self.too_many(len(self._members))
                end = archive.offset
        except (OSError, tarfile.TarError, ValueError, EOFError) as error:
            raise self.broken(error) from error
        # tarfile takes a damaged header for the end, and would be silent about all that follows
        if self._bytes(end, 512).strip(b"\0"):
            raise UndiffuseError(f"{self.name}: the archive is damaged at byte {end:,}; make it again")

    def stored(self) -> list[tuple[File, str]]:
        length = self.path.stat().st_size
        listed = []
        for member in self._members:
            if member.isdir():
                continue
            reason = ""
            if not member.isreg() or member.issparse():
                reason = "not a regular file"
            elif member.offset_data + member.size > length:
                reason = "truncated: the archive ends inside it"
            path = member.name.removeprefix("./")
            listed.append((File(path, member.size, int(member.mtime), member.offset_data), reason))
        return listed

    def open(self, file: File) -> BinaryIO:
        self.check(file)
        data = self._bytes(file.place, file.size)
        if len(data) != file.size:
            raise BadFile("truncated: the archive has become shorter")
        return BytesIO(data)

    def _bytes(self, start: int, count: int) -> bytes:
        with self.path.open("rb") as stream:  # one of its own: threads read at the same time
            stream.seek(start)
            return stream.read(count)
