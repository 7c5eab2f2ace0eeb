"""Features learned from the user's own data: a small classifier where there are labels, an autoencoder where not.

They need no download and know the data better than any network trained on photographs: handwritten digits are nothing
that ImageNet has seen. Their numbers compare runs on one data set with each other, and with nothing else.

Training is a function of (data, seed) and is done once: the weights are kept in a cache under a hash of everything that
decides them, with the accuracy that they reached on held-out data.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from ..cache import cache_file
from ..data import Dataset
from ..data.base import digest
from ..errors import UndiffuseError, UndiffuseWarning
from ..training.draws import batch_indices, generator, lent
from ..weights import load_into, read_header, read_weights, shapes, write_weights
from .features import Extractor, Features, ModelUnits

HELD_OUT = 5_000  # at most; a tenth of the data if that is less
RECIPE = "2"  # part of the key of the cache: to be raised when networks or training change


# --- networks ---------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """``[B, C, H, W] -> [B, 128, h, w]``: three convolutions with batch norm and ReLU.

    The stride of the first brings any picture to 16 x 16 at most, so that all sizes cost about the same.
    """

    def __init__(self, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.stride = math.ceil(max(size) / 16)
        self.inner = tuple(math.ceil(side / self.stride) for side in size)
        self.halve = min(self.inner) > 4
        self.shape = (128, *(math.ceil(side / 2) if self.halve else side for side in self.inner))
        stem = nn.Conv2d(channels, 32, 2 * self.stride + 1, self.stride, self.stride, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(32), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.top = nn.Sequential(nn.Conv2d(64, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.stem(x))
        return self.top(F.max_pool2d(x, 2, ceil_mode=True) if self.halve else x)


class Classifier(nn.Module):
    """``[B, C, H, W]`` in model units to features ``[B, 128]``, the mean over the last map, and logits ``[B, K]``."""

    def __init__(self, channels: int, size: tuple[int, int], classes: int) -> None:
        super().__init__()
        self.encoder = Encoder(channels, size)
        self.dim = self.encoder.shape[0]
        self.head = nn.Linear(self.dim, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        features = self.encoder(x).mean((2, 3))
        return features, self.head(features)


class Autoencoder(nn.Module):
    """``[B, C, H, W]`` in model units to its code ``[B, 64]``; :meth:`decode` makes the picture again."""

    def __init__(self, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.encoder = Encoder(channels, size)
        self.dim, self.size = 64, size
        self.code = nn.Linear(math.prod(self.encoder.shape), self.dim)
        self.uncode = nn.Linear(self.dim, math.prod(self.encoder.shape))
        self.top, self.middle = nn.Conv2d(128, 64, 3, padding=1), nn.Conv2d(64, 32, 3, padding=1)
        self.stem = nn.Conv2d(32, channels * self.encoder.stride**2, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.code(self.encoder(x).flatten(1)), None

    def decode(self, code: Tensor) -> Tensor:
        """``[B, 64] -> [B, C, H, W]``."""
        x = self.top(F.relu(self.uncode(code).unflatten(1, self.encoder.shape)))
        x = self.middle(F.relu(F.interpolate(x, self.encoder.inner, mode="nearest")))
        x = F.pixel_shuffle(self.stem(F.relu(x)), self.encoder.stride)
        return x[:, :, : self.size[0], : self.size[1]]


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """How long to train: ``epochs`` passes over the data, but at least ``least`` and at most ``most`` images."""

    epochs: int = 10
    least: int = 100_000
    most: int = 600_000
    batch_size: int = 128
    rate: float = 4e-3
    seed: int = 0

    def steps(self, count: int) -> int:
        return max(1, round(min(max(self.epochs * count, self.least), self.most) / self.batch_size))


def moved(x: Tensor, source: torch.Generator) -> Tensor:
    """Each picture turned by up to 10 degrees, scaled by up to a tenth and shifted by up to a tenth of its side."""
    turn, scale, right, down = (torch.rand(4, len(x), generator=source) * 2 - 1).unbind()
    turn, scale = turn * math.radians(10), 1 + 0.1 * scale
    rows = [
        [scale * turn.cos(), -scale * turn.sin(), 0.2 * right],
        [scale * turn.sin(), scale * turn.cos(), 0.2 * down],
    ]
    map_ = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    grid = F.affine_grid(map_, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def fit(network: nn.Module, data: Dataset, loss: Callable[[Tensor, Tensor], Tensor], budget: Budget, what: str) -> None:
    """Train ``network`` on ``loss(x [B, *shape], labels [B])``: AdamW, the rate up in a line and down in a cosine."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=budget.rate, weight_decay=0.02)
    steps = budget.steps(len(data))
    network.train().to(memory_format=torch.channels_last)  # pyrefly: ignore
    for step in tqdm(range(steps), desc=what, unit="step", leave=False, mininterval=0.5, disable=None):
        progress = (step + 0.5) / steps
        rate = min(progress / 0.1, 0.5 * (1 + math.cos(math.pi * max(0.0, progress - 0.1) / 0.9)))
        for group in optimiser.param_groups:
            group["lr"] = budget.rate * rate
        x, cond = data.batch(batch_indices(budget.seed, step, budget.batch_size, len(data)))
        labels = cond.get("classes", torch.zeros(len(x), dtype=torch.int64))
        value = loss(moved(x, generator(budget.seed, "features", step)).to(memory_format=torch.channels_last), labels)
        if not bool(value.isfinite()):
            raise UndiffuseError(f"{what}: the loss became {float(value)} at step {step}; choose --features pca")
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        optimiser.step()
    network.eval()


@torch.inference_mode()
def held_out_mean(data: Dataset, score: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The mean of ``score(x, labels) -> [B]`` over ``data``."""
    total = 0.0
    for start in range(0, len(data), 500):
        x, cond = data.batch(range(start, min(start + 500, len(data))))
        total += float(score(x, cond.get("classes", torch.zeros(len(x)))).double().sum())
    return total / len(data)


def train_classifier(data: Dataset, budget: Budget) -> tuple[Classifier, dict[str, float]]:
    """A :class:`Classifier` of labelled pictures, and ``{"held_out_accuracy": ..., "held_out": how many}``."""
    train, test = data.split(min(0.1, HELD_OUT / len(data)), budget.seed)
    with lent(budget.seed, "classifier", 0):
        network = new_classifier(data)

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        logits = network(x)[1]
        # Smoothing (Szegedy et al. 2016, arXiv:1512.00567) took MNIST's test accuracy from 99.3 to 99.5 %.
        return F.cross_entropy(logits, labels, label_smoothing=0.1)

    fit(network, train, loss, budget, f"training the classifier of {data.name}")
    accuracy = held_out_mean(test, lambda x, labels: (network(x)[1].argmax(1) == labels).float())
    return network, {"held_out_accuracy": accuracy, "held_out": float(len(test))}


def train_autoencoder(data: Dataset, budget: Budget) -> tuple[Autoencoder, dict[str, float]]:
    """An :class:`Autoencoder` of pictures, and the share of the held-out variance that it explains, in (-inf, 1]."""
    train, test = data.split(min(0.1, HELD_OUT / len(data)), budget.seed)
    with lent(budget.seed, "autoencoder", 0):
        network = new_autoencoder(data)

    def error(x: Tensor) -> Tensor:
        return (network.decode(network(x)[0]) - x).square().flatten(1).mean(1)

    fit(network, train, lambda x, _: error(x).mean(), budget, f"training the autoencoder of {data.name}")
    mean = torch.stack([test.batch([i])[0][0] for i in range(min(len(test), 1000))]).mean(0)
    left = held_out_mean(test, lambda x, _: error(x))
    spread = held_out_mean(test, lambda x, _: (x - mean).square().flatten(1).mean(1))
    return network, {"held_out_variance_explained": 1 - left / max(spread, 1e-12), "held_out": float(len(test))}


def new_classifier(data: Dataset) -> Classifier:
    size = _size(data)
    if data.labels is None or len(data.spec.classes) < 2:
        raise UndiffuseError(f"{data.name}: a classifier needs two classes or more; choose --features autoencoder")
    return Classifier(data.spec.channels, size, len(data.spec.classes))


def new_autoencoder(data: Dataset) -> Autoencoder:
    return Autoencoder(data.spec.channels, _size(data))


def _size(data: Dataset) -> tuple[int, int]:
    if not data.spec.has_pictures:
        raise UndiffuseError(f"{data.name}: these features are for pictures; choose --features pca or identity")
    return data.spec.shape[1], data.spec.shape[2]


# --- the cache --------------------------------------------------------------------------------------------------------


def learned(
    kind: str, data: Dataset, budget: Budget, cache: str | os.PathLike[str] | None
) -> tuple[Classifier | Autoencoder, dict[str, float]]:
    """The network of ``kind`` (one of :data:`LEARNED`) for ``data``: from the cache, or trained now and kept there.

    The key is a hash of the data, the budget and the network's shapes, so that nothing else can take its place. A
    damaged file is made again.
    """
    train, build = LEARNED[kind]
    with torch.device("meta"):
        wanted = shapes(build(data).state_dict())
    key = digest(RECIPE, kind, data.fingerprint, data.spec.stated, repr(asdict(budget)), repr(sorted(wanted.items())))
    path = cache_file(cache, f"{kind}-{key}.safetensors")  # before the long work: it can be written there
    if path.is_file():
        try:
            with lent(0, kind, 0):
                network = build(data)
            load_into(network, read_weights(path), str(path))
            return network.eval(), json.loads(read_header(path).metadata["facts"])
        except (UndiffuseError, SafetensorError, KeyError) as error:
            warnings.warn(f"{error}: it is made again", UndiffuseWarning, stacklevel=2)
    network, facts = train(data, budget)
    write_weights(path, network.state_dict(), {"facts": json.dumps(facts), "data": data.name})
    return network, facts


LEARNED: dict[str, tuple[Callable[..., tuple], Callable[[Dataset], Classifier | Autoencoder]]] = {
    "classifier": (train_classifier, new_classifier),
    "autoencoder": (train_autoencoder, new_autoencoder),
}


# --- features ---------------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class LearnedClassifier(Extractor):
    """The last features of a small classifier trained on the labelled reference: the default for labelled pictures."""

    budget: Budget = Budget()

    def fit(self, reference: Dataset, cache: str | os.PathLike[str] | None = None, device: str = "cpu") -> Features:
        network, facts = learned("classifier", reference, self.budget, cache)
        assert reference.labels is not None
        commonest = float(np.bincount(reference.labels).max() / len(reference))
        if facts["held_out_accuracy"] <= min(commonest * 1.5, (1 + commonest) / 2):
            warnings.warn(
                f"{reference.name}: the classifier is right on {facts['held_out_accuracy']:.1%} of held-out items, and "
                f"{commonest:.1%} are of the commonest class: its features say little; choose pca or a trained network",
                UndiffuseWarning,
                stacklevel=2,
            )
        return Features("classifier", reference.spec, ModelUnits(), network, network.dim, 512, device, facts)


@final
@dataclass(frozen=True)
class LearnedAutoencoder(Extractor):
    """The code of a small autoencoder trained on the reference: the default for pictures without labels."""

    budget: Budget = Budget()

    def fit(self, reference: Dataset, cache: str | os.PathLike[str] | None = None, device: str = "cpu") -> Features:
        network, facts = learned("autoencoder", reference, self.budget, cache)
        return Features("autoencoder", reference.spec, ModelUnits(), network, network.dim, 512, device, facts)
