"""Norms of the cuda backend that start from given sums of squares, on models of its ops."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import stand_ins
import torch
from accuracy import check
from calls import check_call
from cases import CASES, DTYPES, make_inputs
from torch import Tensor, nn

import dcconv
from dcconv import backends
from dcconv.operator import reference
from dcconv.operator.layout import memory_format
from dcconv.operator.numerics import compute_dtype
from dcconv.passes import records

# Another number than what the squares of x give, so that it shows who uses the sums.
FACTOR = 4.0

PROVIDERS: dict[str, Callable[[], stand_ins.Implementations]] = {
    "model": lambda: stand_ins.MODELS,
    "emulated": stand_ins.emulated,
}


def norms_call(case: Any, dtype: torch.dtype, layout: str) -> tuple[records.Norms, Any]:
    """Return the arguments of conv2d_norms with the sums of x times the root of FACTOR."""
    inputs = make_inputs(case, dtype, layout)
    (x, weight, *_), problem, _ = check_call(**inputs.tensors, **inputs.options)
    form = memory_format(x, weight)
    last = form == torch.channels_last
    x, weight = x.contiguous(memory_format=form), weight.contiguous(memory_format=form)
    sums = FACTOR * reference.pixel_sums(x, case.groups, last)
    return records.Norms(x, weight, problem.window, problem.operator.eps, True, last, sums), problem


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_are_those_of_the_sums(dtype: torch.dtype, layout: str, provider: str) -> None:
    op = PROVIDERS[provider]()["conv2d_norms"]
    compute = compute_dtype(dtype)
    for case in CASES:
        call, problem = norms_call(case, dtype, layout)
        window = list(call.window)
        a, found, mean = op(call.x, call.weight, *window, *call[3:])
        own = op(call.x, call.weight, *window, *call[3:-1])
        assert torch.equal(a, own[0])
        truth, peer = (
            reference.window_norm(call.x.to(d) * FACTOR**0.5, case.kernel, problem)
            for d in (torch.float64, compute)
        )
        order = (0, 2, 3, 1) if call.channels_last else (0, 1, 2, 3)
        flat = [b.permute(order).reshape(-1) for b in (truth, peer)]
        check(f"{case.id} b", found, *flat, compute)
        if truth.numel():
            check(f"{case.id} mean", mean, truth.mean(), peer.mean(), compute)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_refusals(provider: str) -> None:
    op = PROVIDERS[provider]()["conv2d_norms"]
    x, weight, sums = torch.ones(2, 3, 4, 3), torch.ones(4, 3, 1, 1), torch.ones(24)
    arguments = (x, weight, [1, 1], [0] * 4, [1, 1], 1, "zeros", 1e-4, False, False)
    op(*arguments, sums)
    # The model asserts what the sources refuse in the house sentence.
    error, text = (AssertionError, "") if provider == "model" else (RuntimeError, "^dcconv: sums ")
    for wrong in (sums[1:], sums.double(), torch.ones(48)[::2]):
        if provider == "model" and wrong.dtype == sums.dtype and wrong.numel() == 24:
            continue
        with pytest.raises(error, match=text):
            op(*arguments, wrong)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("strategy", ["library", "fused"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_layers_start_from_the_sums(provider: str, strategy: str, kernel: int) -> None:
    """Training: the norms come before the convolution, whatever computes that."""
    dtype, form = torch.bfloat16, torch.channels_last
    conv = dcconv.DecoupledConv2d(16, 16, kernel, padding=kernel // 2, dtype=dtype)
    conv = conv.to(memory_format=form)
    plain = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), copy.deepcopy(conv))
    norm = dcconv.BatchNormAct2d(16)
    x = torch.randn(2, 16, 5, 4).to(dtype).contiguous(memory_format=form)
    wide = copy.deepcopy(plain).double()
    implementations = PROVIDERS[provider]()
    given: list[Tensor | None] = []

    def noted(*arguments: Any) -> Any:
        given.append(arguments[10] if len(arguments) > 10 else None)
        return implementations["conv2d_norms"](*arguments)

    results = []
    with stand_ins.cuda_backend_on_cpu(implementations | {"conv2d_norms": noted}):
        for module, image in (
            (lambda t: conv(norm(t)), x),
            (plain, x),
            (wide, x.double()),
        ):
            reference_runs = module is not plain and image.dtype == torch.float64
            leaf = image.detach().requires_grad_()
            name = "reference" if module in (plain, wide) or reference_runs else "cuda"
            with backends.use_backend(name), backends.strategies(f"library,{strategy}"):
                y = module(leaf)
            cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
            (grad,) = torch.autograd.grad(y, leaf, cotangent.to(y.dtype))
            results.append((y.detach(), grad))
    assert len(given) == 1 and given[0] is not None
    for got, peer, truth in zip(*results, strict=True):
        check("y and grad_x", got, truth, peer, dtype)
    check("norm_mean", conv.norm_mean, wide[2].norm_mean, plain[2].norm_mean, dtype)
