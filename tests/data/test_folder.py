from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from data.pictures import bad_files, good_folder, jpeg_bytes, png_bytes, ramp, save
from undiffuse.data import open_dataset
from undiffuse.data.folder import Files, Images
from undiffuse.data.folder import scan as scan_store
from undiffuse.data.png import encode16
from undiffuse.data.store import Folder, printable
from undiffuse.errors import UndiffuseError, UndiffuseWarning


def everything(dataset) -> np.ndarray:
    return dataset.values(range(len(dataset)))


def image_folder(root: Path, *, channels=None, **options) -> Files:
    return Files(Folder(root), Images(channels=channels), **options)


def scan(root: Path):
    return scan_store(Folder(root), Images())


def quiet(root: Path, **options) -> Files:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndiffuseWarning)
        return image_folder(root, **options)


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
    with pytest.raises(UndiffuseError, match="2 files beside class folders"):
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
        image_folder(tmp_path)
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
    with pytest.raises(UndiffuseError, match="is empty"):
        open_dataset(str(tmp_path))
    (tmp_path / "a.xyz").write_bytes(b"RIFF")
    with pytest.raises(UndiffuseError, match=r"no images.*1 \.xyz"):
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


def test_trap_D2_16_bit_colour_stays_16_bit(tmp_path: Path) -> None:
    deep = np.stack([np.arange(65536, dtype=np.uint16).reshape(256, 256) ^ (c * 0x5555) for c in range(3)], axis=-1)
    (tmp_path / "a.png").write_bytes(encode16(deep))
    (tmp_path / "b.png").write_bytes(encode16(deep[::-1]))
    data = open_dataset(str(tmp_path))
    assert data.describe() == "2 images 256x256x3 uint16 [0, 65535]"
    np.testing.assert_array_equal(data.spec.to_data(data.batch([0, 1])[0]), [deep, deep[::-1]])
    save(tmp_path / "c.png", ramp(256, 256))
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


# ---- large folders: decoded when asked for ----


def test_on_demand_gives_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        good_folder(tmp_path / name, 6)
    kept, lazy = quiet(tmp_path), quiet(tmp_path, memory=0)
    assert lazy.streams
    assert not kept.streams
    assert lazy.fingerprint == quiet(tmp_path, memory=0).fingerprint  # of less than that of what is kept
    assert kept.spec == lazy.spec
    order = [7, 0, 0, 11, 3]
    for one, other in zip(kept.read(order), lazy.read(order), strict=True):
        np.testing.assert_array_equal(one, other)
    assert lazy.values([]).shape == (0, 8, 8, 3)


def test_a_file_that_breaks_later_is_replaced_with_its_label(tmp_path: Path) -> None:
    for name in ("a", "b"):
        good_folder(tmp_path / name, 3)
    data = image_folder(tmp_path, memory=0)
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


@pytest.mark.parametrize("memory", [2**30, 0])
def test_RS8_the_fingerprint_sees_changes_and_nothing_else(tmp_path: Path, memory: int) -> None:
    """The list "between runs", for data that are kept in memory and for data that are streamed."""

    def print_of(root: Path, **options) -> str:
        return quiet(root, memory=memory, **options).fingerprint

    folder = good_folder(tmp_path / "a", 3)
    first = print_of(folder)
    assert print_of(folder) == first
    folder.rename(tmp_path / "b")
    folder = tmp_path / "b"
    assert print_of(folder) == first  # the root may move
    assert print_of(folder, channels=1) != first
    status, content = (folder / "0001.png").stat(), (folder / "0001.png").read_bytes()
    (folder / "0001.png").unlink()
    removed = print_of(folder)
    (folder / "0001.png").write_bytes(content)
    os.utime(folder / "0001.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert print_of(folder) == first  # nor does the order on the disk matter
    os.utime(folder / "0001.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    touched = print_of(folder)
    other = png_bytes(ramp(8, 8, 3, 1), compress_level=0)
    (folder / "0001.png").write_bytes(other)
    os.utime(folder / "0001.png", ns=(1, 1))
    before = print_of(folder)
    (folder / "0001.png").write_bytes(png_bytes(ramp(8, 8, 3, 2), compress_level=0))  # of the same size
    assert (folder / "0001.png").stat().st_size == len(other)
    os.utime(folder / "0001.png", ns=(1, 1))
    changed = print_of(folder)
    (folder / "0002.png").rename(folder / "0003.png")
    renamed = print_of(folder)
    save(folder / "0004.png", ramp(seed=9))
    added = print_of(folder)
    assert len({first, removed, touched, before, changed, renamed, added}) == 7


def test_RS8_what_is_kept_in_memory_is_known_to_the_last_byte(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    save(tmp_path / "0.bmp", noise)
    first = quiet(tmp_path).fingerprint
    status = (tmp_path / "0.bmp").stat()
    noise[32, 32] ^= 1  # far from both ends of the file
    save(tmp_path / "0.bmp", noise)
    os.utime(tmp_path / "0.bmp", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert quiet(tmp_path).fingerprint != first


# ---- captions and attributes ----


def test_captions_and_attributes(tmp_path: Path) -> None:
    good_folder(tmp_path, 4)
    lines = [
        {"file_name": "0001.png", "text": " a red cat ", "breed": "manx", "age": 3},
        {"file_name": "./0000.png", "caption": "ein Hund, größer", "breed": "pug", "age": 4},
        {"file_name": "0002.png", "text": "猫", "breed": "manx", "boxes": [1, 2]},
        {"file_name": "0003.png", "text": "x", "breed": "manx"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n", "utf-8")
    with pytest.warns(UndiffuseWarning, match="attributes that are not used: age, breed; choose one with labels=age"):
        data = open_dataset(str(tmp_path))
    assert data.texts == ("ein Hund, größer", "a red cat", "猫", "x")
    assert data.labels is None
    bred = open_dataset(str(tmp_path), labels="breed")
    assert bred.spec.classes == ("manx", "pug")
    assert bred.labels is not None
    assert bred.labels.tolist() == [1, 0, 0, 0]
    assert bred.fingerprint != data.fingerprint
    train, held = bred.split(0.5, 0)
    for part in (train, held):
        assert part.texts is not None
        assert len(part.texts) == len(part)
    with pytest.raises(UndiffuseError, match="2 files have no age"):
        open_dataset(str(tmp_path), labels="age")
    with pytest.raises(UndiffuseError, match="did you mean 'breed'"):
        open_dataset(str(tmp_path), labels="bred")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(lines[0]) + '\n{"file_name": "away.png", "text": "y"}\n')
    with pytest.warns(UndiffuseWarning) as caught:
        data = open_dataset(str(tmp_path))
    said = " ".join(str(each.message) for each in caught)
    assert "speaks of 1 files that are not there" in said
    assert "3 of 4 files have no caption" in said
    assert data.texts == ("", "a red cat", "", "")


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "3", "{}", '{"file_name": 3}', "[" * 100_000, '{"file_name": "0000.png"}\n{"file_name": "0000.png"}'],
)
def test_bad_metadata_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    good_folder(tmp_path, 2)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0001.png"}\n' + line)
    with pytest.raises(UndiffuseError, match=r"metadata.jsonl, line \d"):
        open_dataset(str(tmp_path))


def test_files_beside_the_pictures(tmp_path: Path) -> None:
    good_folder(tmp_path, 3)
    for index, (caption, label) in enumerate((("a cat", "cat"), ("a dog", "dog"), ("", "cat"))):
        (tmp_path / f"000{index}.txt").write_text(caption + "\n")
        (tmp_path / f"000{index}.cls").write_text(label)
    (tmp_path / "0002.json").write_text('{"caption": "third", "class": "dog"}')
    (tmp_path / "readme.txt").write_text("not a caption")
    data = quiet(tmp_path)
    assert data.texts == ("a cat", "a dog", "")  # .txt comes after .json
    assert data.spec.classes == ("cat", "dog")
    assert quiet(tmp_path, labels="none").labels is None


def test_classes_from_names(tmp_path: Path) -> None:
    for name in ("cat_1.png", "dog-1.png", "dog_2.png"):
        save(tmp_path / "pets" / name, ramp(seed=len(name)))
    data = open_dataset(str(tmp_path), labels="name")
    assert data.spec.classes == ("cat", "dog")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 1]
    with pytest.raises(UndiffuseError, match="no class folders"):
        open_dataset(str(tmp_path), labels="folder")
