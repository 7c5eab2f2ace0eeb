"""Laws of Muon: what a step is, which weights it moves, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from training_laws import points, recipe
from undiffuse.config import override
from undiffuse.errors import UndiffuseError
from undiffuse.networks import NETWORKS, build, sized
from undiffuse.networks.autoencoder import Autoencoder
from undiffuse.pipeline import REGISTRIES
from undiffuse.training import Trainer
from undiffuse.training.muon import NEWTON_SCHULZ, SIZE, STEPS, Muon, matrices_of, polar


@pytest.mark.parametrize("shape", [(24, 24), (16, 144), (96, 20), (3, 16, 40)])
def test_polar_keeps_the_singular_vectors_and_evens_the_values(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    p, s, q = torch.linalg.svd(x, full_matrices=False)
    found = p.mT @ polar(x) @ q.mT
    values = found.diagonal(dim1=-2, dim2=-1)
    kept = s > 0.01 * s.amax(-1, keepdim=True)  # the iteration starts from the whole matrix's length
    assert bool(((values > 0.6) & (values < 1.25))[kept].all())
    assert float((found - torch.diag_embed(values)).abs().max()) < 1e-3
    assert torch.equal(polar(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(24, 24), (16, 144), (96, 20)])
def test_polar_is_the_plain_iteration(shape: tuple[int, ...]) -> None:
    source = torch.Generator().manual_seed(0)
    p, _, q = torch.linalg.svd(torch.randn(shape, generator=source), full_matrices=False)
    x = p @ torch.diag(torch.logspace(0, -4, len(q))) @ q
    plain = (x / x.norm()).double()
    for _ in range(STEPS):
        a, b, c = NEWTON_SCHULZ
        square = plain @ plain.mT
        plain = a * plain + (b * square + c * square @ square) @ plain
    assert torch.allclose(polar(x).double(), plain, atol=5e-4)


def make(*, momentum: float = 0.9, weight_decay: float = 0.0) -> tuple[torch.nn.Parameter, torch.nn.Parameter, Muon]:
    source = torch.Generator().manual_seed(1)
    kernel = torch.nn.Parameter(torch.randn(16, 4, 3, 3, generator=source))
    bias = torch.nn.Parameter(torch.randn(16, generator=source))
    return kernel, bias, Muon([kernel], [bias], momentum=momentum, lr=0.1, weight_decay=weight_decay)


def test_two_steps_are_the_formula_and_the_rest_is_adamw() -> None:
    kernel, bias, muon = make(weight_decay=0.5)
    other = torch.nn.Parameter(bias.detach().clone())
    adamw = torch.optim.AdamW([other], lr=0.1, weight_decay=0.5)
    wanted, momentum = kernel.detach().flatten(1), torch.zeros(16, 36)
    for seed in (2, 3):
        source = torch.Generator().manual_seed(seed)
        kernel.grad = torch.randn(kernel.shape, generator=source)
        bias.grad = torch.randn(bias.shape, generator=source)
        other.grad = bias.grad.clone()
        gradient = kernel.grad.flatten(1)
        momentum = 0.9 * momentum + 0.1 * gradient
        update = polar(0.1 * gradient + 0.9 * momentum)
        wanted = (1 - 0.1 * 0.5) * wanted - 0.1 * SIZE * 36**0.5 * update
        muon.step()
        adamw.step()
    assert torch.allclose(kernel.flatten(1), wanted, atol=1e-5)
    assert torch.allclose(bias, other, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_an_update_has_the_size_of_adamws_whatever_the_gradients(scale: float) -> None:
    kernel, bias, muon = make()
    before = kernel.detach().clone()
    kernel.grad = scale * torch.randn(kernel.shape, generator=torch.Generator().manual_seed(2))
    bias.grad = torch.ones_like(bias)
    muon.step()
    assert float((kernel.detach() - before).square().mean().sqrt()) == pytest.approx(0.1 * SIZE, rel=0.25)


@pytest.mark.parametrize("family", NETWORKS)
def test_the_matrices_are_those_of_the_blocks(family: str) -> None:
    network = build(*sized((2,) if family == "mlp" else (1, 8, 8), "tiny", family=family))
    named = {id(weight): name for name, weight in network.named_parameters()}
    names = [named[id(weight)] for weight in matrices_of(network)]
    assert len(set(names)) == len(names) > 2
    assert not [name for name in names if name.split(".")[0] in ("stem", "head", "embedding", "first", "last")]


def test_of_a_codec_the_matrices_are_the_convolutions_of_its_blocks() -> None:
    codec = Autoencoder(3, widths=[16, 24, 24], blocks=[1, 1, 2], codebook=8)
    named = {id(weight): name for name, weight in codec.named_parameters()}
    names = [named[id(weight)] for weight in matrices_of(codec)]
    assert len(set(names)) == len(names) == 2 * 4 * 2  # two a block, four blocks on each side
    assert {name.split(".")[-2] for name in names} == {"first", "second"}


def test_muon_learns_what_adamw_learns() -> None:
    dataset = points()
    losses = []
    for kind in ("adamw", "muon"):
        chosen = override(recipe(dataset, images=1600, batch_size=16), [f"optimiser.kind={kind}"], REGISTRIES)
        losses.append([float(update.loss) for update in Trainer(dataset, chosen).updates()])
    assert losses[0][0] == losses[1][0]
    assert losses[0] != losses[1]
    assert sum(losses[1][-20:]) < 0.95 * sum(losses[1][:20])


def test_a_momentum_of_one_is_refused() -> None:
    with pytest.raises(UndiffuseError, match="momentum=1"):
        override(recipe(points()), ["optimiser.momentum=1.0"], REGISTRIES)
