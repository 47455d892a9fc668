"""Problems that are launched: operands of layers and fused kernels; the command's verdicts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench.__main__ import main
from bench.machine import fused, selfcheck
from bench.machine.capture import arrays_in, symbols_of
from bench.machine.layers import OPERATORS, STORAGE, Call, Layer, Operands

#: What operands ask of the emulator's extension.
MODULE = SimpleNamespace(
    magnitudes=["sphere", "linear", "ball", "tanh"], angulars=["cosine", "square_cosine"]
)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("operator", OPERATORS)
def test_operands_of_the_passes(dtype: str, operator: str) -> None:
    layer = Layer(2, 16, 6, 24, 3)
    calls = Operands(MODULE, layer, dtype, True, OPERATORS[operator]).calls(rows=4)
    assert set(calls) == {"pixel_sumsq", "affine_relu", "epilogue", "grad_dot", "grad_input"}
    for call in calls.values():
        streams = [call.members[name] for name in call.streams]
        assert {a.dtype for a in streams} == {np.dtype(STORAGE[dtype])}
        sizes = {a.size for a in streams}
        assert sizes <= {2 * 36 * 16, 2 * 36 * 24} and len(sizes) == 1
        assert call.ranges()[0][1] - call.ranges()[0][0] == streams[0].nbytes
    epilogue = calls["epilogue"].members
    per_filter, mean = OPERATORS[operator].radius == "filter", OPERATORS[operator].mean
    assert epilogue["filters"]["radius_stride"] == int(per_filter)
    assert (epilogue["filters"]["mean"] is not None) == mean
    has_radius = OPERATORS[operator].radius != "none"
    assert (calls["grad_dot"].members["parts"] is not None) == has_radius


def test_fused_problems_reach_every_kernel() -> None:
    found = list(fused.cases())
    assert len(set(found)) == len(found) == len({(c.function, c.groups, c.name) for c in found})
    for function in (fused.GEMM, fused.GEMM_GRADIENT):
        reached = {(c.dtype, c.tile) for c in found if c.function == function and c.tile >= 0}
        assert reached == {(d, t) for d in ("bfloat16", "float16") for t in fused.TILES}
    others = ("depthwise", "depthwise_grad_input", "depthwise_grad_weight", "stem")
    for function in others:
        layouts = {(c.dtype, c.channels_last) for c in found if c.function == function}
        assert layouts == {(d, last) for d in STORAGE for last in (True, False)}


def test_outputs_of_fused_problems_hold_nan() -> None:
    outputs = {"y", "norm", "grad_x", "grad_weight", "parts"}
    for case in fused.cases():
        members = case.operands(MODULE)
        for name, value in members.items():
            if isinstance(value, np.ndarray):
                poisoned = bool((value.view(np.uint8) == 0xFF).all())
                assert poisoned == (name in outputs), (case.name, name)


def test_arrays_of_a_call_are_found_once() -> None:
    x, a = np.zeros(4), np.zeros(3)
    members: dict[str, Any] = {"x": x, "y": x, "filters": {"a": a, "k": None}, "n": 3}
    assert [array is x or array is a for array in arrays_in(members)] == [True, True]
    assert Call("f", members, ("x",)).ranges() == [(x.ctypes.data, x.ctypes.data + 32)]


def test_symbols_of_a_library(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nm"
    tool.write_text(
        "#!/bin/sh\necho '0000000000001f40 W _Zkernel'\necho '0000000000000010 b data'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert symbols_of(tmp_path / "some.so") == {0x1F40: "_Zkernel"}


@pytest.mark.parametrize(("known", "status"), [(1.2, 0), (1.3, 1)])
def test_the_command_tells_a_model_that_is_off(
    known: float, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = selfcheck.Check("product, H100", 1.0, known, 0.2)
    monkeypatch.setattr(selfcheck, "checks", lambda: iter([one]))
    assert main(["machine", "check"]) == status
    assert "product, H100" in capsys.readouterr().out
