"""The fastest tile of the implicit GEMM, found by Triton's autotuner once per kind of call.

Triton keeps what it measured in its own cache on disk; here stands what this process knows.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from dcconv.operator.layout import PLAIN
from dcconv.triton.environment import INTERPRETED
from dcconv.triton.launch import power_of_two_at_least
from dcconv.triton.tiles import TILES, Gpu, Product, own_rule, programs, worthwhile
from dcconv.warn import warn_once

#: What times a launch, for ``triton.autotune``; None for Triton's own.
stopwatch: Any = None

_lock = threading.RLock()
_best: dict[tuple[Any, ...], int] = {}


def may_tune(x: Tensor) -> bool:
    """Whether launches on x can be timed now: not while something is traced or captured."""
    if type(x) not in PLAIN or _get_current_dispatch_mode() is not None:
        return False
    if torch.compiler.is_compiling() or not x.is_cuda:
        return stopwatch is not None and x.device.type == "cpu"
    return not torch.cuda.is_current_stream_capturing()


def tuned(
    kernel: Any,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    product: Product,
    gpu: Gpu,
    x: Tensor,
) -> int:
    """Return the number of the fastest tile, measured if it is not known and can be.

    That of the rule where it cannot, and under ``torch.use_deterministic_algorithms``.

    Args:
        kernel: with ``bucket`` as its last argument; its results are overwritten.
        arguments, constants: of a launch, without the bucket and what tiles decide.
        product, gpu: what the tile is for.
        x: the launch is on its device.
    """
    tried = worthwhile(product, gpu)
    # Exported code may come with the request, and tiles differ in how they round.
    if torch.are_deterministic_algorithms_enabled():
        return own_rule(product, gpu)
    if not isinstance(product.positions, int) or len(tried) == 1:
        return own_rule(product, gpu)
    # Sizes up to a power of two are tuned as one.
    bucket = power_of_two_at_least(product.positions)
    facts = (kernel.__name__, str(x.device), x.dtype, *product._replace(positions=bucket, planes=1))
    key = (*facts, *sorted(constants.items()))
    with _lock:
        if key not in _best:
            if not may_tune(x):
                return own_rule(product, gpu)
            try:
                _best[key] = _measured(kernel, (*arguments, bucket), constants, tried, product, gpu)
            except torch.OutOfMemoryError:
                # The autotuner clears the L2 cache with memory of its own.
                warn_once(f"too little memory to tune {kernel.__name__}: its rule chooses the tile")
                _best[key] = own_rule(product, gpu)
        return _best[key]


def _measured(
    kernel: Any,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    tried: tuple[int, ...],
    product: Product,
    gpu: Gpu,
) -> int:
    numbers = {TILES[number][:3]: number for number in tried}

    def number_of(meta: dict[str, Any]) -> int:
        return numbers[meta["P"], meta["LANES"], meta["DEPTH"]]

    configs = [
        triton.Config(
            {"P": tile.positions, "LANES": tile.lanes, "DEPTH": tile.depth},
            num_warps=tile.warps,
            num_stages=min(tile.stages, gpu.stages),
        )
        for tile in (TILES[number] for number in tried)
    ]
    tuner = triton.autotune(
        configs=configs,
        key=["bucket", "groups", "channels", "filters", *constants],
        do_bench=stopwatch,
        # Interpreted kernels have no compiled form to file times under.
        cache_results=not INTERPRETED,
    )(kernel)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (programs(TILES[number_of(meta)], product),)

    tuner[grid](*arguments, **constants)
    return number_of(tuner.best_config.kwargs)
