"""The conditions of diffusers' pipelines: texts, and numbers that are told beside them.

A text's raw values are one number, how many layers are left out (CLIP skip), and then a *window* or several: the
tokens of every encoder in a row, each plus 1 so that 0 is padding, with its weight (:func:`.prompts.heavy`), without
marks. All that decides what the encoders say of a text is in its row; so what they say is kept by it, and a text is
read once and not at every step.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...conditions import Condition, Embedded, Written
from ...errors import UndiffuseError, UndiffuseWarning
from ...prompts import AS_WRITTEN, HEAVIEST, PromptReading, heavy, tokens_of, weighted, weights_of
from .networks import Layout, Seats

KEPT = 64
"""Texts of which the embedding is kept, the last ones used."""
MOST_WINDOWS = 32
"""Of one text."""


@dataclass(frozen=True, eq=False)
class Said:
    """What one encoder says of one text: ``tokens [T, D]``, ``pooled [P]`` if it has that, ``mask [T]``, True for the
    words and marks."""

    tokens: Tensor
    pooled: Tensor | None
    mask: Tensor


class Reader(nn.Module):
    """A tokenizer and a text encoder of ``transformers``.

    Args:
        layer: which hidden state is taken, -1 the last and so on; None: the last, normed as the encoder's output is.
        pooled: the name of its output for the text as a whole; None: there is none.
        places: tokens of a text, marks and padding included.
        masked: whether padding is hidden from the encoder.
        skips: whether its last layers may be left out.
    """

    def __init__(
        self,
        tokenizer: Any,
        model: nn.Module,
        places: int,
        layer: int | None,
        pooled: str | None,
        masked: bool,
        skips: bool = False,
    ) -> None:
        super().__init__()
        self.tokenizer, self.model, self.seats = tokenizer, model, Seats()
        self.places, self.layer, self.pooled, self.masked = places, layer, pooled, masked
        self.skips = skips
        word, marked = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
        first = next((i for i in range(len(marked)) if marked[i : i + len(word)] == word), None)
        if first is None or tokenizer.pad_token_id is None:
            raise UndiffuseError("this tokenizer does not set marks around the words as CLIP's and T5's do")
        self.before, self.after, self.pad = marked[:first], marked[first + len(word) :], int(tokenizer.pad_token_id)
        self.words = places - len(self.before) - len(self.after)
        most = int(model.config.vocab_size)  # type: ignore[union-attr]
        if max(tokenizer.get_vocab().values(), default=0) >= most or self.pad >= most:
            raise UndiffuseError(f"the tokenizer has tokens beyond the {most} of its text encoder: they do not belong")
        room = getattr(model.config, "max_position_embeddings", None)
        if self.words < 1 or (room is not None and places > room):
            raise UndiffuseError(f"a text of {places} tokens does not fit this text encoder, which reads {room}")

    @property
    def most_skipped(self) -> int:
        """How many layers may be left out: one at least stays."""
        layers = int(self.model.config.num_hidden_layers)  # type: ignore[union-attr]
        return max(0, layers + (-1 if self.layer is None else self.layer))

    def tokens(self, text: str) -> list[int]:
        """Of the words, without marks."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text.strip() else []

    def weighed(self, text: str, weights: Sequence[float]) -> list[float]:
        """A weight for each of :meth:`tokens`, from one for each character: that of a token's last one."""
        if not text.strip():
            return []
        if not self.tokenizer.is_fast:
            raise UndiffuseError(
                "weighted prompts need a tokenizer that says where its tokens stand; this one does not"
            )
        said = self.tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        return [weights[max(0, end - 1)] for _, end in said["offset_mapping"]]

    def text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens)))

    def forward(self, words: Sequence[int], weights: Tensor | None = None, skip: int = 0) -> Said:
        """What the encoder says of a text, given its words.

        ``skip``: how many of the last layers are left out. ``weights [len(words)]``: each word's place becomes ``h0 + w
        (h - h0)``, where h is what the encoder says there and h0 what it says there of the empty text. The marks and
        the text as a whole are as they are.
        """
        skip = skip if self.skips else 0
        said = self.said(words, skip)
        if weights is None or bool((weights == 1).all()):
            return said
        nothing = self.said((), skip).tokens
        each = torch.ones(self.places)
        each[len(self.before) : len(self.before) + len(words)] = weights
        tokens = torch.lerp(nothing.float(), said.tokens.float(), each[:, None].to(nothing.device))
        return Said(tokens.to(nothing.dtype), said.pooled, said.mask)

    @torch.no_grad()
    def said(self, words: Sequence[int], skip: int) -> Said:
        """What it says of words of no special weight. Where the last hidden state is normed, an earlier one is too."""
        row = [*self.before, *words, *self.after]
        mask = torch.arange(self.places) < len(row)
        with self.seats(self.model) as device:
            said = self.model(
                input_ids=torch.tensor([row + [self.pad] * (self.places - len(row))], device=device),
                attention_mask=mask[None].long().to(device) if self.masked else None,
                output_hidden_states=self.layer is not None or skip > 0,
            )
            if self.layer is not None:
                tokens = said.hidden_states[self.layer - skip]
            elif skip:
                norm = next(part for name, part in self.model.named_modules() if name.endswith("final_layer_norm"))
                tokens = norm(said.hidden_states[-1 - skip])
            else:
                tokens = said.last_hidden_state
        home = torch.device("cpu") if self.seats.device is not None else device
        pooled = None if self.pooled is None else said[self.pooled][0].to(home)
        return Said(tokens[0].to(home), pooled, mask.to(home))


# --- How a family puts together what its encoders say -----------------------------------------------------------------

Arrange = Callable[[Sequence[Said]], Said]


def alone(said: Sequence[Said]) -> Said:
    """One encoder."""
    return said[0]


def one_after_another(windows: Sequence[Said]) -> Said:
    """Several windows of one text; the text as a whole is the first one's."""
    first, *rest = windows
    if not rest:
        return first
    return Said(torch.cat([each.tokens for each in windows]), first.pooled, torch.cat([each.mask for each in windows]))


def side_by_side(said: Sequence[Said]) -> Said:
    """SDXL: the encoders' tokens beside each other; the text as a whole is the last one's."""
    return Said(torch.cat([each.tokens for each in said], dim=-1), said[-1].pooled, said[0].mask)


def clips_then_t5(said: Sequence[Said]) -> Said:
    """SD3: two CLIPs side by side, filled up with zeros to T5's width, then T5; both CLIPs' whole texts in a row."""
    *clips, t5 = said
    first = torch.cat([each.tokens for each in clips], dim=-1)
    first = F.pad(first, (0, t5.tokens.shape[-1] - first.shape[-1]))
    pooled = torch.cat([each.pooled for each in clips if each.pooled is not None], dim=-1)
    return Said(torch.cat([first, t5.tokens]), pooled, torch.cat([clips[0].mask, t5.mask]))


def clips_without_t5(said: Sequence[Said], places: int, width: int) -> Said:
    """SD3 whose T5 was left out: zeros stand in its place."""
    like = said[0]
    nothing = Said(like.tokens.new_zeros(places, width), None, like.mask.new_ones(places))
    return clips_then_t5([*said, nothing])


def pooled_and_t5(said: Sequence[Said]) -> Said:
    """Flux: T5's tokens; the text as a whole is CLIP's."""
    clip, t5 = said
    return Said(t5.tokens, clip.pooled, t5.mask)


# --- The conditions ---------------------------------------------------------------------------------------------------


@final
class Texts(Written):
    """A text, read by the encoders of a folder.

    Args:
        readers: by the name of their part.
        arrange: how what they say is put together.
        layout: of the network's vector, in which ``pooled`` may have a place.
        zeros: the null text is zeros (SDXL); otherwise it is the empty text, read like any other.
        lower: texts are lowered and stripped first (PixArt).
        windows: whether the network takes a text of several windows.
    """

    def __init__(
        self,
        readers: dict[str, Reader],
        arrange: Arrange,
        layout: Layout,
        zeros: bool = False,
        lower: bool = False,
        windows: bool = False,
    ) -> None:
        super().__init__()
        self.readers = nn.ModuleDict(readers)
        self.names, self.arrange, self.layout = tuple(readers), arrange, layout
        self.zeros, self.lower, self.windows = zeros, lower, windows
        self.sizes = [self.reader(name).words for name in self.names]
        self.window = sum(self.sizes)
        self.length = 1 + self.window
        skipping = [reader for reader in readers.values() if reader.skips]
        self.most_skipped = min((reader.most_skipped for reader in skipping), default=0)
        self.kept: OrderedDict[bytes, Said] = OrderedDict()

    def reader(self, name: str) -> Reader:
        reader = self.readers[name]
        assert isinstance(reader, Reader)
        return reader

    @property
    def config(self) -> dict[str, Any]:
        return {"encoders": list(self.names)}

    def tokens(self, text: str) -> list[int]:
        return [1 + token for token in self.reader(self.names[0]).tokens(text)]

    def text(self, tokens: Sequence[int]) -> str:
        return self.reader(self.names[0]).text([token - 1 for token in tokens if token])

    def follow(self, reading: PromptReading) -> None:
        """As :meth:`.Written.follow`."""
        if reading.long == "windows" and not self.windows:
            longest = max(self.sizes)
            raise UndiffuseError(
                f"long_prompts=windows is for networks that read CLIP alone; this one's texts have {longest} tokens"
            )
        if reading.clip_skip > self.most_skipped:
            most = f"leave out at most {self.most_skipped}" if self.most_skipped else "none can be left out here"
            raise UndiffuseError(f"clip_skip={reading.clip_skip} of the layers of {', '.join(self.names)}: {most}")

    def skipping(self, values: Tensor, layers: int) -> Tensor:
        values = values.clone()
        values[:, 0] = layers
        return values

    def read(self, texts: Sequence[str], captions: bool = False, reading: PromptReading = AS_WRITTEN) -> Tensor:
        """As :meth:`.Written.read`; each encoder cuts at its own length."""
        self.follow(reading)
        rows = self.join([self.row(text, reading, captions) for text in texts])
        return self.skipping(rows, reading.clip_skip)

    def row(self, text: str, reading: PromptReading, captions: bool) -> Tensor:
        """``[1, 1 + windows * window]``: one text, without the layers that are left out."""
        read = self.words(text, reading)
        if reading.long == "cut":
            for name, size in zip(self.names, self.sizes, strict=True):
                if len(read[name]) > size and not (captions and self.has_cut):
                    self.has_cut = True
                    cut = self.reader(name).text((tokens_of(read[name][size:]) - 1).tolist())
                    warnings.warn(
                        f"the text has {len(read[name])} tokens, {name} reads {size}: cut was {cut[:200]!r}",
                        UndiffuseWarning,
                        stacklevel=4,
                    )
        count = self.windows_of(read) if reading.long == "windows" else 1
        parts = []
        for name, size in zip(self.names, self.sizes, strict=True):
            words = read[name][: count * size]
            parts.append(F.pad(words, (0, count * size - len(words))).unflatten(0, (count, size)))
        return F.pad(torch.cat(parts, dim=1).flatten(), (1, 0))[None]

    def words(self, text: str, reading: PromptReading) -> dict[str, Tensor]:
        """All tokens of a text with their weights, for each encoder, as they stand in rows."""
        text = text.encode("utf-8", "replace").decode()  # half of a pair of surrogates is no text
        text = text.lower().strip() if self.lower else text
        plain, weights = weighted(text) if reading.weighted else (text, None)
        read = {}
        for name in self.names:
            reader = self.reader(name)
            tokens = [1 + token for token in reader.tokens(plain)]
            read[name] = heavy(tokens, None if weights is None else reader.weighed(plain, weights))
        return read

    def windows_of(self, read: Mapping[str, Tensor]) -> int:
        """How many windows a text takes, at least one."""
        count = max(1, *(-(-len(read[name]) // size) for name, size in zip(self.names, self.sizes, strict=True)))
        if count > MOST_WINDOWS:
            raise UndiffuseError(f"the text takes {count} windows, at most {MOST_WINDOWS} are read: make it shorter")
        return count

    def check_length(self, text: str, reading: PromptReading = AS_WRITTEN) -> None:
        """As :meth:`.Written.check_length`, for a text that none of the encoders reads to its end."""
        self.follow(reading)
        read = self.words(text, reading)
        if reading.long == "windows":
            self.windows_of(read)
        elif all(len(read[name]) > size for name, size in zip(self.names, self.sizes, strict=True)):
            size, name = max(zip(self.sizes, self.names, strict=True))
            raise UndiffuseError(f"the text has {len(read[name])} tokens, this model reads {size}: make it shorter")

    def check(self, values: Tensor) -> Tensor:
        if (
            values.dtype != torch.int64
            or values.ndim != 2
            or values.shape[1] <= 1
            or (values.shape[1] - 1) % self.window
        ):
            raise UndiffuseError(
                f"texts must be int64 [B, 1 + windows * {self.window}], got {values.dtype} {list(values.shape)}"
            )
        if not self.windows and values.shape[1] != self.length:
            raise UndiffuseError(f"this network reads one window, got {list(values.shape)}, not [B, {self.length}]")
        if bool(((values[:, 0] < 0) | (values[:, 0] > self.most_skipped)).any()):
            raise UndiffuseError(f"a text leaves out layers that are not there: at most {self.most_skipped} can be")
        words = values[:, 1:].unflatten(1, (-1, self.window))
        if bool((words < 0).any()) or not bool((weights_of(words) <= HEAVIEST).all()):
            raise UndiffuseError(f"a token's weight is not from 0 to {HEAVIEST:g}: these are no texts")
        for name, part in zip(self.names, words.split(self.sizes, 2), strict=True):
            count = int(self.reader(name).model.config.vocab_size)  # type: ignore[union-attr]
            if bool((tokens_of(part) > count).any()):
                raise UndiffuseError(f"a token is not one of the {count} of {name}: they are another model's")
        return values

    def join(self, rows: Sequence[Tensor]) -> Tensor:
        """As :meth:`.Condition.join`; a text is the same with windows behind it in which nothing is."""
        longest = max(each.shape[1] for each in rows)
        return torch.cat([F.pad(each, (0, longest - each.shape[1])) for each in rows])

    def counts(self, values: Tensor) -> list[int] | None:
        """As :meth:`.Condition.counts`: the windows of each text."""
        if values.shape[1:] == (self.length,):
            return None
        there = self.check(values)[:, 1:].unflatten(1, (-1, self.window)).ne(0).any(2)
        last = there * torch.arange(1, 1 + there.shape[1], device=there.device)
        return last.amax(1).clamp(min=1).tolist()

    def embed(self, values: Tensor) -> Embedded:
        """Of texts that have equally many windows."""
        windows = max(self.counts(values) or [1])
        said = [self.said(row) for row in values[:, : 1 + windows * self.window].cpu()]
        tokens, mask = torch.stack([each.tokens for each in said]), torch.stack([each.mask for each in said])
        pooled = [each.pooled for each in said if each.pooled is not None]
        vector = self.layout.put("pooled", torch.stack(pooled).float()) if "pooled" in self.layout.sizes else None
        return Embedded(vector, tokens, mask)

    def said(self, row: Tensor) -> Said:
        """What is said of one row, kept."""
        key = row.numpy().tobytes()
        said = self.kept.pop(key, None)
        if said is None:
            skip, windows = int(row[0]), row[1:].unflatten(0, (-1, self.window))
            said = one_after_another([self.arrange(self.each_says(window, skip)) for window in windows])
            if self.zeros and not bool(windows.any()):
                pooled = None if said.pooled is None else torch.zeros_like(said.pooled)
                said = Said(torch.zeros_like(said.tokens), pooled, said.mask)
        self.kept[key] = said
        while len(self.kept) > KEPT:
            self.kept.popitem(last=False)
        return said

    def each_says(self, window: Tensor, skip: int) -> list[Said]:
        """What each encoder says of its part of a window."""
        parts = zip(self.names, window.split(self.sizes), strict=True)
        words = {name: part[part != 0] for name, part in parts}
        return [
            self.reader(name)((tokens_of(each) - 1).tolist(), weights_of(each), skip) for name, each in words.items()
        ]

    def _apply(self, *given: Any, **options: Any) -> Texts:
        self.kept.clear()  # what is kept lies where the encoders lay
        return super()._apply(*given, **options)


class Told(Condition, ABC):
    """Abstract: a condition without weights."""

    asked = False
    told = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("anchor", torch.zeros(()), persistent=False)  # tells the device
        self.anchor: Tensor

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]: ...


@final
class Numbers(Told):
    """Some numbers, float ``[B, K]``, in their place in the vector: the size of the picture, a guidance scale.

    Args:
        usual: what is told of what is asked for, where nobody says otherwise.
        against: and of what guidance leads away from; None: the same.
    """

    def __init__(
        self, name: str, layout: Layout, usual: Sequence[float], against: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        self.name, self.layout = name, layout
        self.ordinary, self.negative = tuple(usual), tuple(usual if against is None else against)

    @property
    def config(self) -> dict[str, Any]:
        return {"usual": list(self.ordinary), "against": list(self.negative)}

    def check(self, values: Tensor) -> Tensor:
        if values.ndim != 2 or values.shape[1] != len(self.ordinary) or not bool(values.isfinite().all()):
            raise UndiffuseError(f"{self.name} takes finite [B, {len(self.ordinary)}], got {list(values.shape)}")
        return values

    def usual(self, batch: int) -> Tensor:
        return torch.tensor([self.ordinary], device=self.anchor.device).expand(batch, -1).clone()

    def null(self, batch: int) -> Tensor:
        return torch.tensor([self.negative], device=self.anchor.device).expand(batch, -1).clone()

    def embed(self, values: Tensor) -> Embedded:
        return Embedded(self.layout.put(self.name, values.float()))


@final
class ClassNumbers(Told):
    """A class, integers 0 to ``classes - 1`` and ``classes`` for none (derived, trap G4), which the network itself
    embeds; ``has_null``: whether it knows one for none."""

    asked = True
    told = False

    def __init__(self, classes: int, layout: Layout, has_null: bool) -> None:
        super().__init__()
        self.classes, self.layout, self.has_null = classes, layout, has_null

    @property
    def config(self) -> dict[str, Any]:
        return {"classes": self.classes}

    def check(self, values: Tensor) -> Tensor:
        if values.dtype.is_floating_point or values.ndim != 1:
            raise UndiffuseError(f"classes must be integers [B], got {values.dtype} of shape {list(values.shape)}")
        wrong = values[(values < 0) | (values > self.classes)]
        if len(wrong):
            raise UndiffuseError(f"class {int(wrong[0])} does not exist: this model has 0 to {self.classes - 1}")
        if not self.has_null and bool((values == self.classes).any()):
            raise UndiffuseError("this model knows no null class: name a class, and leave guidance_scale at 1")
        return values

    def null(self, batch: int) -> Tensor:
        return torch.full((batch,), self.classes, device=self.anchor.device)

    def embed(self, values: Tensor) -> Embedded:
        return Embedded(self.layout.put("classes", values.float()[:, None]))


@final
class Hole(Told):
    """What an inpainting network sees beside x: ``[B, 1 + C, h, w]``, 1 where the picture is to be made and 0 where it
    is known, and the latents of the known picture, grey where it is not. Null is NaN everywhere: nothing is known.

    Args:
        grey: gives the latents ``[1, C, h, w]`` of a grey picture.
    """

    def __init__(self, shape: Sequence[int], grey: Callable[[], Tensor]) -> None:
        super().__init__()
        self.shape, self.grey = tuple(shape), cache(grey)
        self.channels = self.shape[0]

    @property
    def config(self) -> dict[str, Any]:
        return {"shape": list(self.shape)}

    def check(self, values: Tensor) -> Tensor:
        if tuple(values.shape[1:]) != self.shape:
            raise UndiffuseError(f"a hole takes [B, {', '.join(map(str, self.shape))}], got {list(values.shape)}")
        lost = values.isnan().flatten(1)
        if bool((lost.any(1) != lost.all(1)).any()) or bool(values.isinf().any()):
            raise UndiffuseError("a hole holds NaN or infinite numbers (nothing but NaN means: nothing is known)")
        return values

    def null(self, batch: int) -> Tensor:
        return torch.full((batch, *self.shape), torch.nan, device=self.anchor.device)

    def embed(self, values: Tensor) -> Embedded:
        lost = values.isnan().flatten(1).all(1)
        if not bool(lost.any()):
            return Embedded(channels=values)
        grey = self.grey().to(values)
        return Embedded(
            channels=torch.where(lost[:, None, None, None], torch.cat([torch.ones_like(grey[:, :1]), grey], 1), values)
        )
