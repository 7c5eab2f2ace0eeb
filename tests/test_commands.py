"""The command line: what a person sees, also when something is wrong."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import tyro

import undiffuse
from undiffuse.commands import VERBS, main, plain
from undiffuse.commands import ls as ls_module
from undiffuse.errors import UndiffuseError, UndiffuseWarning

Screen = pytest.CaptureFixture[str]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ./runs in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def make_run(folder: Path, state: str = "finished", **status: Any) -> Path:
    folder.mkdir(parents=True)
    recipe = {"steps": 8, "optimiser": {"lr": 0.001}}
    (folder / "config.json").write_text(json.dumps({"data": "digits", "recipe": recipe, "seed": 0}))
    (folder / "command.txt").write_text("undiffuse train digits\n")
    rows = [{"step": i, "images": 4 * i, "seconds": i / 2, "loss": 1 / i, "lr": 1e-3} for i in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = {"state": state, "step": 8, "images": 32, "total_images": 64, "loss": 0.125, "pid": os.getpid()}
    known |= {"updated": datetime.now(UTC).isoformat()}
    (folder / "status.json").write_text(json.dumps(known | status))
    return folder


def make_model(folder: Path, schedule: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    table = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]},
        "b": {"dtype": "F32", "shape": [], "data_offsets": [48, 52]},
    }
    header = json.dumps(table).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(52))
    stated = schedule or {"kind": "linear", "steps": 1000, "first_beta": 1e-4, "last_beta": 0.02}
    (folder / "pipeline.json").write_text(json.dumps({"format": 1, "model": {"schedule": stated}}))
    return folder


def failing(screen: Screen, *words: str) -> str:
    """The one line on stderr of a command line that must be refused."""
    assert main(words) == 2
    seen = screen.readouterr()
    assert seen.out == ""
    assert seen.err.startswith("undiffuse: ")
    assert seen.err.count("\n") == 1
    return seen.err.removeprefix("undiffuse: ").strip()


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_lists_the_verbs_and_ends_with_examples(words: list[str], capsys: Screen) -> None:
    assert main(words) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in VERBS)
    assert text.rpartition("examples:\n")[2].startswith("  undiffuse ")
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_the_help_of_a_verb_fits_80_columns_and_ends_with_examples(
    verb: str, option: str, capsys: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([verb, option]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    examples = text.rpartition("examples:\n")[2].splitlines()
    assert examples
    assert all(line.startswith((f"  undiffuse {verb}", "    ")) for line in examples)


@pytest.mark.parametrize("verb", VERBS)
def test_law_8_every_verb_is_a_function_with_a_help_text_for_every_option(verb: str, capsys: Screen) -> None:
    function: Callable[..., Any] = getattr(import_module(f"undiffuse.commands.{verb}"), verb)
    assert (function.__doc__ or "").strip()
    arguments = (function.__doc__ or "").partition("Args:")[2]
    for name in function.__annotations__.keys() - {"return"}:
        assert f"    {name}:" in arguments, f"{verb}: {name} is not explained"
    assert isinstance(import_module(f"undiffuse.commands.{verb}").report, type(main))


def test_the_version(capsys: Screen) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"undiffuse {undiffuse.__version__}\n"


def test_the_installed_script_answers() -> None:
    code = "import sys; from undiffuse.commands import main; sys.exit(main())"
    ran = subprocess.run([sys.executable, "-c", code, "ls", "--stpes"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "undiffuse: unknown option '--stpes': see undiffuse ls --help\n"


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("shw", "unknown verb 'shw': did you mean 'show'?"),
        ("qqqq", "unknown verb 'qqqq': see undiffuse --help"),
        ("--versoin", "unknown option '--versoin': did you mean '--version'?"),
        ("show demo --tial 3", "unknown option '--tial': did you mean '--tail'?"),
        ("show demo --tial=3", "unknown option '--tial': did you mean '--tail'?"),
        ("show demo -n 3", "unknown option '-n': see undiffuse show --help"),
        ("ls --jsno", "unknown option '--jsno': did you mean '--json'?"),
        ("show demo --tail x", "--tail needs a whole number, not 'x' (see undiffuse show --help)"),
        ("show demo --tail", "Missing value for argument '--tail'. Expected 1 values (see undiffuse show --help)"),
        ("show", "missing RUN-OR-MODEL (see undiffuse show --help)"),
        ("ls a b", "unexpected b (see undiffuse ls --help)"),
    ],
)
def test_law_8_a_mistake_is_one_line_with_the_nearest_name(line: str, message: str, capsys: Screen) -> None:
    assert failing(capsys, *line.split()) == message


def verb_that(monkeypatch: pytest.MonkeyPatch, action: Callable[[], Any]) -> None:
    """`undiffuse ls` does something else."""

    def ls() -> Any:
        """Something else."""
        return action()

    monkeypatch.setattr(ls_module, "ls", ls)
    monkeypatch.setattr(ls_module, "report", str)


def every_kind_of_option(
    data: str,
    n: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 16,
    guidance_scale: float = 1.0,
    out: Path | None = None,
    steps: int | None = None,
    strict: bool = False,
    size: Literal["tiny", "small"] = "tiny",
    set: tuple[str, ...] = (),
) -> dict[str, object]:
    """What the command line makes of each type.

    Args:
        data: Required, so it has no dashes.
        n: Has a short name.
        guidance_scale: A number.
        out: A path.
        steps: May be left open.
        strict: A switch.
        size: One of a few words.
        set: May be given more than once.
    """
    return dict(locals())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("digits", {}),
        ("digits -n 4", {"n": 4}),
        ("-n 4 digits", {"n": 4}),
        ("digits --n=4", {"n": 4}),
        ("digits --guidance-scale -1.5", {"guidance_scale": -1.5}),
        ("digits --guidance-scale=-1e-3", {"guidance_scale": -1e-3}),
        ("digits --guidance_scale 2", {"guidance_scale": 2.0}),
        ("digits --out runs/a", {"out": "runs/a"}),
        ("digits --steps 3", {"steps": 3}),
        ("digits --strict", {"strict": True}),
        ("digits --no-strict", {}),
        ("digits --size small", {"size": "small"}),
        ("digits --set a.b=1 --set c=-2", {"set": ["a.b=1", "c=-2"]}),
    ],
)
def test_every_kind_of_option(
    line: str, expected: dict[str, object], monkeypatch: pytest.MonkeyPatch, capsys: Screen
) -> None:
    monkeypatch.setattr(ls_module, "ls", every_kind_of_option)
    assert main(["--json", "ls", *line.split()]) == 0
    usual = {"data": "digits", "n": 16, "guidance_scale": 1.0, "out": None, "steps": None}
    usual |= {"strict": False, "size": "tiny", "set": []}
    assert json.loads(capsys.readouterr().out) == usual | expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "missing DATA (see undiffuse ls --help)"),
        ("digits --stpes 4", "unknown option '--stpes': did you mean '--steps'?"),
        ("digits --strickt", "unknown option '--strickt': did you mean '--strict'?"),
        ("digits --guidance-scale high", "--guidance-scale needs a number, not 'high' (see undiffuse ls --help)"),
        ("digits --steps none", "--steps needs INT, not 'none' (see undiffuse ls --help)"),
        ("digits --size tyni", "invalid choice 'tyni' for argument '--size'. Expected one of ('tiny', 'small')"),
    ],
)
def test_every_kind_of_mistake(line: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: Screen) -> None:
    monkeypatch.setattr(ls_module, "ls", every_kind_of_option)
    assert failing(capsys, "ls", *line.split()).startswith(message)


def throw(error: BaseException) -> Callable[[], Any]:
    def action() -> Any:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UndiffuseError("data: no\nimages"), "data: no images"),
        (
            OSError(errno.ENOSPC, "No space left on device", "x.png"),
            "x.png: No space left on device (the disk is full; free some space and run the same command again)",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), "runs/x: Permission denied"),
    ],
)
def test_an_error_is_one_line_and_a_traceback_with_debug(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: Screen
) -> None:
    verb_that(monkeypatch, throw(error))
    assert failing(capsys, "ls") == line
    for words in (["--debug", "ls"], ["ls", "--debug"]):
        with pytest.raises(type(error)):
            main(words)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    verb_that(monkeypatch, throw(KeyError("bug")))
    with pytest.raises(KeyError):
        main(["ls"])


def test_ctrl_c_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: Screen) -> None:
    verb_that(monkeypatch, throw(KeyboardInterrupt()))
    assert main(["ls"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_closed_pipe_is_quiet() -> None:
    code = "import sys; from undiffuse.commands import main; sys.exit(main(['--help']))"
    read, write = os.pipe()
    os.close(read)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ran = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, env=env, check=False)
    os.close(write)
    assert (ran.returncode, ran.stderr) == (141, b"")


def test_a_terminal_without_unicode_gets_question_marks(runs: Path) -> None:
    make_run(runs / "ü")
    code = "import sys; from undiffuse.commands import main; sys.exit(main(['ls']))"
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, check=False)
    assert ran.returncode == 0
    assert b"\n?  " in ran.stdout


def test_our_warnings_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Screen) -> None:
    verb_that(monkeypatch, lambda: warnings.warn("some signal\nis left", UndiffuseWarning, stacklevel=1))
    main(["ls"])
    assert capsys.readouterr().err == "undiffuse: warning: some signal is left\n"


def test_with_json_stdout_is_json_alone(monkeypatch: pytest.MonkeyPatch, capsys: Screen) -> None:
    verb_that(monkeypatch, lambda: print("progress") or {"loss": float("nan"), "path": Path("a"), "sizes": (1, 2)})
    assert main(["--json", "ls"]) == 0
    seen = capsys.readouterr()
    assert json.loads(seen.out) == {"loss": None, "path": "a", "sizes": [1, 2]}
    assert seen.err == "progress\n"


# --- ls ---------------------------------------------------------------------------------------------------------------


def test_ls_lists_the_latest_first(runs: Path, capsys: Screen) -> None:
    old = (datetime.now(UTC) - timedelta(hours=5)).isoformat()
    make_run(runs / "a", state="stopped", updated=old)
    make_run(runs / "b")
    (runs / "not-a-run").mkdir()
    (runs / "file").write_text("x")
    assert main(["ls"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["RUN", "DATA", "STATE", "STEP", "IMAGES", "LOSS", "AGE", "SIZE"]
    assert [row.split()[:6] for row in rows] == [
        ["b", "digits", "finished", "8", "32/64", "0.125"],
        ["a", "digits", "stopped", "8", "32/64", "0.125"],
    ]
    assert "5 h" in rows[1]


def test_ls_as_json_is_what_the_function_returns(runs: Path, capsys: Screen) -> None:
    make_run(runs / "a", state="stopped", updated="2026-01-01T00:00:00+00:00")
    main(["ls", "runs", "--json"])
    seen = json.loads(capsys.readouterr().out)
    same = plain(undiffuse.ls(Path("runs")))
    assert [{**run, "age_seconds": None} for run in seen] == [{**run, "age_seconds": None} for run in same]
    assert seen[0]["step"] == 8


def test_ls_of_one_run_is_that_run(runs: Path) -> None:
    make_run(runs / "a")
    assert [run.name for run in undiffuse.ls(runs / "a")] == ["a"]


def test_ls_of_a_run_that_has_just_begun(runs: Path) -> None:
    (runs / "a").mkdir()
    (runs / "a" / "command.txt").write_text("undiffuse train digits")
    (run,) = undiffuse.ls(runs)
    assert (run.state, run.step, run.loss, run.data) == ("new", None, None, None)
    assert ls_module.report([run])


def test_ls_takes_progress_from_the_metrics_where_there_is_no_status(runs: Path) -> None:
    (make_run(runs / "a") / "status.json").unlink()
    with (runs / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "ima')  # a crash in the middle of a line
    (run,) = undiffuse.ls(runs)
    assert (run.state, run.step, run.images, run.loss) == ("new", 8, 32, 0.125)


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.json", "{"), ("config.json", "[1]"), ("status.json", '{"a": NaN}'), ("status.json", "\x00\xff")],
)
def test_one_broken_run_hides_no_other(runs: Path, name: str, content: str, capsys: Screen) -> None:
    make_run(runs / "good")
    (make_run(runs / "bad") / name).write_text(content, encoding="latin-1")
    states = {run.name: run for run in undiffuse.ls(runs)}
    assert states["good"].state == "finished"
    assert states["bad"].state == "unreadable"
    assert name in states["bad"].note
    assert main(["ls"]) == 0
    assert f"bad: {Path('runs/bad') / name}" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["x", None, True, [], {}, -5, 10**30])
def test_odd_values_in_the_status_break_nothing(runs: Path, value: object) -> None:
    odd = dict.fromkeys(["step", "images", "total_images", "loss", "updated", "pid"], value)
    make_run(runs / "a", state="running", **odd)
    assert ls_module.report(undiffuse.ls(runs))


def test_a_running_run_whose_process_is_gone_is_stopped(runs: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    old = (datetime.now(UTC) - timedelta(minutes=5)).isoformat()
    make_run(runs / "gone", state="running", pid=gone.pid, updated=old)
    make_run(runs / "alive", state="running", updated=old)
    make_run(runs / "elsewhere", state="running", pid=gone.pid, updated=old, host="another-machine")
    states = {run.name: run.state for run in undiffuse.ls(runs)}
    assert states == {"gone": "stopped", "alive": "running", "elsewhere": "running"}


def test_ls_without_a_folder_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Screen
) -> None:
    monkeypatch.chdir(tmp_path)
    assert failing(capsys, "ls").startswith("runs: no such folder; `undiffuse train DATA`")
    (tmp_path / "file").touch()
    assert failing(capsys, "ls", "file").startswith("file: is not a folder")
    (tmp_path / "runs").mkdir()
    assert main(["ls"]) == 0
    assert "no runs here" in capsys.readouterr().out


# --- show -------------------------------------------------------------------------------------------------------------


def test_show_a_run(runs: Path, capsys: Screen) -> None:
    make_model(make_run(runs / "demo") / "model")
    for name in ("demo", "runs/demo"):
        assert main(["show", name, "--tail", "3"]) == 0
        text = capsys.readouterr().out
        for expected in ("finished", "digits", "step 8", "undiffuse train digits", "13 in 2 tensors, F32", "lr  "):
            assert expected in text
    shown = undiffuse.show(Path("demo"), tail=3)
    assert [row["step"] for row in shown.metrics] == [6, 7, 8]
    assert shown.config["recipe"]["optimiser"] == {"lr": 0.001}
    assert set(shown.files) == {"command.txt", "config.json", "metrics.jsonl", "model", "status.json"}
    assert main(["show", "demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["parameters"] == 13


def test_show_a_model_reports_its_terminal_snr(runs: Path, capsys: Screen) -> None:
    make_model(runs / "linear")
    make_model(runs / "flow", {"kind": "flow"})
    make_model(runs / "strange", {"kind": "unheard-of"})
    # DDPM's linear betas leave alpha_bar = 4.04e-5 (Ho et al. 2020; also Lin et al. 2023, table 1).
    model = undiffuse.show(runs / "linear").model
    assert model is not None
    assert model.terminal_snr == pytest.approx(4.036e-5, rel=1e-3)
    assert main(["show", str(runs / "linear")]) == 0
    assert "0.64% of the signal's amplitude" in capsys.readouterr().out
    for name, expected in (("flow", 0.0), ("strange", None)):
        shown = undiffuse.show(runs / name)
        assert shown.model is not None
        assert shown.model.terminal_snr == expected


def test_show_agrees_with_a_saved_pipeline(runs: Path) -> None:
    from undiffuse.denoiser import INPUT_SCALES, LABELS
    from undiffuse.pipeline import ModelConfig
    from undiffuse.predictions import Eps
    from undiffuse.schedules import CosineBetas

    network = {"in_channels": 2, "width": 8, "blocks": 1, "embedding": 8}
    parts = (CosineBetas(), Eps(), LABELS["discrete"], INPUT_SCALES["none"])
    config = ModelConfig("mlp", network, *parts)
    spec = undiffuse.from_array(np.linspace(0, 1, 20, dtype=np.float32).reshape(10, 2)).spec
    denoiser = config.build()
    undiffuse.Pipeline(denoiser, config, spec, undiffuse.Sampling(), {}).save(runs / "m")
    model = undiffuse.show(runs / "m").model
    assert model is not None
    assert model.parameters == sum(weight.numel() for weight in denoiser.state_dict().values())
    assert model.terminal_snr == CosineBetas().terminal_snr > 0


def test_show_a_run_that_has_just_begun(runs: Path, capsys: Screen) -> None:
    (runs / "a").mkdir()
    (runs / "a" / "config.json").write_text("{}")
    assert main(["show", "a"]) == 0
    assert "new" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["config.json", "status.json", "metrics.jsonl", "model/pipeline.json"])
def test_show_reads_around_a_broken_file(runs: Path, broken: str, capsys: Screen) -> None:
    make_model(make_run(runs / "a") / "model")
    (runs / "a" / broken).write_bytes(b"\xff{")
    assert main(["show", "a"]) == 0
    text = capsys.readouterr().out
    assert "undiffuse train digits" in text
    assert broken in text


@pytest.mark.parametrize("content", [b"", b"1234567", (2**63 - 1).to_bytes(8, "little"), b"\x02" + bytes(7) + b"[]"])
def test_broken_weights_are_one_line(runs: Path, content: bytes, capsys: Screen) -> None:
    (make_model(runs / "m") / "model.safetensors").write_bytes(content)
    assert "m/model.safetensors: " in failing(capsys, "show", "runs/m")


def test_truncated_weights_are_one_line(runs: Path, capsys: Screen) -> None:
    path = make_model(runs / "m") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "m/model.safetensors: damaged" in failing(capsys, "show", "runs/m")
    path.unlink()
    assert "m/model.safetensors: no such file" in failing(capsys, "show", "runs/m")


def test_show_what_is_not_there(runs: Path, capsys: Screen) -> None:
    assert "no such run or model; `undiffuse ls` lists the runs" in failing(capsys, "show", "dmeo")
    (runs / "empty").mkdir()
    assert "neither a run" in failing(capsys, "show", "runs/empty")
