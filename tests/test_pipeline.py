"""A pipeline is what it was saved as, or an error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from undiffuse.asking import Question, Sampling, answer_together, guided
from undiffuse.commands import main
from undiffuse.conditions import Attributes, Classes, Conditions, Text, Vector
from undiffuse.data import DataSpec
from undiffuse.data.spec import units_between
from undiffuse.denoiser import INPUT_SCALES, LABELS
from undiffuse.errors import UndiffuseError, UndiffuseWarning
from undiffuse.networks import sized
from undiffuse.pipeline import ModelConfig, Pipeline, find_pipeline
from undiffuse.predictions import PREDICTIONS
from undiffuse.schedules import SCHEDULES
from undiffuse.solvers import SOLVERS, Heun
from undiffuse.tokens import learn
from undiffuse.weights import read_header, read_weights

SHIFT, SCALE = units_between(0, 16)
SPEC = DataSpec("image", (1, 8, 8), "uint8", 0.0, 16.0, SHIFT, SCALE, "HW", tuple("0123456789"))
FREE = DataSpec("points", (2,), "float64", None, None, (3.0, -1.0), (2.0, 5.0), "D")


def pipeline(spec: DataSpec = SPEC, classes: int = 10, seed: int = 0, **config: object) -> Pipeline:
    """A tiny model with random weights that do something (fresh ones end in zeros)."""
    name, options = sized(spec.shape, "tiny", 16 if classes else 0)
    conditions = {"classes": {"kind": "classes", "classes": classes}} if classes else {}
    fields = {
        "network": name,
        "network_config": options,
        "schedule": SCHEDULES["flow"],
        "prediction": PREDICTIONS["flow"],
        "label": LABELS["time"],
        "input_scale": INPUT_SCALES["none"],
        "conditions": conditions,
    }
    model = ModelConfig(**{**fields, **config})  # type: ignore[arg-type]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        denoiser = model.build()
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return Pipeline(denoiser.eval(), model, spec, Sampling(steps=4), {"data": "none"})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline().save(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("schedule", ["linear", "flow", "shifted", "zero_terminal_snr", "table"])
def test_what_is_loaded_samples_the_same(schedule: str, tmp_path: Path) -> None:
    with pytest.warns(UndiffuseWarning) if schedule == "table" else _nothing():
        made = pipeline(schedule=SCHEDULES[schedule], prediction=PREDICTIONS["v"])
        loaded = Pipeline.load(made.save(tmp_path / "a"))
    assert (loaded.config, loaded.spec, loaded.sampling) == (made.config, made.spec, made.sampling)
    assert loaded.fingerprint == made.fingerprint
    assert np.array_equal(loaded.sample(5, seed=3), made.sample(5, seed=3))


def test_saving_again_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    again = Pipeline.load(saved).save(tmp_path / "again")
    for name in ("model.safetensors", "pipeline.json"):
        assert (again / name).read_bytes() == (saved / name).read_bytes()


def test_loading_leaves_the_global_random_stream_alone(saved: Path) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    Pipeline.load(saved)
    assert torch.equal(before, torch.random.get_rng_state())


def test_trap_X3_what_the_weights_mean_is_in_their_own_file(saved: Path) -> None:
    meaning = json.loads(read_header(saved / "model.safetensors").metadata["undiffuse"])
    assert meaning["model"]["prediction"] == {"kind": "flow"}
    assert meaning["model"]["schedule"] == {"kind": "flow"}
    assert (meaning["data"]["low"], meaning["data"]["high"], meaning["data"]["shift"]) == (0.0, 16.0, [8.0])


def test_trap_X3_weights_without_their_meaning_are_refused(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(read_weights(folder / "model.safetensors"), folder / "model.safetensors")
    with pytest.raises(UndiffuseError, match="not what they mean"):
        Pipeline.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["model"].update(prediction={"kind": "eps"}),
        lambda c: c["model"].update(schedule={"kind": "cosine"}),
        lambda c: c["data"].update(high=255.0),
        lambda c: c["model"]["network_config"].update(embedding=32),
        lambda c: c.update(format=2),
        lambda c: c.update(surprise=1),
        lambda c: c.pop("model"),
        lambda c: c.pop("sampling"),
        lambda c: c["sampling"].update(solver={"kind": "hune"}),
        lambda c: c["sampling"].update(stpes=3),
        lambda c: c["sampling"].update(steps="8"),
    ],
)
def test_an_edited_description_is_refused(change: Callable[[dict], object], folder: Path) -> None:
    edit(folder / "pipeline.json", change)
    with pytest.raises(UndiffuseError, match=r"pipeline\.json") as caught:
        Pipeline.load(folder)
    assert "\n" not in str(caught.value)


def test_default_settings_may_be_edited(folder: Path) -> None:
    edit(folder / "pipeline.json", lambda c: c["sampling"].update(solver={"kind": "heun"}, steps=3))
    assert Pipeline.load(folder).sampling == Sampling(solver=Heun(), steps=3)


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, 0.99])
def test_truncated_weights_are_refused(kept: float, folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(UndiffuseError, match=r"model\.safetensors.*copy it again"):
        Pipeline.load(folder)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_LD1_one_flipped_bit_in_the_weights_is_found(share: float, folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    body = 8 + int.from_bytes(content[:8], "little")
    content[body + int(share * (len(content) - body - 1))] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UndiffuseError, match=r"model\.safetensors: damaged .*copy it again"):
        Pipeline.load(folder)


def test_weights_of_another_architecture_are_refused(folder: Path, tmp_path: Path) -> None:
    other = pipeline(classes=7).save(tmp_path / "other")
    meaning = json.loads((folder / "pipeline.json").read_text())
    tensors = read_weights(other / "model.safetensors")
    from undiffuse.weights import write_weights

    stated = {name: meaning[name] for name in ("format", "model", "data", "info")}
    write_weights(folder / "model.safetensors", tensors, {"undiffuse": json.dumps(stated)})
    with pytest.raises(UndiffuseError, match=r"another architecture: 1 of another shape .*conditions"):
        Pipeline.load(folder)


def test_weights_that_are_not_numbers_are_refused(folder: Path) -> None:
    broken = pipeline()
    with torch.no_grad():
        next(broken.denoiser.parameters()).view(-1)[0] = torch.nan
    broken.save(folder)
    with pytest.raises(UndiffuseError, match="NaN or infinite"):
        Pipeline.load(folder)


def test_where_models_are_found(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "mine"
    shutil.copytree(folder, run / "model")
    monkeypatch.chdir(tmp_path)
    assert find_pipeline(run) == run / "model"
    assert find_pipeline("mine") == Path("runs/mine/model")
    (tmp_path / "empty").mkdir()
    for missing, reason in (
        ("nothing", "no such model"),
        ("empty", "no model here"),
        (str(folder / "pipeline.json"), "a file"),
    ):
        with pytest.raises(UndiffuseError, match=reason):
            find_pipeline(missing)


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_law_6_a_sample_does_not_depend_on_its_batch(saved: Path) -> None:
    model = Pipeline.load(saved)
    for solver in ("dpmpp_2m", "ddpm"):
        together = model.draw(10, seed=5, sampling=model.settings(solver=solver))
        for size in (1, 3, 4):
            apart = model.draw(10, seed=5, sampling=model.settings(solver=solver), batch_size=size)
            assert float((together - apart).abs().max()) < 1e-4  # the network's own rounding; noise is equal to the bit
        some = model.draw([7, 2], seed=5, sampling=model.settings(solver=solver))
        assert float((together[[7, 2]] - some).abs().max()) < 1e-4


def test_data_leave_in_their_own_units() -> None:
    digits = pipeline().sample(3)
    assert (digits.shape, digits.dtype) == ((3, 8, 8), np.uint8)
    assert digits.max() <= 16
    model = pipeline(FREE, classes=0)
    points, x = model.sample(50), model.draw(50)
    assert points.dtype == np.float64
    assert np.allclose(points, x.double().numpy() * [2.0, 5.0] + [3.0, -1.0])


def test_trap_G5_the_class_reaches_the_network() -> None:
    model = pipeline()
    a, b, none = (model.draw(4, classes=[c]) for c in (1, 2, None))
    assert not torch.equal(a, b)
    assert not torch.equal(a, none)


def test_classes_go_round() -> None:
    model = pipeline()
    assert model.conditions(range(5), [3, None, 7])["classes"].tolist() == [3, 10, 7, 3, 10]
    assert model.conditions([0, 11, 12], None)["classes"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "ddpm_learned"])
def test_trap_S21_calls_are_counted_as_they_are_made(solver: str) -> None:
    model = pipeline()
    for scale, factor in ((1.0, 1), (0.0, 1), (2.0, 2)):
        sampling = model.settings(solver=solver, steps=3, guidance_scale=scale)
        seen = 0

        def count(module: object, inputs: tuple[Tensor, Tensor], output: object) -> None:
            nonlocal seen
            seen += len(inputs[0])  # guidance asks both questions in one call of twice the rows

        hook = model.denoiser.network.register_forward_hook(count)
        model.draw(2, sampling=sampling)
        hook.remove()
        seen //= 2
        if SOLVERS[solver].adaptive:
            assert seen >= model.calls(sampling) // 2  # its steps follow the model
        else:
            assert seen == model.calls(sampling)
            assert seen % factor == 0


def test_guidance_outside_its_interval_costs_one_call() -> None:
    model = pipeline()
    everywhere = model.calls(model.settings(guidance_scale=3.0, steps=10))
    inside = model.calls(model.settings(guidance_scale=3.0, steps=10, guidance_interval=(0.5, 2.0)))
    assert everywhere == 20
    assert 10 < inside < 20


def test_trap_S16_thresholds_need_a_declared_range() -> None:
    free = pipeline(FREE, classes=0)
    with pytest.raises(UndiffuseError, match="declared range"):
        free.draw(1, sampling=free.settings(threshold="static"))
    model = pipeline()
    assert float(model.draw(8, sampling=model.settings(threshold="static")).abs().max()) <= 1.0


def test_brownian_noise_is_a_choice() -> None:
    model = pipeline()
    path, independent = (model.settings(solver="ddpm", noise=noise) for noise in ("brownian", "independent"))
    assert torch.equal(model.draw(2, sampling=path), model.draw(2, sampling=path))
    assert not torch.equal(model.draw(2, sampling=path), model.draw(2, sampling=independent))


@pytest.mark.parametrize(
    ("ask", "reason"),
    [
        (lambda m: m.sample(0), "at least 1"),
        (lambda m: m.sample(2, batch_size=0), "at least 1"),
        (lambda m: m.sample(2, steps=0), "at least 1"),
        (lambda m: m.sample(2, seed=-1), "seed"),
        (lambda m: m.sample(2, classes=[10]), "0 to 9"),
        (lambda m: m.sample(2, classes=[]), "no class given"),
        (lambda m: m.sample(2, solver="hune"), "did you mean 'heun'"),
        (lambda m: m.sample(2, gird="karras"), "did you mean 'grid'"),
        (lambda m: m.sample(2, guidance_scale=float("nan")), "finite"),
        (lambda m: m.sample(2, solver="ddpm_learned"), "learned variance"),
        (lambda m: m.sample(2, grid="leading"), "pure noise"),
        (lambda m: pipeline(classes=0).sample(2, guidance_scale=2.0), "without conditions"),
        (lambda m: pipeline(classes=0).sample(2, classes=[1]), "without classes"),
    ],
)
def test_law_8_what_cannot_be_is_refused(ask: Callable[[Pipeline], object], reason: str) -> None:
    with pytest.raises(UndiffuseError, match=reason):
        ask(pipeline())


def _nothing():
    from contextlib import nullcontext

    return nullcontext()


def test_law_6_with_a_fixed_number_of_rows_a_sample_does_not_depend_on_its_batch() -> None:
    model = pipeline()
    for scale in (1.0, 2.5):
        sampling = model.settings(steps=3, solver="ddpm", guidance_scale=scale)
        together = model.draw(5, sampling=sampling, rows=8)
        assert torch.equal(together, torch.cat([model.draw([i], sampling=sampling, rows=8) for i in range(5)]))
        assert torch.equal(together, model.draw(5, sampling=sampling, rows=8, batch_size=2))
    with pytest.raises(UndiffuseError, match="2 rows"):
        model.draw(1, sampling=model.settings(guidance_scale=2.0), rows=1)


def test_questions_of_many_are_answered_as_if_each_were_asked_alone() -> None:
    model = pipeline()
    x = torch.randn(6, *model.spec.shape, generator=torch.Generator().manual_seed(0))
    questions, separate = [], []
    for i, (scale, t) in enumerate(((1.0, 1.0), (0.0, 0.7), (3.0, 0.2))):
        rows, level = x[2 * i : 2 * i + 2], model.config.schedule(t)
        cond = model.conditions([0, 1], [i])
        sampling = model.settings(guidance_scale=scale, guidance_rescale=0.5 * (i == 2), threshold="static")
        questions.append(Question(rows, level, cond, model.denoiser.null(2), sampling))
        separate.append(guided(model.denoiser.bind(**cond), model.denoiser.bind(), sampling)(rows, level))
    for one, other in zip(answer_together(model.denoiser, questions), separate, strict=True):
        assert torch.allclose(one.x0, other.x0, atol=1e-5)
        assert torch.allclose(one.eps, other.eps, atol=1e-5)


# --- any condition by name --------------------------------------------------------------------------------------------


def conditional() -> Pipeline:
    """Attributes, a vector and a text."""
    captions = ["a red dot", "a blue dot", "a red line"] * 3
    parts = {"kind": Attributes((2, 3), 16), "place": Vector(2, 16), "text": Text(learn(captions), 16, 8, 16)}
    name, options = sized(SPEC.shape, "tiny", 16, token_width=16)
    spec = replace(SPEC, classes=())
    return pipeline(spec, 0, network=name, network_config=options, conditions=Conditions(parts).config)


def test_any_condition_is_asked_for_by_name_and_sample_i_gets_row_i_in_turn() -> None:
    made = conditional()
    cond = {"kind": [[1, None], [0, 2]], "place": [[0.5, 1], None], "text": ["a red dot"]}
    told = made.conditions(range(3), None, cond=cond)
    assert told["kind"].tolist() == [[1, 3], [0, 2], [1, 3]]  # the null value of the second is its size
    assert torch.equal(told["place"][[0, 2]], torch.tensor([[0.5, 1.0], [0.5, 1.0]]))
    assert told["place"][1].isnan().all()
    assert torch.equal(told["text"], made.conditions(range(3), None, ["a red dot"])["text"])
    together = made.draw(3, cond=cond, seed=3)
    alone = made.draw([2], cond={"kind": [[1, None]], "place": [[0.5, 1.0]]}, prompts=["a red dot"], seed=3)
    assert torch.allclose(together[2:], alone, atol=1e-5)
    for name in cond:  # each of them reaches the picture
        assert not torch.allclose(together, made.draw(3, cond={**cond, name: [None]}, seed=3), atol=1e-4)


def test_one_row_is_as_good_as_a_list_of_it() -> None:
    made = conditional()
    alone = made.conditions(range(2), None, cond={"kind": [1, None], "place": (0.5, 1), "text": "a red dot"})
    listed = made.conditions(range(2), None, cond={"kind": [[1, None]], "place": [[0.5, 1]], "text": ["a red dot"]})
    assert all(torch.equal(alone[name], listed[name]) for name in alone)
    other = pipeline()
    assert other.conditions(range(2), None, cond={"classes": "7"})["classes"].tolist() == [7, 7]
    assert other.conditions(range(3), None, cond={"classes": ["7", 3, None]})["classes"].tolist() == [7, 3, 10]
    with pytest.raises(UndiffuseError, match="unknown class 'seven'"):
        other.conditions([0], None, cond={"classes": "seven"})


def test_guidance_leads_away_from_any_condition_by_name() -> None:
    made = conditional()
    sampling = made.settings(guidance_scale=2.5)
    cond, against = {"kind": [[1, 2]]}, {"kind": [[0, 1]], "text": ["a dot"]}
    begun = made.begin(2, cond=cond, against=against, sampling=sampling, seed=1)
    level = begun.levels[1]
    yes, no = (made.denoiser(begun.x, level, **made.conditions(range(2), None, cond=each)) for each in (cond, against))
    asked = made.denoise(begun.cond, sampling, against=begun.against)(begun.x, level)
    assert torch.allclose(asked.x0, no.x0 + 2.5 * (yes.x0 - no.x0), atol=1e-4)
    drawn = made.draw(2, cond=cond, against=against, sampling=sampling, seed=1)
    assert not torch.allclose(drawn, made.draw(2, cond=cond, sampling=sampling, seed=1), atol=1e-3)
    with pytest.raises(UndiffuseError, match="acts through guidance"):
        made.draw(1, against=against)


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        ({"knd": [[1, 2]]}, "did you mean 'kind'"),
        ({"kind": []}, "no row"),
        ({"kind": [[1]]}, "must be integers"),
        ({"kind": [[1, 2, 0]]}, "must be integers"),
        ({"kind": [[None, 1, 2]]}, "takes numbers"),
        ({"kind": [[1.5, 1]]}, "must be integers"),
        ({"kind": [[True, True]]}, "takes numbers"),
        ({"kind": [[1, 9]]}, "attribute 1 has no value 9"),
        ({"kind": [["1", "2"]]}, "takes numbers"),
        ({"kind": [[2**70, 1]]}, "takes numbers"),
        ({"place": [[0.1, None]]}, "NaN or infinite"),
        ({"place": [[0.1, float("inf")]]}, "NaN or infinite"),
        ({"place": [0.1]}, "takes \\[B, 2\\]"),
        ({"place": torch.zeros(1, 3)}, "takes \\[B, 2\\]"),
        ({"text": [3]}, "is a text"),
        ({"place": [[[0.1, 0.2]]]}, "takes \\[B, 2\\]"),
    ],
)
def test_conditions_that_do_not_exist_are_named(cond: dict, message: str) -> None:
    with pytest.raises(UndiffuseError, match=message):
        conditional().draw(1, cond=cond)


def test_what_is_asked_for_twice_is_refused() -> None:
    with pytest.raises(UndiffuseError, match="given twice"):
        conditional().draw(1, cond={"text": ["a"]}, prompts=["b"])
    with pytest.raises(UndiffuseError, match="given twice"):
        pipeline().draw(1, cond={"classes": [1]}, classes=[2])
    with pytest.raises(UndiffuseError, match="without conditions"):
        pipeline(classes=0).draw(1, cond={"classes": [1]})


def test_conditions_of_the_command_line_are_those_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = conditional()
    made.save("model")
    told = ["--cond", "kind=1,none", "--cond", "place=0.5,-1", "--cond", "text=a red dot", "--against", "kind=0,2"]
    assert main(["sample", "model", "-n", "2", "--guidance-scale", "2", *told, "--out", "x.npy"]) == 0
    cond = {"kind": [[1, None]], "place": [[0.5, -1]], "text": ["a red dot"]}
    wanted = made.sample(2, cond=cond, against={"kind": [[0, 2]]}, guidance_scale=2.0)
    assert np.array_equal(np.load("x.npy"), wanted)
    parts = {"digit": Classes(4, 16)}
    _, options = sized(SPEC.shape, "tiny", 16)
    other = pipeline(replace(SPEC, classes=()), 0, network_config=options, conditions=Conditions(parts).config)
    other.save("other")
    assert main(["sample", "other", "-n", "3", "--cond", "digit=3,none", "--out", "y.npy"]) == 0
    assert np.array_equal(np.load("y.npy"), other.sample(3, cond={"digit": [3, None]}))
    for wrong in ("knd=1", "kind", "kind=a,b", "kind=1,,2"):
        assert main(["sample", "model", "--cond", wrong]) == 2
