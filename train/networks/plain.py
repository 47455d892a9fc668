"""Plain convolutions that do not enter the corners that PyTorch's CPU library gets wrong."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from dcconv.operator import convolution
from dcconv.operator.records import without_autocast


def plain_convolution(
    x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    """Return ``F.conv2d(x, weight, None, stride, padding)``, autocast included.

    Args:
        x: images, [n, c, h, w].
        weight: filters, [o, c, r, s], x's dtype.
        stride, padding: rows and columns, in pixels.

    Example:
        >>> plain_convolution(torch.ones(1, 2, 4, 4), torch.ones(3, 2, 1, 1), (2, 2), (0, 0)).shape
        torch.Size([1, 3, 2, 2])
    """
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
        x, weight = x.to(dtype), weight.to(dtype)
    with without_autocast(x) if x.device.type == "cpu" else nullcontext():
        x, weight = convolution.fitted(x), convolution.fitted(weight)
        return convolution.conv2d(x, weight, None, stride, padding, (1, 1), 1)


class PlainConv2d(nn.Conv2d):
    """``nn.Conv2d`` without bias, dilation and groups, with a padding in pixels.

    Args:
        channels, filters: of the input and the output.
        kernel, stride, padding: of rows and columns alike, in pixels.
    """

    def __init__(
        self, channels: int, filters: int, kernel: int, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__(channels, filters, kernel, stride, padding, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.padding, tuple)
        return plain_convolution(x, self.weight, self.stride, self.padding)
