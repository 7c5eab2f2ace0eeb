"""What training draws is a function of (seed, step): the order of the data, times, noise, dropped conditions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from undiffuse.noise import stream
from undiffuse.training.draws import batch_indices, draw, epoch_order, generator, lent
from undiffuse.training.recipe import share


@given(count=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 2**40))
def test_trap_R1_every_epoch_shows_every_item_once_wherever_batches_are_cut(count: int, batch: int, seed: int) -> None:
    steps = -(-3 * count // batch)
    order = np.concatenate([batch_indices(seed, step, batch, count) for step in range(steps)])
    assert len(order) == steps * batch
    for epoch in range(3):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_trap_R3_a_batch_does_not_depend_on_which_were_asked_for_before() -> None:
    straight = [batch_indices(3, step, 7, 20).tolist() for step in range(12)]
    backwards = [batch_indices(3, step, 7, 20).tolist() for step in reversed(range(12))]
    assert straight == backwards[::-1]
    assert straight[0] != batch_indices(4, 0, 7, 20).tolist()
    assert epoch_order(3, 0, 20).tolist() != epoch_order(3, 1, 20).tolist()


def test_trap_R2_the_draws_of_a_step_are_a_function_of_seed_and_step() -> None:
    torch.rand(5, generator=torch.Generator().manual_seed(0))
    first, again = draw(1, 5, 6, (2, 3), offset=True), draw(1, 5, 6, (2, 3), offset=True)
    for name in ("times", "noise", "offset", "drop"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        for other in (draw(1, 6, 6, (2, 3), offset=True), draw(2, 5, 6, (2, 3), offset=True)):
            assert not torch.equal(getattr(first, name), getattr(other, name))


def test_the_numbers_are_what_they_should_be() -> None:
    draws = [draw(0, step, 500, (4,)) for step in range(40)]
    noise, times, drop = (torch.cat([getattr(d, name) for d in draws]) for name in ("noise", "times", "drop"))
    assert noise.mean().abs() < 4 / noise.numel() ** 0.5
    assert abs(float(noise.var()) - 1) < 4 * (2 / noise.numel()) ** 0.5
    for uniform in (times, drop):
        assert ((uniform >= 0) & (uniform < 1)).all()
        assert abs(float(uniform.double().mean()) - 0.5) < 4 / (12 * len(uniform)) ** 0.5
    # Dropping must not go with the level: they are streams of their own.
    correlation = torch.corrcoef(torch.stack([times, drop.double()]))[0, 1]
    assert correlation.abs() < 4 / len(times) ** 0.5


@pytest.mark.parametrize("seed", [0, 5])
def test_training_never_draws_what_sampling_draws(seed: int) -> None:
    sampled = {torch.randn(4, generator=stream(seed, i)).tolist()[0] for i in range(64)}
    trained = {draw(seed, step, 1, (4,)).noise[0, 0].item() for step in range(64)}
    assert not sampled & trained


@pytest.mark.parametrize("seed", [0, 5])
def test_purposes_do_not_share_a_stream(seed: int) -> None:
    names = ("weights", "order", "times", "noise", "offset", "drop", "dropout")
    seeds = {generator(seed, name, index).initial_seed() for name in names for index in range(50)}
    assert len(seeds) == 50 * len(names)


def test_the_global_generator_is_lent_and_given_back() -> None:
    before = torch.get_rng_state()
    with lent(5, "weights", 0):
        inside = torch.nn.Linear(3, 3).weight.detach().clone()
    assert torch.equal(torch.get_rng_state(), before)
    with lent(5, "weights", 0):
        assert torch.equal(torch.nn.Linear(3, 3).weight, inside)
    with lent(5, "weights", 1):
        assert not torch.equal(torch.nn.Linear(3, 3).weight, inside)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [7, 8, 64])
def test_the_shares_of_a_batch_are_all_of_it(count: int, parts: int) -> None:
    shares = [list(range(count))[share(count, part, parts)] for part in range(parts)]
    assert [item for part in shares for item in part] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
