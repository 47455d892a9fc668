"""Every message of the checks, word for word, with its class; and none that is not listed here."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

import dcconv
from dcconv import DecoupledConv2d, backends, native, tracing, warn
from dcconv.call import refusals
from dcconv.functional import decoupled_conv2d, patch_norm
from dcconv.operator import functions
from dcconv.operator.functions import angulars, magnitudes
from dcconv.operator.records import Window
from dcconv.passes import guards, ops
from dcconv.passes.records import DepthwiseGradWeight

PACKAGE = Path(dcconv.__file__).parent


class Refusal(NamedTuple):
    """A wrong call and the sentence it must raise, without the leading "dcconv: "."""

    call: Callable[[], object]
    kind: type[Exception]
    message: str


X = torch.zeros(1, 4, 5, 6)
WEIGHT = torch.zeros(6, 4, 3, 3)
META = torch.device("meta")


def conv(**changes: Any) -> Callable[[], object]:
    return lambda: decoupled_conv2d(**{"x": X, "weight": WEIGHT, **changes})


def layer(*sizes: Any, **changes: Any) -> Callable[[], object]:
    return lambda: DecoupledConv2d(*(sizes or (4, 6, 3)), **changes)


def norm(x: Any = X, kernel_size: Any = 3, **changes: Any) -> Callable[[], object]:
    return lambda: patch_norm(x, kernel_size, **changes)


MAGNITUDES = ", ".join(magnitudes)
ANGULARS = ", ".join(angulars)
WEIGHTINGS = "none, linear, product, separate"
MODES = "zeros, reflect, replicate, circular"
BACKENDS = "auto, cuda, triton, cpu, reference"
PARAMETER = "be a number above 0 or a floating tensor of shape [] or [6]"
NORM_MEAN = "be None, 'batch' or a floating tensor of shape []"
POSITIVE = "be a finite number above 0"
NOT_NEGATIVE = "be a finite number of at least 0"
CLASSES = {"v": ValueError, "t": TypeError}


def refusal(
    call: Callable[[], object], kind: str, argument: str, rule: str, got: object
) -> Refusal:
    return Refusal(call, CLASSES[kind], f"{argument} must {rule}, got {got}")


NAMES = [
    refusal(make(**{argument: value}), kind, argument, f"be one of {known}", got)
    for argument, known, makers in (
        ("magnitude", MAGNITUDES, (conv, layer)),
        ("angular", ANGULARS, (conv, layer)),
        ("weighting", WEIGHTINGS, (conv, layer)),
        ("padding_mode", MODES, (conv, layer, norm)),
        ("padding", "same, valid", (conv, layer, norm)),
        ("keep", "auto, output, dot", (conv, layer)),
        ("backend", BACKENDS, (conv, layer, norm)),
        ("radius_unit", "mean_norm, absolute", (layer,)),
        ("norm_init", "first, zero", (layer,)),
    )
    for make in makers
    for kind, value, got in (("v", "tahn", "'tahn'"), ("t", b"tanh", "bytes"))
    # padding also takes integers, with a message of its own for other types.
    if not (argument == "padding" and kind == "t")
]

NUMBERS = [
    refusal(make(**{argument: value}), kind, argument, rule, got)
    for argument, rule, makers, low in (
        ("alpha", POSITIVE, (conv, layer), 0.0),
        ("beta", NOT_NEGATIVE, (conv, layer), -0.5),
        ("power", "be a finite number of at least 1", (conv, layer), 0.5),
        ("eps", POSITIVE, (conv, layer, norm), 0.0),
        ("radius", POSITIVE, (layer,), 0.0),
        ("k", POSITIVE, (layer,), -1.0),
        ("norm_momentum", "be in (0, 1]", (layer,), 0.0),
    )
    for make in makers
    for kind, value, got in (
        ("v", low, low),
        ("v", float("nan"), "nan"),
        ("v", float("inf"), "inf"),
        ("t", "1", "str"),
        ("t", True, "bool"),
        ("t", None, "NoneType"),
        ("t", torch.ones(()), "Tensor"),
    )
]

GEOMETRY = [
    refusal(make(**{argument: value}), kind, argument, rule, got)
    for argument, low in (("stride", 1), ("padding", 0), ("dilation", 1))
    for make in (conv, layer, norm)
    for kind, value, rule, got in (
        ("v", low - 1, f"be an integer of at least {low}", low - 1),
        ("v", (1, low - 1), f"be an integer of at least {low}", low - 1),
        ("v", (1, 1, 1), "be an integer or a pair of integers", "(1, 1, 1)"),
        ("t", 1.0, f"be an integer of at least {low}", "float"),
        ("t", (1, 2.0), f"be an integer of at least {low}", "float"),
        ("v", (), "be an integer or a pair of integers", "()"),
        ("t", ((1, 1),), f"be an integer of at least {low}", "tuple"),
        ("t", b"12", f"be an integer of at least {low}", "bytes"),
        ("v", 2**31, "be an integer of at most 2147483647", 2**31),
        ("v", (1, 2**70), "be an integer of at most 2147483647", 2**70),
        ("v", np.int64(low - 1), f"be an integer of at least {low}", low - 1),
        ("t", True, f"be an integer of at least {low}", "bool"),
        ("t", np.True_, f"be an integer of at least {low}", type(np.True_).__name__),
        ("t", np.float32(2), f"be an integer of at least {low}", "float32"),
        ("t", np.array([2, 2]), f"be an integer of at least {low}", "ndarray"),
        ("t", torch.tensor(2), f"be an integer of at least {low}", "Tensor"),
        ("t", None, f"be an integer of at least {low}", "NoneType"),
        ("v", 2**31, "be an integer of at most 2147483647", 2**31),
        ("v", (1, 2**62), "be an integer of at most 2147483647", 2**62),
        ("v", 2**70, "be an integer of at most 2147483647", 2**70),
    )
]

MOST = "be an integer of at most 2147483647"
LAYER_SIZES = {"in_channels": 4, "out_channels": 6, "kernel_size": 3}

ABSURD = [
    *(refusal(make(groups=2**70), "v", "groups", MOST, 2**70) for make in (conv, layer, norm)),
    *(
        refusal(partial(DecoupledConv2d, **(LAYER_SIZES | {name: 2**63})), "v", name, MOST, 2**63)
        for name in LAYER_SIZES
    ),
    refusal(norm(kernel_size=2**64), "v", "kernel_size", MOST, 2**64),
    refusal(
        conv(padding="same", dilation=2**31 - 1, weight=torch.zeros(6, 4, 5, 5)),
        "v",
        "padding",
        "be at most 2147483647 pixels for 'same'",
        2**32 - 2,
    ),
    refusal(conv(alpha=10**400), "v", "alpha", POSITIVE, 10**400),
    refusal(conv(radius=10**400), "v", "radius", PARAMETER, 10**400),
]

FLAGS = [
    refusal(layer(**{name: value}), "t", name, "be a bool", got)
    for name in ("bias", "learn_radius", "norm_mean_grad", "sync_norm", "learn_k")
    for value, got in ((1, "int"), (None, "NoneType"))
]


def nested(value: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls them a prototype.
        return torch.nested.nested_tensor([value, value])


INPUTS = [
    refusal(make(x=value), kind, "x", rule, got)
    for make in (conv, norm)
    for kind, value, rule, got in (
        ("t", [[1.0]], "be a tensor", "list"),
        ("v", torch.zeros(5, 6), "have shape [n, c, h, w] or [c, h, w]", "[5, 6]"),
        ("v", torch.zeros(1, 1, 4, 5, 6), "have shape [n, c, h, w] or [c, h, w]", [1, 1, 4, 5, 6]),
        ("t", X.int(), "have dtype float16, bfloat16, float32 or float64", "torch.int32"),
        ("t", X.cfloat(), "have dtype float16, bfloat16, float32 or float64", "torch.complex64"),
        ("t", X.to_sparse(), "be a strided tensor", "torch.sparse_coo"),
        ("t", X.to_mkldnn(), "be a strided tensor", "torch._mkldnn"),
        ("t", nested(X), "be a strided tensor", "a nested one"),
    )
]

# The other tensors, in every layout that is not one array.
LAYOUTS = [
    refusal(conv(**{name: change(value)}), "t", name, "be a strided tensor", got)
    for name, value in (
        ("weight", WEIGHT),
        ("bias", torch.ones(6)),
        ("radius", torch.ones(6)),
        ("k", torch.ones(6)),
    )
    for change, got in (
        (torch.Tensor.to_sparse, "torch.sparse_coo"),
        (torch.Tensor.to_mkldnn, "torch._mkldnn"),
        (nested, "a nested one"),
    )
]

TENSORS = [
    refusal(conv(weight=[1.0]), "t", "weight", "be a tensor", "list"),
    refusal(conv(weight=WEIGHT[0]), "v", "weight", "have shape [o, c / groups, r, s]", [4, 3, 3]),
    refusal(
        conv(weight=WEIGHT.double()), "t", "weight", "have x's dtype torch.float32", "torch.float64"
    ),
    refusal(conv(weight=WEIGHT.to(META)), "v", "weight", "be on x's device cpu", "meta"),
    refusal(conv(weight=WEIGHT[:, :3]), "v", "weight.size(1)", "be in_channels / groups = 4", 3),
    refusal(conv(weight=WEIGHT, groups=2), "v", "weight.size(1)", "be in_channels / groups = 2", 4),
    refusal(
        conv(weight=WEIGHT[:, :, :0]),
        "v",
        "weight",
        "have at least one row and column",
        [6, 4, 0, 3],
    ),
    refusal(conv(bias=1.0), "t", "bias", "be a tensor or None", "float"),
    refusal(conv(bias=torch.zeros(5)), "v", "bias", "have shape [6]", "[5]"),
    refusal(conv(bias=torch.zeros(6, 1)), "v", "bias", "have shape [6]", "[6, 1]"),
    refusal(
        conv(bias=torch.zeros(6).half()),
        "t",
        "bias",
        "have x's dtype torch.float32",
        "torch.float16",
    ),
    refusal(conv(bias=torch.zeros(6, device=META)), "v", "bias", "be on x's device cpu", "meta"),
    *(
        refusal(conv(**{name: value}), kind, name, rule, got)
        for name in ("radius", "k")
        for kind, value, rule, got in (
            ("v", 0.0, PARAMETER, 0.0),
            ("v", -1, PARAMETER, -1),
            ("v", float("inf"), PARAMETER, "inf"),
            ("t", "1", PARAMETER, "str"),
            ("t", True, PARAMETER, "bool"),
            ("t", None, PARAMETER, "NoneType"),
            ("t", torch.ones(6, dtype=torch.int64), PARAMETER, "torch.int64"),
            ("v", torch.ones(4), PARAMETER, "shape [4]"),
            ("v", torch.ones(6, 1), PARAMETER, "shape [6, 1]"),
            ("v", torch.ones(6, device=META), "be on x's device cpu", "meta"),
        )
    ),
    refusal(conv(norm_mean="mean"), "v", "norm_mean", NORM_MEAN, "'mean'"),
    refusal(conv(norm_mean=1.0), "t", "norm_mean", NORM_MEAN, "float"),
    refusal(conv(norm_mean=torch.tensor(1)), "t", "norm_mean", NORM_MEAN, "torch.int64"),
    refusal(conv(norm_mean=torch.ones(1)), "v", "norm_mean", NORM_MEAN, "shape [1]"),
    refusal(
        conv(norm_mean=torch.ones((), device=META)),
        "v",
        "norm_mean",
        "be on x's device cpu",
        "meta",
    ),
]


def fit(extent: int) -> str:
    return f"be at least as large as the dilated kernel [{extent}, {extent}] after padding"


GROUPS = [
    *(
        refusal(make(groups=value), kind, "groups", rule, got)
        for make in (conv, layer, norm)
        for kind, value, rule, got in (
            ("v", 0, "be an integer of at least 1", 0),
            ("t", 2.0, "be an integer of at least 1", "float"),
            ("t", "2", "be an integer of at least 1", "str"),
            ("t", True, "be an integer of at least 1", "bool"),
            ("t", torch.tensor(2), "be an integer of at least 1", "Tensor"),
        )
    ),
    refusal(conv(groups=3), "v", "groups", "divide the 4 channels of x", 3),
    refusal(conv(groups=4), "v", "groups", "divide the 6 filters of weight", 4),
    refusal(conv(weight=WEIGHT[:0]), "v", "weight", "have at least one filter", [0, 4, 3, 3]),
    refusal(conv(x=X[:, :0]), "v", "x", "have at least one channel", [1, 0, 5, 6]),
    refusal(norm(groups=3), "v", "groups", "divide the 4 channels of x", 3),
    refusal(norm(X[:, :0]), "v", "x", "have at least one channel", [1, 0, 5, 6]),
    refusal(layer(groups=3), "v", "groups", "divide in_channels 4", 3),
    refusal(layer(groups=4), "v", "groups", "divide out_channels 6", 4),
]

SIZES = [
    refusal(
        conv(x=X.permute(0, 2, 3, 1)),
        "v",
        "x",
        "have its 4 channels before rows and columns, as x.permute(0, 3, 1, 2) has them",
        [1, 5, 6, 4],
    ),
    refusal(
        conv(x=X[0].permute(1, 2, 0), groups=2, weight=WEIGHT[:, :2]),
        "v",
        "x",
        "have its 4 channels before rows and columns, as x.permute(2, 0, 1) has them",
        [5, 6, 4],
    ),
    *(
        refusal(
            make(padding=2**31 - 1),
            "v",
            "padding",
            "leave at most 1099511627776 pixels",
            [2**32 - 1 + 2, 2**32 - 1 + 3],
        )
        for make in (conv, norm)
    ),
    refusal(layer(2**31, 6, 3), "v", "in_channels", "be an integer of at most 2147483647", 2**31),
    refusal(conv(x=X[:, :, :2]), "v", "x", fit(3), "[2, 6]"),
    refusal(conv(dilation=3), "v", "x", fit(7), "[5, 6]"),
    refusal(conv(x=X[..., :0], padding=(0, 1)), "v", "x", fit(3), "[5, 2]"),
    refusal(
        conv(x=X[:, :, :0], padding="same"),
        "v",
        "x",
        "have a height and width of at least 1",
        "[0, 6]",
    ),
    refusal(norm(X, 9), "v", "x", fit(9), "[5, 6]"),
    refusal(
        norm(X[:, :, :0], 3, padding=2),
        "v",
        "x",
        "have a height and width of at least 1",
        "[0, 6]",
    ),
    refusal(
        conv(x=X[..., :0], padding=2), "v", "x", "have a height and width of at least 1", "[5, 0]"
    ),
    refusal(
        conv(padding=5, padding_mode="reflect"),
        "v",
        "padding",
        "be below the height 5 for 'reflect'",
        5,
    ),
    refusal(
        conv(padding=(0, 6), padding_mode="reflect"),
        "v",
        "padding",
        "be below the width 6 for 'reflect'",
        6,
    ),
    refusal(
        conv(padding=6, padding_mode="circular"),
        "v",
        "padding",
        "be at most the height 5 for 'circular'",
        6,
    ),
    refusal(
        conv(padding=(0, 7), padding_mode="circular"),
        "v",
        "padding",
        "be at most the width 6 for 'circular'",
        7,
    ),
    refusal(
        conv(x=X[:, :, :0], padding=2, padding_mode="replicate"),
        "v",
        "x",
        "have a height of at least 1 for 'replicate'",
        0,
    ),
    refusal(
        conv(x=X[..., :0], padding=2, padding_mode="replicate"),
        "v",
        "x",
        "have a width of at least 1 for 'replicate'",
        0,
    ),
    *(
        refusal(make, kind, name, rule, got)
        for make, kind, name, rule, got in (
            (layer(0, 6, 3), "v", "in_channels", "be an integer of at least 1", 0),
            (layer(4, -1, 3), "v", "out_channels", "be an integer of at least 1", -1),
            (layer(4.0, 6, 3), "t", "in_channels", "be an integer of at least 1", "float"),
            (layer(4, 6, 0), "v", "kernel_size", "be an integer of at least 1", 0),
            (layer(4, 6, "3"), "t", "kernel_size", "be an integer of at least 1", "str"),
            (
                layer(4, 6, (3, 3, 3)),
                "v",
                "kernel_size",
                "be an integer or a pair of integers",
                "(3, 3, 3)",
            ),
            (norm(X, (3, 0)), "v", "kernel_size", "be an integer of at least 1", 0),
        )
    ),
]

COMBINATIONS = [
    *(
        refusal(
            make(magnitude=magnitude, weighting=weighting),
            "v",
            "magnitude",
            f"be 'tanh' for weighting '{weighting}'",
            f"'{magnitude}'",
        )
        for make in (conv, layer)
        for weighting in ("product", "separate")
        for magnitude in ("sphere", "ball", "linear", "segmented", "log", "mix")
    ),
    *(
        refusal(
            conv(keep="output", **options),
            "v",
            "keep",
            f"be 'auto' or 'dot' here ({reason})",
            "'output'",
        )
        for options, reason in (
            ({"bias": torch.zeros(6)}, "a bias is added after the operator, so y / h is not g"),
            ({"angular": "sigmoid"}, "angular 'sigmoid' is not recovered from y at full accuracy"),
            ({"angular": "power"}, "angular 'power' is not recovered from y at full accuracy"),
            (
                {"x": X.half(), "weight": WEIGHT.half(), "angular": "square_cosine"},
                "the small values of 'square_cosine' are subnormal in float16",
            ),
        )
    ),
    refusal(
        layer(k=0.04, angular="sigmoid", learn_k=True),
        "v",
        "k",
        "be at least 0.05 with learn_k=True",
        0.04,
    ),
    refusal(layer(norm_momentum=1.5), "v", "norm_momentum", "be in (0, 1]", 1.5),
    refusal(
        layer(dtype=torch.int32),
        "t",
        "dtype",
        "be float16, bfloat16, float32 or float64",
        "torch.int32",
    ),
]

SGD = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
PLAIN = nn.Linear(2, 2)
OWN = DecoupledConv2d(3, 4, 3)
MODELS: dict[str, Callable[[Any], object]] = {
    "project_weights": dcconv.project_weights,
    "register_projection": lambda model: dcconv.register_projection(SGD, model),
    "orthogonality_penalty": dcconv.orthogonality_penalty,
    "register_weighted_gradients": dcconv.register_weighted_gradients,
}


def on_model(function: Callable[..., object], *arguments: object) -> Callable[[], object]:
    return lambda: function(*arguments)


UTILITIES = [
    *(
        refusal(on_model(f, PLAIN), "v", "model", "have a DecoupledConv2d layer", "Linear")
        for f in MODELS.values()
    ),
    *(
        refusal(on_model(f, [OWN]), "t", "model", "be an nn.Module", "list")
        for f in MODELS.values()
    ),
    refusal(
        on_model(dcconv.register_projection, SGD, OWN, 0),
        "v",
        "every",
        "be an integer of at least 1",
        0,
    ),
    refusal(
        on_model(dcconv.register_projection, SGD, OWN, 1.5),
        "t",
        "every",
        "be an integer of at least 1",
        "float",
    ),
    refusal(
        on_model(dcconv.orthogonality_penalty, OWN, -1e-5), "v", "coefficient", NOT_NEGATIVE, -1e-5
    ),
    refusal(
        on_model(dcconv.orthogonality_penalty, OWN, "1"), "t", "coefficient", NOT_NEGATIVE, "str"
    ),
    refusal(on_model(dcconv.register_weighted_gradients, OWN, 0.0), "v", "scale", POSITIVE, 0.0),
    refusal(
        on_model(dcconv.register_weighted_gradients, OWN, None), "t", "scale", POSITIVE, "NoneType"
    ),
]


def inside(name: Any) -> Callable[[], object]:
    def call() -> None:
        with dcconv.use_backend(name):
            raise AssertionError("the name was accepted")

    return call


CHOICES = [
    refusal(inside("metal"), "v", "backend", f"be one of {BACKENDS}", "'metal'"),
    refusal(inside(None), "t", "backend", f"be one of {BACKENDS}", "NoneType"),
    *(
        Refusal(
            make(backend=name),
            NotImplementedError,
            f"backend '{name}' cannot run this call: it runs on CUDA tensors, got a cpu tensor",
        )
        for name in ("cuda", "triton")
        for make in (conv, norm)
    ),
    Refusal(
        conv(x=X.to(META), weight=WEIGHT.to(META), backend="cpu"),
        NotImplementedError,
        "backend 'cpu' cannot run this call: it runs on CPU tensors, got a meta tensor",
    ),
]


class DTensor(torch.Tensor):
    """Stands in for ``torch.distributed.tensor.DTensor``, which needs a process group."""


class Wrapper:
    """An optimiser's wrapper as other libraries have them."""

    def __init__(self, optimizer: object) -> None:
        self.optimizer = optimizer


def part_of_flat(*shape: int) -> DecoupledConv2d:
    """Return a layer as FullyShardedDataParallel leaves it without its wrapper."""
    result = DecoupledConv2d(3, 4, 3)
    result.weight = nn.Parameter(torch.zeros(shape))
    result.weight._fsdp_flattened = True  # type: ignore[attr-defined]
    return result


def shard_of_weight() -> DecoupledConv2d:
    result = DecoupledConv2d(3, 4, 3)
    result.weight = nn.Parameter(torch.zeros(0))
    return result


DISTRIBUTED = [
    *(
        refusal(
            make,
            "t",
            name,
            "be a plain tensor, as fully_shard's forward has it (a DTensor has to_local())",
            "a DTensor",
        )
        for name, make in {
            "x": conv(x=X.as_subclass(DTensor)),
            "weight": conv(weight=WEIGHT.as_subclass(DTensor)),
            "bias": conv(bias=torch.zeros(6).as_subclass(DTensor)),
            "radius": conv(radius=torch.ones(6).as_subclass(DTensor)),
            "k": conv(k=torch.ones(()).as_subclass(DTensor)),
            "norm_mean": conv(norm_mean=torch.ones(()).as_subclass(DTensor)),
        }.items()
    ),
    *(
        refusal(
            on_model(dcconv.project_weights, module),
            "v",
            "model",
            "have its whole weight: pass the FullyShardedDataParallel module that holds it",
            "DecoupledConv2d",
        )
        for module in (part_of_flat(4, 3, 3, 3), part_of_flat(7), shard_of_weight())
    ),
    *(
        refusal(
            on_model(dcconv.orthogonality_penalty, module),
            "v",
            "model",
            "have its whole weight and pass its gradient on: take the penalty inside the forward "
            "of the FullyShardedDataParallel module, in a unit that holds the layer directly, or "
            "use fully_shard",
            "DecoupledConv2d",
        )
        for module in (part_of_flat(4, 3, 3, 3), part_of_flat(7), shard_of_weight())
    ),
    refusal(
        on_model(dcconv.project_weights, nn.utils.parametrizations.weight_norm(layer()())),
        "v",
        "model",
        "own its weight: remove weight norm, spectral norm, pruning or the like first",
        "ParametrizedDecoupledConv2d",
    ),
    refusal(
        on_model(dcconv.register_projection, Wrapper(None), OWN),
        "t",
        "optimizer",
        "be a torch.optim.Optimizer that was initialised, or wrap one as its attribute optimizer",
        "Wrapper",
    ),
    refusal(
        on_model(dcconv.register_projection, Wrapper(SGD), OWN),
        "v",
        "optimizer",
        "wrap an optimiser of the model's own parameters",
        "Wrapper",
    ),
]

PLAIN_LAYER = nn.Conv2d(3, 4, 1)

# What a caller could have meant: every keyword of the module that is not nn.Conv2d's.
OPERATOR_KEYWORDS = ", ".join(
    name
    for name, parameter in inspect.signature(dcconv.DecoupledConv2d).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
)


def wrapped_for_ranks() -> nn.Module:
    """Return a wrapper of distributed training without any process group."""
    wrapper = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapper)
    return wrapper


def converting(*arguments: Any, **keywords: Any) -> Callable[[], object]:
    return lambda: dcconv.convert(*arguments, **keywords)


def with_attribute(name: str, value: object) -> nn.Module:
    conv = nn.Conv2d(3, 4, 1)
    conv.__dict__[name] = value
    return conv


def calibrating(model: Any, batches: Any) -> Callable[[], object]:
    return lambda: dcconv.calibrate(model, batches)


class Idle(nn.Module):
    """A module whose layer never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = DecoupledConv2d(4, 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


CALIBRATIONS = [
    refusal(calibrating(3, [X]), "t", "model", "be an nn.Module", "int"),
    refusal(
        calibrating(PLAIN, [X]),
        "v",
        "model",
        "have a layer with moving averages (norm_mean, or batch normalisation's)",
        "Linear",
    ),
    refusal(
        calibrating(nn.LazyBatchNorm2d(), [X]),
        "v",
        "model",
        "have its shapes: run it once first",
        "''",
    ),
    refusal(calibrating(Idle(), X), "t", "batches", "be an iterable of batches", "Tensor"),
    refusal(calibrating(Idle(), []), "v", "batches", "hold at least one batch of images", "none"),
    refusal(
        calibrating(Idle(), [3]),
        "t",
        "batches",
        "hold tensors, or tuples or lists that begin with one",
        "int",
    ),
    refusal(calibrating(Idle(), [X[:0]]), "v", "batches", "hold images", "shape [0, 4, 5, 6]"),
    refusal(calibrating(Idle(), [X]), "v", "batches", "reach a layer with moving averages", "none"),
    refusal(
        calibrating(DecoupledConv2d(4, 6, 3), [X + float("inf")]),
        "v",
        "batches",
        "give layer '' finite statistics",
        "a norm_mean that is not",
    ),
]

CONVERSIONS = [
    refusal(converting(3), "t", "module", "be an nn.Module", "int"),
    refusal(
        converting(PLAIN_LAYER, select="a"),
        "t",
        "select",
        "be a function of a name and a layer",
        "str",
    ),
    refusal(
        converting(PLAIN_LAYER, stride=2),
        "t",
        "keyword arguments",
        f"be among {OPERATOR_KEYWORDS}",
        "'stride'",
    ),
    refusal(
        converting(wrapped_for_ranks()),
        "v",
        "module",
        "be converted before it is wrapped for distributed training",
        "DistributedDataParallel",
    ),
    refusal(converting(nn.Linear(2, 2)), "v", "module", "have an nn.Conv2d layer", "Linear"),
    refusal(
        converting(nn.Sequential(nn.Conv1d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1))),
        "v",
        "module",
        "have an nn.Conv2d layer",
        "Sequential with layers of other classes alone: '0' (Conv1d), '1' (ConvTranspose2d)",
    ),
    refusal(
        converting(PLAIN_LAYER, heads="leave"),
        "v",
        "heads",
        "be one of warn, plain, convert",
        "'leave'",
    ),
    refusal(
        converting(nn.Sequential(PLAIN_LAYER), heads="plain"),
        "v",
        "heads",
        "be 'warn' or 'convert' where every chosen layer is a last layer, gate or head",
        "'plain'",
    ),
    refusal(
        converting(with_attribute("norm_mean", 1.0)),
        "v",
        "module",
        "have no attribute 'norm_mean', a name that DecoupledConv2d needs",
        "Conv2d",
    ),
    refusal(
        converting(with_attribute("forward", nn.Identity())),
        "v",
        "module",
        "have its class's own methods: remove what replaces forward() first",
        "Conv2d",
    ),
    refusal(
        converting(PLAIN_LAYER, select=lambda name, layer: False),
        "v",
        "select",
        "choose one of the module's 1 nn.Conv2d layers or more",
        "none",
    ),
    refusal(
        converting(nn.Sequential(nn.LazyConv2d(4, 3))),
        "v",
        "layer '0'",
        "have its shape: run the network once first",
        "LazyConv2d",
    ),
]

DOES_NOT_SCALE = (
    "the output does not scale with the weight, so batch normalisation cannot be folded into it"
)


def set_bias(bias: bool) -> None:
    """Set weight and bias anew, as folding does."""
    own = DecoupledConv2d(3, 4, 3, bias=bias)
    own.weight = nn.Parameter(own.weight.detach() * torch.tensor(2.0))
    own.bias = nn.Parameter(torch.ones(4))


def fuse_block() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def fuse(self) -> None:
            raise AssertionError("the method was called")

    block = Block()
    dcconv.convert(nn.Sequential(block))
    block.fuse()


LAYERS = [
    refusal(
        lambda: DecoupledConv2d(3, 4, 3).type(torch.complex64),
        "t",
        "dtype",
        "be float16, bfloat16, float32 or float64",
        "torch.complex64",
    ),
    refusal(
        lambda: set_bias(False),
        "v",
        "bias",
        f"be asked for by bias=True when the layer is built ({DOES_NOT_SCALE})",
        "Parameter",
    ),
    refusal(
        lambda: set_bias(True),
        "v",
        "bias",
        f"stay after filters were rescaled ({DOES_NOT_SCALE})",
        "another one",
    ),
    refusal(
        fuse_block,
        "v",
        "module",
        f"have no decoupled layer for fuse() to fold batch normalisation into ({DOES_NOT_SCALE})",
        "Block with 'conv'",
    ),
    Refusal(
        lambda: torch.func.vmap(DecoupledConv2d(4, 6, 3))(X[None]),
        NotImplementedError,
        "norm_mean must be updated outside of torch.func's transforms: put the call into "
        "dcconv.norm_updates(False), or the layer into evaluation mode, got a layer in training "
        "mode inside one",
    ),
]


def registering(register: Callable[..., Any], name: str) -> Callable[[], object]:
    def function(*arguments: object) -> torch.Tensor:
        return X

    function.__name__ = name
    return lambda: register("x")(function)


REGISTERED = [
    # The kernels would go on computing the function that had the name before.
    refusal(registering(functions.magnitude, "tanh"), "v", "magnitude", "be a new name", "'tanh'"),
    refusal(registering(functions.angular, "power"), "v", "angular", "be a new name", "'power'"),
]

# What ops that are written in Python, and the fakes of all, require of sizes.
ROWS = {"sums": 1, "rows": 0, "filters": 4}
WINDOWS = {"sizes": [1, 4, 5, 6], "filters": 6, "kernel_size": [3, 3]}


def windows(**changes: Any) -> Any:
    """Ask for the rows and columns of windows, some of the arguments changed."""
    own = {name: value for name, value in changes.items() if name in Window._fields}
    others = {name: value for name, value in changes.items() if name not in own}
    return guards.windows(**(WINDOWS | others), window=Window(**own))


BATCH_NORMS = [
    Refusal(
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(dcconv.BatchNormAct2d(4))),
        NotImplementedError,
        "BatchNormAct2d must stay what it is: nn.SyncBatchNorm has no ReLU, "
        "got convert_sync_batchnorm",
    ),
    Refusal(
        lambda: dcconv.BatchNormAct2d(4, groups=3),
        ValueError,
        "groups must divide num_features 4, got 3",
    ),
    Refusal(
        lambda: dcconv.BatchNormAct2d(4, momentum=1.5),
        ValueError,
        "momentum must be None or a number from 0 to 1, got 1.5",
    ),
    Refusal(
        lambda: dcconv.BatchNormAct2d(4, dtype=torch.int64),
        TypeError,
        "dtype must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    Refusal(lambda: dcconv.BatchNormAct2d(4)(3), TypeError, "x must be a tensor, got int"),
    Refusal(
        lambda: dcconv.BatchNormAct2d(4)(X[0]),
        ValueError,
        "x must have shape [n, 4, h, w], got [4, 5, 6]",
    ),
    Refusal(
        lambda: dcconv.BatchNormAct2d(4)(X.long()),
        TypeError,
        "x must have dtype float16, bfloat16, float32 or float64, got torch.int64",
    ),
]


GUARDS = [
    *(
        Refusal(partial(windows, **changes), RuntimeError, message)
        for changes, message in (
            ({"stride": [1]}, "stride must be 2 numbers, got [1]"),
            ({"stride": [0, 1]}, "stride must be at least 1 and below 2^31, got 0"),
            ({"stride": [1, 2**62]}, f"stride must be at least 1 and below 2^31, got {2**62}"),
            ({"padding": [0, 0, 0, -1]}, "padding must be at least 0 and below 2^31, got -1"),
            (
                {"padding": [2**30, 0, 2**30, 0]},
                "x after padding must have at most 2^50 elements, "
                f"got {[1, 4, 2**30 + 5, 2**30 + 6]}",
            ),
            (
                {"dilation": [3, 1]},
                "x must be at least as large as the dilated kernel 7 after padding, got 5",
            ),
            ({"groups": 3}, "groups must divide the 4 channels of x, got 3"),
            ({"groups": -(2**63)}, f"groups must divide the 4 channels of x, got {-(2**63)}"),
            ({"groups": 4}, "groups must divide the 6 filters of weight, got 4"),
            ({"padding_mode": "same"}, f"padding_mode must be one of {MODES}, got 'same'"),
            (
                {"padding_mode": "reflect", "padding": [5, 0, 0, 0]},
                "padding must be below the size 5 for 'reflect', got 5",
            ),
            (
                {"padding_mode": "circular", "padding": [6, 0, 0, 0]},
                "padding must be at most the size 5 for 'circular', got 6",
            ),
            (
                {"padding_mode": "replicate", "sizes": [1, 4, 0, 6], "padding": [3, 0, 0, 0]},
                "x must have a size of at least 1 for 'replicate', got 0",
            ),
        )
    ),
    Refusal(
        lambda: guards.filters_of(X[0], WEIGHT, 1),
        RuntimeError,
        "x must have 4 dimensions, got [4, 5, 6]",
    ),
    Refusal(
        lambda: guards.filters_of(X, WEIGHT[:, :3], 1),
        RuntimeError,
        "weight.size(1) must be in_channels / groups = 4, got 3",
    ),
    Refusal(
        lambda: guards.dtype("weight", WEIGHT, torch.float64),
        RuntimeError,
        "weight must have dtype torch.float64, got torch.float32",
    ),
    Refusal(
        lambda: guards.values("map", X, 120),
        RuntimeError,
        "map must have shape [120], got [1, 4, 5, 6]",
    ),
    Refusal(
        lambda: guards.one_value("sigma", torch.zeros(2)),
        RuntimeError,
        "sigma must be one value, got shape [2]",
    ),
    Refusal(
        partial(guards.partial_sums, **ROWS),
        RuntimeError,
        "rows must be at least 1 and below 2^31, got 0",
    ),
    Refusal(
        partial(guards.partial_sums, **(ROWS | {"sums": 16})),
        RuntimeError,
        "sums must be bits of 15, got 16",
    ),
    Refusal(
        lambda: ops.depthwise_grad_weight.fake(
            DepthwiseGradWeight(
                X.to("meta"), X.to("meta"), [1, 1], Window(groups=2), 1, False, False
            )
        ),
        RuntimeError,
        "groups must be the 4 channels of x, got 2",
    ),
]

REFUSALS = [
    *LAYERS,
    *REGISTERED,
    *NAMES,
    *NUMBERS,
    *GEOMETRY,
    *ABSURD,
    *FLAGS,
    *INPUTS,
    *LAYOUTS,
    *TENSORS,
    *GROUPS,
    *SIZES,
    *COMBINATIONS,
    *UTILITIES,
    *DISTRIBUTED,
    *CHOICES,
    *CONVERSIONS,
    *CALIBRATIONS,
    *GUARDS,
    *BATCH_NORMS,
]


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: case.message.replace("::", ":")[:200])
def test_wrong_call_raises_its_sentence(case: Refusal) -> None:
    with pytest.raises(case.kind, match=f"^{re.escape('dcconv: ' + case.message)}$") as caught:
        case.call()
    # Of both kinds that callers of nn.Conv2d may catch.
    assert isinstance(caught.value, RuntimeError | ValueError)


def raising_lines() -> set[tuple[str, int]]:
    """Return file and line of every ``raise`` statement of the package that builds an exception."""
    found = set()
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                found.add((path.name, node.lineno))
    return found


def test_every_raise_statement_of_the_package_has_a_case() -> None:
    reached = set()
    for case in REFUSALS:
        try:
            case.call()
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            reached |= {(Path(f.filename).name, f.lineno or 0) for f in frames}
    assert raising_lines() - reached == set()


def test_reference_raises_the_same_sentences() -> None:
    with pytest.raises(ValueError, match=r"^dcconv: alpha must be a finite number above 0, got 0$"):
        dcconv.operator.reference.decoupled_conv2d(X, WEIGHT, alpha=0)
    with pytest.raises(ValueError, match=r"^dcconv: eps must be a finite number above 0, got 0$"):
        dcconv.operator.reference.patch_norm(X, 3, eps=0)


@pytest.mark.parametrize(
    "function", [decoupled_conv2d, dcconv.operator.reference.decoupled_conv2d, backends.report]
)
def test_unknown_keyword_raises(function: Callable[..., object]) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'magnitud'"):
        function(X, WEIGHT, magnitud="tanh")
    wrong: dict[str, Any] = {"strides": 2}
    with pytest.raises(TypeError, match="unexpected keyword argument 'strides'"):
        patch_norm(X, 3, **wrong)


@pytest.mark.parametrize("name", ["metal", "CPU", " "])
def test_environment_variable_with_an_unknown_backend_raises_at_the_first_call(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_default", name)
    message = re.escape(f"dcconv: DCCONV_BACKEND must be one of {BACKENDS}, got {name!r}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        decoupled_conv2d(X, WEIGHT)


def test_environment_variable_chooses_the_backend() -> None:
    code = "from dcconv import backends; import torch; print(backends.choose(torch.zeros(1)).name)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"DCCONV_BACKEND": "reference", "PYTHONPATH": str(PACKAGE.parent), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "reference"


def test_use_backend_restores_the_setting_after_an_error() -> None:
    before = backends.choose(X).name

    def fail() -> None:
        with dcconv.use_backend("reference"):
            assert backends.choose(X).name == "reference"
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert backends.choose(X).name == before


def test_compiled_backend_without_its_library_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = "the compiled library is missing: no compiler was found"
    monkeypatch.setattr(native, "missing", sentence)
    message = re.escape(f"dcconv: backend 'cpu' cannot run this call: {sentence}")
    with pytest.raises(NotImplementedError, match=f"^{message}$"):
        decoupled_conv2d(X, WEIGHT, backend="cpu")


GPU = torch.device("cuda", 0)


def on_gpu() -> tuple[torch.Tensor, torch.Tensor]:
    """Return X and WEIGHT on the first GPU; only inside a FakeTensorMode."""
    return torch.zeros(X.shape, device=GPU), torch.zeros(WEIGHT.shape, device=GPU)


@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
@pytest.mark.parametrize("argument", ["weight", "bias", "radius", "norm_mean", "k"])
def test_tensors_on_different_devices_raise(argument: str, other: str) -> None:
    shapes = {"weight": (6, 4, 3, 3), "norm_mean": ()}
    with FakeTensorMode():
        x, weight = on_gpu()
        tensors = {
            "weight": weight,
            argument: torch.zeros(shapes.get(argument, (6,)), device=other),
        }
        message = f"^dcconv: {argument} must be on x's device cuda:0, got {other}$"
        with pytest.raises(ValueError, match=message):
            decoupled_conv2d(x, angular="sigmoid", **tensors)


@pytest.mark.parametrize(
    ("capability", "archs", "willing"),
    [
        ((8, 0), "8.0;9.0a", True),
        ((8, 7), "8.0;9.0a", True),
        ((7, 5), "8.0;9.0a", False),
        ((9, 0), "8.0;9.0a", True),
        ((9, 0), "8.0;9.0", True),
        ((9, 0), "8.0", False),
        ((9, 0), "8.0+PTX", True),
        ((10, 0), "8.0;9.0a+PTX", False),
        ((10, 3), "8.0 10.0f", True),
        ((12, 0), "10.0f+PTX", False),
        ((12, 1), "9.0a;12.0+PTX", True),
        ((13, 0), "9.0a;12.0+PTX", True),
        ((11, 0), "9.0a;12.0+PTX", False),
        ((8, 6), "8.9;9.0a", False),
        ((9, 0), "Ampere", True),
        ((9, 0), None, False),
    ],
)
def test_gpu_without_code_is_refused(
    capability: tuple[int, int], archs: str | None, willing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "cuda_missing", lambda: None)
    monkeypatch.setattr(native, "_build", SimpleNamespace(ARCHS=archs))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    asked: list[int] = []
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda index: asked.append(index) or capability
    )
    monkeypatch.setattr(tracing, "_answers", {})
    known = ", ".join((archs or "none").replace(";", " ").split())
    sentence = f"this GPU is sm_{capability[0]}{capability[1]}; the library has code for {known}"
    with FakeTensorMode():
        second = torch.zeros(X.shape, device="cuda:1")
        for _ in range(2):
            if willing:
                assert backends.choose(second).name == "cuda"
                assert backends.choose(second, "cuda").name == "cuda"
            else:
                message = re.escape(f"dcconv: backend 'cuda' cannot run this call: {sentence}")
                with pytest.raises(NotImplementedError, match=f"^{message}$"):
                    backends.choose(second, "cuda")
        assert asked == [1]
        message = "^dcconv: backend 'cuda' cannot run this call: this machine has no GPU 5$"
        with pytest.raises(NotImplementedError, match=message):
            backends.choose(torch.zeros(X.shape, device="cuda:5"), "cuda")


def test_cuda_backend_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    call = backends.Call("cuda", torch.float32, transformed=False)
    record = backends._BACKENDS[backends.names.index("cuda")]
    monkeypatch.setattr(native, "cuda_missing", lambda: "a test says so")
    assert record.why_not(call) == "a test says so"
    monkeypatch.setattr(native, "cuda_missing", lambda: None)
    monkeypatch.setattr(refusals, "_why_not_gpu", lambda index: None)
    assert record.why_not(call) is None
    sentence = "torch.func transforms and forward-mode derivatives need plain PyTorch operations"
    assert record.why_not(call._replace(transformed=True)) == sentence


def test_slow_choice_warns_once_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = "the compiled library is missing: a test says so"
    monkeypatch.setattr(native, "missing", sentence)
    monkeypatch.setattr(warn, "_said", set())
    monkeypatch.setattr(backends, "_default", "auto")
    message = re.escape(
        f"dcconv: the plain PyTorch reference runs on cpu tensors (cpu: {sentence})"
    )
    with pytest.warns(RuntimeWarning, match=f"^{message}$"):
        decoupled_conv2d(X, WEIGHT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoupled_conv2d(X, WEIGHT)


def test_chosen_reference_does_not_warn(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(warn, "_said", set())
    with dcconv.use_backend("reference"):
        decoupled_conv2d(X, WEIGHT)
    decoupled_conv2d(X, WEIGHT, backend="reference")
    assert not [w for w in recwarn if "dcconv" in str(w.message)]


def test_report_names_every_backend_with_its_sentence() -> None:
    text = backends.report(X, WEIGHT, padding=1, magnitude="ball", backend="reference")
    lines = text.splitlines()
    assert lines[0].startswith("ball x cosine, weighting none, norm none; x [1, 4, 5, 6]")
    # Below a backend stands, further in, how it would run the call.
    named = [line for line in lines[1:] if line.startswith("  ") and line[2] != " "]
    assert [line.split()[0] for line in named[:4]] == list(backends.names)
    assert named[0].endswith("it runs on CUDA tensors, got a cpu tensor")
    assert named[3].endswith("runs this call")


def test_tensor_values_are_not_checked() -> None:
    """Reading them would synchronise a device; what the formula gives comes out."""
    radius = torch.tensor([-1.0, 0.0, 1.0, 2.0, float("nan"), float("inf")])
    y = decoupled_conv2d(X + 1, WEIGHT + 1, radius=radius)
    assert y.isnan().flatten(2).all(dim=2).tolist() == [[False] * 4 + [True, False]]


def test_module_catches_a_wrong_input_at_the_call() -> None:
    with pytest.raises(
        ValueError, match=r"^dcconv: weight\.size\(1\) must be in_channels / groups = 5, got 4$"
    ):
        DecoupledConv2d(4, 6, 3)(torch.zeros(1, 5, 6, 6))
    with pytest.raises(
        TypeError, match=r"^dcconv: weight must have x's dtype torch\.float64, got torch\.float32$"
    ):
        DecoupledConv2d(4, 6, 3)(torch.zeros(1, 4, 6, 6, dtype=torch.float64))
