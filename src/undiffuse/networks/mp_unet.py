"""The magnitude-preserving U-Net: whatever it learns, its activations and its weights keep their size.

EDM2 (Karras et al. 2024, arXiv:2312.02696, section 2 and appendix B, config G). In an ordinary network both grow
without bound in training, and the growth of the weights acts as a decay of the learning rate that nobody has chosen.
Here every operation is scaled to give variance 1 from inputs of variance 1: weights act by their direction alone, there
are no biases and no group norms, sums and concatenations are weighted, attention goes by cosines, and a few learned
gains say how much of something there is. What is handed across is one set of features a level, as in :class:`UNet`.

Forward passes only read the weights. :func:`constrain`, which the trainer calls after each update, sets them back to
length 1 ("forced weight normalisation", eq. 66): what is averaged, saved and resumed from are the weights themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reuse import Deep, afresh
from .layers import (
    Attend,
    Network,
    check_levels,
    check_sizes,
    cropped,
    fold,
    heads_of,
    join_heads,
    mean_token,
    padded,
    sinusoid,
    split_heads,
    unfold,
    wide,
)

BALANCE = 0.3  # share of a residual branch in its sum (appendix B.5)

# --- Operations that keep the variance --------------------------------------------------------------------------------


def unit(x: Tensor, axes: Sequence[int]) -> Tensor:
    """``x`` with root mean square 1 over ``axes`` (eq. 30); all zeros stay so. Computed in float32 at least."""
    y = wide(x)
    return (y * (y.square().mean(tuple(axes), keepdim=True) + 1e-8).rsqrt()).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU over 0.596, the root mean square of its values at normal numbers (eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """``(1 - t) a + t b``, scaled to keep the variance of independent a and b (eq. 88)."""
    return torch.lerp(a, b, t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor) -> Tensor:
    """Concatenation along channels in which both halves weigh the same, however many channels they have (eq. 103)."""
    total = a.shape[1] + b.shape[1]
    return torch.cat([x * math.sqrt(total / (2 * x.shape[1])) for x in (a, b)], dim=1)


PRODUCTS: dict[int, Callable[..., Tensor]] = {0: F.linear, 1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
POOLINGS: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


class MPProduct(nn.Module):
    """A linear map (``rank`` 0, over the last axis) or convolution without bias, whose weights act by their direction:
    each output's are scaled to length 1 wherever they are used (eq. 47)."""

    def __init__(self, rank: int, inputs: int, outputs: int, kernel: int = 1) -> None:
        super().__init__()
        self.product = PRODUCTS[rank]
        self.padding = {"padding": kernel // 2} if rank else {}
        self.weight = nn.Parameter(nn.init.normal_(torch.empty(outputs, inputs, *[kernel] * rank)))
        constrain(self)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = unit(self.weight, range(1, self.weight.ndim))
        return self.product(x, (weight * (gain / math.sqrt(weight[0].numel()))).to(weight.dtype), **self.padding)


@torch.no_grad()
def constrain(module: nn.Module, unless: Tensor | None = None) -> None:
    """Set the weights of every :class:`MPProduct` in ``module`` back to root mean square 1, which changes nothing that
    it computes, but the size of what the next updates do.

    Without it weights grow, since updates are at right angles to them, and learning slows down. If the number
    ``unless`` is positive, nothing happens; it stays on its device.
    """
    for part in module.modules():
        if isinstance(part, MPProduct):
            after = unit(part.weight, range(1, part.weight.ndim))
            part.weight.copy_(after if unless is None else torch.where(unless > 0, part.weight, after))


# --- Blocks -----------------------------------------------------------------------------------------------------------


class MPEmbedding(nn.Module):
    """Level, vector and mean token, each by its own map, summed: ``[B, width]``."""

    def __init__(self, width: int, condition_width: int, token_width: int) -> None:
        super().__init__()
        self.waves = max(64, width // 4)
        self.level = MPProduct(0, self.waves, width)
        self.condition = MPProduct(0, condition_width, width) if condition_width else None
        self.pooled = MPProduct(0, token_width, width) if token_width else None

    def forward(
        self, label: Tensor, vector: Tensor | None, tokens: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        dtype = self.level.weight.dtype
        # The squares of a sine and a cosine add up to 1: together their mean is 1/2.
        embedding = self.level((math.sqrt(2) * sinusoid(label, self.waves)).to(dtype))
        if self.condition is not None and vector is not None:
            embedding = mp_sum(embedding, self.condition(vector.to(dtype)), 0.5)
        if self.pooled is not None and tokens is not None:
            embedding = mp_sum(embedding, self.pooled(unit(mean_token(tokens, mask), [1]).to(dtype)), 0.5)
        return mp_silu(embedding)


class MPBlock(nn.Module):
    """``mp_sum(x, conv(mp_silu(scale * conv(mp_silu(x)))))``, the scale by the embedding (figures 20 and 21).

    On the way down (``down``) the features of every pixel are set to root mean square 1 first, so that the features
    handed on cannot grow either. A change of width goes through a 1x1 convolution.
    """

    def __init__(self, rank: int, inputs: int, width: int, embedding: int, dropout: float, down: bool) -> None:
        super().__init__()
        self.down = down
        self.fit = MPProduct(rank, inputs, width) if inputs != width else None
        self.first = MPProduct(rank, width if down else inputs, width, 3)
        self.film = MPProduct(0, embedding, width)
        # 0 in the paper. Then level and condition could not move the output in the first update (trap O5).
        self.gain = nn.Parameter(torch.tensor(0.1))
        self.dropout = nn.Dropout(dropout)
        self.second = MPProduct(rank, width, width, 3)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``[B, inputs, *spatial] -> [B, width, *spatial]``."""
        fitted = x if self.fit is None else self.fit(x)
        if self.down:
            x = fitted = unit(fitted, [1])
        scale = 1 + self.film(embedding, self.gain)
        y = self.first(mp_silu(x))
        y = mp_silu(y * scale.reshape(*scale.shape, *[1] * (y.ndim - 2)))
        return mp_sum(fitted, self.second(self.dropout(y)), BALANCE)


class MPAttention(nn.Module):
    """``mp_sum(x, W attention(x))`` with queries, keys and values of unit root mean square: to other positions, or, if
    ``token_width`` is given, to tokens behind a learned token of nothing."""

    def __init__(self, channels: int, head_width: int, token_width: int = 0) -> None:
        super().__init__()
        self.heads = heads_of(channels, head_width)
        self.query = MPProduct(0, channels, channels)
        self.keys_values = MPProduct(0, token_width or channels, 2 * channels)
        self.nothing = nn.Parameter(nn.init.normal_(torch.empty(token_width))) if token_width else None
        self.attend = Attend()
        self.out = MPProduct(0, channels, channels)

    def forward(self, x: Tensor, tokens: Tensor | None, mask: Tensor | None) -> Tensor:
        """``[B, C, *spatial] -> [B, C, *spatial]``."""
        h = x.flatten(2).transpose(1, 2)
        rows, count = h, 0
        if self.nothing is not None and tokens is not None:
            count = tokens.shape[1]
            nothing = self.nothing.expand(len(h), 1, -1)
            rows = unit(torch.cat([nothing, tokens.to(nothing.dtype)], dim=1), [2])
        q = split_heads(self.query(h), self.heads)
        k, v = (split_heads(each, self.heads) for each in self.keys_values(rows).chunk(2, dim=-1))
        y = self.attend(unit(q, [-1]), unit(k, [-1]), unit(v, [-1]), 1, count, mask if count else None, x.shape[2:])
        return mp_sum(x, self.out(join_heads(y)).transpose(1, 2).reshape(x.shape), BALANCE)


class MPStage(nn.Module):
    """A block and, at the levels that have it, attention to itself and to the tokens."""

    def __init__(self, block: MPBlock, attention: MPAttention | None, cross: MPAttention | None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention
        self.cross = cross

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor | None, mask: Tensor | None) -> Tensor:
        """``[B, inputs, *spatial] -> [B, C, *spatial]``."""
        x = self.block(x, embedding)
        if self.attention is not None:
            x = self.attention(x, None, None)
        return x if self.cross is None else self.cross(x, tokens, mask)


# --- The network ------------------------------------------------------------------------------------------------------


@final
class MPUNet(Network):
    """A magnitude-preserving U-Net; the arguments are those of :class:`UNet`.

    ``x`` should have variance near 1 at every level, as it has on variance-preserving schedules, on flows, and under
    ``UnitVariance``. A learned gain, 0 at first, scales the output.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        rank: int = 2,
        widths: Sequence[int] = (32, 64, 128),
        blocks: Sequence[int] = (1, 1, 1),
        attention: Sequence[int] = (2,),
        head_width: int = 64,
        embedding: int = 256,
        condition_width: int = 0,
        fold: int = 1,
        dropout: float = 0.0,
        token_width: int = 0,
    ) -> None:
        super().__init__(locals())
        check_sizes(head_width=head_width, embedding=embedding, fold=fold)
        check_levels(rank, widths, blocks, attention, dropout, token_width)
        self.fold = (fold,) * rank

        def stages(level: int, inputs: int, down: bool) -> nn.ModuleList:
            width, attends = widths[level], level in attention
            return nn.ModuleList(
                MPStage(
                    MPBlock(rank, inputs if i == 0 else width, width, embedding, dropout, down),
                    MPAttention(width, head_width) if attends else None,
                    MPAttention(width, head_width, token_width) if attends and token_width else None,
                )
                for i in range(blocks[level])
            )

        lowest = len(widths) - 1
        before = [widths[0], *widths]  # what comes in from the level above
        self.embedding = MPEmbedding(embedding, condition_width, token_width)
        self.stem = MPProduct(rank, in_channels * fold**rank + 1, widths[0], 3)
        self.down = nn.ModuleList(stages(i, before[i], True) for i in range(lowest))
        self.middle = stages(lowest, before[lowest], True)
        self.up = nn.ModuleList(stages(i, widths[i] + widths[i + 1], False) for i in range(lowest))
        self.head = MPProduct(rank, widths[0], self.out_channels * fold**rank, 3)
        self.gain = nn.Parameter(torch.tensor(0.0))

    @property
    def has_deep_part(self) -> bool:
        """All levels but the first."""
        return len(self.down) > 0

    def forward(
        self,
        x: Tensor,
        label: Tensor,
        vector: Tensor | None = None,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        deep: Deep = afresh,
    ) -> Tensor:
        """See :meth:`Network.forward`."""
        tokens = self.check(x, label, vector, tokens, mask)
        size = x.shape[2:]
        embedding = self.embedding(label, vector, tokens, mask)
        h = fold(padded(x.to(embedding.dtype), self.fold), self.fold)
        h = self.stem(torch.cat([h, torch.ones_like(h[:, :1])], dim=1))  # the ones stand for a bias
        if self.rank == 2:
            h = h.contiguous(memory_format=torch.channels_last)

        def levels(h: Tensor, level: int, deep: Deep) -> Tensor:
            """A level and those below it; ``deep`` is how it goes through these."""
            if level == len(self.down):
                for stage in self.middle:
                    h = stage(h, embedding, tokens, mask)
                return h
            for stage in cast(nn.ModuleList, self.down[level]):
                h = stage(h, embedding, tokens, mask)
            skip = h

            def below() -> Tensor:
                pool = [min(2, n) for n in skip.shape[2:]]
                # At least in float32: torch has no half precision for it on a CPU in three dimensions.
                wide = skip.to(torch.promote_types(skip.dtype, torch.float32))
                h = POOLINGS[self.rank](wide, pool, ceil_mode=True, count_include_pad=False).to(skip.dtype)
                return levels(h, level + 1, afresh)

            h = mp_cat(F.interpolate(deep(below), size=skip.shape[2:], mode="nearest"), skip)
            for stage in cast(nn.ModuleList, self.up[level]):
                h = stage(h, embedding, tokens, mask)
            return h

        return cropped(unfold(self.head(levels(h, 0, deep), self.gain), self.fold), size)
