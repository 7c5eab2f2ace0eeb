"""Byte pairs: any text can be written and read back."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from undiffuse.tokens import BytePairs, learn, normalised, words

TEXTS = ["a small red circle", "two red circles", "a blue square", "two blue squares"]
text = st.text(max_size=40)


@settings(max_examples=40, deadline=None)
@given(text, st.lists(text, max_size=3))
def test_a_text_is_read_back(said: str, learned_from: list[str]) -> None:
    pairs = BytePairs(learn([*learned_from, said, said], 50))
    tokens = pairs.encode(said)
    assert all(0 < token < pairs.count for token in tokens)
    expected = normalised(said).encode("utf-8", "replace").decode()
    assert pairs.decode([*tokens, 0, 0]) == expected
    assert (tokens == []) == (expected == "")


def test_frequent_words_are_one_token_and_new_ones_are_not_lost() -> None:
    pairs = BytePairs(learn(TEXTS * 2))
    assert len(pairs.encode("two red squares")) == 3
    assert len(pairs.encode("two red hexagons")) > 3
    assert pairs.decode(pairs.encode("Zwei  GRÜNE\n🔺!")) == "zwei grüne 🔺!"


def test_case_and_spaces_change_nothing() -> None:
    pairs = BytePairs(learn(TEXTS * 2))
    assert pairs.encode("A  small\tRed circle ") == pairs.encode("a small red circle")
    assert pairs.encode(" \n ") == []


def test_learning_is_deterministic_and_counts_pairs() -> None:
    assert learn(TEXTS) == learn(list(TEXTS))
    first = learn(TEXTS, 1)[0]
    counted = Counter(a + b for said in TEXTS for word in words(said) for a, b in pairwise(word))
    assert counted[first] == max(counted.values())
    assert learn([]) == ()


def test_pieces_join_in_the_order_of_the_vocabulary() -> None:
    """Of "abc" either "ab" or "bc" is made, whichever comes first."""
    assert [BytePairs(("ab", "bc")).decode([t]) for t in BytePairs(("ab", "bc")).encode("abc")][-2:] == ["ab", "c"]
    assert [BytePairs(("bc", "ab")).decode([t]) for t in BytePairs(("bc", "ab")).encode("abc")][-2:] == ["a", "bc"]
