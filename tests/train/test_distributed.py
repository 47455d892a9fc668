"""Two processes through torchrun: the same training as one, stopped, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_task
import torch
from paths import TESTS, python_path

from dcconv import use_backend
from train.engine.checkpoint import Checkpoints

ENVIRONMENT = os.environ | {
    "PYTHONPATH": python_path(),
    "OMP_NUM_THREADS": "1",
    "DCCONV_BACKEND": "reference",
}
STEPS = 12
COMMON = (
    *("--steps", str(STEPS), "--log-every", "4", "--save-every", "4", "--evaluate-every", "6"),
    *("--accumulate", "2"),
)


def command(folder: Path, *arguments: str, processes: int = 2, restarts: int = 0) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={processes}", f"--max-restarts={restarts}"),
        *(str(TESTS / "support" / "tiny_task.py"), "--folder", str(folder), "--threads", "1"),
        *("--device", "cpu", *COMMON, *arguments),
    ]


def run(*arguments, **given) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments, **given), env=ENVIRONMENT, capture_output=True, text=True
    )


def train_alone(folder: Path, *arguments: str) -> int:
    """Run the command in this process."""
    threads = torch.get_num_threads()
    given = ["--folder", str(folder), "--threads", "1", "--device", "cpu", *COMMON, *arguments]
    with use_backend("reference"):
        status = tiny_task.main(given)
    torch.set_num_threads(threads)
    return status


def records_of(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def network_of(folder: Path, step: int) -> dict:
    """Return the network's state in the checkpoint of a step."""
    checkpoints = Checkpoints(folder / "checkpoints")
    entry = next(entry for entry in checkpoints.entries if entry.step == step)
    return checkpoints.load(entry)["network"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """The run of two processes that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    done = run(folder)
    assert done.returncode == 0, done.stderr
    # One of them speaks.
    assert done.stdout.count("Stored in") == 1
    return folder


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory) -> tuple[Path, str]:
    """Return a run of two processes and what it said.

    One is killed before step 10 and both start again; after step 12 the job is terminated. Steps
    do not depend on how many are to come.
    """
    folder = tmp_path_factory.mktemp("disturbed")
    given = ("--die-at", "10", "--steps", "100000", "--keep-last", "100000")
    process = subprocess.Popen(
        command(folder, *given, restarts=1),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    manifest = folder / "checkpoints" / "manifest.json"
    try:
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            if manifest.exists() and f"{STEPS:08d}.pt" in manifest.read_text():
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output, error = process.communicate(timeout=120)
    finally:
        process.kill()
    assert "Stopped by SIGTERM after step" in output, error
    return folder, output


def test_two_ranks_are_one_with_twice_the_batch(straight, tmp_path):
    assert train_alone(tmp_path, "--batch-size", "8") == 0
    one, two = network_of(tmp_path, STEPS), network_of(straight, STEPS)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5, msg=name)
    losses = [[r["loss"] for r in records_of(path)] for path in (tmp_path, straight)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    results = json.loads((straight / "results.json").read_text())
    assert results["world_size"] == 2 and results["status"] == "finished"


def test_killed_rank_is_restarted_from_the_last_checkpoint(straight, disturbed):
    folder, output = disturbed
    assert "Resumed at step 8" in output
    a, b = network_of(folder, STEPS), network_of(straight, STEPS)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    kept = [
        [(r["kind"], r["step"], r["loss"]) for r in records_of(path) if r["step"] <= STEPS]
        for path in (folder, straight)
    ]
    assert kept[0] == kept[1]


def test_terminated_job_saves_and_goes_on(disturbed, capsys):
    folder, output = disturbed
    assert "Traceback" not in output
    stopped = Checkpoints(folder / "checkpoints").last_step
    assert f"Stopped by SIGTERM after step {stopped}." in output and stopped >= STEPS
    # Every process draws the images of the step where all have stopped.
    state = Checkpoints(folder / "checkpoints").load_latest()[1]
    a, b = (rank["stream"]["generator"] for rank in state["ranks"])
    assert len(state["ranks"]) == 2 and torch.equal(a, b)
    # Another number of processes goes on from there.
    capsys.readouterr()
    assert train_alone(folder, "--steps", str(stopped + 2)) == 0
    output = capsys.readouterr().out
    assert f"Resumed at step {stopped}" in output and "Resuming 2 processes with 1" in output
    assert Checkpoints(folder / "checkpoints").last_step == stopped + 2
