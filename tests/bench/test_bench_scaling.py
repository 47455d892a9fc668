"""Growth of time: fits, sweeps, gate, records; no test looks at a time."""

from __future__ import annotations

import argparse
import io
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import layers as bench_layers
from bench import providers, scaling
from bench.cases import Case, find_operator
from bench.fit import fit, speed_ups
from bench.layers import Layer
from bench.records import Record, read
from bench.scaling import axis_values, exponent_text, lines, scaled
from bench.timing import Stopwatch

TINY = Layer(2, 8, 8, 4, 3)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Layer:
    """One tiny layer in the place of the list."""
    monkeypatch.setattr(bench_layers, "_CLASSES", {"operator": (TINY,)})
    monkeypatch.setattr(bench_layers, "_SHAPES", {})
    monkeypatch.setattr(bench_layers, "NETWORKS", {})
    return TINY


def measured(*arguments: str) -> tuple[int, str]:
    """Run the sub-command and return its exit status and what it prints."""
    parser = argparse.ArgumentParser()
    scaling.add_arguments(parser)
    fast = ["--device", "cpu", "--rounds", "1", "--min-time", "0", "--no-save"]
    fast += ["--threads", str(torch.get_num_threads()), "--layers", TINY.name]
    options = parser.parse_args([*fast, *arguments])
    options.no_save = options.results is None
    console = Console(file=io.StringIO(), width=250, markup=False)
    status = scaling.run(options, console)
    output: Any = console.file
    return status, output.getvalue()


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0, 3.0])
def test_fit_recovers_exponents(exponent: float) -> None:
    found = fit([(x, 0.07 * x**exponent) for x in (2, 4, 8, 16, 64)])
    assert found is not None
    assert found.exponent == pytest.approx(exponent, abs=1e-12)
    assert found.error == pytest.approx(0.0, abs=1e-12)
    assert found.points == 5
    assert not found.poor
    if exponent:
        assert found.r2 == pytest.approx(1.0)


def test_fit_agrees_with_the_textbook() -> None:
    """Slope, standard error and R^2 of logs (0, 0), (1, 2), (2, 1), (3, 3), worked out by hand."""
    points = [(1.0, 1.0), (10.0, 100.0), (100.0, 10.0), (1000.0, 1000.0)]
    found = fit(points)
    assert found is not None and found.error is not None
    assert found.exponent == pytest.approx(0.8)
    # Residuals -0.3, 0.9, -0.9, 0.3: sum of squares 1.8, of the abscissas 5, of the ordinates 5.
    assert found.error == pytest.approx((1.8 / 2 / 5) ** 0.5)
    assert found.r2 == pytest.approx(1 - 1.8 / 5)
    assert found.poor


def test_noise_makes_a_fit_poor_and_two_points_tell_little() -> None:
    draw = random.Random(0)
    noisy = fit([(x, x * 4 ** draw.uniform(-1, 1)) for x in (1, 2, 4, 8, 16)])
    assert noisy is not None and noisy.poor and noisy.r2 < 0.98
    assert exponent_text(noisy).endswith("?")
    two = fit([(1, 1.0), (2, 4.0)])
    assert two is not None and two.error is None and two.poor
    assert exponent_text(two) == "2.00 ?"
    assert fit([(1, 1.0)]) is None
    assert fit([(2, 1.0), (2, 3.0)]) is None


def test_speed_ups() -> None:
    found = speed_ups([(1, 12.0), (2, 8.0), (4, 3.0)])
    assert [s.speed_up for s in found] == [1.0, 1.5, 4.0]
    assert [s.efficiency for s in found] == [1.0, 0.75, 1.0]
    assert speed_ups([(2, 8.0)]) == []


def test_values_are_those_a_layer_can_have() -> None:
    layer, factors = Layer(2, 12, 7, 6, 3), (0.25, 0.5, 1.0, 2.0)
    assert axis_values(layer, "batch", factors, 1) == (1, 2, 4)
    assert axis_values(layer, "image", factors, 1) == (7, 14)
    assert axis_values(layer, "channels", factors, 1) == (6, 12, 24)
    assert axis_values(layer, "threads", factors, 6) == (1, 2, 4)
    depthwise = Layer(2, 12, 8, 12, 3, groups=12)
    assert scaled(depthwise, "channels", 6) == Layer(2, 6, 8, 6, 3, groups=6)
    grouped = Layer(2, 12, 8, 12, 3, groups=4)
    assert axis_values(grouped, "channels", factors, 1) == (12, 24)


def test_work_has_the_exponents_of_a_convolution() -> None:
    layer = Layer(2, 64, 32, 64, 3)
    case = Case(layer, find_operator("tanh-cosine"), "fixed", "float32")
    for axis, want in (("batch", 1.0), ("image", 2.0), ("channels", 2.0)):
        sweep = scaling.Sweep(case, axis, axis_values(layer, axis, (1, 2, 4), 1))
        found = fit((v, scaling.cost(sweep.at(v), "fwd+bwd").flops) for v in sweep.values)
        assert found is not None
        assert found.exponent == pytest.approx(want, abs=0.01)


def test_rows_tables_and_fits(tiny: Layer, tmp_path: Path) -> None:
    status, text = measured(
        "--axes", "batch,image,channels", "--backends", "reference", "--providers", "conv2d,eager",
        "--results", str(tmp_path),
    )  # fmt: skip
    assert status == 0
    records = read(tmp_path / "scaling.jsonl")
    assert len({record.key for record in records}) == len(records)
    found = lines(records)
    assert [(line.names[-2], line.names[-1]) for line in found] == [
        (which, axis) for axis in ("batch", "image", "channels") for which in ("fwd", "fwd+bwd")
    ]
    by_axis = {line.names[-1]: [r.row["value"] for r in line.records] for line in found}
    assert by_axis == {
        "batch": [1, 2, 4, 8], "image": [2, 4, 8, 16, 32], "channels": [2, 4, 8, 16, 32],
    }  # fmt: skip
    for line in found:
        assert [value for value, _ in line.of("eager")] == by_axis[line.names[-1]]
    for expected in ("Exponents", "work", "R²", "conv2d", "eager", " ± "):
        assert expected in text


def test_fits_come_from_the_rows() -> None:
    def row(value: int, threads: int = 2, axis: str = "batch") -> Record:
        names = {"layer": "l", "operator": "o", "mode": "m", "dtype": "d", "layout": "c"}
        timing = {"median": 3.0 * value**1.5, "low": 1.0, "high": 1.0, "rounds": 3}
        return Record(
            "scaling",
            {**names, "pass": "fwd", "axis": axis, "value": value, "threads": threads},
            {
                "conv2d": {"timing": timing, "note": None},
                "eager": {"timing": None, "note": "wrong"},
            },
            {"flops": value**2, "bytes": value},
        )

    (line, other) = lines([row(4), row(1), row(2), row(8, threads=1)])
    assert [r.row["value"] for r in line.records] == [1, 2, 4]
    assert len(other.records) == 1
    found, work = line.fit("conv2d"), line.work("flops")
    assert found is not None and found.exponent == pytest.approx(1.5)
    assert work is not None and work.exponent == pytest.approx(2.0)
    assert line.fit("eager") is None and other.fit("conv2d") is None
    (threads,) = lines([row(n, n, "threads") for n in (2, 1)])
    assert [r.row["value"] for r in threads.records] == [1, 2]
    assert threads.fit("conv2d") is None


def test_threads_are_set_and_put_back(
    tiny: Layer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(scaling, "axis_values", lambda *_: (1, before + 1))
    status, text = measured(
        "--axes", "threads", "--backends", "reference", "--results", str(tmp_path)
    )
    assert status == 0
    assert torch.get_num_threads() == before
    records = read(tmp_path / "scaling.jsonl")
    assert [r.row["threads"] for r in records] == [1, before + 1] * 2
    assert "efficiency" in text and "Exponents" not in text


def test_a_wrong_provider_is_not_timed(
    tiny: Layer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def build(case: Case) -> providers.Function:
        right = providers.formula(case)
        return lambda *tensors: 1.001 * right(*tensors)

    off = providers.PROVIDERS["formula"]._replace(build=build)
    monkeypatch.setitem(providers.PROVIDERS, "formula", off)
    status, text = measured(
        "--axes", "batch", "--providers", "conv2d,formula", "--backends", "reference",
        "--results", str(tmp_path),
    )  # fmt: skip
    assert status == 1
    assert "formula: wrong: y off by" in text
    for record in read(tmp_path / "scaling.jsonl"):
        assert record.wrong == ["formula"]
        assert record.timing("formula") is None and record.timing("conv2d") is not None


def test_more_sizes_than_dynamo_compiles_of_one_function(
    tiny: Layer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def build(case: Case) -> providers.Function:
        function: providers.Function = torch.compile(
            providers.formula(case), backend="eager", dynamic=False, fullgraph=True
        )
        return function

    quick = providers.PROVIDERS["compiled"]._replace(build=build)
    monkeypatch.setitem(providers.PROVIDERS, "compiled", quick)
    status, _ = measured(
        "--axes", "image,channels", "--passes", "fwd", "--providers", "compiled",
        "--backends", "reference", "--results", str(tmp_path),
    )  # fmt: skip
    assert status == 0
    records = read(tmp_path / "scaling.jsonl")
    assert len(records) == 10 and all(r.timing("compiled") is not None for r in records)


def test_a_refusing_backend_shows_its_sentence(tiny: Layer) -> None:
    status, text = measured("--axes", "batch", "--backends", "cuda")
    assert status == 0
    assert "dcconv-cuda: missing: it runs on CUDA tensors, got a cpu tensor" in text


def test_an_interrupt_keeps_finished_rows(
    tiny: Layer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right, calls = Stopwatch.interleave, []

    def interrupted(self: Stopwatch, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return right(self, *arguments)

    monkeypatch.setattr(Stopwatch, "interleave", interrupted)
    status, text = measured(
        "--axes", "batch", "--backends", "reference", "--results", str(tmp_path)
    )
    assert status == 130
    assert "Interrupted: 3 rows are finished." in text
    assert [r.row["value"] for r in read(tmp_path / "scaling.jsonl")] == [1, 2, 4]
    assert "Exponents" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--layers", "n1-c1"), r"--layers must .*n2-c8-h8-o4-k3.*, got 'n1-c1'"),
        (("--axes", "depth"), r"--axes must .*batch.*threads.*, got 'depth'"),
        (("--operators", "sine-cosine"), r"--operators must .*tanh.*, got 'sine-cosine'"),
        (("--mode", "no-rho"), r"--mode must be one of fixed, batch for tanh-cosine, got 'no-rho'"),
        (("--passes", "both"), r"--passes must .*fwd\+bwd.*, got 'both'"),
        (("--providers", "mine"), r"--providers must .*conv2d.*, got 'mine'"),
        (("--backends", "gpu"), r"--backends must .*reference.*, got 'gpu'"),
    ],
)
def test_unknown_names_list_the_known_ones(
    tiny: Layer, arguments: tuple[str, str], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        measured(*arguments)
