"""The state of all threads of a launch: every register is a row, every thread a column."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.machine.disassemble import Kernel
from dcconv.operator.checks import choice

Array = NDArray[Any]
Mask = NDArray[np.bool_]

LANES = 32

#: Registers, predicates and barriers that a thread can name; the last one is RZ, and PT.
REGISTERS, UNIFORM, PREDICATES, BARRIERS = 256, 64, 8, 16

#: Where the parameters begin in bank 0 of the constants, and shared memory in its window. From
#: sm_90 on the system has the window's first KiB.
PARAMETERS = {"sm_80": 0x160, "sm_86": 0x160, "sm_89": 0x160, "sm_90a": 0x210}
SHARED_BASE = {"sm_80": 0, "sm_86": 0, "sm_89": 0, "sm_90a": 1024}

#: Upper half of a generic address in shared memory; any that no pointer has.
SHARED_WINDOW = 0x7EAD0000
STACK_TOP = 0x4000


@dataclass(frozen=True)
class Launch:
    """What a kernel is started with.

    Attributes:
        name: what the package calls it.
        symbol: the kernel's.
        grid: blocks in x and y.
        threads: of a block.
        shared: bytes of dynamic shared memory.
        parameters: the bytes of the kernel's one parameter, pointers included.
    """

    name: str
    symbol: str
    grid: tuple[int, int]
    threads: int
    shared: int
    parameters: bytes


class Grid:
    """Threads of some blocks of a launch, one after the other, and where each of them is.

    Args:
        kernel: whose code they run.
        launch: its parameters.
        blocks: x and y of each; all of the launch by default.
    """

    def __init__(
        self, kernel: Kernel, launch: Launch, blocks: list[tuple[int, int]] | None = None
    ) -> None:
        choice("arch", kernel.arch, PARAMETERS)
        x, y = launch.grid
        self.kernel, self.launch = kernel, launch
        self.blocks = blocks or [(i, j) for j in range(y) for i in range(x)]
        self.threads = launch.threads
        self.count = len(self.blocks) * launch.threads
        self.registers = np.zeros((REGISTERS, self.count), np.uint32)
        self.uniform = np.zeros((UNIFORM, self.count), np.uint32)
        self.predicates = np.zeros((PREDICATES, self.count), np.bool_)
        self.uniform_predicates = np.zeros((PREDICATES, self.count), np.bool_)
        self.predicates[-1] = self.uniform_predicates[-1] = True
        self.barriers = np.zeros((BARRIERS, self.count), np.bool_)
        self.alive = np.ones(self.count, np.bool_)
        self.place = np.zeros(self.count, np.int32)  # in the kernel's code
        self.lane = np.arange(self.count, dtype=np.uint32) % LANES
        self.thread = np.arange(self.count, dtype=np.uint32) % launch.threads
        self.block = np.repeat(np.arange(len(self.blocks)), launch.threads)
        self.constants = {0: self._bank(), 2: np.frombuffer(kernel.tables, np.uint8)}

    def _bank(self) -> Array:
        at = PARAMETERS[self.kernel.arch]
        bank = bytearray(at + len(self.launch.parameters) + 64)
        struct.pack_into("<6I", bank, 0, self.threads, 1, 1, *self.launch.grid, 1)
        struct.pack_into("<Q", bank, 0x18, SHARED_WINDOW << 32)
        struct.pack_into("<I", bank, 0x28, STACK_TOP)
        bank[at : at + len(self.launch.parameters)] = self.launch.parameters
        return np.frombuffer(bytes(bank), np.uint8)

    def special(self, name: str) -> Array | None:
        """Return a special register, None for one that is not known."""
        known = {
            "SR_TID.X": self.thread,
            "SR_TID.Y": np.zeros(self.count, np.uint32),
            "SR_CTAID.X": np.array([x for x, _ in self.blocks], np.uint32)[self.block],
            "SR_CTAID.Y": np.array([y for _, y in self.blocks], np.uint32)[self.block],
            "SR_CgaCtaId": np.zeros(self.count, np.uint32),
            "SR_SWINHI": np.full(self.count, SHARED_WINDOW, np.uint32),
            "SR_LANEID": self.lane,
        }
        return known.get(name)

    def warps(self, mask: Mask) -> Mask:
        """Return the mask of all lanes of warps that have a lane in the mask."""
        return np.repeat(mask.reshape(-1, LANES).any(1), LANES)
