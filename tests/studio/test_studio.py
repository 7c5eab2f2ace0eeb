"""The studio's computations are the package's own, and nobody but its page may ask for them."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("uvicorn", reason="needs undiffuse[serve]")
pytest.importorskip("fastapi", reason="needs undiffuse[serve]")

from laws import Mixture, normal, tensor
from studio_page import Running, make_run, running
from undiffuse import SCHEDULES, SOLVERS, Streams, trajectory
from undiffuse.commands.studio import studio as studio_verb
from undiffuse.errors import UndiffuseError
from undiffuse.pipeline import Pipeline
from undiffuse.studio import labs, plane
from undiffuse.studio.app import CHAPTERS, MODEL, PAGE, chapter, examples

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "'\"><svg/onload=alert(1)>",
    "javascript:alert(1)",
    "</title><script>alert(1)</script>",
    "{{7*7}}${7*7}",
    "a\u202eb\u0000c",
    "--help; $(touch pwned) `id` | x",
]


@pytest.fixture(scope="module")
def model() -> Pipeline:
    return Pipeline.load(MODEL)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(runs={"a run": make_run(tmp_path_factory.mktemp("runs") / "a run")}) as each:
        yield each


# --- what the labs compute --------------------------------------------------------------------------------------------


def ask(model: Pipeline, n: int = 3, **settings: Any) -> labs.Ask:
    return labs.Ask(model.settings(steps=6, **settings), range(n), 4, {"classes": [2, 7]})


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m", "ddpm"])
def test_a_trace_is_the_pipelines_own_trajectory(model: Pipeline, solver: str) -> None:
    wanted = list(model.frames(3, seed=4, classes=[2, 7], sampling=model.settings(steps=6, solver=solver)))
    (trace,) = labs.run(model, [labs.begin(model, ask(model, solver=solver))])
    assert torch.equal(trace.x, torch.stack([frame.x for frame in wanted]))
    assert trace.calls == wanted[-1].calls
    for f, level in enumerate(trace.levels[:-1]):  # the estimate shown at x explains that x
        assert torch.allclose(level.mix(trace.x0[f], trace.eps[f]), trace.x[f], atol=1e-5)
    assert torch.equal(trace.x0[-1], trace.x[-1])


def test_walks_side_by_side_are_what_they_are_alone(model: Pipeline) -> None:
    asks = [ask(model, solver="heun"), ask(model, solver="euler", guidance_scale=3.0)]
    both = labs.run(model, [labs.begin(model, each) for each in asks])
    for each, together in zip(asks, both, strict=True):
        (alone,) = labs.run(model, [labs.begin(model, each)])
        assert torch.allclose(alone.x, together.x, atol=1e-4)
    scales = labs.strip(model, ask(model), [0.0, 1.0, 3.0])
    for scale, x in zip((0.0, 1.0, 3.0), scales, strict=True):
        wanted = model.draw(3, seed=4, classes=[2, 7], sampling=model.settings(steps=6, guidance_scale=scale))
        assert torch.allclose(x, wanted, atol=1e-4)


@pytest.mark.parametrize("solver", ["euler", "ddpm"])  # the second draws noise at every step
def test_a_branch_that_changes_nothing_is_the_way_itself(model: Pipeline, solver: str) -> None:
    asked = ask(model, solver=solver)
    (base,) = labs.run(model, [labs.begin(model, asked)])
    same = labs.branch(model, base, 2, asked, fresh=False)
    assert torch.allclose(same.x, base.x[2:], atol=1e-5)
    fresh = labs.branch(model, base, 2, replace(asked, seed=9), fresh=True)
    level = base.levels[2]
    noise = (fresh.x[0] - float(level.alpha) * base.x0[2]) / float(level.sigma)
    assert abs(float(noise.square().mean()) - 1) < 0.3  # what is believed is kept, the noise is new
    with pytest.raises(UndiffuseError, match="frame 0 to 5"):
        labs.branch(model, base, 6, asked, fresh=False)


def test_no_noise_is_drawn_twice_wherever_a_walk_begins(model: Pipeline) -> None:
    """A solver that draws noise goes on in the stream of its sample, as Pipeline.sample does."""
    asked = ask(model, solver="ddpm")
    image = torch.rand(1, 1, 8, 8) * 2 - 1
    (noised,) = labs.run(model, [labs.begin(model, asked, image, 0.6)])
    wanted = model.draw(3, seed=4, classes=[2, 7], sampling=asked.sampling, image=image, strength=0.6)
    assert torch.allclose(noised.x[-1], wanted, atol=1e-5)
    one = replace(asked, cond={"classes": [2]})
    corner = labs.between(model, one, [4, 1, 2, 3], columns=2, rows=2, down=None)[0]
    assert torch.allclose(corner, model.draw(1, seed=4, classes=[2], sampling=asked.sampling)[0], atol=1e-5)
    alike = labs.between(model, one, [4, 4, 4, 4], columns=3, rows=2, down=None)
    assert torch.allclose(alike, alike[:1].expand_as(alike), atol=1e-5)  # neighbours differ by where they begin alone
    brownian = model.settings(solver="ddpm", steps=6, noise="brownian")
    (trace,) = labs.run(model, [labs.begin(model, replace(asked, sampling=brownian))])
    assert torch.allclose(trace.x[-1], model.draw(3, seed=4, classes=[2, 7], sampling=brownian), atol=1e-5)
    (base,) = labs.run(model, [labs.begin(model, asked)])
    fresh = labs.branch(model, base, 2, replace(asked, seed=9), fresh=True)
    noise = Streams(9, 3)
    x = base.levels[2].mix(base.x0[2], noise.draw((1, 8, 8)))
    denoise = model.denoise(model.conditions(range(3), [2, 7]), asked.sampling)
    *_, last = trajectory(denoise, x, base.levels[2:], asked.sampling.solver, noise)
    assert torch.allclose(fresh.x[-1], last.x, atol=1e-4)


def test_guidance_away_from_a_class_is_the_formula(model: Pipeline) -> None:
    asked = replace(ask(model, guidance_scale=2.0, solver="euler"), against={"classes": [1]})
    (trace,) = labs.run(model, [labs.begin(model, asked)])
    level, x = trace.levels[1], trace.x[1]
    c = model.denoiser(x, level, **model.conditions(range(3), [2, 7]))
    u = model.denoiser(x, level, **model.conditions(range(3), [1]))
    assert torch.allclose(trace.x0[1], u.x0 + 2 * (c.x0 - u.x0), atol=1e-4)


def test_variety_and_recognition_know_what_they_measure(model: Pipeline) -> None:
    x = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8), torch.full((1, 8, 8), 5.0)])
    assert labs.variety(x, [0, 0, 1]) == 1.0
    assert labs.variety(x, [0, 1, 2]) is None
    known = examples(MODEL, model)
    right = labs.recognised(model, known.x, model.conditions(range(10), known.labels))
    wrong = labs.recognised(model, known.x, model.conditions(range(1, 11), known.labels))
    assert labs.recognised(model, known.x, model.denoiser.null(10)) is None
    assert right is not None
    assert wrong is not None
    assert right >= 0.8  # real digits, judged by the model
    assert wrong <= 0.2


def test_the_judge_of_fidelity_has_noise_of_its_own(model: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the noise that a sample was made of, x is a place of its own way, where the model is surest."""
    asked, seen = [], type(model.denoiser).forward
    record = lambda self, x, level, **cond: asked.append((x, level)) or seen(self, x, level, **cond)  # noqa: E731
    monkeypatch.setattr(type(model.denoiser), "forward", record)
    clean = model.draw(4, seed=0, classes=[3])
    asked.clear()
    labs.recognised(model, clean, model.conditions(range(4), [3]))
    made_of = Streams(0, 4).draw((1, 8, 8))
    for x, level in asked:
        eps = (x - float(level.alpha) * clean) / float(level.sigma)
        assert abs(float((eps * made_of).mean())) < 0.4


# --- the plane --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", plane.CLOUDS)
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_the_exact_field_is_that_of_the_gaussian_mixture(name: str, t: float) -> None:
    cloud = plane.CLOUDS[name]()
    count = len(cloud.points)
    twin = Mixture(
        torch.full((count,), 1 / count, dtype=torch.float64),
        cloud.points,
        torch.eye(2, dtype=torch.float64).expand(count, 2, 2),
        torch.full((count, 2), cloud.width**2, dtype=torch.float64),
    )
    level, x = SCHEDULES["flow"](t), normal(7, 2)
    log_p, x0, minus_score = twin.posterior(x, level)
    estimate = cloud(x, level)
    assert torch.allclose(estimate.x0, x0, atol=1e-9)
    assert torch.allclose(estimate.eps, float(level.sigma) * minus_score, atol=1e-9)
    # the twin leaves the constant (2 pi)^(-D/2) as (2 pi)^(-D/2) too: one Gaussian of two dimensions
    assert torch.allclose(cloud.density(x, level).log(), log_p, atol=1e-9)


def test_the_score_is_the_slope_of_the_density() -> None:
    cloud, level = plane.CLOUDS["moons"](), SCHEDULES["cosine"](0.4)
    x = (0.5 * normal(5, 2)).requires_grad_()
    (slope,) = torch.autograd.grad(cloud.density(x, level).log().sum(), x)
    assert torch.allclose(slope, -cloud(x.detach(), level).eps / level.sigma, atol=1e-8)


def test_the_velocity_is_that_of_the_flow() -> None:
    view = plane.View(plane.CLOUDS["rings"](), SCHEDULES["flow"], SOLVERS["euler"], 6, 0)
    moving, score = view.fields(view.cloud)
    for f, level in enumerate(view.levels[:-1]):
        where = plane.lattice(plane.LATTICE) * float(torch.hypot(level.alpha, level.sigma))
        estimate = view.cloud(where, level)
        assert torch.allclose(moving[f], (estimate.eps - estimate.x0).float(), atol=1e-3)  # alpha' = -1, sigma' = 1
        assert torch.allclose(score[f], (-estimate.eps / float(level.sigma)).float(), atol=1e-4)
    paths = view.paths(view.cloud)
    assert torch.allclose(paths[0].var(), tensor(1.0).float(), atol=0.15)


@pytest.mark.parametrize(
    "points", [[[0, 0]] * 5, [[0, 0], [1, 1]], [[0, 0], [1, float("nan")], [2, 2]], [[0, 1, 2]] * 4]
)
def test_points_that_are_no_distribution_are_refused(points: list[list[float]]) -> None:
    with pytest.raises(UndiffuseError, match="points"):
        plane.cloud_of(np.array(points, float))


# --- who may ask, and what -------------------------------------------------------------------------------------------

PATHS = ("state", "runs", "runs/a%20run", "runs/a%20run/doctor", "runs/a%20run/preview/0", "plane/learned")
FORMS = (
    "trace",
    "branch",
    "pictures",
    "picture",
    "schedules",
    "grid",
    "compare",
    "quality",
    "strip",
    "walk",
    "words",
    "animation",
)
PLANES = ("plane", "plane/train", "plane/stop")


def test_ST2_without_the_cookie_nothing_is_told_and_the_token_gives_it(server: Running) -> None:
    for path in PATHS:
        assert server.ask(f"/studio/{path}", headers={"Cookie": ""})[0] == 401
    for path in (*FORMS, *PLANES):
        for cookie in (
            "",
            "undiffuse_studio=x",
            f"undiffuse_studio_{server.port}=",
            f"undiffuse_studio_{server.port}=é",
        ):
            assert server.ask(f"/studio/{path}", {}, {"Cookie": cookie.encode().decode("latin-1")})[0] == 401
    for wrong in ("", "x", server.studio.token + "x", "é"):
        assert server.ask("/studio/enter", {"token": wrong})[0] == 401
    status, headers, _ = server.ask("/studio/enter", {"token": server.studio.token})
    assert status == 200
    given = headers["set-cookie"].lower()
    assert "httponly" in given
    assert "samesite=strict" in given
    assert server.studio.token not in headers["set-cookie"]


def test_ST1_the_studio_listens_on_this_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import inspect

    import uvicorn

    assert "host" not in inspect.signature(studio_verb).parameters
    seen: list[uvicorn.Config] = []
    monkeypatch.setattr(uvicorn.Config, "bind_socket", lambda self: seen.append(self) or exit(1))
    with pytest.raises(UndiffuseError, match="cannot be listened on"):
        studio_verb(no_browser=True)
    assert seen[0].host == "127.0.0.1"


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1:1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_SV7_other_sites_pages_are_refused_everywhere(server: Running, headers: dict[str, str]) -> None:
    for path in ("/studio/", "/studio/page/main.js", "/studio/state", "/studio/runs", "/studio/runs/a%20run/preview/0"):
        assert server.ask(path, headers=headers)[0] == 403
    for path in (*FORMS, *PLANES, "enter"):
        assert server.ask(f"/studio/{path}", {}, headers)[0] == 403


def test_SV7_only_json_is_read(server: Running) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert server.ask("/studio/trace", b"{}", {"Content-Type": kind})[0] == 415


def test_ST3_the_page_runs_its_own_files_only(server: Running) -> None:
    for path, kind in (("/studio/", "text/html"), ("/studio/page/main.js", "text/javascript")):
        status, headers, _ = server.ask(path)
        assert status == 200
        assert headers["content-type"].startswith(kind)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
    page = (PAGE / "index.html").read_text()
    for never in (" style=", " onclick", " onload", "<script>", "<style"):
        assert never not in page
    for file in PAGE.iterdir():
        text = file.read_text()
        for never in ("innerHTML", "outerHTML", "insertAdjacent", "eval(", "document.write", "new Function"):
            assert never not in text
        for scheme in ("https://", "http://"):
            assert text.replace("http://www.w3.org/2000/svg", "").count(scheme) == 0


@pytest.mark.parametrize("name", HOSTILE)
def test_ST4_names_are_looked_up_and_never_paths(server: Running, name: str) -> None:
    for form in ({"model": name}, {"solver": name}, {"grid": name}):
        assert server.ask("/studio/trace", form)[0] in (400, 404)
    assert server.ask("/studio/plane", {"name": name})[0] == 400
    assert server.ask("/studio/grid", {"schedule": name, "grid": "uniform", "steps": 3})[0] == 400


@pytest.mark.parametrize(
    "path", ["../app.py", "..%2fapp.py", "%2e%2e/app.py", "main.js%00.css", "/etc/passwd", "..\\app.py"]
)
def test_SV8_no_address_reaches_another_file(server: Running, path: str) -> None:
    for place in ("page", "chapter", "runs"):
        assert server.ask(f"/studio/{place}/{path}")[0] in (400, 404)
    assert server.ask("/studio/runs/a%20run/preview/99")[0] == 404
    assert server.ask("/studio/runs/a%20run/preview/-1")[0] == 404


BAD: list[tuple[str, Any]] = [
    ("trace", {"n": 0}),
    ("trace", {"n": 65}),
    ("trace", {"n": "3"}),
    ("trace", {"steps": 100000}),
    ("trace", {"seed": -1}),
    ("trace", {"scale": 1e9}),
    ("trace", {"cond": {"classes": [99]}}),
    ("trace", {"cond": {"classes": []}}),
    ("trace", {"cond": {"clases": [1]}}),
    ("trace", {"cond": {"classes": ["a circle"]}}),
    ("trace", {"cond": {"classes": [[1, 2]]}}),
    ("trace", {"against": {"classes": [1]}, "scale": 1}),
    ("words", {}),
    ("walk", {"base": {}, "corners": [1, 2, 3, 4], "down": "classes"}),
    ("walk", {"base": {}, "corners": [1, 2, 3, 4], "down": "text", "values": ["a"]}),
    ("trace", {"unknown": 1}),
    ("trace", {"low": 3, "high": 2}),
    ("trace", {"against": {"classes": [99]}, "n": 1, "scale": 2}),
    ("branch", {"base": {"n": 2}, "index": 999, "then": {"n": 2}}),
    ("branch", {"base": {"n": 2}, "index": 1, "then": {"n": 3}}),
    (
        "compare",
        {
            "base": {},
            "calls": 9,
            "a": {"solver": "rk45", "grid": "uniform"},
            "b": {"solver": "euler", "grid": "uniform"},
        },
    ),
    ("strip", {"base": {"n": 64}, "scales": [1, 2, 3, 4, 5]}),
    ("walk", {"base": {}, "corners": [1, 2, 3]}),
    ("walk", {"base": {}, "corners": [1, 2, 3, -4]}),
    ("plane", {"points": [[0, 0], [1]]}),
    ("plane", {"solver": "rk45"}),
    ("picture", {"data": "not base64!"}),
    ("picture", {"data": base64.b64encode(b"GIF89a").decode()}),
    ("quality", {"calls": [100000]}),
]


@pytest.mark.parametrize(("path", "body"), BAD)
def test_what_cannot_be_done_is_one_line_that_says_why(server: Running, path: str, body: Any) -> None:
    status, _, raw = server.ask(f"/studio/{path}", body)
    assert status == 400, raw
    message = json.loads(raw)["error"]["message"]
    assert message
    assert "Traceback" not in message
    assert str(MODEL) not in message


def test_a_picture_can_be_brought_along(server: Running, model: Pipeline) -> None:
    from PIL import Image

    known = examples(MODEL, model)
    buffer = io.BytesIO()
    Image.fromarray(np.full((16, 16), 255, np.uint8)).save(buffer, "PNG")
    status, _, raw = server.ask("/studio/picture", {"data": base64.b64encode(buffer.getvalue()).decode()})
    assert status == 200, raw
    index = json.loads(raw)["picture"]
    assert index == len(known.x)
    _, arrays = server.message("/studio/pictures", {})
    assert (arrays["x"][index] == 1).all()


def test_runs_are_told_by_name_with_their_curves_previews_and_lights(server: Running) -> None:
    rows = json.loads(server.ask("/studio/runs")[2])["runs"]
    assert [row["name"] for row in rows] == ["a run"]
    assert rows[0]["path"] == str(server.studio.runs.named["a run"])  # as it was named: what the copied lines say
    told = json.loads(server.ask("/studio/runs/a%20run")[2])
    assert told["loss"] == [[16, 32, 48], [1.0, 0.5, 1 / 3]]  # the half-written line is left out
    assert told["held_out"] == [[48], [0.4]]
    assert told["previews"] == 1
    status, headers, body = server.ask("/studio/runs/a%20run/preview/0")
    assert (status, headers["content-type"], body[:4]) == (200, "image/png", b"\x89PNG")
    lights = json.loads(server.ask("/studio/runs/a%20run/doctor")[2])["lights"]
    assert {each["light"] for each in lights} <= {"green", "yellow", "red"}


def test_every_chapter_that_a_control_names_is_there(server: Running) -> None:
    import re

    named = set(re.findall(r'chapter: "(\w+)"', (PAGE / "controls.js").read_text()))
    assert named
    assert named <= CHAPTERS
    for name in CHAPTERS:
        assert chapter(name), name
    assert server.ask("/studio/chapter/guidance")[1]["content-type"].startswith("text/plain")


def test_the_model_that_ships_is_small_and_knows_its_digits(model: Pipeline) -> None:
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 4_000_000
    known = examples(MODEL, model)
    assert known.labels == list(range(10))
    from undiffuse.studio.remake import examples as remade

    pytest.importorskip("sklearn")
    assert remade() == (MODEL / "examples.npz").read_bytes()


def test_the_verb_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UndiffuseError, match="no such model"):
        studio_verb((tmp_path / "none",))
    with pytest.raises(UndiffuseError, match="from 0 to 65535"):
        studio_verb(port=70_000)
    for folder in ("a/x", "b/x"):
        shutil.copytree(MODEL, tmp_path / folder)
    with pytest.raises(UndiffuseError, match="rename one"):
        studio_verb((tmp_path / "a/x", tmp_path / "b/x"))


def test_of_a_model_in_latents_the_page_gets_data(tmp_path: Path) -> None:
    from test_codecs import SPEC, data, fold
    from test_codecs import pipeline as latent

    model = latent(fold())
    folder = model.save(tmp_path / "latent")
    pictures = SPEC.to_data(data(4))
    np.savez(folder / "examples.npz", values=pictures, labels=np.zeros(4, int))
    sampling = model.settings(steps=3)
    wanted = model.draw(2, seed=1, sampling=sampling)
    with running({"latent": folder}) as server:
        form = {"n": 2, "seed": 1, "steps": 3, "picture": 2}
        head, trace = server.message("/studio/trace", form)
        assert trace["x"].shape == trace["x0"].shape == trace["eps"].shape == (4, 2, 3, 8, 8)
        assert np.allclose(trace["x"][-1], wanted, atol=1e-4)
        real = model.encode(SPEC.to_model(pictures[2:3]))
        assert np.allclose(trace["forward"][-1], model.decode(real).expand(2, -1, -1, -1), atol=1e-4)
        assert np.allclose(trace["forward"][0], trace["x"][0], atol=1e-4)  # one noise, and nothing else at t = 1
        _, branch = server.message("/studio/branch", {"base": form, "index": 1, "then": form})
        assert np.allclose(branch["x"][0], trace["x"][1], atol=1e-5)
        _, noised = server.message("/studio/trace", {**form, "start": "noised", "t": 0.5})
        begun = model.begin(2, seed=1, image=SPEC.to_model(pictures[2:3]), strength=0.5, sampling=sampling)
        assert np.allclose(noised["x"][0], model.decode(begun.x), atol=1e-4)
        head, _ = server.message("/studio/trace", {**form, "steps": 30, "start": "inverted"})
        assert head["round_trip"] < 0.5
        _, walk = server.message(
            "/studio/walk", {"base": {"steps": 3}, "corners": [1, 2, 3, 4], "columns": 2, "rows": 1}
        )
        assert np.allclose(walk["x"][0], wanted[0], atol=1e-4)
