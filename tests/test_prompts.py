"""Weights in brackets: what they mean, where they are wrong, and that without them nothing changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from undiffuse.errors import UndiffuseError
from undiffuse.prompts import HEAVIEST, PromptReading, heavy, tokens_of, weighted, weights_of


def said(text: str) -> dict[str, float]:
    """The weight of each word, rounded."""
    plain, weights = weighted(text)
    assert len(plain) == len(weights)
    found, begin = {}, 0
    for word in plain.split():
        begin = plain.index(word, begin)
        each = {round(weight, 6) for weight in weights[begin : begin + len(word)]}
        assert len(each) == 1
        found[word], begin = each.pop(), begin + len(word)
    return found


MEANINGS = {
    "a red cat": {"a": 1, "red": 1, "cat": 1},
    "a (red:1.3) cat": {"a": 1, "red": 1.3, "cat": 1},
    "a (red) [cat]": {"a": 1, "red": 1.1, "cat": round(1 / 1.1, 6)},
    "((a)) [[b]]": {"a": 1.21, "b": round(1 / 1.21, 6)},
    "(a (b:2) c:1.5)": {"a": 1.5, "b": 3, "c": 1.5},
    "(a [b] c:0.5)": {"a": 0.5, "b": round(0.5 / 1.1, 6), "c": 0.5},
    "(a b: .5 ) c": {"a": 0.5, "b": 0.5, "c": 1},
    "(a:0) (b:10)": {"a": 0, "b": 10},
    "a (at dawn: b)": {"a": 1, "at": 1.1, "dawn:": 1.1, "b": 1.1},
    "12:30 and b:2": {"12:30": 1, "and": 1, "b:2": 1},
    "() (:3) [] a": {"a": 1},
}


@pytest.mark.parametrize("text", MEANINGS)
def test_what_brackets_mean(text: str) -> None:
    assert said(text) == MEANINGS[text]


def test_signs_that_are_meant() -> None:
    assert weighted(r"\(a\) \[b\] c\\ d\e (at 12\:30)")[0] == r"(a) [b] c\ d\e at 12:30"
    assert set(weighted(r"\(a\) \[b\|c\]")[1]) == {1.0}


WRONG = {
    "a (red cat": (3, r"( is never closed; write \("),
    "a ((red) cat": (3, "never closed"),
    "a red) cat": (6, ") closes nothing"),
    ":)": (2, "closes nothing"),
    "a (red] cat": (7, "] closes nothing"),
    "[(a:2]": (4, "] closes nothing"),
    "(red:1,3)": (5, "'1,3' is no weight"),
    "(red:)": (5, "is no weight"),
    "(red:-1)": (5, "'-1' is no weight"),
    "(red:1.3.1)": (5, "is no weight"),
    "(red:1e3)": (5, "is no weight"),
    "(red:10.1)": (5, "more than 10"),
    "((red:4):4)": (9, "more than 10"),
    "(at 12:30)": (7, "more than 10"),
    "[red:0.5]": (5, "change the prompt on the way"),
    "[red:blue:10]": (10, "change the prompt on the way"),
    "[red|blue]": (5, "change the prompt on the way"),
    "(" * 30: (21, "more than 20 brackets"),
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_refused_at_its_place(text: str) -> None:
    place, why = WRONG[text]
    with pytest.raises(UndiffuseError) as error:
        weighted(text)
    assert f"character {place}, " in str(error.value)
    assert why in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_law_a_text_with_its_signs_escaped_is_itself(text: str) -> None:
    escaped = "".join(f"\\{sign}" if sign in "()[]\\:" else sign for sign in text)
    assert weighted(escaped) == (text, [1.0] * len(text))


@given(st.lists(st.tuples(st.text("ab ,|", max_size=5), st.floats(0, 10)), max_size=6))
def test_law_brackets_leave_the_text_as_it_was(parts: list[tuple[str, float]]) -> None:
    plain, weights = weighted("".join(f"({text}:{weight:.5f})" for text, weight in parts))
    assert plain == "".join(text for text, _ in parts)
    assert weights == [float(f"{weight:.5f}") for text, weight in parts for _ in text]


@given(st.text("()[]:\\|1.a ", max_size=40))
def test_law_any_text_is_read_or_refused(text: str) -> None:
    try:
        plain, weights = weighted(text)
    except UndiffuseError:
        return
    assert len(plain) == len(weights)
    assert all(0 <= weight <= HEAVIEST for weight in weights)


@given(st.lists(st.tuples(st.integers(1, 2**32 - 1), st.floats(0, 10, width=32)), max_size=9))
def test_law_tokens_and_weights_come_back(pairs: list[tuple[int, float]]) -> None:
    tokens, weights = [token for token, _ in pairs], [weight for _, weight in pairs]
    values = heavy(tokens, weights)
    assert tokens_of(values).tolist() == tokens
    assert weights_of(values).tolist() == weights
    assert bool((values != 0).all())
    assert torch.equal(heavy(tokens, [1.0] * len(tokens)), torch.tensor(tokens, dtype=torch.int64))


@pytest.mark.parametrize(
    "wrong",
    [
        {"weighted": "yes"},
        {"weighted": 1},
        {"long": "chunks"},
        {"clip_skip": -1},
        {"clip_skip": 1.0},
        {"clip_skip": True},
        {"clip_skip": None},
    ],
)
def test_no_way_of_reading(wrong: dict) -> None:
    with pytest.raises(UndiffuseError, match=next(iter(wrong)).split("_")[-1]):
        PromptReading(**wrong)
