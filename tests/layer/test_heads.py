"""Last layers, gates and heads: dcconv.convert names them, leaves them or takes them over."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dcconv
from dcconv import DecoupledConv2d, heads


class SqueezeExcite(nn.Module):
    """As timm writes it; the sigmoid may be a function."""

    def __init__(self, functional: bool = False) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(8, 2, 1)
        self.act = nn.ReLU()
        self.conv_expand = nn.Conv2d(2, 8, 1)
        if not functional:
            self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_expand(self.act(self.conv_reduce(x.mean((2, 3), keepdim=True))))
        return x * y.sigmoid()


def block() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = block()
        self.head = nn.ModuleDict(
            {
                "conv": nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()),
                "cls_logits": nn.Conv2d(8, 3, 3),
                "bbox_pred": nn.Conv2d(8, 4, 1),
            }
        )
        self.neck = block()


class Detect(nn.Module):
    """As ultralytics has it: no name says that it is a head, its class does."""

    def __init__(self) -> None:
        super().__init__()
        self.cv2 = nn.ModuleList(nn.Sequential(block(), nn.Conv2d(8, 5, 1)) for _ in range(2))
        self.after = block()


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(block(), block())
        self.classifier = nn.Sequential(block(), nn.Dropout(), nn.Conv2d(8, 5, 1))
        self.aux_classifier = nn.Sequential(
            block(), nn.Conv2d(8, 5, 1), nn.Upsample(scale_factor=2)
        )


NETWORKS: dict[str, tuple[nn.Module, dict[str, str]]] = {
    "last": (nn.Sequential(block(), nn.Conv2d(8, 3, 3), nn.Flatten()), {"1": heads.LAST}),
    "last, then activation": (
        nn.Sequential(block(), nn.Conv2d(8, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        {"1": heads.LAST},
    ),
    "classifier after": (nn.Sequential(block(), nn.Conv2d(8, 3, 3), nn.Linear(3, 2)), {}),
    "norm after": (nn.Sequential(block(), block()), {}),
    "norm without parameters": (
        nn.Sequential(nn.Conv2d(8, 3, 3), nn.InstanceNorm2d(3)),
        {},
    ),
    "gates": (
        nn.Sequential(SqueezeExcite(), block(), SqueezeExcite(functional=True), block()),
        {f"{i}.{name}": heads.GATE for i in (0, 2) for name in ("conv_reduce", "conv_expand")},
    ),
    "gate in a row": (
        nn.Sequential(
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid()), block()
        ),
        {"0.1": heads.GATE},
    ),
    "spatial gate": (
        nn.Sequential(nn.Sequential(nn.Conv2d(2, 1, 7), nn.Sigmoid()), block()),
        {"0.0": heads.GATE},
    ),
    "detector": (Detector(), {"head.cls_logits": heads.HEAD, "head.bbox_pred": heads.HEAD}),
    "detect": (nn.Sequential(block(), Detect()), {f"1.cv2.{i}.1": heads.HEAD for i in range(2)}),
    "segmenter": (
        Segmenter(),
        {"classifier.2": heads.HEAD, "aux_classifier.1": heads.LAST},
    ),
    "one layer": (nn.Conv2d(3, 4, 3), {}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_special_layers_are_found_by_place_and_name(name: str) -> None:
    network, want = NETWORKS[name]
    candidates = [(n, part) for n, part in network.named_modules() if type(part) is nn.Conv2d]
    assert heads.find(network, candidates) == want


def converted(network: nn.Module) -> set[str]:
    return {n for n, part in network.named_modules() if isinstance(part, DecoupledConv2d)}


def test_special_layers_are_named_and_converted_by_default() -> None:
    network = Segmenter()
    names = {n for n, part in network.named_modules() if type(part) is nn.Conv2d}
    with pytest.warns(RuntimeWarning) as caught:
        dcconv.convert(network)
    assert converted(network) == names
    (text,) = [str(w.message) for w in caught]
    assert text.startswith("dcconv: convert took over what looks like last layers, gates or heads")
    assert text.endswith("'classifier.2' (a head), 'aux_classifier.1' (the last layer)")
    assert caught[0].filename == __file__


def test_special_layers_are_left_plain_on_request() -> None:
    network = Segmenter()
    names = {n for n, part in network.named_modules() if type(part) is nn.Conv2d}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dcconv.convert(network, heads="plain")
    assert names - converted(network) == {"classifier.2", "aux_classifier.1"}


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        ({"heads": "convert"}, {}),
        ({"select": lambda name, conv: "classifier" not in name}, {}),
        ({}, {"magnitude": "linear", "weighting": "linear"}),
    ],
    ids=["asked for", "not selected", "F.conv2d"],
)
def test_nothing_is_said_where_nothing_is_the_matter(
    options: dict[str, Any], keywords: dict[str, Any]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dcconv.convert(Segmenter(), **options, **keywords)


def test_plain_head_lets_bounded_networks_learn_what_a_converted_one_cannot() -> None:
    """More classes than a bound of 1 on the logits can tell apart."""
    losses = {}
    for choice in ("plain", "convert"):
        torch.manual_seed(0)
        x, labels = torch.randn(40, 8, 6, 6), torch.arange(40)
        body = nn.Sequential(nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64), nn.ReLU())
        network = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Conv2d(64, 40, 1), nn.Flatten())
        dcconv.convert(network, heads=choice, magnitude="sphere")
        optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(x), labels)
            loss.backward()
            optimizer.step()
        losses[choice] = loss.item()
    assert losses["plain"] < 0.3
    # With logits in [-1, 1] the loss of 40 classes is at least log(1 + 39 / e ** 2) = 1.84.
    assert losses["convert"] > 1.8


@pytest.mark.parametrize(
    ("network", "keywords", "kind", "message"),
    [
        (
            Segmenter(),
            {"heads": "leave"},
            ValueError,
            "heads must be one of warn, plain, convert, got 'leave'",
        ),
        (
            Segmenter(),
            {"heads": True},
            TypeError,
            "heads must be one of warn, plain, convert, got bool",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1)),
            {"heads": "plain"},
            ValueError,
            "heads must be 'warn' or 'convert' where every chosen layer is a last layer, gate or "
            "head, got 'plain'",
        ),
    ],
)
def test_wrong_choice_is_refused(
    network: nn.Module, keywords: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=f"^dcconv: {re.escape(message)}$"):
        dcconv.convert(network, **keywords)
    assert not converted(network)


MODELS: dict[str, set[str]] = {
    "segmentation.deeplabv3_resnet50": {"classifier.4"},
    "segmentation.lraspp_mobilenet_v3_large": {
        "classifier.scale.1",
        "classifier.low_classifier",
        "classifier.high_classifier",
    },
    "detection.fcos_resnet50_fpn": {
        "head.classification_head.cls_logits",
        "head.regression_head.bbox_reg",
        "head.regression_head.bbox_ctrness",
    },
    "detection.fasterrcnn_resnet50_fpn": {"rpn.head.cls_logits", "rpn.head.bbox_pred"},
    "resnet18": set(),
    "squeezenet1_1": {"classifier.1"},
}


@pytest.mark.parametrize("name", MODELS)
def test_special_layers_of_well_known_networks(name: str) -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    place: Any = models
    for part in name.split("."):
        place = getattr(place, part)
    options = {"weights": None} if "." not in name else {"weights": None, "weights_backbone": None}
    network = place(**options)
    candidates = [(n, part) for n, part in network.named_modules() if type(part) is nn.Conv2d]
    found = heads.find(network, candidates)
    gates = {n for n in found if n.startswith("backbone.")}
    # The backbone of LR-ASPP is a MobileNetV3 with eight gates of two layers each.
    assert len(gates) == (16 if "mobilenet_v3" in name else 0)
    assert set(found) - gates == MODELS[name]
