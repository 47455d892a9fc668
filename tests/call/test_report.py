"""The report over runs: figures, table, Markdown, curves and damaged logs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from train import report

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def line(step: int, loss: float | None, **more: float) -> dict:
    speeds = {"images_per_second": 100.0 * step, "step_seconds": 0.01 * step}
    shares = {"waiting_share": 0.001 * step, "peak_bytes": step * 2**20}
    return {"kind": "train", "step": step, "loss": loss, **speeds, **shares, **more}


def write_run(path: Path, records: list[dict]) -> Path:
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (path / "config.yaml").write_text("operator: tanh_cosine\nsteps: 3\n")
    (path / "results.json").write_text('{"parameters": 12345}')
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(
        tmp_path / "first",
        [
            line(1, 2.0),
            {"kind": "evaluate", "step": 1, "accuracy": 50.0},
            line(2, 1.0),
            {"kind": "evaluate", "step": 2, "accuracy": 75.5},
            line(4, 0.5),
            {"kind": "evaluate", "step": 4, "accuracy": 70.25},
        ],
    )


def test_row_has_final_best_and_medians(run, capsys):
    assert report.main([str(run), "--markdown"]) == 0
    header, rule, row = capsys.readouterr().out.splitlines()
    names = [cell.strip() for cell in header.strip("|").split("|")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert dict(zip(names, cells, strict=True)) == {
        "run": "first",
        "operator": "tanh_cosine",
        "parameters": "12,345",
        "final %": "70.25",
        "best %": "75.50",
        "steps": "4",
        "images/s": "200",
        "ms/step": "20",
        "x conv": report.NOTHING,
        "peak MiB": "4",
        "peak x conv": report.NOTHING,
        "waiting %": "0.20",
    }
    assert rule.count("---") == len(names)
    assert (run / "curves.png").read_bytes().startswith(PNG_SIGNATURE)


def test_table_has_every_run_and_nothing_where_nothing_is_known(run, tmp_path, capsys):
    other = write_run(tmp_path / "second", [line(1, None)])
    for name in ("config.yaml", "results.json"):
        (other / name).unlink()
    out = tmp_path / "both.png"
    assert report.main([str(run), str(other), "--out", str(out)]) == 0
    output = capsys.readouterr().out
    (first,) = [text for text in output.splitlines() if "first" in text]
    (second,) = [text for text in output.splitlines() if "second" in text]
    assert first.split()[:5] == ["first", "tanh_cosine", "12,345", "70.25", "75.50"]
    nothing = report.NOTHING
    figures = ["1", "100", "10", nothing, "1", nothing, "0.10"]
    assert second.split() == ["second", *[nothing] * 4, *figures]
    assert f"Curves in {out}" in output
    assert out.read_bytes().startswith(PNG_SIGNATURE)


def test_time_and_memory_are_multiples_of_the_plain_network(run, tmp_path, capsys):
    for name, records, config in (
        ("wider", [line(3, 2.0)], "operator: conv\nwidths: [9]\n"),
        ("plain", [line(1, 2.0), line(2, 2.0)], "operator: conv\n"),
    ):
        (write_run(tmp_path / name, records) / "config.yaml").write_text(config)
    paths = [str(tmp_path / name) for name in ("wider", "first", "plain")]
    assert report.main([*paths, "--markdown", "--out", str(tmp_path / "x.png")]) == 0
    header, _, *rows = [
        [cell.strip() for cell in text.strip("|").split("|")]
        for text in capsys.readouterr().out.splitlines()
    ]
    found = [(row[header.index("x conv")], row[header.index("peak x conv")]) for row in rows]
    # Steps of 30, 20 and 15 ms, peaks of 3, 4 and 2 MiB.
    assert found == [("1.00", "1.00"), ("1.33", "2.00"), ("1.00", "1.00")]


def test_series_leave_out_what_has_no_figure(run):
    read = report.read_run(run, print)
    assert read.series("train", "loss") == ([1, 2, 4], [2.0, 1.0, 0.5])
    assert read.series("evaluate", "loss") == ([], [])
    assert read.median("lr") is None


def test_damaged_lines_are_reported_with_file_and_line_and_skipped(run, capsys):
    file = run / "metrics.jsonl"
    file.write_text(file.read_text().replace('{"kind": "train", "step": 2', '{"kind": "tra', 1))
    assert report.main([str(run), "--markdown"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"dcconv: {file}:3 must be a record of the log, got ")
    assert said.err.count("\n") == 1
    assert "| 250 |" in said.out


def test_damaged_results_are_reported(run, capsys):
    (run / "results.json").write_text("{")
    assert report.main([str(run), "--markdown"]) == 0
    said = capsys.readouterr()
    assert "dcconv: run must have a readable results.json, got" in said.err
    assert "| tanh_cosine | – |" in said.out  # noqa: RUF001


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "dcconv: run must be the folder of a run, got "),
        (["empty"], "dcconv: run must have a readable metrics.jsonl, got "),
        (["first", "--out", "none/x.png"], "dcconv: out must be a file that can be written, got"),
    ],
)
def test_wrong_argument_ends_with_the_house_sentence(
    run, tmp_path, monkeypatch, capsys, arguments, message
):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert report.main(arguments) == 2
    assert capsys.readouterr().err.startswith(message)


def test_curves_of_a_run_without_figures_are_empty(tmp_path):
    run = report.read_run(write_run(tmp_path / "x", []), print)
    assert report.draw_curves([run]).startswith(PNG_SIGNATURE)
