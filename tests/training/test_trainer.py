"""The training loop against plain torch, and its promise: nothing but the count of updates decides what comes next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from training_laws import bits, points, recipe, through_disk
from undiffuse.config import override
from undiffuse.data import Dataset, DataSpec, from_array
from undiffuse.data.base import ArrayDataset
from undiffuse.errors import UndiffuseError
from undiffuse.pipeline import REGISTRIES
from undiffuse.training import Diverged, Trainer, batch_indices, draw
from undiffuse.training.trainer import Snapshot


def digits(count: int = 6) -> Dataset:
    generator = np.random.Generator(np.random.PCG64(1))
    return from_array(generator.integers(0, 256, size=(count, 4, 4), dtype=np.uint8), np.arange(count) % 2)


def trained(trainer: Trainer, updates: int) -> Trainer:
    for _ in range(updates):
        trainer.update()
    return trainer


# --- what an update is ------------------------------------------------------------------------------------------------


def test_updates_are_plain_adamw_on_the_plain_flow_loss() -> None:
    """The same three updates written out by hand: x = (1 - t) x0 + t eps, the target is eps - x0."""
    dataset = points()
    chosen = override(recipe(dataset), ["objective.condition_dropout=0.5", "optimiser.weight_decay=0.1"], REGISTRIES)
    trainer, other = Trainer(dataset, chosen, seed=3), Trainer(dataset, chosen, seed=3)
    model = other.denoiser
    adam = torch.optim.AdamW(model.parameters(), lr=1.0, betas=chosen.optimiser.betas, weight_decay=0.1, foreach=False)
    for step in range(3):
        done = trainer.update()
        x0, cond = dataset.batch(batch_indices(3, step, 4, 10))
        draws = draw(3, step, 4, (2,))
        t = ((torch.arange(4) + draws.times) / 4)[:, None].float()  # stratified
        labels = torch.where(draws.drop < 0.5, 2, cond["classes"])
        vector = model.conditions.part("classes").table(labels)
        y = model.network((1 - t) * x0 + t * draws.noise, 1000 * t[:, 0], vector)
        error = (y - (draws.noise - x0)).square().mean()
        adam.zero_grad()
        error.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in adam.param_groups:
            group["lr"] = done.lr
        adam.step()
        assert float(done.loss) == pytest.approx(error.item(), rel=1e-5)
    for ours, plain in zip(trainer.denoiser.parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours, plain, atol=1e-6)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_accumulation_changes_rounding_only(parts: int) -> None:
    dataset = points()
    whole = trained(Trainer(dataset, recipe(dataset)), 4)
    split = trained(Trainer(dataset, recipe(dataset, accumulation=parts)), 4)
    for a, b in zip(whole.denoiser.parameters(), split.denoiser.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-5)


def test_only_the_dropped_conditions_train_the_null_class() -> None:
    dataset = points()
    for rate, untouched in ((1.0, [0, 1]), (0.0, [2])):
        trainer = Trainer(dataset, override(recipe(dataset), [f"objective.condition_dropout={rate}"], REGISTRIES))
        table = trainer.denoiser.conditions.part("classes").table.weight
        before = table.detach().clone()
        trained(trainer, 3)
        moved = (table != before).any(1).tolist()
        assert [moved[i] for i in untouched] == [False] * len(untouched)
        assert any(moved)


def test_bf16_keeps_the_weights_in_float32_and_trains_alike() -> None:
    dataset = digits()
    full = [float(u.loss) for u in Trainer(dataset, recipe(dataset)).updates()]
    trainer = Trainer(dataset, recipe(dataset, precision="bf16"))
    half = [float(u.loss) for u in trainer.updates()]
    assert {p.dtype for p in trainer.denoiser.parameters()} == {torch.float32}
    assert half == pytest.approx(full, rel=0.05)
    assert half != full


def test_trap_O7_one_item_is_learned_by_heart() -> None:
    """With one item x0 the noise is known, eps = (x - (1 - t) x0)/t. A wrong tensor into the model stalls near 1."""
    item = np.array([0.3, -0.8], np.float32)
    spec = DataSpec("points", (2,), "float32", -1.0, 1.0, (0.0,), (1.0,), "D")
    dataset = ArrayDataset(spec, np.stack([item] * 4), None, name="one item")
    chosen = override(
        recipe(dataset, images=64 * 400, batch_size=64),
        ["model.network.width=32", "optimiser.lr=0.01", "training.images=25600"],
        REGISTRIES,
    )
    trainer = Trainer(dataset, chosen)
    losses = [float(update.loss) for update in trainer.updates()]
    assert losses[0] > 0.8
    assert np.mean(losses[-20:]) < 0.1
    samples = trainer.pipeline().sample(64, steps=20)
    assert np.abs(samples - item).mean() < 0.1


# --- resume -----------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, list[str]] = {
    "plain": [],
    "four parts": ["training.accumulation=4"],
    "bf16": ["training.precision=bf16"],
    "constant EMA": ["ema.ramp=none", "ema.half_life=4"],
    "offset noise, Huber": ["objective.offset_noise=0.1", "objective.huber=0.01", "objective.condition_dropout=0.5"],
    "dropout": ["model.network.dropout=0.5"],
    "linear decay, weight decay": ["optimiser.decay=linear", "optimiser.weight_decay=0.1"],
    "muon": ["optimiser.kind=muon", "optimiser.weight_decay=0.1"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_law_5_trap_R1_R2_R3_E5_a_resumed_run_is_the_straight_run_to_the_last_bit(variant: str, tmp_path: Path) -> None:
    """Every cut of two epochs and more, mid-epoch too: 10 items in batches of 4."""
    dataset = points()
    chosen = override(recipe(dataset), VARIANTS[variant], REGISTRIES)
    straight, wanted = Trainer(dataset, chosen, seed=5), {}
    for update in straight.updates():
        wanted[update.step] = (bits(straight), float(update.loss), update.lr)
    saved = Trainer(dataset, chosen, seed=5)
    for cut in range(1, len(wanted)):
        saved.update()
        found = through_disk(saved, tmp_path)
        resumed = Trainer(dataset, chosen, seed=5)
        resumed.restore(found.snapshot(), "here")
        assert bits(resumed) == wanted[cut][0]
        for update in resumed.updates():
            assert (bits(resumed), float(update.loss), update.lr) == wanted[update.step]
        assert resumed.step == len(wanted)


@pytest.mark.parametrize("family", ["unet", "mp_unet"])
def test_resume_of_a_unet(family: str, tmp_path: Path) -> None:
    dataset = digits()
    chosen = override(recipe(dataset, images=16), [f"model.family={family}"], REGISTRIES)
    straight = trained(Trainer(dataset, chosen), 4)
    resumed = Trainer(dataset, chosen)
    resumed.restore(through_disk(trained(Trainer(dataset, chosen), 2), tmp_path).snapshot(), "here")
    assert bits(trained(resumed, 2)) == bits(straight)


FACTORS: list[tuple[str, str]] = [
    ("training.accumulation=1", "training.accumulation=4"),
    ("ema.ramp=0.05", "ema.ramp=none"),
    ("model.network.dropout=0", "model.network.dropout=0.5"),
    ("objective.condition_dropout=0", "objective.condition_dropout=0.5"),
    ("optimiser.decay=cosine", "optimiser.decay=constant"),
    ("training.precision=float32", "training.precision=bf16"),
    ("optimiser.warmup=0", "optimiser.warmup=20"),
]


@pytest.mark.parametrize("row", range(8))
def test_RS1_any_two_settings_together_resume_exactly(row: int, tmp_path: Path) -> None:
    """Eight runs in which every pair of settings of any two factors occurs twice (the orthogonal array L8)."""
    a, b, c = row & 1, row >> 1 & 1, row >> 2 & 1
    columns = (a, b, c, a ^ b, a ^ c, b ^ c, a ^ b ^ c)
    dataset = points()
    chosen = recipe(dataset)
    settings = ["ema.half_life=4", *(pair[i] for pair, i in zip(FACTORS, columns, strict=True))]
    chosen = override(chosen, settings, REGISTRIES)
    straight, wanted = Trainer(dataset, chosen, seed=row), []
    for update in straight.updates():
        wanted.append((update.step, float(update.loss), update.lr))
    for cut in (1, 2, 3, 5, 7):  # 10 items in batches of 4: the epochs end in batches 3, 5 and 8
        found = through_disk(trained(Trainer(dataset, chosen, seed=row), cut), tmp_path / str(cut))
        resumed = Trainer(dataset, chosen, seed=row)
        resumed.restore(found.snapshot(), "here")
        assert [(u.step, float(u.loss), u.lr) for u in resumed.updates()] == wanted[cut:]
        assert bits(resumed) == bits(straight)


@pytest.mark.parametrize("name", ["step", "plan", "loss_sum", "loss_count"])
def test_a_snapshot_without_one_of_its_numbers_is_refused_and_changes_nothing(name: str) -> None:
    dataset = points()
    snapshot = trained(Trainer(dataset, recipe(dataset)), 2).snapshot()
    del snapshot.numbers[name]
    other = trained(Trainer(dataset, recipe(dataset)), 1)
    before = bits(other)
    with pytest.raises(UndiffuseError, match=f"here: not the whole state of a trainer .*{name}"):
        other.restore(snapshot, "here")
    assert bits(other) == before


@pytest.mark.parametrize("group", ["weights", "ema", "optimiser"])
def test_a_snapshot_without_one_of_its_tensors_is_refused_and_changes_nothing(group: str) -> None:
    dataset = points()
    other = trained(Trainer(dataset, recipe(dataset)), 1)
    before = bits(other)
    whole = trained(Trainer(dataset, recipe(dataset)), 2).snapshot()
    for name in whole.tensors[group]:
        rest = {key: value for key, value in whole.tensors[group].items() if key != name}
        with pytest.raises(UndiffuseError, match=rf"here/{group}: .*1 missing"):
            other.restore(Snapshot({**whole.tensors, group: rest}, whole.numbers), "here")
    del whole.tensors[group]
    with pytest.raises(UndiffuseError, match=f"not the whole state of a trainer .*{group}"):
        other.restore(whole, "here")
    assert bits(other) == before


def test_weights_of_the_magnitude_preserving_network_keep_their_size() -> None:
    """The trainer sets them back after each update; the average moves between such weights."""
    dataset = digits()
    chosen = override(recipe(dataset, images=32), ["model.family=mp_unet", "optimiser.lr=0.1"], REGISTRIES)
    trainer = trained(Trainer(dataset, chosen), 8)
    weights = {name: w.detach() for name, w in trainer.denoiser.network.named_parameters() if name.endswith("weight")}
    for weight in weights.values():
        size = weight.square().flatten(1).mean(1).sqrt()
        torch.testing.assert_close(size, torch.ones_like(size))
    averages = dict(trainer.ema.denoiser.network.named_parameters())
    assert any(not torch.equal(averages[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("left_out", ["weights", "ema", "optimiser", "step", "plan"])
def test_the_test_of_resume_can_fail(left_out: str, tmp_path: Path) -> None:
    """Each part of the state is needed: without it the bits differ."""
    dataset = points()
    straight = trained(Trainer(dataset, recipe(dataset)), 4)
    snapshot = through_disk(trained(Trainer(dataset, recipe(dataset)), 2), tmp_path).snapshot()
    fresh = trained(Trainer(dataset, recipe(dataset), seed=9), 1).snapshot()
    resumed = Trainer(dataset, recipe(dataset))
    if left_out == "step":
        snapshot.numbers["step"] = 0
    elif left_out == "plan":
        snapshot.numbers["plan"] = {"images": None, "start": 0}
    else:
        snapshot.tensors[left_out] = fresh.tensors[left_out]
    resumed.restore(snapshot, "here")
    assert bits(trained(resumed, 2)) != bits(straight)


def test_a_snapshot_of_another_architecture_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    dataset = points()
    found = through_disk(trained(Trainer(dataset, recipe(dataset)), 1), tmp_path)
    chosen = override(recipe(dataset), ["model.network.width=12"], REGISTRIES)
    other = trained(Trainer(dataset, chosen), 1)
    before = bits(other)
    with pytest.raises(UndiffuseError, match=r"step-00000001/weights.*another architecture.*the model has"):
        other.restore(found.snapshot(), str(found.path))
    assert bits(other) == before


def test_other_seeds_train_otherwise() -> None:
    dataset = points()
    assert bits(trained(Trainer(dataset, recipe(dataset), seed=1), 2)) == bits(
        trained(Trainer(dataset, recipe(dataset), seed=1), 2)
    )
    assert bits(trained(Trainer(dataset, recipe(dataset), seed=1), 2)) != bits(
        trained(Trainer(dataset, recipe(dataset), seed=2), 2)
    )


def test_training_leaves_the_global_generator_alone() -> None:
    dataset = points()
    before = torch.get_rng_state()
    trained(Trainer(dataset, override(recipe(dataset), ["model.network.dropout=0.5"], REGISTRIES)), 2)
    assert torch.equal(torch.get_rng_state(), before)


# --- what must not pass -----------------------------------------------------------------------------------------------


class Poisoned(nn.Module):
    """A network whose output or gradient becomes NaN at one call."""

    def __init__(self, inner: nn.Module, call: int, what: str) -> None:
        super().__init__()
        self.inner, self.call, self.what, self.calls = inner, call, what, 0

    def forward(self, x: Tensor, label: Tensor, vector: Tensor | None = None) -> Tensor:
        y = self.inner(x, label, vector)
        self.calls += self.training
        if self.calls != self.call or not self.training:
            return y
        if self.what == "gradient":
            y.register_hook(lambda gradient: gradient * float("nan"))
            return y
        return y + float(self.what)


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize("what", ["nan", "inf", "gradient"])
def test_trap_R8_what_is_not_finite_never_reaches_the_weights(what: str, optimiser: str) -> None:
    dataset = points()
    chosen = override(recipe(dataset), [f"optimiser.kind={optimiser}"], REGISTRIES)
    trainer = Trainer(dataset, chosen, seed=4)
    denoiser = trainer.denoiser
    denoiser.network = Poisoned(denoiser.network, 4, what)
    trainer = Trainer(dataset, chosen, seed=4, denoiser=denoiser)
    trained(trainer, 3)
    before = {name: p.detach().clone() for name, p in trainer.denoiser.named_parameters()}
    average = [p.clone() for p in trainer.ema.denoiser.parameters()]
    moments = [{k: v.clone() for k, v in state.items()} for state in trainer.optimiser.state.values()]
    with pytest.raises(Diverged, match=r"not finite in update 4 \(seed 4\): lower optimiser.lr"):
        trainer.update()
    assert all(torch.equal(p, before[name]) for name, p in trainer.denoiser.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(trainer.ema.denoiser.parameters(), average, strict=True))
    for state, kept in zip(trainer.optimiser.state.values(), moments, strict=True):
        assert all(torch.equal(value, kept[name]) for name, value in state.items())
    assert trainer.step == 3
    with pytest.raises(Diverged):
        trainer.snapshot()


class Deaf(nn.Module):
    """A network that does not listen to one of its inputs."""

    def __init__(self, inner: nn.Module, to: str) -> None:
        super().__init__()
        self.inner, self.ear = inner, to

    def forward(self, x: Tensor, label: Tensor, vector: Tensor | None = None) -> Tensor:
        if self.ear == "label":
            return self.inner(x, torch.zeros_like(label), vector)
        return self.inner(x, label, None if vector is None else torch.zeros_like(vector))


@pytest.mark.parametrize(("to", "message"), [("label", "ignores its noise level"), ("vector", "ignores the condition")])
def test_trap_O5_a_network_that_ignores_an_input_is_refused(to: str, message: str) -> None:
    for dataset in (points(), digits()):
        denoiser = Trainer(dataset, recipe(dataset)).denoiser
        denoiser.network = Deaf(denoiser.network, to)
        trainer = Trainer(dataset, recipe(dataset), denoiser=denoiser)
        with pytest.raises(UndiffuseError, match=message):
            trained(trainer, 1)


def test_reading_ahead_changes_nothing(tmp_path: Path) -> None:
    dataset = points()
    ahead = Trainer(dataset, recipe(dataset))
    ahead.workers = 2
    assert bits(trained(ahead, 5)) == bits(trained(Trainer(dataset, recipe(dataset)), 5))
    ahead.restore(through_disk(trained(Trainer(dataset, recipe(dataset)), 2), tmp_path).snapshot(), "here")
    assert bits(trained(ahead, 3)) == bits(trained(Trainer(dataset, recipe(dataset)), 5))  # what was read is not used


@pytest.mark.parametrize("ahead", [False, True])
def test_the_reader_reports_what_is_wrong_with_the_data(ahead: bool) -> None:
    class Broken(Dataset):
        def __init__(self) -> None:
            whole = points()
            self.spec, self.name, self.labels, self.fingerprint = whole.spec, "broken", whole.labels, "x"
            self.whole = whole

        def __len__(self) -> int:
            return 10

        def read(self, indices: Any) -> Any:
            values, labels = self.whole.read(indices)
            values[0] = np.nan
            return values, labels

    trainer = Trainer(Broken(), recipe(points()))
    trainer.workers = int(ahead)
    with pytest.raises(UndiffuseError, match="NaN"):
        trainer.update()
