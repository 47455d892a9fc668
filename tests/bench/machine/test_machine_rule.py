"""The rule's table: what rows say, and that the package's rule is what they say."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.environment import RESULTS
from bench.machine.gpus import GPUS
from bench.machine.layers import OPERATORS
from bench.machine.rule import CLEAR, Row, Verdict, layers, read_rows, rows, verdicts
from bench.records import Record, read


def test_every_layer_of_the_networks_is_there_once() -> None:
    found = layers()
    assert len({shape for shape, _ in found}) == len(found) == 35
    assert [shape.c for shape, first in found if first] == [3, 3]


def test_rows_are_what_both_strategies_run() -> None:
    rates = SimpleNamespace(
        gpu=GPUS["H200"],
        dtype="bfloat16",
        operator=OPERATORS["default"],
        seconds=lambda function, layer: 1e-5,
        gemm_seconds=lambda function, layer: 1e-4,
    )
    found = list(rows("H200", 256, rates))  # type: ignore[arg-type]
    assert {row.direction for row in found} == {"forward", "input_gradient"}
    forward = [row.layer for row in found if row.direction == "forward"]
    gradient = [row.layer for row in found if row.direction == "input_gradient"]
    assert len(forward) == 35
    # Neither stems nor strided layers have a gradient of x in one pass.
    ungated = [shape for shape, first in layers() if shape.stride == 1 and not first]
    assert sorted(gradient) == sorted(shape._replace(n=256).name for shape in ungated)
    assert all(row.library > 0 and row.fused > 0 for row in found)


TABLE = RESULTS / "machine" / "rule.jsonl"

#: Where the rule loses clearly, by the mean over the GPUs: one pass wins the longest sums of 3x3
#: layers on A100 and RTX 4090, whose libraries' rates are assumed, and loses them on H200.
CLEARLY_SLOWER = {
    ("n256-c384-h8-o384-k3", "forward"),
    ("n256-c384-h8-o384-k3", "input_gradient"),
    ("n256-c512-h7-o512-k3", "forward"),
    ("n256-c512-h7-o512-k3", "input_gradient"),
    ("n256-c512-h14-o512-k3-s2", "forward"),
}

ONE = Row("H200", "n256-c64-h56-o64-k3", "forward", 2.0, 1.0, "library")


def test_gpus_are_weighed_by_their_losses() -> None:
    other = ONE._replace(gpu="A100", library=1.0, fused=1.5)
    (found,) = verdicts([ONE, other])
    assert found == Verdict(ONE.layer, "forward", "fused", pytest.approx(0.25), "library")
    (found,) = verdicts([ONE._replace(rule="fused"), other._replace(rule="fused")])
    assert (found.better, found.loss) == ("fused", 0.0)
    (found,) = verdicts([ONE, other._replace(fused=2.5)])
    assert (found.better, found.loss) == ("library", 0.0)
    assert len(verdicts([ONE, ONE._replace(direction="input_gradient")])) == 2


def test_a_row_is_read_as_it_was_written() -> None:
    asked = {"batch": 256, "dtype": "bfloat16", "operator": "default"}
    record = ONE.record(asked)
    record.facts["rule"] = "what it was then"
    other = Record("machine", {}, {})
    (found,) = read_rows([other, record])
    assert found == ONE._replace(rule=found.rule) and found.rule in ("library", "fused")


def test_the_rule_is_the_tables() -> None:
    """The rows of the committed table in which the rule's strategy is clearly slower are named."""
    found = read_rows(read(Path(TABLE)))
    assert {row.gpu for row in found} == {"H200", "A100", "RTX4090"}
    assert {(row.layer, row.direction) for row in found} >= {
        (shape._replace(n=256).name, "forward") for shape, _ in layers()
    }
    slower = {(one.layer, one.direction) for one in verdicts(found) if one.loss > CLEAR}
    assert slower == CLEARLY_SLOWER
