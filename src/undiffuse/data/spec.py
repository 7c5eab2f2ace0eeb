"""How data enters the model and leaves it in its original units.

The network works in *model units*, ``(value - shift) / scale``: bounded data lie in [-1, 1], unbounded data have mean 0
and standard deviation 1. A :class:`DataSpec` holds these constants, so that what comes out of the model has the range,
the dtype and the axes of what went in. The constants belong to the data set, never to one item: saving a picture by its
own minimum and maximum hides wrong colours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from math import isfinite
from typing import TypeVar, cast

import numpy as np
import torch

from ..errors import UndiffuseError, unknown

T = TypeVar("T")

KINDS = ("image", "points", "array", "sound", "video")


def units_between(low: float, high: float) -> tuple[tuple[float], tuple[float]]:
    """``(shift, scale)`` that take [low, high] to [-1, 1]."""
    return ((low + high) / 2,), ((high - low) / 2,)


@dataclass(frozen=True)
class DataSpec:
    """Shape, units and class names of a data set.

    ``shape``   what the network sees: ``[C, *spatial]`` for images and arrays, ``[D]`` for points
    ``dtype``   of the original values; it is also the dtype of what :meth:`to_data` returns
    ``low``, ``high``   declared bounds in original units, both ``None`` if unbounded. Bounded data are ``[-1, 1]`` in
        model units: ``shift`` and ``scale`` are then the middle and half of the range
    ``shift``, ``scale``   one value for all channels, or one a channel (coordinate, for points)
    ``layout``   the axes of one original item, a letter each; ``C`` is the channel axis, the others are spatial and
        keep their order: ``HW``, ``HWC``, ``CHW``, ``CL``, ``ZYX``, ``THWC``. Points are ``D``, or the empty string for
        scalars
    ``resize``   the filter with which the items were brought to this size, ``None`` if they were not touched
    ``names``   of the coordinates of points, where the data name them
    ``rate``   samples a second, for sounds
    ``vocabulary``   the pieces that captions are made of (:func:`undiffuse.tokens.learn`), where the data have captions
    ``attributes``   of items, each a name and the names of its values (:mod:`.columns`)
    ``numbers``   that are known of items, each a name, a mean and a deviation
    ``beside``   of the pictures that items come in pairs with (:mod:`.pairs`)
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str
    low: float | None
    high: float | None
    shift: tuple[float, ...]
    scale: tuple[float, ...]
    layout: str
    classes: tuple[str, ...] = ()
    resize: str | None = None
    names: tuple[str, ...] = ()
    rate: int | None = None
    vocabulary: tuple[str, ...] = field(default=(), repr=False)  # the captions are in the fingerprint themselves
    attributes: tuple[tuple[str, tuple[str, ...]], ...] = field(default=(), repr=False)
    numbers: tuple[tuple[str, float, float], ...] = field(default=(), repr=False)
    beside: DataSpec | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("kind of data", self.kind, KINDS)
        if not self.shape or any(size < 1 for size in self.shape):
            raise UndiffuseError(f"data spec: shape {self.shape} must be one or more positive sizes")
        if np.dtype(self.dtype).kind not in "buif":
            raise UndiffuseError(f"data spec: dtype {self.dtype!r} must be boolean, integer or real")
        rank = len(self.shape)
        if self.kind == "points":
            fits = rank == 1 and (self.layout == "D" or (self.layout == "" and self.shape == (1,)))
        else:
            fits = len(self.layout) == (rank if "C" in self.layout else rank - 1 if self.shape[0] == 1 else -1)
        if not fits or len(set(self.layout)) != len(self.layout):
            raise UndiffuseError(f"data spec: layout {self.layout!r} does not fit {self.kind} of shape {self.shape}")
        for name, values in (("shift", self.shift), ("scale", self.scale)):
            if len(values) not in (1, self.shape[0]):
                raise UndiffuseError(f"data spec: {name} needs 1 or {self.shape[0]} values, got {len(values)}")
            if not all(isfinite(value) for value in values):
                raise UndiffuseError(f"data spec: {name} {values} must be finite")
        if self.names and (self.kind != "points" or len(self.names) != self.shape[0]):
            raise UndiffuseError(f"data spec: {len(self.names)} names for {self.kind} of shape {self.shape}")
        if (self.kind == "sound") != (self.rate is not None) or (self.rate is not None and self.rate < 1):
            raise UndiffuseError(
                f"data spec: rate {self.rate} of {self.kind}: sounds, and only they, have a positive one"
            )
        if min(self.scale) <= 0:
            raise UndiffuseError(f"data spec: scale {self.scale} must be positive")
        if not all(isfinite(mean) and isfinite(spread) and spread > 0 for _, mean, spread in self.numbers):
            raise UndiffuseError(f"data spec: numbers {self.numbers} need a finite mean and a positive deviation")
        if not all(values for _, values in self.attributes):
            raise UndiffuseError(f"data spec: attributes {self.attributes} need at least one value each")
        if (self.low is None) != (self.high is None):
            raise UndiffuseError("data spec: give both of low and high, or neither")
        if self.low is not None and self.high is not None:
            if not (isfinite(self.low) and isfinite(self.high) and self.low < self.high):
                raise UndiffuseError(f"data spec: bounds [{self.low}, {self.high}] must be finite and in order")
            if (self.shift, self.scale) != units_between(self.low, self.high):
                shift, scale = units_between(self.low, self.high)
                raise UndiffuseError(
                    f"data spec: data in [{self.low:g}, {self.high:g}] need shift={shift}, scale={scale}, "
                    f"got {self.shift}, {self.scale}"
                )

    @property
    def stated(self) -> str:
        """All that it says, for fingerprints. A field that a later version adds has ``repr=False`` and stands here only
        where it is used, so that the same data are not taken for others."""
        said = {each.name: getattr(self, each.name) for each in fields(self)}
        used = [each.name for each in fields(self) if each.repr or said[each.name] != each.default]
        return f"DataSpec({', '.join(f'{name}={said[name]!r}' for name in used)})"

    @property
    def bounded(self) -> bool:
        return self.low is not None

    @property
    def channels(self) -> int:
        return self.shape[0]

    @property
    def original_shape(self) -> tuple[int, ...]:
        """The shape of one original item: ``to_data`` returns ``[N, *original_shape]``."""
        if self.kind == "points":
            return self.shape if self.layout else ()
        if "C" not in self.layout:
            return self.shape[1:]
        axis = self.layout.index("C")
        return (*self.shape[1 : 1 + axis], self.shape[0], *self.shape[1 + axis :])

    @property
    def has_pictures(self) -> bool:
        """Whether :meth:`to_images` can draw an item: it has two spatial axes."""
        return self.kind != "points" and len(self.shape) == 3

    def to_model(self, values: np.ndarray) -> torch.Tensor:
        """Original values ``[N, *original_shape]`` to model units: float32 ``[N, *shape]``.

        Refuses values of another kind of dtype (a float picture in [0, 1] is not an 8-bit one), outside of the declared
        bounds, and NaN or infinity, naming the first item that has them.
        """
        values = np.asarray(values)
        if values.ndim == 0 or values.shape[1:] != self.original_shape:
            raise UndiffuseError(f"data of shape {values.shape} given, [N, {_sizes(self.original_shape)}] expected")
        self._check(values)
        # float32 holds 8- and 16-bit values exactly; wider ones may lose their detail in the subtraction
        work = np.float32 if values.dtype.itemsize <= 2 else np.float64
        if "C" in self.layout:
            values = np.moveaxis(values, 1 + self.layout.index("C"), 1)
        values = values.reshape(len(values), *self.shape)
        units = (values.astype(work) - self._column(self.shift, work)) / self._column(self.scale, work)
        return torch.from_numpy(np.ascontiguousarray(units, dtype=np.float32))

    def where(self, mask: np.ndarray) -> torch.Tensor:
        """A boolean mask of items, ``[N, *original_shape]`` or without channels, as ``[N, C or 1, *spatial]``."""
        mask = np.asarray(mask)
        if mask.dtype != np.bool_:
            raise UndiffuseError(f"a mask must be boolean, got {mask.dtype}")
        shape = self.original_shape
        if "C" in self.layout and mask.ndim > 0 and mask.shape[1:] == shape:
            return torch.from_numpy(np.ascontiguousarray(np.moveaxis(mask, 1 + self.layout.index("C"), 1)))
        if mask.ndim == 0 or mask.shape[1:] != self.shape[1:]:
            raise UndiffuseError(f"a mask of shape {mask.shape} given, [N, {_sizes(self.shape[1:])}] expected")
        return torch.from_numpy(mask)[:, None]

    def to_data(self, x: torch.Tensor) -> np.ndarray:
        """Model units ``[N, *shape]`` to original values ``[N, *original_shape]`` of the original dtype.

        Bounded data are clipped to their bounds; integers are rounded (half away from zero). For integer data this is
        the exact inverse of :meth:`to_model`. NaN and infinity are refused.
        """
        if x.ndim == 0 or tuple(x.shape[1:]) != self.shape:
            raise UndiffuseError(f"samples of shape {tuple(x.shape)} given, [N, {_sizes(self.shape)}] expected")
        units = x.detach().to("cpu", torch.float64).numpy()
        if not np.isfinite(units).all():
            raise UndiffuseError(
                f"sample {_first(~np.isfinite(units))} is not finite: the model or the solver diverged"
            )
        values = units * self._column(self.scale, np.float64) + self._column(self.shift, np.float64)
        dtype = np.dtype(self.dtype)
        if dtype.kind in "ui":
            limits = np.iinfo(dtype)
            values = np.copysign(np.floor(np.abs(values) + 0.5), values)
            values = np.clip(values, float(limits.min), float(limits.max))
        if dtype.kind == "b":
            values = np.floor(values + 0.5)
        if self.bounded:
            values = np.clip(values, self.low, self.high)
        if dtype.kind == "f":
            # float16 ends at 65504: saturate instead of writing infinity
            values = np.clip(values, float(np.finfo(dtype).min), float(np.finfo(dtype).max))
        values = values.astype(dtype)
        if "C" in self.layout:
            return np.ascontiguousarray(np.moveaxis(values, 1, 1 + self.layout.index("C")))
        return values.reshape(len(values), *self.original_shape)

    def to_images(self, x: torch.Tensor) -> list[np.ndarray]:
        """Model units ``[N, C, H, W]`` to pictures: uint8 ``[H, W]`` (grey) or ``[H, W, 3]`` (RGB).

        ``[low, high]`` becomes 0..255 (so 16 bits are divided by 257); unbounded data show mean -3..+3 deviations.
        Four channels are RGBA and are shown on white; of 2 or more than 4 channels the first is shown, in grey.
        """
        if not self.has_pictures:
            raise UndiffuseError(f"{self.kind} of shape {_sizes(self.shape)} cannot be shown as pictures")
        values = self.to_data(x).astype(np.float64)
        values = np.moveaxis(values, 1 + self.layout.index("C"), 1) if "C" in self.layout else values[:, None]
        if self.low is not None and self.high is not None:
            unit = (values - self.low) / (self.high - self.low)
        else:
            unit = (values - self._column(self.shift, np.float64)) / (6 * self._column(self.scale, np.float64)) + 0.5
        if self.channels == 4:
            alpha = np.clip(unit[:, 3:], 0, 1)
            unit = unit[:, :3] * alpha + (1 - alpha)
        eight = np.floor(np.clip(unit, 0, 1) * 255 + 0.5).astype(np.uint8)
        if self.channels in (3, 4):
            return list(np.ascontiguousarray(np.moveaxis(eight, 1, -1)))
        return list(np.ascontiguousarray(eight[:, 0]))

    def to_json(self) -> dict[str, object]:
        """Plain values for JSON, without later fields that are not used; :meth:`from_json` is the inverse."""
        later = {each.name for each in fields(self) if not each.repr}
        said = {name: _lists(value) for name, value in asdict(self).items() if name not in later or value}
        return said if self.beside is None else {**said, "beside": self.beside.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> DataSpec:
        """The spec that :meth:`to_json` wrote. Unknown, missing and mistyped keys are refused."""
        if not isinstance(values, Mapping):
            raise UndiffuseError(f"data spec: an object is expected, got {type(values).__name__}")
        names = [each.name for each in fields(cls)]
        for key in values:
            if key not in names:
                raise unknown("key of the data spec", key, names)
        missing = [each.name for each in fields(cls) if each.default is MISSING and each.name not in values]
        if missing:
            raise UndiffuseError(f"data spec: {', '.join(missing)} missing")

        def optional(key: str, read: Callable[[str, object], T]) -> T | None:
            return None if values.get(key) is None else read(key, values[key])

        def several(key: str, read: Callable[[str, object], T]) -> tuple[T, ...]:
            items = values.get(key, ())
            if not isinstance(items, (list, tuple)):
                raise UndiffuseError(f"data spec: {key} must be a list, got {items!r}")
            return tuple(read(key, item) for item in items)

        return cls(
            kind=_text("kind", values["kind"]),
            shape=several("shape", _whole),
            dtype=_dtype("dtype", values["dtype"]),
            low=optional("low", _real),
            high=optional("high", _real),
            shift=several("shift", _real),
            scale=several("scale", _real),
            layout=_text("layout", values["layout"]),
            classes=several("classes", _text),
            resize=optional("resize", _text),
            names=several("names", _text),
            rate=optional("rate", _whole),
            vocabulary=several("vocabulary", _text),
            attributes=several("attributes", _attribute),
            numbers=several("numbers", _measure),
            beside=optional("beside", _spec),
        )

    def _column(self, constants: tuple[float, ...], dtype: type) -> np.ndarray:
        """``constants`` shaped to broadcast against ``[N, *shape]``."""
        return np.asarray(constants, dtype).reshape(-1, *(1,) * (len(self.shape) - 1))

    def _check(self, values: np.ndarray) -> None:
        want, got = np.dtype(self.dtype), values.dtype
        if got.kind not in ("f" if want.kind == "f" else "bui"):
            span = f" in [{self.low:g}, {self.high:g}]" if self.bounded else ""
            raise UndiffuseError(f"values of dtype {got} given, {self.dtype}{span} expected: convert them first")
        if values.size == 0:
            return
        smallest, largest = values.min(), values.max()  # both are NaN if any value is
        if got.kind == "f" and not (np.isfinite(smallest) and np.isfinite(largest)):
            raise UndiffuseError(f"item {_first(~np.isfinite(values))} has NaN or infinite values")
        if self.low is not None and self.high is not None and (smallest < self.low or largest > self.high):
            bad = _first((values < self.low) | (values > self.high))
            raise UndiffuseError(
                f"item {bad} is outside of the declared [{self.low:g}, {self.high:g}]: "
                f"values span [{smallest:g}, {largest:g}]"
            )


def _first(bad: np.ndarray) -> int:
    """The index of the first item ``[N, ...]`` that has a true value."""
    return int(np.argmax(bad.reshape(len(bad), -1).any(axis=1)))


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise UndiffuseError(f"data spec: {key} must be text, got {value!r}")
    return value


def _dtype(key: str, value: object) -> str:
    try:
        return np.dtype(_text(key, value)).name
    except TypeError:
        raise UndiffuseError(f"data spec: {key} {value!r} is not a number type such as uint8 or float32") from None


def _real(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UndiffuseError(f"data spec: {key} must hold numbers, got {value!r}")
    return float(value)


def _spec(key: str, value: object) -> DataSpec:
    return DataSpec.from_json(cast(Mapping[str, object], value))


def _lists(value: object) -> object:
    """Tuples in tuples as JSON has them."""
    return [_lists(each) for each in value] if isinstance(value, (tuple, list)) else value


def _attribute(key: str, value: object) -> tuple[str, tuple[str, ...]]:
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not isinstance(value[1], (list, tuple)):
        raise UndiffuseError(f"data spec: {key} must be pairs of a name and its values, got {value!r}")
    return _text(key, value[0]), tuple(_text(key, each) for each in value[1])


def _measure(key: str, value: object) -> tuple[str, float, float]:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise UndiffuseError(f"data spec: {key} must be a name, a mean and a deviation each, got {value!r}")
    return _text(key, value[0]), _real(key, value[1]), _real(key, value[2])


def _whole(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UndiffuseError(f"data spec: {key} must hold whole numbers, got {value!r}")
    return value
