"""Latents of a data set: encoded once, kept on disk, read like any other data.

    data  --codec-->  cache/latents/KEY/00000.npy, 00001.npy, ...

The key is a hash of the data's fingerprint, the codec's hash and what was done to the data before (mirrored or not), so
nothing is ever taken for something else. Each file is written whole or not at all, and one that is there is not made
again: encoding that was interrupted goes on. Latents that were not used for long make room (:mod:`undiffuse.cache`).

Encoding and mirroring do not commute, so mirrored data are encoded too, as a second copy; which of the two an epoch
sees is drawn as it is for pictures. What is drawn from a continuum (moved, turned) would need a copy for every draw,
and is refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import final

import numpy as np
import torch

from ..cache import Room, cache_folder, used
from ..codecs import Codec, check_same_data, measure
from ..config import load_json, write_bytes_atomic, write_json_atomic
from ..errors import UndiffuseError
from .augment import Augment
from .base import Dataset, digest, positions
from .spec import DataSpec

SHARD = 1024
"""Items a file."""
TOGETHER, ELEMENTS = 64, 4_000_000
"""Items that are encoded together, and the most elements that these have."""
MEASURED = 2_000
"""Items on which the units of a codec are measured that comes without."""
LAYOUTS = {1: "CL", 2: "CYX", 3: "CZYX"}


def codec_for(
    path: str | Path,
    data: Dataset,
    device: str | torch.device = "cpu",
    *,
    cache: str | os.PathLike[str] | None = None,
) -> Codec:
    """The codec at ``path`` (:meth:`.Codec.load`), in the units of the latents of ``data`` where it comes without: an
    autoencoder of diffusers, whose own constants are those of the data that others trained with (trap D5).

    What was measured is kept in the cache, so that a run goes on in the units that it began in.
    """
    codec = Codec.load(path, device)
    if codec.measured:
        return codec
    check_same_data(codec, data.spec, str(path))
    key = digest("units 1", data.fingerprint, data.spec.stated, codec.hash, str(codec.precision))
    file = (cache_folder() if cache is None else Path(cache)) / "units" / f"{key}.json"
    where = np.unique(np.linspace(0, len(data) - 1, min(len(data), MEASURED)).astype(np.int64))
    try:
        known = load_json(file)
        codec.settle(known["mean"], known["std"], {"data": data.name, "items": len(where)})
    except (UndiffuseError, OSError, KeyError, TypeError, ValueError):  # not there, or damaged
        step = _together(data.spec)
        measure(codec, (data.batch(where[i : i + step])[0] for i in range(0, len(where), step)), data.name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(file, {"mean": codec.mean.tolist(), "std": codec.std.tolist()})
    presumed = torch.tensor(codec.info["constants"]["std"])
    here, there = (
        " to ".join(dict.fromkeys(f"{float(end):.3g}" for end in std.aminmax())) for std in (codec.std, presumed)
    )
    codec.info["units"] = f"deviations {here}, measured on {len(where):,} items; its own constants presume {there}"
    return codec


def _together(spec: DataSpec) -> int:
    return max(1, min(TOGETHER, ELEMENTS // math.prod(spec.shape)))


def latent_spec(data: DataSpec, codec: Codec) -> DataSpec:
    """The spec of the latents of ``data``: without bounds, in the units that the codec measured; classes,
    vocabulary and what else is known of items are the data's."""
    shape = codec.latent_shape(data.shape)
    return DataSpec(
        "array",
        shape,
        "float32",
        None,
        None,
        (0.0,),
        (1.0,),
        LAYOUTS[len(shape) - 1],
        data.classes,
        vocabulary=data.vocabulary,
        attributes=data.attributes,
        numbers=data.numbers,
    )


@final
class Latents(Dataset):
    """The latents of ``original``, in its order, with its labels and captions.

    Args:
        augment: what a run will do to the data; only mirroring can be done to latents.
        cache: the folder for the files; None: the user's cache.
        progress: called with the items encoded so far and all that are to be, where some are.
    """

    def __init__(
        self,
        original: Dataset,
        codec: Codec,
        augment: Augment = Augment(),
        *,
        cache: str | os.PathLike[str] | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        if original.spec.beside is not None:
            raise UndiffuseError(
                f"{original.name}: pairs are learned as they are, not as latents: train without a codec"
            )
        check_same_data(codec, original.spec, "the codec")
        augment.check(original.spec)
        for name in ("shift", "geometric"):
            if getattr(augment, name):
                raise UndiffuseError(
                    f"augment.{name} cannot be done to latents, which are encoded once: set it to 0 (augment.flip can)"
                )
        self.whole, self.codec = original, codec
        self.spec, self.name = latent_spec(original.spec, codec), original.name
        self.labels, self.texts, self.columns = original.labels, original.texts, original.columns
        self.duplicates, self.notes = original.duplicates, original.notes
        self.fingerprint = digest("latents 1", original.fingerprint, codec.hash)
        copies = (False, True) if augment.flip else (False,)
        counted = _Counted(progress, len(copies) * len(original))
        self._copies = {mirrored: _encoded(original, codec, mirrored, cache, counted) for mirrored in copies}

    def __len__(self) -> int:
        return len(self.whole)

    @property
    def original(self) -> Dataset:
        return self.whole

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        return self.whole.skipped

    def called(self, index: int) -> str:
        return self.whole.called(index)

    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        where = positions(indices, len(self))
        return self._gather(where, np.zeros(len(where), bool)), None if self.labels is None else self.labels[where]

    def augmented(
        self, augment: Augment, seed: int, epochs: np.ndarray, indices: np.ndarray
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        where = positions(indices, len(self))
        mirrored = augment.mirrored(seed, epochs, where)
        if mirrored.any() and True not in self._copies:
            raise UndiffuseError("augment.flip: these latents were made without their mirror images")
        labels = None if self.labels is None else self.labels[where]
        return torch.from_numpy(self._gather(where, mirrored)), self.conditions(where, labels)

    def _gather(self, where: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        values = np.empty((len(where), *self.spec.shape), np.float32)
        for i, (index, mirror) in enumerate(zip(where, mirrored, strict=True)):
            values[i] = self._copies[bool(mirror)][index // SHARD][index % SHARD]
        return values


class _Counted:
    """Progress over several copies."""

    def __init__(self, progress: Callable[[int, int], None], total: int) -> None:
        self.progress, self.total, self.done, self.made = progress, total, 0, False

    def add(self, items: int, made: bool) -> None:
        self.done, self.made = self.done + items, self.made or made
        if self.made:  # what is there already takes no time
            self.progress(self.done, self.total)


def _encoded(
    data: Dataset, codec: Codec, mirrored: bool, cache: str | os.PathLike[str] | None, counted: _Counted
) -> list[np.ndarray]:
    """The files of one copy, mapped into memory; those that are missing or damaged are made."""
    key = digest("latents 1", data.fingerprint, data.spec.stated, codec.hash, str(codec.precision), str(mirrored))
    root = cache_folder() if cache is None else Path(cache)
    folder = root / "latents" / key
    folder.mkdir(parents=True, exist_ok=True)
    used(folder)
    room: Room | None = None
    shape, parts = codec.latent_shape(data.spec.shape), []
    for number, begin in enumerate(range(0, len(data), SHARD)):
        count = min(SHARD, len(data) - begin)
        file = folder / f"{number:05d}.npy"
        part = _read(file, (count, *shape))
        made = part is None
        if part is None:
            buffer = BytesIO()
            np.save(buffer, _encode(data, codec, mirrored, range(begin, begin + count)), allow_pickle=False)
            room = room or Room(root)
            room.take(buffer.getbuffer().nbytes)  # these are needed, whether they fit or not
            write_bytes_atomic(file, buffer.getvalue())
            part = np.load(file, mmap_mode="r", allow_pickle=False)
        parts.append(part)
        counted.add(count, made)
    return parts


def _read(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    try:
        part = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return part if part.shape == shape and part.dtype == np.float32 else None


@torch.no_grad()
def _encode(data: Dataset, codec: Codec, mirrored: bool, items: range) -> np.ndarray:
    parts, step = [], _together(data.spec)
    for begin in range(items.start, items.stop, step):
        where = np.arange(begin, min(begin + step, items.stop))
        x, _ = data.batch(where)
        if (lost := data.lost(where)).any():  # another item took its place, which has another label and caption
            raise UndiffuseError(f"{data.called(int(where[lost][0]))}: cannot be read any more; start again without it")
        z = codec.encode(x.flip(-1) if mirrored else x).cpu()
        if not bool(z.isfinite().all()):
            raise UndiffuseError(f"{data.name}: the codec's latents of items {begin} and on are not finite")
        parts.append(z.float().numpy())
    return np.concatenate(parts)
