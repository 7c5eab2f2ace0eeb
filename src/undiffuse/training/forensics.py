"""What happened in an update whose loss or gradient was not finite (trap R8).

    nan/
      report.json           step, seed, items, levels, first bad module, bad gradients, likely cause, last checkpoint
      batch.safetensors     indices, data and all that was drawn (times, noise, conditions) of the whole batch
      weights.safetensors   the weights just before: the update did not reach them

An update is a function of the weights, the batch and (seed, step), so nothing needs to be watched while all is well:
when it has happened, the update is computed again with every module's output looked at. That is :func:`replay`; the
folder lets anyone do it later, without the data.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from ..config import from_json, load_json, to_json
from ..data.base import ArrayDataset
from ..data.spec import DataSpec
from ..distributed import ALONE
from ..errors import UndiffuseError
from ..pipeline import REGISTRIES
from ..weights import check_fits, read_weights, shapes
from .draws import batch_indices, lent
from .recipe import Recipe, kind_of, share
from .tasks import Drawn, Task, task_of
from .trainer import Trainer

FOLDER = "nan"
EXTREME = 30.0
"""Data further from 0 than this, in model units, are a likely cause: their deviation is about 1."""
RUNAWAY = 1e3
"""A weight larger than this is a likely cause: those of networks that work are about 1 or less."""


@dataclass(frozen=True, eq=False)
class Scene:
    """All that one update computed with.

    Attributes:
        step: the update's number, from 1; seed: the run's.
        indices: ``[B]`` which items; x0: ``[B, ...]`` model units; drawn: noise and what else the task draws.
    """

    step: int
    seed: int
    indices: Tensor
    x0: Tensor
    drawn: Drawn

    def rows(self, rows: slice | list[int]) -> Scene:
        """Some of the samples."""
        return replace(self, indices=self.indices[rows], x0=self.x0[rows], drawn=self.drawn.rows(rows))


@dataclass(frozen=True)
class Autopsy:
    """What computing the update again showed.

    Attributes:
        step, seed: which update.
        repeated: whether it was not finite again.
        loss: of the batch; None where it is not finite.
        items: the items whose own loss or gradient is not finite.
        times: their times t; none where no noise levels are drawn.
        levels: how many of them are in each tenth of [0, 1].
        module: the first module whose output was not finite; None: all were.
        backward: going back from the loss, the first module whose output has a gradient that is not.
        gradients: the parameters whose gradient is not finite.
        cause: one line: what it probably was, and what to do.
    """

    step: int
    seed: int
    repeated: bool
    loss: float | None
    items: tuple[int, ...]
    times: tuple[float, ...]
    levels: tuple[int, ...]
    module: str | None
    backward: str | None
    gradients: tuple[str, ...]
    cause: str


# --- the replay -------------------------------------------------------------------------------------------------------


def scene(trainer: Trainer, step: int) -> Scene:
    """What update ``step`` (from 1) of a trainer computed with, on all processes together."""
    size = trainer.recipe.training.batch_size
    indices = batch_indices(trainer.seed, step - 1, size, len(trainer.dataset))
    x0, given = trainer.read(step - 1, ALONE)
    given = {name: values.to(trainer.device) for name, values in given.items()}
    drawn = trainer.task.drawn(trainer, given, step - 1, ALONE)
    where = torch.from_numpy(trainer.dataset.origin(indices))
    return Scene(step, trainer.seed, where, x0.to(trainer.device), drawn)


def replay(task: Task, module: nn.Module, scene: Scene) -> Autopsy:
    """Compute an update's loss and gradient again and say where they are not finite; changes nothing."""
    training, half = module.training, task.recipe.training.precision == "bf16"
    module.train()
    try:
        modules: list[str] = []
        backward: list[str] = []
        with _watched(module, modules, backward):
            each, gradients = _compute(task, module, scene, half)
        wrong = tuple(name for name, gradient in gradients.items() if not bool(gradient.isfinite().all()))
        rows = torch.nonzero(~each.isfinite()).flatten().tolist()
        if wrong and len(rows) in (0, len(each)):  # a loss may weigh its terms by all samples together
            rows = _culprits(task, module, scene, half, list(range(len(each)))) or rows
        squares = sum(float(gradient.double().square().sum()) for gradient in gradients.values())
        repeated = bool(wrong) or bool(rows) or squares > torch.finfo(torch.float32).max
        mean, times = float(each.mean()), scene.drawn.rows(rows).times
        result = Autopsy(
            step=scene.step,
            seed=scene.seed,
            repeated=repeated,
            loss=mean if mean < float("inf") else None,
            items=tuple(scene.indices[rows].tolist()),
            times=() if times is None else tuple(round(t, 6) for t in times.tolist()),
            levels=(0,) * 10 if times is None else tuple(torch.histc(times.float(), 10, 0, 1).long().tolist()),
            module=modules[0] if modules else None,
            backward=backward[0] if backward else None,
            gradients=wrong,
            cause="",
        )
        return replace(result, cause=_cause(task, module, scene, half, result, rows))
    finally:
        module.train(training)


def _compute(task: Task, module: nn.Module, scene: Scene, half: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each sample and the gradient of their mean, in the same parts as in training."""
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    device, losses = scene.x0.device, []
    has_dropout = any(isinstance(each, nn.Dropout) and each.p > 0 for each in module.modules())
    with lent(scene.seed, "dropout", scene.step - 1, device) if has_dropout else nullcontext():
        parts = min(task.recipe.training.accumulation, len(scene.x0))
        for part in (scene.rows(share(len(scene.x0), number, parts)) for number in range(parts)):
            drawn = part.drawn
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                each = task.loss(module, part.x0, *drawn.values, **drawn.named, **drawn.options)
            losses.append(each.detach())
            found = torch.autograd.grad(each.sum() / len(scene.x0), list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    total[name] += gradient
    return torch.cat(losses), total


def _culprits(task: Task, module: nn.Module, scene: Scene, half: bool, rows: list[int]) -> list[int]:
    """The samples whose own gradient is not finite, by halving."""
    _, gradients = _compute(task, module, scene.rows(rows), half)
    if all(bool(gradient.isfinite().all()) for gradient in gradients.values()):
        return []
    if len(rows) == 1:
        return rows
    middle = len(rows) // 2
    return [row for part in (rows[:middle], rows[middle:]) for row in _culprits(task, module, scene, half, part)]


@contextmanager
def _watched(whole: nn.Module, modules: list[str], backward: list[str]) -> Iterator[None]:
    """Note each module whose output, or whose output's gradient, is not finite, in the order of the computation."""

    def watch(name: str) -> Any:
        def arrived(gradient: Tensor) -> None:
            if not bool(gradient.isfinite().all()):
                backward.append(name)

        def left(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                if not bool(output.isfinite().all()):
                    modules.append(name)
                if output.requires_grad:
                    output.register_hook(arrived)

        return left

    hooks = [module.register_forward_hook(watch(name)) for name, module in whole.named_modules() if name]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _cause(task: Task, module: nn.Module, scene: Scene, half: bool, found: Autopsy, rows: list[int]) -> str:
    """The first of the known causes that fits."""
    for name, weight in module.state_dict().items():
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            return (
                f"{name} was not finite before this update: lower optimiser.lr, and continue from a checkpoint before"
            )
    if not found.repeated:
        return (
            "the same update is finite when computed again: a fault of the memory or the device, or a module with a "
            "state of its own"
        )
    reach = scene.x0[rows].flatten(1).abs().amax(1) if rows else scene.x0.flatten(1).abs().amax(1)
    if float(reach.max()) > EXTREME:
        worst = (rows or range(len(scene.x0)))[int(reach.argmax())]
        return (
            f"extreme data: item {int(scene.indices[worst])} reaches {float(reach.max()):.3g} in model units, where "
            "about 1 is usual: repair or remove it"
        )
    largest_name, largest = max(
        ((name, float(p.detach().abs().max())) for name, p in module.named_parameters() if p.numel()),
        key=lambda pair: pair[1],
    )
    if largest > RUNAWAY:
        return (
            f"the weights have run away ({largest_name} reaches {largest:.3g}): lower optimiser.lr or lengthen warm-up"
        )
    times = found.times
    if times and len(rows) < len(scene.x0) and (max(times) < 0.01 or min(times) > 0.99):
        model, objective = task.recipe.model, task.recipe.objective
        return (
            f"every bad sample is next to an end of the schedule (t = {min(times):.4g} to {max(times):.4g}), where "
            f"{kind_of(model.prediction)} prediction with weight {kind_of(objective.weight)} is too large: choose "
            "another prediction, weight or times"
        )
    if half:
        each, gradients = _compute(task, module, scene, half=False)
        if bool(each.isfinite().all()) and all(bool(g.isfinite().all()) for g in gradients.values()):
            return "bfloat16: the same update is finite in float32; train with --set training.precision=float32"
    if found.module:
        return (
            f"{found.module} returned values that are not finite, with ordinary data and weights: look at that module"
        )
    if found.gradients:
        return (
            f"every output is finite, but the gradient is not, first behind {found.backward or found.gradients[-1]}: "
            "look for a square root, a logarithm or a division at 0 there"
        )
    return "the loss or the gradient's length is too large for float32: lower optimiser.lr"


# --- the folder -------------------------------------------------------------------------------------------------------


def keep(trainer: Trainer, step: int, out: Path, last_good: Path | None) -> Autopsy:
    """Find out about update ``step`` (from 1) of a trainer and write ``out/nan``, over one that was there.

    The weights must still be those that the update began with, as they are after a bad update. Raises ``OSError``
    where it cannot be written.
    """
    seen = scene(trainer, step)
    found = replay(trainer.task, trainer.denoiser, seen)
    report = {
        **asdict(found),
        "last_good": str(last_good) if last_good else None,
        "skipped_before": trainer.skipped,
        "recipe": to_json(trainer.recipe, REGISTRIES),
        "spec": trainer.dataset.spec.to_json(),
        "history": _history(out / "metrics.jsonl"),
    }
    batch = {"indices": seen.indices, "x0": seen.x0, **trainer.task.written(seen.drawn)}
    working = out / f".{FOLDER}-{os.getpid()}"
    shutil.rmtree(working, ignore_errors=True)
    try:
        working.mkdir()
        (working / "report.json").write_text(json.dumps(_plain(report), indent=1, allow_nan=False), "utf-8")
        (working / "batch.safetensors").write_bytes(_bytes(batch))
        (working / "weights.safetensors").write_bytes(_bytes(trainer.denoiser.state_dict()))
        shutil.rmtree(out / FOLDER, ignore_errors=True)
        working.rename(out / FOLDER)
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return found


def investigate(out: str | os.PathLike[str], device: str = "cpu") -> tuple[dict[str, Any], Autopsy]:
    """What was written into ``out/nan`` of a run folder when it happened, and what a replay on ``device`` shows now.

    Raises :class:`UndiffuseError` where there is nothing, or something that is not whole.
    """
    folder = Path(out) / FOLDER
    if not folder.is_dir():
        raise UndiffuseError(f"{folder}: not there: every loss and gradient of this run was finite")
    report = load_json(folder / "report.json")
    try:
        recipe = from_json(Recipe, report["recipe"], str(folder / "report.json"), REGISTRIES)
        spec = DataSpec.from_json(report["spec"])
        step, seed = int(report["step"]), int(report["seed"])
        batch = {name: tensor.to(device) for name, tensor in read_weights(folder / "batch.safetensors").items()}
        task = _task_without_data(spec, recipe, folder)
        seen = Scene(step, seed, batch["indices"].cpu(), batch["x0"], task.read(batch))
    except (KeyError, TypeError) as error:
        raise UndiffuseError(f"{folder}: not whole ({error}); only the run that wrote it can write it again") from None
    module = task.build()
    weights = read_weights(folder / "weights.safetensors")
    check_fits(shapes(module.state_dict()), shapes(weights), str(folder / "weights.safetensors"))
    module.load_state_dict(weights)  # these may hold NaN: that is what is looked for
    return report, replay(task, module.to(device), seen)


def _task_without_data(spec: DataSpec, recipe: Recipe, folder: Path) -> Task:
    """What the run learned, for data of which only the spec is known."""
    try:
        return task_of(ArrayDataset(spec, np.zeros((0, *spec.original_shape), spec.dtype), None, name="none"), recipe)
    except UndiffuseError as error:
        raise UndiffuseError(
            f"{folder}: cannot be computed again without the data ({error}); report.json has what was found then"
        ) from None


def _history(path: Path, lines: int = 50) -> list[dict[str, Any]]:
    """Loss, learning rate and length of the gradient in the last lines of the metrics."""
    try:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()[-lines:]]
        return [{key: row.get(key) for key in ("step", "loss", "lr", "grad_norm")} for row in rows]
    except (OSError, ValueError, AttributeError):
        return []


def _bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _plain(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
