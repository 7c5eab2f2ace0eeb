"""The report of a run: it is always there, says what the files say, and stays small."""

from __future__ import annotations

import html
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training_laws import points, recipe
from undiffuse.errors import UndiffuseWarning
from undiffuse.outputs import write_png
from undiffuse.training import Curve, Evaluation, Forecast, Probe, Progress, run_training
from undiffuse.training import run as run_module
from undiffuse.training.report import Report, charts, notices, smaller

DATA = points(120)
CHOSEN = recipe(DATA, log_every=2, preview_every=4, checkpoint_every=4, evaluate_every=2, previews=4)
WHERE = Progress(8, 32, 32, 0.5, 100.0, None)


def read(out: Path) -> str:
    return (out / "report.html").read_text("utf-8")


def row(images: int, ema: float | None) -> Evaluation:
    return Evaluation(images, images, ema, ema, 0.02, 0.01, (ema,) * 4, (ema,) * 4)


def grown(*losses: float | None) -> Curve:
    import torch

    curve = Curve()
    for i, ema in enumerate(losses, 1):
        curve.add(row(100 * i, ema), torch.zeros(0))
    return curve


def test_a_run_has_its_report(tmp_path: Path) -> None:
    evil = "undiffuse train '<script>alert(1)</script>'"
    run_training(DATA, CHOSEN, tmp_path, data="<b>data</b>", command=evil)
    page = read(tmp_path)
    assert "finished" in page
    assert 'http-equiv="refresh"' not in page
    assert page.count("<script>") == 1
    assert html.escape(evil) in page
    assert "&lt;b&gt;data&lt;/b&gt;" in page
    loss = json.loads((tmp_path / "held_out.jsonl").read_text().splitlines()[-1])["ema"]
    assert f"{loss:.4f}" in page
    for title in ("Loss", "Held-out loss by noise level", "Learning rate", "Length of the gradient", "Speed"):
        assert f"<h3>{title}</h3>" in page
    assert page.count("data:image/") == 2, "the two previews"
    assert "after 32 images, update 8" in page


def test_it_refreshes_while_the_run_goes_on_and_not_after_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "REFRESH", 0)
    during = []

    def watch(where: Progress) -> None:
        during.append(read(tmp_path))
        if where.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_training(DATA, CHOSEN, tmp_path, progress=watch)
    assert all('http-equiv="refresh"' in page for page in during), "from the first update on"
    assert "stopped" in read(tmp_path)
    assert 'http-equiv="refresh"' not in read(tmp_path)


def test_a_report_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / "report.html").mkdir()
    with pytest.warns(UndiffuseWarning, match="report.html could not be written"):
        assert run_training(DATA, CHOSEN, tmp_path).state == "finished"


def test_nothing_of_the_run_is_needed_but_its_folder(tmp_path: Path) -> None:
    """Missing, cut and damaged files leave gaps."""
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"images": 4, "loss": 1}\nnonsense\n[1]\n{"images": 8, "loss": null}\n{"im'
    )
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "preview-000004.png").write_bytes(b"no picture")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    Report(tmp_path, CHOSEN).write("running", WHERE, Curve(), None, None, ())
    assert "nothing is held out" in read(tmp_path)


def test_its_size_is_bounded_however_long_the_run(tmp_path: Path) -> None:
    lines = [{"step": i, "images": i, "seconds": i, "loss": 1.0, "lr": 1.0, "grad_norm": 1.0} for i in range(1, 20_001)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "samples").mkdir()
    noise = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (300, 300, 3), np.uint8)
    path = write_png(tmp_path / "samples" / "preview-000000.png", Image.fromarray(noise))
    for i in range(1, 90):
        os.link(path, tmp_path / "samples" / f"preview-{i * 10:06d}.png")
    Report(tmp_path, CHOSEN).write("running", WHERE, grown(*[1.0] * 2000), None, None, ())
    page = read(tmp_path)
    captions = [int(n) for n in re.findall(r"<figcaption>after [\d,]+ images, update (\d+)", page)]
    assert len(captions) == 24
    assert captions == sorted(captions)
    assert (captions[0], captions[-1]) == (0, 890), "the first and the latest are kept"
    assert len(page) < 3_000_000


def test_large_pictures_become_smaller_and_small_ones_stay_as_they_are(tmp_path: Path) -> None:
    small = write_png(tmp_path / "a.png", Image.new("L", (64, 64))).read_bytes()
    assert smaller("a", small).data == small
    noise = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (1500, 1000, 3), np.uint8)
    large = smaller("b", write_png(tmp_path / "b.png", Image.fromarray(noise)).read_bytes())
    assert large.kind == "webp"
    assert len(large.data) < 400_000


def messages(curve: Curve, forecast: Forecast | None = None, total: int | None = None) -> list[str]:
    from undiffuse.training import HeldOut

    held_out = HeldOut(points(20), CHOSEN)
    where = Progress(8, 32, total, 0.5, 100.0, None)
    return [part.html() for part in notices(where, curve, forecast, held_out)]


def test_what_the_curves_mean_is_said() -> None:
    assert messages(Curve()) == []
    assert any("begins to memorise" in text for text in messages(grown(1.0, 0.5, 0.6, 0.7, 0.8)))
    assert not any("begins to memorise" in text for text in messages(grown(1.0, 0.9, 0.8, 0.7, 0.705)))
    assert any("not finite" in text for text in messages(grown(1.0, None)))
    assert any("--until-converged" in text for text in messages(grown(1.0, 0.9), total=1000))
    settled = Forecast(100, 0.4, 0.01, 0.0, 0.001, 100, 100, 100)
    assert any('class="notice good"' in text and "converged" in text for text in messages(grown(1.0), settled))


def test_probes_are_drawn_with_the_floor_of_real_data() -> None:
    from dataclasses import replace

    import torch

    curve, probe = Curve(), Probe("quality <", lambda pipeline: {}, {"distance": 0.25})
    curve.add(replace(row(4, 1.0), probes={"quality <": {"distance": 2.0}}), torch.zeros(0))
    found: list[Any] = [chart for chart in charts(CHOSEN, [], curve, None, [probe]) if chart.title == "quality <"]
    assert found[0].floors == {"real against real: distance": 0.25}
    assert found[0].lines[0].y == [2.0]
    assert "quality &lt;" in found[0].html()
