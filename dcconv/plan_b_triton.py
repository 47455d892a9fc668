"""Plan B of the Triton backend: one pass in depthwise layers and, as an implicit GEMM, in others.

The composition is that of :mod:`dcconv.plan_b`, on Triton's ops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcconv import ops, plan_b
from dcconv.plan_b import DEPTHWISE, IMPLICIT_GEMM, OWN_RULE
from dcconv.problem import Operands, Problem

NAMESPACE = "dcconv_triton"


def kernel_of(weight: Tensor, problem: Problem) -> str:
    """Return the kernel that is made for a call's channels."""
    return DEPTHWISE if problem.groups > 1 and weight.shape[1] == 1 else IMPLICIT_GEMM


def why_not(operands: Operands, problem: Problem) -> str | None:
    """Return None if the forward pass of a call can run, else one sentence why not."""
    x, weight, *_ = operands
    if problem.norm_free:
        return "norm-free operators are one library convolution"
    if kernel_of(weight, problem) == DEPTHWISE:
        return None
    if problem.groups > 1:
        return "groups of several channels have no kernel"
    if tuple(weight.shape[2:]) != (1, 1) or any(problem.padding):
        return "windows of several pixels have no kernel"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return "float32 products are the library's, at the precision that PyTorch is set to"
    if ops.memory_format(x, weight) != torch.channels_last:
        return "1x1 layers have a kernel in channels_last order"
    return None


def why_not_input_gradient(operands: Operands, problem: Problem) -> str | None:
    """Return None if the gradient of x can be computed, else one sentence why not."""
    return "the gradient of the input is the library's"


def why_not_weight_gradient(operands: Operands, problem: Problem) -> str | None:
    """Return None if the gradient of the weight can be computed, else one sentence why not."""
    return "the gradient of the weight is the library's"


def forward(
    operands: Operands, problem: Problem, kept: str, tile: int = OWN_RULE
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Evaluate the operator; results as of ``plan_b.forward``."""
    kernel = kernel_of(operands.weight, problem)
    return plan_b.compose(operands, problem, kept, kernel, tile, NAMESPACE)


def input_gradient(
    grad_u: Tensor,
    x: Tensor,
    weight: Tensor,
    t: Tensor,
    norm_map: Tensor,
    sigma: Tensor | None,
    problem: Problem,
    tile: int = OWN_RULE,
) -> Tensor:
    """Return grad_x: the convolution's, and x times the window sums of t + sigma / b."""
    kernel = kernel_of(weight, problem)
    return plan_b.compose_input_gradient(
        grad_u, x, weight, t, norm_map, sigma, problem, kernel, tile, NAMESPACE
    )
