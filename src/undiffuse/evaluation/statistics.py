"""Mean and covariance of any number of rows in the memory of one covariance, and merged over parts and ranks.

    with a, b two parts,  off = m_b - m_a,  n = n_a + n_b:
    mean    = m_a + off n_b / n
    scatter = S_a + S_b + off off^T n_a n_b / n             (Chan, Golub & LeVeque 1983, eq. 2.1)

Each part is centred by its own mean before anything is squared, so a large mean costs no digits. Everything is float64
(trap V6), and the order and the size of the parts matter to rounding only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from ..errors import UndiffuseError

ROWS = 1024  # read at a time: 16 MB of 2,048 features

Array = np.ndarray | Tensor


def as_array(values: Array) -> np.ndarray:
    """On the CPU, in numpy; bfloat16, which numpy has not, in float32."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return np.asarray(values)


def rows_of(values: Array, name: str, least: int = 1) -> np.ndarray:
    """``values`` as ``[N, D]`` numbers of their own type, anything behind the first dimension made flat.

    Raises :class:`UndiffuseError` for fewer than ``least`` rows, for no columns, for what is not a number, and for NaN
    or infinity.
    """
    array = as_array(values)
    if array.dtype.kind not in "fiub":
        raise UndiffuseError(f"{name}: numbers are needed, not {array.dtype}")
    if array.ndim < 1 or len(array) < least:
        raise UndiffuseError(f"{name}: at least {least} rows are needed, got the shape {array.shape}")
    array = array.reshape(len(array), -1)
    if not array.shape[1]:
        raise UndiffuseError(f"{name}: rows without numbers, of the shape {array.shape}")
    if array.dtype.kind == "f":
        for begin in range(0, len(array), ROWS):  # in parts: the mask of all would be another copy
            finite = np.isfinite(array[begin : begin + ROWS]).all(axis=1)
            if not finite.all():
                raise UndiffuseError(f"{name}: row {begin + int(np.argmin(finite))} holds NaN or infinity")
    return array


def alike(samples: Array, data: Array, least: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Both as checked rows of the same width."""
    a, b = rows_of(samples, "the samples", least), rows_of(data, "the data", least)
    if a.shape[1] != b.shape[1]:
        raise UndiffuseError(f"the samples have {a.shape[1]} numbers a row and the data {b.shape[1]}")
    return a, b


def numbered(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A number for each row of both, the same for rows that are equal."""
    first: dict[bytes, int] = {}

    def number(row: np.ndarray) -> int:
        key = blake2b(row.astype(np.float64).tobytes(), digest_size=16).digest()
        return first.setdefault(key, len(first))

    return np.array([number(row) for row in a]), np.array([number(row) for row in b])


def parts(array: np.ndarray, size: int = ROWS) -> Iterator[np.ndarray]:
    """``array`` in float64, ``size`` rows at a time."""
    for begin in range(0, len(array), size):
        yield array[begin : begin + size].astype(np.float64)


@dataclass(frozen=True, eq=False)
class Moments:
    """How many rows there were, their mean ``[D]``, and the sum of their centred outer products ``[D, D]``; float64.

    ``a + b`` are the moments of both together: of two batches, or of two ranks.
    """

    n: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, rows: Array) -> Moments:
        """The moments of ``[N, D]``."""
        return sum((cls._of_part(part) for part in parts(rows_of(rows, "the rows"))), cls(0, np.zeros(0), np.zeros(0)))

    @classmethod
    def stream(cls, batches: Iterable[Array]) -> Moments:
        """The moments of all ``batches``, each ``[B, D]``, of which one is in memory at a time."""
        total = sum((cls.of(batch) for batch in batches), cls(0, np.zeros(0), np.zeros(0)))
        if not total.n:
            raise UndiffuseError("no batch to take the moments of")
        return total

    @classmethod
    def _of_part(cls, part: np.ndarray) -> Moments:
        mean = part.mean(axis=0)
        off = part - mean
        return cls(len(part), mean, off.T @ off)

    def __add__(self, other: Moments) -> Moments:
        if not self.n or not other.n:
            return self if self.n else other
        if self.mean.shape != other.mean.shape:
            raise UndiffuseError(f"moments of {len(self.mean)} and of {len(other.mean)} numbers a row do not add up")
        n, off = self.n + other.n, other.mean - self.mean
        scatter = self.scatter + other.scatter
        scatter += np.outer(off, off * (self.n * other.n / n))
        return Moments(n, self.mean + off * (other.n / n), scatter)

    @property
    def covariance(self) -> np.ndarray:
        """``[D, D]``, unbiased (divided by n - 1)."""
        if self.n < 2:
            raise UndiffuseError("the covariance of fewer than two rows is not defined")
        if not np.isfinite(self.scatter).all():
            raise UndiffuseError("the numbers are too large: their squares are infinite")
        return self.scatter / (self.n - 1)

    @property
    def rank(self) -> int:
        """Of the covariance: how many directions the rows vary in, to rounding; n - 1 at most."""
        return int(np.linalg.matrix_rank(self.scatter, hermitian=True))
