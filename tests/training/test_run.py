"""A run folder through interruptions, changes, full disks, and two processes at once."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import undiffuse
from training_laws import metrics, points, recipe, same_run
from undiffuse.commands import main
from undiffuse.config import load_json, override
from undiffuse.data import from_array
from undiffuse.errors import UndiffuseError, UndiffuseWarning
from undiffuse.pipeline import REGISTRIES, Pipeline
from undiffuse.training import Diverged, Progress, Recipe, Trainer, checkpoint, make_recipe, prove_resume, run_training
from undiffuse.training.run import SaveFailed, _Run

Screen = pytest.CaptureFixture[str]


def small(**training: Any) -> Recipe:
    """8 updates on :func:`points`, with everything happening often."""
    often = {"log_every": 3, "preview_every": 4, "checkpoint_every": 2, "previews": 4, **training}
    return recipe(points(), **often)


def run(out: Path, chosen: Recipe | None = None, **options: Any) -> Any:
    return run_training(points(), chosen or small(), out, **options)


def stop_at(step: int, number: int = signal.SIGINT) -> Callable[[Progress], None]:
    """Ctrl-C while update ``step`` is reported."""

    def progress(where: Progress) -> None:
        if where.step == step:
            os.kill(os.getpid(), number)

    return progress


def weights(out: Path) -> str:
    return Pipeline.load(out / "model").fingerprint


def test_a_run_leaves_what_it_should(tmp_path: Path) -> None:
    lines: list[str] = []
    result = run(tmp_path / "r", command="undiffuse train points", say=lines.append)
    assert (result.state, result.step, result.images, result.resumed_from) == ("finished", 8, 32, 0)
    names = {path.name for path in (tmp_path / "r").iterdir()} - {".lock"}
    assert names == {
        *("config.json", "command.txt", "env.json", "log.txt", "metrics.jsonl", "status.json"),
        *("samples", "checkpoints", "model", "report.html"),  # ten items are too few to hold any out
    }
    header = [line.split()[0] for line in lines if not line.startswith(("yellow", "red"))]  # the doctor's, on tiny data
    assert header == ["run", "data", "held", "objective", "optimiser"]
    assert "parameters" in lines[1]
    assert "terminal SNR 0" in lines[3]
    assert sum("terminal SNR" in line for line in lines) == 1
    status = load_json(tmp_path / "r" / "status.json")
    assert {k: status[k] for k in ("state", "step", "images", "total_images", "pid")} == {
        **dict.fromkeys(("images", "total_images"), 32),
        "state": "finished",
        "step": 8,
        "pid": os.getpid(),
    }
    rows = metrics(tmp_path / "r")
    assert [(row["step"], row["images"]) for row in rows] == [(3, 12), (6, 24), (8, 32)]
    assert set(rows[0]) == {"step", "images", "loss", "lr", "grad_norm"}
    assert rows[-1]["loss"] == status["loss"] == result.loss
    assert sorted(path.name for path in (tmp_path / "r" / "samples").iterdir()) == [
        "preview-000004.png",
        "preview-000008.png",
    ]
    assert [path.name for path in checkpoint.listed(tmp_path / "r" / "checkpoints")] == [
        "step-00000006",
        "step-00000008",
    ]
    config = load_json(tmp_path / "r" / "config.json")
    assert config["recipe"]["training"]["images"] == 32
    assert Pipeline.load(tmp_path / "r").info["images"] == 32


def test_the_logged_loss_is_the_mean_of_the_updates(tmp_path: Path) -> None:
    run(tmp_path)
    losses = [float(update.loss) for update in Trainer(points(), small()).updates()]
    rows = metrics(tmp_path)
    assert [row["loss"] for row in rows] == pytest.approx(
        [np.mean(losses[:3]), np.mean(losses[3:6]), np.mean(losses[6:])]
    )


@pytest.mark.parametrize("cut", range(1, 8))
def test_law_5_a_run_stopped_by_ctrl_c_goes_on_as_if_it_had_not_been(cut: int, tmp_path: Path) -> None:
    run(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", progress=stop_at(cut))
    assert load_json(tmp_path / "cut" / "status.json")["state"] == "stopped"
    assert load_json(tmp_path / "cut" / "status.json")["step"] == cut
    assert Pipeline.load(tmp_path / "cut").info["step"] == cut
    result = run(tmp_path / "cut")
    assert (result.step, result.resumed_from) == (8, cut)
    same_run(tmp_path / "straight", tmp_path / "cut")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_SG1_the_first_signal_saves_and_says_which_it_was(name: str, code: int, tmp_path: Path) -> None:
    lines: list[str] = []
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, progress=stop_at(3, number), say=lines.append)
    assert stopped.value.code == code
    assert "stopped    after update 3, saved; resume with the same command" in lines[-1]
    assert signal.getsignal(number) == before  # and the handlers are given back
    found = checkpoint.newest(tmp_path / "checkpoints")
    assert found is not None
    assert found.step == 3


def test_the_second_signal_ends_the_process_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended(BaseException):
        pass

    def end(code: int) -> None:
        raise Ended(code)

    def twice(where: Progress) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended) as ended:
        run(tmp_path, progress=twice)
    assert ended.value.args == (143,)


def test_after_a_crash_the_log_is_that_of_a_run_never_stopped(tmp_path: Path) -> None:
    """The process dies between update 6 and 7: the metrics go further than the checkpoint, and end in half a line."""
    run(tmp_path / "straight")

    def die(where: Progress) -> None:
        if where.step == 6:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "r", small(checkpoint_every=5), progress=die)
    assert load_json(tmp_path / "r" / "status.json")["state"] == "failed"
    with (tmp_path / "r" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "images"')
    result = run(tmp_path / "r", small(checkpoint_every=5))
    assert result.resumed_from == 5
    assert metrics(tmp_path / "r") == metrics(tmp_path / "straight")
    assert weights(tmp_path / "r") == weights(tmp_path / "straight")


@pytest.mark.skipif(os.name == "nt", reason="needs fork")
@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_CK2_RS2_kill_9_at_random_moments_of_a_run_changes_nothing(kills: int, tmp_path: Path) -> None:
    script = Path(__file__).with_name("kill_runs.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(script), str(tmp_path), str(kills)]
    ran = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout.split()[0]) == kills


def test_a_flipped_bit_costs_only_the_last_checkpoint(tmp_path: Path) -> None:
    run(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "r", progress=stop_at(6))
    file = tmp_path / "r" / "checkpoints" / "step-00000006" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    with pytest.warns(UndiffuseWarning, match="using the checkpoint before"):
        assert run(tmp_path / "r").resumed_from == 4
    assert weights(tmp_path / "r") == weights(tmp_path / "straight")


def test_nothing_is_begun_anew_over_damaged_checkpoints(tmp_path: Path) -> None:
    run(tmp_path)
    for path in checkpoint.listed(tmp_path / "checkpoints"):
        (path / "manifest.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UndiffuseError, match="none of the checkpoints is whole"):
            run(tmp_path)


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    run(tmp_path)
    before, lines = weights(tmp_path), list[str]()
    result = run(tmp_path, say=lines.append)
    assert (result.state, result.step, result.resumed_from) == ("finished", 8, 8)
    assert "finished already" in lines[0]
    assert weights(tmp_path) == before
    assert len(metrics(tmp_path)) == 3


def test_a_crash_between_the_last_checkpoint_and_its_model_is_mended(tmp_path: Path) -> None:
    run(tmp_path)
    before = weights(tmp_path)
    for path in (tmp_path / "model").iterdir():
        path.unlink()
    run(tmp_path)
    assert weights(tmp_path) == before


def test_another_recipe_seed_or_data_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=stop_at(2))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    other = override(small(), ["optimiser.lr=0.5"], REGISTRIES)
    with pytest.raises(UndiffuseError, match=r"recipe.optimiser.lr: 0.002 there, 0.5 here.*another --out"):
        run(tmp_path, other)
    with pytest.raises(UndiffuseError, match=r"recipe.training.images: 32 there, 64 here"):
        run(tmp_path, replace(small(), training=replace(small().training, images=64)))  # trap R6
    with pytest.raises(UndiffuseError, match=r"seed: 0 there, 1 here"):
        run(tmp_path, seed=1)
    with pytest.raises(UndiffuseError, match=r"data have changed \(10 items then, 11 now\); restore them"):
        run_training(points(11), small(), tmp_path)
    changed = points().values(range(10)).copy()
    changed[3, 0] += 1
    with pytest.raises(UndiffuseError, match="data have changed"):
        run_training(from_array(changed, np.arange(10) % 2), small(), tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_what_decides_nothing_of_the_training_may_change(tmp_path: Path) -> None:
    run(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "r", progress=stop_at(3))
    other = override(small(checkpoint_every=3, keep=3, milestone_every=5), ["sampling.steps=7"], REGISTRIES)
    run(tmp_path / "r", other)
    assert [path.name[-1] for path in checkpoint.listed(tmp_path / "r" / "checkpoints")] == ["5", "6", "8"]
    assert weights(tmp_path / "r") == weights(tmp_path / "straight")
    assert metrics(tmp_path / "r") == metrics(tmp_path / "straight")


def longer(images: int, *settings: str) -> Recipe:
    return override(small(), [f"training.images={images}", *settings], REGISTRIES)


@pytest.mark.parametrize("cut", [3, 8])
def test_trap_R6_another_length_is_planned_anew_when_asked_for(cut: int, tmp_path: Path) -> None:
    """Cut in the middle, or finished: from there on the learning rate is that of a run planned with the new length, and
    a second stop does not show."""
    rates = {}
    for images in (32, 64):
        run(tmp_path / str(images), longer(images, "training.log_every=1"))
        rates[images] = [row["lr"] for row in metrics(tmp_path / str(images))]

    def begun(name: str) -> Path:
        stop = stop_at(cut) if cut < 8 else None
        try:
            run(tmp_path / name, longer(32, "training.log_every=1"), **({"progress": stop} if stop else {}))
        except KeyboardInterrupt:
            assert stop
        return tmp_path / name

    chosen = longer(64, "training.log_every=1")
    lines: list[str] = []
    with pytest.raises(UndiffuseError, match=r"training.images: 32 there, 64 here.*add --change to go on with the new"):
        run(begun("a"), chosen)
    assert run(tmp_path / "a", chosen, change=True, say=lines.append).step == 16
    assert any(line.startswith("changed    recipe.training.images: 32 there, 64 here, after upd") for line in lines)
    assert [row["lr"] for row in metrics(tmp_path / "a")] == rates[32][:cut] + rates[64][cut:]
    with pytest.raises(KeyboardInterrupt):
        run(begun("b"), chosen, change=True, progress=stop_at(12))
    assert run(tmp_path / "b", chosen).resumed_from == 12  # no longer a change
    same_run(tmp_path / "a", tmp_path / "b")
    with pytest.raises(UndiffuseError, match="has seen 64 images already; a new length must be more"):
        run(tmp_path / "a", longer(48, "training.log_every=1"), change=True)


def test_another_learning_rate_is_taken_when_asked_for_and_written_down(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=stop_at(2))
    other = override(small(), ["optimiser.lr=0.5", "ema.half_life=100"], REGISTRIES)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, other, change=True, progress=stop_at(5))
    run(tmp_path, other)
    assert max(row["lr"] for row in metrics(tmp_path)) > 0.1
    log = (tmp_path / "log.txt").read_text()
    assert "changed    recipe.optimiser.lr: 0.002 there, 0.5 here, after update 2" in log
    found = checkpoint.newest(tmp_path / "checkpoints")
    assert found is not None
    assert len(found.state["changed"]) == 2  # it is remembered for good


@pytest.mark.parametrize(
    "setting", ["training.batch_size=8", "model.network.width=12", "model.prediction=v", "optimiser.kind=muon"]
)
def test_what_cannot_be_continued_is_refused_even_when_asked_for(setting: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=stop_at(2))
    with pytest.raises(UndiffuseError, match=r"holds a run with other settings \(recipe\.(?!.*--change)"):
        run(tmp_path, override(small(), [setting], REGISTRIES), change=True)
    with pytest.raises(UndiffuseError, match=r"seed: 0 there, 1 here(?!.*--change)"):
        run(tmp_path, seed=1, change=True)


@pytest.mark.parametrize("name", ["identity", "seconds", "loss", "changed", "machine"])
def test_a_checkpoint_that_has_lost_something_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=stop_at(2))
    newest = checkpoint.newest

    def lossy(folder: Path) -> Any:
        found = newest(folder)
        assert found is not None
        del found.state[name]
        return found

    monkeypatch.setattr(checkpoint, "newest", lossy)
    with pytest.raises(UndiffuseError, match=f"step-00000002.*{name}"):
        run(tmp_path)


def test_another_machine_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=stop_at(2))
    monkeypatch.setattr(torch, "__version__", "2.99")
    with pytest.warns(UndiffuseWarning, match=r"another machine \(torch .* there, 2.99 here\).*not bit by bit"):
        run(tmp_path)


def test_a_checkpoint_from_before_a_setting_existed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "old", progress=stop_at(2))
    newest = checkpoint.newest

    def older(folder: Path) -> Any:
        found = newest(folder)
        assert found is not None
        del found.state["identity"]["recipe"]["sampling"]["noise"]
        return found

    monkeypatch.setattr(checkpoint, "newest", older)
    run(tmp_path / "old")
    monkeypatch.undo()
    run(tmp_path / "straight")
    assert weights(tmp_path / "old") == weights(tmp_path / "straight")


def test_a_checkpoint_from_before_there_was_a_held_out_part_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = points(120), tmp_path / "old"
    whole = recipe(data, held_out=0)
    with pytest.raises(KeyboardInterrupt):
        run_training(data, whole, out, progress=stop_at(2))
    newest = checkpoint.newest

    def older(folder: Path) -> Any:
        found = newest(folder)
        assert found is not None
        if folder.parent == out:  # the proof writes others
            for holder in (found.state, found.state["identity"], found.state["identity"]["recipe"]["training"]):
                del holder["held_out"]
        return found

    monkeypatch.setattr(checkpoint, "newest", older)
    assert prove_resume(out, data, device="cpu").exact
    with pytest.raises(UndiffuseError, match=r"recipe.training.held_out: 0 there.* with --set training.held_out=0 to"):
        run_training(data, recipe(data), out)
    run_training(data, whole, out)
    monkeypatch.undo()
    run_training(data, whole, tmp_path / "straight")
    assert weights(out) == weights(tmp_path / "straight")


@pytest.mark.parametrize(
    "settings",
    [["model.schedule=flow", "model.prediction=eps"], ["sampling.steps=0"], ["model.network.widht=3"]],
)
def test_what_is_refused_leaves_nothing(settings: list[str], tmp_path: Path) -> None:
    with pytest.raises(UndiffuseError):
        run(tmp_path / "run", override(small(), settings, REGISTRIES))
    with pytest.raises(UndiffuseError, match="unknown device 'cuda9x'"):
        run(tmp_path / "run", device="cuda9x")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UndiffuseError, match="has files of something else"):
        run(tmp_path)
    with pytest.raises(UndiffuseError, match="a file; --out names a folder"):
        run(tmp_path / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


SETTINGS: dict[str, list[str]] = {
    "flow": [],
    "unconditional": ["model.conditional=false", "sampling.guidance_scale=2"],
    "EDM": [
        *("model.schedule=edm", "model.prediction=edm", "model.label=log_sigma", "model.input_scale=unit_variance"),
        *("objective.times=log_normal", "objective.weight=edm", "sampling.grid=karras", "sampling.solver=heun"),
    ],
    "DDPM with learned variance": [
        *("model.schedule=cosine", "model.prediction=eps", "model.label=discrete", "model.learned_variance=true"),
        *("objective.weight=min_snr", "sampling.solver=ddpm_learned"),
    ],
}
ARRAYS = {
    "points": np.linspace(-2, 3, 24, dtype=np.float32).reshape(8, 3),
    "grey pictures": (np.arange(8 * 36) % 251).astype(np.uint8).reshape(8, 6, 6),
    "colour pictures": (np.arange(8 * 105) % 251).astype(np.uint8).reshape(8, 5, 7, 3),
    "sound": np.sin(np.arange(8 * 40, dtype=np.float32)).reshape(8, 1, 40),
}


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_tiny_trains_on_every_kind_of_data(setting: str, kind: str, tmp_path: Path) -> None:
    dataset = from_array(ARRAYS[kind], np.arange(8) % 3)
    chosen = override(make_recipe("tiny", dataset.spec, len(dataset)), SETTINGS[setting], REGISTRIES)
    chosen = replace(chosen, training=replace(chosen.training, images=32, preview_every=0, previews=2))
    assert run_training(dataset, chosen, tmp_path).step == 2
    samples = Pipeline.load(tmp_path).sample(3)
    assert samples.shape == (3, *ARRAYS[kind].shape[1:])
    assert samples.dtype == ARRAYS[kind].dtype
    assert len(list((tmp_path / "samples").iterdir())) == 1


# --- previews ---------------------------------------------------------------------------------------------------------


def test_trap_E1_previews_do_not_touch_the_training(tmp_path: Path) -> None:
    run(tmp_path / "with", small(preview_every=1))
    run(tmp_path / "without", small(preview_every=0))
    assert len(list((tmp_path / "with" / "samples").iterdir())) == 8
    for name in ("weights", "ema", "optimiser"):
        file = f"checkpoints/step-00000008/{name}.safetensors"
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()


@pytest.mark.parametrize(("number", "option"), [(64, []), (6, ["-n", "6"])])
def test_trap_X8_a_preview_is_what_sample_writes(
    number: int, option: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(Path("r"), small(previews=number))
    assert main(["sample", "r", *option, "--out", "again.png"]) == 0
    assert Path("again.png").read_bytes() == Path("r/samples/preview-000008.png").read_bytes()


def test_previews_are_of_the_same_noise(tmp_path: Path) -> None:
    """A model that does not move shows the same picture: the noise of a preview is fixed."""
    frozen = override(small(preview_every=2), ["optimiser.lr=1e-30"], REGISTRIES)
    run(tmp_path, frozen)
    pictures = [Image.open(path).tobytes() for path in (tmp_path / "samples").iterdir()]
    assert len(pictures) == 4
    assert len(set(pictures)) == 1


# --- trouble ----------------------------------------------------------------------------------------------------------


def test_trap_R8_divergence_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    wild = override(small(), ["optimiser.lr=1e38", "optimiser.warmup=20", "optimiser.clip=1e30"], REGISTRIES)
    with pytest.raises(
        Diverged, match=r"update \d\b.*lower optimiser.lr.*(good checkpoint is .*step-|no checkpoint yet)"
    ):
        run(tmp_path, wild)
    assert load_json(tmp_path / "status.json")["state"] == "failed"


def test_a_full_disk_costs_a_checkpoint_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "straight")
    whole, lines = checkpoint.save, list[str]()

    def full(folder: Path, snapshot: Any, *rest: Any) -> Path:
        if snapshot.numbers["step"] == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weights.safetensors")
        return whole(folder, snapshot, *rest)

    monkeypatch.setattr(checkpoint, "save", full)
    run(tmp_path / "r", say=lines.append)
    assert [line for line in lines if "warning" in line] == [
        "warning: no checkpoint at update 4 (weights.safetensors: No space left on device); the last good one is "
        f"{tmp_path / 'r' / 'checkpoints' / 'step-00000002'}; training goes on"
    ]
    assert weights(tmp_path / "r") == weights(tmp_path / "straight")


def test_DF1_the_third_failure_in_a_row_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write to the disk fails from update 4 on, but for that at 8: two failures, then three in a row."""
    sync, step, lines, running = os.fsync, [0], list[str](), list[Any]()
    begin, chosen = _Run.train, small(images=64, preview_every=0)

    def failing(handle: int) -> None:
        if step[0] >= 4 and step[0] != 8:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(handle)

    def train(self: Any, command: str) -> Any:
        running.append(self)
        return begin(self, command)

    def progress(where: Progress) -> None:
        running[0]._settle(wait=True)  # so that what fails does not depend on how fast the disk is
        step[0] = where.step + 1

    monkeypatch.setattr(_Run, "train", train)
    monkeypatch.setattr(os, "fsync", failing)
    monkeypatch.setattr(_Run, "_status", lambda self, state: None)
    with pytest.raises(SaveFailed, match=r"could not be saved 3 times in a row .*Input/output error\); the last good"):
        run(tmp_path / "r", chosen, progress=progress, say=lines.append)
    said = [int(line.split()[5]) for line in lines if line.startswith("warning: no checkpoint at update")]
    assert said == [4, 6, 10, 12]
    assert SaveFailed.exit_code == 74
    monkeypatch.undo()
    assert run(tmp_path / "r", chosen).resumed_from == 8
    run(tmp_path / "straight", chosen)
    same_run(tmp_path / "straight", tmp_path / "r")


def test_CK6_A11_training_goes_on_while_a_checkpoint_is_written_and_does_not_touch_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of update 2 is not written before update 4 is done; the next one waits for it."""
    run(tmp_path / "straight", small(keep=9))
    whole, on, running, most = checkpoint.save, threading.Event(), [0], [0]

    def slow(*rest: Any) -> Path:
        running[0] += 1
        most[0] = max(most[0], running[0])
        on.wait(20)
        try:
            return whole(*rest)
        finally:
            running[0] -= 1

    def progress(where: Progress) -> None:
        if where.step == 3:
            assert not list((tmp_path / "r" / "checkpoints").glob("*"))
            on.set()

    monkeypatch.setattr(checkpoint, "save", slow)
    run(tmp_path / "r", small(keep=9), progress=progress)
    assert most == [1]
    same_run(tmp_path / "straight", tmp_path / "r")


def test_A11_what_goes_wrong_in_the_writer_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*rest: Any) -> Path:
        raise ZeroDivisionError("a mistake in the program")

    monkeypatch.setattr(checkpoint, "save", broken)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path)
    assert load_json(tmp_path / "status.json")["state"] == "failed"


def test_ctrl_c_waits_for_the_checkpoint_that_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = checkpoint.save

    def slow(*rest: Any) -> Path:
        time.sleep(0.2)
        return whole(*rest)

    monkeypatch.setattr(checkpoint, "save", slow)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=stop_at(2))  # it is begun at 2 already, and not written a second time
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*rest: Any) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "state.json")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(SaveFailed, match=r"could not be saved \(state.json: No space left on device\); there is none"):
        run(tmp_path, small(checkpoint_every=4))
    assert load_json(tmp_path / "status.json")["state"] == "failed"


def test_a_preview_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / ".lock").touch()
    (tmp_path / "r" / "samples").write_text("a file in its place")
    with pytest.warns(UndiffuseWarning) as said:
        assert run(tmp_path / "r").state == "finished"
    assert [str(each.message).partition(" (")[0] for each in said] == [f"no preview at update {n}" for n in (4, 8)]


def test_a_time_budget_is_planned_and_the_learning_rate_still_ends_at_zero(tmp_path: Path) -> None:
    chosen = small(images=10**9, log_every=1, checkpoint_every=0, preview_every=0)
    steps: list[Progress] = []
    result = run(tmp_path / "r", chosen, minutes=0.03, progress=steps.append)
    assert steps[0].total_images is None
    assert steps[-1].total_images == result.images
    rates = [row["lr"] for row in metrics(tmp_path / "r")]
    assert rates[-1] < 0.5 * max(rates)
    plan = json.loads((checkpoint.listed(tmp_path / "r" / "checkpoints")[-1] / "state.json").read_text())["trainer"][
        "plan"
    ]
    assert plan["images"] == result.images
    assert run(tmp_path / "r", chosen, minutes=0.03).resumed_from == result.step  # the plan is a part of the run
    with pytest.raises(UndiffuseError, match=r"minutes: 0\.03 there, 5 here"):
        run(tmp_path / "r", chosen, minutes=5)
    with pytest.raises(UndiffuseError, match="minutes=-1 must be positive"):
        run(tmp_path / "s", chosen, minutes=-1)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_and_the_function_do_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Screen
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    words = "train moons --recipe tiny --steps 4 --batch-size 8 --seed 3 --device cpu --set optimiser.lr=0.001"
    assert main([*words.split(), "--json"]) == 0
    seen = capsys.readouterr()
    report = json.loads(seen.out)
    assert (report["path"], report["state"], report["step"], report["images"]) == ("runs/moons", "finished", 4, 32)
    assert seen.err.startswith("run        runs/moons: 32 images")
    undiffuse.train(
        "moons", out=Path("b"), recipe="tiny", steps=4, batch_size=8, seed=3, set=("optimiser.lr=0.001",), device="cpu"
    )
    assert weights(Path("b")) == weights(Path("runs/moons"))
    assert shlex.split(Path("runs/moons/command.txt").read_text()) == ["undiffuse", *words.split()]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nothing", "no data at 'nothing'"),
        ("moons --recipe tinny", "unknown recipe 'tinny': did you mean 'tiny'?"),
        ("moons --set optimiser.lrr=1", "--set: unknown name 'optimiser.lrr': did you mean 'optimiser.lr'?"),
        ("moons --set lr", "--set 'lr': write it as path.to.field=value"),
        ("moons --steps 3 --minutes 1", "--steps, --images and --minutes are three ways to say how long: give one"),
        ("moons --recipe tiny --steps 0", "steps=0 must be at least 1"),
        ("moons --recipe tiny --device nonsense", "unknown device 'nonsense'"),
        ("moons --recipe tiny --set model.network.wdith=8", "unknown option of network mlp 'wdith'"),
        ("moons --model-size huge", "--model-size"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Screen
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words.split()]) == 2
    seen = capsys.readouterr()
    assert message in seen.err
    assert seen.err.count("\n") == 1
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("config.json"))


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_signals_and_a_second_process_from_outside(tmp_path: Path) -> None:
    """A real process: a second one is refused and told who is there; Ctrl-C saves and says how to go on."""
    pytest.importorskip("sklearn")
    words = [
        sys.executable,
        "-m",
        "undiffuse",
        "train",
        "moons",
        "--recipe",
        "tiny",
        "--out",
        "r",
        "--images",
        "99999999",
    ]
    first = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        status = tmp_path / "r" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not status.exists() and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        second = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert second.returncode == 2
        assert second.stderr.startswith(f"undiffuse: r: process {first.pid} on ")
        assert second.stderr.count("\n") == 1
        first.send_signal(signal.SIGINT)
        out, err = first.communicate(timeout=120)
    finally:
        first.kill()
    assert first.returncode == 130, err
    assert "saved; resume with the same command" in out
    assert "Traceback" not in err
    stopped = load_json(tmp_path / "r" / "status.json")
    assert stopped["state"] == "stopped"
    found = checkpoint.newest(tmp_path / "r" / "checkpoints")
    assert found is not None
    assert found.step == stopped["step"]
