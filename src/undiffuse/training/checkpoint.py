"""Checkpoints: one folder a step, written so that a crash at any moment leaves the last complete one loadable.

    checkpoints/step-00001000/
      weights.safetensors  ema.safetensors  optimiser.safetensors  state.json
      manifest.json          written last: size and SHA-256 of each of the others

The folder is written under another name in the same place, every file flushed to the disk, and renamed when it is
complete; older ones are removed only after that. There is no pointer to the latest: it is the highest step whose
manifest verifies, so one flipped bit is found and the checkpoint before is used. Nothing in it can run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, final

from safetensors.torch import save as safetensors_bytes

from ..config import load_json, sync_folder
from ..errors import UndiffuseError, UndiffuseWarning
from ..weights import read_weights
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


def save(folder: Path, snapshot: Snapshot, run: Mapping[str, Any], keep: int) -> Path:
    """Write a checkpoint, then remove all but the ``keep`` newest; returns its folder.

    ``run`` is what the run wants to remember beside the trainer's state, JSON values. When this returns, the checkpoint
    is on the disk. Raises ``OSError`` (disk full, no permission) with nothing left behind and the older ones untouched.
    """
    step = snapshot.numbers["step"]
    folder.mkdir(parents=True, exist_ok=True)
    final_path = folder / f"step-{step:08d}"
    working = folder / f".tmp-{step}-{os.getpid()}"
    state = {"format": FORMAT, "groups": list(snapshot.tensors), "trainer": snapshot.numbers, **run}
    clean(folder)
    try:
        working.mkdir()
        files = {}
        for group, tensors in snapshot.tensors.items():
            cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            files[f"{group}.safetensors"] = _write(working / f"{group}.safetensors", safetensors_bytes(cpu))
        files["state.json"] = _write(working / "state.json", _json(state))
        _write(working / MANIFEST, _json({"format": FORMAT, "step": step, "files": files}))
        sync_folder(working)
        if final_path.exists():  # one that does not verify, or this loop would have begun after it
            final_path.rename(folder / f".trash-{step}-{os.getpid()}")
        working.rename(final_path)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise
    prune(folder, keep)
    return final_path


def newest(folder: Path) -> Checkpoint | None:
    """The highest step whose manifest verifies; warns of each later one that does not."""
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
    manifest = load_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UndiffuseError(f"{path / MANIFEST}: not a manifest of format {FORMAT}")
    files, step = manifest.get("files"), manifest.get("step")
    if not isinstance(files, dict) or not isinstance(step, int) or path.name != f"step-{step:08d}":
        raise UndiffuseError(f"{path / MANIFEST}: does not belong to this checkpoint")
    present = {entry.name for entry in path.iterdir()} - {MANIFEST}
    if present != set(files):
        names = ", ".join(sorted(present ^ set(files)))
        raise UndiffuseError(f"{path}: files are missing or do not belong there ({names})")
    for name, stated in files.items():
        if stated != _seal((path / name).read_bytes()):
            raise UndiffuseError(f"{path / name}: damaged (its SHA-256 is not the one in {MANIFEST})")
    state = load_json(path / "state.json")
    if state["trainer"]["step"] != step:
        raise UndiffuseError(f"{path / 'state.json'}: of another step")
    return Checkpoint(path, step, state)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the ``keep`` newest, and litter; a failure to remove is only a warning."""
    for path in listed(folder)[: -max(1, keep)]:
        trash = folder / f".trash-{path.name}-{os.getpid()}"
        try:
            path.rename(trash)  # it stops being a checkpoint at once, not file by file
            shutil.rmtree(trash)
        except OSError as error:
            warnings.warn(f"{path}: an old checkpoint could not be removed ({error})", UndiffuseWarning, stacklevel=2)
    clean(folder)


def clean(folder: Path) -> None:
    """Remove what killed processes left behind. Only for the holder of the run's :class:`Lock`."""
    for path in [*folder.glob(".tmp-*"), *folder.glob(".trash-*")]:
        shutil.rmtree(path, ignore_errors=True)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, allow_nan=False).encode()


def _write(path: Path, content: bytes) -> dict[str, Any]:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return _seal(content)


def _seal(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


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
