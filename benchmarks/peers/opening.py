"""Opening a device with an address and an MTU, and closing it, by each library's own means.

Only libraries that can set both take part. scapy, asyncssh, water and wireguard-go can't set
addresses, and pytun-pmd3 sets only IPv6 addresses. Most of the time of a closing is the kernel's.
"""

import contextlib
from collections.abc import Iterator, Sequence

from .._harness import Row, Table
from ._contenders import Contender
from ._field import running

NAMES = ("C", "aiotun", "aiotun, uvloop", "pytun", "tun-rs")
COUNT = 10  # a run


def run(runs: int, contenders: Sequence[Contender]) -> Iterator[Table]:
    opening: dict[str, list[float]] = {each.name: [] for each in contenders}
    closing: dict[str, list[float]] = {each.name: [] for each in contenders}
    with contextlib.ExitStack() as stack:
        programs = [stack.enter_context(running(each, "open", "tun0")) for each in contenders]
        for number in range(runs + 1):  # the first one warms up
            for program in programs:
                opened, closed = program.order(COUNT)
                if number:
                    opening[program.contender.name].append(opened / 1e6)
                    closing[program.contender.name].append(closed / 1e6)
    for what, samples in (("open", opening), ("close", closing)):
        rows = [Row(name, "ms", values) for name, values in samples.items()]
        yield Table("opening", "all", f"to {what} a device with an address and an MTU", rows)
