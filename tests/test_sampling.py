"""Chapter 8, the loop: one, for everything."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor

import undiffuse
from laws import PLANE, Gaussian, fixed_noise, no_noise, normal, worst
from undiffuse.errors import UndiffuseError
from undiffuse.grids import Karras, Uniform
from undiffuse.levels import Estimate, Level
from undiffuse.noise import Streams
from undiffuse.sampling import answer, sample, start, trajectory
from undiffuse.schedules import EDM, VP, Flow
from undiffuse.solvers import DDIM, SOLVERS, Euler, Heun

SOURCE = Path(undiffuse.__file__).parent


@pytest.mark.parametrize("solver", SOLVERS)
def test_trap_X1_law_6_a_sample_does_not_depend_on_its_batch(solver: str) -> None:
    def of(samples: int | list[int], seed: int = 3) -> Tensor:
        return sample(Gaussian(), VP(), (2, 3), samples, steps=4, solver=SOLVERS[solver], seed=seed)

    together = of(5)
    assert torch.equal(of([2]), together[2:3])
    assert torch.equal(of([4, 1]), together[[4, 1]])
    assert not torch.equal(of([2], seed=4), together[2:3])
    assert torch.equal(of(5), together)


def test_a_trajectory_is_its_frames() -> None:
    levels = Uniform().levels(VP(), 5)
    x = normal(3, 2)
    frames = list(trajectory(PLANE, x, levels, Heun(), no_noise))
    assert [frame.index for frame in frames] == [0, 1, 2, 3, 4, 5]
    assert [frame.calls for frame in frames] == [0, 2, 4, 6, 8, 9]
    assert all(frame.level is level for frame, level in zip(frames, levels, strict=True))
    assert frames[0].x is x
    assert frames[0].estimate is None
    first = frames[1].estimate
    assert first is not None
    assert worst(first.x0, PLANE(x, levels[0]).x0) == 0


def test_stopping_a_trajectory_asks_no_more() -> None:
    asked = []

    def denoise(x: Tensor, level: Level) -> Estimate:
        asked.append(level)
        return PLANE(x, level)

    for frame in trajectory(denoise, normal(3, 2), Uniform().levels(VP(), 50), Euler(), no_noise):
        if frame.index == 3:
            break
    assert len(asked) == 3


def test_the_tail_of_a_one_step_method_is_the_same_from_the_middle() -> None:
    levels, x = Uniform().levels(VP(), 8), normal(3, 2)
    for solver in (Euler(), Heun()):
        frames = list(trajectory(PLANE, x, levels, solver, no_noise))
        *_, last = trajectory(PLANE, frames[3].x, levels[3:], solver, no_noise)
        assert torch.equal(last.x, frames[-1].x)


def test_sampling_records_no_gradients_and_leaves_the_mode_as_it_was() -> None:
    weight = torch.ones((), requires_grad=True)

    def denoise(x: Tensor, level: Level) -> Estimate:
        assert not torch.is_grad_enabled()
        e = Gaussian()(x, level)
        return Estimate(e.x0 * weight, e.eps)

    for frame in trajectory(denoise, torch.zeros(2, 2), Uniform().levels(VP(), 3), Euler(), no_noise):
        assert torch.is_grad_enabled()  # between the steps the caller's mode holds
        assert not frame.x.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_float16_in_is_float16_out_with_float32_inside(dtype: torch.dtype) -> None:
    seen = set()

    def denoise(x: Tensor, level: Level) -> Estimate:
        seen.add(x.dtype)
        return Gaussian()(x, level)

    x = sample(denoise, VP(), (4,), 3, steps=6, solver=SOLVERS["ddpm"], like=torch.empty(0, dtype=dtype))
    assert x.dtype == dtype
    assert seen == {torch.promote_types(dtype, torch.float32)}
    exact = sample(Gaussian(), VP(), (4,), 3, steps=6, solver=SOLVERS["ddpm"])
    assert worst(x.float(), exact) < {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("solver", SOLVERS)
def test_trap_X2_a_gpu_makes_the_same_sample(solver: str) -> None:
    cpu = sample(_on_device, VP(), (2, 3), 3, steps=5, solver=SOLVERS[solver])
    gpu = sample(_on_device, VP(), (2, 3), 3, steps=5, solver=SOLVERS[solver], like=torch.empty(0, device="cuda"))
    assert gpu.device.type == "cuda"
    assert worst(gpu.cpu(), cpu) < 1e-4


def _on_device(x: Tensor, level: Level) -> Estimate:
    on = Level(level.t.to(x.device), level.alpha.to(x.device), level.sigma.to(x.device), level.path)
    return Gaussian()(x, on)


def test_two_runs_taking_turns_do_not_meet() -> None:
    levels = Karras().levels(EDM(), 6)
    noises = [Streams(i, 2) for i in (1, 2)]
    turns = [trajectory(Gaussian(), n.draw((3,)) * 80, levels, DDIM(1.0), n) for n in noises]
    together = [frames[-1].x for frames in zip(*[list(f) for f in zip(*turns, strict=True)], strict=True)]
    for i, x in zip((1, 2), together, strict=True):
        noise = Streams(i, 2)
        *_, alone = trajectory(Gaussian(), noise.draw((3,)) * 80, levels, DDIM(1.0), noise)
        assert torch.equal(x, alone.x)


def test_a_step_can_be_answered_by_hand() -> None:
    here, there, x = VP()(0.5), VP()(0.3), normal(2, 2)
    step = Euler().step(x, here, there, None, no_noise)
    asked, level = next(step)
    assert asked is x
    assert level is here
    with pytest.raises(StopIteration) as stop:
        step.send(PLANE(x, here))
    got, _, _ = answer(Euler().step(x, here, there, None, no_noise), PLANE)
    assert torch.equal(stop.value.value[0], got)


def test_trap_S23_a_start_in_the_middle_is_at_a_stated_level() -> None:
    """Noise is added at the level that is asked at first, by one object: t = 0 returns the input, t = 1 ignores it."""
    x0, eps = PLANE.draw(4), normal(4, 2)
    for t in (0.6, 0.3):
        levels = Flow()(torch.tensor([t, t / 2, 0.0], dtype=torch.float64))
        first, *_ = trajectory(PLANE, levels.path(t).mix(x0, eps), list(levels), Euler(), no_noise)
        assert worst(first.x, (1 - t) * x0 + t * eps) < 1e-15
        assert float(first.level.t) == t
    assert torch.equal(Flow()(0.0).mix(x0, eps), x0)
    assert torch.equal(Flow()(1.0).mix(x0, eps), Flow()(1.0).mix(-x0, eps))


def test_start_scales_unit_noise() -> None:
    assert float(start(EDM()(1.0), torch.ones(1))) == pytest.approx((80**2 + 1) ** 0.5)
    assert float(start(Flow()(1.0), torch.ones(1))) == 1


def test_an_unknown_solver_is_suggested() -> None:
    from undiffuse.errors import choose

    with pytest.raises(UndiffuseError, match="did you mean 'heun'"):
        choose("solver", "heum", SOLVERS)


def test_law_8_no_function_of_the_heart_swallows_options() -> None:
    """No **kwargs but the conditions, which are checked by name; no hasattr; no global randomness."""
    heart = ("levels", "schedules", "predictions", "denoiser", "conditions", "guidance", "grids", "noise")
    heart += ("sampling", "objectives")
    files = [SOURCE / f"{name}.py" for name in heart] + sorted((SOURCE / "solvers").glob("*.py"))
    for path in files:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.args.kwarg:
                assert node.args.kwarg.arg == "cond", f"{path.name}: {node.name} takes **{node.args.kwarg.arg}"
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in {"hasattr", "eval", "exec", "torch.manual_seed", "torch.seed"}, (
                    f"{path.name}: {name}"
                )
                random = name.split(".")[-1] in {"randn", "rand", "randint", "randn_like", "rand_like", "normal_"}
                keywords = {keyword.arg for keyword in node.keywords}
                assert not random or "generator" in keywords, f"{path.name}: {name} without a generator"


def test_nothing_in_the_heart_touches_the_global_generator() -> None:
    before = torch.get_rng_state()
    for solver in SOLVERS.values():
        sample(Gaussian(), VP(), (2,), 2, steps=3, solver=solver)
    assert torch.equal(torch.get_rng_state(), before)
    assert fixed_noise(0) is not None
