from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.pictures import good_folder, ramp
from undiffuse import sample, train
from undiffuse.data import open_dataset
from undiffuse.errors import UndiffuseError, UndiffuseWarning


def test_folders_of_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1", "a/2", "b/1"):
        good_folder(tmp_path / "in" / name, 6)
    good_folder(tmp_path / "in" / "b" / "short", 3)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UndiffuseWarning, match=r"b/short \(3 frames, fewer than frames=4\)"):
        data = open_dataset("in", frames=4)
    assert (data.spec.kind, data.spec.shape) == ("video", (3, 4, 8, 8))
    assert data.spec.classes == ("a", "b")
    np.testing.assert_array_equal(data.values([1])[0], [ramp(seed=seed) for seed in (1, 2, 3, 4)])
    np.testing.assert_array_equal(data.spec.to_data(data.batch([2])[0])[0], data.values([2])[0])
    with pytest.warns(UndiffuseWarning):
        run = train("in", frames=4, recipe="tiny", steps=2, batch_size=2, set=("training.previews=2",)).path
    made = sample(run, number=2, steps=2)
    assert str(made.path) == "samples.webp"
    with Image.open("samples.webp") as image:
        assert image.n_frames == 4  # type: ignore[attr-defined]
    assert open_dataset("in/a", frames=6).labels is None  # a clip's own folder is not its class
    for wrong in (0, 1, True):
        with pytest.raises(UndiffuseError, match="frames"):
            open_dataset("in", frames=wrong)


@pytest.mark.parametrize("extension", ["gif", "webp", "tif", "png"])
def test_pictures_of_several_frames(tmp_path: Path, extension: str) -> None:
    frames = [np.full((8, 12, 3), 40 * index, np.uint8) for index in range(6)]
    for name in ("x", "y"):
        first, *rest = [Image.fromarray(frame) for frame in frames]
        first.save(tmp_path / f"{name}.{extension}", save_all=True, append_images=rest, lossless=True)
    with pytest.warns(UndiffuseWarning, match="same file"):
        data = open_dataset(str(tmp_path), frames=4)
    assert data.spec.shape == (3 if extension != "gif" else data.spec.channels, 4, 8, 12)
    values = data.values([0, 1])[..., 0] if data.spec.channels == 3 else data.values([0, 1])
    assert np.abs(values.mean(axis=(2, 3)) - [40, 80, 120, 160]).max() < 2


# ---- video files ----


def film(path: Path, count: int = 30, *, size: tuple[int, int] = (24, 32), gop: int = 7, turn: int = 0) -> np.ndarray:
    """A video whose frame i is grey of level 8 i, with a brighter left half; its frames decoded in turn."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx" if path.suffix == ".webm" else "mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = *size, "yuv420p", gop
        stream.bit_rate = 1_000_000
        if turn:
            stream.set_display_rotation(turn)
        for index in range(count):
            frame = np.full((*size, 3), 8 * index, np.uint8)
            frame[:, : size[1] // 2] += 15
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("extension", ["mp4", "webm", "mkv", "avi"])
def test_a_video_is_the_frames_in_its_middle(tmp_path: Path, extension: str) -> None:
    straight = film(tmp_path / f"a.{extension}")
    assert len(straight) == 30
    data = open_dataset(str(tmp_path), frames=5)
    assert data.spec.shape == (3, 5, 24, 32)
    np.testing.assert_array_equal(data.values([0])[0], straight[12:17])  # though they were sought, not decoded up to
    assert np.abs(data.values([0])[0, :, :, 20:].mean(axis=(1, 2, 3)) - 8 * np.arange(12, 17)).max() < 6


def test_videos_among_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    film(tmp_path / "in" / "a.mp4")
    film(tmp_path / "in" / "b.mp4", 4, size=(48, 64))
    film(tmp_path / "in" / "short.mp4", 2)
    good_folder(tmp_path / "in" / "c", 5)
    whole = (tmp_path / "in" / "a.mp4").read_bytes()
    (tmp_path / "in" / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "secret.mp4").write_bytes(whole)
    (tmp_path / "in" / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\n../secret.mp4\n#EXT-X-ENDLIST\n")
    with pytest.warns(UndiffuseWarning, match="3 files skipped") as said:
        data = open_dataset(str(tmp_path / "in"), frames=3, image_size=16, labels="none")
    assert data.spec.shape == (3, 3, 16, 16)
    assert sorted(file for file, _ in data.skipped) == ["cut.mp4", "list.mp4", "short.mp4"]
    assert "2 frames, fewer" in str([str(each.message) for each in said])
    (tmp_path / "only").mkdir()
    (tmp_path / "secret.mp4").rename(tmp_path / "only" / "a.mp4")
    with pytest.raises(UndiffuseError, match=r"--frames 16"):
        open_dataset(str(tmp_path / "only"))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UndiffuseError, match=r"undiffuse\[video\]"):
        open_dataset(str(tmp_path / "only"), frames=3)


@pytest.mark.parametrize("turn", [90, 180, -90])
def test_trap_D3_a_video_is_turned_upright(tmp_path: Path, turn: int) -> None:
    straight = film(tmp_path / "a.mp4", turn=turn)
    data = open_dataset(str(tmp_path), frames=2)
    assert data.spec.shape[2:] == ((24, 32) if turn == 180 else (32, 24))
    np.testing.assert_array_equal(data.values([0])[0], [np.rot90(each, turn // 90) for each in straight[14:16]])
