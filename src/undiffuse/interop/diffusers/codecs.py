"""diffusers' autoencoders as codecs. Their constants are the units of the latents: what a network sees is
``(latent - shift) * scaling`` (with ``latents_mean`` and ``latents_std``, ``(latent - mean) / std * scaling``), which
:class:`.Codec` writes as (latent - mean) / std, and nobody else multiplies by (trap D5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from ...codecs import Codec
from ...errors import UndiffuseError
from .networks import Seats


@final
class Autoencoder(Codec):
    """``AutoencoderKL`` or ``VQModel``, with weights."""

    def __init__(self, inner: nn.Module) -> None:
        options: Mapping[str, Any] = inner.config  # type: ignore[assignment]
        name = type(inner).__name__
        channels = int(options["latent_channels"])
        self.kind = CODECS[name]
        # A codec is described by what it computes, not by the file that it came from.
        described = {key: value for key, value in options.items() if not key.startswith("_")}
        super().__init__(channels, 2 ** (len(options["block_out_channels"]) - 1), described)
        self.inner, self.seats = inner, Seats()
        self.eval().requires_grad_(False)
        scaling = options.get("scaling_factor")
        scaling = 1.0 if scaling is None else float(scaling)
        mean, std = options.get("latents_mean"), options.get("latents_std")
        if (mean is None) != (std is None) or not scaling > 0:
            raise UndiffuseError(
                f"{name}: latents_mean and latents_std belong together, and scaling_factor must be above 0"
            )
        if mean is None or std is None:
            mean, std = [float(options.get("shift_factor") or 0.0)] * channels, [1.0] * channels
        with torch.no_grad():
            self.settle(mean, [float(each) / scaling for each in std], {"data": f"constants of the {name}"})
        if bool(options.get("force_upcast", False)) and self.halved:
            self.in_float32()  # it overflows in half precision (trap P7)

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        channels = int(self.config["in_channels"])
        if len(shape) != 3 or shape[0] != channels or shape[1] % self.factor or shape[2] % self.factor:
            raise UndiffuseError(
                f"this autoencoder takes pictures of {channels} channels and sides that are multiples of "
                f"{self.factor}, not {list(shape)}"
            )
        return (len(self.mean), shape[1] // self.factor, shape[2] // self.factor)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        with self.seats(self.inner) as device:
            made = self.inner.encode(x.to(device))  # type: ignore[operator]
        if self.kind == "vq_model":
            return made.latents.to(x.device), None
        return made.latent_dist.mean.to(x.device), made.latent_dist.std.to(x.device)

    def reconstruct(self, latent: Tensor) -> Tensor:
        with self.seats(self.inner) as device:
            return self.inner.decode(latent.to(device)).sample.to(latent.device)  # type: ignore[operator]


CODECS = {"AutoencoderKL": "autoencoder_kl", "VQModel": "vq_model"}
"""The classes of autoencoders that can be read, and what they are called here."""
