"""The small network for grey images of a few pixels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from train.networks.operators import Operator


def small_network(
    operator: Operator,
    image_size: int,
    classes: int,
    widths: Sequence[int] = (32, 64, 64),
    norm_momentum: float = 0.1,
) -> nn.Sequential:
    """Build the network for small grey images: 3 x 3 convolutions, then a linear classifier.

    Every convolution is the operator's, followed by batch normalisation and, unless the operator
    goes without, ReLU; 2 x 2 maximum pooling follows every convolution but the first.

    Args:
        operator: what the convolutions are; the rest is the same for all.
        image_size: rows and columns of the input, pixels.
        classes: number of outputs.
        widths: number of filters of each convolution.
        norm_momentum: of the decoupled layers' mean patch norm.

    Returns:
        A network from [n, 1, image_size, image_size] to [n, classes].

    Example:
        >>> import torch
        >>> from train.networks import find_operator
        >>> network = small_network(find_operator("ball_cosine"), 8, 10)
        >>> network(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    layers: list[nn.Module] = []
    for index, (channels, filters) in enumerate(pairwise((1, *widths))):
        layers += [operator.conv2d(channels, filters, norm_momentum, padding=1)]
        layers.append(nn.BatchNorm2d(filters))
        if operator.activation:
            layers.append(nn.ReLU())
        if index:
            layers.append(nn.MaxPool2d(2))
            image_size //= 2
    layers += [nn.Flatten(), nn.Linear(widths[-1] * image_size**2, classes)]
    return nn.Sequential(*layers)
