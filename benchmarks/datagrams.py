"""Runs of UDP datagrams over loopback: sendmsg and recvmsg in C, send_many and recv_many.

A chunk of runs fits into the receiving socket's buffer. One side of each chunk is measured, and C
does the other.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator, Sequence

import aiotun
from aiotun import DatagramSocket

from ._harness import LAST_CORE, Row, Table, expect, interleave, pinned, run_on
from ._native import native

SIZE, RUN = 1400, 45
RUNS = 4  # a chunk
CHUNKS = 50  # 9000 datagrams
COUNT = CHUNKS * RUNS * RUN
BYTES = RUNS * RUN * SIZE


class Wire:
    """Two sockets, and a connected one for C."""

    def __init__(
        self, sender: DatagramSocket, receiver: DatagramSocket, connected: socket.socket
    ) -> None:
        self.sender, self.receiver = sender, receiver
        self.connected = connected.fileno()
        self.run = [bytes(SIZE)] * RUN

    def emptied(self) -> None:
        expect("bytes that arrived", native().recv_runs(self.receiver.fileno())[1], BYTES)

    async def c_send(self) -> float:
        elapsed = 0
        for _ in range(CHUNKS):
            elapsed += native().send_runs(self.connected, SIZE, RUN, RUNS)
            self.emptied()
        return elapsed / COUNT

    async def send_many(self) -> float:
        elapsed = 0
        sender, run, target = self.sender, self.run, self.receiver.address
        for _ in range(CHUNKS):
            start = time.perf_counter_ns()
            for _ in range(RUNS):
                await sender.send_many(run, target)
            elapsed += time.perf_counter_ns() - start
            self.emptied()
        return elapsed / COUNT

    async def c_recv(self) -> float:
        elapsed = 0
        for _ in range(CHUNKS):
            native().send_runs(self.connected, SIZE, RUN, RUNS)
            nanoseconds, total = native().recv_runs(self.receiver.fileno())
            expect("bytes that arrived", total, BYTES)
            elapsed += nanoseconds
        return elapsed / COUNT

    async def recv_many(self) -> float:
        elapsed = 0
        receiver = self.receiver
        for _ in range(CHUNKS):
            native().send_runs(self.connected, SIZE, RUN, RUNS)
            count = 0
            start = time.perf_counter_ns()
            while count < RUNS * RUN:
                datagrams, _ = await receiver.recv_many()
                count += len(datagrams)
            elapsed += time.perf_counter_ns() - start
            expect("datagrams that arrived", count, RUNS * RUN)
        return elapsed / COUNT


async def measure(loop: str, runs: int) -> Table:
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(asyncio.timeout(120))
        await aiotun.Link("lo").up()
        # An ordinary user gets less than the default, and a warning.
        sender, receiver = [
            await stack.enter_async_context(
                aiotun.open_datagrams(("127.0.0.1", 0), receive_bytes=1_000_000)
            )
            for _ in range(2)
        ]
        connected = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        connected.connect(receiver.address)
        wire = Wire(sender, receiver, connected)
        cases = {
            "C sendmsg(UDP_SEGMENT)": wire.c_send,
            "await send_many(45)": wire.send_many,
            "C recvmsg(UDP_GRO)": wire.c_recv,
            "await recv_many(64)": wire.recv_many,
        }
        samples = await interleave(cases, runs * 5)
    rows: list[Row] = []
    baseline: Sequence[float] = ()
    for name, values in samples.items():
        ours = not name.startswith("C ")
        baseline = baseline if ours else values
        target = 1.11 if "send" in name and ours else None  # 0.9 of C's throughput
        rows.append(Row(name, "ns", values, baseline if ours else None, target=target))
    return Table("datagrams", loop, f"{COUNT} datagrams of {SIZE} bytes over loopback", rows)


def run(runs: int, loops: Sequence[str]) -> Iterator[Table]:
    native()
    with pinned(LAST_CORE):
        for loop in loops:
            yield run_on(loop, measure(loop, runs))
