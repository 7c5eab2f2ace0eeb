"""Writes the table of all solvers into solvers.md, from the registry: python docs/solvers_table.py"""

from __future__ import annotations

from pathlib import Path

from undiffuse.solvers import solver_table

PAGE = Path(__file__).parent / "solvers.md"
BEGIN, END = "<!-- table: python docs/solvers_table.py -->\n", "<!-- end of table -->"


def table() -> str:
    lines = ["| name | order | calls | stochastic |", "|---|---|---|---|"]
    for row in solver_table():
        noise = "yes" if row["stochastic"] else ""
        lines.append(f"| `{row['name']}` | {row['order']} | {row['calls_per_step']} | {noise} |")
    return "\n".join(lines) + "\n"


def renewed(page: str) -> str:
    before, rest = page.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text("utf-8")), "utf-8")
