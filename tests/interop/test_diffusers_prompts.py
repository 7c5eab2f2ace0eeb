"""Prompts with weights, in several windows and without CLIP's last layers. The oracles: diffusers' own ``clip_skip``,
its pipelines given embeddings that the test computes with transformers, its network and scheduler asked by hand."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from undiffuse import Pipeline, Streams, UndiffuseError
from undiffuse.prompts import heavy

pytest.importorskip("diffusers", reason="diffusers is read here, and is the oracle")
pytest.importorskip("transformers", reason="diffusers' pipelines read texts with transformers")

import diffusers_models as tiny

SEED, WINDOW = 5, 14
WORDS = [word for word in tiny.VOCABULARY if len(tiny.clip_tokenizer().tokenize(word)) == 1] * 4
"""Each is one token."""
LONG = " ".join(WORDS[: 2 * WINDOW - 3])
SIZED = {"height": 32, "width": 32}
MAKE = {"sd": tiny.sd, "sdxl": tiny.sdxl, "sd3": tiny.sd3, "flux": tiny.flux, "pixart": tiny.pixart}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Pipeline]]:
    """Theirs and ours, each read once."""
    found = {}
    for name, make in MAKE.items():
        theirs, folder = make(), tmp_path_factory.mktemp(name)
        theirs.set_progress_bar_config(disable=True)
        theirs.save_pretrained(folder)
        ours = Pipeline.load(folder)
        found[name] = theirs, ours if ours.spec.shape[1:] == (32, 32) else ours.resized(32, 32)
    return found


def noise(ours: Pipeline, count: int) -> Tensor:
    return Streams(SEED, count).draw(ours.shape)


def made(ours: Pipeline, prompts: Sequence[str], scale: float = 1.0, rows: int | None = None, **asked: Any) -> Tensor:
    negative = asked.pop("negative_prompt", None)
    settings = ours.settings(steps=3, guidance_scale=scale, **asked)
    frames = ours.frames(
        len(prompts), seed=SEED, prompts=prompts, negative_prompt=negative, sampling=settings, rows=rows
    )
    *_, last = frames
    return last.x


def agree(ours: Tensor, theirs: Tensor) -> None:
    """To 1e-4 of the size of the numbers."""
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) < 1e-4 * max(1.0, float(theirs.abs().max()))


def differ(a: Tensor, b: Tensor) -> None:
    assert float((a - b).abs().max()) > 1e-3


def theirs_of(theirs: Any, ours: Pipeline, count: int, scale: float = 1.0, **asked: Any) -> Tensor:
    asked = {"num_inference_steps": 3, "guidance_scale": scale, "latents": noise(ours, count), **SIZED, **asked}
    return theirs(output_type="latent", **asked).images


# --- Layers left out --------------------------------------------------------------------------------------------------


@pytest.fixture
def norm_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5 has CLIP's norm one floor higher than diffusers 0.42 looks for it."""
    from transformers import CLIPTextModel

    monkeypatch.setattr(CLIPTextModel, "text_model", property(lambda self: self), raising=False)


@pytest.mark.usefixtures("norm_is_found")
@pytest.mark.parametrize(("name", "skip"), [("sd", 1), ("sd", 2), ("sdxl", 1), ("sd3", 1)])
def test_clip_skip_is_diffusers_own(models: dict[str, tuple[Any, Pipeline]], name: str, skip: int) -> None:
    theirs, ours = models[name]
    prompts = ["a red circle", ""] if name != "sdxl" else ["a red circle", "cat and dog"]
    more: dict[str, Any] = {"sigmas": list(np.linspace(1, 1 / 1000, 3))} if name == "sd3" else {}
    found = made(ours, prompts, clip_skip=skip)
    agree(found, theirs_of(theirs, ours, 2, prompt=prompts, clip_skip=skip, **more))
    differ(found, made(ours, prompts))


@pytest.mark.usefixtures("norm_is_found")
def test_layers_are_left_out_on_both_sides_of_guidance(models: dict[str, tuple[Any, Pipeline]]) -> None:
    """diffusers leaves them in for what guidance leads away from; told what that is, it agrees."""
    theirs, ours = models["sd"]
    for negative in (None, "a house"):
        away, _ = theirs.encode_prompt(negative or "", "cpu", 1, False, clip_skip=1)
        wanted = theirs_of(theirs, ours, 1, 3.0, prompt=["a cat"], negative_prompt_embeds=away, clip_skip=1)
        agree(made(ours, ["a cat"], 3.0, negative_prompt=negative, clip_skip=1), wanted)
    theirs, ours = models["sdxl"]  # whose null text is zeros
    agree(made(ours, ["a cat"], 3.0, clip_skip=1), theirs_of(theirs, ours, 1, 3.0, prompt=["a cat"], clip_skip=1))


# --- Weights ----------------------------------------------------------------------------------------------------------

EQUAL = ["a (red:1) circle", "(a red circle:1.0)", "[(a red)] circle", "a r(ed:1) [(circ)]le"]


@pytest.mark.parametrize("name", MAKE)
def test_law_weight_1_is_the_unweighted_prompt_to_the_bit(models: dict[str, tuple[Any, Pipeline]], name: str) -> None:
    _, ours = models[name]
    plain = made(ours, ["a red circle"])
    for text in EQUAL:
        assert torch.equal(made(ours, [text], weighted_prompts=True), plain), text


def test_without_being_asked_for_brackets_are_brackets(models: dict[str, tuple[Any, Pipeline]]) -> None:
    theirs, ours = models["sd"]
    text = "a (red:1.3) [cat"
    found = made(ours, [text])
    agree(found, theirs_of(theirs, ours, 1, prompt=[text]))
    differ(found, made(ours, [text + "]"], weighted_prompts=True))


def hidden(theirs: Any, number: str, words: Sequence[int], layer: int | None) -> Tensor:
    """``[1, T, D]`` of one window, by transformers alone."""
    tokenizer, model = getattr(theirs, f"tokenizer{number}"), getattr(theirs, f"text_encoder{number}")
    row = [tokenizer.bos_token_id, *words, tokenizer.eos_token_id]
    row += [tokenizer.pad_token_id] * (16 - len(row))
    said = model(torch.tensor([row]), output_hidden_states=True)
    return said.last_hidden_state if layer is None else said.hidden_states[layer]


def by_hand(theirs: Any, said: Sequence[tuple[str, float]], number: str = "", layer: int | None = None) -> Tensor:
    """The embedding of words with weights, in as many windows as they take: ``h0 + w (h - h0)`` at each word."""
    tokenizer = getattr(theirs, f"tokenizer{number}")
    pairs = [(i, w) for text, w in said for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    parts = []
    nothing = hidden(theirs, number, [], layer)
    for begin in range(0, max(1, len(pairs)), WINDOW):
        part = pairs[begin : begin + WINDOW]
        h = hidden(theirs, number, [i for i, _ in part], layer)
        w = torch.ones(1, 16, 1)
        w[0, 1 : 1 + len(part), 0] = torch.tensor([weight for _, weight in part])
        parts.append(nothing + w * (h - nothing))
    return torch.cat(parts, dim=1)


WEIGHTED: dict[str, list[tuple[str, float]]] = {
    "a (red:1.5) circle": [("a", 1), ("red", 1.5), ("circle", 1)],
    "(a cat:0) on [the sea]": [("a cat", 0), ("on", 1), ("the sea", 1 / 1.1)],
    "((a (red:2) cat:0.5))": [("a", 0.55), ("red", 1.1), ("cat", 0.55)],
    "(Red:1.4)ish": [("redish", 1.0)],  # its tokens are r-e, d, i, s, h; the first two weigh 1.4
}


@pytest.mark.parametrize("text", WEIGHTED)
def test_weights_act_on_the_embedding_as_stated(models: dict[str, tuple[Any, Pipeline]], text: str) -> None:
    theirs, ours = models["sd"]
    said = WEIGHTED[text]
    embedded = by_hand(theirs, said)
    if text.endswith("ish"):
        h, nothing = by_hand(theirs, said), hidden(theirs, "", [], None)
        embedded = torch.cat([h[:, :1], (nothing + 1.4 * (h - nothing))[:, 1:3], h[:, 3:]], dim=1)
    found = made(ours, [text], weighted_prompts=True)
    agree(found, theirs_of(theirs, ours, 1, prompt_embeds=embedded))
    differ(found, made(ours, [" ".join(each for each, _ in said)]))


def test_weights_of_two_encoders(models: dict[str, tuple[Any, Pipeline]]) -> None:
    """SDXL: the text as a whole knows no weights."""
    theirs, ours = models["sdxl"]
    said = [("a", 1.0), ("red", 1.5), ("circle", 1.0)]
    _, _, pooled, _ = theirs.encode_prompt("a red circle", device="cpu", do_classifier_free_guidance=False)
    embedded = torch.cat([by_hand(theirs, said, "", -2), by_hand(theirs, said, "_2", -2)], dim=-1)
    wanted = theirs_of(theirs, ours, 1, prompt_embeds=embedded, pooled_prompt_embeds=pooled)
    agree(made(ours, ["a (red:1.5) circle"], weighted_prompts=True), wanted)


def test_weights_of_t5(models: dict[str, tuple[Any, Pipeline]]) -> None:
    theirs, ours = models["pixart"]
    words = theirs.tokenizer("a red circle", add_special_tokens=False)["input_ids"]

    def said(row: list[int]) -> Tensor:
        filled = torch.tensor([row + [0] * (120 - len(row))])
        return theirs.text_encoder(filled, attention_mask=(torch.arange(120) < len(row)).long()[None])[0]

    h, nothing = said([*words, 1]), said([1])
    at = next(i for i, word in enumerate(words) if theirs.tokenizer.decode([word]).strip() == "red")
    h[:, at] = nothing[:, at] + 1.5 * (h[:, at] - nothing[:, at])
    mask = (torch.arange(120) <= len(words)).long()[None]
    wanted = theirs_of(
        theirs,
        ours,
        1,
        prompt=None,
        negative_prompt=None,
        prompt_embeds=h,
        prompt_attention_mask=mask,
        use_resolution_binning=False,
    )
    agree(made(ours, ["a (Red:1.5) circle"], weighted_prompts=True), wanted)


# --- Several windows --------------------------------------------------------------------------------------------------


def sampled_by_hand(theirs: Any, ours: Pipeline, asked: Tensor, away: Tensor, scale: float) -> Tensor:
    """Their network and scheduler, with texts of different lengths on the two sides."""
    x = noise(ours, 1)
    theirs.scheduler.set_timesteps(3)
    for t in theirs.scheduler.timesteps:
        with torch.no_grad():
            cond, uncond = (theirs.unet(x, t, encoder_hidden_states=each).sample for each in (asked, away))
        x = theirs.scheduler.step(uncond + scale * (cond - uncond), t, x).prev_sample
    return x


@pytest.mark.parametrize("count", [0, 1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 2 * WINDOW + 1])
def test_a_text_of_so_many_tokens(models: dict[str, tuple[Any, Pipeline]], count: int) -> None:
    theirs, ours = models["sd"]
    text = " ".join(WORDS[:count])
    embedded = by_hand(theirs, [(text, 1.0)])
    assert embedded.shape[1] == 16 * max(1, -(-count // WINDOW))
    found = made(ours, [text], long_prompts="windows")
    agree(found, theirs_of(theirs, ours, 1, prompt_embeds=embedded))
    if count <= WINDOW:
        assert torch.equal(found, made(ours, [text]))


@pytest.mark.parametrize(("prompt", "negative"), [(LONG, "a house"), ("a house", LONG), (LONG, None), (LONG, LONG[2:])])
def test_each_side_of_guidance_has_its_own_length(
    models: dict[str, tuple[Any, Pipeline]], prompt: str, negative: str | None
) -> None:
    theirs, ours = models["sd"]
    asked, away = by_hand(theirs, [(prompt, 1.0)]), by_hand(theirs, [(negative or "", 1.0)])
    found = made(ours, [prompt], 3.0, negative_prompt=negative, long_prompts="windows")
    agree(found, sampled_by_hand(theirs, ours, asked, away, 3.0))


def test_an_empty_text_is_the_same_in_any_number_of_windows(models: dict[str, tuple[Any, Pipeline]]) -> None:
    """So that what others fill up with empty windows is the same picture."""
    theirs, ours = models["sd"]
    asked, away = by_hand(theirs, [(LONG, 1.0)]), by_hand(theirs, []).repeat(1, 2, 1)
    wanted = theirs_of(theirs, ours, 1, 3.0, prompt_embeds=asked, negative_prompt_embeds=away)
    agree(made(ours, [LONG], 3.0, long_prompts="windows"), wanted)


def test_windows_of_two_encoders(models: dict[str, tuple[Any, Pipeline]]) -> None:
    """SDXL: the text as a whole is the first window's."""
    theirs, ours = models["sdxl"]
    embedded = torch.cat([by_hand(theirs, [(LONG, 1.0)], number, -2) for number in ("", "_2")], dim=-1)
    first = " ".join(WORDS[:WINDOW])
    _, _, pooled, _ = theirs.encode_prompt(first, device="cpu", do_classifier_free_guidance=False)
    wanted = theirs_of(theirs, ours, 1, prompt_embeds=embedded, pooled_prompt_embeds=pooled)
    agree(made(ours, [LONG], long_prompts="windows"), wanted)


def test_weights_and_layers_across_the_end_of_a_window(models: dict[str, tuple[Any, Pipeline]]) -> None:
    theirs, ours = models["sd"]
    before, within, after = (" ".join(WORDS[a:b]) for a, b in ((0, 12), (12, 17), (17, 25)))
    embedded = by_hand(theirs, [(before, 1.0), (within, 1.4), (after, 1.0)])
    text = f"{before} ({within}:1.4) {after}"
    found = made(ours, [text], long_prompts="windows", weighted_prompts=True)
    agree(found, theirs_of(theirs, ours, 1, prompt_embeds=embedded))
    skipped = theirs.text_encoder.final_layer_norm(by_hand(theirs, [(LONG, 1.0)], "", -2))
    found = made(ours, [LONG], long_prompts="windows", clip_skip=1)
    agree(found, theirs_of(theirs, ours, 1, prompt_embeds=skipped))


# --- Who else is asked ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_law_a_sample_does_not_depend_on_the_length_of_others_prompts(
    models: dict[str, tuple[Any, Pipeline]], name: str
) -> None:
    _, ours = models[name]
    settings = ours.settings(steps=2, guidance_scale=3.0, weighted_prompts=True, long_prompts="windows", clip_skip=1)
    prompts = ["a (cat:1.3)", LONG, "", f"{LONG} {LONG}"]

    def draw(numbers: Sequence[int], **more: Any) -> Tensor:
        return ours.draw(numbers, seed=SEED, prompts=prompts, sampling=settings, rows=8, **more)

    together = draw(range(4))
    assert torch.equal(draw([3, 1, 0, 2])[[2, 1, 3, 0]], together)
    for i in range(4):
        assert torch.equal(draw([i]), together[i : i + 1]), i


def test_trap_P6_what_is_kept_of_a_text_is_of_how_it_was_read(models: dict[str, tuple[Any, Pipeline]]) -> None:
    _, ours = models["sd"]
    text = f"(red:1.5) {LONG}"
    ways: list[dict[str, Any]] = [
        {},
        {"weighted_prompts": True},
        {"long_prompts": "windows"},
        {"clip_skip": 1},
        {"weighted_prompts": True, "long_prompts": "windows", "clip_skip": 1},
    ]
    fresh = []
    for way in ways:
        ours.denoiser.conditions.part("prompt").kept.clear()
        fresh.append(made(ours, [text], 3.0, **way))
    for way, wanted in zip(ways, fresh, strict=True):
        assert torch.equal(made(ours, [text], 3.0, **way), wanted)
    for i, one in enumerate(fresh):
        for other in fresh[:i]:
            differ(one, other)


def test_settings_are_kept_with_the_model(tmp_path: Path, models: dict[str, tuple[Any, Pipeline]]) -> None:
    theirs, ours = models["sd"]
    theirs.save_pretrained(tmp_path)
    changed = Pipeline.load(tmp_path)
    changed.sampling = changed.settings(weighted_prompts=True, long_prompts="windows", clip_skip=1)
    changed.save_settings(tmp_path)
    again = Pipeline.load(tmp_path)
    assert again.sampling == changed.sampling
    asked = {"weighted_prompts": True, "long_prompts": "windows", "clip_skip": 1}
    text = f"(red:1.5) {LONG}"
    assert torch.equal(made(again, [text], 3.0), made(ours, [text], 3.0, **asked))
    null = again.against(1)["prompt"]
    assert int(null[0, 0]) == 1  # the empty text too


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "flux_windows": ("flux", {"long_prompts": "windows"}, "networks that read CLIP alone; .* 511 tokens"),
    "sd3_windows": ("sd3", {"long_prompts": "windows"}, "networks that read CLIP alone"),
    "sd_skip": ("sd", {"clip_skip": 3}, "clip_skip=3 .* at most 2"),
    "sdxl_skip": ("sdxl", {"clip_skip": 2}, "clip_skip=2 .* at most 1"),
    "flux_skip": ("flux", {"clip_skip": 1}, "none can be left out"),
    "pixart_skip": ("pixart", {"clip_skip": 1}, "none can be left out"),
    "negative_skip": ("sd", {"clip_skip": -1}, "clip_skip is a number of layers"),
    "way": ("sd", {"long_prompts": "chunks"}, "cut or windows"),
    "bracket": ("sd", {"weighted_prompts": True, "prompts": ["a (cat"]}, r"character 3.*never closed"),
    "negative_bracket": (
        "sd",
        {"weighted_prompts": True, "negative_prompt": "cat)", "guidance_scale": 3.0},
        "character 4.*closes nothing",
    ),
    "endless": ("sd", {"long_prompts": "windows", "prompts": ["cat " * 1000]}, "windows, at most 32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_in_one_line(models: dict[str, tuple[Any, Pipeline]], case: str) -> None:
    name, asked, why = REFUSED[case]
    told: dict[str, Any] = {"prompts": ["a cat"], "steps": 1, **asked}
    with pytest.raises(UndiffuseError, match=why) as error:
        models[name][1].sample(1, **told)
    assert len(str(error.value).splitlines()) == 1


def test_raw_values_that_are_no_texts_are_refused(models: dict[str, tuple[Any, Pipeline]]) -> None:
    part = models["sd"][1].denoiser.conditions.part("prompt")
    good = part.read(["a cat"])
    for wrong, why in (
        (good[:, :-1], r"1 \+ windows"),
        (good[:, :1], r"1 \+ windows"),
        (good + torch.tensor([9] + [0] * WINDOW), "leaves out layers"),
        (-good, "leaves out layers|weight"),
        (torch.cat([good[:, :1], heavy([3] * WINDOW, [10.5] * WINDOW)[None]], 1), "weight is not"),
        (torch.where(good > 0, good + 10_000, good), "not one of"),
    ):
        with pytest.raises(UndiffuseError, match=why):
            part.check(wrong)
    one_window = models["sd3"][1].denoiser.conditions.part("prompt")
    with pytest.raises(UndiffuseError, match="reads one window"):
        one_window.check(torch.zeros(1, 1 + 2 * one_window.window, dtype=torch.int64))


def test_a_model_of_ours_reads_prompts_as_they_are(models: dict[str, tuple[Any, Pipeline]], tmp_path: Path) -> None:
    theirs = tiny.ddim()
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UndiffuseError, match="model without text"):
        Pipeline.load(tmp_path).sample(1, steps=1, weighted_prompts=True)


def test_a_text_with_half_a_character_is_read(models: dict[str, tuple[Any, Pipeline]]) -> None:
    _, ours = models["sd"]
    found = made(ours, ["a (\ud800cat:1.2) 日本"], weighted_prompts=True)
    assert torch.equal(found, made(ours, ["a (?cat:1.2) 日本"], weighted_prompts=True))


# --- The server -------------------------------------------------------------------------------------------------------


def test_a_server_reads_each_request_as_it_asks(models: dict[str, tuple[Any, Pipeline]]) -> None:
    """Together, to the last bit what each gets alone."""
    pytest.importorskip("pydantic", reason="needs undiffuse[serve]")
    from undiffuse.serving import api
    from undiffuse.serving.engine import Engine, Request

    _, ours = models["sd"]
    forms = [
        api.Samples(prompt="a (cat:1.4)", weighted_prompts=True, clip_skip=1),
        api.Samples(prompt=LONG, long_prompts="windows", negative_prompt="a dog"),
        api.Samples(prompt="a (cat:1.4)", guidance_scale=1.0),
    ]
    asked = []
    for form in forms:
        form.num_inference_steps, form.seed = 2, SEED
        sampling = api.sampling_of(form, ours, api.Limits())
        asked.append(Request("m", sampling, seed=SEED, **api.texts_of(form, form.prompt, ours, sampling)))
    with Engine({"m": ours}, rows=6, exact=True) as engine:
        served = [job.future.result() for job in [engine.submit(each) for each in asked]]
    for each, found in zip(asked, served, strict=True):
        told = {"prompts": each.prompts, "negative_prompt": each.negative_prompt}
        assert torch.equal(found, ours.draw(1, seed=SEED, sampling=each.sampling, rows=6, **told))


@pytest.mark.parametrize(
    ("form", "why"),
    [
        ({"prompt": "a (cat", "weighted_prompts": True}, "never closed"),
        ({"prompt": "a cat", "negative_prompt": "a]", "weighted_prompts": True}, "closes nothing"),
        ({"prompt": LONG}, "make it shorter"),
        ({"prompt": LONG * 40, "long_prompts": "windows"}, "make it shorter"),
        ({"prompt": "a cat", "clip_skip": 50}, "at most 2"),
    ],
)
def test_a_server_refuses_what_cannot_be_read(
    models: dict[str, tuple[Any, Pipeline]], form: dict[str, Any], why: str
) -> None:
    pytest.importorskip("pydantic", reason="needs undiffuse[serve]")
    from undiffuse.serving import api

    _, ours = models["sd"]
    asked = api.Samples(**form)
    with pytest.raises(api.Refused, match=why) as refused:
        api.texts_of(asked, asked.prompt, ours, api.sampling_of(asked, ours, api.Limits()))
    assert refused.value.status == 400
