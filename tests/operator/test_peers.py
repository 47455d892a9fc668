"""Defects seen in other implementations of this operator family and its relatives, one test each.

The row number in a test's id is that of the list below; what the others do wrong is said there.

    1   a tuple of dilations raises in the constructor
    2   ``padding="same"`` raises
    3   padding modes reach the dot product, but the norm still pads with zeros
    4   unbatched input is accepted and gives wrong numbers
    5   an all-zero filter gives NaN
    6   float16 inputs near 300 overflow in the squares and the output is zero
    7   ``bias=True`` is ignored
    8   under autocast the layer returns float32
    9   half, double, tuple kernels and general groups are refused
    10  forward changes the weights, in evaluation too
    11  a squared distance is formed by subtraction and comes out negative or wildly wrong
    12  the norm map is expanded to all output channels
    13  arccos of a cosine that rounding carried past 1
    14  the filter norm is taken over the wrong axis and detached, the radius is not learned, and
        evaluation depends on the batch
    15  what the running mean of norms does in evaluation is undefined
    16  the output size ignores the dilation
    18  ``parameters()`` is overridden, CUDA is touched at construction
    19  changed defaults make published numbers irreproducible

Row 17, a kernel that always launches on GPU 0, does not apply to code without GPU kernels; its
other half, float32 only, is row 9.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import check, check_all, check_equal, evaluate, random_cotangent, truth_and_peer
from cases import Case, make_inputs
from torch import Tensor, nn

import dcconv
from dcconv import DecoupledConv2d
from dcconv.functional import decoupled_conv2d, patch_norm
from dcconv.operator.reference import filter_norm


def row(number: int) -> pytest.MarkDecorator:
    """Put a row number into a test's id."""
    return pytest.mark.parametrize("row", [number], ids=[f"row{number}"])


def as_plain_convolution(device: str, **geometry: Any) -> tuple[nn.Conv2d, DecoupledConv2d]:
    """Return the two layers that compute the same function, with the same filters."""
    plain = nn.Conv2d(4, 6, bias=False, dtype=torch.float64, device=device, **geometry)
    layer = DecoupledConv2d(
        4, 6, magnitude="linear", weighting="linear", dtype=torch.float64, device=device, **geometry
    )
    layer.load_state_dict(plain.state_dict())
    return plain, layer


def images(device: str, *size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size or (2, 4, 7, 8), dtype=torch.float64).to(dtype).to(device)


@row(1)
def test_dilation_may_be_a_pair(row: int, backend: str, device: str) -> None:
    plain, layer = as_plain_convolution(device, kernel_size=3, dilation=(1, 2))
    x = images(device)
    check_equal("y", layer(x).detach(), plain(x).detach())


@row(2)
def test_padding_may_be_same(row: int, backend: str, device: str) -> None:
    plain, layer = as_plain_convolution(device, kernel_size=(3, 5), padding="same")
    x = images(device)
    check_equal("y", layer(x).detach(), plain(x).detach())
    for stride, expected in ((2, (4, 4)), (3, (3, 3))):
        strided = DecoupledConv2d(4, 6, 3, stride, "same", device=device)
        assert strided(x.float()).shape[2:] == expected


@row(3)
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_norm_sees_the_padded_input(row: int, mode: str, backend: str, device: str) -> None:
    x = images(device)
    padded = F.pad(x, (1, 1, 1, 1), mode=mode)
    check_equal("b", patch_norm(x, 3, padding=1, padding_mode=mode), patch_norm(padded, 3))
    # A constant image and a constant filter are aligned everywhere, at the corners too.
    ones = torch.ones(1, 4, 5, 5, dtype=torch.float64, device=device)
    weight = torch.ones(1, 4, 3, 3, dtype=torch.float64, device=device)
    c = decoupled_conv2d(ones, weight, padding=1, magnitude="sphere", padding_mode=mode)
    check_equal("c", c, torch.full_like(c, 36 / (36 + 1e-4)))


@row(4)
def test_unbatched_input_is_a_batch_of_one(row: int, backend: str, device: str) -> None:
    layer = DecoupledConv2d(4, 6, 3, groups=2, dtype=torch.float64, device=device)
    x = images(device, 4, 6, 5)
    check_equal("y", layer(x).detach(), layer(x[None])[0].detach())


@row(5)
def test_zero_filter_is_finite(row: int, backend: str, device: str) -> None:
    layer = DecoupledConv2d(4, 6, 3, device=device)
    with torch.no_grad():
        layer.weight[2] = 0.0
    y = layer(images(device, dtype=torch.float32))
    assert int(y[:, 2].count_nonzero()) == 0
    y.square().sum().backward()
    assert layer.weight.grad is not None
    assert bool(layer.weight.grad.isfinite().all())


@row(6)
def test_float16_squares_do_not_overflow(row: int, backend: str, device: str) -> None:
    layer = DecoupledConv2d(4, 6, 3, dtype=torch.float16, device=device)
    x = torch.where(images(device) > 0, 300.0, -300.0).half()
    y = layer(x)
    assert bool(y.isfinite().all())
    want = layer.double()(x.double()).detach()
    check("y", y, want, want, torch.float16)


@row(7)
def test_bias_is_used(row: int, backend: str, device: str) -> None:
    layer = DecoupledConv2d(4, 6, 3, bias=True, dtype=torch.float64, device=device)
    x = images(device)
    y = layer(x)
    assert layer.bias is not None
    with torch.no_grad():
        layer.bias.add_(1.5)
    check_equal("y", layer(x).detach(), y.detach() + 1.5)
    y.sum().backward()
    assert layer.bias.grad is not None
    check_equal("grad", layer.bias.grad, torch.full_like(layer.bias, y[:, 0].numel()).detach())


@row(8)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_returns_the_autocast_dtype(
    row: int, dtype: torch.dtype, backend: str, device: str
) -> None:
    layer = DecoupledConv2d(4, 6, 3, bias=True, angular="sigmoid", learn_k=True, device=device)
    x = images(device, dtype=torch.float32).requires_grad_()
    with torch.autocast(device, dtype=dtype):
        y = layer(x)
        assert y.dtype == dtype
        # The norm of a float32 input stays exact.
        assert patch_norm(x, 3).dtype == torch.float32
        y.float().square().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    assert layer.bias is not None
    want = decoupled_conv2d(
        x.detach().to(dtype),
        layer.weight.detach().to(dtype),
        layer.bias.detach().to(dtype),
        angular="sigmoid",
        radius=layer.radius,
        k=layer.k,
        norm_mean="batch",
    )
    assert torch.equal(y, want)


@row(8)
def test_autocast_leaves_float64_alone(row: int, backend: str, device: str) -> None:
    layer = DecoupledConv2d(4, 6, 3, dtype=torch.float64, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert layer(images(device)).dtype == torch.float64


@row(9)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_dtype_kernel_and_group_count_runs(
    row: int, dtype: torch.dtype, backend: str, device: str
) -> None:
    for groups in (1, 2, 3, 6):
        case = Case("row9", 2, 6, 5, 6, 12, (2, 3), groups=groups)
        inputs = make_inputs(case, dtype, device=device)
        cotangent = random_cotangent(inputs)
        got = evaluate(decoupled_conv2d, inputs, cotangent)
        truth, peer = truth_and_peer(inputs, cotangent)
        check_all(f"groups {groups}", got, truth, peer, dtype)
    layer = DecoupledConv2d(6, 6, (2, 3), groups=3).to(device, dtype)
    assert layer(images(device, 1, 6, 4, 4, dtype=dtype)).dtype == dtype


@row(10)
def test_forward_changes_no_parameter(row: int, backend: str, device: str) -> None:
    layer = DecoupledConv2d(4, 6, 3, angular="sigmoid", learn_k=True, device=device)
    before = {name: (p.detach().clone(), p._version) for name, p in layer.named_parameters()}
    for training in (True, False):
        layer.train(training)(images(device, dtype=torch.float32)).sum().backward()
    for name, parameter in layer.named_parameters():
        value, version = before[name]
        assert parameter._version == version, name
        assert torch.equal(parameter, value), name


@row(11)
def test_norm_next_to_a_huge_pixel_is_exact(row: int, backend: str, device: str) -> None:
    """A running sum of squares would leave the rounding of 1e12 in every later window."""
    x = torch.zeros(1, 2, 9, 9, device=device)
    x[0, 0, 4, 4] = 1e6
    b = patch_norm(x, 3, padding=1)
    far = torch.ones_like(b, dtype=torch.bool)
    far[0, 0, 3:6, 3:6] = False
    check_equal("zero patch", b[far], torch.full_like(b[far], 0.01))
    check_equal("huge patch", b[~far], torch.full_like(b[~far], 1e6))


@row(11)
def test_filter_equal_to_the_patch_gives_its_norm(row: int, backend: str, device: str) -> None:
    weight = images(device, 6, 4, 3, 3, dtype=torch.float32)
    y = decoupled_conv2d(weight, weight, magnitude="linear", weighting="linear")
    squares = weight.double().square().sum(dim=(1, 2, 3))
    diagonal = y[:, :, 0, 0].diagonal()
    check("<w, w>", diagonal, squares, squares.float(), torch.float32)


@row(12)
def test_norm_map_has_one_plane_per_group(row: int, backend: str, device: str) -> None:
    b = patch_norm(images(device, 2, 12, 7, 8), 3, groups=3)
    assert b.shape == (2, 3, 5, 6)
    assert b.untyped_storage().nbytes() == b.numel() * b.element_size()


@row(13)
@pytest.mark.parametrize("angular", ["linear", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_cosine_past_one_stays_finite(
    row: int, angular: str, dtype: torch.dtype, backend: str, device: str
) -> None:
    weight = 8 * images(device, 64, 4, 3, 3).to(dtype)
    x = torch.cat((weight, -weight)).requires_grad_()
    weight.requires_grad_()
    y = decoupled_conv2d(x, weight, magnitude="sphere", angular=angular)
    assert bool(y.isfinite().all())
    assert float(y.detach().abs().max()) <= 1.0
    grads = torch.autograd.grad(y.float().square().sum(), (x, weight))
    assert all(bool(g.isfinite().all()) for g in grads)


@row(14)
def test_filter_norm_is_per_filter_and_carries_gradient(
    row: int, backend: str, device: str
) -> None:
    layer = DecoupledConv2d(4, 6, (2, 3), magnitude="sphere", dtype=torch.float64, device=device)
    with torch.no_grad():
        layer.weight.mul_(torch.arange(1.0, 7.0, device=device).reshape(-1, 1, 1, 1))
    want = [math.sqrt(float(w.square().sum()) + 1e-4) for w in layer.weight.detach()]
    a = filter_norm(layer.weight.detach(), 1e-4)
    check_equal("a", a.cpu(), torch.tensor(want, dtype=torch.float64))
    layer(images(device)).square().sum().backward()
    assert layer.weight.grad is not None
    # y depends on a filter's direction alone, so the gradient is tangential, but for eps.
    weight, gradient = layer.weight.detach().flatten(1), layer.weight.grad.flatten(1)
    radial = (weight * gradient).sum(dim=1).abs() / (weight.norm(dim=1) * gradient.norm(dim=1))
    assert float(radial.max()) < 1e-3


@row(14)
def test_radius_is_learned_and_saved(row: int, backend: str, device: str) -> None:
    layer = DecoupledConv2d(4, 6, 3, device=device)
    assert "radius_raw" in dict(layer.named_parameters())
    assert layer.state_dict()["radius_raw"].shape == (6,)
    layer(images(device, dtype=torch.float32)).square().sum().backward()
    assert layer.radius_raw is not None and layer.radius_raw.grad is not None
    assert int(layer.radius_raw.grad.count_nonzero()) == 6


@row(14)
def test_evaluation_ignores_the_rest_of_the_batch(row: int, backend: str, device: str) -> None:
    layer = DecoupledConv2d(4, 6, 3, dtype=torch.float64, device=device)
    x = images(device)
    layer(x)
    layer.eval()
    other = torch.cat((x[:1], 100 * x[1:]))
    check_equal("y", layer(x)[:1].detach(), layer(other)[:1].detach())


@row(15)
def test_running_mean_is_saved_and_used_in_evaluation(row: int, backend: str, device: str) -> None:
    layer = DecoupledConv2d(4, 6, 3, dtype=torch.float64, device=device)
    x = images(device)
    layer(x)
    assert {"norm_mean", "norm_mean_steps"} <= set(layer.state_dict())
    other = DecoupledConv2d(4, 6, 3, dtype=torch.float64, device=device)
    other.load_state_dict(layer.state_dict())
    y = other.eval()(3 * x)
    mean = patch_norm(x, 3).mean()
    assert isinstance(layer.radius, Tensor)
    want = decoupled_conv2d(3 * x, layer.weight, radius=layer.radius, norm_mean=mean)
    check_equal("y", y.detach(), want.detach())


@row(16)
@pytest.mark.parametrize("dilation", [1, 2, (2, 3)])
def test_output_size_knows_the_dilation(row: int, dilation: Any, backend: str, device: str) -> None:
    plain, layer = as_plain_convolution(
        device, kernel_size=3, stride=2, padding=(1, 2), dilation=dilation
    )
    x = images(device, 1, 4, 11, 12)
    assert layer(x).shape == plain(x).shape
    b = patch_norm(x, 3, 2, (1, 2), dilation)
    assert b.shape[2:] == plain(x).shape[2:]


@row(18)
def test_layer_is_an_ordinary_module(row: int) -> None:
    for name in ("parameters", "named_parameters", "buffers", "state_dict", "train", "to"):
        assert getattr(DecoupledConv2d, name) is getattr(nn.Module, name)
    started = torch.cuda.is_initialized()
    layer = DecoupledConv2d(4, 6, 3, bias=True)
    assert torch.cuda.is_initialized() == started
    assert {t.device.type for t in layer.state_dict().values()} == {"cpu"}
    names = [name for name, _ in layer.named_parameters()]
    assert names == ["weight", "bias", "radius_raw"]


@row(19)
def test_defaults_are_the_official_ones(row: int) -> None:
    layer = DecoupledConv2d(4, 6, 3)
    named = {
        name: getattr(layer, name)
        for name in ("magnitude", "angular", "weighting", "alpha", "beta", "eps", "norm_momentum")
    }
    assert named == {
        "magnitude": "tanh",
        "angular": "cosine",
        "weighting": "none",
        "alpha": 1.0,
        "beta": 0.5,
        "eps": 1e-4,
        "norm_momentum": 1e-3,
    }
    assert layer.radius_raw is not None
    assert layer.radius_raw.tolist() == [1.0] * 6
    assert layer.norm_mean_grad and layer.radius_unit == "mean_norm" and layer.power == 2.0
    assert dcconv.__version__
