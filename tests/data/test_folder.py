from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from data.pictures import bad_files, good_folder, jpeg_bytes, png_bytes, ramp, save
from undiffuse.data import open_dataset
from undiffuse.data.folder import ImageFolder, printable, scan
from undiffuse.errors import UndiffuseError, UndiffuseWarning


def everything(dataset) -> np.ndarray:
    return dataset.values(range(len(dataset)))


def quiet(*args, **options) -> ImageFolder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndiffuseWarning)
        return ImageFolder(*args, **options)


def test_a_flat_folder(tmp_path: Path) -> None:
    data = open_dataset(str(good_folder(tmp_path, 5)))
    assert data.describe() == "5 images 8x8x3 uint8 [0, 255]"
    assert data.labels is None
    assert data.spec.classes == ()
    np.testing.assert_array_equal(everything(data), [ramp(seed=i) for i in range(5)])
    x, cond = data.batch([4, 0])
    assert x.shape == (2, 3, 8, 8)
    assert cond == {}
    np.testing.assert_array_equal(data.spec.to_data(x), [ramp(seed=4), ramp(seed=0)])


def test_class_folders(tmp_path: Path) -> None:
    for name, count in (("dog", 2), ("cat", 3), ("Ünï", 1)):
        good_folder(tmp_path / name, count)
    good_folder(tmp_path / "cat" / "more", 1)
    data = quiet(tmp_path)
    assert data.spec.classes == ("cat", "dog", "Ünï")
    assert data.labels is not None
    assert data.labels.dtype == np.int64
    assert data.labels.tolist() == [0, 0, 0, 0, 1, 1, 2]
    assert data.describe() == "7 images 8x8x3 uint8 [0, 255], 3 classes"
    assert data.batch([6, 0])[1]["classes"].tolist() == [2, 0]


def test_one_folder_around_everything_is_not_a_class(tmp_path: Path) -> None:
    good_folder(tmp_path / "images", 2)
    assert open_dataset(str(tmp_path)).labels is None
    good_folder(tmp_path / "images" / "a", 2)
    with pytest.raises(UndiffuseError, match="2 images beside class folders"):
        open_dataset(str(tmp_path))
    for name in ("0000.png", "0001.png"):
        (tmp_path / "images" / name).unlink()
    good_folder(tmp_path / "images" / "b", 1)
    assert quiet(tmp_path).spec.classes == ("a", "b")


def test_train_and_test_are_not_classes(tmp_path: Path) -> None:
    good_folder(tmp_path / "train", 2)
    good_folder(tmp_path / "test", 2)
    with pytest.raises(UndiffuseError, match="not classes"):
        open_dataset(str(tmp_path))
    assert len(open_dataset(str(tmp_path / "train"))) == 2


# ---- bad files ----


def test_every_bad_file_is_named(tmp_path: Path) -> None:
    """The whole list beside good files: nothing stops, nothing hangs, every bad file is in the report."""
    good_folder(tmp_path, 3)
    bad = bad_files()
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "42-pipe.png")
    (tmp_path / "39-dangling.png").symlink_to("nowhere")
    before_decoding = scan(tmp_path)
    names = {name for name, _ in before_decoding.skipped}
    assert names <= {*bad, "42-pipe.png", "39-dangling.png"}
    assert {"42-pipe.png", "39-dangling.png", "01-empty.png", "10-13000.png"} <= names
    with pytest.raises(
        UndiffuseError, match=r"\d+ of \d+ files cannot be used.*01-empty.png \(the file is empty\)"
    ) as error:
        ImageFolder(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["01-empty.png", "02-cut.png", "03-cut.jpg", "07-crc.png", "15-float.tiff", "10-13000.png"]
)
def test_one_bad_file_is_skipped_and_named(tmp_path: Path, name: str) -> None:
    good_folder(tmp_path, 5, size=32)
    (tmp_path / name).write_bytes(bad_files()[name])
    with pytest.warns(UndiffuseWarning, match=name):
        data = open_dataset(str(tmp_path))
    assert len(data) == 5
    assert [file for file, _ in data.skipped] == [name]
    assert data.describe().endswith("1 files skipped")
    np.testing.assert_array_equal(everything(data), [ramp(32, 32, seed=i) for i in range(5)])
    with pytest.raises(UndiffuseError, match=f"{name}.*strict"):
        open_dataset(str(tmp_path), strict=True)


def test_the_limit_of_bad_files(tmp_path: Path) -> None:
    good_folder(tmp_path, 400, size=4)
    for index in range(4):  # 4 of 404 are less than 1 %
        (tmp_path / f"bad{index}.png").write_bytes(png_bytes(ramp(4, 4))[:-30])
    assert len(quiet(tmp_path).skipped) == 4
    (tmp_path / "bad4.png").write_bytes(b"?")
    with pytest.raises(UndiffuseError, match="5 of 405"):
        quiet(tmp_path)


def test_labels_follow_when_files_are_skipped(tmp_path: Path) -> None:
    for name in ("a", "b"):
        good_folder(tmp_path / name, 3)
    (tmp_path / "a" / "0001.png").write_bytes(png_bytes(ramp())[:-30])
    data = quiet(tmp_path)
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 1, 1, 1]
    np.testing.assert_array_equal(everything(data)[:2], [ramp(seed=0), ramp(seed=2)])


def test_nothing_usable(tmp_path: Path) -> None:
    with pytest.raises(UndiffuseError, match="the folder is empty"):
        open_dataset(str(tmp_path))
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    with pytest.raises(UndiffuseError, match=r"no images.*1 \.wav"):
        open_dataset(str(tmp_path))
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UndiffuseError, match=r"none of the 1 images.*a\.png"):
        open_dataset(str(tmp_path))
    with pytest.raises(UndiffuseError, match="did you mean"):
        open_dataset(str(tmp_path)[:-1])


def test_litter_is_ignored(tmp_path: Path) -> None:
    good_folder(tmp_path, 2)
    for name in ("._0000.png", ".DS_Store", "Thumbs.db", "readme.txt", "labels.csv", ".hidden/a.png", "__MACOSX/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"not an image")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = open_dataset(str(tmp_path))
    assert len(data) == 2
    assert data.skipped == ()


# ---- names and links ----


def test_any_name_works(tmp_path: Path) -> None:
    names = [
        "猫.png",
        "🐈.PNG",
        "\u202egnp.png",
        "line\nbreak.png",
        "-rf.png",
        "a b %2e;$(x).Png",
        "x" * 251 + ".png",
        "no extension",
    ]
    raw = [os.fsencode(name) for name in names] + [b"\xff\xfe.png"]
    for index, name in enumerate(raw):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(png_bytes(ramp(seed=index)))
    data = open_dataset(str(tmp_path))
    assert len(data) == len(raw)
    for name in raw:  # and when they are bad, the report is on one line and can be printed
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(b"?")
    with pytest.raises(UndiffuseError) as error:
        open_dataset(str(tmp_path))
    assert "\n" not in str(error.value)
    str(error.value).encode("utf-8")
    assert "\u202e" not in str(error.value)


def test_printable() -> None:
    assert printable("a\nb\u202e\udcff é猫") == r"a\nb\u202e\udcff é猫"


def test_links(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    good_folder(root / "real", 3)
    good_folder(outside, 2)
    (root / "real" / "loop").symlink_to(root)
    (root / "again").symlink_to(root / "real")
    (root / "real" / "copy.png").symlink_to(root / "real" / "0000.png")
    found = scan(root)
    assert [entry.path for entry in found.entries] == [
        "real/0000.png",
        "real/0001.png",
        "real/0002.png",
        "real/copy.png",
    ]
    assert found.skipped == ()
    (root / "real" / "far.png").symlink_to(outside / "0000.png")
    (root / "far").symlink_to(outside)
    assert dict(scan(root).skipped).keys() == {"real/far.png", "far"}
    (tmp_path / "link").symlink_to(root / "real")
    assert len(scan(tmp_path / "link").entries) == 4  # the folder itself may be a link


def test_a_folder_with_the_name_of_a_picture(tmp_path: Path) -> None:
    good_folder(tmp_path / "a.png", 2)
    assert len(open_dataset(str(tmp_path))) == 2


# ---- one form for all ----


def test_mixed_sizes_are_refused_with_the_remedy(tmp_path: Path) -> None:
    good_folder(tmp_path, 3)
    save(tmp_path / "wide.png", ramp(8, 20))
    with pytest.raises(UndiffuseError, match=r"2 sizes: 8x8 \(3\), 20x8 \(1\).*--image-size"):
        open_dataset(str(tmp_path))
    data = open_dataset(str(tmp_path), image_size=(8, 8))
    assert data.spec.resize == "lanczos"
    np.testing.assert_array_equal(data.values([3])[0].shape, (8, 8, 3))


def test_image_size_is_height_and_width(tmp_path: Path) -> None:
    data = open_dataset(str(good_folder(tmp_path, 2)), image_size=(4, 6))
    assert data.spec.shape == (3, 4, 6)
    assert open_dataset(str(tmp_path), image_size=8).spec.resize is None
    for wrong in (0, 3, -8, 10_000, (8,), (8, 8, 8), True, 8.0, "8"):
        with pytest.raises(UndiffuseError, match="image_size"):
            open_dataset(str(tmp_path), image_size=wrong)  # type: ignore[arg-type]


def test_enlarging_is_noted(tmp_path: Path) -> None:
    with pytest.warns(UndiffuseWarning, match="enlarged: 0000.png and 1 more"):
        open_dataset(str(good_folder(tmp_path, 2)), image_size=16)


def test_trap_D3_grey_and_colour(tmp_path: Path) -> None:
    good_folder(tmp_path, 3, channels=1)
    assert open_dataset(str(tmp_path)).describe() == "3 images 8x8x1 uint8 [0, 255]"
    save(tmp_path / "colour.png", ramp())
    with pytest.warns(UndiffuseWarning, match="3 grey images among 1 in colour"):
        data = open_dataset(str(tmp_path))
    assert data.spec.shape == (3, 8, 8)
    assert quiet(tmp_path, channels=1).spec.shape == (1, 8, 8)
    assert quiet(tmp_path, channels=4).spec.shape == (4, 8, 8)
    with pytest.raises(UndiffuseError, match="channels=2"):
        open_dataset(str(tmp_path), channels=2)


def test_trap_D2_a_16_bit_folder_stays_16_bit(tmp_path: Path) -> None:
    deep = np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16
    save(tmp_path / "a.png", deep)
    save(tmp_path / "b.tiff", deep[::-1].copy())
    data = open_dataset(str(tmp_path))
    assert data.describe() == "2 images 64x64x1 uint16 [0, 65535]"
    np.testing.assert_array_equal(data.values([0])[0], deep)
    np.testing.assert_array_equal(data.spec.to_data(data.batch([1])[0])[0], deep[::-1])
    save(tmp_path / "c.png", ramp(64, 64, 1))
    with pytest.warns(UndiffuseWarning, match="2 images of 16 bits become 8 bits"):
        mixed = open_dataset(str(tmp_path))
    np.testing.assert_array_equal(mixed.values([0])[0], np.round(deep / 257))


def test_copies_and_dark_pictures_are_noted(tmp_path: Path) -> None:
    good_folder(tmp_path, 2)
    (tmp_path / "z.png").write_bytes((tmp_path / "0000.png").read_bytes())
    with pytest.warns(UndiffuseWarning, match=r"same file.*z\.png"):
        open_dataset(str(tmp_path))
    save(tmp_path / "masks" / "a.png", np.eye(8, dtype=np.uint8))
    with pytest.warns(UndiffuseWarning, match="brightest pixel is 1 of 255"):
        open_dataset(str(tmp_path / "masks"))


def test_captions_are_not_ignored_silently(tmp_path: Path) -> None:
    good_folder(tmp_path, 2)
    (tmp_path / "metadata.jsonl").write_text("{}")
    with pytest.warns(UndiffuseWarning, match="captions"):
        open_dataset(str(tmp_path))


# ---- large folders: decoded when asked for ----


def test_on_demand_gives_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        good_folder(tmp_path / name, 6)
    kept, lazy = quiet(tmp_path), quiet(tmp_path, memory=0)
    assert kept.fingerprint == lazy.fingerprint
    assert kept.spec == lazy.spec
    order = [7, 0, 0, 11, 3]
    for one, other in zip(kept.read(order), lazy.read(order), strict=True):
        np.testing.assert_array_equal(one, other)
    assert lazy.values([]).shape == (0, 8, 8, 3)


def test_a_file_that_breaks_later_is_replaced_with_its_label(tmp_path: Path) -> None:
    for name in ("a", "b"):
        good_folder(tmp_path / name, 3)
    data = ImageFolder(tmp_path, memory=0)
    (tmp_path / "a" / "0002.png").unlink()
    (tmp_path / "b" / "0002.png").write_bytes(jpeg_bytes(ramp())[:99])
    for _ in range(2):
        values, labels = data.read([1, 2, 5])
        assert labels is not None
        assert labels.tolist() == [0, 1, 0]  # 2 became 3, 5 became 0
        np.testing.assert_array_equal(values, [ramp(seed=1), ramp(seed=0), ramp(seed=0)])
        assert [name for name, _ in data.skipped] == ["a/0002.png", "b/0002.png"]
    save(tmp_path / "a" / "0001.png", ramp(16, 8))  # whole, but another picture than the one that was found
    assert data.read([1])[0].tolist() == [ramp(seed=0).tolist()]
    assert data.skipped[-1] == ("a/0001.png", "the file has changed since it was found")
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    with pytest.raises(UndiffuseError, match="cannot be used"):
        data.read([0])


# ---- fingerprint ----


def test_the_fingerprint_sees_changes_and_nothing_else(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "a", 3)
    first = open_dataset(str(folder)).fingerprint
    assert open_dataset(str(folder)).fingerprint == first
    folder.rename(tmp_path / "b")
    folder = tmp_path / "b"
    assert open_dataset(str(folder)).fingerprint == first  # the root may move
    assert open_dataset(str(folder), channels=1).fingerprint != first
    assert open_dataset(str(folder), image_size=4).fingerprint != first
    status = (folder / "0000.png").stat()
    os.utime(folder / "0000.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    second = open_dataset(str(folder)).fingerprint
    assert second != first
    (folder / "0002.png").rename(folder / "0003.png")
    third = open_dataset(str(folder)).fingerprint
    assert third not in (first, second)
    save(folder / "0004.png", ramp(seed=9))
    assert open_dataset(str(folder)).fingerprint not in (first, second, third)
