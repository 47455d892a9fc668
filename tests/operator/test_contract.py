"""What callers of nn.Conv2d rely on: arguments that it takes, and the exceptions that it raises."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import check_equal
from torch import Tensor, nn

import dcconv
from dcconv import DecoupledConv2d
from dcconv.functional import decoupled_conv2d, patch_norm

X = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(2))
WEIGHT = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(3))

Make = Callable[..., nn.Module]

# Calls that nn.Conv2d refuses, in its constructor or in its forward.
WRONG: dict[str, Callable[[Make], object]] = {
    "padding_mode": lambda make: make(4, 6, 3, padding_mode=3),
    "padding_mode's name": lambda make: make(4, 6, 3, padding_mode="mirror"),
    "padding's name": lambda make: make(4, 6, 3, padding="full"),
    "groups": lambda make: make(4, 6, 3, groups=3),
    "no groups": lambda make: make(4, 6, 3, groups=0),
    "negative groups": lambda make: make(4, 6, 3, groups=-2),
    "negative padding": lambda make: make(4, 6, 3, padding=-1)(X),
    "no stride": lambda make: make(4, 6, 3, stride=0)(X),
    "no dilation": lambda make: make(4, 6, 3, dilation=0)(X),
    "three strides": lambda make: make(4, 6, 3, stride=(1, 1, 1))(X),
    "channels": lambda make: make(4, 6, 3)(X[:, :3]),
    "channels last": lambda make: make(4, 6, 3)(X.permute(0, 2, 3, 1)),
    "dimensions": lambda make: make(4, 6, 3)(X[0, 0]),
    "more dimensions": lambda make: make(4, 6, 3)(X[None]),
    "dtype": lambda make: make(4, 6, 3)(X.double()),
    "integers": lambda make: make(4, 6, 3)(X.long()),
    "small image": lambda make: make(4, 6, 9)(X),
    "no channels": lambda make: make(4, 6, 3)(X[:, :0]),
    "reflection": lambda make: make(4, 6, 3, padding=9, padding_mode="reflect")(X),
    "a float as stride": lambda make: make(4, 6, 3, stride=1.5)(X),
    "a text as window": lambda make: make(4, 6, "3"),
    "an array": lambda make: make(4, 6, 3)(X.numpy()),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_call_raises_what_nn_conv2d_raises(name: str) -> None:
    with pytest.raises((RuntimeError, ValueError, TypeError)) as plain:
        WRONG[name](nn.Conv2d)
    with pytest.raises(plain.type, match=r"^dcconv: "):
        WRONG[name](DecoupledConv2d)


def test_exceptions_travel_between_processes() -> None:
    for make in (lambda: DecoupledConv2d(4, 6, 3, alpha=0), lambda: DecoupledConv2d(4, 6, "3")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"^dcconv: ") as caught:
            make()
        # The bytes were written on the same line.
        other = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
        assert type(other) is type(caught.value) and str(other) == str(caught.value)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int64, Fraction])
def test_numbers_of_other_kinds_count_as_numbers(kind: Any) -> None:
    options: dict[str, Any] = {"magnitude": "segmented", "angular": "power"}
    numbers = {"alpha": 2, "beta": 1, "radius": 3, "power": 3, "eps": 1, "k": 1}
    given = {name: kind(value) for name, value in numbers.items()}
    want = DecoupledConv2d(4, 6, 3, norm_momentum=1, learn_radius=False, **options, **numbers)
    layer = DecoupledConv2d(4, 6, 3, norm_momentum=kind(1), learn_radius=False, **options, **given)
    assert repr(layer) == repr(want)
    layer.load_state_dict(want.state_dict())
    assert torch.equal(layer(X), want(X))
    y = decoupled_conv2d(X, WEIGHT, **options, **given)
    assert torch.equal(y, decoupled_conv2d(X, WEIGHT, **options, **numbers))
    sigmoid = decoupled_conv2d(X, WEIGHT, angular="sigmoid", k=kind(1))
    assert torch.equal(sigmoid, decoupled_conv2d(X, WEIGHT, angular="sigmoid", k=1))
    assert torch.equal(patch_norm(X, 3, eps=kind(1)), patch_norm(X, 3, eps=1))
    assert torch.equal(
        dcconv.orthogonality_penalty(layer, kind(2)), dcconv.orthogonality_penalty(layer, 2)
    )


def test_numpys_booleans_are_booleans() -> None:
    layer = DecoupledConv2d(
        4, 6, 3, bias=np.True_, learn_radius=np.False_, sync_norm=np.bool_(False)
    )
    assert layer.bias is not None and layer.radius_raw is None
    assert layer.learn_radius is False and layer.sync_norm is False
    assert repr(layer) == repr(DecoupledConv2d(4, 6, 3, bias=True, learn_radius=False))


@pytest.mark.parametrize("sequence", [tuple, list, torch.Size])
def test_sequence_of_one_counts_for_rows_and_columns(sequence: Any) -> None:
    one, two = sequence((1,)), sequence((2,))
    plain = nn.Conv2d(4, 6, 3, stride=two, padding=one, dilation=two)
    layer = DecoupledConv2d(4, 6, 3, two, one, two, magnitude="linear", weighting="linear")
    layer.load_state_dict({"weight": plain.weight})
    assert plain.bias is not None
    want: Tensor = plain(X) - plain.bias.reshape(-1, 1, 1)
    check_equal("y", layer(X), want)
    assert repr(layer) == repr(
        DecoupledConv2d(4, 6, 3, 2, 1, 2, magnitude="linear", weighting="linear")
    )
    assert torch.equal(patch_norm(X, sequence((3,)), two, one), patch_norm(X, 3, 2, 1))
