"""Hands absurd numbers to the ops themselves, below every check of the package's functions.

    python op_fuzzer.py {cpu,fakes,emulated,triton} SEED COUNT

records what valid calls pass to each op, replaces one or two of the numbers in it, and calls the
op: it must return or refuse in the house sentence. Every call is printed before it is made, so that
the last line of a process that ends tells which one ended it.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# What a number may become. Strides may be as long as they like; paddings, dilations and partial
# sums just below 2^31 are valid too, but take memory or time in proportion.
ABSURD = (
    *(-(2**63), -(2**62) - 1, -(2**31), -2, -1, 0, 1, 2, 3, 5),
    *(2**31, 2**31 + 1, 2**32, 2**33 + 1, 2**40, 2**52, 2**61, 2**62 - 1, 2**62, 2**63 - 1),
)
STRIDES = (*ABSURD, 2**31 - 1, 1 << 20)

HOUSE = re.compile(r"dcconv: [^\n]+ must [^\n]+, got [^\n]+")
MEMORY = re.compile(r"dcconv: [^\n]*can't allocate memory[^\n]*")


class Call(NamedTuple):
    """A valid call of an op: ``op`` and its arguments by name, in the order of its schema."""

    op: Any
    arguments: dict[str, Any]


class _Recorder(TorchDispatchMode):
    """Keeps one call of each op of a namespace for each kernel and each number of groups."""

    def __init__(self, namespace: str) -> None:
        super().__init__()
        self.namespace = namespace
        self.calls: dict[Any, Call] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == self.namespace:
            names = [a.name for a in func._schema.arguments]
            arguments = {
                name: value.clone() if isinstance(value, Tensor) else value
                for name, value in zip(names, args, strict=False)
            }
            grouped = arguments.get("groups", 1) > 1
            mode = arguments.get("padding_mode")
            key = (func, arguments.get("kernel"), grouped, mode, types_of(arguments))
            self.calls.setdefault(key, Call(func, arguments))
        return func(*args, **(kwargs or {}))


def types_of(arguments: dict[str, Any]) -> tuple[torch.dtype, ...]:
    return tuple(sorted({t.dtype for t in arguments.values() if isinstance(t, Tensor)}, key=str))


def _work(function: Callable[..., Any], dtypes: tuple[torch.dtype, ...]) -> None:
    """Run small layers forward and backward: dense, grouped, depthwise, every padding mode."""
    generator = torch.Generator().manual_seed(0)
    layers = (
        (8, 16, 3, 1, "zeros"),
        (8, 8, 1, 1, "zeros"),
        (4, 8, 3, 4, "zeros"),
        (6, 6, 2, 3, "zeros"),
        (3, 4, 3, 1, "reflect"),
        (4, 4, 3, 4, "circular"),
        (2, 4, 3, 1, "replicate"),
    )
    for dtype in dtypes:
        for channels, filters, window, groups, mode in layers:
            x = torch.randn(2, channels, 6, 5, generator=generator).to(dtype)
            weight = torch.randn(filters, channels // groups, window, window, generator=generator)
            x = x.to(memory_format=torch.channels_last).requires_grad_()
            bias = torch.zeros(filters, dtype=dtype, requires_grad=True)
            radius = torch.ones(filters, requires_grad=True)
            if dtype == torch.float64:
                radius = radius.detach().double().requires_grad_()
            for options in ({}, {"angular": "sigmoid"}, {"magnitude": "linear"}):
                y = function(
                    x,
                    weight.to(dtype).requires_grad_(),
                    # Without a bias and with an invertible function backward keeps y.
                    bias if options else None,
                    padding=0 if window == 1 else 1,
                    groups=groups,
                    radius=radius,
                    norm_mean="batch" if mode == "zeros" else None,
                    padding_mode=mode,
                    **options,
                )
                y.sum().backward()


def with_sums(calls: list[Call]) -> list[Call]:
    """Add to the calls that may have the sums of squares of x the same calls with them."""
    from dcconv.operator import reference

    more = []
    for op, arguments in calls:
        if op._schema.arguments[-1].name == "sums":
            last = arguments.get("channels_last", True)
            sums = reference.pixel_sums(arguments["x"].detach(), arguments["groups"], last)
            whole = {"keep_map": arguments.get("keep_map", True)} if "keep_dot" in arguments else {}
            more.append(Call(op, {**arguments, **whole, "sums": sums}))
    return calls + more


def _norms() -> None:
    from dcconv.functional import patch_norm

    for groups in (1, 2):
        x = torch.randn(2, 4, 6, 5, requires_grad=True)
        patch_norm(x, 3, stride=2, padding=1, groups=groups).sum().backward()


def _affine(namespace: str) -> None:
    for groups in (1, 2):
        x, shift = torch.randn(2, 6, 3, 4), torch.zeros(6)
        getattr(torch.ops, namespace).affine_relu(x, torch.ones(6), shift, groups, False)


def cpu_calls() -> list[Call]:
    from dcconv import backends
    from dcconv.functional import decoupled_conv2d

    with backends.use_backend("cpu"), _Recorder("dcconv") as recorder:
        _work(decoupled_conv2d, (torch.float32, torch.bfloat16, torch.float64))
        _norms()
        _affine("dcconv")
    return with_sums(list(recorder.calls.values()))


def cuda_calls() -> list[Call]:
    """Calls of the ops of library and fused, on models of them."""
    from stand_ins import cuda_backend_on_cpu

    from dcconv import backends
    from dcconv.functional import decoupled_conv2d

    recorder = _Recorder("dcconv")
    with cuda_backend_on_cpu(), recorder:
        for strategies in ("library", "library,fused"):
            with backends.strategies(strategies):
                _work(decoupled_conv2d, (torch.bfloat16,))
        with backends.strategies("library"):
            _work(decoupled_conv2d, (torch.float32,))
        _norms()
        _affine("dcconv")
    return with_sums(list(recorder.calls.values()))


def emulated_calls() -> list[Call]:
    from stand_ins import emulated

    emulated()
    ops: Any = torch.ops.dcconv_simt
    return [
        Call(getattr(ops, call.op._schema.name.partition("::")[2]).default, call.arguments)
        for call in cuda_calls()
    ]


def meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def fake_calls() -> list[Call]:
    return [
        Call(op, {name: meta(value) for name, value in arguments.items()})
        for op, arguments in (*cpu_calls(), *cuda_calls())
    ]


def triton_calls() -> list[Call]:
    """Calls of the ops on Triton's kernels; the process must have TRITON_INTERPRET=1."""
    from dcconv import backends
    from dcconv.functional import decoupled_conv2d

    recorder = _Recorder("dcconv_triton")
    with backends.use_backend("triton"), recorder:
        for strategies in ("library", "library,fused"):
            with backends.strategies(strategies):
                _work(decoupled_conv2d, (torch.float32,))
        _norms()
        _affine("dcconv_triton")
    return with_sums(list(recorder.calls.values()))


PROVIDERS: dict[str, Callable[[], list[Call]]] = {
    "cpu": cpu_calls,
    "fakes": fake_calls,
    "emulated": emulated_calls,
    "triton": triton_calls,
}


def places(arguments: dict[str, Any]) -> Iterator[tuple[str, int | None]]:
    """Yield the names of numbers, and for each number in a list its index."""
    for name, value in arguments.items():
        if isinstance(value, int) and not isinstance(value, bool):
            yield name, None
        elif isinstance(value, (list, tuple)):
            yield from ((name, i) for i in range(len(value)))


def changed(arguments: dict[str, Any], chance: random.Random) -> tuple[dict[str, Any], list[str]]:
    """Return arguments with one or two numbers, or the length of a list, replaced; and which."""
    result, said = dict(arguments), []
    for _ in range(chance.choice((1, 1, 2))):
        name, index = chance.choice(list(places(arguments)))
        value = chance.choice(STRIDES if name == "stride" else ABSURD)
        if index is None:
            result[name] = value
        elif chance.random() < 0.1:
            result[name] = list(result[name])[:index]
        elif index < len(result[name]):
            result[name] = [value if i == index else v for i, v in enumerate(result[name])]
        said.append(f"{name}={result[name]}")
    return result, said


def main(provider: str, seed: int, count: int) -> int:
    torch.set_num_threads(1)
    calls = [call for call in PROVIDERS[provider]() if any(places(call.arguments))]
    chance = random.Random(seed)
    ended = {"returned": 0, "refused": 0}
    wrong = 0
    for _ in range(count):
        op, arguments = chance.choice(calls)
        arguments, said = changed(arguments, chance)
        print(op._schema.name, *said, flush=True)
        # In-place ops write into a copy.
        arguments = {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        try:
            op(*arguments.values())
            ended["returned"] += 1
        except (RuntimeError, ValueError) as error:
            ended["refused"] += 1
            text = str(error)
            if not (HOUSE.fullmatch(text) or MEMORY.fullmatch(text)):
                wrong += 1
                print(f"WRONG {type(error).__name__}: {text}", flush=True)
    ops = sorted({call.op._schema.name for call in calls})
    print("ops", *ops, flush=True)
    print(f"{ended['returned']} returned, {ended['refused']} refused, {wrong} wrong", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
