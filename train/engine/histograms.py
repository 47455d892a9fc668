"""What decoupled layers see: distributions of patch norms, cosines and radii, for one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dcconv import DecoupledConv2d
from dcconv.functional import decoupled_conv2d, patch_norm

# Enough for the shape of a distribution; a whole layer has many millions.
MOST_VALUES = 100_000


def _sample(values: Tensor) -> Tensor:
    """Return at most ``MOST_VALUES`` values at equal distances, as float32 on the CPU."""
    flat = values.detach().flatten()
    stride = -(-flat.numel() // MOST_VALUES)
    return flat[:: max(stride, 1)].float().cpu()


def layer_values(layer: DecoupledConv2d, x: Tensor) -> dict[str, Tensor]:
    """Return a layer's patch norms b, cosines c and, where it has them, radii rho.

    The radii are in the unit of the norms: multiplied by the moving average of the mean norm
    where the layer's radius is relative to it.
    """
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
    shared: dict[str, Any] = {
        "eps": layer.eps,
        "padding_mode": layer.padding_mode,
        "backend": layer.backend,
    }
    weight = layer.weight.detach()
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        x = x.to(weight.dtype)
    values = {"patch_norm": patch_norm(x, layer.kernel_size, *geometry, **shared)}
    # With magnitude 1 and the cosine as it is, the operator is c = <w, x> / (a b).
    values["cosine"] = decoupled_conv2d(
        x, weight, None, *geometry, magnitude="sphere", angular="cosine", alpha=1.0, **shared
    )
    if layer.radius_raw is not None:
        radius = layer.radius
        assert isinstance(radius, Tensor)
        scale = layer.norm_mean if layer.norm_mean is not None else 1.0
        values["radius"] = radius * scale
    return values


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode, and every module back into its own mode afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def collect(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return ``<layer>/patch_norm``, ``/cosine`` and ``/radius`` for every decoupled layer.

    The network runs once in evaluation mode; nothing of it changes.
    """
    result: dict[str, Tensor] = {}

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            assert isinstance(module, DecoupledConv2d)
            for kind, values in layer_values(module, arguments[0]).items():
                result[f"{name}/{kind}"] = _sample(values)

        return hook

    with ExitStack() as stack:
        for name, module in network.named_modules():
            if isinstance(module, DecoupledConv2d):
                stack.callback(module.register_forward_pre_hook(hook_of(name)).remove)
        stack.enter_context(_evaluating(network))
        network(images)
    return result
