"""Parallel in time: the sequential sample, in fewer calls in a row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laws import PLANE, Gaussian, normal, run, worst
from undiffuse import UndiffuseError
from undiffuse.grids import LogSNR, Uniform
from undiffuse.levels import Estimate, Level
from undiffuse.noise import Brownian, Streams
from undiffuse.parallel import sample_parallel
from undiffuse.sampling import start
from undiffuse.schedules import EDM, SCHEDULES, VP, Flow
from undiffuse.solvers import DDIM, SOLVERS, Euler, Heun

ONE_STEP = ["euler", "heun", "ddim", "ddpm", "ddpm_large", "ddpm_learned", "churn"]


def begin(levels: list[Level], seed: int = 0) -> tuple[Tensor, Streams]:
    noise = Streams(seed, 1)
    return start(levels[0], noise.draw((2,), torch.empty(0, dtype=torch.float64))), noise


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("name", ONE_STEP)
def test_tolerance_0_is_the_sequential_sample_to_the_last_bit(name: str, window: int | None) -> None:
    """An elementwise denoiser, so that no bit depends on the batch; at most one sweep a step."""
    levels = Uniform().levels(Flow(), 9)
    data, solver = Gaussian(), SOLVERS[name]
    want = run(data, begin(levels)[0], levels, solver, begin(levels)[1])
    x, noise = begin(levels)
    got = sample_parallel(data, x, levels, solver, noise, window=window, tolerance=0.0)
    assert torch.equal(got.x, want)
    assert got.sweeps <= 9
    assert got.change == 0


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
@pytest.mark.parametrize("solver", [Euler(), DDIM(1.0)], ids=["euler", "ddpm"])
def test_it_converges_to_the_sequential_sample_in_fewer_sweeps(solver, schedule) -> None:
    steps = 6 if schedule is SCHEDULES["table"] else 60
    levels = Uniform().levels(schedule, steps)
    x, noise = begin(levels, 5)
    want = run(PLANE, x, levels, solver, noise)
    x, noise = begin(levels, 5)
    got = sample_parallel(PLANE, x, levels, solver, noise, tolerance=1e-4)
    assert worst(got.x, want) < 5e-2
    assert got.change <= 1e-4
    assert got.sweeps == got.calls <= steps
    if steps == 60:
        assert got.sweeps < 40


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-6])
def test_the_error_falls_with_the_tolerance(tolerance: float) -> None:
    levels = Uniform().levels(VP(), 50)
    errors, sweeps = [], []
    for seed in range(8):
        x, noise = begin(levels, seed)
        want = run(PLANE, x, levels, DDIM(1.0), noise)
        x, noise = begin(levels, seed)
        got = sample_parallel(PLANE, x, levels, DDIM(1.0), noise, tolerance=tolerance)
        errors.append(worst(got.x, want))
        sweeps.append(got.sweeps)
    assert sorted(errors)[4] < 30 * tolerance
    assert max(sweeps) < 50


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_agrees_or_refuses(name: str) -> None:
    solver, levels = SOLVERS[name], LogSNR(least=0.02).levels(EDM(), 12)
    x, noise = begin(levels, 2)
    try:
        got = sample_parallel(PLANE, x, levels, solver, noise, tolerance=0.0, window=5)
    except UndiffuseError as error:
        assert "leans on past steps" in str(error)  # noqa: PT017
        assert name not in ONE_STEP
        return
    x, noise = begin(levels, 2)
    assert worst(got.x, run(PLANE, x, levels, solver, noise)) < 1e-9


def test_a_brownian_path_may_be_the_noise() -> None:
    levels = Uniform().levels(VP(), 20)
    x, _ = begin(levels)
    want = run(Gaussian(), x, levels, DDIM(1.0), Brownian(3, 1))
    got = sample_parallel(Gaussian(), x, levels, DDIM(1.0), Brownian(3, 1), tolerance=0.0)
    assert torch.equal(got.x, want)


def test_every_call_has_the_windows_size_and_the_levels_of_its_steps() -> None:
    """So that a condition can be bound once; and calls and rows are what the denoiser saw (trap S21)."""
    levels = Uniform().levels(Flow(), 10)
    seen: list[Level] = []

    def denoise(x: Tensor, level: Level) -> Estimate:
        assert level.t.shape == level.alpha.shape == level.sigma.shape == x.shape[:1]
        seen.append(level)
        return PLANE(x, level)

    x, noise = begin(levels)
    got = sample_parallel(denoise, x, levels, Heun(), noise, window=4)
    assert all(len(level.t) == 4 for level in seen)
    assert torch.equal(seen[0].t, torch.stack([level.t for level in levels[:4]]))
    assert (got.calls, got.rows) == (len(seen), 4 * len(seen))
    assert got.sweeps <= got.calls <= 2 * got.sweeps


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (normal(2, 2), {}, r"for one sample, \[1, \.\.\.\]; got \[2, 2\]"),
        (normal(1, 2), {"window": 0}, "a window of 1"),
        (normal(1, 2), {"tolerance": -1.0}, "tolerance must be at least 0"),
        (normal(1, 2) * torch.nan, {}, "diverged"),
    ],
)
def test_bad_input_is_refused(x: Tensor, options: dict, message: str) -> None:
    with pytest.raises(UndiffuseError, match=message):
        sample_parallel(PLANE, x, Uniform().levels(Flow(), 4), Euler(), Streams(0, 1), **options)
