"""Flood pings, one at a time, answered by examples/ping_responder.py and by responder.c.

Each responder has a device of its own and lives through the whole benchmark; while another is being
pinged it sleeps. The pinger keeps to one core and the responders to another, so that each answer
costs what it costs in life: waking the responder, the answer, waking the pinger.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence

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

PINGS = 20_000
EXAMPLE = HERE.parent / "examples" / "ping_responder.py"
NETS = {"C": "10.78.0", "asyncio": "10.78.1", "uvloop": "10.78.2"}


def responder(who: str) -> list[str]:
    """The command that answers for NETS[who] + .2 on the device bench-WHO."""
    name, own = f"bench-{who}", f"{NETS[who]}.1"
    if who == "C":
        return [str(compiled("responder.c")), name, own, "255.255.255.0"]
    command = [sys.executable, str(EXAMPLE), "--name", name, "--address", f"{own}/24"]
    return [*command, "--uvloop"] if who == "uvloop" else command


def ping(who: str) -> tuple[float, float, int]:
    """Mean and 99th percentile of the round trips in microseconds, and how many were lost."""
    pinger = str(compiled("pinger.c"))
    with child(pinger, f"{NETS[who]}.2", str(PINGS), core=FIRST_CORE) as process:
        mean, p99, lost = output_of(process).split()
    return int(mean) / 1000, int(p99) / 1000, int(lost)


def run(runs: int, loops: Sequence[str]) -> Iterator[Table]:
    results: dict[str, list[tuple[float, float, int]]] = {who: [] for who in ("C", *loops)}
    compiled("pinger.c")
    with contextlib.ExitStack() as stack:
        for who in results:
            wait_ready(stack.enter_context(child(*responder(who), core=LAST_CORE)))
        for turn in range(runs + 1):
            for who, result in results.items():
                answer = ping(who)
                if turn > 0:  # the first one warms up
                    result.append(answer)
    c = results["C"]
    expect("pings that C lost", sum(lost for *_, lost in c), 0)
    for loop in loops:
        yield Table("ping", loop, f"{PINGS} flood pings, one at a time", _rows(c, results[loop]))


def _rows(
    c: Sequence[tuple[float, float, int]], ours: Sequence[tuple[float, float, int]]
) -> list[Row]:
    c_mean, c_p99 = [r[0] for r in c], [r[1] for r in c]
    return [
        Row("C: mean", "us", c_mean),
        Row("ping_responder.py: mean", "us", [r[0] for r in ours], c_mean, target=1.35),
        Row("C: p99", "us", c_p99),
        Row("ping_responder.py: p99", "us", [r[1] for r in ours], c_p99),
        Row("ping_responder.py: lost", "pings", [r[2] for r in ours], percentile=100, target=0),
    ]
