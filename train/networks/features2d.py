"""The network whose features are two numbers, to draw them (the paper's Figure 1)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from train.networks.layers import Layers, SameMaxPool2d, require_size, start_gaussian
from train.networks.operators import Operator


class Features2d(nn.Module):
    """Grey images [n, 1, image_size, image_size] to logits [n, classes] through two features.

    3 x 3 convolutions with batch normalisation and ReLU, 2 x 2 maximum pooling after every one but
    the first; then a bare convolution of the operator with two filters over all that is left, and
    a plain linear classifier without offsets, so that classes are told apart by angle and norm.

    Args:
        operator: what the convolutions are, that of the features included.
        image_size: rows and columns of the images, pixels.
        classes: number of outputs.
        widths: filters of the convolutions before the features.

    Example:
        >>> import torch
        >>> from train.networks import find_operator
        >>> network = Features2d(find_operator("sphere_cosine"), 8, 10)
        >>> network.features(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        operator: Operator,
        image_size: int,
        classes: int,
        widths: Sequence[int] = (32, 64, 64),
    ) -> None:
        super().__init__()
        self.image_size = image_size
        layers = Layers(operator)
        body: list[nn.Module] = []
        for index, (channels, filters) in enumerate(pairwise((1, *widths))):
            body += [layers.conv2d(channels, filters), layers.batch_norm(filters), layers.relu()]
            if index:
                body.append(SameMaxPool2d(2, 2))
                image_size = (image_size + 1) // 2
        self.body = nn.Sequential(*body)
        self.to_plane = layers.conv2d(widths[-1], 2, image_size, padding=0)
        self.classifier = nn.Linear(2, classes, bias=False)
        start_gaussian(self)

    def features(self, x: Tensor) -> Tensor:
        """Return the features [n, 2]; bounded operators keep each of them within [-1, 1]."""
        require_size(x, self.image_size)
        plane: Tensor = self.to_plane(self.body(x)).flatten(1)
        return plane

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x))
        return logits
