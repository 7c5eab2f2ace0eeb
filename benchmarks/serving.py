"""What batching at the level of network calls gains: one list of requests, served in three ways.

    python benchmarks/serving.py [MODEL] [--clients N] [--requests N] [--rounds N] [--overload SECONDS]
                                 [--soak SECONDS] [--out FILE]

Every client sends its next request when the last is answered; the requests differ in steps (5 to 50), solver and
guidance. *engine*: ``undiffuse serve``, over HTTP on this machine. *lock*: one request at a time, as diffusers' own
guide to serving does it. *equal*: requests that wait and are equal in all but seed and class are sampled together, as
servers that batch whole requests do it. The last two call the pipeline directly, without HTTP, which is to their
advantage. They alternate; ratios are medians over rounds. Then requests one at a time, against sampling without a
server; then ten times as many as the server can answer, at a fixed rate, whoever is still waiting.

With --soak SECONDS nothing but that: one client sends requests of all kinds, wrong ones and ones that it leaves among
them, at a modest rate, and the memory of the server is read every ten seconds.

Without MODEL a network of the size of the demo's with random weights is served: what it draws has no part in the time.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image

from undiffuse import open_dataset
from undiffuse.pipeline import Pipeline
from undiffuse.training import Trainer, make_recipe

WAYS = ("euler", "heun", "dpmpp_2m", "unipc_3", "ipndm_3")


@dataclass(frozen=True)
class Ask:
    steps: int
    solver: str
    guidance: float
    seed: int
    label: int

    @property
    def body(self) -> dict[str, Any]:
        how = {"num_inference_steps": self.steps, "solver": self.solver, "guidance_scale": self.guidance}
        return {**how, "seed": self.seed, "class_labels": self.label}

    @property
    def kind(self) -> tuple[int, str, float]:
        return self.steps, self.solver, self.guidance


def requests(count: int, classes: int, seed: int = 0) -> list[Ask]:
    source = random.Random(seed)
    return [
        Ask(
            source.choice((5, 8, 10, 15, 20, 25, 30, 40, 50)),
            source.choice(WAYS),
            source.choice((1.0, 1.5, 3.0)),
            number,
            source.randrange(classes),
        )
        for number in range(count)
    ]


# --- three servers ----------------------------------------------------------------------------------------------------


def locked(pipeline: Pipeline) -> Callable[[Ask], None]:
    lock = threading.Lock()

    def serve(ask: Ask) -> None:
        with lock:
            draw(pipeline, [ask])

    return serve


def draw(pipeline: Pipeline, asks: list[Ask]) -> None:
    """Together: their seeds and classes differ, the settings do not."""
    first = asks[0]
    sampling = pipeline.settings(steps=first.steps, solver=first.solver, guidance_scale=first.guidance)
    labels = [ask.label for ask in asks]
    pipeline.draw(len(asks), seed=first.seed, classes=labels, sampling=sampling)


class Equal:
    """The oldest that waits, and those that wait and are of its kind, at most ``rows`` rows."""

    def __init__(self, pipeline: Pipeline, rows: int) -> None:
        self.pipeline, self.rows = pipeline, rows
        self.waiting: deque[tuple[Ask, Future[None]]] = deque()
        self.changed = threading.Condition()
        threading.Thread(target=self.work, daemon=True).start()

    def __call__(self, ask: Ask) -> None:
        done: Future[None] = Future()
        with self.changed:
            self.waiting.append((ask, done))
            self.changed.notify()
        done.result()

    def work(self) -> None:
        while True:
            with self.changed:
                while not self.waiting:
                    self.changed.wait()
                kind = self.waiting[0][0].kind
                most = max(1, self.rows // (1 if kind[2] == 1 else 2))
                batch = [pair for pair in self.waiting if pair[0].kind == kind][:most]
                for pair in batch:
                    self.waiting.remove(pair)
            draw(self.pipeline, [ask for ask, _ in batch])
            for _, done in batch:
                done.set_result(None)


class Served:
    """``undiffuse serve`` in a process of its own."""

    def __init__(self, port: int, process: int = 0) -> None:
        self.port, self.process = port, process
        self.local = threading.local()

    def __call__(self, ask: Ask) -> None:
        status, _ = self.ask(ask)
        assert status == 200, status

    def ask(self, ask: Ask, timeout: float = 600) -> tuple[int, str | None]:
        """Status and Retry-After."""
        if not hasattr(self.local, "connection"):
            self.local.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        connection = self.local.connection
        connection.request("POST", "/v1/images/generations", json.dumps(ask.body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        return response.status, response.headers["Retry-After"]

    def metrics(self) -> dict[str, float]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


@contextmanager
def server(model: Path, *options: str) -> Iterator[Served]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "undiffuse", "serve", str(model), "--port", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        served = Served(port, process.pid)
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                connection.request("GET", "/v2/health/ready")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                pass
            assert process.poll() is None, "the server has ended"
            time.sleep(0.1)
        yield served
    finally:
        process.terminate()
        process.wait(30)


# --- load -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    rate: float  # requests a second
    p50: float  # seconds
    p99: float
    cpu: float  # seconds of computation by whoever serves, HTTP included


def closed(serve: Callable[[Ask], None], asks: list[Ask], clients: int) -> Outcome:
    """Each client sends its next request when the last is answered."""
    todo, lock, times = iter(asks), threading.Lock(), []

    def client() -> None:
        while True:
            with lock:
                ask = next(todo, None)
            if ask is None:
                return
            begun = time.perf_counter()
            serve(ask)
            times.append(time.perf_counter() - begun)

    def computed() -> float:
        if not isinstance(serve, Served):
            return time.process_time()
        fields = Path(f"/proc/{serve.process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    threads = [threading.Thread(target=client) for _ in range(clients)]
    begun, before = time.perf_counter(), computed()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - begun
    return Outcome(len(asks) / took, *quantiles(times), computed() - before)


def quantiles(times: list[float]) -> tuple[float, float]:
    ordered = sorted(times)
    return median(ordered), ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


def overload(served: Served, asks: list[Ask], rate: float, seconds: float) -> dict[str, Any]:
    """Requests at a fixed rate, each on a thread of its own, whether or not others are still waiting."""
    before = served.metrics()
    answers: list[tuple[int | str, float, str | None]] = []

    def one(ask: Ask) -> None:
        begun = time.perf_counter()
        try:
            status, retry = Served(served.port).ask(ask)
        except OSError as error:
            status, retry = type(error).__name__, None
        answers.append((status, time.perf_counter() - begun, retry))

    threads, begun = [], time.perf_counter()
    for number in range(int(rate * seconds)):
        time.sleep(max(0.0, begun + number / rate - time.perf_counter()))
        threads.append(threading.Thread(target=one, args=(asks[number % len(asks)],)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    took, after = time.perf_counter() - begun, served.metrics()
    good = [seconds for status, seconds, _ in answers if status == 200]
    shed = [(seconds, retry) for status, seconds, retry in answers if status == 429]
    ends = sum(after[f'undiffuse_jobs_total{{end="{end}"}}'] for end in ("finished", "failed", "cancelled", "late"))
    return {
        "asked": len(answers),
        "asked_per_s": round(rate, 1),
        "statuses": {str(status): count for status, count in Counter(status for status, _, _ in answers).items()},
        "goodput_per_s": round(len(good) / took, 2),
        "accepted_p99_s": round(quantiles(good)[1], 2),
        "shed_p99_s": round(quantiles([seconds for seconds, _ in shed])[1], 3) if shed else None,
        "retry_after": sorted({int(retry or 0) for _, retry in shed}),
        "counters_reconcile": after["undiffuse_jobs_received_total"] == ends
        and after["undiffuse_requests_total"] - before["undiffuse_requests_total"] == len(answers) + 1,
    }


def soak(served: Served, seconds: float, pause: float = 0.3) -> dict[str, Any]:
    """Requests of all kinds one after another, with a pause after each."""
    source = random.Random(0)
    buffer = BytesIO()
    Image.new("L", (8, 8), 128).save(buffer, "PNG")
    head = b'--edge\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    fields = [(b"prompt", b"", b"3"), (b"strength", b"", b"0.5"), (b"image", b'; filename="x.png"', buffer.getvalue())]
    body = b"".join(head % each for each in fields) + b"--edge--\r\n"
    statuses: Counter[int | str] = Counter()
    memory: list[float] = []
    begun = time.monotonic()
    while (now := time.monotonic() - begun) < seconds:
        if now >= 10 * len(memory):
            pages = int(Path(f"/proc/{served.process}/statm").read_text().split()[1])
            memory.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
        how = {"num_inference_steps": source.choice((2, 5, 9)), "solver": source.choice(WAYS), "prompt": "1"}
        kind = source.choice(("picture", "several", "stream", "array", "edit", "wrong", "left"))
        more: dict[str, Any] = {
            "several": {"n": 5, "guidance_scale": 3.0},
            "stream": {"stream": True, "partial_images": 2},
            "wrong": {"solver": "none such"},
            "left": {"num_inference_steps": 200},
        }.get(kind, {})
        path = {"array": "/v1/samples", "edit": "/v1/images/edits"}.get(kind, "/v1/images/generations")
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
        if kind == "edit":
            connection.request("POST", path, body, {"Content-Type": "multipart/form-data; boundary=edge"})
        else:
            connection.request("POST", path, json.dumps({**how, **more}), {"Content-Type": "application/json"})
        if kind != "left":
            response = connection.getresponse()
            response.read()
            kind = f"{kind} {response.status}"
        statuses[kind] += 1
        connection.close()
        time.sleep(pause)
    done = sum(statuses.values())
    warm = memory[min(6, len(memory) - 1)]  # after a minute
    return {
        "seconds": round(seconds),
        "requests": done,
        "answers": dict(sorted(statuses.items())),
        "memory_mb": [round(mb, 1) for mb in memory],
        "growth_mb_after_a_minute": round(memory[-1] - warm, 2),
        "growth_mb_in_a_thousand": round(1000 * (memory[-1] - warm) / done, 2),
    }


def untrained(folder: Path) -> Path:
    dataset = open_dataset("digits")
    recipe = make_recipe("digits", dataset.spec, len(dataset))
    pipeline = Trainer(dataset, recipe).pipeline()
    return pipeline.save(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--overload", type=float, default=10.0, help="seconds; 0: none")
    parser.add_argument("--soak", type=float, default=0.0, help="seconds; nothing else is measured then")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    folder = tempfile.TemporaryDirectory()
    model = options.model or untrained(Path(folder.name) / "untrained")
    pipeline = Pipeline.load(model)
    if options.soak:
        with server(model) as served:
            found = soak(served, options.soak)
        print(json.dumps(found, indent=2))
        if options.out:
            options.out.write_text(json.dumps(found, indent=2) + "\n")
        return
    asks = requests(options.requests, len(pipeline.spec.classes))
    with server(model) as served:
        from undiffuse.serving.engine import probe

        rows = probe(pipeline)[0]
        ways = {"engine": served, "lock": locked(pipeline), "equal": Equal(pipeline, rows)}
        for serve in ways.values():
            closed(serve, asks[:4], 2)
        rounds = []
        for _ in range(options.rounds):
            rounds.append({name: closed(serve, asks, options.clients) for name, serve in ways.items()})
        load = os.getloadavg()[0]
        alone = [Ask(10, "dpmpp_2m", 1.0, seed, 0) for seed in range(40)]
        pairs = [(closed(served, [ask], 1).p50, closed(ways["lock"], [ask], 1).p50) for ask in alone]
        single = {
            "served_ms": round(1e3 * median(pair[0] for pair in pairs), 2),
            "sampled_ms": round(1e3 * median(pair[1] for pair in pairs), 2),
            "ratio": round(median(pair[0] / pair[1] for pair in pairs), 2),
        }
        rate = 10 * median(each["engine"].rate for each in rounds)
        flood = overload(served, asks, rate, options.overload) if options.overload else None
    result: dict[str, Any] = {"model": model.name, "clients": options.clients, "requests": options.requests}
    result |= {"rows": rows, "threads": torch.get_num_threads(), "load": round(load, 2), "ways": {}}

    print(
        f"{options.clients} clients, {options.requests} requests, {options.rounds} rounds, {rows} rows a call, ", end=""
    )
    print(f"{torch.get_num_threads()} threads, load average {load:.2f}")

    print(
        f"{'':<8}{'requests/s':>12}{'p50 s':>9}{'p99 s':>9}{'CPU s':>9}"
        + f"{'engine is':>12}{'its p99 is':>12}{'its CPU is':>12}"
    )
    for name in ways:
        outcomes = [each[name] for each in rounds]
        gain = median(each["engine"].rate / each[name].rate for each in rounds)
        tail = median(each["engine"].p99 / each[name].p99 for each in rounds)
        spent = median(each["engine"].cpu / each[name].cpu for each in rounds)
        whats = ("rate", "p50", "p99", "cpu")
        row = [median(getattr(outcome, what) for outcome in outcomes) for what in whats]
        ratios = {"gain": gain, "p99_ratio": tail, "cpu_ratio": spent}
        result["ways"][name] = dict(zip(whats, row, strict=True)) | ratios
        numbers = "".join(f"{number:>9.2f}" for number in row[1:])
        print(f"{name:<8}{row[0]:>12.2f}{numbers}{gain:>11.2f}x{tail:>11.2f}x{spent:>11.2f}x")
    print(f"one at a time: {single['served_ms']} ms served, {single['sampled_ms']} ms sampled, ratio {single['ratio']}")
    print(f"overload: {flood}")
    if options.out:
        options.out.write_text(json.dumps({**result, "single": single, "overload": flood}, indent=2) + "\n")


if __name__ == "__main__":
    main()
