"""Loads the compiled library; says what is in it and how its ops are called.

Schemas and kernels live in ``csrc``, fakes in ``dcconv.passes.ops``. An op has no autograd
formula of its own: ``dcconv.call.autograd`` composes them.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

import torch

from dcconv.operator.convolution import library_has_bfloat16
from dcconv.operator.records import Operands, Problem

_build: Any = None
try:
    _build = importlib.import_module("dcconv._build")
except ModuleNotFoundError:
    pass


def _load() -> str | None:
    """Import the compiled library; return None, or one sentence why it is missing."""
    try:
        importlib.import_module("dcconv._C")
    except ModuleNotFoundError:
        reason = getattr(_build, "REASON", None) or "dcconv was not built in this environment"
        return f"the compiled library is missing: {reason}"
    except ImportError as error:
        return f"the compiled library does not load: {error}"
    if not torch.ops.dcconv.cpu_isas():
        return (
            f"the compiled library was built for a processor with {getattr(_build, 'ISA', None)} "
            "alone (DCCONV_BUILD=local), which this one lacks"
        )
    return None


#: None when the compiled library is loaded, else one sentence why not.
missing: str | None = _load()


#: The functions that the compiled library has, as it names them itself; none where it is missing.
magnitudes: tuple[str, ...] = ()
angulars: tuple[str, ...] = ()
if missing is None:
    magnitudes = tuple(torch.ops.dcconv.magnitudes())
    angulars = tuple(torch.ops.dcconv.angulars())
    torch.ops.dcconv.set_cpu_bfloat16(library_has_bfloat16())


def why_not_functions(magnitude: str, angular: str) -> str | None:
    """Return None when the compiled library has both functions, else one sentence."""
    if magnitude not in magnitudes:
        return f"the compiled library has no magnitude '{magnitude}'"
    if angular not in angulars:
        return f"the compiled library has no angular function '{angular}'"
    return None


def cuda_missing() -> str | None:
    """Return None when CUDA code is part of the compiled library, else one sentence why not."""
    if missing is not None:
        return missing
    return getattr(_build, "CUDA_REASON", "dcconv was built without CUDA")


def cpu_instructions() -> str:
    """Return the instruction set of the CPU kernels, and that it is the only one if it is."""
    only = getattr(_build, "ISA", None) is not None
    note = ", the only ones compiled: DCCONV_BUILD=local" if only else ""
    return f"{torch.ops.dcconv.cpu_isa()} instructions{note}"


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for one entry of TORCH_CUDA_ARCH_LIST runs on a GPU."""
    found = re.fullmatch(r"(\d+)\.(\d)(a?)(f?)(\+PTX)?", arch)
    if found is None:
        return True  # a name such as "Hopper": the driver is left to say
    target = (int(found[1]), int(found[2]))
    if found[3]:
        return capability == target
    if found[5] and not found[4]:
        return capability >= target
    return capability[0] == target[0] and capability[1] >= target[1]


def why_not_gpu(capability: tuple[int, int], archs: str | None = None) -> str | None:
    """Return None when the library has code for a GPU, else one sentence.

    Machine code runs within its major version from its minor version on, code for 9.0a on 9.0
    alone, PTX on everything that is not older.

    Args:
        capability: major and minor, as ``torch.cuda.get_device_capability`` says.
        archs: what code there is, as TORCH_CUDA_ARCH_LIST says it; None for the library's.
    """
    if archs is None:
        archs = getattr(_build, "ARCHS", None) or ""
    known = archs.replace(";", " ").split()
    if any(_runs_on(arch, capability) for arch in known):
        return None
    return f"this GPU is sm_{capability[0]}{capability[1]}; the library has code for " + (
        ", ".join(known) or "none"
    )


def as_pytorch(error: RuntimeError) -> RuntimeError:
    """Return an error of a compiled op in the class that PyTorch has for it.

    What passes through C++ without one arrives as RuntimeError: for want of memory on a CPU that is
    PyTorch's own class, on a GPU it is not.
    """
    out = "CUDA out of memory" in str(error) and not isinstance(error, torch.OutOfMemoryError)
    return torch.OutOfMemoryError(str(error)) if out else error


def conv2d_arguments(operands: Operands, problem: Problem) -> tuple[Any, ...]:
    """Return the arguments shared by the forward op, in schema order."""
    operator, numbers = problem.operator, (problem.operator.eps, problem.delta)
    return *operands, *problem.window, *operator.constants, *numbers, problem.norm
