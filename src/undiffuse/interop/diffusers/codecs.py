"""diffusers' autoencoders as codecs. Their constants are the units of the latents of the networks that were trained
with them: ``(latent - shift) * scaling`` (with ``latents_mean`` and ``latents_std``, ``(latent - mean) / std *
scaling``), which :class:`.Codec` writes as (latent - mean) / std, and nobody else multiplies by (trap D5).

A model of one's own is trained in units that are measured on its data. So an autoencoder that is loaded alone
(:func:`load`) comes without any; its constants are in ``info`` for comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from ...codecs import Codec
from ...config import load_json
from ...errors import UndiffuseError, choose
from .folder import PICKLES, Folder, check_config, line_of, load_part
from .networks import Seats


@final
class Autoencoder(Codec):
    """``AutoencoderKL``, ``AutoencoderTiny`` or ``VQModel``, with weights."""

    def __init__(self, inner: nn.Module) -> None:
        options: Mapping[str, Any] = inner.config  # type: ignore[assignment]
        name = type(inner).__name__
        channels = int(options.get("vq_embed_dim") or options["latent_channels"])
        self.kind = CODECS[name]
        # A codec is described by what it computes, not by the file that it came from.
        described = {key: value for key, value in sorted(options.items()) if not key.startswith("_")}
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
        stated = {"mean": [float(each) for each in mean], "std": [float(each) / scaling for each in std]}
        self.info = {"class": name, "constants": stated}
        if bool(options.get("force_upcast", False)) and self.halved:
            self.in_float32()  # it overflows in half precision (trap P7)

    @torch.no_grad()
    def with_constants(self) -> Autoencoder:
        """This one in the units of the networks that were trained with it."""
        constants = self.info["constants"]
        self.settle(constants["mean"], constants["std"], {"data": f"constants of the {self.info['class']}"})
        return self

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        channels = int(self.config["in_channels"])
        if len(shape) != 3 or shape[0] != channels or shape[1] % self.factor or shape[2] % self.factor:
            raise UndiffuseError(
                f"this autoencoder takes pictures of {channels} channels and sides that are multiples of "
                f"{self.factor}, not {list(shape)} (--image-size and --channels bring them to that)"
            )
        return (len(self.mean), shape[1] // self.factor, shape[2] // self.factor)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        with self.seats(self.inner) as device:
            made = self.inner.encode(x.to(device))  # type: ignore[operator]
        if self.kind == "autoencoder_kl":
            return made.latent_dist.mean.to(x.device), made.latent_dist.std.to(x.device)
        return made.latents.to(x.device), None

    def reconstruct(self, latent: Tensor) -> Tensor:
        with self.seats(self.inner) as device:
            return self.inner.decode(latent.to(device)).sample.to(latent.device)  # type: ignore[operator]


CODECS = {"AutoencoderKL": "autoencoder_kl", "AutoencoderTiny": "autoencoder_tiny", "VQModel": "vq_model"}
"""The classes of autoencoders that can be read, and what they are called here."""


def build(name: str, config: Mapping[str, Any]) -> Autoencoder:
    """One of these classes with fresh weights, from what a codec's file says."""
    described = check_config(dict(config), f"the configuration of the {name}")
    library = diffusers_for(f"a codec that is an {name}")
    try:
        made = Autoencoder(getattr(library, name).from_config(described))
    except UndiffuseError:
        raise
    except Exception as error:  # whatever a library makes of a config that it does not understand
        raise UndiffuseError(f"the configuration of the {name} does not build one ({line_of(error)})") from None
    made.config = described  # its hash must not depend on the options that a later version of the library adds
    return made


def load(path: str | Path, device: str | torch.device = "cpu") -> Autoencoder:
    """The autoencoder in a folder of diffusers, which is its own (``vae``) or that of a whole pipeline; or in one of
    the Hub that is on this machine. Its units are not measured yet."""
    from .load import hub_folder

    given = Path(path)
    if given.is_file():
        why = "a pickle, which is not opened" if given.suffix.lower() in PICKLES else "one file, without its config"
        raise UndiffuseError(f"{path}: {why}; name a folder of diffusers with config.json and safetensors")
    library = diffusers_for(str(path))
    here, root = (given, None) if given.is_dir() else hub_folder(str(path), None, False)
    if (here / "model_index.json").exists():
        folder = Folder(here, root)
        part = next((name for name, (_, kind) in folder.parts.items() if kind in CODECS), None)
        if part is None:
            kinds = ", ".join(kind for _, kind in folder.parts.values())
            known = ", ".join(CODECS)
            raise UndiffuseError(f"{path}: has none of {known}, only {kinds}: it is no model in latents")
        kind = folder.parts[part][1]
    else:
        config = here / "config.json"
        part, kind = "vae", str(check_config(load_json(config), str(config)).get("_class_name"))
        folder = Folder(here, root, index={"_class_name": kind, part: ["diffusers", kind]})
    choose(f"class of autoencoder in {path}", kind, CODECS)
    made = getattr(library, kind)
    inner = load_part(folder, part, made.from_config, made.from_pretrained, torch.float32, "torch_dtype")
    return Autoencoder(inner).to(device)


def diffusers_for(what: str) -> Any:
    """The package diffusers, quiet."""
    try:
        import diffusers
    except ImportError:
        raise UndiffuseError(f"{what}: needs diffusers, which is missing: pip install 'undiffuse[diffusers]'") from None
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    return diffusers
