"""What of Triton there is: asked before any kernel is imported, which needs Triton."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re

import torch

from dcconv.operator.functions import weightings

#: The first release with everything that the kernels use, and PyTorch's from 2.10 on.
OLDEST = (3, 5)

#: Whether kernels run in Triton's interpreter, on CPU tensors: as Triton reads its own variable.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def missing() -> str | None:
    """Return None when a usable Triton is installed, else one sentence."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        return f"Triton does not load: {error}"
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < OLDEST:
        return f"the kernels need Triton {OLDEST[0]}.{OLDEST[1]} or newer, found {version}"
    return None


def twin_of(magnitude: str, weighting: str) -> str:
    """Return the name of the Triton function that stands for a magnitude and a weighting."""
    return magnitude if weightings[weighting].only_with is None else f"{magnitude}_{weighting}"


def twinless(magnitude: str, angular: str, weighting: str) -> str | None:
    """Return None when the functions of an operator have twins, else one sentence.

    It imports the twins, which needs Triton: ask ``missing`` first.
    """
    twins = importlib.import_module("dcconv.triton.kernels.functions")
    twin = twin_of(magnitude, weighting)
    if twin not in twins.MAGNITUDES:
        return f"it has no Triton twin of the magnitude '{twin}'"
    if angular not in twins.ANGULARS:
        return f"it has no Triton twin of the angular function '{angular}'"
    return None


def why_not_capability(index: int) -> str | None:
    """Return None when kernels can be compiled for a GPU, else one sentence."""
    if INTERPRETED or torch.version.hip is not None:
        return None
    if index >= torch.cuda.device_count():
        return f"this machine has no GPU {index}"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"this GPU is sm_{major}{minor}; the Triton kernels are for sm_80 and newer"
    return None


def why_not(index: int) -> str | None:
    """Return None when kernels run on a GPU (or interpreted), else one sentence; register ops."""
    reason = missing() or why_not_capability(index)
    if reason is None:
        importlib.import_module("dcconv.triton.ops_library")
        importlib.import_module("dcconv.triton.ops_fused")
    return reason
