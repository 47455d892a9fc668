"""The strategy library of the cuda backend on the CPU: its small ops are stood in for.

Providers implement the small ops for CPU tensors; ``small_ops`` runs every test with each of them
and takes them away again. The accuracy rule is the same as for every backend.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import builds
import pytest
import torch
import torch._dynamo.testing
from accuracy import check, evaluate, judge, random_cotangent
from cases import ANGULARS, CASES, DTYPES, LAYOUTS, OPERATORS, Case, Inputs, by_id, make_inputs
from emulated import ops_library
from library_model import flat_map, implementations
from random_problems import ALIGNED, SATURATED, problem
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from willing import records_with

import dcconv
from dcconv import backends, functional, native
from dcconv.operator import reference
from dcconv.operator.numerics import compute_dtype
from dcconv.passes import backward, ops, products, records

NORMS = ("batch", "given", "none")
FORMATS = (torch.contiguous_format, torch.channels_last)
SMALL_OPS = tuple(implementations)


def has_cpu_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"dcconv::{name}", "CPU")


@contextmanager
def model() -> Iterator[None]:
    """Register ``library_model`` for CPU tensors while the context lasts."""
    library = torch.library.Library("dcconv", "IMPL")
    try:
        for name, function in implementations.items():
            library.impl(name, function, "CPU")
        yield
    finally:
        library._destroy()
    assert not any(has_cpu_kernel(name) for name in SMALL_OPS)


@contextmanager
def emulated() -> Iterator[None]:
    """Register the CUDA sources, run in the SIMT model, for CPU tensors."""
    reason = builds.why_not(builds.FAST)
    if reason is not None:
        pytest.skip(reason)
    torch.ops.load_library(str(ops_library()))
    library = torch.library.Library("dcconv", "IMPL")
    try:
        for name in SMALL_OPS:
            library.impl(name, getattr(torch.ops.dcconv_simt, name).default, "CPU")
        yield
    finally:
        library._destroy()


PROVIDERS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "model": model,
    "emulated": emulated,
}


@pytest.fixture(scope="module", params=PROVIDERS)
def small_ops(request: pytest.FixtureRequest) -> Iterator[str]:
    """The provider of the small ops, while it is in force, with the cuda backend on CPU tensors."""
    if native.missing is not None:
        pytest.skip(native.missing)
    records = records_with(
        "cuda", lambda call: "not a CPU tensor" if call.device != "cpu" else None
    )
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, PROVIDERS[request.param]():
        patch.setattr(backends, "_BACKENDS", records)
        torch.set_num_threads(1)  # the tensors are tiny
        yield request.param
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def cuda_backend(small_ops: str) -> Iterator[None]:
    """Every call of a test runs by library."""
    with backends.use_backend("cuda"), backends.strategies("library"):
        yield


def ids(value: Any) -> str:
    if isinstance(value, tuple):
        return "-".join(value)
    return getattr(value, "id", None) or str(value).removeprefix("torch.")


def compare(name: str, inputs: Inputs, **extra: Any) -> None:
    """Judge y and all gradients by the accuracy rule."""
    cotangent = random_cotangent(inputs)
    got = evaluate(functional.decoupled_conv2d, inputs, cotangent, **extra)
    judge(name, inputs, cotangent, got)


@pytest.mark.parametrize("part", range(4))
def test_random_problems(part: int) -> None:
    """Few products, aligned vectors, constant and broadcast operands, saturated magnitudes."""
    for number in range(25 * part, 25 * (part + 1)):
        drawn = problem(number)
        compare(drawn.name, drawn.inputs)


@pytest.mark.parametrize("number", [*ALIGNED, *SATURATED])
def test_random_problems_that_magnify_rounding(number: int) -> None:
    drawn = problem(number)
    compare(drawn.name, drawn.inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_geometry_agrees_with_the_reference(case: Case, dtype: torch.dtype) -> None:
    start = 7 * CASES.index(case) + 13 * DTYPES.index(dtype)
    for i in range(2 * len(LAYOUTS)):
        magnitude, weighting, angular = OPERATORS[(start + 37 * i) % len(OPERATORS)]
        norm, scalar = NORMS[(start + i) % 3], (start + i) % 5 == 0
        bias = (start + i) % 4 == 0
        inputs = make_inputs(
            case,
            dtype,
            LAYOUTS[i % len(LAYOUTS)],
            magnitude=magnitude,
            weighting=weighting,
            angular=angular,
            norm=norm,
            bias=bias,
            scalar=scalar,
        )
        compare(f"{case.id} {i} {magnitude} {weighting} {angular}", inputs)


def test_parameters_may_be_strided() -> None:
    inputs = make_inputs(by_id("3x3-p1"), angular="sigmoid", bias=True)
    for name in ("bias", "radius", "k"):
        every_other = inputs.tensors[name].repeat_interleave(2)[::2]
        assert not every_other.is_contiguous()
        inputs.tensors[name] = every_other
    compare("strided", inputs)


@pytest.mark.parametrize("norm", ["given", "batch"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_launches_stay_within_the_budget(layout: str, norm: str, small_ops: str) -> None:
    if small_ops != "emulated":
        pytest.skip("only emulated ops launch kernels")
    # Everything that a kernel could be needed for: sums of rho, a, k and bias, the mean norm.
    inputs = make_inputs(
        by_id("3x3-p1"),
        torch.float32,
        layout,
        norm=norm,
        bias=True,
        weighting="product",
        angular="sigmoid",
    )
    leaves = {name: t.requires_grad_() for name, t in inputs.tensors.items()}
    before = torch.ops.dcconv_simt.launches()
    y = functional.decoupled_conv2d(**leaves, **inputs.options)
    between = torch.ops.dcconv_simt.launches()
    y.sum().backward()
    assert between - before == 4
    assert torch.ops.dcconv_simt.launches() - between == 4


# Functions that the compiler knows: magnitude, whether it has one radius, angular function. Linear
# with cosine is a plain convolution.
KNOWN = tuple(
    (magnitude, scalar, angular)
    for magnitude, scalar in (
        *(("tanh", False), ("tanh", True), ("ball", True), ("segmented", True)),
        *(("linear", False), ("sphere", False), ("log", False)),
    )
    for angular in ("cosine", "square_cosine")
    if (magnitude, angular) != ("linear", "cosine")
)

# Vectors of 16 bytes in both layouts; filters that are not a power of two of vectors; in groups.
WIDE = (
    Case("wide", 2, 16, 4, 8, 24, (3, 3), padding=1),
    Case("wide-groups2", 2, 32, 8, 4, 64, (1, 1), groups=2),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("kept", ["auto", "dot"])
@pytest.mark.parametrize(("magnitude", "scalar", "angular"), KNOWN)
def test_known_functions_agree_with_the_reference(
    magnitude: str, scalar: bool, angular: str, kept: str, dtype: torch.dtype
) -> None:
    for i, (case, layout) in enumerate(itertools.product(WIDE, ("contiguous", "channels_last"))):
        inputs = make_inputs(
            case,
            dtype,
            layout,
            magnitude=magnitude,
            angular=angular,
            norm=NORMS[i % 3],
            bias=kept == "dot" and i == 3,
            scalar=scalar,
            alpha=(1.25, 0.5)[i % 2],
            beta=0.75,
        )
        compare(f"{case.id} {layout}", inputs, keep=kept)


def test_the_epilogue_refuses_sums(small_ops: str) -> None:
    if small_ops != "emulated":
        pytest.skip("the model takes sums")
    inputs = make_inputs(by_id("3x3-p1"), torch.float32, angular="square_cosine")
    seen: list[records.Epilogue] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "conv2d_epilogue_", lambda call, namespace: seen.append(call))
        functional.decoupled_conv2d(**inputs.tensors, **inputs.options)
    (call,) = seen
    ops.conv2d_epilogue(call)
    with pytest.raises(RuntimeError, match=r"dcconv: map_is_norm must be true, .* got false"):
        ops.conv2d_epilogue(call._replace(map_is_norm=False))


# More channels than a block has threads, groups across that border, more tiles than blocks.
LARGE = (
    Case("tiles", 2, 64, 20, 16, 128, (1, 1)),
    Case("filter-chunks", 1, 8, 3, 3, 2088, (1, 1)),
    Case("channel-chunks-groups3", 1, 2088, 2, 3, 2088, (1, 1), groups=3),
    # Two sums per filter: more than shared memory holds.
    Case("filters-beyond-shared-memory", 1, 4, 2, 3, 6400, (1, 1)),
    Case("depthwise-300", 1, 300, 4, 4, 300, (3, 3), padding=1, groups=300),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("case", LARGE, ids=ids)
def test_large_layers_agree_with_the_reference(case: Case, dtype: torch.dtype) -> None:
    for i, layout in enumerate(FORMATS):
        inputs = make_inputs(
            case,
            dtype,
            ("contiguous", "channels_last")[i],
            magnitude=("tanh", "ball")[i],
            weighting=("product", "linear")[i],
            angular="square_cosine",
        )
        assert inputs.tensors["x"].is_contiguous(memory_format=layout)
        compare(case.id, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=ids)
@pytest.mark.parametrize("operator", OPERATORS, ids=ids)
def test_operator_agrees_with_the_reference(
    operator: tuple[str, str, str], dtype: torch.dtype
) -> None:
    magnitude, weighting, angular = operator
    for i, norm in enumerate(NORMS):
        inputs = make_inputs(
            by_id(("3x3-p1", "groups3-odd", "reflect-same-s2")[i]),
            dtype,
            LAYOUTS[(i + OPERATORS.index(operator)) % 2],
            magnitude=magnitude,
            weighting=weighting,
            angular=angular,
            norm=norm,
            alpha=1.25,
            beta=0.75,
            power=2.5,
        )
        compare(norm, inputs)


@pytest.mark.parametrize("padding", ["zeros", "same", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("weighting", ["none", "linear"])
@pytest.mark.parametrize("alpha", [1.0, 0.75])
def test_norm_free_operators(padding: str, weighting: str, alpha: float) -> None:
    case = by_id({"zeros": "groups3-odd", "same": "same-s2-even"}.get(padding, padding))
    for dtype in DTYPES:
        for layout in LAYOUTS:
            inputs = make_inputs(
                case,
                dtype,
                layout,
                magnitude="linear",
                weighting=weighting,
                alpha=alpha,
                bias=True,
            )
            compare(f"{dtype} {layout}", inputs)


@pytest.mark.parametrize("keep", ["output", "dot"])
@pytest.mark.parametrize("angular", ANGULARS)
def test_both_kept_tensors_are_exact_enough(angular: str, keep: str) -> None:
    for i, dtype in enumerate(DTYPES):
        refused = angular in ("sigmoid", "power") or (
            angular == "square_cosine" and dtype == torch.float16
        )
        if keep == "output" and refused:
            continue
        for magnitude in ("tanh", "log"):
            inputs = make_inputs(
                by_id("3x3-p1"), dtype, LAYOUTS[i % 2], magnitude=magnitude, angular=angular
            )
            compare(f"{dtype} {magnitude}", inputs, keep=keep)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_patch_norm_agrees_with_the_reference(case: Case) -> None:
    def run(function: Callable[..., Tensor], x: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        b = function(leaf, case.kernel, **case.geometry)
        cotangent = torch.linspace(0.5, 1.5, b.numel()).reshape(b.shape)
        (grad,) = torch.autograd.grad(b, leaf, cotangent.to(b.dtype))
        return [b.detach(), grad]

    for dtype in DTYPES:
        for layout in LAYOUTS:
            x = make_inputs(case, dtype, layout).tensors["x"]
            truth, peer = run(reference.patch_norm, x.double()), run(reference.patch_norm, x)
            got = run(functional.patch_norm, x)
            assert got[0].dtype == compute_dtype(dtype)
            for name, g, t, p in zip(("b", "grad_x"), got, truth, peer, strict=True):
                check(f"{dtype} {layout} {name}", g, t, p, dtype)


@pytest.mark.parametrize("keep", ["auto", "dot"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_has_the_strides_of_a_library_convolution(layout: str, keep: str) -> None:
    for case in CASES:
        if case.padding_mode != "zeros" or case.padding == "same":
            continue
        for magnitude in ("tanh", "linear"):
            tensors, options = make_inputs(case, torch.float32, layout, magnitude=magnitude)
            y = functional.decoupled_conv2d(**tensors, **options, keep=keep)
            geometry = {k: v for k, v in case.geometry.items() if k != "padding_mode"}
            library = nn.functional.conv2d(tensors["x"], tensors["weight"], **geometry)
            assert y.stride() == library.stride(), (case.id, magnitude)


@pytest.mark.parametrize("layout", FORMATS, ids=ids)
def test_dense_tensors_have_the_strides_of_new_ones(layout: torch.memory_format) -> None:
    """Whatever numbers a library gives one-element axes, and without making a view."""
    for shape, strides in (
        ((3, 1, 1, 1), (1, 7, 5, 3)),
        ((1, 4, 1, 1), (9, 1, 2, 3)),
        ((2, 1, 5, 6), (30, 8, 6, 1)),
        ((1, 3, 2, 1), (99, 2, 1, 1)),
        ((2, 3, 4, 5), (60, 20, 5, 1)),
        ((0, 3, 4, 5), (60, 20, 5, 1)),
    ):
        t = torch.empty_strided(shape, strides)
        t.copy_(torch.randn(shape))
        values = t.clone()
        dense = products.dense(t, layout)
        assert dense.stride() == torch.empty(shape, memory_format=layout).stride(), shape
        assert torch.equal(dense, values) and not dense._is_view()


def test_unwritten_elements_would_show(deterministic: bool) -> None:
    for i, name in enumerate(("3x3-p1", "groups3-odd", "reflect-same-s2", "depthwise", "n0")):
        for layout in ("contiguous", "channels_last"):
            compare(f"{name} {layout}", make_inputs(by_id(name), DTYPES[i % 4], layout))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "operator",
    [
        ("tanh", "none", "cosine"),
        ("ball", "linear", "sigmoid"),
        ("tanh", "separate", "power"),
        ("log", "linear", "linear"),
        ("linear", "none", "cosine"),
        ("linear", "linear", "cosine"),
    ],
    ids=ids,
)
def test_gradients_only_where_they_are_asked_for(operator: tuple[str, str, str], norm: str) -> None:
    """Each alone and all but each: every choice of sums, barrier and library gradients."""
    magnitude, weighting, angular = operator
    inputs = make_inputs(
        by_id("groups3-odd"),
        magnitude=magnitude,
        weighting=weighting,
        angular=angular,
        norm=norm,
        bias=True,
    )
    cotangent = random_cotangent(inputs)
    full = evaluate(functional.decoupled_conv2d, inputs, cotangent)
    names = tuple(inputs.tensors)
    for wanted in [{name} for name in names] + [set(names) - {name} for name in names]:
        tensors = {
            name: t.detach().requires_grad_(name in wanted) for name, t in inputs.tensors.items()
        }
        y = functional.decoupled_conv2d(**tensors, **inputs.options)
        y.backward(cotangent)
        for name, t in tensors.items():
            if name in wanted:
                check(name, t.grad, full[name], full[name], torch.float64)
            else:
                assert t.grad is None


def test_detached_mean_norm_has_no_gradient() -> None:
    layer = dcconv.DecoupledConv2d(3, 4, 3, dtype=torch.float64, norm_mean_grad=False)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(layer(x).sum(), x)
    mean = reference.patch_norm(x.detach(), 3).mean()
    y = reference.decoupled_conv2d(x, layer.weight, radius=layer.radius, norm_mean=mean)
    (want,) = torch.autograd.grad(y.sum(), x)
    check("grad_x", got, want, want, torch.float64)


def test_radii_on_their_floor_have_no_gradient() -> None:
    radius = torch.tensor([-1.0, 0.0, 1e-15, 1.0], dtype=torch.float64, requires_grad=True)
    # h of tanh is flat there by itself, that of segmented is not.
    for options in ({}, {"norm_mean": "batch"}, {"magnitude": "segmented", "norm_mean": "batch"}):
        results = []
        for call in (functional.decoupled_conv2d, reference.decoupled_conv2d):
            x, weight, _, _ = small()
            y = call(x, weight, groups=2, radius=radius, **options)
            results.append((y.detach(), *torch.autograd.grad(y.sum(), (radius, x, weight))))
        for got, want in zip(*results, strict=True):
            check(str(options), got, want, want, torch.float64)


def test_empty_batch() -> None:
    for magnitude in ("tanh", "linear"):
        for layout in FORMATS:
            x = torch.zeros(0, 3, 5, 6).to(memory_format=layout).requires_grad_()
            layer = dcconv.DecoupledConv2d(3, 4, 3, bias=True, magnitude=magnitude)
            y = layer(x)
            y.sum().backward()
            assert y.shape == (0, 4, 3, 4)
            assert x.grad is not None and x.grad.shape == x.shape
            for name, p in layer.named_parameters():
                assert p.grad is not None and not p.grad.any(), name


class Recorder(TorchDispatchMode):
    """Keeps the calls of dcconv's ops, their tensors copied."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "dcconv":
            copies = tuple(t.clone() if isinstance(t, Tensor) else t for t in args)
            self.calls.append((func, copies))
        return func(*args, **(kwargs or {}))

    def names(self) -> list[str]:
        return [func._schema.name.removeprefix("dcconv::") for func, _ in self.calls]


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_map_holds_norms_whether_or_not_their_mean_is_wanted(case: Case) -> None:
    for dtype, layout in itertools.product(DTYPES, FORMATS):
        inputs = make_inputs(case, dtype, norm="given")
        inputs.tensors["x"] = x = inputs.tensors["x"].contiguous(memory_format=layout)
        inputs.tensors["weight"] = inputs.tensors["weight"].contiguous(memory_format=layout)
        with Recorder() as recorder:
            functional.decoupled_conv2d(**inputs.tensors, **inputs.options)
        norms, arguments = recorder.calls[0]
        *operands, batch_mean, last = arguments
        assert norms._schema.name == "dcconv::conv2d_norms" and not batch_mean
        a, b, absent = norms(*operands, False, last)
        same_a, same_b, mean = norms(*operands, True, last)
        assert torch.equal(a, same_a) and torch.equal(b, same_b)
        assert absent.shape == (0,) and mean.shape == ()
        of_windows = functional.patch_norm(x, case.kernel, **case.geometry)
        assert torch.equal(b, flat_map(of_windows, last))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_opcheck_of_every_small_op(dtype: torch.dtype, layout: str) -> None:
    seen: set[str] = set()
    for i, case in enumerate(CASES):
        extreme = case.id in ("n0", "one-pixel", "same-s2-even")
        if i % 4 != DTYPES.index(dtype) and not extreme:
            continue
        variants = (("linear", "auto"), ("tanh", "dot"), ("log", "auto"))
        for magnitude, keep in variants if extreme else variants[i // 4 % 3 :][:1]:
            inputs = make_inputs(case, dtype, layout, magnitude=magnitude, norm=NORMS[i % 3])
            with Recorder() as recorder:
                evaluate(functional.decoupled_conv2d, inputs, random_cotangent(inputs), keep=keep)
                x = inputs.tensors["x"].detach().requires_grad_()
                functional.patch_norm(x, case.kernel, **case.geometry).sum().backward()
            for func, arguments in recorder.calls:
                torch.library.opcheck(
                    func,
                    arguments,
                    test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
                )
            seen |= set(recorder.names())
    assert seen == set(SMALL_OPS)


def test_backward_computes_no_more_than_is_wanted() -> None:
    """Passes per call, the budget of launches; t, sums and library gradients as needed."""

    def calls(wanted: set[str], **options: Any) -> tuple[list[str], dict[str, Any]]:
        inputs = make_inputs(by_id("3x3-p1"), torch.float32, bias=True, **options)
        tensors = {name: t.requires_grad_(name in wanted) for name, t in inputs.tensors.items()}
        y = functional.decoupled_conv2d(**tensors, **inputs.options)
        with Recorder() as recorder:
            y.sum().backward()
        found = {"wants_t": None, "sums": None, "barrier": None}
        for func, arguments in recorder.calls:
            names = [a.name for a in func._schema.arguments]
            found |= {n: v for n, v in zip(names, arguments, strict=True) if n in found}
        return recorder.names(), found

    dot, filters, finish = "conv2d_grad_dot", "conv2d_grad_filters", "conv2d_grad_input_"
    everything = {"x", "weight", "bias", "radius", "norm_mean", "k"}
    names, found = calls(everything)
    assert names == [dot, filters, finish]
    rho, a, k, bias = records.SUM_RHO, records.SUM_A, records.SUM_K, records.SUM_BIAS
    assert found == {"wants_t": True, "sums": rho | bias, "barrier": True}
    assert calls({"x"}, norm="given") == (
        [dot, finish],
        {"wants_t": True, "sums": 0, "barrier": None},
    )
    assert calls({"x"})[1] == {"wants_t": True, "sums": rho, "barrier": True}
    assert calls({"norm_mean"}, norm="given")[1]["sums"] == rho
    names, found = calls({"weight", "k"}, weighting="linear", angular="sigmoid")
    assert names == [dot, filters]
    assert found == {"wants_t": False, "sums": a | k, "barrier": False}
    assert calls({"x", "weight"}, magnitude="linear")[0] == ["filter_scale", "filter_scale_grad"]
    assert calls({"x", "weight"}, magnitude="linear", weighting="linear")[0] == []


def test_partial_rows_follow_the_problem_and_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    assert backward.partial_rows(x, 0, 1, True) == 1
    assert backward.partial_rows(x, 65, 1, True) == 2
    assert backward.partial_rows(x, 10**6, 100, True) == 8
    assert backward.partial_rows(x, 10**6, 4, False) == 2
    assert backward.partial_rows(x, 10**6, 100, False) == 1
    monkeypatch.setattr(backward, "_multiprocessors_of", {3: 132}.get)

    class OnGpu(NamedDevice):
        device = torch.device("cuda", 3)

    assert backward.partial_rows(OnGpu(), 10**6, 1, True) == 528


class NamedDevice(Tensor):
    """A tensor that says it is elsewhere."""


MODULES: tuple[dict[str, Any], ...] = (
    {},
    {"magnitude": "linear", "bias": True},
    {"magnitude": "linear", "padding": "same", "stride": 2},
    {"magnitude": "sphere", "angular": "sigmoid", "learn_k": True, "bias": True},
    {"magnitude": "ball", "weighting": "linear", "padding": 1, "padding_mode": "reflect"},
    {"magnitude": "tanh", "weighting": "separate", "radius_unit": "absolute", "padding": 1},
)


def module_ids(options: dict[str, Any]) -> str:
    return "-".join(str(v) for v in options.values()) or "default"


@pytest.mark.parametrize("options", MODULES, ids=module_ids)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_full_graph(options: dict[str, Any], dynamic: bool) -> None:
    """Forward and backward, several batch sizes: one graph, the same result."""
    torch._dynamo.reset()
    layout = FORMATS[(MODULES.index(options) + dynamic) % 2]
    eager = dcconv.DecoupledConv2d(4, 6, 3, **options).to(memory_format=layout)
    other = copy.deepcopy(eager)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(other, fullgraph=True, backend=counter, dynamic=dynamic or None)
    frames = 0
    # With rows of partial sums below and at their limit; at 16 the library itself chooses anew.
    for n in (3, 5, 15) if dynamic else (3, 3):
        x = torch.randn(n, 4, 9, 7).to(memory_format=layout)
        results = []
        for module in (eager, compiled):
            leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            y = module(leaf)
            parameters = list((eager if module is eager else other).parameters())
            results.append([y, *torch.autograd.grad(y, [leaf, *parameters], torch.ones_like(y))])
        assert results[0][0].stride() == results[1][0].stride()
        frames = frames or counter.frame_count
        for one, two in zip(*results, strict=True):
            check("compiled", two, one, one, torch.float32)
    assert counter.frame_count == frames


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_export(training: bool) -> None:
    for options in MODULES[:4]:
        for layout in FORMATS:
            module = dcconv.DecoupledConv2d(4, 6, 3, **options).train(training)
            x = torch.randn(2, 4, 8, 7).to(memory_format=layout)
            program = torch.export.export(
                copy.deepcopy(module), (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},)
            )
            names = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
            assert any(name.startswith("aten.conv") for name in names), names
            for n in (2, 5):
                x = torch.randn(n, 4, 8, 7).to(memory_format=layout)
                y = module(x)
                check("exported", program.module()(x), y, y, torch.float32)


@pytest.mark.parametrize("options", [{}, {"magnitude": "linear"}, {"norm_mean": "batch"}])
def test_flops_are_those_of_the_convolution(options: dict[str, Any]) -> None:
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    weight = torch.randn(6, 4, 3, 3, requires_grad=True)
    totals = []
    for call, extra in ((nn.functional.conv2d, {}), (functional.decoupled_conv2d, options)):
        with FlopCounterMode(display=False) as counter:
            call(x, weight, None, 1, 1, **extra).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


def small() -> tuple[Tensor, ...]:
    """Float64 operands x, weight, radius, k of a tiny grouped problem."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    radius = (0.5 + torch.rand(4, dtype=torch.float64)).requires_grad_()
    k = (0.5 + torch.rand(4, dtype=torch.float64)).requires_grad_()
    return x, weight, radius, k


@pytest.mark.parametrize(
    "operator",
    [
        ("tanh", "none", "cosine"),
        ("segmented", "linear", "sigmoid"),
        ("linear", "none", "cosine"),
    ],
    ids=ids,
)
def test_gradcheck(operator: tuple[str, str, str]) -> None:
    x, weight, radius, k = small()
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    magnitude, weighting, angular = operator

    def call(*t: Tensor) -> Tensor:
        return functional.decoupled_conv2d(
            t[0],
            t[1],
            t[4],
            2,
            "same",
            groups=2,
            radius=t[2],
            k=t[3],
            norm_mean="batch",
            magnitude=magnitude,
            weighting=weighting,
            angular=angular,
            power=2.5,
        )

    assert torch.autograd.gradcheck(call, [x, weight, radius, k, bias], fast_mode=True)
    assert torch.autograd.gradgradcheck(call, [x, weight, radius, k, bias], fast_mode=True)


def test_patch_norm_gradchecks() -> None:
    for mode in ("zeros", "reflect", "replicate", "circular"):

        def call(x: Tensor, mode: str = mode) -> Tensor:
            return functional.patch_norm(x, (3, 2), 2, 1, 1, 2, padding_mode=mode)

        assert torch.autograd.gradcheck(call, [small()[0]], fast_mode=True)
        assert torch.autograd.gradgradcheck(call, [small()[0]], fast_mode=True)


@pytest.mark.parametrize("layout", FORMATS, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_backward_keeps_x_and_one_output_and_the_norm_map(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    n, c, o, h = 2, 8, 16, 14
    x = torch.randn(n, c, h, h, dtype=dtype).to(memory_format=layout).requires_grad_()
    element = x.element_size()
    norm_map = (8 if element == 8 else 4) * n * h * h
    for magnitude, angular, bias, outputs in (
        ("tanh", "cosine", False, 1),
        ("tanh", "cosine", True, 1),
        ("log", "sigmoid", False, 1),
        ("linear", "cosine", True, 0),
    ):
        layer = dcconv.DecoupledConv2d(
            c, o, 3, padding=1, bias=bias, dtype=dtype, magnitude=magnitude, angular=angular
        )
        storages: dict[int, int] = {}

        def pack(t: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = layer(x)
        assert y.requires_grad
        storages.pop(layer.weight.untyped_storage().data_ptr())
        limit = element * n * h * h * (c + outputs * o) + outputs * norm_map
        # Radius, its root, k, a, bias and the mean.
        assert sum(storages.values()) <= limit + 8 * o * 5 + 64, (magnitude, angular, bias)


def test_in_place_operations_on_the_output() -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    keeping_output = dcconv.DecoupledConv2d(3, 4, 3, keep="output")
    y = nn.functional.relu(keeping_output(x), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    grads = []
    for inplace in (True, False):
        layer = copy.deepcopy(keeping_output)
        layer.keep = "dot"
        y = nn.functional.relu(layer(x), inplace=inplace)
        grads.append(torch.autograd.grad(y.sum(), [x, *layer.parameters()]))
    for one, two in zip(*grads, strict=True):
        assert torch.equal(one, two)
    # One pixel of one channel: the library's strides are its own there, and y is no view.
    for magnitude in ("tanh", "linear"):
        for case in (Case("one", 1, 1, 3, 3, 1, (3, 3)), Case("many", 3, 1, 1, 1, 1, (1, 1))):
            for layout in LAYOUTS:
                tensors, options = make_inputs(case, torch.float32, layout, magnitude=magnitude)
                tensors["x"].requires_grad_()
                y = functional.decoupled_conv2d(**tensors, **options, keep="dot")
                y += 1
                y.sum().backward()


def test_backward_ignores_an_active_autocast() -> None:
    grads = []
    for enabled in (False, True):
        x, weight, radius, _ = (t.detach().float().requires_grad_() for t in small())
        y = functional.decoupled_conv2d(x, weight, groups=2, radius=radius, norm_mean="batch")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(y.sum(), (x, weight, radius)))
    for one, two in zip(*grads, strict=True):
        assert torch.equal(one, two)


def test_autocast() -> None:
    layer = dcconv.DecoupledConv2d(4, 6, 3, bias=True)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_report_names_the_strategy() -> None:
    lines = backends.report(torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3)).splitlines()
    place = next(i for i, line in enumerate(lines) if line.split()[0] == "cuda")
    assert lines[place].endswith("runs this call")
    assert lines[place + 1].strip().startswith("forward: library (library convolution and fused")
