"""Law 9: imports go up the page. Chapters 1 to 9 import earlier chapters only; the rest uses their public names."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import undiffuse
from undiffuse.commands import VERBS

SOURCE = Path(undiffuse.__file__).parent
CHAPTERS = {
    "levels": 1,
    "schedules": 2,
    "predictions": 3,
    "denoiser": 4,
    "conditions": 5,
    "guidance": 6,
    "solvers": 7,
    "grids": 8,  # chapter 8 is seven files
    "noise": 8,
    "sampling": 8,
    "likelihood": 8,
    "inversion": 8,
    "editing": 8,
    "parallel": 8,
    "objectives": 9,
}
FREE = {
    "cache",
    "errors",
    "beside",
    "config",
    "tokens",
    "attention",
    "encoders",
    "prompts",
    "reuse",
}  # everybody may use these; they use nothing but each other


def chapter_of(module: str) -> str:
    """undiffuse.solvers.heun -> solvers; the package itself -> ''."""
    return module.partition(".")[2].partition(".")[0]


def module_name(path: Path) -> str:
    parts = ["undiffuse", *path.relative_to(SOURCE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> list[tuple[int, str, str]]:
    """(line, module, name) of every import of undiffuse in a file, wherever it stands; name is '' for ``import x``."""
    here = module_name(path).split(".")
    if path.name != "__init__.py":
        here = here[:-1]
    found: list[tuple[int, str, str]] = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from . import levels` names a module, `from .levels import Level` a thing in one.
                inner = f"{module}.{alias.name}"
                is_module = (SOURCE.parent / inner.replace(".", "/")).with_suffix(".py").exists()
                is_module = is_module or (SOURCE.parent / inner.replace(".", "/")).is_dir()
                found.append((node.lineno, inner, "") if is_module else (node.lineno, module, alias.name))
    return [entry for entry in found if entry[1].split(".")[0] == "undiffuse"]


FILES = sorted(SOURCE.rglob("*.py"))


def test_relative_and_absolute_imports_are_both_seen() -> None:
    assert any(chapter_of(module) == "levels" for _, module, _ in imports_of(SOURCE / "schedules.py"))
    assert any(chapter_of(module) == "errors" for _, module, _ in imports_of(SOURCE / "commands" / "ls.py"))


@pytest.mark.parametrize("chapter", [*CHAPTERS, *sorted(FREE)])
def test_law_9_a_chapter_imports_only_earlier_chapters(chapter: str) -> None:
    allowed = {name for name, number in CHAPTERS.items() if number <= CHAPTERS.get(chapter, 0)} | FREE
    wrong = [
        f"{path.relative_to(SOURCE)}:{line} imports {module}"
        for path in FILES
        if chapter_of(module_name(path)) == chapter
        for line, module, _ in imports_of(path)
        if chapter_of(module) not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_law_9_below_the_heart_only_its_public_names_are_used() -> None:
    wrong = [
        f"{path.relative_to(SOURCE)}:{line} uses {module}.{name}"
        for path in FILES
        if chapter_of(module_name(path)) not in {*CHAPTERS, ""}
        for line, module, name in imports_of(path)
        if chapter_of(module) in CHAPTERS
        if name.startswith("_") or any(part.startswith("_") for part in module.split("."))
    ]
    assert not wrong, "\n".join(wrong)


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_torch_is_imported_by_use_alone() -> None:
    heavy = "print(sorted({'torch', 'numpy', 'tyro', 'PIL'} & set(sys.modules)))"
    assert run(f"import sys, undiffuse; dir(undiffuse); {heavy}") == "[]"
    verbs = "; ".join(f"import undiffuse.commands.{verb}" for verb in VERBS)
    helps = "; ".join(f"main(['{verb}', '--help'])" for verb in VERBS)
    silent = "import contextlib, io, sys; from undiffuse.commands import main"
    code = f"{silent}; {verbs}\nwith contextlib.redirect_stdout(io.StringIO()): {helps}\nprint('torch' in sys.modules)"
    assert run(code) == "False"


def test_every_public_name_resolves() -> None:
    for name in undiffuse.__all__:
        assert getattr(undiffuse, name) is not None
        assert name in dir(undiffuse)


def test_public_names_follow_the_chapters() -> None:
    homes = [import_module("undiffuse")._HOME[name].split(".")[1] for name in undiffuse.__all__[1:]]
    order = [home for home in homes if home in CHAPTERS]
    assert order == sorted(order, key=CHAPTERS.__getitem__)
    assert len(set(undiffuse.__all__)) == len(undiffuse.__all__)


def test_a_wrong_name_suggests_the_nearest() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'UndiffuseEror': did you mean 'UndiffuseError'"):
        undiffuse.UndiffuseEror  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nothing_like_it'"):
        exec("from undiffuse import nothing_like_it")
