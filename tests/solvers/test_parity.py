"""Every deterministic solver that diffusers has too follows the same float64 trajectory on the same grid.

diffusers is given our levels in place of its own tables; both ask the same exact denoiser. The last step, to sigma = 0,
is left out where docs/solvers.md lists it as an intended difference. Parity proves that the names mean the same, not
that either is right: the order tests do that.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from laws import PLANE, at_ratios, no_noise, normal, run, worst
from undiffuse.grids import Leading
from undiffuse.levels import Level
from undiffuse.schedules import EDM, VP, LinearBetas
from undiffuse.solvers import (
    DEIS,
    IPNDM,
    LMS,
    PLMS,
    PNDM,
    DPMpp2M,
    DPMpp2S,
    DPMpp3M,
    DPMSolver2,
    Euler,
    ExponentialAdams,
    Heun,
    Solver,
    UniPC,
)

pytest.importorskip("diffusers", reason="diffusers is the oracle here")

RATIOS = torch.tensor([20.0, 11.0, 6.5, 3.0, 1.9, 1.1, 0.7, 0.31, 0.15, 0.06], dtype=torch.float64)
EVEN = torch.logspace(1, -1, 11, dtype=torch.float64)


class Float64Torch:
    """torch, in which float32 is float64: some schedulers round the sample to float32 on the way."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def scheduler(monkeypatch: pytest.MonkeyPatch, module: str, name: str, ratios: Tensor, **config: object):
    """A scheduler that walks ``ratios`` and then 0."""
    source = importlib.import_module(f"diffusers.schedulers.scheduling_{module}")
    monkeypatch.setattr(source, "torch", Float64Torch())
    made = getattr(source, name)(**config)
    made.set_timesteps(len(ratios))
    made.sigmas = torch.cat([ratios, torch.zeros(1, dtype=torch.float64)])
    made.timesteps = torch.arange(len(ratios), 0, -1, dtype=torch.float64) * 10
    return made


def walk(made, levels: list[Level], x: Tensor, answer: Callable[[Tensor, Level], Tensor]) -> Tensor:
    """Up to the last of ``levels``."""
    for t, here in zip(made.timesteps, levels[:-1], strict=False):
        x = made.step(answer(x, here), t, x, return_dict=False)[0]
    return x


def eps(x: Tensor, level: Level) -> Tensor:
    return PLANE(x, level).eps


def x0(x: Tensor, level: Level) -> Tensor:
    return PLANE(x, level).x0


DPM = "dpmsolver_multistep", "DPMSolverMultistepScheduler"
DATA = {"prediction_type": "sample", "lower_order_final": False}
CASES: dict[str, tuple[Solver, tuple[str, str], dict[str, object], Callable[[Tensor, Level], Tensor]]] = {
    "dpmpp_1": (Euler(), DPM, {**DATA, "solver_order": 1}, x0),
    "dpmpp_2m": (DPMpp2M(), DPM, {**DATA, "solver_order": 2}, x0),
    "dpmpp_2m_heun": (DPMpp2M(heun=True), DPM, {**DATA, "solver_order": 2, "solver_type": "heun"}, x0),
    "dpmpp_3m_classic": (DPMpp3M(classic=True), DPM, {**DATA, "solver_order": 3, "solver_type": "heun"}, x0),
}
for p in (1, 2, 3, 4):
    for bh in ("bh1", "bh2"):
        CASES[f"unipc_{p}_{bh}"] = (
            UniPC(p, bh1=bh == "bh1"),
            ("unipc_multistep", "UniPCMultistepScheduler"),
            {**DATA, "solver_order": p, "solver_type": bh},
            x0,
        )
for order in (1, 2, 3):
    CASES[f"deis_{order}"] = (
        DEIS(order),
        ("deis_multistep", "DEISMultistepScheduler"),
        {"solver_order": order, "lower_order_final": False},
        eps,
    )


@pytest.mark.parametrize("name", CASES)
def test_variance_preserving_schedulers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    solver, (module, theirs), config, answer = CASES[name]
    levels, x = at_ratios(VP(), RATIOS), normal(16, 2)
    made = scheduler(monkeypatch, module, theirs, RATIOS, **config)
    assert worst(walk(made, levels, x, answer), run(PLANE, x, levels, solver, no_noise)) < 1e-9


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_3m_classic", "dpmpp_1"])
def test_the_last_step_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``lower_order_final`` their step to 0 is ours: the denoised estimate."""
    solver, (module, theirs), config, answer = CASES[name]
    levels, x = [*at_ratios(VP(), RATIOS), VP()(0.0)], normal(16, 2)
    made = scheduler(monkeypatch, module, theirs, RATIOS, **{**config, "euler_at_final": True})
    assert worst(walk(made, levels, x, answer), run(PLANE, x, levels, solver, no_noise)) < 1e-9


@pytest.mark.parametrize(
    ("solver", "module", "name"),
    [
        (Euler(), "euler_discrete", "EulerDiscreteScheduler"),
        (LMS(4), "lms_discrete", "LMSDiscreteScheduler"),
    ],
    ids=["euler", "lms_4"],
)
def test_variance_exploding_schedulers(solver: Solver, module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    levels, x = at_ratios(EDM(), RATIOS), 20 * normal(16, 2)
    made = scheduler(monkeypatch, module, name, RATIOS)
    made.is_scale_input_called = True
    assert worst(walk(made, levels, x, eps), run(PLANE, x, levels, solver, no_noise)) < 1e-9


def test_heun(monkeypatch: pytest.MonkeyPatch) -> None:
    levels, x = [*at_ratios(EDM(), RATIOS), EDM()(0.0)], 20 * normal(16, 2)
    made = scheduler(monkeypatch, "heun_discrete", "HeunDiscreteScheduler", RATIOS)
    # Its sigmas and times are written twice, but for the first.
    made.sigmas = torch.cat([made.sigmas[:1], made.sigmas[1:-1].repeat_interleave(2), made.sigmas[-1:]])
    made.timesteps = torch.cat([made.timesteps[:1], made.timesteps[1:].repeat_interleave(2)])
    asked = [levels[0], *[level for level in levels[1:-1] for _ in range(2)]]
    y = x
    for t, level in zip(made.timesteps, asked, strict=True):
        y = made.step(eps(y, level), t, y, return_dict=False)[0]
    assert worst(y, run(PLANE, x, levels, Heun(), no_noise)) < 1e-9


def test_kdpm2(monkeypatch: pytest.MonkeyPatch) -> None:
    levels, x = at_ratios(EDM(), RATIOS), 20 * normal(16, 2)
    middles = at_ratios(EDM(), (RATIOS[:-1] * RATIOS[1:]).sqrt())
    made = scheduler(monkeypatch, "k_dpm_2_discrete", "KDPM2DiscreteScheduler", RATIOS)
    made.sigmas = torch.cat([RATIOS[:1], RATIOS[1:].repeat_interleave(2), torch.zeros(1, dtype=torch.float64)])
    between = (RATIOS[:-1] * RATIOS[1:]).sqrt()
    made.sigmas_interpol = torch.cat([RATIOS[:1], between.repeat_interleave(2), torch.zeros(2, dtype=torch.float64)])
    made.timesteps = torch.arange(len(made.sigmas), 0, -1)
    y = x
    asked = [level for pair in zip(levels[:-1], middles, strict=True) for level in pair]
    for t, level in zip(made.timesteps, asked, strict=False):
        y = made.step(eps(y, level), t, y, return_dict=False)[0]
    assert worst(y, run(PLANE, x, levels, DPMSolver2(), no_noise)) < 1e-9


def test_dpmpp_2s_on_an_even_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their singlestep methods take the grid's own nodes as stages; even in log-SNR, every second is our middle."""
    fine, x = at_ratios(VP(), EVEN), normal(16, 2)
    made = scheduler(
        monkeypatch,
        "dpmsolver_singlestep",
        "DPMSolverSinglestepScheduler",
        EVEN,
        prediction_type="sample",
        solver_order=2,
        lower_order_final=False,
        final_sigmas_type="sigma_min",
    )
    made.order_list = [1, 2] * 5
    y = x
    for t, level in zip(made.timesteps[:-1], fine[:-1], strict=True):
        y = made.step(x0(y, level), t, y, return_dict=False)[0]
    assert worst(y, run(PLANE, x, fine[::2], DPMpp2S(), no_noise)) < 1e-9


def ddpm_table(made) -> None:
    """Its table in float64, which is ours."""
    made.alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    made.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)


@pytest.mark.parametrize("steps", [10, 20])
def test_ddim_on_the_leading_grid(steps: int) -> None:
    source = importlib.import_module("diffusers.schedulers.scheduling_ddim")
    made = source.DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    ddpm_table(made)
    made.set_timesteps(steps)
    levels, x = Leading().levels(LinearBetas(), steps), normal(16, 2)
    assert worst(walk(made, levels, x, eps), run(PLANE, x, levels, Euler(), no_noise)) < 1e-9


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm(order: int) -> None:
    """Theirs has its own angles in place of betas and is told v: eps = sigma x + alpha v."""
    source = importlib.import_module("diffusers.schedulers.scheduling_ipndm")
    levels, x = at_ratios(VP(), RATIOS), normal(16, 2)
    made = source.IPNDMScheduler()
    made.set_timesteps(len(levels))
    made.betas = torch.stack([level.sigma for level in levels])
    made.alphas = torch.stack([level.alpha for level in levels])

    def v(x: Tensor, level: Level) -> Tensor:
        e = PLANE(x, level)
        made.ets = made.ets[max(len(made.ets) - order + 1, 0) :]
        return level.alpha * e.eps - level.sigma * e.x0

    assert worst(walk(made, levels, x, v), run(PLANE, x, levels, IPNDM(order), no_noise)) < 1e-9


def test_plms() -> None:
    """Stable Diffusion's: the leading grid, whose previous time is right there (trap S1)."""
    source = importlib.import_module("diffusers.schedulers.scheduling_pndm")
    made = source.PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=True)
    ddpm_table(made)
    made.set_timesteps(20)
    levels, x = Leading().levels(LinearBetas(), 20), normal(16, 2)
    y = x
    asked = [levels[0], levels[1], *levels[1:-2]]
    for t, level in zip(made.timesteps, asked, strict=False):
        y = made.step(eps(y, level), int(t), y, return_dict=False)[0]
    assert worst(y, run(PLANE, x, levels[:-1], PLMS(), no_noise)) < 1e-9


def test_pndm() -> None:
    source = importlib.import_module("diffusers.schedulers.scheduling_pndm")
    made = source.PNDMScheduler(skip_prk_steps=False, set_alpha_to_one=True)
    ddpm_table(made)
    made.set_timesteps(20)
    schedule, x = LinearBetas(), normal(16, 2)
    levels = Leading().levels(schedule, 20)
    y = x
    for t in made.timesteps[: 12 + 16]:
        y = made.step(eps(y, schedule((int(t) + 1) / 1000)), int(t), y, return_dict=False)[0]
    assert worst(y, run(PLANE, x, levels[:20], PNDM(), no_noise)) < 1e-9


# --- Identities -------------------------------------------------------------------------------------------------------


def test_dpmpp_3m_is_exponential_adams_bashforth_3() -> None:
    levels, x = [*at_ratios(VP(), RATIOS), VP()(0.0)], normal(16, 2)
    exact = run(PLANE, x, levels, ExponentialAdams(3), no_noise)
    assert worst(run(PLANE, x, levels, DPMpp3M(), no_noise), exact) < 1e-11
    assert worst(run(PLANE, x, levels, DPMpp3M(classic=True), no_noise), exact) > 1e-4


def test_dpmpp_2m_heun_is_exponential_adams_bashforth_2() -> None:
    levels, x = at_ratios(VP(), RATIOS), normal(16, 2)
    a, b = (run(PLANE, x, levels, solver, no_noise) for solver in (DPMpp2M(heun=True), ExponentialAdams(2)))
    assert worst(a, b) < 1e-11


def test_ipndm_4_is_lms_4_on_a_uniform_sigma_grid() -> None:
    levels, x = at_ratios(EDM(), torch.linspace(10, 0.5, 20, dtype=torch.float64)), 10 * normal(16, 2)
    a, b = (run(PLANE, x, levels, solver, no_noise) for solver in (IPNDM(4), LMS(4)))
    assert worst(a, b) < 1e-9
    levels = at_ratios(EDM(), RATIOS)
    a, b = (run(PLANE, 2 * x, levels, solver, no_noise) for solver in (IPNDM(4), LMS(4)))
    assert worst(a, b) > 1e-3


def test_D2_first_order_is_euler_for_all() -> None:
    levels, x = [*at_ratios(VP(), RATIOS), VP()(0.0)], normal(16, 2)
    euler = run(PLANE, x, levels, Euler(), no_noise)
    for solver in (ExponentialAdams(1), DEIS(1), LMS(1), IPNDM(1)):
        assert worst(run(PLANE, x, levels, solver, no_noise), euler) < 1e-12


def test_multistep_methods_do_not_depend_on_the_schedule() -> None:
    """D4: the same sigma/alpha, another schedule, the same sample; DEIS tAB alone looks at t."""
    x = normal(16, 2)
    for solver in (DPMpp3M(), DEIS(3), LMS(4), IPNDM(4), UniPC(3), ExponentialAdams(4), DPMSolver2(), DPMpp2S()):
        ends = []
        for schedule in (VP(), EDM()):
            levels = at_ratios(schedule, RATIOS)
            scale = math.hypot(1, 20) * float(levels[0].alpha)
            ends.append(run(PLANE, x * scale, levels, solver, no_noise) / levels[-1].alpha)
        assert worst(*ends) < 1e-9


def test_every_pair_here_is_uneven() -> None:
    """An even grid would hide wrong weights."""
    steps = [math.log(a / b) for a, b in pairwise(RATIOS.tolist())]
    assert max(steps) / min(steps) > 1.8
