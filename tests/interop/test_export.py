"""Models as folders of diffusers: what it loads is what was trained, and the Hub gets that and nothing else."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import undiffuse
from undiffuse import DATASETS, Pipeline, UndiffuseError, make_recipe
from undiffuse.asking import Sampling
from undiffuse.codecs import Fold, measure
from undiffuse.commands import main
from undiffuse.config import override
from undiffuse.data.spec import DataSpec, units_between
from undiffuse.denoiser import TimeLabel
from undiffuse.interop.export import network_of, save_diffusers, scheduler_config, translate
from undiffuse.interop.hub import push, write_folder
from undiffuse.networks import DDPMUNet, sized
from undiffuse.pipeline import REGISTRIES, ModelConfig
from undiffuse.predictions import PREDICTIONS, EDMOutput, FlowVelocity
from undiffuse.schedules import (
    EDM,
    SCHEDULES,
    VE,
    BetaTable,
    CosineBetas,
    Flow,
    LinearBetas,
    ScaledLinearBetas,
    Schedule,
    Table,
    ZeroTerminalSNR,
)
from undiffuse.solvers import DDIM, Euler

diffusers = pytest.importorskip("diffusers")
NETWORK = {"widths": [16, 32], "blocks": 2, "attention": [1], "head_width": 8, "embedding": 32}


def made(
    schedule: Schedule | None = None,
    prediction: str = "eps",
    classes: int = 0,
    family: str = "ddpm_unet",
    token_width: int = 0,
    **network: Any,
) -> Pipeline:
    """A model of 8x8 RGB pictures with random weights."""
    schedule = schedule or LinearBetas()
    shift, scale = units_between(0.0, 255.0)
    names = tuple(map(str, range(classes)))
    spec = DataSpec("image", (3, 8, 8), "uint8", 0.0, 255.0, shift, scale, "HWC", names)
    options = {"in_channels": 3, **(NETWORK if family == "ddpm_unet" else {}), **network}
    conditions: dict[str, Any] = {}
    if classes:
        conditions["classes"] = {"kind": "classes", "classes": classes}
        options["condition_width"] = 12
    if token_width:
        words = {"kind": "text", "vocabulary": ["a", "b"], "length": 4, "token_width": token_width, "heads": 2}
        conditions["text"] = words
        options |= {"condition_width": 12, "token_width": token_width}
    flow = isinstance(schedule, Flow)
    config = ModelConfig(
        family,
        options,
        schedule,
        FlowVelocity() if flow else PREDICTIONS[prediction],
        TimeLabel() if flow else TimeLabel(1000.0, -1.0),
        undiffuse.INPUT_SCALES["none"],
        conditions,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = config.build()
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return Pipeline(denoiser.eval(), config, spec, Sampling(steps=4), {"data": "noise"})


def noise(seed: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [0, 5])
def test_the_network_is_diffusers_number_for_number(classes: int, tmp_path: Path) -> None:
    pipeline = made(classes=classes)
    folder = save_diffusers(pipeline, tmp_path / "model")
    theirs = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    x, label = noise(1, 3), torch.tensor([0.0, 500.25, 999.0])
    labels = torch.tensor([0, 4, 5]) if classes else None  # 5 is the null class
    cond = {} if labels is None else {"classes": labels}
    with torch.no_grad():
        said = pipeline.denoiser.network(x, label, **pipeline.denoiser.encode(cond, 3))
        torch.testing.assert_close(theirs(x, label, labels).sample, said, atol=2e-6, rtol=0)


def test_a_network_with_tokens_is_a_conditional_one(tmp_path: Path) -> None:
    pipeline = made(token_width=8)
    name, config, state = network_of(pipeline)
    theirs = diffusers.UNet2DConditionModel(**{k: v for k, v in config.items() if not k.startswith("_")}).eval()
    theirs.load_state_dict(state)
    assert name == type(theirs).__name__
    network = pipeline.denoiser.network
    x, label, tokens, vector = (
        noise(1, 3),
        torch.tensor([0.0, 500.0, 999.0]),
        noise(2, 3)[:, 0, :4],
        noise(3, 3)[:, 0, 0],
    )
    vector = torch.cat([vector, vector[:, :4]], dim=1)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    with torch.no_grad():
        said = network(x, label, vector, tokens, mask)
        clean = tokens.masked_fill(~mask[..., None], 0)
        other = theirs(x, label, clean, class_labels=vector, encoder_attention_mask=mask).sample
    torch.testing.assert_close(other, said, atol=2e-6, rtol=0)


# --- the pipeline -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize(
    "schedule",
    [LinearBetas(), ScaledLinearBetas(), CosineBetas(), BetaTable(tuple(LinearBetas().betas().tolist()))],
    ids=lambda schedule: type(schedule).__name__,
)
def test_diffusers_samples_the_same_from_the_same_noise(schedule: Schedule, prediction: str, tmp_path: Path) -> None:
    pipeline = made(schedule, prediction)
    folder = save_diffusers(pipeline, tmp_path / "model")
    assert translate(pipeline).reason is None
    assert not (folder / "pipeline.py").exists()
    theirs = diffusers.DDIMPipeline.from_pretrained(folder)  # DDIM and Euler are one step (docs/solvers.md)
    x = noise(7)
    theirs.scheduler.set_timesteps(10)
    y = x.clone()
    with torch.no_grad():
        for t in theirs.scheduler.timesteps:
            y = theirs.scheduler.step(
                theirs.unet(y, t).sample, t, y, eta=0.0, use_clipped_model_output=False
            ).prev_sample
        levels = undiffuse.GRIDS["trailing"].levels(schedule, 10)
        frames = undiffuse.trajectory(pipeline.denoiser.bind(), x, levels, DDIM(0.0), undiffuse.Streams(0, 2))
        ours = [frame.x for frame in frames][-1]
    # Both end at the clean estimate of the last level but for set_alpha_to_one, which diffusers has on by default.
    torch.testing.assert_close(y, ours, atol=1e-4 * float(ours.abs().max().clamp(min=1)), rtol=0)


def test_a_flow_is_diffusers_flow(tmp_path: Path) -> None:
    pipeline = made(Flow())
    theirs = diffusers.DDPMPipeline.from_pretrained(save_diffusers(pipeline, tmp_path / "model"))
    x = noise(7)
    theirs.scheduler.set_timesteps(8)
    y, times = x.clone(), theirs.scheduler.timesteps
    levels = [pipeline.config.schedule(float(t) / 1000) for t in [*times.tolist(), 0.0]]
    with torch.no_grad():
        for t in times:
            y = theirs.scheduler.step(theirs.unet(y, t).sample, t, y).prev_sample
        ours = [
            f.x for f in undiffuse.trajectory(pipeline.denoiser.bind(), x, levels, Euler(), undiffuse.Streams(0, 2))
        ][-1]
    torch.testing.assert_close(y, ours, atol=1e-4, rtol=0)
    assert len(theirs(2, num_inference_steps=2).images) == 2


def test_diffusers_own_pipeline_makes_pictures(tmp_path: Path) -> None:
    theirs = diffusers.DDPMPipeline.from_pretrained(save_diffusers(made(), tmp_path / "model"))
    theirs.set_progress_bar_config(disable=True)
    images = theirs(2, num_inference_steps=3).images
    assert [image.size for image in images] == [(8, 8)] * 2
    assert json.loads((tmp_path / "model" / "model_index.json").read_text())["_diffusers_version"]


@pytest.mark.parametrize(("classes", "family"), [(0, "ddpm_unet"), (2, "ddpm_unet"), (3, "unet")])
def test_the_code_on_a_card_runs(classes: int, family: str, tmp_path: Path) -> None:
    """A card is read by people who have nothing else."""
    network: dict[str, Any] = {"widths": [8], "blocks": [1], "attention": []} if family == "unet" else {}
    pipeline = made(classes=classes, family=family, **network)
    pipeline = Pipeline(pipeline.denoiser, pipeline.config, pipeline.spec, Sampling(Euler(), steps=1), {})
    folder = save_diffusers(pipeline, tmp_path / "model")
    *_, card = (folder / "README.md").read_text().split("## How to sample")
    blocks = [block.split("```")[0] for block in card.split("```python")[1:]]
    assert len(blocks) == (2 if classes else 1)
    for code in blocks:
        said: dict[str, Any] = {}
        exec(code.replace("FOLDER", str(folder)).replace("pipeline(4)", "pipeline(4, num_inference_steps=1)"), said)
        assert len(said["images"]) == 4


def test_what_was_exported_for_diffusers_loads_here_and_goes_on(tmp_path: Path) -> None:
    pipeline = made(classes=3)
    folder = save_diffusers(pipeline, tmp_path / "model")
    again = Pipeline.load(folder)
    assert torch.equal(again.draw(2, classes=[1]), pipeline.draw(2, classes=[1]))
    other = save_diffusers(again, tmp_path / "again")
    for path in (path for path in sorted(folder.rglob("*")) if path.is_file()):
        assert path.read_bytes() == (other / path.relative_to(folder)).read_bytes()
    assert main(["evaluate", str(folder), "--against", "digits"]) == 2  # a model, whose size does not fit


@pytest.mark.parametrize("family", ["ddpm_unet", "unet"])
def test_what_diffusers_lacks_comes_with_a_pipeline(family: str, tmp_path: Path) -> None:
    network: dict[str, Any] = {"widths": [8], "blocks": [1], "attention": []} if family == "unet" else {}
    pipeline = made(classes=3, family=family, **network)
    reason = translate(pipeline).reason
    assert reason is not None
    assert ("classes" if family == "ddpm_unet" else "UNet") in reason
    folder = save_diffusers(pipeline, tmp_path / "model")
    assert (folder / "unet").is_dir() == (family == "ddpm_unet")
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    images = theirs(3, seed=4, num_inference_steps=2, classes=[0, 1, 2], output_type="np").images
    np.testing.assert_array_equal(images, pipeline.sample(3, seed=4, steps=2, classes=[0, 1, 2]))
    assert theirs(1).images[0].size == (8, 8)


def test_every_schedule_and_prediction_is_written_or_refused_by_name() -> None:
    for name, schedule in SCHEDULES.items():
        if isinstance(schedule, (Table, ZeroTerminalSNR)):
            table = schedule.schedule if isinstance(schedule, ZeroTerminalSNR) else schedule
            assert isinstance(table, Table)
            steps = len(table.betas())
            pipeline = made(schedule, "v")
            pipeline.config = replace(pipeline.config, label=TimeLabel(steps, -1))
            options = {k: v for k, v in scheduler_config(pipeline).items() if not k.startswith("_")}
            theirs = diffusers.DDPMScheduler(**options)
            t = (torch.arange(steps, dtype=torch.float64) + 1) / steps
            alphas = schedule(t).alpha / torch.hypot(schedule(t).alpha, schedule(t).sigma)
            torch.testing.assert_close(theirs.alphas_cumprod.sqrt().double(), alphas, atol=2e-5, rtol=0, msg=name)
        elif not isinstance(schedule, (Flow, EDM, VE)):
            with pytest.raises(UndiffuseError, match=type(schedule).__name__):
                scheduler_config(made(schedule, "v"))
    pipeline = made()
    pipeline.config = replace(pipeline.config, prediction=EDMOutput())
    with pytest.raises(UndiffuseError, match="EDMOutput"):
        scheduler_config(pipeline)
    pipeline.config = replace(made().config, label=TimeLabel(900.0))
    with pytest.raises(UndiffuseError, match="label=discrete"):
        scheduler_config(pipeline)


def test_what_came_from_diffusers_goes_back_as_it_came(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    import diffusers_models as tiny

    tiny.sd().save_pretrained(tmp_path / "theirs")
    pipeline = Pipeline.load(tmp_path / "theirs")
    assert translate(pipeline).reason is None
    folder = save_diffusers(pipeline, tmp_path / "model", license="mit")
    back = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert type(back).__name__ == "StableDiffusionPipeline"
    assert 'pipeline("...").images' in (folder / "README.md").read_text()
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (folder / weights).read_bytes() == (tmp_path / "theirs" / weights).read_bytes()


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UndiffuseError, match="something else"):
        save_diffusers(made(), tmp_path)


def test_a_recipe_trains_one_that_exports(tmp_path: Path) -> None:
    dataset = DATASETS["digits"](seed=0)
    settings = ["model.family=ddpm_unet", "model.conditional=false", "training.images=32", "training.previews=4"]
    recipe = override(make_recipe("tiny", dataset.spec, len(dataset)), settings, REGISTRIES)
    trainer = undiffuse.Trainer(dataset, recipe)
    assert isinstance(trainer.denoiser.network, DDPMUNet)
    trainer.update()
    assert translate(trainer.pipeline()).reason is None


# --- cards and the Hub ------------------------------------------------------------------------------------------------


def test_the_command_writes_a_card_a_picture_and_says_how_to_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made().save(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--license", "mit"]) == 0
    said = capsys.readouterr().out
    assert "DiffusionPipeline.from_pretrained" in said
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n")
    assert "LinearBetas" in card
    assert "Nothing was measured" in card
    assert (tmp_path / "out" / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out")]) == 2
    assert "something else" in capsys.readouterr().err


def test_the_command_takes_a_folder_of_diffusers_and_a_run_in_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    import diffusers_models as tiny

    tiny.ddpm().save_pretrained(tmp_path / "whole")
    loads: list[object] = []
    load = Pipeline.load
    few = load(tmp_path / "whole")
    few.sampling = replace(few.sampling, steps=2)
    few.save(tmp_path / "theirs")
    monkeypatch.setattr(Pipeline, "load", staticmethod(lambda path, *rest: loads.append(path) or load(path, *rest)))
    for form in ("diffusers", "undiffuse"):
        out = tmp_path / form
        assert main(["export", str(tmp_path / "theirs"), str(out), "--to", form]) == 0
        assert "DiffusionPipeline.from_pretrained" in capsys.readouterr().out
        weights = "unet/diffusion_pytorch_model.safetensors"
        assert (out / weights).read_bytes() == (tmp_path / "theirs" / weights).read_bytes()
        assert (out / "README.md").is_file()
        assert np.array_equal(load(out).sample(2), load(tmp_path / "theirs").sample(2))
    assert len(loads) == 2  # once each
    assert main(["export", "nobody/has-this", str(tmp_path / "none")]) == 2
    assert "on this machine" in capsys.readouterr().err

    codec, pipeline = Fold(3, 2, 2), made()
    measure(codec, [noise(0, 16)], "noise")
    name, options = sized(codec.latent_shape(pipeline.spec.shape), "tiny")
    config = replace(pipeline.config, network=name, network_config=options)
    latent = Pipeline(config.build().eval(), config, pipeline.spec, Sampling(steps=2), {"data": "noise"}, codec=codec)
    latent.save(tmp_path / "latent")
    assert main(["export", str(tmp_path / "latent"), str(tmp_path / "out")]) == 0
    assert "pipeline.py" in capsys.readouterr().out
    assert load(tmp_path / "out" / "undiffuse").codec_hash == latent.codec_hash


def test_a_model_that_cannot_be_sampled_leaves_an_empty_folder(tmp_path: Path) -> None:
    """The next try is not told that the folder has something else."""
    pipeline = made()
    Pipeline(pipeline.denoiser, pipeline.config, pipeline.spec, Sampling(Euler(), steps=10**9), {}).save(tmp_path / "m")
    for _ in range(2):
        with pytest.raises(UndiffuseError, match="at most 100,000"):
            write_folder(tmp_path / "m", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_card_quotes_the_evaluations_of_these_weights_with_their_floor(tmp_path: Path) -> None:
    from undiffuse.interop.card import model_card

    model = made()
    how = {"solver": "heun", "steps": 7, "guidance_scale": 1.5}
    found = {
        "fingerprint": "abc",
        "samples": {"n": 1000, "weights": model.fingerprint, **how},
        "features": {"name": "classifier"},
        "data": {"name": "digits"},
        "metrics": {"frechet": {"value": 1.234, "interval": [1.0, 1.5], "floor": 0.5}},
    }
    (tmp_path / "evaluation" / "one").mkdir(parents=True)
    (tmp_path / "evaluation" / "one" / "evaluation.json").write_text(json.dumps(found))
    card = model_card(model, run=tmp_path)
    assert "| frechet | 1.234 | 1 to 1.5 | 0.5 |" in card
    assert "heun, 7 steps, guidance 1.5, n = 1,000" in card
    with torch.no_grad():
        next(model.denoiser.parameters()).add_(1)  # trained on: the figures are of another model
    other = model_card(model, run=tmp_path)
    assert "1.234" not in other
    assert "Nothing was measured" in other
    assert "No license is stated" in card
    assert "license: unknown" in card


def test_a_dry_run_sends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda *a, **k: pytest.fail("asked the Hub"))
    made().save(tmp_path / "model")
    words = ["push", str(tmp_path / "model"), "ada/photos"]
    assert main([*words, "--dry-run"]) == 2
    assert "--license is missing" in capsys.readouterr().err
    assert main([*words, "--dry-run", "--license", "mit", "--to", "diffusers"]) == 0
    said = capsys.readouterr().out
    assert "unet/diffusion_pytorch_model.safetensors" in said
    assert "nothing was sent" in said
    assert main(["push", str(tmp_path / "model"), "photos", "--license", "mit"]) == 2
    assert "owner/name" in capsys.readouterr().err


def test_what_is_pushed_comes_back_by_pull_without_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    store = tmp_path / "hub"

    class Api:
        def create_repo(self, repo: str, **options: Any) -> str:
            return f"hub/{repo}"

        def upload_folder(self, repo_id: str, folder_path: str) -> None:
            shutil.copytree(folder_path, store / repo_id)

        def model_info(self, repo: str, **options: Any) -> Any:
            files = [path for path in (store / repo).rglob("*") if path.is_file()]
            names = [(path.relative_to(store / repo).as_posix(), path.stat().st_size) for path in files]
            return SimpleNamespace(sha="0" * 40, siblings=[SimpleNamespace(rfilename=n, size=s) for n, s in names])

    def download(repo: str, *, local_dir: str, allow_patterns: list[str], **options: Any) -> str:
        from fnmatch import fnmatch

        for path in (store / repo).rglob("*"):
            name = path.relative_to(store / repo).as_posix()
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (Path(local_dir) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, Path(local_dir) / name)
        return local_dir

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    pipeline = made()
    pipeline.save(tmp_path / "model")
    assert push(tmp_path / "model", "ada/photos", license="mit")[1] == "hub/ada/photos"
    (store / "ada" / "photos" / "setup.py").write_text("raise SystemExit")
    (store / "ada" / "photos" / "old.bin").write_bytes(b"pickle")
    assert main(["pull", "ada/photos", "--dry-run"]) == 0
    assert "setup.py" not in capsys.readouterr().out
    assert main(["pull", "ada/photos", "--to", str(tmp_path / "mine")]) == 0
    assert not list((tmp_path / "mine").rglob("*.py"))
    assert not list((tmp_path / "mine").rglob("*.bin"))
    np.testing.assert_array_equal(Pipeline.load(tmp_path / "mine").sample(2), pipeline.sample(2))
    assert main(["pull", "ada/photos", "--to", str(tmp_path / "mine")]) == 2
    shutil.rmtree(store)
    (store / "ada" / "photos").mkdir(parents=True)
    (store / "ada" / "photos" / "old.bin").write_bytes(b"pickle")
    assert main(["pull", "ada/photos", "--to", str(tmp_path / "other")]) == 2
    assert "no safetensors" in capsys.readouterr().err


def test_a_hub_that_cannot_be_reached_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    def nobody(self: Any, repo: str, **options: Any) -> Any:
        raise OSError("connection refused\nand more")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", nobody)
    assert main(["pull", "ada/photos", "--to", str(tmp_path / "x")]) == 2
    said = capsys.readouterr().err
    assert "connection refused; is the name right" in said
    assert "and more" not in said
