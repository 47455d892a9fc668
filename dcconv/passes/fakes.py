"""Fakes and FLOP formulas of the ops: what tracing and counting need to know of each result.

A fake takes the record of a call, requires that its sizes fit together, and returns tensors of the
shapes, dtypes and layouts of the results. It is the same for every library that has the op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from dcconv import native
from dcconv.operator.layout import memory_format
from dcconv.operator.numerics import compute_dtype
from dcconv.operator.records import NORM_BATCH, Window, is_norm_free
from dcconv.passes import guards, ops, records
from dcconv.passes.records import COMPILED, Parameters


def layout_of(channels_last: bool) -> torch.memory_format:
    """Return the memory format that an op's argument names."""
    return torch.channels_last if channels_last else torch.contiguous_format


def check_sums(sums: int, rows: int, filters: int) -> None:
    """Require bits of known sums, and a number of partial sums that there is room for."""
    every = records.SUM_RHO | records.SUM_A | records.SUM_K | records.SUM_BIAS
    if not 0 <= sums <= every:
        raise guards.error("sums", f"be bits of {every}", sums)
    guards.bounded("rows", rows, 1)
    guards.countable("parts", [4, rows, filters])


def _windows_of(x: Tensor, weight: Tensor, window: Window) -> tuple[Any, Any]:
    """Require a weight that fits x; return the rows and columns of windows."""
    guards.filters_of(x, weight, window.groups)
    return guards.windows(x.shape, weight.shape[0], weight.shape[2:], window)


def _like(t: Tensor, channels_last: bool) -> Tensor:
    return torch.empty_like(t, memory_format=layout_of(channels_last))


def _own_layout(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=memory_format(t))


def conv2d_forward(call: records.ConvForward) -> ops.Four:
    x, weight = call.operands.x, call.operands.weight
    n, groups = x.shape[0], call.window.groups
    p, q = _windows_of(x, weight, call.window)
    shape, layout = (n, weight.shape[0], p, q), memory_format(x, weight)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    compute = compute_dtype(x.dtype)
    norm_free = is_norm_free(*call.functions[:3])
    count = 0 if norm_free or not call.keep_map else n * groups * p * q
    norm_map = x.new_empty(count, dtype=compute)
    mean = x.new_empty(() if call.norm == NORM_BATCH else (0,), dtype=compute)
    dot = torch.empty_like(y) if call.keep_dot and not norm_free else x.new_empty(0)
    return y, norm_map, mean, dot


def _parameter_grads(
    weight: Tensor, parameters: Parameters, compute: torch.dtype, needs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of weight, bias, radius, mean norm and k; [0] for the unwanted."""

    def like(t: Tensor | None, bit: int) -> Tensor:
        if t is None or not needs & bit:
            return weight.new_empty(0, dtype=compute)
        return torch.empty_like(t, memory_format=torch.contiguous_format)

    bits = (records.NEEDS_RADIUS, records.NEEDS_NORM_MEAN, records.NEEDS_K)
    radius, mean, k = (like(t, bit) for t, bit in zip(parameters, bits, strict=True))
    return (
        _own_layout(weight) if needs & records.NEEDS_WEIGHT else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if needs & records.NEEDS_BIAS else 0),
        *(radius, mean, k),
    )


def conv2d_backward(call: records.ConvBackward) -> ops.Six:
    x, weight = call.x, call.weight
    p, q = _windows_of(x, weight, call.window)
    guards.shape("grad_y", call.grad_y, [x.shape[0], weight.shape[0], p, q])
    layout = memory_format(x, weight)
    grad_x = (
        torch.empty_like(x, memory_format=layout)
        if call.needs & records.NEEDS_X
        else x.new_empty(0)
    )
    parameters = Parameters(call.radius, call.norm_mean, call.k)
    return grad_x, *_parameter_grads(weight, parameters, compute_dtype(x.dtype), call.needs)


def window_norm(call: records.WindowNorm) -> Tensor:
    x, groups = call.x, call.window.groups
    shape = (x.shape[0], groups, *guards.windows(x.shape, groups, call.kernel_size, call.window))
    dtype, layout = compute_dtype(x.dtype), memory_format(x)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)


def window_norm_grad(call: records.WindowNormGrad) -> Tensor:
    x, groups = call.x, call.window.groups
    p, q = guards.windows(x.shape, groups, call.kernel_size, call.window)
    for name, t in (("b", call.b), ("grad_b", call.grad_b)):
        guards.shape(name, t, [x.shape[0], groups, p, q])
    return _own_layout(x)


def conv2d_norms(call: records.Norms) -> ops.Three:
    x, weight = call.x, call.weight
    compute = compute_dtype(x.dtype)
    p, q = _windows_of(x, weight, call.window)
    if not call.batch_mean:
        p, q = x.shape[2], x.shape[3]
    return (
        x.new_empty(weight.shape[0], dtype=compute),
        x.new_empty(x.shape[0] * call.window.groups * p * q, dtype=compute),
        x.new_empty(() if call.batch_mean else (0,), dtype=compute),
    )


def conv2d_epilogue_(call: records.Epilogue) -> Tensor:
    u, a, groups = call.u, call.a, call.window.groups
    guards.dimensions("u", u, 4)
    guards.numbers("input_size", call.input_size, 2)
    n, filters = u.shape[:2]
    p, q = guards.windows([n, groups, *call.input_size], filters, call.kernel_size, call.window)
    guards.shape("u", u, [n, filters, p, q])
    height, width = (p, q) if call.map_is_norm else call.input_size
    guards.values("map", call.map, n * groups * height * width)
    guards.values("a", a, filters)
    return a.new_empty(0 if call.map_is_norm else n * groups * u.shape[2] * u.shape[3])


def conv2d_epilogue(call: records.Epilogue) -> ops.Two:
    norm_map = conv2d_epilogue_(call)
    return _like(call.u, call.channels_last), norm_map


def check_grad_dot(call: records.GradDot) -> None:
    """Require that the sizes of the operands of the pass over dy fit together."""
    guards.dimensions("grad_y", call.grad_y, 4)
    n, filters, p, q = call.grad_y.shape
    guards.groups(call.groups, filters, filters)
    guards.shape("kept", call.kept, [n, filters, p, q])
    guards.values("norm_map", call.norm_map, n * call.groups * p * q)
    guards.values("a", call.a, filters)
    check_sums(call.sums, call.rows, filters)


def conv2d_grad_dot(call: records.GradDot) -> ops.Three:
    check_grad_dot(call)
    kinds = bin(call.sums).count("1")
    return (
        _like(call.grad_y, call.channels_last),
        torch.empty_like(call.norm_map) if call.wants_t else call.a.new_empty(0),
        call.a.new_empty((kinds, call.rows, call.a.shape[0]) if kinds else 0),
    )


def conv2d_grad_filters(call: records.GradFilters) -> ops.Six:
    weight, a, sums = call.weight, call.a, call.sums
    guards.dimensions("weight", weight, 4)
    filters = weight.shape[0]
    check_sums(sums, 1, filters)
    guards.values("a", a, filters)
    if sums:
        guards.dimensions("parts", call.parts, 3)
        shape = [bin(sums).count("1"), call.parts.shape[1], filters]
        guards.shape("parts", call.parts, shape)
    if call.library_grad is not None:
        guards.shape("library_grad", call.library_grad, weight.shape)
    grads = _parameter_grads(weight, call.parameters, a.dtype, call.needs)
    return *grads, a.new_empty(() if call.barrier else (0,))


def conv2d_grad_input_(call: records.GradInput) -> None:
    x, groups = call.x, call.window.groups
    p, q = guards.windows(x.shape, groups, call.kernel_size, call.window)
    n, c, height, width = x.shape
    guards.values("t", call.taps.t, n * groups * p * q)
    if call.padded:
        top, bottom, left, right = call.window.padding
        height, width = height + top + bottom, width + left + right
    guards.shape("library_grad", call.library_grad, [n, c, height, width])


def conv2d_grad_input(call: records.GradInput) -> Tensor:
    conv2d_grad_input_(call)
    return _like(call.x, call.channels_last)


def filter_norm(call: records.FilterNorm | records.FilterScale) -> Tensor:
    guards.dimensions("weight", call.weight, 4)
    return call.weight.new_empty(call.weight.shape[0], dtype=compute_dtype(call.weight.dtype))


def filter_scale(call: records.FilterScale) -> ops.Two:
    a = filter_norm(call)
    return _own_layout(call.weight), a


def filter_scale_grad(call: records.FilterScaleGrad) -> Tensor:
    guards.dimensions("weight", call.weight, 4)
    guards.values("a", call.a, call.weight.shape[0])
    guards.shape("library_grad", call.library_grad, call.weight.shape)
    return _own_layout(call.weight)


def conv2d_one_pass(call: records.OnePass) -> ops.Three:
    x, weight, a, groups = call.x, call.weight, call.a, call.window.groups
    p, q = _windows_of(x, weight, call.window)
    n, filters = x.shape[0], weight.shape[0]
    guards.values("a", a, filters)
    if call.map is not None:
        height, width = (p, q) if call.map_is_norm else x.shape[2:]
        guards.values("map", call.map, n * groups * height * width)
    shape, layout = (n, filters, p, q), layout_of(call.channels_last)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    writes_norm = call.keep_norm and not call.map_is_norm
    norm_map = a.new_empty(n * groups * p * q if writes_norm else 0)
    return y, norm_map, torch.empty_like(y) if call.keep_dot else x.new_empty(0)


def conv2d_one_pass_grad_input(call: records.OnePassGradInput) -> Tensor:
    x, weight = call.x, call.weight
    p, q = _windows_of(x, weight, call.window)
    guards.shape("grad_u", call.grad_u, [x.shape[0], weight.shape[0], p, q])
    guards.values("t", call.taps.t, x.shape[0] * call.window.groups * p * q)
    return _like(x, call.channels_last)


def depthwise_grad_weight(call: records.DepthwiseGradWeight) -> Tensor:
    x, grad_u, groups = call.x, call.grad_u, call.window.groups
    guards.dimensions("grad_u", grad_u, 4)
    filters = grad_u.shape[1]
    p, q = guards.windows(x.shape, filters, call.kernel_size, call.window)
    (n, channels), (height, width) = x.shape[:2], call.kernel_size
    guards.shape("grad_u", grad_u, [n, filters, p, q])
    guards.groups(groups, channels, channels)
    if channels != groups:
        raise guards.error("groups", f"be the {channels} channels of x", groups)
    check_sums(0, call.rows, filters * height * width)
    shape, layout = (filters, 1, height, width), layout_of(call.weight_channels_last)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _no_flops(call: Any, result: Any) -> int:
    """Passes are not matrix work; PyTorch's counter leaves elementwise work out as well."""
    return 0


def _forward_flops(x: Any, weight: Any, result: Any) -> int:
    """Count the library convolution only, as PyTorch does for fused attention and convolution."""
    return conv_flop_count(x, weight, result[0])


def _backward_flops(call: records.ConvBackward, result: Any) -> int:
    """Count the convolution once for each of grad_x and grad_weight that is computed."""
    shapes: tuple[Any, ...] = (call.x, call.weight, call.grad_y)
    wanted = sum(1 for shape in result[:2] if len(shape) == 4)
    return wanted * conv_flop_count(*shapes)


#: The fake of every op.
FAKES: dict[ops.Op[Any, Any], Callable[[Any], Any]] = {
    ops.conv2d_forward: conv2d_forward,
    ops.conv2d_backward: conv2d_backward,
    ops.patch_norm_forward: window_norm,
    ops.patch_norm_backward: window_norm_grad,
    ops.conv2d_norms: conv2d_norms,
    ops.conv2d_epilogue: conv2d_epilogue,
    ops.conv2d_epilogue_: conv2d_epilogue_,
    ops.conv2d_grad_dot: conv2d_grad_dot,
    ops.conv2d_grad_filters: conv2d_grad_filters,
    ops.conv2d_grad_input: conv2d_grad_input,
    ops.conv2d_grad_input_: conv2d_grad_input_,
    ops.filter_scale: filter_scale,
    ops.filter_scale_grad: filter_scale_grad,
    ops.window_norm: window_norm,
    ops.window_norm_grad: window_norm_grad,
    ops.filter_norm: filter_norm,
    ops.conv2d_one_pass: conv2d_one_pass,
    ops.conv2d_one_pass_grad_input: conv2d_one_pass_grad_input,
    ops.depthwise_grad_weight: depthwise_grad_weight,
}
# Of records with shapes in the place of tensors, and the shapes of the results.
_FLOPS: dict[ops.Op[Any, Any], Callable[[Any, Any], int]] = {
    ops.conv2d_forward: lambda call, y: _forward_flops(call.operands.x, call.operands.weight, y),
    ops.conv2d_backward: _backward_flops,
    ops.conv2d_one_pass: lambda call, y: _forward_flops(call.x, call.weight, y),
    ops.conv2d_one_pass_grad_input: lambda call, grad_x: conv_flop_count(
        call.x, call.weight, call.grad_u
    ),
    ops.depthwise_grad_weight: lambda call, weight: conv_flop_count(call.x, weight, call.grad_u),
}


def register(
    op: ops.Op[Any, Any],
    namespace: str,
    fake: Callable[[Any], Any] | None = None,
    count: Callable[[Any, Any], int] | None = None,
) -> None:
    """Register the fake and the FLOP formula of an op that a namespace has defined.

    Args:
        op, namespace: which.
        fake, count: of an op that is not one of ``FAKES``.
    """
    formula = count or _FLOPS.get(op, _no_flops)

    def flops(*arguments: Any, out_shape: Any = None, **others: Any) -> int:
        return formula(op.record_of(*arguments), out_shape)

    op.bind(namespace)
    torch.library.register_fake(f"{namespace}::{op.name}", op.taking(fake or FAKES[op]))
    register_flop_formula(getattr(getattr(torch.ops, namespace), op.name))(flops)


if native.missing is None:
    for _op in FAKES:
        register(_op, COMPILED)
