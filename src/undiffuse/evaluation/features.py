"""Features: the numbers in which sets of pictures, points or arrays are compared.

Every metric is a metric *of features*, and changes with them: the network, its weights, and what was done to the pixels
before it. So a :class:`Features` carries all of that in its name and its fingerprint. Samples and references enter by
one door, :meth:`Features.aligned`, which brings both to the units and the dtype of the data.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from ..data import Dataset, DataSpec
from ..data.base import digest
from ..data.spec import units_between
from ..errors import UndiffuseError, UndiffuseWarning, choose
from .resizing import RESIZERS

# --- what becomes of the pixels ---------------------------------------------------------------------------------------


class Preparation(ABC):
    """From original values to what the network takes; ``str()`` of it is part of the fingerprint."""

    @abstractmethod
    def __call__(self, values: np.ndarray, spec: DataSpec) -> Tensor:
        """``[B, *spec.original_shape]`` of ``spec.dtype`` to float32 ``[B, ...]``."""


@final
@dataclass(frozen=True)
class ModelUnits(Preparation):
    """The units of our own networks: bounded data in [-1, 1], others with mean 0 and deviation 1."""

    def __call__(self, values: np.ndarray, spec: DataSpec) -> Tensor:
        return spec.to_model(values)

    def __str__(self) -> str:
        return "model units"


@final
@dataclass(frozen=True)
class Unchanged(Preparation):
    """The values as they are, in float32."""

    def __call__(self, values: np.ndarray, spec: DataSpec) -> Tensor:
        return torch.from_numpy(values.astype(np.float32))

    def __str__(self) -> str:
        return "unchanged"


@final
@dataclass(frozen=True)
class Pixels(Preparation):
    """8-bit RGB, resized to ``size`` (height, width) in floating point, then ``(x - mean)/deviation`` a channel.

    Grey is repeated, an alpha channel is shown on white, other bounds than [0, 255] are brought to it and rounded.
    """

    size: tuple[int, int]
    resize: str
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]

    def __call__(self, values: np.ndarray, spec: DataSpec) -> Tensor:
        x = choose("resize filter", self.resize, RESIZERS)(rgb8(values, spec).float(), self.size)
        return (x - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.deviation)[:, None, None]

    def __str__(self) -> str:
        mean, deviation = (", ".join(f"{v:.6g}" for v in dict.fromkeys(each)) for each in (self.mean, self.deviation))
        return f"8-bit RGB, {self.resize} to {self.size[0]}x{self.size[1]}, (x - [{mean}])/[{deviation}]"


def rgb8(values: np.ndarray, spec: DataSpec) -> Tensor:
    """Pictures in original units ``[B, *spec.original_shape]`` as uint8 ``[B, 3, H, W]``."""
    if spec.kind != "image":
        raise UndiffuseError(f"these features are for images, the data are {spec.kind} of shape {list(spec.shape)}")
    if spec.dtype == "uint8" and (spec.low, spec.high) == (0, 255) and spec.channels in (1, 3):
        first = np.moveaxis(values, 1 + spec.layout.index("C"), 1) if "C" in spec.layout else values[:, None]
        pictures = torch.from_numpy(np.ascontiguousarray(first))  # the usual case, without a way through floats
    else:
        drawn = torch.from_numpy(np.stack(spec.to_images(spec.to_model(values))))
        pictures = drawn.permute(0, 3, 1, 2) if drawn.ndim == 4 else drawn[:, None]
    return pictures.expand(-1, 3, -1, -1)


# --- features ---------------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Features:
    """What is measured, complete: the units of the data, what becomes of the pixels, a network and its weights.

    ``name``   part of the name of every metric made of them: ``inception-2015-12-05/pil-bicubic``
    ``spec``   the units of the reference data, to which samples are brought as well
    ``prepare``   from these units to the input of the network
    ``network``   ``x -> (features [B, dim], logits [B, K] or None)``, in eval mode
    ``batch_size``   that suits the network
    ``facts``   what a report should say about them, such as ``held_out_accuracy``
    """

    name: str
    spec: DataSpec
    prepare: Preparation
    network: nn.Module
    dim: int
    batch_size: int = 256
    device: str = "cpu"
    facts: Mapping[str, float | str] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        self.network.eval().requires_grad_(False).to(self.device)

    @property
    def preprocessing(self) -> str:
        return str(self.prepare)

    @cached_property
    def weights(self) -> str:
        """sha256 of the network's tensors (names, types, shapes, numbers), the same from whatever file they came."""
        return weights_digest(self.network)

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes the features. Where it differs, numbers cannot be compared."""
        units = (self.spec.kind, self.spec.shape, self.spec.dtype, self.spec.low, self.spec.high)
        constants = (self.spec.shift, self.spec.scale)
        return digest(self.name, str(self.dim), self.preprocessing, self.weights, repr(units), repr(constants))

    @torch.inference_mode()
    def run(self, values: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Features float32 ``[B, dim]`` and class probabilities float32 ``[B, K]`` (or ``None``), both on the CPU.

        ``values``   in original units, ``[B, *spec.original_shape]`` of ``spec.dtype``, as :meth:`aligned` returns
        """
        return self.infer(self.prepare(values, self.spec))

    @torch.inference_mode()
    def infer(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The second half of :meth:`run`: ``x`` is what :attr:`prepare` has made."""
        # TF32, which GPUs use for convolutions unless told otherwise, has 10 bits: a distance of features shows that.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            features, logits = self.network(x.to(self.device))
        if features.shape != (len(x), self.dim):
            raise UndiffuseError(f"{self.name}: features of shape {list(features.shape)}, [{len(x)}, {self.dim}] said")
        if not bool(features.isfinite().all()):
            raise UndiffuseError(f"{self.name}: the network made NaN or infinite features; are its weights right?")
        return features.float().cpu(), None if logits is None else logits.float().softmax(1).cpu()

    def __call__(self, values: np.ndarray, span: tuple[float, float] | None = None) -> Tensor:
        """Features float32 ``[B, dim]`` of an array in memory: :meth:`aligned`, then :meth:`run`, a batch at a time."""
        values, source = self.described(values, span)
        parts = [values[i : i + self.batch_size] for i in range(0, len(values), self.batch_size)]
        return torch.cat([self.run(self.aligned(part, source))[0] for part in parts] or [torch.empty(0, self.dim)])

    def described(self, values: np.ndarray, span: tuple[float, float] | None) -> tuple[np.ndarray, DataSpec]:
        """:func:`described` against these data."""
        return described(values, self.spec, span)

    def aligned(self, values: np.ndarray, source: DataSpec) -> np.ndarray:
        """:func:`aligned` to these data."""
        return aligned(values, source, self.spec)


# --- one door ---------------------------------------------------------------------------------------------------------


def described(values: np.ndarray, spec: DataSpec, span: tuple[float, float] | None) -> tuple[np.ndarray, DataSpec]:
    """``values`` and their spec, beside data of ``spec``. Whole numbers are in the units of the data; real ones are if
    the data are real.

    ``span``   the range of real values that stand for bounded data: (0, 1), (-1, 1), (0, 255) ... Without it they
        must reach exactly from 0 to 1 or from -1 to 1: a range that is guessed makes wrong pictures.
    """
    values = np.asarray(values)
    for layout in dict.fromkeys([spec.layout, *_layouts(spec)]):
        source = replace(spec, layout=layout)
        if values.shape[1:] == source.original_shape and values.ndim:
            break
    else:
        wanted = ", ".join(["N", *map(str, spec.original_shape)])
        raise UndiffuseError(f"samples have shape {list(values.shape)}, the data need [{wanted}]")
    if not values.size:
        raise UndiffuseError(f"no samples: the array has shape {list(values.shape)}")
    if values.dtype.kind not in "buif":
        raise UndiffuseError(f"samples of dtype {values.dtype} are no numbers")
    if _sort(values.dtype) != _sort(np.dtype(spec.dtype)) or span is not None:
        # A stated range stands for the data's, as real numbers' does.
        dtype = values.dtype.name if span is None else "float64"
        source = replace(source, dtype=dtype, **_units(values, spec, span))
    return values, source


def aligned(values: np.ndarray, source: DataSpec, spec: DataSpec) -> np.ndarray:
    """``values`` of ``source`` in the units, dtype and layout of the data: ``[B, *spec.original_shape]``.

    Bounds are mapped to bounds, and integers rounded: pictures as floats and as 8 bits are the same afterwards
    (traps V3 and V9). The bounds of whole numbers, unless they are those of 8 or 16 bits, were measured: darker samples
    are in the same units, but what fills an eighth of the range at most, or leaves it, may be in any. Raises
    :class:`UndiffuseError` for those, and for another shape or kind; sizes are never changed here.
    """
    if source.shape != spec.shape:
        raise UndiffuseError(
            f"samples are {_words(source)}, the data {_words(spec)}: bring both to one size and number of channels "
            "(--image-size, --channels)"
        )
    values = np.asarray(values)
    if source.layout != spec.layout:
        values = _to_layout(values, source.layout, spec.layout).reshape(len(values), *spec.original_shape)
    want = np.dtype(spec.dtype)
    whole = np.dtype(source.dtype).kind in "bui"
    if source.low is None or source.high is None or spec.low is None or spec.high is None:
        if whole != (want.kind in "bui") or (source.low is None) > (spec.low is None):
            raise unrelated(source, spec)
        return values.astype(want, copy=False)  # unbounded data are in their original units
    within = spec.low <= source.low and source.high <= spec.high
    if (source.low, source.high) == (spec.low, spec.high):
        mapped = values
    elif whole and want.kind in "bui" and not _own_range(source):
        if not within or fills_little(source.low, source.high, spec):
            raise unrelated(source, spec)
        mapped = values
    else:
        share = (values.astype(np.float64) - source.low) / (source.high - source.low)
        mapped = spec.low + share * (spec.high - spec.low)
    if want.kind == "f":
        if whole:
            warnings.warn(
                f"samples of {source.dtype} are compared with data of {spec.dtype}: the rounding counts as a fault",
                UndiffuseWarning,
                stacklevel=3,
            )
        return mapped.astype(want, copy=False)
    if not np.isfinite(mapped).all():
        raise UndiffuseError("samples hold NaN or infinite values")
    over = 0.5 if mapped.dtype.kind == "f" else 0
    if mapped.min() < spec.low - over or mapped.max() > spec.high + over:
        raise UndiffuseError(
            f"samples leave their range [{source.low:g}, {source.high:g}]: they span "
            f"[{values.min():g}, {values.max():g}]; clip them, or say another --span"
        )
    if mapped.dtype.kind == "f":
        mapped = np.floor(np.clip(mapped, spec.low, spec.high) + 0.5)
    return mapped.astype(want, copy=False)


def _sort(dtype: np.dtype) -> str:
    """Truth values, whole numbers or real numbers: each has a range of its own that stands for a picture."""
    return "whole" if dtype.kind in "ui" else dtype.kind


def _own_range(spec: DataSpec) -> bool:
    """Whether bounds are those of the type: of 8 or 16 bits, or of truth values."""
    dtype = np.dtype(spec.dtype)
    return (spec.low, spec.high) == (0, 1 if dtype.kind == "b" else np.iinfo(dtype).max)


def fills_little(low: float, high: float, spec: DataSpec) -> bool:
    """Whether whole numbers from ``low`` to ``high`` fill so little of the data's range that they may be in any units,
    as truth values among pictures of 8 bits are."""
    return spec.low is not None and spec.high is not None and 8 * (high - low) <= spec.high - spec.low


def unrelated(source: DataSpec, spec: DataSpec) -> UndiffuseError:
    """The error for two kinds of units of which nobody has said how they relate."""
    return UndiffuseError(
        f"samples are {_units_of(source)}, the data {_units_of(spec)}: bring both to one range, or give the samples as "
        "an .npy and say which range of theirs stands for that of the data (--span 0 1)"
    )


def units_unknown(values: np.ndarray, spec: DataSpec) -> UndiffuseError:
    """The error for samples whose range says nothing of their units."""
    return UndiffuseError(
        f"samples are {values.dtype} in [{values.min():g}, {values.max():g}], the data {_units_of(spec)}: say which "
        "range of theirs stands for it, such as --span 0 1 (span=(0, 1))"
    )


def _units(values: np.ndarray, spec: DataSpec, span: tuple[float, float] | None) -> dict:
    """The bounds, shift and scale of a source of ``values`` for data of ``spec``."""
    if span is None:
        low, high = (float(values.min()), float(values.max())) if spec.bounded else (0.0, 0.0)
        if not np.isfinite([low, high]).all():
            raise UndiffuseError("samples hold NaN or infinite values")
        if (low, high) not in ((0.0, 1.0), (-1.0, 1.0)):
            raise units_unknown(values, spec)
        span = low, high
    if not (len(span) == 2 and np.isfinite(span).all() and span[0] < span[1]):
        raise UndiffuseError(f"span={span} must be two finite numbers in order, such as (0, 1)")
    if not spec.bounded:
        raise UndiffuseError(f"span={span} is for bounded data, the data are {_units_of(spec)}")
    shift, scale = units_between(*map(float, span))
    return {"low": float(span[0]), "high": float(span[1]), "shift": shift, "scale": scale}


def _layouts(spec: DataSpec) -> list[str]:
    """Other layouts that samples may have: channels first, last, and none."""
    if spec.kind == "points":
        return []
    spatial = spec.layout.replace("C", "")
    return ["C" + spatial, spatial + "C", *([spatial] if spec.channels == 1 else [])]


def _to_layout(values: np.ndarray, source: str, target: str) -> np.ndarray:
    """The axes of every item from ``source`` to ``target``; a channel axis of one item may come or go."""
    if "C" not in source:
        values, source = values[:, None], "C" + source
    order = [source.index(axis) + 1 for axis in (target if "C" in target else "C" + target)]
    return np.ascontiguousarray(values.transpose(0, *order))


def _words(spec: DataSpec) -> str:
    return "x".join(map(str, spec.shape))


def _units_of(spec: DataSpec) -> str:
    return f"{spec.dtype} in [{spec.low:g}, {spec.high:g}]" if spec.low is not None else f"{spec.dtype} without bounds"


def weights_digest(network: nn.Module) -> str:
    """sha256 of every tensor of ``network`` in the order of their names."""
    result = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        array = tensor.detach().cpu().contiguous()
        result.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        result.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


# --- choices of features ----------------------------------------------------------------------------------------------


class Extractor(ABC):
    """A choice of features, before it has seen the data: a frozen dataclass, an entry of ``FEATURES``."""

    @abstractmethod
    def fit(self, reference: Dataset, cache: str | os.PathLike[str] | None = None, device: str = "cpu") -> Features:
        """The features for data like ``reference``, which is the *real* data, never the samples.

        ``cache``   the folder in which learned networks are kept (``$UNDIFFUSE_CACHE``, or the user's cache)
        """


class Flat(nn.Module):
    """``[B, ...] -> [B, D]``."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x.reshape(len(x), -1), None


@final
@dataclass(frozen=True)
class Identity(Extractor):
    """The values themselves, in the units of the data: for points, and for arrays of few numbers."""

    largest: int = 4096

    def fit(self, reference: Dataset, cache: str | os.PathLike[str] | None = None, device: str = "cpu") -> Features:
        dim = int(np.prod(reference.spec.shape))
        if dim > self.largest:
            raise UndiffuseError(f"{reference.name}: {dim:,} numbers an item are too many for identity; choose pca")
        return Features("identity", reference.spec, Unchanged(), Flat(), dim, 4096, device)


class Projection(nn.Module):
    """``(x - mean) V``: ``[B, ...] -> [B, dim]``."""

    def __init__(self, mean: Tensor, vectors: Tensor) -> None:
        super().__init__()
        self.mean, self.vectors = nn.Buffer(mean), nn.Buffer(vectors)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return (x.flatten(1) - self.mean) @ self.vectors, None


@final
@dataclass(frozen=True)
class PCA(Extractor):
    """The first ``dim`` principal components of the reference, in model units and not whitened.

    They are fitted on at most ``most`` items, spread evenly over the data. Frechet distances on them see means,
    contrast and coarse structure, and nothing that is fine or rare.
    """

    dim: int = 64
    most: int = 5_000

    def fit(self, reference: Dataset, cache: str | os.PathLike[str] | None = None, device: str = "cpu") -> Features:
        if self.dim < 1 or self.most < 2:
            raise UndiffuseError(f"pca: dim={self.dim} and most={self.most} must be at least 1 and 2")
        rows = np.unique(np.linspace(0, len(reference) - 1, min(self.most, len(reference))).round().astype(np.int64))
        parts = [reference.batch(rows[i : i + 512])[0].flatten(1) for i in range(0, len(rows), 512)]
        x = torch.cat(parts).double()
        dim = min(self.dim, x.shape[1], len(x) - 1)
        if dim < 1:
            raise UndiffuseError(f"{reference.name}: principal components need two items or more")
        mean = x.mean(0)
        x = x - mean
        # the eigenvectors of the smaller of X^T X and X X^T, which have the same eigenvalues
        if x.shape[1] <= len(x):
            values, vectors = torch.linalg.eigh(x.T @ x)
        else:
            values, left = torch.linalg.eigh(x @ x.T)
            vectors = x.T @ (left / values.clamp(min=1e-12 * float(values[-1])).sqrt())
        vectors = vectors[:, -dim:].flip(1)
        # an eigenvector has no sign of its own: its largest entry is made positive
        signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        facts = {"variance_explained": float(values[-dim:].sum() / values.sum())}
        network = Projection(mean.float(), (vectors * signs).float())
        return Features(f"pca-{dim}", reference.spec, ModelUnits(), network, dim, 4096, device, facts)
