"""The Inception network of the FID: the graph ``inception-2015-12-05`` that TensorFlow published, in plain torch.

It is *not* the Inception of torchvision: its weights are others, it knows 1,008 classes, its average pools leave
padding out, and its last block pools by maximum. A Frechet distance from torchvision's weights is a number of its own
(trap V1). The names of the tensors are those of pytorch-fid and torch-fidelity, whose converted weights load here.

Szegedy et al. 2015, arXiv:1512.00567; Heusel et al. 2017, arXiv:1706.08500.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import final
from urllib.request import urlopen

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache import cache_file
from ..config import write_bytes_atomic
from ..data import Dataset
from ..errors import UndiffuseError
from ..weights import load_into, read_weights
from .features import Extractor, Features, Pixels
from .torchfile import read_torch_file

CLASSES = 1008
TAPS = {64: "pool1", 192: "pool2", 768: "Mixed_6e", 2048: "Mixed_7c"}
"""The features by their number: after the first and the second maximum pool, after the middle blocks, at the end."""


class Unit(nn.Module):
    """Convolution without bias, batch norm (eps 0.001), ReLU. ``same`` keeps the size, else nothing is padded."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int = 1, same: bool = True) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if same else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def average(x: Tensor) -> Tensor:
    """The 3x3 mean in which padding does not count, as in TensorFlow."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def halving(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


class Block(nn.Module):
    """Branches side by side, their channels joined. A branch is a chain of units; the last branch starts with a pool.

    ``branches``   each a list of ``(name, channels, kernel)``, the kernel as ``"3x3"``, or ``"3x3/2"`` for stride 2
        without padding. Names that end in ``a`` and ``b`` both look at the unit before them, side by side.
    ``pooled``   channels of the unit after the pool, 0 for none
    """

    def __init__(self, inputs: int, branches: list[list[tuple[str, int, str]]], pool: str, pooled: int) -> None:
        super().__init__()
        self.pool, self.chains = POOLS[pool], []
        self.outputs = pooled or inputs
        for branch in branches:
            width, chain = inputs, []
            for name, channels, kernel in branch:
                size, _, stride = kernel.partition("/")
                rows, columns = map(int, size.split("x"))
                self.add_module(name, Unit(width, channels, (rows, columns), int(stride or 1), same=not stride))
                fork = name.endswith("b")
                chain = [*chain[:-1], (*chain[-1], name)] if fork else [*chain, (name,)]
                width = width if name.endswith("a") else channels
            self.chains.append(chain)
            self.outputs += width * len(chain[-1])
        self.branch_pool = Unit(inputs, pooled, (1, 1)) if pooled else None

    def forward(self, x: Tensor) -> Tensor:
        joined = []
        for chain in self.chains:
            y = x
            for names in chain:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            joined.append(y)
        y = self.pool(x)
        return torch.cat([*joined, y if self.branch_pool is None else self.branch_pool(y)], 1)


POOLS = {"average": average, "maximum": maximum, "halving": halving}


def block_a(inputs: int, pooled: int) -> Block:
    branches = [
        [("branch1x1", 64, "1x1")],
        [("branch5x5_1", 48, "1x1"), ("branch5x5_2", 64, "5x5")],
        [("branch3x3dbl_1", 64, "1x1"), ("branch3x3dbl_2", 96, "3x3"), ("branch3x3dbl_3", 96, "3x3")],
    ]
    return Block(inputs, branches, "average", pooled)


def block_b(inputs: int) -> Block:
    branches = [
        [("branch3x3", 384, "3x3/2")],
        [("branch3x3dbl_1", 64, "1x1"), ("branch3x3dbl_2", 96, "3x3"), ("branch3x3dbl_3", 96, "3x3/2")],
    ]
    return Block(inputs, branches, "halving", 0)


def block_c(inputs: int, width: int) -> Block:
    long = [("1x1", width), ("7x1", width), ("1x7", width), ("7x1", width), ("1x7", 192)]
    branches = [
        [("branch1x1", 192, "1x1")],
        [("branch7x7_1", width, "1x1"), ("branch7x7_2", width, "1x7"), ("branch7x7_3", 192, "7x1")],
        [(f"branch7x7dbl_{i}", channels, kernel) for i, (kernel, channels) in enumerate(long, 1)],
    ]
    return Block(inputs, branches, "average", 192)


def block_d(inputs: int) -> Block:
    long = [("1x1", 192), ("1x7", 192), ("7x1", 192), ("3x3/2", 192)]
    branches = [
        [("branch3x3_1", 192, "1x1"), ("branch3x3_2", 320, "3x3/2")],
        [(f"branch7x7x3_{i}", channels, kernel) for i, (kernel, channels) in enumerate(long, 1)],
    ]
    return Block(inputs, branches, "halving", 0)


def block_e(inputs: int, pool: str) -> Block:
    def fork(name: str) -> list[tuple[str, int, str]]:
        return [(f"{name}a", 384, "1x3"), (f"{name}b", 384, "3x1")]

    branches = [
        [("branch1x1", 320, "1x1")],
        [("branch3x3_1", 384, "1x1"), *fork("branch3x3_2")],
        [("branch3x3dbl_1", 448, "1x1"), ("branch3x3dbl_2", 384, "3x3"), *fork("branch3x3dbl_3")],
    ]
    return Block(inputs, branches, pool, 192)


class InceptionFID(nn.Module):
    """``[B, 3, 299, 299]`` with values (pixel - 128)/128 to features ``[B, dim]`` and logits ``[B, 1008]``.

    ``dim``   2048, 768, 192 or 64: the mean over the map at that depth (see :data:`TAPS`)

    The logits leave out the bias of the last layer, as the Inception score's own code does (Salimans et al. 2016), and
    are None unless ``dim`` is 2048.
    """

    def __init__(self, dim: int = 2048) -> None:
        super().__init__()
        if dim not in TAPS:
            raise UndiffuseError(f"inception features come in {', '.join(map(str, TAPS))}, got {dim!r}")
        self.dim = dim
        self.Conv2d_1a_3x3 = Unit(3, 32, (3, 3), 2, same=False)
        self.Conv2d_2a_3x3 = Unit(32, 32, (3, 3), same=False)
        self.Conv2d_2b_3x3 = Unit(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = Unit(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = Unit(80, 192, (3, 3), same=False)
        self.Mixed_5b = block_a(192, 32)
        self.Mixed_5c = block_a(256, 64)
        self.Mixed_5d = block_a(288, 64)
        self.Mixed_6a = block_b(288)
        self.Mixed_6b = block_c(768, 128)
        self.Mixed_6c = block_c(768, 160)
        self.Mixed_6d = block_c(768, 160)
        self.Mixed_6e = block_c(768, 192)
        self.Mixed_7a = block_d(768)
        self.Mixed_7b = block_e(1280, "average")
        self.Mixed_7c = block_e(2048, "maximum")
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = halving(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        if self.dim == 64:
            return x.mean((2, 3)), None
        x = halving(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        if self.dim == 192:
            return x.mean((2, 3)), None
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        if self.dim == 768:
            return x.mean((2, 3)), None
        features = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))
        return features, features @ self.fc.weight.T


# --- weights ----------------------------------------------------------------------------------------------------------

FILE = "pt_inception-2015-12-05-6726825d.pth"
ADDRESS = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
BEGINS = "6726825d"  # of the sha256 of the file, by torch's convention for such names
LARGEST = 200_000_000  # bytes; the file has about 95 million


def load_inception(path: str | os.PathLike[str], dim: int = 2048) -> InceptionFID:
    """The network with the weights in ``path``: safetensors, or a ``.pth`` of which only tensors are read.

    Raises :class:`UndiffuseError` for any others than those of the FID.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UndiffuseError(f"{path}: no such file; get {ADDRESS}")
    tensors = read_torch_file(path) if path.suffix in (".pth", ".pt") else read_weights(path)
    head = tensors.get("fc.weight")
    if head is not None and len(head) != CLASSES:
        raise UndiffuseError(
            f"{path}: {len(head):,} classes: these are not the weights of the FID but another Inception's (torchvision "
            f"has 1,000); get {ADDRESS}"
        )
    network = InceptionFID(dim)
    # counters that older files lack and eval mode does not read
    counters = {name: value for name, value in network.state_dict().items() if name.endswith("num_batches_tracked")}
    load_into(network, {**counters, **tensors}, str(path))
    return network


def download_inception(cache: str | os.PathLike[str] | None) -> Path:
    """The weights from their usual address, kept in the cache for the next time; the sha256 is checked."""
    path = cache_file(cache, FILE)
    if not path.is_file():
        try:
            with urlopen(ADDRESS, timeout=60) as answer:
                content = answer.read(LARGEST)
        except OSError as error:
            raise UndiffuseError(
                f"{ADDRESS} cannot be reached ({error}); fetch it elsewhere and name the file"
            ) from None
        found = hashlib.sha256(content).hexdigest()
        if not found.startswith(BEGINS):
            raise UndiffuseError(f"{ADDRESS} gave other bytes (sha256 {found[:8]}..., {BEGINS}... was expected)")
        write_bytes_atomic(path, content)
    return path


@final
@dataclass(frozen=True)
class Inception(Extractor):
    """The features of the FID, the KID and the Inception score.

    ``resize``   ``tf1-bilinear`` is the original, ``pil-bicubic`` is clean-fid's; they are two metrics
    ``weights``   the file; without it, and without ``download``, nothing is fetched and the error says where it is
    ``download``   fetch the file from its usual address into the cache, once
    """

    resize: str = "tf1-bilinear"
    dim: int = 2048
    weights: str | None = None
    download: bool = False

    def fit(self, reference: Dataset, cache: str | os.PathLike[str] | None = None, device: str = "cpu") -> Features:
        if self.weights is None and not self.download:
            raise UndiffuseError(
                f"inception needs its weights (95 MB): name the file (--weights FILE), or allow --download of {ADDRESS}"
            )
        file = download_inception(cache) if self.weights is None else Path(self.weights).expanduser()
        network = load_inception(file, self.dim)
        prepare = Pixels((299, 299), self.resize, (128.0,) * 3, (128.0,) * 3)
        name = f"inception-2015-12-05/{self.resize}" + (f"/{self.dim}" if self.dim != 2048 else "")
        facts = {"weights_file": file.name, "weights_sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        return Features(name, reference.spec, prepare, network, self.dim, 32, device, facts)
