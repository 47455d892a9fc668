"""The folder of a training run: files that appear whole or not at all, and the environment."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import dcconv
from dcconv.checks import value_error

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

    def restart(self, config: str, device: torch.device, step: int) -> None:
        """Note at what step and in what environment the run goes on; store its configuration."""
        path = self.path / RESUMES
        before = path.read_text() if path.exists() else ""
        config_path = self.path / CONFIG
        changed = not config_path.exists() or config_path.read_text() != config
        record = {"step": step, "config_changed": changed, "environment": environment(device)}
        self.write(RESUMES, (before + json_line(record)).encode())
        if changed:
            self.write(CONFIG, config.encode())

    def copy_source(self) -> None:
        """Copy the Python source of both packages to ``source/``."""
        for package in ("train", "dcconv"):
            for file in sorted((_ROOT / package).rglob("*.py")):
                target = self.path / "source" / file.relative_to(_ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                write_file(target, file.read_bytes())


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
