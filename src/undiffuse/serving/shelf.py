"""The shelf: more models than fit into memory. At most so many are loaded, those used last.

A request for a model that is not loaded waits until it is. Models are loaded one at a time, in the order in which they
were asked for, on a thread of their own, while the others go on being served. Room is made by the one used longest
ago: it finishes what it has begun, and who asks for it from then on waits for it to be loaded again. So every model
that is asked for has its turn, however busy the others are.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager
from queue import SimpleQueue
from typing import final

from ..pipeline import Pipeline
from .engine import Engine


class Unloadable(Exception):
    """A model cannot be loaded; ``__cause__`` says why."""


class _Copy:
    """A model on its way to the shelf, or on it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pipeline: Future[Pipeline] = Future()
        self.pipeline.set_running_or_notify_cancel()
        self.users = 0
        self.used = 0.0


@final
class Shelf:
    """Loads models into an engine.

    Args:
        sources: what loads each, by name; called on the shelf's thread.
        most: how many at a time; None: all.
    """

    def __init__(self, engine: Engine, sources: Mapping[str, Callable[[], Pipeline]], most: int | None = None) -> None:
        self.engine = engine
        self.sources = dict(sources)
        self.most = most or len(self.sources)
        self.known: dict[str, Pipeline] = {}  # those that are loaded
        self._copies: dict[str, _Copy] = {}  # those, and those that will be
        self._lock = threading.Lock()
        self._queue: SimpleQueue[_Copy] = SimpleQueue()
        threading.Thread(target=self._load, name="undiffuse-load", daemon=True).start()

    def fill(self) -> list[Future[Pipeline]]:
        """Begin to load as many as may be, the first first."""
        with self._lock:
            return [self._copy(name).pipeline for name in list(self.sources)[: self.most]]

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Pipeline]:
        """The model, once it is loaded; it stays so within. Raises :class:`Unloadable`."""
        with self._lock:
            copy = self._copy(name)
            copy.users += 1
            copy.used = time.monotonic()
        try:
            yield await asyncio.wrap_future(copy.pipeline)
        finally:
            with self._lock:
                copy.users -= 1

    def _copy(self, name: str) -> _Copy:
        if name not in self._copies:
            self._copies[name] = _Copy(name)
            self._queue.put(self._copies[name])
        return self._copies[name]

    def _load(self) -> None:
        while True:
            copy = self._queue.get()
            try:
                while len(self.known) >= self.most:
                    self._put_away()
                pipeline = self.sources[copy.name]()
                self.engine.add(copy.name, pipeline)
            except Exception as error:
                with self._lock:
                    del self._copies[copy.name]  # who asks next tries again
                trouble = Unloadable(f"model {copy.name} could not be loaded")
                trouble.__cause__ = error
                copy.pipeline.set_exception(trouble)
            else:
                self.known[copy.name] = pipeline
                copy.pipeline.set_result(pipeline)

    def _put_away(self) -> None:
        """Make room for one, when what it has begun is done."""
        with self._lock:
            oldest = min((self._copies[name] for name in self.known), key=lambda copy: copy.used)
            del self._copies[oldest.name]
        while oldest.users or self.engine.busy(oldest.name):
            time.sleep(0.02)
        del self.known[oldest.name]
        self.engine.remove(oldest.name)
