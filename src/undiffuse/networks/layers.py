"""The blocks that every network is made of.

Besides ``x`` a network is told two things: how noisy ``x`` is (``label``), and what is asked for (``vector``). Both
become one *embedding* ``[B, E]`` (:class:`Embedding`), which reaches every block as FiLM: a scale and a shift for each
channel (Perez et al. 2018, "FiLM: visual reasoning with a general conditioning layer"). The blocks work in any rank:
``[B, C]``, ``[B, C, L]``, ``[B, C, H, W]``, ``[B, C, D, H, W]``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UndiffuseError

CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}


def convolution(rank: int, inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Module:
    """A convolution over ``rank`` dimensions that keeps the size, or with ``stride=2`` halves it (rounding up)."""
    return CONVOLUTIONS[rank](inputs, outputs, kernel, stride=stride, padding=kernel // 2)


def zeroed(module: nn.Module) -> nn.Module:
    """The same module with all parameters 0, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def groups_of(channels: int) -> int:
    """The number of groups for group norm: 8, or fewer so that a group has at least four channels."""
    return math.gcd(8, max(1, channels // 4))


def sinusoid(label: Tensor, width: int, longest: float = 10_000.0) -> Tensor:
    """Sines and cosines of ``label`` (Vaswani et al. 2017, section 3.5).

    Wavelengths go geometrically from ``2 pi`` to ``2 pi * longest``, so labels should be about a thousand wide. They
    may be negative or fractional. Half precision is refused: bfloat16 keeps only 507 of the 1000 integer times.

    Args:
        label: ``[B]``, any integer or floating dtype of at least 32 bits.
        width: even.

    Returns:
        ``[B, width]``, float32 (float64 for a float64 label).
    """
    if label.dtype in (torch.float16, torch.bfloat16):
        raise UndiffuseError(f"label is {label.dtype}, which merges neighbouring noise levels: pass it as float32")
    label = label.to(torch.promote_types(label.dtype, torch.float32))
    half = width // 2
    rates = torch.arange(half, device=label.device, dtype=label.dtype) * (-math.log(longest) / max(1, half - 1))
    angles = label[:, None] * rates.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Embedding(nn.Module):
    """``silu(W2 silu(W1 sinusoid(label)) + V vector)``: what every FiLM reads, ``[B, width]``.

    The sinusoid is computed in float32 whatever the dtype of the weights.
    """

    def __init__(self, width: int, condition_width: int) -> None:
        super().__init__()
        self.waves = max(64, width // 4)
        self.condition_width = condition_width
        self.first = nn.Linear(self.waves, width)
        self.second = nn.Linear(width, width)
        self.condition = nn.Linear(condition_width, width) if condition_width else None

    def forward(self, label: Tensor, vector: Tensor | None) -> Tensor:
        """``label`` is ``[B]``, ``vector`` is ``[B, condition_width]`` or None where ``condition_width`` is 0."""
        waves = sinusoid(label, self.waves)
        embedding = self.second(F.silu(self.first(waves.to(self.first.weight.dtype))))
        if self.condition is not None and vector is not None:
            embedding = embedding + self.condition(vector.to(self.condition.weight.dtype))
        return F.silu(embedding)


def film_norm(x: Tensor, groups: int, scale: Tensor, shift: Tensor, eps: float = 1e-5) -> Tensor:
    """``(1 + scale) * group_norm(x) + shift`` (Wu & He 2018, with FiLM's scale and shift as its affine part).

    Args:
        x: ``[B, C, *spatial]``.
        scale, shift: ``[B, C]``.
    """
    batch, channels = x.shape[:2]
    scale = 1 + scale
    if x.is_contiguous():
        # The scales differ from sample to sample, so lay the batch out as one long row of B * C channels: group norm
        # applies them in the pass that normalises, and its gradient replaces several passes over memory.
        row = x.reshape(1, batch * channels, *x.shape[2:])
        return F.group_norm(row, batch * groups, scale.flatten(), shift.flatten(), eps).reshape(x.shape)
    each = (batch, channels, *[1] * (x.ndim - 2))
    return torch.addcmul(shift.reshape(each), F.group_norm(x, groups, eps=eps), scale.reshape(each))


class FilmNorm(nn.Module):
    """:func:`film_norm` with scale and shift as a linear function of the embedding."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.groups = groups_of(channels)
        self.film = nn.Linear(embedding, 2 * channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``x`` is ``[B, C, *spatial]``, ``embedding`` is ``[B, E]``."""
        scale, shift = self.film(embedding).chunk(2, dim=1)
        return film_norm(x, self.groups, scale, shift)


class ResidualBlock(nn.Module):
    """``x + conv(dropout(silu(film_norm(conv(silu(norm(x)))))))``, the second convolution starting at 0.

    The block of ADM (Dhariwal & Nichol 2021, "adaptive group normalisation"), without a change of width.
    """

    def __init__(self, rank: int, channels: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups_of(channels), channels)
        self.first = convolution(rank, channels, channels, 3)
        self.film = FilmNorm(channels, embedding)
        self.dropout = nn.Dropout(dropout)
        self.second = zeroed(convolution(rank, channels, channels, 3))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``[B, C, *spatial] -> [B, C, *spatial]``."""
        y = self.first(F.silu(self.norm(x)))
        return x + self.second(self.dropout(F.silu(self.film(y, embedding))))


class SelfAttention(nn.Module):
    """``x + W attention(norm(x))``, every position looking at all others (Vaswani et al. 2017); ``W`` starts at 0."""

    def __init__(self, channels: int, head_width: int) -> None:
        super().__init__()
        self.heads = math.gcd(channels, max(1, channels // head_width))
        self.norm = nn.GroupNorm(groups_of(channels), channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, *spatial] -> [B, C, *spatial]``."""
        batch, channels = x.shape[:2]
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).reshape(batch, -1, 3, self.heads, channels // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(y).transpose(1, 2).reshape(x.shape)


def fold(x: Tensor, factor: int) -> Tensor:
    """Move ``factor`` neighbours along each dimension into channels: ``[B, C, *s] -> [B, C * f^rank, *(s / f)]``.

    Pixel-unshuffle (Shi et al. 2016) in any rank; every size must be a multiple of ``factor``.
    """
    batch, channels, *spatial = x.shape
    rank = len(spatial)
    x = x.reshape(batch, channels, *(n for size in spatial for n in (size // factor, factor)))
    order = [0, 1, *range(3, 3 + 2 * rank, 2), *range(2, 2 + 2 * rank, 2)]
    return x.permute(order).reshape(batch, channels * factor**rank, *(size // factor for size in spatial))


def unfold(x: Tensor, factor: int) -> Tensor:
    """The inverse of :func:`fold`: ``[B, C * f^rank, *s] -> [B, C, *(s * f)]``."""
    batch, channels, *spatial = x.shape
    rank = len(spatial)
    x = x.reshape(batch, channels // factor**rank, *[factor] * rank, *spatial)
    order = [0, 1, *(axis for i in range(rank) for axis in (2 + rank + i, 2 + i))]
    return x.permute(order).reshape(batch, channels // factor**rank, *(size * factor for size in spatial))


def check_inputs(
    x: Tensor, label: Tensor, vector: Tensor | None, channels: int, rank: int, condition_width: int
) -> None:
    """Raise :class:`UndiffuseError` unless the three inputs fit each other and the network."""
    if x.ndim != rank + 2 or x.shape[1] != channels:
        wanted = ", ".join(["B", str(channels), *["size"] * rank])
        raise UndiffuseError(f"x has shape {list(x.shape)}, but this network takes [{wanted}]")
    if label.shape != x.shape[:1]:
        raise UndiffuseError(
            f"label has shape {list(label.shape)}, but it must be [{len(x)}]: one number a sample of x"
        )
    if vector is None and condition_width:
        raise UndiffuseError(f"this network is conditional: pass vector of shape [{len(x)}, {condition_width}]")
    if vector is not None and not condition_width:
        raise UndiffuseError("this network is unconditional (condition_width=0), but a condition vector was passed")
    if vector is not None and vector.shape != (len(x), condition_width):
        raise UndiffuseError(f"vector has shape {list(vector.shape)}, but it must be [{len(x)}, {condition_width}]")


def check_sizes(**sizes: int) -> None:
    """Raise :class:`UndiffuseError` for the first named constructor argument that is no whole number >= 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UndiffuseError(f"{name}={size!r} must be a whole number of at least 1")
