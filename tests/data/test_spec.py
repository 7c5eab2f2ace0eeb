from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from undiffuse.data import DataSpec
from undiffuse.data.spec import units_between
from undiffuse.errors import UndiffuseError


def bounded(shape=(1, 4, 4), dtype="uint8", low=0.0, high=255.0, layout="HW", kind="image", **more) -> DataSpec:
    shift, scale = units_between(low, high)
    return DataSpec(kind, shape, dtype, low, high, shift, scale, layout, **more)


STANDARDISED = DataSpec("array", (2, 5), "float32", None, None, (10.0, -3.0), (2.0, 0.5), "CL")
POINTS = DataSpec("points", (3,), "float64", None, None, (1e6, 0.0, -2.0), (1.0, 2.0, 3.0), "D")
SCALARS = DataSpec("points", (1,), "float32", None, None, (5.0,), (2.0,), "")
EVERY = [
    bounded(),
    bounded(high=16.0),
    bounded((3, 4, 5), layout="HWC"),
    bounded((3, 4, 5), layout="CHW", dtype="uint16", high=65535.0),
    bounded((4, 4, 4), layout="HWC", classes=("a", "b"), resize="lanczos"),
    bounded(dtype="int16", low=-32768.0, high=32767.0),
    bounded(dtype="bool", high=1.0),
    bounded((1, 3, 4, 5), layout="ZYX", kind="array", dtype="int64", low=-7.0, high=9.0),
    bounded((2, 3, 4, 5), layout="ZYXC", kind="array"),
    STANDARDISED,
    POINTS,
    SCALARS,
]


def some_values(spec: DataSpec, count: int, seed: int = 0) -> np.ndarray:
    random = np.random.Generator(np.random.PCG64(seed))
    shape = (count, *spec.original_shape)
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "f":
        column = [-1, *(1,) * (len(spec.shape) - 1)]  # the channels come first in every real-valued spec here
        units = random.standard_normal((count, *spec.shape))
        return (units * np.reshape(spec.scale, column) + np.reshape(spec.shift, column)).reshape(shape).astype(dtype)
    assert spec.low is not None
    assert spec.high is not None
    return random.integers(int(spec.low), int(spec.high) + 1, shape).astype(dtype)


@pytest.mark.parametrize("spec", EVERY, ids=lambda spec: f"{spec.kind}-{spec.layout or 'scalar'}-{spec.dtype}")
def test_there_and_back(spec: DataSpec) -> None:
    values = some_values(spec, 7)
    x = spec.to_model(values)
    assert x.dtype == torch.float32
    assert x.shape == (7, *spec.shape)
    back = spec.to_data(x)
    assert back.dtype == values.dtype
    assert back.shape == values.shape
    if values.dtype.kind == "f":
        np.testing.assert_allclose(back, values, rtol=0, atol=2e-6 * max(spec.scale))
    else:
        np.testing.assert_array_equal(back, values)
    assert spec.to_data(spec.to_model(values[:0])).shape == (0, *spec.original_shape)


def test_axes_are_moved_not_reshaped() -> None:
    values = np.zeros((1, 4, 5, 3), np.uint8)
    values[0, 1, 2, :] = (10, 20, 30)
    x = bounded((3, 4, 5), layout="HWC").to_model(values)
    assert x[0, :, 1, 2].tolist() == pytest.approx([(v - 127.5) / 127.5 for v in (10, 20, 30)])


@pytest.mark.parametrize(("dtype", "high"), [("uint8", 255), ("uint16", 65535), ("uint16", 4095)])
def test_trap_D2_every_integer_comes_back(dtype: str, high: int) -> None:
    side = (high + 1) // 16
    values = np.arange(high + 1).astype(dtype).reshape(1, 16, side)
    spec = bounded((1, 16, side), dtype=dtype, high=float(high))
    x = spec.to_model(values)
    assert x.min() == -1
    assert x.max() == 1
    np.testing.assert_array_equal(spec.to_data(x), values)


@given(st.integers(-(2**15), 2**15), st.integers(1, 2**24 - 1), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_any_range_of_integers_comes_back(low: int, span: int, seed: int) -> None:
    spec = bounded((1, 3, 3), dtype="int64", low=float(low), high=float(low + span))
    values = np.random.Generator(np.random.PCG64(seed)).integers(low, low + span + 1, (4, 3, 3))
    np.testing.assert_array_equal(spec.to_data(spec.to_model(values)), values)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.full((3, 4, 4), 17, np.uint8), r"item 0 .*\[0, 16\].*17"),
        (np.full((3, 4, 4), 0.5, np.float32), r"float32 given, uint8 in \[0, 16\] expected"),
        (np.full((3, 4, 4), -1, np.int64), "outside"),
        (np.zeros((3, 4, 5), np.uint8), "4x4"),
        (np.zeros((3, 1, 4, 4), np.uint8), "4x4"),
        (np.zeros((4, 4), np.uint8), "4x4"),
    ],
)
def test_trap_D1_values_of_another_range_or_kind_are_refused(values: np.ndarray, says: str) -> None:
    with pytest.raises(UndiffuseError, match=says):
        bounded(high=16.0).to_model(values)


def test_trap_D1_float_pictures_of_another_range_are_refused() -> None:
    spec = bounded(dtype="float32", high=1.0)
    spec.to_model(np.full((2, 4, 4), 1.0, np.float32))
    for wrong in (-1.0, 1.001, 255.0):
        values = np.full((2, 4, 4), 0.5, np.float32)
        values[1, 2, 3] = wrong
        with pytest.raises(UndiffuseError, match="item 1"):
            spec.to_model(values)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("spec", [STANDARDISED, bounded((2, 5), "float32", high=1.0, layout="CL", kind="array")])
def test_not_finite_is_refused_both_ways(bad: float, spec: DataSpec) -> None:
    values = np.full((4, 2, 5), 0.5, np.float32)
    values[2, 1, 4] = bad
    with pytest.raises(UndiffuseError, match="item 2"):
        spec.to_model(values)
    with pytest.raises(UndiffuseError, match="sample 2"):
        spec.to_data(torch.from_numpy(values))


def test_rounding_is_half_away_and_clipping_is_fixed() -> None:
    spec = bounded((1, 1, 5), high=2.0)
    x = torch.tensor([-3.0, -0.5, -0.501, 0.5, 3.0]).reshape(1, 1, 1, 5)  # values -2, 0.5, 0.499, 1.5, 4
    assert spec.to_data(x).ravel().tolist() == [0, 1, 0, 2, 2]
    signed = bounded((1, 1, 3), "int8", -2.0, 2.0)
    assert signed.to_data(torch.tensor([-0.75, -0.25, 0.25]).reshape(1, 1, 1, 3)).ravel().tolist() == [-2, -1, 1]


def test_trap_D4_saving_does_not_depend_on_the_other_pixels() -> None:
    spec = bounded()
    x = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.2 - 0.1
    alone, images = spec.to_data(x), spec.to_images(x)
    x[:, :, 0, 0] = 40.0  # one wild pixel a picture: the others stay as they are
    np.testing.assert_array_equal(spec.to_data(x)[:, 1:], alone[:, 1:])
    for before, after in zip(images, spec.to_images(x), strict=True):
        np.testing.assert_array_equal(before[1:], after[1:])
    assert alone.max() - alone.min() < 40  # a dull picture stays dull


def test_unbounded_integers_saturate_instead_of_wrapping() -> None:
    spec = DataSpec("points", (2,), "uint8", None, None, (100.0, 10.0), (50.0, 5.0), "D")
    assert spec.to_data(torch.tensor([[4.0, -9.0]])).tolist() == [[255, 0]]


def test_pictures() -> None:
    grey = bounded(high=16.0)
    (image,) = grey.to_images(torch.tensor([-1.0, 0.0, 1.0, 5.0] * 4).reshape(1, 1, 4, 4))
    assert image.shape == (4, 4)
    assert image.dtype == np.uint8
    assert image[0].tolist() == [0, 128, 255, 255]
    deep = bounded((1, 1, 3), "uint16", high=65535.0)
    assert deep.to_images(deep.to_model(np.array([[[0, 257 * 7, 65535]]], np.uint16)))[0].ravel().tolist() == [
        0,
        7,
        255,
    ]
    rgb = bounded((3, 2, 2), layout="CHW")
    values = np.arange(12, dtype=np.uint8).reshape(1, 3, 2, 2)
    np.testing.assert_array_equal(rgb.to_images(rgb.to_model(values))[0], np.moveaxis(values[0], 0, -1))
    rgba = bounded((4, 1, 2), layout="HWC")
    pixels = np.array([[[[200, 10, 0, 255], [200, 10, 0, 0]]]], np.uint8)
    assert rgba.to_images(rgba.to_model(pixels))[0].tolist() == [[[200, 10, 0], [255, 255, 255]]]
    field = DataSpec("array", (1, 1, 3), "float32", None, None, (5.0,), (2.0,), "HW")
    assert field.to_images(torch.tensor([-3.0, 0.0, 3.0]).reshape(1, 1, 1, 3))[0].ravel().tolist() == [0, 128, 255]
    for spec in (POINTS, STANDARDISED):
        assert not spec.has_pictures
        with pytest.raises(UndiffuseError, match="pictures"):
            spec.to_images(torch.zeros(1, *spec.shape))


@pytest.mark.parametrize("spec", EVERY, ids=repr)
def test_json_there_and_back(spec: DataSpec) -> None:
    assert DataSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_json_refuses_what_it_does_not_know() -> None:
    plain = bounded().to_json()
    with pytest.raises(UndiffuseError, match="'shfit': did you mean 'shift'"):
        DataSpec.from_json({**plain, "shfit": [0]})
    with pytest.raises(UndiffuseError, match="scale missing"):
        DataSpec.from_json({key: value for key, value in plain.items() if key != "scale"})
    wrong = {"shape": "1x4x4", "low": "0", "scale": [True], "dtype": "colour", "classes": [1], "layout": 3, "resize": 1}
    for key, value in wrong.items():
        with pytest.raises(UndiffuseError, match=key):
            DataSpec.from_json({**plain, key: value})


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "picture"},
        {"shape": ()},
        {"shape": (1, 0, 4)},
        {"dtype": "complex64"},
        {"low": None},
        {"low": 255.0, "high": 0.0},
        {"high": 16.0},
        {"shift": (0.0, 0.0)},
        {"scale": (0.0,)},
        {"scale": (float("nan"),)},
        {"layout": "CHWX"},
        {"layout": "HH"},
        {"shape": (3, 4, 4)},
    ],
    ids=repr,
)
def test_a_spec_that_contradicts_itself_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(UndiffuseError):
        replace(bounded(), **change)  # type: ignore[arg-type]


def test_what_a_spec_states_leaves_out_what_it_does_not_know() -> None:
    """A field that a later version adds, at its default, must not change the fingerprints of data that are there."""
    shift, scale = units_between(0, 255)
    plain = DataSpec("image", (1, 8, 8), "uint8", 0.0, 255.0, shift, scale, "HW")
    assert "vocabulary" not in plain.stated
    assert plain.stated != replace(plain, vocabulary=("a", "b")).stated
    assert plain.stated != replace(plain, classes=("a", "b")).stated
    assert plain.stated != replace(plain, low=None, high=None).stated
