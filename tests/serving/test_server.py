"""The server, asked by the clients that people use."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serving_laws import ROWS, Running, running, until
from test_pipeline import pipeline
from undiffuse.pipeline import Pipeline


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as each:
        yield each


def picture(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def expected(server: Running, n: int, seed: int, classes: list[int], **settings: Any) -> list[np.ndarray]:
    x = server.model.draw(n, seed=seed, classes=classes, sampling=server.model.settings(**settings), rows=ROWS)
    return server.model.spec.to_images(x)


def test_the_openai_client_gets_what_sample_makes(server: Running) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["tiny"]
    answer = client.images.generate(
        prompt="7",
        model="tiny",
        n=3,
        size="8x8",
        response_format="b64_json",
        output_format="png",
        extra_body={"seed": 5, "num_inference_steps": 3, "solver": "heun", "guidance_scale": 2.0},
    )
    wanted = expected(server, 3, 5, [7], steps=3, solver="heun", guidance_scale=2.0)
    for got, want in zip(answer.data, wanted, strict=True):
        assert np.array_equal(picture(got.b64_json), want)  # to the bit: the engine's rows are fixed
    many = client.images.generate(prompt="", n=20, extra_body={"seed": 0, "guidance_scale": 2.0})
    assert len(many.data) == 20  # more than fit into one network call


def test_the_openai_client_streams(server: Running) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    asked = {"seed": 5, "num_inference_steps": 6}
    events = list(client.images.generate(prompt="7", stream=True, partial_images=2, extra_body=asked))
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert np.array_equal(picture(events[-1].b64_json), expected(server, 1, 5, [7], steps=6)[0])
    # what is shown on the way is the belief of that step, not noise
    frames = list(server.model.frames(1, seed=5, classes=[7], sampling=server.model.settings(steps=6), rows=ROWS))
    for event, index in zip(events, (2, 4), strict=False):
        estimate = frames[index].estimate
        assert estimate is not None
        assert np.array_equal(picture(event.b64_json), server.model.spec.to_images(estimate.x0)[0])


def test_the_openai_client_edits(server: Running) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    values = np.random.default_rng(0).integers(0, 17, (8, 8))
    pixels = np.rint(values / 16 * 255).astype(np.uint8)
    image = io.BytesIO()
    Image.fromarray(pixels).save(image, "PNG")
    alpha = np.full((8, 8), 255, np.uint8)
    alpha[:4] = 0
    mask = io.BytesIO()
    Image.fromarray(np.dstack([pixels] * 3 + [alpha])).save(mask, "PNG")
    edited = client.images.edit(image=("a.png", image.getvalue()), prompt="3", extra_body={"seed": 1, "strength": 0.3})
    assert not np.array_equal(picture(edited.data[0].b64_json), pixels)
    filled = client.images.edit(
        image=("a.png", image.getvalue()), mask=("m.png", mask.getvalue()), prompt="3", extra_body={"seed": 1}
    )
    got = picture(filled.data[0].b64_json)
    assert np.array_equal(got[4:], pixels[4:])  # trap X10
    assert not np.array_equal(got[:4], pixels[:4])
    # without a mask the image's own transparency is the mask, as OpenAI has it
    own = client.images.edit(image=("a.png", mask.getvalue()), prompt="3", extra_body={"seed": 1})
    assert np.array_equal(picture(own.data[0].b64_json), got)
    wide = io.BytesIO()  # both would be cropped, each in its own way
    Image.fromarray(np.full((8, 16), 255, np.uint8)).save(wide, "PNG")
    with pytest.raises(openai.BadRequestError, match="the image's size, 8x8") as refused:
        client.images.edit(image=("a.png", image.getvalue()), mask=("m.png", wide.getvalue()), prompt="3")
    assert refused.value.param == "mask"


def test_a_class_may_be_left_open_and_what_a_field_must_be_is_said(server: Running) -> None:
    status, _, body = server.ask("/v1/samples", {"n": 2, "class_labels": [3, None], "seed": 4})
    assert status == 200
    wanted = server.model.draw(2, seed=4, classes=[3, None], rows=ROWS)
    assert np.array_equal(np.load(io.BytesIO(body)), server.model.spec.to_data(wanted))
    for field, words in (("class_labels", "the number of a class, or a list"), ("beside", "a text, or a list")):
        status, _, body = server.ask("/v1/samples", {field: {"a": 1}})
        error = json.loads(body)["error"]
        assert (status, error["param"]) == (400, field)
        assert words in error["message"]


def test_the_hugging_face_client_gets_a_picture(server: Running) -> None:
    hub = pytest.importorskip("huggingface_hub")
    client = hub.InferenceClient(model=f"{server.url}/models/tiny")
    image = client.text_to_image("4", seed=3, num_inference_steps=5, guidance_scale=1.5)
    assert np.array_equal(np.asarray(image), expected(server, 1, 3, [4], steps=5, guidance_scale=1.5)[0])


def test_arrays_come_in_the_units_of_the_data(server: Running) -> None:
    status, headers, body = server.ask("/v1/samples", {"n": 3, "class_labels": [1, 2], "seed": 4})
    assert status == 200
    assert headers["X-Seed"] == "4"
    got = np.load(io.BytesIO(body))
    wanted = server.model.draw(3, seed=4, classes=[1, 2], rows=ROWS)
    assert got.dtype == np.uint8
    assert np.array_equal(got, server.model.spec.to_data(wanted))


def test_a_seed_that_was_not_given_is_told(server: Running) -> None:
    _, _, body = server.ask("/v1/images/generations", {"prompt": "1"})
    first = json.loads(body)
    _, _, body = server.ask("/v1/images/generations", {"prompt": "1", "seed": first["seed"]})
    assert json.loads(body)["data"] == first["data"]


BAD = [
    (b"", 400),
    (b"not json", 400),
    (b"null", 400),
    (b"[]", 400),
    (b"3", 400),
    (b"[" * 100_000, 400),
    (b'{"prompt": "1", "prompt": "2"}', 400),
    (b'{"guidance_scale": NaN}', 400),
    (b'{"guidance_scale": 1e400}', 400),
    (b'{"n": "8"}', 400),
    (b'{"n": true}', 400),
    (b'{"n": 0}', 400),
    (b'{"n": -1}', 400),
    (b'{"n": 1.5}', 400),
    (b'{"n": 1000000000}', 400),
    (b'{"num_inference_steps": 1000000000}', 400),
    (b'{"seed": -1}', 400),
    (b'{"seed": 18446744073709551616}', 400),
    (b'{"size": "1000000000x1000000000"}', 400),
    (b'{"size": "7x7"}', 400),
    (b'{"prompt": "no such class"}', 400),
    (b'{"prompt": "\\u0000"}', 400),
    (b'{"prompt": "\\ud800"}', 400),
    (b'{"prompt": "1", "class_labels": 1}', 400),
    (b'{"class_labels": []}', 400),
    (b'{"class_labels": [10]}', 400),
    (b'{"negative_prompt": "1,2"}', 400),
    (b'{"solver": "no such solver"}', 400),
    (b'{"solver": "rk45"}', 400),
    (b'{"grid": "../../etc/passwd"}', 400),
    (b'{"model": "../../etc/passwd"}', 404),
    (b'{"stylee": 1}', 400),
    (b'{"partial_images": 2}', 400),
    (b'{"stream": true, "n": 2}', 400),
    (b"{" + b",".join(b'"k%d": 1' % i for i in range(20_000)) + b"}", 400),
    (b'{"prompt": "' + b"a" * 100_000 + b'"}', 400),
    (b'{"prompt": "' + b"a" * 10_000_000 + b'"}', 413),
    (b'{"output_compression": 5}', 400),
    (b'{"negative_prompt": "1"}', 400),
    (b" " * 20_000_001, 413),
]


@pytest.mark.parametrize(("body", "status"), BAD, ids=[repr(body[:40]) for body, _ in BAD])
def test_SV5_bad_bodies_are_refused_by_name(server: Running, body: bytes, status: int) -> None:
    got, _, text = server.ask("/v1/images/generations", body)
    assert got == status
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    assert "/home" not in error["message"]


def test_an_unknown_field_is_named_with_those_that_exist(server: Running) -> None:
    _, _, text = server.ask("/v1/images/generations", {"prompt": "1", "style": "vivid"})
    error = json.loads(text)["error"]
    assert error["param"] == "style"
    assert "num_inference_steps" in error["message"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.com"}, 403),
        ({"Host": "127.0.0.1.nip.io"}, 403),
        ({"Host": "localhost:1"}, 403),
        ({"Origin": "http://evil.com"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1.evil.com"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "https://127.0.0.1:{port}"}, 403),
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Host": "localhost:{port}"}, 200),
        ({"Host": "[::1]:{port}"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "multipart/form-data"}, 415),
        ({"Content-Encoding": "gzip"}, 415),
    ],
    ids=str,
)
def test_SV7_pages_of_other_sites_are_refused(server: Running, headers: dict[str, str], status: int) -> None:
    sent = {name: value.format(port=server.port) for name, value in headers.items()}
    assert server.ask("/v1/images/generations", {"prompt": "1", "num_inference_steps": 1}, sent)[0] == status


def test_SV6_with_a_key_nothing_answers_without_it() -> None:
    with running("sesame") as server:
        paths = ["/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json", "/v2/health/ready", "//v1/models", "/x"]
        for path in paths:
            for bad in (None, "sesame", "Bearer sesam", "Bearer sesamee", "Basic sesame", "bearer sesame", "Bearer ü"):
                sent = {} if bad is None else {"Authorization": bad.encode("utf-8").decode("latin-1")}
                assert server.ask(path, headers=sent)[0] == 401, (path, bad)
            assert server.ask(f"{path}?api_key=sesame")[0] == 401
        assert server.ask("/v1/models", headers={"Authorization": "Bearer sesame"})[0] == 200
        assert server.ask("/v2/health/live")[0] == 200


def test_SV10_live_is_not_ready() -> None:
    gate = threading.Event()

    def load() -> Pipeline:
        gate.wait(30)
        return pipeline()

    with running(sources={"tiny": load}, ready=False) as server:
        assert server.ask("/v2/health/live")[0] == 200
        assert server.ask("/v2/health/ready")[0] == 503
        status, headers, _ = server.ask("/v1/images/generations", {"prompt": "1"})
        assert (status, headers["Retry-After"]) == (503, "1")
        gate.set()
        until(lambda: server.service.ready)
        assert server.ask("/v2/health/ready")[0] == 200
        server.service.drain()
        assert server.ask("/v2/health/live")[0] == 200
        assert server.ask("/v2/health/ready")[0] == 503
        assert server.ask("/v1/images/generations", {"prompt": "1"})[0] == 503


def test_metrics_count_what_was_answered(server: Running) -> None:
    before = server.counts()
    server.ask("/v1/images/generations", {"prompt": "1"})
    server.ask("/v1/images/generations", {"prompt": "no"})
    after = server.counts()
    assert after['undiffuse_responses_total{status="200"}'] == before['undiffuse_responses_total{status="200"}'] + 2
    name = 'undiffuse_jobs_total{end="finished"}'
    assert after[name] == before[name] + 1
