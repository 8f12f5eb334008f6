"""What the commands `benchmarks`, `benchmarks.peers` and `benchmarks.netstack` share."""

import argparse
import functools
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from aiotun._packets.native import SPEEDUPS

from . import _building
from ._contenders import Contender, present
from ._harness import BenchError, Table
from ._namespace import inside, isolate
from ._results import write

Part = Callable[[], Iterator[Table]]
"""A part of a benchmark, which yields tables."""


def parser(module: str, description: str, names: str, runs: int) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    made.add_argument("names", nargs="*", metavar="NAME", help=names)
    said = f"runs of each side (default: {runs})"
    made.add_argument("--runs", type=int, default=runs, metavar="N", help=said)
    said = "write all samples to this file, and keep its other parts"
    made.add_argument("--json", type=Path, metavar="FILE", help=said)
    return made


def check(
    made: argparse.ArgumentParser, options: argparse.Namespace, known: Sequence[str], least: int
) -> None:
    """Refuse unknown names, and fewer runs than `least`."""
    for name in options.names:
        if name not in known:
            made.error(f"unknown part {name!r}; the parts are {', '.join(known)}")
    if options.runs < least:
        made.error(f"'--runs' must be at least {least}, got {options.runs}")


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


def measure(parts: Mapping[str, Part], about: Mapping[str, str], results: Path | None) -> int:
    """Run the parts, and print each table when it is ready; return the exit status.

    The samples of a part that worked go to the file `results`.
    """
    verdicts: Counter[str] = Counter()
    status = 0
    for key, value in about.items():
        print(f"{key:<14}{value}")
    for name, part in parts.items():
        tables: list[Table] = []
        start = time.monotonic()
        try:
            for table in part():
                print(f"\n{table}", flush=True)
                tables.append(table)
            if results is not None:
                keep(results, about, name, tables)
        except (BenchError, OSError) as error:
            print(f"\n{name} failed: {type(error).__name__}: {error}", file=sys.stderr)
            status = 1
        verdicts.update(row.verdict for table in tables for row in table.rows if row.verdict)
        print(f"({name} took {time.monotonic() - start:.0f} s)", flush=True)
    print(f"\n{verdicts['reached']} of {verdicts.total()} targets reached", end="")
    print(f", {verdicts['not distinguishable']} not distinguishable")
    return status


def keep(path: Path, about: Mapping[str, str], part: str, tables: Sequence[Table]) -> None:
    """Write one part's samples into the file, and keep the file's other parts."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[part] = {"about": about, "tables": [table.as_json() for table in tables]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, kept)


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Call a command's main function with its arguments, and exit."""

    def terminate(number: int, frame: object) -> None:
        """Handle SIGTERM like Ctrl-C, so that the children end, too."""
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGTERM, terminate)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)


@dataclass(frozen=True)
class Suite:
    """A command that compares aiotun with others.

    Each part is a module with `NAMES`, the contenders that take part, and `run`.
    """

    module: str
    description: str
    parts: Sequence[str]
    contenders: Mapping[str, Contender]
    steps: Mapping[str, Callable[[], str]]  # that install the peers
    prefix: str = ""  # of the parts' names in a file of results
    always: Sequence[str] = ("aiotun",)  # the others are compared with these

    @property
    def state(self) -> Path:
        return _building.BUILD / self.module.rpartition(".")[2] / "installed.json"

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        peers = list(self.steps)
        made = parser(self.module, self.description, f"one of {', '.join(self.parts)}", runs=7)
        said = f"compare with only these peers, of {', '.join(peers)}"
        made.add_argument("--only", metavar="PEER,PEER", help=said)
        options = made.parse_args(arguments)
        check(made, options, self.parts, least=1)
        options.only = options.only.split(",") if options.only else peers
        for peer in options.only:
            if peer not in peers:
                made.error(f"unknown peer {peer!r}; the peers are {', '.join(peers)}")
        return options

    def main(self, arguments: Sequence[str]) -> int:
        options = self.parse(arguments)
        if not inside():  # inside there is no network to download from
            print("downloading and building what is missing (minutes, the first time)", flush=True)
            _building.install(self.state, self.steps)
        isolate(arguments, self.module)
        wanted = (*self.always, *options.only)
        peers = {k: v for k, v in _building.installed(self.state).items() if k in wanted}
        about = machine()
        for name, each in peers.items():
            about[name] = f"skipped: {each.missing}" if each.missing else each.version

        def part(name: str) -> Iterator[Table]:
            module = importlib.import_module(f"{self.module}.{name}")
            found = present(self.contenders, module.NAMES, peers)
            tables: Iterator[Table] = module.run(options.runs, found)
            return tables

        parts = {
            f"{self.prefix}{name}": functools.partial(part, name)
            for name in options.names or self.parts
        }
        return measure(parts, about, options.json)
