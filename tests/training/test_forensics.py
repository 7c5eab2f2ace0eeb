"""An update that is not finite: what it must not change, what is kept of it, and what a replay says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from training_laws import bits, points, recipe, through_disk
from undiffuse.commands import main
from undiffuse.config import override
from undiffuse.data import Dataset, DataSpec, from_array
from undiffuse.data.base import ArrayDataset
from undiffuse.errors import UndiffuseError
from undiffuse.pipeline import REGISTRIES
from undiffuse.training import Diverged, Recipe, Trainer, checkpoint, divide, forensics, memory, run_training, trainer

SKIP = {"nonfinite": "skip"}


class Poisoned(nn.Module):
    """A network that is not finite for the samples whose level is in a range: a function of its input, as real ones."""

    def __init__(self, inner: nn.Module, low: float, high: float, what: str = "output") -> None:
        super().__init__()
        self.inner, self.low, self.high, self.what = inner, low, high, what

    def forward(self, x: Tensor, label: Tensor, vector: Tensor | None = None) -> Tensor:
        y = self.inner(x, label, vector)
        bad = ((label > self.low) & (label < self.high))[:, None]
        if self.what == "gradient":
            y = y * 1
            if y.requires_grad:
                y.register_hook(lambda gradient: torch.where(bad, float("nan"), gradient))
            return y
        return torch.where(bad, torch.full_like(y, float("inf")), y)


def poisoned(dataset: Dataset, chosen: Recipe, low: float, high: float, what: str = "output") -> Trainer:
    """A trainer that diverges where a batch has a level in the range (labels are 1000 t)."""
    denoiser = Trainer(dataset, chosen, seed=4).denoiser
    denoiser.network = Poisoned(denoiser.network, low, high, what)
    return Trainer(dataset, chosen, seed=4, denoiser=denoiser)


def state(trainer: Trainer) -> list[Tensor]:
    """All that an update may change, but for counts."""
    moments = [value for p in trainer.parameters.values() for value in trainer.optimiser.state[p].values()]
    tensors = [*trainer.denoiser.state_dict().values(), *trainer.ema.denoiser.state_dict().values(), *moments]
    return [tensor.clone() for tensor in tensors]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def until_bad(trainer: Trainer) -> list[Tensor]:
    """Train up to the first bad update, which raises; the state before it."""
    for _ in range(1000):
        before = state(trainer) if trainer.step else []
        try:
            trainer.update()
        except Diverged:
            return before
    raise AssertionError("never bad")


# --- nothing bad gets in ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["output", "gradient"])
def test_trap_R8_NF1_a_bad_update_changes_no_bit_whether_it_stops_or_is_skipped(what: str) -> None:
    dataset = points()
    stopping = poisoned(dataset, recipe(dataset, images=400), 990, 1000, what)
    before = until_bad(stopping)
    assert before
    assert same(state(stopping), before)

    skipping = poisoned(dataset, recipe(dataset, images=400, **SKIP, skip_share=1.0), 990, 1000, what)
    skipped = 0
    while skipped < 2:
        before = state(skipping) if skipping.step else []
        update = skipping.update()
        if update.skipped:
            assert same(state(skipping), before)
            skipped += 1
        else:
            assert not before or not same(state(skipping), before)
    assert skipping.skipped == 2


def test_NF3_a_weight_that_is_not_finite_is_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight goes bad between an update and its checkpoint (memory, a bug): the one before stays the newest."""
    update = trainer.Trainer.update

    def breaks(self: Trainer) -> Any:
        done = update(self)
        if done.step == 4:
            next(iter(self.parameters.values())).data.view(-1)[0] = float("nan")
        return done

    monkeypatch.setattr(trainer.Trainer, "update", breaks)
    with pytest.raises(Diverged, match=r"likely cause: .* was not finite before this update.*step-00000002"):
        run_training(points(), recipe(points(), checkpoint_every=2, preview_every=0), tmp_path)
    found = checkpoint.newest(tmp_path / "checkpoints")
    assert found is not None
    assert found.step == 2
    assert all(bool(tensor.isfinite().all()) for tensor in found.snapshot().tensors["weights"].values())


def test_NF1_data_that_are_not_finite_are_refused_before_the_network_sees_them() -> None:
    values = points().values(range(10))
    values[3] = np.nan
    with pytest.raises(UndiffuseError, match="item 3 has NaN"):
        from_array(values)


# --- the rule of skipping ---------------------------------------------------------------------------------------------


def test_NF2_more_than_n_in_a_row_stop() -> None:
    dataset = points()
    trainer = poisoned(dataset, recipe(dataset, images=400, **SKIP, skip_in_row=2, skip_share=1.0), 0, 1000)
    assert [trainer.update().skipped for _ in range(2)] == [True, True]
    with pytest.raises(Diverged, match=r"not finite in update 3 \(seed 4, 2 updates were skipped before it\)"):
        trainer.update()


def test_NF2_more_than_the_share_in_all_stop() -> None:
    """Bad updates with good ones between: never two in a row, and still too many."""
    dataset = points()
    chosen = recipe(dataset, images=4000, **SKIP, skip_in_row=2, skip_share=0.02)
    trainer = poisoned(dataset, chosen, 985, 1000)
    skipped: list[int] = []

    def train() -> None:
        skipped.extend(update.step for update in trainer.updates() if update.skipped)

    with pytest.raises(Diverged) as stopped:
        train()
    end = trainer.step + 1
    assert len(skipped) + 1 > 2 + 0.02 * end
    assert all(count + 1 <= 2 + 0.02 * step for count, step in enumerate(skipped))
    assert f"in update {end} " in str(stopped.value)


def test_NF2_skipping_is_the_same_after_a_resume(tmp_path: Path) -> None:
    """At every cut; the counts are part of the state, so the end comes at the same update too."""
    dataset = points()
    chosen = recipe(dataset, images=120, **SKIP, skip_in_row=2, skip_share=0.05)

    def course(trainer: Trainer) -> list[tuple[int, bool, str]]:
        seen: list[tuple[int, bool, str]] = []
        try:
            for update in trainer.updates():
                seen.append((update.step, update.skipped, bits(trainer)))
        except Diverged as error:
            seen.append((trainer.step + 1, True, str(error)))
        return seen

    straight = course(poisoned(dataset, chosen, 930, 1000))
    assert sum(skipped for _, skipped, _ in straight) >= 3
    assert 6 < len(straight) < 25
    assert "not finite" in straight[-1][2]  # it ends by the rule
    saved = poisoned(dataset, chosen, 930, 1000)
    for cut in range(1, len(straight)):
        saved.update()
        resumed = poisoned(dataset, chosen, 930, 1000)
        resumed.restore(through_disk(saved, tmp_path).snapshot(), "here")
        assert course(resumed) == straight[cut:]


def test_a_first_update_that_is_skipped_is_no_proof_of_deafness() -> None:
    """Before the first real update the output is 0 at every level; that must not be taken for trap O5."""
    dataset = points()
    trainer = poisoned(dataset, recipe(dataset, **SKIP), 0, 1000)
    assert trainer.update().skipped
    trainer.denoiser.network.high = 0.0  # pyrefly: ignore
    assert not trainer.update().skipped


def test_the_loss_of_a_window_that_was_all_skipped_is_not_a_number() -> None:
    dataset = points()
    trainer = poisoned(dataset, recipe(dataset, **SKIP), 0, 1000)
    trainer.update()
    assert np.isnan(trainer.mean_loss())


# --- what a replay finds ----------------------------------------------------------------------------------------------


def autopsy(trainer: Trainer) -> forensics.Autopsy:
    until_bad(trainer)
    before = bits_of_state(trainer)
    found = forensics.replay(trainer.task, trainer.denoiser, forensics.scene(trainer, trainer.diverged_at))
    assert bits_of_state(trainer) == before  # looking changes nothing
    assert trainer.denoiser.training
    return found


def bits_of_state(trainer: Trainer) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in state(trainer)] if trainer.step else []


def test_R8_the_replay_names_the_samples_the_level_and_the_module() -> None:
    dataset = points()
    trainer = poisoned(dataset, recipe(dataset, images=400), 300, 310)
    found = autopsy(trainer)
    seen = forensics.scene(trainer, found.step)
    bad = [row for row, t in enumerate(seen.drawn.values[0].tolist()) if 0.3 < t < 0.31]
    assert bad
    assert found.repeated
    assert found.items == tuple(seen.indices[bad].tolist())
    assert found.levels == (0, 0, 0, len(bad), 0, 0, 0, 0, 0, 0)
    assert found.module == "network"  # the poison is in the network's own forward, behind its last part
    assert found.loss is None
    assert "network returned values that are not finite" in found.cause


def test_R8_a_gradient_alone_is_traced_to_its_samples_and_parameters() -> None:
    dataset = points()
    trainer = poisoned(dataset, recipe(dataset, images=400), 300, 310, "gradient")
    found = autopsy(trainer)
    assert found.module is None
    assert found.loss is not None
    assert found.backward == "network"
    assert found.gradients
    assert all(0.3 < t < 0.31 for t in found.times)
    assert len(found.items) == len(found.times) >= 1
    assert "square root" in found.cause


def test_R8_the_end_of_the_schedule_is_named() -> None:
    dataset = points()
    found = autopsy(poisoned(dataset, recipe(dataset, images=4000), 995, 1000))
    assert "next to an end of the schedule" in found.cause


def test_R8_bad_weights_are_named() -> None:
    dataset = points()
    trainer = Trainer(dataset, recipe(dataset))
    trainer.update()
    name, weight = next(iter(trainer.parameters.items()))
    weight.data.view(-1)[0] = float("inf")
    found = autopsy(trainer)
    assert found.cause.startswith(f"{name} was not finite before this update")


def test_R8_weights_that_ran_away_are_named() -> None:
    dataset = points()
    wild = override(recipe(dataset), ["optimiser.lr=1e15", "optimiser.warmup=0"], REGISTRIES)
    assert "the weights have run away" in autopsy(Trainer(dataset, wild)).cause


def test_R8_extreme_data_are_named() -> None:
    values = points().values(range(10)).copy()
    values[7] = 1e30
    spec = DataSpec("points", (2,), "float32", None, None, (0.0,), (1.0,), "D")
    dataset = ArrayDataset(spec, values, None, name="one of them is huge")
    found = autopsy(Trainer(dataset, recipe(dataset)))
    assert "extreme data: item 7 reaches 1e+30" in found.cause


def test_R8_bfloat16_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that is finite in float32 and not in the type of the matrix products."""

    class Narrow(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, label: Tensor, vector: Tensor | None = None) -> Tensor:
            y = self.inner(x, label, vector)
            return y * float("inf") if y.dtype == torch.bfloat16 else y

    dataset = points()
    chosen = recipe(dataset, precision="bf16")
    denoiser = Trainer(dataset, chosen).denoiser
    denoiser.network = Narrow(denoiser.network)
    assert autopsy(Trainer(dataset, chosen, denoiser=denoiser)).cause.startswith("bfloat16:")


def test_R8_what_does_not_repeat_is_said() -> None:
    dataset = points()
    trainer = Trainer(dataset, recipe(dataset))
    trainer.update()
    found = forensics.replay(trainer.task, trainer.denoiser, forensics.scene(trainer, 1))
    assert not found.repeated
    assert "finite when computed again" in found.cause


@pytest.mark.parametrize("settings", [["training.accumulation=3"], ["model.network.dropout=0.5"]])
def test_the_replay_is_the_update(settings: list[str]) -> None:
    """Its loss is the update's to the last bits of a sum: same data, times, noise, dropped conditions and masks."""
    dataset = points()
    chosen = override(recipe(dataset), ["objective.condition_dropout=0.5", *settings], REGISTRIES)
    trainer = Trainer(dataset, chosen, seed=2)
    for step in (1, 2, 3):
        found = forensics.replay(trainer.task, trainer.denoiser, forensics.scene(trainer, step))
        assert found.loss == pytest.approx(float(trainer.update().loss), rel=1e-6)


def augmented() -> tuple[Dataset, Recipe]:
    """Pictures under EDM's augmentation, a part of them held out."""
    generator = np.random.Generator(np.random.PCG64(1))
    dataset = from_array(generator.integers(0, 256, (120, 8, 8)).astype(np.uint8), np.arange(120) % 2)
    chosen = recipe(dataset, images=400, batch_size=16, log_every=1, preview_every=0)
    return dataset, override(chosen, ["augment.geometric=0.1", "augment.shift=1"], REGISTRIES)


def test_the_replay_under_augmentation_is_the_update() -> None:
    dataset, chosen = augmented()
    train, held_out = divide(dataset, chosen.training)
    assert held_out is not None
    trainer = Trainer(train, chosen, seed=2)
    trainer.update()
    seen = forensics.scene(trainer, 2)
    assert seen.drawn.named["augmentation"].any()
    found = forensics.replay(trainer.task, trainer.denoiser, seen)
    assert found.loss == pytest.approx(float(trainer.update().loss), rel=1e-6)
    again = forensics.scene(trainer, 2)
    assert torch.equal(again.x0, seen.x0)
    plain, _ = dataset.batch(seen.indices.numpy())  # the indices are those of the whole
    kept = ~seen.drawn.named["augmentation"].any(1)
    unmoved = replace(chosen, augment=replace(chosen.augment, shift=0))
    still = forensics.scene(Trainer(train, unmoved, seed=2), 2)
    assert kept.any()
    assert torch.equal(still.x0[kept], plain[kept])


def test_R8_a_bad_batch_is_kept_and_replayed_as_it_was_augmented(tmp_path: Path) -> None:
    dataset, chosen = augmented()
    chosen = override(chosen, ["optimiser.lr=1e38", "optimiser.warmup=0", "optimiser.clip=1e30"], REGISTRIES)
    with pytest.raises(Diverged):
        run_training(dataset, chosen, tmp_path)
    report, found = forensics.investigate(tmp_path)
    assert found.repeated
    assert (found.step, found.items) == (report["step"], tuple(report["items"]))
    assert found.cause == report["cause"]


# --- the folder -------------------------------------------------------------------------------------------------------


def wild(**training: Any) -> Recipe:
    """Runs away after a few good updates, from a checkpoint on."""
    chosen = recipe(points(), images=400, log_every=1, preview_every=0, checkpoint_every=1, **training)
    return override(chosen, ["optimiser.lr=1e38", "optimiser.warmup=400", "optimiser.clip=1e30"], REGISTRIES)


def test_R8_a_run_that_stops_leaves_all_that_is_needed(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"likely cause: .*; the last good checkpoint is .*step-") as stopped:
        run_training(points(), wild(), tmp_path)
    assert {each.name for each in (tmp_path / "nan").iterdir()} == {
        "report.json",
        "batch.safetensors",
        "weights.safetensors",
    }
    report, found = forensics.investigate(tmp_path)
    assert report["cause"] == found.cause
    assert found.cause in str(stopped.value)
    assert report["step"] == found.step
    assert f"in update {found.step} " in str(stopped.value)
    assert Path(report["last_good"]).is_dir()
    assert [row["step"] for row in report["history"]] == list(range(1, found.step))
    newest = checkpoint.newest(tmp_path / "checkpoints")
    assert newest is not None
    kept = newest.snapshot().tensors["weights"]
    from undiffuse.weights import read_weights

    assert newest.step == found.step - 1
    for name, tensor in read_weights(tmp_path / "nan" / "weights.safetensors").items():
        assert torch.equal(tensor, kept[name])
    assert not list(tmp_path.glob(".nan*"))


def test_R8_the_exit_code_is_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("p.npy", points().values(range(10)))
    words = ["train", "p.npy", "--recipe", "tiny", "--set", "optimiser.lr=1e38", "--set", "optimiser.clip=1e30"]
    assert main(words) == 3
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_that_skips_goes_on_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The poison comes by the weight of the loss, which a run can have: infinite gradients at one end."""
    lines: list[str] = []
    update, bad = trainer.Trainer.update, {3, 5}

    def sometimes(self: Trainer) -> Any:
        weight = next(iter(self.parameters.values()))
        if self.step + 1 in bad:
            weight.register_hook(lambda gradient: gradient * float("nan") if self.step + 1 in bad else gradient)
        return update(self)

    monkeypatch.setattr(trainer.Trainer, "update", sometimes)
    result = run_training(points(), recipe(points(), **SKIP), tmp_path, say=lines.append)
    assert result.state == "finished"
    assert [line.split(" was")[0] for line in lines if "skipped" in line] == ["warning: update 3", "warning: update 5"]
    assert json.loads((tmp_path / "nan" / "report.json").read_text())["step"] == 5
    newest = checkpoint.newest(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.state["trainer"]["skipped"] == 2


def test_a_bundle_that_is_not_whole_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UndiffuseError, match="every loss and gradient of this run was finite"):
        forensics.investigate(tmp_path)
    with pytest.raises(Diverged):
        run_training(points(), wild(), tmp_path)
    (tmp_path / "nan" / "report.json").write_text("{}")
    with pytest.raises(UndiffuseError, match="not whole"):
        forensics.investigate(tmp_path)
    (tmp_path / "nan" / "batch.safetensors").write_bytes(b"")
    with pytest.raises(UndiffuseError):
        forensics.investigate(tmp_path)


def test_a_full_disk_does_not_hide_the_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*rest: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(forensics, "keep", full)
    with pytest.warns(UserWarning, match="is not complete"), pytest.raises(Diverged, match="likely cause: unknown"):
        run_training(points(), wild(), tmp_path)


# --- out of memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you "),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
    ],
)
def test_B3_OM1_out_of_memory_is_a_line_with_a_remedy_and_the_checkpoint_is_whole(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert memory.is_out_of_memory(error)
    update = trainer.Trainer.update

    def fails(self: Trainer) -> Any:
        if self.step == 3:
            raise error
        return update(self)

    monkeypatch.setattr(trainer.Trainer, "update", fails)
    with pytest.raises(UndiffuseError, match=r"out of memory after update 3; --set training.accumulation=2.*step-0+2$"):
        run_training(points(), recipe(points(), checkpoint_every=2), tmp_path)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"
    monkeypatch.setattr(trainer.Trainer, "update", update)
    assert run_training(points(), recipe(points(), checkpoint_every=2), tmp_path).resumed_from == 2


def test_other_errors_are_not_taken_for_it() -> None:
    assert not memory.is_out_of_memory(RuntimeError("the memory of this test"))
    assert not memory.is_out_of_memory(ValueError("can't allocate memory"))


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_OM1_a_real_shortage_in_a_child(tmp_path: Path) -> None:
    """A network that is far larger than the address space that the child may use."""
    program = (
        "import resource, sys\n"
        "import torch, undiffuse.training.run\n"
        "from undiffuse.commands import main\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 150_000_000, -1))\n"
        "sys.exit(main(['train', 'p.npy', '--recipe', 'tiny', '--batch-size', '300000', '--steps', '3']))\n"
    )
    np.save(tmp_path / "p.npy", points(300_000).values(range(300_000)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 2, done.stderr
    assert "out of memory after update 0; --set training.accumulation=2" in done.stderr
    assert done.stderr.count("\n") == 1
