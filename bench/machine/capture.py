"""Launches of the package's own host code, seen as they happen: kernel, grid, parameter bytes.

The emulator of tests/cuda/simt compiles the CUDA sources for the CPU, host code included, and so
knows what a GPU would be told. A launch's pointers are addresses of the arrays that it was given.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.machine.execute.grid import Array, Launch
from dcconv.operator.checks import value_error

SIMT = Path(__file__).resolve().parents[2] / "tests/cuda/simt"

_OBSERVER = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    *(ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t),
    *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t),
)


def emulator_file(name: str) -> Any:
    """Import a Python file of the emulator.

    Raises:
        ValueError: this is no checkout, or has no compiler.
    """
    if not SIMT.is_dir():
        raise value_error("the emulator", "be in a checkout's tests/cuda/simt", str(SIMT))
    if shutil.which("g++") is None:
        raise value_error("g++", "be installed to compile the emulator", "none")
    if str(SIMT) not in sys.path:
        sys.path.insert(0, str(SIMT))
    return importlib.import_module(name)


def symbols_of(library: Path) -> dict[int, str]:
    """Return the symbol of every function of a library, by its offset."""
    done = subprocess.run(
        ["nm", "--defined-only", str(library)], capture_output=True, text=True, check=True
    )
    rows = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    return {int(at, 16): name for at, kind, name in rows if kind in "tTwWuV"}


def base_of(library: Path) -> int:
    """Return the address at which this process has loaded a library."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(library)):
            return int(line.partition("-")[0], 16)
    raise value_error("library", "be loaded", str(library))


class Emulator:
    """The kernels of the package as C++, on numpy arrays.

    Args:
        every: all kernels and dtypes, whose compilation takes minutes; else the passes of the
            strategy library in float32 and bfloat16.
    """

    def __init__(self, every: bool) -> None:
        emulated, builds = emulator_file("emulated"), emulator_file("builds")
        path = emulated.passes_extension(builds.FAST, every_dtype=every)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        self.module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self._symbols, self._base = symbols_of(path), base_of(path)

    @contextmanager
    def observed(self, see: Callable[[Launch], bool]) -> Iterator[None]:
        """Show every launch; what ``see`` answers says whether the emulator runs it."""
        failed: list[BaseException] = []

        def observe(
            name: bytes, x: int, y: int, threads: int, shared: int, kernel: int, at: int, size: int
        ) -> int:
            try:
                symbol = self._symbols.get(kernel - self._base, "")
                parameters = ctypes.string_at(at, size)
                return see(Launch(name.decode(), symbol, (x, y), threads, shared, parameters))
            except BaseException as error:  # must not pass through C++
                failed.append(error)
                return 0

        function = _OBSERVER(observe)
        self.module.set_observer(ctypes.cast(function, ctypes.c_void_p).value)
        try:
            yield
        finally:
            self.module.set_observer(0)
        if failed:
            raise failed[0]

    def launches(
        self, kernel: str, dtype: str, members: Mapping[str, Any], run: bool
    ) -> list[Launch]:
        """Return the launches of a kernel's host function, with or without running them."""
        seen: list[Launch] = []

        def see(launch: Launch) -> bool:
            seen.append(launch)
            return run

        with self.observed(see):
            getattr(self.module, kernel)(dtype, **members)
        return seen


def arrays_in(members: Mapping[str, Any]) -> list[Array]:
    """Return the arrays among the members of a parameter struct, each once."""
    found: dict[int, Array] = {}
    for value in members.values():
        if isinstance(value, Mapping):
            found.update((a.ctypes.data, a) for a in arrays_in(value))
        elif hasattr(value, "ctypes"):
            found[value.ctypes.data] = value
    return list(found.values())
