"""The direct CUDA kernels by themselves: schedules, sanitizers, and faults in their sources."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import builds  # noqa: E402
from builds import ADDRESS, FAST, REPORTED, ROOT, THREAD, Build  # noqa: E402


def program(build: Build, *flags: str) -> Path:
    reason = builds.why_not(build)
    if reason is not None:
        pytest.skip(reason)
    # Contraction off: every build gives the same bits.
    flags = (*flags, f"-I{ROOT / 'csrc'}", "-DDCCONV_SIMT", "-ffp-contract=off")
    return builds.compile_executable("direct", [HERE / "direct.cpp"], build, flags)


def run(build: Build, executable: Path, folder: Path, *words: str) -> bytes:
    done = drive(build, executable, folder, *words)
    assert done.returncode == 0, done.stderr[-4000:]
    return (folder / "results").read_bytes()


def drive(
    build: Build, executable: Path, folder: Path, *words: str
) -> subprocess.CompletedProcess[str]:
    return builds.run([executable, folder / "results", *words], build, timeout=600)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the kernels give, by the part of the program."""
    folder = tmp_path_factory.mktemp("expected")
    return {
        part: run(FAST, program(FAST, "-O0", f"-DDIRECT_{part}"), folder, "0")
        for part in ("DEPTHWISE", "STEM")
    }


def test_every_element_is_written(expected: dict[str, bytes]) -> None:
    # Poison is a NaN in every type; results are finite.
    for part, found in expected.items():
        assert found and b"\xff\xff\xff\xff" not in found, part


def test_results_do_not_depend_on_the_schedule(expected: dict[str, bytes], tmp_path: Path) -> None:
    for part, found in expected.items():
        executable = program(FAST, "-O0", f"-DDIRECT_{part}")
        assert run(FAST, executable, tmp_path, "17") == found, part


@pytest.mark.parametrize("build", [ADDRESS, THREAD], ids=lambda build: build.name)
def test_sanitizers(build: Build, expected: dict[str, bytes], tmp_path: Path) -> None:
    found = run(build, program(build, "-O0"), tmp_path, "0", "4")
    assert found == expected["DEPTHWISE"] + expected["STEM"]


BARRIER = "    __syncthreads();\n"

# What is changed, in which part, and the build that has to see it.
FAULTS = {
    "a shifted position": (
        "depthwise/forward.cuh",
        "(position + q) * p.o",
        "(position + (q ^ 1)) * p.o",
        "DEPTHWISE",
        FAST,
    ),
    "no end of a line": (
        "strip.cuh",
        "if (j >= 0 && j < line.input)",
        "if (j >= 0)",
        "DEPTHWISE",
        FAST,
    ),
    "no tail of a strip": (
        "depthwise/forward.cuh",
        "at_most(kStrip, g.along.output - along)",
        "kStrip",
        "DEPTHWISE",
        ADDRESS,
    ),
    "no tail of a share": (
        "depthwise/grad_weight.cuh",
        "begin + lanes.block_strips, lanes.strips",
        "begin + lanes.block_strips, lanes.strips + 1",
        "DEPTHWISE",
        ADDRESS,
    ),
    "no barrier in a sum of parts": (
        "depthwise/grad_weight.cuh",
        BARRIER,
        "",
        "DEPTHWISE",
        FAST,
    ),
    "taps not reversed": (
        "depthwise/grad_input.cuh",
        "K * K - 1 - tap",
        "tap",
        "DEPTHWISE",
        FAST,
    ),
    "no barrier before taps are read": ("stem/stem.cuh", BARRIER, "", "STEM", FAST),
    "no tail of a tile": ("stem/stem.cuh", "position >= rows ||", "", "STEM", ADDRESS),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name: str, expected: dict[str, bytes], tmp_path: Path) -> None:
    file, old, new, part, build = FAULTS[name]
    copy = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", copy)
    path = copy / "cuda/fused" / file
    text = path.read_text()
    assert old in text, f"{file} has no {old!r}"
    path.write_text(text.replace(old, new, 1))
    executable = program(build, "-O0", f"-I{copy}", f"-DDIRECT_{part}")
    try:
        for seed in ("0", "1", "2"):
            done = drive(build, executable, tmp_path, seed)
            if build is not FAST:
                assert done.returncode == REPORTED, done.stderr[-2000:]
                assert "Sanitizer" in done.stderr
                return
            if done.returncode != 0 or (tmp_path / "results").read_bytes() != expected[part]:
                return
        pytest.fail("the fault was not seen")
    finally:
        shutil.rmtree(executable.parent)
