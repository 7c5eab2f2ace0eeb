"""Reuse of what lies deep in a network: what it must not change, and what it may."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from test_pipeline import FREE, pipeline
from undiffuse import Estimate, Level, Pipeline, Sampling, UndiffuseError, trajectory
from undiffuse.asking import guided
from undiffuse.commands.sample import report, sample
from undiffuse.data.spec import DataSpec
from undiffuse.networks import Network, build, sized
from undiffuse.pipeline import REGISTRIES, to_json
from undiffuse.reuse import Kept, Memory
from undiffuse.solvers import SOLVERS
from undiffuse.studio import labs
from undiffuse.training import make_recipe

FIXED = [name for name, solver in SOLVERS.items() if name != "ddpm_learned" and not solver.adaptive]

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "unet": ("unet", {"widths": [16, 16], "blocks": [1, 1], "attention": [1]}),
    "unet of many blocks": ("unet", {"widths": [8, 12, 16], "blocks": [3, 2, 1], "attention": [2], "fold": 2}),
    "unet of sounds": ("unet", {"rank": 1, "widths": [8, 16], "blocks": [2, 1], "attention": []}),
    "mp_unet": ("mp_unet", {"widths": [16, 16, 16], "blocks": [2, 1, 1], "attention": [2]}),
    "ddpm_unet": ("ddpm_unet", {"widths": [16, 16], "blocks": 1, "attention": [1], "head_width": 8}),
    "ddpm_unet of many blocks": ("ddpm_unet", {"widths": [8, 16], "blocks": 3, "attention": [], "head_width": 8}),
    "ddpm_unet of one level": ("ddpm_unet", {"widths": [8], "blocks": 2, "attention": [], "head_width": 8}),
    "dit": ("dit", {"widths": [32], "blocks": [3], "head_width": 16, "patch": 2}),
    "dit with long skips": ("dit", {"widths": [32], "blocks": [5], "head_width": 16, "skips": True}),
    "hourglass": ("dit", {"widths": [16, 32], "blocks": [2, 2], "head_width": 16, "skips": True}),
}
WORDS = ("unet", "mp_unet", "ddpm_unet", "dit with long skips", "hourglass")
CASES = [(name, 0, "") for name in NETWORKS] + [(name, 12, "cross") for name in WORDS]
CASES += [("dit", 12, "joint"), ("dit with long skips", 12, "joint"), ("hourglass", 12, "joint")]


def random(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that do something everywhere (fresh networks end in zeros), in float64."""
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=stream))
    return module.double().eval().requires_grad_(False)


def made(name: str, tokens: int = 0, attention: str = "") -> tuple[Network, tuple[Tensor, ...]]:
    """A network, and what it is asked: x, label, vector, tokens, mask."""
    family, options = NETWORKS[name]
    more: dict[str, Any] = {"token_attention": attention} if family == "dit" and attention else {}
    network = build(family, {"in_channels": 2, "condition_width": 8, "token_width": tokens, **options, **more})
    random(network)
    stream = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=stream, dtype=torch.float64)

    asked: tuple[Tensor, ...] = normal(3, 2, *(13, 11)[: network.rank]), torch.tensor([9.0, 500.0, 900.0]), normal(3, 8)
    if tokens:
        asked += normal(3, 5, tokens), torch.tensor([[True] * 5, [True, True, False, False, False], [False] * 5])
    return network, asked


class Count:
    """How often what lies deepest in a network has computed, in rows."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, module: object, inputs: tuple[Tensor, ...], output: object) -> None:
        self.rows.append(len(inputs[0]))

    @contextmanager
    def of(self, model: Pipeline) -> Iterator[list[int]]:
        hook = model.denoiser.network.middle[0].register_forward_hook(self)  # type: ignore[index]
        try:
            yield self.rows
        finally:
            hook.remove()


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tokens", "attention"), CASES)
def test_a_whole_call_is_the_plain_one_and_a_call_that_reuses_it_at_once_as_well(
    name: str, tokens: int, attention: str
) -> None:
    network, asked = made(name, tokens, attention)
    kept = Kept()
    plain = network(*asked)
    assert torch.equal(network(*asked, deep=kept), plain)
    again = Kept(kept.features)
    torch.testing.assert_close(network(*asked, deep=again), plain, rtol=0, atol=1e-12)
    # and elsewhere the shallow part follows x and its level, while the deep part stays what it was
    x, label, *rest = asked
    elsewhere = network(x + 0.5, label + 50, *rest, deep=Kept(kept.features))
    assert float((elsewhere - plain).abs().mean()) > 1e-3
    assert not torch.allclose(elsewhere, network(x + 0.5, label + 50, *rest))
    assert kept.features is not None
    half = tuple(each[1:] for each in asked)
    torch.testing.assert_close(network(*half, deep=Kept(kept.features[1:])), plain[1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_deep_computes_where_it_is_reused(name: str) -> None:
    network, asked = made(name)
    used: set[str] = set()
    for path, module in network.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, path=path: used.add(path))
    kept = Kept()
    network(*asked, deep=kept)
    whole, _ = set(used), used.clear()
    network(*asked, deep=Kept(kept.features))
    assert used < whole
    # What is left out includes the lowest level, but for the ends of a transformer of one level.
    lowest = [path for path in used if path.startswith(("middle.", "mid_block."))]
    assert all(name.startswith("dit") and path.split(".")[1] in "0 2 4" for path in lowest)
    if lowest:
        assert {path.split(".")[1] for path in whole - used if path.startswith("middle.")} >= {"1"}


def test_a_network_of_one_level_or_of_points_has_no_deep_part() -> None:
    assert not build("unet", {"in_channels": 1, "widths": [8], "blocks": [4], "attention": []}).has_deep_part
    assert not build("mp_unet", {"in_channels": 1, "widths": [8], "blocks": [4], "attention": []}).has_deep_part
    assert not build("dit", {"in_channels": 1, "widths": [16], "blocks": [2], "head_width": 8}).has_deep_part
    assert not build("mlp", {"in_channels": 2}).has_deep_part
    for name, (family, options) in NETWORKS.items():
        assert build(family, {"in_channels": 2, **options}).has_deep_part, name


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_training_is_compiled_as_one_graph(name: str) -> None:
    network, asked = made(name)
    compiled = torch.compile(network.forward, backend="eager", fullgraph=True)
    try:
        assert torch.equal(compiled(*asked), network(*asked))
    finally:
        torch.compiler.reset()


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_half_of_guidance_that_begins_anew_makes_a_whole_call() -> None:
    memory, both, one = Memory(3), (True, True), (True, False)
    rows = list(torch.arange(4.0)[:, None])
    assert not memory.serves(one)
    memory.note(one, rows[:2])
    assert memory.serves(one)
    assert not memory.serves(both)
    assert not memory.serves((False, True))
    memory.note(both, rows)
    assert memory.recall((False, True)) == rows[2:]
    assert memory.recall(both) == rows
    memory.note(one, None)
    assert memory.serves(both)
    memory.note(both, None)
    assert not memory.serves(one)  # three calls old


# --- sampling ---------------------------------------------------------------------------------------------------------


def settled() -> Pipeline:
    """A model whose deep part says the same whatever x, level and condition are."""
    model = pipeline()
    nn.init.zeros_(model.denoiser.network.grow[0].weight)  # type: ignore[index]
    return model


ASKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "guided": {"guidance_scale": 3.0},
    "interval": {"guidance_scale": 3.0, "guidance_interval": (0.3, 3.0)},
    "rescaled": {"guidance_scale": 3.0, "guidance_rescale": 0.7, "threshold": "static"},
    "unconditional": {"guidance_scale": 0.0},
    "noisy": {"solver": "ddpm", "noise": "brownian"},
    "two calls a step": {"solver": "heun"},
}


@pytest.mark.parametrize("name", ASKED)
def test_where_the_deep_part_never_changes_nothing_does(name: str) -> None:
    model = settled()
    image = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    keep = image > 0.3
    edits: list[dict[str, Any]] = [
        {},
        {"image": image, "strength": 0.6},
        {"image": image, "strength": 0.6, "keep": keep},
    ]
    for told in edits:
        plain, reused = (
            model.draw(5, seed=3, sampling=model.settings(steps=7, reuse=k, **ASKED[name]), **told) for k in (1, 3)
        )
        torch.testing.assert_close(reused, plain, rtol=0, atol=2e-5)
    model = pipeline()
    plain, reused = (model.draw(5, sampling=model.settings(steps=7, reuse=k, **ASKED[name])) for k in (1, 3))
    assert float((reused - plain).abs().max()) > 1e-3


def test_reuse_of_one_is_sampling_as_it_was() -> None:
    model = pipeline()

    class Deepless(nn.Module):
        """The network, to which nobody can say ``deep``."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, label: Tensor, vector: Tensor) -> Tensor:
            return self.inner(x, label, vector)

    settings = model.settings(guidance_scale=2.0)
    assert settings.reuse == 1
    assert settings.memory() is None
    plain = model.draw(3, sampling=settings)
    model.denoiser.network = Deepless(model.denoiser.network)
    assert torch.equal(model.draw(3, sampling=settings), plain)


@pytest.mark.parametrize("solver", FIXED)
def test_trap_S21_every_kth_call_is_whole_and_they_are_counted_as_they_are_made(solver: str) -> None:
    model = pipeline()
    for scale, rows in ((1.0, 2), (2.0, 4)):
        sampling = model.settings(solver=solver, steps=4, reuse=3, guidance_scale=scale)
        with Count().of(model) as seen:
            model.draw(2, sampling=sampling)
        rounds = model.calls(sampling) // (rows // 2)
        assert seen == [rows] * len(range(0, rounds, 3))
        assert model.whole_calls(sampling) == sum(seen) // 2
        assert model.calls(sampling) == model.calls(replace(sampling, reuse=1))
        assert model.whole_calls(replace(sampling, reuse=1)) == model.calls(sampling)


def test_each_half_of_guidance_reuses_its_own() -> None:
    """Against a sampler written otherwise: each half asks the network alone, and keeps what is its own."""
    model = pipeline()
    sampling = model.settings(steps=9, reuse=3, guidance_scale=2.5, guidance_interval=(0.2, 1.3))
    begun = model.begin(2, seed=1, sampling=sampling)
    denoiser = model.denoiser
    whole_at: list[int] = []
    kept: dict[bool, Kept] = {}
    number, since = -1, 9

    def half(x: Tensor, level: Level, conditional: bool) -> Estimate:
        cond = begun.cond if conditional else begun.against
        label = denoiser.label(level).float().expand(len(x))
        y = denoiser.network(x, label, **denoiser.encode(cond, len(x)), deep=kept[conditional])
        return denoiser.prediction.estimate(x, y, level, None)

    def denoise(x: Tensor, level: Level) -> Estimate:
        nonlocal number, since
        number, since = number + 1, since + 1
        inside = 0.2 < float(level.sigma / level.alpha) <= 1.3
        if since >= 3 or (inside and False not in kept):
            whole_at.append(number)
            since = 0
            kept.clear()
            kept[True] = Kept()
            if inside:
                kept[False] = Kept()
        return guided(lambda x, at: half(x, at, True), lambda x, at: half(x, at, False), sampling)(x, level)

    *_, last = trajectory(denoise, begun.x, begun.levels, sampling.solver, begun.noise)
    assert 0 in whole_at, whole_at
    assert any(number % 3 for number in whole_at)  # the interval begins between two of them
    torch.testing.assert_close(model.draw(2, seed=1, sampling=sampling), last.x, rtol=0, atol=1e-4)
    with Count().of(model) as seen:
        model.draw(2, seed=1, sampling=sampling)
    assert len(seen) == len(whole_at)


def test_law_6_a_sample_does_not_depend_on_its_batch() -> None:
    model = pipeline()
    sampling = model.settings(steps=7, reuse=3, guidance_scale=2.0, guidance_interval=(0.2, 2.0))
    together = model.draw(5, sampling=sampling)
    torch.testing.assert_close(model.draw(5, sampling=sampling, batch_size=2), together, rtol=0, atol=1e-4)
    assert torch.equal(model.draw(5, sampling=sampling, rows=8), model.draw(5, sampling=sampling, rows=8, batch_size=1))


def test_nothing_is_left_of_a_run_and_two_at_once_do_not_mix() -> None:
    model = pipeline()
    first, other = (model.settings(steps=8, reuse=k, guidance_scale=g) for k, g in ((3, 2.0), (2, 1.0)))
    alone = [model.draw(2, seed=i, sampling=each) for i, each in enumerate((first, other, first))]
    walks = [model.frames(2, seed=i, sampling=each) for i, each in enumerate((first, other, first))]
    ends = [frames[-1].x for frames in zip(*zip(*walks, strict=True), strict=True)]
    for end, expected in zip(ends, alone, strict=True):
        assert torch.equal(end, expected)
    assert not [*model.denoiser.buffers()]
    left_early = model.frames(2, seed=9, sampling=first)
    next(left_early), next(left_early)
    assert torch.equal(model.draw(2, seed=0, sampling=first), alone[0])
    # In one round of questions, some reuse and others do not.
    settings = [replace(first, reuse=k) for k in (1, 2, 3)]
    traces = labs.run(model, [labs.begin(model, labs.Ask(each, range(2), 0, {}, {})) for each in settings])
    for trace, each in zip(traces, settings, strict=True):
        torch.testing.assert_close(trace.x[-1], model.draw(2, seed=0, sampling=each), rtol=0, atol=1e-4)


def test_finer_steps_err_less() -> None:
    """Between two calls the deep part changes by O(step), and so does what reuse errs by."""
    model = pipeline()

    def error(steps: int, reuse: int) -> float:
        settings = model.settings(solver="euler", steps=steps)
        plain, reused = (model.draw(4, sampling=replace(settings, reuse=k)) for k in (1, reuse))
        return float((plain - reused).square().mean().sqrt())

    assert error(64, 2) < error(16, 2) / 2
    assert error(16, 2) < error(16, 4)


def test_what_is_asked_without_a_trajectory_is_whole() -> None:
    """Likelihood, and a denoiser by itself (tuning, inversion): nobody can tell which calls belong together."""
    model = pipeline()
    model.sampling = model.settings(reuse=4)
    cond = model.conditions(range(2), None)
    denoise = model.denoise(cond, model.sampling)
    x, level = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), model.config.schedule(0.5)
    plain = model.denoiser(x, level, **cond)
    with Count().of(model) as seen:
        for _ in range(3):
            assert torch.equal(denoise(x, level).x0, plain.x0)
        model.log_likelihood(model.spec.to_data(x.clamp(-1, 1)), steps=2, start=0.1, probes=2)
    assert len(seen) > 5
    leaf = x.clone().requires_grad_()
    denoise(leaf, level).x0.sum().backward()
    assert leaf.grad is not None


# --- what is refused, and what is said --------------------------------------------------------------------------------


def deepless(model: Pipeline) -> Pipeline:
    name, options = sized(FREE.shape, "tiny")
    return pipeline(FREE, classes=0, network=name, network_config=options)


REFUSED: list[tuple[Callable[[Pipeline], object], str]] = [
    (lambda model: Sampling(reuse=0), "reuse=0 must be a whole number of calls of at least 1; 1 reuses nothing"),
    (lambda model: model.settings(reuse=True), "reuse=True must be a whole number"),
    (lambda model: model.settings(reuse=2.5), "reuse=2.5 must be a whole number"),
    (lambda model: model.settings({**to_json(model.sampling, REGISTRIES), "reuse": "3"}), "reuse"),
    (lambda model: model.draw(1, sampling=model.settings(solver="rk45", reuse=2)), "reuse=2 with .*: leave reuse=1"),
    (lambda model: deepless(model).sample(1, reuse=3), "reuse=3 asked of network mlp, .* leave reuse=1"),
]


@pytest.mark.parametrize(("ask", "reason"), REFUSED)
def test_law_8_what_cannot_be_is_refused(ask: Callable[[Pipeline], object], reason: str) -> None:
    with pytest.raises(UndiffuseError, match=reason):
        ask(pipeline())


def test_a_recipe_refuses_it_before_anything_is_trained() -> None:
    spec = DataSpec("points", (2,), "float64", None, None, (0.0, 0.0), (1.0, 1.0), "D")
    recipe = make_recipe("points", spec, 1000)
    with pytest.raises(UndiffuseError, match="reuse=2 asked of network mlp"):
        replace(recipe, sampling=replace(recipe.sampling, reuse=2)).check(spec)


def test_the_command_line_says_what_was_spent(tmp_path: Path) -> None:
    model = pipeline()
    folder, picture = tmp_path / "model", tmp_path / "a.png"
    model.save(folder)
    made = sample(folder, number=2, steps=7, guidance_scale=2, set=("reuse=3",), out=picture)
    assert (made.calls, made.whole_calls) == (14, 6)
    assert report(made).endswith("14 network calls a sample, 6 of them whole")
    again = sample(from_=picture, out=tmp_path / "b.png")
    assert again.whole_calls == 6
    assert picture.read_bytes() == (tmp_path / "b.png").read_bytes()
    plain = sample(folder, number=2, steps=7, out=tmp_path / "c.npy")
    assert report(plain).endswith("7 network calls a sample")
    with pytest.raises(UndiffuseError, match="reuse"):
        sample(folder, number=2, set=("reuse=0",), out=tmp_path / "d.png")
    model.sampling = model.settings(reuse=2)
    model.save(folder)
    assert Pipeline.load(folder).sampling.reuse == 2
