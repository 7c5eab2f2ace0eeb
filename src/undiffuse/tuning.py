"""Tuning: for one model and N network calls, the grid and solver that best reproduce the model's own fine solution.

No data is needed. From the same noise, the probability-flow ODE of a model has one end; it is computed once with many
calls. What is tuned is then fitted to it by gradient through the whole trajectory:

1. every fixed (solver, grid) pair is measured, and the two best solvers go on;
2. their times move (Xue et al. 2024, arXiv:2402.17376, fit times to the fine solution too); the weights of the
   polynomial follow the times as they always do;
3. then the weights of the past estimates at each step are free as well (Shaul et al. 2024, arXiv:2403.01329), which
   gives a :class:`Learned` solver.

Whatever is best on noises that the fit has not seen is returned: also the fixed pair, if that is it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .denoiser import Denoise
from .errors import UndiffuseError, UndiffuseWarning, unknown
from .grids import GRIDS, Grid, Times
from .levels import Estimate, Level, combine
from .noise import Streams
from .sampling import default_sampling, start, trajectory
from .schedules import Schedule
from .solvers import SOLVERS, Solver, UniPC
from .solvers.learned import Learned, data_scale, noise_scale
from .solvers.multistep import Multistep
from .solvers.weights import Point

CANDIDATES = ("euler", "dpmpp_2m", "eab_3", "eab_4", "unipc_2", "unipc_4", "deis_3", "deis_4", "ipndm_2", "ipndm_3")
"""The solvers that :func:`tune` measures and starts from unless told otherwise."""
GRID_CANDIDATES = ("flow_uniform", "flow_power", "log_snr", "karras", "uniform")
"""Their grids."""
HELD_OUT = 1 << 20
"""The numbers of the samples whose noise is held out start here."""


@dataclass(frozen=True)
class Pair:
    """A fixed solver and grid by name, and its error on the held-out noises."""

    solver: str
    grid: str
    error: float


@dataclass(frozen=True)
class Tuned:
    """What :func:`tune` found. Errors are distances to the fine solution (:func:`distance`), on held-out noises.

    Attributes:
        solver, grid: to be used with ``steps = calls``.
        calls: network calls a sample.
        error: of this solver and grid.
        fitted: the same on the noises of the fit; far below ``error`` would be overfitting.
        default: of :func:`default_sampling`.
        pairs: every fixed pair that was measured, the best first.
        fine_error: of the fine solution itself, estimated by halving its calls: what is below it means nothing.
    """

    solver: Solver
    grid: Grid
    calls: int
    error: float
    fitted: float
    default: float
    pairs: tuple[Pair, ...]
    fine_error: float


def distance(x: Tensor, end: Tensor) -> Tensor:
    """``[]``: the geometric mean over samples of the root mean square difference of a sample ``[B, ...]``."""
    return (x - end).flatten(1).double().square().mean(1).clamp(min=1e-30).log().mean().div(2).exp()


def fine_solution(denoise: Denoise, schedule: Schedule, x: Tensor, calls: int = 200) -> Tensor:
    """The end of the probability-flow ODE from ``x`` at t = 1: UniPC-3 (fourth order), equal steps of log-SNR."""
    levels = GRIDS["log_snr"].levels(schedule, calls)
    return _end(denoise, x, levels, UniPC(3))


def _end(denoise: Denoise, x: Tensor, levels: Sequence[Level], solver: Solver) -> Tensor:
    *_, last = trajectory(denoise, x, levels, solver, _no_noise)
    return last.x


def _no_noise(x: Tensor, here: Level, there: Level) -> Tensor:
    raise UndiffuseError("a solver that draws noise has no fine solution to be compared with")


@dataclass(frozen=True, eq=False)
class Batch:
    """Noises and where the model takes them."""

    x: Tensor
    end: Tensor


def tune(
    denoise: Denoise,
    schedule: Schedule,
    shape: Sequence[int],
    calls: int,
    *,
    solvers: Iterable[str] = CANDIDATES,
    grids: Iterable[str] = GRID_CANDIDATES,
    samples: int = 32,
    seed: int = 0,
    points: int = 5,
    rounds: int = 10,
    fine: int = 200,
    like: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tuned:
    """The best solver and grid for ``calls`` network calls a sample.

    Args:
        denoise: answers a batch of ``samples``; differentiable in x and in the level. Its graph is rebuilt call by call
            (checkpointing), so that memory does not grow with the calls.
        schedule: of the model.
        shape: of one sample.
        calls: network calls, at least 1.
        solvers, grids: names to start from; the solvers deterministic, of one call a step.
        samples: noises to fit, and as many others to judge by.
        seed: of both.
        points: estimates that a learned step may use, at least 1.
        rounds: of 10 evaluations, for the times and again for the weights; the held-out error is taken after each.
        fine: calls of the fine solution.
        like: gives device and type.
        progress: ``progress(done, total)`` counts network calls.

    Raises:
        UndiffuseError: calls below 1 or not below ``fine``, a solver that cannot be tuned, an unknown name, a fine
            solution that is not finite.
    """
    _check(calls=calls, samples=samples, points=points, rounds=rounds)
    if calls * 2 > fine:
        raise UndiffuseError(f"a fine solution of {fine} calls is too near {calls} to judge by: take fine={4 * calls}")
    named = {name: _tunable(name) for name in solvers}
    spacings = {name: _grid(name) for name in grids}
    if not named or not spacings:
        raise UndiffuseError("tuning needs at least one solver and one grid to start from")
    pairs = [(name, grid) for name in named for grid in spacings if _fits(spacings[grid], schedule, calls)]
    # Two batches; a gradient costs about three more passes than an evaluation.
    tick = _counter(progress, 2 * fine + fine // 2 + calls * (2 * len(pairs) + 2 + 2 * rounds * (10 * 4 + 2)))
    denoise = _counted(denoise, tick)

    def batch(first: int) -> Batch:
        z = Streams(seed, range(first, first + samples)).draw(shape)
        z = z if like is None else z.to(like.device, like.dtype)
        x = start(schedule(1.0), z)
        end = fine_solution(denoise, schedule, x, fine)
        if not bool(end.isfinite().all()):
            raise UndiffuseError(
                "the model's own fine solution is not finite: it has diverged, there is nothing to fit"
            )
        return Batch(x, end)

    fit, held = batch(0), batch(HELD_OUT)
    fine_error = float(distance(fine_solution(denoise, schedule, fit.x, fine // 2), fit.end))

    def error(solver: Solver, grid: Grid, on: Batch) -> float:
        value = float(distance(_end(denoise, on.x, grid.levels(schedule, calls), solver), on.end))
        return value if isfinite(value) else float("inf")

    measured = sorted(
        (Pair(name, grid, error(named[name], spacings[grid], held)) for name, grid in pairs), key=lambda p: p.error
    )
    solver, grid = default_sampling(calls)
    default = error(solver, grid, held)
    best: tuple[float, Solver, Grid] = (default, solver, grid)
    if measured and measured[0].error < best[0]:
        best = (measured[0].error, named[measured[0].solver], spacings[measured[0].grid])
    if calls > 1:
        every = [(default, solver, grid), *((p.error, named[p.solver], spacings[p.grid]) for p in measured)]
        for base, begin in _starts(every):
            found = _fit(denoise, schedule, base, begin.times(schedule, calls), points, rounds, fit, held)
            best = min(best, found, key=lambda each: each[0])
    value, solver, grid = best
    tick(-1)
    return Tuned(solver, grid, calls, value, error(solver, grid, fit), default, tuple(measured), fine_error)


def _check(**numbers: int) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise UndiffuseError(f"{name} must be a whole number of at least 1, got {number!r}")


def _tunable(name: str) -> Solver:
    if name not in SOLVERS:
        raise unknown("solver", name, SOLVERS)
    solver = SOLVERS[name]
    if solver.stochastic or solver.distilled or solver.adaptive or solver.calls != 1 or solver.extra:
        raise UndiffuseError(f"{name} cannot be tuned: a solver is wanted that draws no noise and asks once a step")
    return solver


def _grid(name: str) -> Grid:
    if name not in GRIDS:
        raise unknown("grid", name, GRIDS)
    return GRIDS[name]


def _fits(grid: Grid, schedule: Schedule, calls: int) -> bool:
    """Some grids have no place for so many steps, or do not begin where this schedule ends."""
    try:
        return float(grid.times(schedule, calls)[0]) == 1
    except UndiffuseError:
        return False


def _starts(measured: Sequence[tuple[float, Solver, Grid]]) -> list[tuple[Solver, Grid]]:
    """The two best solvers, each on its best grid: what is best on a fixed grid need not be so on its own."""
    starts: dict[Solver, Grid] = {}
    for _, solver, grid in sorted(measured, key=lambda each: each[0]):
        if isinstance(solver, (Multistep, UniPC)):
            starts.setdefault(solver, grid)
    return list(starts.items())[:2]


def _counter(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None]:
    """``tick(n)`` reports n more of ``total``; a negative n, all."""
    done = 0

    def tick(n: int) -> None:
        nonlocal done
        done = min(done + n, total) if n >= 0 else total
        if progress is not None:
            progress(done, total)

    return tick


def _counted(denoise: Denoise, tick: Callable[[int], None]) -> Denoise:
    def counted(x: Tensor, level: Level) -> Estimate:
        tick(1)
        return denoise(x, level)

    return counted


# --- the fit ----------------------------------------------------------------------------------------------------------


def _fit(
    denoise: Denoise,
    schedule: Schedule,
    base: Solver,
    times: Tensor,
    points: int,
    rounds: int,
    fit: Batch,
    held: Batch,
) -> tuple[float, Solver, Grid]:
    """The best of what the fit passes through, on the held-out noises: ``(error, solver, grid)``."""
    first = _logits(times, schedule.first)
    moves = torch.zeros_like(first, requires_grad=True)
    steps = len(times) - 1
    free = torch.zeros(max(steps - 1, 0), points - 1, 2, dtype=torch.float64, requires_grad=True)
    best: tuple[float, Solver, Grid] = (float("inf"), base, Times(tuple(times[:-1].tolist())))

    def now() -> tuple[Tensor, list[Tensor]]:
        """The times, and the weights of each step."""
        # Bounded: no step of the search may move a time beyond recognition.
        t = _times(first + 2 * torch.tanh(moves / 2), schedule.first)
        return t, [w + 0.1 * free[n, : len(w)] for n, w in enumerate(_base_weights(base, schedule, t, points))]

    for parameters in ([moves], [moves, free]):
        if not any(p.numel() for p in parameters[-1:]):
            continue
        search = torch.optim.LBFGS(parameters, max_iter=8, max_eval=10, history_size=30, line_search_fn="strong_wolfe")

        def closure(parameters: list[Tensor] = parameters) -> Tensor:
            t, weights = now()
            loss = distance(_differentiable_end(denoise, schedule, fit.x, t, weights), fit.end).log()
            if not loss.requires_grad:
                raise _NoGradient
            for p, gradient in zip(
                parameters, torch.autograd.grad(loss, parameters, materialize_grads=True), strict=True
            ):
                p.grad = gradient
            return loss.detach()

        for _ in range(rounds):
            try:
                search.step(closure)
            except _NoGradient:
                warnings.warn(
                    "the denoiser gives no gradient, so nothing was fitted: only solvers and grids were compared",
                    UndiffuseWarning,
                    stacklevel=3,
                )
                return best
            with torch.no_grad():
                t, weights = now()
                value = float(distance(_differentiable_end(denoise, schedule, held.x, t, weights), held.end))
            if not isfinite(value):
                break
            if value < best[0]:
                grid = Times(tuple(t[:-1].tolist()))
                pure = parameters[-1] is moves and _method(base)[1] < points  # else some of its weights are left out
                best = (value, base if pure else _learned(grid, weights), grid)
        # What follows starts from the times that are best on noises not fitted.
        assert isinstance(best[2], Times)
        with torch.no_grad():
            kept = _logits(torch.tensor([*best[2].values, 0.0], dtype=torch.float64), schedule.first)
            moves.copy_(2 * torch.atanh(((kept - first) / 2).clamp(-0.999, 0.999)))
    return best


class _NoGradient(Exception):
    """The end of the trajectory does not depend on what is fitted, as far as torch can see."""


def _learned(grid: Times, weights: Sequence[Tensor]) -> Learned:
    rows = tuple(tuple((float(a), float(b)) for a, b in row) for row in weights)
    return Learned(grid.values, rows)


def _logits(times: Tensor, least: float) -> Tensor:
    """Strictly decreasing times from 1 to above ``least`` as free numbers: each the share of the way that is kept."""
    kept = ((times[1:-1] - least) / (times[:-2] - least)).clamp(1e-6, 1 - 1e-6)
    return torch.logit(kept)


def _times(logits: Tensor, least: float) -> Tensor:
    one = torch.ones(1, dtype=torch.float64)
    return torch.cat([one, least + (1 - least) * torch.cumprod(torch.sigmoid(logits), 0), 0 * one])


def _base_weights(base: Solver, schedule: Schedule, times: Tensor, points: int) -> list[Tensor]:
    """``[j, 2]`` weights of each step but the last: those of ``base``, zero for estimates that it does not use.

    They are computed in floats; their derivative with respect to the times, by central differences.
    """
    column, reach, gains = _method(base)
    rows = []
    for n in range(len(times) - 2):
        used = min(n, reach)
        row = torch.zeros(min(n, points - 1), 2, dtype=torch.float64)
        if used and len(row):

            def weights(t: Tensor) -> Tensor:
                there, here, *past = (Point(float(v.t), float(v.alpha), float(v.sigma), schedule) for v in schedule(t))
                scale = (noise_scale if column else data_scale)(there, here)
                return torch.tensor([gain / scale for gain in gains(there, here, past)], dtype=torch.float64)

            own = _with_slope(weights, times[[n + 1, n, *range(n - 1, n - 1 - used, -1)]])[: len(row)]
            pair = [0 * own, own] if column else [own, 0 * own]
            row = torch.cat([torch.stack(pair, 1), row[len(own) :]])
        rows.append(row)
    return rows


def _method(base: Solver) -> tuple[int, int, Callable[[Point, Point, Sequence[Point]], Sequence[float]]]:
    """A solver as gains of earlier estimates: of which kind (0: x0, 1: eps), how many, and their formula."""
    if isinstance(base, UniPC):
        return 0, base.p, lambda there, here, past: _predicted_and_corrected(base, there, here, past)
    assert isinstance(base, Multistep)
    return (0 if base.data_form else 1), base.points - 1, base.gains


def _predicted_and_corrected(base: UniPC, there: Point, here: Point, past: Sequence[Point]) -> list[float]:
    """The gains of UniPC from the sample that the estimate here was asked at, which was corrected only after it.

    With d_j = x0_j - x0_0 (j = 1 is the step before), the correction of the sample here is
    ``-c d_1 + sum_j (c_j - p_j) (d_{j+1} - d_1)``: c and c_j of the corrector, p_j of the predictor that led here. A
    step scales it, as all of x, by sigma'/sigma.
    """
    before, *older = past
    gains = [*base.predictor(there, here, past[: base.p - 1])]
    gains += [0.0] * (len(past) - len(gains))
    if before.alpha > 0:
        new, *corrector = base.corrector(here, before, older)
        kept = there.sigma / here.sigma
        gains[0] -= kept * new
        for j, (c, p) in enumerate(zip(corrector, base.predictor(here, before, older), strict=True), start=1):
            gains[j] += kept * (c - p)
            gains[0] -= kept * (c - p)
    return gains


def _with_slope(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """``function(at)`` with its derivative attached, if ``at`` asks for one."""
    fixed = at.detach()
    value = function(fixed)
    if not (torch.is_grad_enabled() and at.requires_grad):
        return value
    columns = []
    for i in range(len(fixed)):
        step = 1e-5 * float(torch.cat([(fixed - fixed[i]).abs(), fixed[i : i + 1]]).sort().values[1])
        shift = torch.zeros_like(fixed)
        shift[i] = step
        if float(fixed[i]) + step > 1:  # t = 1 is no variable
            columns.append(torch.zeros_like(value))
        else:
            columns.append((function(fixed + shift) - function(fixed - shift)) / (2 * step))
    return value + torch.stack(columns, 1) @ (at - fixed)


def _differentiable_end(
    denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, weights: Sequence[Tensor]
) -> Tensor:
    """The end of the trajectory of a :class:`Learned` solver, with a graph through times and weights."""
    levels = list(schedule(times))
    past: list[Estimate] = []
    for n, (here, there) in enumerate(pairwise(levels)):
        e = _asked(denoise, x, here)
        if n == len(levels) - 2:
            return e.x0
        row = weights[n]
        own_x0, own_eps = there.alpha, there.sigma
        terms = []
        if len(row):
            gains = torch.stack(
                [
                    row[:, 0] * (there.alpha - there.sigma / here.sigma * here.alpha),
                    row[:, 1] * (there.sigma - there.alpha / here.alpha * here.sigma),
                ]
            )
            own_x0, own_eps = own_x0 - gains[0].sum(), own_eps - gains[1].sum()
            for j, old in enumerate(past[: len(row)]):
                terms += [(gains[0, j], old.x0), (gains[1, j], old.eps)]
        x = combine((own_x0, e.x0), (own_eps, e.eps), *terms)
        past = [e, *past][: max((len(row) for row in weights), default=0)]
    raise UndiffuseError("a trajectory needs at least one step")


def _asked(denoise: Denoise, x: Tensor, level: Level) -> Estimate:
    """An estimate whose graph is thrown away and computed again when the gradient comes by."""
    if not torch.is_grad_enabled():
        return denoise(x, level)

    def again(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        # A view, so that a denoiser that remembers its last x does not take the second pass for the first.
        e = denoise(x.view_as(x), level)
        return e.x0, e.eps

    return Estimate(*checkpoint(again, x, level.t, use_reentrant=False, preserve_rng_state=False))
