"""A group of processes is left with nothing alive that knows it, whatever ended the run."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_task import TinyTask

from train.engine.config import EngineOptions
from train.engine.loop import launch


@pytest.fixture
def alone(monkeypatch):
    """The environment of a process that was started as the only one of its group."""
    threads = torch.get_num_threads()
    given = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    yield
    torch.set_num_threads(threads)


def launched(folder: Path, refs: list[Any], **change: Any) -> int:
    def build(device: torch.device) -> TinyTask:
        assert dist.is_initialized()
        task = TinyTask()
        # As DistributedDataParallel and compiled networks do, it knows itself.
        task.itself = task
        for name, value in change.items():
            setattr(task, name, value)
        refs.append(weakref.ref(task))
        return task

    options = EngineOptions(steps=2, device="cpu", threads=1, folder=str(folder))
    return launch(options, build, program="prog", name="tiny")


def test_group_ends_after_everything_that_knows_it(alone, tmp_path, monkeypatch):
    refs: list[Any] = []
    seen = []
    destroy = dist.destroy_process_group

    def destroyed() -> None:
        seen.append(refs[0]())
        destroy()

    monkeypatch.setattr(dist, "destroy_process_group", destroyed)
    assert launched(tmp_path, refs) == 0
    assert seen == [None] and not dist.is_initialized()


def test_nothing_outlives_a_run_that_is_refused(alone, tmp_path, capsys):
    def refuse(images: torch.Tensor, labels: torch.Tensor) -> None:
        raise ValueError("dcconv: images must be better, got these")

    refs: list[Any] = []
    assert launched(tmp_path, refs, loss=refuse) == 2
    assert refs[0]() is None and not dist.is_initialized()
    assert "images must be better" in capsys.readouterr().err
