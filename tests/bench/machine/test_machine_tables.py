"""Predictions in result files, reports and pages."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from rich.console import Console

from bench import report
from bench.__main__ import main
from bench.machine.gemm import GemmPrediction
from bench.machine.predict import Prediction
from bench.machine.tables import machine_tables
from bench.records import Record, plain

PASS = Prediction(
    "epilogue<bfloat16, 8>",
    *(101, 2, 2, 435.2, 221.0, {"ALU": 269.0, "XU": 129.0}, 24.0, 3072.0, 18432.0),
    *({700: 0.36, 1000: 0.33, 1400: 0.31}, "LATENCY"),
)
TILE = GemmPrediction(
    "gemm", 128, 2, (128, 128), 1129.0, 410.0, 507.0, 282.0, 310.0, 700.0, 8400.0, 347.0
)


def record(facts: dict[str, Any], **row: str) -> Record:
    given = {"gpu": "H200", "dtype": "bfloat16", "layout": "channels_last", **row}
    made = Record("machine", given, {}, facts, {"device": "no GPU", "device_type": "none"})
    # As a file gives it back: names of an object are text.
    return Record(**json.loads(json.dumps(plain(dataclasses.asdict(made)))))


RECORDS = [
    record(PASS.row(), function="epilogue", operator="default"),
    record(
        dataclasses.replace(PASS, bandwidth={700: 0.9, 1000: 0.88, 1400: 0.7}, binds="DRAM").row(),
        **{"function": "epilogue", "operator": "default", "dtype": "float32"},
    ),
    record(PASS.row(), function="epilogue", operator="default", gpu="A100"),
    record(TILE.row(), function="implicit_gemm forward 3x3", operator="default", tile="128x128"),
]


def test_dtypes_stand_side_by_side() -> None:
    text = machine_tables({"machine": RECORDS})
    assert text.startswith("Predicted from executed machine code, not measured")
    assert "**Prediction: H200, channels_last**" in text
    assert "**Prediction: A100, channels_last**" in text
    assert (
        "| epilogue, default | 435 / 435 | 1.97 / 1.97 | ALU 269 | 24 / 24 | 3.0 of 18.0 | 2 of 2 "
        "| **0.33** / **0.88** | 0.36, 0.31 | LATENCY / DRAM |"
    ) in text
    assert (
        "| H200, forward 3x3 | 128x128 | default | 2 | 410 | 507 | 282 | 310 | **700** | 347 "
        "| 8400 | 12.0 |"
    ) in text
    assert machine_tables({}) == ""


def write(folder: Path, records: list[Record]) -> Path:
    folder.mkdir()
    lines = [json.dumps(dataclasses.asdict(one)) for one in records]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_pages_show_predictions_beside_what_another_device_measured(tmp_path: Path) -> None:
    timing = {"median": 1.0, "low": 0.9, "high": 1.1, "rounds": 9}
    row = {"function": "tanh", "dtype": "float32", "pass": "fwd"}
    environment = {"device": "Some CPU", "device_type": "cpu"}
    measured = Record("functions", row, {"dcconv": {"timing": timing}}, {}, environment)
    folders = [write(tmp_path / "cpu", [measured]), write(tmp_path / "gpus", RECORDS)]
    page = tmp_path / "page.md"
    page.write_text("<!-- bench machine: begin -->\n<!-- bench machine: end -->\n")
    options = argparse.Namespace(folders=folders, readme=None, into=[page])
    assert report.run(options, Console()) == 0
    text = page.read_text()
    assert "**Prediction: H200, channels_last**" in text and "Measured on" not in text
    assert "**Prediction: H200" in (tmp_path / "gpus/report.md").read_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--gpus", "V100"], "dcconv: gpu must be one of H200, H100, A100, RTX4090, got 'V100'"),
        (["--dtypes", "float64"], "dcconv: dtype must be one of float32, bfloat16, float16, got"),
        (["--layouts", "NHWC"], "dcconv: layout must be one of channels_last, contiguous, got"),
        (["--passes", "stem"], "dcconv: pass must be one of pixel_sumsq, epilogue, grad_dot, grad"),
        (["--operators", "tanh"], "dcconv: operator must be one of default, tanh, radius per"),
        (["--layer", "64,28"], "dcconv: layer must be channels, size, filters and window, as"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["machine", "predict", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(sentence) and said.count("\n") == 1
