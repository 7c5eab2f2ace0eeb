"""A model as a folder that diffusers loads.

What diffusers has a class for is written as that class, and ``DDPMPipeline.from_pretrained(folder)`` samples from it
without a line of ours: a :class:`.DDPMUNet` is a ``UNet2DModel`` (or, with tokens, a ``UNet2DConditionModel``) number
for number, a table of betas is a ``DDPMScheduler``, a flow a ``FlowMatchEulerDiscreteScheduler``. Everything else keeps
its own folder, ``undiffuse/``, beside a ``pipeline.py`` that diffusers runs where its user allows that:

    model_index.json  README.md                       always
    unet/ scheduler/                                  what diffusers has classes for
    undiffuse/ pipeline.py                            what it has none for
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..conditions import Classes, Conditions
from ..config import write_bytes_atomic, write_json_atomic
from ..denoiser import NoScale, TimeLabel
from ..errors import UndiffuseError
from ..networks import DDPMUNet
from ..pipeline import Pipeline
from ..predictions import X0, Eps, FlowVelocity, Prediction, V
from ..schedules import CosineBetas, Flow, LinearBetas, ScaledLinearBetas, Schedule, Table, ZeroTerminalSNR
from ..weights import write_weights
from .card import model_card

VERSION = "0.42.0"
"""The version of diffusers that this format was written for."""
TIMES = 1000
RENAMED = {
    "embedding.first": "time_embedding.linear_1",
    "embedding.second": "time_embedding.linear_2",
    "embedding.condition": "class_embedding",
}
PREDICTED: dict[type[Prediction], str] = {Eps: "epsilon", V: "v_prediction", X0: "sample"}


class Unfit(UndiffuseError):
    """Diffusers has no class for this, and why."""


@dataclass(frozen=True)
class Translation:
    """What diffusers has classes for.

    Attributes:
        scheduler: its config.
        network: its class, config and weights. Both are None where there is none for one of them, or where the model
            came from diffusers.
        reason: why ``DDPMPipeline`` cannot sample from the model; None: it can, or the model came from diffusers.
    """

    scheduler: dict[str, Any] | None = None
    network: tuple[str, dict[str, Any], dict[str, Tensor]] | None = None
    reason: str | None = None


def translate(pipeline: Pipeline) -> Translation:
    """What diffusers has for this model."""
    if pipeline.home is not None:
        return Translation()
    try:
        scheduler, network = scheduler_config(pipeline), network_of(pipeline)
    except Unfit as error:
        return Translation(reason=str(error))
    reason = None
    if pipeline.config.conditions:
        asked = " and ".join(pipeline.config.conditions)
        reason = f"DDPMPipeline asks for nothing, this model can be asked for {asked}"
    elif pipeline.spec.channels not in (1, 3) or not pipeline.spec.bounded:
        reason = "DDPMPipeline makes grey or RGB pictures of a declared range"
    return Translation(scheduler, network, reason)


def save_diffusers(
    pipeline: Pipeline,
    folder: str | Path,
    *,
    license: str | None = None,
    run: Path | None = None,
    translation: Translation | None = None,
) -> Path:
    """Write ``folder`` for diffusers, with a model card; returns it.

    What diffusers has no class for is reached through ``pipeline.py`` (see above); ``translation`` (None: that of
    :func:`translate`) says why. ``license`` and ``run`` are for the card (:func:`.model_card`).

    Raises:
        UndiffuseError: the folder has something in it.
    """
    folder, found = new_folder(folder), translation or translate(pipeline)
    if pipeline.home is not None:  # it came from diffusers, and is written as it came
        pipeline.save(folder)
    else:
        _write(pipeline, folder, found)
    card = model_card(pipeline, license=license, diffusers=found.reason or "", run=run)
    write_bytes_atomic(folder / "README.md", card.encode())
    return folder


def _write(pipeline: Pipeline, folder: Path, found: Translation) -> None:
    index: dict[str, Any] = {"_class_name": "DDPMPipeline", "_diffusers_version": VERSION}
    if found.scheduler is not None and found.network is not None:
        network, config, state = found.network
        if found.reason is None:
            index |= {"scheduler": ["diffusers", found.scheduler["_class_name"]], "unet": ["diffusers", network]}
        write_json(folder / "scheduler" / "scheduler_config.json", found.scheduler)
        write_json(folder / "unet" / "config.json", config)
        write_weights(folder / "unet" / "diffusion_pytorch_model.safetensors", state, {"format": "pt"})
    if found.reason is not None:
        index["_class_name"] = ["pipeline", "UndiffusePipeline"]
        pipeline.save(folder / "undiffuse")
        write_bytes_atomic(folder / "pipeline.py", Path(__file__).with_name("diffusers_pipeline.py").read_bytes())
    write_json_atomic(folder / "model_index.json", index)


def new_folder(folder: str | Path) -> Path:
    """The folder, made if it is not there; refuses one with something in it."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UndiffuseError(f"{folder}: has something else; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, value)


# --- the scheduler ----------------------------------------------------------------------------------------------------


def scheduler_config(pipeline: Pipeline) -> dict[str, Any]:
    """``scheduler_config.json``, or :class:`Unfit`."""
    config, schedule = pipeline.config, pipeline.config.schedule
    if config.input_scale != NoScale():
        raise Unfit("diffusers' U-Nets get x as it is, this one gets it scaled")
    if isinstance(schedule, Flow):
        if config.prediction != FlowVelocity() or config.label != TimeLabel(TIMES):
            raise Unfit(f"diffusers' flows say eps - x0 and are told t * {TIMES}")
        return {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "_diffusers_version": VERSION,
            "num_train_timesteps": TIMES,
            "shift": 1.0,
        }
    predicted = PREDICTED.get(type(config.prediction))
    if predicted is None:
        raise Unfit(f"diffusers' tables of betas know eps, v and x0, not {type(config.prediction).__name__}")
    betas = beta_options(schedule)
    if config.label != TimeLabel(betas["num_train_timesteps"], -1):
        raise Unfit("diffusers tells a network the index of the time in the table: take label=discrete")
    variance = "fixed_small"
    if config.learned_variance:
        variance = "learned_range"
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": VERSION,
        **betas,
        "prediction_type": predicted,
        "variance_type": variance,
        "clip_sample": pipeline.sampling.threshold == "static",
        "timestep_spacing": "trailing",
    }


def beta_options(schedule: Schedule) -> dict[str, Any]:
    """The options of a table of betas, or :class:`Unfit`."""
    if isinstance(schedule, ZeroTerminalSNR):
        return beta_options(schedule.schedule) | {"rescale_betas_zero_snr": True}
    if not isinstance(schedule, Table):
        raise Unfit(f"diffusers has tables of betas and flows, not the schedule {type(schedule).__name__}")
    betas = schedule.betas()
    options: dict[str, Any] = {"num_train_timesteps": len(betas)}
    if isinstance(schedule, (LinearBetas, ScaledLinearBetas)):
        name = "linear" if isinstance(schedule, LinearBetas) else "scaled_linear"
        return options | {"beta_schedule": name, "beta_start": float(betas[0]), "beta_end": float(betas[-1])}
    if schedule == CosineBetas(len(betas)):
        return options | {"beta_schedule": "squaredcos_cap_v2"}
    return options | {"trained_betas": betas.tolist()}


# --- the network ------------------------------------------------------------------------------------------------------


def network_of(pipeline: Pipeline) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """The class of diffusers, its config and its weights, or :class:`Unfit`."""
    network = pipeline.denoiser.network
    if not isinstance(network, DDPMUNet):
        raise Unfit(
            f"diffusers has no class for the {type(network).__name__} of undiffuse (ddpm_unet is one of its own)"
        )
    if pipeline.codec is not None:
        raise Unfit("diffusers has no such autoencoder")
    options = {"sample_size": list(pipeline.spec.shape[1:]), **unet_config(network)}
    state = {renamed(name): tensor for name, tensor in network.state_dict().items()}
    conditions = pipeline.denoiser.conditions
    if not network.token_width and isinstance(conditions, Conditions):
        if conditions.names != ("classes",):
            raise Unfit(f"a UNet2DModel can be asked for a class, not for {' and '.join(conditions.names)}")
        # Theirs adds a row of a table to the embedding, ours passes a row through a matrix first: one table.
        classes = conditions.part("classes")
        assert isinstance(classes, Classes)
        weight, bias = state.pop("class_embedding.weight"), state.pop("class_embedding.bias")
        state["class_embedding.weight"] = classes.table.weight.detach() @ weight.T + bias
        options["num_class_embeds"] = len(state["class_embedding.weight"])
    name = "UNet2DConditionModel" if network.token_width else "UNet2DModel"
    return name, {"_class_name": name, "_diffusers_version": VERSION, **options}, state


def renamed(name: str) -> str:
    """Ours to theirs."""
    layer, _, part = name.rpartition(".")
    return f"{RENAMED.get(layer, layer)}.{part}"


def unet_config(network: DDPMUNet) -> dict[str, Any]:
    """The options of the U-Net of diffusers that is ``network``."""
    ours: Mapping[str, Any] = network.config
    widths, attention, heads = ours["widths"], set(ours["attention"]), ours["head_width"]
    looks = "CrossAttn" if network.token_width else "Attn"
    levels = range(len(widths))
    options: dict[str, Any] = {
        "in_channels": network.in_channels,
        "out_channels": network.out_channels,
        "block_out_channels": widths,
        "layers_per_block": ours["blocks"],
        "down_block_types": [f"{looks if i in attention else ''}DownBlock2D" for i in levels],
        "up_block_types": [f"{looks if i in attention else ''}UpBlock2D" for i in reversed(levels)],
        "time_embedding_dim": ours["embedding"],
        "freq_shift": 1,
        "norm_num_groups": ours["groups"],
        "resnet_time_scale_shift": "scale_shift",
        "dropout": ours["dropout"],
    }
    if not network.token_width:
        return options | {"attention_head_dim": heads, "attn_norm_num_groups": ours["groups"]}
    # Its attention_head_dim is the number of heads, one a level.
    options |= {"cross_attention_dim": network.token_width, "attention_head_dim": [max(1, w // heads) for w in widths]}
    if network.condition_width:
        options |= {
            "class_embed_type": "simple_projection",
            "projection_class_embeddings_input_dim": network.condition_width,
        }
    return options


def sizes(folder: str | Path) -> dict[str, int]:
    """Every file of a folder by its name in it, with its bytes."""
    folder = Path(folder)
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
    }
