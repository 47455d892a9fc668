"""What a loop issues and moves in a trip, and how long its loads have before they are awaited."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.machine.disassemble import NO_SCOREBOARD, Instruction, Kernel
from bench.machine.flow import Graph, Loop
from bench.machine.gpus import Gpu
from bench.machine.pipes import costs_of, count

LANES = 32

#: Loads of this many bytes a lane are those of streams; narrower ones read maps and filters.
WIDE = 8

LOADS = frozenset({"LDG", "LDGSTS"})


def load_distances(code: Sequence[Instruction], path: Sequence[int]) -> dict[int, list[int]]:
    """Return by wide load the instructions that the same warp issues before it awaits the load.

    Args:
        code: the kernel's.
        path: places of instructions in the order in which a warp issues them.
    """
    found: dict[int, list[int]] = {}
    pending: dict[int, list[tuple[int, int]]] = {}
    for at, n in enumerate(path):
        instruction = code[n]
        for board in [b for b in pending if instruction.waits >> b & 1]:
            for since, load in pending.pop(board):
                found.setdefault(load, []).append(at - since)
        wide = instruction.name == "LDG" and instruction.bytes >= WIDE
        if wide and instruction.written != NO_SCOREBOARD:
            pending.setdefault(instruction.written, []).append((at, n))
    return found


def traffic(instructions: Iterable[Instruction]) -> tuple[int, int]:
    """Return bytes that a warp loads from and stores to global memory if all lanes take part."""
    loads = stores = 0
    for instruction in instructions:
        loads += LANES * instruction.bytes * (instruction.name in LOADS)
        stores += LANES * instruction.bytes * (instruction.name == "STG")
    return loads, stores


@dataclass(frozen=True)
class Trip:
    """One trip through a loop by its longest way, inner loops left out.

    Attributes:
        loop: which.
        address: of its header.
        shortest, longest: instructions of the shortest and the longest way.
        pipes: instructions by pipe.
        loads, stores: bytes of global memory and warp.
        distance: the fewest instructions between a wide load and the first that awaits it; None
            without such a load. A trip's load may be awaited in the next trip.
        busiest: the pipe with the most cycles, or the scheduler (ISSUE).
        cycles: its cycles.
        slots: cycles of a scheduler while DRAM moves the bytes of four warps.
    """

    loop: Loop
    address: int
    shortest: int
    longest: int
    pipes: dict[str, float]
    loads: int
    stores: int
    distance: int | None
    busiest: str
    cycles: float
    slots: float

    @property
    def share(self) -> float | None:
        """Cycles over slots: above 1, instructions bind and not DRAM."""
        return self.cycles / self.slots if self.slots else None


def trips(kernel: Kernel, gpu: Gpu, smallest: int = 8) -> list[Trip]:
    """Return the loops of a kernel that have at least so many instructions."""
    graph = Graph(kernel)
    return [_trip(graph, loop, gpu) for loop in graph.loops if len(loop.body) >= smallest]


def _trip(graph: Graph, loop: Loop, gpu: Gpu) -> Trip:
    kernel = graph.kernel
    shortest, longest = graph.ways(loop)
    way = [kernel.code[n] for n in longest]
    pipes = count(way)
    cycles = costs_of(kernel.arch).busy(pipes)
    cycles["TENSOR"] = gpu.tensor_cycles * pipes.get("TENSOR", 0)
    busiest = max(cycles, key=cycles.__getitem__)
    loads, stores = traffic(way)
    distances = load_distances(kernel.code, [*longest, *longest])
    return Trip(
        loop,
        kernel.code[loop.header].address,
        len(shortest),
        len(longest),
        pipes,
        loads,
        stores,
        min((d for every in distances.values() for d in every), default=None),
        busiest,
        cycles[busiest],
        gpu.slots(loads + stores),
    )
