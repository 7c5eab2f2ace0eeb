"""Pictures made of an item itself: what they are, how they are drawn, and that models use them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import undiffuse
from training_laws import bits, through_disk
from undiffuse.beside import BESIDE, Beside, Grey, Holes, Smaller, beside_from, stated
from undiffuse.codecs import Fold, measure
from undiffuse.commands.evaluate import report
from undiffuse.commands.sample import parse_rows, read_beside
from undiffuse.config import from_json, to_json
from undiffuse.data import Dataset, from_array, open_dataset
from undiffuse.data.latents import Latents
from undiffuse.data.shown import picture_spec, read_shown, write_shown
from undiffuse.distributed import Team
from undiffuse.errors import UndiffuseError, UndiffuseWarning
from undiffuse.evaluation.evaluate import evaluate_samples
from undiffuse.evaluation.samples import Judgeable, ask
from undiffuse.outputs import made_by
from undiffuse.pipeline import REGISTRIES, Pipeline
from undiffuse.training import Recipe, Trainer, make_recipe, run_training
from undiffuse.training.draws import told
from undiffuse.training.held_out import HeldOut, divide


def streams(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


# --- What they are ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 12), (3, 8, 12), (1, 8, 4, 12)])
@pytest.mark.parametrize("kind", BESIDE)
def test_shapes_and_ranks(kind: str, shape: tuple[int, ...]) -> None:
    made, x = BESIDE[kind], torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    if kind == "grey" and shape[0] != 3:
        with pytest.raises(UndiffuseError, match="red, green and blue"):
            made.shape(shape)
        return
    picture = made(x, streams(5))
    assert picture.shape == (5, *made.shape(shape))
    assert torch.equal(picture.nan_to_num(9), made(x, streams(5)).nan_to_num(9))  # of the streams alone
    one = made(x[3:4], streams(1, 3))
    assert torch.equal(picture[3:4].nan_to_num(9), one.nan_to_num(9))  # an item's does not depend on its batch
    assert beside_from(json.loads(json.dumps(stated(made)))) == made
    assert from_json(Beside, stated(made), "x", REGISTRIES) == made  # type: ignore[type-abstract]


def test_smaller_is_the_mean_of_blocks() -> None:
    x = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    small = Smaller(4)(x, ())
    assert torch.allclose(small, torch.nn.functional.avg_pool2d(x, 4), atol=1e-6)
    with pytest.raises(UndiffuseError, match="cannot be made smaller by 4"):
        Smaller(4).shape((1, 8, 6))
    with pytest.raises(UndiffuseError, match="factor=1"):
        Smaller(1)


@pytest.mark.parametrize("boxes", [0.0, 1.0])
def test_holes_have_the_share_that_is_asked_and_are_everywhere(boxes: float) -> None:
    holes = Holes(0.2, 0.5, boxes)
    found = torch.stack([holes.hole((16, 24), each) for each in streams(600)]).double()
    share = found.mean((1, 2))
    assert 0.15 < share.min() < 0.25
    assert 0.45 < share.max() < 0.55
    assert abs(float(share.mean()) - 0.35) < 0.02
    everywhere = found.mean(0)
    assert everywhere.min() > 0.02
    x = torch.ones(1, 2, 16, 24)
    shown = holes(x, streams(1))
    assert torch.equal(shown.isnan()[0, 0], found[0].bool())
    assert bool((shown[~shown.isnan()] == 1).all())
    assert Holes(least=1e-6, most=1e-6).hole((4, 4), streams(1)[0]).sum() >= 1
    for wrong in ({"least": 0.5, "most": 0.2}, {"most": 1.5}, {"boxes": 2.0}, {"cell": 0}):
        with pytest.raises(UndiffuseError):
            Holes(**wrong)  # type: ignore[arg-type]


def test_grey_is_that_of_pillow() -> None:
    values = np.random.default_rng(0).integers(0, 256, (1, 4, 4, 3), dtype=np.uint8)
    spec = from_array(np.concatenate([values, values])).spec
    grey = Grey()(spec.to_model(values), ())
    theirs = np.asarray(Image.fromarray(values[0]).convert("L"), float)
    assert np.abs(picture_spec(spec, (1, 4, 4)).to_data(grey)[0] - theirs).max() <= 1


# --- Files of them ----------------------------------------------------------------------------------------------------


def test_pictures_are_read_in_their_units(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    spec = picture_spec(from_array(values).spec, (3, 8, 8))
    for i, each in enumerate(values):
        Image.fromarray(each).save(tmp_path / f"{i}.png")
    assert torch.equal(read_shown(tmp_path, spec, holes=False), spec.to_model(values))
    np.save(tmp_path / "all.npy", values)
    assert torch.equal(read_shown(tmp_path / "all.npy", spec, holes=False), spec.to_model(values))

    Image.fromarray(np.dstack([values[0], np.where(np.arange(64).reshape(8, 8) < 9, 0, 255)]).astype(np.uint8)).save(
        tmp_path / "hole.png"
    )
    hole = read_shown(tmp_path / "hole.png", spec)
    assert hole.isnan().all(1)[0].flatten().tolist() == [i < 9 for i in range(64)]
    known = ~hole.isnan()
    assert torch.equal(hole[known], spec.to_model(values[:1])[known])
    mask = np.zeros((8, 8), np.uint8)
    mask[2:4] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    masked = read_shown(tmp_path / "1.png", spec, tmp_path / "mask.png")
    assert torch.equal(masked.isnan()[0, 0], torch.from_numpy(mask > 0))
    np.save(tmp_path / "again.npy", write_shown(torch.cat([hole, masked]), spec))
    assert torch.equal(read_shown(tmp_path / "again.npy", spec).nan_to_num(9), torch.cat([hole, masked]).nan_to_num(9))

    Image.fromarray(values[0][:4]).save(tmp_path / "wrong.png")
    np.save(tmp_path / "unit.npy", values / 255)
    np.save(tmp_path / "wide.npy", values.astype(np.int64) + 300)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("wrong.png", r"wrong.png: 8x4 \(width, height\); this model takes 8x8"),
        ("unit.npy", "give whole numbers"),
        ("wide.npy", "outside of the declared"),
        ("broken.png", "broken.png"),
        ("nothing.png", "no such file"),
        ("empty", "holds no pictures"),
        ("1.png", "nothing to fill in"),
    ]:
        with pytest.raises(UndiffuseError, match=message):
            read_shown(tmp_path / name, spec)
    with pytest.raises(UndiffuseError, match="shown whole pictures"):
        read_shown(tmp_path / "hole.png", spec, holes=False)


# --- Models of them ---------------------------------------------------------------------------------------------------


def tiny(data: Dataset, beside: Beside, updates: int, **model: Any) -> Recipe:
    base = make_recipe("tiny", data.spec, len(data), "tiny")
    network = {"widths": [16], "blocks": [1], "attention": [0], "embedding": 16}
    return replace(
        base,
        model=replace(base.model, network=network, beside=beside, **model),
        training=replace(base.training, images=32 * updates, batch_size=32, evaluate_every=updates),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Path]:
    """A model of a few seconds that enlarges digits from 4x4 to 8x8."""
    data, out = open_dataset("digits"), tmp_path_factory.mktemp("enlarge") / "run"
    recipe = tiny(data, Smaller(2), 100)
    recipe = replace(recipe, training=replace(recipe.training, preview_every=50, previews=16))
    run_training(data, recipe, out, device="cpu")
    return data, out


def test_super_resolution_uses_its_picture(run: tuple[Dataset, Path]) -> None:
    """With its own small picture a sample is nearer to the item than with another's, and its means are the picture."""
    data, out = run
    pipeline = Pipeline.load(out / "model")
    part = divide(
        data, from_json(Recipe, json.loads((out / "config.json").read_text())["recipe"], "", REGISTRIES).training
    )[1]
    assert part is not None
    x0, rows = told(pipeline.denoiser.conditions, part, range(48))
    assert torch.allclose(rows["beside"], torch.nn.functional.avg_pool2d(x0, 2))

    def drawn(small: torch.Tensor | None) -> torch.Tensor:
        cond = {} if small is None else {"beside": small}
        return pipeline.draw(48, cond=cond, sampling=pipeline.settings(steps=8))

    right, wrong, none = drawn(rows["beside"]), drawn(rows["beside"].roll(1, 0)), drawn(None)
    errors = [float((each - x0).square().mean()) for each in (right, wrong, none)]
    assert errors[0] < 0.75 * min(errors[1:]), errors
    kept = [(torch.nn.functional.avg_pool2d(each, 2) - rows["beside"]).square().mean() for each in (right, wrong)]
    assert float(kept[0]) < 0.5 * float(kept[1]), kept


def test_trap_X8_a_preview_is_what_sample_writes(run: tuple[Dataset, Path], tmp_path: Path) -> None:
    """Previews ask for what real items are; `sample --from` makes the same picture of the pictures kept beside it."""
    _, out = run
    preview = out / "samples" / "preview-000100.png"
    options = made_by(preview)["options"]
    assert Path(options["beside"]) == out / "samples" / "beside.npy"
    assert len(options["classes"].split(",")) == 8
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        undiffuse.sample(from_=preview, device="cpu", out=Path("again.png"))
        found = undiffuse.sample(out, beside=out / "samples" / "beside.npy", device="cpu", steps=2, out=Path("x.npy"))
    assert found.samples == 8  # one for each picture
    assert np.array_equal(np.asarray(Image.open(preview)), np.asarray(Image.open(tmp_path / "again.png")))


def test_pictures_that_have_changed_are_said(run: tuple[Dataset, Path], tmp_path: Path) -> None:
    pipeline = Pipeline.load(run[1] / "model")
    assert pipeline.beside is not None
    np.save(tmp_path / "a.npy", np.zeros((4, 4), np.uint8))
    options = {"beside": str(tmp_path / "a.npy")}
    read_beside(pipeline, options)
    np.save(tmp_path / "a.npy", np.ones((4, 4), np.uint8))
    with pytest.warns(UndiffuseWarning, match="other pictures than it did"):
        read_beside(pipeline, options)
    with pytest.raises(UndiffuseError, match="of what picture"):
        read_beside(pipeline, {"mask": "m.png"})
    with pytest.raises(UndiffuseError, match="given by --beside"):
        parse_rows(["beside=1,2"], pipeline, "cond")


def test_evaluation_asks_for_what_real_items_are(run: tuple[Dataset, Path], tmp_path: Path) -> None:
    """Of a model of more than classes samples are asked for by held-out items; that is said, and hashed."""
    data, out = run
    pipeline = Pipeline.load(out / "model")
    asked = ask(pipeline, data, 60, "data", data)
    assert asked.plan == "items"
    assert set(asked.cond or {}) == {"classes", "beside"}
    assert asked.labels is not None
    assert len(asked.labels) == 60
    other = ask(pipeline, data, 61, "data", data)
    assert asked.content != other.content
    with pytest.raises(UndiffuseError, match="--plan uniform is for models of classes alone"):
        ask(pipeline, data, 60, "uniform")
    model = Judgeable(pipeline, out / "model")
    found = evaluate_samples(
        model,
        data,
        features="pca",
        number=60,
        metrics=["kid"],
        sampling=pipeline.settings(steps=2),
        out=tmp_path,
        cache=tmp_path / "cache",
    )
    assert found.samples["plan"] == "items"
    assert "60 items of the data: classes, beside" in found.samples["plan_in_words"]
    assert "asked        what is known of 60 items" in report(found)


def test_the_likelihood_is_that_of_what_is_known(run: tuple[Dataset, Path]) -> None:
    data, pipeline = run[0], Pipeline.load(run[1] / "model")
    x = data.values(range(4))
    _, rows = told(pipeline.denoiser.conditions, data, range(4))
    own = pipeline.log_likelihood(x, cond=rows, steps=8, probes=2).log_prob
    others = pipeline.log_likelihood(x, cond={k: v.roll(1, 0) for k, v in rows.items()}, steps=8, probes=2).log_prob
    assert float(own.mean()) > float(others.mean())
    with pytest.raises(UndiffuseError, match="4 values, 3 rows of beside"):
        pipeline.log_likelihood(x, cond={"beside": rows["beside"][:3]})


@pytest.mark.parametrize("shown_as", ["channels", "tokens"])
def test_trap_R1_training_with_holes_resumes_to_the_last_bit(tmp_path: Path, shown_as: str) -> None:
    """Holes are a function of (seed, step, position); the held-out ones are always the same."""
    data = open_dataset("digits")
    recipe = tiny(data, Holes(cell=2), 6, beside_as=shown_as, beside_patch=2)

    def whole() -> Trainer:
        return Trainer(data, recipe)

    straight, stopped = whole(), whole()
    for _ in straight.updates():
        pass
    for _ in range(3):
        stopped.update()
    resumed, found = whole(), through_disk(stopped, tmp_path / "c")
    resumed.restore(found.snapshot(), "test")
    for _ in resumed.updates():
        pass
    assert bits(resumed) == bits(straight)
    first, second = (straight.read(step)[1]["beside"] for step in (0, 1))
    assert torch.equal(first.nan_to_num(9), whole().read(0)[1]["beside"].nan_to_num(9))
    assert not torch.equal(first.isnan(), second.isnan())
    shares = torch.cat([straight.read(0, Team(rank, 2))[1]["beside"] for rank in (0, 1)])
    assert torch.equal(first.nan_to_num(9), shares.nan_to_num(9))  # whatever number of processes
    assert len({tuple(each.flatten().tolist()) for each in first.isnan()}) > 16
    part = divide(data, recipe.training)[1]
    assert part is not None
    held = HeldOut(part, recipe)
    assert torch.equal(held.losses(straight.denoiser), held.losses(resumed.denoiser))
    kind = straight.task.config.conditions["beside"]  # type: ignore[attr-defined]
    assert kind["kind"] == {"channels": "picture", "tokens": "patches"}[shown_as]


def test_a_saved_model_knows_how_its_pictures_are_made(run: tuple[Dataset, Path], tmp_path: Path) -> None:
    _, out = run
    pipeline = Pipeline.load(out / "model")
    part = pipeline.denoiser.conditions.part("beside")
    assert part.made == Smaller(2)
    again = Pipeline.load(pipeline.save(tmp_path / "model"))
    assert again.denoiser.conditions.config == pipeline.denoiser.conditions.config
    assert again.beside == pipeline.beside
    assert not again.fills_holes


def test_recipes_without_are_what_they_were() -> None:
    data = open_dataset("digits")
    recipe = make_recipe("tiny", data.spec, len(data))
    assert recipe.config(data.spec).conditions == {"classes": {"kind": "classes", "classes": 10}}
    unread = to_json(recipe, REGISTRIES)
    assert unread["model"]["beside"] is None
    del unread["model"]["beside"]
    assert from_json(Recipe, unread, "a recipe of before", REGISTRIES) == recipe


def test_points_and_latents_are_refused(tmp_path: Path) -> None:
    moons = open_dataset("moons")
    with pytest.raises(UndiffuseError, match=r"model\.beside is for data with places"):
        tiny(moons, Smaller(2), 1).config(moons.spec)
    photos = from_array(np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8))
    codec = Fold(3, 2, 2)
    measure(codec, [photos.batch(range(20))[0]], "photos")
    latents = Latents(photos, codec, cache=tmp_path)
    with pytest.raises(UndiffuseError, match="these are latents"):
        Trainer(latents, tiny(latents, Smaller(2), 1))
