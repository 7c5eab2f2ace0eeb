"""The quality of samples during training: few of them, from the same noise each time, against the data.

One number of the features that suit the data: the sliced Wasserstein distance of points, else the Frechet distance, or
KID where there are too few samples for that. Its floor is what real data get at the same n, and nothing below it is
progress. Small n: the curve says when it stops falling; :func:`.evaluate_samples` says how good the model is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from ..data import Dataset
from ..data.base import ArrayDataset
from ..pipeline import Pipeline
from ..training.held_out import Probe, divide
from ..training.recipe import Training
from .extraction import extract, make_features, reference_features
from .metrics import Examples, measure
from .samples import ask

SEED = 0
MOST_DATA = 50_000


def quality_probe(
    data: Dataset, training: Training, device: str = "cpu", *, cache: str | os.PathLike[str] | None = None
) -> Probe:
    """The probe that ``training.quality_every`` asks for. What it needs of the data is taken from the cache, or made
    now: the features (a classifier takes minutes) and the reference (trap V8)."""
    features = make_features(None, data, cache=cache, device=device)
    real = reference_features(features, data, min(len(data), MOST_DATA), cache=cache).features.numpy()
    n = min(training.quality_samples, len(real) // 2)
    source = divide(data, training)[1]
    points = data.spec.kind == "points"
    name = "sliced_wasserstein" if points else "frechet" if n > 2 * features.dim else "kid"

    def examples(rows: np.ndarray) -> Examples:
        return Examples(vectors=rows) if points else Examples(features=rows)

    def quality(pipeline: Pipeline) -> Mapping[str, float]:
        asked = ask(pipeline, data, n, "data", source)
        values = pipeline.spec.to_data(pipeline.draw(n, seed=SEED, classes=asked.classes, cond=asked.cond))
        samples = ArrayDataset(pipeline.spec, values, None, name="samples", content="samples")
        return {
            name: measure(examples(extract(features, samples).features.numpy()), examples(real), [name])[name].value
        }

    floor = measure(examples(real[:n]), examples(real), [name])[name].floor
    said = f"Quality: {name.replace('_', ' ')} of {features.name} features, n = {n}"
    return Probe(said, quality, {} if floor is None else {name: floor}, training.quality_every, name)
