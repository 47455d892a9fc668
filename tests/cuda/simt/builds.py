"""The three builds of emulated kernels: how they are compiled, and how their processes are run.

``fast`` runs CUDA threads as fibers; ``address`` adds AddressSanitizer and
UndefinedBehaviorSanitizer to it; ``thread`` is ThreadSanitizer with one thread of the operating
system per CUDA thread. What is compiled lies under ``build/simt``, named after what it was made of.
Processes may share that folder: one compiles, others who want the same wait for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SIMT = Path(__file__).resolve().parent
ROOT = SIMT.parents[2]
CACHE = ROOT / "build" / "simt"
COMPILER = "g++"

# What a sanitizer's finding ends a process with; an aborting model ends it with SIGABRT.
REPORTED = 66

COMMON = ("-std=c++17", "-g", "-Wall", "-Wextra", "-ffp-contract=off", "-fPIC", f"-I{SIMT}")


@dataclass(frozen=True)
class Build:
    """A way to compile emulated kernels.

    Args:
        name: names it in folders, tests and messages.
        flags: the compiler's, besides those of every build.
        libraries: what has to be loaded before a Python process loads an extension.
    """

    name: str
    flags: tuple[str, ...]
    libraries: tuple[str, ...] = ()


FAST = Build("fast", ("-O2",))
ADDRESS = Build(
    "address",
    (
        "-O1",
        "-fno-omit-frame-pointer",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ),
    # Python does not load libstdc++, and a sanitizer looks up what it wraps there only once.
    ("libasan.so", "libubsan.so", "libstdc++.so"),
)
# GCC inlines a memset of a known size without a word to ThreadSanitizer.
THREAD = Build(
    "thread",
    (
        "-O1",
        "-fno-omit-frame-pointer",
        "-fno-builtin-memset",
        "-fsanitize=thread",
        "-DSIMT_OS_THREADS",
    ),
    ("libtsan.so", "libstdc++.so"),
)
BUILDS = (FAST, ADDRESS, THREAD)


class CompileError(RuntimeError):
    """The compiler's own words."""


def compile_executable(
    name: str, sources: Sequence[Path], build: Build, flags: Iterable[str] = ()
) -> Path:
    """Return an executable made of ``sources``, compiled unless an equal one was before."""
    return _compile(name, sources, [*COMMON, *build.flags, *flags, "-pthread"], build)


def compile_extension(
    name: str, sources: Sequence[Path], build: Build, flags: Iterable[str] = ()
) -> Path:
    """Return a Python extension made of ``sources``; its folder goes on ``sys.path``.

    Args:
        name: the module's, as in ``PYBIND11_MODULE``.
        sources: C++ files.
        build: one of ``BUILDS``.
        flags: more of the compiler's, include folders among them.
    """
    import pybind11

    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    return _compile(
        f"{name}.so",
        sources,
        [
            *COMMON,
            *build.flags,
            "-shared",
            "-fvisibility=hidden",
            *(f"-isystem{folder}" for folder in includes),
            *flags,
            "-pthread",
        ],
        build,
    )


def compile_library(
    name: str,
    sources: Mapping[Path, Sequence[str]],
    build: Build,
    link_flags: Iterable[str] = (),
) -> Path:
    """Return a shared library of CUDA and C++ sources, each compiled by itself, side by side.

    Args:
        name: of the file, without its ending.
        sources: .cu and .cpp files, each with more flags for the compiler.
        build: one of ``BUILDS``.
        link_flags: libraries to link with.
    """
    own = [*COMMON, *build.flags, "-fvisibility=hidden", "-pthread"]

    def compile_object(source: Path) -> Path:
        return _compile(f"{source.stem}.o", [source], ["-c", *own, *sources[source]], build)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_object, sources))
    link = [*build.flags, "-shared", "-pthread", *link_flags]
    recipe = json.dumps([_version(), *map(str, objects), *link])
    target = CACHE / f"{name}-{build.name}-{hashlib.sha256(recipe.encode()).hexdigest()[:20]}"
    output = target / f"{name}.so"
    with _locked(target.name):
        if not output.is_file():
            target.mkdir(exist_ok=True)
            part = output.with_suffix(".part")
            command = [COMPILER, *map(str, objects), *link, "-o", str(part)]
            made = subprocess.run(command, capture_output=True, text=True, check=False)
            if made.returncode:
                raise CompileError(f"{shlex.join(command)}\n{made.stderr}")
            os.replace(part, output)
    return output


def environment(build: Build) -> dict[str, str]:
    """Return the environment in which a plain Python loads an extension of ``build``."""
    variables = dict(os.environ)
    for name in ("LD_PRELOAD", "ASAN_OPTIONS", "UBSAN_OPTIONS", "TSAN_OPTIONS"):
        variables.pop(name, None)
    if build.libraries:
        variables["LD_PRELOAD"] = " ".join(_library(library) for library in build.libraries)
    # Python itself leaks at exit; a stack that ends in an unknown frame is enough to find a kernel.
    variables["ASAN_OPTIONS"] = f"detect_leaks=0:exitcode={REPORTED}"
    variables["UBSAN_OPTIONS"] = f"print_stacktrace=1:exitcode={REPORTED}"
    variables["TSAN_OPTIONS"] = f"halt_on_error=1:atexit_sleep_ms=0:exitcode={REPORTED}"
    return variables


def run(
    command: Sequence[str | Path],
    build: Build,
    variables: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run a command in the build's environment; its output is captured."""
    return subprocess.run(
        [*prefix(build), *map(str, command)],
        env={**environment(build), **(variables or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def why_not(build: Build) -> str | None:
    """Return why the build cannot be made and run here, None if it can."""
    if shutil.which(COMPILER) is None:
        return f"{COMPILER} was not found"
    return _probe(build)[1]


def prefix(build: Build) -> tuple[str, ...]:
    """Return what stands before a command of this build; the compiler has to be there."""
    return _probe(build)[0]


@functools.cache
def _probe(build: Build) -> tuple[tuple[str, ...], str | None]:
    """Return the prefix with which an empty program runs, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cpp"
        source.write_text("int main() { return 0; }\n")
        command = [COMPILER, *build.flags, str(source), "-o", str(source.with_suffix(""))]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            return (), f"{COMPILER} cannot make the {build.name} build: {made.stderr.strip()}"
        said = ""
        # ThreadSanitizer has fixed ideas of where memory lies, which address space layout
        # randomisation of many bits defeats.
        for before in ((), ("setarch", "-R")):
            if before and shutil.which(before[0]) is None:
                continue
            ran = subprocess.run(
                [*before, str(source.with_suffix(""))], capture_output=True, text=True, check=False
            )
            if ran.returncode == 0:
                return before, None
            said = said or ran.stderr.strip() or f"exit status {ran.returncode}"
        return (), f"a program of the {build.name} build does not start: {said}"


@functools.cache
def _library(name: str) -> str:
    command = [COMPILER, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return str(Path(path).resolve())


@functools.cache
def _version() -> str:
    command = [COMPILER, "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _dependencies(depfile: Path) -> list[Path]:
    """Return the files that a make rule written by the compiler names."""
    rule = depfile.read_text().replace("\\\n", " ")
    return [Path(word) for word in shlex.split(rule.partition(": ")[2])]


def _digest(recipe: str, dependencies: Iterable[Path]) -> str | None:
    """Return a name for what the recipe makes of these files, None if one is missing."""
    digest = hashlib.sha256(recipe.encode())
    for path in dependencies:
        if not path.is_file():
            return None
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:20]


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    """Keep other threads and processes from making what has this name in the cache."""
    locks = CACHE / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    # The file stays: a lock on a name that another process has removed would be no lock.
    with (locks / name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(file: str, sources: Sequence[Path], flags: Sequence[str], build: Build) -> Path:
    # A .cu file is C++ here.
    command = [COMPILER, "-x", "c++", *(str(Path(source).resolve()) for source in sources), *flags]
    recipe = json.dumps([_version(), command])
    stem = f"{Path(file).stem}-{build.name}"
    recipe_name = f"{stem}-{hashlib.sha256(recipe.encode()).hexdigest()[:20]}"
    with _locked(recipe_name):
        return _compile_locked(file, command, recipe, stem, recipe_name)


def _compile_locked(
    file: str, command: Sequence[str], recipe: str, stem: str, recipe_name: str
) -> Path:
    # The headers that the last compilation of this recipe read. They tell what to compare now; a
    # header can only come in through a change in one of them.
    known = CACHE / f"{recipe_name}.json"
    if known.is_file():
        digest = _digest(recipe, map(Path, json.loads(known.read_text())))
        if digest is not None and (CACHE / f"{stem}-{digest}" / file).is_file():
            return CACHE / f"{stem}-{digest}" / file
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        folder = Path(name)
        output, depfile = folder / file, folder / "rule.d"
        while True:
            started = time.time()
            # -MMD leaves out the system's headers, and those under -isystem.
            made = subprocess.run(
                [*command, "-o", str(output), "-MMD", "-MF", str(depfile)],
                capture_output=True,
                text=True,
                check=False,
            )
            if made.returncode:
                raise CompileError(f"{shlex.join(command)}\n{made.stderr}")
            read = _dependencies(depfile)
            if all(path.stat().st_mtime < started for path in read):
                break
        digest = _digest(recipe, read)
        (folder / "read.json").write_text(json.dumps([str(path) for path in read]))
        target = CACHE / f"{stem}-{digest}"
        target.mkdir(exist_ok=True)
        os.replace(output, target / file)
        os.replace(folder / "read.json", known)
    return target / file
