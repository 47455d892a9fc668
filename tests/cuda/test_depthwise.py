"""The depthwise CUDA kernels in the SIMT model: forward, input gradient, weight gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accuracy import check
from cases import DTYPES, OPERATORS, Case, make_inputs
from direct_ops import (
    check_forward,
    emulated_ops,
    from_map,
    geometry_of,
    gradients,
    layout_of,
    random_backward,
    to_map,
)
from torch import Tensor

NORMS = ("batch", "given", "none")

# Vectors of four channels; K of 3, 5, 7 and any other; strips of four with tails; more vectors than
# a block has side by side; multipliers, small groups and odd channels.
CASES = (
    Case("k3", 2, 8, 5, 7, 8, (3, 3), padding=1, groups=8),
    Case("k3-s2", 1, 8, 9, 10, 8, (3, 3), stride=2, padding=1, groups=8),
    Case("k3-wide", 1, 72, 4, 9, 72, (3, 3), padding=1, groups=72),
    Case("k5", 1, 4, 6, 9, 4, (5, 5), padding=2, groups=4),
    Case("k7", 1, 12, 8, 6, 12, (7, 7), padding=3, groups=12),
    Case("k7-s2", 1, 4, 9, 9, 4, (7, 7), stride=2, padding=3, groups=4),
    Case("k4x2", 1, 4, 7, 6, 4, (4, 2), padding=(2, 0), groups=4),
    Case("dilation2", 1, 4, 8, 7, 4, (3, 3), padding=2, dilation=2, groups=4),
    Case("strides", 1, 4, 9, 10, 4, (3, 3), stride=(2, 3), padding=1, groups=4),
    Case("padding-beyond-kernel", 1, 4, 3, 4, 4, (3, 3), padding=5, groups=4),
    Case("padding-beyond-kernel-s2", 1, 4, 3, 4, 4, (3, 3), stride=2, padding=4, groups=4),
    Case("same-s2", 1, 8, 6, 7, 8, (3, 3), stride=2, padding="same", groups=8),
    Case("same-even", 1, 4, 6, 5, 4, (4, 4), padding="same", groups=4),
    Case("one-pixel", 3, 4, 3, 3, 4, (3, 3), groups=4),
    Case("one-input", 2, 4, 1, 1, 4, (3, 3), padding=1, groups=4),
    Case("n0", 0, 4, 5, 5, 4, (3, 3), padding=1, groups=4),
    Case("odd-channels", 2, 5, 7, 6, 5, (3, 3), padding=1, groups=5),
    Case("multiplier3", 1, 4, 6, 7, 12, (3, 3), stride=2, padding=1, groups=4),
    Case("multiplier2-k7", 1, 4, 6, 7, 8, (7, 7), padding=3, groups=4),
    Case("groups-of-2-to-3", 2, 6, 5, 6, 9, (3, 3), padding=1, groups=3),
    Case("groups-of-4", 1, 8, 6, 5, 8, (3, 2), stride=2, padding=1, dilation=2, groups=2),
    Case("reflect", 1, 4, 6, 7, 4, (3, 3), padding=2, groups=4, padding_mode="reflect"),
    Case("replicate", 1, 4, 5, 4, 4, (3, 3), 2, (2, 1), groups=4, padding_mode="replicate"),
    Case("circular", 1, 6, 5, 6, 6, (3, 3), padding=2, groups=6, padding_mode="circular"),
    Case("large-kernel", 1, 4, 8, 9, 4, (31, 31), padding=15, groups=4),
)


def ids(value: Any) -> str:
    return getattr(value, "id", None) or str(value).removeprefix("torch.")


@pytest.fixture(scope="module", autouse=True)
def ops() -> Iterator[Any]:
    with emulated_ops() as loaded:
        yield loaded


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_forward_agrees_with_the_reference(case: Case, ops: Any) -> None:
    for i, dtype in enumerate(DTYPES):
        for last in (False, True):
            place = 7 * CASES.index(case) + 13 * i + 3 * last
            magnitude, weighting, angular = OPERATORS[37 * place % len(OPERATORS)]
            inputs = make_inputs(
                case,
                dtype,
                magnitude=magnitude,
                weighting=weighting,
                angular=angular,
                norm=NORMS[place % 3],
                bias=place % 4 == 0,
                scalar=place % 5 == 0,
            )
            name = f"{case.id} {dtype} {last} {magnitude} {weighting} {angular}"
            check_forward(ops, "depthwise", name, inputs, last, keep_dot=place % 2 == 0)


@pytest.mark.parametrize("operator", OPERATORS, ids="-".join)
def test_operator_agrees_with_the_reference(operator: tuple[str, str, str], ops: Any) -> None:
    magnitude, weighting, angular = operator
    for i, norm in enumerate(NORMS):
        place = OPERATORS.index(operator) + i
        inputs = make_inputs(
            CASES[place % 2 * 16],
            (torch.float32, torch.bfloat16)[place % 2],
            magnitude=magnitude,
            weighting=weighting,
            angular=angular,
            norm=norm,
            bias=place % 3 == 0,
            alpha=1.25,
            beta=0.75,
            power=2.5,
        )
        check_forward(ops, "depthwise", norm, inputs, place // 2 % 2 == 0, keep_dot=True)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_input_gradient_agrees_with_the_library(case: Case, ops: Any) -> None:
    for dtype in DTYPES:
        inputs = make_inputs(case, dtype)
        grad_u, t, b, sigma, problem = random_backward(case, inputs)
        for last in (False, True):
            x, weight, du = (
                v.contiguous(memory_format=layout_of(last))
                for v in (inputs.tensors["x"], inputs.tensors["weight"], grad_u)
            )
            for with_mean in (False, True):
                tap = t.double() + (sigma.double() / b.double() if with_mean else 0.0)
                truth, _ = gradients(x, weight, du, tap, problem)
                got = ops.conv2d_one_pass_grad_input(
                    du,
                    weight,
                    x,
                    to_map(t, last),
                    to_map(b, last),
                    sigma if with_mean else None,
                    *geometry_of(problem),
                    "depthwise",
                    -1,
                    last,
                )
                assert got.is_contiguous(memory_format=layout_of(last))
                check(f"{case.id} {last} {with_mean}", got, truth, truth.to(dtype), dtype)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.groups == c.c and c.kernel < (9, 9)], ids=ids
)
def test_weight_gradient_agrees_with_the_library(case: Case, ops: Any) -> None:
    for i, dtype in enumerate(DTYPES):
        inputs = make_inputs(case, dtype)
        grad_u, t, _, _, problem = random_backward(case, inputs)
        weight = inputs.tensors["weight"]
        _, truth = gradients(inputs.tensors["x"], weight, grad_u, torch.zeros_like(t), problem)
        for last in (False, True):
            x, du = (
                v.contiguous(memory_format=layout_of(last)) for v in (inputs.tensors["x"], grad_u)
            )
            got = ops.depthwise_grad_weight(
                du, x, case.kernel, *geometry_of(problem), (1, 2, 5)[(i + last) % 3], last, last
            )
            assert got.is_contiguous(memory_format=layout_of(last))
            check(f"{case.id} {last}", got, truth, truth.to(dtype), dtype)


@pytest.mark.parametrize("operator", OPERATORS[::2], ids="-".join)
def test_du_by_vectors_is_the_du_of_the_other_layout(
    operator: tuple[str, str, str], ops: Any
) -> None:
    """The pass over [n, c, p, q], compared with the reference elsewhere, is the peer."""
    magnitude, weighting, angular = operator
    n, c, p, q, sums = 2, 72, 5, 3, 15
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    grad_y, kept = normal(n, c, p, q), normal(n, c, p, q)
    b, a, radius, k = (normal(*shape).abs() + 0.5 for shape in ((n, c, p, q), (c,), (c,), (c,)))
    for i, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        wants_t = (OPERATORS.index(operator) + i) % 4 != 0
        results = []
        for last in (False, True):
            du, t, parts = ops.conv2d_grad_dot(
                *(v.to(dtype).contiguous(memory_format=layout_of(last)) for v in (grad_y, kept)),
                to_map(b, last),
                a,
                radius if i else radius[0],
                None,
                k,
                c,
                magnitude,
                angular,
                weighting,
                1.25,
                0.75,
                2.5,
                1e-3,
                "dot",
                wants_t,
                sums,
                3,
                last,
            )
            t = from_map(t, b, last) if wants_t else t
            results.append((du, t, *parts.double().sum(1)))
        for name, want, got in zip(("du", "t", "rho", "a", "k", "bias"), *results, strict=True):
            check(f"{dtype} {name}", got, want.double(), want, torch.float32)


def test_long_filters_that_do_not_fit_by_vectors(ops: Any) -> None:
    """4096 taps of four channels take more than 48 KB, those of one channel do not."""
    case = Case("long", 1, 4, 62, 3, 4, (1024, 4), padding=(482, 1), groups=4)
    inputs = make_inputs(case, torch.float32)
    check_forward(ops, "depthwise", "long", inputs, True, keep_dot=False)
    grad_u, t, b, _, problem = random_backward(case, inputs)
    x, weight, du = (
        v.contiguous(memory_format=torch.channels_last)
        for v in (inputs.tensors["x"], inputs.tensors["weight"], grad_u)
    )
    truth, _ = gradients(x, weight, du, t, problem)
    got = ops.conv2d_one_pass_grad_input(
        du,
        weight,
        x,
        to_map(t, True),
        to_map(b, True),
        None,
        *geometry_of(problem),
        "depthwise",
        -1,
        True,
    )
    check("long", got, truth, truth.float(), torch.float32)


def test_guards(ops: Any) -> None:
    case = Case("huge", 1, 1, 4, 4, 1, (120, 120), padding=60)
    inputs = make_inputs(case, torch.float32)
    with pytest.raises(RuntimeError, match="dcconv: a depthwise filter must fit in shared memory"):
        check_forward(ops, "depthwise", "huge", inputs, True, keep_dot=False)
