"""Likelihood against closed forms: mixtures and Gaussians, whose densities are known at every level."""

from __future__ import annotations

from math import log, pi

import numpy as np
import pytest
import torch
from torch import Tensor

from laws import F64, PLANE, Gaussian, Mixture, normal, tensor
from undiffuse import LABELS, DataSpec, FlowVelocity, NoScale, Pipeline, Sampling, UndiffuseError
from undiffuse.data.spec import units_between
from undiffuse.levels import Estimate, Level
from undiffuse.likelihood import INTEGRATORS, dequantise, log_likelihood, log_volume
from undiffuse.networks import sized
from undiffuse.noise import Streams
from undiffuse.pipeline import ModelConfig
from undiffuse.schedules import EDM, SCHEDULES, VE, Flow, LinearBetas


def smoothed(data: Mixture, x: Tensor, sigma: float) -> Tensor:
    """log p of the data with noise of this deviation added, at x."""
    return data.posterior(x, Level(tensor(0.0), tensor(1.0), tensor(sigma), EDM()))[0]


def rotated(dims: int) -> Mixture:
    """A Gaussian whose axes are nobody's coordinates, so that random probes have something to miss."""
    axes = torch.linalg.qr(normal(dims, dims, seed=5)).Q
    return Mixture(tensor([1.0]), normal(1, dims, seed=6), axes[None], torch.logspace(-2, 1, dims, dtype=F64)[None])


def image_spec(dtype: str = "uint8", low: float | None = 0.0, high: float | None = 255.0) -> DataSpec:
    shift, scale = units_between(low, high) if low is not None and high is not None else ((3.0,), (40.0,))
    return DataSpec("points", (2,), dtype, low, high, shift, scale, "D")


X = PLANE.draw(64)
ENDS_IN_NOISE = {name: schedule for name, schedule in SCHEDULES.items() if schedule.terminal_snr == 0}


@pytest.mark.parametrize("name", ENDS_IN_NOISE)
def test_exact_trace_is_the_density_smoothed_by_the_start_level(name: str) -> None:
    """Where t = 1 is pure noise the prior is exact, and only the integrator's error is left."""
    got = log_likelihood(PLANE, ENDS_IN_NOISE[name], X, steps=120)
    assert float((got.log_prob - smoothed(PLANE, X, got.start)).abs().max()) < 2e-4
    assert got.calls == 480
    assert not got.error.any()


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_gives_the_density_of_what_sampling_starts_from(name: str) -> None:
    """Elsewhere sampling starts from N(0, alpha^2 + sigma^2), which is not quite the data at t = 1: the difference is
    the model's own, and known."""
    schedule = SCHEDULES[name]
    got = log_likelihood(PLANE, schedule, X, steps=120)
    end = schedule(1.0)
    square = float(end.alpha**2 + end.sigma**2)
    started = -(got.latent.square().sum(1) / square).double() / 2 - log(2 * pi * square)
    true = PLANE.posterior(got.latent.double(), end)[0]
    assert float((got.log_prob - started + true - smoothed(PLANE, X, got.start)).abs().max()) < 2e-4


@pytest.mark.parametrize("rule", INTEGRATORS.values(), ids=list(INTEGRATORS))
def test_the_integrator_has_its_order(rule) -> None:
    errors = []
    for steps in (80, 160):
        got = log_likelihood(PLANE, Flow(), X, steps=steps, integrator=rule, start=0.05)
        errors.append(float((got.log_prob - smoothed(PLANE, X, 0.05)).abs().median()))
    assert abs(np.log2(errors[0] / errors[1]) - rule.order) < 0.35, errors


@pytest.mark.parametrize("start", [0.001, 0.01, 0.03])
def test_the_start_level_costs_what_is_stated(start: float) -> None:
    """Against the clean density: 2.8e-4, 0.028 and 0.23 nats at the most; the estimate explains most of it."""
    got = log_likelihood(PLANE, Flow(), X, steps=200, start=start)
    cost = smoothed(PLANE, X, 0.0) - got.log_prob
    assert float(cost.abs().max()) > 50 * start**2  # there is something to state
    assert float((cost - got.start_cost).abs().max()) < max(0.15 * float(cost.abs().max()), 1e-5)


def test_probes_are_unbiased_and_their_error_bar_is_true() -> None:
    data = rotated(32)
    x = data.draw(48, seed=1)
    exact = log_likelihood(data, Flow(), x, steps=24, start=0.01, probes=0)
    got = log_likelihood(data, Flow(), x, steps=24, start=0.01, probes=16)
    z = (got.log_prob - exact.log_prob) / got.error
    assert float(got.error.min()) > 0
    assert 0.75 < float(z.square().mean().sqrt()) < 1.45  # of Student's t with 15 degrees of freedom: 1.07
    assert abs(float(z.mean())) < 3 / 48**0.5
    assert float((exact.log_prob - smoothed(data, x, 0.01)).abs().max()) < 1e-2


def test_signs_see_elementwise_denoisers_exactly() -> None:
    """v_i^2 = 1: random signs have no error where the Jacobian is diagonal; Gaussian numbers have."""
    x = normal(3, 4, 5, 5) * 0.5 + 0.7
    got = log_likelihood(Gaussian(0.7, 0.5), Flow(), x, steps=16, probes=3)
    assert float(got.error.max()) < 1e-10
    want = torch.distributions.Normal(tensor(0.7), tensor(0.25 + got.start**2).sqrt()).log_prob(x).flatten(1).sum(1)
    assert float((got.log_prob - want).abs().max()) < 0.1


def test_trap_V12_gaussian_with_known_likelihood_in_its_own_units() -> None:
    """Heights in centimetres: N(170, 10^2) in two coordinates, and nothing is divided by 255."""
    spec = DataSpec("points", (2,), "float32", None, None, (170.0, 60.0), (10.0, 4.0), "D")
    data = Mixture(tensor([1.0]), torch.zeros(1, 2, dtype=F64), torch.eye(2, dtype=F64)[None], tensor([[1.0, 1.0]]))
    values = np.array([[170.0, 60.0], [185.0, 50.0]], np.float32)
    got = log_likelihood(data, Flow(), spec.to_model(values).double(), units=spec)
    want = [-log(2 * pi * 40) - square / 2 for square in (0.0, 1.5**2 + 2.5**2)]
    assert got.log_prob.tolist() == pytest.approx(want, abs=1e-5)
    assert got.bits_per_dim.tolist() == pytest.approx([-w / 2 / log(2) for w in want], abs=1e-5)
    assert got.kind == "density in the data's own units"


def test_trap_V12_one_probe_is_not_a_likelihood() -> None:
    with pytest.raises(UndiffuseError, match="1 probes have no error bar"):
        log_likelihood(PLANE, Flow(), X, probes=1)


def test_trap_D6_the_likelihood_follows_the_data_type() -> None:
    """Integers are dequantised and bounded by 0 bits from below; real data are left as they are."""
    x = torch.zeros(4, 2, dtype=F64)
    integers, reals = image_spec(), image_spec("float32", None, None)
    noisy = dequantise(x, integers, Streams(0, 4))
    assert bool((noisy != 0).all())
    assert float(noisy.abs().max()) <= 0.5 / 127.5
    assert torch.equal(dequantise(x, reals, Streams(0, 4)), x)
    assert "integers" in log_likelihood(PLANE, Flow(), x, units=integers, steps=4).kind
    assert "own units" in log_likelihood(PLANE, Flow(), x, units=reals, steps=4).kind


def test_the_default_start_is_below_what_the_data_resolve() -> None:
    """1e-3 for real data; for integers the deviation of a uniform step, 1/sqrt(12) of a unit."""
    x = torch.zeros(1, 2, dtype=F64)
    assert log_likelihood(PLANE, Flow(), x, steps=2).start == pytest.approx(1e-3)
    assert log_likelihood(PLANE, Flow(), x, units=image_spec("float32"), steps=2).start == pytest.approx(1e-3)
    assert log_likelihood(PLANE, Flow(), x, units=image_spec(), steps=2).start == pytest.approx(1 / 127.5 / 12**0.5)
    assert log_likelihood(PLANE, LinearBetas(), x, steps=2).start == pytest.approx(0.01, abs=1e-4)


def test_integers_at_any_start_are_a_distribution() -> None:
    """The bound is below the log of the mass that the smoothed model has in each cell, and those add up to 1."""
    spec = DataSpec("points", (1,), "uint8", 0.0, 15.0, *units_between(0.0, 15.0), "D")
    data = Mixture(tensor([1.0]), tensor([[0.1]]), torch.ones(1, 1, 1, dtype=F64), tensor([[0.05]]))
    values = np.repeat(np.arange(16, dtype=np.uint8), 200)[:, None]
    got = log_likelihood(data, Flow(), spec.to_model(values).double(), units=spec, steps=30, start=0.2)
    bound = got.log_prob.reshape(16, 200).mean(1)
    edges = (torch.arange(17, dtype=F64) - 0.5 - 7.5) / 7.5
    mass = torch.distributions.Normal(tensor(0.1), (tensor(0.05) + 0.2**2).sqrt()).cdf(edges).diff()
    scatter = got.log_prob.reshape(16, 200).std(1) / 200**0.5
    assert bool((bound < mass.log() + 4 * scatter).all())
    assert bool((bound > mass.log() - 0.3).all())


def test_dequantised_values_round_back_to_the_integers() -> None:
    spec = image_spec()
    values = np.arange(256, dtype=np.uint8).reshape(-1, 2)
    x = dequantise(spec.to_model(values).double(), spec, Streams(3, len(values)))
    assert (spec.to_data(x) == values).all()


def test_bits_offset_of_8_bit_pixels() -> None:
    """x = v/127.5 - 1: bits/dim = -log2 p(x) / D + log2(127.5) = ... + 6.9944."""
    spec = DataSpec("image", (3, 2, 2), "uint8", 0.0, 255.0, *units_between(0.0, 255.0), "HWC")
    assert log_volume(spec) / 12 / log(2) == pytest.approx(6.9944, abs=1e-4)


def test_integers_are_never_better_than_lossless() -> None:
    """For integers drawn from the dequantised model itself the bound is the entropy: uniform data of 256 values need 8
    bits. A unit Gaussian in model units stands in: its bound is the cross-entropy, computed here by summing."""
    spec = image_spec()
    gauss = Mixture(tensor([1.0]), torch.zeros(1, 2, dtype=F64), torch.eye(2, dtype=F64)[None], tensor([[0.1, 0.1]]))
    values = np.stack(np.meshgrid(np.arange(0, 256, 15), np.arange(0, 256, 15)), -1).reshape(-1, 2).astype(np.uint8)
    got = log_likelihood(gauss, Flow(), spec.to_model(values).double(), units=spec, steps=40)
    normal_cdf = torch.distributions.Normal(0.0, 0.1**0.5 * 127.5).cdf
    centred = torch.as_tensor(values.astype(np.float64)) - 127.5
    log_mass = (normal_cdf(centred + 0.5) - normal_cdf(centred - 0.5)).log().sum(1)
    # One draw of noise each: log_prob scatters around a mean just below log_mass.
    assert float((got.log_prob - log_mass).abs().max()) < 0.2
    assert float((got.log_prob - log_mass).mean()) < 0.01


def test_sample_i_depends_on_seed_and_i_alone() -> None:
    data, spec = rotated(12), DataSpec("points", (12,), "uint8", 0.0, 255.0, *units_between(0.0, 255.0), "D")
    x = normal(4, 12, seed=2) / 4
    both = log_likelihood(data, Flow(), x, units=spec, steps=6, probes=4, seed=7)
    alone = log_likelihood(data, Flow(), x[2:3], units=spec, steps=6, probes=4, seed=7, samples=[2])
    other = log_likelihood(data, Flow(), x, units=spec, steps=6, probes=4, seed=8)
    assert float(alone.log_prob - both.log_prob[2]) == pytest.approx(0, abs=1e-9)
    assert not torch.equal(other.log_prob, both.log_prob)


def test_latent_is_where_the_ode_ends() -> None:
    """For Gaussian data every eigen-coordinate of y = x/alpha scales by sqrt((lam + s1^2)/(lam + s0^2))."""
    data = rotated(6)
    x = data.draw(5)
    got = log_likelihood(data, VE(), x, steps=120, start=0.01)
    s1 = float(VE()(1.0).sigma)
    scale = ((data.variances[0] + s1**2) / (data.variances[0] + 0.01**2)).sqrt()
    want = data.means + ((x - data.means) @ data.axes[0] * scale) @ data.axes[0].T
    assert float((got.latent - want).abs().max()) < 1e-4


def test_float32_is_good_enough_to_use() -> None:
    got = log_likelihood(_float32(PLANE), LinearBetas(), X.float(), steps=60)
    exact = log_likelihood(PLANE, LinearBetas(), X, steps=60)
    assert float((got.log_prob - exact.log_prob).abs().max()) < 5e-3


def _float32(data: Mixture):
    def denoise(x: Tensor, level: Level) -> Estimate:
        e = data(x.double(), level)
        return Estimate(e.x0.float(), e.eps.float())

    return denoise


def test_the_summary_says_what_was_measured() -> None:
    text = str(log_likelihood(PLANE, Flow(), X[:8], steps=8, probes=4))
    assert "bits/dim, mean of 8" in text
    assert "density in model units, at noise 0.001" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.full((2, 2), torch.nan)}, "finite real data"),
        ({"x": torch.zeros(2, 2, dtype=torch.int64)}, "finite real data"),
        ({"start": 0.0}, "above 0"),
        ({"samples": [1]}, "1 sample numbers for 64 samples"),
        ({"units": DataSpec("points", (3,), "float32", None, None, (0.0,), (1.0,), "D")}, r"in units of data \[3\]"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    x = change.pop("x", X)
    with pytest.raises(UndiffuseError, match=message):
        log_likelihood(PLANE, Flow(), x, steps=2, **change)


def test_a_denoiser_that_detaches_is_refused() -> None:
    def cut(x: Tensor, level: Level) -> Estimate:
        return PLANE(x.detach(), level)

    with pytest.raises(UndiffuseError, match="detaches its input"):
        log_likelihood(cut, Flow(), X, steps=2)


# --- Through a pipeline ---------------------------------------------------------------------------------------------


def small_pipeline(shape: tuple[int, ...], classes: int) -> Pipeline:
    """Fresh weights, with the last layer moved off zero so that classes matter."""
    spec = DataSpec("points", shape, "uint8", 0.0, 255.0, *units_between(0.0, 255.0), "D")
    name, network = sized(shape, "tiny", condition_width=8 if classes else 0)
    conditions = {"classes": {"kind": "classes", "classes": classes}} if classes else {}
    config = ModelConfig(name, network, Flow(), FlowVelocity(), LABELS["time"], NoScale(), conditions)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = Pipeline(config.build(), config, spec, Sampling(), {})
        for weight in pipeline.denoiser.parameters():
            torch.nn.init.normal_(weight, std=0.1)
    return pipeline


def test_pipeline_takes_values_in_their_own_units_in_any_batches() -> None:
    pipeline = small_pipeline((3,), 0)
    values = np.arange(15, dtype=np.uint8).reshape(5, 3) * 17
    whole = pipeline.log_likelihood(values, steps=6)
    parts = pipeline.log_likelihood(values, steps=6, batch_size=2)
    assert float((whole.log_prob - parts.log_prob).abs().max()) < 1e-3
    assert parts.latent.shape == (5, 3)
    assert parts.calls == 3 * whole.calls == 72
    x = pipeline.spec.to_model(values)
    direct = log_likelihood(pipeline.denoiser.bind(), Flow(), x, units=pipeline.spec, steps=6)
    assert torch.equal(direct.log_prob, whole.log_prob)


def test_pipeline_asks_each_value_with_its_own_class() -> None:
    pipeline = small_pipeline((2,), 4)
    values = np.full((5, 2), 100, np.uint8)
    each = pipeline.log_likelihood(values, [3, 1, None, 0, 2], steps=4)
    none = pipeline.log_likelihood(values, steps=4)
    turned = pipeline.log_likelihood(values, [3, 1, None, 0, 2], steps=4, batch_size=3)  # a last batch of two
    assert float((each.log_prob - turned.log_prob).abs().max()) < 1e-4
    assert abs(float(each.log_prob[3] - none.log_prob[3]) - float(each.log_prob[4] - none.log_prob[4])) > 1e-3
    assert float(each.log_prob[2] - none.log_prob[2]) == pytest.approx(0, abs=1e-4)
    assert abs(float(each.log_prob[0] - none.log_prob[0])) > 1e-3


def test_pipeline_refuses_what_does_not_fit() -> None:
    pipeline = small_pipeline((2,), 4)
    with pytest.raises(UndiffuseError, match="likelihood of 3 values, 2 classes"):
        pipeline.log_likelihood(np.zeros((3, 2), np.uint8), [0, 1])
    with pytest.raises(UndiffuseError, match="uint8"):
        pipeline.log_likelihood(np.zeros((3, 2), np.float32))
    with pytest.raises(UndiffuseError, match="likelihood of 0 values"):
        pipeline.log_likelihood(np.zeros((0, 2), np.uint8))
