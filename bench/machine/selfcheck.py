"""The model against kernels whose speed is known: a copy, and three published matrix products."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.accuracy import error
from bench.machine import listing
from bench.machine.disassemble import Kernel
from bench.machine.execute.grid import Array, Launch
from bench.machine.execute.run import Runner
from bench.machine.gpus import GPUS, Gpu
from bench.machine.layers import aligned, placed
from bench.machine.simulate import Simulated, simulate
from dcconv.operator.numerics import ACCURACY_FLOOR

LISTING = Path(__file__).parent / "checks/kernels.txt"

#: What a copy may be off, and a product.
COPY_TOLERANCE, PRODUCT_TOLERANCE = 0.03, 0.25

COPY_GPUS = ("H200", "A100", "RTX4090")
COPY_BLOCKS, COPY_THREADS = 8, 256


@dataclass(frozen=True)
class Product:
    """A matrix product of 8192^3 that was measured on an H100 SXM5.

    Attributes:
        kernel: of checks/kernels.cu.
        threads: of a block.
        tile: rows and columns of a block's outputs.
        shared: bytes of dynamic shared memory.
        depths: of the two sums that are simulated.
        item: bytes of an operand's element.
        measured: TFLOP/s: waynehacking8/blackwell-tensorcore-kernels, results/bench_sm90a.csv.
    """

    kernel: str
    threads: int
    tile: int
    shared: int
    depths: tuple[int, int]
    item: int
    measured: float


PRODUCTS = (
    Product("product_plain", 256, 16, 0, (64, 192), 4, 5.17),
    Product("product_tiled", 1024, 32, 0, (128, 384), 4, 9.17),
    Product("product_tensor", 512, 128, 3 * 2 * 128 * 32 * 2, (256, 768), 2, 61.04),
)


@dataclass(frozen=True)
class Check:
    """A figure of the model beside the one that is known."""

    name: str
    predicted: float
    known: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return abs(self.predicted / self.known - 1) <= self.tolerance


def _kernel(name: str, arch: str) -> Kernel:
    (found,) = (k for k in listing.read(LISTING) if (k.name, k.arch) == (name, arch))
    return found


def _resident(gpu: Gpu, kernel: Kernel, launch: Launch) -> int:
    return gpu.resident(launch.threads, kernel.registers, kernel.shared + launch.shared)


def copy_share(gpu: Gpu) -> float:
    """Return the share of DRAM's rate at which vectors of 16 bytes are copied."""
    kernel = _kernel("copy", gpu.arch)
    runs: list[Simulated] = []
    for trips in (4, 12):
        count = COPY_BLOCKS * COPY_THREADS * trips
        source = placed(np.arange(4 * count, dtype=np.uint32))
        target = aligned(source.size, source.dtype)
        arrays = [source, target]
        parameters = struct.pack("<2Qi4x", *(a.ctypes.data for a in arrays), count)
        launch = Launch("copy", "copy", (COPY_BLOCKS, 1), COPY_THREADS, 0, parameters)
        runner = Runner(kernel, launch, arrays, traced=True)
        runner.run()
        assert runner.trace is not None and (source == target).all()
        runs.append(
            simulate(
                *(kernel, runner.trace.of_warps(), gpu, COPY_THREADS // 32),
                resident=_resident(gpu, kernel, launch),
                blocks=COPY_BLOCKS,
                streams=[(a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays],
            )
        )
    few, many = runs
    rate = (many.dram_bytes - few.dram_bytes) / (many.cycles - few.cycles)
    return rate / gpu.bytes_per_cycle


def product_rate(product: Product, gpu: Gpu) -> float:
    """Return TFLOP/s of a product, from the steady state between two depths of its sums."""
    kernel = _kernel(product.kernel, gpu.arch)
    random = np.random.default_rng(0)
    cycles = []
    for depth in product.depths:
        a, b = (
            _storage(random.standard_normal((product.tile, depth)), product.item),
            _storage(random.standard_normal((depth, product.tile)), product.item),
        )
        c = aligned(product.tile**2, np.float32).reshape(product.tile, product.tile)
        addresses = (array.ctypes.data for array in (a, b, c))
        parameters = struct.pack("<3Q3i4x", *addresses, product.tile, product.tile, depth)
        launch = Launch(
            *(product.kernel, product.kernel, (1, 1), product.threads, product.shared), parameters
        )
        runner = Runner(kernel, launch, [a, b, c], traced=True)
        runner.run()
        exact = torch.from_numpy(a.astype(np.float64) @ b.astype(np.float64))
        off = error(torch.from_numpy(c), exact)
        if off > ACCURACY_FLOOR[torch.float32]:
            raise RuntimeError(f"dcconv: {product.kernel} must multiply, got an error of {off:.1e}")
        assert runner.trace is not None
        resident = _resident(gpu, kernel, launch)
        # Every block does what this one does; their operands are in L2.
        traces = runner.trace.of_warps()
        done = simulate(kernel, traces, gpu, product.threads // 32, resident, resident)
        cycles.append(done.cycles / resident)
    few, many = product.depths
    operations = 2 * product.tile**2 * (many - few)
    return operations / (cycles[1] - cycles[0]) * gpu.sms * gpu.clock / 1e12


def _storage(values: Array, item: int) -> Array:
    return placed(values.astype(np.float32 if item == 4 else np.float16)).reshape(values.shape)


def checks() -> Iterator[Check]:
    """Yield every check."""
    for name in COPY_GPUS:
        yield Check(f"copy, {name}", copy_share(GPUS[name]), 1.0, COPY_TOLERANCE)
    for product in PRODUCTS:
        predicted = product_rate(product, GPUS["H100"])
        yield Check(f"{product.kernel}, H100", predicted, product.measured, PRODUCT_TOLERANCE)
