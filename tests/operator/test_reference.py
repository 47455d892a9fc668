"""The definition against nested loops, finite differences and identities, on every backend.

The loops are plain Python: they share no code with the package and none with a library convolution.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import (
    Results,
    check,
    check_all,
    check_equal,
    evaluate,
    random_cotangent,
    reference_call,
    truth_and_peer,
)
from cases import CASES, DTYPES, LAYOUTS, OPERATORS, Case, Inputs, by_id, make_inputs
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import dcconv
from dcconv.call import run as running
from dcconv.functional import decoupled_conv2d, patch_norm
from dcconv.operator.numerics import ACCURACY_FLOOR
from dcconv.operator.records import CURVATURE, Geometry, Operator
from dcconv.operator.reference import filter_norm

EPS = 1e-4

case_ids = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
operator_ids = pytest.mark.parametrize("operator", OPERATORS, ids="-".join)


def source(index: int, size: int, mode: str) -> int | None:
    """Return the pixel that a position of the padded axis shows, None for a zero."""
    if 0 <= index < size:
        return index
    if mode == "zeros":
        return None
    if mode == "reflect":
        return -index if index < 0 else 2 * (size - 1) - index
    if mode == "replicate":
        return 0 if index < 0 else size - 1
    return index % size


def windows(size: int, kernel: int, stride: int, padding: Any, dilation: int) -> list[int]:
    """Return the first position of every window along one axis, which may be negative."""
    extent = dilation * (kernel - 1) + 1
    if padding == "same":
        count = math.ceil(size / stride)
        total = max((count - 1) * stride + extent - size, 0)
        return [i * stride - total // 2 for i in range(count)]
    before = 0 if padding == "valid" else padding
    return list(range(-before, size + before - extent + 1, stride))


def axis(value: Any, index: int) -> Any:
    return value[index] if isinstance(value, tuple) else value


def loops(case: Case, x: Tensor, weight: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor, Tensor]:
    """Return u [n, o, p, q], b [n, g, p, q] and a [o], each sum a Python loop over math.fsum."""
    pixels, filters = x.tolist(), weight.tolist()
    r, s = case.kernel
    rows = windows(case.h, r, axis(case.stride, 0), axis(case.padding, 0), axis(case.dilation, 0))
    columns = windows(
        case.w, s, axis(case.stride, 1), axis(case.padding, 1), axis(case.dilation, 1)
    )
    inputs, outputs = case.c // case.groups, case.o // case.groups
    u = torch.zeros(case.n, case.o, len(rows), len(columns), dtype=torch.float64)
    b = torch.zeros(case.n, case.groups, len(rows), len(columns), dtype=torch.float64)
    for n in range(case.n):
        for g in range(case.groups):
            for p, top in enumerate(rows):
                for q, left in enumerate(columns):
                    taps = []
                    for c in range(inputs):
                        for i in range(r):
                            for j in range(s):
                                y = source(
                                    top + i * axis(case.dilation, 0), case.h, case.padding_mode
                                )
                                z = source(
                                    left + j * axis(case.dilation, 1), case.w, case.padding_mode
                                )
                                if y is not None and z is not None:
                                    value = pixels[n][g * inputs + c][y][z]
                                    taps.append((c, i, j, value))
                    b[n, g, p, q] = math.sqrt(math.fsum(v * v for *_, v in taps) + eps)
                    for o in range(g * outputs, (g + 1) * outputs):
                        own = filters[o]
                        u[n, o, p, q] = math.fsum(own[c][i][j] * v for c, i, j, v in taps)
    a = [math.sqrt(math.fsum(v.flatten().square().tolist()) + eps) for v in weight]
    return u, b, torch.tensor(a, dtype=torch.float64)


def magnitude_by_hand(
    name: str, weighting: str, a: float, b: float, rho: float, alpha: float, beta: float
) -> float:
    if weighting == "product":
        return alpha * math.tanh(a * b / rho)
    if weighting == "separate":
        return alpha * math.tanh(b / rho) * math.tanh(a / rho)
    h = {
        "sphere": lambda: alpha,
        "ball": lambda: alpha * min(b, rho) / rho,
        "tanh": lambda: alpha * math.tanh(b / rho),
        "linear": lambda: alpha * b,
        "segmented": lambda: alpha * b if b <= rho else beta * b + (alpha - beta) * rho,
        "log": lambda: alpha * math.log(1 + b),
        "mix": lambda: alpha * b + beta * math.log(1 + b),
    }[name]()
    return h * a if weighting == "linear" else h


def angular_by_hand(name: str, c: float, k: float, power: float) -> float:
    """Evaluate g by the paper's formulas in the angle theta."""
    theta = math.acos(c)
    if name == "linear":
        return 1 - 2 * theta / math.pi
    if name == "sigmoid":
        scale = (1 + math.exp(-math.pi / (2 * k))) / (1 - math.exp(-math.pi / (2 * k)))
        exponential = math.exp(theta / k - math.pi / (2 * k))
        return scale * (1 - exponential) / (1 + exponential)
    cosine = math.cos(theta)
    if name == "cosine":
        return cosine
    exponent = 2.0 if name == "square_cosine" else power
    return math.copysign(abs(cosine) ** exponent, cosine)


def output_by_hand(case: Case, inputs: Inputs, alpha: float, beta: float, power: float) -> Tensor:
    u, b, a = loops(case, inputs.tensors["x"], inputs.tensors["weight"])
    mean = math.fsum(b.flatten().tolist()) / max(b.numel(), 1)
    unit = {"batch": mean}.get(inputs.options.get("norm_mean", "none"), 1.0)
    if "norm_mean" in inputs.tensors:
        unit = float(inputs.tensors["norm_mean"])
    options = inputs.options
    y = torch.zeros_like(u)
    for n, o, p, q in torch.cartesian_prod(*(torch.arange(size) for size in u.shape)).tolist():
        norm = float(b[n, o // (case.o // case.groups), p, q])
        rho = float(inputs.tensors["radius"][o]) * unit if "radius" in inputs.tensors else 1.0
        k = float(inputs.tensors["k"][o]) if "k" in inputs.tensors else 1.0
        h = magnitude_by_hand(
            options["magnitude"], options["weighting"], float(a[o]), norm, rho, alpha, beta
        )
        cosine = float(u[n, o, p, q]) / (float(a[o]) * norm)
        y[n, o, p, q] = h * angular_by_hand(options["angular"], cosine, k, power)
    if "bias" in inputs.tensors:
        y += inputs.tensors["bias"].cpu().reshape(-1, 1, 1)
    return y


@case_ids
def test_dot_product_and_patch_norm_match_loops(case: Case, backend: str, device: str) -> None:
    inputs = make_inputs(
        case, magnitude="linear", weighting="linear", angular="cosine", device=device
    )
    u, b, _ = loops(case, **inputs.tensors)
    got = decoupled_conv2d(**inputs.tensors, **inputs.options)
    check_equal(f"{case.id}: u", got.cpu(), u)
    norms = patch_norm(inputs.tensors["x"], case.kernel, **case.geometry)
    check_equal(f"{case.id}: b", norms.cpu(), b)


@case_ids
def test_output_matches_loops(case: Case, backend: str, device: str) -> None:
    inputs = make_inputs(case, magnitude="tanh", angular="linear", bias=True, device=device)
    want = output_by_hand(case, inputs, 1.0, 0.5, 2.0)
    got = decoupled_conv2d(**inputs.tensors, **inputs.options)
    check_equal(f"{case.id}: y", got.cpu(), want)


@pytest.mark.parametrize("norm", ["batch", "given", "none"])
@operator_ids
def test_every_operator_matches_loops(
    operator: tuple[str, str, str], norm: str, backend: str, device: str
) -> None:
    magnitude, weighting, angular = operator
    case = Case("loops", 2, 2, 3, 4, 4, (2, 2), (2, 1), padding=1, groups=2)
    inputs = make_inputs(
        case,
        magnitude=magnitude,
        weighting=weighting,
        angular=angular,
        norm=norm,
        device=device,
        alpha=1.3,
        beta=0.4,
        power=1.7,
    )
    want = output_by_hand(case, inputs, 1.3, 0.4, 1.7)
    got = decoupled_conv2d(**inputs.tensors, **inputs.options)
    check_equal("-".join(operator), got.cpu(), want)


GRADCHECK_CASES = (
    Case("s1", 1, 2, 3, 3, 2, (2, 2), padding=1),
    Case("s2", 2, 2, 4, 3, 3, (2, 2), stride=2, padding=1),
    Case("groups2", 1, 4, 3, 3, 4, (2, 2), groups=2),
    Case("dilation2-s2-groups2", 1, 4, 5, 4, 2, (2, 2), 2, 1, 2, groups=2),
)


def smooth_inputs(case: Case, operator: tuple[str, str, str], device: str, **more: Any) -> Inputs:
    """Return operands without zero patches, where powers below 2 have no second derivative."""
    magnitude, weighting, angular = operator
    inputs = make_inputs(
        case,
        magnitude=magnitude,
        weighting=weighting,
        angular=angular,
        device=device,
        alpha=1.3,
        beta=0.4,
        power=1.5,
        **more,
    )
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(inputs.tensors["x"].shape, generator=generator, dtype=torch.float64)
    return Inputs({**inputs.tensors, "x": x.to(device)}, inputs.options)


def as_function(inputs: Inputs) -> tuple[Any, list[Tensor]]:
    """Return the call as a function of its tensors alone, and those as leaves."""
    names = list(inputs.tensors)

    def call(*leaves: Tensor) -> Tensor:
        return decoupled_conv2d(**dict(zip(names, leaves, strict=True)), **inputs.options)

    return call, [t.detach().clone().requires_grad_() for t in inputs.tensors.values()]


@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=lambda case: case.id)
@operator_ids
def test_gradients_match_finite_differences(
    operator: tuple[str, str, str], case: Case, backend: str, device: str
) -> None:
    call, leaves = as_function(smooth_inputs(case, operator, device))
    assert gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("norm", ["given", "none"])
@pytest.mark.parametrize(
    "operator",
    [op for op in OPERATORS if op[2] in ("cosine", "sigmoid") and op[0] in ("ball", "tanh")],
    ids="-".join,
)
def test_gradients_of_every_argument_match_finite_differences(
    operator: tuple[str, str, str], norm: str, backend: str, device: str
) -> None:
    inputs = smooth_inputs(GRADCHECK_CASES[1], operator, device, norm=norm, bias=True, scalar=True)
    assert ("norm_mean" in inputs.tensors) == (norm == "given")
    call, leaves = as_function(inputs)
    assert gradcheck(call, leaves)


@pytest.mark.parametrize(
    "operator",
    [
        ("sphere", "none", "linear"),
        ("ball", "linear", "cosine"),
        ("tanh", "none", "sigmoid"),
        ("tanh", "product", "power"),
        ("tanh", "separate", "cosine"),
        ("linear", "none", "cosine"),
        ("segmented", "none", "linear"),
        ("log", "none", "power"),
        ("mix", "linear", "cosine"),
    ],
    ids="-".join,
)
def test_second_gradients_match_finite_differences(
    operator: tuple[str, str, str], backend: str, device: str
) -> None:
    case = Case("tiny", 1, 2, 2, 3, 2, (2, 2), padding=1)
    call, leaves = as_function(smooth_inputs(case, operator, device))
    assert gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
def test_patch_norm_gradients_match_finite_differences(
    padding_mode: str, backend: str, device: str
) -> None:
    x = torch.randn(2, 4, 4, 3, dtype=torch.float64, device=device, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        return patch_norm(x, (3, 2), 2, 1, groups=2, padding_mode=padding_mode)

    assert gradcheck(call, [x])
    assert gradgradcheck(call, [x], fast_mode=True)


def test_detached_mean_norm_gradients_are_those_of_a_constant(backend: str, device: str) -> None:
    inputs = make_inputs(by_id("groups3-odd"), magnitude="tanh", device=device)
    cotangent = random_cotangent(inputs)

    def detached(**arguments: Any) -> Tensor:
        geometry = Geometry(**{name: arguments.pop(name) for name in Geometry._fields})
        tensors = [arguments.pop(name) for name in ("x", "weight", "radius", "norm_mean")]
        x, weight, radius, mean = tensors
        operator = Operator(**arguments)
        call = running.Arguments(
            x, weight, None, radius, mean, CURVATURE, operator, geometry, norm_grad=False
        )
        y, _ = running.conv2d(call)
        return y

    got = evaluate(detached, inputs, cotangent)
    case = by_id("groups3-odd")
    mean = patch_norm(inputs.tensors["x"], case.kernel, **case.geometry).mean()
    options = {**inputs.options, "norm_mean": mean}
    want = evaluate(decoupled_conv2d, Inputs(inputs.tensors, options), cotangent)
    for name in want:
        check_equal(name, got[name], want[name])
    attached = evaluate(decoupled_conv2d, inputs, cotangent)
    assert not torch.allclose(attached["x"], got["x"])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.padding_mode == "zeros"], ids=lambda case: case.id
)
def test_linear_cosine_with_linear_weighting_is_a_plain_convolution(
    case: Case, dtype: torch.dtype, backend: str, device: str
) -> None:
    by_library = case.padding != "same"
    inputs = make_inputs(
        case, dtype, magnitude="linear", weighting="linear", angular="cosine", device=device
    )
    cotangent = random_cotangent(inputs)

    def library(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
        if not by_library:
            pads: list[int] = []
            for size, kernel, index in ((case.w, case.kernel[1], 1), (case.h, case.kernel[0], 0)):
                starts = windows(
                    size, kernel, axis(case.stride, index), "same", axis(case.dilation, index)
                )
                last = starts[-1] + axis(case.dilation, index) * (kernel - 1)
                pads += [-starts[0], max(last - size + 1, 0)]
            x = F.pad(x, pads)
            return F.conv2d(x, weight, None, case.stride, 0, case.dilation, case.groups)
        return F.conv2d(x, weight, None, case.stride, case.padding, case.dilation, case.groups)

    got = evaluate(decoupled_conv2d, inputs, cotangent)
    wide = Inputs({name: t.double() for name, t in inputs.tensors.items()}, inputs.options)
    truth = evaluate(library, wide, cotangent.double())
    check_all(case.id, got, truth, evaluate(library, inputs, cotangent), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_cosine_is_a_convolution_with_normalised_filters(
    dtype: torch.dtype, backend: str, device: str
) -> None:
    case = by_id("3x3-p1")
    inputs = make_inputs(case, dtype, magnitude="linear", angular="cosine", device=device)
    cotangent = random_cotangent(inputs)

    def library(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
        a = filter_norm(weight, EPS).reshape(-1, 1, 1, 1)
        return F.conv2d(x, (weight / a).to(x.dtype), None, padding=1)

    got = evaluate(decoupled_conv2d, inputs, cotangent)
    wide = Inputs({name: t.double() for name, t in inputs.tensors.items()}, inputs.options)
    truth = evaluate(library, wide, cotangent.double())
    check_all(case.id, got, truth, evaluate(library, inputs, cotangent), dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@operator_ids
def test_reference_meets_the_rule_it_sets(
    operator: tuple[str, str, str], dtype: torch.dtype
) -> None:
    """A peer worse than the rule's cap would mean ill-conditioned cases or a bad formula."""
    magnitude, weighting, angular = operator
    for case in CASES[::8]:
        inputs = make_inputs(case, dtype, magnitude=magnitude, weighting=weighting, angular=angular)
        truth, peer = truth_and_peer(inputs, random_cotangent(inputs))
        check_all(case.id, peer, truth, peer, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_changes_nothing(
    layout: str, dtype: torch.dtype, deterministic: bool, backend: str, device: str
) -> None:
    for case in (by_id("3x3-s2-p1"), by_id("groups3-odd"), by_id("n0")):
        inputs = make_inputs(
            case, dtype, layout, magnitude="tanh", angular="sigmoid", bias=True, device=device
        )
        cotangent = random_cotangent(inputs)
        got = evaluate(decoupled_conv2d, inputs, cotangent)
        assert got["y"].dtype == dtype
        assert all(got[name].dtype == t.dtype for name, t in inputs.tensors.items())
        truth, peer = truth_and_peer(inputs, cotangent)
        check_all(f"{case.id} {layout}", got, truth, peer, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case_id", ["3x3-p1", "1x1", "depthwise", "3x3-p1-c1", "n0", "one-pixel"])
def test_output_strides_are_those_of_the_library(
    case_id: str, layout: str, backend: str, device: str
) -> None:
    case = by_id(case_id)
    inputs = make_inputs(case, torch.float32, layout, device=device)
    x, weight = inputs.tensors["x"], inputs.tensors["weight"]
    plain = F.conv2d(x, weight, None, case.stride, case.padding, case.dilation, case.groups)
    y = decoupled_conv2d(**inputs.tensors, **inputs.options)
    # The stride of an axis of at most one element means nothing.
    meant = [i for i, size in enumerate(y.shape) if size > 1 and y.numel()]
    assert [y.stride(i) for i in meant] == [plain.stride(i) for i in meant]


def plain_call(case: Case, device: str, **operator: Any) -> Inputs:
    inputs = make_inputs(case, norm="none", device=device, **operator)
    x = torch.randn_like(inputs.tensors["x"])
    return Inputs({**inputs.tensors, "x": x}, inputs.options)


def run(inputs: Inputs, **changes: Any) -> Tensor:
    tensors = {name: changes.pop(name, t) for name, t in inputs.tensors.items()}
    return decoupled_conv2d(**tensors, **{**inputs.options, **changes})


@pytest.mark.parametrize("angular", ["linear", "cosine", "sigmoid", "square_cosine", "power"])
def test_sphere_is_invariant_to_the_scale_of_input_and_filters(
    angular: str, backend: str, device: str
) -> None:
    inputs = plain_call(by_id("3x3"), device, magnitude="sphere", angular=angular)
    eps = 1e-24
    y = run(inputs, eps=eps)
    x, weight = inputs.tensors["x"], inputs.tensors["weight"]
    check_equal("x scaled", run(inputs, x=7.3 * x, eps=eps), y)
    check_equal("weight scaled", run(inputs, weight=0.21 * weight, eps=eps), y)
    assert float(y.abs().max()) <= 1.0


@operator_ids
def test_every_operator_is_odd_in_input_and_filters(
    operator: tuple[str, str, str], backend: str, device: str
) -> None:
    magnitude, weighting, angular = operator
    case = by_id("groups3-odd")
    inputs = make_inputs(
        case, magnitude=magnitude, weighting=weighting, angular=angular, device=device
    )
    y = run(inputs)
    assert float(y.abs().max()) > 0
    check_equal("-x", -run(inputs, x=-inputs.tensors["x"]), y)
    check_equal("-weight", -run(inputs, weight=-inputs.tensors["weight"]), y)


@pytest.mark.parametrize(
    "case_id", ["groups3-odd", "groups2-s2-dilation2", "depthwise", "circular"]
)
def test_groups_are_separate_convolutions(case_id: str, backend: str, device: str) -> None:
    case = by_id(case_id)
    inputs = plain_call(case, device, magnitude="ball", angular="linear")
    y = run(inputs)
    x_parts = inputs.tensors["x"].chunk(case.groups, dim=1)
    weights = inputs.tensors["weight"].chunk(case.groups)
    radii = inputs.tensors["radius"].chunk(case.groups)
    parts = [
        run(inputs, x=x, weight=w, radius=radius, groups=1)
        for x, w, radius in zip(x_parts, weights, radii, strict=True)
    ]
    check_equal(case_id, y, torch.cat(parts, dim=1))


@pytest.mark.parametrize("stride", [2, 3, (2, 1), (1, 3)])
def test_stride_is_slicing(stride: Any, backend: str, device: str) -> None:
    case = Case("sliced", 2, 3, 8, 9, 4, (3, 2), padding=(1, 0))
    inputs = plain_call(case, device, magnitude="log", angular="cosine")
    whole = run(inputs)
    rows, columns = axis(stride, 0), axis(stride, 1)
    check_equal("y", run(inputs, stride=stride), whole[:, :, ::rows, ::columns])


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_unbatched_input_is_a_batch_of_one(norm: str, backend: str, device: str) -> None:
    case = Case("one", 1, 4, 5, 6, 6, (3, 3), padding=1, groups=2)
    inputs = make_inputs(case, norm=norm, magnitude="tanh", angular="sigmoid", device=device)
    cotangent = random_cotangent(inputs)
    batch = evaluate(decoupled_conv2d, inputs, cotangent)
    single = Inputs({**inputs.tensors, "x": inputs.tensors["x"][0]}, inputs.options)
    alone = evaluate(decoupled_conv2d, single, cotangent[0])
    for name, want in batch.items():
        check_equal(name, alone[name], want[0] if name in ("x", "y") else want)
    norms = patch_norm(single.tensors["x"], 3, padding=1, groups=2)
    assert norms.shape == (2, 5, 6)


def test_batch_mean_is_the_mean_of_the_patch_norm(backend: str, device: str) -> None:
    case = by_id("groups2-s2-dilation2")
    inputs = make_inputs(case, device=device)
    cotangent = random_cotangent(inputs)

    def by_hand(x: Tensor, norm_mean: str, **arguments: Any) -> Tensor:
        mean = patch_norm(x, case.kernel, **case.geometry).mean()
        return decoupled_conv2d(x, norm_mean=mean, **arguments)

    got = evaluate(decoupled_conv2d, inputs, cotangent)
    want = evaluate(by_hand, inputs, cotangent)
    for name in want:
        check_equal(name, got[name], want[name])


def test_bias_is_added_after_the_operator(backend: str, device: str) -> None:
    inputs = make_inputs(by_id("3x3-p1"), bias=True, device=device)
    bias = inputs.tensors.pop("bias")
    check_equal("y", run(inputs, bias=bias), run(inputs) + bias.reshape(-1, 1, 1))


def test_sigmoid_with_large_k_is_linear(backend: str, device: str) -> None:
    inputs = plain_call(by_id("3x3"), device, magnitude="sphere", angular="sigmoid")
    linear = run(inputs, angular="linear", k=0.3)
    for k in (10.0, 100.0, 1000.0):
        # tanh(z) = z - z^3 / 3 + ...: the quotient differs by at most (pi / 4k)^2 / 3.
        bound = (math.pi / (4 * k)) ** 2 / 3
        distance = float((run(inputs, k=k) - linear).abs().max())
        assert 0.01 * bound < distance <= bound


def test_tanh_tends_to_ball_at_both_ends(backend: str, device: str) -> None:
    inputs = plain_call(by_id("3x3"), device, magnitude="tanh", angular="cosine")
    wide, narrow = 1e6, 1e-2
    far = {name: run(inputs, magnitude=name, radius=wide) for name in ("tanh", "ball")}
    norms = patch_norm(inputs.tensors["x"], (3, 3))
    # tanh(z) = z (1 - z^2 / 3 + ...)
    relative = (norms.max() / wide) ** 2 / 3
    assert float(((far["tanh"] - far["ball"]) / far["ball"]).abs().max()) <= float(relative) + 1e-15
    near = {name: run(inputs, magnitude=name, radius=narrow) for name in ("tanh", "ball")}
    check_equal("saturated", near["tanh"], near["ball"])
    check_equal("sphere", near["ball"], run(inputs, magnitude="sphere", radius=1.0))


def test_ball_of_huge_radius_times_the_radius_is_linear(backend: str, device: str) -> None:
    inputs = plain_call(by_id("3x3"), device, magnitude="ball", angular="square_cosine")
    radius = 2.0**40
    linear = run(inputs, magnitude="linear", radius=1.0)
    check_equal("y", run(inputs, radius=radius) * radius, linear)


def test_segmented_with_equal_slopes_is_linear(backend: str, device: str) -> None:
    inputs = plain_call(by_id("3x3"), device, magnitude="segmented", angular="linear")
    want = run(inputs, magnitude="linear", alpha=0.7, radius=1.0)
    check_equal("y", run(inputs, alpha=0.7, beta=0.7), want)


def test_mix_is_linear_plus_log(backend: str, device: str) -> None:
    inputs = plain_call(by_id("3x3"), device, magnitude="mix", angular="cosine")
    parts = run(inputs, magnitude="linear", alpha=1.3) + run(inputs, magnitude="log", alpha=0.6)
    check_equal("y", run(inputs, alpha=1.3, beta=0.6), parts)


def test_weightings_multiply_or_rescale_the_radius(backend: str, device: str) -> None:
    inputs = plain_call(by_id("3x3"), device, magnitude="tanh", angular="cosine")
    radius = inputs.tensors["radius"]
    a = filter_norm(inputs.tensors["weight"], EPS)
    y = run(inputs)
    column = (-1, 1, 1)
    check_equal("linear", run(inputs, weighting="linear"), y * a.reshape(column))
    check_equal("product", run(inputs, weighting="product"), run(inputs, radius=radius / a))
    want = y * torch.tanh(a / radius).reshape(column)
    check_equal("separate", run(inputs, weighting="separate"), want)


def test_powers_one_and_two_are_the_cosines(backend: str, device: str) -> None:
    inputs = make_inputs(by_id("3x3-p1"), magnitude="log", angular="power", device=device)
    cotangent = random_cotangent(inputs)

    def results(**changes: Any) -> Results:
        return evaluate(
            decoupled_conv2d, Inputs(inputs.tensors, {**inputs.options, **changes}), cotangent
        )

    for power, angular in ((1.0, "cosine"), (2.0, "square_cosine")):
        want = results(angular=angular)
        for name, got in results(power=power).items():
            check_equal(f"power {power}: {name}", got, want[name])


ZERO_CASE = Case("zero", 2, 3, 4, 4, 5, (3, 3), padding=1)


def zero_inputs(
    operator: tuple[str, str, str], dtype: torch.dtype, device: str, **tensors: Any
) -> Inputs:
    magnitude, weighting, angular = operator
    inputs = make_inputs(
        ZERO_CASE,
        dtype,
        magnitude=magnitude,
        weighting=weighting,
        angular=angular,
        device=device,
        power=1.5,
    )
    for name in tensors:
        inputs.tensors[name].zero_()
    return inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("zero", [("x",), ("weight",), ("x", "weight")], ids="+".join)
@pytest.mark.parametrize(
    "operator",
    [op for op in OPERATORS if op[1] != "linear" or op[0] == "mix"],
    ids="-".join,
)
def test_zero_input_and_zero_filters_have_defined_values_and_gradients(
    operator: tuple[str, str, str],
    zero: tuple[str, ...],
    dtype: torch.dtype,
    backend: str,
    device: str,
) -> None:
    inputs = zero_inputs(operator, dtype, device, **dict.fromkeys(zero, True))
    cotangent = torch.ones_like(random_cotangent(inputs))
    got = evaluate(decoupled_conv2d, inputs, cotangent)
    assert int(got["y"].count_nonzero()) == 0
    assert all(bool(t.isfinite().all()) for t in got.values())
    truth, peer = truth_and_peer(inputs, cotangent)
    check_all("+".join(zero), got, truth, peer, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("angular", ["linear", "cosine", "sigmoid", "square_cosine", "power"])
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["aligned", "opposite"])
def test_aligned_vectors_reach_the_ends_of_the_range(
    sign: float, angular: str, dtype: torch.dtype, backend: str, device: str
) -> None:
    """Rounding may carry the cosine past 1; value and gradient must stay bounded all the same."""
    weight = torch.randn(16, 8, 3, 3, dtype=torch.float64).to(dtype).to(device)
    x = (sign * 16 * weight).clone().requires_grad_()
    w = (4 * weight).clone().requires_grad_()
    y = decoupled_conv2d(x, w, magnitude="sphere", angular=angular)
    diagonal = y[:, :, 0, 0].diagonal()
    want = torch.full_like(diagonal, sign, dtype=torch.float64)
    # The eps in both norms keeps the cosine below 1 by about eps / (2 a^2), and the slope of the
    # linear and sigmoid functions turns a distance d into sqrt(2 d) times at most 2.
    distance = float((diagonal.detach().double() - want).abs().max())
    smallest = float(weight.double().square().sum(dim=(1, 2, 3)).min())
    rounding = ACCURACY_FLOOR[dtype] + EPS / smallest / 16
    assert distance <= 2 * math.sqrt(2 * rounding)
    assert float(y.detach().abs().max()) <= 1.0 + ACCURACY_FLOOR[dtype]
    grads = torch.autograd.grad(diagonal.sum(), (x, w))
    assert all(bool(g.isfinite().all()) for g in grads)
    # |dg/dc| <= 1 / sqrt(delta) for linear; sigmoid at k = 0.3 is flat at the ends; |dc/dx| <= 1/b.
    cap = {torch.float64: 1e6, torch.float32: 1e3}.get(dtype, 1e3**0.5)
    norm = float(x.detach().double().square().sum(dim=(1, 2, 3)).sqrt().min())
    assert float(grads[0].double().abs().max()) <= 4 * cap / norm


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e10])
@pytest.mark.parametrize(
    "operator",
    [
        (m, w, a)
        for m, w, a in OPERATORS
        if a in ("cosine", "linear") and (w == "none" or m in ("tanh", "linear"))
    ],
    ids="-".join,
)
def test_huge_and_tiny_inputs_meet_the_rule(
    operator: tuple[str, str, str], scale: float, backend: str, device: str
) -> None:
    magnitude, weighting, angular = operator
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(
            by_id("3x3-s2-p1"),
            dtype,
            magnitude=magnitude,
            weighting=weighting,
            angular=angular,
            device=device,
        )
        inputs.tensors["x"].mul_(scale)
        cotangent = random_cotangent(inputs)
        got = evaluate(decoupled_conv2d, inputs, cotangent)
        truth, peer = truth_and_peer(inputs, cotangent)
        check_all(f"scale {scale}", got, truth, peer, dtype)


@pytest.mark.parametrize("scale", [1e-15, 1e-4, 1e4, 1e12])
def test_huge_and_tiny_filters_meet_the_rule(scale: float, backend: str, device: str) -> None:
    for magnitude, weighting in (("tanh", "none"), ("linear", "linear"), ("sphere", "linear")):
        inputs = make_inputs(
            by_id("3x3-s2-p1"),
            torch.float32,
            magnitude=magnitude,
            weighting=weighting,
            device=device,
        )
        inputs.tensors["weight"].mul_(scale)
        cotangent = random_cotangent(inputs)
        got = evaluate(decoupled_conv2d, inputs, cotangent)
        truth, peer = truth_and_peer(inputs, cotangent)
        check_all(f"{magnitude}, scale {scale}", got, truth, peer, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "operator",
    [op for op in OPERATORS if op[1] == "none" and op[2] in ("cosine", "square_cosine")],
    ids="-".join,
)
def test_squares_of_half_inputs_do_not_overflow(
    operator: tuple[str, str, str], dtype: torch.dtype, backend: str, device: str
) -> None:
    magnitude, weighting, angular = operator
    inputs = make_inputs(
        by_id("3x3-p1"),
        dtype,
        magnitude=magnitude,
        weighting=weighting,
        angular=angular,
        device=device,
    )
    # 300 squared is beyond float16's largest number.
    signs = torch.where(inputs.tensors["x"] >= 0, 300.0, -300.0).to(dtype)
    inputs = Inputs({**inputs.tensors, "x": signs}, inputs.options)
    cotangent = random_cotangent(inputs)
    got = evaluate(decoupled_conv2d, inputs, cotangent)
    assert int(got["y"].count_nonzero()) == got["y"].numel()
    truth, peer = truth_and_peer(inputs, cotangent)
    check_all("300", got, truth, peer, dtype)
    norms = patch_norm(signs, 3, padding=1)
    assert norms.dtype == torch.float32
    check("b", norms, patch_norm(signs.double(), 3, padding=1), norms, torch.float32)


@operator_ids
def test_empty_batch_runs_forward_and_backward(
    operator: tuple[str, str, str], backend: str, device: str
) -> None:
    magnitude, weighting, angular = operator
    inputs = make_inputs(
        by_id("n0"),
        torch.float32,
        magnitude=magnitude,
        weighting=weighting,
        angular=angular,
        bias=True,
        device=device,
    )
    got = evaluate(decoupled_conv2d, inputs, random_cotangent(inputs))
    assert got["y"].shape == (0, 4, 6, 5)
    assert got["x"].shape == (0, 3, 6, 5)
    for name in set(got) - {"x", "y"}:
        assert got[name].shape == inputs.tensors[name].shape
        assert int(got[name].count_nonzero()) == 0, name
    assert patch_norm(inputs.tensors["x"], 3, padding=1).shape == (0, 1, 6, 5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@operator_ids
def test_non_finite_input_reaches_exactly_the_windows_that_hold_it(
    operator: tuple[str, str, str], bad: float, backend: str, device: str
) -> None:
    magnitude, weighting, angular = operator
    inputs = make_inputs(
        by_id("3x3-s2-p1"),
        torch.float32,
        magnitude=magnitude,
        weighting=weighting,
        angular=angular,
        norm="given",
        device=device,
    )
    x = torch.randn_like(inputs.tensors["x"])
    x[1, 2, 3, 3] = bad
    y = decoupled_conv2d(**{**inputs.tensors, "x": x}, **inputs.options)
    ones = torch.ones(1, 4, 3, 3, device=device)
    hit = F.conv2d((~x.isfinite()).float(), ones, stride=2, padding=1) > 0
    assert torch.equal(~y.isfinite(), hit.expand_as(y))


@pytest.mark.parametrize("magnitude", ["ball", "tanh", "segmented"])
def test_non_finite_batch_mean_reaches_every_output(
    magnitude: str, backend: str, device: str
) -> None:
    inputs = make_inputs(by_id("3x3-p1"), torch.float32, magnitude=magnitude, device=device)
    inputs.tensors["x"][1, 0, 2, 2] = math.nan
    got = evaluate(decoupled_conv2d, inputs, torch.ones_like(random_cotangent(inputs)))
    assert bool(got["y"].isnan().all())
    assert bool(got["radius"].isnan().all())


@operator_ids
def test_non_finite_filter_reaches_exactly_its_channel(
    operator: tuple[str, str, str], backend: str, device: str
) -> None:
    magnitude, weighting, angular = operator
    inputs = make_inputs(
        by_id("3x3"),
        torch.float32,
        magnitude=magnitude,
        weighting=weighting,
        angular=angular,
        device=device,
    )
    inputs.tensors["x"].normal_()
    inputs.tensors["weight"][3, 1, 0, 2] = math.nan
    y = decoupled_conv2d(**inputs.tensors, **inputs.options)
    bad = torch.zeros_like(y, dtype=torch.bool)
    bad[:, 3] = True
    assert torch.equal(y.isnan(), bad)


def test_non_positive_radius_tensors_meet_the_floor(backend: str, device: str) -> None:
    """Tensor values are not checked: rho is floored at 1e-12, where tanh is saturated."""
    inputs = plain_call(by_id("3x3"), device, magnitude="tanh", angular="cosine")
    radius = torch.zeros_like(inputs.tensors["radius"])
    sphere = run(inputs, magnitude="sphere", radius=1.0)
    check_equal("zero", run(inputs, radius=radius), sphere)
    check_equal("negative", run(inputs, radius=radius - 1.0), sphere)


def test_reference_signatures_are_those_of_the_functional() -> None:
    for name, extra in (("decoupled_conv2d", ["keep", "backend"]), ("patch_norm", ["backend"])):
        fast = inspect.signature(getattr(dcconv.functional, name)).parameters
        slow = inspect.signature(getattr(dcconv.operator.reference, name)).parameters
        assert [p for p in fast if p not in extra] == list(slow)
        assert all(fast[p].default == slow[p].default for p in slow)
        assert all(fast[p].kind == slow[p].kind for p in slow)


def test_reference_functions_run_the_definition() -> None:
    inputs = make_inputs(by_id("asymmetric"), magnitude="segmented", angular="linear")
    got = dcconv.operator.reference.decoupled_conv2d(**inputs.tensors, **inputs.options)
    assert torch.equal(got, evaluate(reference_call(), inputs)["y"])
    assert dcconv.operator.reference.patch_norm(torch.ones(4, 2, 2), 2, eps=1e-12).tolist() == [
        [[4.0]]
    ]
