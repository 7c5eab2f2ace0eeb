"""Which parts each pipeline of diffusers has, and how they are put together.

A family says what its network reads (one text or three, the size of the picture, a class, a guidance scale), with which
layers of which encoders, and what it samples with where nobody says otherwise. The classes of parts are looked up here
by name; a file chooses among them and can name no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any, final

import torch
from torch import Tensor, nn

from ...conditions import Condition
from ...errors import UndiffuseError, unknown
from ...grids import Grid, Uniform
from .codecs import CODECS, Autoencoder
from .folder import Folder, line_of, load_part
from .networks import NETWORKS, Adapter, Layout
from .texts import (
    Arrange,
    ClassNumbers,
    Hole,
    Numbers,
    Reader,
    Texts,
    alone,
    clips_then_t5,
    clips_without_t5,
    pooled_and_t5,
    side_by_side,
)

ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast")
OLD_NAMES = ("Transformer2DModel",)
"""What DiT and PixArt were called first."""
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder", "watermark")
"""Parts that change nothing of what the model draws; they are not read."""

Size = tuple[int, int]
Tell = Callable[[Size], dict[str, Condition]]
"""The conditions that are told for pictures of a size."""


@final
class Parts:
    """The parts of a folder, loaded when they are asked for."""

    def __init__(self, folder: Folder, dtype: torch.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        self.modules: dict[str, nn.Module] = {}
        self.tokenizers: dict[str, Any] = {}

    def has(self, name: str) -> bool:
        return name in self.folder.parts

    def class_of(self, name: str, known: Sequence[str], library: str) -> str:
        """The class of a part, one of those that are known."""
        where = self.folder.path / "model_index.json"
        if name not in self.folder.parts:
            raise UndiffuseError(f"{where}: a {self.folder.family} has a part {name}, which is missing")
        home, kind = self.folder.parts[name]
        if kind not in known:
            raise unknown(f"class of {name} in {where}", kind, known)
        if home != library:
            raise UndiffuseError(f"{where}: {name} is {kind} of {library}, not of {home!r}")
        return kind

    def diffusers(self, name: str, known: Sequence[str]) -> nn.Module:
        """A module of diffusers."""
        import diffusers

        made = getattr(diffusers, self.class_of(name, known, "diffusers"))
        return self.keep(name, made.from_config, made.from_pretrained, "torch_dtype")

    def keep(self, name: str, make: Any, read: Any, option: str) -> nn.Module:
        self.modules[name] = load_part(self.folder, name, make, read, self.dtype, option)
        return self.modules[name]

    def network(self, name: str, known: Sequence[str], layout: Callable[[Mapping[str, Any]], Layout]) -> Adapter:
        """The network, behind the call of ours."""
        inner = self.diffusers(name, [*known, *OLD_NAMES])
        kind = type(inner).__name__
        if kind not in known:  # an old name becomes what its config describes
            raise UndiffuseError(f"{self.folder.path / name}: is a {kind}, {' or '.join(known)} is expected")
        return NETWORKS[kind](inner, layout(inner.config))  # type: ignore[arg-type]

    def codec(self, name: str = "vae") -> Autoencoder:
        return Autoencoder(self.diffusers(name, list(CODECS))).with_constants()

    def reader(
        self,
        number: str = "",
        *,
        places: int | None = None,
        layer: int | None = None,
        pooled: str | None = None,
        masked: bool = False,
        skips: bool = False,
    ) -> Reader:
        """The text encoder ``text_encoder`` + number with its tokenizer; ``places``: tokens of a text, None: as many as
        it reads."""
        import transformers

        name, words = f"text_encoder{number}", f"tokenizer{number}"
        encoder = getattr(transformers, self.class_of(name, ENCODERS, "transformers"))

        def make(config: dict[str, Any]) -> nn.Module:
            return encoder(encoder.config_class.from_dict(config))

        model = self.keep(name, make, encoder.from_pretrained, "dtype")
        kind = self.class_of(words, TOKENIZERS, "transformers")
        for path in self.folder.files(words):
            if path.suffix == ".json":
                read_any(self.folder, words, path.name)
        there = {path.name for path in self.folder.files(words)}
        if "spiece.model" in there and "tokenizer.json" not in there and find_spec("sentencepiece") is None:
            raise UndiffuseError(
                f"{self.folder.path / words}: its spiece.model needs a package: pip install sentencepiece"
            )
        try:
            source = str(self.folder.inside(words))
            tokenizer = getattr(transformers, kind).from_pretrained(source, local_files_only=True)
        except Exception as error:
            raise UndiffuseError(f"{self.folder.path / words}: cannot be read ({line_of(error)})") from None
        self.tokenizers[words] = tokenizer
        room = int(getattr(model.config, "max_position_embeddings", 0) or 512)  # type: ignore[union-attr]
        places = min(int(tokenizer.model_max_length), room) if places is None else places
        return Reader(tokenizer, model, places, layer, pooled, masked, skips)


def read_any(folder: Folder, part: str, name: str) -> None:
    """Refuse a tokenizer's file that names code; the vocabularies themselves are large and plain."""
    if name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"):
        folder.json(part, name)


# --- What a family makes of its parts ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Made:
    """The parts of a model, put together.

    Attributes:
        size: of its pictures where nobody says otherwise, ``(height, width)`` in pixels.
        texts: what it reads; ``told``: the other conditions for pictures of a size.
        steps, guidance_scale: of its defaults.
        scheduler: options of the scheduler that its pipeline sets whatever the file says.
        flow_grid: the grid, before its shift, that its pipeline brings.
        classes: their names.
    """

    network: Adapter
    codec: Autoencoder | None
    size: Size
    steps: int
    guidance_scale: float = 1.0
    texts: Texts | None = None
    told: Tell = lambda size: {}
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    flow_grid: Grid | None = None
    classes: tuple[str, ...] = ()


def pair(value: Any, factor: int, default: int = 0) -> Size:
    """``sample_size`` in pixels: one number or two."""
    value = value or default
    height, width = (value, value) if isinstance(value, int) else (int(each) for each in value)
    return height * factor, width * factor


def plain(options: Mapping[str, Any]) -> Layout:
    return Layout({})


def unconditional(parts: Parts) -> Made:
    """``UNet2DModel`` on pixels (DDPM, DDIM, with classes or without) or in latents (LDM)."""

    def layout(options: Mapping[str, Any]) -> Layout:
        return Layout({"classes": 1} if options.get("num_class_embeds") else {})

    network = parts.network("unet", ["UNet2DModel"], layout)
    vae = next((name for name in ("vqvae", "vae") if parts.has(name)), None)
    codec = None if vae is None else parts.codec(vae)
    count = network.options.get("num_class_embeds")
    size = pair(network.options["sample_size"], 1 if codec is None else codec.factor)
    steps = 1000 if parts.folder.family == "DDPMPipeline" else 50
    classes = ClassNumbers(int(count), network.layout, has_null=False) if count else None
    return Made(
        network,
        codec,
        size,
        steps,
        told=lambda size: {} if classes is None else {"classes": classes},
        classes=tuple(map(str, range(int(count or 0)))),
    )


def with_hole(network: Adapter, codec: Autoencoder, told: Tell) -> Tell:
    """``told``, and what is known of the picture if the network is one for inpainting: it has ``1 + 2 C`` channels."""
    latents = len(codec.mean)
    if network.in_channels == latents:
        return told
    if network.in_channels != 1 + 2 * latents:
        raise UndiffuseError(
            f"a network of {network.in_channels} channels in latents of {latents}: {latents} are a picture, "
            f"{1 + 2 * latents} one with a hole; others are not read here"
        )

    def with_it(size: Size) -> dict[str, Condition]:
        def grey() -> Tensor:
            with torch.no_grad():
                return codec.encode(torch.zeros(1, int(codec.config["in_channels"]), *size))

        return told(size) | {"hole": Hole((1 + latents, size[0] // codec.factor, size[1] // codec.factor), grey)}

    return with_it


def stable_diffusion(parts: Parts) -> Made:
    """Stable Diffusion 1 and 2, with a hole or without; latent consistency models of them."""

    def layout(options: Mapping[str, Any]) -> Layout:
        if options.get("addition_embed_type") is not None:
            raise UndiffuseError("this U-Net is told more than a text, which its pipeline does not do")
        return Layout({"guidance": 1} if options.get("time_cond_proj_dim") else {})

    network, codec = parts.network("unet", ["UNet2DConditionModel"], layout), parts.codec()
    masked = bool(parts.folder.json("text_encoder", "config.json").get("use_attention_mask", False))
    texts = Texts({"text_encoder": parts.reader(masked=masked, skips=True)}, alone, network.layout, windows=True)
    consistent, distilled = parts.folder.family.startswith("LatentConsistency"), "guidance" in network.layout.sizes
    told = guidance(network, 8.5 if consistent else 7.5)
    return Made(
        network,
        codec,
        pair(network.options["sample_size"], codec.factor),
        steps=4 if consistent else 50,
        guidance_scale=1.0 if consistent or distilled else 7.5,
        texts=texts,
        told=with_hole(network, codec, told),
        scheduler={} if consistent else {"steps_offset": 1, "clip_sample": False},
    )


def guidance(network: Adapter, usual: float) -> Tell:
    """The guidance scale of a network into which guidance was distilled."""
    if "guidance" not in network.layout.sizes:
        return lambda size: {}
    return lambda size: {"guidance": Numbers("guidance", network.layout, [usual])}


def stable_diffusion_xl(parts: Parts) -> Made:
    """Stable Diffusion XL: two encoders side by side, the size of the picture; its refiner, with one encoder and how
    beautiful it shall be."""
    scored = bool(parts.folder.options.get("requires_aesthetics_score", False))

    def layout(options: Mapping[str, Any]) -> Layout:
        if options.get("addition_embed_type") != "text_time":
            raise UndiffuseError(f"addition_embed_type = {options.get('addition_embed_type')!r}: text_time is expected")
        numbers, each = (5 if scored else 6), int(options["addition_time_embed_dim"])
        pooled = int(options["projection_class_embeddings_input_dim"]) - numbers * each
        if pooled < 1:
            raise UndiffuseError("projection_class_embeddings_input_dim leaves no room for the text")
        sizes = {"pooled": pooled, "micro": numbers}
        return Layout(sizes | ({"guidance": 1} if options.get("time_cond_proj_dim") else {}))

    network, codec = parts.network("unet", ["UNet2DConditionModel"], layout), parts.codec()
    names = [number for number in ("", "_2") if parts.has(f"text_encoder{number}")]
    readers = {
        f"text_encoder{number}": parts.reader(
            number, layer=-2, pooled="text_embeds" if number == "_2" else None, skips=True
        )
        for number in names
    }
    zeros = bool(parts.folder.options.get("force_zeros_for_empty_prompt", True))
    texts = Texts(readers, side_by_side, network.layout, zeros=zeros, windows=True)
    distilled = guidance(network, 7.5)

    def told(size: Size) -> dict[str, Condition]:
        height, width = size
        usual, against = [height, width, 0, 0, height, width], None
        if scored:
            usual, against = [height, width, 0, 0, 6.0], [height, width, 0, 0, 2.5]
        return {"micro": Numbers("micro", network.layout, usual, against), **distilled(size)}

    return Made(
        network,
        codec,
        pair(network.options["sample_size"], codec.factor),
        steps=50,
        guidance_scale=1.0 if "guidance" in network.layout.sizes else 5.0,
        texts=texts,
        told=with_hole(network, codec, told),
    )


def stable_diffusion_3(parts: Parts) -> Made:
    """Stable Diffusion 3: two CLIPs and T5, or without T5."""

    def layout(options: Mapping[str, Any]) -> Layout:
        return Layout({"pooled": int(options["pooled_projection_dim"])})

    network, codec = parts.network("transformer", ["SD3Transformer2DModel"], layout), parts.codec()
    readers = {
        f"text_encoder{number}": parts.reader(number, layer=-2, pooled="text_embeds", skips=True)
        for number in ("", "_2")
    }
    arrange: Arrange = clips_then_t5
    if parts.has("text_encoder_3"):
        readers["text_encoder_3"] = parts.reader("_3", places=256)
    else:
        arrange = partial(clips_without_t5, places=256, width=int(network.options["joint_attention_dim"]))
    return Made(
        network,
        codec,
        pair(network.options["sample_size"], codec.factor),
        steps=28,
        guidance_scale=7.0,
        texts=Texts(readers, arrange, network.layout),
    )


def flux(parts: Parts) -> Made:
    """Flux: CLIP's whole text and T5's tokens; the guidance scale is told (dev) or there is none (schnell)."""

    def layout(options: Mapping[str, Any]) -> Layout:
        sizes = {"pooled": int(options["pooled_projection_dim"])}
        return Layout(sizes | ({"guidance": 1} if options.get("guidance_embeds") else {}))

    network, codec = parts.network("transformer", ["FluxTransformer2DModel"], layout), parts.codec()
    readers = {
        "text_encoder": parts.reader(pooled="pooler_output"),
        "text_encoder_2": parts.reader("_2", places=512),
    }
    return Made(
        network,
        codec,
        pair(None, codec.factor, 128),
        steps=28 if "guidance" in network.layout.sizes else 4,
        texts=Texts(readers, pooled_and_t5, network.layout),
        told=guidance(network, 3.5),
        flow_grid=Uniform(),
    )


def pixart(parts: Parts) -> Made:
    """PixArt alpha and sigma: T5 with its mask; large ones are told the size of the picture."""
    sigma = parts.folder.family == "PixArtSigmaPipeline"

    def layout(options: Mapping[str, Any]) -> Layout:
        extra = options.get("use_additional_conditions")
        extra = options["sample_size"] == 128 if extra is None else extra
        return Layout({"micro": 3} if extra and not sigma else {})

    network, codec = parts.network("transformer", ["PixArtTransformer2DModel"], layout), parts.codec()
    texts = Texts(
        {"text_encoder": parts.reader(places=300 if sigma else 120, masked=True)}, alone, network.layout, lower=True
    )

    def told(size: Size) -> dict[str, Condition]:
        height, width = size
        if "micro" not in network.layout.sizes:
            return {}
        return {"micro": Numbers("micro", network.layout, [height, width, height / width])}

    return Made(
        network,
        codec,
        pair(network.options["sample_size"], codec.factor),
        steps=20,
        guidance_scale=4.5,
        texts=texts,
        told=told,
    )


def dit(parts: Parts) -> Made:
    """DiT: classes, in latents."""

    def layout(options: Mapping[str, Any]) -> Layout:
        return Layout({"classes": 1})

    network, codec = parts.network("transformer", ["DiTTransformer2DModel"], layout), parts.codec()
    count = int(network.options["num_embeds_ada_norm"])
    classes = ClassNumbers(count, network.layout, has_null=True)
    return Made(
        network,
        codec,
        pair(network.options["sample_size"], codec.factor),
        steps=50,
        guidance_scale=4.0,
        told=lambda size: {"classes": classes},
        classes=class_names(parts.folder.options.get("id2label"), count),
    )


def class_names(names: Any, count: int) -> tuple[str, ...]:
    """The first name of each class; the number with it where two have the same."""
    if not isinstance(names, dict):
        return tuple(map(str, range(count)))
    first = [str(names.get(str(i), i)).split(",")[0].strip() for i in range(count)]
    return tuple(name if first.count(name) == 1 else f"{name} {i}" for i, name in enumerate(first))


FAMILIES: dict[str, Callable[[Parts], Made]] = {
    "DDPMPipeline": unconditional,
    "DDIMPipeline": unconditional,
    "LDMPipeline": unconditional,
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionImg2ImgPipeline": stable_diffusion,
    "StableDiffusionInpaintPipeline": stable_diffusion,
    "LatentConsistencyModelPipeline": stable_diffusion,
    "LatentConsistencyModelImg2ImgPipeline": stable_diffusion,
    "StableDiffusionXLPipeline": stable_diffusion_xl,
    "StableDiffusionXLImg2ImgPipeline": stable_diffusion_xl,
    "StableDiffusionXLInpaintPipeline": stable_diffusion_xl,
    "StableDiffusion3Pipeline": stable_diffusion_3,
    "StableDiffusion3Img2ImgPipeline": stable_diffusion_3,
    "FluxPipeline": flux,
    "FluxImg2ImgPipeline": flux,
    "PixArtAlphaPipeline": pixart,
    "PixArtSigmaPipeline": pixart,
    "DiTPipeline": dit,
}
"""Every pipeline of diffusers that can be read."""
