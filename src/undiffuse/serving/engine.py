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

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from itertools import count
from types import MappingProxyType
from typing import final

import torch
from torch import Tensor

from ..asking import Question, Sampling, answer_together
from ..compiling import MOST_FILLED
from ..conditions import Rows
from ..denoiser import Denoise
from ..errors import UndiffuseError, choose
from ..levels import Estimate, Level
from ..pipeline import Pipeline, Start
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
        prompts, negative_prompt: of a model with text; sample i gets prompt ``i % len(prompts)``.
        cond, against: any conditions by name, and what guidance leads away from; see :meth:`.Pipeline.conditions`.
        image, strength: begin at this image (``[1, *spec.shape]``, model units) with noise of level t = ``strength``.
        keep: ``[1, *spec.shape]`` or broadcast to it, True where the image must stay as it is; needs ``image``. In
            latents the image stays where all that a latent stands for does, and what is kept is put back at the end.
        seconds: how long it may take, waiting included; None: as long as it takes.
        watch: given each :class:`.Frame`, of what the denoiser sees, on the engine's thread: be quick.
    """

    model: str
    sampling: Sampling
    samples: Sequence[int] = (0,)
    seed: int = 0
    classes: Sequence[int | None] | None = None
    prompts: Sequence[str] | None = None
    negative_prompt: str | None = None
    cond: Rows | None = None
    against: Rows | None = None
    image: Tensor | None = None
    strength: float = 1.0
    keep: Tensor | None = None
    seconds: float | None = None
    watch: Callable[[Frame], object] = lambda frame: None


@final
class Job:
    """A request on its way, or a part of it. ``future`` gives the samples ``[N, *spec.shape]`` in model units, decoded,
    on the CPU; or raises :class:`Late`, ``CancelledError``, or what went wrong."""

    def __init__(self, request: Request, rows: int, calls: int, number: int) -> None:
        self.request = request
        self.rows = rows  # of each network call that it takes part in
        self.left = calls  # in which it will still take part, about
        self.number = number  # of the request that it is a part of
        self.asked = time.monotonic()
        self.due = self.asked
        self.future: Future[Tensor] = Future()
        self.future.set_running_or_notify_cancel()  # it ends on the engine's thread alone, whoever loses interest
        self.cancelled = False
        self.steps: Step | None = None  # None: not begun
        self.question: Question | None = None
        self.begun: Start | None = None

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
class Loaded:
    """A pipeline that is served: the most rows of its network calls, and what they cost."""

    def __init__(self, pipeline: Pipeline, rows: int, seconds: float) -> None:
        pipeline.denoiser.eval().requires_grad_(False)
        self.pipeline = pipeline
        self.rows = rows
        self._seconds, self._done = rows * seconds, float(rows)

    @property
    def pace(self) -> float:
        """Seconds a row: the mean over the last twenty calls, about."""
        return self._seconds / self._done

    def took(self, rows: int, seconds: float) -> None:
        self._seconds, self._done = 0.95 * self._seconds + seconds, 0.95 * self._done + rows


@final
class Engine:
    """Serves requests for some models on one thread of its own.

    Whose questions are answered first? A job is *due* when ``PATIENCE`` times as long has passed since it was asked for
    as it takes by itself, and the earliest due go first. So short jobs overtake long ones, but never for ever: a time
    that was fixed once comes nearer, whatever is asked later. The parts of a large request are due one after the other.

    Args:
        models: pipelines by name; :meth:`add` and :meth:`remove` change them.
        rows: most rows of a network call; None: as many as a probe finds to pay.
        waiting: most requests that wait; one more is refused with :class:`Busy`.
        exact: fill every call up to ``rows``, so that on a CPU a picture does not depend on its neighbours to the bit.
    """

    PATIENCE = 4.0

    def __init__(
        self,
        models: Mapping[str, Pipeline] = MappingProxyType({}),
        *,
        rows: int | None = None,
        waiting: int = 64,
        exact: bool = False,
    ) -> None:
        if rows is not None and rows < 2:
            raise UndiffuseError(f"rows={rows} must be at least 2: a guided sample takes two")
        self.rows = rows
        self.most_waiting = waiting
        self.exact = exact
        self.counters = Counters()
        self.models: dict[str, Loaded] = {}
        self.jobs: list[Job] = []  # all that have not ended
        self.closing = False
        self._served: set[int] = set()  # numbers of the requests of the last network call
        self._changed = threading.Condition()
        self._numbers = count()
        for name, pipeline in models.items():
            self.add(name, pipeline)
        self._thread = threading.Thread(target=self._serve, name="undiffuse-engine", daemon=True)
        self._thread.start()

    # --- what others call ---------------------------------------------------------------------------------------------

    def add(self, name: str, pipeline: Pipeline) -> None:
        """Serve a model. It is probed first, which takes a second or two, here and not on the engine's thread; one that
        compiles does so here too, for all numbers of rows that its calls are filled up to."""
        compiles = pipeline.fast is not None
        rows, pace = probe(pipeline, self.rows, MOST_FILLED if compiles else math.inf)
        if compiles:
            fewer = [] if self.exact else [2**k for k in range(rows.bit_length()) if 2**k < rows]
            pace, *_ = [probe(pipeline, each, compiled=True)[1] for each in (rows, *reversed(fewer))]
        self.models[name] = Loaded(pipeline, rows, pace)

    def remove(self, name: str) -> None:
        """Serve it no more. Raises :class:`UndiffuseError` while there are jobs for it (:meth:`busy`)."""
        with self._changed:
            if any(job.request.model == name for job in self.jobs):
                raise UndiffuseError(f"model {name} is at work")
            del self.models[name]

    def busy(self, name: str) -> bool:
        """Whether there are jobs for a model."""
        with self._changed:
            return any(job.request.model == name for job in self.jobs)

    @property
    def alive(self) -> bool:
        """False once the engine has ended: closed, or its device lost."""
        return self._thread.is_alive()

    def join(self) -> None:
        """Wait until the engine has ended."""
        self._thread.join()

    def submit(self, request: Request) -> Job:
        """Queue a request that fits into a network call; see :meth:`submit_parts`."""
        most = self._most(request)
        if len(request.samples) > most:
            raise UndiffuseError(f"{len(request.samples)} samples in one request, at most {most} fit into a call")
        return self.submit_parts(request)[0]

    def submit_parts(self, request: Request) -> list[Job]:
        """Queue a request in parts that fit into a network call: all of it, or nothing. Raises :class:`UndiffuseError`
        for one that cannot be served, :class:`Busy` for one that cannot be served now; everything is checked before it
        waits."""
        most = self._most(request)
        loaded = self.models[request.model]
        pipeline, sampling = loaded.pipeline, request.sampling
        if not request.samples:
            raise UndiffuseError("no samples asked for")
        if request.keep is not None and request.image is None:
            raise UndiffuseError("a mask needs the image that it keeps")
        # All that can be wrong is wrong here and not on the engine's thread; the noise of the rest is drawn there.
        pipeline.conditions(request.samples, request.classes, request.prompts, request.cond, sampling.reading)
        begun = self._start(replace(request, samples=request.samples[:1]))
        calls = (len(begun.levels) - 1) * sampling.solver.calls + sampling.solver.extra
        with self._changed:
            self._admit()
            if self.models.get(request.model) is not loaded:
                raise Busy("the model has just been put away", 1.0)
            number, jobs = next(self._numbers), []
            for begin in range(0, len(request.samples), most):
                samples = request.samples[begin : begin + most]
                rows = len(samples) * pipeline.rows(sampling)
                job = Job(replace(request, samples=samples), rows, calls, number)
                job.due += self.PATIENCE * calls * loaded.pace * loaded.rows * (len(jobs) + 1)
                jobs.append(job)
            self.jobs.extend(jobs)
            self.counters.received += len(jobs)
            self._changed.notify()
        return jobs

    def admit(self) -> None:
        """Raise :class:`Busy` if a request that came now would be refused: cheap, so that a flood is answered."""
        with self._changed:
            self._admit()

    def _admit(self) -> None:
        if self.closing:
            self.counters.rejected += 1
            raise Busy("the engine is closing", 60.0)
        if (waiting := self._waiting()) >= self.most_waiting:
            self.counters.rejected += 1
            raise Busy(f"{waiting} requests are waiting already", self._wait())

    def _most(self, request: Request) -> int:
        """Samples of this request that fit into a network call."""
        return max(1, choose("model", request.model, self.models).rows // Pipeline.rows(request.sampling))

    def _start(self, request: Request) -> Start:
        return self.models[request.model].pipeline.begin(
            request.samples,
            seed=request.seed,
            classes=request.classes,
            prompts=request.prompts,
            sampling=request.sampling,
            image=request.image,
            strength=request.strength,
            keep=request.keep,
            negative_prompt=request.negative_prompt,
            cond=request.cond,
            against=request.against,
        )

    def run(self, request: Request) -> Tensor:
        """:meth:`submit`, and wait for the samples."""
        return self.submit(request).future.result()

    @property
    def waiting(self) -> int:
        """Requests of which no part took part in the last network call."""
        with self._changed:
            return self._waiting()

    def _waiting(self) -> int:
        return len({job.number for job in self.jobs} - self._served)

    def wait(self) -> float:
        """Seconds until all that is here is done, about: a request that comes then begins at once."""
        with self._changed:
            return self._wait()

    def _wait(self) -> float:
        return sum(job.rows * job.left * self.models[job.request.model].pace for job in self.jobs)

    def close(self, seconds: float = 10.0) -> None:
        """Refuse what comes now, finish what is there within ``seconds``, cancel the rest, and end the thread."""
        with self._changed:
            self.closing = True
            self._changed.notify()
        self._thread.join(seconds)
        if self._thread.is_alive():
            with self._changed:
                for job in self.jobs:
                    job.cancel()
                self._changed.notify()
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *what: object) -> None:
        self.close()

    # --- the engine's thread ------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Turns until the engine is closed. One that fails in a way that nobody foresaw ends all jobs, so that nobody
        waits for ever, and the next begins anew; without its device the engine ends."""
        going = True
        while going:
            try:
                going = self._turn()
            except BaseException as error:
                going = isinstance(error, Exception) and not isinstance(error, torch.AcceleratorError)
                with self._changed:
                    self.closing |= not going
                for job in [*self.jobs]:
                    self._end(job, error)

    def _turn(self) -> bool:
        """One network call and what follows from it; False when there is nothing to do any more."""
        with self._changed:
            while not (self.jobs or self.closing):
                self._changed.wait()
            if not self.jobs:
                return False
            jobs = sorted(self.jobs, key=lambda job: job.due)
        for job in jobs:
            if job.cancelled:
                self._end(job, CancelledError())
            elif job.overdue:
                self._end(job, Late(f"not finished within {job.request.seconds:g} seconds"))
        batch = self._batch([job for job in jobs if not job.future.done()])
        self._served = {job.number for job in batch}
        for job in batch:
            if job.steps is None:
                self._begin(job)
        self._call([job for job in batch if job.question is not None])
        return True

    def _batch(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs of the next call: the first, and all of the others that fit in beside it."""
        chosen: list[Job] = []
        rows = 0
        for job in jobs:
            model = job.request.model
            if not chosen or (model == chosen[0].request.model and rows + job.rows <= self.models[model].rows):
                chosen.append(job)
                rows += job.rows
        return chosen

    def _begin(self, job: Job) -> None:
        request = job.request
        try:
            begun = job.begun = self._start(request)
            job.steps = walk(begun.x, begun.levels, request.sampling.solver, begun.noise, request.watch)
        except Exception as error:
            self._end(job, error)
            return
        self._send(job, None)

    def _send(self, job: Job, estimate: Estimate | None) -> None:
        """Let a job go on to its next question, or to its end."""
        begun = job.begun
        assert job.steps is not None
        assert begun is not None
        question, job.question = job.question, None
        try:
            if estimate is not None and question is not None:
                estimate = begun.wrap(_said(estimate))(question.x, question.level)
            x, level = job.steps.send(estimate)  # pyrefly: ignore  (the first is None)
            job.question = Question(x, level, begun.cond, begun.against, job.request.sampling, begun.memory)
        except StopIteration as stop:
            try:
                pipeline = self.models[job.request.model].pipeline
                self._end(job, pipeline.end(begun, stop.value[0], alone=self.exact))
            except Exception as error:
                self._end(job, error)
        except Exception as error:  # of a solver, or of who watches
            self._end(job, error)

    def _end(self, job: Job, result: Tensor | BaseException) -> None:
        with self._changed:
            self.jobs.remove(job)
            job.question = job.begun = None
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

    def _call(self, batch: Sequence[Job]) -> None:
        """One network call for the questions of ``batch``. If it fails, each is asked alone, so that one bad request
        fails by itself."""
        if not batch:
            return
        loaded = self.models[batch[0].request.model]
        pipeline = loaded.pipeline
        questions = [job.question for job in batch if job.question is not None]
        rows = sum(question.rows for question in questions)
        begun = time.monotonic()
        try:
            with torch.no_grad():
                estimates = answer_together(pipeline.asked, questions, loaded.rows if self.exact else None)
            if pipeline.device.type == "cuda":
                torch.cuda.synchronize(pipeline.device)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) and not self.exact:
                loaded.rows = max(2, loaded.rows // 2)  # others have taken memory since the probe
            if len(batch) == 1:
                self._end(batch[0], error)
            else:
                for job in batch:
                    self._call([job])
            return
        seconds = time.monotonic() - begun
        counters = self.counters
        counters.calls += 1
        counters.rows += rows
        counters.seconds += seconds
        counters.by_rows[rows] = counters.by_rows.get(rows, 0) + 1
        loaded.took(rows, seconds)
        for job, estimate in zip(batch, estimates, strict=True):
            job.left = max(0, job.left - 1)
            self._send(job, estimate)


def _said(estimate: Estimate) -> Denoise:
    """A denoiser that has been asked already."""

    def denoise(x: Tensor, level: Level) -> Estimate:
        return estimate

    return denoise


@torch.no_grad()
def probe(
    pipeline: Pipeline,
    rows: int | None = None,
    most: float = math.inf,
    slack: float = 1.05,
    repeats: int = 3,
    compiled: bool = False,
) -> tuple[int, float]:
    """How many rows of a network call pay, and the seconds that one then takes: the fewest (a power of two, 2 to
    ``most``) whose time a row is within ``slack`` of the best, of those that fit into memory. A second or two. With
    ``rows`` only the time of so many is taken; ``compiled``: by the compiled network, if it is one.

    On a CPU the time is this thread's own: where others compute, a long call is interrupted and a short one is not, so
    that by the clock small batches would always look best."""
    limit = min(most, MOST_ROWS.get(pipeline.device.type, 32))
    denoiser, level = pipeline.asked if compiled else pipeline.denoiser, pipeline.config.schedule(0.5)
    pipeline.denoiser.eval()

    own = time.thread_time if pipeline.device.type == "cpu" else time.perf_counter

    def seconds(rows: int) -> float:
        x = torch.zeros(rows, *pipeline.shape, device=pipeline.device)
        times = []
        for _ in range(repeats):
            begun = own()
            denoiser(x, level, **denoiser.null(rows))
            if pipeline.device.type == "cuda":
                torch.cuda.synchronize(pipeline.device)
            times.append(own() - begun)
        return min(times)  # others on this machine only ever make it slower

    if rows is not None:
        return rows, seconds(rows) / rows
    each, tried = {}, 2
    seconds(tried)
    while tried <= limit:
        try:
            each[tried] = seconds(tried) / tried
        except torch.OutOfMemoryError:
            del each[max(each)]  # leave room: what just fits today may not when another model is beside it
            break
        tried *= 2
    if pipeline.device.type == "cuda":
        torch.cuda.empty_cache()
    best = min(each.values(), default=0.0)
    return next(((rows, cost) for rows, cost in each.items() if cost <= slack * best), (2, 1.0))
