"""The CUDA passes by themselves: schedules, sanitizers, and faults put into their sources."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import builds  # noqa: E402
from builds import ADDRESS, FAST, REPORTED, ROOT, THREAD, Build  # noqa: E402
from drive import GEOMETRIES, OPERATORS, STORAGE, load  # noqa: E402
from emulated import passes_extension  # noqa: E402

Results = dict[str, Any]


def drive(
    build: Build, extension: Path, folder: Path, *options: str
) -> subprocess.CompletedProcess[str]:
    return builds.run(
        [sys.executable, HERE / "drive.py", extension, folder / "results.npz", *options],
        build,
        timeout=600,
    )


def results_of(build: Build, extension: Path, folder: Path, *options: str) -> Results:
    done = drive(build, extension, folder, *options)
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1:]} {done.stderr[-4000:]}"
    with np.load(folder / "results.npz") as found:
        return dict(found)


def extension_of(build: Build, **options: Any) -> Path:
    reason = builds.why_not(build)
    if reason is not None:
        pytest.skip(reason)
    return passes_extension(build, **options)


def assert_same(found: Results, expected: Results) -> None:
    assert found and found.keys() <= expected.keys()
    wrong = [n for n, array in found.items() if array.tobytes() != expected[n].tobytes()]
    assert not wrong


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What the fast build gives, for every dtype."""
    extension = extension_of(FAST, every_dtype=True)
    folder = tmp_path_factory.mktemp("expected")
    return results_of(FAST, extension, folder, "--dtypes", *STORAGE)


def test_every_element_is_written(expected: Results) -> None:
    for name, array in expected.items():
        if array.dtype == np.uint16:
            exponents = (array >> 7) & 0xFF
            assert (exponents != 0xFF).all(), name
        else:
            assert np.isfinite(array).all(), name
    assert {name.split()[0] for name in expected} == set(STORAGE)


def test_sums_of_affine_relu_are_those_of_its_result(expected: Results) -> None:
    """Bit for bit: they are added up in the order of the pass that reads a tensor for them."""
    names = [name for name in expected if name.endswith(": affine_sums")]
    assert len(names) > 0
    for name in names:
        squares = expected[name.replace("affine_sums", "squares")]
        assert expected[name].tobytes() == squares.tobytes(), name


def test_results_do_not_depend_on_the_schedule(expected: Results, tmp_path: Path) -> None:
    extension = extension_of(FAST, every_dtype=True)
    options = ("--dtypes", "float32", "bfloat16")
    assert_same(results_of(FAST, extension, tmp_path, *options, "--seed", "17"), expected)


def test_address_and_undefined_behaviour_sanitizers(expected: Results, tmp_path: Path) -> None:
    found = results_of(ADDRESS, extension_of(ADDRESS), tmp_path, "--in-turn")
    assert_same(found, expected)
    # 80 of the 240 problems; every dtype and layout meets every geometry, and every operator.
    cases = {tuple(name.partition(":")[0].split()) for name in found}
    assert len(cases) == 80
    for dtype in ("float32", "bfloat16"):
        for layout in ("first", "last"):
            here = [case for case in cases if (case[0], case[3]) == (dtype, layout)]
            assert {case[1] for case in here} == set(GEOMETRIES)
            assert {case[2] for case in here} == set(OPERATORS)


def test_failed_launch_names_kernel_and_problem() -> None:
    passes = load(extension_of(FAST, every_dtype=True))
    with pytest.raises(
        RuntimeError,
        match=r"^dcconv: kernel column_sums did not start on a grid of 1 x 70000 blocks, "
        r"256 threads and 2048 bytes of shared memory: too many blocks$",
    ):
        passes.column_sums("float32", parts=None, totals=None, kinds=70000, rows=1, o=1)


# A thread of the system per CUDA thread is slow: the problems with the most code in them.
THREADED = ("--geometries", "vectors", "groups", "--operators", "product")


@pytest.mark.parametrize("blocks", ["1", "4"], ids=["shuffled", "concurrent"])
def test_thread_sanitizer(blocks: str, expected: Results, tmp_path: Path) -> None:
    options = (*THREADED, "--dtypes", "float32" if blocks == "1" else "bfloat16")
    extension = extension_of(THREAD)
    found = results_of(THREAD, extension, tmp_path, *options, "--blocks", blocks)
    assert_same(found, expected)


def changed_sources(folder: Path, file: str, old: str, new: str) -> Path:
    """Return a copy of csrc in which the first ``old`` of a file is ``new``."""
    copy = folder / "csrc"
    shutil.copytree(ROOT / "csrc", copy)
    path = copy / "cuda" / file
    text = path.read_text()
    assert old in text, f"{file} has no {old!r}"
    path.write_text(text.replace(old, new, 1))
    return copy


def failure(extension: Path, build: Build, folder: Path, expected: Results) -> str:
    """Return how the faulty extension shows itself, empty if it does not."""
    options: Sequence[str] = ("--dtypes", "float32", "--geometries", "vectors", "groups")
    if build is THREAD:
        options = (*THREADED, "--dtypes", "float32")
    for seed in ("0", "1", "2"):
        done = drive(build, extension, folder, *options, "--seed", seed)
        if build is not FAST:
            return done.stderr if done.returncode == REPORTED else ""
        if done.returncode != 0:
            return done.stderr
        with np.load(folder / "results.npz") as found:
            for name in found.files:
                if found[name].tobytes() != expected[name].tobytes():
                    return f"differs: {name}"
    return ""


BARRIER = "      __syncthreads();\n"

# What is changed, the build that has to see it, and what it says.
FAULTS = {
    "no barrier before norms are read": ("passes/epilogue.cuh", BARRIER, "", THREAD, "data race"),
    "no barrier in a block's sum": (
        "support/device.cuh",
        "  __syncthreads();\n",
        "",
        THREAD,
        "data race",
    ),
    "no tail of rows": (
        "passes/tiles.cuh",
        "at_most(turns.end * lanes.rows, positions)",
        "turns.end * lanes.rows",
        ADDRESS,
        "Sanitizer",
    ),
    "no barrier before terms of t are added up": (
        "passes/grad_dot_channels_last.cuh",
        BARRIER,
        "",
        THREAD,
        "data race",
    ),
    "no tail of filters": (
        "passes/column_sums.cuh",
        "filter < p.o) {",
        "true) {",
        ADDRESS,
        "Sanitizer",
    ),
    "no barrier before squares are added up": (
        "passes/pixel_sumsq.cuh",
        "    __syncthreads();\n",
        "",
        THREAD,
        "data race",
    ),
    "no tail of rows of squares": (
        "passes/affine_relu.cuh",
        "at_most(at.rows - row, int64_t(R) * at.slots)",
        "int64_t(R) * at.slots",
        ADDRESS,
        "Sanitizer",
    ),
    "another group's scale": (
        "passes/affine_relu.cuh",
        "position * p.groups) * channels",
        "position * p.groups)",
        FAST,
        "differs",
    ),
    "a shifted index": (
        "passes/tiles.cuh",
        "ahead_[n] += step_",
        "ahead_[n] += 2 * step_",
        FAST,
        "differs",
    ),
    "no barrier before sums of windows are read": (
        "passes/grad_input.cuh",
        BARRIER,
        "",
        THREAD,
        "data race",
    ),
    "a copy that is not waited for": (
        "support/ring.cuh",
        "      wait_async<kAhead - 1>();\n",
        "",
        FAST,
        "copies are under way",
    ),
    "a wait that lets the newest copy pass": (
        "support/ring.cuh",
        "wait_async<kAhead - 1>",
        "wait_async<kAhead>",
        FAST,
        "copies are under way",
    ),
    "no end of a row of the map": (
        "support/window.cuh",
        "at_most(left + w.columns.kernel, w.columns.input) - j",
        "left + w.columns.kernel - j",
        FAST,
        "differs",
    ),
    "windows before the first": (
        "support/window.cuh",
        "count = last + 1 - (beyond < 0 ? 0 : first);",
        "count = last + 1 - first;",
        ADDRESS,
        "Sanitizer",
    ),
    "another sign": ("passes/filter.cuh", "-scale * total", "scale * total", FAST, "differs"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name: str, expected: Results, tmp_path: Path) -> None:
    file, old, new, build, words = FAULTS[name]
    copy = changed_sources(tmp_path, file, old, new)
    extension = extension_of(build, changed=copy)
    try:
        assert words in failure(extension, build, tmp_path, expected)
    finally:
        shutil.rmtree(extension.parent)
