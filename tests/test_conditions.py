"""Chapter 5: what is asked for, and how to ask for nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from undiffuse.conditions import (
    CONDITIONS,
    Attributes,
    Classes,
    Condition,
    Conditions,
    Patches,
    Picture,
    Text,
    Vector,
)
from undiffuse.errors import UndiffuseError

SIZES: dict[str, dict[str, Any]] = {
    "classes": {"classes": 3},
    "attributes": {"sizes": [2, 3]},
    "vector": {"size": 2},
    "text": {"vocabulary": ["ab", "abc"], "length": 5, "token_width": 12, "layers": 1, "heads": 2},
    "picture": {"shape": [1, 2, 3], "size": [4, 6]},
    "patches": {"shape": [2, 4, 2], "patch": 2, "token_width": 6},
}


def rows(*shape: int) -> torch.Tensor:
    """Four random values, of which the second and the last are the same."""
    return torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))[[0, 1, 2, 1]]


VALUES = {
    "classes": torch.tensor([0, 2, 1, 2]),
    "attributes": torch.tensor([[0, 1], [1, 2], [0, 2], [1, 2]]),
    "text": torch.tensor([[258, 0, 0, 0, 0], [98, 99, 1, 0, 0], [99, 98, 1, 0, 0], [98, 99, 1, 0, 0]]),
    "picture": rows(1, 2, 3),
    "patches": rows(2, 4, 2),
    "vector": torch.tensor([[0.0, 1.0], [2.0, 3.0], [0.5, -1.0], [2.0, 3.0]]),
}


def said(condition: Condition, values: torch.Tensor) -> torch.Tensor:
    """All that the network is told, a row a sample."""
    told = condition.embed(condition.check(values))
    there = None if told.tokens is None or told.mask is None else told.tokens * told.mask[..., None]
    parts = (told.vector, there, told.mask, told.channels)
    return torch.cat([part.flatten(1).float() for part in parts if part is not None], dim=1)


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
    embedded = said(condition, VALUES[kind])
    assert torch.equal(embedded[1], embedded[3])
    assert not torch.allclose(embedded[0], embedded[1])


@pytest.mark.parametrize("kind", SIZES)
def test_trap_G4_null_is_derived_and_unlike_any_value(kind: str) -> None:
    condition = make(kind)
    null = said(condition, condition.null(2))
    assert torch.equal(null[0], null[1])
    values = said(condition, VALUES[kind])
    assert not any(torch.allclose(null[0], row) for row in values)
    if kind != "text":  # of which nothing but zeros is the null
        assert not torch.allclose(null[0], said(condition, torch.zeros_like(VALUES[kind][:1]))[0])
    assert bool(null.isfinite().all())


def test_trap_G4_the_null_class_is_their_number() -> None:
    for classes in (1, 10, 1000):
        assert int(Classes(classes, 4).null(1)) == classes


@pytest.mark.parametrize("kind", SIZES)
def test_everything_is_trainable(kind: str) -> None:
    condition = make(kind)
    mixed = torch.cat([VALUES[kind], condition.null(1)])
    told = said(condition, mixed)
    assert told.requires_grad == bool(list(condition.parameters()))
    if told.requires_grad:
        (told * rows(told.shape[1])[[0, 1, 2, 3, 0]]).sum().backward()
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
    there, here = again.encode(values, 4), made.encode(values, 4)
    assert list(there) == list(here)
    assert all(torch.equal(there[name], here[name]) for name in here)


def test_several_add_up_and_none_is_none() -> None:
    parts = {"label": make("classes"), "style": make("vector")}
    both, values = Conditions(parts), {"label": VALUES["classes"], "style": VALUES["vector"]}
    expected = said(parts["label"], values["label"]) + said(parts["style"], values["style"])
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


def test_tokens_stand_in_a_row_and_channels_side_by_side() -> None:
    text = Text(["ab"], 8, length=3, token_width=6, heads=2)
    patches = Patches([2, 4, 2], 8, patch=2, token_width=6)
    picture, other = Picture([1, 2, 3], [4, 6]), Picture([2, 4, 6], [4, 6])
    both = Conditions({"text": text, "patches": patches, "picture": picture, "other": other})
    assert (both.token_width, both.channels) == (6, 5)
    values = both.null(2)
    values["text"][0] = torch.tensor([98, 0, 0])
    values["patches"][1] = 1.0
    told = both.encode(values, 2)
    assert told["mask"].tolist() == [[True, False, False, False, False], [False, False, False, True, True]]
    assert told["tokens"].shape == (2, 5, 6)
    assert told["channels"].shape == (2, 5, 4, 6)
    with pytest.raises(UndiffuseError, match="must be of one width"):
        _ = Conditions({"text": text, "patches": Patches([2, 4, 2], 8, patch=2, token_width=7)}).token_width


def test_holes_in_a_picture_are_told_from_zeros() -> None:
    """An inpainting model must know what is given; and a smaller picture is enlarged by whole pixels."""
    values = torch.arange(6.0).reshape(1, 1, 2, 3)
    values[0, 0, 0, 0] = torch.nan
    told = Picture([1, 2, 3], [4, 6]).embed(values).channels
    assert told is not None
    assert torch.equal(told[0, 0, ::2, ::2], values[0, 0].nan_to_num())
    assert torch.equal(told[0, 1], (told[0, 0] != 0).float())


def test_patches_are_those_of_the_picture() -> None:
    """Oracle: the same weights as a convolution whose stride is its size."""
    patches = Patches([2, 4, 6], 8, patch=2, token_width=5)
    kernel = patches.linear.weight.reshape(5, 2, 2, 2)
    values = torch.randn(3, 2, 4, 6)
    told = patches.embed(values).tokens
    conv = torch.nn.functional.conv2d(values, kernel, patches.linear.bias, stride=2).flatten(2).transpose(1, 2)
    assert told is not None
    assert torch.allclose(told, conv + patches.places, atol=1e-6)


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
        ("attributes", torch.tensor([[0, 4]]), "attribute 1 has no value 4: it has 0 to 2"),
        ("attributes", torch.tensor([0, 1]), "must be integers"),
        ("text", torch.tensor([[1, 2, 3]]), r"must be tokens, int64 \[B, 5\]"),
        ("text", torch.tensor([[1, 2, 3, 4, 259]]), "another model's"),
        ("text", torch.zeros(1, 5), "must be tokens"),
        ("picture", torch.zeros(1, 2, 3), "takes real"),
        ("picture", torch.full((1, 1, 2, 3), torch.inf), "infinite"),
        ("patches", torch.zeros(1, 2, 4, 4), "takes real"),
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
    with pytest.raises(UndiffuseError, match="at least one value"):
        Attributes([2, 0], 4)
    with pytest.raises(UndiffuseError, match="multiple of the heads"):
        Text([], 4, token_width=6, heads=4)
    with pytest.raises(UndiffuseError, match="cannot be cut"):
        Patches([1, 5, 4], 4, patch=2)
    with pytest.raises(UndiffuseError, match="does not fit data"):
        Picture([1, 5, 4], [8])
    with pytest.raises(UndiffuseError, match="did you mean 'length'"):
        Conditions.build({"text": {"kind": "text", "vocabulary": [], "lenght": 3}}, 8)
    with pytest.raises(UndiffuseError, match="4 values for 3 samples"):
        Conditions({"name": make("classes")}).encode({"name": VALUES["classes"]}, 3)
    with pytest.raises(UndiffuseError, match="did you mean 'classes'"):
        Conditions.build({"name": {"kind": "clases", "classes": 3}}, 8)
