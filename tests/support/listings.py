"""Machine code for tests, as cuobjdump prints it: no toolkit is needed to make it."""

from __future__ import annotations

from collections.abc import Sequence

from bench.machine.disassemble import Instruction, Kernel, parse


def line(address: int, text: str, control: str = "") -> str:
    """Return two printed lines of an instruction.

    Args:
        address: of the instruction.
        text: of the instruction.
        control: such as ``"stall=2 wait=5 written=0"``; nothing is a stall of 1.
    """
    given = dict(part.split("=") for part in control.split())
    word = (
        int(given.get("stall", "1"))
        | 1 << 4
        | int(given.get("written", "7")) << 5
        | int(given.get("read", "7")) << 8
        | int(given.get("wait", "0")) << 11
    )
    return f"  /*{address:04x}*/  {text} ;  /* 0x{0:016x} */\n  /* 0x{word << 41:016x} */"


def listing(symbol: str, instructions: Sequence[str | tuple[str, str]]) -> str:
    """Return the printed code of a kernel; labels end in a colon, ``@name@`` is their address."""
    labels, address, lines = {}, 0, list[tuple[str, str]]()
    for one in instructions:
        text, control = one if isinstance(one, tuple) else (one, "")
        if text.endswith(":"):
            labels[text[:-1]] = f"{address:#x}"
        else:
            lines.append((text, control))
            address += 16
    printed = [f"\t\tFunction : {symbol}"]
    for n, (text, control) in enumerate(lines):
        for label, place in labels.items():
            text = text.replace(f"@{label}@", place)
        printed.append(line(16 * n, text, control))
    return "\n".join(printed) + "\n"


def code(instructions: Sequence[str | tuple[str, str]]) -> tuple[Instruction, ...]:
    ((_, found),) = parse(listing("kernel", instructions).splitlines())
    return tuple(found)


def kernel(
    instructions: Sequence[str | tuple[str, str]], arch: str = "sm_90a", registers: int = 32
) -> Kernel:
    return Kernel("kernel", "kernel", arch, code(instructions), registers, 0, 0)
