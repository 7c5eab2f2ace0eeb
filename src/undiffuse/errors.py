"""Errors that say what, where, and what to do.

Everything a user can get wrong is an :class:`UndiffuseError` with a one-line message; the command line prints that
line and exits with code 2. Bugs keep their own exception types and their traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")


class UndiffuseError(ValueError):
    """A mistake in the input: the message names the file or option and the remedy."""

    exit_code = 2
    """What the command line ends with."""


class Deserted(UndiffuseError):
    """Of several processes another one has failed, and says itself why."""


class Failed(UndiffuseError):
    """Of several processes one that is not the first has failed; the message says which."""


class UndiffuseWarning(UserWarning):
    """The result will be right, but probably not what was hoped for; the message says why and what to change."""


def unknown(kind: str, name: object, choices: Iterable[str]) -> UndiffuseError:
    """The error for a name that is not one of ``choices``, with the nearest one suggested.

    >>> str(unknown("solver", "heum", ["euler", "heun"]))
    "unknown solver 'heum': did you mean 'heun'? (choose from: euler, heun)"
    """
    names = sorted(str(choice) for choice in choices)
    near = get_close_matches(str(name), names, n=1)
    hint = f": did you mean {near[0]!r}?" if near else ""
    return UndiffuseError(f"unknown {kind} {str(name)!r}{hint} (choose from: {', '.join(names) or 'nothing'})")


def choose(kind: str, name: str, registry: dict[str, T]) -> T:
    """``registry[name]``, or an error that suggests the nearest name."""
    if name not in registry:
        raise unknown(kind, name, registry)
    return registry[name]
