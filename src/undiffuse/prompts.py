"""How a prompt is read: to its letter, or with weights in brackets; cut where the encoder's window ends, or in several
windows; by the whole encoder, or without its last layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import UndiffuseError

STRESS = 1.1
"""What a bracket without a number multiplies by; a square one divides."""
HEAVIEST = 10.0
DEEPEST = 20  # brackets in one another
CLOSES = {")": "(", "]": "["}
NUMBER = re.compile(r":\s*([-+.,\d][^()\[\]:]*|)([)\]])")
"""What ends a bracket with a number, and what was meant to."""
VALID = re.compile(r"\d+\.?\d*|\.\d+")


@dataclass(frozen=True)
class PromptReading:
    """How the prompts of a request are read.

    Attributes:
        weighted: brackets weigh words (:func:`weighted`); otherwise they are brackets.
        long: ``cut`` after the encoder's window, with a warning, or read in as many ``windows`` as it takes.
        clip_skip: how many of CLIP's last layers are left out.
    """

    weighted: bool = False
    long: Literal["cut", "windows"] = "cut"
    clip_skip: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.weighted, bool):
            raise UndiffuseError(f"weighted_prompts is true or false, got {self.weighted!r}")
        if self.long not in ("cut", "windows"):
            raise UndiffuseError(f"long_prompts is cut or windows, got {self.long!r}")
        if type(self.clip_skip) is not int or self.clip_skip < 0:
            raise UndiffuseError(f"clip_skip is a number of layers, 0 for none, got {self.clip_skip!r}")


AS_WRITTEN = PromptReading()
"""To the letter, in one window, by the whole encoder."""


def weighted(text: str) -> tuple[str, list[float]]:
    """The text without its brackets, and a weight for each of its characters.

    ``(word:1.3)`` weighs a word (or several) 1.3 times, ``(word)`` 1.1 times, ``[word]`` 1/1.1 times; in one another
    they multiply. ``\\(``, ``\\)``, ``\\[``, ``\\]``, ``\\:`` and ``\\\\`` are the signs themselves.

    Raises :class:`UndiffuseError` that says where: a bracket without its other half, a weight that is no number from 0
    to 10, and what other programs understand as a change on the way, ``[one:other:0.5]`` and ``[one|other]``.

    >>> weighted("a (red:1.3) cat")[0]
    'a red cat'
    """
    letters: list[str] = []
    weights: list[float] = []
    open: list[tuple[str, int, int]] = []  # the bracket, where it stands, how many letters came before it
    i = 0
    while i < len(text):
        sign = text[i]
        number = NUMBER.match(text, i) if sign == ":" and open else None
        closing = number[2] if number else sign
        if sign == "\\" and text[i + 1 : i + 2] in tuple("()[]:\\"):
            letters.append(text[i + 1])
            weights.append(1.0)
            i += 2
        elif sign in "([":
            open.append((sign, i, len(letters)))
            if len(open) > DEEPEST:
                raise misread(text, i, f"more than {DEEPEST} brackets in one another")
            i += 1
        elif closing in CLOSES:
            if not open or open[-1][0] != CLOSES[closing]:
                raise misread(text, i, f"{closing} closes nothing; write \\{closing} for the sign itself")
            if number and closing == "]":
                raise misread(text, i, "[word:0.5] would change the prompt on the way; (word:0.5) weighs a word")
            if number and not VALID.fullmatch(number[1].strip()):
                raise misread(text, i, f"{number[1]!r} is no weight, as in (word:1.3); write \\: for the sign itself")
            bracket, _, begin = open.pop()
            factor = float(number[1]) if number else STRESS if bracket == "(" else 1 / STRESS
            weights[begin:] = [factor * weight for weight in weights[begin:]]
            if max(weights[begin:], default=factor) > HEAVIEST:
                raise misread(text, i, f"a weight of more than {HEAVIEST:g}")
            i = number.end() if number else i + 1
        else:
            if sign == "|" and any(bracket == "[" for bracket, _, _ in open):
                raise misread(text, i, "[one|other] would change the prompt on the way; write \\[ for a bracket")
            letters.append(sign)
            weights.append(1.0)
            i += 1
    if open:
        bracket, place, _ = open[-1]
        raise misread(text, place, f"{bracket} is never closed; write \\{bracket} for the sign itself")
    return "".join(letters), weights


def misread(text: str, place: int, said: str) -> UndiffuseError:
    """What is wrong with a weighted prompt, and where."""
    before, after = text[max(0, place - 20) : place], text[place : place + 20]
    return UndiffuseError(f"weighted prompt, character {place + 1}, at {before + ' >' + after!r}: {said}")


# --- Tokens with weights, as raw values have them ---------------------------------------------------------------------

WHOLE = 0x3F800000
"""The bits of the number 1 in float32."""


def heavy(tokens: Sequence[int], weights: Sequence[float] | None) -> Tensor:
    """``[T]`` int64: each token in the lower half, and its weight's float32 in the upper, where 0 means the weight 1.
    So a token that weighs nothing special is itself."""
    values = torch.tensor(tokens, dtype=torch.int64)
    if weights is None:
        return values
    bits = torch.tensor(weights, dtype=torch.float32).view(torch.int32) ^ WHOLE
    return values | bits.to(torch.int64) << 32


def tokens_of(values: Tensor) -> Tensor:
    """The tokens of :func:`heavy` values, int64."""
    return values & 0xFFFFFFFF


def weights_of(values: Tensor) -> Tensor:
    """Their weights, float32."""
    return ((values >> 32).to(torch.int32) ^ WHOLE).view(torch.float32)
