"""Casts of a whole layer to dtypes that the operator does not have, refused and undone."""

from __future__ import annotations

from torch import Tensor, nn

from dcconv.operator import checks
from dcconv.operator.numerics import FLOATING_DTYPES


class Cast:
    """What a layer holds before ``nn.Module._apply`` changes it in place."""

    def __init__(self, layer: nn.Module) -> None:
        self._places: list[tuple[dict[str, Tensor | None], dict[str, Tensor | None]]] = []
        for part in layer.modules():
            for place in (part._parameters, part._buffers):
                self._places.append((place, dict(place)))  # type: ignore[arg-type]
        tensors = [t for _, held in self._places for t in held.values() if t is not None]
        tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
        self._memory = [(t, t.data) for t in tensors]
        self._dtypes = {id(t): t.dtype for t in tensors}

    def check(self) -> None:
        """Raise TypeError, with the layer as it was, if a floating tensor has become another kind.

        Complex numbers, integers and 8-bit floats are such kinds: the operator takes none of them.
        """
        for place, held in self._places:
            for name, former in held.items():
                now = place.get(name)
                if former is None or now is None or now.dtype in FLOATING_DTYPES:
                    continue
                if self._dtypes[id(former)] in FLOATING_DTYPES:
                    got = now.dtype
                    self._undo()
                    raise checks.type_error("dtype", checks.DTYPE_RULE, got)

    def _undo(self) -> None:
        for place, held in self._places:
            place.update(held)
        for tensor, memory in self._memory:
            tensor.data = memory
