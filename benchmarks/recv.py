"""Reading packets that wait in the kernel's ring: C, os.read, and aiotun in three ways.

All five read from the same fd in turn, in the same process and on the same core. The C loop is in a
shared library. This setup is the best for C: a separate program that inherits the fd would start
each run with colder caches, and with its own device the packets would be elsewhere in memory.
"""

import asyncio
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence

import aiotun

from ._harness import LAST_CORE, Row, Table, expect, interleave, pinned, run_on
from ._native import native

COUNT = 9984  # packets a run: 156 batches of 64
RING = 10240
SIZE = 84


class Ring:
    """A TUN device whose ring is filled before each reading and empty after it."""

    def __init__(self, tun: aiotun.TunDevice, sock: socket.socket) -> None:
        self.tun = tun
        self.fd = tun.fileno()
        self.sock = sock

    def fill(self) -> None:
        native().fill(self.sock.fileno(), COUNT)

    def check(self, last: bytes) -> None:
        """Check that the last packet read is the last one sent, and that no packet is left."""
        expect("bytes in the last packet", len(last), SIZE)
        expect("number of the last packet", int.from_bytes(last[28:32], sys.byteorder), COUNT - 1)
        expect("packets left over", self.drain(), 0)

    def drain(self) -> int:
        count = 0
        while True:
            try:
                os.read(self.fd, 2048)
            except BlockingIOError:
                return count
            count += 1

    async def c_read(self) -> float:
        self.fill()
        elapsed, total = native().read_all(self.fd, COUNT)
        expect("bytes read by C", total, COUNT * SIZE)
        expect("packets left over", self.drain(), 0)
        return elapsed / COUNT

    async def os_read(self) -> float:
        self.fill()
        packet = b""
        fd = self.fd
        start = time.perf_counter_ns()
        for _ in range(COUNT):
            packet = os.read(fd, 65581)
        elapsed = time.perf_counter_ns() - start
        self.check(packet)
        return elapsed / COUNT

    async def recv(self) -> float:
        self.fill()
        packet = b""
        tun = self.tun
        start = time.perf_counter_ns()
        for _ in range(COUNT):
            packet = await tun.recv()
        elapsed = time.perf_counter_ns() - start
        self.check(packet)
        return elapsed / COUNT

    async def async_for(self) -> float:
        self.fill()
        packet = b""
        count = 0
        start = time.perf_counter_ns()
        async for packet in self.tun:  # noqa: B007 - check() looks at the last one
            count += 1
            if count == COUNT:
                break
        elapsed = time.perf_counter_ns() - start
        self.check(packet)
        return elapsed / COUNT

    async def recv_many(self) -> float:
        self.fill()
        batch: list[bytes] = []
        count = 0
        tun = self.tun
        start = time.perf_counter_ns()
        while count < COUNT:
            batch = await tun.recv_many(64)
            count += len(batch)
        elapsed = time.perf_counter_ns() - start
        expect("packets received", count, COUNT)
        self.check(batch[-1])
        return elapsed / COUNT


async def measure(loop: str, runs: int) -> Table:
    opener = aiotun.open_tun("bench0", addresses=["10.77.0.1/24"], txqueuelen=RING)
    async with opener as tun, asyncio.timeout(120):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect(("10.77.0.2", 9))
            ring = Ring(tun, sock)
            cases = {
                "C read()": ring.c_read,
                "os.read()": ring.os_read,
                "await recv()": ring.recv,
                "async for": ring.async_for,
                "await recv_many(64)": ring.recv_many,
            }
            # A run takes only milliseconds. Many short runs suffer less from noise than few long.
            samples = await interleave(cases, runs * 5)
    targets = {"await recv()": 1.6, "async for": 1.6, "await recv_many(64)": 1.35}
    c = samples["C read()"]
    rows = [
        Row(name, "ns/packet", values, None if values is c else c, target=targets.get(name))
        for name, values in samples.items()
    ]
    return Table("recv", loop, f"{COUNT} packets of {SIZE} bytes wait in the ring", rows)


def run(runs: int, loops: Sequence[str]) -> Iterator[Table]:
    native()
    with pinned(LAST_CORE):
        for loop in loops:
            yield run_on(loop, measure(loop, runs))
