"""Checkpoints: whole or not there, at whatever moment the process is killed or the disk is full."""

from __future__ import annotations

import errno
import hashlib
import json
import math
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
from undiffuse.training.trainer import Diverged, Snapshot


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


def test_CK10_the_newest_is_the_highest_step_not_the_last_name_or_date(tmp_path: Path) -> None:
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


def manifest(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def state(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Another state.json, and a manifest that vouches for it."""
    path = checkpoint / "state.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    sealed = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    manifest(checkpoint, files={**files, "state.json": sealed})


def instead(path: Path, make: Callable[[Path], Any]) -> None:
    """Something else under the name of a file; what was in it moves away."""
    path.rename(path.parent.parent / "elsewhere")
    make(path)


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
    "grown": lambda c: (c / "weights.safetensors").write_bytes((c / "weights.safetensors").read_bytes() + b"x"),
    "grown to a terabyte": lambda c: os.truncate(c / "weights.safetensors", 1 << 40),
    "zeros": lambda c: (c / "weights.safetensors").write_bytes(bytes((c / "weights.safetensors").stat().st_size)),
    "two files swapped": lambda c: (
        (c / "weights.safetensors").rename(c / "x"),
        (c / "optimiser.safetensors").rename(c / "weights.safetensors"),
        (c / "x").rename(c / "optimiser.safetensors"),
    ),
    "a pickle": lambda c: (c / "weights.safetensors").write_bytes(b"\x80\x04cos\nsystem\n."),
    "a link to a file elsewhere": lambda c: instead(
        c / "weights.safetensors", lambda p: p.symlink_to(c.parent / "elsewhere")
    ),
    "a link to itself": lambda c: instead(c / "state.json", lambda p: p.symlink_to(p)),
    "a pipe": lambda c: instead(c / "weights.safetensors", os.mkfifo),
    "a pipe for a manifest": lambda c: instead(c / "manifest.json", os.mkfifo),
    "a folder for a file": lambda c: instead(c / "state.json", Path.mkdir),
    "a file for the checkpoint": lambda c: (shutil.rmtree(c), c.write_text("x")),
    "manifest of a step below 0": lambda c: manifest(c, step=-1),
    "manifest of step true": lambda c: manifest(c, step=True),
    "manifest of another version": lambda c: manifest(c, format=2),
    "manifest without files": lambda c: manifest(c, files={}),
    "manifest with a list of files": lambda c: manifest(c, files=["weights.safetensors"]),
    "manifest with a path": lambda c: manifest(c, files={"../step-00000001/state.json": {}}),
    "manifest without hashes": lambda c: manifest(c, files=dict.fromkeys(FILES[:3], None)),
    "manifest of 11 MB": lambda c: (c / "manifest.json").write_text(" " * 11_000_000),
    "manifest nested 100,000 deep": lambda c: (c / "manifest.json").write_text("[" * 100_000),
    "manifest with a number twice": lambda c: (c / "manifest.json").write_text('{"step": 2, "step": 2}'),
    "manifest that is not a number": lambda c: (c / "manifest.json").write_text('{"step": NaN}'),
    "manifest in UTF-16": lambda c: (c / "manifest.json").write_text("{}", "utf-16"),
    "state of another step": lambda c: state(c, lambda s: s["trainer"].update(step=3)),
    "state of another format": lambda c: state(c, lambda s: s.update(format=0)),
    "state without a trainer": lambda c: state(c, lambda s: s.pop("trainer")),
    "state without groups": lambda c: state(c, lambda s: s.pop("groups")),
    "state with groups that are not there": lambda c: state(c, lambda s: s.update(groups=["../../x"])),
    "state that is a list": lambda c: state(c, lambda s: s.update(trainer=[])),
}


@pytest.mark.skipif(os.name == "nt", reason="pipes and links")
@pytest.mark.parametrize("damage", DAMAGE)
def test_CK4_a_damaged_checkpoint_is_never_used(damage: str, tmp_path: Path) -> None:
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


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="root may read everything")
def test_a_checkpoint_that_may_not_be_read_is_not_gone_back_before(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "weights.safetensors").chmod(0)
    with pytest.raises(PermissionError):
        checkpoint.newest(tmp_path)


def test_a_disk_that_cannot_read_a_checkpoint_costs_only_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    opened = Path.open

    def failing(path: Path, *rest: Any) -> Any:
        if path.match("step-00000002/weights.safetensors"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return opened(path, *rest)

    monkeypatch.setattr(Path, "open", failing)
    with pytest.warns(UndiffuseWarning, match=r"weights.safetensors: cannot be read \(Input/output error\)"):
        assert step_of(tmp_path) == 1


def test_CK5_A10_what_is_kept(tmp_path: Path) -> None:
    for step in range(1, 8):
        checkpoint.save(tmp_path, snapshot(step), {}, keep=2, milestone_every=3)
    assert [int(path.name[5:]) for path in checkpoint.listed(tmp_path)] == [3, 6, 7]


def test_CK5_A10_the_last_good_one_is_never_removed_for_damaged_later_ones(tmp_path: Path) -> None:
    """6 and 8 are damaged, the run goes on from 4 and saves 5: with keep=1 that is the one to keep, not the highest."""
    for step in (4, 6, 8):
        save(tmp_path, step, keep=9)
    for step in (6, 8):
        truncated(tmp_path / f"step-0000000{step}" / "weights.safetensors")
    with pytest.warns(UndiffuseWarning):
        assert step_of(tmp_path) == 4
    save(tmp_path, 5, keep=1)
    found = newest_quietly(tmp_path)
    assert found is not None
    assert [path.name for path in tmp_path.iterdir()] == [found.path.name] == ["step-00000005"]


def test_a_state_that_is_not_finite_is_never_saved_over_a_good_one(tmp_path: Path) -> None:  # NF-3
    save(tmp_path, 1)
    for bad in (math.nan, math.inf):
        poisoned = snapshot(2)
        poisoned.tensors["weights"]["a"][3] = bad
        with pytest.raises(Diverged, match="a is not finite after update 2"):
            checkpoint.save(tmp_path, poisoned, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_RS6_whatever_the_run_wants_to_remember_comes_back(tmp_path: Path) -> None:
    run = {"best": {"fid": 3.25, "step": 4, "of": [1, None, "x"]}, "seconds": 0.1, "trainer": "not the trainer's"}
    checkpoint.save(tmp_path, snapshot(1), run, keep=1)
    found = newest_quietly(tmp_path)
    assert found is not None
    assert {name: found.state[name] for name in ("best", "seconds")} == {"best": run["best"], "seconds": 0.1}
    assert found.snapshot().numbers == {"step": 1}
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.save(tmp_path, snapshot(2), {"best": math.nan}, keep=1)
    assert step_of(tmp_path) == 1


# --- trouble while writing --------------------------------------------------------------------------------------------


class Watched:
    """A file being written, each of whose writes is first told to someone."""

    def __init__(self, file: Any, tell: Callable[[bytes | memoryview], Any]) -> None:
        self.file, self.tell = file, tell

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, piece: bytes | memoryview) -> None:
        self.tell(piece)
        self.file.write(piece)

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> int:
        return self.file.fileno()


CALLS = ("open", "mkdir", "rename", "rmdir", "unlink", "fsync", "close", "scandir")
"""What saving asks of the system, as far as it goes through ``os``."""


def watch(patch: pytest.MonkeyPatch, tell: Callable[[str, tuple[Any, ...]], Any]) -> None:
    """``tell`` of every call that saving makes to the file system, before it is made."""

    def telling(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            tell(name, args)
            return function(*args, **options)

        return call

    for name in CALLS:
        patch.setattr(os, name, telling(name, getattr(os, name)))
    opened = Path.open

    def opening(path: Path, mode: str = "r", **options: Any) -> Any:
        if mode != "xb":
            return opened(path, mode, **options)
        tell("create", (path,))
        file = opened(path, mode, **options)
        return Watched(file, lambda piece: tell("write", (path, piece, file)))

    patch.setattr(Path, "open", opening)


@pytest.mark.skipif(os.name == "nt", reason="needs fork")
def test_CK1_CK5_a_process_that_dies_at_any_call_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Before every call to the file system of a save and its pruning, with keep=1; a write dies half done."""
    save(tmp_path / "before", 1, keep=1)
    died = 0
    for fatal in range(1, 200):
        folder = Path(shutil.copytree(tmp_path / "before", tmp_path / "now"))
        child = os.fork()
        if child == 0:
            calls = 0
            end = os._exit

            def dying(name: str, args: tuple[Any, ...]) -> None:
                nonlocal calls
                calls += 1
                if calls == fatal:  # noqa: B023
                    if name == "write":
                        args[2].write(args[1][: len(args[1]) // 2])
                        args[2].flush()
                    end(9)  # noqa: B023

            watch(pytest.MonkeyPatch(), dying)
            try:
                save(folder, 2, keep=1)
            except BaseException:
                end(1)
            end(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9)
        found = newest_quietly(folder)
        assert found is not None
        assert found.step in ((1, 2) if code else (2,))
        assert torch.equal(found.snapshot().tensors["weights"]["a"], snapshot(found.step).tensors["weights"]["a"])
        save(folder, 3, keep=1)
        assert [path.name for path in folder.iterdir()] == ["step-00000003"]  # no litter after the next save
        shutil.rmtree(folder)
        if not code:
            break
        died += 1
    else:
        pytest.fail("a save makes more calls than were tried")
    assert died > 30


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_CK3_what_is_acknowledged_is_durable(tmp_path: Path) -> None:
    """Written, then flushed, then the folder, then renamed, then the parent; and only then are older ones removed."""
    save(tmp_path, 1)
    events: list[tuple[str, str]] = []

    def note(name: str, args: tuple[Any, ...]) -> None:
        where = os.readlink(f"/proc/self/fd/{args[0]}") if name in ("fsync", "close") else str(args[0])
        events.append((name, Path(where).name))

    with pytest.MonkeyPatch.context() as patch:
        watch(patch, note)
        save(tmp_path, 2, keep=1)
    order = {event: max(i for i, each in enumerate(events) if each == event) for event in events}
    working = f".tmp-2-{os.getpid()}"
    for name in FILES:
        assert order["write", name] < order["fsync", name] < order["fsync", working]
    assert max(order["fsync", name] for name in FILES[:3]) < order["create", "manifest.json"]
    assert order["fsync", working] < order["rename", working] < order["fsync", tmp_path.name]
    assert order["fsync", tmp_path.name] < order["rename", "step-00000001"]
    assert {name for name, _ in events[: order["fsync", tmp_path.name]]}.isdisjoint({"unlink", "rmdir"})


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_DF1_a_full_disk_at_any_moment_leaves_the_old_one_and_no_litter(
    kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file opened or written, every fsync, every rename and every folder made: the n-th call of any of them
    fails, for every n."""
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

    opened = Path.open

    def opening(path: Path, mode: str = "r", **options: Any) -> Any:
        return Watched(failing(opened)(path, mode), failing(bytes)) if mode == "xb" else opened(path, mode, **options)

    monkeypatch.setattr(os, "fsync", failing(os.fsync))
    monkeypatch.setattr(Path, "rename", failing(Path.rename))
    monkeypatch.setattr(Path, "mkdir", failing(Path.mkdir))
    monkeypatch.setattr(Path, "open", opening)
    failures = 0
    for attempt in range(1, 60):
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
    # Two folders made, four files opened and flushed, seven pieces written, the folder, the rename, the parent.
    assert failures == 2 + 4 + 4 + 7 + 3
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


def test_CK7_a_second_process_is_refused_and_a_stale_lock_taken_over(tmp_path: Path) -> None:
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
