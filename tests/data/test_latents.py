"""Latents of data: encoded once, under a key of all that decides them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from undiffuse.codecs import Codec, Fold, measure
from undiffuse.data import from_array
from undiffuse.data import latents as module
from undiffuse.data.augment import Augment
from undiffuse.data.base import ArrayDataset, Dataset
from undiffuse.data.latents import Latents, latent_spec
from undiffuse.errors import UndiffuseError


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD", 8)


def data(seed: int = 0) -> ArrayDataset:
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    pixels[:, :, :4] //= 2  # left and right differ
    pixels[0, 0, 0] = 255
    found = from_array(pixels)
    assert isinstance(found, ArrayDataset)
    return found


def codec(of: Dataset, scale: float = 1.0) -> Codec:
    made = Fold(3, 2, 2)
    measure(made, [scale * of.batch(range(len(of)))[0]], of.name)
    return made


def files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.npy"))


def test_trap_D5_the_latents_of_a_set_have_mean_0_and_deviation_1(tmp_path: Path) -> None:
    pixels = data()
    z, _ = Latents(pixels, codec(pixels), cache=tmp_path).batch(range(30))
    each = z.transpose(0, 1).flatten(1)
    assert each.mean(1).abs().max() < 1e-5
    assert (each.std(1, unbiased=False) - 1).abs().max() < 1e-5


def test_an_item_is_the_codec_s_of_the_item(tmp_path: Path) -> None:
    pixels = data()
    c = codec(pixels)
    found = Latents(pixels, c, cache=tmp_path)
    z, _ = found.batch([29, 3, 3, 8])
    assert torch.equal(z, c.encode(pixels.batch([29, 3, 3, 8])[0]))
    assert found.spec == latent_spec(pixels.spec, c)
    assert found.original is pixels
    part = found.split(0.2, 0)[1]
    assert part.codec is c
    assert torch.equal(part.batch([1])[0], c.encode(part.original.batch([1])[0]))


def test_it_is_encoded_once(tmp_path: Path) -> None:
    pixels, seen = data(), []
    first = Latents(pixels, codec(pixels), cache=tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (30, 30)
    before = {file: file.stat().st_mtime_ns for file in files(tmp_path)}
    seen.clear()
    again = Latents(pixels, codec(pixels), cache=tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert not seen
    assert {file: file.stat().st_mtime_ns for file in files(tmp_path)} == before
    assert again.fingerprint == first.fingerprint


def test_what_was_interrupted_or_damaged_goes_on(tmp_path: Path) -> None:
    pixels = data()
    z, _ = Latents(pixels, codec(pixels), cache=tmp_path).batch(range(30))
    first, second, third, _ = files(tmp_path)
    first.unlink()
    second.write_bytes(second.read_bytes()[:50])
    np.save(third, np.zeros((1, 2)))
    assert torch.equal(Latents(pixels, codec(pixels), cache=tmp_path).batch(range(30))[0], z)


def test_the_key_changes_with_data_codec_and_preprocessing(tmp_path: Path) -> None:
    pixels = data()
    prints = {Latents(pixels, codec(pixels), cache=tmp_path).fingerprint}
    for other, coded in ((data(1), codec(pixels)), (pixels, codec(pixels, 0.5))):
        prints.add(Latents(other, coded, cache=tmp_path).fingerprint)
    assert len(prints) == 3
    assert len({file.parent for file in files(tmp_path)}) == 3
    halved = codec(pixels)
    halved.precision = torch.bfloat16
    Latents(pixels, halved, cache=tmp_path)
    assert len({file.parent for file in files(tmp_path)}) == 4


def test_mirrored_data_are_encoded_and_not_mirrored_latents(tmp_path: Path) -> None:
    pixels = data()
    c = codec(pixels)
    always = Augment(flip=1.0)
    found = Latents(pixels, c, always, cache=tmp_path)
    where = np.arange(5)
    z, _ = found.augmented(always, 0, np.zeros(5, int), where)
    x, _ = pixels.batch(where)
    assert torch.equal(z, c.encode(x.flip(-1)))
    assert not torch.allclose(z, c.encode(x).flip(-1))
    half = Augment(flip=0.5)
    drawn, _ = found.augmented(half, 3, np.full(30, 2), np.arange(30))
    seen, _ = half(pixels.batch(range(30))[0], 3, np.full(30, 2), np.arange(30))
    assert torch.equal(drawn, c.encode(seen))  # as for pictures


def test_a_copy_that_is_missing_and_what_cannot_be_done_to_latents_are_refused(tmp_path: Path) -> None:
    pixels = data()
    plain = Latents(pixels, codec(pixels), cache=tmp_path)
    with pytest.raises(UndiffuseError, match="without their mirror images"):
        plain.augmented(Augment(flip=1.0), 0, np.zeros(2, int), np.arange(2))
    for wrong in (Augment(shift=1), Augment(geometric=0.1)):
        with pytest.raises(UndiffuseError, match="cannot be done to latents"):
            Latents(pixels, codec(pixels), wrong, cache=tmp_path)


def test_what_is_known_of_the_items_is_known_of_their_latents(tmp_path: Path) -> None:
    values = data().values(range(30))
    weights = np.arange(30, dtype=np.float64)
    known = from_array(values, np.arange(30) % 3, attributes={"kind": list("ab" * 15)}, numbers={"weight": weights})
    found = Latents(known, codec(known), Augment(flip=0.5), cache=tmp_path)
    assert (found.spec.attributes, found.spec.numbers) == (known.spec.attributes, known.spec.numbers)
    where = np.array([4, 0, 29])
    for given in (found.batch(where)[1], found.augmented(Augment(flip=0.5), 0, np.zeros(3, int), where)[1]):
        wanted = known.batch(where)[1]
        assert given.keys() == wanted.keys() == {"classes", "attributes", "numbers"}
        assert all(torch.equal(given[name], wanted[name]) for name in wanted)


def test_an_item_that_cannot_be_read_any_more_is_not_replaced_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = data()
    c = codec(pixels)
    monkeypatch.setattr(type(pixels), "lost", lambda self, indices: np.asarray(indices) == 9)
    with pytest.raises(UndiffuseError, match="item 9: cannot be read any more"):
        Latents(pixels, c, cache=tmp_path)
    assert len(files(tmp_path)) == 1  # what came before is kept
