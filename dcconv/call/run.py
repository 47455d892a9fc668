"""Runs a call: checks it against its records, chooses a backend, and calls it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from dcconv import backends
from dcconv.operator import arguments, checks
from dcconv.operator.records import Geometry, Operator, knows_autocast, without_autocast
from dcconv.tracing import quietly, recording


def _autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast x, weight and bias to the autocast dtype, where autocast is on for x's device."""
    if not isinstance(x, Tensor) or not knows_autocast(x):
        return x, weight, bias
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t: Any) -> Any:
        # float64 stays, as in PyTorch's own autocast.
        wanted = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if wanted else t

    return cast(x), cast(weight), cast(bias)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    radius: Tensor | float,
    norm_mean: Tensor | str | None,
    k: Tensor | float,
    operator: Operator,
    geometry: Geometry,
    keep: str,
    backend: str | None,
    norm_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Run a decoupled convolution and also return the batch's mean norm, detached.

    The mean is a scalar in compute dtype where ``norm_mean="batch"`` and the magnitude has a
    radius, else None or an empty tensor. The layer keeps its moving average from it.
    """
    with quietly() if recording() else nullcontext():
        x, weight, bias = _autocast(x, weight, bias)
        operands, problem = arguments.convolution(
            x, weight, bias, radius, norm_mean, k, operator, geometry, norm_grad
        )
        checks.choice("keep", keep, checks.KEEPS)
        if backend is not None:
            backends.check_name("backend", backend)
        chosen = backends.choose(operands.x, backend, operator)
    with without_autocast(operands.x):
        y, mean = chosen.conv2d(operands, problem, keep)
    return y if x.dim() == 4 else y.squeeze(0), mean if mean is None else mean.detach()


def patch_norm(
    x: Tensor, kernel_size: Any, geometry: Geometry, eps: float, backend: str | None
) -> Tensor:
    """Run a patch norm."""
    with quietly() if recording() else nullcontext():
        batched, kernel, problem = arguments.patch_norm(x, kernel_size, geometry, eps)
    if backend is not None:
        backends.check_name("backend", backend)
    with without_autocast(x):
        b = backends.choose(batched, backend).patch_norm(batched, kernel, problem)
    return b if x.dim() == 4 else b.squeeze(0)
