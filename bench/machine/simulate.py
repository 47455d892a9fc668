"""Executed instructions as cycles of one multiprocessor.

The model is C++ (model/multiprocessor.cpp), compiled when it is first needed and kept under
build/machine: a launch is some 10^5 cycles of four schedulers, of which Python would do 10^4 a
second.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine.disassemble import Instruction, Kernel
from bench.machine.execute.grid import Array
from bench.machine.gpus import Gpu
from bench.machine.pipes import PIPES, costs_of, pipe_of
from dcconv.operator.checks import value_error

MODEL = Path(__file__).parent / "model"
CACHE = Path(__file__).resolve().parents[2] / "build/machine"

#: What an instruction is to the model, in the order of model/interface.h.
KINDS: dict[str, tuple[str, ...]] = {
    "load": ("LDG", "LD", "LDL"),
    "store": ("STG", "ST", "STL"),
    "shared": ("LDS", "STS", "LDSM", "STSM", "SHFL", "MOVM"),
    "constant": ("LDC", "S2R", "S2UR"),
    "copy": ("LDGSTS",),
    "commit": ("LDGDEPBAR",),
    "await": ("DEPBAR",),
    "barrier": ("BAR",),
}
_KIND = {name: at for at, names in enumerate(KINDS.values(), 1) for name in names}

#: Cycles that a taken branch adds; assumed.
TAKEN = 4.0

_ITEM = np.dtype(
    [("place", "<i4"), ("sectors", "<i4"), ("amount", "<i4"), ("address", "<i8")], align=True
)
_INSTRUCTION = np.dtype(
    [(name, "<i4") for name in ["pipe", "kind", "stall", "yields", "w", "r", "waits", "n"]]
)


class _Config(ctypes.Structure):
    _fields_ = (
        ("cycles", ctypes.c_double * len(PIPES)),
        *((name, ctypes.c_double) for name in ("dram_bytes", "l2_bytes")),
        *((name, ctypes.c_double) for name in ("l1", "l2", "dram", "shared", "taken")),
        *((name, ctypes.c_int32) for name in ("halves", "warps", "resident", "distinct")),
        *((name, ctypes.c_int64) for name in ("blocks", "streams")),
    )


class _Result(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("cycles", "issued", "dram_bytes", "l2_bytes")),
        ("in_flight", ctypes.c_double),
        ("waiting", ctypes.c_double * 6),
    )


@dataclass(frozen=True)
class Simulated:
    """What one multiprocessor does with some blocks.

    Attributes:
        cycles: until the last block has ended.
        issued: instructions of warps.
        dram_bytes, l2_bytes: moved.
        in_flight: bytes of loads from DRAM that are under way, mean over the cycles.
        waiting: shares of the schedulers' cycles: issued, scoreboards, stall counts, busy pipes,
            barriers, no warp.
    """

    cycles: int
    issued: int
    dram_bytes: int
    l2_bytes: int
    in_flight: float
    waiting: tuple[float, ...]


@cache
def _model() -> Any:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise value_error("g++", "be installed to compile the model", "none")
    sources = sorted(MODEL.iterdir())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    library = CACHE / f"multiprocessor-{digest}.so"
    if not library.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}")
        flags = ["-O2", "-std=c++17", "-shared", "-fPIC"]
        source = MODEL / "multiprocessor.cpp"
        subprocess.run([compiler, *flags, str(source), "-o", str(part)], check=True)
        part.replace(library)
    return ctypes.CDLL(str(library)).simulate


def _row(instruction: Instruction) -> tuple[int, ...]:
    groups = int(instruction.operands[1], 16) if instruction.name == "DEPBAR" else 0
    return (
        PIPES.index(pipe_of(instruction)),
        _KIND.get(instruction.name, 0),
        instruction.stall,
        instruction.yields,
        instruction.written,
        instruction.read,
        instruction.waits,
        groups,
    )


def simulate(
    kernel: Kernel,
    traces: Sequence[Array],
    gpu: Gpu,
    warps: int,
    resident: int,
    blocks: int,
    streams: Sequence[tuple[int, int]] = (),
    dram_latency: int | None = None,
) -> Simulated:
    """Run blocks on a multiprocessor.

    Args:
        kernel: whose code was executed.
        traces: what each warp executed, block after block.
        gpu: its figures.
        warps: of a block.
        resident: blocks that run at a time.
        blocks: that run in all; those of the traces take turns.
        streams: begin and end of tensors that come from DRAM and go there.
        dram_latency: cycles; the GPU's by default.
    """
    costs = costs_of(kernel.arch)
    cycles = [*(costs.cycles.get(pipe, 1.0) for pipe in PIPES)]
    cycles[PIPES.index("TENSOR")] = gpu.tensor_cycles
    l1, l2, dram, shared = map(float, gpu.latency)
    config = _Config(
        (ctypes.c_double * len(PIPES))(*cycles),
        *(gpu.bytes_per_cycle, gpu.l2_bytes_per_cycle),
        *(l1, l2, float(dram_latency or dram), shared, TAKEN),
        *(int(costs.halves), warps, min(resident, blocks), len(traces) // warps),
        *(blocks, len(streams)),
    )
    code = np.array([_row(instruction) for instruction in kernel.code], _INSTRUCTION)
    items = np.concatenate([trace.astype(_ITEM) for trace in traces])
    lengths = np.array([len(trace) for trace in traces], np.int64)
    ranges = np.array([*streams, (0, 0)], np.int64)
    result = _Result()
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (code, items, lengths, ranges)]
    if _model()(ctypes.byref(config), *pointers, ctypes.byref(result)):
        raise value_error("a simulated launch", "end within 2e8 cycles", kernel.name)
    return Simulated(
        *(result.cycles, result.issued, result.dram_bytes, result.l2_bytes),
        in_flight=result.in_flight,
        waiting=tuple(result.waiting),
    )
