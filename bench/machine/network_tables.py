"""Predictions of networks as Markdown: layer by layer, and in total."""

from __future__ import annotations

from collections.abc import Sequence

from bench.records import Record

#: Ways to run a network: those of ``LayerTimes.total``, and how they are shown.
WAYS = {
    "plain": "library convolutions alone",
    "compiled": "the formula under torch.compile",
    "library": "strategy library",
    "fused": "strategy fused where it can",
    "rule": "as the rule takes",
    "best": "the faster of both",
}

#: What a table's rows have in common.
ASKED = ("gpu", "network", "batch", "dtype", "operator")


def _sum(records: Sequence[Record], way: str) -> tuple[float, float]:
    pairs = [(int(r.row["count"]), r.facts[f"{way}_ms"]) for r in records]
    return sum(n * pair[0] for n, pair in pairs), sum(n * pair[1] for n, pair in pairs)


def _cells(record: Record) -> list[str]:
    facts, can = record.facts, record.facts["can"]

    def pair(way: str, known: Sequence[bool] = (True, True)) -> str:
        if f"{way}_ms" not in facts:
            return "-"
        return " / ".join(
            f"{1e3 * ms:.0f}" if is_known else "-"
            for ms, is_known in zip(facts[f"{way}_ms"], known, strict=True)
        )

    return [
        str(record.row["layer"]),
        str(record.row["count"]),
        ", ".join(facts["rule"]),
        *(pair("plain"), pair("compiled")),
        pair("library"),
        pair("fused", (can["fused_forward"], can["fused_input"])),
        ", ".join(facts["best"]),
    ]


def network_tables(records: Sequence[Record]) -> str:
    """Return a table of each network's totals, and one of its layers."""
    from bench.readme import grid

    def total(found: list[Record], way: str) -> str:
        if any(f"{way}_ms" not in record.facts for record in found):
            return "-"
        forward, backward = _sum(found, way)
        return f"{forward + backward:.1f} ({forward:.1f} + {backward:.1f})"

    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        key = tuple(str(record.row[name]) for name in ASKED)
        groups.setdefault(key, []).append(record)
    if not groups:
        return ""
    rows = [[", ".join(key), *(total(found, way) for way in WAYS)] for key, found in groups.items()]
    header = ["GPU, network, batch, dtype, operator", *WAYS.values()]
    parts = [
        "**Prediction: networks.** Milliseconds of all convolution layers: both (forward + "
        "backward). The library's convolutions run at assumed rates.\n\n" + grid(header, rows)
    ]
    for key, found in groups.items():
        header = [
            *("layer", "count", "the rule takes", "library convolution alone"),
            "torch.compile",
            *("strategy library", "strategy fused", "faster"),
        ]
        title = f"**Prediction: {', '.join(key)}.** Microseconds of one layer, forward / backward; "
        said = "strategies are those of forward and of the gradient of x."
        parts.append(title + said + "\n\n" + grid(header, [_cells(r) for r in found], 3))
    return "\n\n".join(parts)
