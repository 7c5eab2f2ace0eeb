"""The studio asks for whatever a model can be asked for: words, attributes, vectors; and which words act where."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("uvicorn", reason="needs undiffuse[serve]")
pytest.importorskip("fastapi", reason="needs undiffuse[serve]")
pytest.importorskip("playwright.sync_api", reason="needs playwright")

from studio_page import CHROMIUM, Looking, Running, close, ends
from test_pipeline import conditional
from test_text import pipeline as literate
from undiffuse.commands import main
from undiffuse.pipeline import Pipeline

if CHROMIUM is None:
    pytest.skip("no chromium is installed", allow_module_level=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pipeline]:
    """A model of words, with pictures of its data; and one of attributes, a vector and words together."""
    made = {"words": literate(), "many": conditional()}
    made["words"].info["data"] = "shapes"
    made["words"].sampling = replace(made["words"].sampling, steps=4, guidance_scale=2.0)
    return made


def test_a_prompt_is_asked_for_and_led_away_from(look: Looking, models: dict[str, Pipeline]) -> None:
    model = models["words"]
    look.open("time?n=2&seed=3")
    look.wait("now.trace")
    assert close(ends(look), model.draw(2, seed=3))
    look.page.locator("#knob-prompt").fill("a red circle")
    look.page.keyboard.press("Enter")
    look.settled("location.hash.includes('prompt=a+red+circle')")
    plain = model.draw(2, seed=3, prompts=["a red circle"])
    assert close(ends(look), plain)
    look.page.locator("#knob-negative").fill("a blue square")
    look.page.locator("#knob-negative").blur()  # leaving the box asks too
    look.settled("location.hash.includes('negative=a+blue+square')")
    away = model.draw(2, seed=3, prompts=["a red circle"], negative_prompt="a blue square")
    assert not torch.allclose(plain, away, atol=1e-2)
    assert close(ends(look), away)
    look.page.reload()
    look.page.wait_for_selector(".lab")
    look.wait("now.trace")
    assert close(ends(look), away)  # the address says it all


def test_what_cannot_be_asked_for_is_said(server: Running) -> None:
    many = {"model": "many", "steps": 2}
    for form, words in (
        ({"model": "words", "cond": {"text": ["a red circle " * 100]}}, "this model reads"),
        ({"model": "words", "against": {"text": ["a " * 200]}, "scale": 2}, "this model reads"),
        ({**many, "cond": {"place": [[1e308, 1]]}}, "infinite"),
        ({**many, "cond": {"place": [[10**400, 1]]}}, "takes numbers"),
        ({**many, "cond": {"kind": ["x"]}}, "takes numbers"),
        ({**many, "cond": {"text": [3]}}, "is a text"),
    ):
        status, _, raw = server.ask("/studio/trace", form)
        assert (status, words in raw.decode()) == (400, True), raw


def test_a_branch_goes_on_with_another_prompt_from_either_side(look: Looking, models: dict[str, Pipeline]) -> None:
    look.open("time?n=2&steps=4&prompt=a+red+circle&t=0.5&scale=2")
    look.wait("now.trace && now.t === 0.5")
    look.page.locator("#knob-bprompt").fill("two blue squares")
    look.page.locator("#branch").click()
    look.wait("now.branch")
    model = models["words"]
    begun = look.js("now.branch.t.length")
    x = np.array(look.js("Array.from(now.branch.arrays.x.data)"), np.float32).reshape(begun, 2, 3, 32, 32)
    told = model.conditions(range(2), None, ["two blue squares"])
    level = model.config.schedule(look.js("now.branch.t[0]"))
    estimate = model.denoise(told, model.settings())(torch.from_numpy(x[0]), level)
    x0 = np.array(look.js("Array.from(now.branch.arrays.x0.data)"), np.float32).reshape(x.shape)
    assert close(x0[0], estimate.x0.detach())  # asked there, in these words
    look.page.locator("#denoise").click()
    look.settled("location.hash.includes('noised=0.5')")
    data = look.server.message("/studio/pictures", {"model": "words"})[1]["x"]
    wanted = model.begin(
        2, prompts=["two blue squares"], sampling=model.settings(), image=torch.tensor(data[:1]), strength=0.5
    )
    assert close(np.array(look.js("Array.from(now.branch.arrays.x.data)")).reshape(-1, 2, 3, 32, 32)[0], wanted.x)


def test_each_word_shows_where_it_has_acted(look: Looking, models: dict[str, Pipeline]) -> None:
    look.open("guidance?seed=5&steps=3&scale=4&i=1&prompt=a+red+circle")
    look.wait("now.told && now.strip")
    wanted = models["words"].attention("a red circle", seed=5, number=1, steps=3, guidance_scale=4.0)
    assert look.js("now.told.words") == list(wanted.words)
    weights = np.array(look.js("Array.from(now.told.arrays.weights.data)")).reshape(wanted.weights.shape)
    assert close(weights, wanted.weights)
    strip = np.array(look.js("Array.from(now.strip.arrays.x.data)")).reshape(9, 5, 3, 32, 32)
    assert close(strip[6, 1], wanted.x[0])  # it is that sample of the strip
    words = look.page.get_by_role("group", name="The words of the prompt").get_by_role("button")
    assert words.all_text_contents() == list(wanted.words)
    plain, heat = look.pixels(".big canvas"), {}
    for k in range(3):
        words.nth(k).hover()
        assert look.js("now.word") == k
        heat[k] = look.pixels(".big canvas")  # red
        assert not np.array_equal(heat[k], plain)
        cells = heat[k].reshape(32, heat[k].shape[0] // 32, 32, -1).mean((1, 3))
        share = torch.nn.functional.interpolate(wanted.weights[None, k : k + 1], (32, 32), mode="bilinear")[0, 0]
        grey = (strip[6, 1].mean(0) + 1) / 4
        assert np.corrcoef((cells / 255 - grey).ravel(), (share * (1 - grey)).numpy().ravel())[0, 1] > 0.7
    look.page.mouse.move(0, 0)
    assert look.js("now.word") == -1
    words.nth(1).focus()
    assert look.js("now.word") == 1  # by keyboard too
    look.page.keyboard.press("Tab")
    assert look.js("now.word") == 2
    look.page.keyboard.press("Enter")
    look.page.mouse.move(0, 0)
    assert look.js("now.word") == 2  # it stays
    look.page.get_by_role("button", name="Sample 0: where its words act").click()
    look.wait("now.told && now.told.number === 0")
    assert look.js("now.word") == 2


def test_the_map_walks_through_prompts(look: Looking, models: dict[str, Pipeline]) -> None:
    look.open("walk?corners=5,6,7,8&steps=3&prompt=a+red+circle")
    look.wait("now.made")
    assert look.js("now.made.rows") == 7
    look.page.locator("#knob-down").select_option("text")
    look.page.locator("#knob-prompts").fill("a red circle\ntwo blue squares\n\na green triangle")
    look.page.locator("#knob-prompts").blur()
    look.wait("now.made.rows === 3")
    x = np.array(look.js("Array.from(now.made.arrays.x.data)")).reshape(3, 9, 3, 32, 32)
    for row, prompt in enumerate(["a red circle", "two blue squares", "a green triangle"]):
        wanted = models["words"].draw(1, seed=6, prompts=[prompt], sampling=models["words"].settings(steps=3))
        assert close(x[row, 8], wanted[0])  # the right edge is the noise of seed 6
    look.page.locator(".sheet button").nth(9).click()
    assert "two blue squares" in look.page.locator(".beside p").last.text_content()


@pytest.mark.parametrize(
    "state",
    [
        "model=words&prompt=two+%22red%22+circles&negative=it's+blue&scale=3",
        "model=many&cond.kind=1,&cond.place=0.5,-1&prompt=a+red+dot&scale=2&against.kind=,2",
    ],
)
def test_copy_as_says_everything_that_was_asked(look: Looking, tmp_path: Path, state: str) -> None:
    look.open(f"time?n=2&steps=3&seed=2&{state}")
    look.wait("now.trace && now.trace.t.length === 4")
    seen = ends(look)
    look.page.locator("#share").click()
    copied = look.page.locator("#sheet pre").all_text_contents()
    look.page.get_by_role("button", name="Close").click()
    scope: dict[str, Any] = {}
    exec(copied[1], scope)
    assert close(seen, scope["pipeline"].spec.to_model(scope["x"])) or np.abs(seen).max() > 1  # to_data clips
    spec = scope["pipeline"].spec
    assert np.abs(spec.to_data(torch.tensor(seen)).astype(float) - scope["x"].astype(float)).max() <= 1
    assert main([*shlex.split(copied[2])[1:], "--out", str(tmp_path / "x.npy")]) == 0
    assert np.array_equal(np.load(tmp_path / "x.npy"), scope["x"])
    status, _, raw = look.server.ask("/v1/samples", shlex.split(copied[3].replace("\\\n", " "))[5].encode())
    assert status == 200, raw
    (tmp_path / "y.npy").write_bytes(raw)
    assert np.abs(np.load(tmp_path / "y.npy").astype(float) - scope["x"].astype(float)).max() <= 1


def test_attributes_and_vectors_have_knobs(look: Looking, models: dict[str, Pipeline]) -> None:
    look.open("time?model=many&n=2&steps=3&seed=2&scale=1")
    look.wait("now.trace")
    look.page.get_by_label("kind 2", exact=True).select_option("2")
    for k, value in enumerate(("0.5", "-1")):
        look.page.get_by_label(f"place {k + 1}", exact=True).fill(value)
    look.page.get_by_label("place 2", exact=True).blur()
    look.settled("location.hash.includes('place=0.5%2C-1')")
    cond = {"kind": [[None, 2]], "place": [[0.5, -1]]}
    model = models["many"]
    assert close(ends(look), model.draw(2, seed=2, cond=cond, sampling=model.settings(steps=3, guidance_scale=1.0)))
    look.complaints = [words for words in look.complaints if "400" not in words]  # half a vector was asked for between
