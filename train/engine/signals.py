"""Ctrl-C and SIGTERM as a wish to stop, not as an interruption in the middle of a step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, ClassVar

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequestedError(Exception):
    """What takes long was left off, on every process, because a signal asks to stop."""


class StopSignals:
    """While entered, notes the first SIGINT or SIGTERM in ``received``; a second one kills at once.

    Under torchrun a second one is not the user's: its agent forwards every signal that also
    reached the process directly, and has its own deadline after which it kills.
    """

    entered: ClassVar[list[StopSignals]] = []

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}
        self._forwarded = "TORCHELASTIC_RUN_ID" in os.environ

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and not self._forwarded:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = self.received or number

    def __enter__(self) -> StopSignals:
        # Python delivers signals to the main thread only, and lets only it set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        self.entered.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.entered.remove(self)
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous.clear()


def stop_requested() -> bool:
    """Whether the innermost ``StopSignals`` has noted a signal."""
    return bool(StopSignals.entered) and bool(StopSignals.entered[-1].received)


def exit_status(number: int) -> int:
    """Return the exit status of a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + number
