"""Chapter 1: one equation, in the right precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laws import PLANE, normal, tensor, worst
from undiffuse.errors import UndiffuseError
from undiffuse.levels import Estimate, combine
from undiffuse.schedules import VP, Cosine, Flow


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-10, 10), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_combine_is_the_sum_whatever_the_shape_of_the_coefficients(
    numbers: list[float], one: bool, dtype: torch.dtype
) -> None:
    xs = [normal(3, 2, 2, seed=i).to(dtype) for i in range(len(numbers))]
    terms = [(tensor(c) if one else c, x) for c, x in zip(numbers, xs, strict=True)]
    exact = torch.stack([c * x.double() for c, x in zip(numbers, xs, strict=True)]).sum(0)
    each = combine(*[(tensor(c).expand(3), x) for c, x in zip(numbers, xs, strict=True)])
    # float32 inside: what is left is one rounding of the result (and of float32's own sums)
    step = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6, torch.float64: 1e-15}[dtype]
    for got in (combine(*terms), each):
        assert got.dtype == dtype
        assert worst(got.double(), exact) <= step * max(1.0, float(exact.abs().max())) + 1e-4 * (step == 1e-6)
    assert torch.equal(xs[0], normal(3, 2, 2, seed=0).to(dtype))  # no input is written to


def test_combine_takes_a_number_a_sample() -> None:
    x, y, c = normal(3, 2), normal(3, 2, seed=1), tensor(0.1, -2.0, 1.0)
    got = combine((c, x), (1.0, y))
    for i in range(3):
        assert worst(got[i], float(c[i]) * x[i] + y[i]) < 1e-15


def test_gradients_flow_through_combine() -> None:
    x, y = normal(2, 2).requires_grad_(), normal(2, 2, seed=1).requires_grad_()
    for c in (tensor(0.3), tensor(0.3, 0.7), tensor(0.3).requires_grad_()):
        for first in (c, 1.0):
            assert torch.autograd.gradcheck(lambda a, b, c=c, first=first: combine((first, a), (c, b)), (x, y))
    c = tensor(0.3).requires_grad_()
    combine((c, x), (2.0, y)).sum().backward()
    assert c.grad is not None
    assert float(c.grad) == pytest.approx(float(x.sum().detach()))


def test_coefficients_meet_x_once_in_float64() -> None:
    """Trap P2 at the source: no coefficient is rounded before it meets x."""
    c = tensor(1.0) / 3
    assert float(combine((c, torch.ones(1, dtype=torch.float64)))) == float(c)


def test_trap_P3_noise_is_not_lost_in_half_precision() -> None:
    """At t = 1e-4 of the straight path, noise added in float16 is none."""
    x0 = torch.full((4096,), 0.9, dtype=torch.float16).reshape(1, -1)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).half()
    level = Flow()(1e-4)
    x = level.mix(x0, eps)
    assert x.dtype == torch.float32
    noise = x - x0.float() * float(level.alpha)
    assert float(noise.std()) == pytest.approx(1e-4, rel=0.05)
    lost = x0 * level.alpha.half() + eps * level.sigma.half()  # the mistake
    assert float((lost == x0).float().mean()) > 0.5


def test_a_level_at_either_end() -> None:
    data, noise = Cosine()(0.0), Cosine()(1.0)
    assert (float(data.alpha), float(data.sigma)) == (1, 0)
    assert (float(noise.alpha), float(noise.sigma)) == (0, 1)
    assert float(data.log_snr) == float("inf")
    assert float(data.snr) == float("inf")
    assert float(noise.log_snr) == -float("inf")
    assert float(noise.snr) == 0
    assert data.is_data
    assert not noise.is_data


def test_a_level_of_many_samples() -> None:
    levels = VP()(tensor(0.1, 0.5))
    for one, t in zip(levels, (0.1, 0.5), strict=True):
        assert torch.equal(one.sigma, VP()(t).sigma)
        assert one.t.ndim == 0
    rows = VP()(0.3).rows(4)
    assert rows.sigma.shape == (4,)
    x0, eps = normal(4, 2), normal(4, 2, seed=1)
    assert worst(rows.mix(x0, eps), VP()(0.3).mix(x0, eps)) < 1e-15
    assert VP()(tensor(0.0, 0.0)).is_data
    with pytest.raises(UndiffuseError, match="step them apart"):
        _ = VP()(tensor(0.0, 0.5)).is_data


def test_with_x0_keeps_the_pair_consistent() -> None:
    level, x = VP()(0.5), normal(4, 2)
    e = PLANE(x, level)
    moved = e.with_x0(e.x0.clamp(-1, 1), level)
    assert worst(level.mix(moved.x0, moved.eps), x) < 1e-14
    untouched = (e.x0.abs() <= 1).all(1)
    assert bool(untouched.any())
    assert torch.equal(moved.eps[untouched], e.eps[untouched])
    with pytest.raises(UndiffuseError, match="sigma = 0"):
        e.with_x0(e.x0, VP()(0.0))


def test_an_estimate_moves_to_another_level() -> None:
    e = Estimate(normal(2, 2), normal(2, 2, seed=1))
    there = Flow()(0.25)
    assert worst(e.at(there), 0.75 * e.x0 + 0.25 * e.eps) < 1e-15
    assert torch.equal(e.at(Flow()(0.0)), e.x0)
    half = Estimate(e.x0.half(), e.eps.half())
    assert half.at(there).dtype == torch.float16
