"""``undiffuse serve``: models behind HTTP."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from ..errors import UndiffuseError
from .options import AnyPath, Precision, dtype_of

EXAMPLES = """
undiffuse serve runs/demo                    OpenAI's image API, port 8000
undiffuse serve runs/demo runs/mnist         two models, asked for by name
undiffuse serve runs/* --max-loaded 2        many, two of them in memory
undiffuse serve runs/demo --host 0.0.0.0     needs a key in $UNDIFFUSE_API_KEY
undiffuse serve runs/big --rows 16 --compile --precision bf16
"""

KEY = "UNDIFFUSE_API_KEY"


@dataclass(frozen=True)
class Served:
    """A server that has ended."""

    address: str
    models: tuple[str, ...]
    finished: int
    failed: int


def serve(
    models: Annotated[tuple[AnyPath, ...], tyro.conf.Positional],
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    rows: int | None = None,
    exact: bool = False,
    waiting: int = 64,
    seconds: float = 300.0,
    max_loaded: int | None = None,
    device: str = "auto",
    precision: Precision | None = None,
    compile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> Served:
    """Serve models over HTTP until Ctrl-C or SIGTERM; requests that run are finished first.

    Requests of different steps, solvers and guidance are answered together, one network call at a time. A model is
    asked for by the name of its folder; `runs/demo` is `demo`.

    Args:
        models: Run folders or model folders.
        host: The address to listen on; any but this machine's own needs a key.
        port: The port; 0 takes a free one.
        api_key: What clients must send; better set $UNDIFFUSE_API_KEY, which others cannot read from the list of
            processes.
        rows: Most rows of a network call, a guided sample taking two (default: as many as a probe finds to pay).
        exact: Fill every call up to --rows, so that on a CPU a picture is the same to the last bit whoever else is
            served (`undiffuse sample --rows N` makes it too); slower.
        waiting: Most requests that wait; one more is answered with 429.
        seconds: Until a request is given up, waiting included.
        max_loaded: Most models in memory at a time (default: all). A request for another waits until it is loaded in
            place of the one used longest ago.
        device: auto, cpu, cuda, mps.
        precision: Of the networks: float32 (the default), bf16 or fp16.
        compile: Compile the networks (torch.compile; CUDA graphs on a GPU) for calls of 1, 2, 4 ... up to --rows rows,
            or with --exact for --rows alone, before they are served: a minute or more for each.

    Raises:
        UndiffuseError: no such model, a public address without a key, a port in use, packages missing.
    """
    from ..pipeline import Pipeline, find_pipeline, resolve_device

    try:
        from ..serving.server import LOCAL, Limits, Service, server_of
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("undiffuse"):
            raise
        raise UndiffuseError(f"serving needs {error.name}: pip install 'undiffuse[serve]'") from None
    from ..serving.engine import Engine

    key = api_key or os.environ.get(KEY) or None
    local = host in LOCAL
    if not local and key is None:
        raise UndiffuseError(f"--host {host} is open to others: set a key in ${KEY} (or with --api-key)")
    if not models:
        raise UndiffuseError("name a model: undiffuse serve runs/NAME")
    if not 0 <= port < 65536 or waiting < 1 or not seconds > 0:
        raise UndiffuseError(f"--port {port} --waiting {waiting} --seconds {seconds:g}: out of range")
    if max_loaded is not None and max_loaded < 1:
        raise UndiffuseError(f"--max-loaded {max_loaded}: at least 1")
    if rows is not None and rows < 2:
        raise UndiffuseError(f"--rows {rows}: at least 2, since a guided sample takes two")
    folders = {name_of(Path(model)): Path(model) for model in models}
    if len(folders) < len(models):
        raise UndiffuseError("two of these models have the same name: serve them from folders of different names")
    for folder in folders.values():
        find_pipeline(folder)
    place = resolve_device(device)

    engine = Engine(rows=rows, waiting=waiting, exact=exact)

    def load(folder: Path) -> Pipeline:
        pipeline = Pipeline.load(folder, place, dtype=dtype_of(precision))
        return pipeline.compiled() if compile else pipeline

    sources = {name: partial(load, folder) for name, folder in folders.items()}
    service = Service(engine, sources, Limits(seconds=seconds), max_loaded)
    server, listening = server_of(service, host, port, key)
    address = f"http://{'127.0.0.1' if local else host}:{listening.getsockname()[1]}"
    print(f"serving    {', '.join(folders)} at {address}/v1 (Ctrl-C ends it)", flush=True)
    server.run(sockets=[listening])
    if service.trouble is not None:
        raise UndiffuseError(service.trouble)
    return Served(address, tuple(folders), engine.counters.finished, engine.counters.failed)


def report(served: Served) -> str:
    return f"served     {served.finished:,} jobs, {served.failed:,} failed"


def name_of(path: Path) -> str:
    """``runs/demo`` and ``runs/demo/model`` are ``demo``."""
    path = path.absolute()
    return path.parent.name if path.name == "model" and path.parent.name else path.name
