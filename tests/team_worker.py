"""What each process of tests/training/test_distributed.py does: ``python team_worker.py FOLDER``, as torchrun would.

Each scenario leaves files in the folder; the tests compare them with what one process computes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from training_laws import points, recipe
from undiffuse.commands import main as main_of_undiffuse
from undiffuse.commands.evaluate import evaluate
from undiffuse.commands.sample import sample
from undiffuse.config import override
from undiffuse.distributed import Team, joined
from undiffuse.errors import Deserted, UndiffuseError
from undiffuse.pipeline import REGISTRIES
from undiffuse.training import Diverged, Recipe, Trainer, checkpoint

UPDATES = 4


def chosen(*settings: str) -> Recipe:
    """Eight rows a batch, clipping that bites, conditions that are dropped."""
    base = recipe(points(), images=64, batch_size=8)
    return override(base, ["optimiser.clip=0.5", "objective.condition_dropout=0.3", *settings], REGISTRIES)


VARIANTS = {
    "ddp": ["training.shard=never"],
    "parts": ["training.shard=never", "training.accumulation=2"],
    "fsdp": ["training.shard=always"],
    "fsdp_parts": ["training.shard=always", "training.accumulation=2"],
}


DRAWN = {"seven.npy": 7, "one.npy": 1, "five.png": 5, "way.gif": 3}
"""Files of samples, and how many; of one batch the first process draws nothing."""


def state(trainer: Trainer) -> dict[str, Tensor]:
    snapshot = trainer.snapshot()
    return {
        f"{group}/{name}": tensor.clone().contiguous()
        for group, named in snapshot.tensors.items()
        for name, tensor in named.items()
    }


def train(trainer: Trainer, updates: int) -> list[dict[str, float]]:
    done = (trainer.update() for _ in range(updates))
    return [{"loss": float(u.loss), "norm": float(u.norm), "lr": u.lr} for u in done]


def count_exchanges(trainer: Trainer) -> list[int]:
    """How often DDP exchanges gradients."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    calls: list[int] = []

    def hook(group: Any, bucket):  # DDP reads annotations, and not as text
        calls.append(trainer.step)
        return allreduce_hook(group, bucket)

    ddp: Any = trainer.engine.loss
    ddp.register_comm_hook(None, hook)
    return calls


class Poisoned(nn.Module):
    """NaN on one process only."""

    def __init__(self, inner: nn.Module, call: int) -> None:
        super().__init__()
        self.inner, self.calls, self.call = inner, 0, call

    def forward(self, x: Tensor, label: Tensor, vector: Tensor | None = None) -> Tensor:
        self.calls += self.training
        y = self.inner(x, label, vector)
        return y * float("nan") if self.calls == self.call and self.training else y


def main(folder: Path) -> None:
    dataset = points()
    facts: dict[str, Any] = {}
    with joined("cpu") as (team, device):
        for name, settings in VARIANTS.items():
            trainer = Trainer(dataset, chosen(*settings), seed=3, device=device, team=team)
            read, batch = [], dataset.batch
            exchanges = count_exchanges(trainer) if name == "parts" else []
            object.__setattr__(dataset, "batch", lambda indices: (read.extend(map(int, indices)), batch(indices))[1])  # noqa: B023
            facts[name] = {"updates": train(trainer, UPDATES), "read": read, "exchanges": exchanges}
            object.__delattr__(dataset, "batch")
            save_file(state(trainer), folder / f"{name}-{team.rank}.safetensors")
            if not name.endswith("parts"):
                snapshot = trainer.snapshot()
                if team.first:
                    checkpoint.save(folder / f"{name}-checkpoints", snapshot, {}, keep=1)
                other = Trainer(dataset, chosen(*settings), seed=3, device=device, team=team)
                found = checkpoint.newest(folder / "checkpoints") if team.first else None
                other.restore(found.snapshot() if found else None, "here")
                save_file(state(other), folder / f"{name}-restored-{team.rank}.safetensors")
                facts[f"{name} resumed"] = {"updates": train(other, 2), "step": other.step}
                save_file(state(other), folder / f"{name}-resumed-{team.rank}.safetensors")
        # What is divided gives a whole pipeline on every process.
        trainer = Trainer(dataset, chosen("training.shard=always"), seed=3, device=device, team=team)
        train(trainer, UPDATES)
        np.save(folder / f"pipeline-{team.rank}.npy", trainer.pipeline().sample(4, seed=1, steps=3))
        shares(team, folder, facts)
        if team.rank == 1:
            poisoned = Trainer(dataset, chosen(), seed=3).denoiser
            poisoned.network = Poisoned(poisoned.network, 2)
        else:
            poisoned = Trainer(dataset, chosen(), seed=3).denoiser
            poisoned.network = Poisoned(poisoned.network, 99)
        trainer = Trainer(dataset, chosen(), seed=3, team=team, denoiser=poisoned)
        try:
            train(trainer, 3)
        except Diverged as error:
            facts["diverged"] = [trainer.step, str(error)]
        try:
            Trainer(dataset, chosen("training.batch_size=1"), team=team)
        except UndiffuseError as error:
            facts["small"] = str(error)
        command_line(team, folder / "run", facts)
    (folder / f"facts-{team.rank}.json").write_text(json.dumps(facts))


def shares(team: Team, folder: Path, facts: dict[str, Any]) -> None:
    """What processes say to each other, and sampling."""
    for count in (1, 5, 6, 12):
        mine = team.mine(range(count), 2)
        whole = team.gather(np.array(mine, dtype=np.uint16))
        facts[f"gather {count}"] = whole.tolist() if team.first else list(mine)
    facts["tell"] = team.tell({"a": [1, "é"]} if team.first else None)
    facts["most"] = team.most([team.rank, 5 - team.rank])
    try:
        with team.agree():
            if team.rank == 1:
                raise UndiffuseError("the second one has failed")
    except UndiffuseError as error:
        facts["agree"] = [type(error) is Deserted, str(error)]
    with team.agree():
        pass
    for name, count in DRAWN.items():
        sample(folder / "model", number=count, batch_size=2, seed=5, out=folder / name, device="cpu")
    try:
        sample(folder / "model", number=4, out=folder / "x.wav", device="cpu")
    except UndiffuseError as error:
        facts["refused"] = [type(error) is Deserted, str(error)]
    facts["judged"] = judged(folder, folder / "judged")


def judged(folder: Path, out: Path) -> float:
    """The Frechet distance of the model's samples."""
    found = evaluate(
        str(folder / "model"),
        against=str(folder / "points.npy"),
        number=40,
        batch_size=8,
        metrics="frechet",
        plan="uniform",
        device="cpu",
        out=out,
    )
    return found.metrics["frechet"]["value"]


def train_points(out: Path, *more: str) -> list[str]:
    """A run on the command line that goes on until it is stopped."""
    words = ["train", "moons", "--recipe", "tiny", "--out", str(out), "--device", "cpu", "--batch-size", "8"]
    often = ["training.log_every=10", "training.checkpoint_every=50", "training.preview_every=0"]
    often += ["training.precision=float32", "training.compile=never"]
    return [*words, "--steps", "100000", *(w for setting in often for w in ("--set", setting)), *more]


def wait_for(path: Path, step: int) -> None:
    """Until the metrics have the line of this update."""
    until = time.monotonic() + 90
    while time.monotonic() < until:
        try:
            if json.loads(path.read_text().splitlines()[-1])["step"] >= step:
                return
        except (OSError, ValueError, IndexError, KeyError):
            pass
        time.sleep(0.02)
    raise AssertionError(f"{path}: update {step} has not come")


def command_line(team: Team, out: Path, facts: dict[str, Any]) -> None:
    """A mistake, and a run of which the second process is told to stop."""

    def said(name: str, words: list[str]) -> None:
        with redirect_stdout(StringIO()) as printed, redirect_stderr(StringIO()) as complained:
            try:
                code = main_of_undiffuse(words)
            except SystemExit as end:
                code = end.code
        facts[name] = [code, printed.getvalue(), complained.getvalue()]

    def stop() -> None:
        wait_for(out / "metrics.jsonl", 20)
        os.kill(os.getpid(), signal.SIGTERM)

    said("mistake", train_points(out, "--set", "training.batch_sise=1"))
    facts["mistake"].append(out.exists())
    if team.rank == 1:
        Thread(target=stop).start()
    said("stopped", train_points(out))


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
