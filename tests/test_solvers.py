"""Chapter 7: every law over every solver of the registry. A solver that is added is enrolled by its dict entry."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import cos, sin

import pytest
import torch

from laws import (
    PLANE,
    Gaussian,
    Mixture,
    at_ratios,
    fixed_noise,
    law_last_step,
    law_order,
    law_rows,
    moments,
    no_noise,
    normal,
    one,
    run,
    tensor,
    unadaptive,
    worst,
)
from undiffuse.errors import UndiffuseError
from undiffuse.grids import Karras, LogSNR, Uniform
from undiffuse.levels import Estimate, Level
from undiffuse.noise import Streams
from undiffuse.sampling import trajectory
from undiffuse.schedules import EDM, VP, Flow, LinearBetas, Schedule
from undiffuse.solvers import DDIM, SOLVERS, Churn, DDPMLarge, DPMpp2M, Euler, Heun, Solver
from undiffuse.solvers.ddim import forward_variance, posterior_variance

SURE = {name: solver for name, solver in SOLVERS.items() if not solver.stochastic}
RANDOM = {name: solver for name, solver in SOLVERS.items() if solver.stochastic}
every = pytest.mark.parametrize("name", SOLVERS)
every_sure = pytest.mark.parametrize("name", SURE)
every_random = pytest.mark.parametrize("name", RANDOM)


# --- Laws 2, 3, 6 -----------------------------------------------------------------------------------------------------


@every_sure
def test_law_2_order_on_vp(name: str) -> None:
    law_order(SURE[name], VP())


@pytest.mark.parametrize("name", [name for name in SURE if SURE[name].calls <= 2])
def test_law_2_order_on_flow(name: str) -> None:
    law_order(SURE[name], Flow())


@every
@pytest.mark.parametrize("schedule", [VP(), Flow(), EDM()], ids=lambda s: type(s).__name__)
def test_trap_S12_S13_the_last_step_is_the_denoised_estimate(name: str, schedule: Schedule) -> None:
    law_last_step(SOLVERS[name], schedule(0.4))
    if schedule(1.0).alpha > 0 or not isinstance(SOLVERS[name], Churn):
        law_last_step(SOLVERS[name], schedule(1.0))


@every
def test_a_step_takes_levels_of_each_sample(name: str) -> None:
    law_rows(SOLVERS[name], VP())


@every
def test_a_batch_in_which_only_some_samples_end_is_refused_or_right(name: str) -> None:
    here, there = VP()(tensor(0.5, 0.5)), VP()(tensor(0.3, 0.0))
    x, z = normal(2, 2), normal(2, 2, seed=1)
    try:
        got, _, _ = one(SOLVERS[name], PLANE, x, here, there, lambda *_: z)
    except UndiffuseError:
        with pytest.raises(UndiffuseError, match="step them apart"):
            one(SOLVERS[name], PLANE, x, here, there, lambda *_: z)
        return
    for i in range(2):
        draw = z[i : i + 1]
        a = one(SOLVERS[name], PLANE, x[i : i + 1], VP()(0.5), VP()(float(there.t[i])), lambda *_, z=draw: z)[0]
        assert worst(got[i : i + 1], a) < 1e-12


@every
def test_law_6_sample_i_depends_on_seed_and_i_alone(name: str) -> None:
    """Trap X1 at the solver's own draws: any batch, any order, the same bits."""
    levels = Karras().levels(EDM(), 5)

    def samples(*numbers: int) -> torch.Tensor:
        noise = Streams(7, numbers)
        return run(Gaussian(), noise.draw((3, 5)) * 80, levels, SOLVERS[name], noise)

    together = samples(0, 1, 2, 3, 4)
    assert torch.equal(samples(3), together[3:4])
    assert torch.equal(samples(4, 0, 2), together[[4, 0, 2]])
    assert not torch.equal(together[0], together[1])


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_type_of_x_is_kept(name: str, dtype: torch.dtype) -> None:
    levels = [VP()(t) for t in (0.6, 0.4, 0.3, 0.2, 0.0)]
    x = normal(2, 2, 3)
    exact = run(Gaussian(), x, levels, SOLVERS[name], fixed_noise(0))
    z = fixed_noise(0)
    got = run(Gaussian(), x.to(dtype), levels, SOLVERS[name], lambda x, *a: z(x.double(), *a).to(x.dtype))
    assert got.dtype == dtype
    assert worst(got.double(), exact) < {torch.float16: 4e-3, torch.bfloat16: 4e-2, torch.float32: 1e-5}[dtype]


@every
def test_a_solver_is_a_value(name: str) -> None:
    """Frozen, equal to its copy, no state between runs: the same bits twice, also when two runs take turns."""
    solver, levels = SOLVERS[name], [VP()(t) for t in (0.9, 0.6, 0.4, 0.2, 0.0)]
    assert solver == replace(solver)  # type: ignore[type-var]
    assert hash(solver) == hash(replace(solver))  # type: ignore[type-var]
    with pytest.raises(AttributeError):
        solver.order = 7  # type: ignore[misc]
    x = normal(3, 2)
    first = run(PLANE, x, levels, solver, fixed_noise(1))
    turns = [trajectory(PLANE, x, levels, solver, fixed_noise(1)) for _ in range(2)]
    for a, b in zip(*turns, strict=True):
        assert torch.equal(a.x, b.x)
    assert torch.equal(a.x, first)
    assert torch.equal(x, normal(3, 2))  # nobody wrote into x


@every
def test_trap_S21_calls_are_what_is_declared(name: str) -> None:
    solver, levels = SOLVERS[name], Uniform().levels(VP(), 9)
    asked = []

    def counting(x: torch.Tensor, level: Level) -> Estimate:
        asked.append(level)
        return PLANE(x, level)

    frames = list(trajectory(counting, normal(3, 2), levels, solver, fixed_noise(1)))
    assert frames[-1].calls == len(asked)
    each = [b.calls - a.calls for a, b in pairwise(frames)]
    if not solver.adaptive:
        assert each[4:-1] == [solver.calls] * 4  # a start may take more, the last step less
        assert each[-1] <= solver.calls


def test_heun_takes_2n_minus_1_calls() -> None:
    *_, last = trajectory(PLANE, normal(3, 2), Uniform().levels(VP(), 9), Heun(), no_noise)
    assert last.calls == 17


@every_sure
def test_a_deterministic_solver_draws_no_noise(name: str) -> None:
    run(PLANE, normal(3, 2), Uniform().levels(VP(), 5), SURE[name], no_noise)  # the noise raises


@every
def test_gradients_flow_through_a_step(name: str) -> None:
    x = normal(2, 2).requires_grad_()
    here, middle, there = (VP()(t) for t in (0.7, 0.5, 0.3))
    z = fixed_noise(0)
    y, memory, _ = one(SOLVERS[name], PLANE, x, here, middle, z)
    y, _, _ = one(SOLVERS[name], PLANE, y, middle, there, z, memory)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert bool(gradient.isfinite().all())
    assert float(gradient.abs().max()) > 0


# --- Exact solutions (numerics D) -------------------------------------------------------------------------------------


@every_sure
def test_D6_one_point_data_is_hit_on_any_grid(name: str) -> None:
    point = Mixture(tensor([1.0]), tensor([[0.3, -0.8]]), torch.eye(2, dtype=torch.float64)[None], tensor([[0.0, 0.0]]))
    levels = at_ratios(VP(), tensor(80.0, 3.0, 2.9, 0.4, 0.01))
    x = run(point, levels[0].mix(point.means.expand(5, 2), normal(5, 2)), [*levels, VP()(0.0)], SURE[name])
    assert worst(x, point.means.expand(5, 2)) < 1e-9


@every_sure
def test_D7_gaussian_data_flows_by_the_closed_form(name: str) -> None:
    """y sqrt((c^2 + s1^2)/(c^2 + s0^2)) in y = x/alpha; the bound falls with the order."""
    c, levels = 0.5, at_ratios(VP(), torch.logspace(1, -2, 201, dtype=torch.float64))
    y = normal(6, 1) * 10
    got = run(Gaussian(0.0, c), levels[0].alpha * y, levels, SURE[name]) / levels[-1].alpha
    exact = y * ((c**2 + 1e-4) / (c**2 + 100.0)) ** 0.5
    assert worst(got, exact) < {1: 0.1, 2: 2e-3}.get(SURE[name].order, 5e-4)


@every_sure
def test_D8_rotating_data_and_noise_rotates_the_sample(name: str) -> None:
    turn = tensor([[cos(0.7), -sin(0.7)], [sin(0.7), cos(0.7)]])
    turned = Mixture(PLANE.weights, PLANE.means @ turn.T, turn @ PLANE.axes, PLANE.variances)
    levels, x = Uniform().levels(VP(), 6), normal(8, 2)
    solver = unadaptive(SURE[name])  # a tolerance for each element is none for a rotated one
    a, b = run(PLANE, x, levels, solver) @ turn.T, run(turned, x @ turn.T, levels, solver)
    assert worst(a, b) < 1e-9


@pytest.mark.parametrize("name", [n for n in SURE if "runge_kutta" not in type(SURE[n]).__module__])
def test_D9_scaling_data_and_noise_levels_scales_the_sample(name: str) -> None:
    k = 3.0  # flow time, in which the Runge-Kutta methods step, is not a ratio; all others are free of units
    larger = Mixture(PLANE.weights, PLANE.means * k, PLANE.axes, PLANE.variances * k * k)
    ratios, x = tensor(10.0, 3.0, 1.0, 0.3, 0.1), normal(8, 2) * 10
    a = run(PLANE, x, at_ratios(EDM(), ratios), SURE[name])
    b = run(larger, x * k, at_ratios(EDM(300.0), ratios * k), SURE[name])
    assert worst(a * k, b) < 1e-9


@every_sure
def test_D10_the_order_of_the_batch_does_not_matter(name: str) -> None:
    levels, x = Uniform().levels(VP(), 6), normal(8, 2)
    back = torch.arange(7, -1, -1)
    assert worst(run(PLANE, x[back], levels, SURE[name]), run(PLANE, x, levels, SURE[name])[back]) < 1e-12


@pytest.mark.parametrize("solver", [Euler(), DDIM(), DPMpp2M()], ids=str)
def test_D4_log_snr_solvers_do_not_depend_on_the_schedule(solver: Solver) -> None:
    ratios = tensor(20.0, 5.0, 2.0, 0.8, 0.3, 0.1)
    y = normal(8, 2) * 20
    ends = []
    for schedule in (VP(), EDM(), Flow()):
        levels = at_ratios(schedule, ratios)
        ends.append(run(PLANE, y * levels[0].alpha, levels, solver) / levels[-1].alpha)
    assert worst(ends[0], ends[1]) < 1e-9
    assert worst(ends[0], ends[2]) < 1e-9


def test_law_4_D2_D3_euler_is_ddim_is_flow_euler_is_edm_euler() -> None:
    ratios, y = tensor(20.0, 5.0, 2.0, 0.8, 0.3, 0.1), normal(8, 2) * 20

    def by_us(solver: Solver, schedule: Schedule) -> torch.Tensor:
        levels = at_ratios(schedule, ratios)
        return run(PLANE, y * levels[0].alpha, levels, solver) / levels[-1].alpha

    edm, flow, ddim = y, y / (1 + ratios[0]), y / (1 + ratios[0] ** 2).sqrt()
    for s, s2 in pairwise(ratios):
        there = EDM()
        edm = edm + (s2 - s) * (edm - PLANE(edm, Level(s, tensor(1.0), s, there)).x0) / s  # Karras et al., algorithm 1
        t, t2 = s / (1 + s), s2 / (1 + s2)
        e = PLANE(flow, Level(t, 1 - t, t, there))
        flow = flow + (t2 - t) * (e.eps - e.x0)  # rectified flow
        bar, bar2 = 1 / (1 + s * s), 1 / (1 + s2 * s2)
        eps = PLANE(ddim, Level(s, bar.sqrt(), (1 - bar).sqrt(), there)).eps
        ddim = bar2.sqrt() * (ddim - (1 - bar).sqrt() * eps) / bar.sqrt() + (1 - bar2).sqrt() * eps  # Song et al., 12
    last = ratios[-1]
    for hand in (edm, flow * (1 + last), ddim * (1 + last**2).sqrt()):
        for solver in (Euler(), DDIM()):
            for schedule in (VP(), Flow(), EDM()):
                assert worst(by_us(solver, schedule), hand) < 1e-9


def test_D5_ddim_on_a_variance_preserving_schedule_is_a_rotation() -> None:
    here, there = VP()(0.7), VP()(0.4)
    x = normal(8, 2)
    e = PLANE(x, here)
    v = here.alpha * e.eps - here.sigma * e.x0
    angle = torch.atan2(here.sigma, here.alpha) - torch.atan2(there.sigma, there.alpha)
    got, _, _ = one(DDIM(), PLANE, x, here, there, no_noise)
    assert worst(got, angle.cos() * x - angle.sin() * v) < 1e-12


def test_D4b_heun_is_the_one_of_edm_written_by_hand() -> None:
    s = tensor(3.0, 1.0, 0.4, 0.1)
    x = y = PLANE.draw(8) + 3 * normal(8, 2)
    for a, b in pairwise(s):
        d = (x - PLANE(x, Level(a, tensor(1.0), a, EDM())).x0) / a
        guess = x + (b - a) * d
        d2 = (guess - PLANE(guess, Level(b, tensor(1.0), b, EDM())).x0) / b
        x = x + (b - a) * (d + d2) / 2
    assert worst(run(PLANE, y, at_ratios(EDM(), s), Heun()), x) < 1e-11


# --- Noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", [VP(), Flow(), EDM()], ids=lambda s: type(s).__name__)
def test_trap_S17_ddim_noise_is_eq_16_and_keeps_the_marginal(eta: float, schedule: Schedule) -> None:
    here, there = schedule(0.7), schedule(0.4)
    x, one_draw = normal(4, 2), torch.ones(4, 2, dtype=torch.float64)
    got, _, _ = one(DDIM(eta), PLANE, x, here, there, lambda *_: one_draw)
    quiet, _, _ = one(DDIM(eta), PLANE, x, here, there, lambda *_: 0 * one_draw)
    deviation = float((got - quiet)[0, 0])
    # eq. 16 for the variance-preserving pair with the same signal-to-noise ratios
    bar, bar2 = (1 / (1 + (level.sigma / level.alpha) ** 2) for level in (here, there))
    expected = eta * ((1 - bar2) / (1 - bar)).sqrt() * (1 - bar / bar2).sqrt() * there.alpha / bar2.sqrt()
    assert deviation == pytest.approx(float(expected), rel=1e-12, abs=1e-14)
    # the true x0 and eps go to alpha' x0 + sigma' eps in distribution: direction^2 + noise^2 = sigma'^2
    e = PLANE(x, here)
    direction = float(((quiet - there.alpha * e.x0) / e.eps)[0, 0])
    assert direction**2 + deviation**2 == pytest.approx(float(there.sigma**2), rel=1e-9)
    # D11, D12: k-diffusion's ancestral step in s = sigma/alpha
    s, t = here.sigma / here.alpha, there.sigma / there.alpha
    up = eta * (t**2 * (s**2 - t**2) / s**2).sqrt()
    assert deviation == pytest.approx(float(there.alpha * up), rel=1e-9, abs=1e-12)
    assert direction == pytest.approx(float(there.alpha * (t**2 - up**2).sqrt()), rel=1e-9)


def test_trap_S17_the_known_number() -> None:
    """From label 999 to 949 of DDPM's table the noise of eta = 1 has deviation 0.792, not 1."""
    here, there = LinearBetas()(1.0), LinearBetas()(0.95)
    assert float(posterior_variance(here, there).sqrt()) == pytest.approx(0.792, abs=5e-4)


def test_law_4_ddim_eta_1_with_all_steps_is_ddpms_posterior() -> None:
    """Ho et al. 2020, eq. 6 and 7, from the betas."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = (1 - betas).cumprod(0)
    schedule, x, z = LinearBetas(), normal(4, 2), normal(4, 2, seed=1)
    for i in (999, 500, 20, 1):
        here, there = schedule(tensor((i + 1) / 1000)), schedule(tensor(i / 1000))
        x0 = PLANE(x, here).x0
        mean = bar[i - 1].sqrt() * betas[i] / (1 - bar[i]) * x0
        mean = mean + (1 - betas[i]).sqrt() * (1 - bar[i - 1]) / (1 - bar[i]) * x
        small = betas[i] * (1 - bar[i - 1]) / (1 - bar[i])
        assert worst(one(DDIM(1.0), PLANE, x, here, there, lambda *_: z)[0], mean + small.sqrt() * z) < 1e-10
        assert worst(one(DDPMLarge(), PLANE, x, here, there, lambda *_: z)[0], mean + betas[i].sqrt() * z) < 1e-10
        assert float(forward_variance(here, there)) == pytest.approx(float(betas[i]), rel=1e-9)
        assert float(posterior_variance(here, there)) <= float(betas[i])  # C9
        # C8: the posterior mean and variance reproduce the marginal
        c1, c2 = bar[i - 1].sqrt() * betas[i] / (1 - bar[i]), (1 - betas[i]).sqrt() * (1 - bar[i - 1]) / (1 - bar[i])
        assert float(c1 + c2 * bar[i].sqrt()) == pytest.approx(float(there.alpha), rel=1e-9)
        assert float(c2**2 * (1 - bar[i]) + small) == pytest.approx(float(there.sigma**2), rel=1e-9)


def test_the_learned_variance_lies_between_the_two_of_ddpm() -> None:
    here, there = VP()(0.5), VP()(0.4)
    x, z = normal(4, 2), normal(4, 2, seed=1)

    def saying(v: float):
        def denoise(x: torch.Tensor, level: Level) -> Estimate:
            e = PLANE(x, level)
            return Estimate(e.x0, e.eps, torch.full_like(x, v))

        return one(SOLVERS["ddpm_learned"], denoise, x, here, there, lambda *_: z)[0]

    small = one(DDIM(1.0), PLANE, x, here, there, lambda *_: z)[0]
    large = one(DDPMLarge(), PLANE, x, here, there, lambda *_: z)[0]
    assert worst(saying(0.0), small) < 1e-12
    assert worst(saying(1.0), large) < 1e-12
    mean = small - posterior_variance(here, there).sqrt() * z
    middle = (posterior_variance(here, there) * forward_variance(here, there)) ** 0.25
    assert worst(saying(0.5), mean + middle * z) < 1e-12
    with pytest.raises(UndiffuseError, match="learned variance"):
        one(SOLVERS["ddpm_learned"], lambda x, level: Estimate(x, x), x, here, there, lambda *_: z)


# Exact moments for N(0.7, 0.5^2) on a Karras grid and a last step to 0; relative errors of the variance, measured
# independently of this code.
KNOWN = {
    "ddim": {10: -4.7e-1, 20: -2.6e-1, 50: -1.1e-1, 100: -5.6e-2, 200: -2.8e-2},
    "ddpm": {10: -6.4e-1, 20: -4.3e-1, 50: -2.1e-1, 100: -1.1e-1, 200: -5.9e-2},
    "euler_maruyama": {10: 2.7, 20: 8.1e-1, 50: 2.5e-1, 100: 1.1e-1, 200: 5.5e-2},
    "sde_dpmpp_2m": {10: 3.6e-1, 20: 2.4e-1, 50: 3.5e-2, 100: 8.0e-3, 200: 1.9e-3},
}


def variance_error(solver: Solver, steps: int) -> float:
    mean, variance = moments(solver, Karras().levels(EDM(), steps), Gaussian(0.7, 0.5))
    assert mean == pytest.approx(0.7, abs=1e-6), f"{solver}: the mean is {mean}, not 0.7"
    return variance / 0.25 - 1


@pytest.mark.parametrize("name", [name for name in KNOWN if name in SOLVERS])
def test_law_7_the_known_moments(name: str) -> None:
    for steps, expected in KNOWN[name].items():
        assert f"{variance_error(SOLVERS[name], steps):.1e}" == f"{expected:.1e}"


BY_SAMPLING = ["predictor_corrector", "annealed_langevin"]  # not affine in their noise, or not better with more steps


@pytest.mark.parametrize(
    "name", [n for n in RANDOM if n != "churn" and n not in BY_SAMPLING and not RANDOM[n].distilled]
)
def test_law_7_stochastic_solvers_converge_to_the_distribution(name: str) -> None:
    coarse, fine = (abs(variance_error(RANDOM[name], steps)) for steps in (50, 150))
    assert fine < 0.12
    assert fine < coarse * 3 ** -(RANDOM[name].order - 0.3) or fine < 1e-3


@pytest.mark.parametrize("name", [name for name in BY_SAMPLING if name in RANDOM])
def test_law_7_langevin_solvers_reach_the_distribution(name: str) -> None:
    levels = LogSNR().levels(EDM(), 300)
    x = run(Gaussian(0.7, 0.5), 80 * normal(300, 20), levels, RANDOM[name], fixed_noise(1))
    assert float(x.mean()) == pytest.approx(0.7, abs=0.04)
    assert float(x.std()) == pytest.approx(0.5, rel=0.15)


def test_law_7_churn_keeps_the_distribution() -> None:
    """Adding noise and removing it again costs no more than the inner solver's own error."""
    for amount in (0.05, 0.1):
        assert abs(variance_error(Churn(amount=amount, deviation=1.0), 60)) < 0.02
    assert variance_error(Churn(amount=0.1, deviation=1.05), 60) > 0.02  # S_noise does inflate


def test_churn_0_is_the_inner_solver_and_draws_nothing() -> None:
    levels, x = Uniform().levels(VP(), 6), normal(4, 2)
    assert not Churn(amount=0.0).stochastic
    assert torch.equal(run(PLANE, x, levels, Churn(amount=0.0), no_noise), run(PLANE, x, levels, Heun(), no_noise))


def test_churn_is_algorithm_2_of_edm() -> None:
    s = tensor(20.0, 3.0, 1.0, 0.4, 0.03)
    x = y = normal(8, 2) * 20
    z = [normal(8, 2, seed=i) for i in range(4)]
    for i, (a, b) in enumerate(pairwise(s)):
        hat = a * 1.3 if 0.05 <= a <= 10 else a
        x = x + (hat**2 - a**2).sqrt() * 1.007 * z[i]
        d = (x - PLANE(x, Level(hat, tensor(1.0), hat, EDM())).x0) / hat
        guess = x + (b - hat) * d
        x = x + (b - hat) * (d + (guess - PLANE(guess, Level(b, tensor(1.0), b, EDM())).x0) / b) / 2
    draws = iter(z[1:])  # nothing is drawn above `high`
    solver = Churn(Heun(), 0.3, 0.05, 10.0, 1.007)
    assert worst(run(PLANE, y, at_ratios(EDM(), s), solver, lambda *_: next(draws)), x) < 1e-10


# --- Inversion --------------------------------------------------------------------------------------------------------


def test_trap_S3_inverting_and_sampling_again_returns_the_input() -> None:
    """From data up to noise and back; the error falls with the number of steps, first order (numerics F1)."""
    x, errors = PLANE.draw(64), []
    for steps in (50, 100, 200, 2000):
        ratios = torch.logspace(-2, 1, steps + 1, dtype=torch.float64)
        up = at_ratios(VP(), ratios)
        there = run(PLANE, x * up[0].alpha, up, Euler(), no_noise)
        back = run(PLANE, there, up[::-1], Euler(), no_noise) / up[0].alpha
        errors.append(float((back - x).norm(dim=1).median()))
    assert errors[-1] < 2e-3
    for coarse, fine in pairwise(errors[:3]):
        assert 1.6 < coarse / fine < 2.6


def test_heun_inverts_to_a_thousandth() -> None:
    x = PLANE.draw(64)
    up = at_ratios(VP(), torch.logspace(-2, 1, 401, dtype=torch.float64))
    there = run(PLANE, x * up[0].alpha, up, Heun(), no_noise)
    assert float((run(PLANE, there, up[::-1], Heun(), no_noise) / up[0].alpha - x).norm(dim=1).median()) < 1e-3


@every_random
def test_a_stochastic_solver_does_not_go_up(name: str) -> None:
    with pytest.raises(UndiffuseError, match="draws noise"):
        run(PLANE, normal(2, 2), [VP()(0.2), VP()(0.5)], RANDOM[name], fixed_noise(0))


# --- Options ----------------------------------------------------------------------------------------------------------


def test_trap_S14_options_belong_to_one_solver_and_unknown_ones_raise() -> None:
    with pytest.raises(TypeError):
        Euler(eta=1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        DDIM(set_alpha_to_one=False)  # type: ignore[call-arg]
    with pytest.raises(UndiffuseError, match="eta"):
        DDIM(1.5)
    assert DDIM().eta == 0  # noise only for those who ask
