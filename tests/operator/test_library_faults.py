"""Convolutions that PyTorch's CPU library gets wrong and the backends do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import check
from torch import Tensor

from dcconv import native
from dcconv.functional import decoupled_conv2d
from dcconv.operator import reference

OPERATORS: dict[str, dict[str, Any]] = {
    "F.conv2d": {"magnitude": "linear", "weighting": "linear"},
    "norm-free": {"magnitude": "linear", "bias": torch.ones(16).bfloat16()},
    "sphere": {"magnitude": "sphere", "angular": "square_cosine"},
}


def leave_nan_in_free_memory() -> None:
    for size in (1 << 6, 1 << 10, 1 << 14, 1 << 17, 1 << 20):
        del [torch.full((size,), torch.nan) for _ in range(4)][:]


def gradients(function: Any, x: Tensor, weight: Tensor, grad_y: Tensor, **options: Any) -> Any:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    geometry = {"padding": (2, 1), "dilation": (2, 1)}
    y = function(x, weight, **geometry, **options)
    leave_nan_in_free_memory()
    return torch.autograd.grad(y, (x, weight), grad_y)


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("groups", [2, 16])
@pytest.mark.parametrize("operator", OPERATORS)
def test_bfloat16_gradient_of_dilated_groups(operator: str, groups: int, name: str) -> None:
    if name == "cpu" and native.missing is not None:
        pytest.skip(native.missing)
    options = {"groups": groups, **OPERATORS[operator]}
    generator = torch.Generator().manual_seed(1)
    x, weight, grad_y = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((2, 16, 10, 40), (16, 16 // groups, 3, 3), (2, 16, 10, 40))
    )
    layout = torch.channels_last
    got = gradients(
        decoupled_conv2d,
        *(t.to(memory_format=layout) for t in (x, weight, grad_y)),
        backend=name,
        **options,
    )
    # The library is wrong in channels_last alone.
    peer = gradients(reference.decoupled_conv2d, x, weight, grad_y, **options)
    doubles = {n: v.double() if isinstance(v, Tensor) else v for n, v in options.items()}
    wide = (t.double() for t in (x, weight, grad_y))
    truth = gradients(reference.decoupled_conv2d, *wide, **doubles)
    for tensor, a, b, c in zip(("grad_x", "grad_weight"), got, truth, peer, strict=True):
        check(tensor, a, b, c, torch.bfloat16)
