"""The GPU gate's own logic, rehearsed on the CPU: states, time, workers, reports, checks."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_gate
import pytest
import torch
from cases import by_id
from cases import make_inputs as draw
from gate import build, checks, environment, measure, sanitizer, worker
from gate.checks import Where
from gate.report import FAILED, NOT_RUN, OK, Budget, NotRun, Report, Row, exit_code, slug

from dcconv import functional, native

HERE = Where("cpu", "cpu" if native.missing is None else "reference", reduced=True)


class Clock:
    """Seconds that pass when a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeWorker:
    """Answers from a table; an exception in it is a crash, a number the seconds of a hang."""

    def __init__(self, clock: Clock, answers: dict[str, Any]) -> None:
        self.clock, self.answers, self.alive, self.stopped = clock, answers, True, False
        self._process = self

    def kill(self) -> None:
        self.alive = False

    def stop(self) -> None:
        self.alive, self.stopped = False, True

    def ask(self, name: str, timeout: float) -> tuple[Row | None, str]:
        found = self.answers[name]
        if isinstance(found, Exception):
            self.alive = False
            return None, "the process ended with code -11"
        if isinstance(found, float):
            self.clock.now += min(found, timeout)
            if found > timeout:
                return None, f"no answer in {timeout:.0f} s"
            found = Row(name, OK, {"seconds": found})
        return found, ""


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report(tmp_path / "device", {"device": "Test GPU", "commit": "abc", "dirty": False})


def run(report: Report, clock: Clock, answers: dict[str, Any], **settings: Any) -> list[FakeWorker]:
    started: list[FakeWorker] = []

    def start() -> Any:
        started.append(FakeWorker(clock, answers))
        return started[-1]

    budget = Budget(settings.pop("budget", 100.0), clock)
    limits = dict.fromkeys(answers, settings.pop("limit", 50.0))
    worker.run_rows(list(answers), report, budget, start, limits, **settings)
    return started


def states(report: Report) -> dict[str, str]:
    return {row.name: row.state for row in report.rows}


def test_exit_code() -> None:
    assert exit_code([Row("a", OK), Row("b", NOT_RUN)]) == 0
    assert exit_code([Row("a", OK), Row("b", FAILED)]) == 1
    assert exit_code([Row("a", NOT_RUN)]) == 1
    assert exit_code([]) == 1


def test_rows_after_the_budget_are_not_run(report: Report, clock: Clock) -> None:
    started = run(report, clock, {"a": 40.0, "b": 40.0, "c": 40.0, "d": 1.0}, prefix="ptx: ")
    assert states(report) == {"ptx: a": OK, "ptx: b": OK, "ptx: c": NOT_RUN, "ptx: d": NOT_RUN}
    assert [row.message for row in report.rows[2:]] == ["time", "time"]
    assert len(started) == 1 and started[0].stopped


def test_a_hang_fails_and_the_next_row_gets_a_new_worker(report: Report, clock: Clock) -> None:
    started = run(report, clock, {"a": 60.0, "b": 1.0}, limit=30.0)
    assert states(report) == {"a": FAILED, "b": OK}
    assert report.rows[0].message == "no answer in 30 s"
    assert len(started) == 2 and all(w.stopped for w in started)


def test_a_crash_costs_one_row(report: Report, clock: Clock) -> None:
    started = run(report, clock, {"a": RuntimeError(), "b": 1.0})
    assert states(report) == {"a": FAILED, "b": OK}
    assert "code -11" in report.rows[0].message and len(started) == 2


def test_a_broken_context_is_left(report: Report, clock: Clock) -> None:
    broken = Row("a", FAILED, message="AcceleratorError: CUDA error: an illegal memory access")
    started = run(report, clock, {"a": broken, "b": Row("b", FAILED, message="wrong"), "c": 1.0})
    assert states(report) == {"a": FAILED, "b": FAILED, "c": OK} and len(started) == 2


def test_every_row_is_on_disk_at_once(report: Report) -> None:
    report.add(Row("a", OK, {"rate": 0.91234, "bad": float("nan")}, 1.25))
    report.add(Row("b", NOT_RUN, message="no | such\ntool"))
    saved = json.loads(report.json.read_text())
    assert [row["name"] for row in saved["rows"]] == ["a", "b"] and not saved["complete"]
    assert saved["rows"][0]["figures"] == {"rate": 0.91234, "bad": None}
    text = report.markdown.read_text()
    assert "| a | ok | 1.2 | rate 0.912, bad nan |  |" in text
    assert "| b | **not run** | 0.0 |  | no \\| such tool |" in text
    assert "1 ok, 0 failed, 1 not run. The run did not end." in text
    assert report.finish() == 0
    assert json.loads(report.json.read_text())["complete"]
    assert "did not end" not in report.markdown.read_text()
    assert not list(report.json.parent.glob("*.part"))


def test_earlier_rows_are_kept_for_the_same_code_only(report: Report) -> None:
    folder, facts = report.json.parent, report.environment
    report.add(Row("a", OK))
    report.add(Row("b", FAILED))
    for change, kept in (
        ({"date": "later"}, ["a"]),
        ({"commit": "def"}, []),
        ({"dirty": True}, []),
    ):
        other = Report(folder, facts | change)
        other.keep_earlier(["b"])
        assert [row.name for row in other.rows] == kept


def test_names() -> None:
    assert slug("NVIDIA H200") == "nvidia-h200"
    names = [*gpu_gate.FIRST, *gpu_gate.SECOND, *gpu_gate.RATES]
    known = gpu_gate.checks_of(HERE)
    assert set(names) <= known.keys()
    assert {n for n in known if n.startswith("layer ")}
    assert build.native_arch((10, 0)) == "10.0"
    unlisted = {n for n in known if not n.startswith(("layer ", "ptx: "))} - set(names)
    assert unlisted == {"small cases"}  # what the sanitizers watch


def test_answers() -> None:
    def raises(error: Exception) -> Callable[[], Any]:
        def check() -> Any:
            raise error

        return check

    assert worker.answer("a", lambda: {"x": 1, "message": "m"}).message == "m"
    row = worker.answer("a", raises(NotRun("no tool")))
    assert (row.state, row.message) == (NOT_RUN, "no tool")
    row = worker.answer("a", raises(RuntimeError("CUDA error:\n  bad")))
    assert (row.state, row.message) == (FAILED, "RuntimeError: CUDA error: bad")
    row = worker.answer("a", raises(AssertionError()))
    assert "test_gpu_gate.py" in row.message


MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at dcconv::past_the_end(int *)+0x90
=========     by thread (1,0,0) in block (0,0,0)
========= ERROR SUMMARY: 1 error
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at dcconv::race(int *)+0x60
=========     and Read access at dcconv::race(int *)+0xa0 [64 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
REFUSED = """========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section
"""


def test_sanitizer_output_is_judged() -> None:
    clean = "{'calls': 6}\n========= ERROR SUMMARY: 0 errors\n"
    assert sanitizer.judge("memcheck", clean, 0) == {"problems": 0}
    clean = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert sanitizer.judge("racecheck", clean, 0) == {"problems": 0}
    with pytest.raises(AssertionError, match="1 problems, the first: Invalid __global__ write"):
        sanitizer.judge("memcheck", MEMCHECK, 99)
    with pytest.raises(AssertionError, match="1 problems, the first: Error: Race reported"):
        sanitizer.judge("racecheck", RACECHECK, 99)
    with pytest.raises(NotRun, match="did not run: Error: Device not supported"):
        sanitizer.judge("memcheck", REFUSED, 255)
    with pytest.raises(NotRun, match="no output"):
        sanitizer.judge("racecheck", "", 0)
    with pytest.raises(AssertionError, match="ended with code 1"):
        sanitizer.judge("memcheck", "AssertionError: wrong\n========= ERROR SUMMARY: 0 errors", 1)


def fake_sanitizer(folder: Path, text: str) -> Path:
    path = folder / "compute-sanitizer"
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\n")
    path.chmod(0o755)
    return path


def test_a_sanitizer_that_misses_planted_faults_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(sanitizer, "find", lambda: str(fake_sanitizer(tmp_path, REFUSED)))
    with pytest.raises(NotRun, match="the program of planted faults was not built"):
        sanitizer.check("memcheck", ["true"], 10.0)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(NotRun, match="misses planted faults: Error: Device not supported"):
        sanitizer.check("memcheck", ["true"], 10.0)
    monkeypatch.setattr(sanitizer, "find", lambda: str(fake_sanitizer(tmp_path, MEMCHECK)))
    with pytest.raises(AssertionError, match="1 problems"):
        sanitizer.check("memcheck", ["true"], 10.0)


def test_sanitizer_command_filters_our_kernels() -> None:
    line = sanitizer.command("cs", "racecheck", ["python", "p.py"])
    assert line[0] == "cs" and line[-2:] == ["python", "p.py"]
    assert line[line.index("--kernel-name") + 1] == "kns=dcconv"
    assert line[line.index("--tool") + 1] == "racecheck"


def test_missing_sanitizer_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    if not Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        with pytest.raises(NotRun, match="compute-sanitizer is not installed"):
            sanitizer.find()


def junit(body: str) -> str:
    return f'<?xml version="1.0"?><testsuites><testsuite>{body}</testsuite></testsuites>'


def test_suite_results_are_judged() -> None:
    good = '<testcase name="a"/><testcase name="b"><skipped message="s"/></testcase>'
    assert gpu_gate.judge_suite(junit(good), 0) == {"passed": 1, "skipped": 1}
    bad = good + '<testcase name="c"><failure message="err(kernel)">long</failure></testcase>'
    with pytest.raises(AssertionError, match=r"1 of 3 failed: c; err\(kernel\)"):
        gpu_gate.judge_suite(junit(bad), 1)
    with pytest.raises(AssertionError, match="ended with code 2, 1 passed"):
        gpu_gate.judge_suite(junit(good), 2)
    with pytest.raises(AssertionError, match="0 passed"):
        gpu_gate.judge_suite(junit(""), 0)


def test_summary_of_layers() -> None:
    def layer(name: str, ratio: float) -> Row:
        keys = [f"{s} / {b}" for s in ("fwd", "both") for b in ("compiled", "eager", "conv2d")]
        return Row(f"layer {name}", OK, dict.fromkeys(keys, ratio))

    rows = [layer("a", 0.5), layer("b", 2.0), Row("layer c", NOT_RUN), Row("rates", OK)]
    figures = gpu_gate.summary(rows)
    assert figures["fwd / eager"] == pytest.approx(1.0) and figures["layers"] == 2
    assert figures["both / compiled, worst"] == 2.0
    assert figures["message"] == "1 layers were not measured"
    with pytest.raises(NotRun, match="no layer"):
        gpu_gate.summary(rows[2:])


def test_op_bytes_count_every_argument_and_result_once() -> None:
    x, y = torch.zeros(10, 4), torch.zeros(10, 4)
    add, add_ = torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor
    assert measure.op_bytes(add, (x, y), {}, x + y) == 3 * 160
    assert measure.op_bytes(add_, (x, y), {}, x) == 3 * 160
    stack = torch.ops.aten.stack.default
    assert measure.op_bytes(stack, ([x, y],), {}, torch.stack([x, y])) == 4 * 160


@pytest.mark.skipif(native.missing is not None, reason=str(native.missing))
def test_recorded_ops_move_what_the_design_counts() -> None:
    """x, weight, y, norm map, dot forward; dy, x, weight, y, map back: each once."""
    inputs = draw(by_id("3x3-p1"), torch.bfloat16, norm="given")
    recorder = checks.record(HERE, inputs, cloned=False)
    names = [func._schema.name for func, *_ in recorder.calls]
    assert names == ["dcconv::conv2d_forward", "dcconv::conv2d_backward"]
    x, y, w, grid = 2 * 2 * 17 * 42, 2 * 2 * 9 * 42, 2 * 9 * 17 * 9, 4 * 2 * 42
    small = 4 * 9 + 4
    moved = [measure.op_bytes(*call) for call in recorder.calls]
    forward = x + w + y + grid + small
    assert forward <= moved[0] <= forward + 64
    backward = 2 * y + 2 * x + 2 * w + grid + small + 4 * 9
    assert backward <= moved[1] <= backward + 64


def test_sources_are_copied_without_what_was_built(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in (*build.SOURCES, "csrc/a.cu", "dcconv/a.py", "dcconv/_C.abi3.so"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    build.copy_sources(root, tmp_path / "copy")
    assert (tmp_path / "copy/csrc/a.cu").exists() and (tmp_path / "copy/dcconv/a.py").exists()
    assert not (tmp_path / "copy/dcconv/_C.abi3.so").exists()


def test_failed_builds_say_why(tmp_path: Path) -> None:
    (tmp_path / "setup.py").write_text("raise ValueError('no compiler')\n")
    assert build.Build(tmp_path, "9.0a").wait(60.0) == "ValueError: no compiler"
    (tmp_path / "setup.py").write_text("")
    assert build.Build(tmp_path, "9.0a").wait(60.0) == "it left no library"
    (tmp_path / "setup.py").write_text("import time\ntime.sleep(100)\n")
    assert build.Build(tmp_path, "9.0a").wait(0.2) == "it took more than 0 s"


@pytest.mark.skipif(environment.why_no_gpu() is None, reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    why = environment.why_no_gpu()
    assert gpu_gate.main(["--results", str(tmp_path)]) == 2
    said = capsys.readouterr().err.strip()
    assert said == f"dcconv: the GPU gate must run on a machine with a GPU: {why}"
    assert not list(tmp_path.iterdir())


# The checks themselves: each passes, and sees the fault that it is there for.

PASSING = (
    "accuracy float32",
    "accuracy float32 with TF32",
    "wide layers bfloat16",
    "gradcheck",
    "unwritten memory",
    "other devices",
    "many blocks",
    "over 2^31 elements channels_last",
    "rates contiguous",
    "small cases",
)


@pytest.mark.parametrize("name", PASSING)
def test_checks_pass_on_the_cpu(name: str) -> None:
    check, _ = gpu_gate.checks_of(HERE)[name]
    row = worker.answer(name, check)
    assert row.state == OK, row.message
    assert row.figures


Tamper = Callable[[torch.Tensor, int], torch.Tensor]


@pytest.fixture
def tampered(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tamper], None]:
    """Change what the operator returns: the fixture takes a function of y and the call's number."""
    genuine, calls = functional.decoupled_conv2d, []

    def install(tamper: Tamper) -> None:
        def call(*arguments: Any, **options: Any) -> torch.Tensor:
            calls.append(0)
            return tamper(genuine(*arguments, **options), len(calls))

        monkeypatch.setattr(functional, "decoupled_conv2d", call)

    return install


def last_image(y: torch.Tensor, number: int) -> torch.Tensor:
    return torch.cat([y[:-1], -y[-1:]]) if len(y) > 5 else y


@pytest.mark.parametrize(
    ("name", "tamper", "message"),
    [
        ("accuracy float32", lambda y, i: y * 1.001, "err\\(kernel\\)"),
        ("accuracy float32 with TF32", lambda y, i: y * 1.2, "err\\(kernel\\)"),
        ("small cases", lambda y, i: -y, "err\\(kernel\\)"),
        ("determinism", lambda y, i: y * (1 + 0.1 * i), "y differs"),
        ("unwritten memory", lambda y, i: y / 0.0, "is not finite"),
        ("over 2^31 elements contiguous", last_image, "image 19: y"),
        ("many blocks", lambda y, i: y.roll(1, 0).roll(1, 1), "err\\(kernel\\)"),
        ("gradcheck", lambda y, i: y.detach() + (y - y.detach()) * 1.5, "Jacobian"),
    ],
)
def test_checks_see_faults(
    name: str, tamper: Tamper, message: str, tampered: Callable[[Tamper], None]
) -> None:
    tampered(tamper)
    check, _ = gpu_gate.checks_of(HERE)[name]
    row = worker.answer(name, check)
    assert row.state == FAILED
    assert re.search(message, row.message), row.message


def test_calls_that_are_not_refused_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "decoupled_conv2d", lambda *a, **o: None)
    row = worker.answer("other devices", lambda: checks.other_devices(HERE))
    assert row.state == FAILED and "weight on meta was not refused" in row.message


@pytest.mark.parametrize("wrong", [None, 2])
def test_tiles_with_other_bits_are_seen(monkeypatch: pytest.MonkeyPatch, wrong: int | None) -> None:
    class Op:
        __name__ = "conv2d_one_pass.default"
        _schema = SimpleNamespace(arguments=[SimpleNamespace(name=n) for n in ("x", "tile")])

        def __call__(self, x: torch.Tensor, tile: int) -> tuple[torch.Tensor]:
            return (x + (tile == wrong),)

    x = torch.zeros(2)
    recorder = SimpleNamespace(calls=[(Op(), (x, -1), {}, (x,))])
    monkeypatch.setattr(checks, "record", lambda *arguments: recorder)
    monkeypatch.setattr(checks, "placed", lambda inputs, *arguments: inputs)
    row = worker.answer("shared memory", lambda: checks.shared_memory(checks.Where("cuda", "cuda")))
    assert row.state == (OK if wrong is None else FAILED), row.message
    assert wrong is None or "tile 2 gives other bits" in row.message


@pytest.mark.parametrize(
    "name", ["CUDA graph", "other stream", "launches", "op guards", "shared memory"]
)
def test_what_needs_a_gpu_says_so(name: str) -> None:
    row = worker.answer(name, gpu_gate.checks_of(HERE)[name][0])
    assert row.state == NOT_RUN and row.message.endswith("need a GPU")


def test_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command, its workers and its report."""
    chosen = [
        "arch*",
        "other devices",
        "shared memory",
        "unwritten*",
        "ptx: d*",
        "compute*",
        "layers*",
    ]
    call = ["--device", "cpu", "--backend", HERE.backend, "--reduced", "--results", str(tmp_path)]
    assert gpu_gate.main([*call, "--rows", *chosen]) == 0
    shown = capsys.readouterr().out
    saved = json.loads((tmp_path / "cpu/gpu-gate.json").read_text())
    assert saved["complete"] and saved["environment"]["torch"] == str(torch.__version__)
    assert {row["name"]: row["state"] for row in saved["rows"]} == {
        "architecture": NOT_RUN,
        "unwritten memory": OK,
        "other devices": OK,
        "shared memory": NOT_RUN,
        "compute-sanitizer memcheck": NOT_RUN,
        "compute-sanitizer racecheck": NOT_RUN,
        "ptx: determinism": NOT_RUN,
        "layers, all": NOT_RUN,
    }
    assert "unwritten memory" in shown
    assert gpu_gate.main([*call, "--budget", "0", "--rows", "patch norm"]) == 1
    (row,) = json.loads((tmp_path / "cpu/gpu-gate.json").read_text())["rows"]
    assert (row["state"], row["message"]) == (NOT_RUN, "time")


def test_the_small_program_runs() -> None:
    """What the sanitizers start."""
    call = [sys.executable, str(Path(gpu_gate.__file__)), "--small", "--reduced"]
    done = environment.output_of(*call, "--device", "cpu", "--backend", HERE.backend)
    assert done is not None and "'calls': 6" in done
