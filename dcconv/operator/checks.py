"""Every check of user input, with its message: "dcconv: <argument> must <rule>, got <value>".

Values are checked for Python numbers only: reading a tensor's value would synchronise the device.
"""

from __future__ import annotations

import math
import numbers
import operator as operators
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from dcconv.operator.convolution import batched, fitted
from dcconv.operator.functions import angulars, magnitudes, weightings
from dcconv.operator.numerics import FLOATING_DTYPES, angle_delta
from dcconv.operator.records import (
    MOST_PIXELS,
    NORM_BATCH,
    NORM_GIVEN,
    NORM_NONE,
    PADDING_MODES,
    Operands,
    Problem,
    as_compute,
    output_size,
    same_padding,
)
from dcconv.warn import warn_once

KEEPS = ("auto", "output", "dot")

DTYPE_RULE = "be float16, bfloat16, float32 or float64"

# Padding from which the pixels of the output are counted, and how many there may be.
LARGEST_PADDING, LARGEST_OUTPUT = 2**16, 2**40


class ArgumentValueError(ValueError, RuntimeError):
    """A wrong value; also a RuntimeError, which ``nn.Conv2d`` raises for wrong inputs."""


class ArgumentTypeError(TypeError, ValueError, RuntimeError):
    """A wrong type; also what ``nn.Conv2d`` raises in its place, ValueError or RuntimeError."""


def value_error(argument: str, rule: str, got: object) -> ArgumentValueError:
    """Build the house ValueError."""
    return ArgumentValueError(f"dcconv: {argument} must {rule}, got {got}")


def type_error(argument: str, rule: str, got: object) -> ArgumentTypeError:
    """Build the house TypeError."""
    return ArgumentTypeError(f"dcconv: {argument} must {rule}, got {got}")


def choice(argument: str, value: object, known: Iterable[str]) -> None:
    """Require one of the known names."""
    names = list(known)
    if not isinstance(value, str):
        raise type_error(argument, f"be one of {', '.join(names)}", type(value).__name__)
    if value not in names:
        raise value_error(argument, f"be one of {', '.join(names)}", repr(value))


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number: Python's, NumPy's, or one that a compiler made symbolic."""
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return not isinstance(value, bool)
    return isinstance(value, numbers.Real)


def number(argument: str, value: object, rule: str, low: float, *, closed: bool = False) -> None:
    """Require a finite Python number above ``low`` (at least ``low`` when closed)."""
    if not is_number(value):
        raise type_error(argument, rule, type(value).__name__)
    # A chain of comparisons, because it must also trace numbers that a compiler made symbolic. An
    # int may lie beyond every float.
    most = sys.float_info.max if isinstance(value, int) else math.inf
    if not (low <= value < most) or (value == low and not closed):
        raise value_error(argument, rule, value)


def integer(argument: str, value: object, low: int) -> None:
    """Require an integer of at least ``low``."""
    rule = f"be an integer of at least {low}"
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise type_error(argument, rule, type(value).__name__)
    if value < low:
        raise value_error(argument, rule, value)


def size(argument: str, value: Any, low: int) -> int:
    """Return an integer from ``low`` to ``MOST_PIXELS``, or what stands for one, as NumPy's do."""
    # Not a tensor, whose value may be on a device.
    if not isinstance(value, (int, torch.SymInt, Tensor)):
        try:
            value = operators.index(value)
        except TypeError:
            # Not an integer: refused below, by its type.
            pass
    integer(argument, value, low)
    # Symbolic numbers are made of sizes of tensors: a guard on each would tie a program to them.
    if isinstance(value, int) and value > MOST_PIXELS:
        raise value_error(argument, f"be an integer of at most {MOST_PIXELS}", value)
    result: int = value
    return result


def boolean(argument: str, value: object) -> bool:
    """Return a bool, Python's own or NumPy's, as a bool."""
    kind = type(value)
    # By name, because NumPy need not be installed; its type has been called bool since 2.0.
    if not isinstance(value, bool) and (kind.__module__, kind.__name__.rstrip("_")) != (
        "numpy",
        "bool",
    ):
        raise type_error(argument, "be a bool", kind.__name__)
    return bool(value)


def pair(argument: str, value: Any, low: int) -> tuple[int, int]:
    """Return an integer or one or two integers in a sequence, each at least ``low``, as a pair."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        if len(value) not in (1, 2):
            raise value_error(argument, "be an integer or a pair of integers", tuple(value))
        return int(size(argument, value[0], low)), int(size(argument, value[-1], low))
    value = int(size(argument, value, low))
    return value, value


def padding_argument(padding: Any) -> str | tuple[int, int]:
    """Return ``same``, ``valid`` or a pair of integers."""
    if isinstance(padding, str):
        choice("padding", padding, ("same", "valid"))
        return padding
    return pair("padding", padding, 0)


def functions(magnitude: object, angular: object, weighting: object) -> None:
    """Check the names of an operator's functions."""
    choice("magnitude", magnitude, magnitudes)
    choice("angular", angular, angulars)
    choice("weighting", weighting, weightings)
    only_with = weightings[str(weighting)].only_with
    if only_with is not None and magnitude != only_with:
        raise value_error(
            "magnitude", f"be '{only_with}' for weighting '{weighting}'", repr(magnitude)
        )


def operator(
    magnitude: object,
    angular: object,
    weighting: object,
    alpha: object,
    beta: object,
    power: object,
    eps: object,
    padding_mode: object,
) -> None:
    """Check the names and constants of an operator."""
    functions(magnitude, angular, weighting)
    choice("padding_mode", padding_mode, PADDING_MODES)
    number("alpha", alpha, "be a finite number above 0", 0.0)
    number("beta", beta, "be a finite number of at least 0", 0.0, closed=True)
    number("power", power, "be a finite number of at least 1", 1.0, closed=True)
    number("eps", eps, "be a finite number above 0", 0.0)


def is_dtensor(value: object) -> bool:
    """Whether a value is a ``torch.distributed.tensor.DTensor``."""
    # By its name: importing it takes a second, and compilers trace this.
    return type(value).__name__ == "DTensor"


def dense(argument: str, value: Tensor) -> None:
    """Require a tensor that is one array: not in parts, sparse or in a library's own layout."""
    if is_dtensor(value):  # the ops have no sharding rules
        rule = "be a plain tensor, as fully_shard's forward has it (a DTensor has to_local())"
        raise type_error(argument, rule, "a DTensor")
    if value.is_nested:
        raise type_error(argument, "be a strided tensor", "a nested one")
    if value.layout != torch.strided:
        raise type_error(argument, "be a strided tensor", value.layout)


def input_tensor(x: object) -> None:
    """Require a floating [n, c, h, w] or [c, h, w] tensor."""
    if not isinstance(x, Tensor):
        raise type_error("x", "be a tensor", type(x).__name__)
    dense("x", x)
    if x.dim() not in (3, 4):
        raise value_error("x", "have shape [n, c, h, w] or [c, h, w]", list(x.shape))
    if x.dtype not in FLOATING_DTYPES:
        raise type_error("x", "have dtype float16, bfloat16, float32 or float64", x.dtype)
    if x.shape[-3] == 0:
        raise value_error("x", "have at least one channel", list(x.shape))


def same_device(argument: str, value: Tensor, x: Tensor) -> None:
    """Require a tensor on x's device."""
    if value.device != x.device:
        raise value_error(argument, f"be on x's device {x.device}", value.device)


def weight_tensor(weight: object, x: Tensor, groups: int) -> None:
    """Require a [o, c / groups, r, s] filter tensor that fits x."""
    if not isinstance(weight, Tensor):
        raise type_error("weight", "be a tensor", type(weight).__name__)
    dense("weight", weight)
    if weight.dim() != 4:
        raise value_error("weight", "have shape [o, c / groups, r, s]", list(weight.shape))
    if weight.dtype != x.dtype:
        raise type_error("weight", f"have x's dtype {x.dtype}", weight.dtype)
    same_device("weight", weight, x)
    if weight.shape[0] == 0:
        raise value_error("weight", "have at least one filter", list(weight.shape))
    channels, wanted = x.shape[-3], weight.shape[1] * groups
    if channels != wanted and x.shape[-1] == wanted:
        order = "(0, 3, 1, 2)" if x.dim() == 4 else "(2, 0, 1)"
        rule = f"have its {wanted} channels before rows and columns, as x.permute{order} has them"
        raise value_error("x", rule, list(x.shape))
    if channels % groups:
        raise value_error("groups", f"divide the {channels} channels of x", groups)
    if weight.shape[0] % groups:
        raise value_error("groups", f"divide the {weight.shape[0]} filters of weight", groups)
    if weight.shape[1] != channels // groups:
        raise value_error(
            "weight.size(1)", f"be in_channels / groups = {channels // groups}", weight.shape[1]
        )
    if weight.shape[2] == 0 or weight.shape[3] == 0:
        raise value_error("weight", "have at least one row and column", list(weight.shape))


def bias_tensor(bias: object, x: Tensor, filters: int) -> None:
    """Require None or a [o] tensor of x's dtype."""
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise type_error("bias", "be a tensor or None", type(bias).__name__)
    dense("bias", bias)
    if bias.dim() != 1 or bias.shape[0] != filters:
        raise value_error("bias", f"have shape [{filters}]", list(bias.shape))
    if bias.dtype != x.dtype:
        raise type_error("bias", f"have x's dtype {x.dtype}", bias.dtype)
    same_device("bias", bias, x)


def parameter(argument: str, value: object, x: Tensor, filters: int) -> Tensor | float:
    """Return a number above 0, as a plain one, or a floating tensor of shape [] or [o]."""
    rule = f"be a number above 0 or a floating tensor of shape [] or [{filters}]"
    if isinstance(value, Tensor):
        dense(argument, value)
        if value.dtype not in FLOATING_DTYPES:
            raise type_error(argument, rule, value.dtype)
        if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != filters):
            raise value_error(argument, rule, f"shape {list(value.shape)}")
        same_device(argument, value, x)
        return value
    if not is_number(value):
        raise type_error(argument, rule, type(value).__name__)
    if not 0 < value < (sys.float_info.max if isinstance(value, int) else math.inf):
        raise value_error(argument, rule, value)
    # PyTorch takes no numbers but these; a compiler's symbols stay what they are.
    return value if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) else float(value)


def norm_mean_argument(norm_mean: object, x: Tensor) -> str:
    """Return the norm mode of a ``norm_mean`` argument."""
    rule = "be None, 'batch' or a floating tensor of shape []"
    if norm_mean is None:
        return NORM_NONE
    if isinstance(norm_mean, str):
        if norm_mean != NORM_BATCH:
            raise value_error("norm_mean", rule, repr(norm_mean))
        return NORM_BATCH
    if not isinstance(norm_mean, Tensor) or norm_mean.dtype not in FLOATING_DTYPES:
        got = norm_mean.dtype if isinstance(norm_mean, Tensor) else type(norm_mean).__name__
        raise type_error("norm_mean", rule, got)
    dense("norm_mean", norm_mean)
    if norm_mean.dim() != 0:
        raise value_error("norm_mean", rule, f"shape {list(norm_mean.shape)}")
    same_device("norm_mean", norm_mean, x)
    return NORM_GIVEN


def geometry(
    x: Tensor, kernel: tuple[int, int], stride: Any, padding: Any, dilation: Any, padding_mode: str
) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int]]:
    """Return stride, padding (top, bottom, left, right) and dilation, checked against x."""
    stride = pair("stride", stride, 1)
    dilation = pair("dilation", dilation, 1)
    padding = padding_argument(padding)
    h: Any = x.shape[-2]
    w: Any = x.shape[-1]
    if isinstance(h, Tensor):  # recorded by torch.jit.trace
        h, w = int(h), int(w)
        kernel = int(kernel[0]), int(kernel[1])
        if padding == "same" and max(stride) > 1:
            warn_once(
                f"torch.jit.trace records padding='same' at stride {list(stride)} for images of "
                f"{h} x {w}: others may need another padding"
            )
    if padding == "same":
        edges = (
            *same_padding(h, kernel[0], stride[0], dilation[0]),
            *same_padding(w, kernel[1], stride[1], dilation[1]),
        )
    elif padding == "valid":
        edges = (0, 0, 0, 0)
    else:
        edges = (padding[0], padding[0], padding[1], padding[1])
    # The padding at the end is never the smaller one.
    for size, largest, axis in ((h, edges[1], "height"), (w, edges[3], "width")):
        # Asked of numbers alone, as of all sizes: others are symbols of a compiler.
        if isinstance(largest, int) and largest > MOST_PIXELS:
            raise value_error("padding", f"be at most {MOST_PIXELS} pixels for 'same'", largest)
        if padding_mode == "reflect" and largest and largest >= size:
            raise value_error("padding", f"be below the {axis} {size} for 'reflect'", largest)
        if padding_mode == "circular" and largest > size:
            raise value_error("padding", f"be at most the {axis} {size} for 'circular'", largest)
        if padding_mode == "replicate" and largest and size == 0:
            raise value_error("x", f"have a {axis} of at least 1 for 'replicate'", size)
    p = output_size(h, kernel[0], stride[0], edges[0], edges[1], dilation[0])
    q = output_size(w, kernel[1], stride[1], edges[2], edges[3], dilation[1])
    # With 'same' there is a window for every stride.
    if padding != "same" and (p < 1 or q < 1):
        extent = [dilation[0] * (kernel[0] - 1) + 1, dilation[1] * (kernel[1] - 1) + 1]
        padded = [h + edges[0] + edges[1], w + edges[2] + edges[3]]
        raise value_error(
            "x", f"be at least as large as the dilated kernel {extent} after padding", padded
        )
    for largest in (edges[1], edges[3]):
        if isinstance(largest, int) and largest > LARGEST_PADDING and p * q > LARGEST_OUTPUT:
            raise value_error("padding", f"leave at most {LARGEST_OUTPUT} pixels", [p, q])
    if h == 0 or w == 0:
        raise value_error("x", "have a height and width of at least 1", [h, w])
    return stride, edges, dilation


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    *,
    magnitude: str,
    angular: str,
    weighting: str,
    alpha: float,
    beta: float,
    radius: Tensor | float,
    norm_mean: Tensor | str | None,
    k: Tensor | float,
    power: float,
    eps: float,
    padding_mode: str,
    norm_grad: bool = True,
) -> tuple[Operands, Problem]:
    """Check a decoupled convolution call and return its operands, x batched, and its problem."""
    operator(magnitude, angular, weighting, alpha, beta, power, eps, padding_mode)
    input_tensor(x)
    groups = size("groups", groups, 1)
    weight_tensor(weight, x, groups)
    bias_tensor(bias, x, weight.shape[0])
    radius = parameter("radius", radius, x, weight.shape[0])
    k = parameter("k", k, x, weight.shape[0])
    norm = norm_mean_argument(norm_mean, x)
    kernel = (weight.shape[2], weight.shape[3])
    stride, edges, dilation = geometry(x, kernel, stride, padding, dilation, padding_mode)
    uses_rho = magnitudes[magnitude].uses_rho
    problem = Problem(
        stride=stride,
        padding=edges,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        magnitude=magnitude,
        angular=angular,
        weighting=weighting,
        alpha=float(alpha),
        beta=float(beta),
        power=float(power),
        eps=float(eps),
        norm=norm if uses_rho else NORM_NONE,
        norm_grad=norm_grad,
        delta=angle_delta(x),
    )
    mean = norm_mean if isinstance(norm_mean, Tensor) and uses_rho else None
    operands = Operands(
        x=batched(x),
        weight=fitted(weight),
        bias=bias,
        radius=as_compute(radius, x) if uses_rho else None,
        norm_mean=as_compute(mean, x),
        k=as_compute(k, x) if problem.uses_k else None,
    )
    return operands, problem


def patch_norm(
    x: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    eps: float,
    padding_mode: str,
) -> tuple[Tensor, tuple[int, int], Problem]:
    """Check a patch norm call and return x batched, the kernel size and the problem."""
    choice("padding_mode", padding_mode, PADDING_MODES)
    number("eps", eps, "be a finite number above 0", 0.0)
    input_tensor(x)
    groups = size("groups", groups, 1)
    kernel = pair("kernel_size", kernel_size, 1)
    channels = x.shape[-3]
    if channels % groups:
        raise value_error("groups", f"divide the {channels} channels of x", groups)
    stride, edges, dilation = geometry(x, kernel, stride, padding, dilation, padding_mode)
    problem = Problem(
        stride=stride,
        padding=edges,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        eps=float(eps),
    )
    return batched(x), kernel, problem
