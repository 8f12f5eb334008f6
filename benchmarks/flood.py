"""How late a timer is while an `async for` in the same loop always has packets to read.

Another process, on another core, sends more than the reader can receive for two seconds. Packets
must be lost here: the kernel's ring is the only buffer, and its counter must explain every packet
that did not arrive. Two controls show how much the machine's other programs add: the same timer
next to a task that is as busy but handles no packets, and how often another program got the core.
"""

import asyncio
import contextlib
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiotun

from ._harness import (
    FIRST_CORE,
    LAST_CORE,
    Row,
    Table,
    child,
    compiled,
    expect,
    output_of,
    percentile,
    pinned,
    run_on,
)

SECONDS = 2.0
PERIOD = 0.005
DEVICE = "bench0"


class Reader:
    """A task that counts packets."""

    def __init__(self, tun: aiotun.TunDevice) -> None:
        self.count = 0
        self.started = asyncio.Event()
        self.task = asyncio.create_task(self._run(tun))

    async def _run(self, tun: aiotun.TunDevice) -> None:
        async for _ in tun:
            self.count += 1
            if self.count == 1:
                self.started.set()

    async def quiet(self) -> int:
        """Wait until no packet has come for half a second; return how many came in all."""
        seen = -1
        while seen != self.count:
            seen = self.count
            await asyncio.sleep(0.5)
        return seen

    async def stop(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


@dataclass
class Flood:
    """The figures of each run."""

    p95: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)
    preempted: list[float] = field(default_factory=list)

    async def run(self, tun: aiotun.TunDevice) -> None:
        reader = Reader(tun)
        dropped = tx_dropped()
        flooder = str(compiled("flooder.c"))
        with child(flooder, DEVICE, str(SECONDS + 0.3), core=FIRST_CORE) as process:
            await asyncio.wait_for(reader.started.wait(), 10)
            count, start, switches = reader.count, time.perf_counter(), preemptions()
            late = await lateness(SECONDS)
            elapsed = time.perf_counter() - start
            self.rate.append((reader.count - count) / elapsed)
            self.preempted.append((preemptions() - switches) / elapsed)
            received = await reader.quiet()
            sent = int(output_of(process))
        await reader.stop()
        dropped = tx_dropped() - dropped
        expect("packets received and dropped", received + dropped, sent)
        self.p95.append(percentile(late, 95))
        self.p99.append(percentile(late, 99))
        self.lost.append(100 * dropped / sent)


def tx_dropped() -> int:
    """Return the interface's counter of packets that its full ring dropped."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == DEVICE:
            return int(numbers.split()[11])
    raise LookupError(DEVICE)


def preemptions() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


async def lateness(seconds: float) -> list[float]:
    """Run a 5 ms timer again and again; return how many milliseconds late it was each time."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        due = time.perf_counter() + PERIOD
        await asyncio.sleep(PERIOD)
        found.append(max(time.perf_counter() - due, 0.0) * 1000)
    return found


async def busy_lateness(seconds: float) -> float:
    """Return the 95th percentile next to a task that only yields."""

    async def spin() -> None:
        while True:  # noqa: ASYNC110 - it waits for nothing
            await asyncio.sleep(0)

    task = asyncio.create_task(spin())
    late = await lateness(seconds)
    task.cancel()
    return percentile(late, 95)


async def measure(loop: str, runs: int) -> Table:
    flood = Flood()
    busy: list[float] = []
    async with aiotun.open_tun(DEVICE, addresses=["10.77.0.1/24"]) as tun:
        for _ in range(runs):
            busy.append(await busy_lateness(SECONDS / 2))
            await flood.run(tun)
    rows = [
        Row("p95 of lateness", "ms", flood.p95, target=5.0),
        Row("p99 of lateness", "ms", flood.p99),
        Row("p95 with a busy task", "ms", busy),
        Row("received", "packets/s", flood.rate),
        Row("lost (tx_dropped)", "%", flood.lost),
        Row("preempted", "times/s", flood.preempted),
    ]
    what = f"lateness of a 5 ms timer during 'async for' in UDP floods of {SECONDS:g} s"
    return Table("flood", loop, what, rows)


def run(runs: int, loops: Sequence[str]) -> Iterator[Table]:
    compiled("flooder.c")
    with pinned(LAST_CORE):
        for loop in loops:
            yield run_on(loop, measure(loop, runs))
