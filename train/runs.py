"""The folder of a training run: files that appear whole or not at all, and the environment."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import dcconv
from dcconv.checks import value_error

_ROOT = Path(__file__).resolve().parent.parent


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Replace what JSON has no number for, NaN and infinities, by None, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


class RunFolder:
    """A new folder ``<parent>/<date>_<name>`` for one run.

    Args:
        parent: folder that receives it; made if missing.
        name: what the run is.

    Raises:
        ValueError: the folder cannot be made.
    """

    def __init__(self, parent: Path, name: str) -> None:
        date = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        number = 1
        while True:
            self.path = parent / f"{date}_{name}{f'-{number}' if number > 1 else ''}"
            try:
                parent.mkdir(parents=True, exist_ok=True)
                self.path.mkdir()
                return
            except FileExistsError:
                # Either a run of the same second, or the parent is a file.
                if not parent.is_dir():
                    raise value_error("out", "be a folder", repr(str(parent))) from None
                number += 1
            except OSError as error:
                rule = f"be a folder that can be written ({error.strerror})"
                raise value_error("out", rule, repr(str(parent))) from error

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the run, atomically."""
        write_file(self.path / name, data)

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as indented JSON; NaN and infinities become null."""
        self.write(name, (json.dumps(_plain(value), indent=2, allow_nan=False) + "\n").encode())

    def write_lines(self, name: str, values: Iterable[Any]) -> None:
        """Write one line of JSON per value; NaN and infinities become null."""
        lines = (json.dumps(_plain(value), allow_nan=False) + "\n" for value in values)
        self.write(name, "".join(lines).encode())

    def copy_source(self) -> None:
        """Copy the Python source of both packages to ``source/``."""
        for package in ("train", "dcconv"):
            target = self.path / "source" / package
            target.mkdir(parents=True)
            for file in sorted((_ROOT / package).glob("*.py")):
                write_file(target / file.name, file.read_bytes())


def _git(*arguments: str) -> str | None:
    """Return the output of a git command in the project's own repository, or None."""
    if not (_ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def environment() -> dict[str, Any]:
    """Describe what a run depends on besides its configuration and its source."""
    changes = _git("status", "--porcelain")
    return {
        "dcconv": dcconv.__version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed_files": None if changes is None else len(changes.splitlines()),
    }
