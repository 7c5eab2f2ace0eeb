"""Data sets of the package ``datasets``, made on the fly; nothing is fetched."""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.pictures import ramp
from undiffuse.data import open_dataset
from undiffuse.errors import UndiffuseError, UndiffuseWarning

datasets = pytest.importorskip("datasets")
NAMES = ["zebra", "ape", "cat"]  # not sorted


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def png(seed: int) -> bytes:
    buffer = BytesIO()
    Image.fromarray(ramp(seed=seed)).save(buffer, "PNG")
    return buffer.getvalue()


def table(count: int = 6, **columns: Any) -> Any:
    values: dict[str, Any] = {"image": [{"bytes": png(row), "path": None} for row in range(count)]}
    features: dict[str, Any] = {"image": datasets.Image()}
    for name, (kind, column) in columns.items():
        features[name], values[name] = kind, column
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


LABEL = (datasets.ClassLabel(names=NAMES), [0, 2, 2, 0, 0, 2])
TEXT = (datasets.Value("string"), list("abcdef"))


def test_a_saved_data_set_is_its_rows(tmp_path: Path) -> None:
    path = str(tmp_path / "saved")
    table(label=LABEL, text=TEXT).save_to_disk(path)
    for data in (open_dataset(path), open_dataset(f"hf:{path}")):
        assert data.spec.classes == tuple(NAMES)
        assert data.labels is not None
        assert data.labels.tolist() == LABEL[1]
        assert data.texts == tuple("abcdef")
        assert data.called(3) == "row 0000003"
        np.testing.assert_array_equal(data.values([4, 1]), [ramp(seed=4), ramp(seed=1)])
        assert data.fingerprint == open_dataset(path).fingerprint
    assert open_dataset(path, labels="none").labels is None
    assert open_dataset(path, labels="text", image_size=4).spec.classes == tuple("abcdef")
    table(label=LABEL, text=(TEXT[0], list("abcdeg"))).save_to_disk(str(tmp_path / "other"))
    assert open_dataset(str(tmp_path / "other")).fingerprint != open_dataset(path).fingerprint


def test_splits_and_files_of_the_hub(tmp_path: Path) -> None:
    """A folder of parquet files is what the Hub keeps."""
    (tmp_path / "hub").mkdir()
    table(label=LABEL).to_parquet(str(tmp_path / "hub" / "train-0.parquet"))
    table(4).to_parquet(str(tmp_path / "hub" / "test-0.parquet"))
    assert len(open_dataset(f"hf:{tmp_path / 'hub'}")) == 6
    both = datasets.DatasetDict({"train": table(label=LABEL), "test": table(4)})
    both.save_to_disk(str(tmp_path / "both"))
    assert len(open_dataset(f"hf:{tmp_path / 'both'}")) == 6
    assert len(open_dataset(f"hf:{tmp_path / 'both'}:test")) == 4
    with pytest.raises(UndiffuseError, match="did you mean 'test'"):
        open_dataset(f"hf:{tmp_path / 'both'}:tset")


def test_columns(tmp_path: Path) -> None:
    def opened(**columns):
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        table(**columns).save_to_disk(str(path))
        return str(path)

    coarse = (datasets.ClassLabel(names=["x", "y"]), [0, 1, 0, 1, 0, 1])
    two = opened(fine=LABEL, coarse=coarse)
    with pytest.warns(UndiffuseWarning, match="not used: fine, coarse; choose one with labels=fine"):
        assert open_dataset(two).labels is None
    assert open_dataset(two, labels="coarse").spec.classes == ("x", "y")
    with pytest.raises(UndiffuseError, match="did you mean 'coarse'"):
        open_dataset(two, labels="coarsse")
    lacking = opened(label=(LABEL[0], [0, -1, 2, 0, 0, 2]))
    with pytest.raises(UndiffuseError, match="some rows have no label"):
        open_dataset(lacking)
    several = opened(caption=(datasets.List(datasets.Value("string")), [["one", "two"]] * 6))
    with pytest.warns(UndiffuseWarning, match="the first is taken"):
        assert open_dataset(several).texts == ("one",) * 6
    words = datasets.Dataset.from_dict({"text": ["a"]})
    words.save_to_disk(str(tmp_path / "words"))
    with pytest.raises(UndiffuseError, match=r"no column of images; it has text \(Value\)"):
        open_dataset(str(tmp_path / "words"))
    with pytest.raises(UndiffuseError, match="frames does not apply"):
        open_dataset(two, frames=4)


def test_bad_rows_are_skipped_and_named(tmp_path: Path) -> None:
    whole = table(20)
    cells: list[Any] = [{"bytes": png(row), "path": None} for row in range(20)]
    cells[3], cells[7] = {"bytes": b"no picture", "path": None}, None
    datasets.Dataset.from_dict({"image": cells}, features=whole.features).save_to_disk(str(tmp_path / "saved"))
    with pytest.warns(UndiffuseWarning, match="2 files skipped"):
        data = open_dataset(str(tmp_path / "saved"))
    assert sorted(name for name, _ in data.skipped) == ["row 0000003", "row 0000007"]
    assert len(data) == 18


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scripted").mkdir()
    (tmp_path / "scripted" / "scripted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for name in ("hf:", "hf:a:b:c:d", f"hf:{tmp_path / 'scripted'}", "hf:nobody/nothing"):
        with pytest.raises(UndiffuseError) as refused:
            open_dataset(name)
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists()  # code of a data set never runs
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(UndiffuseError, match="install 4 or later"):
        open_dataset("hf:any")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UndiffuseError, match=r"undiffuse\[data\]"):
        open_dataset("hf:any")
