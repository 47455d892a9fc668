"""``python -m bench SUBCOMMAND``: measurements of dcconv, beside what users have without it."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from bench.options import INTERRUPTED
from train.engine.terminal import SpellingConsole, prepare

COMMANDS = (
    *("ops", "networks", "functions", "scaling", "calls", "engine"),
    *("report", "compare", "keep", "machine"),
)

REFUSED = 2

# The tables of all providers need this many columns. Where there are fewer, lines wrap: rich would
# shorten numbers.
WIDTH = 190


def parser() -> argparse.ArgumentParser:
    """Return the command line of all sub-commands."""
    own = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = own.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"bench.{name}")
        text = module.__doc__ or ""
        sub = commands.add_parser(
            name,
            help=text.partition("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return own


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command and return the exit status: 0, 1 wrong or regressed, 2 refused."""
    prepare()
    options = parser().parse_args(arguments)
    console = SpellingConsole(markup=False)
    if not console.is_terminal or console.width < WIDTH:
        console = SpellingConsole(markup=False, width=WIDTH, soft_wrap=console.is_terminal)
    try:
        status: int = options.run(options, console)
    except (ValueError, TypeError, OSError) as error:
        # Anything else is a fault of this tool, and wants its traceback.
        if not (isinstance(error, OSError) or str(error).startswith("dcconv: ")):
            raise
        print(error, file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED
    return status


if __name__ == "__main__":
    sys.exit(main())
