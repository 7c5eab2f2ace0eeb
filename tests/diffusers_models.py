"""Tiny models of diffusers' real classes with random weights, made on the spot: nothing is downloaded."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch

VOCABULARY = tuple(
    "a an and cat dog red green blue circle square on the sea of small big house".split()  # noqa: SIM905
)


def seeded(make: Any, seed: int = 0, **options: Any) -> Any:
    """A module with random weights that are neither 0 nor 1 anywhere, so that no part can be left out unseen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make(**options).eval().requires_grad_(False)
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1 or not bool(parameter.any()):
                parameter.add_(0.1 * torch.randn_like(parameter))
            if "embed" in name and parameter.ndim > 1:
                parameter.mul_(0.5)
    return module


@cache
def clip_tokenizer(pad: str = "<|endoftext|>") -> Any:
    from transformers import CLIPTokenizer

    letters = sorted({letter for word in VOCABULARY for letter in word})
    pieces = ["!", *letters, *[f"{letter}</w>" for letter in letters]]
    merges = []
    for word in VOCABULARY:
        left = word[0] if len(word) > 1 else f"{word}</w>"
        for i, letter in enumerate(word[1:], start=1):
            right = f"{letter}</w>" if i == len(word) - 1 else letter
            if f"{left} {right}" not in merges:
                merges.append(f"{left} {right}")
            left += right
            if left not in pieces:
                pieces.append(left)
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[tuple(merge.split()) for merge in merges],  # type: ignore[arg-type]
        model_max_length=16,
        pad_token=pad,
    )


@cache
def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = sorted({letter for word in VOCABULARY for letter in word} | {"A", "B"})
    pieces += [(f"▁{word}", -3.0) for word in VOCABULARY] + [(letter, -5.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=64)


def clip(projected: bool = False, width: int = 16, seed: int = 1) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=width,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=1,
        hidden_act="quick_gelu",
    )
    return seeded(CLIPTextModelWithProjection if projected else CLIPTextModel, seed, config=config)


def t5(width: int = 32) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=width,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        is_encoder_decoder=False,
    )
    return seeded(T5EncoderModel, 2, config=config)


def vae(latents: int = 4, **options: Any) -> Any:
    from diffusers import AutoencoderKL

    return seeded(
        AutoencoderKL,
        3,
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=latents,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=32,
        **options,
    )


def unet(**options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return seeded(
        UNet2DConditionModel,
        4,
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 16,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
            **options,
        },
    )


def pixels(channels: int = 3, **options: Any) -> Any:
    from diffusers import UNet2DModel

    return seeded(
        UNet2DModel,
        5,
        **{
            "sample_size": 8,
            "in_channels": channels,
            "out_channels": channels,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
            **options,
        },
    )


def scheduler(name: str, **options: Any) -> Any:
    import diffusers

    return getattr(diffusers, name)(**options)


def latent_scheduler(name: str = "DDIMScheduler", **options: Any) -> Any:
    """As Stable Diffusion's file has it, but for the end: ours always goes to clean data."""
    if name in ("DDIMScheduler", "PNDMScheduler"):
        options = {"set_alpha_to_one": True} | options
    if name == "DDIMScheduler":
        options = {"clip_sample": False} | options
    table = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return scheduler(name, **{**table, "steps_offset": 1, "timestep_spacing": "leading", **options})


# --- Pipelines --------------------------------------------------------------------------------------------------------


def ddpm(**options: Any) -> Any:
    from diffusers import DDPMPipeline

    return DDPMPipeline(unet=pixels(), scheduler=scheduler("DDPMScheduler", **options))


def ddim(**options: Any) -> Any:
    from diffusers import DDIMPipeline

    return DDIMPipeline(unet=pixels(), scheduler=scheduler("DDIMScheduler", **options))


def sd(kind: str = "StableDiffusionPipeline", schedule: Any = None, **options: Any) -> Any:
    import diffusers

    return getattr(diffusers, kind)(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet(**options),
        scheduler=schedule or latent_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(
    kind: str = "StableDiffusionXLPipeline",
    schedule: Any = None,
    refiner: bool = False,
    width: int = 16,
    **options: Any,
) -> Any:
    """``width``: of the second encoder; the converters of one file tell the two apart by it."""
    import diffusers

    numbers = 5 if refiner else 6
    first = {} if refiner else {"text_encoder": clip(), "tokenizer": clip_tokenizer()}
    if refiner:
        first = {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True}
        first |= {"force_zeros_for_empty_prompt": False}
    return getattr(diffusers, kind)(
        vae=vae(),
        text_encoder_2=clip(projected=True, width=width, seed=7),
        tokenizer_2=clip_tokenizer("!"),
        unet=unet(
            cross_attention_dim=width if refiner else 16 + width,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=width + 8 * numbers,
            use_linear_projection=True,
            **options,
        ),
        scheduler=schedule or latent_scheduler("EulerDiscreteScheduler"),
        add_watermarker=False,
        **first,
    )


def lcm() -> Any:
    return sd(
        "LatentConsistencyModelPipeline", latent_scheduler("LCMScheduler", clip_sample=False), time_cond_proj_dim=12
    )


def flow_scheduler(**options: Any) -> Any:
    return scheduler("FlowMatchEulerDiscreteScheduler", **options)


def sd3(reads_t5: bool = True, **options: Any) -> Any:
    import diffusers

    transformer = seeded(
        diffusers.SD3Transformer2DModel,
        6,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    pipeline: Any = diffusers.StableDiffusion3Pipeline
    return pipeline(
        transformer=transformer,
        vae=vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=clip(projected=True, width=8),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(projected=True, width=16, seed=7),
        tokenizer_2=clip_tokenizer("!"),
        text_encoder_3=t5() if reads_t5 else None,
        tokenizer_3=t5_tokenizer() if reads_t5 else None,
        scheduler=flow_scheduler(**{"shift": 3.0, **options}),
    )


def flux(guidance: bool = True, **options: Any) -> Any:
    import diffusers

    transformer = seeded(
        diffusers.FluxTransformer2DModel,
        8,
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance,
    )
    dynamic = {"use_dynamic_shifting": True, "shift": 3.0} if guidance else {}
    return diffusers.FluxPipeline(
        transformer=transformer,
        vae=vae(shift_factor=0.1, scaling_factor=0.4, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        scheduler=flow_scheduler(**{**dynamic, **options}),
    )


def pixart(kind: str = "PixArtAlphaPipeline", **options: Any) -> Any:
    import diffusers

    transformer = seeded(
        diffusers.PixArtTransformer2DModel,
        9,
        **{
            "sample_size": 8,
            "num_layers": 2,
            "patch_size": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "cross_attention_dim": 16,
            "caption_channels": 32,
            "in_channels": 4,
            "out_channels": 8,
            **options,
        },
    )
    return getattr(diffusers, kind)(
        transformer=transformer,
        vae=vae(),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        scheduler=latent_scheduler("DPMSolverMultistepScheduler", timestep_spacing="linspace", beta_schedule="linear"),
    )


def dit(classes: int = 1000) -> Any:
    import diffusers

    transformer = seeded(
        diffusers.DiTTransformer2DModel,
        10,
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=classes,
    )
    return diffusers.DiTPipeline(transformer=transformer, vae=vae(), scheduler=latent_scheduler(beta_schedule="linear"))


def ldm() -> Any:
    import diffusers

    vqvae = seeded(
        diffusers.VQModel,
        11,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=16,
        norm_num_groups=4,
        scaling_factor=0.5,
    )
    return diffusers.LDMPipeline(vqvae=vqvae, unet=pixels(), scheduler=latent_scheduler())


# --- The names of CompVis, Stability and OpenCLIP ---------------------------------------------------------------------

UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_PARTS = {
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_shortcut": "nin_shortcut",
}


def unet_name(name: str) -> str:
    """Of a tensor of :func:`unet`, one layer a block, in the original code."""
    for ours, original in UNET_ENDS.items():
        if name.startswith(f"{ours}."):
            return original + name[len(ours) :]
    place, kind, number, rest = re.fullmatch(  # type: ignore[union-attr]
        r"(mid_block|\w+_blocks\.\d)\.(\w+)\.(\d)\.(.*)", name
    ).groups()
    if kind == "resnets":
        part, rest = rest.split(".", 1)
        rest = f"{UNET_BLOCK[part]}.{rest}"
    if place == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}.{rest}"
    level = int(place[-1])
    if kind == "downsamplers":
        return f"input_blocks.{2 * level + 2}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{2 * level + 1}.2.{rest}"
    index = 2 * level + int(number)
    way = f"input_blocks.{1 + index}" if place.startswith("down") else f"output_blocks.{index}"
    return f"{way}.{0 if kind == 'resnets' else 1}.{rest}"


def vae_name(name: str, levels: int = 3) -> str:
    """Of a tensor of :func:`vae` in the original code."""
    for ours, original in VAE_PARTS.items():
        name = name.replace(ours, original)
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)


OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn": "attn",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a text encoder in the code that those of Stable Diffusion 2 and SDXL's second one come from."""
    one = {"logit_scale": torch.tensor(4.6)}
    if (projection := state.pop("text_projection.weight", None)) is not None:
        one["text_projection"] = projection.T.contiguous()
    for name in [name for name in state if ".q_proj." in name]:
        rows = [state.pop(name.replace("q_proj", each)) for each in ("q_proj", "k_proj", "v_proj")]
        state[name.replace("q_proj.", "in_proj_")] = torch.cat(rows)
    for name, tensor in state.items():
        for ours, original in OPEN_CLIP.items():
            name = name.replace(ours, original)
        one[name] = tensor
    return one


def in_one(pipeline: Any, opened: bool = False) -> dict[str, torch.Tensor]:
    """The weights of :func:`sd` or :func:`sdxl` as a checkpoint in one file has them; ``opened``: the text encoder's as
    Stable Diffusion 2 has them."""
    one = {f"model.diffusion_model.{unet_name(name)}": tensor for name, tensor in pipeline.unet.state_dict().items()}
    for name, tensor in pipeline.vae.state_dict().items():
        name = vae_name(name)
        one[f"first_stage_model.{name}"] = tensor[..., None, None] if "attn_1" in name and tensor.ndim == 2 else tensor
    texts = ["cond_stage_model"]
    if second := getattr(pipeline, "text_encoder_2", None):
        texts = ["conditioner.embedders.0", "conditioner.embedders.1"][: 1 + (pipeline.text_encoder is not None)]
        named = open_clip(dict(second.state_dict())).items()
        one |= {f"{texts[-1]}.model.{name}": tensor for name, tensor in named}
    if first := pipeline.text_encoder:
        state = {f"text_model.{name}": tensor for name, tensor in first.state_dict().items()}
        kind, state = ("model", open_clip(state)) if opened else ("transformer", state)
        one |= {f"{texts[0]}.{kind}.{name}": tensor for name, tensor in state.items()}
    return one
