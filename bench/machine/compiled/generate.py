"""The code that Inductor writes for the best-written formula of the operator, both ways.

The formula is traced on CPU tensors whose elements nobody reads, partitioned into forward and
backward as always, and its graphs are then given to Inductor as graphs of CUDA tensors.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, fx

from bench.cases import Case
from bench.machine.compiled.pretend import pretending
from bench.machine.gpus import Gpu
from bench.options import DTYPES
from bench.providers import formula

CUDA = torch.device("cuda", 0)


class Spec(NamedTuple):
    """What a tensor is, apart from its elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    def empty(self, device: str | torch.device = "cpu") -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


class Module(NamedTuple):
    """A generated module: its Python source, and its function's arguments."""

    source: str
    inputs: tuple[Spec | int, ...]
    is_backward: bool


class _Propagate(fx.Interpreter):
    """Gives every node of a graph the fake value that CUDA arguments lead to."""

    def run_node(self, n: fx.Node) -> Any:
        n.meta["val"] = found = super().run_node(n)
        return found


def _specs(values: Any) -> list[Spec | None]:
    return [Spec.of(v.meta["val"]) if isinstance(v, fx.Node) else None for v in values]


class _Inner:
    """Inductor's inner compiler, which keeps the source and returns tensors without elements."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.modules: list[Module] = []

    def __call__(self, graph: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        (output,) = [node for node in graph.graph.nodes if node.op == "output"]
        results = _specs(output.args[0])
        specs = [Spec.of(one) if isinstance(one, Tensor) else int(one) for one in inputs]
        source = self._source(graph, specs, options)
        self.modules.append(Module(source, tuple(specs), bool(options.get("is_backward"))))

        def run(arguments: list[Any]) -> list[Tensor | None]:
            arguments.clear()
            return [None if spec is None else spec.empty() for spec in results]

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def _source(
        self, graph: fx.GraphModule, specs: list[Spec | int], options: dict[str, Any]
    ) -> str:
        from torch._guards import TracingContext, tracing
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.graph import GraphLowering
        from torch._inductor.virtualized import V
        from torch._subclasses.fake_tensor import FakeTensorMode

        written: list[str] = []
        own = GraphLowering.codegen

        def codegen(lowering: Any) -> Any:
            found = own(lowering)
            written.append(found[0].value)
            raise _WrittenError

        with pretending(self.gpu), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            values = [s.empty(CUDA) if isinstance(s, Spec) else s for s in specs]
            for node in graph.graph.nodes:
                if "device" in node.kwargs:
                    node.kwargs = {**node.kwargs, "device": CUDA}
            graph.recompile()
            _Propagate(graph).run(*values)
            with (
                mock.patch.object(GraphLowering, "codegen", codegen),
                tracing(TracingContext(mode)),
                V.set_fake_mode(mode),
            ):
                try:
                    # Not taken from a cache: that would write nothing.
                    with torch._inductor.config.patch(fx_graph_cache=False):
                        compile_fx_inner(graph, values, **options)
                except Exception as error:
                    if not written:
                        raise error
        (source,) = written
        return source


class _WrittenError(Exception):
    """Raised where the source is complete: loading it would ask for a driver."""


def generated(case: Case, gpu: Gpu, first: bool = False) -> list[Module]:
    """Return the modules of a training step's forward and backward on a GPU.

    Args:
        case: its layer, operator and dtype, in channels_last.
        gpu: which.
        first: whether x needs no gradient.

    Raises:
        ValueError: PyTorch or Triton is missing what it takes.
    """
    from torch._inductor.compile_fx import compile_fx

    layer, dtype = case.layer, DTYPES[case.dtype]
    last = torch.channels_last
    inner = _Inner(gpu)

    def backend(graph: fx.GraphModule, inputs: Any) -> Any:
        return compile_fx(graph, inputs, inner_compile=inner)

    def operand(shape: tuple[int, ...], needs: bool = True) -> Tensor:
        return torch.empty(shape, dtype=dtype).to(memory_format=last).requires_grad_(needs)

    x, weight = operand(layer.x_shape, not first), operand(layer.weight_shape)
    radius = torch.empty(layer.o).requires_grad_()
    memory_format = mock.patch.object(
        torch._C, "_conv_determine_backend_memory_format", return_value=last
    )
    torch._dynamo.reset()
    with memory_format:
        y = torch.compile(formula(case), fullgraph=True, backend=backend)(x, weight, radius, None)
        y.backward(torch.empty_like(y))
    torch._dynamo.reset()
    return inner.modules
