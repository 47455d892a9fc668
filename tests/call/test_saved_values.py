"""Backward has the values of its forward: statistics, states and frozen parts may change before it.

What does not: weight and x, as with ``nn.Conv2d``, whose backward then raises PyTorch's error.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import check_equal
from torch import Tensor, nn

import dcconv
from dcconv.functional import decoupled_conv2d

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"magnitude": "ball", "angular": "sigmoid", "learn_k": True, "bias": True},
    {"magnitude": "segmented", "learn_radius": False},
    {"weighting": "separate", "radius_unit": "absolute", "keep": "dot"},
)


def layer_of(options: dict[str, Any], device: str) -> dcconv.DecoupledConv2d:
    return dcconv.DecoupledConv2d(4, 6, 3, padding=1, **options).to(device)


def gradients(y: Tensor, layer: nn.Module, x: Tensor) -> list[Tensor]:
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return list(torch.autograd.grad(y, wanted, torch.ones_like(y)))


def train_step(layer: nn.Module, x: Tensor) -> None:
    layer.train()
    layer(x)


def load_other(layer: nn.Module, x: Tensor) -> None:
    """Load a state into everything but the weight."""
    state = {name: t + 1 for name, t in layer.state_dict().items() if name != "weight"}
    layer.load_state_dict(state, strict=False)


def step_others(layer: nn.Module, x: Tensor) -> None:
    """As an optimiser of everything but the weight would."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name != "weight":
                parameter.mul_(1.5)


CHANGES: tuple[Callable[[nn.Module, Tensor], None], ...] = (train_step, load_other, step_others)


@pytest.mark.parametrize("frozen", [False, True], ids=["learned", "frozen"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_changes_between_forward_and_backward(
    backend: str, device: str, options: dict[str, Any], training: bool, change: Any, frozen: bool
) -> None:
    layer = layer_of(options, device).train(training)
    if frozen:
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name == "weight")
    x = torch.randn(2, 4, 6, 5, device=device, requires_grad=True)
    same = copy.deepcopy(layer)
    want = gradients(same(x), same, x)
    y = layer(x)
    change(layer, x.detach())
    for one, two in zip(gradients(y, layer, x), want, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("order", [(False, True), (True, False)], ids=["eval-train", "train-eval"])
def test_one_backward_through_evaluation_and_training(
    backend: str, device: str, order: tuple[bool, bool]
) -> None:
    """The sum of the two gradients, each taken alone."""
    network = nn.Sequential(
        dcconv.DecoupledConv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        dcconv.DecoupledConv2d(4, 4, 3, magnitude="ball"),
    ).to(device)
    x = torch.randn(2, 4, 6, 5, device=device)
    other = copy.deepcopy(network)
    total = sum(network.train(mode)(x).square().sum() for mode in order)
    got = torch.autograd.grad(total, list(network.parameters()))
    alone = [
        torch.autograd.grad(other.train(mode)(x).square().sum(), list(other.parameters()))
        for mode in order
    ]
    for one, first, second in zip(got, *alone, strict=True):
        check_equal("sum", one, first + second)


def test_statistics_given_to_the_functional(backend: str, device: str) -> None:
    x = torch.randn(2, 3, 6, 5, device=device)
    weight = torch.randn(4, 3, 3, 3, device=device, requires_grad=True)
    values = {"radius": 1.5, "norm_mean": 2.0, "k": 0.7}
    given = {name: torch.tensor(value, device=device) for name, value in values.items()}
    y = decoupled_conv2d(x, weight, angular="sigmoid", **given)
    same = {name: t.clone() for name, t in given.items()}
    want = decoupled_conv2d(x, weight, angular="sigmoid", **same)
    for t in given.values():
        t.mul_(3)
    got, expected = (
        torch.autograd.grad(result, [weight], torch.ones_like(result))[0] for result in (y, want)
    )
    assert torch.equal(got, expected)


def test_second_derivative_has_them_too(backend: str, device: str) -> None:
    layer = layer_of({}, device).eval()
    x = torch.randn(1, 4, 5, 5, device=device, requires_grad=True)
    found = []
    for module, changes in ((copy.deepcopy(layer), False), (layer, True)):
        y = module(x)
        (first,) = torch.autograd.grad(y.square().sum(), [x], create_graph=True)
        if changes:
            train_step(module, x.detach())
        found.append(torch.autograd.grad(first.square().sum(), [x])[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_code_keeps_them(compiler: str) -> None:
    torch._dynamo.reset()
    layer = layer_of({}, "cpu").eval()
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    x = torch.randn(2, 4, 6, 5)
    want = torch.autograd.grad(layer(x).sum(), [layer.weight])[0]
    y = compiled(x)
    train_step(layer, x)
    got = torch.autograd.grad(y.sum(), [layer.weight])[0]
    check_equal("weight", got, want)


@pytest.mark.backend("cpu")
def test_nothing_is_copied_without_gradients() -> None:
    """Inference has no operation more."""
    layer = layer_of({"learn_radius": False}, "cpu").eval()
    x = torch.randn(1, 4, 5, 5)
    with torch.no_grad(), torch.profiler.profile() as profile:
        layer(x)
    names = {event.name for event in profile.events()}
    assert not names & {"aten::clone", "aten::_to_copy"}


def test_weight_that_changes_raises_as_that_of_a_plain_layer(backend: str, device: str) -> None:
    for layer in (nn.Conv2d(4, 6, 3).to(device), dcconv.DecoupledConv2d(4, 6, 3).to(device)):
        x = torch.randn(1, 4, 5, 5, device=device, requires_grad=True)
        y = layer(x)
        with torch.no_grad():
            layer.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
