"""Make the model that ships with the studio again: ``python -m undiffuse.studio.remake`` (a minute on two quiet cores).

It is the model of ``undiffuse demo`` with its weights rounded to 16 bits (samples move by about 0.001 of the data's
deviation), and the first digit of each class to begin from.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np

from ..commands.train import train
from ..config import write_bytes_atomic
from ..data import open_dataset
from ..pipeline import Pipeline
from .app import MODEL


def examples() -> bytes:
    """``examples.npz``: ``values`` and ``labels`` of the first digit of each class."""
    values, labels = (data := open_dataset("digits")).read(np.arange(len(data)))
    assert labels is not None
    first = np.unique(labels, return_index=True)[1]
    buffer = io.BytesIO()
    np.savez(buffer, values=values[first], labels=labels[first])
    return buffer.getvalue()


def remake(folder: Path = MODEL) -> None:
    """Train, and replace what is in ``folder``."""
    with tempfile.TemporaryDirectory() as out:
        train("digits", out=Path(out) / "run", recipe="digits", seed=0)
        pipeline = Pipeline.load(Path(out) / "run")
        pipeline.save(folder, {name: weight.half() for name, weight in pipeline.denoiser.state_dict().items()})
    write_bytes_atomic(folder / "examples.npz", examples())


if __name__ == "__main__":
    remake()
