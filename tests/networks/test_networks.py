"""Laws of every network, over every entry of the registry."""

from __future__ import annotations

import copy
import inspect
import json
import math
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from undiffuse.attention import attention
from undiffuse.errors import UndiffuseError
from undiffuse.networks import NETWORKS, SIZES, Network, UNet, build, describe, sized
from undiffuse.networks.layers import film_norm, fold, sinusoid, unfold

SHAPES = [[1, 8, 8], [1, 28, 28], [3, 32, 32], [3, 64, 64], [1, 100], [2], [1, 9, 9, 9], [5, 7, 13]]
ODD = [[2], [1], [1, 1], [3, 13], [1, 1, 1], [2, 1, 7], [1, 5, 6], [3, 9, 4], [1, 3, 1, 5], [2, 4, 5, 6]]
# One small conditional configuration for every registry entry: a new network is enrolled by adding its line here.
EXAMPLES: dict[str, tuple[list[int], dict[str, Any]]] = {
    "unet": ([2, 6, 5], {"in_channels": 2, "widths": [8, 16], "blocks": [1, 1], "attention": [1], "embedding": 32}),
    "mp_unet": ([2, 6, 5], {"in_channels": 2, "widths": [8, 16], "blocks": [1, 1], "attention": [1], "embedding": 32}),
    "ddpm_unet": ([2, 6, 5], {"in_channels": 2, "widths": [8, 16], "attention": [1], "head_width": 8, "embedding": 32}),
    "dit": ([2, 6, 5], {"in_channels": 2, "widths": [24], "blocks": [2], "head_width": 8, "embedding": 32}),
    "mlp": ([3], {"in_channels": 3, "width": 16, "blocks": 2, "embedding": 32}),
}
FAMILIES = [name for name in NETWORKS if name != "mlp"]  # those for data with spatial dimensions


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(name: str, config: dict[str, Any]) -> Network:
    """The network with all weights drawn anew, those that start at 0 too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(name, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def test_every_registry_entry_has_an_example():
    assert set(EXAMPLES) == set(NETWORKS)


@pytest.mark.parametrize("shape", ODD, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("extra", [0, 5])
def test_any_size_gives_its_own_shape_and_gradients(shape: list[int], family: str, extra: int):
    if len(shape) == 1 and family != "unet":
        pytest.skip("points have one family")
    if len(shape) != 3 and family == "ddpm_unet":
        pytest.skip("for pictures only")
    name, config = sized(shape, "tiny", 4, shape[0] + extra, family if len(shape) > 1 else None)
    network = seeded(name, config)
    y = network(random(2, *shape), torch.tensor([3.0, 700.0]), random(2, 4))
    assert y.shape == (2, shape[0] + extra, *shape[1:])
    assert y.isfinite().all()
    y.square().sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_fold_pads_inside_and_crops_outside(rank: int, factor: int):
    size = [7, 5, 4][:rank]
    network = seeded(
        "unet", {"in_channels": 2, "rank": rank, "widths": [8], "blocks": [1], "attention": [], "fold": factor}
    )
    x = random(2, 2, *size)
    y = network(x, torch.zeros(2))
    assert y.shape == x.shape
    # Padding by hand with the edge to the multiple gives the same pixels.
    index = [torch.arange(-(-n // factor) * factor).clamp(max=n - 1) for n in size]
    padded = x
    for axis, chosen in enumerate(index):
        padded = padded.index_select(axis + 2, chosen)
    whole = network(padded, torch.zeros(2))[(..., *(slice(0, n) for n in size))]
    torch.testing.assert_close(y, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_unfold_inverts_fold_and_agrees_with_torch(rank: int):
    x = random(2, 3, *[4, 6, 8][:rank])
    folded = fold(x, [2] * rank)
    assert folded.shape == (2, 3 * 2**rank, *[2, 3, 4][:rank])
    assert torch.equal(unfold(folded, [2] * rank), x)
    uneven = [4, 1, 2][:rank]
    assert fold(x, uneven).shape == (2, 3 * math.prod(uneven), *[1, 6, 4][:rank])
    assert torch.equal(unfold(fold(x, uneven), uneven), x)
    if rank == 2:
        assert torch.equal(folded, torch.nn.functional.pixel_unshuffle(x, 2))


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@pytest.mark.parametrize("last", [False, True])
def test_film_norm_is_norm_then_scale_and_shift(rank: int, last: bool):
    x = random(3, 8, *[4, 5, 3][:rank]).double()
    if last and rank == 2:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    scale = random(3, 8, seed=2).double().requires_grad_()
    shift = random(3, 8, seed=3).double().requires_grad_()
    groups = x.reshape(3, 2, -1)
    normed = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
    each = (3, 8, *[1] * rank)
    expected = normed.reshape(x.shape) * (1 + scale.reshape(each)) + shift.reshape(each)
    found = film_norm(x, 2, scale, shift)
    torch.testing.assert_close(found, expected)
    weight = random(*x.shape, seed=4).double()
    inputs = [x, scale, shift]
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NETWORKS)
def test_trap_O5_output_depends_on_label_and_condition_after_one_optimiser_step(name: str):
    shape, config = EXAMPLES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(name, {**config, "condition_width": 6})
    x, vector = random(4, *shape), random(4, 6, seed=2)
    label = torch.tensor([1.0, 300.0, 600.0, 900.0])
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
    assert not network(x, label, vector).any()  # starts at exactly 0
    (network(x, label, vector) - random(4, *shape, seed=3)).square().mean().backward()
    optimiser.step()
    with torch.no_grad():
        y = network(x, label, vector)
        assert (network(x, label + 400, vector) - y).abs().max() > 1e-5
        assert (network(x, label, vector.flip(0)) - y).abs().max() > 1e-5


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trap_P1_embeddings_of_all_integer_labels_are_distinct(name: str, dtype: torch.dtype):
    network: Any = seeded(name, EXAMPLES[name][1]).to(dtype)
    label = torch.arange(1000, dtype=torch.float32)
    with torch.no_grad():
        assert len(network.embedding(label, None).float().unique(dim=0)) == 1000
        # A time in bfloat16 would merge neighbours: the reason why it is refused.
        assert len(sinusoid(label.bfloat16().float(), 64).unique(dim=0)) < 600
    with pytest.raises(UndiffuseError, match="float32"):
        network(random(1, *EXAMPLES[name][0]), torch.zeros(1, dtype=torch.bfloat16))


def test_sinusoid_is_computed_in_full_precision():
    label = torch.tensor([0.0, 1.0, -1554.3, 998.25, 1000.0])
    rates = 10_000.0 ** (-torch.arange(16, dtype=torch.float64) / 15)
    angles = label.double()[:, None] * rates
    expected = torch.cat([angles.cos(), angles.sin()], dim=1)
    torch.testing.assert_close(sinusoid(label, 32).double(), expected, atol=5e-4, rtol=0)
    torch.testing.assert_close(sinusoid(label.double(), 32), expected)
    assert torch.equal(sinusoid(torch.tensor([7]), 32), sinusoid(torch.tensor([7.0]), 32))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_floating_dtype(name: str, dtype: torch.dtype):
    shape, config = EXAMPLES[name]
    network = seeded(name, config)
    x, label = random(3, *shape), torch.tensor([1.0, 500.0, 999.0])
    expected = network(x, label)
    found = network.to(dtype)(x.to(dtype), label)
    assert found.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float64 else 0.1
    assert (found - expected).norm() < tolerance * expected.norm()
    found.float().square().mean().backward()


@pytest.mark.parametrize("shape", [[2, 9], [2, 9, 7], [1, 5, 6, 7]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_of_every_rank(family: str, shape: list[int]):
    """As weights and as autocast, forwards and backwards: kernels differ by rank, and some do not exist in half."""
    if len(shape) != 3 and family == "ddpm_unet":
        pytest.skip("for pictures only")
    network = seeded(*sized(shape, "tiny", family=family))
    x, label = random(2, *shape), torch.tensor([3.0, 700.0])
    expected = network(x, label)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            cast = network(x, label)
        rounded = seeded(*sized(shape, "tiny", family=family)).to(dtype)(x.to(dtype), label)
        for found in (cast, rounded):
            found.float().square().mean().backward()
            assert (found - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_autocast_is_close(name: str):
    shape, config = EXAMPLES[name]
    network = seeded(name, config)
    x, label = random(3, *shape), torch.tensor([1.0, 500.0, 999.0])
    expected = network(x, label)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network(x, label)
        loss = found.float().square().mean()
    loss.backward()
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_attention_in_half_precision_is_computed_in_float32_on_a_cpu():
    # Also under autocast, and with its gradient: torch's own bfloat16 kernel differs in both.
    q, k, v = (random(2, 3, 8, 4, seed=i).bfloat16().requires_grad_() for i in range(3))
    mask = random(2, 1, 1, 8, seed=4) < 0.5
    mask[..., 0] = True
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(q, k, v, mask)
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask).bfloat16()
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, exact)
    pairs = zip(torch.autograd.grad(y.sum(), (q, k, v)), torch.autograd.grad(exact.sum(), (q, k, v)), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("fold", [1, 2])
def test_coordinates_tell_places_apart_where_the_data_does_not(rank: int, fold: int):
    def middle(**options: Any) -> Tensor:
        torch.manual_seed(0)
        net = UNet(1, 1, rank, widths=[8], blocks=[1], attention=[], embedding=8, fold=fold, **options)
        torch.nn.init.normal_(cast(nn.Conv2d, net.head).weight)
        y = net(torch.ones(1, 1, *[15 * fold] * rank), torch.ones(1))[0, 0]
        return y[(slice(7 * fold, 9 * fold),) * rank]  # the padding at the border is not seen from here

    flat, told = middle(), middle(coordinates=True)
    for axis in range(rank):
        before, after = flat.narrow(axis, 0, fold), flat.narrow(axis, fold, fold)
        assert torch.allclose(before, after, atol=1e-5)
        before, after = told.narrow(axis, 0, fold), told.narrow(axis, fold, fold)
        assert not torch.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_samples_of_a_batch_do_not_meet(name: str):
    shape, config = EXAMPLES[name]
    network = seeded(name, {**config, "condition_width": 6}).double()
    x, label, vector = random(4, *shape).double(), torch.tensor([1.0, 300.0, 600.0, 900.0]), random(4, 6).double()
    whole = network(x, label, vector)
    for i in range(4):
        torch.testing.assert_close(network(x[i : i + 1], label[i : i + 1], vector[i : i + 1]), whole[i : i + 1])


# Every option away from its default, so that one that config forgets cannot hide behind it.
UNET: dict[str, Any] = {
    "in_channels": 2,
    "out_channels": 5,
    "rank": 1,
    "widths": [8, 12],
    "blocks": [2, 1],
    "attention": [0],
    "head_width": 4,
    "embedding": 24,
    "condition_width": 3,
    "fold": 2,
    "dropout": 0.25,
    "token_width": 5,
}
FULL: dict[str, dict[str, Any]] = {
    "unet": UNET | {"coordinates": True},
    "mp_unet": UNET,
    "ddpm_unet": {
        "in_channels": 2,
        "out_channels": 5,
        "widths": [8, 12],
        "blocks": 2,
        "attention": [0],
        "head_width": 4,
        "embedding": 24,
        "condition_width": 3,
        "groups": 4,
        "dropout": 0.25,
        "token_width": 5,
    },
    "dit": {
        "in_channels": 2,
        "out_channels": 5,
        "rank": 3,
        "patch": [1, 2, 2],
        "widths": [12, 24],
        "blocks": [2, 1],
        "head_width": 12,
        "mlp": 2.0,
        "embedding": 24,
        "condition_width": 3,
        "token_width": 5,
        "token_attention": "cross",
        "positions": "sincos",
        "qk_norm": False,
        "skips": True,
        "factorised": True,
        "dropout": 0.25,
    },
    "mlp": {
        "in_channels": 3,
        "out_channels": 4,
        "width": 12,
        "blocks": 3,
        "octaves": 2,
        "embedding": 24,
        "condition_width": 3,
        "dropout": 0.25,
    },
}


@pytest.mark.parametrize("name", NETWORKS)
def test_config_holds_every_option(name: str):
    options = inspect.signature(NETWORKS[name]).parameters
    assert set(FULL[name]) == set(options)
    assert all(FULL[name][key] != option.default for key, option in options.items())
    assert NETWORKS[name](**FULL[name]).config == FULL[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_config_round_trip(name: str):
    shape, config = EXAMPLES[name]
    network = seeded(name, {**config, "condition_width": 6, "out_channels": 7, "dropout": 0.1})
    again = NETWORKS[name](**json.loads(json.dumps(network.config)))
    assert again.config == network.config
    again.load_state_dict(network.state_dict())
    arguments = (random(2, *shape), torch.tensor([4.0, 40.0]), random(2, 6))
    assert torch.equal(again.eval()(*arguments), network.eval()(*arguments))


@pytest.mark.parametrize("name", NETWORKS)
def test_condition_must_fit_the_network(name: str):
    shape, config = EXAMPLES[name]
    x, label = random(2, *shape), torch.zeros(2)
    plain, conditional = build(name, config), build(name, {**config, "condition_width": 6})
    with pytest.raises(UndiffuseError, match="unconditional"):
        plain(x, label, random(2, 6))
    with pytest.raises(UndiffuseError, match="conditional: pass vector"):
        conditional(x, label)
    with pytest.raises(UndiffuseError, match=r"vector has shape \[1, 6\]"):
        conditional(x, label, random(1, 6))
    with pytest.raises(UndiffuseError, match="x has shape"):
        plain(x[0], label)
    with pytest.raises(UndiffuseError, match="x has shape"):
        plain(x[:, :1], label)
    for wrong in (torch.zeros(()), torch.zeros(1), torch.zeros(2, 1)):
        with pytest.raises(UndiffuseError, match="label has shape"):
            plain(x, wrong)


@pytest.mark.parametrize("name", NETWORKS)
def test_copy_for_an_average_is_independent(name: str):
    shape, config = EXAMPLES[name]
    network = seeded(name, config)
    x, label = random(2, *shape), torch.tensor([4.0, 40.0])
    average = copy.deepcopy(network).requires_grad_(False)
    before = average(x, label)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    assert torch.equal(average(x, label), before)
    assert list(average.state_dict()) == list(network.state_dict())


@pytest.mark.parametrize("fold", [1, 2])
def test_channels_last_equals_contiguous(fold: int):
    shape, config = EXAMPLES["unet"]
    network = seeded("unet", {**config, "fold": fold}).double()
    x, label = random(2, *shape).double(), torch.tensor([4.0, 40.0])
    expected = network(x, label)
    torch.testing.assert_close(network(x.contiguous(memory_format=torch.channels_last), label), expected)
    last = network.to(memory_format=torch.channels_last)  # pyrefly: ignore
    torch.testing.assert_close(last(x, label), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_initial_weights_are_those_of_the_seed(name: str):
    with torch.random.fork_rng():
        states = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            states.append(build(name, EXAMPLES[name][1]).state_dict())
    first, same, other = states
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_names_of_weights_are_those_that_files_hold():
    network = UNet(1, widths=(8, 16), blocks=(1, 1), attention=(1,), embedding=32, condition_width=4)
    names = list(network.state_dict())
    for name in (
        "embedding.first.weight",
        "embedding.condition.weight",
        "stem.weight",
        "down.0.0.block.norm.weight",
        "down.0.0.block.film.film.weight",
        "shrink.0.weight",
        "middle.0.attention.qkv.weight",
        "grow.0.weight",
        "up.0.0.block.second.weight",
        "norm.film.weight",
        "head.weight",
    ):
        assert name in names
    assert all(tensor.is_contiguous() for tensor in network.state_dict().values())  # as safetensors wants them


@pytest.mark.parametrize("name", NETWORKS)
def test_a_compiler_sees_one_graph(name: str):
    """No branch of the forward pass depends on numbers: ``fullgraph`` refuses any."""
    shape, config = EXAMPLES[name]
    takes = {"condition_width": 6} | ({} if name == "mlp" else {"token_width": 5})
    network = seeded(name, {**config, **takes})
    inputs = {"vector": random(2, 6)}
    if name != "mlp":
        inputs |= {"tokens": random(2, 3, 5), "mask": torch.tensor([[True, True, False], [False] * 3])}
    x, label = random(2, *shape), torch.tensor([4.0, 40.0])
    with torch.no_grad():
        compiled = torch.compile(network, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, label, **inputs), network(x, label, **inputs))
    torch.compiler.reset()


@pytest.mark.parametrize("name", NETWORKS)
def test_dropout_acts_in_training_only(name: str):
    shape, config = EXAMPLES[name]
    network = seeded(name, {**config, "dropout": 0.5})
    x, label = random(2, *shape), torch.tensor([4.0, 40.0])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(network(x, label), network(x, label))
    network.eval()
    assert torch.equal(network(x, label), network(x, label))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"fold": 0}, "fold=0"),
        ({"widths": [8]}, "one number a level"),
        ({"widths": [], "blocks": []}, "one number a level"),
        ({"widths": [8, 2]}, "at least 4"),
        ({"blocks": [1, 0]}, r"blocks\[1\]=0"),
        ({"attention": [2]}, "levels from 0 to 1"),
        ({"dropout": 1.0}, "dropout"),
        ({"widht": 3}, "did you mean 'widths'"),
    ],
)
def test_bad_unet_arguments_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(UndiffuseError, match=message):
        build("unet", {**EXAMPLES["unet"][1], **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"octaves": -1}, "octaves"),
        ({"width": 2}, "at least 4"),
        ({"dropout": -0.1}, "dropout"),
        ({"rank": 2}, "option"),
    ],
)
def test_bad_mlp_arguments_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(UndiffuseError, match=message):
        build("mlp", {**EXAMPLES["mlp"][1], **change})


def test_unknown_names_are_refused_with_a_suggestion():
    with pytest.raises(UndiffuseError, match="did you mean 'unet'"):
        build("unett", {})
    with pytest.raises(UndiffuseError, match="lacks in_channels"):
        build("unet", {})
    with pytest.raises(UndiffuseError, match="did you mean 'small'"):
        sized([1, 8, 8], "smal")
    with pytest.raises(UndiffuseError, match="unknown network family 'ditt': did you mean 'dit'"):
        sized([1, 8, 8], family="ditt")
    with pytest.raises(UndiffuseError, match="mlp does not take data of shape"):
        sized([1, 8, 8], family="mlp")
    with pytest.raises(UndiffuseError, match="did you mean 'DiT-XL/2'"):
        sized([1, 8, 8], "DiT-XXL/2", family="dit")
    for shape in ([], [1, 2, 3, 4, 5], [1, 0, 4]):
        with pytest.raises(UndiffuseError, match="no network takes"):
            sized(shape)


@pytest.mark.parametrize("family", [None, *FAMILIES])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_size_dial_grows(shape: list[int], family: str | None):
    if len(shape) == 1 and family:
        with pytest.raises(UndiffuseError, match="choose from mlp"):
            sized(shape, family=family)
        return
    if len(shape) != 3 and family == "ddpm_unet":
        with pytest.raises(UndiffuseError, match="for pictures"):
            sized(shape, family=family)
        return
    costs = []
    for size in SIZES:
        name, config = sized(shape, size, 3, 2 * shape[0], family)
        assert name == (family or ("mlp" if len(shape) == 1 else "unet"))
        assert json.loads(json.dumps(config)) == config
        with torch.device("meta"):
            network = build(name, config)
            assert network(torch.zeros(2, *shape), torch.zeros(2), torch.zeros(2, 3)).shape == (
                2,
                2 * shape[0],
                *shape[1:],
            )
        costs.append(describe(network, shape))
    for key in ("parameters", "flops"):
        values = [getattr(cost, key) for cost in costs]
        assert values == sorted(values)
        assert len(set(values)) == len(values)
    assert costs[0].parameters < (150_000 if len(shape) == 4 or family == "ddpm_unet" else 100_000)


def test_description_is_that_of_a_real_forward_pass():
    network = UNet(1, widths=(8, 16), blocks=(1, 1), attention=(1,), embedding=32, condition_width=4)
    # The counter does not know the fused attention of processors, so let a real pass spell its products out.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        network(random(1, 1, 8, 8), torch.zeros(1), random(1, 4))
    cost = describe(network, [1, 8, 8])
    assert cost.flops == counter.get_total_flops()
    assert cost.parameters == sum(tensor.numel() for tensor in network.state_dict().values())
    # A convolution alone, by hand: 2 * 9 * inputs * outputs * pixels.
    stem = 2 * 9 * 8 * 64
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.stem(random(1, 1, 8, 8))
    assert counter.get_total_flops() == stem


def test_attention_reaches_every_pixel():
    network = seeded(
        "unet", {"in_channels": 1, "widths": [8], "blocks": [1], "attention": [0], "embedding": 32}
    ).double()
    x = random(1, 1, 12, 12).double().requires_grad_()
    network(x, torch.zeros(1))[0, 0, 0, 0].backward()
    assert x.grad is not None
    assert (x.grad != 0).all()
