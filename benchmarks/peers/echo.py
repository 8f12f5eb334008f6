"""The round trip of flood pings that each library answers.

As in `benchmarks.ping`, the pinger runs on one core and the responders on another, and then all
run on one core. The responders run during the whole benchmark, and they take turns of a fraction of
a second.

lwIP has no packets to give to a program that would answer them: it answers them itself, and it has
Ethernet frames.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from .._contenders import Contender
from .._harness import FIRST_CORE, LAST_CORE, Row, Table, columns, compiled, expect, in_turn
from ..ping import ping
from ._contenders import PEERS
from ._field import configure, running

NAMES = ("C", "aiotun", "aiotun, uvloop", *PEERS, "wireguard-go", "smoltcp", "lwIP")
# A turn. Each program's first pings take longer, because the others have used the caches meanwhile.
# They are fewer than a hundredth of a turn, so the 99th percentile does not measure them.
PINGS = 2000
TURNS = 4  # a run
SLOW = {"scapy": 10}  # this many times fewer pings
OURS = ("aiotun", "aiotun, uvloop")
# Theirs, and the most that the ratio of the means may be.
BEATEN = {"pytun": 1.0, "pytun-pmd3": 1.0, "scapy": 1.0, "add_reader": 1.0}
BEATEN_ON_ONE_CORE = {"pytun": 1.05}


def run(runs: int, contenders: Sequence[Contender]) -> Iterator[Table]:
    compiled("pinger.c")
    with contextlib.ExitStack() as stack:
        for number, each in enumerate(contenders):
            device = f"tun{number}"
            stack.enter_context(running(each, "echo", device, core=LAST_CORE))
            configure(device, f"10.82.{number}.1/24")
        yield from _tables(runs, contenders, FIRST_CORE, "")
        yield from _tables(runs, contenders, LAST_CORE, ", on one core")


def _tables(runs: int, contenders: Sequence[Contender], core: int, where: str) -> Iterator[Table]:
    """Ping all from this core."""
    cases = {
        each.name: partial(ping, f"10.82.{number}.2", PINGS // SLOW.get(each.name, 1), core)
        for number, each in enumerate(contenders)
    }
    means, p99s, lost = columns(in_turn(cases, runs * TURNS))
    for name, found in lost.items():
        expect(f"pings that {name} lost", sum(found), 0)
    one_core = BEATEN_ON_ONE_CORE if where else {}
    yield Table(
        "echo", "all", f"flood pings, one at a time{where}: mean", _rows(means, one_core or BEATEN)
    )
    yield Table("echo", "all", f"flood pings{where}: 99th percentile", _rows(p99s, one_core))


def _rows(samples: Mapping[str, list[float]], beaten: Mapping[str, float]) -> list[Row]:
    c = samples.get("C")
    return [
        *(Row(name, "us", values, None if values is c else c) for name, values in samples.items()),
        *(
            Row(f"{ours} / {peer}", "us", samples[ours], samples[peer], target=target)
            for ours in OURS
            for peer, target in beaten.items()
            if ours in samples and peer in samples
        ),
    ]
