"""A studio of the models that a module makes, and a browser that looks at it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from undiffuse.pipeline import Pipeline

if TYPE_CHECKING:  # needs what a module that cannot have it skips for
    from studio_page import Looking, Running


@pytest.fixture(scope="module")
def server(models: dict[str, Pipeline], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    from studio_page import running

    folder = tmp_path_factory.mktemp("models")
    with running({name: model.save(folder / name) for name, model in models.items()}) as each:
        yield each


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    from studio_page import CHROMIUM

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def look(browser: Any, server: Running) -> Iterator[Looking]:
    """A page that has entered; afterwards it must have complained of nothing and asked nobody else."""
    from studio_page import Looking

    context = browser.new_context(viewport={"width": 1280, "height": 900})
    looking = Looking(context.new_page(), server)
    looking.page.goto(server.link)
    looking.page.wait_for_selector(".lab")
    yield looking
    assert looking.complaints == []
    assert all(url.startswith((server.origin, "data:", "blob:", "about:")) for url in looking.asked)
    context.close()
