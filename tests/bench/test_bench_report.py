"""The report of measured rows: charts, tables, the README's marked parts, corrupt result files."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("matplotlib")

import matplotlib.image

from bench import readme, report
from bench.layers import distinct_layers, layer_classes
from bench.records import Record, read

ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "device": "Some CPU",
    "device_type": "cpu",
    "threads": 2,
    "torch": "2.15.0",
    "dcconv": "0.1.0",
    "revision": "abc",
}

KINDS = (("tanh-cosine", "fixed"), ("tanh-cosine", "batch"), ("linear-cosine", "no-rho"))


def timing(median: float, spread: float = 0.02) -> dict[str, float]:
    return {
        "median": median,
        "low": median * (1 - spread / 2),
        "high": median * (1 + spread / 2),
        "rounds": 7,
    }


def ops(
    layer: str,
    classes: list[str],
    ours: float | None = 1.2,
    compiled: float = 1.5,
    spread: float = 0.02,
    **row: Any,
) -> Record:
    """Return an ops row whose F.conv2d takes 10 ms, with dcconv and others as multiples of that."""
    names = {"operator": "tanh-cosine", "mode": "fixed", "dtype": "float32"} | {
        "layout": "channels_last",
        "pass": "fwd+bwd",
        "threads": 2,
    }
    times = {"conv2d": 1.0, "eager": 4.0, "formula": 2.0, "compiled": compiled, "dcconv-cpu": ours}
    results: dict[str, dict[str, Any]] = {}
    for at, (name, ratio) in enumerate(times.items()):
        results[name] = {
            "timing": None if ratio is None else timing(10 * ratio, spread),
            "note": "wrong: y is off by 0.5" if ratio is None else None,
            "kept": {"total": 3000 + 500 * at, "x": 2000},
            "peak": 9000 + 1000 * at,
        }
    return Record(
        kind="ops",
        row={"layer": layer} | names | row,
        results=results,
        facts={"classes": classes, "own": "dcconv-cpu", "flops": 10**9, "bytes": 10**7}
        | {"copy_gbps": 20.0, "matrix_tflops": 0.2, "x_bytes": 2000, "y_bytes": 1000},
        environment=ENVIRONMENT,
    )


def network(name: str, which: str, ours: float = 1.3) -> Record:
    results = {
        provider: {"timing": timing(100 * ratio), "note": None, "peak": int(1e6 * ratio)}
        | {"kept": {"total": int(1e5 * ratio), "x": 1}, "images_per_s": 80 / ratio}
        for provider, ratio in {"plain": 1.0, "reference": 3.0, "dcconv-cpu": ours}.items()
    }
    row = {"network": name, "operator": "tanh-cosine", "dtype": "float32"} | {
        "layout": "channels_last",
        "batch": 8,
        "image_size": 64,
        "pass": which,
        "threads": 2,
    }
    return Record("networks", row, results, {"own": "dcconv-cpu"}, ENVIRONMENT)


def save(folder: Path, *records: Record) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        with (folder / f"{record.kind}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(record)) + "\n")
    return folder


def everything() -> list[Record]:
    """Return a row of every layer there is, and of the operator layers with every kind."""
    found = []
    for at, (name, (_, classes)) in enumerate(distinct_layers(8).items()):
        kinds = KINDS if "operator" in classes else KINDS[:1]
        for operator, mode in kinds:
            for which in ("fwd", "fwd+bwd"):
                ratio = 1.05 + 0.02 * (at % 20)
                record = ops(name, classes, ratio, 1.2, operator=operator, mode=mode)
                record.row["pass"] = which
                record.facts |= {"flops": 10**8 * (1 + at), "bytes": 10**7 // (1 + at)}
                found.append(record)
    return found


def run(*arguments: object) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    file = io.StringIO()
    options = parser.parse_args([str(a) for a in arguments])
    return report.run(options, Console(file=file, width=200)), file.getvalue()


def marked(*names: str) -> str:
    parts = [
        f"<!-- bench {name}: begin -->\nold {name}\n<!-- bench {name}: end -->" for name in names
    ]
    return "before\n\n" + "\n\nbetween\n\n".join(parts) + "\n\nafter\n"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(marked("ops-operator", "ops-losses", "networks"), encoding="utf-8")
    return path


def test_writes_charts_that_show_something_and_the_full_report(
    tmp_path: Path, target: Path
) -> None:
    folder = save(tmp_path / "cpu", *everything(), network("resnet18", "train"))
    status, said = run(folder, "--into", target)
    assert status == 0
    charts = {path.name for path in folder.glob("*.png")}
    assert charts == {
        "networks-float32.png",
        "ops-memory-float32.png",
        "ops-ratio-float32.png",
        "ops-roofline-float32.png",
    }
    assert f"{len(charts)} charts" in said
    text = (folder / "report.md").read_text(encoding="utf-8")
    for name in charts:
        pixels = matplotlib.image.imread(folder / name)
        assert pixels.shape[1] == 1350
        dark = (pixels[..., :3].max(axis=-1) < 0.4).mean()
        coloured = (np.ptp(pixels[..., :3], axis=-1) > 0.3).mean()
        assert dark > 0.003 and coloured > 0.0005, name
        assert f"]({name})" in text
    assert "# Some CPU" in text
    for title in ("ops-operator", "ops-classes", "ops-losses", "networks"):
        assert f"## {title}\n" in text


def test_equal_input_gives_equal_bytes(tmp_path: Path, target: Path) -> None:
    folder = save(tmp_path / "cpu", *everything()[:20], network("resnet18", "train"))
    run(folder, "--into", target)
    first = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    text = target.read_bytes()
    _, said = run(folder, "--into", target)
    assert "unchanged" in said
    assert target.read_bytes() == text
    for path, (data, when) in first.items():
        assert path.read_bytes() == data
        assert path.stat().st_mtime_ns == when


def test_charts_do_not_depend_on_matplotlib_s_settings(tmp_path: Path) -> None:
    from bench.charts import draw

    results = {"ops": everything()[:6]}
    first = [chart.png for chart in draw(results)]
    with matplotlib.rc_context({"savefig.facecolor": "white"}):
        assert [chart.png for chart in draw(results)] == first
    assert all(b"Software" not in png and b"Matplotlib" not in png for png in first)


def test_a_loss_is_marked_in_the_ratio_chart(tmp_path: Path) -> None:
    from bench.charts import ratio_charts, ratios

    wins, loses = ops("n8-c3-h8-o4-k3", ["stem"]), ops("n8-c3-h9-o4-k3", ["stem"], 1.6, 1.5)
    (ratio,) = ratios([wins, loses])
    assert ratio.layers == [(pytest.approx(1.2), False), (pytest.approx(1.6), True)]
    assert ratio.means["dcconv"] == pytest.approx((1.2 * 1.6) ** 0.5)
    # Vermillion is in the legend anyway; the cross adds to it.
    red = []
    for compiled in (1.5, 1.7):
        (chart,) = ratio_charts({"ops": [wins, ops("n8-c3-h9-o4-k3", ["stem"], 1.6, compiled)]})
        pixels = matplotlib.image.imread(io.BytesIO(chart.png))[..., :3]
        red.append((np.abs(pixels - np.array([0xD5, 0x5E, 0]) / 255).max(axis=-1) < 0.02).sum())
    assert red[0] > 1.5 * red[1] > 0


def test_a_chart_per_dtype_and_layout(tmp_path: Path) -> None:
    from bench.charts import ratio_charts

    records = [
        ops("n8-c3-h8-o4-k3", ["stem"], dtype=dtype, layout=layout)
        for dtype in ("bfloat16", "float32")
        for layout in ("contiguous", "channels_last")
    ]
    assert [chart.name for chart in ratio_charts({"ops": records})] == [
        "ops-ratio-float32-channels_last.png",
        "ops-ratio-float32-contiguous.png",
        "ops-ratio-bfloat16-channels_last.png",
        "ops-ratio-bfloat16-contiguous.png",
    ]


def test_rows_without_times_or_facts_draw_nothing_and_do_not_fail() -> None:
    from bench.charts import draw

    record = ops("n8-c3-h8-o4-k3", ["stem"], None)
    for result in record.results.values():
        result |= {"timing": None, "kept": None, "peak": None}
    record.facts = {"classes": ["stem"], "own": "dcconv-cpu"}
    bare = Record("ops", {"layer": "n8-c3-h8-o4-k3"}, {}, {}, {})
    assert draw({"ops": [record, bare]}) == []
    assert draw({}) == []


def test_operator_table_shows_ratios_losses_noise_and_verdicts() -> None:
    layers = [layer.name for layer in layer_classes(8)["operator"]]
    records = [
        ops(layer, ["operator"], 1.2, 1.5, operator=operator, mode=mode)
        for layer in layers
        for operator, mode in KINDS
    ]
    records[0] = ops(layers[0], ["operator"], 1.6, 1.5)
    records[3] = ops(layers[1], ["operator"], 1.2, 1.5, spread=0.3)
    text = readme.operator_tables({"ops": [*records, ops("n8-c3-h8-o4-k3", ["stem"])]})
    assert text.startswith("**float32, fwd+bwd**\n")
    lines = text.splitlines()
    assert f"| {layers[0]} | **1.60 (1.07)** | 1.20 (0.80) | 1.20 (0.80) |" in lines
    assert f"| {layers[1]} | 1.20 (0.80)† | 1.20 (0.80) | 1.20 (0.80) |" in lines
    assert "† noisy, 1 of 21 rows" in text
    assert "stem" not in text and "n8-c3-h8-o4-k3" not in text
    mean = (1.6 * 1.2**13) ** (1 / 14)
    assert f"{mean:.2f} for `fixed` and `no-rho` (target: at most 1.20, **not reached**)" in text
    fast = readme.operator_tables({"ops": [ops(n, ["operator"], 1.1, 1.5) for n in layers]})
    assert "1.10 for `fixed` and `no-rho` (target: at most 1.20, **reached**)" in fast
    assert "1.20 for `batch`; over the compiled formula: " in text


@pytest.mark.parametrize(
    ("dtype", "which", "target"),
    [(dtype, which, target) for (dtype, which), target in readme.TARGETS.items()],
)
def test_targets_are_judged_at_their_edge(dtype: str, which: str, target: float) -> None:
    def judge(ratio: float, layers: int = 7, **row: Any) -> str:
        chosen = layer_classes(8)["operator"][:layers]
        names = {"dtype": dtype, "pass": which} | row
        records = [ops(layer.name, ["operator"], ratio, **names) for layer in chosen]
        return readme.operator_tables({"ops": records})

    assert f"at most {target:.2f}, **reached**" in judge(target - 1e-6)
    assert f"at most {target:.2f}, **not reached**" in judge(target + 1e-6)
    assert "no verdict from 6 of 7 rows" in judge(target / 2, 6)
    assert "target" not in judge(target, threads=1)
    assert "target" not in judge(target, layout="contiguous")


def test_a_wrong_row_says_so_in_place_of_a_time() -> None:
    layers = [layer.name for layer in layer_classes(8)["operator"]]
    records = [ops(layer, ["operator"]) for layer in layers[1:]]
    records.append(ops(layers[0], ["operator"], None))
    text = readme.operator_tables({"ops": records})
    assert f"| {layers[0]} | wrong |" in text
    assert "no verdict from 6 of 7 rows" in text
    losses = readme.loss_tables({"ops": records})
    assert "dcconv has no time in 1 rows (wrong: y is off by 0.5; first: ops n8-c64-h56" in losses


def test_class_table_counts_layers_and_names_the_worst() -> None:
    records = [
        ops("n8-c3-h8-o4-k3", ["stem", "resnet18"], 1.1, 1.0),
        ops("n8-c3-h9-o4-k3", ["stem"], 1.6, 1.5),
        ops("n8-c3-h9-o4-k3", ["stem"], 1.4, 1.5, mode="batch"),
    ]
    lines = readme.class_tables({"ops": records}).splitlines()
    assert lines[0] == "**float32, fwd+bwd**"
    rows = [line for line in lines if line.startswith("| ")]
    assert rows[2].startswith("| resnet18 | 1 | 1.10 | 1.10 | 0.28 | 1.10 n8-c3-h8-o4-k3 |")
    # A layer counts once, however many rows it has.
    mean = (1.1 * (1.6 * 1.4) ** 0.5) ** 0.5
    assert rows[3] == (
        f"| stem | 2 | {mean:.2f} | {mean / 1.5**0.5:.2f} | {mean / 4:.2f} "
        "| 1.60 n8-c3-h9-o4-k3 fixed | 1.10 n8-c3-h8-o4-k3 fixed |"
    )


def test_the_summary_has_a_mean_per_class_and_counts_who_is_faster() -> None:
    records = [
        ops("n8-c3-h8-o4-k3", ["stem", "resnet18"], 1.2, 1.5),
        ops("n8-c3-h9-o4-k3", ["stem"], 3.0, 1.5),
        ops("n8-c3-h9-o4-k3", ["stem"], 9.0, 1.5, layout="contiguous"),
    ]
    lines = readme.summary_table({"ops": records}).splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert (
        rows[0]
        == "| class | float32, fwd+bwd | rows | `F.conv2d` faster | compiled formula faster |"
    )
    assert rows[2:] == [
        "| resnet18 | 1.20 | 1 | 1 | 0 |",
        f"| stem | {(1.2 * 3.0) ** 0.5:.2f} | 2 | 2 | 1 |",
        f"| all | {(1.2 * 3.0) ** 0.5:.2f} | 2 | 2 | 1 |",
    ]
    assert readme.summary_table({}) == ""


def test_losses_are_those_beyond_the_spread_worst_first() -> None:
    # The intervals of the 20th to 80th percentile touch at 1.5 over 1.47: (1 - s / 2) (1 + s / 2).
    records = [
        ops("n8-c3-h1-o4-k3", ["stem"], 1.52, 1.5),
        ops("n8-c3-h2-o4-k3", ["stem"], 1.6, 1.5),
        ops("n8-c3-h3-o4-k3", ["stem"], 3.0, 1.5),
        ops("n8-c3-h4-o4-k3", ["stem"], 1.005, 1.5),
        *(ops(f"n8-c3-h{9 + at}-o4-k3", ["depthwise"], 1.2) for at in range(5)),
    ]
    text = readme.loss_tables({"ops": records})
    assert "| stem | 4 | 3 | 2 | 1 | 0 |" in text
    assert "| depthwise | 5 | 5 | 0 | 0 | 0 |" in text
    assert "| all | 9 | 8 | 2 | 1 | 0 |" in text
    library, others = text.split("Every row that another way")
    worst = [line.split(" | ")[0] for line in library.splitlines() if line.startswith("| n8-")]
    assert len(worst) == 8 and "<summary>3 more rows</summary>" in library
    assert worst[:3] == ["| n8-c3-h3-o4-k3", "| n8-c3-h2-o4-k3", "| n8-c3-h1-o4-k3"]
    rows = [line.split(" | ") for line in others.splitlines() if line.startswith("| n8-")]
    assert [(row[0], row[5], row[6]) for row in rows] == [
        ("| n8-c3-h3-o4-k3", "compiled formula", "2.00"),
        ("| n8-c3-h3-o4-k3", "best-written formula", "1.50"),
        ("| n8-c3-h2-o4-k3", "compiled formula", "1.07"),
    ]


def test_every_row_is_listed_with_its_spread() -> None:
    records = [ops("n8-c3-h8-o4-k3", ["stem"]), ops("n8-c3-h9-o4-k3", ["stem"], None, spread=0.3)]
    records[0].results["dcconv-cpu"] |= {"gbps": 12.34, "tflops": 0.1234, "roofline": 0.5}
    records[0].results["dcconv-cpu"] |= {"peak": 3 * 2**20, "kept": {"total": 2**19, "x": 0}}
    lines = readme.row_tables({"ops": records}).splitlines()
    assert lines[2] == "**float32, fwd+bwd**"
    assert lines[6] == (
        "| n8-c3-h8-o4-k3 | tanh-cosine | fixed | 10.0 | 40.0 | 20.0 | 15.0 | 12.0 "
        "| 1.20 | 0.30 | 0.80 | 12.3 | 0.123 | 0.50 | 3.0 | 0.5 | 2 % |"
    )
    assert "| 15.0 | wrong |  |  |  |" in lines[7] and lines[7].endswith("| 30 %† |")


def test_no_loss_is_said_and_a_long_list_is_complete() -> None:
    wins = [ops("n8-c3-h1-o4-k3", ["stem"], 0.9)]
    assert "No row is won by another way" in readme.loss_tables({"ops": wins})
    many = [ops(f"n8-c3-h{at}-o4-k3", ["stem"], 1.7, 1.5) for at in range(1, 31)]
    text = readme.loss_tables({"ops": many})
    assert "<details><summary>10 more rows</summary>" in text
    assert all(f"| n8-c3-h{at}-o4-k3 |" in text for at in range(1, 31))


def test_network_table() -> None:
    text = readme.network_tables({"networks": [network("resnet18", "train")]})
    cells = "100 | 130 | 1.30 | 0.43 | 61.5 | 1.30 | 0.43 | 1.30 | 0.43 |"
    assert f"| resnet18, 8 x 64 px | train | {cells}" in text


def function(
    name: str, dtype: str, ulp: dict[str, float | None], note: str | None = None
) -> Record:
    result = {"timing": timing(1.0), "note": note, "max_ulp": ulp, "ns": 0.25}
    row = {"function": name, "dtype": dtype, "pass": "fwd", "points": "n1", "threads": 2}
    return Record("functions", row, {"dcconv-cpu": result}, {"own": "dcconv-cpu"}, ENVIRONMENT)


def test_function_table_shows_the_worst_ulp() -> None:
    records = [
        function("h-tanh", "bfloat16", {"value": 0.5001}),
        function("h-tanh", "float32", {"value": 1.5, "d/db": 2.25, "d/drho": 7.5}),
        function("g-linear", "float32", {"value": None, "d/dc": 3e5}, "wrong: value off"),
    ]
    lines = readme.function_tables({"functions": records}).splitlines()
    assert lines[2] == (
        "| function | float32 value | float32 derivatives | bfloat16 value | ns, float32 fwd |"
    )
    assert lines[4:] == [
        "| h-tanh | 1.50 | 7.50 | 0.50 | 0.250 |",
        "| g-linear | **inf** | **3.0e+05** |  | 0.250 |",
    ]


def test_readme_parts_are_replaced_and_nothing_else(tmp_path: Path, target: Path) -> None:
    os.chmod(target, 0o640)
    folder = save(tmp_path / "cpu", *everything())
    _, said = run(folder, "--into", target)
    text = target.read_text(encoding="utf-8")
    assert text.startswith("before\n\n<!-- bench ops-operator: begin -->\n\n**float32, fwd**")
    assert text.endswith("<!-- bench networks: end -->\n\nafter\n")
    assert text.count("between") == 2
    assert "old ops-operator" not in text and "old ops-losses" not in text
    assert (
        "Measured on Some CPU, 2 threads; PyTorch 2.15.0; dcconv 0.1.0 at abc; 2026-01-02." in text
    )
    # No row of that kind was measured: what is there stays, and that is said.
    assert "old networks" in text
    assert "networks stays as it is, cpu has no rows for it" in said
    assert target.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_a_readme_without_markers_stays(tmp_path: Path) -> None:
    folder = save(tmp_path / "cpu", *everything()[:2])
    target = tmp_path / "README.md"
    target.write_text("text <!-- bench ops-operator: begin --> in a line\n", encoding="utf-8")
    before = target.read_bytes()
    assert run(folder, "--into", target)[0] == 0
    assert target.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a\n<!-- bench ops-losses: begin -->\nb\n",
            r"README.md:2 must be followed by <!-- bench ops-losses: end -->",
        ),
        (
            "<!-- bench networks: begin -->\n" + marked("ops-losses"),
            r"README.md:1 must be followed by <!-- bench networks: end -->",
        ),
        (
            "a\n\n<!-- bench networks: end -->\n",
            r"README.md:3 must come after <!-- bench networks: begin -->",
        ),
        (
            "<!-- bench networks: begin -->\n<!-- bench ops-losses: end -->\n",
            r"README.md:2 must come after <!-- bench ops-losses: begin -->",
        ),
        (marked("networks", "networks"), r"README.md:9 must be the only marker of its name"),
        (marked("speed"), r"README.md:3 must name one of ops-summary, .*networks.*, got 'speed'"),
    ],
)
def test_wrong_markers_are_named_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    folder = save(tmp_path / "cpu", *everything()[:2])
    target = tmp_path / "README.md"
    target.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        run(folder, "--into", target)
    assert target.read_text(encoding="utf-8") == text
    assert list(folder.glob("*.png")) == []


def test_corrupt_lines_are_reported_and_skipped(
    tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path / "cpu", *everything()[:2])
    path = folder / "ops.jsonl"
    good = path.read_bytes()
    path.write_bytes(b'{"kind": "ops"\n[1]\n' + good + b"\xff\n")
    status, said = run(folder, "--into", target)
    assert status == 0
    assert "2 ops rows" in said
    errors = capsys.readouterr().err
    for line in (1, 2, 5):
        assert f"{path.resolve()}:{line}: not a result row" in errors
    assert f"{path.resolve()}:3" not in errors


def test_rows_that_lack_a_name_or_an_interval_are_reported_and_skipped(
    tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nameless, pointless = everything()[:2]
    del nameless.row["mode"]
    del pointless.results["conv2d"]["timing"]["low"]
    folder = save(tmp_path / "cpu", nameless, pointless, *everything()[2:4])
    _, said = run(folder, "--into", target)
    assert "2 ops rows" in said
    errors = capsys.readouterr().err
    assert "its row has no mode, skipped" in errors
    assert ":2: not a result row ('low'), skipped" in errors


def scaling(axis: str, value: int, ours: float, **row: Any) -> Record:
    names = {"layer": "n8", "axis": axis, "value": value, "dtype": "float32"}
    names |= {"layout": "channels_last", "pass": "fwd", "threads": 2} | row
    results = {n: {"timing": timing(ours * at)} for n, at in (("conv2d", 1), ("dcconv-cpu", 2))}
    facts = {"own": "dcconv-cpu", "flops": 1000 * value}
    return Record("scaling", names, results, facts, ENVIRONMENT)


def test_scaling_is_fitted_tabled_and_drawn() -> None:
    from bench.charts import scaling_charts

    records = [scaling("batch", n, 3.0 * n) for n in (4, 1, 2)]
    records += [scaling("image", size, 0.1 * size**2) for size in (7, 14, 28)]
    records += [scaling("threads", n, 8 / n, threads=n) for n in (1, 2)]
    text = readme.scaling_tables({"scaling": records})
    assert "| batch | n8 | 1 to 4 | 1.00 | 1.00 | 1.00 |" in text
    assert "| image | n8 | 7 to 28 | 1.00 | 2.00 | 2.00 |" in text
    assert "| threads | n8 | 1 to 2 |  | -1.00 ~ | -1.00 ~ |" in text
    line = readme.scaling_lines(records)[0]
    assert line.points == [(1.0, 6.0), (2.0, 12.0), (4.0, 24.0)]
    more = [scaling("batch", n, n**2, layer="n1") for n in (1, 2)]
    more += [scaling("batch", n, n**3, threads=1) for n in (1, 2)]
    found = {
        (line.rest, line.exponent)
        for line in readme.scaling_lines(records + more)
        if line.axis == "batch"
    }
    assert found == {
        ("n8, 2 threads", "1.00"),
        ("n1, 2 threads", "2.00 ~"),
        ("n8, 1 threads", "3.00 ~"),
    }
    (chart,) = scaling_charts({"scaling": records})
    assert chart.name == "scaling-n8-float32-fwd.png"
    assert chart.caption == "Time against batch, image, threads, n8, float32, fwd."
    pixels = matplotlib.image.imread(io.BytesIO(chart.png))
    assert (pixels[..., :3].max(axis=-1) < 0.4).mean() > 0.005


def test_the_latest_record_of_a_row_counts(tmp_path: Path, target: Path) -> None:
    layer = layer_classes(8)["operator"][0].name
    folder = save(tmp_path / "cpu", ops(layer, ["operator"], 1.9), ops(layer, ["operator"], 1.11))
    run(folder, "--into", target)
    text = target.read_text(encoding="utf-8")
    assert f"| {layer} | 1.11 (0.74) |" in text
    assert "1.90" not in text


def test_folders_are_chosen_by_device(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    with pytest.raises(ValueError, match="FOLDER must have result files"):
        run("--into", target)
    layer = layer_classes(8)["operator"][0].name

    def of(device: str, device_type: str, ratio: float) -> Record:
        record = ops(layer, ["operator"], ratio)
        record.environment = ENVIRONMENT | {"device": device, "device_type": device_type}
        return record

    save(tmp_path / "results" / "gpu-a", of("GPU A", "cuda", 1.31))
    run("--into", target)
    assert "1.31 (" in target.read_text(encoding="utf-8")
    save(tmp_path / "results" / "gpu-b", of("GPU B", "cuda", 1.41))
    before = target.read_bytes()
    with pytest.raises(ValueError, match="--readme must name one of gpu-a, gpu-b, got nothing"):
        run("--into", target)
    assert target.read_bytes() == before
    save(tmp_path / "results" / "cpu", of("Some CPU", "cpu", 1.21))
    run("--into", target)
    assert "1.21 (" in target.read_text(encoding="utf-8")
    assert (tmp_path / "results" / "gpu-b" / "report.md").is_file()
    run("--into", target, "--readme", "gpu-b")
    assert "1.41 (" in target.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="--readme must be one of gpu-a, got 'gpu-b'"):
        run("gpu-a", "--into", target, "--readme", "gpu-b")


def test_unusable_folders_are_refused(tmp_path: Path, target: Path) -> None:
    with pytest.raises(ValueError, match=r"FOLDER must be a folder of result files .*, got '.*no'"):
        run(tmp_path / "no", "--into", target)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="FOLDER must be a folder of result files"):
        run(tmp_path / "empty", "--into", target)
    (tmp_path / "empty" / "ops.jsonl").write_text("nothing\n", encoding="utf-8")
    with pytest.raises(ValueError, match="FOLDER must have result rows"):
        run(tmp_path / "empty", "--into", target)
    folder = save(tmp_path / "cpu", *everything()[:1])
    with pytest.raises(ValueError, match="--into must be a file"):
        run(folder, "--into", tmp_path / "none.md")


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        readme.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_written_records_are_what_the_reader_returns(tmp_path: Path) -> None:
    record = everything()[0]
    (found,) = read(save(tmp_path, record) / "ops.jsonl")
    assert found == record
