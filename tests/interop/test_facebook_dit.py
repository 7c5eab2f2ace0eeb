"""Weights of facebookresearch/DiT: the formulas of its models.py, written out plainly, on random weights."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from undiffuse.denoiser import LABELS, Denoiser
from undiffuse.errors import UndiffuseError
from undiffuse.interop.dit import from_facebook, to_facebook
from undiffuse.levels import Level
from undiffuse.networks import DIT, build, dit
from undiffuse.pipeline import ModelConfig

WIDTH, DEPTH, HEADS, PATCH, SIDE, CHANNELS, CLASSES = 24, 3, 2, 2, 8, 3, 5


def positions(width: int, side: int) -> Tensor:
    """get_2d_sincos_pos_embed: half the width for the column, half for the row; sines, then cosines."""

    def one(place: int) -> list[float]:
        half = width // 4
        rates = [1 / 10000 ** (i / half) for i in range(half)]
        return [math.sin(place * r) for r in rates] + [math.cos(place * r) for r in rates]

    rows = [one(column) + one(row) for row in range(side) for column in range(side)]
    return torch.tensor(rows, dtype=torch.float64)[None]


def random_state(out_channels: int, width: int = WIDTH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])

    state = {"pos_embed": positions(width, SIDE // PATCH)}
    state["x_embedder.proj.weight"] = draw(width, CHANNELS, PATCH, PATCH)
    state["x_embedder.proj.bias"] = draw(width)
    state["y_embedder.embedding_table.weight"] = draw(CLASSES + 1, width)
    linear = {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
    for i in range(DEPTH):
        linear |= {
            f"blocks.{i}.attn.qkv": (3 * width, width),
            f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.mlp.fc1": (4 * width, width),
            f"blocks.{i}.mlp.fc2": (width, 4 * width),
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
        }
    linear["final_layer.adaLN_modulation.1"] = (2 * width, width)
    linear["final_layer.linear"] = (PATCH * PATCH * out_channels, width)
    for name, (rows, columns) in linear.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = draw(rows, columns), draw(rows)
    return state


def theirs(state: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The forward pass of facebookresearch/DiT."""

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        normed = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        return normed * (1 + scale[:, None]) + shift[:, None]

    h = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=PATCH)
    h = h.flatten(2).transpose(1, 2) + state["pos_embed"]
    batch, count, width = h.shape
    rates = torch.exp(-math.log(10000) * torch.arange(128, dtype=h.dtype) / 128)
    waves = torch.cat([(t[:, None] * rates).cos(), (t[:, None] * rates).sin()], dim=1)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", waves)))
    c = F.silu(c + state["y_embedder.embedding_table.weight"][y])
    for i in range(DEPTH):
        parts = linear(f"blocks.{i}.adaLN_modulation.1", c).chunk(6, dim=1)
        qkv = linear(f"blocks.{i}.attn.qkv", modulated(h, parts[0], parts[1]))
        q, k, v = qkv.reshape(batch, count, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        attention = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(width // HEADS), dim=-1)
        mixed = (attention @ v).transpose(1, 2).reshape(batch, count, width)
        h = h + parts[2][:, None] * linear(f"blocks.{i}.attn.proj", mixed)
        u = linear(f"blocks.{i}.mlp.fc1", modulated(h, parts[3], parts[4]))
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        h = h + parts[5][:, None] * linear(f"blocks.{i}.mlp.fc2", u)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, dim=1)
    h = linear("final_layer.linear", modulated(h, shift, scale))
    side = math.isqrt(count)
    h = h.reshape(batch, side, side, PATCH, PATCH, -1)
    return torch.einsum("nhwpqc->nchpwq", h).reshape(batch, -1, side * PATCH, side * PATCH)


def loaded(out_channels: int) -> tuple[dict[str, Tensor], ModelConfig, Denoiser]:
    state = random_state(out_channels)
    config, own = from_facebook(state, heads=HEADS)
    with torch.random.fork_rng():
        denoiser = config.build().double()
    denoiser.load_state_dict(own)
    return state, config, denoiser


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("out_channels", [CHANNELS, 2 * CHANNELS])
def test_outputs_are_those_of_facebooks_formulas(out_channels: int, dtype: torch.dtype) -> None:
    state, config, denoiser = loaded(out_channels)
    x = torch.randn(4, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t, y = torch.tensor([0.0, 1.0, 500.0, 999.0], dtype=torch.float64), torch.tensor([0, 3, CLASSES, 1])
    expected = theirs(state, x, t, y)
    encoded = denoiser.conditions.encode({"classes": y}, 4)
    denoiser.to(dtype)
    vector = {name: part.to(dtype) for name, part in encoded.items()}
    found = denoiser.network(x.to(dtype), t.to(torch.promote_types(dtype, torch.float32)), **vector)
    # float32: an angle near 1000 is rounded to 3e-5 in their code as well.
    assert (found.double() - expected).abs().max() < (1e-9 if dtype == torch.float64 else 1e-3)
    assert config.learned_variance == (out_channels == 2 * CHANNELS)


def test_the_denoiser_says_eps_and_where_the_variance_lies() -> None:
    state, config, denoiser = loaded(2 * CHANNELS)
    x = torch.randn(1, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    level: Level = config.schedule(0.25)  # the 250th of 1000 betas: index 249
    estimate = denoiser(x, level, classes=torch.tensor([2]))
    eps, place = theirs(state, x, torch.tensor([249.0], dtype=torch.float64), torch.tensor([2])).chunk(2, dim=1)
    assert (estimate.eps - eps).abs().max() < 1e-5
    found = denoiser.output(x, level, classes=torch.tensor([2]))[1]
    assert found is not None
    assert (found - (place + 1) / 2).abs().max() < 1e-5


def test_there_and_back() -> None:
    state, _, denoiser = loaded(2 * CHANNELS)
    back = to_facebook(denoiser, SIDE)
    assert set(back) == set(state)
    for name, tensor in state.items():
        torch.testing.assert_close(back[name], tensor, atol=1e-12, rtol=0)


def test_a_condition_of_another_width_is_written_as_a_table() -> None:
    """A matrix stands between our table and the embedding; theirs holds the product."""
    config = loaded(CHANNELS)[1]
    narrow = {**config.network_config, "condition_width": 4}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        denoiser = ModelConfig(
            "dit", narrow, config.schedule, config.prediction, LABELS["discrete"], config.input_scale, config.conditions
        ).build()
        for parameter in denoiser.parameters():
            parameter.data = torch.randn_like(parameter) / 8
    denoiser.double()
    x = torch.randn(2, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t, y = torch.tensor([7.0, 800.0], dtype=torch.float64), torch.tensor([1, CLASSES])
    expected = theirs(to_facebook(denoiser, SIDE), x, t, y)
    found = denoiser.network(x, t, **denoiser.conditions.encode({"classes": y}, 2))
    assert (found - expected).abs().max() < 1e-9


def test_the_sizes_of_the_paper_need_no_heads() -> None:
    with torch.device("meta"):
        sizes = {name: dit(name, condition_width=8) for name in DIT}
    assert {name: network.heads for name, network in sizes.items() if name.endswith("/2")} == {
        "DiT-S/2": [6],
        "DiT-B/2": [12],
        "DiT-L/2": [16],
        "DiT-XL/2": [16],
    }
    with pytest.raises(UndiffuseError, match="pass heads"):
        from_facebook(random_state(CHANNELS))


def test_what_does_not_fit_is_refused() -> None:
    state = random_state(CHANNELS)
    with pytest.raises(UndiffuseError, match=r"lacks blocks\.1\.mlp\.fc2\.bias"):
        from_facebook({k: v for k, v in state.items() if k != "blocks.1.mlp.fc2.bias"}, HEADS)
    with pytest.raises(UndiffuseError, match="lacks x_embedder"):
        from_facebook({}, HEADS)
    with pytest.raises(UndiffuseError, match="it has extra"):
        from_facebook({**state, "extra": state["pos_embed"]}, HEADS)
    with pytest.raises(UndiffuseError, match="not DiT's table"):
        from_facebook({**state, "pos_embed": state["pos_embed"].flip(2)}, HEADS)
    with pytest.raises(UndiffuseError, match="do not divide"):
        from_facebook(state, 7)
    _, config, denoiser = loaded(CHANNELS)
    for option, value in {"positions": "rotary", "qk_norm": True, "skips": True, "blocks": [1, 2]}.items():
        options = {**config.network_config, option: value} | ({"widths": [24, 24]} if option == "blocks" else {})
        with torch.random.fork_rng():
            other = Denoiser(build("dit", options), config.schedule, config.prediction, conditions=denoiser.conditions)
        with pytest.raises(UndiffuseError, match="facebookresearch/DiT has"):
            to_facebook(other, SIDE)
