"""The held-out loss: frozen draws, bands that add up, nothing changed by looking, and the best that is never lost."""

from __future__ import annotations

import json
import math
import os
import signal
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import undiffuse
from training_laws import bits, points, recipe
from undiffuse.config import load_json, override
from undiffuse.data import Dataset
from undiffuse.errors import UndiffuseError, UndiffuseWarning
from undiffuse.objectives import loss
from undiffuse.pipeline import REGISTRIES, Pipeline
from undiffuse.training import Curve, Evaluation, HeldOut, Probe, Progress, Recipe, Trainer, divide, run_training
from undiffuse.training.held_out import BANDS, STRATA, draws

DATA = points(120)
OFTEN = {"log_every": 3, "preview_every": 0, "checkpoint_every": 2, "previews": 4, "evaluate_every": 2}


def small(**training: Any) -> Recipe:
    """8 updates on :data:`DATA`, evaluated every other one."""
    return recipe(DATA, **{**OFTEN, **training})


def run(out: Path, chosen: Recipe | None = None, **options: Any) -> Any:
    return run_training(DATA, chosen or small(), out, **options)


def stop_at(step: int) -> Any:
    def progress(where: Progress) -> None:
        if where.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return progress


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "held_out.jsonl").read_text().splitlines()]


def row(images: int, ema: float | None, probes: dict[str, dict[str, float | None]] | None = None) -> Evaluation:
    return Evaluation(images, images, ema, ema, 0.1, 0.01, (ema,) * 4, (ema,) * 4, probes or {})


# --- what is held out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 50, 99, 100, 1000, 30_000])
@pytest.mark.parametrize("limit", [0, 9, 10, 1000])
def test_a_tenth_at_most_is_held_out_and_small_data_keep_all(count: int, limit: int) -> None:
    whole = points(count)
    train, held_out = divide(whole, small(held_out=limit).training)
    again, _ = divide(whole, small(held_out=limit).training)
    assert again.fingerprint == train.fingerprint
    expected = min(limit, count // 10)
    if expected < 10:
        assert (train, held_out) == (whole, None)
        return
    assert held_out is not None
    assert len(held_out) == expected
    both = [tuple(v) for part in (train, held_out) for v in part.values(range(len(part)))]
    assert len(set(both)) == len(both) == count, "disjoint, and nothing is lost"


def test_an_item_of_a_part_can_be_found_in_the_whole() -> None:
    """What a message calls item 7 must be the user's item 7."""
    for part in divide(DATA, small().training):
        assert part is not None
        places = part.origin(range(len(part)))
        assert np.array_equal(part.values(range(len(part))), DATA.values(places))
        nested = part.split(0.3, 1)[0]
        assert np.array_equal(nested.values([2, 0]), DATA.values(nested.origin([2, 0])))


def test_no_update_reads_a_held_out_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer never sees a value that the evaluation sees."""
    seen: dict[str, set[tuple[float, ...]]] = {"train": set(), "held out": set()}
    batch, evaluating = Dataset.batch, [False]

    def spy(self: Dataset, indices: Any) -> Any:
        found = batch(self, indices)
        seen["held out" if evaluating[0] else "train"] |= {tuple(x.tolist()) for x in found[0]}
        return found

    def losses(self: HeldOut, denoiser: Any) -> Any:
        evaluating[0] = True
        try:
            return original(self, denoiser)
        finally:
            evaluating[0] = False

    original = HeldOut.losses
    monkeypatch.setattr(Dataset, "batch", spy)
    monkeypatch.setattr(HeldOut, "losses", losses)
    run(tmp_path, small(images=120, evaluate_every=15, checkpoint_every=0))
    assert len(seen["train"]) == 108
    assert len(seen["held out"]) == 12
    assert not seen["train"] & seen["held out"]


# --- the number -------------------------------------------------------------------------------------------------------


def test_the_held_out_loss_is_the_objective_on_the_frozen_draws() -> None:
    """Against the plain formula, one draw at a time, with the draws of another seed's run: they are the same."""
    train, held_out = divide(DATA, small().training)
    assert held_out is not None
    chosen = override(small(), ["objective.condition_dropout=0"], REGISTRIES)
    evaluator = HeldOut(held_out, chosen)
    trainer = Trainer(train, chosen, seed=5)
    losses = evaluator.losses(trainer.ema.denoiser)
    from undiffuse.training.draws import generator

    for k in (0, 17, evaluator.count - 1):
        x0, cond = held_out.batch([int(evaluator.items[k])])
        eps = torch.randn(x0.shape[1:], generator=generator(0, "held-out noise", k))[None]
        with torch.no_grad():
            alone = loss(trainer.ema.denoiser, x0, evaluator.times[k : k + 1], eps, classes=cond["classes"])
        assert float(losses[k]) == pytest.approx(float(alone), rel=1e-4)
    assert torch.equal(losses, evaluator.losses(trainer.ema.denoiser)), "the same each time"


def test_the_bands_average_to_the_loss_and_ascend_in_noise() -> None:
    train, held_out = divide(DATA, small().training)
    assert held_out is not None
    evaluator = HeldOut(held_out, small())
    found, losses = evaluator.evaluate(Trainer(train, small()), Curve())
    assert found.ema == pytest.approx(float(losses.mean()), rel=1e-12)
    assert found.ema == pytest.approx(np.mean([b for b in found.ema_bands if b is not None]), rel=1e-12)
    assert found.raw == pytest.approx(np.mean([b for b in found.raw_bands if b is not None]), rel=1e-12)
    assert len(found.ema_bands) == BANDS == len(set(evaluator.band_names(small().model.schedule)))
    assert bool((evaluator.times.diff() >= 0).all())


def test_the_times_are_the_objectives_own() -> None:
    """A quarter of its mass in each band, whatever the distribution and however it is stratified."""
    _, held_out = divide(DATA, small().training)
    assert held_out is not None
    for stated in ("stratified", "logit_normal"):
        chosen = override(small(), [f"objective.times={stated}"], REGISTRIES)
        evaluator = HeldOut(held_out, chosen)
        drawn = chosen.objective.times(torch.rand(20_000, dtype=torch.float64), chosen.model.schedule)
        edges = evaluator.times.reshape(BANDS, -1)[:, 0].contiguous()
        shares = torch.histc(torch.bucketize(drawn, edges).double(), BANDS, 1, BANDS) / len(drawn)
        assert shares.tolist() == pytest.approx([0.25] * BANDS, abs=0.03)


def test_the_standard_error_is_the_spread_over_other_held_out_sets() -> None:
    """Losses made of a trend in time, an effect of the item and noise: what other items and noise would have given."""
    generator = torch.Generator().manual_seed(0)
    data = points(40)
    evaluator = HeldOut(data, small(batch_size=64, evaluate_every=100))
    trend = torch.linspace(3, 0, evaluator.count, dtype=torch.float64)
    means, errors = [], []
    for _ in range(400):
        item = torch.randn(40, generator=generator, dtype=torch.float64)[torch.from_numpy(evaluator.items)]
        losses = trend + 0.3 * item + torch.randn(evaluator.count, generator=generator, dtype=torch.float64)
        means.append(float(losses.mean()))
        errors.append(evaluator.standard_error(losses))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.12)


def test_the_cost_is_bounded() -> None:
    for batch_size, every in ((16, 10), (128, 100), (128, 250), (64, 500), (1, 1), (100_000, 1)):
        count = draws(small(batch_size=batch_size, evaluate_every=every).training)
        assert count % STRATA == 0
        assert 2 * STRATA <= count <= 1024
        assert count == 2 * STRATA or 2 * count <= 0.05 * 3 * batch_size * every


# --- looking changes nothing ------------------------------------------------------------------------------------------


def test_trap_X7_evaluating_changes_no_bit_of_the_training_state(tmp_path: Path) -> None:
    train, held_out = divide(DATA, small().training)
    assert held_out is not None
    chosen = override(small(), ["model.network.dropout=0.3"], REGISTRIES)
    looked, alone = Trainer(train, chosen), Trainer(train, chosen)
    evaluator, curve, random = HeldOut(held_out, chosen), Curve(), torch.get_rng_state()
    for _ in range(4):
        looked.update()
        before = bits(looked)
        curve.add(*evaluator.evaluate(looked, curve))
        assert bits(looked) == before
        assert looked.denoiser.training
        assert not looked.ema.denoiser.training
        assert all(p.grad is None for p in looked.denoiser.parameters())
        alone.update()
        assert bits(looked) == bits(alone)
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("cut", [1, 4, 5, 7])
def test_trap_R4_A17_the_curve_and_the_best_go_on_as_if_the_run_had_not_been_stopped(cut: int, tmp_path: Path) -> None:
    run(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", progress=stop_at(cut))
    run(tmp_path / "cut")
    assert [each["step"] for each in lines(tmp_path / "cut")] == [2, 4, 6, 8]
    for name in ("held_out.jsonl", "best/model.safetensors", "best/pipeline.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_trap_R4_an_old_best_is_not_overwritten_by_the_first_evaluation_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of updates 2, 4, 6, 8 is 1, 2, 3, 4: the best stays that of update 2, on both sides of a stop."""
    evaluate = HeldOut.evaluate

    def rising(self: HeldOut, trainer: Trainer, curve: Curve) -> Any:
        found, losses = evaluate(self, trainer, curve)
        return replace(found, ema=trainer.step / 2), losses

    monkeypatch.setattr(HeldOut, "evaluate", rising)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=stop_at(3))
    run(tmp_path)
    assert load_json(tmp_path / "best" / "pipeline.json")["info"]["step"] == 2
    assert load_json(tmp_path / "best" / "pipeline.json")["info"]["held_out_loss"] == 1.0
    assert load_json(tmp_path / "model" / "pipeline.json")["info"]["step"] == 8
    assert Pipeline.load(tmp_path).info["step"] == 8, "what is sampled is the end of the run unless best/ is asked for"
    assert Pipeline.load(tmp_path / "best").info["step"] == 2


def test_a_lost_line_of_the_curve_is_written_again(tmp_path: Path) -> None:
    run(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", progress=stop_at(5))
    (tmp_path / "cut" / "held_out.jsonl").unlink()
    run(tmp_path / "cut")
    assert lines(tmp_path / "cut") == lines(tmp_path / "straight")


def test_trap_B2_NF_4_what_is_not_a_number_never_wins() -> None:
    curve, empty = Curve(), torch.zeros(0)
    better = [curve.add(row(i, ema), empty) for i, ema in enumerate([None, 2.0, None, 3.0, 1.0, 1.0, None], 1)]
    assert better == [False, True, False, False, True, False, False]
    assert curve.best is not None
    assert (curve.best.ema, curve.best.images) == (1.0, 5)
    again = Curve.from_json(json.loads(json.dumps(curve.to_json(), allow_nan=False)))
    assert (again.rows, again.best) == (curve.rows, curve.best)


def test_a_weight_that_is_not_finite_is_none_not_best() -> None:
    train, held_out = divide(DATA, small().training)
    assert held_out is not None
    trainer, curve = Trainer(train, small()), Curve()
    with torch.no_grad():
        next(trainer.ema.denoiser.parameters()).fill_(math.nan)
    found, losses = HeldOut(held_out, small()).evaluate(trainer, curve)
    assert found.ema is None
    assert not curve.add(found, losses)
    json.dumps(curve.to_json(), allow_nan=False)


def test_few_old_evaluations_are_kept_to_compare_with() -> None:
    curve = Curve()
    for i in range(1, 2000):
        before = curve.before(i)
        if i >= 20:
            assert before is not None
            assert i / 1.6 <= float(before) <= i / 1.25, "a fifth ago, or somewhat more"
        curve.add(row(i, 1.0), torch.tensor(float(i)))
        assert len(curve.kept) <= 6
    assert curve.before(2000) is not None


# --- the run ----------------------------------------------------------------------------------------------------------


def test_other_held_out_items_are_another_run(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=stop_at(2))
    with pytest.raises(UndiffuseError, match=r"held_out: 1000 there, 11 here"):
        run(tmp_path, small(held_out=11))


def test_another_objective_begins_another_curve(tmp_path: Path) -> None:
    """Its losses cannot be compared, so the best of before is none."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=stop_at(5))
    run(tmp_path, override(small(), ["objective.weight=min_snr"], REGISTRIES), change=True)
    assert [each["step"] for each in lines(tmp_path)] == [6, 8]


def test_the_header_says_what_is_held_out(tmp_path: Path) -> None:
    said: list[str] = []
    run(tmp_path / "a", say=said.append)
    run(tmp_path / "b", small(held_out=0), say=said.append)
    told = [" ".join(line.split()) for line in said if line.startswith("held out")]
    assert told[0].startswith("held out 12 of 120 items, never trained on")
    assert told[1].startswith("held out nothing: all items are trained on")
    assert not (tmp_path / "b" / "held_out.jsonl").exists()
    assert not (tmp_path / "b" / "best").exists()


def test_a_best_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / "best").write_text("a file")
    with pytest.warns(UndiffuseWarning, match="best could not be written"):
        run(tmp_path)


def test_probes_are_measured_with_their_floor_and_what_fails_is_a_gap(tmp_path: Path) -> None:
    def quality(pipeline: Pipeline) -> dict[str, float]:
        return {"spread": float(pipeline.draw(4, seed=0).std()), "bad": math.nan}

    def broken(pipeline: Pipeline) -> dict[str, float]:
        raise UndiffuseError("no features")

    probes = [Probe("quality", quality, {"spread": 0.5}), Probe("broken", broken)]
    with pytest.warns(UndiffuseWarning, match="the probe broken failed .no features."):
        run(tmp_path / "with", probes=probes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path / "without")
    found = [each["probes"] for each in lines(tmp_path / "with")]
    assert all(set(each) == {"quality"} for each in found)
    assert all(each["quality"]["bad"] is None and each["quality"]["spread"] > 0 for each in found)
    for name in ("weights", "ema", "optimiser"):
        file = f"checkpoints/step-00000008/{name}.safetensors"
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()


def test_tensorboard_gets_the_curves(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, small(preview_every=4), tensorboard=True, progress=stop_at(5))
    run(tmp_path, small(preview_every=4), tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("held_out/ema")] == [2, 4, 6, 8]
    assert [e.value for e in events.Scalars("held_out/ema")] == pytest.approx([each["ema"] for each in lines(tmp_path)])
    assert [e.step for e in events.Scalars("training/loss")] == [3, 6, 8]
    assert [e.step for e in events.Images("samples")] == [4, 8]


def test_a_missing_tensorboard_is_one_line_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(UndiffuseError, match=r"pip install 'undiffuse\[track\]'"):
        undiffuse.train("moons", recipe="tiny", out=tmp_path / "r", tensorboard=True)
    assert not (tmp_path / "r").exists()
