"""The SIMT model itself: right kernels give right values, faulty ones are found and named."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import builds
import pytest
from builds import ADDRESS, BUILDS, FAST, REPORTED, THREAD, Build

ABORTED = -6

RIGHT = (
    "index",
    "reduce",
    "pipeline",
    "turn",
    "shuffle",
    "shuffle_chain",
    "arithmetic",
    "pieces",
    "schedule",
    "host_threads",
)

# Faults that the model names itself, with what it has to say in every build.
NAMED = {
    "divergent_exit": r"block \(0, 0, 0\): divergent collective: .*threads? \d+(-\d+)? "
    r"waiting at __shfl_xor_sync of width 8, .*threads? \d+(-\d+)? exited",
    "divergent_kind": r"block \(0, 0, 0\): divergent collective: threads 32-47 waiting at "
    r"__shfl_xor_sync of width 32, threads 48-63 waiting at __shfl_down_sync of width 32",
    "divergent_width": r"block \(0, 0, 0\): divergent collective: thread 32 waiting at "
    r"__shfl_sync of width 32, thread 33 waiting at __shfl_sync of width 16, threads 34-63",
    "divergent_barrier": r"block \(0, 0, 0\): divergent collective: .*__syncthreads.*__syncwarp",
    "partial_mask": r"block \(0, 0, 0\): thread \d+: __shfl_down_sync: "
    r"mask must be 0xffffffff, got 0x0000ffff",
    "bad_width": r"block \(0, 0, 0\): thread \d+: __shfl_down_sync: "
    r"width must be a power of two up to 32, got 12",
    "early_exit": r"block \(0, 1, 0\): deadlock: __syncthreads is not reached by every thread: "
    r".*waiting at __syncthreads.*threads? 6[0-3](-6[1-3])? exited",
    "early_exit_of_warp": r"block \(0, 0, 0\): deadlock: __syncthreads is not reached by every "
    r"thread: .*waiting at __syncthreads.*exited",
    "shared_beyond_launch": r"block \(0, 0, 0\): thread \d+: shared piece 1 of 132 bytes begins "
    r"at byte 128, the launch gave 256",
    "shared_disagreement": r"block \(0, 0, 0\): thread \d+: takes (32|64) bytes as shared piece 0, "
    r"another thread took (64|32)",
    "nested_launch": r"block \(0, 0, 0\): thread \d+: launches 'inner' from inside a kernel",
}


def usable(build: Build) -> Build:
    reason = builds.why_not(build)
    if reason is not None:
        pytest.skip(reason)
    return build


@pytest.fixture(params=BUILDS, ids=lambda build: build.name)
def build(request: pytest.FixtureRequest) -> Build:
    return usable(request.param)


def run(build: Build, *arguments: object) -> subprocess.CompletedProcess[str]:
    program = builds.compile_executable(
        "self_test", [builds.SIMT / "self_test.cpp"], usable(build), ["-Werror"]
    )
    return builds.run(
        [program, *map(str, arguments)], build, {"SIMT_WATCHDOG_SECONDS": "20"}, timeout=60
    )


def in_python(build: Build, code: str) -> subprocess.CompletedProcess[str]:
    # Most of this is pybind11's, which takes the compiler three times as long with -O1.
    extension = builds.compile_extension(
        "self_test_extension", [builds.SIMT / "self_test_extension.cpp"], build, ["-O0"]
    )
    start = f"import sys; sys.path.insert(0, {str(extension.parent)!r}); import numpy as np\n"
    return builds.run(
        [sys.executable, "-c", start + "import self_test_extension as kernels\n" + code], build
    )


@pytest.mark.parametrize("command", RIGHT)
def test_right_kernels_give_right_values(build: Build, command: str) -> None:
    for seed in (1, 2) if build is THREAD else range(20):
        done = run(build, command, seed)
        assert done.returncode == 0, (seed, done.stdout, done.stderr)


def test_right_kernels_give_right_values_with_blocks_one_after_another() -> None:
    for command in ("index", "pipeline", "pieces"):
        done = run(THREAD, command, 1, 1)
        assert done.returncode == 0, (done.stdout, done.stderr)


def test_other_variants_of_the_model_give_right_values() -> None:
    flags = ["-std=c++20", "-Wpedantic", "-DSIMT_UCONTEXT", "-O0", "-Werror"]
    program = builds.compile_executable(
        "self_test", [builds.SIMT / "self_test.cpp"], usable(FAST), flags
    )
    for command in RIGHT:
        done = builds.run([program, command, "3"], FAST)
        assert done.returncode == 0, (command, done.stdout, done.stderr)


@pytest.mark.parametrize("fault", NAMED)
def test_faults_abort_with_block_and_thread(build: Build, fault: str) -> None:
    done = run(build, fault)
    assert done.returncode == ABORTED, (done.stdout, done.stderr)
    assert re.search(f"simt: kernel 'faulty', {NAMED[fault]}", done.stderr), done.stderr


def test_calls_outside_kernels_abort(build: Build) -> None:
    done = run(build, "outside")
    assert done.returncode == ABORTED
    assert "simt: __syncthreads is used outside a kernel" in done.stderr


def test_watchdog_names_the_thread_that_never_comes() -> None:
    program = builds.compile_executable(
        "self_test", [builds.SIMT / "self_test.cpp"], usable(THREAD), ["-Werror"]
    )
    done = builds.run([program, "spin"], THREAD, {"SIMT_WATCHDOG_SECONDS": "1"}, timeout=60)
    assert done.returncode == ABORTED
    assert re.search(
        r"block \(0, 0, 0\): thread \d+: watchdog: waiting at __syncthreads for more than 1 s: "
        r".*thread 5 running",
        done.stderr,
    ), done.stderr


@pytest.mark.parametrize("fault", ["pipeline_race", "turn_race", "warp_race"])
def test_missing_barriers_change_values(fault: str) -> None:
    for build in (FAST, ADDRESS):
        codes = [run(build, fault, seed).returncode for seed in range(8)]
        assert 1 in codes, codes


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("fault", ["pipeline_race", "turn_race"])
def test_missing_barriers_are_data_races(fault: str, blocks: int) -> None:
    done = run(THREAD, fault, 1, blocks)
    assert done.returncode == REPORTED, (done.stdout, done.stderr)
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
    kernel = fault.replace("_race", "_kernel")
    assert re.search(rf"{kernel}<false>.*self_test\.cpp:\d+", done.stderr), done.stderr


def test_other_warps_are_not_ordered_by_collectives_of_a_warp() -> None:
    done = run(THREAD, "warp_race", 1)
    assert done.returncode == REPORTED
    assert "WARNING: ThreadSanitizer: data race" in done.stderr


@pytest.mark.parametrize("fault", ["block_race", "neighbour_race"])
def test_blocks_that_meet_are_a_data_race_when_they_run_at_once(fault: str) -> None:
    assert run(THREAD, fault, 1, 1).returncode == 0
    done = run(THREAD, fault, 1, 2)
    assert done.returncode == REPORTED
    assert "WARNING: ThreadSanitizer: data race" in done.stderr


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        ("shared_overrun", "AddressSanitizer: heap-buffer-overflow"),
        ("global_overrun", "AddressSanitizer: heap-buffer-overflow"),
        ("misaligned", "runtime error: .* misaligned address .* which requires 16 byte alignment"),
    ],
)
def test_bad_accesses_are_reported(fault: str, report: str) -> None:
    done = run(ADDRESS, fault)
    assert done.returncode == REPORTED, (done.stdout, done.stderr)
    assert re.search(report, done.stderr), done.stderr
    assert re.search(r"self_test\.cpp:\d+", done.stderr), done.stderr


def test_bad_launches_throw(build: Build) -> None:
    done = run(build, "bad_launches")
    assert done.returncode == 0, (done.stdout, done.stderr)
    threads = "simt: launch of 'faulty': threads must be a multiple of 32 up to 1024, got "
    grid = (
        "simt: launch of 'faulty': grid must be at least (1, 1, 1) and at most "
        "(2147483647, 65535, 65535), got "
    )
    assert done.stdout.splitlines() == [
        *(threads + got for got in ("0", "33", "1056")),
        *(grid + got for got in ("(0, 1, 1)", "(2147483648, 1, 1)", "(1, 65536, 1)")),
        grid + "(1, 1, 65536)",
        "simt: launch of 'faulty': shared memory must be at most 49152 bytes without "
        "allow_shared, got 49153",
        "simt: shared memory must be at most 232448 bytes, got 233472",
    ]


def test_much_shared_memory_is_allowed_for_one_launch(build: Build) -> None:
    done = run(build, "large_shared")
    assert done.returncode == 3, (done.stdout, done.stderr)
    assert done.stdout == ""
    assert "simt: launch of 'large': shared memory must be at most 49152" in done.stderr


def test_schedules_follow_the_seed() -> None:
    orders = [run(FAST, "schedule", seed).stdout for seed in (1, 1, 2, 3)]
    assert orders[0] == orders[1]
    assert len(set(orders)) == 3
    threads = list(map(int, orders[0].split()))
    assert sorted(threads) == list(range(8 * 64))
    blocks = [thread // 64 for thread in threads[::64]]
    assert blocks != sorted(blocks)
    lanes = [thread % 32 for thread in threads[:32]]
    assert lanes != sorted(lanes)


def test_extensions_load_and_run(build: Build) -> None:
    done = in_python(
        build,
        "x = np.arange(256, dtype=np.float32)\n"
        "y = kernels.turn(x, 4, True)\n"
        "assert (y.reshape(4, 64) == x.reshape(4, 64)[:, ::-1]).all()\n"
        "try:\n"
        "    kernels.turn(x, 0, True)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n",
    )
    assert done.returncode == 0, done.stderr
    assert "simt: launch of 'turn': grid must be at least" in done.stdout


def test_extensions_report_what_is_wrong() -> None:
    race = in_python(usable(THREAD), "kernels.turn(np.zeros(64, np.float32), 1, False)")
    assert race.returncode == REPORTED, race.stderr
    assert re.search(r"data race[^$]*turn_kernel<false>.*self_test_extension\.cpp", race.stderr)
    # numpy's array ends after three blocks.
    overrun = in_python(usable(ADDRESS), "kernels.turn(np.zeros(192, np.float32), 4, True)")
    assert overrun.returncode == REPORTED, overrun.stderr
    assert re.search(r"heap-buffer-overflow[^$]*turn_kernel<true>", overrun.stderr)


def test_compiled_files_follow_their_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builds, "CACHE", tmp_path / "cache")
    usable(FAST)
    source, header = tmp_path / "number.cpp", tmp_path / "number.h"
    source.write_text('#include "number.h"\nint main() { return NUMBER; }\n')

    def number(*flags: str) -> tuple[int, Path]:
        program = builds.compile_executable("number", [source], FAST, flags)
        return builds.run([program], FAST).returncode, program

    header.write_text("#define NUMBER 3\n")
    three, first = number()
    made = first.stat().st_mtime_ns
    assert number() == (3, first)
    assert first.stat().st_mtime_ns == made
    header.write_text("#define NUMBER 4\n")
    four, second = number()
    header.write_text("#ifndef NUMBER\n#define NUMBER 3\n#endif\n")
    five, third = number("-DNUMBER=5")
    assert (three, four, five) == (3, 4, 5)
    assert len({first, second, third}) == 3
    source.write_text("no C++")
    with pytest.raises(builds.CompileError, match=r"number\.cpp"):
        number()
    assert not [path for path in builds.CACHE.iterdir() if path.name.startswith("tmp")]


# A compiler that says when it compiles, and takes its time.
SLOW_COMPILER = """#!/bin/sh
case "$*" in *" -o "*) echo compiles >> "$0.log"; sleep 1;; esac
exec g++ "$@"
"""

COMPILE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import builds
folder = Path(sys.argv[2])
builds.CACHE, builds.COMPILER = folder / "cache", str(folder / "compiler")
print(builds.compile_library("number", {folder / "number.cpp": ()}, builds.FAST))
"""


def test_processes_compile_once_between_them(tmp_path: Path) -> None:
    usable(FAST)
    (tmp_path / "number.cpp").write_text("int number() { return 3; }\n")
    compiler = tmp_path / "compiler"
    compiler.write_text(SLOW_COMPILER)
    compiler.chmod(0o755)
    command = [sys.executable, "-c", COMPILE, str(builds.SIMT), str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    made = {process.communicate(timeout=60)[0].strip() for process in both}
    assert len(made) == 1 and Path(made.pop()).is_file()
    # The object and the library.
    assert (tmp_path / "compiler.log").read_text().split() == ["compiles"] * 2
