"""The worked notebook runs, cell by cell, on a tiny model of Stable Diffusion's classes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="the notebook opens a folder of diffusers")
pytest.importorskip("transformers", reason="its prompts are read with transformers")

import diffusers_models as tiny

NOTEBOOK = Path(__file__).parents[1] / "docs" / "from_diffusers.ipynb"


def test_the_notebook_runs_and_was_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells), "run it once and save it"
    tiny.sd().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL", "model")
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for cell in cells:
            capsys.readouterr()
            exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
            stored = "".join(
                line for each in cell["outputs"] if each["output_type"] == "stream" for line in each["text"]
            )
            # Numbers may differ in their last digits from machine to machine; the words may not.
            assert len(capsys.readouterr().out.split()) == len(stored.split())
    assert (tmp_path / "mine" / "model_index.json").is_file()
