"""Where the tests and their helpers lie."""

from __future__ import annotations

import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent

#: The folders of helpers, as ``pythonpath`` in pyproject.toml has them for pytest.
HELPERS = tuple(
    TESTS / name
    for name in (
        "support",
        "cuda/simt",
        "cuda/models",
        "cuda/gate",
        "cuda/resources",
        "triton",
        "cudnn",
    )
)


def python_path(*others: object) -> str:
    """Return PYTHONPATH for a process that imports the package and the helpers."""
    inherited = os.environ.get("PYTHONPATH")
    return os.pathsep.join(
        [*map(str, (ROOT, *HELPERS, *others)), *([inherited] if inherited else [])]
    )


def add_helpers() -> None:
    """Make the helpers importable in a process that pytest did not start."""
    sys.path[:0] = [str(folder) for folder in (ROOT, *HELPERS) if str(folder) not in sys.path]
