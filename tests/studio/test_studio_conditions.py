"""What data say of their items has knobs in the studio: attributes, quantities, pictures beside."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("uvicorn", reason="needs undiffuse[serve]")
pytest.importorskip("fastapi", reason="needs undiffuse[serve]")
pytest.importorskip("playwright.sync_api", reason="needs playwright")

from serving_laws import complete
from studio_page import CHROMIUM, Looking, Running, close, ends
from undiffuse.commands import main
from undiffuse.data import open_dataset
from undiffuse.data.shown import read_shown
from undiffuse.pipeline import Pipeline

if CHROMIUM is None:
    pytest.skip("no chromium is installed", allow_module_level=True)


@pytest.fixture(scope="module")
def models() -> dict[str, Pipeline]:
    made = {
        "small": complete({"kind": "smaller", "factor": 2}, (1, 4, 4)),
        "holes": complete({"kind": "holes"}, (1, 8, 8)),
    }
    for model in made.values():
        model.info["data"] = "digits"  # of which there are pictures; their classes are not these
    return made


def test_attributes_and_quantities_are_asked_for_in_the_datas_own_words(
    look: Looking, models: dict[str, Pipeline]
) -> None:
    model = models["small"]
    settings = model.settings(steps=3, guidance_scale=2.0)
    look.open("time?n=2&steps=3&seed=2&scale=2")
    look.wait("now.trace")
    knobs = look.page.get_by_role("complementary", name="Controls")
    breed = knobs.get_by_label("breed", exact=True)
    assert breed.locator("option").all_text_contents() == ["open", "manx", "tabby"]
    breed.focus()
    look.page.keyboard.press("ArrowDown")  # by keyboard
    look.settled("location.hash.includes('cond.breed=manx')")
    assert close(ends(look), model.draw(2, seed=2, cond={"breed": "manx"}, sampling=settings))
    knobs.get_by_label("Away from: breed", exact=True).select_option("tabby")
    look.settled("location.hash.includes('against.breed=tabby')")
    against = {"breed": "tabby"}
    assert close(ends(look), model.draw(2, seed=2, cond={"breed": "manx"}, against=against, sampling=settings))
    age, weight = (knobs.get_by_label(name, exact=True) for name in ("age", "weight"))
    age.fill("7.5")
    age.blur()
    look.settled("location.hash.includes('cond.age=7.5')")
    assert weight.input_value() == "50"  # quantities are asked for together: the mean, until something else is said
    cond = {"breed": "manx", "age": 7.5, "weight": 50}
    wanted = model.draw(2, seed=2, cond=cond, against=against, sampling=settings)
    assert close(ends(look), wanted)
    look.page.reload()
    look.page.wait_for_selector(".lab")
    look.wait("now.trace")
    assert close(ends(look), wanted)  # the address says it all
    weight.fill("")
    weight.blur()
    look.settled("!location.hash.includes('cond.age')")
    assert age.input_value() == ""
    look.page.get_by_label("breed from here on", exact=True).select_option("tabby")
    look.page.locator("#branch").click()
    look.wait("now.branch")


def test_a_picture_beside_is_made_of_real_data_or_ones_own(
    look: Looking, models: dict[str, Pipeline], tmp_path: Path
) -> None:
    model = models["small"]
    settings = model.settings(steps=3)
    look.open("time?n=2&steps=3&seed=2&scale=1")
    look.wait("now.trace")
    plain = ends(look)
    assert close(plain, model.draw(2, seed=2, sampling=settings))
    assert look.page.get_by_text("Picture beside, 4x4").is_visible()
    look.page.locator("#next-beside").click()
    look.settled("location.hash.includes('beside=0')")
    with look.page.expect_download() as saved:
        look.page.get_by_role("button", name="Save .npy").click()
    saved.value.save_as(tmp_path / "beside-0.npy")
    small = read_shown(tmp_path / "beside-0.npy", model.beside, holes=False)  # type: ignore[arg-type]
    digits = open_dataset("digits")
    means = digits.values(range(len(digits))).reshape(-1, 4, 2, 4, 2).mean((2, 4))
    assert np.abs(means - np.load(tmp_path / "beside-0.npy")).max((1, 2)).min() <= 0.5
    made = ends(look)
    assert not np.abs(made - plain).max() < 1e-3
    drawn = model.draw(2, seed=2, cond={"beside": small}, sampling=settings)
    assert np.abs(made - drawn.numpy()).max() < 0.2  # the saved one is rounded to the data's units
    shade = look.pixels(".shown")
    assert shade.shape == (4, 4)
    assert np.abs(shade / 255 * 16 - np.load(tmp_path / "beside-0.npy")).max() <= 0.6

    own = np.random.default_rng(0).integers(0, 17, (4, 4))
    np.save(tmp_path / "own.npy", own.astype(np.uint8))
    look.page.locator("#knob-beside").set_input_files(tmp_path / "own.npy")
    look.settled("location.hash.includes('beside=1')")  # after the ten that are there
    shown = {"beside": read_shown(tmp_path / "own.npy", model.beside, holes=False)}  # type: ignore[arg-type]
    assert close(ends(look), model.draw(2, seed=2, cond=shown, sampling=settings))
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "large.png")
    look.page.locator("#knob-beside").set_input_files(tmp_path / "large.png")
    look.page.wait_for_selector("#trouble:not([hidden])")
    assert "this model takes 4x4" in look.page.locator("#trouble").text_content()
    look.complaints = [words for words in look.complaints if "400" not in words]
    look.page.get_by_role("button", name="None", exact=True).click()
    look.settled("!location.hash.includes('beside')")
    assert close(ends(look), torch.from_numpy(plain))


def test_trap_X10_holes_are_seen_and_filled_in_every_lab(
    look: Looking, models: dict[str, Pipeline], tmp_path: Path
) -> None:
    model = models["holes"]
    look.open("time?model=holes&n=2&steps=3&seed=2&scale=1&beside=1")
    look.wait("now.trace")
    look.page.wait_for_selector(".shown:not([hidden])")
    clear = look.page.locator(".shown").evaluate(
        "c => [...c.getContext('2d').getImageData(0, 0, 8, 8).data].filter((_, i) => i % 4 === 3)"
    )
    unknown = np.array(clear).reshape(8, 8) == 0
    assert 0 < unknown.sum() < 64
    with look.page.expect_download() as saved:
        look.page.get_by_role("button", name="Save .npy").click()
    saved.value.save_as(tmp_path / "hole.npy")
    (hole,) = np.load(tmp_path / "hole.npy")
    assert np.array_equal(np.isnan(hole), unknown)
    filled = model.spec.to_data(torch.from_numpy(ends(look)).float())
    assert np.array_equal(filled[0][~unknown], hole[~unknown])  # trap X10: what is known stays
    cond = {"beside": read_shown(tmp_path / "hole.npy", model.beside)}  # type: ignore[arg-type]
    assert np.array_equal(filled, model.sample(2, seed=2, cond=cond, steps=3))
    for lab in ("guidance", "solvers", "walk"):
        look.open(f"{lab}?model=holes&n=2&steps=3&beside=1")
        look.page.wait_for_selector(".shown:not([hidden])")
        look.settled("true")
        assert look.page.locator("#trouble").is_hidden(), lab


@pytest.mark.parametrize("lab", ["time", "walk"])
def test_copy_as_says_every_condition(look: Looking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lab: str) -> None:
    monkeypatch.chdir(tmp_path)
    role = {"time": "cond", "walk": "walk"}[lab]
    asked = f"{role}.breed=manx&{role}.age=7.5&{role}.weight=50&beside=2"
    look.open(f"{lab}?n=2&steps=3&seed=2&scale=2&against.breed=tabby&{asked}")
    look.wait("now.trace && now.trace.t.length === 4" if lab == "time" else "now.made")
    with look.page.expect_download() as saved:
        look.page.get_by_role("button", name="Save .npy").click()
    saved.value.save_as("beside-2.npy")
    look.page.locator("#share").click()
    copied = look.page.locator("#sheet pre").all_text_contents()
    look.page.get_by_role("button", name="Close").click()
    scope: dict[str, Any] = {}
    exec(copied[1], scope)
    if lab == "walk":
        x, spec = np.array(look.js("Array.from(now.made.arrays.x.data)"), np.float32), scope["pipeline"].spec
        made = spec.to_data(torch.from_numpy(x.reshape(63, *spec.shape)))
        assert np.abs(made.astype(float) - scope["x"].astype(float)).max() <= 1
        return
    assert main([*shlex.split(copied[2])[1:], "--out", "x.npy"]) == 0
    assert np.array_equal(np.load("x.npy"), scope["x"])
    subprocess.run(["bash", "-c", copied[3]], check=True, capture_output=True)
    assert np.abs(np.load("samples.npy").astype(float) - scope["x"].astype(float)).max() <= 1
    cond = {
        "breed": "manx",
        "age": 7.5,
        "weight": 50,
        "beside": scope["read_shown"]("beside-2.npy", scope["pipeline"].beside, holes=False),
    }
    told = {"cond": cond, "against": {"breed": "tabby"}, "steps": 3, "guidance_scale": 2.0}
    assert np.array_equal(scope["x"], scope["pipeline"].sample(2, seed=2, **told))


def test_what_cannot_be_shown_is_said(server: Running) -> None:
    for form, words in (
        ({"cond": {"beside": [99]}}, "there is no picture 99"),
        ({"cond": {"beside": ["x"]}}, "there is no picture 'x'"),
        ({"cond": {"breed": ["manks"]}}, "did you mean 'manx'"),
        ({"cond": {"age": [1]}}, "asked for together"),
    ):
        status, _, raw = server.ask("/studio/trace", {"model": "small", "steps": 2, **form})
        assert (status, words in raw.decode()) == (400, True), raw
    assert server.ask("/studio/beside/file", {"model": "small", "number": 99})[0] == 400
    assert server.ask("/studio/beside/open", {"model": "small", "data": "!"})[0] == 400
