"""The strategy fused, alone and mixed with library: on models of the ops and emulated kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import fused_model
import pytest
import torch
import torch._dynamo.testing
from accuracy import check, check_all, evaluate, random_cotangent, truth_and_peer
from calls import check_call
from cases import DTYPES, OPERATORS, Case, Inputs, by_id, make_inputs
from stand_ins import MODELS, Recorder, cuda_backend_on_cpu, emulated
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import dcconv
from dcconv import backends, functional
from dcconv.call.implementations import IMPLEMENTATIONS
from dcconv.call.strategy import choose
from dcconv.operator.numerics import compute_dtype
from dcconv.operator.records import Problem
from dcconv.passes import fused
from dcconv.passes.backward import partial_rows
from dcconv.passes.records import INPUT_GRADIENT, WEIGHT_GRADIENT

NORMS = ("batch", "given", "none")
HALF = (torch.bfloat16, torch.float16)

GEMM = (
    Case("1x1", 2, 16, 5, 6, 8, (1, 1)),
    Case("1x1-s2", 2, 8, 7, 6, 16, (1, 1), stride=2),
    Case("1x1-p1", 2, 8, 4, 5, 8, (1, 1), padding=1),
    Case("1x1-groups2", 2, 16, 4, 5, 16, (1, 1), groups=2),
    Case("3x3-p1", 2, 16, 6, 7, 24, (3, 3), padding=1),
    Case("groups2-s2-dilation2", 2, 16, 9, 9, 16, (2, 3), 2, 1, 2, groups=2),
    Case("dilation2", 2, 8, 9, 8, 8, (3, 3), padding=2, dilation=2),
    Case("same-even-kernel", 2, 8, 6, 5, 8, (2, 4), padding="same"),
    Case("same-s2", 2, 8, 8, 6, 8, (3, 3), 2, "same"),
)
DEPTHWISE = (
    by_id("depthwise"),
    by_id("depthwise-multiplier3"),
    Case("depthwise-same-s2", 2, 4, 8, 6, 4, (3, 3), 2, "same", groups=4),
)
SMALL_GROUPS = (
    Case("groups-of-2-to-3", 2, 6, 5, 6, 9, (3, 3), padding=1, groups=3),
    Case("groups-of-7-s2", 2, 14, 6, 5, 4, (3, 2), 2, 1, groups=2),
)
STEMS = tuple(
    by_id(name)
    for name in (
        "padding-beyond-kernel",
        "3x3-s2-p1",
        "7x7-s2-p3",
        "asymmetric",
        "same-s2-even",
        "one-pixel",
    )
)
ALL = (*GEMM, *DEPTHWISE, *SMALL_GROUPS, *STEMS)

ONE_PASS, GRAD_INPUT = "conv2d_one_pass", "conv2d_one_pass_grad_input"
GRAD_WEIGHT = "depthwise_grad_weight"


# What the ops of library and fused are on CPU tensors.
PROVIDERS: dict[str, Callable[[], dict[str, Callable[..., Any]]]] = {
    "model": lambda: MODELS,
    "emulated": emulated,
}


@pytest.fixture(scope="module", autouse=True, params=PROVIDERS)
def ran(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """The names of the ops that ran, with the cuda backend on CPU tensors."""
    with cuda_backend_on_cpu(PROVIDERS[request.param]()) as names:
        yield names


# Tracing needs no kernels.
by_model = pytest.mark.parametrize("ran", ["model"], indirect=True)


def ids(value: Any) -> str:
    return getattr(value, "id", None) or str(value).removeprefix("torch.")


def dtypes_of(case: Case) -> tuple[torch.dtype, ...]:
    """Return what the fused forward takes of a case."""
    if case in GEMM:
        return HALF
    return DTYPES[1:] if case.id == "7x7-s2-p3" else DTYPES


def takes(case: Case) -> tuple[bool, bool]:
    """Whether fused has the gradients of the input and of the weight of a case."""
    if case in GEMM:
        return case.stride == 1, False
    return case in (*DEPTHWISE, *SMALL_GROUPS), case in DEPTHWISE


def forced(case: Case, mix: str) -> AbstractContextManager[None]:
    """Force fused in forward, backward or both, where it has the direction."""
    grad_x, grad_weight = (
        "fused" if there and mix != "forward" else "library" for there in takes(case)
    )
    return backends.strategies(
        "library" if mix == "backward" else "fused",
        input_gradient=grad_x,
        weight_gradient=grad_weight,
    )


def expected(case: Case, mix: str) -> set[str]:
    """Return the fused ops that a call and its backward run."""
    grad_x, grad_weight = takes(case)
    found = set() if mix == "backward" else {ONE_PASS}
    if mix != "forward":
        found |= ({GRAD_INPUT} if grad_x else set()) | ({GRAD_WEIGHT} if grad_weight else set())
    return found


def compare(case: Case, mix: str, inputs: Inputs, **extra: Any) -> list[str]:
    """Judge y and all gradients by the accuracy rule; return the ops that ran."""
    cotangent = random_cotangent(inputs)
    truth, peer = truth_and_peer(inputs, cotangent)
    with forced(case, mix), Recorder() as recorder:
        got = evaluate(functional.decoupled_conv2d, inputs, cotangent, **extra)
    check_all(f"{case.id} {mix}", got, truth, peer, inputs.tensors["x"].dtype)
    assert set(recorder.names) & {ONE_PASS, GRAD_INPUT, GRAD_WEIGHT} == expected(case, mix)
    return recorder.names


@pytest.mark.parametrize("mix", ["both", "forward", "backward"])
@pytest.mark.parametrize("case", ALL, ids=ids)
def test_agrees_with_the_reference(case: Case, mix: str) -> None:
    start = 7 * ALL.index(case) + 3 * len(mix)
    for i in range(6):
        magnitude, weighting, angular = OPERATORS[(start + 37 * i) % len(OPERATORS)]
        if (magnitude, angular) == ("linear", "cosine"):
            continue  # norm-free
        dtype = dtypes_of(case)[i % len(dtypes_of(case))]
        layouts = ("channels_last",) if case in GEMM else ("contiguous", "channels_last", "sliced")
        layout = layouts[(start + i) % len(layouts)]
        inputs = make_inputs(
            case,
            dtype,
            layout,
            magnitude=magnitude,
            weighting=weighting,
            angular=angular,
            norm=NORMS[(start + i) % 3],
            bias=i == 5,
        )
        compare(case, mix, inputs, keep="dot" if i == 4 else "auto")


@pytest.mark.parametrize("case", [GEMM[0], GEMM[4], DEPTHWISE[0], STEMS[2]], ids=ids)
def test_norms_are_found_in_the_pass_where_that_is_cheap(case: Case) -> None:
    overlapping = case is GEMM[4]
    for norm in NORMS:
        inputs = make_inputs(case, torch.bfloat16, "channels_last", norm=norm)
        before = compare(case, "forward", inputs)[0]
        assert before == ("conv2d_norms" if norm == "batch" or overlapping else "filter_norm"), norm


def test_weight_in_another_layout_than_x() -> None:
    inputs = make_inputs(GEMM[4], torch.bfloat16, "channels_last")
    for contiguous in ("x", "weight"):
        tensors = dict(inputs.tensors)
        tensors[contiguous] = tensors[contiguous].contiguous()
        compare(GEMM[4], "both", Inputs(tensors, inputs.options))


@pytest.mark.parametrize("norm", ["batch", "given"])
def test_gradients_only_where_they_are_asked_for(norm: str) -> None:
    """The library computes what fused does not, and nothing twice."""
    for case, expected_names in (
        (GEMM[4], {"x": [GRAD_INPUT], "weight": ["convolution_backward"]}),
        (DEPTHWISE[0], {"x": [GRAD_INPUT], "weight": [GRAD_WEIGHT]}),
        (SMALL_GROUPS[0], {"x": [GRAD_INPUT], "weight": ["convolution_backward"]}),
    ):
        inputs = make_inputs(case, torch.bfloat16, "channels_last", norm=norm, bias=True)
        cotangent = random_cotangent(inputs)
        with forced(case, "both"):
            full = evaluate(functional.decoupled_conv2d, inputs, cotangent)
            for wanted in ({"x"}, {"weight"}, {"x", "weight"}, {"radius"}):
                tensors = {
                    name: t.detach().requires_grad_(name in wanted)
                    for name, t in inputs.tensors.items()
                }
                y = functional.decoupled_conv2d(**tensors, **inputs.options)
                with Recorder() as recorder:
                    y.backward(cotangent)
                makers = (GRAD_INPUT, GRAD_WEIGHT, "convolution_backward")
                made = [name for name in recorder.names if name in makers]
                assert sorted(made) == sorted(
                    name for w in wanted for name in expected_names.get(w, [])
                )
                for name in wanted:
                    check(name, tensors[name].grad, full[name], full[name], torch.bfloat16)


def test_partial_sums_of_long_filters_take_no_more_than_the_gradient() -> None:
    case = Case("long", 2, 2, 16, 16, 2, (15, 15), padding=7, groups=2)
    assert partial_rows(torch.empty(0), 512, 2, True) > 512 // 225
    inputs = make_inputs(case, torch.float32, "channels_last")
    with backends.strategies("fused"), Recorder() as recorder:
        evaluate(functional.decoupled_conv2d, inputs, random_cotangent(inputs))
    names = [a.name for a in torch.ops.dcconv.depthwise_grad_weight.default._schema.arguments]
    (arguments,) = [a for f, a in recorder.calls if f._schema.name.endswith(GRAD_WEIGHT)]
    assert arguments[names.index("rows")] == 512 // 225


def test_inference_writes_no_norm_map() -> None:
    for case in (GEMM[4], DEPTHWISE[0]):
        inputs = make_inputs(case, torch.bfloat16, "channels_last", norm="none")
        kept = []
        for grad in (False, True):
            tensors = {name: t.requires_grad_(grad) for name, t in inputs.tensors.items()}
            with forced(case, "both"), Recorder() as recorder:
                functional.decoupled_conv2d(**tensors, **inputs.options)
            names = [a.name for a in torch.ops.dcconv.conv2d_one_pass.default._schema.arguments]
            (arguments,) = [a for f, a in recorder.calls if f._schema.name.endswith(ONE_PASS)]
            kept.append(arguments[names.index("keep_norm")])
        assert kept == [False, True]


def test_opcheck_of_every_op() -> None:
    seen: set[str] = set()
    for i, case in enumerate((GEMM[1], GEMM[4], GEMM[7], *DEPTHWISE, *STEMS[:3])):
        dtypes = dtypes_of(case)
        layouts = ("channels_last",) if case in GEMM else ("contiguous", "channels_last")
        for layout in layouts:
            inputs = make_inputs(case, dtypes[i % len(dtypes)], layout, norm=NORMS[i % 3])
            with forced(case, "both"), Recorder() as recorder:
                cotangent = random_cotangent(inputs)
                evaluate(
                    functional.decoupled_conv2d, inputs, cotangent, keep=("auto", "dot")[i % 2]
                )
                with torch.no_grad():
                    functional.decoupled_conv2d(**inputs.tensors, **inputs.options)
            for func, arguments in recorder.calls:
                name = func._schema.name.partition("::")[2]
                if name in fused_model.implementations:
                    seen.add(name)
                    torch.library.opcheck(
                        func,
                        arguments,
                        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
                    )
    assert seen == set(fused_model.implementations)


MODULES: dict[str, tuple[Case, dict[str, Any]]] = {
    "gemm": (GEMM[4], {}),
    "gemm-same-s2": (GEMM[8], {"magnitude": "sphere", "angular": "sigmoid", "bias": True}),
    "depthwise": (DEPTHWISE[0], {"magnitude": "log"}),
    "stem": (STEMS[2], {"magnitude": "ball", "weighting": "linear"}),
}


def module_of(name: str) -> tuple[nn.Module, Case]:
    case, options = MODULES[name]
    module = dcconv.DecoupledConv2d(
        case.c, case.o, case.kernel, **case.geometry, **options, dtype=torch.bfloat16
    )
    return module.to(memory_format=torch.channels_last), case


def image(case: Case, n: int) -> Tensor:
    x = torch.randn(n, case.c, case.h, case.w, dtype=torch.bfloat16)
    return x.to(memory_format=torch.channels_last)


@by_model
@pytest.mark.parametrize("name", ["gemm-same-s2", "depthwise"])
def test_compile_full_graph(name: str, ran: list[str]) -> None:
    """One graph for every batch size, with the fused ops in it and the same result."""
    torch._dynamo.reset()
    eager, case = module_of(name)
    other = copy.deepcopy(eager)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(other, fullgraph=True, backend=counter, dynamic=True)
    frames = 0
    with forced(case, "both"):
        for n in (9, 13):
            x = image(case, n)
            results = []
            for module in (eager, compiled):
                leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
                ran.clear()
                y = module(leaf)
                parameters = list((eager if module is eager else other).parameters())
                grads = torch.autograd.grad(y, [leaf, *parameters], torch.ones_like(y))
                assert expected(case, "both") <= set(ran)
                results.append([y, *grads])
            assert results[0][0].stride() == results[1][0].stride()
            frames = frames or counter.frame_count
            for one, two in zip(*results, strict=True):
                check("compiled", two, one, one, torch.bfloat16)
    assert counter.frame_count == frames


@by_model
def test_compiled_code_follows_the_allowed_strategies(ran: list[str]) -> None:
    torch._dynamo.reset()
    module, case = module_of("gemm")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for names, there in (("fused", True), ("library", False), ("library,fused", True)):
        ran.clear()
        with backends.strategies(names), torch.no_grad():
            compiled(image(case, 2))
        assert (ONE_PASS in ran) == there, names


@by_model
@pytest.mark.parametrize("name", MODULES)
def test_export(name: str, ran: list[str]) -> None:
    module, case = module_of(name)
    module.eval()
    with forced(case, "both"):
        program = torch.export.export(
            copy.deepcopy(module),
            (image(case, 2),),
            dynamic_shapes=({0: torch.export.Dim("n", min=2)},),
        )
        names = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
        assert "dcconv.conv2d_one_pass.default" in names
        x = image(case, 5)
        y = module(x)
        check("exported", program.module()(x), y, y, torch.bfloat16)


@by_model
@pytest.mark.parametrize("mix", ["both", "forward", "backward"])
def test_flops_are_those_of_the_convolution(mix: str, ran: list[str]) -> None:
    for case in (GEMM[4], DEPTHWISE[0], STEMS[2]):
        inputs = make_inputs(case, torch.bfloat16, "channels_last")
        geometry = {k: v for k, v in case.geometry.items() if k != "padding_mode"}
        tensors = {name: t.requires_grad_() for name, t in inputs.tensors.items()}
        x, weight = tensors["x"], tensors["weight"]
        totals = []
        with FlopCounterMode(display=False) as counter:
            nn.functional.conv2d(x, weight, **geometry)
        totals.append(counter.get_total_flops())
        with forced(case, mix):
            with FlopCounterMode(display=False) as counter:
                y = functional.decoupled_conv2d(**tensors, **inputs.options)
            totals.append(counter.get_total_flops())
            with FlopCounterMode(display=False) as counter:
                y.sum().backward()
            totals.append(counter.get_total_flops())
        assert totals[0] == totals[1] > 0
        # PyTorch's own formula counts the gradient of a grouped weight too high.
        if case.groups == 1 or (case in DEPTHWISE and mix != "forward"):
            assert totals[2] == 2 * totals[0], case.id


@pytest.mark.parametrize("mix", ["both", "forward", "backward"])
def test_second_derivatives(mix: str) -> None:
    case = Case("depthwise", 2, 2, 4, 4, 4, (2, 2), padding=1, groups=2)
    torch.manual_seed(0)
    x, weight = (torch.randn(s, dtype=torch.float64) for s in ((2, 2, 4, 4), (4, 1, 2, 2)))
    radius = 0.5 + torch.rand(4, dtype=torch.float64)
    operands = [t.requires_grad_() for t in (x, weight, radius)]

    def call(x: Tensor, weight: Tensor, radius: Tensor) -> Tensor:
        return functional.decoupled_conv2d(
            x, weight, None, 1, 1, 1, 2, radius=radius, norm_mean="batch"
        )

    grad = {"both": "fused", "forward": "library", "backward": "fused"}[mix]
    forward = "library" if mix == "backward" else "fused"
    assert case.groups == 2
    with backends.strategies(forward, input_gradient=grad, weight_gradient=grad):
        assert torch.autograd.gradcheck(call, operands, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, operands, fast_mode=True)


def refusals(
    case: Case, dtype: torch.dtype = torch.bfloat16, layout: str = "channels_last", **options: Any
) -> tuple[str | None, str | None, str | None]:
    tensors, call = make_inputs(case, dtype, layout, **options)
    operands, problem, _ = check_call(**tensors, **call)
    return (
        fused.why_not(operands, problem),
        fused.why_not(operands, problem, INPUT_GRADIENT),
        fused.why_not(operands, problem, WEIGHT_GRADIENT),
    )


LIBRARYS = "the gradient of the weight is the library's, but for depthwise layers"


def test_why_not() -> None:
    assert refusals(GEMM[4]) == (None, None, LIBRARYS)
    assert refusals(DEPTHWISE[0], torch.float32, "contiguous") == (None, None, None)
    assert refusals(SMALL_GROUPS[1], torch.float32, "contiguous") == (None, None, LIBRARYS)
    stem = "the stem kernel has no gradient of the input"
    assert refusals(STEMS[2], torch.float32) == (None, stem, LIBRARYS)
    for dtype, size, refused in (
        (torch.bfloat16, 100, False),
        (torch.float16, 102, True),
        (torch.float32, 53, False),
        (torch.float32, 54, True),
        (torch.float64, 20, False),
        (torch.float64, 21, True),
    ):
        case = Case("long", 1, 3, 1, size, 4, (1, size))
        most, taps = fused.STEM_TAPS[dtype], 3 * size
        sentence = f"the stem kernel takes filters of at most {most} {dtype} values, got {taps}"
        assert refusals(case, dtype)[0] == (sentence if refused else None)
    for dtype, layout, rows, multiplier, forward, backward in (
        (torch.bfloat16, "channels_last", 3071, 1, False, False),
        (torch.float32, "channels_last", 3072, 1, True, True),
        (torch.float32, "contiguous", 3072, 1, False, False),
        (torch.float32, "channels_last", 1024, 2, False, False),
        (torch.float32, "channels_last", 1024, 3, False, True),
        (torch.float64, "channels_last", 1535, 1, False, False),
        (torch.float64, "channels_last", 1536, 1, True, True),
    ):
        case = Case("long", 1, 2, rows, 4, 2 * multiplier, (rows, 4), groups=2)
        most = fused.DEPTHWISE_VALUES[compute_dtype(dtype)]
        start = f"the depthwise kernel takes sums over at most {most} products in channels_last, "
        first, second, third = refusals(case, dtype, layout)
        assert first == (f"{start}got {4 * rows}" if forward else None)
        assert second == (f"{start}got {4 * rows * multiplier}" if backward else None)
        assert third is None
    sentence = "the gradient of the input takes stride 1, got (2, 2)"
    assert refusals(GEMM[1]) == (None, sentence, LIBRARYS)
    sentence = "norm-free operators are one library convolution"
    assert refusals(DEPTHWISE[0], magnitude="linear") == (sentence,) * 3
    for case in (GEMM[4], DEPTHWISE[0], STEMS[0]):
        reflecting = Case(*case.__dict__.values())
        object.__setattr__(reflecting, "padding_mode", "reflect")
        sentence = "its kernels pad with zeros, got padding_mode 'reflect'"
        assert refusals(reflecting) == (sentence,) * 3
    for arguments, sentence in (
        ((torch.float32,), "the implicit GEMM takes bfloat16 and float16, got torch.float32"),
        ((torch.float16, "contiguous"), "the implicit GEMM takes channels_last tensors"),
    ):
        assert refusals(GEMM[4], *arguments) == (sentence, sentence, LIBRARYS)
    start = "the implicit GEMM takes multiples of 8 channels and filters per group, got "
    for channels, filters, groups in ((12, 8, 1), (8, 12, 1), (8, 4, 2)):
        case = Case("odd", 2, channels * groups, 4, 4, filters * groups, (1, 1), groups=groups)
        assert refusals(case)[:2] == (f"{start}{channels} and {filters}",) * 2


def shifted(t: Tensor, elements: int) -> Tensor:
    """The same values and strides, so many elements into an allocation."""
    memory = t.new_empty(t.numel() + elements)
    return memory.as_strided(t.shape, t.stride(), elements).copy_(t)


@pytest.mark.parametrize("name", ["x", "weight"])
def test_views_at_any_address_are_taken(name: str) -> None:
    """Where memory begins is the op's business: strategies ask for no offset, and results agree."""
    inputs = make_inputs(GEMM[4], torch.bfloat16, "channels_last")
    moved = Inputs(inputs.tensors | {name: shifted(inputs.tensors[name], 1)}, inputs.options)
    operands, problem, _ = check_call(**moved.tensors, **moved.options)
    assert fused.why_not(operands, problem) is None
    assert fused.why_not(operands, problem, INPUT_GRADIENT) is None
    compare(GEMM[4], "both", moved)


@by_model
@pytest.mark.parametrize("name", MODULES)
def test_compiled_code_takes_views_at_any_address(name: str) -> None:
    """One compiled graph, traced on an aligned image, runs on one that begins elsewhere."""
    torch._dynamo.reset()
    module, case = module_of(name)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend=counter)
    x = image(case, 2)
    with forced(case, "both"), torch.no_grad():
        expected_y = module(x)
        for elements in (0, 8, 1):
            y = compiled(shifted(x, elements))
            check("compiled", y, expected_y, expected_y, torch.bfloat16)
    assert counter.frame_count == 1


class NoAddress(TorchFunctionMode):
    """Refuses every question about where a tensor lies."""

    asked = (Tensor.storage_offset, Tensor.data_ptr, Tensor.untyped_storage)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in self.asked, func
        return func(*args, **(kwargs or {}))


def test_strategies_ask_for_no_address() -> None:
    for case in ALL:
        for layout in ("channels_last", "contiguous"):
            inputs = make_inputs(case, torch.bfloat16, layout)
            operands, problem, _ = check_call(**inputs.tensors, **inputs.options)
            with NoAddress():
                for backend in ("cuda", "triton"):
                    choose(backend, operands, problem, "output", 3, False)
                for row in IMPLEMENTATIONS:
                    if row.backend.namespace is not None:
                        row.why_not(operands, problem)


def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_capability", {0: (7, 5), 1: (8, 0)}.get)

    class OnGpu:
        def __init__(self, index: int) -> None:
            self.device = torch.device("cuda", index)

    sentence = "its kernels are for GPUs from sm_80 on"
    reasons = [fused._why_not_any(OnGpu(index), Problem()) for index in range(2)]
    assert reasons == [sentence, None]


def test_forced_strategy_refuses_with_its_sentence() -> None:
    inputs = make_inputs(GEMM[4], torch.float32, "channels_last")
    with backends.strategies("fused"), pytest.raises(NotImplementedError) as error:
        functional.decoupled_conv2d(**inputs.tensors, **inputs.options)
    assert str(error.value) == (
        "dcconv: no allowed strategy runs the forward of this call: "
        "fused: the implicit GEMM takes bfloat16 and float16, got torch.float32"
    )
    tensors = {name: t.bfloat16() for name, t in inputs.tensors.items()}
    tensors["radius"] = tensors["radius"].float()
    tensors["weight"].requires_grad_()
    with (
        backends.strategies("library", weight_gradient="fused"),
        pytest.raises(NotImplementedError) as error,
    ):
        functional.decoupled_conv2d(**tensors, **inputs.options)
    assert f"runs the weight_gradient of this call: fused: {LIBRARYS}" in str(error.value)
