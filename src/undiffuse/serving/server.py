"""The server: HTTP in front of the engine.

    GET  /v1/models   POST /v1/images/generations   POST /v1/images/edits     as OpenAI's client sends them
    POST /models/NAME                                    as Hugging Face's InferenceClient sends text-to-image
    POST /v1/samples                                     arrays (.npy), sounds (.wav)
    GET  /v2/health/live   /v2/health/ready   /metrics   /openapi.json

The event loop only reads and writes; all that computes is on the engine's thread. No request names a file or an
address, so none can be read or called.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import math
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import APIRouter, FastAPI, Path, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor
from uvicorn.protocols.http.h11_impl import H11Protocol

from .. import __version__
from ..editing import below
from ..errors import UndiffuseError
from ..grids import GRIDS
from ..pipeline import Pipeline
from ..sampling import Frame
from ..solvers import SOLVERS
from . import api
from .api import Limits, Refused
from .engine import Busy, Engine, Job, Late
from .engine import Request as Asked
from .shelf import Shelf, Unloadable

GRACE = 10.0
LOCAL = ("127.0.0.1", "localhost", "::1")


class Service:
    """The engine, its models, and what may be asked of them.

    Args:
        engine: without models; they are loaded into it.
        sources: what loads each model, by name.
        most_loaded: how many may be loaded at a time; None: all.

    Until the first models are loaded, requests are answered 503; later, one for a model that is not loaded waits for
    it. ``ended`` is called when the first models cannot be loaded, or when the engine has ended by itself: a server
    that cannot serve should not go on.
    """

    def __init__(
        self,
        engine: Engine,
        sources: Mapping[str, Callable[[], Pipeline]],
        limits: Limits = Limits(),
        most_loaded: int | None = None,
    ) -> None:
        self.engine = engine
        self.limits = limits
        self.trouble: str | None = None
        self.draining = False
        self.loaded = threading.Event()
        self.received = 0
        self.answers: Counter[int] = Counter()
        self.born = int(time.time())
        self.shelf = Shelf(engine, sources, most_loaded)
        self.ended: Callable[[], object] = lambda: None

    def start(self) -> None:
        """Begin to load, on threads of its own."""
        threading.Thread(target=self._watch, args=(self.shelf.fill(),), daemon=True).start()

    def _watch(self, first: Sequence[Future[Pipeline]]) -> None:
        for each in first:
            if error := each.exception():
                self.trouble = str(error.__cause__)
                self.ended()
                return
        self.loaded.set()
        self.engine.join()
        if not self.draining:
            self.trouble = "the engine has ended: its device was lost"
            self.ended()

    def drain(self) -> None:
        """Take no more requests; those that are here have ``GRACE`` seconds."""
        self.draining = True
        threading.Thread(target=self.engine.close, args=(GRACE,), daemon=True).start()

    @property
    def ready(self) -> bool:
        return self.loaded.is_set() and not self.draining and self.engine.alive

    def check(self) -> None:
        """Raise the answer why nothing can be served now."""
        if self.draining:
            raise Refused(503, "the server is shutting down", code="draining")
        if not self.engine.alive:
            raise Refused(503, "the engine has ended", code="broken")
        if not self.loaded.is_set():
            message = "the model could not be loaded" if self.trouble else "the model is loading"
            raise Refused(503, message, code="loading", wait=1)

    def name(self, name: str | None) -> str:
        """Of a model that there is; the first, if none is named."""
        self.check()
        if name and name not in self.shelf.sources:
            there = ", ".join(self.shelf.sources)
            raise Refused(404, f"there is no such model; there are {there}", "model", "model_not_found")
        return name or next(iter(self.shelf.sources))

    def pipeline(self, name: str | None) -> tuple[str, Pipeline]:
        """The model of that name where all are loaded and stay so."""
        name = self.name(name)
        return name, self.shelf.known[name]

    @asynccontextmanager
    async def model(self, name: str | None, left: float) -> AsyncIterator[tuple[str, Pipeline]]:
        """The model of that name, waited for at most ``left`` seconds; it stays loaded within."""
        name = self.name(name)
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(left):
                    pipeline = await stack.enter_async_context(self.shelf.use(name))
            except Unloadable as error:
                raise Refused(503, str(error), "model", code="unloadable") from error
            except TimeoutError:
                raise Refused(504, "the model was not loaded in time", "model", code="timeout") from None
            yield name, pipeline

    def admit(self) -> None:
        """Refuse what would have to wait too long, before anything is read or computed for it."""
        self.check()
        with self._busy():
            self.engine.admit()

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        try:
            yield
        except Busy as busy:
            self.check()
            raise Refused(429, f"busy: {busy}", code="queue_full", wait=busy.seconds) from None

    def submit(self, asked: Asked) -> list[Job]:
        """Queue a request, in parts that fit into a network call; all of it or nothing."""
        try:
            with self._busy():
                return self.engine.submit_parts(asked)
        except UndiffuseError as error:
            raise Refused(400, str(error), code="invalid_value") from None

    def metrics(self) -> str:
        """Prometheus text."""
        lines = []

        def metric(name: str, kind: str, help: str, *values: tuple[str, float]) -> None:
            lines.extend([f"# HELP undiffuse_{name} {help}", f"# TYPE undiffuse_{name} {kind}"])
            lines.extend(f"undiffuse_{name}{labels} {value:.10g}" for labels, value in values)

        answers = sorted(self.answers.items())
        metric("responses_total", "counter", "HTTP answers by status", *((f'{{status="{s}"}}', n) for s, n in answers))
        metric("requests_total", "counter", "HTTP requests, answered or not yet", ("", self.received))
        metric("models_loaded", "gauge", "models in memory", ("", len(self.shelf.known)))
        c, jobs = self.engine.counters, [*self.engine.jobs]
        ends = ("finished", "failed", "cancelled", "late")
        metric("jobs_received_total", "counter", "jobs (parts of requests) given to the engine", ("", c.received))
        counts = [(f'{{end="{end}"}}', getattr(c, end)) for end in ends]
        metric("jobs_total", "counter", "jobs by how they ended", *counts)
        metric("rejected_total", "counter", "requests that found the queue full", ("", c.rejected))
        metric("jobs_waiting", "gauge", "jobs not begun", ("", sum(job.steps is None for job in jobs)))
        metric("jobs_running", "gauge", "jobs begun", ("", sum(job.steps is not None for job in jobs)))
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
        if scope["http_version"] not in ("1.0", "1.1"):
            return Refused(400, "this server speaks HTTP/1.1", code="bad_version")
        if "content-length" in headers and "transfer-encoding" in headers:
            # Two servers in a row could disagree on where such a request ends.
            return Refused(400, "Content-Length and Transfer-Encoding exclude each other", code="bad_framing")
        host = headers.get("host", [])
        if len(host) != 1:
            return Refused(400, "exactly one Host header is needed", code="bad_host")
        if self.hosts and host[0].lower() not in self.hosts:
            # A page of another site can point its own name at this machine; it cannot forge the Host header.
            return Refused(403, "this server does not go by that name", code="bad_host")
        for origin in headers.get("origin", []):
            if self.hosts and origin.lower() not in {f"http://{name}" for name in self.hosts}:
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
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        service, limits = self.service, self.service.limits
        service.received += 1
        scope["begun"] = begun = time.monotonic()
        arrived, complete, status = 0, False, 499  # unless it is answered, the client has left

        async def counted() -> Message:
            nonlocal arrived, complete
            if complete:  # what comes now is the client leaving
                return await receive()
            try:
                async with asyncio.timeout(limits.upload_seconds - (time.monotonic() - begun)):
                    message = await receive()
            except TimeoutError:
                raise Refused(408, "the body did not arrive in time", code="timeout") from None
            arrived += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if arrived > most:
                raise too_large
            return message

        async def drain() -> None:
            """A client that is still sending would see a broken connection and not the answer: let it finish, within
            bounds."""
            nonlocal arrived, complete
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(3):
                    while not complete and arrived < 2 * limits.body:
                        message = await receive()
                        arrived += len(message.get("body", b""))
                        complete = not message.get("more_body", False)

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if status != 408:
                    await drain()
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
                if refused is not None or not complete:  # what follows on this connection is not to be trusted
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        headers = dict(scope["headers"])
        kind = media_type(headers.get(b"content-type", b"").decode("latin-1"))
        most = limits.json if kind == "application/json" else limits.body
        too_large = Refused(413, f"the body is larger than {most:,} bytes", code="too_large")
        length = headers.get(b"content-length", b"0")
        refused = self.door.refuse(scope)
        if refused is None and length.isdigit() and int(length) > most:
            refused = too_large
        complete = length == b"0" and b"transfer-encoding" not in headers
        try:
            await (self.app if refused is None else answer(refused))(scope, counted, noted)
        except ClientDisconnect:
            pass
        except Exception:
            number = secrets.token_hex(4)
            logging.getLogger("uvicorn.error").exception("error %s, while answering %s", number, scope["path"])
            if status == 499:
                message = f"something went wrong inside; the server's log says what, at error {number}"
                await answer(Refused(500, message, code="internal"))(scope, receive, noted)
        finally:
            service.answers[status] += 1


def media_type(header: str) -> str:
    """What a Content-Type says, without its parameters."""
    return header.partition(";")[0].strip().lower()


def names_of(host: str, port: int) -> frozenset[str]:
    """The names under which a server on this machine may be addressed."""
    hosts = {"127.0.0.1", "localhost", "[::1]", f"[{host}]" if ":" in host else host}
    return frozenset(f"{name}:{port}" for name in hosts) | (frozenset(hosts) if port == 80 else frozenset())


def answer(refused: Refused) -> Response:
    headers = {}
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if refused.wait is not None:
        headers["Retry-After"] = str(max(1, math.ceil(refused.wait)))
    return JSONResponse(refused.body, refused.status, headers)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    fields = {name: {"type": ["string", "null"]} for name in ("message", "type", "param", "code")}
    error = {"type": "object", "properties": fields, "required": list(fields)}
    schema = {"type": "object", "properties": {"error": error}, "required": ["error"]}
    content = {"application/json": {"schema": schema}}
    return {status: {"description": "an error that says what", "content": content} for status in (*statuses, 401, 403)}


def _gives(*kinds: str) -> dict[str, Any]:
    """What a route answers, for the schema."""
    fine = {200: {"description": "what was asked for", "content": {kind: {} for kind in kinds}}}
    errors = _errors(400, 404, 408, 413, 415, 422, 429, 500, 503, 504)
    return {"response_class": Response, "responses": {**fine, **errors}}


# --- The routes -------------------------------------------------------------------------------------------------------


def create_app(service: Service, door: Door) -> FastAPI:
    """The ASGI application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.draining = True
        await asyncio.to_thread(service.engine.close, GRACE)

    app = FastAPI(
        title="undiffuse",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.add_middleware(Guard, service=service, door=door)

    named = Path(json_schema_extra={"enum": [*service.shelf.sources]})

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return answer(error)

    @app.exception_handler(HTTPException)
    async def refused_by_others(request: Request, error: HTTPException) -> Response:
        said = {
            404: ("there is no such page", "not_found"),
            405: ("this page does not take that method", "method_not_allowed"),
        }
        message, code = said.get(error.status_code, (error.detail, "invalid_form"))
        response = answer(Refused(error.status_code, message, code=code))
        response.headers.update(error.headers or {})
        return response

    @app.get("/v2/health/live", responses=_errors(503))
    async def live() -> dict[str, str]:
        """The process answers and its engine works."""
        if not (service.engine.alive or service.draining):
            service.check()
        return {"status": "live"}

    @app.get("/v2/health/ready", responses=_errors(503))
    async def ready() -> dict[str, str]:
        """Models are loaded and requests are taken."""
        service.check()
        return {"status": "ready"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        """Counters for Prometheus."""
        return service.metrics()

    @app.get("/v1/models", responses=_errors(503))
    async def models() -> dict[str, Any]:
        """The models that can be asked."""
        service.check()
        return {"object": "list", "data": [_model(service, name) for name in service.shelf.sources]}

    @app.get("/v1/models/{name}", responses=_errors(404, 503))
    async def model(name: str = named) -> dict[str, Any]:
        """One of them."""
        return _model(service, service.name(name))

    @app.post(
        "/v1/images/generations", **_takes(api.Generation, service), **_gives("application/json", "text/event-stream")
    )
    async def generations(request: Request) -> Response:
        """Pictures from noise."""
        service.admit()
        form = api.read_json(await _json(request), api.Generation)
        async with service.model(form.model, _left(service, request)) as (name, pipeline):
            return await _pictures(service, request, form, name, pipeline, "image_generation")

    @app.post("/v1/images/edits", **_uploads(api.Edit, service), **_gives("application/json", "text/event-stream"))
    async def edits(request: Request) -> Response:
        """Image-to-image, and inpainting with a mask."""
        service.admit()
        fields, files = await _form(request)
        form = api.checked(api.Edit, fields, strict=False)
        async with service.model(form.model, _left(service, request)) as (name, pipeline):
            api.check_size(form, pipeline.spec)
            if "image" not in files:
                raise Refused(400, "image is missing", "image", "missing")
            begin = await asyncio.to_thread(api.read_edit, form, files, pipeline, service.limits)
            return await _pictures(service, request, form, name, pipeline, "image_edit", begin)

    @app.post("/v1/samples", **_takes(api.Samples, service), **_gives("application/octet-stream", "audio/wav"))
    async def samples(request: Request) -> Response:
        """Samples in the data's own units: a NumPy file, or sound."""
        service.admit()
        form = api.read_json(await _json(request), api.Samples)
        async with service.model(form.model, _left(service, request)) as (name, pipeline):
            kind = api.check_format(form, pipeline.spec)
            count = api.samples_of(form, service.limits)
            asked = await _asked(service, request, form, form.prompt, name, pipeline, count)
            x = await _results(service, request, service.submit(asked))
            data, media = await asyncio.to_thread(api.as_file, pipeline.spec, x, kind)
            return Response(data, media_type=media, headers={"X-Seed": str(asked.seed)})

    @app.post("/models/{name}", **_takes(api.TextToImage, service), **_gives("image/png"))
    async def text_to_image(request: Request, name: str = named) -> Response:
        """Hugging Face's form: one picture."""
        service.admit()
        form = api.read_json(await _json(request), api.TextToImage)
        how = form.parameters or api.Parameters()
        async with service.model(name, _left(service, request)) as (name, pipeline):
            if how.scheduler is not None:
                how = how.model_copy(update={"solver": how.scheduler})
            height, width = pipeline.spec.shape[1:] if pipeline.spec.has_pictures else (0, 0)
            size = f"{how.width or width}x{how.height or height}"
            api.check_size(api.Generation(size=size), pipeline.spec)
            asked = await _asked(service, request, how, form.inputs, name, pipeline, 1)
            x = await _results(service, request, service.submit(asked))
            picture = pipeline.spec.to_images(x[0])[0]
            data = api.encode(picture, "png", None)
            return Response(data, media_type="image/png", headers={"X-Seed": str(asked.seed)})

    return app


class Patient(H11Protocol):
    """uvicorn's protocol, but a client that has begun a request has so many seconds to send its headers."""

    seconds = 10.0
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio leaves Nagle's algorithm on where a socket was made without naming its protocol, as uvicorn's is: the
        # body of an answer would then wait 40 ms for the client to acknowledge its head.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._late = self.loop.call_later(self.seconds, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._forget()
        elif self._late is None and not self.transport.is_closing():
            self._late = self.loop.call_later(self.seconds, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class Server(uvicorn.Server):
    """uvicorn's server, which tells the service when it is asked to end; asked twice, it ends at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit |= self.should_exit
        self.service.drain()
        super().handle_exit(sig, frame)


def server_of(
    service: Service, host: str, port: int, key: str | None, more: APIRouter | None = None
) -> tuple[Server, socket.socket]:
    """A server with our bounds and ``more`` routes, and the socket on which it will listen:
    ``server.run(sockets=[socket])``. Raises :class:`UndiffuseError` for a port that cannot be listened on."""
    config = uvicorn.Config(
        app=lambda scope: None,  # replaced below, when the port is known
        host=host,
        port=port,
        http=Patient,
        ws="none",
        log_level="warning",
        timeout_graceful_shutdown=round(GRACE) + 1,
        timeout_keep_alive=10,
        limit_concurrency=2000,
        server_header=False,
        h11_max_incomplete_event_size=65536,
    )
    try:
        listening = config.bind_socket()
    except SystemExit:
        raise UndiffuseError(f"--port {port}: cannot be listened on; is something else there? Take another") from None
    local = host in LOCAL
    app = create_app(service, Door(names_of(host, listening.getsockname()[1]) if local else frozenset(), key))
    if more is not None:
        app.include_router(more)
    config.app = app
    server = Server(config, service)
    service.ended = lambda: setattr(server, "should_exit", True)
    return server, listening


def _takes(form: type[BaseModel], service: Service) -> dict[str, Any]:
    """How a JSON body, read by :func:`api.read_json`, is described in the schema."""
    return {"openapi_extra": {"requestBody": _body("application/json", form.model_json_schema(), service)}}


def _uploads(form: type[BaseModel], service: Service) -> dict[str, Any]:
    schema = form.model_json_schema()
    for field in schema["properties"].values():  # the fields of a form are text, which is there or not, but never null
        field["anyOf"] = [each for each in field.get("anyOf", []) if each.get("type") != "null"] or [field.copy()]
    for name in ("image", "mask"):
        schema["properties"][name] = {"type": "string", "format": "binary"}
    schema["required"] = ["image"]
    return {"openapi_extra": {"requestBody": _body("multipart/form-data", schema, service)}}


def _body(kind: str, schema: dict[str, Any], service: Service) -> dict[str, Any]:
    definitions = schema.pop("$defs", {})
    text = json.dumps(schema)
    for name, definition in definitions.items():  # written out: a reference would point outside the operation
        text = text.replace(json.dumps({"$ref": f"#/$defs/{name}"}), json.dumps(definition))
    return {"required": True, "content": {kind: {"schema": _told(json.loads(text), service)}}}


def _told(schema: dict[str, Any], service: Service) -> dict[str, Any]:
    """A form's schema with what this server knows of its fields: limits, and names that there are."""
    solvers = [name for name, solver in SOLVERS.items() if not solver.adaptive]
    known: dict[str, dict[str, Any]] = {
        "n": {"maximum": service.limits.samples},
        "num_inference_steps": {"maximum": service.limits.steps},
        "model": {"enum": [*service.shelf.sources]},
        "solver": {"enum": solvers},
        "scheduler": {"enum": solvers},
        "grid": {"enum": [*GRIDS]},
    }
    for name, field in schema.get("properties", {}).items():
        for kind in field.get("anyOf", [field]):
            if kind.get("type") != "null":
                kind.update(known.get(name, {}))
            _told(kind, service)
    return schema


def _model(service: Service, name: str) -> dict[str, Any]:
    """OpenAI's four fields, and of a model that is loaded what a client needs to ask well."""
    common = {"id": name, "object": "model", "created": service.born, "owned_by": "undiffuse"}
    pipeline = service.shelf.known.get(name)
    if pipeline is None:
        return {**common, "loaded": False}
    spec = pipeline.spec
    return {
        **common,
        "loaded": True,
        "data": {"kind": spec.kind, "shape": list(spec.original_shape), "dtype": spec.dtype, "classes": spec.classes},
        "size": "x".join(map(str, reversed(spec.shape[1:]))) if spec.has_pictures else None,
        "conditions": api.askable(pipeline),
    }


async def _json(request: Request) -> bytes:
    if media_type(request.headers.get("content-type", "")) != "application/json":
        # A page of another site may send forms and text without asking first, but not this.
        raise Refused(415, "the Content-Type must be application/json", code="bad_content_type")
    return await request.body()


async def _form(request: Request) -> tuple[dict[str, str | list[str]], dict[str, bytes]]:
    """The fields and the files of a multipart body; each once."""
    if media_type(request.headers.get("content-type", "")) != "multipart/form-data":
        raise Refused(415, "the Content-Type must be multipart/form-data", code="bad_content_type")
    fields: dict[str, str | list[str]] = {}
    files: dict[str, bytes] = {}
    try:
        async with request.form(max_files=4, max_fields=50) as form:
            for key, value in form.multi_items():
                name = key.removesuffix("[]")
                if name.startswith(("cond[", "against[")):  # such fields lose nulls, and what of a list is a row
                    said = name.partition("[")[0]
                    raise Refused(400, f"in a form, {said} is JSON text: json.dumps it", said, "invalid_form")
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
    except UnicodeError:
        raise Refused(400, "the form holds text that is not Unicode", code="invalid_form") from None
    return fields, files


def _left(service: Service, request: Request) -> float:
    """Seconds until the request's deadline."""
    return service.limits.seconds - (time.monotonic() - request.scope["begun"])


async def _asked(
    service: Service,
    request: Request,
    form: api.How,
    prompt: str,
    name: str,
    pipeline: Pipeline,
    count: int,
    begin: api.Beginning = api.Beginning(),
    **more: Any,
) -> Asked:
    sampling = api.sampling_of(form, pipeline, service.limits)
    shown = begin.shown if form.beside is None else await asyncio.to_thread(api.read_beside, form, pipeline)
    return Asked(
        name,
        sampling,
        samples=range(count),
        seed=api.seed_of(form),
        **api.asked_of(form, prompt, pipeline, sampling, shown),
        image=begin.image,
        keep=begin.keep,
        strength=begin.strength,
        seconds=_left(service, request),
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
    except UndiffuseError as error:  # not finite, with these settings
        raise Refused(422, str(error), code="sampling_failed") from None
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
    begin: api.Beginning = api.Beginning(),
) -> Response:
    api.check_size(form, pipeline.spec)
    count = api.samples_of(form, service.limits)
    output = form.output_format or "png"
    spec = pipeline.spec
    size = "x".join(map(str, reversed(spec.shape[1:])))

    def encoded(x: Tensor) -> str:
        return api.text_of(api.encode(spec.to_images(x)[0], output, form.output_compression))

    def partial(z: Tensor) -> str:
        return encoded(pipeline.decode(z).cpu())

    if not form.stream:
        if form.partial_images:
            raise Refused(400, "partial_images needs stream=true", "partial_images", "invalid_value")
        asked = await _asked(service, request, form, form.prompt, name, pipeline, count, begin)
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
    sampling = api.sampling_of(form, pipeline, service.limits)
    levels = sampling.grid.levels(pipeline.config.schedule, sampling.steps)
    last = len(levels if begin.strength == 1 else below(levels, begin.strength)) - 1
    wanted = form.partial_images or 0
    shown = {round((i + 1) * last / (wanted + 1)) for i in range(wanted)} - {0, last}

    def watch(frame: Frame) -> None:
        if frame.index in shown:
            loop.call_soon_threadsafe(frames.put_nowait, frame)

    asked = await _asked(service, request, form, form.prompt, name, pipeline, 1, begin, watch=watch)
    (job,) = service.submit(asked)
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
                if frame.estimate is not None:
                    picture = await asyncio.to_thread(partial, frame.estimate.x0)
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
