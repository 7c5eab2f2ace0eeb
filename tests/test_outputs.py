"""What comes out is the kind of file that went in, with its units, range and bits (traps D1, D2, D4)."""

from __future__ import annotations

import json
import warnings
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

from undiffuse import sample, train
from undiffuse.data import from_array, open_dataset
from undiffuse.data.png import decode16, encode16
from undiffuse.errors import UndiffuseError, UndiffuseWarning
from undiffuse.outputs import CHUNK, check_target, suffixes, write_image


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def trained(data: Path, **options) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndiffuseWarning)
        return train(str(data), recipe="tiny", steps=2, batch_size=2, set=("training.previews=2",), **options).path


def test_sounds_in_sounds_out(tmp_path: Path, random: np.random.Generator) -> None:
    (tmp_path / "in").mkdir()
    for index in range(4):
        wavfile.write(tmp_path / "in" / f"{index}.wav", 4000, random.integers(-32768, 32767, 200).astype(np.int16))
    run = trained(tmp_path / "in")
    assert (run / "samples" / "preview-000002.wav").is_file()
    assert str(sample(run, number=3, steps=2).path) == "samples.wav"
    with wave.open("samples.wav") as file:
        assert (file.getnframes(), file.getframerate(), file.getsampwidth()) == (600, 4000, 2)
    sample(run, number=3, steps=2, out="each")
    sample(run, number=3, steps=2, out="all.npy")
    values = np.load("all.npy")
    assert values.dtype == np.int16
    each = sorted(Path("each").iterdir())
    np.testing.assert_array_equal([wavfile.read(path)[1] for path in each], values)
    with pytest.raises(UndiffuseError, match=r"write a .wav, a folder or a .npy; these samples are of kind sound"):
        sample(run, out="a.png")


def test_tables_in_tables_out(tmp_path: Path, random: np.random.Generator) -> None:
    np.savetxt(tmp_path / "in.csv", random.normal(100, 5, (30, 3)), delimiter=",", header="a,b,c", comments="")
    run = trained(tmp_path / "in.csv")
    assert str(sample(run, number=5, steps=2).path) == "samples.csv"
    out = open_dataset("samples.csv")
    assert out.spec.names == ("a", "b", "c")
    sample(run, number=5, steps=2, out="b.npy")
    np.testing.assert_array_equal(out.values(range(5)), np.load("b.npy"))


def test_trap_D2_16_bit_in_16_bit_out(tmp_path: Path, random: np.random.Generator) -> None:
    (tmp_path / "in").mkdir()
    for index in range(2):
        pixels = random.integers(0, 65536, (8, 12, 3)).astype(np.uint16)
        (tmp_path / "in" / f"{index}.png").write_bytes(encode16(pixels))
    data = open_dataset("in")
    for index in range(2):
        write_image(Path(f"{index}.png"), data.spec, data.batch([index])[0][0], {"a": "é"})
        np.testing.assert_array_equal(decode16(Path(f"{index}.png").read_bytes()), data.values([index])[0])
    with Image.open("0.png") as image:
        assert json.loads(image.info[CHUNK]) == {"a": "é"}
    run = trained(tmp_path / "in")
    sample(run, number=2, steps=2, out="each")
    sample(run, number=2, steps=2, out="all.npy")
    np.testing.assert_array_equal(open_dataset("each").values(range(2)), np.load("all.npy"))


def test_trap_D2_a_16_bit_ramp_round_trips(tmp_path: Path) -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    data = from_array(ramp[None])
    write_image(tmp_path / "a.png", data.spec, data.batch([0])[0][0], {})
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), ramp)


def test_trap_D3_alpha_is_written(tmp_path: Path, random: np.random.Generator) -> None:
    values = random.integers(0, 256, (2, 8, 8, 4)).astype(np.uint8)
    values[0, 0, 0], values[0, 0, 1] = 0, 255
    for data in (from_array(values), from_array(np.moveaxis(values, -1, 1))):
        write_image(tmp_path / "a.png", data.spec, data.batch([1])[0][0], {})
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), values[1])


def test_trap_D4_another_range_is_scaled_by_it(tmp_path: Path) -> None:
    dark = np.array([0, 1, 2, 3], np.uint8).repeat(16).reshape(1, 8, 8)
    data = from_array(np.concatenate([dark, dark * 5]))  # ends at 15, so the range is [0, 15]
    write_image(tmp_path / "a.png", data.spec, data.batch([0])[0][0], {})
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), dark[0] * 17)


def test_every_kind_says_what_it_is_written_as(tmp_path: Path, random: np.random.Generator) -> None:
    series = from_array(random.normal(size=(9, 40)), channels=1)
    volumes = from_array(random.normal(size=(9, 1, 8, 8, 8)))
    points = from_array(random.normal(size=(9, 3)))
    plane = from_array(random.normal(size=(9, 2)))
    assert suffixes(series.spec) == (".npy",)
    assert suffixes(volumes.spec) == (".npy", ".tif", ".tiff")
    assert suffixes(points.spec) == (".csv", ".npy")
    assert suffixes(plane.spec) == (".png", ".gif", ".webp", ".csv", ".npy")
    with pytest.raises(UndiffuseError, match="kind array"):
        check_target(tmp_path / "a.wav", series.spec)


@pytest.mark.parametrize("shape", [(9, 1, 37), (9, 2, 3, 6, 5), (9, 1, 7, 11)])
def test_trap_X_data_of_any_rank_and_size_trains(
    tmp_path: Path, random: np.random.Generator, shape: tuple[int, ...]
) -> None:
    np.save(tmp_path / "in.npy", random.normal(3, 2, shape).astype(np.float32))
    run = trained(tmp_path / "in.npy")
    sample(run, number=2, steps=2, out="b.npy")
    assert np.load("b.npy").shape == (2, *shape[1:])
    assert np.load("b.npy").dtype == np.float32
