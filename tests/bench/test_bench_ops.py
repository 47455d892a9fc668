"""The operator benchmark: rows, gate, refusals, records, costs; no test looks at a time."""

from __future__ import annotations

import argparse
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from bench import __main__ as command
from bench import layers as bench_layers
from bench import ops, options, providers
from bench.accuracy import make_gate
from bench.cases import FIXED, Case, find_operator, make_inputs, select
from bench.cost import Ceilings, Cost, cost
from bench.environment import environment
from bench.layers import Layer, distinct_layers, layer_classes
from bench.memory import peak_bytes
from bench.options import BACKWARD, BOTH, FORWARD
from bench.providers import BASELINES, OURS, PROVIDERS, run
from bench.records import Record, append, latest, read
from bench.tables import (
    first_own,
    mean_by_layer,
    mean_grid,
    own_ratio,
    rate_grid,
    slower,
    time_cell,
    time_grid,
    within,
)
from bench.timing import Protocol, Staged, Stopwatch
from dcconv import native as compiled
from dcconv import warn
from dcconv.operator.functions import angulars, magnitudes

TINY = Layer(2, 8, 6, 4, 3)
SMALL = (
    TINY,
    Layer(2, 8, 7, 8, 3, stride=2, groups=8),
    Layer(1, 8, 7, 16, 3, groups=4),
    Layer(1, 8, 9, 6, 3, dilation=2),
    Layer(2, 3, 8, 6, 4, stride=4),
    Layer(2, 8, 6, 4, 1, stride=2, groups=2),
)

needs_library = pytest.mark.skipif(compiled.missing is not None, reason=str(compiled.missing))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Layer:
    """One tiny layer in the place of the list, and no ceilings to measure."""
    monkeypatch.setattr(bench_layers, "_CLASSES", {"operator": (TINY,)})
    monkeypatch.setattr(bench_layers, "_SHAPES", {})
    monkeypatch.setattr(bench_layers, "NETWORKS", {})
    monkeypatch.setattr(ops, "measure_ceilings", lambda *_: Ceilings(1e9, 1e9))
    return TINY


def measured(*arguments: str) -> tuple[int, str]:
    """Run the sub-command and return its exit status and what it prints."""
    parser = argparse.ArgumentParser()
    ops.add_arguments(parser)
    console = Console(file=io.StringIO(), width=250, markup=False)
    fast = ["--rounds", "1", "--min-time", "0", "--threads", str(torch.get_num_threads())]
    status = ops.run(parser.parse_args([*fast, "--device", "cpu", *arguments]), console)
    file = console.file
    assert isinstance(file, io.StringIO)
    return status, file.getvalue()


@pytest.mark.parametrize("layer", SMALL, ids=lambda layer: layer.name)
@pytest.mark.parametrize("name", ["tanh-cosine", "ball-square_cosine", "mix-sigmoid"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_provider_computes_the_operator(layer: Layer, name: str, dtype: str) -> None:
    for case in select([layer], [name], ("fixed", "batch", "no-rho"), [dtype], ["contiguous"]):
        inputs = make_inputs(case)
        gate = make_gate(case, inputs)
        for provider in PROVIDERS.values():
            if (
                not provider.gated
                or provider.compiles
                or ops.refusal(provider.name, "cpu", case.operator)
            ):
                continue
            try:
                found = run(provider.build(case), inputs, BOTH)
            except NotImplementedError:
                # A strategy by itself says which calls it does not compute.
                assert provider.name.partition(f"{provider.backend}-")[2], provider.name
                continue
            errors = gate.errors(found, BOTH)
            baseline = not provider.name.startswith(OURS)
            assert gate.refusal(errors, baseline=baseline) is None, provider.name


@pytest.mark.parametrize("magnitude", magnitudes)
@pytest.mark.parametrize("angular", angulars)
def test_formula_is_every_operator(magnitude: str, angular: str) -> None:
    operator = find_operator(f"{magnitude}-{angular}")
    case = Case(TINY, operator, operator.modes[0], "float64")
    inputs = make_inputs(case)
    found = run(PROVIDERS["formula"].build(case), inputs, BOTH)
    truth = run(PROVIDERS["eager"].build(case), inputs, BOTH)
    assert found.keys() == truth.keys()
    for tensor, value in truth.items():
        torch.testing.assert_close(found[tensor], value, rtol=1e-9, atol=1e-9)


def test_bcos_is_linear_square_cosine_but_for_eps() -> None:
    case = Case(SMALL[2], find_operator("linear-square_cosine"), "no-rho", "float64")
    inputs = make_inputs(case)
    found = run(PROVIDERS["bcos"].build(case), inputs, FORWARD)["y"]
    torch.testing.assert_close(
        found, run(PROVIDERS["eager"].build(case), inputs, FORWARD)["y"], rtol=1e-3, atol=1e-3
    )


def test_names_of_layers() -> None:
    assert TINY.name == "n2-c8-h6-o4-k3"
    assert SMALL[1].name == "n2-c8-h7-o8-k3-s2-g8" and SMALL[3].name == "n1-c8-h9-o6-k3-d2"
    for layer in (*SMALL, *(layer for layer, _ in distinct_layers(1).values())):
        x, weight = torch.empty(layer.x_shape), torch.empty(layer.weight_shape)
        with torch.device("meta"):
            y = F.conv2d(
                x.to("meta"),
                weight.to("meta"),
                None,
                layer.stride,
                layer.padding,
                layer.dilation,
                layer.groups,
            )
        assert y.shape == layer.y_shape
    assert {layer.n for layer in layer_classes(5)["depthwise"]} == {5}
    assert {layer.n for layer in layer_classes(5)["operator"]} == {8, 64}


def test_cost_counts_what_it_says() -> None:
    case = Case(SMALL[2], find_operator("tanh-cosine"), FIXED, "bfloat16")
    x, weight, y = 1 * 8 * 49, 16 * 2 * 9, 1 * 16 * 49
    norm_map = 4 * 4 * 49
    products = 2 * 16 * 49 * 2 * 9
    forward = Cost(products + 2 * x, 2 * (x + weight + y))
    backward = Cost(2 * products, 2 * (2 * x + 2 * weight + 2 * y) + norm_map)
    assert cost(case, FORWARD) == forward and cost(case, BACKWARD) == backward
    both = cost(case, BOTH)
    assert both.flops == forward.flops + backward.flops
    assert both.bytes == forward.bytes + backward.bytes + norm_map
    # A 1x1 kernel with stride 2 sees 3 x 3 of 6 x 6 pixels; float64 has a map of float64.
    case = Case(SMALL[5], find_operator("tanh-cosine"), FIXED, "float64")
    x, seen, weight, y = 2 * 8 * 36, 2 * 8 * 9, 4 * 4, 2 * 4 * 9
    forward = Cost(2 * y * 4 + 2 * seen, 8 * (seen + weight + y))
    assert cost(case, FORWARD) == forward
    norm_map = 8 * 2 * 2 * 9
    moved = 8 * (seen + x + 2 * weight + 2 * y) + norm_map
    assert cost(case, BACKWARD) == Cost(4 * y * 4, moved)
    assert cost(case, BOTH).bytes == forward.bytes + moved + norm_map
    # Where the patch norm cancels: no squares, no map, no y in backward.
    free = case._replace(operator=find_operator("linear-cosine"), mode="no-rho")
    assert cost(free, FORWARD) == Cost(2 * y * 4, forward.bytes)
    assert cost(free, BACKWARD) == Cost(4 * y * 4, 8 * (seen + x + 2 * weight + y))
    assert cost(free, BOTH).bytes == forward.bytes + 8 * (seen + x + 2 * weight + y)
    assert Ceilings(2e9, 1e9).floor(Cost(3_000_000, 4_000_000)) == pytest.approx(3.0)
    assert Ceilings(1e9, 1e9).floor(Cost(3_000_000, 4_000_000)) == pytest.approx(4.0)


@needs_library
def test_rows_are_printed_and_stored(tiny: Layer, tmp_path: Path) -> None:
    chosen = ["--operators", "tanh-cosine", "--modes", "fixed", "--passes", "fwd,bwd,fwd+bwd"]
    status, text = measured(
        *chosen,
        "--providers",
        "conv2d,eager,formula",
        "--backends",
        "cpu",
        "--results",
        str(tmp_path),
    )
    assert status == 0, text
    records = read(tmp_path / "ops.jsonl")
    assert [record.row["pass"] for record in records] == ["fwd", "bwd", "fwd+bwd"]
    for record in records:
        assert record.row["layer"] == tiny.name and record.facts["own"] == "dcconv-cpu"
        assert set(record.results) == {"conv2d", "eager", "formula", "dcconv-cpu"}
        for name, result in record.results.items():
            assert result["timing"]["median"] > 0 and result["roofline"] > 0, name
            assert (result.get("peak") is None) == (record.row["pass"] == "bwd")
            assert (result.get("kept") is None) == (record.row["pass"] != "fwd+bwd")
        assert own_ratio(record, "conv2d") == pytest.approx(
            record.median("dcconv-cpu") / record.median("conv2d")  # type: ignore[operator]
        )
    assert within(records[2]) == "yes" and within(records[0]) == ""
    assert records[2].results["dcconv-cpu"]["errors"].keys() == {
        "y", "grad_x", "grad_weight", "grad_radius",
    }  # fmt: skip
    # A second run appends; the last of equal rows counts.
    measured(*chosen, "--providers", "conv2d", "--backends", "cpu", "--results", str(tmp_path))
    again = read(tmp_path / "ops.jsonl")
    assert len(again) == 6 and [set(r.results) for r in latest(again)] == 3 * [
        {"conv2d", "dcconv-cpu"}
    ]


@pytest.mark.parametrize("planted", ["y", "grad_weight"])
def test_a_wrong_row_shows_its_error_and_fails(
    tiny: Layer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, planted: str
) -> None:
    def off(case: Case) -> providers.Function:
        right = providers.formula(case)

        def call(*arguments: Any) -> torch.Tensor:
            x, weight, *others = arguments
            if planted == "y":
                return right(x, weight, *others) * 1.01
            return right(x, weight + 0.05 * (weight - weight.detach()), *others)

        return call

    wrong = PROVIDERS["formula"]._replace(build=off)
    monkeypatch.setitem(PROVIDERS, "formula", wrong)
    status, text = measured("--operators", "tanh-cosine", "--modes", "fixed", "--passes", "fwd+bwd",
                            "--providers", "conv2d,formula", "--backends", "reference",
                            "--results", str(tmp_path))  # fmt: skip
    assert status == 1
    (record,) = read(tmp_path / "ops.jsonl")
    assert record.wrong == ["formula"] and record.timing("formula") is None
    assert planted in record.results["formula"]["note"]
    assert time_cell(record, "formula").startswith(planted) and time_cell(record, "formula") in text


def test_what_fails_has_its_sentence_and_the_others_go_on(
    tiny: Layer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def kept(function: providers.Function, inputs: Any) -> Any:
        if function.__qualname__.startswith("formula"):
            raise torch.OutOfMemoryError("no memory\nfor this")
        return chain_kept(function, inputs)

    chain_kept = ops.chain_kept
    monkeypatch.setattr(ops, "chain_kept", kept)
    status, text = measured("--operators", "tanh-cosine", "--modes", "fixed", "--passes", "fwd+bwd",
                            "--providers", "conv2d,formula", "--backends", "reference",
                            "--results", str(tmp_path))  # fmt: skip
    assert status == 0 and "formula: failed: no memory (" in text
    (record,) = read(tmp_path / "ops.jsonl")
    assert record.timing("formula") is None and record.timing("conv2d") is not None


@needs_library
def test_float64_keeps_a_map_of_float64(tiny: Layer, tmp_path: Path) -> None:
    measured("--operators", "tanh-cosine", "--modes", "fixed", "--passes", "fwd+bwd",
             "--dtype", "float64", "--providers", "conv2d", "--results", str(tmp_path))  # fmt: skip
    (record,) = read(tmp_path / "ops.jsonl")
    assert record.facts["map_bytes"] == 8 * 2 * 6 * 6
    assert within(record) == "yes"


def test_a_refusing_backend_prints_its_sentence(tiny: Layer) -> None:
    status, text = measured(
        "--operators",
        "tanh-cosine",
        "--modes",
        "fixed",
        "--passes",
        "fwd",
        "--providers",
        "conv2d",
        "--backends",
        "cuda,triton",
        "--no-save",
    )
    assert status == 0
    for name in ("cuda", "triton"):
        assert f"dcconv-{name}: missing: it runs on CUDA tensors, got a cpu tensor" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "resnet19"], r"--layers must be classes \(resnet18, .*n8-c64-h56-o64-k3"),
        (["--operators", "tahn-cosine"], "--operators must be .*tanh.*got 'tahn-cosine'"),
        (["--modes", "fixd"], "--modes must be .*fixed, batch"),
        (["--passes", "forward"], r"--passes must be .*fwd, bwd"),
        (["--backends", "cudnn"], "--backends must be .*cuda, triton, cpu"),
        (["--providers", "keras"], "--providers must be .*conv2d"),
        (["--dtype", "int8"], "--dtype must be .*float32"),
        (["--layout", "nhwc"], "--layout must be .*channels_last"),
        (["--batch", "0"], "--batch must be"),
        (["--rounds", "0"], "--rounds must be"),
        (["--graphs"], "--graphs must go with --device cuda, got 'cpu'"),
        (["--layers", ","], "--layers must name one or more"),
        (["--operators", "linear-cosine", "--modes", "batch"], "--modes must fit"),
    ],
)
def test_wrong_options_name_what_is_known(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["ops", "--device", "cpu", *arguments]) == command.REFUSED
    error = capsys.readouterr().err
    assert error.startswith("dcconv: ") and len(error.splitlines()) == 1
    import re

    assert re.search(message, error), error


def test_cuda_is_refused_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device must be cpu where PyTorch finds no GPU"):
        measured("--device", "cuda")


def test_float32_is_float32_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    parser = argparse.ArgumentParser()
    options.add_common(parser)
    before = cudnn.allow_tf32, matmul.allow_tf32
    try:
        cudnn.allow_tf32 = matmul.allow_tf32 = True
        options.complete_common(parser.parse_args(["--device", "cpu"]))
        assert cudnn.allow_tf32 and matmul.allow_tf32
        options.complete_common(parser.parse_args([]))
        assert not (cudnn.allow_tf32 or matmul.allow_tf32)
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def test_graphs_are_of_whole_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parser = argparse.ArgumentParser()
    ops.add_arguments(parser)
    with pytest.raises(ValueError, match=r"--graphs must go with passes fwd and fwd\+bwd, got bwd"):
        ops.complete(parser.parse_args(["--graphs", "--passes", "fwd,bwd"]))


def test_an_interrupted_run_keeps_its_rows(
    tiny: Layer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []

    def interrupting(self: Stopwatch, candidates: Any, protocol: Protocol) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, candidates, protocol)

    original = Stopwatch.interleave
    monkeypatch.setattr(Stopwatch, "interleave", interrupting)
    status, text = measured(
        "--operators",
        "tanh-cosine",
        "--modes",
        "fixed",
        "--providers",
        "conv2d",
        "--backends",
        "reference",
        "--results",
        str(tmp_path),
    )
    assert status == ops.INTERRUPTED and "1 rows are finished" in text
    assert [record.row["pass"] for record in read(tmp_path / "ops.jsonl")] == ["fwd"]


def timing(**changed: float) -> dict[str, float]:
    return {"low": 1, "median": 1, "high": 1, "rounds": 7} | changed


def record(**results: float) -> Record:
    timings = {
        name.replace("_", "-"): {
            "timing": {"median": value, "low": value * 0.99, "high": value * 1.01, "rounds": 7}
        }
        for name, value in results.items()
    }
    return Record("ops", {"layer": "a"}, timings, {"own": "dcconv-cpu"})


def test_corrupt_lines_are_named_and_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "ops.jsonl"
    append(path, record(conv2d=1.0), environment())
    good = path.read_text(encoding="utf-8")
    broken = [
        good[: len(good) // 2],
        "[]",
        json.dumps({"kind": "ops", "row": 3, "results": {}}),
        json.dumps({"kind": "ops", "row": {}, "results": {}, "facts": None}),
        json.dumps({"kind": 7, "row": {}, "results": {}}),
        json.dumps({"kind": "ops", "row": {}, "results": {"a": {"timing": timing(high=math.inf)}}}),
        json.dumps({"kind": "ops", "row": {}, "results": {"a": {"timing": timing(rounds=0)}}}),
        json.dumps({"kind": "ops", "row": {}, "results": {"a": {"timing": {"median": -1}}}}),
        json.dumps({"kind": "ops", "row": {}, "results": {"a": {"timing": {"low": 1}}}}),
        json.dumps({"kind": "ops", "row": {}, "results": {"a": 1}}),
    ]
    path.write_text(good + "\n".join(broken), encoding="utf-8")
    # The last line has no end: appending must not join it.
    append(path, record(conv2d=2.0), environment())
    found = read(path)
    assert [r.median("conv2d") for r in found] == [1.0, 2.0]
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == len(broken)
    for number, line in enumerate(errors, 2):
        assert line.startswith(f"{path}:{number}: not a result row (") and line.endswith("skipped")
    assert latest(found)[0].median("conv2d") == 2.0


def test_tables_tell_layouts_apart_and_show_wrong_rows_first() -> None:
    rows = [record(conv2d=1.0, dcconv_cpu=ratio) for ratio in (1.0, 4.0, 2.0)]
    for row, layer, layout in zip(rows, "aab", ("nchw", "nhwc", "nchw"), strict=True):
        row.row = {"layer": layer, "operator": "o", "mode": "m", "dtype": "d", "pass": "fwd"}
        row.row["layout"] = layout
        row.facts |= {"classes": ["stem"], "x_bytes": 1, "y_bytes": 1}
    rows[2].results["dcconv-cpu"] = {"timing": None, "note": "wrong: y off", "errors": {"y": None}}
    grid = time_grid(rows, worst=True)
    assert grid.header[:6] == ["layer", "operator", "mode", "dtype", "pass", "layout"]
    shown = [(cells[0], cells[5]) for cells in grid.cells]
    assert shown == [("b", "nchw"), ("a", "nhwc"), ("a", "nchw")]
    assert "y inf" in grid.cells[0]
    assert [cells[3] for cells in mean_grid(rows).cells] == ["nchw", "nhwc"]
    assert rate_grid(rows).header[5] == "layout"
    rows[0].row["layout"] = "nhwc"
    assert time_grid(rows[:2]).header[5] == "conv2d"


def test_every_layer_counts_once_in_a_mean() -> None:
    rows = [record(conv2d=1.0, dcconv_cpu=value) for value in (2.0, 2.0, 2.0, 8.0)]
    rows[3].row = {"layer": "b"}
    assert mean_by_layer(rows, lambda r: own_ratio(r, "conv2d")) == pytest.approx(4.0)
    assert mean_by_layer(rows, lambda r: own_ratio(r, "eager")) is None


def test_own_is_the_first_that_runs() -> None:
    refused = {"note": "missing: it runs on CUDA tensors"}
    wrong: dict[str, Any] = {"note": "wrong: y off"}
    assert first_own({"conv2d": {}, "dcconv-cuda": refused, "dcconv-cpu": wrong}) == "dcconv-cpu"
    assert first_own({"conv2d": {}, "dcconv-cuda": refused}) == "dcconv-cuda"
    assert first_own({"conv2d": {}}) is None


def test_slower_needs_disjoint_intervals() -> None:
    assert slower(record(dcconv_cpu=1.0, compiled=2.0), "compiled") == "no"
    assert slower(record(dcconv_cpu=1.01, compiled=1.0), "compiled") == "maybe"
    assert slower(record(dcconv_cpu=1.05, compiled=1.0), "compiled") == "yes"
    assert slower(record(dcconv_cpu=1.0), "compiled") == ""


def test_spread_marks_noisy_rows() -> None:
    quiet, noisy = record(conv2d=1.0), record(conv2d=1.0, eager=2.0)
    assert quiet.spread == pytest.approx(0.02) and not quiet.noisy
    noisy.results["eager"]["timing"]["high"] = 2.3
    assert noisy.spread == pytest.approx(0.16) and not noisy.noisy
    # Seven rounds: two standard errors are 0.5625 times the spread.
    noisy.results["eager"]["timing"]["high"] = 2.35
    assert noisy.spread == pytest.approx(0.185) and noisy.noisy


def test_staged_calls_time_their_second_half_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def prepare() -> int:
        now[0] += 100.0
        return next(clock)

    def call(prepared: int) -> None:
        now[0] += 1.0

    watch = Stopwatch("cpu")
    assert watch.sample(Staged(prepare, call)) == 1.0
    timings = watch.interleave({"a": Staged(prepare, call)}, Protocol(3, 0.0, warmup=1))
    assert timings["a"].median == 1000.0 and timings["a"].rounds == 3


class Gpu:
    """Notes what a stopwatch asks of CUDA; a call takes three milliseconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                gpu.asked.append("record")

            def synchronize(self) -> None:
                gpu.asked.append("synchronize")

            def elapsed_time(self, other: Any) -> float:
                return 3.0

        class Flush:
            def max(self) -> None:
                gpu.asked.append("flush")

        def zeros(size: int, **_: Any) -> Flush:
            gpu.asked.append(f"{size} bytes")
            return Flush()

        def properties(device: int) -> argparse.Namespace:
            return argparse.Namespace(L2_cache_size=1000)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.asked.append("delay"))
        monkeypatch.setattr(torch, "zeros", zeros)


@pytest.mark.parametrize("ahead", [True, False])
def test_a_sample_on_a_gpu_is_flushed_delayed_and_between_events(
    monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    gpu = Gpu(monkeypatch)
    watch = Stopwatch("cuda", ahead=ahead)
    staged = Staged(lambda: gpu.asked.append("prepare"), lambda _: gpu.asked.append("call"))
    assert watch.sample(staged) == pytest.approx(0.003)
    wanted = ["4000 bytes", "prepare", "flush", "delay", "record", "call", "record", "synchronize"]
    assert gpu.asked == [step for step in wanted if ahead or step != "delay"]
    timings = watch.interleave({"a": lambda: None}, Protocol(3, 0.0, warmup=1))
    assert timings["a"].median == pytest.approx(3.0)


def test_peak_sees_temporaries_and_not_what_was_there() -> None:
    x = torch.zeros(1 << 18)

    def call() -> torch.Tensor:
        y = x + 1
        z = y + 1
        del y
        return z + 1

    # Two of the three results live at a time.
    assert 2 * x.nbytes <= peak_bytes(call) < 2 * x.nbytes + 4096


def test_own_providers_follow_the_backends() -> None:
    assert [name for name in PROVIDERS if name.startswith(OURS)] == [
        f"{OURS}{name}"
        for name in (
            *("cuda", "triton", "cpu"),
            *("cuda-library", "cuda-fused", "cuda-graph"),
            *("triton-library", "triton-fused", "cpu-library", "cpu-fused"),
        )
    ]
    assert options.willing_backends("cpu") == ([] if compiled.missing else ["cpu"])
    assert BASELINES == ("conv2d", "eager", "formula", "compiled-eager", "compiled", "bcos")


def test_strategies_are_providers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warn, "_said", set())
    parser = argparse.ArgumentParser()
    ops.add_arguments(parser)

    def own(*arguments: str) -> list[str]:
        given = parser.parse_args(["--device", "cpu", "--backends", "cpu", *arguments])
        ops.complete(given)
        return [name.removeprefix(OURS) for name in given.own]

    assert own("--strategies", "fused,graph,library") == ["cpu", "cpu-fused", "cpu-library"]
    with pytest.warns(RuntimeWarning, match="--plans is named --strategies, and its plans library"):
        assert own("--plans", "A,G") == ["cpu", "cpu-library"]
    for option in ("--strategies", "--plans"):
        with pytest.raises(ValueError, match="--strategies must be one of library, fused, graph"):
            own(option, "C")
