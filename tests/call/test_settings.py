"""Settings of context managers: whose they are, what backward and compiled code see of them."""

from __future__ import annotations

import asyncio
import contextvars
import re
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import dcconv
from dcconv import backends
from dcconv.call import strategy
from dcconv.functional import decoupled_conv2d


class Case(NamedTuple):
    """One setting: its context manager, two values, and what is in force."""

    use: Callable[[Any], AbstractContextManager[None]]
    values: tuple[Any, Any]
    now: Callable[[], Any]


CASES = {
    "backend": Case(
        dcconv.use_backend,
        ("reference", "auto"),
        lambda: backends.settings.backend.own() or backends._default,
    ),
    "strategies": Case(
        backends.strategies, ("library", "library,fused"), lambda: strategy._setting().names
    ),
    "benchmark": Case(backends.benchmarking, (True, False), backends._benchmarks),
    "norm_updates": Case(
        dcconv.norm_updates,
        (False, True),
        lambda: backends.settings.norm_updates.own() is not False,
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def in_thread(function: Callable[[], Any]) -> Any:
    """Return what a function returns in a thread of its own."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_overlapping_threads_have_their_own(case: Case) -> None:
    before = case.now()
    entered, left = threading.Event(), threading.Event()
    seen: dict[str, Any] = {}

    def first() -> None:
        with case.use(case.values[0]):
            entered.wait(60)
            seen["first"] = case.now()
        left.set()

    def second() -> None:
        with case.use(case.values[1]):
            entered.set()
            left.wait(60)
            seen["second"] = case.now()
        seen["after"] = case.now()

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (seen["first"], seen["second"]) == case.values
    assert seen["after"] == case.now() == in_thread(case.now) == before


def test_overlapping_tasks_have_their_own(case: Case) -> None:
    before = case.now()

    async def both() -> list[Any]:
        entered, left = asyncio.Event(), asyncio.Event()

        async def first() -> Any:
            with case.use(case.values[0]):
                await entered.wait()
                found = case.now()
            left.set()
            return found

        async def second() -> Any:
            with case.use(case.values[1]):
                entered.set()
                await left.wait()
                return case.now()

        return [*await asyncio.gather(first(), second()), case.now()]

    assert asyncio.run(both()) == [*case.values, before]
    assert case.now() == before
    name = backends.settings._traced.__dict__
    assert set(name.values()) <= {None, backends.settings.backend.variable.get()}


def test_threads_begin_with_the_process_setting(case: Case) -> None:
    before = case.now()
    with case.use(case.values[0]):
        assert in_thread(case.now) == before
        context = contextvars.copy_context()
        assert in_thread(lambda: context.run(case.now)) == case.values[0]


def test_contexts_nest_and_end_with_an_error(case: Case) -> None:
    before = case.now()

    def fail() -> None:
        with case.use(case.values[0]):
            with case.use(case.values[1]):
                assert case.now() == case.values[1]
            assert case.now() == case.values[0]
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert case.now() == before


class Nested(torch.autograd.Function):
    """Backward calls backward, ``depth`` times: past 60 autograd goes on in another thread.

    ``found`` has each thread, and what the first backward in it saw.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, depth: int, found: list[Any], now: Callable[[], Any]
    ) -> Tensor:
        ctx.depth, ctx.found, ctx.now = depth, found, now
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if threading.get_ident() not in [thread for thread, _ in ctx.found]:
            ctx.found.append((threading.get_ident(), ctx.now()))
        if ctx.depth:
            with torch.enable_grad():
                x = torch.ones(1, requires_grad=True)
                Nested.apply(x, ctx.depth - 1, ctx.found, ctx.now).backward(grad)
        return grad, None, None, None


def test_threads_of_backward_see_the_setting_of_their_caller(case: Case) -> None:
    found: list[Any] = []
    with case.use(case.values[0]):
        x = torch.ones(1, requires_grad=True)
        Nested.apply(x, 80, found, case.now).backward()
    (own, _), (other, seen) = found
    assert own == threading.get_ident() != other
    assert seen == case.values[0]


def shape_of_graph(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function; the result has ``counts``: by graph how many convolutions it has."""
    counts: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        counts.append(sum("conv2d" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    compiled: Any = torch.compile(fn, fullgraph=True, backend=count)
    compiled.counts = counts
    return compiled


def test_compiled_code_follows_the_setting_of_its_thread() -> None:
    x, weight = torch.randn(1, 3, 6, 6), torch.randn(4, 3, 3, 3)
    refused = {record.name: record.why_not for record in backends._BACKENDS}
    name = next((n for n in ("cuda", "triton") if refused[n](backends.describe(x))), "cuda")
    torch._dynamo.reset()
    compiled = shape_of_graph(lambda x: decoupled_conv2d(x, weight))
    with dcconv.use_backend("reference"):
        want = compiled(x)
        compiled(x)
    assert len(compiled.counts) == 1
    # Another setting is another graph: here one that cannot be traced at all.
    with dcconv.use_backend(name), pytest.raises(Exception, match=f"backend '{name}' cannot run"):
        compiled(x)
    with dcconv.use_backend("reference"):
        assert torch.equal(compiled(x), want)
    assert len(compiled.counts) == 1


def test_contexts_inside_compiled_code() -> None:
    x, weight = torch.randn(1, 3, 6, 6), torch.randn(4, 3, 3, 3)

    def call(x: Tensor) -> Tensor:
        with (
            dcconv.use_backend("reference"),
            backends.strategies("library"),
            backends.benchmarking(False),
        ):
            assert backends.choose(x).name == "reference"
            return decoupled_conv2d(x, weight)

    torch._dynamo.reset()
    compiled = shape_of_graph(call)
    before = backends._default, strategy._setting(), backends._benchmarks()
    assert torch.equal(compiled(x), call(x))
    assert backends.settings.backend.own() in (None, "reference")
    assert (backends._default, strategy._setting(), backends._benchmarks()) == before
    assert set(backends.settings._traced.__dict__.values()) == {None}


@pytest.mark.parametrize(("value", "name"), [(None, "auto"), ("", "auto"), ("cpu", "cpu")])
def test_empty_environment_variable_is_none(
    value: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DCCONV_BACKEND", raising=False)
    if value is not None:
        monkeypatch.setenv("DCCONV_BACKEND", value)
    assert backends._of_environment() == name


def test_unknown_name_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCCONV_BACKEND", "metal")
    monkeypatch.setattr(backends, "_default", backends._of_environment())
    message = re.escape(
        "dcconv: DCCONV_BACKEND must be one of auto, cuda, triton, cpu, reference, got 'metal'"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        backends.choose(torch.zeros(1, 3, 4, 4))
    # Inside a context the variable does not matter.
    with dcconv.use_backend("reference"):
        assert backends.choose(torch.zeros(1, 3, 4, 4)).name == "reference"
