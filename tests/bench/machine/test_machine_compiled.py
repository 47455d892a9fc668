"""torch.compile as a peer: what Inductor writes without a GPU, and what is made of it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.cases import BATCH, Case, Operator
from bench.layers import Layer
from bench.machine.compiled import kernels, launches, peer, pretend
from bench.machine.compiled.generate import Module, Spec, generated
from bench.machine.compiled.launches import Step
from bench.machine.gpus import GPUS
from bench.machine.network import LAUNCH, layer_times
from dcconv.operator.numerics import EPS

H200 = GPUS["H200"]
CASE = Case(Layer(2, 16, 16, 32, 3), Operator("tanh", "cosine"), BATCH, "bfloat16")


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    reason = pretend.missing()
    if reason is not None:
        pytest.skip(reason)
    return generated(CASE, H200)


@pytest.fixture(scope="module")
def steps(modules: list[Module]) -> list[list[Step]]:
    return [launches.steps_of(module, H200) for module in modules]


@pytest.fixture
def untouched() -> Iterator[None]:
    before = {name: getattr(torch.cuda, name) for name in ("is_available", "current_device")}
    yield
    assert {name: getattr(torch.cuda, name) for name in before} == before


def test_a_training_step_is_one_forward_and_one_backward(modules: list[Module]) -> None:
    assert [module.is_backward for module in modules] == [False, True]
    for module in modules:
        assert "triton" in module.source and "cc=90" in module.source
    x, weight = Spec.of(torch.empty(CASE.layer.x_shape)), CASE.layer.weight_shape
    shapes = [spec.shape for spec in modules[0].inputs if isinstance(spec, Spec)]
    assert sorted(shapes) == sorted([x.shape, weight, (CASE.layer.o,)])
    # Convolutions are the library's, and keep channels_last.
    calls = [[line for line in m.source.splitlines() if "#" not in line] for m in modules]
    assert sum("extern_kernels.convolution(" in line for line in calls[0]) == 1
    assert sum(f"{launches.BACKWARD}(" in line for line in calls[1]) == 1
    last = (32 * 16 * 16, 1, 32 * 16, 32)
    assert f"(2, 32, 16, 16), {last}, torch.bfloat16" in modules[0].source


def test_launches_have_their_tensors(steps: list[list[Step]]) -> None:
    x_shape, y_shape = CASE.layer.x_shape, CASE.layer.y_shape
    for both in steps:
        for step in both:
            assert step.name.startswith("triton_") and f"def {step.name}(" in step.source
            assert any(isinstance(value, torch.Tensor) for value in step.arguments)
    elements = [
        value.numel()
        for step in steps[1]
        for value in step.arguments
        if isinstance(value, torch.Tensor)
    ]
    # Forward writes y, backward reads its gradient and writes those of u and x.
    y, x = torch.Size(y_shape).numel(), torch.Size(x_shape).numel()
    assert elements.count(y) >= 3 and elements.count(x) >= 2


@pytest.mark.parametrize("gpu", ["H200", "A100"])
def test_the_epilogue_is_compiled_executed_and_right(
    steps: list[list[Step]], gpu: str, untouched: None
) -> None:
    """All blocks of the launch that writes y, against the formula."""
    step = steps[0][-1]
    u, b, radius, mean, y = (v for v in step.arguments if isinstance(v, torch.Tensor))
    wide = u.permute(0, 2, 3, 1).reshape(-1, 32).float()
    # The window's sum of squares is what the kernel is given.
    norm, rho = (b.reshape(-1, 1) + EPS).sqrt(), radius.reshape(1, -1) * mean
    expected = wide / norm * torch.tanh(norm / rho)
    built = next(iter(kernels.built(step, GPUS[gpu])))
    # Which are numbers shows in the arguments.
    signature = {str(at): "*" for at in range(len(step.arguments))}
    launch = kernels.Launch(
        *(step.name, built.kernel.symbol, built.grid, built.threads, built.shared),
        kernels._parameters(step, signature),
    )
    arrays = {a.ctypes.data: a for a in map(kernels._array, kernels._tensors(step))}
    kernels.Runner(built.kernel, launch, arrays.values()).run()
    assert (y.reshape(-1, 32).float() - expected).abs().max() <= expected.abs().max() / 128


def test_parameters_lie_as_triton_passes_them() -> None:
    tensor = torch.zeros(3)
    step = Step("k", "", (tensor, 5, 6, tensor, 7))
    signature = {"a": "*fp32", "xnumel": "i32", "rnumel": "i32", "b": "*fp32", "last": "constexpr"}
    found = kernels._parameters(step, signature)
    expected = struct.pack("<QiiQQQ", tensor.data_ptr(), 5, 6, tensor.data_ptr(), 0, 0)
    assert found == expected
    odd = Step("k", "", (5, tensor, 6))
    packed = kernels._parameters(odd, {"n": "i32", "a": "*fp32", "m": "i32"})
    assert packed == struct.pack("<i4xQi4xQQ", 5, tensor.data_ptr(), 6, 0, 0)


def test_streams_are_large_tensors_by_what_is_done_with_them() -> None:
    large, small = torch.zeros(1000), torch.zeros(10)
    step = Step("k", "", (large, large.clone(), large.clone(), small, 1000))
    signature = {"in_out_ptr0": "*", "in_ptr0": "*", "out_ptr0": "*", "in_ptr1": "*", "n": "i32"}
    read, written, ranges = kernels.traffic(step, signature, 4000)
    assert (read, written, len(ranges)) == (8000, 8000, 3)
    assert (ranges[0][0], ranges[0][1]) == (large.data_ptr(), large.data_ptr() + 4000)


def test_a_launch_takes_time_and_moves_its_streams(steps: list[list[Step]]) -> None:
    found = kernels.predicted(steps[0][-1], H200, least=2 * 2 * 32 * 16 * 16)
    assert found.read == found.written == 2 * 2 * 32 * 16 * 16
    # All of it in a few microseconds, no faster than DRAM.
    assert found.read / H200.dram < found.seconds < 2e-5


def test_a_layer_is_scaled_by_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    if pretend.missing() is not None:
        pytest.skip(str(pretend.missing()))
    step = {"seconds": 1e-6, "read": 300, "written": 100, "grows": True}
    filters = {**step, "seconds": 1e-5, "read": 0, "written": 0, "grows": False}
    found = {"forward": [step, filters], "backward": [step]}
    monkeypatch.setattr(peer, "kept_by", lambda key, make: found)
    shape = Layer(8 * peer.IMAGES, 64, 56, 64, 3)
    made = peer.compiled_layer(shape, "bfloat16", H200)
    assert made[:4] == (pytest.approx(1.8e-5), pytest.approx(8e-6), (2, 1), (3200, 3200))

    class Rates:
        gpu, dtype = H200, "bfloat16"
        operator = replace_mean()

        def seconds(self, *ignored: Any) -> float:
            return 1e-3

        gemm_seconds = seconds

    times = layer_times(shape, Rates(), False, made)  # type: ignore[arg-type]
    assert times.total("compiled") == (
        pytest.approx(times.plain_forward + 1.8e-5 + 2 * LAUNCH),
        pytest.approx(times.plain_backward + 8e-6 + LAUNCH),
    )
    assert times.row()["compiled_ms"] == [1e3 * one for one in times.total("compiled")]


def replace_mean() -> Any:
    from bench.machine.layers import OPERATORS

    return OPERATORS["default"]


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CUDA build of PyTorch" in str(pretend.missing())
    said = r"dcconv: torch.compile must be able to write CUDA"
    with pytest.raises(ValueError, match=said), pretend.pretending(H200):
        pass
