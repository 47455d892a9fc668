"""The README's code runs, and its tables name every function with its formula."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dcconv.functions import angulars, magnitudes, weightings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_code_runs(index: int) -> None:
    subprocess.run([sys.executable, "-c", SNIPPETS[index]], check=True, cwd=ROOT)


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) == 3


@pytest.mark.parametrize("name", [*magnitudes, *angulars])
def test_every_function_has_a_row(name: str) -> None:
    rows = {
        record.formula
        for table in (magnitudes, angulars)
        for record in table.values()
        if record.name == name
    }
    for formula in rows:
        assert f"| `{name}` | {formula} |" in README


@pytest.mark.parametrize("name", weightings)
def test_every_weighting_has_a_row(name: str) -> None:
    assert f"| `{name}` | {weightings[name].formula}" in README
