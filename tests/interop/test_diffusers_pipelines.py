"""For each family of diffusers: the same weights, the same noise and the corresponding scheduler give the same latents
and the same pictures as its own pipeline. The models are tiny, of the real classes, with random weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from undiffuse import Pipeline, Streams

pytest.importorskip("diffusers", reason="diffusers is read here, and is the oracle")
pytest.importorskip("transformers", reason="diffusers' pipelines read texts with transformers")

import diffusers_models as tiny

PROMPTS = ["a red circle on the sea", "cat and dog"]
SEED = 5


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def both(theirs: Any, folder: Path) -> Pipeline:
    """Their pipeline, saved by them and read by us."""
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(folder)
    return Pipeline.load(folder)


def walked(ours: Pipeline, **asked: Any) -> Tensor:
    """The end of our trajectory, in latents."""
    *_, last = ours.frames(len(PROMPTS), seed=SEED, **asked)
    return last.x


def noise(ours: Pipeline, count: int = len(PROMPTS)) -> Tensor:
    return Streams(SEED, count).draw(ours.shape)


def agree(ours: Tensor, theirs: Any, scale: float = 1.0) -> None:
    """To 1e-4 of the size of the numbers, which is more than that of a picture."""
    theirs = torch.as_tensor(theirs)
    size = max(scale, float(theirs.abs().max()))
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) < 1e-4 * size, float((ours - theirs).abs().max()) / size
    assert float(ours.std()) > 1e-3  # of something


def same_pictures(ours: Pipeline, latents: Tensor, theirs: np.ndarray) -> None:
    """Theirs are [B, H, W, C] in [0, 1], clipped."""
    made = ours.spec.to_data(ours.decode(latents))
    assert np.abs(made / 255 - theirs).max() < 0.5 / 255 + 1e-3


def replay(monkeypatch: pytest.MonkeyPatch, module: str, streams: Streams) -> None:
    """Let a module of theirs draw our noise."""
    monkeypatch.setattr(f"{module}.randn_tensor", lambda shape, **options: streams.draw(tuple(shape)[1:]))


# --- Pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
def test_ddpm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: bool, kind: str) -> None:
    theirs = tiny.ddpm(clip_sample=clip, variance_type=kind)
    ours = both(theirs, tmp_path)
    assert ours.sampling.steps == 1000
    streams = Streams(SEED, 2)
    replay(monkeypatch, "diffusers.pipelines.ddpm.pipeline_ddpm", streams)
    replay(monkeypatch, "diffusers.schedulers.scheduling_ddpm", streams)
    pictures = theirs(batch_size=2, num_inference_steps=4, output_type="np").images
    made = walked(ours, sampling=ours.settings(steps=4))
    agree((made / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), pictures)
    same_pictures(ours, made, pictures)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_trap_S18_ddim_with_clipping_derives_eps_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eta: float
) -> None:
    from undiffuse import DDIM

    theirs = tiny.ddim()
    ours = both(theirs, tmp_path)
    streams = Streams(SEED, 2)
    replay(monkeypatch, "diffusers.pipelines.ddim.pipeline_ddim", streams)
    replay(monkeypatch, "diffusers.schedulers.scheduling_ddim", streams)
    asked = {"batch_size": 2, "num_inference_steps": 4, "output_type": "np", "eta": eta}
    pictures = theirs(use_clipped_model_output=True, **asked).images
    made = walked(ours, sampling=ours.settings(steps=4, solver=DDIM(eta)))
    agree((made / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), pictures)


def test_classes_of_a_pixel_model(tmp_path: Path) -> None:
    theirs = tiny.ddim()
    theirs.unet = tiny.pixels(num_class_embeds=3)
    ours = both(theirs, tmp_path)
    assert ours.spec.classes == ("0", "1", "2")
    x, label = noise(ours, 3), torch.full((3,), 500.0)
    wanted = theirs.unet(x, label, class_labels=torch.arange(3)).sample
    said = ours.denoiser.output(x, ours.config.schedule(0.501), classes=torch.arange(3))[0]
    agree(said, wanted)
    assert ours.sample(3, steps=2).shape == (3, 8, 8, 3)
    with pytest.raises(ValueError, match="no null class"):
        ours.sample(1, steps=2, classes=[1], guidance_scale=2.0)


# --- Stable Diffusion -------------------------------------------------------------------------------------------------

DPM = "DPMSolverMultistepScheduler"
SCHEDULERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "ddim": ("DDIMScheduler", {}, 4),
    "ddim_trailing": ("DDIMScheduler", {"timestep_spacing": "trailing"}, 4),
    "ddim_v": ("DDIMScheduler", {"prediction_type": "v_prediction"}, 4),
    "ddim_x0": ("DDIMScheduler", {"prediction_type": "sample"}, 4),
    "ddim_zero_snr": (
        "DDIMScheduler",
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        4,
    ),
    "ddim_linear": ("DDIMScheduler", {"beta_schedule": "linear"}, 4),
    "ddim_cosine": ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2"}, 4),
    "ddim_table": ("DDIMScheduler", {"trained_betas": list(np.linspace(0.001, 0.01, 1000))}, 4),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}, 5),
    "euler": ("EulerDiscreteScheduler", {}, 4),
    "euler_linspace": ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}, 4),
    "euler_trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, 4),
    "euler_karras": ("EulerDiscreteScheduler", {"timestep_spacing": "linspace", "use_karras_sigmas": True}, 4),
    "euler_exponential": (
        "EulerDiscreteScheduler",
        {"timestep_spacing": "linspace", "use_exponential_sigmas": True},
        4,
    ),
    "euler_v": ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}, 4),
    "lms": ("LMSDiscreteScheduler", {}, 4),
    "kdpm2": ("KDPM2DiscreteScheduler", {}, 3),
    "deis": ("DEISMultistepScheduler", {}, 5),
    "dpm_2m": (DPM, {"timestep_spacing": "linspace"}, 4),
    "dpm_2m_leading": (DPM, {}, 4),
    "dpm_2m_trailing": (DPM, {"timestep_spacing": "trailing"}, 4),
    "dpm_2m_heun": (DPM, {"solver_type": "heun"}, 4),
    "dpm_1": (DPM, {"solver_order": 1}, 3),
    "unipc": ("UniPCMultistepScheduler", {}, 4),
    "unipc_bh1": ("UniPCMultistepScheduler", {"solver_type": "bh1", "timestep_spacing": "linspace"}, 4),
}
EARLIER = ("plms", "deis", "unipc_bh1")
"""Compared one step before the end: the last step to clean data is Euler's here, whatever the solver; there PLMS still
extrapolates, DEIS stops short of it, and bh1 is NaN (docs/solvers.md)."""


@pytest.fixture(scope="module")
def plain() -> Any:
    return tiny.sd()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_stable_diffusion_with_each_scheduler(tmp_path: Path, plain: Any, name: str) -> None:
    kind, options, steps = SCHEDULERS[name]
    scaled = kind in ("EulerDiscreteScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler")
    plain.scheduler = tiny.latent_scheduler(kind, **options)
    ours = both(plain, tmp_path)
    x = noise(ours)
    settings = ours.settings(steps=steps, guidance_scale=3.0)
    first = settings.grid.levels(ours.config.schedule, steps)[0]
    if scaled:
        # They start from sigma times the noise; the data's own share of the variance is missing at linspace, trailing.
        plain.scheduler.set_timesteps(steps)
        ratio = float(first.sigma / first.alpha)
        x = x * float((1 + ratio**2) ** 0.5) / float(plain.scheduler.init_noise_sigma)
    seen: list[Tensor] = []

    def look(pipe: Any, step: int, t: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(given["latents"])
        return given

    asked = {"prompt": PROMPTS, "num_inference_steps": steps, "guidance_scale": 3.0}
    last = plain(latents=x, output_type="latent", callback_on_step_end=look, **asked).images
    frames = list(ours.frames(2, seed=SEED, prompts=PROMPTS, sampling=settings))
    if name not in EARLIER:
        return agree(frames[-1].x, last)
    return agree(frames[-2].x, seen[-2])


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("negative", [None, "a house"])
def test_stable_diffusion_pictures(tmp_path: Path, plain: Any, scale: float, negative: str | None) -> None:
    if negative and scale == 1:
        pytest.skip("a negative prompt acts through guidance")
    plain.scheduler = tiny.latent_scheduler()
    ours = both(plain, tmp_path)
    assert ours.spec.shape == (3, 32, 32)
    assert ours.shape == (4, 8, 8)
    asked = {"prompt": PROMPTS, "num_inference_steps": 3, "guidance_scale": scale}
    pictures = plain(latents=noise(ours), negative_prompt=negative and [negative] * 2, output_type="np", **asked).images
    settings = ours.settings(steps=3, guidance_scale=scale)
    same_pictures(ours, walked(ours, prompts=PROMPTS, negative_prompt=negative, sampling=settings), pictures)
    made = ours.sample(2, seed=SEED, prompts=PROMPTS, negative_prompt=negative, steps=3, guidance_scale=scale)
    assert np.abs(made / 255 - pictures).max() < 0.5 / 255 + 1e-3


STOCHASTIC = {
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}, "scheduling_euler_ancestral_discrete"),
    "dpm_2m_sde": (DPM, {"algorithm_type": "sde-dpmsolver++"}, "scheduling_dpmsolver_multistep"),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}, "scheduling_ddpm"),
    "lcm": ("LCMScheduler", {}, "scheduling_lcm"),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stable_diffusion_with_noise_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: Any, name: str
) -> None:
    kind, options, module = STOCHASTIC[name]
    plain.scheduler = tiny.latent_scheduler(kind, **options)
    ours = both(plain, tmp_path)
    streams = Streams(SEED, 2)
    x = streams.draw(ours.shape)
    replay(monkeypatch, f"diffusers.schedulers.{module}", streams)
    asked = {"prompt": PROMPTS, "num_inference_steps": 4, "guidance_scale": 3.0}
    latents = plain(latents=x, output_type="latent", **asked).images
    agree(walked(ours, prompts=PROMPTS, sampling=ours.settings(steps=4, guidance_scale=3.0)), latents)
