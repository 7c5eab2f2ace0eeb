"""Shared by tests/training: tiny data, a tiny recipe, and what makes two trainers equal to the last bit."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from undiffuse.data import Dataset, from_array
from undiffuse.training import Recipe, Trainer, make_recipe
from undiffuse.training import checkpoint as checkpoints


def points(count: int = 10, classes: int = 2) -> Dataset:
    """A few fixed points in the plane, with classes."""
    generator = np.random.Generator(np.random.PCG64(7))
    values = generator.normal(size=(count, 2)).astype(np.float32)
    return from_array(values, np.arange(count) % classes if classes else None)


def recipe(dataset: Dataset, *, images: int = 32, batch_size: int = 4, **training: object) -> Recipe:
    """The tiny recipe, tinier still."""
    base = make_recipe("tiny", dataset.spec, len(dataset))
    small = replace(base.model, network={"width": 8, "blocks": 1, "embedding": 8, "octaves": 1}, condition_width=4)
    if dataset.spec.kind == "image":
        small = replace(base.model, network={"widths": [8], "blocks": [1], "attention": [0], "embedding": 8})
    changed = replace(base.training, images=images, batch_size=batch_size, **training)  # type: ignore[arg-type]
    return replace(base, model=small, training=changed, optimiser=replace(base.optimiser, warmup=8))


def bits(trainer: Trainer) -> str:
    """A fingerprint of everything that a trainer carries from one update to the next."""
    snapshot = trainer.snapshot()
    digest = hashlib.sha256(repr(sorted(snapshot.numbers.items())).encode())
    for group, tensors in sorted(snapshot.tensors.items()):
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{group} {name} {tensor.dtype}".encode())
            digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, without the times."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def same_run(a: Path, b: Path) -> None:
    """Two finished runs are the same: every bit of every checkpoint that both keep, the exported model, the metrics."""
    steps, others = ([path.name for path in checkpoints.listed(run / "checkpoints")] for run in (a, b))
    assert steps[-1] == others[-1]
    steps = [step for step in steps if step in others]
    files = [f"checkpoints/{step}/{group}.safetensors" for step in steps for group in ("weights", "ema", "optimiser")]
    for file in [*files, "model/model.safetensors"]:
        assert (a / file).read_bytes() == (b / file).read_bytes(), file
    assert metrics(a) == metrics(b)


def through_disk(trainer: Trainer, folder: Path) -> checkpoints.Checkpoint:
    """The checkpoint that a fresh process would find."""
    checkpoints.save(folder, trainer.snapshot(), {}, keep=1)
    found = checkpoints.newest(folder)
    assert found is not None
    return found
