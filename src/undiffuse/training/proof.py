"""The proof that a run can be stopped: from its last checkpoint, some updates without a stop, and the same with one.

checkpoint --> k updates -------------------------------------> A
checkpoint --> k/2 updates --> disk --> new trainer --> the rest --> B         A = B, to the last bit
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from ..data import Dataset
from ..errors import UndiffuseError
from ..pipeline import resolve_device
from . import checkpoint
from .draws import batch_indices, draw, lent
from .held_out import divide
from .recipe import Plan, stored_recipe
from .trainer import Snapshot, Trainer


@dataclass(frozen=True)
class Proof:
    """What :func:`prove_resume` found.

    Attributes:
        checkpoint: from where; the run folder itself is not touched.
        step: updates done there.
        updates: how many were made, once without a stop and once with one in the middle.
        device: where.
        numbers: how many numbers were compared: weights, average, optimiser.
        differences: one line for each thing that differed; none is the proof.
        repeatable: whether the same updates, made twice without a stop, agree. If not, the device rounds differently
            from time to time (GPUs do), and differences say nothing about resuming.
    """

    checkpoint: Path
    step: int
    updates: int
    device: str
    numbers: int
    differences: tuple[str, ...]
    repeatable: bool

    @property
    def exact(self) -> bool:
        """Whether the stopped run is the straight one to the last bit."""
        return not self.differences


def prove_resume(run: str | Path, dataset: Dataset, *, updates: int = 4, device: str = "auto") -> Proof:
    """Prove on a user's own run that stopping it changes nothing.

    Reads the newest whole checkpoint of the run folder ``run`` and writes nothing there (the checkpoint in the middle
    goes to the system's temporary folder). A run that is finished is lengthened in memory, so that its learning rate is
    not 0 and the weights do move.

    Args:
        dataset: the data that the run trains on; others are refused.
        updates: how many to make, at least 2; the stop is after half of them.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.

    Raises:
        UndiffuseError: no checkpoint, other data, or a run that cannot be read.
        Diverged: the run itself is about to fail.
    """
    if updates < 2:
        raise UndiffuseError(f"updates={updates} must be at least 2: one before the stop and one after")
    folder = Path(run) / "checkpoints"
    found = checkpoint.newest(folder)
    if found is None:
        raise UndiffuseError(f"{folder}: no checkpoint to begin from; let the run reach its first one")
    try:
        identity = found.state["identity"]
        recipe = stored_recipe(identity, str(found.path))
        seed, fingerprint = identity["seed"], identity["dataset"]["fingerprint"]
    except (KeyError, TypeError) as error:
        raise UndiffuseError(f"{found.path}: does not say of which run it is ({error} is missing)") from None
    if fingerprint != dataset.fingerprint:
        raise UndiffuseError(f"{run}: was trained on other data, or on data that have changed since")
    device, begin = resolve_device(device), found.snapshot()
    dataset, _ = divide(dataset, recipe.training)

    def trainer(snapshot: Snapshot, where: Path) -> Trainer:
        made = Trainer(dataset, recipe, seed=seed, device=device, plan=Plan(None))
        made.restore(snapshot, str(where))
        return made

    def started() -> Trainer:
        made = trainer(begin, found.path)
        if made.plan.images is not None and made.images + updates * recipe.training.batch_size > made.plan.images:
            made.plan = Plan(made.images + 2 * updates * recipe.training.batch_size, made.images)
        return made

    straight, wanted = _advance(started(), updates)
    before, seen = _advance(started(), updates // 2)
    with tempfile.TemporaryDirectory(prefix="undiffuse-proof-") as temporary:
        checkpoint.save(Path(temporary), before.snapshot(), {}, keep=1)
        middle = checkpoint.newest(Path(temporary))
        assert middle is not None
        with lent(updates, "another process", 0):  # it has another global generator: nothing may depend on it
            after, rest = _advance(trainer(middle.snapshot(), middle.path), updates - updates // 2)
    differences = [*_told_apart(wanted, seen + rest), *_moved(straight.snapshot(), after.snapshot())]
    repeatable = True
    if differences:
        again, told = _advance(started(), updates)
        repeatable = told == wanted and not _moved(straight.snapshot(), again.snapshot())
    return Proof(
        checkpoint=found.path,
        step=found.step,
        updates=updates,
        device=str(straight.device),
        numbers=sum(tensor.numel() for each in straight.snapshot().tensors.values() for tensor in each.values()),
        differences=tuple(differences),
        repeatable=repeatable,
    )


_Seen = dict[str, str]


def _advance(trainer: Trainer, updates: int) -> tuple[Trainer, list[_Seen]]:
    """The trainer after so many updates, and what each did: data and draws, learning rate, loss, gradient."""
    seen = []
    for _ in range(updates):
        size, count, shape = trainer.recipe.training.batch_size, len(trainer.dataset), trainer.dataset.spec.shape
        draws = draw(trainer.seed, trainer.step, size, shape, trainer.device)
        indices = torch.from_numpy(batch_indices(trainer.seed, trainer.step, size, count))
        update = trainer.update()
        seen.append(
            {
                "update": str(update.step),
                "order of the data": _digest(indices),
                "draws": _digest(draws.times, draws.noise, draws.drop),
                "learning rate": update.lr.hex(),
                "loss": float(update.loss).hex(),
                "gradient norm": float(update.norm).hex(),
            }
        )
    return trainer, seen


def _told_apart(straight: list[_Seen], stopped: list[_Seen]) -> list[str]:
    """The first update in which anything was otherwise, and what."""
    for here, there in zip(straight, stopped, strict=True):
        names = [name for name in here if here[name] != there[name]]
        if names:
            return [f"update {here['update']}: {', '.join(names)}"]
    return []


def _moved(straight: Snapshot, stopped: Snapshot) -> list[str]:
    """The groups of tensors that are not the same, bit for bit, and other numbers of the state."""
    lines = []
    for group, tensors in straight.tensors.items():
        other = stopped.tensors[group]
        names = [name for name in tensors if name not in other or _digest(tensors[name]) != _digest(other[name])]
        if names or len(other) != len(tensors):
            lines.append(f"{group}: {len(names)} of {len(tensors)} tensors ({', '.join(names[:3])})")
    return lines + [f"{name} of the trainer" for name, n in straight.numbers.items() if stopped.numbers[name] != n]


def _digest(*tensors: Tensor) -> str:
    digest = sha256()
    for tensor in tensors:
        whole = tensor.detach().cpu().contiguous()
        digest.update(f"{whole.dtype} {tuple(whole.shape)}".encode())
        digest.update(whole.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
