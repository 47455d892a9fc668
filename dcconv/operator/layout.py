"""Where tensors lie: the two layouts, as PyTorch tells them apart, and devices."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from dcconv.tracing import sizes

#: The classes of tensors that are one array with numbers for sizes, outside of transforms.
PLAIN = (Tensor, Parameter)

# Answers by sizes and strides: the rule in Python takes 3 us. Emptied when full.
_MOST_ANSWERS = 4096
_answers: dict[tuple[Any, ...], bool] = {}


def _suggests_channels_last(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    smallest = 0
    for axis in (1, 3, 2, 0):
        size, stride = shape[axis], strides[axis]
        if size == 0 or stride < smallest:
            return False
        if axis == 0 and smallest == strides[1]:
            return False
        smallest = stride * size if size > 1 else stride
    return strides[1] != 0


def is_channels_last(t: Tensor) -> bool:
    """Whether a 4-d tensor suggests channels_last, by PyTorch's own rule on strides."""
    if type(t) not in PLAIN or torch.compiler.is_compiling() or torch._C._is_tracing():
        return _suggests_channels_last(sizes(t), t.stride())
    # The usual case by PyTorch's own words, which say nothing of axes of one element.
    if t.is_contiguous() and t.size(1) > 1 and (t.size(2) > 1 or t.size(3) > 1):
        return False
    key = (t.shape, t.stride())
    found = _answers.get(key)
    if found is None:
        found = _suggests_channels_last(*key)
        if len(_answers) >= _MOST_ANSWERS:
            _answers.clear()
        _answers[key] = found
    return found


def memory_format(x: Tensor, weight: Tensor | None = None) -> torch.memory_format:
    """Return the layout of the library convolution's result: either operand decides."""
    if x.shape[0] == 0:
        return torch.contiguous_format
    if is_channels_last(x) or (weight is not None and is_channels_last(weight)):
        return torch.channels_last
    return torch.contiguous_format


def on_device(t: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which t's GPU is the current one, whose stream its ops run on."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()
