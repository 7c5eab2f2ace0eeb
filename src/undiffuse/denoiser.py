"""Chapter 4. The denoiser: a network, and what its input and output mean.

    Denoiser = network + schedule + prediction + label + input scale (+ conditions)

The network only ever sees ``network(input_scale * x, label, ...)`` and says ``y``; the denoiser turns that into an
:class:`Estimate`. User code never assembles x, a time or a target by hand (trap O7).
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from .errors import UndiffuseError, UndiffuseWarning, unknown
from .levels import Estimate, Level, combine, to_device
from .predictions import Prediction
from .reuse import Kept
from .schedules import Schedule

Denoise = Callable[[Tensor, Level], Estimate]
"""A denoiser with its condition bound: what guidance takes and returns, and what solvers ask."""


# --- What the network is told of the level --------------------------------------------------------------------------


class Label(ABC):
    """Abstract: the number that the network is told, about a thousand wide, computed in float64."""

    @abstractmethod
    def __call__(self, level: Level) -> Tensor: ...


@dataclass(frozen=True)
class TimeLabel(Label):
    """``scale * t + offset``. A table of T steps wants ``TimeLabel(T, -1)``: t = i/T is the label i - 1, from 0 to T
    - 1."""

    scale: float = 1000.0
    offset: float = 0.0

    def __call__(self, level: Level) -> Tensor:
        return self.scale * level.t + self.offset


@dataclass(frozen=True)
class LogSigmaLabel(Label):
    """``scale * log(sigma/alpha)``, the logarithm limited to +-12 so that both ends are finite. EDM's c_noise is a
    quarter of the logarithm; here it is in the same thousand-wide units as the times."""

    scale: float = 100.0

    def __call__(self, level: Level) -> Tensor:
        return self.scale * (-level.log_snr / 2).clamp(-12, 12)


LABELS: dict[str, Label] = {"time": TimeLabel(), "discrete": TimeLabel(1000.0, -1.0), "log_sigma": LogSigmaLabel()}


# --- How x is scaled on its way in ----------------------------------------------------------------------------------


class InputScale(ABC):
    """Abstract: the factor on x."""

    @abstractmethod
    def __call__(self, level: Level) -> Tensor: ...


@dataclass(frozen=True)
class NoScale(InputScale):
    """x as it is, right for variance-preserving schedules and flows."""

    def __call__(self, level: Level) -> Tensor:
        return torch.ones_like(level.alpha)


@dataclass(frozen=True)
class UnitVariance(InputScale):
    """``1 / sqrt(sigma^2 + alpha^2 sigma_data^2)``: unit variance at every level (EDM's c_in, Karras et al. 2022,
    table 1)."""

    sigma_data: float = 0.5

    def __call__(self, level: Level) -> Tensor:
        return 1 / torch.hypot(level.sigma, level.alpha * self.sigma_data)


INPUT_SCALES: dict[str, InputScale] = {"none": NoScale(), "unit_variance": UnitVariance()}


# --- The denoiser ---------------------------------------------------------------------------------------------------


class Conditioner(Protocol):
    """What a denoiser needs of its conditions (chapter 5)."""

    names: tuple[str, ...]

    def encode(self, values: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]: ...

    def join(self, values: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]: ...

    def alike(self, values: Mapping[str, Tensor]) -> list[list[int]] | None: ...

    def null(self, batch: int) -> dict[str, Tensor]: ...


@final
class Denoiser(nn.Module):
    """``denoiser(x, level, **cond) -> Estimate``.

    Args:
        network: ``network(x [B, C, ...], label [B]) -> y`` with y shaped like x; with conditions it also takes what
            they encode to (``vector=[B, E]``, ``tokens=[B, T, D]`` and ``mask=[B, T]``, more channels in x); with
            ``learned_variance`` it returns twice the channels.
        schedule, prediction, label, input_scale: what x, y and the level mean. A pair that cannot work is refused.
        conditions: how raw conditions (class numbers, vectors) become what the network takes; None: unconditional.
        learned_variance: the second half of y's channels places the variance between the two of DDPM
            (Nichol & Dhariwal 2021, eq. 15).

    The arithmetic around the network is float32 or better whatever the network's type, and the label stays float32 up
    to its embedding (trap P1).
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        prediction: Prediction,
        label: Label = LABELS["time"],
        input_scale: InputScale = INPUT_SCALES["none"],
        conditions: nn.Module | None = None,
        learned_variance: bool = False,
    ) -> None:
        super().__init__()
        schedule.check()
        prediction.check(schedule)
        self.network = network
        self.schedule = schedule
        self.prediction = prediction
        self.label = label
        self.input_scale = input_scale
        self.conditions: Any = conditions
        self.learned_variance = learned_variance
        left = float(schedule(1.0).alpha / schedule(1.0).sigma)
        if left > 0.03:
            warnings.warn(
                f"{terminal_snr_report(schedule)}: sampling starts from pure noise, so the mean of the samples "
                "(brightness, volume) will be stuck near the middle; wrap the schedule in zero_terminal_snr",
                UndiffuseWarning,
                stacklevel=2,
            )

    def forward(self, x: Tensor, level: Level, **cond: Tensor) -> Estimate:
        """The estimate at ``x`` (``[B, ...]``) and ``level`` (``[]`` or ``[B]``).

        ``cond`` holds every condition by name, one value a sample; ask for the null condition with
        ``**denoiser.null(batch)``. A missing or unknown name raises (trap G5).
        """
        y, variance = self.output(x, level, **cond)
        return self.prediction.estimate(x, y, level, variance)

    def output(self, x: Tensor, level: Level, **cond: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the network says, ``y`` in x's type, and the learned variance's place in [0, 1] (None without one)."""
        return self._split(self._ask([x], [level], cond), x)

    def together(
        self,
        questions: Sequence[tuple[Tensor, Level, Mapping[str, Tensor]]],
        rows: int | None = None,
        deep: dict[int, Tensor] | None = None,
    ) -> list[Estimate]:
        """The estimates of several ``(x, level, cond)``, all x of one shape but for their number, by one network call;
        rows whose texts are of another length have a call of their own.

        With ``rows`` a call has exactly so many: the rest is filled up with copies of the first. On a CPU a row's
        result then does not depend on the others to the last bit, since the arithmetic of a row changes with the size
        of the batch alone.

        ``deep`` holds what is kept of the network's deep part, by the number of the row counted over all questions.
        Rows that are in it reuse that, in a call of their own; the others compute, and are added
        (:mod:`undiffuse.reuse`).
        """
        count = sum(len(x) for x, _, _ in questions)
        if rows is not None and count > rows:
            raise UndiffuseError(f"{count} rows asked for in a call of {rows}")

        for _, _, cond in questions:
            self._check_names(cond)
        xs, levels, conds = zip(*questions, strict=True)
        together = {} if self.conditions is None else self.conditions.join(conds)
        answers = self._ask(xs, levels, together, rows, deep).split([len(x) for x in xs])
        estimates = []
        for y, x, level in zip(answers, xs, levels, strict=True):
            y, variance = self._split(y, x)
            estimates.append(self.prediction.estimate(x, y, level, variance))
        return estimates

    def _ask(
        self,
        xs: Sequence[Tensor],
        levels: Sequence[Level],
        cond: Mapping[str, Tensor],
        rows: int | None = None,
        deep: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """What the network says of several x, each at a level of its own; see :meth:`together`."""
        self._check_names(cond)

        def joined(parts: Sequence[Tensor]) -> Tensor:
            return torch.cat(list(parts)) if len(parts) > 1 else parts[0]

        numbers = torch.promote_types(xs[0].dtype, torch.float32)
        labels = [self.label(level).to(numbers).expand(len(x)) for x, level in zip(xs, levels, strict=True)]
        scaled = joined([combine((self.input_scale(level), x)) for x, level in zip(xs, levels, strict=True)])
        said, alike = joined(labels), None if self.conditions is None else self.conditions.alike(cond)
        groups = [[*range(len(scaled))]] if alike is None else alike
        if deep:
            groups = [[i for i in each if (i in deep) is known] for each in groups for known in (False, True)]
            groups = [each for each in groups if each]
        if len(groups) == 1:
            return self._call(scaled, said, cond, rows, deep, groups[0])
        answers = []
        for each in groups:
            theirs = {name: values[each] for name, values in cond.items()}
            answers.append(self._call(scaled[each], said[each], theirs, rows, deep, each))
        order = torch.tensor([row for each in groups for row in each]).argsort()
        return torch.cat(answers)[order.to(scaled.device)]

    def _call(
        self,
        scaled: Tensor,
        label: Tensor,
        cond: Mapping[str, Tensor],
        rows: int | None,
        deep: dict[int, Tensor] | None,
        numbers: Sequence[int],
    ) -> Tensor:
        """One network call for the rows of these numbers, filled up to ``rows``."""
        count = len(scaled)

        def filled(values: Tensor) -> Tensor:
            more = 0 if rows is None else rows - count
            return torch.cat([values, values[:1].expand(more, *values.shape[1:])]) if more else values

        scaled = filled(scaled)
        encoded = self.encode({name: filled(values) for name, values in cond.items()}, len(scaled))
        if (beside := encoded.pop("channels", None)) is not None:
            scaled = torch.cat([scaled, beside.to(scaled)], dim=1)
        dtype = next((p.dtype for p in self.network.parameters()), scaled.dtype)
        asked = scaled.to(dtype), to_device(filled(label), scaled.device)
        if deep is None:
            y = self.network(*asked, **encoded)
        else:
            known = [deep[i][None] for i in numbers if i in deep]  # of all of them or of none
            kept = Kept(filled(torch.cat(known)) if known else None)
            y = self.network(*asked, **encoded, deep=kept)
            deep.update(zip(numbers, kept.rows(), strict=False))
        return y if rows is None else y[:count]

    def _split(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's answer for ``x`` as ``(y, variance)``."""
        y = y.to(x.dtype)
        expected = (x.shape[0], 2 * x.shape[1], *x.shape[2:]) if self.learned_variance else x.shape
        if y.shape != expected:  # it might broadcast
            raise UndiffuseError(
                f"the network returned {list(y.shape)} for x {list(x.shape)}: {list(expected)} is expected"
                + (" (twice the channels: learned variance)" if self.learned_variance else "")
            )
        if not self.learned_variance:
            return y, None
        y, variance = y.chunk(2, dim=1)
        return y, (variance + 1) / 2

    def encode(self, cond: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
        """What the network takes for these conditions; checks that exactly the model's own are given."""
        self._check_names(cond)
        return {} if self.conditions is None else self.conditions.encode(cond, batch)

    def _check_names(self, cond: Mapping[str, Tensor]) -> None:
        names = () if self.conditions is None else self.conditions.names
        for name in cond:
            if name not in names:
                raise unknown("condition", name, names)
        if missing := [name for name in names if name not in cond]:
            raise UndiffuseError(
                f"this model is conditional: pass {', '.join(missing)}, or **denoiser.null(batch) for none"
            )

    def null(self, batch: int) -> dict[str, Tensor]:
        """The raw conditions that ask for nothing in particular."""
        return {} if self.conditions is None else self.conditions.null(batch)

    def bind(self, **cond: Tensor) -> Denoise:
        """The denoiser with its condition bound; without arguments, the unconditional one."""
        return lambda x, level: self(x, level, **(cond or self.null(x.shape[0])))


def terminal_snr_report(schedule: Schedule) -> str:
    """One line: how much of the data is left at t = 1."""
    end = schedule(1.0)
    share = float(end.alpha / torch.hypot(end.alpha, end.sigma))
    return f"terminal SNR {schedule.terminal_snr:.3g} ({share:.2%} of the amplitude is still data at t = 1)"


def rescheduled(denoise: Denoise, trained: Schedule) -> Denoise:
    """``denoise``, trained on one schedule, answering at the levels of any other: estimates do not depend on the
    schedule, so the log-SNR is matched and x rescaled. Raises at a log-SNR outside the trained range."""

    def on_other(x: Tensor, level: Level) -> Estimate:
        there = trained(trained.time_at(level.log_snr))
        ratio = torch.hypot(there.alpha, there.sigma) / torch.hypot(level.alpha, level.sigma)
        return denoise(combine((ratio, x)), there)

    return on_other
