"""Generated Triton kernels as machine code of a GPU: compiled, executed in part, and simulated."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from bench.machine.compiled.launches import Step
from bench.machine.compiled.pretend import WARP, capability, pretending
from bench.machine.disassemble import Kernel
from bench.machine.execute.grid import Array, Launch
from bench.machine.execute.run import Runner
from bench.machine.gpus import Gpu
from bench.machine.library import Library
from bench.machine.rates import waves
from bench.machine.simulate import simulate

#: Rounds of blocks on a multiprocessor that are simulated; their difference is the steady state.
FEW, MANY = 2, 6

#: Pointers that Triton passes behind a kernel's arguments: scratch memory of kernels, of profilers.
SCRATCH = 2

#: From this share of the smaller one of x and y on, a tensor comes from DRAM; smaller ones are maps
#: and filters, in L2.
STREAM_SHARE = 0.5


@dataclass(frozen=True)
class Built:
    """A kernel with one of Inductor's configurations.

    Attributes:
        kernel: its machine code.
        grid: blocks in x and y.
        threads, shared: of a block.
        config: block sizes and warps, as Inductor names them.
    """

    kernel: Kernel
    grid: tuple[int, int]
    threads: int
    shared: int
    config: str


@dataclass(frozen=True)
class StepPrediction:
    """What is expected of a launch.

    Attributes:
        name: of the generated kernel.
        config: the fastest of Inductor's configurations.
        seconds: besides the launch.
        read, written: bytes of streams: what has the size of x or y.
        bandwidth: share of DRAM's rate.
    """

    name: str
    config: str
    seconds: float
    read: int
    written: int
    bandwidth: float


@cache
def _folder() -> Any:
    return tempfile.TemporaryDirectory(prefix="dcconv-machine-")


def _imported(step: Step) -> ModuleType:
    """Return a kernel's module; Triton reads the source of functions from files."""
    # It would look for a driver.
    source = step.source.replace("triton_helpers.set_driver_to_gpu()", "")
    name = "generated_" + hashlib.sha256(source.encode()).hexdigest()[:16]
    if name not in sys.modules:
        path = Path(_folder().name) / f"{name}.py"
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def built(step: Step, gpu: Gpu) -> Iterator[Built]:
    """Yield a launch's kernel with each of the configurations that Inductor would measure."""
    import triton
    from torch._inductor.runtime.triton_heuristics import GridExpr
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    major, minor = capability(gpu)
    target = GPUTarget("cuda", 10 * major + minor, WARP)
    with pretending(gpu):
        tuner = getattr(_imported(step), step.name)
        numbers = [n for n in tuner.fn.arg_names if n.endswith("numel")]
        sizes = dict(zip(numbers, [a for a in step.arguments if isinstance(a, int)], strict=True))
        for config in tuner.configs:
            meta = tuner._create_compile_meta(config)
            meta["cc"] = target.arch
            options = tuner._create_compile_options(config, meta)
            parts = (tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
            binary = triton.compile(ASTSource(*parts), target=target, options=options)
            grid = GridExpr.from_meta(tuner.inductor_meta, config)
            x, y, z = grid.eval_slow({**config.kwargs, **sizes})
            assert z == 1
            path = Path(_folder().name) / f"{hashlib.sha256(binary.asm['cubin']).hexdigest()}.cubin"
            path.write_bytes(binary.asm["cubin"])
            (kernel,) = Library(path).find("", gpu.arch)
            shared, said = int(binary.metadata.shared), f"{config.kwargs} {config.num_warps} warps"
            yield Built(kernel, (int(x), int(y)), WARP * config.num_warps, shared, said)


def _array(tensor: Tensor) -> Array:
    """Return a tensor's memory as it lies."""
    count = tensor.untyped_storage().nbytes()
    raw = (ctypes.c_uint8 * count).from_address(tensor.untyped_storage().data_ptr())
    return np.ctypeslib.as_array(raw)


def _parameters(step: Step, signature: dict[str, str]) -> bytes:
    """Return the bytes of a launch's arguments; constants are no parameters."""
    packed = b""
    for value, kind in zip(step.arguments, signature.values(), strict=False):
        if kind == "constexpr":
            continue
        size = 8 if isinstance(value, Tensor) else 4
        packed += b"\0" * (-len(packed) % size)
        packed += struct.pack("<Q", value.data_ptr()) if size == 8 else struct.pack("<i", value)
    packed += b"\0" * (-len(packed) % 8)
    return packed + b"\0" * 8 * SCRATCH


def traffic(
    step: Step, signature: dict[str, str], least: float
) -> tuple[int, int, list[tuple[int, int]]]:
    """Return the bytes read and written of tensors with at least so many, and where they are."""
    tensors = [
        (name, value)
        for name, value in zip(signature, step.arguments, strict=False)
        if isinstance(value, Tensor)
    ]
    sizes = [value.numel() * value.element_size() for _, value in tensors]
    read = written = 0
    ranges = []
    for (name, value), size in zip(tensors, sizes, strict=True):
        if size < least:
            continue
        read += size * name.startswith("in_")
        written += size * (name.startswith(("out_", "in_out_", "ws_")))
        ranges.append((value.data_ptr(), value.data_ptr() + size))
    return read, written, ranges


def simulated(
    one: Built,
    step: Step,
    signature: dict[str, str],
    gpu: Gpu,
    streams: Sequence[tuple[int, int]],
) -> tuple[float, float]:
    """Return a launch's cycles on a GPU, and the share of DRAM's rate in the steady state."""
    total = one.grid[0] * one.grid[1]
    warps = one.threads // WARP
    resident = gpu.resident(one.threads, one.kernel.registers, one.kernel.shared + one.shared)
    resident = min(resident, -(-total // gpu.sms))
    executed = min(FEW * resident, total)
    # Of the middle: first and last blocks may have less to do.
    first = (total - executed) // 2
    blocks = [((first + i) % one.grid[0], (first + i) // one.grid[0]) for i in range(executed)]
    launch = Launch(
        step.name,
        one.kernel.symbol,
        one.grid,
        one.threads,
        one.shared,
        _parameters(step, signature),
    )
    arrays = {a.ctypes.data: a for a in map(_array, _tensors(step))}
    runner = Runner(one.kernel, launch, arrays.values(), blocks=blocks, traced=True)
    runner.run()
    assert runner.trace is not None
    traces = runner.trace.of_warps()

    def run(held: int, number: int) -> Any:
        return simulate(one.kernel, traces, gpu, warps, held, number, streams)

    if total <= gpu.sms * resident:
        alone = run(resident, resident)
        return float(alone.cycles), alone.dram_bytes / alone.cycles / gpu.bytes_per_cycle
    few, many = run(resident, FEW * resident), run(resident, MANY * resident)
    cycles = many.cycles - few.cycles
    share = (many.dram_bytes - few.dram_bytes) / cycles / gpu.bytes_per_cycle
    block = cycles / (MANY - FEW) / resident
    alone = max(1.0, run(1, 1).cycles / block)
    return block * waves(total, gpu.sms, resident, min(alone, resident)), share


def _tensors(step: Step) -> list[Tensor]:
    return [value for value in step.arguments if isinstance(value, Tensor)]


def predicted(step: Step, gpu: Gpu, least: float) -> StepPrediction:
    """Predict a launch with the configuration that is fastest.

    Args:
        step: the launch.
        gpu: which.
        least: bytes of a tensor that comes from DRAM.
    """
    best: StepPrediction | None = None
    for one in built(step, gpu):
        signature = getattr(_imported(step), step.name).triton_meta["signature"]
        read, written, streams = traffic(step, signature, least)
        cycles, share = simulated(one, step, signature, gpu, streams)
        found = StepPrediction(step.name, one.config, cycles / gpu.clock, read, written, share)
        if best is None or found.seconds < best.seconds:
            best = found
    assert best is not None
    return best
