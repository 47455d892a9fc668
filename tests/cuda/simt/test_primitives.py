"""Asynchronous copies and tensor cores in the SIMT model: every fault is found."""

from __future__ import annotations

import re
import subprocess

import builds
import pytest
from builds import ADDRESS, BUILDS, FAST, REPORTED, ROOT, THREAD, Build

ABORTED, WRONG, REFUSED = -6, 1, 3

RIGHT = ("gemm", "large_shared", "copies", "groups", "load_matrix", "tensor_core")

# Faults that the model names itself.
NAMED = {
    "never_waited": r"thread 9: exits while 1 of its copies are under way",
    "copy_unaligned": r"thread 7: copy_async: the address in shared memory must be aligned to 16",
    "copy_from_unaligned": r"thread 7: copy_async: the address in global memory must be aligned "
    r"to 16",
    "copy_across_end": r"thread 7: copy_async: 16 bytes are in no shared piece",
    "copy_beyond_end": r"thread 7: copy_async: 16 bytes are in no shared piece",
    "row_unaligned": r"thread 31: load_matrix_x4: the address in shared memory must be aligned to "
    r"16",
    "row_beyond_piece": r"thread 31: load_matrix_x4: 16 bytes are in no shared piece",
    "divergent_mma": r"divergent collective: threads 32-47 waiting at mma of bf16, threads 48-63 "
    r"waiting at mma of f16",
    "divergent_load": r"divergent collective: .*thread 4 exited, .*waiting at load_matrix_x4",
}

# Faults that show in values whatever the schedule, and faults that show under some schedules.
WRONG_VALUES = ("wrong_swizzle", "wrong_depth", "early_read", "weak_wait", "wrong_stage")
RACES = ("no_barrier", "early_copy", "overwritten", "row_race")


@pytest.fixture(params=BUILDS, ids=lambda build: build.name)
def build(request: pytest.FixtureRequest) -> Build:
    return request.param


def run(build: Build, *arguments: object) -> subprocess.CompletedProcess[str]:
    reason = builds.why_not(build)
    if reason is not None:
        pytest.skip(reason)
    flags = ["-Werror", "-Wno-unknown-pragmas", "-DDCCONV_SIMT", f"-I{ROOT / 'csrc'}"]
    sources = [builds.SIMT / "primitives_test.cpp"]
    program = builds.compile_executable("primitives_test", sources, build, flags)
    return builds.run([program, *map(str, arguments)], build, timeout=60)


@pytest.mark.parametrize("command", RIGHT)
def test_right_kernels_give_right_values(build: Build, command: str) -> None:
    for seed in (1, 2) if build is THREAD else range(8):
        done = run(build, command, seed)
        assert done.returncode == 0, (seed, done.stdout, done.stderr)


@pytest.mark.parametrize("fault", WRONG_VALUES)
def test_faults_give_wrong_values(fault: str) -> None:
    for build in (FAST, ADDRESS):
        for seed in (1, 2):
            done = run(build, fault, seed)
            assert done.returncode == WRONG, (build.name, seed, done.stdout, done.stderr)


@pytest.mark.parametrize("fault", RACES)
def test_missing_order_changes_values(fault: str) -> None:
    for build in (FAST, ADDRESS):
        codes = [run(build, fault, seed).returncode for seed in range(8)]
        assert WRONG in codes, (build.name, codes)


@pytest.mark.parametrize("fault", [*RACES, "weak_wait", "wrong_stage"])
def test_missing_order_is_a_data_race(fault: str) -> None:
    done = run(THREAD, fault, 1)
    assert done.returncode == REPORTED, (done.stdout, done.stderr)
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
    assert re.search(r"(pipelined_gemm\.cuh|primitives_test\.cpp):\d+", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("fault", "place"),
    [("wrong_rows", r"pipelined_gemm\.cuh"), ("copy_beyond_global", r"primitives_test\.cpp")],
)
def test_copies_of_what_is_not_there_are_reported(fault: str, place: str) -> None:
    done = run(ADDRESS, fault)
    assert done.returncode == REPORTED, (done.stdout, done.stderr)
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert re.search(rf"{place}:\d+", done.stderr), done.stderr


@pytest.mark.parametrize("fault", NAMED)
def test_faults_abort_with_block_and_thread(build: Build, fault: str) -> None:
    done = run(build, fault)
    assert done.returncode == ABORTED, (done.stdout, done.stderr)
    start = r"simt: kernel 'primitive', block \(0, 0, 0\): "
    assert re.search(start + NAMED[fault], done.stderr), done.stderr


def test_sources_are_read_between_issue_and_wait(build: Build) -> None:
    read = run(build, "changed_source", 1).stdout.split()
    assert len(read) == 32 and set(read) == {"1", "2"}
    assert run(build, "changed_source", 1).stdout.split() == read
    assert run(build, "changed_source", 2).stdout.split() != read


def test_launches_take_what_the_device_has_and_no_more(build: Build) -> None:
    done = run(build, "too_large_shared")
    assert done.returncode == REFUSED, (done.stdout, done.stderr)
    assert done.stderr.strip() == (
        "dcconv: kernel pipelined_gemm did not start on a grid of 1 x 1 blocks, 128 threads and "
        "237568 bytes of shared memory: the device has 232448 bytes"
    )
