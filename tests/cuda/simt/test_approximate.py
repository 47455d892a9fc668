"""Functions made of the GPU's approximate instructions, next to the tables of docs/accuracy.md."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import builds  # noqa: E402
from builds import FAST, ROOT  # noqa: E402

#: A table is tight if what it says is reached to this share.
SHARE = 0.9

#: What the table of functions counts in: the largest error of rounding to float16.
UNIT = 2.0**-11

Errors = dict[str, list[float]]


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


@functools.cache
def _table() -> str:
    text = (ROOT / "docs/accuracy.md").read_text(encoding="utf-8")
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


def program(csrc: Path = ROOT / "csrc") -> Path:
    reason = builds.why_not(FAST)
    if reason is not None:
        pytest.skip(reason)
    flags = ["-Wno-unknown-pragmas", "-DDCCONV_SIMT", f"-I{csrc}"]
    return builds.compile_executable(
        "approximate_test", [HERE / "approximate_test.cpp"], FAST, flags
    )


def run(binary: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return builds.run([binary, *arguments], FAST, timeout=60)


def errors(text: str, kind: str) -> Errors:
    rows = [line.split() for line in text.splitlines()]
    return {row[1]: [float(x) for x in row[2:]] for row in rows if row[0] == kind}


def faults(text: str) -> list[str]:
    """Return what does not hold between the tables and what was measured."""
    found = []

    def compare(name: str, measured: float, stated: float) -> None:
        # NaN is neither; the table and the program print five digits.
        if not SHARE * stated <= measured <= stated * (1 + 1e-4):
            found.append(f"{name}: {measured:.4g} where the table has {stated:.4g}")

    measured = errors(text, "instruction")
    table = instructions()
    assert measured.keys() == table.keys()
    for name, (error,) in measured.items():
        compare(name, error, table[name])
    measured = errors(text, "function")
    reaches = functions()
    assert measured.keys() == reaches.keys()
    for name, row in measured.items():
        if name.startswith("h-"):
            row = [*row, 0.0]
        else:
            value, first, defect, second, inverse = row
            row = [value, defect, first, second, inverse]
        for part, error, stated in zip(Reach._fields, row, reaches[name], strict=True):
            compare(f"{name} {part}", error, stated)
    return found


@pytest.fixture(scope="module")
def measured() -> str:
    done = run(program())
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_functions_reach_what_the_tables_say(measured: str) -> None:
    assert faults(measured) == []


def test_functions_are_within_a_rounding_or_two_of_float16() -> None:
    """A single tanh keeps to one rounding, two of them to two."""
    for name, reach in functions().items():
        roundings = 1.05 if name in ("h-tanh", "h-tanh-product") else 2.1
        assert max(reach) <= roundings * UNIT, name


def test_float32_is_within_four_ulp_without_division(measured: str) -> None:
    """The device's formulas of quotients, roots and elementary functions, with an exact rcp."""
    found = errors(measured, "ulp")
    assert len(found) == 7
    for name, (ulp,) in found.items():
        assert ulp <= (1 if name in ("reciprocal_of", "quotient_of") else 4), name


@pytest.mark.parametrize("instruction", ["tanh", "ex2", "lg2", "rcp", "sqrt", "rsqrt"])
def test_a_model_that_is_too_kind_or_too_hard_is_seen(instruction: str) -> None:
    for factor in ("0.5", "1.25"):
        text = run(program(), instruction, factor).stdout
        assert any(fault.startswith(f"{instruction}: ") for fault in faults(text)), factor


def test_without_errors_the_model_rounds_correctly() -> None:
    """What machine code is compared with."""
    found = errors(run(program(), "all", "0").stdout, "instruction")
    assert found.keys() == instructions().keys()
    for name, (error,) in found.items():
        assert 2.0**-25 <= error <= 2.0**-24, name


# What is changed in a function, and the row that shows it.
CHANGES = {
    "the derivative of tanh cancels": (
        "Approximate(e * sum * sum)",
        "Approximate(1.0f - t * t)",
        "h-tanh first",
    ),
    "log(1 + x) of small x by lg2": ("x < 0.03125f ?", "x < 0.0f ?", "h-log value"),
    "a term less of asin": ("0.0641734749f * t", "0.0f * t", "g-linear value"),
    "a rough constant": ("-2.88539008f", "-2.885f", "h-tanh first"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_worse_formula_is_seen(name: str, tmp_path: Path) -> None:
    old, new, row = CHANGES[name]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    path = tmp_path / "csrc/cuda/support/approximate.cuh"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    binary = program(tmp_path / "csrc")
    try:
        assert any(fault.startswith(f"{row}: ") for fault in faults(run(binary).stdout))
    finally:
        shutil.rmtree(binary.parent)
