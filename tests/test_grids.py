"""Chapter 8, grids: the level a step lands on is the level that is asked at next."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laws import Gaussian, fixed_noise, normal, tensor, worst
from undiffuse.errors import UndiffuseError
from undiffuse.grids import GRIDS, Grid, Karras, Leading, Linspace, LogSNR, Times, Trailing, Uniform
from undiffuse.levels import Estimate, Level
from undiffuse.sampling import start, trajectory
from undiffuse.schedules import EDM, SCHEDULES, VP, Cosine, Flow, LinearBetas, Schedule, Shifted, ZeroTerminalSNR
from undiffuse.solvers import SOLVERS, Euler

every = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def times(grid: Grid, schedule: Schedule, steps: int) -> Tensor | None:
    """The times, or None where the pair is refused."""
    try:
        return grid.times(schedule, steps)
    except UndiffuseError:
        return None


@every
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_trap_S12_S15_times_fall_strictly_to_exactly_0(grid: Grid, schedule: Schedule) -> None:
    made = 0
    for steps in (1, 2, 3, 4, 5, 6, 10, 50):
        got = times(grid, schedule, steps)
        if got is None:
            continue
        made += 1
        assert len(got) == steps + 1
        assert float(got[-1]) == 0
        assert bool((got.diff() < 0).all())
        assert float(got[0]) <= 1
        assert float(got[-2]) >= schedule.first - 1e-12
        levels = grid.levels(schedule, steps)
        assert levels[-1].is_data
        assert [float(level.t) for level in levels] == got.tolist()
    pure_noise = schedule.terminal_snr == 0
    assert made >= (0 if pure_noise and isinstance(grid, Leading) else 4)


@every
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 9, 10, 13, 27, 50, 81, 999, 1000])
def test_trap_S1_S2_S22_a_step_lands_where_the_model_is_asked_next(grid: Grid, steps: int) -> None:
    """Primes, powers of 3, all T: by what the denoiser is asked, not by what the grid says."""
    schedule = LinearBetas()
    if times(grid, schedule, steps) is None:
        assert steps > 500  # only an uneven grid runs out of the table's levels
        return
    for solver in (Euler(), SOLVERS["ddpm"]) if steps < 99 else (Euler(),):
        asked: list[Level] = []

        def denoise(x: Tensor, level: Level, asked: list[Level] = asked) -> Estimate:
            asked.append(level)
            return Gaussian()(x, level)

        levels = grid.levels(schedule, steps)
        frames = list(trajectory(denoise, normal(1, 1), levels, solver, fixed_noise(0)))
        assert len(asked) == steps == frames[-1].calls  # S21
        landed = [frame.level for frame in frames[:-1]]
        assert all(a is b for a, b in zip(asked, landed, strict=True))
        assert frames[-1].level.is_data


def test_more_steps_than_a_table_has_are_refused() -> None:
    for grid in (Trailing(), Leading(), Linspace(), Uniform()):
        with pytest.raises(UndiffuseError, match="steps"):
            grid.times(LinearBetas(100), 101)


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "5", 10**9])
def test_steps_are_a_whole_number(steps: object) -> None:
    with pytest.raises(UndiffuseError, match="whole number"):
        Uniform().times(VP(), steps)  # type: ignore[arg-type]


@every
def test_trap_S4_the_start_has_the_variance_of_its_level(grid: Grid) -> None:
    for schedule in (LinearBetas(), EDM(), Flow(), VP()):
        got = times(grid, schedule, 10)
        if got is None:
            continue
        level = schedule(got[0])
        x = start(level, normal(20000, 1))
        data = level.mix(normal(20000, 1, seed=1), normal(20000, 1, seed=2))  # data of unit variance
        assert float(x.std() / data.std()) == pytest.approx(1, abs=0.03)
        if not isinstance(grid, Leading):
            assert float(got[0]) == 1  # every other grid starts where noise really starts


def test_trap_S4_leading_is_the_known_spacing_and_trailing_visits_the_end() -> None:
    def labels(grid: Grid, n: int) -> list[float]:
        return (1000 * grid.times(LinearBetas(), n)[:-1] - 1).round(decimals=6).tolist()

    assert labels(Leading(), 10) == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert labels(Leading(offset=1), 10)[0] == 901
    assert labels(Trailing(), 10) == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert labels(Linspace(), 10) == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]


@pytest.mark.parametrize("schedule", [ZeroTerminalSNR(LinearBetas()), Cosine(), Flow()], ids=lambda s: type(s).__name__)
def test_trap_S5_a_grid_that_misses_pure_noise_is_refused(schedule: Schedule) -> None:
    with pytest.raises(UndiffuseError, match="use the uniform or trailing grid"):
        Leading().times(schedule, 10)
    for grid in (Trailing(), Linspace(), Uniform(), Karras(), LogSNR()):
        assert float(grid.times(schedule, 10)[0]) == 1


@every
def test_trap_S9_the_same_arguments_give_the_same_times(grid: Grid) -> None:
    for schedule in (Shifted(LinearBetas(), 3.0), Shifted(VP(), 3.0), EDM()):
        first = grid.times(schedule, 9)
        grid.times(schedule, 4)
        assert torch.equal(grid.times(schedule, 9), first)
        assert torch.equal(torch.stack([level.sigma for level in grid.levels(schedule, 9)]), schedule(first).sigma)


def test_trap_S9_one_shift_is_one_shift() -> None:
    sigma = Uniform().levels(Shifted(Flow(), 3.0), 4)[1].sigma
    assert float(sigma) == pytest.approx(3 * 0.75 / (1 + 2 * 0.75))


def test_trap_S10_explicit_times_are_the_same_levels_as_the_grids() -> None:
    for schedule in (VP(), Flow(), EDM(), Shifted(Flow(), 3.0)):
        times = Karras().times(schedule, 6)
        a, b = Times(tuple(times[:-1].tolist())).levels(schedule, 6), Karras().levels(schedule, 6)
        for x, y in zip(a, b, strict=True):
            assert (float(x.t), float(x.alpha), float(x.sigma)) == (float(y.t), float(y.alpha), float(y.sigma))
    with pytest.raises(UndiffuseError, match="lists 4 times"):
        Times().times(VP(), 3)
    with pytest.raises(UndiffuseError):
        Times((0.5, 0.5)).times(VP(), 2)
    with pytest.raises(UndiffuseError):
        Times((1.5, 0.5)).levels(VP(), 2)


def test_C4_karras_is_edm_eq_5() -> None:
    n = 12
    i = torch.arange(n, dtype=torch.float64)
    expected = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    got = torch.stack([level.sigma for level in Karras().levels(EDM(), n)])
    assert worst(got[:-1] / expected, torch.ones_like(expected)) < 1e-9


def test_C5_karras_with_a_great_rho_is_log_uniform() -> None:
    a, b = (EDM()(grid.times(EDM(), 12)[:-1]).sigma.log() for grid in (Karras(rho=1e5), LogSNR()))
    assert worst(a, b) < 1e-3


@pytest.mark.parametrize("schedule", [VP(), Flow(), EDM(), LinearBetas()], ids=lambda s: type(s).__name__)
def test_log_snr_is_even(schedule: Schedule) -> None:
    lam = torch.stack([level.log_snr for level in LogSNR().levels(schedule, 12)[1:-1]])
    assert worst(lam.diff(), lam.diff().mean().expand(10)) < 1e-8


def test_times_given_as_tensors_of_one_number_stay_float64() -> None:
    assert Uniform().times(VP(), 3).dtype == torch.float64
    assert worst(Uniform().times(VP(), 3), tensor(1.0, 2 / 3, 1 / 3, 0.0)) < 1e-15
