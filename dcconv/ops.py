"""Loads the compiled library and gives its ops fakes and FLOP formulas.

Schemas and CPU kernels live in ``csrc``. An op here has no autograd formula of its own:
``dcconv.autograd`` composes them.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from dcconv.numerics import compute_dtype
from dcconv.problem import NORM_BATCH, Operands, Problem, output_size

# Bits of the ``needs`` argument of conv2d_backward, in the order of its results.
NEEDS_X, NEEDS_WEIGHT, NEEDS_BIAS, NEEDS_RADIUS, NEEDS_NORM_MEAN, NEEDS_K = (
    1 << i for i in range(6)
)

_build: Any = None
try:
    _build = importlib.import_module("dcconv._build")
except ModuleNotFoundError:
    pass


def _load() -> str | None:
    """Import the compiled library; return None, or one sentence why it is missing."""
    try:
        importlib.import_module("dcconv._C")
    except ModuleNotFoundError:
        reason = getattr(_build, "REASON", None) or "dcconv was not built in this environment"
        return f"the compiled library is missing: {reason}"
    except ImportError as error:
        return f"the compiled library does not load: {error}"
    return None


#: None when the compiled library is loaded, else one sentence why not.
missing: str | None = _load()


def cuda_missing() -> str | None:
    """Return None when CUDA code is part of the compiled library, else one sentence why not."""
    if missing is not None:
        return missing
    return getattr(_build, "CUDA_REASON", "dcconv was built without CUDA")


def is_channels_last(t: Tensor) -> bool:
    """Whether a 4-d tensor suggests channels_last, by PyTorch's own rule on strides."""
    smallest = 0
    for axis in (1, 3, 2, 0):
        size, stride = t.shape[axis], t.stride(axis)
        if size == 0 or stride < smallest:
            return False
        if axis == 0 and smallest == t.stride(1):
            return False
        smallest = stride * size if size > 1 else stride
    return t.stride(1) != 0


def memory_format(x: Tensor, weight: Tensor | None = None) -> torch.memory_format:
    """Return the layout of the library convolution's result: either operand decides."""
    if x.shape[0] == 0:
        return torch.contiguous_format
    if is_channels_last(x) or (weight is not None and is_channels_last(weight)):
        return torch.channels_last
    return torch.contiguous_format


def conv2d_arguments(operands: Operands, problem: Problem) -> tuple[Any, ...]:
    """Return the arguments shared by the forward op, in schema order."""
    x, weight, bias, radius, norm_mean, k = operands
    return (
        x,
        weight,
        bias,
        radius,
        norm_mean,
        k,
        list(problem.stride),
        list(problem.padding),
        list(problem.dilation),
        problem.groups,
        problem.padding_mode,
        problem.magnitude,
        problem.angular,
        problem.weighting,
        problem.alpha,
        problem.beta,
        problem.power,
        problem.eps,
        problem.delta,
        problem.norm,
    )


def _window_shape(
    x: Tensor, kernel: tuple[int, int], stride: Any, padding: Any, dilation: Any
) -> tuple[int, int]:
    return (
        output_size(x.shape[2], kernel[0], stride[0], padding[0], padding[1], dilation[0]),
        output_size(x.shape[3], kernel[1], stride[1], padding[2], padding[3], dilation[1]),
    )


def _conv2d_forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    radius: Tensor | None,
    norm_mean: Tensor | None,
    k: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    padding_mode: str,
    magnitude: str,
    angular: str,
    weighting: str,
    alpha: float,
    beta: float,
    power: float,
    eps: float,
    delta: float,
    norm: str,
    keep_dot: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p, q = _window_shape(x, (weight.shape[2], weight.shape[3]), stride, padding, dilation)
    shape = (x.shape[0], weight.shape[0], p, q)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x, weight))
    compute = compute_dtype(x.dtype)
    norm_free = Problem(magnitude=magnitude, angular=angular, weighting=weighting).norm_free
    norm_map = x.new_empty(0 if norm_free else x.shape[0] * groups * p * q, dtype=compute)
    mean = x.new_empty(() if norm == NORM_BATCH else (0,), dtype=compute)
    dot = torch.empty_like(y) if keep_dot and not norm_free else x.new_empty(0)
    return y, norm_map, mean, dot


def _conv2d_backward_fake(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    kept: Tensor,
    norm_map: Tensor,
    mean: Tensor,
    radius: Tensor | None,
    norm_mean: Tensor | None,
    k: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    padding_mode: str,
    magnitude: str,
    angular: str,
    weighting: str,
    alpha: float,
    beta: float,
    power: float,
    eps: float,
    delta: float,
    norm: str,
    norm_grad: bool,
    kept_is: str,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    compute = compute_dtype(x.dtype)

    def absent(dtype: torch.dtype = x.dtype) -> Tensor:
        return x.new_empty(0, dtype=dtype)

    layout = memory_format(x, weight)
    grad_x = torch.empty_like(x, memory_format=layout) if needs & NEEDS_X else absent()
    own = memory_format(weight)
    grad_w = torch.empty_like(weight, memory_format=own) if needs & NEEDS_WEIGHT else absent()
    grad_bias = x.new_empty(weight.shape[0]) if needs & NEEDS_BIAS else absent()
    grad_radius = absent(compute)
    if needs & NEEDS_RADIUS and radius is not None:
        grad_radius = torch.empty_like(radius)
    grad_mean = absent(compute)
    if needs & NEEDS_NORM_MEAN and norm_mean is not None:
        grad_mean = torch.empty_like(norm_mean)
    grad_k = torch.empty_like(k) if needs & NEEDS_K and k is not None else absent(compute)
    return grad_x, grad_w, grad_bias, grad_radius, grad_mean, grad_k


def _patch_norm_forward_fake(
    x: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    padding_mode: str,
    eps: float,
) -> Tensor:
    p, q = _window_shape(x, kernel_size, stride, padding, dilation)
    return torch.empty(
        (x.shape[0], groups, p, q),
        dtype=compute_dtype(x.dtype),
        device=x.device,
        memory_format=memory_format(x),
    )


def _patch_norm_backward_fake(
    grad_b: Tensor,
    x: Tensor,
    b: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    padding_mode: str,
) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


def _conv2d_forward_flops(
    x_shape: Any, w_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Count the library convolution only, as PyTorch does for fused attention and convolution."""
    return conv_flop_count(x_shape, w_shape, out_shape[0])


def _conv2d_backward_flops(
    grad_y_shape: Any, x_shape: Any, w_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Count the convolution once for each of grad_x and grad_weight that is computed."""
    wanted = sum(1 for shape in out_shape[:2] if len(shape) == 4)
    return wanted * conv_flop_count(x_shape, w_shape, grad_y_shape)


def _no_flops(*args: Any, **kwargs: Any) -> int:
    """Norms are not matrix work; PyTorch's counter leaves elementwise work out as well."""
    return 0


if missing is None:
    torch.library.register_fake("dcconv::conv2d_forward", _conv2d_forward_fake)
    torch.library.register_fake("dcconv::conv2d_backward", _conv2d_backward_fake)
    torch.library.register_fake("dcconv::patch_norm_forward", _patch_norm_forward_fake)
    torch.library.register_fake("dcconv::patch_norm_backward", _patch_norm_backward_fake)
    register_flop_formula(torch.ops.dcconv.conv2d_forward)(_conv2d_forward_flops)
    register_flop_formula(torch.ops.dcconv.conv2d_backward)(_conv2d_backward_flops)
    register_flop_formula(
        [torch.ops.dcconv.patch_norm_forward, torch.ops.dcconv.patch_norm_backward]
    )(_no_flops)
