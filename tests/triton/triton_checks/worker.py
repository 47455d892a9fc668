"""A process that answers requests: Triton reads TRITON_INTERPRET once, when it is imported.

Requests and answers are lines of JSON. An answer is null, a result, or the text of a failure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from paths import TESTS, python_path


class Worker:
    """The asking side.

    Args:
        module: name in this folder of the module whose functions are asked for.
        environment: variables to set.
    """

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"triton_checks.{module}"],
            cwd=TESTS,
            env={**os.environ, "PYTHONPATH": python_path(), **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, check: str, /, **arguments: Any) -> Any:
        """Call a function there; fail here if it failed."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({"name": check, "arguments": arguments}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, f"the worker ended with status {process.wait()}"
        answer = json.loads(line)
        assert "failure" not in answer, answer["failure"]
        return answer["result"]

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Answer until the asking side closes."""
    # What anything prints goes to stderr.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": functions[request["name"]](**request["arguments"])}
        except Exception:
            answer = {"failure": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
