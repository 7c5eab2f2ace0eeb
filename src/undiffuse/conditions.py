"""Chapter 5. Conditions: what we ask for.

A condition turns raw values, one a sample, into what the network takes: a vector, a row of tokens, or more channels
beside x. Each knows its *null* value ("nothing in particular"), which takes the place of the real one for a tenth of
the training samples; that is what makes classifier-free guidance possible (Ho & Salimans 2022, arXiv:2207.12598).

Raw values are tensors, always: a text is its tokens. So dropping, saving, batching and guiding know one kind of value.
"""

from __future__ import annotations

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attention
from .beside import Beside, beside_from, stated
from .encoders import load
from .errors import UndiffuseError, UndiffuseWarning, choose, unknown
from .levels import to_device
from .prompts import AS_WRITTEN, PromptReading
from .tokens import BytePairs

Rows = Mapping[str, Tensor | Sequence[Any] | float | None]
"""Of conditions by name: raw values ``[R, ...]``, or rows as people write them, or one (:meth:`Conditions.read`)."""


@dataclass(frozen=True, eq=False)
class Embedded:
    """What a condition says to the network; any part may be missing.

    Attributes:
        vector: ``[B, width]``; those of several conditions add up.
        tokens: ``[B, T, token_width]``; those of several conditions stand in a row.
        mask: ``[B, T]`` bool, True for the tokens that are there.
        channels: ``[B, C, *spatial]``, laid beside x.
    """

    vector: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    channels: Tensor | None = None


class Condition(nn.Module, ABC):
    """Abstract: raw values ``[B, ...]`` to what the network takes, and a null value.

    ``token_width``   of the tokens that it makes, 0 for none
    ``channels``   how many channels it lays beside x
    ``asked``   whether it is asked for, and so dropped in training and guided to. What was done to the data is not: it
        is always told in training, and null in sampling.
    ``told``   whether it is told rather than asked for: it says of the sample what holds on both sides of guidance (its
    size, what of it is known), and where nobody says anything it is :meth:`usual`, not null
    ``made``   how its values are made of the items that are learned from; None: the data say them
    """

    asked = True
    told = False
    token_width = 0
    channels = 0
    made: Beside | None = None

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON has them, without the width."""

    @abstractmethod
    def check(self, values: Tensor) -> Tensor:
        """The values, or an error that says what is wrong with them."""

    @abstractmethod
    def null(self, batch: int) -> Tensor:
        """``batch`` raw null values."""

    def usual(self, batch: int) -> Tensor:
        """``batch`` raw values of what is sampled where nobody says anything: the null ones, as a rule."""
        return self.null(batch)

    def counts(self, values: Tensor) -> list[int] | None:
        """How many tokens it makes of each row, where that depends on the row: such rows are embedded apart."""
        return None

    def join(self, rows: Sequence[Tensor]) -> Tensor:
        """Raw values of several batches, one under another."""
        return torch.cat(list(rows))

    @abstractmethod
    def embed(self, values: Tensor) -> Embedded:
        """What the network takes; differentiable in the weights."""


@final
class Classes(Condition):
    """One of ``classes`` classes: integers 0..classes-1. The null class is the number ``classes`` (derived, trap
    G4)."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        if classes < 1:
            raise UndiffuseError(f"a class condition needs at least one class, got {classes}")
        self.classes = classes
        self.table = nn.Embedding(classes + 1, width)

    @property
    def config(self) -> dict[str, Any]:
        return {"classes": self.classes}

    def check(self, values: Tensor) -> Tensor:
        if values.dtype.is_floating_point or values.ndim != 1:
            raise UndiffuseError(f"classes must be integers [B], got {values.dtype} of shape {list(values.shape)}")
        wrong = (values < 0) | (values > self.classes)
        if bool(wrong.any()):
            raise UndiffuseError(
                f"class {int(values[wrong][0])} does not exist: this model has 0 to {self.classes - 1}"
            )
        return values

    def null(self, batch: int) -> Tensor:
        return torch.full((batch,), self.classes, device=self.table.weight.device)

    def embed(self, values: Tensor) -> Embedded:
        return Embedded(self.table(values))


@final
class Attributes(Condition):
    """Several attributes at once: integers ``[B, K]``, the k-th from 0 to ``sizes[k] - 1``, or ``sizes[k]`` for one of
    which nothing is said. Their embeddings add up."""

    def __init__(self, sizes: Sequence[int], width: int) -> None:
        super().__init__()
        if not sizes or min(sizes) < 1:
            raise UndiffuseError(f"attributes need at least one, each with at least one value, got {list(sizes)}")
        self.sizes = tuple(sizes)
        self.tables = nn.ModuleList(nn.Embedding(size + 1, width) for size in sizes)

    @property
    def config(self) -> dict[str, Any]:
        return {"sizes": list(self.sizes)}

    def check(self, values: Tensor) -> Tensor:
        if values.dtype.is_floating_point or values.ndim != 2 or values.shape[1] != len(self.sizes):
            raise UndiffuseError(
                f"attributes must be integers [B, {len(self.sizes)}], got {values.dtype} of shape {list(values.shape)}"
            )
        for k, size in enumerate(self.sizes):
            wrong = values[:, k][(values[:, k] < 0) | (values[:, k] > size)]
            if len(wrong):
                raise UndiffuseError(f"attribute {k} has no value {int(wrong[0])}: it has 0 to {size - 1}")
        return values

    def null(self, batch: int) -> Tensor:
        device = next(self.parameters()).device
        return torch.tensor(self.sizes, device=device).expand(batch, -1).clone()

    def embed(self, values: Tensor) -> Embedded:
        return Embedded(torch.stack([table(values[:, k]) for k, table in enumerate(self.tables)]).sum(0))


@final
class Vector(Condition):
    """A continuous vector of ``size`` numbers (attributes, an embedding). The null value is a row of NaN, which has an
    embedding of its own; a row that is NaN only in part is refused."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        if size < 1:
            raise UndiffuseError(f"a vector condition needs at least one number, got {size}")
        self.size = size
        self.linear = nn.Linear(size, width)
        self.nothing = nn.Parameter(torch.zeros(width))

    @property
    def config(self) -> dict[str, Any]:
        return {"size": self.size}

    def check(self, values: Tensor) -> Tensor:
        if values.ndim != 2 or values.shape[1] != self.size:
            raise UndiffuseError(f"a vector condition takes [B, {self.size}], got {list(values.shape)}")
        lost = values.isnan()
        if bool((lost.any(1) != lost.all(1)).any()) or bool(values.isinf().any()):
            raise UndiffuseError(
                "a vector condition holds NaN or infinite numbers (a row of nothing but NaN means: none)"
            )
        return values

    def null(self, batch: int) -> Tensor:
        return torch.full((batch, self.size), torch.nan, device=self.nothing.device)

    def embed(self, values: Tensor) -> Embedded:
        null = values.isnan().all(1, keepdim=True)
        embedded = self.linear(values.nan_to_num().to(self.linear.weight.dtype))
        return Embedded(torch.where(null, self.nothing, embedded))


@final
class Augmentation(Condition):
    """What was done to a training sample, as ``size`` numbers that are 0 if nothing was. The embedding of 0 is 0, so
    that sampling, which asks for 0, is that of data to which nothing was done (Karras et al. 2022, appendix F.2)."""

    asked = False

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        if size < 1:
            raise UndiffuseError(f"an augmentation condition needs at least one number, got {size}")
        self.size = size
        self.linear = nn.Linear(size, width, bias=False)

    @property
    def config(self) -> dict[str, Any]:
        return {"size": self.size}

    def check(self, values: Tensor) -> Tensor:
        if values.ndim != 2 or values.shape[1] != self.size or not bool(values.isfinite().all()):
            raise UndiffuseError(f"an augmentation condition takes finite [B, {self.size}], got {list(values.shape)}")
        return values

    def null(self, batch: int) -> Tensor:
        return torch.zeros(batch, self.size, device=self.linear.weight.device)

    def embed(self, values: Tensor) -> Embedded:
        return Embedded(self.linear(values.to(self.linear.weight.dtype)))


# --- Text -------------------------------------------------------------------------------------------------------------


class Written(Condition, ABC):
    """Abstract: a condition whose raw values are the tokens of texts, int64 ``[B, length]``, padded with 0. The null
    value, and the empty text, is nothing but padding. ``begin`` is how many tokens the network gets before the first
    word's."""

    length: int
    begin = 0
    has_cut = False

    @abstractmethod
    def tokens(self, text: str) -> list[int]:
        """All tokens of a text, however long; none of them is 0."""

    @abstractmethod
    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""

    def follow(self, reading: PromptReading) -> None:
        """Raise for a way of reading prompts that this text cannot follow."""
        if reading != AS_WRITTEN:
            raise UndiffuseError(
                "weighted_prompts, long_prompts and clip_skip are for the text encoders of diffusers' folders; this "
                "model's own reads prompts as they are written"
            )

    def skipping(self, values: Tensor, layers: int) -> Tensor:
        """The same texts, read without the encoder's last ``layers``, which :meth:`follow` has let through."""
        return values

    def read(self, texts: Sequence[str], captions: bool = False, reading: PromptReading = AS_WRITTEN) -> Tensor:
        """``[B, length]`` on the CPU. What is too long is cut, with a warning that names what was cut; of ``captions``,
        which are many, at the first one only."""
        self.follow(reading)
        rows = torch.zeros(len(texts), self.length, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            tokens = self.tokens(text)
            if len(tokens) > self.length and not (captions and self.has_cut):
                self.has_cut = True
                more = "; so are others, raise model.text_length" if captions else ""
                cut = self.text(tokens[self.length :])
                cut = cut if len(cut) <= 200 else f"{cut[:160]} ... {cut[-30:]}"
                warnings.warn(
                    f"the text has {len(tokens)} tokens, this model reads {self.length}: cut was {cut!r}{more}",
                    UndiffuseWarning,
                    stacklevel=2,
                )
            row[: len(tokens)] = torch.tensor(tokens[: self.length])
        return rows

    def check_length(self, text: str, reading: PromptReading = AS_WRITTEN) -> None:
        """Raise for a text that would be cut, where nobody would see the warning."""
        self.follow(reading)
        if (count := len(self.tokens(text))) > self.length:
            raise UndiffuseError(f"the text has {count} tokens, this model reads {self.length}: make it shorter")

    def check(self, values: Tensor) -> Tensor:
        if values.dtype != torch.int64 or values.ndim != 2 or values.shape[1] != self.length:
            raise UndiffuseError(
                f"texts must be tokens, int64 [B, {self.length}], got {values.dtype} of shape {list(values.shape)}"
            )
        return values

    def null(self, batch: int) -> Tensor:
        return torch.zeros(batch, self.length, dtype=torch.int64, device=next(self.parameters()).device)


class Reading(nn.Module):
    """One layer of a transformer that reads a text: a convolution, since words that stand together belong together,
    then attention to all that is there, then a perceptron, before each a norm (Vaswani et al. 2017; Xiong et al. 2020,
    arXiv:2002.04745; Gulati et al. 2020, arXiv:2005.08100)."""

    NEAR = 4  # words on either side

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.near, self.first, self.second = (nn.LayerNorm(width) for _ in range(3))
        self.neighbours = nn.Conv1d(width, width, 2 * self.NEAR + 1, padding=self.NEAR)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor, there: Tensor) -> Tensor:
        """``h [B, T, width]``; ``there [B, T]`` bool, of which at least one in each row is True."""
        y = (self.near(h) * there[..., None]).transpose(1, 2)  # what is not there says nothing to its neighbours
        h = h + self.neighbours(y).transpose(1, 2)
        q, k, v = self.qkv(self.first(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = attention(q, k, v, there[:, None, None])
        h = h + self.out(y.transpose(1, 2).flatten(2))
        return h + self.mlp(self.second(h))


@final
class Text(Written):
    """A text, read by a small transformer that is trained with the network: byte pairs, places, ``layers`` layers.

    Args:
        vocabulary: the pieces of its tokens (:class:`.BytePairs`), part of the model.
        length: most tokens of a text.
        token_width, layers, heads: of the transformer. The network gets every token; and as the vector what a mark that
            stands before the text, and is always there, has learned of it.
    """

    def __init__(
        self,
        vocabulary: Sequence[str],
        width: int,
        length: int = 64,
        token_width: int = 64,
        layers: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        if min(length, token_width, layers, heads) < 1 or token_width % heads:
            raise UndiffuseError(
                f"text of length={length}, token_width={token_width}, layers={layers}, heads={heads}: all must be at "
                "least 1, and the width a multiple of the heads"
            )
        self.pairs = BytePairs(tuple(vocabulary))
        self.length, self.token_width, self.layer_count, self.heads = length, token_width, layers, heads
        self.table = nn.Embedding(self.pairs.count, token_width)
        self.places = nn.Parameter(0.1 * nn.Embedding(1 + length, token_width).weight.detach())
        self.layers = nn.ModuleList(Reading(token_width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(token_width)
        self.pooled = nn.Linear(token_width, width)

    @property
    def config(self) -> dict[str, Any]:
        return {
            "vocabulary": list(self.pairs.vocabulary),
            "length": self.length,
            "token_width": self.token_width,
            "layers": self.layer_count,
            "heads": self.heads,
        }

    def tokens(self, text: str) -> list[int]:
        return self.pairs.encode(text)

    def text(self, tokens: Sequence[int]) -> str:
        return self.pairs.decode(tokens)

    def check(self, values: Tensor) -> Tensor:
        values = super().check(values)
        if bool(((values < 0) | (values >= self.pairs.count)).any()):
            raise UndiffuseError(f"a token is not from 0 to {self.pairs.count - 1}: they are another model's")
        return values

    def embed(self, values: Tensor) -> Embedded:
        there = F.pad(values != 0, (1, 0), value=True)
        h = self.table(F.pad(values, (1, 0))) + self.places
        for layer in self.layers:
            h = layer(h, there)
        h = self.norm(h)
        return Embedded(self.pooled(h[:, 0]), h[:, 1:], there[:, 1:])


@final
class Pretrained(Written):
    """A text, read by a frozen CLIP or T5 of ``transformers`` (:mod:`.encoders`); what is trained is how the network
    takes it. The model keeps the encoder's name and hash, not its weights; another encoder of that name is refused.

    Args:
        model: a folder, or a name on the Hugging Face Hub.
        hash: of the encoder; None: of the one that is there.
        length: most tokens of a text, without the marks around it.
        token_width: of the tokens that the network gets.
    """

    def __init__(
        self, model: str, width: int, length: int = 64, token_width: int = 64, hash: str | None = None
    ) -> None:
        super().__init__()
        self.encoder = load(model)
        if hash is not None and hash != self.encoder.hash:
            raise UndiffuseError(
                f"text encoder {model}: its weights are not those that this model was trained with; restore them"
            )
        if not 1 <= length <= self.encoder.most or token_width < 1:
            raise UndiffuseError(f"text encoder {model}: length={length} must be from 1 to {self.encoder.most}")
        self.length, self.token_width, self.begin = length, token_width, len(self.encoder.before)
        self.project = nn.Linear(self.encoder.width, token_width)
        self.pooled = nn.Linear(self.encoder.width, width)

    @property
    def config(self) -> dict[str, Any]:
        return {
            "model": self.encoder.name,
            "hash": self.encoder.hash,
            "length": self.length,
            "token_width": self.token_width,
        }

    def tokens(self, text: str) -> list[int]:
        return [1 + token for token in self.encoder.tokens(text)]  # 0 is padding here, and a word there

    def text(self, tokens: Sequence[int]) -> str:
        return self.encoder.text([token - 1 for token in tokens if token])

    def embed(self, values: Tensor) -> Embedded:
        weight = self.project.weight
        hidden = values.new_zeros(len(values), self.length + self.encoder.marks, self.encoder.width, dtype=weight.dtype)
        there = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=weight.device)
        for row, tokens in enumerate(values.tolist()):
            if words := [token - 1 for token in tokens if token]:
                said = self.encoder(words, store=self.training)
                hidden[row, : len(said)] = said.to(hidden)
                there[row, : len(said)] = True
        mean = hidden.sum(1) / there.sum(1, keepdim=True).clamp(min=1)
        return Embedded(self.pooled(mean), self.project(hidden), there)


# --- Pictures ---------------------------------------------------------------------------------------------------------


def checked_picture(values: Tensor, shape: Sequence[int]) -> Tensor:
    """``values``, or an error unless they are ``[B, *shape]`` without infinities."""
    if list(values.shape[1:]) != list(shape) or not values.dtype.is_floating_point:
        raise UndiffuseError(
            f"this condition takes real [B, {', '.join(map(str, shape))}], got {values.dtype} {list(values.shape)}"
        )
    if bool(values.isinf().any()):
        raise UndiffuseError("a picture as condition holds infinite numbers (NaN means: not known)")
    return values


@final
class Picture(Condition):
    """A picture (or array) beside x, as more channels: a smaller one to enlarge, one with holes to fill, one to
    translate (Saharia et al. 2022, arXiv:2104.07636 and 2111.05826).

    Raw values ``[B, *shape]``, in model units, NaN where nothing is known; null is NaN everywhere. The network gets
    them with 0 for NaN, enlarged to the size of x where they are smaller, and one more channel: 1 where they are known.
    """

    def __init__(
        self, shape: Sequence[int], size: Sequence[int], width: int = 0, made: Mapping[str, Any] | None = None
    ) -> None:
        """``shape``: of the picture, ``[C, *spatial]``; ``size``: the spatial size of x; ``made``: of the items
        themselves, a :class:`.Beside` as files say it."""
        super().__init__()
        if len(shape) < 2 or len(size) != len(shape) - 1 or min(*shape, *size) < 1:
            raise UndiffuseError(f"a picture of shape {list(shape)} does not fit data of spatial size {list(size)}")
        self.shape, self.size = tuple(shape), tuple(size)
        self.made = None if made is None else beside_from(made)
        self.channels = shape[0] + 1
        self.register_buffer("anchor", torch.zeros(()), persistent=False)  # tells the device

    @property
    def config(self) -> dict[str, Any]:
        made = {} if self.made is None else {"made": stated(self.made)}
        return {"shape": list(self.shape), "size": list(self.size), **made}

    def check(self, values: Tensor) -> Tensor:
        return checked_picture(values, self.shape)

    def null(self, batch: int) -> Tensor:
        return torch.full((batch, *self.shape), torch.nan, device=self.anchor.device)

    def embed(self, values: Tensor) -> Embedded:
        known = (~values.isnan()).all(1, keepdim=True)
        channels = torch.cat([values.nan_to_num(), known.to(values.dtype)], dim=1)
        if self.size != self.shape[1:]:
            channels = F.interpolate(channels, self.size)
        return Embedded(channels=channels)


@final
class Patches(Condition):
    """A picture ``[B, C, *spatial]`` that need not lie where x does (a style, a subject), as tokens: one for each patch
    of ``patch`` pixels a side, with its place. Null is NaN everywhere, of which there are no tokens."""

    def __init__(
        self,
        shape: Sequence[int],
        width: int,
        patch: int = 4,
        token_width: int = 64,
        made: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if len(shape) < 2 or patch < 1 or token_width < 1 or any(n < 1 or n % patch for n in shape[1:]):
            raise UndiffuseError(f"a picture of shape {list(shape)} cannot be cut into patches of {patch}")
        self.shape, self.patch, self.token_width = tuple(shape), patch, token_width
        self.made = None if made is None else beside_from(made)
        count = 1
        for n in shape[1:]:
            count *= n // patch
        self.linear = nn.Linear(shape[0] * patch ** (len(shape) - 1), token_width)
        self.places = nn.Parameter(0.1 * nn.Embedding(count, token_width).weight.detach())

    @property
    def config(self) -> dict[str, Any]:
        made = {} if self.made is None else {"made": stated(self.made)}
        return {"shape": list(self.shape), "patch": self.patch, "token_width": self.token_width, **made}

    def check(self, values: Tensor) -> Tensor:
        return checked_picture(values, self.shape)

    def null(self, batch: int) -> Tensor:
        return torch.full((batch, *self.shape), torch.nan, device=self.places.device)

    def embed(self, values: Tensor) -> Embedded:
        cut = values
        for axis in range(2, values.ndim):  # [B, C, *spatial] -> [B, C, *(spatial / p), p, ..., p]
            cut = cut.unfold(axis, self.patch, self.patch)
        rank = len(self.shape) - 1
        cut = cut.flatten(2 + rank).flatten(2, 1 + rank).transpose(1, 2).flatten(2)
        there = ~cut.isnan().any(-1)
        return Embedded(tokens=self.linear(cut.nan_to_num()) + self.places, mask=there)


def rows_in(given: Any, depth: int) -> list[Any]:
    """The rows of what people give of a condition, of which each is None or a list of lists ``depth`` deep (0: a number
    or a text): one row alone is as good as a list of it."""
    rows = list(given) if isinstance(given, LISTS) else [given]
    said = next((row for row in rows if row is not None), None)
    return rows if said is None or _depth(said) >= depth else [rows]


LISTS = (list, tuple, np.ndarray, Tensor)
"""What is not one row by itself, or one number of it."""


def _depth(row: Any) -> int:
    return (1 + _depth(row[0]) if len(row) else 1) if isinstance(row, LISTS) else 0


def waits(values: Tensor) -> bool:
    """Whether looking at these numbers waits for a device."""
    return values.device.type != "cpu"


CONDITIONS: dict[str, type[Condition]] = {
    "classes": Classes,
    "attributes": Attributes,
    "vector": Vector,
    "augmentation": Augmentation,
    "text": Text,
    "pretrained": Pretrained,
    "picture": Picture,
    "patches": Patches,
}
"""Every kind of condition by name."""


@final
class Conditions(nn.Module):
    """Several conditions by name: vectors add up, tokens stand in a row, channels lie side by side."""

    def __init__(self, conditions: Mapping[str, Condition]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(dict(conditions))
        self.names = tuple(conditions)

    def part(self, name: str) -> Condition:
        """One condition by name."""
        part = self.parts[name]
        assert isinstance(part, Condition)
        return part

    @property
    def asked(self) -> tuple[str, ...]:
        """The names of those that can be asked for."""
        return tuple(name for name in self.names if self.part(name).asked)

    @property
    def told(self) -> tuple[str, ...]:
        """The names of those that are told."""
        return tuple(name for name in self.names if self.part(name).told)

    @property
    def written(self) -> dict[str, Written]:
        """Those that are texts."""
        return {name: part for name in self.names if isinstance(part := self.part(name), Written)}

    @property
    def token_width(self) -> int:
        """Of all tokens; 0 if there are none. Raises if they do not agree."""
        widths = {name: self.part(name).token_width for name in self.names if self.part(name).token_width}
        if len(set(widths.values())) > 1:
            raise UndiffuseError(f"the conditions' tokens must be of one width, these are {widths}")
        return next(iter(widths.values()), 0)

    def place(self, name: str) -> int:
        """Which of the tokens that the network gets is the first word's of the text ``name``."""
        before = [self.part(each) for each in self.names[: self.names.index(name)]]
        told = [part.embed(part.null(1)).tokens for part in before if part.token_width]
        return sum(tokens.shape[1] for tokens in told if tokens is not None) + self.written[name].begin

    @property
    def channels(self) -> int:
        """How many channels lie beside x."""
        return sum(self.part(name).channels for name in self.names)

    @staticmethod
    def build(config: Mapping[str, Mapping[str, Any]], width: int) -> Conditions:
        """From ``{"classes": {"kind": "classes", "classes": 10}}``; :attr:`config` gives that back."""
        parts = {}
        for name, fields in config.items():
            kind = choose("kind of condition", str(fields.get("kind")), CONDITIONS)
            options = [option for option in inspect.signature(kind).parameters if option != "width"]
            for field in fields:
                if field not in ("kind", *options):
                    raise unknown(f"option of condition {name}", field, options)
            given = {field: value for field, value in fields.items() if field != "kind"}
            try:
                parts[name] = kind(width=width, **given)  # type: ignore[call-arg]
            except TypeError as error:
                raise UndiffuseError(f"condition {name}: {error}") from None
        return Conditions(parts)

    @property
    def config(self) -> dict[str, dict[str, Any]]:
        kinds = {cls: kind for kind, cls in CONDITIONS.items()}
        return {name: {"kind": kinds[type(self.part(name))], **self.part(name).config} for name in self.names}

    def values(self, given: Mapping[str, Tensor], captions: Sequence[str] | None) -> dict[str, Tensor]:
        """Raw values of a batch of data: those of the ``given`` ones that are conditions, and captions as tokens."""
        values = {name: value for name, value in given.items() if name in self.names}
        if captions is not None:
            values |= {name: part.read(captions, captions=True) for name, part in self.written.items()}
        return values

    def made(self, x: Tensor, stream: Callable[[int], torch.Generator]) -> dict[str, Tensor]:
        """Raw values of the conditions that are made of the items ``x`` themselves (``[B, ...]``, model units), with
        the random numbers ``stream(i)`` of item i."""
        parts = {name: self.part(name).made for name in self.names}
        return {name: made(x, map(stream, range(len(x)))) for name, made in parts.items() if made is not None}

    def read(
        self, name: str, rows: Tensor | Sequence[Any] | float | None, reading: PromptReading = AS_WRITTEN
    ) -> Tensor:
        """Raw values ``[R, ...]`` of one condition, checked, from what people write: R numbers or lists of numbers, of
        a :class:`Written` one texts, read as ``reading`` says, or one of them alone; None, or None for one number of
        several, asks for nothing in particular."""
        if name not in (known := (*self.asked, *self.told)):
            raise unknown("condition", name, known)
        part = self.part(name)
        if not isinstance(rows, Tensor):
            rows = rows_in(rows, 0 if isinstance(part, Written) else part.null(1).ndim - 1)
        if len(rows) == 0:
            raise UndiffuseError(f"condition {name}: no row given; name one, or leave it out")
        if isinstance(rows, Tensor):
            return part.check(rows)
        return part.join([part.check(self._row(name, part, row, reading)) for row in rows])

    def _row(self, name: str, part: Condition, row: Any, reading: PromptReading) -> Tensor:
        null = part.null(1).cpu()
        if row is None:
            return null
        if isinstance(part, Written):
            if not isinstance(row, str):
                raise UndiffuseError(f"condition {name} is a text, got {row!r}")
            return part.read([row], reading=reading)
        value, open = row, null[0].tolist()
        if isinstance(row, (list, tuple)) and isinstance(open, list) and len(row) == len(open):
            value = [nothing if each is None else each for each, nothing in zip(row, open, strict=True)]
        try:
            value = torch.as_tensor(value)[None]
            if value.dtype == torch.bool:
                raise TypeError
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise UndiffuseError(f"condition {name} takes numbers, got {row!r}") from None
        return value.to(null.dtype) if null.dtype.is_floating_point else value

    def check(self, values: Mapping[str, Tensor]) -> None:
        """Raise for values that do not exist."""
        for name in self.names:
            if name in values:
                self.part(name).check(values[name])

    def join(self, values: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The raw values of several batches, one under another."""
        return {name: self.part(name).join([each[name] for each in values]) for name in self.names}

    def alike(self, values: Mapping[str, Tensor]) -> list[list[int]] | None:
        """Rows that can be asked together, since they make equally many tokens; None: all of them can."""
        counts = [found for name in self.names if (found := self.part(name).counts(values[name])) is not None]
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, kind in enumerate(zip(*counts, strict=True)):
            groups.setdefault(kind, []).append(row)
        return list(groups.values()) if len(groups) > 1 else None

    def encode(self, values: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
        """What the network takes, of ``vector [B, width]``, ``tokens [B, T, token_width]`` and ``mask [B, T]`` what
        there is; and ``channels [B, C, *spatial]``, which :class:`.Denoiser` lays beside x.

        Checks the values; but in training on an accelerator, where looking at them would make every update wait for the
        last one, :meth:`check` must have seen them before they went there.
        """
        said = []
        for name in self.names:
            part, given = self.part(name), values[name]
            if not (self.training and waits(given)):
                given = part.check(given)
            if given.shape[0] != batch:
                raise UndiffuseError(f"condition {name} has {given.shape[0]} values for {batch} samples")
            said.append(part.embed(given))
        encoded = {}
        if vectors := [each.vector for each in said if each.vector is not None]:
            total = vectors[0]
            for vector in vectors[1:]:
                total = total + vector
            encoded["vector"] = total
        rows = [(each.tokens, each.mask) for each in said if each.tokens is not None]
        if rows:
            tokens = [row for row, _ in rows]
            encoded["tokens"] = torch.cat(tokens, dim=1)
            there = [row.new_ones(row.shape[:2], dtype=torch.bool) if mask is None else mask for row, mask in rows]
            encoded["mask"] = torch.cat(there, dim=1)
        if channels := [each.channels for each in said if each.channels is not None]:
            encoded["channels"] = torch.cat(channels, dim=1)
        return encoded

    def null(self, batch: int) -> dict[str, Tensor]:
        """Raw values that ask for nothing in particular."""
        return {name: self.part(name).null(batch) for name in self.names}

    def usual(self, batch: int) -> dict[str, Tensor]:
        """Raw values of what is sampled where nobody says anything."""
        return {name: self.part(name).usual(batch) for name in self.names}

    def drop(self, values: Mapping[str, Tensor], u: Tensor, rate: float) -> dict[str, Tensor]:
        """``values`` with the samples whose uniform number ``u`` (``[B]``, drawn by the caller) is below ``rate`` set
        to null."""
        null = self.null(u.shape[0])
        kept = {}
        for name, value in values.items():
            if not self.part(name).asked:
                kept[name] = value
                continue
            dropped = to_device(u < rate, value.device).reshape((-1,) + (1,) * (value.ndim - 1))
            kept[name] = torch.where(dropped, to_device(null[name], value.device), value)
        return kept
