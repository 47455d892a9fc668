"""The accuracy and cost of functions: ulp, truth, gate, records; no test looks at a time."""

from __future__ import annotations

import argparse
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from bench import __main__ as command
from bench import exact, functions
from bench.functions import BEYOND_L2, FUNCTIONS, IN_L2, VALUE, make_truth, points, ulps
from bench.records import latest, read
from bench.timing import Stopwatch
from dcconv import native as compiled
from dcconv.operator.functions import angulars, magnitudes
from dcconv.operator.numerics import ANGLE_DELTA

needs_library = pytest.mark.skipif(compiled.missing is not None, reason=str(compiled.missing))
needs_wide = pytest.mark.skipif(exact.why_not is not None, reason=str(exact.why_not))


def measured(*arguments: str) -> tuple[int, str]:
    """Run the sub-command on one thread and return its exit status and what it prints."""
    parser = argparse.ArgumentParser()
    functions.add_arguments(parser)
    fast = ["--device", "cpu", "--quick", "--rounds", "1", "--min-time", "0"]
    fast += ["--threads", str(torch.get_num_threads())]
    options = parser.parse_args([*fast, *arguments])
    console = Console(file=io.StringIO(), width=250, markup=False)
    status = functions.run(options, console)
    output: Any = console.file
    return status, output.getvalue()


def ulp_of(dtype: torch.dtype, found: float, truth: float, unit: float | None = None) -> float:
    one = torch.tensor([found], dtype=dtype)
    return float(ulps(one, np.array([truth]), np.array([abs(truth if unit is None else unit)]))[0])


@pytest.mark.parametrize(
    ("dtype", "digits"),
    [(torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 24), (torch.float64, 53)],
    ids=str,
)
def test_ulp_by_hand(dtype: torch.dtype, digits: int) -> None:
    step = 2.0 ** (1 - digits)
    assert ulp_of(dtype, 1.0, 1.0) == 0.0
    assert ulp_of(dtype, 1.0 + 3 * step, 1.0) == 3.0
    # Below 1 the numbers are twice as close: the truth counts, not what was found.
    assert ulp_of(dtype, 1.0, 1.0 - step / 2) == 1.0
    assert ulp_of(dtype, -4.0, -4.0 - 8 * step) == 2.0
    # At the larger number the same distance is fewer ulp.
    assert ulp_of(dtype, 1.0 + 4 * step, 1.0, unit=4.0) == 1.0


def test_ulp_at_the_ends_of_a_dtype() -> None:
    tiny = torch.finfo(torch.float16).smallest_normal
    assert ulp_of(torch.float16, 2.0**-24, 0.0) == 1.0
    assert ulp_of(torch.float16, tiny + 2.0**-24, tiny) == 1.0
    assert ulp_of(torch.float16, tiny / 4 + 2.0**-24, tiny / 4) == 1.0
    assert ulp_of(torch.float16, math.inf, 1e6) == 0.0
    assert ulp_of(torch.float16, -math.inf, 1e6) == math.inf
    assert ulp_of(torch.float16, math.inf, 1e3) == math.inf
    assert ulp_of(torch.float16, 65504.0, 1e6) > 1e3
    assert ulp_of(torch.float32, math.nan, 1.0) == math.inf


def test_every_function_is_measured() -> None:
    assert {f.of for f in FUNCTIONS.values() if f.is_magnitude} == set(magnitudes)
    assert {f.of for f in FUNCTIONS.values() if not f.is_magnitude} == set(angulars)
    assert FUNCTIONS["h-tanh-product"].parts == ("value", "d/db", "d/drho", "d/da")
    assert FUNCTIONS["h-log"].parts == ("value", "d/db")
    assert FUNCTIONS["g-sigmoid"].parts == ("value", "d/dc", "d/dk")
    assert FUNCTIONS["g-cosine"].parts == ("value", "d/dc")


def test_points_are_the_same_in_float32_and_reach_the_ends() -> None:
    for function in FUNCTIONS.values():
        for column in points(function):
            assert torch.equal(column, column.float().double())
    a, b, rho = points(FUNCTIONS["h-ball"])
    assert b.min() < 1e-5 and b.max() > 1e5 and a.min() < 0.1 and a.max() > 10
    # At b = rho slopes jump, and rounding would decide on which side.
    assert float((b / rho - 1).abs().min()) > 1e-4
    c, _ = points(FUNCTIONS["g-linear"])
    before_one = torch.tensor(1.0).nextafter(torch.tensor(0.0)).double()
    for end in (-1.0, 1.0):
        assert bool((c == end).any()) and bool((c == end * before_one).any())
    assert c.max() > 1 and c.min() < -1


@needs_wide
@pytest.mark.parametrize("name", FUNCTIONS)
def test_exact_formulas_are_those_of_the_specification(name: str) -> None:
    function = FUNCTIONS[name]
    reason = exact.why_not_function(function.of, function.is_magnitude)
    if reason is not None:
        pytest.skip(reason)
    at = tuple(column[::7] for column in points(function))
    truth = functions.specification(function, at, 1e-6)
    numbers = [t.numpy() for t in at]
    if function.is_magnitude:
        found = exact.magnitude(function.of, function.weighting, *numbers, 1.0, 0.5)
    else:
        found = exact.angular(function.of, *numbers, functions.POWER, 1e-6)
    for part, value in functions.parts_of(function, found).items():
        difference = np.abs(truth[part].numpy() - value)
        # Slopes of saturated functions cancel in the specification against value / argument.
        assert float(difference.max()) <= 1e-12 * float(np.abs(value).max()), part


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_shipping_functions_are_within_their_ulp(dtype: torch.dtype) -> None:
    if dtype == torch.float64 and exact.why_not is not None:
        pytest.skip(exact.why_not)
    for name in ("h-tanh", "h-mix-linear", "g-linear", "g-sigmoid"):
        function = FUNCTIONS[name]
        truth = make_truth(function, dtype, "cpu")
        assert truth is not None
        result, wrong = functions.check(function, "cpu", dtype, truth)
        assert wrong == [], name
        assert 0 <= result["rms_ulp"][VALUE] <= result["max_ulp"][VALUE]
        assert result["max_ulp"][VALUE] <= function.allowed_ulp(dtype)


def test_allowed_ulp() -> None:
    assert FUNCTIONS["h-tanh"].allowed_ulp(torch.float32) == 4
    assert FUNCTIONS["h-log-linear"].allowed_ulp(torch.float64) == 5
    assert FUNCTIONS["g-sigmoid"].allowed_ulp(torch.float32) == 12
    assert FUNCTIONS["g-linear"].allowed_ulp(torch.bfloat16) == 0.5 + 4 * 2.0**-16


@pytest.mark.parametrize("part", ["value", "d/dc"])
def test_a_wrong_function_fails(part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def off(function: Any, at: Any, delta: float) -> functions.Parts:
        found = functions.specification(function, at, delta)
        found[part] = found[part] * (1 + (1e-6 if part == VALUE else 1e-3))
        return found

    monkeypatch.setitem(functions.EVALUATE, "reference", off)
    arguments = ("--functions", "g-power", "--backends", "reference", "--results", str(tmp_path))
    status, text = measured(*arguments)
    assert status == 1
    (record, _) = latest(read(tmp_path / "functions.jsonl"))
    assert record.wrong == ["reference"]
    assert record.timing("reference") is None
    assert record.timing("conv2d") is not None
    assert f"{part} off by" in record.results["reference"]["note"]
    assert f"wrong: {part} off by" in text


def test_a_wrong_operator_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = functions.operator

    def off(function: Any, backend: str) -> Any:
        call = right(function, "reference")
        if backend == "reference":
            return call
        return lambda *tensors: 1.01 * call(*tensors)

    monkeypatch.setattr(functions, "operator", off)
    monkeypatch.setattr(functions, "allowed_to_run", lambda *_: None)
    monkeypatch.delitem(functions.EVALUATE, "cpu")
    arguments = ("--functions", "h-log", "--backends", "cpu,reference", "--no-save")
    status, text = measured(*arguments)
    assert status == 1
    assert "dcconv-cpu: wrong: y off by" in text


def test_records_and_tables(tmp_path: Path) -> None:
    arguments = ("--functions", "h-tanh,h-log", "--backends", "reference")
    status, text = measured(*arguments, "--results", str(tmp_path))
    assert status == 0
    records = read(tmp_path / "functions.jsonl")
    assert [r.row["function"] for r in records] == ["h-tanh"] * 2 + ["h-log"] * 2
    assert len({r.key for r in records}) == 4
    forward, both = records[:2]
    assert forward.row["pass"] == "fwd" and forward.row["points"] == IN_L2.name
    assert set(forward.results) == {"reference", "conv2d", "copy", "tanh", "asin"}
    assert set(both.results) == {"reference", "conv2d"}
    for name, result in forward.results.items():
        median = forward.median(name)
        assert median is not None
        assert result["ns"] == pytest.approx(median * 1e6 / forward.facts["elements"])
    assert set(both.results["reference"]["max_ulp"]) == {"value", "d/db", "d/drho"}
    for expected in ("h-tanh", "d/drho", "max ulp", "Cost, ns per element"):
        assert expected in text


def test_a_refusing_backend_shows_its_sentence() -> None:
    status, text = measured("--functions", "h-log", "--backends", "cuda,reference", "--no-save")
    assert status == 0
    assert "dcconv-cuda: missing: it runs on CUDA tensors, got a cpu tensor" in text


def test_an_interrupt_keeps_finished_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right, calls = Stopwatch.interleave, []

    def interrupted(self: Stopwatch, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return right(self, *arguments)

    monkeypatch.setattr(Stopwatch, "interleave", interrupted)
    arguments = ("--functions", "h-log", "--backends", "reference", "--results", str(tmp_path))
    status, text = measured(*arguments)
    assert status == 130
    assert "Interrupted: 1 rows are finished." in text
    assert len(read(tmp_path / "functions.jsonl")) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--functions", "h-sine"), r"--functions must .*h-tanh-product.*, got 'h-sine'"),
        (("--functions", ""), r"--functions must name one or more of h-sphere"),
        (("--passes", "bwd"), r"--passes must .*fwd.*fwd\+bwd.*, got 'bwd'"),
        (("--backends", "gpu"), r"--backends must .*reference.*, got 'gpu'"),
        (("--dtype", "float8"), r"--dtype must .*bfloat16.*, got 'float8'"),
    ],
)
def test_unknown_names_list_the_known_ones(arguments: tuple[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        measured(*arguments)


def test_the_two_layers_differ_in_size_only() -> None:
    assert IN_L2._replace(size=BEYOND_L2.size) == BEYOND_L2
    assert 4 * math.prod(IN_L2.y_shape) <= 2**18 < 2**23 < 4 * math.prod(BEYOND_L2.y_shape)


def test_the_command_knows_it() -> None:
    assert "functions" in command.COMMANDS
    assert set(ANGLE_DELTA) == {*functions.DTYPES.values()}
