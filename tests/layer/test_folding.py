"""Batch normalisation folded by hand into a layer's weight and bias: right, or refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import check_equal
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

import dcconv
from dcconv import DecoupledConv2d, folding

Fold = Callable[[Any, nn.BatchNorm2d], nn.Module]


def images() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def folded(conv: nn.Module, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None and norm.running_var is not None
    weight, bias = conv.weight, conv.bias
    assert isinstance(weight, Tensor)
    offset = torch.zeros(len(weight)) if bias is None else bias
    assert isinstance(offset, Tensor)
    s = norm.weight / (norm.running_var + norm.eps).sqrt()
    return weight * s.reshape(-1, 1, 1, 1), (offset - norm.running_mean) * s + norm.bias


def by_assignment(conv: nn.Module, norm: nn.BatchNorm2d) -> nn.Module:
    """Fold as mmcv does."""
    weight, bias = folded(conv, norm)
    conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
    return conv


def by_registration(conv: nn.Module, norm: nn.BatchNorm2d) -> nn.Module:
    """Fold as ultralytics does."""
    weight, bias = folded(conv, norm)
    conv.register_parameter("weight", nn.Parameter(weight))
    conv.register_parameter("bias", nn.Parameter(bias))
    return conv


FOLDS: dict[str, Fold] = {
    "torch": fuse_conv_bn_eval,
    "assignment": by_assignment,
    "registration": by_registration,
}


def norm_after(conv: nn.Module) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(4)
    norm(conv(images() + 1))
    nn.init.uniform_(norm.weight, -2, 2)
    nn.init.uniform_(norm.bias)
    return norm.eval()


OPERATORS: dict[str, dict[str, Any]] = {
    "tanh": {},
    "linear cosine": {"magnitude": "linear"},
    "product": {"weighting": "product"},
    "separate": {"weighting": "separate"},
    "weighted square": {"weighting": "linear", "angular": "square_cosine"},
}


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("fold", FOLDS.values(), ids=FOLDS)
@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_folding_into_an_operator_that_does_not_scale_is_refused(
    operator: dict[str, Any], fold: Fold, bias: bool
) -> None:
    layer = DecoupledConv2d(3, 4, 3, bias=bias, **operator)
    norm = norm_after(layer)
    layer.eval()
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    parameters = list(layer.parameters())
    with pytest.raises(ValueError, match=f"^dcconv: bias must .*{folding.WHY}"):
        fold(layer, norm)
    assert all(a is b for a, b in zip(parameters, layer.parameters(), strict=True))
    assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("fold", FOLDS.values(), ids=FOLDS)
@pytest.mark.parametrize("magnitude", ["ball", "tanh", "linear", "log", "sphere"])
def test_folding_into_linear_weighting_is_right(magnitude: str, fold: Fold, bias: bool) -> None:
    layer = DecoupledConv2d(3, 4, 3, bias=bias, magnitude=magnitude, weighting="linear")
    norm = norm_after(layer)
    layer.eval()
    want = norm(layer(images())).detach()
    check_equal("y", fold(layer, norm)(images()), want)


def test_weight_and_bias_are_set_as_ever() -> None:
    layer = DecoupledConv2d(3, 4, 3, bias=True)
    plain = nn.Conv2d(3, 4, 3)
    layer.weight, layer.bias = plain.weight, plain.bias
    assert layer.weight is plain.weight and layer.bias is plain.bias
    # Normalised filters are no folded ones as long as nothing is done to the bias.
    layer.weight = nn.Parameter(plain.weight.detach() * 2)
    layer.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
    layer.bias = nn.Parameter(torch.zeros(4))
    prune.l1_unstructured(layer, "bias", 0.5)
    prune.remove(layer, "bias")
    copy.deepcopy(layer)(images())
    one = DecoupledConv2d(2, 2, 1, groups=2, bias=True)
    one.weight, one.bias = nn.Parameter(one.weight.detach() * 3), nn.Parameter(torch.ones(2))


class Block(nn.Module):
    """A re-parametrised block as timm has them: it builds a plain layer of its branches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x)) if hasattr(self, "bn") else self.conv(x)
        return y

    def reparameterize(self) -> None:
        weight, bias = folded(self.conv, self.bn)
        self.conv = nn.Conv2d(3, 4, self.conv.kernel_size)
        self.conv.weight.data, self.conv.bias.data = weight.detach(), bias.detach()  # type: ignore[union-attr]
        del self.bn

    def fuse(self, a: Tensor, b: Tensor) -> Tensor:
        """Fuse two maps: no folding."""
        return a + b


def network() -> nn.Sequential:
    model = nn.Sequential(Block(), nn.ReLU())
    for _ in range(3):
        model(3 * images())
    return model.eval()


@pytest.mark.parametrize("how", ["itself", "deepcopy", "pickle"])
def test_reparametrisation_of_a_converted_block_is_refused(how: str) -> None:
    model = dcconv.convert(network())
    # The bytes were written on the same line.
    model = {
        "itself": lambda m: m,
        "deepcopy": copy.deepcopy,
        "pickle": lambda m: pickle.loads(pickle.dumps(m)),  # noqa: S301
    }[how](model)
    block = model[0]  # type: ignore[index]
    y = model(images())
    message = r"^dcconv: module must have no decoupled layer for reparameterize\(\) to fold batch"
    with pytest.raises(ValueError, match=message):
        block.reparameterize()
    assert torch.equal(model(images()), y)
    assert torch.equal(block.fuse(y, y), 2 * y)
    # A copy guards itself, not the module that it was copied from.
    assert block.reparameterize.module is block


@pytest.mark.parametrize("how", ["left plain", "as F.conv2d", "replaced"])
def test_reparametrisation_goes_on_where_it_is_right(how: str) -> None:
    model = network()
    if how == "left plain":
        model.append(nn.Conv2d(4, 2, 1))
        dcconv.convert(model, select=lambda name, conv: name == "2", heads="convert")
    elif how == "as F.conv2d":
        dcconv.convert(model, magnitude="linear", weighting="linear")
    else:
        plain = copy.deepcopy(model[0].conv)
        dcconv.convert(model)
        model[0].conv = plain
    y = model(images()).detach()
    model[0].reparameterize()
    assert not hasattr(model[0], "bn")
    check_equal("y", model(images()), y)


def test_pytorchs_fusion_of_modules_refuses_the_layer() -> None:
    model = dcconv.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
    quantization = pytest.importorskip(
        "torch.ao.quantization", reason="this PyTorch has no torch.ao.quantization"
    )
    with pytest.raises((AssertionError, NotImplementedError), match="DecoupledConv2d"):
        quantization.fuse_modules(model, ["0", "1"])
