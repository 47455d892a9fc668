"""Networks out of predictions: what their milliseconds are made of, and what they are taken for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from bench.layers import NETWORKS
from bench.layers import Layer as Shape
from bench.machine import kept, network, simulate
from bench.machine.disassemble import Kernel
from bench.machine.fused import GEMM, GEMM_GRADIENT
from bench.machine.gpus import GPUS
from bench.machine.layers import OPERATORS, Layer
from bench.machine.network import COPY_SHARE, LAUNCH, chosen, layer_times, network_times, totals
from bench.machine.rates import small_layer, waves
from bench.machine.tables import machine_tables
from bench.records import Record, plain

H200 = GPUS["H200"]

#: Microseconds of every kernel, so that sums tell which were counted.
KERNELS = {
    **{"pixel_sumsq": 1.0, "window_norm": 10.0, "epilogue": 100.0, "grad_dot": 1000.0},
    **{"grad_input": 1e4, "stem": 1e5, GEMM: 2e5, GEMM_GRADIENT: 3e5},
}


def rates(operator: str = "default", dtype: str = "bfloat16") -> Any:
    def seconds(function: str, layer: Layer) -> float:
        return KERNELS[function] * 1e-6

    return SimpleNamespace(
        gpu=H200, dtype=dtype, operator=OPERATORS[operator], seconds=seconds, gemm_seconds=seconds
    )


SQUARE = Shape(256, 64, 56, 64, 3)


def filters(shape: Shape, tensors: int) -> float:
    return tensors * 2 * shape.o * shape.patch_size / H200.dram


def test_strategies_are_sums_of_their_kernels() -> None:
    found = layer_times(SQUARE, rates(), first=False)
    convolution = found.plain_forward
    maps = 11e-6 + 3 * LAUNCH + filters(SQUARE, 1)
    assert found.library_forward == pytest.approx(maps + convolution + 100e-6 + LAUNCH)
    assert found.fused_forward == pytest.approx(maps + 2e5 * 1e-6 + LAUNCH)
    assert found.library_input == pytest.approx(convolution + 1e-2 + LAUNCH)
    assert found.fused_input == pytest.approx(3e5 * 1e-6 + LAUNCH)
    rest = 1e-3 + convolution + 3 * LAUNCH + filters(SQUARE, 3)
    assert found.rest == pytest.approx(rest)
    assert found.plain_backward == pytest.approx(2 * convolution)


def test_the_mean_of_the_norms_is_a_barrier() -> None:
    pointwise = Shape(256, 64, 56, 64, 1)
    with_mean = layer_times(pointwise, rates(), first=False)
    without = layer_times(pointwise, rates("tanh, one radius"), first=False)
    # One pass over single pixels finds their norms itself, where no mean of all comes first.
    assert with_mean.fused_forward is not None and without.fused_forward is not None
    saved = with_mean.fused_forward - without.fused_forward
    assert saved == pytest.approx(11e-6 + 2 * LAUNCH)
    assert with_mean.library_forward == without.library_forward
    square = layer_times(SQUARE, rates("tanh, one radius"), first=False)
    assert square.fused_forward == layer_times(SQUARE, rates(), first=False).fused_forward


def test_a_first_layer_has_no_gradient_of_x() -> None:
    stem = Shape(256, 3, 224, 64, 7, 2)
    found = layer_times(stem, rates(), first=True)
    assert found.library_input == 0 and found.fused_input is None
    assert found.backward("fused") == found.backward("library") == found.rest
    assert found.fused_forward == pytest.approx(1e5 * 1e-6 + 11e-6 + 4 * LAUNCH + filters(stem, 1))
    assert "gemm" not in found.parts


def test_what_one_pass_cannot_do_is_left_to_the_library() -> None:
    strided = layer_times(Shape(256, 64, 56, 128, 3, 2), rates(), first=False)
    assert strided.fused_input is None and strided.fused_forward is not None
    assert strided.backward("fused") == strided.backward("library")
    single = layer_times(SQUARE, rates(dtype="float32"), first=False)
    assert single.fused_forward is None and single.forward("fused") == single.library_forward
    assert single.row()["can"] == {"fused_forward": False, "fused_input": False}


def test_a_convolution_is_bound_by_products_or_by_bytes() -> None:
    found = layer_times(Shape(256, 512, 7, 512, 3), rates(), first=False).plain_forward
    flops = 2 * 256 * 49 * 512 * 512 * 9
    assert found == pytest.approx(flops / (0.7 * H200.matrix_rate) + LAUNCH)
    thin = Shape(256, 64, 56, 256, 1)
    size = 2 * (256 * 56 * 56 * (64 + 256) + 64 * 256)
    expected = size / H200.dram / COPY_SHARE + LAUNCH
    assert layer_times(thin, rates(), first=False).plain_forward == pytest.approx(expected)


def test_a_stride_of_single_pixels_skips_pixels_forward_alone() -> None:
    found = layer_times(Shape(256, 64, 56, 8, 1, 2), rates(), first=False)
    positions = 256 * 28 * 28
    small = 2 * (positions * (64 + 8) + 64 * 8) / H200.dram / COPY_SHARE
    whole = 2 * (positions * (4 * 64 + 8) + 64 * 8) / H200.dram / COPY_SHARE
    assert found.plain_forward == pytest.approx(small + LAUNCH)
    assert found.plain_backward == pytest.approx(small + whole + 2 * LAUNCH)


def test_the_rule_is_the_packages_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(Shape(256, 512, 7, 512, 3), "bfloat16", True) == ("library", "library")
    assert chosen(Shape(256, 64, 56, 64, 1), "bfloat16", True)[1] == "fused"
    # Stride 2 and float32 have no gradient of x in one pass, whatever the rule prefers.
    assert chosen(Shape(256, 64, 56, 128, 1, 2), "bfloat16", True)[1] == "library"
    assert chosen(Shape(256, 64, 56, 64, 1), "float32", True) == ("library", "library")
    seen = []

    def by_rule(key: Any, willing: Any) -> str:
        seen.append((key.direction, key.c, key.o, key.norm, tuple(willing)))
        return str(willing[-1])

    monkeypatch.setattr(network, "by_rule", by_rule)
    assert chosen(SQUARE, "bfloat16", True) == ("fused", "fused")
    both = ("library", "fused")
    directions = ("forward", "input_gradient")
    assert seen == [(name, 64, 64, "batch", both) for name in directions]


def test_totals_count_every_layer() -> None:
    found = list(network_times("resnet18", 256, rates()))
    assert [(shape._replace(n=128), count) for shape, count, _ in found] == [
        (entry.layer, entry.times) for entry in NETWORKS["resnet18"]
    ]
    forward, backward = totals(found, "library")
    assert forward == pytest.approx(sum(n * t.library_forward for _, n, t in found))
    assert backward == pytest.approx(sum(n * t.backward("library") for _, n, t in found))
    best, plain_ = totals(found, "best"), totals(found, "plain")
    assert plain_[0] < best[0] <= min(forward, totals(found, "rule")[0])
    assert best[1] <= min(backward, totals(found, "fused")[1])


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [(4, 2.0), (8, 4.0), (9, 4 + 1.25), (10, 4 + 1.25), (11, 6.0), (12, 6.0), (1, 1.25), (3, 2.0)],
)
def test_blocks_come_in_waves(blocks: int, expected: float) -> None:
    assert waves(blocks, multiprocessors=2, resident=2, alone=1.25) == expected


def test_layers_are_executed_with_few_and_small_images() -> None:
    for entry in NETWORKS["resnet50"]:
        shape = entry.layer
        layer = Layer(256, shape.c, shape.size, shape.o, shape.k, shape.stride)
        small = small_layer(layer, 512)
        assert (small.c, small.o, small.kernel) == (shape.c, shape.o, shape.k)
        assert small.stride == shape.stride and small.positions >= 512
        assert small.size == min(32, {7: 8, 14: 16}.get(shape.size, 32)) and small.n >= 2


def test_figures_are_kept_by_what_they_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulate, "CACHE", tmp_path)
    kernel = Kernel("k", "k", "sm_90a", (), 32, 0, 0)
    made: list[int] = []

    def make() -> dict[str, int]:
        made.append(1)
        return {"made": len(made)}

    assert kept.kept(kernel, {"n": 1}, make) == kept.kept(kernel, {"n": 1}, make) == {"made": 1}
    assert kept.kept(kernel, {"n": 2}, make) == {"made": 2}
    for other in ({"registers": 33}, {"arch": "sm_80"}, {"tables": b"\1"}):
        changed = dataclasses.replace(kernel, **other)
        assert kept.kept(changed, {"n": 1}, make) == {"made": len(made)}
    assert len(made) == 5
    monkeypatch.setattr(kept, "_model", lambda: "another model")
    assert kept.kept(kernel, {"n": 1}, make) == {"made": 6}


def record(shape: Shape, count: int, first: bool) -> Record:
    row = {
        **{"gpu": "H200", "network": "two", "batch": 256, "dtype": "bfloat16"},
        **{"operator": "default", "layer": shape.name, "count": count},
    }
    made = Record("machine_network", row, {}, layer_times(shape, rates(), first).row())
    return Record(**json.loads(json.dumps(plain(dataclasses.asdict(made)))))


def test_tables_have_totals_and_layers() -> None:
    stem = record(Shape(256, 3, 224, 64, 7, 2), 1, first=True)
    text = machine_tables({"machine_network": [stem, record(SQUARE, 3, first=False)]})
    assert "**Prediction: H200, two, 256, bfloat16, default.**" in text
    (total,) = [line for line in text.splitlines() if line.startswith("| H200, two")]
    both = [stem.facts, record(SQUARE, 3, first=False).facts]
    forward, backward = (both[0]["library_ms"][i] + 3 * both[1]["library_ms"][i] for i in (0, 1))
    assert f"| {forward + backward:.1f} ({forward:.1f} + {backward:.1f}) |" in total
    (line,) = [line for line in text.splitlines() if line.startswith("| n256-c64-h56")]
    assert "| 3 | fused, fused |" in line and line.endswith("| library, library |")
