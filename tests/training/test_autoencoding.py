"""A run that learns a codec is a run like every other, and a run in its latents makes data."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from undiffuse.codecs import Codec
from undiffuse.config import override
from undiffuse.data import from_array
from undiffuse.data.base import Dataset
from undiffuse.data.latents import Latents
from undiffuse.errors import UndiffuseError
from undiffuse.evaluation.learned import Classifier
from undiffuse.pipeline import REGISTRIES, Pipeline
from undiffuse.training import Diverged, forensics, make_recipe, run_training
from undiffuse.training.aftercare import examine_run
from undiffuse.training.autoencoding import Autoencoding, Learner, perplexity
from undiffuse.training.perceptual import LPIPS, VGG, ClassifierDistance
from undiffuse.training.recipe import Recipe
from undiffuse.training.run import Progress
from undiffuse.training.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore::undiffuse.errors.UndiffuseWarning")


def data(count: int = 200) -> Dataset:
    """Bright squares on dark ground, by their place in two classes."""
    pixels = np.full((count, 8, 8, 1), 20, np.uint8)
    for i, (y, x) in enumerate(np.random.default_rng(0).integers(0, 5, (count, 2))):
        pixels[i, y : y + 3, x : x + 3] = 255
    return from_array(pixels, labels=np.arange(count) % 2)


def recipe(*settings: str, steps: int = 12, name: str = "autoencoder") -> Recipe:
    spec = data().spec
    chosen = make_recipe(name, spec, 200, "tiny")
    every = [f"training.{each}_every=6" for each in ("preview", "checkpoint", "evaluate")]
    common = [f"training.images={16 * steps}", "training.batch_size=16", "training.log_every=2", "training.previews=16"]
    return override(chosen, [*common, *every, *settings], REGISTRIES)


def rows(path: Path, *without: str) -> list[dict]:
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("seconds", "images_per_second", *without)}
        for line in path.read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "ae"
    run_training(data(), recipe("optimiser.lr=0.02", "codec.channels=2", steps=150), out, device="cpu")
    return out


def test_the_run_folder_is_that_of_every_run_and_its_model_a_codec(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.json", "log.txt", "metrics.jsonl", "status.json", "held_out.jsonl", "report.html", "best"}
    assert {path.name for path in (run / "model").iterdir()} == {"codec.safetensors"}
    assert (run / "samples" / "preview-000006.png").is_file()
    last = rows(run / "held_out.jsonl")[-1]
    assert last["ema"] < 0.5 * rows(run / "held_out.jsonl")[0]["ema"]
    assert last["probes"]["reconstruction"]["PSNR, dB"] > 15
    assert "no perceptual term, no discriminator" in (run / "log.txt").read_text()
    codec = Codec.load(run)
    assert codec.info["step"] == 150
    assert codec.spec == replace(data().spec, classes=())


def test_trap_D5_the_latents_of_a_trained_codec_have_mean_0_and_deviation_1(run: Path) -> None:
    codec, found = Codec.load(run), data()
    assert codec.measured == {"data": found.name, "items": 180}
    from undiffuse.training.held_out import divide

    train, held_out = divide(found, recipe().training)
    assert held_out is not None
    for part, close in ((train, 1e-4), (held_out, 0.4)):
        each = codec.encode(part.batch(range(len(part)))[0]).transpose(0, 1).flatten(1)
        assert each.mean(1).abs().max() < close
        assert (each.std(1, unbiased=False) - 1).abs().max() < close
    x, _ = held_out.batch(range(len(held_out)))
    assert float((codec.decode(codec.encode(x)) - x).square().mean()) < 0.15 * float(x.var())


@pytest.mark.parametrize(
    "settings",
    [("optimiser.kind=adamw",), ("codec.codebook=16", "codec.revive=2"), ("codec.adversarial=0.1",)],
)
def test_a_run_that_was_stopped_goes_on_to_the_last_bit(tmp_path: Path, settings: tuple[str, ...]) -> None:
    class Stop(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.step == 7:
            raise Stop

    chosen = recipe("training.checkpoint_every=3", *settings)
    run_training(data(), chosen, tmp_path / "whole", device="cpu")
    with pytest.raises(Stop):
        run_training(data(), chosen, tmp_path / "parts", device="cpu", progress=stop)
    resumed = run_training(data(), chosen, tmp_path / "parts", device="cpu")
    assert resumed.resumed_from == 6
    for name in ("weights", "ema", "optimiser"):
        file = f"checkpoints/step-00000012/{name}.safetensors"
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
    assert Codec.load(tmp_path / "whole").hash == Codec.load(tmp_path / "parts").hash
    assert rows(tmp_path / "whole" / "metrics.jsonl") == rows(tmp_path / "parts" / "metrics.jsonl")
    assert run_training(data(), chosen, tmp_path / "parts", device="cpu").state == "finished"


def trainer(*settings: str, steps: int = 12) -> Trainer:
    return Trainer(data(), recipe(*settings, steps=steps))


def test_a_dead_vector_moves_to_a_latent_that_is_far_from_all() -> None:
    made = trainer("codec.codebook=8", "codec.revive=4", "optimiser.lr=1e-9", steps=40)
    learner = cast(Learner, made.denoiser)
    book = learner.codec.codebook
    assert book is not None
    with torch.no_grad():
        book[1:] = 1e3 + torch.randn(7, len(learner.codec.mean))  # only vector 0 is near to anything
    for _ in islice(made.updates(), 3):
        pass
    assert learner.used[1:].sum() == 0
    made.optimiser.state[book]["exp_avg"].fill_(1e-3)  # of gradients from when they were used
    before = book.detach().clone()
    made.update()
    assert torch.equal(book[0], before[0])
    assert learner.latest is not None
    latents = learner.latest.movedim(1, -1).flatten(0, -2)
    distances = (latents - before[0]).square().sum(1)
    moved = (book[1:] - before[0]).square().sum(1).sort(descending=True).values
    assert torch.allclose(moved, distances.topk(7).values, rtol=1e-4)
    assert learner.used.sum() == 0
    moment = made.optimiser.state[book]["exp_avg"]
    assert moment[1:].abs().sum() == 0
    assert moment[0].abs().sum() > 0


# --- an update that is not finite -------------------------------------------------------------------------------------


class Poisoned(nn.Module):
    """Not finite for pictures whose square lies in the upper left corner: a function of its input, as real ones."""

    def __init__(self, inner: nn.Module, what: str) -> None:
        super().__init__()
        self.inner, self.what = inner, what

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        bad = corner(x)[:, None, None, None]
        if self.what == "output":
            return torch.where(bad, torch.full_like(y, float("inf")), y)
        y = y * 1
        if y.requires_grad:
            y.register_hook(lambda gradient: torch.where(bad, float("nan"), gradient))
        return y


def corner(x: Tensor) -> Tensor:
    """``[B]``: of pictures in model units, folded or not, those whose first pixel is bright."""
    return x.flatten(1)[:, 0] > 0


def poisoned(what: str, *settings: str) -> Trainer:
    chosen = recipe(*settings, steps=40)
    learner = cast(Any, Trainer(data(), chosen, seed=3).denoiser)
    learner.codec.encoder = Poisoned(learner.codec.encoder, what)
    return Trainer(data(), chosen, seed=3, denoiser=learner)


def state(of: Trainer) -> list[Tensor]:
    moments = [value for p in of.parameters.values() for value in of.optimiser.state[p].values()]
    return [
        each.clone() for each in (*of.denoiser.state_dict().values(), *of.ema.denoiser.state_dict().values(), *moments)
    ]


def unmoved(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


WILD = ("optimiser.kind=adamw", "optimiser.lr=1e30", "optimiser.warmup=0", "optimiser.clip=1e30")


def until_bad(of: Trainer) -> list[Tensor]:
    """Train up to the first bad update, which raises; the state before it."""
    while not of.finished:
        before = state(of)
        try:
            of.update()
        except Diverged:
            return before
    raise AssertionError("never bad")


KINDS = [(), ("codec.codebook=8", "codec.revive=1"), ("codec.adversarial=0.5", "codec.adversarial_from=0")]


@pytest.mark.parametrize("what", ["output", "gradient"])
@pytest.mark.parametrize("settings", KINDS)
def test_trap_R8_NF1_a_bad_update_changes_no_bit_and_its_items_are_named(what: str, settings: tuple[str, ...]) -> None:
    made = poisoned(what, *settings)
    before = until_bad(made)
    assert made.step > 0
    assert unmoved(before, state(made))

    seen = forensics.scene(made, made.diverged_at)
    found = forensics.replay(made.task, made.denoiser, seen)
    assert unmoved(before, state(made))  # looking changes nothing either
    assert found.repeated
    assert found.items == tuple(seen.indices[corner(seen.x0)].tolist()) != ()
    assert found.times == ()
    assert (found.module if what == "output" else found.backward) == "codec.encoder"


@pytest.mark.parametrize("settings", KINDS)
def test_NF2_a_run_that_may_skip_does(settings: tuple[str, ...]) -> None:
    made = poisoned("output", "training.nonfinite=skip", "training.skip_in_row=40", *settings)
    skipped = 0
    while not made.finished:
        before = state(made)
        if made.update().skipped:
            assert unmoved(before, state(made))
            skipped += 1
    assert 0 < skipped < 40
    assert all(bool(each.isfinite().all()) for each in state(made))


@pytest.mark.parametrize("settings", KINDS)
def test_R8_a_run_that_stops_leaves_what_a_replay_needs(tmp_path: Path, settings: tuple[str, ...]) -> None:
    with pytest.raises(Diverged, match="likely cause: ") as stopped:
        run_training(data(), recipe(*WILD, *settings), tmp_path, device="cpu")
    report, found = forensics.investigate(tmp_path)
    assert report["cause"] == found.cause
    assert found.cause in str(stopped.value)
    assert (report["step"], report["items"]) == (found.step, list(found.items))
    assert "run away" in found.cause
    findings = examine_run(tmp_path, device="cpu", nan=True)
    assert [each.light for each in findings if each.check == "replay"] == ["red", "red"]


def test_the_replay_is_the_update() -> None:
    for settings in (*KINDS, ("training.accumulation=3",), ("codec.adversarial=0.5", "codec.adversarial_from=0.1")):
        made = trainer(*settings)
        for step in (1, 2, 3):
            found = forensics.replay(made.task, made.denoiser, forensics.scene(made, step))
            assert found.loss == pytest.approx(float(made.update().loss), rel=1e-5)


def test_a_replay_that_needs_the_data_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def features(name: str, of: Dataset) -> Any:
        if of.labels is None:
            raise UndiffuseError("needs labelled data")
        return (lambda x, y: (x - y).abs().flatten(1).mean(1)), "a stand-in for the classifier"

    monkeypatch.setattr("undiffuse.training.autoencoding.distance_of", features)
    with pytest.raises(Diverged, match="run away"):
        run_training(data(), recipe(*WILD, "codec.perceptual=1"), tmp_path, device="cpu")
    with pytest.raises(UndiffuseError, match=r"without the data .* report.json has what was found"):
        forensics.investigate(tmp_path)


def test_perplexity_counts_the_vectors_in_use() -> None:
    assert perplexity(torch.tensor([0, 1, 2, 3]), {"codebook": 9}) == pytest.approx(4)
    assert perplexity(torch.tensor([5, 5, 5]), {"codebook": 9}) == pytest.approx(1)


def test_the_losses_of_a_codebook_draw_vectors_and_latents_to_each_other() -> None:
    made = trainer("codec.codebook=8", "codec.commitment=0.5")
    learner, task = cast(Learner, made.denoiser), cast(Autoencoding, made.task)
    x, _ = data().batch(range(4))
    _, cost = task.made(learner, x, None)
    mean, _ = learner.codec.posterior(x)
    vectors = learner.codec.look_up(learner.codec.nearest(mean))
    apart = (mean - vectors).square().flatten(1).mean(1)
    assert torch.allclose(cost, 1.5 * apart, rtol=1e-5)
    book = learner.codec.codebook
    assert book is not None
    weights = list(learner.codec.encoder.parameters())
    (to_vectors,) = torch.autograd.grad(cost.sum(), book, retain_graph=True)
    (wanted,) = torch.autograd.grad(apart.sum(), book, retain_graph=True)
    assert torch.allclose(to_vectors, wanted, rtol=1e-4)  # all of the distance, and half of it:
    to_latents = torch.autograd.grad(cost.sum(), weights)
    kept = (mean - vectors.detach()).square().flatten(1).mean(1).sum()
    for a, b in zip(to_latents, torch.autograd.grad(0.5 * kept, weights), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)


def test_the_reconstruction_teaches_the_encoder_straight_through_the_codebook() -> None:
    """With what the decoder wants of its input, the encoder's gradient is that of latents that were the vectors."""
    made = trainer("codec.codebook=8")
    learner, task = cast(Learner, made.denoiser), cast(Autoencoding, made.task)
    x, _ = data().batch(range(4))
    weights = [p for p in learner.codec.encoder.parameters() if p.requires_grad]
    with torch.no_grad():  # fresh decoders have layers that begin with 0, and would say nothing
        for parameter in learner.codec.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    y, _ = task.made(learner, x, None)
    found = torch.autograd.grad(task.apart(x, y).sum(), weights)
    latent, _ = learner.codec.posterior(x)
    vectors = learner.codec.look_up(learner.codec.nearest(latent)).detach().requires_grad_()
    (wanted,) = torch.autograd.grad(task.apart(x, learner.codec.draw(vectors)).sum(), vectors)
    assert wanted.abs().sum() > 0
    for a, b in zip(found, torch.autograd.grad(latent, weights, wanted), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_sum_of_its_terms() -> None:
    for settings in (("codec.kl=0.5",), ("codec.codebook=8",)):
        made = trainer(*settings)
        learner, task = cast(Learner, made.denoiser), cast(Autoencoding, made.task)
        x, _ = data().batch(range(4))
        drawn = made.task.drawn(made, {}, 0, made.team)
        eps = drawn.values[0][:4]
        y, extra = task.made(learner, x, eps)
        assert extra.min() > 0
        whole = task.loss(learner, x, eps, **drawn.options)
        assert torch.allclose(whole, (x - y).abs().flatten(1).mean(1) + extra)


def test_the_divergence_is_that_of_the_normal_distributions() -> None:
    made = trainer("codec.kl=0.5")
    learner, task = cast(Learner, made.denoiser), cast(Autoencoding, made.task)
    x, _ = data().batch(range(4))
    _, cost = task.made(learner, x, None)
    mean, std = learner.codec.posterior(x)
    assert std is not None
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, std), torch.distributions.Normal(0.0, 1.0)
    )
    assert torch.allclose(cost, 0.5 * exact.flatten(1).sum(1) / x[0].numel(), rtol=1e-4)


def test_the_discriminator_learns_what_is_real_and_the_codec_to_deceive_it() -> None:
    made = trainer("codec.adversarial=1", "codec.adversarial_from=0", steps=30)
    learner = cast(Learner, made.denoiser)
    assert learner.critic is not None
    source = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, 1, 8, 8, generator=source) for _ in range(2))
    y.requires_grad_()
    z = y * learner.codec.last.sum()  # the last layer is on the way
    each = z.square().flatten(1).mean(1) + z.flatten(1).mean(1)
    loss = Autoencoding.judged(learner.critic, x, z, each, learner.codec.last).sum()
    to_data, *to_critic = torch.autograd.grad(loss, [y, *learner.critic.parameters()], retain_graph=True)
    hinge = (F.relu(1 - learner.critic(x)) + F.relu(1 + learner.critic(z.detach()))).flatten(1).mean(1).sum() / 2
    own = torch.autograd.grad(hinge, list(learner.critic.parameters()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(to_critic, own, strict=True))  # deceiving moves it not
    # What it deceives with is what the critic takes for more real, as much as the other terms count; what the critic
    # learns from its pictures does not move them.
    real = learner.critic(z).flatten(1).mean(1).sum()
    lengths = [
        torch.autograd.grad(each, learner.codec.last, retain_graph=True)[0].norm() for each in (each.sum(), real)
    ]
    (more_real,) = torch.autograd.grad(real, y)
    assert more_real.abs().sum() > 0
    assert torch.allclose(to_data, -more_real * lengths[0] / (lengths[1] + 1e-4), rtol=1e-2, atol=1e-4)


def test_the_discriminator_s_part_of_the_loss_has_its_weight() -> None:
    made = trainer("codec.adversarial=0.25", "codec.adversarial_from=0")
    learner, task = cast(Learner, made.denoiser), cast(Autoencoding, made.task)
    assert learner.critic is not None
    x, eps = data().batch(range(4))[0], made.task.drawn(made, {}, 0, made.team).values[0][:4]
    y, extra = task.made(learner, x, eps)
    plain = task.apart(x, y) + extra
    part = Autoencoding.judged(learner.critic, x, y, plain, learner.codec.last)
    assert torch.allclose(task.loss(learner, x, eps, judged=True), plain + 0.25 * part)
    assert torch.allclose(task.loss(learner, x, eps, judged=False), plain)


def test_updates_with_a_discriminator_are_finite() -> None:
    made = trainer("codec.adversarial=1", "codec.adversarial_from=0", steps=30)
    assert all(bool(update.loss.isfinite()) for update in made.updates())


def test_the_discriminator_waits_for_its_share_of_the_run() -> None:
    made = trainer("codec.adversarial=1", "codec.adversarial_from=0.5", steps=4)
    judged = []
    while not made.finished:
        options = made.task.drawn(made, {}, made.step, made.team).options
        judged.append(options["judged"])
        made.update()
    assert judged == [False, False, True, True]


def test_bfloat16_learns_too() -> None:
    made = trainer("training.precision=bf16", "codec.adversarial=0.1", "codec.adversarial_from=0", "codec.codebook=4")
    assert all(bool(update.loss.isfinite()) for update in made.updates())


def test_the_classifier_s_features_are_those_that_it_classifies_by() -> None:
    torch.manual_seed(0)
    network = Classifier(1, (8, 8), 3).eval()
    distance = ClassifierDistance(network)
    x, y = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    assert torch.allclose(distance.maps(x)[-1].mean((2, 3)), network(x)[0], atol=1e-6)
    assert torch.equal(distance(x, x), torch.zeros(2))
    assert bool((distance(x, y) > 0).all())


def test_lpips_is_the_weighted_distance_of_unit_features(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights: dict[str, Tensor] = {}
    inputs = 3
    for i, (places, width) in enumerate(zip(VGG, (4, 5, 6, 7, 8), strict=True)):
        for place in places:
            weights[f"net.slice{i + 1}.{place}.weight"] = torch.randn(width, inputs, 3, 3) * 0.3
            weights[f"net.slice{i + 1}.{place}.bias"] = torch.randn(width) * 0.1
            inputs = width
        weights[f"lin{i}.model.1.weight"] = torch.rand(1, width, 1, 1)
    distance = LPIPS(weights, "weights")
    x, y = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(distance(x, x), torch.zeros(2))
    assert bool((distance(x, y) > 0).all())
    assert torch.allclose(distance(x, y), distance(y, x))
    a, b = distance.maps(x)[0], distance.maps(y)[0]
    apart = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square()
    first = LPIPS({**weights, **{f"lin{i}.model.1.weight": torch.zeros(1, 1, 1, 1) for i in range(1, 5)}}, "weights")
    expected = (apart * weights["lin0.model.1.weight"]).sum(1).mean((1, 2))
    assert torch.allclose(first(x, y), expected, rtol=1e-4)
    del weights["lin3.model.1.weight"]
    with pytest.raises(UndiffuseError, match="not LPIPS's weights with VGG"):
        LPIPS(weights, "weights")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("codec.factor=3", "power of two"),
        ("codec.factor=16", "multiples of 16"),
        ("codec.kl=-1", "at least 0"),
        ("augment.geometric=0.5", "takes no condition"),
        ("training.quality_every=5", "makes none"),
        ("model.network.depth=3", "unknown option of the autoencoder"),
    ],
)
def test_what_a_codec_cannot_be_is_refused(setting: str, message: str) -> None:
    with pytest.raises(UndiffuseError, match=message):
        recipe(setting).check(data().spec)


@pytest.mark.parametrize("features", ["vgg", "none.safetensors"])
def test_features_that_are_not_there_are_refused(features: str) -> None:
    with pytest.raises(UndiffuseError):
        trainer("codec.perceptual=1", f"codec.features={features}")


# --- a run in its latents ---------------------------------------------------------------------------------------------


def test_a_model_learned_in_latents_samples_data(run: Path, tmp_path: Path) -> None:
    latents = Latents(data(), Codec.load(run), cache=tmp_path / "cache")
    chosen = make_recipe("tiny", latents.spec, len(latents))
    result = run_training(latents, chosen, tmp_path / "run", device="cpu")
    model = Pipeline.load(result.path)
    assert model.shape == (2, 4, 4)
    assert model.codec is not None
    samples = model.sample(3)
    assert samples.shape == (3, 8, 8, 1)
    assert samples.dtype == np.uint8
    assert (result.path / "samples" / "preview-000010.png").is_file()
    assert "as latents 2x4x4 of the autoencoder codec" in " ".join((result.path / "log.txt").read_text().split())
    other = Codec.load(run)
    other.settle(other.mean, 2 * other.std, {"data": "other"})
    others = Latents(data(), other, cache=tmp_path / "cache")
    with pytest.raises(UndiffuseError, match="its data have changed"):
        run_training(others, chosen, result.path, device="cpu")
    with pytest.raises(UndiffuseError, match="without --codec"):
        run_training(latents, recipe(), tmp_path / "ae2", device="cpu")


@pytest.mark.parametrize("shape", [(2, 64), (1, 8, 8, 8)])
def test_sounds_and_volumes_have_codecs_too(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).standard_normal((120, *shape)).cumsum(-1).astype(np.float32)
    waves = from_array(values)
    chosen = make_recipe("autoencoder", waves.spec, 120, "tiny")
    chosen = override(chosen, ["training.images=32", "training.batch_size=8"], REGISTRIES)
    run_training(waves, chosen, tmp_path / "ae", device="cpu")
    latents = Latents(waves, Codec.load(tmp_path / "ae"), cache=tmp_path)
    factor = 4 if len(shape) == 2 else 2
    assert latents.spec.shape == (4, *(n // factor for n in shape[1:]))
    made = Trainer(latents, make_recipe("tiny", latents.spec, 120))
    made.update()
    assert made.pipeline().sample(2).shape == (2, *shape)


def test_the_doctor_finds_a_codec_s_run_well(tmp_path: Path) -> None:
    import undiffuse

    file, out = str(tmp_path / "squares.npz"), tmp_path / "run"
    np.savez(file, data().values(range(200)), labels=np.arange(200) % 2)
    undiffuse.train(file, recipe="autoencoder", model_size="tiny", steps=8, out=out, set=("codec.adversarial=0.1",))
    lights = {each.check: each.light for each in undiffuse.doctor(str(out), resume=True).findings}
    assert lights["resume"] == lights["average"] == lights["checkpoints"] == "green"
    shown = undiffuse.show(out)
    assert shown.model is not None
    assert shown.model.pipeline["kind"] == "autoencoder"
    with pytest.raises(UndiffuseError, match="a codec makes no samples"):
        undiffuse.sample(out)
    with pytest.raises(UndiffuseError, match="without --codec"):
        undiffuse.train(file, recipe="autoencoder", codec=out, out=tmp_path / "other")


def test_evaluation_and_the_proof_of_resume_work_on_a_latent_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import undiffuse

    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))
    file, out = str(tmp_path / "squares.npz"), tmp_path / "run"
    np.savez(file, data().values(range(200)), labels=np.arange(200) % 2)
    undiffuse.train(file, codec=run, recipe="tiny", out=out, set=("augment.flip=0.5",))
    found = undiffuse.evaluate(
        str(out), against=file, number=40, features="pca", steps=2, allow_small=True, out=tmp_path / "report"
    )
    assert found.losses is not None
    assert (found.losses["objective"], found.losses["unseen"]) == ("the run's own", True)
    diagnosis = undiffuse.doctor(str(out), resume=True)
    assert [each.light for each in diagnosis.findings if each.check == "resume"] == ["green"]
