"""Projection, orthogonality penalty and weighted gradients against hand computation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import check, check_equal, check_printed
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call

import dcconv
from dcconv import DecoupledConv2d
from dcconv.operator.numerics import ACCURACY_FLOOR
from dcconv.optim import decoupled_layers


def norms_by_hand(weight: Tensor, eps: float) -> Tensor:
    rows = [math.sqrt(math.fsum(v * v for v in w.flatten().tolist()) + eps) for w in weight]
    return torch.tensor(rows, dtype=torch.float64)


def column(norms: Tensor) -> Tensor:
    return norms.reshape(-1, 1, 1, 1)


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(
        DecoupledConv2d(4, 6, 3, groups=2, eps=1e-2, dtype=dtype),
        nn.Conv2d(6, 6, 1, dtype=dtype),
        nn.Sequential(DecoupledConv2d(6, 5, (1, 2), bias=True, dtype=dtype)),
    )


def test_decoupled_layers_are_found_once() -> None:
    model = network()
    model.append(model[0])
    assert list(decoupled_layers(model)) == [model[0], model[2][0]]
    assert list(decoupled_layers(model[0])) == [model[0]]


def test_projection_divides_every_decoupled_filter_by_its_norm() -> None:
    model = network()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    dcconv.project_weights(model)
    for name, after in model.state_dict().items():
        if name in ("0.weight", "2.0.weight"):
            a = norms_by_hand(before[name], 1e-2 if name == "0.weight" else 1e-4)
            check_equal(name, after, before[name] / column(a))
        else:
            assert torch.equal(after, before[name]), name


def test_repeated_projection_tends_to_its_fixed_point() -> None:
    layer = DecoupledConv2d(3, 4, 3, dtype=torch.float64)
    for _ in range(6):
        dcconv.project_weights(layer)
    want = torch.full((4,), math.sqrt(1 - 1e-4), dtype=torch.float64)
    got = layer.weight.detach().flatten(1).norm(dim=1)
    # Each projection divides the distance to the fixed point by about 1 / eps.
    check_equal("norm", got, want)


def test_projection_of_a_zero_filter_is_zero() -> None:
    layer = DecoupledConv2d(3, 2, 3)
    nn.init.zeros_(layer.weight)
    dcconv.project_weights(layer)
    assert int(layer.weight.count_nonzero()) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_projection_of_half_filters_uses_float32_norms(dtype: torch.dtype) -> None:
    layer = DecoupledConv2d(64, 2, 3, dtype=dtype)
    with torch.no_grad():
        # The squares overflow float16.
        layer.weight.fill_(300.0)
    dcconv.project_weights(layer)
    want = torch.full_like(layer.weight, 1 / math.sqrt(64 * 9), dtype=torch.float64).detach()
    check("w", layer.weight, want, want, dtype)


def test_projection_leaves_the_graph_and_the_optimiser_alone() -> None:
    layer = DecoupledConv2d(3, 4, 3)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(2, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    state = {k: v.clone() for k, v in optimizer.state[layer.weight].items()}
    weight, gradient = layer.weight, layer.weight.grad
    dcconv.project_weights(layer)
    assert layer.weight is weight and layer.weight.grad is gradient
    assert weight.requires_grad and weight.is_leaf
    assert all(torch.equal(optimizer.state[weight][k], v) for k, v in state.items())


def projectable() -> tuple[DecoupledConv2d, torch.optim.Optimizer]:
    layer = DecoupledConv2d(1, 1, 1, magnitude="sphere")
    return layer, torch.optim.SGD(layer.parameters(), lr=0.5)


def projected_iterations(
    layer: DecoupledConv2d, optimizer: torch.optim.Optimizer, iterations: range
) -> list[int]:
    """Return the iterations after whose step the filters were projected."""
    found = []
    for iteration in iterations:
        with torch.no_grad():
            layer.weight.fill_(3.0)
        layer.weight.grad = torch.full_like(layer.weight, 2.0)
        optimizer.step()
        # The step has been taken before the projection: 3 - 0.5 * 2 = 2.
        if float(layer.weight.detach()) != 2.0:
            check_equal("w", layer.weight.detach().flatten(), torch.tensor([2 / math.sqrt(4.0001)]))
            found.append(iteration)
    return found


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4, 5, 6]), (3, [3, 6]), (7, [])])
def test_projection_schedule_is_the_official_one(every: int, expected: list[int]) -> None:
    layer, optimizer = projectable()
    dcconv.register_projection(optimizer, layer, every)
    assert projected_iterations(layer, optimizer, range(7)) == expected


def test_projection_is_every_hundred_iterations_by_default() -> None:
    layer, optimizer = projectable()
    dcconv.register_projection(optimizer, layer)
    assert projected_iterations(layer, optimizer, range(301)) == [100, 200, 300]


@pytest.mark.parametrize("register_first", [True, False])
def test_projection_goes_on_counting_in_a_resumed_run(register_first: bool, tmp_path: Path) -> None:
    layer, optimizer = projectable()
    dcconv.register_projection(optimizer, layer, 3)
    assert projected_iterations(layer, optimizer, range(5)) == [3]
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    layer, optimizer = projectable()
    if register_first:
        dcconv.register_projection(optimizer, layer, 3)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    if not register_first:
        dcconv.register_projection(optimizer, layer, 3)
    assert projected_iterations(layer, optimizer, range(5, 13)) == [6, 9, 12]


def test_projection_counts_from_the_start_after_a_checkpoint_without_a_count() -> None:
    layer, optimizer = projectable()
    before = optimizer.state_dict()
    dcconv.register_projection(optimizer, layer, 3)
    projected_iterations(layer, optimizer, range(2))
    optimizer.load_state_dict(before)
    assert projected_iterations(layer, optimizer, range(4)) == [3]


def test_projections_of_one_optimiser_have_a_count_each() -> None:
    layer, optimizer = projectable()
    first = dcconv.register_projection(optimizer, layer, 3)
    second = dcconv.register_projection(optimizer, layer, 5)
    assert projected_iterations(layer, optimizer, range(11)) == [3, 5, 6, 9, 10]
    first.remove()
    assert projected_iterations(layer, optimizer, range(11, 22)) == [15, 20]
    third = dcconv.register_projection(optimizer, layer, 7)
    assert projected_iterations(layer, optimizer, range(22, 31)) == [25, 22 + 7, 30]
    names = [name for name in optimizer.param_groups[0] if name.startswith("projection")]
    assert sorted(names) == ["projection_steps", "projection_steps_1"]
    # Removed once already: the name of its count is another's now.
    first.remove()
    second.remove()
    assert projected_iterations(layer, optimizer, range(31, 46)) == [22 + 14, 22 + 21]
    third.remove()
    assert not any(name.startswith("projection") for name in optimizer.param_groups[0])


def test_removed_projection_hook_is_gone() -> None:
    layer = DecoupledConv2d(3, 4, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    handle = dcconv.register_projection(optimizer, layer, every=1)
    handle.remove()
    before = layer.weight.detach().clone()
    for _ in range(3):
        optimizer.step()
    assert torch.equal(layer.weight, before)


def penalty_by_hand(weight: Tensor, groups: int, eps: float) -> float:
    """Return half the sum of (<w_i, w_j> / (a_i a_j) - [i = j])^2 over pairs of one group."""
    rows = weight.flatten(1).tolist()
    a = norms_by_hand(weight, eps).tolist()
    size = len(rows) // groups
    terms = []
    for i in range(len(rows)):
        for j in range(i // size * size, (i // size + 1) * size):
            product = math.fsum(u * v for u, v in zip(rows[i], rows[j], strict=True))
            terms.append((product / (a[i] * a[j]) - (i == j)) ** 2)
    return 0.5 * math.fsum(terms)


def test_penalty_is_the_sum_over_layers_and_groups() -> None:
    model = network()
    first, last = model[0], model[2][0]
    want = penalty_by_hand(first.weight.detach(), 2, 1e-2)
    want += penalty_by_hand(last.weight.detach(), 1, 1e-4)
    for coefficient in (1e-5, 0.3, 0.0):
        got = dcconv.orthogonality_penalty(model, coefficient)
        assert got.shape == () and got.dtype == torch.float64
        expected = torch.tensor(coefficient * want, dtype=torch.float64)
        check_equal("penalty", got.detach(), expected)
    default = dcconv.orthogonality_penalty(model)
    check_equal("default", default.detach(), torch.tensor(1e-5 * want, dtype=torch.float64))


def test_penalty_gradient_passes_through_the_normalisation() -> None:
    layer = DecoupledConv2d(4, 6, 3, groups=2, dtype=torch.float64)

    class Penalty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self) -> Tensor:
            return dcconv.orthogonality_penalty(self, 1.0)

    penalty = Penalty()

    def call(weight: Tensor) -> Tensor:
        result: Tensor = functional_call(penalty, {"layer.weight": weight}, ())
        return result

    weight = layer.weight.detach().clone().requires_grad_()
    assert gradcheck(call, [weight])
    (gradient,) = torch.autograd.grad(call(weight), weight)
    # The penalty hardly depends on the norms: only through eps.
    radial = (gradient * weight).flatten(1).sum(dim=1).abs().max()
    assert float(radial.detach()) < 1e-3 * float(gradient.norm() * weight.detach().norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_penalty_of_half_layers_is_float32(dtype: torch.dtype) -> None:
    layer = DecoupledConv2d(8, 6, 3, dtype=dtype)
    got = dcconv.orthogonality_penalty(layer, 1.0)
    assert got.dtype == torch.float32
    want = penalty_by_hand(layer.weight.detach().double(), 1, 1e-4)
    truth = torch.tensor(want, dtype=torch.float64)
    check("penalty", got, truth, truth.float(), torch.float32)
    got.backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == dtype


def test_penalty_of_the_official_network_at_the_start() -> None:
    """The 31 decoupled layers of the official 32-layer network have 0.0057 at initialisation."""
    sizes = [(3, 96), *[(96, 96)] * 10, (96, 192), *[(192, 192)] * 9, (192, 384), *[(384, 384)] * 9]
    model = nn.Sequential(*(DecoupledConv2d(c, o, 3) for c, o in sizes))
    assert len(model) == 31
    for layer in model:
        assert isinstance(layer, DecoupledConv2d)
        nn.init.normal_(layer.weight, std=math.sqrt(2 / (9 * layer.in_channels)))
    check_printed("penalty", dcconv.orthogonality_penalty(model).detach(), "0.0057")


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found[name] = parameter.grad.clone()
    return found


@pytest.mark.parametrize("options", [{}, {"scale": 2.5}])
def test_weighted_gradients_are_multiplied_by_the_filter_norm(options: dict[str, Any]) -> None:
    model, x = network(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    plain = gradients(model, x)
    remove = dcconv.register_weighted_gradients(model, **options)
    weighted = gradients(model, x)
    scale = options.get("scale", 1.0)
    for name, gradient in weighted.items():
        want = plain[name]
        if name in ("0.weight", "2.0.weight"):
            layer = model.get_submodule(name.removesuffix(".weight"))
            assert isinstance(layer, DecoupledConv2d)
            want = want * scale * column(norms_by_hand(layer.weight.detach(), layer.eps))
        check_equal(name, gradient, want)
    remove()
    for name, gradient in gradients(model, x).items():
        check_equal(name, gradient, plain[name])


def test_weighted_gradient_is_the_gradient_on_the_unit_sphere() -> None:
    """At w and at its projection the weighted gradient is the same; the plain one is not."""
    layer = DecoupledConv2d(3, 4, 3, eps=1e-24, magnitude="sphere", dtype=torch.float64)
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([0.5, 2.0, 7.0, 0.1]).reshape(-1, 1, 1, 1))
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    plain_before = gradients(layer, x)["weight"]
    dcconv.register_weighted_gradients(layer)
    before = gradients(layer, x)["weight"]
    dcconv.project_weights(layer)
    after = gradients(layer, x)["weight"]
    check_equal("weighted", before, after)
    assert not torch.allclose(plain_before, after)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weighted_gradients_keep_the_dtype(dtype: torch.dtype) -> None:
    layer = DecoupledConv2d(3, 4, 3, dtype=dtype)
    dcconv.register_weighted_gradients(layer)
    layer(torch.randn(2, 3, 5, 5).to(dtype)).float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == dtype
    assert bool(layer.weight.grad.isfinite().all())


def test_weighted_gradients_follow_the_filters_as_they_are_trained() -> None:
    layer = DecoupledConv2d(3, 4, 3, dtype=torch.float64)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    dcconv.register_weighted_gradients(layer)
    with torch.no_grad():
        layer.weight.mul_(3.0)
    got = gradients(layer, x)["weight"]
    other = DecoupledConv2d(3, 4, 3, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    want = gradients(other, x)["weight"] * column(norms_by_hand(layer.weight.detach(), 1e-4))
    check_equal("weight", got, want)


def test_floor_of_the_norm_check_is_the_shared_one() -> None:
    layer = DecoupledConv2d(16, 8, 3)
    dcconv.project_weights(layer)
    largest = float(layer.weight.detach().double().flatten(1).norm(dim=1).max())
    assert largest <= 1.0 + ACCURACY_FLOOR[torch.float32]
