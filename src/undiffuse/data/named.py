"""The data sets that have a name.

``digits``, ``moons`` and ``swissroll`` come with scikit-learn, ``checkerboard`` is drawn here, ``mnist`` is read
from the IDX files that its authors publish.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ..errors import UndiffuseError
from .arrays import from_array
from .base import ArrayDataset, Dataset
from .idx import read_idx
from .spec import DataSpec, units_between

POINTS = 10_000
TEN = tuple("0123456789")


def digits(*, seed: int = 0, data_root: str | Path | None = None) -> Dataset:
    """1,797 real handwritten digits of 8x8 pixels with values 0..16 (E. Alpaydin, C. Kaynak, 1998)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise _needs_sklearn("digits") from None
    images, labels = load_digits(return_X_y=True)
    shift, scale = units_between(0.0, 16.0)
    spec = DataSpec("image", (1, 8, 8), "uint8", 0.0, 16.0, shift, scale, "HW", TEN)
    images = np.asarray(images, np.uint8).reshape(-1, 8, 8)
    return ArrayDataset(spec, images, np.asarray(labels, np.int64), name="digits")


def mnist(*, seed: int = 0, data_root: str | Path | None = None) -> Dataset:
    """60,000 handwritten digits of 28x28 pixels (Y. LeCun, C. Cortes, C. Burges)."""
    return _mnist("mnist", "train", 60_000, data_root)


def mnist_test(*, seed: int = 0, data_root: str | Path | None = None) -> Dataset:
    """The 10,000 test digits of MNIST."""
    return _mnist("mnist-test", "t10k", 10_000, data_root)


def moons(*, seed: int = 0, data_root: str | Path | None = None) -> Dataset:
    """10,000 points on two interleaved half circles, of which each is a class."""
    try:
        from sklearn.datasets import make_moons
    except ImportError:
        raise _needs_sklearn("moons") from None
    points, labels = make_moons(POINTS, noise=0.05, random_state=seed)
    return from_array(np.asarray(points, np.float32), np.array(["upper", "lower"])[labels], name="moons")


def swissroll(*, seed: int = 0, data_root: str | Path | None = None) -> Dataset:
    """10,000 points on a spiral: the Swiss roll seen from its side."""
    try:
        from sklearn.datasets import make_swiss_roll
    except ImportError:
        raise _needs_sklearn("swissroll") from None
    points, _ = make_swiss_roll(POINTS, noise=0.5, random_state=seed)
    return from_array(np.asarray(points, np.float32)[:, [0, 2]], name="swissroll")


def checkerboard(*, seed: int = 0, data_root: str | Path | None = None) -> Dataset:
    """10,000 points, uniform on the eight dark squares of a 4x4 board that spans [-2, 2] x [-2, 2]."""
    random = np.random.Generator(np.random.PCG64(seed))
    column = random.integers(0, 4, POINTS)
    row = 2 * random.integers(0, 2, POINTS) + column % 2
    points = np.stack([column, row], axis=1) + random.random((POINTS, 2)) - 2
    return from_array(points.astype(np.float32), name="checkerboard")


def _needs_sklearn(name: str) -> UndiffuseError:
    return UndiffuseError(f"{name} comes with scikit-learn, which is missing: pip install 'undiffuse[demo]'")


def _mnist(name: str, part: str, count: int, data_root: str | Path | None) -> Dataset:
    images = read_idx(_find(name, f"{part}-images-idx3-ubyte", data_root))
    labels = read_idx(_find(name, f"{part}-labels-idx1-ubyte", data_root))
    if (
        images.shape != (count, 28, 28)
        or labels.shape != (count,)
        or images.dtype != np.uint8
        or labels.dtype != np.uint8
    ):
        raise UndiffuseError(
            f"{name}: images {images.shape} and labels {labels.shape} are not MNIST's; get the files again"
        )
    shift, scale = units_between(0.0, 255.0)
    spec = DataSpec("image", (1, 28, 28), "uint8", 0.0, 255.0, shift, scale, "HW", TEN)
    return ArrayDataset(spec, images, labels.astype(np.int64), name=name)


def _find(name: str, file: str, data_root: str | Path | None) -> Path:
    """``file``, plain or gzip, below ``data_root`` or ``$UNDIFFUSE_DATA``."""
    variable = os.environ.get("UNDIFFUSE_DATA", "")
    roots = [Path(root).expanduser() for root in (data_root, variable) if root]
    folders = [root / below for root in roots for below in ("", "mnist", "MNIST/raw")]
    for folder in folders:
        for spelling in (file, f"{file}.gz", file.replace("-idx", ".idx")):
            if (folder / spelling).is_file():
                return folder / spelling
    looked = f"looked in {', '.join(map(str, folders))}" if folders else "no folder was named"
    raise UndiffuseError(
        f"{name}: {file}[.gz] not found ({looked}); set --data-root or $UNDIFFUSE_DATA to the folder that has it"
    )
