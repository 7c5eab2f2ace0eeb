"""The arithmetic that the solvers share, against other implementations of the same integrals; and adaptive steps."""

from __future__ import annotations

from itertools import pairwise
from math import exp, inf

import pytest
import torch
from scipy.integrate import quad, solve_ivp
from scipy.stats import beta

from laws import PLANE, at_ratios, no_noise, normal, run, worst
from undiffuse.errors import UndiffuseError
from undiffuse.grids import GRIDS, Beta, FlowPower, Karras, Uniform
from undiffuse.levels import Estimate, Level
from undiffuse.sampling import default_sampling, trajectory
from undiffuse.schedules import EDM, SCHEDULES, VP, Cosine, Flow
from undiffuse.solvers import SOLVERS, BogackiShampine, DormandPrince
from undiffuse.solvers.runge_kutta import BOGACKI_SHAMPINE, DORMAND_PRINCE, MIDPOINT, RK4, Tableau
from undiffuse.solvers.weights import exponential_moments, plain_moments, quadrature

SURE = {name: solver for name, solver in SOLVERS.items() if not solver.stochastic}


@pytest.mark.parametrize("z", [0.0, 1e-12, -1e-6, 0.3, -0.999, 1.001, -3.0, 5.0, -40.0])
def test_exponential_moments_are_the_integrals(z: float) -> None:
    for k, m in enumerate(exponential_moments(z, 5)):
        assert m == pytest.approx(
            quad(lambda u, k=k: exp(z * (1 - u)) * u**k, 0, 1, epsabs=0, epsrel=1e-13)[0], rel=1e-11
        )


def test_exponential_moments_meet_where_the_formula_changes() -> None:
    for a, b in zip(exponential_moments(1 - 1e-15, 5), exponential_moments(1.0, 5), strict=True):
        assert a == pytest.approx(b, rel=1e-13)


def test_quadrature_is_exact_for_polynomials() -> None:
    nodes = [0.0, -0.7, -1.1, -3.0, 1.0]
    weights = quadrature(nodes, plain_moments(5))
    for k in range(5):
        assert sum(w * u**k for w, u in zip(weights, nodes, strict=True)) == pytest.approx(1 / (k + 1), rel=1e-12)
    assert [24 * w for w in quadrature([0.0, -1.0, -2.0, -3.0], plain_moments(4))] == pytest.approx([55, -59, 37, -9])


@pytest.mark.parametrize("tableau", [MIDPOINT, RK4, BOGACKI_SHAMPINE, DORMAND_PRINCE])
def test_tableaus_are_consistent(tableau: Tableau) -> None:
    for node, row in zip(tableau.nodes[1:], tableau.rows, strict=True):
        assert sum(row) == pytest.approx(node, abs=1e-14)
    assert sum(tableau.weights) == pytest.approx(1)
    if tableau.embedded:
        assert sum(tableau.embedded) == pytest.approx(1)
        assert tableau.rows[-1] == pytest.approx(tableau.weights[:-1])  # the last stage is at the new point


# --- Ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_law_3_one_and_two_steps_are_finite_on_every_schedule(schedule: str, steps: int) -> None:
    levels = Uniform().levels(SCHEDULES[schedule], steps)
    x = normal(4, 2) * float(levels[0].sigma)
    for name, solver in SURE.items():
        assert bool(run(PLANE, x, levels, solver, no_noise).isfinite().all()), name


@pytest.mark.parametrize("name", [name for name, solver in SURE.items() if not solver.adaptive])
def test_law_3_four_steps_with_a_history_that_begins_in_pure_noise(name: str) -> None:
    """alpha = 0 among the past points: finite, and not worse than Euler by much."""
    levels, x = Uniform().levels(Cosine(), 12), normal(32, 2)
    fine = run(PLANE, x, Uniform().levels(Cosine(), 2000), SOLVERS["heun"], no_noise)
    error = (run(PLANE, x, levels, SURE[name], no_noise) - fine).norm(dim=1).median()
    euler = (run(PLANE, x, levels, SOLVERS["euler"], no_noise) - fine).norm(dim=1).median()
    assert float(error) < 1.2 * float(euler)


# --- Adaptive ---------------------------------------------------------------------------------------------------------


def frames(solver: DormandPrince | BogackiShampine, x: torch.Tensor, levels: list[Level]):
    *_, last = trajectory(PLANE, x, levels, solver, no_noise)
    return last


@pytest.mark.parametrize("kind", [DormandPrince, BogackiShampine])
def test_a_smaller_tolerance_means_a_smaller_error_for_more_calls(kind: type[DormandPrince]) -> None:
    x, levels = normal(32, 2), [Flow()(1.0), Flow()(0.0)]
    fine = frames(DormandPrince(1e-9, least=1e-6), x, levels).x
    rough = [frames(kind(tolerance), x, levels) for tolerance in (1e-2, 1e-3, 1e-4, 1e-5)]
    errors = [float((frame.x - fine).norm(dim=1).median()) for frame in rough]
    assert all(a > b for a, b in pairwise(errors))
    assert errors[-1] < 1e-4
    assert all(a.calls < b.calls for a, b in pairwise(rough))


def test_dormand_prince_agrees_with_scipy() -> None:
    """The same problem, scipy's RK45 at a tolerance far below: in flow time, dX/dtau = eps - x0."""
    x, least = normal(6, 2), 1e-3
    got = frames(DormandPrince(1e-9), x, [Flow()(1.0), Flow()(0.01)]).x

    def slope(t: float, y) -> object:
        e = PLANE(torch.from_numpy(y).reshape(6, 2), Flow()(t))
        return (e.eps - e.x0).flatten().numpy()

    exact = solve_ivp(slope, (1.0, 0.01), x.flatten().numpy(), "RK45", rtol=1e-12, atol=1e-12).y[:, -1]
    assert worst(got, torch.from_numpy(exact).reshape(6, 2)) < 1e-7
    assert least == DormandPrince().least


def test_trap_X1_steps_are_chosen_for_each_sample_alone() -> None:
    x, levels = normal(6, 2), [VP()(1.0), VP()(0.3), VP()(0.0)]
    together = frames(DormandPrince(), x, levels)
    calls = []
    for i in range(6):
        alone = frames(DormandPrince(), x[i : i + 1], levels)
        assert worst(alone.x, together.x[i : i + 1]) < 1e-12
        calls.append(alone.calls)
    assert len(set(calls)) > 1
    assert max(calls) <= together.calls


def test_an_infinite_tolerance_takes_the_grid_as_it_is() -> None:
    levels = at_ratios(VP(), torch.logspace(1, -1, 8, dtype=torch.float64))
    assert frames(DormandPrince(inf), normal(3, 2), levels).calls == 7 * 7


def test_adaptive_solvers_refuse_what_cannot_work() -> None:
    with pytest.raises(UndiffuseError, match="tolerance"):
        DormandPrince(tolerance=0.0)
    with pytest.raises(UndiffuseError, match="last sigma/alpha"):
        BogackiShampine(least=0.0)
    broken = lambda x, level: Estimate(x * float("nan"), x)  # noqa: E731
    with pytest.raises(UndiffuseError, match="not finite"):
        run(broken, normal(2, 2), [VP()(0.9), VP()(0.5)], DormandPrince(), no_noise)


# --- Grids ------------------------------------------------------------------------------------------------------------


def test_flow_uniform_is_even_in_flow_time_on_every_schedule() -> None:
    for schedule in (VP(), EDM(), Cosine(), Flow()):
        levels = GRIDS["flow_uniform"].levels(schedule, 9)[:-1]
        times = torch.stack([level.sigma / (level.alpha + level.sigma) for level in levels])
        assert float((times.diff() - times.diff().mean()).abs().max()) < 2e-3  # the first time is t = 1 itself
        assert float((times.diff()[1:] - times.diff()[1:].mean()).abs().max()) < 1e-9


def test_a_wide_flow_power_grid_is_karras() -> None:
    a = FlowPower(7.0, 1e9, 0.002, 80.0).times(EDM(), 12)
    assert worst(a, Karras().times(EDM(), 12)) < 1e-7


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (0.3, 0.9), (1.0, 1.0), (2.0, 5.0)])
def test_beta_times_are_the_quantiles(a: float, b: float) -> None:
    got = Beta(a, b).nodes(VP(), 40)
    assert worst(got, torch.from_numpy(beta.ppf(torch.arange(40, 0, -1).double().numpy() / 40, a, b))) < 1e-9


def test_the_shifted_grid_is_stable_diffusion_3s() -> None:
    t = Uniform().times(Flow(), 10)
    assert worst(GRIDS["shifted"].times(Flow(), 10), 3 * t / (1 + 2 * t)) < 1e-12
    moved = GRIDS["shifted"].levels(VP(), 10)
    plain = Uniform().levels(VP(), 10)
    for a, b in zip(moved[5:-1], plain[5:-1], strict=True):
        assert float(a.sigma / a.alpha) == pytest.approx(3 * float(b.sigma / b.alpha), rel=0.05)


@pytest.mark.parametrize("calls", [1, 2, 5, 8, 10, 15, 20, 50, 100])
def test_the_default_makes_exactly_so_many_calls(calls: int) -> None:
    solver, grid = default_sampling(calls)
    *_, last = trajectory(PLANE, normal(4, 2), grid.levels(VP(), calls), solver, no_noise)
    assert last.calls == calls
    assert bool(last.x.isfinite().all())


@pytest.mark.parametrize("calls", [0, -1, True, 2.0])
def test_the_default_refuses_what_is_no_number_of_calls(calls: int) -> None:
    with pytest.raises(UndiffuseError, match="calls"):
        default_sampling(calls)
