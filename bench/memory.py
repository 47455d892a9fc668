"""Bytes that autograd keeps between forward and backward, counted as distinct storages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Inputs
from bench.providers import Function


@dataclass(frozen=True)
class Kept:
    """Bytes kept for backward: all storages but the parameters', and the part that is x."""

    total: int
    x: int


def kept(call: Callable[[], Tensor], x: Tensor, parameters: Iterable[Tensor]) -> Kept:
    """Run a forward and count what it saves for backward.

    Every tensor that reaches ``save_for_backward`` counts with its whole storage, once, however
    many views of it are saved. Storages of ``parameters`` do not count.

    Example:
        >>> x = torch.ones(4, requires_grad=True)
        >>> kept(lambda: x.exp().square(), x, ())
        Kept(total=16, x=0)
        >>> kept(lambda: x.square(), x, ())
        Kept(total=16, x=16)
    """
    # The storages themselves are held, so that no address is used twice while counting.
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        storages[storage.data_ptr()] = storage
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call()
    excluded = {p.untyped_storage().data_ptr() for p in parameters}
    own = x.untyped_storage().data_ptr()
    sizes = {at: s.nbytes() for at, s in storages.items() if at not in excluded}
    del y
    return Kept(total=sum(sizes.values()), x=sizes.get(own, 0))


def layer_kept(function: Function, inputs: Inputs) -> Kept:
    """Return what the operator alone keeps."""
    arguments = (inputs.x, inputs.weight, inputs.radius, inputs.norm_mean)
    return kept(lambda: function(*arguments), inputs.x, inputs.parameters)


def chain_kept(function: Function, inputs: Inputs) -> Kept:
    """Return what the operator, BatchNorm in training and ReLU keep together."""
    arguments = (inputs.x, inputs.weight, inputs.radius, inputs.norm_mean)
    filters = inputs.weight.shape[0]
    scale = inputs.x.new_ones(filters).requires_grad_()
    shift = inputs.x.new_zeros(filters).requires_grad_()

    def chain() -> Tensor:
        return F.relu(F.batch_norm(function(*arguments), None, None, scale, shift, training=True))

    return kept(chain, inputs.x, (*inputs.parameters, scale, shift))
