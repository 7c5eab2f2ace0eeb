"""The autoencoder as a network: any rank, finite reach, the nearest of a codebook."""

from __future__ import annotations

import math

import pytest
import torch

from undiffuse.codecs import CODECS, Codec, Tiling, decode_tiled
from undiffuse.errors import UndiffuseError
from undiffuse.networks.autoencoder import Autoencoder, PositionNorm, autoencoder_for, straight_through


def made(shape: tuple[int, ...] = (3, 16, 16), factor: int = 4, codebook: int = 0, **changes: object) -> Autoencoder:
    """A tiny one with random weights that do something, and latents as they are."""
    torch.manual_seed(0)
    codec = CODECS["autoencoder"]({**autoencoder_for(shape, "tiny", factor, 3, codebook), **changes})
    assert isinstance(codec, Autoencoder)
    with torch.no_grad():
        for parameter in codec.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    codec.settle([0.0] * 3, [1.0] * 3, {"data": "by hand"})
    return codec.eval()


@pytest.mark.parametrize("codebook", [0, 16])
@pytest.mark.parametrize(
    ("shape", "factor"), [((1, 64), 8), ((2, 12, 20), 4), ((5, 8, 8, 16), 4), ((1, 6, 6), 1), ((3, 16, 16), 2)]
)
def test_any_rank_channels_and_factor_round_trips_in_shape(shape: tuple[int, ...], factor: int, codebook: int) -> None:
    codec = made(shape, factor, codebook)
    z = codec.encode(torch.randn(2, *shape))
    assert z.shape == (2, *codec.latent_shape(shape)) == (2, 3, *(n // factor for n in shape[1:]))
    assert codec.decode(z).shape == (2, *shape)


@pytest.mark.parametrize("shape", [(3, 18, 16), (3, 15, 15)])
def test_sizes_that_do_not_divide_are_refused_with_what_to_do(shape: tuple[int, ...]) -> None:
    with pytest.raises(UndiffuseError, match=r"multiples of 4, such as 16x16 \(--image-size\)"):
        made().encode(torch.zeros(1, *shape))


@pytest.mark.parametrize(
    "wrong",
    [
        {"factor": 6},
        {"factor": 4, "fold": 8},
        {"widths": [8], "blocks": [1]},
        {"codebook": 1},
        {"rank": 4},
        {"blocks": [10**9, 1, 1]},
    ],
)
def test_arguments_that_do_not_fit_each_other_are_refused(wrong: dict) -> None:
    with pytest.raises(UndiffuseError):
        CODECS["autoencoder"]({"channels": 3, "fold": 1, **wrong})


def test_a_position_is_normed_alone() -> None:
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    y = PositionNorm(8).double()(x)
    expected = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(y, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("factor", "fold", "blocks"), [(4, 1, [1, 1, 2]), (4, 2, [2, 1]), (2, 2, [3]), (8, 1, [0 + 1] * 4)]
)
def test_an_element_depends_on_latents_within_reach_and_no_further(factor: int, fold: int, blocks: list[int]) -> None:
    codec = made((3, 256), factor, fold=fold, widths=[8] * len(blocks), blocks=blocks)
    z = torch.randn(1, 3, 64)
    moved = z.clone()
    moved[..., 32] += 1
    places = (codec.decode(moved) - codec.decode(z)).abs().sum((0, 1)).nonzero().flatten()
    far = max(32 - int(places.min()) // factor, int(places.max()) // factor - 32)
    assert codec.reach is not None
    assert codec.reach - 1 <= far <= codec.reach


def test_tiles_are_the_whole_to_the_rounding() -> None:
    codec = made(fold=2, widths=[8, 8], blocks=[1, 1])
    assert codec.reach is not None
    z = torch.randn(1, 3, 40, 23)
    whole = codec.decode(z)
    tiled = decode_tiled(codec, z, Tiling(2 * codec.reach + 3))
    assert (tiled - whole).abs().max() < 1e-5 * whole.abs().max()
    with pytest.raises(UndiffuseError, match=f"looks {codec.reach} far"):
        decode_tiled(codec, z, Tiling(2 * codec.reach))


def test_tiles_that_share_too_little_differ_at_seams_and_nowhere_else() -> None:
    codec = made((3, 256), 4, fold=4, widths=[8], blocks=[2])
    assert codec.reach is not None
    z = torch.randn(1, 3, 64)
    apart = (decode_tiled(codec, z, Tiling(32, 4)) - codec.decode(z)).abs().amax((0, 1))
    assert apart.max() > 1e-3
    seam = 4 * 30  # the middle of what the first two tiles share
    away = (torch.arange(256) - seam).abs() > 4 * (codec.reach + 2)
    away &= (torch.arange(256) - 4 * 46).abs() > 4 * 20  # the last two share more
    assert apart[away].max() < 1e-5


def test_the_nearest_vector_is_the_nearest() -> None:
    codec = made(codebook=50)
    z = torch.randn(3, 3, 7, 5)
    assert codec.codebook is not None
    numbers = codec.nearest(z)
    for b, i, j in [(0, 0, 0), (1, 3, 4), (2, 6, 1)]:
        distances = [math.dist(z[b, :, i, j].tolist(), vector.tolist()) for vector in codec.codebook]
        assert distances[int(numbers[b, i, j])] == pytest.approx(min(distances), rel=1e-5)
    assert torch.equal(codec.nearest(codec.look_up(numbers)), numbers)


def test_a_codebook_is_looked_up_when_it_decodes() -> None:
    codec = made(codebook=8)
    z = torch.randn(2, 3, 4, 4)
    vectors = codec.look_up(codec.nearest(z))
    assert torch.equal(codec.decode(z), codec.decode(vectors))
    assert torch.equal(codec.decode(vectors), codec.draw(vectors).float())


def test_straight_through_is_the_vectors_with_the_gradient_of_the_latents() -> None:
    z, vectors = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    y = straight_through(z, vectors)
    y.square().sum().backward()
    assert torch.allclose(y, vectors)
    assert z.grad is not None
    assert torch.allclose(z.grad, 2 * vectors)
    assert vectors.grad is None


def test_the_posterior_s_deviation_is_positive_and_finite_for_any_data() -> None:
    _, std = made().posterior(1e6 * torch.randn(2, 3, 16, 16))
    assert std is not None
    assert bool((std > 0).all())
    assert bool(std.isfinite().all())


def test_it_is_built_again_from_its_own_configuration() -> None:
    codec: Codec = made(codebook=4)
    again = CODECS["autoencoder"](codec.config)
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in codec.state_dict().items()}
