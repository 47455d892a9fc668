"""How fast: our kernels beside a copy, and layers beside the formula, compiled and plain.

A sample is the time between two events around one call. A delay is queued before the first, so
that the host is ahead and no launch is waited for. Medians, with the 20th and 80th percentile.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from cases import Case
from cases import make_inputs as draw
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench import cases as bench_cases
from bench.accuracy import error
from bench.layers import distinct_layers
from bench.providers import Function, compiled_formula, formula, ours, plain, run
from bench.timing import Timing, summarise
from dcconv.numerics import ACCURACY_FLOOR, PEER_CAP, PEER_FACTOR
from gate.checks import Where, placed, record
from gate.report import Figures

#: Share of the copy rate that our kernels should reach.
RATE_TARGET = 0.85

#: Largest time over the compiled formula's.
COMPILED_TARGET = 1.03

ROUNDS = 15

#: Ops without a pass over x or y: their rate says nothing.
SMALL_OPS = ("conv2d_grad_filters", "filter_scale", "filter_scale_grad")

DELAY_CYCLES = 2_000_000


class Stopwatch:
    """Times calls on a device; between samples it replaces what the caches hold."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._flush: Tensor | None = None
        if device == "cuda":
            cache = torch.cuda.get_device_properties(0).L2_cache_size
            self._flush = torch.zeros(4 * cache, dtype=torch.uint8, device=device)

    def sample(self, call: Callable[[], object]) -> float:
        """Return the seconds of one call."""
        if self._flush is None:
            start = time.perf_counter()
            result = call()
            seconds = time.perf_counter() - start
            del result
            return seconds
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Read, not written: nothing is left to be written back during the sample.
        self._flush.max()
        torch.cuda._sleep(DELAY_CYCLES)
        before.record()
        result = call()
        after.record()
        after.synchronize()
        del result
        return before.elapsed_time(after) * 1e-3

    def interleave(
        self, calls: Mapping[str, Callable[[], object]], rounds: int
    ) -> dict[str, Timing]:
        """Time all calls in rounds, in an order drawn anew for each."""
        for call in calls.values():
            for _ in range(3):
                call()
        samples: dict[str, list[float]] = {name: [] for name in calls}
        order = list(calls)
        shuffle = random.Random(0).shuffle
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                samples[name].append(self.sample(calls[name]))
        return {name: summarise(values) for name, values in samples.items()}


def op_bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Return the bytes an op must move: every argument once, every result once.

    An argument that the op writes is read and written. On this project's ops that is X + 2Y forward
    and 3Y + 3X backward, with X, Y the bytes of input and output, and the small maps.
    """
    total = 0
    named = {a.name: a for a in func._schema.arguments}
    given = dict(zip(named, args, strict=False)) | kwargs
    for name, value in given.items():
        writes = named[name].alias_info is not None and named[name].alias_info.is_write
        for t in tree_leaves(value):
            if isinstance(t, Tensor):
                total += t.numel() * t.element_size() * (2 if writes else 1)
    aliased = [r.alias_info is not None for r in func._schema.returns]
    results = result if isinstance(result, (tuple, list)) else (result,)
    for alias, t in zip(aliased, results, strict=False):
        if isinstance(t, Tensor) and not alias:
            total += t.numel() * t.element_size()
    return total


def rates(where: Where, layout: str) -> Figures:
    """Every op that passes over x or y, in bytes over time, against a copy on the device."""
    watch = Stopwatch(where.device)
    n, size = (256, 112) if where.on_gpu else (2, 8)
    small = Case("rates", 2, 64, size, size, 64, (3, 3), padding=1)
    dtype = torch.bfloat16
    base = placed(draw(small, dtype, norm="given"), layout, where.device)
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.empty((n, 64, size, size), dtype=dtype, device=where.device, memory_format=memory)
    base.tensors["x"] = x.normal_()
    target = torch.empty_like(x)
    figures: Figures = {"MiB of x and of y": round(x.numel() * 2 / 2**20, 2)}
    # One operator without and one with the mean norm of the batch: other kernels run.
    calls: dict[str, Any] = {}
    for norm in ("given", "batch"):
        tensors = dict(base.tensors)
        options = dict(base.options)
        if norm == "batch":
            del tensors["norm_mean"]
            options["norm_mean"] = "batch"
        recorder = record(where, type(base)(tensors, options), cloned=False)
        for func, args, kwargs, result in recorder.calls:
            name = func._schema.name.removeprefix("dcconv::")
            if name in SMALL_OPS or (name in calls and norm == "batch" and "norms" not in name):
                continue
            key = name if name not in calls else f"{name} {norm}"
            moved = op_bytes(func, args, kwargs, result)
            calls[key] = (functools.partial(func, *args, **kwargs), moved)
        del recorder
    timed = {"copy": functools.partial(target.copy_, x)} | {k: c for k, (c, _) in calls.items()}
    rounds = ROUNDS if where.on_gpu else 2
    timings = watch.interleave(timed, rounds)
    copy_rate = 2 * x.numel() * 2 / timings["copy"].median / 1e6
    figures["copy GB/s"] = copy_rate
    below = []
    for key, (_, moved) in calls.items():
        share = moved / timings[key].median / 1e6 / copy_rate
        figures[key] = share
        figures[f"{key} spread"] = timings[key].spread
        if share < RATE_TARGET:
            below.append(f"{key} {share:.2f}")
    if below:
        figures["message"] = f"below the target of {RATE_TARGET}: {', '.join(below)}"
    return figures


def dtype_on(where: Where) -> str:
    """Return the dtype of layers: a rehearsal on the CPU keeps to what its library does well."""
    return "bfloat16" if where.on_gpu else "float32"


def layer_inputs(layer: bench_cases.Layer, where: Where) -> bench_cases.Inputs:
    """Draw the tensors of a layer on its device, channels_last, with a given mean norm."""
    dtype = bench_cases.DTYPES[dtype_on(where)]
    generator = torch.Generator(where.device).manual_seed(0)

    def normal(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        t = torch.empty(
            shape,
            dtype=dtype,
            device=where.device,
            memory_format=torch.channels_last,
        )
        return t.normal_(0.0, scale, generator=generator)

    typical = (layer.c * layer.k**2) ** 0.5
    radius = 0.5 + torch.rand(layer.o, device=where.device, generator=generator)
    return bench_cases.Inputs(
        normal(layer.x_shape).requires_grad_(),
        normal(layer.weight_shape, 1 / typical).requires_grad_(),
        radius.requires_grad_(),
        torch.tensor(typical, device=where.device),
        normal(layer.y_shape),
    )


def layer_times(where: Where, name: str, rounds: int = ROUNDS) -> Figures:
    """Times of one layer of the networks: tanh x cosine with a given mean norm."""
    layer, networks = distinct_layers()[name]
    if not where.on_gpu:
        layer = layer._replace(n=1, c=min(layer.c, 8), o=min(layer.o, 8), size=min(layer.size, 14))
    operator = bench_cases.OPERATORS["tanh-cosine"]
    case = bench_cases.Case(layer, operator, bench_cases.FIXED, dtype_on(where))
    inputs = layer_inputs(layer, where)
    functions: dict[str, Function] = {
        "dcconv": ours(where.backend)(case),
        "eager": formula(case),
        "conv2d": plain(case),
    }
    # Inductor's CPU options are not known to its CUDA compiler.
    functions["compiled"] = (
        torch.compile(formula(case), dynamic=False, fullgraph=True)
        if where.on_gpu
        else compiled_formula(case)
    )
    watch = Stopwatch(where.device)
    figures: Figures = {"networks": " ".join(networks)}
    slow = []
    loosest = (PEER_FACTOR * PEER_CAP + 1) * ACCURACY_FLOOR[torch.bfloat16]
    try:
        for short, which in (("fwd", bench_cases.FORWARD), ("both", bench_cases.BOTH)):
            found = run(functions["dcconv"], inputs, which)
            other = run(functions["eager"], inputs, which)
            for tensor, value in found.items():
                far = error(value, other[tensor].double())
                assert far <= loosest, f"{which} {tensor}: {far:.2e} from the formula"
            del found, other
            timings = watch.interleave(
                {key: functools.partial(run, f, inputs, which) for key, f in functions.items()},
                rounds if where.on_gpu else 2,
            )
            own = timings["dcconv"]
            figures[f"{short} ms"] = own.median
            figures[f"{short} spread"] = own.spread
            for key in ("compiled", "eager", "conv2d"):
                figures[f"{short} / {key}"] = own.median / timings[key].median
            figures[f"{short} compiled spread"] = timings["compiled"].spread
            if figures[f"{short} / compiled"] > COMPILED_TARGET:
                slow.append(f"{short} {figures[f'{short} / compiled']:.2f}")
    finally:
        torch.compiler.reset()
    if slow:
        figures["message"] = f"over {COMPILED_TARGET} of the compiled formula: {', '.join(slow)}"
    return figures
