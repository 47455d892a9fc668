#!/usr/bin/env bash
# PyTorch 2.14.1 (2.13.0 the same), CPU: the order of two factors decides the layout of a product.
#
# Guess: a network in channels_last stays there as long as nothing asks for another layout.
# Seen: a map [n, 1, p, q] divided by numbers per channel [c, 1, 1] is as large as the features, and
# contiguous, since neither operand says anything of an order between channels and pixels. A product
# has the layout of its first factor: map * y leaves channels_last, y * map keeps it. Nothing warns;
# elementwise operations then work on mixed layouts, and the next convolution converts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/layouts.py" <<'PYTHON'
import torch
import torch.nn.functional as F

last = torch.channels_last
x = torch.randn(2, 8, 10, 10).to(memory_format=last)
y = F.conv2d(x, torch.randn(16, 8, 3, 3).to(memory_format=last))
norm = F.avg_pool2d(x.square().sum(dim=1, keepdim=True), 3, 1)
h = torch.tanh(norm / torch.rand(16, 1, 1))
found = {"y": y, "map": h, "map * y": h * y, "y * map": y * h}
print(", ".join(f"{name} {t.is_contiguous(memory_format=last)}" for name, t in found.items()))
PYTHON

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy 2> "$folder/log" || {
  echo "not tried: torch 2.14.1 does not install here"; tail -1 "$folder/log"; exit 2; }
seen=$("$folder/venv/bin/python" "$folder/layouts.py")
wanted="y True, map False, map * y False, y * map True"
echo "torch 2.14.1, channels_last: $seen"
[ "$seen" = "$wanted" ] || { echo "changed; it was: $wanted"; exit 1; }
