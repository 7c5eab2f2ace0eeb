"""DDPM's U-Net, as most checkpoints in circulation have it: features handed across are concatenated.

Ho et al. 2020, with the level as a scale and a shift (Dhariwal & Nichol 2021), and with tokens the transformer blocks
of latent diffusion (Rombach et al. 2022). Its blocks have the names and the numbers of ``UNet2DModel`` and
``UNet2DConditionModel`` of diffusers: what is trained here can be loaded there (:mod:`undiffuse.interop.export`).
:class:`.UNet` is faster; this one is for sharing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import attention
from ..errors import UndiffuseError
from ..reuse import Deep, afresh
from .layers import (
    Attend,
    Embedding,
    Network,
    check_levels,
    check_sizes,
    cropped,
    join_heads,
    padded,
    split_heads,
    zeroed,
)


class Resnet(nn.Module):
    """``shortcut(x) + conv(silu(film(norm(conv(silu(norm(x)))))))``."""

    def __init__(self, inputs: int, outputs: int, embedding: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding, 2 * outputs)
        self.norm2 = nn.GroupNorm(groups, outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``[B, inputs, H, W] -> [B, outputs, H, W]``."""
        scale, shift = self.time_emb_proj(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1 + scale) + shift
        return self.conv_shortcut(x) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """``W attention(h, context)`` over rows of vectors; without a context, h looks at itself."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(context, width, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.attend = Attend()

    def forward(self, h: Tensor, context: Tensor | None, mask: Tensor | None, grid: Sequence[int]) -> Tensor:
        """``h [B, N, width]``, its positions lying on ``grid``; ``context [B, T, D]``, ``mask [B, T]``."""
        given = h if context is None else context
        q, k, v = (split_heads(each, self.heads) for each in (self.to_q(h), self.to_k(given), self.to_v(given)))
        if context is None:
            y = attention(q, k, v)
        else:
            y = self.attend(q, k, v, 0, context.shape[1], mask, grid)
        return self.to_out[0](join_heads(y))


class SelfLook(nn.Module):
    """``x + W attention(norm(x))`` of a picture; ``W`` starts at 0."""

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.group_norm = nn.GroupNorm(groups, channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([zeroed(nn.Linear(channels, channels))])

    def forward(self, x: Tensor, tokens: Tensor | None, mask: Tensor | None) -> Tensor:
        """``[B, C, H, W] -> [B, C, H, W]``; there are no tokens."""
        h = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (split_heads(each(h), self.heads) for each in (self.to_q, self.to_k, self.to_v))
        y = self.to_out[0](join_heads(attention(q, k, v)))
        return x + y.transpose(1, 2).reshape(x.shape)


class Gated(nn.Module):
    """GEGLU: ``a * gelu(b)`` of a linear map to (a, b) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, h: Tensor) -> Tensor:
        """``[..., width] -> [..., inner]``."""
        h, gate = self.proj(h).chunk(2, dim=-1)
        return h * F.gelu(gate)


class FeedForward(nn.Module):
    """A gated perceptron, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(Gated(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor) -> Tensor:
        """``[B, N, width] -> [B, N, width]``."""
        return self.net(h)


class TransformerBlock(nn.Module):
    """Attention to itself, to the tokens, and a perceptron, each beside a skip and after a norm."""

    def __init__(self, width: int, token_width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1 = Attention(width, width, heads)
        self.attn2 = Attention(width, token_width, heads)
        self.ff = FeedForward(width)

    def forward(self, h: Tensor, tokens: Tensor, mask: Tensor | None, grid: Sequence[int]) -> Tensor:
        """``[B, N, width] -> [B, N, width]``."""
        h = h + self.attn1(self.norm1(h), None, None, grid)
        h = h + self.attn2(self.norm2(h), tokens, mask, grid)
        return h + self.ff(self.norm3(h))


class Look(nn.Module):
    """``x + W transformer(V norm(x), tokens)`` of a picture."""

    def __init__(self, channels: int, token_width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, token_width, heads)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """``[B, C, H, W] -> [B, C, H, W]``."""
        h = self.proj_in(self.norm(x))
        rows = h.flatten(2).transpose(1, 2)
        rows = self.transformer_blocks[0](rows, tokens.to(rows.dtype), mask, x.shape[2:])
        return x + self.proj_out(rows.transpose(1, 2).reshape(h.shape))


class Resample(nn.Module):
    """Half the size by a stride, or twice the size by nearest neighbours and a convolution."""

    def __init__(self, channels: int, grow: bool) -> None:
        super().__init__()
        self.grow = grow
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if grow else 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to half or twice the size."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.grow else x)


class Block(nn.Module):
    """Residual blocks of one level with what looks on after each, and what changes the size."""

    def __init__(
        self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module], resample: tuple[str, nn.Module] | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        if resample is not None:
            self.add_module(resample[0], nn.ModuleList([resample[1]]))

    def looked(self, i: int, h: Tensor, tokens: Tensor | None, mask: Tensor | None) -> Tensor:
        """``h`` after the i-th attention, where there is one."""
        looks = dict(self.named_children()).get("attentions")
        return h if looks is None else cast(nn.ModuleList, looks)[i](h, tokens, mask)

    def resampled(self, h: Tensor) -> Tensor:
        """``h`` at the size of the next level."""
        for name, module in self.named_children():
            if name in ("downsamplers", "upsamplers"):
                return cast(nn.ModuleList, module)[0](h)
        return h


@final
class DDPMUNet(Network):
    """DDPM's U-Net for pictures ``[in_channels, H, W]``. Sides that are no multiples of ``2**(levels - 1)`` are padded
    with their edge inside and cropped outside (diffusers refuses them).

    Args:
        in_channels, out_channels, condition_width, dropout, token_width: see :class:`.UNet`.
        widths: channels at each level, from the full size down, multiples of ``groups``.
        blocks: residual blocks at each level on the way down, the same number at each; one more on the way up.
        attention: levels with attention; the middle always has it.
        head_width: channels of an attention head, which divide those of every level that has attention.
        embedding: width of the level's embedding.
        groups: of the group norms.

    Raises:
        UndiffuseError: arguments that do not fit each other.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        widths: Sequence[int] = (32, 64, 128),
        blocks: int = 1,
        attention: Sequence[int] = (2,),
        head_width: int = 32,
        embedding: int = 256,
        condition_width: int = 0,
        groups: int = 8,
        dropout: float = 0.0,
        token_width: int = 0,
    ) -> None:
        super().__init__(locals(), rank=2)
        check_sizes(blocks=blocks, head_width=head_width, embedding=embedding, groups=groups)
        check_levels(2, widths, [blocks] * len(widths), attention, dropout, token_width)
        if any(width % groups for width in widths):
            raise UndiffuseError(f"widths={list(widths)} must be multiples of groups={groups}")
        if looking := [width for width in (*(widths[i] for i in attention), widths[-1]) if width % head_width]:
            raise UndiffuseError(f"attention at width {looking[0]}: it is no multiple of head_width={head_width}")

        def resnet(inputs: int, outputs: int) -> Resnet:
            return Resnet(inputs, outputs, embedding, groups, dropout)

        def look(width: int) -> nn.Module:
            heads = width // head_width
            return Look(width, token_width, heads, groups) if token_width else SelfLook(width, heads, groups)

        self.blocks = blocks
        last = len(widths) - 1
        self.embedding = Embedding(embedding, condition_width, waves=widths[0])
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        skips, self.down_blocks, inputs = [widths[0]], nn.ModuleList(), widths[0]
        for i, width in enumerate(widths):
            each = [resnet(inputs if k == 0 else width, width) for k in range(blocks)]
            looks = [look(width) for _ in each] if i in attention else []
            shrink = ("downsamplers", Resample(width, False)) if i < last else None
            self.down_blocks.append(Block(each, looks, shrink))
            skips += [width] * (blocks + (i < last))
            inputs = width
        self.mid_block = Block([resnet(inputs, inputs) for _ in range(2)], [look(inputs)], None)
        self.up_blocks = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            each = []
            for _ in range(blocks + 1):
                each.append(resnet(inputs + skips.pop(), width))
                inputs = width
            looks = [look(width) for _ in each] if i in attention else []
            self.up_blocks.append(Block(each, looks, ("upsamplers", Resample(width, True)) if i else None))
        self.conv_norm_out = nn.GroupNorm(groups, widths[0])
        self.conv_out = zeroed(nn.Conv2d(widths[0], self.out_channels, 3, padding=1))

    @property
    def has_deep_part(self) -> bool:
        """All between the first block on the way down and the last two, which hear of the first."""
        return True

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
        embedding = self.embedding(label, vector)
        skips = [self.conv_in(padded(x.to(embedding.dtype), [2 ** (len(self.down_blocks) - 1)] * 2))]
        downs, ups = ([cast(Block, each) for each in blocks] for blocks in (self.down_blocks, self.up_blocks))

        def down(block: Block, numbers: Iterable[int]) -> None:
            for i in numbers:
                skips.append(block.looked(i, block.resnets[i](skips[-1], embedding), tokens, mask))

        def up(block: Block, numbers: Iterable[int], h: Tensor) -> Tensor:
            for i in numbers:
                h = block.looked(i, block.resnets[i](torch.cat([h, skips.pop()], dim=1), embedding), tokens, mask)
            return h

        def between() -> Tensor:
            down(downs[0], range(1, self.blocks))
            for above, block in pairwise(downs):
                skips.append(above.resampled(skips[-1]))
                down(block, range(self.blocks))
            h = self.mid_block.resnets[0](skips[-1], embedding)
            h = self.mid_block.resnets[1](self.mid_block.looked(0, h, tokens, mask), embedding)
            for block in ups[:-1]:
                h = block.resampled(up(block, range(self.blocks + 1), h))
            return up(ups[-1], range(self.blocks - 1), h)

        down(downs[0], [0])
        h = up(ups[-1], [self.blocks - 1, self.blocks], deep(between))
        return cropped(self.conv_out(F.silu(self.conv_norm_out(h))), size)
