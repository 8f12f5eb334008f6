"""python -m benchmarks.netstack: compares aiotun's netstack with other TCP/IP stacks."""

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..__main__ import machine, summary
from .._harness import BenchError, Table
from .._namespace import inside, isolate
from ..peers.__main__ import Part, keep
from ._contenders import CONTENDERS, present
from ._install import install, installed

PARTS = ("streams", "datagrams", "opening")
PEERS = tuple(dict.fromkeys(each.peer for each in CONTENDERS.values()))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.netstack",
        description="Compare aiotun's netstack with other TCP/IP stacks.",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)}")
    parser.add_argument("--runs", type=int, default=7, metavar="N", help="default: 7")
    said = f"compare with only these, of {', '.join(PEERS)}"
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
    if options.runs < 1:
        parser.error(f"'--runs' must be at least 1, got {options.runs}")
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    if not inside():  # inside there is no network to download from
        print("downloading and building the stacks (minutes, the first time)", flush=True)
        install()
    isolate(arguments, "benchmarks.netstack")
    stacks = {k: v for k, v in installed().items() if k in ("aiotun", *options.only)}
    about = machine()
    for name, each in stacks.items():
        about[name] = f"skipped: {each.missing}" if each.missing else each.version
    for key, value in about.items():
        print(f"{key:<14}{value}")
    tables: list[Table] = []
    worked = True
    for name in options.parts or PARTS:
        part: Part = importlib.import_module(f"benchmarks.netstack.{name}").run
        start = time.monotonic()
        found: list[Table] = []
        try:
            for table in part(options.runs, present(stacks)):
                print(f"\n{table}", flush=True)
                found.append(table)
            if options.json is not None:
                keep(options.json, about, f"netstack {name}", found)
        except (BenchError, OSError) as error:
            print(f"\n{name} failed: {type(error).__name__}: {error}", file=sys.stderr)
            worked = False
        tables += found
        print(f"({name} took {time.monotonic() - start:.0f} s)", flush=True)
    print(f"\n{summary(tables)}")
    return 0 if worked else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
