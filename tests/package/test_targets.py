"""Targets of the Makefile, without the environment that they make."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from paths import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def test_make_alone_lists_the_targets_and_does_nothing(tmp_path: Path) -> None:
    command = ["make", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(f"make {name}" in done.stdout for name in ("demo", "test", "docs", "findings"))
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("installed", "asked", "extras"),
    [(None, None, "train"), ("train,dev", None, "train,dev"), ("train", "bench", "bench")],
    ids=["new", "there", "asked"],
)
def test_demo_installs_what_it_needs_and_removes_nothing(
    tmp_path: Path, installed: str | None, asked: str | None, extras: str
) -> None:
    if installed is not None:
        (tmp_path / "extras").write_text(installed + "\n")
    command = ["make", "--dry-run", "demo", f"VENV={tmp_path}"]
    command += [] if asked is None else [f"EXTRAS={asked}"]
    environ = {k: v for k, v in os.environ.items() if k != "EXTRAS" and not k.startswith("MAKE")}
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True
    )
    assert f"install.py --quiet --no-build-isolation --editable '.[{extras}]'" in done.stdout


def test_docs_say_what_to_install_where_their_tools_are_not_whole(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho 'no module named material' >&2\nexit 1\n")
    python.chmod(0o755)
    command = ["make", "docs", f"VENV={tmp_path}", "-o", f"{tmp_path}/installed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"{tmp_path}/bin/pip install --editable '.[docs]'" in done.stdout
