"""The summary of what ran on which backend, in one process and in two."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest
from paths import ROOT

needs_xdist = pytest.mark.skipif(
    importlib.util.find_spec("xdist") is None, reason="pytest-xdist is not installed"
)


def summary(*options: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    command += ["tests/operator/test_golden.py", "-k", "test_printed_patch_norms"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    section = done.stdout.partition(" backends =")[2].splitlines()[1:]
    # The last line counts the deselected and the seconds, and is pytest's own.
    return section[:-1]


@needs_xdist
def test_summary_is_that_of_all_workers() -> None:
    alone = summary()
    assert any(re.match(r"reference +\d+ passed", line) for line in alone)
    assert any(re.search(r" and \d+ more like them deselected$", line) for line in alone)
    assert summary("-n", "2", "--dist", "worksteal") == alone
