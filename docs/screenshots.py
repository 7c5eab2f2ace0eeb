"""Takes the pictures of the studio for these pages: a studio is started, and a real browser looks at it.

    python docs/screenshots.py [NAME...]

Needs chromium and playwright (both are there where the tests of the page run).
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import undiffuse  # noqa: E402
from studio_page import CHROMIUM, Running, running  # noqa: E402
from undiffuse.studio.app import MODEL  # noqa: E402

FOLDER = ROOT / "docs" / "images"
PROMPT = "a small red circle left of a large blue square"
WORDS = Path("runs/shapes/model")
"""Of `undiffuse train shapes --recipe text`, which takes longer than all pictures: without it that one stays."""
ENLARGE = Path("runs/enlarge/model")
"""Of `undiffuse train digits --steps 300 --set model.beside=smaller --set model.beside.factor=2 --out runs/enlarge`."""


@dataclass(frozen=True)
class Shot:
    """One picture: which state, on which screen, and what must be there before it is taken."""

    state: str
    width: int = 1280
    height: int = 860
    scheme: str = "light"
    clicks: tuple[str, ...] = ()
    ready: str = "now.painted"
    hover: str | None = None
    model: Path = MODEL


SHOTS = {
    "studio": Shot("time?t=0.25&i=3&seed=7", height=740),
    "studio_branch": Shot(
        "time?t=0.2&i=3&seed=7&branch=7&bclass=8&bscale=3", height=1010, scheme="dark", ready="now.branch"
    ),
    "studio_solvers": Shot("solvers?calls=5&asolver=euler&bsolver=dpmpp_2m&schedule=cosine&points=12", height=960),
    "studio_guidance": Shot("guidance?classes=3&seed=2", height=1010),
    "studio_words": Shot(
        f"guidance?prompt={PROMPT.replace(' ', '+')}&scale=4&seed=2&i=1&steps=12",
        height=1150,
        scheme="dark",
        ready="now.told",
        hover="[aria-label='The words of the prompt'] button:nth-child(3)",
        model=WORDS,
    ),
    "studio_beside": Shot("time?t=0&beside=3&scale=1.25&seed=7&i=2", height=760, model=ENLARGE),
    "studio_plane": Shot(
        "plane?cloud=moons&pt=0.25&updates=1500",
        height=830,
        scheme="dark",
        clicks=("#train",),
        ready="now.learned && now.learned.finished",
    ),
    "studio_walk": Shot("walk?wclass=3&corners=3,8,11,20&u=0.5&v=0.5", height=860),
    "studio_runs": Shot("runs", height=930, ready="now.painted && now.lights"),
    "studio_phone": Shot("time?t=0.35&i=3&seed=7", width=390, height=844),
}
COLOURS = 256
"""Of a saved picture: they are few, and the files stay small."""


def take(page: Page, server: Running, shot: Shot) -> Image.Image:
    page.set_viewport_size({"width": shot.width, "height": shot.height})
    page.emulate_media(color_scheme="dark" if shot.scheme == "dark" else "light")
    page.goto("about:blank")
    page.goto(f"{server.origin}/studio/#{shot.state}")
    page.wait_for_selector(".lab")

    def wait(code: str) -> None:
        lab = shot.state.partition("?")[0]
        for _ in range(1500):
            if page.evaluate(
                f"async () => {{ const {{ now }} = await import('/studio/page/{lab}.js'); return !!({code}); }}"
            ):
                return
            time.sleep(0.1)
        raise SystemExit(f"{shot.state}: never {code}")

    wait("now.painted")
    for selector in shot.clicks:
        page.click(selector)
    wait(shot.ready)
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    if shot.hover is not None:
        page.hover(shot.hover)
    time.sleep(1)
    return Image.open(BytesIO(page.screenshot()))


def main(names: list[str]) -> None:
    if CHROMIUM is None:
        raise SystemExit("chromium is not installed")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        runs = {}
        if "studio_runs" in names:
            for seed in (0, 1):
                name = f"digits-{seed}"
                changes = ("training.evaluate_every=10", "training.preview_every=40", "training.log_every=4")
                undiffuse.train("digits", out=Path(folder) / name, images=160 * 128, seed=seed, set=changes)
                runs[name] = Path(folder) / name
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for model in dict.fromkeys(SHOTS[name].model for name in names):
            if not model.is_dir():
                print(f"there is no {model}: its pictures stay as they are")
                continue
            with running({model.parent.name if model != MODEL else "digits": model}, runs=runs) as server:
                page = browser.new_context(device_scale_factor=1.25).new_page()
                page.set_default_timeout(120_000)
                page.goto(server.link)
                page.wait_for_selector(".lab")
                for name in names:
                    shot = SHOTS[name]
                    if name == "studio_runs":
                        shot = replace(shot, state="runs?runs=" + "|".join(runs))
                    if shot.model != model:
                        continue
                    picture = take(page, server, shot).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
                    picture.save(FOLDER / f"{name}.png", optimize=True)
                    print(f"{name}.png  {(FOLDER / f'{name}.png').stat().st_size / 1000:.0f} kB", flush=True)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:] or list(SHOTS))
