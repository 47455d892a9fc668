"""Settings of strategies on the cpu backend, whose ops choose one themselves."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from stand_ins import Recorder
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dcconv import backends
from dcconv.call import autograd
from dcconv.functional import decoupled_conv2d

pytestmark = pytest.mark.backend("cpu")

NORM_FREE = "norm-free operators are one library convolution"
LIMITS = (
    "its fused kernels take depthwise layers, and float32 layers without groups that are "
    "channels_last or 1x1"
)


def taken() -> str:
    return str(torch.ops.dcconv.cpu_strategy_taken())


def operands(dtype: torch.dtype = torch.float32, stride: int = 1) -> dict[str, Any]:
    """A 3x3 layer that is too small to be worth a fused pass."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 5, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(64, 8, 3, 3, dtype=dtype)
    call = {"x": x, "weight": weight, "padding": 1, "stride": stride, "backend": "cpu"}
    return call | {name: call[name].requires_grad_() for name in ("x", "weight")}


def directions(**call: Any) -> tuple[str, str]:
    """Return what forward and backward of a call take."""
    y = decoupled_conv2d(**call)
    forward = taken()
    y.sum().backward()
    return forward, taken()


@pytest.mark.parametrize(
    ("names", "of_gradients", "want"),
    [
        ("library", {}, ("library", "library")),
        ("library,graph", {}, ("library", "library")),
        # Gradients may fall to library, by the rule.
        ("fused", {}, ("fused", None)),
        ("fused", {"input_gradient": "fused"}, ("fused", "fused")),
        ("library", {"input_gradient": "fused", "weight_gradient": "fused"}, ("library", "fused")),
        ("fused", {"weight_gradient": "library"}, ("fused", "library")),
        ("library,fused", {}, (None, None)),
    ],
)
def test_settings_force_each_direction(
    names: str, of_gradients: dict[str, str], want: tuple[str | None, str | None]
) -> None:
    by_rule = directions(**operands())
    with backends.strategies(names, **of_gradients):
        found = directions(**operands())
    assert found == tuple(w or rule for w, rule in zip(want, by_rule, strict=True))
    # Nothing is left behind.
    assert directions(**operands()) == by_rule


def test_inference_asks_for_no_gradient() -> None:
    with backends.strategies("fused", input_gradient="graph"), torch.no_grad():
        decoupled_conv2d(**operands())
        assert taken() == "fused"


def test_forced_strategies_agree() -> None:
    results: list[list[Tensor]] = []
    for names in ("library", "fused"):
        call = operands()
        with backends.strategies(names, input_gradient=names, weight_gradient=names):
            y = decoupled_conv2d(**call)
            results.append([y, *torch.autograd.grad(y.square().sum(), (call["x"], call["weight"]))])
    for one, other in zip(*results, strict=True):
        assert not torch.equal(one, other) and torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("names", "changes", "said"),
    [
        ("graph", {}, "graph: the cpu backend has no strategy graph"),
        ("fused", {"dtype": torch.float64}, f"fused: {LIMITS}"),
        ("fused,graph", {"magnitude": "linear"}, f"fused: {NORM_FREE}; graph: the cpu backend"),
    ],
)
def test_a_setting_that_cannot_be_obeyed_is_refused(
    names: str, changes: dict[str, Any], said: str
) -> None:
    changes = dict(changes)
    call = operands(changes.pop("dtype", torch.float32)) | changes
    with backends.strategies(names), pytest.raises(NotImplementedError) as error:
        decoupled_conv2d(**call)
    sentence = "dcconv: no allowed strategy runs the forward of this call: "
    assert str(error.value).startswith(sentence + said)


def test_gradients_that_cannot_be_had_are_refused() -> None:
    with (
        backends.strategies("library", weight_gradient="fused"),
        pytest.raises(NotImplementedError) as error,
    ):
        decoupled_conv2d(**operands(stride=2))
    assert str(error.value) == (
        "dcconv: no allowed strategy runs the weight_gradient of this call: "
        f"fused: {LIMITS}, padded with zeros and at stride 1"
    )
    with (
        backends.strategies("library", input_gradient="library", weight_gradient="fused"),
        pytest.raises(NotImplementedError) as error,
    ):
        decoupled_conv2d(**operands())
    assert str(error.value) == (
        "dcconv: no allowed strategy runs the backward of this call: the cpu backend has one for "
        "both gradients, got library for the input_gradient and fused for the weight_gradient"
    )


def test_errors_inside_leave_nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    by_rule = directions(**operands())
    monkeypatch.setattr(autograd, "native", None)
    with backends.strategies("fused"), pytest.raises(AttributeError), torch.no_grad():
        decoupled_conv2d(**operands())
    monkeypatch.undo()
    assert directions(**operands()) == by_rule


def test_a_setting_is_its_threads() -> None:
    found: list[tuple[str, str]] = []
    by_rule = directions(**operands())
    with backends.strategies("fused"):
        thread = threading.Thread(target=lambda: found.append(directions(**operands())))
        thread.start()
        thread.join()
    assert found == [by_rule]


def test_modes_do_not_see_what_forces() -> None:
    with backends.strategies("fused"), Recorder() as recorder, torch.no_grad():
        decoupled_conv2d(**operands())
    assert recorder.names == ["conv2d_forward"] and taken() == "fused"

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return decoupled_conv2d(x, weight, padding=1, backend="cpu")

    with backends.strategies("fused"), torch.no_grad():
        graph = make_fx(call)(*(operands()[name].detach() for name in ("x", "weight"))).graph
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert [name for name in targets if "cpu" in name] == []


def test_compiled_code_leaves_the_choice_to_the_op() -> None:
    torch._dynamo.reset()
    with torch.no_grad():
        decoupled_conv2d(**operands())
        by_rule = taken()
        compiled = torch.compile(decoupled_conv2d, fullgraph=True, backend="aot_eager")
        for names in ("fused", "graph"):
            with backends.strategies(names):
                compiled(**operands())
            assert taken() == by_rule


def test_report_has_the_lines_of_other_backends() -> None:
    def lines(**changes: Any) -> list[str]:
        call = operands() | changes
        text = backends.report(**call).splitlines()
        start = next(i for i, line in enumerate(text) if line.split()[0] == "cpu")
        return [line.strip() for line in text[start + 1 : start + 10]]

    by_rule = directions(**operands())
    titles = {"library": "library convolution and fused passes", "fused": "one pass"}
    assert lines() == [
        line
        for direction, name in zip(
            ("forward", "input gradient", "weight gradient"),
            (by_rule[0], by_rule[1], by_rule[1]),
            strict=True,
        )
        for line in (
            f"{direction}: {name} ({titles[name]}; by rule)",
            "library  not measured",
            "fused    not measured",
        )
    ]
    assert lines(magnitude="linear") == [
        line
        for direction in ("forward", "input gradient", "weight gradient")
        for line in (
            f"{direction}: library ({titles['library']}; the only one willing)",
            "library  not measured",
            f"fused    {NORM_FREE}",
        )
    ]
    with backends.strategies("fused", input_gradient="graph"):
        found = lines()
    assert found[:4] == [
        "forward: fused (one pass; the only one willing)",
        "library  not allowed (backends.strategies, DCCONV_STRATEGIES)",
        "fused    not measured",
        "input gradient: no allowed strategy runs it",
    ]
