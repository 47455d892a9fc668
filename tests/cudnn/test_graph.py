"""The operator through cuDNN graphs on the CPU, the package ``cudnn`` stood in for.

``cudnn_model`` runs the graphs, ``library_model`` the small ops beside them. The last tests take
the real package: cuDNN plans and compiles every expression for a GPU that is described to it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accuracy import check_all, evaluate, random_cotangent, truth_and_peer
from calls import convolution, problem_with
from cases import (
    CASES,
    IN_STEPS,
    Case,
    Inputs,
    by_id,
    make_inputs,
)
from cudnn_model import Frontend, NotSupportedError
from cudnn_planning import expressible, stand_in_driver
from library_model import implementations
from paths import TESTS, python_path
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dcconv import native, tracing, warn
from dcconv.call import saved
from dcconv.cudnn import epilogue, graph
from dcconv.cudnn import ops as cudnn_ops
from dcconv.cudnn.epilogue import Form
from dcconv.cudnn.ops import GraphKey
from dcconv.operator.functions import weightings
from dcconv.operator.layout import memory_format
from dcconv.operator.numerics import TF32_ANGLE_DELTA
from dcconv.operator.records import NORM_BATCH, Operands, Problem, Window
from dcconv.passes import backward, library, records
from dcconv.passes.backward import InputSide
from dcconv.passes.records import FORWARD, INPUT_GRADIENT, Taps

STREAM = 1234
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXPRESSIBLE = [
    case
    for case in CASES
    if case.groups == 1 and case.n and case.padding_mode == "zeros" and case.padding != "same"
]


why_not_installed = cudnn_ops.why_not_installed


class World(SimpleNamespace):
    """What the tests change: whether a CUDA graph is being captured, and the frontend."""

    frontend: Frontend
    capturing: bool


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Its ops for CPU tensors on the models, with nothing built yet."""
    if native.missing is not None:
        pytest.skip(native.missing)
    world = World(frontend=Frontend(STREAM), capturing=False)
    monkeypatch.setattr(cudnn_ops, "_frontend", world.frontend)
    monkeypatch.setattr(cudnn_ops, "why_not_installed", lambda: None)
    monkeypatch.setattr(cudnn_ops, "_compiled", {})
    monkeypatch.setattr(cudnn_ops, "_captured", {})
    monkeypatch.setattr(warn, "_said", set())
    monkeypatch.setattr(cudnn_ops, "_handles", threading.local())
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    stream = SimpleNamespace(cuda_stream=STREAM)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: world.capturing)
    library = torch.library.Library("dcconv", "IMPL")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny
    try:
        for name, function in {**implementations, **cudnn_ops.implementations}.items():
            library.impl(name, function, "CPU")
        yield world
    finally:
        torch.set_num_threads(threads)
        library._destroy()


class Graph(torch.autograd.Function):
    """y and grad_x by the strategy graph, the other gradients by library."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, problem, kept = arguments
        operands = Operands(*tensors)
        y, norm_map, mean, dot, a = graph.forward(operands, problem, kept)
        ctx.save_for_backward(*operands, y if kept == saved.OUTPUT else dot, norm_map, mean, a)
        ctx.problem, ctx.kept = problem, kept
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        *tensors, kept_tensor, norm_map, mean, a = ctx.saved_tensors
        operands, problem = Operands(*tensors), ctx.problem
        wanted = ctx.needs_input_grad[:6]
        needs = sum(1 << i for i, want in enumerate(wanted) if want)
        arguments = (grad_y, kept_tensor, norm_map, mean, a, operands, problem, ctx.kept)
        grads = list(backward.backward(*arguments, needs & ~records.NEEDS_X))
        if needs & records.NEEDS_X:
            grads[0] = grad_x(*arguments)
        return (*grads, None, None)


def grad_x(
    grad_y: Tensor,
    kept_tensor: Tensor,
    norm_map: Tensor,
    mean: Tensor,
    a: Tensor,
    operands: Operands,
    problem: Problem,
    kept: str,
) -> Tensor:
    """Return the input gradient: the pass over dy, then the graph."""
    x, weight, _, radius, norm_mean, k = operands
    weight = weight.contiguous(memory_format=memory_format(weight))
    batch = problem.norm == NORM_BATCH
    factor = mean if batch else norm_mean
    barrier = batch and problem.norm_grad
    sums = records.SUM_RHO if barrier and radius is not None else 0
    grad_u, t, parts = torch.ops.dcconv.conv2d_grad_dot(
        *(grad_y.contiguous(memory_format=torch.channels_last), kept_tensor, norm_map, a),
        *(
            radius,
            factor,
            k,
            1,
            problem.operator.magnitude,
            problem.operator.angular,
            problem.operator.weighting,
        ),
        *(
            problem.operator.alpha,
            problem.operator.beta,
            problem.operator.power,
            problem.delta,
            kept,
            True,
            sums,
            2,
            True,
        ),
    )
    sigma = None
    if barrier:
        *_, sigma = torch.ops.dcconv.conv2d_grad_filters(
            parts, None, weight, a, radius, factor, k, norm_map.shape[0], sums, True, 0
        )
    return graph.input_gradient(InputSide(grad_u, x, weight, Taps(t, norm_map, sigma)), problem)


def side(grad_u: Tensor, x: Tensor, weight: Tensor, norms: Tensor) -> InputSide:
    """Return what a gradient of x is made of, norms standing in for t."""
    return InputSide(grad_u, x, weight, Taps(norms, norms, None))


def prepare(inputs: Inputs) -> tuple[Operands, Problem]:
    """Return the checked operands and the problem of a call."""
    usual = {"norm_mean": None, "radius": 1.0, "k": 0.3}
    usual |= {"alpha": 1.0, "beta": 0.5, "power": 2.0, "eps": 1e-4}
    tensors = {"bias": None, **inputs.tensors}
    return convolution(**{**usual, **tensors, **inputs.options})


def by_graph(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, keep_: str = "auto", **options: Any
) -> Tensor:
    """Evaluate ``functional.decoupled_conv2d``'s call by the strategy graph."""
    tensors = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    operands, problem = prepare(Inputs(tensors, options))
    kept = saved.kept(problem, x.dtype, bias is not None, keep_)
    return Graph.apply(*operands, problem, kept)


def compare(name: str, inputs: Inputs, **extra: Any) -> None:
    """Judge y and all gradients by the accuracy rule."""
    cotangent = random_cotangent(inputs)
    truth, peer = truth_and_peer(inputs, cotangent)
    got = evaluate(by_graph, inputs, cotangent, **extra)
    check_all(name, got, truth, peer, inputs.tensors["x"].dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", EXPRESSIBLE, ids=lambda case: case.id)
def test_graph_agrees_with_the_reference(case: Case, dtype: torch.dtype, world: World) -> None:
    start = 11 * EXPRESSIBLE.index(case) + 29 * DTYPES.index(dtype)
    for i in range(4):
        magnitude, weighting, angular = IN_STEPS[(start + 37 * i) % len(IN_STEPS)]
        if magnitude == "linear" and angular == "cosine":
            continue
        norm, scalar = ("batch", "given", "none")[(start + i) % 3], (start + i) % 5 == 0
        bias = (start + i) % 4 == 0 and norm != "given" and not scalar
        inputs = make_inputs(
            case,
            dtype,
            ("channels_last", "sliced", "contiguous")[i % 3],
            magnitude=magnitude,
            weighting=weighting,
            angular=angular,
            norm=norm,
            bias=bias,
            scalar=scalar,
        )
        name = f"{case.id} {magnitude} {weighting} {angular}"
        compare(name, inputs, keep_="dot" if i == 1 else "auto")
    assert world.frontend.executed == 2 * (world.frontend.executed // 2) > 0


def test_every_operator_runs_as_a_graph(world: World) -> None:
    for i, (magnitude, weighting, angular) in enumerate(IN_STEPS):
        inputs = make_inputs(
            by_id("3x3-p1"),
            torch.float32,
            magnitude=magnitude,
            weighting=weighting,
            angular=angular,
            norm=("batch", "given", "none")[i % 3],
            scalar=i % 2 == 0,
        )
        with torch.no_grad():
            truth, peer = truth_and_peer(inputs)
            got = evaluate(by_graph, inputs)
        check_all(f"{magnitude} {weighting} {angular}", got, truth, peer, torch.float32)
    assert world.frontend.executed == world.frontend.built == len(IN_STEPS)


def test_results_are_those_of_library(world: World) -> None:
    for norm, kept in (("batch", saved.OUTPUT), ("given", saved.DOT), ("none", saved.NOTHING)):
        inputs = make_inputs(by_id("3x3-s2-p1"), torch.bfloat16, "channels_last", norm=norm)
        operands, problem = prepare(inputs)
        mine = graph.forward(operands, problem, kept)
        other = library.forward(operands, problem, kept)
        for name, a, b in zip(("y", "map", "mean", "dot", "a"), mine, other, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), (norm, name)
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_graphs_are_built_once_per_key(world: World) -> None:
    def call(case: str = "3x3-p1", dtype: torch.dtype = torch.float32, **options: Any) -> int:
        before = world.frontend.built
        operands, problem = prepare(make_inputs(by_id(case), dtype, **options))
        graph.forward(operands, problem, saved.DOT if options.get("seed") == 7 else saved.NOTHING)
        return world.frontend.built - before

    assert call() == 1
    assert call() == 0
    assert call(seed=3) == 0
    assert call(dtype=torch.bfloat16) == 1
    assert call("1x1-s2") == 1
    assert call(bias=True) == 1
    assert call(alpha=2.0) == 1
    assert call(magnitude="ball") == 1
    assert call(scalar=True) == 1
    assert call(norm="none") == 1
    assert call(norm="given") == 0  # a factor of the radius, like the mean of the batch
    assert call(seed=7) == 1  # u is a result as well
    assert world.frontend.executed == 12


def test_key_tells_devices_and_directions_apart() -> None:
    window = Window((2, 1), (1, 1, 0, 0), (1, 2))
    key = GraphKey(0, torch.bfloat16, (1, 8, 4, 5), (16, 8, 3, 3), window, None)
    assert key.u == (1, 16, 2, 1)
    keys = {key, key._replace(device=1), key._replace(operator=Form("tanh", "cosine", "none"))}
    assert len(keys) == 3
    assert key.expression is epilogue.input_gradient


def run_both(seed: int = 0) -> None:
    """Compare both directions, once with y kept and once with u: three graphs, four executions."""
    inputs = make_inputs(by_id("3x3-p1"), torch.float32, "channels_last", seed=seed)
    compare("y kept", inputs)
    compare("u kept", inputs, keep_="dot")


def test_capture_without_a_compiled_graph_runs_library(world: World) -> None:
    world.capturing = True
    with pytest.warns(
        RuntimeWarning, match="the library convolution runs .*: a CUDA graph is being captured"
    ):
        run_both()
    assert world.frontend.built == world.frontend.executed == 0
    assert not world.frontend.handles
    run_both()  # no second warning
    world.capturing = False
    run_both()
    assert (world.frontend.built, world.frontend.executed) == (3, 4)
    world.capturing = True
    run_both()
    assert (world.frontend.built, world.frontend.executed) == (3, 8)
    inputs = make_inputs(by_id("1x1-s2"), torch.float32, "channels_last")
    compare("another shape", inputs)
    assert (world.frontend.built, world.frontend.executed) == (3, 8)


@pytest.mark.parametrize("error", [NotSupportedError, RuntimeError])
def test_a_refused_graph_runs_library(error: type[Exception], world: World) -> None:
    world.frontend.refusal = error("no engine\n{details}")
    with pytest.warns(RuntimeWarning, match="cuDNN cannot build it: no engine$") as caught:
        run_both()
    assert len(caught) == 1
    assert Path(caught[0].filename).parent == Path(__file__).parent
    assert (world.frontend.built, world.frontend.executed) == (3, 0)
    run_both(seed=1)
    assert world.frontend.built == 3


def test_other_errors_of_a_build_come_through(world: World) -> None:
    world.frontend.refusal = TypeError("a bug")
    with pytest.raises(TypeError, match="a bug"):
        run_both()


@pytest.fixture
def waits(world: World, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Room for two graphs; how many there were at each wait for the GPU."""
    monkeypatch.setattr(cudnn_ops, "MAX_GRAPHS", 2)
    waits: list[int] = []

    def synchronize(device: int) -> None:
        waits.append(len(world.frontend.graphs))

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    return waits


def built_for(world: World, case: str) -> int:
    """Run a case forward; return how many graphs were built for it."""
    before = world.frontend.built
    operands, problem = prepare(make_inputs(by_id(case), torch.float32))
    graph.forward(operands, problem, saved.NOTHING)
    return world.frontend.built - before


def test_the_least_recently_used_graph_gives_way(world: World, waits: list[int]) -> None:
    a, b, c = "3x3-p1", "3x3-s2-p1", "1x1-s2"
    assert [built_for(world, case) for case in (a, b, a, c)] == [1, 1, 0, 1]
    # The GPU was waited for while the graph that went was still there.
    assert (waits, len(world.frontend.graphs)) == ([2], 2)
    assert [built_for(world, case) for case in (a, c, b, c)] == [0, 0, 1, 0]
    assert (waits, len(world.frontend.graphs)) == ([2, 2], 2)
    assert world.frontend.executed == 8


def test_refusals_give_way_too(world: World, waits: list[int]) -> None:
    world.frontend.refusal = NotSupportedError("no engine")
    cases = ("3x3-p1", "3x3-s2-p1", "1x1-s2", "3x3-p1", "1x1-s2")
    with pytest.warns(RuntimeWarning, match="no engine"):
        assert [built_for(world, case) for case in cases] == [1, 1, 1, 1, 0]
    assert len(cudnn_ops._compiled) == 2 and not waits


def test_graphs_that_were_captured_stay(world: World, waits: list[int]) -> None:
    a, b, c, d = "3x3-p1", "3x3-s2-p1", "1x1-s2", "asymmetric"
    built_for(world, a)
    world.capturing = True
    assert built_for(world, a) == 0
    world.capturing = False
    # It takes no room of the others.
    assert [built_for(world, case) for case in (b, c, b, c)] == [1, 1, 0, 0]
    assert [built_for(world, case) for case in (d, a, c)] == [1, 0, 0]
    world.capturing = True
    assert built_for(world, a) == 0 and len(world.frontend.graphs) == 3
    assert waits == [3]
    assert world.frontend.executed == 10


def test_threads_have_their_own_handles(world: World) -> None:
    run_both()
    run_both()
    worker = threading.Thread(target=run_both)
    worker.start()
    worker.join()
    # Backward of CPU tensors runs in the calling thread.
    assert len(world.frontend.handles) == 2


def test_unaligned_tensors_are_copied() -> None:
    flat = torch.arange(2 * 8 * 3 * 3 + 1, dtype=torch.bfloat16)
    view = flat[1:].view(2, 3, 3, 8).permute(0, 3, 1, 2)
    assert view.is_contiguous(memory_format=torch.channels_last) and view.data_ptr() % 16
    moved = cudnn_ops._dense(view)
    assert moved.data_ptr() % 16 == 0 and torch.equal(moved, view)
    assert moved.is_contiguous(memory_format=torch.channels_last)
    assert cudnn_ops._dense(moved) is moved


@pytest.mark.parametrize("direction", ["forward", "input gradient"])
def test_opcheck(direction: str, world: World) -> None:
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    calls = (("3x3-p1", True, saved.DOT), ("asymmetric", False, saved.NOTHING))
    for case, bias, kept in calls:
        inputs = make_inputs(by_id(case), torch.float32, "channels_last", bias=bias)
        operands, problem = prepare(inputs)
        x, weight, bias_tensor, radius, _, k = operands
        y, norms, mean, _, a = graph.forward(operands, problem, kept)
        geometry = problem.window[:3]
        if direction == "forward":
            op = torch.ops.dcconv.cudnn_conv2d_forward.default
            operator = (
                problem.operator.magnitude,
                problem.operator.angular,
                problem.operator.weighting,
                problem.operator.alpha,
            )
            operator += (
                problem.operator.beta,
                problem.operator.power,
                problem.delta,
                problem.operator.eps,
            )
            arguments = (x, weight, a, norms, bias_tensor, radius, mean, k, *geometry, *operator)
            torch.library.opcheck(op, (*arguments, kept == saved.DOT), test_utils=tests)
        else:
            op = torch.ops.dcconv.cudnn_conv2d_grad_input.default
            arguments = (torch.randn_like(y), x, weight, torch.randn_like(norms), norms, mean)
            torch.library.opcheck(op, (*arguments, *geometry), test_utils=tests)


def test_flops_are_those_of_the_convolutions(world: World) -> None:
    inputs = make_inputs(by_id("3x3-p1"), torch.float32, "channels_last")
    operands, problem = prepare(inputs)
    with FlopCounterMode(display=False) as counter:
        y, norms, _, _, _ = graph.forward(operands, problem, saved.NOTHING)
    n, o, p, q = y.shape
    products = n * o * p * q * operands.x.shape[1] * 9
    assert counter.get_total_flops() == 2 * products
    with FlopCounterMode(display=False) as counter:
        graph.input_gradient(side(y, operands.x, operands.weight, norms), problem)
    assert counter.get_total_flops() == 2 * products


def test_graph_compiles_as_one_graph(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(tracing, "_answers", {})
    graphs: list[torch.fx.GraphModule] = []

    def keep_graph(module: torch.fx.GraphModule, example: list[Any]) -> Any:
        graphs.append(module)
        return module.forward

    def both(x: Tensor, weight: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        if cudnn_ops.why_not_installed() is not None or graph._why_not_gpu(0) is not None:
            raise AssertionError
        operands = Operands(x, weight, None, radius, None, None)
        y, norms, _, _, _ = graph.forward(operands, problem, saved.NOTHING)
        return y, graph.input_gradient(side(y, x, weight, norms), problem)

    operands, problem = prepare(make_inputs(by_id("3x3-p1"), torch.float32, "channels_last"))
    arguments = (operands.x, operands.weight, operands.radius)
    want = both(*arguments)
    torch._dynamo.reset()
    got = torch.compile(both, backend=keep_graph, fullgraph=True)(*arguments)
    assert len(graphs) == 1
    called = {str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"}
    assert {f"dcconv.{name}.default" for name in cudnn_ops.implementations} <= called
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


# Predicates.


def refused(
    problem: Problem | None = None,
    channels: int = 16,
    filters: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    layout: torch.memory_format = torch.channels_last,
    device: str = "cuda",
    gradient: bool = False,
) -> str | None:
    """Return the strategy graph's sentence for a call on fake tensors."""
    with FakeTensorMode():
        x = torch.empty(2, channels, 5, 5, dtype=dtype, device=device, memory_format=layout)
        weight = torch.empty(filters, channels, 3, 3, dtype=dtype, device=device)
        operands = Operands(x, weight, None, None, None, None)
        direction = INPUT_GRADIENT if gradient else FORWARD
        return graph.why_not(operands, problem or Problem(), direction)


def test_predicates_say_why(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_why_not_gpu", lambda index: None)
    assert refused() is None
    assert refused(gradient=True) is None
    assert refused(dtype=torch.float16, gradient=True) is None
    assert refused(problem_with(stride=(2, 2))) is None
    assert refused(problem_with(stride=(2, 2)), gradient=True) == (
        "its epilogue on a strided data gradient is slow, got stride (2, 2)"
    )
    assert refused(device="cpu") == "it runs on CUDA tensors, got a cpu tensor"
    assert refused(problem_with(groups=2)) == (
        "it reads one map for all filters, and each of 2 groups has its own"
    )
    assert refused(dtype=torch.float64) == "it fuses no float64 convolutions"
    assert refused(dtype=torch.float32) == (
        "its float32 convolutions are TF32, which PyTorch's settings forbid"
    )
    assert refused(problem_with(delta=TF32_ANGLE_DELTA), dtype=torch.float32) is None
    assert refused(layout=torch.contiguous_format) == "it reads channels_last tensors only"
    assert refused(channels=12) == "it takes channels in multiples of 8, got 12"
    assert refused(filters=20) == "it takes filters in multiples of 8, got 20"


@pytest.mark.parametrize(
    ("capability", "sentence"),
    [((7, 5), "this GPU is sm_75: sm_80 or later is needed"), ((9, 0), None)],
)
def test_old_gpus_are_refused(
    capability: tuple[int, int],
    sentence: str | None,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracing, "_answers", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert refused() == sentence


def broken(message: str) -> Any:
    def backend_version() -> int:
        raise RuntimeError(message)

    return SimpleNamespace(backend_version=backend_version)


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (None, "the package nvidia-cudnn-frontend is missing: pip install 'dcconv[cudnn]'"),
        (Frontend(0, 90800), "cuDNN 9.8 is too old: 9.11 or later is needed"),
        (Frontend(0, 8907), "cuDNN 8.9 is too old: 9.11 or later is needed"),
        (Frontend(0, 91099), "cuDNN 9.10 is too old: 9.11 or later is needed"),
        (
            broken("no symbol"),
            "the package nvidia-cudnn-frontend finds no cuDNN library: no symbol",
        ),
        (Frontend(0, 91100), None),
    ],
)
def test_missing_and_old_packages_are_named(
    module: Any, sentence: str | None, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "_why_not_gpu", lambda index: None)
    monkeypatch.setattr(cudnn_ops, "why_not_installed", why_not_installed)
    monkeypatch.setattr(tracing, "_answers", {})
    monkeypatch.setitem(sys.modules, "cudnn", module)
    assert refused() == sentence
    monkeypatch.delitem(sys.modules, "cudnn")  # looked for once
    assert refused() == sentence


def test_a_package_that_does_not_load_is_named(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cudnn.py").write_text("raise OSError('libcudnn.so: no such file')\n")
    monkeypatch.setattr(graph, "_why_not_gpu", lambda index: None)
    monkeypatch.setattr(cudnn_ops, "why_not_installed", why_not_installed)
    monkeypatch.setattr(tracing, "_answers", {})
    monkeypatch.delitem(sys.modules, "cudnn", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert refused() == (
        "the package nvidia-cudnn-frontend does not load: libcudnn.so: no such file"
    )


# The real package, without a GPU.


def test_every_primitive_has_a_node() -> None:
    for magnitude, weighting, angular in IN_STEPS:
        expression = epilogue.forward(Form(magnitude, angular, weighting, power=3.0))
        assert {step.op for step in expression.steps} <= set(cudnn_ops.NODES)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What cuDNN said to every expression, by ``cudnn_planning.py`` in a process of its own."""
    folder = tmp_path_factory.mktemp("driver")
    reason = stand_in_driver(folder)
    if reason is not None:
        pytest.skip(reason)
    path = f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    done = subprocess.run(
        [sys.executable, TESTS / "cudnn" / "cudnn_planning.py", folder / "said.json"],
        env=os.environ | {"LD_LIBRARY_PATH": path, "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said: dict[str, Any] = json.loads((folder / "said.json").read_text())
    if "missing" in said:
        pytest.skip(said["missing"])
    return said


def test_every_operator_is_a_valid_graph(planned: dict[str, Any]) -> None:
    assert planned["valid"] == dict.fromkeys(expressible(), "valid")
    # Norm-free operators, two of them, are no graph.
    assert len(planned["valid"]) == len(IN_STEPS) - 2


def test_cudnn_has_engines_for_every_function(planned: dict[str, Any]) -> None:
    names = [name.split() for name in planned["plans"]]
    for place, functions in enumerate((epilogue.magnitudes, weightings, epilogue.angles)):
        assert {name[place] for name in names} == set(functions)
    assert all(isinstance(said, int) and said > 0 for said in planned["plans"].values()), planned


def test_cudnn_compiles_both_directions(planned: dict[str, Any]) -> None:
    assert set(planned["compiled"]) == {"forward", "input gradient"}
    for name, engine in planned["compiled"].items():
        assert engine.startswith("eng"), (name, engine)


@pytest.mark.gpu
@pytest.mark.backend("cuda")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_graphs_agree_with_the_reference_on_a_gpu(dtype: torch.dtype) -> None:
    case = Case("gpu", 2, 16, 12, 11, 24, (3, 3), padding=1)
    for i, (magnitude, weighting, angular) in enumerate(IN_STEPS[::7]):
        inputs = make_inputs(
            case,
            dtype,
            "channels_last",
            magnitude=magnitude,
            weighting=weighting,
            angular=angular,
            norm=("batch", "given", "none")[i % 3],
            bias=i % 4 == 0,
            device="cuda",
        )
        operands, problem = prepare(inputs)
        reason = graph.why_not(operands, problem, INPUT_GRADIENT)
        if cudnn_ops.why_not_installed() is not None:
            pytest.skip(str(reason))
        if problem.operator.norm_free:
            continue
        assert reason is None
        compare(f"{magnitude} {weighting} {angular}", inputs)
    assert all(isinstance(built, cudnn_ops.Compiled) for built in cudnn_ops._compiled.values())
