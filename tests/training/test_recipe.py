"""Recipes: the learning-rate law, the configurations by name, and their way to JSON and back."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from training_laws import points, recipe
from undiffuse.config import from_json, override, to_json
from undiffuse.data import Dataset, from_array
from undiffuse.errors import UndiffuseError
from undiffuse.pipeline import REGISTRIES
from undiffuse.training import RECIPES, Optimiser, Plan, Recipe, Trainer, make_recipe
from undiffuse.training.recipe import kind_of, with_length, with_settings


def dataset_of(kind: str) -> Dataset:
    if kind == "points":
        return points()
    shape = {"digit": (6, 8, 8), "grey": (6, 28, 28), "colour": (6, 20, 24, 3), "sound": (6, 1, 50)}[kind]
    if kind == "sound":
        return from_array(np.linspace(-1, 1, math.prod(shape), dtype=np.float32).reshape(shape))
    return from_array((np.arange(math.prod(shape)) % 255).astype(np.uint8).reshape(shape), np.arange(6) % 2)


KINDS = ("points", "digit", "grey", "colour", "sound")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_serves_every_kind_of_data(name: str, kind: str) -> None:
    dataset = dataset_of(kind)
    if dataset.spec.kind == "points" and name in ("digits", "mnist", "cifar", "images", "text", "autoencoder"):
        pytest.skip("a recipe for pictures")
    made = make_recipe(name, dataset.spec, len(dataset))
    assert "M parameters" in made.cost(dataset.spec)
    assert "GFLOP" in made.cost(dataset.spec)
    stored = json.loads(json.dumps(to_json(made, REGISTRIES)))
    assert from_json(Recipe, stored, registries=REGISTRIES) == made
    assert made.model.config(dataset.spec).build() is not None


@pytest.mark.parametrize("name", ["digits", "mnist", "cifar", "text"])
def test_a_size_that_is_set_is_the_size_that_is_asked_for(name: str) -> None:
    spec = dataset_of("colour").spec
    own = make_recipe(name, spec, 6)
    asked = make_recipe(name, spec, 6, "base").model.config(spec)
    assert own.model.network
    assert with_settings(own, ["model.size=base"]).model.config(spec) == asked != own.model.config(spec)
    kept = with_settings(own, ["model.network.fold=4", "model.size=base"]).model.config(spec).network_config
    assert kept == {**asked.network_config, "fold": 4}


def test_the_default_follows_the_data() -> None:
    chosen = {kind: make_recipe("default", dataset_of(kind).spec, 6).name for kind in KINDS}
    assert chosen == {"points": "points", "digit": "digits", "grey": "mnist", "colour": "cifar", "sound": "images"}
    assert make_recipe("default", dataset_of("grey").spec, 6, "tiny").model.size == "tiny"


def test_law_8_an_unknown_name_suggests_the_nearest() -> None:
    spec = points().spec
    with pytest.raises(UndiffuseError, match="unknown recipe 'digit': did you mean 'digits'"):
        make_recipe("digit", spec, 10)
    with pytest.raises(UndiffuseError, match=r"did you mean 'optimiser\.lr'"):
        override(make_recipe("tiny", spec, 10), ["optimiser.lrr=1"], REGISTRIES)
    with pytest.raises(UndiffuseError, match="unknown model size 'smal'"):
        make_recipe("tiny", spec, 10, "smal").cost(spec)


def test_the_family_of_networks_is_chosen_by_name() -> None:
    spec = dataset_of("digit").spec
    made = override(make_recipe("tiny", spec, 6), ["model.family=dit"], REGISTRIES)
    assert made.model.config(spec).network == "dit"
    assert from_json(Recipe, json.loads(json.dumps(to_json(made, REGISTRIES))), registries=REGISTRIES) == made
    paper = override(made, ["model.size=DiT-S/8"], REGISTRIES).model.config(spec)
    assert (paper.network_config["widths"], paper.network_config["patch"]) == ([384], 8)
    for setting, message in (
        ("family=ditt", "did you mean 'dit'"),
        ("family=mlp", "choose from unet, mp_unet, ddpm_unet, dit"),
    ):
        with pytest.raises(UndiffuseError, match=message):
            override(made, [f"model.{setting}"], REGISTRIES).check(spec)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimiser.lr=0", "lr=0.0 must be positive"),
        ("optimiser.betas=0.9,1", "betas"),
        ("optimiser.clip=-1", "clip"),
        ("objective.condition_dropout=1.5", "condition_dropout=1.5"),
        ("objective.huber=0", "huber"),
        ("training.batch_size=0", "batch_size=0 must be at least 1"),
        ("training.accumulation=99", "cannot be computed in 99 parts"),
        ("training.precision=fp8", "'float32' or 'bf16'"),
        ("ema.half_life=0", "half_life=0"),
        ("ema.ramp=-1", "ramp"),
    ],
)
def test_settings_out_of_range_are_refused(setting: str, message: str) -> None:
    with pytest.raises(UndiffuseError, match=message):
        override(make_recipe("tiny", points().spec, 10), [setting], REGISTRIES)


def test_the_learning_rate_rises_and_falls_as_stated() -> None:
    plan = Plan(1000)
    cosine = Optimiser(lr=2.0, warmup=100, decay="cosine")
    assert cosine.rate(0, 50, plan) == pytest.approx(1.0)
    assert cosine.rate(400, 410, plan) == pytest.approx(1 + math.cos(0.4 * math.pi))
    assert cosine.rate(1000, 1010, plan) == pytest.approx(0, abs=1e-15)
    assert Optimiser(lr=2.0, decay="linear").rate(750, 760, plan) == pytest.approx(0.5)
    assert Optimiser(lr=2.0, decay="constant").rate(999, 1009, plan) == 2.0


def test_trap_R5_the_learning_rate_at_an_update_does_not_depend_on_accumulation() -> None:
    """The trap: warm-up lasted 4 times too long and the cosine ended at 99 % of the peak with 4 parts a batch."""
    dataset = points()
    rates = {}
    for parts in (1, 2, 4):
        trainer = Trainer(dataset, recipe(dataset, images=400, batch_size=4, accumulation=parts))
        rates[parts] = [update.lr for update in trainer.updates()]
    assert rates[1] == rates[2] == rates[4]
    peak = trainer.recipe.optimiser.lr
    assert rates[1][0] == pytest.approx(peak / 2, rel=1e-3)  # warm-up of 8 images, 4 an update
    assert rates[1][1] == pytest.approx(peak, rel=1e-3)
    assert rates[1][-1] < 0.001 * peak


def test_a_run_with_a_time_budget_decays_from_where_its_length_became_known() -> None:
    optimiser = Optimiser(lr=1.0, decay="linear")
    assert optimiser.rate(500, 510, Plan(None)) == 1.0
    assert optimiser.rate(500, 510, Plan(1500, 500)) == 1.0  # no jump
    assert optimiser.rate(1000, 1010, Plan(1500, 500)) == 0.5
    assert optimiser.rate(1500, 1510, Plan(1500, 500)) == 0.0


def test_the_length_may_be_given_in_updates_or_images() -> None:
    base = make_recipe("digits", dataset_of("digit").spec, 6)
    assert with_length(base, steps=None, images=None, batch_size=None) == base
    short = with_length(base, steps=10, images=None, batch_size=8)
    assert (short.training.images, short.training.batch_size, short.optimiser.warmup) == (80, 8, 8)
    assert with_length(base, steps=None, images=77, batch_size=None).training.images == 77
    with pytest.raises(UndiffuseError, match="steps=0"):
        with_length(base, steps=0, images=None, batch_size=None)


def test_parts_are_called_by_their_registered_names() -> None:
    base = make_recipe("points", points().spec, 10)
    assert kind_of(base.model.schedule) == "flow"
    assert kind_of(base.objective.times) == "stratified"
    changed = override(base, ["model.schedule=cosine", "model.prediction=v"], REGISTRIES)
    assert (kind_of(changed.model.schedule), kind_of(changed.model.prediction)) == ("cosine", "v")
    assert replace(changed, model=base.model) == base
