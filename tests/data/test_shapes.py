"""``shapes``: what is drawn is what is said, and the checker reads it from the pixels."""

from __future__ import annotations

import numpy as np
import pytest

from undiffuse.data import open_dataset
from undiffuse.data.shapes import (
    COLOURS,
    RELATIONS,
    SHAPES,
    UNSEEN,
    Caption,
    Group,
    Shapes,
    Thing,
    check,
    draw,
    read,
    scene,
    score,
)
from undiffuse.errors import UndiffuseError


@pytest.mark.parametrize("unseen", [False, True])
def test_captions_parse_back(unseen: bool) -> None:
    for index in range(300):
        caption = scene(0, index, unseen).caption
        assert Caption.parse(str(caption)) == caption
        assert caption.unseen == unseen
    example = Caption.parse("A small red circle left of  a large blue square")
    assert example == Caption(Group(1, "circle", "red", "small"), "left of", Group(1, "square", "blue", "large"))


@pytest.mark.parametrize(
    "text", ["", "red circle", "a red circles", "two red circle", "a red circle near a red square"]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UndiffuseError, match="circle"):
        Caption.parse(text)


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("unseen", [False, True])
def test_the_checker_agrees_with_real_renders(side: int, unseen: bool) -> None:
    count = 200 if side == 32 else 60
    data = Shapes(5, side, count, unseen)
    found = score(data.values(range(count)), data.captions(range(count)) or [])
    assert found["all"] >= 0.99
    assert set(found) == {"count", "shape", "colour", "size", "texture", "relation", "all"}


def test_the_checker_says_no_to_other_captions() -> None:
    """What is said of one picture is hardly ever true of another."""
    data = Shapes(5, 32, 200)
    captions = data.captions(range(200)) or []
    assert score(data.values(range(200)), captions[1:] + captions[:1])["all"] <= 0.03


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ("a large red circle left of two blue squares", None),
        ("a red circle left of three blue squares", "count"),
        ("a red circle left of two blue triangles", "shape"),
        ("a yellow circle left of two blue squares", "colour"),
        ("a small red circle left of two blue squares", "size"),
        ("a striped red circle left of two blue squares", "texture"),
        ("a red circle right of two blue squares", "relation"),
    ],
)
def test_each_attribute_is_found_wrong_alone(said: str, wrong: str | None) -> None:
    things = [
        Thing("circle", "red", "plain", 8, 16, 5.2),
        Thing("square", "blue", "plain", 23, 8, 3.3),
        Thing("square", "blue", "striped", 24, 24, 5.0),
    ]
    verdict = check(draw(things, 20.0), said)
    assert {name for name, right in verdict.items() if not right} == ({wrong, "all"} if wrong else set())


def test_dirt_and_other_figures_are_not_shapes() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert not check(noise, "a red circle")["all"]
    assert read(np.zeros((32, 32, 3), np.uint8)) == []
    bar = np.zeros((32, 32, 3), np.uint8)
    bar[15:17, 4:28] = COLOURS["red"]
    assert [thing.shape for thing in read(bar)] == ["?"]


def test_a_picture_is_a_function_of_seed_and_index() -> None:
    data = Shapes(3)
    some = data.values([7, 2, 100])
    assert np.array_equal(some[1], Shapes(3).values([2])[0])
    assert not np.array_equal(some[0], Shapes(4).values([7])[0])
    captions = Shapes(3).captions([7, 2])
    assert captions == [str(scene(3, 7).caption), str(scene(3, 2).caption)]
    train, held_out = data.split(0.01, 0)
    assert held_out.captions([0]) != train.captions([0])
    where = held_out.origin([5])
    assert data.captions(where) == held_out.captions([5])
    assert np.array_equal(data.values(where), held_out.values([5]))


def test_nothing_unseen_is_in_the_training_set() -> None:
    data = Shapes()
    assert not any(Caption.parse(each).unseen for each in data.captions(range(500)) or [])
    assert len(set(UNSEEN)) == 3
    seen = [(g.colour, g.shape) for i in range(500) for g in scene(0, i).caption.groups]
    assert {colour for colour, _ in seen} == set(COLOURS)
    assert {shape for _, shape in seen} == set(SHAPES)
    assert {scene(0, i).caption.relation for i in range(100)} == {None, *RELATIONS}


def test_the_64_pixel_version_is_the_same_picture() -> None:
    large, small = open_dataset("shapes", image_size=64), open_dataset("shapes")
    halved = large.values([3, 4]).reshape(2, 32, 2, 32, 2, 3).astype(float).mean((2, 4))
    assert np.abs(halved - small.values([3, 4])).mean() < 2
    assert large.captions([3]) == small.captions([3])
    with pytest.raises(UndiffuseError, match="32x32, 64x64 or 128x128"):
        open_dataset("shapes", image_size=48)


def test_scores_need_a_caption_a_picture() -> None:
    with pytest.raises(UndiffuseError, match="one caption a picture"):
        score(Shapes().values([0]), [])
