"""Warnings that point at the user's line."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Sequence

_lock = threading.Lock()
_said: set[str] = set()

# So many names stand in a warning; of the others it gives the number.
_NAMES = 8


def _users_level() -> int:
    """Return the stack level, seen from the caller, of the first frame outside dcconv and torch."""
    level, frame = 1, sys._getframe(1).f_back
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "dcconv",
        "torch",
    ):
        level, frame = level + 1, frame.f_back
    return level + 1


def warn_user(text: str) -> None:
    """Warn with a text about this one call."""
    warnings.warn(f"dcconv: {text}", RuntimeWarning, stacklevel=_users_level())


def warn_once(text: str) -> None:
    """Warn with a text that this process has not warned with yet."""
    with _lock:
        if text in _said:
            return
        _said.add(text)
    warn_user(text)


def name_some(names: Sequence[str], remarks: Sequence[str] = ()) -> str:
    """Return names in quotes, the first few of them with remarks, and how many more there are."""
    parts = [f"'{name}'" for name in names[:_NAMES]]
    if remarks:
        parts = [f"{part} ({remark})" for part, remark in zip(parts, remarks, strict=False)]
    more = len(names) - _NAMES
    return ", ".join(parts) + (f" and {more} more" if more > 0 else "")
