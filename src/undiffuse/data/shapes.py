"""``shapes``: pictures with captions, drawn on the fly, and a checker that reads the pixels.

Picture i is a pure function of (seed, i); there is no file, and no two are alike. A caption speaks of one group of
things, or of two and how they lie:

    caption  =  group [relation group]
    group    =  (a | two | three) [small | large] [plain | striped] colour (circle | square | triangle)
    relation =  left of | right of | above | below

What a caption does not say may be anything. Some pairs of colour and shape (:data:`UNSEEN`) are in no training picture:
a model that draws them when asked has learned what a colour is and what a shape is, and not a list of pictures.

The checker (:func:`read`, :func:`check`) knows nothing of the drawing but its palette and sizes: it separates things
from the background, fits each with every shape, size and texture, and compares what it found with the caption.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import final, overload

import numpy as np

from ..errors import UndiffuseError
from ..tokens import learn
from .base import Dataset, digest, positions
from .spec import DataSpec, units_between

COUNTS = {"a": 1, "two": 2, "three": 3}
SIZES = {"small": (3.0, 3.6), "large": (4.8, 5.6)}
"""Radii in units of which the picture is 32 wide."""
TEXTURES = ("plain", "striped")
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 180, 60),
    "blue": (55, 95, 235),
    "yellow": (240, 205, 40),
    "purple": (170, 60, 205),
    "white": (235, 235, 235),
}
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("left of", "right of", "above", "below")
UNSEEN = (("blue", "circle"), ("purple", "square"), ("red", "triangle"))
"""Pairs of colour and shape that are in no picture of the data set ``shapes``."""

COUNT = 200_000
UNIT = 32
DARK = 0.45
"""Stripes are as bright as this and as the colour itself, in turns."""
STRIPE = 4.0
"""From one stripe to the next of its kind."""
GAP = 1.5
"""Things are at least so far apart, and half of it from the border."""


# --- What is said -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Some things alike. ``size`` and ``texture`` are None where nothing is said of them."""

    count: int
    shape: str
    colour: str
    size: str | None = None
    texture: str | None = None

    def __str__(self) -> str:
        count = next(word for word, number in COUNTS.items() if number == self.count)
        noun = self.shape if self.count == 1 else self.shape + "s"
        return " ".join(filter(None, (count, self.size, self.texture, self.colour, noun)))


@dataclass(frozen=True)
class Caption:
    """One group; or two, of which the first lies left of, right of, above or below the second."""

    first: Group
    relation: str | None = None
    second: Group | None = None

    def __str__(self) -> str:
        return " ".join(str(part) for part in (self.first, self.relation, self.second) if part is not None)

    @property
    def groups(self) -> tuple[Group, ...]:
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def unseen(self) -> bool:
        """Whether it asks for a pair of :data:`UNSEEN`."""
        return any((group.colour, group.shape) in UNSEEN for group in self.groups)

    @staticmethod
    def parse(text: str) -> Caption:
        """The caption that ``text`` is. Raises :class:`UndiffuseError` with the grammar for any other text.

        >>> Caption.parse("two green triangles above a yellow circle").relation
        'above'
        """
        found = _SENTENCE.fullmatch(" ".join(text.lower().split()))
        if found is None:
            raise UndiffuseError(
                f"{text!r} is no caption of shapes; one is: a small red circle left of two striped green triangles"
            )
        words = found.groupdict()

        def group(number: str) -> Group:
            part = {name: words[name + number] for name in ("count", "size", "texture", "colour", "shape")}
            count, shape = COUNTS[part["count"]], part["shape"]
            if shape.endswith("s") != (count > 1):
                raise UndiffuseError(f"{text!r}: {part['count']} {shape} (one circle, two circles)")
            return Group(count, shape.removesuffix("s"), part["colour"], part["size"], part["texture"])

        if words["relation"] is None:
            return Caption(group("1"))
        return Caption(group("1"), words["relation"], group("2"))


def _pattern(number: int) -> str:
    said = {"count": COUNTS, "size": SIZES, "texture": TEXTURES, "colour": COLOURS}
    parts = {name: f"(?P<{name}{number}>{'|'.join(words)}) " for name, words in said.items()}
    optional = {name: f"(?:{part})?" if name in ("size", "texture") else part for name, part in parts.items()}
    return "".join(optional.values()) + f"(?P<shape{number}>(?:{'|'.join(SHAPES)})s?)"


_SENTENCE = re.compile(f"{_pattern(1)}(?: (?P<relation>{'|'.join(RELATIONS)}) {_pattern(2)})?")


# --- What is drawn ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thing:
    """One shape: its middle, from the left and the top, and its radius, in units of which the picture is 32 wide."""

    shape: str
    colour: str
    texture: str
    x: float
    y: float
    radius: float

    @property
    def size(self) -> str:
        return "small" if self.radius < 4.2 else "large"

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom."""
        left, top, right, bottom = EXTENT[self.shape]
        r = self.radius
        return self.x + left * r, self.y + top * r, self.x + right * r, self.y + bottom * r


CORNER = 1.25
"""From the middle of a triangle to its corners, in radii."""
EDGE = 0.9
"""From the middle of a square to its edges."""
EXTENT = {
    "circle": (-1.0, -1.0, 1.0, 1.0),
    "square": (-EDGE, -EDGE, EDGE, EDGE),
    "triangle": (-CORNER * 0.75**0.5, -CORNER, CORNER * 0.75**0.5, CORNER / 2),
}


@dataclass(frozen=True)
class Scene:
    """What is in a picture, and the grey behind it."""

    caption: Caption
    things: tuple[Thing, ...]
    background: float


def scene(seed: int, index: int, unseen: bool = False) -> Scene:
    """Picture ``index`` of ``seed``: without any pair of :data:`UNSEEN`, or with at least one."""
    random = np.random.Generator(np.random.PCG64([seed, index, int(unseen)]))

    def one(choices: Sequence[str]) -> str:
        return choices[int(random.integers(len(choices)))]

    while True:
        groups, drawn = [], []
        for _ in range(1 if random.random() < 0.35 else 2):
            count = int(random.choice((1, 2, 3), p=(0.45, 0.35, 0.2)))
            size, texture = one(tuple(SIZES)), "striped" if random.random() < 0.4 else "plain"
            colour, shape = one(tuple(COLOURS)), one(SHAPES)
            groups.append(Group(count, shape, colour, size, texture))
            said = random.random(2) < 0.5
            drawn.append(replace(groups[-1], size=size if said[0] else None, texture=texture if said[1] else None))
        if len({group.colour for group in groups}) < len(groups):
            continue
        relation = one(RELATIONS) if len(groups) == 2 else None
        caption = Caption(drawn[0], relation, drawn[1] if len(drawn) == 2 else None)
        things = _placed(groups, relation, random) if caption.unseen == unseen else None
        if things is not None:
            return Scene(caption, things, float(random.uniform(10, 30)))


def _placed(groups: Sequence[Group], relation: str | None, random: np.random.Generator) -> tuple[Thing, ...] | None:
    """Every thing of the groups at a place of its own, the groups in their halves; None where there is no room."""
    regions = {
        None: [(0, 0, 32, 32)],
        "left of": [(0, 0, 16, 32), (16, 0, 32, 32)],
        "above": [(0, 0, 32, 16), (0, 16, 32, 32)],
    }
    regions |= {"right of": regions["left of"][::-1], "below": regions["above"][::-1]}
    placed: list[Thing] = []
    for group, (left, top, right, bottom) in zip(groups, regions[relation], strict=True):
        radius = float(random.uniform(*SIZES[group.size or "small"]))
        west, north, east, south = (side * radius for side in EXTENT[group.shape])
        low = np.array([left - west, top - north]) + GAP / 2
        high = np.array([right - east, bottom - south]) - GAP / 2
        others: list[Thing] = []
        for x, y in random.uniform(low, high, (40, 2)):
            thing = Thing(group.shape, group.colour, group.texture or "plain", float(x), float(y), radius)
            if all(_apart(thing, other) for other in others):
                others.append(thing)
            if len(others) == group.count:
                break
        else:
            return None
        placed += others
    return tuple(placed)


def _apart(one: Thing, other: Thing) -> bool:
    a, b = one.box, other.box
    return max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) >= GAP


def draw(things: Sequence[Thing], background: float, side: int = UNIT) -> np.ndarray:
    """uint8 ``[side, side, 3]``; edges are those of the true shapes, blurred over one pixel."""
    image = np.full((side, side, 3), background)
    for thing in things:
        scale = side / UNIT
        left, top, right, bottom = (round(edge * scale) for edge in thing.box)
        rows, columns = slice(max(0, top - 2), bottom + 2), slice(max(0, left - 2), right + 2)
        y, x = np.mgrid[:side, :side][:, rows, columns] + 0.5
        x, y = x / scale - thing.x, y / scale - thing.y
        cover = coverage(thing.shape, thing.radius, x, y, scale)[..., None]
        paint = np.asarray(COLOURS[thing.colour], np.float64) * brightness(thing.texture, y, scale)[..., None]
        image[rows, columns] += cover * (paint - image[rows, columns])
    return np.floor(image + 0.5).astype(np.uint8)


def coverage(shape: str, radius: float | np.ndarray, x: np.ndarray, y: np.ndarray, scale: float) -> np.ndarray:
    """How much of the pixel at ``(x, y)`` from the middle lies inside: 0 to 1, by the distance to the edge.
    ``scale``: pixels a unit."""
    if shape == "circle":
        outside = np.hypot(x, y) - radius
    elif shape == "square":
        outside = np.maximum(np.abs(x), np.abs(y)) - EDGE * radius
    else:
        outside = np.maximum(y, 0.75**0.5 * np.abs(x) - y / 2) - CORNER / 2 * radius
    return np.clip(0.5 - scale * outside, 0, 1)


def brightness(texture: str, y: np.ndarray, scale: float) -> np.ndarray:
    """1, or for stripes :data:`DARK` and 1 in turns from the middle, ``y`` below which a pixel lies."""
    if texture == "plain":
        return np.ones_like(y)
    bright = np.clip(0.5 + scale * (STRIPE / 4 - np.abs((y + STRIPE / 2) % STRIPE - STRIPE / 2)), 0, 1)
    return DARK + (1 - DARK) * bright


# --- The data set -----------------------------------------------------------------------------------------------------


@final
class Captions(Sequence[str]):
    """The captions of a set of shapes, made when they are asked for."""

    def __init__(self, seed: int, indices: range, unseen: bool) -> None:
        self._seed, self._indices, self._unseen = seed, indices, unseen

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return Captions(self._seed, self._indices[index], self._unseen)
        return str(_scene(self._seed, self._indices[index], self._unseen).caption)


_scene = lru_cache(4096)(scene)  # a picture and its caption are asked for one after the other


@lru_cache(1)
def vocabulary() -> tuple[str, ...]:
    """The pieces that all captions are made of."""
    return learn(str(scene(0, index, unseen).caption) for index in range(1000) for unseen in (False, True))


@final
class Shapes(Dataset):
    """``count`` pictures of ``side`` pixels. ``unseen``: each has a pair of colour and shape that the others lack."""

    def __init__(self, seed: int = 0, side: int = UNIT, count: int = COUNT, unseen: bool = False) -> None:
        shift, scale = units_between(0.0, 255.0)
        self.spec = DataSpec(
            "image", (3, side, side), "uint8", 0.0, 255.0, shift, scale, "HWC", vocabulary=vocabulary()
        )
        self.name, self.labels = "shapes", None
        self.texts = Captions(seed, range(count), unseen)
        self._seed, self._count, self._unseen = seed, count, unseen
        self.fingerprint = digest("shapes 1", repr((seed, count, unseen)), self.spec.stated)

    def __len__(self) -> int:
        return self._count

    def at(self, size: tuple[int, int]) -> Shapes:
        """The same scenes, drawn with another number of pixels."""
        sides = [UNIT, 2 * UNIT, 4 * UNIT]
        if size not in [(side, side) for side in sides]:
            *some, last = (f"{side}x{side}" for side in sides)
            raise UndiffuseError(f"shapes: pictures are drawn with {', '.join(some)} or {last} pixels")
        return Shapes(self._seed, size[0], self._count, self._unseen)

    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, None]:
        wanted = (_scene(self._seed, int(index), self._unseen) for index in positions(indices, len(self)))
        pictures = [draw(each.things, each.background, self.spec.shape[1]) for each in wanted]
        return np.stack(pictures) if pictures else np.zeros((0, *self.spec.original_shape), np.uint8), None


def shapes(*, seed: int = 0, data_root: str | Path | None = None) -> Dataset:
    """200,000 pictures with captions, drawn as they are asked for."""
    return Shapes(seed)


# --- The checker ------------------------------------------------------------------------------------------------------

FOREGROUND = 45.0
"""A pixel belongs to a thing if its colour is so far from the background's."""
LEAST = 6
"""Fewer pixels than this are dirt, not a thing."""
MISFIT = 0.30
"""A thing whose best fit leaves more of its light unexplained is none of the shapes."""


def read(image: np.ndarray) -> list[Thing]:
    """The things in a uint8 picture ``[side, side, 3]``. What fits no shape has the shape ``"?"``. Large pictures are
    read at twice :data:`UNIT`: more pixels say no more, and take longer."""
    values = image.astype(np.float64)
    while len(values) > 2 * UNIT and len(values) % 2 == 0:
        values = values.reshape(len(values) // 2, 2, values.shape[1] // 2, 2, 3).mean((1, 3))
    scale = len(values) / UNIT
    background = np.median(np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]]), axis=0)
    light = np.sqrt(((values - background) ** 2).sum(-1))
    things = []
    for rows, columns in _components(light > FOREGROUND):
        if len(rows) >= LEAST * scale**2:
            things.append(_fit(values, background, rows, columns, scale))
    return things


def _components(mask: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows and columns of each group of pixels that touch along an edge."""
    left = mask.copy()
    while left.any():
        row, column = divmod(int(left.argmax()), left.shape[1])
        waiting, found = [(row, column)], []
        left[row, column] = False
        while waiting:
            row, column = waiting.pop()
            found.append((row, column))
            for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                if 0 <= r < left.shape[0] and 0 <= c < left.shape[1] and left[r, c]:
                    left[r, c] = False
                    waiting.append((r, c))
        yield tuple(np.array(found).T)


@lru_cache(4)
def _templates(scale: float) -> tuple[list[tuple[str, float, str]], np.ndarray, int]:
    """Every shape, radius and texture; its light around the middle, ``[n, w, w]``; how far the middle is inside."""
    reach = int(np.ceil(8.5 * scale))
    y, x = (np.mgrid[-reach : reach + 1, -reach : reach + 1]) / scale
    names = [(shape, float(r), t) for shape in SHAPES for r in np.arange(2.4, 6.5, 0.2) for t in TEXTURES]
    drawn = [coverage(shape, r, x, y, scale) * brightness(texture, y, scale) for shape, r, texture in names]
    return names, np.stack(drawn), reach


def _fit(values: np.ndarray, background: np.ndarray, rows: np.ndarray, columns: np.ndarray, scale: float) -> Thing:
    """The thing that explains these pixels best."""
    own = values[rows, columns] - background
    bright = own[np.argsort(-(own**2).sum(-1))[: max(3, len(own) // 3)]].mean(0)
    colour = min(COLOURS, key=lambda name: float(((bright + background - COLOURS[name]) ** 2).sum()))
    # The light of the thing alone, in the direction of its colour, with a border of a pixel around it.
    size = len(values)
    near = np.zeros((size + 2, size + 2), bool)
    for dr in (0, 1, 2):
        for dc in (0, 1, 2):
            near[rows + dr, columns + dc] = True
    amount = ((values - background) @ bright / (bright @ bright)) * near[1:-1, 1:-1]
    names, templates, reach = _templates(scale)
    padded = np.pad(amount, 2 * reach)
    best: tuple[float, int, float, float] = (np.inf, 0, 0.0, 0.0)
    middle = (rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2
    for dy in range(-2, 4):
        for dx in (-1, 0, 1):
            row, column = int(middle[0]) + dy, int(middle[1]) + dx
            patch = padded[row + reach : row + 3 * reach + 1, column + reach : column + 3 * reach + 1]
            errors = ((templates - patch) ** 2).sum((1, 2))
            index = int(errors.argmin())
            if errors[index] < best[0]:
                best = (float(errors[index]), index, float(column), float(row))
    error, index, column, row = best
    shape, radius, texture = names[index]
    if error > MISFIT * float((amount**2).sum()):
        shape = "?"
    return Thing(shape, colour, texture, (column + 0.5) / scale, (row + 0.5) / scale, radius)


def check(image: np.ndarray, caption: Caption | str) -> dict[str, bool]:
    """Whether each of the attributes that the caption states is so in the picture: ``count``, ``shape``, ``colour``,
    and, where they are said, ``size``, ``texture``, ``relation``; ``all`` of them.

    The things are divided among the groups as fits the caption best; an attribute holds if it does for every thing of
    its group. A thing too many or too few is a wrong ``count``.
    """
    caption = Caption.parse(caption) if isinstance(caption, str) else caption
    things = read(image)
    verdicts = (_verdict(caption, division) for division in _divisions(things, caption))
    return max(verdicts, key=lambda verdict: sum(verdict.values()))


def _divisions(things: list[Thing], caption: Caption) -> Iterator[tuple[list[Thing], ...]]:
    """Every way to give the things to the groups."""
    if caption.second is None:
        yield (things,)
        return
    if len(things) > 8:  # of no caption; any division will do
        yield things[:4], things[4:]
        return
    everything = range(len(things))
    for count in range(len(things) + 1):
        for chosen in combinations(everything, count):
            yield [things[i] for i in chosen], [things[i] for i in everything if i not in chosen]


def _verdict(caption: Caption, division: tuple[list[Thing], ...]) -> dict[str, bool]:
    pairs = list(zip(caption.groups, division, strict=True))
    found: dict[str, bool] = {"count": all(len(things) == group.count for group, things in pairs)}
    for name in ("shape", "colour", "size", "texture"):
        stated = [(getattr(group, name), things) for group, things in pairs if getattr(group, name) is not None]
        if stated:
            found[name] = all(things and all(getattr(t, name) == value for t in things) for value, things in stated)
    if caption.relation is not None:
        first, second = division
        found["relation"] = bool(first and second) and _lies(first, caption.relation, second)
    found["all"] = all(found.values())
    return found


def _lies(first: list[Thing], relation: str, second: list[Thing]) -> bool:
    if relation in ("right of", "below"):
        return _lies(second, {"right of": "left of", "below": "above"}[relation], first)
    along = (lambda thing: thing.x) if relation == "left of" else (lambda thing: thing.y)
    return max(map(along, first)) < min(map(along, second))


def score(images: Sequence[np.ndarray] | np.ndarray, captions: Sequence[Caption | str]) -> Mapping[str, float]:
    """The share of pictures in which each attribute is as its caption states it, among those that state it; ``all``
    is the share of which everything is right."""
    if len(images) != len(captions) or not len(images):
        raise UndiffuseError(f"{len(images)} pictures and {len(captions)} captions: give one caption a picture")
    verdicts = [check(image, caption) for image, caption in zip(images, captions, strict=True)]
    names = ["count", "shape", "colour", "size", "texture", "relation", "all"]
    stated = {name: [verdict[name] for verdict in verdicts if name in verdict] for name in names}
    return {name: sum(each) / len(each) for name, each in stated.items() if each}
