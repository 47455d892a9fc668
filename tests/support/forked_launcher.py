"""Runs of several processes by torchrun's agent, forked from one that has imported everything.

What ``torchrun`` starts imports PyTorch and the runner in every process, and again after a restart,
which takes longer than the tiny trainings of the tests. Here one process imports them; each run is
a fork of it that is torchrun's agent, with its signals and restarts, and forks the run's processes.

``python forked_launcher.py MODULE`` reads a line of JSON per run, ``{"out", "error", "restarts",
"arguments"}``, answers with the number of the agent's process, and with the status when it ends.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Launched:
    """A run that a :class:`Launcher` has begun: as much of ``subprocess.Popen`` as tests need."""

    def __init__(self, launcher: Launcher, pid: int, out: Path, error: Path) -> None:
        self.launcher = launcher
        self.pid = pid
        self.out, self.error = out, error

    def poll(self) -> int | None:
        return self.launcher.statuses.get(self.pid)

    def process_of(self, rank: int) -> int:
        """Return the number of the process that has a rank, the newest if it was restarted."""
        return int(Path(f"{self.out}.rank{rank}").read_text())

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for the end and return what was written to standard output and standard error."""
        with self.launcher.ended:
            if not self.launcher.ended.wait_for(lambda: self.poll() is not None, timeout):
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.out.read_text(), self.error.read_text()

    @property
    def returncode(self) -> int | None:
        return self.poll()


class Launcher:
    """The process that has imported a module whose ``main`` takes arguments.

    Args:
        module: its name.
        folder: receives what the runs print.
        environment: variables of the runs.
    """

    def __init__(self, module: str, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.statuses: dict[int, int] = {}
        self.ended = threading.Condition()
        self.started = 0
        self._begun: list[int] = []
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), module],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            answer: dict[str, int] = json.loads(line)
            with self.ended:
                if "begun" in answer:
                    self._begun.append(answer["begun"])
                else:
                    self.statuses[answer["ended"]] = answer["status"]
                self.ended.notify_all()

    def launch(self, arguments: list[str], restarts: int = 0) -> Launched:
        """Begin a run of two processes."""
        self.started += 1
        out, error = (self.folder / f"{self.started}.{name}" for name in ("out", "error"))
        request = {
            "out": str(out),
            "error": str(error),
            "restarts": restarts,
            "arguments": arguments,
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        with self.ended:
            if not self.ended.wait_for(lambda: len(self._begun) == self.started, 120):
                raise subprocess.TimeoutExpired("the launcher", 120)
        return Launched(self, self._begun[-1], out, error)

    def close(self) -> None:
        """End the process, which ends when it is told nothing more."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(120)
        self._reader.join()


def _enter(main: Any, request: dict[str, Any]) -> None:
    """Run a command as a process of a run: torchrun's agent looks at the exit status."""
    Path(f"{request['out']}.rank{os.environ['RANK']}").write_text(str(os.getpid()))
    status = main(request["arguments"])
    sys.stdout.flush()
    if status:
        sys.exit(status)


def _agent(main: Any, request: dict[str, Any]) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=request["restarts"],
        monitor_interval=0.1,
        start_method="fork",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()),
    )
    try:
        elastic_launch(config, _enter)(main, request)
    except (ChildFailedError, SignalException) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _fork(main: Any, request: dict[str, Any]) -> int:
    child = os.fork()
    if child:
        return child
    for name, number in (("out", 1), ("error", 2)):
        file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, number)
    status = _agent(main, request)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _serve(module: str) -> None:
    main = importlib.import_module(module).main
    # What would be imported by every process at its first step.
    importlib.import_module("torch._dynamo")
    write = threading.Lock()

    def say(**answer: int) -> None:
        with write:
            os.write(1, (json.dumps(answer) + "\n").encode())

    def wait(child: int) -> None:
        _, status = os.waitpid(child, 0)
        say(ended=child, status=os.waitstatus_to_exitcode(status))

    waiting = []
    for line in sys.stdin:
        child = _fork(main, json.loads(line))
        say(begun=child)
        waiting.append(threading.Thread(target=wait, args=(child,)))
        waiting[-1].start()
    for thread in waiting:
        thread.join()
    # Nothing is left that the end of an interpreter would have to do.
    os._exit(0)


if __name__ == "__main__":
    _serve(sys.argv[1])
