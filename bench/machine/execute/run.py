"""Runs a launch: the threads that are furthest behind go on, until others wait at their place.

All threads of the grid that stand at one instruction execute it together, whichever warp or block
they belong to. Threads wait where the machine code says: at a convergence barrier for the threads
that set out for it, at a warp's or a block's barrier for all of it that are alive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from bench.machine.disassemble import Instruction, Kernel
from bench.machine.execute import access, double, floating, integer, lanes, logic
from bench.machine.execute.grid import BARRIERS, LANES, Array, Grid, Launch, Mask
from bench.machine.execute.memory import Memory
from bench.machine.execute.operands import I32, I64, Action, Operands, Value, unknown
from bench.machine.execute.trace import Trace
from bench.machine.execute.traffic import Traffic
from dcconv.operator.checks import value_error

#: What a thread waits for besides its barriers, which are 1 and more.
NOTHING, WARP, BLOCK = 0, BARRIERS + 1, BARRIERS + 2

#: Instructions that order memory or schedules, which this order of execution needs no help with.
IGNORED = frozenset({"NOP", "LDGDEPBAR", "DEPBAR", "ENDCOLLECTIVE", "MEMBAR", "ERRBAR", "YIELD"})

#: Instructions that memory is the business of.
COUNTED = frozenset(
    {"LDG", "LD", "LDS", "STG", "ST", "STS", "LDGSTS", "LDL", "STL", "LDSM", "STSM", "SHFL"}
)

#: More than any launch that is run here takes.
LIMIT = 20_000_000

BUILDERS: dict[str, Callable[[Operands], Action]] = {
    **integer.BUILDERS,
    **logic.BUILDERS,
    **floating.BUILDERS,
    **double.BUILDERS,
    **access.BUILDERS,
    **lanes.BUILDERS,
}

#: Runs an instruction for the threads at its place; whether some may be elsewhere afterwards.
Step = Callable[[Mask, int], bool]

#: As Step, with the threads that the guard lets through.
Control = Callable[[Mask, Mask, int], bool]


class Runner:
    """A launch that is being executed.

    Args:
        kernel: whose code it runs.
        launch: its grid and parameters.
        tensors: the arrays that it may touch, at the addresses in its parameters.
        blocks: those of the grid to run; all by default.
        traced: whether to keep what each warp executed.
    """

    def __init__(
        self,
        kernel: Kernel,
        launch: Launch,
        tensors: Iterable[Array],
        blocks: list[tuple[int, int]] | None = None,
        traced: bool = False,
    ) -> None:
        self.kernel = kernel
        self.grid = Grid(kernel, launch, blocks)
        self.memory = Memory(self.grid, tensors)
        self.traffic = Traffic(wanted=traced)
        self.trace = Trace(kernel, self.grid) if traced else None
        self.waits = np.zeros(self.grid.count, np.int8)
        self.issued = np.zeros(len(kernel.code), I64)
        self._steps: list[Step | None] = [None] * len(kernel.code)

    def run(self) -> None:
        """Run all blocks to their ends.

        Raises:
            ValueError: an instruction is not known, an access goes outside of its memory, or
                threads wait for each other.
        """
        left = LIMIT
        with np.errstate(all="ignore"):
            while True:
                ready = self.grid.alive & (self.waits == NOTHING)
                places = self.grid.place[ready]
                if len(places) == 0:
                    if not self.grid.alive.any():
                        return
                    self._release()
                    continue
                n = int(places.min())
                later = places[places > n]
                left -= self._straight(n, ready & (self.grid.place == n), later)
                if left < 0:
                    raise self._stuck(f"end within {LIMIT} instructions")

    def _straight(self, n: int, mask: Mask, later: Array) -> int:
        """Run from n to a turn or to where other threads are; return the instructions issued."""
        end = int(later.min()) if len(later) else len(self.kernel.code)
        begin, warps = n, np.asarray(mask.reshape(-1, LANES).any(1))
        number = int(warps.sum())
        turned = False
        while n < end and not turned:
            step = self._steps[n]
            if step is None:
                step = self._steps[n] = self._build(n)
            self.issued[n] += number
            turned = step(mask, n)
            if self.trace is not None and self.kernel.code[n].name in COUNTED:
                self.trace.access(n - begin, self.traffic)
            n += 1
        if self.trace is not None:
            self.trace.stretch(begin, n, warps)
        if not turned:
            self.grid.place[mask] = n
        return n - begin

    def _stuck(self, rule: str) -> ValueError:
        where = {self.kernel.code[n].text for n in np.unique(self.grid.place[self.grid.alive])}
        return value_error(f"kernel {self.kernel.name}", rule, " and ".join(sorted(where)[:3]))

    def _release(self) -> None:
        """Let threads go on whose barriers are complete."""
        alive, waits, grid = self.grid.alive, self.waits, self.grid
        go = np.zeros(grid.count, np.bool_)
        for wait in np.unique(waits[alive]):
            there = alive & (waits == wait)
            missing = self._missing(int(wait), there)
            if wait == BLOCK:
                held = np.repeat(missing.reshape(len(grid.blocks), -1).any(1), grid.threads)
            else:
                held = grid.warps(missing)
            go |= there & ~held
        if not go.any():
            raise self._stuck("have threads that do not wait for each other")
        waits[go] = NOTHING
        grid.place[go] += 1

    def _build(self, n: int) -> Step:
        instruction = self.kernel.code[n]
        name = instruction.name
        if name in IGNORED:
            return lambda given, at: False
        operands = Operands(self.grid, self.memory, self.traffic, instruction)
        guard = operands.guard() or operands.predicate("PT")
        control = self._control(instruction, operands)
        if control is not None:
            return lambda given, at: control(given, given & guard(), at)
        if name not in BUILDERS:
            operands.refuse()
        action = BUILDERS[name](operands)
        widens = operands.uniform and name not in ("VOTEU",)

        def step(given: Mask, at: int) -> bool:
            mask = self.grid.warps(given) if widens else given
            action(mask & guard() if instruction.guard else mask)
            return False

        return step

    def _control(self, instruction: Instruction, o: Operands) -> Control | None:
        name = instruction.name
        if name in ("BRA", "JMP", "CALL"):
            if "DIV" in instruction.modifiers:
                return self._refuse_divergence(instruction)
            assert instruction.target is not None
            conditions = [o.predicate(t) for t in o.texts[:-1] if t.lstrip("!U").startswith("P")]
            return self._jump(self.kernel.at[instruction.target], conditions)
        if name in ("BRX", "BRXU"):
            base = instruction.address + 16 + int(o.texts[1], 16)
            return self._jump_by(o.rows(o.texts[0], 1)[0], base)
        if name == "RET":
            return self._jump_by(o.rows(o.texts[0], 1)[0], 0)
        if name == "BSSY":
            return self._set_out(int(o.texts[0][1:]))
        if name == "BSYNC":
            return self._wait(int(o.texts[0][1:]) + 1)
        if name == "BREAK":
            return self._leave(int(o.texts[-1][1:]))
        if name == "WARPSYNC":
            return self._wait(WARP)
        if name == "BAR":
            if "SYNC" not in instruction.modifiers or o.texts != ["0x0"]:
                o.refuse()
            return self._wait(BLOCK)
        return self._exit if name == "EXIT" else None

    def _jump(self, target: int, conditions: list[Value]) -> Control:
        def control(given: Mask, mask: Mask, at: int) -> bool:
            for condition in conditions:
                mask = mask & condition()
            if not mask.any():
                return False
            self.grid.place[given] = at + 1
            self.grid.place[mask] = target
            return True

        return control

    def _jump_by(self, row: Array, base: int) -> Control:
        """To addresses in a register, which may differ between threads."""

        def control(given: Mask, mask: Mask, at: int) -> bool:
            self.grid.place[given] = at + 1
            for value in np.unique(row[mask]):
                target = self.kernel.at[base + int(value.view(I32))]
                self.grid.place[mask & (row == value)] = target
            return True

        return control

    def _refuse_divergence(self, instruction: Instruction) -> Control:
        def control(given: Mask, mask: Mask, at: int) -> bool:
            if (self.grid.warps(mask) & self.grid.alive & ~mask).any():
                unknown(f"{instruction.text} in a warp that has diverged")
            return False

        return control

    def _set_out(self, barrier: int) -> Control:
        def control(given: Mask, mask: Mask, at: int) -> bool:
            np.copyto(self.grid.barriers[barrier], mask, where=self.grid.warps(mask))
            return False

        return control

    def _leave(self, barrier: int) -> Control:
        """Threads that go another way: nobody waits for them."""

        def control(given: Mask, mask: Mask, at: int) -> bool:
            self.grid.barriers[barrier][mask] = False
            return False

        return control

    def _wait(self, what: int) -> Control:
        def control(given: Mask, mask: Mask, at: int) -> bool:
            if not self._missing(what, mask).any():
                return False
            self.grid.place[given] = at + 1
            self.grid.place[mask] = at
            self.waits[mask] = what
            return True

        return control

    def _missing(self, what: int, there: Mask) -> Mask:
        """Return the threads that those at a barrier wait for."""
        grid = self.grid
        absent = grid.alive & ~there
        if what == BLOCK:
            blocks = there.reshape(len(grid.blocks), -1).any(1)
            return np.asarray(absent & np.repeat(blocks, grid.threads))
        if what != WARP:
            absent = absent & grid.barriers[what - 1]
        return np.asarray(absent & grid.warps(there))

    def _exit(self, given: Mask, mask: Mask, at: int) -> bool:
        self.grid.alive &= ~mask
        self.grid.place[given] = at + 1
        return True
