"""What a scheduler's file means: the levels that diffusers' own class visits, computed from the same file."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from undiffuse import SOLVERS, UndiffuseError, UndiffuseWarning
from undiffuse.denoiser import TimeLabel
from undiffuse.grids import Beta, Distilled, Karras, Leading, Linspace, LogSNR, ShiftedGrid, Trailing, Uniform
from undiffuse.interop.diffusers.schedulers import DEFAULTS, Meaning, Shift, read_scheduler
from undiffuse.levels import Level
from undiffuse.predictions import V
from undiffuse.solvers import DDIM, PLMS, PNDM, Consistency, DDPMLarge, DDPMLearned, DPMpp2M, DPMpp2S, DPMpp3M, Euler

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle here")

STEPS = (1, 2, 3, 7, 10, 13, 50, 81)


@pytest.fixture(autouse=True)
def _quiet(request: pytest.FixtureRequest) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def theirs(name: str, **options: Any) -> Any:
    return getattr(diffusers, name)(**options)


def ours(name: str, **options: Any) -> Meaning:
    return read_scheduler({"_class_name": name, **options})


def levels(meaning: Meaning, steps: int) -> list[Level]:
    return meaning.grid.levels(meaning.schedule, steps)[:-1]


def test_our_table_of_options_is_theirs() -> None:
    for name, own in DEFAULTS.items():
        if name == "DPMSolverSDEScheduler":
            continue  # needs torchsde to be imported
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
        stated = {key: each.default for key, each in parameters.items() if key != "self"}
        stated = {key: None if value == -float("inf") else value for key, value in stated.items()}
        assert own == stated, name


SIGMAS = [
    "EulerDiscreteScheduler",
    "LMSDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
]
TIMES = ["DDPMScheduler", "DDIMScheduler", *SIGMAS, "EulerAncestralDiscreteScheduler"]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", TIMES)
def test_trap_S1_S2_S20_S22_the_times_of_each_class(name: str, spacing: str) -> None:
    options = {"timestep_spacing": spacing, "steps_offset": 1}
    them, us = theirs(name, **options), ours(name, **options)
    for steps in STEPS:
        them.set_timesteps(steps)
        if steps == 1 and them.timesteps.tolist() == [0]:
            # np.linspace(0, T - 1, 1): one step from pure noise, of which the network is told that it is clean.
            assert float(us.label(levels(us, 1)[0])) == 999
            continue
        labels = [float(us.label(level)) for level in levels(us, steps)]
        expected = them.timesteps.tolist()
        assert len(labels) == len(expected) == steps
        assert np.abs(np.array(labels) - expected).max() < 2e-4, steps
        if name in SIGMAS:
            ratios = [float(level.sigma / level.alpha) for level in levels(us, steps)]
            assert np.allclose(ratios, them.sigmas[:-1].tolist(), rtol=2e-4)


def test_S22_as_many_steps_as_the_table_has() -> None:
    us = ours("DDIMScheduler", steps_offset=0)
    them = theirs("DDIMScheduler")
    them.set_timesteps(1000)
    assert [round(float(us.label(level))) for level in levels(us, 1000)] == them.timesteps.tolist()


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("total", [1000, 100])
@pytest.mark.parametrize("zero", [False, True])
def test_trap_S8_the_table_of_betas(kind: str, total: int, zero: bool) -> None:
    options = {"beta_schedule": kind, "num_train_timesteps": total, "prediction_type": "v_prediction"}
    options |= {"rescale_betas_zero_snr": zero, "timestep_spacing": "trailing"}
    them, us = theirs("DDIMScheduler", **options), ours("DDIMScheduler", **options)
    level = us.schedule(torch.arange(1, total + 1, dtype=torch.float64) / total)
    assert torch.allclose(level.alpha**2, them.alphas_cumprod.double(), rtol=1e-3, atol=2e-6)
    assert (us.schedule.terminal_snr == 0) == zero


def test_the_sigmoid_table_and_a_table_of_its_own() -> None:
    them, us = theirs("DDPMScheduler", beta_schedule="sigmoid"), ours("DDPMScheduler", beta_schedule="sigmoid")
    level = us.schedule(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    assert torch.allclose(level.alpha**2, them.alphas_cumprod.double(), rtol=1e-3, atol=2e-6)
    with pytest.raises(UndiffuseError, match="trained_betas must be 1000 numbers"):
        ours("DDPMScheduler", trained_betas=[0.1, 0.2])


@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_exponential_sigmas"])
def test_trap_S15_levels_between_whole_steps_keep_their_time(option: str) -> None:
    options = {option: True, "timestep_spacing": "linspace"}
    them, us = theirs("EulerDiscreteScheduler", **options), ours("EulerDiscreteScheduler", **options)
    them.set_timesteps(8)
    here = levels(us, 8)
    assert np.allclose([float(level.sigma / level.alpha) for level in here], them.sigmas[:-1], rtol=1e-4)
    assert np.allclose([float(us.label(level)) for level in here], them.timesteps, atol=0.05)
    rounded = theirs("DPMSolverMultistepScheduler", use_karras_sigmas=True)
    rounded.set_timesteps(8)
    assert rounded.timesteps.dtype == torch.int64  # theirs are rounded there: the network is told another level
    labels = [float(us.label(level)) for level in here]
    assert any(abs(label - round(label)) > 0.1 for label in labels)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_trap_S9_S10_a_flow_is_shifted_once(shift: float) -> None:
    them, us = (
        theirs("FlowMatchEulerDiscreteScheduler", shift=shift),
        ours("FlowMatchEulerDiscreteScheduler", shift=shift),
    )
    for _ in range(2):
        here = levels(us, 5)
    them.set_timesteps(sigmas=list(np.linspace(1, 1 / 1000, 5)))
    assert np.allclose([float(level.sigma) for level in here], them.sigmas[:-1], atol=1e-6)
    assert np.allclose([float(us.label(level)) for level in here], them.timesteps, atol=1e-3)
    if shift != 1:
        them.set_timesteps(5)  # by itself it shifts the lower end twice
        assert float(them.sigmas[-2]) > 2 * float(here[-1].sigma)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shifting_moves_with_the_size(kind: str) -> None:
    options = {"use_dynamic_shifting": True, "time_shift_type": kind}
    them, us = theirs("FlowMatchEulerDiscreteScheduler", **options), ours("FlowMatchEulerDiscreteScheduler", **options)
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    for tokens in (256, 1024, 4096):
        them.set_timesteps(sigmas=list(np.linspace(1, 1 / 4, 4)), mu=calculate_shift(tokens))
        assert us.shift is not None
        grid = ShiftedGrid(Uniform(), us.shift(tokens))
        assert np.allclose(grid.times(us.schedule, 4)[:-1], them.sigmas[:-1], atol=1e-6)


def test_edm() -> None:
    for kind in ("karras", "exponential"):
        them, us = theirs("EDMEulerScheduler", sigma_schedule=kind), ours("EDMEulerScheduler", sigma_schedule=kind)
        them.set_timesteps(6)
        here = levels(us, 6)
        assert np.allclose([float(level.sigma) for level in here], them.sigmas[:-1], rtol=1e-4)
        assert np.allclose([float(us.label(level)) for level in here], them.timesteps, atol=1e-4)
        sigma = here[2].sigma
        x, y = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)).unbind()
        x0 = them.precondition_outputs(x.float(), y.float(), sigma.float())
        assert torch.allclose(us.prediction.estimate(x, y, here[2]).x0, x0, atol=1e-5)
        assert torch.allclose(x * float(us.input_scale(here[2])), them.precondition_inputs(x, sigma.float()), atol=1e-6)


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_distilled_models_are_asked_where_they_were_taught(name: str) -> None:
    them, us = theirs(name), ours(name)
    for steps in (1, 2, 3, 4, 7, 8, 50):
        them.set_timesteps(steps)
        assert [round(float(us.label(level))) for level in levels(us, steps)] == them.timesteps.tolist()
    with pytest.raises(UndiffuseError, match="distilled at 50 levels"):
        levels(us, 51)


SOLVED: dict[str, tuple[str, dict[str, Any], Any]] = {
    "ddpm": ("DDPMScheduler", {}, DDIM(1.0)),
    "ddpm_large": ("DDPMScheduler", {"variance_type": "fixed_large"}, DDPMLarge()),
    "ddpm_learned": ("DDPMScheduler", {"variance_type": "learned_range"}, DDPMLearned()),
    "ddim": ("DDIMScheduler", {}, DDIM(0.0)),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}, PLMS()),
    "pndm": ("PNDMScheduler", {}, PNDM()),
    "dpm": ("DPMSolverMultistepScheduler", {}, DPMpp2M()),
    "dpm_heun": ("DPMSolverMultistepScheduler", {"solver_type": "heun"}, DPMpp2M(heun=True)),
    "dpm_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, DPMpp2M(eta=1.0)),
    "dpm_3": ("DPMSolverMultistepScheduler", {"solver_order": 3}, DPMpp3M(classic=True)),
    "dpm_single": ("DPMSolverSinglestepScheduler", {}, DPMpp2S()),
    "ancestral": ("EulerAncestralDiscreteScheduler", {}, DDIM(1.0)),
    "kdpm2": ("KDPM2DiscreteScheduler", {}, SOLVERS["kdpm2"]),
    "lcm": ("LCMScheduler", {}, Consistency()),
    "tcd": ("TCDScheduler", {}, Consistency(0.3)),
    "stochastic_flow": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, Consistency()),
    "flow": ("FlowMatchEulerDiscreteScheduler", {}, Euler()),
}


@pytest.mark.parametrize("name", SOLVED)
def test_the_solver_of_each_class(name: str) -> None:
    kind, options, solver = SOLVED[name]
    assert ours(kind, **options).solver == solver


@pytest.mark.parametrize("name", ["KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"])
def test_a_method_that_is_not_here_is_said(name: str) -> None:
    with pytest.warns(UndiffuseWarning, match="sampled with dpmpp_2m_sde unless you say otherwise"):
        ours(name)


def test_trap_S5_pure_noise_is_shown_to_the_model() -> None:
    with pytest.warns(UndiffuseWarning, match="trap S5"):
        us = ours("DDIMScheduler", rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert us.grid == Trailing(1000)
    assert isinstance(us.prediction, V)
    assert float(levels(us, 7)[0].alpha) == 0


def test_trap_S6_zero_terminal_snr_with_eps_is_refused_when_it_is_put_together() -> None:
    us = ours("DDIMScheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(UndiffuseError, match="zero terminal SNR"):
        us.prediction.check(us.schedule)


def test_trap_S12_S14_every_trajectory_ends_at_clean_data() -> None:
    for options in ({"set_alpha_to_one": False}, {"final_sigmas_type": "sigma_min"}):
        for name in ("DDIMScheduler", "EulerDiscreteScheduler"):
            us = ours(name, **options)  # an option of another class is none of this one
            assert float(us.grid.levels(us.schedule, 3)[-1].sigma) == 0


def test_trap_S14_options_are_not_inherited_between_classes() -> None:
    """An option that another class understands is left alone, one that none understands is refused."""
    us = ours(
        "EulerDiscreteScheduler", clip_sample=True, skip_prk_steps=True, algorithm_type="dpmsolver", solver_order=3
    )
    assert us.threshold == "none"
    assert us.solver == Euler()
    with pytest.raises(UndiffuseError, match=r"unknown option .*'beta_strat': did you mean 'beta_start'"):
        ours("EulerDiscreteScheduler", beta_strat=0.1)


def test_trap_S16_clipping_is_a_threshold() -> None:
    assert ours("DDPMScheduler").threshold == "static"
    assert ours("DDPMScheduler", clip_sample=False).threshold == "none"
    assert ours("DDPMScheduler", thresholding=True).threshold == "dynamic"
    assert ours("DDPMScheduler", clip_sample_range=1).threshold == "static"  # JSON's 1 is 1.0
    with pytest.raises(UndiffuseError, match="clip_sample_range = True"):
        ours("DDPMScheduler", clip_sample_range=True)
    with pytest.raises(UndiffuseError, match=r"clip_sample_range = 2.0 cannot be read here, only 1.0"):
        ours("DDPMScheduler", clip_sample_range=2.0)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "class": ("DDIMSchedule", {}, "did you mean 'DDIMScheduler'"),
    "betas": ("DDIMScheduler", {"beta_schedule": "cubic"}, "beta_schedule = 'cubic'"),
    "prediction": ("DDIMScheduler", {"prediction_type": "flow_prediction"}, "prediction_type = 'flow_prediction'"),
    "spacing": ("DDIMScheduler", {"timestep_spacing": "leadng"}, "timestep_spacing = 'leadng'"),
    "offset": ("DDIMScheduler", {"steps_offset": -1}, "steps_offset must be a whole number"),
    "total": ("DDIMScheduler", {"num_train_timesteps": 10**9}, "num_train_timesteps must be"),
    "flag": ("DDIMScheduler", {"num_train_timesteps": True}, "num_train_timesteps must be"),
    "text": ("DDIMScheduler", {"beta_start": "0.1"}, "beta_start must be a finite number"),
    "order": ("DDIMScheduler", {"beta_start": 0.5, "beta_end": 0.1}, "in order"),
    "variance": ("DDPMScheduler", {"variance_type": "learned"}, "variance_type = 'learned'"),
    "algorithm": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, "algorithm_type = 'dpmsolver'"),
    "flow": ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas = True"),
    "lambda": ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}, "lambda_min_clipped = -5.1"),
    "x0": ("UniPCMultistepScheduler", {"predict_x0": False}, "predict_x0 = False"),
    "corrector": ("UniPCMultistepScheduler", {"disable_corrector": [0]}, "disable_corrector"),
    "continuous": ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "v_prediction only"),
    "inverted": ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas = True"),
    "terminal": ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1}, "shift_terminal = 0.1"),
    "flow_karras": ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas = True"),
    "edm_v": ("EDMEulerScheduler", {"prediction_type": "v_prediction"}, "prediction_type = 'v_prediction'"),
    "unknown": ("DDIMScheduler", {"evil": 1}, "unknown option"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_represented_is_refused_by_name(case: str) -> None:
    name, options, said = REFUSED[case]
    with pytest.raises(UndiffuseError) as error:
        ours(name, **options)
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_grids_of_other_sigmas() -> None:
    base = "EulerDiscreteScheduler"
    assert isinstance(ours(base, use_beta_sigmas=True).grid, Beta)
    assert ours(base, use_karras_sigmas=True, sigma_min=0.1, sigma_max=9.0).grid == Karras(7.0, 0.1, 9.0)
    assert isinstance(ours(base, interpolation_type="log_linear").grid, LogSNR)
    assert isinstance(ours("DPMSolverMultistepScheduler", use_lu_lambdas=True).grid, LogSNR)
    assert ours("DDIMScheduler").grid == Leading(1000, 0)
    assert ours(base).grid == Linspace(1000, whole=False)
    assert ours("LCMScheduler").grid == Distilled(1000, 50)
    us = ours(base, timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True)
    assert float(us.label(us.schedule(1.0))) == pytest.approx(
        0.25 * np.log(float(us.schedule(1.0).sigma / us.schedule(1.0).alpha))
    )
    assert ours(base).label == TimeLabel(1000.0, -1.0)


def test_real_files_are_read() -> None:
    """As they lie in well-known repositories, with the options of other classes that they carry."""
    sd15 = """{"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
        "set_alpha_to_one": false, "skip_prk_steps": true, "steps_offset": 1, "trained_betas": null,
        "clip_sample": false}"""
    sdxl = """{"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": false, "interpolation_type": "linear",
        "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": false,
        "skip_prk_steps": true, "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": null,
        "use_karras_sigmas": false}"""
    turbo = """{"_class_name": "EulerAncestralDiscreteScheduler", "_diffusers_version": "0.23.1", "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": false, "interpolation_type": "linear",
        "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": false,
        "skip_prk_steps": true, "steps_offset": 1, "timestep_spacing": "trailing", "trained_betas": null}"""
    sd3 = """{"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.29.0.dev0",
        "num_train_timesteps": 1000, "shift": 3.0}"""
    flux = """{"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.30.0.dev0",
        "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15,
        "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": true}"""
    grids = [read_scheduler(json.loads(text)).grid for text in (sd15, sdxl, turbo, sd3)]
    assert grids == [Leading(1000, 1), Leading(1000, 1), Trailing(1000), ShiftedGrid(Linspace(1000, whole=False), 3.0)]
    assert read_scheduler(json.loads(flux)).shift == Shift(0.5, 1.15, 256, 4096, True)
