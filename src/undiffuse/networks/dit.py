"""The diffusion transformer: cut the data into patches, let every patch look at all others.

Peebles & Xie 2023 (arXiv:2212.09748): the embedding of level and condition enters each block as AdaLN-zero, a scale
and a shift of the normalised patches and a gate on what the block adds, all starting at 0. What was learned since is
here by choice: rotary positions (Su et al. 2021) along each axis, QK-norm (Henry et al. 2020), tokens by
cross-attention (PixArt, Chen et al. 2023) or in a stream of their own (MMDiT, Esser et al. 2024), long skips (U-ViT,
Bao et al. 2023), levels of merged patches (HDiT, Crowson et al. 2024), attention in turns over space and time (Latte,
Ma et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UndiffuseError, choose, unknown
from ..reuse import Deep, afresh
from .layers import (
    Attend,
    Embedding,
    Network,
    TokenAttention,
    check_sizes,
    cropped,
    fold,
    heads_of,
    join_heads,
    padded,
    split_heads,
    unfold,
    wide,
    zeroed,
)

# --- Where a patch lies -----------------------------------------------------------------------------------------------

ROTARY_BASE = 100.0  # Heo et al. 2024, "Rotary position embedding for vision transformer": images are short texts


def sines(grid: Sequence[int], width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``[N, width]``: sines and cosines of each patch's place, the last axis first (as the paper's code has it).

    Each axis gets an equal, even share of the width; what is left over is 0. Computed in float64, so that any size is
    exact.
    """
    share = width // (2 * len(grid))
    rates = 10_000.0 ** -(torch.arange(share, dtype=torch.float64, device=device) / share)
    parts = []
    for axis in reversed(range(len(grid))):
        angles = places(grid, axis, device)[:, None] * rates
        parts += [angles.sin(), angles.cos()]
    return F.pad(torch.cat(parts, dim=1), (0, width - 2 * share * len(grid))).to(dtype)


def angles(grid: Sequence[int], width: int, device: torch.device) -> Tensor:
    """``[N, width / 2]``: by how much each pair of a head's numbers is turned, in float64.

    Every axis turns an equal share of the pairs, at rates from 1 down to nearly ``1 / ROTARY_BASE``; pairs that are
    left over do not turn.
    """
    share = width // (2 * len(grid))
    rates = ROTARY_BASE ** -(torch.arange(share, dtype=torch.float64, device=device) / share)
    turns = torch.cat([places(grid, axis, device)[:, None] * rates for axis in range(len(grid))], dim=1)
    return F.pad(turns, (0, width // 2 - share * len(grid)))


def places(grid: Sequence[int], axis: int, device: torch.device) -> Tensor:
    """``[N]``: the coordinate along ``axis`` of every place on the grid, in row order."""
    shape = [1] * len(grid)
    shape[axis] = grid[axis]
    return torch.arange(grid[axis], dtype=torch.float64, device=device).reshape(shape).expand(*grid).flatten()


def turned(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """``x [B, heads, N, d]`` with each pair ``(x_i, x_{i + d/2})`` turned by the angle whose cosine and sine are in
    ``rotation``; the product of two such rows depends on the difference of their places alone."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


# --- Blocks -----------------------------------------------------------------------------------------------------------


def normed(h: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the last axis, in float32 at least."""
    return F.layer_norm(wide(h), h.shape[-1:], eps=1e-6)


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``(1 + scale) * normed(h) + shift``."""
    return torch.addcmul(shift, normed(h).to(shift.dtype), 1 + scale)


class Modulation(nn.Module):
    """``count`` vectors ``[B, 1, width]`` as a linear function of the embedding (AdaLN)."""

    def __init__(self, embedding: int, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(embedding, count * width)

    def forward(self, embedding: Tensor) -> tuple[Tensor, ...]:
        return self.linear(embedding)[:, None].chunk(self.count, dim=-1)


class Questions(nn.Module):
    """Queries, keys and values; with ``qk_norm`` each query and key has root mean square 1 times a learned scale, which
    keeps the logits from growing until bfloat16 cannot tell them apart."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.linear = nn.Linear(width, 3 * width)
        self.q_scale = nn.Parameter(torch.ones(width // heads)) if qk_norm else None
        self.k_scale = nn.Parameter(torch.ones(width // heads)) if qk_norm else None

    def forward(self, h: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, N, width]`` to three of ``[B, heads, N, d]``."""
        q, k, v = (split_heads(part, self.heads) for part in self.linear(h).chunk(3, dim=-1))
        return self._placed(q, self.q_scale, rotation), self._placed(k, self.k_scale, rotation), v

    @staticmethod
    def _placed(x: Tensor, scale: Tensor | None, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        y = x
        if scale is not None:
            y = F.rms_norm(wide(y), scale.shape, wide(scale), eps=1e-6)
        if rotation is not None:
            y = turned(wide(y), rotation)
        return y.to(x.dtype)


class Stream(nn.Module):
    """What one block does to one row of vectors: ask, add the answer, think (a perceptron), each behind AdaLN-zero.

    A stream that is ``silent`` only asks: nobody reads what would become of it.
    """

    def __init__(
        self, width: int, embedding: int, heads: int, mlp: float, qk_norm: bool, dropout: float, silent: bool = False
    ) -> None:
        super().__init__()
        inner = int(width * mlp)
        self.modulation = zeroed(Modulation(embedding, width, 2 if silent else 6))
        self.qkv = Questions(width, heads, qk_norm)
        self.out = None if silent else nn.Linear(width, width)
        self.first = None if silent else nn.Linear(width, inner)
        self.dropout = nn.Dropout(dropout)
        self.second = None if silent else nn.Linear(inner, width)

    def answered(self, h: Tensor, y: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """``h`` plus what attention answered, ``y [B, heads, N, d]``."""
        return h if self.out is None else h + parts[2] * self.out(join_heads(y))

    def thought(self, h: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """``h`` plus what the perceptron makes of it."""
        if self.first is None or self.second is None:
            return h
        y = F.gelu(self.first(modulate(h, parts[3], parts[4])), approximate="tanh")
        return h + parts[5] * self.second(self.dropout(y))


class Block(nn.Module):
    """Attention and perceptron, for the patches and, with ``words``, for a second stream of tokens beside them.

    Args:
        stream: of the patches.
        words: of the tokens; both streams look at both (MMDiT's joint attention). None: there is no such stream.
        cross: cross-attention to tokens that stay what they are, between attention and perceptron, or None.
        skip: joins what an earlier block has left to what comes in (U-ViT), or None.
        over: what a patch looks at: None for all patches, 0 for those along the first axis of the grid (time), 1 for
            those across it (space).
    """

    def __init__(
        self,
        stream: Stream,
        words: Stream | None,
        cross: TokenAttention | None,
        skip: nn.Linear | None,
        over: int | None,
    ) -> None:
        super().__init__()
        self.stream = stream
        self.words = words
        self.cross = cross
        self.skip = skip
        self.attend = Attend()
        self.over = over

    def forward(
        self,
        h: Tensor,
        words: Tensor | None,
        embedding: Tensor,
        mask: Tensor | None,
        rotation: tuple[Tensor, Tensor] | None,
        grid: Sequence[int],
    ) -> tuple[Tensor, Tensor | None]:
        """``h [B, N, width]`` and the tokens ``[B, T, D]`` or None, both as they come out of the block."""
        parts = self.stream.modulation(embedding)
        q, k, v = self.stream.qkv(modulate(h, parts[0], parts[1]), rotation)
        if self.words is not None and words is not None:
            count = words.shape[1]
            word_parts = self.words.modulation(embedding)
            asked = self.words.qkv(modulate(words, word_parts[0], word_parts[1]), None)
            q, k, v = (torch.cat(both, dim=2) for both in zip(asked, (q, k, v), strict=True))
            y = self.attend(q, k, v, 0, count, mask, grid)
            words = self.words.thought(self.words.answered(words, y[:, :, :count], word_parts), word_parts)
            y = y[:, :, count:]
        elif self.over is not None:
            q, k, v = (scattered(each, grid, self.over) for each in (q, k, v))
            y = gathered(self.attend(q, k, v, 0, 0, None, grid), grid, self.over)
        else:
            y = self.attend(q, k, v, 0, 0, None, grid)
        h = self.stream.answered(h, y, parts)
        if self.cross is not None and words is not None:
            h = h + self.cross(normed(h).to(h.dtype), words, mask, grid)
        return self.stream.thought(h, parts), words


def scattered(x: Tensor, grid: Sequence[int], over: int) -> Tensor:
    """``[B, heads, T * S, d]`` to a row of times for each place, ``[B * S, heads, T, d]`` (``over=0``), or a row of
    places for each time, ``[B * T, heads, S, d]`` (``over=1``)."""
    return x.unflatten(2, (grid[0], -1)).movedim(3 - over, 1).flatten(0, 1)


def gathered(y: Tensor, grid: Sequence[int], over: int) -> Tensor:
    """The inverse of :func:`scattered`."""
    rows = grid[0] if over else math.prod(grid[1:])
    return y.unflatten(0, (-1, rows)).movedim(1, 3 - over).flatten(2, 3)


# --- The network ------------------------------------------------------------------------------------------------------

POSITIONS = ("rotary", "sincos")
TOKEN_ATTENTION = ("cross", "joint")
WAVES = 256  # of the level's sinusoid, whose rates are 10000^(-i/128) in the paper's code


@final
class DiT(Network):
    """A diffusion transformer for data ``[in_channels, *spatial]`` with ``rank`` spatial dimensions of any size.

    With one entry in ``widths`` it is the transformer of the paper; with more it is an hourglass, whose levels are
    those of :class:`UNet`: from one to the next ``2^rank`` patches become one, and features that cross are added. A
    size that is no multiple of a patch is padded with its edge inside and cropped outside.

    Args:
        in_channels: channels of ``x``.
        out_channels: channels of the output, ``in_channels`` unless given (twice as many for a learned variance).
        rank: spatial dimensions: 1, 2 or 3. The first of three is time, if the data is video.
        patch: pixels a patch along each dimension, or along all.
        widths: numbers a patch at each level.
        blocks: transformer blocks at each level. A level but the last has them twice: going down, and going up.
        head_width: wanted width of an attention head; rounded so that heads divide the width.
        mlp: width of the perceptrons, as a multiple of the block's.
        embedding: width of the level (and condition) embedding.
        condition_width: width of the condition vector, 0 for an unconditional network.
        token_width: width of the condition's tokens, 0 for a network that takes none. The last level looks at them.
        token_attention: ``cross``-attention in every block, or a second stream of tokens and ``joint`` attention.
        positions: ``rotary`` (distances, which serve at sizes unseen in training) or ``sincos`` (places; the paper).
        qk_norm: normalise queries and keys; off in the paper, and wanted for training in bfloat16.
        skips: in the last level, join what block i leaves to what block n - 1 - i gets.
        factorised: attend in turns over space and over time (the first axis) rather than over all of both.
        dropout: probability inside the perceptrons, in [0, 1).

    Raises:
        UndiffuseError: arguments that do not fit each other.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        rank: int = 2,
        patch: int | Sequence[int] = 2,
        widths: Sequence[int] = (384,),
        blocks: Sequence[int] = (12,),
        head_width: int = 64,
        mlp: float = 4.0,
        embedding: int = 384,
        condition_width: int = 0,
        token_width: int = 0,
        token_attention: str = "joint",
        positions: str = "rotary",
        qk_norm: bool = True,
        skips: bool = False,
        factorised: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(locals())
        self.patch = (patch,) * rank if isinstance(patch, int) else tuple(patch)
        check_sizes(head_width=head_width, embedding=embedding)
        for name, values in (("patch", self.patch), ("widths", widths), ("blocks", blocks)):
            check_sizes(**{f"{name}[{i}]": value for i, value in enumerate(values)})
        if rank not in (1, 2, 3):
            raise UndiffuseError(f"rank={rank!r} must be 1, 2 or 3 (points without spatial dimensions: network 'mlp')")
        if len(self.patch) != rank:
            raise UndiffuseError(f"patch={list(self.patch)} needs one number for each of {rank} dimensions")
        if not widths or len(widths) != len(blocks):
            raise UndiffuseError(f"widths and blocks need one number a level, got {len(widths)} and {len(blocks)}")
        for name, value, choices in (
            ("positions", positions, POSITIONS),
            ("token_attention", token_attention, TOKEN_ATTENTION),
        ):
            if value not in choices:
                raise unknown(name, value, choices)
        self.rotary = positions == "rotary"
        self.heads = [heads_of(width, head_width) for width in widths]
        for width, heads in zip(widths, self.heads, strict=True):
            if (self.rotary and width // heads % 2) or width // (heads if self.rotary else 1) < 2 * rank:
                raise UndiffuseError(
                    f"width {width} in {heads} heads is too narrow for {positions} positions in {rank} dimensions: "
                    f"a head needs an even width of at least {2 * rank}"
                )
        if mlp <= 0:
            raise UndiffuseError(f"mlp={mlp!r} must be positive")
        if not 0 <= dropout < 1:
            raise UndiffuseError(f"dropout={dropout!r} must be in [0, 1)")
        if factorised and rank < 2:
            raise UndiffuseError("factorised attention needs time and space: at least two dimensions")
        joint = bool(token_width) and token_attention == "joint"
        if joint and factorised:
            raise UndiffuseError(
                "joint attention sees all patches at once: with factorised, take token_attention=cross"
            )
        lowest = len(widths) - 1

        def block(level: int, number: int, of: int) -> Block:
            width, heads = widths[level], self.heads[level]
            tokens = level == lowest and token_width
            last = number == of - 1
            second = level == lowest and skips and number >= (of + 1) // 2
            return Block(
                Stream(width, embedding, heads, mlp, qk_norm, dropout),
                Stream(width, embedding, heads, mlp, qk_norm, dropout, silent=last) if tokens and joint else None,
                TokenAttention(width, token_width, head_width) if tokens and not joint else None,
                nn.Linear(2 * width, width) if second else None,
                (number + 1) % 2 if factorised else None,
            )

        def stack(level: int) -> nn.ModuleList:
            return nn.ModuleList(block(level, i, blocks[level]) for i in range(blocks[level]))

        upper = range(lowest)
        self.embedding = Embedding(embedding, condition_width, token_width, WAVES, 10_000 ** (1 - 2 / WAVES))
        self.words = nn.Linear(token_width, widths[-1]) if joint else None
        self.stem = nn.Linear(in_channels * math.prod(self.patch), widths[0])
        self.down = nn.ModuleList(stack(i) for i in upper)
        self.merge = nn.ModuleList(nn.Linear(widths[i] * 2**rank, widths[i + 1]) for i in upper)
        self.middle = stack(lowest)
        self.split = nn.ModuleList(nn.Linear(widths[i + 1], widths[i] * 2**rank) for i in upper)
        self.up = nn.ModuleList(stack(i) for i in upper)
        # The paper starts this modulation at 0 too. Then neither level nor condition could move the output before the
        # third update; the head alone is enough for an output that starts at 0.
        self.norm = Modulation(embedding, widths[0], 2)
        self.head = zeroed(nn.Linear(widths[0], self.out_channels * math.prod(self.patch)))

    @property
    def has_deep_part(self) -> bool:
        """All levels but the first; of a single level, the blocks between the first and the last."""
        return len(self.down) > 0 or len(self.middle) > 2

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
        size, dtype, levels = x.shape[2:], self.stem.weight.dtype, len(self.heads)
        embedding = self.embedding(label, vector, tokens, mask)
        words = tokens if tokens is None or self.words is None else self.words(tokens.to(dtype))
        x = fold(padded(x.to(dtype), [p * 2 ** (levels - 1) for p in self.patch]), self.patch)
        grids = [[n // 2**i for n in x.shape[2:]] for i in range(levels)]
        h = self.stem(x.flatten(2).transpose(1, 2)).to(dtype)  # what blocks add to stays float32 under autocast
        if not self.rotary:
            h = h + sines(grids[0], h.shape[2], h.device, dtype)

        def through(h: Tensor, level: int, deep: Deep) -> Tensor:
            """A level and those below it."""
            grid, rotation = grids[level], self._rotation(h, level, grids[level])
            if level == levels - 1:
                return self._through_the_middle(h, words, embedding, mask, rotation, grid, deep)
            for block in cast(nn.ModuleList, self.down[level]):
                h, _ = block(h, None, embedding, None, rotation, grid)
            kept, twos = h, (2,) * self.rank

            def below() -> Tensor:
                merged = fold(kept.transpose(1, 2).unflatten(2, grid), twos).flatten(2).transpose(1, 2)
                y = self.split[level](through(self.merge[level](merged), level + 1, afresh))
                return unfold(y.transpose(1, 2).unflatten(2, grids[level + 1]), twos).flatten(2).transpose(1, 2)

            h = kept + deep(below)
            for block in cast(nn.ModuleList, self.up[level]):
                h, _ = block(h, None, embedding, None, rotation, grid)
            return h

        y = self.head(modulate(through(h, 0, deep), *self.norm(embedding)))
        return cropped(unfold(y.transpose(1, 2).unflatten(2, grids[0]), self.patch), size)

    def _rotation(self, h: Tensor, level: int, grid: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines ``[N, d / 2]`` for the heads of a level."""
        if not self.rotary:
            return None
        turns = angles(grid, h.shape[2] // self.heads[level], h.device)
        dtype = torch.promote_types(h.dtype, torch.float32)
        return turns.cos().to(dtype), turns.sin().to(dtype)

    def _through_the_middle(
        self,
        h: Tensor,
        words: Tensor | None,
        embedding: Tensor,
        mask: Tensor | None,
        rotation: tuple[Tensor, Tensor] | None,
        grid: Sequence[int],
        deep: Deep,
    ) -> Tensor:
        """All blocks of the last level, with their long skips."""
        left: list[Tensor] = []
        count = len(self.middle)

        def through(h: Tensor, words: Tensor | None, numbers: Iterable[int]) -> tuple[Tensor, Tensor | None]:
            for number in numbers:
                block = cast(Block, self.middle[number])
                if block.skip is not None:
                    h = block.skip(torch.cat([h, left.pop()], dim=-1))
                h, words = block(h, words, embedding, mask, rotation, grid)
                if number < count // 2:
                    left.append(h)
            return h, words

        h, words = through(h, words, range(min(1, count - 1)))
        tokens = 0 if words is None or self.words is None else words.shape[1]  # of joint attention, which change too

        def both(h: Tensor, words: Tensor | None) -> Tensor:
            return torch.cat([words, h], dim=1) if words is not None and tokens else h

        def between() -> Tensor:
            return both(*through(h, words, range(1, count - 1)))

        after = deep(between, beside=both(h, words))
        return through(after[:, tokens:], after[:, :tokens] if tokens else words, range(count - 1, count))[0]


DIT: dict[str, dict[str, Any]] = {
    f"DiT-{size}/{patch}": {
        "patch": patch,
        "widths": [width],
        "blocks": [depth],
        "head_width": head,
        "embedding": width,
        "positions": "sincos",
        "qk_norm": False,
    }
    for size, depth, width, head in (("S", 12, 384, 64), ("B", 12, 768, 64), ("L", 24, 1024, 64), ("XL", 28, 1152, 72))
    for patch in (2, 4, 8)
}
"""The sizes of the paper (table 1), as options of :class:`DiT`."""


def dit(name: str, in_channels: int = 4, condition_width: int = 0, out_channels: int | None = None) -> DiT:
    """The network of the paper by its name, ``DiT-XL/2``, for pictures of any size.

    Raises:
        UndiffuseError: a name that is not in :data:`DIT`.
    """
    options = choose("DiT", name, DIT)
    return DiT(in_channels, out_channels, condition_width=condition_width, **options)
