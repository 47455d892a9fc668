"""Who is measured: one record per implementation, and the formula written as well as it can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import BATCH, BOTH, Case, Inputs
from dcconv.functional import decoupled_conv2d
from dcconv.numerics import EPS

#: x, weight, radius, norm_mean -> y.
Function = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None"], Tensor]


def plain(case: Case) -> Function:
    """Return F.conv2d, the floor."""

    def conv2d(
        x: Tensor, weight: Tensor, radius: Tensor | None, norm_mean: Tensor | None
    ) -> Tensor:
        return F.conv2d(x, weight, stride=case.layer.stride, padding=case.layer.padding)

    return conv2d


def ours(backend: str) -> Callable[[Case], Function]:
    """Return dcconv on one of its backends."""

    def build(case: Case) -> Function:
        def call(
            x: Tensor, weight: Tensor, radius: Tensor | None, norm_mean: Tensor | None
        ) -> Tensor:
            return decoupled_conv2d(
                x,
                weight,
                stride=case.layer.stride,
                padding=case.layer.padding,
                magnitude=case.operator.magnitude,
                angular=case.operator.angular,
                radius=1.0 if radius is None else radius,
                norm_mean="batch" if case.mode == BATCH else norm_mean,
                backend=backend,
            )

        return call

    return build


def formula(case: Case) -> Function:
    """Return the operator as an expert writes it in PyTorch.

    1 / a is folded into the weight, the patch norm is a channel sum of squares and one sum pooling,
    everything that depends on the position only stays on the one-channel map, and what cancels is
    left out: linear x cosine is a convolution with normalised filters. Norms, c, h and g are
    float32, the convolution and y have x's dtype.
    """
    layer, batch = case.layer, case.mode == BATCH
    magnitude, angular = case.operator.magnitude, case.operator.angular

    def best(x: Tensor, weight: Tensor, radius: Tensor | None, norm_mean: Tensor | None) -> Tensor:
        wide = weight.float()
        a = torch.sqrt(wide.square().sum(dim=(1, 2, 3), keepdim=True) + EPS)
        # b * c, since u / a = b c.
        folded = (wide / a).to(x.dtype)
        projection = F.conv2d(x, folded, stride=layer.stride, padding=layer.padding)
        if magnitude == "linear" and angular == "cosine":
            return projection
        squares = x.float().square().sum(dim=1, keepdim=True)
        if layer.k > 1:
            squares = F.avg_pool2d(
                squares, layer.k, layer.stride, layer.padding, divisor_override=1
            )
        elif layer.stride > 1:
            squares = squares[:, :, :: layer.stride, :: layer.stride]
        b = torch.sqrt(squares + EPS)
        cosine = projection.float() * (1.0 / b)
        assert radius is not None
        rho = radius.reshape(1, -1, 1, 1)
        if batch:
            rho = rho * b.mean()
        elif norm_mean is not None:
            rho = rho * norm_mean
        ratio = b * (1.0 / rho)
        h = torch.tanh(ratio) if magnitude == "tanh" else ratio.clamp(max=1.0)
        g = cosine if angular == "cosine" else cosine * cosine.abs()
        return (h * g).to(x.dtype)

    return best


def compiled_formula(case: Case) -> Function:
    """Return the best-written formula under torch.compile; the first call compiles.

    Forward without gradients and forward for training are two graphs of the same function.
    """
    # Inductor writes the thread count into its code but not into the key of its cache.
    options: dict[str, str | int | bool | Callable[..., Any]] = {
        "cpp.threads": torch.get_num_threads()
    }
    function: Function = torch.compile(
        formula(case), dynamic=False, fullgraph=True, options=options
    )
    return function


class Provider(NamedTuple):
    """One implementation.

    Attributes:
        name: typed after ``--providers``, and the key of its results.
        title: what it is, in a few words.
        build: makes the function of a case; compilation, if any, happens at its first call.
        gated: whether it computes the operator, so that its results are checked.
        default: measured unless ``--providers`` says otherwise.
        quick: measured by ``--quick`` unless ``--providers`` says otherwise.
    """

    name: str
    title: str
    build: Callable[[Case], Function]
    gated: bool = True
    default: bool = True
    quick: bool = True


CONV2D, EAGER, COMPILED, DCCONV = "conv2d", "eager", "compiled", "dcconv"

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider(CONV2D, "F.conv2d", plain, gated=False),
        Provider(EAGER, "eager reference", ours("reference")),
        Provider("formula", "best-written formula, eager", formula, default=False, quick=False),
        Provider(
            COMPILED, "best-written formula under torch.compile", compiled_formula, quick=False
        ),
        Provider(DCCONV, "dcconv", ours("cpu")),
    )
}


def run(function: Function, inputs: Inputs, which: str) -> dict[str, Tensor]:
    """Run one pass and return y, and the gradients where the pass has a backward.

    Gradients are those of sum(y * cotangent); an input the function does not use has none.
    """
    arguments = (inputs.x, inputs.weight, inputs.radius, inputs.norm_mean)
    if which != BOTH:
        with torch.no_grad():
            return {"y": function(*arguments)}
    y = function(*arguments)
    leaves = inputs.leaves
    grads = torch.autograd.grad(y, list(leaves.values()), inputs.cotangent, allow_unused=True)
    found = {f"grad_{name}": t for name, t in zip(leaves, grads, strict=True) if t is not None}
    return {"y": y.detach(), **found}
