"""The functional form of the operator: check, choose a backend, call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dcconv.call import run
from dcconv.operator.records import (
    CURVATURE,
    RADIUS,
    Geometry,
    Operator,
    geometry_of,
    operator_of,
)


def decoupled_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    magnitude: str = Operator.magnitude,
    angular: str = Operator.angular,
    weighting: str = Operator.weighting,
    alpha: float = Operator.alpha,
    beta: float = Operator.beta,
    radius: Tensor | float = RADIUS,
    norm_mean: Tensor | str | None = None,
    k: Tensor | float = CURVATURE,
    power: float = Operator.power,
    eps: float = Operator.eps,
    padding_mode: str = "zeros",
    keep: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """Apply a decoupled convolution: y = h(||w||, ||x||) g(angle between w and x) + bias.

    With u = <w_o, x_p>, a = sqrt(||w_o||^2 + eps), b = sqrt(||x_p||^2 + eps), c = u / (a b):
    y[p, o] = h(a, b; alpha, beta, rho_o) g(c; k, power) + bias_o (Liu et al., Decoupled Networks,
    CVPR 2018; h and g are listed in ``dcconv.operator.functions``).

    Args:
        x: input, [n, c, h, w] or [c, h, w]; float16, bfloat16, float32 or float64.
        weight: filters, [o, c / groups, r, s], x's dtype and device.
        bias: added after the operator, [o], x's dtype; it breaks the bound of bounded magnitudes.
        stride: pixels, an integer or a pair (rows, columns).
        padding: pixels, an integer or a pair, ``valid``, or ``same``: ceil(h / stride) outputs at
            any stride, the extra pixel at the end, as TensorFlow does.
        dilation: pixels between kernel taps, an integer or a pair.
        groups: number of channel groups; each has its own patch norm.
        magnitude: ``sphere``, ``ball``, ``tanh``, ``linear``, ``segmented``, ``log`` or ``mix``.
        angular: ``linear``, ``cosine``, ``sigmoid``, ``square_cosine`` or ``power``.
        weighting: ``none``, ``linear``, ``product`` or ``separate``; the last two need ``tanh``.
        alpha: scale of h, a number above 0.
        beta: second slope of ``segmented`` and ``mix``, a number of at least 0.
        radius: r, a number above 0 or a tensor [] or [o]. The values of tensors are not checked:
            what the formula gives for r <= 0 comes out, with rho floored at 1e-12.
        norm_mean: None for rho = r; ``"batch"`` for rho = r m with m the mean of b over this call,
            gradient included; or a scalar tensor for rho = r times it.
        k: curvature of ``sigmoid``, a number above 0 or a tensor [] or [o].
        power: exponent of ``power``, a number of at least 1.
        eps: added to both sums of squares, a number above 0.
        padding_mode: ``zeros``, ``reflect``, ``replicate`` or ``circular``; the patch norm sees
            the same padded input as the dot product.
        keep: what backward keeps besides x, weight and one number per patch: ``output`` keeps y,
            ``dot`` keeps u and so allows in-place operations on y, ``auto`` chooses
            (``dcconv.call.saved``).
        backend: ``auto``, ``cuda``, ``triton``, ``cpu``, ``reference``; None for the process's
            setting (``dcconv.use_backend``, ``DCCONV_BACKEND``).

    Returns:
        y, [n, o, p, q] or [o, p, q], in x's dtype (the autocast dtype under autocast), with the
        strides that ``F.conv2d`` returns.

    Raises:
        ValueError: a value, shape, device or combination of arguments is wrong.
        TypeError: an argument has the wrong type or dtype.
        NotImplementedError: the named backend cannot run this call; the message says why.

    Example:
        >>> import torch
        >>> from dcconv.functional import decoupled_conv2d
        >>> x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
        >>> y = decoupled_conv2d(x, w, padding=1, magnitude="sphere")
        >>> y.shape, bool(y.abs().max() <= 1.0)
        (torch.Size([2, 4, 8, 8]), True)
    """
    operator = operator_of(magnitude, angular, weighting, alpha, beta, power, eps)
    geometry = geometry_of(stride, padding, dilation, groups, padding_mode)
    tensors = (x, weight, bias, radius, norm_mean, k)
    y, _ = run.conv2d(run.Arguments(*tensors, operator, geometry, keep, backend))
    return y


def patch_norm(
    x: Tensor,
    kernel_size: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    eps: float = Operator.eps,
    padding_mode: str = "zeros",
    backend: str | None = None,
) -> Tensor:
    """Return the norm of every patch, b = sqrt(||x_p||^2 + eps), differentiable.

    Args:
        x: input, [n, c, h, w] or [c, h, w]; float16, bfloat16, float32 or float64.
        kernel_size: rows and columns of the window, an integer or a pair.
        stride, padding, dilation, groups, padding_mode: as in :func:`decoupled_conv2d`.
        eps: added to the sum of squares, a number above 0.
        backend: as in :func:`decoupled_conv2d`.

    Returns:
        b, [n, groups, p, q] or [groups, p, q]; float32, or float64 for float64 input.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`decoupled_conv2d`.

    Example:
        >>> import torch
        >>> from dcconv.functional import patch_norm
        >>> patch_norm(torch.ones(1, 4, 3, 3), 3).shape
        torch.Size([1, 1, 1, 1])
    """
    geometry = Geometry(stride, padding, dilation, groups, padding_mode)
    return run.patch_norm(x, kernel_size, geometry, eps, backend)
