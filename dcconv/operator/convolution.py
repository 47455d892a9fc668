"""PyTorch's convolutions, led around the corners that its CPU library gets wrong.

What is wrong, since when and on which processors, and the route taken there, is the table of
``docs/library-faults.md``; the cpu backend takes the same routes in ``csrc/cpu/library/library.h``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dcconv.operator.layout import is_channels_last
from dcconv.tracing import asked_once, sizes

# bfloat16 results of at most so many columns, with a stride along them and a window above 1x1, are
# computed in float32. The library is wrong for one column and, rarely, for two.
NARROW = 3


@asked_once
def library_has_bfloat16() -> bool:
    """Return whether the CPU library has bfloat16 convolutions for this processor.

    Elsewhere, which is on x86 without AVX-512, PyTorch takes plain loops that are some ten times
    slower than the library in float32: bfloat16 is computed in float32 there and rounded once.

    Example:
        >>> isinstance(library_has_bfloat16(), bool)
        True
    """
    has: bool = (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return has


def fitted(t: Tensor) -> Tensor:
    """Return images or filters with strides of one layout, the one that they suggest.

    An axis of one element may have any stride: ``batch[0].unsqueeze(0)`` of a channels_last batch
    is no channels_last tensor by the rule of ``is_channels_last`` but dense in that layout, and
    the library mixes the two up.

    Args:
        t: [n, c, h, w].
    """
    if 1 not in sizes(t) or is_channels_last(t):
        return t
    return t.contiguous()


def batched(x: Tensor) -> Tensor:
    """Return images [n, c, h, w] of [n, c, h, w] or [c, h, w], with strides of one layout."""
    return fitted(x if x.dim() == 4 else x.unsqueeze(0))


def _single_pixels(weight: Tensor, stride: Any, padding: Any) -> bool:
    """Whether windows are single pixels with others between them."""
    return sizes(weight)[2:] == (1, 1) and tuple(stride) != (1, 1) and tuple(padding) == (0, 0)


def _strided_pixels(x: Tensor, stride: Any) -> Tensor:
    """Return the pixels that windows of one pixel start at, a copy in x's layout."""
    # Not memory_format=torch.channels_last, which vmap does not know; nor are views left, whose
    # strides may suggest another layout than x's. The gradient of a slice is contiguous: sliced is
    # what is contiguous in x's layout.
    if is_channels_last(x):
        last = x.permute(0, 2, 3, 1)[:, :: stride[0], :: stride[1]]
        return last.clone(memory_format=torch.contiguous_format).permute(0, 3, 1, 2)
    pixels = x[:, :, :: stride[0], :: stride[1]]
    return pixels.clone(memory_format=torch.contiguous_format)


def _is_narrow(columns: Any) -> bool:
    # A size that a tracer keeps open counts as narrow: to compare it would bind it.
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return not statically_known_true(columns > NARROW)
    return not isinstance(columns, int) or columns <= NARROW


def _takes_float(
    x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> bool:
    """Whether a convolution, its gradients included, is computed in float32 and rounded once."""
    if x.dtype != torch.bfloat16:
        return False
    if not library_has_bfloat16() or (groups > 1 and dilation[0] > 1):
        return True
    rows, columns = sizes(weight)[2:]
    if stride[1] == 1 or rows == columns == 1:
        return False
    extent = dilation[1] * (columns - 1) + 1
    return _is_narrow((x.shape[3] + 2 * padding[1] - extent) // stride[1] + 1)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Tensor:
    """Return ``F.conv2d``'s result, right on every device in value and in all its derivatives.

    Args:
        x: [n, c, h, w], strides as :func:`fitted` gives them.
        weight: [o, c / groups, r, s], x's dtype, strides likewise.
        bias: [o] or None.
        stride, padding, dilation: rows and columns, in pixels.
        groups: number of channel groups.

    Example:
        >>> x, weight = torch.ones(1, 2, 5, 5), torch.ones(3, 2, 1, 1)
        >>> conv2d(x, weight, None, (2, 2), (0, 0), (1, 1), 1).shape
        torch.Size([1, 3, 3, 3])
    """
    if x.device.type != "cpu":
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if _single_pixels(weight, stride, padding):
        # The library's gradient of the weight writes beside its memory.
        x, stride = _strided_pixels(x, stride), (1, 1)
    if _takes_float(x, weight, stride, padding, dilation, groups):
        wide_bias = None if bias is None else bias.float()
        wide = F.conv2d(x.float(), weight.float(), wide_bias, stride, padding, dilation, groups)
        return wide.to(x.dtype)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and bias; None or an undefined tensor if not wanted.

    Args:
        grad: gradient of the result, [n, o, p, q], x's dtype.
        x, weight, stride, padding, dilation, groups: as in :func:`conv2d`.
        wanted: of x, weight and bias.
    """

    def library(
        grad: Tensor, x: Tensor, weight: Tensor, stride: Any, wanted: list[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        bias_sizes = [weight.shape[0]] if wanted[2] else None
        geometry = (list(stride), list(padding), list(dilation), False, [0, 0], groups)
        grads: tuple[Tensor | None, Tensor | None, Tensor | None]
        grads = torch.ops.aten.convolution_backward(grad, x, weight, bias_sizes, *geometry, wanted)
        return grads

    if x.device.type != "cpu":
        return library(grad, x, weight, stride, wanted)
    if _takes_float(x, weight, stride, padding, dilation, groups):
        wide = library(grad.float(), x.float(), weight.float(), stride, wanted)
        first, second, third = (
            g.to(x.dtype) if g is not None and want else None
            for g, want in zip(wide, wanted, strict=True)
        )
        return first, second, third
    if not wanted[1] or not _single_pixels(weight, stride, padding):
        return library(grad, x, weight, stride, wanted)
    grad_x = grad_bias = None
    if wanted[0] or wanted[2]:
        grad_x, _, grad_bias = library(grad, x, weight, stride, [wanted[0], False, wanted[2]])
    pixels = _strided_pixels(x, stride)
    _, grad_weight, _ = library(grad, pixels, weight, (1, 1), [False, True, False])
    return grad_x, grad_weight, grad_bias
