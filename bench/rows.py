"""One measured row, its JSON line, and what a set of rows says about the targets."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

import dcconv
from bench.cases import BATCH, BOTH, FORWARD, LAYERS, OPERATORS, Case
from bench.memory import Kept
from bench.providers import COMPILED, CONV2D, DCCONV, EAGER
from bench.timing import Timing
from dcconv import ops

#: Largest geometric mean of dcconv / F.conv2d, by dtype and pass, over modes fixed and no-rho.
TARGETS = {
    ("float32", FORWARD): 1.25,
    ("float32", BOTH): 1.35,
    ("bfloat16", FORWARD): 2.2,
    ("bfloat16", BOTH): 2.2,
}


#: Threads the targets are stated for.
TARGET_THREADS = 2

#: Longest list of rows in a sentence, and of reasons in a report.
LISTED = 6


@dataclass(frozen=True)
class Environment:
    """Where and when rows were measured.

    Attributes:
        date: start of the run, UTC.
        device: the processor's name.
        cores: processors this process may run on.
        threads: threads PyTorch was given.
        torch: its version.
        torch_instructions: instruction set PyTorch dispatches to.
        dcconv: its version.
        revision: of the repository, with ``+`` where files differ from it; None outside one.
        instructions: instruction set of dcconv's kernels; None without the compiled library.
        load: load average of the last minute when the run began.
    """

    date: str
    device: str
    cores: int
    threads: int
    torch: str
    torch_instructions: str
    dcconv: str
    revision: str | None
    instructions: str | None
    load: float

    @property
    def sentence(self) -> str:
        """One line for a report."""
        ours = self.instructions or "no compiled library"
        revision = f" at {self.revision}" if self.revision else ""
        return (
            f"{self.device}, {self.threads} threads on {self.cores} cores, load "
            f"{self.load:.1f} at the start; PyTorch {self.torch} ({self.torch_instructions}); "
            f"dcconv {self.dcconv}{revision} ({ours}); {self.date}"
        )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _revision() -> str | None:
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def environment() -> Environment:
    """Describe this machine and process."""
    affinity = getattr(os, "sched_getaffinity", None)
    isa = str(torch.ops.dcconv.cpu_isa()) if ops.missing is None else None
    return Environment(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        device=_processor(),
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        torch_instructions=torch.backends.cpu.get_cpu_capability(),
        dcconv=dcconv.__version__,
        revision=_revision(),
        instructions=isa,
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan,
    )


@dataclass
class Result:
    """What was measured of one provider in one row.

    Attributes:
        timing: None where the provider is missing, failed or is wrong.
        note: why there is no timing.
        errors: relative error of y and of the gradients; empty for F.conv2d.
        first_call: seconds of the first call, compilation included.
        kept: what the operator keeps for backward; only in rows with a backward.
        chain: what the operator, BatchNorm and ReLU keep; only in rows with a backward.
    """

    timing: Timing | None = None
    note: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    first_call: float = 0.0
    kept: Kept | None = None
    chain: Kept | None = None


@dataclass
class Row:
    """One case and pass, with the results of every provider.

    Attributes:
        x_bytes, y_bytes: of input and output.
        map_bytes: of the norm map, one float32 per position of y.
    """

    case: Case
    which: str
    x_bytes: int
    y_bytes: int
    map_bytes: int
    environment: Environment
    results: dict[str, Result] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A readable id."""
        return f"{self.case.name} {self.which}"

    def timing(self, provider: str) -> Timing | None:
        """Return a provider's timing, if it has one."""
        result = self.results.get(provider)
        return None if result is None else result.timing

    def ratio(self, provider: str, base: str) -> float | None:
        """Return a provider's median over another's, or None where one of them has none."""
        above, below = self.timing(provider), self.timing(base)
        return None if above is None or below is None else above.median / below.median

    def slower(self, base: str) -> str:
        """Say whether dcconv is slower than another provider.

        Returns:
            ``yes`` where the intervals of the 20th to 80th percentile are disjoint too, ``maybe``
            where only the median is above, ``no`` else, and "" where one has no timing.
        """
        own, other = self.timing(DCCONV), self.timing(base)
        if own is None or other is None:
            return ""
        if own.median <= other.median:
            return "no"
        return "yes" if own.low > other.high else "maybe"

    @property
    def small_bytes(self) -> int:
        """What kept memory may exceed a limit by: a few numbers per filter and scalars.

        BatchNorm keeps two numbers per filter, the module's radius is one more.
        """
        return 8 * self.case.layer.o + 64

    @property
    def kept_within(self) -> bool | None:
        """Whether dcconv keeps at most x, the output and the norm map; None if not measured."""
        result = self.results.get(DCCONV)
        if result is None or result.kept is None:
            return None
        limit = self.x_bytes + self.y_bytes + self.map_bytes + self.small_bytes
        return result.kept.total <= limit

    @property
    def chain_within(self) -> bool | None:
        """Whether dcconv's chain keeps at most F.conv2d's and the norm map; None if unknown."""
        own, base = self.results.get(DCCONV), self.results.get(CONV2D)
        if own is None or own.chain is None or base is None or base.chain is None:
            return None
        return own.chain.total <= base.chain.total + self.map_bytes + self.small_bytes

    def json(self) -> str:
        """Return the row as one line of JSON; numbers that are not finite become null."""
        case = self.case
        record = {
            "layer": dict(case.layer._asdict()),
            "operator": case.operator.name,
            "mode": case.mode,
            "dtype": case.dtype,
            "pass": self.which,
            "x_bytes": self.x_bytes,
            "y_bytes": self.y_bytes,
            "map_bytes": self.map_bytes,
            "results": {name: dataclasses.asdict(r) for name, r in self.results.items()},
            "environment": dataclasses.asdict(self.environment),
        }
        return json.dumps(_finite(record), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return value


def geometric_mean(values: Sequence[float]) -> float | None:
    """Return the geometric mean, or None of nothing.

    Example:
        >>> geometric_mean([1.0, 4.0])
        2.0
    """
    if not values:
        return None
    return math.exp(sum(math.log(value) for value in values) / len(values))


class Mean(NamedTuple):
    """Geometric means of one dtype, pass and group of modes.

    Attributes:
        group: ``fixed, no-rho`` (what the targets are about) or ``batch``.
        rows: number of rows with times of dcconv and F.conv2d.
        complete: whether these are all rows the group has, on the threads of the targets.
        over_conv2d: by provider, its mean time over F.conv2d.
        over_eager, over_compiled: dcconv over these.
        target: largest ``over_conv2d["dcconv"]`` wanted; None for ``batch``.
    """

    dtype: str
    which: str
    group: str
    rows: int
    complete: bool
    over_conv2d: dict[str, float | None]
    over_eager: float | None
    over_compiled: float | None
    target: float | None

    @property
    def verdict(self) -> str:
        """Whether the target is reached, judged on complete groups only."""
        own = self.over_conv2d.get(DCCONV)
        if self.target is None:
            return ""
        if own is None:
            return "not measured"
        if not self.complete:
            return "not judged: partial"
        return "reached" if own <= self.target else "not reached"


def means(rows: Sequence[Row]) -> list[Mean]:
    """Return the geometric means of every dtype, pass and group of modes among the rows."""
    found = []
    batch_rows = len(LAYERS) * sum(BATCH in operator.modes for operator in OPERATORS.values())
    judged_rows = len(LAYERS) * len(OPERATORS)
    keys = dict.fromkeys((row.case.dtype, row.which) for row in rows)
    for dtype, which in keys:
        for group in ("fixed, no-rho", BATCH):
            chosen = [
                row
                for row in rows
                if (row.case.dtype, row.which) == (dtype, which)
                and (row.case.mode == BATCH) == (group == BATCH)
            ]
            if not chosen:
                continue

            def mean(provider: str, base: str, chosen: list[Row] = chosen) -> float | None:
                ratios = (row.ratio(provider, base) for row in chosen)
                return geometric_mean([ratio for ratio in ratios if ratio is not None])

            counted = sum(row.ratio(DCCONV, CONV2D) is not None for row in chosen)
            providers = dict.fromkeys(name for row in chosen for name in row.results)
            found.append(
                Mean(
                    dtype=dtype,
                    which=which,
                    group=group,
                    rows=counted,
                    complete=counted == (batch_rows if group == BATCH else judged_rows)
                    and all(row.environment.threads == TARGET_THREADS for row in chosen),
                    over_conv2d={n: mean(n, CONV2D) for n in providers if n != CONV2D},
                    over_eager=mean(DCCONV, EAGER),
                    over_compiled=mean(DCCONV, COMPILED),
                    target=None if group == BATCH else TARGETS.get((dtype, which)),
                )
            )
    return found


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Return one sentence per requirement, with the rows that miss it."""
    lines = []
    for base, title in ((EAGER, "the eager reference"), (COMPILED, "the compiled formula")):
        states = {row.name: row.slower(base) for row in rows}
        compared = sum(state != "" for state in states.values())
        if not compared:
            lines.append(f"Slower than {title}: not measured.")
            continue
        clearly = [name for name, state in states.items() if state == "yes"]
        maybe = [name for name, state in states.items() if state == "maybe"]
        lines.append(
            f"Slower than {title}: {len(clearly)} of {compared} rows{_listed(clearly)}; "
            f"slower by median but within the spread: {len(maybe)}{_listed(maybe)}."
        )
    for title, attribute in (
        ("Kept for backward above x + output + norm map", "kept_within"),
        ("Chain with BatchNorm and ReLU keeps more than F.conv2d's + norm map", "chain_within"),
    ):
        checked = {row.case.name: getattr(row, attribute) for row in rows}
        known = {name: within for name, within in checked.items() if within is not None}
        if not known:
            lines.append(f"{title}: not measured.")
            continue
        above = [name for name, within in known.items() if not within]
        lines.append(f"{title}: {len(above)} of {len(known)} cases{_listed(above)}.")
    return lines


def _listed(names: Sequence[str]) -> str:
    """Name the first few; the tables mark them all."""
    text = "; ".join(names[:LISTED])
    more = f"; {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f" ({text}{more})" if text else ""
