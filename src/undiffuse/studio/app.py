"""The studio's routes: one static page and what its labs ask for.

The page may be read by whoever reaches the server; every answer that holds data needs the cookie, which is given for
the token that ``undiffuse studio`` prints (in the link's fragment, which browsers do not send, so no log ever has it).
Arrays travel as one binary message (:func:`pack`). Requests name models, runs and pictures by what the server listed:
nothing from a request reaches the file system.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, final

import numpy as np
import torch
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..commands import plain
from ..commands.solvers import measure
from ..commands.train import data_of
from ..data import DataSpec, open_dataset
from ..data.shown import write_shown
from ..errors import UndiffuseError, choose
from ..evaluation.samples import translated
from ..grids import GRIDS
from ..outputs import drawable, encode_animation, grid
from ..pipeline import Pipeline
from ..schedules import SCHEDULES
from ..serving import api
from ..serving.api import Refused
from ..serving.server import Service
from ..solvers import SOLVERS
from ..training.draws import told
from . import labs, plane
from .runs import Runs, previews

T = TypeVar("T")

PAGE = Path(__file__).parent / "page"
MODEL = Path(__file__).parent / "model"
"""The model that ships with the package."""
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",
}
CHAPTERS = frozenset(
    (
        "levels",
        "schedules",
        "predictions",
        "denoiser",
        "conditions",
        "guidance",
        "solvers",
        "sampling",
        "editing",
        "tuning",
        "objectives",
        "networks",
        "data",
        "pipeline",
        "training",
        "doctor",
        "text",
        "studio",
    )
)
TOGETHER = 2
"""Computations at a time."""
WAITING = 6
"""Requests that may wait for them; one more is told to come back."""
NUMBERS = 24_000_000
"""Numbers in one answer, at most."""
UPLOADS = 64
QUALITY: tuple[str, ...] = ("euler", "heun", "dpmpp_2m", "unipc_3", "ddpm")
"""Solvers that are measured unless others are asked for."""


# --- forms ------------------------------------------------------------------------------------------------------------


class Form(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


Given = dict[Annotated[str, Field(max_length=100)], Annotated[list[api.Row], Field(min_length=1, max_length=64)]]
"""Conditions by name, a row a sample in turn; of ``beside`` the numbers of pictures that the studio knows."""


class Ask(Form):
    """Samples of a model, and how; the names are those of the page's address."""

    model: str | None = Field(None, max_length=200)
    n: int = Field(8, ge=1, le=64)
    seed: int = Field(0, ge=0, lt=2**53)
    cond: Given = Field(default_factory=dict)
    against: Given = Field(default_factory=dict)
    solver: str | None = Field(None, max_length=100)
    grid: str | None = Field(None, max_length=100)
    steps: int | None = Field(None, ge=1, le=200)
    scale: float | None = Field(None, ge=-20, le=50)
    low: float = Field(0.0, ge=0)
    high: float | None = Field(None, gt=0)
    start: Literal["noise", "noised", "inverted"] = "noise"
    picture: int = Field(0, ge=0)
    t: float = Field(1.0, gt=0, le=1)


class Branch(Form):
    base: Ask
    index: int = Field(ge=0)
    then: Ask


class Strip(Form):
    base: Ask
    scales: list[float] = Field(min_length=1, max_length=12)
    judge: bool = False


class Words(Form):
    base: Ask
    number: int = Field(0, ge=0, lt=64)


class Side(Form):
    solver: str = Field(max_length=100)
    grid: str = Field(max_length=100)


class Compare(Form):
    base: Ask
    calls: int = Field(ge=1, le=200)
    a: Side
    b: Side


class Quality(Form):
    model: str | None = Field(None, max_length=200)
    grid: str = Field("flow_power", max_length=100)
    solvers: list[str] = Field(default_factory=lambda: list(QUALITY), min_length=1, max_length=20)
    calls: list[int] = Field(default_factory=lambda: [4, 6, 8, 12, 20], min_length=1, max_length=8)
    samples: int = Field(64, ge=16, le=128)


class GridForm(Form):
    schedule: str = Field(max_length=100)
    grid: str = Field(max_length=100)
    steps: int = Field(ge=1, le=200)


class WalkForm(Form):
    base: Ask
    corners: list[int] = Field(min_length=4, max_length=4)
    columns: int = Field(7, ge=2, le=12)
    rows: int = Field(7, ge=1, le=12)
    down: str = Field("noise", max_length=100, description="noise, or the condition whose values are walked through")
    values: list[api.Row] = Field(default_factory=list, max_length=12)


class Animation(Form):
    ask: Ask
    format: Literal["gif", "webp"]


class Picture(Form):
    model: str | None = Field(None, max_length=200)
    data: str = Field(max_length=20_000_000, description="a picture file in base64")


class Beside(Form):
    model: str | None = Field(None, max_length=200)
    number: int = Field(0, ge=0)


class Plane(Form):
    """A distribution in the plane: a name, or points that somebody drew."""

    name: str | None = Field(None, max_length=50)
    points: list[list[float]] | None = Field(None, max_length=plane.MOST)
    schedule: str = Field("flow", max_length=100)
    solver: str = Field("euler", max_length=100)
    steps: int = Field(24, ge=1, le=60)
    seed: int = Field(0, ge=0, lt=2**53)


class Train(Form):
    plane: Plane
    updates: int = Field(1500, ge=50, le=10_000)


class Enter(Form):
    token: str = Field(max_length=200)


# --- messages ---------------------------------------------------------------------------------------------------------


def pack(meta: Mapping[str, Any], arrays: Mapping[str, Tensor | np.ndarray]) -> Response:
    """One binary message: the length of a JSON header (uint32, little-endian), the header, and the arrays one after
    another, each at a multiple of 8 bytes. The header's ``arrays`` says ``{name: {type, shape, at}}``, where ``at``
    counts from the end of the header."""
    parts: list[bytes] = []
    described: dict[str, Any] = {}
    at = 0
    for name, values in arrays.items():
        array = np.ascontiguousarray(values.detach().cpu().numpy() if isinstance(values, Tensor) else values)
        if array.dtype != np.uint8:
            array = array.astype("<f4")
        raw = array.tobytes()
        described[name] = {"type": "uint8" if array.dtype == np.uint8 else "float32", "shape": array.shape, "at": at}
        padded = raw + b"\0" * (-len(raw) % 8)
        parts.append(padded)
        at += len(padded)
    head = json.dumps({**plain(dict(meta)), "arrays": described}, allow_nan=False).encode()
    head += b" " * (-(len(head) + 4) % 8)
    body = b"".join([len(head).to_bytes(4, "little"), head, *parts])
    return Response(body, media_type="application/octet-stream", headers={"Cache-Control": "no-store"})


def shown(pipeline: Pipeline, trace: labs.Trace, forward: Tensor | None = None, **more: Any) -> Response:
    """A trajectory as data. In latents the noise too is shown through the decoder."""
    levels = trace.levels
    meta = {
        "t": [float(level.t) for level in levels],
        "alpha": [float(level.alpha) for level in levels],
        "sigma": [float(level.sigma) for level in levels],
        "calls": trace.calls,
        **more,
    }
    arrays = {"x": trace.x, "x0": trace.x0, "eps": trace.eps, **({} if forward is None else {"forward": forward})}
    return pack(meta, {name: labs.seen(pipeline, x) for name, x in arrays.items()})


# --- the studio -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Pictures:
    """Real data of a model, to begin from: what ships or was trained on, then what was uploaded."""

    x: Tensor  # [P, *shape], model units
    labels: list[int | None]
    shown: Tensor  # [K, *beside.shape], of a model that is shown pictures beside; NaN where nothing is known


@final
class Studio:
    """What the routes share.

    Args:
        service: of the server that the routes are added to; it has the models.
        folders: where each model is.
        runs: what the page may look at.
        token: what the first request must show.
    """

    def __init__(self, service: Service, folders: Mapping[str, Path], runs: Runs, token: str | None = None) -> None:
        self.service, self.folders, self.runs = service, dict(folders), runs
        self.token = token or secrets.token_urlsafe(24)
        self.cookie = secrets.token_urlsafe(24)
        self.session: plane.Session | None = None
        self._pictures: dict[str, Pictures] = {}
        self._lock = threading.Lock()
        self._turns = asyncio.Semaphore(TOGETHER)
        self._waiting = 0

    # --- who may ask ---

    def name(self, request: Request) -> str:
        """The cookie's name; cookies do not know ports, so it holds the port."""
        return f"undiffuse_studio_{request.url.port or 80}"

    def admit(self, request: Request) -> None:
        given = request.cookies.get(self.name(request), "")
        if not hmac.compare_digest(given.encode("utf-8", "replace"), self.cookie.encode()):
            raise Refused(401, "open the link that undiffuse studio printed", code="no_cookie")

    # --- turns ---

    async def compute(self, request: Request, work: Callable[[labs.Check], T]) -> T:
        """Run ``work`` on a thread when it is its turn; it is told when the page no longer waits."""
        if self._waiting >= WAITING:
            raise Refused(429, "busy with other requests of this page", code="queue_full", wait=1)
        gone = threading.Event()

        def check() -> None:
            if gone.is_set():
                raise Refused(499, "the page has left", code="cancelled")

        def run() -> T:
            check()
            return work(check)

        self._waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self._waiting -= 1
        try:
            task = asyncio.ensure_future(asyncio.to_thread(run))
            while not task.done():
                await asyncio.wait({task}, timeout=0.1)
                if not task.done() and await request.is_disconnected():
                    gone.set()
            return task.result()
        except UndiffuseError as error:
            raise Refused(400, str(error), code="invalid_value") from None
        finally:
            gone.set()
            self._turns.release()

    # --- models ---

    def model(self, name: str | None) -> tuple[str, Pipeline]:
        return self.service.pipeline(name)

    def ask(self, form: Ask, **more: Any) -> tuple[str, Pipeline, labs.Ask]:
        """The model and what is asked of it. Raises for what it cannot do."""
        name, pipeline = self.model(form.model)
        changes: dict[str, Any] = {
            key: value
            for key, value in (("solver", form.solver), ("grid", form.grid), ("steps", form.steps))
            if value is not None
        }
        if form.scale is not None:
            changes["guidance_scale"] = form.scale
        if form.low > 0 or form.high is not None:
            changes["guidance_interval"] = (form.low, 1e9 if form.high is None else form.high)
        sampling = pipeline.settings(**changes, **more)
        numbers = range(form.n)
        size = form.n * (sampling.steps + 1) * int(np.prod(pipeline.spec.shape)) * 3
        if size > NUMBERS:
            raise UndiffuseError(f"{size:,} numbers are too many for the page: take fewer samples or steps")
        conditions = pipeline.denoiser.conditions
        for text_name, part in conditions.written.items() if conditions is not None else ():
            for text in (*form.cond.get(text_name, ()), *form.against.get(text_name, ())):
                part.check_length(text if isinstance(text, str) else "", sampling.reading)
        cond, against = (self.rows(name, pipeline, given) for given in (form.cond, form.against))
        ask = labs.Ask(sampling, numbers, form.seed, cond, against)
        pipeline.conditions(numbers, None, cond=ask.cond)
        pipeline.against(1, cond=ask.against)
        return name, pipeline, ask

    def rows(self, name: str, pipeline: Pipeline, given: Given) -> dict[str, Any]:
        """Conditions by name, the pictures beside by their numbers."""
        if "beside" not in given or pipeline.beside is None:
            return dict(given)
        known = self.pictures(name, pipeline).shown
        rows = [
            torch.full_like(known[0], torch.nan) if k is None else known[k]
            for k in self.numbers(known, given["beside"])
        ]
        return {**given, "beside": torch.stack(rows)}

    @staticmethod
    def numbers(known: Tensor, asked: Sequence[Any]) -> list[int | None]:
        """``asked``, or an error for one of which there is no picture."""
        for number in asked:
            if number is not None and (not isinstance(number, int) or not 0 <= number < len(known)):
                raise UndiffuseError(f"there is no picture {number!r} to be shown: open one")
        return [*asked]

    def labels(self, pipeline: Pipeline, ask: labs.Ask) -> list[int | None]:
        """The class of each sample."""
        classes = pipeline.conditions(ask.numbers, None, cond=ask.cond).get("classes")
        if classes is None:
            return [None for _ in ask.numbers]
        none = int(pipeline.denoiser.null(1)["classes"])
        return [None if label == none else label for label in classes.tolist()]

    def trace(self, form: Ask, check: labs.Check) -> tuple[labs.Trace, dict[str, Any]]:
        """The trajectory that a form asks for, and what else to say of it."""
        name, pipeline, ask = self.ask(form)
        said: dict[str, Any] = {"model": name}
        x0: Tensor | None = None
        if form.start == "noise":
            walk = labs.begin(pipeline, ask)
        else:
            # Inverted are n pictures, each with its own noise; noised is one, with the noise of each sample.
            x0, labels = self.chosen(name, pipeline, form.picture, form.n if form.start == "inverted" else 1)
            if "classes" not in form.cond and any(label is not None for label in labels):
                ask = replace(ask, cond={**(ask.cond or {}), "classes": labels})
            if form.start == "inverted":
                x0 = pipeline.encode(x0.to(pipeline.device))
                walk, calls = labs.inverted(pipeline, ask, x0, check)
                said["inversion_calls"] = calls
            else:
                walk = labs.begin(pipeline, ask, x0, form.t)
        (trace,) = labs.run(pipeline, [walk], check)
        if form.start == "inverted" and x0 is not None:
            said["round_trip"] = float((trace.x[-1] - x0.cpu()).square().mean().sqrt())
        said["labels"] = self.labels(pipeline, ask)
        return trace, said

    def forward(self, name: str, pipeline: Pipeline, form: Ask, trace: labs.Trace) -> Tensor | None:
        """``[F, B, *shape]``: a real picture with the noise of each sample at each level of a trajectory. None where
        the page makes it by itself: it has the data and the noise, but no encoder."""
        if pipeline.codec is None or not len(self.pictures(name, pipeline).x):
            return None
        x0 = pipeline.encode(self.chosen(name, pipeline, form.picture, 1)[0].to(pipeline.device)).cpu()
        eps = trace.x[0] / float(torch.hypot(trace.levels[0].alpha, trace.levels[0].sigma))
        return torch.stack([level.mix(x0.expand_as(eps), eps) for level in trace.levels])

    def branch(self, form: Branch, check: labs.Check) -> labs.Trace:
        base, said = self.trace(form.base, check)
        _, pipeline, ask = self.ask(form.then)
        if form.base.model != form.then.model or form.base.n != form.then.n:
            raise UndiffuseError("a branch has the model and the number of samples of what it leaves")
        if "classes" not in form.then.cond and any(label is not None for label in said["labels"]):
            ask = replace(ask, cond={**(ask.cond or {}), "classes": said["labels"]})
        return labs.branch(pipeline, base, form.index, ask, form.then.seed != form.base.seed, check)

    # --- pictures ---

    def pictures(self, name: str, pipeline: Pipeline) -> Pictures:
        with self._lock:
            if name not in self._pictures:
                self._pictures[name] = examples(self.folders[name], pipeline)
            return self._pictures[name]

    def chosen(self, name: str, pipeline: Pipeline, first: int, count: int) -> tuple[Tensor, list[int | None]]:
        """``count`` pictures from number ``first`` on, and their classes where the model knows classes."""
        pictures = self.pictures(name, pipeline)
        if not len(pictures.x):
            raise UndiffuseError("there is no picture to begin from: add one")
        places = [(first + i) % len(pictures.x) for i in range(count)]
        asked = "classes" in pipeline.denoiser.null(1)
        return pictures.x[places], [pictures.labels[i] if asked else None for i in places]

    def add(self, form: Picture, limits: api.Limits) -> int:
        name, pipeline = self.model(form.model)
        if not pipeline.spec.has_pictures:
            raise UndiffuseError("this model's data are no pictures")
        (data,) = api.decoded("data", [form.data])
        x = api.read_picture(data, pipeline.spec, limits)
        pictures = self.pictures(name, pipeline)
        with self._lock:
            if len(pictures.x) >= UPLOADS:
                raise UndiffuseError(f"{UPLOADS} pictures are enough: start the studio again")
            pictures.x, pictures.labels = torch.cat([pictures.x, x]), [*pictures.labels, None]
            return len(pictures.x) - 1

    def show(self, form: Picture) -> int:
        """Take a picture, or a ``.npy``, to be shown beside."""
        name, pipeline = self.model(form.model)
        (data,) = api.decoded("data", [form.data])
        shown, pictures = api.shown_of("data", [data], pipeline), self.pictures(name, pipeline)
        with self._lock:
            if len(pictures.shown) + len(shown) > UPLOADS:
                raise UndiffuseError(f"{UPLOADS} pictures are enough: start the studio again")
            pictures.shown = torch.cat([pictures.shown, shown])
            return len(pictures.shown) - len(shown)

    # --- the plane ---

    def view(self, form: Plane) -> plane.View:
        solver = choose("solver", form.solver, SOLVERS)
        if solver.adaptive or solver.distilled:
            raise UndiffuseError(f"{form.solver} is not for a fixed number of steps of this model; take another")
        schedule = choose("schedule", form.schedule, SCHEDULES)
        if form.points is not None:
            if any(len(point) != 2 for point in form.points):
                raise UndiffuseError("points have two coordinates")
            cloud = plane.cloud_of(np.array(form.points, np.float64).reshape(-1, 2))
        else:
            cloud = choose("distribution", form.name or "moons", plane.CLOUDS)()
        return plane.View(cloud, schedule, solver, form.steps, form.seed)

    def train(self, form: Train) -> None:
        view = self.view(form.plane)
        with self._lock:
            if self.session is not None:
                self.session.stop()
            self.session = plane.Session(view, form.updates)

    def close(self) -> None:
        if self.session is not None:
            self.session.stop()


def examples(folder: Path, pipeline: Pipeline) -> Pictures:
    """Some real data of a model, and the pictures of them that it is shown: the ``examples.npz`` beside it, or the
    first of each class of the data that its run, or the model, names; none where these cannot be opened."""
    spec = pipeline.spec
    none = torch.zeros(0, *spec.shape if pipeline.beside is None else pipeline.beside.shape)
    file = folder / "examples.npz"
    try:
        if file.is_file():
            with np.load(file, allow_pickle=False) as both:
                return Pictures(spec.to_model(both["values"]), [int(label) for label in both["labels"]], none)
        try:
            data = data_of(folder.parent)
        except UndiffuseError:
            data = open_dataset(str(pipeline.info["data"]))
        items = translated(pipeline, data, 500)
        values, labels = items.read(np.arange(len(items)))
        places = list(range(min(len(values), 10)))
        if labels is not None:
            places = list(np.unique(labels, return_index=True)[1][:20])
        chosen = [None if labels is None or not spec.classes else int(labels[i]) for i in places]
        shown, beside = none, pipeline.beside
        if beside is not None:
            x = told(pipeline.denoiser.conditions, items, places)[1]["beside"]
            in_units = beside.to_model(beside.to_data(x.nan_to_num()))  # as a file holds it
            shown = in_units.masked_fill(x.isnan(), torch.nan)
        return Pictures(spec.to_model(values[places]), chosen, shown)
    except (UndiffuseError, OSError, KeyError, ValueError):
        return Pictures(torch.zeros(0, *spec.shape), [], none)


def thumbnails(spec: DataSpec, x: Tensor) -> np.ndarray:
    """Pictures that a model is shown, uint8 ``[K, H, W, 4]``: transparent where nothing is known."""
    seen = [np.broadcast_to(each[..., None] if each.ndim == 2 else each, (*each.shape[:2], 3))
            for each in spec.to_images(x.nan_to_num())]  # fmt: skip
    known = np.where(x.isnan().any(1).numpy(), 0, 255).astype(np.uint8)
    return (
        np.concatenate([np.stack(seen), known[..., None]], -1) if seen else np.zeros((0, *spec.shape[1:], 4), np.uint8)
    )


def described(studio: Studio) -> dict[str, Any]:
    """What the page builds its controls from: models, and the registries."""

    def name_of(value: object, registry: Mapping[str, Any]) -> str | None:
        return next((name for name, each in registry.items() if each == value), None)

    models = []
    for name in studio.folders:
        pipeline = studio.service.pipeline(name)[1]
        spec, usual = pipeline.spec, pipeline.sampling
        dense = pipeline.config.schedule(torch.linspace(0, 1, 257, dtype=torch.float64))
        models.append(
            {
                "name": name,
                "path": str(studio.folders[name]),
                "kind": spec.kind,
                "shape": spec.shape,
                "bounded": spec.bounded,
                "classes": spec.classes if "classes" in pipeline.denoiser.null(1) else (),
                "conditions": api.askable(pipeline),
                "latent": pipeline.codec is not None,
                "schedule": name_of(pipeline.config.schedule, SCHEDULES),
                # No name where it has none, or where it depends on the number of steps.
                "solver": None if pipeline.tuned else name_of(usual.solver, SOLVERS),
                "grid": None if pipeline.tuned else name_of(usual.grid, GRIDS),
                "steps": usual.steps,
                "scale": usual.guidance_scale,
                "interval": usual.guidance_interval,
                "alpha": dense.alpha.tolist(),
                "sigma": dense.sigma.tolist(),
                "info": {key: value for key, value in pipeline.info.items() if isinstance(value, (str, int, float))},
            }
        )
    solvers = [
        {
            "name": name,
            "order": solver.order,
            "calls": solver.calls,
            "extra": solver.extra,
            "stochastic": solver.stochastic,
            "fixed": not (solver.adaptive or solver.distilled),
        }
        for name, solver in SOLVERS.items()
    ]
    return {
        "models": models,
        "solvers": solvers,
        "grids": list(GRIDS),
        "schedules": list(SCHEDULES),
        "clouds": list(plane.CLOUDS),
        "quality_solvers": list(QUALITY),
    }


def chapter(name: str) -> str | None:
    """The text of a page of the documentation, of this checkout or of the installed package."""
    for folder in (Path(__file__).parents[3] / "docs", Path(__file__).parents[1] / "docs"):
        file = folder / f"{name}.md"
        if file.is_file():
            return file.read_text("utf-8")
    return None


# --- routes -----------------------------------------------------------------------------------------------------------


def routes(studio: Studio) -> APIRouter:
    """What is added to the server: ``app.include_router(routes(studio))``."""
    router = APIRouter(include_in_schema=False)
    files = {file.name: file for file in PAGE.iterdir() if file.suffix in KINDS}

    async def read(request: Request, form: type[T]) -> T:
        """The body of a request that may ask, as a form."""
        studio.admit(request)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "the Content-Type must be application/json", code="bad_content_type")
        return api.read_json(await request.body(), form)  # pyrefly: ignore

    @router.get("/")
    async def root() -> Response:
        return RedirectResponse("/studio/", headers=HEADERS)

    @router.get("/studio/")
    async def page() -> Response:
        return await static("index.html")

    @router.get("/studio/page/{name}")
    async def static(name: str) -> Response:
        if name not in files:
            raise Refused(404, "there is no such file", code="not_found")
        file = files[name]
        return Response(file.read_bytes(), media_type=KINDS[file.suffix], headers=HEADERS)

    @router.get("/studio/chapter/{name}")
    async def about(name: str) -> Response:
        text = chapter(name) if name in CHAPTERS else None
        if text is None:
            raise Refused(404, "there is no such chapter", code="not_found")
        return PlainTextResponse(text, headers=HEADERS)

    @router.post("/studio/enter")
    async def enter(request: Request) -> Response:
        form = api.read_json(await request.body(), Enter)
        if not hmac.compare_digest(form.token.encode("utf-8", "replace"), studio.token.encode()):
            raise Refused(401, "this is not the token of this studio: open the link that it printed", code="bad_token")
        response = JSONResponse({"entered": True})
        response.set_cookie(studio.name(request), studio.cookie, path="/studio", httponly=True, samesite="strict")
        return response

    @router.get("/studio/state")
    async def state(request: Request) -> dict[str, Any]:
        studio.admit(request)
        # A page that is opened at once waits for the model instead of asking again.
        await asyncio.to_thread(studio.service.loaded.wait, 20)
        return plain(described(studio))

    @router.post("/studio/pictures")
    async def pictures(request: Request) -> Response:
        form = await read(request, Ask)

        def work(check: labs.Check) -> Response:
            name, pipeline = studio.model(form.model)
            known = studio.pictures(name, pipeline)
            return pack({"labels": known.labels}, {"x": known.x})

        return await studio.compute(request, work)

    @router.post("/studio/picture")
    async def add(request: Request) -> dict[str, int]:
        form = await read(request, Picture)
        return {"picture": await studio.compute(request, lambda check: studio.add(form, studio.service.limits))}

    @router.post("/studio/beside")
    async def beside(request: Request) -> Response:
        form = await read(request, Beside)

        def work(check: labs.Check) -> Response:
            name, pipeline = studio.model(form.model)
            spec, known = pipeline.beside, studio.pictures(name, pipeline).shown
            pictures = {} if spec is None or not spec.has_pictures else {"pictures": thumbnails(spec, known)}
            return pack({"count": 0 if spec is None else len(known)}, pictures)

        return await studio.compute(request, work)

    @router.post("/studio/beside/open")
    async def show(request: Request) -> dict[str, int]:
        form = await read(request, Picture)
        return {"beside": await studio.compute(request, lambda check: studio.show(form))}

    @router.post("/studio/beside/file")
    async def kept(request: Request) -> Response:
        """The picture as ``undiffuse sample --beside`` reads it."""
        form = await read(request, Beside)

        def work(check: labs.Check) -> Response:
            name, pipeline = studio.model(form.model)
            rows = studio.rows(name, pipeline, {"beside": [form.number]})["beside"]
            if pipeline.beside is None:
                raise UndiffuseError("this model is shown no pictures")
            buffer = BytesIO()
            np.save(buffer, write_shown(rows, pipeline.beside), allow_pickle=False)
            return Response(buffer.getvalue(), media_type="application/octet-stream")

        return await studio.compute(request, work)

    @router.post("/studio/trace")
    async def trace(request: Request) -> Response:
        form = await read(request, Ask)

        def work(check: labs.Check) -> Response:
            made, said = studio.trace(form, check)
            name, pipeline = studio.model(form.model)
            return shown(pipeline, made, studio.forward(name, pipeline, form, made), **said)

        return await studio.compute(request, work)

    @router.post("/studio/branch")
    async def branch(request: Request) -> Response:
        form = await read(request, Branch)

        def work(check: labs.Check) -> Response:
            return shown(studio.model(form.base.model)[1], studio.branch(form, check))

        return await studio.compute(request, work)

    @router.post("/studio/schedules")
    async def schedules(request: Request) -> Response:
        await read(request, Form)
        t = torch.linspace(0, 1, 129, dtype=torch.float64)
        levels = [schedule(t) for schedule in SCHEDULES.values()]
        arrays = {
            "alpha": torch.stack([level.alpha for level in levels]),
            "sigma": torch.stack([level.sigma for level in levels]),
            "log_snr": torch.stack([level.log_snr.clamp(-30, 30) for level in levels]),
        }
        return pack({"names": list(SCHEDULES)}, arrays)

    @router.post("/studio/grid")
    async def points(request: Request) -> Response:
        form = await read(request, GridForm)

        def work(check: labs.Check) -> Response:
            schedule = choose("schedule", form.schedule, SCHEDULES)
            level = schedule(choose("grid", form.grid, GRIDS).times(schedule, form.steps))
            arrays = {"t": level.t, "alpha": level.alpha, "sigma": level.sigma, "log_snr": level.log_snr.clamp(-30, 30)}
            return pack({"terminal_snr": schedule.terminal_snr}, arrays)

        return await studio.compute(request, work)

    @router.post("/studio/compare")
    async def compare(request: Request) -> Response:
        form = await read(request, Compare)

        def work(check: labs.Check) -> Response:
            walks, meta = [], {}
            pipeline = studio.model(form.base.model)[1]
            for side, chosen in (("a", form.a), ("b", form.b)):
                solver = choose("solver", chosen.solver, SOLVERS)
                if solver.adaptive or solver.distilled:
                    raise UndiffuseError(f"{chosen.solver} cannot be asked for a number of calls; take another")
                steps = (form.calls - 1 - solver.extra) // solver.calls + 1
                if steps < 1:
                    raise UndiffuseError(f"{chosen.solver} takes more than {form.calls} calls for one step")
                base = form.base.model_copy(update={"solver": chosen.solver, "grid": chosen.grid, "steps": steps})
                ask = studio.ask(base)[2]
                walks.append(labs.begin(pipeline, ask))
                meta[side] = {"steps": steps}
            both = labs.run(pipeline, walks, check)
            arrays = {}
            for side, made in zip("ab", both, strict=True):
                meta[side] |= {
                    "calls": made.calls,
                    "t": [float(level.t) for level in made.levels],
                    "alpha": [float(level.alpha) for level in made.levels],
                    "sigma": [float(level.sigma) for level in made.levels],
                }
                arrays |= {f"{side}_x": labs.seen(pipeline, made.x), f"{side}_x0": labs.seen(pipeline, made.x0)}
            meta["difference"] = float((arrays["a_x"][-1] - arrays["b_x"][-1]).square().mean().sqrt())
            return pack(meta, arrays)

        return await studio.compute(request, work)

    @router.post("/studio/quality")
    async def quality(request: Request) -> dict[str, Any]:
        form = await read(request, Quality)

        def work(check: labs.Check) -> dict[str, Any]:
            name, pipeline = studio.model(form.model)
            for each in form.solvers:
                if choose("solver", each, SOLVERS).adaptive:
                    raise UndiffuseError(f"{each} chooses its own number of calls")
            if any(not 1 <= calls <= 50 for calls in form.calls):
                raise UndiffuseError("calls are from 1 to 50 here; `undiffuse solvers` measures more")
            folder = studio.folders[name]

            def tick(done: int, total: int) -> None:
                check()

            found = measure(pipeline, folder, form.calls, form.solvers, False, form.grid, form.samples, 0, tick)
            return {
                "rows": plain(found.rows),
                "floor": found.floor,
                "recommendation": found.recommendation,
                "command": found.command,
                "samples": found.samples,
            }

        return await studio.compute(request, work)

    @router.post("/studio/strip")
    async def strip(request: Request) -> Response:
        form = await read(request, Strip)

        def work(check: labs.Check) -> Response:
            if any(not -20 <= scale <= 50 for scale in form.scales):
                raise UndiffuseError("guidance scales are from -20 to 50")
            _, pipeline, ask = studio.ask(form.base)
            if len(form.scales) * form.base.n > 256:
                raise UndiffuseError("at most 256 samples in a strip: take fewer scales or samples")
            x = labs.strip(pipeline, ask, form.scales, check)
            cond = pipeline.conditions(ask.numbers, None, cond=ask.cond)
            alike = labs.groups(cond, form.base.n)
            meta: dict[str, Any] = {"labels": studio.labels(pipeline, ask)}
            meta["variety"] = [labs.variety(each, alike) for each in x]
            if form.judge:
                meta["recognised"] = [labs.recognised(pipeline, each, cond, check=check) for each in x]
            return pack(meta, {"x": x})

        return await studio.compute(request, work)

    @router.post("/studio/words")
    async def words(request: Request) -> Response:
        form = await read(request, Words)

        def work(check: labs.Check) -> Response:
            _, pipeline, ask = studio.ask(form.base)
            conditions = pipeline.denoiser.conditions
            text = next(iter(conditions.written), "") if conditions is not None else ""
            prompts = form.base.cond.get(text, [""])
            prompt = prompts[form.number % len(prompts)]
            told = pipeline.attention(
                prompt if isinstance(prompt, str) else "",
                seed=ask.seed,
                number=form.number,
                cond={name: rows for name, rows in (ask.cond or {}).items() if name != text},
                against=ask.against if ask.sampling.guidance_scale != 1 else None,  # as in the strip
                **vars(ask.sampling),
            )
            return pack({"words": told.words, "number": form.number}, {"x": told.x, "weights": told.weights})

        return await studio.compute(request, work)

    @router.post("/studio/walk")
    async def walk(request: Request) -> Response:
        form = await read(request, WalkForm)

        def work(check: labs.Check) -> Response:
            _, pipeline, ask = studio.ask(form.base)
            for seed in form.corners:
                if not 0 <= seed < 2**53:
                    raise UndiffuseError("seeds are whole numbers from 0")
            if form.down != "noise" and not form.values:
                raise UndiffuseError(f"name the values of {form.down} to walk through")
            down = None if form.down == "noise" else (form.down, form.values)
            x = labs.between(pipeline, ask, form.corners, form.columns, form.rows, down, check)
            return pack({"columns": form.columns, "rows": len(x) // form.columns}, {"x": x})

        return await studio.compute(request, work)

    @router.post("/studio/animation")
    async def animation(request: Request) -> Response:
        form = await read(request, Animation)

        def work(check: labs.Check) -> Response:
            _, pipeline = studio.model(form.ask.model)
            if not drawable(pipeline.spec):
                raise UndiffuseError("these data cannot be drawn")
            made, _ = studio.trace(form.ask, check)
            data = encode_animation([grid(pipeline.spec, x) for x in labs.seen(pipeline, made.x)], form.format)
            headers = {"Content-Disposition": f'attachment; filename="denoising.{form.format}"'}
            return Response(data, media_type=f"image/{form.format}", headers=headers)

        return await studio.compute(request, work)

    @router.post("/studio/plane")
    async def flat(request: Request) -> Response:
        form = await read(request, Plane)
        return await studio.compute(request, lambda check: pack(*plane.exact(studio.view(form))))

    @router.post("/studio/plane/train")
    async def train(request: Request) -> dict[str, bool]:
        form = await read(request, Train)
        await studio.compute(request, lambda check: studio.train(form))
        return {"training": True}

    @router.post("/studio/plane/stop")
    async def stop(request: Request) -> dict[str, bool]:
        await read(request, Form)
        await studio.compute(request, lambda check: studio.close())
        return {"training": False}

    @router.get("/studio/plane/learned")
    async def learned(request: Request, since: int = 0) -> Response:
        studio.admit(request)
        session = studio.session
        if session is None:
            raise Refused(404, "nothing is being trained", code="not_found")
        session.asked = time.monotonic()
        if session.trouble is not None:
            raise Refused(500, session.trouble, code="training_failed")
        if session.latest is None or session.version <= since:
            return Response(status_code=204)
        meta, arrays = session.latest
        return pack({**meta, "version": session.version}, arrays)

    @router.get("/studio/runs")
    async def runs(request: Request) -> dict[str, Any]:
        studio.admit(request)
        return {"runs": await asyncio.to_thread(studio.runs.listed)}

    def folder(name: str) -> Path:
        known = studio.runs.folders()
        if name not in known:
            raise Refused(404, "there is no such run", code="not_found")
        return known[name]

    @router.get("/studio/runs/{name}")
    async def run(request: Request, name: str) -> dict[str, Any]:
        studio.admit(request)
        return await asyncio.to_thread(lambda: studio.runs.curves(folder(name)))

    @router.get("/studio/runs/{name}/doctor")
    async def doctor(request: Request, name: str) -> dict[str, Any]:
        studio.admit(request)
        return {"lights": await studio.compute(request, lambda check: studio.runs.lights(folder(name)))}

    @router.get("/studio/runs/{name}/preview/{index}")
    async def preview(request: Request, name: str, index: int) -> Response:
        studio.admit(request)
        pictures = previews(folder(name))
        if not 0 <= index < len(pictures):
            raise Refused(404, "there is no such preview", code="not_found")
        return Response(pictures[index].read_bytes(), media_type="image/png", headers=HEADERS)

    return router
