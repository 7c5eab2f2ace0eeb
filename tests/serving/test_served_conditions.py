"""Any condition by name, asked of the server: the samples are those of `undiffuse sample --rows`."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from serving_laws import OF, ROWS, Running, complete, running
from test_pipeline import conditional, pipeline
from undiffuse import sample

IMAGE, EDIT, SAMPLES = "/v1/images/generations", "/v1/images/edits", "/v1/samples"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    models = {
        "small": complete({"kind": "smaller", "factor": 2}, (1, 4, 4)),
        "holes": complete({"kind": "holes"}, (1, 8, 8)),
        "other": conditional(),
        "digits": pipeline(),
    }
    with running(sources={name: lambda model=model: model for name, model in models.items()}) as each:
        yield each


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def eight(values: np.ndarray) -> np.ndarray:
    """0 to 16 as a picture."""
    return np.rint(values / 16 * 255).astype(np.uint8)


def array(server: Running, model: str, **body: Any) -> np.ndarray:
    status, _, answer = server.ask(SAMPLES, {"model": model, "seed": 4, **body})
    assert status == 200, answer
    return np.load(io.BytesIO(answer))


def picture(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


# --- the same samples -------------------------------------------------------------------------------------------------

ASKED = [
    (
        "small",
        {"cond": {"breed": ["manx", None], "age": 3, "weight": [45.5]}},
        ["breed=manx,none", "age=3", "weight=45.5"],
    ),
    ("small", {"cond": {"attributes": ["tabby", "none"]}}, ["attributes=tabby,none"]),  # a value of that name
    ("small", {"cond": {"attributes": [None, 1]}}, ["attributes=none,1"]),
    ("small", {"cond": {"classes": "dog", "numbers": [4, 60]}}, ["classes=dog", "numbers=4,60"]),
    ("small", {"cond": {"eyes": 1}}, ["eyes=1"]),
    ("other", {"cond": {"kind": [[1, None], [0, 2]], "place": [0.5, -1]}}, ["kind=1,none", "kind=0,2", "place=0.5,-1"]),
    ("other", {"cond": {"text": "a red dot"}}, ["text=a red dot"]),
    ("digits", {"cond": {"classes": ["7", 3]}}, ["classes=7,3"]),
]


@pytest.mark.parametrize(("model", "body", "said"), ASKED)
def test_the_command_lines_samples_to_the_bit(
    server: Running, tmp_path: Path, model: str, body: dict, said: list[str]
) -> None:
    saved = server.service.shelf.known[model].save(tmp_path / "model")
    sample(saved, 3, cond=tuple(said), seed=4, rows=ROWS, device="cpu", out=tmp_path / "x.npy")
    assert np.array_equal(array(server, model, n=3, **body), np.load(tmp_path / "x.npy"))


def test_guidance_leads_away_from_any_condition_to_the_bit(server: Running, tmp_path: Path) -> None:
    saved = server.service.shelf.known["small"].save(tmp_path / "model")
    told = {"cond": ("breed=manx",), "against": ("breed=tabby", "classes=cat")}
    sample(saved, 3, **told, guidance_scale=2.5, seed=4, rows=ROWS, device="cpu", out=tmp_path / "x.npy")
    wanted = np.load(tmp_path / "x.npy")
    asked = {"cond": {"breed": "manx"}, "guidance_scale": 2.5, "n": 3}
    assert np.array_equal(array(server, "small", **asked, against={"breed": "tabby", "classes": "cat"}), wanted)
    # a negative prompt is a class, and joins what is named
    assert np.array_equal(array(server, "small", **asked, against={"breed": "tabby"}, negative_prompt="cat"), wanted)
    assert not np.array_equal(array(server, "small", **asked), wanted)


def test_more_samples_than_fit_into_a_call_get_their_own_rows(server: Running) -> None:
    model = server.service.shelf.known["small"]
    cond = {"breed": ["manx", "tabby", None]}
    wanted = model.draw(20, seed=4, cond=cond, rows=ROWS)
    assert np.array_equal(array(server, "small", n=20, cond=cond), OF.to_data(wanted))


def test_pictures_beside_to_the_bit(server: Running, tmp_path: Path) -> None:
    """`--beside` of the command line, the image of an edit and `beside` of any form are one thing."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    values = np.random.default_rng(0).integers(0, 17, (4, 4)).astype(np.uint8)
    (tmp_path / "small.png").write_bytes(png(eight(values)))
    saved = server.service.shelf.known["small"].save(tmp_path / "model")
    told = {"beside": tmp_path / "small.png", "cond": ("breed=manx",), "seed": 4, "rows": ROWS, "device": "cpu"}
    sample(saved, 2, **told, out=tmp_path / "x.npy")
    wanted = np.load(tmp_path / "x.npy")
    files = {"png": (tmp_path / "small.png").read_bytes()}
    buffer = io.BytesIO()
    np.save(buffer, values)
    files["npy"] = buffer.getvalue()
    for data in files.values():
        said = base64.b64encode(data).decode()
        assert np.array_equal(array(server, "small", n=2, cond={"breed": "manx"}, beside=said), wanted)
    extra = {"seed": 4, "cond": json.dumps({"breed": "manx"})}
    edited = client.images.edit(model="small", image=("a.png", files["png"]), prompt="", n=2, extra_body=extra)
    assert [picture(each.b64_json).tolist() for each in edited.data] == [eight(each).tolist() for each in wanted]
    assert not np.array_equal(array(server, "small", n=2, cond={"breed": "manx"}), wanted)
    hub = pytest.importorskip("huggingface_hub")
    asked = {"cond": {"breed": "manx"}, "beside": base64.b64encode(files["png"]).decode()}
    image = hub.InferenceClient(model=f"{server.url}/models/small").text_to_image("", seed=4, extra_body=asked)
    assert np.array_equal(np.asarray(image), eight(wanted[0]))
    asked = {**asked, "seed": 4, "num_inference_steps": 4}
    events = client.images.generate(model="small", prompt="", stream=True, partial_images=1, extra_body=asked)
    assert np.array_equal(picture(list(events)[-1].b64_json), eight(wanted[0]))


def test_trap_X10_holes_are_filled_and_what_is_known_stays(server: Running, tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    model = server.service.shelf.known["holes"]
    values = np.random.default_rng(1).integers(0, 17, (8, 8)).astype(np.uint8)
    pixels, mask = eight(values), np.zeros((8, 8), np.uint8)
    mask[2:5, 3:] = 255
    (tmp_path / "a.png").write_bytes(png(pixels))
    (tmp_path / "m.png").write_bytes(png(mask))
    saved = model.save(tmp_path / "model")
    told = {"beside": tmp_path / "a.png", "mask": tmp_path / "m.png", "seed": 4, "rows": ROWS, "device": "cpu"}
    sample(saved, 1, **told, out=tmp_path / "x.npy")
    wanted = np.load(tmp_path / "x.npy")[0]
    assert np.array_equal(wanted[mask == 0], values[mask == 0])
    assert not np.array_equal(wanted[mask > 0], values[mask > 0])
    clear = np.dstack([pixels, 255 - mask])  # transparent where it is to be filled
    for files in ({"image": png(pixels), "mask": png(mask)}, {"image": png(clear)}):
        edited = client.images.edit(model="holes", prompt="", extra_body={"seed": 4}, **files)
        assert np.array_equal(picture(edited.data[0].b64_json), eight(wanted))
    for said in (png(clear), _npy(np.where(mask > 0, np.nan, values))):
        assert np.array_equal(array(server, "holes", beside=base64.b64encode(said).decode())[0], wanted)
    # the network is told, in Python too: with another picture around the same hole it fills it otherwise
    keep = mask == 0
    mine = model.sample(1, seed=4, image=values[None], keep=keep[None], batch_size=1)
    assert np.array_equal(mine[0], model.sample(1, seed=4, cond={"beside": model.spec.to_model(values[None])
        .masked_fill(torch.from_numpy(~keep), torch.nan)}, batch_size=1)[0])  # fmt: skip
    other = model.sample(1, seed=4, image=(16 - values)[None], keep=keep[None], batch_size=1)
    assert not np.array_equal(mine[0][~keep], other[0][~keep])


def _npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values.astype(np.float32))
    return buffer.getvalue()


# --- what there is, and what there is not -----------------------------------------------------------------------------


def test_models_say_what_they_can_be_asked_for(server: Running) -> None:
    models = {each["id"]: each for each in json.loads(server.ask("/v1/models")[2])["data"]}
    small = {each["name"]: each for each in models["small"]["conditions"]}
    assert small["classes"] == {"name": "classes", "kind": "classes", "count": 2, "values": ["cat", "dog"]}
    assert small["breed"] == {"name": "breed", "kind": "attribute", "values": ["manx", "tabby"]}
    assert small["age"] == {"name": "age", "kind": "number", "mean": 3.0, "deviation": 2.0}
    assert small["beside"]["made"] == "smaller"
    assert (small["beside"]["size"], small["beside"]["shape"], small["beside"]["dtype"]) == ("4x4", [4, 4], "uint8")
    other = {each["name"]: each for each in models["other"]["conditions"]}
    assert other["kind"] == {"name": "kind", "kind": "attributes", "sizes": [2, 3]}
    assert other["place"] == {"name": "place", "kind": "vector", "size": 2}
    assert (other["text"]["kind"], other["text"]["length"]) == ("text", 8)


NAN = "nan"
WRONG = [
    ("small", {"cond": {"bred": "manx"}}, "cond", "did you mean 'breed'"),
    ("small", {"cond": {"colour": "red"}}, "cond", "age, attributes, beside, breed, classes, eyes"),
    ("small", {"cond": {"breed": "manks"}}, "cond", "did you mean 'manx'"),
    ("small", {"cond": {"breed": 0}}, "cond", "unknown breed"),
    ("small", {"cond": {"breed": []}}, "cond", "no row"),
    ("small", {"cond": {"attributes": ["manx"]}}, "cond", "2 values"),
    ("small", {"cond": {"age": 3}}, "cond", "asked for together: give weight"),
    ("small", {"cond": {"age": NAN, "weight": 3}}, "cond", "must be a number"),
    ("small", {"cond": {"age": 1e300, "weight": 3}}, "cond", "infinite"),
    ("small", {"cond": {"age": True, "weight": 3}}, "cond.age", "must be a name, a number"),
    ("small", {"cond": {"age": {"a": 1}, "weight": 3}}, "cond.age", "must be a name, a number"),
    ("small", {"cond": {"age": [[[1]]], "weight": 3}}, "cond.age", "must be a name, a number"),
    ("small", {"cond": {"breed": ["manx"] * 1001}}, "cond.breed", "must be"),
    ("small", {"cond": ["breed"]}, "cond", "dictionary"),
    ("small", {"cond": json.dumps({"breed": "manx"})}, "cond", "dictionary"),
    ("small", {"cond": {"classes": "bird"}}, "cond", "unknown class"),
    ("small", {"cond": {"classes": 2**70}}, "cond", "takes numbers"),
    ("small", {"cond": {"classes": 7}}, "cond", "class 7"),
    ("small", {"cond": {"classes": 1}, "prompt": "dog"}, None, "given twice"),
    ("small", {"cond": {"beside": "AAAA"}}, "cond", "given as beside"),
    ("small", {"beside": "not base64"}, "beside", "base64"),
    ("small", {"beside": base64.b64encode(b"no picture").decode()}, "beside", "beside"),
    ("small", {"beside": base64.b64encode(png(np.zeros((8, 8), np.uint8))).decode()}, "beside", "this model takes 4x4"),
    ("small", {"beside": base64.b64encode(_npy(np.zeros((4, 5)))).decode()}, "beside", "this model takes"),
    ("small", {"beside": base64.b64encode(_npy(np.full((4, 4), 99.0))).decode()}, "beside", "outside"),
    ("small", {"beside": base64.b64encode(_npy(np.full((4, 4), np.inf))).decode()}, "beside", ""),
    ("small", {"beside": base64.b64encode(_npy(np.zeros((4, 4)))[:-8]).decode()}, "beside", "does not hold all"),
    ("small", {"beside": base64.b64encode(_npy(np.zeros((4, 4)))[:40]).decode()}, "beside", "cannot be read"),
    ("small", {"beside": base64.b64encode(_npy(np.full((4, 4), np.nan))).decode()}, "beside", "whole pictures"),
    ("holes", {"beside": base64.b64encode(_npy(np.zeros((8, 8)))).decode()}, "beside", "nothing to fill in"),
    ("small", {"beside": []}, "beside", "no picture"),
    ("digits", {"beside": "AAAA"}, "beside", "not trained with pictures"),
    ("digits", {"cond": {"breed": "manx"}}, "cond", "choose from: classes"),
    ("small", {"against": {"breed": "tabby"}}, "against", "guidance_scale 1"),
    ("small", {"against": {"bred": "tabby"}, "guidance_scale": 2}, "against", "did you mean"),
    ("other", {"cond": {"kind": [1, 9]}}, "cond", "attribute 1 has no value 9"),
    ("other", {"cond": {"place": [0.1]}}, "cond", r"takes [B, 2]"),
    ("other", {"cond": {"place": [0.1, None]}}, "cond", "NaN"),
    ("other", {"cond": {"text": "red " * 20}}, "cond", "make it shorter"),
    ("other", {"cond": {"text": 3}}, "cond", "is a text"),
    ("other", {"cond": {"text": "a"}, "prompt": "b"}, None, "given twice"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "body", "field", "message"), WRONG)
def test_SV5_what_cannot_be_asked_for_is_named(
    server: Running, model: str, body: dict, field: str | None, message: str
) -> None:
    status, _, answer = server.ask(SAMPLES, {"model": model, **body})
    error = json.loads(answer)["error"]
    assert (status, error["param"]) == (400, field), error
    assert message in error["message"], error


def test_SV5_edits_that_cannot_be_are_named(server: Running) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    small, large = png(np.zeros((4, 4), np.uint8)), png(np.zeros((8, 8), np.uint8))
    for asked, extra, param, message in (
        ({"model": "small", "image": large}, {}, "image", "this model takes 4x4"),
        ({"model": "small", "image": small, "mask": large}, {}, "mask", "leave out mask"),
        ({"model": "small", "image": small}, {"strength": 0.5}, "strength", "leave out strength"),
        ({"model": "small", "image": small}, {"beside": "AAAA"}, "beside", "leave out beside"),
        ({"model": "small", "image": small}, {"cond": {"breed": ["manx", None]}}, "cond", "JSON text"),
        ({"model": "small", "image": small}, {"cond": "{1"}, None, "not JSON"),
        ({"model": "small", "image": small}, {"cond": "[1]"}, "cond", "dictionary"),
        ({"model": "small", "image": small}, {"cond": '{"bred": "manx"}'}, "cond", "did you mean"),
        ({"model": "holes", "image": large, "mask": png(np.zeros((8, 8), np.uint8))}, {}, "mask", "nothing to edit"),
        ({"model": "holes", "image": large}, {}, "mask", "give a mask, or make a part"),
    ):
        with pytest.raises(openai.BadRequestError, match=message) as caught:
            client.images.edit(prompt="", extra_body=extra, **asked)
        assert caught.value.param == param
