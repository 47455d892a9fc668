"""Counts lines that hold one bare argument: lists that are long enough to be written downwards.

    python bare_arguments.py

A list of arguments that many functions pass on belongs into a record. Strings do not count.
"""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[2] / "dcconv"
BARE = re.compile(r"^\s*\**[A-Za-z_][\w.]*(\[\w+\])?(: [^=]+?)?( ?= ?[\w.\"\-\[\]]+)?,$")


class Count(NamedTuple):
    """Lines of code, and those of them with one bare argument."""

    bare: int
    lines: int

    @property
    def share(self) -> float:
        return self.bare / self.lines


def _in_strings(source: str) -> set[int]:
    """Return the numbers of lines that a string of several lines covers."""
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.STRING and token.start[0] < token.end[0]:
            found.update(range(token.start[0], token.end[0] + 1))
    return found


def count(paths: list[Path]) -> Count:
    """Count the lines of code of files; blank lines, comments and docstrings are none."""
    bare = lines = 0
    for path in paths:
        source = path.read_text()
        strings = _in_strings(source)
        for number, line in enumerate(source.splitlines(), 1):
            if number in strings or not line.strip() or line.lstrip().startswith("#"):
                continue
            lines += 1
            bare += BARE.match(line) is not None
    return Count(bare, lines)


def counts() -> dict[str, Count]:
    """Return the counts of the Triton backend, and of everything else in the package."""
    paths = sorted(PACKAGE.rglob("*.py"))
    triton = [path for path in paths if "triton" in path.relative_to(PACKAGE).parts]
    return {
        "dcconv/triton": count(triton),
        "the rest of dcconv": count([path for path in paths if path not in triton]),
    }


if __name__ == "__main__":
    for name, found in counts().items():
        print(f"{name}: {found.bare} of {found.lines} lines, {found.share:.1%}")
