"""Moving averages of a network estimated from given images."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

import dcconv


def estimate_statistics(network: nn.Module, batches: Iterable[Tensor]) -> int:
    """Set every moving average to the mean over the batches' own (:func:`dcconv.calibrate`).

    Args:
        network: a module with moving averages.
        batches: images [n, c, h, w] on the network's device, at least one batch.

    Returns:
        The number of batches.

    Raises:
        ValueError: there is no batch, or nothing to estimate.
    """
    return dcconv.calibrate(network, batches)


def start_statistics(network: nn.Module, images: Tensor) -> None:
    """Start every moving average of a network from one batch instead of from a constant.

    Batch normalisation starts its running variance at 1. The outputs of bounded operators vary
    far less, and evaluation would stay off by that factor until the average has forgotten the 1.
    """
    estimate_statistics(network, (images,))
