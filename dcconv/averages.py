"""The float32 moving average behind a buffer that others cast to half precision.

An update moves the average by t = 1e-3 of a difference, below half an ulp of a half float: an
average in half precision stands still. Buffers are cast in ways that a module does not see (FSDP's
``MixedPrecision(buffer_dtype=...)`` sets ``buffer.data``), so the average is looked after where it
is used.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KeptAverage:
    """A second view of a buffer's memory, which keeps the digits when the buffer is cast.

    In-place updates of the buffer go to the same memory. A cast gives the buffer other memory and
    leaves this view the value before it. Not a plain attribute: a tensor among a module's
    attributes is taken for state by tools that look for some.
    """

    def __init__(self, buffer: Tensor) -> None:
        self.tensor = buffer.detach()

    def of(self, buffer: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the average in ``dtype`` that a buffer of fewer digits stands for.

        Args:
            buffer: the buffer as it is found, [].
            dtype: the dtype that the average needs.

        Returns:
            The kept value where the buffer is its rounding, else the buffer's own, which somebody
            has set: [], in new memory.
        """
        value, kept = buffer.detach().to(dtype), self.tensor
        if kept.device != value.device or kept.is_meta:
            return value.clone()
        kept = kept.to(dtype)
        return torch.where(kept.to(buffer.dtype) == buffer.detach(), kept, value)


def needs_digits(buffer: Tensor, dtype: torch.dtype) -> bool:
    """Whether a buffer has fewer digits than ``dtype``: a half one, or float32 for float64."""
    return torch.finfo(buffer.dtype).eps > torch.finfo(dtype).eps
