"""Says which tests a newer list of ids has lost, and which are new, after files and names moved.

    python -m pytest --collect-only -q > before.txt     (of the older tree)
    python -m pytest --collect-only -q > after.txt      (of the newer one, on the same machine)
    python tests/support/compare_ids.py before.txt after.txt

``renamed_tests.txt`` says what moved, a line each, by the older name and the newer one:

    tests/test_old.py tests/folder/test_new.py                  a file
    package/old.py package/folder/new.py                        a module, whose examples are tests
    tests/test_old.py::test_f tests/folder/test_new.py::test_g  a function or the example of one
    param old new                                               a part of parameters' ids
    old id<tab>new id                                           one test, where its id has blanks

An id goes on as the one that has its name; where there is none, as the one whose parameters the
``param`` lines name. Every newer id stands for one older id at most. The exit status is 1 if a test
is lost.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("renamed_tests.txt")


class Renamed(NamedTuple):
    """What has which name now: files and functions, parts of parameters' ids, whole ids."""

    names: dict[str, str]
    parameters: dict[str, str]
    ids: dict[str, str]


def read_table(lines: Iterable[str]) -> Renamed:
    """Read the lines of ``renamed_tests.txt``."""
    found = Renamed({}, {}, {})
    for line in lines:
        text = line.rstrip("\n")
        if not text.strip() or text.startswith("#"):
            continue
        if "\t" in text:
            old, new = text.split("\t")
            found.ids[old] = new
        elif text.startswith("param "):
            _, old, new = text.split(" ", 2)
            found.parameters[old] = new
        else:
            old, new = text.split(" ")
            found.names[old] = new
    return found


def ids_of(lines: Iterable[str]) -> list[str]:
    """Return the ids among the lines that pytest printed."""
    return [line.rstrip("\n") for line in lines if re.match(r"[\w./-]+\.py::", line)]


def split(test: str) -> tuple[str, str, str]:
    """Return file, function and parameters of an id, each with what stands before it."""
    file, function = test.split("::", 1)
    name, bracket, parameters = function.partition("[")
    return file, f"::{name}", bracket + parameters


def module_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def names_of(test: str, renamed: Renamed) -> Iterator[str]:
    """Yield what an id may be now, the likeliest first."""
    if test in renamed.ids:
        yield renamed.ids[test]
        return
    file, function, parameters = split(test)
    whole = renamed.names.get(file + function)
    if whole is None:
        new = renamed.names.get(file, file)
        # The examples of a module are called by its name.
        prefix = f"::{module_of(file)}"
        if function == prefix or function.startswith(f"{prefix}."):
            function = f"::{module_of(new)}{function.removeprefix(prefix)}"
        whole = new + function
    yield whole + parameters
    parts = re.split(r"([-\[\], ])", parameters)
    yield whole + "".join(renamed.parameters.get(part, part) for part in parts)


def compare(
    before: Iterable[str], after: Iterable[str], renamed: Renamed
) -> tuple[list[str], list[str]]:
    """Return the ids that are lost and the ids that are new."""
    left, waiting = Counter(after), list(before)
    for rank in range(2):
        still = []
        for test in waiting:
            names = list(names_of(test, renamed))
            name = names[min(rank, len(names) - 1)]
            if left[name]:
                left[name] -= 1
            else:
                still.append(test)
        waiting = still
    return waiting, sorted(left.elements())


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", type=Path, help="what pytest --collect-only -q printed before")
    parser.add_argument("after", type=Path, help="what it printed after")
    parser.add_argument("--table", type=Path, default=TABLE, help="what has which name now")
    options = parser.parse_args(arguments)
    before, after = (
        ids_of(path.read_text(encoding="utf-8").splitlines())
        for path in (options.before, options.after)
    )
    renamed = read_table(options.table.read_text(encoding="utf-8").splitlines())
    lost, new = compare(before, after, renamed)
    for word, tests in (("lost", lost), ("new", new)):
        for test in tests:
            print(word, test)
    print(f"{len(before)} before, {len(after)} after: {len(lost)} lost, {len(new)} new")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
