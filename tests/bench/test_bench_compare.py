"""The comparison of two result files: thresholds, spreads, drift, accuracy, memory, exit status."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import bench.__main__
from bench import compare
from bench.records import Record

OURS = "dcconv-cpu"


def record(
    layer: str = "n8-c64-h56-o64-k3",
    kind: str = "ops",
    device: str = "Some CPU",
    spread: float = 0.02,
    **medians: float,
) -> Record:
    """Return a row with F.conv2d at 10 ms and dcconv at 12, and others as named."""
    times = {"conv2d": 10.0, "dcconv_cpu": 12.0} | medians
    results: dict[str, dict[str, Any]] = {}
    for name, median in times.items():
        timing = {"median": median, "low": median * (1 - spread / 2)}
        timing |= {"high": median * (1 + spread / 2), "rounds": 7}
        results[name.replace("_", "-")] = {
            "timing": timing,
            "note": None,
            "kept": {"total": 1000, "x": 500},
            "chain": {"total": 2000, "x": 500},
            "peak": 4000,
        }
    row = {"layer": layer, "dtype": "float32", "pass": "fwd+bwd"}
    return Record(kind, row, results, {"own": OURS}, {"device": device})


def save(path: Path, *records: Record) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(dataclasses.asdict(each)) for each in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(*arguments: object) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    file = io.StringIO()
    options = parser.parse_args([str(a) for a in arguments])
    return compare.run(options, Console(file=file, width=200)), file.getvalue()


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return save(tmp_path / "a.jsonl", record())


def judge(before: Path, after: Record, *arguments: object) -> int:
    return run(before, save(before.parent / "b.jsonl", after), *arguments)[0]


def test_equal_files_have_no_regression(before: Path) -> None:
    status, said = run(before, before)
    assert status == 0
    assert "No regression of dcconv beyond 10%." in said
    assert "1 rows in common, 2 times compared" in said


@pytest.mark.parametrize(
    ("median", "threshold", "status"),
    [(13.3, 0.10, 1), (13.1, 0.10, 0), (15.0, 0.25, 0), (15.1, 0.25, 1), (9.0, 0.10, 0)],
)
def test_slower_beyond_the_threshold_is_a_regression(
    before: Path, median: float, threshold: float, status: int
) -> None:
    assert judge(before, record(dcconv_cpu=median), "--threshold", threshold) == status


def test_the_threshold_itself_is_no_regression(tmp_path: Path) -> None:
    a = save(tmp_path / "a.jsonl", record(dcconv_cpu=10.0))
    assert judge(a, record(dcconv_cpu=11.0)) == 0
    assert judge(a, record(dcconv_cpu=11.001)) == 1


def test_intervals_that_meet_are_no_regression(before: Path) -> None:
    # A is 12 with its 80th percentile at 12.12.
    after = record(dcconv_cpu=14.0)
    timing = after.results[OURS]["timing"]
    timing["low"] = 12.12
    assert judge(before, after) == 0
    timing["low"] = 12.13
    assert judge(before, after) == 1


def test_only_dcconv_decides_the_exit_status(before: Path) -> None:
    status, said = run(before, save(before.parent / "b.jsonl", record(conv2d=20.0)))
    assert status == 0
    assert "(not ours) slower" in said
    assert "Drift of the machine (baselines, B over A): 2.000." in said


def test_normalise_divides_by_the_drift(before: Path) -> None:
    slow = record(conv2d=15.0, dcconv_cpu=18.0)
    assert judge(before, slow) == 1
    assert judge(before, slow, "--normalise") == 0
    # As fast as before on a machine that has become faster: slower.
    fast = record(conv2d=5.0, dcconv_cpu=12.0)
    assert judge(before, fast) == 0
    assert judge(before, fast, "--normalise") == 1
    without = record()
    del without.results["conv2d"]
    with pytest.raises(ValueError, match="--normalise must go with rows that have one of conv2d"):
        judge(before, without, "--normalise")


@pytest.mark.parametrize(
    ("note", "status"),
    [("wrong: y is off by 0.5", 1), ("failed: no memory", 1), ("missing: no compiler", 0)],
)
def test_a_lost_time_is_a_regression_where_it_is_wrong(
    before: Path, note: str, status: int
) -> None:
    after = record()
    after.results[OURS] |= {"timing": None, "note": note}
    found, said = run(before, save(before.parent / "b.jsonl", after))
    assert found == status
    assert note in said
    # What had no time before has not lost it.
    assert run(before.parent / "b.jsonl", before.parent / "b.jsonl")[0] == 0
    assert run(before.parent / "b.jsonl", before)[0] == 0


@pytest.mark.parametrize("name", ["kept", "chain", "peak"])
def test_memory_beyond_the_threshold_is_a_regression(before: Path, name: str) -> None:
    def grow(share: float, provider: str = OURS) -> Record:
        after = record()
        old = after.results[provider][name]
        is_total = isinstance(old, dict)
        size = round((old["total"] if is_total else old) * (1 + share))
        after.results[provider][name] = old | {"total": size} if is_total else size
        return after

    assert judge(before, grow(0.10)) == 0
    assert judge(before, grow(0.101)) == 1
    assert judge(before, grow(0.101), "--threshold", 0.2) == 0
    assert judge(before, grow(0.5, "conv2d")) == 0
    _, said = run(before, save(before.parent / "b.jsonl", grow(1.0)))
    assert f"{name} " in said and " bytes" in said
    absent = record()
    absent.results[OURS][name] = None
    assert judge(before, absent) == 0


def test_one_provider(before: Path) -> None:
    slow = record(dcconv_cpu=20.0)
    assert judge(before, slow, "--provider", "conv2d") == 0
    assert judge(before, slow, "--provider", OURS) == 1
    with pytest.raises(ValueError, match="--provider must be one of conv2d, dcconv-cpu, got 'x'"):
        judge(before, slow, "--provider", "x")


def test_worst_first(tmp_path: Path) -> None:
    layers = [f"n{at}-c1-h1-o1-k1" for at in range(1, 6)]
    a = save(tmp_path / "a.jsonl", *(record(layer) for layer in layers))
    ratios = (1.2, 0.8, 2.0, 1.05, 1.0)
    rows = [record(n, dcconv_cpu=12 * r) for n, r in zip(layers, ratios, strict=True)]
    rows[3].results[OURS] |= {"timing": None, "note": "wrong: y is off by 0.5"}
    b = save(tmp_path / "b.jsonl", *rows)
    status, said = run(a, b, "--provider", OURS)
    assert status == 1
    order = [line.split()[1] for line in said.splitlines() if "-c1-" in line]
    assert order == [layers[at] for at in (3, 2, 0, 4, 1)]
    assert "3 regressions of dcconv beyond 10%." in said
    _, said = run(a, b, "--provider", OURS, "--rows", 0)
    assert sum("-c1-" in line for line in said.splitlines()) == 3
    assert "2 more lines, none of them a regression" in said


def test_the_latest_record_counts(tmp_path: Path) -> None:
    a = save(tmp_path / "a.jsonl", record(dcconv_cpu=30.0), record())
    b = save(tmp_path / "b.jsonl", record(dcconv_cpu=12.5), record(dcconv_cpu=20.0))
    assert run(a, b)[0] == 1
    assert run(b, a)[0] == 0


def test_folders_are_joined_by_kind_and_row(tmp_path: Path) -> None:
    save(tmp_path / "a" / "ops.jsonl", record(), record("n1-c1-h1-o1-k1"))
    save(tmp_path / "a" / "networks.jsonl", record(kind="networks"))
    save(tmp_path / "b" / "ops.jsonl", record(), record("n2-c1-h1-o1-k1"))
    save(tmp_path / "b" / "networks.jsonl", record(kind="networks", dcconv_cpu=20.0))
    status, said = run(tmp_path / "a", tmp_path / "b")
    assert status == 1
    assert "2 rows in common, 4 times compared" in said
    assert "1 rows only in A." in said and "1 rows only in B." in said
    assert "n1-c1-h1-o1-k1" not in said and "n2-c1-h1-o1-k1" not in said
    _, said = run(tmp_path / "a", tmp_path / "b", "--unmatched")
    assert "  ops n1-c1-h1-o1-k1 float32 fwd+bwd" in said
    assert "  ops n2-c1-h1-o1-k1 float32 fwd+bwd" in said


def test_noise_and_other_devices_are_said(tmp_path: Path) -> None:
    a = save(tmp_path / "a.jsonl", record(spread=0.2))
    b = save(tmp_path / "b.jsonl", record(device="Other CPU"))
    _, said = run(a, b)
    assert "1.000 †" in said
    assert "† noisy in A or B: 2 of 2." in said
    assert "A and B are from different devices: Some CPU and Other CPU." in said


def test_corrupt_lines_are_skipped(
    before: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    b = tmp_path / "b.jsonl"
    b.write_text("{\n" + before.read_text(encoding="utf-8"), encoding="utf-8")
    assert run(before, b)[0] == 0
    assert f"{b}:1: not a result row" in capsys.readouterr().err


def test_unusable_input_is_refused(before: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="A and B must be result files or folders"):
        run(before, tmp_path / "none.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="A and B must be result files or folders"):
        run(tmp_path / "empty", before)
    (tmp_path / "bad.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"A and B must have result rows, got '.*bad\.jsonl'"):
        run(before, tmp_path / "bad.jsonl")
    other = save(tmp_path / "other.jsonl", record("n1-c1-h1-o1-k1"))
    with pytest.raises(ValueError, match="A and B must have a row in common"):
        run(before, other)
    for value in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="--threshold must be a number of at least 0"):
            run(before, before, "--threshold", value)
    with pytest.raises(ValueError, match="--rows must be a number of at least 0"):
        run(before, before, "--rows", -1)


def test_the_command_line_exits_with_2_for_unusable_input(
    before: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench.__main__, "COMMANDS", ("compare",))
    main = bench.__main__.main
    assert main(["compare", str(before), str(before)]) == 0
    assert main(["compare", str(before), str(tmp_path / "none")]) == 2
    assert "dcconv: A and B must be result files" in capsys.readouterr().err
    slow = save(tmp_path / "slow.jsonl", record(dcconv_cpu=20.0))
    assert main(["compare", str(before), str(slow)]) == 1


def test_records_are_left_as_they_are() -> None:
    a, b = record(), record(dcconv_cpu=20.0)
    kept = copy.deepcopy((a, b))
    compare.changes([(a, b)], scale=2.0)
    assert (a, b) == kept
