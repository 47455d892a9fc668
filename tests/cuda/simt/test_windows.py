"""Window sums over maps: rectangles without holes give the same bits as every other window."""

from __future__ import annotations

import builds
import pytest
from builds import ADDRESS, FAST, ROOT, Build


@pytest.mark.parametrize("build", [FAST, ADDRESS], ids=lambda build: build.name)
def test_sums_of_windows_without_holes(build: Build) -> None:
    reason = builds.why_not(build)
    if reason is not None:
        pytest.skip(reason)
    flags = ["-Werror", "-Wno-unknown-pragmas", "-DDCCONV_SIMT", f"-I{ROOT / 'csrc'}"]
    sources = [builds.SIMT / "windows_test.cpp"]
    program = builds.compile_executable("windows_test", sources, build, flags)
    done = builds.run([program], build)
    assert done.returncode == 0, f"{done.stdout}{done.stderr[-4000:]}"
    assert int(done.stdout.split()[0]) > 10**6
