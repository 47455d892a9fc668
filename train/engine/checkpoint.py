"""Checkpoints on disk: written whole or not at all, with a digest each, the last few and the best.

``manifest.json`` lists the files with step, size and SHA-256. A file counts from the moment that
the manifest names it, so a crash at any instant leaves what was saved before.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dcconv.operator.checks import value_error
from train.engine.files import (
    MOST_TENSORS,
    MOST_TEXT,
    ContentError,
    load_tensors,
    read_file,
    read_json,
)
from train.engine.folder import CHECKPOINTS, remove_temporary, write_file

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


def _entry(value: Any) -> Entry:
    """Return an entry of a manifest, checked.

    Raises:
        ContentError: it is none.
    """
    if not isinstance(value, dict) or {*value} - {"score"} != {"file", "step", "bytes", "sha256"}:
        raise ContentError("an entry of other keys than file, step, bytes, sha256 and score")
    entry = Entry(**value)
    for name in ("step", "bytes"):
        number = value[name]
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise ContentError(f"an entry whose {name} is no whole number from 0 on")
    score = entry.score
    if score is not None and not (
        isinstance(score, (int, float)) and not isinstance(score, bool) and math.isfinite(score)
    ):
        raise ContentError("an entry whose score is no number")
    if not isinstance(entry.file, str) or not isinstance(entry.sha256, str):
        raise ContentError("an entry whose file or digest is no text")
    # A manifest names its neighbours, no other file.
    if not _NAME.fullmatch(entry.file):
        raise ContentError("a file that is no checkpoint of its folder")
    return entry


def _read_manifest(path: Path) -> tuple[list[Entry], str | None]:
    """Return the entries in the order of saving, and the file that is the best."""
    try:
        data = read_json(path, MOST_TEXT)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ContentError("another format")
        listed, best = data.get("checkpoints"), data.get("best")
        if not isinstance(listed, list):
            raise ContentError("no list of checkpoints")
        entries = [_entry(value) for value in listed]
        names = [entry.file for entry in entries]
        if len(set(names)) < len(names):
            raise ContentError("a file that is there twice")
        if best is not None and best not in names:
            raise ContentError("a best one that is not among them")
    except FileNotFoundError as error:
        orphans = _checkpoint_files(path.parent)
        if orphans:
            got = f"'{orphans[0]}' without '{path.name}'"
            raise value_error("resume", "have a list of its checkpoints", got) from error
        return [], None
    except (ContentError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
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
        check: raises ContentError for a state that is not what a run saves; by default anything
            made of tensors and plain Python will do. It is given the state and its step.

    Raises:
        ValueError: the folder has a manifest that cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        keep_last: int = 3,
        warn: Callable[[str], None] = lambda text: None,
        check: Callable[[Any, int], None] = lambda state, step: None,
    ) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.warn = warn
        self.check = check
        self.entries, self.best = _read_manifest(folder / MANIFEST)
        # The files that the manifest on the disk names.
        self._listed = {entry.file for entry in self.entries}

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
        self._listed = {listed.file for listed in entries}
        self.tidy()
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
            if name not in taken and not (self.folder / name).is_dir():
                return self.folder / name
            number += 1

    def tidy(self) -> None:
        """Remove checkpoints that the manifest does not name, and what a crash left of others."""
        for path in _checkpoint_files(self.folder):
            if path.name not in self._listed and not path.is_dir():
                path.unlink(missing_ok=True)
        remove_temporary(self.folder)

    def load(self, entry: Entry) -> Any:
        """Return the state of an entry.

        Raises:
            ValueError: the file is missing or is not what was saved.
        """
        path = self.folder / entry.file
        try:
            # A larger file is another one.
            data = read_file(path, min(entry.bytes, MOST_TENSORS))
        except OSError as error:
            raise _damaged(path, f"{error.strerror or error}") from error
        if len(data) != entry.bytes:
            raise _damaged(path, f"{len(data)} of {entry.bytes} bytes")
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise _damaged(path, "content of another SHA-256 than was saved")
        try:
            state = load_tensors(data)
            self.check(state, entry.step)
        except ContentError as error:
            # As saved, but not by this program: it may hold anything.
            raise _damaged(path, f"{error}") from error
        return state

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


def tidy_run(folder: Path) -> None:
    """Remove what a process that was killed has left in a run's folder and in those inside it.

    That is temporary files, and checkpoints that no manifest names. Only the owner of the folder
    may do so.

    Raises:
        ValueError: a list of checkpoints cannot be read.
    """
    for manifest in sorted(folder.rglob(f"{CHECKPOINTS}/{MANIFEST}")):
        Checkpoints(manifest.parent).tidy()
    for path in sorted({temporary.parent for temporary in folder.rglob(".*.tmp")}):
        remove_temporary(path)
