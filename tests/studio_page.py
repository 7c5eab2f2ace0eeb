"""A studio that runs, and a browser that looks at it; shared by the tests of the page and docs/screenshots.py."""

from __future__ import annotations

import base64
import io
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

import numpy as np
import torch
from PIL import Image

from undiffuse.pipeline import Pipeline
from undiffuse.serving.engine import Engine
from undiffuse.serving.server import Limits, Service, server_of
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


class Looking:
    """A page, what it asked for, and what it complained about."""

    def __init__(self, page: Any, server: Running) -> None:
        self.page, self.server = page, server
        self.complaints: list[str] = []
        self.asked: list[str] = []
        page.set_default_timeout(30_000)
        page.on("console", self.hear)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))

    def hear(self, message: Any) -> None:
        # Reading pixels back is what these tests do, not the page.
        if message.type in ("error", "warning") and "willReadFrequently" not in message.text:
            self.complaints.append(message.text)

    def open(self, state: str) -> None:
        self.page.goto("about:blank")
        self.page.goto(f"{self.server.origin}/studio/#{state}")
        self.page.wait_for_selector(".lab")

    def js(self, code: str, *values: Any) -> Any:
        """An expression on ``now``, what the open lab shows."""
        lab = self.page.url.partition("#")[2].partition("?")[0] or "time"
        return self.page.evaluate(
            f"async (given) => {{ const {{ now }} = await import('/studio/page/{lab}.js'); return {code}; }}",
            list(values),
        )

    def wait(self, code: str) -> None:
        """Until an expression on ``now`` is true."""
        for _ in range(300):
            if self.js(code):
                return
            self.page.wait_for_timeout(100)
        raise AssertionError(f"never: {code}; the page says {self.page.locator('#trouble').text_content()!r}")

    def settled(self, code: str) -> None:
        """Until the address says so, and what it says is on the screen."""
        self.wait(f"{code} && document.querySelector('.lab').getAttribute('aria-busy') === 'false'")

    def pixels(self, selector: str) -> np.ndarray:
        """The red values of a canvas, which are the grey ones of a grey picture."""
        png = self.page.locator(selector).first.evaluate("canvas => canvas.toDataURL('image/png')")
        with Image.open(io.BytesIO(base64.b64decode(png.partition(",")[2]))) as picture:
            return np.array(picture.convert("RGB"))[..., 0].astype(int)

    def slide(self, selector: str, value: float) -> None:
        """Move a slider as a hand does: input events."""
        self.page.locator(selector).evaluate(
            "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input', {bubbles: true})); }",
            str(value),
        )


def ends(look: Looking, what: str = "now.trace") -> np.ndarray:
    """The last frame of a trajectory, ``[B, *shape]``."""
    shape = look.js(f"{what}.arrays.x.shape")
    return np.array(look.js(f"Array.from({what}.arrays.x.data)")).reshape(shape)[-1]


def close(page: np.ndarray, wanted: torch.Tensor) -> bool:
    return bool(np.abs(page - wanted.numpy()).max() < 1e-3)


@contextmanager
def running(
    folders: dict[str, Path] | None = None, runs: dict[str, Path] | None = None, around: Path = Path("no-such-folder")
) -> Iterator[Running]:
    """A studio on a free port; with the model that ships, unless others are given."""
    folders = folders or {"digits": MODEL}
    sources = {name: partial(Pipeline.load, folder) for name, folder in folders.items()}
    service = Service(Engine(rows=32), sources, Limits(json=20_000_000))
    studio = Studio(service, folders, Runs(runs or {}, around))
    server, listening = server_of(service, "127.0.0.1", 0, None, routes(studio))
    server.config.timeout_graceful_shutdown = 2
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started or not (service.ready or service.trouble):
        time.sleep(0.01)
    try:
        yield Running(listening.getsockname()[1], studio)
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
    Image.new("L", (8, 8), 200).save(folder / "samples" / "preview-000003.png")
    return folder
