"""Stochastic solvers reproduce exact moments, and noise is a function of (seed, sample) for all of them."""

from __future__ import annotations

import pytest
import torch

from laws import PLANE, Gaussian, at_ratios, fixed_noise, moments, normal, one, run, worst
from undiffuse.errors import UndiffuseError
from undiffuse.grids import Karras, LogSNR
from undiffuse.levels import Estimate, Level
from undiffuse.noise import Brownian, Streams
from undiffuse.schedules import EDM, VP, Cosine, Flow, Schedule
from undiffuse.solvers import (
    DDIM,
    SOLVERS,
    AnnealedLangevin,
    Consistency,
    DPMpp1,
    DPMpp2M,
    DPMpp3M,
    Euler,
    EulerMaruyama,
    PredictorCorrector,
    SASolver,
    Solver,
    UniPC,
    solver_table,
)

RANDOM = {name: solver for name, solver in SOLVERS.items() if solver.stochastic}


def variance_error(solver: Solver, steps: int, deviation: float = 0.5) -> float:
    mean, variance = moments(solver, Karras().levels(EDM(), steps), Gaussian(0.7, deviation))
    assert mean == pytest.approx(0.7, abs=1e-6)
    return variance / deviation**2 - 1


# Relative errors of the variance for N(0.7, 0.5^2), measured with other code than this.
TARGETS = {
    "dpmpp_1_sde": (DPMpp1(), (-6.4e-1, -4.3e-1, -2.1e-1, -1.1e-1, -5.9e-2)),
    "euler_ancestral": (SOLVERS["euler_ancestral"], (-6.4e-1, -4.3e-1, -2.1e-1, -1.1e-1, -5.9e-2)),
    "euler_maruyama": (EulerMaruyama(), (2.7, 8.1e-1, 2.5e-1, 1.1e-1, 5.5e-2)),
    "dpmpp_2m_sde": (DPMpp2M(eta=1.0), (3.6e-1, 2.4e-1, 3.5e-2, 8.0e-3, 1.9e-3)),
    "sa_solver without corrector": (SASolver(corrections=0), (2.0, 6.7e-1, 6.4e-2, 1.4e-2, 3.3e-3)),
    "dpmpp_2m_heun_sde": (DPMpp2M(heun=True, eta=1.0), (2.0, 6.7e-1, 6.4e-2, 1.4e-2, 3.3e-3)),
}


@pytest.mark.parametrize("name", TARGETS)
def test_law_7_exact_moments(name: str) -> None:
    solver, targets = TARGETS[name]
    for steps, target in zip((10, 20, 50, 100, 200), targets, strict=True):
        assert f"{variance_error(solver, steps):.1e}" == f"{target:.1e}", steps


@pytest.mark.parametrize("solver", [SASolver(), SASolver(3, 3), DPMpp3M(eta=1.0), SASolver(eta=0.5)], ids=str)
def test_law_7_higher_order_is_better(solver: Solver) -> None:
    """Twice the steps, much less than half of the error of the distribution, and small."""
    coarse, fine = (abs(variance_error(solver, steps)) for steps in (100, 200))
    assert fine < 5e-3
    assert fine < coarse / 2.8


def test_D13_first_order_sde_dpm_is_the_ancestral_step() -> None:
    for schedule in (VP(), Flow(), EDM()):
        here, there = schedule(0.7), schedule(0.6)
        x, z = here.mix(PLANE.draw(8), normal(8, 2)), normal(8, 2, seed=3)
        draw = lambda *_, z=z: z  # noqa: E731
        a, b = (one(solver, PLANE, x, here, there, draw)[0] for solver in (DPMpp1(), DDIM(1.0)))
        assert worst(a, b) < 1e-12


@pytest.mark.parametrize("eta", [0.2, 0.5, 1.0])
def test_the_marginal_is_kept_for_any_eta(eta: float) -> None:
    """One-point data: x stays exactly N(alpha mu, sigma^2) whatever the share of new noise."""
    levels = at_ratios(VP(), torch.tensor([5.0, 3.0, 1.0, 0.4], dtype=torch.float64))
    for solver in (DPMpp1(eta), DPMpp2M(eta=eta), DPMpp3M(eta=eta), SASolver(eta=eta), DDIM(eta), EulerMaruyama()):
        mean, variance = moments(solver, levels, Gaussian(0.7, 0.0))
        assert mean == pytest.approx(0.7 * float(levels[-1].alpha), rel=1e-9)
        if not isinstance(solver, EulerMaruyama):  # exact for the others, inflated for it
            assert variance == pytest.approx(float(levels[-1].sigma) ** 2, rel=1e-9)


def test_without_noise_the_stochastic_families_are_the_deterministic_ones() -> None:
    levels, x = LogSNR().levels(EDM(), 12), 80 * normal(8, 2)
    pairs = (
        (DPMpp1(eta=0.0), Euler()),
        (Consistency(gamma=0.0), Euler()),
        (SASolver(2, 0, eta=0.0), DPMpp2M(heun=True)),
        (SASolver(3, 4, eta=0.0), UniPC(3)),
    )
    for a, b in pairs[:3]:
        assert not a.stochastic
        assert worst(run(PLANE, x, levels, a), run(PLANE, x, levels, b)) < 1e-10
    # UniPC's own two-point rules differ at the start only; from there on they are the same method.
    assert worst(run(PLANE, x, levels, pairs[3][0]), run(PLANE, x, levels, pairs[3][1])) < 0.2


# --- Langevin ---------------------------------------------------------------------------------------------------------


def test_langevin_steps_at_a_level_keep_its_distribution() -> None:
    """Many small corrections leave N(alpha m, alpha^2 c^2 + sigma^2) where it is, to the order of the step."""
    data, level = Gaussian(0.7, 0.5), VP()(0.5)
    first = float(level.alpha) * 0.7
    spread = float(level.alpha**2 * 0.25 + level.sigma**2)
    solver = AnnealedLangevin(corrections=1, size=0.01)
    x, z = torch.full((4000, 1), first, dtype=torch.float64), fixed_noise(5)
    for _ in range(600):
        x, _, _ = one(solver, data, x, level, level, z)
    assert float(x.mean()) == pytest.approx(first, abs=0.06)
    assert float(x.var()) == pytest.approx(spread, rel=0.08)


def test_annealed_langevin_finds_the_modes() -> None:
    levels = LogSNR(0.02, 20.0).levels(EDM(20.0), 60)
    x = run(PLANE, 20 * normal(1500, 2), levels, AnnealedLangevin(8, 0.1), fixed_noise(2))
    assert worst(x.mean(0), PLANE.mean()) < 0.15
    near = torch.cdist(x, PLANE.means).argmin(1)
    assert worst(torch.bincount(near).double() / 1500, PLANE.weights) < 0.1


def test_correction_mends_what_the_predictor_leaves() -> None:
    """At few steps the ancestral step has far too little variance; Langevin corrections bring it back."""
    levels, x, data = Karras().levels(EDM(), 30), 80 * normal(100, 200), Gaussian(0.0, 0.5)
    corrected = PredictorCorrector(corrections=4)
    plain, mended = (
        float(run(data, x, levels, solver, fixed_noise(1)).var()) / 0.25 - 1 for solver in (DDIM(1.0), corrected)
    )
    assert plain < -0.25
    assert abs(mended) < abs(plain) / 2


def test_a_langevin_step_is_sized_by_the_samples_own_score() -> None:
    """Trap X1: the norms of one sample, not of the batch."""
    level, x, z = VP()(0.5), normal(3, 2), normal(3, 2, seed=1)
    solver = PredictorCorrector(Euler(), corrections=1, ratio=0.2)
    asked: list[torch.Tensor] = []

    def denoise(x: torch.Tensor, level: Level) -> Estimate:
        asked.append(x)
        return PLANE(x, level)

    one(solver, denoise, x, level, VP()(0.4), lambda *_: z)
    score = -PLANE(x, level).eps / level.sigma
    size = 2 * (0.2 * 2**0.5 / score.norm(dim=1))[:, None] ** 2  # Song et al. 2021, algorithm 4
    size = size.clamp(max=float(level.sigma**2) / 2)
    assert worst(asked[1], x + size * score + (2 * size).sqrt() * z) < 1e-12


# --- Few steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["consistency", "lcm", "tcd"])
def test_a_perfect_consistency_function_samples_exactly(name: str) -> None:
    """Its x0 is a sample: for one point of data, the point, whatever the number of steps."""
    for steps in (1, 2, 4):
        levels = Karras().levels(EDM(), steps)
        x = run(Gaussian(0.7, 0.0), 80 * normal(6, 2), levels, SOLVERS[name], fixed_noise(0))
        assert worst(x, torch.full_like(x, 0.7)) < 1e-12


def test_consistency_sampling_is_algorithm_1() -> None:
    levels, x = Karras().levels(EDM(), 3), 80 * normal(6, 2)
    z = [normal(6, 2, seed=i) for i in range(3)]
    y = PLANE(x, levels[0]).x0
    for i in (1, 2):
        y = PLANE(y + levels[i].sigma * z[i], levels[i]).x0
    draws = iter(z[1:])
    assert worst(run(PLANE, x, levels, Consistency(), lambda *_: next(draws)), y) < 1e-12


@pytest.mark.parametrize("gamma", [0.3, 0.8])
def test_tcd_keeps_the_marginal(gamma: float) -> None:
    mean, variance = moments(Consistency(gamma), [VP()(t) for t in (0.9, 0.6, 0.3)], Gaussian(0.7, 0.0))
    assert variance == pytest.approx(float(VP()(0.3).sigma) ** 2, rel=1e-9)
    assert mean == pytest.approx(0.7 * float(VP()(0.3).alpha), rel=1e-9)


# --- Ends, streams, the table -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [Streams, Brownian])
@pytest.mark.parametrize("name", RANDOM)
def test_trap_X1_a_sample_is_a_function_of_seed_and_number(name: str, noise: type[Streams] | type[Brownian]) -> None:
    levels = Karras().levels(EDM(), 6)

    def samples(*numbers: int) -> torch.Tensor:
        streams = noise(3, numbers)
        return run(Gaussian(), 80 * streams.draw((2, 3)).double(), levels, RANDOM[name], streams)

    together = samples(0, 1, 2, 3)
    assert torch.equal(samples(2), together[2:3])
    assert torch.equal(samples(3, 1), together[[3, 1]])


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("schedule", [VP(), Flow(), EDM(), Cosine()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", RANDOM)
def test_one_and_two_steps_from_pure_noise_are_finite(name: str, schedule: Schedule, steps: int) -> None:
    levels = [schedule(t) for t in ((1.0, 0.0) if steps == 1 else (1.0, 0.5, 0.0))]
    x = normal(4, 2) * float(levels[0].sigma)
    assert bool(run(PLANE, x, levels, RANDOM[name], fixed_noise(0)).isfinite().all())


def test_the_table_lists_every_solver() -> None:
    table = solver_table()
    assert [row["name"] for row in table] == list(SOLVERS)
    assert all(set(row) == {"name", "order", "calls_per_step", "stochastic"} for row in table)
    assert all(type(row["order"]) is int and type(row["calls_per_step"]) is int for row in table)
    assert all(type(row["stochastic"]) is bool for row in table)


@pytest.mark.parametrize(
    "make",
    [
        lambda: UniPC(5),
        lambda: UniPC(0),
        lambda: SASolver(corrections=1),
        lambda: SASolver(points=True),
        lambda: PredictorCorrector(ratio=0.0),
        lambda: AnnealedLangevin(corrections=0),
        lambda: Consistency(gamma=1.5),
    ],
)
def test_wrong_options_are_refused(make) -> None:
    with pytest.raises(UndiffuseError):
        make()
