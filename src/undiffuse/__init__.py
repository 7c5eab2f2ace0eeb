"""undiffuse: diffusion models from noise to sample.

The public names, in the order of the chapters. To add one, add its line below.

Importing undiffuse imports nothing else: the lines under TYPE_CHECKING are what editors and type checkers follow, and
at run time they are the table from which a name is imported when it is first used.
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    # what can go wrong
    from .errors import UndiffuseError as UndiffuseError
    from .errors import UndiffuseWarning as UndiffuseWarning

    # the verbs of the command line
    from .commands.ls import ls as ls
    from .commands.show import show as show


def _table() -> dict[str, str]:
    """Public name -> the module that defines it, read from the lines above."""
    tree = ast.parse(Path(__file__).read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    lines = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: f"{__name__}.{line.module}" for line in lines for alias in line.names}


_HOME = _table()
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        from difflib import get_close_matches

        near = get_close_matches(name, _HOME, n=1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise AttributeError(f"module 'undiffuse' has no attribute {name!r}{hint}", name=name)
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
