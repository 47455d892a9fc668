"""Derivatives where functions have kinks and bounds: the slope is chosen here, not by PyTorch.

PyTorch gives clamp, minimum and their kin a slope of 1, 0.5 or 0 at a tie, which depends on the
version and on whether the bound is a number or a tensor.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import check_equal
from torch import Tensor

import dcconv
from dcconv import functional
from dcconv.operator import reference
from dcconv.operator.functions import capped_asin
from dcconv.operator.numerics import ANGLE_DELTA, EPS, RHO_FLOOR

MODES = ("zeros", "reflect", "replicate", "circular")
WIDE = (torch.float64, torch.float32)


def grad(y: Tensor, x: Tensor, **options: bool) -> Tensor:
    """Return the gradient of the sum of y."""
    (found,) = torch.autograd.grad(y.sum(), x, **options)
    return found


def hessian(y: Tensor, x: Tensor) -> Tensor:
    """Return the second derivatives of the sum of y, [elements of x, elements of x]."""
    first = grad(y, x, create_graph=True).flatten()
    return torch.stack([grad(one, x, retain_graph=True).flatten() for one in first])


@pytest.mark.parametrize("eps", [EPS, 1e-8])
@pytest.mark.parametrize("mode", MODES)
def test_hessian_of_the_patch_norm_at_a_zero_patch(
    backend: str, device: str, mode: str, eps: float
) -> None:
    """b = sqrt(||x||^2 + eps) has the identity over sqrt(eps) there, once for every window."""
    x = torch.zeros(1, 2, 3, 3, dtype=torch.float64, device=device, requires_grad=True)
    for padding in (0, 1):
        pad_mode = "constant" if mode == "zeros" else mode
        windows = F.unfold(F.pad(x, (padding,) * 4, mode=pad_mode), 3)
        shown = grad(windows, x).flatten()  # how often the windows show a pixel
        for norm in (functional.patch_norm, reference.patch_norm):
            b = norm(x, 3, padding=padding, padding_mode=mode, eps=eps)
            check_equal(f"padding {padding}", hessian(b, x), torch.diag(shown / math.sqrt(eps)))


@pytest.mark.parametrize("magnitude", ["tanh", "ball", "segmented", "mix"])
def test_second_derivatives_of_a_half_empty_image(
    backend: str, device: str, magnitude: str
) -> None:
    """The Hessian times a vector against central differences of the gradient, with zero patches."""
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64, device=device)
    x[:, :, :, 4:] = 0.0
    direction = torch.randn_like(x)
    layer = dcconv.DecoupledConv2d(
        3, 4, 3, padding=1, magnitude=magnitude, dtype=torch.float64, device=device
    )

    def gradient(x: Tensor, **options: bool) -> Tensor:
        # Not odd in y, so that second derivatives do not cancel where y is 0.
        y = layer(x)
        return grad(y.square() + y, x, **options)

    leaf = x.clone().requires_grad_()
    product = grad(gradient(leaf, create_graph=True) * direction, leaf)
    # A step of 1e-6 beside sqrt(eps) = 1e-2 leaves (step / 1e-2)^2 = 1e-8 of the norms' curvature,
    # and rounding 1e-16 / step.
    step = 1e-6 * direction
    ends = [gradient((x + sign * step).requires_grad_()) for sign in (1.0, -1.0)]
    differences = (ends[0] - ends[1]) / 2e-6
    assert float((product - differences).abs().max() / differences.abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_window_sums_below_zero_count_as_zero_and_have_the_slope_of_sums(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """A library's algorithm may round a sum of squares below zero."""
    original = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args, **kw: original(*args, **kw) - 1e-3)
    x = torch.zeros(1, 1, 1, 1, dtype=dtype, requires_grad=True)
    b = reference.patch_norm(x, 1)
    check_equal("norm", b.detach(), torch.full_like(b, math.sqrt(EPS)).detach())
    check_equal("hessian", hessian(b, x), torch.full((1, 1), EPS**-0.5, dtype=dtype))
    for value in (math.inf, math.nan):
        b = reference.patch_norm(torch.full_like(x, value), 1)
        assert torch.equal(b.isnan(), torch.full_like(b, value).isnan())
        assert torch.equal(b.isinf(), torch.full_like(b, value).isinf())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_the_radius_on_its_floor_has_its_slope(
    backend: str, device: str, dtype: torch.dtype, layout: str
) -> None:
    """Segmented, outside: dy/drho = (alpha - beta) g; on the floor as above it, none below."""
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.randn(2, 3, 5, 5, dtype=dtype, device=device).to(memory_format=memory_format)
    weight = torch.randn(3, 3, 3, 3, dtype=dtype, device=device)
    weight = weight.to(memory_format=memory_format)
    floor = torch.tensor(RHO_FLOOR, dtype=dtype, device=device)
    below = torch.tensor([0.5, 0.75, 0.0], dtype=dtype, device=device)

    def gradients(factors: Tensor, mean: Tensor | None, call: Any) -> tuple[Tensor, ...]:
        radius = (factors * floor if mean is None else factors).detach().requires_grad_()
        leaves = [radius]
        if mean is not None:
            mean = mean.detach().requires_grad_()
            leaves.append(mean)
        y = call(x, weight, magnitude="segmented", radius=radius, norm_mean=mean)
        # Terms of one sign: sums that do not cancel.
        return torch.autograd.grad(y, leaves, y.detach().sign())

    for call in (functional.decoupled_conv2d, reference.decoupled_conv2d):
        on = torch.ones(3, dtype=dtype, device=device)
        for mean in (None, floor):
            wanted = gradients(2 * on, mean, call)
            for got, want in zip(gradients(on, mean, call), wanted, strict=True):
                scale = 2.0 if got.dim() == 0 else 1.0  # of the mean: times the radius
                check_equal("on the floor", got * scale, want)
                assert bool((want != 0).all())
            for got in gradients(below, mean, call):
                assert not got.any()
        mixed = torch.stack((below[0], on[1], 2 * on[2]))
        (want,) = gradients(2 * on, None, call)
        (got,) = gradients(mixed, None, call)
        check_equal("mixed", got, want * torch.tensor([0, 1, 1], device=device))


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_second_derivative_of_asin_on_the_bound_of_its_cap(dtype: torch.dtype, sign: float) -> None:
    """From the bound on the angle counts as a line."""
    delta = ANGLE_DELTA[dtype]
    bound = torch.tensor(sign * (1.0 - delta) ** 0.5, dtype=dtype)
    if float(bound.abs()) < (1.0 - delta) ** 0.5:
        bound = bound.nextafter(2 * bound)
    c = torch.stack((bound, 0 * bound + sign)).requires_grad_()
    first = grad(capped_asin(c, delta), c, create_graph=True)
    check_equal("slope", first.detach(), torch.full_like(c, delta**-0.5).detach())
    assert not grad(first, c).any()


def test_a_layer_with_the_smallest_curvature_learns_it(backend: str, device: str) -> None:
    """k = |raw| + 0.05 at raw = 0, where abs has no slope: the one to larger k is taken."""
    layer = dcconv.DecoupledConv2d(3, 4, 3, angular="sigmoid", k=0.05, learn_k=True).to(device)
    assert layer.k_raw is not None and not layer.k_raw.any()
    x = torch.randn(2, 3, 6, 6, device=device)
    k = torch.full((4,), 0.05, device=device, requires_grad=True)
    y = functional.decoupled_conv2d(
        x, layer.weight, radius=layer.radius, norm_mean="batch", k=k, angular="sigmoid"
    )
    check_equal("k", grad(layer(x), layer.k_raw), grad(y, k))
