"""Flood pings, one at a time, answered by examples/ping_responder.py and by responder.c.

Each responder has its own device and runs during the whole benchmark; it sleeps while another is
pinged. The pinger runs on one core and the responders on another. So each answer costs what it
costs in real use: waking the responder, answering, waking the pinger.

The turns of a run take a fraction of a second, so that longer disturbances affect all responders
equally.
"""

import contextlib
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ._harness import (
    FIRST_CORE,
    HERE,
    LAST_CORE,
    Row,
    Table,
    child,
    compiled,
    expect,
    output_of,
    wait_ready,
)

PINGS = 20_000  # a run
TURNS = 5
EXAMPLE = HERE.parent / "examples" / "ping_responder.py"
NETS = {"C": "10.78.0", "asyncio": "10.78.1", "uvloop": "10.78.2"}


def responder(who: str) -> list[str]:
    """Return the command that answers for NETS[who] + ".2" on the device bench-WHO."""
    name, own = f"bench-{who}", f"{NETS[who]}.1"
    if who == "C":
        return [str(compiled("responder.c")), name, own, "255.255.255.0"]
    command = [sys.executable, str(EXAMPLE), "--name", name, "--address", f"{own}/24"]
    return [*command, "--uvloop"] if who == "uvloop" else command


@dataclass
class Run:
    """The turns of one responder in one run: microseconds, microseconds, pings."""

    means: list[float] = field(default_factory=list)
    p99s: list[float] = field(default_factory=list)
    lost: int = 0

    @property
    def mean(self) -> float:
        return statistics.fmean(self.means)

    @property
    def p99(self) -> float:
        """The mean of the turns' 99th percentiles."""
        return statistics.fmean(self.p99s)


def ping(who: str, into: Run) -> None:
    """Take one turn."""
    pinger = str(compiled("pinger.c"))
    with child(pinger, f"{NETS[who]}.2", str(PINGS // TURNS), core=FIRST_CORE) as process:
        mean, p99, lost = output_of(process).split()
    into.means.append(int(mean) / 1000)
    into.p99s.append(int(p99) / 1000)
    into.lost += int(lost)


def run(runs: int, loops: Sequence[str]) -> Iterator[Table]:
    results: dict[str, list[Run]] = {who: [] for who in ("C", *loops)}
    compiled("pinger.c")
    with contextlib.ExitStack() as stack:
        for who in results:
            wait_ready(stack.enter_context(child(*responder(who), core=LAST_CORE)))
            ping(who, Run())  # warms up
        for _ in range(runs):
            turns = {who: Run() for who in results}
            for who in list(turns) * TURNS:
                ping(who, turns[who])
            for who, result in turns.items():
                results[who].append(result)
    c = results["C"]
    expect("pings that C lost", sum(r.lost for r in c), 0)
    for loop in loops:
        yield Table("ping", loop, f"{PINGS} flood pings, one at a time", _rows(c, results[loop]))


def _rows(c: Sequence[Run], ours: Sequence[Run]) -> list[Row]:
    c_mean, c_p99 = [r.mean for r in c], [r.p99 for r in c]
    return [
        Row("C: mean", "us", c_mean),
        Row("ping_responder.py: mean", "us", [r.mean for r in ours], c_mean, target=1.35),
        Row("C: p99", "us", c_p99),
        Row("ping_responder.py: p99", "us", [r.p99 for r in ours], c_p99),
        Row("ping_responder.py: lost", "pings", [r.lost for r in ours], percentile=100, target=0),
    ]
