"""Warnings that come once per process and text, and point at the user's line."""

from __future__ import annotations

import sys
import threading
import warnings

_lock = threading.Lock()
_said: set[str] = set()


def _users_level() -> int:
    """Return the stack level, seen from the caller, of the first frame outside dcconv and torch."""
    level, frame = 1, sys._getframe(1).f_back
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "dcconv",
        "torch",
    ):
        level, frame = level + 1, frame.f_back
    return level + 1


def warn_once(text: str) -> None:
    """Warn with a text that this process has not warned with yet."""
    with _lock:
        if text in _said:
            return
        _said.add(text)
    warnings.warn(f"dcconv: {text}", RuntimeWarning, stacklevel=_users_level())
