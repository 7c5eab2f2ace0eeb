"""The autoencoder: data to a coarser grid of latents and back, learned (Kingma & Welling 2014; Rombach et al. 2022).

An encoder and a decoder of residual blocks, as in the U-Net, with one difference: the norm is of each position over its
channels (root mean square), not of the whole grid. So nothing looks further than its convolutions do, and a part of
large data decodes to the same numbers as the whole (:func:`undiffuse.codecs.decode_tiled`); there is no attention for
the same reason.

The latents are a little uncertain (a normal posterior whose divergence from the standard one costs something), or, with
a codebook, the decoder sees the nearest of so many vectors (van den Oord et al. 2017, "VQ-VAE").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codecs import Codec, folded_shape
from ..errors import UndiffuseError, choose
from .layers import check_levels, check_sizes, convolution, fold, unfold, wide, zeroed

MOST_BLOCKS = 1000
"""A file that asks for more is refused before its shapes are looked at."""


class PositionNorm(nn.Module):
    """``w * x / sqrt(mean over channels of x^2)`` at each position (Zhang & Sennrich 2019, RMSNorm)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, *spatial] -> [B, C, *spatial]``."""
        y = F.rms_norm(wide(x).movedim(1, -1), self.weight.shape, wide(self.weight), eps=1e-6)
        return y.movedim(-1, 1).to(x.dtype)


class Block(nn.Module):
    """``x + conv(silu(norm(conv(silu(norm(x))))))``, the second convolution starting at 0."""

    def __init__(self, rank: int, channels: int) -> None:
        super().__init__()
        self.before = PositionNorm(channels)
        self.first = convolution(rank, channels, channels, 3)
        self.between = PositionNorm(channels)
        self.second = zeroed(convolution(rank, channels, channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, *spatial] -> [B, C, *spatial]``."""
        return x + self.second(F.silu(self.between(self.first(F.silu(self.before(x))))))


class Grow(nn.Module):
    """Twice the size: a 1x1 convolution, while the grid is small, and nearest neighbours."""

    def __init__(self, rank: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.mix = convolution(rank, inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, *s] -> [B, C', *2s]``."""
        return F.interpolate(self.mix(x), scale_factor=2, mode="nearest")


@final
class Autoencoder(Codec):
    """A codec for data ``[channels, *spatial]`` whose sizes divide by ``factor``.

    Args:
        channels: of the data; rank: its spatial axes, 1 to 3.
        latent_channels: of the latents.
        factor: positions of the data to one of the latents along each axis, a power of two.
        fold: of these, how many are folded into channels first; the rest is halved level by level.
        widths, blocks: channels and residual blocks at each level, fine to coarse, ``log2(factor / fold) + 1`` of them.
        codebook: how many vectors the decoder sees; 0: latents are continuous, with a normal posterior.

    The latents of a codebook are those before the nearest vector is taken: that is part of decoding.
    """

    kind = "autoencoder"

    def __init__(
        self,
        channels: int,
        rank: int = 2,
        latent_channels: int = 4,
        factor: int = 4,
        fold: int = 1,
        widths: Sequence[int] = (32, 64, 64),
        blocks: Sequence[int] = (1, 1, 1),
        codebook: int = 0,
    ) -> None:
        check_sizes(channels=channels, latent_channels=latent_channels, factor=factor, fold=fold)
        check_levels(rank, widths, blocks, [], 0.0, 0)
        halvings = math.log2(factor / fold)
        if factor % fold or halvings != int(halvings) or len(widths) != halvings + 1:
            raise UndiffuseError(
                f"an autoencoder of factor {factor} with fold {fold} halves log2({factor}/{fold}) times: factor / fold "
                f"must be a power of two, with one more of widths, got {len(widths)}"
            )
        if sum(blocks) > MOST_BLOCKS:
            raise UndiffuseError(f"{sum(blocks):,} blocks asked for, at most {MOST_BLOCKS:,} are built")
        if codebook < 0 or codebook == 1:
            raise UndiffuseError(f"codebook={codebook} must be 0 (continuous latents) or at least 2 vectors")
        config: dict[str, Any] = {
            "channels": channels,
            "rank": rank,
            "latent_channels": latent_channels,
            "factor": factor,
            "fold": fold,
            "widths": list(widths),
            "blocks": list(blocks),
            "codebook": codebook,
        }
        super().__init__(latent_channels, factor, config, decoder_reach(factor // fold, blocks))
        self.channels, self.rank, self.folds = channels, rank, (fold,) * rank
        folded = channels * fold**rank

        def stage(level: int) -> list[nn.Module]:
            return [Block(rank, widths[level]) for _ in range(blocks[level])]

        down = [convolution(rank, folded, widths[0], 3), *stage(0)]
        up = [convolution(rank, latent_channels, widths[-1], 3), *stage(len(widths) - 1)]
        for level in range(1, len(widths)):
            down += [convolution(rank, widths[level - 1], widths[level], 3, stride=2), *stage(level)]
        for level in reversed(range(len(widths) - 1)):
            up += [Grow(rank, widths[level + 1], widths[level]), *stage(level)]
        out = latent_channels * (1 if codebook else 2)
        self.encoder = nn.Sequential(*down, PositionNorm(widths[-1]), nn.SiLU(), convolution(rank, widths[-1], out, 3))
        self.decoder = nn.Sequential(*up, PositionNorm(widths[0]), nn.SiLU(), convolution(rank, widths[0], folded, 3))
        self.codebook = nn.Parameter(nn.init.normal_(torch.empty(codebook, latent_channels))) if codebook else None

    @property
    def last(self) -> Tensor:
        """The weights of the decoder's last layer: through them all of the loss reaches the codec."""
        return cast(Tensor, self.decoder[-1].weight)

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return folded_shape(shape, self.channels, self.rank, self.factor, len(self.mean))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        h = fold(x, self.folds)
        if self.rank == 2:
            h = h.contiguous(memory_format=torch.channels_last)
        h = self.encoder(h)
        if self.codebook is not None:
            return h, None
        mean, log_variance = h.chunk(2, dim=1)
        return mean, (log_variance.clamp(-30, 20) / 2).exp()

    def reconstruct(self, latent: Tensor) -> Tensor:
        if self.codebook is not None:
            latent = self.look_up(self.nearest(latent))
        return self.draw(latent)

    def draw(self, latent: Tensor) -> Tensor:
        """The decoder alone: no nearest vector is taken."""
        if self.rank == 2:
            latent = latent.contiguous(memory_format=torch.channels_last)
        return unfold(self.decoder(latent), self.folds)

    # --- the codebook -------------------------------------------------------------------------------------------------

    def nearest(self, latent: Tensor) -> Tensor:
        """The number of the nearest vector of the codebook at each position: ``[B, C, *s] -> [B, *s]``."""
        assert self.codebook is not None
        flat = wide(latent).movedim(1, -1).flatten(0, -2)
        book = wide(self.codebook)
        # |z - e|^2 without the |z|^2, which is the same for all: one matrix product.
        distances = torch.addmm(book.square().sum(1), flat, book.T, alpha=-2)
        return distances.argmin(1).reshape(latent.shape[0], *latent.shape[2:])

    def look_up(self, numbers: Tensor) -> Tensor:
        """The vectors of these numbers: ``[B, *s] -> [B, C, *s]``."""
        assert self.codebook is not None
        return F.embedding(numbers, self.codebook).movedim(-1, 1)


def straight_through(latent: Tensor, vectors: Tensor) -> Tensor:
    """``vectors``, with the gradient going to ``latent`` as if they were that (Bengio et al. 2013)."""
    return latent + (vectors - latent).detach()


def decoder_reach(factor: int, blocks: Sequence[int]) -> int:
    """How many positions of latents on either side an element of the data depends on; ``blocks`` fine to coarse."""
    # Convolutions of 3 at each level: two a block, one where the decoder begins, one where it ends.
    scales = [factor / 2**level for level in range(len(blocks))]  # positions a latent, fine to coarse
    far = sum(2 * count / scale for count, scale in zip(blocks, scales, strict=True)) + 1 + 1 / scales[0]
    return math.ceil(far)


def autoencoder_for(
    shape: Sequence[int], size: str, factor: int, latent_channels: int, codebook: int = 0
) -> dict[str, Any]:
    """The configuration of an :class:`Autoencoder` for data of one shape: the size dial of the networks.

    While positions are many, the factor is folded into channels (a small machine's time goes there), as long as these
    are no more than four times the width; what is left of it is halved.
    """
    from . import FOLDED_PER_WIDTH, SIZES, repeated

    channels, *spatial = shape
    if not spatial:
        raise UndiffuseError("points have no spatial axes, along which an autoencoder would make them coarser")
    if factor < 1 or factor & (factor - 1):
        raise UndiffuseError(f"the factor of an autoencoder is a power of two, got {factor}")
    dial = choose("model size", size, SIZES)
    rank, positions = len(spatial), math.prod(spatial)
    folded = 1
    while (
        folded < factor
        and positions / folded**rank > 2 * dial.positions
        and channels * (2 * folded) ** rank <= FOLDED_PER_WIDTH * dial.widths[0]
    ):
        folded *= 2
    levels = int(math.log2(factor // folded)) + 1
    return {
        "channels": channels,
        "rank": rank,
        "latent_channels": latent_channels,
        "factor": factor,
        "fold": folded,
        "widths": repeated(dial.widths, levels),
        "blocks": [1] * (levels - 1) + [2],
        "codebook": codebook,
    }
