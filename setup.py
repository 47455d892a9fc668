# SPDX-License-Identifier: MIT
"""Builds ``dcconv._C``, one stable-ABI extension; ``dcconv/_build.py`` records what it holds.

Needs no GPU, no network and no git. Environment:

    DCCONV_BUILD          auto (default): CUDA if a toolkit is found, else CPU, else pure Python;
                          local: as auto, with code for this machine's GPUs and this processor's
                          instruction set alone;
                          cuda, cpu: exactly this or an error; none: pure Python
    DCCONV_VERBOSE        1: every compiler command whole, not a line per file; build.log in the
                          build folder has them in any case
    DCCONV_DEBUG          1: unoptimised C++ with debug information, line numbers in CUDA code
    TORCH_CUDA_ARCH_LIST  GPUs to compile for, as for every PyTorch extension
    CUDA_HOME, CXX, MAX_JOBS
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "local", "cuda", "cpu", "none")
# 9.0a has Hopper's own instructions; neither code for 9.x nor PTX for 12.0 runs on 10.0.
ARCHS = ("8.0", "8.6", "8.9", "9.0a", "10.0", "12.0")
TORCH_TARGET = "0x020a000000000000"  # PyTorch 2.10
PYTHON_TARGET = "0x030A0000"  # CPython 3.10
ISAS = ("baseline", "avx2", "avx512")
# Memory that one compiler may need for a template-heavy file.
GIB_PER_JOB = 3


def build_mode(environ: Mapping[str, str]) -> str:
    mode = environ.get("DCCONV_BUILD") or "auto"
    if mode not in MODES:
        raise ValueError(f"dcconv: DCCONV_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def usual_cuda_homes(prefix: Path = Path("/usr/local")) -> list[Path]:
    def version(home: Path) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", home.name)]

    return [prefix / "cuda", *sorted(prefix.glob("cuda-*"), key=version, reverse=True)]


def find_cuda_home(environ: Mapping[str, str], usual: Sequence[Path]) -> Path | None:
    """Return the first folder that has both the compiler and its headers.

    The ``nvcc`` on PATH may be a script that calls another one and has no headers beside it.
    """
    guesses = [Path(environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    nvcc = shutil.which("nvcc", path=environ.get("PATH", ""))
    if nvcc is not None:
        guesses += [Path(nvcc).parent.parent, Path(nvcc).resolve().parent.parent]
    for home in (*guesses, *usual):
        if (home / "include/cuda_runtime.h").is_file() and (home / "bin/nvcc").is_file():
            return home
    return None


def ask_nvcc(home: Path, option: str) -> str:
    command = [str(home / "bin/nvcc"), option]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def cuda_archs(environ: Mapping[str, str], known: str) -> str:
    """Return the list to compile for; ``known`` is what ``nvcc --list-gpu-arch`` prints.

    The newest one also gets PTX, from which the driver makes code for later GPUs.
    """
    if environ.get("TORCH_CUDA_ARCH_LIST"):
        return environ["TORCH_CUDA_ARCH_LIST"]
    targets = known.split()
    archs = [a for a in ARCHS if f"compute_{a.rstrip('a').replace('.', '')}" in targets]
    newest = [a for a in archs if not a.endswith("a")][-1:]
    return ";".join(f"{arch}+PTX" if arch in newest else arch for arch in archs)


def gencode(archs: str) -> list[str]:
    """Return nvcc's options for a list such as ``8.0;8.6;9.0a+PTX``; none for names of families.

    GPUs of one major version are compiled for its lowest in the list, then assembled for each:
    nvcc reads a file once per version that it compiles for, which is most of its time (7.9 s of
    CPU time in the place of 12.9 for 8.0, 8.6 and 8.9).
    """
    entries = re.split(r"[;\s]+", archs.strip())
    if not all(re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", entry) for entry in entries):
        return []
    options = []
    lowest: dict[str, str] = {}
    for entry in sorted(entries, key=lambda entry: float(re.sub(r"[af]?(\+PTX)?$", "", entry))):
        arch = entry.removesuffix("+PTX")
        number, major = arch.replace(".", ""), arch.partition(".")[0]
        own = number if arch[-1] in "af" else lowest.setdefault(major, number)
        options.append(f"-gencode=arch=compute_{own},code=sm_{number}")
        if entry != arch:
            options.append(f"-gencode=arch=compute_{own},code=compute_{own}")
    return options


def local_archs(capabilities: Iterable[tuple[int, int]]) -> str:
    """Return the list to compile for, given the compute capabilities of the GPUs that are there."""
    names = {f"{major}.{minor}{'a' * (major == 9)}" for major, minor in capabilities}
    return ";".join(sorted(names, key=lambda name: float(name.rstrip("a"))))


def local_isa(capability: str) -> str:
    """Return the best of ISAS for a processor, given what PyTorch calls its instruction set."""
    return next((isa for isa in reversed(ISAS) if capability.lower().startswith(isa)), ISAS[0])


def gpus_here() -> list[tuple[int, int]]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]


def why_no_library(environ: Mapping[str, str]) -> str | None:
    """Return None if a C++ extension can be built here, else the reason why not."""
    if os.name == "nt":
        return "its source is for GCC and Clang"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "free-threaded Python does not load limited-API extensions"
    compiler = shlex.split(environ.get("CXX") or "c++")[0]
    if shutil.which(compiler, path=environ.get("PATH", "")) is None:
        return f"no C++ compiler was found (looked for {compiler!r})"
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        return f"PyTorch does not import in the build environment ({error})"
    return None


def why_no_cuda(home: Path | None, torch_cuda: str | None) -> str | None:
    """Return None if CUDA code can be built for this PyTorch, else the reason why not."""
    if torch_cuda is None:
        return "the installed PyTorch is not a CUDA build"
    if home is None:
        return "no CUDA toolkit was found (set CUDA_HOME)"
    release = re.search(r"release ((\d+)\.\d+)", ask_nvcc(home, "--version"))
    if release is None or release[2] != torch_cuda.split(".")[0]:
        found = release[1] if release else "of unknown version"
        return f"the CUDA toolkit in {home} is {found}, PyTorch was built with {torch_cuda}"
    return None


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


def library(cuda_home: Path | None, debug: bool, isa: str | None = None) -> Extension:
    """Return the extension, with CUDA code if ``cuda_home`` is given.

    Args:
        cuda_home: the CUDA toolkit.
        debug: whether to compile for a debugger.
        isa: the one instruction set of the CPU kernels; None for every one.
    """
    from torch.utils import cpp_extension

    cpp_extension.min_supported_cpython = PYTHON_TARGET
    # -g0 and -fno-wrapv undo flags of Python's own build: size, and loops that do not vectorise.
    cxx = ["-O3", "-g0", "-fno-wrapv", "-fno-math-errno", "-fno-trapping-math"]
    if debug:
        cxx = ["-O0", "-g"]
    # The simd pragma only: PyTorch owns the threads.
    cxx += ["-fopenmp-simd", "-fvisibility=hidden"]
    nvcc = ["-O3", "-DUSE_CUDA", "-Xcompiler=-fvisibility=hidden", *["-lineinfo"] * debug]
    arguments: dict[str, Any] = {
        "include_dirs": [str(ROOT / "csrc")],
        "define_macros": [("TORCH_TARGET_VERSION", TORCH_TARGET)],
        "depends": sources("csrc/**/*.h", "csrc/**/*.inl", "csrc/**/*.cuh"),
        "extra_compile_args": {"cxx": cxx},
        "py_limited_api": True,
    }
    others = tuple(f"_{other}.cpp" for other in ISAS if isa not in (None, other))
    host = [f for f in sources("csrc/*.cpp", "csrc/cpu/**/*.cpp") if not f.endswith(others)]
    if cuda_home is None:
        return cpp_extension.CppExtension("dcconv._C", host, **arguments)
    # With these PyTorch adds none of its own, which read a file once per GPU.
    arguments["extra_compile_args"]["nvcc"] = nvcc + gencode(os.environ["TORCH_CUDA_ARCH_LIST"])
    return cpp_extension.CUDAExtension(
        "dcconv._C", host + sources("csrc/cuda/**/*.cu"), **arguments
    )


def shown(line: str, verbose: bool) -> str:
    """Return what a user sees of a line that a build prints: of a compiler command its file.

    Ninja's lines begin with a counter; a linker's command is the only other one. Messages of
    compilers stay whole.
    """
    if verbose:
        return line
    command = re.match(r"(\[\d+/\d+\] ).*?-c (?:-c )?(\S+)", line)
    if command is not None:
        file = Path(command[2])
        name = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
        return f"{command[1]}{name}\n"
    link = re.match(r"\S*(?:c\+\+|g\+\+|clang\+\+)\S* .*-shared .*-o (\S+)", line)
    return f"linking {Path(link[1]).name}\n" if link is not None else line


@contextmanager
def recorded(log: Path, verbose: bool) -> Iterator[None]:
    """Write what this process and its compilers print to ``log``, and show what a user reads."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    source, sink = os.pipe()

    def relay() -> None:
        with (
            open(source, encoding="utf-8", errors="replace") as lines,
            log.open("w", encoding="utf-8") as file,
            open(kept[0], "w", encoding="utf-8", errors="replace", closefd=False) as terminal,
        ):
            for line in lines:
                file.write(line)
                terminal.write(shown(line, verbose))
                terminal.flush()

    thread = threading.Thread(target=relay)
    thread.start()
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.close(sink)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, copy in enumerate(kept, start=1):
            os.dup2(copy, target)
        # The last copy of the pipe's end is closed: the thread reads its end and stops.
        thread.join()
        for copy in kept:
            os.close(copy)


def first_error(log: str) -> str | None:
    """Return the first line of compiler output that reports an error; later ones follow from it."""
    found = (line.strip() for line in log.splitlines() if re.search(r"\berror\s*:", line))
    return next(found, None)


class BuildLibrary(build_ext):
    """Builds as much as DCCONV_BUILD and this machine allow, and records the outcome."""

    def run(self) -> None:
        mode = build_mode(os.environ)
        # Finds the ninja of a virtual environment that is used without being activated.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        record: dict[str, str | None] = dict.fromkeys(
            ("REASON", "CUDA_REASON", "ARCHS", "ISA", "TORCH")
        )
        reason = "DCCONV_BUILD=none was set" if mode == "none" else why_no_library(os.environ)
        if reason is None:
            reason = self.build(mode, record)
        elif mode in ("cuda", "cpu"):
            raise RuntimeError(f"dcconv: DCCONV_BUILD={mode} cannot be met: {reason}")
        if reason is not None:
            print(f"dcconv: installing without the compiled library: {reason}")
            record["REASON"] = reason
            self.extensions = []
        self.write(record)

    def build(self, mode: str, record: dict[str, str | None]) -> str | None:
        """Compile, in auto mode without what does not compile; return why there is no library."""
        import torch

        record["TORCH"] = torch.__version__
        if mode == "local":
            record["ISA"] = local_isa(torch.backends.cpu.get_cpu_capability())
        home = find_cuda_home(os.environ, usual_cuda_homes())
        no_cuda = why_no_cuda(home, torch.version.cuda)
        if mode == "cuda" and no_cuda is not None:
            raise RuntimeError(f"dcconv: DCCONV_BUILD=cuda cannot be met: {no_cuda}")
        if mode == "cpu":
            no_cuda = "DCCONV_BUILD=cpu was set"
        if mode == "local" and no_cuda is None:
            here = local_archs(gpus_here())
            if here:
                os.environ["TORCH_CUDA_ARCH_LIST"] = here
            else:
                no_cuda = (
                    "this machine has no GPU that PyTorch sees, and DCCONV_BUILD=local was set"
                )
        if no_cuda is None and home is not None:
            archs = cuda_archs(os.environ, ask_nvcc(home, "--list-gpu-arch"))
            # Read by PyTorch's build helpers, the first when they are imported.
            os.environ |= {"CUDA_HOME": str(home), "TORCH_CUDA_ARCH_LIST": archs}
            failure = self.compile(mode, home, record["ISA"])
            if failure is None:
                record["ARCHS"] = archs
                return None
            no_cuda = f"its CUDA code did not compile: {failure}"
        print(f"dcconv: building without CUDA: {no_cuda}")
        record["CUDA_REASON"] = f"the compiled library has no CUDA code: {no_cuda}"
        failure = self.compile(mode, None, record["ISA"])
        return failure and f"it did not compile: {failure}"

    def compile(self, mode: str, cuda_home: Path | None, isa: str | None) -> str | None:
        """Return None on success, else what went wrong; modes cuda and cpu raise it."""
        import torch
        from torch.utils.cpp_extension import BuildExtension

        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
        jobs = max(1, min(os.cpu_count() or 1, memory // GIB_PER_JOB))
        os.environ.setdefault("MAX_JOBS", str(jobs))
        debug = os.environ.get("DCCONV_DEBUG") == "1"
        self.distribution.ext_modules = [library(cuda_home, debug, isa)]
        command = BuildExtension(self.distribution)
        command.inplace, command.build_lib = self.inplace, self.build_lib
        # A folder that stays, so that a second build compiles what changed, and one per variant.
        kind = "cpu" if cuda_home is None else "cuda"
        command.build_temp = str(ROOT / "build" / f"{kind}-torch-{torch.__version__}")
        log = Path(command.build_temp) / "build.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with recorded(log, os.environ.get("DCCONV_VERBOSE") == "1"):
                command.ensure_finalized()
                command.run()
        except Exception as error:
            if mode in ("cuda", "cpu"):
                raise
            return first_error(log.read_text(errors="replace")) or str(error)
        return None

    def write(self, record: dict[str, str | None]) -> None:
        folder = ROOT / "dcconv" if self.inplace else Path(self.build_lib) / "dcconv"
        if self.inplace and record["REASON"] is not None:
            for stale in folder.glob("_C.*"):
                stale.unlink()
        lines = [f"{name}: str | None = {value!r}" for name, value in record.items()]
        text = '"""What setup.py built; written by it."""\n\n' + "\n".join(lines) + "\n"
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "_build.py.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / "_build.py")


if __name__ == "__main__":
    # Stands for the real extension, which is put together only when a command builds it.
    every_source = sources("csrc/**/*.*")
    stand_in = Extension("dcconv._C", [], depends=every_source, py_limited_api=True)
    free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    setup(
        ext_modules=[stand_in],
        cmdclass={"build_ext": BuildLibrary},
        options={} if free_threaded else {"bdist_wheel": {"py_limited_api": "cp310"}},
    )
