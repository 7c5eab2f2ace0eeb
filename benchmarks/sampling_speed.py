"""Sampling speed: the latency of one 28x28 image with 10 network calls on one core, and images a second at batch 64.

    python benchmarks/sampling_speed.py [--calls 10] [--rounds 15] [--out sampling_speed.json]
    python benchmarks/sampling_speed.py --ways plain,bf16,compiled,bf16-compiled --model runs/mnist
    python benchmarks/sampling_speed.py --ways plain,bf16,compiled,bf16-compiled --device cuda

Ours is the `mnist` recipe's network with its solver, through `Pipeline.draw`, with conditions, noise and checks. Beside
it stands the reference recipe, diffusers' UNet2DModel of 0.99 M parameters with DPM-Solver++, and each network alone,
called as often, so that what the loop around it costs can be seen. All alternate in one process, one thread; the
figures are medians of CPU time, which on a core of its own is the time that passes, and on a GPU of the clock. *First*
is how long the first calls took by the clock, compiling included. The weights are random, which changes no time, unless
--model names a trained one; then it is also said how far each way moves the samples, the root mean square of the
difference as a share of their deviation.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _reference import reference_network

from undiffuse import Pipeline
from undiffuse.data.spec import DataSpec
from undiffuse.training import make_recipe

SHAPE = (1, 28, 28)
COUNTS = (1, 64)
WAYS = ("plain", "bf16", "compiled", "bf16-compiled")


@dataclass(frozen=True)
class Contestant:
    """``sample(count)`` and ``network(count)``, as many calls of it."""

    name: str
    sample: Callable[[int], Any]
    network: Callable[[int], Any]


def untrained(recipe_name: str) -> Pipeline:
    """The network of a recipe with random weights, none of them 0."""
    spec = replace(DataSpec("image", SHAPE, "uint8", 0, 255, (127.5,), (127.5,), "HW"), classes=tuple("0123456789"))
    recipe = make_recipe(recipe_name, spec, 60_000)
    print(f"undiffuse: {recipe.cost(spec)}")
    config = recipe.config(spec)
    return Pipeline(config.build().eval(), config, spec, recipe.sampling, {})


def ours(way: str, folder: Path, calls: int, device: torch.device) -> Contestant:
    """Ours, computed in one of :data:`WAYS`."""
    pipeline = Pipeline.load(folder, device, dtype=torch.bfloat16 if "bf16" in way else None)
    pipeline = pipeline.compiled() if "compiled" in way else pipeline
    sampling = replace(pipeline.sampling, steps=calls, guidance_scale=1.0)
    width = int(pipeline.config.network_config.get("condition_width", 0))

    def sample(count: int) -> Any:
        return pipeline.draw(count, classes=[3], sampling=sampling)

    @torch.no_grad()
    def network(count: int) -> None:
        x, label = torch.zeros(count, *SHAPE, device=device), torch.full((count,), 500.0, device=device)
        vector = torch.zeros(count, width, device=device) if width else None
        for _ in range(calls):
            pipeline.asked.network(x.to(pipeline.dtype), label, vector=vector)

    return Contestant("undiffuse" if way == "plain" else way, sample, network)


def theirs(way: str, calls: int, device: torch.device) -> Contestant:
    """The same of the reference recipe."""
    from diffusers import DPMSolverMultistepScheduler

    network = reference_network().eval().to(device)
    network = network.bfloat16() if "bf16" in way else network
    dtype = next(network.parameters()).dtype
    if "compiled" in way:
        network = torch.compile(network, mode="reduce-overhead" if device.type == "cuda" else None)

    @torch.no_grad()
    def sample(count: int) -> Any:
        solver: Any = DPMSolverMultistepScheduler(beta_schedule="linear", prediction_type="epsilon")
        solver.set_timesteps(calls)
        x = torch.randn(count, *SHAPE).to(device, dtype)
        for step in solver.timesteps:
            x = solver.step(network(x, step).sample.clone(), step, x).prev_sample
        return x.cpu()

    @torch.no_grad()
    def alone(count: int) -> None:
        x, label = torch.zeros(count, *SHAPE, device=device, dtype=dtype), torch.full((count,), 500, device=device)
        for _ in range(calls):
            network(x, label)

    return Contestant("reference" if way == "plain" else f"ref {way}", sample, alone)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--recipe", default="mnist")
    parser.add_argument(
        "--model", type=Path, help="a trained model of 28x28 in place of the recipe's with random weights"
    )
    parser.add_argument("--ways", default="plain", help=f"of computing, of {','.join(WAYS)}; the first is the measure")
    parser.add_argument("--beside", default="plain", help="the same for the reference; nothing leaves it out")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="images at a time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(options.device)
    now = time.perf_counter if device.type == "cuda" else time.process_time

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model or untrained(options.recipe).save(temporary)
        contestants = [ours(way, folder, options.calls, device) for way in options.ways.split(",")]
    contestants += [theirs(way, options.calls, device) for way in filter(None, options.beside.split(","))]

    def timed(call: Callable[[int], Any], count: int) -> tuple[float, Any]:
        begun = now()
        made = call(count)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return now() - begun, made

    work = [(each, what) for each in contestants for what in ("sampling", "network alone")]
    call_of = {"sampling": lambda each: each.sample, "network alone": lambda each: each.network}
    times: dict[tuple[str, str, int], list[float]] = {}
    first: dict[str, float] = {}
    peak: dict[tuple[str, int], float] = {}
    made: dict[str, torch.Tensor] = {}
    for turn in range(options.rounds + 2):
        for count in options.counts:
            for each, what in work:
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                begun = time.perf_counter()
                seconds, x = timed(call_of[what](each), count)
                if turn >= 2:
                    times.setdefault((each.name, what, count), []).append(seconds)
                elif turn == 0 and what == "sampling":
                    first[each.name], made[each.name] = first.get(each.name, 0) + time.perf_counter() - begun, x
                if device.type == "cuda" and what == "sampling":
                    peak[each.name, count] = torch.cuda.max_memory_allocated() / 1e6

    place = torch.cuda.get_device_name() if device.type == "cuda" else "one thread"
    load = os.getloadavg()[0]
    print(f"{place}, load {load:.1f}; {options.calls} calls, {options.rounds} rounds\n")
    heads = "".join(f"{f'{count} at a time, ms':>19}{'share':>7}" for count in options.counts)
    print(f"{'':18}{'':13}{heads}{'images/s':>10}{'first, s':>10}{'moved':>8}")
    rows: list[dict[str, Any]] = []
    for each, what in work:
        row: dict[str, Any] = {"name": each.name, "what": what}
        line = f"{each.name:18}{what:13}"
        for count in options.counts:
            taken, measure = times[each.name, what, count], times[contestants[0].name, what, count]
            row[f"ms of {count}"] = 1e3 * median(taken)
            row[f"share of {count}"] = median(a / b for a, b in zip(taken, measure, strict=True))
            line += f"{row[f'ms of {count}']:19.1f}{row[f'share of {count}']:7.0%}"
            if (each.name, count) in peak and what == "sampling":
                row[f"peak MB of {count}"] = peak[each.name, count]
        row["images_per_s"] = max(1e3 * count / row[f"ms of {count}"] for count in options.counts)
        line += f"{row['images_per_s']:10.1f}"
        if what == "sampling":
            row["first_s"] = first[each.name]
            line += f"{row['first_s']:10.1f}"
            measure = made[contestants[0].name]
            if options.model and made[each.name].shape == measure.shape and "ref" not in each.name:
                row["moved"] = float((made[each.name] - measure).square().mean().sqrt() / measure.std())
                line += f"{row['moved']:8.1e}" if row["moved"] else f"{'0':>8}"
        print(line)
        rows.append(row)
    for (name, count), megabytes in peak.items():
        print(f"{name}, {count} at a time: {megabytes:.0f} MB at most")
    if options.out:
        options.out.write_text(json.dumps({"load": load, "device": place, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
