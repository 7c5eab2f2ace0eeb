"""How soon the studio shows its first picture, and how long a drag of the slider takes to be drawn.

    python benchmarks/studio.py [--out FILE.json]

The first picture is from opening the page, with the server and its model ready, to the first drawn frame. A drag is
from the slider's event to the end of drawing, in a real browser, without the browser's own composition.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from studio_page import CHROMIUM, running

DRAG = """async (lab) => {
    const { now } = await import(`/studio/page/${lab}.js`);
    const slider = document.getElementById(lab === 'time' ? 'time' : 'plane-time');
    const took = [];
    for (let i = 0; i <= 200; i++) {
        slider.value = String(5 * i);
        const begun = performance.now();
        slider.dispatchEvent(new Event('input', { bubbles: true }));
        took.push(performance.now() - begun);
        await new Promise(requestAnimationFrame);
    }
    return took;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if CHROMIUM is None:
        raise SystemExit("chromium is not installed")
    firsts: list[float] = []
    drags: dict[str, list[float]] = {}
    with running() as server, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for _ in range(5):
            page = browser.new_context().new_page()
            begun = time.perf_counter()
            page.goto(server.link)
            page.wait_for_selector(".lab")
            page.wait_for_selector(".sheet canvas")
            firsts.append(time.perf_counter() - begun)
            page.close()
        page = browser.new_context().new_page()
        page.goto(server.link)
        for lab in ("time", "plane"):
            page.goto("about:blank")
            page.goto(f"{server.origin}/studio/#{lab}")
            page.wait_for_selector(".lab")
            while not page.evaluate(f"import('/studio/page/{lab}.js').then(({{ now }}) => now.painted > 0)"):
                time.sleep(0.1)
            drags[lab] = page.evaluate(DRAG, lab)
        browser.close()
    load = os.getloadavg()[0]
    print(f"load {load:.1f} on {os.cpu_count()} cores")
    print(f"first picture         median {statistics.median(firsts):.2f} s, best {min(firsts):.2f} s, of {len(firsts)}")
    for lab, took in drags.items():
        print(f"drag in {lab:<8}      median {statistics.median(took):.1f} ms, 95 % {sorted(took)[190]:.1f} ms")
    medians = {lab: statistics.median(took) for lab, took in drags.items()}
    if options.out:
        numbers = {"load": load, "first_seconds": firsts, "drag_ms": medians}
        options.out.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
