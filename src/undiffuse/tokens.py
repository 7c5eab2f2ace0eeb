"""Text as numbers: byte pairs (Sennrich et al. 2016, arXiv:1508.07909), learned from the captions of the data.

A text is lower-cased, its words are cut into bytes, and neighbours are joined in the order in which a *vocabulary*
names the results. Any text can be written so and read back; frequent words become one token each. Token 0 is padding,
1 to 256 are the bytes, and the pieces of the vocabulary follow. A piece has one character a byte (Latin-1), so that it
fits into JSON.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

PIECES = 1024
"""Most pieces of a learned vocabulary."""
RARE = 2
"""A pair that is seen less often than this is no piece."""
SAMPLE = 100_000
"""A vocabulary is learned from so many texts at most."""


def normalised(text: str) -> str:
    """Lower case, with single spaces between words: what :meth:`BytePairs.decode` gives back."""
    return " ".join(text.lower().split())


def words(text: str) -> Iterator[str]:
    """Words and signs with the space before them, one character a byte; the first has a space too."""
    for word in re.findall(r" ?\w+| ?[^\w\s]+", " " + normalised(text)):
        yield word.encode("utf-8", "replace").decode("latin-1")


def joined(symbols: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """``symbols`` with every such pair of neighbours made one, from the left."""
    result: list[str] = []
    i = 0
    while i < len(symbols):
        two = i + 1 < len(symbols) and (symbols[i], symbols[i + 1]) == pair
        result.append(symbols[i] + symbols[i + 1] if two else symbols[i])
        i += 1 + two
    return result


def learn(texts: Iterable[str], pieces: int = PIECES) -> tuple[str, ...]:
    """The vocabulary of these texts (the first 100,000): again and again the most frequent pair of neighbours becomes a
    piece, among equals the first in the alphabet."""
    counts: Counter[str] = Counter()
    for text, _ in zip(texts, range(SAMPLE), strict=False):
        counts.update(words(text))
    split = {word: list(word) for word in counts}
    pairs: Counter[tuple[str, str]] = Counter()
    places: dict[tuple[str, str], set[str]] = {}  # the words that have it, or had it

    def tally(word: str, sign: int) -> None:
        for pair in pairwise(split[word]):
            pairs[pair] += sign * counts[word]
            places.setdefault(pair, set()).add(word)

    for word in split:
        tally(word, 1)
    found: list[str] = []
    while len(found) < pieces and pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < RARE:
            break
        found.append("".join(best))
        for word in places.pop(best):
            tally(word, -1)
            split[word] = joined(split[word], best)
            tally(word, 1)
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class BytePairs:
    """Texts to tokens and back, by the pieces of a vocabulary, most important first."""

    vocabulary: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many tokens there are, padding included."""
        return 257 + len(self.vocabulary)

    @cached_property
    def _rank(self) -> dict[str, int]:
        return {piece: rank for rank, piece in enumerate(self.vocabulary)}

    @cached_property
    def _known(self) -> dict[str, tuple[int, ...]]:
        return {}  # the tokens of words met before

    def encode(self, text: str) -> list[int]:
        """Its tokens; none for a text without words."""
        return [token for word in words(text) for token in self._word(word)]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text, as :func:`normalised`; padding is left out."""
        pieces = (chr(t - 1) if t <= 256 else self.vocabulary[t - 257] for t in tokens if t)
        return "".join(pieces).encode("latin-1").decode("utf-8", "replace").strip()

    def _word(self, word: str) -> tuple[int, ...]:
        if word not in self._known:
            symbols = list(word)
            while True:
                pairs = set(pairwise(symbols))
                pieces = [pair for pair in pairs if "".join(pair) in self._rank]
                if not pieces:
                    break
                symbols = joined(symbols, min(pieces, key=lambda pair: (self._rank["".join(pair)], pair)))
            tokens = tuple(257 + self._rank[s] if s in self._rank else 1 + ord(s) for s in symbols)
            if len(self._known) > 100_000:
                self._known.clear()
            self._known[word] = tokens
        return self._known[word]
