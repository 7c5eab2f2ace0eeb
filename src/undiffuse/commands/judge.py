"""``undiffuse judge``: which pictures do people prefer, when nobody knows whose they are?"""

from __future__ import annotations

import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ..errors import UndiffuseError
from .options import AnyPath

if TYPE_CHECKING:
    from ..evaluation.judge import Judgement

EXAMPLES = """
undiffuse judge runs/a runs/b                  100 pairs, in judge/study.html
undiffuse judge runs/a runs/b ./photos -n 150 --out who-is-real
undiffuse judge judge --votes votes-ada.json votes-bob.json
"""


@dataclass(frozen=True)
class Judged:
    """A study that was made, or what its votes say."""

    folder: Path
    page: Path  # study.html to send to people, or report.html
    arms: tuple[str, ...]
    pairs: int
    judgement: Judgement | None


def judge(
    sources: Annotated[tuple[str, ...], tyro.conf.Positional],
    number: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 100,
    votes: tuple[tuple[str, ...], ...] = (),
    out: AnyPath = Path("judge"),
    seed: int = 0,
    question: str = "Which looks better?",
    device: str = "auto",
) -> Judged:
    """Make a page of pairs for people to choose from, blind; then merge their votes into scores.

    Pairs come in random order and on random sides, and the page does not know which model a picture is of: send
    study.html, keep key.json. Its readers choose with the arrow keys and send back the file that it downloads.

    Args:
        sources: Two or more models, folders of pictures or .npy arrays; picture i of each stands against picture i of
            another (models: from the same noise). With --votes: the folder of one study.
        number: How many pairs, over all pairs of sources.
        votes: Files that the page has downloaded, of any number of raters.
        out: The folder of a new study.
        seed: Of the samples, the order and the sides.
        question: What is asked.
        device: auto, cpu, cuda, mps.

    Raises:
        UndiffuseError: sources without pictures or of different sizes, votes of another study.
    """
    from ..evaluation.judge import Study, judge_votes, make_study

    if votes:
        if len(sources) != 1:
            raise UndiffuseError("--votes are of one study: name its folder alone")
        found = judge_votes(sources[0], [file for files in votes for file in files])
        study, folder = Study.read(sources[0]), Path(sources[0])
        return Judged(folder, folder / "report.html", study.arms, len(study.pairs), found)
    if len(sources) == 1 and (Path(sources[0]) / "key.json").is_file():
        raise UndiffuseError(f"{sources[0]} is a study: give the files of its votes, --votes a.json b.json")
    study = make_study(sources, out, pairs=number, seed=seed, question=question, device=device)
    return Judged(Path(out), Path(out) / "study.html", study.arms, len(study.pairs), None)


def report(judged: Judged) -> str:
    """Where the page is, or the scores and the verdict."""
    found = judged.judgement
    if found is None:
        return (
            f"{judged.page}: {judged.pairs} pairs of {' and '.join(judged.arms)}\n"
            f"  open it, or send it to people; {judged.folder / 'key.json'} stays with you\n"
            f"  then: undiffuse judge {shlex.quote(str(judged.folder))} --votes FILES"
        )
    width = max(map(len, judged.arms))
    lines = [f"{len(found.raters)} raters, {sum(found.raters.values())} votes that count"]
    lines += [f"  {s.arm:<{width}}  {s.elo:5.0f}   95 % [{s.low:.0f}, {s.high:.0f}]" for s in found.scores]
    lines += [textwrap.fill(sentence, 80) for sentence in found.verdict]
    if found.agreement:
        mean = sum(each.share for each in found.agreement) / len(found.agreement)
        lines.append(f"two raters agree on {mean:.0%} of the pairs that both decided")
    return "\n".join([*lines, f"  look: {shlex.quote(str(judged.page))}"])
