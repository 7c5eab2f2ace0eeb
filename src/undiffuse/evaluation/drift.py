"""How a video changes from frame to frame, and how far it gets from its beginning."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import UndiffuseError
from .intervals import Measured, from_influence
from .statistics import Array, rows_of


@dataclass(frozen=True)
class Drift:
    """Root mean square differences in the units of the data, each the mean over videos with its interval.

    Neither is good when large or small: like the data's is right. A flickering video has large ``steps``; a frozen one
    has none; one that loses its scene gets farther ``from_first`` than the data does.
    """

    mean_step: Measured
    steps: tuple[Measured, ...]  # between frames t and t + 1
    from_first: tuple[Measured, ...]  # between frames 0 and t + 1


def drift(videos: Array) -> Drift:
    """Of videos ``[N, C, T, H, W]``, T at least 2."""
    shape = tuple(videos.shape)
    if len(shape) != 5 or shape[2] < 2:
        raise UndiffuseError(f"drift is of videos [N, C, T, H, W] with two frames or more, got the shape {shape}")
    flat = rows_of(videos, "the videos", 2).reshape(shape)
    steps, away = np.empty((2, shape[0], shape[2] - 1))
    for i, video in enumerate(flat):
        frames = np.moveaxis(video, 1, 0).reshape(shape[2], -1).astype(np.float64)
        steps[i] = np.sqrt(((frames[1:] - frames[:-1]) ** 2).mean(axis=1))
        away[i] = np.sqrt(((frames[1:] - frames[0]) ** 2).mean(axis=1))
    return Drift(_mean(steps.mean(axis=1)), tuple(map(_mean, steps.T)), tuple(map(_mean, away.T)))


def _mean(values: np.ndarray) -> Measured:
    return from_influence(float(values.mean()), values, least=0.0)
