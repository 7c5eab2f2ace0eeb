"""Sampling speed: the latency of one 28x28 image with 10 network calls on one core, and images a second at batch 64.

    python benchmarks/sampling_speed.py [--calls 10] [--rounds 15] [--out sampling_speed.json]

Ours is the `mnist` recipe's network with its solver, through `Pipeline.draw`, with conditions, noise and checks. Beside
it stands the reference recipe, diffusers' UNet2DModel of 0.99 M parameters with DPM-Solver++, and each network alone,
called as often, so that what the loop around it costs can be seen. All alternate in one process, one thread; the
figures are medians of CPU time, which on a core of its own is the time that passes. The weights are random, which
changes no time.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from undiffuse import Pipeline
from undiffuse.data.spec import DataSpec
from undiffuse.training import make_recipe

SHAPE = (1, 28, 28)


def ours(calls: int, recipe_name: str) -> tuple[Callable[[int], object], Callable[[int], object], str]:
    """``sample(count)``, ``network(count)`` and a description."""
    spec = replace(DataSpec("image", SHAPE, "uint8", 0, 255, (127.5,), (127.5,), "HW"), classes=tuple("0123456789"))
    recipe = make_recipe(recipe_name, spec, 60_000)
    config = recipe.config(spec)
    denoiser = config.build().eval()
    pipeline = Pipeline(denoiser, config, spec, recipe.sampling, {})
    sampling = replace(recipe.sampling, steps=calls, guidance_scale=1.0)

    def sample(count: int) -> object:
        return pipeline.draw(count, classes=[3], sampling=sampling)

    @torch.inference_mode()
    def network(count: int) -> None:
        x, label = torch.zeros(count, *SHAPE), torch.full((count,), 500.0)
        vector = torch.zeros(count, recipe.model.condition_width)
        for _ in range(calls):
            denoiser.network(x, label, vector)

    return sample, network, recipe.cost(spec)


def theirs(calls: int) -> tuple[Callable[[int], object], Callable[[int], object], str]:
    """The same of the reference recipe."""
    from diffusers import DPMSolverMultistepScheduler
    from diffusers.models.unets.unet_2d import UNet2DModel

    network: Any = UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32, 64),
        layers_per_block=2,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    ).eval()

    @torch.inference_mode()
    def sample(count: int) -> object:
        solver: Any = DPMSolverMultistepScheduler(beta_schedule="linear", prediction_type="epsilon")
        solver.set_timesteps(calls)
        x = torch.randn(count, *SHAPE)
        for step in solver.timesteps:
            x = solver.step(network(x, step).sample, step, x).prev_sample
        return x

    @torch.inference_mode()
    def alone(count: int) -> None:
        x, label = torch.zeros(count, *SHAPE), torch.full((count,), 500)
        for _ in range(calls):
            network(x, label)

    return sample, alone, f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--recipe", default="mnist")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    contestants = {"undiffuse": ours(options.calls, options.recipe), "reference": theirs(options.calls)}
    work = {
        (name, what): call
        for name, (sample, network, _) in contestants.items()
        for what, call in (("sampling", sample), ("network alone", network))
    }
    times: dict[tuple[str, str, int], list[float]] = {}
    for turn in range(options.rounds + 2):
        for count in (1, 64):
            for (name, what), call in work.items():
                begun = time.process_time()
                call(count)
                if turn >= 2:
                    times.setdefault((name, what, count), []).append(time.process_time() - begun)
    print(f"one thread, load {os.getloadavg()[0]:.1f}; {options.calls} calls, {options.rounds} rounds")
    for name, (_, _, cost) in contestants.items():
        print(f"{name}: {cost}")
    print(f"\n{'':11}{'':15}{'one image, ms':>15}{'64 images, ms':>15}{'images/s':>10}")
    rows = []
    for name, what in work:
        one, many = median(times[name, what, 1]), median(times[name, what, 64])
        print(f"{name:11}{what:15}{1e3 * one:15.1f}{1e3 * many:15.1f}{64 / many:10.1f}")
        rows.append(
            {"name": name, "what": what, "one_ms": 1e3 * one, "batch_ms": 1e3 * many, "images_per_s": 64 / many}
        )
    if options.out:
        options.out.write_text(json.dumps({"load": os.getloadavg()[0], "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
