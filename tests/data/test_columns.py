"""Attributes and numbers: from metadata, tables and archives into training, and asked for in people's words."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from undiffuse.commands.sample import parse_rows
from undiffuse.data import DataSpec, Subset, from_array, open_dataset
from undiffuse.data.columns import asked, in_words, names_in, read_row, translated
from undiffuse.data.folder import Files, Images
from undiffuse.data.store import Folder
from undiffuse.errors import UndiffuseError, UndiffuseWarning
from undiffuse.training import Trainer, make_recipe
from undiffuse.training.trainer import ignored_inputs

BREEDS, COLOURS = ("manx", "tabby"), ("blue", "red")


@pytest.fixture
def cats(tmp_path: Path) -> Path:
    """40 pictures; number 7 has no breed, number 8 no age."""
    folder, lines = tmp_path / "cats", []
    folder.mkdir()
    for i in range(40):
        pixels = np.full((8, 8, 3), 20 + i, np.uint8)
        pixels[:, :, 2 * (i % 2)] = 200
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
        said = {"breed": BREEDS[i // 20], "colour": COLOURS[i % 2], "age": i / 4, "weight": 100 - i}
        said = {name: value for name, value in said.items() if (name, i) not in (("breed", 7), ("age", 8))}
        lines.append(json.dumps({"file_name": f"{i:02}.png", **said}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.filterwarnings("ignore::undiffuse.errors.UndiffuseWarning")
def test_attributes_and_numbers_of_a_folder(cats: Path) -> None:
    data = open_dataset(cats, attributes="breed,colour", numbers=["age", "weight"])
    assert data.spec.attributes == (("breed", BREEDS), ("colour", COLOURS))
    _, cond = data.batch([0, 7, 8, 39])
    assert cond["attributes"].tolist() == [[0, 0], [2, 1], [0, 0], [1, 1]]
    numbers, known = cond["numbers"], np.delete(np.arange(40) / 4, 8)
    assert numbers.dtype == torch.float32
    assert numbers[2].isnan().all()
    assert not numbers[[0, 1, 3]].isnan().any()
    age, weight = (
        (value - mean) / deviation for value, (_, mean, deviation) in zip((9.75, 61), data.spec.numbers, strict=True)
    )
    assert numbers[3].tolist() == pytest.approx([age, weight])
    assert data.spec.numbers[0] == ("age", pytest.approx(known.mean()), pytest.approx(known.std()))
    assert any("lack a number" in note for note in data.notes)

    part, _ = Subset(data, [39, 0]), data.split(0.2, 0)
    assert part.columns["attributes"].tolist() == [[1, 1], [0, 0]]
    assert torch.equal(part.batch([1])[1]["numbers"], data.batch([0])[1]["numbers"])


@pytest.mark.filterwarnings("ignore::undiffuse.errors.UndiffuseWarning")
def test_who_takes_the_place_of_a_broken_file_brings_its_own(cats: Path) -> None:
    data = Files(Folder(cats), Images(), attributes=["breed"], numbers=["age"], memory=0)
    before = data.batch([20])
    (cats / "19.png").write_bytes(b"x")
    x, cond = data.batch([19])
    assert torch.equal(x, before[0])
    assert torch.equal(cond["numbers"], before[1]["numbers"])
    assert torch.equal(cond["attributes"], before[1]["attributes"])
    assert data.lost([19, 20]).tolist() == Subset(data, [19, 20]).lost([0, 1]).tolist() == [True, False]


@pytest.mark.filterwarnings("ignore::undiffuse.errors.UndiffuseWarning")
def test_data_without_them_are_what_they_were(cats: Path) -> None:
    """A fingerprint, a stated spec and its JSON change only where there are attributes or numbers."""
    plain, known = open_dataset(cats), open_dataset(cats, attributes="breed")
    assert plain.columns == {}
    assert "attributes" not in plain.spec.stated
    assert "attributes" not in plain.spec.to_json()
    assert plain.fingerprint == open_dataset(cats, attributes="").fingerprint != known.fingerprint
    other = open_dataset(cats, attributes="colour")
    assert known.fingerprint != other.fingerprint
    for data in (plain, known, open_dataset(cats, numbers="age")):
        read = DataSpec.from_json(json.loads(json.dumps(data.spec.to_json())))
        assert read == data.spec
        assert read.to_json() == json.loads(json.dumps(data.spec.to_json()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attributes": "bred"}, "unknown attribute .*'bred': did you mean 'breed'"),
        ({"attributes": "breed", "numbers": "breed"}, "asked for twice"),
        ({"attributes": "weight"}, "40 different values.*--numbers"),
        ({"numbers": "colour"}, r"00.png: colour is 'blue', not a number.*--attributes colour"),
        ({"attributes": "text"}, "name of a condition"),
    ],
)
@pytest.mark.filterwarnings("ignore::undiffuse.errors.UndiffuseWarning")
def test_refused(cats: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(UndiffuseError, match=message):
        open_dataset(cats, attributes=options.get("attributes"), numbers=options.get("numbers"))


def test_tables_and_archives(tmp_path: Path) -> None:
    rows = "".join(f"{i % 5},{i / 3},{'ab'[i % 2]},{i if i else ''}\n" for i in range(30))
    (tmp_path / "t.csv").write_text("x,y,kind,age\n" + rows)
    with pytest.warns(UndiffuseWarning, match="1 of 30 items lack a number"):
        table = open_dataset(tmp_path / "t.csv", attributes="kind", numbers="age")
    assert table.spec.names == ("x", "y")
    assert table.spec.attributes == (("kind", ("a", "b")),)
    assert table.batch([0])[1]["numbers"].isnan().all()
    with pytest.raises(UndiffuseError, match="no column is left"):
        open_dataset(tmp_path / "t.csv", attributes="kind,x", numbers="age,y")
    images = np.arange(30 * 16, dtype=np.uint8).reshape(30, 4, 4) % 251
    np.savez(tmp_path / "a.npz", x=images, kind=np.array(list("ab") * 15), age=np.arange(30.0))
    archive = open_dataset(tmp_path / "a.npz", attributes="kind", numbers="age")
    assert archive.columns["attributes"][:, 0].tolist() == [0, 1] * 15
    small = open_dataset(tmp_path / "a.npz", attributes="kind", image_size=4)
    assert (small.columns["attributes"] == archive.columns["attributes"]).all()
    np.save(tmp_path / "a.npy", images)
    for wrong in ("a.npy", "a.npz"):
        with pytest.raises(UndiffuseError, match="unknown attribute"):
            open_dataset(tmp_path / wrong, attributes="color")
    with pytest.raises(UndiffuseError, match="unknown attribute of digits"):
        open_dataset("digits", attributes="kind")
    with pytest.raises(UndiffuseError, match="30 items, but kind of shape"):
        from_array(images, attributes={"kind": ["a"]})


SPEC = replace(
    from_array(np.zeros((20, 8, 8), np.uint8) + np.arange(20, dtype=np.uint8)[:, None, None] * 13).spec,
    attributes=(("breed", BREEDS), ("stars", ("1", "2"))),
    numbers=(("age", 10.0, 2.0), ("weight", 50.0, 5.0)),
)


def test_peoples_words() -> None:
    assert asked(SPEC, {"attributes": [["tabby", None]]}) == {"attributes": [[1, None]]}
    assert asked(SPEC, {"breed": ["manx", None, "tabby"]})["attributes"] == [[0, None], [None, None], [1, None]]
    assert asked(SPEC, {"stars": [1]}) == {"attributes": [[None, 0]]}  # a name, never an index
    assert asked(SPEC, {"age": [14, 10], "weight": 50})["numbers"] == [[2.0, 0.0], [0.0, 0.0]]
    assert asked(SPEC, {"attributes": ["manx", None], "numbers": [14, 50]}) == {
        "attributes": [[0, None]],
        "numbers": [[2.0, 0.0]],
    }
    raw = torch.zeros(1, 2)
    assert asked(SPEC, {"numbers": raw})["numbers"] is raw
    assert asked(SPEC, {"numbers": [None]})["numbers"] == [None]
    for cond, message in [
        ({"breed": ["manks"]}, "unknown breed 'manks': did you mean 'manx'"),
        ({"stars": [0]}, "unknown stars"),
        ({"age": [3]}, "asked for together: give weight"),
        ({"age": ["old"], "weight": [3]}, "age='old' must be a number"),
        ({"age": True, "weight": 3}, "age=True must be a number"),
        ({"age": [], "weight": 3}, "age: no row given"),
        ({"breed": ["manx"], "attributes": [["manx", "1"]]}, "given twice"),
        ({"attributes": [["manx"]]}, r"2 values \(breed, stars\)"),
    ]:
        with pytest.raises(UndiffuseError, match=message):
            asked(SPEC, cond)
    assert read_row(SPEC, "attributes", "manx,none") == [["manx", None]]
    assert read_row(SPEC, "breed", "manx, none") == ["manx", None]
    assert read_row(SPEC, "age", "3,4") == ["3", "4"]
    assert read_row(SPEC, "classes", "3") is None
    assert names_in(" a , b,") == ("a", "b")
    assert names_in(None) == ()


def test_in_words_is_what_is_asked() -> None:
    """A raw row, in people's words, asked for: the raw row."""
    rows, numbers = [[0, 2], [1, 1], [2, 2]], [[0.25, -1.0], [0.0, 0.0], [np.nan, np.nan]]
    words = in_words(SPEC, {"attributes": np.array(rows), "numbers": np.array(numbers, np.float32)})
    assert words["breed"] == ["manx", "tabby", None]
    assert words["weight"] == [45.0, 50.0, None]
    back = asked(SPEC, words)
    assert [[len(BREEDS) if k is None else k for k in row] for row in back["attributes"]] == rows
    assert back["numbers"] == [[0.25, -1.0], [0.0, 0.0], [None, None]]


def test_translated_between_specs() -> None:
    """Of other data the values go by their names, and numbers by their units."""
    data = replace(SPEC, attributes=(("breed", ("lynx", "manx")),), numbers=(("weight", 0.0, 1.0), ("age", 0.0, 1.0)))
    given = {"attributes": np.array([[0], [1], [2]]), "numbers": np.array([[55.0, 12.0]] * 3, np.float32)}
    found = translated(given, data, SPEC)
    assert found["attributes"].tolist() == [[2, 2], [0, 2], [2, 2]]
    assert found["numbers"].tolist() == [[1.0, 1.0]] * 3


@pytest.mark.filterwarnings("ignore::undiffuse.errors.UndiffuseWarning")
def test_a_model_of_them_uses_each(cats: Path) -> None:
    """Training reads them (resumed to the last bit), the output changes with each, and sampling asks in words."""
    data = open_dataset(cats, attributes="breed,colour", numbers="age")
    recipe = make_recipe("tiny", data.spec, len(data), "tiny")
    recipe = replace(recipe, training=replace(recipe.training, images=16 * 12, batch_size=16, held_out=0))

    def trained(stop: int | None) -> Trainer:
        trainer = Trainer(data, recipe)
        if stop is not None:
            for _ in range(stop):
                trainer.update()
            again, snapshot = Trainer(data, recipe), trainer.snapshot().copy()
            again.restore(snapshot, "test")
            trainer = again
        for _ in trainer.updates():
            pass
        return trainer

    with warnings.catch_warnings():
        whole, resumed = trained(None), trained(5)
    for name, weight in whole.denoiser.state_dict().items():
        assert torch.equal(weight, resumed.denoiser.state_dict()[name]), name
    given = {"numbers": torch.tensor([[torch.nan], [1.0]]), "attributes": torch.tensor([[2, 2], [0, 1]])}
    assert ignored_inputs(whole.denoiser, data.batch([0, 1])[0], given) == []  # the first item says nothing
    pipeline = whole.pipeline()
    rows = parse_rows(["breed=manx,tabby,none", "age=5"], pipeline, "cond")
    assert rows == {"breed": ["manx", "tabby", None], "age": ["5"]}
    told = pipeline.conditions(range(3), None, cond=rows)
    assert told["attributes"].tolist() == [[0, 2], [1, 2], [2, 2]]
    _, raw = data.batch([0, 30])
    words: dict[str, list[object]] = {"breed": ["manx", "tabby"], "colour": ["blue", "blue"], "age": [0, 7.5]}
    likely = [pipeline.log_likelihood(data.values([0, 30]), cond=c, steps=2, probes=2).log_prob for c in (raw, words)]
    assert torch.allclose(likely[0], likely[1], rtol=1e-5)
    x = [pipeline.draw(1, cond=cond) for cond in ({"breed": "manx"}, {"breed": "tabby"}, {"age": 1}, {"age": 9}, {})]
    assert len({tuple(each.flatten().tolist()) for each in x}) == 5
    with pytest.raises(UndiffuseError, match=r"unknown condition.*'colr': did you mean 'colour'"):
        parse_rows(["colr=red"], pipeline, "cond")
