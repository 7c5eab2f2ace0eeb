"""Pairs: a picture of the same name belongs to each item, and stays with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training_laws import bits, through_disk
from undiffuse import Pipeline, train
from undiffuse.beside import Smaller
from undiffuse.codecs import Fold
from undiffuse.data import DataSpec, from_array, open_dataset
from undiffuse.data.augment import Augment
from undiffuse.data.folder import Files, Images
from undiffuse.data.latents import Latents
from undiffuse.data.pairs import paired
from undiffuse.data.shown import read_shown
from undiffuse.data.store import Folder
from undiffuse.errors import UndiffuseError, UndiffuseWarning
from undiffuse.evaluation.samples import ask
from undiffuse.training import Trainer, make_recipe

COUNT = 40


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Photos in colour, and sketches: their red channel, in grey."""
    photos, sketches = tmp_path / "photos", tmp_path / "sketches"
    photos.mkdir(), sketches.mkdir()
    for i in range(COUNT):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{i:02}.png")
        Image.fromarray(pixels[..., 0]).save(sketches / f"{i:02}.bmp")
    return photos, sketches


def belongs(x: torch.Tensor, beside: torch.Tensor) -> bool:
    return torch.allclose(x[:, :1], beside, atol=1e-4)


def test_a_picture_stays_with_its_item(folders: tuple[Path, Path]) -> None:
    photos, sketches = folders
    (sketches / "07.bmp").unlink()
    (photos / "09.png").unlink()
    with pytest.warns(UndiffuseWarning, match="1 of 39 files have no partner"):
        data = open_dataset(photos, beside=sketches)
    assert len(data) == COUNT - 2
    assert data.spec.beside is not None
    assert data.spec.beside.shape == (1, 8, 8)
    x, cond = data.batch([0, 7, 37])
    assert belongs(x, cond["beside"])
    most, held_out = data.split(0.2, 0)
    for part in (most, held_out):
        x, cond = part.batch(range(len(part)))
        assert belongs(x, cond["beside"])
    for augment in (Augment(flip=0.5), Augment(shift=2), Augment(flip=0.5, shift=1)):
        x, cond = most.augmented(augment, 0, np.zeros(20, int), np.arange(20))
        assert belongs(x, cond["beside"])
        assert not torch.equal(x, most.batch(range(20))[0])
    read = DataSpec.from_json(json.loads(json.dumps(data.spec.to_json())))
    assert read == data.spec
    assert data.fingerprint != open_dataset(photos, beside=photos).fingerprint
    assert "with pictures 8x8x1" in data.describe()


def test_pairs_that_cannot_be_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    photos, sketches = folders
    other = tmp_path / "other"
    other.mkdir()
    Image.new("L", (8, 8), 255).save(other / "x.png")
    with pytest.raises(UndiffuseError, match="no names in common"):
        open_dataset(photos, beside=other)
    Image.new("L", (8, 8)).save(sketches / "00.png")
    with pytest.raises(UndiffuseError, match="have one name"):
        open_dataset(photos, beside=sketches)
    arrays = from_array(np.zeros((5, 8, 8), np.uint8) + np.arange(5, dtype=np.uint8)[:, None, None] * 60)
    with pytest.raises(UndiffuseError, match="40 items and array 5: no pairs"):
        paired(open_dataset(photos), arrays)
    with pytest.raises(UndiffuseError, match="cannot be shown beside"):
        open_dataset("moons", beside=photos)
    (sketches / "00.png").unlink()
    data = open_dataset(photos, beside=sketches)
    with pytest.raises(UndiffuseError, match="not as latents: train without a codec"):
        Latents(data, Fold(3, 2, 2), cache=tmp_path)
    small = open_dataset(photos, beside=open_small(sketches, tmp_path))
    with pytest.raises(UndiffuseError, match="are of another size"):
        Augment(shift=1).check(small.spec)


def open_small(sketches: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    for path in sketches.iterdir():
        Image.open(path).resize((4, 4)).save(folder / path.name)
    return folder


def test_a_file_that_breaks_never_makes_a_wrong_pair(folders: tuple[Path, Path]) -> None:
    _, sketches = folders
    data = paired(*(Files(Folder(each), Images(), memory=0) for each in folders))
    assert data.streams
    x, cond = data.batch(range(COUNT))
    assert belongs(x, cond["beside"])
    (sketches / "05.bmp").write_bytes(b"x")
    data.batch([4, 6])
    with pytest.raises(UndiffuseError, match=r"05.bmp can no longer be read"):
        data.batch([4, 5])


@pytest.mark.filterwarnings("ignore::undiffuse.errors.UndiffuseWarning")
def test_a_model_of_pairs(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Training resumes to the last bit; the model keeps the pictures' units, asks for them, and is judged by them."""
    photos, sketches = folders
    data = open_dataset(photos, beside=sketches)
    recipe = make_recipe("tiny", data.spec, len(data), "tiny")
    network = {"widths": [8], "blocks": [1], "attention": [0], "embedding": 8}
    recipe = replace(
        recipe,
        model=replace(recipe.model, network=network),
        training=replace(recipe.training, images=8 * 6, batch_size=8, previews=8),
        augment=Augment(flip=0.5),
    )
    straight, stopped = Trainer(data, recipe), Trainer(data, recipe)
    for _ in straight.updates():
        pass
    for _ in range(3):
        stopped.update()
    resumed, found = Trainer(data, recipe), through_disk(stopped, tmp_path / "c")
    resumed.restore(found.snapshot(), "test")
    for _ in resumed.updates():
        pass
    assert bits(resumed) == bits(straight)
    x, cond = straight.read(1)
    assert belongs(x, cond["beside"])

    settings = ("training.previews=8", "training.evaluate_every=0")
    train(str(photos), beside=sketches, out=tmp_path / "run", recipe="tiny", steps=2, device="cpu", set=settings)
    assert (tmp_path / "run" / "samples" / "beside.npy").is_file()
    pipeline = Pipeline.load(tmp_path / "run" / "model")
    assert pipeline.beside is not None
    assert pipeline.beside == data.spec.beside
    shown = read_shown(sketches / "03.bmp", pipeline.beside, holes=False)
    assert torch.equal(shown, data.batch([3])[1]["beside"])
    x = [pipeline.draw(1, cond={"beside": each}) for each in (shown, -shown)]
    assert not torch.equal(x[0], x[1])
    asked = ask(pipeline, data, 10, "data")
    assert set(asked.cond or {}) == {"beside"}
    assert "beside" not in (ask(pipeline, open_dataset(photos), 10, "data").cond or {})
    both = replace(recipe, model=replace(recipe.model, beside=Smaller(2)))
    with pytest.raises(UndiffuseError, match=r"leave out model\.beside"):
        both.config(data.spec)
