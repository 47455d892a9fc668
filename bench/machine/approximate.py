"""How far functions in 16-bit types may be off: the tables of docs/accuracy.md."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

#: What the table of functions counts in: the largest error of rounding to float16.
UNIT = 2.0**-11


class Reach(NamedTuple):
    """Largest errors of a function: of its value, and of derivatives where they count.

    Attributes:
        value: of h or g, relative.
        defect: of b dh/db - h beside h, or g - c dg/dc beside its terms.
        first: of dh/drho or dg/dc, relative.
        second: of dh/da, relative, or dg/dk beside its terms.
        inverse: of c found from g, relative; 0 for magnitudes.
    """

    value: float
    defect: float
    first: float
    second: float
    inverse: float

    @property
    def largest(self) -> float:
        """The largest of all."""
        return max(self)


@functools.cache
def _table() -> str:
    text = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    return text.split("\n## Approximate instructions\n")[1].split("\n## ")[0]


@functools.cache
def instructions() -> dict[str, float]:
    """Return by name the largest error that each instruction may have."""
    rows = re.findall(r"^\| `(\w+)\.approx\S*` \| (\S+) \|", _table(), re.MULTILINE)
    return {name: float(error) for name, error in rows}


@functools.cache
def functions() -> dict[str, Reach]:
    """Return the largest errors of every function, by ``h-NAME`` or ``g-NAME``."""
    found = {}
    for name, cells in re.findall(r"^\| ([hg]-\S+) \|(.*)\|$", _table(), re.MULTILINE):
        numbers = (cell.strip() for cell in cells.split("|"))
        found[name] = Reach(*(0.0 if n == "-" else float(n) * UNIT for n in numbers))
    return found
