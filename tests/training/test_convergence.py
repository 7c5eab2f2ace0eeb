"""The end of improvement: curves whose future is known, and runs that stop by themselves with an annealed rate."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training_laws import points, recipe
from undiffuse.commands import main
from undiffuse.config import load_json
from undiffuse.errors import UndiffuseError
from undiffuse.pipeline import Pipeline
from undiffuse.training import Evaluation, Forecast, Progress, Recipe, forecast, run_training
from undiffuse.training import run as run_module
from undiffuse.training.convergence import constant_from, cool_down
from undiffuse.training.recipe import Plan, with_convergence

DATA = points(120)


def curve(law: Any, images: range, noise: float, scatter: float = 0.0, seed: int = 0) -> list[Evaluation]:
    generator = np.random.Generator(np.random.PCG64(seed))
    rows = []
    for n in images:
        loss = float(law(n) + scatter * generator.normal())
        rows.append(Evaluation(n, n, loss, loss, 10 * noise, noise, (), ()))
    return rows


def test_a_power_law_is_found_exactly() -> None:
    def law(n: float) -> float:
        return 0.3 + 50 * n**-0.5

    found = forecast(curve(law, range(1000, 50_001, 1000), noise=0.01))
    assert found is not None
    gain = law(50_000) - law(62_500)
    assert found.gain == pytest.approx(gain, rel=0.05)
    end = (50 * (1 - 1.25**-0.5) / 0.01) ** 2  # where a quarter more gains just the noise
    assert found.until == pytest.approx(end, rel=0.15)
    assert found.until_low <= found.until <= found.until_high
    assert not found.converged
    assert "improves measurably until about" in str(found)


def test_the_range_holds_the_truth_about_as_often_as_it_says() -> None:
    """80 % of forecasts from independent scatter should; an average's points are alike, so the fit claims less."""
    inside = 0
    for seed in range(60):
        rows = curve(lambda n: 0.3 + 50 * n**-0.5, range(2000, 60_001, 2000), 0.002, 0.002, seed)
        found = forecast(rows)
        assert found is not None
        truth = 50 * (60_000**-0.5 - 75_000**-0.5)
        inside += found.gain_high >= truth
    assert inside >= 0.85 * 60


@pytest.mark.parametrize(
    ("law", "converged"),
    [
        (lambda n: 0.4, True),  # flat
        (lambda n: 0.4 + 1e-6 * n, True),  # rising: it overfits
        (lambda n: 0.4 + 0.4 * np.exp(-n / 3000), True),  # over long ago
        (lambda n: 5 * n**-0.2, False),  # improves for ever
        (lambda n: 1 - 1e-5 * n, False),  # improves steadily
    ],
)
def test_converged_or_not(law: Any, converged: bool) -> None:
    for seed in range(5):
        found = forecast(curve(law, range(1000, 40_001, 1000), 0.001, 0.0003, seed))
        assert found is not None
        assert found.converged == converged, str(found)


@pytest.mark.parametrize(("share", "converged"), [(0.9, False), (1.1, True)])
def test_the_threshold_is_the_noise_itself(share: float, converged: bool) -> None:
    """An exact power law has no uncertainty, so its gain over the next quarter decides alone."""
    gain = 50 * (40_000**-0.5 - 50_000**-0.5)
    found = forecast(curve(lambda n: 0.3 + 50 * n**-0.5, range(1000, 40_001, 1000), share * gain))
    assert found is not None
    assert found.converged == converged
    doubtful = replace(found, gain=0.5 * found.noise, gain_high=1.5 * found.noise)
    assert not doubtful.converged, "what may be a gain is not yet none"


def test_it_says_nothing_before_it_knows_enough() -> None:
    rows = curve(lambda n: 0.4, range(1, 100), 0.01)
    assert forecast([]) is None
    assert forecast(rows[:5]) is None
    assert forecast(rows, begin=95) is None, "points of the warm-up do not count"
    assert forecast([*rows, replace(rows[-1], ema=None)]) is None
    assert forecast([replace(row, noise=None) for row in rows]) is None
    assert forecast([replace(row, ema=0.0, noise=0.0) for row in rows]) is not None


def small(images: int, **training: Any) -> Recipe:
    often = {"log_every": 5, "preview_every": 0, "checkpoint_every": 10, "evaluate_every": 5, "previews": 4}
    return with_convergence(recipe(DATA, images=images, **{**often, **training}), given_length=True)


def test_only_a_constant_learning_rate_is_extrapolated() -> None:
    chosen = small(1000)
    assert constant_from(chosen, Plan(None)) == chosen.optimiser.warmup
    assert constant_from(chosen, Plan(1000, 800)) is None
    constant = replace(chosen, optimiser=replace(chosen.optimiser, decay="constant"))
    assert constant_from(constant, Plan(1000)) == chosen.optimiser.warmup


def test_the_cool_down_is_a_fifth_of_the_run_and_never_exceeds_the_longest() -> None:
    chosen = small(1000)
    yes = Forecast(400, 0.4, 0.01, 0.0, 0.001, 400, 400, 400)
    no = replace(yes, gain_high=0.1)
    assert cool_down(chosen, 400, yes) == Plan(500, 400)
    assert cool_down(chosen, 400, no) is None
    assert cool_down(chosen, 404, yes) is None, "an estimate of another moment"
    assert cool_down(chosen, 400, None) is None
    assert cool_down(chosen, 800, no) == Plan(1000, 800)
    assert cool_down(chosen, 900, replace(yes, images=900)) == Plan(1000, 900)


def run(out: Path, images: int, **options: Any) -> Any:
    return run_training(DATA, small(images), out, **options)


def rates(out: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["images"], row["lr"]) for row in rows]


def test_a_run_that_does_not_converge_ends_at_its_longest_with_the_rate_at_zero(tmp_path: Path) -> None:
    said: list[str] = []
    result = run(tmp_path, 200, say=said.append)
    assert result.images == 200
    steady = [lr for images, lr in rates(tmp_path) if 8 < images <= 160]
    assert len(set(steady)) == 1
    assert rates(tmp_path)[-1][1] < 0.2 * steady[0]
    assert any(line.startswith("cool-down  the longest run allowed is near") for line in said)
    assert "until the held-out loss has converged, at most 200 images" in " ".join(" ".join(said).split())


def test_a_run_stops_when_it_has_converged_the_same_through_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge who finds it converged from 200 images on; the stop is in the cool-down, and its plan is kept."""

    def judge(rows: Any, begin: int = 0) -> Forecast | None:
        now = rows[-1].images if rows else 0
        return Forecast(now, 0.4, 0.01, 0.0, 0.001 if now >= 200 else 0.1, now, now, now) if now else None

    def stop(where: Progress) -> None:
        if where.step == 53:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(run_module, "forecast", judge)
    said: list[str] = []
    result = run(tmp_path / "straight", 10_000, say=said.append)
    assert result.images == 252, "200, a quarter more, and the batch is whole"
    assert any(line.startswith("cool-down  held-out loss 0.4000") for line in said)
    assert rates(tmp_path / "straight")[-1][1] < 0.1 * rates(tmp_path / "straight")[5][1]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", 10_000, progress=stop)
    run(tmp_path / "cut", 10_000)
    assert rates(tmp_path / "cut") == rates(tmp_path / "straight")
    both = [Pipeline.load(tmp_path / name).fingerprint for name in ("cut", "straight")]
    assert both[0] == both[1]


def test_what_cannot_be_judged_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = points(90)
    with pytest.raises(UndiffuseError, match="there are none: it needs 100 items"):
        run_training(few, small(100), tmp_path / "r")
    with pytest.raises(UndiffuseError, match=r"training.evaluate_every"):
        run_training(DATA, small(100, evaluate_every=0), tmp_path / "r")
    constant = replace(small(100), optimiser=replace(small(100).optimiser, decay="constant"))
    with pytest.raises(UndiffuseError, match=r"set optimiser\.decay=linear"):
        run_training(DATA, constant, tmp_path / "r")
    assert main(["train", "moons", "--until-converged", "--minutes", "1", "--out", str(tmp_path / "r")]) == 2
    assert "--until-converged has no time budget" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_the_command_allows_ten_times_the_recipe_or_what_is_given(tmp_path: Path) -> None:
    once = ["train", "moons", "--recipe", "tiny", "--until-converged"]
    assert main([*once, "--steps", "4", "--out", str(tmp_path / "a")]) == 0
    config = load_json(tmp_path / "a" / "config.json")["recipe"]["training"]
    assert (config["until_converged"], config["images"]) == (True, 64)
    assert "--until-converged" in (tmp_path / "a" / "command.txt").read_text()
    assert with_convergence(recipe(DATA, images=32), given_length=False).training.images == 320
