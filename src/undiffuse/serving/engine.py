"""The engine: many samplers, one network (step-level continuous batching).

    walk of request 1  --(x, level)-->  \
    walk of request 2  --(x, level)-->    one network call  -->  every walk goes on with its own estimate
    walk of request 3  --(x, level)-->  /

A solver only asks. So the questions of all requests that run, whatever their solver, steps, guidance or seed, are
gathered and answered by one call of the network; requests join and leave between calls. The idea is that of Orca for
language models (Yu et al. 2022), where the unit of batching is one forward pass and not one request.

A picture is a function of its request alone. The engine's neighbours move it by the rounding of the network (about
1e-6), and with ``exact`` by not a bit on a CPU: every call then has the same number of rows.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from itertools import count
from typing import final

import torch
from torch import Tensor

from ..denoiser import Denoise
from ..editing import keep_known
from ..errors import UndiffuseError, choose
from ..levels import Estimate, Level
from ..pipeline import Pipeline, Question, Sampling, answer_together, finished
from ..sampling import Frame, walk
from ..solvers import Step

MOST_ROWS = {"cpu": 32, "cuda": 256, "mps": 64}


class Busy(UndiffuseError):
    """The queue is full, or the engine is closing. ``seconds`` until it is worth trying again."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class Late(UndiffuseError):
    """The request's deadline passed before it was done."""


@dataclass(frozen=True, eq=False)
class Request:
    """What is asked of the engine.

    Attributes:
        model: its name; sampling: how.
        samples: the numbers of the samples; sample i is a function of ``(seed, i)``.
        classes: one for each of the samples; None in it: of no class in particular. None: no classes.
        against: what guidance leads away from, a class for all samples; None: the null class.
        image, strength: begin at this image (``[1, *shape]``, model units) with noise of level t = ``strength``.
        keep: ``[1, *shape]`` or broadcast to it, True where the image must stay as it is; needs ``image``.
        seconds: how long it may take, waiting included; None: as long as it takes.
        watch: given each :class:`.Frame`, on the engine's thread: be quick.
    """

    model: str
    sampling: Sampling
    samples: Sequence[int] = (0,)
    seed: int = 0
    classes: Sequence[int | None] | None = None
    against: int | None = None
    image: Tensor | None = None
    strength: float = 1.0
    keep: Tensor | None = None
    seconds: float | None = None
    watch: Callable[[Frame], object] = lambda frame: None


@final
class Job:
    """A request on its way. ``future`` gives the samples ``[N, *shape]`` in model units, on the CPU; or raises
    :class:`Late`, ``CancelledError``, or what went wrong."""

    def __init__(self, request: Request, rows: int, calls: int, number: int) -> None:
        self.request = request
        self.rows = rows  # of each network call that it takes part in
        self.calls = calls  # that it will take part in, about
        self.number = number
        self.asked = time.monotonic()
        self.future: Future[Tensor] = Future()
        self.cancelled = False
        self.served = -1  # the number of the last call it took part in
        self.steps: Step | None = None
        self.question: Question | None = None
        self.cond: Mapping[str, Tensor] = {}
        self.against: Mapping[str, Tensor] = {}
        self.wrap: Callable[[Denoise], Denoise] | None = None

    def cancel(self) -> None:
        """Ask no more questions: at most the call in progress is still made."""
        self.cancelled = True

    @property
    def overdue(self) -> bool:
        seconds = self.request.seconds
        return seconds is not None and time.monotonic() - self.asked > seconds


@dataclass
class Counters:
    """What has happened so far. Received = waiting + running + finished + failed + cancelled + late (rejected ones are
    not received)."""

    received: int = 0
    rejected: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    late: int = 0
    calls: int = 0
    rows: int = 0
    seconds: float = 0.0  # inside network calls
    by_rows: dict[int, int] = field(default_factory=dict)  # calls by their number of rows


@final
class Engine:
    """Serves requests for some models on one thread of its own.

    Args:
        models: pipelines by name.
        rows: most rows of a network call; None: as many as a probe finds to pay.
        waiting: most requests that wait; one more is refused with :class:`Busy`.
        exact: fill every call up to ``rows``, so that on a CPU a picture does not depend on its neighbours to the bit.
    """

    def __init__(
        self, models: Mapping[str, Pipeline], *, rows: int | None = None, waiting: int = 64, exact: bool = False
    ) -> None:
        if not models:
            raise UndiffuseError("an engine needs at least one model")
        if rows is not None and rows < 2:
            raise UndiffuseError(f"rows={rows} must be at least 2: a guided sample takes two")
        self.models = dict(models)
        for pipeline in self.models.values():
            pipeline.denoiser.eval().requires_grad_(False)
        self.rows = {name: rows or probe(pipeline) for name, pipeline in self.models.items()}
        self.most_waiting = waiting
        self.exact = exact
        self.counters = Counters()
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.pace = 0.01  # seconds a row, a moving average
        self.closing = False
        self._changed = threading.Condition()
        self._numbers = count()
        self._thread = threading.Thread(target=self._serve, name="undiffuse-engine", daemon=True)
        self._thread.start()

    # --- what others call ---------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Job:
        """Queue a request. Raises :class:`UndiffuseError` for one that cannot be served, :class:`Busy` for one that
        cannot be served now; everything is checked before it waits."""
        pipeline = choose("model", request.model, self.models)
        if not request.samples:
            raise UndiffuseError("no samples asked for")
        if request.keep is not None and request.image is None:
            raise UndiffuseError("a mask needs the image that it keeps")
        each = pipeline.rows(request.sampling)
        rows = each * len(request.samples)
        if rows > self.rows[request.model]:
            most = self.rows[request.model] // each
            raise UndiffuseError(f"{len(request.samples)} samples in one request, at most {most} fit into a call")
        # All that can be wrong is wrong here and not on the engine's thread; the noise of the rest is drawn there.
        pipeline.conditions(request.samples, request.classes)
        if request.against is not None:
            pipeline.conditions(request.samples, [request.against])
        pipeline.begin(
            request.samples[:1],
            seed=request.seed,
            classes=request.classes,
            sampling=request.sampling,
            image=request.image,
            strength=request.strength,
        )
        solver = request.sampling.solver
        job = Job(request, rows, request.sampling.steps * solver.calls + solver.extra, next(self._numbers))
        with self._changed:
            if self.closing:
                self.counters.rejected += 1
                raise Busy("the engine is closing", 60.0)
            if len(self.waiting) >= self.most_waiting:
                self.counters.rejected += 1
                raise Busy(f"{len(self.waiting)} requests are waiting already", self._wait())
            self.waiting.append(job)
            self.counters.received += 1
            self._changed.notify()
        return job

    def run(self, request: Request) -> Tensor:
        """:meth:`submit`, and wait for the samples."""
        return self.submit(request).future.result()

    def wait(self) -> float:
        """Seconds until a request that comes now would begin, about."""
        with self._changed:
            return self._wait()

    def _wait(self) -> float:
        return self.pace * sum(job.rows * job.calls for job in [*self.waiting, *self.running])

    def close(self, seconds: float = 10.0) -> None:
        """Refuse what comes now, finish what is there within ``seconds``, cancel the rest, and end the thread."""
        with self._changed:
            self.closing = True
            self._changed.notify()
        self._thread.join(seconds)
        if self._thread.is_alive():
            with self._changed:
                for job in [*self.waiting, *self.running]:
                    job.cancel()
                self._changed.notify()
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *what: object) -> None:
        self.close()

    # --- the engine's thread ------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not (self.waiting or self.running or self.closing):
                    self._changed.wait()
                if self.closing and not (self.waiting or self.running):
                    return
                joining = self._admit()
            for job in joining:
                self._begin(job)
            for job in [*self.running]:
                if job.cancelled:
                    self._end(job, CancelledError())
                elif job.overdue:
                    self._end(job, Late(f"not finished within {job.request.seconds:g} seconds"))
            batch = self._batch()
            if batch:
                self._call(batch)

    def _admit(self) -> list[Job]:
        """Take from the queue, oldest first, what fits beside those that run; and what need not be served any more."""
        joining: list[Job] = []
        used = sum(job.rows for job in self.running)
        while self.waiting:
            job = self.waiting[0]
            gone = job.cancelled or job.overdue
            if not gone and self.running + joining and used + job.rows > self.rows[job.request.model]:
                break
            joining.append(self.waiting.popleft())
            used += 0 if gone else job.rows
        self.running.extend(joining)
        return joining

    def _begin(self, job: Job) -> None:
        request = job.request
        pipeline = self.models[request.model]
        if job.cancelled or job.overdue:  # never computed; _serve says so
            return
        try:
            begun = pipeline.begin(
                request.samples,
                seed=request.seed,
                classes=request.classes,
                sampling=request.sampling,
                image=request.image,
                strength=request.strength,
            )
            job.cond = begun.cond
            job.against = pipeline.denoiser.null(len(request.samples))
            if request.against is not None:
                job.against = pipeline.conditions(request.samples, [request.against])
            if request.keep is not None and request.image is not None:
                known = request.image.to(begun.x).expand_as(begun.x)
                job.wrap = lambda denoise: keep_known(denoise, known, request.keep)  # pyrefly: ignore
            job.steps = walk(begun.x, begun.levels, request.sampling.solver, begun.noise, request.watch)
        except Exception as error:
            self._end(job, error)
            return
        self._send(job, None)

    def _send(self, job: Job, estimate: Estimate | None) -> None:
        """Let a job go on to its next question, or to its end."""
        assert job.steps is not None
        try:
            x, level = job.steps.send(estimate)  # pyrefly: ignore  (the first is None)
            job.question = Question(x, level, job.cond, job.against, job.request.sampling)
        except StopIteration as stop:
            try:
                self._end(job, finished(stop.value[0]))
            except UndiffuseError as error:
                self._end(job, error)
        except Exception as error:  # of a solver, or of who watches
            self._end(job, error)

    def _end(self, job: Job, result: Tensor | BaseException) -> None:
        with self._changed:
            self.running.remove(job)
            counters = self.counters
            match result:
                case Tensor():
                    counters.finished += 1
                case CancelledError():
                    counters.cancelled += 1
                case Late():
                    counters.late += 1
                case _:
                    counters.failed += 1
        if isinstance(result, Tensor):
            job.future.set_result(result)
        else:
            job.future.set_exception(result)

    def _batch(self) -> list[Job]:
        """The jobs of the next call: those that have waited longest, and all that may be asked together with them."""
        ready = sorted((job for job in self.running if job.question is not None), key=lambda job: job.served)
        chosen: list[Job] = []
        rows = 0
        for job in ready:
            if chosen and job.request.model != chosen[0].request.model:
                continue
            if chosen and rows + job.rows > self.rows[job.request.model]:
                continue
            chosen.append(job)
            rows += job.rows
        return chosen

    def _call(self, batch: Sequence[Job]) -> None:
        """One network call for the questions of ``batch``. If it fails, each is asked alone, so that one bad request
        fails by itself."""
        model = batch[0].request.model
        pipeline = self.models[model]
        questions = [job.question for job in batch if job.question is not None]
        rows = sum(len(question.x) * len(question.parts()) for question in questions)
        begun = time.monotonic()
        try:
            with torch.no_grad():
                estimates = answer_together(pipeline.denoiser, questions, self.rows[model] if self.exact else None)
            if pipeline.device.type == "cuda":
                torch.cuda.synchronize(pipeline.device)
        except Exception as error:
            if len(batch) == 1:
                self._end(batch[0], error)
            else:
                for job in batch:
                    self._call([job])
            return
        seconds = time.monotonic() - begun
        counters = self.counters
        number = counters.calls = counters.calls + 1
        counters.rows += rows
        counters.seconds += seconds
        counters.by_rows[rows] = counters.by_rows.get(rows, 0) + 1
        self.pace += 0.1 * (seconds / max(1, rows) - self.pace)
        for job, question, estimate in zip(batch, questions, estimates, strict=True):
            job.served, job.question = number, None
            if job.wrap is not None:
                estimate = job.wrap(_said(estimate))(question.x, question.level)
            self._send(job, estimate)


def _said(estimate: Estimate) -> Denoise:
    """A denoiser that has been asked already."""

    def denoise(x: Tensor, level: Level) -> Estimate:
        return estimate

    return denoise


@torch.no_grad()
def probe(pipeline: Pipeline, most: int | None = None, slack: float = 1.05, repeats: int = 3) -> int:
    """How many rows of a network call pay: the fewest (a power of two, 2 to ``most``) whose time a row is within
    ``slack`` of the best, of those that fit into memory. A second or two."""
    limit = most or MOST_ROWS.get(pipeline.device.type, 32)
    denoiser, level = pipeline.denoiser, pipeline.config.schedule(0.5)

    def seconds(rows: int) -> float:
        x = torch.zeros(rows, *pipeline.spec.shape, device=pipeline.device)
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            denoiser(x, level, **denoiser.null(rows))
            if pipeline.device.type == "cuda":
                torch.cuda.synchronize(pipeline.device)
            times.append(time.perf_counter() - begun)
        return min(times)  # others on this machine only ever make it slower

    each, rows = {}, 2
    seconds(rows)
    while rows <= limit:
        try:
            each[rows] = seconds(rows) / rows
        except torch.OutOfMemoryError:
            break
        rows *= 2
    best = min(each.values(), default=0.0)
    return next((rows for rows, cost in each.items() if cost <= slack * best), 2)
