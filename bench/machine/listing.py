"""Kernels as text: one line an instruction, with its control code before it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bench.machine.disassemble import Instruction, Kernel, parse_instruction
from dcconv.operator.checks import value_error

#: Bytes of an instruction.
STEP = 16


def write(kernels: Iterable[Kernel]) -> str:
    """Return the text of kernels, without jump tables and the padding at their ends."""
    lines = []
    for k in kernels:
        lines.append(f"kernel {k.name} {k.arch} {k.registers} {k.shared} {k.stack}")
        length = max(n for n, i in enumerate(k.code, 1) if i.name != "NOP")
        for i in k.code[:length]:
            control = f"{i.stall} {int(i.yields)} {i.written} {i.read} {i.waits}"
            lines.append(f"{control} {i.text}")
    return "\n".join(lines) + "\n"


def _instruction(address: int, line: str) -> Instruction:
    stall, yields, written, read, waits, text = line.split(" ", 5)
    word = int(stall) | (not int(yields)) << 4 | int(written) << 5 | int(read) << 8
    return parse_instruction(address, text, (word | int(waits) << 11) << 41)


def read(path: Path) -> list[Kernel]:
    """Return the kernels of a file that ``write`` made."""
    found: list[Kernel] = []
    for part in ("\n" + path.read_text(encoding="utf-8")).split("\nkernel ")[1:]:
        head, *lines = part.rstrip("\n").split("\n")
        name, arch, *numbers = head.split(" ")
        code = tuple(_instruction(STEP * n, line) for n, line in enumerate(lines))
        registers, shared, stack = map(int, numbers)
        found.append(Kernel(name, name, arch, code, registers, shared, stack))
    if not found:
        raise value_error("listing", "have kernels", str(path))
    return found
