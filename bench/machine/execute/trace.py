"""What each warp executed, in order, with what its memory instructions moved."""

from __future__ import annotations

import numpy as np

from bench.machine.disassemble import Kernel
from bench.machine.execute.grid import LANES, Array, Grid, Mask
from bench.machine.execute.traffic import Traffic

#: One executed instruction: its place in the code, and Traffic's figures.
ITEM = np.dtype([("place", "<i4"), ("sectors", "<i4"), ("amount", "<i4"), ("address", "<i8")])


class Trace:
    """The executed instructions of a grid's warps."""

    def __init__(self, kernel: Kernel, grid: Grid) -> None:
        self.warps = grid.count // LANES
        self.warps_per_block = grid.threads // LANES
        self._stretches: list[tuple[int, int, Mask]] = []
        self._accesses: list[tuple[int, int, Array, Array, Array]] = []

    def access(self, offset: int, traffic: Traffic) -> None:
        """Note an access of the stretch that is being run."""
        figures = traffic.sectors, traffic.amount, traffic.address
        self._accesses.append((len(self._stretches), offset, *figures))

    def stretch(self, begin: int, end: int, warps: Mask) -> None:
        """Note that warps have run from begin to before end."""
        self._stretches.append((begin, end, warps))

    def of_warps(self) -> list[Array]:
        """Return the items of every warp."""
        sizes = np.array([end - begin for begin, end, _ in self._stretches])
        masks = np.array([warps for _, _, warps in self._stretches])
        places = np.concatenate([np.arange(b, e) for b, e, _ in self._stretches])
        found = []
        for warp in range(self.warps):
            there = masks[:, warp]
            items = np.zeros(int((sizes * there).sum()), ITEM)
            items["place"] = places[np.repeat(there, sizes)]
            starts = np.cumsum(sizes * there) - sizes * there
            for at, offset, sectors, amount, address in self._accesses:
                if there[at]:
                    item = items[starts[at] + offset]
                    item["sectors"], item["amount"] = sectors[warp], amount[warp]
                    item["address"] = address[warp]
            found.append(items)
        return found
