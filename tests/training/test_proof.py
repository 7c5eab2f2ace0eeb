"""The proof that a run can be stopped: it holds, touches nothing, and can fail."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from training_laws import points, recipe
from undiffuse.errors import UndiffuseError
from undiffuse.training import Progress, Trainer, checkpoint, prove_resume, run_training
from undiffuse.training.trainer import Snapshot


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    def progress(where: Progress) -> None:
        if where.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_training(points(), recipe(points()), tmp_path / "r", progress=progress)
    return tmp_path / "r"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_proved_and_not_touched(stopped: Path) -> None:
    before = contents(stopped)
    proof = prove_resume(stopped, points(), updates=5, device="cpu")
    assert proof.exact
    assert (proof.step, proof.updates, proof.device, proof.repeatable) == (3, 5, "cpu", True)
    model = Trainer(points(), recipe(points())).denoiser
    # weights, average, two moments and AdamW's count of steps
    assert proof.numbers == 4 * sum(p.numel() for p in model.parameters()) + len(list(model.parameters()))
    assert contents(stopped) == before


def test_a_finished_run_is_proved_with_a_learning_rate_that_moves_it(tmp_path: Path) -> None:
    run_training(points(), recipe(points()), tmp_path)
    rates = []
    update = Trainer.update

    def watched(self: Trainer) -> Any:
        done = update(self)
        rates.append(done.lr)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "update", watched)
        assert prove_resume(tmp_path, points(), device="cpu").exact
    assert min(rates) > 0


@pytest.mark.parametrize("group", ["weights", "ema", "optimiser"])
def test_what_a_checkpoint_loses_is_found(group: str, stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = checkpoint.save

    def forgetful(folder: Path, snapshot: Snapshot, *rest: Any, **options: Any) -> Path:
        lost = {name: torch.zeros_like(tensor) for name, tensor in snapshot.tensors[group].items()}
        return save(folder, Snapshot({**snapshot.tensors, group: lost}, snapshot.numbers), *rest, **options)

    monkeypatch.setattr(checkpoint, "save", forgetful)
    proof = prove_resume(stopped, points(), device="cpu")
    assert not proof.exact
    assert proof.repeatable
    assert any(line.startswith(f"{group}: ") for line in proof.differences)


def test_what_leans_on_the_global_generator_is_found(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Trainer.read

    def drawn(self: Trainer, step: int) -> Any:
        x0, cond = read(self, step)
        return x0 + 0.1 * torch.rand(()), cond

    monkeypatch.setattr(Trainer, "read", drawn)
    proof = prove_resume(stopped, points(), device="cpu")
    assert "loss" in proof.differences[0]
    assert not proof.repeatable


def test_what_cannot_be_proved_says_why(stopped: Path, tmp_path: Path) -> None:
    with pytest.raises(UndiffuseError, match="was trained on other data"):
        prove_resume(stopped, points(11))
    with pytest.raises(UndiffuseError, match="no checkpoint to begin from"):
        prove_resume(tmp_path / "nothing", points())
    with pytest.raises(UndiffuseError, match="at least 2"):
        prove_resume(stopped, points(), updates=1)
