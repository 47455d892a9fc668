"""The kernels of a compiled library, by architecture and name."""

from __future__ import annotations

import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from bench.machine.disassemble import Kernel, demangle, find_tool, jump_tables, parse
from dcconv import native
from dcconv.operator.checks import value_error

#: From sm_90 on, cuobjdump counts this much shared memory of the system in every block.
SYSTEM_SHARED = 1024


def built() -> Path:
    """Return the compiled library of this checkout.

    Raises:
        ValueError: there is none.
    """
    folder = Path(native.__file__).parent
    found = sorted(folder.glob("_C*.so"))
    if not found:
        raise value_error("library", "be given where dcconv has no compiled library", None)
    return found[0]


class Library:
    """A library with CUDA code, or a single cubin.

    Args:
        path: of the file.

    Raises:
        ValueError: the file has no CUDA code, or there is no disassembler.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise value_error("library", "be a file", str(path))
        self._folder = tempfile.TemporaryDirectory(prefix="dcconv-machine-")
        self._kept: dict[tuple[str, str], Kernel] = {}
        self._usage: dict[str, dict[str, tuple[Path, dict[str, int]]]] = {}
        self._names: dict[str, dict[str, str]] = {}
        self.archs = self._archs()

    def _dump(self, *options: str, file: Path | None = None) -> str:
        command = [find_tool("cuobjdump"), *options, str((file or self.path).resolve())]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self._folder.name)
        return done.stdout if done.returncode == 0 else ""

    def _archs(self) -> list[str]:
        found = re.findall(r"ELF file +\d+: \S+?\.(sm_\w+)\.cubin", self._dump("-lelf"))
        if not found:
            raise value_error("library", "have CUDA code", str(self.path))
        return sorted(set(found), key=lambda arch: (int(re.sub(r"\D", "", arch)), arch))

    def _need(self, arch: str) -> None:
        if arch not in self.archs:
            raise value_error("arch", f"be one of {', '.join(self.archs)}", arch)

    def _cubins(self, arch: str) -> list[Path]:
        if self.path.suffix == ".cubin":
            return [self.path]
        folder = Path(self._folder.name)
        self._dump("-xelf", f".{arch}.cubin")
        return sorted(folder.glob(f"*.{arch}.cubin"))

    def _read(self, arch: str) -> dict[str, tuple[Path, dict[str, int]]]:
        """Return by symbol where a kernel is and what it uses."""
        self._need(arch)
        if arch not in self._usage:
            found = {}
            for cubin in self._cubins(arch):
                symbol = ""
                for line in self._dump("--dump-resource-usage", file=cubin).splitlines():
                    if named := re.match(r"\s*Function (\S+):$", line):
                        symbol = named[1]
                    elif "REG:" in line and symbol:
                        numbers = re.findall(r"\b([A-Z]+):(\d+)", line)
                        found[symbol] = cubin, {key: int(value) for key, value in numbers}
            self._usage[arch] = found
            names = demangle(list(found))
            self._names[arch] = dict(zip(found, names, strict=True))
        return self._usage[arch]

    def names(self, arch: str) -> dict[str, str]:
        """Return the readable name of every symbol of an architecture."""
        self._read(arch)
        return self._names[arch]

    def find(self, pattern: str, arch: str) -> list[Kernel]:
        """Return the kernels whose readable name or symbol has the text, in order of names.

        Raises:
            ValueError: there is none, or the library has no code for the architecture.
        """
        names = self.names(arch)
        found = sorted(
            (name, symbol) for symbol, name in names.items() if pattern in name or pattern == symbol
        )
        if not found:
            rule = f"be part of the name of one of the {len(names)} kernels for {arch}"
            raise value_error("kernel", rule, pattern)
        return [self.kernel(symbol, arch) for _, symbol in found]

    def kernel(self, symbol: str, arch: str) -> Kernel:
        """Return the kernel of a symbol."""
        if (symbol, arch) not in self._kept:
            every = self._read(arch)
            if symbol not in every:
                raise value_error("kernel", f"be one of the library's for {arch}", symbol)
            cubin, usage = every[symbol]
            lines = self._dump("-sass", "-fun", symbol, file=cubin).splitlines()
            code = dict(parse(lines))[symbol]
            system = SYSTEM_SHARED if int(re.sub(r"\D", "", arch)) >= 90 else 0
            self._kept[symbol, arch] = Kernel(
                symbol,
                self._names[arch][symbol],
                arch,
                tuple(code),
                usage["REG"],
                max(0, usage["SHARED"] - system),
                usage["STACK"],
                _tables(cubin).get(symbol, b""),
            )
        return self._kept[symbol, arch]


@cache
def _tables(cubin: Path) -> dict[str, bytes]:
    return jump_tables(cubin.read_bytes())
