"""Run every CUDA pass of a compiled extension on small problems and store what comes out.

    python drive.py EXTENSION RESULTS.npz --seed 1 --dtypes float32 bfloat16

Needs numpy alone, so that it runs under every sanitizer. All outputs are filled with NaN before a
pass writes them. The problems: vectors of 16 bytes and single elements, both layouts, groups,
every padding mode, filters in more than one chunk, more tiles than blocks.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

ZEROS, REFLECT, REPLICATE, CIRCULAR = range(4)
OUTPUT, DOT = range(2)
PLAIN, WITH_MEAN, OVER_NORM = range(3)

STORAGE = {
    "float64": np.float64,
    "float32": np.float32,
    "bfloat16": np.uint16,
    "float16": np.float16,
}


class Geometry(NamedTuple):
    """x [n, c, h, w], o filters, one kernel size, stride, dilation and padding for both axes."""

    n: int
    c: int
    h: int
    w: int
    o: int
    kernel: int = 1
    stride: int = 1
    before: int = 0
    after: int = 0
    dilation: int = 1
    groups: int = 1
    mode: int = ZEROS


class Operator(NamedTuple):
    """Names in the lists of csrc/functions.h, and which operands and sums there are."""

    magnitude: str
    angular: str
    weighting: str
    per_filter: bool
    bias: bool
    sums: int


GEOMETRIES = {
    "vectors": Geometry(2, 16, 5, 6, 24, 3, before=1, after=1),
    "groups": Geometry(1, 12, 4, 8, 20, 3, 2, 1, 1, groups=2),
    "odd": Geometry(1, 5, 5, 5, 7, 3, before=2, after=1, mode=REFLECT),
    "replicate": Geometry(1, 8, 4, 4, 8, 3, 1, 1, 2, mode=REPLICATE),
    "circular": Geometry(2, 6, 4, 4, 6, 2, 1, 2, 1, 2, groups=6, mode=CIRCULAR),
    "tiles": Geometry(1, 8, 20, 16, 64),
    "filter-chunks": Geometry(1, 24, 2, 2, 2088, groups=3),
    "channel-chunks": Geometry(1, 2088, 2, 2, 24, groups=3),
    # More turns of a block than a ring has slots and a tile has turns; several tiles of planes.
    "long-rows": Geometry(1, 512, 10, 20, 8, 3, before=1, after=1),
    "planes": Geometry(2, 8, 40, 26, 8, 5, before=2, after=2),
}

# ball x cosine with a radius per filter; tanh of a b / rho x sigmoid with everything;
# log x square cosine times a; segmented x power with one radius. The last two are functions that
# the compiler knows.
OPERATORS = {
    "ball": Operator("ball", "cosine", "none", True, False, 1),
    "product": Operator("tanh", "sigmoid", "product", True, True, 15),
    "log": Operator("log", "square_cosine", "linear", False, False, 2),
    "segmented": Operator("segmented", "power", "none", False, False, 0),
    "tanh": Operator("tanh", "cosine", "none", True, True, 1),
    "one-radius": Operator("ball", "square_cosine", "none", False, False, 1),
}

# With --in-turn these alone meet every operator: accesses of 16 bytes, and of single elements. The
# others take the operators in turn, so that each comes up in both layouts and every dtype.
CROSSED = ("vectors", "odd")

# Weightings that are magnitudes of their own, in their order.
WITHIN = ("product", "separate")


def magnitude_index(m: Any, op: Operator) -> int:
    """Return the place of a magnitude in both lists of the extension, one after the other."""
    if op.weighting in WITHIN:
        assert [op.magnitude] * len(WITHIN) == m.weighted_magnitudes
        return len(m.magnitudes) + WITHIN.index(op.weighting)
    return int(m.magnitudes.index(op.magnitude))


def outputs(size: int, g: Geometry) -> int:
    return (size + g.before + g.after - g.dilation * (g.kernel - 1) - 1) // g.stride + 1


def axis(size: int, g: Geometry) -> dict[str, int]:
    return {
        "input": size,
        "output": outputs(size, g),
        "kernel": g.kernel,
        "stride": g.stride,
        "dilation": g.dilation,
        "before": g.before,
        "after": g.after,
        "mode": g.mode,
    }


class Problem:
    """The operands of one run, and NaN-filled places for results."""

    def __init__(self, dtype: str, seed: int) -> None:
        self.dtype = dtype
        self.compute = np.float64 if dtype == "float64" else np.float32
        self.random = np.random.default_rng(seed)

    def storage(self, count: int, scale: float = 1.0) -> Array:
        values = (self.random.standard_normal(count) * scale).astype(np.float32)
        if self.dtype == "bfloat16":
            return (values.view(np.uint32) >> 16).astype(np.uint16)
        return values.astype(STORAGE[self.dtype])

    def positive(self, count: int) -> Array:
        return (0.5 + self.random.random(count)).astype(self.compute)

    def place(self, count: int, kind: str = "compute") -> Array:
        types = {"compute": self.compute, "storage": STORAGE[self.dtype], "double": np.float64}
        place = np.empty(count, types[kind])
        place.view(np.uint8)[:] = 0xFF
        return place


def run(m: Any, dtype: str, channels_last: bool, g: Geometry, op: Operator) -> dict[str, Array]:
    """Run the passes one after the other, as library does, on random convolutions."""
    problem = Problem(dtype, 7)
    p, q = outputs(g.h, g), outputs(g.w, g)
    inputs, pixels = g.n * g.h * g.w, p * q
    positions = g.n * pixels
    size = g.c // g.groups * g.kernel**2
    window = {"rows": axis(g.h, g), "columns": axis(g.w, g)}
    shared = {"groups": g.groups, "channels_last": channels_last}
    scale = size**-0.5

    x, weight = problem.storage(inputs * g.c), problem.storage(g.o * size, scale)
    sums = problem.place(inputs * g.groups)
    m.pixel_sumsq(dtype, n=g.n, pixels=g.h * g.w, c=g.c, x=x, sums=sums, **shared)

    affine = problem.place(inputs * g.c, "storage")
    affine_sums, squares = (problem.place(inputs * g.groups) for _ in range(2))
    pixels_of_x = {"n": g.n, "pixels": g.h * g.w, "c": g.c, **shared}
    constants = {"scale": problem.positive(g.c), "shift": problem.positive(g.c) - 1}
    m.affine_relu(dtype, x=x, y=affine, sums=affine_sums, **constants, **pixels_of_x)
    m.pixel_sumsq(dtype, x=affine, sums=squares, **pixels_of_x)

    norm = {
        "n": g.n,
        "window": window,
        "eps": 1e-4,
        "sums": sums,
        "b": problem.place(positions * g.groups),
        **shared,
    }
    blocks = m.window_norm_blocks(block_sums=None, **norm)
    block_sums = problem.place(blocks, "double")
    m.window_norm(dtype, block_sums=block_sums, **norm)

    a, scaled, mean = problem.place(g.o), problem.place(g.o * size, "storage"), problem.place(1)
    m.filter_norm(
        dtype,
        o=g.o,
        size=size,
        weight=weight,
        a=a,
        scaled=scaled,
        eps=1e-4,
        alpha=1.5,
        divide=True,
        block_sums=block_sums,
        blocks=blocks,
        map_count=positions * g.groups,
        mean=mean,
    )

    operator = {
        "magnitude": magnitude_index(m, op),
        "angular": m.angulars.index(op.angular),
        "times_a": op.weighting == "linear",
        "alpha": 1.25,
        "beta": 0.5,
        "power": 2.5,
        "delta": 1e-6,
    }
    count = g.o if op.per_filter else 1
    filters = {
        "a": a,
        "radius": problem.positive(count),
        "radius_stride": int(op.per_filter),
        "mean": mean,
        "k": problem.positive(count),
        "k_stride": int(op.per_filter),
    }
    u, y = problem.storage(positions * g.o), problem.place(positions * g.o, "storage")
    b = norm["b"]
    epilogue = {
        "positions": positions,
        "pixels": positions // g.n,
        "o": g.o,
        "op": operator,
        "filters": filters,
        "norm": b,
        "bias": problem.storage(g.o) if op.bias else None,
        **shared,
    }
    m.epilogue(dtype, u=u, y=y, **epilogue)
    in_place = u.copy()
    m.epilogue(dtype, u=in_place, y=in_place, **epilogue)

    results = {"sums": sums, "b": b, "a": a, "scaled": scaled, "mean": mean}
    results |= {"affine": affine, "affine_sums": affine_sums, "squares": squares}
    results |= {"y": y, "in_place": in_place}
    kinds = op.sums.bit_count()
    grad_y = problem.storage(positions * g.o)
    for rows in (1, 3):
        grad_u, t = problem.place(positions * g.o, "storage"), problem.place(positions * g.groups)
        parts = problem.place(kinds * rows * g.o)
        m.grad_dot(
            dtype,
            positions=positions,
            pixels=pixels,
            o=g.o,
            op=operator,
            kept_is=DOT,
            filters=filters,
            grad_y=grad_y,
            kept=u,
            norm=b,
            grad_u=grad_u,
            t=t,
            sums=op.sums,
            parts=parts if kinds else None,
            rows=rows,
            **shared,
        )
        results |= {f"grad_u {rows}": grad_u, f"t {rows}": t, f"parts {rows}": parts}

    totals = problem.place(kinds * g.o, "double")
    if kinds:
        m.column_sums(dtype, parts=parts, totals=totals, kinds=kinds, rows=3, o=g.o)
    sigma, grad_mean = problem.place(1), problem.place(1)
    grad_radius, grad_k = problem.place(count), problem.place(count)
    grad_bias, grad_weight = (problem.place(n, "storage") for n in (g.o, g.o * size))
    m.filter_grad(
        dtype,
        o=g.o,
        size=size,
        weight=weight,
        library_grad=problem.storage(g.o * size),
        a=a,
        grad_weight=grad_weight,
        alpha=1.0,
        divide=False,
        project=True,
        totals=totals if kinds else None,
        sums=op.sums,
        filters=filters,
        map_count=positions * g.groups,
        grad_bias=grad_bias if op.sums & 8 else None,
        grad_radius=grad_radius if op.sums & 1 else None,
        grad_mean=grad_mean if op.sums & 1 else None,
        grad_k=grad_k if op.sums & 4 else None,
        sigma=sigma if op.sums & 1 else None,
    )
    results |= {"totals": totals, "grad_weight": grad_weight}
    wanted = {"grad_bias": grad_bias} if op.sums & 8 else {}
    wanted |= {"grad_k": grad_k} if op.sums & 4 else {}
    if op.sums & 1:
        wanted |= {"grad_radius": grad_radius, "grad_mean": grad_mean, "sigma": sigma}
    results |= wanted

    padded = (g.h + g.before + g.after) * (g.w + g.before + g.after)
    for name, tap, fold in (("plain", PLAIN, True), ("mean", WITH_MEAN, False)):
        if tap == WITH_MEAN and not op.sums & 1:
            continue
        library_grad = problem.storage(g.n * g.c * (padded if fold else g.h * g.w))
        grad_x = problem.place(inputs * g.c, "storage") if fold else library_grad
        m.grad_input(
            dtype,
            n=g.n,
            c=g.c,
            window=window,
            padded=fold,
            library_grad=library_grad,
            x=x,
            tap=tap,
            t=t,
            norm=b,
            sigma=sigma,
            grad_x=grad_x,
            **shared,
        )
        results[f"grad_x {name}"] = grad_x
    grad_x = problem.place(inputs * g.c, "storage")
    m.grad_input(
        dtype,
        n=g.n,
        c=g.c,
        window=window,
        padded=False,
        library_grad=None,
        x=x,
        tap=OVER_NORM,
        t=t,
        norm=b,
        sigma=None,
        grad_x=grad_x,
        **shared,
    )
    results["grad_x over norm"] = grad_x
    return results


def problems(options: argparse.Namespace) -> Iterator[tuple[str, str, str, bool]]:
    """Yield dtype, geometry, operator and whether channels_last."""
    for i, dtype in enumerate(options.dtypes):
        for j, geometry in enumerate(options.geometries):
            for k, operator in enumerate(options.operators):
                for last in (False, True):
                    turn = (j + 2 * i + last) % len(options.operators)
                    if not options.in_turn or geometry in CROSSED or k == turn:
                        yield dtype, geometry, operator, last


def load(path: Path) -> Any:
    """Import an extension from its file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Shared memory of a block that every GPU from sm_80 on gives.
MOST_SHARED = 99 << 10

OBSERVER = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    *(ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t),
    *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t),
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("extension", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=STORAGE)
    parser.add_argument("--geometries", nargs="+", default=list(GEOMETRIES), choices=GEOMETRIES)
    parser.add_argument("--operators", nargs="+", default=list(OPERATORS), choices=OPERATORS)
    parser.add_argument("--in-turn", action="store_true", help="fewer operators per geometry")
    parser.add_argument("--blocks", type=int, help="blocks at a time, where threads are real")
    options = parser.parse_args()
    m = load(options.extension)
    m.set_seed(options.seed)
    if options.blocks is not None:
        m.set_concurrent_blocks(options.blocks)
    found = {}
    too_much: list[str] = []

    def observe(name: bytes, x: int, y: int, threads: int, shared: int, *_: int) -> int:
        if shared > MOST_SHARED:
            too_much.append(f"{name.decode()} takes {shared} bytes of shared memory")
        return 1

    observer = OBSERVER(observe)
    m.set_observer(ctypes.cast(observer, ctypes.c_void_p).value)
    for dtype, geometry, operator, channels_last in problems(options):
        case = f"{dtype} {geometry} {operator} {'last' if channels_last else 'first'}"
        print(case, flush=True)
        results = run(m, dtype, channels_last, GEOMETRIES[geometry], OPERATORS[operator])
        found |= {f"{case}: {name}": array for name, array in results.items()}
        assert not too_much, f"{case}: {too_much[0]}, some GPUs have {MOST_SHARED}"
    np.savez(options.results, **found)


if __name__ == "__main__":
    main()
