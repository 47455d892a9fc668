"""Which backends run on this machine, in their own words."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dcconv import backends
from dcconv.call.refusals import Call
from dcconv.call.runner import Runner


def device_of(name: str) -> str:
    """Return the device to test a backend on; without a GPU the CUDA backends say so themselves."""
    return "cuda" if name in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def why_not(name: str) -> str | None:
    """Return a backend's sentence for a plain float32 call on this machine, None if it is willing.

    Args:
        name: a name in ``dcconv.backends.names``.
    """
    record = backends._BACKENDS[backends.names.index(name)]
    return record.why_not(backends.Call(device_of(name), torch.float32, transformed=False))


def willing() -> list[str]:
    """Return the names of the backends that run here."""
    return [name for name in backends.names if why_not(name) is None]


def records_with(name: str, why_not: Callable[[Call], str | None]) -> tuple[Runner, ...]:
    """Return the backends' records, one of them with another predicate."""
    return tuple(
        record._replace(backend=record.backend._replace(why_not=why_not))
        if record.name == name
        else record
        for record in backends._BACKENDS
    )
