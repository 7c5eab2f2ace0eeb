"""Networks: what is trained.

Each is called ``network(x, label, vector, tokens, mask)``: the noisy data ``[B, C, *spatial]``, its noise level as a
number ``[B]``, the embedded condition ``[B, E]`` or None, and a condition in parts, ``[B, T, D]`` or None, with a mask
``[B, T]`` of those that are there. It answers with ``[B, out_channels, *spatial]`` and knows nothing of schedules or of
what its answer means. ``NETWORKS[name](**network.config)`` builds the same architecture again.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..errors import UndiffuseError, choose, unknown
from .ddpm_unet import DDPMUNet
from .dit import DIT, DiT, dit
from .layers import Network
from .maps import AttentionMap, attention_maps
from .mlp import MLP
from .mp_unet import MPUNet, constrain
from .unet import UNet

__all__ = [
    "DIT",
    "MLP",
    "MPUNet",
    "NETWORKS",
    "SIZES",
    "AttentionMap",
    "Cost",
    "DDPMUNet",
    "DiT",
    "Network",
    "Size",
    "UNet",
    "attention_maps",
    "build",
    "constrain",
    "describe",
    "dit",
    "sized",
]

NETWORKS: dict[str, type[Network]] = {
    "unet": UNet,
    "mp_unet": MPUNet,
    "ddpm_unet": DDPMUNet,
    "dit": DiT,
    "mlp": MLP,
}


def build(name: str, config: Mapping[str, Any]) -> Network:
    """``NETWORKS[name](**config)`` with an error that suggests the nearest name for an unknown network or option.

    >>> build("mlp", {"in_channels": 2, "widht": 64})
    Traceback (most recent call last):
    undiffuse.errors.UndiffuseError: unknown option of network mlp 'widht': did you mean 'width'? (choose from: ...)
    """
    network = choose("network", name, NETWORKS)
    options = list(inspect.signature(network).parameters)
    for option in config:
        if option not in options:
            raise unknown(f"option of network {name}", option, options)
    if "in_channels" not in config:
        raise UndiffuseError(f"the configuration of network {name} lacks in_channels")
    return network(**config)


@dataclass(frozen=True)
class Size:
    """One position of the size dial.

    The levels of a U-Net get ``widths`` channels and ``blocks`` residual blocks, the last entry serving for all further
    levels; the data is folded until no more than ``positions`` pixels are left at the first level. A DiT gets
    ``dit_blocks`` blocks of ``dit_width``, and patches so large that no more than ``dit_patches`` cover the data. An
    MLP gets ``mlp_blocks`` layers of ``mlp_width``.
    """

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    embedding: int
    positions: int
    dit_width: int
    dit_blocks: int
    dit_patches: int
    mlp_width: int
    mlp_blocks: int


SIZES: dict[str, Size] = {
    "tiny": Size((16, 16), (1,), 64, 64, 32, 2, 64, 32, 2),
    "small": Size((64, 112), (3, 1), 128, 256, 96, 6, 256, 128, 4),
    "base": Size((128, 192, 256), (2,), 512, 1024, 256, 8, 256, 256, 6),
    "large": Size((192, 384, 576), (3,), 768, 4096, 512, 12, 512, 512, 8),
}

FOLDED_PER_WIDTH = 4  # with more channels folded, the first and last convolution would outweigh all the others
LOWEST_POSITIONS = 64  # a U-Net halves until no more are left: few enough for attention to be cheap


def repeated(values: tuple[int, ...], length: int) -> list[int]:
    """``values`` cut, or continued by its last entry, to ``length``."""
    return [values[min(i, len(values) - 1)] for i in range(length)]


def sized(
    shape: Sequence[int],
    size: str = "small",
    condition_width: int = 0,
    out_channels: int | None = None,
    family: str | None = None,
    token_width: int = 0,
) -> tuple[str, dict[str, Any]]:
    """The network for data of one shape, as ``(name, config)``: the one size dial.

    Args:
        shape: of one sample, without the batch: ``[D]`` is a point, ``[C, *spatial]`` has 1 to 3 spatial dimensions.
        size: ``tiny`` (tests), ``small`` (laptop), ``base`` or ``large``; for a DiT also a size of the paper,
            ``DiT-B/2``.
        condition_width: width of the condition vector, 0 for a network that takes none.
        out_channels: channels of the output, those of the data unless given.
        family: a name in ``NETWORKS``; None for an MLP for points and a U-Net for the rest.
        token_width: width of the condition's tokens, 0 for a network that takes none.

    Raises:
        UndiffuseError: an unknown size or family, or a shape that the network does not take.
    """
    if not 1 <= len(shape) <= 4 or any(n < 1 for n in shape):
        raise UndiffuseError(f"no network takes data of shape {list(shape)}: give [D] or [C, 1 to 3 spatial sizes]")
    channels, *spatial = shape
    family = family or ("unet" if spatial else "mlp")
    choose("network family", family, NETWORKS)
    if bool(spatial) == (family == "mlp"):
        fitting = ", ".join(name for name in NETWORKS if (name == "mlp") != bool(spatial))
        raise UndiffuseError(f"network {family} does not take data of shape {list(shape)}: choose from {fitting}")
    common: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": channels if out_channels is None else out_channels,
        "condition_width": condition_width,
        "dropout": 0.0,
    }
    if family == "mlp":
        if token_width:
            raise UndiffuseError("points take no tokens: condition them on classes or a vector")
        return family, common | mlp_for(choose("model size", size, SIZES))
    common["token_width"] = token_width
    if family == "ddpm_unet":
        if len(spatial) != 2:
            raise UndiffuseError(f"network ddpm_unet is for pictures, not for shape {list(shape)}: choose unet")
        return family, common | ddpm_unet_for(spatial, choose("model size", size, SIZES))
    common["rank"] = len(spatial)
    if family != "dit":
        return family, common | unet_for(channels, spatial, choose("model size", size, SIZES))
    sizes = {**{name: dit_for(spatial, dial) for name, dial in SIZES.items()}, **DIT}
    return family, {**common, "token_attention": "cross", **choose("model size", size, sizes)}


def mlp_for(dial: Size) -> dict[str, Any]:
    """Options of an :class:`MLP`."""
    return {"embedding": dial.embedding, "width": dial.mlp_width, "blocks": dial.mlp_blocks, "octaves": 4}


def dit_for(spatial: Sequence[int], dial: Size) -> dict[str, Any]:
    """Options of a :class:`DiT` for data of this size."""
    patch = 1
    while math.prod(math.ceil(n / patch) for n in spatial) > dial.dit_patches:
        patch *= 2
    return {
        "patch": patch,
        "widths": [dial.dit_width],
        "blocks": [dial.dit_blocks],
        "head_width": min(64, dial.dit_width // 2),
        "embedding": dial.dit_width,
    }


def unet_for(channels: int, spatial: Sequence[int], dial: Size) -> dict[str, Any]:
    """Options of a :class:`UNet` for data of this size."""
    rank = len(spatial)
    fold = 1
    while (
        math.prod(math.ceil(n / fold) for n in spatial) > dial.positions
        and channels * (2 * fold) ** rank <= FOLDED_PER_WIDTH * dial.widths[0]
    ):
        fold *= 2

    def positions(level: int) -> int:
        return math.prod(math.ceil(n / (fold * 2**level)) for n in spatial)

    # As many levels as the dial names if the data is large enough for them, more if it is larger still.
    levels = 1
    while (levels < len(dial.widths) and positions(levels - 1) > 1) or positions(levels - 1) > LOWEST_POSITIONS:
        levels += 1
    return {
        "embedding": dial.embedding,
        "widths": repeated(dial.widths, levels),
        "blocks": repeated(dial.blocks, levels),
        "attention": [levels - 1],
        "head_width": 64,
        "fold": fold,
    }


def ddpm_unet_for(spatial: Sequence[int], dial: Size) -> dict[str, Any]:
    """Options of a :class:`DDPMUNet` for pictures of this size, at the widths of the dial's U-Net, without folding."""
    levels = 1
    while levels < len(dial.widths) or math.prod(math.ceil(n / 2 ** (levels - 1)) for n in spatial) > LOWEST_POSITIONS:
        levels += 1
    widths = repeated(dial.widths, levels)
    return {
        "embedding": dial.embedding,
        "widths": widths,
        "head_width": math.gcd(64, widths[-1]),
        "blocks": dial.blocks[0],
        "attention": [levels - 1],
        "groups": 8,
    }


@dataclass(frozen=True)
class Cost:
    """The cost of a network: ``parameters``, and ``flops`` of one forward pass of one sample (a multiply-add is 2)."""

    parameters: int
    flops: int

    def __str__(self) -> str:
        return f"{self.parameters / 1e6:.2f} M parameters, {self.flops / 1e9:.3f} GFLOP per forward pass"


TOKENS = 32  # with so many tokens a network that takes them is described


def describe(network: Network, shape: Sequence[int]) -> Cost:
    """Parameters and FLOPs of ``network`` for one sample of ``shape``; nothing is computed and no weight is touched.

    FLOPs are those of matrix products, convolutions and attention; norms and activations are not counted.
    """
    with torch.device("meta"):
        # A copy of shapes only; counting on meta tensors costs no arithmetic.
        twin = type(network)(**network.config)  # pyrefly: ignore
        vector = torch.zeros(1, twin.condition_width) if twin.condition_width else None
        tokens = torch.zeros(1, TOKENS, twin.token_width) if twin.token_width else None
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            twin(torch.zeros(1, twin.in_channels, *shape[1:]), torch.zeros(1), vector, tokens)
    return Cost(sum(p.numel() for p in network.parameters()), counter.get_total_flops())
