#!/usr/bin/env bash
# PyTorch 2.14.1: what becomes of a hook on a parameter, and of a write to it, under fully_shard.
#
# Guess: module.weight is the parameter that the optimiser trains, so a gradient hook that is
# registered on it runs in every backward, and what is written to it in place stays.
# Seen: hooks registered before or after fully_shard never run and nothing warns: the gradient of
# the gathered parameter is reduced and put into .grad from outside of autograd (2 where a factor of
# 100 makes 200 without sharding). After a forward without gradients the root's parameters stay
# gathered: module.weight is a plain tensor then, and what is written to it is gone with the next
# reshard; before any forward, and after a backward, it is a DTensor, and writes stay.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/sharded.py" <<'PYTHON'
import os
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

warnings.simplefilter("error")
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
x = torch.full((1, 1), 2.0)


def gradient(shard: bool, first: bool) -> float:
    linear = nn.Linear(1, 1, bias=False)
    if first:
        linear.weight.register_hook(lambda grad: 100 * grad)
    if shard:
        fully_shard(linear, mesh=mesh)
    if not first:
        linear.weight.register_hook(lambda grad: 100 * grad)
    linear(x).sum().backward()
    grad = linear.weight.grad
    return (grad.full_tensor() if shard else grad).item()


def written(forward: bool) -> str:
    linear = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(linear.weight)
    fully_shard(linear, mesh=mesh)
    if forward:
        with torch.no_grad():
            linear(x)
    kind = type(linear.weight).__name__
    with torch.no_grad():
        linear.weight.fill_(7.0)
    linear.reshard()
    return f"{kind} {linear.weight.full_tensor().item():g}"


print(
    f"gradient {gradient(False, True):g}, sharded {gradient(True, True):g} and "
    f"{gradient(True, False):g}; written 7, left: {written(False)}, after a forward {written(True)}"
)
dist.destroy_process_group()
PYTHON

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy 2> "$folder/log" || {
  echo "not tried: torch 2.14.1 does not install here"; tail -1 "$folder/log"; exit 2; }
seen=$("$folder/venv/bin/python" "$folder/sharded.py" "$folder/rendezvous")
wanted="gradient 200, sharded 2 and 2; written 7, left: DTensor 7, after a forward Parameter 0"
echo "torch 2.14.1: $seen"
[ "$seen" = "$wanted" ] || { echo "changed; it was: $wanted"; exit 1; }
