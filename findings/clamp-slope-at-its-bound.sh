#!/usr/bin/env bash
# PyTorch 2.13.0 and 2.14.1: the derivative of clamp where x equals the bound.
#
# Guess: a clamp passes the gradient of values that it leaves as they are, so the slope at the bound
# is 1, as it was for years, and clamp(x, min=0), maximum(x, 0) and relu differ in nothing.
# Seen: 2.13.0 gives 1 for clamp and fmax, 0.5 for maximum, 0 for relu. 2.14.1 gives 0 for clamp with
# a number as bound, 0.5 with a tensor as bound, 0.5 for fmax. Values do not change, so nothing warns;
# first derivatives of sqrt(clamp(s, min=0) + eps) at an exact zero, and second derivatives through
# s = x^2 there, change by their whole size (Hessian 1 / sqrt(eps) or 0).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/slopes.py" <<'PYTHON'
import torch

zero = torch.zeros(())
functions = {
    "clamp(min=0)": lambda x: x.clamp(min=0.0),
    "clamp(min=tensor)": lambda x: x.clamp(min=zero),
    "fmax": lambda x: torch.fmax(x, zero),
    "maximum": lambda x: torch.maximum(x, zero),
    "relu": torch.relu,
}
found = []
for name, function in functions.items():
    x = torch.zeros((), requires_grad=True)
    function(x).backward()
    found.append(f"{name} {x.grad.item():g}")
x = torch.zeros((), dtype=torch.float64, requires_grad=True)
norm = torch.sqrt((x * x).clamp(min=0.0) + 1e-4)
(first,) = torch.autograd.grad(norm, x, create_graph=True)
(second,) = torch.autograd.grad(first, x)
print(", ".join(found) + f"; second derivative of the norm {second.item():g}")
PYTHON

check() {
  local version=$1 wanted=$2 seen
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet "torch==$version" numpy 2> "$folder/log" || {
    echo "not tried: torch $version does not install here"; tail -1 "$folder/log"; exit 2; }
  seen=$("$folder/$version/bin/python" "$folder/slopes.py")
  rm -rf "${folder:?}/$version"
  echo "torch $version: $seen"
  [ "$seen" = "$wanted" ] || { echo "changed; it was: $wanted"; exit 1; }
}

check 2.13.0 "clamp(min=0) 1, clamp(min=tensor) 1, fmax 1, maximum 0.5, relu 0; second derivative of the norm 100"
check 2.14.1 "clamp(min=0) 0, clamp(min=tensor) 0.5, fmax 0.5, maximum 0.5, relu 0; second derivative of the norm 0"
