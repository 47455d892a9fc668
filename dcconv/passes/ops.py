"""The ops, each by its fake: what tracing needs to know of its results.

Compiled ones are in ``csrc/ops.cpp`` and ``csrc/cuda``, those of Triton in ``triton/ops_*.py``.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count

from dcconv import native
from dcconv.operator.layout import memory_format
from dcconv.operator.numerics import compute_dtype
from dcconv.operator.records import NORM_BATCH, Window, is_norm_free
from dcconv.passes import guards, records
from dcconv.passes.op import Op, op
from dcconv.passes.records import COMPILED, Parameters

Two: TypeAlias = tuple[Tensor, Tensor]
Three: TypeAlias = tuple[Tensor, Tensor, Tensor]
Four: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
Six: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def empty_like(t: Tensor, channels_last: bool) -> Tensor:
    """Return memory for t's sizes in the layout that an op's argument names."""
    return torch.empty_like(t, memory_format=_layout_of(channels_last))


def _layout_of(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _own_layout(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=memory_format(t))


def result_sizes(x: Tensor, weight: Tensor, window: Window) -> list[Any]:
    """Require a weight that fits x; return n, o, p and q."""
    guards.filters_of(x, weight, window.groups)
    p, q = guards.windows(x.shape, weight.shape[0], weight.shape[2:], window)
    return [x.shape[0], weight.shape[0], p, q]


def images(
    x: Tensor, sizes: list[Any], layout: torch.memory_format, dtype: torch.dtype | None = None
) -> Tensor:
    """Return memory for images of other sizes than x's."""
    return torch.empty(sizes, dtype=dtype or x.dtype, device=x.device, memory_format=layout)


def check_sums(sums: Tensor | None, x: Tensor, groups: Any) -> None:
    """Require one value per pixel and group of x in compute dtype, or none at all."""
    if sums is not None:
        guards.values("sums", sums, x.shape[0] * groups * x.shape[2] * x.shape[3])
    guards.dtype("sums", sums, compute_dtype(x.dtype))


# Of the library convolution only, as PyTorch counts fused attention and convolution.
@op(
    *("y", "norm_map", "mean", "dot"),
    flops=lambda call, y: conv_flop_count(call.operands.x, call.operands.weight, y[0]),
)
def conv2d_forward(call: records.ConvForward) -> Four:
    x, weight = call.operands.x, call.operands.weight
    n, _, p, q = sizes = result_sizes(x, weight, call.window)
    check_sums(call.sums, x, call.window.groups)
    y = images(x, sizes, memory_format(x, weight))
    compute = compute_dtype(x.dtype)
    norm_free = is_norm_free(*call.functions[:3])
    count = 0 if norm_free or not call.keep_map else n * call.window.groups * p * q
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


def _backward_flops(call: Any, grads: Any) -> int:
    """Count the convolution once for each of grad_x and grad_weight that is computed."""
    wanted = sum(1 for shape in grads[:2] if len(shape) == 4)
    return wanted * conv_flop_count(call.x, call.weight, call.grad_y)


@op(
    *("grad_x", "grad_weight", "grad_bias", "grad_radius", "grad_norm_mean", "grad_k"),
    flops=_backward_flops,
)
def conv2d_backward(call: records.ConvBackward) -> Six:
    x, weight = call.x, call.weight
    guards.shape("grad_y", call.grad_y, result_sizes(x, weight, call.window))
    layout, wanted = memory_format(x, weight), call.needs & records.NEEDS_X
    grad_x = torch.empty_like(x, memory_format=layout) if wanted else x.new_empty(0)
    parameters = Parameters(call.radius, call.norm_mean, call.k)
    return grad_x, *_parameter_grads(weight, parameters, compute_dtype(x.dtype), call.needs)


@op("b")
def window_norm(call: records.WindowNorm) -> Tensor:
    x, groups = call.x, call.window.groups
    sizes = [x.shape[0], groups, *guards.windows(x.shape, groups, call.kernel_size, call.window)]
    return images(x, sizes, memory_format(x), compute_dtype(x.dtype))


@op("grad_x")
def window_norm_grad(call: records.WindowNormGrad) -> Tensor:
    x, groups = call.x, call.window.groups
    p, q = guards.windows(x.shape, groups, call.kernel_size, call.window)
    for name, t in (("b", call.b), ("grad_b", call.grad_b)):
        guards.shape(name, t, [x.shape[0], groups, p, q])
    return _own_layout(x)


patch_norm_forward = Op(window_norm.fake, [""], "patch_norm_forward")
patch_norm_backward = Op(window_norm_grad.fake, [""], "patch_norm_backward")


@op("a", "map", "mean")
def conv2d_norms(call: records.Norms) -> Three:
    x, weight = call.x, call.weight
    compute = compute_dtype(x.dtype)
    n, filters, p, q = result_sizes(x, weight, call.window)
    check_sums(call.sums, x, call.window.groups)
    return (
        x.new_empty(filters, dtype=compute),
        x.new_empty(n * call.window.groups * p * q, dtype=compute),
        x.new_empty(() if call.batch_mean else (0,), dtype=compute),
    )


@op("norm_map", writes="u")
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


@op("y", "norm_map")
def conv2d_epilogue(call: records.Epilogue) -> Two:
    norm_map = conv2d_epilogue_.fake(call)
    return empty_like(call.u, call.channels_last), norm_map


def check_grad_dot(call: records.GradDot) -> None:
    """Require that the sizes of the operands of the pass over dy fit together."""
    guards.dimensions("grad_y", call.grad_y, 4)
    n, filters, p, q = call.grad_y.shape
    guards.groups(call.groups, filters, filters)
    guards.shape("kept", call.kept, [n, filters, p, q])
    guards.values("norm_map", call.norm_map, n * call.groups * p * q)
    guards.values("a", call.a, filters)
    guards.partial_sums(call.sums, call.rows, filters)


@op("grad_u", "t", "parts")
def conv2d_grad_dot(call: records.GradDot) -> Three:
    check_grad_dot(call)
    kinds = bin(call.sums).count("1")
    return (
        empty_like(call.grad_y, call.channels_last),
        torch.empty_like(call.norm_map) if call.wants_t else call.a.new_empty(0),
        call.a.new_empty((kinds, call.rows, call.a.shape[0]) if kinds else 0),
    )


@op("grad_weight", "grad_bias", "grad_radius", "grad_mean", "grad_k", "sigma")
def conv2d_grad_filters(call: records.GradFilters) -> Six:
    weight, a, sums = call.weight, call.a, call.sums
    guards.dimensions("weight", weight, 4)
    filters = weight.shape[0]
    guards.partial_sums(sums, 1, filters)
    guards.values("a", a, filters)
    if sums:
        guards.dimensions("parts", call.parts, 3)
        shape = [bin(sums).count("1"), call.parts.shape[1], filters]
        guards.shape("parts", call.parts, shape)
    if call.library_grad is not None:
        guards.shape("library_grad", call.library_grad, weight.shape)
    grads = _parameter_grads(weight, call.parameters, a.dtype, call.needs)
    return *grads, a.new_empty(() if call.barrier else (0,))


@op(writes="library_grad", fixed={"padded": False})
def conv2d_grad_input_(call: records.GradInput) -> None:
    x, groups = call.x, call.window.groups
    p, q = guards.windows(x.shape, groups, call.kernel_size, call.window)
    n, c, height, width = x.shape
    guards.values("t", call.taps.t, n * groups * p * q)
    if call.padded:
        top, bottom, left, right = call.window.padding
        height, width = height + top + bottom, width + left + right
    guards.shape("library_grad", call.library_grad, [n, c, height, width])


@op("grad_x")
def conv2d_grad_input(call: records.GradInput) -> Tensor:
    conv2d_grad_input_.fake(call)
    return empty_like(call.x, call.channels_last)


@op("a")
def filter_norm(call: records.FilterNorm) -> Tensor:
    guards.dimensions("weight", call.weight, 4)
    return call.weight.new_empty(call.weight.shape[0], dtype=compute_dtype(call.weight.dtype))


@op("scaled", "a")
def filter_scale(call: records.FilterScale) -> Two:
    a = filter_norm.fake(records.FilterNorm(call.weight, call.eps))
    return _own_layout(call.weight), a


@op("grad_weight")
def filter_scale_grad(call: records.FilterScaleGrad) -> Tensor:
    guards.dimensions("weight", call.weight, 4)
    guards.values("a", call.a, call.weight.shape[0])
    guards.shape("library_grad", call.library_grad, call.weight.shape)
    return _own_layout(call.weight)


@op("y", "sums")
def affine_relu(call: records.AffineRelu) -> Two:
    x, compute = call.x, compute_dtype(call.x.dtype)
    guards.dimensions("x", x, 4)
    n, channels, h, w = x.shape
    guards.groups(call.groups, channels, channels)
    guards.countable("x", x.shape)
    for name, t in (("scale", call.scale), ("shift", call.shift)):
        guards.values(name, t, channels)
        guards.dtype(name, t, compute)
    y = empty_like(x, call.channels_last)
    return y, x.new_empty(n * call.groups * h * w, dtype=compute)


@op(
    *("y", "norm_map", "dot"),
    flops=lambda call, y: conv_flop_count(call.x, call.weight, y[0]),
)
def conv2d_one_pass(call: records.OnePass) -> Three:
    x, weight, a, groups = call.x, call.weight, call.a, call.window.groups
    n, filters, p, q = sizes = result_sizes(x, weight, call.window)
    guards.values("a", a, filters)
    if call.map is not None:
        height, width = (p, q) if call.map_is_norm else x.shape[2:]
        guards.values("map", call.map, n * groups * height * width)
    y = images(x, sizes, _layout_of(call.channels_last))
    writes_norm = call.keep_norm and not call.map_is_norm
    norm_map = a.new_empty(n * groups * p * q if writes_norm else 0)
    return y, norm_map, torch.empty_like(y) if call.keep_dot else x.new_empty(0)


@op("grad_x", flops=lambda call, _: conv_flop_count(call.x, call.weight, call.grad_u))
def conv2d_one_pass_grad_input(call: records.OnePassGradInput) -> Tensor:
    x, weight = call.x, call.weight
    n, _, p, q = sizes = result_sizes(x, weight, call.window)
    guards.shape("grad_u", call.grad_u, sizes)
    guards.values("t", call.taps.t, n * call.window.groups * p * q)
    return empty_like(x, call.channels_last)


@op("grad_weight", flops=lambda call, weight: conv_flop_count(call.x, weight, call.grad_u))
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
    guards.partial_sums(0, call.rows, filters * height * width)
    return images(x, [filters, 1, height, width], _layout_of(call.weight_channels_last))


#: Every op of ``csrc/schemas.h``.
OPS: tuple[Op[Any, Any], ...] = tuple(
    [value for value in globals().values() if isinstance(value, Op)]
)

if native.missing is None:
    for _op in OPS:
        _op.register(COMPILED)
