"""Predictions: what a pass issues and moves, and the share of DRAM's rate that it will reach.

A pass is launched for a device of one multiprocessor, executed and simulated, twice: with a few
images and with more. The difference of both is the steady state, which has no first and last tile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from bench.machine.capture import Emulator, arrays_in
from bench.machine.execute.grid import Launch
from bench.machine.execute.run import Runner
from bench.machine.gpus import DRAM_LATENCIES, DRAM_LATENCY, Gpu
from bench.machine.layers import Call, Layer, Operands, Operator
from bench.machine.library import Library
from bench.machine.loops import load_distances
from bench.machine.pipes import costs_of, pipe_of
from bench.machine.simulate import Simulated, simulate
from dcconv.passes.backward import BLOCKS_PER_MULTIPROCESSOR

#: Bytes of a vector: 16 in each lane of a warp.
VECTOR = 512

#: Images that a pass is executed with. Of 32 x 32 pixels, both give every block the same work.
SIZES = (2, 4)

#: From this share of a resource on, it is what binds.
BINDS = 0.85


@dataclass(frozen=True)
class Prediction:
    """What is expected of a pass on a GPU; "vector" is 16 bytes in each lane of a warp.

    Attributes:
        kernel: its readable name.
        registers, resident: of a thread; blocks that a multiprocessor holds.
        launched: blocks that it is given.
        instructions: issued for a vector that is stored, or loaded where none is.
        slots: issue slots of a scheduler times four while DRAM moves the vector's bytes.
        pipes: busy cycles of a sub-partition by pipe, for a vector.
        distance: executed instructions between a wide load of a stream and the first that awaits
            it: the mean, for the load that is executed most often.
        in_flight: bytes of loads under way, mean.
        needed: bytes under way that DRAM's rate takes at its latency: Little's law.
        bandwidth: share of DRAM's rate by its latency in cycles.
        binds: what is busy most of the time: DRAM, a pipe, ISSUE; or LATENCY where nothing is.
    """

    kernel: str
    registers: int
    resident: int
    launched: int
    instructions: float
    slots: float
    pipes: dict[str, float]
    distance: float | None
    in_flight: float
    needed: float
    bandwidth: dict[int, float]
    binds: str

    @property
    def over_slots(self) -> float:
        """Above 1, instructions bind and not DRAM."""
        return self.instructions / self.slots

    def row(self) -> dict[str, Any]:
        """Return what goes into a file of results."""
        return {**asdict(self), "over_slots": self.over_slots}


@dataclass(frozen=True)
class Run:
    """One size: instructions by place; the streams' bytes and loads; results by latency."""

    runner: Runner
    counts: Counter[int]
    stored: int
    loaded: int
    loads: set[int]
    simulated: dict[int, Simulated]


def launch_of(emulator: Emulator, dtype: str, call: Call, multiprocessors: int = 1) -> Launch:
    """Return a call's one launch on a device of so many multiprocessors, without running it."""
    emulator.module.set_multiprocessors(multiprocessors)
    try:
        (launch,) = emulator.launches(call.function, dtype, call.members, run=False)
    finally:
        emulator.module.set_multiprocessors(2)
    return launch


def execute(emulator: Emulator, library: Library, arch: str, dtype: str, call: Call) -> Runner:
    """Run a call's one launch for a device of one multiprocessor, and keep what warps did."""
    launch = launch_of(emulator, dtype, call)
    kernel = library.kernel(launch.symbol, arch)
    runner = Runner(kernel, launch, arrays_in(call.members), traced=True)
    runner.run()
    return runner


def run_call(
    emulator: Emulator,
    library: Library,
    gpu: Gpu,
    dtype: str,
    call: Call,
    latencies: Sequence[int] = (DRAM_LATENCY,),
) -> Run:
    """Execute a call on one multiprocessor, and simulate it at some latencies of DRAM."""
    runner = execute(emulator, library, gpu.arch, dtype, call)
    assert runner.trace is not None
    kernel, launch = runner.kernel, runner.grid.launch
    traces = runner.trace.of_warps()
    resident = gpu.resident(launch.threads, kernel.registers, kernel.shared + launch.shared)
    moved = {"LDG": 0, "LDGSTS": 0, "STG": 0}
    loads = set[int]()
    ranges = call.ranges()
    for trace in traces:
        address = trace["address"]
        inside = np.zeros(len(trace), np.bool_)
        for begin, end in ranges:
            inside |= (address >= begin) & (address < end)
        for place, amount in zip(trace["place"][inside], trace["amount"][inside], strict=True):
            moved[kernel.code[place].name] += int(amount)
        loads.update(trace["place"][inside].tolist())
    return Run(
        runner,
        Counter(dict(enumerate(runner.issued.tolist()))),
        moved["STG"],
        moved["LDG"] + moved["LDGSTS"],
        loads,
        {
            latency: simulate(
                *(kernel, traces, gpu, launch.threads // 32, resident),
                blocks=len(runner.grid.blocks),
                streams=ranges,
                dram_latency=latency,
            )
            for latency in latencies
        },
    )


def predict(
    emulator: Emulator,
    library: Library,
    gpu: Gpu,
    dtype: str,
    channels_last: bool,
    operator: Operator,
    function: str,
    layer: Layer,
    sizes: tuple[int, int] = SIZES,
    latencies: tuple[int, ...] = DRAM_LATENCIES,
) -> Prediction:
    """Predict a pass.

    Args:
        emulator, library: host code for the CPU, and kernels.
        gpu: which.
        dtype, channels_last: of the tensors.
        operator: its functions.
        function: pixel_sumsq, affine_relu, epilogue, grad_dot or grad_input.
        layer: its sizes; its n does not count.
        sizes: the two numbers of images.
        latencies: of DRAM, in cycles.
    """
    runs = []
    for n in sizes:
        sized = replace(layer, n=n)
        operands = Operands(emulator.module, sized, dtype, channels_last, operator)
        call = operands.calls(BLOCKS_PER_MULTIPROCESSOR)[function]
        runs.append(run_call(emulator, library, gpu, dtype, call, latencies))
    small, large = runs
    return _steady(small, large, gpu)


def _steady(small: Run, large: Run, gpu: Gpu) -> Prediction:
    kernel, launch = large.runner.kernel, large.runner.grid.launch
    counts = large.counts - small.counts
    stored, loaded = large.stored - small.stored, large.loaded - small.loaded
    vectors = (stored or loaded) / VECTOR
    pipes: Counter[str] = Counter()
    for place, number in counts.items():
        pipes[pipe_of(kernel.code[place])] += number
    busy = {p: c / vectors for p, c in costs_of(kernel.arch).busy(pipes).items() if c}
    slots = gpu.slots(stored + loaded) / vectors
    bandwidth, shares = {}, dict[int, dict[str, float]]()
    for latency, after in large.simulated.items():
        before = small.simulated[latency]
        cycles = after.cycles - before.cycles
        rate = (after.dram_bytes - before.dram_bytes) / cycles
        bandwidth[latency] = rate / gpu.bytes_per_cycle
        # Warps of four sub-partitions share the work.
        shares[latency] = {p: c * vectors / 4 / cycles for p, c in busy.items()}
        shares[latency]["DRAM"] = bandwidth[latency]
    at = DRAM_LATENCY if DRAM_LATENCY in shares else next(iter(shares))
    binding = max(shares[at], key=shares[at].__getitem__)
    assert large.runner.trace is not None
    distances = load_distances(kernel.code, large.runner.trace.of_warps()[0]["place"].tolist())
    streams = [every for place, every in distances.items() if place in large.loads]
    hot = max(streams, key=len, default=[])
    return Prediction(
        kernel.name,
        kernel.registers,
        gpu.resident(launch.threads, kernel.registers, kernel.shared + launch.shared),
        len(large.runner.grid.blocks),
        sum(counts.values()) / vectors,
        slots,
        {pipe: cycles for pipe, cycles in busy.items() if pipe != "ISSUE"},
        sum(hot) / len(hot) if hot else None,
        large.simulated[at].in_flight,
        gpu.bytes_per_cycle * at,
        bandwidth,
        binding if shares[at][binding] >= BINDS else "LATENCY",
    )
