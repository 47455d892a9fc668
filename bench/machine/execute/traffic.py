"""What memory instructions move: sectors of global memory, passes through shared memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from bench.machine.execute.grid import LANES, Array

I64 = np.int64

SECTOR = 32  # bytes that L2 and DRAM move at once
LINE = 128
BANKS = 32


@dataclass
class Traffic:
    """What the last memory instruction moved, by warp.

    Attributes:
        wanted: whether anybody wants to know; else nothing is counted.
        sectors: distinct ones of global memory, of each warp.
        amount: bytes of global memory, or passes through shared memory's banks.
        address: of each warp's first active lane in global memory, 0 for shared memory.
    """

    wanted: bool = False
    sectors: Array = field(default_factory=lambda: np.zeros(0, I64))
    amount: Array = field(default_factory=lambda: np.zeros(0, I64))
    address: Array = field(default_factory=lambda: np.zeros(0, I64))

    def count_global(self, addresses: Array, size: int, at: Array, warps: int) -> None:
        if not self.wanted:
            return
        warp = at // LANES
        keys = np.unique(warp * (1 << 48) + (addresses >> 5))
        self.sectors = np.bincount(keys >> 48, minlength=warps)
        self.amount = np.bincount(warp, minlength=warps) * size
        self.address = np.zeros(warps, I64)
        self.address[warp[::-1]] = addresses[::-1]

    def count_shared(
        self, addresses: Array, size: int, at: Array, warps: int, together: int = LANES
    ) -> None:
        """Count passes: words of one bank that differ follow each other, equal ones are one.

        Args:
            addresses, size: of the lanes ``at``.
            at: threads.
            warps: of the grid.
            together: lanes whose words may share a pass.
        """
        if not self.wanted:
            return
        self.sectors, self.address = np.zeros(warps, I64), np.zeros(warps, I64)
        words = max(size // 4, 1)
        group = np.repeat(at // together, words)
        number = ((addresses[:, None] >> 2) + np.arange(words)).ravel()
        keys = np.unique(group * (1 << 32) + number)
        bank = (keys >> 32) * BANKS + keys % BANKS
        groups = warps * LANES // together
        passes = np.bincount(bank, minlength=groups * BANKS).reshape(groups, BANKS).max(1)
        self.amount = passes.reshape(warps, -1).sum(1)

    def count_none(self, warps: int) -> None:
        """Count a copy that reads nothing."""
        if self.wanted:
            self.sectors = self.amount = self.address = np.zeros(warps, I64)
