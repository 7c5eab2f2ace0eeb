"""Chapter 5: what is asked for, and how to ask for nothing."""

from __future__ import annotations

import json

import pytest
import torch

from undiffuse.conditions import CONDITIONS, Classes, Condition, Conditions, Vector
from undiffuse.errors import UndiffuseError

SIZES = {"classes": {"classes": 3}, "vector": {"size": 2}}
VALUES = {
    "classes": torch.tensor([0, 2, 1, 2]),
    "vector": torch.tensor([[0.0, 1.0], [2.0, 3.0], [0.5, -1.0], [2.0, 3.0]]),
}
every = pytest.mark.parametrize("kind", CONDITIONS)


def make(kind: str, width: int = 8) -> Condition:
    torch.manual_seed(0)
    condition = CONDITIONS[kind](width=width, **SIZES.get(kind, {}))  # type: ignore[call-arg]
    for p in condition.parameters():
        torch.nn.init.normal_(p)
    return condition


def test_every_kind_is_tested() -> None:
    assert set(CONDITIONS) >= set(SIZES)


@pytest.mark.parametrize("kind", SIZES)
def test_trap_G5_values_differ_and_equal_values_agree(kind: str) -> None:
    condition = make(kind)
    embedded = condition.embed(condition.check(VALUES[kind]))
    assert embedded.shape == (4, 8)
    assert torch.equal(embedded[1], embedded[3])
    assert not torch.allclose(embedded[0], embedded[1])


@pytest.mark.parametrize("kind", SIZES)
def test_trap_G4_null_is_derived_and_unlike_any_value(kind: str) -> None:
    condition = make(kind)
    null = condition.embed(condition.check(condition.null(2)))
    assert torch.equal(null[0], null[1])
    values = condition.embed(VALUES[kind])
    assert not any(torch.allclose(null[0], row) for row in values)
    assert not torch.allclose(null[0], condition.embed(torch.zeros_like(VALUES[kind][:1]))[0])
    assert bool(null.isfinite().all())


def test_trap_G4_the_null_class_is_their_number() -> None:
    for classes in (1, 10, 1000):
        assert int(Classes(classes, 4).null(1)) == classes


@pytest.mark.parametrize("kind", SIZES)
def test_everything_is_trainable(kind: str) -> None:
    condition = make(kind)
    mixed = torch.cat([VALUES[kind], condition.null(1)])
    condition.embed(mixed).square().sum().backward()
    for p in condition.parameters():
        assert p.grad is not None
        assert bool(p.grad.isfinite().all())
        assert float(p.grad.abs().sum()) > 0


@pytest.mark.parametrize("kind", SIZES)
def test_config_builds_it_again(kind: str) -> None:
    made = Conditions({"name": make(kind)})
    again = Conditions.build(json.loads(json.dumps(made.config)), 8)
    assert again.config == made.config
    again.load_state_dict(made.state_dict())
    values = {"name": VALUES[kind]}
    assert torch.equal(again.encode(values, 4)["vector"], made.encode(values, 4)["vector"])


def test_several_add_up_and_none_is_none() -> None:
    parts = {"label": make("classes"), "style": make("vector")}
    both, values = Conditions(parts), {"label": VALUES["classes"], "style": VALUES["vector"]}
    expected = parts["label"].embed(values["label"]) + parts["style"].embed(values["style"])
    assert torch.equal(both.encode(values, 4)["vector"], expected)
    assert both.names == ("label", "style")
    assert Conditions({}).encode({}, 4) == {}


@pytest.mark.parametrize("kind", SIZES)
def test_dropping_replaces_a_sample_by_null(kind: str) -> None:
    conditions = Conditions({"name": make(kind)})
    u = torch.tensor([0.05, 0.5, 0.0999, 0.1])
    kept = conditions.drop({"name": VALUES[kind]}, u, 0.1)["name"]
    null = conditions.null(1)["name"][0]
    assert torch.equal(kept[1], VALUES[kind][1])
    assert torch.equal(kept[3], VALUES[kind][3])
    for i in (0, 2):
        assert torch.equal(kept[i].nan_to_num(7.0), null.to(kept.dtype).nan_to_num(7.0))
    assert torch.equal(conditions.drop({"name": VALUES[kind]}, u, 0.0)["name"], VALUES[kind])


def test_whole_numbers_in_a_vector_can_be_dropped() -> None:
    """NaN has no place among integers: it would become a number far below any."""
    conditions = Conditions({"name": make("vector")})
    kept = conditions.drop({"name": torch.tensor([[1, 2], [3, 4]])}, torch.tensor([0.0, 1.0]), 0.5)["name"]
    assert bool(kept[0].isnan().all())
    assert kept[1].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("classes", torch.tensor([0, 4]), "class 4 does not exist: this model has 0 to 2"),
        ("classes", torch.tensor([-1, 2]), "class -1 does not exist"),
        ("classes", torch.tensor([0.0, 1.0]), "must be integers"),
        ("classes", torch.tensor([[0], [1]]), "must be integers"),
        ("vector", torch.zeros(2, 3), r"takes \[B, 2\], got \[2, 3\]"),
        ("vector", torch.zeros(2), r"takes \[B, 2\]"),
        ("vector", torch.tensor([[float("nan"), 1.0]]), "holds NaN"),
        ("vector", torch.tensor([[float("inf"), 1.0]]), "infinite"),
    ],
)
def test_wrong_values_are_refused(kind: str, values: torch.Tensor, message: str) -> None:
    with pytest.raises(UndiffuseError, match=message):
        make(kind).check(values)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(UndiffuseError, match="at least one class"):
        Classes(0, 4)
    with pytest.raises(UndiffuseError, match="at least one number"):
        Vector(0, 4)
    with pytest.raises(UndiffuseError, match="4 values for 3 samples"):
        Conditions({"name": make("classes")}).encode({"name": VALUES["classes"]}, 3)
    with pytest.raises(UndiffuseError, match="did you mean 'classes'"):
        Conditions.build({"name": {"kind": "clases", "classes": 3}}, 8)
