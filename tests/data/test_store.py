"""Archives are read in place, and nothing in them is believed."""

from __future__ import annotations

import io
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data.pictures import png_bytes, ramp
from undiffuse.data import open_dataset, store
from undiffuse.data.folder import Images, scan
from undiffuse.data.store import BadFile, Tar, Zip
from undiffuse.errors import UndiffuseError, UndiffuseWarning


def picture(seed: int) -> bytes:
    return png_bytes(ramp(seed=seed))


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tarred(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def quiet(path: Path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndiffuseWarning)
        return open_dataset(str(path), **options)


FILES = {f"{name}/{index}.png": picture(10 * (name == "b") + index) for name in "ba" for index in (2, 0, 1)}


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_is_the_folder_that_it_holds(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in FILES.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    make = zipped if kind == "zip" else tarred
    folder = open_dataset(str(tmp_path / "folder"))
    before = sorted(tmp_path.rglob("*"))
    path = make(tmp_path / f"data.{kind}", FILES)
    data = open_dataset(str(path))
    assert data.spec == folder.spec
    for one, other in zip(data.read(range(6)), folder.read(range(6)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, path])  # nothing was extracted
    # the order in the archive does not matter, a byte of a file does
    again = make(tmp_path / f"again.{kind}", dict(sorted(FILES.items())))
    changed = make(tmp_path / f"changed.{kind}", {**FILES, "a/1.png": picture(99)})
    assert open_dataset(str(again)).fingerprint == data.fingerprint
    assert quiet(changed).fingerprint != data.fingerprint


@pytest.mark.parametrize("make", [zipped, tarred])
def test_webdataset(tmp_path: Path, make) -> None:
    files: dict[str, bytes] = {}
    for index, label in enumerate(("cat", "dog", "cat")):
        files |= {f"00{index}.png": picture(index), f"00{index}.cls": label.encode()}
        files |= {f"00{index}.txt": f"a {label}".encode()} if index else {f"00{index}.json": b'{"caption": "first"}'}
    data = open_dataset(str(make(tmp_path / ("a.zip" if make is zipped else "a.tar"), files)))
    assert data.texts == ("first", "a dog", "a cat")
    assert data.spec.classes == ("cat", "dog")


@pytest.mark.parametrize("make", [zipped, tarred])
@pytest.mark.parametrize(
    "name", ["../out.png", "/abs.png", "a/../../b.png", "c:/a.png", "a\\b.png", "x" * 260 + ".png"]
)
def test_LD6_names_that_lead_out(tmp_path: Path, make, name: str) -> None:
    files = {f"{index:03}.png": picture(index) for index in range(3)}
    path = make(tmp_path / ("a.zip" if make is zipped else "a.tar"), {**files, name: picture(9)})
    with pytest.warns(UndiffuseWarning, match=r"1 files skipped.*(leads out|255 bytes)"):
        data = open_dataset(str(path))
    assert len(data) == 3
    assert not (tmp_path.parent / "out.png").exists()


def test_LD6_tar_links_devices_and_copies(tmp_path: Path) -> None:
    path = tarred(tmp_path / "a.tar", {"0.png": picture(0), "1.png": picture(1)})
    with tarfile.open(path, "a") as archive:
        for index, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(f"bad{index}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        info = tarfile.TarInfo("0.png")
        info.size = len(picture(5))
        archive.addfile(info, io.BytesIO(picture(5)))
    found = scan(Tar(path), Images())
    assert [entry.path for entry in found.entries] == ["0.png", "1.png"]
    assert [reason for _, reason in found.skipped] == ["a second entry of that name"] + ["not a regular file"] * 4
    with Tar(path).open(found.entries[0].files[0]) as stream:
        assert stream.read() == picture(0)  # the first of the two


def test_LD6_zip_bombs_links_and_encryption(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", {"0.png": picture(0)})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("bomb.png", bytes(10_000_000))
        link = zipfile.ZipInfo("link.png")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("0.png", picture(1))
        archive.writestr("squeezed.png", picture(2), zipfile.ZIP_LZMA)
        archive.writestr("secret.png", picture(3), zipfile.ZIP_STORED)
    raw = bytearray(path.read_bytes())
    raw[raw.rindex(b"PK\x01\x02") + 8] |= 1  # of the last entry in the directory: encrypted
    path.write_bytes(raw)
    found = scan(Zip(path), Images())
    assert [entry.path for entry in found.entries] == ["0.png"]
    said = dict(found.skipped)
    assert "1/200" in said["bomb.png"]
    assert said["link.png"] == "not a regular file"
    assert said["0.png"] == "a second entry of that name"
    assert "another way" in said["squeezed.png"]
    assert said["secret.png"] == "encrypted"


def test_LD6_a_directory_that_lies(tmp_path: Path) -> None:
    """Name, size or checksum in the central directory are not the entry's own: a bad file, never a wrong one."""
    good = zipped(tmp_path / "good.zip", {"0.png": picture(0), "1.png": picture(1)}).read_bytes()
    directory = good.rindex(b"PK\x01\x02")
    changes = {16: b"\x01\x02\x03\x04", 24: (7).to_bytes(4, "little"), 46: b"2"}
    for at, value in changes.items():
        raw = bytearray(good)
        raw[directory + at : directory + at + len(value)] = value
        path = tmp_path / f"bad{at}.zip"
        path.write_bytes(raw)
        with pytest.warns(UndiffuseWarning, match=r"1 files skipped.*(damaged|truncated|not an image)"):
            assert len(open_dataset(str(path))) == 1


@pytest.mark.parametrize("cut", [0.2, 0.5, 0.9])
def test_LD6_a_cut_archive_is_refused(tmp_path: Path, cut: float) -> None:
    files = {f"{index}.png": png_bytes(ramp(32, 32, 3, index)) for index in range(8)}
    for path in (zipped(tmp_path / "a.zip", files), tarred(tmp_path / "a.tar", files)):
        whole = path.read_bytes()
        length = whole.rindex(b"IEND") if path.suffix == ".tar" else len(whole)
        path.write_bytes(whole[: int(length * cut)])
        with pytest.raises(UndiffuseError, match="damaged"):
            open_dataset(str(path))


def test_LD6_a_damaged_header_is_not_the_end(tmp_path: Path) -> None:
    """tarfile would give the first file and be silent about the others."""
    path = tarred(tmp_path / "a.tar", {f"{index}.png": picture(index) for index in range(4)})
    raw = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        second = archive.getmembers()[1].offset
    raw[second + 148 : second + 156] = b"1234567\0"  # its checksum
    path.write_bytes(raw)
    with pytest.raises(UndiffuseError, match="damaged at byte"):
        open_dataset(str(path))


def test_LD6_other_archives_and_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"{index}.png": picture(index) for index in range(4)}
    inner = zipped(tmp_path / "inner.zip", files).read_bytes()
    with pytest.raises(UndiffuseError, match="decompress"):
        open_dataset(str(tarred(tmp_path / "a.tar.gz", files, "w:gz")))
    with pytest.raises(UndiffuseError, match=r"no images.*1 \.zip"):  # an archive in an archive is a file like others
        open_dataset(str(zipped(tmp_path / "b.zip", {"inner.zip": inner})))
    (tmp_path / "c.zip").write_bytes(b"PK nonsense")
    with pytest.raises(UndiffuseError, match="damaged"):
        open_dataset(str(tmp_path / "c.zip"))
    monkeypatch.setattr(store, "MAX_ENTRIES", 3)
    for path in (zipped(tmp_path / "d.zip", files), tarred(tmp_path / "d.tar", files)):
        with pytest.raises(UndiffuseError, match="more than 3 entries"):
            open_dataset(str(path))


def test_an_archive_that_changes_later(tmp_path: Path) -> None:
    path = tarred(tmp_path / "a.tar", {"0.png": picture(0)})
    tar = Tar(path)
    (file, _), *_ = tar.listing
    path.write_bytes(path.read_bytes()[:530])
    with pytest.raises(BadFile, match="shorter"):
        tar.open(file)
