"""How much memory autograd keeps for backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Saved:
    """One saved tensor; autograd owns the object, so it lives as long as the graph needs it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_storages(forward: Callable[[], object]) -> dict[int, int]:
    """Return address and bytes of every storage that a forward pass keeps for its backward pass.

    A storage counts once and whole, however many saved tensors share it or see only a part.
    Only what is saved through autograd is seen, not what a function hides on its context.

    Args:
        forward: runs the pass and returns the result, whose graph is what is measured.
    """
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        holder = _Saved(tensor.detach())
        saved.add(holder)
        return holder

    def unpack(holder: _Saved) -> Tensor:
        return holder.tensor

    with saved_tensors_hooks(pack, unpack):
        result = forward()
    storages = {}
    for holder in saved:
        storage = holder.tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    # The graph, and with it every saved tensor, lives until here.
    del result
    return storages


def kept_bytes(forward: Callable[[], object], exclude: Iterable[Tensor] = ()) -> int:
    """Return the bytes that autograd keeps after a forward pass for its backward pass.

    Args:
        forward: see :func:`kept_storages`.
        exclude: tensors that exist anyway, such as parameters and buffers.

    Example:
        >>> import torch
        >>> x = torch.zeros(10, requires_grad=True)
        >>> kept_bytes(lambda: x.exp().sum())
        40
    """
    storages = kept_storages(forward)
    for tensor in exclude:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())
