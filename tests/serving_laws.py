"""Shared by tests/serving: a server that really listens, with a tiny model behind it."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest

from test_pipeline import SPEC, pipeline
from undiffuse.conditions import Attributes, Classes, Conditions, Picture, Vector
from undiffuse.networks import sized
from undiffuse.pipeline import Pipeline

pytest.importorskip("uvicorn", reason="needs undiffuse[serve]")
pytest.importorskip("fastapi", reason="needs undiffuse[serve]")

from undiffuse.serving.engine import Engine
from undiffuse.serving.server import Limits, Service, server_of

ROWS = 8


@dataclass
class Running:
    port: int
    model: Pipeline
    service: Service

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any, bytes]:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = {**({"Content-Type": "application/json"} if data is not None else {}), **(headers or {})}
        request = urllib.request.Request(self.url + path, data, sent)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def counts(self) -> dict[str, float]:
        """What /metrics says."""
        text = self.ask("/metrics")[2].decode()
        rows = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in rows}


@contextmanager
def running(
    key: str | None = None,
    sources: dict[str, Callable[[], Pipeline]] | None = None,
    most_loaded: int | None = None,
    waiting: int = 64,
    ready: bool = True,
    **limits: Any,
) -> Iterator[Running]:
    model = pipeline()
    engine = Engine(rows=ROWS, exact=True, waiting=waiting)
    service = Service(engine, sources or {"tiny": lambda: model}, Limits(**limits), most_loaded)
    server, listening = server_of(service, "127.0.0.1", 0, key)
    port = listening.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while thread.is_alive() and (not server.started or (ready and not service.ready)):
        time.sleep(0.01)
    try:
        yield Running(port, model, service)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def until(true: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for something that happens elsewhere."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.01)


# --- a model that takes all that data can say of their items ----------------------------------------------------------

OF = replace(
    SPEC,
    classes=("cat", "dog"),
    attributes=(("breed", ("manx", "tabby")), ("eyes", ("blue", "none", "1"))),
    numbers=(("age", 3.0, 2.0), ("weight", 50.0, 5.0)),
)


def complete(made: dict[str, Any], shape: tuple[int, ...]) -> Pipeline:
    """A model of what data say of their items, which is shown pictures."""
    parts = Conditions(
        {
            "classes": Classes(2, 16),
            "attributes": Attributes((2, 3), 16),
            "numbers": Vector(2, 16),
            "beside": Picture(shape, SPEC.shape[1:], made=made),
        }
    )
    name, options = sized(SPEC.shape, "tiny", 16)
    options = {**options, "in_channels": options["in_channels"] + parts.channels, "out_channels": 1}
    return pipeline(OF, 0, network=name, network_config=options, conditions=parts.config)
