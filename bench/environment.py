"""Where and when something was measured, and the folder that its results belong to."""

from __future__ import annotations

import datetime
import math
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

import dcconv
from dcconv import native

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Environment:
    """The machine and the versions of one run.

    Attributes:
        date: start of the run, UTC.
        device: name of the processor or GPU.
        device_type: ``cpu`` or ``cuda``.
        cores: processors this process may run on.
        threads: threads PyTorch was given.
        torch: its version.
        torch_instructions: instruction set PyTorch's CPU code dispatches to.
        cuda: version PyTorch was built for, None without.
        tf32: whether float32 convolutions may use TF32.
        caches: what is done about caches between samples.
        dcconv: its version.
        revision: of the repository, with ``+`` where files differ from it; None outside one.
        instructions: instruction set of dcconv's CPU kernels; None without the compiled library.
        load: load average of the last minute when the run began.
    """

    date: str
    device: str
    device_type: str
    cores: int
    threads: int
    torch: str
    torch_instructions: str
    cuda: str | None
    tf32: bool
    caches: str
    dcconv: str
    revision: str | None
    instructions: str | None
    load: float

    @property
    def sentence(self) -> str:
        """One line for a report."""
        ours = self.instructions or "no compiled library"
        revision = f" at {self.revision}" if self.revision else ""
        return (
            f"{self.device}, {self.threads} threads on {self.cores} cores, load "
            f"{self.load:.1f} at the start; PyTorch {self.torch} ({self.torch_instructions}); "
            f"dcconv {self.dcconv}{revision} ({ours}); {self.caches}; {self.date}"
        )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _revision() -> str | None:
    # Results are committed while later parts of a run are measured.
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def environment(device: str = "cpu") -> Environment:
    """Describe this machine and process."""
    affinity = getattr(os, "sched_getaffinity", None)
    isa = str(torch.ops.dcconv.cpu_isa()) if native.missing is None else None
    on_gpu = device == "cuda"
    return Environment(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        device=torch.cuda.get_device_name(0) if on_gpu else _processor(),
        device_type=device,
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        torch_instructions=torch.backends.cpu.get_cpu_capability(),
        cuda=torch.version.cuda,
        tf32=bool(torch.backends.cudnn.allow_tf32),
        caches="L2 flushed before every sample" if on_gpu else "caches as the calls leave them",
        dcconv=dcconv.__version__,
        revision=_revision(),
        instructions=isa,
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan,
    )


def folder_name(at: Environment) -> str:
    """Return the name of a device's folder under ``bench/results``; CPUs with their cores.

    Example:
        >>> import dataclasses
        >>> at = dataclasses.replace(environment(), device="AMD EPYC 9B14", cores=2)
        >>> folder_name(at)
        'amd-epyc-9b14-2core'
    """
    name = at.device if at.device_type == "cuda" else f"{at.device} {at.cores}core"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
