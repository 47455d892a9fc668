#!/usr/bin/env bash
# thop 0.1.1.post2209072238 with PyTorch 2.14.1: a profile that changes the network.
#
# Guess: counting operations leaves a network as it was.
# Seen: thop.profile adds buffers total_ops and total_params to every leaf module and removes them
# from those alone for which it has a formula. nn.GELU, nn.Tanh, nn.GroupNorm and every module of
# one's own keep them: the state dict has four keys more here, and a strict load of it into a fresh
# network of the same kind fails. The parameters of such modules (16 of 240) are not counted.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/profiled.py" <<'PYTHON'
import thop
import torch
from torch import nn


def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.GELU())


model = network()
before = set(model.state_dict())
_, counted = thop.profile(model, (torch.zeros(1, 3, 8, 8),), verbose=False)
left = sorted(set(model.state_dict()) - before)
true = sum(p.numel() for p in model.parameters())
try:
    network().load_state_dict(model.state_dict())
    loads = "loads"
except RuntimeError:
    loads = "does not load"
print(f"left {' '.join(left)}; parameters {counted:g} of {true}; {loads}")
PYTHON

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy setuptools thop==0.1.1.post2209072238 \
  2> "$folder/log" || {
  echo "not tried: torch 2.14.1 or thop does not install here"; tail -1 "$folder/log"; exit 2; }
seen=$("$folder/venv/bin/python" -W ignore "$folder/profiled.py")
wanted="left 1.total_ops 1.total_params 2.total_ops 2.total_params; parameters 224 of 240; does not load"
echo "thop 0.1.1.post2209072238: $seen"
[ "$seen" = "$wanted" ] || { echo "changed; it was: $wanted"; exit 1; }
