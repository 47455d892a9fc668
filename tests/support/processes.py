"""Several processes of one test that form a process group, started cheaply."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

COUNT = 2

# Imported once, by the server that every process of every test is forked from: a process that
# imports them for itself takes 3 s of processor time. The server has no threads and has computed
# nothing when it forks.
PRELOADED = ("dcconv", "sharded_runs", "test_sync_norm")


def run(function: Callable[..., None], *arguments: Any) -> None:
    """Call ``function(rank, *arguments)`` in ``COUNT`` processes with a thread each.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of the one that raised.
    """
    before = os.environ.get("OMP_NUM_THREADS")
    # Also where libraries start threads of their own.
    os.environ["OMP_NUM_THREADS"] = "1"
    multiprocessing.set_forkserver_preload(list(PRELOADED))
    try:
        mp.start_processes(function, arguments, COUNT, start_method="forkserver")
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
