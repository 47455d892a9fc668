"""The ops inside PyTorch: opcheck, compile, export, autocast, derivatives, memory."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from accuracy import check
from calls import check_call, convolution
from cases import CASES, DTYPES, OPERATORS, make_inputs
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import dcconv
from dcconv import backends, functional, native, warn
from dcconv.call import refusals
from dcconv.call.saved import kept
from dcconv.operator import numerics, reference
from dcconv.operator.functions import angulars, magnitudes
from dcconv.passes import backward, ops
from dcconv.tracing import asked_once

MODULES: tuple[dict[str, Any], ...] = (
    {},
    {"magnitude": "linear"},
    {"magnitude": "sphere", "angular": "sigmoid", "learn_k": True, "bias": True},
    {"magnitude": "ball", "angular": "square_cosine", "weighting": "linear"},
    {"magnitude": "segmented", "learn_radius": False, "padding": "same", "stride": 2},
)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
SPHERE: dict[str, Any] = {
    "magnitude": "sphere",
    "angular": "linear",
    "weighting": "none",
    "alpha": 1.0,
    "beta": 0.5,
    "power": 2.0,
    "eps": 1e-4,
    "padding_mode": "zeros",
}

cpu = pytest.mark.backend("cpu")


def module_ids(options: dict[str, Any]) -> str:
    """Name a module by what is special about it."""
    return "-".join(str(v) for v in options.values()) or "default"


def op_arguments(case: Any, dtype: torch.dtype, layout: str, **options: Any) -> tuple[Any, ...]:
    """Return the forward op's arguments, and the operands and problem they come from."""
    tensors, call = make_inputs(case, dtype, layout, **options)
    operands, problem, _ = check_call(**tensors, **call)
    return (*native.conv2d_arguments(operands, problem), True), operands, problem


@cpu
@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
def test_records_write_the_schemas_of_the_compiled_library(op: Any) -> None:
    compiled = getattr(torch.ops.dcconv, op.name).default._schema
    assert str(torch._C.parse_schema(f"dcconv::{op.name}{op.schema}")) == str(compiled)


@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
def test_records_are_laid_out_as_schemas_say(op: Any) -> None:
    """Arguments become a record and arguments again; those at the end may be left to defaults."""
    arguments = torch._C.parse_schema(f"dcconv::{op.name}{op.schema}").arguments
    numbers = tuple(range(len(arguments)))
    assert op.flat(op.record_of(*numbers)) == numbers
    required = [number for number in numbers if not arguments[number].has_default_value()]
    assert op.flat(op.record_of(*required))[: len(required)] == tuple(required)


@cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype, layout: str) -> None:
    # Without test_aot_dispatch_dynamic: the ops have no autograd formula of their own; tracing them
    # with a dynamic batch is what test_compile_full_graph does.
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for i, case in enumerate(CASES):
        if case.n == 0 and layout == "sliced":
            continue  # opcheck itself cannot copy an empty slice
        magnitude = ("tanh", "linear", "log")[i % 3]
        bias = i % 2 == 0
        arguments, operands, problem = op_arguments(
            case, dtype, layout, magnitude=magnitude, bias=bias
        )
        forward = torch.ops.dcconv.conv2d_forward.default
        torch.library.opcheck(forward, arguments, test_utils=tests)
        y, norm_map, mean, dot = forward(*arguments)
        mode = kept(problem, dtype, bias, "auto")
        saved = y if mode == "output" else dot
        needs = 1 | 2 | (4 if bias else 0) | (8 if operands.radius is not None else 0)
        for wanted in (needs, 1, 2):
            torch.library.opcheck(
                torch.ops.dcconv.conv2d_backward.default,
                (
                    torch.ones_like(y),
                    arguments[0],
                    arguments[1],
                    saved,
                    norm_map,
                    mean,
                    *arguments[3:-1],
                    True,
                    mode,
                    wanted,
                ),
                test_utils=tests,
            )
        geometry = [list(case.kernel), *arguments[6:11]]
        norm = torch.ops.dcconv.patch_norm_forward.default
        torch.library.opcheck(norm, (arguments[0], *geometry, 1e-4), test_utils=tests)
        b = norm(arguments[0], *geometry, 1e-4)
        torch.library.opcheck(
            torch.ops.dcconv.patch_norm_backward.default,
            (torch.ones_like(b), arguments[0], b, *geometry),
            test_utils=tests,
        )


@cpu
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", MODULES, ids=module_ids)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_full_graph(
    options: dict[str, Any], dtype: torch.dtype, layout: torch.memory_format, dynamic: bool
) -> None:
    """Training mode, several batch sizes: one graph, the same result, the same moving average."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = dcconv.DecoupledConv2d(4, 6, 3, dtype=dtype, **options).to(memory_format=layout)
    other = copy.deepcopy(eager)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(other, fullgraph=True, backend=counter, dynamic=dynamic or None)
    frames = 0
    for n in (3, 5, 7) if dynamic else (3, 3):
        x = torch.randn(n, 4, 9, 7, dtype=dtype).to(memory_format=layout)
        results = []
        for module in (eager, compiled):
            leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            y = module(leaf)
            parameters = list((eager if module is eager else other).parameters())
            results.append([y, *torch.autograd.grad(y, [leaf, *parameters], torch.ones_like(y))])
        assert results[0][0].stride() == results[1][0].stride()
        frames = frames or counter.frame_count
        for one, two in zip(*results, strict=True):
            check("compiled", two, one, one, dtype)
    if eager.norm_mean is not None:
        assert torch.equal(eager.norm_mean, other.norm_mean)
        assert int(other.norm_mean_steps) == (3 if dynamic else 2)
    # The first call may restart its own analysis; no later call compiles again.
    assert counter.frame_count == frames


@cpu
def test_compile_with_the_default_backend() -> None:
    """Inductor, forward and backward, in a chain with BatchNorm and an in-place ReLU."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = nn.Sequential(
        dcconv.DecoupledConv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        dcconv.DecoupledConv2d(8, 4, 3, magnitude="linear", angular="square_cosine"),
    ).to(memory_format=torch.channels_last)
    other, truth = copy.deepcopy(eager), copy.deepcopy(eager).double()
    compiled = torch.compile(other, fullgraph=True)
    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    results = []
    for model, network in ((truth, truth), (eager, eager), (other, compiled)):
        y = network(x.to(model[0].weight.dtype))
        y.square().sum().backward()
        results.append({"y": y.detach()} | {n: p.grad for n, p in model.named_parameters()})
    for name in results[0]:
        check(name, results[2][name], results[0][name], results[1][name], torch.float32)


@cpu
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_export(dtype: torch.dtype, training: bool) -> None:
    for options in MODULES[:4]:
        for layout in LAYOUTS:
            module = dcconv.DecoupledConv2d(4, 6, 3, dtype=dtype, **options).train(training)
            x = torch.randn(2, 4, 8, 7, dtype=dtype).to(memory_format=layout)
            program = torch.export.export(
                copy.deepcopy(module), (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},)
            )
            for n in (2, 5):
                x = torch.randn(n, 4, 8, 7, dtype=dtype).to(memory_format=layout)
                y = module(x)
                check("exported", program.module()(x), y, y, dtype)


@cpu
def test_flops_are_those_of_the_convolution() -> None:
    # One group: PyTorch's own formula counts the weight gradient of groups too high.
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    weight = torch.randn(6, 4, 3, 3, requires_grad=True)
    totals = []
    for call in (nn.functional.conv2d, functional.decoupled_conv2d):
        with FlopCounterMode(display=False) as counter:
            call(x, weight, None, 1, 1).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend: str, device: str, dtype: torch.dtype) -> None:
    """Output in the autocast dtype, float32 norms, and the result of casting by hand."""
    module = dcconv.DecoupledConv2d(4, 6, 3, bias=True, device=device)
    x = torch.randn(2, 4, 8, 8, device=device, requires_grad=True)
    seen = []
    with torch.autocast(device, dtype=dtype):
        y = module(x)
        half = functional.decoupled_conv2d(x, module.weight, radius=module.radius)
        mixed = functional.decoupled_conv2d(x.to(dtype), module.weight, radius=module.radius)
        seen.append(functional.patch_norm(x, 3).dtype)
    assert y.dtype == half.dtype == dtype and seen == [torch.float32]
    assert torch.equal(half, mixed)
    by_hand = functional.decoupled_conv2d(
        x.to(dtype), module.weight.to(dtype), radius=module.radius
    )
    assert torch.equal(half, by_hand)
    y.float().sum().backward()
    assert x.grad.dtype == module.weight.grad.dtype == module.radius_raw.grad.dtype == torch.float32
    with torch.autocast(device, dtype=dtype):
        double = functional.decoupled_conv2d(x.double(), module.weight.double())
    assert double.dtype == torch.float64


def small(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Float64 operands x, weight, radius, k of a tiny grouped problem."""
    torch.manual_seed(seed)
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    radius = (0.5 + torch.rand(4, dtype=torch.float64)).requires_grad_()
    k = (0.5 + torch.rand(4, dtype=torch.float64)).requires_grad_()
    return x, weight, radius, k


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("magnitude", "weighting", "angular"),
    [pytest.param(*operator, id="-".join(operator)) for operator in OPERATORS],
)
def test_gradcheck(backend: str, magnitude: str, weighting: str, angular: str, stride: int) -> None:
    """Analytic against numeric, with the mean norm of the batch, groups, dilation and a bias."""
    x, weight, radius, k = small()

    def call(*t: torch.Tensor) -> torch.Tensor:
        return functional.decoupled_conv2d(
            t[0],
            t[1],
            t[4],
            stride,
            1,
            (1, 2),
            2,
            radius=t[2],
            k=t[3],
            norm_mean="batch",
            magnitude=magnitude,
            weighting=weighting,
            angular=angular,
            power=2.5,
        )

    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    used = [x, weight, radius, k, bias]
    assert torch.autograd.gradcheck(call, used, fast_mode=True)


@pytest.mark.parametrize(
    ("magnitude", "weighting", "angular"),
    [
        ("tanh", "none", "cosine"),
        ("segmented", "none", "sigmoid"),
        ("mix", "linear", "power"),
        ("linear", "none", "cosine"),
        ("tanh", "product", "square_cosine"),
    ],
)
def test_gradgradcheck(backend: str, magnitude: str, weighting: str, angular: str) -> None:
    x, weight, radius, k = small()

    def call(*t: torch.Tensor) -> torch.Tensor:
        return functional.decoupled_conv2d(
            t[0],
            t[1],
            padding=1,
            groups=2,
            radius=t[2],
            k=t[3],
            norm_mean="batch",
            magnitude=magnitude,
            weighting=weighting,
            angular=angular,
            power=2.5,
        )

    assert torch.autograd.gradgradcheck(call, [x, weight, radius, k], fast_mode=True)


def test_patch_norm_gradchecks(backend: str) -> None:
    x = small()[0]
    for mode in ("zeros", "reflect", "replicate", "circular"):

        def call(x: torch.Tensor, mode: str = mode) -> torch.Tensor:
            return functional.patch_norm(x, (3, 2), 2, 1, 1, 2, padding_mode=mode)

        assert torch.autograd.gradcheck(call, [x], fast_mode=True)
        assert torch.autograd.gradgradcheck(call, [x], fast_mode=True)


def test_gradient_penalty(backend: str, device: str) -> None:
    """The use of second derivatives: a penalty on the input gradient, against the reference."""
    results = []
    for call in (functional.decoupled_conv2d, reference.decoupled_conv2d):
        x, weight, radius, _ = small()
        y = call(x, weight, groups=2, radius=radius, norm_mean="batch")
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (grad.norm() - 1).square().backward()
        results.append((x.grad, weight.grad, radius.grad))
    for got, want in zip(*results, strict=True):
        check("penalty", got, want, want, torch.float64)


def test_second_derivatives_of_operands_that_depend_on_each_other(backend: str) -> None:
    """The penalty's first half must not follow norm_mean and radius back to x by itself."""
    results = []
    for call, norm in (
        (functional.decoupled_conv2d, functional.patch_norm),
        (reference.decoupled_conv2d, reference.patch_norm),
    ):
        x, weight, radius, _ = small()
        mean = norm(x, (3, 2), groups=2).mean()
        y = call(x, weight, groups=2, radius=radius * x.mean().exp(), norm_mean=mean)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        results.append((grad.detach(), x.grad, weight.grad, radius.grad))
    for got, want in zip(*results, strict=True):
        check("dependent", got, want, want, torch.float64)


@cpu
def test_second_derivatives_ignore_an_active_autocast() -> None:
    x, weight, radius, _ = (t.detach().float().requires_grad_() for t in small())
    grads = []
    for enabled in (False, True):
        y = functional.decoupled_conv2d(x, weight, groups=2, radius=radius, norm_mean="batch")
        b = functional.patch_norm(x, 3)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            grads.append(
                [
                    *torch.autograd.grad(y.sum(), (x, weight), create_graph=True),
                    *torch.autograd.grad(b.sum(), x, create_graph=True),
                ]
            )
    for one, two in zip(*grads, strict=True):
        assert torch.equal(one, two)


@cpu
def test_function_transforms_run_on_the_reference() -> None:
    x, weight, radius, _ = (t.detach() for t in small())

    def call(weight: torch.Tensor) -> torch.Tensor:
        return functional.decoupled_conv2d(x, weight, groups=2, radius=radius)

    def plain(weight: torch.Tensor) -> torch.Tensor:
        return reference.decoupled_conv2d(x, weight, groups=2, radius=radius)

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        got = torch.func.grad(lambda w: call(w).square().sum())(weight)
        want = torch.func.grad(lambda w: plain(w).square().sum())(weight)
        check("grad", got, want, want, torch.float64)
        many = torch.stack((weight, 2 * weight))
        for transform in (torch.func.vmap, lambda f: lambda w: torch.func.jvp(f, (w,), (w,))[1]):
            argument = many if transform is torch.func.vmap else weight
            got, want = transform(call)(argument), transform(plain)(argument)
            check("transform", got, want, want, torch.float64)
    with pytest.raises(NotImplementedError, match=r"torch\.func transforms and forward-mode"):
        torch.func.vmap(lambda w: functional.decoupled_conv2d(x, w, groups=2, backend="cpu"))(many)


@cpu
def test_forward_mode_runs_on_the_reference() -> None:
    x, weight, _, _ = (t.detach() for t in small())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weight, weight)
        y = functional.decoupled_conv2d(x, dual, groups=2)
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    # Only the eps under the root keeps the operator from ignoring the scale of w.
    scaled = [
        functional.decoupled_conv2d(x, weight * s, groups=2, backend="reference")
        for s in (1 + 1e-5, 1 - 1e-5)
    ]
    numeric = (scaled[0] - scaled[1]) / 2e-5
    assert (tangent - numeric).abs().max() <= 1e-9


def saved_bytes(call: Any, *parameters: torch.Tensor) -> int:
    """Return the bytes of distinct storages that autograd keeps, parameters apart."""
    skip = {p.untyped_storage().data_ptr() for p in parameters}
    storages: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in skip:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    assert result is not None
    return sum(storages.values())


@cpu
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_keeps_x_and_one_output_and_the_norm_map(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    n, c, o, h = 2, 8, 16, 14
    x = torch.randn(n, c, h, h, dtype=dtype).to(memory_format=layout).requires_grad_()
    small_bytes = 8 * o * 3 + 64  # radius, k, bias and the mean
    for magnitude in magnitudes:
        for angular in angulars:
            for bias in (False, True):
                layer = dcconv.DecoupledConv2d(
                    c, o, 3, padding=1, bias=bias, dtype=dtype, magnitude=magnitude, angular=angular
                )
                element = x.element_size()
                limit = element * n * h * h * (c + o) + (8 if element == 8 else 4) * n * h * h
                kept_bytes = saved_bytes(lambda layer=layer: layer(x), layer.weight)
                assert kept_bytes <= limit + small_bytes, (magnitude, angular, bias)
                if magnitude == "linear" and angular == "cosine":
                    assert kept_bytes <= element * n * h * h * c + small_bytes


@cpu
def test_a_chain_keeps_what_a_plain_one_keeps_and_the_map() -> None:
    x = torch.randn(4, 8, 12, 12, requires_grad=True)

    def chain(layer: nn.Module) -> int:
        tail = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        return saved_bytes(lambda: tail(layer(x)), layer.weight, tail[0].weight)

    plain = chain(nn.Conv2d(8, 16, 3, bias=False))
    for angular in ("cosine", "square_cosine", "linear"):
        own = chain(dcconv.DecoupledConv2d(8, 16, 3, angular=angular))
        assert own - plain <= 4 * 4 * 10 * 10 + 4 * 16 * 2 + 64


@cpu
def test_in_place_relu_straight_after_the_layer() -> None:
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
    # y += shortcut, the residual form.
    layer = dcconv.DecoupledConv2d(3, 3, 1, keep="dot")
    y = layer(x)
    y += x
    y.sum().backward()
    # Norm-free operators keep neither, so they permit it whatever keep says.
    y = nn.functional.relu(dcconv.DecoupledConv2d(3, 4, 3, magnitude="linear")(x), inplace=True)
    y.sum().backward()


def test_saved_tensors_are_released(backend: str) -> None:
    layer = dcconv.DecoupledConv2d(3, 4, 3)
    y = layer(torch.randn(2, 3, 8, 8))
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


@cpu
def test_checkpointing_gives_the_same_gradients() -> None:
    layer = dcconv.DecoupledConv2d(3, 4, 3)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    want = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    got = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    for one, two in zip(got, want, strict=True):
        assert torch.equal(one, two)


def test_backend_choice_and_report(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3)
    text = backends.report(x, weight, magnitude="sphere")
    assert "sphere x cosine" in text
    assert "it runs on CUDA tensors, got a cpu tensor" in text
    chosen = backends.choose(x).name
    line = next(line for line in text.splitlines() if line.split()[0] == chosen)
    assert "runs this call" in line
    with backends.use_backend("reference"):
        assert backends.choose(x).name == "reference"
        assert "reference runs this call" in backends.report(x, weight).replace("  ", " ")
        with backends.use_backend("auto"):
            assert backends.choose(x).name == chosen
        assert backends.choose(x).name == "reference"
    assert backends.choose(x).name == chosen
    for name in ("cuda", "triton"):
        message = f"dcconv: backend '{name}' cannot run this call: it runs on CUDA tensors"
        with pytest.raises(NotImplementedError, match=message):
            functional.decoupled_conv2d(x, weight, backend=name)
        with backends.use_backend(name), pytest.raises(NotImplementedError, match=message):
            functional.patch_norm(x, 3)
    unknown = pytest.raises(ValueError, match="dcconv: backend must be one of auto, cuda")
    with unknown, backends.use_backend("cdua"):
        pass
    monkeypatch.setattr(backends, "_default", "cdua")
    with pytest.raises(ValueError, match="dcconv: DCCONV_BACKEND must be one of auto, cuda"):
        functional.decoupled_conv2d(x, weight)


def test_slow_choice_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing", "the compiled library is missing: test")
    monkeypatch.setattr(warn, "_said", set())
    x, weight = torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3)
    sentence = r"reference runs on cpu tensors \(cpu: the compiled"
    for call in (
        lambda: functional.decoupled_conv2d(x, weight),
        lambda: functional.patch_norm(x, 3),
        lambda: dcconv.DecoupledConv2d(3, 4, 3)(x),
    ):
        monkeypatch.setattr(warn, "_said", set())
        with pytest.warns(RuntimeWarning, match=sentence) as warned:
            call()
        assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        functional.decoupled_conv2d(x, weight)
        functional.decoupled_conv2d(x, weight, backend="reference")
    with pytest.raises(NotImplementedError, match="'cpu' cannot run this call: the compiled"):
        functional.decoupled_conv2d(x, weight, backend="cpu")


def test_tf32_widens_the_floor_of_the_angle(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the switch of the convolutions, old or new; only float32 on a GPU is concerned."""

    def delta(dtype: torch.dtype, device: str) -> float:
        with FakeTensorMode():
            x = torch.zeros(1, 3, 8, 8, dtype=dtype, device=device)
            return convolution(x, x, None, 1, 0, 1, 1, **SPHERE, radius=1.0, norm_mean=None, k=1.0)[
                1
            ].delta

    cudnn: Any = torch.backends.cudnn
    before = cudnn.allow_tf32
    try:
        for holder, switch, value, floor in (
            (cudnn, "allow_tf32", False, 1e-6),
            (cudnn, "allow_tf32", True, 1e-3),
            (cudnn.conv, "fp32_precision", "ieee", 1e-6),
            (cudnn.conv, "fp32_precision", "tf32", 1e-3),
        ):
            setattr(holder, switch, value)
            assert delta(torch.float32, "cuda") == floor
            assert delta(torch.float32, "cpu") == 1e-6
            for dtype in (torch.float64, torch.bfloat16, torch.float16):
                assert delta(dtype, "cuda") == numerics.ANGLE_DELTA[dtype]
        # MIOpen has no such convolutions.
        with monkeypatch.context() as patch:
            patch.setattr(torch.version, "hip", "7.0")
            assert delta(torch.float32, "cuda") == 1e-6
    finally:
        cudnn.allow_tf32 = before


def test_questions_to_the_gpu_are_traceable(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {3: 132}
    monkeypatch.setattr(refusals, "_why_not_gpu", asked_once(lambda index: "a test says so"))
    monkeypatch.setattr(backward, "_multiprocessors_of", asked_once(counts.pop))
    torch._dynamo.reset()

    def ask(x: torch.Tensor) -> tuple[Any, ...]:
        answers = (refusals._why_not_gpu(3), numerics.tf32_convolutions())
        return x + backward._multiprocessors_of(3), *answers

    got, *answers = torch.compile(ask, fullgraph=True, backend="eager")(torch.zeros(()))
    assert int(got) == 132 and backward._multiprocessors_of(3) == 132
    assert answers == ["a test says so", numerics.tf32_convolutions()]


@cpu
def test_values_of_tensor_parameters_are_not_read() -> None:
    """Non-positive tensor radii give what the formula gives, with rho on its floor."""
    x, weight, _, _ = (t.detach() for t in small())
    radius = torch.tensor([-1.0, 0.0, 1e-15, 1.0], dtype=torch.float64, requires_grad=True)
    results = []
    for call in (functional.decoupled_conv2d, reference.decoupled_conv2d):
        y = call(x, weight, groups=2, radius=radius)
        results.append((y, torch.autograd.grad(y.sum(), radius)[0]))
    check("y", results[0][0], results[1][0], results[1][0], torch.float64)
    check("radius", results[0][1], results[1][1], results[1][1], torch.float64)


def test_checks_run_before_any_op(backend: str) -> None:
    """A wrong call changes no state: the moving average of a failed forward stays."""
    layer = dcconv.DecoupledConv2d(3, 4, 3)
    before = layer.norm_mean.clone()
    with pytest.raises(
        ValueError, match=r"dcconv: weight\.size\(1\) must be in_channels / groups = 5, got 3"
    ):
        layer(torch.randn(2, 5, 8, 8))
    assert torch.equal(layer.norm_mean, before) and int(layer.norm_mean_steps) == 0
