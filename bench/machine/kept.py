"""Simulated figures on disk, found again by what they depend on: a second run is quick.

A figure depends on a kernel's machine code, on the figures of a GPU, on what was asked of the
kernel, and on the code that simulates. Not on the code that executes: instructions do what they do,
and an instruction that it lacks makes no figure.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from bench.machine import simulate
from bench.machine.disassemble import Kernel

FOLDER = Path(__file__).parent

#: What traces and simulates, and chooses what is executed. Tables and commands change no figure.
SOURCES = (
    *("execute/tra*.py", "model/*", "simulate.py", "pipes.py", "layers.py", "fused.py"),
    *("predict.py", "gemm.py", "rates.py"),
)


def digest_of(kernel: Kernel) -> str:
    """Return a text that two kernels share only where their machine code is the same."""
    parts = (kernel.arch, kernel.code, kernel.registers, kernel.shared, kernel.stack)
    return hashlib.sha256(repr(parts).encode() + kernel.tables).hexdigest()


@cache
def _model() -> str:
    found = [path for pattern in SOURCES for path in sorted(FOLDER.glob(pattern))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in found)).hexdigest()


def kept(
    kernel: Kernel, asked: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """Return figures that were made before, or make and keep them.

    Args:
        kernel: whose code is executed.
        asked: all else that the figures depend on, as JSON has it.
        make: returns the figures, as JSON has them.

    Example:
        >>> from bench.machine.disassemble import Kernel
        >>> import tempfile
        >>> from unittest import mock
        >>> kernel = Kernel("k", "k", "sm_80", (), 8, 0, 0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with mock.patch.object(simulate, "CACHE", Path(folder)):
        ...         kept(kernel, {"n": 1}, lambda: {"cycles": 2.0})
        ...         kept(kernel, {"n": 1}, lambda: {"cycles": 3.0})
        {'cycles': 2.0}
        {'cycles': 2.0}
    """
    return kept_by({"kernel": digest_of(kernel), "asked": asked}, make)


def kept_by(key: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """As :func:`kept`, for figures that depend on what a key says and on the model."""
    text = json.dumps([_model(), key], sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    path = simulate.CACHE / "figures" / f"{name}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(make()), encoding="utf-8")
        part.replace(path)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
