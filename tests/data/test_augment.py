from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch

from data.pictures import good_folder
from undiffuse import Pipeline
from undiffuse.data import Subset, from_array
from undiffuse.data.augment import LABELS, Augment, advice
from undiffuse.data.folder import Files, Images
from undiffuse.data.store import Folder
from undiffuse.distributed import Team
from undiffuse.errors import UndiffuseError, UndiffuseWarning
from undiffuse.training import Trainer, make_recipe

ALL = Augment(flip=0.5, shift=2, geometric=0.5)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(40, 3, 8, 10, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_off_changes_nothing(x: torch.Tensor) -> None:
    out, told = Augment()(x, 0, [0] * 40, range(40))
    assert out is x
    assert told is None
    assert not Augment()


@pytest.mark.parametrize("augment", [Augment(flip=0.5), Augment(shift=2), Augment(geometric=0.5), ALL])
def test_trap_R9_draws_are_functions_of_seed_epoch_and_index(x: torch.Tensor, augment: Augment) -> None:
    whole, told = augment(x, 3, [1] * 40, range(40))
    order = [7, 3, 39, 0]
    part, same = augment(x[order], 3, [1] * 4, order)
    torch.testing.assert_close(part, whole[order], rtol=0, atol=1e-6)
    assert (told is None) == (same is None)
    if told is not None and same is not None:
        torch.testing.assert_close(same, told[order])
    for seed, epoch in ((3, 2), (4, 1)):
        assert not torch.equal(augment(x, seed, [epoch] * 40, range(40))[0], whole)
    assert torch.equal(augment(x, 3, [1] * 40, range(40))[0], whole)


def test_flips_and_moves_are_exact(x: torch.Tensor) -> None:
    out, _ = Augment(flip=0.5)(x, 0, [0] * 40, range(40))
    mirrored = [bool(torch.equal(a, b.flip(-1))) for a, b in zip(out, x, strict=True)]
    kept = [bool(torch.equal(a, b)) for a, b in zip(out, x, strict=True)]
    assert [a != b for a, b in zip(mirrored, kept, strict=True)] == [True] * 40
    assert 8 < sum(mirrored) < 32
    assert torch.equal(Augment(flip=1.0)(x, 0, [0] * 40, range(40))[0], x.flip(-1))
    wide = np.pad(x.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect")
    out, _ = Augment(shift=2)(x, 0, [0] * 40, range(40))
    found = set()
    for index in range(40):
        places = [
            (i, j)
            for i in range(5)
            for j in range(5)
            if np.array_equal(wide[index, :, i : i + 8, j : j + 10], out[index].numpy())
        ]
        assert len(places) == 1
        found.add(places[0])
    assert len(found) > 12  # of 25


def test_the_geometric_set_does_what_its_labels_say_and_they_say_all(x: torch.Tensor) -> None:
    """Table 6 of Karras et al. 2022, appendix F, as one matrix made from the 9 numbers alone: nothing else is drawn."""
    height, width = 32, 48
    x = torch.nn.functional.interpolate(x[:, :1], size=(height, width), mode="bicubic").repeat(10, 1, 1, 1)  # smooth
    out, told = Augment(geometric=0.3)(x, 0, [0] * 400, range(400))
    assert told is not None
    assert told.shape == (400, LABELS)
    done = (told[:, [0, 1, 2, 4, 5, 7]] != 0).double()
    assert done.mean(0).sub(torch.tensor([0.5, 0.15, 0.3, 0.3, 0.3, 0.3])).abs().max() < 0.08
    assert (done.sum(1) > 3).any()  # many at once, too
    rows, columns = np.mgrid[0:height, 0:width] + 0.5
    places = np.stack([columns - width / 2, rows - height / 2, np.ones_like(rows)]).reshape(3, -1)
    errors = []
    for before, after, label in zip(x[:, 0].numpy(), out[:, 0].numpy(), told.double().numpy(), strict=True):
        a0, a1, a2, cos, sin, b, c, a6, a7 = label
        flips = np.diag([1 - 2 * a0, 1 - 2 * a1, 1])
        scaling = np.diag([2 ** (0.2 * a2), 2 ** (0.2 * a2), 1])
        rotation = np.array([[cos + 1, sin, 0], [-sin, cos + 1, 0], [0, 0, 1]])  # by -a3
        anisotropy = np.eye(3)
        anisotropy[:2, :2] = scipy.linalg.expm(0.2 * np.log(2) * np.array([[b, c], [c, -b]]))
        translation = np.array([[1, 0, a6 * width / 8], [0, 1, a7 * height / 8], [0, 0, 1]])
        made = translation @ anisotropy @ rotation @ scaling @ flips  # from the old place to the new one
        u, v, _ = np.linalg.inv(made) @ places
        i, j = v + height / 2 - 0.5, u + width / 2 - 0.5
        inside = (i > 1) & (i < height - 2) & (j > 1) & (j < width - 2)
        expected = scipy.ndimage.map_coordinates(before, [i[inside], j[inside]], order=1)
        errors += list(np.abs(after.reshape(-1)[inside] - expected))
    assert len(errors) > 200_000
    assert np.mean(errors) < 0.02
    assert np.quantile(errors, 0.999) < 0.2


def test_what_it_is_not_for() -> None:
    grey = from_array(np.arange(5 * 64, dtype=np.uint8).reshape(5, 8, 8)).spec
    series = from_array(np.random.default_rng(0).normal(size=(5, 1, 30))).spec
    with pytest.raises(UndiffuseError, match="two spatial axes"):
        replace(make_recipe("tiny", series, 5), augment=Augment(flip=0.5)).check(series)
    with pytest.raises(UndiffuseError, match="less than the sides"):
        replace(make_recipe("tiny", grey, 5), augment=Augment(shift=8)).check(grey)
    for wrong in (lambda: Augment(flip=2.0), lambda: Augment(geometric=-0.1), lambda: Augment(shift=-1)):
        with pytest.raises(UndiffuseError, match=r"augment\."):
            wrong()
    letters = replace(grey, classes=("a", "b"))
    assert advice(letters, Augment()) == ""
    assert "flip=0.5" in advice(grey, Augment())
    with pytest.warns(UndiffuseWarning, match="digits or letters"):
        replace(make_recipe("tiny", letters, 5), augment=Augment(flip=0.5)).check(letters)


# ---- in training ----


def trainer(data, augment: Augment = ALL, *, seed: int = 0, **options) -> Trainer:
    recipe = make_recipe("tiny", data.spec, len(data))
    recipe = replace(recipe, augment=augment, training=replace(recipe.training, batch_size=8))
    return Trainer(data, recipe, seed=seed, **options)


@pytest.fixture
def pictures(tmp_path: Path) -> Files:
    for name in ("a", "b"):
        good_folder(tmp_path / name, 6)
    with pytest.warns(UndiffuseWarning, match="same file"):
        kept = Files(Folder(tmp_path), Images())
    assert not kept.streams
    return Files(Folder(tmp_path), Images(), memory=0)


@pytest.mark.parametrize("name", ["RS3", "RS4"])
def test_RS3_RS4_workers_do_not_change_the_batches(pictures: Files, name: str) -> None:
    runs = [trainer(pictures, workers=workers) for workers in (0, 1, 2)]
    start = 0 if name == "RS3" else 3  # RS4: a resumed run with another number of workers
    for one in runs:
        one.step = start
    for step in range(start, start + 5):
        batches = []
        for one in runs:
            one.step = step
            batches.append(one._batch())
        for x0, cond in batches[1:]:
            assert torch.equal(x0, batches[0][0])
            assert cond.keys() == batches[0][1].keys() == {"classes", "augmentation"}
            assert all(torch.equal(cond[key], batches[0][1][key]) for key in cond)


def test_trap_R9_epochs_differ_and_ranks_do_not(pictures: Files) -> None:
    few = Subset(pictures, range(4))  # two epochs in a batch of 8
    one = trainer(few, Augment(flip=0.5, shift=3))
    x0, _ = one.read(0)
    order = np.concatenate([np.argsort(np.argsort(x0[part].flatten(1).sum(1))) for part in (slice(0, 4), slice(4, 8))])
    assert len(order) == 8
    assert not torch.equal(x0[:4].sort(0).values, x0[4:].sort(0).values)
    halves = [one.read(0, Team(rank, 2))[0] for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), x0)


def test_the_augmentation_is_told_in_training_and_none_in_sampling(pictures: Files) -> None:
    one = trainer(pictures, Augment(geometric=1.0))
    _, cond = one.read(0)
    dropped = one.denoiser.conditions.drop(cond, torch.zeros(8), 1.0)
    assert torch.equal(dropped["augmentation"], cond["augmentation"])  # dropping it would leak
    assert (dropped["classes"] == 2).all()
    for _ in range(3):
        one.update()
    pipeline = one.pipeline()
    assert pipeline.config.conditions["augmentation"] == {"kind": "augmentation", "size": 9}
    asked = pipeline.conditions(range(4), None)
    assert not asked["augmentation"].any()
    assert pipeline.denoiser.conditions.part("augmentation").embed(torch.zeros(1, 9)).vector.abs().max() == 0
    assert pipeline.sample(2, steps=2, guidance_scale=2).shape == (2, 8, 8, 3)


def test_without_classes_there_is_nothing_to_guide_to(pictures: Files, tmp_path: Path) -> None:
    data = Files(Folder(tmp_path), Images(), labels="none", memory=0)
    one = trainer(data, Augment(geometric=0.5))
    one.update()
    pipeline = Pipeline.load(one.pipeline().save(tmp_path / "model"))
    assert pipeline.sampling.guidance_scale == 1
    assert pipeline.sample(1, steps=2).shape == (1, 8, 8, 3)
    with pytest.raises(UndiffuseError, match="without conditions"):
        pipeline.sample(1, steps=2, guidance_scale=2)


def test_augmentation_off_trains_as_before(pictures: Files) -> None:
    one = trainer(pictures, Augment())
    x0, cond = one.read(0)
    assert cond.keys() == {"classes"}
    values = pictures.batch(range(12))[0]
    assert all(any(torch.equal(each, other) for other in values) for each in x0)
