"""What install.py makes of pip's settings, and when it leaves the work to pip."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from paths import ROOT

BEST = ["--index-strategy", "unsafe-best-match"]
LISTING = """\
:env:.find-links='/env'
:env:.disable-pip-version-check='1'
global.constraint='/a.txt /b.txt'
global.find-links='/file'
install.extra-index-url='https://one/simple\\nhttps://two/simple'
download.index-url='https://none/simple'
"""


@pytest.fixture
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dcconv_install", ROOT / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Programs:
    """Stands for the programs that install.py runs."""

    def __init__(self, listing: str = "", *, uv: int = 0, pip: int = 0) -> None:
        self.listing, self.status = listing, {"uv": uv, "pip": pip}
        self.ran: list[list[str]] = []

    def run(self, command: list[str], **options: object) -> SimpleNamespace:
        if command[-2:] == ["config", "list"]:
            return SimpleNamespace(stdout=self.listing)
        self.ran.append(command)
        return SimpleNamespace(returncode=self.status["pip" if "-m" in command else "uv"])


@pytest.fixture
def programs(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Programs:
    programs = Programs()
    monkeypatch.setattr(install.subprocess, "run", programs.run)
    monkeypatch.setattr(install, "find_uv", lambda: "/x/uv")
    monkeypatch.delenv("DCCONV_INSTALLER", raising=False)
    return programs


def with_pip(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pip", "install", *arguments]


def test_settings_of_install_are_read_and_the_environment_has_the_last_word(
    install: ModuleType,
) -> None:
    assert install.settings(LISTING) == {
        "constraint": "/a.txt /b.txt",
        "find-links": "/env",
        "extra-index-url": "https://one/simple\nhttps://two/simple",
        "disable-pip-version-check": "1",
    }
    assert install.settings("") == {}


def test_uv_chooses_among_the_files_that_pip_would(install: ModuleType) -> None:
    assert install.uv_options({}) == BEST
    assert install.uv_options(install.settings(LISTING)) == [
        *("--constraint", "/a.txt", "--constraint", "/b.txt"),
        *("--find-links", "/env"),
        *("--index", "https://one/simple", "--index", "https://two/simple"),
        *BEST,
    ]
    own = {"index-url": "https://own/simple", "no-index": "true", "cert": "/c.pem"}
    assert install.uv_options(own) == ["--default-index", "https://own/simple", "--no-index", *BEST]
    assert install.uv_options({"no-index": "0"}) == BEST


@pytest.mark.parametrize("name", ["only-binary", "proxy", "require-hashes", "target", "unheard-of"])
def test_setting_that_uv_is_not_told_leaves_the_work_to_pip(
    install: ModuleType, programs: Programs, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert install.uv_options({"timeout": "9", name: "1"}) is None
    programs.listing = f"global.{name}='1'\n"
    assert install.main(["torch"]) == 0
    assert programs.ran == [with_pip("torch")]
    reason = "uv has no counterpart for a setting of pip (pip config list)"
    assert capsys.readouterr().out == f"dcconv: installing with pip: {reason}\n"


def test_uv_installs_into_the_environment_of_the_python_that_runs(
    install: ModuleType, programs: Programs
) -> None:
    programs.listing = "global.constraint='/c.txt'\n"
    assert install.main(["--quiet", "torch"]) == 0
    options = ["--python", sys.executable, "--constraint", "/c.txt", *BEST]
    assert programs.ran == [["/x/uv", "pip", "install", *options, "--quiet", "torch"]]


def test_pip_installs_where_uv_fails(
    install: ModuleType, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    programs.status |= {"uv": 2, "pip": 3}
    assert install.main(["torch"]) == 3
    assert programs.ran[1:] == [with_pip("torch")]
    assert "installing with pip: uv failed (exit status 2)" in capsys.readouterr().out


def test_pip_installs_where_uv_is_not_to_be_had_or_not_wanted(
    install: ModuleType, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "find_uv", lambda: None)
    assert install.uv(["torch"]) == "uv was not found"
    monkeypatch.setenv("DCCONV_INSTALLER", "pip")
    assert install.uv(["torch"]) == "DCCONV_INSTALLER=pip was set"
    assert install.main(["torch"]) == 0
    assert programs.ran == [with_pip("torch")]


def test_uv_is_installed_only_where_there_is_none(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    programs = Programs()
    monkeypatch.setattr(install.subprocess, "run", programs.run)
    monkeypatch.setattr(install.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert install.find_uv() is None
    assert programs.ran == [[str(tmp_path / "python"), "-m", "pip", "install", "--quiet", "uv"]]
    on_path, beside = tmp_path / "path" / "uv", tmp_path / "uv"
    for program in (on_path, beside):
        program.parent.mkdir(exist_ok=True)
        program.touch(mode=0o755)
        assert install.find_uv() == str(program)
    assert len(programs.ran) == 1
