"""Builds the library in place for one GPU, or a copy of the sources for another target."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

#: What a build needs, beside the package without what it builds.
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")


def native_arch(capability: tuple[int, int]) -> str:
    """Return the entry of TORCH_CUDA_ARCH_LIST for a GPU.

    Example:
        >>> native_arch((9, 0)), native_arch((8, 6))
        ('9.0a', '8.6')
    """
    major, minor = capability
    return f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else "")


def copy_sources(root: Path, folder: Path) -> None:
    """Copy what a build needs, without anything that a build has made."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SOURCES:
        shutil.copy(root / name, folder)
    shutil.copytree(root / "csrc", folder / "csrc")
    made = shutil.ignore_patterns("_C.*", "_build.py", "__pycache__")
    shutil.copytree(root / "dcconv", folder / "dcconv", ignore=made)


def why_it_failed(log: str) -> str:
    """Return the first line of a build's output that names an error, else its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b\s*:|Error: ", line)]
    return next(iter(errors), lines[-1] if lines else "no output")


class Build:
    """One run of setup.py, in the background until ``wait``."""

    def __init__(self, folder: Path, archs: str) -> None:
        self.folder, self.archs = folder, archs
        settings = {"DCCONV_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": archs}
        self._log = folder / "build" / "gate.log"
        self._log.parent.mkdir(exist_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "setup.py", "build_ext", "--inplace"],
                cwd=folder,
                env=os.environ | settings,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, timeout: float) -> str | None:
        """Return None when the library is built, else why it is not."""
        try:
            code = self._process.wait(max(timeout, 0.0))
        except subprocess.TimeoutExpired:
            self.stop()
            return f"it took more than {timeout:.0f} s"
        if code != 0:
            return why_it_failed(self._log.read_text(errors="replace"))
        if not (self.folder / "dcconv/_C.abi3.so").exists():
            return "it left no library"
        return None

    def stop(self) -> None:
        """End the build and its compilers."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, 15)
            self._process.wait()
