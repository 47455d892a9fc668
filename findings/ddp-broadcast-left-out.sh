#!/usr/bin/env bash
# PyTorch 2.14.1: when DistributedDataParallel leaves out its broadcast of buffers.
#
# Guess: broadcast_buffers=True, the default, copies rank 0's buffers (the running statistics of
# BatchNorm) to the others before every forward in training mode.
# Seen: it is left out before a forward whose predecessor ran without gradients or under no_sync,
# whatever this one is. With gradient accumulation, or forwards in training mode under no_grad to
# refresh statistics, the ranks' statistics part without a word; one later forward with gradients
# does not bring them together yet, only the one after it does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/broadcast.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def work(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    norm = nn.BatchNorm1d(1, momentum=0.5)
    model = DistributedDataParallel(norm)
    at_start = []
    # Which rank 1 has before the forward of the layer itself, after what the wrapper copies.
    norm.register_forward_pre_hook(lambda *_: at_start.append(norm.running_mean.item()))
    x = torch.tensor([[8.0], [8.0]]) * rank

    def with_gradients() -> None:
        model(x).sum().backward()

    def under_no_sync() -> None:
        with model.no_sync():
            model(x).sum().backward()

    def without_gradients() -> None:
        with torch.no_grad():
            model(x)

    found = []
    for between in (with_gradients, under_no_sync, without_gradients):
        for _ in range(2):
            with_gradients()
        at_start.clear()
        for _ in range(3):
            between()
        for _ in range(2):
            with_gradients()
        found.append(" ".join(f"{value:g}" for value in at_start))
    if rank == 1:
        print("; ".join(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, args=(sys.argv[1],), nprocs=2)
PYTHON

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy 2> "$folder/log" || {
  echo "not tried: torch 2.14.1 does not install here"; tail -1 "$folder/log"; exit 2; }
seen=$("$folder/venv/bin/python" "$folder/broadcast.py" "$folder/rendezvous" 2> /dev/null)
# Rank 0 has 0 throughout, so rank 1 has 0 wherever the buffers were copied.
wanted="0 0 0 0 0; 0 4 6 7 0; 0 4 6 7 0"
echo "torch 2.14.1, running means of rank 1: $seen"
[ "$seen" = "$wanted" ] || { echo "changed; it was: $wanted"; exit 1; }
