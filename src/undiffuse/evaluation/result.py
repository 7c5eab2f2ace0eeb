"""What an evaluation has found, as it is written and read: all of it JSON. No torch here: the command line reads it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..config import load_json
from ..errors import UndiffuseError

FORMAT = 1


@dataclass(frozen=True)
class Evaluation:
    """What was found; all of it JSON.

    Attributes:
        fingerprint: equal for two evaluations whose numbers may be compared.
        samples: where they are from, with a ``fingerprint`` of their making.
        data, features: what they were compared with, and in what.
        metrics: by name ``value``, ``interval``, ``floor`` (real against real), ``n`` and how they were found.
        refused: metrics that these samples cannot have, and why.
        memorisation: in feature space, and in ``pixels`` for pictures.
        classes: what a classifier takes the samples for, against the data.
        losses: the held-out loss by noise level, for models.
        likelihood: bits a dimension, where asked.
        notes: what should be known of the above.
        environment, command, seconds: where and how.
        path: the folder of ``evaluation.json`` and ``report.html``.
    """

    fingerprint: str
    samples: dict[str, Any]
    data: dict[str, Any]
    features: dict[str, Any]
    metrics: dict[str, dict[str, Any]]
    refused: dict[str, str]
    memorisation: dict[str, Any] | None
    classes: dict[str, Any] | None
    losses: dict[str, Any] | None
    likelihood: dict[str, Any] | None
    notes: list[str]
    environment: dict[str, Any]
    command: str
    seconds: float
    path: str
    undiffuse: str = __version__
    format: int = FORMAT


def comparable(*evaluations: Evaluation) -> bool:
    """Whether numbers of these may stand in one table without a mark."""
    return len({each.fingerprint for each in evaluations}) <= 1


def read_evaluation(path: str | os.PathLike[str]) -> Evaluation:
    """The evaluation in an ``evaluation.json`` or its folder."""
    path = Path(path)
    path = path / "evaluation.json" if path.is_dir() else path
    stated = load_json(path)
    if not isinstance(stated, dict) or stated.get("format") != FORMAT:
        raise UndiffuseError(f"{path}: not an evaluation of format {FORMAT}")
    try:
        return Evaluation(**stated)
    except TypeError as error:
        raise UndiffuseError(f"{path}: not an evaluation ({error})") from None


def earlier(out: Path, folder: Path) -> list[Evaluation]:
    """The evaluations in ``out`` but for that in ``folder``, by name; those that cannot be read are left out."""
    found = []
    for path in sorted(out.glob("*/evaluation.json")):
        if path.parent.resolve() != folder.resolve():
            try:
                found.append(read_evaluation(path))
            except (UndiffuseError, OSError):
                continue
    return found
