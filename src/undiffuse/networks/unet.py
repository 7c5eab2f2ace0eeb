"""The U-Net: look at the image at several resolutions, coarse ones for what it is, fine ones for where.

Ronneberger et al. 2015, with the residual blocks, level embedding and attention of Ho et al. 2020 and Dhariwal & Nichol
2021. It is an hourglass: every level but the lowest goes down and up again and hands its features across; the lowest
level is the middle. Features that are handed across are added, not concatenated: the blocks on the way up then have as
many inputs as outputs, need no projection, and the multiplications saved are spent on width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reuse import Deep, afresh
from .layers import (
    CrossAttention,
    Embedding,
    FilmNorm,
    Network,
    ResidualBlock,
    SelfAttention,
    check_levels,
    check_sizes,
    convolution,
    cropped,
    fold,
    padded,
    unfold,
    zeroed,
)


class Stage(nn.Module):
    """A residual block and, at the levels that have it, attention to itself and to the tokens."""

    def __init__(self, block: ResidualBlock, attention: SelfAttention | None, cross: CrossAttention | None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention
        self.cross = cross

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor | None, mask: Tensor | None) -> Tensor:
        """``[B, C, *spatial] -> [B, C, *spatial]``."""
        x = self.block(x, embedding)
        if self.attention is not None:
            x = self.attention(x)
        return x if self.cross is None or tokens is None else self.cross(x, tokens, mask)


def coordinates(h: Tensor) -> Tensor:
    """``[B, rank, *spatial]``: where each position of ``h`` lies along each axis, from -1 to 1."""
    axes = [torch.linspace(-1, 1, size, device=h.device, dtype=h.dtype) for size in h.shape[2:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(len(h), *[-1] * (h.ndim - 1))


@final
class UNet(Network):
    """A U-Net for data of shape ``[in_channels, *spatial]`` with ``rank`` spatial dimensions of any size.

    Odd sizes round up on the way down and are cropped on the way up; a size that is no multiple of ``fold`` is padded
    with its edge inside and cropped outside.

    Args:
        in_channels: channels of ``x``.
        out_channels: channels of the output, ``in_channels`` unless given (twice as many for a learned variance).
        rank: spatial dimensions: 1, 2 or 3.
        widths: channels at each level, from the full size down; each level halves the size.
        blocks: residual blocks at each level. A level but the last has them twice: going down, and going up.
        attention: indices of the levels with self-attention after each block, and cross-attention to tokens.
        head_width: wanted channels of an attention head; rounded so that heads divide the width.
        embedding: width of the level (and condition) embedding.
        condition_width: width of the condition vector, 0 for an unconditional network.
        fold: pixels along each dimension that are folded into channels first: fewer positions, faster.
        dropout: probability inside the residual blocks, in [0, 1).
        token_width: width of the condition's tokens, 0 for a network that takes none.
        coordinates: lay beside x where each position lies (Liu et al. 2018, arXiv:1807.03247). Without, a convolution
            learns of "left" and "above" from the padding at the border alone, which noise hides.

    Raises:
        UndiffuseError: arguments that do not fit each other.
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
        coordinates: bool = False,
    ) -> None:
        super().__init__(locals())
        out_channels = self.out_channels
        check_sizes(head_width=head_width, embedding=embedding, fold=fold)
        check_levels(rank, widths, blocks, attention, dropout, token_width)
        self.fold = (fold,) * rank
        self.coordinates = coordinates

        def stages(level: int) -> nn.ModuleList:
            return nn.ModuleList(
                Stage(
                    ResidualBlock(rank, widths[level], embedding, dropout),
                    SelfAttention(widths[level], head_width) if level in attention else None,
                    CrossAttention(widths[level], token_width, head_width)
                    if level in attention and token_width
                    else None,
                )
                for _ in range(blocks[level])
            )

        upper = range(len(widths) - 1)
        self.embedding = Embedding(embedding, condition_width, token_width)
        self.stem = convolution(rank, in_channels * fold**rank + rank * coordinates, widths[0], 3)
        self.down = nn.ModuleList(stages(i) for i in upper)
        self.shrink = nn.ModuleList(convolution(rank, widths[i], widths[i + 1], 3, stride=2) for i in upper)
        self.middle = stages(len(widths) - 1)
        self.grow = nn.ModuleList(convolution(rank, widths[i + 1], widths[i], 1) for i in upper)
        self.up = nn.ModuleList(stages(i) for i in upper)
        self.norm = FilmNorm(widths[0], embedding)
        self.head = zeroed(convolution(rank, widths[0], out_channels * fold**rank, 3))

    @property
    def has_deep_part(self) -> bool:
        """All between the first block and the last of the upper level; there must be a lower one."""
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
        h = self.stem(torch.cat([h, coordinates(h)], dim=1) if self.coordinates else h)
        if self.rank == 2:
            # Convolutions are some 10 % faster in this layout; weights may stay as they are (or be converted too).
            h = h.contiguous(memory_format=torch.channels_last)
        down, up = ([[*cast(nn.ModuleList, stages)] for stages in each] for each in (self.down, self.up))
        first, last = ([down[0].pop(0)], [up[0].pop()]) if down else ([], [])

        def between(h: Tensor) -> Tensor:
            skips: list[Tensor] = []
            for stages, shrink in zip(down, self.shrink, strict=True):
                for stage in stages:
                    h = stage(h, embedding, tokens, mask)
                skips.append(h)
                h = shrink(h)
            for stage in self.middle:
                h = stage(h, embedding, tokens, mask)
            for grow, stages in zip(reversed(self.grow), reversed(up), strict=True):
                # A 1x1 convolution and nearest-neighbour growth commute: multiply while the image is small. Growing to
                # the size of the skip is doubling and cropping in one.
                skip = skips.pop()
                h = skip + F.interpolate(grow(h), size=skip.shape[2:], mode="nearest")
                for stage in stages:
                    h = stage(h, embedding, tokens, mask)
            return h

        for stage in first:
            h = stage(h, embedding, tokens, mask)
        h = deep(partial(between, h), beside=h)  # every block adds to what it is given, so together they do too
        for stage in last:
            h = stage(h, embedding, tokens, mask)
        y = self.head(F.silu(self.norm(h, embedding)))
        return cropped(unfold(y, self.fold), size)
