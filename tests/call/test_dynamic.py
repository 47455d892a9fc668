"""``torch.compile(dynamic=True)``: whole networks, one graph, and no number of ours as an input."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accuracy import check
from stand_ins import cuda_backend_on_cpu
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import dcconv
from dcconv import native
from dcconv.functional import decoupled_conv2d, patch_norm

OPERATORS: tuple[dict[str, Any], ...] = (
    {},
    {"magnitude": "sphere", "angular": "sigmoid", "learn_k": True},
    {"magnitude": "ball", "angular": "linear", "radius_unit": "absolute"},
    {"magnitude": "linear"},
    {"magnitude": "segmented", "angular": "square_cosine", "learn_radius": False, "bias": True},
    {"magnitude": "mix", "angular": "power", "power": 1.5},
    {"weighting": "separate", "angular": "sigmoid", "norm_init": "zero"},
)

# By backend; the strategies are those of the cuda backend, on models. Training takes turns.
RUNS = (
    *(
        pytest.param("cpu", options, bool(i % 2), marks=pytest.mark.backend("cpu"))
        for i, options in enumerate((*OPERATORS, OPERATORS[0]))
    ),
    ("reference", OPERATORS[2], True),
    ("library", OPERATORS[0], True),
    ("library", OPERATORS[3], False),
    ("fused", OPERATORS[4], True),
)


def network(options: dict[str, Any]) -> nn.Module:
    """Two layers of one operator: 3x3, and strided depthwise."""
    return nn.Sequential(
        dcconv.DecoupledConv2d(4, 8, 3, padding=1, **options),
        dcconv.DecoupledConv2d(8, 8, 3, 2, padding=1, groups=8, **options),
    )


class Counter:
    """A compiler that counts the graphs and keeps the names of their inputs."""

    def __init__(self) -> None:
        self.genuine = CompileCounterWithBackend("aot_eager")
        self.names: set[str] = set()

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.names |= {node.name for node in graph.graph.nodes if node.op == "placeholder"}
        return self.genuine(graph, inputs)

    @property
    def globals(self) -> set[str]:
        """The inputs that come from modules: Dynamo names them after where they were found."""
        return {name for name in self.names if name.startswith("g_")}


def running(backend: str) -> Any:
    """Return a context in which calls take a backend, or the cuda backend on models."""
    if backend in dcconv.backends.names:
        return dcconv.use_backend(backend)
    if native.missing is not None:
        pytest.skip(native.missing)
    return cuda_backend_on_cpu()


@pytest.mark.parametrize(("backend_name", "options", "training"), RUNS)
def test_networks(backend_name: str, options: dict[str, Any], training: bool) -> None:
    """Several batch and image sizes: the results of eager execution, from one graph."""
    torch._dynamo.reset()
    eager = network(options).train(training)
    other = copy.deepcopy(eager)
    counter = Counter()
    compiled = torch.compile(other, fullgraph=True, backend=counter, dynamic=True)
    allowed: Any = nullcontext()
    if backend_name not in dcconv.backends.names:
        allowed = dcconv.backends.strategies(backend_name + ",library")
    graphs = 0
    with running(backend_name), allowed:
        for n, h, w in ((3, 8, 6), (5, 10, 12)):
            x = torch.randn(n, 4, h, w)
            results: list[list[Tensor]] = []
            for module, run in ((eager, eager), (other, compiled)):
                leaf = x.clone().requires_grad_()
                y = run(leaf)
                grads = torch.autograd.grad(y, [leaf, *module.parameters()], torch.ones_like(y))
                results.append([y, *grads, *module.buffers()])
            for want, got in zip(*results, strict=True):
                check("compiled", got, want.double(), want, torch.float32)
            graphs = graphs or counter.genuine.frame_count
    assert counter.genuine.frame_count == graphs
    assert not counter.globals


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
def test_numbers_of_the_caller(dynamic: bool | None) -> None:
    """Every number of the functional, in two calls of one graph; they may change."""
    torch._dynamo.reset()
    weight = torch.randn(4, 4, 3, 3, requires_grad=True)

    def call(x: Tensor, number: float) -> Tensor:
        options: dict[str, Any] = {"padding": 1, "alpha": number, "beta": number, "eps": number}
        options |= {"radius": number, "k": number, "power": number + 1, "norm_mean": "batch"}
        y = decoupled_conv2d(x, weight, magnitude="segmented", angular="sigmoid", **options)
        y = decoupled_conv2d(y, weight, magnitude="mix", angular="power", **options)
        return y + patch_norm(patch_norm(y, 1, eps=number), 1, eps=number)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n, number in ((2, 0.5), (3, 0.75), (4, 0.875)):
        x = torch.randn(n, 4, 6, 6)
        results = []
        for run in (call, compiled):
            y = run(x, number)
            results.append([y, *torch.autograd.grad(y, [weight], torch.ones_like(y))])
        for want, got in zip(*results, strict=True):
            check("compiled", got, want.double(), want, torch.float32)


@pytest.mark.backend("cpu")
def test_constant_of_a_layer_that_changes() -> None:
    """Dynamo makes a number symbolic when it meets another value of it."""
    torch._dynamo.reset()
    eager = nn.Sequential(*(dcconv.DecoupledConv2d(4, 4, 3, padding=1) for _ in range(3)))
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 6, 6)
    for alpha in (1.0, 1.5, 2.0, 2.5):
        for layer in eager:
            layer.alpha = alpha
        y, want = compiled(x), eager(x)
        check("compiled", y, want.double(), want, torch.float32)
        y.sum().backward()
