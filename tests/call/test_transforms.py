"""Training mode inside torch.func: the switch, its values, and the error without it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import check_equal
from torch import Tensor, nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

import dcconv

Parameters = dict[str, Tensor]

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"magnitude": "ball", "angular": "sigmoid", "learn_k": True, "bias": True, "stride": 2},
    {"weighting": "separate", "angular": "square_cosine", "norm_mean_grad": False},
)


def network(options: dict[str, Any]) -> nn.Module:
    layers = (dcconv.DecoupledConv2d(i, o, 3, **options) for i, o in ((3, 4), (4, 2)))
    return nn.Sequential(*layers).double().train()


def parameters_of(module: nn.Module) -> Parameters:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def buffers_of(module: nn.Module) -> Parameters:
    return {name: b.clone() for name, b in module.named_buffers()}


def loss_of(module: nn.Module) -> Callable[[Parameters, Tensor], Tensor]:
    def loss(parameters: Parameters, x: Tensor) -> Tensor:
        y: Tensor = functional_call(module, parameters, x)
        return y.square().sum()

    return loss


def same_buffers(module: nn.Module, before: Parameters) -> bool:
    return all(torch.equal(b, before[name]) for name, b in module.named_buffers())


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_gradients_per_sample(options: dict[str, Any]) -> None:
    """Those of one call per image; the averages stay."""
    module = network(options)
    before = buffers_of(module)
    x = torch.randn(3, 3, 9, 9, dtype=torch.float64)
    with dcconv.norm_updates(False):
        each = vmap(grad(loss_of(module)), (None, 0))(parameters_of(module), x)
    assert same_buffers(module, before)
    for i, image in enumerate(x):
        alone = copy.deepcopy(module)
        alone(image).square().sum().backward()
        for name, parameter in alone.named_parameters():
            assert parameter.grad is not None
            check_equal(name, each[name][i], parameter.grad)


def test_jacobian_and_hessian() -> None:
    """Those of autograd."""
    module = dcconv.DecoupledConv2d(2, 2, 2).double().train()
    before = buffers_of(module)
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64)

    def by_func(t: Tensor) -> Tensor:
        y: Tensor = module(t)
        return y

    with dcconv.norm_updates(False):
        first, second = jacrev(by_func)(x), hessian(lambda t: by_func(t).square().sum())(x)
    assert same_buffers(module, before)
    want: Any = torch.autograd.functional.jacobian(copy.deepcopy(module), x)
    check_equal("jacobian", first, want)
    other = copy.deepcopy(module)
    want = torch.autograd.functional.hessian(lambda t: other(t).square().sum(), x)
    check_equal("hessian", second, want)


def transforms(module: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    loss, parameters = loss_of(module), parameters_of(module)
    tangents = {name: torch.ones_like(p) for name, p in parameters.items()}
    return {
        "grad": lambda: grad(loss)(parameters, x),
        "vmap": lambda: vmap(module)(x),
        "vmap of grad": lambda: vmap(grad(loss), (None, 0))(parameters, x),
        "vjp": lambda: vjp(lambda p: loss(p, x), parameters),
        "jvp": lambda: jvp(lambda p: loss(p, x), (parameters,), (tangents,)),
        "jacrev": lambda: jacrev(loss)(parameters, x),
        "hessian": lambda: hessian(lambda t: loss(parameters, t))(x[:1]),
    }


NAMES = ("grad", "vmap", "vmap of grad", "vjp", "jvp", "jacrev", "hessian")


@pytest.mark.parametrize("name", NAMES)
def test_every_transform_runs_with_the_switch(name: str) -> None:
    module, x = network({}), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    before = buffers_of(module)
    with dcconv.norm_updates(False):
        transforms(module, x)[name]()
    assert same_buffers(module, before)
    transforms(module.eval(), x)[name]()


@pytest.mark.parametrize("name", NAMES)
def test_without_the_switch_the_error_names_it(name: str) -> None:
    module, x = network({}), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    before = buffers_of(module)
    message = (
        r"^dcconv: norm_mean must be updated outside of torch\.func's transforms: put the call "
        r"into dcconv\.norm_updates\(False\), or the layer into evaluation mode, got a layer in "
        r"training mode inside one$"
    )
    with pytest.raises(NotImplementedError, match=message):
        transforms(module, x)[name]()
    assert same_buffers(module, before)


def test_ensembles_update_their_own_averages() -> None:
    """Buffers that are mapped over can be written to: no switch is needed."""
    modules = [network({}) for _ in range(3)]
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    parameters, buffers = stack_module_state(modules)  # type: ignore[arg-type]

    def call(p: Parameters, b: Parameters) -> Tensor:
        y: Tensor = functional_call(modules[0], (p, b), x)
        return y

    y = vmap(call)(parameters, buffers)
    for i, module in enumerate(modules):
        check_equal("y", y[i], module(x))
        for name, buffer in module.named_buffers():
            check_equal(name, buffers[name][i].double(), buffer.double())


def test_switch_in_eager_training(backend: str, device: str) -> None:
    """Everything but the update: the batch's own mean, and its gradient."""
    layer = dcconv.DecoupledConv2d(3, 4, 3).to(device).train()
    other = copy.deepcopy(layer)
    before = buffers_of(layer)
    x = torch.randn(2, 3, 6, 6, device=device)
    with dcconv.norm_updates(False):
        y = layer(x)
        assert same_buffers(layer, before)
        with dcconv.norm_updates(True):
            layer(x)
        assert not same_buffers(layer, before)
    want = other(x)
    assert torch.equal(y, want)
    grads = (
        torch.autograd.grad(t.sum(), list(m.parameters())) for t, m in ((y, layer), (want, other))
    )
    for one, two in zip(*grads, strict=True):
        assert torch.equal(one, two)
    assert int(layer.norm_mean_steps) == int(other.norm_mean_steps) == 1


@pytest.mark.parametrize("value", [0, None, "no"])
def test_switch_takes_a_bool(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^dcconv: enabled must be a bool, got "):
        dcconv.norm_updates(value)


def test_compiled_code_follows_the_switch() -> None:
    torch._dynamo.reset()
    layer = dcconv.DecoupledConv2d(3, 4, 3).train()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(2, 3, 6, 6)
    for enabled, steps in ((True, 1), (False, 1), (True, 2)):
        with dcconv.norm_updates(enabled):
            compiled(x)
        assert int(layer.norm_mean_steps) == steps
