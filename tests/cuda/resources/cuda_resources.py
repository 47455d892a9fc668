"""Registers, shared memory, stack and access widths of every compiled CUDA kernel, as a table.

    python tests/cuda/resources/cuda_resources.py    print the table of the built library
    ... --write    refresh cuda_resources.tsv, the committed table
    ... --check    compare with it; any difference fails

Read from the library itself with cuobjdump, so that no compiler output has to be kept. A cell is
``registers``, then ``+ shared`` where a kernel has static shared memory and ``! stack`` where it
has a stack frame: bytes, arrays that are indexed at run time and spilled registers together.
``load`` and ``store`` are the bits of the widest access to global memory, of the first
architecture. Kernels on ``double`` may use the stack, because CUDA's own trigonometry does;
others must not. Kernels named ``implicit_gemm`` must use tensor cores, asynchronous copies and
ldmatrix, and must keep everything else in registers.

Registers differ between releases of nvcc, and so the table names its release.
"""

from __future__ import annotations

import argparse
import difflib
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[3]
TABLE = Path(__file__).with_name("cuda_resources.tsv")

CACHE = ROOT / "build" / "cuda_resources"

REFRESH = "if this is intended: python tests/cuda/resources/cuda_resources.py --write"

# From sm_90 on every block has this much shared memory for the system, and cuobjdump counts it.
SYSTEM_SHARED = 1024

#: Bytes of the types that kernels are instantiated for.
SIZES = {"bfloat16": 2, "float16": 2, "float": 4, "double": 8}

#: What the names of tensor-core kernels contain.
TENSOR_CORE = "implicit_gemm"

#: Machine instructions that such kernels must have, with what they come from, and must not have.
REQUIRED = {"HMMA": "mma.sync", "LDGSTS": "cp.async", "LDSM": "ldmatrix"}
FORBIDDEN = frozenset({"LDL", "STL"})


class Usage(NamedTuple):
    """What one kernel uses on one architecture: registers a thread, bytes of the rest."""

    registers: int
    shared: int
    stack: int

    def __str__(self) -> str:
        shared = f" + {self.shared}" if self.shared else ""
        return f"{self.registers}{shared}" + (f" ! {self.stack}" if self.stack else "")


class Widths(NamedTuple):
    """Bits of the widest load from and store to global memory, 0 without one."""

    load: int
    store: int


class Resources(NamedTuple):
    """Everything the gate knows about one library.

    Attributes:
        release: of nvcc, such as ``13.0.88``; ``unknown`` where the library does not tell.
        ptx: the targets whose PTX it has, such as ``sm_120``.
        archs: the targets whose machine code it has, in order.
        usage: by kernel and architecture.
        widths: by kernel, on ``archs[0]``.
        instructions: those of ``REQUIRED`` and ``FORBIDDEN`` by kernel, on ``archs[0]``.
    """

    release: str
    ptx: list[str]
    archs: list[str]
    usage: dict[str, dict[str, Usage]]
    widths: dict[str, Widths]
    instructions: dict[str, frozenset[str]]


class MissingToolError(RuntimeError):
    """A program that reading a library needs is not installed."""


def find_cuobjdump() -> Path:
    """Return the toolkit's cuobjdump, or the one in Triton's package.

    Raises:
        MissingToolError: there is neither.
    """
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    homes += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    candidates = [home / "bin/cuobjdump" for home in homes]
    on_path = shutil.which("cuobjdump")
    if on_path is not None:
        candidates.insert(0, Path(on_path))
    # find_spec does not import the package, which wants a driver.
    spec = importlib.util.find_spec("triton")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        candidates.append(Path(folder) / "backends/nvidia/bin/cuobjdump")
    for candidate in candidates:
        if candidate.is_file() and os.access(candidate, os.X_OK):
            return candidate
    raise MissingToolError("cuobjdump was found neither in a CUDA toolkit nor in Triton's package")


def find_demangler() -> str:
    """Return a program that turns mangled names on its input into readable ones."""
    for name in ("c++filt", "cu++filt", "llvm-cxxfilt"):
        found = shutil.which(name)
        if found is not None:
            return found
    raise MissingToolError("no demangler was found (looked for c++filt, cu++filt, llvm-cxxfilt)")


def why_not() -> str | None:
    """Return None if libraries can be read here, else one sentence why not."""
    try:
        find_cuobjdump()
        find_demangler()
    except MissingToolError as missing:
        return str(missing)
    return None


def _dump(library: Path, *options: str, cwd: Path | None = None) -> str:
    command = [str(find_cuobjdump()), *options, str(library.resolve())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    if done.returncode != 0:
        said = (done.stderr.strip() or "no message").splitlines()[0]
        raise ValueError(f"dcconv: {library} must be a library with CUDA kernels, got {said!r}")
    return done.stdout


def demangle(symbols: Sequence[str]) -> dict[str, str]:
    """Return the readable name of every symbol."""
    text = "\n".join(symbols) + "\n"
    found = subprocess.run(
        [find_demangler()], input=text, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return dict(zip(symbols, found, strict=True))


def signature_end(name: str) -> int:
    """Return where the parameter list of a demangled function name begins."""
    depth = 0
    for at in range(len(name) - 1, -1, -1):
        depth += (name[at] == ")") - (name[at] == "(")
        if name[at] == "(" and depth == 0:
            return at
    return len(name)


def shorten(name: str) -> str:
    """Return the part of a demangled kernel name that tells kernels apart.

    Example:
        >>> shorten("void dcconv::(anonymous namespace)::dot_kernel<__half, 8, true>(dcconv::P<8>)")
        'dot<float16, 8, true>'
        >>> shorten("dcconv::scale_kernel(double const*, int)")
        'scale(double)'
    """
    end = signature_end(name)
    parameters = name[end:]
    ours = r"\b(dcconv|cuda|portable|c10|torch::headeronly)::"
    short = re.sub(ours, "", name[:end].removeprefix("void "))
    short = re.sub(r"\(anonymous namespace\)::|\{unnamed\}::", "", short)
    short = re.sub(r"\b(__nv_bfloat16|BFloat16)\b", "bfloat16", short)
    short = re.sub(r"\b(__half|Half)\b", "float16", short)
    short = re.sub(r"_kernel\b", "", short)
    # A kernel without template arguments shows its type in its parameters only.
    if "<" not in short and re.search(r"\bdouble\b", parameters):
        short += "(double)"
    return short


def may_use_stack(kernel: str) -> bool:
    """Whether a kernel works on double."""
    return re.search(r"\bdouble\b", kernel) is not None


def vector_bits(kernel: str) -> int:
    """Return the bits of one access that a kernel's name promises, 0 without a promise.

    The first template argument is the storage type, the first number the elements of an access.

    Example:
        >>> vector_bits("epilogue<bfloat16, Cosine, 8, true>"), vector_bits("window_norm<float>")
        (128, 0)
    """
    _, opened, inside = kernel.partition("<")
    arguments = [part.strip() for part in inside.rstrip(">").split(",")]
    if not opened or arguments[0] not in SIZES:
        return 0
    numbers = [int(part) for part in arguments[1:] if part.isdigit()]
    return 8 * SIZES[arguments[0]] * numbers[0] if numbers else 0


def parse_usage(text: str) -> Iterator[tuple[str, str, Usage]]:
    """Yield architecture, symbol and usage from the output of --dump-resource-usage."""
    arch = symbol = ""
    for line in text.splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ").strip()
        elif found := re.match(r"\s*Function (\S+):$", line):
            symbol = found[1]
        elif "REG:" in line and symbol:
            numbers = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", line)}
            shared = numbers["SHARED"]
            if int(re.sub(r"\D", "", arch)) >= 90:
                shared = max(0, shared - SYSTEM_SHARED)
            # ptxas puts spilled registers on the stack; LOCAL is memory of other origin.
            yield arch, symbol, Usage(numbers["REG"], shared, numbers["STACK"] + numbers["LOCAL"])
            symbol = ""


def parse_widths(sass: str) -> dict[str, Widths]:
    """Return the widest global accesses of every symbol in the output of -sass."""
    found: dict[str, Widths] = {}
    symbol = ""
    for line in sass.splitlines():
        if start := re.match(r"\s*Function : (\S+)", line):
            symbol = start[1]
            found[symbol] = Widths(0, 0)
        # LDG and STG know that an address is global, LD and ST find out at run time; LDGSTS goes
        # from global to shared memory.
        elif access := re.search(r"\s(LDG|LDGSTS|STG|LD|ST)\.([A-Z0-9_.]+)\s", line):
            bits = [int(part) for part in access[2].split(".") if part in ("64", "128", "256")]
            bits = bits or [8 if re.search(r"\.[US]8\b", line) else 16] * (
                re.search(r"\.[US](8|16)\b", line) is not None
            )
            width, old = max(bits, default=32), found[symbol]
            if access[1].startswith("LD"):
                found[symbol] = old._replace(load=max(old.load, width))
            else:
                found[symbol] = old._replace(store=max(old.store, width))
    return found


def parse_instructions(sass: str) -> dict[str, frozenset[str]]:
    """Return which of ``REQUIRED`` and ``FORBIDDEN`` every symbol in the output of -sass has."""
    found: dict[str, frozenset[str]] = {}
    symbol = ""
    for line in sass.splitlines():
        if start := re.match(r"\s*Function : (\S+)", line):
            symbol = start[1]
            found[symbol] = frozenset()
        # An address, perhaps a predicate, the instruction with its modifiers.
        elif code := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)\b", line):
            found[symbol] |= {code[1]} & (REQUIRED.keys() | FORBIDDEN)
    return found


def worse(one: frozenset[str], other: frozenset[str]) -> frozenset[str]:
    """Return what two kernels of one name both have, and what either must not have."""
    return (one & other) | ((one | other) & FORBIDDEN)


def broken_tensor_core_rules(kernel: str, instructions: frozenset[str]) -> list[str]:
    """Return one sentence per instruction that a kernel of this name must have, or must not.

    Example:
        >>> broken_tensor_core_rules("implicit_gemm<float16>", frozenset({"HMMA", "LDGSTS"}))
        ['implicit_gemm<float16> must use ldmatrix, got no LDSM']
        >>> broken_tensor_core_rules("filter_norm<float16>", frozenset())
        []
    """
    if TENSOR_CORE not in kernel:
        return []
    return [
        *(
            f"{kernel} must use {source}, got no {instruction}"
            for instruction, source in REQUIRED.items()
            if instruction not in instructions
        ),
        *(
            f"{kernel} must not use local memory, got {instruction}"
            for instruction in sorted(FORBIDDEN & instructions)
        ),
    ]


def _release(library: Path) -> str:
    """Return the release of nvcc that a library's machine code names."""
    files = re.findall(r"ELF file +\d+: (\S+)", _dump(library, "-lelf"))
    with tempfile.TemporaryDirectory() as folder:
        if files:
            _dump(library, "-xelf", files[-1], cwd=Path(folder))
        for path in Path(folder).iterdir():
            found = re.search(
                rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", path.read_bytes()
            )
            if found:
                return found[1].decode()
    return "unknown"


def _order(arch: str) -> tuple[int, str]:
    return int(re.sub(r"\D", "", arch)), arch


def read(library: Path) -> Resources:
    """Read a library's kernels.

    Raises:
        MissingToolError: a program that this needs is not installed.
        ValueError: the library has no machine code for GPUs.
    """
    rows = list(parse_usage(_dump(library, "--dump-resource-usage")))
    if not rows:
        raise ValueError(f"dcconv: {library} must be a library with CUDA kernels, got none")
    archs = sorted({arch for arch, _, _ in rows}, key=_order)
    readable = demangle(sorted({symbol for _, symbol, _ in rows}))
    names = {symbol: shorten(name) for symbol, name in readable.items()}
    usage: dict[str, dict[str, Usage]] = {}
    for arch, symbol, used in rows:
        kernel = usage.setdefault(names[symbol], {})
        # The same template in two files, or two kernels with one short name: keep the worse.
        kernel[arch] = Usage(*map(max, used, kernel.get(arch, used)))
    widths: dict[str, Widths] = {}
    sass = _dump(library, "-sass", "-arch", archs[0])
    for symbol, found in parse_widths(sass).items():
        if symbol in names:
            widths[names[symbol]] = Widths(*map(max, found, widths.get(names[symbol], found)))
    instructions: dict[str, frozenset[str]] = {}
    for symbol, some in parse_instructions(sass).items():
        if symbol in names:
            name = names[symbol]
            instructions[name] = worse(some, instructions.get(name, some))
    ptx = re.findall(r"PTX file +\d+: \S*?\.(sm_\w+)\.ptx", _dump(library, "-lptx"))
    return Resources(
        _release(library), sorted(set(ptx), key=_order), archs, usage, widths, instructions
    )


def _as_json(found: Resources) -> str:
    *others, instructions = found
    return json.dumps([*others, {kernel: sorted(some) for kernel, some in instructions.items()}])


def _of_json(text: str) -> Resources:
    release, ptx, archs, usage, widths, instructions = json.loads(text)
    return Resources(
        release,
        ptx,
        archs,
        {kernel: {arch: Usage(*u) for arch, u in by.items()} for kernel, by in usage.items()},
        {kernel: Widths(*w) for kernel, w in widths.items()},
        {kernel: frozenset(i) for kernel, i in instructions.items()},
    )


def read_once(library: Path) -> Resources:
    """Return what ``read`` does; processes that read the same library do it once between them.

    Disassembling takes most of a minute. What is kept, under ``build``, is named after the contents
    of the library and of this file.
    """
    contents = library.read_bytes() + Path(__file__).read_bytes() + bytes(find_cuobjdump())
    digest = hashlib.sha256(contents).hexdigest()[:20]
    CACHE.mkdir(parents=True, exist_ok=True)
    kept = CACHE / f"{digest}.json"
    with (CACHE / f"{digest}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.is_file():
            write(kept, _as_json(read(library)))
    return _of_json(kept.read_text(encoding="utf-8"))


def table(found: Resources) -> str:
    """Return the table as text: a line about the library, titles, one line per kernel."""
    lines = [f"# nvcc {found.release}, PTX {' '.join(found.ptx) or 'none'}"]
    lines.append("\t".join(["kernel", *found.archs, "load", "store"]))
    for kernel in sorted(found.usage):
        cells = [str(found.usage[kernel].get(arch, "-")) for arch in found.archs]
        load, store = found.widths.get(kernel, Widths(0, 0))
        lines.append("\t".join([kernel, *cells, str(load), str(store)]))
    return "\n".join(lines) + "\n"


def release_of(text: str) -> str:
    """Return the release of nvcc that a table was made with."""
    found = re.match(r"# nvcc ([^,\s]+),", text)
    return found[1] if found else "unknown"


def columns(text: str, wanted: Sequence[str]) -> str:
    """Return a table with its names, its widths, and only the wanted architectures."""
    rows = [line.split("\t") for line in text.splitlines() if not line.startswith("#")]
    kept = [i for i, title in enumerate(rows[0]) if not title.startswith("sm_") or title in wanted]
    return "".join("\t".join(row[i] for i in kept) + "\n" for row in rows)


def broken_rules(found: Resources) -> list[str]:
    """Return one sentence per stack frame, and per kernel without what its name promises."""
    wrong = []
    for kernel, by_arch in sorted(found.usage.items()):
        if not may_use_stack(kernel):
            wrong += [
                f"{kernel} must not spill or use a stack, got {used.stack} bytes on {arch}"
                for arch, used in by_arch.items()
                if used.stack
            ]
        promised = vector_bits(kernel)
        widest = max(found.widths.get(kernel, Widths(0, 0)))
        if promised == 128 and widest < promised:
            wrong.append(f"{kernel} must access memory {promised} bits at a time, got {widest}")
        wrong += broken_tensor_core_rules(kernel, found.instructions.get(kernel, frozenset()))
    return wrong


def differences(found: Resources, committed: str) -> list[str]:
    """Return a diff to the committed table over the architectures that both have."""
    now = table(found)
    shared = [arch for arch in found.archs if arch in committed.splitlines()[1].split("\t")]
    # The first architecture of another build is another one, and so are its widths.
    return list(
        difflib.unified_diff(
            columns(committed, shared).splitlines(),
            columns(now, shared).splitlines(),
            "committed",
            "built",
            lineterm="",
            n=0,
        )
    )


def not_comparable(found: Resources, committed: str) -> str | None:
    """Return one sentence why only the rules apply, None if the numbers can be compared."""
    release = release_of(committed)
    if found.release != release:
        return f"the committed table is of nvcc {release}, this library of {found.release}"
    titles = committed.splitlines()[1].split("\t")
    if found.archs[0] not in titles:
        return f"the committed table has no {found.archs[0]}"
    if found.archs[0] != titles[1]:
        return f"the committed table begins with {titles[1]}, this library with {found.archs[0]}"
    return None


def write(path: Path, text: str) -> None:
    """Write a text file in one step: readers see the old text or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def built_library() -> Path:
    """Return the library of this checkout, or of the installed package."""
    local = ROOT / "dcconv/_C.abi3.so"
    if local.exists():
        return local
    spec = importlib.util.find_spec("dcconv._C")
    if spec is None or spec.origin is None:
        raise MissingToolError("the compiled library is missing: make build")
    return Path(spec.origin)


def main(arguments: Sequence[str] | None = None) -> int:
    own = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    own.add_argument("--library", type=Path, help="the library to read (the one built here)")
    own.add_argument("--table", type=Path, default=TABLE, help="the table to write or compare with")
    action = own.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="refresh the committed table")
    action.add_argument("--check", action="store_true", help="compare with the committed table")
    options = own.parse_args(arguments)
    try:
        found = read_once(options.library or built_library())
    except (MissingToolError, ValueError) as wrong:
        print(wrong, file=sys.stderr)
        return 2
    text = table(found)
    problems = broken_rules(found)
    if options.write:
        write(options.table, text)
        print(f"{options.table}: {len(found.usage)} kernels, {len(found.archs)} architectures")
    elif options.check:
        if not options.table.exists():
            problems.append(f"{options.table} does not exist; {REFRESH}")
        else:
            committed = options.table.read_text(encoding="utf-8")
            reason = not_comparable(found, committed)
            if reason is not None:
                print(f"numbers not compared: {reason}")
            elif changed := differences(found, committed):
                problems += [*changed, REFRESH]
    else:
        print(text, end="")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
