"""Checkpoints: whole or not there, at whatever moment the process is killed or the disk is full."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from undiffuse.errors import UndiffuseError, UndiffuseWarning
from undiffuse.training import checkpoint
from undiffuse.training.trainer import Snapshot


def snapshot(step: int) -> Snapshot:
    numbers = torch.arange(20, dtype=torch.float32) + step
    tensors = {"weights": {"a": numbers, "b": numbers[:3].clone()}, "optimiser": {"a/step": torch.tensor(float(step))}}
    return Snapshot(tensors, {"step": step})


def save(folder: Path, step: int, keep: int = 2) -> Path:
    return checkpoint.save(folder, snapshot(step), {"seconds": 0.5 * step}, keep)


def newest_quietly(folder: Path) -> checkpoint.Checkpoint | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return checkpoint.newest(folder)


def step_of(folder: Path) -> int | None:
    found = checkpoint.newest(folder)
    return None if found is None else found.step


def test_what_is_saved_is_what_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    found = newest_quietly(tmp_path)
    assert found is not None
    assert (found.path, found.step, found.state["seconds"]) == (path, 7, 3.5)
    loaded, wanted = found.snapshot(), snapshot(7)
    assert loaded.numbers == wanted.numbers
    for group, tensors in wanted.tensors.items():
        assert set(loaded.tensors[group]) == set(tensors)
        assert all(torch.equal(loaded.tensors[group][name], tensor) for name, tensor in tensors.items())
    assert newest_quietly(tmp_path / "nothing") is None


def test_the_newest_is_the_highest_step_not_the_last_name_or_date(tmp_path: Path) -> None:
    for step in (5, 99_999_999, 100_000_000):
        os.utime(save(tmp_path, step, keep=9), (10**9 - step, 10**9 - step))
    assert [int(path.name[5:]) for path in checkpoint.listed(tmp_path)] == [5, 99_999_999, 100_000_000]
    assert step_of(tmp_path) == 100_000_000


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


FILES = ["weights.safetensors", "optimiser.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found_said_and_the_checkpoint_before_used(name: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.warns(UndiffuseWarning, match=r"step-00000002.*using the checkpoint before"):
            assert step_of(tmp_path) == 1
    file.write_bytes(whole)
    assert step_of(tmp_path) == 2


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda c: truncated(c / "weights.safetensors"),
    "empty": lambda c: (c / "weights.safetensors").write_bytes(b""),
    "missing": lambda c: (c / "weights.safetensors").unlink(),
    "one too many": lambda c: (c / "more").write_text("x"),
    "no manifest": lambda c: (c / "manifest.json").unlink(),
    "empty manifest": lambda c: (c / "manifest.json").write_text(""),
    "manifest of nothing": lambda c: (c / "manifest.json").write_text("{}"),
    "a list for a manifest": lambda c: (c / "manifest.json").write_text("[]"),
    "manifest of another step": lambda c: shutil.copy(c.parent / "step-00000001" / "manifest.json", c),
    "weights of another step": lambda c: shutil.copy(c.parent / "step-00000001" / "weights.safetensors", c),
    "another step under this name": lambda c: (shutil.rmtree(c), shutil.copytree(c.parent / "step-00000001", c)),
    "emptied": lambda c: [path.unlink() for path in c.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_never_used(damage: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    DAMAGE[damage](save(tmp_path, 2))
    with pytest.warns(UndiffuseWarning, match="using the checkpoint before"):
        assert step_of(tmp_path) == 1
    save(tmp_path, 2)  # training gets there again and replaces it
    assert newest_quietly(tmp_path) is not None
    assert step_of(tmp_path) == 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_nothing_is_taken_when_nothing_is_whole(tmp_path: Path) -> None:
    truncated(save(tmp_path, 1) / "state.json")
    with pytest.warns(UndiffuseWarning):
        assert step_of(tmp_path) is None


# --- trouble while writing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_at_any_moment_leaves_the_old_one_and_no_litter(
    kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fsync, every rename and every folder made: the n-th call of any of them fails, for every n."""
    save(tmp_path, 1)
    calls, fail_at = 0, 0

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == fail_at:
                raise OSError(kind, os.strerror(kind))
            return function(*args, **options)

        return call

    monkeypatch.setattr(os, "fsync", failing(os.fsync))
    monkeypatch.setattr(Path, "rename", failing(Path.rename))
    monkeypatch.setattr(Path, "mkdir", failing(Path.mkdir))
    failures = 0
    for attempt in range(1, 40):
        calls, fail_at = 0, attempt
        try:
            save(tmp_path, 2, keep=9)
            if calls < attempt:
                break
        except OSError:
            failures += 1
            names = {path.name for path in tmp_path.iterdir()}
            assert names <= {"step-00000001", "step-00000002"}
            # After the rename the new one is whole as well; before it there is only the old one.
            found = newest_quietly(tmp_path)
            assert found is not None
            assert found.step == max(int(name[5:]) for name in names)
        shutil.rmtree(tmp_path / "step-00000002", ignore_errors=True)
    assert failures >= 8  # two folders, four files, the folder, the rename, the parent
    fail_at = 0
    save(tmp_path, 3)
    assert step_of(tmp_path) == 3


@pytest.mark.skipif(os.name == "nt", reason="needs fork")
def test_trap_R7_kill_9_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """A process that saves without a pause is killed 25 times: what it acknowledged is there, verified, without a
    warning."""
    code = """
import os, random, signal, sys, time, warnings
from pathlib import Path
import torch
from undiffuse.training import checkpoint
from undiffuse.training.trainer import Snapshot

folder = Path(sys.argv[1])
weights = {"weights": {str(i): torch.full((2000,), float(i)) for i in range(8)}}
warnings.simplefilter("error")
pauses = random.Random(1)
last = 0
for _ in range(25):
    ready, write = os.pipe()
    child = os.fork()
    if child == 0:
        step = last
        while True:
            step += 1
            checkpoint.save(folder, Snapshot(weights, {"step": step}), {}, keep=1)
            os.write(write, b"x")
    os.close(write)
    acknowledged = last + len(os.read(ready, 1))
    time.sleep(pauses.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    acknowledged += len(os.read(ready, 1 << 20))
    os.close(ready)
    found = checkpoint.newest(folder)
    assert found is not None and acknowledged <= found.step <= acknowledged + 1, (found, acknowledged)
    assert torch.equal(found.snapshot().tensors["weights"]["7"], weights["weights"]["7"])
    last = found.step
print(last)
"""
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) >= 25
    save(tmp_path, 10**6, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-01000000"]  # and the litter is gone


# --- the lock ---------------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_and_a_stale_lock_taken_over(tmp_path: Path) -> None:
    with checkpoint.Lock(tmp_path):
        with pytest.raises(UndiffuseError, match=rf"process {os.getpid()} on .* is training into this folder"):
            checkpoint.Lock(tmp_path).__enter__()
        assert f"process {os.getpid()}" in (tmp_path / ".lock").read_text()  # the refused one has not touched it
    (tmp_path / ".lock").write_text("process 999999 on a machine that was switched off")
    with checkpoint.Lock(tmp_path):
        pass


def test_a_manifest_says_what_it_holds(tmp_path: Path) -> None:
    manifest = json.loads((save(tmp_path, 3) / "manifest.json").read_text())
    assert manifest["step"] == 3
    assert set(manifest["files"]) == {"weights.safetensors", "optimiser.safetensors", "state.json"}
