"""The studio's page in a real browser: each lab by mouse and keyboard, and the pixels where pixels matter."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("uvicorn", reason="needs undiffuse[serve]")
pytest.importorskip("fastapi", reason="needs undiffuse[serve]")
pytest.importorskip("playwright.sync_api", reason="needs playwright")

from studio_page import CHROMIUM, Looking, Running, make_run, running
from undiffuse.pipeline import Pipeline
from undiffuse.studio.app import MODEL

if CHROMIUM is None:
    pytest.skip("no chromium is installed", allow_module_level=True)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as each:
        yield each


def test_time_both_ways_shows_the_data_at_0_and_unit_noise_at_1(look: Looking) -> None:
    look.open("time?t=0&picture=3&seed=5")
    look.wait("now.trace && now.t === 0")
    digit = look.pixels(".tile canvas")
    _, known = look.server.message("/studio/pictures", {"model": "digits"})
    wanted = np.floor((known["x"][3, 0] + 1) / 2 * 255 + 0.5)
    assert np.array_equal(digit, wanted)  # the forward side at t = 0 is the data, to the last grey
    assert look.js("now.forward.length") == 64

    look.slide("#time", 1000)
    look.wait("now.t === 1")
    noise = np.array(look.js("Array.from(now.trace.arrays.x.data.slice(0, 640))"))
    assert abs(noise.var() - 1) < 0.15  # 640 numbers of unit variance: five deviations
    assert np.allclose(look.js("Array.from(now.forward)"), look.js("Array.from(now.x)"), atol=1e-6)  # one noise
    assert np.array_equal(look.pixels(".tile canvas"), look.pixels(".tile.own canvas"))


def test_dragging_shows_the_frame_of_that_step_and_asks_the_server_nothing(look: Looking) -> None:
    look.open("time?seed=2&steps=10&i=4")
    look.wait("now.trace && now.trace.t.length === 11")
    before = len(look.asked)
    box = look.page.locator("#time").bounding_box()
    middle = box["y"] + box["height"] / 2
    look.page.mouse.move(box["x"] + box["width"] * 0.5, middle)
    look.page.mouse.down()
    for share in (0.6, 0.8, 0.9, 0.7):
        look.page.mouse.move(box["x"] + box["width"] * share, middle, steps=3)
        frame, t = look.js("[now.frame, now.t]")
        assert abs(t - share) < 0.02
        times = look.js("now.trace.t")
        assert frame == int(np.argmin([abs(each - t) for each in times]))
        x = np.array(look.js("Array.from(now.x)"))
        wanted = look.js(
            "Array.from(now.trace.arrays.x.data.slice((now.frame * 10 + 4) * 64, (now.frame * 10 + 5) * 64))"
        )
        assert np.array_equal(x, wanted)
        reach = look.js("now.trace.alpha[now.frame] + now.trace.sigma[now.frame] * 2.5")
        grey = np.floor(np.clip((x / reach + 1) / 2, 0, 1) * 255 + 0.5).reshape(8, 8)
        assert np.abs(look.pixels(".tile.own canvas") - grey).max() <= 1
    look.page.mouse.up()
    assert [url for url in look.asked[before:] if "/studio/page/" not in url] == []


def test_time_by_keyboard_steps_along_the_grid_and_plays(look: Looking) -> None:
    look.open("time?steps=8&t=1")
    look.wait("now.trace && now.frame === 0")
    look.page.locator("#time").focus()
    for wanted in (1, 2, 3):
        look.page.keyboard.press("ArrowLeft")
        assert look.js("now.frame") == wanted
    look.page.keyboard.press("ArrowRight")
    assert look.js("now.frame") == 2
    look.page.keyboard.press("Space")
    look.wait("now.t === 0")  # it has played to the data
    assert "frame 8 of 8" in look.page.locator("#time").get_attribute("aria-valuetext")


def test_a_branch_keeps_the_way_up_to_it_and_leaves_it_there(look: Looking) -> None:
    look.open("time?seed=1&steps=8&t=0.5&n=4")
    look.wait("now.trace && now.frame === 4")
    look.page.locator("#knob-bclass").select_option("8")
    look.page.locator("#branch").click()
    look.wait("now.branch")
    assert look.js("now.branch.t.length") == 5
    x, kept = (
        np.array(look.js(f"Array.from({what})")) for what in ("now.branch.arrays.x.data", "now.trace.arrays.x.data")
    )
    size = 4 * 64
    assert np.array_equal(x[:size], kept[4 * size : 5 * size])  # the x that it left from, to the last bit
    assert np.abs(x[-size:] - kept[-size:]).max() > 0.1  # another class, another end
    assert "branch=4" in look.page.evaluate("location.hash") or look.page.wait_for_timeout(400) is None
    assert "bclass=8" in look.page.evaluate("location.hash")
    look.page.reload()
    look.page.wait_for_selector(".lab")
    look.wait("now.branch")  # the address makes it again
    assert np.array_equal(x, np.array(look.js("Array.from(now.branch.arrays.x.data)")))


def test_inversion_begins_from_the_pictures_own_noise_and_comes_back(look: Looking) -> None:
    look.open("time?steps=40&t=0&n=4&i=2")
    look.wait("now.trace")
    look.page.locator("#knob-start").select_option("inverted")
    look.wait("now.trace.round_trip !== undefined")
    assert look.js("now.trace.round_trip") < 0.25
    error = look.js("Math.max(...now.x.map((v, k) => Math.abs(v - now.pictures.arrays.x.data[2 * 64 + k])))")
    assert error < 1.2
    assert look.js("now.trace.labels") == [0, 1, 2, 3]  # the pictures' own classes


def test_a_and_b_share_the_first_frame_and_the_number_of_calls(look: Looking) -> None:
    look.open("solvers?calls=6&asolver=heun&bsolver=euler&way=0")
    look.wait("now.both && now.a")
    a, b = look.js(
        "[Array.from(now.both.arrays.a_x.data.slice(0, 640)), Array.from(now.both.arrays.b_x.data.slice(0, 640))]"
    )
    assert a == b
    assert look.js("[now.a.steps, now.b.steps]") == [3, 6]
    assert look.js("now.a.calls") <= 6
    assert look.js("now.b.calls") == 6
    assert np.array_equal(
        look.pixels("[aria-label='Samples of A'] canvas"), look.pixels("[aria-label='Samples of B'] canvas")
    )
    look.page.locator("#knob-way").focus()
    look.page.keyboard.press("End")
    assert look.js("[now.a.frame, now.b.frame]") == [3, 6]
    assert not np.array_equal(
        look.pixels("[aria-label='Samples of A'] canvas"), look.pixels("[aria-label='Samples of B'] canvas")
    )


def test_every_solver_grid_and_schedule_of_the_registries_can_be_chosen(look: Looking) -> None:
    from undiffuse import GRIDS, SCHEDULES, SOLVERS

    look.open("time")
    options = "select => [...select.options].map((each) => each.value)"
    assert look.page.locator("#knob-solver").evaluate(options) == list(SOLVERS)
    assert look.page.locator("#knob-grid").evaluate(options) == list(GRIDS)
    look.open("solvers?points=5")
    assert look.page.locator("#knob-schedule").evaluate(options) == list(SCHEDULES)
    look.wait("now.grid")
    look.page.locator("#knob-schedule").select_option("cosine")
    look.wait("now.grid.arrays.alpha.data[0] > 0.001 || now.grid.terminal_snr < 1e-3")
    wanted = GRIDS["uniform"].levels(SCHEDULES["cosine"], 5)
    look.wait(f"Math.abs(now.grid.arrays.alpha.data[2] - {float(wanted[2].alpha)}) < 1e-6")


def test_guidance_by_mouse_and_keyboard(look: Looking) -> None:
    look.open("guidance?classes=7&steps=5")
    look.wait("now.strip")
    assert look.js("now.strip.arrays.x.shape.slice(0, 2)") == [9, 5]
    look.page.locator(".sheet canvas").nth(9 + 6).click()  # the second row, scale 4
    look.wait("now.chosen === 6")
    look.page.locator("#knob-scale").focus()
    look.page.keyboard.press("ArrowRight")
    assert look.js("now.chosen") == 7
    whole = look.js("Array.from(now.strip.arrays.x.data)")
    look.page.locator("#knob-high").fill("0.0001")  # guided nowhere: every scale is the model's own answer
    look.wait("now.strip.arrays.x.data.slice(320, 640).every((v, k) => v === now.strip.arrays.x.data[k + 640])")
    assert look.js("Array.from(now.strip.arrays.x.data)") != whole


def test_the_walk_has_its_corners_and_the_sliders_move_through_it(look: Looking) -> None:
    look.open("walk?corners=5,6,7,8&steps=5&wclass=2")
    look.wait("now.made")
    _, known = look.server.message("/studio/trace", {"n": 1, "seed": 6, "cond": {"classes": [2]}, "steps": 5})
    corner = np.array(look.js("Array.from(now.made.arrays.x.data.slice(8 * 64, 9 * 64))"))
    assert np.allclose(corner, known["x"][-1].ravel(), atol=1e-4)  # upper right: the sample of seed 6 alone
    look.page.locator("#knob-u").focus()
    for _ in range(3):
        look.page.keyboard.press("ArrowRight")
    assert look.js("now.k") == 3
    look.page.locator(".sheet button").nth(9 + 5).click()
    assert look.js("now.k") == 14
    look.page.locator("#knob-down").select_option("classes")
    look.wait("now.made.rows === 10")


def test_the_plane_flows_can_be_drawn_and_learns(look: Looking) -> None:
    look.open("plane?psteps=8&updates=250&pt=0")
    look.wait("now.exact && now.exact.arrays.paths.shape[0] === 9")
    points = np.array(look.js("Array.from(now.exact.arrays.points.data)")).reshape(-1, 2)
    ends = np.array(look.js("Array.from(now.exact.arrays.paths.data.slice(8 * 800))")).reshape(-1, 2)
    nearest = np.linalg.norm(ends[:, None] - points[None], axis=-1).min(1)
    assert np.median(nearest) < 0.3  # particles end where the data is
    look.page.locator("#plane-time").focus()
    look.page.keyboard.press("ArrowRight")
    assert look.js("now.frame") == 7
    # by mouse
    look.page.locator("#draw").click()
    box = look.page.locator(".plane canvas").first.bounding_box()
    look.page.mouse.move(box["x"] + 100, box["y"] + 100)
    look.page.mouse.down()
    look.page.mouse.move(box["x"] + 300, box["y"] + 250, steps=12)
    look.page.mouse.up()
    drawn = look.js("now.drawn.length")
    assert drawn >= 8
    # by keyboard
    look.page.keyboard.press("ArrowUp")
    look.page.keyboard.press("ArrowUp")
    look.page.keyboard.press("Space")
    assert look.js("now.drawn.length") == drawn + 1
    look.page.keyboard.press("Enter")
    look.wait(f"now.exact.arrays.points.shape[0] === {drawn + 1}")
    look.page.locator("#train").click()
    look.wait("now.learned && now.learned.finished")
    losses = look.js("now.learned.losses")
    assert losses[-1] < losses[0]
    assert look.js("now.learned.arrays.velocity.shape") == look.js("now.exact.arrays.velocity.shape")


def test_everything_is_labelled_explained_and_reached_by_keyboard(look: Looking) -> None:
    for lab in ("time", "solvers", "guidance", "plane", "runs", "walk"):
        look.open(lab)
        unnamed = look.page.evaluate(
            """() => [...document.querySelectorAll('input, select, button, canvas[role=img], svg')].filter((each) =>
            !each.closest('.hidden') && each.type !== 'file' &&
            !(each.labels?.length || each.getAttribute('aria-label') || each.textContent.trim()))
            .map((each) => each.id || each.tagName)"""
        )
        assert unnamed == []
        for why in look.page.locator(".why").all():
            assert why.locator("a").get_attribute("href").startswith("/studio/chapter/")
            assert len(why.locator("p").first.text_content()) > 20
            assert why.locator(".formula").text_content()
    look.open("time")
    look.page.keyboard.press("Tab")
    assert look.page.evaluate("document.activeElement.className") == "skip"
    look.page.locator(".why summary").first.focus()
    look.page.keyboard.press("Enter")
    assert look.page.locator(".why[open]").count() == 1
    look.page.keyboard.press("Escape")
    assert look.page.locator(".why[open]").count() == 0


def test_copy_as_says_commands_that_work_and_pictures_can_be_saved(look: Looking, tmp_path: Any) -> None:
    from PIL import Image

    from undiffuse.commands import main

    look.open("time?seed=4&n=3&classes=5&steps=4&solver=heun&scale=2")
    look.wait("now.trace && now.trace.t.length === 5")
    look.page.locator("#share").click()
    python, command, curl = (look.page.locator("#sheet pre").nth(i).text_content() for i in (1, 2, 3))
    scope: dict[str, Any] = {}
    exec(python, scope)
    assert main([*shlex.split(command)[1:], "--out", str(tmp_path / "x.npy")]) == 0
    assert np.array_equal(np.load(tmp_path / "x.npy"), scope["x"])
    spec = Pipeline.load(look.server.studio.folders["digits"]).spec
    _, arrays = look.server.message(
        "/studio/trace", {"n": 3, "seed": 4, "cond": {"classes": [5]}, "steps": 4, "solver": "heun", "scale": 2}
    )
    import torch

    assert np.abs(spec.to_data(torch.tensor(arrays["x"][-1])).astype(int) - scope["x"].astype(int)).max() <= 1
    body = shlex.split(curl.replace("\\\n", " "))[5]
    status, _, raw = look.server.ask("/v1/samples", body.encode())
    assert status == 200, raw
    for name, kind in (("Save PNG", "png"), ("Save animated GIF", "gif"), ("Save animated WebP", "webp")):
        with look.page.expect_download() as found:
            look.page.get_by_role("button", name=name, exact=True).click()
        found.value.save_as(tmp_path / f"x.{kind}")
        with Image.open(tmp_path / f"x.{kind}") as picture:
            assert str(picture.format).lower() == kind
            assert getattr(picture, "n_frames", 1) == (1 if kind == "png" else 5)


def test_a_model_that_is_not_here_is_said(look: Looking) -> None:
    look.open("time?model=elsewhere&n=1&steps=2")
    look.wait("now.trace")
    look.page.wait_for_timeout(200)
    assert "What you see is of digits" in look.page.locator("#trouble").text_content()


def test_what_a_model_does_by_itself_is_shown_as_such(browser: Any, tmp_path: Any) -> None:
    model = Pipeline.load(MODEL)
    model.sampling = model.settings(guidance_interval=(0.5, 2.0))
    model.tuned = (model.settings(steps=3, solver="heun", grid="karras"),)
    with running({"own": model.save(tmp_path / "own")}) as server:
        context = browser.new_context()
        looking = Looking(context.new_page(), server)
        looking.page.goto(server.link)
        looking.page.wait_for_selector(".lab")
        looking.open("time?steps=3&n=1")
        looking.wait("now.trace")
        solver = looking.page.locator("#knob-solver")
        assert (looking.js("now.trace.calls"), solver.input_value()) == (5, "")  # tuned for three steps: Heun's method
        solver.select_option("dpmpp_2m")  # the model's default, chosen: not the tuned one
        looking.wait("now.trace.calls === 3")
        looking.open("guidance?steps=3&rows=1&classes=3")
        looking.wait("now.strip")
        boxes = [looking.page.locator(f"#knob-{name}").get_attribute("placeholder") for name in ("low", "high")]
        assert boxes == ["0.5", "2"]
        looking.page.locator("#share").click()
        assert "guidance_interval=(0.5, 2)" in looking.page.locator("#sheet pre").nth(1).text_content()
        assert looking.complaints == []
        context.close()


@pytest.mark.parametrize("state", ["", "&down=classes&against=3", "&wclass=none"])
def test_the_line_of_a_walk_makes_its_whole_map(look: Looking, state: str) -> None:
    look.open(f"walk?corners=7,1,2,3&seed=7&steps=3&solver=ddpm&grid=karras&scale=2{state}")
    look.wait("now.made")
    look.page.locator("#share").click()
    scope: dict[str, Any] = {}
    exec(look.page.locator("#sheet pre").nth(1).text_content(), scope)
    made = np.array(look.js("Array.from(now.made.arrays.x.data)"), np.float32).reshape(-1, 1, 8, 8)
    spec = scope["pipeline"].spec
    assert np.abs(spec.to_data(torch.from_numpy(made)).astype(int) - scope["x"].astype(int)).max() <= 1


def test_what_has_no_line_to_copy_says_so(look: Looking) -> None:
    for state, lines, words in (("start=inverted", 1, "no line to copy"), ("branch=1", 4, "without what has left it")):
        look.open(f"time?n=2&steps=3&{state}")
        look.wait("now.trace" if lines == 1 else "now.branch")
        look.page.locator("#share").click()
        assert look.page.locator("#sheet pre").count() == lines
        assert words in look.page.locator("#sheet").text_content()


def test_a_slider_shows_what_is_asked_for_and_a_branch_what_it_begins_with(look: Looking) -> None:
    look.open("time?n=1&steps=90&scale=1.3")  # more than the slider usually goes to, and between two of its places
    look.wait("now.trace && now.trace.t.length === 91")
    knobs = [look.page.locator(f".knob:has(#knob-{name}) output") for name in ("steps", "scale", "bscale")]
    assert [knob.text_content() for knob in knobs] == ["90", "1.3", "1.3"]
    look.slide("#knob-scale", 3)
    look.page.locator("#knob-seed").fill("5")
    assert knobs[2].text_content() == "3"
    assert look.page.locator("#knob-bseed").input_value() == "5"


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (2200, "dark")])
def test_no_lab_is_wider_than_the_screen(look: Looking, width: int, scheme: str) -> None:
    look.page.set_viewport_size({"width": width, "height": 800})
    look.page.emulate_media(color_scheme=scheme)
    for lab in ("time", "solvers", "guidance", "plane", "walk"):
        look.open(lab)
        look.wait("now.painted")
        assert look.page.evaluate("document.documentElement.scrollWidth") <= width
    paper = look.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) > 380) == (scheme == "light")


def test_ST6_a_server_that_is_busy_or_gone_is_said_and_waited_for(look: Looking) -> None:
    look.open("time?n=2&steps=3")
    look.wait("now.trace")
    answers = iter([("busy", 429), ("gone", None), ("gone", None)])

    def stand_in(route: Any) -> None:
        kind, status = next(answers, ("ok", 200))
        if kind == "busy":
            route.fulfill(status=status, headers={"Retry-After": "1"}, json={"error": {"message": "busy"}})
        elif kind == "gone":
            route.abort()
        else:
            route.continue_()

    look.page.route("**/studio/trace", stand_in)
    look.page.locator("#knob-seed").fill("9")
    look.page.wait_for_selector("#trouble:not([hidden])")
    assert "does not answer" in look.page.locator("#trouble").text_content()
    look.wait("now.trace.arrays.x.data.length > 0 && document.getElementById('trouble').hidden")
    look.complaints.clear()  # the browser's own words about the answers that this test made up


def test_ST3_names_and_notes_that_look_like_pages_are_text(browser: Any, tmp_path: Any) -> None:
    evil = "<img src=x onerror=alert(1)><script>alert(2)<\\script>"
    with running(runs={evil: make_run(tmp_path / "run", evil)}) as server:
        page = browser.new_context().new_page()
        looking = Looking(page, server)
        page.on("dialog", lambda dialog: looking.complaints.append(dialog.message))
        page.goto(server.link)
        page.wait_for_selector(".lab")
        looking.open("runs")
        looking.wait("now.painted && now.lights")
        assert page.locator("h2", has_text="<img src=x").count() == 1
        assert page.locator("img").count() == 1  # the preview
        looking.open("time?solver=%3Cscript%3Ealert(1)%3C/script%3E")
        page.wait_for_selector("#trouble:not([hidden])")
        assert "<script>" in page.locator("#trouble").text_content()
        assert [words for words in looking.complaints if "400" not in words] == []
        page.context.close()


def test_runs_side_by_side_by_mouse_and_keyboard(browser: Any, tmp_path: Any) -> None:
    runs = {name: make_run(tmp_path / name) for name in ("one", "two")}
    with running(runs=runs) as server:
        page = browser.new_context().new_page()
        looking = Looking(page, server)
        page.goto(server.link)
        page.wait_for_selector(".lab")
        looking.open("runs")
        looking.wait("now.painted && now.names.length === 1")
        page.get_by_label("two").click()
        looking.wait("now.names.length === 2")
        page.get_by_label("one", exact=False).first.focus()
        page.keyboard.press("Space")
        looking.wait("now.names.length === 1 && now.names[0] === 'two'")
        page.get_by_label("two").first.click()
        looking.wait("now.names.length === 0")  # none is none, and not the first
        assert "Choose a run" in page.locator(".stage").first.text_content()
        looking.open("runs?runs=two|gone")
        looking.wait("now.names.length === 1")
        assert "There is no run gone here" in page.locator(".stage").first.text_content()
        page.locator("#share").click()
        lines = page.locator("#sheet pre").nth(1).text_content().splitlines()
        assert [shlex.split(line)[2] for line in lines] == [
            str(runs["two"])
        ] * 2  # where it is, not where runs usually are
        page.get_by_role("button", name="Close").click()
        with (runs["two"] / "metrics.jsonl").open("a") as file:
            file.write('\n{"step": 4, "images": 64, "loss": 0.2}\n')
        looking.wait("now.all[0].loss[0].length === 4")  # it looks again by itself
        assert looking.complaints == []
        page.context.close()


def test_the_real_picture_is_denoised_from_where_the_forward_side_is(look: Looking) -> None:
    look.open("time?seed=1&steps=8&t=0.6&n=4&i=2&picture=3&bscale=1")
    look.wait("now.trace && now.t === 0.6")
    look.page.locator("#denoise").click()
    look.wait("now.branch")
    assert "noised=0.6" in look.page.evaluate("location.hash") or look.page.wait_for_timeout(400) is None
    begun = np.array(look.js("Array.from(now.branch.arrays.x.data.slice(128, 192))"))
    assert (
        np.abs(begun - np.array(look.js("Array.from(now.forward)"))).max() < 1e-4
    )  # what is seen is what is begun from
    assert look.js("[now.branch.t[0], now.branch.labels]") == [0.6, [3, 3, 3, 3]]  # the picture's own class
    assert np.array_equal(look.pixels("section:has(#denoise) .sheet canvas:nth-child(3)"), look.pixels(".tile canvas"))
    _, known = look.server.message("/studio/pictures", {})
    ends = np.array(look.js("Array.from(now.branch.arrays.x.data)")).reshape(-1, 4, 64)[-1]
    assert np.sqrt(((ends - known["x"][3].ravel()) ** 2).mean(1)).max() < 0.8  # it is still about that picture
    look.slide("#time", 900)  # before it left: the real picture with this noise
    assert np.array_equal(look.pixels("section:has(#denoise) .sheet canvas:nth-child(3)"), look.pixels(".tile canvas"))
    look.page.locator("#knob-bclass").select_option("8")
    look.wait("now.branch.labels[0] === 8")
    look.settled("location.hash.includes('bclass=8')")
    look.page.reload()
    look.page.wait_for_selector(".lab")
    look.wait("now.branch && now.branch.labels[0] === 8")  # the address makes it again


def test_quality_and_variety_are_measured_at_the_push_of_a_button(look: Looking) -> None:
    def less(route: Any) -> None:  # the same routes, asked for less
        body = route.request.post_data_json
        small = (
            {"base": {**body["base"], "n": 6}}
            if "base" in body
            else {"solvers": ["euler", "heun"], "calls": [2, 4], "samples": 16}
        )
        route.continue_(post_data=json.dumps({**body, **small}))

    look.page.route("**/studio/quality", less)
    look.page.route("**/studio/strip", less)
    look.open("solvers?steps=4")
    look.wait("now.both")
    look.page.locator("#measure").focus()
    look.page.keyboard.press("Enter")
    look.wait("now.quality")
    rows = look.js("now.quality.rows.map((row) => [row.solver, row.calls, row.frechet])")
    assert {(name, calls) for name, calls, _ in rows} >= {("euler", 2), ("euler", 4), ("heun", 4)}
    assert all(distance > 0 for *_, distance in rows)
    assert look.page.locator("section:has(#measure) circle").count() == len(rows)
    look.open("guidance?steps=3&classes=7")
    look.wait("now.strip")
    look.page.locator("#judge").click()
    look.wait("now.judged")
    variety, fidelity = look.js("[now.judged.variety, now.judged.recognised]")
    assert len(variety) == len(fidelity) == 9
    assert fidelity[4] > fidelity[0]  # asked three times as hard, it is taken for a seven more often than unasked
    assert look.page.locator("section:has(#judge) circle").count() == 9
