"""Text, from the prompt to the picture and back from a saved folder."""

from __future__ import annotations

import json
import threading
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from undiffuse.commands import main
from undiffuse.commands.sample import sample
from undiffuse.conditions import Conditions, Patches, Text
from undiffuse.data.shapes import Shapes
from undiffuse.errors import UndiffuseError, UndiffuseWarning
from undiffuse.guidance import cfg
from undiffuse.networks import attention_maps
from undiffuse.pipeline import ModelConfig, Pipeline
from undiffuse.sampling import sample as run_to_the_end
from undiffuse.training import make_recipe
from undiffuse.training.trainer import Trainer, ignored_inputs

PROMPTS = ["a red circle", "two small striped blue squares above a green triangle"]


@cache
def config() -> ModelConfig:
    return make_recipe("tiny", Shapes(count=100).spec, 100).config(Shapes(count=100).spec)


def pipeline(seed: int = 0) -> Pipeline:
    """A network that has learned nothing, but says something: no weight is 0."""
    torch.manual_seed(seed)
    denoiser = config().build()
    for p in denoiser.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.4 / p[0].numel() ** 0.5)
    recipe = make_recipe("tiny", Shapes(count=100).spec, 100)
    return Pipeline(denoiser.eval(), config(), Shapes(count=100).spec, recipe.sampling, {})


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    made = pipeline()
    made.save(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return made


def estimate(made: Pipeline, x: Tensor, text: Tensor) -> Tensor:
    return made.denoiser(x, made.config.schedule(0.5), text=text).x0.detach()


def x_of(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_trap_G5_the_prompt_reaches_the_output_and_its_order_counts() -> None:
    made, x = pipeline(), x_of(1).expand(4, -1, -1, -1)
    said = ["a red circle above a blue square", "a blue circle above a red square", "a red circle", ""]
    answers = estimate(made, x, made.conditions(range(4), None, said)["text"])
    for i in range(4):
        for j in range(i):
            assert float((answers[i] - answers[j]).abs().max()) > 1e-3


def test_the_empty_prompt_is_the_null_condition() -> None:
    made = pipeline()
    null = made.denoiser.null(2)["text"]
    for nothing in (["", "   "], None):
        assert torch.equal(made.conditions(range(2), None, nothing)["text"], null)
    assert torch.equal(made.draw(2, prompts=[""], seed=3), made.draw(2, seed=3))


@torch.no_grad()
def test_padding_changes_nothing_through_the_whole_denoiser() -> None:
    """The same weights with room for 9 and for 40 tokens: what is not there is not seen, not even its number."""
    short, x = Text(["ab"], 16, length=9, token_width=16), x_of(3)
    long = Text(["ab"], 16, length=40, token_width=16)
    weights = short.state_dict()
    more = long.places.detach()[10:]
    long.load_state_dict({**weights, "places": torch.cat([weights["places"], 1e3 * more])})
    network = pipeline().denoiser.network.requires_grad_(False)
    width = int(config().network_config["condition_width"])
    for text in (short, long):
        text.pooled = nn.Linear(16, width)
    long.pooled.load_state_dict(short.pooled.state_dict())
    look = nn.Linear(16, int(config().network_config["token_width"]))  # to the network's tokens
    answers = []
    for text in (short, long):
        told = Conditions({"text": text}).encode({"text": text.read(["abab", "", "a b ab ba"])}, 3)
        answers.append(network(x, torch.full((3,), 500.0), told["vector"], look(told["tokens"]), told["mask"]))
    assert torch.allclose(answers[0], answers[1], atol=1e-5)
    assert float((answers[0][0] - answers[0][2]).abs().max()) > 1e-3


def test_a_long_prompt_is_cut_and_the_warning_names_what_was_cut() -> None:
    text = Text((), 4, length=10, token_width=4)
    with pytest.warns(UndiffuseWarning, match="has 12 tokens, this model reads 10: cut was 'gh'"):
        rows = text.read(["abc def", "abc d ef gh"])
    assert [text.text(row.tolist()) for row in rows] == ["abc def", "abc d ef"]
    captions = Conditions({"text": Text((), 4, length=3, token_width=4)})
    with pytest.warns(UndiffuseWarning, match="so are others") as said:
        captions.values({}, ["abcdef", "bcdefg"])
    assert len(said) == 1


def test_a_negative_prompt_is_guidance_away_from_that_condition() -> None:
    made, settings = pipeline(), pipeline().settings(steps=3, guidance_scale=2.5)
    ask, away = (made.conditions(range(2), None, [said]) for said in PROMPTS)
    expected = run_to_the_end(
        cfg(made.denoiser.bind(**ask), made.denoiser.bind(**away), 2.5),
        config().schedule,
        shape=(3, 32, 32),
        samples=2,
        steps=3,
        seed=4,
        solver=settings.solver,
        grid=settings.grid,
    )
    drawn = made.draw(2, seed=4, prompts=[PROMPTS[0]], negative_prompt=PROMPTS[1], sampling=settings)
    assert torch.allclose(drawn, expected, atol=1e-4)
    assert not torch.allclose(drawn, made.draw(2, seed=4, prompts=[PROMPTS[0]], sampling=settings), atol=1e-2)
    with pytest.raises(UndiffuseError, match="acts through guidance"):
        made.draw(1, prompts=PROMPTS, negative_prompt="a circle", sampling=made.settings(guidance_scale=1.0))


def test_sample_i_gets_prompt_i_and_none_depends_on_its_neighbours() -> None:
    made = pipeline()
    together = made.draw(4, prompts=PROMPTS, seed=1)
    alone = made.draw([3], prompts=[PROMPTS[1]], seed=1)
    assert torch.allclose(together[3:], alone, atol=1e-5)
    assert made.sample(2, prompts=PROMPTS).shape == (2, 32, 32, 3)


def test_a_saved_model_reads_texts_as_before(model: Pipeline) -> None:
    loaded = Pipeline.load("model")
    assert loaded.config == model.config
    assert loaded.config.conditions["text"]["vocabulary"] == list(loaded.spec.vocabulary)
    assert torch.equal(loaded.draw(2, prompts=PROMPTS, seed=5), model.draw(2, prompts=PROMPTS, seed=5))


def test_prompts_of_the_command_line(model: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    Path("asked.txt").write_text(PROMPTS[1] + "\n\n")
    options = ["--guidance-scale", "2", "--negative-prompt", "a white circle", "-n", "4"]
    words = ["sample", "model", "--prompt", PROMPTS[0], "--prompts", "asked.txt", *options]
    assert main([*words, "--out", "one.png", "--attention", "maps.png"]) == 0
    assert main(["sample", "--from", "one.png", "--out", "two.png"]) == 0
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()
    capsys.readouterr()
    assert main([*words, "--seed", "1", "--out", "three.npy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == PROMPTS
    direct = Pipeline.load("model").sample(
        4, prompts=PROMPTS, negative_prompt="a white circle", guidance_scale=2.0, seed=1
    )
    assert np.array_equal(np.load("three.npy"), direct)
    with Image.open("maps.png") as maps:
        assert maps.width > 3 * 128


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": "none.txt"}, "cannot be read"),
        ({"prompts": "empty.txt"}, "holds no prompt"),
        ({"attention": "maps.png"}, "needs a --prompt"),
        ({"attention": "maps.jpg", "prompt": ("a",)}, "names a .png"),
        ({"classes": "3", "prompt": ("a",)}, "class"),
        ({"negative_prompt": "a", "guidance_scale": 1.0}, "guidance"),
    ],
)
def test_what_cannot_be_asked(model: Pipeline, options: dict, message: str) -> None:
    Path("empty.txt").write_text("\n \n")
    with pytest.raises(UndiffuseError, match=message):
        sample("model", number=1, **options)


def test_a_model_without_text_refuses_a_prompt() -> None:
    from test_pipeline import pipeline as digits

    with pytest.raises(UndiffuseError, match="without text"):
        digits().draw(1, prompts=["a red circle"])
    with pytest.raises(UndiffuseError, match="to a model with text"):
        digits().attention("a red circle")
    with pytest.raises(UndiffuseError, match="no prompt given"):
        pipeline().draw(1, prompts=[])


def test_attention_is_shared_among_the_words_of_the_prompt() -> None:
    told = pipeline().attention("a red circle", steps=2)
    assert told.words == ("a", "red", "circle")
    assert told.weights.shape[0] == 3
    assert bool((told.weights >= 0).all())
    assert bool((told.weights.sum(0) <= 1 + 1e-5).all())
    assert torch.equal(told.x, pipeline().draw([0], prompts=["a red circle"], sampling=pipeline().settings(steps=2)))


def test_the_words_are_found_behind_other_tokens() -> None:
    conditions = Conditions({"look": Patches((1, 8, 8), 4, 4, 4), "text": Text((), 4, length=8, token_width=4)})
    mask = conditions.encode({**conditions.null(1), "text": conditions.read("text", ["ab"])}, 1)["mask"][0]
    first = conditions.place("text")
    assert mask.nonzero().flatten().tolist() == [first, first + 1, first + 2]  # a space, and a token a letter
    with pytest.raises(UndiffuseError, match="no word acts"):
        pipeline().attention("a red circle", guidance_scale=0.0)


def test_maps_are_of_the_thread_that_asks_alone() -> None:
    made = pipeline()
    x, level, text = x_of(1), config().schedule(0.5), made.conditions([0], None, ["a red circle"])

    with attention_maps(made.denoiser.network) as maps:
        other = threading.Thread(target=lambda: made.denoiser(x, level, **text))
        other.start()
        other.join()
        assert maps == []
        made.denoiser(x, level, **text)
        assert maps


def test_a_server_s_prompts_are_the_pipeline_s() -> None:
    pytest.importorskip("pydantic", reason="needs undiffuse[serve]")
    from undiffuse.serving import api
    from undiffuse.serving.engine import Engine, Request

    made = pipeline()
    form = api.Samples(prompt=PROMPTS[1], negative_prompt=PROMPTS[0], guidance_scale=2.0)
    sampling = api.sampling_of(form, made, api.Limits())
    asked = api.asked_of(form, form.prompt, made, sampling)
    assert asked == {
        "classes": None,
        "cond": None,
        "against": None,
        "prompts": [PROMPTS[1]],
        "negative_prompt": PROMPTS[0],
    }
    with Engine({"m": made}, rows=8) as engine:
        with pytest.raises(api.Refused, match="this model reads"):  # nobody would see the warning
            api.texts_of(api.Samples(negative_prompt="a red circle " * 40), "", made, made.sampling)
        requests = [Request("m", sampling, samples=range(2), seed=3, **asked), Request("m", sampling, prompts=PROMPTS)]
        served = [engine.run(each) for each in requests]
    assert torch.allclose(served[0], made.draw(2, seed=3, sampling=sampling, **asked), atol=1e-3)
    assert torch.allclose(served[1], made.draw(1, sampling=sampling, prompts=PROMPTS), atol=1e-3)


# --- training ---------------------------------------------------------------------------------------------------------


def trainer() -> Trainer:
    data = Shapes(count=64)
    return Trainer(data, make_recipe("tiny", data.spec, len(data)), seed=1, workers=0)


def test_CK3_training_with_text_resumes_to_the_bit() -> None:
    whole, first, second = trainer(), trainer(), trainer()
    for _ in range(4):
        whole.update()
    for _ in range(2):
        first.update()
    second.restore(first.snapshot().copy(), "here")
    for _ in range(2):
        second.update()
    for name, tensor in whole.denoiser.state_dict().items():
        assert torch.equal(tensor, second.denoiser.state_dict()[name]), name


def test_captions_are_read_with_their_pictures_and_dropped() -> None:
    made = trainer()
    x0, cond = made.read(0)
    text = made.denoiser.conditions.part("text")
    captions = [text.text(row.tolist()) for row in cond["text"]]
    data = Shapes(count=64)
    where = [(data.captions(range(64)) or []).index(caption) for caption in captions]
    alike = (data.batch(where)[0] == x0).flatten(1).all(1)
    assert float(alike.float().mean()) > 0.7  # a caption may be that of another picture too
    kept = made.denoiser.conditions.drop(cond, torch.linspace(0, 1, len(x0)), 0.5)["text"]
    assert not kept[: len(x0) // 2].any()
    assert torch.equal(kept[-4:], cond["text"][-4:])


def test_trap_O5_a_network_that_ignores_its_text_is_found() -> None:
    made = trainer()
    made.update()
    x0, cond = made.read(0)
    assert ignored_inputs(made.denoiser, x0, cond) == []

    class Deaf(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, label: Tensor, vector: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
            return self.inner(x, label, torch.zeros_like(vector), torch.zeros_like(tokens), mask | True)

    made.denoiser.network = Deaf(made.denoiser.network)
    assert ignored_inputs(made.denoiser, x0, cond) == ["text"]


def test_only_captions_bring_a_text_condition() -> None:
    from dataclasses import replace

    spec = Shapes(count=10).spec
    recipe = make_recipe("tiny", spec, 10)
    assert "text" in recipe.config(spec).conditions
    assert recipe.config(replace(spec, vocabulary=())).conditions == {}
    unconditional = replace(recipe, model=replace(recipe.model, conditional=False))
    assert unconditional.config(spec).conditions == {}
    assert unconditional.config(spec).network_config["token_width"] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recipe.check(spec)
