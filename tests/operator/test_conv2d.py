"""Every backend on every case, dtype, layout and operator, under the one accuracy rule."""

from __future__ import annotations

import pytest
import torch
from accuracy import check, check_all, evaluate, judge, random_cotangent, truth_and_peer
from cases import ANGULARS, CASES, DTYPES, LAYOUTS, OPERATORS, by_id, make_inputs

import dcconv
from dcconv import functional
from dcconv.operator import reference
from dcconv.operator.functions import angulars, magnitudes
from dcconv.operator.numerics import compute_dtype

OPERATORS_PER_CASE = 4
NORMS = ("batch", "given", "none")


def ids(values: object) -> str:
    """Name a parameter."""
    if isinstance(values, torch.dtype):
        return str(values).removeprefix("torch.")
    return getattr(values, "id", None) or (
        "-".join(values) if isinstance(values, tuple) else str(values)
    )


def compare(backend: str, name: str, inputs: object, **extra: object) -> None:
    """Judge y and all gradients of a backend."""
    cotangent = random_cotangent(inputs)
    got = evaluate(functional.decoupled_conv2d, inputs, cotangent, backend=backend, **extra)
    judge(name, inputs, cotangent, got)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_geometry_agrees_with_the_reference(
    backend: str, device: str, case: object, dtype: torch.dtype, layout: str
) -> None:
    # Each combination meets a few operators; all 80 come up many times over the table.
    start = 7 * CASES.index(case) + 13 * DTYPES.index(dtype) + 29 * LAYOUTS.index(layout)
    for i in range(OPERATORS_PER_CASE):
        magnitude, weighting, angular = OPERATORS[(start + 37 * i) % len(OPERATORS)]
        inputs = make_inputs(
            case,
            dtype,
            layout,
            magnitude=magnitude,
            weighting=weighting,
            angular=angular,
            norm=NORMS[(start + i) % 3],
            bias=(start + i) % 4 == 0,
            scalar=(start + i) % 5 == 0,
            device=device,
        )
        compare(backend, f"{case.id} {layout} {magnitude} {weighting} {angular}", inputs)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("operator", OPERATORS, ids=ids)
def test_operator_agrees_with_the_reference(
    backend: str, device: str, operator: tuple[str, str, str], dtype: torch.dtype, norm: str
) -> None:
    magnitude, weighting, angular = operator
    for layout in ("contiguous", "channels_last"):
        for geometry in ("3x3-p1", "groups3-odd"):
            inputs = make_inputs(
                by_id(geometry),
                dtype,
                layout,
                magnitude=magnitude,
                weighting=weighting,
                angular=angular,
                norm=norm,
                alpha=1.25,
                beta=0.75,
                power=2.5,
                device=device,
            )
            compare(backend, f"{geometry} {layout}", inputs)


@pytest.mark.parametrize("keep", ["output", "dot"])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("angular", ANGULARS)
def test_both_kept_tensors_are_exact_enough(
    backend: str, device: str, angular: str, dtype: torch.dtype, keep: str
) -> None:
    for magnitude in ("tanh", "ball", "log"):
        for layout in ("contiguous", "channels_last"):
            inputs = make_inputs(
                by_id("3x3-p1"), dtype, layout, magnitude=magnitude, angular=angular, device=device
            )
            refused = not angulars[angular].invertible or (
                angular == "square_cosine" and dtype == torch.float16
            )
            if keep == "output" and refused:
                with pytest.raises(ValueError, match="dcconv: keep must be 'auto' or 'dot' here"):
                    evaluate(functional.decoupled_conv2d, inputs, backend=backend, keep=keep)
            else:
                compare(backend, f"{magnitude} {layout} keep={keep}", inputs, keep=keep)


@pytest.mark.parametrize("case", CASES, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_patch_norm_agrees_with_the_reference(
    backend: str, device: str, case: object, dtype: torch.dtype
) -> None:
    for layout in LAYOUTS:
        x = make_inputs(case, dtype, layout, device=device).tensors["x"]

        def run(function: object, x: torch.Tensor, **extra: object) -> list[torch.Tensor]:
            leaf = x.detach().requires_grad_()
            b = function(leaf, case.kernel, **case.geometry, **extra)
            cotangent = torch.linspace(0.5, 1.5, b.numel(), device=device).reshape(b.shape)
            (grad,) = torch.autograd.grad(b, leaf, cotangent.to(b.dtype))
            return [b.detach(), grad]

        truth = run(reference.patch_norm, x.double())
        peer = run(reference.patch_norm, x)
        got = run(functional.patch_norm, x, backend=backend)
        assert got[0].dtype == compute_dtype(dtype)
        for name, g, t, p in zip(("b", "grad_x"), got, truth, peer, strict=True):
            check(f"{case.id} {layout} {name}", g, t, p, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_output_has_the_strides_of_a_library_convolution(
    backend: str, device: str, case: object, layout: str
) -> None:
    if case.padding_mode != "zeros" or case.padding == "same":
        case = by_id("3x3-p1")
    for magnitude in ("tanh", "linear"):
        inputs = make_inputs(case, torch.float32, layout, magnitude=magnitude, device=device)
        y = functional.decoupled_conv2d(**inputs.tensors, **inputs.options, backend=backend)
        geometry = {k: v for k, v in case.geometry.items() if k != "padding_mode"}
        library = torch.nn.functional.conv2d(
            inputs.tensors["x"], inputs.tensors["weight"], **geometry
        )
        assert y.stride() == library.stride()


def test_unwritten_elements_would_show(backend: str, device: str, deterministic: bool) -> None:
    for geometry in ("3x3-p1", "groups3-odd", "reflect-same-s2", "depthwise", "1x1-o515"):
        for layout in ("contiguous", "channels_last"):
            for dtype in DTYPES:
                inputs = make_inputs(by_id(geometry), dtype, layout, device=device)
                compare(backend, f"{geometry} {layout} {dtype}", inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_linear_cosine_weighted_is_a_plain_convolution(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    inputs = make_inputs(
        by_id("3x3-p1"), dtype, magnitude="linear", weighting="linear", device=device
    )
    y = functional.decoupled_conv2d(**inputs.tensors, **inputs.options, backend=backend)
    x, weight = inputs.tensors["x"], inputs.tensors["weight"]
    truth = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    check("y", y, truth, torch.nn.functional.conv2d(x, weight, padding=1), dtype)


@pytest.mark.parametrize("magnitude", ["tanh", "linear", "sphere"])
def test_gradients_only_where_they_are_asked_for(backend: str, device: str, magnitude: str) -> None:
    inputs = make_inputs(
        by_id("groups3-odd"), magnitude=magnitude, angular="cosine", bias=True, device=device
    )
    full = evaluate(
        functional.decoupled_conv2d, inputs, torch.ones(2, 9, 6, 5, dtype=torch.float64).to(device)
    )
    for name, tensor in inputs.tensors.items():
        leaf = tensor.detach().requires_grad_()
        y = functional.decoupled_conv2d(**(inputs.tensors | {name: leaf}), **inputs.options)
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        check(name, grad, full[name], full[name], torch.float64)


def test_detached_mean_norm_has_no_gradient(backend: str, device: str) -> None:
    torch.manual_seed(0)
    layer = dcconv.DecoupledConv2d(
        3, 4, 3, dtype=torch.float64, device=device, norm_mean_grad=False, backend=backend
    )
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, device=device, requires_grad=True)
    (got,) = torch.autograd.grad(layer(x).sum(), x)
    mean = reference.patch_norm(x.detach(), 3).mean()
    y = reference.decoupled_conv2d(x, layer.weight, radius=layer.radius, norm_mean=mean)
    (want,) = torch.autograd.grad(y.sum(), x)
    check("grad_x", got, want, want, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=ids)
def test_hard_values(backend: str, device: str, dtype: torch.dtype) -> None:
    """Zero patches, zero filters, large float16 inputs, aligned and anti-aligned filters."""
    for angular in ANGULARS:
        for layout in ("contiguous", "channels_last"):
            inputs = make_inputs(
                by_id("3x3-p1"), dtype, layout, magnitude="tanh", angular=angular, device=device
            )
            x, weight = inputs.tensors["x"], inputs.tensors["weight"]
            with torch.no_grad():
                x[1] = x[1].sign() * 300
                weight[0] = 0
                weight[1] = x[0, :, 2:5, 3:6]
                weight[2] = -x[0, :, 2:5, 3:6]
            for magnitude, record in magnitudes.items():
                options = inputs.options | {"magnitude": magnitude}
                tensors = dict(inputs.tensors)
                if not record.uses_rho:
                    tensors.pop("radius")
                    options.pop("norm_mean")
                hard = type(inputs)(tensors, options)
                cotangent = torch.full((2, 9, 6, 7), 1e-3, dtype=dtype, device=device)
                got = evaluate(functional.decoupled_conv2d, hard, cotangent, backend=backend)
                truth, peer = truth_and_peer(hard, cotangent)
                for name, value in got.items():
                    # A float16 gradient may exceed 65504, in the reference too.
                    reachable = truth[name].abs() < 0.9 * torch.finfo(value.dtype).max
                    assert value[reachable].isfinite().all(), f"{magnitude} {angular}: {name}"
                if angular in ("cosine", "square_cosine", "power"):
                    # At aligned vectors asin has no accurate float32 formula: g there is finite.
                    check(f"{magnitude} {angular} {layout}", got["y"], truth["y"], peer["y"], dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_inputs_propagate(backend: str, device: str, value: float) -> None:
    for magnitude, weighting, angular in OPERATORS:
        inputs = make_inputs(
            by_id("3x3-p1"),
            torch.float32,
            "channels_last",
            magnitude=magnitude,
            weighting=weighting,
            angular=angular,
            norm="given",
            device=device,
        )
        inputs.tensors["x"][1, 0, 3, 3] = value
        y = functional.decoupled_conv2d(**inputs.tensors, **inputs.options, backend=backend)
        want = reference.decoupled_conv2d(**inputs.tensors, **inputs.options)
        same = y.isfinite() == want.isfinite()
        assert same.all(), f"{magnitude} {weighting} {angular}"
        assert not y[1, :, 2:5, 2:5].isfinite().any(), f"{magnitude} {weighting} {angular}"


def test_empty_batch(backend: str, device: str) -> None:
    for magnitude in ("tanh", "linear"):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.zeros(0, 3, 5, 6, device=device).to(memory_format=layout).requires_grad_()
            layer = dcconv.DecoupledConv2d(
                3, 4, 3, bias=True, magnitude=magnitude, device=device, backend=backend
            )
            y = layer(x)
            y.sum().backward()
            assert y.shape == (0, 4, 3, 4)
            assert x.grad is not None and x.grad.shape == x.shape
            for name, p in layer.named_parameters():
                assert p.grad is not None and not p.grad.any(), name


@pytest.mark.backend("cpu")
def test_gradients_of_tiny_float16_patches_are_finite_on_the_cpu() -> None:
    """The gradient of u, some 1e5 here, is beyond float16; those of x and the weight are not."""
    inputs = make_inputs(by_id("3x3-p1"), torch.float16, magnitude="sphere", norm="none")
    inputs.tensors["x"] = inputs.tensors["x"] * 1e-4
    inputs.tensors["weight"] = inputs.tensors["weight"].clamp(-1, 1) * 1e-3
    cotangent = random_cotangent(inputs).clamp(-1, 1) * 50
    truth, peer = truth_and_peer(inputs, cotangent)
    assert not peer["x"].isfinite().all() and not peer["weight"].isfinite().all()
    got = evaluate(functional.decoupled_conv2d, inputs, cotangent, backend="cpu")
    check_all("tiny patches", got, truth, peer, torch.float16)
    assert got["x"].isfinite().all() and got["weight"].isfinite().all()
