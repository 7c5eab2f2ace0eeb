"""Chapter 4 and law 1: whatever the network says, and is told, the samples are the same."""

from __future__ import annotations

import warnings
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from laws import OTHER, PLANE, ExactNetwork, fixed_noise, normal, run, tensor, worst
from undiffuse.conditions import Classes, Conditions
from undiffuse.denoiser import INPUT_SCALES, LABELS, Denoise, Denoiser, TimeLabel, rescheduled
from undiffuse.errors import UndiffuseError
from undiffuse.grids import GRIDS, Karras, Uniform
from undiffuse.guidance import cfg
from undiffuse.levels import Estimate, Level
from undiffuse.predictions import PREDICTIONS, Eps, V
from undiffuse.schedules import EDM, SCHEDULES, VP, Flow, LinearBetas, Schedule
from undiffuse.solvers import SOLVERS, Euler, Solver
from undiffuse.solvers.sde import AnnealedLangevin

pytestmark = pytest.mark.filterwarnings("ignore::undiffuse.errors.UndiffuseWarning")


def exact_denoiser(
    exact: Denoise, schedule: Schedule, prediction: str, label: str = "time", scale: str = "none"
) -> Denoiser:
    parts = (schedule, PREDICTIONS[prediction], LABELS[label], INPUT_SCALES[scale])
    return Denoiser(ExactNetwork(exact, *parts), *parts)


def allowed(schedule: Schedule) -> list[str]:
    """The predictions that this schedule does not refuse."""
    return [name for name in PREDICTIONS if name not in ("eps", "score") or schedule(1.0).alpha > 0]


def lively(level: Level) -> Tensor:
    """A guidance scale that differs from level to level."""
    return 1.5 * level.sigma / torch.hypot(level.alpha, level.sigma) + 0.5


METHODS = {solver: name for name, solver in reversed(SOLVERS.items())}  # every method once, under its first name
PAIRS = list(product(LABELS, INPUT_SCALES))


@pytest.mark.parametrize("solver", METHODS, ids=METHODS.values())
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_law_1_and_3_agreement(schedule: str, solver: Solver) -> None:
    """For every schedule and solver, with and without guidance, from both ends, in 1 step, 2 and 3: all predictions
    give the samples of the exact denoiser itself."""
    path, turn = SCHEDULES[schedule], list(METHODS).index(solver)
    levels = {steps: Uniform().levels(path, steps) for steps in (1, 2, 3)}
    x = normal(2, 2) * float(torch.hypot(levels[1][0].alpha, levels[1][0].sigma))
    reference = {}
    for steps, guided in product(levels, (False, True)):
        denoise = cfg(PLANE, OTHER, lively) if guided else PLANE
        reference[steps, guided] = run(denoise, x, levels[steps], solver, fixed_noise(1))
        assert bool(reference[steps, guided].isfinite().all())
    names = allowed(path)
    if solver.adaptive:
        names = [names[turn % len(names)]]
    # An estimate by eps is divided by alpha, down to 5e-5 in the cosine table: that much of the digits is lost.
    tolerance = max(1e-9, 3e-12 * min(1e5, float(path(1.0).sigma / path(1.0).alpha)))
    if isinstance(solver, AnnealedLangevin):
        tolerance *= 100  # coarse Langevin steps drive samples apart
    for i, prediction in enumerate(names):
        # Which label and input scale, and whether guided, turns from solver to solver: all meet on the way.
        label, scale = PAIRS[(i + turn) % len(PAIRS)]
        good = shared(PLANE, schedule, prediction, label, scale)
        bad = shared(OTHER, schedule, prediction, label, scale)
        for steps in levels if i == turn % len(names) and not solver.adaptive else (3,):
            guided = (i + turn + steps) % 2 == 0
            denoise = cfg(good, bad, lively) if guided else good
            got, end = run(denoise, x, levels[steps], solver, fixed_noise(1)), reference[steps, guided]
            assert worst(got, end) < tolerance * (1 + float(end.abs().max())), (prediction, label, scale, steps)


@cache
def shared(exact: Denoise, schedule: str, *names: str) -> Denoise:
    """Built once, as the network keeps what it found out of its labels; with the smaller variance for DDPMLearned."""
    denoiser = exact_denoiser(exact, SCHEDULES[schedule], *names)

    def with_variance(x: Tensor, level: Level) -> Estimate:
        e = denoiser(x, level)
        return Estimate(e.x0, e.eps, torch.zeros_like(x))

    return with_variance


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("label", "scale"), product(LABELS, INPUT_SCALES))
def test_law_1_labels_and_input_scales(schedule: str, label: str, scale: str) -> None:
    path = SCHEDULES[schedule]
    x = normal(5, 2) * 3
    level = path(tensor(1.0, 0.8, 0.5, 0.2, 0.15).clamp(min=path.first))
    for prediction in allowed(path):
        e, exact = exact_denoiser(PLANE, path, prediction, label, scale)(x, level), PLANE(x, level)
        assert worst(level.mix(e.x0, e.eps), level.mix(exact.x0, exact.eps)) < 1e-9
        assert worst(e.eps, exact.eps) < 1e-6


# --- What the network is given ----------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """Remembers what it is given."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=dtype))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        self.seen.append((x, label))
        return x * self.weight


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_trap_P1_labels_of_all_levels_stay_distinct(label: str, dtype: torch.dtype) -> None:
    """In bfloat16 only 507 of 1000 times would survive."""
    network = Recorder(dtype)
    denoiser = Denoiser(network, LinearBetas(), V(), LABELS[label])
    denoiser(torch.zeros(1000, 1, dtype=dtype), LinearBetas()(torch.arange(1, 1001, dtype=torch.float64) / 1000))
    x, labels = network.seen[0]
    assert labels.dtype == torch.float32
    assert x.dtype == dtype
    assert len(labels.unique()) == 1000
    assert float(labels.diff().abs().min()) > (0.5 if label != "log_sigma" else 0.05)


def test_discrete_labels_are_those_of_the_table() -> None:
    label = TimeLabel(1000, -1)
    assert (
        worst(label(LinearBetas()(torch.arange(1, 1001, dtype=torch.float64) / 1000)), tensor(list(range(1000)))) < 1e-9
    )


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("schedule", [LinearBetas(), VP(), EDM(), Flow()], ids=lambda s: type(s).__name__)
def test_trap_S15_S20_the_network_is_told_exactly_the_solvers_level(grid: str, schedule: Schedule) -> None:
    try:
        levels = GRIDS[grid].levels(schedule, 7)
    except UndiffuseError:
        return  # this pair is refused: trap S5
    network = Recorder()
    denoiser = Denoiser(network, schedule, V(), LABELS["time"])
    run(denoiser, torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), levels, Euler())
    told = torch.stack([label[0] for _, label in network.seen])
    expected = torch.stack([1000 * level.t for level in levels[:-1]])
    assert worst(told.double(), expected) < 1e-4  # float32 of a number up to 1000
    assert bool((told.diff() < 0).all())


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_labels_and_scales_are_finite_at_both_ends(label: str, schedule: str) -> None:
    ends = SCHEDULES[schedule](tensor(0.0, 1.0))
    assert bool(LABELS[label](ends).isfinite().all())
    for scale in INPUT_SCALES.values():
        assert bool(scale(ends).isfinite().all())


def test_unit_variance_is_edms_c_in() -> None:
    level = EDM()(torch.linspace(0.1, 1, 9, dtype=torch.float64))
    assert worst(INPUT_SCALES["unit_variance"](level), 1 / (level.sigma**2 + 0.25).sqrt()) < 1e-12


def test_the_network_computes_in_its_own_type_and_x_keeps_its() -> None:
    network = Recorder(torch.bfloat16)
    e = Denoiser(network, VP(), V())(torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), VP()(0.5))
    assert network.seen[0][0].dtype == torch.bfloat16
    assert e.x0.dtype == e.eps.dtype == torch.float32


# --- Refusals ---------------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Says something of another shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return x[:, :1].expand(-1, self.channels, *x.shape[2:])


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_an_output_that_would_only_broadcast_is_refused(channels: int) -> None:
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(UndiffuseError, match="the network returned"):
        Denoiser(Wide(channels), VP(), V())(x, VP()(0.5))


def test_learned_variance_is_the_second_half() -> None:
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    e = Denoiser(Wide(6), VP(), V(), learned_variance=True)(x, VP()(0.5))
    assert e.variance is not None
    assert e.variance.shape == x.shape
    assert worst(e.variance, (x[:, :1].expand_as(x) + 1) / 2) < 1e-6
    with pytest.raises(UndiffuseError, match="learned variance"):
        Denoiser(Wide(3), VP(), V(), learned_variance=True)(x, VP()(0.5))


class Conditional(nn.Module):
    """Says its condition."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, label: Tensor, vector: Tensor) -> Tensor:
        return x * self.weight + vector.mean(1, keepdim=True)


def conditional() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(Conditional(), VP(), V(), conditions=Conditions({"classes": Classes(3, 4)}))


def test_trap_G5_a_condition_is_never_dropped() -> None:
    denoiser, x, level = conditional(), torch.zeros(2, 2), VP()(0.5)
    outputs = [denoiser(x, level, classes=torch.full((2,), i)).x0 for i in range(3)]
    outputs.append(denoiser(x, level, **denoiser.null(2)).x0)
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(outputs[i], outputs[j])
    assert torch.equal(denoiser.bind(classes=torch.tensor([1, 1]))(x, level).x0, outputs[1])
    assert torch.equal(denoiser.bind()(x, level).x0, outputs[3])
    with pytest.raises(UndiffuseError, match="pass classes"):
        denoiser(x, level)
    with pytest.raises(UndiffuseError, match="did you mean 'classes'"):
        denoiser(x, level, clases=torch.zeros(2, dtype=torch.long))
    with pytest.raises(UndiffuseError, match="unknown condition 'classes'"):
        Denoiser(Recorder(), VP(), V())(x, level, classes=torch.zeros(2, dtype=torch.long))


# --- Another schedule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["vp", "edm", "flow", "sub_vp", "cosine"])
def test_estimates_do_not_depend_on_the_schedule(other: str) -> None:
    """D4: sampling a model of DDPM's table on any schedule that covers less."""
    trained, asked = LinearBetas(), SCHEDULES[other]
    denoise = rescheduled(exact_denoiser(PLANE, trained, "eps"), trained)
    ratios = tensor(100.0, 10.0, 1.0, 0.05)
    x = normal(4, 2)
    for level in asked(asked.time_at(-2 * ratios[ratios < float(asked(1.0).sigma / asked(1.0).alpha)].log())):
        e, exact = denoise(x * level.sigma, level), PLANE(x * level.sigma, level)
        assert worst(e.x0, exact.x0) < 1e-8
        assert worst(e.eps, exact.eps) < 1e-8


def test_a_level_noisier_than_any_in_training_is_refused() -> None:
    with pytest.raises(UndiffuseError, match="outside this schedule's range"):
        rescheduled(PLANE, LinearBetas())(normal(2, 2), Flow()(1.0))


def test_a_whole_run_on_another_schedule_is_the_same_run() -> None:
    trained = LinearBetas()
    levels = Karras(most=50.0).levels(EDM(60.0), 8)
    x = normal(4, 2) * 60
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        direct = run(PLANE, x, levels, Euler())
        assert worst(run(rescheduled(exact_denoiser(PLANE, trained, "v"), trained), x, levels, Euler()), direct) < 1e-8


def test_the_denoiser_says_the_same_with_one_level_or_one_a_sample() -> None:
    denoiser, x = exact_denoiser(PLANE, VP(), "v"), normal(3, 2)
    level: Level = VP()(0.4)
    one, many = denoiser(x, level), denoiser(x, level.rows(3))
    assert worst(one.x0, many.x0) < 1e-13
    assert worst(one.eps, many.eps) < 1e-13
    assert isinstance(denoiser.prediction, V)
    assert not isinstance(denoiser.prediction, Eps)
