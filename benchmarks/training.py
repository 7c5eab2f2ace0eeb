"""Training throughput of our U-Net against diffusers' UNet2DModel at matched parameters and FLOPs.

Both take 28x28 grey images, have about 0.99 M parameters and need about 0.2 GFLOP for a forward pass of one image. A
step is forward, squared error, backward, AdamW. The two alternate in one process, so that what else the machine does
hits both; the figure to trust is the ratio (the median over pairs of steps). The architectures differ: ours folds 2x2
pixels into channels and is wider, that one works on 28x28 with widths 16, 32, 64; both attend at the lowest level.

    python benchmarks/training.py --out training.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from _reference import reference_network
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from undiffuse.networks import build, describe, sized

SHAPE = (1, 28, 28)
Call = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contestant:
    """A network, how it is called, and the FLOPs of one forward pass of one image."""

    name: str
    network: nn.Module
    call: Call
    flops: int

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())


def ours() -> Contestant:
    """The default size of the dial for this shape."""
    network = build(*sized(SHAPE, "small"))
    return Contestant("undiffuse UNet small", network, network, describe(network, SHAPE).flops)


def theirs() -> Contestant:
    """diffusers' U-Net."""
    try:
        network = reference_network()
    except ImportError:
        sys.exit("this benchmark compares with diffusers: pip install diffusers")
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        reference_network()(torch.zeros(1, *SHAPE), torch.zeros(1))
    return Contestant(
        "diffusers UNet2DModel", network, lambda x, label: network(x, label).sample, counter.get_total_flops()
    )


def step(call: Call, optimiser: torch.optim.Optimizer, batch: tuple[Tensor, Tensor, Tensor], half: bool) -> float:
    """Seconds for one training step."""
    x, label, target = batch
    start = time.perf_counter()
    optimiser.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        y = call(x, label)
    (y.float() - target).square().mean().backward()
    optimiser.step()
    return time.perf_counter() - start


def machine(threads: int) -> dict[str, object]:
    """What the figures depend on."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    load = os.getloadavg()[0]
    return {
        "processor": (names or [platform.processor()])[0],
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(load, 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON to this file")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=11, help="measured steps of each, after two that are not")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    here = machine(options.threads)
    print(f"{here['processor']}, {here['cores']} cores; threads {here['threads']}, load {here['load']}")
    print(f"torch {here['torch']}, python {here['python']}; batch {options.batch_size}, {options.rounds} rounds\n")

    size = options.batch_size
    batch = (torch.randn(size, *SHAPE), 1000 * torch.rand(size), torch.randn(size, *SHAPE))
    pair = (ours(), theirs())
    apart = {key: getattr(pair[0], key) / getattr(pair[1], key) - 1 for key in ("flops", "parameters")}
    if max(map(abs, apart.values())) > 0.05:
        sys.exit(f"not matched within 5 %, so the comparison means nothing: {apart}")
    rows: list[dict[str, object]] = []
    print(f"{'network':22}{'precision':11}{'M par.':>8}{'GFLOP':>8}{'ms/step':>9}{'images/s':>10}{'ratio':>7}")
    for half in (False, True):
        optimisers = [torch.optim.AdamW(contestant.network.parameters(), lr=1e-4) for contestant in pair]
        seconds: tuple[list[float], list[float]] = ([], [])
        for turn in range(options.rounds + 2):
            for contestant, optimiser, times in zip(pair, optimisers, seconds, strict=True):
                taken = step(contestant.call, optimiser, batch, half)
                if turn >= 2:
                    times.append(taken)
        precision = "bf16 mixed" if half else "float32"
        for contestant, times in zip(pair, seconds, strict=True):
            middle = statistics.median(times)
            ratio = statistics.median(other / own for own, other in zip(times, seconds[1], strict=True))
            print(
                f"{contestant.name:22}{precision:11}{contestant.parameters / 1e6:8.3f}{contestant.flops / 1e9:8.4f}"
                f"{1e3 * middle:9.1f}{size / middle:10.1f}{ratio:7.2f}"
            )
            rows.append(
                {
                    "network": contestant.name,
                    "precision": precision,
                    "parameters": contestant.parameters,
                    "flops": contestant.flops,
                    "images_per_second": size / middle,
                    "ratio": ratio,
                    "step_seconds": times,
                }
            )
    print(f"\nours against theirs: FLOPs {apart['flops']:+.1%}, parameters {apart['parameters']:+.1%}")
    if options.out:
        options.out.write_text(json.dumps({"machine": here, "batch_size": size, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
