"""The CPU operator in one pass over its tensors: products of its own, and when they are taken."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from accuracy import Results, check_all, check_equal, evaluate, random_cotangent, truth_and_peer
from calls import check_call
from cases import CASES, OPERATORS, Case, Inputs, make_inputs

from dcconv import backends, functional
from dcconv.call import autograd
from dcconv.call.saved import NOTHING, OUTPUT
from dcconv.operator import reference

pytestmark = pytest.mark.backend("cpu")


@pytest.fixture(autouse=True)
def rule_afterwards() -> Iterator[None]:
    """Leave the choice to the rule when a test is done."""
    yield
    torch.ops.dcconv.set_cpu_strategy("auto")


def run(strategy: str, inputs: Inputs, cotangent: torch.Tensor | None, **extra: str) -> Results:
    """Evaluate a call in one of the ways that the CPU kernels go."""
    torch.ops.dcconv.set_cpu_strategy(strategy)
    return evaluate(functional.decoupled_conv2d, inputs, cotangent, backend="cpu", **extra)


def same(one: Results, two: Results) -> dict[str, bool]:
    """Whether each result has the same bits in both."""
    return {name: torch.equal(one[name], two[name]) for name in one}


# Edges of vectors (4, 8, 16), of panels (8, 16, 64), of register tiles (6, 8 rows), of blocks of
# positions and of the longest sum in one register (384), on both sides.
PRODUCTS = (
    Case("c8-o1", 1, 8, 1, 9, 1, (1, 1)),
    Case("c15-o17-31", 1, 15, 1, 31, 17, (1, 1)),
    Case("c16-o16-32", 2, 16, 4, 4, 16, (1, 1)),
    Case("c33-o63-33", 1, 33, 3, 11, 63, (1, 1)),
    Case("c64-o64-blocks", 3, 64, 15, 13, 64, (1, 1)),
    Case("c65-o130-blocks", 3, 65, 15, 15, 130, (1, 1)),
    Case("c400-o9", 1, 400, 5, 5, 9, (1, 1)),
    Case("c384-o3", 1, 384, 2, 9, 3, (1, 1)),
    Case("c770-o36", 1, 770, 3, 5, 36, (1, 1)),
    Case("c8-o600", 1, 8, 5, 9, 600, (1, 1)),
    Case("c20-pixels", 2, 20, 27, 21, 34, (1, 1)),
    # More blocks than sums for the filters (32).
    Case("c24-o1000-blocks", 2, 24, 33, 34, 1000, (1, 1)),
    Case("c8-n40", 40, 8, 3, 4, 9, (1, 1)),
    Case("c3-k3-n40", 40, 3, 5, 6, 4, (3, 3), padding=1),
    Case("c64-k3", 2, 64, 7, 9, 20, (3, 3), padding=1),
    Case("c16-k3-long", 1, 16, 21, 27, 24, (3, 3), padding=1),
    Case("c3-k7-s2", 2, 3, 17, 19, 33, (7, 7), stride=2, padding=3),
    Case("c3-k4-s4", 2, 3, 16, 21, 50, (4, 4), stride=4),
    Case("c20-k1-s2", 2, 20, 9, 8, 34, (1, 1), stride=2),
    Case("c5-k2x3-uneven", 2, 5, 8, 9, 7, (2, 3), padding=(1, 0)),
    Case("c6-k3-d2", 2, 6, 11, 10, 19, (3, 3), padding=2, dilation=2),
    Case("c6-k3-d1x2", 2, 6, 9, 12, 19, (3, 3), padding=(1, 2), dilation=(1, 2)),
    Case("c4-k3x1", 2, 4, 9, 8, 18, (3, 1), padding=(3, 2)),
)


# In contiguous layout windows go through the library.
LAID_OUT = [
    pytest.param(case, layout, id=f"{case.id} {layout}")
    for case in PRODUCTS
    for layout in ("channels_last", "contiguous")
    if layout == "channels_last" or (case.kernel, case.stride) == ((1, 1), 1)
]


@pytest.mark.parametrize(("case", "layout"), LAID_OUT)
def test_products_of_every_shape(isa: str, case: Case, layout: str) -> None:
    inputs = make_inputs(case, torch.float32, layout, norm="none", bias=True)
    cotangent = random_cotangent(inputs)
    truth, peer = truth_and_peer(inputs, cotangent)
    got = run("fused", inputs, cotangent)
    assert torch.ops.dcconv.cpu_strategy_taken() == ("fused" if case.stride == 1 else "library")
    check_all(f"{isa} {case.id}", got, truth, peer, torch.float32)


# Filters in one, several and partial vectors; groups of whole ones.
TANH_COSINE = (
    Case("c12-o70-k1", 2, 12, 7, 9, 70, (1, 1)),
    Case("c400-o48-k1", 2, 400, 5, 5, 48, (1, 1)),
    Case("c20-o34-k1-s2", 2, 20, 9, 8, 34, (1, 1), stride=2),
    Case("c4-o16-k3", 2, 4, 7, 8, 16, (3, 3), padding=1),
    Case("c8-o64-k3-g2", 2, 8, 6, 7, 64, (3, 3), padding=1, groups=2),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", TANH_COSINE, ids=lambda case: case.id)
def test_tanh_cosine_from_small_to_saturated(isa: str, case: Case, dtype: torch.dtype) -> None:
    """In the registers of a product, which keeps y alone, and in passes of its own."""
    for weighting, bias in (("none", False), ("linear", True)):
        inputs = make_inputs(
            case, dtype, "channels_last", norm="given", weighting=weighting, bias=bias, alpha=1.3
        )
        inputs.tensors["radius"] *= torch.logspace(-2, 3, case.o)[torch.randperm(case.o)]
        truth, peer = truth_and_peer(inputs, None)
        for strategy in ("fused", "library"):
            for keep in ("output", "dot"):
                got = run(strategy, inputs, None, keep="dot" if bias else keep)
                check_all(f"{isa} {case.id} {weighting} {strategy}", got, truth, peer, dtype)


@pytest.mark.parametrize("strategy", ["fused", "library"])
def test_tanh_cosine_keeps_infinity_and_nan_to_their_places(isa: str, strategy: str) -> None:
    x = torch.ones(1, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    x[0, :, 2, 3] = 1e25  # its squares overflow
    x[0, 5, 4, 4] = torch.nan
    weight = torch.ones(32, 16, 1, 1) / 16
    radius = torch.full((32,), 4.0)
    radius[7] = torch.nan
    torch.ops.dcconv.set_cpu_strategy(strategy)
    y = functional.decoupled_conv2d(x, weight, radius=radius, backend="cpu")[0]
    usual = torch.ones(8, 8, dtype=torch.bool)
    usual[2, 3] = usual[4, 4] = False
    fine = torch.arange(32) != 7
    assert bool(y[7].isnan().all())
    assert bool(y[:, 4, 4].isnan().all())
    assert bool((y[fine, 2, 3] == 0.0).all())
    want = reference.decoupled_conv2d(x.double(), weight.double(), radius=radius.double())[0]
    check_equal("elsewhere", y[fine][:, usual], want[fine][:, usual].float())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded", "sliced"])
@pytest.mark.parametrize("keep", ["output", "dot"])
def test_every_geometry_of_the_shared_table(layout: str, keep: str) -> None:
    """Calls that do not fit go around the library's convolution, whatever was asked for."""
    for case in CASES:
        inputs = make_inputs(case, torch.float32, layout, norm="batch", angular="cosine")
        cotangent = random_cotangent(inputs)
        truth, peer = truth_and_peer(inputs, cotangent)
        got = run("fused", inputs, cotangent, keep=keep)
        check_all(f"{case.id} {layout} {keep}", got, truth, peer, torch.float32)


@pytest.mark.parametrize("norm", ["none", "given", "batch"])
@pytest.mark.parametrize(
    ("geometry", "layout"),
    [("1x1", "channels_last"), ("1x1", "contiguous"), ("3x3-p1", "channels_last")],
)
def test_every_operator_and_mode(geometry: str, layout: str, norm: str) -> None:
    case = next(case for case in CASES if case.id == geometry)
    for magnitude, weighting, angular in OPERATORS:
        for scalar in (False, True):
            inputs = make_inputs(
                case,
                torch.float32,
                layout,
                magnitude=magnitude,
                angular=angular,
                weighting=weighting,
                norm=norm,
                bias=scalar,
                scalar=scalar,
            )
            cotangent = random_cotangent(inputs)
            truth, _ = truth_and_peer(inputs, cotangent)
            library = run("library", inputs, cotangent)
            got = run("fused", inputs, cotangent)
            name = f"{magnitude} {weighting} {angular}"
            check_all(name, got, truth, library, torch.float32)


@pytest.mark.parametrize("geometry", ["1x1", "3x3-p1"])
def test_gradients_asked_for_one_by_one(geometry: str) -> None:
    case = next(case for case in CASES if case.id == geometry)
    for norm in ("given", "batch"):
        inputs = make_inputs(
            case, torch.float32, "channels_last", angular="sigmoid", norm=norm, bias=True
        )
        cotangent = random_cotangent(inputs)
        everything = run("fused", inputs, cotangent)
        for wanted in inputs.tensors:
            leaf = inputs.tensors[wanted].detach().requires_grad_()
            y = functional.decoupled_conv2d(**(inputs.tensors | {wanted: leaf}), **inputs.options)
            (grad,) = torch.autograd.grad(y, [leaf], cotangent)
            assert torch.equal(grad, everything[wanted]), (wanted, norm)


# Sums of 200 products or more, whose order shows in the last bits.
SHALLOW = Case("shallow", 8, 24, 12, 12, 18, (3, 3), padding=1)
WIDE = Case("wide", 8, 256, 12, 12, 64, (1, 1))


@pytest.mark.parametrize(
    ("case", "layout"),
    [(SHALLOW, "channels_last"), (WIDE, "channels_last"), (WIDE, "contiguous")],
    ids=["shallow", "wide", "wide contiguous"],
)
@pytest.mark.parametrize("norm", ["given", "batch"])
def test_results_do_not_depend_on_the_number_of_threads(case: Case, norm: str, layout: str) -> None:
    inputs = make_inputs(case, torch.float32, layout, norm=norm, bias=True)
    cotangent = random_cotangent(inputs)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run("fused", inputs, cotangent))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(same(results[0], other).values()), same(results[0], other)


# What the rule takes, forward and backward: geometry, options of the call, and the two ways.
CHOICES = (
    (WIDE, {}, "fused", "fused"),
    (WIDE, {"layout": "contiguous"}, "fused", "library"),
    (Case("large", 2, 256, 24, 24, 64, (1, 1)), {"layout": "contiguous"}, "fused", "fused"),
    (SHALLOW, {"layout": "contiguous"}, "library", "library"),
    (WIDE, {"dtype": torch.bfloat16}, "library", "library"),
    (WIDE, {"magnitude": "linear"}, "library", "library"),
    (Case("few", 4, 256, 12, 12, 64, (1, 1)), {}, "fused", "library"),
    (Case("fewer", 1, 1024, 7, 7, 64, (1, 1)), {}, "library", "library"),
    (Case("small-filters", 2, 64, 7, 7, 64, (1, 1)), {}, "fused", "library"),
    (Case("4x4", 2, 64, 4, 4, 64, (1, 1)), {"layout": "contiguous"}, "fused", "library"),
    (Case("3x5", 80, 64, 3, 5, 64, (1, 1)), {"layout": "contiguous"}, "library", "library"),
    (Case("large-filters", 8, 1024, 12, 12, 2048, (1, 1)), {}, "fused", "library"),
    (Case("strided", 8, 512, 23, 23, 64, (1, 1), stride=2), {}, "fused", "library"),
    (SHALLOW, {}, "fused", "fused"),
    (Case("n7", 7, 24, 12, 12, 18, (3, 3), padding=1), {}, "fused", "library"),
    (Case("large-image", 8, 24, 70, 70, 40, (3, 3), padding=1), {}, "fused", "library"),
    (Case("reflect", 8, 24, 9, 9, 9, (3, 3), 1, 1, padding_mode="reflect"), {}, "fused", "library"),
    (Case("deep", 8, 40, 12, 12, 18, (3, 3), padding=1), {}, "library", "library"),
    (Case("grouped", 8, 32, 12, 12, 18, (3, 3), padding=1, groups=2), {}, "library", "library"),
    (Case("empty", 0, 24, 12, 12, 18, (3, 3), padding=1), {}, "library", "library"),
)

TITLES = {"fused": "one pass", "library": "library convolution and fused passes"}


@pytest.mark.parametrize(
    ("case", "options", "forward", "backward"),
    CHOICES,
    ids=[" ".join([case.id, *map(str, options.values())]) for case, options, *_ in CHOICES],
)
def test_the_rule_chooses_by_the_problem(
    case: Case, options: dict[str, Any], forward: str, backward: str
) -> None:
    before = torch.ops.dcconv.cpu_isa()
    arguments = {"dtype": torch.float32, "layout": "channels_last", "norm": "none"} | options
    inputs = make_inputs(case, **arguments)
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.tensors.items()}
    try:
        for isa in torch.ops.dcconv.cpu_isas():
            torch.ops.dcconv.set_cpu_isa(isa)
            # Kernels of 128 bits leave all to the library, which may use longer vectors.
            wide = isa != "baseline"
            text = backends.report(**leaves, **inputs.options, backend="cpu")
            for direction, strategy in (
                ("forward", forward),
                ("input gradient", backward),
                ("weight gradient", backward),
            ):
                taken = strategy if wide else "library"
                said = f"    {direction}: {taken} ({TITLES[taken]}; "
                assert sum(line.startswith(said) for line in text.splitlines()) == 1
            y = functional.decoupled_conv2d(**leaves, **inputs.options, backend="cpu")
            assert torch.ops.dcconv.cpu_strategy_taken() == (forward if wide else "library")
            torch.autograd.grad(y.sum(), list(leaves.values()))
            assert torch.ops.dcconv.cpu_strategy_taken() == (backward if wide else "library")
    finally:
        torch.ops.dcconv.set_cpu_isa(before)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("norm", ["given", "batch"])
def test_the_norm_map_is_left_out_where_nothing_is_kept(norm: str, layout: str) -> None:
    inputs = make_inputs(WIDE, torch.float32, layout, norm=norm)
    call: dict[str, Any] = {"bias": None} | inputs.tensors | inputs.options
    operands, problem, _ = check_call(**call, backend="cpu", keep="auto")
    torch.ops.dcconv.set_cpu_strategy("fused")
    with torch.no_grad():
        kept, alone = (
            autograd.one_op_forward(operands, problem, what) for what in (OUTPUT, NOTHING)
        )
    assert torch.ops.dcconv.cpu_strategy_taken() == "fused"
    assert kept[1].numel() == 8 * 12 * 12
    assert alone[1].numel() == 0
    assert torch.equal(alone[0], kept[0])


@pytest.mark.parametrize(
    ("dtype", "layout", "options"),
    [
        (torch.float64, "channels_last", {}),
        (torch.bfloat16, "channels_last", {}),
        (torch.float16, "channels_last", {}),
        (torch.float32, "channels_last", {"magnitude": "linear", "norm": "none"}),
    ],
)
def test_calls_that_do_not_fit_are_the_librarys(
    dtype: torch.dtype, layout: str, options: dict[str, str]
) -> None:
    inputs = make_inputs(WIDE, dtype, layout, **options)
    cotangent = random_cotangent(inputs)
    fused = run("fused", inputs, cotangent)
    assert torch.ops.dcconv.cpu_strategy_taken() == "library"
    assert all(same(fused, run("library", inputs, cotangent)).values())


@pytest.mark.parametrize("strategy", ["fused", "library"])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize(("channels", "filters"), [(4096, 20), (20, 4096)])
def test_long_sums_over_channels_and_filters(
    channels: int, filters: int, layout: str, strategy: str
) -> None:
    case = Case("long", 1, channels, 6, 6, filters, (1, 1))
    inputs = make_inputs(case, torch.float32, layout, angular="cosine", norm="batch")
    cotangent = random_cotangent(inputs)
    truth, peer = truth_and_peer(inputs, cotangent)
    got = run(strategy, inputs, cotangent)
    assert torch.ops.dcconv.cpu_strategy_taken() == strategy
    check_all(f"{channels} {filters} {layout} {strategy}", got, truth, peer, torch.float32)


def test_values_behind_a_row_do_not_leak() -> None:
    """Whole vectors are read behind the last column; infinity there stays out of the sums."""
    case = Case("leak", 2, 6, 5, 7, 5, (3, 3), padding=1)
    inputs = make_inputs(case, torch.float32, "channels_last", norm="none")
    cotangent = random_cotangent(inputs)
    clean = run("fused", inputs, cotangent)
    inputs.tensors["x"][1, 0, 2, 3] = float("inf")
    dirty = run("fused", inputs, cotangent)
    assert torch.equal(dirty["y"][0], clean["y"][0])
    assert torch.equal(dirty["x"][0], clean["x"][0])


def test_a_forced_strategy_stays_on_its_thread() -> None:
    """Forward and backward; autograd runs backward of CPU tensors on the thread that asks."""

    def taken() -> list[str]:
        found = []
        x = torch.randn(2, 4, 5, 5, requires_grad=True)
        y = functional.decoupled_conv2d(x, torch.randn(4, 1, 3, 3), groups=4, backend="cpu")
        found.append(torch.ops.dcconv.cpu_strategy_taken())
        y.sum().backward()
        found.append(torch.ops.dcconv.cpu_strategy_taken())
        return found

    torch.ops.dcconv.set_cpu_strategy("library")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.ops.dcconv.cpu_strategy_taken).result() == ""
        assert pool.submit(taken).result() == ["fused", "fused"]
        pool.submit(torch.ops.dcconv.set_cpu_strategy, "fused").result()
        assert taken() == ["library", "library"]


def test_unknown_strategies_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"must be one of auto, library, fused, got 'best'"):
        torch.ops.dcconv.set_cpu_strategy("best")
