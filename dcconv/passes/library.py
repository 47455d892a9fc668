"""Plan A: the library convolution between fused passes, composed of small ops.

Forward: norms, library convolution, epilogue. Backward: the pass over dy, the library's two
gradients, the filter side, and the pass that finishes grad_x. The passes work on tensors that are
dense in the layout of the library's result (``memory_format``); their schemas, with what each
result holds, stand in ``csrc/schemas.h``. Every function takes the namespace of the ops: several
libraries implement them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from dcconv import native
from dcconv.call.saved import DOT
from dcconv.operator import convolution, reference
from dcconv.operator.layout import memory_format
from dcconv.operator.numerics import compute_dtype
from dcconv.operator.records import NORM_BATCH, Operands, Problem

# Bits of the ``sums`` argument: per-filter sums over all positions, of dy g h_rho, dy g h_a,
# dy h g_k and dy.
SUM_RHO, SUM_A, SUM_K, SUM_BIAS = (1 << i for i in range(4))

# The pass over dy has at most this many blocks per multiprocessor, each with at least this many
# positions: every block leaves one row of partial sums.
BLOCKS_PER_MULTIPROCESSOR = 4
POSITIONS_PER_BLOCK = 64

# (grad_u, x, weight, t, norm_map, sigma or None, problem) -> grad_x, and
# (grad_u, x, weight, problem) -> the library's gradient of the weight, in the weight's layout: what
# other plans put in the place of the library and of the pass that finishes grad_x.
InputGradient: TypeAlias = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Problem], Tensor
]
WeightGradient: TypeAlias = Callable[[Tensor, Tensor, Tensor, Problem], Tensor]

#: Namespace of the compiled library's ops.
COMPILED = "dcconv"

_multiprocessors: dict[int, int] = {}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _multiprocessors_of(index: int) -> int:
    if index not in _multiprocessors:
        properties = torch.cuda.get_device_properties(index)
        _multiprocessors[index] = properties.multi_processor_count
    return _multiprocessors[index]


def partial_rows(x: Tensor, positions: int, groups: int, channels_last: bool) -> int:
    """Return the number of partial sums per filter: a function of problem and device alone."""
    # On other devices the ops are emulated: two, so that there is more than one row.
    processors = _multiprocessors_of(x.device.index) if x.device.type == "cuda" else 2
    most = BLOCKS_PER_MULTIPROCESSOR * processors // (1 if channels_last else groups)
    filled = (positions + POSITIONS_PER_BLOCK - 1) // POSITIONS_PER_BLOCK
    # Not min and max, which would fix a symbolic number of positions.
    return cast(int, torch.sym_max(1, torch.sym_min(most, filled)))


def functions(problem: Problem) -> tuple[Any, ...]:
    """Return the operator's arguments of an op, in schema order."""
    return (*problem.operator.constants, problem.delta)


def _kernel(weight: Tensor) -> list[int]:
    return [weight.shape[2], weight.shape[3]]


def _dense(t: Tensor, layout: torch.memory_format) -> Tensor:
    """Return a new tensor with exactly the strides that torch.empty gives, copied if need be.

    The library numbers the strides of one-element axes its own way. They are changed in place: a
    view made here could not be modified in place by the user.
    """
    t = t.contiguous(memory_format=layout)
    _, c, h, w = t.shape
    last = layout == torch.channels_last
    strides = (c * h * w, 1, w * c, c) if last else (c * h * w, h * w, w, 1)
    return t if t.stride() == strides else t.as_strided_(t.shape, strides)


def _library_input(
    x: Tensor, problem: Problem, layout: torch.memory_format
) -> tuple[Tensor, list[int]]:
    """Return x as the library gets it, padded where it cannot pad, and the padding left to it."""
    library_x, padding = reference.padded(x, problem)
    return library_x.contiguous(memory_format=layout), list(padding)


def _scales_filters(problem: Problem) -> bool:
    """Whether a norm-free operator differs from a plain convolution."""
    return problem.operator.weighting == "none" or problem.operator.alpha != 1.0


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem, layout: torch.memory_format
) -> Tensor:
    library_x, padding = _library_input(x, problem, layout)
    window = problem.window
    u = convolution.conv2d(
        library_x, weight, bias, window.stride, padding, window.dilation, window.groups
    )
    return _dense(u, layout)


def _convolution_backward(
    grad_u: Tensor,
    x: Tensor,
    weight: Tensor,
    problem: Problem,
    layout: torch.memory_format,
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the library's gradients of (padded) x, weight and bias, dense; None if not wanted."""
    if not any(wanted):
        return None, None, None
    library_x, padding = _library_input(x, problem, layout)
    weight_layout = memory_format(weight)
    grad_x, grad_weight, grad_bias = convolution.conv2d_backward(
        grad_u,
        library_x,
        weight,
        problem.window.stride,
        padding,
        problem.window.dilation,
        problem.window.groups,
        wanted,
    )
    return (
        None if grad_x is None or not wanted[0] else _dense(grad_x, layout),
        None if grad_weight is None or not wanted[1] else _dense(grad_weight, weight_layout),
        grad_bias,
    )


def forward(
    operands: Operands, problem: Problem, kept: str, namespace: str = COMPILED
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Evaluate the operator.

    Returns:
        y, the norm map, the mean norm, u and the filter norms a, [o]. What is not there is [0]:
        the mean but with ``norm="batch"``, u but with ``kept="dot"``, and for norm-free operators
        all but y and, where filters are divided by it, a.
    """
    passes = getattr(torch.ops, namespace)
    x, weight, bias, radius, norm_mean, k = operands
    operator = problem.operator
    layout = memory_format(x, weight)
    channels_last = layout == torch.channels_last
    x = x.contiguous(memory_format=layout)
    weight = weight.contiguous(memory_format=memory_format(weight))
    compute = compute_dtype(x.dtype)

    if problem.operator.norm_free:
        a = x.new_empty(0, dtype=compute)
        if _scales_filters(problem):
            divide = operator.weighting == "none"
            weight, a = passes.filter_scale(weight, operator.alpha, operator.eps, divide)
        y = _convolution(x, weight, bias, problem, layout)
        norm_map, mean = x.new_empty(0, dtype=compute), x.new_empty(0, dtype=compute)
        return y, norm_map, mean, x.new_empty(0), a

    batch_mean = problem.norm == NORM_BATCH
    a, norms, mean = passes.conv2d_norms(
        x, weight, *problem.window, problem.operator.eps, batch_mean, channels_last
    )
    u = _convolution(x, weight, None, problem, layout)
    arguments = (
        a,
        norms,
        bias,
        radius,
        mean if batch_mean else norm_mean,
        k,
        [x.shape[2], x.shape[3]],
        _kernel(weight),
        *problem.window,
        *functions(problem),
        problem.operator.eps,
        batch_mean,
        channels_last,
    )
    if kept == DOT:
        y, norm_map = passes.conv2d_epilogue(u, *arguments)
        dot = u
    else:
        norm_map = passes.conv2d_epilogue_(u, *arguments)
        y, dot = u, x.new_empty(0)
    return y, norms if batch_mean else norm_map, mean, dot, a


def backward(
    grad_y: Tensor,
    kept_tensor: Tensor,
    norm_map: Tensor,
    mean: Tensor,
    a: Tensor,
    operands: Operands,
    problem: Problem,
    kept: str,
    needs: int,
    namespace: str = COMPILED,
    input_gradient: InputGradient | None = None,
    weight_gradient: WeightGradient | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the six operands; None for those that ``needs`` lacks.

    Args:
        grad_y: gradient of y.
        kept_tensor: y or u, as ``kept`` says.
        norm_map, mean, a: from the forward of any plan.
        operands: as in forward; the bias is not read.
        namespace: of the passes.
        input_gradient, weight_gradient: who makes them; None for the library and the pass after it.
            Norm-free operators leave both to the library.
    """
    passes = getattr(torch.ops, namespace)
    x, weight, _, radius, norm_mean, k = operands
    layout = memory_format(x, weight)
    channels_last = layout == torch.channels_last
    x = x.contiguous(memory_format=layout)
    weight = weight.contiguous(memory_format=memory_format(weight))
    grad_y = grad_y.contiguous(memory_format=layout)
    needs_x, needs_weight = bool(needs & native.NEEDS_X), bool(needs & native.NEEDS_WEIGHT)
    if problem.operator.norm_free:
        return _backward_norm_free(grad_y, x, weight, a, problem, layout, needs, namespace)

    kept_tensor = kept_tensor.contiguous(memory_format=layout)
    batch_mean = problem.norm == NORM_BATCH
    # The mean of the norms depends on every patch: grad_x waits for the sum over all of them.
    barrier = batch_mean and problem.norm_grad and needs_x
    sums = 0
    if radius is not None and (barrier or needs & (native.NEEDS_RADIUS | native.NEEDS_NORM_MEAN)):
        sums |= SUM_RHO
    if problem.operator.weighting != "none" and needs_weight:
        sums |= SUM_A
    if needs & native.NEEDS_K:
        sums |= SUM_K
    if needs & native.NEEDS_BIAS:
        sums |= SUM_BIAS
    factor = mean if batch_mean else norm_mean
    positions = grad_y.shape[0] * grad_y.shape[2] * grad_y.shape[3]
    # Triton's programs span channels in both layouts.
    spans = channels_last or namespace != COMPILED
    rows = partial_rows(x, positions, problem.window.groups, spans)
    grad_u, t, parts = passes.conv2d_grad_dot(
        grad_y,
        kept_tensor,
        norm_map,
        a,
        radius,
        factor,
        k,
        problem.window.groups,
        *functions(problem),
        kept,
        needs_x,
        sums,
        rows,
        channels_last,
    )
    library_makes_x = needs_x and input_gradient is None
    library_makes_weight = needs_weight and weight_gradient is None
    library_x, library_weight, _ = _convolution_backward(
        grad_u, x, weight, problem, layout, [library_makes_x, library_makes_weight, False]
    )
    if needs_weight and weight_gradient is not None:
        library_weight = weight_gradient(grad_u, x, weight, problem)
    grads: list[Tensor | None] = [None] * 6
    sigma: Tensor | None = None
    if sums or needs_weight:
        *grads[1:], sigma = passes.conv2d_grad_filters(
            parts,
            library_weight,
            weight,
            a,
            radius,
            factor,
            k,
            norm_map.shape[0],
            sums,
            barrier,
            needs,
        )
    added = sigma if barrier else None
    if library_x is not None:
        grads[0] = _finish_input(
            library_x, x, t, norm_map, added, weight, problem, channels_last, namespace
        )
    elif needs_x and input_gradient is not None:
        grads[0] = input_gradient(grad_u, x, weight, t, norm_map, added, problem)
    return tuple(grad if needs >> i & 1 else None for i, grad in enumerate(grads))


def input_gradient(
    grad_u: Tensor,
    x: Tensor,
    weight: Tensor,
    t: Tensor,
    norm_map: Tensor,
    sigma: Tensor | None,
    problem: Problem,
    namespace: str = COMPILED,
) -> Tensor:
    """Return grad_x by the library and the pass after it, as :func:`backward` does."""
    layout = memory_format(x, weight)
    grad_x, _, _ = _convolution_backward(grad_u, x, weight, problem, layout, [True, False, False])
    assert grad_x is not None
    last = layout == torch.channels_last
    return _finish_input(grad_x, x, t, norm_map, sigma, weight, problem, last, namespace)


def weight_gradient(grad_u: Tensor, x: Tensor, weight: Tensor, problem: Problem) -> Tensor:
    """Return the library's gradient of the weight."""
    layout = memory_format(x, weight)
    _, grad_weight, _ = _convolution_backward(
        grad_u, x, weight, problem, layout, [False, True, False]
    )
    assert grad_weight is not None
    return grad_weight


def _finish_input(
    library_grad: Tensor,
    x: Tensor,
    t: Tensor,
    norm_map: Tensor,
    sigma: Tensor | None,
    weight: Tensor,
    problem: Problem,
    channels_last: bool,
    namespace: str,
) -> Tensor:
    """Return grad_x: the library's part, its padding folded back, plus x times the window sums."""
    passes = getattr(torch.ops, namespace)
    arguments = (x, t, norm_map, sigma, _kernel(weight), *problem.window)
    if problem.window.symmetric_zeros:
        passes.conv2d_grad_input_(library_grad, *arguments, channels_last)
        return library_grad
    grad_x: Tensor = passes.conv2d_grad_input(library_grad, *arguments, True, channels_last)
    return grad_x


def _backward_norm_free(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    problem: Problem,
    layout: torch.memory_format,
    needs: int,
    namespace: str,
) -> tuple[Tensor | None, ...]:
    passes = getattr(torch.ops, namespace)
    alpha, divide = problem.operator.alpha, problem.operator.weighting == "none"
    scaled = weight
    if _scales_filters(problem) and needs & native.NEEDS_X:
        scaled, _ = passes.filter_scale(weight, alpha, problem.operator.eps, divide)
    wanted = [bool(needs & bit) for bit in (native.NEEDS_X, native.NEEDS_WEIGHT, native.NEEDS_BIAS)]
    grad_x, grad_weight, grad_bias = _convolution_backward(
        grad_y, x, scaled, problem, layout, wanted
    )
    if grad_weight is not None and _scales_filters(problem):
        grad_weight = passes.filter_scale_grad(grad_weight, weight, a, alpha, divide)
    if grad_x is not None and not problem.window.symmetric_zeros:
        # Only the padding is left to undo: the pass with t = 0.
        positions = grad_y.shape[0] * grad_y.shape[2] * grad_y.shape[3]
        t = x.new_zeros(positions * problem.window.groups, dtype=compute_dtype(x.dtype))
        channels_last = layout == torch.channels_last
        grad_x = _finish_input(grad_x, x, t, t, None, weight, problem, channels_last, namespace)
    return grad_x, grad_weight, grad_bias, None, None, None


def window_norm(
    x: Tensor, kernel: tuple[int, int], problem: Problem, namespace: str = COMPILED
) -> Tensor:
    """Return the patch norm, [n, groups, p, q]."""
    passes = getattr(torch.ops, namespace)
    x = x.contiguous(memory_format=memory_format(x))
    b: Tensor = passes.window_norm(x, list(kernel), *problem.window, problem.operator.eps)
    return b


def window_norm_grad(
    grad_b: Tensor,
    x: Tensor,
    b: Tensor,
    kernel: tuple[int, int],
    problem: Problem,
    namespace: str = COMPILED,
) -> Tensor:
    """Return the gradient of x from that of the patch norm."""
    passes = getattr(torch.ops, namespace)
    layout = memory_format(x)
    grad_x: Tensor = passes.window_norm_grad(
        grad_b.contiguous(memory_format=layout),
        x.contiguous(memory_format=layout),
        b,
        list(kernel),
        *problem.window,
    )
    return grad_x
