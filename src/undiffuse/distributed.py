"""Several processes as one: who takes part, which items are whose, and the few things they say to each other.

    torchrun --nproc-per-node 4 -m undiffuse train FOLDER

starts four processes that differ in their environment only (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``,
``MASTER_PORT``). :func:`joined` makes a :class:`Team` of them. A process that was started alone is a team of one, which
never imports torch's distributed half; on a CPU it may start others itself, which run its own command line
(:mod:`.crew`). What they say is text (JSON) and tensors; nothing is pickled.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import Deserted, Failed, UndiffuseError

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others; one that has ended is noticed at once, this is for machines that vanish."""


@dataclass(frozen=True)
class Team:
    """The processes that train or sample together.

    Attributes:
        rank, size: which of how many this process is. 0 is the one that speaks and writes.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes."""
        return self.rank == 0

    def mine(self, items: Sequence[int], batch: int = 1) -> Sequence[int]:
        """This process's part of ``items``: a run of whole batches, so that every batch is the one that a process alone
        would compute. May be empty."""
        batches = ceil(len(items) / batch)
        begin, end = (rank * batches // self.size * batch for rank in (self.rank, self.rank + 1))
        return items[begin:end]

    def gather(self, part: np.ndarray) -> np.ndarray:
        """The arrays ``[n, ...]`` of all processes one after the other, on the first; the others get their own back."""
        if self.size == 1:
            return part
        import torch.distributed as dist

        lengths = [int(text) for text in self.collect(str(len(part)))]
        if not self.first:
            if part.size:
                dist.send(_bytes(np.ascontiguousarray(part)), 0)
            return part
        parts = [part]
        for rank in range(1, self.size):
            other = np.empty((lengths[rank], *part.shape[1:]), part.dtype)
            if other.size:
                dist.recv(_bytes(other), rank)
            parts.append(other)
        return np.concatenate(parts)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place; the same bits on each."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def most(self, numbers: Sequence[int]) -> list[int]:
        """The largest of each number over all processes."""
        if self.size == 1:
            return list(numbers)
        import torch.distributed as dist

        values = torch.tensor(numbers)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.tolist()

    def give(self, tensor: Tensor | None, like: Tensor) -> Tensor:
        """The first process's ``tensor`` on all, where and divided as ``like`` is. The others may pass None."""
        if self.size == 1:
            assert tensor is not None
            return tensor
        import torch.distributed as dist
        from torch.distributed.tensor import DTensor, distribute_tensor

        device = like.device
        full = torch.empty(like.shape, dtype=like.dtype, device=device) if tensor is None else tensor.to(device)
        if isinstance(like, DTensor):
            return distribute_tensor(full.contiguous(), like.device_mesh, like.placements)
        full = full.contiguous().clone()
        dist.broadcast(full, 0)
        return full

    def tell(self, value: Any = None) -> Any:
        """The first process's JSON value, on all."""
        return json.loads(self.collect(json.dumps(value) if self.first else "")[0]) if self.size > 1 else value

    def collect(self, text: str) -> list[str]:
        """The text of each process, on all."""
        if self.size == 1:
            return [text]
        import torch.distributed as dist

        content = text.encode()
        longest = self.most([len(content)])[0]
        padded = torch.tensor(list(content.ljust(longest, b"\0")), dtype=torch.uint8)
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        if longest:
            dist.all_gather(parts, padded)
        return [bytes(part.tolist()).rstrip(b"\0").decode() for part in parts]

    @contextmanager
    def agree(self) -> Iterator[None]:
        """What each process does for itself inside (no talking there) succeeds on all or fails on all: the first that
        failed raises its error, the others :class:`Deserted`."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            failure = error
        failed = [rank for rank, text in enumerate(self.collect("" if failure is None else "x")) if text]
        if failure is not None and failed[0] == self.rank:
            raise failure
        if failed:
            raise Deserted(f"process {failed[0]} of {self.size} has failed")


ALONE = Team()


def _bytes(array: np.ndarray) -> Tensor:
    """The memory of an array; gloo does not know all of numpy's types."""
    return torch.from_numpy(array.reshape(-1).view(np.uint8))


def environment() -> tuple[int, int, int]:
    """(rank, size, number on this machine), as torchrun says; (0, 1, 0) for a process that was started alone."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1, 0
    missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UndiffuseError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} without {missing[0]}: start several processes with torchrun"
        )
    rank, size, local = (int(os.environ[name]) for name in names)
    return rank, size, local


@contextmanager
def joined(device: str = "auto") -> Iterator[tuple[Team, str]]:
    """The team of the processes that torchrun started, and the device of this one; it breaks up at the end.

    ``device`` is one kind for all (``auto``, ``cpu``, ``cuda``): with ``cuda`` each process of a machine has a GPU of
    its own. CPUs talk through gloo, GPUs through NCCL. Inside another ``joined`` this is the same team.
    """
    from .pipeline import resolve_device

    rank, size, local = environment()
    if size == 1:
        yield ALONE, resolve_device(device)
        return
    import torch.distributed as dist

    kind = resolve_device(device) if device in ("auto", "cuda") else device
    if kind not in ("cpu", "cuda"):
        raise UndiffuseError(f"--device {device}: several processes share cpu or cuda, each with a GPU of its own")
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise UndiffuseError(
                f"process {rank} is number {local} on its machine, which has {torch.cuda.device_count()} GPUs: start "
                "as many processes as GPUs (torchrun --nproc-per-node), or say --device cpu"
            )
        kind = f"cuda:{local}"
        torch.cuda.set_device(local)
    if dist.is_initialized():
        yield Team(rank, size), kind
        return
    with group(Team(rank, size), kind) as team:
        yield team, kind


@contextmanager
def group(team: Team, kind: str, store: Any = None) -> Iterator[Team]:
    """The processes can talk inside: those that torchrun started, or those that meet in ``store``."""
    import torch.distributed as dist

    who: dict[str, Any] = {} if store is None else {"store": store, "rank": team.rank, "world_size": team.size}
    dist.init_process_group("gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl", timeout=PATIENCE, **who)
    failed = True
    try:
        yield team
        failed = False
    except RuntimeError as error:
        if not lost(error):
            raise
        raise Deserted("a process of this run has ended; the same command goes on from the last checkpoint") from None
    except (UndiffuseError, OSError) as error:
        if team.first or isinstance(error, Deserted):
            raise
        raise Failed(f"process {team.rank} of {team.size}: {error}") from error
    finally:
        gc.collect()  # what still holds the group (DDP, divided tensors in cycles) would outlive its threads
        if kind == "cpu" or not failed:  # NCCL would wait for the others, who end when this process does
            dist.destroy_process_group()


def lost(error: RuntimeError) -> bool:
    """Whether torch says that another process is gone."""
    import torch.distributed as dist

    words = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "gloo", "NCCL")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)
