"""The round trip of flood pings that each library answers.

As in `benchmarks.ping`, the pinger runs on one core and the responders on another. All run during
the whole benchmark, and they take turns of a fraction of a second.

lwIP has no packets to give to a program that would answer them: it answers them itself, and it has
Ethernet frames.
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

from .._contenders import Contender
from .._harness import LAST_CORE, Row, Table, columns, compiled, expect, in_turn
from ..ping import ping
from ._contenders import PEERS
from ._field import configure, running

NAMES = ("C", "aiotun", "aiotun, uvloop", *PEERS, "wireguard-go", "smoltcp", "lwIP")
PINGS = 400  # a turn
TURNS = 10  # a run
SLOW = {"scapy": 10}  # this many times fewer pings
BEATEN = ("pytun", "pytun-pmd3", "scapy", "add_reader")


def run(runs: int, contenders: Sequence[Contender]) -> Iterator[Table]:
    compiled("pinger.c")
    with contextlib.ExitStack() as stack:
        cases = {}
        for number, each in enumerate(contenders):
            device = f"tun{number}"
            stack.enter_context(running(each, "echo", device, core=LAST_CORE))
            configure(device, f"10.82.{number}.1/24")
            pings = PINGS // SLOW.get(each.name, 1)
            cases[each.name] = partial(ping, f"10.82.{number}.2", pings)
        means, p99s, lost = columns(in_turn(cases, runs * TURNS))
    for name, found in lost.items():
        expect(f"pings that {name} lost", sum(found), 0)
    yield Table("echo", "all", "flood pings, one at a time: mean", _rows(means, True))
    yield Table("echo", "all", "flood pings: 99th percentile", _rows(p99s, False))


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
