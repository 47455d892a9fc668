"""Measured times: in memory, in one file per GPU and version, and in files that ship or are pinned.

A file is JSON: ``format``, ``device``, ``dcconv`` and ``torch`` say what it belongs to, ``times``
maps the text of a key, then the sizes of x, then the name of a strategy to milliseconds.
"""

from __future__ import annotations

import importlib.resources
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dcconv.call.key import Key
from dcconv.version import __version__
from dcconv.warn import warn_once

# Counts up when the text of keys, the names of strategies or the layout of files changes.
FORMAT = 3

# Milliseconds that nothing takes; also keeps NaN and infinities out.
LONGEST = 1e9

Sizes = tuple[int, int, int]
Times = dict[str, float]


class Table:
    """The times of one device: by the text of a key, by sizes of x, by strategy."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.times: dict[str, dict[Sizes, Times]] = {}

    def add(self, key: Key, times: Times) -> None:
        """Remember times, over those of the same strategies."""
        n, h, w = key.sizes
        assert n is not None and h is not None and w is not None
        self.times.setdefault(key.text, {}).setdefault((n, h, w), {}).update(times)

    def find(self, key: Key) -> Times:
        """Return the times of a key; where its sizes are open, of the largest sizes that fit."""
        measured = self.times.get(key.text, {})
        fitting = [
            sizes
            for sizes in measured
            if all(want in (None, got) for want, got in zip(key.sizes, sizes, strict=True))
        ]
        return measured[max(fitting, key=math.prod)] if fitting else {}

    def count(self, key: Key) -> int:
        """Return of how many sizes of x there are times."""
        return len(self.times.get(key.text, {}))

    def merge(self, other: Table) -> None:
        """Take over another table's times, over those of the same strategies."""
        for text, by_sizes in other.times.items():
            for sizes, times in by_sizes.items():
                self.times.setdefault(text, {}).setdefault(sizes, {}).update(times)


def to_text(table: Table) -> str:
    """Write a table as the content of a file: one line per key and sizes, sorted."""
    head = {
        "format": FORMAT,
        "device": table.device,
        "dcconv": __version__,
        "torch": torch.__version__,
    }
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    keys = []
    for text in sorted(table.times):
        rows = [
            f"      {json.dumps('x'.join(map(str, sizes)))}: {json.dumps(times, sort_keys=True)}"
            for sizes, times in sorted(table.times[text].items())
        ]
        keys.append(f"    {json.dumps(text)}: {{\n" + ",\n".join(rows) + "\n    }")
    body = "{\n" + ",\n".join(keys) + "\n  }" if keys else "{}"
    return "\n".join(["{", *lines, f'  "times": {body}', "}", ""])


def from_text(text: str) -> tuple[Table, dict[str, Any]]:
    """Read the content of a file; return the table and the head.

    Raises:
        ValueError: the text is not a table of this format; the message says where.
    """
    content = json.loads(text)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"no table of format {FORMAT}")
    if not isinstance(content.get("device"), str) or not isinstance(content.get("times"), dict):
        raise ValueError("no device or no times")
    table = Table(content["device"])
    for key, by_sizes in content["times"].items():
        if not isinstance(by_sizes, dict):
            raise ValueError(f"no sizes at {key!r}")
        for sizes, times in by_sizes.items():
            found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", sizes, re.ASCII)
            good = isinstance(times, dict) and all(
                type(ms) in (int, float) and 0 < ms < LONGEST for ms in times.values()
            )
            if found is None or not good:
                raise ValueError(f"no times at {key!r}, {sizes!r}")
            row = (int(found[1]), int(found[2]), int(found[3]))
            table.times.setdefault(key, {})[row] = {name: float(ms) for name, ms in times.items()}
    head = {name: value for name, value in content.items() if name != "times"}
    return table, head


def read(path: Path) -> tuple[Table, dict[str, Any]]:
    """Read a file; OSError or ValueError if that fails."""
    return from_text(path.read_text(encoding="utf-8"))


def cache_folder() -> Path:
    """Return where measured times are kept: DCCONV_CACHE, or dcconv in the user's cache folder.

    Raises:
        RuntimeError: the user has no home folder.
    """
    own, shared = os.environ.get("DCCONV_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    if own:
        return Path(own).expanduser()
    # The standard has programs ignore a relative folder.
    base = Path(shared) if os.path.isabs(shared) else Path.home() / ".cache"
    return base / "dcconv"


def file_name(device: str) -> str:
    """Return the name of a device's file; another version of dcconv or PyTorch has another one."""
    parts = f"{device} dcconv {__version__} torch {torch.__version__} format {FORMAT}"
    return re.sub(r"[^A-Za-z0-9.+]+", "-", parts).strip("-") + ".json"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file against other processes."""
    # Not at the top: other systems than POSIX lack it, and the reference runs there.
    import fcntl

    with path.with_suffix(".lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(path: Path, text: str) -> None:
    """Write a file so that readers see the old content or the new, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


class Cache:
    """The times that this user's processes measured on one device, on disk where that works.

    A file that cannot be read, or is not this version's, is left as it is, with one warning; the
    times of this process then stay in memory.
    """

    def __init__(self, device: str) -> None:
        self.table = Table(device)
        self.path: Path | None = None
        try:
            self.path = cache_folder() / file_name(device)
            self.table.merge(self._on_disk())
        except (OSError, ValueError, RuntimeError) as error:
            self._give_up("read", error)

    def _on_disk(self) -> Table:
        assert self.path is not None
        device = self.table.device
        if not self.path.exists():
            return Table(device)
        table, head = read(self.path)
        found = (head["device"], head.get("dcconv"), head.get("torch"))
        if found != (device, __version__, torch.__version__):
            raise ValueError("it belongs to another device or version")
        return table

    def _give_up(self, verb: str, error: Exception) -> None:
        place = self.path or "the user's cache folder"
        warn_once(
            f"cannot {verb} the measured times of {self.table.device} in {place} ({error}); those "
            "of this process stay in memory"
        )
        self.path = None

    def add(self, key: Key, times: Times) -> None:
        """Remember times, here and on disk, beside what other processes wrote meanwhile."""
        self.table.add(key, times)
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path):
                merged = self._on_disk()
                merged.add(key, times)
                _write(self.path, to_text(merged))
            self.table.merge(merged)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            self._give_up("write", error)


def shipped(device: str, package: str = "dcconv") -> Table:
    """Return the times that ship with a package for a device; empty if there are none."""
    folder = importlib.resources.files(package) / "tables"
    merged = Table(device)
    if not folder.is_dir():
        return merged
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if not file.name.endswith(".json"):
            continue
        try:
            table, _ = from_text(file.read_text(encoding="utf-8"))
        except (ValueError, RuntimeError) as error:
            warn_once(f"the table {file.name} of this installation is damaged ({error})")
            continue
        if table.device == device:
            merged.merge(table)
    return merged
