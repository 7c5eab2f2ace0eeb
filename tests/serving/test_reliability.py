"""The server under trouble: faults, load, several models, and its end. Ids are those of the reliability list."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from serving_laws import ROWS, Running, running, until
from test_pipeline import pipeline
from undiffuse.commands.sample import sample
from undiffuse.data import DataSpec
from undiffuse.data.sounds import encode_wav
from undiffuse.data.spec import units_between
from undiffuse.errors import UndiffuseError
from undiffuse.pipeline import Pipeline
from undiffuse.serving import api
from undiffuse.serving.engine import Busy, Engine, Loaded, Request
from undiffuse.serving.server import Patient
from undiffuse.serving.shelf import Shelf, Unloadable

IMAGE = "/v1/images/generations"


# --- faults -----------------------------------------------------------------------------------------------------------


def test_SV12_a_mistake_inside_ends_its_requests_and_not_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pipeline()
    batch = Engine._batch

    def broken(self: Engine, jobs: object) -> object:
        raise KeyError("a mistake that nobody foresaw")

    with Engine({"m": model}, rows=8) as engine:
        monkeypatch.setattr(Engine, "_batch", broken)
        jobs = [engine.submit(Request("m", model.settings(), seed=s, classes=[1])) for s in range(3)]
        for job in jobs:
            with pytest.raises(KeyError):
                job.future.result(30)
        monkeypatch.setattr(Engine, "_batch", batch)
        assert engine.run(Request("m", model.settings(), classes=[1])).isfinite().all()
        assert engine.counters.failed == 3


def test_SV12_an_engine_without_its_device_ends_and_the_server_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as server:
        ended = threading.Event()
        server.service.ended = ended.set

        def lost(*what: object) -> object:
            raise torch.AcceleratorError("the device is lost")

        monkeypatch.setattr("undiffuse.serving.engine.answer_together", lost)
        assert server.ask(IMAGE, {"prompt": "1"})[0] == 500
        until(lambda: not server.service.engine.alive)
        for path in ("/v2/health/live", "/v2/health/ready", "/v1/models"):
            assert server.ask(path)[0] == 503
        assert server.ask(IMAGE, {"prompt": "1"})[0] == 503
        assert ended.wait(30)
        assert server.service.trouble


def test_SV12_SV15_what_goes_wrong_inside_has_a_number_and_no_details(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*what: object) -> object:
        raise ValueError("/home/secret")

    with running() as server:
        monkeypatch.setattr("undiffuse.serving.api.encode", broken)
        status, _, text = server.ask(IMAGE, {"prompt": "1"})
        assert status == 500
        assert "at error" in json.loads(text)["error"]["message"]
        assert b"secret" not in text
        monkeypatch.undo()
        assert server.ask(IMAGE, {"prompt": "1"})[0] == 200
        assert server.counts()['undiffuse_responses_total{status="500"}'] == 1


def test_SV3_a_client_that_leaves_is_forgotten() -> None:
    """Over HTTP: the wrapped future is cancelled from the loop's side, which must not end the engine's thread."""
    with running() as server:
        engine = server.service.engine
        for stream in (False, True):
            body = {"prompt": "1", "num_inference_steps": 1000, "stream": stream}
            client = http.client.HTTPConnection("127.0.0.1", server.port)
            client.request("POST", IMAGE, json.dumps(body), {"Content-Type": "application/json"})
            until(lambda: engine.jobs)
            client.close()
            until(lambda: not engine.jobs)
        assert server.ask(IMAGE, {"prompt": "1"})[0] == 200
        assert engine.counters.cancelled == 2


def test_SV2_a_deadline_is_a_504() -> None:
    with running(seconds=0.2) as server:
        status, _, text = server.ask(IMAGE, {"prompt": "1", "num_inference_steps": 1000})
        assert (status, json.loads(text)["error"]["code"]) == (504, "timeout")


# --- turns ------------------------------------------------------------------------------------------------------------


def test_LT6_short_requests_overtake_long_ones_but_not_for_ever() -> None:
    """Two rows a call. A request of 64 samples and 1000 steps is there first: a short one does not wait for it, and
    while short ones keep coming the long one goes on."""
    model, done = pipeline(), []
    with Engine({"m": model}, rows=2, waiting=1000) as engine:
        engine.models["m"] = Loaded(model, 2, 1e-3)
        long = engine.submit_parts(Request("m", model.settings(steps=1000), samples=range(64), classes=[1]))
        assert len(long) == 32
        assert [job.due for job in long] == sorted(job.due for job in long)  # one part after the other
        until(lambda: long[0].left < 1000)
        short = engine.submit(Request("m", model.settings(steps=3), samples=range(2), classes=[1]))
        before = long[0].left
        short.future.result(30)
        assert before - long[0].left <= 3  # it waited for the call in progress, and no more
        for job in long[1:]:
            job.cancel()
        # However many short ones come later, each is due later than what was asked long before it.
        due = long[0].due
        model_pace = engine.models["m"].pace
        later = engine.submit(Request("m", model.settings(steps=3), samples=range(2), classes=[1]))
        assert later.due - later.asked == pytest.approx(Engine.PATIENCE * 3 * model_pace * 2, rel=0.5)
        assert due - long[0].asked > later.due - later.asked
        long[0].asked, long[0].due = 0.0, 0.0  # as if it had waited that long: now it is first
        crowd = [engine.submit(Request("m", model.settings(steps=3), samples=[0, 1], classes=[1])) for _ in range(5)]
        for job in crowd:
            job.future.add_done_callback(lambda future: done.append(long[0].left))
        left = long[0].left
        until(lambda: long[0].left < left - 20)
        assert not done
        long[0].cancel()
        for job in crowd:
            job.future.result(30)


def test_SV1_retry_after_is_the_time_that_the_queue_takes() -> None:
    """With a pace of one second a row: what is left of what is there, row by row."""
    model, gate = pipeline(), threading.Event()

    def hold(frame: object) -> None:
        gate.wait(30)

    with Engine({"m": model}, rows=2, waiting=2) as engine:
        engine.models["m"] = Loaded(model, 2, 1.0)
        settings = model.settings(solver="euler", steps=5, guidance_scale=2.0)
        jobs = [engine.submit(Request("m", settings, classes=[1], watch=hold))]
        until(lambda: engine.waiting == 0)
        jobs += [engine.submit(Request("m", settings, classes=[1])) for _ in range(2)]
        with pytest.raises(Busy) as busy:
            engine.submit(Request("m", settings, classes=[1]))
        assert busy.value.seconds == pytest.approx(3 * 5 * 2 * 1.0)
        gate.set()
        for job in jobs:
            job.future.result(30)
        assert engine.wait() == 0


def test_a_request_of_many_parts_is_one_in_the_queue() -> None:
    model, gate = pipeline(), threading.Event()
    with Engine({"m": model}, rows=2, waiting=2) as engine:
        first = Request("m", model.settings(steps=1), samples=[0, 1], classes=[1], watch=lambda frame: gate.wait(30))
        jobs = [engine.submit(first)]
        until(lambda: engine.waiting == 0)
        jobs += engine.submit_parts(Request("m", model.settings(steps=1), samples=range(20), classes=[1]))
        assert engine.waiting == 1
        jobs += engine.submit_parts(Request("m", model.settings(steps=1), samples=range(4), classes=[1]))
        with pytest.raises(Busy):
            engine.submit(Request("m", model.settings(steps=1), classes=[1]))
        gate.set()
        for job in jobs:
            job.future.result(30)
        assert engine.counters.received == len(jobs) == 13


# --- several models ---------------------------------------------------------------------------------------------------


def test_a_shelf_loads_what_is_asked_for_and_puts_away_what_is_not() -> None:
    loads: list[str] = []
    models = {name: pipeline(seed=seed) for seed, name in enumerate("abc")}

    def source(name: str) -> Callable[[], Pipeline]:
        def load() -> Pipeline:
            loads.append(name)
            return models[name]

        return load

    with running(sources={name: source(name) for name in models}, most_loaded=2) as server:
        assert loads == ["a", "b"]
        listed = json.loads(server.ask("/v1/models")[2])["data"]
        assert [(model["id"], model["loaded"]) for model in listed] == [("a", True), ("b", True), ("c", False)]

        def ask(name: str) -> bytes:
            body = {"model": name, "class_labels": 1, "seed": 3, "num_inference_steps": 2}
            status, _, data = server.ask("/v1/samples", body)
            assert status == 200
            return data

        def wanted(name: str) -> np.ndarray:
            model = models[name]
            x = model.draw(1, seed=3, classes=[1], sampling=model.settings(steps=2), rows=ROWS)
            return model.spec.to_data(x)

        for name in "abcbca":  # for c the one used longest ago, a, is put away; for a then b
            assert np.array_equal(np.load(io.BytesIO(ask(name))), wanted(name))
        assert loads == ["a", "b", "c", "a"]
        # all at once: every one is answered, with its own model's sample, and nothing is mixed up
        names = "abccbaabcbcabca" * 2
        with ThreadPoolExecutor(16) as pool:
            for name, data in zip(names, pool.map(ask, names), strict=True):
                assert np.array_equal(np.load(io.BytesIO(data)), wanted(name))
        assert len(server.service.engine.models) == len(server.service.shelf.known) == 2


def test_a_shelf_never_puts_away_what_is_in_use() -> None:
    models = {name: pipeline(seed=seed) for seed, name in enumerate("ab")}
    with Engine(rows=2) as engine:
        shelf = Shelf(engine, {name: (lambda name=name: models[name]) for name in models}, 1)
        shelf.fill()[0].result(30)

        async def both() -> list[str]:
            order: list[str] = []

            async def second() -> None:
                async with shelf.use("b"):
                    order.append("b is used")
                    assert list(engine.models) == ["b"]

            async with shelf.use("a"):
                waiting = asyncio.create_task(second())
                await asyncio.sleep(0.2)
                assert list(engine.models) == ["a"]
                order.append("a was used")
            await waiting
            return order

        assert asyncio.run(both()) == ["a was used", "b is used"]


def test_a_model_that_cannot_be_loaded_is_a_503_and_tried_again() -> None:
    model, broken = pipeline(), [True]

    def load() -> Pipeline:
        if broken[0]:
            raise UndiffuseError("/home/secret: damaged")
        return model

    with running(sources={"a": lambda: model, "b": load}, most_loaded=1) as server:
        status, _, text = server.ask("/v1/samples", {"model": "b"})
        assert status == 503
        assert b"secret" not in text
        assert server.ask("/v1/samples", {"model": "a"})[0] == 200
        broken[0] = False
        assert server.ask("/v1/samples", {"model": "b"})[0] == 200


def test_a_server_whose_first_model_cannot_be_loaded_ends() -> None:
    def load() -> Pipeline:
        raise UndiffuseError("model.safetensors: damaged")

    with running(sources={"a": load}, ready=False) as server:
        until(lambda: server.service.trouble)
        assert server.service.trouble == "model.safetensors: damaged"
    with Engine(rows=2) as engine:
        (future,) = Shelf(engine, {"a": load}).fill()
        with pytest.raises(Unloadable):
            future.result(30)


# --- the same picture everywhere --------------------------------------------------------------------------------------


def test_the_command_line_makes_the_servers_picture(tmp_path: Path) -> None:
    """`undiffuse sample --rows N --out FOLDER` and `undiffuse serve --exact --rows N`: the same pixels, to the bit."""
    saved = pipeline().save(tmp_path / "model")
    with running(sources={"tiny": lambda: Pipeline.load(saved)}) as server:
        body = {"prompt": "3", "n": 5, "seed": 9, "num_inference_steps": 4, "guidance_scale": 2.0, "solver": "heun"}
        answers = json.loads(server.ask(IMAGE, body)[2])["data"]
    sample(
        saved, 5, classes="3", seed=9, steps=4, guidance_scale=2.0, solver="heun", rows=ROWS, out=tmp_path / "pictures"
    )
    files = sorted((tmp_path / "pictures").iterdir())
    assert len(files) == len(answers) == 5
    for file, each in zip(files, answers, strict=True):
        served = Image.open(io.BytesIO(base64.b64decode(each["b64_json"])))
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(served))


def test_sounds_are_served_as_wav() -> None:
    shift, scale = units_between(-32768.0, 32767.0)
    spec = DataSpec("sound", (1, 64), "int16", -32768.0, 32767.0, shift, scale, "L", ("a", "b"), rate=8000)
    model = pipeline(spec, classes=2)
    with running(sources={"tiny": lambda: model}) as server:
        status, headers, data = server.ask("/v1/samples", {"n": 2, "seed": 1, "prompt": "a", "format": "wav"})
        assert (status, headers["Content-Type"]) == (200, "audio/wav")
        wanted = spec.to_data(model.draw(2, seed=1, classes=[0], rows=ROWS))
        assert data == encode_wav(wanted.reshape(-1), spec)
        assert np.array_equal(
            np.load(io.BytesIO(server.ask("/v1/samples", {"n": 2, "seed": 1, "prompt": "a"})[2])), wanted
        )
        assert server.ask(IMAGE, {"prompt": "a"})[0] == 400
    with running() as server:
        status, _, text = server.ask("/v1/samples", {"format": "wav"})
        assert (status, json.loads(text)["error"]["param"]) == (400, "format")
        assert server.ask("/v1/samples", {"format": "mp3"})[0] == 400


# --- load -------------------------------------------------------------------------------------------------------------


def test_LT3_SV16_overload_sheds_and_the_counters_reconcile() -> None:
    """Forty at once on a queue of four: each is answered 200 or 429, in one word, and everything adds up."""
    with running(waiting=4) as server:

        def ask(seed: int) -> tuple[int, str | None]:
            status, headers, text = server.ask(IMAGE, {"prompt": "1", "seed": seed, "num_inference_steps": 20})
            if status == 429:
                assert json.loads(text)["error"]["code"] == "queue_full"
            return status, headers["Retry-After"]

        with ThreadPoolExecutor(40) as pool:
            answers = list(pool.map(ask, range(40)))
        statuses = Counter(status for status, _ in answers)
        assert set(statuses) == {200, 429}
        assert all(retry is not None and int(retry) >= 1 for status, retry in answers if status == 429)
        counts = server.counts()
        assert counts['undiffuse_responses_total{status="200"}'] == statuses[200]
        assert counts['undiffuse_responses_total{status="429"}'] == counts["undiffuse_rejected_total"] == statuses[429]
        assert counts["undiffuse_requests_total"] == 41  # with this one
        assert (
            counts["undiffuse_jobs_received_total"] == counts['undiffuse_jobs_total{end="finished"}'] == statuses[200]
        )
        assert server.ask("/v2/health/ready")[0] == 200


def test_LT3_a_full_queue_is_said_before_anything_is_read_or_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(waiting=1) as server:
        gate = threading.Event()
        hook = server.model.denoiser.network.register_forward_pre_hook(lambda module, inputs: gate.wait(30) and None)
        with ThreadPoolExecutor(9) as pool:
            many = [pool.submit(server.ask, IMAGE, {"prompt": "1", "num_inference_steps": 2}) for _ in range(9)]
            until(lambda: server.service.engine.waiting >= 1)
            with monkeypatch.context() as patched:
                for name in ("read_json", "checked"):
                    patched.setattr(api, name, lambda *given, **more: pytest.fail("was read"))
                for path in (IMAGE, "/v1/samples", "/v1/images/edits", "/models/tiny"):
                    assert server.ask(path, b"{}" * 1000)[0] == 429
            gate.set()
            assert {each.result()[0] for each in many} <= {200, 429}
        hook.remove()


def test_no_answer_waits_for_the_client_to_acknowledge_its_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nagle's algorithm is off; asyncio leaves it on for the sockets that uvicorn makes."""
    off: list[int] = []
    made = Patient.connection_made

    def look(self: Patient, transport: Any) -> None:
        made(self, transport)
        off.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(Patient, "connection_made", look)
    with running() as server:
        server.ask("/v2/health/live")
    assert off
    assert all(off)


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def grow(server: Running, requests: int) -> None:
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    for number in range(requests):
        body = {"prompt": "1", "num_inference_steps": 1 + number % 3, "stream": number % 5 == 0, "n": 1}
        if number % 7 == 0:
            body["solver"] = "no such solver"
        client.request("POST", IMAGE, json.dumps(body), {"Content-Type": "application/json"})
        client.getresponse().read()
    client.close()


def census() -> Counter[str]:
    """Objects by type, and open files, threads."""
    gc.collect()
    kinds = Counter(type(each).__name__ for each in gc.get_objects())
    return kinds + Counter(files=len(os.listdir("/proc/self/fd")), threads=threading.active_count())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_SV13_LT8_nothing_grows() -> None:
    # An event loop keeps up to a hundred timers that were cancelled (of bodies that came in time) before it drops them.
    requests, others = 250, threading.active_count()  # others: of other tests in this process
    with running() as server:
        grow(server, requests)
        until(lambda: threading.active_count() < others + 20)
        before = census()
        grow(server, requests)
        after = census()
    grown = {kind: count - before[kind] for kind, count in after.items() if count - before[kind] > requests // 2}
    assert not grown


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_SV13_LT8_soak() -> None:
    """Ten minutes ($UNDIFFUSE_SOAK seconds): at most 1 MB a thousand requests, and 20 MB in all."""
    end = time.monotonic() + float(os.environ.get("UNDIFFUSE_SOAK", "600"))
    with running() as server:
        grow(server, 1000)
        before, memory, done = census(), resident(), 0
        while time.monotonic() < end:
            grow(server, 200)
            done += 200
        after, grown = census(), resident() - memory
    assert {kind: n - before[kind] for kind, n in after.items() if n - before[kind] > 50} == {}
    assert grown < min(20e6, 2e6 + 1e6 * done / 1000), f"{grown:,} bytes in {done:,} requests"


def test_SV14_the_loop_is_never_blocked() -> None:
    """While the engine holds a network call, the server answers."""
    with running() as server:
        gate = threading.Event()
        network = server.model.denoiser.network
        hook = network.register_forward_pre_hook(lambda module, inputs: gate.wait(30) and None)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(server.ask, IMAGE, {"prompt": "1", "num_inference_steps": 1})
            until(lambda: server.service.engine.jobs)
            assert server.ask("/v2/health/live")[0] == 200
            assert server.ask(IMAGE, {"prompt": "nothing"})[0] == 400
            gate.set()
            assert asked.result()[0] == 200
        hook.remove()


# --- the end ----------------------------------------------------------------------------------------------------------


def serve(folder: Path, *options: str) -> tuple[subprocess.Popen[str], int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "undiffuse", "serve", str(folder), "--port", str(port), "--rows", "2", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def ready() -> bool:
        assert process.poll() is None, process.communicate()[0]
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            client.request("GET", "/v2/health/ready")
            return client.getresponse().status == 200
        except OSError:
            return False
        finally:
            client.close()

    until(ready, 60)
    return process, port


def test_SV11_LT9_sigterm_finishes_what_is_there(tmp_path: Path) -> None:
    process, port = serve(pipeline().save(tmp_path / "model"))

    def ask(number: int) -> int:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = json.dumps({"prompt": "1", "num_inference_steps": 30, "seed": number})
        client.request("POST", IMAGE, body, {"Content-Type": "application/json"})
        return client.getresponse().status

    def running_jobs() -> bool:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        client.request("GET", "/metrics")
        return "undiffuse_jobs_received_total 8" in client.getresponse().read().decode()

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, number) for number in range(8)]
        until(running_jobs)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        with contextlib.suppress(OSError):  # refused
            assert ask(9) == 503
        assert [each.result() for each in asked] == [200] * 8
    assert process.wait(20) in (0, -signal.SIGTERM, 143)
    process.communicate()


@pytest.mark.slow
def test_SV11_a_second_sigterm_ends_at_once(tmp_path: Path) -> None:
    process, port = serve(pipeline().save(tmp_path / "model"))
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"prompt": "1", "num_inference_steps": 1000, "n": 64})
    client.request("POST", IMAGE, body, {"Content-Type": "application/json"})
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    assert process.poll() is None  # it is at work
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) in (-signal.SIGTERM, 143)
    assert time.monotonic() - begun < 8  # not the ten seconds of grace
    process.communicate()


# --- fuzz -------------------------------------------------------------------------------------------------------------


def fuzz(server: Running, examples: int) -> None:
    """Every route from its own description: no 5xx, and what is answered is what is described."""
    schemathesis = pytest.importorskip("schemathesis", reason="needs undiffuse[dev]")
    from hypothesis import HealthCheck, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis.checks import load_all_checks, not_a_server_error
    from schemathesis.specs.openapi import checks

    load_all_checks()
    asked = (
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    )
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            strategy = operation.as_strategy(generation_mode=mode)

            @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(case=strategy)
            def check(case: Any) -> None:
                case.call_and_validate(checks=asked, timeout=60)

            with contextlib.suppress(Unsatisfiable):  # nothing of this operation can be wrong
                check()


def test_FZ5_the_description_is_true() -> None:
    with running(steps=20, samples=4) as server:
        fuzz(server, 6)
        assert server.ask("/v2/health/ready")[0] == 200


@pytest.mark.slow
def test_FZ5_the_description_is_true_at_length() -> None:
    with running(steps=20, samples=4) as server:
        fuzz(server, 500)
