"""Several processes train as one: the result is a function of the global batch alone. Real processes, gloo, CPU."""

from __future__ import annotations

import json
import os
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

from team_worker import DRAWN, UPDATES, VARIANTS, chosen, judged, state, train, train_points, wait_for
from training_laws import points
from undiffuse.commands.sample import sample
from undiffuse.config import load_json
from undiffuse.distributed import ALONE, Team, environment
from undiffuse.errors import UndiffuseError
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
    np.save(folder / "points.npy", np.random.default_rng(0).normal(size=(200, 2)))
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
def test_RS5_a_run_of_two_processes_goes_on_with_one(variant: str, team: Path) -> None:
    found = checkpoint.newest(team / f"{variant}-checkpoints")
    assert found is not None
    resumed, straight = (Trainer(points(), chosen(), seed=3) for _ in range(2))
    resumed.restore(found.snapshot(), str(found.path))
    assert resumed.step == UPDATES
    train(resumed, 2)
    train(straight, UPDATES + 2)
    close(state(resumed), state(straight))


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


@pytest.mark.parametrize("name", DRAWN)
def test_two_processes_write_the_samples_of_one_to_the_last_byte(name: str, team: Path, tmp_path: Path) -> None:
    sample(team / "model", number=DRAWN[name], batch_size=2, seed=5, out=tmp_path / name, device="cpu")
    assert (team / name).read_bytes() == (tmp_path / name).read_bytes()


def test_two_processes_judge_the_samples_that_one_would(team: Path, tmp_path: Path) -> None:
    alone = judged(team, tmp_path / "judged")
    assert [facts(team, rank)["judged"] for rank in range(SIZE)] == [alone, alone]
    ours, theirs = (next(folder.glob("samples-*.npy")) for folder in (tmp_path / "judged", team / "judged"))
    assert ours.name == theirs.name
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_file_that_cannot_be_written_is_refused_on_all(team: Path) -> None:
    first, second = (facts(team, rank)["refused"] for rank in range(SIZE))
    assert "write a .png" in first[1]
    assert (first[0], second) == (False, [True, "process 0 of 2 has failed"])


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 7, 64, 100])
def test_every_sample_is_somebodys_in_whole_batches(size: int, count: int) -> None:
    parts = [list(Team(rank, size).mine(range(count), 8)) for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(count))
    assert all(not part or part[0] % 8 == 0 for part in parts)
    assert max(map(len, parts)) <= 8 * -(-count // (8 * size))


# --- the command line -------------------------------------------------------------------------------------------------


def test_mistakes_are_told_once(team: Path) -> None:
    first, second = (facts(team, rank)["mistake"] for rank in range(SIZE))
    assert (first[0], second[0]) == (2, 2)
    assert first[2].count("batch_sise") > 0 == second[2].count("batch_sise")
    assert not first[3]


def test_a_signal_to_one_process_stops_all(team: Path) -> None:
    (first, out, err), (second, silent, nothing) = (facts(team, rank)["stopped"] for rank in range(SIZE))
    assert (first, second) == (143, 143), (err, nothing)
    assert "2 processes" in " ".join(out.split())
    assert "saved; resume with the same command" in out
    assert (silent, nothing, err) == ("", "", "")
    status = load_json(team / "run" / "status.json")
    found = checkpoint.newest(team / "run" / "checkpoints")
    assert found is not None
    assert (status["state"], status["step"]) == ("stopped", found.step)


def test_the_same_command_goes_on_and_a_process_that_is_killed_ends_all(team: Path) -> None:
    found = checkpoint.newest(team / "run" / "checkpoints")
    assert found is not None
    resumed = start("-m", "undiffuse", *train_points(team / "run"))
    wait_for(team / "run" / "metrics.jsonl", found.step + 20)
    resumed[1].kill()
    begun = time.monotonic()
    (first, out, err), (second, _, _) = finish(resumed)
    assert time.monotonic() - begun < 30
    assert (first, second) == (2, -9)
    assert f"resumed    after update {found.step:,}" in out
    assert err.splitlines() == [
        "undiffuse: a process of this run has ended; the same command goes on from the last checkpoint"
    ]


def test_a_process_alone_is_a_team_of_one() -> None:
    assert ALONE.first
    assert ALONE.tell(3) == 3
    assert ALONE.gather(np.arange(3)).tolist() == [0, 1, 2]


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UndiffuseError, match="WORLD_SIZE=2 without RANK: start several processes with torchrun"):
        environment()
