"""The conditions of diffusers' pipelines: texts, and numbers that are told beside them.

A text's raw values are the tokens of every encoder in a row, each plus 1 so that 0 is padding, without marks; what the
encoders make of a row is kept, so that a text is read once and not at every step.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...conditions import Condition, Embedded, Written
from ...errors import UndiffuseError, UndiffuseWarning
from .networks import Layout, Seats

KEPT = 64
"""Texts of which the embedding is kept, the last ones used."""


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
    """

    def __init__(
        self, tokenizer: Any, model: nn.Module, places: int, layer: int | None, pooled: str | None, masked: bool
    ) -> None:
        super().__init__()
        self.tokenizer, self.model, self.seats = tokenizer, model, Seats()
        self.places, self.layer, self.pooled, self.masked = places, layer, pooled, masked
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

    def tokens(self, text: str) -> list[int]:
        """Of the words, without marks."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text.strip() else []

    def text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens)))

    @torch.no_grad()
    def forward(self, words: Sequence[int]) -> Said:
        """What the encoder says of a text, given its words."""
        row = [*self.before, *words, *self.after]
        mask = torch.arange(self.places) < len(row)
        with self.seats(self.model) as device:
            said = self.model(
                input_ids=torch.tensor([row + [self.pad] * (self.places - len(row))], device=device),
                attention_mask=mask[None].long().to(device) if self.masked else None,
                output_hidden_states=self.layer is not None,
            )
        home = torch.device("cpu") if self.seats.device is not None else device
        tokens = said.last_hidden_state if self.layer is None else said.hidden_states[self.layer]
        pooled = None if self.pooled is None else said[self.pooled][0].to(home)
        return Said(tokens[0].to(home), pooled, mask.to(home))


# --- How a family puts together what its encoders say -----------------------------------------------------------------

Arrange = Callable[[Sequence[Said]], Said]


def alone(said: Sequence[Said]) -> Said:
    """One encoder."""
    return said[0]


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
    """

    def __init__(
        self,
        readers: dict[str, Reader],
        arrange: Arrange,
        layout: Layout,
        zeros: bool = False,
        lower: bool = False,
    ) -> None:
        super().__init__()
        self.readers = nn.ModuleDict(readers)
        self.names, self.arrange, self.layout = tuple(readers), arrange, layout
        self.zeros, self.lower = zeros, lower
        self.length = sum(self.reader(name).words for name in self.names)
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

    def read(self, texts: Sequence[str], captions: bool = False) -> Tensor:
        """As :meth:`.Written.read`; each encoder cuts at its own length."""
        rows = torch.zeros(len(texts), self.length, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            begin, text = 0, text.lower().strip() if self.lower else text
            for name in self.names:
                reader = self.reader(name)
                tokens = reader.tokens(text)
                if len(tokens) > reader.words and not (captions and self.has_cut):
                    self.has_cut = True
                    cut = reader.text(tokens[reader.words :])
                    warnings.warn(
                        f"the text has {len(tokens)} tokens, {name} reads {reader.words}: cut was {cut[:200]!r}",
                        UndiffuseWarning,
                        stacklevel=2,
                    )
                tokens = tokens[: reader.words]
                row[begin : begin + len(tokens)] = torch.tensor(tokens, dtype=torch.int64) + 1
                begin += reader.words
        return rows

    def check_length(self, text: str) -> None:
        """As :meth:`.Written.check_length`, for a text that none of the encoders reads to its end."""
        text = text.lower().strip() if self.lower else text
        counts = {name: len(self.reader(name).tokens(text)) for name in self.names}
        if all(count > self.reader(name).words for name, count in counts.items()):
            name = max(self.names, key=lambda each: self.reader(each).words)
            raise UndiffuseError(
                f"the text has {counts[name]} tokens, this model reads {self.reader(name).words}: make it shorter"
            )

    def check(self, values: Tensor) -> Tensor:
        values = super().check(values)
        for name, part in zip(
            self.names, values.split([self.reader(name).words for name in self.names], 1), strict=True
        ):
            count = int(self.reader(name).model.config.vocab_size)  # type: ignore[union-attr]
            if bool(((part < 0) | (part > count)).any()):
                raise UndiffuseError(f"a token is not one of the {count} of {name}: they are another model's")
        return values

    def embed(self, values: Tensor) -> Embedded:
        said = [self.said(row) for row in values.cpu()]
        tokens, mask = torch.stack([each.tokens for each in said]), torch.stack([each.mask for each in said])
        pooled = [each.pooled for each in said if each.pooled is not None]
        vector = self.layout.put("pooled", torch.stack(pooled).float()) if "pooled" in self.layout.sizes else None
        return Embedded(vector, tokens, mask)

    def said(self, row: Tensor) -> Said:
        """What is said of one row of tokens, kept."""
        key = row.numpy().tobytes()
        said = self.kept.pop(key, None)
        if said is None:
            parts = row.split([self.reader(name).words for name in self.names])
            words = [[token - 1 for token in part.tolist() if token] for part in parts]
            said = self.arrange([self.reader(name)(each) for name, each in zip(self.names, words, strict=True)])
            if self.zeros and not any(words):
                pooled = None if said.pooled is None else torch.zeros_like(said.pooled)
                said = Said(torch.zeros_like(said.tokens), pooled, said.mask)
        self.kept[key] = said
        while len(self.kept) > KEPT:
            self.kept.popitem(last=False)
        return said

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
