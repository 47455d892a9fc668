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

from dcconv.operator.functions import angulars, magnitudes, weightings
from dcconv.operator.numerics import MOST_PIXELS

KEEPS = ("auto", "output", "dot")

DTYPE_RULE = "be float16, bfloat16, float32 or float64"

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


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
