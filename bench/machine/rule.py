"""The table behind the package's rule of strategies, from predictions layer by layer.

A row is a layer of a network and a direction on a GPU, with the milliseconds of both strategies.
The rule asks about no GPU: what it should take is what loses least on all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from bench.layers import NETWORKS
from bench.layers import Layer as Shape
from bench.machine.network import chosen, layer_times
from bench.machine.rates import Rates
from bench.records import Record
from dcconv.call.key import FORWARD, INPUT_GRADIENT
from dcconv.call.rule import FUSED, LIBRARY

RULE_KIND = "machine_rule"

#: The least share of time by which the rule should not lose: predictions are not closer.
CLEAR = 0.10


class Row(NamedTuple):
    """What two strategies take for one direction of a layer, in milliseconds."""

    gpu: str
    layer: str
    direction: str
    library: float
    fused: float
    rule: str

    @property
    def loss(self) -> Mapping[str, float]:
        """The share of time that each strategy takes more than the faster one."""
        best = min(self.library, self.fused)
        return {LIBRARY: self.library / best - 1, FUSED: self.fused / best - 1}

    def record(self, asked: Mapping[str, Any]) -> Record:
        """Return the row of a file of results; ``asked`` are its batch, dtype and operator."""
        row = {"gpu": self.gpu, **asked, "layer": self.layer, "direction": self.direction}
        facts = {"library_ms": self.library, "fused_ms": self.fused, "rule": self.rule}
        return Record(RULE_KIND, row, {}, facts)


def layers() -> list[tuple[Shape, bool]]:
    """Return every layer of the networks once, and whether it is the first of one."""
    found: dict[Shape, bool] = {}
    for entries in NETWORKS.values():
        for at, entry in enumerate(entries):
            found.setdefault(entry.layer, at == 0)
    return list(found.items())


def rows(gpu: str, batch: int, rates: Rates) -> Iterable[Row]:
    """Yield the rows of a GPU: all layers and directions that both strategies run."""
    for shape, first in layers():
        sized = shape._replace(n=batch)
        times = layer_times(sized, rates, first, shared=False)
        both = (
            (FORWARD, times.library_forward, times.fused_forward, times.rule_forward),
            (INPUT_GRADIENT, times.library_input, times.fused_input, times.rule_input),
        )
        for direction, library, fused, rule in both:
            if fused is not None:
                yield Row(gpu, sized.name, direction, 1e3 * library, 1e3 * fused, rule)


def read_rows(records: Iterable[Record]) -> list[Row]:
    """Return the rows of a file of results, with what the rule takes by now."""
    shapes = {shape._replace(n=0).name: shape for shape, _ in layers()}
    found = []
    for record in records:
        if record.kind != RULE_KIND:
            continue
        row, facts = record.row, record.facts
        shape = shapes["n0" + row["layer"][row["layer"].index("-") :]]._replace(n=row["batch"])
        rule = dict(zip((FORWARD, INPUT_GRADIENT), chosen(shape, row["dtype"], True), strict=True))
        name, direction = str(row["layer"]), str(row["direction"])
        times = float(facts["library_ms"]), float(facts["fused_ms"])
        found.append(Row(str(row["gpu"]), name, direction, *times, rule[direction]))
    return found


class Verdict(NamedTuple):
    """What the GPUs' rows of a layer and direction say together.

    Attributes:
        layer, direction: which.
        better: the strategy that loses less, in the mean over the GPUs.
        loss: how much more the rule's strategy loses than it; 0 where it is the same.
        rule: what the rule takes.
    """

    layer: str
    direction: str
    better: str
    loss: float
    rule: str


def verdicts(found: Sequence[Row]) -> list[Verdict]:
    """Return a verdict for every layer and direction.

    Example:
        >>> one = Row("H200", "a", "forward", 2.0, 1.0, "library")
        >>> verdicts([one, one._replace(gpu="A100", library=1.0, fused=1.5)])
        [Verdict(layer='a', direction='forward', better='fused', loss=0.25, rule='library')]
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in found:
        groups.setdefault((row.layer, row.direction), []).append(row)
    made = []
    for (layer, direction), same in groups.items():
        losses = {
            name: sum(row.loss[name] for row in same) / len(same) for name in (LIBRARY, FUSED)
        }
        better, rule = min(losses, key=losses.__getitem__), same[0].rule
        made.append(Verdict(layer, direction, better, losses[rule] - losses[better], rule))
    return made
