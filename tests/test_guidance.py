"""Chapter 6: guidance takes denoisers and returns a denoiser."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from torch import Tensor

from laws import OTHER, PLANE, normal, tensor, worst
from undiffuse.denoiser import Denoise
from undiffuse.errors import UndiffuseError
from undiffuse.guidance import autoguidance, cfg, classifier_guidance, interval, rescale, threshold
from undiffuse.levels import Estimate, Level
from undiffuse.predictions import PREDICTIONS
from undiffuse.schedules import EDM, VP, Cosine, Flow

X = normal(8, 2)
LEVEL = VP()(0.4)


class Counting:
    """A denoiser that counts its calls."""

    def __init__(self, inner: Denoise) -> None:
        self.inner, self.calls = inner, 0

    def __call__(self, x: Tensor, level: Level) -> Estimate:
        self.calls += 1
        return self.inner(x, level)


def same(a: Estimate, b: Estimate, tolerance: float = 1e-12) -> bool:
    return worst(a.x0, b.x0) < tolerance and worst(a.eps, b.eps) < tolerance


@pytest.mark.parametrize("as_tensor", [False, True])
def test_trap_G1_E1_1_is_conditional_and_costs_one_call_0_is_unconditional(as_tensor: bool) -> None:
    for scale, expected, calls in ((1.0, PLANE, (1, 0)), (0.0, OTHER, (0, 1)), (2.0, None, (1, 1))):
        cond, uncond = Counting(PLANE), Counting(OTHER)
        e = cfg(cond, uncond, tensor(scale).expand(8) if as_tensor else scale)(X, LEVEL)
        assert (cond.calls, uncond.calls) == calls
        if expected is not None:
            assert torch.equal(e.x0, expected(X, LEVEL).x0)


@pytest.mark.parametrize("scale", [-1.5, 0.3, 0.999, 1.0, 4.0, 100.0])
def test_trap_G3_E3_any_scale_works(scale: float) -> None:
    """uncond + s (cond - uncond), which papers write (1 + w) cond - w uncond with s = 1 + w."""
    c, u, w = PLANE(X, LEVEL), OTHER(X, LEVEL), scale - 1
    e = cfg(PLANE, OTHER, scale)(X, LEVEL)
    assert worst(e.x0, (1 + w) * c.x0 - w * u.x0) < 1e-12 * (1 + abs(scale))
    assert worst(e.eps, u.eps + scale * (c.eps - u.eps)) < 1e-12 * (1 + abs(scale))
    assert same(e, autoguidance(PLANE, OTHER, scale)(X, LEVEL))
    assert worst(LEVEL.mix(e.x0, e.eps), X) < 1e-11


@pytest.mark.parametrize("scale", [nan, inf, -inf])
def test_trap_G3_a_scale_that_cannot_work_raises(scale: float) -> None:
    with pytest.raises(UndiffuseError, match="finite"):
        cfg(PLANE, OTHER, scale)(X, LEVEL)


def test_trap_G2_every_channel_is_guided_alike() -> None:
    x = normal(2, 32, 3, 3)
    cond, uncond = (lambda x, level, k=k: Estimate(x * k, x + k) for k in (2.0, 5.0))
    e = cfg(cond, uncond, 3.0)(x, LEVEL)
    assert worst(e.x0, x * (5 + 3 * (2 - 5))) < 1e-12
    assert worst(e.eps, x + (5 + 3 * (2 - 5))) < 1e-12


def test_E2_guidance_commutes_with_every_prediction() -> None:
    c, u, e = PLANE(X, LEVEL), OTHER(X, LEVEL), cfg(PLANE, OTHER, 3.0)(X, LEVEL)
    for prediction in PREDICTIONS.values():
        y = [prediction.target(p.x0, p.eps, LEVEL) for p in (c, u)]
        assert same(prediction.estimate(X, y[1] + 3.0 * (y[0] - y[1]), LEVEL), e, 1e-11)


def test_a_scale_of_each_sample_and_of_each_level() -> None:
    scales = torch.linspace(-1, 5, 8, dtype=torch.float64)
    each = cfg(PLANE, OTHER, scales)(X, LEVEL)
    for i in range(8):
        alone = cfg(PLANE, OTHER, float(scales[i]))(X, LEVEL)
        assert worst(each.x0[i], alone.x0[i]) < 1e-12
    assert same(cfg(PLANE, OTHER, lambda level: 10 * level.t)(X, LEVEL), cfg(PLANE, OTHER, 4.0)(X, LEVEL))


def test_interval_guides_inside_and_costs_one_call_outside() -> None:
    for schedule in (EDM(), Cosine()):
        at = interval(7.3, 0.3, 2.0)
        for t in torch.linspace(0, 1, 41, dtype=torch.float64):
            level = schedule(t)
            uncond = Counting(OTHER)
            guided = cfg(PLANE, uncond, at)
            inside = 0.3 < float(level.sigma / level.alpha) <= 2.0
            assert float(at(level)) == (7.3 if inside else 1.0)  # to the last bit
            guided(X, level)
            assert uncond.calls == inside
    assert float(interval(7.3, 0.0, inf)(Cosine()(1.0))) == 7.3
    assert interval(7.3, 0.3, 2.0)(VP()(tensor(0.0, 0.3, 1.0))).tolist() == [1.0, 7.3, 1.0]
    with pytest.raises(UndiffuseError, match="interval"):
        interval(2.0, 3.0, 1.0)


def test_E4_rescale() -> None:
    guided = cfg(PLANE, OTHER, 5.0)
    assert rescale(guided, PLANE, 0.0) is guided
    for phi in (0.3, 1.0):
        assert same(rescale(PLANE, PLANE, phi)(X, LEVEL), PLANE(X, LEVEL))
    full = rescale(guided, PLANE, 1.0)(X, LEVEL)
    deviation = [v.std(1, correction=0) for v in (full.x0, PLANE(X, LEVEL).x0)]
    assert worst(*deviation) < 1e-12
    assert worst(LEVEL.mix(full.x0, full.eps), X) < 1e-11
    half, plain = rescale(guided, PLANE, 0.5)(X, LEVEL), guided(X, LEVEL)
    assert worst(half.x0, (full.x0 + plain.x0) / 2) < 1e-11
    with pytest.raises(UndiffuseError, match="rescale"):
        rescale(guided, PLANE, 1.5)


def test_rescale_of_one_number_or_a_constant_is_finite() -> None:
    def constant(x: Tensor, level: Level) -> Estimate:
        return Estimate(torch.ones_like(x), (x - level.alpha) / level.sigma)

    for x in (normal(3, 1), normal(3, 4)):
        e = rescale(constant, constant, 0.7)(x, LEVEL)
        assert worst(e.x0, torch.ones_like(x)) < 1e-12


# --- Thresholds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percentile", [None, 0.5, 1.0])
def test_trap_S18_eps_is_derived_again_from_the_clipped_x0(percentile: float | None) -> None:
    for schedule in (VP(), Flow(), EDM()):
        level = schedule(0.6)
        x = level.mix(3 * normal(8, 6), normal(8, 6, seed=1))

        def wide(x: Tensor, level: Level) -> Estimate:
            x0 = 3 * torch.tanh(x)
            return Estimate(x0, (x - level.alpha * x0) / level.sigma)

        e = threshold(wide, -1.0, 1.0, percentile)(x, level)
        assert float(e.x0.abs().max()) <= 1
        assert worst(level.mix(e.x0, e.eps), x) < 1e-12
        assert not torch.allclose(e.eps, wide(x, level).eps)


@pytest.mark.parametrize("percentile", [None, 0.5, 0.995, 1.0])
def test_thresholds_leave_what_is_inside_alone(percentile: float | None) -> None:
    def small(x: Tensor, level: Level) -> Estimate:
        return Estimate(torch.tanh(x), x)

    e = threshold(small, -1.0, 1.0, percentile)(X, LEVEL)
    assert torch.equal(e.x0, torch.tanh(X))
    assert torch.equal(e.eps, X)


def test_dynamic_threshold_is_imagens() -> None:
    x0 = normal(4, 1000) * 2

    def wide(x: Tensor, level: Level) -> Estimate:
        return Estimate(x0, x0)

    e = threshold(wide, -1.0, 1.0, 0.9)(x0, LEVEL)
    s = torch.quantile(x0.abs(), 0.9, dim=1, keepdim=True).clamp(min=1)
    assert worst(e.x0, x0.clamp(-s, s) / s) < 5e-3  # torch interpolates between two elements
    assert float((e.x0.abs() == 1).double().mean()) == pytest.approx(0.1, abs=2e-3)


def test_trap_S16_nothing_is_clipped_unless_asked() -> None:
    """Data of deviation 3 comes back with deviation 3."""
    from laws import Gaussian, run
    from undiffuse.grids import Karras
    from undiffuse.solvers import SOLVERS

    levels = Karras().levels(EDM(), 60)
    for name in ("euler", "heun", "dpmpp_2m"):
        x = run(Gaussian(0.0, 3.0), normal(2000, 1) * 80, levels, SOLVERS[name])
        assert float(x.std()) == pytest.approx(3.0, rel=0.1)


def test_bad_thresholds_are_refused() -> None:
    for args in ((1.0, -1.0), (-1.0, 2.0, 0.9), (-1.0, 1.0, 0.0), (-1.0, 1.0, 1.5)):
        with pytest.raises(UndiffuseError, match="threshold"):
            threshold(PLANE, *args)


# --- Classifier guidance ----------------------------------------------------------------------------------------------


def test_classifier_guidance_is_bayes_rule() -> None:
    """log p(k | x) of one component of the mixture, scale 1, turns the mixture's estimate into the component's."""
    from laws import Mixture

    first = Mixture(PLANE.weights[:1] * 2, PLANE.means[:1], PLANE.axes[:1], PLANE.variances[:1])

    def log_prob(x: Tensor, level: Level) -> Tensor:
        return PLANE.weights[0].log() + first.posterior(x, level)[0] - PLANE.posterior(x, level)[0]

    for schedule in (VP(), Flow(), EDM()):
        for level in (schedule(0.5), schedule(torch.linspace(0.3, 0.7, 8, dtype=torch.float64))):
            assert same(classifier_guidance(PLANE, log_prob, 1.0)(X, level), first(X, level), 1e-9)
    with torch.no_grad():  # sampling records no gradients; the guidance does for itself
        assert same(classifier_guidance(PLANE, log_prob, 1.0)(X, LEVEL), first(X, LEVEL), 1e-9)
    e = classifier_guidance(PLANE, log_prob, 3.0)(X, LEVEL)
    assert worst(LEVEL.mix(e.x0, e.eps), X) < 1e-11
    assert same(classifier_guidance(PLANE, log_prob, 3.0)(X, Cosine()(1.0)), PLANE(X, Cosine()(1.0)))
