"""Other processes on this machine, which one that was started alone starts itself, to be a team with on its CPU.

They run its own command line. Up to the place where they take part (:func:`called`) each prepares by itself what it
needs; from there on they are the team that torchrun would have made of them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import torch

from .distributed import Team, group
from .errors import Deserted, UndiffuseError

CALLED = "UNDIFFUSE_CREW"
"""The variable by which a process that was started so knows it: rank, size, meeting place."""

LINGER = 10.0
"""Seconds that such a process has to end by itself."""


@dataclass(frozen=True)
class Crew:
    """How a process alone starts others on its machine, to be a team with on its CPU.

    Attributes:
        words: the command line that this process runs and the others shall, after ``undiffuse``.
        size: how many processes in all; None: whoever asks for the team decides.
    """

    words: tuple[str, ...]
    size: int | None = None

    @contextmanager
    def team(self, size: int) -> Iterator[Team]:
        """A team of ``size`` with this process as the first, which share the threads that it had; it ends when this
        does. The others take part from where they call :func:`called`.

        They have a session of their own, so that signals of the terminal reach this process alone, and they end when it
        does, however it ends. Raises :class:`UndiffuseError` with what another process says where that fails: in the
        beginning before anything else happens, later in place of :class:`Deserted`.
        """
        import torch.distributed as dist

        threads = torch.get_num_threads()
        each = max(1, threads // size)
        if not (dist.is_available() and dist.is_gloo_available()):
            raise UndiffuseError("this torch was built without gloo, by which they would talk")
        if dist.is_initialized():
            raise UndiffuseError("this process is of another group already")
        with tempfile.TemporaryDirectory(prefix="undiffuse-", ignore_cleanup_errors=True) as folder:
            meeting, others = str(Path(folder, "meeting")), list[subprocess.Popen[bytes]]()
            patience = 0.0  # until they have come they have nothing to end
            try:
                others.extend(self._start(Team(rank, size), each, folder, meeting) for rank in range(1, size))
                torch.set_num_threads(each)
                store = dist.FileStore(meeting, size)
                here = [f"here {rank}" for rank in range(1, size)]
                while not all(store.check([name]) for name in here):
                    if any(other.poll() is not None for other in others):
                        raise Deserted
                    time.sleep(0.02)
                with _loopback(), group(Team(0, size), "cpu", store) as team:
                    patience = LINGER
                    yield team
            except Deserted as error:
                raise UndiffuseError(_reason(others, folder) or str(error)) from None
            finally:
                torch.set_num_threads(threads)
                _end(others, patience)

    def _start(self, team: Team, threads: int, folder: str, meeting: str) -> subprocess.Popen[bytes]:
        # With RANK it is silent but for what it alone has to say; LOCAL_RANK makes it say its mistakes, too.
        environment = {"RANK": str(team.rank), "LOCAL_RANK": "0", "OMP_NUM_THREADS": str(threads)}
        environment[CALLED] = json.dumps([team.rank, team.size, meeting])
        source = str(Path(__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
        with Path(folder, f"{team.rank}.txt").open("wb") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "undiffuse", *self.words],
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,  # closed when this process ends
                stdout=subprocess.DEVNULL,
                stderr=said,
                start_new_session=True,
            )


def is_called() -> bool:
    """Whether another process has started this one to be of its team."""
    return CALLED in os.environ


@contextmanager
def called() -> Iterator[Team]:
    """The team of the process that has started this one (:class:`Crew`); from here on this one ends when that does."""
    import torch.distributed as dist

    rank, size, meeting = json.loads(os.environ[CALLED])

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    Thread(target=watch, daemon=True).start()
    store = dist.FileStore(meeting, size)
    store.set(f"here {rank}", "")
    with _loopback(), group(Team(rank, size), "cpu", store) as team:
        yield team


@contextmanager
def _loopback() -> Iterator[None]:
    """Gloo talks within the machine: nothing listens to the network, and the machine's name need not be known."""
    name = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    if name is None or "GLOO_SOCKET_IFNAME" in os.environ:
        yield
        return
    os.environ["GLOO_SOCKET_IFNAME"] = name
    try:
        yield
    finally:
        del os.environ["GLOO_SOCKET_IFNAME"]


def _reason(others: Sequence[subprocess.Popen[bytes]], folder: str) -> str:
    """Why one of them has ended, in one line; a bug's traceback is printed before."""
    until = time.monotonic() + LINGER
    for rank, other in enumerate(others, 1):
        with suppress(subprocess.TimeoutExpired):
            other.wait(max(0.0, until - time.monotonic()))
        code, name = other.poll(), f"process {rank} of {len(others) + 1}"
        if code is None:
            continue
        said = Path(folder, f"{rank}.txt").read_text("utf-8", "replace").strip()
        if code < 0:
            return (
                f"{name} was ended by {signal.Signals(-code).name}; the same command goes on from the last checkpoint"
            )
        if "Traceback (most recent call last)" in said:
            print(said, file=sys.stderr)
            return f"{name} has failed: {said.splitlines()[-1]}"
        if said:
            return said.splitlines()[-1].removeprefix("undiffuse: ")
    return ""


def _end(others: Sequence[subprocess.Popen[bytes]], patience: float) -> None:
    """They end, if they have not."""
    for other in others:
        if other.stdin is not None:
            with suppress(OSError):
                other.stdin.close()
    until = time.monotonic() + patience
    for other in others:
        try:
            other.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            other.kill()
            other.wait()
