from __future__ import annotations

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
