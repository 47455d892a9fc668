"""Projection, penalty and weighted gradients of weights that are computed, shared or replaced."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import check_equal
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

import dcconv
from dcconv import DecoupledConv2d
from dcconv.operator.reference import filter_norm

SCALE = 100.0

X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def layer(**options: Any) -> DecoupledConv2d:
    torch.manual_seed(0)
    return DecoupledConv2d(3, 4, 3, dtype=torch.float64, **options)


def pruned(conv: nn.Module) -> nn.Module:
    prune.l1_unstructured(conv, "weight", 0.5)
    return conv


def pruned_twice(conv: nn.Module) -> nn.Module:
    return pruned(pruned(conv))


COMPUTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old_weight_norm": lambda conv: weight_norm(conv),
    "old_spectral_norm": lambda conv: spectral_norm(conv),
    "pruned": pruned,
    "pruned_twice": pruned_twice,
}

# PyTorch names its successor whenever the older function is called.
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")


def computed(kind: str) -> DecoupledConv2d:
    result = COMPUTED[kind](layer())
    assert isinstance(result, DecoupledConv2d)
    # Spectral norm takes no step then, so that the weight is the same whenever it is computed.
    return result.eval()


def gradients(module: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters()), allow_unused=True))


def state_of(module: nn.Module) -> list[Tensor]:
    return [value.clone() for value in module.state_dict().values()]


@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weight_is_not_projected(kind: str) -> None:
    conv = computed(kind)
    network = nn.Sequential(layer(), conv)
    before = state_of(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for call in (
        lambda: dcconv.project_weights(network),
        lambda: dcconv.register_projection(optimizer, network),
    ):
        message = (
            f"dcconv: layer '1' must own its weight: remove weight norm, .*{type(conv).__name__}"
        )
        with pytest.raises(ValueError, match=f"^{message}$"):
            call()
    with pytest.raises(ValueError, match=r"^dcconv: model must own its weight"):
        dcconv.project_weights(conv)
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(network), strict=True))
    assert "projection_steps" not in optimizer.param_groups[0]


def current_weight(kind: str, conv: DecoupledConv2d) -> Tensor:
    """Return the weight that the next forward takes."""
    if "old" in kind or "pruned" in kind:
        for hook in conv._forward_pre_hooks.values():
            hook(conv, (X,))
    return conv.weight


@pytest.mark.parametrize("kind", COMPUTED)
def test_gradient_of_a_computed_weight_is_weighed_once(kind: str) -> None:
    """The gradient of the filters is weighed, and goes on to what they are computed from."""
    conv = computed(kind)
    y = conv(X)
    cotangent = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    # The sum of <w, weighed gradient> has the parameters' gradients that are wanted.
    weight = current_weight(kind, conv)
    plain = DecoupledConv2d(3, 4, 3, dtype=torch.float64).eval()
    plain.load_state_dict({"weight": weight.detach()})
    plain.norm_mean.copy_(conv.norm_mean)
    (inner,) = torch.autograd.grad((plain(X) * cotangent).sum(), plain.weight)
    factors = SCALE * filter_norm(weight.detach(), conv.eps).reshape(-1, 1, 1, 1)
    wanted = gradients(conv, (weight * (inner * factors)).sum())
    dcconv.register_weighted_gradients(conv, SCALE)
    found = gradients(conv, (conv(X) * cotangent).sum())
    names = [name for name, _ in conv.named_parameters()]
    seen = 0
    for name, got, want in zip(names, found, wanted, strict=True):
        if want is not None:
            check_equal(name, got, want)
            seen += 1
    assert seen >= 1


@pytest.mark.parametrize("kind", COMPUTED)
def test_penalty_of_a_computed_weight_is_that_of_the_next_forward(kind: str) -> None:
    conv = computed(kind)
    with torch.no_grad():
        # Leaves the attribute of the older hooks without a graph, and then too old.
        conv(X)
        for parameter in conv.parameters():
            parameter.mul_(1.5).add_(0.01)
    plain = layer()
    got = dcconv.orthogonality_penalty(conv, 0.3)
    found = gradients(conv, got)
    weight = current_weight(kind, conv)
    with torch.no_grad():
        plain.weight.copy_(weight)
    want = dcconv.orthogonality_penalty(plain, 0.3)
    check_equal("penalty", got.detach(), want.detach())
    (inner,) = torch.autograd.grad(want, plain.weight)
    wanted = gradients(conv, (weight * inner).sum())
    seen = 0
    for a, b in zip(found, wanted, strict=True):
        if b is not None:
            check_equal("gradient", a, b)
            seen += 1
    assert seen >= 1


def weighted(conv: DecoupledConv2d, plain: Tensor) -> Tensor:
    return plain * SCALE * filter_norm(conv.weight.detach(), conv.eps).reshape(-1, 1, 1, 1)


def fresh(**options: Any) -> tuple[DecoupledConv2d, Tensor]:
    """Return a layer with weighted gradients and the gradient that its weight should get."""
    conv = layer(**options).eval()
    (plain,) = torch.autograd.grad(conv(X).square().sum(), conv.weight)
    dcconv.register_weighted_gradients(conv, SCALE)
    return conv, weighted(conv, plain)


def test_accumulated_gradients_are_weighed_once() -> None:
    conv, want = fresh()
    for count in range(1, 4):
        conv(X).square().sum().backward()
        check_equal(f"{count} passes", conv.weight.grad, count * want)


def test_retained_graph_is_weighed_once_per_pass() -> None:
    conv, want = fresh()
    loss = conv(X).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    check_equal("weight", conv.weight.grad, 2 * want)


def test_layer_used_twice_is_weighed_once_per_use() -> None:
    conv, want = fresh()
    (conv(X).square().sum() + conv(X).square().sum()).backward()
    check_equal("weight", conv.weight.grad, 2 * want)


def test_shared_weight_is_weighed_by_each_layer_for_its_own_part() -> None:
    first, second = layer(eps=1e-2).eval(), layer(magnitude="sphere", eps=0.5).eval()
    second.weight = first.weight
    network = nn.ModuleList([first, second])
    want = torch.zeros_like(first.weight)
    for conv in (first, second):
        (plain,) = torch.autograd.grad(conv(X).square().sum(), conv.weight)
        want += weighted(conv, plain)
    dcconv.register_weighted_gradients(network, SCALE)
    (first(X).square().sum() + second(X).square().sum()).backward()
    check_equal("weight", first.weight.grad, want)


def test_shared_weight_is_projected_once() -> None:
    first, second = layer(eps=1e-2), layer(eps=0.5)
    second.weight = first.weight
    a = filter_norm(first.weight.detach(), 1e-2).reshape(-1, 1, 1, 1)
    want = first.weight.detach() / a
    dcconv.project_weights(nn.ModuleList([first, second]))
    check_equal("weight", first.weight.detach(), want)


def test_recomputed_layer_is_weighed_once() -> None:
    conv, want = fresh()
    checkpoint(conv, X.clone().requires_grad_(), use_reentrant=False).square().sum().backward()
    check_equal("weight", conv.weight.grad, want)


def new_parameter(conv: DecoupledConv2d) -> None:
    conv.weight = nn.Parameter(conv.weight.detach().clone())


def assigned_state(conv: DecoupledConv2d) -> None:
    conv.load_state_dict(copy.deepcopy(conv.state_dict()), assign=True)


def unfrozen(conv: DecoupledConv2d) -> None:
    conv.weight.requires_grad_(True)


@pytest.mark.parametrize("replace", [new_parameter, assigned_state, unfrozen])
def test_parameters_that_come_later_are_weighed(replace: Callable[[DecoupledConv2d], None]) -> None:
    want = fresh()[1]
    other = layer().eval()
    other.weight.requires_grad_(replace is not unfrozen)
    remove = dcconv.register_weighted_gradients(other, SCALE)
    replace(other)
    other(X).square().sum().backward()
    check_equal("weight", other.weight.grad, want)
    remove()
    other.weight.grad = None
    other(X).square().sum().backward()
    check_equal("weight", weighted(other, other.weight.grad), want)


def test_copies_and_functional_calls_are_weighed() -> None:
    conv, want = fresh()
    twin = copy.deepcopy(conv)
    twin(X).square().sum().backward()
    check_equal("copy", twin.weight.grad, want)
    weight = conv.weight.detach().clone().requires_grad_()
    functional_call(conv, {"weight": weight}, (X,)).square().sum().backward()
    check_equal("functional_call", weight.grad, want)


def test_function_transforms_weigh() -> None:
    conv, _ = fresh(radius_unit="absolute")

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        result: Tensor = functional_call(conv, {"weight": weight}, (x,))
        return result.square().sum()

    def by_hand(x: Tensor) -> Tensor:
        weight = conv.weight.detach().clone().requires_grad_()
        (result,) = torch.autograd.grad(loss(weight, x), weight)
        return result

    got = vmap(grad(loss), (None, 0))(conv.weight.detach(), X.unsqueeze(1))
    check_equal("vmap", got, torch.stack([by_hand(x) for x in X.unsqueeze(1)]))


def test_second_derivative_is_that_of_the_weighed_gradient() -> None:
    """The norms count as constants, as in a step of training."""
    conv = layer(magnitude="sphere").eval()
    (plain,) = torch.autograd.grad(conv(X).square().sum(), conv.weight, create_graph=True)
    direction = torch.randn(plain.shape, dtype=plain.dtype)
    a = filter_norm(conv.weight.detach(), conv.eps).reshape(-1, 1, 1, 1)
    (inner,) = torch.autograd.grad((plain * direction * (SCALE * a)).sum(), conv.weight)
    dcconv.register_weighted_gradients(conv, SCALE)
    (got,) = torch.autograd.grad(conv(X).square().sum(), conv.weight, create_graph=True)
    (second,) = torch.autograd.grad((got * direction).sum(), conv.weight)
    # The backward of the weighed gradient reaches the weight through it once more.
    check_equal("second", second, inner * (SCALE * a))


def test_compiled_network_is_weighed() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    network = nn.Sequential(
        DecoupledConv2d(3, 4, 3, dtype=torch.float64),
        DecoupledConv2d(4, 2, 3, dtype=torch.float64, magnitude="sphere", eps=1e-2),
    ).eval()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    compiled(X).square().sum().backward()
    network.zero_grad()
    # After the first call: compiled code has to notice.
    remove = dcconv.register_weighted_gradients(network, SCALE)
    want = gradients(network, network(X).square().sum())
    compiled(X).square().sum().backward()
    for (name, parameter), gradient in zip(network.named_parameters(), want, strict=True):
        check_equal(name, parameter.grad, gradient)
    network.zero_grad()
    remove()
    compiled(X).square().sum().backward()
    check_equal("weight", weighted(network[0], network[0].weight.grad), want[0])


def test_registrations_multiply_and_end_one_by_one() -> None:
    conv, want = fresh()
    remove = dcconv.register_weighted_gradients(conv, 0.5)
    conv(X).square().sum().backward()
    a = filter_norm(conv.weight.detach(), conv.eps).reshape(-1, 1, 1, 1)
    check_equal("both", conv.weight.grad, want * 0.5 * a)
    remove()
    remove()
    conv.weight.grad = None
    conv(X).square().sum().backward()
    check_equal("one", conv.weight.grad, want)


def test_penalty_is_weighed_like_the_output() -> None:
    conv = layer()
    (plain,) = torch.autograd.grad(dcconv.orthogonality_penalty(conv, 0.3), conv.weight)
    dcconv.register_weighted_gradients(conv, SCALE)
    (got,) = torch.autograd.grad(dcconv.orthogonality_penalty(conv, 0.3), conv.weight)
    check_equal("weight", got, weighted(conv, plain))


def test_message_names_a_layer_whose_weight_is_a_part() -> None:
    """As other libraries leave it that keep a part of every parameter on each process."""
    network = nn.Sequential(layer(), layer())
    network[1].weight = nn.Parameter(torch.zeros(0, dtype=torch.float64))
    for function in (dcconv.project_weights, dcconv.orthogonality_penalty):
        with pytest.raises(ValueError, match=re.escape("dcconv: layer '1' must have its whole")):
            function(network)
