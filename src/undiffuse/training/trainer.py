"""The training loop.

    draw a batch, times and noise  ->  loss  ->  gradient  ->  AdamW  ->  average

One object holds everything that changes (weights, optimiser, average, the count of updates), and everything else is a
function of the count. So a trainer restored from :meth:`Trainer.snapshot` continues to the last bit as if it had never
stopped (on a CPU; law 5).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar, cast, final

import numpy as np
import torch
from torch import Tensor, nn

from ..data import Dataset
from ..denoiser import Denoiser
from ..distributed import ALONE, Team
from ..errors import UndiffuseError
from ..networks import constrain
from ..objectives import offset_noise
from ..weights import check_fits, shapes
from .draws import batch_indices, draw, generator, lent
from .ema import EMA
from .engine import check_divisible, divide, divides, exchange, whole
from .muon import make_optimiser, moments
from .recipe import Plan, Recipe, share
from .tasks import task_of


class Diverged(UndiffuseError):
    """The loss or a gradient was not finite; the update in which it happened changed nothing. Exit code 3."""

    exit_code = 3


@dataclass(frozen=True, eq=False)
class Update:
    """What one update did. ``loss`` and ``norm`` stay on the device: reading them waits for it.

    Attributes:
        step, images: updates and images so far, this one included.
        loss: mean over the batch.
        norm: length of the gradient, before clipping.
        lr: learning rate.
        skipped: loss or gradient was not finite; nothing but the counts has changed.
    """

    step: int
    images: int
    loss: Tensor
    norm: Tensor
    lr: float
    skipped: bool = False


@dataclass(frozen=True)
class Snapshot:
    """A trainer's whole state: named tensors in groups (``weights``, ``ema``, ``optimiser``), and JSON numbers."""

    tensors: dict[str, dict[str, Tensor]]
    numbers: dict[str, Any]

    def copy(self) -> Snapshot:
        """A copy on the CPU, which further training does not move."""
        tensors = {
            group: {name: tensor.detach().to("cpu", copy=True) for name, tensor in each.items()}
            for group, each in self.tensors.items()
        }
        return Snapshot(tensors, self.numbers)

    def check(self) -> None:
        """Raise :class:`Diverged` if a number is not finite."""
        for each in self.tensors.values():
            for name, tensor in each.items():
                if not bool(tensor.isfinite().all()):
                    raise Diverged(f"{name} is not finite after update {self.numbers['step']}: lower optimiser.lr")


P = ParamSpec("P")
R = TypeVar("R")


def together(method: Callable[Concatenate[Trainer, P], R]) -> Callable[Concatenate[Trainer, P], R]:
    """A method in which all processes of the team take part."""

    @wraps(method)
    def announced(self: Trainer, *values: P.args, **options: P.kwargs) -> R:
        with self.announce(method.__name__):
            return method(self, *values, **options)

    return announced


@final
class Trainer:
    """Trains one denoiser, or what else the recipe learns (:mod:`.tasks`).

    Args:
        dataset, recipe: what and how.
        seed: of the weights, the order of the data, times, noise and dropped conditions.
        device: where.
        plan: the length of the run, if not the recipe's.
        denoiser: the module that is trained, instead of the one that the recipe describes.
        team: the processes that train together (:func:`undiffuse.distributed.joined`); each makes the same calls of the
            methods marked ``together``.

    Attributes:
        step: updates done.
        plan: may be set between updates, when a run with a time budget learns its length.
        workers: threads that read coming batches, one each, while this one is computed; changes nothing but the speed.
        ema: the averaged weights, which are what is sampled from.
        skipped, skipped_in_row: updates that were not finite: in all, and up to the last update.
        half: matrix products are computed in bfloat16. What the recipe leaves open (``auto``) is float32, not compiled;
            :func:`.run_training` settles it first.
        divided: each process keeps a slice of the state only; :meth:`pipeline` and :meth:`snapshot` put it together.
        announce: entered with the name of each method marked ``together`` (the leader of a run tells the others).
    """

    def __init__(
        self,
        dataset: Dataset,
        recipe: Recipe,
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
        plan: Plan | None = None,
        denoiser: Denoiser | None = None,
        team: Team = ALONE,
        workers: int | None = None,
    ) -> None:
        if not len(dataset):
            raise UndiffuseError(f"{dataset.name}: no items to train on")
        check_divisible(recipe.training.batch_size, recipe.training.accumulation, team)
        self.dataset = dataset
        self.recipe = recipe
        self.seed = seed
        self.device = torch.device(device)
        self.team = team
        self.announce: Callable[[str], AbstractContextManager[None]] = lambda method: nullcontext()
        self.plan = plan or Plan(recipe.training.images)
        self.task = task_of(dataset, recipe)
        if denoiser is None:
            with lent(seed, "weights", 0):
                denoiser = cast(Denoiser, self.task.build())
        self.divided = recipe.codec is None and divides(recipe.training.shard, denoiser, team, self.device)
        if self.divided and recipe.training.compile == "always":
            raise UndiffuseError("training.compile=always with a state divided among processes: say never")
        if self.divided:
            self.denoiser = denoiser.train()
            self._undivided = copy.deepcopy(denoiser).float().eval().requires_grad_(False)  # on the CPU
        else:
            self.denoiser = denoiser.to(self.device).train()
        self.ema = EMA(self.denoiser)
        if self.divided:
            self.engine = divide(self.denoiser, self.device, team)
            divide(self.ema.denoiser, self.device, team)
            self.ema.attach(self.denoiser)
        else:
            compiled = recipe.training.compile == "always"
            self.engine = exchange(self.denoiser, team, compiled, self.task.loss)
        self.parameters = dict(self.denoiser.named_parameters())
        self.half = recipe.training.precision == "bf16"
        self.has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in denoiser.modules())
        if self.plan.images is not None:
            recipe.ema.check_horizon(self.plan.images, recipe.training.batch_size)
        self.optimiser = make_optimiser(self.denoiser, self.task.trunk(self.denoiser), recipe.optimiser)
        self.step = 0
        self.loss_sum = torch.zeros((), device=self.device)  # since the last call of mean_loss
        self.loss_count = 0
        self.skipped = self.skipped_in_row = 0
        self._first_bad = torch.zeros((), dtype=torch.int64, device=self.device)
        # A CPU has nothing else to read with than what computes; but files make it wait.
        self.workers = (1 if self.device.type != "cpu" or dataset.streams else 0) if workers is None else workers
        if self.workers < 0:
            raise UndiffuseError(f"workers={workers} must be at least 0")
        self._readers = ThreadPoolExecutor(max(1, self.workers), "undiffuse-data")
        self._coming: dict[int, Future[tuple[Tensor, dict[str, Tensor]]]] = {}

    # --- the loop -----------------------------------------------------------------------------------------------------

    @property
    def images(self) -> int:
        """Images seen so far."""
        return self.step * self.recipe.training.batch_size

    @property
    def finished(self) -> bool:
        """Whether the plan has been fulfilled."""
        return self.plan.images is not None and self.images >= self.plan.images

    def updates(self) -> Iterator[Update]:
        """Train to the end of the plan. Stop iterating to stop training."""
        while not self.finished:
            yield self.update()

    @together
    def update(self) -> Update:
        """One update. Raises :class:`Diverged` where the loss or the gradient is not finite (trap R8), unless the
        recipe skips such updates.

        On accelerators that is found at the next call of :meth:`check`, so that no update waits for the device; until
        then the optimiser does nothing. (A run that may skip does wait, since the next update depends on it.)
        """
        training = self.recipe.training
        size = training.batch_size
        x0, given = self._batch()
        drawn = self.task.drawn(self, given, self.step, self.team)
        lr = self.recipe.optimiser.rate(self.images, self.images + size, self.plan)
        for group in self.optimiser.param_groups:
            group["lr"] = lr

        total = torch.zeros((), device=self.device)
        masks = f"dropout {self.team.rank}" if self.team.rank else "dropout"
        with lent(self.seed, masks, self.step, self.device) if self.has_dropout else nullcontext():
            for number in range(training.accumulation):
                rows = share(len(x0), number, training.accumulation)
                last = number == training.accumulation - 1
                with nullcontext() if last else self.engine.quiet():
                    with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
                        part = drawn.rows(rows)
                        each = self.engine.loss(x0[rows], *part.values, **part.named, **part.options)
                    portion = each.sum() / size
                    (portion * self.team.size).backward()  # the exchange takes the mean over processes
                    total += portion.detach()

        self.team.sum(total)
        norm = whole(nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.optimiser.clip))
        bad = ~(norm.isfinite() & total.isfinite())
        self._first_bad = torch.where((self._first_bad == 0) & bad, self.step + 1, self._first_bad)
        # The optimiser looks at this flag on the device and does nothing if it is set (loss scaling uses it too).
        self.optimiser.found_inf = (self._first_bad > 0).float()  # pyrefly: ignore
        self.optimiser.step()
        constrain(self.denoiser, unless=self._first_bad)
        self.optimiser.zero_grad(set_to_none=True)
        skipped = training.nonfinite == "skip" and bool(self._first_bad)
        if skipped:
            self._skip()
        elif self.device.type == "cpu":
            self.check()
        self.step += 1
        if not skipped:
            self.skipped_in_row = 0
            self.task.after(self)
            self.ema.update(self.recipe.ema.decay(self.images, size))
            self.loss_sum += total
            self.loss_count += 1
            if self.step - self.skipped == 1:
                whole_denoiser = self._gathered(self.denoiser)
                with self.team.agree():
                    self.task.examine(self, whole_denoiser, x0, given)
        return Update(self.step, self.images, total, norm, lr, skipped)

    def noised(self, step: int, given: dict[str, Tensor], team: Team) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """``(t, eps, cond)`` of this process's share in a ``team`` of the batch of update ``step`` (from 0): times,
        noise, and of the ``given`` conditions those that are not dropped."""
        objective, size = self.recipe.objective, self.recipe.training.batch_size
        draws = draw(self.seed, step, size, self.dataset.spec.shape, self.device, offset=objective.offset_noise > 0)
        mine = share(size, team.rank, team.size)
        eps = draws.noise
        if draws.offset is not None:
            eps = offset_noise(eps, draws.offset, objective.offset_noise)
        t = objective.times(draws.times, self.denoiser.schedule)[mine]
        cond = given and self.denoiser.conditions.drop(given, draws.drop[mine], objective.condition_dropout)
        return t, eps[mine], cond

    @property
    def diverged_at(self) -> int:
        """The update whose loss or gradient was not finite and was not skipped; 0: none."""
        return int(self._first_bad)

    def _skip(self) -> None:
        """Count an update that was not finite and forgive it, or raise :class:`Diverged` where the recipe's rule says
        that these are too many. Both counts are part of the state: a resumed run decides alike."""
        training = self.recipe.training
        in_row, total = self.skipped_in_row + 1, self.skipped + 1
        if in_row > training.skip_in_row or total > training.skip_in_row + training.skip_share * (self.step + 1):
            self.check()
        self.skipped_in_row, self.skipped = in_row, total
        self._first_bad.zero_()

    def check(self) -> None:
        """Raise :class:`Diverged` if an update so far was not finite."""
        if step := self.diverged_at:
            before = f", {self.skipped} updates were skipped before it" if self.skipped else ""
            raise Diverged(
                f"the loss or its gradient is not finite in update {step} (seed {self.seed}{before}): lower "
                "optimiser.lr, lengthen optimiser.warmup, or look for extreme values in the data"
            )

    def mean_loss(self) -> float:
        """The mean loss since the last call, NaN if every update since was skipped; waits for the device."""
        mean = float(self.loss_sum) / self.loss_count if self.loss_count else float("nan")
        self.loss_sum = torch.zeros_like(self.loss_sum)
        self.loss_count = 0
        return mean

    @together
    def weights(self) -> Denoiser:
        """The denoiser as it is now, whole: the trainer's own, or a copy where the state is divided."""
        return self._gathered(self.denoiser)

    @together
    def pipeline(self, info: dict[str, Any] | None = None) -> Any:
        """What has been learned, ready to use: the averaged weights, as a :class:`.Pipeline` (or a codec, where that is
        learned). It shares them; training moves them on."""
        seen = {"images": self.images, "step": self.step, "seed": self.seed, "data": self.dataset.name}
        ema = {"ema_half_life": self.recipe.ema.half_life, "ema_ramp": self.recipe.ema.ramp}
        said = {**seen, **ema, "recipe": self.recipe.name, **(info or {})}
        return self.task.product(self, self._gathered(self.ema.denoiser), said)

    # --- the state ----------------------------------------------------------------------------------------------------

    @together
    def snapshot(self) -> Snapshot:
        """Everything that a restored trainer needs, between two updates; its tensors are the trainer's own. Raises
        :class:`Diverged` if an update so far was not finite."""
        self.check()
        kept = {
            f"{name}/{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimiser.state[parameter].items()
        }
        tensors = {"weights": self.denoiser.state_dict(), "ema": self.ema.denoiser.state_dict(), "optimiser": kept}
        if self.divided:
            tensors = {group: {name: whole(t).cpu() for name, t in named.items()} for group, named in tensors.items()}
        numbers = {
            "step": self.step,
            "plan": {"images": self.plan.images, "start": self.plan.start},
            "loss_sum": float(self.loss_sum),
            "loss_count": self.loss_count,
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
        }
        return Snapshot(tensors, numbers)

    @together
    def restore(self, snapshot: Snapshot | None, where: str) -> None:
        """Continue from a snapshot. ``where`` names its file in messages; if it does not fit, nothing changes.

        It may have been taken on any number of processes; only the first one of this team needs it (trap E3).
        """
        wanted = {
            "weights": self.denoiser.state_dict(),
            "ema": self.ema.denoiser.state_dict(),
            "optimiser": {
                f"{name}/{key}": like
                for name, p in self.parameters.items()
                for key, like in moments(self.optimiser, p).items()
            },
        }
        numbers = self.team.tell(snapshot.numbers if snapshot else None)
        with self.team.agree():
            try:
                step, plan, count = int(numbers["step"]), Plan(**numbers["plan"]), int(numbers["loss_count"])
                loss_sum = torch.tensor(float(numbers["loss_sum"]), dtype=torch.float32, device=self.device)
                # Checkpoints from before there was a rule to skip by have no such counts.
                skipped = int(numbers.get("skipped", 0)), int(numbers.get("skipped_in_row", 0))
                read = {group: snapshot.tensors[group] for group in wanted} if snapshot else {}
            except (KeyError, TypeError) as error:
                raise UndiffuseError(f"{where}: not the whole state of a trainer ({error})") from None
            for group, tensors in read.items():
                check_fits(shapes(wanted[group]), shapes(tensors), f"{where}/{group}")
                other = [name for name, like in wanted[group].items() if tensors[name].dtype != like.dtype]
                if other:
                    raise UndiffuseError(f"{where}/{group}: {other[0]} is {tensors[other[0]].dtype}")
        given = {
            group: {name: self.team.give(read[group][name] if read else None, like) for name, like in tensors.items()}
            for group, tensors in wanted.items()
        }
        self.denoiser.load_state_dict(given["weights"])
        self.ema.denoiser.load_state_dict(given["ema"])
        for name, p in self.parameters.items():
            self.optimiser.state[p] = {
                key: given["optimiser"][f"{name}/{key}"].to(self.device, copy=True)
                for key in moments(self.optimiser, p)
            }
        self.step, self.plan, self.loss_sum, self.loss_count = step, plan, loss_sum, count
        self.skipped, self.skipped_in_row = skipped

    # --- its parts ----------------------------------------------------------------------------------------------------

    def _gathered(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser itself, or a copy put together from the slices of all processes."""
        if not self.divided:
            return denoiser
        undivided = copy.deepcopy(self._undivided).to(self.device)
        undivided.load_state_dict({name: whole(tensor) for name, tensor in denoiser.state_dict().items()})
        return undivided

    def _batch(self) -> tuple[Tensor, dict[str, Tensor]]:
        """This device's share of the batch of this step; those of the next ones are read meanwhile."""
        if not self.workers:
            return self.read(self.step)
        steps = range(self.step, self.step + 1 + self.workers)
        self._coming = {step: self._coming.get(step) or self._readers.submit(self.read, step) for step in steps}
        x0, cond = self._coming[self.step].result()
        return x0.to(self.device, non_blocking=True), {
            name: values.to(self.device, non_blocking=True) for name, values in cond.items()
        }

    def read(self, step: int, team: Team | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """This process's share of the batch of update ``step`` (from 0): data in model units, conditions; on the CPU.
        Another ``team`` shares otherwise."""
        team = team or self.team
        size = self.recipe.training.batch_size
        mine = share(size, team.rank, team.size)
        indices = batch_indices(self.seed, step, size, len(self.dataset))[mine]
        epochs = np.arange(step * size, (step + 1) * size)[mine] // len(self.dataset)
        x0, cond = self.dataset.augmented(self.recipe.augment, self.seed, epochs, indices)
        conditions = self.denoiser.conditions if self.recipe.codec is None else None
        if conditions is None:
            return x0, {}
        cond = conditions.values(cond, self.dataset.captions(indices))
        cond |= conditions.made(x0, lambda i: generator(self.seed, "picture", step * size + mine.start + i))
        conditions.check(cond)  # here, on the CPU: on a GPU each look would wait
        return x0, cond


def check_inputs_matter(denoiser: Denoiser, x0: Tensor, cond: dict[str, Tensor]) -> None:
    """After the first update the output must change with the level and with each condition (trap O5)."""
    ignored = ignored_inputs(denoiser, x0, cond)
    if "level" in ignored:
        raise UndiffuseError(
            "the network ignores its noise level: its output at t = 0.5 and 0.9 is the same to the last bit after "
            "an update, so it cannot learn to denoise; use the label that the network is called with"
        )
    for name in ignored:
        raise UndiffuseError(
            f"the network ignores the condition {name!r}: its output is the same with and without it; use the "
            "vector that the network is called with, or train with model.conditional=false"
        )


@torch.no_grad()
def ignored_inputs(denoiser: Denoiser, x0: Tensor, cond: dict[str, Tensor]) -> list[str]:
    """Which of ``level`` and the conditions the output does not depend on, to the last bit; right after the first
    update, since a network may begin with 0. ``x0``, ``cond``: at least one sample; of each condition the first one
    that asks for something."""
    training = denoiser.training
    denoiser.eval()
    x, null = x0[:1], denoiser.null(1)

    def answer(t: float, **cond: Tensor) -> Tensor:
        # One call each: rows of one batch may differ by rounding alone.
        return denoiser.output(x, denoiser.schedule(t), **{**null, **cond})[0]

    y = answer(0.5)
    ignored = ["level"] if torch.equal(y, answer(0.9)) else []
    for name, values in cond.items():
        same = (values == null[name]) | (values.isnan() & null[name].isnan())
        said = values[~same.flatten(1).all(1)][:1] if values.ndim > 1 else values[~same][:1]
        if len(said) and torch.equal(y, answer(0.5, **{name: said})):
            ignored.append(name)
    denoiser.train(training)
    return ignored
