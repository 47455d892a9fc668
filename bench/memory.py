"""Bytes of memory: what autograd keeps between forward and backward, and the peak of a call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.cases import Inputs
from bench.providers import Function, forward
from train.memory import kept_storages

# The profiler's own library reports its start and stop on stderr otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


@dataclass(frozen=True)
class Kept:
    """Bytes kept for backward: all storages but the parameters', and the part that is x."""

    total: int
    x: int


def kept(call: Callable[[], Tensor], x: Tensor, parameters: Iterable[Tensor]) -> Kept:
    """Run a forward and count what its result keeps for backward, without ``parameters``.

    How storages count says :func:`train.memory.kept_storages`.

    Example:
        >>> x = torch.ones(4, requires_grad=True)
        >>> kept(lambda: x.exp().square(), x, ())
        Kept(total=16, x=0)
        >>> kept(lambda: x.square(), x, ())
        Kept(total=16, x=16)
    """
    sizes = kept_storages(call)
    for parameter in parameters:
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    return Kept(total=sum(sizes.values()), x=sizes.get(x.untyped_storage().data_ptr(), 0))


def layer_kept(function: Function, inputs: Inputs) -> Kept:
    """Return what the operator alone keeps."""
    return kept(lambda: forward(function, inputs), inputs.x, inputs.parameters)


def chain_kept(function: Function, inputs: Inputs) -> Kept:
    """Return what the operator, BatchNorm in training and ReLU keep together."""
    filters = inputs.weight.shape[0]
    scale = inputs.x.new_ones(filters).requires_grad_()
    shift = inputs.x.new_zeros(filters).requires_grad_()

    def chain() -> Tensor:
        y = forward(function, inputs)
        return F.relu(F.batch_norm(y, None, None, scale, shift, training=True))

    return kept(chain, inputs.x, (*inputs.parameters, scale, shift))


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """Return the most memory a call holds at once, beyond what was held before it.

    CUDA: by the statistics of PyTorch's allocator. CPU: by the allocations and releases the
    profiler records, in their order; workspace that a library takes past PyTorch's allocator is
    not seen.

    Example:
        >>> import torch
        >>> x = torch.zeros(1024)
        >>> peak_bytes(lambda: (x + 1).sum()) >= 4096
        True
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    del result
    held = peak = 0
    assert recorded.profiler is not None
    results = recorded.profiler.kineto_results
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
