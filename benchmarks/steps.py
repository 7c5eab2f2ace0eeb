"""Ways to compute an update: what bfloat16, ``torch.compile`` and weights laid out as channels last gain.

    python benchmarks/steps.py [--data digits] [--batch-size 128] [--ways bf16 ...] [--rounds N] [--out steps.json]

Each way trains a trainer of its own, in turn in one process; the share is the median over rounds of its time by that of
the usual way (float32, as it is) in the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from undiffuse import open_dataset
from undiffuse.training import Trainer, make_recipe
from undiffuse.training.recipe import Training


def bf16(training: Training) -> Training:
    return replace(training, precision="bf16")


def compiled(training: Training) -> Training:
    return replace(training, compile="always")


def both(training: Training) -> Training:
    return bf16(compiled(training))


WAYS: dict[str, Callable[[Training], Training]] = {
    "usual": lambda training: training,
    "bf16": bf16,
    "compiled": compiled,
    "bf16 compiled": both,
    "channels last": lambda training: training,
}


def timed(trainer: Trainer) -> float:
    begun = time.perf_counter()
    float(trainer.update().loss)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    dataset = open_dataset(options.data)
    recipe = make_recipe("default", dataset.spec, len(dataset))
    training = replace(
        recipe.training, images=10**9, batch_size=options.batch_size, precision="float32", compile="never"
    )
    trainers, first = {}, {}
    for name in dict.fromkeys(["usual", *options.ways]):
        trainer = Trainer(dataset, replace(recipe, training=WAYS[name](training)), device=options.device)
        if name == "channels last":
            trainer.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        trainers[name], first[name] = trainer, timed(trainer)
        for _ in range(3):
            timed(trainer)
    rounds = [{name: timed(trainer) for name, trainer in trainers.items()} for _ in range(options.rounds)]
    load = os.getloadavg()[0]
    print(f"{options.data}, batch {options.batch_size}, {torch.get_num_threads()} threads, load {load:.1f}")
    print(f"{'way':<15}{'ms':>8}{'share':>8}{'first, s':>10}")
    rows = []
    for name in trainers:
        milliseconds = 1e3 * median(each[name] for each in rounds)
        share = median(each[name] / each["usual"] for each in rounds)
        print(f"{name:<15}{milliseconds:8.1f}{share:8.3f}{first[name]:10.1f}")
        rows.append({"way": name, "ms": milliseconds, "share": share, "first_seconds": first[name]})
    if options.out:
        options.out.write_text(json.dumps({"load": load, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
