"""What a classifier says of the samples: Inception score, accuracy, calibration, and which classes are there at all."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp

import numpy as np
import torch

from ..errors import UndiffuseError
from .intervals import Measured, from_groups, from_influence, grouped, wilson
from .statistics import Array, as_array, rows_of

BINS = 15


def inception_score(probabilities: Array) -> Measured:
    """``exp(mean_i KL(p(y|x_i) || p(y)))`` of class probabilities ``[N, C]`` (Salimans et al. 2016, arXiv:1606.03498).

    From 1 to C, higher is better. It never looks at the data: one perfect picture of each class scores C. All rows at
    once, where the paper averages over ten parts; the interval (influence) is of the logarithm.
    """
    p = _probabilities(probabilities)
    marginal = p.mean(axis=0)
    ratio = np.divide(p, marginal, out=np.ones_like(p), where=p > 0)  # 0 log 0 = 0
    divergence = (p * np.log(ratio)).sum(axis=1)
    # d/dp of the marginal's own entropy is -log marginal, so a row's influence is its divergence less their mean.
    found = from_influence(float(divergence.mean()), divergence, least=0.0)
    return Measured(exp(found.value), exp(found.low), min(exp(found.high), float(p.shape[1])))


def accuracy(probabilities: Array, labels: Array) -> Measured:
    """The share of rows whose most probable class is the one asked for; labels ``[N]`` are 0..C-1.

    The classifier's own accuracy on real rows, which is the floor, bounds what this can say.
    """
    p = _probabilities(probabilities)
    asked = _labels(labels, p.shape[1], len(p))
    return wilson(int((p.argmax(axis=1) == asked).sum()), len(p))


@dataclass(frozen=True, eq=False)
class Calibration:
    """Whether a classifier that says 80 % is right in 80 % of the cases.

    ``error`` is the expected calibration error (Guo et al. 2017, arXiv:1706.04599, eq. 3): |accuracy - confidence| of
    bins of confidence, weighted by their rows. It is too large by chance at small n, as its floor shows. The curve:
    ``confidence``, ``right`` and ``count`` of each bin that has rows.
    """

    error: Measured
    confidence: np.ndarray
    right: tuple[Measured, ...]
    count: np.ndarray


def calibration(probabilities: Array, labels: Array) -> Calibration:
    """Of class probabilities ``[N, C]`` and the labels ``[N]`` asked for, in 15 bins of equal width."""
    p = _probabilities(probabilities)
    asked = _labels(labels, p.shape[1], len(p))
    confidence, right = p.max(axis=1), p.argmax(axis=1) == asked
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)

    def error(rows: np.ndarray | slice) -> float:
        gap = np.bincount(bins[rows], weights=right[rows] - confidence[rows])
        return float(np.abs(gap).sum() / len(bins[rows]))

    value = error(slice(None))
    without = [error(np.delete(np.arange(len(p)), group)) for group in grouped(len(p))]
    filled = np.unique(bins)
    return Calibration(
        from_groups(value, np.array(without), least=0.0, most=1.0),
        np.array([confidence[bins == b].mean() for b in filled]),
        tuple(wilson(int(right[bins == b].sum()), int((bins == b).sum())) for b in filled),
        np.array([(bins == b).sum() for b in filled]),
    )


@dataclass(frozen=True)
class ClassBalance:
    """The classes of the samples against those of the data, and what to draw of it.

    ``p_value`` is that of a chi-square test of homogeneity: how probable a difference this large is if both come from
    the same classes. Classes of which fewer than five are expected are counted as one. ``missing`` are classes of the
    data of which there is no sample, though ``expected`` has one or more.
    """

    samples: tuple[int, ...]
    data: tuple[int, ...]
    expected: tuple[float, ...]  # samples of each class, if their shares were the data's
    shares: tuple[Measured, ...]  # of the samples
    missing: tuple[int, ...]
    chi_square: float
    degrees: int
    p_value: float


def class_balance(samples: Array, data: Array, classes: int | None = None) -> ClassBalance:
    """The histogram of the samples' classes ``[N]`` against the data's ``[M]``, both 0..classes-1.

    For an unconditional model, or one asked for classes as frequent as the data's: a plan of equal classes differs from
    unequal data by itself (trap G6).
    """
    count = classes or 1 + int(max(np.max(as_array(labels), initial=0) for labels in (samples, data)))
    table = np.stack([np.bincount(_labels(labels, count), minlength=count) for labels in (samples, data)])
    n, m = table.sum(axis=1)
    expected = table.sum(axis=0) * np.array([[n], [m]]) / (n + m)
    rare = expected.min(axis=0) < 5
    pool = [np.concatenate([t[:, ~rare], t[:, rare].sum(axis=1, keepdims=True)], axis=1) for t in (table, expected)]
    seen = pool[1].min(axis=0) > 0
    statistic = float((((pool[0] - pool[1]) ** 2)[:, seen] / pool[1][:, seen]).sum())
    degrees = max(int(seen.sum()) - 1, 0)
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    wanted = table[1] * n / m
    return ClassBalance(
        tuple(table[0].tolist()),
        tuple(table[1].tolist()),
        tuple(wanted.tolist()),
        tuple(wilson(int(c), int(n)) for c in table[0]),
        tuple(np.flatnonzero((table[0] == 0) & (wanted >= 1)).tolist()),
        statistic,
        degrees,
        float(torch.special.gammaincc(half[0], half[1])) if degrees else 1.0,
    )


def clip_score(images: Array, texts: Array) -> Measured:
    """``100 max(cos(image, text), 0)`` of matching embeddings ``[N, D]``, mean (Hessel et al. 2021, arXiv:2104.08718,
    without their factor 2.5: the usual scale). Higher is better; prompts must have been cut with their end token
    kept (trap V11), which is the affair of who embeds them."""
    a, b = (rows_of(v, name, 2).astype(np.float64) for v, name in ((images, "the images"), (texts, "the texts")))
    if a.shape != b.shape:
        raise UndiffuseError(f"a CLIP score needs one text an image: embeddings of {a.shape} and {b.shape}")
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    if not lengths.all():
        raise UndiffuseError(f"row {int(np.argmin(lengths))}: an embedding of length 0 has no direction")
    score = 100 * np.maximum((a * b).sum(axis=1) / lengths, 0)
    return from_influence(float(score.mean()), score, least=0.0)


def _probabilities(values: Array) -> np.ndarray:
    p = rows_of(values, "the class probabilities", 2).astype(np.float64)
    if p.min() < 0 or np.abs(p.sum(axis=1) - 1).max() > 1e-3:
        raise UndiffuseError("the class probabilities of a row must be at least 0 and sum to 1: were they logits?")
    return p / p.sum(axis=1, keepdims=True)


def _labels(values: Array, classes: int, n: int | None = None) -> np.ndarray:
    labels = as_array(values)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != (len(labels) if n is None else n):
        raise UndiffuseError(f"labels are one integer a row: got {labels.dtype} of the shape {labels.shape}")
    if not len(labels) or labels.min() < 0 or labels.max() >= classes:
        raise UndiffuseError(f"labels are 0 to {classes - 1}, at least one")
    return labels
