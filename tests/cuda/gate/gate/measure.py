"""How fast: our kernels beside a copy, and layers beside the formula, compiled and plain.

A sample is the time between two events around one call. A delay is queued before the first, so
that the host is ahead and no launch is waited for. Medians, with the 20th and 80th percentile.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from cases import Case
from cases import make_inputs as draw
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench import cases as bench_cases
from bench.accuracy import error
from bench.layers import DEFAULT_BATCH, NETWORKS, distinct_layers
from bench.options import BOTH, FORWARD
from bench.providers import Function, compiled_formula, formula, ours, plain, run
from bench.timing import Protocol, Stopwatch
from dcconv.operator.numerics import ACCURACY_FLOOR, PEER_CAP, PEER_FACTOR
from gate.checks import Where, placed, record
from gate.report import Figures

#: Share of the copy rate that our kernels should reach.
RATE_TARGET = 0.85

#: Largest time over the compiled formula's.
COMPILED_TARGET = 1.03

ROUNDS = 15

#: Ops without a pass over x or y: their rate says nothing.
SMALL_OPS = ("conv2d_grad_filters", "filter_scale", "filter_scale_grad")


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
    timings = watch.interleave(timed, protocol(where))
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


def protocol(where: Where, rounds: int = ROUNDS) -> Protocol:
    """Return how often to sample; a rehearsal on the CPU only runs through."""
    return Protocol(rounds if where.on_gpu else 2, 0.0, warmup=3)


def network_layers() -> list[str]:
    """Return the names of the layers of the networks, with the batch of a GPU."""
    found = distinct_layers(DEFAULT_BATCH["cuda"])
    return [name for name, (_, classes) in found.items() if not NETWORKS.keys().isdisjoint(classes)]


def dtype_on(where: Where) -> str:
    """Return the dtype of layers: a rehearsal on the CPU keeps to what its library does well."""
    return "bfloat16" if where.on_gpu else "float32"


def layer_times(where: Where, name: str, rounds: int = ROUNDS) -> Figures:
    """Times of one layer of the networks: tanh x cosine with a given mean norm."""
    layer, networks = distinct_layers()[name]
    if not where.on_gpu:
        layer = layer._replace(n=1, c=min(layer.c, 8), o=min(layer.o, 8), size=min(layer.size, 14))
    operator = bench_cases.find_operator("tanh-cosine")
    case = bench_cases.Case(layer, operator, bench_cases.FIXED, dtype_on(where))
    inputs = bench_cases.make_inputs(case, where.device)
    functions: dict[str, Function] = {
        "dcconv": ours(where.backend)(case),
        "eager": formula(case),
        "conv2d": plain(case),
        "compiled": compiled_formula(case),
    }
    watch = Stopwatch(where.device)
    figures: Figures = {"networks": " ".join(networks)}
    slow = []
    loosest = (PEER_FACTOR * PEER_CAP + 1) * ACCURACY_FLOOR[torch.bfloat16]
    try:
        for short, which in (("fwd", FORWARD), ("both", BOTH)):
            found = run(functions["dcconv"], inputs, which)
            other = run(functions["eager"], inputs, which)
            for tensor, value in found.items():
                far = error(value, other[tensor].double())
                assert far <= loosest, f"{which} {tensor}: {far:.2e} from the formula"
            del found, other
            timings = watch.interleave(
                {key: functools.partial(run, f, inputs, which) for key, f in functions.items()},
                protocol(where, rounds),
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
