"""Predicted milliseconds of a network's convolution layers, by strategy.

The library's own convolutions take assumed rates; the package's passes and one-pass kernels take
what bench/machine/rates.py finds in their machine code, and tiny kernels per filter a launch and
their bytes. Kernels follow each other without overlap, and tensors cross DRAM between them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.layers import NETWORKS
from bench.layers import Layer as Shape
from bench.machine.compiled.peer import Peer, compiled_layer
from bench.machine.fused import GEMM, GEMM_GRADIENT
from bench.machine.gpus import Gpu
from bench.machine.layers import Layer
from bench.machine.rates import STEM, WINDOW_NORM, Rates
from bench.options import DTYPES
from dcconv.call.key import FORWARD, INPUT_GRADIENT, key_of
from dcconv.call.rule import FUSED, LIBRARY
from dcconv.call.strategy import by_rule
from dcconv.operator.records import NORM_BATCH, NORM_NONE, Operands, Problem, Window
from dcconv.passes import fused, records

#: Seconds from one kernel's end to the next one's begin; assumed.
LAUNCH = 2.5e-6

#: Share of the rate of copies that the library's convolutions reach; assumed.
COPY_SHARE = 0.9

#: Products of a sum, and filters, from which on the library's convolutions reach a share of its
#: matrix products; assumed.
LIBRARY_SHARES = (((1024, 128), 0.70), ((512, 0), 0.60), ((0, 0), 0.50))

#: The same for first layers, whose few channels fill no vector; assumed.
FIRST_SHARE = 0.25
FIRST_CHANNELS = 8

ASSUMED = {
    "launch": f"{LAUNCH * 1e6} us from a kernel's end to the next one's begin",
    "library convolutions": (
        "25 % of the library's matrix products for first layers, else 50 %, 60 % from 512 products "
        "of a sum on, 70 % from 1,024 and 128 filters on; or 90 % of the rate of copies"
    ),
    "overlap": "none; every tensor crosses DRAM once for every kernel",
}


def library_share(shape: Shape) -> float:
    """Return the share of the rate of matrix products that a library convolution reaches.

    Example:
        >>> library_share(Shape(256, 64, 56, 64, 3)), library_share(Shape(256, 3, 224, 64, 7, 2))
        (0.6, 0.25)
    """
    if shape.c < FIRST_CHANNELS:
        return FIRST_SHARE
    summed = shape.patch_size
    return next(
        share
        for (least, filters), share in LIBRARY_SHARES
        if summed >= least and shape.o >= filters
    )


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of a layer's forward and backward; of one such layer.

    Attributes:
        plain_forward, plain_backward: the library's convolution, its two gradients.
        library_forward, fused_forward: the operator by both strategies; None where one cannot.
        library_input, fused_input: the gradient of x, from that of the convolution; 0 for a
            network's first layer.
        rest: of backward: the pass over the gradient of y, the gradient of the weight, filters.
        rule_forward, rule_input: the strategies that the package's rule takes.
        parts: seconds of single kernels.
        compiled: forward and backward of the best-written formula under torch.compile, where it
            was asked for.
    """

    plain_forward: float
    plain_backward: float
    library_forward: float
    fused_forward: float | None
    library_input: float
    fused_input: float | None
    rest: float
    rule_forward: str
    rule_input: str
    parts: dict[str, float]
    compiled: tuple[float, float] | None = None

    def forward(self, strategy: str) -> float:
        """Return the seconds of forward by a strategy, by library where it cannot."""
        fast = self.fused_forward if strategy == FUSED else None
        return self.library_forward if fast is None else fast

    def backward(self, strategy: str) -> float:
        """Return the seconds of backward with the gradient of x by a strategy."""
        fast = self.fused_input if strategy == FUSED else None
        return self.rest + (self.library_input if fast is None else fast)

    @property
    def best(self) -> tuple[str, str]:
        """The faster strategies of forward and of the gradient of x."""
        return (
            min((LIBRARY, FUSED), key=self.forward),
            min((LIBRARY, FUSED), key=self.backward),
        )

    def total(self, how: str) -> tuple[float, float]:
        """Return forward and backward: plain, compiled, library, fused, rule or best."""
        if how == "plain":
            return self.plain_forward, self.plain_backward
        if how == "compiled":
            assert self.compiled is not None
            return self.compiled
        strategies = {"rule": (self.rule_forward, self.rule_input), "best": self.best}
        forward, gradient = strategies.get(how, (how, how))
        return self.forward(forward), self.backward(gradient)

    @property
    def _peers(self) -> tuple[str, ...]:
        return () if self.compiled is None else ("compiled",)

    def row(self) -> dict[str, Any]:
        """Return what goes into a file of results, times in milliseconds."""
        totals = {
            f"{how}_ms": [1e3 * one for one in self.total(how)]
            for how in ("plain", LIBRARY, FUSED, "rule", "best", *self._peers)
        }
        strategies = {"rule": [self.rule_forward, self.rule_input], "best": list(self.best)}
        facts = {name: value for name, value in asdict(self).items() if name.startswith("fused_")}
        can = {name: value is not None for name, value in facts.items()}
        return {**totals, **strategies, "can": can, "parts_us": _microseconds(self.parts)}


def _microseconds(parts: dict[str, float]) -> dict[str, float]:
    return {name: 1e6 * value for name, value in parts.items()}


def chosen(shape: Shape, dtype: str, batch_mean: bool) -> tuple[str, str]:
    """Return the strategies that the package's rule takes: forward, and the gradient of x.

    A cuDNN graph is left out of the choice: nothing is predicted of it.
    """
    kind, format_ = DTYPES[dtype], torch.channels_last

    def empty(sizes: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(sizes, dtype=kind, device="meta").contiguous(memory_format=format_)

    pair = (shape.stride, shape.stride)
    window = Window(pair, (shape.padding,) * 4, (shape.dilation,) * 2, shape.groups)
    problem = Problem(window=window, norm=NORM_BATCH if batch_mean else NORM_NONE)
    radius = torch.empty(shape.o, device="meta")
    operands = Operands(empty(shape.x_shape), empty(shape.weight_shape), None, radius, None, None)

    def one(direction: str) -> str:
        can = fused.why_not(operands, problem, direction) is None
        willing = (LIBRARY, FUSED) if can else (LIBRARY,)
        return by_rule(key_of("cuda", operands, problem, records.OUTPUT, direction), willing)

    return one(FORWARD), one(INPUT_GRADIENT)


class _Costs:
    """Seconds of the kernels of one layer."""

    def __init__(self, shape: Shape, rates: Rates) -> None:
        self.shape, self.rates, self.gpu = shape, rates, rates.gpu
        self.layer = Layer(shape.n, shape.c, shape.size, shape.o, shape.k, shape.stride)
        self.size = DTYPES[rates.dtype].itemsize
        n, _, p, q = shape.y_shape
        self.positions = n * p * q
        self.x = self.layer.inputs * shape.c * self.size
        self.y = self.positions * shape.o * self.size
        self.weight = shape.o * shape.patch_size * self.size

    def convolution(self, whole_x: bool = False) -> float:
        """Return a library convolution or gradient; of x a stride of 1x1 windows skips pixels."""
        skipped = self.shape.k < self.shape.stride and not whole_x
        x = self.x / self.shape.stride**2 if skipped else self.x
        flops = 2.0 * self.positions * self.shape.o * self.shape.patch_size
        products = flops / (self.gpu.matrix_rate * library_share(self.shape))
        return max(products, self.moved(x + self.y + self.weight) / COPY_SHARE) + LAUNCH

    def moved(self, size: float) -> float:
        return size / self.gpu.dram

    def own(self, function: str) -> float:
        return self.rates.seconds(function, self.layer) + LAUNCH

    def filters(self, tensors: int) -> float:
        """Return a kernel over the weight."""
        return self.moved(tensors * self.weight) + LAUNCH

    def gemm(self, function: str, tensors: float) -> float:
        """Return the implicit GEMM, no faster than its tensors cross DRAM."""
        return max(self.rates.gemm_seconds(function, self.layer), self.moved(tensors)) + LAUNCH


def layer_times(
    shape: Shape, rates: Rates, first: bool, peer: Peer | None = None, shared: bool = True
) -> LayerTimes:
    """Predict a layer.

    Args:
        shape: its sizes.
        rates: of a GPU, dtype and operator.
        first: whether it is a network's first layer, which needs no gradient of x.
        peer: what the operator takes under torch.compile.
        shared: whether to predict the rest of backward, which is the same for both strategies.
    """
    mean = rates.operator.mean
    costs = _Costs(shape, rates)
    forward, by_weight = costs.convolution(), costs.convolution()
    by_x = 0.0 if first else costs.convolution(whole_x=True)
    rule_forward, rule_input = chosen(shape, rates.dtype, mean)
    parts = {"convolution": forward, "grad_weight": by_weight, "filter_norm": costs.filters(1)}
    names = ["pixel_sumsq", WINDOW_NORM, "epilogue", *(["grad_dot"] if shared else [])]
    for name in [*names, *([] if first else ["grad_input"])]:
        parts[name] = costs.own(name)
    parts["filter_grad"] = costs.filters(3) + LAUNCH  # and the sums over its partial rows
    if not first:
        parts["grad_x"] = by_x
    # They come before the first output, and with them their mean.
    norms = parts["filter_norm"] + parts["pixel_sumsq"] + parts[WINDOW_NORM]
    fast_forward, fast_input = _fused(costs, norms, parts, first)
    return LayerTimes(
        *(forward, by_x + by_weight, norms + forward + parts["epilogue"], fast_forward),
        library_input=0.0 if first else by_x + parts["grad_input"],
        fused_input=fast_input,
        rest=parts.get("grad_dot", 0.0) + by_weight + parts["filter_grad"],
        rule_forward=rule_forward,
        rule_input="-" if first else rule_input,
        parts=parts,
        compiled=None if peer is None else _compiled(peer, forward, by_x + by_weight),
    )


def _compiled(peer: Peer, forward: float, backward: float) -> tuple[float, float]:
    """Return the peer's kernels and launches, and the library's convolutions with theirs."""
    launches = [number * LAUNCH for number in peer.launches]
    return forward + peer.forward + launches[0], backward + peer.backward + launches[1]


def _fused(
    costs: _Costs, norms: float, parts: dict[str, float], first: bool
) -> tuple[float | None, float | None]:
    """Return forward and the gradient of x in one pass, and add their kernels to the parts."""
    shape, stem = costs.shape, costs.shape.c <= fused.STEM_CHANNELS
    moved = costs.x + costs.y + costs.weight
    # On the way, where every window is one row of the kernel's and no mean of all is needed first.
    finds = (shape.k == 1 or stem) and not costs.rates.operator.mean
    before = parts["filter_norm"] if finds else norms
    if stem:
        parts[STEM] = max(costs.own(STEM), costs.moved(moved) + LAUNCH)
        return before + parts[STEM], None
    if costs.rates.dtype not in ("bfloat16", "float16"):
        return None, None
    parts["gemm"] = costs.gemm(GEMM, moved)
    forward = before + parts["gemm"]
    if shape.stride != 1 or first:
        return forward, None
    parts["gemm_grad_input"] = costs.gemm(GEMM_GRADIENT, moved + costs.x)
    return forward, parts["gemm_grad_input"]


def network_times(
    network: str, batch: int, rates: Rates, compiled: bool = False
) -> Iterable[tuple[Shape, int, LayerTimes]]:
    """Yield a network's layers, how often it has each, and times; of the peer too if compiled."""
    for at, (shape, count) in enumerate(NETWORKS[network]):
        sized = shape._replace(n=batch)
        first = at == 0
        peer = compiled_layer(sized, rates.dtype, rates.gpu, first) if compiled else None
        yield sized, count, layer_times(sized, rates, first, peer)


def totals(found: Iterable[tuple[Shape, int, LayerTimes]], how: str) -> tuple[float, float]:
    """Return seconds of all forwards and of all backwards."""
    pairs = [(count, times.total(how)) for _, count, times in found]
    return (
        sum(count * forward for count, (forward, _) in pairs),
        sum(count * backward for count, (_, backward) in pairs),
    )


__all__ = ["ASSUMED", "Gpu", "LayerTimes", "chosen", "layer_times", "network_times", "totals"]
