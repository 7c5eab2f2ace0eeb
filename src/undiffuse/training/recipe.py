"""A recipe: everything that decides what a training run does, in one frozen tree.

Progress counts images seen. The learning rate and the EMA are functions of it, so batch size, accumulation and the
number of devices do not move them (trap R5).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from ..asking import Sampling
from ..beside import Beside, stated
from ..codecs import build_codec, codec_cost
from ..conditions import Conditions
from ..config import from_json, override
from ..data.augment import LABELS, Augment, advice
from ..data.spec import DataSpec
from ..denoiser import InputScale, Label, NoScale, TimeLabel
from ..encoders import load
from ..errors import UndiffuseError, UndiffuseWarning, unknown
from ..networks import build, describe, sized
from ..objectives import Stratified, Times, Unit, Weight
from ..pipeline import REGISTRIES, ModelConfig
from ..predictions import FlowVelocity, Prediction
from ..schedules import Flow, Schedule

Shard = Literal["auto", "never", "always"]
Precision = Literal["auto", "float32", "bf16"]
Compile = Literal["auto", "never", "always"]


def check(wrong: bool, message: str) -> None:
    """Raise :class:`UndiffuseError` if ``wrong``."""
    if wrong:
        raise UndiffuseError(message)


@dataclass(frozen=True)
class Model:
    """What is trained.

    Attributes:
        size: the size dial, ``tiny`` to ``large``; for a DiT also a size of the paper, ``DiT-B/2``.
        family: a name in ``NETWORKS``; None chooses by the data, an MLP for points and a U-Net for the rest.
        network: options of the network that override what the dial chose (``{"dropout": 0.1}``).
        schedule, prediction, label, input_scale, learned_variance: as for :class:`undiffuse.Denoiser`.
        conditional: learn the classes, captions, attributes and numbers, where the data has them.
        condition_width: length of the vector that a condition is embedded in.
        text_encoder: a frozen CLIP or T5 of ``transformers`` that reads the captions, a folder or a name on the Hub;
            None: a small transformer of our own, trained with the network.
        text_length: most tokens of a caption.
        text_layers: of the transformer that reads it.
        token_width: of all tokens.
        beside: a picture made of each item itself, which the model is shown and completes: ``smaller``
            (super-resolution), ``holes`` (inpainting), ``grey`` (colourisation).
        beside_as: how: as ``channels`` that lie where x does, or as ``tokens``, one for each patch.
        beside_patch: positions along each axis that are one token.
    """

    size: str = "small"
    family: str | None = None
    network: dict[str, Any] = field(default_factory=dict)
    schedule: Schedule = Flow()
    prediction: Prediction = FlowVelocity()
    label: Label = TimeLabel()
    input_scale: InputScale = NoScale()
    conditional: bool = True
    condition_width: int = 64
    text_encoder: str | None = None
    text_length: int = 64
    text_layers: int = 2
    token_width: int = 64
    beside: Beside | None = None
    beside_as: Literal["channels", "tokens"] = "channels"
    beside_patch: int = 4
    learned_variance: bool = False

    def config(self, spec: DataSpec, told: int = 0) -> ModelConfig:
        """All that builds the denoiser for data of this spec, which is ``told`` so many numbers of augmentation."""
        classes = len(spec.classes) if self.conditional else 0
        conditions: dict[str, dict[str, Any]] = {"classes": {"kind": "classes", "classes": classes}} if classes else {}
        if self.conditional and spec.vocabulary and spec.kind != "points":
            common = {"length": self.text_length, "token_width": self.token_width}
            own = {"kind": "text", "vocabulary": list(spec.vocabulary), "layers": self.text_layers}
            conditions["text"] = {**own, **common}
            if self.text_encoder:
                conditions["text"] = {
                    "kind": "pretrained",
                    "model": self.text_encoder,
                    "hash": load(self.text_encoder).hash,
                    **common,
                }
        if self.conditional and spec.attributes:
            sizes = [len(values) for _, values in spec.attributes]
            conditions["attributes"] = {"kind": "attributes", "sizes": sizes}
        if self.conditional and spec.numbers:
            conditions["numbers"] = {"kind": "vector", "size": len(spec.numbers)}
        if self.conditional and (self.beside is not None or spec.beside is not None):
            conditions["beside"] = self._beside(spec)
        if told:
            conditions["augmentation"] = {"kind": "augmentation", "size": told}
        kinds = [each["kind"] for each in conditions.values()]
        width = self.condition_width if any(kind not in ("picture", "patches") for kind in kinds) else 0
        out = spec.channels * (2 if self.learned_variance else 1)
        tokens = any(kind in ("text", "pretrained", "patches") for kind in kinds)
        name, options = sized(spec.shape, self.size, width, out, self.family, self.token_width if tokens else 0)
        with torch.device("meta"):  # only to hear its complaints and its defaults: no weights, no random numbers
            shown = {name: each for name, each in conditions.items() if each["kind"] == "picture"}
            options["in_channels"] += Conditions.build(shown, width).channels
            complete = dict(build(name, {**options, **self.network}).config)
        return ModelConfig(
            network=name,
            network_config=complete,
            schedule=self.schedule,
            prediction=self.prediction,
            label=self.label,
            input_scale=self.input_scale,
            conditions=conditions,
            learned_variance=self.learned_variance,
        )

    def _beside(self, spec: DataSpec) -> dict[str, Any]:
        """The condition that shows a picture made of each item, or the one that it comes with."""
        check(spec.kind == "points", "model.beside is for data with places; these are points")
        if spec.beside is not None:
            check(self.beside is not None, "the data come with pictures beside: leave out model.beside")
            picture: dict[str, Any] = {"shape": list(spec.beside.shape)}
        else:
            assert self.beside is not None
            picture = {"shape": list(self.beside.shape(spec.shape)), "made": stated(self.beside)}
        if self.beside_as == "channels":
            return {"kind": "picture", "size": list(spec.shape[1:]), **picture}
        return {"kind": "patches", "patch": self.beside_patch, "token_width": self.token_width, **picture}


@dataclass(frozen=True)
class Objective:
    """What is minimised (chapter 9).

    Attributes:
        times: which noise levels are drawn; stratified over the whole batch by default.
        weight: how much each level counts.
        huber: the constant of the pseudo-Huber distance, None for the squared error.
        offset_noise: strength of the noise that is constant over a channel, 0 for none.
        condition_dropout: share of samples whose condition is replaced by null.
    """

    times: Times = Stratified()
    weight: Weight = Unit()
    huber: float | None = None
    offset_noise: float = 0.0
    condition_dropout: float = 0.1

    def __post_init__(self) -> None:
        check(not 0 <= self.condition_dropout <= 1, f"condition_dropout={self.condition_dropout} must be in [0, 1]")
        check(self.huber is not None and self.huber <= 0, f"huber={self.huber} must be positive, or none")
        check(self.offset_noise < 0, f"offset_noise={self.offset_noise} must be at least 0")


@dataclass(frozen=True)
class Optimiser:
    """AdamW (Loshchilov & Hutter 2019) or Muon (Jordan et al. 2024), and its learning rate.

    Attributes:
        kind: ``adamw``, or ``muon``: that for the matrices and convolutions inside the network (:mod:`.muon`), AdamW
            for the rest.
        lr: the highest learning rate.
        betas, eps, weight_decay: of AdamW; the last is Muon's too.
        momentum: of Muon.
        warmup: images over which the learning rate rises from 0.
        decay: how it falls to 0 over the run: not at all, linearly, or as half a cosine.
        clip: longest gradient (its norm over all parameters); a longer one is shortened to this.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.95
    warmup: int = 0
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    clip: float = 1.0

    def __post_init__(self) -> None:
        check(self.lr <= 0, f"lr={self.lr} must be positive")
        check(not all(0 <= beta < 1 for beta in self.betas), f"betas={self.betas} must be in [0, 1)")
        check(self.eps <= 0, f"eps={self.eps} must be positive")
        check(self.weight_decay < 0, f"weight_decay={self.weight_decay} must be at least 0")
        check(not 0 <= self.momentum < 1, f"momentum={self.momentum} must be in [0, 1)")
        check(self.warmup < 0, f"warmup={self.warmup} images must be at least 0")
        check(self.clip <= 0, f"clip={self.clip} must be positive")

    def rate(self, before: int, after: int, plan: Plan) -> float:
        """The learning rate of the update that takes the count of images seen from ``before`` to ``after``."""
        rise = min(1.0, after / self.warmup) if self.warmup else 1.0
        p = plan.progress(before)
        fall = {"constant": 1.0, "linear": 1 - p, "cosine": (1 + math.cos(math.pi * p)) / 2}[self.decay]
        return self.lr * rise * fall


@dataclass(frozen=True)
class Training:
    """How long, in which portions, and what is written on the way.

    Attributes:
        images: length of the run in images seen (an image seen twice counts twice).
        batch_size: images an update, over all devices and accumulated parts.
        accumulation: parts in which a batch is computed, to save memory; changes the result only by rounding.
        precision: ``float32``, or ``bf16``: matrix products in bfloat16, all else in float32. ``auto``: a run of ten
            minutes or more tries whether bfloat16 pays (:mod:`.speed`), another is float32.
        compile: the network by ``torch.compile``: ``always``, ``never``, or ``auto``: a run of ten minutes or more on
            a GPU tries whether that pays, another does not.
        shard: whether each of several processes keeps only a slice of weights, optimiser and average: ``always``,
            ``never``, or ``auto``: on GPUs, for more than 400 million parameters (8 GB of state).
        until_converged: stop when the held-out loss no longer improves measurably (:mod:`.convergence`); ``images`` is
            then the longest that this may take.
        held_out: at most so many items, and at most a tenth, are not trained on and measured instead; 0 for none.
        log_every, preview_every, checkpoint_every, evaluate_every: in updates; 0 for never (there is always a
            checkpoint at the end).
        quality_every: in updates; the quality of samples is measured (:mod:`undiffuse.evaluation.quality`) and the
            averaged weights with the best are kept in ``best_quality/``. 0 for never.
        quality_samples: how many, at most half of the data.
        keep: how many of the newest checkpoints are kept.
        milestone_every: in updates; these checkpoints are never removed. 0 for none.
        previews: samples in a preview picture.
        nonfinite: what to do when the loss or a gradient is not finite. ``stop``, or ``skip``: leave that update out.
        skip_in_row, skip_share: a run that skips stops all the same at more than ``skip_in_row`` in a row, or more than
            ``skip_in_row`` and a share ``skip_share`` of its updates so far in all.
    """

    images: int = 1_000_000
    batch_size: int = 128
    accumulation: int = 1
    precision: Precision = "auto"
    compile: Compile = "auto"
    shard: Shard = "auto"
    until_converged: bool = False
    held_out: int = 1000
    log_every: int = 20
    preview_every: int = 1000
    checkpoint_every: int = 1000
    evaluate_every: int = 500
    quality_every: int = 0
    quality_samples: int = 500
    keep: int = 2
    milestone_every: int = 0
    previews: int = 64
    nonfinite: Literal["stop", "skip"] = "stop"
    skip_in_row: int = 3
    skip_share: float = 0.01

    def __post_init__(self) -> None:
        check(not 0 <= self.skip_share <= 1, f"skip_share={self.skip_share} must be in [0, 1]")
        for name in ("images", "batch_size", "accumulation", "log_every", "keep", "previews", "skip_in_row"):
            check(getattr(self, name) < 1, f"{name}={getattr(self, name)} must be at least 1")
        for name in (
            "preview_every",
            "checkpoint_every",
            "evaluate_every",
            "milestone_every",
            "held_out",
            "quality_every",
        ):
            check(getattr(self, name) < 0, f"{name}={getattr(self, name)} must be at least 0")
        check(self.quality_samples < 2, f"quality_samples={self.quality_samples} must be at least 2")
        check(self.batch_size > 1_000_000, f"batch_size={self.batch_size} must be at most 1,000,000")
        check(
            self.accumulation > self.batch_size,
            f"a batch of {self.batch_size} cannot be computed in {self.accumulation} parts",
        )


@dataclass(frozen=True)
class Compression:
    """What a codec is to be, and what its loss weighs (:mod:`.autoencoding`).

    Attributes:
        factor: positions of the data to one of the latents along each axis, a power of two.
        channels: of the latents.
        codebook: vectors that the decoder sees; 0: continuous latents.
        distance: of the data and what is made of them: mean of the absolute error, or of its square.
        kl: weight of the divergence of the posterior from the standard normal one, a number of data.
        commitment: how much the latents keep to their vectors, beside the vectors to the latents.
        revive: updates after which a vector that nothing was near to moves to where it is needed; 0: never.
        perceptual: weight of the distance of features; features: ``classifier``, one trained on the labels, or the path
            of LPIPS's weights (VGG) as a safetensors file.
        adversarial: weight of a discriminator of patches, which begins after the share ``adversarial_from`` of the run.
    """

    factor: int = 4
    channels: int = 4
    codebook: int = 0
    distance: Literal["l1", "l2"] = "l1"
    kl: float = 1e-6
    commitment: float = 0.25
    revive: int = 50
    perceptual: float = 0.0
    features: str = "classifier"
    adversarial: float = 0.0
    adversarial_from: float = 0.5

    def __post_init__(self) -> None:
        check(self.factor < 1 or self.factor & (self.factor - 1) > 0, f"factor={self.factor} must be a power of two")
        for name in ("kl", "commitment", "revive", "perceptual", "adversarial"):
            check(getattr(self, name) < 0, f"{name}={getattr(self, name)} must be at least 0")
        check(not 0 <= self.adversarial_from <= 1, f"adversarial_from={self.adversarial_from} must be in [0, 1]")

    def config(self, model: Model, spec: DataSpec) -> dict[str, Any]:
        """The configuration of the codec for data of this spec."""
        from ..networks.autoencoder import autoencoder_for

        common = autoencoder_for(spec.shape, model.size, self.factor, self.channels, self.codebook)
        for option in model.network:
            if option not in common:
                raise unknown("option of the autoencoder", option, common)
        return {**common, **model.network}


@dataclass(frozen=True)
class Averaging:
    """The exponential moving average of the weights, which is what is sampled from.

    Attributes:
        half_life: images after which a weight's influence on the average has halved.
        ramp: keeps the half-life below this share of the images seen so far, so that the random first weights are
            forgotten in a run of any length (EDM, Karras et al. 2022, table 1 of the code). None: no warm-up.
    """

    half_life: int = 500_000
    ramp: float | None = 0.05

    def __post_init__(self) -> None:
        check(self.half_life < 1, f"half_life={self.half_life} images must be at least 1")
        check(self.ramp is not None and self.ramp <= 0, f"ramp={self.ramp} must be positive, or none")

    def decay(self, images: int, batch_size: int) -> float:
        """The factor on the old average in the update after which ``images`` have been seen."""
        half_life = self.half_life if self.ramp is None else min(self.half_life, self.ramp * images)
        return 0.5 ** (batch_size / half_life)

    def first_weights(self, images: int, batch_size: int) -> float:
        """The share of the random first weights in the average after ``images``; 0 once it is below exp(-5)."""
        left = 0.0  # minus its logarithm
        for update in range(1, math.ceil(images / batch_size) + 1):
            left -= math.log(max(self.decay(update * batch_size, batch_size), 1e-300))
            if left >= 5:
                return 0.0
        return math.exp(-left)

    def check_horizon(self, images: int, batch_size: int) -> None:
        """Warn if the random first weights are still a part of the average after ``images`` (trap E4)."""
        left = self.first_weights(images, batch_size)
        if left <= math.exp(-5):
            return
        warnings.warn(
            f"the EMA's half-life of {self.half_life:,} images is too long for a run of {images:,}: "
            f"{left:.0%} of what is sampled from will still be the random first weights; set ema.ramp=0.05 "
            f"or ema.half_life={max(1, images // 20)}",
            UndiffuseWarning,
            stacklevel=3,
        )


@dataclass(frozen=True)
class Recipe:
    """One full configuration of a run; made by a function ``(spec, count, size) -> Recipe`` of :mod:`.recipes`.

    With ``codec`` a codec is learned and not a denoiser: of ``model`` then only ``size`` and ``network`` count, and
    ``objective`` and ``sampling`` not at all.
    """

    name: str
    model: Model = Model()
    objective: Objective = Objective()
    optimiser: Optimiser = Optimiser()
    training: Training = Training()
    augment: Augment = Augment()
    ema: Averaging = Averaging()
    sampling: Sampling = Sampling()
    codec: Compression | None = None

    def check(self, spec: DataSpec) -> None:
        """Raise for what the parts refuse only together: prediction with schedule, grid and steps with schedule,
        convergence with a learning rate that never falls."""
        if self.codec is None:
            self.model.prediction.check(self.model.schedule)
            self.sampling.grid.times(self.model.schedule, self.sampling.steps)
        else:
            check(self.augment.geometric > 0, "augment.geometric is told to a denoiser; a codec takes no condition")
            check(self.training.quality_every > 0, "training.quality_every is of samples; a codec makes none")
            check(self.training.shard == "always", "training.shard=always: a codec is trained whole; say never")
            check(self.training.compile == "always", "training.compile=always: a codec is not compiled; say never")
        modules = self.modules(spec)
        if isinstance(modules, nn.ModuleDict):  # of a denoiser
            self.sampling.check_reuse(self.config(spec).network, modules["network"])
        check(
            self.training.until_converged and self.optimiser.decay == "constant",
            "training.until_converged needs a learning rate that falls at the end: set optimiser.decay=linear",
        )
        self.augment.check(spec)
        if self.augment.flip and (said := advice(spec, self.augment)):
            warnings.warn(said, UndiffuseWarning, stacklevel=3)

    def config(self, spec: DataSpec) -> ModelConfig:
        """All that builds the denoiser for data of this spec."""
        return self.model.config(spec, LABELS if self.augment.geometric else 0)

    def modules(self, spec: DataSpec) -> nn.Module:
        """What is trained, for data of this spec, on the device "meta": its shapes alone."""
        with torch.device("meta"):
            if self.codec is None:
                return self.config(spec).modules()
            codec = build_codec("autoencoder", self.codec.config(self.model, spec))
            codec.latent_shape(spec.shape)
            return codec

    def cost(self, spec: DataSpec) -> str:
        """Parameters and FLOPs: ``0.25 M parameters, 0.012 GFLOP per forward pass``."""
        if self.codec is not None:
            return str(codec_cost(self.modules(spec), spec.shape))
        config = self.config(spec)
        with torch.device("meta"):
            return str(describe(build(config.network, config.network_config), spec.shape))


@dataclass(frozen=True)
class Plan:
    """How long the run is, once that is known.

    Attributes:
        images: the run's length; None while a run with a time budget still measures its speed.
        start: images seen when the length became known: the learning rate decays from there.
    """

    images: int | None
    start: int = 0

    def progress(self, images: int) -> float:
        """0 before ``start``, 1 at the end."""
        if self.images is None:
            return 0.0
        return min(1.0, max(0.0, (images - self.start) / max(1, self.images - self.start)))


def stored_recipe(identity: Mapping[str, Any], where: str) -> Recipe:
    """The recipe in a checkpoint's identity. One of an earlier version lacks the settings that are new: they have their
    defaults, but nothing was held out, and nothing compiled. ``KeyError``, ``TypeError`` where it is none."""
    recipe = identity["recipe"]
    training = {"held_out": 0, "compile": "never", **recipe["training"]}
    return from_json(Recipe, {**recipe, "training": training}, where, REGISTRIES)


def share(count: int, part: int, parts: int) -> slice:
    """The ``part``-th of ``parts`` nearly equal slices of ``count`` items: of a global batch by device, and of a
    device's batch by accumulation."""
    return slice(part * count // parts, (part + 1) * count // parts)


def kind_of(part: object) -> str:
    """How a schedule, a prediction, times, ... is called in its registry: ``flow``, ``stratified``."""
    for base, registry in REGISTRIES.items():
        if isinstance(part, base):
            kinds = [name for name, each in registry.items() if type(each) is type(part)]
            return next((name for name in kinds if registry[name] == part), kinds[0] if kinds else type(part).__name__)
    return type(part).__name__


def with_settings(recipe: Recipe, settings: Sequence[str], where: str = "--set") -> Recipe:
    """The recipe with every ``path=value`` (:func:`.override`). ``model.size`` takes the place of the network that the
    recipe states, of which it would change nothing otherwise; what the settings say of the network holds."""
    if any(setting.partition("=")[0].strip() == "model.size" for setting in settings):
        recipe = replace(recipe, model=replace(recipe.model, network={}))
    return override(recipe, settings, REGISTRIES, where)


def with_length(recipe: Recipe, *, steps: int | None, images: int | None, batch_size: int | None) -> Recipe:
    """The recipe for a run of so many updates or images, in batches of another size; None keeps the recipe's.

    A warm-up of more than a tenth of a run that was given a length is shortened to that.
    """
    if batch_size is not None:
        recipe = replace(recipe, training=replace(recipe.training, batch_size=batch_size))
    if steps is not None:
        check(steps < 1, f"steps={steps} must be at least 1")
        images = steps * recipe.training.batch_size
    if images is None:
        return recipe
    warmup = min(recipe.optimiser.warmup, images // 10)
    return replace(
        recipe,
        training=replace(recipe.training, images=images),
        optimiser=replace(recipe.optimiser, warmup=warmup),
    )


def with_convergence(recipe: Recipe, *, given_length: bool) -> Recipe:
    """The recipe for a run that stops when it has converged: ten times as long at most, unless a length was given, and
    with a learning rate that falls at its end."""
    images = recipe.training.images * (1 if given_length else 10)
    decay = "linear" if recipe.optimiser.decay == "constant" else recipe.optimiser.decay
    return replace(
        recipe,
        training=replace(recipe.training, until_converged=True, images=images),
        optimiser=replace(recipe.optimiser, decay=decay),
    )
