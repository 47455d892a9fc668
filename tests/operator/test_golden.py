"""Recorded numbers of the official code: printed digits in float64, layer records in float32.

The set-up of the printed digits: x_i = sin(0.7 i + 0.3) (0.5 + 0.1 (i mod 7)) over [2, 5, 6, 3],
w_i = cos(1.3 i + 0.2) over [3, 3, 3, 4], i the row-major index in the official order (channels
last), raw radius v = [0.6, 0.9, 1.1, 1.4], SAME padding, L = sum(y sin(0.37 i + 1)). The layer
records are described in ``golden/README.md``.

The record of the training loss belongs to the training programs, not to the operator.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import check_printed, check_record
from torch import Tensor

import dcconv
from dcconv.functional import decoupled_conv2d, patch_norm
from dcconv.operator.reference import filter_norm

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Row:
    """Printed digits of one layer; ``sums`` are L and the sums of y, y^2, dx, dx^2, dw, dw^2."""

    id: str
    stride: int
    operator: dict[str, Any]
    sums: tuple[str, str, str, str, str, str, str]
    raw_radius_gradient: tuple[str, ...] = ()
    first_output: tuple[str, ...] = ()
    raw_k: tuple[float, ...] = ()
    raw_k_gradient: tuple[str, ...] = field(default=())


def row(id_: str, stride: int, magnitude: str, angular: str, sums: str, **more: Any) -> Row:
    first, second, third, fourth, fifth, sixth, seventh = sums.split()
    digits = (first, second, third, fourth, fifth, sixth, seventh)
    return Row(
        f"{id_}-s{stride}", stride, {"magnitude": magnitude, "angular": angular}, digits, **more
    )


def digits(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ROWS = (
    row(
        "linear-cos", 1, "linear", "cosine",
        "-1.043393 -1.106986 20.56468 0.1178459 29.61644 3.201151 40.21760",
    ),
    row(
        "linear-cos", 2, "linear", "cosine",
        "0.6453261 -0.5910684 4.548032 -0.1515597 9.104178 -1.432534 15.05680",
    ),
    row(
        "linear-sqcos", 1, "linear", "square_cosine",
        "-0.06815836 -0.4780908 0.5686173 -0.2892397 2.110061 -0.7452815 2.834118",
    ),
    row(
        "linear-sqcos", 2, "linear", "square_cosine",
        "0.1212647 -0.1302334 0.1524889 0.3314171 0.5503001 -0.3787189 1.004833",
    ),
    row(
        "ball-cos", 1, "ball", "cosine",
        "-0.1960556 0.02737991 2.158408 -0.1130884 3.947234 1.075150 4.440496",
        raw_radius_gradient=digits("0 -0.157299 2.734217 -0.182420"),
        first_output=digits("0.03232690 -0.02340613 -0.02809022 0.00009349868"),
    ),
    row(
        "ball-cos", 2, "ball", "cosine",
        "-0.04719329 0.05991246 0.5255051 0.3216838 1.373431 -0.6738334 1.938007",
        raw_radius_gradient=digits("0 0.756877 0.454644 -0.561662"),
    ),
    row(
        "seg-cos", 1, "segmented", "cosine",
        "-2.363561 -1.485542 16.62580 0.04814743 23.72800 2.795941 33.67305",
        raw_radius_gradient=digits("2.709804 -1.337218 -0.177192 0"),
        first_output=digits("0.04629223 -0.04904361 -0.08792060 0.0004740213"),
    ),
    row(
        "seg-cos", 2, "segmented", "cosine",
        "0.4793320 -0.7775110 3.676263 0.1305535 8.264554 -0.7854354 12.49131",
        raw_radius_gradient=digits("0.682660 -0.814369 0.149884 0"),
    ),
    row(
        "tanh-cos", 1, "tanh", "cosine",
        "0.1501771 0.07848327 1.738844 -0.1479868 3.230700 0.9295976 3.538080",
        raw_radius_gradient=digits("-0.293088 0.376089 1.486956 -0.156152"),
        first_output=digits("0.03132337 -0.01844909 -0.02499202 0.00008921848"),
    ),
    row(
        "tanh-cos", 2, "tanh", "cosine",
        "0.05611092 0.08224806 0.4315939 0.1453563 1.057508 -0.6540068 1.532191",
        raw_radius_gradient=digits("-0.088710 0.572816 0.220535 -0.432293"),
    ),
    row(
        "sphere-cos", 1, "sphere", "cosine",
        "-0.3157255 -0.6164745 2.856903 -0.4903103 4.423298 1.195098 6.601194",
    ),
    row(
        "sphere-linear", 1, "sphere", "linear",
        "-0.2001383 -0.3981436 1.168602 -0.3150942 1.812569 0.7314819 2.700240",
    ),
    row(
        "sphere-sigmoid", 1, "sphere", "sigmoid",
        "-0.5403010 -0.9743259 7.784871 -0.7886065 11.99413 2.317835 18.03960",
    ),
    row(
        "sphere-sigmoid-learned", 1, "sphere", "sigmoid",
        "0.3993417 -0.1277321 3.167384 -0.5819475 5.231799 1.355175 6.753325",
        raw_k=(0.3, 0.7, -0.5, 1.2),
        raw_k_gradient=digits("-6.123717 0.266540 -2.278306 -0.039163"),
    ),
)  # fmt: skip


def official_input(device: str = "cpu") -> Tensor:
    """Return x as [2, 3, 5, 6]."""
    i = torch.arange(2 * 5 * 6 * 3, dtype=torch.float64)
    values = torch.sin(0.7 * i + 0.3) * (0.5 + 0.1 * (i % 7))
    return values.reshape(2, 5, 6, 3).permute(0, 3, 1, 2).contiguous().to(device)


def official_filters(device: str = "cpu") -> Tensor:
    """Return w as [4, 3, 3, 3]."""
    i = torch.arange(3 * 3 * 3 * 4, dtype=torch.float64)
    values = torch.cos(1.3 * i + 0.2)
    return values.reshape(3, 3, 3, 4).permute(3, 2, 0, 1).contiguous().to(device)


def probe(y: Tensor) -> Tensor:
    """Return the official gradient of y, in y's order of axes."""
    n, o, p, q = y.shape
    i = torch.arange(y.numel(), dtype=torch.float64, device=y.device)
    return torch.sin(0.37 * i + 1.0).reshape(n, p, q, o).permute(0, 3, 1, 2)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_printed_digits_of_every_layer(row: Row, backend: str, device: str) -> None:
    x = official_input(device).requires_grad_()
    weight = official_filters(device).requires_grad_()
    raw_radius = torch.tensor([0.6, 0.9, 1.1, 1.4], dtype=torch.float64, device=device)
    raw_radius.requires_grad_()
    raw_k = torch.tensor(row.raw_k, dtype=torch.float64, device=device).requires_grad_()
    y = decoupled_conv2d(
        x,
        weight,
        stride=row.stride,
        padding="same",
        radius=raw_radius.square() + 1e-4,
        norm_mean="batch",
        k=raw_k.abs() + 0.05 if row.raw_k else 0.3,
        **row.operator,
    )
    loss = (y * probe(y)).sum()
    loss.backward()
    assert x.grad is not None
    assert weight.grad is not None
    values = (
        loss,
        y.sum(),
        y.square().sum(),
        x.grad.sum(),
        x.grad.square().sum(),
        weight.grad.sum(),
        weight.grad.square().sum(),
    )
    names = ("L", "sum y", "sum y^2", "sum dx", "sum dx^2", "sum dw", "sum dw^2")
    for name, value, printed in zip(names, values, row.sums, strict=True):
        check_printed(f"{row.id}: {name}", value.detach(), printed)
    for name, leaf, expected in (
        ("dv", raw_radius, row.raw_radius_gradient),
        ("dk", raw_k, row.raw_k_gradient),
    ):
        for o, printed in enumerate(expected):
            assert leaf.grad is not None
            check_printed(f"{row.id}: {name}[{o}]", leaf.grad[o], printed)
    for o, printed in enumerate(row.first_output):
        check_printed(f"{row.id}: y[0, 0, 0, {o}]", y[0, o, 0, 0].detach(), printed)


@pytest.mark.parametrize(
    ("stride", "mean", "first"), [(1, "2.58651", "1.932604"), (2, "2.45566", "2.546144")]
)
def test_printed_patch_norms(stride: int, mean: str, first: str, backend: str, device: str) -> None:
    b = patch_norm(official_input(device), 3, stride, "same")
    check_printed("m", b.mean(), mean)
    check_printed("b[0, 0, 0]", b[0, 0, 0, 0], first)


def official_layer() -> dcconv.DecoupledConv2d:
    layer = dcconv.DecoupledConv2d(3, 4, 3, padding="same", dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(official_filters())
    return layer


def test_printed_filter_norms() -> None:
    printed = ("3.729298", "3.610115", "3.727354", "3.646044")
    for got, want in zip(filter_norm(official_filters(), 1e-4), printed, strict=True):
        check_printed("a", got, want)


def test_printed_norms_after_projection() -> None:
    layer = official_layer()
    dcconv.project_weights(layer)
    norms = layer.weight.detach().flatten(1).norm(dim=1)
    printed = ("0.9999964", "0.9999960", "0.9999964", "0.9999963")
    for got, want in zip(norms, printed, strict=True):
        check_printed("norm", got, want)


def test_printed_orthogonality_penalty() -> None:
    penalty = dcconv.orthogonality_penalty(official_layer())
    check_printed("penalty", penalty.detach(), "0.0000222376")


RECORDS = sorted(GOLDEN.glob("layer_*.npz"))

OPERATORS = {
    "linear_cos": ("linear", "cosine"),
    "linear_sqcos_wo_bn": ("linear", "square_cosine"),
    "ball_cos": ("ball", "cosine"),
    "tanh_cos": ("tanh", "cosine"),
    "seg_cos": ("segmented", "cosine"),
}


def test_every_record_is_there() -> None:
    assert len(RECORDS) == 3 * len(OPERATORS)


def channels_first(array: Any) -> Tensor:
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem.removeprefix("layer_"))
def test_layer_matches_its_record(
    path: Path, dtype: torch.dtype, backend: str, device: str
) -> None:
    name, _, geometry = path.stem.removeprefix("layer_").partition("_k")
    _, stride, padding, _ = geometry.split("_")
    with np.load(path, allow_pickle=False) as stored:
        record = {key: stored[key] for key in stored.files}
    filters = torch.from_numpy(record["filter"]).permute(3, 2, 0, 1)
    magnitude, angular = OPERATORS[name]
    layer = dcconv.DecoupledConv2d(
        filters.shape[1],
        filters.shape[0],
        tuple(filters.shape[2:]),
        stride=int(stride.removeprefix("s")),
        padding=padding,
        magnitude=magnitude,
        angular=angular,
        dtype=dtype,
    ).to(device)
    with torch.no_grad():
        layer.weight.copy_(filters)
        if layer.radius_raw is not None:
            layer.radius_raw.copy_(torch.from_numpy(record["radius"]).flatten())
    assert (layer.radius_raw is not None) == ("radius" in record)
    x = channels_first(record["x_nhwc"]).to(device, dtype).requires_grad_()
    y = layer(x)
    y.backward(channels_first(record["grad_y_nhwc"]).to(device, dtype))
    assert x.grad is not None
    assert layer.weight.grad is not None
    check_record("y", y.cpu(), channels_first(record["y_nhwc"]))
    check_record("grad_x", x.grad.cpu(), channels_first(record["grad_x_nhwc"]))
    want = torch.from_numpy(record["grad_filter"]).permute(3, 2, 0, 1)
    check_record("grad_filter", layer.weight.grad.cpu(), want)
    if layer.radius_raw is not None:
        assert layer.radius_raw.grad is not None
        want = torch.from_numpy(record["grad_radius"]).flatten()
        check_record("grad_radius", layer.radius_raw.grad.cpu(), want)
