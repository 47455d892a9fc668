"""The ImageNet runner by its command line, on tiny folders and shards; torchrun with two processes.

The two processes are killed, restarted, stopped and resumed, and must end where an undisturbed run
ends.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import data_files
import pytest
import torch
from forked_launcher import Launched, Launcher
from paths import ROOT

from train import imagenet
from train.data.augment import OfficialTransform
from train.data.images import decode
from train.engine.checkpoint import Checkpoints
from train.engine.config import from_mapping

WIDTHS = (4, 4, 6, 6)
# Of the two processes; enough to be killed and stopped in between.
STEPS = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    return data_files.write_image_folder(tmp_path_factory.mktemp("folders"), train=8, val=3)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return data_files.write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(autouse=True)
def same_threads():
    """A run sets the number of threads of its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def arguments(data: Path, folder: Path, *more: object) -> list[str]:
    given = ["--data", data, "--folder", folder, "--classes", 3, "--widths", *WIDTHS]
    given += ["--image-size", 32, "--resize", 36, "--batch-size", 4, "--evaluation-batch", 4]
    given += ["--workers", 0, "--buffer", 4, "--threads", 1, "--device", "cpu", "--no-compile"]
    return [str(item) for item in (*given, *more)]


def train(data: Path, folder: Path, *more: object) -> int:
    return imagenet.main(arguments(data, folder, *more))


def refusal(capsys, *given: object) -> str:
    """Return the sentence that a command line is refused with."""
    try:
        status = imagenet.main([str(item) for item in given])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


def records(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def newest(folder: Path) -> dict:
    return Checkpoints(folder / "checkpoints").load_latest()[1]


# Presets.


@pytest.mark.parametrize(
    ("preset", "form", "more"),
    [
        ("official", "folders", ()),
        ("official", "shards", ("--lanes", 2)),
        ("official", "folders", ("--network", "resnet18")),
        ("modern", "folders", ("--trivial", "--erase", 0.5)),
        ("modern", "shards", ()),
        ("modern_resnet18", "folders", ("--workers", 1)),
        ("modern_adamw", "shards", ("--workers", 1)),
    ],
)
def test_preset_trains(preset, form, more, folders, shards, tmp_path):
    data = folders if form == "folders" else shards
    given = ("--preset", preset, "--steps", 3, "--log-every", 1, "--format", form, *more)
    assert train(data, tmp_path, *given) == 0
    lines = records(tmp_path, "train")
    terms = ["fit", "l2", "orthogonality"] if preset == "official" else ["fit", "orthogonality"]
    for line in lines:
        assert math.isfinite(line["loss"]) and 0 <= line["waiting_share"] < 1
        assert line["loss"] == pytest.approx(sum(line[term] for term in terms), rel=1e-5)
    assert [line["step"] for line in lines] == [1, 2, 3]
    (evaluation,) = records(tmp_path, "evaluate")
    # Of three classes, the right one is among the best five.
    assert evaluation["step"] == 3 and evaluation["accuracy_top5"] == 100
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["images_per_epoch"] == (24 if form == "folders" else 18)
    assert ("average" in newest(tmp_path)["task"]) == (preset != "official")


def test_training_learns(folders, tmp_path):
    # Colours give the class away.
    more = ("--preset", "official", "--steps", 50, "--log-every", 10, "--lr", 0.03)
    assert train(folders, tmp_path, *more) == 0
    fits = [line["fit"] for line in records(tmp_path, "train")]
    assert fits[-1] < 0.75 * fits[0], fits


def test_accumulated_gradients_are_those_of_the_whole_batch(folders, tmp_path):
    # Nothing in this network depends on the batch: no normalisation, and no mean patch norm.
    more = ("--operator", "linear_cosine", "--no-norm", "--steps", 4, "--log-every", 1)
    assert train(folders, tmp_path / "whole", *more) == 0
    assert train(folders, tmp_path / "parts", *more, "--accumulate", 2) == 0
    a, b = (newest(tmp_path / name)["network"] for name in ("whole", "parts"))
    begin = Checkpoints(tmp_path / "whole" / "checkpoints")
    start = begin.load(begin.entries[0])["network"]
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6, msg=name)
    moved = max(float((a[name] - start[name]).abs().max()) for name in a)
    assert moved > 1e-2
    losses = [[line["loss"] for line in records(tmp_path / n, "train")] for n in ("whole", "parts")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("form", ["folders", "shards"])
def test_steps_are_the_same_after_going_on(form, folders, shards, tmp_path):
    data = folders if form == "folders" else shards
    more = ("--preset", "modern", "--ema", 0.9, "--schedule", "steps", "--warmup", 0)
    more += ("--log-every", 1, "--workers", 1, "--lanes", 2)
    assert train(data, tmp_path / "straight", *more, "--steps", 8) == 0
    assert train(data, tmp_path / "parts", *more, "--steps", 3) == 0
    assert imagenet.main(["--resume", str(tmp_path / "parts"), "--steps", "8"]) == 0
    a, b = (newest(tmp_path / name) for name in ("straight", "parts"))
    for part in ("network", "task"):
        assert torch.equal(flat_tensors(a[part]), flat_tensors(b[part]))
    assert a["ranks"][0]["stream"] == b["ranks"][0]["stream"]
    losses = [
        [line["loss"] for line in records(tmp_path / name, "train")]
        for name in ("straight", "parts")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_other_workers_need_the_lanes_of_the_run(shards, tmp_path, capsys):
    assert train(shards, tmp_path / "run", "--workers", 1, "--steps", 1) == 0
    resume = ["--resume", str(tmp_path / "run"), "--steps", "2", "--workers", "2"]
    assert imagenet.main(resume) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "dcconv: lanes must be 1 as in the resumed run (not given: ranks times workers), got 2"
    )
    assert imagenet.main([*resume, "--lanes", "1"]) == 2
    assert "lanes must be a multiple of ranks times workers, 2, got 1" in capsys.readouterr().err


def flat_tensors(state: dict) -> torch.Tensor:
    """Return every number of nested states in one tensor."""
    parts = []
    for value in state.values():
        if isinstance(value, dict):
            parts.append(flat_tensors(value))
        else:
            parts.append(value.double().flatten())
    return torch.cat(parts)


def test_evaluation_takes_the_centre_of_every_image_once(folders, tmp_path):
    values = imagenet.presets(imagenet.imagenet_recipes)["official"]
    values |= {"data": str(folders), "classes": 3, "widths": WIDTHS, "workers": 0}
    values |= {"image_size": 24, "resize": 36, "batch_size": 4, "evaluation_batch": 4}
    task = imagenet.build(from_mapping(imagenet.ImageNetRun, values), torch.device("cpu"))
    images, labels = (torch.cat(parts) for parts in zip(*task.batches, strict=True))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    file = folders / "val" / "class002" / "0001.JPEG"
    expected = OfficialTransform(False, 24, 36)(decode(file.read_bytes()))
    assert torch.equal(images[7], expected)
    # Training crops and flips at random.
    shown = [task.stream.next()[0] for _ in range(12)]
    assert len(torch.cat(shown).flatten(1).unique(dim=0)) > 30


# Options and data that do not fit.


def test_number_of_classes_must_be_that_of_the_folders(folders, tmp_path, capsys):
    error = refusal(capsys, *arguments(folders, tmp_path, "--classes", 1000))
    rule = f"dcconv: classes must be the number of class folders in '{folders}', 3, got 1000"
    assert error == rule
    assert not (tmp_path / "checkpoints").exists()


def test_labels_of_shards_must_be_among_the_classes(shards, tmp_path, capsys):
    error = refusal(capsys, *arguments(shards, tmp_path, "--classes", 2, "--steps", 5))
    assert "must have a .cls from 0 to 1, got '2'" in error


def test_missing_data_says_what_belongs_where(tmp_path, capsys):
    error = refusal(capsys, *arguments(tmp_path, tmp_path / "run"))
    assert "train/<class>/<image>.jpg" in error and str(tmp_path) in error
    error = refusal(capsys, *arguments(tmp_path, tmp_path / "run", "--format", "shards"))
    assert "train/*.tar" in error and str(tmp_path) in error


def test_block4_belongs_to_one_network(folders, tmp_path, capsys):
    more = ("--network", "resnet18", "--no-block4")
    error = refusal(capsys, *arguments(folders, tmp_path, *more))
    assert error == "dcconv: block4 must be left out for network 'resnet18', got False"


@pytest.mark.parametrize(
    ("given", "rule"),
    [(["--trivial"], "trivial must be False"), (["--erase", "0.5"], "erase must be 0")],
)
def test_official_images_are_not_changed_otherwise(given, rule, folders, tmp_path, capsys):
    error = refusal(capsys, *arguments(folders, tmp_path, *given))
    assert f"dcconv: {rule} with official_images, got" in error


def test_corrupt_image_is_named_or_skipped(tmp_path, capsys, caplog):
    data = data_files.write_image_folder(tmp_path / "data", classes=3, train=4)
    victim = data / "train" / "class001" / "0002.png"
    victim.write_bytes(victim.read_bytes()[:100])
    more = ("--steps", 6, "--save-every", 1, "--log-every", 1)
    # Two steps have all twelve images before them or behind.
    error = refusal(capsys, *arguments(data, tmp_path / "a", *more))
    assert f"dcconv: image '{victim}' must be a whole JPEG or PNG file, got" in error
    saved = Checkpoints(tmp_path / "a" / "checkpoints").last_step
    assert saved == records(tmp_path / "a", "train")[-1]["step"] if saved else saved == 0
    # What was saved goes on with the file passed over, or put right.
    assert imagenet.main(["--resume", str(tmp_path / "a"), "--skip-corrupt"]) == 0
    assert [line["step"] for line in records(tmp_path / "a", "train")] == list(range(1, 7))
    (message,) = {record.getMessage() for record in caplog.records}
    assert message.startswith("skipped: ") and str(victim) in message


def test_truncated_shard_is_named_or_skipped(tmp_path, capsys, caplog):
    data = data_files.write_shards(tmp_path / "data")
    victim = data / "train" / "000002.tar"
    victim.write_bytes(victim.read_bytes()[:5000])
    more = ("--steps", 6, "--log-every", 1)
    error = refusal(capsys, *arguments(data, tmp_path / "a", *more))
    assert f"dcconv: shard '{victim}' must be a whole tar archive, got" in error
    assert train(data, tmp_path / "b", *more, "--skip-corrupt") == 0
    assert any(str(victim) in record.getMessage() for record in caplog.records)


def test_sigterm_to_all_processes_saves(folders, tmp_path):
    command = [sys.executable, "-m", "train.imagenet"]
    command += arguments(folders, tmp_path, "--workers", 2, "--steps", 100_000, "--log-every", 1)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = tmp_path / "metrics.jsonl"
    try:
        wait_for(process, lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 2)
        # As torchrun does: also to the processes that decode images.
        os.killpg(process.pid, signal.SIGTERM)
        output, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, error
    step = saved_step(tmp_path)
    assert step >= 2 and f"Stopped by SIGTERM after step {step}." in output


# Two processes.


@pytest.fixture
def launcher(tmp_path) -> Iterator[Launcher]:
    (tmp_path / "printed").mkdir()
    made = Launcher("train.imagenet", tmp_path / "printed")
    yield made
    made.close()


def wait_for(process: subprocess.Popen | Launched, done: Callable[[], object]) -> None:
    deadline = time.monotonic() + 180
    while process.poll() is None and time.monotonic() < deadline and not done():
        time.sleep(0.02)


def saved_step(folder: Path) -> int:
    manifest = folder / "checkpoints" / "manifest.json"
    if not manifest.exists():
        return -1
    return max(
        (entry["step"] for entry in json.loads(manifest.read_text())["checkpoints"]), default=-1
    )


def test_two_processes_killed_and_stopped_end_where_undisturbed_ones_end(
    folders, tmp_path, launcher
):
    # Batch normalisation, mean patch norms of all processes and averaged weights: much that a
    # checkpoint must bring back.
    more = ("--preset", "modern", "--network", "cnn9", "--widths", 4, 4, 6, "--batch-size", 8)
    more += ("--steps", STEPS, "--save-every", 2, "--log-every", 2, "--evaluate-every", 6)
    more += ("--ema", 0.9, "--warmup", 5, "--project-every", 5)
    straight, run = tmp_path / "straight", tmp_path / "run"
    undisturbed = launcher.launch(arguments(folders, straight, *more))
    _, error = undisturbed.communicate(timeout=240)
    assert undisturbed.returncode == 0, error

    process = launcher.launch(arguments(folders, run, *more), restarts=1)
    try:
        wait_for(process, lambda: saved_step(run) >= 2)
        os.kill(process.process_of(1), signal.SIGKILL)
        resumes = run / "resumes.jsonl"
        wait_for(process, resumes.exists)
        back = json.loads(resumes.read_text())["step"]
        assert back >= 2
        wait_for(process, lambda: saved_step(run) > back)
        process.send_signal(signal.SIGTERM)
        output, error = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
    assert f"Resumed at step {back}" in output, error
    stopped = saved_step(run)
    assert f"Stopped by SIGTERM after step {stopped}." in output
    assert back < stopped < STEPS

    process = launcher.launch(arguments(folders, run, *more))
    output, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert f"Resumed at step {stopped}" in output
    a, b = newest(straight), newest(run)
    assert a["step"] == b["step"] == STEPS
    for part in ("network", "task"):
        assert torch.equal(flat_tensors(a[part]), flat_tensors(b[part]))
    for kind in ("train", "evaluate"):
        logs = [
            [(line["step"], line["loss"]) for line in records(path, kind)]
            for path in (straight, run)
        ]
        assert logs[0] == logs[1]
