"""python -m benchmarks: run the benchmarks and print their figures."""

import argparse
import functools
import importlib
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from aiotun._packets.native import SPEEDUPS

from ._harness import LOOPS, BenchError, Table, has_uvloop
from ._namespace import isolate
from ._results import write

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

Bench = Callable[[int, Sequence[str]], Iterator[Table]]
"""A benchmark: the number of runs and the event loops go in, tables come out."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure aiotun, and compare it with C."
    )
    known = ", ".join(BENCHES + ASKED_FOR)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"one of {known}; or '{BESIDE} [CASE ...]'"
    )
    parser.add_argument(
        "--other", type=Path, metavar="DIR", help=f"the checkout to compare in '{BESIDE}'"
    )
    said = "runs of each side (default: 7; at least 5)"
    parser.add_argument("--runs", type=int, default=7, metavar="N", help=said)
    said = "the event loop to run on (default: both)"
    parser.add_argument("--loop", choices=[*LOOPS, "both"], default="both", help=said)
    said = "write all samples to this file"
    parser.add_argument("--json", type=Path, metavar="FILE", help=said)
    options = parser.parse_intermixed_args(arguments)
    options.cases = []
    if options.names[:1] == [BESIDE]:
        options.names, options.cases = [BESIDE], options.names[1:]
        if options.other is None:
            parser.error(f"'{BESIDE}' needs '--other DIR'")
        options.other = options.other.resolve()
    for name in options.names:
        if name not in (*BENCHES, *ASKED_FOR, BESIDE):
            parser.error(f"unknown benchmark {name!r}; the benchmarks are {known}")
    if options.runs < 5:
        parser.error(f"'--runs' must be at least 5, got {options.runs}")
    return options


def load(name: str, options: argparse.Namespace) -> Bench:
    module = importlib.import_module(f"benchmarks.{'imports' if name == 'import' else name}")
    if name == BESIDE:
        return functools.partial(module.run, other=options.other, names=options.cases)
    bench: Bench = module.run
    return bench


def machine() -> dict[str, str]:
    """Describe the machine and the versions."""
    about = {
        "machine": f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }
    for package in ("aiotun", "pyroute2", "dpkt", "uvloop"):
        try:
            about[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            about[package] = "not installed"
    about["C module"] = "in use" if SPEEDUPS else "not in use"
    compiler = [*os.environ.get("CC", "cc").split(), "--version"]
    try:
        done = subprocess.run(compiler, capture_output=True, text=True, check=False)
        about["compiler"] = (done.stdout.splitlines() or ["unknown"])[0]
    except OSError:
        about["compiler"] = "none"
    about["load"] = f"{os.getloadavg()[0]:.2f} (a busy machine widens the spread)"
    return about


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "cpu model"):
            return value.strip()
    return "unknown processor"


def measure(options: argparse.Namespace, loops: Sequence[str]) -> tuple[list[Table], bool]:
    """Run the benchmarks and print each table when it is ready; return whether all worked."""
    tables: list[Table] = []
    worked = True
    for name in options.names or BENCHES:
        try:
            for table in load(name, options)(options.runs, loops):
                print(f"\n{table}", flush=True)
                tables.append(table)
        except (BenchError, OSError) as error:
            print(f"\n{name} failed: {type(error).__name__}: {error}", file=sys.stderr)
            worked = False
    return tables, worked


def summary(tables: Sequence[Table]) -> str:
    verdicts = [row.reached for table in tables for row in table.rows if row.target is not None]
    return f"{sum(map(bool, verdicts))} of {len(verdicts)} targets reached"


def terminate(number: int, frame: object) -> None:
    """Handle SIGTERM like Ctrl-C, so that the event loop unwinds and ends the children."""
    signal.raise_signal(signal.SIGINT)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    isolate(arguments)
    signal.signal(signal.SIGTERM, terminate)
    loops = [name for name in LOOPS if options.loop in (name, "both")]
    about = machine()
    for key, value in about.items():
        print(f"{key:<10}{value}")
    if "uvloop" in loops and not has_uvloop():
        print("\nuvloop is not installed; its runs are skipped")
        loops.remove("uvloop")
    tables, worked = measure(options, loops)
    print(f"\n{summary(tables)}")
    if options.json is not None:
        result: dict[str, Any] = {"about": about, "tables": [t.as_json() for t in tables]}
        write(options.json, result)
    return 0 if worked else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
