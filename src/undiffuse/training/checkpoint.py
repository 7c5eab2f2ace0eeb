"""Checkpoints: one folder a step, written so that a crash at any moment leaves the last complete one loadable.

    checkpoints/step-00001000/
      weights.safetensors  ema.safetensors  optimiser.safetensors  state.json
      manifest.json          written last: size and SHA-256 of each of the others

The folder is written under another name in the same place, every file flushed to the disk, and renamed when it is
complete; older ones are removed only after that, and milestones never. There is no pointer to the latest: it is the
highest step whose manifest verifies, so one flipped bit is found and the checkpoint before is used. Nothing in it can
run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, final

from ..config import load_json, sync_folder
from ..errors import UndiffuseError, UndiffuseWarning
from ..weights import pieces, read_weights
from .trainer import Snapshot

FORMAT = 1
NAME = re.compile(r"step-(\d{8,})")
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest has been verified.

    Attributes:
        path: its folder.
        step: updates done.
        state: the JSON numbers of the trainer and of the run.
    """

    path: Path
    step: int
    state: dict[str, Any]

    def snapshot(self) -> Snapshot:
        """The trainer's state in it."""
        tensors = {group: read_weights(self.path / f"{group}.safetensors") for group in self.state["groups"]}
        return Snapshot(tensors, self.state["trainer"])


def save(folder: Path, snapshot: Snapshot, run: Mapping[str, Any], keep: int, milestone_every: int = 0) -> Path:
    """Write a checkpoint, then remove those that :func:`prune` would; returns its folder.

    ``run`` is what the run wants to remember beside the trainer's state, JSON values. When this returns, the checkpoint
    is on the disk. Raises ``OSError`` (disk full, no permission) with nothing left behind and the older ones untouched,
    and :class:`Diverged`, before anything is written, for a state that is not finite.
    """
    snapshot.check()
    step = snapshot.numbers["step"]
    folder.mkdir(parents=True, exist_ok=True)
    final_path = folder / f"step-{step:08d}"
    working = folder / f".tmp-{step}-{os.getpid()}"
    state = {**run, "format": FORMAT, "groups": list(snapshot.tensors), "trainer": snapshot.numbers}
    clean(folder)
    try:
        working.mkdir()
        files = {}
        for group, tensors in snapshot.tensors.items():
            files[f"{group}.safetensors"] = _write(working / f"{group}.safetensors", pieces(tensors))
        files["state.json"] = _write(working / "state.json", [_json(state)])
        _write(working / MANIFEST, [_json({"format": FORMAT, "step": step, "files": files})])
        sync_folder(working)
        if final_path.exists():  # one that does not verify, or this loop would have begun after it
            final_path.rename(folder / f".trash-{step}-{os.getpid()}")
        working.rename(final_path)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise
    prune(folder, step, keep, milestone_every)
    return final_path


def newest(folder: Path) -> Checkpoint | None:
    """The highest step whose manifest verifies; warns of each later one that does not.

    Raises ``PermissionError`` for one that may not be read: it may be whole, and going back would lose it.
    """
    for path in reversed(listed(folder)):
        try:
            return verify(path)
        except UndiffuseError as error:
            warnings.warn(f"{error}; using the checkpoint before", UndiffuseWarning, stacklevel=2)
    return None


def listed(folder: Path) -> list[Path]:
    """The checkpoint folders by step, whether or not they are whole."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def verify(path: Path) -> Checkpoint:
    """Read the manifest and check every file against it; raises :class:`UndiffuseError` that says what is wrong."""
    try:
        return _verify(path)
    except PermissionError:
        raise
    except OSError as error:
        raise UndiffuseError(f"{error.filename or path}: cannot be read ({error.strerror})") from None


def _verify(path: Path) -> Checkpoint:
    entries = list(path.iterdir())
    for entry in entries:
        if entry.is_symlink() or not entry.is_file():  # a pipe would be waited for, a link leads elsewhere
            raise UndiffuseError(f"{entry}: not a regular file")
    manifest = load_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UndiffuseError(f"{path / MANIFEST}: not a manifest of format {FORMAT}")
    files, step = manifest.get("files"), manifest.get("step")
    if not isinstance(files, dict) or type(step) is not int or path.name != f"step-{step:08d}":
        raise UndiffuseError(f"{path / MANIFEST}: does not belong to this checkpoint")
    present = {entry.name for entry in entries} - {MANIFEST}
    if present != set(files) or "state.json" not in files:
        names = ", ".join(sorted(present ^ set(files)))
        raise UndiffuseError(f"{path}: files are missing or do not belong there ({names})")
    for name, stated in files.items():
        size = (path / name).stat().st_size
        # The size first: a file that has grown is not read.
        if not isinstance(stated, dict) or stated.get("bytes") != size:
            raise UndiffuseError(f"{path / name}: damaged ({size:,} bytes, which is not what {MANIFEST} says)")
        with (path / name).open("rb") as file:
            if stated.get("sha256") != hashlib.file_digest(file, "sha256").hexdigest():
                raise UndiffuseError(f"{path / name}: damaged (its SHA-256 is not the one in {MANIFEST})")
    state = load_json(path / "state.json")
    try:
        whole = state["format"] == FORMAT and {f"{group}.safetensors" for group in state["groups"]} < set(files)
        if not whole or state["trainer"]["step"] != step:
            raise UndiffuseError(f"{path / 'state.json'}: of another step or format")
    except (KeyError, TypeError):
        raise UndiffuseError(f"{path / 'state.json'}: not the state of a trainer") from None
    return Checkpoint(path, step, state)


def prune(folder: Path, step: int, keep: int, milestone_every: int = 0) -> None:
    """Remove all but the ``keep`` newest up to ``step``, the milestones (multiples of ``milestone_every``), and litter.

    Later ones go too: ``step`` has just been written, so they were found damaged and the run went back before them. A
    failure to remove is only a warning.
    """
    steps = {int(path.name.removeprefix("step-")): path for path in listed(folder)}
    kept = {each for each in steps if each <= step and milestone_every and each % milestone_every == 0}
    kept.update(sorted(each for each in steps if each <= step)[-max(1, keep) :])
    for path in (steps[each] for each in steps if each not in kept):
        trash = folder / f".trash-{path.name}-{os.getpid()}"
        try:
            path.rename(trash)  # it stops being a checkpoint at once, not file by file
            _remove(trash)
        except OSError as error:
            warnings.warn(f"{path}: an old checkpoint could not be removed ({error})", UndiffuseWarning, stacklevel=2)
    clean(folder)


def clean(folder: Path) -> None:
    """Remove what killed processes left behind. Only for the holder of the run's :class:`Lock`."""
    for path in [*folder.glob(".tmp-*"), *folder.glob(".trash-*")]:
        with suppress(OSError):
            _remove(path)


def _remove(path: Path) -> None:
    """A folder, or whatever stands in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, allow_nan=False).encode()


def _write(path: Path, content: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file and flush it to the disk; its line in the manifest."""
    size, digest = 0, hashlib.sha256()
    with path.open("xb") as file:
        for piece in content:  # writing and hashing a large piece let other threads run
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


# --- one process a run ------------------------------------------------------------------------------------------------


@final
class Lock:
    """Held while a process trains into a run folder: a second one is refused.

    The operating system releases it with the process, however that ends, so a lock left by a kill is no obstacle.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self.file: IO[bytes] | None = None

    def __enter__(self) -> Lock:
        file = self.path.open("a+b")
        try:
            _lock(file)
        except OSError:
            file.seek(0)
            holder = file.read(200).decode("utf-8", "replace").strip() or "another process"
            file.close()
            raise UndiffuseError(
                f"{self.path.parent}: {holder} is training into this folder; stop it, or choose another --out"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
        self.file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.file is not None:
            self.file.close()


def held(folder: Path) -> bool:
    """Whether a process is training into this run folder now."""
    path = folder / ".lock"
    if not path.is_file():
        return False
    with path.open("rb+") as file:
        try:
            _lock(file)
        except OSError:
            return True
    return False


def _lock(file: IO[bytes]) -> None:
    """Take the lock or raise ``OSError`` at once."""
    if os.name == "nt":
        import msvcrt

        file.seek(1 << 30)  # a byte far behind the text, which stays readable
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        file.seek(0)
        return
    import fcntl

    fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
