"""Convolutions whose epilogue is an expression, as two ops that cuDNN's graph compiler runs.

``cudnn_conv2d_forward`` is the library convolution and its epilogue in one,
``cudnn_conv2d_grad_input`` its data gradient and last pass. Graphs are built by the package
nvidia-cudnn-frontend, once for every ``GraphKey``, which takes from a tenth of a second to some
seconds; the last ``MAX_GRAPHS`` are kept.

Where a graph cannot run, the op computes by the strategy library and warns once per reason: cuDNN
refuses to build it, or it is not there yet while a CUDA graph is captured, when nothing may be
built. Layers that ran once before the capture run their graphs in it.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count

from dcconv.cudnn import epilogue
from dcconv.cudnn.epilogue import FULL, MAP, SCALAR, VECTOR, Expression, Form
from dcconv.operator import convolution
from dcconv.operator.records import Window
from dcconv.passes import guards, ops, records
from dcconv.passes.op import op
from dcconv.passes.products import size_of
from dcconv.passes.records import COMPILED
from dcconv.tracing import asked_once
from dcconv.warn import warn_once

# cuDNN plans without a device from 9.11 on; nothing older was tried.
OLDEST_CUDNN = 91100

# Engines whose results differ from run to run, or that round more than sums in float32 do.
UNWANTED_NOTES = ("NONDETERMINISTIC", "DOWN_CONVERT_INPUTS", "REDUCED_PRECISION_REDUCTION")

# Kernels read 16 bytes at a time.
ALIGNMENT = 16

#: The primitives of ``dcconv.cudnn.epilogue`` as cuDNN's pointwise nodes: method and operands.
NODES: dict[str, tuple[str, tuple[str, ...]]] = {
    "add": ("add", ("a", "b")),
    "mul": ("mul", ("a", "b")),
    "pow": ("pow", ("input0", "input1")),
    "abs": ("abs", ("input",)),
    "sqrt": ("sqrt", ("input",)),
    "tanh": ("tanh", ("input",)),
    "min": ("min", ("input0", "input1")),
    "max": ("max", ("input0", "input1")),
    "greater": ("cmp_gt", ("input", "comparison")),
    "less": ("cmp_lt", ("input", "comparison")),
    "select": ("binary_select", ("mask", "input0", "input1")),
}
COMPARISONS = ("greater", "less")


class GraphKey(NamedTuple):
    """What a graph depends on. All its tensors are dense channels_last: no strides.

    Attributes:
        device: index of the GPU.
        dtype: of x, the weight and the results.
        x, weight: shapes.
        window: ungrouped, padded with as many zeros before as after.
        operator: the forward epilogue's; None for the input gradient.
        keep_dot: whether u is a result beside y.
    """

    device: int
    dtype: torch.dtype
    x: tuple[int, ...]
    weight: tuple[int, ...]
    window: Window
    operator: Form | None
    keep_dot: bool = False

    @property
    def expression(self) -> Expression:
        """The epilogue."""
        if self.operator is None:
            return epilogue.input_gradient
        return epilogue.forward(self.operator)

    @property
    def u(self) -> tuple[int, ...]:
        """Shape of the forward convolution's result."""
        p, q = guards.windows(self.x, self.weight[0], self.weight[2:], self.window)
        return (self.x[0], self.weight[0], p, q)

    @property
    def padding(self) -> tuple[int, int]:
        """Rows and columns, before as after."""
        top, _, left, _ = self.window.padding
        return top, left


class Compiled(NamedTuple):
    """A graph that cuDNN compiled.

    Attributes:
        graph: the frontend's graph.
        tensors: its tensors by the name of what they hold.
        constants: its host scalars; a graph reads them at every execution.
        workspace: bytes of scratch memory.
    """

    graph: Any
    tensors: dict[str, Any]
    constants: dict[Any, Tensor]
    workspace: int


_frontend: Any = None


@asked_once
def why_not_installed() -> str | None:
    """Return None when cuDNN graphs can be built in this process, else one sentence."""
    global _frontend
    try:
        _frontend = importlib.import_module("cudnn")
    except ModuleNotFoundError:
        return "the package nvidia-cudnn-frontend is missing: pip install 'dcconv[cudnn]'"
    except (ImportError, OSError) as error:
        return f"the package nvidia-cudnn-frontend does not load: {error}"
    try:
        version = int(_frontend.backend_version())
    except RuntimeError as error:
        return f"the package nvidia-cudnn-frontend finds no cuDNN library: {error}"
    if version < OLDEST_CUDNN:
        # 8.9.5 is 8905, 9.1.0 is 90100.
        major, minor = divmod(version // 100, 100 if version >= 90000 else 10)
        return f"cuDNN {major}.{minor} is too old: 9.11 or later is needed"
    return None


def _data_type(frontend: Any, dtype: torch.dtype) -> Any:
    types = frontend.data_type
    return {
        torch.bfloat16: types.BFLOAT16,
        torch.float16: types.HALF,
        torch.float32: types.FLOAT,
    }[dtype]


def _channels_last_strides(shape: tuple[int, ...]) -> list[int]:
    _, c, h, w = shape
    return [c * h * w, 1, c * w, c]


def compose(
    key: GraphKey, frontend: Any, **device: Any
) -> tuple[Any, dict[str, Any], dict[Any, float]]:
    """Write a key's graph.

    Args:
        key: what to write.
        frontend: the module ``cudnn``.
        device: the graph's ``handle``, or its ``device_property`` to plan without a device.

    Returns:
        The graph, its tensors by name, and its host scalars with their values.
    """
    types = frontend.data_type
    storage = _data_type(frontend, key.dtype)
    graph = frontend.pygraph(
        io_data_type=storage,
        intermediate_data_type=types.FLOAT,
        compute_data_type=types.FLOAT,
        **device,
    )

    def tensor(name: str, shape: tuple[int, ...], data_type: Any) -> Any:
        strides = _channels_last_strides(shape)
        return graph.tensor(name=name, dim=list(shape), stride=strides, data_type=data_type)

    forward = key.operator is not None
    result = key.u if forward else key.x
    geometry: dict[str, Any] = {
        "padding": list(key.padding),
        "stride": list(key.window.stride),
        "dilation": list(key.window.dilation),
    }
    tensors = {"weight": tensor("weight", key.weight, storage)}
    if forward:
        tensors["x"] = tensor("x", key.x, storage)
        u = graph.conv_fprop(tensors["x"], tensors["weight"], **geometry)
    else:
        tensors["grad_u"] = tensor("grad_u", key.u, storage)
        u = graph.conv_dgrad(tensors["grad_u"], tensors["weight"], **geometry)
        u.set_dim(list(result)).set_stride(_channels_last_strides(result))
    u.set_data_type(types.FLOAT)

    n, o, p, q = result
    shapes = {SCALAR: (1, 1, 1, 1), MAP: (n, 1, p, q), VECTOR: (1, o, 1, 1), FULL: result}
    values = {"u": u}
    for name, varies in key.expression.feeds:
        data_type = storage if varies == FULL else types.FLOAT
        values[name] = tensors[name] = tensor(name, shapes[varies], data_type)

    scalars: dict[float, Any] = {}

    def value_of(operand: str | float) -> Any:
        if isinstance(operand, str):
            return values[operand]
        if operand not in scalars:
            scalars[operand] = graph.tensor(
                name=f"constant{len(scalars)}",
                dim=[1, 1, 1, 1],
                stride=[1, 1, 1, 1],
                data_type=types.FLOAT,
                is_pass_by_value=True,
            )
        return scalars[operand]

    for step in key.expression.steps:
        method, names = NODES[step.op]
        operands = {
            name: value_of(operand) for name, operand in zip(names, step.operands, strict=True)
        }
        values[step.name] = getattr(graph, method)(**operands)
        kind = types.BOOLEAN if step.op in COMPARISONS else types.FLOAT
        values[step.name].set_data_type(kind)

    outputs = {"y": values[key.expression.result]}
    if key.keep_dot:
        outputs["dot"] = u
    for name, output in outputs.items():
        output.set_output(True).set_data_type(storage)
        output.set_dim(list(result)).set_stride(_channels_last_strides(result))
        tensors[name] = output
    return graph, tensors, {tensor: value for value, tensor in scalars.items()}


def plan(graph: Any, frontend: Any) -> None:
    """Have cuDNN list the engines for a valid graph."""
    graph.create_execution_plans([frontend.heur_mode.A, frontend.heur_mode.FALLBACK])
    notes = frontend.numerical_note
    graph.deselect_numeric_notes([getattr(notes, name) for name in UNWANTED_NOTES])
    graph.check_support()


def build(key: GraphKey, frontend: Any, **device: Any) -> Compiled:
    """Write, plan and compile a key's graph; arguments as for :func:`compose`.

    Raises:
        cudnn.cudnnGraphNotSupportedError, RuntimeError: cuDNN cannot.
    """
    graph, tensors, scalars = compose(key, frontend, **device)
    graph.validate()
    graph.build_operation_graph()
    plan(graph, frontend)
    graph.build_plans()
    constants = {
        tensor: torch.full((1, 1, 1, 1), value, dtype=torch.float32)
        for tensor, value in scalars.items()
    }
    return Compiled(graph, tensors, constants, int(graph.get_workspace_size()))


#: How many graphs are kept, the least recently used one giving way: several networks at several
#: sizes. Each takes 11 MB of host memory and half a second to build (cuDNN 9.26, 64 channels).
MAX_GRAPHS = 256

# Graphs, or the sentence why there is none, the last used one last; and graphs that captured CUDA
# graphs launch, which stay for good. Threads build and enqueue one at a time.
_compiled: dict[GraphKey, Compiled | str] = {}
_captured: dict[GraphKey, Compiled] = {}
_lock = threading.Lock()
# A handle belongs to one thread and one GPU.
_handles = threading.local()

CAPTURING = "a CUDA graph is being captured, and the layer has not run before"


def _handle(device: int) -> Any:
    """Return this thread's handle for a GPU, or None while nothing may be made."""
    known: dict[int, Any] = _handles.__dict__.setdefault("known", {})
    if device not in known:
        if torch.cuda.is_current_stream_capturing():
            return None
        known[device] = _frontend.create_handle()
    return known[device]


def _make_room() -> None:
    """Drop the least recently used graph where there is no room for another."""
    while len(_compiled) >= MAX_GRAPHS:
        oldest = next(iter(_compiled))
        if isinstance(_compiled[oldest], Compiled):
            # It may still be running, and its kernels are unloaded with it.
            torch.cuda.synchronize(oldest.device)
        del _compiled[oldest]


def _graph(key: GraphKey, handle: Any) -> Compiled | str:
    """Return a key's graph, building it if it is new, or one sentence why there is none."""
    if key in _captured:
        return _captured[key]
    capturing = torch.cuda.is_current_stream_capturing()
    if key in _compiled:
        # Moves to the end.
        built = _compiled[key] = _compiled.pop(key)
        if capturing and isinstance(built, Compiled):
            _captured[key] = built
            del _compiled[key]
        return built
    if capturing:
        return CAPTURING
    _make_room()
    try:
        _compiled[key] = build(key, _frontend, handle=handle)
    except (_frontend.cudnnGraphNotSupportedError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0]
        _compiled[key] = f"cuDNN cannot build it: {first}"
    return _compiled[key]


def execute(key: GraphKey, tensors: dict[str, Tensor]) -> str | None:
    """Run a key's graph on the current stream.

    Args:
        key: which graph.
        tensors: what it reads and writes by name: ``x``, ``weight``, ``y`` and the expression's
            feeds, with ``keep_dot`` also ``dot``; for the input gradient ``grad_u`` in place of
            ``x``. Dense, aligned, the feeds of maps and vectors in float32.

    Returns:
        None, or one sentence why it did not run.
    """
    missing = why_not_installed()
    if missing is not None:
        return missing
    with torch.cuda.device(key.device), _lock:
        handle = _handle(key.device)
        if handle is None:
            return CAPTURING
        stream = torch.cuda.current_stream(key.device)
        _frontend.set_stream(handle=handle, stream=stream.cuda_stream)
        built = _graph(key, handle)
        if isinstance(built, str):
            return built
        addresses = {place: tensors[name].data_ptr() for name, place in built.tensors.items()}
        addresses |= {place: constant.data_ptr() for place, constant in built.constants.items()}
        device = tensors["weight"].device
        workspace = torch.empty(max(built.workspace, 1), dtype=torch.uint8, device=device)
        built.graph.execute(addresses, workspace.data_ptr(), handle=handle)
    return None


def _warn(reason: str) -> None:
    warn_once(f"the library convolution runs in place of a cuDNN graph: {reason}")


def _dense(t: Tensor, layout: torch.memory_format = torch.channels_last) -> Tensor:
    """Return a tensor without gaps in a layout, at an aligned address."""
    t = t.contiguous(memory_format=layout)
    return t.clone(memory_format=layout) if t.data_ptr() % ALIGNMENT else t


class GraphForward(NamedTuple):
    """As ``OnePass``, with what a graph can do: no groups, and padding with zeros."""

    x: Tensor
    weight: Tensor
    a: Tensor
    norms: Tensor
    bias: Tensor | None
    parameters: records.Parameters
    window: Window
    functions: records.Functions
    delta: float
    eps: float
    keep_dot: bool


class GraphGradInput(NamedTuple):
    """As ``OnePassGradInput``, with what a graph can do."""

    grad_u: Tensor
    x: Tensor
    weight: Tensor
    taps: records.Taps
    window: Window


# What is the same for all windows of a graph, which is built for numbers.
_graph_op = partial(op, fixed={"groups": 1, "padding_mode": "zeros"}, static=True)


@_graph_op("", "", flops=lambda call, y: conv_flop_count(call.x, call.weight, y[0]))
def cudnn_conv2d_forward(call: GraphForward) -> tuple[Tensor, Tensor]:
    x, sizes = call.x, ops.result_sizes(call.x, call.weight, call.window)
    y = ops.images(x, sizes, torch.channels_last)
    return y, torch.empty_like(y) if call.keep_dot else x.new_empty(0)


@_graph_op("", flops=lambda call, _: conv_flop_count(call.x, call.weight, call.grad_u))
def cudnn_conv2d_grad_input(call: GraphGradInput) -> Tensor:
    return ops.images(call.x, list(call.x.shape), torch.channels_last)


def _key(
    x: Tensor, weight: Tensor, window: Window, operator: Form | None, keep_dot: bool = False
) -> GraphKey:
    # An op's lists of integers can be no keys.
    hashable = Window(*map(tuple, window[:3]))  # type: ignore[arg-type]
    sizes = (tuple(x.shape), tuple(weight.shape))
    return GraphKey(x.device.index or 0, x.dtype, *sizes, hashable, operator, keep_dot)


def _forward(call: GraphForward) -> tuple[Tensor, Tensor]:
    x, weight = _dense(call.x), _dense(call.weight)
    a, bias, (radius, mean, k) = call.a, call.bias, call.parameters
    operator = Form(
        *call.functions,
        scalar_radius=radius is not None and radius.dim() == 0,
        scalar_k=k is not None and k.dim() == 0,
        scaled_radius=radius is not None and mean is not None,
        bias=bias is not None,
    )
    key = _key(x, weight, call.window, operator, call.keep_dot)
    y, dot = cudnn_conv2d_forward.fake(call)
    n, _, p, q = key.u
    leaves = {"b": call.norms.view(n, 1, p, q)}
    for name, leaf in (("a", a), ("radius", radius), ("mean", mean), ("k", k), ("bias", bias)):
        if leaf is not None:
            leaves[name] = leaf.to(a.dtype).reshape(1, -1, 1, 1)
    ready = epilogue.evaluate(key.expression.prepared, leaves)
    tensors = {"x": x, "weight": weight, "y": y, "dot": dot}
    for name, _ in key.expression.feeds:
        tensors[name] = _dense(ready[name], torch.contiguous_format)
    reason = execute(key, tensors)
    if reason is None:
        return y, dot
    _warn(reason)
    window = call.window
    geometry = (window.stride, key.padding, window.dilation, 1)
    u = convolution.conv2d(x, weight, None, *geometry).contiguous(memory_format=torch.channels_last)
    if call.keep_dot:
        dot.copy_(u)
    windows = (size_of(x), size_of(weight), window)
    formula = (call.functions, call.delta, call.eps)
    operands = (u, a, call.norms, bias, call.parameters)
    y, _ = ops.conv2d_epilogue(records.Epilogue(*operands, *windows, *formula, True, True))
    return y, dot


def _grad_input(call: GraphGradInput) -> Tensor:
    grad_u, x, weight = _dense(call.grad_u), _dense(call.x), _dense(call.weight)
    key, window = _key(x, weight, call.window, None), call.window
    n, _, h, w = x.shape
    # The pass on one channel of ones: 0 + 1 * sum of the taps.
    ones = torch.ones((n, 1, h, w), dtype=call.taps.t.dtype, device=x.device)
    taps = torch.zeros_like(ones)
    rest = (call.taps, size_of(weight), window, False, True)
    ops.conv2d_grad_input_(records.GradInput(taps, ones, *rest))
    grad_x = cudnn_conv2d_grad_input.fake(call)
    tensors = {"grad_u": grad_u, "weight": weight, "x": x, "t": taps, "y": grad_x}
    reason = execute(key, tensors)
    if reason is None:
        return grad_x
    _warn(reason)
    geometry = (window.stride, key.padding, window.dilation, 1)
    wanted = [True, False, False]
    library_grad, _, _ = convolution.conv2d_backward(grad_u, x, weight, *geometry, wanted)
    assert library_grad is not None
    grad_x.copy_(library_grad)
    ops.conv2d_grad_input_(records.GradInput(grad_x, x, *rest))
    return grad_x


_library = torch.library.Library("dcconv", "FRAGMENT")

#: What runs on GPUs, by the name of the op.
implementations: dict[str, Callable[..., Any]] = {
    cudnn_conv2d_forward.name: cudnn_conv2d_forward.taking(_forward),
    cudnn_conv2d_grad_input.name: cudnn_conv2d_grad_input.taking(_grad_input),
}
for _op in (cudnn_conv2d_forward, cudnn_conv2d_grad_input):
    _library.define(_op.name + _op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_op.name, implementations[_op.name], "CUDA")
    _op.register(COMPILED)
