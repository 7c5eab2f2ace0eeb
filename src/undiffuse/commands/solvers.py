"""``undiffuse solvers``: which there are, which is best for a model, and a grid tuned for it."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..errors import UndiffuseError
from .options import AnyPath

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..asking import Sampling
    from ..pipeline import Pipeline

EXAMPLES = """
undiffuse solvers                              every solver, one line each
undiffuse solvers runs/demo                    which, and how many calls?
undiffuse solvers runs/demo --calls 1,2,5,10 --solvers heun,unipc_3,ddpm
undiffuse solvers runs/demo --tune 8           fit and keep a grid of 8 calls
"""

MAIN = "euler,heun,rk4,dpmpp_2m,dpmpp_3m,unipc_3,deis_3,ipndm_4,ddpm,dpmpp_2m_sde"
FINE = 200  # calls of the fine solution, or four times those asked for
COMPONENTS = 32  # principal components in which the Frechet distance is taken, at most
NEAR = 1.1  # the recommendation: as few calls as come within this factor of the best, or of pure sampling noise


@dataclass(frozen=True)
class Row:
    """One solver with so many calls."""

    solver: str
    grid: str
    calls: int  # estimates for one sample, at most; guidance makes each two network calls
    steps: int
    error: float | None  # distance to the fine solution from the same noise; None: it draws noise
    frechet: float


@dataclass(frozen=True)
class Measured:
    """What was measured of one model."""

    model: Path
    samples: int
    components: int
    fine_error: float  # of the fine solution itself
    floor: float  # Frechet distance of two sets of the fine solution: only sampling noise
    rows: tuple[Row, ...]
    skipped: tuple[str, ...]
    best: Row  # the recommendation
    recommendation: str
    command: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Kept:
    """What was tuned and written into the model's folder. Distances are of what the denoiser sees."""

    model: Path
    calls: int
    solver: str
    times: tuple[float, ...]
    error: float
    fitted: float
    default: float
    best_pair: str
    best_pair_error: float
    fine_error: float
    latents: bool  # that the denoiser sees these, and not the data


def solvers(
    model: Annotated[AnyPath | None, tyro.conf.Positional] = None,
    calls: str = "5,10,20,50",
    solvers: str = MAIN,
    grid: str = "flow_power",
    samples: int | None = None,
    seed: int = 0,
    tune: int | None = None,
    out: AnyPath = Path("solvers.png"),
    device: str = "auto",
) -> list[dict[str, Any]] | Measured | Kept:
    """List the solvers; or measure them on a model and say which to take; or tune a grid for the model.

    Measured are the distance of each sample to the model's own fine solution from the same noise (deterministic
    solvers) and the Frechet distance between sets of samples, in principal components of the fine solution's. Of a
    model in latents these are of the decoded data; a grid is tuned in its latents.

    Args:
        model: A run folder or a model folder; without one, the solvers are listed.
        calls: Numbers of calls to measure, with commas.
        solvers: Names with commas, or `all`.
        grid: For all of them (default flow_power); the row `default` has its own for each number of calls.
        samples: How many to measure (default 128) or to tune on (default 32, of fewer than 64 numbers each 256).
        seed: Of the noise.
        tune: Fit a grid and a solver for this many calls and keep them in the model's folder; `sample` takes them for
            so many steps.
        out: The picture; the numbers go beside it as .json (a .json here: only the numbers).
        device: auto, cpu, cuda, mps.

    Raises:
        UndiffuseError: no such model or name, a number out of range, matplotlib missing.
    """
    if model is None:
        if tune is not None:
            raise UndiffuseError("--tune needs a model: undiffuse solvers runs/NAME --tune 8")
        return listed()
    from ..pipeline import Pipeline, resolve_device
    from .sample import progress_bar

    model, out = Path(model), Path(out)
    if samples is not None and samples < 1:
        raise UndiffuseError(f"--samples {samples}: at least 1")
    pipeline = Pipeline.load(model, resolve_device(device))
    pipeline.denoiser.requires_grad_(False)
    if tune is not None:
        small = math.prod(pipeline.shape) < 64
        return _tune(pipeline, model, tune, samples or (256 if small else 32), seed)
    budgets = _numbers(calls)
    samples = 128 if samples is None else samples
    if samples < 16:
        raise UndiffuseError(f"--samples {samples}: a Frechet distance of fewer than 16 samples says nothing")
    figure = _picture(out)
    names, strict = _names(solvers)
    with progress_bar() as tick:
        measured = measure(pipeline, model, budgets, names, strict, grid, samples, seed, tick)
    measured = replace(measured, files=(out.with_suffix(".json"), *([out] if figure is not None else [])))
    target = out.with_suffix(".json")
    from ..config import write_json_atomic
    from . import plain

    out.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(target, plain(measured))
    if figure is not None:
        _draw(figure, measured, out)
    return measured


def listed() -> list[dict[str, Any]]:
    """``name``, ``order``, ``calls_per_step``, ``stochastic`` and ``description`` of every solver."""
    from ..solvers import SOLVERS, solver_table

    def description(name: str) -> str:
        text = " ".join((type(SOLVERS[name]).__doc__ or "").partition("\n\n")[0].split())
        text = re.sub(r" \([^()]*\d{4}[^()]*\)", "", text)  # where it was published is in the docs
        return re.split(r"[.:;] ", text)[0].rstrip(".:;").replace("``", "")

    return [{**row, "description": description(str(row["name"]))} for row in solver_table()]


# --- measuring --------------------------------------------------------------------------------------------------------


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 5 and 1 <= int(part) <= 4000 for part in parts):
        raise UndiffuseError(f"--calls {text}: give whole numbers from 1 to 4000 with commas, like 5,10,20")
    return sorted({int(part) for part in parts})


def _names(text: str) -> tuple[list[str], bool]:
    """The names, and whether they were asked for one by one (then one that cannot run is an error)."""
    from ..errors import choose
    from ..solvers import SOLVERS

    if text.strip() == "all":
        # Equal solvers once; those of distilled models are not for this one.
        first = {solver: name for name, solver in reversed(SOLVERS.items()) if not solver.distilled}
        return [name for name in SOLVERS if name in first.values() and not SOLVERS[name].adaptive], False
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if choose("solver", name, SOLVERS).adaptive:
            raise UndiffuseError(
                f"--solvers {name}: it chooses its own number of calls, so no number can be asked of it"
            )
    return names, text != MAIN


def measure(
    pipeline: Pipeline,
    model: Path,
    budgets: Sequence[int],
    names: Sequence[str],
    strict: bool,
    grid: str,
    samples: int,
    seed: int,
    tick: Callable[[int, int], None],
) -> Measured:
    """What ``undiffuse solvers MODEL`` measures; ``tick(done, total)`` counts steps. Unless ``strict``, a solver that
    does not fit the model is left out and listed in ``skipped``."""
    from ..errors import choose
    from ..grids import GRIDS
    from ..sampling import default_sampling
    from ..solvers import SOLVERS, UniPC
    from ..tuning import HELD_OUT, distance

    usual = pipeline.settings()
    spacing = choose("grid", grid, GRIDS)
    jobs: list[tuple[str, str, int, Sampling]] = []
    for budget in budgets:
        solver, own = default_sampling(budget)
        jobs.append(("default", "default", budget, replace(usual, solver=solver, grid=own, steps=budget)))
        tuned = next((each for each in pipeline.tuned if each.steps == budget), None)
        if tuned is not None:
            jobs.append(("tuned", "tuned", budget, tuned))
        for name in names:
            steps = (budget - 1 - SOLVERS[name].extra) // SOLVERS[name].calls + 1
            if steps >= 1:
                settings = replace(usual, solver=SOLVERS[name], grid=spacing, steps=steps)
                jobs.append((name, grid, budget, settings))
    fine = max(FINE, 4 * max(budgets)) if max(budgets) <= 250 else max(budgets)
    finest = replace(usual, solver=UniPC(3), grid=GRIDS["log_snr"], steps=fine, reuse=1)
    total = sum(job[3].steps * SOLVERS.get(job[0], job[3].solver).calls for job in jobs) + 2 * fine + fine // 2
    done = 0

    def draw(settings: Sampling, first: int = 0) -> Tensor:
        nonlocal done
        begun = done
        work = settings.steps * settings.solver.calls

        def progress(now: int, of: int) -> None:
            tick(begun + round(work * now / of), total)

        drawn = pipeline.draw(range(first, first + samples), seed=seed, sampling=settings, progress=progress)
        done = begun + work
        return drawn

    end = draw(finest)
    fine_error = float(distance(draw(replace(finest, steps=fine // 2)), end))
    other = draw(finest, HELD_OUT)
    frechet, components = _compare(other)
    rows, skipped = [], []
    for name, on, budget, settings in jobs:
        try:
            x = draw(settings)
        except UndiffuseError as error:
            if strict and name in names:
                raise
            skipped.append(f"{name} with {budget} calls: {error}")
            continue
        off = None if settings.solver.stochastic else float(distance(x, end))
        rows.append(Row(name, on, budget, settings.steps, off, frechet(x)))
    if not rows:
        raise UndiffuseError(f"no solver could be measured: {skipped[0] if skipped else 'take more calls'}")
    floor = frechet(end)
    best, text, command = _recommend(rows, floor, model, grid)
    return Measured(
        model, samples, components, fine_error, floor, tuple(rows), tuple(skipped), best, text, command, files=()
    )


def _recommend(rows: Sequence[Row], floor: float, model: Path, grid: str) -> tuple[Row, str, str]:
    """The fewest calls that are as good as the best, or as sampling noise lets anybody see; why; and how."""
    from ..grids import GRIDS
    from ..sampling import default_sampling
    from ..solvers import SOLVERS

    top = min(rows, key=lambda row: row.frechet)
    near = [row for row in rows if row.frechet <= NEAR * max(top.frechet, floor)]
    fewest = min(row.calls for row in near)
    # What sampling noise cannot tell apart, the distance to the fine solution can.
    best = min((row for row in near if row.calls == fewest), key=_closeness)
    why = f"take {best.solver} with {best.calls} calls: Frechet distance {best.frechet:.3g}, " + (
        "the best measured" if best is top else f"the best is {top.frechet:.3g} ({top.solver}, {top.calls} calls)"
    )
    if best.frechet <= NEAR * floor:
        why += f"; two sets of the fine solution are {floor:.3g} apart, so this is as good as can be seen"
    solver, own = default_sampling(best.calls)
    usual = best.solver == "default"
    names = (_name_of(solver, SOLVERS), _name_of(own, GRIDS)) if usual else (best.solver, grid)
    if best.solver == "tuned":
        return best, why, f"undiffuse sample {model} --steps {best.steps}"
    if not all(names):  # its grid has no name to ask for; a tuned one is at least as good
        return best, why, f"undiffuse solvers {model} --tune {best.calls}"
    return best, why, f"undiffuse sample {model} --steps {best.steps} --solver {names[0]} --grid {names[1]}"


def _closeness(row: Row) -> tuple[bool, float, bool, float]:
    """Smaller is better: the error, where there is one (solvers that draw noise have none); then the default."""
    return row.error is None, row.error if row.error is not None else 0.0, row.solver != "default", row.frechet


def _name_of(value: Any, registry: dict[str, Any]) -> str:
    """Its name, empty if it has none."""
    return next((name for name, each in registry.items() if each == value), "")


def _compare(reference: Tensor) -> tuple[Callable[[Tensor], float], int]:
    """The Frechet distance of a set of samples to ``reference``, in its leading principal components."""
    import numpy as np

    from ..evaluation.frechet import frechet_distance

    flat = reference.flatten(1).double().numpy()
    mean = flat.mean(0)
    keep = min(flat.shape[1], COMPONENTS, len(flat) // 4)
    axes = np.linalg.svd(flat - mean, full_matrices=False)[2][:keep].T

    def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        places = (x - mean) @ axes
        return places.mean(0), np.atleast_2d(np.cov(places, rowvar=False))

    wanted = moments(flat)
    return lambda x: frechet_distance(*moments(x.flatten(1).double().numpy()), *wanted), keep


# --- tuning -----------------------------------------------------------------------------------------------------------


def _tune(pipeline: Pipeline, model: Path, calls: int, samples: int, seed: int) -> Kept:
    import torch

    from ..pipeline import find_pipeline
    from ..solvers import SOLVERS
    from ..tuning import tune
    from .sample import progress_bar

    usual = pipeline.sampling
    pipeline.denoiser.eval()
    denoise = pipeline.denoise(pipeline.conditions(range(samples), None), usual)
    with progress_bar() as tick:
        found = tune(
            denoise,
            pipeline.config.schedule,
            pipeline.shape,
            calls,
            samples=samples,
            seed=seed,
            fine=max(FINE, 4 * calls),
            like=torch.empty(0, device=pipeline.device),
            progress=tick,
        )
    settings = replace(usual, solver=found.solver, grid=found.grid, steps=calls)
    others = [
        each
        for each in pipeline.tuned
        if replace(each, solver=usual.solver, grid=usual.grid)
        != replace(settings, solver=usual.solver, grid=usual.grid)
    ]
    pipeline.tuned = (*others, settings)
    pipeline.save_settings(find_pipeline(model))
    pair = found.pairs[0]
    return Kept(
        model=model,
        calls=calls,
        solver=_name_of(found.solver, SOLVERS) or "learned",
        times=tuple(found.grid.times(pipeline.config.schedule, calls).tolist()),
        error=found.error,
        fitted=found.fitted,
        default=found.default,
        best_pair=f"{pair.solver} {pair.grid}",
        best_pair_error=pair.error,
        fine_error=found.fine_error,
        latents=pipeline.codec is not None,
    )


# --- what people read -------------------------------------------------------------------------------------------------


def report(result: list[dict[str, Any]] | Measured | Kept) -> str:
    if isinstance(result, Measured):
        return _report_measured(result)
    if isinstance(result, Kept):
        return (
            f"{result.model}: a tuned grid for {result.calls} calls is kept in its folder\n"
            f"  distance to the fine solution{' of latents' * result.latents}, on noises that the fit has not seen\n"
            f"    tuned ({result.solver})  {result.error:.3g}   (on its own noises {result.fitted:.3g})\n"
            f"    best fixed pair  {result.best_pair_error:.3g}   ({result.best_pair})\n"
            f"    default  {result.default:.3g}\n"
            f"    the fine solution itself  {result.fine_error:.1g}\n"
            f"  undiffuse sample {result.model} --steps {result.calls}"
        )
    lines = [f"{'name':<20} {'order':>5} {'calls':>5}  {'noise':<6}what"]
    for row in result:
        what = textwrap.shorten(row["description"], 40, placeholder=" ...")
        noise = "yes" if row["stochastic"] else "-"
        lines.append(f"{row['name']:<20} {row['order']:>5} {row['calls_per_step']:>5}  {noise:<6}{what}")
    return "\n".join([*lines, "", "which is best for a model: undiffuse solvers runs/NAME"])


def _report_measured(measured: Measured) -> str:
    columns = sorted({row.calls for row in measured.rows})
    names = list(dict.fromkeys(row.solver for row in measured.rows))
    lines = [
        f"{measured.model}: {measured.samples} samples, Frechet distance in {measured.components} components",
    ]
    for part in [columns[i : i + 6] for i in range(0, len(columns), 6)]:
        for title, value in (
            ("Frechet distance", lambda row: row.frechet),
            ("distance to the fine solution", lambda row: row.error),
        ):
            cells = {(row.solver, row.calls): value(row) for row in measured.rows if value(row) is not None}
            lines += ["", f"{title} after", f"{'calls':<20}" + "".join(f"{n:>10}" for n in part)]
            for name in names:
                shown = [cells.get((name, n)) for n in part]
                if any(cell is not None for cell in shown):
                    row = "".join(f"{'-' if cell is None else format(cell, '.3g'):>10}" for cell in shown)
                    lines.append(f"{name:<20}{row}")
    lines += ["", f"of the fine solution itself: {measured.floor:.3g} and {measured.fine_error:.1g}"]
    lines += [f"not measured: {each}" for each in measured.skipped]
    lines += ["", *textwrap.wrap(measured.recommendation, 80), f"  {measured.command}"]
    return "\n".join([*lines, f"written: {', '.join(map(str, measured.files))}"])


def _picture(out: Path) -> Any:
    """matplotlib's module of figures; None when only numbers are wanted. Refused before the work, not after it."""
    if out.suffix.lower() == ".json":
        return None
    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UndiffuseError(f"--out {out}: write a .png, .svg, .pdf or .json")
    try:
        import matplotlib.figure
    except ImportError:
        raise UndiffuseError(
            "the picture needs matplotlib: pip install 'undiffuse[plot]', or write --out solvers.json"
        ) from None
    return matplotlib.figure


def _draw(figures: Any, measured: Measured, out: Path) -> None:
    figure = figures.Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    calls = sorted({row.calls for row in measured.rows})
    for name in dict.fromkeys(row.solver for row in measured.rows):
        own = [row for row in measured.rows if row.solver == name]
        style: dict[str, Any] = {"marker": "o", "markersize": 3, "label": name, "linewidth": 1.2}
        if name in ("default", "tuned"):
            style |= {"color": "black" if name == "default" else "crimson", "linewidth": 2.5, "markersize": 6}
        (line,) = left.plot([row.calls for row in own], [row.frechet for row in own], **style)
        exact = [(row.calls, row.error) for row in own if row.error is not None]
        if exact:
            right.plot(*zip(*exact, strict=True), **style | {"color": line.get_color()})
    left.axhline(measured.floor, color="grey", linestyle=":", linewidth=1, label="fine solution")
    left.set(title="Frechet distance", xlabel="calls")
    right.set(title="distance to the fine solution", xlabel="calls")
    for axis in (left, right):
        axis.set(xscale="log", yscale="log")
        axis.set_xticks(calls, [str(n) for n in calls])
        axis.xaxis.minorticks_off()
        axis.grid(alpha=0.3)
    left.legend(fontsize=7, ncols=2)
    figure.savefig(out, dpi=110)
