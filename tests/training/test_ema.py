"""The average of the weights against its closed form."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from training_laws import points, recipe
from undiffuse.denoiser import Denoiser
from undiffuse.errors import UndiffuseWarning
from undiffuse.training import EMA, Averaging, Trainer


def model() -> Denoiser:
    dataset = points()
    return Trainer(dataset, recipe(dataset)).denoiser


def test_trap_E2_the_decay_follows_its_formula() -> None:
    """Half of an old weight's influence is left after one half-life, however long the batches are."""
    for batch in (1, 4, 64):
        product = 1.0
        for _ in range(1024 // batch):
            product *= Averaging(half_life=1024, ramp=None).decay(0, batch)
        assert product == pytest.approx(0.5, rel=1e-12)
    warm = Averaging(half_life=1000, ramp=0.05)
    decays = [warm.decay(images, 10) for images in range(10, 40_000, 10)]
    assert decays == sorted(decays)  # it rises from near 0 ...
    assert decays[0] < 1e-5
    assert decays[-1] == Averaging(1000, None).decay(0, 10) == 0.5**0.01  # ... to the constant, and stays there


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trap_P4_the_average_of_a_ramp_is_its_closed_form(dtype: torch.dtype) -> None:
    """Weights k/256 after update k, constant decay d: the average is (k - d(1 - d^k)/(1 - d))/256. In bfloat16 such an
    average would not move at all."""
    denoiser = model().to(dtype)
    for p in denoiser.parameters():
        p.data.zero_()
    ema = EMA(denoiser)
    decay, updates = 0.9999, 200
    for k in range(1, updates + 1):
        for p in denoiser.parameters():
            p.data.fill_(k / 256)  # exact in bfloat16
        ema.update(decay)
    exact = (updates - decay * (1 - decay**updates) / (1 - decay)) / 256
    for average in ema.denoiser.parameters():
        assert average.dtype == torch.float32
        assert torch.allclose(average, torch.tensor(exact, dtype=torch.float32), rtol=2e-5, atol=0)


def test_the_average_of_random_weights_is_the_weighted_sum() -> None:
    denoiser, generator = model(), torch.Generator().manual_seed(0)
    ema = EMA(denoiser)
    exact = [p.detach().double() for p in denoiser.parameters()]
    profile = Averaging(half_life=40, ramp=0.1)
    for step in range(1, 30):
        decay = profile.decay(4 * step, 4)
        for i, p in enumerate(denoiser.parameters()):
            p.data.normal_(generator=generator)
            exact[i] = decay * exact[i] + (1 - decay) * p.detach().double()
        ema.update(decay)
    for average, wanted in zip(ema.denoiser.parameters(), exact, strict=True):
        assert torch.allclose(average.double(), wanted, atol=1e-6)


def test_the_average_shares_nothing_with_the_model() -> None:
    denoiser = model()
    ema = EMA(denoiser)
    before = [p.clone() for p in ema.denoiser.parameters()]
    for p in denoiser.parameters():
        p.data.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(ema.denoiser.parameters(), before, strict=True))
    assert not any(p.requires_grad for p in ema.denoiser.parameters())


def test_trap_E4_a_horizon_longer_than_the_run_is_warned_of() -> None:
    """Decay 0.9999 over 1,000 updates leaves 90 % of the random weights; N (1 - decay) < 5 is the trap's own rule."""
    half_life = round(0.6931 / 1e-4)  # decay 0.9999 with a batch of 1
    with pytest.warns(UndiffuseWarning, match="90% of what is sampled from.*ema.ramp"):
        Averaging(half_life, None).check_horizon(1000, 1)
    with pytest.warns(UndiffuseWarning, match="EMA"):
        Averaging(half_life, None).check_horizon(49_000, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Averaging(half_life, None).check_horizon(51_000, 1)
        Averaging(half_life, 0.05).check_horizon(16, 1)  # the default warm-up fits any run


def test_trap_E4_training_warns_too() -> None:
    dataset = points()
    chosen = replace(recipe(dataset), ema=Averaging(10_000, None))
    with pytest.warns(UndiffuseWarning, match="half-life of 10,000 images"):
        Trainer(dataset, chosen)
