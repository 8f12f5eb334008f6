"""Run the model from the command line: see `--help`."""

import argparse
import sys
import tempfile

from aiotun.testing import isolated_run

from .session import work
from .steps import KINDS, MODES


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.model", description=(__doc__ or "").split("\n")[0],
        epilog=f"modes: {' '.join(MODES)}; kinds of steps: {' '.join(KINDS)}",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, help="the first case's seed; the next ones count on")
    parser.add_argument("--cases", type=int, help="so many cases; 1 where a seed is given")
    parser.add_argument("--seconds", type=float, help="as many as fit into so many seconds")
    parser.add_argument("--minutes", type=float, help="the same in minutes")
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), help="this one alone")
    parser.add_argument("--mode", choices=MODES, nargs="+", help="these alone")
    parser.add_argument("--queues", type=int, choices=(1, 2, 3))
    parser.add_argument("--only", choices=KINDS, nargs="+", default=[], metavar="KIND",
                        help="only these kinds of steps")  # fmt: skip
    parser.add_argument("--without", choices=KINDS, nargs="+", default=[], metavar="KIND",
                        help="none of these kinds of steps")  # fmt: skip
    parser.add_argument("--ignore", nargs="+", default=[], metavar="FAULT",
                        help="go on after faults of these kinds (the first word)")  # fmt: skip
    parser.add_argument("--patience", type=float, default=2.0, metavar="SECONDS",
                        help="how long a task may wait that has to be woken")  # fmt: skip
    parser.add_argument("--shrink", action="store_true", help="make what fails as short as it gets")
    parser.add_argument("--keep-going", action="store_true", help="count the faults, by kind")
    parser.add_argument("--show", action="store_true", help="print the case of the seed first")
    parser.add_argument("--steps", metavar="FILE",
                        help="a case as printed, instead of a seed's; '-' is stdin")  # fmt: skip
    return parser.parse_args(words)


def main() -> int:
    options = parse()
    if options.steps == "-":
        with tempfile.NamedTemporaryFile("w", delete=False) as copy:
            copy.write(sys.stdin.read())
        options.steps = copy.name
    with tempfile.NamedTemporaryFile("r") as journal:
        try:
            return isolated_run(work, options, journal.name)
        except RuntimeError as error:
            print(f"{error}; the case that was running:\n{journal.read()}", file=sys.stderr)
            return 3
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    sys.exit(main())
