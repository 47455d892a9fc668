"""A run's folder has one owner: a second run is refused, and the lock of a dead one is taken."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_task
import torch

from train import digits
from train.engine import owner
from train.engine.owner import OWNER, owned
from train.robustness import run as robustness

# Owns a folder as any process does, says so, and waits; a child of it, as those that decode images,
# lives on.
HOLD = """
import fcntl, json, os, sys, time
handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
os.write(handle, json.dumps({"pid": os.getpid(), "host": "h", "since": "now"}).encode())
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def same_threads():
    """A run sets the number of threads of its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def holder(tmp_path):
    """A process that owns a folder, and its child."""
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", HOLD, str(tmp_path / OWNER)],
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(process.stdout.readline())
    yield process
    process.kill()
    process.wait()
    os.kill(child, signal.SIGKILL)


def own(folder: Path, argument: str = "folder") -> None:
    with owned(folder, argument, print):
        pass


def test_second_owner_is_refused_and_that_of_a_killed_one_is_not(tmp_path, holder):
    rule = "dcconv: folder must be a folder that no other run is using"
    expected = f"{rule}, got '{tmp_path}' (used by process {holder.pid} on h, since now)"
    # To be refused takes nothing from the owner.
    for _ in range(2):
        with pytest.raises(ValueError, match="no other run is using") as raised:
            own(tmp_path)
        assert str(raised.value) == expected
    holder.kill()
    holder.wait()
    assert (tmp_path / OWNER).exists()
    # Its child lives, but the lock was not the child's.
    own(tmp_path)
    assert not (tmp_path / OWNER).exists()


def test_owner_says_who_it_is_and_keeps_others_out(tmp_path):
    with owned(tmp_path, "folder", print):
        # Read by another process: to close the file in this one would give the lock away.
        code = (
            "import fcntl, sys\n"
            "file = open(sys.argv[1], 'r+')\n"
            "print(file.read())\n"
            "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        )
        command = [sys.executable, "-S", "-c", code, str(tmp_path / OWNER)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert json.loads(done.stdout)["pid"] == os.getpid()
        assert done.returncode == 1 and "BlockingIOError" in done.stderr


def test_process_refuses_itself(tmp_path):
    with owned(tmp_path, "resume", print):
        with pytest.raises(ValueError, match=r"resume must be .*used by this process\)"):
            own(tmp_path / ".", "resume")
        assert (tmp_path / OWNER).exists()
    own(tmp_path)


def test_lock_ends_with_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), owned(tmp_path, "folder", print):
        raise ZeroDivisionError
    own(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"[", b'{"pid": "x"}', b"\xff"])
def test_owner_that_cannot_be_read_is_another_process(tmp_path, holder, content):
    (tmp_path / OWNER).write_bytes(content)
    with pytest.raises(ValueError, match=r"\(used by another process\)"):
        own(tmp_path)


def test_file_that_was_left_is_no_owner(tmp_path):
    (tmp_path / OWNER).write_text('{"pid": 1, "host": "here", "since": "now"}')
    own(tmp_path)


def test_lock_on_a_file_that_its_last_owner_removed_is_not_enough(tmp_path, monkeypatch):
    lock = owner.fcntl.lockf
    calls = []

    def late(handle, how):
        lock(handle, how)
        calls.append(handle)
        if len(calls) == 1:
            (tmp_path / OWNER).unlink()

    monkeypatch.setattr(owner.fcntl, "lockf", late)
    with owned(tmp_path, "folder", print):
        assert len(calls) == 2 and (tmp_path / OWNER).exists()


def test_pipe_in_the_place_of_the_lock_is_refused(tmp_path):
    os.mkfifo(tmp_path / OWNER)
    with pytest.raises(ValueError, match=r"folder must be a folder that can be written \(\.owner"):
        own(tmp_path)
    assert (tmp_path / OWNER).is_fifo()


def test_disk_without_locks_is_spoken_of(tmp_path, monkeypatch):
    def refuse(handle, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(owner.fcntl, "lockf", refuse)
    said: list[str] = []
    with owned(tmp_path, "folder", said.append):
        pass
    assert said == [
        f"The disk of '{tmp_path}' has no locks (No locks available): "
        "nothing keeps a second run out of this folder"
    ]


# Runners.


def test_engine_refuses_a_folder_in_use(tmp_path, holder, capsys):
    given = ["--folder", str(tmp_path), "--device", "cpu", "--threads", "1", "--steps", "1"]
    before = sorted(tmp_path.rglob("*"))
    assert tiny_task.main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("dcconv: folder must be a folder that no other run is using, got '")
    assert sorted(tmp_path.rglob("*")) == before
    holder.kill()
    holder.wait()
    assert tiny_task.main(given) == 0
    assert not (tmp_path / OWNER).exists()
    with owned(tmp_path, "folder", print):
        assert tiny_task.main(["--resume", str(tmp_path), "--steps", "2"]) == 2
    assert "dcconv: resume must be a folder that no other run is" in capsys.readouterr().err


def test_digits_and_robustness_refuse_a_folder_in_use(tmp_path, capsys):
    few = ["--test-share", "0.9", "--widths", "4", "4", "4", "--epochs", "1"]
    out = tmp_path / "digits"
    assert digits.main(["--quick", "--operators", "conv", *few, "--out", str(out)]) == 0
    (run,) = out.iterdir()
    assert not (run / OWNER).exists()
    folder = tmp_path / "robustness"
    folder.mkdir()
    for path, main, given in (
        (run, digits.main, ["--resume", str(run)]),
        (folder, robustness.main, ["--folder", str(folder), "--threads", "1"]),
    ):
        with owned(path, "folder", print):
            before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
            capsys.readouterr()
            assert main(given) == 2
            assert f"that no other run is using, got '{path}'" in capsys.readouterr().err
            assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


def test_other_processes_of_a_run_hear_of_the_refusal(tmp_path, monkeypatch):
    monkeypatch.setattr(owner.distributed, "is_main", lambda: False)
    own(tmp_path)
    monkeypatch.setattr(owner.distributed, "broadcast", lambda value: "dcconv: refused")
    with pytest.raises(ValueError, match="dcconv: refused"):
        own(tmp_path)
    # They have no lock and write nothing.
    assert not list(tmp_path.iterdir())
