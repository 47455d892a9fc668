"""Every strategy's backward: the pass over dy, the products, the filter side, and grad_x.

Its two products are the library's unless a strategy brings its own; what belongs to the norms and
the functions is the same for all. Every function takes the namespace of the ops: several libraries
implement them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from dcconv.operator.layout import memory_format
from dcconv.operator.numerics import compute_dtype
from dcconv.operator.records import NORM_BATCH, Operands, Problem
from dcconv.passes import ops, products, records
from dcconv.passes.library import scaled_filters, scales_filters
from dcconv.passes.products import size_of
from dcconv.passes.records import COMPILED, GradInput, Parameters, Taps
from dcconv.tracing import asked_once

# The pass over dy has at most this many blocks per multiprocessor, each with at least this many
# positions: every block leaves one row of partial sums.
BLOCKS_PER_MULTIPROCESSOR = 4
POSITIONS_PER_BLOCK = 64


class InputSide(NamedTuple):
    """What the gradient of x is made of.

    Attributes:
        grad_u: gradient of the convolution's result.
        x, weight: as in forward.
        taps: of the norms.
    """

    grad_u: Tensor
    x: Tensor
    weight: Tensor
    taps: Taps


# -> grad_x, and (grad_u, x, weight, problem) -> the library's gradient of the weight, in the
# weight's layout: what strategies put in the place of the library and of the pass after it.
InputGradient: TypeAlias = Callable[[InputSide, Problem], Tensor]
WeightGradient: TypeAlias = Callable[[Tensor, Tensor, Tensor, Problem], Tensor]


@asked_once
def _multiprocessors_of(index: int) -> int:
    count: int = torch.cuda.get_device_properties(index).multi_processor_count
    return count


def partial_rows(x: Tensor, positions: int, groups: int, channels_last: bool) -> int:
    """Return the number of partial sums per filter: a function of problem and device alone."""
    # On other devices the ops are emulated: two, so that there is more than one row.
    processors = _multiprocessors_of(x.device.index) if x.device.type == "cuda" else 2
    most = BLOCKS_PER_MULTIPROCESSOR * processors // (1 if channels_last else groups)
    filled = (positions + POSITIONS_PER_BLOCK - 1) // POSITIONS_PER_BLOCK
    # Not min and max, which would fix a symbolic number of positions.
    return cast(int, torch.sym_max(1, torch.sym_min(most, filled)))


def rows_of(x: Tensor, grad_u: Tensor, problem: Problem, last: bool, namespace: str) -> int:
    """Return the number of partial sums of a namespace's ops."""
    positions = grad_u.shape[0] * grad_u.shape[2] * grad_u.shape[3]
    # Triton's programs span channels in both layouts.
    return partial_rows(x, positions, problem.window.groups, last or namespace != COMPILED)


def _sums(problem: Problem, has_radius: bool, barrier: bool, needs: int) -> int:
    """Return the bits of the sums over all positions that gradients need."""
    by_radius = records.NEEDS_RADIUS | records.NEEDS_NORM_MEAN
    weighted = problem.operator.weighting != "none"
    wanted = (
        (records.SUM_RHO, has_radius and (barrier or needs & by_radius)),
        (records.SUM_A, weighted and needs & records.NEEDS_WEIGHT),
        (records.SUM_K, needs & records.NEEDS_K),
        (records.SUM_BIAS, needs & records.NEEDS_BIAS),
    )
    return sum([bit for bit, want in wanted if want])


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
        norm_map, mean, a: from the forward of any strategy.
        operands: as in forward; the bias is not read.
        namespace: of the passes.
        input_gradient, weight_gradient: who makes them; None for the library and the pass after it.
            Norm-free operators leave both to the library.
    """
    x, weight, _, radius, norm_mean, k = operands
    layout = memory_format(x, weight)
    last = layout == torch.channels_last
    x = x.contiguous(memory_format=layout)
    weight = weight.contiguous(memory_format=memory_format(weight))
    grad_y = grad_y.contiguous(memory_format=layout)
    if problem.operator.norm_free:
        return _norm_free(grad_y, x, weight, a, problem, needs, namespace)

    needs_x, needs_weight = bool(needs & records.NEEDS_X), bool(needs & records.NEEDS_WEIGHT)
    batch_mean = problem.norm == NORM_BATCH
    # The mean of the norms depends on every patch: grad_x waits for the sum over all of them.
    barrier = batch_mean and problem.norm_grad and needs_x
    sums = _sums(problem, radius is not None, barrier, needs)
    parameters = Parameters(radius, mean if batch_mean else norm_mean, k)
    rows = rows_of(x, grad_y, problem, last, namespace)
    kept_tensor = kept_tensor.contiguous(memory_format=layout)
    maps = (grad_y, kept_tensor, norm_map, a, parameters, problem.window.groups)
    wants = (kept, needs_x, sums, rows, last)
    call = records.GradDot(*maps, records.functions(problem), problem.delta, *wants)
    grad_u, t, parts = ops.conv2d_grad_dot(call, namespace)

    own = [needs_x and input_gradient is None, needs_weight and weight_gradient is None, False]
    library_x, by_weight, _ = products.backward(grad_u, x, weight, problem, own)
    if needs_weight and weight_gradient is not None:
        by_weight = weight_gradient(grad_u, x, weight, problem)
    grads: list[Tensor | None] = [None] * 6
    sigma: Tensor | None = None
    if sums or needs_weight:
        filters = (parts, by_weight, weight, a, parameters, norm_map.shape[0])
        side = records.GradFilters(*filters, sums, barrier, needs)
        *grads[1:], sigma = ops.conv2d_grad_filters(side, namespace)
    taps = Taps(t, norm_map, sigma if barrier else None)
    if library_x is not None:
        grads[0] = _finish_input(library_x, x, taps, weight, problem, namespace)
    elif needs_x and input_gradient is not None:
        grads[0] = input_gradient(InputSide(grad_u, x, weight, taps), problem)
    return tuple(grad if needs >> i & 1 else None for i, grad in enumerate(grads))


def input_gradient(side: InputSide, problem: Problem, namespace: str = COMPILED) -> Tensor:
    """Return grad_x by the library and the pass after it, as :func:`backward` does."""
    grad_u, x, weight, taps = side
    grad_x, _, _ = products.backward(grad_u, x, weight, problem, [True, False, False])
    assert grad_x is not None
    return _finish_input(grad_x, x, taps, weight, problem, namespace)


def weight_gradient(grad_u: Tensor, x: Tensor, weight: Tensor, problem: Problem) -> Tensor:
    """Return the library's gradient of the weight."""
    _, grad_weight, _ = products.backward(grad_u, x, weight, problem, [False, True, False])
    assert grad_weight is not None
    return grad_weight


def _finish_input(
    grad: Tensor, x: Tensor, taps: Taps, weight: Tensor, problem: Problem, namespace: str
) -> Tensor:
    """Return grad_x: the library's part, its padding folded back, plus x times the window sums."""
    last = memory_format(x, weight) == torch.channels_last
    padded = not problem.window.symmetric_zeros
    call = GradInput(grad, x, taps, size_of(weight), problem.window, padded, last)
    if padded:
        return ops.conv2d_grad_input(call, namespace)
    ops.conv2d_grad_input_(call, namespace)
    return grad


def _norm_free(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    problem: Problem,
    needs: int,
    namespace: str,
) -> tuple[Tensor | None, ...]:
    scales, scaled = scales_filters(problem), weight
    if scales and needs & records.NEEDS_X:
        scaled, _ = scaled_filters(weight, problem, namespace)
    wanted = [bool(needs & 1 << i) for i in range(3)]
    grad_x, by_weight, grad_bias = products.backward(grad_y, x, scaled, problem, wanted)
    if by_weight is not None and scales:
        alpha, divide = problem.operator.alpha, problem.operator.weighting == "none"
        call = records.FilterScaleGrad(by_weight, weight, a, alpha, divide)
        by_weight = ops.filter_scale_grad(call, namespace)
    if grad_x is not None and not problem.window.symmetric_zeros:
        # Only the padding is left to undo: the pass with t = 0.
        positions = grad_y.shape[0] * grad_y.shape[2] * grad_y.shape[3]
        t = x.new_zeros(positions * problem.window.groups, dtype=compute_dtype(x.dtype))
        grad_x = _finish_input(grad_x, x, Taps(t, t, None), weight, problem, namespace)
    return grad_x, by_weight, grad_bias, None, None, None


def window_norm_grad(
    grad_b: Tensor,
    x: Tensor,
    b: Tensor,
    kernel: tuple[int, int],
    problem: Problem,
    namespace: str = COMPILED,
) -> Tensor:
    """Return the gradient of x from that of the patch norm."""
    layout = memory_format(x)
    grad_b, x = grad_b.contiguous(memory_format=layout), x.contiguous(memory_format=layout)
    call = records.WindowNormGrad(grad_b, x, b, kernel, problem.window)
    return ops.window_norm_grad(call, namespace)
