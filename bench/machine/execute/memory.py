"""Memory that executed code may touch: the launch's tensors, shared memory, stacks.

Every access is checked. One outside of the tensors stops the launch with kernel, block and address.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from bench.machine.execute.grid import SHARED_BASE, STACK_TOP, Array, Grid
from dcconv.operator.checks import value_error

WORD = 4


class Memory:
    """Global, shared and local memory of a grid.

    Args:
        grid: whose accesses they are.
        tensors: arrays at the addresses that the launch was given; the launch changes them.
    """

    def __init__(self, grid: Grid, tensors: Iterable[Array]) -> None:
        self.grid = grid
        spans = {t.ctypes.data: t.reshape(-1).view(np.uint8) for t in tensors if t.nbytes}
        self.starts = np.array(sorted(spans), np.int64)
        self.bytes = [spans[start] for start in sorted(spans)]
        self.ends = np.array(
            [start + len(b) for start, b in zip(self.starts, self.bytes, strict=True)], np.int64
        )
        arch = grid.kernel.arch
        self.base = SHARED_BASE[arch]
        # NaN in every floating type, as memory that nothing was written to is treated elsewhere.
        self.shared_bytes = grid.kernel.shared + grid.launch.shared
        self.shared = np.full((len(grid.blocks), max(self.shared_bytes, 16)), 0xFF, np.uint8)
        self.stack = np.zeros((grid.count, max(grid.kernel.stack, 16)), np.uint8)

    def fail(self, what: str, space: str, addresses: Array, at: Array, wrong: Array) -> Any:
        """Raise the sentence about the first wrong access."""
        first = int(np.flatnonzero(wrong)[0])
        block = self.grid.blocks[int(self.grid.block[at[first]])]
        rule = f"{what} {space}"
        got = f"address {int(addresses[first]):#x} in block {block}"
        raise value_error(f"kernel {self.grid.kernel.name}", rule, got)

    def _places(
        self, what: str, addresses: Array, size: int, at: Array
    ) -> list[tuple[Array, Array, Array]]:
        """Return tensor, lanes and offsets of an access."""
        span = np.searchsorted(self.starts, addresses, "right") - 1
        wrong = (span < 0) | (addresses + size > self.ends[span]) | (addresses % size != 0)
        if wrong.any():
            self.fail(what, f"aligned {size} bytes of its tensors", addresses, at, wrong)
        first = int(span[0])
        if (span == first).all():
            return [(self.bytes[first], np.arange(len(at)), addresses - self.starts[first])]
        found = []
        for one in np.unique(span):
            lanes = np.flatnonzero(span == one)
            found.append((self.bytes[one], lanes, addresses[lanes] - self.starts[one]))
        return found

    def load(self, addresses: Array, size: int, at: Array) -> Array:
        """Return [lanes, size] bytes of the tensors; ``at`` are the lanes' threads."""
        found = np.empty((len(at), size), np.uint8)
        steps = np.arange(size)
        for tensor, lanes, offsets in self._places("load", addresses, size, at):
            found[lanes] = tensor[offsets[:, None] + steps]
        return found

    def store(self, addresses: Array, values: Array, at: Array) -> None:
        """Write [lanes, size] bytes to the tensors."""
        size = values.shape[1]
        steps = np.arange(size)
        for tensor, lanes, offsets in self._places("store", addresses, size, at):
            tensor[offsets[:, None] + steps] = values[lanes]

    def _shared_places(self, what: str, addresses: Array, size: int, at: Array) -> Array:
        offsets = addresses - self.base
        wrong = (offsets < 0) | (offsets + size > self.shared_bytes) | (offsets % size != 0)
        if wrong.any():
            space = f"aligned {size} bytes of its shared memory"
            self.fail(what, space, addresses, at, wrong)
        flat = self.grid.block[at] * self.shared.shape[1] + offsets
        return np.asarray(flat[:, None] + np.arange(size))

    def load_shared(self, addresses: Array, size: int, at: Array) -> Array:
        """Return [lanes, size] bytes of the blocks' shared memory."""
        return np.asarray(self.shared.reshape(-1)[self._shared_places("load", addresses, size, at)])

    def store_shared(self, addresses: Array, values: Array, at: Array) -> None:
        """Write [lanes, size] bytes to the blocks' shared memory."""
        places = self._shared_places("store", addresses, values.shape[1], at)
        self.shared.reshape(-1)[places] = values

    def stack_places(
        self, what: str, addresses: Array, size: int, at: Array
    ) -> tuple[Array, Array]:
        """Return rows and columns of ``stack`` for accesses to local memory."""
        offsets = addresses - (STACK_TOP - self.grid.kernel.stack)
        unit = min(size, WORD)
        wrong = (offsets < 0) | (offsets + size > self.grid.kernel.stack) | (offsets % unit != 0)
        if wrong.any():
            self.fail(what, "words of its stack", addresses, at, wrong)
        return at[:, None], offsets[:, None] + np.arange(size)
