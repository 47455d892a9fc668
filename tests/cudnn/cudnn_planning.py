"""Asks cuDNN, without a GPU, what it thinks of every graph; writes its answers as JSON.

    python tests/cudnn/cudnn_planning.py answers.json

cuDNN plans and compiles for a GPU that is only described to it (``DEVICE``). What it compiled it
then wants to load with the CUDA driver: on a machine without one, ``stand_in_driver`` makes a
library that accepts programs and can do nothing else. It must be on LD_LIBRARY_PATH of the process.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

if str(Path(__file__).resolve().parents[1] / "support") not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from cases import IN_STEPS

from dcconv.cudnn import ops as cudnn_ops
from dcconv.cudnn.epilogue import Form
from dcconv.cudnn.ops import GraphKey
from dcconv.operator.records import Window, is_norm_free

# An H100 in the words of cuDNN's device descriptor.
DEVICE: dict[str, Any] = {
    "version": 1,
    "deviceName": "NVIDIA H100 80GB HBM3",
    "deviceVer": 900,
    "driverVer": 13000,
    "cudaDeviceId": 0,
    "pciDeviceId": 0,
    "isTccDriver": 0,
    "supportCoopLaunch": 1,
    "multiProcessorCount": 132,
    "smCountOrigin": 0,
    "warpSize": 32,
    "maxGridSize": [2147483647, 65535, 65535],
    "maxBlockSize": [1024, 1024, 64],
    "maxThreadsPerBlock": 1024,
    "maxThreadsPerSM": 2048,
    "maxCtasPerSM": 32,
    "regsPerBlock": 65536,
    "maxRegistersPerSM": 65536,
    "maxSharedMemoryPerBlock": 49152,
    "maxSharedMemoryPerBlockOptin": 232448,
    "reservedSharedMemoryPerBlock": 1024,
    "oversizedSharedMemoryPerBlock": 0,
    "totalGlobalMem": 85000000000,
    "l2CacheSize": 52428800,
    "smClockRateKHz": 1980000,
    "memClockRateKHz": 2619000,
}

# Functions of the CUDA driver that cuDNN looks up: those that make something, those that it calls
# on what was made, and those that need a GPU.
MAKES = (
    *("cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelGetFunction"),
    *("cuModuleLoadData", "cuModuleLoadDataEx", "cuModuleGetFunction"),
)
ACCEPTS = ("cuInit", "cuFuncSetAttribute", "cuKernelSetAttribute", "cuLibraryUnload")
REFUSES = (
    *("cuGetExportTable", "cuDriverGetVersion", "cuGetErrorName", "cuGetErrorString"),
    *("cuCtxGetCurrent", "cuCtxGetDevice", "cuCtxGetLimit", "cuCtxPopCurrent", "cuCtxPushCurrent"),
    *("cuDeviceGet", "cuDeviceGetAttribute", "cuDeviceGetCount", "cuDevicePrimaryCtxRelease"),
    *("cuDevicePrimaryCtxReset", "cuDevicePrimaryCtxRetain", "cuThreadExchangeStreamCaptureMode"),
    *("cuFuncGetAttribute", "cuKernelGetAttribute", "cuLibraryLoadFromFile"),
    *("cuLaunchKernel", "cuLaunchKernelEx", "cuLaunchCooperativeKernel", "cuMemcpyDtoH_v2"),
    *("cuLinkAddData", "cuLinkAddData_v2", "cuLinkAddFile_v2", "cuLinkComplete", "cuLinkCreate"),
    *("cuLinkCreate_v2", "cuLinkDestroy", "cuModuleGetGlobal_v2", "cuModuleLoadFatBinary"),
    *("cuModuleUnload", "cuOccupancyMaxActiveBlocksPerMultiprocessor"),
    *("cuOccupancyMaxPotentialClusterSize", "cuStreamGetCtx", "cuStreamGetGreenCtx"),
    *("cuStreamSynchronize", "cuTensorMapEncodeTiled", "cuTensorMapEncodeIm2col"),
)
NO_DEVICE = 100


def stand_in_driver(folder: Path) -> str | None:
    """Make libcuda.so.1 in a folder; return None, or one sentence why it cannot be made."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "the driver's stand-in needs a C compiler"
    lines = ["static int token;"]
    lines += [f"int {name}(void **out) {{ *out = &token; return 0; }}" for name in MAKES]
    lines += [f"int {name}(void) {{ return 0; }}" for name in ACCEPTS]
    lines += [f"int {name}(void) {{ return {NO_DEVICE}; }}" for name in REFUSES]
    source = folder / "driver.c"
    source.write_text("\n".join(lines) + "\n")
    library = folder / "libcuda.so.1"
    subprocess.run([compiler, "-w", "-shared", "-fPIC", "-o", library, source], check=True)
    return None


WINDOW = Window(padding=(1, 1, 1, 1))
LAYER = GraphKey(0, torch.bfloat16, (8, 64, 14, 14), (64, 64, 3, 3), WINDOW, None)
DEFAULT = Form("tanh", "cosine", "none", scaled_radius=True)


def expressible() -> dict[str, Form]:
    """Return every operator that is worth a graph, with constants that none folds away."""
    return {
        f"{magnitude} {weighting} {angular}": Form(
            magnitude, angular, weighting, 1.5, 0.25, 3.0, scaled_radius=True, bias=True
        )
        for magnitude, weighting, angular in IN_STEPS
        if not is_norm_free(magnitude, angular, weighting)
    }


def tried(operator: Form) -> bool:
    """Whether to ask for engines too, a fifth of a second each: every function at least once."""
    if operator.angular != "square_cosine":
        return (operator.magnitude, operator.weighting) == ("tanh", "none")
    return operator.weighting != "linear" or operator.magnitude == "mix"


def answers(frontend: Any) -> dict[str, Any]:
    """Validate all operators' graphs, plan some and compile one in each direction."""
    device = {
        "device_property": frontend.create_device_properties(json.dumps(DEVICE)),
        "sm_version": DEVICE["deviceVer"] // 10,
    }
    errors = (frontend.cudnnGraphNotSupportedError, RuntimeError)
    valid: dict[str, str] = {}
    plans: dict[str, int | str] = {}
    for name, operator in expressible().items():
        key = LAYER._replace(operator=operator, keep_dot="power" not in name)
        graph, _, _ = cudnn_ops.compose(key, frontend, **device)
        try:
            graph.validate()
            graph.build_operation_graph()
            valid[name] = "valid"
            if tried(operator):
                cudnn_ops.plan(graph, frontend)
                plans[name] = int(graph.get_execution_plan_count())
        except errors as error:
            (plans if name in valid else valid)[name] = f"refused: {error}"
    compiled: dict[str, str] = {}
    for name, key in (
        ("forward", LAYER._replace(operator=DEFAULT, keep_dot=True)),
        ("input gradient", LAYER),
    ):
        try:
            built = cudnn_ops.build(key, frontend, **device)
            compiled[name] = str(built.graph.get_plan_name_at_index(0))
        except errors as error:
            compiled[name] = f"refused: {error}"
    return {"valid": valid, "plans": plans, "compiled": compiled}


# Older ones were seen to crash on GPUs that are only described.
OLDEST_PLANNER = 92400


def why_not() -> str | None:
    """Return None if this process can ask cuDNN, else one sentence."""
    reason = cudnn_ops.why_not_installed()
    if reason is None and (version := cudnn_ops._frontend.backend_version()) < OLDEST_PLANNER:
        return f"cuDNN {version} may crash on a GPU that is only described; 9.24 or later does not"
    return reason


if __name__ == "__main__":
    reason = why_not()
    said = {"missing": reason} if reason is not None else answers(cudnn_ops._frontend)
    Path(sys.argv[1]).write_text(json.dumps(said, indent=2))
