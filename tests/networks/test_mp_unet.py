"""Laws of the magnitude-preserving U-Net."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from undiffuse.networks import build, constrain
from undiffuse.networks.mp_unet import MPProduct, MPStage, mp_cat, mp_silu, mp_sum, unit


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(**change: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(
            "mp_unet", {"in_channels": 3, "widths": [32, 48, 64], "blocks": [3, 2, 3], "embedding": 64, **change}
        )


def weights(network: torch.nn.Module) -> list[Tensor]:
    return [part.weight for part in network.modules() if isinstance(part, MPProduct)]


def size(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


def test_operations_keep_the_variance() -> None:
    a, b = random(64, 10, 40), random(64, 30, 40, seed=2)
    assert size(mp_silu(a)) == pytest.approx(1, rel=0.02)
    assert size(mp_sum(a, b[:, :10], 0.3)) == pytest.approx(1, rel=0.02)
    both = mp_cat(a, b)
    assert size(both) == pytest.approx(1, rel=0.02)
    # Both halves send the same into a layer behind them, though one has three times the channels.
    assert both[:, :10].square().sum() == pytest.approx(float(both[:, 10:].square().sum()), rel=0.05)
    for rank in (0, 1, 2, 3):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            product = MPProduct(rank, 16, 64, 3 if rank else 1)
        x = random(4, *([16] if rank == 0 else [16, *[10] * rank]), seed=3) if rank else random(200, 16)
        y = product(x)
        inner = y[(..., *[slice(1, -1)] * rank)]  # where the edge brings no zeros
        assert size(inner) == pytest.approx(1, rel=0.05)
        assert size(product(x, 0.25)) == pytest.approx(size(y) / 4)
    assert not unit(torch.zeros(2, 3), [1]).any()


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("attends", [False, True])
def test_activations_keep_unit_variance_through_the_depth(rank: int, attends: bool) -> None:
    """Within chance (few channels), the zeros beyond the edges, and what averaging in attention takes away."""
    widths = [16, 24, 32] if rank == 3 else [32, 48, 64]
    network = made(
        condition_width=6, rank=rank, widths=widths, attention=[2] * attends, token_width=5 if attends else 0
    )
    sizes: dict[str, float] = {}
    for name, part in network.named_modules():
        if isinstance(part, MPStage):
            part.register_forward_hook(lambda _, __, y, name=name: sizes.update({name: size(y)}))
    x = random(2, 3, *{1: [256], 2: [40, 40], 3: [20, 20, 20]}[rank])
    given = {"tokens": 10 * random(2, 7, 5, seed=4)} if attends else {}
    with torch.no_grad():
        network(x, torch.tensor([100.0, 800.0]), random(2, 6, seed=3), **given)
        many = network.embedding(torch.linspace(0, 1000, 500), random(500, 6, seed=3))
        assert size(many) == pytest.approx(1, abs=0.1)
    assert len(sizes) == 3 + 2 + 3 + 2 + 3
    for name, found in sizes.items():
        assert 0.75 < found < 1.15, (name, sizes)


def test_weights_act_by_their_direction_alone() -> None:
    network = made(condition_width=6).double()
    network.gain.data.fill_(1.0)
    x, label, vector = random(2, 3, 9, 7).double(), torch.tensor([3.0, 700.0]), random(2, 6).double()
    expected = network(x, label, vector)
    assert 0.1 < size(expected) < 10
    for weight in weights(network):
        weight.data *= 7
    torch.testing.assert_close(network(x, label, vector), expected)
    before = [weight.clone() for weight in weights(network)]
    constrain(network, unless=torch.tensor(3))  # an update that was not finite changed nothing, and neither does this
    assert all(torch.equal(a, b) for a, b in zip(before, weights(network), strict=True))
    constrain(network, unless=torch.tensor(0))
    for weight in weights(network):
        rms = weight.square().flatten(1).mean(1).sqrt()
        torch.testing.assert_close(rms, torch.ones_like(rms))
    torch.testing.assert_close(network(x, label, vector), expected)


def test_a_forward_pass_changes_no_weight() -> None:
    network = made().train()
    for weight in weights(network):
        weight.data *= 2
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network(random(2, 3, 9, 7), torch.tensor([3.0, 700.0])).sum().backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_updates_are_at_right_angles_to_weights_which_would_grow() -> None:
    network = made(blocks=[1, 1, 1]).double()
    network.gain.data.fill_(1.0)
    (network(random(2, 3, 8, 8).double(), torch.tensor([3.0, 700.0])) - 1).square().mean().backward()
    for weight in weights(network):
        assert weight.grad is not None
        w, g = weight.data.flatten(1), weight.grad.flatten(1)
        assert float(((w * g).sum(1).abs() / (w.norm(dim=1) * g.norm(dim=1) + 1e-12)).max()) < 1e-5


def test_there_are_no_biases_and_no_norms_with_weights() -> None:
    for name, parameter in made(condition_width=6, token_width=5, attention=[2]).named_parameters():
        assert parameter.ndim >= 2 or name.endswith(("gain", "nothing")), name
