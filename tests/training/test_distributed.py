"""Several processes train as one: the result is a function of the global batch alone. Real processes, gloo, CPU."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from team_worker import UPDATES, VARIANTS, chosen, state, train
from training_laws import points
from undiffuse.config import load_json
from undiffuse.distributed import ALONE, Team, environment
from undiffuse.errors import UndiffuseError
from undiffuse.pipeline import Pipeline
from undiffuse.training import Trainer, batch_indices, checkpoint

SIZE = 2
TESTS = Path(__file__).parents[1]


def start(*command: str, **environment: str) -> list[subprocess.Popen[str]]:
    """The processes that torchrun would start, two torch imports cheaper."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    source = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(SIZE), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **common, "PYTHONPATH": source, "RANK": str(i), "LOCAL_RANK": str(i), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(SIZE)
    ]


def finish(processes: list[subprocess.Popen[str]], timeout: float = 120) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; none is left running."""
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have left what they did; a checkpoint of one process was there before."""
    folder = tmp_path_factory.mktemp("team")
    alone = Trainer(points(), chosen(), seed=3)
    alone.pipeline().save(folder / "model")
    train(alone, 2)
    checkpoint.save(folder / "checkpoints", alone.snapshot(), {}, keep=1)
    for code, _, stderr in finish(start(str(TESTS / "team_worker.py"), str(folder))):
        assert code == 0, stderr
    return folder


def facts(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"facts-{rank}.json").read_text())


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-6, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_train_what_one_does(variant: str, team: Path) -> None:
    """Weights, average, both moments, loss, clipped norm and learning rate of 1 x 8 and 2 x 4."""
    alone = Trainer(points(), chosen(*VARIANTS[variant]), seed=3)
    updates = train(alone, UPDATES)
    close(state(alone), load_file(team / f"{variant}-0.safetensors"))
    assert max(update["norm"] for update in updates) > 0.5  # clipping has been tested
    for rank in range(SIZE):
        for ours, theirs in zip(updates, facts(team, rank)[variant]["updates"], strict=True):
            assert theirs["lr"] == ours["lr"]
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
            assert theirs["norm"] == pytest.approx(ours["norm"], rel=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_processes_read_each_item_of_the_batch_once(variant: str, team: Path) -> None:
    read = [facts(team, rank)[variant]["read"] for rank in range(SIZE)]
    for step in range(UPDATES):
        together = [items[4 * step : 4 * step + 4] for items in read]
        assert [*together[0], *together[1]] == batch_indices(3, step, 8, 10).tolist()


def test_one_exchange_of_gradients_an_update_however_many_parts(team: Path) -> None:
    calls = facts(team)["parts"]["exchanges"]
    assert calls == sorted(set(calls))
    assert set(calls) == set(range(UPDATES))


@pytest.mark.parametrize("variant", ["ddp", "fsdp"])
def test_RS5_a_run_of_one_process_goes_on_with_two(variant: str, team: Path) -> None:
    alone = Trainer(points(), chosen(), seed=3)
    train(alone, UPDATES)
    close(state(alone), load_file(team / f"{variant}-resumed-0.safetensors"))
    assert facts(team)[f"{variant} resumed"]["step"] == UPDATES


@pytest.mark.parametrize("variant", ["ddp", "fsdp"])
def test_trap_E3_the_average_is_the_same_on_all_processes_after_a_resume(variant: str, team: Path) -> None:
    saved = checkpoint.newest(team / "checkpoints")
    assert saved is not None
    for rank in range(SIZE):
        for group, tensors in saved.snapshot().tensors.items():
            restored = load_file(team / f"{variant}-restored-{rank}.safetensors")
            for name, tensor in tensors.items():
                assert torch.equal(restored[f"{group}/{name}"], tensor)
    first, second = (load_file(team / f"{variant}-resumed-{rank}.safetensors") for rank in range(SIZE))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_divided_state_makes_a_whole_pipeline(team: Path) -> None:
    one, other = (np.load(team / f"pipeline-{rank}.npy") for rank in range(SIZE))
    alone = Trainer(points(), chosen(), seed=3)
    train(alone, UPDATES)
    np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(one, alone.pipeline().sample(4, seed=1, steps=3), atol=1e-4)


def test_what_is_not_finite_on_one_process_stops_all_before_it_reaches_the_weights(team: Path) -> None:
    for rank in range(SIZE):
        step, message = facts(team, rank)["diverged"]
        assert step == 1
        assert "not finite in update 2" in message


def test_a_batch_smaller_than_the_team_is_refused(team: Path) -> None:
    for rank in range(SIZE):
        assert "a batch of 1 cannot be divided among 2 processes" in facts(team, rank)["small"]


def test_what_processes_say_to_each_other(team: Path) -> None:
    first, second = (facts(team, rank) for rank in range(SIZE))
    for count in (1, 5, 6, 12):
        assert first[f"gather {count}"] == list(range(count))
        assert second[f"gather {count}"] == list(range(count))[-len(second[f"gather {count}"]) :]
    assert first["tell"] == second["tell"] == {"a": [1, "é"]}
    assert first["most"] == second["most"] == [1, 5]
    assert first["agree"] == [True, "process 1 of 2 has failed"]
    assert second["agree"] == [False, "the second one has failed"]


def test_samples_of_two_processes_are_those_of_one_to_the_last_bit(team: Path) -> None:
    alone = Pipeline.load(team / "model").draw(7, seed=5, batch_size=2).numpy()
    np.testing.assert_array_equal(np.load(team / "samples.npy"), alone)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 7, 64, 100])
def test_every_sample_is_somebodys_in_whole_batches(size: int, count: int) -> None:
    parts = [list(Team(rank, size).mine(range(count), 8)) for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(count))
    assert all(not part or part[0] % 8 == 0 for part in parts)
    assert max(map(len, parts)) <= 8 * -(-count // (8 * size))


# --- the command line -------------------------------------------------------------------------------------------------


def train_points(out: Path, *more: str) -> list[str]:
    words = ["train", "moons", "--recipe", "tiny", "--out", str(out), "--device", "cpu", "--batch-size", "8"]
    often = ["training.log_every=10", "training.checkpoint_every=50", "training.preview_every=0"]
    return ["-m", "undiffuse", *words, *(w for setting in often for w in ("--set", setting)), *more]


def wait_for(path: Path, step: int) -> None:
    until = time.monotonic() + 90
    while time.monotonic() < until:
        try:
            if json.loads(path.read_text().splitlines()[-1])["step"] >= step:
                return
        except (OSError, ValueError, IndexError, KeyError):
            pass
        time.sleep(0.02)
    raise AssertionError(f"{path}: update {step} has not come")


def test_a_signal_to_one_process_stops_all_and_one_process_goes_on(tmp_path: Path) -> None:
    processes = start(*train_points(tmp_path, "--steps", "100000"))
    wait_for(tmp_path / "metrics.jsonl", 20)
    processes[1].send_signal(signal.SIGTERM)
    (first, out, err), (second, silent, nothing) = finish(processes)
    assert (first, second) == (143, 143), (err, nothing)
    assert "2 processes" in " ".join(out.split())
    assert "saved; resume with the same command" in out
    assert (silent, nothing, err) == ("", "", "")
    status = load_json(tmp_path / "status.json")
    assert status["state"] == "stopped"
    found = checkpoint.newest(tmp_path / "checkpoints")
    assert found is not None
    assert found.step == status["step"]
    # The same command on one process: it goes on, and the one who is killed takes the other with it.
    resumed = start(*train_points(tmp_path, "--steps", "100000"))
    wait_for(tmp_path / "metrics.jsonl", found.step + 20)
    resumed[1].kill()
    begun = time.monotonic()
    (first, out, err), (second, _, _) = finish(resumed)
    assert time.monotonic() - begun < 30
    assert (first, second) == (2, -9)
    assert f"resumed    after update {found.step:,}" in out
    assert err.splitlines() == [
        "undiffuse: a process of this run has ended; the same command goes on from the last checkpoint"
    ]


def test_mistakes_are_told_once(tmp_path: Path) -> None:
    said = finish(start(*train_points(tmp_path / "r", "--set", "training.batch_sise=1")))
    assert [code for code, _, _ in said] == [2, 2]
    assert sum(err.count("batch_sise") > 0 for _, _, err in said) == 1
    assert not (tmp_path / "r").exists()


def test_a_process_alone_is_a_team_of_one() -> None:
    assert ALONE.first
    assert ALONE.tell(3) == 3
    assert ALONE.gather(np.arange(3)).tolist() == [0, 1, 2]


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UndiffuseError, match="WORLD_SIZE=2 without RANK: start several processes with torchrun"):
        environment()
