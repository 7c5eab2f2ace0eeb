"""The server: HTTP in front of the engine.

    GET  /v1/models   POST /v1/images/generations   POST /v1/images/edits     as OpenAI's client sends them
    POST /models/NAME                                    as Hugging Face's InferenceClient sends text-to-image
    POST /v1/samples                                     arrays (.npy)
    GET  /v2/health/live   /v2/health/ready   /metrics   /openapi.json

The event loop only reads and writes; all that computes is on the engine's thread. No request names a file or an
address, so none can be read or called.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

from .. import __version__
from ..errors import UndiffuseError
from ..pipeline import Pipeline
from ..sampling import Frame
from . import api
from .api import Limits, Refused
from .engine import Busy, Engine, Job, Late
from .engine import Request as Asked

GRACE = 10.0


class Service:
    """The engine and what is known of it while it loads.

    ``load`` runs on a thread of its own, so that the server answers (503) from its first moment.
    """

    def __init__(self, load: Callable[[], Engine], limits: Limits = Limits()) -> None:
        self.limits = limits
        self.engine: Engine | None = None
        self.trouble: str | None = None
        self.draining = False
        self.answers: Counter[int] = Counter()
        self.born = int(time.time())
        self._thread = threading.Thread(target=self._load, args=(load,), name="undiffuse-load", daemon=True)
        self._thread.start()

    def _load(self, load: Callable[[], Engine]) -> None:
        try:
            self.engine = load()
        except Exception as error:
            self.trouble = str(error)

    @property
    def ready(self) -> bool:
        return self.engine is not None and not self.draining

    def running(self) -> Engine:
        """The engine, or the answer why there is none."""
        if self.draining:
            raise Refused(503, "the server is shutting down", code="draining")
        if self.engine is None:
            message = "the model could not be loaded" if self.trouble else "the model is loading"
            raise Refused(503, message, code="loading")
        return self.engine

    def model(self, name: str | None) -> tuple[str, Pipeline]:
        models = self.running().models
        if name is None or name == "":
            name = next(iter(models))
        if name not in models:
            raise Refused(404, f"there is no such model; there are {', '.join(models)}", "model", "model_not_found")
        return name, models[name]

    def submit(self, asked: Asked) -> list[Job]:
        """Queue a request, in parts that fit into a network call; all of it or nothing."""
        engine = self.running()
        each = Pipeline.rows(asked.sampling)
        most = max(1, engine.rows[asked.model] // each)
        jobs: list[Job] = []
        try:
            for begin in range(0, len(asked.samples), most):
                numbers = asked.samples[begin : begin + most]
                classes = None if asked.classes is None else asked.classes[begin : begin + most]
                part = replace(asked, samples=numbers, classes=classes)
                jobs.append(engine.submit(part))
        except Busy as busy:
            for job in jobs:
                job.cancel()
            refused = Refused(429, f"busy: {busy}", code="queue_full")
            refused.headers = {"Retry-After": str(max(1, math.ceil(busy.seconds)))}
            raise refused from None
        except UndiffuseError as error:
            raise Refused(400, str(error), code="invalid_value") from None
        return jobs

    def metrics(self) -> str:
        """Prometheus text."""
        lines = []

        def metric(name: str, kind: str, help: str, *values: tuple[str, float]) -> None:
            lines.extend([f"# HELP undiffuse_{name} {help}", f"# TYPE undiffuse_{name} {kind}"])
            lines.extend(f"undiffuse_{name}{labels} {value:.10g}" for labels, value in values)

        answers = sorted(self.answers.items())
        metric("responses_total", "counter", "HTTP answers by status", *((f'{{status="{s}"}}', n) for s, n in answers))
        engine = self.engine
        if engine is not None:
            c = engine.counters
            ends = ("finished", "failed", "cancelled", "late", "rejected")
            metric("jobs_received_total", "counter", "jobs given to the engine", ("", c.received))
            counts = [(f'{{end="{end}"}}', getattr(c, end)) for end in ends]
            metric("jobs_total", "counter", "jobs by how they ended", *counts)
            metric("jobs_waiting", "gauge", "jobs in the queue", ("", len(engine.waiting)))
            metric("jobs_running", "gauge", "jobs that take part in network calls", ("", len(engine.running)))
            metric("network_calls_total", "counter", "network calls", ("", c.calls))
            metric("network_rows_total", "counter", "rows of network calls: their mean is the batch size", ("", c.rows))
            metric("network_seconds_total", "counter", "seconds inside network calls", ("", c.seconds))
        return "\n".join(lines) + "\n"


# --- Who may ask ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Door:
    """What a request must be before anything reads it.

    Attributes:
        hosts: the names under which the server may be addressed, ``name:port``; empty: any (only with a key).
        key: needed in ``Authorization: Bearer``; None: none is.
    """

    hosts: frozenset[str]
    key: str | None
    open: frozenset[str] = frozenset({"/v2/health/live"})

    def refuse(self, scope: Scope) -> Refused | None:
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        host = headers.get("host", [])
        if len(host) != 1:
            return Refused(400, "exactly one Host header is needed", code="bad_host")
        if self.hosts and host[0].lower() not in self.hosts:
            # A page of another site can point its own name at this machine; it cannot forge the Host header.
            return Refused(403, "this server does not go by that name", code="bad_host")
        for origin in headers.get("origin", []):
            if self.hosts and (urlsplit(origin).scheme != "http" or urlsplit(origin).netloc.lower() not in self.hosts):
                return Refused(403, "requests of other sites' pages are refused", code="bad_origin")
        for site in headers.get("sec-fetch-site", []):
            if site not in ("same-origin", "none"):
                return Refused(403, "requests of other sites' pages are refused", code="bad_origin")
        if headers.get("content-encoding", ["identity"]) != ["identity"]:
            return Refused(415, "bodies must not be compressed", code="bad_encoding")
        if self.key is not None and scope["path"] not in self.open:
            given = headers.get("authorization", [])
            wanted = f"Bearer {self.key}".encode()
            if len(given) != 1 or not hmac.compare_digest(given[0].encode("latin-1", "replace"), wanted):
                return Refused(401, "the API key is missing or wrong", code="invalid_api_key")
        return None


class Guard:
    """The outermost layer: :class:`Door`, the limit on bodies, and the count of answers."""

    def __init__(self, app: ASGIApp, service: Service, door: Door) -> None:
        self.app, self.service, self.door = app, service, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008})
            return
        limits, arrived, begun = self.service.limits, 0, time.monotonic()

        async def counted() -> Message:
            nonlocal arrived
            left = limits.upload_seconds - (time.monotonic() - begun)
            waiting_for_body = arrived >= 0
            try:
                message = await (asyncio.wait_for(receive(), max(0.01, left)) if waiting_for_body else receive())
            except TimeoutError:
                raise Refused(408, "the body did not arrive in time", code="timeout") from None
            if message["type"] == "http.request" and arrived >= 0:
                arrived += len(message.get("body", b""))
                if arrived > limits.body:
                    raise Refused(413, f"the body is larger than {limits.body:,} bytes", code="too_large")
                if not message.get("more_body"):
                    arrived = -1  # all of it is here; what comes now is the client leaving
            return message

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.service.answers[message["status"]] += 1
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        refused = self.door.refuse(scope)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if refused is None and length.isdigit() and int(length) > limits.body:
            refused = Refused(413, f"the body is larger than {limits.body:,} bytes", code="too_large")
        if refused is not None:
            # A client that is still sending would see a broken connection and not the answer: let it finish, within
            # bounds.
            message: Message = {"more_body": True}
            while message.get("more_body") and arrived < 2 * limits.body and time.monotonic() - begun < 5:
                message = await receive()
                arrived += len(message.get("body", b""))
            await answer(refused)(scope, receive, noted)
            return
        await self.app(scope, counted, noted)


def names_of(host: str, port: int) -> frozenset[str]:
    """The names under which a server on this machine may be addressed."""
    hosts = {"127.0.0.1", "localhost", "[::1]", f"[{host}]" if ":" in host else host}
    return frozenset(f"{name}:{port}" for name in hosts) | (frozenset(hosts) if port == 80 else frozenset())


def answer(refused: Refused) -> Response:
    headers = dict(refused.headers)
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(refused.body, refused.status, headers)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    fields = {name: {"type": ["string", "null"]} for name in ("message", "type", "param", "code")}
    error = {"type": "object", "properties": fields, "required": list(fields)}
    schema = {"type": "object", "properties": {"error": error}, "required": ["error"]}
    content = {"application/json": {"schema": schema}}
    return {status: {"description": "an error that says what", "content": content} for status in (*statuses, 401, 403)}


ERRORS = _errors(400, 404, 408, 413, 415, 429, 500, 503, 504)


# --- The routes -------------------------------------------------------------------------------------------------------


def create_app(service: Service, door: Door) -> FastAPI:
    """The ASGI application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.draining = True
        if service.engine is not None:
            await asyncio.to_thread(service.engine.close, GRACE)

    app = FastAPI(title="undiffuse", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Guard, service=service, door=door)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return answer(error)

    @app.exception_handler(404)
    async def missing(request: Request, error: Exception) -> Response:
        return answer(Refused(404, "there is no such page", code="not_found"))

    @app.exception_handler(405)
    async def method(request: Request, error: Exception) -> Response:
        response = answer(Refused(405, "this page does not take that method", code="method_not_allowed"))
        response.headers.update(getattr(error, "headers", None) or {})
        return response

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return answer(Refused(500, "something went wrong inside; the server's log says what", code="internal"))

    @app.get("/v2/health/live")
    async def live() -> dict[str, str]:
        """The process answers."""
        return {"status": "live"}

    @app.get("/v2/health/ready", responses=_errors(503))
    async def ready() -> dict[str, str]:
        """Models are loaded and requests are taken."""
        service.running()
        return {"status": "ready"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        """Counters for Prometheus."""
        return service.metrics()

    @app.get("/v1/models", responses=_errors(503))
    async def models() -> dict[str, Any]:
        """The models that can be asked."""
        return {"object": "list", "data": [_model(service, name) for name in service.running().models]}

    @app.get("/v1/models/{name}", responses=_errors(404, 503))
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        return _model(service, service.model(name)[0])

    @app.post("/v1/images/generations", **_takes(api.Generation), responses=ERRORS)
    async def generations(request: Request) -> Response:
        """Pictures from noise."""
        form = api.read_json(await _json(request), api.Generation)
        name, pipeline = service.model(form.model)
        return await _pictures(service, request, form, name, pipeline, "image_generation", None, None, 1.0)

    @app.post("/v1/images/edits", **_uploads(api.Edit), responses=ERRORS)
    async def edits(request: Request) -> Response:
        """Image-to-image, and inpainting with a mask."""
        fields, files = await _form(request)
        form = api.checked(api.Edit, fields, strict=False)
        name, pipeline = service.model(form.model)
        api.check_size(form, pipeline.spec)
        if "image" not in files:
            raise Refused(400, "image is missing", "image", "missing")
        image = await asyncio.to_thread(api.read_picture, files["image"], pipeline.spec, service.limits)
        keep = None
        if "mask" in files:
            keep = await asyncio.to_thread(api.read_mask, files["mask"], pipeline.spec, service.limits)
        strength = form.strength if form.strength is not None else (0.6 if keep is None else 1.0)
        return await _pictures(service, request, form, name, pipeline, "image_edit", image, keep, strength)

    @app.post("/v1/samples", **_takes(api.Samples), responses=ERRORS)
    async def samples(request: Request) -> Response:
        """Samples in the data's own units, as a NumPy file."""
        form = api.read_json(await _json(request), api.Samples)
        name, pipeline = service.model(form.model)
        asked = _asked(service, form, form.prompt, name, pipeline, api.samples_of(form, service.limits))
        x = await _results(service, request, service.submit(asked))
        data = api.as_array(pipeline.spec, x)
        return Response(data, media_type="application/octet-stream", headers={"X-Seed": str(asked.seed)})

    @app.post("/models/{name}", **_takes(api.TextToImage), responses=ERRORS)
    async def text_to_image(name: str, request: Request) -> Response:
        """Hugging Face's form: one picture."""
        form = api.read_json(await _json(request), api.TextToImage)
        how = form.parameters or api.Parameters()
        name, pipeline = service.model(name)
        if how.scheduler is not None:
            how = how.model_copy(update={"solver": how.scheduler})
        height, width = pipeline.spec.shape[1:] if pipeline.spec.has_pictures else (0, 0)
        size = f"{how.width or width}x{how.height or height}"
        api.check_size(api.Generation(size=size), pipeline.spec)
        asked = _asked(service, how, form.inputs, name, pipeline, 1)
        x = await _results(service, request, service.submit(asked))
        picture = pipeline.spec.to_images(x[0])[0]
        return Response(api.encode(picture, "png", None), media_type="image/png", headers={"X-Seed": str(asked.seed)})

    return app


def _takes(form: type[BaseModel]) -> dict[str, Any]:
    """How a JSON body, read by :func:`api.read_json`, is described in the schema."""
    return {"openapi_extra": {"requestBody": _body("application/json", form.model_json_schema())}}


def _uploads(form: type[BaseModel]) -> dict[str, Any]:
    schema = form.model_json_schema()
    for field in ("image", "mask"):
        schema["properties"][field] = {"type": "string", "format": "binary"}
    schema["required"] = ["image"]
    return {"openapi_extra": {"requestBody": _body("multipart/form-data", schema)}}


def _body(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    definitions = schema.pop("$defs", {})
    text = json.dumps(schema)
    for name, definition in definitions.items():  # written out: a reference would point outside the operation
        text = text.replace(json.dumps({"$ref": f"#/$defs/{name}"}), json.dumps(definition))
    return {"required": True, "content": {kind: {"schema": json.loads(text)}}}


def _model(service: Service, name: str) -> dict[str, Any]:
    """OpenAI's four fields, and what a client needs to ask well."""
    pipeline = service.model(name)[1]
    spec = pipeline.spec
    return {
        "id": name,
        "object": "model",
        "created": service.born,
        "owned_by": "undiffuse",
        "data": {"kind": spec.kind, "shape": list(spec.original_shape), "dtype": spec.dtype, "classes": spec.classes},
        "size": "x".join(map(str, reversed(spec.shape[1:]))) if spec.has_pictures else None,
    }


async def _json(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page of another site may send forms and text without asking first, but not this.
        raise Refused(415, "the Content-Type must be application/json", code="bad_content_type")
    return await request.body()


async def _form(request: Request) -> tuple[dict[str, str | list[str]], dict[str, bytes]]:
    """The fields and the files of a multipart body; each once."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Refused(415, "the Content-Type must be multipart/form-data", code="bad_content_type")
    fields: dict[str, str | list[str]] = {}
    files: dict[str, bytes] = {}
    try:
        async with request.form(max_files=4, max_fields=50) as form:
            for key, value in form.multi_items():
                name = key.removesuffix("[]")
                if isinstance(value, UploadFile):
                    if name not in ("image", "mask"):
                        raise Refused(400, f"unknown file {api.short(name)}; known are image, mask", api.short(name))
                    if name in files:
                        raise Refused(400, f"{name} is given twice: one picture can be edited", name, "duplicate_field")
                    files[name] = await value.read()
                elif name == "class_labels" and name in fields:
                    fields[name] = [*([before] if isinstance(before := fields[name], str) else before), value]
                elif name in fields:
                    raise Refused(400, f"{api.short(name)} is given twice", api.short(name), "duplicate_field")
                else:
                    fields[name] = value
    except (MultiPartException, UnicodeError) as error:
        raise Refused(400, f"the form cannot be read: {error}", code="invalid_form") from None
    return fields, files


def _asked(
    service: Service,
    form: api.How,
    prompt: str,
    name: str,
    pipeline: Pipeline,
    count: int,
    **more: Any,
) -> Asked:
    return Asked(
        name,
        api.sampling_of(form, pipeline, service.limits),
        samples=range(count),
        seed=api.seed_of(form),
        classes=api.classes_of(form, prompt, pipeline, count),
        against=api.against_of(form, pipeline),
        seconds=service.limits.seconds,
        **more,
    )


async def _results(service: Service, request: Request, jobs: Sequence[Job]) -> list[Tensor]:
    """Wait for all; if the client leaves, or one fails, ask nothing more."""
    waiting = {asyncio.ensure_future(asyncio.wrap_future(job.future)) for job in jobs}
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, timeout=0.2, return_when=asyncio.FIRST_EXCEPTION)
            for each in done:
                each.result()
            if waiting and await request.is_disconnected():
                raise Refused(499, "the client has left", code="cancelled")
    except Late:
        raise Refused(504, f"not finished within {service.limits.seconds:g} seconds", code="timeout") from None
    except UndiffuseError as error:
        raise Refused(500, str(error), code="sampling_failed") from None
    except asyncio.CancelledError:
        if any(job.cancelled for job in jobs):
            raise Refused(503, "the server is shutting down", code="draining") from None
        raise
    finally:
        for job in jobs:
            if not job.future.done():
                job.cancel()
        for each in waiting:
            each.cancel()
    return [job.future.result() for job in jobs]


async def _pictures(
    service: Service,
    request: Request,
    form: api.Generation,
    name: str,
    pipeline: Pipeline,
    kind: str,
    image: Tensor | None,
    keep: Tensor | None,
    strength: float,
) -> Response:
    api.check_size(form, pipeline.spec)
    count = api.samples_of(form, service.limits)
    output = form.output_format or "png"
    spec = pipeline.spec
    more: dict[str, Any] = {"image": image, "keep": keep, "strength": strength}
    size = "x".join(map(str, reversed(spec.shape[1:])))

    def encoded(x: Tensor) -> str:
        return api.text_of(api.encode(spec.to_images(x)[0], output, form.output_compression))

    if not form.stream:
        if form.partial_images:
            raise Refused(400, "partial_images needs stream=true", "partial_images", "invalid_value")
        asked = _asked(service, form, form.prompt, name, pipeline, count, **more)
        parts = await _results(service, request, service.submit(asked))
        pictures = await asyncio.to_thread(lambda: [encoded(x[None]) for part in parts for x in part])
        if form.response_format == "url":
            data = [{"url": f"data:image/{output};base64,{picture}"} for picture in pictures]
        else:
            data = [{"b64_json": picture} for picture in pictures]
        return JSONResponse(
            {"created": int(time.time()), "data": data, "output_format": output, "size": size, "seed": asked.seed}
        )

    if count != 1:
        raise Refused(400, "stream=true gives one picture: n must be 1", "n", "invalid_value")
    loop, frames = asyncio.get_running_loop(), asyncio.Queue[Frame]()
    more["watch"] = lambda frame: loop.call_soon_threadsafe(frames.put_nowait, frame)
    asked = _asked(service, form, form.prompt, name, pipeline, 1, **more)
    (job,) = service.submit(asked)
    last = asked.sampling.steps
    wanted = form.partial_images or 0
    shown = {round((i + 1) * last / (wanted + 1)) for i in range(wanted)}
    common = {"background": "opaque", "quality": "auto", "output_format": output, "size": size}

    async def events() -> AsyncIterator[str]:
        def event(name: str, **fields: Any) -> str:
            body = {"type": f"{kind}.{name}", "created_at": int(time.time()), **common, **fields}
            return f"event: {kind}.{name}\ndata: {json.dumps(body)}\n\n"

        number = 0
        end = asyncio.ensure_future(_results(service, request, [job]))
        try:
            while not (end.done() and frames.empty()):
                following = asyncio.ensure_future(frames.get())
                await asyncio.wait({end, following}, return_when=asyncio.FIRST_COMPLETED)
                if not following.done():
                    following.cancel()
                    continue
                frame = following.result()
                if frame.estimate is not None and frame.index in shown and frame.index < last + (strength < 1):
                    picture = await asyncio.to_thread(encoded, frame.estimate.x0.cpu())
                    yield event("partial_image", b64_json=picture, partial_image_index=number)
                    number += 1
            (x,) = await end
            usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
            usage["input_tokens_details"] = {"image_tokens": 0, "text_tokens": 0}  # pyrefly: ignore
            picture = await asyncio.to_thread(encoded, x)
            yield event("completed", b64_json=picture, usage=usage, seed=asked.seed)
        except Refused as error:
            yield f"event: error\ndata: {json.dumps(error.body)}\n\n"
        finally:
            job.cancel()

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
