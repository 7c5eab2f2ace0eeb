"""An autoencoder of diffusers as the codec of a model of one's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from undiffuse.codecs import FILE, Codec
from undiffuse.commands.train import train
from undiffuse.data import Dataset, from_array
from undiffuse.data import latents as module
from undiffuse.data.latents import Latents, codec_for
from undiffuse.errors import UndiffuseError
from undiffuse.pipeline import Pipeline

pytest.importorskip("diffusers", reason="diffusers' autoencoders are read here")
pytest.importorskip("transformers", reason="diffusers' pipelines read texts with transformers")

import diffusers_models as tiny

pytestmark = pytest.mark.filterwarnings("ignore::undiffuse.errors.UndiffuseWarning")


def pictures(count: int = 24) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def data() -> Dataset:
    return from_array(pictures())


def vq_model() -> Any:
    from diffusers import VQModel

    return tiny.seeded(
        VQModel,
        6,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        vq_embed_dim=3,
        num_vq_embeddings=16,
        norm_num_groups=4,
    )


def small() -> Any:
    from diffusers import AutoencoderTiny

    widths, blocks = (8, 8, 8), (1, 1, 1)
    return tiny.seeded(
        AutoencoderTiny,
        8,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("diffusers") / "sd"
    tiny.sd().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    np.save(place / "data.npy", pictures())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNDIFFUSE_CACHE", str(place / "cache"))
        out = place / "out"
        train(str(place / "data.npy"), out, recipe="tiny", steps=4, codec=folder / "vae", device="cpu")
    return out


def test_a_vae_is_found_in_its_own_folder_and_in_that_of_a_pipeline(folder: Path) -> None:
    alone, whole = Codec.load(folder / "vae"), Codec.load(folder)
    assert alone.kind == "autoencoder_kl"
    assert alone.hash == whole.hash
    assert alone.latent_shape((3, 16, 16)) == (4, 4, 4)
    with pytest.raises(UndiffuseError, match="not measured yet"):  # its constants are of other people's data
        alone.encode(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("kind", ["kl", "tiny", "vq"])
def test_trap_D5_the_units_are_measured_on_the_data_and_not_taken_from_the_file(kind: str, tmp_path: Path) -> None:
    made = {"kl": lambda: tiny.vae(scaling_factor=7.0), "tiny": small, "vq": vq_model}[kind]()
    made.save_pretrained(tmp_path / "vae")
    found = data()
    codec = codec_for(tmp_path / "vae", found, cache=tmp_path)
    x, _ = found.batch(range(24))
    each = codec.encode(x).transpose(0, 1).flatten(1)
    assert each.mean(1).abs().max() < 1e-4
    assert (each.std(1, unbiased=False) - 1).abs().max() < 1e-4
    with torch.no_grad():  # the same latents as diffusers', but for the units
        theirs = made.encode(x).latent_dist.mean if kind == "kl" else made.encode(x).latents
        picture = made.decode(theirs).sample
    ours = codec.encode(x) * codec.std[:, None, None] + codec.mean[:, None, None]
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert torch.allclose(codec.decode(codec.encode(x)), picture, atol=1e-4)
    constant = {"kl": "0.143", "tiny": "1", "vq": "5.49"}[kind]
    assert f"measured on 24 items; its own constants presume {constant}" in codec.info["units"]
    assert codec.info["units"] in Latents(found, codec, cache=tmp_path).describe()
    assert Codec.load(codec.save(tmp_path / "kept")).hash == codec.hash


def test_D5_the_units_are_measured_once_so_that_a_run_goes_on_in_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = codec_for(folder, data(), cache=tmp_path)
    (file,) = tmp_path.glob("units/*.json")

    def measured(*rest: object) -> None:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(module, "measure", measured)
        assert codec_for(folder, data(), cache=tmp_path).hash == first.hash
    for damage in ("", "{}", '{"mean": [0], "std": [1]}', '{"mean": [0, 0, 0, 0], "std": [0, 1, 1, 1]}'):
        file.write_text(damage)
        assert codec_for(folder, data(), cache=tmp_path).hash == first.hash
    other = from_array(pictures() // 2)
    assert codec_for(folder, other, cache=tmp_path).hash != first.hash


def test_a_model_in_its_latents_is_whole_in_its_folder(run: Path, folder: Path, tmp_path: Path) -> None:
    assert "autoencoder_kl codec" in (run / "log.txt").read_text()
    model = Pipeline.load(run)
    assert model.sample(2, seed=0).shape == (2, 16, 16, 3)
    model.save(tmp_path / "copy")
    again = Pipeline.load(tmp_path / "copy")
    assert np.array_equal(again.sample(2, seed=0), model.sample(2, seed=0))
    again.save(tmp_path / "third")
    for name in ("codec/codec.safetensors", "model.safetensors", "pipeline.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (run / "model" / name).read_bytes()
        assert (tmp_path / "third" / name).read_bytes() == (run / "model" / name).read_bytes()
    kept = Codec.load(run / "model" / "codec")  # which others can be trained with
    assert kept.hash == Codec.load(run).hash == model.codec_hash


def test_it_is_evaluated_and_goes_on(run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import undiffuse

    monkeypatch.setenv("UNDIFFUSE_CACHE", str(run.parent / "cache"))
    data, out = str(run.parent / "data.npy"), tmp_path / "report"
    found = undiffuse.evaluate(
        str(run), against=data, number=20, features="pca", steps=2, allow_small=True, device="cpu", out=out
    )
    assert found.losses is not None
    assert train(data, run, recipe="tiny", steps=4, codec=folder / "vae", device="cpu").state == "finished"
    diagnosis = undiffuse.doctor(str(run), resume=True, device="cpu")
    assert [each.light for each in diagnosis.findings if each.check == "resume"] == ["green"]


def test_without_diffusers_it_says_what_to_install(run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for path in (folder, folder / "vae", run):
        with pytest.raises(UndiffuseError, match=r"pip install 'undiffuse\[diffusers\]'"):
            Codec.load(path)
    with pytest.raises(UndiffuseError, match=r"pip install 'undiffuse\[diffusers\]'"):
        Pipeline.load(run)


def copied(folder: Path, to: Path, **config: object) -> Path:
    to.mkdir()
    for path in (folder / "vae").iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    stated = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(stated))
    return to


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "UNet2DModel"}, "unknown class of autoencoder"),
        ({"_class_name": ["evil", "Code"]}, "never run"),
        ({"auto_map": {"AutoModel": "evil.Code"}}, "names code"),
        ({"layers_per_block": 5000}, "more than any network has"),
        ({"latent_channels": 4_000_000}, "config.json"),
        ({"scaling_factor": -1.0}, "must be above 0"),
    ],
)
def test_a_folder_that_is_not_right_is_refused_in_a_line(
    folder: Path, tmp_path: Path, config: dict[str, object], message: str
) -> None:
    with pytest.raises(UndiffuseError, match=message):
        Codec.load(copied(folder, tmp_path / "vae", **config))


def test_what_is_no_autoencoder_or_not_here_is_refused(folder: Path, tmp_path: Path) -> None:
    tiny.ddpm().save_pretrained(tmp_path / "ddpm")
    with pytest.raises(
        UndiffuseError, match=r"none of AutoencoderKL, AutoencoderTiny, VQModel, only .*no model in latents"
    ):
        Codec.load(tmp_path / "ddpm")
    with pytest.raises(UndiffuseError, match="on this machine"):
        Codec.load("nobody/has-this-vae")
    (tmp_path / "vae.bin").write_bytes(b"")
    with pytest.raises(UndiffuseError, match="pickle"):
        Codec.load(tmp_path / "vae.bin")
    bare = copied(folder, tmp_path / "bare")
    (bare / "diffusion_pytorch_model.safetensors").rename(bare / "diffusion_pytorch_model.bin")
    with pytest.raises(UndiffuseError, match="pickle"):
        Codec.load(bare)
    with pytest.raises(UndiffuseError, match="have none"):  # points in no range, where it wants pictures
        codec_for(folder, from_array(np.random.default_rng(0).normal(size=(9, 16, 16, 3)).astype(np.float32)))


def test_CK_a_kept_codec_whose_configuration_was_changed_is_refused(run: Path, tmp_path: Path) -> None:
    file = run / "model" / "codec" / FILE
    with safe_open(file, "pt") as opened:
        meaning = json.loads(opened.metadata()["undiffuse_codec"])
    for change, message in (
        ({"scaling_factor": 0.5}, "not what its hash says"),
        ({"norm_num_groups": 3}, "does not build"),
        ({"auto_map": {"a": "b"}}, "names code"),
        ({"block_out_channels": [8, 8, 16]}, "codec.safetensors"),
    ):
        wrong = {**meaning, "config": {**meaning["config"], **change}}
        save_file(load_file(file), tmp_path / FILE, {"undiffuse_codec": json.dumps(wrong)})
        with pytest.raises(UndiffuseError, match=message):
            Codec.load(tmp_path)
