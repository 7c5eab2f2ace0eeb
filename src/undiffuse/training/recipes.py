"""Recipes: functions ``(spec, count, size) -> Recipe`` of the data's spec, how many items there are, and the size dial.

``default`` chooses by the kind of data. ``tiny`` exists for every kind and takes seconds: for tests and first looks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from ..asking import Sampling
from ..data.spec import DataSpec
from ..errors import choose
from ..grids import LogSNR, ShiftedGrid, Uniform
from ..objectives import LogitNormalTimes, Stratified, UniformTimes
from ..predictions import EDMOutput
from ..solvers import DPMpp2M, Heun
from .recipe import Averaging, Compression, Model, Objective, Optimiser, Recipe, Training

Make = Callable[[DataSpec, int, str | None], Recipe]


def default(spec: DataSpec, count: int, size: str | None = None) -> Recipe:
    """``points`` for points, ``digits`` for tiny grey images, ``mnist`` for small grey ones, ``cifar`` for small
    ones in colour, else ``images``."""
    if spec.kind == "points":
        return points(spec, count, size)
    if spec.channels == 1 and max(spec.shape[1:]) <= 12:
        return digits(spec, count, size)
    if spec.channels == 1 and max(spec.shape[1:]) <= 32:
        return mnist(spec, count, size)
    if spec.kind == "image" and spec.channels == 3 and max(spec.shape[1:]) <= 32:
        return cifar(spec, count, size)
    return images(spec, count, size)


def digits(spec: DataSpec, count: int, size: str | None = None) -> Recipe:
    """Very small pictures, such as scikit-learn's 8x8 digits: about a minute on two cores.

    Unless a size is asked for, a quarter of ``small``: 0.28 M parameters, 0.013 GFLOP per forward pass at 8x8.
    """
    quarter = {"widths": [32, 64], "blocks": [2, 1], "attention": [1]}
    return Recipe(
        name="digits",
        model=Model(size=size or "small", network={} if size else quarter),
        objective=Objective(times=Stratified(LogitNormalTimes(0.0, 1.0))),
        optimiser=Optimiser(lr=2e-3, warmup=6_400, decay="cosine"),
        training=Training(
            images=128_000,
            batch_size=128,
            log_every=20,
            preview_every=250,
            checkpoint_every=250,
            previews=64,
            evaluate_every=100,
        ),
        ema=Averaging(half_life=25_000),
        sampling=Sampling(solver=DPMpp2M(), grid=Uniform(), steps=20, guidance_scale=1.25),
    )


def mnist(spec: DataSpec, count: int, size: str | None = None) -> Recipe:
    """Small grey pictures, such as MNIST's 28x28: the best quality a CPU-second that was found (docs/experiments.md).

    About 20 minutes on two cores; the learning rate is at 0 when ``--minutes`` or ``--images`` are over, so a shorter
    run is a good one too. Unless a size is asked for, 0.59 M parameters, 0.071 GFLOP per forward pass at 28x28.
    """
    lean = {"widths": [48, 96], "blocks": [1, 2], "attention": [], "embedding": 128, "fold": 2}
    dial = size or spec.vocabulary  # words are looked at where there is attention
    return Recipe(
        name="mnist",
        model=Model(size=size or "small", network={} if dial else lean),
        objective=Objective(times=Stratified(LogitNormalTimes(0.0, 1.0))),
        optimiser=Optimiser(kind="muon", lr=5e-3, warmup=3_200, decay="linear"),
        training=Training(
            images=800_000,
            batch_size=64,
            log_every=20,
            preview_every=1000,
            checkpoint_every=1000,
            previews=64,
            evaluate_every=500,
        ),
        ema=Averaging(half_life=50_000, ramp=0.05),
        sampling=Sampling(
            solver=DPMpp2M(eta=1.0),
            grid=ShiftedGrid(shift=2.5),  # where there is much noise it is decided what a picture shows
            steps=10,
        ),
    )


def cifar(spec: DataSpec, count: int, size: str | None = None) -> Recipe:
    """Small pictures in colour, such as CIFAR-10's 32x32: learned as ``mnist`` is, and sampled guided and without fresh
    noise, for which ten steps are too few in colour (docs/experiments.md)."""
    sampling = replace(images(spec, count, size).sampling, grid=ShiftedGrid(shift=2.0))
    return replace(mnist(spec, count, size), name="cifar", sampling=sampling)


def points(spec: DataSpec, count: int, size: str | None = None) -> Recipe:
    """Points without spatial axes, such as the 2-D sets: about a minute on two cores."""
    return Recipe(
        name="points",
        model=Model(size=size or "small", condition_width=32),
        objective=Objective(times=Stratified(UniformTimes())),
        optimiser=Optimiser(lr=2e-3, warmup=25_600, decay="cosine"),
        training=Training(
            images=1_000_000, batch_size=256, log_every=100, preview_every=1000, checkpoint_every=1000, previews=1000
        ),
        ema=Averaging(half_life=50_000),
        sampling=Sampling(solver=Heun(), grid=Uniform(), steps=20),
    )


def images(spec: DataSpec, count: int, size: str | None = None) -> Recipe:
    """Pictures of any size, and arrays: hours on a GPU. About 200 epochs, but 2 to 20 million images."""
    return Recipe(
        name="images",
        model=Model(size=size or "base"),
        objective=Objective(times=Stratified(LogitNormalTimes(0.0, 1.0))),
        optimiser=Optimiser(lr=3e-4, warmup=100_000, decay="constant"),
        training=Training(
            images=min(20_000_000, max(2_000_000, 200 * count)),
            batch_size=64,
            log_every=20,
            preview_every=1000,
            checkpoint_every=1000,
            previews=64,
        ),
        ema=Averaging(half_life=500_000),
        sampling=Sampling(solver=DPMpp2M(), grid=LogSNR(), steps=30, guidance_scale=1.5 if spec.classes else 1.0),
    )


def text(spec: DataSpec, count: int, size: str | None = None) -> Recipe:
    """Small colour pictures with captions, such as ``shapes``: about 20 minutes on two cores.

    Unless a size is asked for, 2.0 M parameters at a quarter of the pixels. What is asked for is decided where there is
    much noise, so more of those levels are drawn; and a network that is asked for places is told where it is.
    """
    folded = {
        "fold": 2,
        "coordinates": True,
        "widths": [64, 128],
        "blocks": [2, 3],
        "attention": [1],
        "embedding": 192,
        "head_width": 32,
    }
    return Recipe(
        name="text",
        model=Model(
            size=size or "small",
            network={} if size else folded,
            prediction=EDMOutput(),
            condition_width=128,
            text_length=16,
            token_width=96,
        ),
        objective=Objective(times=Stratified(LogitNormalTimes(0.4, 1.2))),
        optimiser=Optimiser(kind="muon", lr=3e-3, warmup=6_400, decay="linear"),
        training=Training(
            images=200_000,
            batch_size=32,
            log_every=50,
            preview_every=2000,
            checkpoint_every=500,
            previews=32,
            evaluate_every=1000,
        ),
        ema=Averaging(half_life=10_000),
        sampling=Sampling(solver=DPMpp2M(eta=1.0), grid=Uniform(), steps=20, guidance_scale=3.0),
    )


def autoencoder(spec: DataSpec, count: int, size: str | None = None) -> Recipe:
    """A codec for data with spatial axes: 8 times coarser from sides of 128 on, 4 times from 32 on, else twice; less
    where the sides do not divide by that.

    Latents have 4 channels; ``codec.factor``, ``codec.channels`` and ``codec.codebook`` change what it is.
    """
    side = max(spec.shape[1:], default=1)
    wanted = 8 if side >= 128 else 4 if side >= 32 else 2
    factor = math.gcd(wanted, *spec.shape[1:])
    return Recipe(
        name="autoencoder",
        model=Model(size=size or "small"),
        optimiser=Optimiser(kind="muon", lr=5e-3, warmup=3_200, decay="cosine"),
        training=Training(
            images=min(5_000_000, max(200_000, 20 * count)),
            batch_size=32,
            log_every=20,
            preview_every=500,
            checkpoint_every=1000,
            previews=64,
            evaluate_every=250,
            held_out=500,
        ),
        ema=Averaging(half_life=10_000),
        codec=Compression(factor=factor if factor > 1 else wanted),  # what does not divide at all is refused
    )


def tiny(spec: DataSpec, count: int, size: str | None = None) -> Recipe:
    """Twenty updates of the smallest network, for data of any kind: a test that everything works, not a good model."""
    return Recipe(
        name="tiny",
        model=Model(size=size or "tiny", condition_width=8),
        objective=Objective(),
        optimiser=Optimiser(lr=2e-3, warmup=32, decay="cosine"),
        training=Training(
            images=320,
            batch_size=16,
            log_every=5,
            preview_every=10,
            checkpoint_every=10,
            previews=16,
            evaluate_every=10,
        ),
        ema=Averaging(half_life=1000),
        sampling=Sampling(solver=DPMpp2M(), grid=Uniform(), steps=5),
    )


RECIPES: dict[str, Make] = {
    "default": default,
    "digits": digits,
    "mnist": mnist,
    "cifar": cifar,
    "points": points,
    "images": images,
    "text": text,
    "autoencoder": autoencoder,
    "tiny": tiny,
}
"""Every recipe by name."""


def make_recipe(name: str, spec: DataSpec, count: int, size: str | None = None) -> Recipe:
    """``RECIPES[name](spec, count, size)``, or an error that suggests the nearest name."""
    return choose("recipe", name, RECIPES)(spec, count, size)
