"""A run that starts its other processes itself: what it says, how it ends, whether they are gone, and when it does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from team_worker import train_points, wait_for
from training_laws import points, recipe
from undiffuse.commands import main
from undiffuse.config import load_json
from undiffuse.crew import CALLED, Crew
from undiffuse.distributed import ALONE, Team
from undiffuse.errors import UndiffuseError, UndiffuseWarning
from undiffuse.training import Trainer, checkpoint, run_training, speed
from undiffuse.training.distributed import Leader
from undiffuse.training.speed import TeamTrial, choose_team, plain, team_before, team_size

TESTS = Path(__file__).parents[1]


def start(*words: str, threads: int = 2) -> subprocess.Popen[str]:
    """The command line, as a terminal would start it: the leader of a group of processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(TESTS.parent / "src")}
    return subprocess.Popen(
        [sys.executable, "-m", "undiffuse", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def crew_of(parent: int) -> list[int]:
    """The processes that a process has started to be its crew."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat, environment = (folder / "stat").read_text(), (folder / "environ").read_bytes()
        except OSError:
            continue
        if int(stat.rpartition(")")[2].split()[1]) == parent and f"{CALLED}=".encode() in environment:
            found.append(int(folder.name))
    return found


def gone(pids: list[int], seconds: float = 20) -> bool:
    """Whether they end soon."""
    until = time.monotonic() + seconds
    while any(Path("/proc", str(pid)).exists() for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, err


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")


@linux
def test_SG1_ctrl_c_stops_all_and_the_run_goes_on_as_it_was_and_a_crash_ends_it(tmp_path: Path) -> None:
    """One SIGINT to the group of the terminal; then the same command, whose second process is killed."""
    out = tmp_path / "run"
    run = start(*train_points(out, "--processes", "2"))
    wait_for(out / "metrics.jsonl", 20)
    crew = crew_of(run.pid)
    assert len(crew) == 1
    os.killpg(run.pid, signal.SIGINT)
    code, said, complained = finished(run)
    assert (code, complained) == (130, "")
    assert "2 processes, cpu, 1 thread each" in " ".join(said.split())
    assert said.splitlines()[-1].endswith("saved; resume with the same command")
    assert gone(crew, 0)
    found = checkpoint.newest(out / "checkpoints")
    assert found is not None
    assert (load_json(out / "status.json")["state"], found.state["machine"]["processes"]) == ("stopped", 2)

    run = start(*train_points(out))  # says nothing of processes: goes on with as many as it had
    wait_for(out / "metrics.jsonl", found.step + 20)
    (other,) = crew_of(run.pid)
    os.kill(other, signal.SIGKILL)
    code, said, complained = finished(run)
    assert f"resumed    after update {found.step:,}" in said
    assert (code, complained.splitlines()) == (
        2,
        ["undiffuse: process 1 of 2 was ended by SIGKILL; the same command goes on from the last checkpoint"],
    )


@linux
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_SG1_no_process_is_left_when_the_first_alone_is_told_to_end(number: int, tmp_path: Path) -> None:
    run = start(*train_points(tmp_path / "run", "--processes", "2"))
    wait_for(tmp_path / "run" / "metrics.jsonl", 20)
    crew = crew_of(run.pid)
    run.send_signal(number)
    code, said, complained = finished(run)
    assert complained == ""
    assert code == (143 if number == signal.SIGTERM else -9)
    assert ("saved; resume" in said) == (number == signal.SIGTERM)
    assert len(crew) == 1
    assert gone(crew)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_process_that_cannot_begin_says_why_and_the_run_goes_on_alone(
    tmp_path: Path, two_threads: None, capfd: pytest.CaptureFixture[str]
) -> None:
    crew = Crew(("trian",), 2)
    with pytest.warns(UndiffuseWarning, match=r"2 processes could not be started \(unknown verb 'trian': did you mean"):
        run_training(points(), recipe(points()), tmp_path / "run", device="cpu", crew=crew)
    assert capfd.readouterr().err == ""
    assert torch.get_num_threads() == 2
    state = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert state is not None
    assert (state.state["machine"]["processes"], state.state["machine"]["threads"]) == (1, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--processes", "0"], "--processes 0: at least 1, or auto"),
        (["--processes", "5"], "a batch of 4 cannot be divided among 5 processes"),
        (["--processes", "x"], "--processes"),
    ],
)
def test_numbers_of_processes_that_cannot_be(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["train", "moons", "--recipe", "tiny", "--batch-size", "4", "--out", str(out), *words]) == 2
    complained = capsys.readouterr().err
    assert message in complained
    assert len(complained.splitlines()) == 1
    assert not out.exists()


def test_torchrun_decides_where_it_has_started_several(tmp_path: Path) -> None:
    from undiffuse.training.run import check_crew

    asked = recipe(points())
    with pytest.raises(UndiffuseError, match="--processes 3: torchrun has started 2"):
        check_crew(3, asked, Team(0, 2), "cpu")
    check_crew(2, asked, Team(0, 2), "cpu")
    with pytest.raises(UndiffuseError, match="torchrun --nproc-per-node 2"):
        check_crew(2, asked, ALONE, "cuda")


# --- whether a team pays ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threads", "batch", "size"), [(1, 64, 1), (2, 64, 2), (2, 8, 1), (8, 32, 4), (6, 64, 6), (6, 40, 3), (96, 64, 8)]
)
def test_each_process_has_threads_and_images_enough(threads: int, batch: int, size: int) -> None:
    assert team_size(threads, batch) == size


def test_a_run_goes_on_with_as_many_processes_as_it_had(two_threads: None) -> None:
    def before(state: Any, size: int | None = None) -> int:
        return team_before(Leader(ALONE, lambda *values: pytest.fail("made"), Crew((), size)), state)

    def had(processes: Any, device: str = "cpu") -> dict[str, Any]:
        return {"machine": {"processes": processes, "device": device}}

    assert before(had(2)) == 2
    assert before(had(3)) == 1  # more than there are threads
    assert before(had(2, "cuda")) == 1
    assert before(had(1), size=2) == 2
    assert before(had(2), size=1) == 1
    assert before({}) == before(had("two")) == 1
    assert team_before(Leader(ALONE, lambda *values: pytest.fail("made")), had(2)) == 1


class Pretended:
    """A crew that is this very process."""

    size = None

    def __init__(self) -> None:
        self.teams: list[int] = []

    @contextmanager
    def team(self, size: int) -> Iterator[Team]:
        self.teams.append(size)
        yield ALONE
        self.teams.append(-size)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "thread_time", time.perf_counter)  # a machine of our own
    return tmp_path / "cache" / "speed"


def tried(share: float, monkeypatch: pytest.MonkeyPatch, crew: Any, hours: float = 1, **options: Any) -> str:
    """What is said where an update takes 0.1 s alone, and this share of it in a team."""
    data = points()
    asked = plain(recipe(data, images=int(16 * 10 * 3600 * hours), batch_size=16))
    leader = Leader(ALONE, lambda team, chosen: Trainer(data, asked), crew)

    def seconds(trainer: Trainer) -> float:
        return 0.1 * (share if trainer is leader.trainer else 1)

    monkeypatch.setattr(speed, "_timed", seconds)
    return choose_team(leader, data, asked, **options)


@pytest.mark.parametrize(("share", "stays"), [(0.6, True), (0.97, False), (1.4, False)])
def test_a_team_that_pays_stays_and_any_other_is_dismissed(
    share: float, stays: bool, cache: Path, monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    crew = Pretended()
    said = tried(share, monkeypatch, crew)
    assert said.startswith("2 processes: " if stays else "one process: ")
    assert f"takes {share:.0%} of the time of one by one" in said
    assert crew.teams == ([2] if stays else [2, -2])
    (file,) = cache.iterdir()
    assert TeamTrial(**json.loads(file.read_text())).share == pytest.approx(share)
    again = Pretended()  # known: none is started in vain
    assert tried(9, monkeypatch, again) == said
    assert again.teams == ([2] if stays else [])


def test_a_team_that_was_tried_among_others_is_tried_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    with monkeypatch.context() as busy:
        busy.setattr(time, "thread_time", lambda: time.perf_counter() / 2)
        said = tried(0.6, busy, Pretended())
    assert said.startswith("2 processes: ")
    assert said.endswith("(others held the cores, so this is measured again the next time)")
    assert not cache.exists()
    assert "others held" not in tried(0.6, monkeypatch, Pretended())
    assert len(list(cache.iterdir())) == 1


def test_nothing_is_started_for_short_runs_one_thread_or_where_it_is_decided(
    cache: Path, monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    crew = Pretended()
    assert tried(0.5, monkeypatch, crew, hours=0.1) == ""
    assert tried(0.5, monkeypatch, crew, minutes=9) == ""
    assert tried(0.5, monkeypatch, None) == ""
    assert tried(0.5, monkeypatch, crew, device="meta") == ""
    torch.set_num_threads(1)
    assert tried(0.5, monkeypatch, crew) == ""
    decided = Pretended()
    decided.size = 2  # type: ignore[assignment]
    torch.set_num_threads(2)
    assert tried(0.5, monkeypatch, decided) == ""
    assert crew.teams == decided.teams == []


def test_a_model_that_no_memory_would_hold_twice_is_not_tried(
    cache: Path, monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    crew = Pretended()
    monkeypatch.setattr(speed.memory, "limit", lambda device: int(1.5 * speed.memory.peak(device)))
    assert tried(0.5, monkeypatch, crew) == ""
    assert crew.teams == []


def test_a_trial_that_fails_leaves_a_process_alone(
    cache: Path, monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    data, crew = points(), Pretended()
    asked = plain(recipe(data, images=10**7, batch_size=16))
    monkeypatch.setattr(speed, "_timed", lambda trainer: 0.1)

    def broken(team: Team, chosen: Any) -> Trainer:
        raise UndiffuseError("a batch norm")

    leader = Leader(ALONE, broken, crew)  # type: ignore[arg-type]
    assert choose_team(leader, data, asked) == ""
    assert (crew.teams, leader.team) == ([2, -2], ALONE)
    assert not cache.exists()


def test_real_processes_are_tried_and_the_run_ends_as_any_other(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_threads: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """The whole of it with real processes: a trial, the decision, the run and the end."""
    monkeypatch.setattr(speed, "choose_team", partial(choose_team, least_seconds=0.0))
    monkeypatch.setenv("PYTHONPATH", str(TESTS.parent / "src"))
    words = ["train", "moons", "--recipe", "tiny", "--steps", "200", "--batch-size", "32", "--device", "cpu"]
    words += ["--set", "training.evaluate_every=0", "--set", "training.preview_every=0", "--seed", "1"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    said = capfd.readouterr()
    assert said.err == ""
    assert "an update by 2 processes that share the 2 threads takes" in " ".join(said.out.split())
    assert (torch.get_num_threads(), dist.is_initialized()) == (2, False)
    (trial,) = (kept for file in cache.iterdir() if "share" in (kept := json.loads(file.read_text())))
    pays = TeamTrial(**trial).pays
    found = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found.state["machine"]["processes"] == (2 if pays else 1)
    assert found.step == 200
