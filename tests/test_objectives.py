"""Chapter 9: the loss, which is the same one for every prediction."""

from __future__ import annotations

from math import log

import pytest
import torch
from torch import Tensor, nn

from laws import PLANE, ExactNetwork, Gaussian, normal, tensor, worst
from undiffuse.denoiser import INPUT_SCALES, LABELS, Denoiser
from undiffuse.errors import UndiffuseError
from undiffuse.grids import Uniform
from undiffuse.levels import Estimate, Level
from undiffuse.objectives import (
    TIMES,
    WEIGHTS,
    EDMWeight,
    LogitNormalTimes,
    LogNormalTimes,
    MinSNR,
    Sigmoid,
    Stratified,
    UniformTimes,
    Unit,
    Weight,
    loss,
    offset_noise,
    overlap,
    variance_loss,
)
from undiffuse.predictions import PREDICTIONS, X0, EDMOutput, Eps, FlowVelocity, Prediction, Score, V
from undiffuse.schedules import EDM, SCHEDULES, VP, Cosine, Flow, LinearBetas, Schedule, ZeroTerminalSNR
from undiffuse.solvers import DDIM, DDPMLearned
from undiffuse.solvers.ddim import forward_variance, posterior_variance

pytestmark = pytest.mark.filterwarnings("ignore::undiffuse.errors.UndiffuseWarning")
T = torch.linspace(0.05, 0.95, 16, dtype=torch.float64)


def wrong(x: Tensor, level: Level) -> Estimate:
    """A denoiser that believes in other data."""
    return Gaussian(0.1, 1.3)(x, level)


def denoiser(prediction: Prediction, schedule: Schedule, exact=wrong) -> Denoiser:
    parts = (schedule, prediction, LABELS["time"], INPUT_SCALES["none"])
    return Denoiser(ExactNetwork(exact, *parts), *parts)


# --- Weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [w for w in WEIGHTS.values() if w.reference()], ids=str)
@pytest.mark.parametrize("schedule", [VP(), Flow(), EDM(), Cosine()], ids=lambda s: type(s).__name__)
def test_trap_O1_a_weight_makes_the_same_loss_of_every_prediction(weight: Weight, schedule: Schedule) -> None:
    x0, eps = PLANE.draw(16), normal(16, 2)
    losses = []
    for prediction in PREDICTIONS.values():
        if schedule(1.0).alpha > 0 or not isinstance(prediction, Eps | Score):
            losses.append(loss(denoiser(prediction, schedule), x0, T, eps, weight))
    assert len(losses) >= 4
    for other in losses[1:]:
        assert worst(other / losses[0], torch.ones_like(other)) < 1e-5


def test_trap_O1_B7_min_snr_is_the_papers_for_eps_x0_and_v() -> None:
    level = VP()(T)
    snr = level.snr
    capped = snr.clamp(max=5)
    assert worst(MinSNR()(level, X0()), capped) < 1e-12
    assert worst(MinSNR()(level, Eps()), capped / snr) < 1e-10
    assert worst(MinSNR()(level, V()), capped / (snr + 1)) < 1e-10
    noisy = VP()(VP().time_at(log(0.01)))
    assert float(MinSNR()(noisy, V())) == pytest.approx(0.0099, abs=1e-4)  # shipped elsewhere as 1.0


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_trap_O2_weights_are_finite_over_the_closed_range(weight: Weight, schedule: Schedule) -> None:
    times = torch.cat([tensor([schedule.first or 1e-6]), T, tensor([1.0])])
    for prediction in PREDICTIONS.values():
        if schedule(1.0).alpha == 0 and isinstance(prediction, Eps | Score):
            continue
        value = weight(schedule(times.clamp(min=schedule.first)), prediction)
        assert bool(value.isfinite().all())
        assert bool((value >= 0).all())


def test_trap_O2_min_snr_at_zero_terminal_snr() -> None:
    schedule = ZeroTerminalSNR(LinearBetas())
    assert float(MinSNR()(schedule(1.0), V())) == 0
    assert float(MinSNR()(schedule(0.0), V())) == 0 or float(MinSNR()(schedule(0.0), V())) < 1e-12
    value = loss(denoiser(V(), schedule), PLANE.draw(2), tensor(1.0, 1.0), normal(2, 2), MinSNR())
    assert value.tolist() == [0, 0]


def test_weights_that_are_infinite_raise() -> None:
    with pytest.raises(UndiffuseError, match="not finite"):
        EDMWeight()(EDM()(0.0), X0())


def test_B4_edm_weight_is_one_over_c_out_squared() -> None:
    level = EDM()(T)
    s, sd = level.sigma, 0.5
    assert worst(EDMWeight()(level, X0()) * (s * sd) ** 2 / (s**2 + sd**2), torch.ones_like(s)) < 1e-10
    assert worst(EDMWeight()(level, EDMOutput(0.5)), torch.ones_like(s)) == 0


def test_sigmoid_weight_is_on_the_eps_error() -> None:
    level = VP()(T)
    assert worst(Sigmoid(2.0)(level, Eps()), torch.sigmoid(2.0 - level.log_snr)) < 1e-10


def test_unit_is_1_on_whatever_the_network_says() -> None:
    for prediction in PREDICTIONS.values():
        assert Unit()(VP()(T), prediction).tolist() == [1.0] * 16
    assert worst(Unit(Eps())(VP()(T), V()), VP()(T).alpha ** 2) < 1e-12  # det of v is 1


# --- Times ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_times_lie_in_the_trained_range_for_every_uniform_number(times, schedule: Schedule) -> None:
    u = torch.cat([torch.zeros(1), torch.rand(200, generator=torch.Generator().manual_seed(0)), torch.ones(1)])
    t = times(u, schedule)
    assert t.dtype == torch.float64
    assert bool(((t >= schedule.first) & (t <= 1)).all())
    ordered = times(torch.linspace(0, 1, 101), schedule)
    assert bool((ordered.diff() >= 0).all() | (ordered.diff() <= 0).all())
    assert worst(TIMES["uniform"](u, VP())[1:-1], u[1:-1].double()) < 1e-12


def test_times_have_the_stated_distributions() -> None:
    u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    logit = torch.logit(LogitNormalTimes(0.3, 0.8)(u, Flow()))
    assert (float(logit.mean()), float(logit.std())) == pytest.approx((0.3, 0.8), abs=1e-3)
    sigma = EDM()(LogNormalTimes()(u, EDM())).sigma.log()
    assert (float(sigma.mean()), float(sigma.std())) == pytest.approx((-1.2, 1.2), abs=2e-3)


def test_stratified_times_are_one_in_each_slice() -> None:
    u = torch.rand(64, generator=torch.Generator().manual_seed(0))
    for inner in (UniformTimes(), LogitNormalTimes()):
        t = Stratified(inner)(u, VP())
        edges = inner(torch.arange(1, 64, dtype=torch.float64) / 64, VP())
        assert torch.bucketize(t, edges).tolist() == list(range(64))


# --- The loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_weighted_squared_error_written_by_hand() -> None:
    x0, eps = PLANE.draw(16), normal(16, 2)
    b = VP().integral(T)
    alpha, sigma = (-b / 2).exp()[:, None], (1 - (-b).exp()).sqrt()[:, None]
    x = alpha * x0 + sigma * eps
    said = wrong(x, VP()(T))
    for prediction, error in [
        (Eps(), said.eps - eps),
        (X0(), said.x0 - x0),
        (V(), alpha * (said.eps - eps) - sigma * (said.x0 - x0)),
        (FlowVelocity(), said.eps - eps - said.x0 + x0),
    ]:
        got = loss(denoiser(prediction, VP()), x0, T, eps)
        assert got.dtype == torch.float32
        assert worst(got.double(), error.square().mean(1)) < 1e-5 * float(error.square().max())


def test_trap_O7_the_exact_denoiser_has_the_least_loss_and_x_is_never_the_callers() -> None:
    """E|y - target|^2 is least for the posterior mean; another tensor in x's place could not reach it."""
    x0, eps, t = PLANE.draw(4000), normal(4000, 2), torch.full((4000,), 0.4, dtype=torch.float64)
    exact = float(loss(denoiser(V(), VP(), PLANE), x0, t, eps).mean())
    for off in (0.9, 1.1):

        def bad(x: Tensor, level: Level, off: float = off) -> Estimate:
            e = PLANE(x, level)
            return e.with_x0(off * e.x0, level)

        assert exact < float(loss(denoiser(V(), VP(), bad), x0, t, eps).mean())


class Linear(nn.Module):
    """y = a x + b, for training."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(2 if twice else 1))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        y = self.a[0] * x
        return y if len(self.a) == 1 else torch.cat([y, self.a[1] * torch.ones_like(x)], 1)


@pytest.mark.parametrize("huber", [None, 0.3])
def test_gradients_reach_the_network(huber: float | None) -> None:
    network = Linear()
    value = loss(Denoiser(network, VP(), V()), normal(8, 2).float(), T[:8], normal(8, 2).float(), huber=huber)
    assert value.shape == (8,)
    value.mean().backward()
    assert float(network.a.grad.abs().sum()) > 0  # type: ignore[union-attr]


def test_huber_is_quadratic_for_small_errors_and_linear_for_large_ones() -> None:
    x0, eps = PLANE.draw(4), normal(4, 2)
    model = denoiser(Eps(), VP())
    squared = loss(model, x0, T[:4], eps) * 2  # |e|^2, D = 2
    for c in (1e-4, 0.5, 1e3):
        expected = ((squared.double() + c * c).sqrt() - c) / 2**0.5
        assert worst(loss(model, x0, T[:4], eps, huber=c).double(), expected) < 1e-5 * (1 + c)
    for c in (0.0, -1.0):
        with pytest.raises(UndiffuseError, match="Huber"):
            loss(model, x0, T[:4], eps, huber=c)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trap_P3_half_precision_data_meets_noise_and_target_in_float32(dtype: torch.dtype) -> None:
    x0, eps = normal(8, 2).to(dtype), normal(8, 2, seed=1).to(dtype)
    small = torch.full((8,), 1e-3, dtype=torch.float64)
    model = Denoiser(Linear(), Flow(), V())
    got = loss(model, x0, small, eps)
    assert got.dtype == torch.float32
    assert worst(got.double(), loss(model, x0.double(), small, eps.double()).double()) < 1e-5


def test_offset_noise_moves_whole_channels() -> None:
    eps, per_channel = normal(2, 3, 4, 4), normal(2, 3, seed=1)
    moved = offset_noise(eps, per_channel, 0.1) - eps
    assert worst(moved, 0.1 * per_channel[:, :, None, None].expand_as(moved)) < 1e-12
    assert torch.equal(offset_noise(eps, per_channel, 0.0), eps)


# --- Learned variance -------------------------------------------------------------------------------------------------


def test_the_variational_term_is_the_divergence_of_two_gaussians() -> None:
    """Between the true posterior and the step that DDPMLearned would take, from torch's own KL divergence."""
    schedule, x0 = LinearBetas(), PLANE.draw(6)
    here = schedule(torch.linspace(0.1, 1, 6, dtype=torch.float64))
    there = schedule(here.t - 1 / 1000)
    x0_hat, v = x0 + 0.3 * normal(6, 2), torch.rand(6, 2, dtype=torch.float64)
    x = here.mix(x0, normal(6, 2, seed=2))
    small, large = posterior_variance(here, there)[:, None], forward_variance(here, there)[:, None]

    def mean(x0: Tensor) -> Tensor:  # the step without its noise
        eps = (x - here.alpha[:, None] * x0) / here.sigma[:, None]
        step = DDIM(1.0).step(x, here, there, None, lambda x, here, there: torch.zeros_like(x))
        next(step)
        try:
            step.send(Estimate(x0, eps))
        except StopIteration as stop:
            return stop.value[0]
        raise AssertionError

    true = torch.distributions.Normal(mean(x0), small.sqrt())
    learned = torch.distributions.Normal(mean(x0_hat), (v * large.log() + (1 - v) * small.log()).exp().sqrt())
    expected = torch.distributions.kl_divergence(true, learned).mean(1) / log(2)
    assert worst(variance_loss(schedule, x0, here, x0_hat, v).double() / expected, torch.ones(6).double()) < 1e-3
    assert DDPMLearned().stochastic


def test_the_hybrid_objective_adds_a_thousandth_of_the_whole_bound() -> None:
    for steps in (1000, 250):
        schedule, x0, eps = LinearBetas(steps), normal(8, 2).float(), normal(8, 2, seed=1).float()
        t = torch.linspace(0.1, 1, 8, dtype=torch.float64)
        network = Linear(twice=True)
        model = Denoiser(network, schedule, Eps(), learned_variance=True)
        level = schedule(t)
        simple = loss(Denoiser(Linear(), schedule, Eps()), x0, t, eps)
        x0_hat = Eps().estimate(level.mix(x0, eps), torch.zeros_like(x0), level).x0
        bound = variance_loss(schedule, x0, level, x0_hat, torch.full_like(x0, 0.5), steps)
        total = loss(model, x0, t, eps)
        assert worst(total, simple + 0.001 * steps * bound) < 1e-4 * float(total.abs().max())
        (total - simple).sum().backward()
        assert float(network.a.grad[0].abs()) > 0  # type: ignore[index]
        network.a.grad = None
        # the variational term teaches the variance alone
        (loss(model, x0, t, eps) - loss(Denoiser(network_of(network), schedule, Eps()), x0, t, eps)).sum().backward()
        assert float(network.a.grad[1].abs()) > 0  # type: ignore[index]


def network_of(other: Linear) -> nn.Module:
    """The first half of what a network of twice the channels says."""

    class Half(nn.Module):
        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            return other(x, label).chunk(2, 1)[0]

    return Half()


def test_overfitting_one_batch_of_one_point_finds_it() -> None:
    """O7's second half: with the right x in the network, the loss of a learnable case goes to 0."""
    network = Linear()
    model = Denoiser(network, Flow(), FlowVelocity())
    x0, eps, t = torch.zeros(16, 2), normal(16, 2).float(), torch.ones(16, dtype=torch.float64)
    optimiser = torch.optim.SGD(network.parameters(), 0.5)
    for _ in range(60):
        optimiser.zero_grad()
        loss(model, x0, t, eps).mean().backward()
        optimiser.step()
    assert float(loss(model, x0, t, eps).mean()) < 1e-6  # y = x: all is noise


def test_trap_S11_training_and_sampling_that_visit_other_levels_are_seen() -> None:
    flow = Flow()
    visited = Uniform().times(flow, 20)
    assert overlap(UniformTimes(), flow, visited) > 0.95
    assert overlap(Stratified(UniformTimes()), flow, visited) == pytest.approx(
        overlap(UniformTimes(), flow, visited), abs=0.01
    )
    shares = [overlap(LogitNormalTimes(mean, 0.5), flow, visited) for mean in (0.0, 1.0, 2.0, 4.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.2
    # By hand: draws at one time in a grid of two, the other never trained.
    assert overlap(
        LogitNormalTimes(3.0, 1e-3), flow, torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    ) == pytest.approx(0.5)
