"""The strategy fused: forward, and the gradient of the input, in one pass; library has the rest.

Three kernels share the work (schemas in ``csrc/schemas.h``): a depthwise one, which takes small
groups too, one for stems, and an implicit GEMM. A predicate here says None or one sentence per
direction, which the choice reads. It asks for sizes, dtypes and the layout, which a traced tensor
has, and for no address: an op that needs an aligned one copies what lies elsewhere.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from dcconv.operator.layout import memory_format
from dcconv.operator.numerics import compute_dtype
from dcconv.operator.records import NORM_BATCH, Operands, Problem, Window
from dcconv.passes import ops, records
from dcconv.passes.backward import InputSide, rows_of
from dcconv.passes.products import size_of
from dcconv.passes.records import COMPILED
from dcconv.tracing import asked_once

# Groups of fewer channels are the depthwise kernel's.
SMALL_GROUP = 8
# Most channels of a stem, and the longest filter, c r s: the taps of a tile of positions and the
# filters of a block stand in shared memory side by side.
STEM_CHANNELS = 4
STEM_TAPS = {torch.bfloat16: 304, torch.float16: 304, torch.float32: 160, torch.float64: 62}
# Most values, in compute dtype, that the depthwise kernel keeps in shared memory in channels_last:
# of a filter, or for the gradient of the input of what a group's filters have for a channel.
DEPTHWISE_VALUES = {torch.float32: 12284, torch.float64: 6140}
# Channels and filters of a group come in vectors of 16 bytes.
VECTOR_BYTES = 16
# The implicit GEMM multiplies with the tensor cores' bfloat16 and float16 instructions.
GEMM_DTYPES = (torch.bfloat16, torch.float16)
# Tensor cores for both 16-bit types, asynchronous copies, shared memory beyond 96 KiB.
CAPABILITY = (8, 0)


@asked_once
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def kernel_of(weight: Tensor, problem: Problem) -> str:
    """Return the kernel that is made for a call's channels."""
    channels, groups = weight.shape[1], problem.window.groups
    if channels < SMALL_GROUP and groups > 1:
        return records.DEPTHWISE
    stem = groups == 1 and channels <= STEM_CHANNELS
    return records.STEM if stem else records.IMPLICIT_GEMM


def _why_not_any(x: Tensor, problem: Problem) -> str | None:
    if x.device.type == "cuda" and _capability(x.device.index) < CAPABILITY:
        return "its kernels are for GPUs from sm_80 on"
    if problem.operator.norm_free:
        return "norm-free operators are one library convolution"
    if problem.window.padding_mode != "zeros":
        return f"its kernels pad with zeros, got padding_mode '{problem.window.padding_mode}'"
    return None


def _why_not_gemm(x: Tensor, weight: Tensor, problem: Problem) -> str | None:
    if x.dtype not in GEMM_DTYPES:
        return f"the implicit GEMM takes bfloat16 and float16, got {x.dtype}"
    if memory_format(x, weight) != torch.channels_last:
        return "the implicit GEMM takes channels_last tensors"
    channels, filters = weight.shape[1], weight.shape[0] // problem.window.groups
    vector = VECTOR_BYTES // x.element_size()
    if channels % vector or filters % vector:
        return (
            f"the implicit GEMM takes multiples of {vector} channels and filters per group, "
            f"got {channels} and {filters}"
        )
    return None


def _why_not_depthwise(x: Tensor, weight: Tensor, summed: int) -> str | None:
    values = summed * weight.shape[2] * weight.shape[3]
    most = DEPTHWISE_VALUES[compute_dtype(x.dtype)]
    if values > most and memory_format(x, weight) == torch.channels_last:
        return (
            f"the depthwise kernel takes sums over at most {most} products in channels_last, "
            f"got {values}"
        )
    return None


def _why_not_stem(weight: Tensor) -> str | None:
    taps = weight.shape[1] * weight.shape[2] * weight.shape[3]
    most = STEM_TAPS[weight.dtype]
    if taps > most:
        return f"the stem kernel takes filters of at most {most} {weight.dtype} values, got {taps}"
    return None


def why_not(operands: Operands, problem: Problem, direction: str = records.FORWARD) -> str | None:
    """Return None if a direction of a call has a kernel of its own, else one sentence why not."""
    x, weight, groups = operands.x, operands.weight, problem.window.groups
    reason = _why_not_any(x, problem)
    if reason is not None:
        return reason
    if direction == records.WEIGHT_GRADIENT:
        depthwise = weight.shape[1] == 1 and groups > 1
        return None if depthwise else records.NO_WEIGHT_GRADIENT
    kernel = kernel_of(weight, problem)
    if kernel == records.DEPTHWISE:
        summed = weight.shape[1] if direction == records.FORWARD else weight.shape[0] // groups
        return _why_not_depthwise(x, weight, summed)
    if kernel == records.STEM:
        forward = direction == records.FORWARD
        return _why_not_stem(weight) if forward else "the stem kernel has no gradient of the input"
    if direction == records.INPUT_GRADIENT and problem.window.stride != (1, 1):
        return f"the gradient of the input takes stride 1, got {problem.window.stride}"
    return _why_not_gemm(x, weight, problem)


def forward(
    operands: Operands, problem: Problem, kept: str, sums: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Evaluate the operator; results as of ``library.forward``.

    Without backward (``kept="nothing"``) the norm map is [0], unless it was there before y.
    """
    kernel = kernel_of(operands.weight, problem)
    # Where windows overlap the implicit GEMM would take each square once per window and column
    # tile, and is given the norms instead.
    finds_norms = kernel != records.IMPLICIT_GEMM or single_pixels(operands.weight, problem.window)
    return compose(operands, problem, kept, kernel, finds_norms, sums)


def single_pixels(weight: Tensor, window: Window) -> bool:
    """Return whether windows are single pixels of x."""
    return weight.shape[2] == weight.shape[3] == 1 and not any(window.padding)


def compose(
    operands: Operands,
    problem: Problem,
    kept: str,
    kernel: str,
    finds_norms: bool,
    sums: Tensor | None,
    tile: int = records.OWN_RULE,
    namespace: str = COMPILED,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Evaluate the operator by a kernel and tile of a namespace's ops.

    ``finds_norms``: on the way; the mean of the norms must be there before the first h. ``sums``,
    as of ``library.forward``, are left alone where norms are found on the way.
    """
    x, weight, bias, radius, norm_mean, k = operands
    layout = memory_format(x, weight)
    last = layout == torch.channels_last
    x, weight = x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
    batch_mean, eps, window = problem.norm == NORM_BATCH, problem.operator.eps, problem.window
    norms: Tensor | None = None
    if batch_mean or not finds_norms:
        norms_of = records.Norms(x, weight, window, eps, batch_mean, last, sums)
        a, norms, mean = ops.conv2d_norms(norms_of, namespace)
    else:
        a = ops.filter_norm(records.FilterNorm(weight, eps), namespace)
        mean = x.new_empty(0, dtype=compute_dtype(x.dtype))
    parameters = records.Parameters(radius, mean if batch_mean else norm_mean, k)
    formula = (records.functions(problem), problem.delta, eps)
    keeps = (kept != records.NOTHING, kept == records.DOT)
    tensors = (x, weight, a, norms, bias, parameters)
    given = norms is not None
    call = records.OnePass(*tensors, window, *formula, given, *keeps, kernel, tile, last)
    y, norm_map, dot = ops.conv2d_one_pass(call, namespace)
    return y, norm_map if norms is None else norms, mean, dot, a


def input_gradient(
    side: InputSide,
    problem: Problem,
    kernel: str | None = None,
    tile: int = records.OWN_RULE,
    namespace: str = COMPILED,
) -> Tensor:
    """Return grad_x: the convolution's, and x times the window sums of the taps.

    By a kernel and tile of a namespace's ops; None for the one made for the channels.
    """
    grad_u, x, weight, taps = side
    layout, kernel = memory_format(x, weight), kernel or kernel_of(weight, problem)
    weight, last = weight.contiguous(memory_format=layout), layout == torch.channels_last
    call = records.OnePassGradInput(grad_u, weight, x, taps, problem.window, kernel, tile, last)
    return ops.conv2d_one_pass_grad_input(call, namespace)


def weight_gradient(
    grad_u: Tensor, x: Tensor, weight: Tensor, problem: Problem, namespace: str = COMPILED
) -> Tensor:
    """Return the convolution's gradient of a depthwise weight, in the weight's layout."""
    last = memory_format(x, weight) == torch.channels_last
    own = memory_format(weight) == torch.channels_last
    # The partial sums of long filters take no more elements than grad_u.
    positions = grad_u.shape[0] * grad_u.shape[2] * grad_u.shape[3]
    most = torch.sym_max(1, positions // (weight.shape[2] * weight.shape[3]))
    rows = cast(int, torch.sym_min(rows_of(x, grad_u, problem, last, namespace), most))
    call = records.DepthwiseGradWeight(grad_u, x, size_of(weight), problem.window, rows, own, last)
    return ops.depthwise_grad_weight(call, namespace)
