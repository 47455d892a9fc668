"""What a report says about the machine and the code."""

from __future__ import annotations

import datetime
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

UNKNOWN = "unknown"


def output_of(*command: str, cwd: Path | None = None) -> str | None:
    """Return what a program prints, None where it is missing or fails."""
    try:
        done = subprocess.run(
            command, cwd=cwd, check=True, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def nvcc_version(home: str | None) -> str:
    """Return the release of the nvcc that PyTorch's build helpers find, or the one on PATH."""
    found = Path(home) / "bin/nvcc" if home else None
    nvcc = str(found) if found is not None and found.exists() else shutil.which("nvcc")
    text = output_of(nvcc, "--version") if nvcc else None
    release = re.search(r"V([\d.]+)", text or "")
    return release[1] if release else UNKNOWN


def revision(root: Path, given: str | None) -> tuple[str, bool | str]:
    """Return the commit and whether files differ from it; a copy without git is told by option."""
    commit = output_of("git", "rev-parse", "HEAD", cwd=root)
    if commit is None:
        return given or UNKNOWN, UNKNOWN
    # The reports themselves change while the gate runs.
    status = output_of("git", "status", "--porcelain", "--", ".", ":!bench/results", cwd=root)
    return commit, bool(status)


def describe(device: str, root: Path, commit: str | None) -> dict[str, Any]:
    """Return the facts a report begins with."""
    import torch

    name, dirty = revision(root, commit)
    facts: dict[str, Any] = {
        "device": "CPU",
        "torch": str(torch.__version__),
        "CUDA": torch.version.cuda or "none",
        "commit": name,
        "dirty": dirty,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device != "cuda":
        return facts
    from torch.utils.cpp_extension import CUDA_HOME

    properties = torch.cuda.get_device_properties(0)
    driver = output_of(
        "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"
    )
    return facts | {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory GiB": round(properties.total_memory / 2**30),
        "L2 MiB": round(properties.L2_cache_size / 2**20),
        "driver": (driver or UNKNOWN).splitlines()[0],
        "cuDNN": torch.backends.cudnn.version(),
        "nvcc": nvcc_version(CUDA_HOME),
    }


def why_no_gpu() -> str | None:
    """Return None if PyTorch can use a GPU here, else one sentence why not."""
    try:
        import torch
    except ImportError as error:
        return f"PyTorch does not import ({error})"
    if torch.version.cuda is None:
        return "the installed PyTorch is not a CUDA build"
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU on this machine"
    return None
