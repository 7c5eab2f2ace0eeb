"""What is large in the cache has a limit, and what was used the longest ago goes first."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from undiffuse import cache
from undiffuse.cache import Room
from undiffuse.codecs import Fold, measure
from undiffuse.data import Dataset, from_array
from undiffuse.data.latents import Latents
from undiffuse.errors import UndiffuseError


def entry(folder: Path, name: str, age: float, size: int = 100_000) -> Path:
    """An entry of the cache that was used so many seconds before this process began; a folder, or a text's file."""
    path = folder / name
    inside = path / "00000.npy" if name.startswith("latents/") else path
    inside.parent.mkdir(parents=True, exist_ok=True)
    inside.write_bytes(bytes(size))
    os.utime(path, (cache.BEGUN - age, cache.BEGUN - age))
    return path


@pytest.fixture(autouse=True)
def _limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDIFFUSE_CACHE_GB", "0.001")  # 1 MB


def test_what_was_used_the_longest_ago_goes_until_there_is_room_and_a_tenth(tmp_path: Path) -> None:
    texts = [entry(tmp_path, f"texts/abc/{i:02d}/{i}", age=1000 - 200 * i) for i in range(4)]
    latents = [entry(tmp_path, f"latents/{i}", age=900 - 200 * i) for i in range(4)]
    learned = entry(tmp_path, "features/network.safetensors", age=5000)
    room = Room(tmp_path)
    assert room.take(150_000)  # 800,000 of a million are there
    assert all(path.exists() for path in (*texts, *latents))
    assert room.take(220_000)  # this and a tenth of the limit must be free: two more
    assert [path.exists() for path in texts] == [False, True, True, True]
    assert [path.exists() for path in latents] == [False, True, True, True]
    assert learned.exists()  # not of the kind that has a limit


def test_what_this_process_uses_stays_even_beyond_the_limit(tmp_path: Path) -> None:
    old, mine = entry(tmp_path, "latents/old", 50), entry(tmp_path, "latents/mine", 100, 950_000)
    cache.used(mine)
    room = Room(tmp_path)
    assert not room.take(200_000)
    assert mine.exists()
    assert not old.exists()
    assert not room.take(200_000)


def test_latents_of_other_data_make_room(tmp_path: Path) -> None:
    def data(seed: int) -> Dataset:
        return from_array(np.random.default_rng(seed).integers(0, 256, (300, 8, 8, 3), dtype=np.uint8))

    def encoded(of: Dataset) -> Latents:
        codec = Fold(3, 2, 2)
        measure(codec, [of.batch(range(300))[0]], "noise")
        return Latents(of, codec, cache=tmp_path)

    first, second = encoded(data(0)), encoded(data(1))  # 230,000 bytes each
    folders = sorted((tmp_path / "latents").iterdir())
    assert len(folders) == 2
    seen = first.batch(range(300))[0]
    for folder in folders:
        os.utime(folder, (1, 1))
    encoded(data(1))  # used again
    others = [encoded(data(seed)) for seed in (2, 3, 4)]
    left = sorted((tmp_path / "latents").iterdir())
    assert len(left) == 4
    assert len(set(left) & set(folders)) == 1  # the first is gone
    assert (first.batch(range(300))[0] == seen).all()  # and goes on for who has it open
    assert len(second.batch(range(300))[0]) == len(others[0].batch(range(300))[0]) == 300
    again = encoded(data(0))
    assert (again.batch(range(300))[0] == seen).all()


def test_links_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(bytes(2_000_000))
    (tmp_path / "cache" / "latents").mkdir(parents=True)
    (tmp_path / "cache" / "latents" / "link").symlink_to(outside)
    os.utime(tmp_path / "cache" / "latents" / "link", (1, 1), follow_symlinks=False)
    entry(tmp_path / "cache", "latents/large", age=10, size=950_000)
    assert Room(tmp_path / "cache").take(500_000)
    assert (outside / "precious").exists()


@pytest.mark.parametrize("said", ["much", "-1", "nan", "inf"])
def test_a_limit_that_is_none_is_refused(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDIFFUSE_CACHE_GB", said)
    with pytest.raises(UndiffuseError, match="a number of gigabytes"):
        Room(tmp_path)
