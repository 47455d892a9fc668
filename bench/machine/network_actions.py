"""The actions of the command that put predictions together to networks."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from bench.environment import environment
from bench.layers import NETWORKS
from bench.layers import Layer as Shape
from bench.machine.capture import Emulator
from bench.machine.gpus import gpu_named
from bench.machine.layers import OPERATORS
from bench.machine.library import Library, built
from bench.machine.network import LayerTimes, network_times, totals
from bench.machine.network_tables import WAYS
from bench.machine.rates import Rates
from bench.machine.rule import CLEAR, Row, Verdict, rows, verdicts
from bench.machine.tables import NETWORK_KIND
from bench.options import names
from bench.records import Record, append
from dcconv.operator.checks import choice, integer, value_error

#: A layer, how often its network has it, and its times.
Found = tuple[Shape, int, LayerTimes]

#: Dtypes that have both strategies' figures.
NETWORK_DTYPES = ("bfloat16", "float16", "float32")


def network(options: argparse.Namespace, console: Console) -> int:
    """Predict networks layer by layer and in total; append rows to a file if one is named."""
    integer("batch", options.batch, 1)
    choice("dtype", options.dtype, NETWORK_DTYPES)
    choice("operator", options.operator, OPERATORS)
    chosen = names(options.network)
    for name in chosen:
        choice("network", name, NETWORKS)
    gpus = {name: gpu_named(name) for name in names(options.gpu)}
    if not gpus or not chosen:
        raise value_error("gpu and network", "be named", "none")
    library, emulator = Library(options.library or built()), Emulator(every=True)
    at = replace(environment(), device="no GPU: predictions", device_type="none")
    operator = OPERATORS[options.operator]
    for gpu_name, gpu in gpus.items():
        rates = Rates(emulator, library, gpu, options.dtype, operator)
        for name in chosen:
            found = list(network_times(name, options.batch, rates, options.compiled))
            asked = {
                **{"gpu": gpu_name, "network": name, "batch": options.batch},
                **{"dtype": options.dtype, "operator": options.operator},
            }
            title = ", ".join(str(value) for value in asked.values())
            console.print(_table(title, found))
            for how, said in WAYS.items():
                if how == "compiled" and not options.compiled:
                    continue
                forward, backward = totals(found, how)
                console.print(
                    f"{said}: {1e3 * forward:.2f} + {1e3 * backward:.2f} = "
                    f"{1e3 * (forward + backward):.2f} ms",
                    markup=False,
                    highlight=False,
                )
            if options.output is not None:
                for record in _records(asked, found):
                    append(options.output, record, at)
    return 0


def rule(options: argparse.Namespace, console: Console) -> int:
    """Predict both strategies of every layer; print what the rule should take, and write a table.

    1 if the rule takes a strategy that is clearly slower.
    """
    integer("batch", options.batch, 1)
    gpus = {name: gpu_named(name) for name in names(options.gpus)}
    library, emulator = Library(options.library or built()), Emulator(every=True)
    at = replace(environment(), device="no GPU: predictions", device_type="none")
    asked = {"batch": options.batch, "dtype": "bfloat16", "operator": "default"}
    found: list[Row] = []
    for name, gpu in gpus.items():
        rates = Rates(emulator, library, gpu, "bfloat16", OPERATORS["default"])
        for row in rows(name, options.batch, rates):
            found.append(row)
            if options.output is not None:
                append(options.output, row.record(asked), at)
    made = verdicts(found)
    console.print(_rule_table(found, made))
    return int(any(one.loss > CLEAR for one in made))


def _rule_table(found: list[Row], made: list[Verdict]) -> Table:
    table = Table("layer", "direction", "library / fused, us", "rule", "better", "rule loses")
    for one in made:
        same = [r for r in found if (r.layer, r.direction) == (one.layer, one.direction)]
        times = ", ".join(f"{r.gpu} {1e3 * r.library:.0f} / {1e3 * r.fused:.0f}" for r in same)
        style = "red" if one.loss > CLEAR else None
        cells = (one.layer, one.direction, times, one.rule, one.better, f"{one.loss:.0%}")
        table.add_row(*cells, style=style)
    return table


def _records(asked: dict[str, object], found: list[Found]) -> Iterator[Record]:
    for shape, count, times in found:
        row = {**asked, "layer": shape.name, "count": count}
        yield Record(NETWORK_KIND, row, {}, times.row())


def _table(title: str, found: list[Found]) -> Table:
    table = Table(
        *("layer", "count", "rule", "library", "fused", "library, dx", "fused, dx"),
        *("rest of backward", "plain", "plain, backward", "torch.compile", "wins"),
        title=f"{title}: predicted microseconds of one layer",
        title_justify="left",
    )
    for shape, count, times in found:
        table.add_row(
            *(shape.name, str(count), f"{times.rule_forward}, {times.rule_input}"),
            *(_us(times.library_forward), _us(times.fused_forward)),
            *(_us(times.library_input), _us(times.fused_input), _us(times.rest)),
            *(_us(times.plain_forward), _us(times.plain_backward)),
            "-" if times.compiled is None else "{}, {}".format(*map(_us, times.compiled)),
            ", ".join(times.best),
        )
    return table


def _us(seconds: float | None) -> str:
    return "-" if not seconds else f"{1e6 * seconds:.0f}"
