"""Editing: levels, masks and measurements, each with every solver."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from laws import PLANE, Gaussian, no_noise, normal, run, tensor, worst
from undiffuse import DataSpec, UndiffuseError
from undiffuse.data.spec import units_between
from undiffuse.denoiser import Denoise
from undiffuse.editing import (
    Measurement,
    RePaint,
    dps,
    image_to_image,
    interpolate,
    keep_known,
    paste,
    pigdm,
    spare_streams,
    stop_early,
)
from undiffuse.grids import GRIDS, LogSNR, Uniform
from undiffuse.levels import Estimate, Level
from undiffuse.noise import Streams
from undiffuse.sampling import sample, start
from undiffuse.schedules import SCHEDULES, Cosine, Flow, LinearBetas
from undiffuse.solvers import DDIM, SOLVERS, Euler, Heun

KNOWN = PLANE.draw(8, seed=4)
KEEP = torch.tensor([True, False])
LEVELS = Uniform().levels(Flow(), 10)


def noisy(levels: list[Level], count: int = 8) -> tuple[Tensor, Streams]:
    """Where sampling starts, and its noise."""
    noise = Streams(1, count)
    return start(levels[0], noise.draw((2,), KNOWN)), noise


def seen(denoise: Denoise = PLANE) -> tuple[list[float], Denoise]:
    asked: list[float] = []

    def watched(x: Tensor, level: Level) -> Estimate:
        asked.append(float(level.t.min()))
        return denoise(x, level)

    return asked, watched


# --- Image to image ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=list(SOLVERS))
def test_trap_S23_strength_0_returns_the_input_and_1_ignores_it(solver) -> None:
    same = image_to_image(PLANE, Flow(), KNOWN, 0.0, steps=5, solver=solver)
    assert torch.equal(same, KNOWN)
    assert same is not KNOWN
    free = image_to_image(PLANE, Flow(), KNOWN, 1.0, steps=5, solver=solver, seed=3)
    plain = sample(PLANE, Flow(), (2,), 8, steps=5, solver=solver, seed=3, like=KNOWN)
    assert torch.equal(free, plain)
    between = image_to_image(PLANE, Flow(), KNOWN, 0.5, steps=5, solver=solver, seed=3)
    assert bool(between.isfinite().all())
    assert 0 < float((between - KNOWN).norm(dim=1).mean()) < float((free - KNOWN).norm(dim=1).mean())


def test_trap_S23_strength_1_ignores_the_input_where_signal_is_left_at_the_end() -> None:
    """LinearBetas keep 0.6 % of the amplitude at t = 1; sampling starts without it."""
    a, b = (image_to_image(PLANE, LinearBetas(), x, 1.0, steps=5, solver=Euler()) for x in (KNOWN, -9 * KNOWN))
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("strength", [0.05, 0.3, 0.5, 0.999])
def test_trap_S23_noise_is_added_at_the_level_that_is_asked_first(name: str, strength: float) -> None:
    """The strength is a time, whatever the grid and the number of steps."""
    schedule = LinearBetas()
    asked: list[tuple[Tensor, Level]] = []

    def denoise(x: Tensor, level: Level) -> Estimate:
        asked.append((x, level))
        return PLANE(x, level)

    image_to_image(denoise, schedule, KNOWN, strength, steps=7, solver=Euler(), grid=GRIDS[name], seed=2)
    x, level = asked[0]
    assert float(level.t) == strength
    assert worst(x, schedule(strength).mix(KNOWN, Streams(2, 8).draw((2,), KNOWN))) == 0
    times = [float(level.t) for _, level in asked]
    assert times == sorted(set(times), reverse=True)


def test_little_strength_changes_little() -> None:
    moved = [
        float((image_to_image(PLANE, Flow(), KNOWN, s, steps=50, solver=Heun()) - KNOWN).norm(dim=1).mean())
        for s in (0.02, 0.1, 0.3, 0.6)
    ]
    assert moved == sorted(moved)
    assert moved[0] < 0.05


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan")])
def test_strength_outside_of_0_to_1_is_refused(strength: float) -> None:
    with pytest.raises(UndiffuseError, match="strength must be from 0"):
        image_to_image(PLANE, Flow(), KNOWN, strength, steps=5, solver=Euler())


def test_strength_below_the_first_level_of_a_table_is_refused() -> None:
    with pytest.raises(UndiffuseError, match=r"strength 0.0001 is below 0.001, the first level"):
        image_to_image(PLANE, LinearBetas(), KNOWN, 1e-4, steps=5, solver=Euler())


# --- Stopping early, and between --------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=list(SOLVERS))
def test_stopping_early_returns_the_estimate_of_that_level(solver) -> None:
    """It is the estimate at the level asked for, also where solvers choose levels of their own; and that level is on
    the way to the end."""
    x, noise = noisy(LEVELS)
    asked, denoise = seen()
    middle, e = stop_early(denoise, x, LEVELS, 0.35, solver, noise)
    assert torch.equal(e.x0, PLANE(middle, Flow()(0.35)).x0)
    assert asked[-1] == 0.35
    assert min(asked) >= 0.35 * (1 - 1e-9)
    assert worst(Flow()(0.35).mix(e.x0, e.eps), middle) < 1e-12


def test_stopping_late_is_sampling() -> None:
    x, noise = noisy(LEVELS)
    asked, denoise = seen()
    _, e = stop_early(denoise, x, LEVELS, float(LEVELS[-2].t), Euler(), noise)
    assert len(asked) == len(LEVELS) - 1  # no call is lost
    assert torch.equal(e.x0, run(PLANE, x, LEVELS, Euler()))


@pytest.mark.parametrize("t", [0.0, 1.0, -0.1])
def test_stopping_outside_of_the_trajectory_is_refused(t: float) -> None:
    x, noise = noisy(LEVELS)
    with pytest.raises(UndiffuseError, match="stop"):
        stop_early(PLANE, x, LEVELS, t, Euler(), noise)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=list(SOLVERS))
def test_interpolation_ends_at_the_samples_or_refuses(solver) -> None:
    a, b = normal(2, seed=1), normal(2, seed=2)
    if solver.stochastic:
        with pytest.raises(UndiffuseError, match="adds noise on the way"):
            interpolate(PLANE, LEVELS, a, b, [0.5], solver)
        return
    path = interpolate(PLANE, LEVELS, a, b, [0.0, 0.25, 0.5, 1.0], solver)
    ends = run(PLANE, start(LEVELS[0], torch.stack([a, b])), LEVELS, solver)
    assert worst(path[[0, 3]], ends) < 1e-6  # adaptive solvers choose steps for the batch
    assert bool(path.isfinite().all())


# --- Inpainting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=list(SOLVERS))
def test_trap_X10_kept_elements_are_bit_equal_with_every_solver(solver) -> None:
    x, noise = noisy(LEVELS)
    hard = run(keep_known(PLANE, KNOWN, KEEP), x, LEVELS, solver, noise)
    x, noise = noisy(LEVELS)
    repaint = RePaint(solver, KNOWN, KEEP, spare_streams(1, 8), repeats=3)
    soft = run(PLANE, x, LEVELS, repaint, noise)
    for got in (hard, soft):
        assert torch.equal(got[:, 0], KNOWN[:, 0])
        assert bool(got.isfinite().all())
        assert float((got[:, 1] - KNOWN[:, 1]).abs().min()) > 0


def test_trap_X10_paste_is_bit_equal_in_data_units() -> None:
    spec = DataSpec("image", (1, 4, 4), "float32", -1000.0, 1000.0, *units_between(-1000.0, 1000.0), "HW")
    original = (np.random.default_rng(0).normal(size=(2, 4, 4)) * 300).astype(np.float32)
    keep = np.arange(16).reshape(4, 4) < 8
    through = spec.to_data(spec.to_model(original))
    assert (through != original)[:, keep].any()  # the way through the model rounds
    edited = paste(through + np.float32(1), original, keep)
    assert (edited == original)[:, keep].all()
    assert (edited != original)[:, ~keep].all()
    assert edited.dtype == original.dtype


def test_paste_refuses_other_units() -> None:
    image = np.zeros((1, 2, 2), np.uint8)
    with pytest.raises(UndiffuseError, match="cannot paste"):
        paste(image.astype(np.float32) / 255, image, np.ones((2, 2), bool))
    with pytest.raises(UndiffuseError, match="keep must be boolean"):
        paste(image, image, np.ones((2, 2)))


def test_repaint_draws_from_the_conditional_distribution() -> None:
    """Correlated Gaussian data: the unknown coordinate given the known one has mean rho k and variance 1 - rho^2.
    Replacement alone does not know it; resampling does."""
    from laws import Mixture

    rho = 0.8
    axes = tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
    data = Mixture(tensor([1.0]), torch.zeros(1, 2, dtype=torch.float64), axes[None], tensor([[1 + rho, 1 - rho]]))
    count = 1200
    known = torch.stack([torch.full((count,), 1.5), torch.zeros(count)], 1).double()
    levels = Uniform().levels(Cosine(), 16)

    def go(repeats: int) -> tuple[float, float]:
        noise = Streams(0, count)
        solver = RePaint(DDIM(1.0), known, KEEP, spare_streams(0, count), repeats)
        x = run(data, noise.draw((2,), known), levels, solver, noise)[:, 1]
        return float(x.mean()), float(x.var())

    once, often = go(1), go(12)
    assert abs(often[0] - rho * 1.5) < 0.1
    assert abs(once[0] - rho * 1.5) > 0.3
    assert 0.15 < often[1] < 0.5  # 1 - rho^2 = 0.36, shrunk by ancestral steps


def test_repeats_have_noise_of_their_own() -> None:
    """A noise that is the same whenever the interval is must not be used twice at one level."""
    used: list[tuple[float, float]] = []

    def path(x: Tensor, here: Level, there: Level) -> Tensor:
        used.append((float(here.t), float(there.t)))
        return torch.zeros_like(x)

    x, _ = noisy(LEVELS)
    run(PLANE, x, LEVELS, RePaint(DDIM(1.0), KNOWN, KEEP, spare_streams(1, 8), 4), path)
    assert len(used) == len(set(used)) == len(LEVELS) - 2


def test_spare_streams_are_independent_of_the_samplers_noise() -> None:
    a, b = Streams(5, 64).draw((64,)), spare_streams(5, 64).draw((64,))
    assert abs(float((a * b).mean())) < 4 / 64
    assert torch.equal(spare_streams(5, [3]).draw((64,))[0], b[3])


@pytest.mark.parametrize(
    ("known", "keep", "message"),
    [
        (KNOWN, KEEP.float(), "keep must be boolean"),
        (KNOWN, torch.ones(3, dtype=torch.bool), r"keep of shape \[3\] does not fit"),
        (KNOWN, torch.ones(4, 8, 2, dtype=torch.bool), "does not fit"),
        (KNOWN * torch.nan, KEEP, "must be finite"),
    ],
)
def test_masks_that_do_not_fit_are_refused(known: Tensor, keep: Tensor, message: str) -> None:
    with pytest.raises(UndiffuseError, match=message):
        keep_known(PLANE, known, keep)
    with pytest.raises(UndiffuseError, match=message):
        RePaint(Euler(), known, keep, Streams(0, 8))


# --- Inverse problems -------------------------------------------------------------------------------------------------

MATRIX = tensor([[1.0, 0.5, -1.0], [0.0, 2.0, 0.3]])


def linear(y: Tensor, deviation: float) -> Measurement:
    return Measurement(y, lambda x: x @ MATRIX.T, lambda y: y @ MATRIX, deviation)


@pytest.mark.parametrize("deviation", [0.3, 0.05])
def test_pigdm_samples_the_posterior_of_gaussian_data(deviation: float) -> None:
    """Data N(m, c^2 I), y = A x0 + noise: the posterior is Gaussian with known mean and covariance. The sampler is
    affine in its noise, so that the mean is where 0 goes and the columns of the map are where units go."""
    mean, c = 0.7, 0.5
    y = tensor([[1.0, -0.4]]).expand(4, 2)
    precision = torch.eye(3, dtype=torch.float64) / c**2 + MATRIX.T @ MATRIX / deviation**2
    covariance = precision.inverse()
    want = covariance @ (torch.full((3,), mean / c**2, dtype=torch.float64) + MATRIX.T @ y[0] / deviation**2)
    levels = LogSNR(least=1e-4, most=1e4).levels(Flow(), 160)
    guided = pigdm(Gaussian(mean, c), linear(y, deviation), data_deviation=c)
    z = torch.cat([torch.zeros(1, 3), torch.eye(3)]).double()
    ends = run(guided, start(levels[0], z), levels, Heun())
    columns = (ends[1:] - ends[0]).T
    assert worst(ends[0], want) < 2e-3
    assert worst(columns @ columns.T, covariance) < 2e-2 * float(covariance.abs().max())


def test_dps_is_pigdm_for_an_operator_with_orthonormal_rows() -> None:
    """Where A A^T = I the covariance is a number, and the two are the same."""
    y = normal(8, 1, seed=2)
    pick = Measurement(y, lambda x: x[:, :1], lambda y: torch.cat([y, torch.zeros_like(y)], 1), 0.2)
    x = normal(8, 2, seed=3)
    for level in LEVELS[:-1]:
        a, b = dps(PLANE, pick)(x, level), pigdm(PLANE, pick)(x, level)
        assert worst(a.x0, b.x0) < 1e-9
        assert worst(a.eps, b.eps) < 1e-9
        assert worst(level.mix(a.x0, a.eps), x) < 1e-12  # the pair still explains x


@pytest.mark.parametrize("method", [dps, pigdm])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=list(SOLVERS))
def test_measurements_are_respected_with_every_solver(solver, method) -> None:
    y = KNOWN[:, :1]
    pick = Measurement(y, lambda x: x[:, :1], lambda y: torch.cat([y, torch.zeros_like(y)], 1), 0.05)
    levels = LogSNR(least=0.02).levels(Cosine(), 25)
    x, noise = noisy(levels)
    got = run(method(PLANE, pick), x, levels, solver, noise)
    assert bool(got.isfinite().all())
    x, noise = noisy(levels)
    free = run(PLANE, x, levels, solver, noise)
    assert float((got[:, :1] - y).abs().median()) < 0.25 * float((free[:, :1] - y).abs().median())


def test_operators_that_are_not_what_they_say_are_refused() -> None:
    y, x, level = KNOWN[:, :1], normal(8, 2), Flow()(0.5)
    wrong = Measurement(y, lambda x: x[:, :1], lambda y: torch.cat([torch.zeros_like(y), y], 1))
    with pytest.raises(UndiffuseError, match="not the operator's transpose"):
        pigdm(PLANE, wrong)(x, level)
    with pytest.raises(UndiffuseError, match="must be linear"):
        dps(PLANE, Measurement(y, lambda x: x[:, :1] ** 2))(x, level)
    with pytest.raises(UndiffuseError, match=r"the operator gives \[8, 2\], but y is \[8, 1\]"):
        dps(PLANE, Measurement(y, lambda x: x))(x, level)
    with pytest.raises(UndiffuseError, match="pigdm needs the adjoint"):
        pigdm(PLANE, Measurement(y, lambda x: x[:, :1]))
    with pytest.raises(UndiffuseError, match="at least 0"):
        Measurement(y, lambda x: x[:, :1], deviation=-1.0)
    with pytest.raises(UndiffuseError, match="detaches its input"):
        dps(lambda x, level: PLANE(x.detach(), level), Measurement(y, lambda x: x[:, :1]))(x, level)


@pytest.mark.parametrize("name", SCHEDULES)
def test_edits_are_finite_at_the_ends_of_every_schedule(name: str) -> None:
    schedule = SCHEDULES[name]
    levels = Uniform().levels(schedule, 4)
    x = start(levels[0], normal(8, 2))
    assert torch.equal(run(keep_known(PLANE, KNOWN, KEEP), x, levels, Heun(), no_noise)[:, 0], KNOWN[:, 0])
    pick = Measurement(KNOWN[:, :1], lambda x: x[:, :1], deviation=0.1)
    assert bool(run(dps(PLANE, pick), x, levels, Heun(), no_noise).isfinite().all())
