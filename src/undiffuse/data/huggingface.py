"""``hf:NAME[:SPLIT]`` and saved datasets: images in a table of the package ``datasets`` (undiffuse[data]).

    hf:NAME    hf:NAME:SPLIT    hf:NAME:CONFIG:SPLIT    from the Hub; SPLIT is train by default
    hf:FOLDER  FOLDER           what ``Dataset.save_to_disk`` has written

    images     the column of images; of several ``image`` or ``img``
    classes    ``labels``, or the column ``label``, or the only column of classes (ClassLabel: its names in its order)
    captions   the column ``text`` or ``caption``; of a list of captions the first

Each row is a file of a :class:`Store`: the same decoder as for folders, the same rules for bad ones, random access.
Scripts of a data set are never run: ``datasets`` 4 and later cannot, and an older one is refused.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, final

from ..errors import UndiffuseError, unknown
from .metadata import CAPTIONS, LABELS, Metadata
from .store import BadFile, File, Store, printable

if TYPE_CHECKING:
    from datasets import Dataset as Table

PREFIX = "hf:"
SAVED = ("dataset_info.json", "dataset_dict.json")
IMAGES = ("image", "img")
PLAIN = ("int", "uint", "string", "bool")
"""Types of columns that ``labels`` may make the classes."""


def is_saved(path: Path) -> bool:
    """Whether ``save_to_disk`` has written this folder."""
    there = [os.path.isfile(path / name) for name in (*SAVED, "state.json")]  # False for names that no path may have
    return any(there[: len(SAVED)]) and (there[-1] or there[1])


@final
class Rows(Store):
    """The images of a table: row 17 is the file ``row 0000017``; ``labels`` as in ``open_dataset``."""

    chosen = True

    def __init__(self, data: str, labels: str | None = None, known: Sequence[str] = ()) -> None:
        """``known``: columns that are attributes or numbers."""
        self.name = printable(data)
        table = _table(data)
        self._column = _image_column(table, self.name)
        self.about = _about(table, labels, self._column, self.name)
        self.labels = LABELS[0] if self.about.attributes else "none"
        _add(table, known, self.about, self._column, self.name)
        self._images: Any = table.select_columns([self._column]).cast_column(self._column, _undecoded())
        self._fingerprint = str(table._fingerprint)

    def entries(self) -> list[tuple[File, str]]:
        sizes = enumerate(self._sizes())
        return [(File(called(row), size, 0, row), "" if size else "no image") for row, size in sizes]

    def _sizes(self) -> list[int]:
        """The bytes of each row's image; nothing is decoded."""
        import pyarrow.compute as pc

        sizes: list[int] = []
        for batch in self._images.with_format("arrow").iter(1000):
            cells = batch.flatten()
            lengths = pc.call_function("binary_length", [cells[f"{self._column}.bytes"]]).to_pylist()
            paths = cells[f"{self._column}.path"].to_pylist()
            sizes += [length or _length(path) for length, path in zip(lengths, paths, strict=True)]
        return sizes

    def open(self, file: File) -> BinaryIO:
        cell = self._images[file.place][self._column]
        try:
            data = cell["bytes"] or Path(cell["path"]).read_bytes()
        except OSError as error:
            raise BadFile(str(error.strerror).lower()) from None
        if len(data) != file.size:
            raise BadFile("the image has changed since it was found")
        return BytesIO(data)

    def fact(self, file: File) -> str:
        return f"{self._fingerprint}\0{file.place}\0{file.size}"


def called(row: int) -> str:
    """The name of a row; names sort as the rows do."""
    return f"row {row:07d}"


def _length(path: str | None) -> int:
    """Of a file that a row names instead of holding it; 0 if it is none here."""
    return os.path.getsize(path) if path and os.path.isfile(path) else 0


def _undecoded() -> Any:
    from datasets import Image

    return Image(decode=False)


def _table(data: str) -> Table:
    name = data.removeprefix(PREFIX)
    try:
        import datasets
    except ImportError:
        raise UndiffuseError(
            f"{printable(data)}: is read by the package datasets, which is missing: pip install 'undiffuse[data]'"
        ) from None
    if int(datasets.__version__.partition(".")[0]) < 4:
        raise UndiffuseError(f"datasets {datasets.__version__} may run scripts of a data set: install 4 or later")
    parts = name.split(":")
    split, local = parts[-1] if len(parts) > 1 else "train", Path(os.path.expanduser(parts[0]))
    if not parts[0] or len(parts) > 3:
        raise UndiffuseError(f"{printable(data)}: write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    bars = datasets.is_progress_bar_enabled()
    try:
        datasets.disable_progress_bars()
        if is_saved(local):
            found = datasets.load_from_disk(str(local))
        else:
            found = datasets.load_dataset(parts[0], parts[1] if len(parts) == 3 else None, split=split)
    except Exception as error:  # the Hub, its cache and every format may fail in their own way
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UndiffuseError(f"{printable(data)}: cannot be loaded: {printable(reason)}") from None
    finally:
        if bars:
            datasets.enable_progress_bars()
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise unknown(f"split of {printable(name)}", split, map(str, found))
        found = found[split]
    elif is_saved(local) and len(parts) > 1:
        raise UndiffuseError(f"{printable(data)}: this folder has no splits; leave out :{split}")
    if not isinstance(found, datasets.Dataset) or not len(found):
        raise UndiffuseError(f"{printable(data)}: has no rows")
    return found


def _image_column(table: Table, name: str) -> str:
    from datasets import Image

    found = [column for column, kind in table.features.items() if isinstance(kind, Image)]
    if len(found) > 1:
        found = [column for column in IMAGES if column in found] or found
        if found[0] not in IMAGES:
            raise UndiffuseError(f"{name}: has images in {', '.join(map(printable, found))}; rename one to image")
    if not found:
        kinds = ", ".join(f"{printable(column)} ({type(kind).__name__})" for column, kind in table.features.items())
        raise UndiffuseError(f"{name}: no column of images; it has {kinds}: save other data as .npy or .wav files")
    return found[0]


def _add(table: Table, known: Sequence[str], about: Metadata, image: str, name: str) -> None:
    """The columns ``known``, as attributes of the rows."""
    from datasets import ClassLabel, Value

    plain = [column for column, kind in table.features.items() if isinstance(kind, (Value, ClassLabel))]
    for column in known:
        if column not in plain:
            raise unknown(f"attribute of {name}", column, [each for each in plain if each != image])
        if column == LABELS[0] and about.attributes:
            raise UndiffuseError(f"{name}: {column} is the classes already, so it cannot be an attribute: labels=none")
        kind = table.features[column]
        for row, value in enumerate(table[column][:]):
            if value is not None and not (isinstance(kind, ClassLabel) and value < 0):
                said = kind.names[value] if isinstance(kind, ClassLabel) else value
                about.attributes.setdefault(called(row), {})[column] = str(said)


def _about(table: Table, labels: str | None, image: str, name: str) -> Metadata:
    """Captions and classes by the path of the row."""
    from datasets import ClassLabel, Value

    about = Metadata()
    features = {column: kind for column, kind in table.features.items() if column != image}
    classed = [column for column, kind in features.items() if isinstance(kind, ClassLabel)]
    plain = [c for c, kind in features.items() if isinstance(kind, Value) and kind.dtype.startswith(PLAIN)]
    if labels == "none":
        chosen = None
    elif labels is not None:
        if labels not in features or labels not in {*classed, *plain}:
            raise unknown("column for labels", labels, ["none", *classed, *plain])
        chosen = labels
    else:
        chosen = next((c for c in LABELS if c in features and c in {*classed, *plain}), None)
        chosen = chosen or (classed[0] if len(classed) == 1 else None)
        if chosen is None and classed:
            columns = ", ".join(map(printable, classed))
            about.notes.append(f"classes that are not used: {columns}; choose one with labels={printable(classed[0])}")
    if chosen is not None:
        values = list(table[chosen][:])
        kind = features[chosen]
        if isinstance(kind, ClassLabel):
            values = [None if value is None or value < 0 else value for value in values]
            about.classes = tuple(map(str, kind.names))
            values = [None if value is None else about.classes[value] for value in values]
        if any(value is None for value in values):
            raise UndiffuseError(f"{name}: some rows have no {printable(chosen)}; choose labels=none")
        about.attributes = {called(row): {LABELS[0]: str(value)} for row, value in enumerate(values)}
    caption = next((column for column in CAPTIONS if column in features and column != chosen), None)
    if caption is not None:
        for row, value in enumerate(table[caption][:]):
            first = value[0] if isinstance(value, list) and value else value
            if isinstance(first, str):
                about.texts[called(row)] = first.strip()
        if any(isinstance(value, list) for value in table[caption][:1]):
            about.notes.append(f"of each row's {caption} the first is taken")
    return about
