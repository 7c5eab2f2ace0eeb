"""Pipeline: everything between a condition and data in its original units, saved as one self-describing folder.

    folder/
      model.safetensors   the weights; what they mean (network, schedule, prediction, label, units) in their metadata
      pipeline.json       the same for people, the default sampling settings, and those tuned for some numbers of steps
      codec/              of a model that works in latents: what makes them of data, and data of them

Loading refuses to guess: what is missing, or stated differently in the two files, is an error. Nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, TypedDict, Unpack, final

import numpy as np
import torch
from torch import Tensor, nn

from .asking import Question, Sampling, answer_together
from .beside import BESIDE, Beside, Holes
from .codecs import FILE, Codec, Tiling, check_same_data, codec_meaning, decode_tiled
from .compiling import Backend, ForSampling
from .conditions import LISTS, Conditions, Patches, Picture, Rows
from .config import from_json, load_json, parse_json, to_json, write_json_atomic
from .data.columns import asked as in_raw
from .data.shown import picture_spec
from .data.spec import DataSpec
from .denoiser import INPUT_SCALES, LABELS, Denoise, Denoiser, InputScale, Label
from .editing import below, keep_known
from .errors import UndiffuseError, UndiffuseWarning, unknown
from .grids import GRIDS, Distilled, Grid
from .grids import Times as TimesGrid
from .levels import Estimate, Level
from .likelihood import Likelihood, log_likelihood
from .networks import attention_maps, build
from .networks.layers import fold
from .noise import Brownian, Streams
from .objectives import TIMES, WEIGHTS, Times, Weight
from .predictions import PREDICTIONS, Prediction
from .prompts import AS_WRITTEN, PromptReading
from .reuse import Memory
from .sampling import Frame, start, trajectory
from .schedules import SCHEDULES, Schedule
from .solvers import SOLVERS, Solver
from .solvers.learned import Learned
from .weights import check_fits, load_into, read_header, read_weights, shapes, write_weights

REGISTRIES: dict[type, Mapping[str, Any]] = {
    Schedule: SCHEDULES,
    Prediction: PREDICTIONS,
    Label: LABELS,
    InputScale: INPUT_SCALES,
    # A learned solver and an explicit grid are of one model and so many steps: files hold them, nobody asks by name.
    Solver: {**SOLVERS, "learned": Learned()},
    Grid: {**GRIDS, "times": TimesGrid(), "distilled": Distilled()},
    Times: TIMES,
    Weight: WEIGHTS,
    Beside: BESIDE,
}
"""How files and the command line name the parts: ``{"kind": "cosine", ...}`` for a Schedule, and so on."""

FORMAT = 1
HALVES = (torch.bfloat16, torch.float16)
DECODED = 2**22
"""Elements of data that are decoded together, at most (or one item); some forty times as many numbers are in memory."""

BATCH = 64
"""Samples computed together unless asked otherwise; fixed, so that a preview and ``sample`` do the same arithmetic."""


@dataclass(frozen=True)
class ModelConfig:
    """All that rebuilds a denoiser, without its weights."""

    network: str
    network_config: dict[str, Any]
    schedule: Schedule
    prediction: Prediction
    label: Label
    input_scale: InputScale
    conditions: dict[str, dict[str, Any]] = field(default_factory=dict)
    learned_variance: bool = False

    def modules(self) -> nn.ModuleDict:
        """What has weights, named as in a denoiser's state: the network and, if there are any, the conditions."""
        modules = nn.ModuleDict({"network": build(self.network, self.network_config)})
        if self.conditions:
            width = int(self.network_config.get("condition_width", 0))
            modules["conditions"] = Conditions.build(self.conditions, width)
        return modules

    def build(self) -> Denoiser:
        """A denoiser with fresh weights (drawn from torch's global generator, as every module's are)."""
        modules = self.modules()
        return Denoiser(
            modules["network"],
            self.schedule,
            self.prediction,
            self.label,
            self.input_scale,
            modules["conditions"] if self.conditions else None,
            self.learned_variance,
        )


@dataclass(frozen=True)
class Tunings:
    """What ``undiffuse solvers MODEL --tune N`` keeps in ``pipeline.json``: settings, and of which weights."""

    weights: str
    settings: tuple[Sampling, ...]


class Asked(TypedDict, total=False):
    """What samples are asked for, of :meth:`Pipeline.begin`, by those who pass it on."""

    seed: int
    classes: Sequence[int | None] | None
    prompts: Sequence[str] | None
    negative_prompt: str | None
    cond: Rows | None
    against: Rows | None
    strength: float


def as_it_is(denoise: Denoise) -> Denoise:
    """The same denoiser."""
    return denoise


@dataclass(frozen=True, eq=False)
class Start:
    """Where a trajectory begins, and all that it needs but the network."""

    x: Tensor
    levels: list[Level]
    sampling: Sampling
    noise: Streams | Brownian
    cond: Mapping[str, Tensor]
    against: Mapping[str, Tensor]
    memory: Memory | None = None
    kept: tuple[Tensor, Tensor] | None = None
    """Data ``[1 or B, *spec.shape]`` (model units), and where they stay as they are (boolean, broadcast to them)."""
    wrap: Callable[[Denoise], Denoise] = as_it_is
    """What the guided denoiser must go through, so that they do."""


@dataclass(frozen=True, eq=False)
class Attention:
    """Which words act where.

    Attributes:
        x: ``[1, *shape]`` the sample, model units.
        words: the text of each token.
        weights: ``[T, *grid]``, the share of the attention at each place that each token got.
    """

    x: Tensor
    words: tuple[str, ...]
    weights: Tensor


def check_count(samples: int, batch_size: int) -> None:
    """Refuse to draw nothing."""
    if samples < 1 or batch_size < 1:
        raise UndiffuseError(f"asked for {samples} samples in batches of {batch_size}: both must be at least 1")


def finished(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The samples on the CPU; raises if one is not finite. ``dtype``: of the network's arithmetic."""
    x = x.cpu()
    if not bool(x.isfinite().all()):
        why = "float16, which ends at 65504 (try bfloat16), " if dtype == torch.float16 else ""
        raise UndiffuseError(
            f"the samples are not finite: {why}the model has diverged, or the guidance scale is far too large"
        )
    return x


def checked_keep(keep: Tensor, image: Tensor) -> Tensor:
    """``keep``, or an error unless it is boolean and fits the image."""
    try:
        fits = torch.broadcast_shapes(keep.shape, image.shape)[1:] == image.shape[1:]
    except RuntimeError:
        fits = False
    if keep.dtype != torch.bool or not fits:
        raise UndiffuseError(
            f"keep must be boolean and fit the image {list(image.shape)}, got {keep.dtype} {list(keep.shape)}"
        )
    return keep


class Home(Protocol):
    """Where a pipeline comes from, if that is another format: how its folder is written, and how it is made for data of
    another size. ``device``: where samples are, if the network is not always there."""

    device: torch.device | None

    def save(self, pipeline: Pipeline, folder: Path) -> None: ...

    def seen(self, pipeline: Pipeline, image: Tensor, keep: Tensor) -> dict[str, Tensor]:
        """The conditions that tell the network what of ``image`` is kept; none if it takes no such thing."""
        ...

    def resized(self, pipeline: Pipeline, size: Sequence[int]) -> Pipeline: ...


@final
class Pipeline:
    """A denoiser, the units of its data, and how to sample from it.

    Attributes:
        denoiser: on the device where it runs.
        config: what rebuilds it.
        spec: shape, units and class names of the data.
        sampling: the default settings.
        info: where it comes from (data, images seen, EMA profile, ...); JSON, for people.
        tuned: settings whose solver and grid were fitted to these weights; :meth:`settings` takes them where all else
            is equal, the number of steps included.
        codec: of a model that works in latents; None: the denoiser sees the data themselves.
        shape: of what the denoiser sees, one sample.
        tiling: how large data are decoded; None: whole.
        home: of one that was read from another format; None: from our own.
        fast: what computes when it samples, if that is :meth:`compiled`.

    All that people give and get (images, samples, previews) is data; :meth:`encode` and :meth:`decode` lie between them
    and the denoiser. A trajectory (:meth:`begin`, :meth:`frames`) is the denoiser's own.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        config: ModelConfig,
        spec: DataSpec,
        sampling: Sampling,
        info: dict[str, Any],
        tuned: tuple[Sampling, ...] = (),
        codec: Codec | None = None,
        home: Home | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.codec = codec
        self.home = home
        self.fast: ForSampling | None = None
        self.shape = spec.shape
        self.codec_hash: str | None = None
        self.tiling: Tiling | None = None
        if codec is not None:
            check_same_data(codec, spec, "the codec")
            self.shape, self.codec_hash = codec.latent_shape(spec.shape), codec.hash
        self.config = config
        self.spec = spec
        self.sampling = sampling
        self.info = info
        self.tuned = tuned

    @property
    def device(self) -> torch.device:
        """Where samples and conditions are, and the network, unless its home moves it."""
        if self.home is not None and self.home.device is not None:
            return self.home.device
        return next(self.denoiser.parameters()).device

    @property
    def asked(self) -> Denoiser:
        """What is asked when it samples: the denoiser, or that with its network compiled."""
        return self.denoiser if self.fast is None else self.fast.denoiser

    @property
    def dtype(self) -> torch.dtype:
        """The number type of the network's weights."""
        return next(self.denoiser.network.parameters()).dtype

    @property
    def arithmetic(self) -> dict[str, Any]:
        """What moves samples by rounding: the kind of device, the type of numbers, whether the network is compiled (not
        if that has failed)."""
        compiled = self.fast is not None and self.fast.works
        return {"device": self.device.type, "dtype": str(self.dtype).removeprefix("torch."), "compiled": compiled}

    @property
    def takes_prompts(self) -> bool:
        """Whether it takes prompts."""
        return self.denoiser.conditions is not None and bool(self.denoiser.conditions.written)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all that it can be asked for by name: its conditions, and each attribute and number of its data."""
        conditions = self.denoiser.conditions
        if conditions is None:
            return ()
        kinds = (("attributes", self.spec.attributes), ("numbers", self.spec.numbers))
        parts = [part for kind, parts in kinds if kind in conditions.names for part, *_ in parts]
        return (*conditions.asked, *conditions.told, *parts)

    @property
    def beside(self) -> DataSpec | None:
        """Of the picture that it is shown beside the noise, if it is; :func:`.read_shown` reads such pictures."""
        conditions = self.denoiser.conditions
        part = conditions.part("beside") if conditions is not None and "beside" in conditions.names else None
        if not isinstance(part, (Picture, Patches)):
            return None
        return self.spec.beside or picture_spec(self.spec, part.shape)

    @property
    def fills_holes(self) -> bool:
        """Whether what it is shown has holes, which it fills."""
        conditions = self.denoiser.conditions
        return self.beside is not None and isinstance(conditions.part("beside").made, Holes)

    @property
    def fingerprint(self) -> str:
        """The first 16 digits of the SHA-256 of the weights: two models with the same one sample the same."""
        digest = sha256()
        for name, tensor in self.denoiser.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        digest.update((self.codec_hash or "").encode())
        return digest.hexdigest()[:16]

    # --- between the data and what the denoiser sees ---

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Data ``[B, *spec.shape]`` (model units) as the denoiser sees them, ``[B, *shape]``."""
        return x if self.codec is None else torch.cat([self.codec.encode(each) for each in self._slices(x)])

    @torch.no_grad()
    def decode(self, z: Tensor, alone: bool = False) -> Tensor:
        """The data (model units) of what the denoiser sees, a few items together; ``alone``: one by one, so that an
        item does not depend on the others to the last bit.

        Raises for data that are not finite. Where the codec computes in half precision, which ends at 65504, it first
        tries again in float32, and says so (trap P7).
        """
        codec = self.codec
        if codec is None:
            return z
        finished(z, self.dtype)

        whole = codec.decode if self.fast is None or self.fast.decode is None else self.fast.decode

        def decoded(each: Tensor) -> Tensor:
            return whole(each) if self.tiling is None else decode_tiled(codec, each, self.tiling)

        parts = []
        for each in self._slices(z, alone):
            x = decoded(each)
            if codec.halved and not bool(x.isfinite().all()):
                warnings.warn(
                    "the decoder's output was not finite in half precision: it is computed in float32 from here on",
                    UndiffuseWarning,
                    stacklevel=2,
                )
                codec.in_float32()
                x = decoded(each)
            if not bool(x.isfinite().all()):
                raise UndiffuseError("the decoder's output is not finite: the latents are far from all that it knows")
            parts.append(x)
        return torch.cat(parts)

    def kept(self, keep: Tensor) -> Tensor:
        """``keep`` (``[1, *spec.shape]`` or broadcast to it, boolean) as the denoiser sees it: a latent is kept where
        all that it stands for is."""
        codec = self.codec
        if codec is None:
            return keep
        whole = keep.expand(-1, *self.spec.shape)
        return fold(whole, (codec.factor,) * (whole.ndim - 2)).all(1, keepdim=True)

    def _slices(self, x: Tensor, alone: bool = False) -> Sequence[Tensor]:
        """A batch in parts of :data:`DECODED` elements of data."""
        return x.split(1 if alone else max(1, DECODED // math.prod(self.spec.shape)))

    # --- the folder ---

    def save(self, folder: str | Path, weights: Mapping[str, Tensor] | None = None) -> Path:
        """Write the folder, each file atomically; returns its path.

        ``weights`` is written in place of the denoiser's own: a copy made earlier of weights that training moves.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.home is not None:
            if weights is not None:
                raise UndiffuseError(f"{folder}: a model read from another format is saved with its own weights only")
            self.home.save(self, folder)
            return self.save_settings(folder)
        self._check_whole(folder)
        self._save_codec(folder / "codec")
        meaning = {"undiffuse": json.dumps(self._meaning())}
        write_weights(folder / "model.safetensors", self.denoiser.state_dict() if weights is None else weights, meaning)
        return self.save_settings(folder)

    def _save_codec(self, folder: Path) -> None:
        """Write the codec, unless this very one is there."""
        if self.codec is None:
            return
        if self.codec.hash != self.codec_hash:
            raise UndiffuseError("the codec is not the one that this model was trained with: it has been changed since")
        try:
            there = codec_meaning(folder / FILE)["hash"]
        except UndiffuseError:
            there = None
        if there != self.codec_hash:
            self.codec.save(folder)

    def save_settings(self, folder: str | Path) -> Path:
        """Write ``pipeline.json`` alone, beside weights that are there; returns the folder."""
        self._check_whole(Path(folder))
        stated = {**self._meaning(), "sampling": to_json(self.sampling, REGISTRIES)}
        if self.tuned:
            settings = [to_json(each, REGISTRIES) for each in self.tuned]
            stated["tuned"] = {"weights": self.fingerprint, "settings": settings}
        write_json_atomic(Path(folder) / "pipeline.json", stated)
        return Path(folder)

    def _meaning(self) -> dict[str, Any]:
        codec = {} if self.codec is None else {"codec": {"kind": self.codec.kind, "hash": self.codec_hash}}
        return {
            "format": FORMAT,
            "model": to_json(self.config, REGISTRIES),
            "data": self.spec.to_json(),
            "info": self.info,
            **codec,
        }

    def resized(self, *size: int) -> Pipeline:
        """The same model, with the same weights, for data of another size (``pipeline.resized(512, 768)``: height,
        width). Raises where the network or its codec does not allow it."""
        if self.home is None:
            raise UndiffuseError(f"this model makes data of {list(self.spec.shape[1:])}, the size it was trained on")
        other = self.home.resized(self, size)
        return other if self.fast is None else other.compiled(self.fast.backend)

    def compiled(self, backend: Backend = "inductor") -> Pipeline:
        """The same pipeline with network and decoder compiled by ``torch.compile`` (on a GPU each call is a CUDA
        graph), which is done when they are first called, and takes a minute or more for each number of rows.

        Calls are filled up to a power of two, so batches of such sizes are the best. Samples are the same to rounding.
        Where compiling does not work, a warning says why, and the network computes as it is. What looks into the
        network (likelihood, attention to words) and what trains it asks :attr:`denoiser`, which is not compiled.
        """
        if self.home is not None and self.home.device is not None:
            raise UndiffuseError("a compiled network stays where it is: leave out offload, or compile")
        other = copy(self)
        other.fast = ForSampling(self.denoiser, None if self.codec is None else self.codec.decode, backend)
        return other

    @staticmethod
    def load(
        path: str | Path,
        device: str | torch.device = "cpu",
        *,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        config: str | Path | None = None,
        download: bool = False,
        offload: bool = False,
    ) -> Pipeline:
        """The pipeline in a folder (or in the ``model/`` of a run folder), or in a folder of diffusers.

        Args:
            dtype: of the network's weights and arithmetic: float32 unless said otherwise; bfloat16 or float16 take half
                the memory, are faster where the processor multiplies in them, and move samples by their rounding. All
                around the network stays in float32. A codec of ours keeps its weights and multiplies in it.

        The others are for diffusers' formats (:mod:`undiffuse.interop.diffusers`):

        Args:
            variant: of the weights' files, such as ``fp16``.
            config: of a checkpoint in one file (``path``), the folder of diffusers that says what it is.
            download: fetch ``path``, a name on the Hugging Face Hub, if it is not on this machine.
            offload: only the part that computes is on the device; everything else waits in main memory.

        Raises :class:`UndiffuseError` when a file is missing or damaged, when the two disagree, or when the weights are
        those of another architecture; a model is loaded whole or not at all.
        """
        if dtype not in (None, torch.float32, *HALVES):
            raise UndiffuseError(f"dtype {dtype}: a network computes in float32, bfloat16 or float16")
        if is_foreign(path):
            from .interop.diffusers.load import load

            return load(path, device, dtype, variant, config, download, offload)
        if variant or config or download or offload:
            raise UndiffuseError(f"{path}: variant, config, download and offload are for diffusers' folders")
        folder = find_pipeline(path)
        weights, described = folder / "model.safetensors", folder / "pipeline.json"
        header = read_header(weights)
        if "undiffuse" not in header.metadata:
            raise UndiffuseError(f"{weights}: holds weights but not what they mean (schedule, prediction, units)")
        meaning = parse_json(header.metadata["undiffuse"], str(weights))
        stated = load_json(described)
        if not isinstance(stated, dict) or not isinstance(meaning, dict):
            raise UndiffuseError(f"{described}: must be a JSON object")
        known = ("format", "model", "data", "info", "sampling", "tuned", "codec")
        for name in stated:
            if name not in known:
                raise unknown(f"key of {described}", name, known)
        for name in ("format", "model", "data", "sampling"):
            if name not in stated:
                raise UndiffuseError(f"{described}: {name} is missing")
            if name != "sampling" and stated[name] != meaning.get(name):
                raise UndiffuseError(
                    f"{described}: {name} is not what {weights.name} was trained with; restore the file"
                )
        if stated.get("codec") != meaning.get("codec"):
            raise UndiffuseError(f"{described}: codec is not what {weights.name} was trained with; restore the file")
        if stated["format"] != FORMAT:
            raise UndiffuseError(
                f"{described}: format {stated['format']}, this version reads {FORMAT}; update undiffuse"
            )
        model = from_json(ModelConfig, stated["model"], str(described), REGISTRIES)
        sampling = from_json(Sampling, stated["sampling"], str(described), REGISTRIES)
        tuned = from_json(Tunings, stated["tuned"], f"{described}: tuned", REGISTRIES) if "tuned" in stated else None
        spec = DataSpec.from_json(stated["data"])
        codec = _codec_of(folder, stated.get("codec"), device)
        with torch.device("meta"):
            wanted = shapes(model.modules().state_dict())
        check_fits(wanted, header.shapes, str(weights))  # before anything of the declared size is allocated
        with torch.random.fork_rng(
            devices=[]
        ):  # the fresh weights are overwritten; leave no trace in the global stream
            denoiser = model.build()
        load_into(denoiser, read_weights(weights), str(weights))
        denoiser.to(device).eval()
        pipeline = Pipeline(denoiser, model, spec, sampling, dict(stated.get("info", {})), codec=codec)
        if tuned is not None:
            if tuned.weights != pipeline.fingerprint:
                raise UndiffuseError(
                    f'{described}: its tuned settings are of other weights; remove "tuned" and tune again'
                )
            pipeline.tuned = tuned.settings
        if dtype in HALVES:
            pipeline._round_to(dtype)
        return pipeline

    def _round_to(self, dtype: torch.dtype) -> None:
        """Let the network, and the codec's arithmetic, be of this type."""
        if self.spec.kind == "points":
            bits = 8 if dtype == torch.bfloat16 else 11
            warnings.warn(
                f"{dtype} has {bits} bits for a number, and points are few numbers: expect them on a grid",
                UndiffuseWarning,
                stacklevel=3,
            )
        self.denoiser.network.to(dtype)
        if self.codec is not None:
            self.codec.precision = dtype

    def _check_whole(self, folder: Path) -> None:
        """Raise where the weights are not those of a file of ours any more."""
        if self.home is None and self.dtype in HALVES:
            raise UndiffuseError(
                f"{folder}: weights in {self.dtype} are rounded: load the model without dtype, and save that"
            )

    # --- sampling ---

    def check(self, cond: Mapping[str, Tensor], sampling: Sampling) -> None:
        """Raise for settings that this model cannot follow."""
        conditions = self.denoiser.conditions
        if sampling.guidance_scale != 1 and not (cond and conditions is not None and conditions.asked):
            raise UndiffuseError(
                f"guidance scale {sampling.guidance_scale} asked of a model without conditions; leave it at 1"
            )
        if sampling.reading != AS_WRITTEN and not self.takes_prompts:
            raise UndiffuseError("weighted_prompts, long_prompts or clip_skip asked of a model without text")
        for part in conditions.written.values() if conditions is not None else ():
            part.follow(sampling.reading)
        if sampling.threshold != "none" and self.codec is not None:
            raise UndiffuseError(
                f"threshold={sampling.threshold} asked of a model in latents, which have no range: leave threshold=none"
            )
        if sampling.threshold != "none" and not self.spec.bounded:
            raise UndiffuseError(f"threshold={sampling.threshold} needs data with a declared range; this data has none")
        sampling.check_reuse(self.config.network, self.denoiser.network)

    def denoise(
        self,
        cond: Mapping[str, Tensor],
        sampling: Sampling,
        rows: int | None = None,
        against: Mapping[str, Tensor] | None = None,
        memory: Memory | None = None,
    ) -> Denoise:
        """The denoiser bound to its condition, guided (away from ``against``, or the null condition) and thresholded as
        ``sampling`` says; ``rows``: see :meth:`.Denoiser.together`. ``memory`` is that of the one trajectory that asks;
        without, nothing is reused whatever ``sampling`` says."""
        self.check(cond, sampling)

        def denoise(x: Tensor, level: Level) -> Estimate:
            away = against or self.against(len(x), reading=sampling.reading)
            question = Question(x, level, cond, away, sampling, memory)
            return answer_together(self.asked, [question], rows)[0]

        return denoise

    def calls(self, sampling: Sampling) -> int:
        """Network calls that one sample takes with these settings, counted on one that costs nothing (trap S21)."""
        return len(self._called(sampling))

    def whole_calls(self, sampling: Sampling) -> int:
        """Those of :meth:`calls` in which the whole network computes: all, unless ``sampling.reuse`` is above 1."""
        return sum(self._called(sampling))

    def _called(self, sampling: Sampling) -> list[bool]:
        """For each network call, whether it is a whole one."""
        called: list[bool] = []
        memory = sampling.memory()

        def denoise(x: Tensor, level: Level) -> Estimate:
            halves = sampling.halves(level)
            reuses = memory is not None and memory.serves(halves)
            called.extend([not reuses] * sum(halves))
            if memory is not None:
                memory.note(halves, None if reuses else [x] * sum(halves))
            return Estimate(torch.zeros_like(x), x / float(level.sigma), torch.full_like(x, 0.5))

        levels = sampling.grid.levels(self.config.schedule, sampling.steps)
        deque(trajectory(denoise, torch.zeros(1, 2), levels, sampling.solver, Streams(0, 1)), maxlen=1)
        return called

    def conditions(
        self,
        samples: Sequence[int],
        classes: Sequence[int | None] | None,
        prompts: Sequence[str] | None = None,
        cond: Rows | None = None,
        reading: PromptReading | None = None,
    ) -> dict[str, Tensor]:
        """The condition of each sample: sample i gets ``classes[i % len(classes)]`` and ``prompts[i % len(prompts)]``,
        and of any condition by name row i in turn of ``cond[name]`` (:meth:`.Conditions.read`): classes and attributes
        by the names of their values, numbers in their own units, and each of them also by itself
        (:func:`.columns.asked`). The command line, the server and the studio are all read here.

        Without classes: every class in turn, or none in particular where anything else is asked for; a class of None
        asks for nothing in particular (the null class). Without prompts, or with an empty one: the null text.
        ``reading``: of the prompts (:attr:`Sampling.reading`); None: as the default settings say.
        """
        conditions = self.denoiser.conditions
        reading = self.sampling.reading if reading is None else reading
        usual = {} if conditions is None else conditions.usual(len(samples))
        asked: dict[str, Tensor] = {}
        for name in cond or {}:
            if conditions is None:
                raise UndiffuseError(f"condition {name} asked of a model without conditions")
            if name not in self.names:
                raise unknown("condition", name, self.names)
        for name, given in in_raw(self.spec, cond or {}).items() if conditions is not None else ():
            rows = conditions.read(name, given, reading)
            asked[name] = rows[torch.tensor([i % len(rows) for i in samples])].to(self.device)
        if prompts is not None:
            written = {} if conditions is None else conditions.written
            if not written:
                instead = ", and ask for classes" if conditions is not None and "classes" in conditions.names else ""
                raise UndiffuseError(
                    f"a prompt asked of a model without text; it was trained without captions: leave it out{instead}"
                )
            if not prompts:
                raise UndiffuseError("no prompt given: name one, or leave prompts out")
            for name, part in written.items():
                if name in asked:
                    raise UndiffuseError(f"{name} is given twice: as a prompt and as a condition")
                rows = part.read(prompts, reading=reading)
                asked[name] = rows[torch.tensor([i % len(prompts) for i in samples])].to(self.device)
        usual, asked = self._skipping(usual, reading), self._skipping(asked, reading)
        if conditions is None or "classes" not in conditions.names:
            if classes:
                raise UndiffuseError("classes asked of a model without classes")
            return {**usual, **asked}
        if "classes" in asked:
            if classes is not None:
                raise UndiffuseError("classes are given twice: by themselves and as a condition")
            return {**usual, **asked}
        count = int(usual["classes"][0])
        chosen = list(classes) if classes is not None else [None] if asked else list(range(count))
        if not chosen:
            raise UndiffuseError("no class given: name one, or leave classes out for all in turn")
        for label in chosen:
            if label is not None and not 0 <= label < count:
                raise UndiffuseError(f"class {label} does not exist: this model has 0 to {count - 1}")
        wanted = [chosen[i % len(chosen)] for i in samples]
        labels = torch.tensor([count if label is None else label for label in wanted], device=self.device)
        return {**usual, **asked, "classes": labels}

    def _skipping(self, values: Mapping[str, Tensor], reading: PromptReading) -> dict[str, Tensor]:
        """The same conditions, texts without the encoder's last layers if that is asked for."""
        written = {} if self.denoiser.conditions is None else self.denoiser.conditions.written
        there = {
            name: part.skipping(values[name], reading.clip_skip) for name, part in written.items() if name in values
        }
        return {**values, **there}

    def against(
        self,
        samples: int,
        label: int | None = None,
        prompt: str | None = None,
        cond: Rows | None = None,
        reading: PromptReading | None = None,
    ) -> dict[str, Tensor]:
        """What guidance leads away from: a class, a prompt, any conditions by name; what is not given is null.
        ``reading``: as for :meth:`conditions`."""
        reading = self.sampling.reading if reading is None else reading
        null = self._skipping(self.denoiser.null(samples), reading)
        if label is None and not prompt and not cond:
            return null
        classes = None if label is None else [label]
        asked = self.conditions(range(samples), classes, [prompt] if prompt else None, cond, reading)
        told = () if self.denoiser.conditions is None else self.denoiser.conditions.told
        return {**asked, **{name: null[name] for name in told if name not in (cond or {})}}

    def settings(self, stated: dict[str, Any] | None = None, **changes: Any) -> Sampling:
        """The default settings (or those ``stated`` in a file's JSON) with some changed by name.

        Solvers and grids may be given by name; unknown names raise. Where neither is given and the rest, the number of
        steps above all, is what the model was tuned for, the tuned solver and grid are taken.
        """
        settings = self.sampling if stated is None else from_json(Sampling, stated, "sampling settings", REGISTRIES)
        for name, value in changes.items():
            if name not in Sampling.__dataclass_fields__:
                raise unknown("sampling setting", name, Sampling.__dataclass_fields__)
            registry: Mapping[str, Any] = {"solver": SOLVERS, "grid": GRIDS}.get(name, {})
            if isinstance(value, str) and registry:
                if value not in registry:
                    raise unknown(name, value, registry)
                changes[name] = registry[value]
        asked = replace(settings, **changes)
        if stated is None and "solver" not in changes and "grid" not in changes:
            for tuned in self.tuned:
                if replace(asked, solver=tuned.solver, grid=tuned.grid) == tuned:
                    return tuned
        return asked

    def begin(
        self,
        samples: int | Sequence[int],
        *,
        seed: int = 0,
        classes: Sequence[int | None] | None = None,
        prompts: Sequence[str] | None = None,
        negative_prompt: str | None = None,
        cond: Rows | None = None,
        against: Rows | None = None,
        sampling: Sampling | None = None,
        image: Tensor | None = None,
        strength: float = 1.0,
        keep: Tensor | None = None,
    ) -> Start:
        """Where a trajectory of these samples begins: at noise, or with an ``image`` (``[1 or B, *spec.shape]``, model
        units of the data) at that image with noise of level t = ``strength``, in (0, 1] (:func:`.image_to_image`).

        ``keep`` (boolean, broadcast to the image): where the image stays as it is. A network that was trained to fill
        holes is told of it, and what is known of a picture ``cond["beside"]`` of its own stays too; another one's
        estimates are held there (:func:`.keep_known`).
        """
        sampling = sampling or self.settings()
        numbers = range(samples) if isinstance(samples, int) else samples
        seen: dict[str, Tensor] = {}
        kept, wrap = None, as_it_is
        if keep is not None:
            if image is None:
                raise UndiffuseError("keep says where the image stays as it is: give image as well")
            kept = image.to(self.device), checked_keep(keep, image).to(self.device)
            seen = self._seen(*kept)
            if twice := [name for name in seen if name in (cond or {})]:
                raise UndiffuseError(f"{twice[0]} is given twice: as a condition, and as the image to keep a part of")
            if not seen:
                wrap = partial(keep_known, known=self.encode(kept[0]), keep=self.kept(kept[1]))
        seen = {name: rows.expand(len(numbers), *rows.shape[1:]) for name, rows in seen.items()}
        asked = {**(cond or {}), **{name: [None] for name in seen}}  # so that no class is asked for unless it is named
        told = {**self.conditions(numbers, classes, prompts, asked, sampling.reading), **seen}
        kept = kept or self.known(told)
        self.check(told, sampling)
        if (negative_prompt or against) and sampling.guidance_scale == 1:
            raise UndiffuseError(
                "a negative prompt (or against) acts through guidance: set a guidance scale other than 1"
            )
        away = self.against(len(numbers), prompt=negative_prompt, cond=against, reading=sampling.reading)
        if self.denoiser.conditions is not None:  # what is told holds on both sides
            both = {name for name in self.denoiser.conditions.told if name in {**(cond or {}), **seen}}
            both -= set(against or {})
            away |= {name: told[name] for name in both}
        noise = Brownian(seed, numbers) if sampling.noise == "brownian" else Streams(seed, numbers)
        levels = sampling.grid.levels(self.config.schedule, sampling.steps)
        eps = noise.draw(self.shape, torch.empty(0, device=self.device))
        # A deterministic network computes the same whatever training does around it: dropout is off.
        self.denoiser.eval()
        if image is None or strength == 1:
            x = start(levels[0], eps)
            return Start(x, levels, sampling, noise, told, away, sampling.memory(), kept, wrap)
        first = self.config.schedule.first
        if not first <= strength < 1:
            raise UndiffuseError(f"strength must be from {first:.3g} (keep the input) to 1 (ignore it), got {strength}")
        levels = below(levels, strength)
        x = levels[0].mix(self.encode(image).to(eps).expand_as(eps), eps)
        return Start(x, levels, sampling, noise, told, away, sampling.memory(), kept, wrap)

    def known(self, told: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """What a model that fills holes leaves as it is of the pictures that it is shown: these, and where (as data,
        ``[B, ...]``); None: it fills no holes."""
        if not self.fills_holes:
            return None
        return told["beside"].nan_to_num(), ~told["beside"].isnan().any(1, keepdim=True)

    def _seen(self, image: Tensor, keep: Tensor) -> dict[str, Tensor]:
        """The conditions that tell a network which fills holes what of ``image`` is kept."""
        if self.home is not None:
            return self.home.seen(self, image, keep)
        return {"beside": torch.where(keep, image, torch.nan)} if self.fills_holes else {}

    def end(self, begun: Start, z: Tensor, alone: bool = False) -> Tensor:
        """The samples of a trajectory that ended at ``z``, on the CPU: decoded (``alone``: :meth:`decode`), and
        what was to be kept as it was, bit for bit (trap X10). Raises if one is not finite."""
        x = finished(self.decode(z, alone), self.dtype)
        if begun.kept is None:
            return x
        image, keep = begun.kept
        return torch.where(keep.cpu(), image.to("cpu", x.dtype), x)

    def frames(
        self,
        samples: int | Sequence[int],
        *,
        rows: int | None = None,
        sampling: Sampling | None = None,
        image: Tensor | None = None,
        keep: Tensor | None = None,
        **asked: Unpack[Asked],
    ) -> Iterator[Frame]:
        """The trajectory of one batch, noise first: ``steps + 1`` frames of what the denoiser sees, data by
        :meth:`decode`. Stop iterating to cancel."""
        begun = self.begin(samples, sampling=sampling, image=image, keep=keep, **asked)
        yield from self.walk(begun, rows)

    def walk(self, begun: Start, rows: int | None = None) -> Iterator[Frame]:
        """The trajectory from where it begins."""
        denoise = begun.wrap(self.denoise(begun.cond, begun.sampling, rows, begun.against, begun.memory))
        yield from trajectory(denoise, begun.x, begun.levels, begun.sampling.solver, begun.noise)

    def draw(
        self,
        samples: int | Sequence[int],
        *,
        sampling: Sampling | None = None,
        image: Tensor | None = None,
        keep: Tensor | None = None,
        batch_size: int = BATCH,
        rows: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        **asked: Unpack[Asked],
    ) -> Tensor:
        """``[N, *spec.shape]`` samples in model units, decoded, on the CPU; sample i is a function of ``(seed, i)`` and
        what is asked of it alone. Its batch moves it by the rounding of the network, about 1e-6; with ``rows``, the
        number of rows that every network call then has, by not a bit (on a CPU).

        Sample i starts from ``image[i % len(image)]`` with ``strength`` and keeps of it what ``keep`` says, if they are
        given (:meth:`begin`).

        ``progress(done, total)`` counts steps over all batches. Raises if a sample is not finite.
        """
        sampling = sampling or self.settings()
        numbers = list(range(samples)) if isinstance(samples, int) else list(samples)
        check_count(samples if isinstance(samples, int) else len(numbers), batch_size)
        if rows is not None:
            each = self.rows(sampling)
            if rows < each:
                raise UndiffuseError(f"a guided sample takes {each} rows of a network call, {rows} are allowed")
            batch_size = min(batch_size, rows // each)
        batches = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
        drawn, total = [], len(batches) * sampling.steps
        for index, batch in enumerate(batches):
            theirs = [None if x is None else x[torch.tensor([i % len(x) for i in batch])] for x in (image, keep)]
            begun = self.begin(batch, sampling=sampling, image=theirs[0], keep=theirs[1], **asked)
            last: deque[Frame] = deque(maxlen=1)
            for frame in self.walk(begun, rows):
                last.append(frame)
                if progress is not None:
                    progress(index * sampling.steps + frame.index, total)
            drawn.append(self.end(begun, last[0].x, alone=rows is not None))
        return torch.cat(drawn)

    @staticmethod
    def rows(sampling: Sampling) -> int:
        """Rows of a network call that one sample takes: two if it is guided."""
        return 1 if sampling.guidance_scale in (0, 1) and not sampling.guidance_rescale else 2

    def sample(
        self,
        n: int = 1,
        *,
        seed: int = 0,
        classes: Sequence[int | None] | None = None,
        prompts: Sequence[str] | None = None,
        negative_prompt: str | None = None,
        cond: Rows | None = None,
        against: Rows | None = None,
        image: np.ndarray | None = None,
        strength: float = 1.0,
        keep: np.ndarray | None = None,
        batch_size: int = BATCH,
        progress: Callable[[int, int], None] | None = None,
        **settings: Any,
    ) -> np.ndarray:
        """``[n, *data shape]`` samples in the data's own units, dtype and layout.

        Sample i gets ``classes[i % len(classes)]`` and ``prompts[i % len(prompts)]``, and of any condition by name row
        i in turn of ``cond[name]``; guidance leads away from ``negative_prompt`` and ``against``, conditions by name
        too (``against={"classes": [3]}``). ``settings`` are fields of :class:`Sampling` (``steps=10, solver="heun"``).

        With ``image`` (``[1 or n, *data shape]``, the data's own units) they begin there, with noise of level t =
        ``strength`` from 0 to 1, at which nothing of it is left. Where ``keep`` is true (boolean, ``[1 or n, *data
        shape]``, or without its channels) they are the image to the last bit.
        """
        sampling = self.settings(**settings)
        held = None if keep is None else self.spec.where(keep)
        x = self.draw(
            n,
            seed=seed,
            classes=classes,
            prompts=prompts,
            negative_prompt=negative_prompt,
            cond=cond,
            against=against,
            sampling=sampling,
            image=None if image is None else self.spec.to_model(image),
            strength=strength,
            keep=held,
            batch_size=batch_size,
            progress=progress,
        )
        return self.spec.to_data(x)

    def attention(
        self,
        prompt: str,
        *,
        seed: int = 0,
        number: int = 0,
        negative_prompt: str | None = None,
        cond: Rows | None = None,
        against: Rows | None = None,
        **settings: Any,
    ) -> Attention:
        """Sample ``number`` of ``seed``, and where the words of its prompt have acted: each token's share of the
        attention at each place, a mean over layers, heads and the steps of the trajectory (guidance's other half left
        out). With a network that looks at no tokens, or a guidance scale of 0, it raises."""
        sampling = self.settings(**settings)
        if sampling.guidance_scale == 0:
            raise UndiffuseError("at guidance scale 0 no word acts: ask for more")
        conditions = self.denoiser.conditions
        name, written = next(iter(conditions.written.items() if conditions is not None else ()), ("", None))
        if conditions is None or written is None or not written.tokens(prompt):
            raise UndiffuseError("attention is to the words of a prompt: give one with words, to a model with text")
        tokens = written.tokens(prompt)[: written.length]
        first = conditions.place(name)
        with attention_maps(self.denoiser.network) as maps:
            asked: dict[str, Any] = {"negative_prompt": negative_prompt, "cond": cond, "against": against}
            plain = copy(self)
            plain.fast = None  # nothing can be seen inside a compiled network
            x = plain.draw([number], seed=seed, prompts=[prompt], sampling=sampling, **asked)
        if not maps:
            raise UndiffuseError("this network looks at no tokens")
        size = [max(each.weights.shape[axis] for each in maps) for axis in range(2, maps[0].weights.ndim - 1)]
        # The conditional row is the first of a call; padding has no weight.
        each = [torch.movedim(m.weights[:1].mean(1), -1, 1)[:, first : first + len(tokens)].cpu() for m in maps]
        mean = torch.stack([nn.functional.interpolate(weights, size) for weights in each]).mean(0)[0]
        return Attention(x, tuple(written.text([token]) for token in tokens), mean)

    def log_likelihood(
        self,
        values: np.ndarray,
        classes: Sequence[int | None] | None = None,
        *,
        cond: Rows | None = None,
        steps: int = 100,
        start: float | None = None,
        probes: int | None = None,
        seed: int = 0,
        batch_size: int = BATCH,
    ) -> Likelihood:
        """The log-likelihood of ``values`` (``[N, *data shape]``, the data's own units and dtype) under the unguided
        model; see :func:`undiffuse.likelihood.log_likelihood` for the settings and what the result means. In latents it
        is a density of the latents, which are continuous whatever the data are (trap D6).

        ``classes`` are those of the N values, and ``cond`` is what else is known of them, N rows of any condition by
        name; what is not given is nothing in particular.
        """
        given = {name: rows if isinstance(rows, LISTS) else [rows] for name, rows in (cond or {}).items()}
        if wrong := [name for name, rows in given.items() if len(rows) != len(values)]:
            raise UndiffuseError(f"likelihood of {len(values)} values, {len(given[wrong[0]])} rows of {wrong[0]}")
        x = self.spec.to_model(values)
        if len(x) == 0 or batch_size < 1 or (classes is not None and len(classes) != len(x)):
            known = "no" if classes is None else len(classes)
            raise UndiffuseError(f"likelihood of {len(x)} values, {known} classes, batches of {batch_size}")
        if self.dtype in HALVES:
            raise UndiffuseError(f"likelihood in {self.dtype} would be rounding: load the model without dtype")
        self.denoiser.eval()
        units = self.spec if self.codec is None else None  # latents are continuous, in units of their own (trap D6)
        parts = []
        for batch in torch.arange(len(x)).split(batch_size):
            numbers = batch.tolist()
            told = self.denoiser.null(len(numbers))
            if classes is not None or given:
                chosen = None if classes is None else [classes[i] for i in numbers]
                rows = {name: each[numbers[0] : numbers[-1] + 1] for name, each in given.items()}
                told = self.conditions(range(len(numbers)), chosen, cond=rows)
            parts.append(
                log_likelihood(
                    self.denoiser.bind(**told),
                    self.config.schedule,
                    self.encode(x[batch]).to(self.device),
                    units=units,
                    steps=steps,
                    start=start,
                    probes=probes,
                    seed=seed,
                    samples=numbers,
                )
            )
        joined = Likelihood.join(parts)
        return joined if self.codec is None else replace(joined, kind=LATENT_DENSITY)


LATENT_DENSITY = "density of the latents (not of the data: what the codec loses is not in it)"


def _codec_of(folder: Path, stated: Any, device: str | torch.device) -> Codec | None:
    """The codec in a model's folder, which must be the one ``stated``: that it was trained with (trap D5)."""
    file = folder / "codec" / FILE
    if stated is None:
        if file.exists():
            raise UndiffuseError(f"{file}: this model was not trained in latents; remove its folder")
        return None
    if not isinstance(stated, dict) or not isinstance(stated.get("hash"), str):
        raise UndiffuseError(f"{folder / 'pipeline.json'}: codec must be an object with the hash of the codec")
    if not file.exists():
        raise UndiffuseError(f"{file}: missing; this model works in the latents of codec {stated['hash']}: restore it")
    codec = Codec.load(file.parent, device)
    if codec.hash != stated["hash"]:
        raise UndiffuseError(
            f"{file}: codec {codec.hash}, but the model was trained in the latents of {stated['hash']}: restore that"
        )
    return codec


def is_foreign(path: str | Path) -> bool:
    """Whether this is no model of ours, nor meant to be one: a folder of diffusers, a checkpoint in a single file, or a
    name on the Hugging Face Hub of which there is nothing here."""
    folder = Path(path)
    if folder.is_dir():
        return (folder / "model_index.json").exists() and not (folder / "undiffuse" / "pipeline.json").is_file()
    if folder.is_file():
        return folder.suffix.lower() in (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
    here = (Path("runs") / folder).exists() or folder.parent.exists() or folder.parent == Path("runs")
    return not here and HUB_NAME.fullmatch(str(path)) is not None


HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_pipeline(folder: Path) -> bool:
    """Whether a folder is one of a pipeline, ours or diffusers'."""
    return (folder / "pipeline.json").is_file() or (folder / "model_index.json").is_file()


def find_pipeline(path: str | Path) -> Path:
    """The pipeline folder that ``path`` means: itself, the ``model/`` of a run folder, or of a run in ./runs, or the
    ``undiffuse/`` in a folder that was exported for diffusers."""
    path = Path(path)
    for folder in (path / "undiffuse", path, path / "model", Path("runs") / path / "model"):
        if is_pipeline(folder):
            return folder
    if any((folder / FILE).is_file() for folder in (path, path / "model", Path("runs") / path / "model")):
        raise UndiffuseError(
            f"{path}: a codec makes no samples; train in its latents: undiffuse train DATA --codec {path}"
        )
    if not path.exists() and not (Path("runs") / path).exists():
        raise UndiffuseError(f"{path}: no such model; `undiffuse ls` lists the runs")
    if path.is_file():
        raise UndiffuseError(f"{path}: a file; a model is a folder with model.safetensors and pipeline.json")
    raise UndiffuseError(f"{path}: no model here (no pipeline.json): is the run still before its first checkpoint?")


def resolve_device(name: str) -> str:
    """``auto`` is the best device there is; one that torch cannot use is refused."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kinds = ("cpu", "cuda", "mps", "xpu")
    if name.partition(":")[0] not in kinds:
        raise unknown("device", name, ("auto", *kinds))
    try:
        torch.empty(1, device=name).add_(1)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UndiffuseError(f"--device {name}: {str(error).splitlines()[0]} (try --device cpu)") from None
    return name
