"""For each family of diffusers: the same weights, the same noise and the corresponding scheduler give the same latents
and the same pictures as its own pipeline. The models are tiny, of the real classes, with random weights."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from undiffuse import Level, Pipeline, Streams, UndiffuseError

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


# --- The other families -----------------------------------------------------------------------------------------------

ONCE = list(np.linspace(1, 1 / 1000, 3))
"""Passed to their pipelines of flows, whose own default is shifted at both ends and then once more (trap S9)."""
SIZED = {"height": 32, "width": 32}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sdxl": (tiny.sdxl, SIZED),
    "sdxl_zeros_not_forced": (lambda: with_option(tiny.sdxl(), force_zeros_for_empty_prompt=False), SIZED),
    "sdxl_edm": (lambda: tiny.sdxl(schedule=tiny.scheduler("EDMEulerScheduler")), SIZED),
    "sd3": (tiny.sd3, {**SIZED, "sigmas": ONCE}),
    "sd3_without_t5": (lambda: tiny.sd3(reads_t5=False), {**SIZED, "sigmas": ONCE}),
    "pixart_alpha": (tiny.pixart, {"use_resolution_binning": False}),
    "pixart_told_its_size": (
        lambda: tiny.pixart(
            sample_size=128, use_additional_conditions=True, attention_head_dim=12, cross_attention_dim=24
        ),
        {"use_resolution_binning": False, **SIZED},
    ),
    "pixart_sigma": (lambda: tiny.pixart("PixArtSigmaPipeline"), {"use_resolution_binning": False}),
}


def with_option(theirs: Any, **options: Any) -> Any:
    theirs.register_to_config(**options)
    return theirs


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_texts_to_latents(tmp_path: Path, name: str, scale: float) -> None:
    make, more = FAMILIES[name]
    theirs = make()
    ours = small(both(theirs, tmp_path))
    asked = {"prompt": PROMPTS, "num_inference_steps": 3, "guidance_scale": scale, "latents": noise(ours), **more}
    settings = ours.settings(steps=3, guidance_scale=scale)
    latents = walked(ours, prompts=PROMPTS, sampling=settings)
    agree(latents, theirs(output_type="latent", **asked).images)
    if scale != 1 and name in ("sdxl", "sd3", "pixart_alpha"):
        same_pictures(ours, latents, theirs(output_type="np", **asked).images)


def test_negative_prompts_of_two_encoders(tmp_path: Path) -> None:
    theirs = tiny.sdxl()
    ours = both(theirs, tmp_path)
    asked = {"prompt": PROMPTS, "num_inference_steps": 2, "guidance_scale": 3.0, "latents": noise(ours), **SIZED}
    latents = theirs(negative_prompt=["a house"] * 2, output_type="latent", **asked).images
    settings = ours.settings(steps=2, guidance_scale=3.0)
    agree(walked(ours, prompts=PROMPTS, negative_prompt="a house", sampling=settings), latents)


def test_sizes_are_told(tmp_path: Path) -> None:
    """SDXL's micro-conditions: those of the picture's size, or others, on both sides of guidance."""
    theirs = tiny.sdxl()
    ours = both(theirs, tmp_path).resized(48, 32)
    size = {"original_size": (64, 40), "crops_coords_top_left": (3, 7), "target_size": (48, 32)}
    asked = {"prompt": PROMPTS, "num_inference_steps": 2, "guidance_scale": 3.0, "height": 48, "width": 32}
    settings = ours.settings(steps=2, guidance_scale=3.0)
    latents = theirs(latents=noise(ours), output_type="latent", **asked).images
    agree(walked(ours, prompts=PROMPTS, sampling=settings), latents)
    latents = theirs(latents=noise(ours), output_type="latent", **asked, **size).images
    told = {"micro": [[64, 40, 3, 7, 48, 32]]}
    agree(walked(ours, prompts=PROMPTS, sampling=settings, cond=told), latents)
    with pytest.raises(ValueError, match="multiples of 4"):
        ours.resized(30, 32)


def test_sdxl_refiner_refines(tmp_path: Path) -> None:
    theirs = tiny.sdxl("StableDiffusionXLImg2ImgPipeline", refiner=True)
    ours = both(theirs, tmp_path)
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    known = ours.encode(picture)
    levels = ours.sampling.grid.levels(ours.config.schedule, 4)
    streams = Streams(SEED, 2)
    drawn = streams.draw(ours.shape)
    with pytest.MonkeyPatch.context() as patch:
        module = "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img"
        patch.setattr(f"{module}.randn_tensor", lambda *shape, **options: drawn)
        latents = theirs(
            prompt=PROMPTS,
            image=known.expand(2, -1, -1, -1),
            strength=0.5,
            num_inference_steps=4,
            guidance_scale=3.0,
            output_type="latent",
        ).images
    settings = ours.settings(steps=4, guidance_scale=3.0)
    made = walked(ours, prompts=PROMPTS, sampling=settings, image=picture, strength=float(levels[2].t))
    agree(made, latents)


def packed(x: Tensor) -> Tensor:
    from diffusers import FluxPipeline

    return FluxPipeline._pack_latents(x, *x.shape)  # type: ignore[misc]


@pytest.mark.parametrize("kind", ["dev", "dev_guided", "schnell"])
def test_flux(tmp_path: Path, kind: str) -> None:
    theirs = tiny.flux(guidance=kind != "schnell")
    ours = both(theirs, tmp_path).resized(32, 48)
    asked = {"prompt": PROMPTS, "num_inference_steps": 3, "height": 32, "width": 48, "latents": packed(noise(ours))}
    cond, scale = None, 1.0
    if kind == "dev_guided":
        scale, cond = 2.0, {"guidance": [[5.0]]}
        asked |= {"guidance_scale": 5.0, "true_cfg_scale": 2.0, "negative_prompt": ["a house"] * 2}
    settings = ours.settings(steps=3, guidance_scale=scale)
    latents = walked(
        ours, prompts=PROMPTS, cond=cond, negative_prompt="a house" if scale != 1 else None, sampling=settings
    )
    agree(packed(latents), theirs(output_type="latent", **asked).images)
    same_pictures(ours, latents, theirs(output_type="np", **asked).images)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_trap_G2_dit_is_guided_on_every_channel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    theirs = tiny.dit()
    both(theirs, tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["id2label"] = {str(i): "crane, a bird" if i in (4, 5) else f"class {i}, a class" for i in range(1000)}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    ours = Pipeline.load(tmp_path)
    assert ours.spec.classes[3:6] == ("class 3", "crane 4", "crane 5")
    x = noise(ours)
    monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda **options: x)
    pictures = theirs(class_labels=[3, 7], num_inference_steps=3, guidance_scale=scale, output_type="np").images
    settings = ours.settings(steps=3, guidance_scale=scale)
    latents = walked(ours, classes=[3, 7], sampling=settings)
    same_pictures(ours, latents, pictures)


def test_trap_G4_the_null_class_of_dit_is_derived(tmp_path: Path) -> None:
    ours = both(tiny.dit(classes=5), tmp_path)
    assert ours.denoiser.null(1)["classes"].tolist() == [5]
    assert np.isfinite(ours.sample(2, steps=2)).all()


def test_latent_consistency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tiny.lcm()
    ours = both(theirs, tmp_path)
    assert ours.sampling.steps == 4
    assert ours.sampling.guidance_scale == 1
    streams = Streams(SEED, 2)
    x = streams.draw(ours.shape)
    replay(monkeypatch, "diffusers.schedulers.scheduling_lcm", streams)
    latents = theirs(prompt=PROMPTS, latents=x, num_inference_steps=4, guidance_scale=6.0, output_type="latent").images
    agree(walked(ours, prompts=PROMPTS, cond={"guidance": [[6.0]]}), latents)


def test_latent_diffusion_with_a_vector_quantised_codec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tiny.ldm()
    ours = both(theirs, tmp_path)
    module = type(theirs).__module__
    x = noise(ours)
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *shape, **options: x)
    pictures = theirs(batch_size=2, num_inference_steps=3, output_type="np").images
    same_pictures(ours, walked(ours, sampling=ours.settings(steps=3)), pictures)


# --- From a picture ---------------------------------------------------------------------------------------------------

PICTURE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", DPM, "EulerDiscreteScheduler"])
def test_trap_S23_image_to_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str) -> None:
    theirs = tiny.sd("StableDiffusionImg2ImgPipeline", tiny.latent_scheduler(scheduler))
    ours = both(theirs, tmp_path)
    x = noise(ours)
    module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img"
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *shape, **options: x)
    asked = {"prompt": PROMPTS, "num_inference_steps": 4, "guidance_scale": 3.0, "strength": 0.5}
    latents = theirs(image=ours.encode(PICTURE).expand(2, -1, -1, -1), output_type="latent", **asked).images
    settings = ours.settings(steps=4, guidance_scale=3.0)
    start = float(settings.grid.levels(ours.config.schedule, 4)[2].t)  # their strength counts steps
    agree(walked(ours, prompts=PROMPTS, sampling=settings, image=PICTURE, strength=start), latents)


def hole() -> Tensor:
    """What is kept: all but a square that covers whole latents."""
    keep = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    keep[..., 8:20, 4:24] = False
    return keep


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_inpainting_with_a_network_made_for_it(tmp_path: Path, scale: float) -> None:
    theirs = tiny.sd("StableDiffusionInpaintPipeline", in_channels=9)
    ours = both(theirs, tmp_path)
    keep = hole()
    encoded = ours.encode(torch.where(keep, PICTURE, 0.0))
    with pytest.MonkeyPatch.context() as patch:  # theirs draws from the posterior, ours takes its mean
        patch.setattr(
            type(theirs), "_encode_vae_image", lambda self, image, generator: encoded.expand(len(image), -1, -1, -1)
        )
        latents = theirs(
            prompt=PROMPTS,
            image=PICTURE / 2 + 0.5,
            mask_image=(~keep).float(),
            latents=noise(ours),
            height=32,
            width=32,
            num_inference_steps=3,
            guidance_scale=scale,
            output_type="latent",
        ).images
    settings = ours.settings(steps=3, guidance_scale=scale)
    agree(walked(ours, prompts=PROMPTS, sampling=settings, image=PICTURE, keep=keep), latents)
    # Nothing is known where nobody says so: the whole picture is the hole.
    whole = walked(ours, prompts=PROMPTS, sampling=settings, image=PICTURE, keep=torch.zeros_like(keep))
    assert torch.equal(walked(ours, prompts=PROMPTS, sampling=settings), whole)


@pytest.mark.parametrize("channels", [4, 9])
def test_trap_X10_what_is_kept_is_kept_to_the_bit(tmp_path: Path, channels: int) -> None:
    ours = both(tiny.sd("StableDiffusionInpaintPipeline", in_channels=channels), tmp_path)
    picture, keep = ours.spec.to_data(PICTURE), hole()[:, 0].numpy()
    made = ours.sample(3, prompts=PROMPTS, image=picture, keep=keep, steps=3, guidance_scale=3.0)
    assert (made == picture)[:, keep[0]].all()
    assert (made != picture)[:, ~keep[0]].mean() > 0.5
    again = ours.sample(3, prompts=PROMPTS, image=picture, keep=keep, steps=3, guidance_scale=3.0, batch_size=2)
    assert np.abs(made.astype(int) - again).max() <= 1


def test_inpainting_by_replacement(tmp_path: Path) -> None:
    """Of a network of four channels, theirs puts the known part back after each step with the first noise, as RePaint
    without repeats does."""
    from undiffuse import RePaint
    from undiffuse.sampling import trajectory

    theirs = tiny.sd("StableDiffusionInpaintPipeline")
    ours = both(theirs, tmp_path)
    keep, x = hole(), noise(ours)
    known = ours.encode(PICTURE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(theirs), "_encode_vae_image", lambda self, image, generator: known.expand(len(image), -1, -1, -1)
        )
        latents = theirs(
            prompt=PROMPTS,
            image=PICTURE / 2 + 0.5,
            mask_image=(~keep).float(),
            latents=x,
            height=32,
            width=32,
            num_inference_steps=3,
            guidance_scale=3.0,
            output_type="latent",
        ).images
    begun = ours.begin(2, seed=SEED, prompts=PROMPTS, sampling=ours.settings(steps=3, guidance_scale=3.0))

    first = x

    def same(x: Tensor, here: Level, there: Level) -> Tensor:
        return first.to(x)

    solver = RePaint(begun.sampling.solver, known.expand(2, -1, -1, -1), ours.kept(keep), same, repeats=1)
    denoise = ours.denoise(begun.cond, begun.sampling, None, begun.against)
    *_, last = trajectory(denoise, begun.x, begun.levels, solver, begun.noise)
    agree(last.x, latents)


# --- Other numbers, other places --------------------------------------------------------------------------------------


def test_trap_P1_time_reaches_the_network_in_float32(tmp_path: Path) -> None:
    """diffusers' Flux rounds t (and the guidance scale) to the network's own type before it is embedded."""
    theirs = tiny.flux()
    theirs.save_pretrained(tmp_path)
    ours = Pipeline.load(tmp_path, dtype=torch.bfloat16).resized(32, 32)
    told: list[Tensor] = []
    waves = ours.denoiser.network.get_submodule("inner.time_text_embed.time_proj")
    waves.register_forward_pre_hook(lambda module, given: told.append(given[0]))
    list(ours.frames(1, prompts=PROMPTS[:1], cond={"guidance": [[3.3]]}, sampling=ours.settings(steps=7)))
    levels = ours.sampling.grid.levels(ours.config.schedule, 7)
    exact = torch.tensor([float(ours.config.label(level)) for level in levels[:-1]])
    assert torch.equal(torch.cat(told[::2]), exact)
    assert torch.equal(torch.cat(told[1::2]), torch.full((7,), 3300.0))
    assert not torch.equal(exact.bfloat16().float(), exact)


def test_trap_P7_a_codec_that_overflows_computes_in_float32(tmp_path: Path) -> None:
    theirs = tiny.sdxl()
    theirs.vae = tiny.vae(force_upcast=True)
    theirs.save_pretrained(tmp_path)
    ours = Pipeline.load(tmp_path, dtype=torch.bfloat16)
    assert ours.codec is not None
    assert {p.dtype for p in ours.codec.parameters()} == {torch.float32}
    assert {p.dtype for p in ours.denoiser.parameters()} == {torch.bfloat16}
    assert ours.sample(1, prompts=PROMPTS, steps=2).shape == (1, 32, 32, 3)


def test_trap_D5_latents_have_the_units_of_their_autoencoder(tmp_path: Path) -> None:
    theirs = tiny.sdxl()
    mean, std = [0.1, -0.2, 0.3, 0.4], [0.5, 2.0, 1.0, 1.5]
    theirs.vae = tiny.vae(latents_mean=mean, latents_std=std, scaling_factor=0.5)
    ours = both(theirs, tmp_path)
    z = noise(ours)
    column = [torch.tensor(each).reshape(1, -1, 1, 1) for each in (mean, std)]
    wanted = theirs.vae.decode(z * column[1] / 0.5 + column[0]).sample
    agree(ours.decode(z), wanted)
    posterior = theirs.vae.encode(PICTURE).latent_dist.mean
    agree(ours.encode(PICTURE), (posterior - column[0]) / column[1] * 0.5)


def test_offload_has_one_part_on_the_device_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from undiffuse.interop.diffusers import load as reading
    from undiffuse.interop.diffusers.networks import Seats

    tiny.sd().save_pretrained(tmp_path)
    plain = Pipeline.load(tmp_path)
    with pytest.raises(ValueError, match="name a device"):
        Pipeline.load(tmp_path, offload=True)
    moved: list[tuple[str, str]] = []

    class Watched(Seats):
        def __call__(self, module: torch.nn.Module) -> Any:
            monkeypatch.setattr(module, "to", lambda place: moved.append((type(module).__name__, str(place))) or module)
            return super().__call__(module)

    monkeypatch.setattr(reading, "Seats", lambda device: Watched(torch.device("cpu")))
    ours = Pipeline.load(tmp_path, "cuda", offload=True)  # no weights are moved: there need be no such device
    assert ours.device.type == "cpu"
    asked: dict[str, Any] = {"prompts": PROMPTS, "steps": 2, "guidance_scale": 2.0}
    assert np.array_equal(ours.sample(2, **asked), plain.sample(2, **asked))
    away = [kind for kind, place in moved]
    assert away == ["CLIPTextModel", "CLIPTextModel", "UNet2DConditionModel", "UNet2DConditionModel", "AutoencoderKL"]


# --- Together ---------------------------------------------------------------------------------------------------------

EVERY = {
    "ddpm": tiny.ddpm,
    "ldm": tiny.ldm,
    "sd": tiny.sd,
    "sdxl": tiny.sdxl,
    "sd3": tiny.sd3,
    "flux": tiny.flux,
    "pixart": tiny.pixart,
    "dit": lambda: tiny.dit(5),
    "lcm": tiny.lcm,
}


def small(pipeline: Pipeline) -> Pipeline:
    return pipeline.resized(32, 32) if pipeline.spec.shape[1] > 32 else pipeline


@pytest.mark.parametrize("name", EVERY)
def test_SV4_many_requests_at_once_are_those_alone(tmp_path: Path, name: str) -> None:
    """Step-level batching of requests of different prompts, steps, solvers and guidance, to the bit."""
    from undiffuse import SOLVERS
    from undiffuse.serving.engine import Engine, Request

    EVERY[name]().save_pretrained(tmp_path)
    ours = small(Pipeline.load(tmp_path))
    prompts = PROMPTS if ours.takes_prompts else None
    guided = 2.0 if ours.denoiser.conditions is not None and ours.denoiser.conditions.asked else 1.0
    engine = Engine({"m": ours}, rows=4, exact=True)
    try:
        requests = [
            Request("m", ours.settings(steps=2, solver="euler", guidance_scale=guided), (0,), 1, prompts=prompts),
            Request("m", ours.settings(steps=3, solver="dpmpp_2m"), (1,), 2, prompts=prompts and prompts[1:]),
            Request("m", ours.settings(steps=2, solver=SOLVERS["ddpm"]), (2,), 3, prompts=prompts),
        ]
        jobs = [engine.submit(request) for request in requests]
        together = [job.future.result(60) for job in jobs]
        alone = [engine.run(request) for request in requests]
    finally:
        engine.close()
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", EVERY)
def test_half_precision_is_that_of_the_weights_alone(tmp_path: Path, name: str) -> None:
    EVERY[name]().save_pretrained(tmp_path)
    whole, half = small(Pipeline.load(tmp_path)), small(Pipeline.load(tmp_path, dtype=torch.bfloat16))
    prompts = PROMPTS if whole.takes_prompts else None
    a, b = (walked(each, prompts=prompts, sampling=each.settings(steps=2)) for each in (whole, half))
    assert b.dtype == torch.float32
    assert 0 < float((a - b).abs().mean()) < 0.1 * float(a.abs().mean())
    assert np.isfinite(half.sample(1, prompts=prompts, steps=2)).all()


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_a_compiled_network_of_theirs_says_the_same(tmp_path: Path, name: str) -> None:
    """Traced by torch's compiler, whatever their code does on the way, and the decoder too."""
    EVERY[name]().save_pretrained(tmp_path)
    ours = small(Pipeline.load(tmp_path))
    fast = ours.compiled("eager")
    asked: dict[str, Any] = {"prompts": PROMPTS[:2], "sampling": ours.settings(steps=3)}
    assert torch.equal(fast.draw(2, **asked), ours.draw(2, **asked))
    assert fast.arithmetic["compiled"]
    resized = fast.resized(16, 16)
    assert resized.fast is not None
    assert ours.resized(16, 16).fast is None
    assert ours.home is not None
    ours.home.device = torch.device("cpu")  # as with offload
    with pytest.raises(UndiffuseError, match="stays where it is: leave out offload"):
        ours.compiled()


def finite(ours: Pipeline, solver: str, steps: int) -> None:
    learned = ours.config.learned_variance
    if solver == "ddpm_learned" and not learned:
        return
    prompts = PROMPTS[:1] if ours.takes_prompts else None
    guided = 2.0 if ours.denoiser.conditions is not None and ours.denoiser.conditions.asked else 1.0
    grid = "uniform"
    made = ours.draw(
        1, prompts=prompts, sampling=ours.settings(steps=steps, solver=solver, grid=grid, guidance_scale=guided)
    )
    assert bool(made.isfinite().all())


@pytest.mark.parametrize("name", EVERY)
def test_solvers_run_on_every_family(tmp_path: Path, name: str) -> None:
    """A fifth of them each; the slow test has them all."""
    from undiffuse import SOLVERS

    EVERY[name]().save_pretrained(tmp_path)
    ours = small(Pipeline.load(tmp_path))
    for solver in list(SOLVERS)[list(EVERY).index(name) % 5 :: 5]:
        finite(ours, solver, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_every_solver_runs_on_every_family(tmp_path: Path, name: str) -> None:
    from undiffuse import SOLVERS

    EVERY[name]().save_pretrained(tmp_path)
    ours = small(Pipeline.load(tmp_path))
    for solver in SOLVERS:
        finite(ours, solver, 3)


def test_threads_share_a_network_without_hearing_each_other(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    tiny.flux().save_pretrained(tmp_path)
    ours = Pipeline.load(tmp_path).resized(32, 32)

    def made(seed: int) -> np.ndarray:
        return ours.sample(1, seed=seed, prompts=[PROMPTS[seed % 2]], steps=2 + seed, cond={"guidance": [[1.0 + seed]]})

    alone = [made(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(made, range(4)))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_long_prompts_are_cut_and_said(tmp_path: Path) -> None:
    theirs = tiny.sd()
    ours = both(theirs, tmp_path)
    words = "a red circle and a green square on the sea of a small house and the big dog"
    with pytest.raises(ValueError, match="the text has 21 tokens, this model reads 14"):
        ours.denoiser.conditions.part("prompt").check_length(words)
    flux = both(tiny.flux(), tmp_path / "flux").denoiser.conditions.part("prompt")
    flux.check_length(words)  # one of its encoders reads it all
    with pytest.raises(ValueError, match="this model reads 511"):
        flux.check_length("a " * 600)
    with pytest.warns(UserWarning, match=r"the text has 21 tokens, text_encoder reads 14: cut was"):
        ours.conditions([0], None, [words])
    latents = theirs(
        prompt=[words], latents=noise(ours, 1), num_inference_steps=2, guidance_scale=3.0, output_type="latent"
    ).images
    settings = ours.settings(steps=2, guidance_scale=3.0)
    *_, last = ours.frames(1, seed=SEED, prompts=[words], sampling=settings)
    agree(last.x, latents)


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "keep_alone": ({"keep": np.ones((1, 32, 32), bool)}, "give image as well"),
    "keep_type": ({"image": np.zeros((1, 32, 32, 3), np.uint8), "keep": np.ones((1, 32, 32))}, "must be boolean"),
    "keep_shape": ({"image": np.zeros((1, 32, 32, 3), np.uint8), "keep": np.ones((1, 8, 8), bool)}, "mask of shape"),
    "image_type": ({"image": np.zeros((1, 32, 32, 3)), "strength": 0.5}, "dtype float64"),
    "image_size": ({"image": np.zeros((1, 16, 16, 3), np.uint8), "strength": 0.5}, "expected"),
    "strength": ({"image": np.zeros((1, 32, 32, 3), np.uint8), "strength": 1.5}, "strength must be"),
    "strength_zero": ({"image": np.zeros((1, 32, 32, 3), np.uint8), "strength": 0.0}, "strength must be"),
    "condition": ({"cond": {"size": [[1, 2]]}}, "unknown condition"),
    "classes": ({"classes": [1]}, "without classes"),
    "threshold": ({"threshold": "static"}, "in latents"),
    "negative": ({"negative_prompt": "a", "guidance_scale": 1.0}, "acts through guidance"),
    "steps": ({"steps": 1001}, "1001 steps"),
    "solver": ({"solver": "ddpm_learned"}, "learned variance"),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_requests_are_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, plain: Any, case: str) -> None:
    folder = tmp_path_factory.mktemp("odd")
    plain.scheduler = tiny.latent_scheduler()
    ours = both(plain, folder)
    odd, said = ODD[case]
    asked: dict[str, Any] = {"prompts": PROMPTS, "steps": 2, **odd}
    with pytest.raises(ValueError, match=said) as error:
        ours.sample(1, **asked)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("size", [(30, 32), (0, 32), (32,), (32.0, 32), (1 << 20, 32), ("32", "32")])
def test_odd_sizes_are_refused(tmp_path: Path, plain: Any, size: Any) -> None:
    plain.scheduler = tiny.latent_scheduler()
    ours = both(plain, tmp_path)
    with pytest.raises(ValueError, match=r"pictures? "):
        ours.resized(*size)
