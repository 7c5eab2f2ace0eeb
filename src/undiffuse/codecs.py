"""Codecs: data as latents, fewer numbers that say nearly the same, and back.

    x  --encode-->  z = (latent - mean) / std  --decode-->  x

A denoiser that works in latents sees z, whose channels have mean 0 and deviation 1 over the data that the codec was
measured on, whatever the codec's own numbers are. The two constants of each channel are measured, stored with the
weights and part of their hash, and nothing outside this file multiplies by them, so they can be neither forgotten nor
taken from another codec nor applied twice (trap D5).

A codec is a folder with one file, ``codec.safetensors``, whose metadata say all that rebuilds it.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .config import load_json, parse_json
from .data.spec import DataSpec
from .errors import UndiffuseError, choose, unknown
from .networks import Cost
from .networks.layers import fold, unfold
from .weights import check_fits, load_into, read_header, read_weights, shapes, write_weights

FILE = "codec.safetensors"
FORMAT = 1
LEAST = 1e-6
"""A channel of latents whose deviation is no more than this share of its mean is the same for all data."""


class Codec(nn.Module, ABC):
    """Abstract: data in model units ``[B, *shape]`` to latents ``[B, *latent_shape(shape)]`` and back.

    An author writes :meth:`latent_shape`, :meth:`posterior` and :meth:`reconstruct`, in the codec's own numbers; the
    units of the latents are the business of :meth:`encode` and :meth:`decode` here.

    Attributes:
        kind: its name in :data:`CODECS`.
        config: the arguments that build it, as JSON has them.
        factor: positions of the data to one of the latents, along each spatial axis.
        reach: positions of latents on either side on which one of the data depends; None: on all of them.
        mean, std: ``[channels]`` float32 buffers, of the codec's own latents.
        measured: on what they were measured, JSON for people; empty: not yet, and then it neither encodes nor decodes.
        spec: of the data that it was trained on; None where that is not known (bounded data are assumed).
        precision: the number type of the arithmetic inside, float32 or a half (by autocast); the weights stay.
        info: where it comes from, JSON for people.
    """

    kind: str
    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, factor: int, config: Mapping[str, Any], reach: int | None = None) -> None:
        super().__init__()
        self.config = dict(config)
        self.factor = factor
        self.reach = reach
        self.measured: dict[str, Any] = {}
        self.spec: DataSpec | None = None
        self.precision = torch.float32
        self.info: dict[str, Any] = {}
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    # --- what an author writes ----------------------------------------------------------------------------------------

    @abstractmethod
    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of one item's latents; raises for data that this codec does not take, and says what to do."""

    @abstractmethod
    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and deviation of the latents of ``x``, in the codec's own numbers; None: there is no doubt."""

    @abstractmethod
    def reconstruct(self, latent: Tensor) -> Tensor:
        """The data of latents in the codec's own numbers."""

    # --- what others call ---------------------------------------------------------------------------------------------

    @final
    def encode(self, x: Tensor, eps: Tensor | None = None) -> Tensor:
        """``x`` (model units) as latents with mean 0 and deviation 1: the mean of the posterior, or with the unit noise
        ``eps`` (shaped like the latents) a sample of it."""
        shape = self.latent_shape(x.shape[1:])
        self._check_measured()
        mean, std = self._computed(self.posterior, x)
        if tuple(mean.shape[1:]) != shape:
            raise UndiffuseError(f"the codec made latents {list(mean.shape[1:])} where it promised {list(shape)}")
        latent = mean if eps is None or std is None else mean + std * eps
        return (latent - self._column(self.mean, latent)) / self._column(self.std, latent)

    @final
    def decode(self, z: Tensor) -> Tensor:
        """The data, in model units, of latents with mean 0 and deviation 1."""
        self._check_measured()
        return self._computed(self.reconstruct, z * self._column(self.std, z) + self._column(self.mean, z))

    @property
    def hash(self) -> str:
        """The first 16 digits of the SHA-256 of kind, configuration, weights, mean and deviation."""
        digest = sha256(json.dumps([self.kind, self.config], sort_keys=True).encode())
        for name, tensor in self.state_dict().items():
            digest.update(f"{name} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def halved(self) -> bool:
        """Whether it computes in half precision."""
        halves = (torch.float16, torch.bfloat16)
        return self.precision in halves or any(p.dtype in halves for p in self.parameters())

    def in_float32(self) -> None:
        """Compute in float32 from now on."""
        self.precision = torch.float32
        self.float()

    def settle(
        self, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor, measured: Mapping[str, Any]
    ) -> None:
        """Set the units of the latents: mean and deviation of each channel, and on what they were measured."""
        both = [torch.as_tensor(values, dtype=torch.float64).reshape(-1) for values in (mean, std)]
        for name, values in zip(("mean", "deviation"), both, strict=True):
            if values.shape != self.mean.shape or not bool(values.isfinite().all()):
                raise UndiffuseError(f"{name} of the latents: {len(self.mean)} finite numbers are needed, {values}")
        dead = (both[1] <= LEAST * both[0].abs().clamp(min=1)).nonzero().flatten().tolist()
        if dead:
            raise UndiffuseError(f"channel {dead[0]} of the latents is the same for all data: train the codec longer")
        if not measured:
            raise UndiffuseError("say on what mean and deviation of the latents were measured")
        self.mean.copy_(both[0])
        self.std.copy_(both[1])
        self.measured = dict(measured)

    def _check_measured(self) -> None:
        if not self.measured:
            raise UndiffuseError("the mean and deviation of this codec's latents are not measured yet: measure() them")

    def _column(self, values: Tensor, like: Tensor) -> Tensor:
        return values.to(like.device, torch.promote_types(like.dtype, torch.float32)).reshape(
            -1, *[1] * (like.ndim - 2)
        )

    def _computed(self, function: Callable[[Tensor], Any], x: Tensor) -> Any:
        """``function(x)`` on the codec's device in its precision; results in float32 (or x's type, if wider)."""
        there = self.mean.device
        inner = next((p.dtype for p in self.parameters()), x.dtype)
        half = self.precision != torch.float32
        with torch.autocast(there.type, self.precision if half else torch.bfloat16, enabled=half):
            made = function(x.to(there, inner))
        wide = torch.promote_types(x.dtype, torch.float32)
        if isinstance(made, tuple):
            return tuple(None if each is None else each.to(wide) for each in made)
        return made.to(wide)

    # --- the folder ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write ``codec.safetensors`` into the folder, atomically; returns the folder."""
        self._check_measured()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        meaning = {
            "format": FORMAT,
            "kind": self.kind,
            "config": self.config,
            "latent": {"mean": self.mean.tolist(), "std": self.std.tolist(), "measured": self.measured},
            "hash": self.hash,
            "data": None if self.spec is None else self.spec.to_json(),
            "info": self.info,
        }
        write_weights(folder / FILE, self.state_dict(), {"undiffuse_codec": json.dumps(meaning)})
        return folder

    @staticmethod
    def load(path: str | Path, device: str | torch.device = "cpu") -> Codec:
        """The codec in a folder (or in the ``model/`` of the run that trained it, or the ``codec/`` of a model); or an
        autoencoder of diffusers, in a folder of its own or a pipeline's, whose units are not measured yet.

        Raises :class:`UndiffuseError` for a file that is missing or damaged, that another program wrote, or whose mean
        and deviation are not those of its hash (trap D5).
        """
        if is_foreign_codec(path):
            from .interop.diffusers.codecs import load

            return load(path, device)
        file = find_codec(path) / FILE
        meaning = codec_meaning(file)
        make = choose(f"kind of codec in {file}", str(meaning["kind"]), CODECS)
        wrong = f"{file}: its configuration does not build a {meaning['kind']} codec"
        config = meaning["config"]
        if not isinstance(config, dict):
            raise UndiffuseError(wrong)
        try:
            with torch.device("meta"):
                wanted = shapes(make(config).state_dict())
            check_fits(wanted, read_header(file).shapes, str(file))  # before anything of the declared size is allocated
            with torch.random.fork_rng(devices=[]):
                codec = make(config)
        except (TypeError, KeyError) as error:
            raise UndiffuseError(f"{wrong} ({error})") from None
        weights = read_weights(file)
        latent = meaning["latent"]
        try:
            said = [torch.tensor(latent[name], dtype=torch.float32) for name in ("mean", "std")]
            measured = dict(latent["measured"])
        except (KeyError, TypeError, ValueError):
            raise UndiffuseError(f"{file}: does not say mean and deviation of its latents") from None
        for name, values in zip(("mean", "std"), said, strict=True):
            if not torch.equal(values, weights[name].float()):
                raise UndiffuseError(
                    f"{file}: the {name} of its latents is stated differently in two places; restore it"
                )
        half = [tensor.dtype for tensor in weights.values() if tensor.is_floating_point()]
        if half and half[0] in (torch.float16, torch.bfloat16):
            codec.to(half[0])
        load_into(codec, weights, str(file))
        if codec.hash != meaning["hash"]:
            raise UndiffuseError(f"{file}: is not what its hash says (changed since it was measured); restore the file")
        codec.measured = measured
        codec._check_measured()
        codec.spec = None if meaning["data"] is None else DataSpec.from_json(meaning["data"])
        codec.info = dict(meaning["info"])
        return codec.to(device).eval().requires_grad_(False)


def codec_meaning(file: Path) -> dict[str, Any]:
    """What a codec file says of itself, every key there; no tensor is read."""
    header = read_header(file)
    if "undiffuse_codec" not in header.metadata:
        raise UndiffuseError(f"{file}: holds weights but not what they mean (kind of codec, units of its latents)")
    meaning = parse_json(header.metadata["undiffuse_codec"], str(file))
    known = ("format", "kind", "config", "latent", "hash", "data", "info")
    if not isinstance(meaning, dict):
        raise UndiffuseError(f"{file}: its metadata must be a JSON object")
    for name in meaning:
        if name not in known:
            raise unknown(f"key of {file}", name, known)
    if missing := [name for name in known if name not in meaning]:
        raise UndiffuseError(f"{file}: {', '.join(missing)} missing")
    if meaning["format"] != FORMAT:
        raise UndiffuseError(f"{file}: format {meaning['format']}, this version reads {FORMAT}; update undiffuse")
    return meaning


def is_foreign_codec(path: str | Path) -> bool:
    """Whether this is a folder of diffusers, or what may be a name on the Hub, and no codec of ours."""
    from .pipeline import is_foreign

    config = Path(path) / "config.json"
    if is_foreign(path) or not config.is_file() or (Path(path) / FILE).is_file():
        return is_foreign(path)
    stated = load_json(config)
    return isinstance(stated, dict) and "_class_name" in stated


def find_codec(path: str | Path) -> Path:
    """The codec folder that ``path`` means: itself, the ``model/`` of a run, the ``codec/`` of a model, or of a run in
    ./runs."""
    path = Path(path)
    inside = ("", "model", "codec", "model/codec")
    for folder in (*(path / inner for inner in inside), *(Path("runs") / path / inner for inner in inside)):
        if (folder / FILE).is_file():
            return folder
    if not path.exists() and not (Path("runs") / path).exists():
        raise UndiffuseError(f"{path}: no such codec; `undiffuse train DATA --recipe autoencoder` makes one")
    raise UndiffuseError(
        f"{path}: no codec here (no {FILE}): is it another model, or still before its first checkpoint?"
    )


# --- the units of the latents -----------------------------------------------------------------------------------------


class ChannelMoments:
    """Mean and deviation of each channel over any number of batches, in float64 (Chan et al. 1983's update)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean, self.square = torch.zeros(0), torch.zeros(0)

    def add(self, latent: Tensor) -> None:
        """A batch ``[B, C, ...]``."""
        each = latent.detach().cpu().double().transpose(0, 1).flatten(1)
        count, mean = each.shape[1], each.mean(1)
        square = (each - mean[:, None]).square().sum(1)
        if self.count:
            apart, total = mean - self.mean, self.count + count
            mean = self.mean + apart * count / total
            square = self.square + square + apart.square() * self.count * count / total
        self.mean, self.square, self.count = mean, square, self.count + count

    @property
    def std(self) -> Tensor:
        return (self.square / max(1, self.count)).sqrt()


@torch.no_grad()
def measure(codec: Codec, batches: Iterable[Tensor], what: str) -> None:
    """Set the units of the codec's latents to those of the data in ``batches`` (model units), called ``what``."""
    moments, items = ChannelMoments(), 0
    for x in batches:
        moments.add(codec._computed(codec.posterior, x)[0])
        items += len(x)
    if not items:
        raise UndiffuseError(f"{what}: no items to measure the latents on")
    codec.settle(moments.mean, moments.std, {"data": what, "items": items})


# --- tiles ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiling:
    """Decode large data in tiles of ``size`` positions of latents along each axis; memory is then that of one tile.

    Neighbours share ``overlap`` positions, in which one fades into the other; None: what the codec needs so that the
    result is that of the whole, or a quarter of the size where it looks at everything and tiles are an approximation.
    """

    size: int
    overlap: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= (self.overlap or 0) < self.size:
            raise UndiffuseError(f"tiles of {self.size} positions that share {self.overlap}: 0 <= overlap < size")


def decode_tiled(codec: Codec, z: Tensor, tiling: Tiling) -> Tensor:
    """``codec.decode(z)`` in tiles.

    With a codec of finite reach and enough overlap (twice the reach, which is the default) every element is computed
    from all that it depends on, and the result is that of the whole to the rounding of the arithmetic, about 1e-6.
    """
    reach = codec.reach
    share = tiling.overlap if tiling.overlap is not None else tiling.size // 4 if reach is None else 2 * reach
    if share >= tiling.size:
        raise UndiffuseError(
            f"tiles of {tiling.size} positions: this codec looks {reach} far, so take {share + 1} or more"
        )
    halo = min(share // 2, reach or 0)  # what is computed without its surroundings counts for nothing
    sizes = z.shape[2:]
    f = codec.factor
    result: Tensor | None = None
    total = torch.zeros(1, 1, *(n * f for n in sizes))
    for tile in product(*(list(_starts(n, tiling.size, share)) for n in sizes)):
        part = codec.decode(z[(..., *(slice(begin, end) for begin, end in tile))])
        weight = torch.ones(1, 1, *part.shape[2:])
        for axis, ((begin, end), n) in enumerate(zip(tile, sizes, strict=True)):
            ramp = _ramp((end - begin) * f, begin > 0, end < n, halo * f, (share - 2 * halo) * f)
            weight = weight * ramp.reshape([-1 if axis == i else 1 for i in range(len(sizes))])
        if result is None:
            result = part.new_zeros(*part.shape[:2], *total.shape[2:])
        place = (..., *(slice(begin * f, end * f) for begin, end in tile))
        result[place] += part * weight.to(part)
        total[place] += weight
    assert result is not None
    return result / total.to(result)


def _starts(length: int, size: int, share: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each tile; the last ends where the data do and is as large as the others."""
    begin = 0
    while begin + size < length:
        yield begin, begin + size
        begin += size - share
    yield max(0, length - size), length


def _ramp(length: int, before: bool, after: bool, halo: int, fade: int) -> Tensor:
    """The weight of a tile along one axis: 1, and where it has a neighbour 0 in the halo, then rising."""
    place = torch.arange(length) + 0.5
    weight = torch.ones(length)
    for neighbour, distance in ((before, place), (after, length - place)):
        if neighbour:
            weight = weight * ((distance - halo) / max(fade, 1e-6)).clamp(0, 1)
    return weight


# --- kinds ------------------------------------------------------------------------------------------------------------


@final
class Fold(Codec):
    """Blocks of ``factor`` positions a side as channels: nothing is lost and nothing learned. It makes a network's
    grid coarser, and is the codec whose every result is known (tests).

    Args:
        channels: of the data; rank: its spatial axes.
    """

    kind = "fold"

    def __init__(self, channels: int, rank: int, factor: int) -> None:
        config = {"channels": channels, "rank": rank, "factor": factor}
        if min(channels, factor) < 1 or rank not in (1, 2, 3):
            raise UndiffuseError(f"a fold needs channels and factor of at least 1 and rank 1 to 3, got {config}")
        super().__init__(channels * factor**rank, factor, config, reach=0)
        self.channels, self.rank = channels, rank

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return folded_shape(shape, self.channels, self.rank, self.factor, len(self.mean))

    def posterior(self, x: Tensor) -> tuple[Tensor, None]:
        return fold(x, (self.factor,) * self.rank), None

    def reconstruct(self, latent: Tensor) -> Tensor:
        return unfold(latent, (self.factor,) * self.rank)


def folded_shape(shape: Sequence[int], channels: int, rank: int, factor: int, latent: int) -> tuple[int, ...]:
    """``(latent, *sizes / factor)``, or an error for other channels, other axes, or sizes that do not divide."""
    if len(shape) != rank + 1 or shape[0] != channels:
        wanted = ", ".join([str(channels), *["size"] * rank])
        raise UndiffuseError(f"this codec takes data [{wanted}], these are {list(shape)}")
    if any(n % factor for n in shape[1:]):
        near = "x".join(str(max(1, round(n / factor)) * factor) for n in shape[1:])
        raise UndiffuseError(
            f"data of {'x'.join(map(str, shape[1:]))} do not divide into blocks of {factor}: bring them to multiples "
            f"of {factor}, such as {near} (--image-size), or take a codec of a smaller factor"
        )
    return (latent, *(n // factor for n in shape[1:]))


def build_codec(kind: str, config: Mapping[str, Any]) -> Codec:
    """A codec with fresh weights (drawn from torch's global generator), not yet measured."""
    return choose("kind of codec", kind, CODECS)(config)


def codec_cost(codec: nn.Module, shape: Sequence[int]) -> Cost:
    """Parameters of a codec on the device "meta", and FLOPs of encoding and decoding one item."""
    assert isinstance(codec, Codec)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        codec.reconstruct(codec.posterior(torch.zeros(1, *shape))[0])
    return Cost(sum(p.numel() for p in codec.parameters()), counter.get_total_flops())


def _autoencoder(config: Mapping[str, Any]) -> Codec:
    from .networks.autoencoder import Autoencoder

    return Autoencoder(**config)


def _of_diffusers(name: str, config: Mapping[str, Any]) -> Codec:
    from .interop.diffusers.codecs import build

    return build(name, config)


CODECS: dict[str, Callable[[Mapping[str, Any]], Codec]] = {
    "fold": lambda config: Fold(**config),
    "autoencoder": _autoencoder,
    "autoencoder_kl": partial(_of_diffusers, "AutoencoderKL"),
    "autoencoder_tiny": partial(_of_diffusers, "AutoencoderTiny"),
    "vq_model": partial(_of_diffusers, "VQModel"),
}
"""How each kind of codec is built from its configuration (a file names the kind, never code)."""


def check_same_data(codec: Codec, spec: DataSpec, where: str) -> None:
    """Raise unless data of ``spec`` are in the units that the codec was trained in, and of a shape that it takes."""
    codec.latent_shape(spec.shape)
    known = codec.spec
    if known is None:
        if not spec.bounded:
            raise UndiffuseError(f"{where}: made for data with a declared range; these have none")
        return
    if known.bounded != spec.bounded or (
        not spec.bounded and not all(map(math.isclose, (*known.shift, *known.scale), (*spec.shift, *spec.scale)))
    ):
        raise UndiffuseError(
            f"{where}: was trained on data in other units (range or mean and deviation differ); train a codec on these"
        )
