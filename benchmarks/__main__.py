"""python -m benchmarks: run the benchmarks and print their figures."""

import argparse
import functools
import importlib
from collections.abc import Sequence
from pathlib import Path

from . import _suite
from ._harness import LOOPS, has_uvloop
from ._namespace import isolate

BENCHES = (
    "recv",
    "send",
    "datagrams",
    "ping",
    "flood",
    "stall",
    "link",
    "parse",
    "offload",
    "threads",
    "import",
)
ASKED_FOR = ("vpn", "tap")  # need other programs, and their time
BESIDE = "beside"  # needs another checkout; the names after it are its cases


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    known = (*BENCHES, *ASKED_FOR)
    names = f"one of {', '.join(known)}; or '{BESIDE} [CASE ...]'"
    said = "Measure aiotun, and compare it with C."
    parser = _suite.parser("benchmarks", said, names, runs=7)
    parser.add_argument(
        "--other", type=Path, metavar="DIR", help=f"the checkout to compare in '{BESIDE}'"
    )
    said = "the event loop to run on (default: both)"
    parser.add_argument("--loop", choices=[*LOOPS, "both"], default="both", help=said)
    options = parser.parse_intermixed_args(arguments)
    options.cases = []
    if options.names[:1] == [BESIDE]:
        options.names, options.cases = [BESIDE], options.names[1:]
        if options.other is None:
            parser.error(f"'{BESIDE}' needs '--other DIR'")
        options.other = options.other.resolve()
    _suite.check(parser, options, (*known, BESIDE), least=5)
    return options


def load(name: str, options: argparse.Namespace, loops: Sequence[str]) -> _suite.Part:
    module = importlib.import_module(f"benchmarks.{'imports' if name == 'import' else name}")
    more = {"other": options.other, "names": options.cases} if name == BESIDE else {}
    return functools.partial(module.run, options.runs, loops, **more)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    isolate(arguments)
    loops = [name for name in LOOPS if options.loop in (name, "both")]
    if "uvloop" in loops and not has_uvloop():
        print("\nuvloop is not installed; its runs are skipped")
        loops.remove("uvloop")
    parts = {name: load(name, options, loops) for name in options.names or BENCHES}
    return _suite.measure(parts, _suite.machine(), options.json)


if __name__ == "__main__":
    _suite.run(main)
