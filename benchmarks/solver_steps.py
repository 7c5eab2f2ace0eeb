"""What a solver's own arithmetic costs: microseconds a step with a network that costs nothing.

    python benchmarks/solver_steps.py [--out FILE.json] [--rounds N] [--threads 2]

A run of 20 steps on fresh levels, first step and last step included, divided by its steps; the minimum over the
rounds, every method in turn within one process. ``(64,3,32,32)`` measures the passes over memory, ``(1,4,64,64)`` the
Python around them. Noise is drawn beforehand; what a draw costs has its own row, and those of diffusers' ``ddpm`` are
in its figures. Beside it: diffusers' schedulers, driven the same way, and two hand-written torch operations.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from undiffuse.grids import LogSNR
from undiffuse.levels import Estimate, Level
from undiffuse.noise import Streams
from undiffuse.sampling import answer
from undiffuse.schedules import VP
from undiffuse.solvers import SOLVERS, Solver

SHAPES = ((64, 3, 32, 32), (1, 4, 64, 64))
STEPS = 20
# The least known of other libraries at these shapes, microseconds, from issue 2 (another machine).
PEERS = {
    "euler": (128, 39),
    "heun": (388, 101),
    "ddim": (168, 80),
    "ddpm": (1252, 198),
    "dpmpp_2m": (172, 67),
    "unipc_2": (1296, 475),
    "dpmpp_2m_sde": (70469, 6659),
}
DIFFUSERS = {
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc_2": "UniPCMultistepScheduler",
}


def ours(solver: Solver, x: Tensor, said: Estimate) -> Callable[[], float]:
    """Seconds a step of one run; the levels are fresh, as nothing of them is known before a run."""

    def nothing(x: Tensor, level: Level) -> Estimate:
        return said

    def once() -> float:
        levels, memory, y = LogSNR().levels(VP(), STEPS), None, x
        begin = time.perf_counter()
        for here, there in pairwise(levels):
            y, memory, _ = answer(solver.step(y, here, there, memory, lambda x, here, there: said.x0), nothing)
        return (time.perf_counter() - begin) / STEPS

    return once


def theirs(name: str, x: Tensor, said: Estimate) -> Callable[[], float]:
    """The same for a scheduler of diffusers."""
    import diffusers

    scheduler = getattr(diffusers, name)()
    generator = torch.Generator().manual_seed(0)
    takes = {"generator": generator} if name == "DDPMScheduler" else {}

    def once() -> float:
        scheduler.set_timesteps(STEPS)
        y = x
        begin = time.perf_counter()
        for t in scheduler.timesteps:
            y = scheduler.step(said.eps, t, scheduler.scale_model_input(y, t), **takes).prev_sample
        return (time.perf_counter() - begin) / STEPS

    return once


def draw(x: Tensor) -> Callable[[], float]:
    """One draw of noise, a stream a sample."""
    noise = Streams(0, x.shape[0])

    def once() -> float:
        begin = time.perf_counter()
        noise.draw(x.shape[1:], x)
        return time.perf_counter() - begin

    return once


def by_hand(x: Tensor, said: Estimate) -> Callable[[], float]:
    """Two torch operations, the least a step can be."""

    def once() -> float:
        begin = time.perf_counter()
        for _ in range(STEPS):
            (said.x0 * 0.3).add_(said.eps, alpha=0.7)
        return (time.perf_counter() - begin) / STEPS

    return once


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """``{method: {shape: microseconds}}``; every method once a round, so that all meet the same neighbours."""
    runs: dict[tuple[str, str], Callable[[], float]] = {}
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        x, x0, eps = (torch.randn(shape, generator=generator) for _ in range(3))
        said, size = Estimate(x0, eps, torch.rand(shape, generator=generator)), str(shape)
        runs["two torch operations", size] = by_hand(x, said)
        runs["a draw of noise", size] = draw(x)
        for solver, name in {solver: name for name, solver in reversed(SOLVERS.items())}.items():
            if not solver.adaptive:
                runs[name, size] = ours(solver, x, said)
        for name, scheduler in DIFFUSERS.items():
            runs[f"diffusers {name}", size] = theirs(scheduler, x, said)
    best: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for (name, size), once in runs.items():
            seconds = once() * 1e6
            table = best.setdefault(name, {})
            table[size] = min(table.get(size, seconds), seconds)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    with torch.no_grad():
        best = measure(args.rounds)
    wide, small = map(str, SHAPES)
    print(f"microseconds a step, minimum of {args.rounds} runs of {STEPS} steps, {args.threads} threads\n")
    print(f"{'':24}{'(64,3,32,32)':>14}{'(1,4,64,64)':>13}   best peer  diffusers here")
    for name, row in best.items():
        if name.startswith("diffusers "):
            continue
        peer = "{}/{}".format(*PEERS[name]) if name in PEERS else ""
        other = best.get(f"diffusers {name}")
        here = f"{other[wide]:.0f}/{other[small]:.0f}" if other else ""
        print(f"{name:24}{row[wide]:14.0f}{row[small]:13.0f}  {peer:>10}  {here:>14}")
    if args.out:
        args.out.write_text(
            json.dumps({"threads": args.threads, "steps": STEPS, "microseconds": best}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
