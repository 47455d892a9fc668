"""DecoupledConv2d: nn.Conv2d's signature and state, the moving average, training and evaluation."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accuracy import check_equal
from cases import OPERATORS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dcconv
from dcconv import DecoupledConv2d
from dcconv.functional import decoupled_conv2d, patch_norm
from dcconv.operator import arguments
from dcconv.operator.functions import angulars, magnitudes
from dcconv.operator.records import Geometry

T = 1e-3


def images(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = shape or (4, 3, 6, 5)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


def norm_mean_of(layer: DecoupledConv2d) -> Tensor:
    assert layer.norm_mean is not None
    return layer.norm_mean


def steps_of(layer: DecoupledConv2d) -> int:
    assert layer.norm_mean_steps is not None
    return int(layer.norm_mean_steps)


def test_arguments_are_those_of_nn_conv2d() -> None:
    own = inspect.signature(DecoupledConv2d.__init__).parameters
    plain = inspect.signature(nn.Conv2d.__init__).parameters
    positional = [p for p in own.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == list(plain)
    for p in positional:
        assert p.default == (False if p.name == "bias" else plain[p.name].default), p.name
    assert {p.name: p.default for p in own.values() if p.kind is p.KEYWORD_ONLY} == {
        "magnitude": "tanh",
        "angular": "cosine",
        "weighting": "none",
        "alpha": 1.0,
        "beta": 0.5,
        "radius": 1.0,
        "learn_radius": True,
        "radius_unit": "mean_norm",
        "norm_momentum": 1e-3,
        "norm_init": "first",
        "norm_mean_grad": True,
        "sync_norm": False,
        "k": 0.3,
        "learn_k": False,
        "power": 2.0,
        "eps": 1e-4,
        "keep": "auto",
        "backend": None,
    }


def test_arguments_of_the_functional_are_those_of_the_library() -> None:
    own = inspect.signature(decoupled_conv2d).parameters
    positional = [p.name for p in own.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["x", "weight", "bias", "stride", "padding", "dilation", "groups"]
    defaults = {p.name: p.default for p in own.values() if p.kind is p.KEYWORD_ONLY}
    module = inspect.signature(DecoupledConv2d.__init__).parameters
    assert defaults.pop("norm_mean") is None
    assert all(module[name].default == value for name, value in defaults.items())


GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 3},
    "bias": {"bias": True, "groups": 3},
    "same": {"padding": "same"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
}


def test_numpy_integers_are_taken_where_nn_conv2d_takes_them() -> None:
    two = np.int64(2)
    layer = DecoupledConv2d(
        np.int32(4), np.uint8(6), np.int64(3), (two, np.int16(1)), two, np.array(2), two
    )
    plain = DecoupledConv2d(4, 6, 3, (2, 1), 2, 2, 2)
    assert repr(layer) == repr(plain)
    for name in ("in_channels", "out_channels", "groups"):
        assert type(getattr(layer, name)) is int, name
    for name in ("kernel_size", "stride", "padding", "dilation"):
        assert [type(value) for value in getattr(layer, name)] == [int, int], name
    plain.load_state_dict(layer.state_dict())
    x = images(2, 4, 8, 8)
    assert torch.equal(layer(x), plain(x))
    y = decoupled_conv2d(x, layer.weight, None, two, two, two, two)
    assert torch.equal(y, decoupled_conv2d(x, layer.weight, None, 2, 2, 2, 2))
    b = patch_norm(x, np.int64(3), two, two, two, two)
    assert torch.equal(b, patch_norm(x, 3, 2, 2, 2, 2))
    _, _, problem = arguments.patch_norm(x, 3, Geometry(two, two, two, two), 1e-4)
    assert type(problem.window.groups) is int


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_linear_layer_with_linear_weighting_is_nn_conv2d(
    geometry: dict[str, Any], backend: str, device: str
) -> None:
    """One state dict, one call, one result: the layer takes nn.Conv2d's place."""
    options = {"bias": False, **geometry, "device": device, "dtype": torch.float64}
    plain = nn.Conv2d(3, 6, 3, **options)
    layer = DecoupledConv2d(3, 6, 3, magnitude="linear", weighting="linear", **options)
    assert {k: v.shape for k, v in layer.state_dict().items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }
    layer.load_state_dict(plain.state_dict())
    for x in (images(2, 3, 8, 9, dtype=torch.float64), images(3, 8, 9, dtype=torch.float64)):
        x = x.to(device)
        check_equal("y", layer(x).detach(), plain(x).detach())


def test_plain_state_loads_strictly_and_leaves_own_state_alone() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1, bias=False))
    model = nn.Sequential(
        DecoupledConv2d(3, 4, 3, bias=True, angular="sigmoid", learn_k=True, radius=2.0),
        DecoupledConv2d(4, 4, 1),
    )
    before = {name: t.clone() for name, t in model.state_dict().items()}
    result = model.load_state_dict(plain.state_dict(), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    after = model.state_dict()
    for name in before:
        want = plain.state_dict().get(name, before[name])
        assert torch.equal(after[name], want), name


def test_own_state_makes_the_round_trip() -> None:
    first = DecoupledConv2d(3, 4, 3, angular="sigmoid", learn_k=True)
    first(3 * images())
    assert first.radius_raw is not None and first.k_raw is not None
    nn.init.uniform_(first.radius_raw)
    nn.init.uniform_(first.k_raw)
    second = DecoupledConv2d(3, 4, 3, angular="sigmoid", learn_k=True)
    second.load_state_dict(first.state_dict())
    assert list(first.state_dict()) == [
        "weight",
        "radius_raw",
        "k_raw",
        "norm_mean",
        "norm_mean_steps",
    ]
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    first.eval(), second.eval()
    assert torch.equal(first(images()), second(images()))


@pytest.mark.parametrize("lost", ["radius_raw", "k_raw", "norm_mean", "norm_mean_steps", "weight"])
def test_partial_own_state_is_reported_missing(lost: str) -> None:
    model = nn.Sequential(DecoupledConv2d(3, 4, 3, angular="sigmoid", learn_k=True))
    state = model.state_dict()
    del state[f"0.{lost}"]
    with pytest.raises(RuntimeError, match=rf'Missing key.*"0\.{lost}"'):
        model.load_state_dict(state)


def test_plain_state_without_its_bias_is_reported_missing() -> None:
    plain = nn.Conv2d(3, 4, 3, bias=False)
    with pytest.raises(RuntimeError, match=r'Missing key.*"bias"'):
        DecoupledConv2d(3, 4, 3, bias=True).load_state_dict(plain.state_dict())


def test_state_of_another_operator_is_reported_unexpected() -> None:
    # Without the metadata, which says the operator.
    state = dict(DecoupledConv2d(3, 4, 3, magnitude="tanh").state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        DecoupledConv2d(3, 4, 3, magnitude="sphere").load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, "3, 4, kernel_size=(3, 3)"),
        ({"stride": 2}, "3, 4, kernel_size=(3, 3), stride=(2, 2)"),
        (
            {"padding": "same", "padding_mode": "reflect", "bias": True},
            "3, 4, kernel_size=(3, 3), padding='same', bias=True, padding_mode='reflect'",
        ),
        (
            {"magnitude": "ball", "angular": "sigmoid", "k": 0.5, "learn_k": True},
            "3, 4, kernel_size=(3, 3), magnitude='ball', angular='sigmoid', k=0.5, learn_k=True",
        ),
        (
            {"weighting": "product", "alpha": 2, "beta": 0, "radius": 0.5, "learn_radius": False},
            "3, 4, kernel_size=(3, 3), weighting='product', alpha=2.0, beta=0.0, radius=0.5, "
            "learn_radius=False",
        ),
        (
            {
                "radius_unit": "absolute",
                "norm_momentum": 0.1,
                "norm_init": "zero",
                "norm_mean_grad": False,
                "sync_norm": True,
            },
            "3, 4, kernel_size=(3, 3), radius_unit='absolute', norm_momentum=0.1, "
            "norm_init='zero', norm_mean_grad=False, sync_norm=True",
        ),
        (
            {"power": 3.0, "eps": 1e-6, "keep": "dot", "backend": "reference"},
            "3, 4, kernel_size=(3, 3), power=3.0, eps=1e-06, keep='dot', backend='reference'",
        ),
        ({"dilation": 2, "groups": 1}, "3, 4, kernel_size=(3, 3), dilation=(2, 2)"),
    ],
)
def test_repr_shows_only_what_differs_from_the_defaults(
    options: dict[str, Any], shown: str
) -> None:
    text = repr(DecoupledConv2d(3, 4, 3, **options))
    assert text == f"DecoupledConv2d({shown})"
    assert repr(eval_free_copy(text)) == text


def eval_free_copy(text: str) -> DecoupledConv2d:
    """Build the layer that a repr describes, reading literals only."""
    import ast

    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    named = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    return DecoupledConv2d(*(ast.literal_eval(value) for value in call.args), **named)


SET = {
    "stride": (2, 1),
    "padding": "same",
    "dilation": 2,
    "groups": 1,
    "padding_mode": "reflect",
    "magnitude": "ball",
    "angular": "square_cosine",
    "weighting": "product",
    "alpha": 2,
    "beta": 0.25,
    "power": 3.0,
    "eps": 1e-3,
}


@pytest.mark.parametrize("name", SET)
def test_attributes_of_the_records_can_be_set(name: str) -> None:
    options: dict[str, Any] = {"padding": 1}
    if name == "beta":
        options["magnitude"] = "segmented"
    if name == "power":
        options["angular"] = "power"
    layer = DecoupledConv2d(4, 6, 3, **options)
    x = images(2, 4, 8, 8)
    twin, before = copy.deepcopy(layer), layer.eval()(x)
    setattr(layer, name, SET[name])
    built = DecoupledConv2d(4, 6, 3, **(options | {name: SET[name]})).eval()
    built.load_state_dict(layer.state_dict())
    assert getattr(layer, name) == getattr(built, name)
    assert repr(layer) == repr(built)
    assert torch.equal(layer(x), built(x))
    assert torch.equal(twin.eval()(x), before)


@pytest.mark.parametrize(("name", "value"), [("stride", 0), ("alpha", -1.0), ("magnitude", "tahn")])
def test_attributes_that_are_wrong_change_nothing(name: str, value: Any) -> None:
    layer = DecoupledConv2d(4, 6, 3)
    said = repr(layer)
    with pytest.raises(ValueError, match=f"^dcconv: {name} must "):
        setattr(layer, name, value)
    assert repr(layer) == said


def test_a_pickle_with_single_attributes_for_the_records_loads() -> None:
    options: dict[str, Any] = {"padding": 1, "padding_mode": "reflect", "magnitude": "ball"}
    layer = DecoupledConv2d(4, 6, 3, 2, alpha=2.0, **options)
    layer(images(2, 4, 8, 8))
    state = layer.__getstate__()
    for record in ("operator", "geometry"):
        held = state.pop(record)
        names = held._fields if record == "geometry" else held.__dataclass_fields__
        state |= {name: getattr(held, name) for name in names}
    loaded = DecoupledConv2d.__new__(DecoupledConv2d)
    loaded.__setstate__(state)
    assert repr(loaded) == repr(layer)
    assert loaded.operator == layer.operator and loaded.geometry == layer.geometry
    assert vars(loaded).keys() == vars(layer).keys()
    x = images(2, 4, 8, 8)
    assert torch.equal(loaded.eval()(x), layer.eval()(x))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(how: str) -> None:
    layer = DecoupledConv2d(3, 4, 3, angular="sigmoid", learn_k=True, bias=True, padding="same")
    layer(images())
    copies = {
        "deepcopy": copy.deepcopy,
        # The bytes were written on the same line.
        "pickle": lambda module: pickle.loads(pickle.dumps(module)),  # noqa: S301
    }
    other = copies[how](layer)
    assert repr(other) == repr(layer)
    layer.eval(), other.eval()
    assert torch.equal(layer(images()), other(images()))
    with torch.no_grad():
        other.weight.zero_()
        norm_mean_of(other).zero_()
    assert int(layer.weight.count_nonzero()) == layer.weight.numel()
    assert float(norm_mean_of(layer)) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["to", "half", "constructor"])
def test_moving_average_is_float32_in_half_layers(
    how: str, dtype: torch.dtype, backend: str, device: str
) -> None:
    if how == "constructor":
        layer = DecoupledConv2d(3, 4, 3, dtype=dtype, device=device)
    else:
        layer = DecoupledConv2d(3, 4, 3, device=device)
        before = norm_mean_of(layer).clone() / 3.0
        norm_mean_of(layer).copy_(before)
        layer = layer.to(dtype) if how == "to" else getattr(layer, how_method(dtype))()
        # float32 digits survive the cast.
        assert torch.equal(norm_mean_of(layer), before)
    assert layer.weight.dtype == dtype
    assert layer.radius_raw is not None and layer.radius_raw.dtype == dtype
    assert norm_mean_of(layer).dtype == torch.float32
    x = images(dtype=dtype).to(device)
    y = layer(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    start = float(norm_mean_of(layer))
    for _ in range(5):
        layer(2 * x)
    # Each step is below half an ulp of a half float: a half average would stand still.
    want = start
    for _ in range(5):
        want += T * (float(patch_norm(2 * x, 3).mean()) - want)
    assert start != want
    check_equal("average", norm_mean_of(layer), torch.tensor(want, device=device))


def how_method(dtype: torch.dtype) -> str:
    return "half" if dtype == torch.float16 else "bfloat16"


def test_moving_average_follows_the_layer_to_float64_and_back() -> None:
    layer = DecoupledConv2d(3, 4, 3)
    assert norm_mean_of(layer.double()).dtype == torch.float64
    assert norm_mean_of(layer.half()).dtype == torch.float32
    assert norm_mean_of(layer.float()).dtype == torch.float32
    assert layer.norm_mean_steps is not None and layer.norm_mean_steps.dtype == torch.int64
    assert set(dict(layer.named_buffers())) == {"norm_mean", "norm_mean_steps"}


def test_moving_average_is_shared_state_after_a_cast() -> None:
    """The buffer that a cast leaves must be the registered one: state_dict and load see it."""
    layer = DecoupledConv2d(3, 4, 3).half()
    layer(images().half())
    assert torch.equal(layer.state_dict()["norm_mean"], norm_mean_of(layer))
    other = DecoupledConv2d(3, 4, 3).half()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(norm_mean_of(other), norm_mean_of(layer))


def test_first_batch_starts_the_average(backend: str, device: str) -> None:
    layer = DecoupledConv2d(3, 4, 3, padding=1, norm_momentum=0.25, dtype=torch.float64).to(device)
    assert float(norm_mean_of(layer)) == math.sqrt(3 * 9)
    average = None
    for step in range(3):
        x = images(seed=step, dtype=torch.float64).to(device) * (step + 1)
        mean = patch_norm(x, 3, padding=1).mean()
        average = mean if average is None else 0.75 * average + 0.25 * mean
        layer(x)
        check_equal("average", norm_mean_of(layer), average)
        assert steps_of(layer) == step + 1


def test_zero_start_is_the_official_average(backend: str, device: str) -> None:
    layer = DecoupledConv2d(3, 4, 3, norm_init="zero", dtype=torch.float64).to(device)
    assert float(norm_mean_of(layer)) == 0.0
    x = images(dtype=torch.float64).to(device)
    mean = patch_norm(x, 3).mean()
    for n in (1, 2, 3):
        layer(x)
        # (1 - t)^n of the zero start is left, and nothing corrects it.
        check_equal("average", norm_mean_of(layer), (1 - (1 - T) ** n) * mean)


@pytest.mark.parametrize("norm_init", ["first", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("operator", OPERATORS, ids="-".join)
def test_evaluation_before_training_is_finite(
    operator: tuple[str, str, str], dtype: torch.dtype, norm_init: str, backend: str, device: str
) -> None:
    magnitude, weighting, angular = operator
    layer = DecoupledConv2d(
        3, 4, 3, magnitude=magnitude, weighting=weighting, angular=angular, norm_init=norm_init
    )
    layer = layer.to(device, dtype).eval()
    y = layer(images(dtype=dtype).to(device))
    assert bool(y.isfinite().all())
    assert int(y.count_nonzero()) > 0


@pytest.mark.parametrize("magnitude", ["ball", "tanh", "segmented"])
def test_evaluation_uses_the_average_and_training_the_batch(
    magnitude: str, backend: str, device: str
) -> None:
    layer = DecoupledConv2d(3, 4, 3, magnitude=magnitude, dtype=torch.float64).to(device)
    first, second = (images(seed=s, dtype=torch.float64).to(device) for s in (1, 2))
    layer(first)
    mean = patch_norm(first, 3).mean()
    second = 2.5 * second
    trained = layer(second).detach()
    average = norm_mean_of(layer).clone()
    layer.eval()
    evaluated = layer(second).detach()

    def by_hand(norm_mean: Any) -> Tensor:
        assert isinstance(layer.radius, Tensor)
        y = decoupled_conv2d(
            second, layer.weight, magnitude=magnitude, radius=layer.radius, norm_mean=norm_mean
        )
        return y.detach()

    check_equal("training", trained, by_hand("batch"))
    check_equal("evaluation", evaluated, by_hand(average))
    assert not torch.allclose(trained, evaluated)
    want = mean + T * (patch_norm(second, 3).mean() - mean)
    check_equal("average", average, want)
    assert torch.equal(norm_mean_of(layer), average)
    assert steps_of(layer) == 2


def test_evaluation_does_not_depend_on_the_rest_of_the_batch(backend: str, device: str) -> None:
    layer = DecoupledConv2d(3, 4, 3).to(device).eval()
    x = images().to(device)
    check_equal("y", layer(x)[:1].detach(), layer(x[:1]).detach())


def test_empty_batch_leaves_the_state_alone(backend: str, device: str) -> None:
    layer = DecoupledConv2d(3, 4, 3, bias=True).to(device)
    empty = torch.zeros(0, 3, 6, 5, device=device, requires_grad=True)
    for _ in range(2):
        before = {name: t.clone() for name, t in layer.state_dict().items()}
        y = layer(empty)
        assert y.shape == (0, 4, 4, 3)
        y.sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            assert int(parameter.grad.count_nonzero()) == 0, name
        assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())
        layer(images().to(device))
        assert float(norm_mean_of(layer)) != math.sqrt(27)


def test_learned_radius_has_the_official_start_and_parametrisation() -> None:
    layer = DecoupledConv2d(3, 4, 3)
    assert layer.radius_raw is not None
    assert layer.radius_raw.tolist() == [1.0] * 4
    assert isinstance(layer.radius, Tensor)
    check_equal("r", layer.radius.detach(), torch.full((4,), 1.0001))
    layer = DecoupledConv2d(3, 4, 3, radius=4.0)
    assert layer.radius_raw is not None
    assert layer.radius_raw.tolist() == [2.0] * 4


def test_fixed_radius_is_the_number_given(backend: str, device: str) -> None:
    layer = DecoupledConv2d(3, 4, 3, radius=0.7, learn_radius=False, dtype=torch.float64)
    layer = layer.to(device)
    assert layer.radius_raw is None and layer.radius == 0.7
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    x = images(dtype=torch.float64).to(device)
    want = decoupled_conv2d(x, layer.weight, radius=0.7, norm_mean="batch")
    check_equal("y", layer(x).detach(), want.detach())


def test_learned_k_has_the_official_parametrisation(backend: str, device: str) -> None:
    layer = DecoupledConv2d(
        3, 4, 3, magnitude="sphere", angular="sigmoid", k=0.7, learn_k=True, dtype=torch.float64
    ).to(device)
    assert layer.k_raw is not None
    check_equal("raw", layer.k_raw.detach(), torch.full_like(layer.k_raw, 0.65).detach())
    with torch.no_grad():
        layer.k_raw[1] = -0.4
    x = images(dtype=torch.float64).to(device)
    k = torch.tensor([0.7, 0.45, 0.7, 0.7], dtype=torch.float64, device=device)
    want = decoupled_conv2d(x, layer.weight, magnitude="sphere", angular="sigmoid", k=k)
    y = layer(x)
    check_equal("y", y.detach(), want.detach())
    y.square().sum().backward()
    assert layer.k_raw.grad is not None
    assert int(layer.k_raw.grad.count_nonzero()) == 4


def test_only_used_parameters_exist() -> None:
    for magnitude, weighting, angular in OPERATORS:
        layer = DecoupledConv2d(
            3, 4, 3, magnitude=magnitude, weighting=weighting, angular=angular, learn_k=True
        )
        names = set(layer.state_dict())
        with_radius = {"radius_raw", "norm_mean", "norm_mean_steps"}
        assert ({"radius_raw"} <= names) == magnitudes[magnitude].uses_rho
        assert names & with_radius in (set(), with_radius)
        assert ("k_raw" in names) == angulars[angular].uses_k


@pytest.mark.parametrize("magnitude", ["ball", "tanh", "segmented"])
def test_absolute_radius_has_no_norm_state(magnitude: str, backend: str, device: str) -> None:
    layer = DecoupledConv2d(
        3, 4, 3, magnitude=magnitude, radius_unit="absolute", radius=3.0, dtype=torch.float64
    ).to(device)
    assert set(layer.state_dict()) == {"weight", "radius_raw"}
    x = images(dtype=torch.float64).to(device)
    want = decoupled_conv2d(x, layer.weight, magnitude=magnitude, radius=3.0001)
    check_equal("training", layer(x).detach(), want.detach())
    check_equal("evaluation", layer.eval()(x).detach(), want.detach())


def test_detached_mean_norm_changes_the_gradient_alone(backend: str, device: str) -> None:
    x = images(dtype=torch.float64).to(device)
    results = {}
    for flag in (True, False):
        torch.manual_seed(0)
        layer = DecoupledConv2d(3, 4, 3, norm_mean_grad=flag, dtype=torch.float64).to(device)
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.square().sum().backward()
        assert leaf.grad is not None
        results[flag] = (y.detach(), leaf.grad, norm_mean_of(layer))
    check_equal("y", results[False][0], results[True][0])
    check_equal("average", results[False][2], results[True][2])
    assert not torch.allclose(results[False][1], results[True][1])
    torch.manual_seed(0)
    layer = DecoupledConv2d(3, 4, 3, norm_mean_grad=False, dtype=torch.float64).to(device)
    leaf = x.clone().requires_grad_()
    assert isinstance(layer.radius, Tensor)
    mean = patch_norm(x, 3).mean()
    y = decoupled_conv2d(leaf, layer.weight, radius=layer.radius, norm_mean=mean)
    y.square().sum().backward()
    assert leaf.grad is not None
    check_equal("grad_x", results[False][1], leaf.grad)


def test_reset_parameters_forgets_everything() -> None:
    layer = DecoupledConv2d(3, 4, 3, bias=True, angular="sigmoid", learn_k=True, radius=2.0)
    start = {name: t.clone() for name, t in layer.state_dict().items()}
    layer(5 * images())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(9.0)
    layer.reset_parameters()
    for name, value in layer.state_dict().items():
        if name in ("weight", "bias"):
            assert float(value.abs().max()) <= 1 / math.sqrt(27)
            assert value.unique().numel() == value.numel()
        else:
            assert torch.equal(value, start[name]), name


@pytest.mark.parametrize("options", [{}, {"groups": 2, "bias": True}, {"kernel_size": 1}])
def test_initial_values_are_those_of_nn_conv2d(options: dict[str, Any]) -> None:
    """The same draws from the same generator, so the same statistics to the last bit."""
    arguments = {"kernel_size": 3, "bias": False, **options}
    torch.manual_seed(5)
    plain = nn.Conv2d(8, 16, **arguments)
    torch.manual_seed(5)
    layer = DecoupledConv2d(8, 16, **arguments)
    assert torch.equal(layer.weight, plain.weight)
    if plain.bias is not None:
        assert layer.bias is not None
        assert torch.equal(layer.bias, plain.bias)


def test_meta_layer_comes_to_life_by_to_empty_and_reset() -> None:
    layer = DecoupledConv2d(3, 4, 3, bias=True, device="meta", angular="sigmoid", learn_k=True)
    assert all(t.is_meta for t in layer.state_dict().values())
    layer = layer.half()
    assert norm_mean_of(layer).dtype == torch.float32
    layer = layer.float().to_empty(device="cpu")
    layer.reset_parameters()
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    want = DecoupledConv2d(3, 4, 3, bias=True, angular="sigmoid", learn_k=True)
    for name, value in want.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name
    assert bool(layer(images()).isfinite().all())


def test_meta_layer_tells_the_shape_of_its_output() -> None:
    layer = DecoupledConv2d(3, 4, 3, stride=2, padding="same", device="meta")
    y = layer(torch.zeros(2, 3, 7, 8, device="meta"))
    assert y.is_meta
    assert y.shape == (2, 4, 4, 4)


def test_norm_mean_can_be_deferred_by_a_factory_context() -> None:
    with torch.device("meta"):
        layer = DecoupledConv2d(3, 4, 3)
    assert norm_mean_of(layer).is_meta
    assert layer.weight.is_meta


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_memory_format_of_the_layer_changes_nothing(
    layout: torch.memory_format, backend: str, device: str
) -> None:
    layer = DecoupledConv2d(4, 6, 3, padding=1, dtype=torch.float64).to(device)
    x = images(2, 4, 6, 5, dtype=torch.float64).to(device)
    want = layer(x).detach()
    layer = layer.to(memory_format=layout)
    check_equal("y", layer(x.to(memory_format=layout)).detach(), want)


@pytest.mark.parametrize("angular", ["cosine", "linear"])
def test_gradients_reach_every_parameter(angular: str, backend: str, device: str) -> None:
    layer = DecoupledConv2d(3, 4, 3, bias=True, angular=angular).to(device)
    x = images().to(device).requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad is not None
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert int(parameter.grad.count_nonzero()) == parameter.numel(), name


def test_backend_argument_overrides_the_setting() -> None:
    layer = DecoupledConv2d(3, 4, 3, backend="reference")
    with dcconv.use_backend("triton"):
        layer(images())
        with pytest.raises(NotImplementedError, match="backend 'triton' cannot run this call"):
            DecoupledConv2d(3, 4, 3)(images())


def test_unknown_constructor_keyword_raises() -> None:
    wrong: dict[str, Any] = {"magnitud": "ball"}
    with pytest.raises(TypeError, match="unexpected keyword argument 'magnitud'"):
        DecoupledConv2d(3, 4, 3, **wrong)


def sync_worker(rank: int, folder: str) -> None:
    """Run one rank of two on its part of the batch and write what it got."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        # Unequal parts, one of them empty: the mean weighs ranks by their number of patches.
        for cut in (3, 5):
            part = slice(0, cut) if rank == 0 else slice(cut, None)
            for flag in (True, False):
                results = sync_results(flag, part)
                torch.save(results, Path(folder) / f"rank{rank}-{cut}-{flag}.pt")
        # One graph, collectives in both directions included.
        compiled = sync_results(True, slice(0, 3) if rank == 0 else slice(3, None), compiled=True)
        torch.save(compiled, Path(folder) / f"rank{rank}-3-compiled.pt")
        # A rank that leaves first cuts the other's last collective, and that one aborts.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def sync_results(norm_mean_grad: bool, part: slice, compiled: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(4)
    layer = DecoupledConv2d(
        3,
        4,
        3,
        padding=1,
        sync_norm=True,
        norm_mean_grad=norm_mean_grad,
        dtype=torch.float64,
        backend="reference",
    )
    scale = torch.arange(1.0, 6.0).reshape(-1, 1, 1, 1)
    x = (images(5, 3, 4, 4, dtype=torch.float64) * scale)[part].clone().requires_grad_()
    cotangent = images(5, 4, 4, 4, seed=8, dtype=torch.float64)[part]
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    y = call(x)
    (y * cotangent).sum().backward()
    assert layer.radius_raw is not None and layer.radius_raw.grad is not None
    assert x.grad is not None and layer.weight.grad is not None
    assert steps_of(layer) == 1
    return {
        "y": y.detach(),
        "x": x.grad,
        "weight": layer.weight.grad,
        "radius": layer.radius_raw.grad,
        "norm_mean": norm_mean_of(layer),
    }


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch was built without gloo"
)
def test_two_synchronised_processes_equal_one_big_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(sync_worker, (str(tmp_path),), nprocs=2)
    for cut, flag in ((3, True), (3, False), (5, True), (5, False), (3, "compiled")):
        want = sync_results(bool(flag), slice(None))
        parts = [
            torch.load(tmp_path / f"rank{rank}-{cut}-{flag}.pt", weights_only=True)
            for rank in range(2)
        ]
        for name in ("y", "x"):
            check_equal(name, torch.cat([part[name] for part in parts]), want[name])
        for name in ("weight", "radius"):
            check_equal(name, parts[0][name] + parts[1][name], want[name])
        for part in parts:
            check_equal("average", part["norm_mean"], want["norm_mean"])


def test_synchronising_without_a_process_group_is_the_plain_layer() -> None:
    x = images(dtype=torch.float64)
    results = []
    for sync in (True, False):
        torch.manual_seed(2)
        layer = DecoupledConv2d(3, 4, 3, sync_norm=sync, dtype=torch.float64)
        results.append((layer(x).detach(), norm_mean_of(layer)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_activation_checkpointing_updates_the_average_twice(backend: str, device: str) -> None:
    """Recomputation runs the whole layer again, as with BatchNorm."""
    layer = DecoupledConv2d(3, 4, 3).to(device)
    x = images().to(device).requires_grad_()
    y = checkpoint(layer, x, use_reentrant=True)
    assert isinstance(y, Tensor)
    y.sum().backward()
    assert steps_of(layer) == 2
    check_equal("average", norm_mean_of(layer), patch_norm(x.detach(), 3).mean())
