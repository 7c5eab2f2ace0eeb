"""Chapter 2: every schedule, from both ends, against formulas of other people."""

from __future__ import annotations

import warnings
from math import inf

import pytest
import torch
from torch import Tensor

from laws import Gaussian, no_noise, run, tensor, worst
from undiffuse.denoiser import Denoiser, terminal_snr_report
from undiffuse.errors import UndiffuseError, UndiffuseWarning
from undiffuse.grids import GRIDS
from undiffuse.predictions import Eps, V
from undiffuse.schedules import (
    EDM,
    SCHEDULES,
    VE,
    VP,
    BetaTable,
    Cosine,
    CosineBetas,
    Flow,
    LinearBetas,
    ScaledLinearBetas,
    Schedule,
    Shifted,
    Sigmoid,
    SubVP,
    ZeroTerminalSNR,
)
from undiffuse.solvers import Euler

every = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
T = torch.linspace(0, 1, 1001, dtype=torch.float64)


@every
def test_law_3_finite_and_monotone_from_data_to_noise(schedule: Schedule) -> None:
    level = schedule(T)
    for c in (level.alpha, level.sigma):
        assert c.dtype == torch.float64
        assert bool(c.isfinite().all())
        assert bool((c >= 0).all())
    assert (float(level.alpha[0]), float(level.sigma[0])) == (1, 0)
    assert bool((level.sigma[1:] > 0).all())
    assert bool((level.log_snr.diff() < 0).all())
    assert not bool(level.log_snr.isnan().any())
    schedule.check()


@every
def test_C7_time_at_inverts_the_schedule(schedule: Schedule) -> None:
    level = schedule(T)
    back = schedule.time_at(level.log_snr)
    assert (float(back[0]), float(back[-1])) == (0, 1)
    assert worst(back, T) < 1e-9
    again = schedule(back)
    ratio, expected = again.sigma[1:-1] / again.alpha[1:-1], level.sigma[1:-1] / level.alpha[1:-1]
    assert worst(ratio / expected, torch.ones_like(ratio)) < 1e-8


@every
def test_time_at_raises_outside_the_range(schedule: Schedule) -> None:
    end = float(schedule(1.0).log_snr)
    for log_snr in [float("nan"), *([end - 1e-3] if end > -inf else [])]:
        with pytest.raises(UndiffuseError, match="outside this schedule's range"):
            schedule.time_at(log_snr)
    assert float(schedule.time_at(inf)) == 0
    assert float(schedule.time_at(end)) == 1


@every
def test_times_outside_0_and_1_raise(schedule: Schedule) -> None:
    for t in (-1e-9, 1 + 1e-9, float("nan"), tensor(0.5, 2.0)):
        with pytest.raises(UndiffuseError, match=r"time must be in \[0, 1\]"):
            schedule(t)


@every
def test_one_time_or_many_are_the_same_numbers(schedule: Schedule) -> None:
    many = schedule(T[::97])
    for i, t in enumerate(T[::97]):
        assert worst(schedule(float(t)).alpha, many.alpha[i]) < 1e-15
        assert worst(schedule(float(t)).sigma / (1 + many.sigma[i]), many.sigma[i] / (1 + many.sigma[i])) < 1e-15


@every
def test_trap_P2_levels_are_float64_whatever_the_default(schedule: Schedule) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        level = schedule(torch.tensor(0.5, dtype=dtype))
        assert level.t.dtype == level.alpha.dtype == level.sigma.dtype == torch.float64
    first = schedule(torch.linspace(schedule.first, 1, 1000, dtype=torch.float64))
    assert len(set(zip(first.alpha.tolist(), first.sigma.tolist(), strict=True))) == 1000


@every
def test_trap_S9_a_schedule_is_a_pure_function(schedule: Schedule) -> None:
    before = schedule(T)
    for grid in GRIDS.values():
        for _ in range(2):
            try:
                levels = grid.times(schedule, 5)
            except UndiffuseError:
                continue
            assert torch.equal(levels, grid.times(schedule, 5))
    assert torch.equal(before.sigma, schedule(T).sigma)
    with pytest.raises(AttributeError):
        schedule.shift = 2.0  # type: ignore[attr-defined]


@every
def test_trap_O4_coefficients_are_finite_at_both_ends_in_both_directions(schedule: Schedule) -> None:
    ends = schedule(tensor(0.0, schedule.first or 1e-9, 1.0))
    assert bool(torch.stack([ends.alpha, ends.sigma]).isfinite().all())
    assert bool(schedule.time_at(ends.log_snr).isfinite().all())


@every
def test_trap_S7_the_terminal_snr_is_reported(schedule: Schedule) -> None:
    end = schedule(1.0)
    share = float(end.alpha / torch.hypot(end.alpha, end.sigma))
    assert f"{share:.2%}" in terminal_snr_report(schedule)
    assert schedule.terminal_snr == pytest.approx(float(end.alpha / end.sigma) ** 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Denoiser(torch.nn.Identity(), schedule, V())
    assert bool(caught) == (share > 0.03)
    assert all(issubclass(w.category, UndiffuseWarning) for w in caught)


# --- Formulas of the papers -------------------------------------------------------------------------------------------


def bars(betas: Tensor) -> Tensor:
    return (1 - betas).cumprod(0)


def tables() -> dict[str, tuple[Schedule, Tensor]]:
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    f = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2
    return {
        "linear": (LinearBetas(), bars(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))),
        "scaled_linear": (
            ScaledLinearBetas(),
            bars(torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2),
        ),
        "cosine": (CosineBetas(), bars((1 - f[1:] / f[:-1]).clamp(max=0.999))),
        "table": (BetaTable((0.1, 0.5)), tensor(0.9, 0.45)),
    }


@pytest.mark.parametrize("name", tables())
def test_a_table_has_the_papers_numbers_at_its_knots(name: str) -> None:
    schedule, expected = tables()[name]
    steps = len(expected)
    level = schedule(torch.arange(1, steps + 1, dtype=torch.float64) / steps)
    assert worst(level.alpha**2, expected) < 1e-12
    assert worst(level.sigma**2, 1 - expected) < 1e-12
    assert schedule.first == 1 / steps


def test_C1_cosine_is_clipped_in_its_last_beta_alone() -> None:
    alpha_bar = CosineBetas()(1.0).alpha ** 2
    assert float(alpha_bar) == pytest.approx(2.429e-9, rel=1e-3)
    t = torch.arange(1, 1000, dtype=torch.float64) / 1000
    f = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2 / torch.cos(tensor(0.008 / 1.008 * torch.pi / 2)) ** 2
    assert worst(CosineBetas()(t).alpha ** 2, f) < 1e-12
    assert float(CosineBetas()(0.001).alpha) < 1  # alpha_bar at the first beta is not 1


def test_A8_tables_are_not_computed_in_float32() -> None:
    """sqrt(1 - alpha_bar_1) of DDPM is 0.01 to the last digit; by cumulative products in float32 it is off by 8e-5."""
    assert float(LinearBetas()(0.001).sigma) == pytest.approx(0.01, rel=1e-12)


def test_continuous_schedules_by_their_definitions() -> None:
    t = T[1:]
    b = 0.1 * t + 19.9 * t * t / 2
    for schedule, alpha, sigma in [
        (VP(), (-b / 2).exp(), (1 - (-b).exp()).sqrt()),
        (SubVP(), (-b / 2).exp(), 1 - (-b).exp()),
        (Cosine(), (torch.pi / 2 * t).cos(), (torch.pi / 2 * t).sin()),
        (VE(), torch.ones_like(t), ((0.01 * (50 / 0.01) ** t) ** 2 - 0.01**2).sqrt()),
        (EDM(), torch.ones_like(t), 80 * t**7),
        (Flow(), 1 - t, t),
    ]:
        assert worst(schedule(t).alpha, alpha) < 1e-12, schedule
        assert worst(schedule(t).sigma, sigma) < 1e-9, schedule


def test_sigmoid_by_its_definition() -> None:
    def s(u: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-u))

    v = (s(tensor(3.0)) - s(6 * T - 3)) / (s(tensor(3.0)) - s(tensor(-3.0)))  # gamma(t) of Chen 2023, listing 1
    assert worst(Sigmoid()(T).alpha ** 2, v) < 1e-12


@every
def test_schedules_of_a_family_keep_its_scale(schedule: Schedule) -> None:
    level = schedule(T)
    assert worst(schedule.scale(level.alpha, level.sigma), torch.ones_like(T)) < 1e-9


def test_alpha_bars_make_a_table() -> None:
    expected = tensor(0.9, 0.5, 0.1)
    schedule = BetaTable.from_alpha_bars([0.9, 0.5, 0.1])
    assert worst(schedule(tensor(1.0, 2.0, 3.0) / 3).alpha ** 2, expected) < 1e-12
    assert schedule == BetaTable.from_alpha_bars(expected)
    assert BetaTable([0.1, 0.5]) == BetaTable((0.1, 0.5))  # type: ignore[arg-type]
    assert hash(BetaTable([0.1])) == hash(BetaTable((0.1,)))  # type: ignore[arg-type]


def test_C3_respacing_a_table_gives_the_same_levels() -> None:
    full = LinearBetas()
    kept = full(torch.arange(1, 11, dtype=torch.float64) / 10)
    fewer = BetaTable.from_alpha_bars(kept.alpha**2)
    assert worst(fewer(kept.t).alpha, kept.alpha) < 1e-12


def test_C6_shifts_scale_the_ratio_and_compose() -> None:
    for inner in (Flow(), VP(), EDM(), SubVP()):
        t = T[1:-1]
        plain, shifted = inner(t), Shifted(inner, 3.0)(t)
        assert worst(shifted.sigma / shifted.alpha / (plain.sigma / plain.alpha), 3 * torch.ones_like(t)) < 1e-9
        twice = Shifted(Shifted(inner, 3.0), 2.0)(t)
        assert worst(twice.alpha, Shifted(inner, 6.0)(t).alpha) < 1e-12
        assert worst(Shifted(Shifted(inner, 3.0), 1 / 3)(t).sigma / plain.sigma, torch.ones_like(t)) < 1e-9
    s = T * 3 / (1 + 2 * T)  # Stable Diffusion 3, eq. 23
    assert worst(Shifted(Flow(), 3.0)(T).sigma, s) < 1e-12


def test_C2_zero_terminal_snr_is_algorithm_1() -> None:
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    root = bars(betas).sqrt()
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    level = ZeroTerminalSNR(LinearBetas())(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    assert worst(level.alpha, expected) < 1e-12
    assert float(level.alpha[-1]) == 0
    assert float(level.alpha[0]) == pytest.approx(float(root[0]), rel=1e-12)
    with pytest.raises(UndiffuseError, match="variance-preserving"):
        ZeroTerminalSNR(EDM())


# --- Traps ------------------------------------------------------------------------------------------------------------


def test_trap_S6_zero_terminal_snr_refuses_eps() -> None:
    for schedule in (ZeroTerminalSNR(LinearBetas()), Cosine(), Flow()):
        with pytest.raises(UndiffuseError, match="predict v, x0 or flow"):
            Denoiser(torch.nn.Identity(), schedule, Eps())


def test_trap_S7_the_mean_is_kept_only_with_zero_terminal_snr() -> None:
    """x at t = 1 should have a mean of alpha * 0.8; pure noise has none, and no model can tell."""
    with pytest.warns(UndiffuseWarning, match="6.83% of the amplitude"):
        Denoiser(torch.nn.Identity(), ScaledLinearBetas(), Eps())
    x, means = torch.zeros(1, 1, dtype=torch.float64), []
    for schedule in (ScaledLinearBetas(), ZeroTerminalSNR(ScaledLinearBetas())):
        levels = GRIDS["trailing"].levels(schedule, 50)
        means.append(float(run(Gaussian(0.8, 0.5), x, levels, Euler(), no_noise)))
    assert 0.01 < 0.8 - means[0] < 0.04
    assert means[1] == pytest.approx(0.8, abs=1e-12)


def test_trap_S8_fewer_steps_do_not_leave_more_signal() -> None:
    for steps in (100, 250, 500):
        assert float(LinearBetas(steps)(1.0).alpha) < 0.01
        assert float(ScaledLinearBetas(steps)(1.0).alpha) < 0.07
    unscaled = BetaTable(tuple(torch.linspace(1e-4, 0.02, 100, dtype=torch.float64).tolist()))
    assert float(unscaled(1.0).alpha) == pytest.approx(0.603, abs=1e-3)
    with pytest.warns(UndiffuseWarning, match="60.3"):
        Denoiser(torch.nn.Identity(), unscaled, V())


def test_bad_numbers_are_refused() -> None:
    for bad in ((), (0.0,), (1.5,), (float("nan"),), (-0.1,)):
        with pytest.raises(UndiffuseError, match="betas"):
            BetaTable(bad)
    for shift in (0.0, -1.0, inf, float("nan")):
        with pytest.raises(UndiffuseError, match="shift"):
            Shifted(Flow(), shift)
    with pytest.raises(UndiffuseError, match="sigma_min"):
        VE(0.0, 1.0)
    with pytest.raises(UndiffuseError, match="outside"):
        LinearBetas(10)(0.5)  # scaled by 100, its betas would pass 1


@pytest.mark.parametrize("broken", [VP(-1.0, 20.0), EDM(-80.0), Sigmoid(2.0, 2.0), VP(0.1, float("nan"))])
def test_what_is_no_schedule_is_refused_at_build(broken: Schedule) -> None:
    with pytest.raises(UndiffuseError, match="not a schedule"):
        Denoiser(torch.nn.Identity(), broken, V())
