"""Chapter 3. Predictions: what the network says.

A prediction is a row ``(a, b)``: the network is trained to output ``y = a*x0 + b*eps``. Together with
``x = alpha*x0 + sigma*eps`` that is two equations for two unknowns, so with ``det = alpha*b - sigma*a``

    x0 = (b*x - sigma*y) / det        eps = (alpha*y - a*x) / det

One formula serves every parametrisation, and a loss weight for one becomes a weight for another by
``|x0_hat - x0| = |sigma/det| |y_hat - y|``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from .errors import UndiffuseError
from .levels import Estimate, Level, combine
from .schedules import Schedule


class Prediction(ABC):
    """Abstract: subclasses are frozen dataclasses that define :meth:`row`."""

    @abstractmethod
    def row(self, level: Level) -> tuple[Tensor, Tensor]:
        """``(a, b)``, shaped like the level's fields."""

    @final
    def det(self, level: Level) -> Tensor:
        """``alpha*b - sigma*a``; 0 where the output says nothing of what is missing from x."""
        a, b = self.row(level)
        return level.alpha * b - level.sigma * a

    @final
    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """What the network should output: ``a*x0 + b*eps``."""
        a, b = self.row(level)
        return combine((a, x0), (b, eps))

    @final
    def estimate(self, x: Tensor, y: Tensor, level: Level, variance: Tensor | None = None) -> Estimate:
        """The estimate that the output ``y`` at ``x`` means; raises where it means none (trap S6)."""
        a, b = self.row(level)
        det = level.alpha * b - level.sigma * a
        if not bool((det.isfinite() & (det != 0)).all()):
            raise UndiffuseError(
                f"a network that predicts {type(self).__name__} says nothing at alpha = {level.alpha.min():.3g}, "
                f"sigma = {level.sigma.min():.3g}: predict v or flow, or stay away from that end"
            )
        return Estimate(
            combine((b / det, x), (-level.sigma / det, y)),
            combine((level.alpha / det, y), (-a / det, x)),
            variance,
        )

    @final
    def check(self, schedule: Schedule) -> None:
        """Refuse a schedule at whose end this prediction loses the data (trap S6: zero terminal SNR with eps)."""
        det = float(self.det(schedule(1.0)))
        if abs(det) < 1e-12:
            raise UndiffuseError(
                f"{type(self).__name__} prediction on a schedule with zero terminal SNR: at t = 1 the input is pure "
                "noise, which tells nothing of the data; predict v, x0 or flow, or keep some signal in the schedule"
            )


@dataclass(frozen=True)
class X0(Prediction):
    """The clean data."""

    def row(self, level: Level) -> tuple[Tensor, Tensor]:
        return torch.ones_like(level.alpha), torch.zeros_like(level.alpha)


@dataclass(frozen=True)
class Eps(Prediction):
    """The noise (Ho et al. 2020, eq. 14)."""

    def row(self, level: Level) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(level.alpha), torch.ones_like(level.alpha)


@dataclass(frozen=True)
class V(Prediction):
    """Velocity ``v = alpha*eps - sigma*x0`` (Salimans & Ho 2022, arXiv:2202.00512)."""

    def row(self, level: Level) -> tuple[Tensor, Tensor]:
        return -level.sigma, level.alpha


@dataclass(frozen=True)
class FlowVelocity(Prediction):
    """The straight path's velocity ``eps - x0`` (flow matching, rectified flow)."""

    def row(self, level: Level) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(level.alpha), torch.ones_like(level.alpha)


@dataclass(frozen=True)
class Score(Prediction):
    """The score ``grad log p(x) = -eps/sigma`` (Song et al. 2021); unbounded at sigma = 0."""

    def row(self, level: Level) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(level.alpha), -1 / level.sigma


@dataclass(frozen=True)
class EDMOutput(Prediction):
    """EDM's F (Karras et al. 2022, eq. 7), for any alpha: with s^2 = sigma^2 + alpha^2 sigma_d^2,
    ``a = sigma/(sigma_d s)``, ``b = -alpha sigma_d/s``. Its target has unit variance for data of deviation sigma_d."""

    sigma_data: float = 0.5

    def row(self, level: Level) -> tuple[Tensor, Tensor]:
        s = torch.hypot(level.sigma, level.alpha * self.sigma_data)
        return level.sigma / (self.sigma_data * s), -level.alpha * self.sigma_data / s


PREDICTIONS: dict[str, Prediction] = {
    "x0": X0(),
    "eps": Eps(),
    "v": V(),
    "flow": FlowVelocity(),
    "score": Score(),
    "edm": EDMOutput(),
}
"""Every prediction by name."""
