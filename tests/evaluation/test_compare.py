"""Comparisons: what is held constant is so by construction, and the verdict is honest."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from undiffuse import Pipeline, UndiffuseError, from_array, make_recipe
from undiffuse.commands import main
from undiffuse.config import override
from undiffuse.data.base import ArrayDataset
from undiffuse.evaluation import compare
from undiffuse.evaluation.compare import Arm, Compared, arms_of, changed, constants, run_comparison, verdict
from undiffuse.evaluation.compare_report import curves
from undiffuse.evaluation.experiments import EXPERIMENTS
from undiffuse.evaluation.paired import difference, t_quantile, t_tail
from undiffuse.pipeline import REGISTRIES
from undiffuse.training import Recipe, Trainer, divide


def points(count: int = 300) -> ArrayDataset:
    """Two clouds, of which each is a class."""
    random = np.random.Generator(np.random.PCG64(0))
    side = random.integers(0, 2, count)
    values = (random.normal(size=(count, 2)) * 0.3 + 2 * side[:, None]).astype(np.float32)
    dataset = from_array(values, np.array(["left", "right"])[side], name="clouds")
    assert isinstance(dataset, ArrayDataset)
    return dataset


def recipe(dataset: ArrayDataset, *settings: str) -> Recipe:
    made = make_recipe("tiny", dataset.spec, len(dataset))
    return override(made, ("training.images=160", "training.evaluate_every=5", *settings), REGISTRIES)


def compared(out: Path, vary: str, *settings: str, **options: Any) -> Compared:
    dataset = points()
    arms = arms_of({"tiny": recipe(dataset, *settings)}, [vary])
    given: dict[str, Any] = {"seeds": 2, "samples": 64, "cache": out / "cache", **options}
    return run_comparison(dataset, arms, out / "compared", **given)


# --- the test ---------------------------------------------------------------------------------------------------------


def test_students_t_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in range(1, 30):
        for t in (0.0, 0.3, 1.0, 2.5, 40.0):
            assert t_tail(t, freedom) == pytest.approx(2 * stats.t.sf(t, freedom), abs=1e-13)
        assert t_quantile(0.05, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


def test_students_t_with_one_degree_of_freedom_is_cauchys() -> None:
    for t in (0.5, 1.0, 12.7062):
        assert t_tail(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-13)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_interval_covers_and_a_difference_is_seen_by_chance_in_one_of_twenty(seeds: int) -> None:
    random = np.random.Generator(np.random.PCG64(seeds))
    trials = random.normal(size=(2000, seeds))
    seen = np.mean([difference("kid", "a", "b", trial).seen for trial in trials])
    assert abs(seen - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 2000)
    three = random.normal(size=(2000, 3, seeds))  # three pairs: some difference is seen at most as often
    seen = np.mean([any(difference("kid", "a", "b", pair, 3).seen for pair in trial) for trial in three])
    assert seen < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 2000)


def test_the_interval_is_that_of_scipys_paired_test() -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = np.array([3.0, 4.5, 2.0, 3.3]), np.array([2.5, 4.4, 1.1, 3.0])
    theirs = stats.ttest_rel(b, a)
    ours = difference("kid", "a", "b", b - a)
    assert ours.p == pytest.approx(theirs.pvalue)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))


def test_one_seed_concludes_nothing_and_equal_differences_are_not_certain() -> None:
    alone = difference("kid", "a", "b", [5.0], errors=[0.1])
    assert (alone.seen, alone.p) == (False, None)
    assert "nothing follows" in verdict(alone)
    equal = difference("precision", "a", "b", [0.01, 0.01, 0.01], errors=[0.02, 0.02, 0.02])
    assert not equal.seen  # the spread over seeds is 0 by chance, that over samples is not


def test_the_verdict_names_the_better_arm() -> None:
    less = difference("frechet", "a", "b", [-1.0, -1.1, -0.9])
    assert verdict(less).startswith("b is better than a")
    more = difference("precision", "a", "b", [-1.0, -1.1, -0.9])
    assert verdict(more).startswith("a is better than b")
    none = difference("frechet", "a", "b", [-1.0, 1.1, 0.2])
    assert verdict(none).startswith("no difference seen between a and b")


# --- what is held constant --------------------------------------------------------------------------------------------


def test_arms_that_differ_in_nothing_that_matters_are_the_same_to_the_last_bit(tmp_path: Path) -> None:
    found = compared(tmp_path, "training.keep=1,2", "model.conditional=false")
    for figure in found.figures:
        a, b = (found.of(arm, figure) for arm in found.arms)
        assert a == b, figure
    assert all(each.mean == 0 and not each.seen for each in found.differences)
    assert found.verdict[0].startswith("no difference seen")
    for run in found.runs:
        assert run.samples is not None
    one, two = ([(run.samples or Path()).name[-12:] for run in found.runs if run.arm == arm] for arm in found.arms)
    assert one == two  # named by the digest of the weights and settings


def test_arms_begin_with_the_same_weights_see_the_same_items_and_sample_from_the_same_noise(tmp_path: Path) -> None:
    dataset = points()
    seen: dict[str, list[list[int]]] = {}
    first: dict[str, dict[str, torch.Tensor]] = {}
    for arm in arms_of({"tiny": recipe(dataset)}, ["prediction=v,flow"]):
        train, _ = divide(dataset, arm.recipe.training)
        trainer = Trainer(train, arm.recipe, seed=3, device="cpu", workers=0)
        first[arm.name] = {name: tensor.clone() for name, tensor in trainer.denoiser.state_dict().items()}
        reads: list[list[int]] = []
        read = train.read
        train.read = lambda indices, reads=reads, read=read: (reads.append(list(indices)), read(indices))[1]  # type: ignore[method-assign]
        for _ in trainer.updates():
            pass
        seen[arm.name] = reads
    one, two = first.values()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    a, b = seen.values()
    assert len(a) >= 10
    assert a == b
    found = compared(tmp_path, "prediction=v,flow", seeds=1)
    starts = [Pipeline.load(run.path).begin(5, seed=run.seed).x for run in found.runs]
    assert torch.equal(*starts)


def test_what_differs_is_said() -> None:
    dataset = points()
    arms = arms_of({"tiny": recipe(dataset)}, ["batch_size=16,32"])
    said = {each.what: each.same for each in constants(dataset, arms)}
    assert not said["batches, their order, times' quantiles and noise"]
    assert said["images seen"]
    assert said["network and its initial weights"]
    assert compare.differing(arms) == {"training.batch_size": ("16", "32")}
    wider = constants(dataset, arms_of({"tiny": recipe(dataset)}, ["size=tiny,small"]))
    assert not {each.what: each.same for each in wider}["network and its initial weights"]


def test_losses_in_different_units_are_marked_and_never_subtracted(tmp_path: Path) -> None:
    found = compared(tmp_path, "weight=unit,min_snr", seeds=1)
    assert all(each.figure != "held_out_loss" for each in found.differences)
    page = (found.path / "report.html").read_text()
    assert "NOT comparable between these arms" in page
    assert "‡ each in its own unit" in page
    with pytest.raises(UndiffuseError, match="different units"):
        compared(tmp_path, "weight=unit,min_snr", metric="held_out_loss")


def test_G6_other_sampling_settings_are_another_fingerprint_and_a_mark(tmp_path: Path) -> None:
    found = compared(tmp_path, "steps=2,5", seeds=1)
    assert len(set(found.fingerprints.values())) == 2
    assert "†" in (found.path / "report.html").read_text()
    same = compared(tmp_path / "b", "lr=0.01,0.02", seeds=1)
    assert len(set(same.fingerprints.values())) == 1


# --- stopping, going on, failing --------------------------------------------------------------------------------------


def test_stopped_anywhere_it_goes_on_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compared(tmp_path / "whole", "lr=0.01,0.02")
    calls = 0

    def stop(at: int) -> Any:
        def step(progress: object) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt

        return step

    for at in (3, 8):
        calls = 0
        with pytest.raises(KeyboardInterrupt):
            compared(tmp_path / "parts", "lr=0.01,0.02", progress=stop(at))
    draw = Pipeline.draw
    monkeypatch.setattr(compare, "BATCH", 16)
    drawn: list[range] = []

    def interrupted(self: Pipeline, samples: range | int, **options: Any) -> torch.Tensor:
        if isinstance(samples, range):  # not a preview
            drawn.append(samples)
            if len(drawn) == 3:
                raise KeyboardInterrupt
        return draw(self, samples, **options)

    monkeypatch.setattr(Pipeline, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compared(tmp_path / "parts", "lr=0.01,0.02")
    found = compared(tmp_path / "parts", "lr=0.01,0.02")
    assert drawn[3] == drawn[2]  # the two batches before it are kept
    monkeypatch.undo()
    for a, b in zip(whole.runs, found.runs, strict=True):
        assert {name: f.value for name, f in a.figures.items()} == pytest.approx(
            {name: f.value for name, f in b.figures.items()}, rel=1e-4
        )
        assert a.curves == b.curves
        weights = [Pipeline.load(run.path).fingerprint for run in (a, b)]
        assert weights[0] == weights[1]
    assert found.state == "finished"


def test_other_sampling_settings_sample_anew_from_the_same_runs(tmp_path: Path) -> None:
    first = compared(tmp_path, "lr=0.01,0.02", "sampling.steps=2", seeds=1)
    then = compared(tmp_path, "lr=0.01,0.02", "sampling.steps=5", seeds=1)
    assert first.fingerprints != then.fingerprints
    assert then.of(then.arms[0], "frechet") != first.of(first.arms[0], "frechet")
    assert then.runs[0].curves == first.runs[0].curves


def test_quality_during_training_has_a_curve_for_each_arm(tmp_path: Path) -> None:
    settings = ("training.quality_every=5", "training.quality_samples=60")
    found = compared(tmp_path, "lr=0.01,0.02", *settings)
    (name,) = {name for run in found.runs for name in run.curves if name != "held_out_loss"}
    assert "sliced wasserstein" in name
    assert all([images for images, _ in run.curves[name]] == [80, 160] for run in found.runs)
    charts = {chart.title: chart for chart in curves(found)}
    chart = charts["Held-out loss"]
    line = next(line for line in chart.lines if line.name == found.arms[0])
    values = [run.curves["held_out_loss"][-1][1] for run in found.runs if run.arm == found.arms[0]]
    assert line.y[-1] == pytest.approx(np.mean(values))
    assert name in (found.path / "report.html").read_text()


def test_an_arm_that_diverges_is_a_result(tmp_path: Path) -> None:
    found = compared(tmp_path, "lr=0.01,1e30", "optimiser.clip=1e30", seeds=1)
    assert [run.state for run in found.runs] == ["finished", "diverged"]
    assert found.verdict == ()
    assert "not finite" in (found.path / "report.html").read_text()


def test_more_seeds_go_on_from_fewer(tmp_path: Path) -> None:
    first = compared(tmp_path, "lr=0.01,0.02", seeds=1)
    then = compared(tmp_path, "lr=0.01,0.02", seeds=2)
    assert then.runs[0].figures == first.runs[0].figures
    assert then.seeds == (0, 1)


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("lr", "write it as path=one,other"),
        ("lr=0.1", "write it as path=one,other"),
        ("lr=0.1,,2", "write it as path=one,other"),
        ("lr=0.001,0.001", "the same recipe"),
        ("schedul=linear,cosine", "unknown name 'schedul'"),
        ("prediction=eps,v", "zero"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(vary: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UndiffuseError, match=message):
        compared(tmp_path, vary)
    assert not (tmp_path / "compared" / "runs").exists()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "compared").mkdir()
    (tmp_path / "compared" / "thesis.tex").write_text("x")
    with pytest.raises(UndiffuseError, match="something else"):
        compared(tmp_path, "lr=0.01,0.02")


def test_too_few_samples_for_the_metric_are_refused_before_training(tmp_path: Path) -> None:
    random = np.random.Generator(np.random.PCG64(0))
    dataset = from_array(random.normal(size=(200, 70)).astype(np.float32), None, name="wide")
    arms = arms_of({"tiny": make_recipe("tiny", dataset.spec, 200)}, ["lr=0.01,0.02"])
    with pytest.raises(UndiffuseError, match="70"):
        run_comparison(dataset, arms, tmp_path / "x", samples=64, cache=tmp_path)
    with pytest.raises(UndiffuseError, match="at least"):
        run_comparison(dataset, arms, tmp_path / "z", samples=4, metric="kid", cache=tmp_path)
    with pytest.raises(UndiffuseError, match="accuracy needs probabilities"):
        run_comparison(dataset, arms, tmp_path / "y", samples=80, metric="accuracy", cache=tmp_path)
    with pytest.raises(UndiffuseError, match="did you mean 'frechet'"):
        run_comparison(dataset, arms, tmp_path / "y", samples=80, metric="frechett", cache=tmp_path)


# --- words ------------------------------------------------------------------------------------------------------------


def test_two_settings_give_their_product_and_values_may_be_json() -> None:
    base = recipe(points())
    arms = arms_of({"tiny": base}, ["lr=0.1,0.2", 'weight=unit,{"kind": "min_snr", "gamma": 1}'])
    assert [arm.name for arm in arms] == [
        "lr=0.1 weight=unit",
        "lr=0.1 weight=min_snr gamma=1",
        "lr=0.2 weight=unit",
        "lr=0.2 weight=min_snr gamma=1",
    ]
    betas = arms_of({"tiny": base}, ["betas=[0.9, 0.95],[0.9, 0.99]"])
    assert [arm.recipe.optimiser.betas for arm in betas] == [(0.9, 0.95), (0.9, 0.99)]
    assert [arm.name for arm in arms_of({"a": base, "b": replace(base, name="b")})] == ["a", "b"]


def test_a_short_path_must_be_clear() -> None:
    base = recipe(points())
    assert (
        changed(base, ["schedule=cosine"]).model.schedule == REGISTRIES[type(base.model.schedule).__mro__[1]]["cosine"]
    )
    assert changed(base, ["steps=7"]).sampling.steps == 7
    with pytest.raises(UndiffuseError, match=r"network.*"):
        changed(base, ["networks=3"])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_experiments_are_sound(name: str) -> None:
    chosen = EXPERIMENTS[name]
    random = np.random.Generator(np.random.PCG64(0))
    side = {"mnist": 28, "digits": 8}[chosen.data]
    images = random.integers(0, 256, (60, side, side)).astype(np.uint8)
    dataset = from_array(images, np.arange(60) % 10, name=chosen.data)
    base = changed(make_recipe(chosen.recipe, dataset.spec, len(dataset)), chosen.set)
    arms = arms_of({chosen.recipe: base}, chosen.vary)
    assert len(arms) >= 2
    for arm in arms:
        arm.recipe.check(dataset.spec)
    said = {each.what: each.same for each in constants(dataset, arms) if each.what != "unit of the held-out loss"}
    assert all(said.values()), said


def test_the_command_writes_a_page_that_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))
    words = "compare tiny --data moons --vary prediction=v,flow --images 64 --seeds 2 --samples 64 --against 200"
    assert main(words.split()) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    out = tmp_path / "runs" / "compare-tiny-prediction-v-flow"
    page = (out / "report.html").read_text()
    assert "default-src 'none'" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    result = json.loads((out / "result.json").read_text())
    assert result["state"] == "finished"
    assert result["arms"] == ["prediction=v", "prediction=flow"]
    assert "undiffuse compare tiny" in result["command"]
    assert main([*words.split(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["values"].keys() == {"prediction=v", "prediction=flow"}
    assert main(["compare", "images", "--vary", "lr=1,2"]) == 2
    assert "--data is missing" in capsys.readouterr().err
    assert main(["compare", "--experiment", "min-srn"]) == 2
    assert "did you mean 'min-snr'" in capsys.readouterr().err
    assert main(["compare"]) == 2


def test_what_is_known_of_items_can_be_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--attributes` and `--numbers` as for train: the models take them, and samples are asked for by real items."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))
    data = points()
    np.savez("clouds.npz", x=data.values(range(300)), side=np.array(["l", "r"])[data.labels], age=np.arange(300.0))
    words = "compare tiny --data clouds.npz --attributes side --numbers age --vary prediction=v,flow --images 64"
    assert main([*words.split(), "--seeds", "1", "--samples", "64", "--against", "200"]) == 0
    out = tmp_path / "runs" / "compare-tiny-prediction-v-flow"
    models = [Pipeline.load(folder) for folder in out.rglob("model") if (folder / "pipeline.json").is_file()]
    assert [model.names for model in models] == [("attributes", "numbers", "side", "age")] * 2
    command = json.loads((out / "result.json").read_text())["command"]
    assert "--attributes side --numbers age" in command
    capsys.readouterr()


def test_arms_of_one_folder_are_refused(tmp_path: Path) -> None:
    dataset = points()
    arms = [Arm("a b", recipe(dataset)), Arm("a-b", recipe(dataset, "optimiser.lr=0.1"))]
    with pytest.raises(UndiffuseError, match="share a folder"):
        run_comparison(dataset, arms, tmp_path / "x", cache=tmp_path)
