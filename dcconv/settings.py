"""Settings that a context manager changes for the thread or asyncio task that entered it alone.

The truth is a context variable: overlapping contexts of several threads or tasks neither see nor
overwrite each other, and the threads in which autograd runs backward, and with it the recomputation
of activation checkpointing, see the setting of the thread that called ``backward``. Code that
``torch.compile`` traces reads a copy per thread instead, with a guard on it: PyTorch 2.13 traces no
context variables, and no later version traces changes to one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class _Traced(threading.local):
    """The settings of a thread's contexts by name, as tracing reads them; None outside of one."""

    def __init__(self) -> None:
        # In the instance: Dynamo puts no guard on what it finds in the class.
        self.backend: Any = None
        self.strategies: Any = None
        self.benchmark: Any = None
        self.norm_updates: Any = None


_traced = _Traced()


def _of_backward(variable: ContextVar[Any]) -> Any:
    """Return a variable of the thread that called backward, where autograd runs another one."""
    if not torch._C._is_key_in_tls("context"):
        return None
    context = torch._C._get_obj_in_tls("context")
    return None if context is None else context.get(variable)


class Setting(Generic[T]):
    """One setting; its values are anything but None.

    Args:
        name: an attribute of ``_Traced``.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        # Whether any context was ever entered: looking for one takes half a microsecond.
        self.used = False
        self.variable: ContextVar[T | None] = ContextVar(f"dcconv.{name}", default=None)

    def own(self) -> T | None:
        """Return what the innermost context says, None outside of contexts."""
        if torch.compiler.is_compiling():
            traced: T | None = getattr(_traced, self.name)
            return traced
        if not self.used:
            return None
        value = self.variable.get()
        return _of_backward(self.variable) if value is None else value

    @contextmanager
    def within(self, value: T) -> Iterator[None]:
        """Have a value inside the context."""
        traced = torch.compiler.is_compiling()
        if traced:
            before = getattr(_traced, self.name)
        else:
            self.used = True
            # Not what is in the copy: tasks of one thread may leave in another order.
            before = self.variable.get()
            self.variable.set(value)
        setattr(_traced, self.name, value)
        try:
            yield
        finally:
            if not traced:
                self.variable.set(before)
            setattr(_traced, self.name, before)


backend: Setting[str] = Setting("backend")
strategies: Setting[Any] = Setting("strategies")
benchmark: Setting[bool] = Setting("benchmark")
norm_updates: Setting[bool] = Setting("norm_updates")
