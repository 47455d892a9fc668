"""Machine code against the emulated sources: the same launches, on the same operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.machine import fused
from bench.machine.capture import Emulator, arrays_in
from bench.machine.execute.grid import Array
from bench.machine.execute.run import Runner
from bench.machine.library import Library

#: Largest difference over the largest magnitude of a tensor: float32 and float64 for the order of
#: operations and special functions, 16-bit types for two roundings. The emulator's approximate
#: instructions are rounded correctly here, as the executor's are.
TOLERANCE = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 2.0**-7, "float16": 2.0**-10}

#: float64 reads tables of CUDA's trigonometry, which the executor does not place.
DTYPES = ("float32", "bfloat16", "float16")

#: Functions of the extension that launch no kernel.
HOST = frozenset({"window_norm_blocks"})


@dataclass(frozen=True)
class Finding:
    """A kernel whose launch was executed and compared.

    Attributes:
        kernel: its readable name.
        case: the problem.
        error: largest difference of a tensor over its tolerance; infinite where only one of both
            is a number.
        instructions: that warps issued.
    """

    kernel: str
    case: str
    error: float
    instructions: int

    @property
    def agrees(self) -> bool:
        return self.error <= 1


def numbers(values: Array, dtype: str) -> tuple[Array, str]:
    """Return an array's numbers as float64, and the name of their type."""
    if values.dtype == np.uint16:
        if dtype == "bfloat16":
            return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64), dtype
        values = values.view(np.float16)
    return values.astype(np.float64), values.dtype.name


def difference(got: Array, expected: Array, dtype: str) -> float:
    """Return the largest difference over what is allowed."""
    (x, name), (y, _) = numbers(got, dtype), numbers(expected, dtype)
    if (np.isfinite(x) != np.isfinite(y)).any():
        return float("inf")
    finite = np.isfinite(y)
    if not finite.any():
        return 0.0
    largest = float(np.abs(y[finite]).max()) or 1.0
    return float(np.abs(x[finite] - y[finite]).max()) / largest / TOLERANCE[name]


class Comparison:
    """Stands for the emulator's extension; every call is made twice and compared.

    The caller's arrays have the emulator's results afterwards.
    """

    def __init__(self, emulator: Emulator, library: Library, arch: str) -> None:
        self.emulator, self.library, self.arch = emulator, library, arch
        self.case = ""
        self.findings: list[Finding] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.emulator.module, name)
        if name in HOST or not callable(function) or name.startswith("set_"):
            return function

        def call(dtype: str, **members: Any) -> None:
            self.findings += self.compare(name, dtype, members)

        return call

    def compare(self, function: str, dtype: str, members: dict[str, Any]) -> list[Finding]:
        """Run a host function's launches by both and return what was found, a row per kernel."""
        arrays = arrays_in(members)
        before = [array.copy() for array in arrays]
        self.emulator.module.set_approximate_errors(0.0)
        try:
            launches = self.emulator.launches(function, dtype, members, run=True)
        finally:
            self.emulator.module.set_approximate_errors(1.0)
        expected = [array.copy() for array in arrays]
        for array, old in zip(arrays, before, strict=True):
            array[...] = old
        runners = []
        for launch in launches:
            runner = Runner(self.library.kernel(launch.symbol, self.arch), launch, arrays)
            runner.run()
            runners.append(runner)
        error = max(
            (difference(a, e, dtype) for a, e in zip(arrays, expected, strict=True)), default=0.0
        )
        for array, new in zip(arrays, expected, strict=True):
            array[...] = new
        return [
            Finding(runner.kernel.name, self.case, error, int(runner.issued.sum()))
            for runner in runners
        ]


def problems(small: bool, drive: Any) -> Iterator[tuple[str, str, str, bool]]:
    """Yield dtype, geometry, operator and whether channels_last: every pass, in each dtype."""
    if small:
        yield "float32", "vectors", "ball", True
        yield "bfloat16", "vectors", "product", False
        return
    geometries = ("vectors", "groups", "odd", "tiles")
    for i, dtype in enumerate(DTYPES):
        for j, geometry in enumerate(geometries):
            for k, operator in enumerate(drive.OPERATORS):
                for last in (False, True):
                    turn = (j + 2 * i + last) % len(drive.OPERATORS)
                    if geometry == "vectors" or k == turn:
                        yield dtype, geometry, operator, last


def compare_passes(
    comparison: Comparison, drive: Any, small: bool, show: Callable[[str], None]
) -> None:
    """Run the passes of the strategy library on small problems."""
    for dtype, geometry, operator, last in problems(small, drive):
        comparison.case = f"{dtype} {geometry} {operator} {'last' if last else 'first'}"
        show(comparison.case)
        drive.run(comparison, dtype, last, drive.GEOMETRIES[geometry], drive.OPERATORS[operator])


def compare_fused(comparison: Comparison, show: Callable[[str], None]) -> None:
    """Run the kernels of the strategy fused on small problems."""
    for case in fused.cases():
        comparison.case = case.name
        show(case.name)
        members = case.operands(comparison.emulator.module)
        comparison.findings += comparison.compare(case.function, case.dtype, members)
