"""Fixtures, the --backend option, and a summary of what ran on which backend.

Skips come from the backends' own sentences. ``--backend NAME`` runs only that backend's share of
the parametrised tests, and its refusal is then an error: a run that asked for it cannot look green.
With pytest-xdist the summary is that of all workers, and they share the machine's threads.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from willing import device_of, why_not

from dcconv import backends
from dcconv.call import run

SEED = 0

DROPPED: pytest.StashKey[Counter[str]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        choices=backends.names,
        help="run the backend tests on this backend only, and fail where it refuses",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[DROPPED] = Counter()
    workers = getattr(config.option, "tx", None) or []
    if workers:
        # Inherited by the workers, before they load PyTorch, and by what tests start.
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, processors // len(workers))))
    # float32 means float32: cuDNN would convolve in TF32 by default. The GPU gate checks that too.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    config.addinivalue_line(
        "markers", "backend(name): a test of one backend, skipped with the backend's own sentence"
    )


def _require(name: str, config: pytest.Config) -> None:
    reason = why_not(name)
    if reason is None:
        return
    text = f"backend '{name}': {reason}"
    if config.getoption("--backend") == name:
        pytest.fail(f"--backend was given, but {text}", pytrace=False)
    pytest.skip(text)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        only = metafunc.config.getoption("--backend")
        metafunc.parametrize("backend", [only] if only else backends.names, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep one test per function of a refusing backend, to be skipped; count the others."""
    reasons = {name: why_not(name) for name in backends.names}
    kept, seen, dropped = [], set(), []
    for item in items:
        callspec = getattr(item, "callspec", None)
        name = callspec.params.get("backend") if callspec else None
        key = (item.nodeid.partition("[")[0], name)
        if name in reasons and reasons[name] is not None and key in seen:
            dropped.append(item)
            config.stash[DROPPED][name] += 1
        else:
            seen.add(key)
            kept.append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the process that writes the summary, if it is another one, what was deselected here."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["dropped"] = dict(session.config.stash[DROPPED])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Keep what a worker of pytest-xdist has deselected: every one has collected all tests."""
    dropped = getattr(node, "workeroutput", {}).get("dropped", {})
    node.config.stash[DROPPED] |= Counter(dropped)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("backend"):
        item.user_properties.append(("backend", marker.args[0]))
        only = item.config.getoption("--backend")
        if only and only != marker.args[0]:
            pytest.skip(f"--backend {only} was given")
        _require(marker.args[0], item.config)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend's name; it is the process's setting while the test runs."""
    name: str = request.param
    request.node.user_properties.append(("backend", name))
    _require(name, request.config)
    with backends.use_backend(name):
        yield name


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """The device of the test's backend, ``cpu`` for tests without one."""
    if "backend" not in request.fixturenames:
        return "cpu"
    return device_of(request.getfixturevalue("backend"))


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the CPU kernels that this processor has."""
    known = torch.ops.dcconv.cpu_isas()
    if request.param not in known:
        pytest.skip(f"this processor or library has no {request.param}, only {', '.join(known)}")
    before = torch.ops.dcconv.cpu_isa()
    torch.ops.dcconv.set_cpu_isa(request.param)
    yield request.param
    torch.ops.dcconv.set_cpu_isa(before)


@pytest.fixture(autouse=True)
def seed() -> int:
    """The seed of PyTorch's generators, set before every test, which finds no call prepared."""
    run.forget()
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture(params=[False, True], ids=["plain", "deterministic"])
def deterministic(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether deterministic algorithms are on, which also fills every torch.empty with NaN.

    An element that a kernel never writes then shows. Off as well, because kernels may take another
    path under the flag.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(request.param, warn_only=True)
    settings.fill_uninitialized_memory = True
    yield request.param
    settings.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Count outcomes per backend and print every distinct skip reason."""
    dropped = terminalreporter.config.stash[DROPPED]
    counts: dict[str, Counter[str]] = {}
    reasons: Counter[str] = Counter()
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            properties = [
                value for key, value in getattr(report, "user_properties", ()) if key == "backend"
            ]
            for name in properties or ["(no backend)"]:
                counts.setdefault(name, Counter())[outcome] += 1
            if outcome == "skipped":
                text = report.longrepr[2] if isinstance(report.longrepr, tuple) else "no reason"
                reasons[text.removeprefix("Skipped: ")] += 1
    if not counts:
        return
    terminalreporter.section("backends")
    for name in (*backends.names, "(no backend)"):
        if name in counts:
            line = ", ".join(f"{number} {outcome}" for outcome, number in counts[name].items())
            if dropped[name]:
                line += f" and {dropped[name]} more like them deselected"
            terminalreporter.write_line(f"{name:<13}{line}")
    for reason, number in reasons.most_common():
        terminalreporter.write_line(f"skipped {number}: {reason}")
