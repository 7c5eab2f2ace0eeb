"""Checkpoints and models of earlier versions: each folder of old/ is a run of that version, and stays readable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from training_laws import points
from undiffuse.pipeline import Pipeline
from undiffuse.training import checkpoint, prove_resume

OLD = sorted(path for path in Path(__file__).with_name("old").iterdir() if path.is_dir())


@pytest.mark.parametrize("folder", OLD, ids=[path.name for path in OLD])
def test_CK8_A13_a_run_of_an_earlier_version_goes_on_and_samples_the_same(folder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(folder, tmp_path / "run"))
    assert sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) < 50_000
    found = checkpoint.newest(run / "checkpoints")
    assert found is not None
    assert found.step == 8
    assert prove_resume(run, points(), device="cpu").exact
    samples = Pipeline.load(run).sample(6, seed=1)
    assert np.allclose(samples, json.loads((run / "samples.json").read_text()), atol=1e-4)


def test_there_is_one() -> None:
    assert OLD
