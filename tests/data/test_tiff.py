"""TIFFs that are arrays: their own numbers, in and out."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from undiffuse.data import open_dataset
from undiffuse.errors import UndiffuseError, UndiffuseWarning

tifffile = pytest.importorskip("tifffile", reason="needs undiffuse[data]")

from undiffuse.data.tiff import encode_tiff, read_page  # noqa: E402

RNG = np.random.default_rng(0)
FORMS = {
    "float": (RNG.normal(3, 2, (6, 9, 7)).astype(np.float32), "YX", "HW", "array"),
    "float in 0 to 1": (np.linspace(0, 1, 6 * 63, dtype=np.float32).reshape(6, 9, 7), "YX", "HW", "image"),
    "32 bits": (RNG.integers(-1000, 1000, (6, 9, 7), dtype=np.int32), "YX", "HW", "image"),
    "16 bits in colour": (RNG.integers(0, 65536, (6, 9, 7, 3), dtype=np.uint16), "YXS", "HWC", "image"),
    "five channels": (RNG.integers(0, 256, (6, 5, 9, 7), dtype=np.uint8), "CYX", "CHW", "array"),
    "a stack": (RNG.integers(0, 65536, (6, 4, 9, 7), dtype=np.uint16), "ZYX", "ZYX", "array"),
    "a stack of channels": (RNG.normal(0, 1, (6, 4, 2, 9, 7)).astype(np.float32), "ZCYX", "ZCYX", "array"),
}


def write(folder: Path, values: np.ndarray, axes: str) -> Path:
    folder.mkdir(exist_ok=True)
    for i, item in enumerate(values):
        colour = "rgb" if axes.endswith("S") else "minisblack"
        tifffile.imwrite(folder / f"{i}.tif", item, metadata={"axes": axes}, photometric=colour)
    return folder


def opened(folder: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndiffuseWarning)
        return open_dataset(folder)


@pytest.mark.parametrize("form", FORMS)
def test_trap_D2_every_number_comes_back(form: str, tmp_path: Path) -> None:
    values, axes, layout, kind = FORMS[form]
    data = opened(write(tmp_path / "set", values, axes))
    assert (data.spec.layout, data.spec.kind, data.spec.dtype) == (layout, kind, values.dtype.name)
    assert np.array_equal(data.values(range(6)), values)
    x, _ = data.batch(range(6))
    back = data.spec.to_data(x)
    assert back.dtype == values.dtype
    if values.dtype.kind == "f":
        assert np.allclose(back, values, atol=1e-6)
    else:
        assert np.array_equal(back, values)
    # and as a file again, one sample a page or a stack
    path = tmp_path / "out.tif"
    path.write_bytes(encode_tiff(back, data.spec))
    assert np.array_equal(tifffile.imread(path).reshape(back.shape), back)


def test_the_range_is_that_of_an_array(tmp_path: Path) -> None:
    values = FORMS["float"][0]
    folder, array = write(tmp_path / "set", values, "YX"), tmp_path / "set.npy"
    np.save(array, values)
    one, other = opened(folder).spec, open_dataset(array).spec
    assert (one.low, one.high, one.shift, one.scale) == (other.low, other.high, other.shift, other.scale)


def test_a_set_that_streams_has_the_same_spec(tmp_path: Path) -> None:
    from undiffuse.data.folder import Files
    from undiffuse.data.store import Folder
    from undiffuse.data.tiff import Tiffs

    folder = write(tmp_path / "set", FORMS["a stack"][0], "ZYX")
    kept, streamed = (Files(Folder(folder), Tiffs(), memory=memory) for memory in (2**30, 0))
    assert streamed.streams
    assert streamed.spec == kept.spec
    assert np.array_equal(streamed.values([4, 1]), kept.values([4, 1]))


def test_ordinary_pictures_are_read_as_pictures(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", RNG.integers(0, 256, (6, 9, 7, 3), dtype=np.uint8), "YXS")
    assert opened(folder).spec.kind == "image"
    assert opened(folder).spec.high == 255


def test_class_folders_are_classes(tmp_path: Path) -> None:
    values = FORMS["float"][0]
    write(tmp_path / "set", values[:0], "YX")
    for name, part in (("cat", values[:3]), ("dog", values[3:])):
        write(tmp_path / "set" / name, part, "YX")
    data = opened(tmp_path / "set")
    assert data.spec.classes == ("cat", "dog")
    assert data.labels is not None
    assert data.labels.tolist() == [0] * 3 + [1] * 3


def test_what_cannot_be_one_set_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", FORMS["float"][0], "YX")
    tifffile.imwrite(folder / "other.tif", np.zeros((5, 5), np.float32))
    with pytest.raises(UndiffuseError, match="2 forms"):
        opened(folder)
    (folder / "other.tif").unlink()
    with pytest.raises(UndiffuseError, match="image_size"):
        open_dataset(folder, image_size=8)


def test_damaged_files_are_named_and_skipped(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", RNG.normal(0, 1, (12, 16, 16)).astype(np.float32), "YX")
    whole = (folder / "0.tif").read_bytes()
    (folder / "90.tif").write_bytes(whole[: len(whole) // 2])
    nan = np.full((16, 16), np.nan, np.float32)
    tifffile.imwrite(folder / "91.tif", nan)
    data = opened(folder)
    assert len(data) == 12
    assert {name for name, _ in data.skipped} == {"90.tif", "91.tif"}


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_byte_is_a_bad_file_or_a_number(seed: int, tmp_path: Path) -> None:
    """Never a crash, a hang or a huge allocation."""
    from undiffuse.data.folder import Files
    from undiffuse.data.store import BadFile, Folder
    from undiffuse.data.tiff import Tiffs

    folder = write(tmp_path / "set", FORMS["float"][0][:1], "YX")
    path = folder / "0.tif"
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(seed)
    for _ in range(3):
        data[rng.integers(0, min(len(data), 400))] = rng.integers(0, 256)
    path.write_bytes(bytes(data))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UndiffuseWarning)
            Files(Folder(folder), Tiffs())
        with path.open("rb") as file:
            read_page(file)
    except (BadFile, UndiffuseError):
        pass
