"""Time of a forward pass, and of forward and backward, of each family of networks, and the arithmetic rate that it is.

    python benchmarks/networks.py [--size small] [--batch 16] [--rounds N] [--out networks.json]

The families have about the same FLOPs at the same size of the dial, not exactly: compare the rates (GFLOP/s, a backward
pass counted as two forward passes). They alternate in one process; the table shows medians.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median

import torch

from undiffuse.networks import NETWORKS, build, describe, sized


def measure(shape: tuple[int, ...], size: str, batch: int, rounds: int) -> list[dict[str, str | float]]:
    torch.manual_seed(0)
    families = [name for name in NETWORKS if name != "mlp"]
    networks = {name: build(*sized(shape, size, family=name)) for name in families}
    x, label = torch.randn(batch, *shape), torch.linspace(0, 1000, batch)

    def forward(name: str) -> float:
        begun = time.perf_counter()
        with torch.no_grad():
            networks[name](x, label)
        return time.perf_counter() - begun

    def both(name: str) -> float:
        begun = time.perf_counter()
        networks[name](x, label).square().mean().backward()
        networks[name].zero_grad(set_to_none=True)
        return time.perf_counter() - begun

    times = {name: ([], []) for name in families}
    for turn in range(rounds + 1):
        for name in families:
            pair = forward(name), both(name)
            if turn:  # the first warms up
                for kept, seconds in zip(times[name], pair, strict=True):
                    kept.append(seconds)
    rows = []
    for name in families:
        cost, (ahead, whole) = describe(networks[name], shape), map(median, times[name])
        rows.append({
            "network": name,
            "data": "x".join(map(str, shape)),
            "MFLOP": round(cost.flops / 1e6),
            "forward_ms": round(1e3 * ahead, 1),
            "both_ms": round(1e3 * whole, 1),
            "GFLOP/s": round(batch * cost.flops / ahead / 1e9),
            "both_GFLOP/s": round(3 * batch * cost.flops / whole / 1e9),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", default="small")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    rows = [
        row
        for shape in ((1, 28, 28), (3, 32, 32))
        for row in measure(shape, options.size, options.batch, options.rounds)
    ]
    print(f"{torch.get_num_threads()} threads, load average {os.getloadavg()[0]:.2f}, batch {options.batch}")
    for cells in [list(rows[0]), *(row.values() for row in rows)]:
        print("  ".join(f"{cell:>12}" for cell in cells))
    if options.out:
        options.out.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
