"""The ops themselves, below the checks of the package's functions, refuse absurd numbers."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch
from paths import TESTS, python_path
from stand_ins import builds

from dcconv import native

needs_library = pytest.mark.skipif(native.missing is not None, reason=str(native.missing))

PASSES = {
    "affine_relu",
    *("conv2d_epilogue", "conv2d_epilogue_", "conv2d_grad_dot", "conv2d_grad_filters"),
    *("conv2d_grad_input", "conv2d_grad_input_", "conv2d_norms", "conv2d_one_pass"),
    *("conv2d_one_pass_grad_input", "depthwise_grad_weight", "window_norm", "window_norm_grad"),
}
WHOLE = {"conv2d_forward", "conv2d_backward", "patch_norm_forward", "patch_norm_backward"}


def fuzz(provider: str, count: int, **environment: str) -> set[str]:
    """Run the fuzzer in a process of its own; return the names of the ops that it called."""
    result = subprocess.run(
        [sys.executable, str(TESTS / "support" / "op_fuzzer.py"), provider, "1", str(count)],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": python_path(), **environment},
        capture_output=True,
        text=True,
    )
    lines = result.stdout.splitlines() or [""]
    assert result.returncode == 0, (result.returncode, lines[-3:], result.stderr[-2000:])
    found = re.fullmatch(r"(\d+) returned, (\d+) refused, 0 wrong", lines[-1])
    assert found is not None and int(found[1]) + int(found[2]) == count
    # Both ends are met: numbers that are fine, and numbers that are not.
    assert min(int(found[1]), int(found[2])) > count // 20, lines[-1]
    return {name.partition("::")[2] for name in lines[-2].split()[1:]}


@needs_library
def test_cpu_ops() -> None:
    assert fuzz("cpu", 3000) == WHOLE | {"affine_relu"}


@needs_library
def test_fakes() -> None:
    assert fuzz("fakes", 4000) == WHOLE | PASSES


def test_emulated_cuda_ops() -> None:
    reason = builds.why_not(builds.FAST) or native.missing
    if reason is not None:
        pytest.skip(reason)
    assert fuzz("emulated", 2000) == PASSES


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed here"
)
def test_interpreted_triton_ops() -> None:
    assert fuzz("triton", 600, TRITON_INTERPRET="1") == PASSES


@needs_library
@pytest.mark.parametrize("stride", [6, 2**20, 2**31 - 1])
@pytest.mark.parametrize("groups", [1, 4])
def test_strides_beyond_the_image_are_one_window(groups: int, stride: int) -> None:
    """All of them give what stride 6 gives on 5 pixels, forward and backward, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 5, 5, generator=generator)
    weight = torch.randn(4, 4 // groups, 3, 3, generator=generator)
    geometry = ([0] * 4, [1, 1], groups, "zeros")
    operator = ("tanh", "cosine", "none", 1.0, 0.5, 2.0, 1e-4, 1e-4)
    results = []
    for step in (3, stride):
        radius = torch.ones(4)
        y, norm_map, mean, dot = torch.ops.dcconv.conv2d_forward(
            *(x, weight, None, radius, None, None, [step, step], *geometry, *operator),
            "none",
            True,
        )
        grads = torch.ops.dcconv.conv2d_backward(
            *(torch.ones_like(y), x, weight, dot, norm_map, mean, radius, None, None),
            *([step, step], *geometry, *operator, "none", True, "dot", 11),
        )
        results.append([y, norm_map, *grads])
    assert results[0][0].shape == (2, 4, 1, 1)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
