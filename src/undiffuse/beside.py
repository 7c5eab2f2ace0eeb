"""Pictures made of an item itself, which a model is shown beside the noise and completes.

    super-resolution   smaller   the means of blocks of x
    inpainting         holes     x with NaN, which is "not known", where something is to be filled in
    colourisation      grey      the luminance of x

A model that has learned with one of them asks for such a picture in sampling (:class:`.Picture`). In training what is
random is drawn from the stream of each item, which the caller gives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .config import from_json
from .errors import UndiffuseError


class Beside(ABC):
    """Abstract: the picture that is made of an item."""

    @abstractmethod
    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """``[C, *spatial]`` of the picture of an item of this shape; raises where there is none."""

    @abstractmethod
    def __call__(self, x: Tensor, streams: Iterable[Generator]) -> Tensor:
        """The pictures of ``x`` (``[B, C, *spatial]``, model units), NaN where nothing is known; ``streams``: of each
        item its random numbers, on the CPU."""


@final
@dataclass(frozen=True)
class Smaller(Beside):
    """A picture smaller by ``factor`` along each axis, each value the mean of a block: super-resolution (Saharia et al.
    2021, arXiv:2104.07636)."""

    factor: int = 4

    def __post_init__(self) -> None:
        if self.factor < 2:
            raise UndiffuseError(f"factor={self.factor} must be at least 2")

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        if len(shape) < 2 or any(n % self.factor for n in shape[1:]):
            raise UndiffuseError(
                f"data of shape {list(shape)} cannot be made smaller by {self.factor}: choose a divisor"
            )
        return (shape[0], *(n // self.factor for n in shape[1:]))

    def __call__(self, x: Tensor, streams: Iterable[Generator]) -> Tensor:
        for axis in range(x.ndim - 1, 1, -1):
            x = x.unflatten(axis, (-1, self.factor)).mean(axis + 1)
        return x


@final
@dataclass(frozen=True)
class Holes(Beside):
    """The item with a hole, of a share of it that is uniform from ``least`` to ``most``: inpainting (Saharia et al.
    2022, arXiv:2111.05826).

    Attributes:
        boxes: share of the holes that are boxes; the others are where smooth noise is highest, as a brush leaves them.
        cell: about how many positions their outlines take to turn.
    """

    least: float = 0.1
    most: float = 0.6
    boxes: float = 0.5
    cell: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.least <= self.most <= 1:
            raise UndiffuseError(f"holes of least={self.least} to most={self.most}: both in (0, 1], and in order")
        if not 0 <= self.boxes <= 1 or self.cell < 1:
            raise UndiffuseError(f"boxes={self.boxes} must be in [0, 1], and cell={self.cell} at least 1")

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        if not 2 <= len(shape) <= 4:
            raise UndiffuseError(f"data of shape {list(shape)} have no places where a hole could be")
        return tuple(shape)

    def __call__(self, x: Tensor, streams: Iterable[Generator]) -> Tensor:
        holes = torch.stack([self.hole(x.shape[2:], stream) for _, stream in zip(x, streams, strict=False)])
        return x.masked_fill(holes[:, None].to(x.device), torch.nan)

    def hole(self, size: Sequence[int], stream: Generator) -> Tensor:
        """One hole, ``[*size]`` bool; at least one position, and never fewer of them for another device."""
        share, kind, *u = torch.rand(2 + 2 * len(size), generator=stream, dtype=torch.float64).tolist()
        share = self.least + (self.most - self.least) * share
        hole = torch.zeros(tuple(size), dtype=torch.bool)
        if kind >= self.boxes:
            coarse = [max(2, n // self.cell) for n in size]
            mode = ("linear", "bilinear", "trilinear")[len(size) - 1]
            field = F.interpolate(torch.randn(1, 1, *coarse, generator=stream), tuple(size), mode=mode).flatten()
            chosen = field.topk(max(1, round(share * field.numel()))).indices
            hole.view(-1)[chosen] = True
            return hole
        # Sides whose product is the share: the first is stretched by up to 2 at the cost of the last.
        sides = [share ** (1 / len(size))] * len(size)
        if len(size) > 1:
            stretch = min(2 ** (2 * u[-1] - 1), 1 / sides[0])
            sides[0], sides[-1] = sides[0] * stretch, min(1.0, sides[-1] / stretch)
        places = []
        for n, side, at in zip(size, sides, u, strict=False):
            length = max(1, round(n * side))
            begin = int(at * (n - length + 1))
            places.append(slice(begin, begin + length))
        hole[tuple(places)] = True
        return hole


@final
@dataclass(frozen=True)
class Grey(Beside):
    """The luminance of a picture in red, green and blue (ITU-R BT.601, as Pillow's mode L): colourisation."""

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        if len(shape) < 2 or shape[0] != 3:
            raise UndiffuseError(f"grey is made of red, green and blue; these data are {list(shape)}")
        return (1, *shape[1:])

    def __call__(self, x: Tensor, streams: Iterable[Generator]) -> Tensor:
        weights = x.new_tensor([0.299, 0.587, 0.114])
        return (x * weights.reshape(3, *(1,) * (x.ndim - 2))).sum(1, keepdim=True)


BESIDE: dict[str, Beside] = {"smaller": Smaller(), "holes": Holes(), "grey": Grey()}
"""Every picture that can be made of an item, by name."""


def beside_from(stated: Mapping[str, Any]) -> Beside:
    """From ``{"kind": "smaller", "factor": 4}``; :func:`stated` gives that back."""
    return from_json(Beside, dict(stated), "condition", {Beside: BESIDE})  # type: ignore[type-abstract]


def stated(beside: Beside) -> dict[str, Any]:
    """What a file says of it."""
    kind = next(name for name, each in BESIDE.items() if type(each) is type(beside))
    return {"kind": kind, **asdict(beside)}  # type: ignore[call-overload]
