"""Compiled and half-precision sampling: the same samples to rounding, and nothing that a program overwrites is kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import test_codecs
import test_text
from test_pipeline import FREE, SPEC, pipeline
from undiffuse import Pipeline, UndiffuseError, UndiffuseWarning
from undiffuse.commands.sample import report, sample
from undiffuse.compiling import FILLED_SHAPES, Filled, Program
from undiffuse.outputs import read_parameters
from undiffuse.predictions import PREDICTIONS
from undiffuse.schedules import SCHEDULES
from undiffuse.serving.engine import Engine, Request


class Overwriting:
    """In place of torch.compile: programs that write each answer where the last one of that shape stood, as CUDA graphs
    do. Notes the rows of their calls."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        kept: dict[tuple[object, ...], Tensor] = {}

        def write(i: int, made: Tensor) -> Tensor:
            return kept.setdefault((i, made.shape), torch.empty_like(made)).copy_(made)

        def run(*given: Any, **named: Any) -> Any:
            made = function(*given, **named)
            self.rows.append(len(given[0]))
            if isinstance(made, Tensor):
                return write(0, made)
            return tuple(write(i, each) for i, each in enumerate(made))

        return run


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Overwriting:
    found = Overwriting()
    monkeypatch.setattr(torch, "compile", found)
    return found


def network(name: str, **options: Any) -> Pipeline:
    """A small pipeline of another network."""
    config = {"in_channels": 1, "condition_width": 16, **options}
    return pipeline(network=name, network_config=config)


DIT = {"widths": [16], "blocks": [3], "head_width": 8, "patch": 2}


# --- what is overwritten ----------------------------------------------------------------------------------------------


def test_a_program_overwrites_its_answer_and_what_a_sampler_is_given_stays(compiler: Overwriting) -> None:
    for calls, stays in ((Program(lambda x: x + 1, ""), False), (Filled(lambda x: x + 1, "inductor", None), True)):
        with torch.no_grad():
            first, _ = calls(torch.zeros(2)), calls(torch.ones(2))
        assert torch.equal(first, torch.ones(2)) == stays


@pytest.mark.parametrize("prediction", ["flow", "x0", "eps"])
def test_no_solver_sees_an_estimate_that_a_later_call_has_overwritten(compiler: Overwriting, prediction: str) -> None:
    schedule = SCHEDULES["linear" if prediction == "eps" else "flow"]
    model = pipeline(prediction=PREDICTIONS[prediction], schedule=schedule)
    fast = model.compiled()
    for name in ("dpmpp_2m", "unipc_3", "ipndm_4", "deis_3", "pndm", "heun", "dpmpp_2m_sde"):
        asked: dict[str, Any] = {"seed": 3, "sampling": model.settings(solver=name, steps=5, guidance_scale=2.0)}
        assert torch.equal(fast.draw(2, **asked), model.draw(2, **asked)), name
    assert set(compiler.rows) == {4}


def test_a_decoder_s_data_are_not_overwritten(compiler: Overwriting) -> None:
    model = test_codecs.pipeline(test_codecs.fold())
    fast = model.compiled()
    z = torch.randn(5, *model.shape, generator=torch.Generator().manual_seed(0))
    for alone in (True, False):
        assert torch.equal(fast.decode(z, alone), model.decode(z, alone))
    assert compiler.rows == [1] * 5 + [8]


def test_what_lies_deep_is_reused_and_not_overwritten(compiler: Overwriting) -> None:
    model = network("dit", **DIT)
    fast = model.compiled()
    for scale in (1.0, 2.0):
        settings = model.settings(steps=6, reuse=3, guidance_scale=scale, guidance_interval=(0.3, 3.0))
        torch.testing.assert_close(fast.draw(3, sampling=settings), model.draw(3, sampling=settings))
    assert set(compiler.rows) == {4, 8}


# --- rows -------------------------------------------------------------------------------------------------------------


def test_calls_are_filled_up_to_powers_of_two(compiler: Overwriting) -> None:
    model = pipeline()
    fast = model.compiled()
    for count, rows in ((1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (7, 8)):
        compiler.rows.clear()
        settings = model.settings(steps=2)
        torch.testing.assert_close(
            fast.draw(count, sampling=settings), model.draw(count, sampling=settings), rtol=1e-4, atol=1e-4
        )
        assert compiler.rows == [rows] * 2
    compiler.rows.clear()
    fast.draw(4, sampling=model.settings(steps=4, guidance_scale=2.0, guidance_interval=(0.5, 2.0)))
    assert sorted(set(compiler.rows)) == [4, 8]  # guided or not, each with a program of its own


def test_shapes_beyond_the_most_run_as_they_are(compiler: Overwriting) -> None:
    calls = Filled(torch.add, "inductor", None)
    with torch.no_grad():
        for width in range(1, FILLED_SHAPES + 4):
            assert torch.equal(calls(torch.ones(3, width), torch.ones(3, width)), torch.full((3, width), 2.0))
    assert compiler.rows == [4] * FILLED_SHAPES


def test_gradients_go_through_the_network_itself(compiler: Overwriting) -> None:
    fast = pipeline().compiled()
    x = torch.zeros(1, *fast.shape, requires_grad=True)
    fast.denoise(fast.conditions([0], [1]), fast.settings())(x, fast.config.schedule(0.5)).x0.sum().backward()
    assert compiler.rows == []
    assert isinstance(x.grad, Tensor)


# --- the same samples -------------------------------------------------------------------------------------------------


MODELS: dict[str, Callable[[], Pipeline]] = {
    "unet": pipeline,
    "dit": lambda: network("dit", **DIT),
    "mlp": lambda: pipeline(FREE, classes=3),
    "text": test_text.pipeline,
    "latents": lambda: test_codecs.pipeline(test_codecs.fold()),
}


def agree(name: str, backend: str) -> Pipeline:
    """Compiled and plain, guided, by a solver that keeps past estimates."""
    model = MODELS[name]()
    asked: dict[str, Any] = (
        {"prompts": ["a red circle", "two green squares above a triangle"]} if name == "text" else {}
    )
    scale = 1.0 if name == "latents" else 2.5
    settings = model.settings(solver="dpmpp_2m", steps=5, guidance_scale=scale)
    fast = model.compiled(backend)
    found = fast.draw(3, sampling=settings, **asked)
    torch.testing.assert_close(found, model.draw(3, sampling=settings, **asked), rtol=1e-3, atol=1e-3)
    assert torch.equal(found, fast.draw(3, sampling=settings, **asked))
    return fast


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_a_guided_trajectory_is_the_plain_one_to_rounding(name: str) -> None:
    assert agree(name, "aot_eager").arithmetic["compiled"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_torchs_own_programs_make_the_same_samples(name: str) -> None:
    if not agree(name, "inductor").arithmetic["compiled"]:
        pytest.skip("torch.compile does not work here")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_make_the_same_samples() -> None:
    model = pipeline()
    model.denoiser.cuda()
    settings = model.settings(solver="ipndm_4", steps=6, guidance_scale=2.0)
    fast = model.compiled()
    found = fast.draw(5, sampling=settings)
    assert fast.arithmetic == {"device": "cuda", "dtype": "float32", "compiled": True}
    torch.testing.assert_close(found, model.draw(5, sampling=settings), rtol=1e-2, atol=1e-2)
    with Engine({"m": fast}, rows=8) as engine:  # on a thread of its own
        served = engine.run(Request("m", settings, samples=range(3)))
    torch.testing.assert_close(served, found[:3], rtol=1e-2, atol=1e-2)


def test_where_compiling_does_not_work_sampling_goes_on_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object, **named: object) -> Any:
        raise RuntimeError("No working C++ compiler found (tried g++)")

    monkeypatch.setattr(torch, "compile", lambda function, **options: broken)
    model = pipeline()
    fast = model.compiled()
    with pytest.warns(UndiffuseWarning, match="torch.compile does not work here .*C\\+\\+ compiler.*sampling goes on"):
        found = fast.draw(2)
    assert torch.equal(found, model.draw(2))
    assert not fast.arithmetic["compiled"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.draw(3)  # said once


def test_the_model_is_what_it_was(tmp_path: Path, compiler: Overwriting) -> None:
    model = pipeline()
    fast = model.compiled()
    fast.draw(1)
    assert model.fast is None
    assert fast.fingerprint == model.fingerprint
    fast.save(tmp_path / "fast"), model.save(tmp_path / "model")
    one, other = (tmp_path / name / "model.safetensors" for name in ("fast", "model"))
    assert one.read_bytes() == other.read_bytes()
    values = np.full((1, 8, 8), 3, np.uint8)
    likely = [each.log_likelihood(values, [1], steps=2, probes=2).log_prob for each in (fast, model)]
    assert torch.equal(*likely)


def test_attention_is_seen_in_a_compiled_model(compiler: Overwriting) -> None:
    model = test_text.pipeline()
    fast = model.compiled()
    fast.draw(1, prompts=["a red circle"])
    found, plain = (each.attention("a red circle", steps=2) for each in (fast, model))
    assert torch.equal(found.weights, plain.weights)


# --- serving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_an_engine_compiles_before_it_serves_and_answers_the_same(compiler: Overwriting, exact: bool) -> None:
    model = pipeline()
    fast = model.compiled()
    assert fast.fast is not None
    requests = [
        Request(
            "m", model.settings(solver=solver, steps=4, guidance_scale=1.0 + i % 2), samples=range(1 + i % 2), seed=i
        )
        for i, solver in enumerate(("ipndm_4", "heun", "unipc_3", "dpmpp_2m", "euler"))
    ]
    with Engine({"m": fast}, rows=8, exact=exact) as engine:
        assert set(compiler.rows) == ({8} if exact else {1, 2, 4, 8})
        before = len(compiler.rows)
        served = [job.future.result() for job in [engine.submit(each) for each in requests]]
    assert len(compiler.rows) > before
    assert set(compiler.rows) == ({8} if exact else {1, 2, 4, 8})
    for request, x in zip(requests, served, strict=True):
        asked: dict[str, Any] = {"seed": request.seed, "sampling": request.sampling}
        torch.testing.assert_close(x, model.draw(request.samples, **asked), rtol=1e-3, atol=1e-3)
        if exact:
            assert torch.equal(x, fast.draw(request.samples, rows=8, **asked))


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_picture_says_how_it_was_computed_and_is_made_again(tmp_path: Path, compiler: Overwriting) -> None:
    pipeline().save(tmp_path / "model")
    first = sample(tmp_path / "model", number=4, steps=2, precision="bf16", compile=True, out=tmp_path / "a.png")
    assert (first.precision, first.compiled) == ("bfloat16", True)
    assert "; bfloat16, compiled)" in report(first)
    stated = read_parameters(tmp_path / "a.png")
    assert stated["arithmetic"] == {"device": "cpu", "dtype": "bfloat16", "compiled": True}
    again = sample(from_=tmp_path / "a.png", out=tmp_path / "b.png")
    assert (again.precision, again.compiled) == ("bfloat16", True)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    plain = sample(tmp_path / "model", number=4, steps=2, out=tmp_path / "c.png")
    assert (plain.precision, plain.compiled) == ("float32", False)
    assert "compiled" not in report(plain)
    assert read_parameters(tmp_path / "c.png")["arithmetic"]["dtype"] == "float32"
    with pytest.warns(UndiffuseWarning, match="in another precision"):
        sample(from_=tmp_path / "a.png", precision="float32", out=tmp_path / "d.png")


# --- half precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_the_network_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    test_codecs.pipeline(test_codecs.fold()).save(tmp_path)
    whole, half = Pipeline.load(tmp_path), Pipeline.load(tmp_path, dtype=dtype)
    assert half.codec is not None
    assert half.codec.precision == dtype
    assert {p.dtype for p in half.denoiser.network.parameters()} == {half.dtype} == {dtype}
    assert half.codec.hash == half.codec_hash  # its weights are what they were
    settings = whole.settings(solver="unipc_3", steps=4)
    x, level = torch.randn(2, *whole.shape, generator=torch.Generator().manual_seed(0)), whole.config.schedule(0.5)
    one, other = (each.denoise({}, settings)(x, level) for each in (whole, half))
    assert other.x0.dtype == torch.float32
    assert 0 < float((one.x0 - other.x0).detach().abs().max()) < 0.05
    found = half.draw(2, sampling=settings)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, whole.draw(2, sampling=settings), rtol=0.1, atol=0.1)


def test_rounded_weights_are_not_saved_and_have_no_likelihood(tmp_path: Path) -> None:
    pipeline().save(tmp_path / "model")
    half = Pipeline.load(tmp_path / "model", dtype=torch.bfloat16)
    for write in (half.save, half.save_settings):
        with pytest.raises(UndiffuseError, match="bfloat16 are rounded: load the model without dtype"):
            write(tmp_path / "model")
    with pytest.raises(UndiffuseError, match=r"likelihood in torch\.bfloat16 would be rounding"):
        half.log_likelihood(np.zeros((1, 8, 8), np.uint8))
    assert Pipeline.load(tmp_path / "model").fingerprint == pipeline().fingerprint
    with pytest.raises(UndiffuseError, match=r"dtype torch\.int8: a network computes in"):
        Pipeline.load(tmp_path / "model", dtype=torch.int8)


def test_what_was_tuned_is_taken_in_half_precision_too(tmp_path: Path) -> None:
    model = pipeline()
    model.tuned = (model.settings(steps=7, solver="heun"),)
    model.save(tmp_path)
    assert Pipeline.load(tmp_path, dtype=torch.bfloat16).settings(steps=7) == model.tuned[0]


def test_points_in_half_precision_are_warned_of(tmp_path: Path) -> None:
    pipeline(FREE, classes=0).save(tmp_path)
    with pytest.warns(UndiffuseWarning, match="points are few numbers"):
        Pipeline.load(tmp_path, dtype=torch.bfloat16)


def test_numbers_that_overflow_in_half_precision_are_an_error(tmp_path: Path) -> None:
    model = pipeline(SPEC)
    with torch.no_grad():
        for parameter in model.denoiser.network.parameters():
            parameter.mul_(40)
    model.save(tmp_path)
    half = Pipeline.load(tmp_path, dtype=torch.float16)
    with pytest.raises(UndiffuseError, match=r"not finite.*float16"):
        half.draw(1)
