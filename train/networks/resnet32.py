"""The wide ResNet-32 of the CIFAR experiments (spec 2.7)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from train.networks.layers import Layers, SameConv2d, start_gaussian
from train.networks.operators import Operator


class Unit(nn.Module):
    """Two convolutions and a shortcut; ReLU after the first and after the sum.

    The shortcut is the identity where shapes match, else a plain 1 x 1 convolution.
    """

    def __init__(self, layers: Layers, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = layers.conv2d(channels, filters, stride=stride)
        self.norm1 = layers.batch_norm(filters)
        self.conv2 = layers.conv2d(filters, filters)
        self.norm2 = layers.batch_norm(filters)
        self.activation = layers.relu()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != filters:
            self.shortcut = nn.Sequential(
                SameConv2d(channels, filters, 1, stride), layers.batch_norm(filters)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y)) + self.shortcut(x)
        result: Tensor = self.activation(y)
        return result


class ResNet32(nn.Module):
    """Images [n, 3, h, w] to logits [n, classes]: 31 convolutions of the operator.

    No activation follows the root. The official images have 32 x 32 pixels; the average pool
    covers whatever is left of other sizes.

    Args:
        operator: what the convolutions are.
        classes: number of outputs.
        norm, official, sync_norm: see :class:`train.networks.layers.Layers`.
        widths: channels of the three blocks; the root has the first.
        units: units of each block.

    Example:
        >>> import torch
        >>> from train.networks import find_operator
        >>> network = ResNet32(find_operator("tanh_cosine"), 100, widths=(4, 8, 16), units=1)
        >>> network(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 100])
    """

    def __init__(
        self,
        operator: Operator,
        classes: int,
        *,
        norm: bool = True,
        official: bool = False,
        sync_norm: bool = False,
        widths: Sequence[int] = (96, 192, 384),
        units: int = 5,
    ) -> None:
        super().__init__()
        layers = Layers(operator, norm, official, sync_norm)
        self.root = nn.Sequential(layers.conv2d(3, widths[0]), layers.batch_norm(widths[0]))
        blocks: list[nn.Module] = []
        channels = widths[0]
        for index, width in enumerate(widths):
            block: list[nn.Module] = []
            for unit in range(units):
                stride = 2 if index and not unit else 1
                block.append(Unit(layers, channels, width, stride))
                channels = width
            blocks.append(nn.Sequential(*block))
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Conv2d(channels, classes, 1, bias=False)
        start_gaussian(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(self.root(x))
        logits: Tensor = self.classifier(y.mean(dim=(2, 3), keepdim=True)).flatten(1)
        return logits
