"""Moving averages of a network estimated from given images."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dcconv import DecoupledConv2d
from dcconv.checks import value_error


@torch.no_grad()
def estimate_statistics(network: nn.Module, batches: Iterable[Tensor]) -> int:
    """Set every moving average to the mean over the batches' own statistics.

    That is batch normalisation's mean and variance and the decoupled layers' mean patch norm;
    what they were before is forgotten. Training mode is restored to what it was.

    Args:
        network: any module.
        batches: images [n, c, h, w] on the network's device, at least one batch.

    Returns:
        The number of batches.

    Raises:
        ValueError: there is no batch.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    layers = [module for module in network.modules() if isinstance(module, DecoupledConv2d)]
    momenta = [norm.momentum for norm in norms], [layer.norm_momentum for layer in layers]
    modes = [(module, module.training) for module in network.modules()]
    count = 0
    network.train()
    try:
        for images in batches:
            count += 1
            for norm in norms:
                norm.momentum = 1.0 / count
            for layer in layers:
                layer.norm_momentum = 1.0 / count
            network(images)
    finally:
        for norm, momentum in zip(norms, momenta[0], strict=True):
            norm.momentum = momentum
        for layer, momentum in zip(layers, momenta[1], strict=True):
            layer.norm_momentum = momentum
        for module, mode in modes:
            module.training = mode
    if not count:
        raise value_error("batches", "hold at least one batch of images", "none")
    return count


def start_statistics(network: nn.Module, images: Tensor) -> None:
    """Start every moving average of a network from one batch instead of from a constant.

    Batch normalisation starts its running variance at 1. The outputs of bounded operators vary
    far less, and evaluation would stay off by that factor until the average has forgotten the 1.
    """
    estimate_statistics(network, (images,))
