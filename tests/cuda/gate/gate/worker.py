"""Runs checks in a process of their own, so that a crash or a broken CUDA context costs one row.

The worker reads names of checks from its standard input and answers each with one line of JSON on
what was its standard output; whatever else prints there goes to standard error.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from gate.report import FAILED, NOT_RUN, OK, Budget, Figures, NotRun, Report, Row

#: Texts of errors after which a CUDA context is of no use.
BROKEN_CONTEXT = ("CUDA error", "CUDNN_STATUS_EXECUTION_FAILED", "device-side assert")

NO_TIME = "time"


def one_line(error: BaseException) -> str:
    """Return what an exception says, with its place where it says nothing."""
    text = " ".join(str(error).split())
    if isinstance(error, AssertionError) and not text:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}: {frame.line}"
    kind = type(error).__name__
    text = text[:1000]
    return text if isinstance(error, (AssertionError, NotRun)) else f"{kind}: {text}"


def answer(name: str, check: Callable[[], Figures]) -> Row:
    """Run one check and return its row."""
    start = time.monotonic()
    state, message, figures = OK, "", {}
    try:
        figures = check()
        message = str(figures.pop("message", ""))
    except NotRun as reason:
        state, message = NOT_RUN, one_line(reason)
    except Exception as error:
        traceback.print_exc()
        state, message = FAILED, one_line(error)
    return Row(name, state, figures, round(time.monotonic() - start, 2), message)


def serve(checks: Mapping[str, Callable[[], Figures]], output: IO[str]) -> None:
    """Answer names from standard input until it ends."""
    for line in sys.stdin:
        row = answer(line.strip(), checks[line.strip()])
        output.write(json.dumps(vars(row)) + "\n")
        output.flush()
        if any(text in row.message for text in BROKEN_CONTEXT):
            return


def take_stdout() -> IO[str]:
    """Return the real standard output and send everything else that is printed to stderr."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


class Worker:
    """A running worker, as seen by the gate."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], log: IO[bytes]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=dict(environ)
        )
        self._lines: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def ask(self, name: str, timeout: float) -> tuple[Row | None, str]:
        """Return a check's row, or None and why there is none."""
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(f"{name}\n".encode())
            self._process.stdin.flush()
            line = self._lines.get(timeout=max(timeout, 0.1))
        except queue.Empty:
            return None, f"no answer in {timeout:.0f} s"
        except OSError:
            line = b""
        if not line:
            return None, f"the process ended with code {self._process.wait()}"
        fields: dict[str, Any] = json.loads(line)
        return Row(**fields), ""

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except OSError:
                pass
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def run_rows(
    names: Sequence[str],
    report: Report,
    budget: Budget,
    start: Callable[[], Worker],
    limits: Mapping[str, float],
    prefix: str = "",
) -> None:
    """Run checks one after another, each in the worker that is left of the one before.

    Args:
        names: of the checks.
        report: gets a row of each, under ``prefix`` and its name.
        budget: rows that begin after its end are not run; rows that reach it are stopped.
        start: makes a worker.
        limits: the most seconds a check may take, by name.
    """
    worker: Worker | None = None
    try:
        for name in names:
            title = prefix + name
            if budget.left() <= 0:
                report.add(Row(title, NOT_RUN, message=NO_TIME))
                continue
            if worker is None or not worker.alive:
                worker = start()
            began = time.monotonic()
            allowed = min(limits[name], budget.left())
            row, problem = worker.ask(name, allowed)
            if row is None:
                seconds = round(time.monotonic() - began, 2)
                out_of_time = problem.startswith("no answer") and allowed < limits[name]
                state, text = (NOT_RUN, NO_TIME) if out_of_time else (FAILED, problem)
                row = Row(title, state, {}, seconds, text)
                worker._process.kill()
                worker.stop()
                worker = None
            else:
                row.name = title
                if row.state == FAILED and any(text in row.message for text in BROKEN_CONTEXT):
                    # It ends by itself: the next check gets a new context.
                    worker.stop()
            report.add(row)
    finally:
        if worker is not None:
            worker.stop()
