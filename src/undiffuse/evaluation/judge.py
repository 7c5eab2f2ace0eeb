"""Judge: which of two pictures do people prefer, when nobody knows which model each is of?

    study/
      study.html   the pairs, in random order and on random sides; nothing in it tells which arm a picture is of
      key.json     which arm is on which side of each pair: it stays with whoever asks
      result.json  report.html     from the votes that the page's readers send back

Picture i of every arm is shown against picture i of another: the same noise and class, where the arms are models.
From the votes, the strength theta of each arm (Bradley & Terry 1952):

    P(a is preferred to b) = 1/(1 + exp(theta_b - theta_a)),  Elo = 1000 + 400/ln(10) (theta - mean theta)

**The rule.** A vote for "equally good" is half a vote for each. A skipped pair is not counted. Half a vote for each
side of every two arms is added, so that an arm that always wins has a finite score. Of several votes of one rater on
one pair the last in time counts.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import combinations
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from PIL import Image

from ..config import load_json, write_bytes_atomic, write_json_atomic
from ..data import open_dataset
from ..data.base import digest
from ..data.spec import DataSpec
from ..errors import UndiffuseError, UndiffuseWarning
from ..page import Facts, Notice, Part, Section, Table, Words, write
from ..pipeline import Pipeline, resolve_device
from .features import aligned
from .intervals import Z, wilson
from .samples import is_model

FORMAT = 1
ELO = 400 / math.log(10)
CHOICES = ("left", "right", "tie", "skip")
TEMPLATE = Path(__file__).with_name("judge.html")
LEVEL = 0.05


# --- the study --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Picture ``item`` of arm ``left`` beside that of arm ``right``; arms are numbers."""

    item: int
    left: int
    right: int


@dataclass(frozen=True)
class Study:
    """What was asked: ``key.json``."""

    study: str  # a hash of the pictures and pairs; votes carry it
    arms: tuple[str, ...]
    pairs: tuple[Pair, ...]
    seed: int
    question: str

    @staticmethod
    def read(folder: str | Path) -> Study:
        """The key in a study's folder."""
        path = Path(folder) / "key.json"
        if not path.is_file():
            raise UndiffuseError(f"{folder}: no study here (no key.json); undiffuse judge A B makes one")
        stated = load_json(path)
        try:
            pairs = tuple(Pair(*(int(pair[name]) for name in ("item", "left", "right"))) for pair in stated["pairs"])
            arms = tuple(str(arm) for arm in stated["arms"])
            found = Study(str(stated["study"]), arms, pairs, int(stated["seed"]), str(stated["question"]))
        except (KeyError, TypeError, ValueError):
            raise UndiffuseError(f"{path}: not the key of a study; restore it") from None
        if any(not 0 <= side < len(arms) for pair in pairs for side in (pair.left, pair.right)):
            raise UndiffuseError(f"{path}: a pair names an arm that is not there; restore it")
        return found


def divided(arms: int, items: int, count: int, seed: int) -> list[Pair]:
    """``count`` pairs, every two arms equally often but for one, in random order and on random sides.

    Each item is used for a pair of arms at most once. Raises for more pairs than there are.
    """
    both = list(combinations(range(arms), 2))
    if not 1 <= count <= len(both) * items:
        raise UndiffuseError(f"-n {count}: {arms} arms of {items} pictures make 1 to {len(both) * items} pairs")
    random = np.random.Generator(np.random.PCG64(seed))
    orders = [random.permutation(items) for _ in both]
    first = random.permutation(len(both))  # which pair of arms gets one more
    found = []
    for k in range(count):
        which = int(first[k % len(both)])
        a, b = both[which] if random.random() < 0.5 else both[which][::-1]
        found.append(Pair(int(orders[which][k // len(both)]), a, b))
    return [found[i] for i in random.permutation(count)]


def pictures(
    sources: Sequence[str | Path], count: int, seed: int, device: str = "cpu"
) -> tuple[list[list[np.ndarray]], int]:
    """At most ``count`` pictures of each source as uint8 ``[H, W]`` or ``[H, W, 3]``, and how many all have.

    Models are sampled with the same seed, so picture i of each begins at the same noise. All sources become pixels with
    the same constants, of one range (trap D4); where it is not known how their ranges relate, they are refused.
    """
    specs: list[DataSpec] = []
    values: list[np.ndarray] = []
    for source in sources:
        if is_model(source):
            pipeline = Pipeline.load(source, resolve_device(device))
            if not pipeline.spec.has_pictures:
                raise UndiffuseError(f"{source}: makes no pictures, so there is nothing to look at")
            specs.append(pipeline.spec)
            values.append(pipeline.sample(count, seed=seed))
        else:
            dataset = open_dataset(source)
            if not dataset.spec.has_pictures:
                raise UndiffuseError(f"{source}: holds no pictures ({dataset.describe()})")
            specs.append(dataset.spec)
            values.append(dataset.values(np.arange(min(count, len(dataset)))))
    first = specs[0]
    for source, spec in zip(sources, specs, strict=True):
        if spec.shape != first.shape or np.dtype(spec.dtype).kind != np.dtype(first.dtype).kind:
            raise UndiffuseError(
                f"{source}: pictures of {list(spec.shape)} {spec.dtype}, those of {sources[0]} are {list(first.shape)} "
                f"{first.dtype}: that would tell them apart; bring both to one size and type"
            )
        if spec.low is None or spec.high is None:
            raise UndiffuseError(f"{source}: real numbers of no known range are no pictures; save them as 8 bits")
    widest = max(specs, key=lambda spec: (spec.high or 0.0) - (spec.low or 0.0))
    images = []
    for source, spec, array in zip(sources, specs, values, strict=True):
        try:
            images.append(list(widest.to_images(widest.to_model(aligned(array, spec, widest)))))
        except UndiffuseError:
            ranges = " and ".join(f"[{each.low:g}, {each.high:g}]" for each in (spec, widest))
            raise UndiffuseError(
                f"{source}: how its range relates to that of the others is not known ({ranges}); save all as 8 bits"
            ) from None
    return images, min(map(len, images))


def make_study(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    pairs: int = 100,
    seed: int = 0,
    question: str = "Which looks better?",
    device: str = "auto",
) -> Study:
    """Write ``study.html`` and ``key.json`` into the folder ``out``.

    Raises:
        UndiffuseError: fewer than two sources, one that has no pictures, sizes that differ, a folder that is not empty.
    """
    names = [str(source) for source in sources]
    if len(names) < 2 or len(set(names)) < len(names):
        raise UndiffuseError("name two or more different models, folders or arrays to judge")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UndiffuseError(f"{out}: is there already; name a new --out, or give --votes to read it")
    both = len(names) * (len(names) - 1) // 2
    images, there = pictures(sources, math.ceil(max(pairs, 1) / both), seed, device)
    chosen = divided(len(names), there, pairs, seed)
    used = sorted({(side, pair.item) for pair in chosen for side in (pair.left, pair.right)})
    # The order in the page is random as well: the place of a picture says nothing of its arm.
    order = [used[int(i)] for i in np.random.Generator(np.random.PCG64([seed, 1])).permutation(len(used))]
    place = {each: k for k, each in enumerate(order)}
    store = [_png(images[arm][item]) for arm, item in order]
    shown = [[place[pair.left, pair.item], place[pair.right, pair.item]] for pair in chosen]
    study = Study(digest(*store, json.dumps(shown), question)[:16], tuple(names), tuple(chosen), seed, question)
    page = study_page(study.study, question, store, shown)
    out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(out / "key.json", {"format": FORMAT, **asdict(study)})
    write_bytes_atomic(out / "study.html", page.encode())
    return study


def study_page(study: str, question: str, store: Sequence[bytes], shown: Sequence[Sequence[int]]) -> str:
    """The page: pictures as PNG files' bytes, pairs of their numbers (left, right)."""
    content = {
        "study": study,
        "question": question,
        "pictures": [base64.b64encode(picture).decode() for picture in store],
        "pairs": [list(pair) for pair in shown],
    }
    whole = TEMPLATE.read_text("utf-8")
    script = whole.partition("<script>")[2].partition("</script>")[0]
    seal = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return whole.replace("SEAL", seal).replace("STUDY", json.dumps(content).replace("<", "\\u003c"))


def _png(image: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


# --- the votes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vote:
    """What ``rater`` said of pair number ``pair``; ``at`` is when, in milliseconds since 1970."""

    rater: str
    pair: int
    choice: str
    at: int


def read_votes(study: Study, files: Sequence[str | Path]) -> list[Vote]:
    """The votes in these files, one for each rater and pair: the last in time (of equals, that of the greater choice),
    whatever the order of the files."""
    last: dict[tuple[str, int], Vote] = {}
    where: dict[tuple[str, int], str | Path] = {}
    others: dict[str, int] = {}  # of each rater, votes that say something else in another file
    for file in files:
        stated = load_json(file)
        if not isinstance(stated, dict) or not isinstance(stated.get("votes"), list):
            raise UndiffuseError(f"{file}: not the votes of a study; take the file that its page downloads")
        if stated.get("study") != study.study:
            raise UndiffuseError(f"{file}: votes of study {stated.get('study')}, this one is {study.study}")
        for each in stated["votes"]:
            try:
                vote = Vote(str(stated["rater"]), each["pair"], each["choice"], each["at"])
            except (KeyError, TypeError):
                raise UndiffuseError(f"{file}: a vote without pair, choice or time; take the file as it was") from None
            whole = type(vote.pair) is int and type(vote.at) is int and 0 <= vote.pair < len(study.pairs)
            if not whole or vote.choice not in CHOICES:
                raise UndiffuseError(f"{file}: a vote that cannot be: pair {vote.pair!r}, choice {vote.choice!r}")
            key = vote.rater, vote.pair
            if key in last and last[key].choice != vote.choice and where[key] != file:
                others[vote.rater] = others.get(vote.rater, 0) + 1
            if key not in last or (last[key].at, last[key].choice) < (vote.at, vote.choice):
                last[key], where[key] = vote, file
    for rater, count in others.items():
        warnings.warn(
            f"{count} votes of {rater} differ from file to file, and the last in time count; if these are two people, "
            'give one of them another name in the file ("rater")',
            UndiffuseWarning,
            stacklevel=2,
        )
    return [last[key] for key in sorted(last)]


# --- Bradley and Terry ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparisons:
    """``wins[k]`` (1, 1/2 or 0) of arm ``a[k]`` against arm ``b[k]`` on the pictures ``item[k]``: arrays ``[K]``."""

    a: np.ndarray
    b: np.ndarray
    wins: np.ndarray
    item: np.ndarray


def comparisons(study: Study, votes: Sequence[Vote]) -> Comparisons:
    """The votes that count, as numbers."""
    kept = [vote for vote in votes if vote.choice != "skip"]
    pairs = [study.pairs[vote.pair] for vote in kept]
    score = {"left": 1.0, "right": 0.0, "tie": 0.5}
    return Comparisons(
        np.array([pair.left for pair in pairs], np.int64),
        np.array([pair.right for pair in pairs], np.int64),
        np.array([score[vote.choice] for vote in kept]),
        np.array([vote.pair for vote in kept], np.int64),
    )


@dataclass(frozen=True, eq=False)
class Strengths:
    """``theta`` ``[A]`` with mean 0, and the covariance ``[A, A]`` of its errors."""

    theta: np.ndarray
    covariance: np.ndarray

    def between(self, a: int, b: int) -> tuple[float, float]:
        """``theta[a] - theta[b]`` and its standard error."""
        c = self.covariance
        return float(self.theta[a] - self.theta[b]), math.sqrt(max(float(c[a, a] + c[b, b] - 2 * c[a, b]), 0.0))


def bradley_terry(found: Comparisons, arms: int) -> Strengths:
    """The strengths of most likelihood by Newton's method, with half a vote added for each side of every two arms.

    The errors are for other pictures judged by the same raters: votes on one pair of pictures are one group (sandwich
    estimate; Liang & Zeger 1986), unless independent votes would have larger ones, as where nearly all agree.
    """
    both = np.array(list(combinations(range(arms), 2)), np.int64)
    a, b = np.concatenate([found.a, both[:, 0]]), np.concatenate([found.b, both[:, 1]])
    wins, weight = np.concatenate([found.wins, np.full(len(both), 0.5)]), np.ones(len(found.a) + len(both))
    design = np.zeros((len(a), arms))
    design[np.arange(len(a)), a], design[np.arange(len(a)), b] = 1.0, -1.0
    theta = np.zeros(arms)
    ones = np.full((arms, arms), 1 / arms)  # the direction that no vote knows
    for _ in range(100):
        p = 1 / (1 + np.exp(-design @ theta))
        information = (design * (weight * p * (1 - p))[:, None]).T @ design
        step = np.linalg.solve(information + ones, design.T @ (weight * (wins - p)))
        theta = theta + step * min(1.0, 2 / max(np.abs(step).max(), 1e-12))
        if np.abs(step).max() < 1e-12:
            break
    bread = np.linalg.inv(information + ones) - ones
    scores = design[: len(found.a)] * (wins - p)[: len(found.a), None]
    names, group = np.unique(found.item, return_inverse=True)
    sums = np.zeros((len(names), arms))
    np.add.at(sums, group, scores)
    sandwich = bread @ sums.T @ sums @ bread * (len(names) / max(len(names) - 1, 1))
    return Strengths(theta - theta.mean(), bread if np.trace(bread) >= np.trace(sandwich) else sandwich)


def binomial_p(wins: int, losses: int) -> float:
    """The exact two-sided sign test: how probable a split at least as uneven is, if both were equally likely."""
    n, most = wins + losses, max(wins, losses)
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(most, n + 1))
    return min(1.0, 2 * tail / 2**n)


# --- the result -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """An arm's score; the interval is of its distance to the mean of all arms."""

    arm: str
    elo: float
    low: float
    high: float
    votes: int


@dataclass(frozen=True)
class Preference:
    """Arm ``a`` against arm ``b``, pair of pictures by pair of pictures.

    ``preferred_a``, ``preferred_b``: pairs on which more raters preferred it; ``even``: as many each way, or ties. The
    share is of a among those that are not even, ``p`` is the sign test's on them, and ``seen`` says whether it is below
    5 % divided by the number of pairs of arms (Bonferroni).
    """

    a: str
    b: str
    preferred_a: int
    preferred_b: int
    even: int
    share: float | None
    low: float | None
    high: float | None
    p: float
    seen: bool
    elo: float  # a - b
    elo_low: float
    elo_high: float


@dataclass(frozen=True)
class Agreement:
    """Two raters on the pairs that both decided: the share of equal choices, and Cohen's kappa (0: as by chance)."""

    a: str
    b: str
    pairs: int
    share: float
    low: float
    high: float
    kappa: float | None


@dataclass(frozen=True)
class Judgement:
    """What the votes say."""

    study: str
    question: str
    raters: dict[str, int]  # votes that count, of each
    scores: tuple[Score, ...]
    preferences: tuple[Preference, ...]
    agreement: tuple[Agreement, ...]
    left: float | None  # the share of left among left and right: far from a half, the side was judged
    left_p: float
    skipped: int
    ties: int
    verdict: tuple[str, ...]


def judgement(study: Study, votes: Sequence[Vote]) -> Judgement:
    """Scores, preferences and agreement; raises where nobody has decided anything."""
    found = comparisons(study, votes)
    if not len(found.a):
        raise UndiffuseError("no vote counts: all are skipped, or there are none")
    arms = len(study.arms)
    strengths = bradley_terry(found, arms)
    reach = [Z * math.sqrt(max(float(strengths.covariance[i, i]), 0.0)) * ELO for i in range(arms)]
    elo = [1000 + ELO * float(theta) for theta in strengths.theta]
    taken = [int((found.a == i).sum() + (found.b == i).sum()) for i in range(arms)]
    scores = [
        Score(study.arms[i], elo[i], elo[i] - reach[i], elo[i] + reach[i], taken[i])
        for i in sorted(range(arms), key=lambda i: -elo[i])
    ]
    preferences = _preferences(study, found, strengths)
    sides = [vote.choice for vote in votes if vote.choice in ("left", "right")]
    lefts = sides.count("left")
    raters = dict.fromkeys(sorted({vote.rater for vote in votes}), 0)
    for vote in votes:
        raters[vote.rater] += vote.choice != "skip"
    return Judgement(
        study=study.study,
        question=study.question,
        raters=raters,
        scores=tuple(scores),
        preferences=preferences,
        agreement=_agreement(study, votes),
        left=lefts / len(sides) if sides else None,
        left_p=binomial_p(lefts, len(sides) - lefts),
        skipped=sum(vote.choice == "skip" for vote in votes),
        ties=sum(vote.choice == "tie" for vote in votes),
        verdict=tuple(_sentence(each) for each in preferences),
    )


def _preferences(study: Study, found: Comparisons, strengths: Strengths) -> tuple[Preference, ...]:
    both = list(combinations(range(len(study.arms)), 2))
    z = NormalDist().inv_cdf(1 - LEVEL / len(both) / 2)
    result = []
    for a, b in both:
        net: dict[int, float] = {}
        for left, right, wins, item in zip(found.a, found.b, found.wins, found.item, strict=True):
            if {int(left), int(right)} == {a, b}:
                net[int(item)] = net.get(int(item), 0.0) + (2 * wins - 1) * (1 if left == a else -1)
        first, second = (sum(1 for v in net.values() if sign * v > 0) for sign in (1, -1))
        share = wilson(first, first + second) if first + second else None
        p = binomial_p(first, second)
        mean, error = strengths.between(a, b)
        result.append(
            Preference(
                study.arms[a],
                study.arms[b],
                first,
                second,
                len(net) - first - second,
                None if share is None else share.value,
                None if share is None else share.low,
                None if share is None else share.high,
                p,
                p < LEVEL / len(both),
                ELO * mean,
                ELO * (mean - z * error),
                ELO * (mean + z * error),
            )
        )
    return tuple(result)


def _sentence(found: Preference) -> str:
    decided = found.preferred_a + found.preferred_b
    if not decided:
        return f"{found.a} and {found.b}: nothing decided"
    more, less = (found.a, found.b) if found.preferred_a >= found.preferred_b else (found.b, found.a)
    count = max(found.preferred_a, found.preferred_b)
    said = f"{count} of {decided} decided pairs, sign test p = {found.p:.2g}"
    if found.seen:
        return f"{more} is preferred to {less}: {said}"
    return f"no preference seen between {found.a} and {found.b}: {more} in {said}"


def _agreement(study: Study, votes: Sequence[Vote]) -> tuple[Agreement, ...]:
    """Of every two raters; sides are turned into arms, of which the one with the smaller number is 0."""
    by: dict[str, dict[int, int]] = {}
    for vote in votes:
        if vote.choice in ("left", "right"):
            pair = study.pairs[vote.pair]
            by.setdefault(vote.rater, {})[vote.pair] = int((vote.choice == "left") != (pair.left < pair.right))
    result = []
    for a, b in combinations(sorted(by), 2):
        shared = sorted(by[a].keys() & by[b].keys())
        if shared:
            x, y = np.array([by[a][k] for k in shared]), np.array([by[b][k] for k in shared])
            same = wilson(int((x == y).sum()), len(shared))
            chance = x.mean() * y.mean() + (1 - x.mean()) * (1 - y.mean())
            kappa = None if chance == 1 else float((same.value - chance) / (1 - chance))
            result.append(Agreement(a, b, len(shared), same.value, same.low, same.high, kappa))
    return tuple(result)


def judge_votes(folder: str | Path, files: Sequence[str | Path]) -> Judgement:
    """The judgement of the votes in ``files`` on the study in ``folder``, where ``result.json`` and ``report.html`` are
    written."""
    from ..commands import plain

    study = Study.read(folder)
    found = judgement(study, read_votes(study, files))
    write_json_atomic(Path(folder) / "result.json", plain(found))
    write(Path(folder) / "report.html", "Which is preferred?", parts(found), lead=f"study {found.study}")
    return found


def parts(found: Judgement) -> list[Part]:
    """The report."""
    said: list[Part] = [
        Notice("good" if each.seen else "info", sentence)
        for each, sentence in zip(found.preferences, found.verdict, strict=True)
    ]
    if found.left is not None and found.left_p < 0.01:
        said.append(Notice("warn", f"{found.left:.0%} of choices were the left side: the side was judged, too"))
    counts = found.raters
    said.append(
        Facts(
            [
                ("question", found.question),
                ("raters", len(counts)),
                ("votes that count", sum(counts.values())),
                ("equally good", found.ties),
                ("skipped", found.skipped),
                ("left side", "-" if found.left is None else f"{found.left:.0%}"),
            ]
        )
    )
    rows = [[each.arm, round(each.elo), f"{each.low:.0f} to {each.high:.0f}", each.votes] for each in found.scores]
    rule = (
        "Bradley and Terry's strengths on Elo's scale: 100 more is preferred in 64 % of pairs, 200 in 76 %. The "
        "intervals are for other pictures judged by these raters. 'Equally good' is half a vote for each, skipped "
        "pairs do not count, and half a vote for each side of every two arms is added."
    )
    said.append(Section("Scores", [Table(["arm", "Elo", "95 % interval", "votes"], rows), Words(rule)]))
    pairs = [
        [
            f"{each.a} against {each.b}",
            each.preferred_a,
            each.preferred_b,
            each.even,
            None if each.share is None else f"{each.share:.0%} ({each.low:.0%} to {each.high:.0%})",
            each.p,
            f"{each.elo:+.0f} ({each.elo_low:+.0f} to {each.elo_high:+.0f})",
        ]
        for each in found.preferences
    ]
    names = ["arms", "first", "second", "even", "share of the first", "p, sign test", "Elo, first - second"]
    divisor = f" / {len(pairs)}" if len(pairs) > 1 else ""
    tested = (
        "Pair of pictures by pair of pictures: the side that more raters preferred. The sign test takes each pair "
        f"once, however many raters saw it; a preference is seen where p is below 5 %{divisor}."
    )
    said.append(Section("Preferences", [Table(names, pairs), Words(tested)]))
    if found.agreement:
        rows = [
            [f"{each.a}, {each.b}", each.pairs, f"{each.share:.0%} ({each.low:.0%} to {each.high:.0%})", each.kappa]
            for each in found.agreement
        ]
        said.append(Section("Agreement", [Table(["raters", "pairs", "same choice", "kappa"], rows)]))
    said.append(
        Section("Raters", [Table(["rater", "votes that count"], [[*row] for row in counts.items()])], folded=True)
    )
    return said


def votes_file(study: Study, rater: str, choices: Mapping[int, str], at: int = 0) -> dict[str, Any]:
    """What the page downloads, for votes that were given elsewhere."""
    votes = [{"pair": pair, "choice": choice, "at": at} for pair, choice in choices.items()]
    return {"format": FORMAT, "study": study.study, "rater": rater, "votes": votes}
