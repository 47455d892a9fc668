"""A model of the package ``cudnn``: graphs as its documentation says, run by PyTorch on the CPU.

It has what ``dcconv.cudnn.ops`` uses and refuses what cuDNN's fusion engines do not take: another
layout than channels_last, steps whose first operand does not come from the convolution, masks that
are not boolean, a plan that is used before it is built. Memory is reached by address, as there.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor


class DataType(enum.Enum):
    BFLOAT16 = torch.bfloat16
    HALF = torch.float16
    FLOAT = torch.float32
    BOOLEAN = torch.bool


class HeurMode(enum.Enum):
    A = 0
    FALLBACK = 1


class NumericalNote(enum.Enum):
    NONDETERMINISTIC = 0
    DOWN_CONVERT_INPUTS = 1
    REDUCED_PRECISION_REDUCTION = 2


class NotSupportedError(Exception):
    pass


def channels_last(dim: Sequence[int]) -> list[int]:
    _, c, h, w = dim
    return [c * h * w, 1, c * w, c]


class Value:
    """A tensor of a graph: given at execution, or the result of a node."""

    def __init__(
        self, compute: Callable[[dict[Value, Tensor]], Tensor] | None, late: bool, **facts: Any
    ) -> None:
        self.compute = compute
        self.late = late  # whether it comes from the convolution
        self.name: str = facts.get("name", "")
        self.dim: list[int] | None = facts.get("dim")
        self.stride: list[int] | None = facts.get("stride")
        self.data_type: DataType | None = facts.get("data_type")
        self.by_value: bool = facts.get("is_pass_by_value", False)
        self.output = False

    def set_dim(self, dim: list[int]) -> Value:
        self.dim = dim
        return self

    def set_stride(self, stride: list[int]) -> Value:
        self.stride = stride
        return self

    def set_data_type(self, data_type: DataType) -> Value:
        self.data_type = data_type
        return self

    def set_output(self, output: bool) -> Value:
        self.output = output
        return self

    def memory(self, address: int) -> Tensor:
        """Return the tensor at an address."""
        assert self.dim is not None and self.stride is not None and self.data_type is not None
        assert self.by_value or self.stride == channels_last(self.dim), (self.dim, self.stride)
        assert self.by_value or address % 16 == 0, "cuDNN assumes aligned tensors"
        count = 1
        for size in self.dim:
            count *= size
        dtype = self.data_type.value
        raw = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
        return torch.frombuffer(raw, dtype=dtype).as_strided(self.dim, self.stride)


class Graph:
    """Nodes as functions of the values before them, evaluated in float32."""

    def __init__(self, frontend: Frontend, **arguments: Any) -> None:
        assert arguments["compute_data_type"] == DataType.FLOAT
        assert arguments["intermediate_data_type"] == DataType.FLOAT
        assert arguments["handle"] in frontend.handles
        self.frontend = frontend
        self.values: list[Value] = []
        self.done: list[str] = []

    def tensor(self, name: str, **facts: Any) -> Value:
        self.values.append(Value(None, False, name=name, **facts))
        return self.values[-1]

    def _convolution(self, function: Callable[..., Tensor], a: Value, b: Value) -> Value:
        def compute(known: dict[Value, Tensor]) -> Tensor:
            return function(known[a], known[b])

        self.values.append(Value(compute, True))
        return self.values[-1]

    def conv_fprop(
        self, image: Value, weight: Value, padding: Any, stride: Any, dilation: Any
    ) -> Value:
        def function(x: Tensor, w: Tensor) -> Tensor:
            return torch.ops.aten.convolution(
                x, w, None, stride, padding, dilation, False, [0, 0], 1
            )

        return self._convolution(function, image, weight)

    def conv_dgrad(
        self, loss: Value, filter: Value, padding: Any, stride: Any, dilation: Any
    ) -> Value:
        def function(grad: Tensor, w: Tensor) -> Tensor:
            x = torch.empty(result.dim or [], dtype=grad.dtype)
            return torch.ops.aten.convolution_backward(
                *(grad, x, w, None, stride, padding, dilation, False, [0, 0], 1),
                [True, False, False],
            )[0]

        result = self._convolution(function, loss, filter)
        return result

    def _node(self, function: Callable[..., Tensor], *operands: Value) -> Value:
        # x t of the input gradient is the one step that starts from another full tensor.
        assert operands[0].late or operands[0].name == "x", "the first operand"

        def compute(known: dict[Value, Tensor]) -> Tensor:
            return function(*(known[operand] for operand in operands))

        self.values.append(Value(compute, True))
        return self.values[-1]

    def add(self, a: Value, b: Value) -> Value:
        return self._node(torch.add, a, b)

    def mul(self, a: Value, b: Value) -> Value:
        return self._node(torch.mul, a, b)

    def pow(self, input0: Value, input1: Value) -> Value:
        return self._node(torch.pow, input0, input1)

    def min(self, input0: Value, input1: Value) -> Value:
        return self._node(torch.fmin, input0, input1)

    def max(self, input0: Value, input1: Value) -> Value:
        return self._node(torch.fmax, input0, input1)

    def abs(self, input: Value) -> Value:
        return self._node(torch.abs, input)

    def sqrt(self, input: Value) -> Value:
        return self._node(torch.sqrt, input)

    def tanh(self, input: Value) -> Value:
        return self._node(torch.tanh, input)

    def cmp_gt(self, input: Value, comparison: Value) -> Value:
        return self._node(torch.gt, input, comparison)

    def cmp_lt(self, input: Value, comparison: Value) -> Value:
        return self._node(torch.lt, input, comparison)

    def binary_select(self, input0: Value, input1: Value, mask: Value) -> Value:
        assert mask.data_type == DataType.BOOLEAN
        return self._node(lambda x, y, which: torch.where(which, x, y), input0, input1, mask)

    def validate(self) -> None:
        self.done.append("validate")

    def build_operation_graph(self) -> None:
        self.done.append("build_operation_graph")

    def create_execution_plans(self, modes: list[HeurMode]) -> None:
        assert modes == [HeurMode.A, HeurMode.FALLBACK]
        self.done.append("create_execution_plans")

    def deselect_numeric_notes(self, notes: list[NumericalNote]) -> None:
        assert NumericalNote.NONDETERMINISTIC in notes
        self.done.append("deselect_numeric_notes")

    def check_support(self) -> None:
        self.done.append("check_support")

    def build_plans(self) -> None:
        self.frontend.built += 1
        if self.frontend.refusal is not None:
            raise self.frontend.refusal
        self.done.append("build_plans")

    def get_workspace_size(self) -> int:
        return 96

    def execute(self, addresses: dict[Value, int], workspace: int, handle: object) -> None:
        assert self.done == [
            "validate",
            "build_operation_graph",
            "create_execution_plans",
            "deselect_numeric_notes",
            "check_support",
            "build_plans",
        ]
        assert workspace and self.frontend.handles[handle] == self.frontend.stream
        self.frontend.executed += 1
        known: dict[Value, Tensor] = {}
        for value in self.values:
            assert value.data_type is not None
            if value.compute is None:
                known[value] = value.memory(addresses.pop(value)).float()
                continue
            result = value.compute(known)
            kind = DataType.BOOLEAN if result.dtype == torch.bool else DataType.FLOAT
            assert value.data_type == kind or value.output
            known[value] = result
            if value.output:
                assert list(result.shape) == value.dim
                value.memory(addresses.pop(value)).copy_(result)
        assert not addresses


class Frontend:
    """The module. ``refusal`` is raised by every build; the counters say what happened.

    ``graphs`` are those that something still refers to.
    """

    data_type = DataType
    heur_mode = HeurMode
    numerical_note = NumericalNote
    cudnnGraphNotSupportedError = NotSupportedError  # noqa: N815

    def __init__(self, stream: int, version: int = 92600) -> None:
        self.stream = stream
        self.version = version
        self.handles: dict[object, int] = {}
        self.refusal: Exception | None = None
        self.built = 0
        self.executed = 0
        self.graphs: WeakSet[Graph] = WeakSet()

    def backend_version(self) -> int:
        return self.version

    def create_handle(self) -> object:
        handle = object()
        self.handles[handle] = 0
        return handle

    def set_stream(self, handle: object, stream: int) -> None:
        self.handles[handle] = stream

    def pygraph(self, **arguments: Any) -> Graph:
        graph = Graph(self, **arguments)
        self.graphs.add(graph)
        return graph
