"""Every code block of README.md, CONTRIBUTING.md and docs/*.md runs.

A page's ``python`` blocks run in order in one namespace; of its ``console`` blocks the lines ``$ undiffuse ...`` run
through the real command line, and must succeed. All of a page runs in one empty folder. A block whose info string says
``no-run`` is left out; its first line must be a comment that says why.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from undiffuse.commands import main

ROOT = Path(__file__).parent.parent
PAGES = [page for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if page.is_file()]
PAGES += sorted((ROOT / "docs").glob("*.md"))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@dataclass(frozen=True)
class Block:
    line: int  # of the fence
    info: tuple[str, ...]
    text: str

    @property
    def runs(self) -> bool:
        return "no-run" not in self.info

    @property
    def language(self) -> str:
        return self.info[0] if self.info else ""


def blocks(markdown: str) -> list[Block]:
    """The fenced code blocks; a fence may be indented, as in a list."""
    found, lines = [], markdown.splitlines()
    number = 0
    while number < len(lines):
        fence = re.match(r"^( *)(```+)(.*)$", lines[number])
        if fence:
            indent, ticks, info = fence.groups()
            end = next((i for i in range(number + 1, len(lines)) if lines[i].strip() == ticks), len(lines))
            inner = [line.removeprefix(indent) for line in lines[number + 1 : end]]
            found.append(Block(number + 1, tuple(info.split()), "\n".join(inner)))
            number = end
        number += 1
    return found


def commands(block: Block) -> list[list[str]]:
    """The ``undiffuse`` lines of a console block; a backslash at the end continues a line."""
    joined = re.sub(r"\\\n\s*", " ", block.text)
    lines = [line[2:] for line in joined.splitlines() if line.startswith("$ ")]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("undiffuse")]


def run_page(page: Path, name: str) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page.read_text("utf-8")):
        if block.language == "python" and block.runs:
            # Padding makes the line numbers of a traceback those of the page.
            exec(compile("\n" * block.line + block.text, name, "exec"), namespace)
        elif block.language == "console" and block.runs:
            for words in commands(block):
                screen = io.StringIO()
                with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
                    code = main(words)
                assert code == 0, f"{name}:{block.line}: undiffuse {shlex.join(words)} gave {code}: {screen.getvalue()}"


@pytest.mark.parametrize("name", NAMES)
def test_code_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    run_page(ROOT / name, name)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_that_do_not_run_say_why(name: str) -> None:
    for block in blocks((ROOT / name).read_text("utf-8")):
        if not block.runs:
            first = block.text.strip().splitlines()[:1]
            assert first, f"{name}:{block.line}: an empty block"
            assert first[0].startswith("# "), f"{name}:{block.line}: no-run without a reason in its first line"


@pytest.mark.parametrize("name", NAMES)
def test_links_inside_the_repository_lead_somewhere(name: str) -> None:
    page = ROOT / name
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text("utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text) + re.findall(r'(?:src|href)="([^"#]+)"', text)
    inside = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert [target for target in inside if not (page.parent / target).exists()] == []


# --- the machinery itself ---------------------------------------------------------------------------------------------

PAGE = """
```python
x = 1
```
1. a list
   ```python
   y = x + 1
   ```
```python no-run
# needs a GPU
raise SystemExit
```
```console
$ undiffuse --version  # a comment
undiffuse 0.1.0
$ undiffuse ls \\
    somewhere
$ make demo
```
```
plain
```
"""


def test_blocks_are_found() -> None:
    found = blocks(PAGE)
    assert [block.language for block in found] == ["python", "python", "python", "console", ""]
    assert [block.runs for block in found] == [True, True, False, True, True]
    assert found[1].text == "y = x + 1"
    assert commands(found[3]) == [["--version"], ["ls", "somewhere"]]


def test_a_failing_block_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.md").write_text("```python\nx = 1\n```\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError):
        run_page(tmp_path / "a.md", "a.md")
    (tmp_path / "b.md").write_text("```console\n$ undiffuse ls absent\n```\n")
    with pytest.raises(AssertionError, match="no such folder"):
        run_page(tmp_path / "b.md", "b.md")
