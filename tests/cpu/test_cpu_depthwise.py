"""The CPU's depthwise kernels: geometries, layouts, modes, instruction sets, threads, dispatch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import (
    Results,
    check,
    check_all,
    check_equal,
    evaluate,
    random_cotangent,
    truth_and_peer,
)
from calls import check_call
from cases import ANGULARS, DTYPES, WEIGHTED_MAGNITUDES, Case, Inputs, make_inputs

from dcconv import functional
from dcconv.call import autograd
from dcconv.call.saved import DOT, NOTHING, OUTPUT

pytestmark = pytest.mark.backend("cpu")

LAYOUTS = ("contiguous", "channels_last")
NORMS = ("batch", "given", "none")
# Norm-free operators go another way.
OPERATORS = tuple(
    (magnitude, weighting, angular)
    for magnitude, weighting in WEIGHTED_MAGNITUDES
    for angular in ANGULARS
    if (magnitude, angular) != ("linear", "cosine")
)

GEOMETRIES = (
    Case("plain-odd", 2, 5, 7, 6, 5, (3, 3), padding=1, groups=5),
    Case("one-block", 1, 16, 14, 14, 16, (5, 5), padding=2, groups=16),
    Case("blocks-and-a-rest", 1, 37, 9, 20, 37, (7, 7), padding=3, groups=37),
    Case("stride3-2-dilation2-3", 1, 33, 13, 14, 33, (3, 2), (3, 2), (1, 2), (2, 3), 33),
    Case("stride-beyond-kernel", 2, 4, 15, 13, 4, (2, 2), stride=4, groups=4),
    Case("multiplier2", 1, 19, 13, 14, 38, (3, 2), (2, 3), (3, 1), (2, 3), 19),
    Case("multiplier3", 2, 3, 6, 6, 9, (3, 3), stride=2, padding=1, groups=3),
    Case("multiplier8", 2, 3, 6, 6, 24, (3, 3), padding=1, groups=3),
    Case("multiplier9-by-the-library", 1, 2, 5, 6, 18, (3, 3), padding=1, groups=2),
    Case("row-longer-than-a-tile", 1, 2, 5, 530, 2, (3, 3), padding=1, groups=2),
    Case("several-bands", 1, 2, 75, 30, 2, (3, 5), 2, (1, 4), 2, 2),
    Case("padding-beyond-kernel", 1, 4, 4, 4, 4, (2, 2), padding=5, groups=4),
    Case("unused-end", 1, 3, 8, 9, 3, (3, 3), stride=3, groups=3),
    Case("one-pixel", 3, 4, 3, 3, 4, (3, 3), groups=4),
    Case("same-s2", 2, 4, 9, 7, 4, (4, 2), stride=2, padding="same", groups=4),
    Case("reflect", 2, 4, 6, 7, 4, (3, 3), padding=2, groups=4, padding_mode="reflect"),
    Case("replicate", 2, 4, 6, 7, 8, (3, 3), 2, "same", groups=4, padding_mode="replicate"),
    Case("circular", 2, 4, 6, 7, 4, (3, 3), padding=2, groups=4, padding_mode="circular"),
    # Whole blocks, kernels of 3, 5 and 7 columns: windows over x in place.
    Case("in-place", 2, 32, 9, 18, 32, (3, 3), padding=1, groups=32),
    Case("in-place-short-run", 1, 16, 6, 5, 16, (7, 7), padding=3, groups=16),
    Case("in-place-s2", 1, 32, 13, 17, 32, (3, 5), 2, (1, 2), groups=32),
    Case("in-place-s2-dilation3-1", 1, 16, 15, 23, 16, (3, 7), (2, 2), (3, 1), (3, 1), 16),
    Case("in-place-s3-dilation2-1", 1, 16, 15, 9, 16, (3, 3), (3, 1), (2, 1), (2, 1), 16),
    Case("in-place-wide", 1, 16, 12, 40, 16, (3, 3), padding=1, groups=16),
    Case("in-place-reflect", 1, 16, 7, 8, 16, (5, 5), padding=2, groups=16, padding_mode="reflect"),
    Case("n0", 0, 3, 6, 5, 3, (3, 3), padding=1, groups=3),
)


def by_strategy(
    inputs: Inputs, strategy: str, cotangent: torch.Tensor, **options: object
) -> Results:
    """Evaluate a call while one strategy is forced."""
    torch.ops.dcconv.set_cpu_strategy(strategy)
    try:
        return evaluate(functional.decoupled_conv2d, inputs, cotangent, backend="cpu", **options)
    finally:
        torch.ops.dcconv.set_cpu_strategy("auto")


def same(one: Results, two: Results) -> bool:
    """Whether results agree bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GEOMETRIES, ids=lambda case: case.id)
def test_agrees_with_the_reference(isa: str, case: Case, dtype: torch.dtype) -> None:
    """Operators, modes, biases and kept tensors take turns over the table."""
    turn = 5 * GEOMETRIES.index(case) + 11 * DTYPES.index(dtype) + 29 * len(isa)
    for i in range(4):
        layout = LAYOUTS[i % 2]
        number = turn + 13 * i
        magnitude, weighting, angular = OPERATORS[7 * number % len(OPERATORS)]
        inputs = make_inputs(
            case,
            dtype,
            layout,
            magnitude=magnitude,
            weighting=weighting,
            angular=angular,
            norm=NORMS[number % 3],
            bias=number % 4 == 0,
            # One k for all filters: its gradient is the rest of a sum that cancels.
            scalar=number % 5 == 0 and angular != "sigmoid",
        )
        cotangent = random_cotangent(inputs)
        truth, peer = truth_and_peer(inputs, cotangent)
        keep = DOT if number % 2 else "auto"
        got = evaluate(functional.decoupled_conv2d, inputs, cotangent, backend="cpu", keep=keep)
        name = f"{isa} {case.id} {layout} {magnitude} {weighting} {angular} {keep}"
        check_all(name, got, truth, peer, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighting", ["none", "linear"])
def test_default_operator_without_roots(isa: str, dtype: torch.dtype, weighting: str) -> None:
    """In registers: all gradients' inputs are kept, and y where tanh is 1 for some patches."""
    for number, norm in enumerate(NORMS):
        case = Case("", 2, 32, 9, 11, 32, (3, 3), padding=1, groups=32)
        inputs = make_inputs(
            case,
            dtype,
            "channels_last",
            weighting=weighting,
            norm=norm,
            bias=number == 1,
            alpha=1.5,
        )
        cotangent = random_cotangent(inputs)
        truth, peer = truth_and_peer(inputs, cotangent)
        for keep in (DOT, "auto"):
            got = evaluate(functional.decoupled_conv2d, inputs, cotangent, backend="cpu", keep=keep)
            check_all(f"{isa} {weighting} {norm} {keep}", got, truth, peer, dtype)
        inputs.tensors["x"][:, ::3, 4:] *= 100
        truth, peer = truth_and_peer(inputs)
        got = evaluate(functional.decoupled_conv2d, inputs, backend="cpu")
        check_all(f"{isa} {weighting} {norm} saturated", got, truth, peer, dtype)
        inputs.tensors["x"][1, 3, 5, 5] = float("nan")
        if norm != "batch":
            y = evaluate(functional.decoupled_conv2d, inputs, backend="cpu")["y"]
            assert y.isnan().nonzero().unique(dim=0).shape[0] == 9
            assert bool(y[1, 3, 4:7, 4:7].isnan().all())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_long_sums_over_positions(layout: str) -> None:
    case = Case("", 1, 2, 400, 500, 2, (3, 3), padding=1, groups=2)
    inputs = make_inputs(case, torch.float32, layout, angular="sigmoid", bias=True)
    cotangent = random_cotangent(inputs)
    truth, peer = truth_and_peer(inputs, cotangent)
    got = by_strategy(inputs, "fused", cotangent)
    for name in ("bias", "radius", "k"):
        check(name, got[name], truth[name], peer[name], torch.float32)


@pytest.mark.parametrize("channels", [37, 32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_the_number_of_threads(
    dtype: torch.dtype, layout: str, channels: int
) -> None:
    case = Case("", 3, channels, 17, 19, channels, (3, 3), padding=1, groups=channels)
    inputs = make_inputs(case, dtype, layout, angular="sigmoid", bias=True)
    cotangent = random_cotangent(inputs)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(by_strategy(inputs, "fused", cotangent))
    finally:
        torch.set_num_threads(threads)
    assert same(results[0], results[1])
    assert same(results[0], results[2])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_depthwise_calls_take_their_own_kernels(layout: str) -> None:
    """The strategies add in different orders, so their last bits tell them apart."""
    for case, fused in (
        (Case("", 2, 20, 9, 8, 20, (5, 5), padding=2, groups=20), True),
        (Case("", 2, 20, 9, 8, 40, (5, 5), padding=2, groups=20), True),
        (Case("", 2, 2, 9, 8, 18, (5, 5), padding=2, groups=2), False),
        (Case("", 2, 20, 9, 8, 20, (5, 5), padding=2, groups=10), False),
    ):
        inputs = make_inputs(case, torch.float32, layout)
        cotangent = random_cotangent(inputs)
        auto = by_strategy(inputs, "auto", cotangent)
        library = by_strategy(inputs, "library", cotangent)
        for name, result in auto.items():
            check_equal(name, result, library[name])
        assert same(auto, library) != fused
        if fused:
            assert same(auto, by_strategy(inputs, "fused", cotangent))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
def test_the_norm_map_is_left_out_where_nothing_is_kept(layout: str, norm: str) -> None:
    case = Case("", 2, 5, 7, 6, 10, (3, 3), padding=1, groups=5)
    inputs = make_inputs(case, torch.float32, layout, norm=norm)
    call: dict[str, Any] = {"bias": None} | inputs.tensors | inputs.options
    operands, problem, _ = check_call(**call, backend="cpu", keep="auto")
    for strategy in ("fused", "library"):
        torch.ops.dcconv.set_cpu_strategy(strategy)
        try:
            with torch.no_grad():
                results = {
                    kept: autograd.one_op_forward(operands, problem, kept)
                    for kept in (NOTHING, OUTPUT, DOT)
                }
        finally:
            torch.ops.dcconv.set_cpu_strategy("auto")
        y, norm_map, mean, dot = results[NOTHING]
        assert norm_map.numel() == 0
        assert dot.numel() == 0
        assert torch.equal(y, results[OUTPUT][0])
        assert torch.equal(mean, results[OUTPUT][2])
        assert torch.equal(results[OUTPUT][1], results[DOT][1])
        assert results[OUTPUT][1].numel() == 2 * 5 * 7 * 6
        assert results[DOT][3].shape == y.shape


def test_unwritten_elements_would_show(deterministic: bool) -> None:
    for case in GEOMETRIES[:8]:
        for layout in LAYOUTS:
            inputs = make_inputs(case, torch.float32, layout, magnitude="ball", bias=True)
            cotangent = random_cotangent(inputs)
            truth, peer = truth_and_peer(inputs, cotangent)
            got = by_strategy(inputs, "fused", cotangent)
            check_all(f"{case.id} {layout}", got, truth, peer, torch.float32)


def test_gradients_only_where_they_are_asked_for() -> None:
    case = Case("", 2, 5, 7, 6, 5, (3, 3), padding=1, groups=5)
    inputs = make_inputs(case, torch.float64, "channels_last", norm="given", angular="sigmoid")
    cotangent = random_cotangent(inputs)
    full = by_strategy(inputs, "fused", cotangent)
    for name, tensor in inputs.tensors.items():
        leaf = tensor.detach().requires_grad_()
        y = functional.decoupled_conv2d(**(inputs.tensors | {name: leaf}), **inputs.options)
        (grad,) = torch.autograd.grad(y, leaf, cotangent)
        assert torch.equal(grad, full[name])
