"""Layers that the networks are built of: TensorFlow's paddings, statistics and initialisers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcconv import DecoupledConv2d
from dcconv.operator.checks import value_error
from dcconv.operator.records import same_padding
from train.networks.operators import Operator
from train.networks.plain import plain_convolution

# The official code's moving averages: x_avg <- 0.999 x_avg + 0.001 x, from 0, without correction.
OFFICIAL_MOMENTUM = 1e-3
OFFICIAL_EPS = 1e-3


def pad_same(
    x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], value: float = 0.0
) -> Tensor:
    """Pad rows and columns as TensorFlow's SAME does: at stride 2 the end receives more."""
    top, bottom = same_padding(x.shape[-2], kernel[0], stride[0], 1)
    left, right = same_padding(x.shape[-1], kernel[1], stride[1], 1)
    if not (top or bottom or left or right):
        return x
    return F.pad(x, (left, right, top, bottom), value=value)


def require_size(images: Tensor, size: int) -> None:
    """Require square images of so many rows and columns."""
    h, w = images.shape[-2:]
    if (h, w) != (size, size):
        raise value_error("images", f"have {size} x {size} pixels", f"{h} x {w}")


class SameConv2d(nn.Conv2d):
    """``nn.Conv2d`` without bias and with TensorFlow's SAME padding at any stride."""

    def __init__(self, channels: int, filters: int, kernel: int, stride: int = 1) -> None:
        super().__init__(channels, filters, kernel, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.weight.shape[2:], self.stride
        top, bottom = same_padding(x.shape[-2], kernel[0], stride[0], 1)
        left, right = same_padding(x.shape[-1], kernel[1], stride[1], 1)
        # The convolution pads by itself where it can: a padded copy costs time and is kept.
        if top != bottom or left != right:
            x = F.pad(x, (left, right, top, bottom))
            top = left = 0
        return plain_convolution(x, self.weight, stride, (top, left))


class SameMaxPool2d(nn.Module):
    """Maximum pooling with TensorFlow's SAME padding, which never wins the maximum."""

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        pair = ((self.kernel, self.kernel), (self.stride, self.stride))
        return F.max_pool2d(pad_same(x, *pair, value=-math.inf), self.kernel, self.stride)

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, stride={self.stride}"


class OfficialBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation as the official code has it (spec 2.4).

    eps 1e-3; averages that move by 1e-3 and start at 0, also that of the variance; the average is
    of the biased variance, where ``nn.BatchNorm2d`` averages the unbiased one.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=OFFICIAL_EPS, momentum=OFFICIAL_MOMENTUM)

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        if self.running_var is not None:
            self.running_var.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        # A momentum of 1 makes batch_norm return this batch's statistics.
        mean, variance = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        y = F.batch_norm(x, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * ((count - 1) / count), self.momentum)
            self.num_batches_tracked.add_(1)
        return y


@dataclass(frozen=True)
class Layers:
    """Makes the layers of one network.

    Args:
        operator: what the convolutions are.
        norm: whether batch normalisation follows the convolutions.
        official: the official code's moving averages: slow, from 0, and of no use before some
            thousand iterations. Otherwise they move by 0.1, and the mean patch norm starts at the
            first batch's.
        sync_norm: average the mean patch norm over the ranks.
    """

    operator: Operator
    norm: bool = True
    official: bool = False
    sync_norm: bool = False

    def conv2d(
        self,
        channels: int,
        filters: int,
        kernel: int = 3,
        stride: int = 1,
        padding: int | str = "same",
    ) -> nn.Module:
        """Return a convolution of the operator."""
        if self.operator.magnitude is None and padding == "same":
            return SameConv2d(channels, filters, kernel, stride)
        return self.operator.conv2d(
            channels,
            filters,
            OFFICIAL_MOMENTUM if self.official else 0.1,
            kernel=kernel,
            stride=stride,
            padding=padding,
            norm_init="zero" if self.official else "first",
            sync_norm=self.sync_norm,
        )

    def batch_norm(self, channels: int) -> nn.Module:
        """Return batch normalisation, or nothing where the network goes without."""
        if not self.norm:
            return nn.Identity()
        return OfficialBatchNorm2d(channels) if self.official else nn.BatchNorm2d(channels)

    def relu(self) -> nn.Module:
        """Return ReLU, or nothing where the operator goes without activation."""
        return nn.ReLU() if self.operator.activation else nn.Identity()

    def prelu(self, channels: int) -> nn.Module:
        """Return one slope per channel, from 0, or nothing without activation."""
        return nn.PReLU(channels, init=0.0) if self.operator.activation else nn.Identity()


def filters_of(network: nn.Module) -> list[nn.Module]:
    """Return the layers with filters: decoupled and plain convolutions and linear ones."""
    kinds = (DecoupledConv2d, nn.Conv2d, nn.Linear)
    return [module for module in network.modules() if isinstance(module, kinds)]


def start_gaussian(network: nn.Module) -> None:
    """Draw every filter from N(0, 2 / fan_in), the official CIFAR initialiser (spec 2.7)."""
    for layer in filters_of(network):
        weight = layer.weight
        assert isinstance(weight, Tensor)
        nn.init.normal_(weight, std=math.sqrt(2.0 / weight[0].numel()))
        if isinstance(layer.bias, Tensor):
            nn.init.zeros_(layer.bias)
