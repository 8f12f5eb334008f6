"""UDP: the time until a client has the answer of a program behind each stack, one at a time."""

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from functools import partial

from .._contenders import Contender
from .._harness import BenchError, Row, Table, columns, in_turn
from ._contenders import RAW, STACKS, Host, host
from .streams import client

NAMES = tuple(name for name in STACKS if name != "lwIP")  # examples/lwip_host has no UDP
COUNT = 2000  # in a run


def answered(at: Host) -> tuple[float, float]:
    """Return the median time, and the stack's processor time for each, both in microseconds."""
    before = at.program.cpu
    found = client("echo", at, 1, COUNT)
    if len(found) != COUNT:
        name = at.program.contender.name
        raise BenchError(f"{name} answered {len(found)} of {COUNT} datagrams")
    return statistics.median(found) / 1000, (at.program.cpu - before) / COUNT * 1e6


def run(runs: int, contenders: Sequence[Contender]) -> Iterator[Table]:
    with contextlib.ExitStack() as stack:
        hosts = {each.name: host(stack, each, number) for number, each in enumerate(contenders)}
        cases = {name: partial(answered, at) for name, at in hosts.items()}
        times, costs = columns(in_turn(cases, runs))
    yield Table(
        "netstack",
        "all",
        "a datagram of 64 bytes and its answer, as the client sees it",
        [
            Row(
                name,
                "us",
                found,
                target=60 if name == RAW else None,
                cost=costs[name],
                cost_unit="us",
            )
            for name, found in times.items()
        ],
    )
