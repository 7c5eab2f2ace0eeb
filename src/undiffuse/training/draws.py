"""What training draws, each a pure function: there is no state to save, and nothing that a resumed run could replay
(traps R1 to R3).

    order of the data     f(seed, epoch)
    times, noise, dropped conditions     f(seed, step), for the whole batch at once
    pictures made of an item     f(seed, step, position)

Drawing for the whole batch makes every number a function of its position in it: neither accumulation nor the number of
devices moves it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from ..conditions import Conditions
from ..data import Dataset
from ..noise import stream


def generator(seed: int, purpose: str, index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random stream of one ``purpose`` (``"noise"``, ``"order"``, ...), number ``index``: no two share a stream,
    and none is a stream that sampling uses."""
    derived = int.from_bytes(blake2b(f"undiffuse {purpose} {seed}".encode(), digest_size=8).digest(), "big") >> 1
    result = stream(derived, index)
    if torch.device(device).type == "cpu":
        return result
    return torch.Generator(device).manual_seed(result.initial_seed())


@contextmanager
def lent(seed: int, purpose: str, index: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Modules draw their first weights, and dropout its masks, from torch's global generators: inside, those are this
    stream; after it they are what they were before."""
    place, source = torch.device(device), generator(seed, purpose, index)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.set_rng_state(source.get_state())
        if place.type == "cuda":
            torch.cuda.manual_seed(source.initial_seed())
        yield


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of ``count`` items in one epoch: a permutation."""
    return torch.randperm(count, generator=generator(seed, "order", epoch)).numpy()


def batch_indices(seed: int, step: int, batch_size: int, count: int) -> np.ndarray:
    """The items of batch ``step`` (from 0): one endless sequence of epochs, cut every ``batch_size`` items.

    Nothing is dropped at the end of an epoch: a batch may hold the last items of one and the first of the next.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = places // count
    return np.concatenate(
        [epoch_order(seed, int(e), count)[places[epochs == e] % count] for e in range(epochs[0], epochs[-1] + 1)]
    )


@dataclass(frozen=True, eq=False)
class Draws:
    """The random numbers of one update, one row a sample of the whole batch.

    Attributes:
        times: ``[B]`` uniform numbers in (0, 1), float64, on the CPU.
        noise: ``[B, *shape]`` standard normal.
        offset: ``[B, C]`` standard normal: the noise that is constant over a channel.
        drop: ``[B]`` uniform numbers that decide which conditions are dropped, on the CPU.
    """

    times: Tensor
    noise: Tensor
    offset: Tensor | None
    drop: Tensor


def draw(
    seed: int,
    step: int,
    batch_size: int,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    offset: bool = False,
) -> Draws:
    """What update ``step`` (from 0) draws. The same on every machine; other numbers on another kind of device."""
    tiny = torch.finfo(torch.float64).tiny  # uniform numbers are in [0, 1); quantile functions want (0, 1)
    times = torch.rand(batch_size, generator=generator(seed, "times", step), dtype=torch.float64).clamp_(min=tiny)
    noise = torch.randn(batch_size, *shape, generator=generator(seed, "noise", step, device), device=device)
    shifts = generator(seed, "offset", step, device)
    return Draws(
        times=times,
        noise=noise,
        offset=torch.randn(batch_size, shape[0], generator=shifts, device=device) if offset else None,
        drop=torch.rand(batch_size, generator=generator(seed, "drop", step)),
    )


def told(
    conditions: Conditions | None, dataset: Dataset, items: Sequence[int] | np.ndarray, first: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Real items that are not learned from, ``[B, *shape]`` in model units, and all that a model is told of them, a row
    each: classes, captions, attributes, numbers, and the picture made of it, which for place ``first + i`` is always
    drawn alike. What the data do not say is left out."""
    x0, said = dataset.batch(items)
    if conditions is None:
        return x0, {}
    made = conditions.made(x0, lambda i: generator(0, "picture", first + i))
    return x0, {**conditions.values(said, dataset.captions(items)), **made}
