"""Codecs: latents have mean 0 and deviation 1, in the model's own codec or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from undiffuse.asking import Sampling
from undiffuse.codecs import (
    CODECS,
    FILE,
    ChannelMoments,
    Codec,
    Fold,
    Tiling,
    codec_meaning,
    decode_tiled,
    find_codec,
    measure,
)
from undiffuse.config import write_json_atomic
from undiffuse.data import DataSpec
from undiffuse.data.spec import units_between
from undiffuse.denoiser import INPUT_SCALES, LABELS
from undiffuse.errors import UndiffuseError, UndiffuseWarning
from undiffuse.grids import GRIDS
from undiffuse.networks import sized
from undiffuse.pipeline import ModelConfig, Pipeline
from undiffuse.predictions import PREDICTIONS
from undiffuse.schedules import SCHEDULES
from undiffuse.solvers import SOLVERS, UniPC
from undiffuse.tuning import distance
from undiffuse.weights import read_weights, write_weights

SHIFT, SCALE = units_between(0, 255)
SPEC = DataSpec("image", (3, 8, 8), "uint8", 0.0, 255.0, SHIFT, SCALE, "HWC")


class Scaled(Codec):
    """The data times a number, in one number of half precision if asked: overflows for a large one."""

    kind = "scaled"

    def __init__(self, channels: int, gain: float) -> None:
        super().__init__(channels, 1, {"channels": channels, "gain": gain}, reach=0)
        self.gain = nn.Parameter(torch.tensor(float(gain)))

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.gain, torch.full_like(x, 0.1)

    def reconstruct(self, latent: Tensor) -> Tensor:
        half = torch.is_autocast_enabled("cpu")
        wide = latent.to(torch.float16) if half else latent
        return (wide * self.gain).float() / self.gain**2


@pytest.fixture(autouse=True)
def kinds() -> Iterator[None]:
    CODECS["scaled"] = lambda config: Scaled(**config)
    yield
    del CODECS["scaled"]


def data(count: int = 64, seed: int = 0) -> Tensor:
    """Data whose channels differ in mean and deviation."""
    x = torch.randn(count, *SPEC.shape, generator=torch.Generator().manual_seed(seed))
    return (x * torch.tensor([0.1, 0.2, 0.3]).reshape(3, 1, 1) + torch.tensor([0.5, 0.0, -0.5]).reshape(3, 1, 1)).clamp(
        -1, 1
    )


def fold(factor: int = 2) -> Codec:
    codec = Fold(3, 2, factor)
    measure(codec, data().split(20), "noise")
    return codec


def pipeline(codec: Codec | None, seed: int = 0) -> Pipeline:
    """A tiny model with random weights in the latents of ``codec``."""
    name, options = sized(SPEC.shape if codec is None else codec.latent_shape(SPEC.shape), "tiny")
    config = ModelConfig(
        network=name,
        network_config=options,
        schedule=SCHEDULES["flow"],
        prediction=PREDICTIONS["flow"],
        label=LABELS["time"],
        input_scale=INPUT_SCALES["none"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        denoiser = config.build()
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return Pipeline(denoiser.eval(), config, SPEC, Sampling(steps=3), {"data": "none"}, codec=codec)


# --- units ------------------------------------------------------------------------------------------------------------


def test_trap_D5_latents_have_mean_0_and_deviation_1_in_each_channel() -> None:
    z = fold().encode(data()).transpose(0, 1).flatten(1)
    assert z.mean(1).abs().max() < 1e-5
    assert (z.std(1, unbiased=False) - 1).abs().max() < 1e-5


def test_moments_over_batches_are_those_of_all_together() -> None:
    x = data(50).double() * 3 + 1000
    moments = ChannelMoments()
    for part in x.split([1, 7, 30, 12]):
        moments.add(part)
    each = x.transpose(0, 1).flatten(1)
    assert torch.allclose(moments.mean, each.mean(1), rtol=1e-14)
    assert torch.allclose(moments.std, each.std(1, unbiased=False), rtol=1e-12)


def test_decoding_takes_back_encoding() -> None:
    codec, x = fold(), data(5, 1)
    assert torch.allclose(codec.decode(codec.encode(x)), x, atol=1e-6)


def test_a_sample_of_the_posterior_has_its_deviation_in_the_latents_own_units() -> None:
    codec = Scaled(3, 2.0)
    measure(codec, [data()], "noise")
    x, eps = data(4, 1), torch.ones(4, *SPEC.shape)
    apart = codec.encode(x, eps) - codec.encode(x)
    assert torch.allclose(apart, (0.1 / codec.std).reshape(3, 1, 1).expand_as(apart), atol=1e-5)


def test_trap_D5_a_codec_that_was_not_measured_neither_encodes_nor_decodes_nor_saves(tmp_path: Path) -> None:
    codec = Fold(3, 2, 2)
    for use in (
        lambda: codec.encode(data()),
        lambda: codec.decode(torch.zeros(1, 12, 4, 4)),
        lambda: codec.save(tmp_path),
    ):
        with pytest.raises(UndiffuseError, match="not measured"):
            use()


def test_a_dead_channel_and_no_data_are_refused() -> None:
    with pytest.raises(UndiffuseError, match=r"channel 1 .* same for all"):
        measure(Fold(3, 2, 1), [data() * torch.tensor([1.0, 0, 1]).reshape(3, 1, 1)], "half dead")
    with pytest.raises(UndiffuseError, match="no items"):
        measure(Fold(3, 2, 1), [], "nothing")


@pytest.mark.parametrize("shape", [(3, 9, 8), (3, 8), (1, 8, 8), (3, 8, 8, 8)])
def test_data_that_do_not_fit_are_refused_with_what_to_do(shape: tuple[int, ...]) -> None:
    with pytest.raises(UndiffuseError, match=r"multiples of 2, such as 8x8|takes data"):
        fold().encode(torch.zeros(1, *shape))


# --- the file ---------------------------------------------------------------------------------------------------------


def test_what_is_loaded_encodes_the_same(tmp_path: Path) -> None:
    codec = fold()
    codec.spec, codec.info = SPEC, {"data": "noise"}
    loaded = Codec.load(codec.save(tmp_path / "a"))
    assert (loaded.hash, loaded.config, loaded.spec, loaded.info) == (codec.hash, codec.config, SPEC, codec.info)
    assert torch.equal(loaded.encode(data(3, 2)), codec.encode(data(3, 2)))
    again = loaded.save(tmp_path / "b")
    assert (again / FILE).read_bytes() == (tmp_path / "a" / FILE).read_bytes()


def edit(file: Path, **changes: object) -> None:
    """Change a codec file's metadata, weights as they are."""
    meaning = {**codec_meaning(file), **changes}
    write_weights(file, read_weights(file), {"undiffuse_codec": json.dumps(meaning)})


@pytest.mark.parametrize("both", [False, True])
def test_trap_D5_other_statistics_than_the_measured_ones_are_refused(tmp_path: Path, both: bool) -> None:
    file = fold().save(tmp_path) / FILE
    latent = codec_meaning(file)["latent"]
    latent["std"] = [2 * value for value in latent["std"]]
    if both:
        weights = read_weights(file)
        weights["std"] *= 2
        write_weights(file, weights, {"undiffuse_codec": json.dumps(codec_meaning(file))})
    edit(file, latent=latent)
    with pytest.raises(UndiffuseError, match="hash" if both else "stated differently"):
        Codec.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "fald"}, "did you mean 'fold'"),
        ({"config": {"channels": 3, "rank": 2, "factor": 2, "eval": "x"}}, "configuration does not build"),
        ({"config": [1]}, "configuration does not build"),
        ({"config": {"channels": 3, "rank": 2, "factor": 4}}, "another architecture"),
        ({"format": 99}, "format 99"),
        ({"latent": {}}, "mean and deviation"),
        ({"latent": 3}, "mean and deviation"),
        ({"surprise": 1}, "unknown key"),
    ],
)
def test_a_codec_file_that_is_not_right_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    file = fold().save(tmp_path) / FILE
    edit(file, **change)
    with pytest.raises(UndiffuseError, match=message):
        Codec.load(tmp_path)


def test_a_codec_is_found_where_it_lies(tmp_path: Path) -> None:
    folder = fold().save(tmp_path / "run" / "model")
    assert find_codec(tmp_path / "run") == folder
    with pytest.raises(UndiffuseError, match="no such codec"):
        find_codec(tmp_path / "other")
    with pytest.raises(UndiffuseError, match="no codec here"):
        find_codec(tmp_path)


# --- a pipeline with a codec ------------------------------------------------------------------------------------------


def test_samples_of_a_latent_model_are_data() -> None:
    model = pipeline(fold())
    assert model.shape == (12, 4, 4)
    samples = model.sample(3, seed=1)
    assert samples.shape == (3, 8, 8, 3)
    assert samples.dtype == np.uint8
    *_, last = model.frames(3, seed=1)
    assert last.x.shape == (3, 12, 4, 4)
    assert np.array_equal(SPEC.to_data(model.decode(last.x)), samples)


def test_a_fold_of_1_measured_as_it_is_changes_nothing() -> None:
    codec = Fold(3, 2, 1)
    codec.settle([0.0] * 3, [1.0] * 3, {"data": "by hand"})
    assert np.array_equal(pipeline(codec).sample(4, seed=2), pipeline(None).sample(4, seed=2))


def test_a_latent_model_is_saved_with_its_codec(tmp_path: Path) -> None:
    model = pipeline(fold())
    loaded = Pipeline.load(model.save(tmp_path / "m"))
    assert (tmp_path / "m" / "codec" / FILE).is_file()
    assert loaded.fingerprint == model.fingerprint != pipeline(None).fingerprint
    assert np.array_equal(loaded.sample(3), model.sample(3))
    before = (tmp_path / "m" / "codec" / FILE).stat().st_mtime_ns
    model.save(tmp_path / "m")
    assert (tmp_path / "m" / "codec" / FILE).stat().st_mtime_ns == before


def test_trap_D5_a_latent_model_without_its_codec_or_with_another_is_refused(tmp_path: Path) -> None:
    whole = pipeline(fold()).save(tmp_path / "m")
    without = Path(shutil.copytree(whole, tmp_path / "without"))
    shutil.rmtree(without / "codec")
    with pytest.raises(UndiffuseError, match=r"codec.*missing"):
        Pipeline.load(without)
    other = Fold(3, 2, 2)
    measure(other, [2 * data()], "louder noise")
    other.save(whole / "codec")
    with pytest.raises(UndiffuseError, match="trained in the latents of"):
        Pipeline.load(whole)
    stated = json.loads((whole / "pipeline.json").read_text())
    stated["codec"]["hash"] = other.hash
    write_json_atomic(whole / "pipeline.json", stated)
    with pytest.raises(UndiffuseError, match=r"codec is not what model.safetensors was trained with"):
        Pipeline.load(whole)
    plain = pipeline(None).save(tmp_path / "plain")
    other.save(plain / "codec")
    with pytest.raises(UndiffuseError, match="not trained in latents"):
        Pipeline.load(plain)


def test_trap_D5_a_codec_that_changed_since_is_not_saved(tmp_path: Path) -> None:
    model = pipeline(fold())
    assert model.codec is not None
    model.codec.std.mul_(2)
    with pytest.raises(UndiffuseError, match="changed since"):
        model.save(tmp_path / "m")


@pytest.mark.parametrize("threshold", ["static", "dynamic"])
def test_a_threshold_is_refused_in_latents(threshold: str) -> None:
    with pytest.raises(UndiffuseError, match=f"threshold={threshold} .* latents"):
        pipeline(fold()).sample(1, threshold=threshold)


def test_image_to_image_begins_at_the_latents_of_the_image() -> None:
    model, x = pipeline(fold()), data(2, 5)
    begun = model.begin(2, image=x, strength=0.25)
    plain = model.begin(2, strength=1.0)
    alpha = float(begun.levels[0].alpha)
    assert torch.allclose(begun.x - alpha * model.encode(x), float(begun.levels[0].sigma) * plain.x, atol=1e-5)


def test_trap_D6_the_likelihood_in_latents_is_a_density_of_continuous_data() -> None:
    model = pipeline(fold())
    measured = model.log_likelihood(SPEC.to_data(data(2)), steps=3, probes=2)
    assert "latents" in measured.kind
    assert measured.dims == 12 * 4 * 4
    assert measured.start == pytest.approx(1e-3)  # no dequantisation of 8 bits


def test_data_in_other_units_than_the_codec_was_trained_in_are_refused() -> None:
    codec = fold()
    codec.spec = replace(SPEC, dtype="float32", low=None, high=None, shift=(0.0,), scale=(3.0,))
    with pytest.raises(UndiffuseError, match="other units"):
        pipeline(codec)


def test_trap_P7_a_decoder_that_overflows_in_half_precision_is_asked_again_in_float32() -> None:
    codec = Scaled(3, 1000.0)
    measure(codec, [data()], "noise")
    model = pipeline(codec)
    z = codec.encode(data(2))
    wide = model.decode(z)
    codec.precision = torch.float16
    with pytest.warns(UndiffuseWarning, match="not finite in half precision"):
        x = model.decode(z)
    assert torch.equal(x, wide)
    assert not codec.halved


def test_trap_P7_a_decoder_that_is_not_finite_in_float32_either_is_an_error() -> None:
    codec = Scaled(3, 1e30)
    codec.settle([0.0] * 3, [1e30] * 3, {"data": "by hand"})
    with pytest.raises(UndiffuseError, match="decoder's output is not finite"):
        pipeline(codec).decode(torch.ones(1, *SPEC.shape))
    with pytest.raises(UndiffuseError, match="samples are not finite"):
        pipeline(fold()).decode(torch.full((1, 12, 4, 4), float("nan")))


# --- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiling", [Tiling(4), Tiling(3, 1), Tiling(5, 4), Tiling(100)])
@pytest.mark.parametrize("factor", [1, 2])
def test_tiles_are_the_whole(tiling: Tiling, factor: int) -> None:
    codec = Fold(3, 2, factor)
    codec.settle([0.1] * 3 * factor**2, [2.0] * 3 * factor**2, {"data": "by hand"})
    z = torch.randn(2, 3 * factor**2, 11, 7)
    assert torch.allclose(decode_tiled(codec, z, tiling), codec.decode(z), atol=1e-6)


def test_tiles_that_cannot_be_are_refused() -> None:
    for wrong in ((0, None), (4, 4), (4, -1)):
        with pytest.raises(UndiffuseError, match="tiles"):
            Tiling(*wrong)


def test_a_mask_is_kept_where_all_that_a_latent_stands_for_is() -> None:
    keep = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    keep[0, 0, 3, 5] = False
    found = pipeline(fold()).kept(keep)
    assert found.shape == (1, 1, 4, 4)
    assert found.logical_not().nonzero().tolist() == [[0, 0, 1, 2]]


def test_the_engine_serves_data_of_a_latent_model() -> None:
    from undiffuse.serving.engine import Engine, Request

    model = pipeline(fold())
    with Engine({"m": model}, rows=4, exact=True) as engine:
        drawn = engine.run(Request("m", model.settings(), samples=[0, 1], seed=3))
        image, keep = data(1, 4), torch.ones(1, 1, 8, 8, dtype=torch.bool)
        keep[..., :4] = False
        edited = engine.run(Request("m", model.settings(), image=image, keep=keep, strength=0.5))
    assert torch.equal(drawn, model.draw(2, seed=3, rows=4))
    assert torch.allclose(edited[..., 4:], image[..., 4:], atol=1e-5)
    assert not torch.allclose(edited[..., :4], image[..., :4], atol=1e-2)


def test_solvers_of_a_latent_model_are_compared_in_data_and_tuned_in_latents(tmp_path: Path) -> None:
    from undiffuse.commands.solvers import Kept, Measured, report, solvers

    model = pipeline(fold())
    model.save(tmp_path / "model")
    measured = solvers(tmp_path / "model", "4", "euler", samples=16, device="cpu", out=tmp_path / "s.json")
    assert isinstance(measured, Measured)
    row = next(row for row in measured.rows if row.solver == "euler")
    settings = replace(model.sampling, solver=SOLVERS["euler"], grid=GRIDS["flow_power"], steps=4)
    fine = replace(model.sampling, solver=UniPC(3), grid=GRIDS["log_snr"], steps=200)
    drawn, end = (model.draw(range(16), seed=0, sampling=each) for each in (settings, fine))
    assert drawn.shape[1:] == SPEC.shape
    assert row.error == pytest.approx(float(distance(drawn, end)), rel=1e-5)

    kept = solvers(tmp_path / "model", tune=2, samples=4, device="cpu")
    assert isinstance(kept, Kept)
    assert kept.latents
    assert "fine solution of latents" in report(kept)
    again = Pipeline.load(tmp_path / "model")  # with its codec, and what was kept
    assert again.codec_hash == model.codec_hash
    assert again.settings(steps=2) == again.tuned[0]
    tuned, exact = ([*again.frames(4, seed=0, sampling=each)][-1].x for each in (again.tuned[0], fine))
    assert float(distance(tuned, exact)) == pytest.approx(kept.fitted, rel=0.05)
    assert again.sample(2, steps=2).shape == (2, 8, 8, 3)


def test_a_trajectory_is_shown_decoded(tmp_path: Path) -> None:
    from PIL import Image

    from undiffuse.outputs import write_samples

    model = pipeline(fold())
    for name in ("a.gif", "a.png"):
        write_samples(tmp_path / name, model, 2, model.settings(), 64, None, "m", {})
    with Image.open(tmp_path / "a.gif") as film, Image.open(tmp_path / "a.png") as still:
        assert getattr(film, "n_frames", 1) == 4
        film.seek(3)
        assert film.size == still.size
        assert np.abs(np.asarray(film.convert("RGB"), int) - np.asarray(still.convert("RGB"), int)).mean() < 8


def test_no_more_is_decoded_together_than_a_slice_and_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = Scaled(3, 2.0)
    measure(codec, [data()], "noise")
    seen: list[tuple[int, ...]] = []
    plain = Scaled.reconstruct

    def watched(self: Scaled, latent: Tensor) -> Tensor:
        seen.append(tuple(latent.shape))
        return plain(self, latent)

    model, z = pipeline(codec), torch.randn(5, *SPEC.shape)
    whole = model.decode(z)
    monkeypatch.setattr(Scaled, "reconstruct", watched)
    monkeypatch.setattr("undiffuse.pipeline.DECODED", 2 * 3 * 8 * 8)
    assert torch.equal(model.decode(z), whole)
    assert [shape[0] for shape in seen] == [2, 2, 1]
    seen.clear()
    model.tiling = Tiling(3)
    assert torch.allclose(model.decode(z), whole, atol=1e-6)
    assert {shape[2:] for shape in seen} == {(3, 3)}
