"""Constant images, filters and cotangents in float32: sums of equal terms, which round one way.

Every strategy and instruction set of the CPU kernels; other backends run the same problems.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from accuracy import check, evaluate, judge, random_cotangent, truth_and_peer
from cases import Case, Inputs, make_inputs

from dcconv import functional

# From 25 to 1,500 products a sum, and sums of one to 1,600 positions.
CASES = (
    Case("1x1-c200", 1, 200, 6, 7, 16, (1, 1)),
    Case("1x1-c1400", 1, 1400, 4, 4, 17, (1, 1)),
    Case("1x1-o1", 1, 16, 40, 40, 1, (1, 1)),
    Case("3x3-c16", 2, 16, 9, 8, 16, (3, 3), padding=1),
    Case("3x3-c160", 1, 160, 6, 6, 8, (3, 3)),
    Case("3x3-o3", 1, 3, 30, 31, 3, (3, 3), padding=1),
    Case("5x5-groups4", 1, 16, 12, 12, 8, (5, 5), padding=2, groups=4),
    Case("depthwise-5x5", 1, 16, 24, 24, 16, (5, 5), padding=2, groups=16),
    Case("depthwise-3x3-wide", 2, 3, 4, 150, 6, (3, 3), padding=1, groups=3),
)

OPERATORS = (
    ("tanh", "none", "cosine"),
    ("segmented", "none", "linear"),
    ("ball", "linear", "sigmoid"),
    ("tanh", "separate", "square_cosine"),
)


@pytest.fixture(params=["fused", "auto"])
def strategy(request: pytest.FixtureRequest) -> Iterator[str]:
    """Our own products, and what the rule takes."""
    torch.ops.dcconv.set_cpu_strategy(request.param)
    yield request.param
    torch.ops.dcconv.set_cpu_strategy("auto")


def constant_problems(
    case: Case, layout: str, device: str
) -> Iterator[tuple[str, Inputs, torch.Tensor]]:
    """Yield calls with one operand constant, and their cotangents, constant in half of them."""
    draw = random.Random(case.id + layout)
    for number, (magnitude, weighting, angular) in enumerate(OPERATORS):
        inputs = make_inputs(
            case,
            torch.float32,
            layout,
            magnitude=magnitude,
            weighting=weighting,
            angular=angular,
            bias=number % 2 == 0,
            device=device,
        )
        for name in ("x", "weight"):
            value = draw.uniform(0.1, 1.0)
            constant = torch.full_like(inputs.tensors[name], value)
            changed = Inputs(inputs.tensors | {name: constant}, inputs.options)
            cotangent = random_cotangent(changed)
            if number < 2:
                cotangent = torch.full_like(cotangent, draw.uniform(0.1, 1.0))
            yield f"{case.id} {layout} {magnitude} {name} {value:.3f}", changed, cotangent


def compare(case: Case, layout: str, backend: str, device: str) -> None:
    for name, inputs, cotangent in constant_problems(case, layout, device):
        got = evaluate(functional.decoupled_conv2d, inputs, cotangent, backend=backend)
        judge(name, inputs, cotangent, got)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.backend("cpu")
def test_strategies_and_instruction_sets(isa: str, strategy: str, case: Case, layout: str) -> None:
    compare(case, layout, "cpu", "cpu")


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_products_of_constants(isa: str, case: Case, layout: str) -> None:
    """Aligned vectors, whose y, linear in the cosine, is well conditioned: sums of equal products.

    The floor alone, whatever the library's own products are off by.
    """
    torch.ops.dcconv.set_cpu_strategy("fused")
    draw = random.Random(case.id + layout)
    try:
        for _ in range(8):
            inputs = make_inputs(case, torch.float32, layout, magnitude="mix")
            constant = {
                name: torch.full_like(inputs.tensors[name], draw.uniform(0.1, 1.0))
                for name in ("x", "weight")
            }
            inputs = Inputs(inputs.tensors | constant, inputs.options)
            truth, _ = truth_and_peer(inputs)
            got = evaluate(functional.decoupled_conv2d, inputs, backend="cpu")
            strategy = torch.ops.dcconv.cpu_strategy_taken()
            if strategy == "fused":
                check(f"{case.id} {layout}", got["y"], truth["y"], truth["y"], torch.float32)
    finally:
        torch.ops.dcconv.set_cpu_strategy("auto")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_backends(backend: str, device: str, case: Case, layout: str) -> None:
    compare(case, layout, backend, device)


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_sums_have_the_same_bits_at_any_number_of_threads(case: Case) -> None:
    """The norms and what our own passes make of one u; the library's products may differ."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found = []
            for layout in ("contiguous", "channels_last"):
                inputs = make_inputs(
                    case, torch.float32, layout, magnitude="tanh", weighting="separate", bias=True
                )
                # One tap per filter: u is a copy at any number of threads.
                weight = torch.zeros_like(inputs.tensors["weight"])
                weight[:, 0, 0, 0] = 1.0
                inputs = Inputs(inputs.tensors | {"weight": weight}, inputs.options)
                got = evaluate(
                    functional.decoupled_conv2d, inputs, random_cotangent(inputs), backend="cpu"
                )
                found += [got["y"], got["radius"], got["bias"]]
                given = make_inputs(case, torch.float32, layout, norm="given", scalar=True)
                given = Inputs(given.tensors | {"weight": weight}, given.options)
                got = evaluate(
                    functional.decoupled_conv2d, given, random_cotangent(given), backend="cpu"
                )
                found += [got["norm_mean"], got["radius"]]
            results.append(found)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize("threads", [1, 2])
def test_sums_to_one_number_keep_the_rule(backend: str, device: str, threads: int) -> None:
    """norm_mean, one radius and one k, with a bias, whatever the peer's own sums do."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for case in CASES:
            for layout in ("contiguous", "channels_last", "sliced"):
                inputs = make_inputs(
                    case,
                    torch.float32,
                    layout,
                    weighting="separate",
                    angular="sigmoid",
                    norm="given",
                    scalar=True,
                    bias=True,
                    device=device,
                )
                cotangent = random_cotangent(inputs)
                # Terms of both signs, the sum what they leave.
                for mixed in (cotangent, 0.1 * cotangent + torch.randn_like(cotangent)):
                    got = evaluate(functional.decoupled_conv2d, inputs, mixed, backend=backend)
                    judge(f"{case.id} {layout} {threads} threads", inputs, mixed, got)
    finally:
        torch.set_num_threads(before)
