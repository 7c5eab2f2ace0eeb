"""Augmentation: the same items, seen in other ways.

Every draw is a function of (seed, epoch, index): it is the same whoever reads the item, in which batch and on which
device, and another in every epoch (trap R9). With the defaults nothing is drawn and nothing changes.

``flip`` and ``shift`` make the model believe that mirrored and moved pictures are data too. ``geometric`` is the set of
EDM (Karras et al. 2022, appendix F.2, table 6), which does not leak: the network is told what was done, as a condition
of 9 numbers that are 0 when nothing was, and sampling asks for 0. Colours are left alone, as there.

One number differs from the paper's. It tells an anisotropy of strength a5 along a4 as a5 (cos a4, sin a4), which is the
same for (a5, a4) and (-a5, a4 + pi): stretched and squeezed look alike. The double angle is told instead; it is the
logarithm of the matrix, so that equal numbers mean equal pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UndiffuseError
from .spec import DataSpec

LABELS = 9
"""Numbers that say what ``geometric`` did: x-flip, y-flip, scaling, rotation (2), anisotropy (2), translation (2)."""


@final
@dataclass(frozen=True)
class Augment:
    """What is done to pictures ``[C, H, W]`` (or any data with two spatial axes) before they are learned from.

    Attributes:
        flip: probability of mirroring left and right. Not for digits, letters, text or whatever has a left and right.
        shift: pixels by which a picture is moved at most in each direction; what moves in is its mirror image.
        geometric: probability of each of EDM's transformations (the paper: 0.12 for 50,000 pictures, 0.15 for fewer
            and larger ones); 0 for none. Interpolated bicubically where the paper has wavelet filters.
    """

    flip: float = 0.0
    shift: int = 0
    geometric: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "geometric"):
            if not 0 <= getattr(self, name) <= 1:
                raise UndiffuseError(f"augment.{name}={getattr(self, name)} must be a probability, 0 to 1")
        if self.shift < 0:
            raise UndiffuseError(f"augment.shift={self.shift} must be at least 0 pixels")

    def __bool__(self) -> bool:
        return self != Augment()

    def __str__(self) -> str:
        parts = [f"{self.flip:.0%} mirrored"] if self.flip else []
        parts += [f"moved by up to {self.shift} pixels"] if self.shift else []
        parts += [f"EDM's geometric set at {self.geometric:.0%}"] if self.geometric else []
        return ", ".join(parts) or "none"

    def check(self, spec: DataSpec) -> None:
        """Raise for data to which this cannot be done."""
        if self and len(spec.shape) != 3:
            raise UndiffuseError(
                f"augment is for data with two spatial axes, this is {spec.kind} of {list(spec.shape)}"
            )
        if self.shift and spec.beside is not None and spec.beside.shape[1:] != spec.shape[1:]:
            raise UndiffuseError(
                "augment.shift moves by pixels, and the pictures beside are of another size: set it to 0"
            )
        if self.shift and self.shift >= min(spec.shape[1:]):
            raise UndiffuseError(f"augment.shift={self.shift} must be less than the sides, {list(spec.shape[1:])}")

    def __call__(
        self, x: Tensor, seed: int, epochs: Sequence[int] | np.ndarray, indices: Sequence[int] | np.ndarray
    ) -> tuple[Tensor, Tensor | None]:
        """The items ``x`` (``[B, C, H, W]``), the ``indices`` of the data set in these ``epochs``, augmented; and their
        labels ``[B, 9]`` if there are any."""
        if not self:
            return x, None
        draws = self._draws(seed, epochs, indices)
        u, n = np.stack([each[0] for each in draws]), np.stack([each[1] for each in draws])
        x = _where(u[:, 0] < self.flip, x.flip(-1), x)
        if self.shift:
            moves = np.floor(u[:, 1:3] * (2 * self.shift + 1)).astype(int)
            wide = F.pad(x, [self.shift] * 4, mode="reflect")
            height, width = x.shape[2:]
            x = torch.stack([each[:, i : i + height, j : j + width] for each, (i, j) in zip(wide, moves, strict=True)])
        return _geometric(x, u[:, 3:], n, self.geometric) if self.geometric else (x, None)

    def mirrored(
        self, seed: int, epochs: Sequence[int] | np.ndarray, indices: Sequence[int] | np.ndarray
    ) -> np.ndarray:
        """Which of the items this would mirror, ``[B]`` bool."""
        if not self.flip:
            return np.zeros(len(indices), bool)
        return np.array([u[0] < self.flip for u, _ in self._draws(seed, epochs, indices)], bool)

    @staticmethod
    def _draws(
        seed: int, epochs: Sequence[int] | np.ndarray, indices: Sequence[int] | np.ndarray
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        return [_draw(seed, int(epoch), int(index)) for epoch, index in zip(epochs, indices, strict=True)]


def advice(spec: DataSpec, augment: Augment) -> str:
    """One line about mirroring, for the doctor and for :meth:`Recipe.check`; empty if there is nothing to say."""
    if len(spec.shape) != 3 or spec.kind not in ("image", "array"):
        return ""
    signs = bool(spec.classes) and all(len(name) <= 1 or name.isdecimal() for name in spec.classes)
    if augment.flip and signs:
        return "augment.flip mirrors pictures whose classes look like digits or letters; set augment.flip=0"
    if augment.flip or signs:
        return ""
    return "not mirrored; augment.flip=0.5 doubles pictures that have no left and right (no text, no digits)"


def _draw(seed: int, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """12 uniform and 6 normal numbers: a counter-based generator, so that there is nothing to advance or to save."""
    key = blake2b(f"undiffuse augment {seed}".encode(), digest_size=16).digest()
    source = np.random.Generator(np.random.Philox(key=np.frombuffer(key, np.uint64), counter=[0, 0, epoch, index]))
    return source.random(12), source.standard_normal(6)


def _where(chosen: np.ndarray, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(torch.from_numpy(chosen).reshape(-1, *[1] * (no.ndim - 1)), yes, no) if chosen.any() else no


def _matrices(rows: Sequence[Sequence[np.ndarray | float]], count: int) -> np.ndarray:
    """``[B, 3, 3]`` from entries that are numbers or ``[B]``."""
    return np.stack([np.stack([np.broadcast_to(entry, count) for entry in row], -1) for row in rows], -2)


def _geometric(x: Tensor, u: np.ndarray, n: np.ndarray, probability: float) -> tuple[Tensor, Tensor]:
    """EDM's table 6. ``u`` uniform ``[B, 9]``, ``n`` normal ``[B, 6]``. Parameters a0 to a7 as there."""
    count, (height, width) = len(x), x.shape[2:]
    a0 = (u[:, 0] < 0.5).astype(float)
    a1 = ((u[:, 1] < 0.5) & (u[:, 2] < probability)).astype(float)
    a2 = np.where(u[:, 3] < probability, n[:, 0], 0)
    a3 = np.where(u[:, 4] < probability, (2 * u[:, 5] - 1) * np.pi, 0)
    a4 = (2 * u[:, 6] - 1) * np.pi
    a5 = np.where(u[:, 7] < probability, n[:, 1], 0)
    a6, a7 = (np.where(u[:, 8] < probability, n[:, i], 0) for i in (2, 3))
    labels = [a0, a1, a2, np.cos(a3) - 1, np.sin(a3), a5 * np.cos(2 * a4), a5 * np.sin(2 * a4), a6, a7]
    told = torch.from_numpy(np.stack(labels, 1)).float()

    x = _where(a0 > 0, x.flip(-1), x)  # exactly
    x = _where(a1 > 0, x.flip(-2), x)
    moved = np.flatnonzero((a2 != 0) | (a3 != 0) | (a5 != 0) | (a6 != 0) | (a7 != 0))
    if not len(moved):
        return x, told

    def scale(sx: np.ndarray, sy: np.ndarray) -> np.ndarray:
        return _matrices([[sx, 0, 0], [0, sy, 0], [0, 0, 1]], count)

    def rotate(angle: np.ndarray) -> np.ndarray:
        c, s = np.cos(angle), np.sin(angle)
        return _matrices([[c, s, 0], [-s, c, 0], [0, 0, 1]], count)

    s, r = 2 ** (-0.2 * a2), 2 ** (-0.2 * a5)
    shift = _matrices([[1, 0, -a6 * width / 8], [0, 1, -a7 * height / 8], [0, 0, 1]], count)
    # From the place in the new picture to that in the old one, in pixels from the middle: all inverted, in this order.
    old = scale(s, s) @ rotate(-a3) @ rotate(-a4) @ scale(r, 1 / r) @ rotate(a4) @ shift
    units = np.diag([width / 2, height / 2, 1.0])  # grid_sample counts from -1 to 1
    theta = (np.linalg.inv(units) @ old @ units)[moved, :2]
    part = x[moved]
    grid = F.affine_grid(torch.from_numpy(theta).to(x.dtype), list(part.shape), align_corners=False)
    drawn = F.grid_sample(part, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    limits = part.flatten(1)
    bounds = [each.reshape(-1, 1, 1, 1) for each in (limits.amin(1), limits.amax(1))]
    x = x.clone()
    x[moved] = drawn.clamp(*bounds)  # cubic interpolation overshoots at edges
    return x, told
