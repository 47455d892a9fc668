"""Norms that start from sums of squares per pixel, given by whoever wrote x."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accuracy import check
from calls import check_call
from cases import CASES, DTYPES, Case, by_id, make_inputs
from torch import Tensor

from dcconv import backends, native
from dcconv.call import autograd, cpu
from dcconv.operator import reference
from dcconv.operator.layout import memory_format
from dcconv.operator.numerics import compute_dtype
from dcconv.operator.records import NORM_BATCH, Operands, Problem
from dcconv.passes import ops, records

pytestmark = pytest.mark.backend("cpu")

# Another number than what the squares of x give, so that it shows who uses the sums.
FACTOR = 4.0
DEPTHWISE = {case.id for case in CASES if case.groups == case.c}


@pytest.fixture(params=[0, 1], ids=["whole", "chunks"])
def chunk(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.ops.dcconv.set_cpu_chunk(request.param)
    yield request.param
    torch.ops.dcconv.set_cpu_chunk(0)


def flat(b: Tensor, last: bool) -> Tensor:
    return (b.permute(0, 2, 3, 1) if last else b).reshape(-1)


def call_of(
    case: Case, dtype: torch.dtype, layout: str, norm: str = "batch"
) -> tuple[Operands, Problem, Tensor]:
    """Return a call and the sums that FACTOR times the squares of its x have."""
    inputs = make_inputs(case, dtype, layout, norm=norm)
    operands, problem, _ = check_call(**inputs.tensors, **inputs.options)
    last = memory_format(operands.x, operands.weight) == torch.channels_last
    return operands, problem, FACTOR * reference.pixel_sums(operands.x, case.groups, last)


def expected(operands: Operands, problem: Problem, dtype: torch.dtype) -> Tensor:
    """Return the norms that the given sums stand for: those of x times the root of FACTOR."""
    x, weight = operands.x.to(dtype) * FACTOR**0.5, operands.weight
    b = reference.window_norm(x, (weight.shape[2], weight.shape[3]), problem)
    return flat(b, memory_format(operands.x, weight) == torch.channels_last)


@pytest.mark.parametrize("strategy", ["library", "fused"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["batch", "given", "none"])
def test_norms_are_those_of_the_sums(
    strategy: str, layout: str, dtype: torch.dtype, norm: str, chunk: int
) -> None:
    taken = set()
    for case in CASES:
        operands, problem, sums = call_of(case, dtype, layout, norm)
        _, found, mean, _ = cpu.forward(strategy)(operands, problem, records.DOT, sums)
        _, own, _, _ = cpu.forward(strategy)(operands, problem, records.DOT)
        took = str(torch.ops.dcconv.cpu_strategy_taken())
        taken.add(took)
        compute = compute_dtype(dtype)
        truth, peer = (expected(operands, problem, d) for d in (torch.float64, compute))
        if case.id in DEPTHWISE and took == "fused":
            assert torch.equal(found, own)  # its kernels find norms on their way
            continue
        check(f"{case.id} b", found, truth, peer, compute)
        if norm == NORM_BATCH and truth.numel():
            check(f"{case.id} mean", mean, truth.mean(), peer.mean(), compute)
    # Of other dtypes there are fused kernels for depthwise layers alone.
    assert taken == ({"library"} if strategy == "library" else {"library", "fused"})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_own_sums_change_nothing(dtype: torch.dtype) -> None:
    """Sums that are x's own give y, u and the mean by the rule, the reference being the peer."""
    for case in CASES:
        operands, problem, sums = call_of(case, dtype, "channels_last")
        for kept in (records.NOTHING, records.OUTPUT, records.DOT):
            y, _, mean, _ = autograd.one_op_forward(operands, problem, kept, sums / FACTOR)
            wide = Operands._make(None if t is None else t.double() for t in operands)
            truth, truth_mean = reference.forward(wide, problem)
            peer, peer_mean = reference.forward(operands, problem)
            check(f"{case.id} y", y, truth, peer, dtype)
            if truth.numel():
                assert truth_mean is not None and peer_mean is not None
                check(f"{case.id} mean", mean, truth_mean, peer_mean, compute_dtype(dtype))


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_gradients_do_not_depend_on_who_found_the_norms(norm: str) -> None:
    """The gradient through the sums is part of x's own."""
    operands, problem, sums = call_of(by_id("3x3-p1"), torch.float64, "channels_last", norm)
    results = []
    for given in (None, sums / FACTOR):
        leaves = [None if t is None else t.detach().requires_grad_() for t in operands]
        y, *_ = autograd.DecoupledConv2dFunction.apply(*leaves, problem, "output", None, given)
        known = [leaf for leaf in leaves if leaf is not None]
        first = torch.autograd.grad(y.square().sum(), known, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), known)
        results.append([y, *first, *second])
    for one, two in zip(*results, strict=True):
        check("own and given", two, one, one, torch.float64)


def test_opcheck() -> None:
    for name in ("3x3-p1", "groups3-odd", "1x1"):
        for layout in ("contiguous", "channels_last"):
            operands, problem, sums = call_of(by_id(name), torch.float32, layout)
            arguments = (*native.conv2d_arguments(operands, problem), True, True, sums)
            forward = torch.ops.dcconv.conv2d_forward.default
            tests = ("test_schema", "test_faketensor", "test_autograd_registration")
            torch.library.opcheck(forward, arguments, test_utils=tests)


@pytest.mark.parametrize("meta", [False, True], ids=["op", "fake"])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda sums: sums[:-1], r"sums must have shape \[24\], got \[23\]"),
        (lambda sums: sums.reshape(2, 12), r"sums must have shape \[24\], got \[2, 12\]"),
        (lambda sums: sums.double(), r"sums must have dtype (torch\.)?float32, got \S*float64"),
    ],
    ids=["short", "square", "dtype"],
)
def test_refusals(change: Any, text: str, meta: bool) -> None:
    x, weight, sums = torch.ones(2, 3, 4, 3), torch.ones(4, 3, 1, 1), torch.ones(24)
    operands, problem, _ = check_call(x, weight)
    arguments = (*native.conv2d_arguments(operands, problem), False, True, change(sums))
    if meta:
        arguments = tuple(t.to("meta") if isinstance(t, Tensor) else t for t in arguments)
    with pytest.raises(RuntimeError, match=f"^dcconv: {text}$"):
        torch.ops.dcconv.conv2d_forward(*arguments)


def test_the_reference_finds_its_own() -> None:
    """Autograd has to see the squares."""
    operands, problem, sums = call_of(by_id("3x3-p1"), torch.float32, "contiguous")
    chosen = backends.choose(operands.x, "reference")
    y, _ = chosen.conv2d(operands, problem, "output", sums)
    assert torch.equal(y, reference.forward(operands, problem)[0])


def test_the_op_of_norms_takes_sums_in_its_fake() -> None:
    operands, problem, sums = call_of(by_id("3x3-p1"), torch.float32, "contiguous")
    call = records.Norms(operands.x, operands.weight, problem.window, 1e-4, True, False, sums)
    a, b, mean = ops.conv2d_norms.fake(call)
    assert (a.shape, mean.shape) == (operands.weight.shape[:1], ())
    with pytest.raises(RuntimeError, match=re.escape("dcconv: sums must have shape")):
        ops.conv2d_norms.fake(call._replace(sums=sums[1:]))
    assert b.dim() == 1
