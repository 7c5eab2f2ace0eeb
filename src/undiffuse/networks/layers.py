"""What every network is, and the blocks that they are made of.

Besides ``x`` a network is told how noisy ``x`` is (``label``), and what is asked for: as one vector (``vector``), as
a row of vectors (``tokens``, such as the words of a text), or both. All but the row itself become one *embedding*
``[B, E]`` (:class:`Embedding`), which reaches every block as FiLM: a scale and a shift for each channel (Perez et al.
2018, "FiLM: visual reasoning with a general conditioning layer"). The row is looked at by attention
(:class:`TokenAttention`). The blocks work in any rank: ``[B, C]``, ``[B, C, L]``, ``[B, C, H, W]``,
``[B, C, D, H, W]``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import attention
from ..errors import UndiffuseError


class Network(nn.Module, ABC):
    """Abstract: what is trained, ``network(x, label, vector, tokens, mask) -> y``.

    Attributes:
        config: the constructor's arguments, as JSON has them.
        in_channels, out_channels: of ``x`` and ``y``.
        rank: spatial dimensions of ``x``, 0 for points.
        condition_width: numbers in ``vector``, 0 for a network that takes none.
        token_width: numbers in a token, 0 for a network that takes none.
    """

    def __init__(self, given: Mapping[str, Any], rank: int | None = None) -> None:
        """
        Args:
            given: the arguments of the author's constructor: ``locals()``, in its first line.
            rank: where it is none of them.
        """
        super().__init__()
        self.config: dict[str, Any] = {
            name: list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
            for name, value in given.items()
            if name not in ("self", "__class__")
        }
        if self.config["out_channels"] is None:
            self.config["out_channels"] = self.config["in_channels"]
        self.in_channels: int = self.config["in_channels"]
        self.out_channels: int = self.config["out_channels"]
        self.rank: int = self.config["rank"] if rank is None else rank
        self.condition_width: int = self.config["condition_width"]
        self.token_width: int = self.config.get("token_width", 0)
        check_sizes(in_channels=self.in_channels, out_channels=self.out_channels)
        for name in ("condition_width", "token_width"):
            if width := self.config.get(name, 0):
                check_sizes(**{name: width})

    @property
    def has_deep_part(self) -> bool:
        """Whether it takes one more argument, ``deep``: how it goes through its deep part (:mod:`undiffuse.reuse`)."""
        return False

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        label: Tensor,
        vector: Tensor | None = None,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The network's answer, in the dtype of its weights.

        Args:
            x: ``[B, in_channels, *spatial]``, any size from 1 pixel up.
            label: ``[B]`` float32, the noise level as a number on a scale about a thousand wide.
            vector: ``[B, condition_width]``, the embedded condition; None exactly if ``condition_width`` is 0.
            tokens: ``[B, T, token_width]``, a condition of up to T parts; None exactly if ``token_width`` is 0.
            mask: ``[B, T]`` bool, True for the tokens that are there; None for all. What stands in the others (even
                NaN) changes nothing. A sample may have none at all.

        Returns:
            ``[B, out_channels, *spatial]``.

        Raises:
            UndiffuseError: shapes that do not fit, or a condition where there should be none, or the reverse.
        """

    def check(
        self, x: Tensor, label: Tensor, vector: Tensor | None, tokens: Tensor | None, mask: Tensor | None
    ) -> Tensor | None:
        """The tokens with those that are not there set to 0, or an error that says what does not fit."""
        batch = len(x)
        if x.ndim != self.rank + 2 or x.shape[1] != self.in_channels:
            wanted = ", ".join(["B", str(self.in_channels), *["size"] * self.rank])
            raise UndiffuseError(f"x has shape {list(x.shape)}, but this network takes [{wanted}]")
        if label.shape != x.shape[:1]:
            raise UndiffuseError(
                f"label has shape {list(label.shape)}, but it must be [{batch}]: one number a sample of x"
            )
        for name, given, width, shape in (
            ("vector", vector, self.condition_width, (self.condition_width,)),
            ("tokens", tokens, self.token_width, ("T", self.token_width)),
        ):
            wanted = f"[{batch}, {', '.join(map(str, shape))}]"
            if given is None and width:
                raise UndiffuseError(f"this network is conditional: pass {name} of shape {wanted}")
            if given is None:
                continue
            if not width:
                option = "condition_width" if name == "vector" else "token_width"
                raise UndiffuseError(f"this network is unconditional ({option}=0), but {name} was passed")
            if given.ndim != len(shape) + 1 or len(given) != batch or given.shape[-1] != width:
                raise UndiffuseError(f"{name} has shape {list(given.shape)}, but it must be {wanted}")
        if mask is None:
            return tokens
        if tokens is None:
            raise UndiffuseError("mask was passed without the tokens that it belongs to")
        if mask.shape != tokens.shape[:2] or mask.dtype != torch.bool:
            raise UndiffuseError(
                f"mask is {mask.dtype} of shape {list(mask.shape)}, but it must be bool {list(tokens.shape[:2])}, "
                "True for the tokens that are there"
            )
        return tokens.masked_fill(~mask[..., None], 0)  # 0 times NaN would be NaN


def check_sizes(**sizes: int) -> None:
    """Raise :class:`UndiffuseError` for the first named constructor argument that is no whole number >= 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UndiffuseError(f"{name}={size!r} must be a whole number of at least 1")


def check_levels(
    rank: int, widths: Sequence[int], blocks: Sequence[int], attention: Sequence[int], dropout: float, token_width: int
) -> None:
    """Raise :class:`UndiffuseError` for arguments of a U-Net that do not fit each other."""
    check_sizes(**{f"widths[{i}]": width for i, width in enumerate(widths)})
    check_sizes(**{f"blocks[{i}]": count for i, count in enumerate(blocks)})
    if rank not in CONVOLUTIONS:
        raise UndiffuseError(f"rank={rank!r} must be 1, 2 or 3 (points without spatial dimensions: network 'mlp')")
    if not widths or len(widths) != len(blocks):
        raise UndiffuseError(f"widths and blocks need one number a level, got {len(widths)} and {len(blocks)}")
    if min(widths) < 4:
        raise UndiffuseError(f"widths={list(widths)} must be at least 4, the smallest group of group norm")
    if not set(attention) <= set(range(len(widths))):
        raise UndiffuseError(f"attention={list(attention)} must name levels from 0 to {len(widths) - 1}")
    if not 0 <= dropout < 1:
        raise UndiffuseError(f"dropout={dropout!r} must be in [0, 1)")
    if token_width and not attention:
        raise UndiffuseError("tokens are looked at where there is attention: name levels in attention, such as [0]")


CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}


def convolution(rank: int, inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Module:
    """A convolution over ``rank`` dimensions that keeps the size, or with ``stride=2`` halves it (rounding up)."""
    return CONVOLUTIONS[rank](inputs, outputs, kernel, stride=stride, padding=kernel // 2)


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 at least: norms lose too much in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
    """``silu(W2 silu(W1 sinusoid(label)) + V vector + U mean(tokens))``: what every FiLM reads, ``[B, width]``.

    The sinusoid is computed in float32 whatever the dtype of the weights. The mean over the tokens that are there, 0 if
    there are none, says early in training what attention to each of them learns later.
    """

    def __init__(
        self, width: int, condition_width: int, token_width: int = 0, waves: int = 0, longest: float = 10_000.0
    ) -> None:
        super().__init__()
        self.waves = waves or max(64, width // 4)
        self.longest = longest
        self.first = nn.Linear(self.waves, width)
        self.second = nn.Linear(width, width)
        self.condition = nn.Linear(condition_width, width) if condition_width else None
        self.pooled = nn.Linear(token_width, width) if token_width else None

    def forward(
        self, label: Tensor, vector: Tensor | None, tokens: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """``label`` is ``[B]``; ``vector``, ``tokens`` and ``mask`` are as :meth:`Network.check` left them."""
        dtype = self.first.weight.dtype
        embedding = self.second(F.silu(self.first(sinusoid(label, self.waves, self.longest).to(dtype))))
        if self.condition is not None and vector is not None:
            embedding = embedding + self.condition(vector.to(dtype))
        if self.pooled is not None and tokens is not None:
            embedding = embedding + self.pooled(mean_token(tokens, mask).to(dtype))
        return F.silu(embedding)


def mean_token(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """``[B, T, D] -> [B, D]``: the mean of the tokens that are there, 0 where none is; the others are 0 already."""
    total = tokens.sum(1, dtype=torch.promote_types(tokens.dtype, torch.float32))
    return total / max(1, tokens.shape[1]) if mask is None else total / mask.sum(1, keepdim=True).clamp(min=1)


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
        self.heads = heads_of(channels, head_width)
        self.norm = nn.GroupNorm(groups_of(channels), channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, *spatial] -> [B, C, *spatial]``."""
        batch, channels = x.shape[:2]
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).reshape(batch, -1, 3, self.heads, channels // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(y).transpose(1, 2).reshape(x.shape)


class Attend(nn.Module):
    """``softmax(q k^T / sqrt(d)) v``, where the keys of tokens that are not there get no weight at all.

    It has no weights; it is a module so that :func:`undiffuse.networks.attention_maps` can look on.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, first: int, tokens: int, mask: Tensor | None, grid: Sequence[int]
    ) -> Tensor:
        """Attention over T' keys, of which ``first`` to ``first + tokens`` belong to tokens.

        Args:
            q: ``[B, heads, Q, d]``; the last queries are those of the positions.
            k, v: ``[B, heads, T', d]``.
            first, tokens: where the tokens stand, and how many they are.
            mask: ``[B, tokens]`` bool, as in :class:`Network`.
            grid: how the positions lie in space.
        """
        return attention(q, k, v, key_mask(k, first, mask))


def key_mask(k: Tensor, first: int, mask: Tensor | None) -> Tensor | None:
    """``[B, 1, 1, T']``: True for every key of ``k [B, heads, T', d]`` but those of tokens that are not there."""
    if mask is None:
        return None
    return F.pad(mask, (first, k.shape[2] - first - mask.shape[1]), value=True)[:, None, None]


class TokenAttention(nn.Module):
    """``W attention(h, tokens)``, every position looking at all tokens that are there; ``W`` starts at 0.

    One learned token of nothing stands before the given ones: a position need not look at any of them, and may even be
    given none.
    """

    def __init__(self, width: int, token_width: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads_of(width, head_width)
        self.query = nn.Linear(width, width)
        self.keys_values = nn.Linear(token_width, 2 * width)
        self.nothing = nn.Parameter(nn.init.normal_(torch.empty(2 * width), std=token_width**-0.5))
        self.attend = Attend()
        self.out = zeroed(nn.Linear(width, width))

    def forward(self, h: Tensor, tokens: Tensor, mask: Tensor | None, grid: Sequence[int]) -> Tensor:
        """``h`` is ``[B, N, width]``, its positions lying on ``grid``; tokens and mask are as in :class:`Network`."""
        q = split_heads(self.query(h), self.heads)
        given = self.keys_values(tokens.to(self.nothing.dtype))
        both = torch.cat([self.nothing.to(given.dtype).expand(len(h), 1, -1), given], dim=1)
        k, v = (split_heads(each, self.heads) for each in both.chunk(2, dim=-1))
        return self.out(join_heads(self.attend(q, k, v, 1, tokens.shape[1], mask, grid)))


def heads_of(width: int, head_width: int) -> int:
    """The number of heads that are about ``head_width`` wide and divide ``width``."""
    return math.gcd(width, max(1, width // head_width))


def split_heads(h: Tensor, heads: int) -> Tensor:
    """``[B, N, heads * d] -> [B, heads, N, d]``."""
    return h.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(h: Tensor) -> Tensor:
    """The inverse of :func:`split_heads`."""
    return h.transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    """``x + W attention(norm(x), tokens)`` for a convolutional network; ``W`` starts at 0."""

    def __init__(self, channels: int, token_width: int, head_width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups_of(channels), channels)
        self.look = TokenAttention(channels, token_width, head_width)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """``[B, C, *spatial] -> [B, C, *spatial]``."""
        h = self.norm(x).flatten(2).transpose(1, 2)
        return x + self.look(h, tokens, mask, x.shape[2:]).transpose(1, 2).reshape(x.shape)


def padded(x: Tensor, multiples: Sequence[int]) -> Tensor:
    """``x [B, C, *spatial]`` with its last entries repeated until each size is a multiple of its number."""
    missing = [-size % multiple for size, multiple in zip(x.shape[2:], multiples, strict=True)]
    if not any(missing):
        return x
    # F.pad counts from the last dimension, and pads the end only.
    return F.pad(x, [n for pad in reversed(missing) for n in (0, pad)], mode="replicate")


def cropped(y: Tensor, size: Sequence[int]) -> Tensor:
    """The first ``size`` entries of ``y [B, C, *spatial]``: takes back what :func:`padded` added."""
    return y[(..., *(slice(0, length) for length in size))]


def fold(x: Tensor, factors: Sequence[int]) -> Tensor:
    """Move neighbours into channels, ``factors`` of them along each dimension: ``[B, C, *s] -> [B, C * F, *(s / f)]``.

    Pixel-unshuffle (Shi et al. 2016) in any rank; every size must be a multiple of its factor. F is their product.
    """
    batch, channels, *spatial = x.shape
    rank = len(spatial)
    x = x.reshape(batch, channels, *(n for size, f in zip(spatial, factors, strict=True) for n in (size // f, f)))
    order = [0, 1, *range(3, 3 + 2 * rank, 2), *range(2, 2 + 2 * rank, 2)]
    return x.permute(order).flatten(1, 1 + rank)


def unfold(x: Tensor, factors: Sequence[int]) -> Tensor:
    """The inverse of :func:`fold`: ``[B, C * F, *s] -> [B, C, *(s * f)]``."""
    batch, channels, *spatial = x.shape
    rank = len(spatial)
    x = x.reshape(batch, channels // math.prod(factors), *factors, *spatial)
    order = [0, 1, *(axis for i in range(rank) for axis in (2 + rank + i, 2 + i))]
    return x.permute(order).reshape(batch, -1, *(size * f for size, f in zip(spatial, factors, strict=True)))
