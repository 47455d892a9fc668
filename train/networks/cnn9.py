"""The plain CNN-9 of Tables 2 and 3 (spec 4.2)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from train.networks.layers import Layers, SameMaxPool2d, require_size, start_gaussian
from train.networks.operators import Operator


class CNN9(nn.Module):
    """Images [n, 3, 32, 32] to logits [n, classes]: nine 3 x 3 convolutions and a 4 x 4 one.

    Three stages of three convolutions, each with batch normalisation and ReLU where wanted, end in
    2 x 2 maximum pooling. A convolution over all that is left, bare, makes the features; a plain
    1 x 1 convolution classifies. Every convolution but the classifier is the operator's.

    Args:
        operator: what the convolutions are, and whether ReLU follows.
        classes: number of outputs.
        norm, official, sync_norm: see :class:`train.networks.layers.Layers`.
        widths: channels of the stages; the features are as many as the last.
        image_size: rows and columns of the images, which the last convolution must cover.

    Example:
        >>> import torch
        >>> from train.networks import find_operator
        >>> network = CNN9(find_operator("ball_cosine"), 10, widths=(4, 4, 4))
        >>> network(torch.zeros(2, 3, 32, 32)).shape
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
        widths: Sequence[int] = (128, 192, 256),
        image_size: int = 32,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        layers = Layers(operator, norm, official, sync_norm)
        stages: list[nn.Module] = []
        channels = 3
        for width in widths:
            stage: list[nn.Module] = []
            for _ in range(3):
                stage += [layers.conv2d(channels, width), layers.batch_norm(width), layers.relu()]
                channels = width
            stage.append(SameMaxPool2d(2, 2))
            stages.append(nn.Sequential(*stage))
            image_size = (image_size + 1) // 2
        self.stages = nn.Sequential(*stages)
        self.features = layers.conv2d(channels, channels, image_size, padding=0)
        self.classifier = nn.Conv2d(channels, classes, 1, bias=False)
        start_gaussian(self)

    def forward(self, x: Tensor) -> Tensor:
        require_size(x, self.image_size)
        logits: Tensor = self.classifier(self.features(self.stages(x))).flatten(1)
        return logits
