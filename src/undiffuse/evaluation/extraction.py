"""From a set of pictures, points or arrays to its features: which features, which items, and kept for next time."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from ..cache import cache_file
from ..data import Dataset, DataSpec, open_dataset
from ..data.base import digest, positions
from ..errors import UndiffuseError, UndiffuseWarning, choose
from ..weights import read_header, read_weights, write_weights
from .features import PCA, Extractor, Features, Identity
from .inception import Inception
from .learned import LearnedAutoencoder, LearnedClassifier
from .pretrained import CLIP, CLIPNetwork, DINOv2, text_features

FEATURES: dict[str, Extractor] = {
    "identity": Identity(),
    "pca": PCA(),
    "classifier": LearnedClassifier(),
    "autoencoder": LearnedAutoencoder(),
    "inception": Inception(),
    "inception-clean": Inception(resize="pil-bicubic"),
    "dinov2": DINOv2(),
    "clip": CLIP(),
}
"""Name -> the choice with its defaults; ``dataclasses.replace`` or ``--set`` changes them."""


def default_features(reference: Dataset) -> str:
    """The name of the features that need nothing but the data: identity for points, a classifier for pictures with two
    classes or more, an autoencoder for other pictures, PCA for the rest."""
    if reference.spec.kind == "points":
        return "identity"
    if not reference.spec.has_pictures:
        return "pca"
    return "classifier" if reference.labels is not None and len(reference.spec.classes) > 1 else "autoencoder"


def make_features(
    name: str | None,
    reference: Dataset,
    *,
    weights: str | os.PathLike[str] | None = None,
    download: bool = False,
    cache: str | os.PathLike[str] | None = None,
    device: str = "cpu",
) -> Features:
    """``FEATURES[name]`` for data like ``reference``; ``None`` takes :func:`default_features`.

    ``weights``   the file of Inception's, the folder of DINOv2's or CLIP's
    ``download``   those may be fetched from their usual address, once
    """
    name = name or default_features(reference)
    chosen = choose("features", name, FEATURES)
    if weights is not None or download:
        if not isinstance(chosen, (Inception, DINOv2, CLIP)):
            given = "--download" if weights is None else "--weights"
            raise UndiffuseError(f"{given} is for inception, dinov2 and clip: the features {name} are made of the data")
        chosen = replace(chosen, download=download)
        chosen = chosen if weights is None else replace(chosen, weights=os.fspath(weights))
    return chosen.fit(reference, cache, device)


# --- which items ------------------------------------------------------------------------------------------------------


def as_data(sizes: np.ndarray, count: int) -> np.ndarray:
    """``count`` items shared among classes of ``sizes`` in proportion, the largest remainders rounded up."""
    share = sizes * (count / sizes.sum())
    counts = np.floor(share).astype(np.int64)
    counts[np.argsort(counts - share, kind="stable")[: count - counts.sum()]] += 1
    return counts


def uniform(sizes: np.ndarray, count: int) -> np.ndarray:
    """``count`` items shared equally among the classes, the first ones getting what does not divide."""
    return count // len(sizes) + (np.arange(len(sizes)) < count % len(sizes)).astype(np.int64)


PLANS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {"data": as_data, "uniform": uniform}
"""How many items of each class: ``(sizes [K], count) -> counts [K]``. It moves an FID, so it is recorded (trap G6)."""


def pick(data: Dataset, count: int | None, plan: str = "data", seed: int = 0) -> np.ndarray:
    """Which items stand for ``data``: int64 ``[count]`` in rising order, drawn without repetition by ``plan``."""
    shares = choose("class plan", plan, PLANS)
    count = len(data) if count is None else count
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or not 1 <= count <= len(data):
        raise UndiffuseError(f"{data.name} has {len(data):,} items, {count!r} were asked for")
    labels = np.zeros(len(data), np.int64) if data.labels is None else data.labels
    sizes = np.bincount(labels, minlength=max(1, len(data.spec.classes)))
    counts = shares(sizes, int(count))
    short = np.flatnonzero(counts > sizes)
    if short.size:
        kind = data.spec.classes[short[0]] if data.spec.classes else "the only one"
        raise UndiffuseError(
            f"{data.name}: the {plan} plan for {count:,} items needs {counts[short[0]]:,} of class {kind}, it has "
            f"{sizes[short[0]]:,}; ask for fewer, or take plan=data"
        )
    parts = []
    for number, wanted in enumerate(counts):
        order = np.random.Generator(np.random.PCG64([seed, number])).permutation(np.flatnonzero(labels == number))
        parts.append(order[:wanted])
    return np.sort(np.concatenate(parts))


Source = Dataset | np.ndarray | str | os.PathLike[str]


# --- the features of a set --------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Extracted:
    """Features float32 ``[N, D]``, class probabilities float32 ``[N, K]`` or None, and labels int64 ``[N]`` or None.

    ``fingerprint``   of the items, their plan and the features; "" for what is not a data set
    ``texts``   the captions in the space of the features, float32 ``[N, D]``, where these read and there are any
    """

    features: Tensor
    probabilities: Tensor | None
    labels: Tensor | None
    fingerprint: str = ""
    texts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)


def batches(
    features: Features,
    source: Source,
    indices: np.ndarray | None = None,
    *,
    span: tuple[float, float] | None = None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Features ``[B, D]`` and probabilities of ``source``, a batch at a time and in order, in constant memory.

    While the network works on one batch, a thread reads, decodes and resizes the next.

    ``source``   a data set; an array ``[N, ...]`` (see :meth:`Features.described` for its units and ``span``); an
        ``.npy`` file of one; or whatever else :func:`open_dataset` opens, such as a folder of images
    ``indices``   which items, all by default
    """
    source = opened(features.spec, source)
    if not isinstance(source, Dataset):
        values, spec = features.described(source, span)
        read = values.__getitem__
    elif span is not None:
        raise UndiffuseError(f"{source.name}: span is for bare arrays, a data set knows its own range")
    else:
        read, spec = source.values, source.spec
    order = np.arange(len(source)) if indices is None else positions(indices, len(source))
    size = features.batch_size
    portions = [order[start : start + size] for start in range(0, len(order), size)]

    def prepared(portion: np.ndarray) -> Tensor:
        return features.prepare(features.aligned(read(portion), spec), features.spec)

    with ThreadPoolExecutor(1, thread_name_prefix="features") as pool:
        ahead = pool.submit(prepared, portions[0]) if portions else None
        for following in [*portions[1:], None]:
            if ahead is None:
                return
            x = ahead.result()
            ahead = None if following is None else pool.submit(prepared, following)
            yield features.infer(x)


def extract(
    features: Features,
    source: Source,
    indices: np.ndarray | None = None,
    *,
    span: tuple[float, float] | None = None,
) -> Extracted:
    """All of :func:`batches` in memory, with the labels of a labelled data set."""
    source = opened(features.spec, source)
    count = -(-len(source if indices is None else indices) // features.batch_size)
    bar = {"desc": f"{features.name} features", "unit": "batch", "leave": False, "mininterval": 0.5}
    parts = list(tqdm(batches(features, source, indices, span=span), total=count, disable=None, **bar))
    if not parts:
        raise UndiffuseError("no samples: there is nothing to take features of")
    every = torch.cat([part for part, _ in parts])
    probabilities = [part for _, part in parts if part is not None]
    labels = source.labels if isinstance(source, Dataset) else None
    if labels is not None and indices is not None:
        labels = labels[indices]
    captions = None
    if isinstance(source, Dataset) and isinstance(features.network, CLIPNetwork):
        captions = source.captions(range(len(source)) if indices is None else indices)
    where = b"all" if indices is None else np.asarray(indices, np.int64).tobytes()
    return Extracted(
        every,
        torch.cat(probabilities) if probabilities else None,
        None if labels is None else torch.from_numpy(np.ascontiguousarray(labels)),
        digest(features.fingerprint, source.fingerprint, where) if isinstance(source, Dataset) else "",
        None if captions is None else text_features(features, captions),
    )


def opened(spec: DataSpec, source: Source) -> Dataset | np.ndarray:
    """``source``, to be held against data of ``spec``, as a data set or an array. A folder's pictures get the channels
    of the data, never another size."""
    if isinstance(source, (Dataset, np.ndarray)):
        return source
    if Path(source).suffix.lower() != ".npy":
        channels = spec.channels if spec.kind == "image" else None
        return open_dataset(source, channels=channels, frames=spec.shape[1] if spec.kind == "video" else None)
    try:
        return np.load(Path(source).expanduser(), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UndiffuseError(f"{source}: not a readable .npy file ({' '.join(str(error).split())})") from None


# --- references, kept -------------------------------------------------------------------------------------------------

LARGEST_KEPT = 2**30  # bytes


def reference_features(
    features: Features,
    data: Dataset,
    count: int | None = None,
    *,
    plan: str = "data",
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
) -> Extracted:
    """The features of ``count`` items of ``data``, from the cache or extracted now and kept there.

    The key is a hash of the data, the items, their preprocessing, and the network with its weights: with any of them
    changed nothing old is found (trap V8). A damaged file is made again.
    """
    indices = pick(data, count, plan, seed)
    key = digest("reference 2", features.fingerprint, data.fingerprint, indices.tobytes())
    path = cache_file(cache, f"reference-{key}.safetensors")
    labels = None if data.labels is None else torch.from_numpy(data.labels[indices])
    if path.is_file():
        try:
            if read_header(path).metadata.get("key") == key:
                kept = read_weights(path)
                return Extracted(kept["features"], kept.get("probabilities"), labels, key, kept.get("texts"))
        except (UndiffuseError, SafetensorError, KeyError) as error:
            warnings.warn(f"{error}: it is made again", UndiffuseWarning, stacklevel=2)
    found = extract(features, data, indices)
    tensors = {"features": found.features}
    tensors |= {} if found.probabilities is None else {"probabilities": found.probabilities}
    tensors |= {} if found.texts is None else {"texts": found.texts}
    if sum(tensor.nbytes for tensor in tensors.values()) <= LARGEST_KEPT:
        write_weights(path, tensors, {"key": key, "features": features.name, "data": data.name})
    return replace(found, labels=labels, fingerprint=key)
