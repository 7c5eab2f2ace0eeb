from __future__ import annotations

import gzip
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from data.test_idx import idx_bytes
from undiffuse.data import DATASETS, Dataset, open_dataset
from undiffuse.errors import UndiffuseError, UndiffuseWarning


def opened(name: str, **options) -> Dataset:
    try:
        return open_dataset(name, **options)
    except UndiffuseError as error:
        if name.startswith("mnist") and "not found" in str(error):
            pytest.skip("MNIST is not here; set UNDIFFUSE_DATA to the folder that has it")
        raise


@pytest.mark.parametrize("name", DATASETS)
def test_every_named_set_keeps_the_contract(name: str) -> None:
    data = opened(name)
    assert data.name == name
    assert len(data) > 1000
    x, cond = data.batch(range(1000))
    assert x.shape == (1000, *data.spec.shape)
    assert (data.labels is None) == (cond == {}) == (data.spec.classes == ())
    if data.labels is not None:
        assert data.labels.shape == (len(data),)
        assert set(data.labels.tolist()) == set(range(len(data.spec.classes)))
        assert cond["classes"].tolist() == data.labels[:1000].tolist()
    np.testing.assert_allclose(data.spec.to_data(x), data.values(range(1000)), atol=1e-5)
    again = open_dataset(name)
    assert again.fingerprint == data.fingerprint
    if data.spec.bounded:
        assert -1 <= x.min() < -0.8
        assert 0.8 < x.max() <= 1
    else:
        everything = data.batch(range(len(data)))[0]
        assert everything.mean(0).abs().max() < 1e-4
        assert (everything.std(0) - 1).abs().max() < 1e-3


def test_digits() -> None:
    data = open_dataset("digits")
    assert data.describe() == "1,797 images 8x8x1 uint8 [0, 16], 10 classes"
    assert data.labels is not None
    assert np.bincount(data.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    larger = open_dataset("digits", image_size=16)
    assert larger.describe() == "1,797 images 16x16x1 uint8 [0, 16], 10 classes"
    larger.batch(range(1797))  # Lanczos overshoots, the bounds hold
    with pytest.raises(UndiffuseError, match="has 1 channels"):
        open_dataset("digits", channels=3)


@pytest.mark.parametrize("name", ["moons", "swissroll", "checkerboard"])
def test_drawn_sets_depend_on_the_seed_alone(name: str) -> None:
    assert open_dataset(name, seed=1).fingerprint == open_dataset(name, seed=1).fingerprint
    assert open_dataset(name, seed=1).fingerprint != open_dataset(name, seed=2).fingerprint
    with pytest.raises(UndiffuseError, match="for images"):
        open_dataset(name, image_size=8)


def test_checkerboard_is_a_checkerboard() -> None:
    data = open_dataset("checkerboard")
    points = data.values(range(len(data)))
    squares = np.floor(points + 2).astype(int)
    assert (squares.sum(axis=1) % 2 == 0).all()
    counts = np.bincount(squares[:, 0] * 4 + squares[:, 1], minlength=16)
    assert (counts > 0).sum() == 8
    assert abs(counts[counts > 0] - 1250).max() < 5 * 1250**0.5


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    for name in ("digits", "moons", "swissroll"):
        with pytest.raises(UndiffuseError, match=r"undiffuse\[demo\]"):
            open_dataset(name)
    open_dataset("checkerboard")


def test_a_file_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    with pytest.warns(UndiffuseWarning, match=r"\./digits"):
        assert len(open_dataset("digits")) == 1797
    with pytest.raises(UndiffuseError, match="empty"):
        open_dataset("./digits")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("digts", "did you mean 'digits'"),
        ("", "no data"),
        ("cats.tar", "no data"),
        ("x" * 300, "no data"),
        ("~nobody9/a", "no data"),
        ("a\0b", "no data"),
    ],
)
def test_what_does_not_exist(data: str, says: str) -> None:
    with pytest.raises(UndiffuseError, match=says):
        open_dataset(data)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("a.tar", "a.zip", "a.wav", "a.png", "none"):
        (tmp_path / name).write_bytes(b"?")
        with pytest.raises(UndiffuseError, match=r"not supported|damaged"):
            open_dataset(str(tmp_path / name))
    with pytest.raises(UndiffuseError, match=r"did you mean .*photos"):
        open_dataset(str(tmp_path / "phtos"))


# ---- MNIST files, made here ----


def write_mnist(folder: Path, count: int = 10_000, packed: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    images = np.zeros((count, 28, 28), np.uint8)
    images[:, 0, 0], images[:, 1, 1] = np.arange(count) % 256, 255
    labels = (np.arange(count) % 10).astype(np.uint8)
    for part, values in (("images-idx3", images), ("labels-idx1", labels)):
        data = idx_bytes(values)
        name = f"t10k-{part}-ubyte" + (".gz" if packed else "")
        (folder / name).write_bytes(gzip.compress(data, 1) if packed else data)


@pytest.mark.parametrize("below", [".", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("packed", [False, True])
def test_mnist_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str, packed: bool) -> None:
    monkeypatch.delenv("UNDIFFUSE_DATA", raising=False)
    write_mnist(tmp_path / below, packed=packed)
    data = open_dataset("mnist-test", data_root=tmp_path)
    assert data.describe() == "10,000 images 28x28x1 uint8 [0, 255], 10 classes"
    assert data.values([300])[0, 0, 0] == 44
    assert data.labels is not None
    assert data.labels[17] == 7
    monkeypatch.setenv("UNDIFFUSE_DATA", os.fspath(tmp_path))
    assert open_dataset("mnist-test").fingerprint == data.fingerprint


def test_mnist_that_is_missing_or_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNDIFFUSE_DATA", raising=False)
    with pytest.raises(UndiffuseError, match=r"no folder was named.*--data-root or \$UNDIFFUSE_DATA"):
        open_dataset("mnist")
    with pytest.raises(UndiffuseError, match=f"looked in {tmp_path}"):
        open_dataset("mnist", data_root=tmp_path)
    write_mnist(tmp_path, count=99)
    with pytest.raises(UndiffuseError, match="not MNIST's"):
        open_dataset("mnist-test", data_root=tmp_path)


def test_opening_is_quiet() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("digits", "moons", "swissroll", "checkerboard"):
            open_dataset(name)


@pytest.mark.parametrize("name", ["digits", "moons", "swissroll", "checkerboard"])
@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True])
def test_seed_out_of_range(name: str, seed: int) -> None:
    with pytest.raises(UndiffuseError, match="seed must be a whole number from 0 to"):
        open_dataset(name, seed=seed)
