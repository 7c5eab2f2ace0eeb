"""Attention maps: which tokens act where."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .layers import Attend, key_mask


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """How one layer of one network call has looked at the tokens.

    Attributes:
        layer: the name of the module, ``middle.0.cross.look.attend``.
        weights: ``[B, heads, *grid, T]`` float32: the share of each position's attention that each token got. The rest
            of 1 went to other positions (joint attention), or to nothing (cross-attention).
    """

    layer: str
    weights: Tensor


@contextmanager
def attention_maps(module: nn.Module) -> Iterator[list[AttentionMap]]:
    """Inside, every call of ``module`` (a network, or what contains one) adds its maps to the list, in order.

        with attention_maps(network) as maps:
            network(x, label, tokens=tokens)
        maps[-1].weights.mean(1)  # [B, *grid, T]

    The maps are computed beside the network, which answers the same; not in a network compiled before. Calls of other
    threads are not noted.
    """
    maps: list[AttentionMap] = []
    hooks = []
    mine = threading.get_ident()
    for name, part in module.named_modules():
        if isinstance(part, Attend):
            # A default argument, so that every hook keeps its own name.
            def look(_: nn.Module, inputs: tuple, answer: Tensor, name: str = name) -> None:
                q, k, _values, first, tokens, mask, grid = inputs
                if tokens and threading.get_ident() == mine:
                    maps.append(AttentionMap(name, shares(q, k, first, tokens, mask, grid)))

            hooks.append(part.register_forward_hook(look))
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def shares(q: Tensor, k: Tensor, first: int, tokens: int, mask: Tensor | None, grid: tuple[int, ...]) -> Tensor:
    """``[B, heads, *grid, tokens]``: the softmax that :class:`Attend` computes inside, in float32."""
    q = q[:, :, -math.prod(grid) :].float()
    logits = q @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])
    kept = key_mask(k, first, mask)
    if kept is None:
        weights = logits.softmax(-1)
    else:  # where there is no token at all nothing has a share
        weights = logits.masked_fill(~kept, -math.inf).softmax(-1).masked_fill(~kept, 0)
    return weights[..., first : first + tokens].unflatten(2, tuple(grid))
