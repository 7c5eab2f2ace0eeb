"""Laws of the diffusion transformer and its variants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from undiffuse.errors import UndiffuseError
from undiffuse.networks import DIT, DiT, build, describe, dit
from undiffuse.networks.dit import angles, gathered, places, scattered, sines, turned

SMALL: dict[str, Any] = {"in_channels": 2, "widths": [24], "blocks": [3], "head_width": 8, "embedding": 32}
CPU = torch.device("cpu")
# Millions of parameters (table 1 and section 4) and Gflops at 32x32x4 (table 4, a multiply-add counting as one).
PAPER = {
    "S/8": (33, 0.36), "S/4": (33, 1.41), "S/2": (33, 6.06),
    "B/8": (131, 1.42), "B/4": (130, 5.56), "B/2": (130, 23.01),
    "L/8": (459, 5.01), "L/4": (458, 19.70), "L/2": (458, 80.71),
    "XL/8": (676, 7.39), "XL/4": (675, 29.05), "XL/2": (675, 118.64),
}  # fmt: skip


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(noise: float = 0.1, **change: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DiT(**{**SMALL, **change})
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(noise * torch.randn(parameter.shape))
    return network.double()


@pytest.mark.parametrize("name", PAPER)
def test_sizes_are_those_of_the_paper(name: str) -> None:
    parameters, gflops = PAPER[name]
    with torch.device("meta"):
        cost = describe(dit(f"DiT-{name}", 4, condition_width=1, out_channels=8), (4, 32, 32))
    table = 1001 * DIT[f"DiT-{name}"]["widths"][0]  # of classes: the condition's, here
    # The paper rounds 32.96 to 33 and 0.358 to 0.36.
    assert cost.parameters + table == pytest.approx(parameters * 1e6, rel=0.01)
    assert cost.flops / 2e9 == pytest.approx(gflops, rel=0.01)


def test_unknown_sizes_are_refused() -> None:
    with pytest.raises(UndiffuseError, match="did you mean 'DiT-B/"):
        dit("DiT-B/3")


# --- Positions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("small", [[5], [3, 4], [2, 3, 4]])
def test_a_place_means_the_same_on_a_grid_of_any_size(small: list[int]) -> None:
    large = [n + 3 for n in small]
    window = tuple(slice(0, n) for n in small)
    for table in (
        lambda grid: sines(grid, 26, CPU, torch.float64),
        lambda grid: angles(grid, 26, CPU),
    ):
        assert torch.equal(table(large).unflatten(0, large)[window], table(small).unflatten(0, small))
        assert len(table(large).unique(dim=0)) == len(table(large))  # and every place is another
    for axis in range(len(small)):
        assert torch.equal(places(small, axis, CPU), torch.stack(
            torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in small), indexing="ij")
        )[axis].flatten())  # fmt: skip


@pytest.mark.parametrize("grid", [[9], [5, 4], [3, 4, 3]])
def test_rotary_products_depend_on_the_distance_along_each_axis(grid: list[int]) -> None:
    turns = angles(grid, 12, CPU)
    rotation = (turns.cos(), turns.sin())
    q, k = (random(12, seed=seed).double().expand(1, 1, len(turns), 12) for seed in (1, 2))
    products = (turned(q, rotation) @ turned(k, rotation).mT)[0, 0]
    where = torch.stack([places(grid, axis, CPU) for axis in range(len(grid))], dim=1)
    distance = where[:, None] - where[None]
    for shift in distance.reshape(-1, len(grid)).unique(dim=0):
        same = products[(distance == shift).all(-1)]
        torch.testing.assert_close(same, same[:1].expand_as(same))
    assert torch.allclose(turned(q, rotation).norm(dim=-1), q.norm(dim=-1))
    assert len(products.round(decimals=9).unique()) == len(distance.reshape(-1, len(grid)).unique(dim=0))


@pytest.mark.parametrize("positions", ["rotary", "sincos"])
def test_positions_matter(positions: str) -> None:
    network = made(positions=positions, patch=1)
    x = random(1, 2, 4, 4).double()
    mixed = x.flip(2)
    assert not torch.allclose(network(mixed, torch.zeros(1)).flip(2), network(x, torch.zeros(1)), atol=1e-6)


def test_what_was_learned_at_one_size_serves_at_sizes_unseen() -> None:
    """The mean of each pixel's neighbours, learned at 8x8, is known at 12x10 and 6x14 (rotary positions)."""

    def task(seed: int, *size: int) -> tuple[Tensor, Tensor]:
        x = random(16, 1, *size, seed=seed)
        return x, F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DiT(1, patch=1, widths=[32], blocks=[2], head_width=16, embedding=16)
    optimiser = torch.optim.AdamW(network.parameters(), lr=4e-3)
    for step in range(100):
        x, y = task(step, 8, 8)
        optimiser.zero_grad()
        (network(x, torch.zeros(16)) - y).square().mean().backward()
        optimiser.step()
    left = []
    with torch.no_grad():
        for size in ((8, 8), (12, 10), (6, 14)):
            x, y = task(999, *size)
            left.append(float((network(x, torch.zeros(16)) - y).square().mean() / y.square().mean()))
    assert left[0] < 0.5
    assert max(left[1:]) < 1.2 * left[0] + 0.05


# --- Parts ------------------------------------------------------------------------------------------------------------


def test_qk_norm_keeps_the_scale_of_queries_and_keys_out() -> None:
    label = torch.zeros(1)
    x = random(1, 2, 6, 5).double()
    for qk_norm in (True, False):
        network = made(qk_norm=qk_norm)
        before = network(x, label)
        for block in network.middle:
            block.stream.qkv.linear.weight.data[:48] *= 1000
            block.stream.qkv.linear.bias.data[:48] *= 1000
        assert torch.allclose(network(x, label), before, atol=1e-5) == qk_norm


@pytest.mark.parametrize("over", [0, 1])
def test_factorised_attention_is_attention_with_a_mask(over: int) -> None:
    grid = [3, 2, 4]
    q, k, v = (random(2, 5, 24, 8, seed=seed).double() for seed in (1, 2, 3))
    rows = [scattered(each, grid, over) for each in (q, k, v)]
    found = gathered(F.scaled_dot_product_attention(rows[0], rows[1], rows[2]), grid, over)
    time = places(grid, 0, CPU)
    space = 4 * places(grid, 1, CPU) + places(grid, 2, CPU)
    same = space if over == 0 else time
    mask = same[:, None] == same[None]
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def test_factorised_blocks_look_in_turns_over_space_and_time() -> None:
    for blocks, reach in ((1, "space"), (2, "all")):
        network = made(rank=3, patch=[1, 2, 2], blocks=[blocks], factorised=True)
        x = random(1, 2, 3, 4, 4).double().requires_grad_()
        network(x, torch.zeros(1))[0, 0, 0, 0, 0].backward()
        assert x.grad is not None
        assert (x.grad[:, :, 0] != 0).all()
        assert bool((x.grad[:, :, 1:] != 0).all()) == (reach == "all")
        assert bool((x.grad[:, :, 1:] != 0).any()) == (reach == "all")


@pytest.mark.parametrize("count", [2, 3, 4])
def test_long_skips_that_pass_only_what_comes_in_are_the_plain_network(count: int) -> None:
    plain, skipping = made(blocks=[count]), made(blocks=[count], skips=True)
    state = plain.state_dict()
    joints = [name for name in skipping.state_dict() if ".skip." in name]
    assert len(joints) == 2 * (count // 2)
    identity = torch.cat([torch.eye(24), torch.zeros(24, 24)], dim=1).double()
    state |= {name: identity if name.endswith("weight") else torch.zeros(24).double() for name in joints}
    skipping.load_state_dict(state)
    x, label = random(2, 2, 6, 5).double(), torch.tensor([3.0, 600.0])
    torch.testing.assert_close(skipping(x, label), plain(x, label))
    # The other half brings what block i has left: with it alone, the last joint undoes all between.
    for name in joints:
        if name.endswith("weight"):
            state[name] = identity.roll(24, 1)
    skipping.load_state_dict(state)
    alone = made(blocks=[2])
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("middle.") or "skip" in name}
    first, last = "middle.0.", f"middle.{count - 1}."
    kept |= {name: tensor for name, tensor in state.items() if name.startswith(first)}
    kept |= {name.replace(last, "middle.1."): state[name] for name in state if name.startswith(last)}
    alone.load_state_dict({name: kept[name] for name in alone.state_dict()})
    torch.testing.assert_close(skipping(x, label), alone(x, label))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_an_hourglass_whose_middle_is_silent_is_its_outer_level(rank: int) -> None:
    hourglass = made(rank=rank, widths=[24, 48], blocks=[1, 2])
    hourglass.split[0].weight.data.zero_()
    hourglass.split[0].bias.data.zero_()
    plain = made(rank=rank, blocks=[2])
    state = hourglass.state_dict()
    names = {"middle.0.": "down.0.0.", "middle.1.": "up.0.0."}
    plain.load_state_dict({n: state[names.get(n[:9], n[:9]) + n[9:]] for n in plain.state_dict()})
    x, label = random(2, 2, *[8, 4, 8][:rank]).double(), torch.tensor([3.0, 600.0])
    torch.testing.assert_close(hourglass(x, label), plain(x, label))


def test_joint_attention_of_equal_streams_is_attention_over_one_row() -> None:
    """Two streams with the same weights are one stream over tokens and patches."""
    network = made(blocks=[2], token_width=5, qk_norm=False)
    block = network.middle[0]
    block.words.load_state_dict(block.stream.state_dict())
    h, words, embedding = random(2, 6, 24).double(), random(2, 4, 24, seed=2).double(), random(2, 32, seed=3).double()
    found, found_words = block(h, words, embedding, None, None, [6])
    block.words = None
    expected, _ = block(torch.cat([words, h], dim=1), None, embedding, None, None, [10])
    torch.testing.assert_close(torch.cat([found_words, found], dim=1), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"patch": 0}, r"patch\[0\]=0"),
        ({"patch": [2]}, "one number for each of 2"),
        ({"widths": [24, 24]}, "one number a level"),
        ({"widths": [], "blocks": []}, "one number a level"),
        ({"blocks": [0]}, r"blocks\[0\]=0"),
        ({"widths": [25]}, "even width"),
        ({"head_width": 2}, "too narrow for rotary positions"),
        ({"widths": [3], "positions": "sincos"}, "too narrow for sincos"),
        ({"positions": "rotari"}, "did you mean 'rotary'"),
        ({"token_attention": "joined"}, "did you mean 'joint'"),
        ({"mlp": 0}, "mlp=0"),
        ({"dropout": 1}, "dropout=1"),
        ({"rank": 1, "factorised": True}, "time and space"),
        ({"token_width": 4, "factorised": True}, "token_attention=cross"),
        ({"token_width": -1}, "token_width=-1"),
        ({"fold": 2}, "unknown option of network dit"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UndiffuseError, match=message):
        build("dit", {**SMALL, **change})
