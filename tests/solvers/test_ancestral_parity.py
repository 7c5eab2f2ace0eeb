"""Law 10: the same samples as diffusers' schedulers on the same levels, from the same x and noise.

diffusers keeps its tables in float32, so the table of cumulative products that it holds is handed to us, and where it
steps in float32 the agreement is that of float32; both are said at each test.
"""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from laws import PLANE, normal, one, tensor, worst
from undiffuse.levels import Level
from undiffuse.schedules import EDM, BetaTable, Flow
from undiffuse.solvers import DDIM, SOLVERS, DDPMLarge, Euler, Heun, Solver

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")

N = 20
TABLE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "timestep_spacing": "trailing"}


def table_of(scheduler) -> BetaTable:
    """Our schedule with the very numbers, float64, that the scheduler holds after its cast to float64."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = tensor(1.0)
    scheduler.one = tensor(1.0)
    return BetaTable.from_alpha_bars(scheduler.alphas_cumprod)


def eps_at(table: BetaTable, x: Tensor, label: int) -> Tensor:
    return PLANE(x, table((label + 1) / 1000)).eps


def ours(solver: Solver, levels: list[Level], x: Tensor, noises: list[Tensor]) -> Tensor:
    draws, memory = iter(noises), None
    for here, there in pairwise(levels):
        x, memory, _ = one(solver, PLANE, x, here, there, lambda *_: next(draws), memory)
    return x


def labels_to_levels(table: BetaTable, labels: Tensor) -> list[Level]:
    return [*[table((int(label) + 1) / 1000) for label in labels], table(0.0)]


class Fed:
    """Feeds known noise to a scheduler in place of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: str, noises: list[Tensor]) -> None:
        draws = iter(noises)
        monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", lambda *a, **k: next(draws))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim(eta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """To 1e-9: it steps in the type of x."""
    theirs = diffusers.DDIMScheduler(**TABLE, clip_sample=False)
    theirs.set_timesteps(N)
    table, z = table_of(theirs), [normal(8, 2, seed=i) for i in range(N)]
    Fed(monkeypatch, "scheduling_ddim", z)
    x = start = normal(8, 2, seed=99)
    for label in theirs.timesteps:
        x = theirs.step(eps_at(table, x, int(label)), int(label), x, eta=eta).prev_sample
    # diffusers' own noise on the last step has deviation 0
    assert worst(ours(DDIM(eta), labels_to_levels(table, theirs.timesteps), start, z), x) < 1e-9


@pytest.mark.parametrize(("variance", "solver"), [("fixed_small", DDIM(1.0)), ("fixed_large", DDPMLarge())])
@pytest.mark.parametrize("steps", [20, 1000])
def test_ddpm(variance: str, solver: Solver, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To 1e-9 over 20 steps and over all 1000, up to the last step: with fixed_large and fewer than all steps diffusers
    adds the noise of a whole step to the final sample."""
    theirs = diffusers.DDPMScheduler(**TABLE, clip_sample=False, variance_type=variance)
    theirs.set_timesteps(steps)
    table, z = table_of(theirs), [normal(4, 2, seed=i) for i in range(steps)]
    Fed(monkeypatch, "scheduling_ddpm", z)
    x = start = normal(4, 2, seed=9999)
    for label in theirs.timesteps[:-1]:
        x = theirs.step(eps_at(table, x, int(label)), int(label), x).prev_sample
    assert worst(ours(solver, labels_to_levels(table, theirs.timesteps)[:-1], start, z), x) < 1e-9


def test_dpmpp_2m() -> None:
    """To float32: its sigmas are float32."""
    theirs = diffusers.DPMSolverMultistepScheduler(**TABLE, final_sigmas_type="zero")
    theirs.set_timesteps(N)
    table = table_of(theirs)
    x = start = normal(8, 2, seed=99)
    for label in theirs.timesteps:
        x = theirs.step(eps_at(table, x, int(label)), label, x).prev_sample
    # levels where it really is: its sigma is sqrt((1 - bar)/bar) at the label
    assert worst(ours(SOLVERS["dpmpp_2m"], labels_to_levels(table, theirs.timesteps), start, []), x.double()) < 2e-5


@pytest.mark.parametrize(("name", "solver"), [("Euler", Euler()), ("Heun", Heun())])
def test_euler_and_heun(name: str, solver: Solver) -> None:
    """To float32: they step in float32, in sigma."""
    theirs = getattr(diffusers, f"{name}DiscreteScheduler")(**TABLE)
    theirs.set_timesteps(N)
    sigmas = theirs.sigmas.double()
    sigmas = sigmas if name == "Euler" else torch.cat([sigmas[:1], sigmas[1:-1:2], sigmas[-1:]])
    schedule = EDM(200.0)
    x = start = normal(8, 2, seed=99) * float(sigmas[0])
    for label in theirs.timesteps:
        scaled = theirs.scale_model_input(x, label)
        at = theirs.sigmas[theirs.step_index].double()
        assert worst(scaled, x / (at**2 + 1).sqrt()) < 1e-4
        x = theirs.step(PLANE(x, Level(at, tensor(1.0), at, schedule)).eps, label, x).prev_sample.double()
    levels = [Level(s, tensor(1.0), s, schedule) for s in sigmas.unique().flip(0)]
    assert worst(ours(solver, levels, start, []), x) < 2e-4


def test_edm_euler() -> None:
    """To float32: it steps in float32."""
    theirs = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    theirs.set_timesteps(N)
    x = start = normal(8, 2, seed=99) * 80
    schedule = EDM()
    for label in theirs.timesteps:
        theirs.scale_model_input(x, label)
        s = theirs.sigmas[theirs.step_index].double()
        e = PLANE(x, Level(s, tensor(1.0), s, schedule))
        c_skip, c_out = 0.25 / (s**2 + 0.25), s * 0.5 / (s**2 + 0.25).sqrt()
        x = theirs.step((e.x0 - c_skip * x) / c_out, label, x).prev_sample.double()
    levels = [Level(s, tensor(1.0), s, schedule) for s in theirs.sigmas.double()]
    assert worst(ours(Euler(), levels, start, []), x) < 1e-4


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler(shift: float) -> None:
    """To float32: it steps in float32. Its shifted sigmas are ours of the same (unshifted) ends."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(N)
    sigmas = theirs.sigmas.double()
    x = start = normal(8, 2, seed=99)
    for i, label in enumerate(theirs.timesteps):
        e = PLANE(x, Flow()(float(sigmas[i])))
        x = theirs.step(e.eps - e.x0, label, x).prev_sample.double()
    assert worst(ours(Euler(), list(Flow()(sigmas)), start, []), x) < 1e-5


def test_trap_S1_diffusers_leaves_its_own_linspace_grid_and_we_do_not() -> None:
    """Known upstream: with linspace, DDIM steps to t - T//n. If this fails they have mended it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = diffusers.DDIMScheduler(**{**TABLE, "timestep_spacing": "linspace"}, clip_sample=False)
    theirs.set_timesteps(10)
    table = table_of(theirs)
    x = normal(8, 2, seed=99)
    eps = eps_at(table, x, 999)
    moved = theirs.step(eps, 999, x).prev_sample
    here = table(1.0)
    on_grid, off_grid = (one(DDIM(), PLANE, x, here, table((label + 1) / 1000), None)[0] for label in (888, 899))
    assert worst(moved, off_grid) < 1e-9
    assert worst(moved, on_grid) > 1e-4
