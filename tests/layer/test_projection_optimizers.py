"""register_projection on optimisers that wrap another, and on those with steps of their own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import check_equal
from torch import Tensor, nn

import dcconv
from dcconv import DecoupledConv2d


class Accelerated(torch.optim.Optimizer):
    """As ``accelerate.optimizer.AcceleratedOptimizer``: an optimiser that was not initialised.

    It steps the wrapped one where gradients are synchronised, and has its groups and state.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.calls = 0
        self.accumulate = 1

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        self.optimizer.param_groups = groups

    def step(self, closure: Any = None) -> None:
        self.calls += 1
        if self.calls % self.accumulate == 0:
            self.optimizer.step(closure)


class Duck:
    """A wrapper that is no optimiser."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step()


def layer_and_optimizer() -> tuple[DecoupledConv2d, torch.optim.Optimizer]:
    layer = DecoupledConv2d(1, 1, 1, magnitude="sphere")
    return layer, torch.optim.SGD(layer.parameters(), lr=0.5)


def projected_steps(layer: DecoupledConv2d, step: Callable[[], object], count: int) -> list[int]:
    """Return the calls of step after which the filters were projected."""
    found = []
    for number in range(count):
        with torch.no_grad():
            layer.weight.fill_(3.0)
        layer.weight.grad = torch.full_like(layer.weight, 2.0)
        step()
        # A step gives 3 - 0.5 * 2 = 2; none, 3.
        value = layer.weight.detach().flatten()
        if float(value) not in (2.0, 3.0):
            check_equal("w", value, torch.tensor([2 / math.sqrt(4.0001)]))
            found.append(number)
    return found


@pytest.mark.parametrize(
    "wrap",
    [Accelerated, Duck, lambda inner: Duck(Accelerated(inner))],
    ids=["accelerated", "duck", "twice"],
)
def test_wrapped_optimizer_projects_after_its_steps(wrap: Callable[[Any], Any]) -> None:
    layer, inner = layer_and_optimizer()
    wrapper = wrap(inner)
    handle = dcconv.register_projection(wrapper, layer, 3)
    assert projected_steps(layer, wrapper.step, 7) == [3, 6]
    assert inner.state_dict()["param_groups"][0]["projection_steps"] == 7
    handle.remove()
    assert projected_steps(layer, wrapper.step, 7) == []
    assert "projection_steps" not in inner.param_groups[0]


def test_steps_that_a_wrapper_leaves_out_are_not_counted() -> None:
    layer, inner = layer_and_optimizer()
    wrapper = Accelerated(inner)
    wrapper.accumulate = 2
    dcconv.register_projection(wrapper, layer, 3)
    assert projected_steps(layer, wrapper.step, 14) == [7, 13]


def test_projections_of_wrapper_and_wrapped_have_a_count_each() -> None:
    layer, inner = layer_and_optimizer()
    dcconv.register_projection(inner, layer, 3)
    dcconv.register_projection(Accelerated(inner), layer, 5)
    assert projected_steps(layer, inner.step, 11) == [3, 5, 6, 9, 10]
    assert inner.param_groups[0]["projection_steps_1"] == 11


def test_projection_registered_before_wrapping_goes_on() -> None:
    layer, inner = layer_and_optimizer()
    dcconv.register_projection(inner, layer, 3)
    assert projected_steps(layer, Accelerated(inner).step, 7) == [3, 6]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_optimizer_prepared_by_accelerate(accumulate: int) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    layer, inner = layer_and_optimizer()
    model, wrapper = accelerator.prepare(layer, inner)
    dcconv.register_projection(wrapper, model, 3)

    def step() -> None:
        with accelerator.accumulate(model):
            wrapper.step()

    want = {1: [3, 6, 9, 12], 2: [7, 13]}[accumulate]
    assert projected_steps(layer, step, 14) == want


class Masters:
    """A wrapper whose optimiser trains copies, which it writes over the parameters."""

    def __init__(self, layer: DecoupledConv2d) -> None:
        self.masters = [p.detach().clone().double() for p in layer.parameters()]
        self.optimizer = torch.optim.SGD(self.masters, lr=0.5)


def cycle() -> Duck:
    wrapper = Duck(None)
    wrapper.optimizer = wrapper
    return wrapper


UNKNOWN = "be a torch.optim.Optimizer that was initialised, or wrap one as its attribute optimizer"


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda layer: None, TypeError, f"{UNKNOWN}, got NoneType"),
        (lambda layer: Duck(3), TypeError, f"{UNKNOWN}, got Duck"),
        (lambda layer: cycle(), TypeError, f"{UNKNOWN}, got Duck"),
        (
            lambda layer: Accelerated.__new__(Accelerated),
            TypeError,
            f"{UNKNOWN}, got Accelerated",
        ),
        (Masters, ValueError, "wrap an optimiser of the model's own parameters, got Masters"),
    ],
    ids=["none", "duck", "cycle", "bare", "masters"],
)
def test_optimizers_that_call_no_hooks_are_refused(
    make: Callable[[DecoupledConv2d], Any], kind: type[Exception], message: str
) -> None:
    layer = layer_and_optimizer()[0]
    with pytest.raises(kind, match=f"^dcconv: optimizer must {message}$"):
        dcconv.register_projection(make(layer), layer)


def test_step_with_a_closure_counts_once() -> None:
    layer = DecoupledConv2d(2, 3, 3, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=4)
    dcconv.register_projection(optimizer, layer, 3)
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (layer.weight - 1.0).square().square().sum()
        loss.backward()
        calls.append(float(loss.detach()))
        return loss

    projected = []
    for number in range(7):
        optimizer.step(closure)
        norms = layer.weight.detach().flatten(1).norm(dim=1)
        if bool((norms <= 1.0).all()):
            projected.append(number)
    # Towards filters of ones, whose norm is sqrt(18).
    assert projected == [3, 6]
    assert len(calls) > 14


def test_scheduler_keeps_the_hooks_and_a_copy_the_count() -> None:
    layer, optimizer = layer_and_optimizer()
    torch.optim.lr_scheduler.StepLR(optimizer, 100)
    dcconv.register_projection(optimizer, layer, 3)
    assert projected_steps(layer, optimizer.step, 7) == [3, 6]
    # A copy has no hooks, and the count so far, which is 7.
    model, twin = copy.deepcopy((nn.Sequential(layer), optimizer))
    assert projected_steps(model[0], twin.step, 7) == []
    dcconv.register_projection(twin, model, 2)
    assert projected_steps(model[0], twin.step, 5) == [1, 3]
