"""compute-sanitizer over a few calls, after it has found faults planted in a small program."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gate.report import Figures, NotRun

TOOLS = ("memcheck", "racecheck")

#: Kernels with this in their mangled name are watched: all of ours and none of a library's.
FILTER = "kns=dcconv"

# One thread writes past an allocation; two warps exchange shared memory without a barrier. In our
# namespace, so that the filter is tried as well.
PLANTED = """
#include <cstdio>

namespace dcconv {
__global__ void past_the_end(int* p) { p[threadIdx.x * (1 << 20)] = 1; }

__global__ void race(int* p) {
  __shared__ int s[64];
  s[threadIdx.x] = p[threadIdx.x];
  p[threadIdx.x] = s[63 - threadIdx.x];
}
}  // namespace dcconv

int main(int argc, char** argv) {
  int* p = nullptr;
  cudaMalloc(&p, 64 * sizeof(int));
  if (argc > 1)
    dcconv::race<<<1, 64>>>(p);
  else
    dcconv::past_the_end<<<1, 2>>>(p);
  cudaDeviceSynchronize();
  return 0;
}
"""


def find() -> str:
    """Return the sanitizer.

    Raises:
        NotRun: it is not installed.
    """
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [shutil.which("compute-sanitizer")]
    candidates += [f"{home}/bin/compute-sanitizer" for home in (*homes, "/usr/local/cuda")]
    for candidate in candidates:
        if candidate is not None and Path(candidate).exists():
            return candidate
    raise NotRun("compute-sanitizer is not installed")


def command(sanitizer: str, tool: str, program: Sequence[str]) -> list[str]:
    """Return the command line that watches our kernels in a program."""
    options = ["--tool", tool, "--kernel-name", FILTER, "--target-processes", "application-only"]
    # Libraries probe the driver with calls that are meant to fail.
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    return [sanitizer, *options, "--error-exitcode", "99", *program]


def problems(tool: str, text: str) -> int | None:
    """Return how many problems a sanitizer's output counts, None where it has no summary."""
    if tool == "racecheck":
        found = re.findall(r"RACECHECK SUMMARY: (\d+) hazards?", text)
    else:
        found = re.findall(r"ERROR SUMMARY: (\d+) errors?", text)
    return sum(map(int, found)) if found else None


def first_complaint(text: str) -> str:
    """Return the line of a sanitizer's output that says what is wrong."""
    lines = [line.removeprefix("=========").strip() for line in text.splitlines()]
    wrong = [
        line
        for line in lines
        if re.search(r"Invalid|hazard|[Ee]rror|not supported|Misaligned|out of bounds", line)
        and "SUMMARY" not in line
    ]
    said = [line for line in lines if line]
    return next(iter(wrong), said[-1] if said else "no output")[:300]


def judge(tool: str, text: str, code: int) -> Figures:
    """Return the figures of a run over our kernels.

    Raises:
        NotRun: the tool did not get to the end.
        AssertionError: it found problems, or the program failed without any.
    """
    count = problems(tool, text)
    if count is None:
        raise NotRun(f"compute-sanitizer did not run: {first_complaint(text)}")
    if count > 0:
        raise AssertionError(f"{count} problems, the first: {first_complaint(text)}")
    if code != 0:
        raise AssertionError(f"the program ended with code {code}: {first_complaint(text)}")
    return {"problems": count}


def watch(tool: str, program: Sequence[str], timeout: float) -> tuple[str, int]:
    """Run a program under the sanitizer and return what both printed and the exit code."""
    # The caching allocator would hide accesses past a tensor inside its larger blocks.
    environ = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    full = command(find(), tool, program)
    try:
        done = subprocess.run(
            full,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as expired:
        raise NotRun(f"time: it took more than {timeout:.0f} s") from expired
    print(done.stdout[-4000:], file=sys.stderr)
    return done.stdout, done.returncode


def sees_planted_faults(tool: str) -> None:
    """Run the program of planted faults.

    Raises:
        NotRun: the tool does not report them here, so that its silence would mean nothing.
    """
    nvcc = shutil.which("nvcc") or f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "planted.cu").write_text(PLANTED)
        build = [nvcc, "-arch=native", "-o", "planted", "planted.cu"]
        try:
            subprocess.run(build, cwd=folder, check=True, capture_output=True, timeout=120)
        except (OSError, subprocess.SubprocessError) as error:
            raise NotRun(f"the program of planted faults was not built: {error}") from error
        program = [f"{folder}/planted", *(["race"] if tool == "racecheck" else [])]
        text, _ = watch(tool, program, 60.0)
    if not problems(tool, text):
        raise NotRun(f"compute-sanitizer misses planted faults: {first_complaint(text)}")


def check(tool: str, program: Sequence[str], timeout: float) -> Figures:
    """Watch our kernels in a program that calls them."""
    find()
    sees_planted_faults(tool)
    text, code = watch(tool, program, timeout)
    return judge(tool, text, code)
