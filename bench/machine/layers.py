"""A layer's launches for one multiprocessor: operands of the passes, and which are streams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bench.machine.execute.grid import Array

#: Storage by dtype; bfloat16 as its bits.
STORAGE = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}

LAYOUTS = {"channels_last": True, "contiguous": False}

#: How a window's mode of padding is written: zeros.
ZEROS = 0

#: dcconv::Kept, dcconv::cuda::Tap and Sums of csrc/cuda/kernels.h.
KEPT_OUTPUT, TAP_PLAIN, TAP_WITH_MEAN, SUM_RHO = 0, 0, 1, 1


#: Bytes that addresses of tensors are multiples of, as a GPU's allocator gives them: rows begin
#: where sectors and lines do.
ALIGNMENT = 256


def aligned(count: int, kind: Any, filler: int = 0xFF) -> Array:
    """Return an array at an aligned address, of bytes that are NaN in every floating type."""
    size = count * np.dtype(kind).itemsize
    memory = np.full(size + ALIGNMENT, filler, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT
    return memory[begin : begin + size].view(kind)


def placed(values: Array) -> Array:
    """Return a copy at an aligned address."""
    place = aligned(values.size, values.dtype)
    place[...] = values.reshape(-1)
    return place


class Operator(NamedTuple):
    """An operator of the predictions: names of its functions, its radius, its unit of radius."""

    magnitude: str
    angular: str
    radius: str  # "filter", "scalar" or "none"
    mean: bool = False


#: ``default`` is what DecoupledConv2d does unless it is told otherwise.
OPERATORS = {
    "default": Operator("tanh", "cosine", "filter", mean=True),
    "tanh, radius per filter": Operator("tanh", "cosine", "filter"),
    "tanh, one radius": Operator("tanh", "cosine", "scalar"),
    "ball x square_cosine": Operator("ball", "square_cosine", "scalar"),
    "linear x square_cosine": Operator("linear", "square_cosine", "none"),
    "sphere x cosine": Operator("sphere", "cosine", "none"),
}


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer: square images, windows with padding that keeps sizes at stride 1."""

    n: int
    c: int
    size: int
    o: int
    kernel: int
    stride: int = 1

    @property
    def output(self) -> int:
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def positions(self) -> int:
        return self.n * self.output**2

    @property
    def inputs(self) -> int:
        return self.n * self.size**2

    def window(self) -> dict[str, dict[str, int]]:
        axis = {
            **{"input": self.size, "output": self.output, "kernel": self.kernel},
            **{"stride": self.stride, "dilation": 1},
            **{"before": self.kernel // 2, "after": self.kernel // 2},
            "mode": ZEROS,
        }
        return {"rows": axis, "columns": axis}


class Call(NamedTuple):
    """A call of a host function: its name, its arguments, and those that DRAM brings and takes."""

    function: str
    members: dict[str, Any]
    streams: tuple[str, ...]

    def ranges(self) -> list[tuple[int, int]]:
        """Return the addresses of the streams."""
        arrays = [self.members[name] for name in self.streams]
        return [(a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays]


class Operands:
    """Random operands of a layer and operator, by the names of csrc/cuda/kernels.h."""

    def __init__(
        self, module: Any, layer: Layer, dtype: str, channels_last: bool, operator: Operator
    ) -> None:
        self.module, self.layer, self.operator = module, layer, operator
        self.dtype, self.last = dtype, channels_last
        self.random = np.random.default_rng(0)

    def values(self, count: int, scale: float = 1.0) -> Array:
        values = (self.random.standard_normal(count) * scale).astype(np.float32)
        if self.dtype == "bfloat16":
            return placed((values.view(np.uint32) >> 16).astype(np.uint16))
        return placed(values.astype(STORAGE[self.dtype]))

    def positive(self, count: int, low: float = 0.5) -> Array:
        return placed((low + self.random.random(count)).astype(np.float32))

    def filters(self) -> dict[str, Any]:
        """Radii near the norms of x, so that every function is where it bends."""
        operator, count = self.operator, self.layer.o
        norm = float(self.layer.c) ** 0.5 * self.layer.kernel
        unit = 1.0 if operator.mean else norm
        per_filter = operator.radius == "filter"
        radius = self.positive(count if per_filter else 1) * np.float32(unit)
        return {
            "a": self.positive(count),
            "radius": None if operator.radius == "none" else radius,
            "radius_stride": int(per_filter),
            "mean": placed(np.full(1, norm, np.float32)) if operator.mean else None,
            "k": None,
            "k_stride": 0,
        }

    def functions(self) -> dict[str, Any]:
        return {
            "magnitude": int(self.module.magnitudes.index(self.operator.magnitude)),
            "angular": int(self.module.angulars.index(self.operator.angular)),
            "times_a": False,
            **{"alpha": 1.0, "beta": 0.0, "power": 1.0, "delta": 1e-3},
        }

    def calls(self, rows: int) -> dict[str, Call]:
        """Return the passes that move tensors, by name.

        Args:
            rows: blocks of grad_dot, which its caller chooses.
        """
        layer, o = self.layer, self.layer.o
        positions = layer.positions
        shared: Mapping[str, Any] = {"groups": 1, "channels_last": self.last}
        norm = self.positive(positions, float(layer.c) ** 0.5 * layer.kernel)
        sums = self.positive(layer.inputs, float(layer.c))
        u, x = self.values(positions * o), self.values(layer.inputs * layer.c)
        n, window = layer.n, layer.window()
        filters, functions = self.filters(), self.functions()
        has_radius = filters["radius"] is not None
        return {
            "pixel_sumsq": Call(
                "pixel_sumsq",
                {
                    **{"n": n, "pixels": layer.size**2, "c": layer.c, "x": x},
                    **{"sums": placed(sums), **shared},
                },
                ("x",),
            ),
            "affine_relu": Call(
                "affine_relu",
                {
                    **{"n": n, "pixels": layer.size**2, "c": layer.c, "x": x},
                    **{"scale": self.positive(layer.c), "shift": self.positive(layer.c, -0.5)},
                    **{"y": aligned(x.size, x.dtype), "sums": placed(sums), **shared},
                },
                ("x", "y"),
            ),
            "epilogue": Call(
                "epilogue",
                {
                    **{"positions": positions, "pixels": layer.output**2, "o": o, "op": functions},
                    **{"filters": filters, "bias": None, "u": u, "y": aligned(u.size, u.dtype)},
                    **{"norm": norm, **shared},
                },
                ("u", "y"),
            ),
            "grad_dot": Call(
                "grad_dot",
                {
                    **{"positions": positions, "pixels": layer.output**2, "o": o, "op": functions},
                    **{"kept_is": KEPT_OUTPUT, "filters": filters, "norm": norm},
                    **{"grad_y": self.values(positions * o)},
                    # y of a cosine within its magnitude.
                    **{"kept": self.values(positions * o, 0.1)},
                    **{"grad_u": aligned(u.size, u.dtype), "t": aligned(norm.size, norm.dtype)},
                    **{"sums": SUM_RHO if has_radius else 0, "rows": rows},
                    "parts": aligned(rows * o, np.float32) if has_radius else None,
                    **shared,
                },
                ("grad_y", "kept", "grad_u"),
            ),
            "grad_input": Call(
                "grad_input",
                {
                    **{"n": n, "c": layer.c, "window": window, "padded": False, "x": x},
                    **{"library_grad": self.values(layer.inputs * layer.c), "t": placed(norm)},
                    "tap": TAP_WITH_MEAN if self.operator.mean else TAP_PLAIN,
                    "norm": norm if self.operator.mean else None,
                    "sigma": self.positive(1) if self.operator.mean else None,
                    **{"grad_x": aligned(x.size, x.dtype), **shared},
                },
                ("x", "library_grad", "grad_x"),
            ),
        }
