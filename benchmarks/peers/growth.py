"""How a packet's cost grows with the packets that wait, with queues, devices and receivers."""

import asyncio
import contextlib
import socket
import statistics
import time
from collections.abc import Iterator, Sequence

import aiotun

from .._contenders import Contender
from .._harness import LAST_CORE, Row, Table, expect, in_turn, pinned, run_on
from .cost import Lane, lanes

NAMES = (
    "C",
    "aiotun",
    "aiotun, one by one",
    "pytun",
    "asyncssh",
    "add_reader",
    "tun-rs",
    "wireguard-go",
)
WAITING = (1, 8, 64, 512, 4096)
QUEUES = (1, 4, 16, 64)
DEVICES = (1, 8, 64)
RECEIVERS = (1, 16, 256)
PACKETS = 2048


def waiting(runs: int, contenders: Sequence[Contender]) -> Iterator[Table]:
    with lanes(contenders, "read") as found:
        for count in WAITING:
            cases = {name: _Repeated(lane, count) for name, lane in found.items()}
            samples = in_turn(cases, runs)
            rows = [Row(name, "ns/packet", values) for name, values in samples.items()]
            yield Table("growth", "all", f"to read, of {count} waiting packets of 84 bytes", rows)


class _Repeated:
    """Return the median of enough rounds."""

    def __init__(self, lane: Lane, count: int) -> None:
        self._lane, self._count = lane, count

    def __call__(self) -> float:
        rounds = min(50, -(-4096 // self._count))
        return statistics.median(self._lane.read(84, self._count) for _ in range(rounds))


async def _received(device: aiotun.TunDevice, target: str, receivers: int) -> float:
    """Return nanoseconds for each packet, with that many tasks that receive from the device."""
    left = PACKETS
    done: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def receive() -> None:
        nonlocal left
        while True:
            if receivers == 1:
                left -= len(await device.recv_many(64))
            else:
                await device.recv()
                left -= 1
            if left == 0:
                done.set_result(time.perf_counter_ns())

    tasks = [asyncio.create_task(receive()) for _ in range(receivers)]
    await asyncio.sleep(0)  # now all tasks wait
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((target, 9))
        for _ in range(PACKETS):
            sock.send(bytes(56))
    start = time.perf_counter_ns()
    elapsed = await done - start
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    expect("packets received", left, 0)
    return elapsed / PACKETS


async def _measured(queues: int, receivers: int) -> float:
    opener = aiotun.open_tun(
        "grow0", addresses=["10.83.0.1/24"], queues=queues, txqueuelen=2 * PACKETS
    )
    async with opener as tun:
        await _received(tun, "10.83.0.2", receivers)  # warms up
        return await _received(tun, "10.83.0.2", receivers)


async def _with_queues(count: int) -> float:
    return await _measured(count, 1)


async def _with_devices(count: int) -> float:
    """One device has packets; on each other device a task waits."""
    async with contextlib.AsyncExitStack() as stack:
        others = [await stack.enter_async_context(aiotun.open_tun()) for _ in range(count - 1)]
        tasks = [asyncio.create_task(other.recv()) for other in others]
        await asyncio.sleep(0)
        try:
            return await _with_queues(1)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _with_receivers(count: int) -> float:
    return await _measured(1, count)


def ours(runs: int) -> Iterator[Table]:
    for what, counts, work in (
        ("queues of one device, recv_many", QUEUES, _with_queues),
        ("devices with a waiting task each, recv_many", DEVICES, _with_devices),
        ("tasks that recv from one device (1: recv_many)", RECEIVERS, _with_receivers),
    ):
        cases = {
            count: lambda count=count, work=work: run_on("asyncio", work(count)) for count in counts
        }
        samples = in_turn(cases, runs)
        first = samples[counts[0]]
        rows = [
            Row(str(count), "ns/packet", values, None if values is first else first)
            for count, values in samples.items()
        ]
        yield Table("growth", "asyncio", f"aiotun: {what}", rows)


def run(runs: int, contenders: Sequence[Contender]) -> Iterator[Table]:
    yield from waiting(runs, contenders)
    with pinned(LAST_CORE):
        yield from ours(runs)
