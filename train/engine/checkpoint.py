"""Checkpoints on disk: written whole or not at all, with a digest each, the last few and the best.

``manifest.json`` lists the files with step, size and SHA-256. A file counts from the moment that
the manifest names it, so a crash at any instant leaves what was saved before.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dcconv.checks import value_error
from train.engine.folder import write_file

MANIFEST = "manifest.json"
FORMAT = 1
_NAME = re.compile(r"step-\d{8,}(-\d+)?\.pt")


@dataclass(frozen=True)
class Entry:
    """One saved checkpoint; ``score`` is the accuracy it was saved with, where there was one."""

    file: str
    step: int
    bytes: int
    sha256: str
    score: float | None = None


def _read_manifest(path: Path) -> tuple[list[Entry], str | None]:
    """Return the entries in the order of saving, and the file that is the best."""
    try:
        data = json.loads(path.read_text())
        entries = [Entry(**entry) for entry in data["checkpoints"]]
        names = [entry.file for entry in entries]
        best = data["best"]
        if data["format"] != FORMAT or (best is not None and best not in names):
            raise ValueError("it is of another format")
        # A manifest names its neighbours, no other file.
        if any(Path(name).name != name for name in names):
            raise ValueError("it names a file of another folder")
    except FileNotFoundError as error:
        orphans = _checkpoint_files(path.parent)
        if orphans:
            got = f"'{orphans[0]}' without '{path.name}'"
            raise value_error("resume", "have a list of its checkpoints", got) from error
        return [], None
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise value_error(
            "resume", "have a readable list of checkpoints", f"'{path}' ({reason})"
        ) from error
    return entries, best


def _checkpoint_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name))


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: their folder; made at the first save.
        keep_last: how many of the newest stay; the best one stays besides.
        warn: receives one sentence about every checkpoint that is damaged.

    Raises:
        ValueError: the folder has a manifest that cannot be read.
    """

    def __init__(
        self, folder: Path, keep_last: int = 3, warn: Callable[[str], None] = lambda text: None
    ) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.warn = warn
        self.entries, self.best = _read_manifest(folder / MANIFEST)

    @property
    def best_score(self) -> float | None:
        """The best score so far."""
        return next((entry.score for entry in self.entries if entry.file == self.best), None)

    @property
    def last_step(self) -> int | None:
        """The step of the newest checkpoint."""
        return self.entries[-1].step if self.entries else None

    def is_better(self, score: float) -> bool:
        """Whether a score beats the best so far."""
        return self.best_score is None or score > self.best_score

    def save(self, state: Any, step: int, score: float | None = None) -> Path:
        """Save tensors and plain Python, and forget what need not be kept; return the file.

        Args:
            state: what :meth:`load_latest` shall return.
            step: how many steps were done.
            score: of an evaluation at this step; the highest is the best.

        Raises:
            OSError: the disk is full or fails; everything saved before is still there.
        """
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getbuffer()
        if not self.entries:
            # There is never a checkpoint without a manifest, not even after a crash here.
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_manifest([], None)
        path = self._free_path(step)
        entry = Entry(path.name, step, len(data), hashlib.sha256(data).hexdigest(), score)
        write_file(path, data)
        best = path.name if score is not None and self.is_better(score) else self.best
        last = [*self.entries, entry][-self.keep_last :]
        entries = [old for old in self.entries if old in last or old.file == best]
        entries.append(entry)
        try:
            self._write_manifest(entries, best)
        except OSError:
            path.unlink()
            raise
        self.entries, self.best = entries, best
        self._tidy()
        return path

    def _write_manifest(self, entries: list[Entry], best: str | None) -> None:
        listed = [asdict(entry) for entry in entries]
        manifest = {"format": FORMAT, "best": best, "checkpoints": listed}
        write_file(self.folder / MANIFEST, json.dumps(manifest, indent=2).encode() + b"\n")

    def _free_path(self, step: int) -> Path:
        """Return a name that no listed file has: a listed file is never written over."""
        taken = {entry.file for entry in self.entries}
        number = 1
        while True:
            name = f"step-{step:08d}{f'-{number}' if number > 1 else ''}.pt"
            if name not in taken:
                return self.folder / name
            number += 1

    def _tidy(self) -> None:
        """Remove checkpoints that the manifest does not name, and what a crash left of others."""
        kept = {entry.file for entry in self.entries}
        for path in [*_checkpoint_files(self.folder), *self.folder.glob(".*.tmp")]:
            if path.name not in kept:
                path.unlink(missing_ok=True)

    def load(self, entry: Entry) -> Any:
        """Return the state of an entry.

        Raises:
            ValueError: the file is missing or is not what was saved.
        """
        path = self.folder / entry.file
        try:
            data = path.read_bytes()
        except OSError as error:
            raise _damaged(path, f"{error.strerror or error}") from error
        if len(data) != entry.bytes:
            raise _damaged(path, f"{len(data)} of {entry.bytes} bytes")
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise _damaged(path, "content of another SHA-256 than was saved")
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError) as error:
            # As saved, but not by this program: it may hold anything.
            raise _damaged(path, "more than tensors and plain Python") from error

    def load_latest(self) -> tuple[Entry, Any] | None:
        """Return the newest intact checkpoint, None where none was ever saved.

        Every damaged one on the way is warned of.

        Raises:
            ValueError: there are checkpoints, and none is intact.
        """
        # Entries are in the order of saving, except that the best may have been kept for long.
        for entry in reversed(self.entries):
            try:
                state = self.load(entry)
            except ValueError as error:
                self.warn(str(error))
                continue
            if entry is not self.entries[-1]:
                self.warn(f"The newest intact checkpoint is that of step {entry.step}")
                self._forget_after(entry)
            return entry, state
        if self.entries:
            rule = f"have an intact checkpoint in '{self.folder}'"
            raise value_error("resume", rule, f"{len(self.entries)} damaged")
        return None

    def _forget_after(self, entry: Entry) -> None:
        """Let the next save leave out what is damaged; until then nothing on disk changes."""
        del self.entries[self.entries.index(entry) + 1 :]
        if all(old.file != self.best for old in self.entries):
            scored = [(old.score, old.file) for old in self.entries if old.score is not None]
            self.best = max(scored)[1] if scored else None

    def load_best(self) -> tuple[Entry, Any] | None:
        """Return the best checkpoint, None where no evaluation was saved.

        Raises:
            ValueError: it is damaged.
        """
        for entry in self.entries:
            if entry.file == self.best:
                return entry, self.load(entry)
        return None


def _damaged(path: Path, got: str) -> ValueError:
    return value_error("checkpoint", f"be the intact file '{os.fspath(path)}'", got)
