"""The blind study: nothing tells the arms apart, and the scores recover known strengths."""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from undiffuse import Pipeline, UndiffuseError, UndiffuseWarning
from undiffuse.commands import main
from undiffuse.evaluation.judge import (
    ELO,
    Comparisons,
    Pair,
    Study,
    Vote,
    binomial_p,
    bradley_terry,
    comparisons,
    divided,
    judge_votes,
    judgement,
    make_study,
    pictures,
    read_votes,
    votes_file,
)


def arrays(folder: Path, *names: str, count: int = 40) -> list[str]:
    """An .npy of 8x8 pictures for each name; a's are dark, b's are bright."""
    made = []
    for k, name in enumerate(names):
        random = np.random.Generator(np.random.PCG64(k))
        values = random.integers(0, 120, (count, 8, 8)) + 60 * k
        values[0, 0, :2] = 0, 255
        np.save(folder / f"{name}.npy", values.astype(np.uint8))
        made.append(str(folder / f"{name}.npy"))
    return made


def simulated(theta: np.ndarray, pairs: int, raters: int, seed: int, luck: float = 0.0) -> Comparisons:
    """Votes of raters with these strengths in mind; ``luck`` is how far a pair's pictures move all of them alike."""
    random = np.random.Generator(np.random.PCG64(seed))
    a = random.integers(0, len(theta), pairs)
    b = (a + random.integers(1, len(theta), pairs)) % len(theta)
    shift = luck * random.normal(size=pairs)
    a, b, item, shift = (np.repeat(x, raters) for x in (a, b, np.arange(pairs), shift))
    wins = random.random(len(a)) < 1 / (1 + np.exp(theta[b] - theta[a] + shift))
    return Comparisons(a, b, wins.astype(float), item)


# --- scores -----------------------------------------------------------------------------------------------------------


def test_known_strengths_are_recovered() -> None:
    theta = np.array([0.9, 0.1, -0.2, -0.8])
    found = bradley_terry(simulated(theta, 20_000, 1, 0), 4)
    assert np.abs(found.theta - theta).max() < 0.06
    assert abs(found.theta.sum()) < 1e-12


@pytest.mark.parametrize(("raters", "luck"), [(1, 0.0), (3, 0.0), (3, 1.0)])
def test_intervals_cover_also_where_raters_agree_about_the_pictures(raters: int, luck: float) -> None:
    theta = np.array([0.4, 0.0, -0.4])
    many = simulated(theta, 200_000, 1, 1, luck)
    truth = bradley_terry(many, 3).theta  # what many pictures would give
    inside = 0
    for seed in range(200):
        found = bradley_terry(simulated(theta, 90, raters, 10 + seed, luck), 3)
        mean, error = found.between(0, 2)
        inside += abs(mean - (truth[0] - truth[2])) < 1.96 * error
    assert inside >= 200 * 0.95 - 4 * math.sqrt(200 * 0.95 * 0.05)


def test_two_arms_are_the_log_odds_of_the_wins() -> None:
    wins = np.array([1.0] * 30 + [0.0] * 10)
    zeros = np.zeros(40, np.int64)
    found = bradley_terry(Comparisons(zeros, zeros + 1, wins, np.arange(40)), 2)
    mean, error = found.between(0, 1)
    assert mean == pytest.approx(math.log(30.5 / 10.5))  # half a vote was added to each
    assert error == pytest.approx(math.sqrt(1 / 30.5 + 1 / 10.5), rel=0.05)


def test_the_strengths_are_those_of_a_logistic_regression() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    given = simulated(np.array([0.5, 0.0, -0.5]), 400, 1, 3)
    found = bradley_terry(given, 3)
    design = np.zeros((len(given.a), 3))
    design[np.arange(len(given.a)), given.a] = 1
    design[np.arange(len(given.a)), given.b] = -1
    extra = np.array([[1, -1, 0], [1, 0, -1], [0, 1, -1]], float)
    rows = np.concatenate([design, extra, extra])
    target = np.concatenate([given.wins, np.ones(3), np.zeros(3)])
    weight = np.concatenate([np.ones(len(design)), np.full(6, 0.5)])
    other = linear.LogisticRegression(C=1e9, fit_intercept=False, tol=1e-10, max_iter=1000)
    theirs = other.fit(rows, target, sample_weight=weight).coef_[0]
    assert found.theta == pytest.approx(theirs - theirs.mean(), abs=1e-4)


def test_an_arm_that_always_wins_has_a_finite_score_and_a_wide_interval() -> None:
    zeros = np.zeros(20, np.int64)
    found = bradley_terry(Comparisons(zeros, zeros + 1, np.ones(20), np.arange(20)), 2)
    mean, error = found.between(0, 1)
    assert 2 < mean < 5
    assert error > 1


def test_order_and_names_change_nothing() -> None:
    given = simulated(np.array([0.5, 0.0, -0.5]), 100, 2, 4)
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(given.a))
    moved = Comparisons(given.a[order], given.b[order], given.wins[order], given.item[order])
    turned = Comparisons(given.b, given.a, 1 - given.wins, given.item)
    one = bradley_terry(given, 3)
    for other in (moved, turned):
        two = bradley_terry(other, 3)
        assert two.theta == pytest.approx(one.theta, abs=1e-9)
        assert two.covariance == pytest.approx(one.covariance, abs=1e-9)


def test_the_sign_test_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for wins, losses in ((0, 0), (5, 5), (9, 3), (0, 12), (60, 41)):
        theirs = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
        assert binomial_p(wins, losses) == pytest.approx(theirs)


# --- votes ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return make_study(arrays(tmp_path, "a", "b"), tmp_path / "study", pairs=30, seed=5)


def preferring(study: Study, arm: int, rater: str, wrong: int = 0) -> dict[str, Any]:
    """A rater who prefers one arm, except in the first ``wrong`` pairs."""
    sides = {k: "left" if (pair.left == arm) != (k < wrong) else "right" for k, pair in enumerate(study.pairs)}
    return votes_file(study, rater, sides)


def saved(folder: Path, name: str, votes: dict[str, Any]) -> Path:
    (folder / name).write_text(json.dumps(votes))
    return folder / name


def test_raters_are_merged_in_any_order_and_a_raters_later_vote_replaces(tmp_path: Path, study: Study) -> None:
    ada = saved(tmp_path, "1.json", preferring(study, 0, "ada", 2))
    bob = saved(tmp_path, "2.json", preferring(study, 0, "bob", 6))
    early = preferring(study, 1, "ada")
    for vote in early["votes"]:
        vote["at"] = -1
    old = saved(tmp_path, "0.json", early)
    one = judgement(study, read_votes(study, [ada, bob, old]))
    two = judgement(study, read_votes(study, [old, bob, ada, ada]))
    assert one == two
    assert one.raters == {"ada": 30, "bob": 30}
    assert one.scores[0].arm == study.arms[0]
    assert one.preferences[0].seen
    # both are wrong in the first two, and one of them in four more, which are even
    assert (one.preferences[0].preferred_a, one.preferences[0].preferred_b, one.preferences[0].even) == (24, 2, 4)
    assert one.agreement[0].share == pytest.approx(26 / 30)
    assert "is preferred to" in one.verdict[0]


def test_ties_are_half_and_skips_nothing(study: Study) -> None:
    ties = [Vote("a", k, "tie", 0) for k in range(20)]
    found = judgement(study, [*ties, Vote("a", 20, "skip", 0)])
    assert [score.elo for score in found.scores] == pytest.approx([1000, 1000])
    assert (found.ties, found.skipped, found.raters) == (20, 1, {"a": 20})
    assert found.verdict[0].endswith("nothing decided")
    with pytest.raises(UndiffuseError, match="no vote counts"):
        judgement(study, [Vote("a", 0, "skip", 0)])


def test_a_rater_who_only_presses_left_is_found_out(study: Study) -> None:
    found = judgement(study, [Vote("a", k, "left", 0) for k in range(30)])
    assert found.left == 1
    assert found.left_p < 1e-6
    assert "no preference seen" in found.verdict[0]


def test_more_than_two_arms_are_corrected(tmp_path: Path) -> None:
    made = make_study(arrays(tmp_path, "a", "b", "c"), tmp_path / "s", pairs=30)
    counts = Counter(frozenset((pair.left, pair.right)) for pair in made.pairs)
    assert set(counts.values()) == {10}
    choices = {k: "left" if pair.left < pair.right else "right" for k, pair in enumerate(made.pairs)}
    some = {k: side for k, side in choices.items() if {made.pairs[k].left, made.pairs[k].right} == {0, 1}}
    few = dict(list(some.items())[:6])  # p = 2/64: below 5 %, above 5 % / 3
    stated = votes_file(made, "a", {**dict.fromkeys(choices, "tie"), **few})
    found = judge_votes(tmp_path / "s", [saved(tmp_path, "v.json", stated)])
    assert len(found.preferences) == 3
    assert found.preferences[0].p == pytest.approx(2 / 64)
    assert not found.preferences[0].seen
    assert (tmp_path / "s" / "report.html").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"study": "other"}, "votes of study other"),
        ({"votes": 3}, "not the votes of a study"),
        ({"votes": [{"pair": 30, "choice": "left", "at": 0}]}, "cannot be: pair 30"),
        ({"votes": [{"pair": True, "choice": "left", "at": 0}]}, "cannot be"),
        ({"votes": [{"pair": 1, "choice": "a", "at": 0}]}, "choice 'a'"),
        ({"votes": [{"pair": 1, "choice": ["left"], "at": 0}]}, "cannot be"),
        ({"votes": [{"pair": 1}]}, "without pair, choice or time"),
        ({"votes": [7]}, "without pair, choice or time"),
        ({"votes": []}, "no vote counts"),
    ],
)
def test_votes_that_cannot_be_are_refused(change: dict[str, Any], message: str, tmp_path: Path, study: Study) -> None:
    path = saved(tmp_path, "v.json", {**preferring(study, 0, "ada"), **change})
    with pytest.raises(UndiffuseError, match=message):
        judge_votes(tmp_path / "study", [path])


# --- the page ---------------------------------------------------------------------------------------------------------


def stated(page: str) -> dict[str, Any]:
    """The study in the page."""
    return json.loads(page.partition('<script type="application/json" id="study">')[2].partition("</script>")[0])


def test_the_page_is_blind_and_asks_nobody(tmp_path: Path) -> None:
    sources = arrays(tmp_path, "very-good", "very-bad")
    study = make_study(sources, tmp_path / "s", pairs=40)
    page = (tmp_path / "s" / "study.html").read_text()
    assert "very-" not in page
    assert "default-src 'none'" in page
    assert not re.search(r'(?:src|href)="(?!data:)|https?://', page)
    content = stated(page)
    assert content.keys() == {"study", "question", "pictures", "pairs"}
    # neither the side nor the place of a picture says whose it is
    lefts = sum(pair.left == 0 for pair in study.pairs)
    assert binomial_p(lefts, 40 - lefts) > 0.001
    shown = zip(study.pairs, content["pairs"], strict=True)
    sides = [side for pair, two in shown for side in zip((pair.left, pair.right), two, strict=True)]
    places = [k for arm, k in sides if arm == 0]
    assert abs(np.mean(places) - 39.5) < 4 * math.sqrt(80**2 / 12 / 40)
    assert sorted(k for two in content["pairs"] for k in two) == list(range(80))
    again = make_study(sources, tmp_path / "t", pairs=40)
    assert again == study
    assert make_study(sources, tmp_path / "u", pairs=40, seed=1).study != study.study


def test_the_key_says_which_picture_is_whose(tmp_path: Path) -> None:
    import base64
    from io import BytesIO

    sources = arrays(tmp_path, "a", "b")
    study = make_study(sources, tmp_path / "s", pairs=12, seed=2)
    content = stated((tmp_path / "s" / "study.html").read_text())
    originals = [np.load(source) for source in sources]
    for pair, (left, right) in zip(Study.read(tmp_path / "s").pairs, content["pairs"], strict=True):
        for arm, k in ((pair.left, left), (pair.right, right)):
            with Image.open(BytesIO(base64.b64decode(content["pictures"][k]))) as picture:
                assert np.array_equal(np.asarray(picture), originals[arm][pair.item])
    assert study.pairs == Study.read(tmp_path / "s").pairs


def test_pairs_are_divided_evenly_and_never_twice() -> None:
    for arms, items, count in ((2, 10, 10), (3, 5, 14), (4, 3, 18)):
        found = divided(arms, items, count, 0)
        counts = Counter(frozenset((pair.left, pair.right)) for pair in found)
        assert max(counts.values()) - min(counts.values()) <= 1
        assert len({(pair.item, frozenset((pair.left, pair.right))) for pair in found}) == count
    with pytest.raises(UndiffuseError, match="1 to 10 pairs"):
        divided(2, 10, 11, 0)


def test_what_cannot_be_judged_is_refused(tmp_path: Path) -> None:
    a, b = arrays(tmp_path, "a", "b")
    np.save(tmp_path / "small.npy", np.arange(40 * 36).reshape(40, 6, 6).astype(np.uint8))
    np.save(tmp_path / "points.npy", np.random.Generator(np.random.PCG64(0)).normal(size=(40, 2)).astype(np.float32))
    with pytest.raises(UndiffuseError, match="tell them apart"):
        make_study([a, str(tmp_path / "small.npy")], tmp_path / "s", pairs=10)
    with pytest.raises(UndiffuseError, match="no pictures"):
        make_study([a, str(tmp_path / "points.npy")], tmp_path / "s", pairs=10)
    with pytest.raises(UndiffuseError, match="two or more different"):
        make_study([a, a], tmp_path / "s")
    with pytest.raises(UndiffuseError, match="1 to 40 pairs"):
        make_study([a, b], tmp_path / "s", pairs=100)
    assert not (tmp_path / "s").exists()
    with pytest.raises(UndiffuseError, match="no study here"):
        judge_votes(tmp_path, [])


def test_models_are_sampled_from_the_same_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, rate in (("a", "0.002"), ("b", "0.01")):
        words = f"train digits --recipe tiny --steps 2 --out runs/{name} --set optimiser.lr={rate}"
        assert main(words.split()) == 0
    study = make_study(["runs/a", "runs/b"], tmp_path / "s", pairs=4, seed=3)
    assert study.arms == ("runs/a", "runs/b")
    starts = [Pipeline.load(f"runs/{name}").begin(4, seed=3).x for name in "ab"]
    assert bool((starts[0] == starts[1]).all())


def test_the_command_makes_a_study_and_reads_its_votes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    a, b = arrays(tmp_path, "a", "b")
    assert main(["judge", a, b, "-n", "20"]) == 0
    study = Study.read("judge")
    one = saved(tmp_path, "1.json", preferring(study, 1, "ada", 3))
    two = saved(tmp_path, "2.json", preferring(study, 1, "bob", 5))
    capsys.readouterr()
    assert main(["judge", "judge", "--votes", str(one), str(two)]) == 0
    text = capsys.readouterr().out
    assert f"{b} is preferred to" in text.replace("\n", " ")
    assert "2 raters, 40 votes that count" in text
    for words, message in (
        (["judge", a, b], "is there already"),
        (["judge", "judge"], "--votes a.json b.json"),
        (["judge", a, b, "--votes", str(one)], "name its folder alone"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    where = shutil.which("chromium") or shutil.which("chromium-browser")
    if where is None:
        pytest.skip("no chromium")
    with api.sync_playwright() as play:
        running = play.chromium.launch(executable_path=where, args=["--no-sandbox"])
        yield running
        running.close()


def test_in_a_browser_keys_vote_undo_resume_and_download(browser: Any, tmp_path: Path, study: Study) -> None:
    context = browser.new_context()
    page = context.new_page()
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto((tmp_path / "study" / "study.html").as_uri())
    assert page.inner_text("#count") == "1 of 30"
    shown = page.get_attribute("#a", "src")
    for key in ("ArrowLeft", "ArrowRight", "ArrowDown", "s", "ArrowLeft"):
        page.keyboard.press(key)
    assert page.inner_text("#count") == "6 of 30"
    page.keyboard.press("Backspace")
    assert page.inner_text("#count") == "5 of 30"
    page.click("#right")
    page.fill("#rater", "s left")  # keys in the name do not vote
    page.reload()
    assert page.inner_text("#count") == "6 of 30"
    assert page.input_value("#rater") == "s left"
    assert page.get_attribute("#a", "src") != shown
    for _ in range(30):
        page.keyboard.press("ArrowLeft")
    assert page.inner_text("#count") == "all 30 done"
    with page.expect_download() as waiting:
        page.click("#again")
    assert waiting.value.suggested_filename == "votes-s-left.json"
    waiting.value.save_as(tmp_path / "votes.json")
    votes = read_votes(study, [tmp_path / "votes.json"])
    assert [vote.choice for vote in votes[:5]] == ["left", "right", "tie", "skip", "right"]
    assert len(votes) == 30
    assert comparisons(study, votes).wins[:3].tolist() == [1.0, 0.0, 0.5]
    assert errors == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)


def test_elo_is_elos() -> None:
    assert pytest.approx(1 / (1 + math.exp(-100 / ELO))) == 1 / (1 + 10 ** (-100 / 400))


def test_sources_are_shown_in_one_range_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of [0, 1] beside the same of [-1, 1] are the same; of 13 levels or of no range, nobody knows."""
    monkeypatch.chdir(tmp_path)
    shown = np.random.default_rng(0).integers(0, 256, (9, 8, 8), np.uint8)
    shown[0, 0, :2] = 0, 255
    np.save("unit.npy", (shown / 255).astype(np.float32))
    np.save("both.npy", (shown / 127.5 - 1).astype(np.float32))
    np.save("bytes.npy", shown)
    np.save("few.npy", shown // 20)
    np.save("free.npy", shown.astype(np.float32))
    (unit, both), _ = pictures(["unit.npy", "both.npy"], 9, 0)
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(unit, both, strict=True))
    with (
        pytest.raises(UndiffuseError, match=r"few\.npy: how its range relates.*save all as 8 bits"),
        pytest.warns(UndiffuseWarning),
    ):
        pictures(["bytes.npy", "few.npy"], 9, 0)
    with pytest.raises(UndiffuseError, match=r"free\.npy: .*save them as 8 bits"):
        pictures(["unit.npy", "free.npy"], 9, 0)


def test_two_raters_of_one_name_are_noticed(tmp_path: Path) -> None:
    study = Study("s", ("a", "b"), (Pair(0, 0, 1), Pair(1, 1, 0)), 0, "?")
    files = []
    for name, choices in {"one": {0: "left", 1: "left"}, "two": {0: "right", 1: "left"}}.items():
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(votes_file(study, "ada", choices, at=len(files))))
    with pytest.warns(UndiffuseWarning, match="1 votes of ada differ from file to file.*two people"):
        assert [vote.choice for vote in read_votes(study, files)] == ["right", "left"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_votes(study, [files[0], files[0]])
