"""Chapter 8, second part. Noise: one stream a sample, so that sample i is a function of ``(seed, i)`` and nothing
else."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import final
from zlib import crc32

import torch
from torch import Tensor

from .errors import UndiffuseError
from .levels import Level


def _mix(x: int) -> int:
    """A bijection of 32-bit numbers that scatters neighbours (the finaliser of MurmurHash3)."""
    x ^= x >> 16
    x = x * 0x85EBCA6B & 0xFFFFFFFF
    x ^= x >> 13
    x = x * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


def stream(seed: int, index: int) -> torch.Generator:
    """The random stream number ``index`` of ``seed``: a CPU generator, the same on every machine with every device."""
    return torch.Generator().manual_seed(_key(seed, index))


def _key(seed: int, index: int) -> int:
    """torch's generator keeps 32 bits of its seed, so the key is a permutation of the index: within one seed no two
    streams are the same."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise UndiffuseError(f"seed must be a whole number from 0 to 2^63 - 1, got {seed!r}")
    if not 0 <= index < 2**32:
        raise UndiffuseError(f"sample number must be from 0 to 2^32 - 1, got {index}")
    low, high = seed & 0xFFFFFFFF, seed >> 32
    return _mix(_mix(index ^ _mix(low)) ^ _mix(high ^ 0x9E3779B9) ^ low)


@final
class Streams:
    """Noise in which sample i depends on ``(seed, i)`` alone: not on the batch, its order, the device or the type
    (traps X1, X2). Numbers are drawn in float32 on the CPU, then moved.

    Args:
        seed: 0 to 2^63 - 1.
        samples: how many, or the numbers of the samples in this batch.
    """

    def __init__(self, seed: int, samples: int | Sequence[int]) -> None:
        indices = range(samples) if isinstance(samples, int) else samples
        self.generators = [stream(seed, i) for i in indices]

    def draw(self, shape: Sequence[int], like: Tensor | None = None) -> Tensor:
        """``[B, *shape]`` standard normal numbers, the next of each stream."""
        out = torch.empty(len(self.generators), *shape)
        for generator, row in zip(self.generators, out.unbind(), strict=True):
            row.normal_(generator=generator)
        return out if like is None else out.to(like.device, like.dtype)

    def __call__(self, x: Tensor, here: Level, there: Level) -> Tensor:
        if len(self.generators) != x.shape[0]:
            raise UndiffuseError(f"noise for {len(self.generators)} samples was asked for a batch of {x.shape[0]}")
        return self.draw(x.shape[1:], x)


@final
class Brownian:
    """One Brownian path a sample, evaluated on intervals: the same seed with more steps is the same path seen closer,
    so the samples of a stochastic solver converge as the steps grow (:class:`Streams` gives new ones).

    The path runs over ``lambda = log(alpha/sigma)`` from -``limit`` to ``limit``, on a grid of ``2^depth`` cells to
    which the ends of an interval are rounded. A point is found by halving: the middle of an interval given its ends is
    Gaussian (Levy's construction), with numbers keyed by (seed, sample, point). The points on the way to the last one
    are kept, so that a step costs about ``depth - log2(steps) + 2`` draws.

    What is not a way forward on the grid (a way up, Langevin steps at a level, less than half a cell, outside the
    limits) gets numbers of its own, keyed by the interval and how often it was asked for.

    Args:
        seed, samples: as for :class:`Streams`; :meth:`draw` gives the same first noise.
        depth: 1 to 30.
        limit: the end of lambda, above 0.
    """

    def __init__(self, seed: int, samples: int | Sequence[int], depth: int = 16, limit: float = 8.0) -> None:
        if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= 30:
            raise UndiffuseError(f"depth of a Brownian path must be from 1 to 30, got {depth!r}")
        if not 0 < limit < float("inf"):
            raise UndiffuseError(f"limit of a Brownian path must be above 0 and finite, got {limit!r}")
        indices = range(samples) if isinstance(samples, int) else samples
        self.streams = Streams(seed, samples)
        self.cells, self.limit = 2**depth, limit
        self.keys = [_mix(_key(seed, i) ^ 0x5BD1E995) for i in indices]
        self.together = _Tree(self.keys, self.cells)
        self.apart: list[_Tree] = []

    def draw(self, shape: Sequence[int], like: Tensor | None = None) -> Tensor:
        """``[B, *shape]`` standard normal numbers to start from, those of :class:`Streams`."""
        return self.streams.draw(shape, like)

    def __call__(self, x: Tensor, here: Level, there: Level) -> Tensor:
        if len(self.keys) != x.shape[0]:
            raise UndiffuseError(f"noise for {len(self.keys)} samples was asked for a batch of {x.shape[0]}")
        if not here.t.ndim and not there.t.ndim:
            z = self.together.between(x.shape[1:], *self.place(here), *self.place(there))
        else:
            self.apart = self.apart or [_Tree([key], self.cells) for key in self.keys]
            ways = zip(self.apart, here.rows(len(self.keys)), there.rows(len(self.keys)), strict=True)
            z = torch.cat([tree.between(x.shape[1:], *self.place(a), *self.place(b)) for tree, a, b in ways])
        return z.to(x.device, x.dtype)

    def place(self, level: Level) -> tuple[float, int]:
        """``(t, the nearest point of the grid)``."""
        lam = min(max(float(level.log_snr) / 2, -self.limit), self.limit)
        return float(level.t), round((lam + self.limit) / (2 * self.limit) * self.cells)


class _Tree:
    """Brownian paths W at the points 0 to ``cells``, W(0) = 0 and Var W(cells) = 1."""

    def __init__(self, keys: Sequence[int], cells: int) -> None:
        self.keys, self.cells = keys, cells
        self.generator = torch.Generator()
        self.way: list[
            tuple[int, int, Tensor, Tensor]
        ] = []  # intervals that hold the last point, each in the one before
        self.asked: dict[tuple[float, float], int] = {}

    def normal(self, shape: Sequence[int], node: int) -> Tensor:
        """The standard normal numbers of ``node``, 0 to 2^32 - 1."""
        out = torch.empty(len(self.keys), *shape)
        for key, row in zip(self.keys, out.unbind(), strict=True):
            row.normal_(generator=self.generator.manual_seed(_mix(key ^ _mix(node))))
        return out

    def at(self, shape: Sequence[int], point: int) -> Tensor:
        """W at a point."""
        if not self.way:
            start = torch.zeros(len(self.keys), *shape)
            self.way = [(0, self.cells, start, self.normal(shape, self.cells))]
        while not self.way[-1][0] <= point <= self.way[-1][1]:
            self.way.pop()
        while True:
            low, high, w_low, w_high = self.way[-1]
            if point in (low, high):
                return w_low if point == low else w_high
            middle = (low + high) // 2
            # Given its ends, the middle has their mean and a quarter of the interval's length as variance.
            deviation = ((high - low) / self.cells) ** 0.5 / 2
            w = torch.lerp(w_low, w_high, 0.5).add_(self.normal(shape, middle), alpha=deviation)
            self.way.append((low, middle, w_low, w) if point <= middle else (middle, high, w, w_high))

    def between(self, shape: Sequence[int], t: float, here: int, t_there: float, there: int) -> Tensor:
        """Standard normal numbers for the way from one point to another."""
        if there <= here:
            count = self.asked[t, t_there] = self.asked.get((t, t_there), -1) + 1
            return self.normal(shape, crc32(struct.pack("<ddq", t, t_there, count)) | 1 << 31)
        begin = self.at(shape, here)
        return (self.at(shape, there) - begin).mul_((self.cells / (there - here)) ** 0.5)


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Spherical interpolation between noises ``[B, ...]``, weight 0 to 1: keeps their length, as a straight line does
    not (it would pass through noise of deviation 0.7)."""
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    cosine = (flat_a * flat_b).sum(1) / (flat_a.norm(dim=1) * flat_b.norm(dim=1))
    angle = torch.acos(cosine.clamp(-1, 1))
    near = angle.sin() < 1e-6
    safe = torch.where(near, 1.0, angle.sin())
    left = torch.where(near, 1 - weight, ((1 - weight) * angle).sin() / safe)
    right = torch.where(near, weight, (weight * angle).sin() / safe)
    return (left[:, None] * flat_a + right[:, None] * flat_b).reshape(a.shape).to(a.dtype)
