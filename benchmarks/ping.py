"""Flood pings, one at a time, answered by examples/ping_responder.py and by responder.c.

Each responder has its own device and runs during the whole benchmark; it sleeps while another is
pinged. The pinger runs on one core and the responders on another. So each answer costs what it
costs in real use: waking the responder, answering, waking the pinger.

The turns of a run take a fraction of a second, so that longer disturbances affect all responders
equally.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from functools import partial

from ._harness import (
    FIRST_CORE,
    HERE,
    LAST_CORE,
    Row,
    Table,
    child,
    columns,
    compiled,
    expect,
    in_turn,
    output_of,
    wait_ready,
)

PINGS = 4000  # a turn
TURNS = 5  # a run
EXAMPLE = HERE.parent / "examples" / "ping_responder.py"
NETS = {"C": "10.78.0", "asyncio": "10.78.1", "uvloop": "10.78.2"}


def responder(who: str) -> list[str]:
    """Return the command that answers for NETS[who] + ".2" on the device bench-WHO."""
    name, own = f"bench-{who}", f"{NETS[who]}.1"
    if who == "C":
        return [str(compiled("responder.c")), name, own, "255.255.255.0"]
    command = [sys.executable, str(EXAMPLE), "--name", name, "--address", f"{own}/24"]
    return [*command, "--uvloop"] if who == "uvloop" else command


def ping(address: str, count: int, core: int = FIRST_CORE) -> tuple[float, float, int]:
    """Ping so many times; return the mean and the 99th percentile in microseconds, and the lost."""
    pinger = str(compiled("pinger.c"))
    with child(pinger, address, str(count), core=core) as process:
        mean, p99, lost = output_of(process).split()
    return int(mean) / 1000, int(p99) / 1000, int(lost)


def run(runs: int, loops: Sequence[str]) -> Iterator[Table]:
    names = ("C", *loops)
    compiled("pinger.c")
    with contextlib.ExitStack() as stack:
        for who in names:
            wait_ready(stack.enter_context(child(*responder(who), core=LAST_CORE)))
        cases = {who: partial(ping, f"{NETS[who]}.2", PINGS) for who in names}
        means, p99s, lost = columns(in_turn(cases, runs * TURNS))
    expect("pings that C lost", sum(lost["C"]), 0)
    for loop in loops:
        name = "ping_responder.py"
        rows = [
            Row("C: mean", "us", means["C"]),
            Row(f"{name}: mean", "us", means[loop], means["C"], target=1.35),
            Row("C: p99", "us", p99s["C"]),
            Row(f"{name}: p99", "us", p99s[loop], p99s["C"]),
            Row(f"{name}: lost", "pings", lost[loop], percentile=100, target=0),
        ]
        yield Table("ping", loop, f"{PINGS} flood pings, one at a time, {TURNS} times a run", rows)
