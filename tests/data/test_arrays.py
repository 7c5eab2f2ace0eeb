from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from undiffuse.data import arrays, from_array, open_dataset
from undiffuse.errors import UndiffuseError, UndiffuseWarning


def some(*shape: int, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    random = np.random.Generator(np.random.PCG64(seed))
    if np.dtype(dtype).kind == "f":
        return random.standard_normal(shape).astype(dtype) * 3 + 5
    values = random.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)
    values.flat[0], values.flat[-1] = 0, np.iinfo(dtype).max
    return values


RECOGNISED = [
    # shape, dtype, channels -> kind, shape of an item for the network, layout
    ((9,), "float32", None, "points", (1,), ""),
    ((9, 2), "float64", None, "points", (2,), "D"),
    ((9, 8, 8), "uint8", None, "image", (1, 8, 8), "HW"),
    ((9, 8, 6), "uint16", None, "image", (1, 8, 6), "HW"),
    ((9, 8, 6, 3), "uint8", None, "image", (3, 8, 6), "HWC"),
    ((9, 3, 8, 6), "uint8", None, "image", (3, 8, 6), "CHW"),
    ((9, 1, 8, 6), "uint8", None, "image", (1, 8, 6), "CHW"),
    ((9, 8, 6, 4), "uint8", None, "image", (4, 8, 6), "HWC"),
    ((9, 3, 4, 4), "uint8", None, "image", (3, 4, 4), "CHW"),
    ((9, 4, 4, 3), "uint8", None, "image", (3, 4, 4), "HWC"),
    ((9, 1, 50), "float32", None, "array", (1, 50), "CL"),
    ((9, 2, 50), "float32", None, "array", (2, 50), "CL"),
    ((9, 50, 2), "float32", 2, "array", (2, 50), "LC"),
    ((9, 12, 50), "float32", 12, "array", (12, 50), "CL"),
    ((9, 12, 50), "float32", None, "array", (1, 12, 50), "HW"),
    ((9, 2, 8, 6), "uint8", None, "array", (2, 8, 6), "CHW"),
    ((9, 13, 16, 16), "float32", None, "array", (13, 16, 16), "CHW"),
    ((9, 16, 16, 13), "float32", None, "array", (13, 16, 16), "HWC"),
    ((9, 16, 16, 16), "float32", None, "array", (1, 16, 16, 16), "ZYX"),
    ((9, 1, 6, 7, 8), "float32", None, "array", (1, 6, 7, 8), "CZYX"),
    ((9, 6, 7, 8, 3), "uint8", None, "array", (3, 6, 7, 8), "ZYXC"),
    ((9, 4, 8), "uint8", 4, "array", (4, 8), "CL"),
]


@pytest.mark.parametrize(("shape", "dtype", "channels", "kind", "seen", "layout"), RECOGNISED)
def test_what_an_array_is(shape, dtype, channels, kind, seen, layout) -> None:
    values = some(*shape, dtype=dtype)
    data = from_array(values, channels=channels)
    assert (data.spec.kind, data.spec.shape, data.spec.layout) == (kind, seen, layout)
    assert data.spec.dtype == dtype
    x, cond = data.batch([3, 1])
    assert x.shape == (2, *seen)
    assert cond == {}
    back = data.spec.to_data(x)
    assert back.shape == (2, *shape[1:])
    assert back.dtype == values.dtype
    np.testing.assert_allclose(back, values[[3, 1]], rtol=0, atol=0 if values.dtype.kind in "ui" else 1e-5)
    np.testing.assert_array_equal(data.values([3, 1]), values[[3, 1]])


@pytest.mark.parametrize(
    ("shape", "channels"),
    [
        ((9, 3, 8, 3), None),
        ((9, 4, 4, 4), None),
        ((9, 8, 8, 3), 4),
        ((9, 8, 8), 3),
        ((9, 2), 2),
        ((9, 8, 8, 8, 8), None),
    ],
)
def test_what_cannot_be_told_is_refused(shape, channels) -> None:
    with pytest.raises(UndiffuseError, match="channels"):
        from_array(some(*shape), channels=channels)


def test_unbounded_data_are_standardised_by_channel() -> None:
    values = some(500, 3, 20, dtype="float32") * np.array([1, 10, 100], np.float32)[:, None] + 1000
    data = from_array(values)
    assert not data.spec.bounded
    np.testing.assert_allclose(data.spec.shift, values.astype(np.float64).mean(axis=(0, 2)), rtol=1e-12)
    np.testing.assert_allclose(data.spec.scale, values.astype(np.float64).std(axis=(0, 2)), rtol=1e-9)
    x, _ = data.batch(range(500))
    assert x.mean(dim=(0, 2)).abs().max() < 1e-4
    assert (x.std(dim=(0, 2)) - 1).abs().max() < 1e-3


def test_measuring_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = some(101, 2, 7, dtype="float64")
    whole = from_array(values)
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 1000)
    pieces = from_array(values)
    np.testing.assert_allclose(pieces.spec.shift, whole.spec.shift, rtol=1e-13)
    np.testing.assert_allclose(pieces.spec.scale, whole.spec.scale, rtol=1e-13)
    values[77, 1, 3] = np.nan
    with pytest.raises(UndiffuseError, match="item 77"):
        from_array(values)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0)])
def test_trap_D1_bounds_are_taken_only_if_both_are_reached(low: float, high: float) -> None:
    values = np.linspace(low, high, 5 * 64, dtype=np.float32).reshape(5, 1, 8, 8)
    data = from_array(values)
    assert (data.spec.low, data.spec.high, data.spec.kind) == (low, high, "image")
    assert data.batch(range(5))[0].min() == -1
    assert data.batch(range(5))[0].max() == 1
    for almost in (values * 0.99, values + 0.01, values * 255):
        data = from_array(almost)
        assert not data.spec.bounded
        assert abs(float(data.batch(range(5))[0].std()) - 1) < 0.01


@pytest.mark.parametrize(
    ("values", "bounds"),
    [
        (np.arange(5 * 16, dtype=np.uint8).reshape(5, 4, 4) % 17, (0, 16)),
        (np.arange(5 * 16, dtype=np.uint16).reshape(5, 4, 4) * 51, (0, 79 * 51)),
        (np.arange(5 * 16, dtype=np.uint8).reshape(5, 4, 4) % 2, (0, 1)),
    ],
)
def test_trap_D1_integers_far_below_their_type_get_their_own_range(values, bounds) -> None:
    with pytest.warns(UndiffuseWarning, match=f"range is taken as \\[0, {bounds[1]}\\]"):
        data = from_array(values)
    assert (data.spec.low, data.spec.high) == bounds
    x, _ = data.batch(range(5))
    assert (x.min(), x.max()) == (-1, 1)
    np.testing.assert_array_equal(data.spec.to_data(x), values)


def test_other_integers() -> None:
    data = from_array(np.arange(-40, 40, dtype=np.int64).reshape(5, 4, 4))
    assert (data.spec.low, data.spec.high, data.spec.dtype) == (-40, 39, "int64")
    data = from_array(np.arange(80).reshape(5, 4, 4) % 3 == 0)
    assert (data.spec.low, data.spec.high, data.spec.dtype) == (0, 1, "bool")
    np.testing.assert_array_equal(data.spec.to_data(data.batch([1])[0]), data.values([1]))
    with pytest.raises(UndiffuseError, match="span"):
        from_array(np.arange(80, dtype=np.int64).reshape(5, 4, 4) * 2**20)
    points = from_array(np.arange(80, dtype=np.int32).reshape(40, 2))
    assert not points.spec.bounded
    np.testing.assert_array_equal(points.spec.to_data(points.batch(range(40))[0]), points.values(range(40)))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.array([[1.0, np.nan], [1, 2]]), "item 0 has NaN"),
        (np.array([[1.0, 2], [1, -np.inf]]), "item 1 has NaN or infinite"),
        (np.zeros((3, 4, 4), np.uint8), "nothing to learn"),
        (np.zeros((0, 4, 4), np.uint8), "no items"),
        (np.zeros((4, 0)), "no items"),
        (np.float32(3), "no items"),
        (np.zeros((3, 2), np.complex64), "complex64"),
        (np.zeros((3, 2), "U4"), "cannot be used"),
        (np.zeros((3, 2), "datetime64[s]"), "cannot be used"),
        (np.zeros(3, [("a", "f4")]), "cannot be used"),
        (np.array([[1, "a"]], object), "pickled"),
        (some(3, 2, 2, 2, 2, 2), "three spatial"),
    ],
)
def test_useless_arrays_are_refused(values, says) -> None:
    with pytest.raises(UndiffuseError, match=says):
        from_array(values)


def test_a_constant_channel_is_kept_and_said() -> None:
    values = some(20, 2, 9, dtype="float32")
    values[:, 1] = 7
    with pytest.warns(UndiffuseWarning, match="channel 1 is constant"):
        data = from_array(values)
    np.testing.assert_allclose(data.spec.to_data(data.batch([0])[0])[0], values[0], rtol=1e-5)


def test_labels() -> None:
    values = some(6, 4, 4)
    data = from_array(values, np.array([7, 1, 7, 2, 1, 1]))
    assert data.spec.classes == ("1", "2", "7")
    assert data.batch(range(6))[1]["classes"].tolist() == [2, 0, 2, 1, 0, 0]
    assert from_array(values, np.array(["b", "a", "b", "a", "a", "b"])).spec.classes == ("a", "b")
    for wrong in (np.arange(5), np.zeros((6, 2), int), np.linspace(0, 1, 6), np.array([None] * 6)):
        with pytest.raises(UndiffuseError, match="labels"):
            from_array(values, wrong)
    with pytest.raises(UndiffuseError, match="not classes"):
        from_array(some(40, 4, 4), np.arange(40))


# ---- files ----


def test_npy_is_mapped_not_read(tmp_path: Path) -> None:
    values = some(50, 8, 8)
    np.save(tmp_path / "a.npy", values)
    data = open_dataset(str(tmp_path / "a.npy"))
    assert isinstance(data._values, np.memmap)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(data.values([49, 0]), values[[49, 0]])
    assert type(data.values([0])) is np.ndarray
    assert data.describe() == "50 images 8x8x1 uint8 [0, 255]"


@pytest.mark.parametrize("dtype", [">f4", "<f4", ">u2", ">i8"])
def test_byte_order_and_memory_order_do_not_matter(tmp_path: Path, dtype: str) -> None:
    values = some(20, 3, 8, dtype=np.dtype(dtype).newbyteorder("=").name)
    values = values % 1000 if values.dtype.kind != "f" else values
    np.save(tmp_path / "a.npy", np.asfortranarray(values.astype(dtype)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndiffuseWarning)
        data = open_dataset(str(tmp_path / "a.npy"), channels=3)
    found = data.values(range(20))
    assert found.dtype.isnative
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("key", ["x", "data", "images", "arr_0"])
@pytest.mark.parametrize("label", ["labels", "y", None])
def test_npz(tmp_path: Path, key: str, label: str | None) -> None:
    contents: dict[str, Any] = {key: some(12, 8, 8)} | ({label: np.arange(12) % 3} if label else {})
    np.savez_compressed(tmp_path / "a.npz", **contents)
    data = open_dataset(str(tmp_path / "a.npz"))
    assert data.describe() == "12 images 8x8x1 uint8 [0, 255]" + (", 3 classes" if label else "")
    np.testing.assert_array_equal(data.values(range(12)), contents[key])


def test_npz_that_is_not_clear_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"pixels": some(3, 4, 4)}, "has pixels; name the items"),
        ({"x": some(3, 4, 4), "data": some(3, 4, 4)}, "has x and data"),
        ({"x": some(3, 4, 4), "labels": np.arange(3), "y": np.arange(3)}, "both labels and y"),
        ({"x": np.array([1, None])}, "pickled"),
        ({"x": some(3, 4, 4), "y": np.array([1, None, 2])}, "pickled"),
    ]
    for contents, says in cases:
        np.savez(path, **contents)
        with pytest.raises(UndiffuseError, match=says):
            open_dataset(str(path))


def test_broken_files_are_refused_by_name(tmp_path: Path) -> None:
    np.save(tmp_path / "good.npy", some(50, 8, 8))
    np.savez(tmp_path / "good.npz", x=some(50, 8, 8))
    np.save(tmp_path / "object.npy", np.array([1, None]))
    for name in ("good.npy", "good.npz"):
        data = (tmp_path / name).read_bytes()
        for at in (0, 3, 60, 200, len(data) - 1):
            path = tmp_path / f"cut-{at}{Path(name).suffix}"
            path.write_bytes(data[:at])
            with pytest.raises(UndiffuseError, match=f"cut-{at}"):
                open_dataset(str(path))
        path = tmp_path / f"text{Path(name).suffix}"
        path.write_text("no array at all")
        with pytest.raises(UndiffuseError, match="text"):
            open_dataset(str(path))
    with pytest.raises(UndiffuseError, match="pickled"):
        open_dataset(str(tmp_path / "object.npy"))


def test_nothing_is_ever_unpickled(tmp_path: Path) -> None:
    flag = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return (flag.touch, ())

    np.save(tmp_path / "a.npy", np.array([Trap()], object))
    np.savez(tmp_path / "b.npz", x=np.array([Trap()], object))
    (tmp_path / "c.npy").write_bytes(pickle.dumps(Trap()))
    for name in ("a.npy", "b.npz", "c.npy"):
        with pytest.raises(UndiffuseError):
            open_dataset(str(tmp_path / name))
    assert not flag.exists()


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    values = some(20, 4, 4)
    first = from_array(values).fingerprint
    np.save(tmp_path / "a.npy", values)
    assert open_dataset(str(tmp_path / "a.npy")).fingerprint == first
    changed = values.copy()
    changed[11, 2, 2] ^= 1
    assert from_array(changed).fingerprint != first
    assert from_array(values[::-1]).fingerprint != first
    assert from_array(values.reshape(20, 2, 8)).fingerprint != first
    labelled = from_array(values, np.arange(20) % 2).fingerprint
    assert labelled != first
    assert from_array(values, 1 - np.arange(20) % 2).fingerprint != labelled  # the same classes, other items
    assert from_array(values, image_size=(8, 8)).fingerprint != first


# ---- resizing ----


@pytest.mark.parametrize("shape", [(6, 8, 8), (6, 8, 12, 3), (6, 3, 12, 8)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_images_are_resized(shape, dtype: str) -> None:
    data = from_array(some(*shape, dtype=dtype), np.arange(6) % 2, image_size=(4, 6))
    assert data.spec.shape[1:] == (4, 6)
    assert data.spec.resize == "lanczos"
    assert data.spec.classes == ("0", "1")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1] * 3
    data.batch(range(6))  # Lanczos does not leave the bounds


def test_only_images_are_resized() -> None:
    with pytest.raises(UndiffuseError, match="image_size is for images"):
        from_array(some(6, 2, 9, dtype="float32"), image_size=(4, 4))
    values = some(6, 8, 8)
    assert from_array(values, image_size=(8, 8)).spec.resize is None


# ---- splitting ----


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.floats(0.01, 0.99),
    st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_split(sizes: list[int], held_out: float, seed: int) -> None:
    labels = np.random.Generator(np.random.PCG64(seed)).permutation(np.repeat(np.arange(len(sizes)), sizes))
    count = len(labels)
    values = np.arange(count, dtype=np.float64)[:, None] + [0, 0.5]
    if count < 2 or len(sizes) > max(10, count // 2):
        return
    if max(sizes) == 1:
        with pytest.raises(UndiffuseError, match="one item"):
            from_array(values, labels).split(held_out, seed)
        return
    data = from_array(values, labels)
    train, rest = data.split(held_out, seed)
    taken = np.concatenate([part.values(range(len(part)))[:, 0] for part in (train, rest)])
    assert sorted(taken) == list(range(count))  # every item once
    assert train.labels is not None
    assert rest.labels is not None
    np.testing.assert_array_equal(np.unique(train.labels), np.arange(len(sizes)))
    for label, size in enumerate(sizes):
        assert abs((rest.labels == label).sum() - size * held_out) <= max(1, size * held_out - (size - 1))
    if all(size * held_out <= size - 1 for size in sizes):  # no class has to keep its last item
        assert abs(len(rest) - count * held_out) <= 1
    np.testing.assert_array_equal(train.read(range(len(train)))[1], train.labels)
    again = data.split(held_out, seed)
    assert [part.fingerprint for part in again] == [train.fingerprint, rest.fingerprint]
    assert train.fingerprint != rest.fingerprint


def test_split_depends_on_the_seed_and_nests() -> None:
    data = from_array(np.arange(100.0)[:, None])
    one, two = (data.split(0.2, seed)[1].values(range(20)) for seed in (0, 1))
    assert set(one.ravel()) != set(two.ravel())
    train, _ = data.split(0.2, 0)
    smaller, _ = train.split(0.5, 0)
    assert len(smaller) == 40
    assert set(smaller.values(range(40)).ravel()) <= set(train.values(range(80)).ravel())
    for wrong in (0, 1, -0.1, 2, float("nan")):
        with pytest.raises(UndiffuseError, match="held_out"):
            data.split(wrong, 0)
    with pytest.raises(UndiffuseError, match="one item"):
        from_array(np.arange(16.0).reshape(1, 4, 4)).split(0.5, 0)


def test_indices_are_checked() -> None:
    data = from_array(some(5, 4, 4))
    for wrong in ([5], [-1], [0, 7]):
        with pytest.raises(IndexError):
            data.batch(wrong)
    for wrong in ([0.5], [[0]], [True]):
        with pytest.raises(TypeError):
            data.batch(np.array(wrong))
    assert data.batch([])[0].shape == (0, 1, 4, 4)
    data.values([0])[:] = 0  # a copy: the data cannot be changed by accident
    assert data.values([0]).any()
