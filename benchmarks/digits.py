"""Are the digits right, and are they new? Trains the ``digits`` recipe and judges 1,000 class-conditional samples.

    python benchmarks/digits.py [--run FOLDER] [--seed N] [--out digits.json]

- *Named right*: a support-vector classifier (RBF) trained on the 1,797 real digits names the class that was asked for.
  Its own accuracy on digits that it has not seen (5-fold cross-validation) is printed beside it.
- *Near copy*: the sample is nearer to its nearest training image (Euclidean distance of the 64 pixels in the data's
  units 0..16) than 99 % of real digits are to their nearest other one (`undiffuse.memorisation`). About 1 % of new real
  digits would be called copies too.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC

from undiffuse import Pipeline, memorisation, open_dataset
from undiffuse.training import make_recipe, run_training

SAMPLES = 1000


def classifier() -> SVC:
    """Untrained; pixels come as 0..16."""
    return SVC(gamma=0.001, C=10)


def judge(samples: np.ndarray, asked: np.ndarray, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """The figures for samples ``[N, 8, 8]`` in the data's units whose classes were ``asked``."""
    real, drawn = images.reshape(len(images), -1).astype(float), samples.reshape(len(samples), -1).astype(float)
    named = classifier().fit(real, labels).predict(drawn)
    found = memorisation(drawn, real)
    return {
        "samples": len(samples),
        "named_right": float((named == asked).mean()),
        "named_right_worst_class": float(min((named == asked)[asked == c].mean() for c in np.unique(asked))),
        "near_copies": found.share.value,
        "near_copies_95_percent": [found.share.low, found.share.high],
        "near_copies_of_new_digits": found.chance.value,
        "near_copy_distance": found.threshold,
        "median_distance_to_training": float(np.median(found.distances)),
        "median_distance_real_to_real": float(np.median(found.real)),
        "memorised": found.memorised,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, help="keep the run in this folder, or judge the finished run that is there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    dataset = open_dataset("digits")
    images, labels = dataset.read(range(len(dataset)))
    assert labels is not None
    recipe = make_recipe("digits", dataset.spec, len(dataset))
    used = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        result = run_training(
            dataset,
            recipe,
            options.run or Path(scratch) / "run",
            seed=options.seed,
            device="cpu",
            data="digits",
            say=print,
        )
        pipeline = Pipeline.load(result.model)
    used, begun = time.process_time() - used, time.monotonic()
    samples = pipeline.sample(SAMPLES, seed=options.seed, classes=list(range(10)))
    sampling = time.monotonic() - begun
    asked = np.arange(SAMPLES) % 10
    flat = images.reshape(len(images), -1).astype(float)
    report = {
        "training_seconds": round(result.seconds, 1),
        "training_cpu_seconds": round(used, 1),
        "sampling_seconds": round(sampling, 1),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "updates": result.step,
        "images": result.images,
        "parameters": sum(p.numel() for p in pipeline.denoiser.parameters()),
        "classifier_accuracy_held_out": float(cross_val_score(classifier(), flat, labels, cv=5).mean()),
        **judge(samples, asked, images, labels),
    }
    for name, value in report.items():
        print(f"{name.replace('_', ' '):32} {f'{value:.4g}' if isinstance(value, float) else value}")
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
