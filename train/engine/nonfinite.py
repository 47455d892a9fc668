"""Where a NaN or an infinity came up first: which layer's output, or which gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn


class NonFiniteError(Exception):
    """The training has a loss or weights that are not finite; the message says where it began."""


def all_finite(tensors: list[Tensor]) -> Tensor:
    """Return whether all floating tensors are finite, as one bool tensor on their device.

    Their sum of magnitudes is compared, which reads every value once and makes nothing large; a
    sum that overflows counts as well, as no sane weights come near.
    """
    floating = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
    filled = [tensor for tensor in floating if tensor.numel()]
    if not filled:
        return torch.tensor(True)
    norms = torch._foreach_norm(filled, 1)
    return torch.stack([norm.float() for norm in norms]).isfinite().all()


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_finite, value))
    return True


@torch.no_grad()
def first_layer(network: nn.Module, forward: Callable[[], object]) -> str | None:
    """Return the name and type of the first module whose output is not finite, in a forward.

    A module comes after the modules it is made of, so a layer is named before its block.
    """
    found: list[str] = []

    def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if not found and not _finite(output):
                found.append(f"'{name}' ({type(module).__name__})")

        return hook

    with ExitStack() as stack:
        for name, module in network.named_modules():
            hook = hook_of(name or "the network")
            stack.callback(module.register_forward_hook(hook).remove)
        forward()
    return found[0] if found else None


def first_gradient(network: nn.Module) -> str | None:
    """Return the name of the first parameter, on the way back, whose gradient is not finite."""
    for name, parameter in reversed(list(network.named_parameters())):
        if parameter.grad is not None and not _finite(parameter.grad):
            return f"'{name}'"
    return None


def first_state(network: nn.Module) -> str | None:
    """Return the name of the first parameter or buffer that is not finite."""
    for name, value in network.state_dict().items():
        if not _finite(value):
            return f"'{name}'"
    return None
