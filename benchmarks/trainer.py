"""What the trainer costs beside the network: updates of the ``digits`` data by the trainer, and by five lines of torch.

    python benchmarks/trainer.py [--rounds N] [--out trainer.json]

*Bare* is the network on tensors that are there already: forward, mean square, backward, fused AdamW. *Trainer* is the
whole update: reading and converting the batch, drawing, mixing, dropping conditions, clipping, checking that all is
finite, averaging. They alternate in one process; the table shows medians, and the ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from undiffuse import open_dataset
from undiffuse.training import Trainer, make_recipe


def measure(size: str, batch: int, rounds: int) -> dict[str, Any]:
    dataset = open_dataset("digits")
    recipe = make_recipe("digits", dataset.spec, len(dataset), size)
    recipe = replace(recipe, training=replace(recipe.training, batch_size=batch, images=10**9))
    trainer = Trainer(dataset, recipe)
    network = Trainer(dataset, recipe).denoiser.network
    adam = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    source = torch.Generator().manual_seed(0)
    x, target = (torch.randn(batch, *dataset.spec.shape, generator=source) for _ in range(2))
    label, vector = torch.linspace(0, 1000, batch), torch.randn(batch, recipe.model.condition_width, generator=source)

    def bare() -> None:
        (network(x, label, vector) - target).square().mean().backward()
        adam.step()
        adam.zero_grad(set_to_none=True)

    def timed(function: Any) -> float:
        begun = time.perf_counter()
        function()
        return time.perf_counter() - begun

    for _ in range(5):
        bare()
        trainer.update()
    pairs = [(timed(bare), timed(trainer.update)) for _ in range(rounds)]
    ours, plain = median(pair[1] for pair in pairs), median(pair[0] for pair in pairs)
    return {
        "size": size,
        "batch": batch,
        "bare_ms": round(1e3 * plain, 2),
        "trainer_ms": round(1e3 * ours, 2),
        "images_per_s": round(batch / ours),
        "overhead": round(median(pair[1] / pair[0] for pair in pairs) - 1, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    rows = [measure(size, batch, options.rounds) for size, batch in (("small", 128), ("small", 32), ("tiny", 128))]
    print(f"{torch.get_num_threads()} threads, load average {os.getloadavg()[0]:.2f}")
    for cells in [list(rows[0]), *(row.values() for row in rows)]:
        print("  ".join(f"{cell:>12}" for cell in cells))
    if options.out:
        options.out.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
