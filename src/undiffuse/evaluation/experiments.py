"""Experiments to repeat, ``undiffuse compare --experiment NAME``: questions, and comparisons that answer them at a size
that two CPU cores finish. What came out: docs/experiments.md."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Experiment:
    """What ``undiffuse compare`` is given; the names are its options."""

    question: str
    data: str
    recipe: str
    vary: tuple[str, ...]
    set: tuple[str, ...]
    images: int
    seeds: int
    samples: int


DDPM = ("prediction=eps", "times=stratified", "sampling.guidance_scale=1")
"""The objective of Ho et al. 2020: the noise is predicted, at uniform times, with weight 1."""

EXPERIMENTS: dict[str, Experiment] = {
    "linear-cosine": Experiment(
        "Are MNIST digits better from the cosine schedule (Nichol & Dhariwal 2021) than from the linear one, with 250 "
        "ancestral steps?",
        data="mnist",
        recipe="mnist",
        vary=("schedule=linear,cosine",),
        set=(
            *DDPM,
            "model.network.widths=[48, 96]",
            "model.network.blocks=[1, 2]",
            "model.network.attention=[]",
            "optimiser.kind=muon",
            "optimiser.lr=0.006",
            "optimiser.decay=linear",
            "optimiser.warmup=3200",
            "training.batch_size=64",
            "training.precision=bf16",
            "ema.half_life=3000",
            "sampling.solver=ddpm",
            "sampling.steps=250",
            "sampling.threshold=static",
        ),
        images=32_000,
        seeds=3,
        samples=300,
    ),
    "predictions": Experiment(
        "Should the network say the noise, the velocity, the data or the flow, each with weight 1 on its own error?",
        data="digits",
        recipe="digits",
        vary=("prediction=eps,v,x0,flow",),
        set=("schedule=cosine", "times=stratified", "sampling.guidance_scale=1", "sampling.threshold=static"),
        images=16_000,
        seeds=3,
        samples=800,
    ),
    "min-snr": Experiment(
        "Does the min-SNR weight (gamma 5, Hang et al. 2023) make better digits from the same number of images?",
        data="digits",
        recipe="digits",
        vary=("weight=unit,min_snr",),
        set=(*DDPM, "schedule=cosine", "sampling.threshold=static"),
        images=16_000,
        seeds=3,
        samples=800,
    ),
}
"""Every experiment by name."""
