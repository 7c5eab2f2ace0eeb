"""The repository's habits, as far as a program can see them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import undiffuse

ROOT = Path(__file__).parent.parent
SOURCE = sorted((ROOT / "src").rglob("*.py"))
HEART = [path for path in SOURCE if path.parent.name in ("undiffuse", "solvers")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def repository() -> list[Path]:
    """Every file that is in the repository or would be added to it."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout, so there is no list of its files")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def called(node: ast.Call) -> str:
    """torch.randn(3) -> 'torch.randn'."""
    return ast.unparse(node.func)


def places(files: list[Path], wrong: object) -> list[str]:
    """file:line of every node for which ``wrong(node)`` holds."""
    assert callable(wrong)
    return [
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}: {ast.unparse(node)[:80]}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if wrong(node)
    ]


def runs_foreign_code(node: ast.AST) -> bool:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
        return any(name.split(".")[0] in {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib"} for name in names)
    if isinstance(node, ast.keyword):
        return node.arg in {"allow_pickle", "trust_remote_code"} and ast.unparse(node.value) != "False"
    return isinstance(node, ast.Call) and called(node) in {"eval", "exec", "torch.load", "yaml.load", "os.system"}


RANDOM = {"randn", "rand", "randint", "randperm", "normal", "bernoulli", "multinomial", "randn_like", "rand_like"}


def draws_in_secret(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name == "random" for alias in node.names)
    if not isinstance(node, ast.Call):
        return False
    module, _, name = called(node).rpartition(".")
    if module == "torch" and name in RANDOM:
        return not any(keyword.arg == "generator" for keyword in node.keywords)
    legacy = module in {"np.random", "numpy.random"} and name not in {"Generator", "Philox", "PCG64", "SeedSequence"}
    return (legacy and not node.args) or called(node) in {"torch.manual_seed", "torch.seed"}


def takes_anything(node: ast.AST) -> bool:
    if isinstance(node, ast.arguments):
        return node.kwarg is not None and node.kwarg.arg == "kwargs"
    return isinstance(node, ast.Call) and called(node) == "hasattr"


def test_no_code_is_run_by_loading_a_file() -> None:
    assert places(SOURCE, runs_foreign_code) == []


def test_randomness_is_an_argument() -> None:
    assert places(SOURCE, draws_in_secret) == []


def test_no_kwargs_sinks_and_no_hasattr_in_the_heart() -> None:
    assert places(HEART, takes_anything) == []


def is_a_stub(node: ast.AST) -> bool:
    return isinstance(node, ast.Raise) and node.exc is not None and "NotImplemented" in ast.unparse(node.exc)


def test_no_unfinished_places() -> None:
    word = re.compile(r"\b(TODO|FIXME|XXX)\b")
    assert [path.relative_to(ROOT) for path in SOURCE if word.search(path.read_text("utf-8"))] == []
    assert places(SOURCE, is_a_stub) == []


@pytest.mark.parametrize(
    ("check", "bad", "good"),
    [
        (runs_foreign_code, "import pickle", "import json"),
        (runs_foreign_code, "from joblib import load", "from json import load"),
        (runs_foreign_code, "torch.load(path)", "model.eval()"),
        (runs_foreign_code, "np.load(path, allow_pickle=True)", "np.load(path, allow_pickle=False)"),
        (draws_in_secret, "torch.randn(3)", "torch.randn(3, generator=g)"),
        (draws_in_secret, "np.random.default_rng()", "np.random.default_rng(seed)"),
        (draws_in_secret, "import random", "random = np.random.default_rng(seed); random.integers(3)"),
        (takes_anything, "def f(**kwargs): pass", "def f(**cond): pass"),
        (is_a_stub, "raise NotImplementedError", "try: f()\nexcept NotImplementedError: pass"),
        (takes_anything, "hasattr(x, 'y')", "getattr(x, 'y')"),
    ],
)
def test_the_checks_above_see_what_they_look_for(check: object, bad: str, good: str) -> None:
    assert callable(check)
    assert any(check(node) for node in ast.walk(ast.parse(bad)))
    assert not any(check(node) for node in ast.walk(ast.parse(good)))


def test_no_path_of_a_machine_and_no_registry_host_in_the_repository() -> None:
    # Written in pieces, so that this file does not find itself.
    homes = "|".join(["ro" + "ot", "work", "home/[a-z]+", "Users/[A-Za-z]+", "mnt"])
    hosts = "|".join([r"py" + r"pi\.org", r"python" + r"hosted\.org", r"download\.py" + r"torch\.org"])
    pattern = re.compile(rf"(?<![\w.~*/-])/(?:{homes})/|{hosts}".encode())
    found = []
    for path in repository():
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if path.suffix in {".png", ".gif", ".webp", ".safetensors", ".npy", ".npz"}:
                break
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line[:80]!r}")
    assert not found, "\n".join(found)


def test_no_file_is_larger_than_a_megabyte() -> None:
    assert [path.name for path in repository() if path.stat().st_size > 1_000_000] == []


def test_torch_is_pinned_first_and_every_pin_is_exact() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line[:1] not in ("", "#")]
    assert lines[0] == "torch==2.13.0"
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[\w.!]+", line)] == []
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["demo"], *extras["plot"], *extras["dev"]]
    assert {re.split(r"[<>=\[ ]", name)[0] for name in wanted} <= pinned


def outside(path: Path) -> set[str]:
    """The packages that a file imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.partition(".")[0] for name in named}


def installed_by_make() -> set[str]:
    """The distributions that are there after `make test` in a fresh environment."""
    asked = re.search(r"-e '\.\[(.*)\]'", (ROOT / "Makefile").read_text("utf-8"))
    assert asked
    extras = PROJECT["optional-dependencies"]
    waiting = [Requirement(line) for line in PROJECT["dependencies"]]
    waiting += [Requirement(line) for extra in asked[1].split(",") for line in extras[extra]]
    found: set[tuple[str, str]] = set()
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        for extra in {"", *wanted.extras} - {extra for other, extra in found if other == name}:
            found.add((name, extra))
            with suppress(metadata.PackageNotFoundError):  # for other machines
                needed = map(Requirement, metadata.requires(name) or [])
                waiting += [each for each in needed if not each.marker or each.marker.evaluate({"extra": extra})]
    return {name for name, _ in found}


def test_a_fresh_environment_has_what_the_type_checker_and_the_tests_look_for() -> None:
    folders = [ROOT / name for name in ("src", "tests", "benchmarks")]
    ours = {path.stem for folder in folders for path in folder.rglob("*")}
    there, brought_by = installed_by_make(), metadata.packages_distributions()
    missing = [
        f"{path.relative_to(ROOT)} imports {package}"
        for folder in folders
        for path in folder.rglob("*.py")
        for package in outside(path) - ours - sys.stdlib_module_names
        if not there & {canonicalize_name(name) for name in brought_by.get(package, [])}
    ]
    assert not missing, "\n".join(missing)


def test_all_is_all_but_the_developers_tools() -> None:
    extras = PROJECT["optional-dependencies"]
    assert extras["all"] == [f"undiffuse[{','.join(name for name in extras if name not in ('all', 'dev'))}]"]


def test_the_version_is_a_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", undiffuse.__version__)


def test_the_package_is_typed_and_licensed() -> None:
    assert (ROOT / "src/undiffuse/py.typed").is_file()
    assert "Apache License" in (ROOT / "LICENSE").read_text("utf-8")[:200]
