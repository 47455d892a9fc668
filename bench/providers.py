"""Who is measured: one record per implementation, and the formula written as well as it can be."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import BATCH, Case, Inputs
from bench.options import FORWARD
from dcconv import backends
from dcconv.call.implementations import rows
from dcconv.call.key import FORWARD as FORWARD_DIRECTION
from dcconv.functional import decoupled_conv2d
from dcconv.operator.functions import angulars, capped_asin, magnitudes
from dcconv.operator.numerics import EPS, angle_delta, compute_dtype

#: x, weight, radius, norm_mean -> y.
Function = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None"], Tensor]

ALPHA, BETA, K, POWER = 1.0, 0.5, 0.3, 2.0


def plain(case: Case) -> Function:
    """Return F.conv2d, the floor."""
    layer = case.layer

    def conv2d(
        x: Tensor, weight: Tensor, radius: Tensor | None, norm_mean: Tensor | None
    ) -> Tensor:
        return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)

    return conv2d


def ours(backend: str, strategy: str | None = None) -> Callable[[Case], Function]:
    """Return dcconv on one of its backends, by one strategy where it is named."""

    def build(case: Case) -> Function:
        layer = case.layer

        def call(
            x: Tensor, weight: Tensor, radius: Tensor | None, norm_mean: Tensor | None
        ) -> Tensor:
            with nullcontext() if strategy is None else backends.strategies(strategy):
                return decoupled_conv2d(
                    x,
                    weight,
                    None,
                    layer.stride,
                    layer.padding,
                    layer.dilation,
                    layer.groups,
                    magnitude=case.operator.magnitude,
                    angular=case.operator.angular,
                    alpha=ALPHA,
                    beta=BETA,
                    k=K,
                    power=POWER,
                    radius=1.0 if radius is None else radius,
                    norm_mean="batch" if case.mode == BATCH else norm_mean,
                    backend=backend,
                )

        return call

    return build


def _sums_of_squares(x: Tensor, case: Case) -> Tensor:
    """Return the sum of squares of every patch, [n, groups, p, q] in float32 at least."""
    layer = case.layer
    if layer.k == 1 and layer.stride > 1:
        x = x[:, :, :: layer.stride, :: layer.stride]
    dtype = compute_dtype(x.dtype)
    if layer.groups == layer.c and layer.groups > 1:
        per_group = x.to(dtype).square()
    else:
        # Split where they lie, at the end for channels_last, they give the gradient x's layout.
        axis, over = (-1, -1) if case.layout == "channels_last" else (1, 2)
        channels = x.movedim(1, axis).unflatten(axis, (layer.groups, -1))
        if torch.compiler.is_compiling():
            per_group = channels.to(dtype).square().sum(dim=over)
        else:
            # Eagerly without a tensor of squares: up to twice as fast, and the root of the small
            # map costs little. Compiled, squares and sum are one loop.
            per_group = torch.linalg.vector_norm(channels, dim=over, dtype=dtype).square()
        per_group = per_group.movedim(axis, 1)
    if layer.k == 1:
        return per_group
    if layer.dilation == 1:
        return F.avg_pool2d(per_group, layer.k, layer.stride, layer.padding, divisor_override=1)
    # Pooling has no dilation: a depthwise convolution with ones on the small map.
    ones = per_group.new_ones(layer.groups, 1, layer.k, layer.k)
    return F.conv2d(
        per_group, ones, None, layer.stride, layer.padding, layer.dilation, layer.groups
    )


def _magnitude(name: str, b: Tensor, rho: Tensor | None) -> Tensor:
    """Return h; what is written here is faster than the registered function, or shorter."""
    if name == "sphere":
        return torch.full_like(b, ALPHA)
    if name == "linear":
        return b * ALPHA
    if name == "log":
        return torch.log1p(b) * ALPHA
    if name == "mix":
        return b * ALPHA + torch.log1p(b) * BETA
    if name == "ball" and rho is not None:
        return (b * (1.0 / rho)).clamp(max=1.0) * ALPHA
    if name == "tanh" and rho is not None:
        return torch.tanh(b * (1.0 / rho)) * ALPHA
    return magnitudes[name].value(b, rho, ALPHA, BETA)


def _angular(name: str, c: Tensor, delta: float) -> Tensor:
    if name == "cosine":
        return c
    if name == "square_cosine":
        return c * c.abs()
    if name == "power":
        return c.sign() * c.abs().pow(POWER)
    if name == "sigmoid":
        angle = capped_asin(c, delta)
        return torch.tanh(angle * (1 / (2 * K))) * (1 / math.tanh(math.pi / (4 * K)))
    k = c.new_tensor(K) if angulars[name].uses_k else None
    return angulars[name].value(c, k, POWER, delta)


def formula(case: Case) -> Function:
    """Return the operator as an expert writes it in PyTorch.

    1 / a is folded into the weight, the patch norm is a channel sum of squares and one sum pooling,
    everything that depends on the position only stays on the small map, and what cancels is left
    out: linear x cosine is a convolution with normalised filters. Norms, c, h and g are float32,
    the convolution and y have x's dtype.

    For channels_last the channels of every tensor are moved to the end ahead of the arithmetic, and
    back after it. A map of positions times numbers per filter says nothing about the layout of the
    result: PyTorch makes it contiguous, and a product with that map first, contiguous too. The norm
    comes ahead of the convolution: of two gradients of x, the one that is formed first, that of the
    last operation, has the layout of their sum.
    """
    layer, batch = case.layer, case.mode == BATCH
    magnitude, angular = case.operator
    channels = -1 if case.layout == "channels_last" else 1
    per_filter = (-1,) if case.layout == "channels_last" else (-1, 1, 1)

    def best(x: Tensor, weight: Tensor, radius: Tensor | None, norm_mean: Tensor | None) -> Tensor:
        wide = weight if weight.dtype == torch.float64 else weight.float()
        a = torch.sqrt(wide.square().sum(dim=(1, 2, 3), keepdim=True) + EPS)
        # b * c, since u / a = b c.
        folded = (wide / a).to(x.dtype)

        def project() -> Tensor:
            return F.conv2d(
                x, folded, None, layer.stride, layer.padding, layer.dilation, layer.groups
            )

        if magnitude == "linear" and angular == "cosine":
            return project() * ALPHA if ALPHA != 1.0 else project()
        b = torch.sqrt(_sums_of_squares(x, case) + EPS).movedim(1, channels)
        projection = project()
        mean = b.mean() if batch else norm_mean
        if layer.o > layer.groups > 1:
            b = b.repeat_interleave(layer.o // layer.groups, dim=channels)
        cosine = projection.movedim(1, channels).to(b.dtype) * (1.0 / b)
        rho = None
        if radius is not None:
            rho = radius.reshape(per_filter)
            rho = rho if mean is None else rho * mean
        g = _angular(angular, cosine, angle_delta(x))
        return (g * _magnitude(magnitude, b, rho)).to(x.dtype).movedim(channels, 1)

    return best


def _compiled(build: Callable[[Case], Function]) -> Callable[[Case], Function]:
    """Return the same function under torch.compile; its first call compiles.

    Forward without gradients and forward for training are two graphs of the same function.
    """

    def compiled(case: Case) -> Function:
        by_device: dict[str, Function] = {}

        def call(
            x: Tensor, weight: Tensor, radius: Tensor | None, norm_mean: Tensor | None
        ) -> Tensor:
            device = x.device.type
            if device not in by_device:
                by_device[device] = torch.compile(
                    build(case), dynamic=False, fullgraph=True, options=compile_options(device)
                )
            return by_device[device](x, weight, radius, norm_mean)

        return call

    return compiled


def compile_options(device: str) -> dict[str, str | int | bool | Callable[..., Any]] | None:
    """Return Inductor's options for a device.

    Inductor writes the CPU thread count into its code, but not into the key of its cache.
    """
    return {"cpp.threads": torch.get_num_threads()} if device == "cpu" else None


compiled_formula = _compiled(formula)


def bcos(case: Case) -> Function:
    """Return a B-cos layer: y = abs(c)^(B - 1) <w / ||w||, x> with B = 2.

    Written from the formula of Boehle et al., B-cos Networks, CVPR 2022, as its users write it: the
    norms of the patches by a sum pooling of squares, small constants against division by zero. It
    computes another operator than the row's, but for linear x square_cosine, from which it differs
    by eps only.
    """
    layer = case.layer

    def call(x: Tensor, weight: Tensor, radius: Tensor | None, norm_mean: Tensor | None) -> Tensor:
        norms = torch.sqrt(_sums_of_squares(x, case) + 1e-6).to(x.dtype)
        unit = weight / torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True)
        linear = F.conv2d(x, unit, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        if layer.o > layer.groups > 1:
            norms = norms.repeat_interleave(layer.o // layer.groups, dim=1)
        return linear * (linear.abs() / norms)

    return call


class Provider(NamedTuple):
    """One implementation.

    Attributes:
        name: typed after ``--providers``, and the key of its results.
        title: what it is, in a few words.
        build: makes the function of a case; compilation, if any, happens at its first call.
        gated: whether it computes the operator, so that its results are checked.
        compiles: whether its first call compiles; left out of quick runs.
        backend: of dcconv that it runs on, None for other implementations.
    """

    name: str
    title: str
    build: Callable[[Case], Function]
    gated: bool = True
    compiles: bool = False
    backend: str | None = None


CONV2D, EAGER, FORMULA, COMPILED_EAGER, COMPILED, BCOS = (
    "conv2d",
    "eager",
    "formula",
    "compiled-eager",
    "compiled",
    "bcos",
)
OURS = "dcconv-"


def strategies_of(backend: str) -> tuple[str, ...]:
    """Return the strategies that a backend chooses between; none where there is one alone."""
    found = tuple(rows[backend, FORWARD_DIRECTION])
    return found if len(found) > 1 else ()


def strategy_provider(backend: str, strategy: str) -> str:
    """Return the name of the provider that is one strategy of a backend."""
    return f"{OURS}{backend}-{strategy}"


#: Every implementation by its name; ours are named after their backends.
PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider(CONV2D, "F.conv2d", plain, gated=False),
        Provider(EAGER, "eager reference", ours("reference")),
        Provider(FORMULA, "best-written formula, eager", formula),
        Provider(
            COMPILED_EAGER,
            "reference under torch.compile",
            _compiled(ours("reference")),
            compiles=True,
        ),
        Provider(
            COMPILED,
            "best-written formula under torch.compile",
            compiled_formula,
            compiles=True,
        ),
        Provider(BCOS, "B-cos layer (another operator)", bcos, gated=False),
        *(
            Provider(OURS + name, f"dcconv, backend {name}", ours(name), backend=name)
            for name in backends.names
            if name != "reference"
        ),
        *(
            Provider(
                strategy_provider(backend, strategy),
                f"dcconv, backend {backend}, strategy {strategy}",
                ours(backend, strategy),
                backend=backend,
            )
            for backend in backends.names
            for strategy in strategies_of(backend)
        ),
    )
}

BASELINES = tuple(name for name in PROVIDERS if not name.startswith(OURS))


def run(function: Function, inputs: Inputs, which: str) -> dict[str, Tensor]:
    """Run one pass and return y, and the gradients where the pass has a backward.

    Gradients are those of sum(y * cotangent); an input the function does not use has none.
    """
    if which == FORWARD:
        with torch.no_grad():
            return {"y": forward(function, inputs)}
    y = forward(function, inputs)
    return {"y": y.detach()} | backward(y, inputs)


def forward(function: Function, inputs: Inputs) -> Tensor:
    """Call a function with the tensors of a case."""
    return function(inputs.x, inputs.weight, inputs.radius, inputs.norm_mean)


def backward(y: Tensor, inputs: Inputs) -> dict[str, Tensor]:
    """Return the gradients of sum(y * cotangent); an input that was not used has none."""
    leaves = inputs.leaves
    grads = torch.autograd.grad(y, list(leaves.values()), inputs.cotangent, allow_unused=True)
    return {f"grad_{name}": t for name, t in zip(leaves, grads, strict=True) if t is not None}
