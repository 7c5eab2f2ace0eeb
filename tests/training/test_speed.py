"""Ways of computing an update: what is chosen, that it stays chosen, and that no update waits for a device."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from training_laws import bits, points, recipe
from undiffuse import conditions
from undiffuse.compiling import SHAPES, Compiled, Program, for_training
from undiffuse.config import load_json, override
from undiffuse.denoiser import Denoiser
from undiffuse.errors import UndiffuseError, UndiffuseWarning
from undiffuse.pipeline import REGISTRIES
from undiffuse.predictions import FlowVelocity
from undiffuse.schedules import Flow
from undiffuse.training import Trainer, make_recipe, run_training, speed
from undiffuse.training.speed import Trial, as_before, choose, plain, settle


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "thread_time", time.perf_counter)  # a machine of our own
    return tmp_path / "cache" / "speed"


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """In place of torch.compile, which takes a minute: what it is called with, returned as it is."""
    calls: list[Any] = []

    def compile(function: Any, dynamic: bool, **options: Any) -> Any:
        assert not dynamic
        calls.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    return calls


def timed(monkeypatch: pytest.MonkeyPatch, *, half: float, compiled: float, compiling: float = 10.0) -> None:
    """A machine on which an update takes 0.1 s, times these factors."""
    seen: set[int] = set()

    def seconds(trainer: Trainer) -> float:
        trainer.update()
        ours, new = isinstance(network(trainer), Compiled), id(trainer.engine) not in seen
        seen.add(id(trainer.engine))
        return 0.1 * (half if trainer.half else 1) * (compiled if ours else 1) + (compiling if ours and new else 0)

    monkeypatch.setattr(speed, "_timed", seconds)
    monkeypatch.setattr(speed, "has_bf16", lambda device: True)
    monkeypatch.setattr(speed, "may_compile", lambda device: True)


def network(trainer: Trainer) -> nn.Module:
    return getattr(trainer.engine.loss.args[0], "network", trainer.denoiser)  # type: ignore[attr-defined]


def images(hours: float = 1.0, **training: Any) -> Any:
    """Data with spatial axes and a recipe that lasts so long at 0.1 s an update."""
    from undiffuse import open_dataset

    dataset = open_dataset("digits")
    return dataset, recipe(dataset, images=int(4 * 10 * 3600 * hours), **training)


def ways(chosen: Any) -> tuple[str, str]:
    return chosen.training.precision, chosen.training.compile


@pytest.mark.parametrize(
    ("half", "compiled", "expected"),
    [
        (0.5, 0.5, ("bf16", "always")),
        (0.5, 0.97, ("bf16", "never")),
        (1.1, 0.5, ("float32", "always")),
        (0.97, 1.5, ("float32", "never")),
    ],
)
def test_what_pays_is_chosen(
    half: float, compiled: float, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch, compiler: list[Any]
) -> None:
    timed(monkeypatch, half=half, compiled=compiled)
    dataset, asked = images()
    chosen, why = choose(dataset, asked)
    assert ways(chosen) == expected
    assert f"{half:.0%}" in why
    assert f"{compiled:.0%}" in why
    assert "\n" not in why


def test_a_codec_is_tried_too_but_never_compiled(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    timed(monkeypatch, half=0.5, compiled=0.5)
    dataset, asked = images()
    learning = replace(make_recipe("autoencoder", dataset.spec, len(dataset), "tiny"), training=asked.training)
    chosen, why = choose(dataset, learning)
    assert ways(chosen) == ("bf16", "never")
    assert "an update in bf16 takes 50%" in why
    other = override(learning, ["codec.codebook=8"], REGISTRIES)
    choose(dataset, other)
    assert len(list(cache.iterdir())) == 2  # another codec, another trial


def test_compiling_that_the_run_does_not_win_back_is_left_out(
    monkeypatch: pytest.MonkeyPatch, compiler: list[Any]
) -> None:
    timed(monkeypatch, half=2, compiled=0.9, compiling=200)
    dataset, asked = images()
    assert ways(choose(dataset, asked)[0]) == ("float32", "never")  # 360 s saved, 200 s at each start
    assert ways(choose(dataset, images(hours=10)[1])[0]) == ("float32", "always")


def test_a_trial_is_made_once_for_a_model_and_batch(
    monkeypatch: pytest.MonkeyPatch, cache: Path, compiler: list[Any]
) -> None:
    timed(monkeypatch, half=0.5, compiled=0.5)
    dataset, asked = images()
    first = choose(dataset, asked)
    monkeypatch.setattr(speed, "_timed", lambda trainer: pytest.fail("measured again"))
    assert choose(dataset, asked) == first
    (file,) = cache.iterdir()
    timed(monkeypatch, half=2, compiled=2)
    file.write_text("{")  # damaged
    assert ways(choose(dataset, asked)[0]) == ("float32", "never")
    other = replace(asked, training=replace(asked.training, batch_size=8))
    choose(dataset, other)
    assert len(list(cache.iterdir())) == 2


def half_a_core() -> float:
    """The time that a thread has computed where others hold the cores."""
    return time.perf_counter() / 2


def test_a_trial_among_others_is_said_and_not_kept(
    monkeypatch: pytest.MonkeyPatch, cache: Path, compiler: list[Any]
) -> None:
    timed(monkeypatch, half=0.5, compiled=2)
    dataset, asked = images()
    with monkeypatch.context() as busy:
        busy.setattr(time, "thread_time", half_a_core)
        chosen, why = choose(dataset, asked)
    assert ways(chosen) == ("bf16", "never")
    assert why.endswith("(others held the cores, so this is measured again the next time)")
    assert not cache.exists()
    again, why = choose(dataset, asked)
    assert again == chosen
    assert "others" not in why
    assert len(list(cache.iterdir())) == 1


def test_short_runs_and_settings_that_are_given_are_not_tried(
    monkeypatch: pytest.MonkeyPatch, compiler: list[Any]
) -> None:
    timed(monkeypatch, half=0.5, compiled=0.5)
    dataset, short = images(hours=0.03)
    assert choose(dataset, short) == (plain(short), "")
    _, given = images(precision="float32", compile="never")
    monkeypatch.setattr(speed, "_timed", lambda trainer: pytest.fail("measured"))
    assert choose(dataset, given) == (given, "")
    tiny = replace(short, training=replace(short.training, images=400))
    assert choose(dataset, tiny) == (plain(tiny), "")


def test_points_keep_their_bits(monkeypatch: pytest.MonkeyPatch, compiler: list[Any]) -> None:
    timed(monkeypatch, half=0.5, compiled=0.5)
    chosen, _ = choose(points(), recipe(points(), images=10**6))
    assert ways(chosen) == ("float32", "always")


def test_a_trial_that_diverges_or_cannot_compile_chooses_the_plain_way(
    monkeypatch: pytest.MonkeyPatch, compiler: list[Any]
) -> None:
    timed(monkeypatch, half=2, compiled=0.5)
    dataset, asked = images()
    wild = replace(asked, optimiser=replace(asked.optimiser, lr=1e30, warmup=0))
    assert choose(dataset, wild) == (plain(wild), "")

    def broken(function: Any, dynamic: bool, **options: Any) -> Any:
        def call(*values: Any, **more: Any) -> Tensor:
            raise RuntimeError("No working C++ compiler found (tried g++)\nand more")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    chosen, why = choose(dataset, asked)
    assert ways(chosen) == ("float32", "never")
    assert "torch.compile does not work here (RuntimeError: No working C++ compiler found tried g++)" in why


def test_a_network_that_cannot_be_compiled_trains_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *values, **more: 1 / 0)
    data = points()
    asked = recipe(data, compile="always")
    trainer, usual = Trainer(data, asked, seed=3), Trainer(data, plain(recipe(data)), seed=3)
    with pytest.warns(UndiffuseWarning, match="torch.compile does not work here .ZeroDivisionError"):
        trainer.update()
    trainer.update(), usual.update(), usual.update()
    assert bits(trainer) == bits(usual)
    assert list(trainer.denoiser.state_dict()) == list(usual.denoiser.state_dict())


def test_a_few_shapes_are_compiled_and_the_rest_run_as_they_are(compiler: list[Any]) -> None:
    plain: list[int] = []
    programs: list[int] = []
    compiled = Program(lambda x, label: plain.append(len(x)), "")
    compiled.program = lambda x, label: programs.append(len(x))
    for batch in [*range(1, SHAPES + 3), 1, 2]:
        compiled(torch.zeros(batch, 2), torch.zeros(batch))
    assert programs == [*range(1, SHAPES + 1), 1, 2]
    assert plain == [SHAPES + 1, SHAPES + 2]


def test_a_run_goes_on_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: list[Any]) -> None:
    data = points()
    asked = recipe(data, images=40, precision="auto", compile="auto", checkpoint_every=5)
    lines: list[str] = []
    forced = settle(asked, {"precision": "bf16", "compile": "always"})
    monkeypatch.setattr(speed, "choose", lambda *values, **options: (forced, "because"))
    run_training(data, asked, tmp_path / "straight", say=lines.append)
    assert any("bf16, compiled" in " ".join(line.split()) for line in lines)
    assert any(line.startswith("speed      because") for line in lines)
    assert load_json(tmp_path / "straight" / "config.json")["recipe"]["training"]["precision"] == "bf16"

    def stop(progress: Any) -> None:
        if progress.step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(data, asked, tmp_path / "cut", progress=stop)
    compiler.clear()
    monkeypatch.setattr(speed, "choose", lambda *values, **options: pytest.fail("chosen anew"))
    run_training(data, asked, tmp_path / "cut")
    assert len(compiler) == 1
    for name in ("weights", "ema", "optimiser"):
        one, other = (
            sorted((tmp_path / run / "checkpoints").iterdir())[-1] / f"{name}.safetensors"
            for run in ("straight", "cut")
        )
        assert one.read_bytes() == other.read_bytes()
    explicit = settle(asked, {"precision": "float32", "compile": "always"})
    with pytest.raises(UndiffuseError, match=r"precision: .*--change"):
        run_training(data, explicit, tmp_path / "cut")


def test_a_checkpoint_that_does_not_say_was_plain() -> None:
    data = points()
    asked = recipe(data)
    stated = {"identity": {"recipe": {"training": {"precision": "bf16"}}}}
    assert ways(as_before(asked, stated)) == ("bf16", "never")
    assert ways(as_before(asked, {})) == ("float32", "never")


def test_explanations_are_whole() -> None:
    trial = Trial(0.1, bf16=0.54, compiled=0.98, compiling=63)
    assert speed.explain(trial, 3600) == (
        "bf16, not compiled: an update in bf16 takes 54% of the time of one in float32; a compiled one 98% of one that "
        "is not, after 63 s, which does not pay"
    )
    assert json.dumps(trial.__dict__)


@pytest.mark.slow
def test_compiled_training_is_the_training(tmp_path: Path) -> None:
    """The real torch.compile: the same losses to rounding, the same state keys, and bit-equal when repeated."""
    data = points()
    usual, one, other = (
        Trainer(data, recipe(data, precision="float32", compile=way), seed=3) for way in ("never", "always", "always")
    )
    try:
        losses = [[float(trainer.update().loss) for _ in range(4)] for trainer in (usual, one, other)]
    except UndiffuseWarning as warning:
        pytest.skip(str(warning))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[1] == losses[2]
    assert bits(one) == bits(other)
    assert list(one.denoiser.state_dict()) == list(usual.denoiser.state_dict())


# --- no update waits for the device -----------------------------------------------------------------------------------


class Looks(TorchDispatchMode):
    """Counts how often a number that depends on the parameters or on the batch is looked at (``item``, ``bool``):
    on an accelerator each of them waits."""

    def __init__(self, *sources: Tensor) -> None:
        super().__init__()
        self.kept = list(sources)  # so that no id is used twice
        self.far = {id(source) for source in sources}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        far = any(isinstance(value, Tensor) and id(value) in self.far for value in given)
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += far
        result = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result) if far else ():
            if isinstance(value, Tensor):
                self.kept.append(value)
                self.far.add(id(value))
        return result


def looks(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often an update looks at what an accelerator would hold."""
    for _ in range(2):
        trainer.update()
    x0, cond = trainer.read(trainer.step)
    monkeypatch.setattr(trainer, "check", lambda: None)  # on a CPU every update checks
    monkeypatch.setattr(trainer, "_batch", lambda: (x0, cond))
    with Looks(x0, *cond.values(), *trainer.parameters.values(), trainer._first_bad) as mode:
        trainer.update()
    return mode.count


def test_no_update_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "waits", lambda values: True)  # as on an accelerator
    assert looks(Trainer(points(), recipe(points())), monkeypatch) == 0


def test_the_count_of_looks_sees_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert looks(Trainer(points(), recipe(points())), monkeypatch) > 0  # the CPU's check of the classes


def test_classes_that_do_not_exist_are_found_before_they_go_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    data = points()
    trainer = Trainer(data, recipe(data))
    batch = data.batch
    object.__setattr__(data, "batch", lambda indices: (batch(indices)[0], {"classes": torch.full((4,), 9)}))
    monkeypatch.setattr(conditions, "waits", lambda values: True)
    with pytest.raises(UndiffuseError, match="class 9 does not exist"):
        trainer.update()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_update_waits_for_a_gpu() -> None:
    trainer = Trainer(points(), recipe(points()), device="cuda")
    for _ in range(3):
        trainer.update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_twin_says_nothing_of_its_schedule_again() -> None:
    twin = for_training(Denoiser(nn.Identity(), Flow(), FlowVelocity()))
    assert isinstance(twin.network, Compiled)
