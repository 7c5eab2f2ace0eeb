"""Chapter 5. Conditions: what we ask for.

A condition turns raw values, one a sample, into the vector that the network takes. Each knows its *null* value
("nothing in particular"), which takes the place of the real one for a tenth of the training samples; that is what makes
classifier-free guidance possible (Ho & Salimans 2022, arXiv:2207.12598).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from .errors import UndiffuseError, choose


class Condition(nn.Module, ABC):
    """Abstract: raw values ``[B]`` or ``[B, D]`` to an embedding ``[B, width]``, and a null value.

    ``asked``   whether it is asked for, and so dropped in training and guided to. What was done to the data is not: it
        is always told in training, and null in sampling.
    """

    asked = True

    @property
    @abstractmethod
    def config(self) -> dict[str, int]:
        """The constructor's arguments, without the width."""

    @abstractmethod
    def check(self, values: Tensor) -> Tensor:
        """The values, or an error that says what is wrong with them."""

    @abstractmethod
    def null(self, batch: int) -> Tensor:
        """``batch`` raw null values."""

    @abstractmethod
    def embed(self, values: Tensor) -> Tensor:
        """``[B, width]``; differentiable in the weights."""


@final
class Classes(Condition):
    """One of ``classes`` classes: integers 0..classes-1. The null class is the number ``classes`` (derived, trap
    G4)."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        if classes < 1:
            raise UndiffuseError(f"a class condition needs at least one class, got {classes}")
        self.classes = classes
        self.table = nn.Embedding(classes + 1, width)

    @property
    def config(self) -> dict[str, int]:
        return {"classes": self.classes}

    def check(self, values: Tensor) -> Tensor:
        if values.dtype.is_floating_point or values.ndim != 1:
            raise UndiffuseError(f"classes must be integers [B], got {values.dtype} of shape {list(values.shape)}")
        wrong = (values < 0) | (values > self.classes)
        if bool(wrong.any()):
            raise UndiffuseError(
                f"class {int(values[wrong][0])} does not exist: this model has 0 to {self.classes - 1}"
            )
        return values

    def null(self, batch: int) -> Tensor:
        return torch.full((batch,), self.classes, device=self.table.weight.device)

    def embed(self, values: Tensor) -> Tensor:
        return self.table(values)


@final
class Vector(Condition):
    """A continuous vector of ``size`` numbers (attributes, an embedding). The null value is a row of NaN, which has an
    embedding of its own; a row that is NaN only in part is refused."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        if size < 1:
            raise UndiffuseError(f"a vector condition needs at least one number, got {size}")
        self.size = size
        self.linear = nn.Linear(size, width)
        self.nothing = nn.Parameter(torch.zeros(width))

    @property
    def config(self) -> dict[str, int]:
        return {"size": self.size}

    def check(self, values: Tensor) -> Tensor:
        if values.ndim != 2 or values.shape[1] != self.size:
            raise UndiffuseError(f"a vector condition takes [B, {self.size}], got {list(values.shape)}")
        lost = values.isnan()
        if bool((lost.any(1) != lost.all(1)).any()) or bool(values.isinf().any()):
            raise UndiffuseError(
                "a vector condition holds NaN or infinite numbers (a row of nothing but NaN means: none)"
            )
        return values

    def null(self, batch: int) -> Tensor:
        return torch.full((batch, self.size), torch.nan, device=self.nothing.device)

    def embed(self, values: Tensor) -> Tensor:
        null = values.isnan().all(1, keepdim=True)
        embedded = self.linear(values.nan_to_num().to(self.linear.weight.dtype))
        return torch.where(null, self.nothing, embedded)


@final
class Augmentation(Condition):
    """What was done to a training sample, as ``size`` numbers that are 0 if nothing was. The embedding of 0 is 0, so
    that sampling, which asks for 0, is that of data to which nothing was done (Karras et al. 2022, appendix F.2)."""

    asked = False

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        if size < 1:
            raise UndiffuseError(f"an augmentation condition needs at least one number, got {size}")
        self.size = size
        self.linear = nn.Linear(size, width, bias=False)

    @property
    def config(self) -> dict[str, int]:
        return {"size": self.size}

    def check(self, values: Tensor) -> Tensor:
        if values.ndim != 2 or values.shape[1] != self.size or not bool(values.isfinite().all()):
            raise UndiffuseError(f"an augmentation condition takes finite [B, {self.size}], got {list(values.shape)}")
        return values

    def null(self, batch: int) -> Tensor:
        return torch.zeros(batch, self.size, device=self.linear.weight.device)

    def embed(self, values: Tensor) -> Tensor:
        return self.linear(values.to(self.linear.weight.dtype))


CONDITIONS: dict[str, type[Condition]] = {"classes": Classes, "vector": Vector, "augmentation": Augmentation}
"""Every kind of condition by name."""


@final
class Conditions(nn.Module):
    """Several conditions by name; their embeddings add up to the vector ``[B, width]`` that the network takes."""

    def __init__(self, conditions: Mapping[str, Condition]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(dict(conditions))
        self.names = tuple(conditions)

    def part(self, name: str) -> Condition:
        """One condition by name."""
        part = self.parts[name]
        assert isinstance(part, Condition)
        return part

    @property
    def asked(self) -> tuple[str, ...]:
        """The names of those that can be asked for."""
        return tuple(name for name in self.names if self.part(name).asked)

    @staticmethod
    def build(config: Mapping[str, Mapping[str, int | str]], width: int) -> Conditions:
        """From ``{"classes": {"kind": "classes", "classes": 10}}``; :attr:`config` gives that back."""
        parts = {}
        for name, fields in config.items():
            numbers = {key: int(value) for key, value in fields.items() if key != "kind"}
            kind = choose("kind of condition", str(fields.get("kind")), CONDITIONS)
            parts[name] = kind(width=width, **numbers)  # type: ignore[call-arg]
        return Conditions(parts)

    @property
    def config(self) -> dict[str, dict[str, int | str]]:
        kinds = {cls: kind for kind, cls in CONDITIONS.items()}
        return {name: {"kind": kinds[type(self.part(name))], **self.part(name).config} for name in self.names}

    def encode(self, values: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
        """What the network takes: ``{"vector": [B, width]}``."""
        total = None
        for name in self.names:
            part = self.part(name)
            given = part.check(values[name])
            if given.shape[0] != batch:
                raise UndiffuseError(f"condition {name} has {given.shape[0]} values for {batch} samples")
            embedded = part.embed(given)
            total = embedded if total is None else total + embedded
        return {} if total is None else {"vector": total}

    def null(self, batch: int) -> dict[str, Tensor]:
        """Raw values that ask for nothing in particular."""
        return {name: self.part(name).null(batch) for name in self.names}

    def drop(self, values: Mapping[str, Tensor], u: Tensor, rate: float) -> dict[str, Tensor]:
        """``values`` with the samples whose uniform number ``u`` (``[B]``, drawn by the caller) is below ``rate`` set
        to null."""
        null = self.null(u.shape[0])
        kept = {}
        for name, value in values.items():
            if not self.part(name).asked:
                kept[name] = value
                continue
            dropped = (u < rate).to(value.device).reshape((-1,) + (1,) * (value.ndim - 1))
            kept[name] = torch.where(dropped, null[name].to(value.device), value)
        return kept
