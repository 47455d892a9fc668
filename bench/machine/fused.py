"""Operands of the kernels of the strategy fused: implicit GEMM, depthwise layers, stems."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from bench.machine.execute.grid import Array
from bench.machine.layers import TAP_PLAIN, TAP_WITH_MEAN, Layer, Operands, Operator, aligned

#: Filters and pixels of a tile of the implicit GEMM, by number: csrc/cuda/fused/implicit_gemm.
TILES = {0: (128, 128), 1: (128, 64), 2: (64, 64)}

#: Partial sums of the depthwise gradient of the weight.
ROWS = 3

GEMM, GEMM_GRADIENT = "implicit_gemm", "implicit_gemm_grad_input"


class Case(NamedTuple):
    """A problem of a fused kernel."""

    function: str
    dtype: str
    channels_last: bool
    n: int
    c: int
    size: int
    o: int
    kernel: int
    stride: int = 1
    groups: int = 1
    tile: int = -1
    given: bool = True  # norms, instead of those that the kernel finds by itself
    operator: Operator = Operator("tanh", "cosine", "filter")

    @property
    def name(self) -> str:
        layout = "last" if self.channels_last else "first"
        sizes = f"{self.c}-{self.o} {self.size}x{self.size} {self.kernel}x{self.kernel}"
        return f"{self.dtype} {sizes} stride {self.stride} tile {self.tile} {layout}"

    def operands(self, module: Any) -> dict[str, Any]:
        """Return the members of the kernel's parameters, outputs filled with NaN."""
        return _Members(module, self).members()


class _Members:
    """Sizes of a case and arrays by name."""

    def __init__(self, module: Any, case: Case) -> None:
        self.case = case
        self.padding = case.kernel // 2
        reach = case.size + 2 * self.padding - case.kernel
        self.output = reach // case.stride + 1
        self.positions = case.n * self.output**2
        self.inputs = case.n * case.size**2
        layer = Layer(case.n, case.c, case.size, case.o, case.kernel)
        self.random = Operands(module, layer, case.dtype, case.channels_last, case.operator)

    def values(self, count: int, scale: float = 1.0) -> Array:
        return self.random.values(count, scale)

    def place(self, like: Array, count: int) -> Array:
        return aligned(count, like.dtype)

    def members(self) -> dict[str, Any]:
        case = self.case
        axis = {
            **{"input": case.size, "output": self.output, "kernel": case.kernel},
            **{"stride": case.stride, "dilation": 1, "before": self.padding},
            **{"after": self.padding, "mode": 0},
        }
        sizes = {
            **{"n": case.n, "c": case.c, "o": case.o, "window": {"rows": axis, "columns": axis}},
            "channels_last": case.channels_last,
        }
        each = case.c // case.groups * case.kernel**2
        x = self.values(self.inputs * case.c)
        if case.function == "depthwise_grad_weight":
            taps = case.kernel**2 * case.o
            return {
                **sizes,
                **{"grad_u": self.values(self.positions * case.o), "x": x, "rows": ROWS},
                "parts": self.place(np.zeros(0, np.float32), ROWS * taps),
                "grad_weight": self.place(x, taps),
            }
        weight = self.values(case.o * each, float(each) ** -0.5)
        maps = self.random.positive(self.positions * case.groups, float(each) ** 0.5)
        common = {**sizes, "groups": case.groups, "weight": weight, "x": x}
        if case.function.endswith("grad_input"):
            mean = case.operator.mean
            grad = {"grad_u": self.values(self.positions * case.o), "t": maps}
            of_norms: dict[str, Any] = {
                **{"tap": TAP_WITH_MEAN if mean else TAP_PLAIN, "norm": maps if mean else None},
                "sigma": self.random.positive(1) if mean else None,
            }
            places = {**of_norms, "grad_x": self.place(x, x.size)}
            tile = {"tile": case.tile}
            return {**common, **grad, **places, **tile}
        outputs = self.positions * case.o
        norm = None if case.given else self.place(maps, maps.size)
        return {
            **common,
            **{"op": self.random.functions(), "eps": 1e-4, "filters": self.random.filters()},
            **{"bias": None, "map": maps if case.given else None, "map_is_norm": case.given},
            **{"y": self.place(x, outputs), "dot": None, "norm": norm, "tile": case.tile},
        }


def cases() -> Iterator[Case]:
    """Yield small problems that reach every fused kernel of the three dtypes."""
    for dtype in ("bfloat16", "float16"):
        for tile in TILES:
            yield Case(GEMM, dtype, True, 1, 64, 12, 128, 1, tile=tile, given=False)
            yield Case(GEMM, dtype, True, 1, 40, 9, 72, 3, tile=tile)
            yield Case(GEMM_GRADIENT, dtype, True, 1, 40, 9, 72, 3, tile=tile)
            yield Case(GEMM_GRADIENT, dtype, True, 1, 64, 8, 64, 1, tile=tile)
        yield Case(GEMM, dtype, True, 1, 64, 8, 64, 3, groups=2)
    for dtype in ("float32", "bfloat16", "float16"):
        for last in (True, False):
            # Planes have one instance for every window but 3x3.
            for kernel in (3, 5, 7, 2) if last else (3, 2):
                for function in ("depthwise", "depthwise_grad_input", "depthwise_grad_weight"):
                    stride = 1 if kernel != 2 else 2
                    yield Case(function, dtype, last, 1, 32, 9, 32, kernel, stride, groups=32)
            yield Case("depthwise", dtype, last, 1, 6, 9, 9, 3, groups=3)
            yield Case("stem", dtype, last, 1, 3, 16, 64, 7, stride=2, given=False)
            yield Case("stem", dtype, last, 1, 3, 8, 6, 3)
