"""The cuda backend on CPU tensors: the models stand in for its ops, a plain predicate for its own.

``cuda_backend_on_cpu`` is in force while its context lasts; the choice of a strategy and the
composition are the real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import builds
import fused_model
import library_model
import pytest
import torch
from emulated import ops_library
from torch.utils._python_dispatch import TorchDispatchMode
from willing import records_with

from dcconv import backends, native

Implementations = dict[str, Callable[..., Any]]

MODELS: Implementations = library_model.implementations | fused_model.implementations


def emulated() -> Implementations:
    """The CUDA sources, run in the SIMT model."""
    reason = builds.why_not(builds.FAST)
    if reason is not None:
        pytest.skip(reason)
    torch.ops.load_library(str(ops_library()))
    return {name: getattr(torch.ops.dcconv_simt, name).default for name in MODELS}


@contextmanager
def cuda_backend_on_cpu(implementations: Implementations = MODELS) -> Iterator[list[str]]:
    """Run calls on CPU tensors on the cuda backend; yields the names of the ops that ran."""
    if native.missing is not None:
        pytest.skip(native.missing)
    records = records_with(
        "cuda", lambda call: "not a CPU tensor" if call.device != "cpu" else None
    )
    threads = torch.get_num_threads()
    library = torch.library.Library("dcconv", "IMPL")
    ran: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            ran.append(name)
            return implementations[name](*arguments)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "_BACKENDS", records)
        try:
            for name in implementations:
                library.impl(name, noted(name), "CPU")
            torch.set_num_threads(1)  # the tensors are tiny
            with backends.use_backend("cuda"):
                yield ran
        finally:
            torch.set_num_threads(threads)
            library._destroy()


class Recorder(TorchDispatchMode):
    """Keeps the calls of dcconv's ops and the names of the library's convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if func.namespace == "dcconv":
            copies = tuple(t.clone() if isinstance(t, torch.Tensor) else t for t in args)
            self.calls.append((func, copies))
        if func.namespace == "dcconv" or name.startswith("convolution"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))
