"""Namespaces and stacks: time until one is usable, a socket's time, memory at rest.

All of it without root: `new_namespace(rootless=True)` and `open_netstack` without privilege.
"""

import socket
import statistics
import time
from collections.abc import Iterator, Sequence

import aiotun

from .._contenders import Contender
from .._harness import Row, Table, fresh, in_turn, interleave, run_on, warm_environment
from ._contenders import RAW

NAMES = (RAW, f"{RAW}, uvloop")
SOCKETS = 500  # in a run


async def namespace() -> float:
    """Return milliseconds until a new namespace has made a socket."""
    start = time.perf_counter()
    async with aiotun.new_namespace(rootless=True) as ns:
        (await ns.socket()).close()
        return (time.perf_counter() - start) * 1000


async def stack() -> float:
    """Return milliseconds until a new stack accepts connections to every address."""
    start = time.perf_counter()
    async with (
        aiotun.new_namespace(rootless=True) as ns,
        aiotun.open_netstack(intercept=True, namespace=ns) as opened,
        await opened.intercept_tcp(lambda reader, writer: writer.close()),
    ):
        return (time.perf_counter() - start) * 1000


async def sockets() -> float:
    """Return the median time of a socket in microseconds."""
    times = []
    async with aiotun.new_namespace(rootless=True) as ns:
        (await ns.socket()).close()
        for _ in range(SOCKETS):
            start = time.perf_counter()
            sock: socket.socket = await ns.socket()
            times.append(time.perf_counter() - start)
            sock.close()
    return statistics.median(times) * 1e6


async def measure(runs: int) -> Sequence[Row]:
    cases = {"namespace": namespace, "stack": stack, "socket": sockets}
    samples = await interleave(cases, runs)
    return [
        Row("new_namespace, until usable", "ms", samples["namespace"], target=40),
        Row("open_netstack, until usable", "ms", samples["stack"], target=50),
        Row("await ns.socket()", "us", samples["socket"], target=40),
    ]


# A stack opened and closed before loads every module; then what a second one adds is measured.
REST = """
import asyncio, os, pathlib, aiotun

def resident():
    me, total = os.getpid(), 0
    children = pathlib.Path(f"/proc/{me}/task/{me}/children").read_text().split()
    for pid in (me, *children):
        for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                total += int(line.split()[1])
    return total / 1024

async def opened():
    ns = await aiotun.new_namespace(rootless=True)
    stack = await aiotun.open_netstack(intercept=True, namespace=ns)
    await stack.intercept_tcp(lambda reader, writer: writer.close())
    return ns, stack

async def main():
    ns, stack = await opened()
    await stack.aclose()
    await ns.aclose()
    before = resident()
    ns, stack = await opened()
    print(resident() - before)
    await stack.aclose()
    await ns.aclose()

asyncio.run(main())
"""


def memory(runs: int) -> Row:
    """Return how much memory a stack at rest takes in MiB, with its helper process."""
    with warm_environment() as environment:

        def opened() -> float:
            return float(*fresh("-c", REST, environment=environment))

        (samples,) = in_turn({"opened": opened}, runs).values()
    return Row("a stack at rest, helper included", "MiB", samples, target=12)


def run(runs: int, contenders: Sequence[Contender]) -> Iterator[Table]:
    loops = ["asyncio", *(["uvloop"] if any("uvloop" in each.name for each in contenders) else [])]
    for loop in loops:
        yield Table("netstack", loop, f"opening, on {loop}", run_on(loop, measure(runs)))
    yield Table("netstack", "asyncio", "memory", [memory(runs)])
