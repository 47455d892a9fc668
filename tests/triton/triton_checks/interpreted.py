"""Checks of the Triton backend in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import affine
import new_functions
import torch
import torch._dynamo.testing
from accuracy import check, check_all, evaluate, judge, random_cotangent, truth_and_peer
from calls import check_call
from cases import (
    ANGULARS_OF_PAPER,
    CASES,
    LAYOUTS,
    MAGNITUDES_OF_PAPER,
    OPERATORS,
    Case,
    Inputs,
    by_id,
    make_inputs,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dcconv
from dcconv import backends, functional, native
from dcconv.operator import reference
from dcconv.operator.functions import angulars, magnitudes, weighted_magnitude, weightings
from dcconv.operator.numerics import ANGLE_DELTA
from dcconv.operator.records import Window
from dcconv.passes import fused
from dcconv.passes.backward import InputSide
from dcconv.passes.ops import conv2d_norms as norms_op
from dcconv.passes.records import COMPILED, OWN_RULE, Norms, Taps
from dcconv.pixel_sums import PixelSums
from dcconv.triton import environment, launch, tuning
from dcconv.triton import fused as triton_fused
from dcconv.triton import tiles as gemm_tiles
from dcconv.triton.fused import AUTOTUNED
from dcconv.triton.kernels import functions
from triton_checks.fused import fused_conv2d
from triton_checks.probes import angular_kernel, magnitude_kernel, offsets_kernel
from triton_checks.worker import serve

NORMS = ("batch", "given", "none")
FORMATS = (torch.contiguous_format, torch.channels_last)

# With tiles of at most 8 channels or positions and 64 elements: several that share a group, some of
# several groups, more than rows of partial sums.
LARGE = {
    "filter-chunks": Case("filter-chunks", 1, 5, 3, 4, 19, (1, 1)),
    "channel-chunks": Case("channel-chunks", 2, 20, 3, 2, 3, (1, 1)),
    "chunks-groups3": Case("chunks-groups3", 1, 30, 2, 3, 27, (1, 1), groups=3),
    "depthwise": Case("depthwise", 1, 10, 4, 4, 10, (3, 3), padding=1, groups=10),
    "groups5-of-3": Case("groups5-of-3", 1, 10, 3, 3, 15, (2, 2), groups=5),
    "groups5-of-4": Case("groups5-of-4", 1, 20, 3, 3, 20, (2, 2), groups=5),
    "tiles": Case("tiles", 3, 4, 9, 8, 8, (1, 1)),
}
# Groups of one channel, in every padding mode; with SMALL_TILES several tiles of groups.
DEPTHWISE = {
    case.id: case
    for case in (
        Case("zeros-s2", 2, 9, 7, 6, 9, (3, 3), stride=2, padding=1, groups=9),
        Case("same-s2-multiplier2", 1, 3, 6, 8, 6, (3, 3), 2, "same", groups=3),
        Case("dilation2", 1, 4, 7, 8, 4, (3, 2), padding=2, dilation=2, groups=4),
        Case("reflect", 1, 5, 5, 6, 5, (3, 3), padding=2, groups=5, padding_mode="reflect"),
        Case("replicate", 1, 3, 4, 5, 9, (2, 3), (1, 2), (2, 1), 1, 3, "replicate"),
        Case("circular", 2, 3, 5, 4, 3, (3, 3), padding=2, groups=3, padding_mode="circular"),
        Case("many-filters", 1, 2, 3, 4, 38, (2, 2), groups=2),
        Case("many-taps", 1, 3, 7, 6, 3, (5, 4), (1, 2), padding=2, groups=3),
        Case("many-positions", 2, 3, 8, 11, 3, (2, 2), groups=3),
        Case("empty", 0, 3, 5, 4, 3, (3, 3), groups=3),
    )
}
# Products: several tiles of positions and of filters, several steps, none of them full; steps of
# one tap, shared steps, windows that are pixels.
PRODUCTS = {
    case.id: case
    for case in (
        Case("pixels", 2, 40, 9, 8, 21, (1, 1)),
        Case("pixels-s2", 1, 17, 19, 13, 70, (1, 1), stride=(2, 3)),
        Case("pixels-p1", 1, 33, 4, 4, 17, (1, 1), padding=1),
        Case("pixels-groups2", 1, 34, 6, 6, 18, (1, 1), groups=2),
        Case("3x3", 2, 36, 9, 6, 35, (3, 3), padding=1),
        Case("3x3-groups2", 1, 68, 5, 6, 20, (3, 3), padding=(2, 0), groups=2),
        Case("3x2-s2-dilation2", 1, 33, 9, 7, 40, (3, 2), (2, 3), padding=2, dilation=2),
        Case("2x3-dilation2", 1, 33, 8, 8, 17, (2, 3), padding=2, dilation=2),
        Case("same-s2", 1, 35, 6, 7, 16, (3, 3), 2, "same"),
        Case("reflect", 1, 34, 5, 6, 7, (3, 3), padding=2, padding_mode="reflect"),
        Case("circular", 1, 5, 5, 6, 18, (3, 3), padding=2, padding_mode="circular"),
        Case("stem", 1, 3, 17, 16, 24, (7, 7), stride=2, padding=3),
        Case("stem-s1", 2, 4, 6, 7, 5, (5, 3), padding=2),
    )
}
SMALL_TILES = {
    "LANES": 8,
    "POSITIONS": 8,
    "ELEMENTS": 64,
    "GRADIENT_BYTES": 256,
    "GRADIENT_ELEMENTS": 64,
    "FILTER_ELEMENTS": 64,
}


@contextmanager
def small_tiles() -> Iterator[None]:
    """Make problems of a few elements large."""
    before = {name: getattr(launch, name) for name in SMALL_TILES}
    for name, value in SMALL_TILES.items():
        setattr(launch, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(launch, name, value)


def dtype_of(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def compare(
    name: str,
    inputs: Inputs,
    call: Callable[..., Tensor] = functional.decoupled_conv2d,
    **extra: Any,
) -> None:
    """Judge y and all gradients by the accuracy rule."""
    cotangent = random_cotangent(inputs)
    got = evaluate(call, inputs, cotangent, **extra)
    judge(name, inputs, cotangent, got)


def lists() -> dict[str, Any]:
    return {
        "magnitudes": functions.MAGNITUDES,
        "angulars": functions.ANGULARS,
        "twinless": {
            f"{magnitude} {weighting} {angular}": twinless(magnitude, angular, weighting)
            for magnitude, weighting, angular in OPERATORS
            if magnitude in MAGNITUDES_OF_PAPER and angular in ANGULARS_OF_PAPER
        },
    }


def twinless(magnitude: str, angular: str, weighting: str) -> str | None:
    return environment.twinless(magnitude, angular, weighting)


def twinned() -> list[tuple[str, str, str]]:
    """Return the operators whose functions have twins."""
    return [(m, w, a) for m, w, a in OPERATORS if twinless(m, a, w) is None]


def points() -> tuple[Tensor, Tensor, Tensor]:
    """Points a, b, rho that avoid b = rho."""
    a = torch.logspace(-2, 1, 7)
    b = torch.logspace(-2, 2, 41)
    rho = torch.tensor([0.0123, 0.77, 3.3, 250.0])
    found = torch.cartesian_prod(a, b, rho).T
    return found[0].contiguous(), found[1].contiguous(), found[2].contiguous()


def magnitude_of(name: str, weighting: str, a: Tensor, b: Tensor, rho: Tensor) -> Tensor:
    out = torch.empty(5, b.numel())
    magnitude_kernel[(1,)](
        a,
        b,
        rho,
        out,
        b.numel(),
        1.5,
        0.25,
        NAME=environment.twin_of(name, weighting),
        TIMES_A=weighting == "linear",
        B=launch.power_of_two_at_least(b.numel()),
    )
    return out


def magnitude(name: str, weighting: str) -> None:
    """Value and derivatives against the specification's, d = b h_b - h."""
    a, b, rho = points()

    def values(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (b, rho, a)]
        h = weighted_magnitude(name, weighting, leaves[2], leaves[0], leaves[1], 1.5, 0.25)
        h = h.expand(b.shape) + 0 * leaves[0]
        grads = torch.autograd.grad(h.sum(), leaves, materialize_grads=True, allow_unused=True)
        return [h.detach(), h.detach(), *grads]

    got = magnitude_of(name, weighting, a, b, rho)
    got[2] = (got[2] + got[1]) / b
    truth, peer = values(torch.float64), values(torch.float32)
    for label, g, t, p in zip(("value", "h", "h_b", "h_rho", "h_a"), got, truth, peer, strict=True):
        check(f"{name} {weighting} {label}", g, t, p, torch.float32)
    # The difference itself: formed in float32 it would cancel, in float64 it has digits enough
    # where it is not too small.
    want = b.double() * truth[2] - truth[0]
    exact = (want.abs() > 1e-8 * truth[0].abs()) & (want.abs() > 0)
    defect = magnitude_of(name, weighting, a, b, rho)[2].double()
    if name in ("tanh", "log", "mix"):
        assert float(((defect - want) / want)[exact].abs().max()) < 1e-5
    nan = torch.full_like(b, torch.nan)
    if name != "sphere":
        assert bool(magnitude_of(name, weighting, a, nan, rho)[:2].isnan().all())
    if magnitudes[name].uses_rho:
        assert bool(magnitude_of(name, weighting, a, b, nan)[:2].isnan().all())


def tie(name: str) -> list[float]:
    """Value and derivatives by b and rho where b = rho = 2."""
    two = torch.full((1,), 2.0)
    _, h, d, h_rho, _ = magnitude_of(name, "none", torch.ones(1), two, two)
    return [float(h), float((d + h) / two), float(h_rho)]


def angle(name: str) -> None:
    """Value, derivatives and inverse against the specification's, with NaN and ends."""
    c = torch.cat((torch.linspace(-1, 1, 401), torch.logspace(-6, -2, 9)), 0)
    c, k = (t.contiguous() for t in torch.cartesian_prod(c, torch.tensor([0.05, 0.3, 2.0])).T)
    delta = ANGLE_DELTA[torch.float32]
    record = angulars[name]

    def values(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (c, k)]
        g = record.value(leaves[0], leaves[1], 2.5, delta) + 0 * leaves[1]
        g_c, g_k = torch.autograd.grad(g.sum(), leaves)
        return [g.detach(), g.detach(), g_c, g.detach() - leaves[0].detach() * g_c, g_k]

    def run(c: Tensor, k: Tensor) -> Tensor:
        out = torch.empty(6, c.numel())
        block = launch.power_of_two_at_least(c.numel())
        angular_kernel[(1,)](
            c, k, out, c.numel(), 2.5, delta, NAME=name, INVERTIBLE=record.invertible, B=block
        )
        return out

    got, truth, peer = run(c, k), values(torch.float64), values(torch.float32)
    for label, g, t, p in zip(("value", "g", "g_c", "e", "g_k"), got, truth, peer, strict=False):
        check(f"{name} {label}", g, t, p, torch.float32)
    if record.invertible:
        check(f"{name} inverse", got[5], c.double(), c, torch.float32)
    beyond = torch.tensor([-1.5, 1.5, torch.nan, 0.0, 0.3])
    curvature = torch.tensor([0.3, 0.3, 0.3, 0.3, -0.3])
    got = run(beyond, curvature)
    if name in ("linear", "sigmoid"):
        check("ends", got[0, :2], torch.tensor([-1.0, 1.0]), torch.ones(2), torch.float32)
    assert bool(got[:2, 2].isnan().all())
    assert float(got[0, 3]) == 0.0
    if record.uses_k:
        mirrored = run(beyond, -curvature)
        check("even in k", got[:4, 4], mirrored[:4, 4].double(), mirrored[:4, 4], torch.float32)
        check("odd in k", got[4, 4:5], -mirrored[4, 4:5].double(), mirrored[4, 4:5], torch.float32)


def ulps() -> dict[str, float]:
    """Largest error of tanh, log(1 + x), asin and powers, in units of the last place."""

    def largest(got: Tensor, truth: Tensor) -> float:
        rounded = truth.float().abs()
        spacing = torch.nextafter(rounded, torch.tensor(torch.inf)) - rounded
        return float(((got.double() - truth).abs() / spacing.double()).max())

    count = 50_000
    one, z = torch.ones(count), torch.logspace(-6, 1.5, count)

    def h(name: str, row: int) -> Tensor:
        out = torch.empty(5, count)
        block = launch.power_of_two_at_least(count)
        magnitude_kernel[(1,)](one, z, one, out, count, 1.0, 0.5, NAME=name, TIMES_A=False, B=block)
        return out[row]

    def g(name: str, c: Tensor, power: float) -> Tensor:
        out = torch.empty(6, count)
        block = launch.power_of_two_at_least(count)
        angular_kernel[(1,)](c, one, out, count, power, 1e-6, NAME=name, INVERTIBLE=False, B=block)
        return out[0]

    c = torch.linspace(-1, 1, count)
    size = c.abs()
    found = {
        "tanh": largest(h("tanh", 0), z.double().tanh()),
        "tanh and slope": largest(h("tanh", 1), z.double().tanh()),
        "log1p": largest(h("log", 0), z.double().log1p()),
        "asin": largest(g("linear", c, 2.0), c.double().asin() * (2 / torch.pi)),
    }
    for power in (1.0, 1.5, 3.0):
        normal = size**power > 1e-30
        truth = (size.double() ** power)[normal]
        found[f"power {power}"] = largest(g("power", size, power)[normal], truth)
    return found


def geometry(case: str, dtype: str) -> None:
    """A case, with operator, norm, bias and layout that change from case to case."""
    kind = dtype_of(dtype)
    number = CASES.index(by_id(case))
    start = 7 * number + 13 * (kind == torch.float16) + 26 * (kind == torch.bfloat16)
    known = twinned()
    name, weighting, angular = known[37 * start % len(known)]
    norm, scalar = NORMS[start % 3], start % 5 == 0
    bias = start % 4 == 0
    layout = LAYOUTS[(start // 2 + number) % len(LAYOUTS)]
    inputs = make_inputs(
        by_id(case),
        kind,
        layout,
        magnitude=name,
        weighting=weighting,
        angular=angular,
        norm=norm,
        bias=bias,
        scalar=scalar,
    )
    compare(f"{case} {layout} {name} {weighting} {angular} {norm}", inputs)


def operators(magnitude: str, weighting: str) -> None:
    """Every angular function with a weighted magnitude, one small grouped problem."""
    case = Case("small", 2, 4, 4, 5, 6, (2, 3), stride=(1, 2), padding=1, groups=2)
    for i, angular in enumerate(functions.ANGULARS):
        inputs = make_inputs(
            case,
            torch.float32,
            ("contiguous", "channels_last")[i % 2],
            magnitude=magnitude,
            weighting=weighting,
            angular=angular,
            norm=NORMS[i % 3],
            bias=i == 0,
            power=2.5,
        )
        compare(f"{magnitude} {weighting} {angular}", inputs, keep=("dot", "auto")[i % 2])


def large(case: str) -> None:
    """Both layouts; the column sums of rho, a, k and bias together."""
    for layout in ("contiguous", "channels_last"):
        inputs = make_inputs(
            LARGE[case],
            torch.float32,
            layout,
            weighting="product",
            angular="sigmoid",
            norm="none",
            bias=True,
        )
        with small_tiles():
            compare(case, inputs)


def depthwise(case: str) -> None:
    """Both layouts; with and without the mean norm of the batch, keeping y and u."""
    number = list(DEPTHWISE).index(case)
    for i, layout in enumerate(("contiguous", "channels_last")):
        name, weighting = (("tanh", "product"), ("ball", "linear"), ("log", "none"))[number % 3]
        inputs = make_inputs(
            DEPTHWISE[case],
            (torch.float32, torch.float16)[(number + i) % 2],
            layout,
            magnitude=name,
            weighting=weighting,
            angular=("square_cosine", "sigmoid")[(number // 2 + i) % 2],
            norm=NORMS[(number + i) % 3],
            bias=number % 3 == 2,
        )
        with small_tiles(), Recorder() as recorder:
            compare(f"{case} {layout}", inputs, fused_conv2d)
        names = recorder.names()
        assert "conv2d_one_pass" in names and "conv2d_epilogue_" not in names
        assert "conv2d_one_pass_grad_input" in names and "conv2d_grad_input" not in names
        assert "depthwise_grad_weight" in names


def product(case: str, layout: str, dtype: str, tile: int = OWN_RULE) -> None:
    """A product forward and backward; operator, norm and bias change from case to case."""
    number = list(PRODUCTS).index(case) + (layout == "contiguous")
    name, weighting = (("tanh", "separate"), ("segmented", "linear"), ("mix", "none"))[number % 3]
    inputs = make_inputs(
        PRODUCTS[case],
        dtype_of(dtype),
        layout,
        magnitude=name,
        weighting=weighting,
        angular=("square_cosine", "sigmoid")[number // 3 % 2],
        norm=NORMS[number // 2 % 3],
        bias=number % 4 == 0,
    )
    cotangent = random_cotangent(inputs)
    truth, peer = truth_and_peer(inputs, cotangent)
    with Recorder() as recorder:
        got = evaluate(fused_conv2d, inputs, cotangent, keep=("dot", "auto")[number % 2], tile=tile)
    check_all(f"{case} {layout} {dtype} {tile}", got, truth, peer, inputs.tensors["x"].dtype)
    names = recorder.names()
    assert "conv2d_one_pass" in names and "conv2d_epilogue_" not in names
    forward_only = {"pixels-s2", "3x2-s2-dilation2", "same-s2", "reflect", "circular", "stem"}
    assert ("conv2d_one_pass_grad_input" in names) == (case not in forward_only)


def tiles() -> None:
    """Every tile, in products of two and more of the largest."""
    for number in range(len(gemm_tiles.TILES)):
        case = ("3x3", "pixels", "stem-s1")[number % 3]
        product(case, ("channels_last", "contiguous")[number // 3 % 2], "float16", number)


def tunes() -> None:
    """A made-up clock finds the second tile that is tried to be the fastest, once per bucket."""
    inputs = make_inputs(PRODUCTS["3x3"], torch.float16, "channels_last", magnitude="log")
    cotangent = random_cotangent(inputs)
    truth, peer = truth_and_peer(inputs, cotangent)
    timed = 0

    def clock(run: Any, quantiles: Any) -> list[float]:
        nonlocal timed
        timed += 1
        run()
        return [0.5 if timed == 2 else 1.0] * 3

    def call(images: int) -> int:
        """Run forward for a number of images; return how many tiles were timed."""
        nonlocal timed
        timed = 0
        options = {**inputs.tensors, **inputs.options}
        x = options.pop("x")[:1].expand(images, -1, -1, -1)
        fused_conv2d(x.contiguous(memory_format=FORMATS[1]), **options, tile=AUTOTUNED)
        return timed

    # 54 positions of 36 channels, and 35 filters.
    facts = gemm_tiles.Product(54, 1, 1, 35, 36, 9, False, 2)
    tried = gemm_tiles.worthwhile(facts, gemm_tiles.NO_GPU)
    assert len(tried) > 2
    # Without a clock there is nothing to tune by on a CPU, and the rule decides.
    assert call(1) == 0 and not tuning._best
    tuning.stopwatch = clock
    try:
        assert call(1) == len(tried)
        assert list(tuning._best.values()) == [tried[1]]
        # 54 positions stand for up to 64; 108 do not.
        torch.use_deterministic_algorithms(True)
        assert call(2) == 0
        torch.use_deterministic_algorithms(False)
        assert call(1) == 0 and call(2) == len(tried)
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert not tuning.may_tune(torch.empty(1))
        assert tuning.may_tune(torch.nn.Parameter(torch.empty(1)))
        timed = 0
        got = evaluate(fused_conv2d, inputs, cotangent, tile=AUTOTUNED)
        check_all("tuned", got, truth, peer, torch.float16)
        assert {key[0] for key in tuning._best} == {
            "implicit_gemm_kernel",
            "implicit_gemm_grad_input_kernel",
        }
    finally:
        torch.use_deterministic_algorithms(False)
        tuning.stopwatch = None
        tuning._best.clear()


def tunes_without_memory() -> None:
    """The call runs by the rule's tile, and tuning is not tried again."""
    tried = 0

    def clock(run: Any, quantiles: Any) -> list[float]:
        nonlocal tried
        tried += 1
        raise torch.OutOfMemoryError("no room to clear the cache")

    x, weight = torch.randn(1, 40, 5, 5), torch.randn(33, 40, 1, 1)
    tuning.stopwatch = clock
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            results = [fused_conv2d(x, weight, tile=AUTOTUNED) for _ in range(2)]
    finally:
        tuning.stopwatch = None
        tuning._best.clear()
    assert tried == 1
    assert [str(warning.message) for warning in said] == [
        "dcconv: too little memory to tune implicit_gemm_kernel: its rule chooses the tile"
    ]
    assert all(torch.equal(y, fused_conv2d(x, weight)) for y in results)


def refusals() -> list[str]:
    """What fused says to tiles that are not there, and to another backend's kernel."""
    x, weight = torch.randn(1, 4, 3, 3), torch.randn(5, 4, 1, 1)
    operands, problem, _ = check_call(x, weight)
    grad_u, t = torch.ones(1, 5, 3, 3), torch.ones(9)
    arguments = (InputSide(grad_u, x, weight, Taps(t, t, None)), problem)

    def forward(kernel: str, tile: int) -> None:
        how = ("nothing", kernel, True, None, tile, triton_fused.NAMESPACE)
        fused.compose(operands, problem, *how)

    def backward(kernel: str, tile: int) -> None:
        fused.input_gradient(*arguments, kernel, tile, triton_fused.NAMESPACE)

    said = []
    for call in (forward, backward):
        for kernel, tile in (("implicit_gemm", -3), ("implicit_gemm", 12), ("stem", 0)):
            try:
                call(kernel, tile)
            except ValueError as error:
                said.append(str(error))
    return said


def offsets_beyond_int32() -> None:
    """The last tile of tensors with more than 2^31 elements; nothing is allocated."""
    images, pixels, channels = 700, 301 * 301, 70
    for last in (False, True):
        tiling = launch.tiling(images, pixels, channels, 1, last)
        out = torch.empty(tiling.positions, tiling.in_group, dtype=torch.int64)
        offsets_kernel[(1,)](
            out,
            tiling.tiles - 1,
            images,
            pixels,
            channels,
            tiling.chunks,
            LAST=last,
            P=tiling.positions,
            IN_GROUP=tiling.in_group,
        )
        assert int(out.max()) == images * pixels * channels - 1 > 2**31
        there = out[out >= 0]
        assert there.unique().numel() == there.numel() and int(there.min()) > 2**31


class Recorder(TorchDispatchMode):
    """Keeps the calls of the Triton ops, their tensors copied."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == triton_fused.NAMESPACE:
            copies = tuple(t.clone() if isinstance(t, Tensor) else t for t in args)
            self.calls.append((func, copies))
        return func(*args, **(kwargs or {}))

    def names(self) -> list[str]:
        return [func._schema.name.partition("::")[2] for func, _ in self.calls]


def opcheck() -> list[str]:
    """Check schema, fake and registration of every op; return which there were."""
    seen: set[str] = set()
    variants: tuple[dict[str, Any], ...] = (
        {"case": by_id("3x3-p1"), "weighting": "product", "angular": "sigmoid", "bias": True},
        {"case": by_id("same-s2-even"), "magnitude": "ball", "norm": "given", "layout": LAYOUTS[1]},
        {"case": by_id("1x1-groups2"), "magnitude": "linear", "layout": LAYOUTS[1]},
        {"case": by_id("n0"), "magnitude": "tanh"},
        {"case": LARGE["filter-chunks"], "magnitude": "log", "layout": LAYOUTS[1]},
        {"case": DEPTHWISE["zeros-s2"], "bias": True},
        {"case": PRODUCTS["3x3"], "norm": "batch", "angular": "sigmoid"},
        {"case": PRODUCTS["pixels-s2"], "norm": "none", "bias": True, "layout": LAYOUTS[1]},
        {"case": DEPTHWISE["same-s2-multiplier2"], "norm": "given", "layout": LAYOUTS[1]},
    )
    for options in variants:
        case = options["case"]
        inputs = make_inputs(**options, dtype=torch.float16)
        tiles = small_tiles() if case in LARGE.values() else nullcontext()
        direct = case in DEPTHWISE.values()
        with Recorder() as recorder, tiles, backends.strategies("fused" if direct else "library"):
            own = direct or case in PRODUCTS.values()
            call = fused_conv2d if own else functional.decoupled_conv2d
            evaluate(call, inputs, random_cotangent(inputs))
            # Without a gradient of x there is less to return.
            weight = inputs.tensors["weight"].detach().requires_grad_()
            y = functional.decoupled_conv2d(
                **{**inputs.tensors, "weight": weight}, **inputs.options
            )
            y.sum().backward()
            x = inputs.tensors["x"].detach().requires_grad_()
            functional.patch_norm(x, case.kernel, **case.geometry).sum().backward()
            last = options.get("layout") == LAYOUTS[1]
            affine_op(affine.operands((2, 6, 3, 4), 2, torch.float16, last))
        for func, arguments in recorder.calls:
            torch.library.opcheck(
                func,
                arguments,
                test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
            )
        seen |= set(recorder.names())
    return sorted(seen)


def affine_op(call: affine.AffineRelu) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = torch.ops.dcconv_triton.affine_relu.default(*call)
    return found


def affine_relu(dtype: str, last: bool) -> None:
    """Values, special values and views, with tiles as they are and with small ones."""
    kind = getattr(torch, dtype)
    for tiles in (nullcontext(), small_tiles()):
        with tiles:
            for sizes, groups in affine.PROBLEMS:
                call = affine.operands(sizes, groups, kind, last)
                affine.check_values(f"{sizes} {groups}", call, affine_op(call))
            affine.check_special_values(affine_op, kind, last)
    call = affine.operands((2, 6, 3, 4), 2, kind, last)
    moved = affine.moved(call)
    assert not moved.scale.is_contiguous()
    for one, two in zip(affine_op(call), affine_op(moved), strict=True):
        assert torch.equal(one, two)


def affine_refusals() -> dict[str, str]:
    """Return what a call hears that is to be refused, by what is wrong with it."""
    found = {}
    for name in affine.REFUSALS:
        if name in affine.NOT_OF_FAKES:
            continue
        call, _ = affine.refused(name)
        try:
            affine_op(call)
        except RuntimeError as refused:
            found[name] = str(refused)
    double = affine.operands((2, 6, 3, 4), 2, torch.float64, False)
    try:
        affine_op(double)
    except RuntimeError as refused:
        found["float64"] = str(refused)
    return found


def given_sums() -> int:
    """Layers behind BatchNormAct2d start from its sums, by either strategy; return how many did."""
    fitting, given = PixelSums.fitting, []

    def noted(sums: PixelSums, *call: Any) -> Tensor | None:
        given.append(found := fitting(sums, *call))
        return found

    PixelSums.fitting = noted
    for layout, groups, strategy in itertools.product(FORMATS, (1, 2), ("library", "fused")):
        norm = dcconv.BatchNormAct2d(8, groups=groups)
        conv = dcconv.DecoupledConv2d(8, 4, 3, padding=1, groups=groups).to(memory_format=layout)
        plain = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), copy.deepcopy(conv))
        x = torch.randn(2, 8, 5, 4).contiguous(memory_format=layout)
        results = []
        for module, image, backend in (
            (nn.Sequential(norm, conv), x, "triton"),
            (plain, x, "reference"),
            (copy.deepcopy(plain).double(), x.double(), "reference"),
        ):
            leaf = image.detach().requires_grad_()
            with backends.use_backend(backend), backends.strategies(f"library,{strategy}"):
                y = module(leaf)
            cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
            parameters = list(module.parameters())
            grads = torch.autograd.grad(y, [leaf, *parameters], cotangent.to(y.dtype))
            results.append([y.detach(), *grads])
        for got, peer, truth in zip(*results, strict=True):
            check(f"{layout} {groups} {strategy}", got, truth, peer, torch.float32)
        # The op itself: four times the sums are norms of twice the image.
        call = Norms(x, conv.weight.detach(), Window(groups=groups), 1e-4, True, False)
        last = layout == torch.channels_last
        sums = 4 * reference.pixel_sums(x, groups, last)
        one = norms_op(call._replace(x=2 * x, channels_last=last), "dcconv_triton")
        two = norms_op(call._replace(sums=sums, channels_last=last), "dcconv_triton")
        for a, b in zip(one, two, strict=True):
            check("norms", b, a.double(), a, torch.float32)
    PixelSums.fitting = fitting
    return sum(found is not None for found in given)


def schemas() -> list[list[str]] | None:
    """Return name, own schema and compiled library's schema of each op; None without a library."""
    if native.missing is not None:
        return None
    found = []
    for name in importable():
        if not hasattr(torch.ops.dcconv, name):
            continue
        rows = []
        for namespace in (triton_fused.NAMESPACE, COMPILED):
            schema = getattr(getattr(torch.ops, namespace), name).default._schema
            # Results have no names here; the mutated argument has its own letter.
            arguments = [(a.name, str(a.type), a.is_write) for a in schema.arguments]
            rows.append(str([arguments, [str(r.type) for r in schema.returns]]))
        found.append([name, *rows])
    return found


def importable() -> tuple[str, ...]:
    from dcconv.triton import ops_fused, ops_library  # noqa: F401  (registers them)

    return tuple(launch.names)


def patch_norm() -> None:
    names = ("groups3-odd", "same-s3-dilation2", "reflect", "replicate", "circular-same-s2")
    for i, name in enumerate(names):
        case = by_id(name)
        dtype = (torch.float32, torch.float16)[i % 2]
        x = make_inputs(case, dtype, ("contiguous", "channels_last")[i // 2 % 2]).tensors["x"]
        results = []
        for source, call in (
            (x.double(), reference.patch_norm),
            (x, reference.patch_norm),
            (x, functional.patch_norm),
        ):
            leaf = source.detach().requires_grad_()
            b = call(leaf, case.kernel, **case.geometry)
            cotangent = torch.linspace(0.5, 1.5, b.numel(), dtype=b.dtype).reshape(b.shape)
            results.append([b.detach(), *torch.autograd.grad(b, leaf, cotangent)])
        for result, truth, peer, got in zip(("b", "grad_x"), *results, strict=True):
            check(f"{name} {result}", got, truth, peer, x.dtype)


def repeats() -> None:
    """The same bits twice, with every uninitialised element NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        cases = (
            by_id("3x3-p1-c1"),
            by_id("1x1-groups2"),
            by_id("same-s2-odd"),
            DEPTHWISE["many-positions"],
        )
        for i, case in enumerate(cases):
            call = fused_conv2d if case in DEPTHWISE.values() else functional.decoupled_conv2d
            for layout in ("contiguous", "channels_last")[i % 2 :]:
                inputs = make_inputs(
                    case,
                    (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16)[i],
                    layout,
                    weighting="separate",
                    angular="sigmoid",
                    bias=True,
                )
                cotangent = random_cotangent(inputs)
                one, two = (evaluate(call, inputs, cotangent) for _ in range(2))
                for name in one:
                    assert bool(one[name].isfinite().all()), name
                    assert torch.equal(one[name], two[name]), name
    finally:
        torch.use_deterministic_algorithms(False)


def empty_batch() -> None:
    for name in ("tanh", "linear"):
        for layout in FORMATS:
            x = torch.zeros(0, 3, 5, 6).to(memory_format=layout).requires_grad_()
            layer = dcconv.DecoupledConv2d(3, 4, 3, bias=True, magnitude=name)
            y = layer(x)
            y.sum().backward()
            assert y.shape == (0, 4, 3, 4)
            assert x.grad is not None and x.grad.shape == x.shape
            for label, p in layer.named_parameters():
                assert p.grad is not None and not p.grad.any(), label


def hard_points() -> None:
    """Zero filters and patches, aligned vectors, huge inputs, radii on their floor, NaN."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 5, 5, generator=generator)
    weight = torch.randn(6, 4, 3, 3, generator=generator)
    x[0] = 0.0
    weight[1] = 0.0
    weight[2] = 3.0 * x[1, :, 1:4, 1:4]
    weight[3] = -weight[2]
    radius = torch.tensor([1.0, 0.5, 2.0, 1e-15, -1.0, 3.0])
    for dtype, scale in ((torch.float32, 1.0), (torch.float16, 300.0), (torch.float32, 1e-12)):
        for angular in ("linear", "square_cosine"):
            # No float32 formula is accurate near the infinite slope of asin.
            filters = [0, 1, 4, 5] if angular == "linear" else [0, 1, 2, 3, 4, 5]
            tensors = {
                "x": (scale * x).to(dtype),
                "weight": weight[filters].to(dtype),
                "radius": radius[filters],
            }
            options = {"angular": angular, "norm_mean": "batch", "magnitude": "segmented"}
            y = functional.decoupled_conv2d(**tensors, **options)
            peer = reference.decoupled_conv2d(**tensors, **options)
            wide = {name: t.double() for name, t in tensors.items()}
            truth = reference.decoupled_conv2d(**wide, **options)
            check(f"{dtype} {scale} {angular}", y, truth, peer, dtype)
    floored = torch.tensor([-1.0, 0.0, 1e-15, 1.0, 0.0, 2.0], requires_grad=True)
    y = functional.decoupled_conv2d(
        x, weight, radius=floored, magnitude="segmented", norm_mean="batch"
    )
    (grad,) = torch.autograd.grad(y.square().sum(), floored)
    assert grad[[0, 1, 2, 4]].tolist() == [0.0] * 4 and bool(grad[[3, 5]].ne(0.0).all())
    nan = x.clone()
    nan[1, 2, 3, 4] = torch.nan
    y = functional.decoupled_conv2d(nan, weight, norm_mean=torch.tensor(6.0))
    assert bool(y[1, :, 1:, 2].isnan().all()) and bool(y[0].isfinite().all())


def compiles() -> None:
    """One graph forward and backward; the ops are opaque to it in the interpreter."""
    variants: tuple[tuple[dict[str, Any], tuple[int, ...]], ...] = (
        ({"magnitude": "linear", "padding": "same", "stride": 2}, (3,)),
        ({"angular": "sigmoid", "learn_k": True, "bias": True, "weighting": "separate"}, (3, 5)),
    )
    for layout, (options, batches) in zip(FORMATS, variants, strict=True):
        torch._dynamo.reset()
        # Two layers: a number of a module that both use must be no input of the graph.
        eager = torch.nn.Sequential(
            dcconv.DecoupledConv2d(4, 6, 3, **options), dcconv.DecoupledConv2d(6, 4, 1, **options)
        ).to(memory_format=layout)
        other = copy.deepcopy(eager)
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        dynamic = True if len(batches) > 1 else None
        compiled = torch.compile(other, fullgraph=True, backend=counter, dynamic=dynamic)
        frames = 0
        for n in batches:
            x = torch.randn(n, 4, 6, 5).to(memory_format=layout)
            results = []
            for module in (eager, compiled):
                leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
                y = module(leaf)
                parameters = list((eager if module is eager else other).parameters())
                grads = torch.autograd.grad(y, [leaf, *parameters], torch.ones_like(y))
                results.append([y, *grads])
            assert results[0][0].stride() == results[1][0].stride()
            for one, two in zip(*results, strict=True):
                check("compiled", two, one, one, torch.float32)
            frames = frames or counter.frame_count
        assert counter.frame_count == frames


def flops() -> None:
    """Those of the library's convolution; of fused three times forward's.

    PyTorch counts the gradient of a weight as if every group had all groups' filters.
    """
    for groups in (1, 4):
        x = torch.randn(1, 4, 5, 5, requires_grad=True)
        weight = torch.randn(8, 4 // groups, 3, 3, requires_grad=True)
        totals = []
        for call in (torch.nn.functional.conv2d, functional.decoupled_conv2d, fused_conv2d):
            with FlopCounterMode(display=False) as counter, backends.strategies("library"):
                y = call(x, weight, stride=1, padding=1, groups=groups)
                forward = counter.get_total_flops()
                y.sum().backward()
            totals.append(counter.get_total_flops())
        assert totals[0] == totals[1] > 0
        assert totals[2] == 3 * forward > 0


def autocast() -> None:
    layer = dcconv.DecoupledConv2d(4, 6, 3, bias=True)
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


def second_derivatives() -> None:
    x = torch.randn(1, 2, 3, 3, requires_grad=True)
    weight = torch.randn(2, 2, 2, 2, requires_grad=True)
    for call in (functional.decoupled_conv2d, reference.decoupled_conv2d):
        (grad,) = torch.autograd.grad(call(x, weight).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), weight)
        if call is functional.decoupled_conv2d:
            got = second
    check("second", got, second, second, torch.float32)


def choice() -> dict[str, Any]:
    """Who runs what: interpreted kernels only where they are named."""
    x = torch.zeros(1, 3, 4, 4)
    with backends.use_backend("auto"):
        chosen = backends.choose(x).name
    return {
        "auto": chosen,
        "float32": backends.why_not("triton", x),
        "float64": backends.why_not("triton", x.double()),
        "meta": backends.why_not("triton", x.to("meta")),
    }


def absent_twin() -> dict[str, str | None]:
    """What operators hear when two functions have no twin, and a call and a report of one."""
    known = functions.ANGULARS, functions.MAGNITUDES
    x, weight = torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 3, 3)
    found: dict[str, str | None] = {}
    try:
        functions.ANGULARS = tuple(n for n in known[0] if n != "power")
        functions.MAGNITUDES = tuple(n for n in known[1] if n != "tanh_separate")
        for magnitude, weighting, angular in (
            ("tanh", "none", "power"),
            ("tanh", "separate", "cosine"),
            ("tanh", "none", "cosine"),
            ("tanh", "product", "sigmoid"),
        ):
            name = f"{magnitude} {weighting} {angular}"
            found[name] = backends.why_not("triton", x, magnitude, angular, weighting)
        functional.decoupled_conv2d(x, weight)
        try:
            functional.decoupled_conv2d(x, weight, angular="power")
        except NotImplementedError as refused:
            found["called"] = str(refused)
        lines = backends.report(x, weight, angular="power", backend="reference").splitlines()
        (found["report"],) = (
            line.split(maxsplit=1)[1] for line in lines if line.startswith("  triton")
        )
    finally:
        functions.ANGULARS, functions.MAGNITUDES = known
    return found


def registered_alone(magnitude: str, angular: str) -> dict[str, str | None]:
    """What an operator hears whose functions are new and have no twin, and a call of it."""
    x, weight = torch.randn(2, 3, 6, 5), torch.randn(4, 3, 3, 3)
    with new_functions.registered():
        found = {"asked": backends.why_not("triton", x, magnitude, angular)}
        try:
            functional.decoupled_conv2d(x, weight, magnitude=magnitude, angular=angular)
        except NotImplementedError as refused:
            found["called"] = str(refused)
        found["known"] = backends.why_not("triton", x)
        assert functional.decoupled_conv2d(x, weight).isfinite().all()
    return found


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    assert environment.INTERPRETED and len(weightings) == 4
    # Import the kernels before any test changes the sizes of tiles.
    assert environment.why_not(0) is None
    with backends.use_backend("triton"):
        serve({name: value for name, value in globals().items() if callable(value)})


if __name__ == "__main__":
    main()
