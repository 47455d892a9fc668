"""How tracers see a layer: ``torch.fx`` as a leaf, ``torch.jit.trace`` as plain operations.

Also what ``torch.compile`` takes for constant.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import fx, nn
from torch.jit._trace import TracerWarning

P = ParamSpec("P")
T = TypeVar("T")

_answers: dict[tuple[Any, ...], Any] = {}

# Under this name a layer has itself, for graphs whose root it is.
ITSELF = "itself"


def proxy_in(arguments: tuple[Any, ...], options: dict[str, Any]) -> fx.Proxy | None:
    """Return the value that a tracer of ``torch.fx`` gives in the place of x, if it does."""
    x = arguments[0] if arguments else options.get("x", options.get("input"))
    return x if isinstance(x, fx.Proxy) else None


def leaf(layer: nn.Module, x: fx.Proxy, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Record a layer as one call of a module, as tracers do with layers of ``torch.nn``.

    Tracers look into every module from elsewhere; the layer's checks and choices need real tensors,
    and its moving average a module to belong to.
    """
    tracer: Any = x.tracer

    def record(*args: Any, **kwargs: Any) -> Any:
        path = tracer.path_of_module(layer) or ITSELF
        return tracer.create_proxy("call_module", path, args, kwargs)

    if layer is getattr(tracer, "root", None):
        return record(*arguments, **options)
    # With the tracer's own bookkeeping: some name nodes after the modules that they enter.
    return tracer.call_module(layer, record, arguments, options)


class Leaf(nn.Module):
    """A layer that tracers of ``torch.fx`` record as one call, hooks and all."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call forward and hooks, or have the call recorded."""
        if not arguments or type(arguments[0]) is not torch.Tensor:
            proxy = proxy_in(arguments, options)
            if proxy is not None:
                return leaf(self, proxy, arguments, options)
        return super().__call__(*arguments, **options)

    @property
    def itself(self) -> nn.Module:
        """The layer, for graphs of ``torch.fx`` whose root it is."""
        return self


def recording() -> bool:
    """Return whether ``torch.jit.trace`` records what runs."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


@contextmanager
def quietly() -> Iterator[None]:
    """Leave out the warnings of ``torch.jit.trace`` about sizes that checks look at."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracerWarning)
        yield


def sizes(t: torch.Tensor) -> tuple[int, ...]:
    """Return a tensor's shape to decide by: numbers also where ``torch.jit.trace`` has tensors."""
    shape: Any = t.shape
    if not shape or not isinstance(shape[0], torch.Tensor):
        known: tuple[int, ...] = shape
        return known
    with quietly():
        return tuple([int(size) for size in shape])


def constant_for_tracing(function: Callable[P, T]) -> Callable[P, T]:
    """Mark a function whose result ``torch.compile`` takes for constant.

    This is ``torch.compiler.assume_constant_result`` without its import of the whole compiler, 1.7
    s of CPU time in every process that imports dcconv.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


def has_static_value(size: int) -> bool:
    """Return whether a size has one possible value: while tracing it may be a symbol."""
    if not torch.compiler.is_compiling() and type(size) is int:  # a traced symbol says so, too
        return True
    from torch.fx.experimental import symbolic_shapes  # which imports sympy

    return symbolic_shapes.has_static_value(size)


def asked_once(question: Callable[P, T]) -> Callable[P, T]:
    """Make the answer to a question about this process a constant for tracing, found once."""

    @constant_for_tracing
    def ask(*arguments: P.args, **keywords: P.kwargs) -> T:
        key = (question, *arguments)
        if key not in _answers:
            _answers[key] = question(*arguments, **keywords)
        answer: T = _answers[key]
        return answer

    asked: Callable[P, T] = ask
    return asked
