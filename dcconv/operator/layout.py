"""The two layouts of tensors, as PyTorch tells them apart."""

from __future__ import annotations

import torch
from torch import Tensor

from dcconv.tracing import sizes


def is_channels_last(t: Tensor) -> bool:
    """Whether a 4-d tensor suggests channels_last, by PyTorch's own rule on strides."""
    smallest, shape = 0, sizes(t)
    for axis in (1, 3, 2, 0):
        size, stride = shape[axis], t.stride(axis)
        if size == 0 or stride < smallest:
            return False
        if axis == 0 and smallest == t.stride(1):
            return False
        smallest = stride * size if size > 1 else stride
    return t.stride(1) != 0


def memory_format(x: Tensor, weight: Tensor | None = None) -> torch.memory_format:
    """Return the layout of the library convolution's result: either operand decides."""
    if x.shape[0] == 0:
        return torch.contiguous_format
    if is_channels_last(x) or (weight is not None and is_channels_last(weight)):
        return torch.channels_last
    return torch.contiguous_format
