"""Brownian noise: one path, seen closer with more steps."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from laws import PLANE, at_ratios, normal, run
from undiffuse.errors import UndiffuseError
from undiffuse.grids import LogSNR
from undiffuse.levels import Level
from undiffuse.noise import Brownian, Streams
from undiffuse.schedules import EDM
from undiffuse.solvers import SOLVERS

F64 = torch.float64


def by_lambda(*lams: float) -> list[Level]:
    return at_ratios(EDM(1e6), torch.exp(-torch.tensor(lams, dtype=F64)))


LIKE = torch.zeros(3, 4, dtype=F64)


def test_parts_add_up_to_the_whole() -> None:
    a, b, c = by_lambda(-3.0, 0.0, 1.0)  # points of the grid: lambda = -8 + 16 k/2^depth
    whole, first, second = (Brownian(0, 3, depth=8)(LIKE, *pair) for pair in ((a, c), (a, b), (b, c)))
    assert torch.allclose(whole * 4**0.5, first * 3**0.5 + second, atol=1e-5)


def test_the_path_does_not_depend_on_what_was_asked_before() -> None:
    levels = by_lambda(*torch.linspace(-5, 5, 38).tolist())
    path = Brownian(1, 3)
    walked = [path(LIKE, a, b) for a, b in pairwise(levels)]
    for i in (30, 3, 17):
        assert torch.equal(Brownian(1, 3)(LIKE, levels[i], levels[i + 1]), walked[i])


def test_numbers_are_standard_normal_and_those_of_different_intervals_independent() -> None:
    like, path = torch.zeros(64, 1000), Brownian(0, 64, depth=10)
    z = torch.stack([path(like, a, b) for a, b in pairwise(by_lambda(-4.0, -2.13, -2.0, 0.71, 3.3))]).flatten(1)
    assert float(z.mean(1).abs().max()) < 0.02
    assert float((z.var(1) - 1).abs().max()) < 0.03
    assert float((torch.corrcoef(z) - torch.eye(4)).abs().max()) < 0.02
    samples = path(like, *by_lambda(-1.0, 1.0))
    assert float((torch.corrcoef(samples) - torch.eye(64)).abs().max()) < 0.15


def test_more_steps_go_to_the_same_sample() -> None:
    """Strong convergence: the distance to the finest solution falls; fresh streams would stay at a distance of order 1.

    Of what the draws make of it only: each doubling of the steps must leave less than 0.75 of the distance.
    """
    x = 80 * normal(96, 2)

    def end(steps: int, depth: int = 20) -> torch.Tensor:
        return run(PLANE, x, LogSNR(0.05, 80.0).levels(EDM(), steps), SOLVERS["dpmpp_2m_sde"], Brownian(0, 96, depth))

    ends = [end(steps) for steps in (20, 40, 80, 160)]
    apart = [float((a - b).norm(dim=1).median()) for a, b in pairwise(ends)]
    assert apart[1] < 0.75 * apart[0]
    assert apart[2] < 0.75 * apart[1]
    assert apart[2] < 0.03
    levels = LogSNR(0.05, 80.0).levels(EDM(), 80)
    fresh = run(PLANE, x, levels, SOLVERS["dpmpp_2m_sde"], Streams(1, 96))
    assert float((fresh - ends[2]).norm(dim=1).median()) > 0.3


def test_what_is_no_way_forward_gets_fresh_numbers() -> None:
    path = Brownian(0, 3)
    a, b = by_lambda(0.0, 1.0)
    same = [path(LIKE, a, a) for _ in range(3)]
    assert not torch.equal(same[0], same[1])
    assert not torch.equal(same[1], same[2])
    assert torch.equal(Brownian(0, 3)(LIKE, a, a), same[0])
    assert not torch.equal(path(LIKE, b, a), path(LIKE, a, b))
    far = by_lambda(9.0, 10.0)
    assert float(path(torch.zeros(3, 4000), *far).var()) == pytest.approx(1, abs=0.05)


def test_levels_of_each_sample() -> None:
    a, b = by_lambda(-2.0, 1.0)
    assert torch.equal(Brownian(0, 3)(LIKE, a.rows(3), b.rows(3)), Brownian(0, 3)(LIKE, a, b))


def test_first_noise_is_that_of_streams() -> None:
    assert torch.equal(Brownian(5, 3).draw((2, 2)), Streams(5, 3).draw((2, 2)))


@pytest.mark.parametrize(("depth", "limit"), [(0, 8.0), (31, 8.0), (True, 8.0), (16, 0.0)])
def test_wrong_options_are_refused(depth: int, limit: float) -> None:
    with pytest.raises(UndiffuseError):
        Brownian(0, 2, depth, limit)


def test_a_batch_of_another_size_is_refused() -> None:
    with pytest.raises(UndiffuseError, match="noise for 2 samples"):
        Brownian(0, 2)(LIKE, *by_lambda(0.0, 1.0))
