"""The round trip of flood pings that each library answers.

As in `benchmarks.ping`, the pinger runs on one core and the responders on another. All run during
the whole benchmark, and they take turns of a fraction of a second. A run's sample is the median of
its turns, so a turn in which the machine was busy otherwise does not count.
"""

import contextlib
import statistics
from collections.abc import Iterator, Sequence

from .._harness import FIRST_CORE, LAST_CORE, Row, Table, child, compiled, expect, output_of
from ..ping import Run
from ._contenders import PEERS, Contender
from ._field import configure, running

NAMES = ("C", "aiotun", "aiotun, uvloop", *PEERS, "wireguard-go")
PINGS = 4000  # a run
TURNS = 10
SLOW = {"scapy": 10}  # this many times fewer pings
BEATEN = ("pytun", "pytun-pmd3", "scapy", "add_reader")


def ping(address: str, count: int, into: Run) -> None:
    pinger = str(compiled("pinger.c"))
    with child(pinger, address, str(count), core=FIRST_CORE) as process:
        mean, p99, lost = output_of(process).split()
    into.means.append(int(mean) / 1000)
    into.p99s.append(int(p99) / 1000)
    into.lost += int(lost)


def run(runs: int, contenders: Sequence[Contender]) -> Iterator[Table]:
    compiled("pinger.c")
    with contextlib.ExitStack() as stack:
        targets = {}
        for number, contender in enumerate(contenders):
            device = f"tun{number}"
            stack.enter_context(running(contender, "echo", device, core=LAST_CORE))
            configure(device, f"10.82.{number}.1/24")
            targets[contender.name] = f"10.82.{number}.2"
        results: dict[str, list[Run]] = {name: [] for name in targets}
        for number in range(runs + 1):  # the first one warms up
            turns = {name: Run() for name in targets}
            for name in list(targets) * TURNS:
                ping(targets[name], PINGS // TURNS // SLOW.get(name, 1), turns[name])
            if number:
                for name, result in turns.items():
                    results[name].append(result)
    for name, found in results.items():
        expect(f"pings that {name} lost", sum(each.lost for each in found), 0)
    means = {
        name: [statistics.median(each.means) for each in found] for name, found in results.items()
    }
    p99s = {
        name: [statistics.median(each.p99s) for each in found] for name, found in results.items()
    }
    yield Table("echo", "all", f"{PINGS} flood pings, one at a time: mean", _rows(means, True))
    yield Table("echo", "all", f"{PINGS} flood pings: 99th percentile", _rows(p99s, False))


def _rows(samples: dict[str, list[float]], targets: bool) -> list[Row]:
    c = samples.get("C")
    rows = [Row(name, "us", values, None if values is c else c) for name, values in samples.items()]
    if targets:
        rows += [
            Row(f"{ours} / {peer}", "us", samples[ours], samples[peer], target=1.0)
            for ours in ("aiotun", "aiotun, uvloop")
            for peer in BEATEN
            if ours in samples and peer in samples
        ]
    return rows
