"""The folder of a training run: files that appear whole or not at all, and the environment."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import dcconv
from dcconv.operator.checks import value_error
from train.engine.files import MOST_JSON, MOST_TEXT, ContentError, read_file, read_text

_ROOT = Path(__file__).resolve().parent.parent.parent

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
RESULTS = "results.json"
RESUMES = "resumes.jsonl"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_TEMPORARY = re.compile(r"\..+\.\d+\.tmp", re.DOTALL)


def remove_temporary(folder: Path) -> None:
    """Remove what :func:`write_file` leaves in a folder where the process is killed in it."""
    for path in folder.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name) and not path.is_dir():
            path.unlink(missing_ok=True)


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a file durably, so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def plain(value: Any) -> Any:
    """Replace what JSON has no number for, NaN and infinities, by None, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def json_line(value: Any) -> str:
    """Return a value as one line of JSON."""
    return json.dumps(plain(value), allow_nan=False) + "\n"


class RunFolder:
    """The folder of one run; ``create`` makes a new one, ``at`` takes a given one.

    Args:
        path: an existing folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, parent: Path, name: str) -> RunFolder:
        """Make ``<parent>/<date>_<name>``, numbered where two runs start in the same second."""
        date = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        number = 1
        while True:
            path = parent / f"{date}_{name}{f'-{number}' if number > 1 else ''}"
            try:
                parent.mkdir(parents=True, exist_ok=True)
                path.mkdir()
                return cls(path)
            except FileExistsError:
                # Either a run of the same second, or the parent is a file.
                if not parent.is_dir():
                    raise value_error("out", "be a folder", repr(str(parent))) from None
                number += 1
            except OSError as error:
                raise _unwritable("out", parent, error) from error

    @classmethod
    def at(cls, path: Path, argument: str = "folder") -> RunFolder:
        """Take the given folder and make it if it is missing."""
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise value_error(argument, "be a folder", repr(str(path))) from None
        except OSError as error:
            raise _unwritable(argument, path, error) from error
        return cls(path)

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints are."""
        return self.path / CHECKPOINTS

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the run, atomically."""
        write_file(self.path / name, data)

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as indented JSON; NaN and infinities become null."""
        self.write(name, (json.dumps(plain(value), indent=2, allow_nan=False) + "\n").encode())

    def start(self, config: str, device: torch.device, world_size: int = 1) -> None:
        """Store the configuration, as YAML, the environment and the source, before a first step."""
        self.write(CONFIG, config.encode())
        self.write_json(ENVIRONMENT, environment(device) | {"world_size": world_size})
        self.copy_source()

    def history(self) -> bytes:
        """Return the records of how the run went on before, a line each.

        Raises:
            ValueError: they cannot be read, or are no text.
        """
        path = self.path / RESUMES
        try:
            return read_text(path, MOST_JSON).encode()
        except FileNotFoundError:
            return b""
        except (ContentError, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            rule = f"have a readable {RESUMES}"
            raise value_error("resume", rule, f"'{path}' ({reason})") from error

    def restart(
        self,
        config: str,
        device: torch.device,
        step: int,
        changes: Mapping[str, tuple[Any, Any]] | None = None,
    ) -> None:
        """Note at what step and in what environment the run goes on; store its configuration.

        The former one stays as ``config.1.yaml``, ``config.2.yaml`` and so on.

        Args:
            config: as YAML.
            device: where the run goes on.
            step: that is done.
            changes: options that differ, the former value and the new one by name.

        Raises:
            ValueError: the history cannot be read; nothing is written then.
        """
        before = self.history()
        path = self.path / CONFIG
        try:
            former: bytes | None = read_file(path, MOST_TEXT)
        except FileNotFoundError:
            former = None
        changed = former != config.encode()
        kept = None
        if changed and former is not None:
            number = 1
            while (self.path / _former(number)).exists():
                number += 1
            kept = _former(number)
            self.write(kept, former)
        record = {
            "step": step,
            "config_changed": changed,
            "former_config": kept,
            "changes": {name: list(pair) for name, pair in (changes or {}).items()},
            "environment": environment(device),
        }
        self.write(RESUMES, before + json_line(record).encode())
        if changed:
            self.write(CONFIG, config.encode())

    def copy_source(self) -> None:
        """Copy the Python source of both packages to ``source/``."""
        for package in ("train", "dcconv"):
            for file in sorted((_ROOT / package).rglob("*.py")):
                target = self.path / "source" / file.relative_to(_ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                write_file(target, file.read_bytes())


def _former(number: int) -> str:
    stem, _, suffix = CONFIG.partition(".")
    return f"{stem}.{number}.{suffix}"


def _unwritable(argument: str, path: Path, error: OSError) -> ValueError:
    rule = f"be a folder that can be written ({error.strerror})"
    return value_error(argument, rule, repr(str(path)))


def _git(*arguments: str) -> str | None:
    """Return the output of a git command in the project's own repository, or None."""
    if not (_ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Describe what a run depends on besides its configuration and its source."""
    changes = _git("status", "--porcelain")
    on_gpu = device is not None and device.type == "cuda"
    return {
        "dcconv": dcconv.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "device": str(device) if device is not None else None,
        "device_name": torch.cuda.get_device_name(device) if on_gpu else None,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed_files": None if changes is None else len(changes.splitlines()),
    }
