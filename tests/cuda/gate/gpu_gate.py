"""The GPU gate: everything that needs a GPU, in one command, with a report.

    make gpu-gate                                    at most 8 minutes
    python tests/cuda/gate/gpu_gate.py --rows 'layer *' --keep --budget 1800
    python tests/cuda/gate/gpu_gate.py --device cpu --backend cpu       a rehearsal without a GPU

Builds the library in place for the GPU at hand, checks every kernel, then builds a copy for sm_80
with PTX and checks that the driver's translation of it works too, then measures. Rows stand in
``ROWS`` in the order they run in; each is ``ok``, ``failed`` or ``not run`` with the reason, and is
on disk before the next begins. What does not fit into the budget is ``not run: time``.

The exit code is 0 if no row failed and 1 if one did; 2 means that nothing was checked. Nothing is
downloaded, and no environment is made: PyTorch, a CUDA toolkit and ninja must be there. A library
built here holds code for this GPU only.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

if str(Path(__file__).resolve().parents[2] / "support") not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))

import paths

paths.add_helpers()
ROOT = paths.ROOT

from gate import environment, sanitizer  # noqa: E402
from gate.build import Build, copy_sources, native_arch  # noqa: E402
from gate.report import (  # noqa: E402
    NOT_RUN,
    OK,
    Budget,
    Figures,
    NotRun,
    Report,
    Row,
    slug,
)
from gate.worker import NO_TIME, Worker, answer, run_rows, serve, take_stdout  # noqa: E402

BUDGET = 480.0

#: The tests that take a backend; those of the CPU backend's own are skipped by their marker.
SUITE = (
    "operator/test_conv2d.py",
    "call/test_ops.py",
    "layer/test_modules.py",
    "operator/test_golden.py",
    "operator/test_peers.py",
)

#: The target whose PTX the second pass runs.
PTX_ARCH = "8.0"

BUILD, SUITE_ROW, SUMMARY = "build", "test suite", "layers, all"
PTX_BUILD, PTX_PREFIX = "ptx: build", "ptx: "

Check = Callable[[], Figures]


def checks_of(where: Any) -> dict[str, tuple[Check, float]]:
    """Return every check that a worker makes: name, function, most seconds.

    Imports the library: only for workers, after the build.
    """
    import torch
    from gate import checks, measure, strategies

    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    found: dict[str, tuple[Check, float]] = {}

    def add(name: str, limit: float, function: Callable[..., Figures], *arguments: Any) -> None:
        found[name] = (functools.partial(function, where, *arguments), limit)

    add("architecture", 60, checks.architecture, "native")
    for dtype in dtypes:
        add(f"accuracy {str(dtype).removeprefix('torch.')}", 120, checks.accuracy, dtype)
    add("accuracy float32 with TF32", 60, checks.accuracy, torch.float32, True)
    for dtype in dtypes:
        add(f"wide layers {str(dtype).removeprefix('torch.')}", 60, checks.wide_layers, dtype)
    add("patch norm", 60, checks.patch_norm)
    add("gradcheck", 60, checks.gradcheck)
    add("opcheck", 90, checks.opcheck)
    add("determinism", 60, checks.determinism)
    add("unwritten memory", 60, checks.unwritten)
    add("CUDA graph", 60, checks.graph)
    add("other stream", 60, checks.stream)
    add("no synchronisation", 60, checks.no_synchronisation)
    add("launches", 60, checks.launches)
    add("other devices", 60, checks.other_devices)
    add("op guards", 60, checks.op_guards)
    add("shared memory", 30, checks.shared_memory)
    add("many blocks", 90, checks.many_blocks)
    for layout in checks.LAYOUTS[:2]:
        add(f"over 2^31 elements {layout}", 120, checks.large, layout)
    add("torch.compile", 120, checks.compiled)
    for strategy, name in strategies.CASES:
        for dtype in strategies.HALF if name in ("implicit GEMM", "cuDNN graph") else dtypes:
            short = str(dtype).removeprefix("torch.")
            add(f"{strategy}: {name} {short}", 120, strategies.accuracy, strategy, name, dtype)
    add("tiles of Triton's products", 300, strategies.triton_tiles)
    add("Triton's tuner", 300, strategies.triton_tuner)
    for layout in checks.LAYOUTS[:2]:
        add(f"rates {layout}", 60, measure.rates, layout)
    for name in measure.network_layers():
        add(f"layer {name}", 90, measure.layer_times, name)
    add("small cases", 90, checks.small_cases)
    add(f"{PTX_PREFIX}architecture", 120, checks.architecture, "800")
    return found


#: Rows of the first pass, in order, and of the second. Layers come last.
FIRST = (
    "architecture",
    "accuracy float32",
    "accuracy bfloat16",
    "accuracy float16",
    "accuracy float64",
    "accuracy float32 with TF32",
    "wide layers float32",
    "wide layers bfloat16",
    "wide layers float16",
    "wide layers float64",
    "patch norm",
    "gradcheck",
    "opcheck",
    "determinism",
    "unwritten memory",
    "CUDA graph",
    "other stream",
    "no synchronisation",
    "launches",
    "other devices",
    "shared memory",
    "many blocks",
    "over 2^31 elements channels_last",
    "over 2^31 elements contiguous",
    "torch.compile",
    "fused: implicit GEMM bfloat16",
    "fused: implicit GEMM float16",
    "fused: depthwise bfloat16",
    "fused: depthwise float16",
    "fused: depthwise float32",
    "fused: depthwise float64",
    "fused: stem bfloat16",
    "fused: stem float16",
    "fused: stem float32",
    "fused: stem float64",
    "graph: cuDNN graph bfloat16",
    "graph: cuDNN graph float16",
    "tiles of Triton's products",
    "Triton's tuner",
    "op guards",
)
SECOND = (
    "accuracy float32",
    "accuracy bfloat16",
    "accuracy float16",
    "accuracy float64",
    "wide layers bfloat16",
    "determinism",
)
RATES = ("rates channels_last", "rates contiguous")


def worker_command(options: argparse.Namespace, tree: Path, reduced: bool) -> list[str]:
    """Return the command line of a worker on the package in ``tree``."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--tree", str(tree)]
    command += ["--device", options.device, "--backend", options.backend]
    return [*command, *["--reduced"] * reduced]


def worker_environ(backend: str) -> dict[str, str]:
    """Return the settings that checks need before CUDA starts."""
    return os.environ | {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        # On the cuda backend rows of their own check the other strategies.
        "DCCONV_STRATEGIES": "library,fused" if backend == "triton" else "library",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def use_tree(tree: Path) -> None:
    """Import the package from ``tree`` and nothing but it."""
    sys.path[:0] = [str(tree), *map(str, (ROOT, *paths.HELPERS))]
    import dcconv

    if Path(dcconv.__file__).resolve().parents[1] != tree.resolve():
        raise RuntimeError(f"dcconv comes from {dcconv.__file__}, expected {tree}")


def work(options: argparse.Namespace) -> int:
    """Answer the gate's questions until it asks no more."""
    output = take_stdout()
    use_tree(options.tree)
    from gate.checks import Where

    where = Where(options.device, options.backend, options.reduced)
    serve({name: check for name, (check, _) in checks_of(where).items()}, output)
    return 0


def run_small(options: argparse.Namespace) -> int:
    """Make the calls that a sanitizer watches."""
    use_tree(options.tree)
    from gate.checks import Where, small_cases

    print(small_cases(Where(options.device, options.backend, options.reduced)))
    return 0


def suite(options: argparse.Namespace, timeout: float, log: IO[bytes]) -> Figures:
    """Run the test suite on the backend under test, in parallel where pytest can."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["--backend", options.backend, f"--junitxml={results}", "--maxfail=50"]
        if options.selected:
            command += ["-k", options.selected]
        has_xdist = subprocess.run([sys.executable, "-c", "import xdist"], capture_output=True)
        if has_xdist.returncode == 0:
            command += ["-n", str(max(1, min(8, (os.cpu_count() or 2) // 2)))]
        command += [str(ROOT / "tests" / name) for name in SUITE]
        environ = worker_environ(options.backend) | {
            "PYTHONPATH": paths.python_path(),
            "OMP_NUM_THREADS": "2",
        }
        with subprocess.Popen(
            command, cwd=ROOT, env=environ, stdout=log, stderr=log, start_new_session=True
        ) as process:
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                raise NotRun(NO_TIME) from None
        if not results.exists():
            raise AssertionError(f"pytest ended with code {code} and no results")
        return judge_suite(results.read_text(encoding="utf-8"), code)


def judge_suite(xml: str, code: int) -> Figures:
    """Return the counts of a run of pytest, or raise with the first failures."""
    root = ET.fromstring(xml)
    cases = list(root.iter("testcase"))
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    figures: Figures = {"passed": len(cases) - len(bad) - skipped, "skipped": skipped}
    if bad:
        first = bad[0].find("failure")
        first = first if first is not None else bad[0].find("error")
        said = first.get("message", "") if first is not None else ""
        names = ", ".join(str(c.get("name")) for c in bad[:5])
        raise AssertionError(f"{len(bad)} of {len(cases)} failed: {names}; {said[:400]}")
    if code != 0 or not figures["passed"]:
        raise AssertionError(f"pytest ended with code {code}, {figures['passed']} passed")
    return figures


def summary(rows: Sequence[Row]) -> Figures:
    """Return geometric means and the worst of the layers that were measured.

    Raises:
        NotRun: none was.
    """
    layers = [row for row in rows if row.name.startswith("layer ") and row.state == OK]
    if not layers:
        raise NotRun("no layer was measured")
    figures: Figures = {"layers": len(layers)}
    for short in ("fwd", "both"):
        for base in ("compiled", "eager", "conv2d"):
            ratios = [float(row.figures[f"{short} / {base}"]) for row in layers]
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            figures[f"{short} / {base}"] = mean
            if base == "compiled":
                figures[f"{short} / {base}, worst"] = max(ratios)
    unmeasured = sum(row.name.startswith("layer ") and row.state != OK for row in rows)
    if unmeasured:
        figures["message"] = f"{unmeasured} layers were not measured"
    return figures


def timed(name: str, check: Check, report: Report, budget: Budget) -> Row:
    """Run a row in this process and report it."""
    row = Row(name, NOT_RUN, message=NO_TIME) if budget.left() <= 0 else answer(name, check)
    report.add(row)
    return row


class Gate:
    """One run: the rows wanted, where they go, and what is left of the time."""

    def __init__(
        self, options: argparse.Namespace, report: Report, budget: Budget, log: IO[bytes]
    ) -> None:
        self.options, self.report, self.budget, self.log = options, report, budget, log
        self.on_gpu = options.device == "cuda"

    def wanted(self, *names: str) -> list[str]:
        """Return the rows among these that were asked for."""
        patterns = self.options.rows
        return [n for n in names if not patterns or any(fnmatchcase(n, p) for p in patterns)]

    def rows(self, names: Sequence[str], tree: Path, reduced: bool, prefix: str = "") -> None:
        """Run checks in workers, where they were asked for."""
        chosen = self.wanted(*(prefix + name for name in names))
        command = worker_command(self.options, tree, reduced)
        run_rows(
            [name.removeprefix(prefix) for name in chosen],
            self.report,
            self.budget,
            lambda: Worker(command, worker_environ(self.options.backend), self.log),
            self.options.limits,
            prefix,
        )

    def finish_build(self, name: str, build: Build) -> bool:
        """Wait for a build and report it; True when there is a library."""

        def check() -> Figures:
            problem = build.wait(min(300.0, max(self.budget.left(), 1.0)))
            if problem is not None:
                raise AssertionError(problem)
            return {"for": build.archs}

        return timed(name, check, self.report, self.budget).state == OK

    def sanitize(self, tool: str) -> None:
        """Watch small cases with a sanitizer."""
        name = f"compute-sanitizer {tool}"
        if not self.wanted(name):
            return

        def check() -> Figures:
            if not self.on_gpu:
                raise NotRun("compute-sanitizer needs a GPU")
            program = worker_command(self.options, ROOT, reduced=tool == "racecheck")
            program[program.index("--worker")] = "--small"
            return sanitizer.check(tool, program, min(120.0, self.budget.left()))

        timed(name, check, self.report, self.budget)

    def run(self) -> int:
        """Run every row that was asked for; return the exit code."""
        options, report, budget = self.options, self.report, self.budget
        archs = native_arch(options.capability)
        with tempfile.TemporaryDirectory() as folder:
            second: Build | None = None
            try:
                if self.on_gpu and not options.no_build:
                    first = Build(ROOT, archs)
                    if not self.finish_build(BUILD, first):
                        return report.finish()
                ptx_rows = self.wanted(*(PTX_PREFIX + n for n in ("architecture", *SECOND)))
                copy = Path(folder) / "ptx"
                if self.on_gpu and ptx_rows and budget.left() > 0:
                    copy_sources(ROOT, copy)
                    second = Build(copy, f"{PTX_ARCH}+PTX")
                self.rows(FIRST, ROOT, options.reduced)
                for tool in sanitizer.TOOLS:
                    self.sanitize(tool)
                if self.wanted(SUITE_ROW):
                    # Enough is left for the second pass and the measurements.
                    most = max(30.0, min(150.0, budget.left() - 120.0))
                    timed(SUITE_ROW, lambda: suite(options, most, self.log), report, budget)
                if second is not None:
                    if self.finish_build(PTX_BUILD, second):
                        self.ptx_rows(copy)
                elif ptx_rows:
                    for name in ptx_rows:
                        report.add(Row(name, NOT_RUN, message="the second pass needs a GPU"))
                self.rows(RATES, ROOT, options.reduced)
                layers = [n for n in options.limits if n.startswith("layer ")]
                self.rows(layers, ROOT, options.reduced)
                if self.wanted(SUMMARY):
                    report.add(answer(SUMMARY, lambda: summary(report.rows)))
            finally:
                if second is not None:
                    second.stop()
        return report.finish()

    def ptx_rows(self, tree: Path) -> None:
        """Run the second pass on the copy that was built for ``PTX_ARCH``."""
        row = f"{PTX_PREFIX}architecture"
        self.rows([row], tree, reduced=True)
        ran = [r for r in self.report.rows if r.name == row]
        if ran and ran[-1].state != OK:
            for name in self.wanted(*(PTX_PREFIX + n for n in SECOND)):
                self.report.add(Row(name, NOT_RUN, message=f"row {row!r} is {ran[-1].state}"))
            return
        self.rows(SECOND, tree, reduced=True, prefix=PTX_PREFIX)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    own = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    own.add_argument("--budget", type=float, default=BUDGET, help=f"seconds ({BUDGET:.0f})")
    own.add_argument(
        "--rows", nargs="+", metavar="PATTERN", help="only these rows, by shell pattern"
    )
    own.add_argument("--keep", action="store_true", help="keep other rows of an earlier report")
    own.add_argument("--no-build", action="store_true", help="take the library as it is")
    own.add_argument("--commit", help="the commit, where the sources are not in a git checkout")
    own.add_argument("--results", type=Path, default=ROOT / "bench/results", help="reports go here")
    own.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    own.add_argument("--backend", default="cuda", help="the backend under test")
    own.add_argument("--reduced", action="store_true", help="small selections")
    own.add_argument("--selected", help="pytest's -k for the test suite")
    own.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    own.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    own.add_argument("--tree", type=Path, default=ROOT, help=argparse.SUPPRESS)
    return own


def show(row: Row) -> None:
    """Print a row as it comes."""
    message = f": {row.message}" if row.message else ""
    print(f"{row.state:<8} {row.seconds:7.1f} s  {row.name}{message}", flush=True)


def row_limits() -> dict[str, float]:
    """Return the most seconds of every worker row, without importing the library here."""
    code = (
        "import json, sys; sys.path[:0] = sys.argv[1:]; import gpu_gate; "
        "print(json.dumps({n: l for n, (_, l) in gpu_gate.checks_of(None).items()}))"
    )
    command = [sys.executable, "-c", code, *map(str, (ROOT, *paths.HELPERS))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the checks do not import: {done.stderr.strip().splitlines()[-1]}")
    limits: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return limits


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = parser().parse_args(arguments)
    if options.worker:
        return work(options)
    if options.small:
        return run_small(options)
    budget = Budget(options.budget)
    if options.device == "cuda":
        reason = environment.why_no_gpu()
        if reason is not None:
            print(
                f"dcconv: the GPU gate must run on a machine with a GPU: {reason}", file=sys.stderr
            )
            return 2
    facts = environment.describe(options.device, ROOT, options.commit)
    options.capability = tuple(int(n) for n in facts.get("capability", "0.0").split("."))
    folder = options.results / slug(str(facts["device"]))
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(folder, facts, show)
    log_path = ROOT / "build/gpu-gate.log"
    log_path.parent.mkdir(exist_ok=True)
    with log_path.open("wb") as log:
        options.limits = row_limits()
        gate = Gate(options, report, budget, log)
        if options.keep:
            every = [BUILD, PTX_BUILD, SUITE_ROW, SUMMARY, *options.limits]
            every += [f"compute-sanitizer {tool}" for tool in sanitizer.TOOLS]
            every += [PTX_PREFIX + name for name in SECOND]
            report.keep_earlier(gate.wanted(*every))
        code = gate.run()
    print(f"{report.markdown}: {budget.spent():.0f} s; what was printed: {log_path}")
    return code


if __name__ == "__main__":
    sys.exit(main())
