"""What a generated module launches: its kernels, with their tensors, in order.

The module runs as it is, but on CPU tensors of arbitrary elements, and its kernels are noted
instead of launched. The library's convolutions are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench.machine.compiled.generate import Module, Spec
from bench.machine.compiled.pretend import pretending
from bench.machine.gpus import Gpu

#: How generated code calls the library's gradients.
BACKWARD = "torch.ops.aten.convolution_backward.default"

#: Lowest and highest of arbitrary elements: norms and radii are positive.
LOW, HIGH = 0.5, 1.5


class Step(NamedTuple):
    """A launch.

    Attributes:
        name: of the generated kernel.
        source: its own module.
        arguments: tensors and numbers, in the order of the kernel's.
    """

    name: str
    source: str
    arguments: tuple[Any, ...]


def filled(spec: Spec) -> Tensor:
    """Return a tensor of arbitrary elements."""
    return spec.empty().uniform_(LOW, HIGH)


def _empty(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    return filled(Spec(tuple(shape), tuple(stride), dtype))


class _Kernel:
    """Stands for a compiled kernel."""

    def __init__(self, steps: list[Step], name: str, source: str) -> None:
        self.steps, self.name, self.source = steps, name, source

    def run(self, *arguments: Any, stream: Any) -> None:
        self.steps.append(Step(self.name, self.source, arguments))


class _Library:
    """Stands for the library's convolutions, whose results are as cuDNN lays them out."""

    @staticmethod
    def convolution(x: Tensor, weight: Tensor, **geometry: Any) -> Tensor:
        made = torch.nn.functional.conv2d(
            x.to("meta"),
            weight.to("meta"),
            None,
            *(geometry[name] for name in ("stride", "padding", "dilation", "groups")),
        )
        spec = Spec.of(made.contiguous(memory_format=torch.channels_last))
        return filled(spec)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, *geometry: Any) -> list[Tensor | None]:
    wanted = geometry[-1]
    pair = zip((x, weight), wanted, strict=False)
    return [filled(Spec.of(one)) if wants else None for one, wants in pair]


def steps_of(module: Module, gpu: Gpu) -> list[Step]:
    """Return the launches of a module's function."""
    from torch._inductor.async_compile import AsyncCompile

    steps: list[Step] = []

    def kernel(self: Any, name: str, source: str, device_str: str = "cuda") -> _Kernel:
        return _Kernel(steps, name, source)

    scope: dict[str, Any] = {"__name__": "generated", "__file__": "generated.py"}
    arguments = [filled(s) if isinstance(s, Spec) else s for s in module.inputs]
    source = module.source.replace(BACKWARD, "convolution_backward")
    with (
        pretending(gpu),
        mock.patch.object(AsyncCompile, "triton", kernel),
        mock.patch.object(AsyncCompile, "wait", return_value=None),
    ):
        exec(compile(source, "generated.py", "exec"), scope)  # noqa: S102 (Inductor wrote it)
        scope |= {"empty_strided_cuda": _empty, "extern_kernels": _Library()}
        scope["convolution_backward"] = _backward
        scope["get_raw_stream"] = lambda device: 0
        scope["call"](arguments)
    return steps
