"""A studio that runs, and a browser that looks at it; shared by the tests of the page and docs/screenshots.py."""

from __future__ import annotations

import json
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from undiffuse.pipeline import Pipeline
from undiffuse.serving.engine import Engine
from undiffuse.serving.server import Door, Limits, Service, create_app, names_of
from undiffuse.studio.app import MODEL, Studio, routes
from undiffuse.studio.runs import Runs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@dataclass
class Running:
    port: int
    studio: Studio
    cookie: str = field(default="")

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def link(self) -> str:
        return f"{self.origin}/studio/#token={self.studio.token}"

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None
    ) -> tuple[int, Any, bytes]:
        """(status, headers, body) of one request, with the cookie of somebody who has entered."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = {"Cookie": f"undiffuse_studio_{self.port}={self.studio.cookie}"}
        if data is not None:
            sent["Content-Type"] = "application/json"
        sent |= headers or {}
        request = urllib.request.Request(self.origin + path, data, sent, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def message(self, path: str, body: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """(header, arrays) of one binary answer."""
        import numpy as np

        status, _, raw = self.ask(path, body)
        assert status == 200, raw
        length = int.from_bytes(raw[:4], "little")
        head = json.loads(raw[4 : 4 + length])
        arrays = {}
        for name, each in head.pop("arrays").items():
            count = int(np.prod(each["shape"]))
            kind = np.uint8 if each["type"] == "uint8" else "<f4"
            arrays[name] = np.frombuffer(raw, kind, count, 4 + length + each["at"]).reshape(each["shape"])
        return head, arrays


@contextmanager
def running(
    folders: dict[str, Path] | None = None, runs: dict[str, Path] | None = None, around: Path = Path("no-such-folder")
) -> Iterator[Running]:
    """A studio on a free port; with the model that ships, unless others are given."""
    folders = folders or {"digits": MODEL}
    sources = {name: partial(Pipeline.load, folder) for name, folder in folders.items()}
    service = Service(Engine(rows=32), sources, Limits(json=20_000_000))
    studio = Studio(service, folders, Runs(runs or {}, around))
    config = uvicorn.Config(app=lambda scope: None, host="127.0.0.1", port=0, log_level="error")
    listening = config.bind_socket()
    port = listening.getsockname()[1]
    app = create_app(service, Door(names_of("127.0.0.1", port), None))
    app.include_router(routes(studio))
    config.app = app
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started or not (service.ready or service.trouble):
        time.sleep(0.01)
    try:
        yield Running(port, studio)
    finally:
        studio.close()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def make_run(folder: Path, said: str = "digits") -> Path:
    """A run folder as a trainer leaves it, without a model."""
    (folder / "samples").mkdir(parents=True)
    rows = [
        {"step": i, "images": 16 * i, "loss": 1 / i, "grad_norm": 1.0, "images_per_second": 100.0} for i in (1, 2, 3)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "ima')
    (folder / "held_out.jsonl").write_text('{"step": 3, "images": 48, "raw": 0.5, "ema": 0.4}\n')
    (folder / "status.json").write_text(json.dumps({"state": "stopped", "step": 3, "images": 48, "note": said}))
    (folder / "config.json").write_text(json.dumps({"data": said}))
    from PIL import Image

    Image.new("L", (8, 8), 200).save(folder / "samples" / "preview-000003.png")
    return folder
