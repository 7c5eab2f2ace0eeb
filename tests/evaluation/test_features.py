"""Features: both sides enter by one door, the filter is in the name, and a cache never answers for something else."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from undiffuse import UndiffuseError, UndiffuseWarning, from_array, open_dataset
from undiffuse.data import Dataset, DataSpec
from undiffuse.evaluation.extraction import (
    FEATURES,
    PLANS,
    batches,
    default_features,
    extract,
    make_features,
    pick,
    reference_features,
)
from undiffuse.evaluation.features import PCA, Features, Identity, ModelUnits, Pixels, rgb8
from undiffuse.evaluation.resizing import RESIZERS, pil_bicubic, tf1_bilinear


def pictures(count: int = 6, channels: int = 3, size: int = 8, seed: int = 0, high: int = 256) -> np.ndarray:
    random = np.random.Generator(np.random.PCG64(seed))
    values = random.integers(0, high, (count, size, size, channels), dtype=np.uint8)
    values[0, 0, 0], values[0, 0, 1] = 0, high - 1
    return values


class Moments(nn.Module):
    """Mean and mean square a channel: a network whose answer is known."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return torch.cat([x.mean((2, 3)), x.square().mean((2, 3))], 1), x.mean((2, 3))


def of_pixels(spec: DataSpec, resize: str = "pil-bicubic", size: int = 13) -> Features:
    pixels = Pixels((size, size), resize, (128.0,) * 3, (128.0,) * 3)
    return Features(f"moments/{resize}", spec, pixels, Moments(), 6, batch_size=4)


# --- units: one door --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_trap_V3_uint8_and_floats_of_one_picture_give_the_same_features(span: tuple, dtype: type) -> None:
    values = pictures()
    features = of_pixels(from_array(values).spec)
    floats = (span[0] + values.astype(np.float64) / 255 * (span[1] - span[0])).astype(dtype)
    assert torch.equal(features(values), features(floats, span=span))
    if span != (0.0, 255.0):  # from 0 to 1, or -1 to 1, exactly: what the range is shows
        assert torch.equal(features(values), features(floats))
        assert torch.equal(features(values), extract(features, from_array(floats)).features)


def test_trap_V3_a_range_is_never_guessed() -> None:
    features = of_pixels(from_array(pictures()).spec)
    with pytest.raises(UndiffuseError, match=r"say which range of theirs stands for it.*span=\(0, 1\)"):
        features(pictures().astype(np.float32) / 256)
    with pytest.raises(UndiffuseError, match=r"samples leave their range \[0, 1\]: they span \[0, 255\]; clip them"):
        features(pictures().astype(np.float32), span=(0, 1))
    nan = pictures().astype(np.float32) / 255
    nan[2, 0, 0, 0] = np.nan
    with pytest.raises(UndiffuseError, match="NaN"):
        features(nan, span=(0, 1))
    for span in [(1, 0), (0, np.inf), (0, 0)]:
        with pytest.raises(UndiffuseError, match="two finite numbers in order"):
            features(nan, span=span)


@pytest.mark.parametrize("wrong", [np.int64(300), np.int64(-1), np.uint16(65535), np.int8(-5)])
def test_trap_V3_whole_numbers_out_of_range_do_not_wrap_around(wrong: np.integer) -> None:
    features = of_pixels(from_array(pictures()).spec)
    values = np.zeros((2, 8, 8, 3), wrong.dtype)
    assert features(values).equal(features(values.astype(np.uint8)))
    values[1, 2, 3, 0] = wrong
    with pytest.raises(UndiffuseError, match=r"samples leave their range \[0, 255\]"):
        features(values)


def test_masks_are_black_and_white() -> None:
    features = of_pixels(from_array(pictures()).spec)
    mask = pictures() > 127
    assert features(mask).equal(features(np.where(mask, np.uint8(255), np.uint8(0))))


def test_trap_V9_both_sides_are_rounded_like_the_data() -> None:
    values = pictures()
    features = of_pixels(from_array(values).spec)
    random = np.random.Generator(np.random.PCG64(1))
    off = values / 255 + random.uniform(-0.49, 0.49, values.shape) / 255  # as a network leaves them
    assert torch.equal(features(values), features(off.clip(0, 1), span=(0, 1)))
    further = np.where(values < 255, values + 0.51, values) / 255
    assert not torch.equal(features(values), features(further, span=(0, 1)))


def test_trap_V9_pictures_of_data_with_17_levels_are_rounded_to_17_levels(tmp_path: Path) -> None:
    digits = open_dataset("digits")
    features = Identity().fit(digits)
    values = digits.values(range(20))
    for number, item in enumerate(values):
        shown = digits.spec.to_images(digits.spec.to_model(item[None]))[0]
        Image.fromarray(shown).save(tmp_path / f"{number:02}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndiffuseWarning)
        found = extract(features, tmp_path)
    assert torch.equal(found.features, features(values))
    Image.fromarray(np.full((8, 8), 100, np.uint8)).save(tmp_path / "99.png")  # 100/255 * 16 = 6.27...
    assert torch.equal(extract(features, tmp_path).features[-1], features(np.full((1, 8, 8), 6, np.uint8))[0])


def test_darker_samples_of_the_same_type_keep_their_units() -> None:
    """The bounds of an integer array are measured; samples that miss the brightest level are not stretched."""
    bright, dark = pictures(high=200), pictures(high=150)
    with pytest.warns(UndiffuseWarning) if bright.max() < 128 else warnings.catch_warnings():
        spec = from_array(bright).spec
    features = of_pixels(spec)
    assert torch.equal(extract(features, from_array(dark)).features, features(dark))
    with pytest.warns(UndiffuseWarning, match="range is taken"):
        very_dark = from_array(pictures(high=60))
    assert torch.equal(extract(features, very_dark).features, features(pictures(high=60)))


@given(st.integers(0, 2**16), st.sampled_from(["HWC", "CHW"]), st.sampled_from(["HWC", "CHW"]), st.sampled_from([1, 3]))
@settings(deadline=None, max_examples=20)
def test_channels_first_and_last_are_the_same_pictures(seed: int, mine: str, theirs: str, channels: int) -> None:
    values = pictures(3, channels, 6, seed)
    put = {"HWC": values, "CHW": np.ascontiguousarray(values.transpose(0, 3, 1, 2))}
    reference, samples = from_array(put[mine]), from_array(put[theirs])
    features = of_pixels(reference.spec)
    assert torch.equal(extract(features, reference).features, extract(features, samples).features)
    assert torch.equal(features(put[theirs]), extract(features, reference).features)
    if channels == 1:
        assert torch.equal(features(values[..., 0]), extract(features, reference).features)


def test_other_shapes_are_refused_with_the_remedy() -> None:
    features = of_pixels(from_array(pictures()).spec)
    with pytest.raises(
        UndiffuseError, match=r"samples are 3x16x16, the data 3x8x8: bring both to one size.*image-size"
    ):
        extract(features, from_array(pictures(size=16)))
    with pytest.raises(UndiffuseError, match="samples have shape"):
        features(pictures(size=16))
    with pytest.raises(UndiffuseError, match="no samples"):
        features(pictures()[:0])
    with pytest.raises(UndiffuseError, match="are no numbers"):
        features(pictures().astype(str))
    with pytest.raises(UndiffuseError, match="span is for bare arrays"):
        extract(features, from_array(pictures()), span=(0, 1))
    points = from_array(np.random.Generator(np.random.PCG64(0)).normal(size=(9, 2)).astype(np.float32))
    with pytest.raises(UndiffuseError, match="for images, the data are points"):
        of_pixels(points.spec)(points.values([0, 1]))
    with pytest.raises(UndiffuseError, match="span"):
        Identity().fit(points)(points.values([0]), span=(0, 1))


def test_rgb8_agrees_with_its_slow_way() -> None:
    for channels in (1, 3, 4):
        values = pictures(channels=channels)
        spec = from_array(values).spec
        shown = np.stack(spec.to_images(spec.to_model(values)))
        shown = shown if shown.ndim == 4 else np.repeat(shown[..., None], 3, -1)
        assert np.array_equal(rgb8(values, spec).permute(0, 2, 3, 1).numpy(), shown)


# --- resizing ---------------------------------------------------------------------------------------------------------


def circle(size: int) -> np.ndarray:
    """clean-fid's picture: a thin bright ring on black, which a filter without antialiasing tears to pieces."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return np.where(np.abs(np.hypot(x, y) - 0.4 * size) < 1, 255.0, 0.0).astype(np.float32)


@pytest.mark.parametrize("sizes", [(512, 128), (128, 299), (96, 31), (28, 299), (64, 64)])
def test_trap_V2_bicubic_is_pillows_on_a_circle(sizes: tuple[int, int]) -> None:
    before, after = sizes
    expected = Image.fromarray(circle(before)).resize((after, after), Image.Resampling.BICUBIC)
    found = pil_bicubic(torch.from_numpy(circle(before))[None, None], (after, after))[0, 0].numpy()
    assert np.abs(found - np.asarray(expected).clip(0, 255)).max() < 5e-3  # of 255: float32 places


def test_trap_V2_the_filters_differ_where_it_matters_and_are_named() -> None:
    ring = torch.from_numpy(circle(512))[None, None]
    clean, aliased = pil_bicubic(ring, (64, 64)), tf1_bilinear(ring, (64, 64))
    assert float((clean - aliased).abs().mean()) > 3
    # around the ring an antialiased one has the same brightness everywhere, an aliased one has gaps
    y, x = np.mgrid[:64, :64] - 31.5
    band = torch.from_numpy(np.abs(np.hypot(x, y) - 0.4 * 64) < 0.5)
    assert float(aliased[0, 0][band].std()) > 2 * float(clean[0, 0][band].std())
    spec = from_array(pictures()).spec
    both = [of_pixels(spec, resize) for resize in RESIZERS]
    assert len({features.name for features in both}) == 2
    assert len({features.fingerprint for features in both}) == 2
    assert all(
        resize in features.name and resize in features.preprocessing
        for features, resize in zip(both, RESIZERS, strict=True)
    )
    with pytest.raises(UndiffuseError, match="unknown resize filter 'pil-bicubik': did you mean 'pil-bicubic'"):
        of_pixels(spec, "pil-bicubik")(pictures())


@pytest.mark.parametrize(("height", "width", "out"), [(5, 7, 11), (32, 20, 9), (1, 3, 4)])
def test_tf1_bilinear_against_its_definition_and_grid_sample(height: int, width: int, out: int) -> None:
    x = torch.rand(1, 2, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = tf1_bilinear(x, (out, out + 1))
    for i in range(out):
        for j in range(out + 1):
            v, u = i * height / out, j * width / (out + 1)
            top, left = int(v), int(u)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            a, b = v - top, u - left
            upper = (1 - b) * x[0, :, top, left] + b * x[0, :, top, right]
            lower = (1 - b) * x[0, :, bottom, left] + b * x[0, :, bottom, right]
            assert torch.allclose(found[0, :, i, j], (1 - a) * upper + a * lower, atol=1e-12)
    rows, columns = torch.arange(out) * height / out, torch.arange(out + 1) * width / (out + 1)
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).double()
    grid = (2 * grid + 1) / torch.tensor([width, height]) - 1
    sampled = F.grid_sample(x, grid[None], padding_mode="border", align_corners=False)
    assert torch.allclose(found, sampled, atol=1e-6)


# --- identity and PCA -------------------------------------------------------------------------------------------------


def test_identity_is_the_data_as_they_are() -> None:
    data = open_dataset("moons")
    features = make_features(None, data)
    assert features.name == "identity"
    assert np.array_equal(extract(features, data).features.numpy(), data.values(range(len(data))))
    with pytest.raises(UndiffuseError, match="choose pca"):
        Identity(largest=10).fit(open_dataset("digits"))


def test_pca_is_scikit_learns() -> None:
    from sklearn.decomposition import PCA as Other

    data = open_dataset("digits")
    features = PCA(dim=10).fit(data)
    x = data.batch(range(len(data)))[0].flatten(1).double().numpy()
    other = Other(10, svd_solver="full").fit(x)
    expected, found = other.transform(x), extract(features, data).features.double().numpy()
    signs = np.sign((expected * found).sum(0))
    assert np.abs(expected * signs - found).max() < 1e-4
    assert features.facts["variance_explained"] == pytest.approx(other.explained_variance_ratio_.sum(), rel=1e-6)


def test_pca_of_fewer_items_than_numbers_keeps_all_distances() -> None:
    data = from_array(pictures(12, size=8))
    features = PCA(dim=64).fit(data)
    assert features.dim == 11
    x = data.batch(range(12))[0].flatten(1)
    assert torch.allclose(torch.cdist(x, x), torch.cdist(*[extract(features, data).features] * 2), atol=1e-3)


# --- extraction -------------------------------------------------------------------------------------------------------


def test_features_do_not_depend_on_batches_or_order() -> None:
    data = from_array(pictures(11))
    features = of_pixels(data.spec)
    whole = extract(features, data).features
    assert torch.allclose(extract(replace(features, batch_size=3), data).features, whole, atol=1e-5)
    order = np.random.Generator(np.random.PCG64(0)).permutation(11)
    assert torch.allclose(extract(features, data, order).features, whole[order], atol=1e-5)
    assert [len(part) for part, _ in batches(features, data)] == [4, 4, 3]


def test_folder_array_and_file_are_one_source(tmp_path: Path) -> None:
    values = pictures(5)
    np.save(tmp_path / "samples.npy", values)
    (tmp_path / "folder").mkdir()
    for number, item in enumerate(values):
        Image.fromarray(item).save(tmp_path / "folder" / f"{number}.png")
    features = of_pixels(from_array(values).spec)
    expected = features(values)
    for source in (values, from_array(values), tmp_path / "samples.npy", str(tmp_path / "folder")):
        assert torch.equal(extract(features, source).features, expected)
    found = extract(features, values)
    assert found.probabilities is not None
    assert torch.allclose(found.probabilities.sum(1), torch.ones(5))
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(UndiffuseError, match=r"broken.npy: not a readable"):
        extract(features, tmp_path / "broken.npy")
    with pytest.raises(UndiffuseError, match="no data at"):
        extract(features, tmp_path / "nothing")


def test_an_error_in_the_reading_thread_is_the_callers() -> None:
    class Broken(Moments):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            return x.flatten(1)[:, :6] * torch.nan, None

    data = from_array(pictures())
    features = Features("broken", data.spec, ModelUnits(), Broken(), 6)
    with pytest.raises(UndiffuseError, match="broken: the network made NaN"):
        extract(features, data)
    for source, index in ((data, 99), (data, -1), (pictures(), -1)):
        with pytest.raises(IndexError):
            extract(of_pixels(data.spec), source, np.array([index]))


def test_fingerprints_know_weights_units_and_preprocessing() -> None:
    data = open_dataset("digits")
    features = PCA(8).fit(data)
    other = PCA(8, most=900).fit(data)
    assert features.weights != other.weights
    assert features.fingerprint == PCA(8).fit(data).fingerprint
    same_numbers = replace(data.spec, high=15.0, shift=(7.5,), scale=(7.5,))
    prints = {f.fingerprint for f in (features, other, PCA(7).fit(data), replace(features, spec=same_numbers))}
    assert len(prints) == 4


def test_default_features_need_nothing_but_the_data() -> None:
    digits = open_dataset("digits")
    assert default_features(digits) == "classifier"
    assert default_features(from_array(pictures())) == "autoencoder"
    assert default_features(open_dataset("moons")) == "identity"
    sound = from_array(np.random.Generator(np.random.PCG64(0)).normal(size=(9, 1, 64)).astype(np.float32), channels=1)
    assert default_features(sound) == "pca"
    with pytest.raises(UndiffuseError, match="unknown features 'inceptoin': did you mean 'inception'"):
        make_features("inceptoin", digits)
    assert set(FEATURES) >= {"identity", "pca", "classifier", "autoencoder", "inception", "dinov2", "clip"}


# --- which items ------------------------------------------------------------------------------------------------------


def test_G6_plans_share_the_items_among_the_classes() -> None:
    sizes = np.array([50, 30, 20])
    assert PLANS["data"](sizes, 10).tolist() == [5, 3, 2]
    assert PLANS["data"](sizes, 11).tolist() == [6, 3, 2]
    assert PLANS["uniform"](sizes, 11).tolist() == [4, 4, 3]
    values = pictures(100, size=4)
    labels = np.repeat([0, 1, 2], sizes)
    data = from_array(values, labels)
    for plan, counts in (("data", [15, 9, 6]), ("uniform", [10, 10, 10])):
        chosen = pick(data, 30, plan, seed=1)
        assert len(set(chosen)) == 30
        assert np.bincount(labels[chosen]).tolist() == counts
        assert np.array_equal(chosen, pick(data, 30, plan, seed=1))
        assert not np.array_equal(chosen, pick(data, 30, plan, seed=2))
    assert np.array_equal(pick(data, None), np.arange(100))
    with pytest.raises(UndiffuseError, match=r"the uniform plan for 90 items needs 30 of class 2, it has 20"):
        pick(data, 90, "uniform")
    for count in (0, 101, -1, 2.5, True):
        with pytest.raises(UndiffuseError, match="has 100 items"):
            pick(data, count)  # pyrefly: ignore
    with pytest.raises(UndiffuseError, match="unknown class plan 'unifrom'"):
        pick(data, 10, "unifrom")


# --- references, kept -------------------------------------------------------------------------------------------------


def test_trap_V8_references_are_kept_under_a_hash_of_all_that_decides_them(tmp_path: Path) -> None:
    values = pictures(20)
    data = from_array(values)
    features = of_pixels(data.spec)
    first = reference_features(features, data, 10, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(first.features, extract(features, data, pick(data, 10)).features)
    again = reference_features(replace(features, network=Never()), data, 10, cache=tmp_path)
    assert torch.equal(again.features, first.features)
    assert first.probabilities is not None
    assert again.probabilities is not None
    assert torch.equal(again.probabilities, first.probabilities)
    changed = values.copy()
    changed[7, 3, 3, 1] ^= 1
    others: list[tuple[Features, Dataset, int, int]] = [
        (features, from_array(changed), 10, 0),  # one bit of the data
        (features, data, 11, 0),  # how many
        (features, data, 10, 1),  # which
        (of_pixels(data.spec, "tf1-bilinear"), data, 10, 0),  # the filter
        (of_pixels(data.spec, size=14), data, 10, 0),  # the size
        (PCA(3).fit(data), data, 10, 0),  # the network
    ]
    found = [reference_features(f, d, n, seed=seed, cache=tmp_path) for f, d, n, seed in others]
    assert len(list(tmp_path.iterdir())) == 1 + len(others)
    assert len({first.fingerprint, *(each.fingerprint for each in found)}) == 1 + len(others)


class Never(Moments):
    """The same network without weights, which must not be asked."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        raise AssertionError("the kept features were not used")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    data = from_array(pictures())
    with pytest.raises(UndiffuseError, match=r"file: cannot be the cache .*UNDIFFUSE_CACHE"):
        reference_features(of_pixels(data.spec), data, cache=tmp_path / "file")


def test_trap_V8_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    data = from_array(pictures(20))
    features = of_pixels(data.spec)
    first = reference_features(features, data, 10, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    for content in (b"", b"x" * 100, path.read_bytes()[:-3]):
        path.write_bytes(content)
        with pytest.warns(UndiffuseWarning, match="damaged.*made again"):
            again = reference_features(features, data, 10, cache=tmp_path)
        assert torch.equal(again.features, first.features)
        assert torch.equal(reference_features(features, data, 10, cache=tmp_path).features, first.features)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.int16, np.uint8])
def test_trap_V3_whole_numbers_of_any_type_are_in_the_units_of_the_data(dtype: type) -> None:
    """The measured bounds of integers are no units: [20, 220] is not stretched to [0, 255]."""
    bright, dim = pictures(high=256), (pictures(high=200) + 20).astype(np.uint8)
    features = of_pixels(from_array(bright).spec)
    assert torch.equal(extract(features, from_array(dim.astype(dtype))).features, features(dim))


@pytest.mark.parametrize("levels", [1, 16, 31])
def test_trap_V3_whole_numbers_of_few_levels_are_in_units_that_must_be_said(levels: int) -> None:
    features = of_pixels(from_array(pictures(high=256)).spec)
    few = np.resize(np.arange(levels + 1, dtype=np.uint8), (4, 8, 8, 3))
    with pytest.warns(UndiffuseWarning, match="range is taken"):
        data = from_array(few)
    with pytest.raises(UndiffuseError, match=r"bring both to one range.*--span 0 1"):
        extract(features, data)
    said = features(few, span=(0, levels))
    assert torch.equal(said, features(np.floor(few / levels * 255 + 0.5).astype(np.uint8)))


def test_samples_brighter_than_measured_data_are_refused() -> None:
    with pytest.warns(UndiffuseWarning, match="range is taken"):
        spec, samples = from_array(pictures(high=60)).spec, from_array(pictures(high=120))
    with pytest.raises(UndiffuseError, match="bring both to one range"):
        extract(of_pixels(spec), samples)
