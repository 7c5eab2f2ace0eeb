"""``undiffuse studio``: a page where a model's noise becomes data and every knob is live."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from ..errors import UndiffuseError
from .options import AnyPath

EXAMPLES = """
undiffuse studio                   a small model of digits that comes along
undiffuse studio runs/demo         your model; its curves too
undiffuse studio runs/a runs/b     both, side by side
undiffuse studio --no-browser --port 8123      only print the link
"""


@dataclass(frozen=True)
class Closed:
    """A studio that has been closed."""

    address: str
    models: tuple[str, ...]
    runs: tuple[str, ...]


def studio(
    models: Annotated[tuple[AnyPath, ...], tyro.conf.Positional] = (),
    port: int = 0,
    no_browser: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    device: str = "auto",
) -> Closed:
    """Open the studio in the browser, until Ctrl-C.

    Time both ways, schedules and solvers, guidance, learning in the plane, runs in progress, and walks between noises.
    The page is served by this machine to this machine alone, and loads nothing from anywhere else. Only the link that
    is printed opens it.

    Args:
        models: Run folders and model folders; without one, a small model of handwritten digits. A run without a model
            yet shows its curves.
        port: The port; 0 takes a free one.
        no_browser: Print the link and open nothing.
        device: auto, cpu, cuda, mps.

    Raises:
        UndiffuseError: no such folder, a port in use, packages missing.
    """
    from ..pipeline import Pipeline, find_pipeline, resolve_device
    from .ls import is_run
    from .serve import name_of

    try:
        from ..serving.server import Limits, Service, server_of
        from ..studio.app import MODEL, Studio, routes
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("undiffuse"):
            raise
        raise UndiffuseError(f"the studio needs {error.name}: pip install 'undiffuse[serve]'") from None
    from ..serving.engine import Engine
    from ..studio.runs import Runs

    if not 0 <= port < 65536:
        raise UndiffuseError(f"--port {port}: a port is a number from 0 to 65535")
    folders: dict[str, Path] = {}
    runs: dict[str, Path] = {}
    for given in map(Path, models):
        name = name_of(given)
        if name in folders or name in runs:
            raise UndiffuseError(f"{given}: two of these folders have the name {name}: rename one")
        if is_run(given):
            runs[name] = given
        if not is_run(given) or (given / "model" / "pipeline.json").is_file():
            folders[name] = find_pipeline(given)
    if not folders:
        folders["digits"] = MODEL
    place = resolve_device(device)

    sources = {name: partial(Pipeline.load, folder, place) for name, folder in folders.items()}
    service = Service(Engine(rows=32), sources, Limits(json=20_000_000))  # pictures come in JSON
    page = Studio(service, folders, Runs(runs))
    server, listening = server_of(service, "127.0.0.1", port, None, routes(page))
    server.config.timeout_graceful_shutdown = 2  # nobody waits for more
    address = f"http://127.0.0.1:{listening.getsockname()[1]}/studio/"
    link = f"{address}#token={page.token}"
    print(f"studio     {link}\n           (Ctrl-C ends it)", flush=True)
    if not no_browser:
        import threading
        import webbrowser

        threading.Timer(0.3, webbrowser.open, [link]).start()
    with closing(page):
        server.run(sockets=[listening])
    if service.trouble is not None:
        raise UndiffuseError(service.trouble)
    return Closed(address, tuple(folders), tuple(runs))


def report(closed: Closed) -> str:
    return f"closed     {closed.address}"
