"""One tuned grid and solver for each number of calls, fitted on random mixtures and judged on twelve others.

    python benchmarks/tuning.py [--json FILE] [--calls 5,8,10]

The twelve are those of ``benchmarks/solvers.py``, with the same noises and the same relative error: the geometric mean
over the mixtures of the root mean square distance to the exact end. The fit sees other mixtures of the same family.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undiffuse.asking import Sampling
from undiffuse.config import to_json
from undiffuse.grids import GRIDS, Grid
from undiffuse.pipeline import REGISTRIES
from undiffuse.sampling import default_sampling
from undiffuse.solvers import SOLVERS, Solver
from undiffuse.tuning import tune

bench: Any = import_module("solvers")  # the script beside this one
POINTS = 64  # samples a mixture


def judge(problems: Any, x: Tensor, ends: Tensor, solver: Solver, grid: Grid, calls: int) -> float:
    """The geometric mean over the mixtures of the root mean square distance."""
    off = bench.end_of(problems, x, solver, grid, calls) - ends
    return float(off.square().sum(2).mean(1).sqrt().log().mean().exp())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write results and settings here")
    parser.add_argument("--calls", default=",".join(map(str, bench.CALLS)), help="numbers of calls, with commas")
    parser.add_argument("--mixtures", type=int, default=64, help="mixtures to fit")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of the fit")
    options = parser.parse_args()
    problems = bench.random_mixtures(seed=0)
    x = torch.randn(12, POINTS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ends = bench.exact_end(problems, x)
    family, low_rank = bench.random_mixtures(count=options.mixtures, seed=1000), bench.LowRank()
    z = torch.randn(8, 3072, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    print(
        f"{'calls':>5} {'best fixed pair':<26} {'error':>9} {'default':>9} {'tuned':>9} {'gain':>5} "
        f"{'D=3072':>8} {'s':>5}"
    )
    for calls in map(int, options.calls.split(",")):
        pairs = {
            (name, grid): judge(problems, x, ends, SOLVERS[name], GRIDS[grid], calls)
            for name in bench.SOLVER_NAMES
            for grid in [*bench.GRID_NAMES, "flow_power"]
        }
        pairs = {pair: value for pair, value in pairs.items() if value == value}
        best = min(pairs, key=pairs.__getitem__)
        begun = time.monotonic()
        tuned = tune(
            family,
            bench.SCHEDULE,
            (32, 2),
            calls,
            samples=options.mixtures,
            rounds=options.rounds,
            fine=max(200, 6 * calls),
            like=ends,
        )
        seconds = time.monotonic() - begun
        error = judge(problems, x, ends, tuned.solver, tuned.grid, calls)
        default = judge(problems, x, ends, *default_sampling(calls), calls)
        far = bench.end_of(low_rank, z, tuned.solver, tuned.grid, calls) - low_rank.exact_end(z)
        print(
            f"{calls:>5} {best[0] + ' ' + best[1]:<26} {pairs[best]:>9.2e} {default:>9.2e} {error:>9.2e} "
            f"{pairs[best] / error:>5.2f} {float(far.square().sum(1).mean().sqrt()):>8.1e} {seconds:>5.0f}",
            flush=True,
        )
        results.append(
            {
                "calls": calls,
                "pair": best,
                "pair_error": pairs[best],
                "default": default,
                "error": error,
                "held_out": tuned.error,
                "fitted": tuned.fitted,
                "seconds": seconds,
                "settings": to_json(Sampling(tuned.solver, tuned.grid, calls), REGISTRIES),
            }
        )
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
