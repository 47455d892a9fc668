"""Compiles kernels for GPUs that need not be there, from the launches that the ops would do."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from calls import problem_with
from cuda_resources import find_cuobjdump
from torch import Tensor
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensorMode
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dcconv.call.saved import OUTPUT
from dcconv.operator.numerics import ANGLE_DELTA, EPS
from dcconv.operator.records import Operands
from dcconv.passes import backward, library, ops
from dcconv.passes.records import (
    DEPTHWISE,
    IMPLICIT_GEMM,
    NEEDS_RADIUS,
    NEEDS_WEIGHT,
    NEEDS_X,
    OWN_RULE,
)
from dcconv.triton import fused as triton_fused
from dcconv.triton import launch, ops_fused, ops_library
from dcconv.triton import tiles as gemm_tiles
from dcconv.triton.fused import NAMESPACE
from dcconv.triton.tiles import Gpu
from triton_checks.worker import serve

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Multiprocessors, bytes of shared memory, stages.
GPUS = {
    "sm_80": Gpu(108, 163 * 1024, 4),
    "sm_90": Gpu(132, 227 * 1024, 4),
    "gfx942": Gpu(304, 64 * 1024, 2),
}
# Images, channels, rows and columns, filters.
SIZES = (8, 64, 28, 128)
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


class Launches:
    """Stands in for ``wrap_triton``: keeps what would have been launched."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    def __call__(self, kernel: Any) -> Any:
        launches = self

        class Grid:
            def __getitem__(self, grid: Any) -> Callable[..., None]:
                def launch(*args: Any, **kwargs: Any) -> None:
                    launches.seen[kernel.__name__] = (kernel, args, kwargs)

                return launch

        return Grid()


@contextmanager
def recorded() -> Iterator[Launches]:
    real, launches = launch.wrap_triton, Launches()
    launch.wrap_triton = launches
    try:
        yield launches
    finally:
        launch.wrap_triton = real


def call(module: Any, name: str, *arguments: Any) -> Any:
    """Call an op's function with the op's arguments."""
    return getattr(module, name)(getattr(ops, name).record_of(*arguments))


def launches_of(
    dtype: torch.dtype,
    last: bool,
    operator: tuple[str, str, str],
    sums: int,
    window: int = 3,
    tile: int = OWN_RULE,
    sizes: Sequence[int] = SIZES,
) -> Launches:
    """Call every op for a 3x3 layer with everything wanted, on no device.

    Args:
        window: of the implicit GEMM and of the gradients of depthwise layers.
        tile: of the implicit GEMM.
        sizes: images, channels, rows and columns, filters.
    """
    magnitude, weighting, angular = operator
    layout = torch.channels_last if last else torch.contiguous_format

    def empty(*shape: int) -> Tensor:
        t = torch.empty(shape, dtype=dtype, device="meta")
        return t.to(memory_format=layout) if len(shape) == 4 else t

    def compute(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device="meta")

    n, c, h, o = sizes
    rows = min(132, n * h * h)
    x, weight, u = empty(n, c, h, h), empty(o, c, 3, 3), empty(n, o, h, h)
    geometry = ([1, 1], [1, 1, 1, 1], [1, 1], 1, "zeros")
    functions = (magnitude, angular, weighting, 1.0, 0.5, 2.0, ANGLE_DELTA[dtype])
    k = compute(o) if angular == "sigmoid" else None
    with recorded() as launches:
        a, _, mean = call(ops_library, "conv2d_norms", x, weight, *geometry, EPS, True, last)
        call(ops_library, "affine_relu", x, compute(c), compute(c), 1, last)
        norm = compute(n * h * h)
        call(
            ops_library,
            "conv2d_epilogue",
            u,
            a,
            norm,
            empty(o),
            compute(o),
            mean,
            k,
            [h, h],
            [3, 3],
            *geometry,
            *functions,
            EPS,
            False,
            last,
        )
        call(
            ops_fused,
            "conv2d_one_pass",
            x,
            empty(c, 1, 3, 3),
            compute(c),
            compute(n * c * h * h),
            empty(c),
            compute(c),
            mean,
            None if k is None else compute(c),
            *geometry[:3],
            c,
            "zeros",
            *functions,
            EPS,
            False,
            True,
            False,
            DEPTHWISE,
            OWN_RULE,
            last,
        )
        margin = [window // 2] * 4
        call(
            ops_fused,
            "conv2d_one_pass",
            x,
            empty(o, c, window, window),
            a,
            None if window == 1 else compute(n * h * h),
            empty(o),
            compute(o),
            mean,
            k,
            [1, 1],
            margin,
            *geometry[2:],
            *functions,
            EPS,
            False,
            True,
            False,
            IMPLICIT_GEMM,
            tile,
            last,
        )
        _, t, _ = call(
            ops_library,
            "conv2d_grad_dot",
            u,
            u,
            norm,
            a,
            compute(o),
            mean,
            k,
            1,
            *functions,
            "dot",
            True,
            sums,
            rows,
            last,
        )
        call(
            ops_library,
            "conv2d_grad_filters",
            compute(4, rows, o),
            weight,
            weight,
            a,
            compute(o),
            mean,
            k,
            norm.numel(),
            15,
            True,
            63,
        )
        call(
            ops_fused,
            "conv2d_one_pass_grad_input",
            u,
            empty(o, c, window, window),
            x,
            t,
            norm,
            compute(),
            [1, 1],
            margin,
            *geometry[2:],
            IMPLICIT_GEMM,
            tile,
            last,
        )
        direct = ([1, 1], margin, [1, 1], c, "zeros")
        call(
            ops_fused,
            "conv2d_one_pass_grad_input",
            x,
            empty(c, 1, window, window),
            x,
            compute(n * c * h * h),
            compute(n * c * h * h),
            compute(),
            *direct,
            DEPTHWISE,
            OWN_RULE,
            last,
        )
        call(ops_fused, "depthwise_grad_weight", x, x, [window, window], *direct, 98, last, last)
        call(
            ops_library,
            "conv2d_grad_input",
            x,
            x,
            t,
            norm,
            compute(),
            [3, 3],
            *geometry,
            False,
            last,
        )
    return launches


def names() -> list[str]:
    """Return the kernels that the ops launch."""
    return sorted(launches_of(torch.float16, True, ("tanh", "none", "cosine"), 1).seen)


def build(
    kernel: str,
    target: str,
    dtype: str,
    last: bool,
    operator: tuple[str, str, str],
    sums: int,
    window: int = 3,
    tile: int = OWN_RULE,
    tf32: bool = False,
    sizes: Sequence[int] = SIZES,
) -> dict[str, Any]:
    """Compile a launch as Triton would: ones are constants, multiples of 16 are known as such.

    Args:
        window, tile, tf32: of the implicit GEMM.
        sizes: as of ``launches_of``.

    Returns:
        The kind of the assembly, whether it multiplies matrices, the widest global load and store,
        in bits, the widest asynchronous copy, in bytes, bytes of stack and number of spilled
        registers.
    """
    gemm_tiles.NO_GPU = GPUS[target]
    launches = launches_of(getattr(torch, dtype), last, operator, sums, window, tile, sizes)
    function, args, constants = launches.seen[kernel]
    if tf32:
        constants["PRECISION"] = "tf32"
    signature, constexprs, attributes = {}, {}, {}
    for i, (name, value) in enumerate(zip(function.arg_names, args, strict=False)):
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            signature[name], constexprs[(i,)] = "constexpr", 1
        else:
            signature[name] = "i32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    for name, value in constants.items():
        if name in options:
            continue
        signature[name] = "constexpr"
        constexprs[(function.arg_names.index(name),)] = value
    signature = {name: signature[name] for name in function.arg_names}
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    if target == "gfx942":
        return of_amdgcn(compiled.asm["amdgcn"])
    return of_ptx(compiled.asm["ptx"], compiled.asm["cubin"])


def of_ptx(text: str, cubin: bytes) -> dict[str, Any]:
    def widest(access: str) -> int:
        found = re.findall(rf"{access}\.global\S*?(?:\.v(\d))?\.b(\d+)", text)
        return max((int(count or 1) * int(bits) for count, bits in found), default=0)

    copies = re.findall(r"cp\.async\.c[ga]\.\S+ \[[^\]]*\], \[[^\]]*\], (0x[0-9a-f]+)", text)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        usage = subprocess.run(
            [str(find_cuobjdump()), "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = re.search(r"STACK:(\d+).*LOCAL:(\d+)", usage)
    assert found is not None, usage
    return {
        "products": re.search(r"\b(?:mma\.sync|wgmma\.mma_async)", text) is not None,
        "kind": "ptx" if ".visible .entry" in text else "",
        "load": widest("ld"),
        "copies": max((int(size, 16) for size in copies), default=0),
        "store": widest("st"),
        "stack": int(found[1]),
        "spills": int(found[2]),
    }


def of_amdgcn(text: str) -> dict[str, Any]:
    def widest(access: str) -> int:
        found = re.findall(rf"(?:global|buffer)_{access}_dword(?:x(\d))?\b", text)
        return max((32 * int(count or 1) for count in found), default=0)

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        assert found is not None, key
        return int(found[1])

    return {
        "products": "v_mfma" in text,
        "kind": "amdgcn" if "-gfx942" in text and "s_endpgm" in text else "",
        "load": widest("load"),
        "store": widest("store"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count"),
    }


def left_out() -> list[str]:
    """Return what kernels and their functions name that Inductor does not write out with them.

    It writes functions and plain constants, and imports what is Triton's own.
    """
    found = set()
    launches = launches_of(torch.float16, True, ("tanh", "none", "cosine"), 1)
    functions = [kernel for kernel, _, _ in launches.seen.values()]
    seen = {function.__name__ for function in functions}
    for function in functions:
        for name in function.fn.__code__.co_names:
            value = function.fn.__globals__.get(name)
            if isinstance(value, JITFunction):
                if name not in seen:
                    seen.add(name)
                    functions.append(value)
            elif not isinstance(value, (int, str, tl.constexpr, type(None))):
                module = getattr(value, "__module__", getattr(value, "__name__", ""))
                if not str(module).startswith("triton"):
                    found.add(f"{function.__name__}: {name}")
    return sorted(found)


class NoGpu:
    """The driver of a GPU that is not there: enough for PyTorch to look into kernels."""

    def get_current_target(self) -> GPUTarget:
        return TARGETS["sm_90"]


def traced(strategy: str, depthwise: bool = False) -> dict[str, int]:
    """Count what a compiler sees of forward and backward on a GPU: kernels, not opaque ops."""
    triton.runtime.driver.set_active(NoGpu())
    launch.on_device = ops_fused.on_device = lambda t: nullcontext()
    backward._multiprocessors_of = lambda index: 132
    gemm_tiles._gpu = lambda index: GPUS["sm_90"]
    forward = partial(library.forward, namespace=NAMESPACE)
    gradients: tuple[Any, ...] = ()
    if strategy == "fused":
        forward = triton_fused.forward
        weight_gradient = triton_fused.weight_gradient if depthwise else None
        gradients = (triton_fused.input_gradient, weight_gradient)
    groups = 8 if depthwise else 1
    problem = problem_with(padding=(1, 1, 1, 1), groups=groups, norm="batch", weighting="linear")

    def step(x: Tensor, weight: Tensor, radius: Tensor, grad_y: Tensor) -> tuple[Any, ...]:
        operands = Operands(x, weight, None, radius, None, None)
        y, norm_map, mean, _, a = forward(operands, problem, OUTPUT)
        needs = NEEDS_X | NEEDS_WEIGHT | NEEDS_RADIUS
        grads = backward.backward(
            grad_y, y, norm_map, mean, a, operands, problem, OUTPUT, needs, NAMESPACE, *gradients
        )
        return y, *(grad for grad in grads if grad is not None)

    def half(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float16, device="cuda:0")

    with FakeTensorMode():
        radius = torch.empty(16, device="cuda:0")
        operands = (half(2, 8, 6, 6), half(16, 8 // groups, 3, 3), radius, half(2, 16, 6, 6))
        graph = aot_export_joint_simple(step, operands, trace_joint=False).graph
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_function")
    return {name: calls[name] for name in calls if "convolution" in name or "triton" in name}


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve({"names": names, "build": build, "traced": traced, "left_out": left_out})
