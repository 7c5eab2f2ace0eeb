"""Features learned from the data: trained once, the same every time, and honest about how good they are."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from undiffuse import UndiffuseError, UndiffuseWarning, from_array, open_dataset
from undiffuse.cache import cache_folder
from undiffuse.data import Dataset
from undiffuse.data.base import ArrayDataset
from undiffuse.evaluation import learned as module
from undiffuse.evaluation.extraction import extract, make_features
from undiffuse.evaluation.frechet import frechet_distance
from undiffuse.evaluation.learned import (
    Autoencoder,
    Budget,
    Classifier,
    LearnedAutoencoder,
    LearnedClassifier,
    moved,
)

SHORT = Budget(epochs=1, least=12_000)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return open_dataset("digits")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return frechet_distance(a.mean(0).numpy(), a.T.cov().numpy(), b.mean(0).numpy(), b.T.cov().numpy())


def test_the_classifier_of_digits_is_an_instrument(digits: Dataset, cache: Path) -> None:
    features = LearnedClassifier(SHORT).fit(digits, cache)
    assert float(features.facts["held_out_accuracy"]) > 0.95
    assert features.facts["held_out"] == 180
    values = digits.values(range(len(digits)))
    noisy = values.astype(float) + np.random.Generator(np.random.PCG64(0)).normal(0, 4, values.shape)
    noisy = np.clip(np.rint(noisy), 0, 16).astype(np.uint8)
    even, odd = extract(features, values[::2]), extract(features, values[1::2])
    floor, fault = distance(even.features, odd.features), distance(extract(features, noisy).features, even.features)
    assert 0 < 5 * floor < fault
    assert even.probabilities is not None
    assert even.probabilities.shape == (899, 10)
    right = even.probabilities.argmax(1).numpy() == digits.labels[::2]  # pyrefly: ignore
    assert right.mean() > 0.95


def test_it_is_trained_once_and_found_again(digits: Dataset, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = LearnedClassifier(SHORT).fit(digits, cache)

    def never(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(module, "fit", never)
    again = LearnedClassifier(SHORT).fit(open_dataset("digits"), cache)
    assert again.fingerprint == first.fingerprint
    assert again.facts == first.facts
    values = digits.values(range(64))
    assert torch.equal(again(values), first(values))
    # anything else is another network: a bit of the data, the budget, the seed
    items = digits.values(range(len(digits)))
    items[5, 3, 3] ^= 1
    changed = ArrayDataset(digits.spec, items, digits.labels, name="digits")
    for data, budget in ((changed, SHORT), (digits, replace(SHORT, seed=1)), (digits, replace(SHORT, epochs=2))):
        with pytest.raises(AssertionError, match="trained again"):
            LearnedClassifier(budget).fit(data, cache)


def test_training_is_a_function_of_the_data_and_the_seed(digits: Dataset, tmp_path: Path) -> None:
    brief = Budget(epochs=1, least=1280)
    before = torch.get_rng_state()
    first, second = (LearnedClassifier(brief).fit(digits, tmp_path / name) for name in "ab")
    assert torch.equal(before, torch.get_rng_state())
    assert first.weights == second.weights
    assert first.weights != LearnedClassifier(replace(brief, seed=1)).fit(digits, tmp_path).weights


def test_an_interrupted_training_leaves_nothing(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "moved", interrupted)
    with pytest.raises(KeyboardInterrupt):
        LearnedClassifier(SHORT).fit(digits, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_cache_is_said_and_made_again(digits: Dataset, tmp_path: Path) -> None:
    brief = Budget(epochs=1, least=1280)
    first = LearnedClassifier(brief).fit(digits, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UndiffuseWarning, match=r"classifier-.*damaged.*made again"):
        again = LearnedClassifier(brief).fit(digits, tmp_path)
    assert again.weights == first.weights == LearnedClassifier(brief).fit(digits, tmp_path).weights


def test_labels_that_say_nothing_are_reported(tmp_path: Path) -> None:
    random = np.random.Generator(np.random.PCG64(0))
    data = from_array(random.integers(0, 256, (200, 8, 8), dtype=np.uint8), random.integers(0, 2, 200))
    with pytest.warns(UndiffuseWarning, match=r"right on \d+\.\d% of held-out items.*its features say little"):
        LearnedClassifier(Budget(epochs=1, least=1280)).fit(data, tmp_path)


def test_the_autoencoder_explains_the_data(digits: Dataset, cache: Path) -> None:
    with pytest.warns(UndiffuseWarning, match="the range is taken"):
        unlabelled = from_array(digits.values(range(len(digits))))
    features = LearnedAutoencoder(SHORT).fit(unlabelled, cache)
    assert float(features.facts["held_out_variance_explained"]) > 0.5
    network = features.network
    assert isinstance(network, Autoencoder)
    x = unlabelled.batch(range(100))[0]
    with torch.inference_mode():
        code, logits = network(x)
        again = network.decode(code)
    assert logits is None
    assert again.shape == x.shape
    assert float((again - x).square().mean()) < 0.5 * float((x - x.mean(0)).square().mean())


@pytest.mark.parametrize("size", [(4, 4), (5, 9), (28, 28), (32, 32), (64, 48), (17, 100), (256, 256)])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_size_of_picture_fits(size: tuple[int, int], channels: int) -> None:
    x = torch.zeros(2, channels, *size)
    features, logits = Classifier(channels, size, 7)(x)
    assert features.shape == (2, 128)
    assert logits is not None
    assert logits.shape == (2, 7)
    network = Autoencoder(channels, size)
    code, _ = network(x)
    assert code.shape == (2, 64)
    assert network.decode(code).shape == x.shape


def test_augmentation_moves_a_little_and_keeps_the_range() -> None:
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    blob = (-8 * (x**2 + y**2)).exp().expand(64, 1, 32, 32)
    found = moved(blob, torch.Generator().manual_seed(0))
    mass = found.sum((1, 2, 3))
    right, down = (found[:, 0] * x).sum((1, 2)) / mass, (found[:, 0] * y).sum((1, 2)) / mass
    for shift in (right, down):
        assert 0.05 < float(shift.std()) < 0.2
        assert float(shift.abs().max()) < 0.25  # a tenth of the side, which is 2 long, and a little of the rest
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1.001


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("UNDIFFUSE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path(os.path.expanduser("~/.cache/undiffuse"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "undiffuse"
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    assert cache_folder(tmp_path) == tmp_path


def test_what_cannot_be_learned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UndiffuseError, match="for pictures; choose --features pca or identity"):
        make_features("classifier", open_dataset("moons"), cache=tmp_path)
    plain = from_array(np.random.Generator(np.random.PCG64(0)).integers(0, 256, (9, 8, 8), dtype=np.uint8))
    with pytest.raises(UndiffuseError, match="two classes or more; choose --features autoencoder"):
        make_features("classifier", plain, cache=tmp_path)


def test_the_classifier_of_mnist_is_kept_with_its_accuracy() -> None:
    """Against a classifier that was trained before: training it takes minutes (see docs/evaluation.md)."""
    root, kept = os.environ.get("UNDIFFUSE_DATA"), os.environ.get("UNDIFFUSE_CACHE")
    if not root or not kept or not any(Path(kept).glob("classifier-*.safetensors")):
        pytest.skip("needs MNIST in $UNDIFFUSE_DATA and its classifier in $UNDIFFUSE_CACHE")
    features = LearnedClassifier().fit(open_dataset("mnist"))
    test = open_dataset("mnist-test")
    probabilities = extract(features, test).probabilities
    assert probabilities is not None
    assert float((probabilities.argmax(1).numpy() == test.labels).mean()) >= 0.994  # pyrefly: ignore
