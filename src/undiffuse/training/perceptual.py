"""How unlike two pictures look: the distance of what a trained network sees in them (Zhang et al. 2018, LPIPS).

    d(x, y) = sum over layers of mean over places of  sum_c w_c (f_c(x) - f_c(y))^2,   f of length 1 at each place

``classifier`` is the one that ``undiffuse evaluate`` trains on labelled data (all w are 1/C). A path is the weights of
LPIPS with VGG-16, as the package ``lpips`` saves them (``lpips.LPIPS(net="vgg").state_dict()``), in a safetensors file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Dataset
from ..errors import UndiffuseError
from ..weights import read_weights

if TYPE_CHECKING:
    from ..evaluation.learned import Classifier

Distance = Callable[[Tensor, Tensor], Tensor]

VGG = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""The convolutions of VGG-16 by their places in its list of layers; between the groups the size is halved."""


def distance_of(features: str, data: Dataset) -> tuple[Distance, str]:
    """``(x, y) -> [B]`` for pictures in model units, and what the features are, for people."""
    if features == "classifier":
        from ..evaluation.learned import Budget, Classifier, learned  # which is built on this package

        if data.labels is None or len(data.spec.classes) < 2:
            raise UndiffuseError(
                "codec.features=classifier needs labelled data; name the safetensors file of LPIPS's weights, or set "
                "codec.perceptual=0"
            )
        network, facts = learned("classifier", data, Budget(), None)
        assert isinstance(network, Classifier)
        return ClassifierDistance(network), f"a classifier ({facts['held_out_accuracy']:.1%} right on held-out data)"
    path = Path(features)
    if path.suffix != ".safetensors":
        raise UndiffuseError(f"codec.features={features}: classifier, or the .safetensors file of LPIPS's weights")
    if not (data.spec.has_pictures and data.spec.bounded) or data.spec.channels not in (1, 3):
        raise UndiffuseError("LPIPS is of grey and colour pictures with a declared range; set codec.perceptual=0")
    return LPIPS(read_weights(path), str(path)), f"LPIPS ({path.name})"


def unit(f: Tensor) -> Tensor:
    """Each place's features scaled to length 1."""
    return f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10)


class ClassifierDistance:
    """With the maps of the classifier's three convolutions."""

    def __init__(self, network: Classifier) -> None:
        self.network = network.eval().requires_grad_(False)

    def maps(self, x: Tensor) -> list[Tensor]:
        encoder = self.network.encoder
        first = encoder.stem(x)
        second = encoder.middle(first)
        return [first, second, encoder.top(F.max_pool2d(second, 2, ceil_mode=True) if encoder.halve else second)]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.network.to(x.device)
        pairs = zip(self.maps(x), self.maps(y), strict=True)
        return torch.stack([(unit(a) - unit(b)).square().flatten(1).mean(1) for a, b in pairs]).sum(0)


class LPIPS:
    """With VGG-16 and learned weights of its channels."""

    def __init__(self, weights: Mapping[str, Tensor], where: str) -> None:
        try:
            self.layers = [
                [
                    tuple(weights[f"net.slice{i + 1}.{place}.{part}"].float() for part in ("weight", "bias"))
                    for place in places
                ]
                for i, places in enumerate(VGG)
            ]
            self.scales = [weights[f"lin{i}.model.1.weight"].float().reshape(1, -1, 1, 1) for i in range(len(VGG))]
        except KeyError as error:
            raise UndiffuseError(
                f"{where}: not LPIPS's weights with VGG ({error} is missing): save lpips.LPIPS(net='vgg').state_dict()"
            ) from None
        shift, scale = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
        self.shift, self.scale = (torch.tensor(each).reshape(1, 3, 1, 1) for each in (shift, scale))

    def maps(self, x: Tensor) -> list[Tensor]:
        """The features after each group, ``x`` in [-1, 1]."""
        h = (x.expand(-1, 3, -1, -1) - self.shift.to(x)) / self.scale.to(x)
        found = []
        for i, group in enumerate(self.layers):
            h = F.max_pool2d(h, 2) if i else h
            for weight, bias in group:
                h = F.relu(F.conv2d(h, weight.to(x), bias.to(x), padding=1))
            found.append(h)
        return found

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        if min(x.shape[2:]) < 16:
            raise UndiffuseError("LPIPS needs pictures of 16 pixels a side or more; set codec.perceptual=0")
        total = x.new_zeros(len(x))
        for a, b, scale in zip(self.maps(x), self.maps(y), self.scales, strict=True):
            total = total + ((unit(a) - unit(b)).square() * scale.to(x)).sum(1).flatten(1).mean(1)
        return total
