"""Predictions as records of bench/results and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.machine.gpus import DRAM_LATENCIES, DRAM_LATENCY, GPUS
from bench.machine.network_tables import network_tables
from bench.records import Record

KIND, NETWORK_KIND = "machine", "machine_network"

#: The passes in order of a training step, and the one between layers.
PASSES = ("pixel_sumsq", "epilogue", "grad_dot", "grad_input", "affine_relu")

LAYOUT_TITLES = {"channels_last": "channels_last", "contiguous": "contiguous (NCHW)"}

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def _of(records: Iterable[Record], **row: str) -> list[Record]:
    return [r for r in records if all(r.row.get(name) == value for name, value in row.items())]


def _share(facts: Mapping[str, Any], latency: int) -> str:
    # JSON's names are text.
    found = facts["bandwidth"].get(str(latency), facts["bandwidth"].get(latency))
    return "-" if found is None else f"{found:.2f}"


def _busiest(facts: Mapping[str, Any]) -> str:
    pipes: Mapping[str, float] = facts["pipes"]
    pipe = max(pipes, key=pipes.__getitem__)
    return f"{pipe} {pipes[pipe]:.0f}"


def _row(name: str, by_dtype: Mapping[str, Record], dtypes: Sequence[str]) -> list[str]:
    facts = [by_dtype[d].facts if d in by_dtype else None for d in dtypes]

    def each(form: Any) -> str:
        return " / ".join("-" if f is None else form(f) for f in facts)

    first = next(f for f in facts if f is not None)
    low, high = DRAM_LATENCIES[0], DRAM_LATENCIES[-1]
    return [
        name,
        each(lambda f: f"{f['instructions']:.0f}"),
        each(lambda f: f"{f['over_slots']:.2f}"),
        _busiest(first),
        each(lambda f: "-" if f["distance"] is None else f"{f['distance']:.0f}"),
        f"{first['in_flight'] / 1024:.1f} of {first['needed'] / 1024:.1f}",
        f"{first['resident']} of {first['launched']}",
        each(lambda f: f"**{_share(f, DRAM_LATENCY)}**"),
        f"{_share(first, low)}, {_share(first, high)}",
        each(lambda f: str(f["binds"])),
    ]


def _gemm_row(record: Record) -> list[str]:
    row, facts = record.row, record.facts
    problem = str(row["function"]).partition(" ")[2]
    return [
        f"{row['gpu']}, {problem}",
        str(row["tile"]),
        str(row["operator"]),
        str(facts["resident"]),
        *(f"{facts[name]:.0f}" for name in ("tensor", "shared", "issue", "l2")),
        f"**{facts['step']:.0f}**",
        f"{facts['teraflops']:.0f}",
        f"{facts['fixed']:.0f}",
        f"{facts['fixed_steps']:.1f}",
    ]


def gemm_table(results: Mapping[str, Sequence[Record]]) -> str:
    """Return a table of predictions of the implicit GEMM's tiles."""
    from bench.readme import grid

    rows = [_gemm_row(r) for r in results.get(KIND, ()) if "tile" in r.row]
    header = [
        *("GPU, problem", "tile", "operator", "blocks", "tensor cores", "shared memory"),
        *(
            "schedulers",
            "L2",
            "cycles of a step",
            "TFLOP/s of the loop",
            "rest of a tile",
            "in steps",
        ),
    ]
    if not rows:
        return ""
    return (
        "**Prediction: implicit GEMM, bfloat16.** Cycles of a step of 32 in depth: the least that "
        "four units need, and what is simulated; then what a tile needs besides its steps.\n\n"
        + grid(header, rows, 3)
    )


def machine_tables(results: Mapping[str, Sequence[Record]]) -> str:
    """Return tables of predictions: per GPU and layout, the dtypes side by side; the GEMM's."""
    from bench.readme import grid

    records = [r for r in results.get(KIND, ()) if "tile" not in r.row]
    parts = []
    for gpu in GPUS:
        for layout, title in LAYOUT_TITLES.items():
            chosen = _of(records, gpu=gpu, layout=layout)
            if not chosen:
                continue
            dtypes = [d for d in SHORT if _of(chosen, dtype=d)]
            kinds = " / ".join(SHORT[d] for d in dtypes)
            rows = []
            for function in PASSES:
                operators = dict.fromkeys(str(r.row["operator"]) for r in chosen)
                for operator in operators:
                    found = _of(chosen, function=function, operator=operator)
                    if found:
                        by_dtype = {str(r.row["dtype"]): r for r in found}
                        rows.append(_row(f"{function}, {operator}", by_dtype, dtypes))
            first = SHORT[dtypes[0]]
            low, high = DRAM_LATENCIES[0], DRAM_LATENCIES[-1]
            header = [
                *("pass, operator", f"instructions per vector, {kinds}", "over slots"),
                *(f"busiest pipe, {first}", "load distance", f"KiB in flight, {first}"),
                *(f"blocks, {first}", f"bandwidth at {DRAM_LATENCY} cycles"),
                *(f"at {low}, {high}, {first}", "binds"),
            ]
            parts += [f"**Prediction: {gpu}, {title}**", grid(header, rows)]
    if gemm := gemm_table(results):
        parts.append(gemm)
    if networks := network_tables(results.get(NETWORK_KIND, ())):
        parts.append(networks)
    if parts:
        parts.insert(
            0,
            "Predicted from executed machine code, not measured: no GPU was run. A vector is 16 "
            "bytes in each lane of a warp; bandwidth is the share of what copies reach; "
            "[machine code](machine.md) explains the columns.",
        )
    return "\n\n".join(parts)
