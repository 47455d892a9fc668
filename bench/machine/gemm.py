"""Predictions of the implicit GEMM: cycles of a step of its main loop, and of the rest of a tile.

One block is executed at two depths of its sums; a multiprocessor that is full of such blocks is
simulated, whose operands are in L2. The difference of both depths is the main loop.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bench.machine.capture import Emulator, arrays_in
from bench.machine.execute.run import Runner
from bench.machine.execute.traffic import LINE
from bench.machine.fused import GEMM, GEMM_GRADIENT, TILES, Case
from bench.machine.gpus import Gpu
from bench.machine.layers import Operator
from bench.machine.library import Library
from bench.machine.pipes import pipe_of
from bench.machine.simulate import KINDS, simulate

#: Products of a step of the main loop, in depth.
STEP = 32

#: Pixels of an image's side: two tiles of rows.
SIZE = 16

#: By name: function, window, and whether norms are found in the loop.
PROBLEMS = {
    "forward 3x3": (GEMM, 3, False),
    "forward 1x1": (GEMM, 1, False),
    "forward 1x1, norms in the loop": (GEMM, 1, True),
    "gradient 3x3": (GEMM_GRADIENT, 3, False),
    "gradient 1x1": (GEMM_GRADIENT, 1, False),
}

DEPTHS = {3: (64, 128), 1: (256, 640)}


@dataclass(frozen=True)
class GemmPrediction:
    """What is expected of a tile of the implicit GEMM, of one block where others share with it.

    Attributes:
        kernel, registers, resident: as of a pass.
        tile: rows and columns.
        instructions: of a step, of all its warps.
        tensor, shared, issue, l2: cycles of a step that tensor cores, shared memory, schedulers
            and the operands' way from L2 take at least.
        step: cycles of a step, simulated.
        fixed: cycles of a tile besides its steps.
        teraflops: of the main loop alone, on the whole GPU.
        alone: time of a block with a multiprocessor to itself over its share of a full one's.
    """

    kernel: str
    registers: int
    resident: int
    tile: tuple[int, int]
    instructions: float
    tensor: float
    shared: float
    issue: float
    l2: float
    step: float
    fixed: float
    teraflops: float
    alone: float = 1.0

    @property
    def fixed_steps(self) -> float:
        """Beginning and end of a tile, in steps."""
        return self.fixed / self.step

    def row(self) -> dict[str, Any]:
        """Return what goes into a file of results."""
        return {**asdict(self), "fixed_steps": self.fixed_steps}


@dataclass(frozen=True)
class _Block:
    """One depth: steps, a block's cycles and bytes from L2, its warps' instructions and passes."""

    runner: Runner
    steps: int
    cycles: float
    instructions: int
    products: int
    passes: float
    l2_bytes: float
    resident: int
    alone: float


def _block(emulator: Emulator, library: Library, gpu: Gpu, case: Case, depth: int) -> _Block:
    members = case.operands(emulator.module)
    emulator.module.set_multiprocessors(1)
    try:
        (launch,) = emulator.launches(case.function, case.dtype, members, run=False)
    finally:
        emulator.module.set_multiprocessors(2)
    kernel = library.kernel(launch.symbol, gpu.arch)
    runner = Runner(kernel, launch, arrays_in(members), blocks=[(0, 0)], traced=True)
    runner.run()
    assert runner.trace is not None
    traces, warps = runner.trace.of_warps(), launch.threads // 32
    resident = gpu.resident(launch.threads, kernel.registers, kernel.shared + launch.shared)
    few, many = (
        simulate(kernel, traces, gpu, warps, resident, rounds * resident) for rounds in (2, 6)
    )
    alone = simulate(kernel, traces, gpu, warps, 1, 1).cycles
    blocks = 4 * resident
    shared = {n for n, one in enumerate(kernel.code) if one.name in KINDS["shared"]}
    copies = {n for n, one in enumerate(kernel.code) if one.name in KINDS["copy"]}
    passes = 0.0
    for trace in traces:
        for place, amount in zip(trace["place"].tolist(), trace["amount"].tolist(), strict=True):
            passes += amount if place in shared else amount / LINE if place in copies else 0
    issued = runner.issued.tolist()
    tensor = sum(n for n, one in zip(issued, kernel.code, strict=True) if pipe_of(one) == "TENSOR")
    steps = depth // STEP * case.kernel**2
    return _Block(
        *(runner, steps, (many.cycles - few.cycles) / blocks, sum(issued), tensor, passes),
        *((many.l2_bytes - few.l2_bytes) / blocks, resident, float(alone)),
    )


def predict_gemm(
    emulator: Emulator,
    library: Library,
    gpu: Gpu,
    dtype: str,
    problem: str,
    tile: int,
    operator: Operator,
) -> GemmPrediction:
    """Predict a tile.

    Args:
        emulator, library: host code for the CPU, and kernels.
        gpu: which.
        dtype: bfloat16 or float16.
        problem: of PROBLEMS.
        tile: of TILES.
        operator: its functions.
    """
    function, window, finds = PROBLEMS[problem]
    rows, columns = TILES[tile]
    made = []
    for depth in DEPTHS[window]:
        c, o = (columns, depth) if function == GEMM_GRADIENT else (depth, columns)
        sizes = (1, c, SIZE, o, window)
        case = Case(function, dtype, True, *sizes, tile=tile, given=not finds, operator=operator)
        made.append(_block(emulator, library, gpu, case, depth))
    few, many = made
    steps = many.steps - few.steps
    step = (many.cycles - few.cycles) / steps
    instructions = (many.instructions - few.instructions) / steps
    rate = 2 * rows * columns * STEP / step * gpu.sms * gpu.clock / 1e12
    return GemmPrediction(
        *(few.runner.kernel.name, few.runner.kernel.registers, few.resident, (rows, columns)),
        instructions,
        tensor=(many.products - few.products) / steps * gpu.tensor_cycles / 4,
        shared=(many.passes - few.passes) / steps,
        issue=instructions / 4,
        l2=(many.l2_bytes - few.l2_bytes) / steps / gpu.l2_bytes_per_cycle,
        step=step,
        fixed=few.cycles - few.steps * step,
        teraflops=rate,
        alone=max(1.0, many.alone / many.cycles),
    )
