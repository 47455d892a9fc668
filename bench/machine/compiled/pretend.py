"""Inductor on a machine without a GPU: it asks about a device, and is told of one.

Nothing runs on the device that is not there. Inductor asks PyTorch for its properties, Triton for
its driver's target, and then writes Triton kernels for it. What is replaced here are those
questions, and what PyTorch asks the driver on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from bench.machine.gpus import Gpu
from dcconv.operator.checks import value_error

#: A multiprocessor's threads and registers, and a block's threads, of all that are modelled.
WARP, BLOCK_THREADS = 32, 1024


def missing() -> str | None:
    """Return one sentence why nothing can be compiled here, or None."""
    if torch.version.cuda is None:
        return "Inductor writes CUDA kernels with a CUDA build of PyTorch alone"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed"
    return None


def capability(gpu: Gpu) -> tuple[int, int]:
    """Return major and minor version of a GPU's architecture.

    Example:
        >>> from bench.machine.gpus import GPUS
        >>> capability(GPUS["H200"]), capability(GPUS["A100"])
        ((9, 0), (8, 0))
    """
    digits = gpu.arch.removeprefix("sm_").rstrip("a")
    return int(digits[:-1]), int(digits[-1])


def _properties(gpu: Gpu) -> SimpleNamespace:
    major, minor = capability(gpu)
    return SimpleNamespace(
        **{"name": gpu.name, "major": major, "minor": minor, "multi_processor_count": gpu.sms},
        **{"regs_per_multiprocessor": gpu.registers, "warp_size": WARP, "gcnArchName": ""},
        **{"max_threads_per_multi_processor": gpu.warps * WARP, "total_memory": 1 << 36},
        **{"max_threads_per_block": BLOCK_THREADS, "L2_cache_size": 1 << 25},
        **{"shared_memory_per_block": 48 << 10, "shared_memory_per_block_optin": gpu.shared},
        **{"shared_memory_per_multiprocessor": gpu.shared + 1024, "is_integrated": False},
    )


class _Driver:
    """What Triton and Inductor ask of a driver."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        major, minor = capability(self.gpu)
        return GPUTarget("cuda", 10 * major + minor, WARP)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def is_active(self) -> bool:
        return True


def _forget() -> None:
    """Empty what PyTorch remembers of whether there is Triton."""
    from torch.utils import _triton

    for value in vars(_triton).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()


@contextmanager
def pretending(gpu: Gpu) -> Iterator[None]:
    """Answer PyTorch's and Triton's questions about the current device with a GPU's figures.

    Raises:
        ValueError: PyTorch or Triton is missing what it takes.
    """
    reason = missing()
    if reason is not None:
        raise value_error("torch.compile", "be able to write CUDA kernels", reason)
    from torch._dynamo.device_interface import CudaInterface
    from torch._subclasses import fake_tensor
    from triton.runtime import driver

    properties = _properties(gpu)
    # Without it, fake tensors on a device that is not there would look for a driver.
    torch._C._ensureCUDADeviceGuardSet()
    answers: dict[str, Any] = {
        **{"is_available": lambda: True, "current_device": lambda: 0, "device_count": lambda: 1},
        **{"get_device_properties": lambda device=None: properties},
        **{"set_device": lambda device: None, "synchronize": lambda device=None: None},
    }
    more: dict[str, Any] = {
        **{"get_device_capability": lambda device=None: capability(gpu)},
        **{"get_device_name": lambda device=None: gpu.name, "is_initialized": lambda: True},
        **{"is_bf16_supported": lambda *options, **named: True},
        **{"_exchange_device": lambda device: 0, "_maybe_exchange_device": lambda device: 0},
        **{"is_current_stream_capturing": lambda: False},
        **{"get_rng_state": lambda *ignored: torch.zeros(16, dtype=torch.uint8)},
        **{"set_rng_state": lambda *ignored: None},
    }
    with ExitStack() as stack:

        def replace(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        for name, value in (answers | more).items():
            replace(torch.cuda, name, value)
        exchanges = {name.removeprefix("_"): more[name] for name in more if "exchange" in name}
        for name, value in (answers | exchanges).items():
            replace(CudaInterface, name, staticmethod(value))
        for name in ("get_device_properties", "current_device"):
            replace(CudaInterface.Worker, name, staticmethod(answers[name]))
        replace(fake_tensor, "init_gpu_context", lambda *ignored: None)
        replace(driver, "_active", _Driver(gpu))
        # cuDNN's convolutions give channels_last for channels_last.
        last = torch.channels_last
        replace(torch._C, "_conv_determine_backend_memory_format", lambda *ignored: last)
        _forget()
        try:
            yield
        finally:
            _forget()
