"""Each check of the doctor sees a bad case, and is green on a good one."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import undiffuse
from training_laws import points, recipe
from undiffuse.commands import _parse, main
from undiffuse.commands.options import DataOptions
from undiffuse.config import override
from undiffuse.data import Dataset, DataSpec, from_array, open_dataset
from undiffuse.data.base import ArrayDataset
from undiffuse.errors import UndiffuseError, UndiffuseWarning
from undiffuse.pipeline import REGISTRIES
from undiffuse.training import Diverged, Recipe, checkpoint, doctor, memory, run_training
from undiffuse.training.aftercare import examine_run
from undiffuse.training.doctor import Finding, Patient

Screen = pytest.CaptureFixture[str]


def pictures(count: int = 120, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Random smooth pictures of 8x8, uint8."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(count, channels, 3, 3, generator=generator)
    large = torch.nn.functional.interpolate(small, size=(8, 8), mode="bilinear")
    values = (255 * (large - large.min()) / (large.max() - large.min())).round().to(torch.uint8)
    return np.ascontiguousarray(np.moveaxis(values.numpy(), 1, -1).squeeze())


def patient(values: np.ndarray | Dataset, labels: np.ndarray | None = None, *settings: str, **more: Any) -> Patient:
    dataset = values if isinstance(values, Dataset) else from_array(values, labels)
    chosen = override(recipe(dataset, images=32 * 500, batch_size=32), settings, REGISTRIES)
    return Patient(dataset, chosen, **more)


def lights(findings: Iterator[Finding] | list[Finding]) -> dict[str, str]:
    found = list(findings)
    for finding in found:
        assert bool(finding.remedy) == (finding.light != "green"), finding
    return {finding.check: finding.light for finding in found}


def with_outlier() -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(300, 2)).astype(np.float32)
    values[7] = 1e6
    return values


def copied(part: int) -> np.ndarray:
    values = pictures()
    values[-part:] = values[:part]
    return values


def nearly_copied() -> np.ndarray:
    values = pictures()
    values[-9:] = np.clip(values[:9].astype(int) + 1, 0, 255)
    return values


def with_flat(part: int) -> np.ndarray:
    values = pictures()
    values[:part] = 128
    return values


GOOD = pictures()
COLOUR = np.stack([pictures(seed=seed) for seed in range(3)], -1)
GREY_IN_RGB = np.stack([GOOD] * 3, -1)
LABELS = np.arange(120) % 3
RARE = np.where(np.arange(120) < 4, 1, 0)

DATA_CASES = {
    "range": (doctor.check_range, patient(GOOD), patient(with_outlier()), "range", "yellow"),
    "units": (doctor.check_range, patient(GOOD), patient(GOOD[:, None].astype(np.float32)), "range", "yellow"),
    "sigma_data": (
        doctor.check_range,
        patient(GOOD, None, "model.prediction=edm", "model.prediction.sigma_data=0.5"),
        patient(GOOD, None, "model.prediction=edm", "model.prediction.sigma_data=5"),
        "sigma_data",
        "yellow",
    ),
    "depth": (doctor.check_depth, patient(COLOUR), patient(GREY_IN_RGB), "depth", "yellow"),
    "files": (doctor.check_files, patient(GOOD), patient(GOOD, notes=("16 bits become 8",)), "files", "yellow"),
    "count": (doctor.check_count, patient(GOOD), patient(GOOD[:50]), "count", "yellow"),
    "length": (doctor.check_count, patient(GOOD), patient(GOOD, None, "training.images=64"), "count", "yellow"),
    "copies": (doctor.check_duplicates, patient(GOOD), patient(copied(5)), "duplicates", "yellow"),
    "near copies": (doctor.check_duplicates, patient(GOOD), patient(nearly_copied()), "near-duplicates", "yellow"),
    "flat": (doctor.check_constant, patient(GOOD), patient(with_flat(5)), "constant", "yellow"),
    "mostly flat": (doctor.check_constant, patient(GOOD), patient(with_flat(80)), "constant", "red"),
    "digits mirrored": (
        doctor.check_mirroring,
        patient(GOOD, LABELS),
        patient(GOOD, LABELS, "augment.flip=0.5"),
        "mirroring",
        "yellow",
    ),
    "classes": (doctor.check_classes, patient(GOOD, LABELS), patient(GOOD, RARE), "classes", "yellow"),
}


@pytest.mark.parametrize("case", DATA_CASES)
def test_data(case: str) -> None:
    check, good, bad, name, light = DATA_CASES[case]
    assert set(lights(check(good)).values()) <= {"green"}
    assert lights(check(bad))[name] == light


def test_most_are_copies_is_red() -> None:
    assert lights(doctor.check_duplicates(patient(np.concatenate([GOOD[:1]] * 200 + [GOOD]))))["duplicates"] == "red"


def test_the_copies_are_named_and_only_those() -> None:
    found = next(iter(doctor.check_duplicates(patient(copied(5)))))
    assert re.match(r"5 are exact copies \(item 115 is item 0\)", found.measured)


def test_a_large_set_is_looked_at_in_blocks_of_neighbours() -> None:
    """Frames of a film are copies of their neighbours: an even sample would never see two of them."""
    looked = patient(np.repeat(np.random.default_rng(0).normal(size=(5000, 2)), 2, axis=0), most=1024).looked
    assert len(looked) == 1024
    assert (np.diff(looked) == 1).sum() >= 1024 - 16
    assert looked[0] == 0
    assert looked[-1] == 9999


PLAN_CASES: dict[str, tuple[Any, list[str], list[str], str, str]] = {
    "terminal SNR": (
        doctor.check_terminal_snr,
        [],
        ["model.schedule=linear", "model.prediction=v"],
        "terminal SNR",
        "",
    ),
    "warm-up": (doctor.check_learning_rate, [], ["optimiser.warmup=20000"], "learning rate", "red"),
    "half a warm-up": (doctor.check_learning_rate, [], ["optimiser.warmup=12000"], "learning rate", "yellow"),
    "few updates": (doctor.check_learning_rate, [], ["training.images=320"], "learning rate", "yellow"),
    "average": (doctor.check_average, [], ["ema.ramp=none", "ema.half_life=1000000"], "average", "red"),
    "trap S11": (
        doctor.check_overlap,
        [],
        [
            "sampling.steps=20",
            "objective.times=logit_normal",
            "objective.times.mean=-6",
            "objective.times.deviation=0.1",
        ],
        "levels",
        "red",
    ),
}


@pytest.mark.parametrize("case", PLAN_CASES)
def test_plan(case: str) -> None:
    check, good, bad, name, light = PLAN_CASES[case]
    assert lights(check(patient(GOOD, None, *good)))[name] == "green"
    found = lights(check(patient(GOOD, None, *bad)))[name]
    assert found == light if light else found in ("green", "yellow")


def test_a_schedule_that_keeps_half_of_the_data_is_red() -> None:
    class Half(undiffuse.Schedule):
        def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return 1 - t / 2, t

        def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
            return alpha + sigma / 2

    sick = patient(GOOD)
    sick = replace(sick, recipe=replace(sick.recipe, model=replace(sick.recipe.model, schedule=Half())))
    assert lights(doctor.check_terminal_snr(sick)) == {"terminal SNR": "red"}


def test_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(doctor.shutil.disk_usage("/"))
    for free, light in ((10**15, "green"), (1000, "red")):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place, free=free: usage(10**15, 0, free))
        assert lights(doctor.check_disk(patient(GOOD))) == {"disk": light}


# --- the trial --------------------------------------------------------------------------------------------------------


def test_a_healthy_trial_is_green() -> None:
    found = lights(doctor.trial(patient(GOOD, LABELS)))
    assert found == dict.fromkeys(("inputs", "memory", "time", "overfit"), "green")


class Deaf(nn.Module):
    """A network that does not listen to one of its inputs."""

    def __init__(self, inner: nn.Module, to: str) -> None:
        super().__init__()
        self.inner, self.ear = inner, to

    def forward(self, x: Tensor, label: Tensor, vector: Tensor | None = None) -> Tensor:
        if self.ear == "level":
            return self.inner(x, torch.zeros_like(label), vector)
        return self.inner(x, label, None if vector is None else torch.zeros_like(vector))


@pytest.mark.parametrize("to", ["level", "condition"])
def test_trap_O5_a_deaf_network_is_red(to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from undiffuse.pipeline import ModelConfig

    build = ModelConfig.build

    def deaf(self: ModelConfig) -> Any:
        denoiser = build(self)
        denoiser.network = Deaf(denoiser.network, to)
        return denoiser

    monkeypatch.setattr(ModelConfig, "build", deaf)
    found = [each for each in doctor.trial(patient(GOOD, LABELS)) if each.check == "inputs"]
    assert [each.light for each in found] == ["red"] * len(found)
    assert any(f"ignores {'its noise' if to == 'level' else 'the condition'}" in each.measured for each in found)
    assert all(each.remedy for each in found)


@pytest.mark.parametrize(("lr", "light"), [("0.002", "green"), ("1e-9", "red"), ("100", "red")])
def test_one_batch_must_overfit(lr: str, light: str) -> None:
    """Too low, it stays at the loss of always saying 0; too high, it goes beyond."""
    assert lights(doctor.check_overfit(patient(GOOD, LABELS, f"optimiser.lr={lr}")))["overfit"] == light


def test_R8_a_trial_that_diverges_is_red_and_says_so() -> None:
    sick = patient(GOOD, None, "optimiser.lr=1e38", "optimiser.clip=1e30", "optimiser.warmup=0")
    assert "red" in lights(doctor.trial(sick)).values()


def test_B3_memory_that_does_not_suffice_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "limit", lambda device: 1000)
    found = [each for each in doctor.trial(patient(GOOD)) if each.check == "memory"]
    assert [each.light for each in found] == ["red"]
    assert "training.accumulation=2" in found[0].remedy
    update = doctor.Trainer.update

    def fails(self: Any) -> Any:
        if self.recipe.training.batch_size > 8:
            raise torch.OutOfMemoryError("no")
        return update(self)

    monkeypatch.setattr(doctor.Trainer, "update", fails)
    found = list(doctor.trial(patient(GOOD)))
    assert found[-1].measured == "not enough for a batch of 32 (8 was possible)"


def test_what_is_not_reached_is_extrapolated_and_said() -> None:
    found = {each.check: each for each in doctor.trial(patient(GOOD, None, "training.batch_size=4096"), seconds=0.0)}
    assert "extrapolated" in found["time"].measured
    assert "extrapolated" in found["memory"].measured
    assert doctor._at(64, [(1, 2.0), (8, 9.0)]) == 65.0
    assert doctor._at(8, [(1, 2.0), (8, 9.0)]) == 9.0


def test_a_run_of_days_is_yellow() -> None:
    long = patient(GOOD, None, "training.images=10000000000")
    assert lights(doctor._speed(long, [(32, 0.1, 0)], 0.0)) == {"time": "yellow"}


def test_minutes_become_images_and_the_plan_is_that_of_the_time() -> None:
    short = patient(GOOD, None, "optimiser.warmup=1000000", minutes=1.0)
    assert lights(doctor._speed(short, [(32, 0.1, 0)], 0.0))["learning rate"] == "red"


# --- the verb ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.savez("p.npz", x=GOOD, y=LABELS)
    return tmp_path


def test_the_command_and_the_function_do_the_same(saved: Path, capsys: Screen) -> None:
    words = ["p.npz", "--recipe", "tiny", "--steps", "200", "--quick"]
    assert main(["doctor", *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    found = undiffuse.doctor("p.npz", recipe="tiny", steps=200, quick=True)
    assert [each["check"] for each in told["findings"]] == [each.check for each in found.findings]
    assert told["light"] == found.light
    assert main(["doctor", *words]) == 0
    screen = capsys.readouterr().out
    assert max(map(len, screen.splitlines())) <= 80
    assert "\x1b" not in screen  # colour on a terminal only
    assert not list(saved.glob("runs*"))  # it writes nothing


def test_the_exit_code_says_red(saved: Path, capsys: Screen) -> None:
    words = ["doctor", "p.npz", "--recipe", "tiny", "--quick", "--set", "optimiser.warmup=1000000"]
    assert main(words) == 1
    assert "\nred     learning rate" in capsys.readouterr().out


def test_what_train_refuses_the_doctor_refuses(saved: Path, capsys: Screen) -> None:
    for words in (["nothing"], ["p.npz", "--recipe", "nothing"], ["p.npz", "--nan"], ["p.npz", "--minutes", "-1"]):
        assert main(["doctor", *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_warnings_of_the_data_are_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Screen) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pics").mkdir()
    for index, item in enumerate(GOOD):
        Image.fromarray(item).save(tmp_path / "pics" / f"{index:03d}.png")
    Image.fromarray(GOOD[3]).save(tmp_path / "pics" / "x.png")
    (tmp_path / "pics" / "bad.png").write_bytes(b"this is no picture")
    found = undiffuse.doctor("pics", recipe="tiny", quick=True)
    files = [each for each in found.findings if each.check == "files"]
    assert len(files) == 2  # each is said once
    assert "bad.png" in files[0].measured
    assert "the same file" in files[1].measured
    assert any("(x.png is 003.png)" in each.measured for each in found.findings if each.check == "duplicates")
    assert files[0].light == "yellow"
    assert capsys.readouterr().err == ""


def test_notes_of_arrays_are_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("dark.npy", GOOD // 20)
    for found in (undiffuse.doctor("dark.npy", recipe="tiny", quick=True).findings, doctor.examine(dark(), tiny())):
        notes = [each for each in found if each.check == "files"]
        assert [each.light for each in notes] == ["yellow"]
        assert "values end at 12" in notes[0].measured


def dark() -> Dataset:
    with pytest.warns(UndiffuseWarning, match="values end at 12"):
        return from_array(GOOD // 20)


def tiny() -> Recipe:
    return recipe(from_array(GOOD), images=32 * 500, batch_size=32)


@pytest.mark.parametrize(("peak", "remedy"), [(0.05, "make all sounds louder"), (0.9, "sigma_data=0.0")])
def test_quiet_sounds_are_yellow(peak: float, remedy: str) -> None:
    values = 0.02 * np.sin(np.arange(200 * 64).reshape(200, 64) * 0.3)
    values[7, 0] = peak
    spec = DataSpec("sound", (1, 64), "float32", -1.0, 1.0, (0.0,), (1.0,), "L", rate=8000)
    found = list(doctor.check_range(patient(ArrayDataset(spec, values.astype(np.float32), None, name="hum"))))
    assert found[0].light == "yellow"
    assert "quiet, -" in found[0].measured
    assert remedy in found[0].remedy


def test_every_verb_that_reads_data_takes_the_options_of_the_data() -> None:
    options = set(inspect.signature(open_dataset).parameters) - {"data"}
    assert {*DataOptions.__annotations__, "strict", "seed"} == options
    for verb, first in (("train", "digits"), ("doctor", "digits"), ("evaluate", "digits"), ("compare", "tiny")):
        function = getattr(undiffuse, verb)
        assert inspect.signature(function).parameters["reading"].kind is inspect.Parameter.VAR_KEYWORD
        with pytest.raises(UndiffuseError, match="unknown option 'image_sise': did you mean 'image_size'"):
            function(first, **({"against": "digits"} if verb == "evaluate" else {}), image_sise=8)
        with pytest.raises(UndiffuseError, match="unknown option '--image-sise': did you mean '--image-size'"):
            _parse(verb, import_module(f"undiffuse.commands.{verb}"), [first, "--image-sise", "8"])
        call: Any = _parse(verb, import_module(f"undiffuse.commands.{verb}"), [first, "--image-size", "8"])
        assert {name: call.keywords[name] for name in options & call.keywords.keys() - {"strict", "seed"}} == {
            "image_size": 8
        }


def test_the_trial_under_augmentation_is_green() -> None:
    found = lights(doctor.trial(patient(COLOUR, LABELS, "augment.geometric=0.5"), seconds=1))
    assert found["inputs"] == "green"


def test_train_says_the_cheap_half_by_itself(tmp_path: Path) -> None:
    lines: list[str] = []
    run_training(points(), recipe(points()), tmp_path / "r", say=lines.append)
    assert any(line.startswith("yellow     count: 10 items") for line in lines)
    assert not any(line.startswith("green") for line in lines)
    lines.clear()
    run_training(points(), recipe(points()), tmp_path / "r", say=lines.append)  # finished: nothing to look at
    assert not any(line.startswith("yellow") for line in lines)


# --- a run folder -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run_training(points(), recipe(points(), checkpoint_every=2, log_every=1), tmp_path / "r")
    return tmp_path / "r"


def test_a_finished_run_is_green(run: Path) -> None:
    found = lights(examine_run(run))
    assert set(found) == {"state", "checkpoints", "losses", "average", "disk", "finite"}
    assert set(found.values()) == {"green"}


def test_a_run_whose_process_is_gone_is_yellow(run: Path) -> None:
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "state": "running"}))
    assert lights(examine_run(run))["state"] == "yellow"
    with checkpoint.Lock(run):
        assert lights(examine_run(run))["state"] == "green"
    (run / "status.json").write_text(json.dumps({**status, "state": "failed"}))
    assert lights(examine_run(run))["state"] == "red"
    (run / "status.json").unlink()
    assert lights(examine_run(run))["state"] == "yellow"


def test_one_flipped_bit_is_found(run: Path) -> None:
    path = checkpoint.listed(run / "checkpoints")[-1] / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    found = [each for each in examine_run(run) if each.check == "checkpoints"]
    assert [each.light for each in found] == ["red", "green"]
    assert "SHA-256" in found[0].measured


def test_losses_that_rise_or_are_not_finite_are_yellow(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] * 5

    def light(losses: Sequence[float | None]) -> str:
        lines = [json.dumps({**row, "loss": value}) for row, value in zip(rows, losses, strict=False)]
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        return lights(examine_run(run))["losses"]

    assert light([1.0 / (i + 1) for i in range(20)]) == "green"
    assert light([1.0] * 10 + [0.1] * 5 + [1.0] * 5) == "yellow"
    assert light([1.0] * 10 + [None]) == "yellow"
    (run / "metrics.jsonl").unlink()
    assert lights(examine_run(run))["losses"] == "yellow"


def test_a_model_that_is_not_finite_or_missing_is_said(run: Path) -> None:
    from undiffuse.weights import read_weights, write_weights

    path = run / "model" / "model.safetensors"
    weights = read_weights(path)
    name = next(name for name, tensor in weights.items() if tensor.numel())
    weights[name].view(-1)[0] = float("nan")
    write_weights(path, weights, {})
    assert lights(examine_run(run))["average"] == "red"
    path.write_bytes(b"")
    assert lights(examine_run(run))["average"] == "red"


def test_R8_the_verb_replays_what_was_not_finite(saved: Path, capsys: Screen) -> None:
    wild = override(recipe(points()), ["optimiser.lr=1e18", "optimiser.warmup=0"], REGISTRIES)
    with pytest.raises(Diverged):
        run_training(points(), wild, saved / "r")
    assert main(["doctor", "r", "--nan"]) == 1
    screen = capsys.readouterr().out
    assert "is not finite again" in " ".join(screen.split())
    assert "the weights have run away" in " ".join(screen.split())
    assert max(map(len, screen.splitlines())) <= 80
    with pytest.raises(UndiffuseError, match="every loss and gradient"):
        examine_run(saved, nan=True)


def test_A4_the_verb_proves_exact_resume_with_the_data_of_the_runs_own_command(saved: Path, capsys: Screen) -> None:
    assert main(["train", "p.npz", "--recipe", "tiny", "--out", "r", "--steps", "4"]) == 0
    capsys.readouterr()
    assert main(["doctor", "r", "--resume"]) == 0
    assert "equal to the last bit" in " ".join(capsys.readouterr().out.split())
    np.savez("p.npz", x=GOOD[::-1], y=LABELS)
    assert main(["doctor", "r", "--resume"]) == 2
