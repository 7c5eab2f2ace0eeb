"""The multilayer perceptron: for points without spatial dimensions, such as the 2-D sets that one can look at."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UndiffuseError
from .layers import Embedding, FilmNorm, Network, check_sizes, zeroed


class ResidualLayer(nn.Module):
    """``x + W2 dropout(silu(W1 silu(film_norm(x))))``, the second matrix starting at 0."""

    def __init__(self, width: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.film = FilmNorm(width, embedding)
        self.first = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.second = zeroed(nn.Linear(2 * width, width))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``[B, width] -> [B, width]``."""
        return x + self.second(self.dropout(F.silu(self.first(self.film(x, embedding)))))


@final
class MLP(Network):
    """A residual multilayer perceptron for data of shape ``[in_channels]``.

    The input is joined by ``sin(2^k x)`` and ``cos(2^k x)`` for k = 0 .. ``octaves - 1``: with plain coordinates alone
    a perceptron learns sharp edges, as of a checkerboard, very slowly (Tancik et al. 2020, "Fourier features").

    Args:
        in_channels: numbers in a point.
        out_channels: numbers in the output, ``in_channels`` unless given (twice as many for a learned variance).
        width: of the hidden layers.
        blocks: residual layers.
        octaves: of Fourier features of the input, 0 for none.
        embedding: width of the level (and condition) embedding.
        condition_width: width of the condition vector, 0 for an unconditional network.
        dropout: probability inside the residual layers, in [0, 1).

    Raises:
        UndiffuseError: arguments out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        width: int = 128,
        blocks: int = 4,
        octaves: int = 4,
        embedding: int = 128,
        condition_width: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(locals(), rank=0)
        out_channels = self.out_channels
        check_sizes(width=width, blocks=blocks, embedding=embedding)
        if width < 4:
            raise UndiffuseError(f"width={width!r} must be at least 4, the smallest group of group norm")
        if octaves < 0:
            raise UndiffuseError(f"octaves={octaves!r} must be at least 0")
        if not 0 <= dropout < 1:
            raise UndiffuseError(f"dropout={dropout!r} must be in [0, 1)")
        self.octaves = octaves
        self.embedding = Embedding(embedding, condition_width)
        self.stem = nn.Linear(in_channels * (1 + 2 * octaves), width)
        self.layers = nn.ModuleList(ResidualLayer(width, embedding, dropout) for _ in range(blocks))
        self.norm = FilmNorm(width, embedding)
        self.head = zeroed(nn.Linear(width, out_channels))

    def forward(
        self,
        x: Tensor,
        label: Tensor,
        vector: Tensor | None = None,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`Network.forward`; points take no tokens."""
        self.check(x, label, vector, tokens, mask)
        embedding = self.embedding(label, vector)
        h = self.stem(self._features(x).to(embedding.dtype))
        for layer in self.layers:
            h = layer(h, embedding)
        return self.head(F.silu(self.norm(h, embedding)))

    def _features(self, x: Tensor) -> Tensor:
        """``[B, D] -> [B, D * (1 + 2 * octaves)]``, in the dtype of x: half precision would lose the high octaves."""
        waves = [2.0**k * x for k in range(self.octaves)]
        return torch.cat([x, *(wave.sin() for wave in waves), *(wave.cos() for wave in waves)], dim=1)
