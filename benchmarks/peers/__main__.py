"""python -m benchmarks.peers: compares aiotun with the libraries that a user could use instead."""

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ..__main__ import machine, summary
from .._harness import BenchError, Table
from .._namespace import inside, isolate
from .._results import write
from ._contenders import CONTENDERS, Contender, present
from ._install import Installed, install, installed

PARTS = ("cost", "echo", "forward", "udp", "queues", "opening", "growth")

PEERS = tuple(dict.fromkeys(each.peer for each in CONTENDERS.values()))
ALWAYS = ("aiotun", "C")  # the others are compared with these

Part = Callable[[int, Sequence[Contender]], Iterator[Table]]
"""A part: takes the number of runs and the contenders, and yields tables."""

Done = Callable[[str, Sequence[Table]], None]
"""Called with the tables of a part when it is done."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description="Compare aiotun with the libraries that a user could use instead.",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)}")
    said = "runs of each side (default: 5; at least 5)"
    parser.add_argument("--runs", type=int, default=5, metavar="N", help=said)
    said = f"compare with only these peers, of {', '.join(PEERS)}"
    parser.add_argument("--only", metavar="PEER,PEER", help=said)
    said = "write all samples to this file, and keep its other parts"
    parser.add_argument("--json", type=Path, metavar="FILE", help=said)
    options = parser.parse_args(arguments)
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"unknown part {part!r}; the parts are {', '.join(PARTS)}")
    options.only = options.only.split(",") if options.only else PEERS
    for peer in options.only:
        if peer not in PEERS:
            parser.error(f"unknown peer {peer!r}; the peers are {', '.join(PEERS)}")
    if options.runs < 5:
        parser.error(f"'--runs' must be at least 5, got {options.runs}")
    return options


def measure(
    parts: Sequence[str], runs: int, peers: Mapping[str, Installed], done: Done
) -> tuple[list[Table], bool]:
    """Run the parts and print each table when it is ready; return whether all worked."""
    tables: list[Table] = []
    worked = True
    for name in parts:
        module = importlib.import_module(f"benchmarks.peers.{name}")
        part: Part = module.run
        start = time.monotonic()
        found: list[Table] = []
        try:
            for table in part(runs, present(module.NAMES, peers)):
                print(f"\n{table}", flush=True)
                found.append(table)
            done(name, found)
        except (BenchError, OSError) as error:
            print(f"\n{name} failed: {type(error).__name__}: {error}", file=sys.stderr)
            worked = False
        tables += found
        print(f"({name} took {time.monotonic() - start:.0f} s)", flush=True)
    return tables, worked


def keep(path: Path, about: Mapping[str, str], part: str, tables: Sequence[Table]) -> None:
    """Write one part's samples into the file, and keep the file's other parts."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[part] = {"about": about, "tables": [table.as_json() for table in tables]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, kept)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    if not inside():  # inside there is no network to download from
        print("downloading and building the libraries (minutes, the first time)", flush=True)
        install()
    isolate(arguments, "benchmarks.peers")
    peers = {k: v for k, v in installed().items() if k in (*ALWAYS, *options.only)}
    about = machine()
    for name, each in peers.items():
        about[name] = f"skipped: {each.missing}" if each.missing else each.version
    for key, value in about.items():
        print(f"{key:<14}{value}")

    def done(part: str, tables: Sequence[Table]) -> None:
        if options.json is not None:
            keep(options.json, about, part, tables)

    tables, worked = measure(options.parts or PARTS, options.runs, peers, done)
    print(f"\n{summary(tables)}")
    return 0 if worked else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
