"""``undiffuse sample``: what it writes, and that a picture can be made again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from test_pipeline import FREE, pipeline
from undiffuse.commands import main
from undiffuse.commands.sample import parse_classes, sample
from undiffuse.errors import UndiffuseError
from undiffuse.outputs import grid, read_parameters, tile, write_png


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pipeline().save(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return "model"


def test_a_grid_an_array_a_folder_and_an_animation_hold_the_same_samples(model: str) -> None:
    for out in ("a.png", "a.npy", "a/", "a.webp", "a.gif"):
        made = sample(model, number=6, classes="1,4,7", seed=2, steps=3, out=out)
        assert (made.samples, made.steps, made.calls, made.classes) == (6, 3, 3, ("1", "4", "7"))
    values = np.load("a.npy")
    assert (values.shape, values.dtype) == ((6, 8, 8), np.uint8)
    expected = np.round(values * (255 / 16)).astype(np.uint8)
    for i in range(6):
        assert np.array_equal(np.asarray(Image.open(f"a/{i:05d}.png")), expected[i])
    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(tile(list(expected), 3)))
    for name in ("a.webp", "a.gif"):
        with Image.open(name) as film:
            assert film.n_frames == 4  # type: ignore[attr-defined]  # noise, and three steps
            film.seek(3)
            last = np.asarray(film.convert("L")).astype(int)
        assert np.abs(last - np.asarray(tile(list(expected), 3)).astype(int)).max() <= 2


def test_a_picture_is_made_again_from_itself(model: str) -> None:
    assert main(["sample", model, "-n", "4", "--solver", "ddpm", "--steps", "3", "--guidance-scale", "2", "--seed", "9",
                 "--classes", "0-3", "--set", "threshold=static", "--out", "one.png"]) == 0  # fmt: skip
    assert main(["sample", "--from", "one.png", "--out", "two.png"]) == 0
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()
    assert main(["sample", "--from", "one.png", "--seed", "10", "--out", "three.png"]) == 0
    assert Path("one.png").read_bytes() != Path("three.png").read_bytes()
    assert read_parameters("three.png")["options"]["solver"] == "ddpm"


def test_made_by_other_weights_is_said(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    sample(model, number=1, out="one.png")
    pipeline(seed=1).save("model")
    assert main(["sample", "--from", "one.png", "--out", "two.png"]) == 0
    assert "other weights" in capsys.readouterr().err


def test_trap_D4_colours_are_those_of_the_data_not_of_the_sample(tmp_path: Path) -> None:
    spec = pipeline().spec
    dim = np.full((2, 8, 8), 4, np.uint8)
    picture = np.asarray(grid(spec, spec.to_model(dim)))
    assert set(np.unique(picture)) == {64, 255}  # 4 of 16 is a quarter of 255; the gap is white


def test_points_are_a_scatter_and_in_their_own_units(model: str) -> None:
    pipeline(FREE, classes=0).save("points")
    made = sample("points", number=20, out="p.npy")
    assert (made.shape, made.dtype) == ((2,), "float64")
    assert np.load("p.npy").shape == (20, 2)
    sample("points", number=20, out="p.png")
    with Image.open("p.png") as picture:
        assert picture.size == (384, 384)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["model", "--out", "a.jpg"], "write a .png"),
        (["model", "--out", "model/pipeline.json/a.png"], "is not a folder"),
        (["model", "--classes", "10"], "class 10 does not exist"),
        (["model", "--classes", "cat"], "unknown class 'cat'"),
        (["model", "--classes", "5-20"], "unknown class '5-20'"),
        (["model", "-n", "0"], "at least 1"),
        (["model", "--batch-size", "0"], "at least 1"),
        (["model", "--steps", "0"], "at least 1"),
        (["model", "--seed", "-1"], "seed"),
        (["model", "--seed", "99999999999999999999"], "seed"),
        (["model", "--solver", "hune"], "did you mean 'heun'"),
        (["model", "--grid", "karas"], "did you mean 'karras'"),
        (["model", "--guidance-scale", "inf"], "finite"),
        (["model", "--set", "treshold=static"], "did you mean 'threshold'"),
        (["model", "--device", "abacus"], "unknown device 'abacus'"),
        (["model", "--out", "model/"], "not empty"),
        (["nothing"], "no such model"),
        (["--from", "nothing.png"], "no such file"),
        (["--from", "model/pipeline.json"], "not a PNG"),
        (["--from", "plain.png"], "does not say how it was made"),
        ([], "name a model"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    words: list[str], reason: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_png("plain.png", Image.new("L", (4, 4)))
    before = sorted(str(path) for path in Path().rglob("*"))
    assert main(["sample", *words]) == 2
    complaint = capsys.readouterr().err
    assert reason in complaint
    assert complaint.count("\n") == 1
    assert sorted(str(path) for path in Path().rglob("*")) == before


def test_json_is_all_that_is_on_stdout(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", model, "-n", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["samples"] == 2
    assert report["path"] == "samples.png"


def test_classes_are_numbers_names_and_ranges() -> None:
    names = ("cat", "dog", "3")
    assert parse_classes("dog, cat,none", names) == [1, 0, None]
    assert parse_classes("0-2,1", names) == [0, 1, 2, 1]
    assert parse_classes("3", names) == [2]  # a name wins over a number
    with pytest.raises(UndiffuseError, match="did you mean 'cat'"):
        parse_classes("cta", names)
