"""``undiffuse evaluate``: the numbers, what they are of, and the page; through the command where that is the point."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import undiffuse
from undiffuse import Evaluation, Pipeline, UndiffuseError, comparable, read_evaluation
from undiffuse.commands import main
from undiffuse.commands.evaluate import report
from undiffuse.data import open_dataset
from undiffuse.denoiser import TimeLabel
from undiffuse.evaluation.extraction import FEATURES
from undiffuse.evaluation.learned import Budget, LearnedClassifier
from undiffuse.evaluation.report import beside
from undiffuse.evaluation.samples import Judgeable, class_plan, draw
from undiffuse.training.held_out import Curve, Probe
from undiffuse.training.held_out import Evaluation as Point

Rows = Callable[..., str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of the digits, hardly trained."""
    folder = tmp_path_factory.mktemp("evaluate") / "runs" / "digits"
    undiffuse.train("digits", recipe="tiny", out=folder, device="cpu")
    return folder


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rows:
    """Writes an array under a name; the command runs beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))

    def write(name: str, values: np.ndarray) -> str:
        np.save(tmp_path / name, values)
        return name

    return write


def normal(n: int, seed: int, dim: int = 6) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).standard_normal((n, dim)).astype(np.float32)


def value(found: Evaluation, name: str) -> float:
    return found.metrics[name]["value"]


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_gaussians_have_the_frechet_distance_of_algebra(rows: Rows, capsys: pytest.CaptureFixture[str]) -> None:
    """9 (|m|^2 + sum (s - 1)^2) for 5 + 3 N(m, s^2) against 5 + 3 N(0, 1): as they are, not in model units."""
    mean, deviation = np.linspace(0, 2, 6, dtype=np.float32), np.linspace(0.5, 3, 6, dtype=np.float32)
    exact = 9 * float((mean**2).sum() + ((deviation - 1) ** 2).sum())
    rows("a.npy", 5 + 3 * (mean + deviation * normal(4000, 0)))
    rows("b.npy", 5 + 3 * normal(8000, 1))
    assert main(["evaluate", "a.npy", "--against", "b.npy", "--features", "identity", "--extrapolate", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for name in ("frechet", "frechet_infinity"):
        figure = found["metrics"][name]
        assert figure["interval"][0] < exact < figure["interval"][1]
        assert figure["value"] == pytest.approx(exact, rel=0.03)
        assert figure["n"] == 4000
    assert 0 <= found["metrics"]["frechet"]["floor"] < 0.2
    assert found == json.loads((Path(found["path"]) / "evaluation.json").read_text())
    assert {"fingerprint", "memorisation", "environment"} <= set(found)


def test_real_data_are_at_the_floor_and_not_called_copies(rows: Rows) -> None:
    everything = normal(6000, 2)
    found = undiffuse.evaluate(rows("new.npy", everything[:2000]), rows("data.npy", everything[2000:]))
    for each in found.metrics.values():
        (low, high), (floor_low, floor_high) = each["interval"], each["floor_interval"]
        assert max(low, floor_low) <= min(high, floor_high)
    assert found.memorisation is not None
    assert not found.memorisation["memorised"]
    assert found.memorisation["copies"] == 0


def test_a_copied_training_set_is_called_memorised(rows: Rows) -> None:
    data = normal(3000, 3)
    found = undiffuse.evaluate(rows("copies.npy", data[:500]), rows("data.npy", data))
    assert found.memorisation is not None
    assert found.memorisation["memorised"]
    assert found.memorisation["copies"] == 500
    assert "MEMORISED" in report(found)


def test_trap_V7_a_collapsed_set_has_precision_and_no_recall(rows: Rows) -> None:
    found = undiffuse.evaluate(rows("a.npy", 0.2 * normal(1000, 4)), rows("b.npy", normal(3000, 5)))
    assert value(found, "precision") > 0.95
    assert value(found, "recall") < 0.05


def test_order_changes_nothing(rows: Rows) -> None:
    a, b = 0.3 + normal(900, 6), normal(2000, 7)
    shuffled = np.random.Generator(np.random.PCG64(0)).permutation(len(a))
    first = undiffuse.evaluate(rows("a.npy", a), rows("b.npy", b))
    second = undiffuse.evaluate(rows("c.npy", a[shuffled]), "b.npy")
    for name, each in first.metrics.items():
        assert second.metrics[name]["value"] == pytest.approx(each["value"], rel=1e-9, abs=1e-9)
    assert comparable(first, second)
    assert first.samples["fingerprint"] != second.samples["fingerprint"]


def test_batch_size_changes_nothing_but_rounding(model: Path, rows: Rows) -> None:
    found = [
        undiffuse.evaluate(str(model), "digits", features="pca", number=200, steps=2, batch_size=size, out=f"b{size}")
        for size in (64, 7)
    ]
    for name, each in found[0].metrics.items():
        assert found[1].metrics[name]["value"] == pytest.approx(each["value"], rel=1e-3, abs=1e-3)
    assert comparable(*found)
    assert found[0].samples["fingerprint"] == found[1].samples["fingerprint"]


# --- traps ------------------------------------------------------------------------------------------------------------


def test_trap_V4_fewer_samples_than_features_have_no_frechet_distance_but_the_rest(rows: Rows) -> None:
    rows("a.npy", normal(60, 8, 64))
    rows("b.npy", normal(600, 9, 64))
    found = undiffuse.evaluate("a.npy", "b.npy", features="identity")
    assert "frechet" not in found.metrics
    assert {"kid", "precision", "recall"} <= set(found.metrics)
    assert "60 rows do not span the 64 dimensions" in found.refused["frechet"]
    assert "take more samples (-n)" in found.refused["frechet"]
    assert "frechet: 60 rows" in report(found)
    with pytest.raises(UndiffuseError, match="do not span"):
        undiffuse.evaluate("a.npy", "b.npy", features="identity", metrics="frechet")
    with pytest.warns(undiffuse.UndiffuseWarning, match="mostly bias"):
        forced = undiffuse.evaluate("a.npy", "b.npy", features="identity", metrics="frechet", allow_small=True)
    assert "mostly bias" in forced.metrics["frechet"]["note"]


def test_trap_V8_other_data_under_the_same_name_are_other_data(rows: Rows) -> None:
    rows("a.npy", normal(300, 10))
    rows("b.npy", normal(900, 11))
    before = undiffuse.evaluate("a.npy", "b.npy")
    rows("b.npy", 1 + normal(900, 12))
    after = undiffuse.evaluate("a.npy", "b.npy")
    assert value(after, "frechet") > value(before, "frechet") + 3
    assert not comparable(before, after)


def test_trap_V9_floats_and_8_bits_of_the_same_pictures_are_the_same_samples(rows: Rows) -> None:
    pictures = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (400, 8, 8, 3)).astype(np.uint8)
    pictures[0, 0, 0], pictures[0, 0, 1] = 0, 255
    rows("data.npy", np.random.Generator(np.random.PCG64(1)).integers(0, 256, (800, 8, 8, 3)).astype(np.uint8))
    whole = undiffuse.evaluate(rows("whole.npy", pictures), "data.npy", features="pca")
    parts = undiffuse.evaluate(rows("parts.npy", pictures / 255), "data.npy", features="pca", span=(0, 1))
    assert {n: e["value"] for n, e in whole.metrics.items()} == {n: e["value"] for n, e in parts.metrics.items()}
    assert whole.data["quantisation"].startswith("both sides uint8")


def test_low_dimensional_samples_are_compared_in_the_units_of_the_data(rows: Rows) -> None:
    """Floats of [0, 1] and bytes of the same signals have the same distances, in the data's units."""
    values = np.random.default_rng(0).integers(0, 256, (400, 2, 4, 5), np.uint8)
    values[0, 0, 0, :2] = 0, 255
    rows("data.npy", np.random.default_rng(1).integers(0, 256, (900, 2, 4, 5), np.uint8))
    bytes_, floats = (
        undiffuse.evaluate(rows(name, samples), "data.npy", features="identity", metrics="sliced_wasserstein,mmd")
        for name, samples in {"bytes.npy": values, "floats.npy": (values / 255).astype(np.float32)}.items()
    )
    for name in ("sliced_wasserstein", "mmd"):
        assert value(floats, name) == pytest.approx(value(bytes_, name), rel=1e-9)


def test_videos_have_a_drift_against_the_datas(rows: Rows, tmp_path: Path) -> None:
    """Frames that brighten by 10 have a step of 10; frozen ones have none."""
    start = np.random.default_rng(0).integers(0, 150, (30, 1, 4, 4, 1), np.uint8)
    moving = start + 10 * np.arange(4, dtype=np.uint8)[:, None, None, None]
    for name, clips in {"data": moving, "still": np.repeat(start, 4, 1)}.items():
        for i, clip in enumerate(clips):
            (tmp_path / name / f"{i:03d}").mkdir(parents=True)
            for k, frame in enumerate(clip):
                Image.fromarray(frame[..., 0]).save(tmp_path / name / f"{i:03d}" / f"{k}.png")
    found = undiffuse.evaluate("still", "data", frames=4, features="pca", metrics="drift")
    drift = found.metrics["drift"]
    assert (drift["value"], drift["better"]) == (0, "as the data")
    assert drift["floor"] == pytest.approx(10, abs=1e-6)


def test_trap_V10_the_report_says_against_what_and_marks_what_cannot_be_compared(rows: Rows) -> None:
    rows("a.npy", normal(300, 13))
    rows("b.npy", normal(900, 14))
    rows("test.npy", normal(300, 15))
    first = undiffuse.evaluate("a.npy", "b.npy")
    again = undiffuse.evaluate("a.npy", "b.npy", out="again")
    second = undiffuse.evaluate("a.npy", "b.npy", held_out="test.npy")
    fewer = undiffuse.evaluate("a.npy", "b.npy", number=200)
    assert first.data["split"] == "300 rows of the data set aside at random, seed 0"
    assert second.data["split"] == "300 held-out rows"
    assert second.data["held_out"]["name"] == "test.npy"
    assert comparable(first, again)
    assert len({each.fingerprint for each in (first, second, fewer)}) == 3
    (table, _), (alone,) = beside([first, second]), beside([first, again])
    assert table.html().count("≠") == 1
    assert "≠" not in alone.html()
    assert "≠" in (Path(fewer.path) / "report.html").read_text()


def test_trap_V12_a_likelihood_says_of_what_kind_it_is_and_how_sure(rows: Rows) -> None:
    undiffuse.train("moons", recipe="tiny", out="runs/moons", device="cpu")
    found = undiffuse.evaluate("runs/moons", "moons", number=100, steps=2, likelihood=10)
    assert found.likelihood is not None
    assert found.likelihood["items"] == 10
    assert found.likelihood["unseen"]  # the run's own held-out items
    assert found.likelihood["error"] > 0
    assert "density" in found.likelihood["kind"]
    assert {"sliced_wasserstein", "mmd"} <= set(found.metrics)


def test_trap_V13_kid_of_few_samples(rows: Rows) -> None:
    found = undiffuse.evaluate(rows("a.npy", normal(5, 16, 2)), rows("b.npy", normal(200, 17, 2)), metrics="kid")
    assert np.isfinite(value(found, "kid"))
    assert found.metrics["kid"]["n"] == 5


def test_trap_G6_the_class_plan_is_recorded_and_moves_the_fingerprint(model: Path, rows: Rows) -> None:
    options = {"features": "pca", "number": 100, "steps": 2}
    as_data = undiffuse.evaluate(str(model), "digits", **options, out="out")
    uniform = undiffuse.evaluate(str(model), "digits", **options, out="out", plan="uniform")
    assert as_data.samples["plan"] == "data"
    assert uniform.samples["plan"] == "uniform"
    assert not comparable(as_data, uniform)


@pytest.mark.parametrize("n", [1, 10, 37, 200])
def test_trap_G6_classes_are_asked_for_as_often_as_the_plan_says(model: Path, n: int) -> None:
    pipeline, digits = Pipeline.load(model), open_dataset("digits")
    assert digits.labels is not None
    uniform, _ = class_plan(pipeline, digits, n, "uniform")
    assert uniform is not None
    assert np.ptp(np.bincount(uniform, minlength=10)) <= 1
    shares, _ = class_plan(pipeline, digits, n, "data")
    wanted = np.bincount(digits.labels) * n / len(digits)
    assert np.abs(np.bincount(shares or [], minlength=10) - wanted).max() < 1


# --- a model ----------------------------------------------------------------------------------------------------------


def test_a_model_is_judged_with_all_that_it_takes_to_do_it_again(
    model: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = LearnedClassifier(Budget(epochs=1, least=4000))
    monkeypatch.setitem(FEATURES, "classifier", quick)
    assert main(["evaluate", str(model), "--against", "digits", "-n", "150", "--steps", "2", "--solver", "heun"]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= max(80, len(str(model)) + 100)
    (folder,) = (path.parent for path in (model / "evaluation").glob("*/evaluation.json"))
    found = read_evaluation(folder)
    made = found.samples
    assert (made["solver"], made["steps"], made["seed"], made["n"]) == ("heun", 2, 0, 150)
    assert made["weights"] == Pipeline.load(model).fingerprint
    assert len(found.features["weights_sha256"]) == 64
    assert found.features["name"] == "classifier"
    assert {"accuracy", "calibration_error", "kid"} <= set(found.metrics)
    assert found.classes is not None
    assert sum(found.classes["samples"]) == 150
    assert found.losses is not None
    assert found.losses["unseen"]
    assert found.losses["loss"] == pytest.approx(np.mean([level["loss"] for level in found.losses["levels"]]))
    # The held-out loss is the one that training measured, but for its own number of draws.
    last = json.loads((model / "held_out.jsonl").read_text().splitlines()[-1])
    assert found.losses["loss"] == pytest.approx(last["ema"], abs=4 * last["error"])
    assert found.memorisation is not None
    assert "that the run was trained on" in found.memorisation["of"]
    assert found.memorisation["pixels"]["shifts"] == 1

    page = (folder / "report.html").read_text()
    assert "default-src 'none'" in page
    assert "closest pairs" in page
    assert "Held-out loss</" in page  # the curve of its run, against images seen
    assert "this model" in page
    assert "<th>note</th>" not in page  # there is none
    assert f"@misc{{undiffuse-{found.fingerprint}" in page
    assert found.command in page.replace("&#x27;", "'")

    # Other features of the same samples: nothing is drawn again.
    monkeypatch.setattr(Pipeline, "draw", lambda *args, **options: pytest.fail("drawn again"))
    other = undiffuse.evaluate(str(model), "digits", features="pca", number=150, steps=2, solver="heun")
    assert other.samples["fingerprint"] == made["fingerprint"]
    assert not comparable(found, other)


def test_classes_in_folders_are_recognised_by_name(rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.setitem(FEATURES, "classifier", LearnedClassifier(Budget(epochs=1, least=20_000)))
    digits = open_dataset("digits")
    values, labels = digits.read(range(300))
    assert labels is not None
    for i, (picture, label) in enumerate(zip(values, labels, strict=True)):
        folder = tmp_path / "samples" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((picture * 255.0 / 16).round().astype(np.uint8)).save(folder / f"{i}.png")
    found = undiffuse.evaluate("samples", "digits")
    assert value(found, "accuracy") > 0.5
    assert found.memorisation is not None
    assert found.memorisation["pixels"]["memorised"]  # they are of the data


def test_what_cannot_be_is_refused_in_one_line(model: Path, rows: Rows) -> None:
    rows("a.npy", normal(100, 0))
    rows("b.npy", normal(300, 1))
    rows("wide.npy", normal(100, 2, 7))
    for message, call in {
        "--against DATA": lambda: undiffuse.evaluate("a.npy"),
        "at least 2 samples": lambda: undiffuse.evaluate("a.npy", "b.npy", number=1),
        "has 100 samples, -n 101": lambda: undiffuse.evaluate("a.npy", "b.npy", number=101),
        "--steps would change nothing": lambda: undiffuse.evaluate("a.npy", "b.npy", steps=10),
        "did you mean 'frechet'": lambda: undiffuse.evaluate("a.npy", "b.npy", metrics="frechett"),
        "did you mean 'identity'": lambda: undiffuse.evaluate("a.npy", "b.npy", features="identify"),
        "of a model, not of samples": lambda: undiffuse.evaluate("a.npy", "b.npy", likelihood=3),
        r"samples have shape \[100, 7\]": lambda: undiffuse.evaluate("wide.npy", "b.npy"),
        "bring both to one size": lambda: undiffuse.evaluate(str(model), "digits", image_size=16, features="pca"),
        "needs probabilities": lambda: undiffuse.evaluate("a.npy", "b.npy", metrics="accuracy"),
        "no data at 'nothing.npy'": lambda: undiffuse.evaluate("a.npy", "nothing.npy"),
        "no metric is named": lambda: undiffuse.evaluate("a.npy", "b.npy", metrics=""),
        "^100 of 100 held-out rows are rows of the data: their floor would be no floor$": lambda: undiffuse.evaluate(
            "a.npy", "b.npy", held_out="b.npy"
        ),
        "--weights is for inception": lambda: undiffuse.evaluate("a.npy", "b.npy", weights="w.pth"),
        "--weights FILE": lambda: undiffuse.evaluate(str(model), "digits", features="inception"),
        "no such file": lambda: undiffuse.evaluate(str(model), "digits", features="inception", weights="w.pth"),
    }.items():
        with pytest.raises(UndiffuseError, match=message):
            call()
    assert not list(Path().glob("evaluation/*"))  # refused before anything is written


def test_samples_that_do_not_fit_are_refused_before_features_are_learned(
    model: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A classifier of the data takes minutes."""

    def never(*given: object, **named: object) -> None:
        raise AssertionError("features were made")

    monkeypatch.setattr("undiffuse.evaluation.evaluate.make_features", never)
    digits = open_dataset("digits").values(range(20))
    for message, samples in {
        "no data at 'nowhere'": "nowhere",
        "samples have shape": rows("wide.npy", np.zeros((20, 9, 8), np.uint8)),
        "say which range of theirs.*--span 0 1": rows("shares.npy", digits / 17),
        "samples are uint8 in .0, 1.*--span 0 1": rows("bits.npy", (digits > 8).astype(np.uint8)),
        "^samples hold NaN": rows("nan.npy", np.where(digits == 16, np.nan, digits)),
        "has 20 samples, -n 30": rows("few.npy", digits),
    }.items():
        with pytest.raises(UndiffuseError, match=message):
            undiffuse.evaluate(samples, "digits", number=30 if samples == "few.npy" else None)
    with pytest.raises(UndiffuseError, match="bring both to one size"):
        undiffuse.evaluate(str(model), "digits", image_size=16)
    with pytest.raises(AssertionError, match="features were made"):
        undiffuse.evaluate("bits.npy", "digits", span=(0, 1))


def test_a_run_without_a_model_is_no_folder_of_pictures(model: Path, rows: Rows, tmp_path: Path) -> None:
    """Its previews are pictures, but no samples."""
    run = tmp_path / "runs" / "young"
    shutil.copytree(model, run)
    shutil.rmtree(run / "model")
    for name in (str(run), "young"):
        with pytest.raises(UndiffuseError, match="before its first checkpoint"):
            undiffuse.evaluate(name, "digits", features="pca")
    (run / "codec.safetensors").touch()
    with pytest.raises(UndiffuseError, match="a codec makes no samples"):
        undiffuse.evaluate(str(run), "digits", features="pca")


def test_of_more_samples_than_half_of_the_data_so_many_are_compared_and_it_says_so(rows: Rows) -> None:
    found = undiffuse.evaluate(rows("a.npy", normal(200, 0)), rows("b.npy", normal(300, 1)))
    assert found.metrics["frechet"]["n"] == 150
    assert any("150 of the 200 samples" in note and "half of the data" in note for note in found.notes)
    assert not undiffuse.evaluate("a.npy", "b.npy", number=150).notes


def test_samples_that_were_kept_are_those_of_the_same_schedule(model: Path, rows: Rows, tmp_path: Path) -> None:
    """A folder whose schedule was put right samples anew, though its weights and settings are the same."""
    data, pipeline = open_dataset("digits"), Pipeline.load(model)
    config = replace(pipeline.config, label=TimeLabel(1000, -1))
    other = Pipeline(pipeline.denoiser, config, pipeline.spec, pipeline.sampling, pipeline.info)
    keys = []
    for each in (pipeline, other):
        judged = draw(Judgeable(each, model / "model"), data, 4, keep=tmp_path, sampling=pipeline.settings(steps=1))
        assert judged is not None
        keys.append((judged.fingerprint, judged.facts["kept"]))
    assert keys[0][0] != keys[1][0]
    assert keys[0][1] != keys[1][1]


def test_nan_among_samples_is_refused_with_its_row(rows: Rows) -> None:
    bad = normal(100, 0)
    bad[17, 2] = np.nan
    with pytest.raises(UndiffuseError):
        undiffuse.evaluate(rows("a.npy", bad), rows("b.npy", normal(300, 1)))


# --- during training --------------------------------------------------------------------------------------------------


def test_quality_is_measured_during_training_and_the_best_is_kept(rows: Rows) -> None:
    settings = ("training.quality_every=5", "training.quality_samples=100")
    result = undiffuse.train("moons", recipe="tiny", out="runs/moons", set=settings, device="cpu")
    points = [json.loads(line) for line in (result.path / "held_out.jsonl").read_text().splitlines()]
    measured = {point["step"]: next(iter(point["probes"].values())) for point in points if point["probes"]}
    assert list(measured) == [5, 10, 15, 20]
    best = min(measured, key=lambda step: measured[step]["sliced_wasserstein"])
    assert Pipeline.load(result.path / "best_quality").info["step"] == best
    page = (result.path / "report.html").read_text()
    assert "Quality: sliced wasserstein" in page
    assert "real against real" in page


def test_trap_R4_the_best_quality_survives_a_resume() -> None:
    probe = Probe("quality", lambda pipeline: {}, best="frechet")

    def point(step: int, found: float | None) -> Point:
        return Point(step, step, 1.0, 1.0, 0.1, 0.1, (), (), {} if found is None else {"quality": {"frechet": found}})

    curve = Curve()
    for step, found, better in ((1, 5.0, True), (2, 3.0, True), (3, None, False), (4, 4.0, False)):
        curve._append(point(step, found))
        assert curve.improved(probe) is better
    resumed = Curve.from_json(curve.to_json())
    resumed._append(point(5, 3.5))
    assert not resumed.improved(probe)
    resumed._append(point(6, 2.5))
    assert resumed.improved(probe)
    assert not resumed.improved(replace(probe, name="other"))


def test_quality_needs_held_out_items(rows: Rows) -> None:
    with pytest.raises(UndiffuseError, match=r"quality_every needs 100 items"):
        undiffuse.train(
            rows("few.npy", normal(50, 0)), recipe="tiny", set=("training.quality_every=5",), out="runs/few"
        )
