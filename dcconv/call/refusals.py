"""What each backend says to one call: None, or one sentence why it cannot run it.

The same sentence is the exception for a forced backend, the skip reason of a test and the line of
``backends.report``. A predicate sees the facts of one call and nothing else: a refusal never takes
a whole backend out of use.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dcconv import native
from dcconv.operator.records import Operator
from dcconv.tracing import asked_once, constant_for_tracing, recording
from dcconv.triton import environment


class Call(NamedTuple):
    """What a backend is asked about: static facts only, so that choosing can be traced.

    Attributes:
        device, dtype: of x.
        transformed: whether a torch.func transform or a forward-mode derivative is active.
        gpu: index of x's GPU.
        functions: magnitude, angular function and weighting; None for a patch norm, or where the
            question is about plain tensors.
        recorded: whether torch.jit.trace records the call, with gradients on.
    """

    device: str
    dtype: torch.dtype
    transformed: bool
    gpu: int = 0
    functions: tuple[str, str, str] | None = None
    recorded: bool = False


def describe(x: Tensor, operator: Operator | None = None) -> Call:
    """Return the facts about a call that backends decide by."""
    functions = None if operator is None else operator.constants[:3]
    recorded = torch.is_grad_enabled() and recording()
    index = x.device.index or 0
    return Call(x.device.type, x.dtype, is_transformed(), index, functions, recorded)


def is_transformed() -> bool:
    """Return whether a torch.func transform or a forward-mode derivative is active, eagerly."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def _transformed(call: Call) -> str | None:
    if call.transformed:
        return "torch.func transforms and forward-mode derivatives need plain PyTorch operations"
    if call.recorded:
        return (
            "torch.jit.trace records its op under torch.no_grad() alone, since recorded ops have "
            "no gradient"
        )
    return None


def _functions(call: Call) -> str | None:
    if call.functions is None:
        return None
    return native.why_not_functions(call.functions[0], call.functions[1])


@asked_once
def _why_not_gpu(index: int) -> str | None:
    if index < torch.cuda.device_count():
        return native.why_not_gpu(torch.cuda.get_device_capability(index))
    return f"this machine has no GPU {index}"


def cuda(call: Call) -> str | None:
    """Return None if the cuda backend runs a call, else one sentence."""
    if call.device != "cuda":
        return f"it runs on CUDA tensors, got a {call.device} tensor"
    reason = native.cuda_missing()
    if reason is not None:
        return reason
    return _why_not_gpu(call.gpu) or _functions(call) or _transformed(call)


# It imports the kernels.
_why_not_kernels = asked_once(environment.why_not)


# Constant for tracing: it reads a module's lists.
_why_not_twins = constant_for_tracing(environment.twinless)


def triton(call: Call) -> str | None:
    """Return None if the triton backend runs a call, else one sentence."""
    device = "cpu" if environment.INTERPRETED else "cuda"
    if call.device != device:
        suffix = " in Triton's interpreter" if environment.INTERPRETED else ""
        return f"it runs on {device.upper()} tensors{suffix}, got a {call.device} tensor"
    if call.dtype == torch.float64:
        return "its functions are float32 polynomials, got a float64 tensor"
    reason: str | None = _why_not_kernels(call.gpu)
    if reason is None and call.functions is not None:
        reason = _why_not_twins(*call.functions)
    return reason or _transformed(call)


def cpu(call: Call) -> str | None:
    """Return None if the cpu backend runs a call, else one sentence."""
    if call.device != "cpu":
        return f"it runs on CPU tensors, got a {call.device} tensor"
    if native.missing is not None:
        return native.missing
    return _functions(call) or _transformed(call)


def reference(call: Call) -> None:
    """Return None: plain PyTorch operations run every call."""
