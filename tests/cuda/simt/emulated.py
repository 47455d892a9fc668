"""The CUDA sources compiled for the SIMT model: all ops, and the passes by themselves."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import builds
from builds import ROOT, Build

CUDA = ROOT / "csrc/cuda"

#: What holds the kernels: every dtype and pass, and the choice between them.
KERNELS = (
    CUDA / "dispatch.cu",
    *sorted((CUDA / "fused").rglob("*.cu")),
    *sorted((CUDA / "instances").glob("*.cu")),
)


def _flags(contract: str = "off") -> list[str]:
    # Sanitizers compile with another optimisation level: without contraction, bits agree.
    info = Path("/proc/cpuinfo")
    fused = info.exists() and "fma" in info.read_text().split()
    return [
        f"-I{ROOT / 'csrc'}",
        "-DDCCONV_SIMT",
        *(["-mfma", f"-ffp-contract={contract}"] if fused else []),
    ]


def ops_library() -> Path:
    """Return the library that defines ``dcconv_simt``: the op layer and all kernels, fast build."""
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    # CUDA contracts products and sums, and so does the model where the processor can.
    flags = _flags("fast")
    torch_flags = [
        *(f"-isystem{folder}" for folder in include_paths()),
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        # System headers are not compared; the version tells one PyTorch from another.
        f'-DDCCONV_TORCH="{torch.__version__}"',
    ]
    sources = dict.fromkeys(KERNELS, flags)
    for source in (
        CUDA / "ops_library.cu",
        CUDA / "ops_fused.cu",
        Path(__file__).parent / "launches.cpp",
    ):
        sources[source] = [*flags, *torch_flags]
    libraries = [f"-L{folder}" for folder in library_paths()]
    return builds.compile_library(
        "dcconv_simt", sources, builds.FAST, [*libraries, "-ltorch", "-ltorch_cpu", "-lc10"]
    )


def passes_extension(
    build: Build, *, every_dtype: bool = False, changed: Path | None = None
) -> Path:
    """Return the Python extension ``dcconv_passes``: the passes on numpy arrays.

    Args:
        build: one of ``builds.BUILDS``.
        every_dtype: all four dtypes instead of float32 and bfloat16, and all kernels.
        changed: a changed copy of csrc, to see what the change does to float32.
    """
    import pybind11

    # Unoptimised where compiling would take longer than running: minutes under AddressSanitizer.
    flags = ["-O0", *_flags()] if build is builds.ADDRESS or changed else _flags()
    if changed is not None:
        flags = [f"-I{changed}", "-DSIMT_ONE_DTYPE", *flags]
    python = [
        f"-isystem{pybind11.get_include()}",
        f"-isystem{sysconfig.get_path('include')}",
    ]
    here = Path(__file__).parent
    kernels = KERNELS if every_dtype else (here / "two_dtypes.cu",)
    files = dict.fromkeys(kernels, flags)
    chosen = ["-DSIMT_EVERY_KERNEL"] if every_dtype else []
    files[here / "passes.cpp"] = [*_flags(), *chosen, *python]
    return builds.compile_library("dcconv_passes", files, build)
