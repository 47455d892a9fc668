"""Forward and backward of strided convolutions with 1x1 windows, to be run under a memory checker.

    valgrind --error-exitcode=1 python tests/support/strided_pointwise.py
    LD_PRELOAD=./heap_guard.so python tests/support/strided_pointwise.py   (built from heap_guard.c)

valgrind shows PyTorch a processor without AVX-512; ``ONEDNN_MAX_CPU_ISA=AVX2`` shows oneDNN one.
Under the guard the last line has the number of guarded blocks and of damaged guards; before it the
script spoils one guard itself, so that a guard that sees nothing cannot pass.
"""

from __future__ import annotations

import ctypes

import torch
from torch import nn

from dcconv import DecoupledConv2d, backends
from train.networks.layers import SameConv2d
from train.networks.plain import PlainConv2d

SHAPES = [(2, 2, 1, (8, 8)), (2, 3, 7, (9, 14)), (1, 5, 16, (28, 2)), (2, 7, 8, (8, 14))]
OPERATORS = {
    "plain": {"magnitude": "linear", "weighting": "linear"},
    "tanh": {"magnitude": "tanh"},
}


def guard() -> ctypes.CDLL | None:
    """Return the preloaded guard, its counts as functions, or None."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "guard_heap"):
        return None
    for name in ("guarded_blocks", "damaged_guards"):
        getattr(library, name).restype = ctypes.c_long
    return library


def step(layer: nn.Module, x: torch.Tensor) -> None:
    y = layer(x)
    assert bool(y.isfinite().all())
    y.sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all())


def spoil() -> None:
    t = torch.zeros(64)
    ctypes.memset(t.data_ptr() + t.nbytes, 0, 1)


def run(backend: str, dtype: torch.dtype) -> None:
    for n, c, o, size in SHAPES:
        for stride in ((2, 2), (1, 2), (3, 1)):
            x = torch.randn(n, c, *size, dtype=dtype).to(memory_format=torch.channels_last)
            x.requires_grad_()
            options = {"bias": False, "dtype": dtype}
            layers: list[nn.Module] = [
                DecoupledConv2d(c, o, 1, stride, backend=backend, **options, **operator)
                for operator in OPERATORS.values()
            ]
            if backend == "reference" and dtype == torch.float32:
                layers += [PlainConv2d(c, o, 1, 2), SameConv2d(c, o, 1, 2)]
            for layer in layers:
                step(layer.to(memory_format=torch.channels_last), x)


def main() -> None:
    torch.manual_seed(0)
    library = guard()
    if library is not None:
        library.guard_heap()
    for backend in ("cpu", "reference"):
        if backends.why_not(backend, torch.zeros(1)) is not None:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            run(backend, dtype)
    if library is not None:
        before = library.damaged_guards()
        spoil()
        assert library.damaged_guards() == before + 1, "the guard sees nothing"
        print(library.guarded_blocks(), before)


if __name__ == "__main__":
    main()
