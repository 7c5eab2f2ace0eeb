"""The U-Net: look at the image at several resolutions, coarse ones for what it is, fine ones for where.

Ronneberger et al. 2015, with the residual blocks, level embedding and attention of Ho et al. 2020 and Dhariwal & Nichol
2021. It is an hourglass: every level but the lowest goes down and up again and hands its features across; the lowest
level is the middle. Features that are handed across are added, not concatenated: the blocks on the way up then have as
many inputs as outputs, need no projection, and the multiplications saved are spent on width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UndiffuseError
from .layers import (
    CONVOLUTIONS,
    Embedding,
    FilmNorm,
    ResidualBlock,
    SelfAttention,
    check_inputs,
    check_sizes,
    convolution,
    fold,
    unfold,
    zeroed,
)


class Stage(nn.Module):
    """A residual block and, at the levels that have it, self-attention."""

    def __init__(self, block: ResidualBlock, attention: SelfAttention | None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``[B, C, *spatial] -> [B, C, *spatial]``."""
        x = self.block(x, embedding)
        return x if self.attention is None else self.attention(x)


class UNet(nn.Module):
    """A U-Net for data of shape ``[in_channels, *spatial]`` with ``rank`` spatial dimensions of any size.

    Odd sizes round up on the way down and are cropped on the way up; a size that is no multiple of ``fold`` is padded
    with its edge inside and cropped outside.

    Args:
        in_channels: channels of ``x``.
        out_channels: channels of the output, ``in_channels`` unless given (twice as many for a learned variance).
        rank: spatial dimensions: 1, 2 or 3.
        widths: channels at each level, from the full size down; each level halves the size.
        blocks: residual blocks at each level. A level but the last has them twice: going down, and going up.
        attention: indices of the levels with self-attention after each block.
        head_width: wanted channels of an attention head; rounded so that heads divide the width.
        embedding: width of the level (and condition) embedding.
        condition_width: width of the condition vector, 0 for an unconditional network.
        fold: pixels along each dimension that are folded into channels first: fewer positions, faster.
        dropout: probability inside the residual blocks, in [0, 1).

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
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.config: dict[str, object] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "rank": rank,
            "widths": list(widths),
            "blocks": list(blocks),
            "attention": list(attention),
            "head_width": head_width,
            "embedding": embedding,
            "condition_width": condition_width,
            "fold": fold,
            "dropout": dropout,
        }
        check_sizes(
            in_channels=in_channels, out_channels=out_channels, head_width=head_width, embedding=embedding, fold=fold
        )
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
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.rank = rank
        self.condition_width = condition_width
        self.fold = fold

        def stages(level: int) -> nn.ModuleList:
            return nn.ModuleList(
                Stage(
                    ResidualBlock(rank, widths[level], embedding, dropout),
                    SelfAttention(widths[level], head_width) if level in attention else None,
                )
                for _ in range(blocks[level])
            )

        upper = range(len(widths) - 1)
        self.embedding = Embedding(embedding, condition_width)
        self.stem = convolution(rank, in_channels * fold**rank, widths[0], 3)
        self.down = nn.ModuleList(stages(i) for i in upper)
        self.shrink = nn.ModuleList(convolution(rank, widths[i], widths[i + 1], 3, stride=2) for i in upper)
        self.middle = stages(len(widths) - 1)
        self.grow = nn.ModuleList(convolution(rank, widths[i + 1], widths[i], 1) for i in upper)
        self.up = nn.ModuleList(stages(i) for i in upper)
        self.norm = FilmNorm(widths[0], embedding)
        self.head = zeroed(convolution(rank, widths[0], out_channels * fold**rank, 3))

    def forward(self, x: Tensor, label: Tensor, vector: Tensor | None = None) -> Tensor:
        """The network's answer, in the dtype of its weights.

        Args:
            x: ``[B, in_channels, *spatial]``, any size from 1 pixel up.
            label: ``[B]`` float32, the noise level as a number on a scale about a thousand wide.
            vector: ``[B, condition_width]``, the embedded condition; None for an unconditional network.

        Returns:
            ``[B, out_channels, *spatial]``.

        Raises:
            UndiffuseError: shapes that do not fit, or a condition where there should be none, or the reverse.
        """
        check_inputs(x, label, vector, self.in_channels, self.rank, self.condition_width)
        size = x.shape[2:]
        embedding = self.embedding(label, vector)
        h = self.stem(self._folded(x.to(embedding.dtype)))
        if self.rank == 2:
            # Convolutions are some 10 % faster in this layout; weights may stay as they are (or be converted too).
            h = h.contiguous(memory_format=torch.channels_last)
        skips: list[Tensor] = []
        for down, shrink in zip(self.down, self.shrink, strict=True):
            for stage in cast(nn.ModuleList, down):
                h = stage(h, embedding)
            skips.append(h)
            h = shrink(h)
        for stage in self.middle:
            h = stage(h, embedding)
        for grow, up in zip(reversed(self.grow), reversed(self.up), strict=True):
            # A 1x1 convolution and nearest-neighbour growth commute: multiply while the image is small. Growing to the
            # size of the skip is doubling and cropping in one.
            skip = skips.pop()
            h = skip + F.interpolate(grow(h), size=skip.shape[2:], mode="nearest")
            for stage in cast(nn.ModuleList, up):
                h = stage(h, embedding)
        y = self.head(F.silu(self.norm(h, embedding)))
        return self._unfolded(y, size)

    def _folded(self, x: Tensor) -> Tensor:
        if self.fold == 1:
            return x
        missing = [-size % self.fold for size in x.shape[2:]]
        if any(missing):
            # F.pad counts from the last dimension, and pads the end only.
            x = F.pad(x, [n for pad in reversed(missing) for n in (0, pad)], mode="replicate")
        return fold(x, self.fold)

    def _unfolded(self, y: Tensor, size: torch.Size) -> Tensor:
        if self.fold == 1:
            return y
        return unfold(y, self.fold)[(..., *(slice(0, length) for length in size))]
