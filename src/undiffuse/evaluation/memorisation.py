"""Are the samples new? How near each is to the training set, against how near real data is.

The distance of a sample to its nearest training row means nothing by itself. Beside it stand the distances of real rows
that were not trained on (held out), or, without such, of training rows to their nearest *other* one. Rows that are
equal do not meet there: neither duplicates in the training set nor held-out rows that are in it hide a copy. A sample
is *suspicious* when it is nearer than 99 % of those are: of new real data, 1 % would be. The set is called memorised
when the share of suspicious samples is surely above what chance gives, both shares with their intervals.

Pictures are compared under shifts: a copy moved by one pixel is far away in pixel space. All but a margin of each
sample is held against every window of that size of the training pictures, and so are the real ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..errors import UndiffuseError
from .intervals import Measured, wilson
from .neighbours import blocks, squared_distances
from .statistics import Array, as_array, numbered, rows_of

SUSPICIOUS = 0.01  # the share of real rows that are as near as that
LEAST = 100  # real rows, without which there is no such percentile
REFERENCE = 2000  # real rows whose distances are measured, at most
CLOSEST = 10


@dataclass(frozen=True)
class Pair:
    """A sample and its nearest training row, by their indices."""

    sample: int
    training: int
    distance: float


@dataclass(frozen=True, eq=False)
class Memorisation:
    """What was found in one space. The arrays are there to be drawn.

    ``share`` are the suspicious samples, ``chance`` what it would be of new real rows, with the interval that comes
    from knowing the threshold from finitely many. A few copies among many samples do not move a share: ``copies``
    counts the samples less than half as far as the nearest of the real rows; of those, look at the ``closest`` pairs.
    """

    memorised: bool
    copies: int
    share: Measured
    chance: Measured
    threshold: float
    closest: tuple[Pair, ...]
    reference: str
    distances: np.ndarray  # [N], of each sample
    nearest: np.ndarray  # [N], its training row
    real: np.ndarray  # [R], of real rows

    def to_json(self) -> dict[str, object]:
        """All but the arrays; ``median`` distances for them."""
        return {
            "memorised": self.memorised,
            "copies": self.copies,
            "share": {
                "value": self.share.value,
                "interval": [self.share.low, self.share.high],
                "n": len(self.distances),
            },
            "chance": {
                "value": self.chance.value,
                "interval": [self.chance.low, self.chance.high],
                "n": len(self.real),
            },
            "threshold": self.threshold,
            "median": float(np.median(self.distances)),
            "median_real": float(np.median(self.real)),
            "reference": self.reference,
            "closest": [{"sample": p.sample, "training": p.training, "distance": p.distance} for p in self.closest],
        }


def memorisation(
    samples: Array, training: Array, held_out: Array | None = None, *, shifts: int = 0, seed: int = 0
) -> Memorisation:
    """Whether the samples repeat the training set, in the space that they are given in: features ``[N, D]``, or
    pictures ``[N, C, H, W]`` (or ``[N, H, W]``) with ``shifts``.

    Args:
        samples: ``[N, ...]``.
        training: ``[M, ...]``, what the model was trained on, all of it.
        held_out: ``[R, ...]``, real, and not trained on: the better reference.
        shifts: Compare pictures moved by up to so many pixels, up, down and to the sides; costs (2 shifts + 1)^2 as
            much.
        seed: Of which real rows are measured, when they are more than 2,000.

    Raises:
        UndiffuseError: shapes that differ, too few rows, shifts of what are no pictures.
    """
    rows_of(samples, "the samples"), rows_of(training, "the training set", 2)
    kept = as_array(training)
    others = [as_array(v) for v in (samples, held_out) if v is not None]
    if held_out is not None:
        rows_of(held_out, "the held-out rows")
    if any(v.shape[1:] != kept.shape[1:] for v in others):
        raise UndiffuseError(
            f"rows of {[v.shape[1:] for v in others]} do not compare with training rows of {kept.shape[1:]}"
        )
    if shifts < 0 or (shifts and (kept.ndim < 3 or min(kept.shape[-2:]) <= 2 * shifts)):
        raise UndiffuseError(
            f"shifts of {shifts}: 0 for what are no pictures, else less than half of their {kept.shape[1:]}"
        )
    given = kept if held_out is None else others[1]
    some = np.sort(np.random.Generator(np.random.PCG64(seed)).permutation(len(given))[:REFERENCE])
    real, _ = nearest_rows(given[some], kept, shifts, numbered(given[some], kept))
    real = real[np.isfinite(real)]
    if len(real) < LEAST:
        raise UndiffuseError(f"{len(real)} different real rows to compare with: at least {LEAST} are needed")
    distances, nearest = nearest_rows(others[0], kept, shifts)
    threshold = float(np.quantile(real, SUSPICIOUS, method="lower"))
    share = wilson(int((distances <= threshold).sum()), len(distances))
    chance = wilson(int((real <= threshold).sum()), len(real))
    closest = np.argsort(distances, kind="stable")[:CLOSEST]
    return Memorisation(
        share.low > chance.high,
        int((distances < real.min() / 2).sum()),
        share,
        chance,
        threshold,
        tuple(Pair(int(i), int(nearest[i]), float(distances[i])) for i in closest),
        f"{len(real):,} training rows, each against the others" if held_out is None else f"{len(real):,} held-out rows",
        distances,
        nearest,
        real,
    )


def nearest_rows(
    rows: np.ndarray,
    training: np.ndarray,
    shifts: int = 0,
    leave_out: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The Euclidean distance ``[N]`` of each row to its nearest training row, and which that is ``[N]``.

    ``leave_out`` gives each row ``[N]`` and each training row ``[M]`` a number; rows of the same number do not meet. A
    row that meets none is infinitely far.
    """
    best, where = np.full(len(rows), np.inf), np.zeros(len(rows), dtype=int)
    inner = _window(rows, shifts, shifts, shifts)
    for i in blocks(len(rows)):
        mine = inner[i].reshape(len(inner[i]), -1).astype(np.float64)
        for j in blocks(len(training)):
            for theirs in _windows(training[j], shifts):
                square = squared_distances(mine, theirs)
                if leave_out is not None:
                    square[leave_out[0][i, None] == leave_out[1][j]] = np.inf
                place = square.argmin(axis=1)
                found = square[np.arange(len(mine)), place]
                where[i] = np.where(found < best[i], place + j.start, where[i])
                best[i] = np.minimum(found, best[i])
    return np.sqrt(best), where


def _window(pictures: np.ndarray, shifts: int, down: int, right: int) -> np.ndarray:
    """Of each picture all but ``2 * shifts`` rows and columns, beginning there."""
    if not shifts:
        return pictures
    height, width = (size - 2 * shifts for size in pictures.shape[-2:])
    return pictures[..., down : down + height, right : right + width]


def _windows(pictures: np.ndarray, shifts: int) -> Iterator[np.ndarray]:
    """Every window as rows, float64."""
    for down in range(2 * shifts + 1):
        for right in range(2 * shifts + 1):
            yield _window(pictures, shifts, down, right).reshape(len(pictures), -1).astype(np.float64)
