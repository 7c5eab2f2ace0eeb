"""Every metric under its name, and :func:`measure`, which gives each figure its n, its interval and its floor.

The **floor** is the same metric of real against real, with the same numbers of rows on both sides: what a perfect
generator would get. To have it, some real rows must stand where the samples stand, and be missing from the data that
both are compared with:

- with ``held_out`` real rows (a test set): n of them against the data;
- without: n rows are drawn from the data at random (``seed``) and set aside, and both the samples and they are
  compared with the rest. So n is at most half of the data; of more samples, n are drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from ..errors import UndiffuseError, choose
from .classes import accuracy, calibration, clip_score, inception_score
from .drift import drift
from .frechet import frechet, frechet_infinity
from .intervals import Measured
from .kid import kid, mmd
from .precision_recall import precision_recall
from .statistics import Array, as_array, numbered
from .wasserstein import sliced_wasserstein


@dataclass(frozen=True, eq=False)
class Examples:
    """What metrics look at: any of these arrays, whose first dimension counts the same examples.

    ``features`` ``[N, D]`` are an extractor's; ``vectors`` ``[N, D]`` low-dimensional data itself; ``probabilities``
    ``[N, C]`` a classifier's; ``labels`` ``[N]`` the classes asked for, 0..C-1; ``images`` and ``texts`` ``[N, D]``
    embeddings in one space; ``videos`` ``[N, C, T, H, W]``.
    """

    features: Array | None = None
    vectors: Array | None = None
    probabilities: Array | None = None
    labels: Array | None = None
    images: Array | None = None
    texts: Array | None = None
    videos: Array | None = None

    def __post_init__(self) -> None:
        lengths = {name: len(array) for name, array in self.arrays().items()}
        if len(set(lengths.values())) != 1:
            said = ", ".join(f"{length} {name}" for name, length in lengths.items()) or "no arrays"
            raise UndiffuseError(f"examples need one row each in every array, got {said}")

    def __len__(self) -> int:
        return len(next(iter(self.arrays().values())))

    def arrays(self) -> dict[str, Array]:
        """Those that are there."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    def take(self, rows: np.ndarray) -> Examples:
        """Some of the examples."""
        return Examples(**{name: array[rows] for name, array in self.arrays().items()})

    def part(self, names: Sequence[str]) -> list[Array]:
        """The arrays of these names, all of which must be there."""
        arrays = self.arrays()
        return [arrays[name] for name in names]


Better = Literal["lower", "higher", "as the data"]


@dataclass(frozen=True)
class Metric:
    """A metric: a function of the arrays that it ``needs``, and how to read each of the figures that it gives.

    ``measure(*samples' arrays, *data's arrays, allow_small=...)`` returns the figures in the order of ``better``; a
    metric of one side (``against`` False) is given the samples' arrays only. ``asked`` only: left out unless named.
    """

    measure: Callable[..., tuple[Measured, ...]]
    needs: tuple[str, ...]
    better: dict[str, Better]
    interval: str
    against: bool = True
    asked: bool = False


@dataclass(frozen=True)
class Figure:
    """One number that can be cited: the 95 % interval around it, from how many examples, and the floor.

    ``n`` samples were compared with ``n_data`` rows; the floor is that of ``n`` real rows compared with the same
    ``n_data``.
    """

    name: str
    value: float
    low: float
    high: float
    n: int
    n_data: int | None  # None: the metric does not look at the data
    floor: float | None  # None: the data lacks what the metric needs
    floor_low: float | None
    floor_high: float | None
    better: Better
    interval: str  # how low and high were found
    split: str  # which real rows the floor is of
    note: str = ""

    def __str__(self) -> str:
        floor = "no floor" if self.floor is None else f"floor {self.floor:.4g}"
        return f"{self.name} {self.value:.4g} [{self.low:.4g}, {self.high:.4g}], {floor}, n = {self.n:,}"


TWO, ONE = "influence of samples and data", "influence of samples"
FEATURES, VECTORS = ("features",), ("vectors",)
METRICS: dict[str, Metric] = {
    "frechet": Metric(lambda a, b, small: (frechet(a, b, allow_small=small),), FEATURES, {"frechet": "lower"}, TWO),
    "frechet_infinity": Metric(
        lambda a, b, small: (frechet_infinity(a, b, allow_small=small),),
        FEATURES,
        {"frechet_infinity": "lower"},
        TWO,
        asked=True,
    ),
    "kid": Metric(lambda a, b, small: (kid(a, b),), FEATURES, {"kid": "lower"}, TWO),
    "precision_recall": Metric(
        lambda a, b, small: precision_recall(a, b),
        FEATURES,
        {"precision": "higher", "recall": "higher", "density": "higher", "coverage": "higher"},
        "groups, and Wilson's of a share",
    ),
    "sliced_wasserstein": Metric(
        lambda a, b, small: (sliced_wasserstein(a, b),), VECTORS, {"sliced_wasserstein": "lower"}, "groups"
    ),
    "mmd": Metric(lambda a, b, small: (mmd(a, b),), VECTORS, {"mmd": "lower"}, TWO),
    "inception_score": Metric(
        lambda p, small: (inception_score(p),), ("probabilities",), {"inception_score": "higher"}, ONE, against=False
    ),
    "accuracy": Metric(
        lambda p, y, small: (accuracy(p, y),),
        ("probabilities", "labels"),
        {"accuracy": "higher"},
        "Wilson",
        against=False,
    ),
    "calibration": Metric(
        lambda p, y, small: (calibration(p, y).error,),
        ("probabilities", "labels"),
        {"calibration_error": "lower"},
        "groups",
        against=False,
    ),
    "clip_score": Metric(
        lambda a, b, small: (clip_score(a, b),), ("images", "texts"), {"clip_score": "higher"}, ONE, against=False
    ),
    "drift": Metric(lambda v, small: (drift(v).mean_step,), ("videos",), {"drift": "as the data"}, ONE, against=False),
}
HAD = {
    "features": "any data",
    "vectors": "points and small arrays",
    "probabilities": "data with classes, by the features classifier",
    "labels": "models and data with classes",
    "images": "pictures with captions, by the features clip",
    "texts": "pictures with captions, by the features clip",
    "videos": "videos",
}
"""What has which of the :class:`Examples`, for errors."""


def measure(
    samples: Examples,
    data: Examples,
    metrics: Sequence[str] | None = None,
    *,
    held_out: Examples | None = None,
    seed: int = 0,
    allow_small: bool = False,
) -> dict[str, Figure]:
    """Every figure of the ``metrics`` named, by default of all whose arrays are there, with interval and floor.

    Args:
        samples: The generated ones.
        data: Real ones.
        metrics: Names of ``METRICS``.
        held_out: Real ones that are not among the data, from the same source.
        seed: Of the rows that are set aside or left out.
        allow_small: Go on with fewer rows than features (trap V4); it warns, and every such figure has a note.

    Raises:
        UndiffuseError: an unknown name, an array that a named metric needs and that is not there, too few rows,
            held-out rows most of which are rows of the data.
    """
    there = samples.arrays().keys() & data.arrays().keys() & (held_out or data).arrays().keys()
    names = fitting(samples, data, held_out) if metrics is None else list(metrics)
    random = np.random.Generator(np.random.PCG64(seed))
    n = min(len(samples), len(data) // 2 if held_out is None else len(held_out))
    if n < 2:
        raise UndiffuseError(f"{len(samples)} samples and {len(data)} rows of data leave nothing to compare")
    if held_out is None:
        order = random.permutation(len(data))
        real, data = data.take(np.sort(order[:n])), data.take(np.sort(order[n:]))
        split = f"{n} rows of the data set aside at random, seed {seed}"
    else:
        real, split = held_out.take(_some(len(held_out), n, random)), f"{n} held-out rows"
        shared = _shared(real, data)
        if shared > n // 2:
            raise UndiffuseError(f"{shared} of {n} held-out rows are rows of the data: their floor would be no floor")
        split += f", {shared} of them also in the data" if shared else ""
    drawn = samples.take(_some(len(samples), n, random))
    figures: dict[str, Figure] = {}
    for name in names:
        metric = choose("metric", name, METRICS)
        for need in metric.needs:
            if need not in (there if metric.against else samples.arrays()):
                sides = "both sides" if metric.against else "samples"
                raise UndiffuseError(f"the metric {name} needs {need} of {sides} ({HAD[need]})")
        against = data.part(metric.needs) if metric.against else []
        found = metric.measure(*drawn.part(metric.needs), *against, allow_small)
        floored = there.issuperset(metric.needs)
        floors = metric.measure(*real.part(metric.needs), *against, allow_small) if floored else [None] * len(found)
        for (figure, better), value, floor in zip(metric.better.items(), found, floors, strict=True):
            figures[figure] = Figure(
                figure,
                value.value,
                value.low,
                value.high,
                n,
                len(data) if metric.against else None,
                floor.value if floor else None,
                floor.low if floor else None,
                floor.high if floor else None,
                better,
                metric.interval,
                split,
                value.note,
            )
    return figures


def fitting(samples: Examples, data: Examples, held_out: Examples | None = None) -> list[str]:
    """The metrics whose arrays are there, but for those that must be asked for."""
    there = samples.arrays().keys() & data.arrays().keys() & (held_out or data).arrays().keys()
    names = [
        name
        for name, metric in METRICS.items()
        if not metric.asked and there.union(() if metric.against else samples.arrays()).issuperset(metric.needs)
    ]
    if not names:
        raise UndiffuseError("no metric fits: samples and data have no arrays in common, such as features")
    return names


def _shared(real: Examples, data: Examples) -> int:
    """How many of the real rows are also rows of the data, in the widest array that both have."""
    theirs = data.arrays()
    pairs = [
        (as_array(array), as_array(theirs[name]))
        for name, array in real.arrays().items()
        if name in theirs and name != "labels"
    ]
    if not pairs:
        return 0
    return int(np.isin(*numbered(*max(pairs, key=lambda pair: pair[0][0].size))).sum())


def _some(there: int, n: int, random: np.random.Generator) -> np.ndarray:
    """``n`` of the indices 0..there-1, in order."""
    return np.sort(random.permutation(there)[:n])
