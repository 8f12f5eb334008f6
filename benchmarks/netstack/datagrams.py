"""UDP: the time until a client has the answer of a program behind each stack, one at a time."""

import contextlib
import statistics
from collections.abc import Iterator, Sequence

import aiotun

from .._harness import BenchError, Row, Table
from ..peers._contenders import Contender
from ._contenders import RAW, host
from .streams import client

COUNT = 2000  # in a run


def run(runs: int, contenders: Sequence[Contender]) -> Iterator[Table]:
    if not hasattr(aiotun.Netstack, "intercept_udp"):
        raise BenchError("this version has no intercept_udp")
    able = [each for each in contenders if each.name != "lwIP"]  # examples/lwip_host has no UDP
    times: dict[str, list[float]] = {each.name: [] for each in able}
    cpu: dict[str, list[float]] = {each.name: [] for each in able}
    with contextlib.ExitStack() as stack:
        hosts = {each.name: host(stack, each, number) for number, each in enumerate(able)}
        for number in range(runs + 1):  # the first one warms up
            for name, at in hosts.items():
                before = at.program.cpu
                found = client("echo", at, 1, COUNT)
                if len(found) != COUNT:
                    raise BenchError(f"{name} answered {len(found)} of {COUNT} datagrams")
                if number:
                    times[name].append(statistics.median(found) / 1000)
                    cpu[name].append((at.program.cpu - before) / COUNT * 1e6)
    yield Table(
        "netstack",
        "all",
        "a datagram of 64 bytes and its answer, as the client sees it",
        [
            Row(name, "us", found, target=60 if name == RAW else None)
            for name, found in times.items()
        ],
    )
    what = "the stack's processor time for a datagram and its answer"
    yield Table("netstack", "all", what, [Row(name, "us", found) for name, found in cpu.items()])
