"""The command line: ``undiffuse VERB ...``.

A verb is a module here with three things: one typed function of the verb's own name, whose signature and docstring
*are* the command's options and help; ``report(result) -> str``, what a person reads; and ``EXAMPLES``, what ``--help``
ends with. One whose result can be bad news also has ``exit_code(result) -> int``. To add one,
write the module and add its line to :data:`VERBS`.

Modules of verbs import torch inside their functions only: ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import importlib
import io
import json
import math
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TextIO

from ..errors import Deserted, Failed, UndiffuseError, UndiffuseWarning

VERBS = {
    "demo": "train on real handwritten digits and sample from the model",
    "train": "train a model on your own data",
    "doctor": "look at data and a plan before training, or at a run",
    "compare": "vary one thing, hold the rest constant, and judge the difference",
    "sample": "sample from a saved model",
    "evaluate": "measure samples against data: every number with its floor",
    "studio": "see a model at work: a page in the browser",
    "judge": "a blind study: which pictures do people prefer?",
    "serve": "serve models over HTTP, many requests in one network call",
    "solvers": "list the solvers, find the best for a model, tune a grid for it",
    "export": "write a model as another program's folder",
    "push": "send a model to the Hugging Face Hub",
    "pull": "fetch a model from there",
    "ls": "list the runs in a folder",
    "show": "describe a run or a saved model",
}

EXAMPLES = """
  undiffuse demo                     two minutes from nothing to digits
  undiffuse train FOLDER             your own pictures
  undiffuse sample runs/demo         a grid of samples, samples.png
  undiffuse ls                       the runs in ./runs
  undiffuse show runs/demo           what was trained, how far, and where
"""

OK, MISTAKE, INTERRUPTED, CLOSED = 0, 2, 130, 141  # exit codes; the last two are 128 + the signal's number


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (by default the process's own) and return its exit code.

    A mistake in the input is one line on stderr and exit code 2; ``--debug`` anywhere shows the traceback. Anything
    that is not the user's mistake keeps its traceback.
    """
    # Beside another busy process, threads that wait by spinning make training 15 to 30 times slower; waiting patiently
    # costs a few per cent on a quiet machine (docs/benchmarks.md). Read when torch is first imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    words = list(sys.argv[1:] if argv is None else argv)
    debug, as_json = _take(words, "--debug"), _take(words, "--json")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Unicode gets '?' instead of a crash
    try:
        with warnings.catch_warnings():
            warnings.showwarning = functools.partial(_show_warning, warnings.showwarning)
            code = _run(words, as_json)
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        if debug:
            raise
        return INTERRUPTED
    except BrokenPipeError:  # the reader has gone (`undiffuse ls | head`): nobody is left to tell
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
    except (UndiffuseError, OSError) as error:
        if debug:
            raise
        if _tells(error):
            _complain(_sentence(error))
        return error.exit_code if isinstance(error, UndiffuseError) else MISTAKE


def _run(words: list[str], as_json: bool) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return OK
    if words[0] in ("-V", "--version"):
        from .. import __version__

        print(f"undiffuse {__version__}")
        return OK
    verb, *options = words
    if verb not in VERBS:
        kind = "option" if verb.startswith("-") else "verb"
        raise _unknown(kind, verb, ["--help", "--version"] if kind == "option" else list(VERBS), "undiffuse --help")
    module = importlib.import_module(f"undiffuse.commands.{verb}")
    if any(word in ("-h", "--help") for word in options):
        print(_help(verb, module))
        return OK
    call = _parse(verb, module, options)
    # With --json, stdout belongs to the JSON alone: progress and headers go to stderr.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        result = call()
    text = json.dumps(plain(result), indent=2, allow_nan=False) if as_json else module.report(result)
    if text and _leads():
        print(text)
    return vars(module).get("exit_code", lambda result: OK)(result)


# --- several processes (torchrun) -------------------------------------------------------------------------------------


def _leads() -> bool:
    """Whether this process is the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def _tells(error: Exception) -> bool:
    """Whether this process prints an error: mistakes in the command line are found by all, other failures by one."""
    if _leads() or isinstance(error, Failed):
        return True
    return os.environ.get("LOCAL_RANK") == "0" and not isinstance(error, Deserted)


# --- words to a call --------------------------------------------------------------------------------------------------


def _parse(verb: str, module: Any, options: list[str]) -> Callable[[], Any]:
    """The verb's function with the options as its arguments, not yet called."""
    code, call, _, complaint = _tyro(verb, module, options)
    if code == OK:
        return call
    # tyro explains at length; here a mistake is one line that names the option and the nearest one.
    screen = _tyro(verb, module, ["--help"])[2]
    known = [*re.findall(r"(?:^|, )\W*?(--?[a-zA-Z][\w-]*)", screen, re.MULTILINE), "--json", "--debug"]
    for option in (word.partition("=")[0] for word in options if re.match(r"--?[a-zA-Z]", word)):
        if option.replace("_", "-") not in known:
            raise _unknown("option", option, known, f"undiffuse {verb} --help")
    lines = [line.strip("│ ") for line in complaint.splitlines()[1:]]
    lines = [line for line in lines if line.strip("-─╭╮╰╯ ")]
    lines = lines[: next((i for i, line in enumerate(lines) if "helptext" in line), len(lines))]
    missing = len(lines) > 1 and lines[0].startswith("Missing from")
    message = f"missing {lines[1]}" if missing else " ".join(lines) or "these options cannot be read"
    for theirs, ours in _PLAINER.items():
        message = re.sub(theirs, ours, message)
    raise UndiffuseError(f"{message.rstrip('.')} (see undiffuse {verb} --help)")


_PLAINER = {
    r"Error parsing (\S+): invalid literal for int\(\) with base 10: ": r"\1 needs a whole number, not ",
    r"Error parsing (\S+): could not convert string to float: ": r"\1 needs a number, not ",
    r"Error parsing (\S+): no type matching (\S+) could be instantiated from \[(.*?)\].*": r"\1 needs \2, not \3",
    r"^Unrecognized options:": "unexpected",
}


def _tyro(verb: str, module: Any, options: list[str]) -> tuple[int, Any, str, str]:
    """(exit code, the bound call, what tyro wrote to stdout, and to stderr)."""
    import tyro

    function = getattr(module, verb)

    # tyro calls what it is given; given this, it only binds the arguments, so that parsing and running stay apart.
    @functools.wraps(function)
    def bind(*values: Any, **options: Any) -> Callable[[], Any]:
        return functools.partial(function, *values, **options)

    markers = (
        tyro.conf.PositionalRequiredArgs,
        tyro.conf.PositionalMetavarFromFieldName,
        tyro.conf.UseAppendAction,
        tyro.conf.DisallowNone,
        tyro.conf.OmitArgPrefixes,  # options that verbs share are a group, and named as if they were the verb's own
    )
    screen, complaint = io.StringIO(), io.StringIO()
    code, call = OK, None
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(complaint):
        try:
            call = tyro.cli(bind, prog=f"undiffuse {verb}", args=options, config=markers)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else MISTAKE
    return code, call, screen.getvalue(), complaint.getvalue()


def _take(words: list[str], flag: str) -> bool:
    """Remove a flag that every verb understands from the words before ``--``."""
    end = words.index("--") if "--" in words else len(words)
    found = flag in words[:end]
    words[:end] = [word for word in words[:end] if word != flag]
    return found


# --- what people read -------------------------------------------------------------------------------------------------


def _overview() -> str:
    width = max(map(len, VERBS)) + 2
    verbs = "\n".join(f"  {verb:<{width}} {text}" for verb, text in VERBS.items())
    return (
        "usage: undiffuse VERB [options]\n\nDiffusion models from noise to sample.\n\n"
        f"verbs:\n{verbs}\n\n"
        "every verb also takes:\n"
        "  --help      its options and examples\n"
        "  --json      the result as JSON on stdout, everything else on stderr\n"
        "  --debug     the traceback of an error\n\n"
        f"examples:\n{_examples(EXAMPLES)}"
    )


def _help(verb: str, module: Any) -> str:
    width = 80
    # An option that may be left open says so itself; "(default: None)" says nothing. A path may be text in Python.
    screen = re.sub(r"\s*\((default:\s+None|unset\s+by\s+default)\)", "", _tyro(verb, module, ["--help"])[2]).replace(
        "PATH|STR", "PATH    "
    )
    lines = [line.rstrip() for line in screen.rstrip().splitlines()]
    text = "\n".join(part for line in lines for part in (textwrap.wrap(line, width) if len(line) > width else [line]))
    return f"{text}\n\nexamples:\n{_examples(module.EXAMPLES)}"


def _examples(text: str) -> str:
    return textwrap.indent(textwrap.dedent(text.strip("\n")).rstrip(), "  ")


def _unknown(kind: str, name: str, choices: Sequence[str], remedy: str) -> UndiffuseError:
    near = get_close_matches(name, choices, n=1)
    return UndiffuseError(f"unknown {kind} {name!r}: " + (f"did you mean {near[0]!r}?" if near else f"see {remedy}"))


def _sentence(error: Exception) -> str:
    """One line, whatever the error holds."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        if error.errno == errno.ENOSPC:
            text += " (the disk is full; free some space and run the same command again)"
    return " ".join(text.split()) or type(error).__name__


def _complain(text: str) -> None:
    print(f"undiffuse: {text}", file=sys.stderr)


def _show_warning(
    usual: Callable[..., None],
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, UndiffuseWarning):
        if not _leads():
            return  # the first process warns of the same
        _complain(f"warning: {' '.join(str(message).split())}")
    else:
        usual(message, category, filename, lineno, file, line)


def plain(value: Any) -> Any:
    """A result as JSON can hold it: dataclasses become objects, paths text, numbers that are not finite null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
