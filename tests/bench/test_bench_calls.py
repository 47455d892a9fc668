"""The measurement of a call's cost: it runs, its rows are kept, its figures are per call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import calls
from bench.records import Record


def test_rows_are_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    options = ["--quick", "--device", "cpu", "--min-time", "0", "--rounds", "2"]
    assert command.main(["calls", *options, "--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    lines = (tmp_path / "calls.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    kept = [(r["row"]["call"], r["row"]["pass"]) for r in rows]
    assert kept == [(form, which) for form in calls.FORMS for which in ("fwd", "fwd+bwd")]
    assert all(form in said for form in calls.FORMS)
    for row in rows:
        assert set(row["results"]) == {calls.PLAIN, calls.OWN}
        assert row["row"]["threads"] == threads


def test_table_shows_microseconds_of_one_call() -> None:
    times = {calls.PLAIN: {"timing": {"median": 0.010}}, calls.OWN: {"timing": {"median": 0.025}}}
    table = calls.table_of([Record("calls", {"call": "training", "pass": "fwd"}, times)])
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells == ["training", "fwd", "10.0", "25.0", "15.0", "2.50"]


@pytest.mark.parametrize("form", calls.FORMS)
def test_calls_of_a_form_have_the_same_shape_and_mode(form: str) -> None:
    found = calls.callables(form, "cpu")
    x = torch.randn(1, calls.CHANNELS, calls.PIXELS, calls.PIXELS)
    assert found[calls.PLAIN](x).shape == found[calls.OWN](x).shape
    own = found[calls.OWN]
    if form == calls.TRAINING:
        assert own.norm_mean_steps.item() == 1
    elif form == calls.EVALUATION:
        assert own.norm_mean_steps.item() == 0
