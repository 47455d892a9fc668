"""Both ResNet-18 of the ImageNet experiments: modified (spec 2.8) and standard."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from train.networks.layers import Layers, SameMaxPool2d, filters_of
from train.networks.operators import Operator
from train.networks.plain import PlainConv2d


class ResidualUnit(nn.Module):
    """Two convolutions around a PReLU, plus the input; nothing after the sum."""

    def __init__(self, layers: Layers, channels: int) -> None:
        super().__init__()
        self.conv1 = layers.conv2d(channels, channels)
        self.norm1 = layers.batch_norm(channels)
        self.activation = layers.prelu(channels)
        self.conv2 = layers.conv2d(channels, channels)
        self.norm2 = layers.batch_norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.activation(self.norm1(self.conv1(x)))))
        result: Tensor = x + y
        return result


class ModifiedResNet18(nn.Module):
    """Images [n, 3, h, w], officially 224 x 224, to logits [n, classes].

    A 7 x 7 convolution and maximum pooling, then stages of a strided convolution (none before the
    first) and 1, 2, 3 and 1 residual units. 18 convolutions of the operator. The official code adds
    1e-6 to the mean patch norm, which is some hundred, and this does not.

    Args:
        operator: what the convolutions are.
        classes: number of outputs.
        norm, official, sync_norm: see :class:`train.networks.layers.Layers`.
        block4: whether the last stage has its unit. The published log has it, a comment in the
            official code denies it.
        widths: channels of the stages.

    Example:
        >>> import torch
        >>> from train.networks import find_operator
        >>> network = ModifiedResNet18(find_operator("tanh_cosine"), 10, widths=(4, 4, 8, 8))
        >>> network(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        operator: Operator,
        classes: int,
        *,
        norm: bool = True,
        official: bool = False,
        sync_norm: bool = False,
        block4: bool = True,
        widths: Sequence[int] = (128, 256, 512, 1024),
    ) -> None:
        super().__init__()
        layers = Layers(operator, norm, official, sync_norm)
        units = (1, 2, 3, 1 if block4 else 0)
        stages: list[nn.Module] = []
        channels = 3
        for index, (width, count) in enumerate(zip(widths, units, strict=True)):
            entry = [
                layers.conv2d(channels, width, 3 if index else 7, stride=2),
                layers.batch_norm(width),
                layers.prelu(width),
            ]
            if not index:
                entry.append(SameMaxPool2d(3, 2))
            residual = [ResidualUnit(layers, width) for _ in range(count)]
            stages.append(nn.Sequential(*entry, *residual))
            channels = width
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Conv2d(channels, classes, 1, bias=False)
        self.reset_filters()

    def reset_filters(self) -> None:
        """Draw filters from N(0, 0.01^2) in residual units, Xavier-uniform elsewhere."""
        for layer in filters_of(self):
            assert isinstance(layer.weight, Tensor)
            nn.init.xavier_uniform_(layer.weight)
        for unit in self.modules():
            if isinstance(unit, ResidualUnit):
                for layer in filters_of(unit):
                    assert isinstance(layer.weight, Tensor)
                    nn.init.normal_(layer.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stages(x).mean(dim=(2, 3), keepdim=True)
        logits: Tensor = self.classifier(y).flatten(1)
        return logits


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, ReLU after the first and after the sum."""

    def __init__(self, layers: Layers, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = layers.conv2d(channels, filters, stride=stride, padding=1)
        self.bn1 = layers.batch_norm(filters)
        self.relu = layers.relu()
        self.conv2 = layers.conv2d(filters, filters, padding=1)
        self.bn2 = layers.batch_norm(filters)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != filters:
            self.downsample = nn.Sequential(
                PlainConv2d(channels, filters, 1, stride), layers.batch_norm(filters)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) + (x if self.downsample is None else self.downsample(x))
        result: Tensor = self.relu(y)
        return result


class ResNet18(nn.Module):
    """The standard ResNet-18: images [n, 3, h, w] to logits [n, classes].

    Its tensors have torchvision's names and its paddings are symmetric, so that a trained
    ``torchvision.models.resnet18`` can be its start. 17 convolutions of the operator; shortcuts
    and classifier are plain.

    Args:
        operator: what the convolutions are.
        classes: number of outputs.
        norm, official, sync_norm: see :class:`train.networks.layers.Layers`.
        widths: channels of the stages.

    Example:
        >>> import torch
        >>> from train.networks import find_operator
        >>> network = ResNet18(find_operator("linear_cosine"), 10, widths=(4, 4, 8, 8))
        >>> network(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        operator: Operator,
        classes: int,
        *,
        norm: bool = True,
        official: bool = False,
        sync_norm: bool = False,
        widths: Sequence[int] = (64, 128, 256, 512),
    ) -> None:
        super().__init__()
        layers = Layers(operator, norm, official, sync_norm)
        first, second, third, fourth = widths
        self.conv1 = layers.conv2d(3, first, 7, 2, padding=3)
        self.bn1 = layers.batch_norm(first)
        self.relu = layers.relu()
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = self._stage(layers, first, first, 1)
        self.layer2 = self._stage(layers, first, second, 2)
        self.layer3 = self._stage(layers, second, third, 2)
        self.layer4 = self._stage(layers, third, fourth, 2)
        self.fc = nn.Linear(fourth, classes)
        for layer in filters_of(self):
            if layer is not self.fc:
                assert isinstance(layer.weight, Tensor)
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(layers: Layers, channels: int, filters: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            BasicBlock(layers, channels, filters, stride), BasicBlock(layers, filters, filters, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        y = self.layer4(self.layer3(self.layer2(self.layer1(y))))
        logits: Tensor = self.fc(y.mean(dim=(2, 3)))
        return logits
