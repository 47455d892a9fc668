"""The strategy graph: cuDNN's graph compiler runs the convolution with the whole epilogue in it.

Forward: norms, one graph. Input gradient: the map of summed taps, one graph. What is saved and
returned is what library saves and returns, in its layouts, so that the strategies of forward and
backward mix. Products with filters, gradients of filters and the pass over dy are those of library.

cuDNN may refuse a graph that the static rules below let pass; the op then says so once and
computes by the strategy library (``dcconv.cudnn.ops``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcconv.cudnn import epilogue
from dcconv.cudnn import ops as cudnn_ops
from dcconv.operator.layout import memory_format
from dcconv.operator.numerics import TF32_ANGLE_DELTA
from dcconv.operator.records import NORM_BATCH, Operands, Problem
from dcconv.passes import ops, records
from dcconv.passes.backward import InputSide
from dcconv.tracing import asked_once

# Channels and filters come in multiples of this: 16 bytes of half precision.
CHANNELS = 8

# The first GPUs that cuDNN compiles fused convolutions for at full speed.
OLDEST_GPU = (8, 0)


@asked_once
def _why_not_gpu(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    new = (major, minor) >= OLDEST_GPU
    return None if new else f"this GPU is sm_{major}{minor}: sm_80 or later is needed"


def why_not(operands: Operands, problem: Problem, direction: str = records.FORWARD) -> str | None:
    """Return one sentence why a direction cannot run as a graph, None if it may.

    Static facts only.
    """
    x, weight, stride = operands.x, operands.weight, problem.window.stride
    if direction == records.WEIGHT_GRADIENT:
        return "the gradient of the weight is the library's"
    if direction == records.INPUT_GRADIENT and stride != (1, 1):
        return f"its epilogue on a strided data gradient is slow, got stride {stride}"
    if x.device.type != "cuda":
        return f"it runs on CUDA tensors, got a {x.device.type} tensor"
    reason = cudnn_ops.why_not_installed() or _why_not_gpu(x.device.index or 0)
    reason = reason or epilogue.why_not(problem)
    if reason is not None:
        return reason
    if x.dtype == torch.float64:
        return "it fuses no float64 convolutions"
    if x.dtype == torch.float32 and problem.delta != TF32_ANGLE_DELTA:
        return "its float32 convolutions are TF32, which PyTorch's settings forbid"
    if memory_format(x, weight) != torch.channels_last:
        return "it reads channels_last tensors only"
    for name, count in (("channels", weight.shape[1]), ("filters", weight.shape[0])):
        if count % CHANNELS:
            return f"it takes {name} in multiples of {CHANNELS}, got {count}"
    return None


def forward(
    operands: Operands, problem: Problem, kept: str, sums: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Evaluate an operator that :func:`why_not` accepts.

    Returns:
        y, the norm map, the mean norm, u and the filter norms, as ``library.forward``.
    """
    x, weight, bias, radius, norm_mean, k = operands
    x = x.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    eps = problem.operator.eps
    batch_mean, window = problem.norm == NORM_BATCH, problem.window
    norms_of = records.Norms(x, weight, window, eps, batch_mean, True, sums)
    a, norms, mean = ops.conv2d_norms(norms_of)
    parameters = records.Parameters(radius, mean if batch_mean else norm_mean, k)
    formula = (records.functions(problem), problem.delta, eps)
    tensors = (x, weight, a, norms, bias, parameters)
    call = cudnn_ops.GraphForward(*tensors, window, *formula, kept == records.DOT)
    y, dot = cudnn_ops.cudnn_conv2d_forward(call)
    return y, norms, mean, dot, a


def input_gradient(side: InputSide, problem: Problem) -> Tensor:
    """Return grad_x of a call that :func:`why_not` accepts."""
    grad_u = side.grad_u.contiguous(memory_format=torch.channels_last)
    x = side.x.contiguous(memory_format=torch.channels_last)
    weight = side.weight.contiguous(memory_format=torch.channels_last)
    call = cudnn_ops.GraphGradInput(grad_u, x, weight, side.taps, problem.window)
    return cudnn_ops.cudnn_conv2d_grad_input(call)
