"""The engine: many samplers, one network. A picture is a function of its request alone."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

import pytest
import torch
from torch import Tensor

from test_pipeline import pipeline
from undiffuse.editing import image_to_image
from undiffuse.errors import UndiffuseError
from undiffuse.pipeline import Pipeline
from undiffuse.serving.engine import Busy, Engine, Late, Request, probe
from undiffuse.solvers import SOLVERS

NAMES = [name for name, solver in SOLVERS.items() if name != "ddpm_learned" and not solver.adaptive]


def requests(model: Pipeline, count: int) -> list[Request]:
    return [
        Request(
            "m",
            model.settings(
                solver=NAMES[i % len(NAMES)],
                steps=2 + i % 4,
                guidance_scale=(1.0, 0.0, 2.5)[i % 3],
                guidance_interval=(0.1, 5.0) if i % 5 == 0 else None,
                threshold="static" if i % 4 == 0 else "none",
                noise="brownian" if i % 7 == 0 else "independent",
                reuse=1 + i % 3,
            ),
            samples=range(i, i + 1 + i % 2),
            seed=i,
            classes=[i % 10],
        )
        for i in range(count)
    ]


def alone(model: Pipeline, request: Request, rows: int | None = None) -> Tensor:
    return model.draw(request.samples, seed=request.seed, classes=request.classes, sampling=request.sampling, rows=rows)


@pytest.fixture
def model() -> Pipeline:
    return pipeline()


def test_law_6_a_sample_does_not_depend_on_who_else_is_served(model: Pipeline) -> None:
    """With a fixed number of rows to the bit; every solver, guided and not, joining and leaving at any call."""
    asked = requests(model, len(NAMES))
    with Engine({"m": model}, rows=4, exact=True, waiting=len(asked)) as engine:
        served = [job.future.result() for job in [engine.submit(request) for request in asked]]
        again = [engine.submit(request).future for request in reversed(asked)]
        backwards = [future.result() for future in reversed(again)]
    for request, one, other in zip(asked, served, backwards, strict=True):
        assert torch.equal(one, other), request.sampling
        assert torch.equal(one, alone(model, request, rows=4)), request.sampling


def test_without_fixed_rows_to_rounding(model: Pipeline) -> None:
    asked = requests(model, 24)
    with Engine({"m": model}, rows=8, waiting=64) as engine:
        jobs = [engine.submit(request) for request in asked]
        for request, job in zip(asked, jobs, strict=True):
            assert torch.allclose(job.future.result(), alone(model, request), atol=1e-3), request.sampling
        assert max(engine.counters.by_rows) > 1  # they were answered together
        assert engine.counters.calls < sum(request.sampling.steps for request in asked)


def test_trap_X9_thirty_two_at_once_are_as_one_after_the_other(model: Pipeline) -> None:
    asked = requests(model, 32)
    got: dict[int, Tensor] = {}
    with Engine({"m": model}, rows=16, exact=True) as engine:

        def client(i: int) -> None:
            got[i] = engine.run(asked[i])

        threads = [threading.Thread(target=client, args=(i,)) for i in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, request in enumerate(asked):
        assert torch.equal(got[i], alone(model, request, rows=16))


class Gate:
    """Holds the engine at the first frame of a request until it is opened."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, frame: object) -> None:
        self.reached.set()
        assert self.open.wait(30)


def test_SV1_a_full_queue_refuses_with_a_time_to_wait(model: Pipeline) -> None:
    gate = Gate()
    settings = model.settings(steps=2)
    with Engine({"m": model}, rows=2, waiting=1) as engine:
        first = engine.submit(Request("m", settings, samples=[0, 1], classes=[1], watch=gate))
        assert gate.reached.wait(30)
        second = engine.submit(Request("m", settings, samples=[0, 1], classes=[1]))
        with pytest.raises(Busy, match="waiting") as busy:
            engine.submit(Request("m", settings, classes=[1]))
        assert busy.value.seconds > 0
        gate.open.set()
        first.future.result(), second.future.result()
        assert engine.counters.rejected == 1
        assert engine.counters.received == engine.counters.finished == 2


def test_SV2_a_request_that_is_overdue_in_the_queue_is_never_computed(model: Pipeline) -> None:
    gate, watched = Gate(), []
    settings = model.settings(steps=2)
    with Engine({"m": model}, rows=2) as engine:
        first = engine.submit(Request("m", settings, samples=[0, 1], classes=[1], watch=gate))
        assert gate.reached.wait(30)
        late = engine.submit(Request("m", settings, samples=[0, 1], classes=[1], seconds=0.01, watch=watched.append))
        time.sleep(0.02)
        gate.open.set()
        with pytest.raises(Late):
            late.future.result()
        first.future.result()
        assert not watched
        assert engine.counters.late == 1


def test_SV3_a_client_that_leaves_stops_its_work_and_nobody_else(model: Pipeline) -> None:
    settings = model.settings(steps=50)
    with Engine({"m": model}, rows=8, exact=True) as engine:
        seen: list[int] = []
        leaving = Request("m", settings, classes=[1], watch=lambda frame: (seen.append(frame.index), job.cancel()))
        gate = Gate()
        staying = engine.submit(Request("m", model.settings(steps=5), seed=3, classes=[2], watch=gate))
        assert gate.reached.wait(30)
        job = engine.submit(leaving)
        gate.open.set()
        with pytest.raises(CancelledError):
            job.future.result()
        assert max(seen) <= 1  # at most the step in progress
        expected = model.draw([0], seed=3, classes=[2], sampling=model.settings(steps=5), rows=8)
        assert torch.equal(staying.future.result(), expected)
        assert engine.counters.cancelled == 1


def test_one_bad_request_fails_by_itself(model: Pipeline) -> None:
    settings = model.settings(steps=4)

    def explode(frame: object) -> None:
        raise ValueError("whoever watches")

    with Engine({"m": model}, rows=8, exact=True) as engine:
        good = engine.submit(Request("m", settings, classes=[1]))
        bad = engine.submit(Request("m", settings, classes=[1], watch=explode))
        with pytest.raises(ValueError, match="whoever"):
            bad.future.result()
        assert torch.equal(good.future.result(), model.draw(1, classes=[1], sampling=settings, rows=8))
        # and the engine goes on
        assert torch.equal(engine.run(Request("m", settings, classes=[1])), good.future.result())
        assert engine.counters.failed == 1


def test_a_network_call_that_fails_is_made_again_one_by_one(model: Pipeline) -> None:
    network, sizes = model.denoiser.network, []

    def small(module: object, inputs: tuple[Tensor, Tensor]) -> None:
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > 1:
            raise torch.OutOfMemoryError("no memory for two")

    gate = Gate()
    settings = model.settings(steps=4, guidance_scale=1.0, reuse=2)  # who asks again reuses what it would have
    asked = [Request("m", settings, classes=[1], watch=gate), *(Request("m", settings, seed=s) for s in (1, 2))]
    with Engine({"m": model}, rows=8) as engine:
        hook = network.register_forward_pre_hook(small)
        jobs = [engine.submit(asked[0])]
        assert gate.reached.wait(30)
        jobs += [engine.submit(request) for request in asked[1:]]
        gate.open.set()
        results = [job.future.result() for job in jobs]
    hook.remove()
    assert max(sizes) > 1
    for request, x in zip(asked, results, strict=True):
        torch.testing.assert_close(x, alone(model, request), rtol=0, atol=1e-4)


def test_several_models_are_never_mixed(model: Pipeline) -> None:
    other = pipeline()
    with torch.no_grad():
        for parameter in other.denoiser.parameters():
            parameter.mul_(1.5).add_(0.01)
    settings = model.settings(steps=3)
    with Engine({"a": model, "b": other}, rows=4, exact=True) as engine:
        jobs = [engine.submit(Request("ab"[i % 2], settings, seed=i, classes=[i])) for i in range(8)]
        for i, job in enumerate(jobs):
            expected = (model, other)[i % 2].draw(1, seed=i, classes=[i], sampling=settings, rows=4)
            assert torch.equal(job.future.result(), expected)


def test_image_to_image_and_inpainting_are_the_chapter_on_editing(model: Pipeline) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, *model.spec.shape, generator=generator) * 2 - 1
    keep = torch.rand(1, *model.spec.shape, generator=generator) < 0.5
    settings = model.settings(solver="heun", steps=4, guidance_scale=2.0)
    with Engine({"m": model}, rows=8, exact=True) as engine:
        edited = engine.run(Request("m", settings, classes=[1], image=image, strength=0.6))
        filled = engine.run(Request("m", settings, classes=[1], image=image, keep=keep))
    expected = image_to_image(
        model.denoise(model.conditions([0], [1]), settings, rows=8),
        model.config.schedule,
        image,
        0.6,
        steps=4,
        solver=settings.solver,
        grid=settings.grid,
    )
    assert torch.equal(edited, expected)
    assert torch.equal(filled[keep], image[keep])  # trap X10
    assert not torch.equal(filled, image)


def test_guidance_may_lead_away_from_a_class(model: Pipeline) -> None:
    """At scale 2 away from class 3: 2 cond - class 3, in every estimate of a one-step sample."""
    settings = model.settings(solver="euler", steps=1, guidance_scale=2.0)
    with Engine({"m": model}, rows=4) as engine:
        got = engine.run(Request("m", settings, classes=[1], against={"classes": [3]}))
    one, three = (
        model.draw(1, classes=[c], sampling=model.settings(solver="euler", steps=1, guidance_scale=1.0)) for c in (1, 3)
    )
    assert torch.allclose(got, 2 * one - three, atol=1e-4)


def test_what_cannot_be_served_is_refused_before_it_waits(model: Pipeline) -> None:
    settings = model.settings()
    image = torch.zeros(1, *model.spec.shape)
    with Engine({"m": model}, rows=4) as engine:
        for request, message in (
            (Request("n", settings), "unknown model"),
            (Request("m", settings, samples=[]), "no samples"),
            (Request("m", settings, samples=range(5)), "at most"),
            (Request("m", settings, keep=image > 0), "mask"),
            (Request("m", settings, image=image, strength=-1.0), "strength"),
            (Request("m", settings, image=image, strength=float("nan")), "strength"),
            (Request("m", settings, classes=[77]), "class 77"),
        ):
            with pytest.raises(UndiffuseError, match=message):
                engine.submit(request)
        assert engine.counters.received == 0


def test_SV11_closing_finishes_what_is_there_and_refuses_the_rest(model: Pipeline) -> None:
    engine = Engine({"m": model}, rows=4)
    jobs = [engine.submit(Request("m", model.settings(steps=10), seed=s, classes=[1])) for s in range(4)]
    engine.close(30.0)
    assert all(job.future.done() and job.future.result() is not None for job in jobs)
    with pytest.raises(Busy):
        engine.submit(Request("m", model.settings(), classes=[1]))


def test_SV11_closing_without_time_cancels(model: Pipeline) -> None:
    gate = Gate()
    engine = Engine({"m": model}, rows=4)
    job = engine.submit(Request("m", model.settings(steps=1000), classes=[1], watch=gate))
    assert gate.reached.wait(30)
    closing = threading.Thread(target=engine.close, args=(0.0,))
    closing.start()
    gate.open.set()
    closing.join(30)
    assert not closing.is_alive()
    with pytest.raises(CancelledError):
        job.future.result()


def test_SV16_counters_reconcile(model: Pipeline) -> None:
    with Engine({"m": model}, rows=4, waiting=3) as engine:
        asked = rejected = 0
        jobs = []
        for s in range(12):
            asked += 1
            try:
                jobs.append(engine.submit(Request("m", model.settings(steps=3), seed=s, classes=[1])))
            except Busy:
                rejected += 1
            if s % 4 == 0 and jobs:
                jobs[-1].cancel()
        for job in jobs:
            job.future.exception() if not job.cancelled else None
    c = engine.counters
    assert c.rejected == rejected
    assert c.received + c.rejected == asked
    assert c.received == c.finished + c.failed + c.cancelled + c.late
    assert c.rows == sum(rows * calls for rows, calls in c.by_rows.items())


def test_the_probe_stays_in_bounds(model: Pipeline) -> None:
    rows, seconds = probe(model, most=8, repeats=1)
    assert rows in (2, 4, 8)
    assert seconds > 0


def test_the_probe_does_not_look_at_the_clock_on_a_cpu(model: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where others compute, the clock says that small batches are best: long calls are those interrupted."""
    with monkeypatch.context() as patched:
        patched.setattr(time, "perf_counter", lambda: pytest.fail("the clock"))
        rows, seconds = probe(model, most=4, repeats=1)
    assert rows in (2, 4)
    assert seconds > 0
