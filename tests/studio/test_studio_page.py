"""The studio's page in a real browser: each lab by mouse and keyboard, and the pixels where pixels matter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="needs undiffuse[serve]")
pytest.importorskip("fastapi", reason="needs undiffuse[serve]")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")

from studio_page import CHROMIUM, Running, running  # noqa: E402

if CHROMIUM is None:
    pytest.skip("no chromium is installed", allow_module_level=True)


class Looking:
    """A page, what it asked for, and what it complained about."""

    def __init__(self, page: Any, server: Running) -> None:
        self.page, self.server = page, server
        self.complaints: list[str] = []
        self.asked: list[str] = []
        page.set_default_timeout(30_000)
        page.on("console", self.hear)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))

    def hear(self, message: Any) -> None:
        # Reading pixels back is what these tests do, not the page.
        if message.type in ("error", "warning") and "willReadFrequently" not in message.text:
            self.complaints.append(message.text)

    def open(self, state: str) -> None:
        self.page.goto("about:blank")
        self.page.goto(f"{self.server.origin}/studio/#{state}")
        self.page.wait_for_selector(".lab")

    def js(self, code: str, *values: Any) -> Any:
        """An expression on ``now``, what the open lab shows."""
        lab = self.page.url.partition("#")[2].partition("?")[0] or "time"
        return self.page.evaluate(
            f"async (given) => {{ const {{ now }} = await import('/studio/page/{lab}.js'); return {code}; }}",
            list(values),
        )

    def wait(self, code: str) -> None:
        """Until an expression on ``now`` is true."""
        for _ in range(300):
            if self.js(code):
                return
            self.page.wait_for_timeout(100)
        raise AssertionError(f"never: {code}; the page says {self.page.locator('#trouble').text_content()!r}")

    def pixels(self, selector: str) -> np.ndarray:
        """The grey values of a canvas."""
        code = """canvas => [canvas.width, canvas.height,
            Array.from(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data)]"""
        width, height, data = self.page.locator(selector).first.evaluate(code)
        return np.array(data).reshape(height, width, 4)[..., 0]

    def slide(self, selector: str, value: float) -> None:
        """Move a slider as a hand does: input events."""
        self.page.locator(selector).evaluate(
            "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input', {bubbles: true})); }",
            str(value),
        )


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as each:
        yield each


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def look(browser: Any, server: Running) -> Iterator[Looking]:
    """A page that has entered; afterwards it must have complained of nothing and asked nobody else."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    looking = Looking(context.new_page(), server)
    looking.page.goto(server.link)
    looking.page.wait_for_selector(".lab")
    yield looking
    assert looking.complaints == []
    assert all(url.startswith((server.origin, "data:", "blob:", "about:")) for url in looking.asked)
    context.close()


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
    assert look.asked[before:] == [] or all(url.endswith(".js") for url in look.asked[before:])


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
