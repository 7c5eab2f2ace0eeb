"""Scientific TIFF: real numbers, 32 bits, many channels, 16 bits in colour, stacks of pages. Read by tifffile.

Pictures in TIFF (8 and 16 bits grey, 8 bits RGB) are images like any others (:mod:`.images`). These here are arrays in
files: each keeps its own numbers, all have one shape and one type, and what range they have is measured over the whole
set by the rules for arrays (:mod:`.arrays`). The pages of a stack are the depth of a volume.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from importlib.util import find_spec
from io import BytesIO
from math import prod
from typing import Any, BinaryIO, final

import numpy as np

from ..errors import UndiffuseError
from .arrays import Values, measure
from .folder import Form, Images, Reader
from .images import Decoded
from .spec import DataSpec
from .store import MAX_BYTES, BadFile, File, Store

EXTENSIONS = frozenset(("tif", "tiff"))
NEEDED = "needs tifffile: pip install 'undiffuse[data]'"


@dataclass(frozen=True)
class Page:
    """What a file says about itself: its shape, the letters of its axes as in :class:`.DataSpec`, its type."""

    shape: tuple[int, ...]
    layout: str
    dtype: str


def installed() -> bool:
    return find_spec("tifffile") is not None


def read_page(file: BinaryIO) -> Page:
    """The header of a TIFF. Raises :class:`BadFile`."""
    with _opened(file) as tiff:
        series = tiff.series[0]
        if len(tiff.series) > 1:
            raise BadFile(f"{len(tiff.series)} pictures of different forms in one file: save them apart")
        shape, dtype = tuple(int(n) for n in series.shape), np.dtype(series.dtype)
        # One page a letter: S and C are channels; whatever else is not Y or X (Z, time, unknown) is depth.
        letters = ["C" if axis in "SC" else axis if axis in "YX" else "Z" for axis in series.axes]
        kept = [(n, letter) for n, letter in zip(shape, letters, strict=True) if n > 1 or letter in "YX"]
    shape, layout = tuple(n for n, _ in kept), "".join(letter for _, letter in kept)
    if len(set(layout)) < len(layout):
        raise BadFile(f"its axes are {series.axes}: one of channels, one of depth, Y and X are possible")
    if "Z" not in layout:
        layout = layout.replace("Y", "H").replace("X", "W")
    if dtype.kind not in "buif" or prod(shape) * dtype.itemsize > MAX_BYTES:
        raise BadFile(f"{dtype} of shape {shape}: too large, or no real numbers")
    return Page(shape, layout, dtype.name)


def is_scientific(page: Page) -> bool:
    """Whether Pillow would lose a part of it, or refuse it."""
    channels = page.shape[page.layout.index("C")] if "C" in page.layout else 1
    picture = page.dtype in ("uint8", "bool") or (page.dtype == "uint16" and channels == 1)
    return not picture or channels not in (1, 3, 4) or "Z" in page.layout


def holds_arrays(store: Store, most: int = 8) -> bool:
    """Whether the pictures of a store are TIFFs, and one of the first is a scientific one."""
    pictures = [file for file, reason in store.listing if not reason and file.extension in Images.known]
    files = [file for file in pictures if file.extension in EXTENSIONS]
    if 2 * len(files) <= len(pictures) or not installed():
        return False
    for file in files[:most]:
        try:
            with store.open(file) as stream:
                if is_scientific(read_page(stream)):
                    return True
        except (BadFile, OSError):
            continue  # said when the files are scanned
    return False


@final
@dataclass(frozen=True)
class Tiffs(Reader):
    """TIFF files as arrays."""

    noun = "TIFF arrays"
    formats = "TIFF"
    known = EXTENSIONS

    def header(self, store: Store, files: tuple[File, ...]) -> Page:
        store.check(files[0])
        with store.open(files[0]) as stream:
            return read_page(stream)

    def form(self, headers: Sequence[Page], name: str) -> Form:
        forms = Counter(headers).most_common()
        if len(forms) > 1:
            listed = "; ".join(f"{page.shape} {page.dtype} ({count})" for page, count in forms[:3])
            raise UndiffuseError(f"{name}: TIFFs of {len(forms)} forms: {listed}; bring them to one shape and type")
        page = forms[0][0]
        sizes = dict(zip(page.layout, page.shape, strict=True))
        shape = (sizes.get("C", 1), *(sizes[axis] for axis in page.layout if axis != "C"))
        spec = DataSpec("array", shape, page.dtype, None, None, (0.0,), (1.0,), page.layout)
        return Form(page, spec)

    def measured(self, values: Values, spec: DataSpec, name: str) -> tuple[DataSpec, list[str]]:
        spec, _, notes = measure(values, spec.layout, name)
        return spec, notes

    def decode(self, store: Store, files: tuple[File, ...], target: Page) -> Decoded:
        data = store.read(files[0])
        if read_page(BytesIO(data)) != target:
            raise BadFile("it has changed since it was listed")
        try:
            with _opened(BytesIO(data)) as tiff:
                pixels = np.asarray(tiff.series[0].asarray()).reshape(target.shape)
        except (ValueError, RuntimeError, ImportError, OSError, KeyError, IndexError, TypeError) as error:
            raise BadFile(f"cannot be decoded ({' '.join(str(error).split())[:100]})") from None
        if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
            raise BadFile("it has NaN or infinite values")
        return Decoded(pixels.astype(target.dtype), (), blake2b(data, digest_size=16).digest())


def encode_tiff(values: np.ndarray, spec: DataSpec) -> bytes:
    """Samples ``[N, *original_shape]`` in original units as one TIFF, a page (or a stack of pages) a sample."""
    if not installed():
        raise UndiffuseError(f"a .tif {NEEDED}")
    import tifffile

    buffer = BytesIO()
    axes = "T" + spec.layout.replace("H", "Y").replace("W", "X")
    tifffile.imwrite(buffer, values, photometric="minisblack", metadata={"axes": axes})
    return buffer.getvalue()


def _opened(file: BinaryIO) -> Any:
    """A ``TiffFile``; :class:`BadFile` for what is none."""
    import logging

    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it has to say becomes the reason of a bad file
    try:
        tiff = tifffile.TiffFile(file, name="image.tif")  # else it asks the file for its name
        if not tiff.series:
            raise BadFile("it has no pictures")
        return tiff
    except BadFile:
        raise
    except Exception as error:  # its parser raises whatever a damaged file makes it raise
        raise BadFile(f"not a readable TIFF ({' '.join(str(error).split())[:100]})") from None
