"""One pass forward: norms, dot product and epilogue in one kernel.

Plan A moves x twice and its result three times; here x is read and y written, which pays where the
product is shallow: groups of one channel, and 1x1 layers. Backward is plan A's. Only Triton has
the op.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcconv import ops, plan_a
from dcconv.keep import DOT
from dcconv.numerics import compute_dtype
from dcconv.problem import NORM_BATCH, Operands, Problem


def why_not(x: Tensor, weight: Tensor, problem: Problem) -> str | None:
    """Return None where one pass does it, else one sentence why not."""
    if problem.norm_free:
        return "without a norm the library convolution is all there is"
    if problem.groups > 1:
        return None if weight.shape[1] == 1 else "groups of several channels have no kernel"
    if tuple(weight.shape[2:]) != (1, 1) or any(problem.padding):
        return "windows of several pixels have no kernel"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return "float32 products are the library's, at the precision that PyTorch is set to"
    if ops.memory_format(x, weight) != torch.channels_last:
        return "1x1 layers have a kernel in channels_last order"
    return None


def forward(
    operands: Operands, problem: Problem, kept: str, namespace: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Evaluate the operator; returns what :func:`dcconv.plan_a.forward` does."""
    passes = getattr(torch.ops, namespace)
    x, weight, bias, radius, norm_mean, k = operands
    layout = ops.memory_format(x, weight)
    channels_last = layout == torch.channels_last
    x = x.contiguous(memory_format=layout)
    weight = weight.contiguous(memory_format=ops.memory_format(weight))
    geometry = plan_a.geometry(problem)
    batch_mean = problem.norm == NORM_BATCH
    if batch_mean:
        a, norms, mean = passes.conv2d_norms(
            x, weight, *geometry, problem.eps, batch_mean, channels_last
        )
    else:
        _, a = passes.filter_scale(weight, 1.0, problem.eps, False)
        norms = mean = x.new_empty(0, dtype=compute_dtype(x.dtype))
    y, norm_map, dot = passes.conv2d_direct(
        x,
        weight,
        a,
        norms,
        bias,
        radius,
        mean if batch_mean else norm_mean,
        k,
        *geometry,
        *plan_a.operator(problem),
        problem.eps,
        batch_mean,
        kept == DOT,
        channels_last,
    )
    return y, norms if batch_mean else norm_map, mean, dot, a
