"""diffusers' networks, called as a denoiser calls its own: ``network(x, label, vector, tokens, mask)``.

What these networks want beside tokens is a handful of numbers under various names: a pooled text, the size of the
picture, a class, a guidance scale that was distilled into the weights. Here it is one vector, ``[B, width]``, in which
each of them has its place (:class:`Layout`); conditions fill in their own and leave the rest 0, so that they add up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from math import log
from threading import RLock
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from ...errors import UndiffuseError

Given = Tensor | None


@dataclass(frozen=True)
class Layout:
    """Where each thing stands in the vector: ``{"pooled": 1280, "micro": 6}`` is 1286 numbers, in this order."""

    sizes: Mapping[str, int]

    @property
    def width(self) -> int:
        return sum(self.sizes.values())

    def place(self, name: str) -> slice:
        """Its place."""
        begin = 0
        for each, size in self.sizes.items():
            if each == name:
                return slice(begin, begin + size)
            begin += size
        raise KeyError(name)

    def put(self, name: str, values: Tensor) -> Tensor:
        """A vector with these values ``[B, size]`` in their place and 0 elsewhere."""
        vector = values.new_zeros(len(values), self.width)
        vector[:, self.place(name)] = values
        return vector

    def get(self, name: str, vector: Tensor | None) -> Tensor | None:
        """The values of one name, None where it has no place."""
        return None if vector is None or name not in self.sizes else vector[:, self.place(name)]


class Seats:
    """Where parts compute. Without a device: where they are. With one, each is moved there when it is used, and what
    sat there before goes back to main memory, where all that they are given and say lies too."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.seated: nn.Module | None = None
        self.turn = nullcontext() if device is None else RLock()

    @contextmanager
    def __call__(self, module: nn.Module) -> Iterator[torch.device]:
        """The device, with the module on it."""
        with self.turn:
            if self.device is not None and self.seated is not module:
                if self.seated is not None:
                    self.seated.to("cpu")
                self.seated = module.to(self.device)
            yield self.device or next(module.parameters()).device


class Adapter(nn.Module, ABC):
    """Abstract: ``inner``, a module of diffusers, behind the call of ours.

    Attributes:
        layout: of the vector.
        seats: where it computes.
        patch: positions of x along an axis that are one token to it; sizes must be multiples of it.
        fixed: whether it takes data of its own size only.
    """

    def __init__(self, inner: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.inner, self.layout, self.seats = inner, layout, Seats()
        self.options: Mapping[str, Any] = inner.config  # type: ignore[assignment]
        self.refuse()

    patch = 1
    fixed = False
    plain: ClassVar[Mapping[str, object]] = {}
    """Options that must be what they are here, since what others mean is not read."""

    @final
    def refuse(self) -> None:
        """Raise for an option whose meaning is not read."""
        for name, value in self.plain.items():
            if self.options.get(name) not in (value, None):
                raise UndiffuseError(
                    f"{type(self.inner).__name__} with {name} = {self.options[name]!r} cannot be read here"
                )

    @property
    def in_channels(self) -> int:
        return int(self.options["in_channels"])

    @property
    def out_channels(self) -> int:
        return int(self.options.get("out_channels") or self.in_channels)

    @final
    def forward(
        self, x: Tensor, label: Tensor, vector: Given = None, tokens: Given = None, mask: Given = None
    ) -> Tensor:
        """``[B, out_channels, *spatial]``, where x is."""
        with self.seats(self.inner) as device:
            given = [None if each is None else each.to(device) for each in (x, label, vector, tokens, mask)]
            return self.say(*given).to(x.device)  # type: ignore[arg-type]

    @abstractmethod
    def say(self, x: Tensor, label: Tensor, vector: Given, tokens: Given, mask: Given) -> Tensor:
        """``[B, out_channels, *spatial]``; ``x`` in the network's type, ``label`` in float32."""


@final
class PixelUNet(Adapter):
    """``UNet2DModel``: DDPM's U-Net, with classes or without."""

    plain: ClassVar[Mapping[str, object]] = {"class_embed_type": None}

    def say(self, x: Tensor, label: Tensor, vector: Given, tokens: Given, mask: Given) -> Tensor:
        number = self.layout.get("classes", vector)
        return self.inner(x, label, class_labels=None if number is None else number[:, 0].round().long()).sample


@final
class TextUNet(Adapter):
    """``UNet2DConditionModel``: the U-Net of latent diffusion, Stable Diffusion 1, 2 and XL, and of LCM."""

    plain: ClassVar[Mapping[str, object]] = {
        "class_embed_type": None,
        "num_class_embeds": None,
        "encoder_hid_dim_type": None,
    }

    def say(self, x: Tensor, label: Tensor, vector: Given, tokens: Given, mask: Given) -> Tensor:
        if tokens is None:
            raise UndiffuseError("this network reads a text: give it tokens")
        added = None
        if (pooled := self.layout.get("pooled", vector)) is not None:
            added = {"text_embeds": pooled.to(x.dtype), "time_ids": self.layout.get("micro", vector)}
        scale = self.layout.get("guidance", vector)
        told = None if scale is None else waves(scale[:, 0] - 1, int(self.options["time_cond_proj_dim"])).to(x.dtype)
        return self.inner(
            x, label, encoder_hidden_states=tokens.to(x.dtype), timestep_cond=told, added_cond_kwargs=added
        ).sample


def waves(number: Tensor, width: int) -> Tensor:
    """Sines and cosines of a thousand times a number ``[B]``, as guidance scales are told to distilled networks (Meng
    et al. 2023, arXiv:2210.03142; the frequencies are those of LCM's code)."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=number.device) * (-log(10000.0) / (half - 1)))
    angles = 1000 * number.float()[:, None] * frequencies
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


@final
class ClassTransformer(Adapter):
    """``DiTTransformer2DModel``: a DiT with classes."""

    fixed = True
    plain: ClassVar[Mapping[str, object]] = {"norm_type": "ada_norm_zero"}

    def say(self, x: Tensor, label: Tensor, vector: Given, tokens: Given, mask: Given) -> Tensor:
        number = self.layout.get("classes", vector)
        assert number is not None
        return self.inner(x, timestep=label, class_labels=number[:, 0].round().long()).sample


@final
class PixArt(Adapter):
    """``PixArtTransformer2DModel``: PixArt alpha and sigma."""

    def say(self, x: Tensor, label: Tensor, vector: Given, tokens: Given, mask: Given) -> Tensor:
        size = self.layout.get("micro", vector)
        added = {"resolution": None, "aspect_ratio": None}
        if size is not None:
            added = {"resolution": size[:, :2], "aspect_ratio": size[:, 2:]}
        return self.inner(
            x,
            timestep=label,
            encoder_hidden_states=tokens.to(x.dtype),
            encoder_attention_mask=mask.to(x.dtype),
            added_cond_kwargs=added,
        ).sample


@final
class MMDiT(Adapter):
    """``SD3Transformer2DModel``: Stable Diffusion 3."""

    def say(self, x: Tensor, label: Tensor, vector: Given, tokens: Given, mask: Given) -> Tensor:
        pooled = self.layout.get("pooled", vector)
        return self.inner(
            x, timestep=label, encoder_hidden_states=tokens.to(x.dtype), pooled_projections=pooled.to(x.dtype)
        ).sample


TOLD: ContextVar[tuple[Tensor, ...]] = ContextVar("TOLD", default=())
"""What the embedding of time is told in the call of this thread."""


@final
class FluxTransformer(Adapter):
    """``FluxTransformer2DModel``: its pictures are rows of patches of 2 x 2 latents, each with its place."""

    patch = 2

    def __init__(self, inner: nn.Module, layout: Layout) -> None:
        super().__init__(inner, layout)
        inner.get_submodule("time_text_embed").register_forward_pre_hook(exactly)

    @property
    def in_channels(self) -> int:
        return int(self.options["in_channels"]) // 4

    @property
    def out_channels(self) -> int:
        return int(self.options.get("out_channels") or self.options["in_channels"]) // 4

    def say(self, x: Tensor, label: Tensor, vector: Given, tokens: Given, mask: Given) -> Tensor:
        pooled, scale = self.layout.get("pooled", vector), self.layout.get("guidance", vector)
        height, width = x.shape[2] // 2, x.shape[3] // 2
        rows = x.unflatten(3, (width, 2)).unflatten(2, (height, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        ends = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
        places = torch.stack([torch.zeros(height, width, device=x.device), *torch.meshgrid(*ends, indexing="ij")], -1)
        before = TOLD.set((label,) if scale is None else (label, 1000 * scale[:, 0].float()))
        try:
            y = self.inner(
                hidden_states=rows,
                timestep=label / 1000,
                guidance=None if scale is None else scale[:, 0],
                pooled_projections=pooled.to(x.dtype),
                encoder_hidden_states=tokens.to(x.dtype),
                txt_ids=torch.zeros(tokens.shape[1], 3, device=x.device),
                img_ids=places.flatten(0, 1),
            ).sample
        finally:
            TOLD.reset(before)
        y = y.unflatten(1, (height, width)).unflatten(3, (-1, 2, 2))
        return y.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def exactly(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before time (and guidance) are embedded: in float32, as they were told. On their way there the network rounds
    them to its own type, and of the thousand times only 507 survive bfloat16 (trap P1)."""
    told = TOLD.get()
    return (*told, *given[len(told) :])


NETWORKS: dict[str, type[Adapter]] = {
    "UNet2DModel": PixelUNet,
    "UNet2DConditionModel": TextUNet,
    "DiTTransformer2DModel": ClassTransformer,
    "PixArtTransformer2DModel": PixArt,
    "SD3Transformer2DModel": MMDiT,
    "FluxTransformer2DModel": FluxTransformer,
}
"""The classes of networks that can be read; no file can name another."""
