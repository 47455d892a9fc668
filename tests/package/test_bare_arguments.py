"""Arguments that go together go as records: few lines of the package hold one bare argument."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

LIMITS = {"dcconv/triton": 0.2, "the rest of dcconv": 0.1}


@pytest.mark.parametrize("part", LIMITS)
def test_few_lines_hold_one_bare_argument(part: str) -> None:
    path = Path(__file__).with_name("bare_arguments.py")
    spec = importlib.util.spec_from_file_location("bare_arguments", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found = script.counts()
    assert set(found) == set(LIMITS)
    assert found[part].bare / found[part].lines <= LIMITS[part]
