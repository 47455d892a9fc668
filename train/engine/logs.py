"""The log of a run: one line of JSON per record, and the same as TensorBoard scalars.

Records are ``{"kind": "train" | "evaluate", "step": steps done, name: number, ...}``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dcconv.operator.checks import value_error
from train.engine.files import MOST_LOG, ContentError, open_file, parse_json, read_lines
from train.engine.folder import METRICS, TENSORBOARD, json_line, write_file

TRAIN = "train"
EVALUATE = "evaluate"


def require_log(path: Path) -> None:
    """Require a log to be a file that can be read, or not to be there yet.

    Raises:
        ValueError: it is something else.
    """
    try:
        open_file(path, MOST_LOG).close()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> ValueError:
    return value_error("run", f"have a readable {METRICS}", f"'{path}' ({error.strerror})")


def read_metrics(path: Path, warn: Callable[[str], None]) -> list[dict[str, Any]]:
    """Return the records of a log in order; ``warn`` is told of every line that is none.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        lines = list(read_lines(path))
    except OSError as error:
        raise _unreadable(path, error) from error
    records = []
    for number, line in lines:
        try:
            record = parse_json(line)
        except ContentError:
            record = None
        if not _is_record(record):
            got = repr(line[:40].decode(errors="replace"))
            warn(str(value_error(f"{path}:{number}", "be a record of the log", got)))
            continue
        records.append(record)
    return records


def _is_record(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("kind"), str)
        and isinstance(value.get("step"), int)
        and value["step"] >= 0
        and all(_is_figure(item) for name, item in value.items() if name != "kind")
    )


def _is_figure(value: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        # Beyond that a whole number is no float any more.
        return abs(value) < 2**63
    return value is None or isinstance(value, float)


class RunLog:
    """Appends to the log of a run; what an interrupted run wrote after its checkpoint goes first.

    Args:
        folder: of the run.
        step: of the checkpoint that the run starts from; later records are dropped.
        warn: receives one sentence per damaged line, which is dropped too.
    """

    def __init__(self, folder: Path, step: int, warn: Callable[[str], None]) -> None:
        path = folder / METRICS
        if path.exists():
            kept = [record for record in read_metrics(path, warn) if record["step"] <= step]
            write_file(path, "".join(map(json_line, kept)).encode())
        purge = step + 1 if step else None
        self._events = SummaryWriter(str(folder / TENSORBOARD), purge_step=purge)
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Write one record."""
        self._file.write(json_line({"kind": kind, "step": step, **values}))
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(f"{kind}/{name}", value, step)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Write the distribution of values, for TensorBoard."""
        self._events.add_histogram(name, values, step)

    def close(self) -> None:
        """Write what is left and close the files."""
        try:
            self._file.close()
        finally:
            self._events.close()
