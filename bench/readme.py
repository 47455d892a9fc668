"""``python -m bench.readme RESULTS.jsonl``: refresh the README's speed tables from a result file.

The latest row of each kind counts. Text between the markers is replaced, the file atomically.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.report import write
from bench.rows import TARGETS, geometric_mean
from dcconv.checks import value_error

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- bench.operator: begin -->", "<!-- bench.operator: end -->"
Key = tuple[str, str, str, str, str]


def median(row: dict[str, Any], provider: str) -> float | None:
    """Return a provider's median in milliseconds, None where it has none."""
    timing = row["results"].get(provider, {}).get("timing")
    return None if timing is None else float(timing["median"])


def load(path: Path) -> dict[Key, dict[str, Any]]:
    """Return the latest row by dtype, pass, layer, operator and mode."""
    rows = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            layer = "{n}, {c}, {size}, {o}, {k}".format(**row["layer"])
            rows[row["dtype"], row["pass"], layer, row["operator"], row["mode"]] = row
        except (ValueError, KeyError, TypeError) as error:
            print(f"{path}:{number}: not a result row ({error}), skipped", file=sys.stderr)
    return rows


def cell(row: dict[str, Any] | None) -> str:
    """Return time over F.conv2d, and over the compiled formula in parentheses."""
    if row is None:
        return "-"
    ours, floor, compiled = (median(row, p) for p in ("dcconv", "conv2d", "compiled"))
    if ours is None or floor is None:
        return "no time"
    text = f"{ours / floor:.2f}"
    if compiled is None:
        return text
    slower = (
        row["results"]["dcconv"]["timing"]["low"] > row["results"]["compiled"]["timing"]["high"]
    )
    text += f" ({ours / compiled:.2f})"
    return f"**{text}**" if slower else text


def tables(rows: dict[Key, dict[str, Any]]) -> str:
    """Return the Markdown of all tables."""
    columns = list(dict.fromkeys((key[3], key[4]) for key in rows))
    layers = list(dict.fromkeys(key[2] for key in rows))
    parts = []
    for (dtype, which), target in TARGETS.items():
        chosen = {key[2:]: row for key, row in rows.items() if key[:2] == (dtype, which)}
        if not chosen:
            continue
        header = ["layer N, C, H=W, O, k", *(f"{name}, {mode}" for name, mode in columns)]
        lines = [f"**{dtype}, {which}**", "", "| " + " | ".join(header) + " |"]
        lines.append("|---" * len(header) + "|")
        for layer in layers:
            cells = [cell(chosen.get((layer, *column))) for column in columns]
            lines.append("| " + " | ".join([layer, *cells]) + " |")
        for label, batch in (("`fixed`, `no-rho`", False), ("`batch`", True)):
            ratios = [
                ours / floor
                for key, row in chosen.items()
                if (key[2] == "batch") == batch
                and (ours := median(row, "dcconv")) is not None
                and (floor := median(row, "conv2d")) is not None
            ]
            if ratios:
                goal = "" if batch else f" (target: at most {target})"
                mean = geometric_mean(ratios)
                lines += ["", f"Geometric mean over `F.conv2d`, {label}: {mean:.2f}{goal}."]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main() -> None:
    """Replace the text between the markers."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        raise SystemExit(str(value_error("RESULTS", "be a file of result rows", sys.argv[1:])))
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    write(README, f"{before}{BEGIN}\n\n{tables(load(Path(sys.argv[1])))}\n\n{END}{after}")


if __name__ == "__main__":
    main()
