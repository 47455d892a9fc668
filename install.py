# SPDX-License-Identifier: MIT
"""Installs into the environment of the Python that runs it: with uv, else with pip.

    python install.py REQUIREMENT ...

The arguments are those of ``pip install`` that uv has too. uv unpacks on every core and links
what it has unpacked before, where pip unpacks gigabytes of CUDA libraries file by file. It does not
read pip's settings, so those that decide what is installed are handed to it; where one has no
counterpart, pip installs. So it does where uv is not to be had, or fails.

    DCCONV_INSTALLER  pip: without uv
"""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# uv's option for a setting of pip; values are lists, split at white space.
OPTIONS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "constraint": "--constraint",
}
# What has no say in which files are installed.
WITHOUT_EFFECT = {
    *("break-system-packages", "cache-dir", "cert", "compile", "default-timeout"),
    *("disable-pip-version-check", "no-cache-dir", "no-color", "no-compile", "no-input"),
    *("no-python-version-warning", "no-warn-script-location", "prefer-binary", "progress-bar"),
    *("quiet", "require-virtualenv", "resume-retries", "retries", "root-user-action", "timeout"),
    *("use-deprecated", "use-feature", "verbose"),
}
# From weak to strong: an environment variable has the last word.
SECTIONS = ("global", "install", ":env:")


def settings(listing: str) -> dict[str, str]:
    """Return what ``pip install`` has set; ``listing`` is what ``pip config list`` prints."""
    found: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for line in listing.splitlines():
        key, equals, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if equals and section in found:
            found[section][name.replace("_", "-")] = str(ast.literal_eval(value))
    return {name: value for section in SECTIONS for name, value in found[section].items()}


def uv_options(pip: Mapping[str, str]) -> list[str] | None:
    """Return the options that have uv choose the files that pip would; None if there are none."""
    options: list[str] = []
    for name, value in pip.items():
        if name in OPTIONS:
            options += [word for part in value.split() for word in (OPTIONS[name], part)]
        elif name == "no-index" and value.lower() in ("1", "true", "yes", "on"):
            options.append("--no-index")
        elif name not in WITHOUT_EFFECT and name != "no-index":
            return None
    # The newest release of all indexes, as with pip; uv would stop at the first that has any.
    return [*options, "--index-strategy", "unsafe-best-match"]


def find_uv() -> str | None:
    """Return a uv: of this environment, on PATH or installed for the purpose."""
    beside = Path(sys.executable).parent / "uv"
    if not beside.exists() and shutil.which("uv") is None:
        pip("--quiet", "uv")
    return str(beside) if beside.exists() else shutil.which("uv")


def pip(*arguments: str) -> int:
    """Install with pip; return its exit status."""
    return subprocess.run([sys.executable, "-m", "pip", "install", *arguments]).returncode


def uv(arguments: Sequence[str]) -> str | None:
    """Install with uv; return None on success, else why it did not."""
    if os.environ.get("DCCONV_INSTALLER") == "pip":
        return "DCCONV_INSTALLER=pip was set"
    listing = [sys.executable, "-m", "pip", "config", "list"]
    found = settings(subprocess.run(listing, check=True, capture_output=True, text=True).stdout)
    options = uv_options(found)
    if options is None:
        return "uv has no counterpart for a setting of pip (pip config list)"
    program = find_uv()
    if program is None:
        return "uv was not found"
    environ = dict(os.environ)
    if "cert" in found:
        environ.setdefault("SSL_CERT_FILE", found["cert"])
    command = [program, "pip", "install", "--python", sys.executable, *options, *arguments]
    failed = subprocess.run(command, env=environ).returncode
    return f"uv failed (exit status {failed})" if failed else None


def main(arguments: Sequence[str]) -> int:
    """Install and return the exit status; say so where it is pip that installs."""
    reason = uv(arguments)
    if reason is None:
        return 0
    print(f"dcconv: installing with pip: {reason}", flush=True)
    return pip(*arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
