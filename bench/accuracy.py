"""The accuracy gate: a provider that computes something else is shown with its error, not a time.

truth  = reference(inputs.double())     of the already rounded inputs
peer   = reference(inputs)              same dtype, plain PyTorch
err(t) = max(max abs(t - truth) / max abs(truth), rms(t - truth) / rms(truth))
accept : err(dcconv) <= 2 * min(err(peer), 8 * floor) + floor, for y and every gradient;
         err(baseline) <= 2 * 8 * floor + floor
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from bench.cases import Case, Inputs
from bench.options import BOTH, DTYPES, FORWARD
from bench.providers import ours, run
from dcconv.operator.numerics import ACCURACY_FLOOR, PEER_CAP, PEER_FACTOR


def error(found: Tensor, truth: Tensor) -> float:
    """Return the larger of the relative maximum error and the relative rms error.

    Infinite where ``found`` has a value that is not finite.

    Example:
        >>> import torch
        >>> error(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0], dtype=torch.float64))
        0.25
    """
    if found.shape != truth.shape:
        return math.inf
    difference = found.double() - truth
    if not bool(difference.isfinite().all()):
        return math.inf
    largest = float(truth.abs().max())
    rms = float(truth.square().mean().sqrt())
    if largest == 0.0:
        return 0.0 if float(difference.abs().max()) == 0.0 else math.inf
    return max(
        float(difference.abs().max()) / largest, float(difference.square().mean().sqrt()) / rms
    )


@dataclass(frozen=True)
class Gate:
    """The truth of one case and what it allows, by the names of :func:`bench.providers.run`."""

    truth: dict[str, Tensor]
    allowed: dict[str, float]
    loosest: float

    def errors(self, found: dict[str, Tensor], which: str) -> dict[str, float]:
        """Return the error of y, and of every gradient where the pass has a backward."""
        names = ["y"] if which == FORWARD else list(self.truth)
        return {
            name: error(found[name], self.truth[name]) if name in found else math.inf
            for name in names
        }

    def refusal(self, errors: dict[str, float], *, baseline: bool) -> str | None:
        """Return one sentence naming the errors above what is allowed, or None.

        A baseline only has to compute the same thing: it is allowed what the rule allows at most,
        whatever the peer of this case reaches.
        """
        wrong = []
        for name, value in errors.items():
            allowed = self.loosest if baseline else self.allowed[name]
            if not value <= allowed:
                wrong.append(f"{name} off by {value:.1e}, allowed {allowed:.1e}")
        return "wrong: " + "; ".join(wrong) if wrong else None


def make_gate(case: Case, inputs: Inputs) -> Gate:
    """Evaluate the reference in float64 and in the case's dtype."""
    function = ours("reference")(case)
    truth = run(function, inputs.double(), BOTH)
    peer = run(function, inputs, BOTH)
    floor = ACCURACY_FLOOR[DTYPES[case.dtype]]
    allowed = {
        name: PEER_FACTOR * min(error(peer[name], truth[name]), PEER_CAP * floor) + floor
        for name in truth
    }
    return Gate(truth, allowed, PEER_FACTOR * PEER_CAP * floor + floor)
