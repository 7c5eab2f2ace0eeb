"""The weights of facebookresearch/DiT (Peebles & Xie 2023), both ways.

Its state holds what :class:`undiffuse.DiT` holds, under other names and with three differences in layout: the patches
enter by a convolution (``x_embedder.proj``), the last layer orders a patch's numbers as (row, column, channel), and the
class table is added to the embedding as it is, where ours passes through a matrix first. Positions are stored there
and computed here. Its model says eps and, in a second half of the channels, the place of the variance; its time is the
index in 1000 linear betas; the null class is the last row of the table.

It is distributed as ``.pt``, which is a pickle and is not read here; save its ``state_dict`` as safetensors once.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt

import torch
from torch import Tensor

from ..denoiser import LABELS, Denoiser, NoScale
from ..errors import UndiffuseError
from ..networks import DIT, DiT
from ..networks.dit import sines
from ..pipeline import ModelConfig
from ..predictions import Eps
from ..schedules import LinearBetas

LAYERS = {
    "t_embedder.mlp.0": "embedding.first",
    "t_embedder.mlp.2": "embedding.second",
    "final_layer.adaLN_modulation.1": "norm.linear",
}
BLOCK = {
    "adaLN_modulation.1": "stream.modulation.linear",
    "attn.qkv": "stream.qkv.linear",
    "attn.proj": "stream.out",
    "mlp.fc1": "stream.first",
    "mlp.fc2": "stream.second",
}
TABLE = "y_embedder.embedding_table.weight"
OWN_TABLE = "conditions.parts.classes.table.weight"


def names(depth: int) -> dict[str, str]:
    """Theirs to ours, for all tensors that only change their name."""
    layers = LAYERS | {f"blocks.{i}.{a}": f"middle.{i}.{b}" for i in range(depth) for a, b in BLOCK.items()}
    return {f"{a}.{part}": f"network.{b}.{part}" for a, b in layers.items() for part in ("weight", "bias")}


def patches_first(head: Tensor, channels: int) -> Tensor:
    """Rows ordered (channel, row, column) as (row, column, channel)."""
    return head.unflatten(0, (channels, -1)).transpose(0, 1).flatten(0, 1)


def channels_first(head: Tensor, channels: int) -> Tensor:
    """The inverse of :func:`patches_first`."""
    return head.unflatten(0, (-1, channels)).transpose(0, 1).flatten(0, 1)


def from_facebook(state: Mapping[str, Tensor], heads: int | None = None) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model that a DiT's ``state_dict`` describes, and its weights for ``config.build().load_state_dict``.

    Args:
        state: as ``DiT(...).state_dict()`` of facebookresearch/DiT gives it.
        heads: attention heads, which the state does not tell; needed unless width and depth are those of the paper.

    Raises:
        UndiffuseError: tensors that are missing, unknown or of a shape that does not fit; other positions.
    """
    state = dict(state)
    for name in ("x_embedder.proj.weight", "final_layer.linear.weight", "pos_embed", TABLE, "blocks.0.mlp.fc1.weight"):
        if name not in state:
            raise UndiffuseError(f"this is no state of facebookresearch/DiT: it lacks {name}")
    stem = state["x_embedder.proj.weight"]
    width, channels, patch, _ = stem.shape
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    out_channels = len(state["final_layer.linear.weight"]) // patch**2
    if out_channels not in (channels, 2 * channels):
        raise UndiffuseError(
            f"final_layer.linear has {out_channels} channels: {channels} or {2 * channels} are expected"
        )
    if heads is None:
        known = [size["head_width"] for size in DIT.values() if size["widths"] == [width] and size["blocks"] == [depth]]
        if not known:
            raise UndiffuseError(f"width {width} and {depth} blocks are no size of the paper: pass heads")
        heads = width // known[0]
    if width % heads:
        raise UndiffuseError(f"{heads} heads do not divide the width {width}")

    own: dict[str, Tensor] = {}
    for theirs, ours in names(depth).items():
        if theirs not in state:
            raise UndiffuseError(f"this is no state of facebookresearch/DiT: it lacks {theirs}")
        own[ours] = state.pop(theirs)
    own["network.stem.weight"] = state.pop("x_embedder.proj.weight").flatten(1)
    own["network.stem.bias"] = state.pop("x_embedder.proj.bias")
    for part in ("weight", "bias"):
        own[f"network.head.{part}"] = channels_first(state.pop(f"final_layer.linear.{part}"), out_channels)
    own[OWN_TABLE] = state.pop(TABLE)
    own["network.embedding.condition.weight"] = torch.eye(width, dtype=stem.dtype)
    own["network.embedding.condition.bias"] = torch.zeros(width, dtype=stem.dtype)
    check_positions(state.pop("pos_embed"), width)
    if state:
        raise UndiffuseError(f"this is no state of facebookresearch/DiT: it has {next(iter(state))}")

    config = ModelConfig(
        network="dit",
        network_config={
            "in_channels": channels,
            "out_channels": out_channels,
            "rank": 2,
            "patch": patch,
            "widths": [width],
            "blocks": [depth],
            "head_width": width // heads,
            "mlp": len(own["network.middle.0.stream.first.bias"]) / width,
            "embedding": width,
            "condition_width": width,
            "positions": "sincos",
            "qk_norm": False,
        },
        schedule=LinearBetas(),
        prediction=Eps(),
        label=LABELS["discrete"],
        input_scale=NoScale(),
        conditions={"classes": {"kind": "classes", "classes": len(own[OWN_TABLE]) - 1}},
        learned_variance=out_channels == 2 * channels,
    )
    return config, {name: tensor.contiguous() for name, tensor in own.items()}


def check_positions(stored: Tensor, width: int) -> None:
    """Raise unless the positions stored are the sines that are computed here."""
    side = isqrt(stored.shape[1])
    if stored.shape != (1, side**2, width):
        raise UndiffuseError(f"pos_embed has shape {list(stored.shape)}, but [1, side^2, {width}] is expected")
    expected = sines([side, side], width, stored.device, torch.float32)
    if (stored[0].float() - expected).abs().max() > (1e-2 if stored.dtype in (torch.float16, torch.bfloat16) else 1e-4):
        raise UndiffuseError(
            "pos_embed is not DiT's table of sines and cosines: positions that were learned are not read"
        )


def to_facebook(denoiser: Denoiser, side: int) -> dict[str, Tensor]:
    """The ``state_dict`` of facebookresearch/DiT for a denoiser whose network is a :class:`DiT` of the paper's kind.

    Args:
        denoiser: conditioned on classes alone.
        side: pixels along each dimension of the (square) data, ``input_size`` there.

    Raises:
        UndiffuseError: a network with parts that the paper's does not have.
    """
    network = denoiser.network
    if not isinstance(network, DiT):
        raise UndiffuseError(f"only a network of family dit can be written so, not {type(network).__name__}")
    options = network.config
    plain = {"rank": 2, "token_width": 0, "positions": "sincos", "qk_norm": False, "skips": False, "factorised": False}
    for option, value in plain.items():
        if options[option] != value:
            raise UndiffuseError(f"facebookresearch/DiT has no {option}={options[option]}: only {option}={value}")
    [*_, width], [*_, depth] = options["widths"], options["blocks"]  # type: ignore[misc]
    patch = network.patch[0]
    if len(network.heads) > 1 or options["embedding"] != width or network.patch != (patch, patch):
        raise UndiffuseError("facebookresearch/DiT has one level, square patches, and an embedding of the same width")
    own = denoiser.state_dict()
    if OWN_TABLE not in own or denoiser.conditions.names != ("classes",):
        raise UndiffuseError("facebookresearch/DiT is conditioned on classes, and on nothing else")
    if side % patch:
        raise UndiffuseError(f"side={side} is no multiple of the patch {patch}")

    state = {theirs: own[ours] for theirs, ours in names(depth).items()}
    stem = own["network.stem.weight"]
    state["x_embedder.proj.weight"] = stem.unflatten(1, (network.in_channels, patch, patch))
    state["x_embedder.proj.bias"] = own["network.stem.bias"]
    for part in ("weight", "bias"):
        state[f"final_layer.linear.{part}"] = patches_first(own[f"network.head.{part}"], network.out_channels)
    matrix, shift = (own[f"network.embedding.condition.{part}"] for part in ("weight", "bias"))
    state[TABLE] = own[OWN_TABLE] @ matrix.T + shift
    state["pos_embed"] = sines([side // patch] * 2, width, stem.device, stem.dtype)[None]
    return {name: tensor.contiguous() for name, tensor in state.items()}
