"""Error of every deterministic (solver, grid) pair for a number of network calls, on problems with known solutions.

    python benchmarks/solvers.py [--json FILE] [--picture FILE] [--calls 5 8 10 15 20 50]

`default_sampling(calls)` stands beside them. Two problems, exact denoisers, from pure noise to sigma = 0: twelve
random Gaussian mixtures in the plane (root mean square distance to the exact end of the probability-flow ODE; relative
to the best fixed pair on each mixture, geometric mean over the mixtures), and a Gaussian in 3072 dimensions with 32
long axes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import log, pi
from pathlib import Path

import torch
from torch import Tensor

from undiffuse.grids import GRIDS, Grid
from undiffuse.levels import Estimate, Level
from undiffuse.sampling import answer, default_sampling
from undiffuse.schedules import VP
from undiffuse.solvers import SOLVERS, Solver

CALLS = (5, 8, 10, 15, 20, 50)
SCHEDULE = VP()
GRID_NAMES = ("flow_uniform", "flow_power", "karras", "log_snr", "uniform")
# Every deterministic solver of the registry whose calls are known beforehand; equal ones once.
SOLVER_NAMES = list({solver: name for name, solver in reversed(SOLVERS.items()) if not solver.stochastic}.values())[
    ::-1
]
SOLVER_NAMES = [name for name in SOLVER_NAMES if not SOLVERS[name].adaptive]


@dataclass(frozen=True, eq=False)
class Problems:
    """P mixtures of K Gaussians in the plane; x is [P, N, 2]."""

    weights: Tensor  # [P, K]
    means: Tensor  # [P, K, 2]
    factors: Tensor  # [P, K, 2, 2], the axes of the ellipses
    variances: Tensor  # [P, K, 2]

    def __call__(self, x: Tensor, level: Level) -> Estimate:
        spread = level.alpha**2 * self.variances[:, None] + level.sigma**2  # [P, 1, K, 2]
        off = torch.einsum("pnkd,pkde->pnke", x[:, :, None] - level.alpha * self.means[:, None], self.factors)
        log_p = self.weights.log()[:, None] - (off**2 / spread + spread.log() + log(2 * pi)).sum(-1) / 2
        r = torch.softmax(log_p, -1)[..., None]
        pull = level.alpha * self.variances[:, None] / spread * off
        x0 = self.means[:, None] + torch.einsum("pnke,pkde->pnkd", pull, self.factors)
        eps = level.sigma * torch.einsum("pnke,pkde->pnkd", off / spread, self.factors)
        return Estimate((r * x0).sum(2), (r * eps).sum(2))


def random_mixtures(count: int = 12, components: int = 4, seed: int = 0) -> Problems:
    """Means N(0, 1), deviations log-uniform in [0.05, 0.6], weights uniform in [0.5, 1.5] before scaling."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator)

    weights = 0.5 + uniform(count, components)
    angle = 2 * pi * uniform(count, components)
    cos, sin = angle.cos(), angle.sin()
    factors = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    means = torch.randn(count, components, 2, dtype=torch.float64, generator=generator)
    deviations = 0.05 * 12 ** uniform(count, components, 2)
    return Problems(weights / weights.sum(1, keepdim=True), means, factors, deviations**2)


def exact_end(problems: Problems, x: Tensor, steps: int = 1500, least: float = 1e-5) -> Tensor:
    """The end of the ODE, by classical Runge-Kutta in u = log(sigma/alpha): dy/du = y - D, y = x/alpha."""
    start = SCHEDULE(1.0)
    top = float((start.sigma / start.alpha).log())
    h = (log(least) - top) / steps

    def slope(u: float, y: Tensor) -> Tensor:
        s = torch.tensor(u, dtype=torch.float64).exp()
        return y - problems(y, Level(s, torch.ones_like(s), s, SCHEDULE)).x0

    y = x / start.alpha
    for i in range(steps):
        u = top + i * h
        k1 = slope(u, y)
        k2 = slope(u + h / 2, y + h / 2 * k1)
        k3 = slope(u + h / 2, y + h / 2 * k2)
        k4 = slope(u + h, y + h * k3)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    s = torch.tensor(least, dtype=torch.float64)
    return problems(y, Level(s, torch.ones_like(s), s, SCHEDULE)).x0


class LowRank:
    """N(0, diag(variances)): 32 long axes in 3072 dimensions, the rest of deviation 0.05."""

    variances = torch.full((3072,), 0.05**2, dtype=torch.float64)
    variances[:32] += (4 * 0.85 ** torch.arange(32, dtype=torch.float64)) ** 2

    def __call__(self, x: Tensor, level: Level) -> Estimate:
        off = x / (level.alpha**2 * self.variances + level.sigma**2)
        return Estimate(level.alpha * self.variances * off, level.sigma * off)

    def exact_end(self, x: Tensor) -> Tensor:
        start = SCHEDULE(1.0)
        return x * torch.sqrt(self.variances / (start.alpha**2 * self.variances + start.sigma**2))


def steps_for(solver: Solver, calls: int) -> int:
    """The most steps, the last of one call, that ``calls`` pay for; 0 if none."""
    return max((calls - 1 - solver.extra) // solver.calls + 1, 0)


def end_of(denoise: Callable[[Tensor, Level], Estimate], x: Tensor, solver: Solver, grid: Grid, calls: int) -> Tensor:
    steps = steps_for(solver, calls)
    if steps == 0:
        return torch.full_like(x, float("nan"))
    memory, asked = None, 0

    def noise(x: Tensor, here: Level, there: Level) -> Tensor:
        raise AssertionError("noise was drawn")

    for here, there in pairwise(grid.levels(SCHEDULE, steps)):
        with torch.no_grad():
            x, memory, estimates = answer(solver.step(x, here, there, memory, noise), denoise)
        asked += len(estimates)
    assert asked <= calls, (solver, asked, calls)
    return x


@dataclass(frozen=True)
class Row:
    """One pair at one number of calls.

    Attributes:
        relative: error on the mixtures over that of the best fixed pair on each, geometric mean; the best has 1.
        error: root mean square error on the mixtures, their mean.
        low_rank: root mean square error of the Gaussian in 3072 dimensions.
    """

    solver: str
    grid: str
    relative: float
    error: float
    low_rank: float


def measure(calls: int, problems: Problems, x: Tensor, exact: Tensor) -> tuple[Row, list[Row]]:
    """The default, and every fixed pair, the best on the mixtures first."""
    low_rank, z = LowRank(), torch.ones(1, 3072, dtype=torch.float64)
    pairs = [(name, grid, SOLVERS[name], GRIDS[grid]) for name in SOLVER_NAMES for grid in GRID_NAMES]
    pairs = [pair for pair in pairs if steps_for(pair[2], calls) > 0]
    pairs.append(("default", "default", *default_sampling(calls)))
    errors, far = [], []
    for _, _, solver, grid in pairs:
        errors.append((end_of(problems, x, solver, grid, calls) - exact).square().sum(2).mean(1).sqrt())
        far.append(float((end_of(low_rank, z, solver, grid, calls) - low_rank.exact_end(z)).norm()))
    table = torch.stack(errors)
    relative = (table / table[:-1].amin(0)).log().mean(1).exp()
    relative = (relative / relative[:-1].min()).tolist()
    columns = zip(pairs, relative, table.mean(1).tolist(), far, strict=True)
    rows = [Row(solver, grid, *numbers) for (solver, grid, _, _), *numbers in columns]
    return rows[-1], sorted(rows[:-1], key=lambda row: row.relative)


def draw(results: dict[int, tuple[Row, list[Row]]], path: Path) -> None:
    """Error against calls, each solver on its best grid."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = ("euler", "heun", "rk4", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "unipc_3", "deis_3", "lms_4", "ipndm_3")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    titles = {"error": "12 mixtures in the plane", "low_rank": "Gaussian in 3072 dimensions"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for name in shown:
            points = []
            for calls, (_, rows) in results.items():
                values = [getattr(row, key) for row in rows if row.solver == name]
                points += [(calls, min(values))] if values else []
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=name)
        points = [(calls, getattr(default, key)) for calls, (default, _) in results.items()]
        axis.plot(*zip(*points, strict=True), color="black", linewidth=2.5, label="default")
        axis.set(xscale="log", yscale="log", xlabel="network calls", ylabel="root mean square error", title=title)
        axis.set_xticks(list(results), [str(calls) for calls in results])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Error of every (solver, grid) pair for a number of network calls.")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write every measurement here")
    parser.add_argument("--picture", type=Path, default=None, metavar="FILE", help="draw error against calls here")
    parser.add_argument("--calls", type=int, nargs="+", default=CALLS, help="numbers of calls")
    parser.add_argument("--points", type=int, default=48, help="samples a mixture")
    parser.add_argument("--seed", type=int, default=0, help="of the mixtures (the default was found on seed 1)")
    options = parser.parse_args()
    problems = random_mixtures(seed=options.seed)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(problems.means), options.points, 2, dtype=torch.float64, generator=generator)
    exact, results = exact_end(problems, x), {}
    print(f"{'calls':>5} {'solver':<17} {'grid':<13} {'relative':>8} {'error':>9} {'D = 3072':>9}")
    for calls in options.calls:
        default, rows = results[calls] = measure(calls, problems, x, exact)
        nearest = min(rows, key=lambda row: row.low_rank)
        for row in (*rows[:4], *([] if nearest in rows[:4] else [nearest]), default):
            numbers = f"{row.relative:>8.2f} {row.error:>9.2e} {row.low_rank:>9.2e}"
            print(f"{calls:>5} {row.solver:<17} {row.grid:<13} {numbers}", flush=True)
    if options.json:
        table = [{"calls": n, **asdict(row)} for n, (default, rows) in results.items() for row in (default, *rows)]
        options.json.write_text(json.dumps(table, indent=1) + "\n")
    if options.picture:
        draw(results, options.picture)


if __name__ == "__main__":
    main()
