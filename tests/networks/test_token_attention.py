"""Laws of conditions in parts (tokens with a mask), over every kind of network that takes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from undiffuse.errors import UndiffuseError
from undiffuse.networks import Network, attention_maps, build
from undiffuse.networks.maps import shares

D, T = 5, 4
DIT = {"in_channels": 2, "widths": [24], "blocks": [3], "head_width": 8, "embedding": 32, "token_width": D}
UNET = {"in_channels": 2, "widths": [8, 16], "blocks": [1, 1], "attention": [1], "embedding": 32, "token_width": D}
TAKERS: dict[str, tuple[str, dict[str, Any]]] = {
    "unet": ("unet", UNET),
    "mp_unet": ("mp_unet", UNET),
    "ddpm_unet": ("ddpm_unet", {**UNET, "blocks": 1, "head_width": 8}),
    "dit-cross": ("dit", {**DIT, "token_attention": "cross"}),
    "dit-joint": ("dit", {**DIT, "token_attention": "joint"}),
    "dit-joint-hourglass": ("dit", {**DIT, "widths": [12, 24], "blocks": [1, 2], "skips": True}),
    "dit-cross-factorised": ("dit", {**DIT, "token_attention": "cross", "factorised": True}),
}  # fmt: skip
each_taker = pytest.mark.parametrize("taker", TAKERS)
LABEL = torch.tensor([3.0, 500.0, 900.0])


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(taker: str, noise: float = 0.1) -> Network:
    name, config = TAKERS[taker]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(name, config)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(noise * torch.randn(parameter.shape))
    return network


X, TOKENS = random(3, 2, 6, 5), random(3, T, D, seed=2)
MASK = torch.tensor([[True, True, True, False], [True, False, False, False], [False] * 4])


@each_taker
@pytest.mark.parametrize("filler", [0.0, 1e30, float("nan"), float("inf")])
def test_what_stands_in_padded_rows_changes_nothing(taker: str, filler: float) -> None:
    network = made(taker)
    with torch.no_grad():
        expected = network(X, LABEL, tokens=TOKENS, mask=MASK)
        found = network(X, LABEL, tokens=torch.where(MASK[..., None], TOKENS, filler), mask=MASK)
    assert expected.isfinite().all()
    assert torch.equal(found, expected)


@each_taker
def test_gradients_are_finite_beside_padding(taker: str) -> None:
    network = made(taker)
    tokens = torch.where(MASK[..., None], TOKENS, torch.nan).requires_grad_()
    network(X, LABEL, tokens=tokens, mask=MASK).square().sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.isfinite().all()
    assert (tokens.grad[~MASK] == 0).all()
    assert (tokens.grad[MASK] != 0).any(1).all()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@each_taker
def test_padding_may_be_of_any_length_and_none_may_be_left(taker: str) -> None:
    network = made(taker).double()
    x, tokens = X.double(), TOKENS.double()
    whole = network(x, LABEL, tokens=tokens, mask=MASK)
    for i, length in enumerate((3, 1, 0)):
        alone = network(x[i : i + 1], LABEL[i : i + 1], tokens=tokens[i : i + 1, :length])
        torch.testing.assert_close(alone, whole[i : i + 1], atol=1e-6, rtol=0)
    full = torch.ones(3, T, dtype=torch.bool)
    torch.testing.assert_close(network(x, LABEL, tokens=tokens, mask=full), network(x, LABEL, tokens=tokens))


@each_taker
def test_tokens_are_a_set_whose_order_is_the_encoders_business(taker: str) -> None:
    network = made(taker).double()
    order = torch.tensor([2, 0, 3, 1])
    expected = network(X.double(), LABEL, tokens=TOKENS.double(), mask=MASK)
    found = network(X.double(), LABEL, tokens=TOKENS.double()[:, order], mask=MASK[:, order])
    torch.testing.assert_close(found, expected)


@each_taker
def test_attention_tells_tokens_apart_that_have_the_same_mean(taker: str) -> None:
    network = made(taker, 0.3).double()
    step = torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=torch.float64)[None, :, None]
    tokens = TOKENS.double()
    difference = network(X.double(), LABEL, tokens=tokens) - network(X.double(), LABEL, tokens=tokens + step)
    assert difference.abs().max() > 1e-5


@each_taker
def test_trap_O5_output_depends_on_tokens_after_one_optimiser_step(taker: str) -> None:
    network = made(taker, 0.0)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
    assert not network(X, LABEL, tokens=TOKENS).any()
    (network(X, LABEL, tokens=TOKENS) - random(3, 2, 6, 5, seed=3)).square().mean().backward()
    optimiser.step()
    with torch.no_grad():
        difference = network(X, LABEL, tokens=TOKENS) - network(X, LABEL, tokens=TOKENS.flip(0))
    assert difference[0].abs().max() > 1e-6


@each_taker
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_floating_dtype(taker: str, dtype: torch.dtype) -> None:
    network = made(taker)
    expected = network(X, LABEL, tokens=TOKENS, mask=MASK)
    found = network.to(dtype)(X.to(dtype), LABEL, tokens=TOKENS.to(dtype), mask=MASK)
    assert found.dtype == dtype
    assert (found - expected).norm() < (1e-4 if dtype == torch.float64 else 0.1) * expected.norm()


@each_taker
def test_what_does_not_fit_is_refused(taker: str) -> None:
    network = made(taker)
    for keywords, message in (
        ({}, r"conditional: pass tokens of shape \[3, T, 5\]"),
        ({"tokens": TOKENS[..., :3]}, r"tokens has shape \[3, 4, 3\]"),
        ({"tokens": TOKENS[:1]}, r"tokens has shape \[1, 4, 5\]"),
        ({"tokens": TOKENS, "mask": MASK[:, :2]}, "mask is"),
        ({"tokens": TOKENS, "mask": MASK.float()}, "must be bool"),
        ({"mask": MASK}, "pass tokens"),
    ):
        with pytest.raises(UndiffuseError, match=message):
            network(X, LABEL, **keywords)
    name, config = TAKERS[taker]
    plain = build(name, {**config, "token_width": 0})
    with pytest.raises(UndiffuseError, match="token_width=0"):
        plain(X, LABEL, tokens=TOKENS)
    with pytest.raises(UndiffuseError, match="without the tokens"):
        plain(X, LABEL, mask=MASK)


# --- Attention maps ---------------------------------------------------------------------------------------------------


@each_taker
def test_maps_are_shares_of_the_tokens_that_are_there(taker: str) -> None:
    network = made(taker)
    before = network(X, LABEL, tokens=TOKENS, mask=MASK)
    with attention_maps(network) as maps:
        assert torch.equal(network(X, LABEL, tokens=TOKENS, mask=MASK), before)
    count = len(maps)
    assert count
    for each in maps:
        assert dict(network.named_modules())[each.layer] is not None
        grid = each.weights.shape[2:-1]
        assert each.weights.shape == (3, each.weights.shape[1], *grid, T)
        assert len(grid) == 2
        assert (each.weights.movedim(-1, 1)[~MASK] == 0).all()
        assert (each.weights.movedim(-1, 1)[MASK] > 0).all()
        assert (each.weights.sum(-1) < 1 + 1e-6).all()  # what is left looks at nothing, or at other positions
    network(X, LABEL, tokens=TOKENS)
    assert len(maps) == count  # nobody looks on any more
    with pytest.raises(ZeroDivisionError), attention_maps(network):
        _ = 1 / 0
    assert not any(module._forward_hooks for module in network.modules())


def test_maps_are_the_weights_that_attention_computes() -> None:
    q, k = random(2, 3, 7, 8), random(2, 3, 6, 8, seed=2)
    mask = torch.tensor([[True, False, True, True], [True, True, True, False]])
    kept = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 1]]).bool()[:, None, None]
    # Attention over the columns of the unit matrix says its own weights.
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, torch.eye(6).expand(2, 3, 6, 6), attn_mask=kept)
    found = shares(q, k, 1, 4, mask, (2, 3))
    torch.testing.assert_close(found, expected[:, :, 1:, 1:5].unflatten(2, (2, 3)))


@each_taker
def test_the_maps_of_a_sample_are_its_own(taker: str) -> None:
    network = made(taker)
    with attention_maps(network) as whole:
        network(X, LABEL, tokens=TOKENS)
    with attention_maps(network) as alone:
        network(X[:1], LABEL[:1], tokens=TOKENS[:1])
    for many, one in zip(whole, alone, strict=True):
        torch.testing.assert_close(many.weights[:1], one.weights)
