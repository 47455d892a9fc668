"""Operands of an instruction as arrays with an element per thread, and where results go."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NoReturn

import numpy as np

from bench.machine.disassemble import Instruction
from bench.machine.execute.grid import Array, Grid, Mask
from bench.machine.execute.memory import Memory
from bench.machine.execute.traffic import Traffic
from dcconv.operator.checks import value_error

Value = Callable[[], Array]
Action = Callable[[Mask], None]

U32, I32, U64, I64, F32, F64 = np.uint32, np.int32, np.uint64, np.int64, np.float32, np.float64
LOW = 0xFFFFFFFF

_REGISTER = re.compile(r"(U?)R(\d+|Z)$")
_PREDICATE = re.compile(r"!?(U?)P(\d|T)$")
_NUMBER = re.compile(r"[+-]?(0x[0-9a-f]+|\d[\d.]*(e[+-]?\d+)?|INF|QNAN)$")
_CONSTANT = re.compile(r"c\[(0x[0-9a-f]+)\]\[(?:(U?R\w+)(?:\+(-?0x[0-9a-f]+))?|(0x[0-9a-f]+))\]$")
_TERM = re.compile(r"(-?)(?:(0x[0-9a-f]+)|(U?R\w+?)(?:\.(X\d+|64|U32))?)$")


def unknown(text: str) -> NoReturn:
    """Refuse an instruction."""
    raise value_error("an instruction", "be one that the executor knows", text)


class Operands:
    """The operands of one instruction of a grid."""

    def __init__(
        self, grid: Grid, memory: Memory, traffic: Traffic, instruction: Instruction
    ) -> None:
        self.grid, self.memory, self.instruction = grid, memory, instruction
        self.traffic = traffic
        self.name, self.modifiers = instruction.name, instruction.modifiers
        self.texts = [text.replace(".reuse", "").strip() for text in instruction.operands]
        self.flushes = "FTZ" in self.modifiers
        # The uniform datapath works once for a warp, whichever lanes are active.
        self.uniform = self.name.startswith("U")

    def refuse(self) -> NoReturn:
        """Refuse the instruction."""
        unknown(self.instruction.text)

    def takes_predicates(self) -> list[str]:
        """Remove predicates that stand after the first operand; return them: carries, outputs."""
        found = []
        while len(self.texts) > 1 and re.fullmatch(r"U?P[0-6T]", self.texts[1]):
            found.append(self.texts.pop(1))
        return found

    # Registers

    def row(self, text: str) -> Array | None:
        """Return a register, None for RZ and URZ."""
        found = _REGISTER.match(text)
        if found is None:
            self.refuse()
        bank = self.grid.uniform if found[1] else self.grid.registers
        return None if found[2] == "Z" else bank[int(found[2])]

    def rows(self, text: str, count: int) -> list[Array]:
        """Return consecutive registers; zeros for RZ."""
        found = _REGISTER.match(text)
        if found is None:
            self.refuse()
        bank = self.grid.uniform if found[1] else self.grid.registers
        if found[2] == "Z":
            return [bank[-1]] * count
        return [bank[int(found[2]) + k] for k in range(count)]

    def predicate_row(self, text: str) -> Array | None:
        """Return a predicate to write, None for PT."""
        found = _PREDICATE.match(text)
        if found is None:
            self.refuse()
        bank = self.grid.uniform_predicates if found[1] else self.grid.predicates
        return None if found[2] == "T" else bank[int(found[2])]

    def predicate(self, text: str) -> Value:
        """Return a predicate to read."""
        found = _PREDICATE.match(text)
        if found is None:
            self.refuse()
        bank = self.grid.uniform_predicates if found[1] else self.grid.predicates
        row = bank[-1 if found[2] == "T" else int(found[2])]
        return (lambda: ~row) if text.startswith("!") else (lambda: row)

    def guard(self) -> Value | None:
        """Return the instruction's own condition."""
        return self.predicate(self.instruction.guard) if self.instruction.guard else None

    # Values

    def number(self, text: str, floating: bool) -> int | None:
        """Return the bits of an immediate, None for another operand."""
        if not _NUMBER.match(text):
            return None
        if "0x" in text:
            return int(text, 16) & LOW
        if floating or not re.fullmatch(r"[+-]?\d+", text):
            value = float(text.replace("INF", "inf").replace("QNAN", "nan"))
            return int(np.array(value, F32).view(U32))
        return int(text) & LOW

    def constant(self, text: str, size: int) -> Value | None:
        """Return bytes of a constant bank as an unsigned number, None for another operand."""
        found = _CONSTANT.match(text)
        if found is None:
            return None
        bank = self.grid.constants.get(int(found[1], 16))
        if bank is None:
            self.refuse()  # bank 4: addresses of tables, which float64's trigonometry has
        kind = np.dtype(f"<u{size}")
        if found[4]:
            at = int(found[4], 16)
            value = np.frombuffer(bank.tobytes()[at : at + size].ljust(size, b"\0"), kind)
            fixed = np.asarray(value.astype(U64 if size == 8 else U32)[0])
            return lambda: fixed
        index, offset = self.rows(found[2], 1)[0], int(found[3] or "0", 16)
        steps = np.arange(size)

        def value_at() -> Array:
            # Lanes that do not take part may point anywhere.
            at = np.clip(index.astype(I64) + offset, 0, len(bank) - size)
            parts = np.ascontiguousarray(bank[at[:, None] + steps])
            return parts.view(kind)[:, 0].astype(U64 if size == 8 else U32)

        return value_at

    def bare(self, text: str, floating: bool = False) -> tuple[Value, bool, bool, bool]:
        """Return an operand's 32 bits, and whether its sign, bits or magnitude is to be taken."""
        bits = self.number(text, floating)
        if bits is not None:
            value = np.asarray(U32(bits))
            return (lambda: value), False, False, False
        negative, text = text.startswith("-"), text.removeprefix("-")
        inverted, text = text.startswith("~"), text.removeprefix("~")
        absolute, text = text.startswith("|"), text.strip("|")
        constant = self.constant(text, 4)
        if constant is not None:
            return constant, negative, inverted, absolute
        text = re.sub(r"\.(64|U32|H0_H0|H1_H1|X\d+)$", "", text)
        row = self.rows(text, 1)[0] if text != "SRZ" else self.grid.registers[-1]
        return (lambda: row), negative, inverted, absolute

    def u32(self, text: str) -> Value:
        """Return an integer modulo 2^32."""
        value, negative, inverted, absolute = self.bare(text)
        if negative:
            return lambda: U32(0) - value()
        if inverted:
            return lambda: ~value()
        if absolute:
            return lambda: np.abs(value().view(I32)).view(U32)
        return value

    def addend(self, text: str) -> Value:
        """Return an operand of a sum whose carry counts: -x is ~x + 1 in 64 bits."""
        value, negative, inverted, _ = self.bare(text)
        if negative:
            return lambda: (~value()).astype(U64) + U64(1)
        if inverted:
            return lambda: (~value()).astype(U64)
        return lambda: value().astype(U64)

    def u64(self, text: str) -> Value:
        """Return a pair of registers, a constant of 8 bytes or a number, modulo 2^64."""
        if _NUMBER.match(text):
            number = np.asarray(U64(int(text, 0) & 0xFFFFFFFFFFFFFFFF))
            return lambda: number
        negative, text = text.startswith("-"), re.sub(r"\.64$", "", text.removeprefix("-"))
        value = self.constant(text, 8)
        if value is None:
            low, high = self.rows(text, 2)
            value = lambda: low.astype(U64) | high.astype(U64) << U64(32)  # noqa: E731
        positive = value
        return (lambda: U64(0) - positive()) if negative else positive

    def f32(self, text: str) -> Value:
        """Return a float32."""
        value, negative, _, absolute = self.bare(text, floating=True)
        flushes = self.flushes

        def number() -> Array:
            x = value().view(F32)
            if flushes:
                x = flush(x)
            if absolute:
                x = np.abs(x)
            return -x if negative else x

        return number

    def address(self, text: str) -> Value:
        """Return the sum in brackets as signed 64 bits."""
        inner = text.removeprefix("desc").rpartition("[")[2].rstrip("]")
        fixed, terms = 0, list[Value]()
        for part in inner.replace("+-", "+\0").split("+"):
            found = _TERM.match(part.replace("\0", "-"))
            if found is None:
                self.refuse()
            if found[2]:
                fixed += int(found[1] + found[2], 16)
                continue
            scale = int(found[4][1:]) if (found[4] or "").startswith("X") else 1
            if found[4] == "64":
                terms.append(self.u64(found[3]))
            else:
                terms.append(_scaled(self.rows(found[3], 1)[0], scale))

        def total() -> Array:
            value = np.full(self.grid.count, fixed, I64)
            for term in terms:
                value += term().astype(I64)
            return value

        return total

    # Results

    def write(self, text: str, compute: Value) -> Action:
        """Return the action that puts 32 bits into a register."""
        row = self.row(text)
        if row is None:
            return lambda mask: None

        def action(mask: Mask) -> None:
            np.copyto(row, compute(), where=mask, casting="unsafe")

        return action

    def write_pair(self, text: str, compute: Value) -> Action:
        """Return the action that puts 64 bits into two registers."""
        if self.row(text) is None:
            return lambda mask: None
        low, high = self.rows(text, 2)

        def action(mask: Mask) -> None:
            value = np.asarray(compute()).astype(U64)
            np.copyto(low, (value & U64(LOW)).astype(U32), where=mask)
            np.copyto(high, (value >> U64(32)).astype(U32), where=mask)

        return action

    def write_f32(self, text: str, compute: Value) -> Action:
        """Return the action that rounds to float32 and puts it into a register."""
        row = self.row(text)
        if row is None:
            return lambda mask: None
        target, flushes = row.view(F32), self.flushes

        def action(mask: Mask) -> None:
            value = np.asarray(compute()).astype(F32)
            np.copyto(target, flush(value) if flushes else value, where=mask)

        return action

    def write_predicates(self, texts: list[str], compute: Callable[[], list[Array]]) -> Action:
        """Return the action that sets predicates."""
        rows = [self.predicate_row(text) for text in texts]

        def action(mask: Mask) -> None:
            for row, value in zip(rows, compute(), strict=False):
                if row is not None:
                    np.copyto(row, value, where=mask)

        return action


def _scaled(row: Array, scale: int) -> Value:
    return lambda: row.astype(I64) * scale


def flush(x: Array) -> Array:
    """Return float32 with subnormal numbers made zeros of their signs."""
    return np.where(np.abs(x) < F32(2.0**-126), np.copysign(F32(0), x), x)
