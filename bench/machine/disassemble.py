"""Machine code as data: the kernels of a library, their instructions and control codes.

A CUDA library is an ELF file that holds others, one for each architecture and source file
("cubins"). ``cuobjdump`` takes them out and prints their instructions; the 21 highest bits of each
instruction's 128 are the compiler's word to the scheduler: cycles to stall, and scoreboards to set
and to await. The layout of those bits is that of Jia et al., "Dissecting the NVIDIA Volta GPU
Architecture via Microbenchmarking", 2018, section 2.1, and has not changed since.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from dcconv.operator.checks import value_error

#: What stands for a scoreboard where an instruction sets none.
NO_SCOREBOARD = 7

BRANCHES = frozenset({"BRA", "JMP", "BSSY", "CALL"})


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: in bytes, from the kernel's first instruction.
        guard: the predicate that has to hold, such as ``!P3``, or nothing.
        name: such as ``FFMA``.
        modifiers: such as ``("E", "128")``.
        operands: as printed, destinations first.
        stall: cycles before the warp's next instruction may issue.
        yields: whether the scheduler should turn to another warp.
        written: scoreboard that is held until the result is there.
        read: scoreboard that is held until the operands have been read.
        waits: mask of scoreboards that have to be free before issue.
        text: as printed.
    """

    address: int
    guard: str
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    stall: int
    yields: bool
    written: int
    read: int
    waits: int
    text: str

    @property
    def target(self) -> int | None:
        """The address that a branch names."""
        if self.name not in BRANCHES:
            return None
        found = [o for o in self.operands if re.fullmatch(r"0x[0-9a-f]+", o)]
        return int(found[-1], 16) if found else None

    @property
    def bytes(self) -> int:
        """What a memory instruction moves for one lane."""
        for modifier in self.modifiers:
            if modifier in ("64", "128"):
                return int(modifier) // 8
            if modifier in ("U8", "S8", "U16", "S16"):
                return int(modifier[1:]) // 8
        return 4


@dataclass(frozen=True)
class Kernel:
    """The machine code of one kernel and what it needs: registers a thread, bytes of memory."""

    symbol: str
    name: str
    arch: str
    code: tuple[Instruction, ...]
    registers: int
    shared: int
    stack: int
    tables: bytes = field(default=b"", repr=False)  # jump tables: bank 2 of its constants

    @cached_property
    def at(self) -> dict[int, int]:
        """The place in ``code`` by address."""
        return {instruction.address: n for n, instruction in enumerate(self.code)}


def find_tool(name: str) -> str:
    """Return the path of one of the CUDA toolkit's disassemblers.

    Raises:
        ValueError: it is neither in a toolkit nor in Triton's package.
    """
    homes = [Path(os.environ[v]) / "bin" for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    # find_spec does not import the package, which wants a driver.
    spec = importlib.util.find_spec("triton")
    places = (spec.submodule_search_locations or []) if spec is not None else []
    homes += [Path(place) / "backends/nvidia/bin" for place in places]
    homes.append(Path("/usr/local/cuda/bin"))
    found = shutil.which(name, path=os.pathsep.join(map(str, homes))) or shutil.which(name)
    if found is None:
        raise value_error(name, "be in a CUDA toolkit or in Triton's package", "none")
    return found


def _split(text: str) -> tuple[str, ...]:
    """Return operands, which are separated by commas outside of brackets."""
    parts, depth, begin = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            parts.append(text[begin:at])
            begin = at + 1
    return tuple(part.strip() for part in (*parts, text[begin:]) if part.strip())


_BODY = re.compile(r"(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)\s*(.*)$")


def parse_instruction(address: int, text: str, high: int) -> Instruction:
    """Return the instruction of a printed line and of the upper 64 bits of its code."""
    found = _BODY.match(text)
    if found is None:
        raise value_error("an instruction", "be a name and its operands", text)
    guard, name, modifiers, rest = found.groups()
    if name in ("BRX", "BRXU", "RET"):
        rest = rest.replace(" ", ", ", 1)  # printed without a comma
    control = high >> 41
    return Instruction(
        address,
        guard or "",
        name,
        tuple(m for m in modifiers.split(".") if m),
        _split(rest),
        stall=control & 15,
        yields=not control >> 4 & 1,
        written=control >> 5 & 7,
        read=control >> 8 & 7,
        waits=control >> 11 & 63,
        text=text,
    )


_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/")
_HIGH = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/\s*$")


def parse(lines: Iterable[str]) -> Iterator[tuple[str, list[Instruction]]]:
    """Yield symbol and instructions of every kernel in what ``cuobjdump -sass`` prints."""
    symbol, code, pending = "", list[Instruction](), None
    for line in lines:
        if "Function :" in line:
            if symbol:
                yield symbol, code
            symbol, code, pending = line.partition("Function :")[2].strip(), [], None
        elif found := _LINE.match(line):
            pending = int(found[1], 16), found[2]
        elif pending is not None and (found := _HIGH.match(line)):
            code.append(parse_instruction(*pending, int(found[1], 16)))
            pending = None
    if symbol:
        yield symbol, code


def jump_tables(cubin: bytes) -> dict[str, bytes]:
    """Return bank 2 of the constants of every kernel, relocations applied."""
    (offset,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, offset + i * size) for i in range(count)]
    strings = headers[names][4]
    sections = {}
    for name, _, _, _, begin, length in headers:
        end = cubin.index(b"\0", strings + name)
        sections[cubin[strings + name : end].decode()] = bytearray(cubin[begin : begin + length])
    bank, moved = ".nv.constant2.", ".rela.nv.constant2."
    for name, relocations in sections.items():
        if name.startswith(moved):
            table = sections[bank + name.removeprefix(moved)]
            for at, _, addend in struct.iter_unpack("<QQq", bytes(relocations)):
                struct.pack_into("<I", table, at, addend & 0xFFFFFFFF)
    return {n.removeprefix(bank): bytes(s) for n, s in sections.items() if n.startswith(bank)}


def demangle(symbols: Sequence[str]) -> list[str]:
    """Return readable names, without what all of this package's kernels have in common."""
    filters = [path for name in ("c++filt", "llvm-cxxfilt") if (path := shutil.which(name))]
    if not filters or not symbols:
        return list(symbols)
    done = subprocess.run(filters[:1], input="\n".join(symbols), capture_output=True, text=True)
    return [shorten(name) for name in done.stdout.splitlines()]


def shorten(name: str) -> str:
    """Return the part of a readable name that tells kernels apart.

    Example:
        >>> shorten("void dcconv::cuda::epilogue_kernel<dcconv::BFloat16, 8>(dcconv::cuda::P)")
        'epilogue<bfloat16, 8>'
    """
    depth, end = 0, len(name)
    for at in range(len(name) - 1, -1, -1):
        depth += (name[at] == ")") - (name[at] == "(")
        if name[at] == "(" and depth == 0:
            end = at
            break
    short = re.sub(r"\b(dcconv|cuda|portable)::", "", name[:end].removeprefix("void "))
    short = re.sub(r"\(anonymous namespace\)::|_kernel\b", "", short)
    return short.replace("BFloat16", "bfloat16").replace("Half", "float16")
