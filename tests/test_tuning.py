"""Tuning: the learned solver, the fit, where it is kept and when it is used."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from laws import F64, PLANE, no_noise, normal, one, run, worst
from undiffuse.asking import Sampling
from undiffuse.commands import main
from undiffuse.config import from_json, to_json
from undiffuse.data import from_array
from undiffuse.denoiser import INPUT_SCALES, LABELS, Denoise
from undiffuse.errors import UndiffuseError, UndiffuseWarning
from undiffuse.grids import GRIDS, Times
from undiffuse.levels import Estimate, Level
from undiffuse.noise import Streams
from undiffuse.pipeline import REGISTRIES, ModelConfig, Pipeline
from undiffuse.predictions import V
from undiffuse.sampling import default_sampling
from undiffuse.schedules import SCHEDULES, VP, Cosine, Schedule
from undiffuse.solvers import DEIS, IPNDM, SOLVERS, ExponentialAdams, Solver, UniPC
from undiffuse.solvers.learned import Learned
from undiffuse.tuning import (
    HELD_OUT,
    Tuned,
    _base_weights,
    _differentiable_end,
    _learned,
    distance,
    fine_solution,
    tune,
)

LIKE = torch.empty(0, dtype=F64)


def learned_from(base: Solver, schedule: Schedule, steps: int, points: int = 4) -> Learned:
    times = GRIDS["log_snr"].times(schedule, steps)
    return _learned(Times(tuple(times[:-1].tolist())), _base_weights(base, schedule, times, points))


# --- the solver -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "base", [IPNDM(1), IPNDM(3), DEIS(4), ExponentialAdams(4), UniPC(1), UniPC(3), UniPC(2, True)], ids=repr
)
@pytest.mark.parametrize("name", ["vp", "edm", "flow", "zero_terminal_snr"])
def test_a_learned_solver_with_the_weights_of_another_is_that_solver(base: Solver, name: str) -> None:
    schedule = SCHEDULES[name]
    grid = GRIDS["log_snr"]
    solver = learned_from(base, schedule, 7)
    x = normal(5, 2) * float(torch.hypot(schedule(1.0).alpha, schedule(1.0).sigma))
    wanted = run(PLANE, x, grid.levels(schedule, 7), base)
    assert worst(run(PLANE, x, grid.levels(schedule, 7), solver), wanted) < 1e-10
    # What the fit differentiates is what the solver does.
    weights = [torch.tensor(row, dtype=F64).reshape(-1, 2) for row in solver.weights]
    assert worst(_differentiable_end(PLANE, schedule, x, grid.times(schedule, 7), weights), wanted) < 1e-10


def random_learned(steps: int = 5) -> Learned:
    draw = torch.Generator().manual_seed(3)
    random = [torch.randn(min(n, 3), 2, dtype=F64, generator=draw).tolist() for n in range(steps - 1)]
    rows = tuple(tuple((a, b) for a, b in row) for row in random)
    return Learned(tuple(GRIDS["uniform"].nodes(Cosine(), steps).tolist()), rows)


def test_whatever_the_weights_a_constant_estimate_is_followed_exactly() -> None:
    x0, eps = normal(4, 2, seed=5), normal(4, 2, seed=6)
    levels, memory, solver = Times(random_learned().times).levels(Cosine(), 5), None, random_learned()
    x = levels[0].mix(x0, eps)
    for here, there in pairwise(levels):
        x, memory, _ = one(solver, lambda x, level: Estimate(x0, eps), x, here, there, no_noise, memory)
        assert worst(x, there.mix(x0, eps)) < 1e-12
    assert torch.equal(x, x0)


def test_trap_S21_a_learned_solver_asks_once_a_step_and_draws_no_noise() -> None:
    solver, memory = random_learned(), None
    levels = Times(solver.times).levels(Cosine(), 5)
    x = normal(3, 2)
    for here, there in pairwise(levels):
        x, memory, estimates = one(solver, PLANE, x, here, there, no_noise, memory)
        assert len(estimates) == 1
        if there.is_data:  # trap S12: the last step is the denoised estimate
            assert torch.equal(x, estimates[0].x0)


def test_samples_with_levels_of_their_own_are_stepped_as_if_apart() -> None:
    solver, schedule = random_learned(), Cosine()
    levels, x = Times(solver.times).levels(schedule, 5), normal(3, 2)
    rows = [level.rows(3) for level in levels]
    assert worst(run(PLANE, x, rows, solver), run(PLANE, x, levels, solver)) < 1e-12


def test_a_learned_solver_steps_only_where_it_was_learned() -> None:
    solver, x = random_learned(), normal(3, 2)
    with pytest.raises(UndiffuseError, match="learned for 5 steps on a grid of its own"):
        run(PLANE, x, GRIDS["log_snr"].levels(Cosine(), 5), solver)
    with pytest.raises(UndiffuseError, match=r"does not step from t = 1 to 0\.5"):
        run(PLANE, x, [Cosine()(1.0), Cosine()(0.5), Cosine()(0.0)], solver)
    with pytest.raises(UndiffuseError, match="learned for 5 steps"):  # begun in the middle: the past is missing
        run(PLANE, x, Times(solver.times).levels(Cosine(), 5)[2:], solver)
    with pytest.raises(UndiffuseError, match="learned for 5 steps"):  # the last step alone, also
        run(PLANE, x, [Cosine()(0.3), Cosine()(0.0)], solver)


@pytest.mark.parametrize(
    ("times", "weights"),
    [
        ((), ()),
        ((1.0, 1.0), ((),)),
        ((1.0, 0.0), ((),)),
        ((1.5, 0.5), ((),)),
        ((1.0, 0.5), ()),
        ((1.0, 0.5), (((0.1, 0.1),),)),
        ((1.0, 0.5, 0.2), ((), ((float("nan"), 0.0),))),
    ],
)
def test_what_is_no_learned_solver_is_refused(times: tuple, weights: tuple) -> None:
    with pytest.raises(UndiffuseError, match="learned solver"):
        Learned(times, weights)


def test_learned_settings_are_the_same_from_a_file() -> None:
    solver = random_learned()
    settings = Sampling(solver, Times(solver.times), 5)
    text = json.dumps(to_json(settings, REGISTRIES))
    assert from_json(Sampling, json.loads(text), "x", REGISTRIES) == settings


# --- the fit ----------------------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_differences() -> None:
    times = GRIDS["karras"].times(VP(), 6)
    x, end = normal(4, 2), normal(4, 2, seed=1)

    def loss(times: Tensor) -> Tensor:
        return distance(_differentiable_end(PLANE, VP(), x, times, _base_weights(DEIS(3), VP(), times, 3)), end)

    inner = times.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(inner), inner)
    for i in range(1, 6):
        shift = torch.zeros(7, dtype=F64)
        shift[i] = 1e-6 * times[i]
        slope = float(loss(times + shift) - loss(times - shift)) / float(2 * shift[i])
        assert abs(slope - float(gradient[i])) < 1e-4 * max(abs(slope), 1e-2), i


def tuned_for(denoise: Denoise, schedule: Schedule, calls: int, rounds: int = 3, samples: int = 16) -> Tuned:
    return tune(
        denoise, schedule, (2,), calls, solvers=["ipndm_2", "eab_3"], grids=["flow_uniform", "log_snr"],
        samples=samples, rounds=rounds, fine=100, like=LIKE,
    )  # fmt: skip


def fresh_error(denoise: Denoise, schedule: Schedule, tuned: Tuned | tuple, calls: int) -> float:
    """On noises that neither the fit nor its choice has seen."""
    solver, grid = (tuned.solver, tuned.grid) if isinstance(tuned, Tuned) else tuned
    x = Streams(77, 64).draw((2,), LIKE)
    x = x * float(torch.hypot(schedule(1.0).alpha, schedule(1.0).sigma))
    end = fine_solution(denoise, schedule, x, 200)
    return float(distance(run(denoise, x, grid.levels(schedule, calls), solver), end))


@pytest.mark.parametrize(
    ("name", "calls", "factor"), [("vp", 4, 0.8), ("edm", 5, 1), ("zero_terminal_snr", 4, 0.8), ("linear", 4, 0.8)]
)
def test_tuning_is_better_than_the_default_on_noises_it_has_not_seen(name: str, calls: int, factor: float) -> None:
    schedule = SCHEDULES[name]
    tuned = tuned_for(PLANE, schedule, calls, samples=64)
    assert tuned.error <= min(tuned.default, tuned.pairs[0].error)
    default = fresh_error(PLANE, schedule, default_sampling(calls), calls)
    assert fresh_error(PLANE, schedule, tuned, calls) < factor * default
    assert tuned.fine_error < 0.1 * tuned.error
    assert len(tuned.grid.times(schedule, calls)) == calls + 1


def test_the_errors_that_are_reported_are_those_of_the_solver_that_is_returned() -> None:
    tuned, schedule = tuned_for(PLANE, VP(), 5, rounds=2, samples=8), VP()
    assert isinstance(tuned.solver, Learned)
    for first, error in ((0, tuned.fitted), (HELD_OUT, tuned.error)):
        x = Streams(0, range(first, first + 8)).draw((2,), LIKE)
        x = x * float(torch.hypot(schedule(1.0).alpha, schedule(1.0).sigma))
        got = run(PLANE, x, tuned.grid.levels(schedule, 5), tuned.solver)
        assert float(distance(got, fine_solution(PLANE, schedule, x, 100))) == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_few_calls_are_tuned_too(calls: int) -> None:
    tuned = tuned_for(PLANE, VP(), calls, rounds=1, samples=4)
    assert tuned.error <= tuned.default
    assert tuned.calls == calls


def test_a_problem_that_every_solver_solves_stays_solved() -> None:
    def point(x: Tensor, level: Level) -> Estimate:
        x0 = 0.3 + 0 * x
        return Estimate(x0, (x - level.alpha * x0) / level.sigma)

    tuned = tuned_for(point, VP(), 4, rounds=1, samples=4)
    assert tuned.error < 1e-12


def test_a_denoiser_without_a_gradient_is_told_of_and_not_fitted() -> None:
    def opaque(x: Tensor, level: Level) -> Estimate:
        with torch.no_grad():
            e = PLANE(x, level)
        return Estimate(e.x0.clone(), e.eps.clone())

    with pytest.warns(UndiffuseWarning, match="gives no gradient"):
        tuned = tuned_for(opaque, VP(), 4, rounds=1, samples=4)
    assert tuned.error == min(tuned.default, tuned.pairs[0].error)


def test_the_same_seed_gives_the_same_grid() -> None:
    a, b = (tuned_for(PLANE, VP(), 3, rounds=1, samples=8) for _ in range(2))
    assert a == b


def test_progress_ends_at_its_total() -> None:
    seen: list[tuple[int, int]] = []
    tune(PLANE, VP(), (2,), 3, solvers=["euler", "eab_2"], samples=4, rounds=1, fine=20, like=LIKE,
         progress=lambda done, total: seen.append((done, total)))  # fmt: skip
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calls": 0}, "calls must be a whole number"),
        ({"calls": True}, "calls must be a whole number"),
        ({"calls": 2.0}, "calls must be a whole number"),
        ({"calls": 150}, "too near"),
        ({"samples": 0}, "samples must be"),
        ({"rounds": -1}, "rounds must be"),
        ({"points": 0}, "points must be"),
        ({"solvers": ["heum"]}, "did you mean 'heun'"),
        ({"solvers": ["heun"]}, "heun cannot be tuned"),
        ({"solvers": ["ddpm"]}, "ddpm cannot be tuned"),
        ({"solvers": ["lcm"]}, "lcm cannot be tuned"),
        ({"solvers": []}, "at least one solver"),
        ({"grids": ["karas"]}, "did you mean 'karras'"),
    ],
)
def test_what_cannot_be_tuned_is_refused(change: dict, message: str) -> None:
    calls = change.pop("calls", 4)
    with pytest.raises(UndiffuseError, match=message):
        tune(PLANE, VP(), (2,), calls, **change)


def test_a_model_that_has_diverged_is_refused() -> None:
    def broken(x: Tensor, level: Level) -> Estimate:
        return Estimate(x / 0, x)

    with pytest.raises(UndiffuseError, match="fine solution is not finite"):
        tune(broken, VP(), (2,), 4, samples=4)


# --- kept in the folder -----------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A network that nobody has trained, in ./m."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    spec = from_array(np.linspace(0, 1, 20, dtype=np.float32).reshape(10, 2)).spec
    network = {"in_channels": 2, "width": 16, "blocks": 1, "embedding": 16}
    config = ModelConfig("mlp", network, VP(), V(), LABELS["time"], INPUT_SCALES["none"])
    with torch.random.fork_rng(devices=[]):
        denoiser = config.build()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.normal_(std=0.3, generator=draw)
    return Pipeline(denoiser, config, spec, Sampling(steps=9), {}).save(tmp_path / "m")


def with_tuned(folder: Path, steps: int = 5) -> tuple[Pipeline, Sampling]:
    """The model with learned settings, which no fit has made, for so many steps."""
    pipeline = Pipeline.load(folder)
    solver = learned_from(IPNDM(3), VP(), steps)
    settings = replace(pipeline.sampling, solver=solver, grid=Times(solver.times), steps=steps)
    pipeline.tuned = (settings,)
    pipeline.save_settings(folder)
    return pipeline, settings


def test_tuned_settings_are_used_at_their_steps_and_only_then(model: Path) -> None:
    _, settings = with_tuned(model)
    pipeline = Pipeline.load(model)
    assert pipeline.tuned == (settings,)
    assert pipeline.settings(steps=5) == settings
    assert pipeline.calls(pipeline.settings(steps=5)) == 5
    usual = pipeline.sampling
    assert pipeline.settings() == usual
    others: list[dict[str, Any]] = [
        {"steps": 6},
        {"steps": 5, "solver": "heun"},
        {"steps": 5, "grid": "karras"},
        {"steps": 5, "threshold": "static"},
    ]
    for changes in others:
        asked = pipeline.settings(**changes)
        assert asked.solver != settings.solver, changes
        assert not isinstance(asked.grid, Times), changes
    # A picture that says how it was made is made like that again.
    assert pipeline.settings(to_json(replace(usual, steps=5), REGISTRIES)).solver == usual.solver


def test_tuned_settings_change_samples_at_their_steps_only(model: Path) -> None:
    plain = Pipeline.load(model)
    before = {steps: plain.sample(4, steps=steps) for steps in (5, 6)}
    pipeline, settings = with_tuned(model)
    assert np.array_equal(pipeline.sample(4, steps=6), before[6])
    assert not np.array_equal(pipeline.sample(4, steps=5), before[5])
    asked = pipeline.sample(4, steps=5, solver=settings.solver, grid=settings.grid)
    assert np.array_equal(asked, pipeline.sample(4, steps=5))


def test_when_the_default_number_of_steps_is_tuned_it_is_the_default(model: Path) -> None:
    pipeline, settings = with_tuned(model, steps=9)
    assert pipeline.settings() == settings
    assert torch.equal(pipeline.draw(3), pipeline.draw(3, sampling=settings))


def test_tuned_settings_of_other_weights_are_refused(model: Path) -> None:
    pipeline, _ = with_tuned(model)
    with torch.no_grad():
        next(pipeline.denoiser.parameters()).add_(1)
    other = Pipeline(pipeline.denoiser, pipeline.config, pipeline.spec, pipeline.sampling, {})
    stated = json.loads((model / "pipeline.json").read_text())
    other.save(model)
    assert "tuned" not in json.loads((model / "pipeline.json").read_text())  # new weights, nothing tuned
    (model / "pipeline.json").write_text(json.dumps(stated))
    with pytest.raises(UndiffuseError, match="tuned settings are of other weights"):
        Pipeline.load(model)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tuned: tuned.pop("weights"), "weights: is missing"),
        (lambda tuned: tuned["settings"][0].update(stpes=5), "did you mean 'settings[0].steps'"),
        (lambda tuned: tuned["settings"][0]["solver"].update(kind="lerned"), "did you mean 'learned'"),
        (lambda tuned: tuned["settings"][0]["solver"].update(times=[0.5, 1.0]), "must fall"),
        (lambda tuned: tuned["settings"][0]["solver"]["weights"].pop(), "needs a row of weights"),
        (lambda tuned: tuned["settings"][0]["solver"]["weights"][2].append([1, 2, 3]), "must hold 2 values"),
        (lambda tuned: tuned.update(settings="all"), "must be a list"),
    ],
)
def test_damaged_tuned_settings_are_refused(model: Path, damage: Callable[[dict], object], message: str) -> None:
    with_tuned(model)
    stated = json.loads((model / "pipeline.json").read_text())
    damage(stated["tuned"])
    (model / "pipeline.json").write_text(json.dumps(stated))
    with pytest.raises(UndiffuseError, match=re.escape(message)) as caught:
        Pipeline.load(model)
    assert "pipeline.json: tuned" in str(caught.value)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_list_of_solvers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solvers", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(SOLVERS)
    for row in rows:
        solver = SOLVERS[row["name"]]
        assert row["order"] == solver.order
        assert row["calls_per_step"] == solver.calls
        assert row["stochastic"] is solver.stochastic
        assert row["description"]
    assert main(["solvers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert {line.split()[0] for line in lines if line} >= set(SOLVERS)


def test_a_model_is_measured(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    with_tuned(model, steps=6)
    assert main(["solvers", "m", "--calls", "1,3,6", "--solvers", "heun,unipc_3,ddpm", "--samples", "16"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "take " in text
    assert Path("solvers.png").read_bytes()[:4] == b"\x89PNG"
    measured = json.loads(Path("solvers.json").read_text())
    rows = {(row["solver"], row["calls"]): row for row in measured["rows"]}
    names = ("default", "heun", "unipc_3", "ddpm")
    assert set(rows) == {("tuned", 6), *((name, n) for name in names for n in (1, 3, 6))}
    assert rows["heun", 3]["steps"] == 2
    assert rows["ddpm", 3]["error"] is None
    assert rows["heun", 6]["error"] > 0
    assert measured["best"] in measured["rows"]
    assert measured["command"].startswith("undiffuse s")


def test_a_solver_that_this_model_cannot_run_is_an_error_when_asked_for(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["solvers", "m", "--calls", "2", "--samples", "16", "--out", "a.json", "--solvers"]
    assert main([*words, "ddpm_learned"]) == 2
    assert "learned" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--calls 0", "--calls 0: give whole numbers"),
        ("--calls 5,x", "--calls 5,x: give whole numbers"),
        ("--solvers heum", "did you mean 'heun'"),
        ("--solvers rk45", "chooses its own number of calls"),
        ("--grid karas", "did you mean 'karras'"),
        ("--samples 3", "fewer than 16 samples"),
        ("--out x.txt", "write a .png"),
        ("--tune 0", "calls must be a whole number of at least 1"),
        ("--tune -4", "calls must be a whole number of at least 1"),
    ],
)
def test_a_mistake_is_one_line(model: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = (model / "pipeline.json").read_text()
    assert main(["solvers", "m", *words.split()]) == 2
    seen = capsys.readouterr()
    assert message in seen.err
    assert seen.err.count("\n") == 1
    assert (model / "pipeline.json").read_text() == before


def test_tuning_needs_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solvers", "--tune", "8"]) == 2
    assert "--tune needs a model" in capsys.readouterr().err


def test_tuned_on_the_command_line_used_by_sample_and_made_again_from_its_picture(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["solvers", "m", "--tune", "2", "--samples", "4"]) == 0
    assert "a tuned grid for 2 calls is kept" in capsys.readouterr().out
    assert main(["sample", "m", "--steps", "2", "-n", "4", "--out", "a.png"]) == 0
    assert "tuned grid, 2 steps" in capsys.readouterr().out
    assert main(["sample", "m", "--steps", "3", "-n", "4", "--out", "b.png"]) == 0
    assert "tuned" not in capsys.readouterr().out
    assert main(["sample", "--from", "a.png", "--out", "c.png"]) == 0
    assert Path("a.png").read_bytes() == Path("c.png").read_bytes()
    # Again: replaced, not doubled; another number of calls: added.
    assert main(["solvers", "m", "--tune", "2", "--samples", "4", "--seed", "1"]) == 0
    assert main(["solvers", "m", "--tune", "1", "--samples", "4"]) == 0
    assert [each.steps for each in Pipeline.load(model).tuned] == [2, 1]


# --- the recommendation -----------------------------------------------------------------------------------------------


def test_what_sampling_noise_cannot_tell_apart_the_distance_to_the_fine_solution_does() -> None:
    from undiffuse.commands.solvers import Row, _recommend

    rows = [
        Row(solver="default", grid="default", calls=5, steps=5, error=0.005, frechet=4.41),
        Row(solver="heun", grid="uniform", calls=5, steps=3, error=0.012, frechet=4.39),
        Row(solver="ddpm", grid="uniform", calls=5, steps=5, error=None, frechet=4.40),
    ]
    assert _recommend(rows, 4.41, Path("runs/x"), "uniform")[0] is rows[0]
