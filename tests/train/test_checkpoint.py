"""Checkpoints: whole or not at all, verified, the last few and the best, and folders of runs."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import ROOT

from train.engine import folder as folders
from train.engine.checkpoint import Checkpoints
from train.engine.folder import RunFolder, write_file


def state_of(step: int) -> dict:
    return {"step": step, "weight": torch.full((64, 64), float(step))}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with checkpoints of steps 10, 20 and 30."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (10, 20, 30):
        checkpoints.save(state_of(step), step)
    return tmp_path / "checkpoints"


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_newest_is_loaded_as_saved(saved):
    entry, state = Checkpoints(saved).load_latest()
    assert entry.step == state["step"] == 30
    assert torch.equal(state["weight"], state_of(30)["weight"])


def test_manifest_has_step_size_and_digest_of_every_file(saved):
    manifest = json.loads((saved / "manifest.json").read_text())
    assert [entry["step"] for entry in manifest["checkpoints"]] == [10, 20, 30]
    for entry in manifest["checkpoints"]:
        data = (saved / entry["file"]).read_bytes()
        assert entry["bytes"] == len(data)
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()


def test_last_few_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step, score in ((1, 50.0), (2, 70.0), (3, 60.0), (4, None), (5, 70.0)):
        checkpoints.save(state_of(step), step, score)
    assert files(tmp_path) == [
        "manifest.json",
        *(f"step-{step:08d}.pt" for step in (2, 4, 5)),
    ]
    again = Checkpoints(tmp_path, keep_last=2)
    assert again.best_score == 70.0
    # The first of equals.
    assert again.load_best()[1]["step"] == 2
    assert again.load_latest()[1]["step"] == 5
    assert again.is_better(70.1) and not again.is_better(70.0)
    checkpoints.save(state_of(6), 6, 80.0)
    assert files(tmp_path)[1:] == ["step-00000005.pt", "step-00000006.pt"]


def test_nothing_saved_is_nothing_loaded(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.load_latest() is None and checkpoints.load_best() is None
    assert not (tmp_path / "none").exists()


def cut_in_half(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "got"),
    [
        (cut_in_half, "bytes"),
        (flip_a_bit, "got content of another SHA-256 than was saved"),
        (Path.unlink, "got No such file or directory"),
    ],
)
def test_damaged_checkpoint_is_named_and_the_newest_intact_one_is_used(saved, damage, got):
    size = (saved / "step-00000030.pt").stat().st_size
    damage(saved / "step-00000030.pt")
    said: list[str] = []
    checkpoints = Checkpoints(saved, warn=said.append)
    entry, state = checkpoints.load_latest()
    assert entry.step == state["step"] == 20
    path = saved / "step-00000030.pt"
    assert said[0].startswith(f"dcconv: checkpoint must be the intact file '{path}', got ")
    assert said[0].endswith(f"got {size // 2} of {size} bytes" if got == "bytes" else got)
    assert said[1:] == ["The newest intact checkpoint is that of step 20"]
    # Going on from step 20 does not count the damaged one among the last few.
    checkpoints.save(state_of(25), 25)
    assert [entry.step for entry in checkpoints.entries] == [10, 20, 25]
    assert files(saved) == ["manifest.json", *(f"step-{s:08d}.pt" for s in (10, 20, 25))]


def test_damaged_best_gives_its_place_to_the_next_best(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step, score in ((1, 50.0), (2, 60.0), (3, 90.0)):
        checkpoints.save(state_of(step), step, score)
    cut_in_half(tmp_path / "step-00000003.pt")
    again = Checkpoints(tmp_path)
    with pytest.raises(
        ValueError, match=r"dcconv: checkpoint must be the intact file '.*00003.pt'"
    ):
        again.load_best()
    assert again.load_latest()[0].step == 2
    assert again.best_score == 60.0


def test_only_damaged_checkpoints_are_an_error_that_deletes_nothing(saved):
    for path in saved.glob("*.pt"):
        cut_in_half(path)
    before = files(saved)
    said: list[str] = []
    with pytest.raises(
        ValueError, match=r"dcconv: resume must have an intact checkpoint in .*, got 3"
    ):
        Checkpoints(saved, warn=said.append).load_latest()
    assert len(said) == 3 and files(saved) == before


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"format": 1, "best": null}',
        '{"format": 2, "best": null, "checkpoints": []}',
        '{"format": 1, "best": "step-3.pt", "checkpoints": []}',
        '{"format": 1, "best": null, "checkpoints": [{"file": "../x.pt", "step": 1, "bytes": 1, '
        '"sha256": ""}]}',
    ],
)
def test_unreadable_manifest_is_named(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="dcconv: resume must have a readable list of checkpoints"):
        Checkpoints(tmp_path)


def test_checkpoints_without_their_manifest_are_neither_used_nor_deleted(saved):
    (saved / "manifest.json").unlink()
    before = files(saved)
    with pytest.raises(ValueError, match="dcconv: resume must have a list of its checkpoints, got"):
        Checkpoints(saved)
    assert files(saved) == before and len(before) == 3


def test_checkpoint_with_code_inside_is_not_run(tmp_path):
    class Command:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"x": Command()}, 1)
    with pytest.raises(ValueError, match="got more than tensors and plain Python"):
        checkpoints.load(checkpoints.entries[0])
    assert not (tmp_path / "made").exists()


@pytest.fixture(params=["fsync", "write"])
def full_disk(request, monkeypatch):
    """The disk is full: at fsync, or when half is written."""
    if request.param == "fsync":

        def refuse(handle):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(folders.os, "fsync", refuse)
        return
    opened = Path.open

    class Half:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, data):
            self.file.write(bytes(data)[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half(self, mode="r", *arguments, **options):
        file = opened(self, mode, *arguments, **options)
        return Half(file) if mode == "wb" else file

    monkeypatch.setattr(Path, "open", half)


def test_full_disk_leaves_what_was_saved(saved, full_disk, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    checkpoints = Checkpoints(saved)
    with pytest.raises(OSError, match="No space left on device"):
        checkpoints.save(state_of(40), 40, 99.0)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert checkpoints.last_step == 30 and checkpoints.best is None
    monkeypatch.undo()
    assert Checkpoints(saved).load_latest()[1]["step"] == 30


def test_full_disk_at_the_manifest_leaves_what_was_saved(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def refuse(path, data):
        if path.name == "manifest.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_file(path, data)

    monkeypatch.setattr("train.engine.checkpoint.write_file", refuse)
    with pytest.raises(OSError, match="No space"):
        Checkpoints(saved).save(state_of(40), 40)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_write_that_the_system_cuts_off_leaves_what_was_saved(saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    # A real limit of the operating system, in a process of its own.
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from train.engine.checkpoint import Checkpoints\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    Checkpoints(Path(sys.argv[1])).save({'x': torch.zeros(5000)}, 40)\n"
        "except OSError as error:\n"
        "    sys.exit(error.errno)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(saved)], env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == errno.EFBIG
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_crash_between_file_and_manifest_is_tidied_by_the_next_save(saved):
    (saved / "step-00000040.pt").write_bytes(b"not in the manifest")
    (saved / ".step-00000050.pt.123.tmp").write_bytes(b"half")
    checkpoints = Checkpoints(saved)
    assert checkpoints.load_latest()[0].step == 30
    checkpoints.save(state_of(35), 35)
    assert files(saved) == ["manifest.json", *(f"step-{s:08d}.pt" for s in (20, 30, 35))]


def test_second_save_of_a_step_never_writes_over_the_first(saved):
    checkpoints = Checkpoints(saved)
    path = checkpoints.save(state_of(31), 30)
    assert path.name == "step-00000030-2.pt"
    assert (saved / "step-00000030.pt").exists()
    assert Checkpoints(saved).load_latest()[1]["step"] == 31


def test_file_is_durable_before_its_name_is_and_the_name_after(tmp_path, monkeypatch):
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(handle):
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    def note_replace(self, target):
        calls.append("rename")
        return replace(self, target)

    monkeypatch.setattr(folders.os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    write_file(tmp_path / "x", b"data")
    assert calls == ["file", "rename", "folder"]
    assert (tmp_path / "x").read_bytes() == b"data"


def test_run_folder_holds_configuration_environment_and_source(tmp_path):
    folder = RunFolder.create(tmp_path / "runs", "tiny")
    other = RunFolder.create(tmp_path / "runs", "tiny")
    assert folder.path != other.path and folder.path.name.endswith("_tiny")
    folder.start("steps: 3\n", torch.device("cpu"), 2)
    assert (folder.path / "config.yaml").read_text() == "steps: 3\n"
    environment = json.loads((folder.path / "environment.json").read_text())
    assert environment["torch"] == torch.__version__ and environment["world_size"] == 2
    assert environment["threads"] == torch.get_num_threads() and environment["device"] == "cpu"
    own = Path(folders.__file__)
    copied = folder.path / "source" / "train" / "engine" / "folder.py"
    assert copied.read_bytes() == own.read_bytes()
    assert (folder.path / "source" / "dcconv" / "modules.py").exists()
    folder.restart("steps: 4\n", torch.device("cpu"), 2)
    folder.restart("steps: 4\n", torch.device("cpu"), 3)
    lines = (folder.path / "resumes.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["step"], r["config_changed"]) for r in records] == [(2, True), (3, False)]
    assert (folder.path / "config.yaml").read_text() == "steps: 4\n"


def test_folder_that_is_a_file_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(ValueError, match=f"dcconv: out must be a folder, got '{file}'"):
        RunFolder.create(file, "x")
    with pytest.raises(ValueError, match=f"dcconv: folder must be a folder, got '{file}'"):
        RunFolder.at(file)
    assert file.read_text() == "kept"
