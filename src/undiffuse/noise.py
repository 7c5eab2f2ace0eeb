"""Chapter 8, second part. Noise: one stream a sample, so that sample i is a function of ``(seed, i)`` and nothing
else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

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
    """The random stream number ``index`` of ``seed``: a CPU generator, the same on every machine with every device.

    torch's generator keeps 32 bits of its seed, so the key is a permutation of the index: within one seed no two
    streams are the same.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise UndiffuseError(f"seed must be a whole number from 0 to 2^63 - 1, got {seed!r}")
    if not 0 <= index < 2**32:
        raise UndiffuseError(f"sample number must be from 0 to 2^32 - 1, got {index}")
    low, high = seed & 0xFFFFFFFF, seed >> 32
    key = _mix(_mix(index ^ _mix(low)) ^ _mix(high ^ 0x9E3779B9) ^ low)
    return torch.Generator().manual_seed(key)


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
