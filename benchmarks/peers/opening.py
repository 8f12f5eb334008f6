"""Opening a device with an address and an MTU, and closing it, by each library's own means.

Only libraries that can set both take part. scapy, asyncssh, water and wireguard-go can't set
addresses, and pytun-pmd3 sets only IPv6 addresses. Most of the time of a closing is the kernel's.
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

from .._contenders import Contender
from .._harness import Row, Table, columns, in_turn
from ._field import Program, running

NAMES = ("C", "aiotun", "aiotun, uvloop", "pytun", "tun-rs")
COUNT = 10  # a run


def run(runs: int, contenders: Sequence[Contender]) -> Iterator[Table]:
    with contextlib.ExitStack() as stack:
        programs = {
            each.name: stack.enter_context(running(each, "open", "tun0")) for each in contenders
        }
        found = in_turn(
            {name: partial(_milliseconds, each) for name, each in programs.items()}, runs
        )
    for what, samples in zip(("open", "close"), columns(found), strict=False):
        rows = [Row(name, "ms", values) for name, values in samples.items()]
        yield Table("opening", "all", f"to {what} a device with an address and an MTU", rows)


def _milliseconds(program: Program) -> list[float]:
    return [nanoseconds / 1e6 for nanoseconds in program.order(COUNT)]
