"""Writing packets to the kernel: C, os.write, send and send_many.

The packets go to a UDP socket in this process. During the write, each packet goes through the whole
IP layer into the socket's buffer, as in a real program. With a closed port we would measure the
kernel's ICMP errors and their rate limit, and with an unroutable address a shortcut. A chunk of 256
packets fits into the default socket buffer. The buffer is emptied and counted after each chunk, and
that time is not measured.
"""

import asyncio
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

import aiotun

from ._harness import LAST_CORE, Row, Table, expect, interleave, pinned, run_on
from ._native import native

CHUNK = 256
CHUNKS = 39  # 9984 packets a run
BATCH = 64
HERE, PEER = "10.77.0.1", "10.77.0.2"


def checksum(data: bytes) -> int:
    words: tuple[int, ...] = struct.unpack(f"!{len(data) // 2}H", data)
    total = sum(words)
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total


def udp_packet(port: int) -> bytes:
    """Return a packet of 84 bytes from PEER to HERE, with correct checksums."""
    return udp_packet_of(84, PEER, HERE, port)


def udp_packet_of(size: int, source_address: str, target_address: str, port: int) -> bytes:
    """Return a packet of `size` bytes with correct checksums; `size` must be even."""
    data = bytes(size - 28)
    source, target = socket.inet_aton(source_address), socket.inet_aton(target_address)
    length = 8 + len(data)
    udp = struct.pack("!HHHH", 9, port, length, 0)
    pseudo = source + target + struct.pack("!HH", socket.IPPROTO_UDP, length)
    udp = struct.pack("!HHHH", 9, port, length, checksum(pseudo + udp + data))
    # "Don't fragment", as Linux sets it; without it, each packet would need its own ID.
    fields = (0x45, 0, 20 + length, 0, 0x4000, 64, socket.IPPROTO_UDP)
    header = struct.pack("!BBHHHBBH", *fields, 0) + source + target
    header = struct.pack("!BBHHHBBH", *fields, checksum(header)) + source + target
    return header + udp + data


class Sender:
    """A TUN device, and the socket that receives what is sent through it."""

    def __init__(self, tun: aiotun.TunDevice, sock: socket.socket) -> None:
        self.tun = tun
        self.sock = sock
        self.packet = udp_packet(sock.getsockname()[1])

    def case(self, chunk: Callable[[], Awaitable[int]]) -> Callable[[], Awaitable[float]]:
        """Return a run: it times each chunk separately, and empties the socket after each."""

        async def run() -> float:
            elapsed = 0
            for _ in range(CHUNKS):
                elapsed += await chunk()
                expect("packets that arrived", native().drain(self.sock.fileno()), CHUNK)
            return elapsed / (CHUNKS * CHUNK)

        return run

    async def c_write(self) -> int:
        return native().write_all(self.tun.fileno(), self.packet, CHUNK)

    async def os_write(self) -> int:
        fd, packet = self.tun.fileno(), self.packet
        start = time.perf_counter_ns()
        for _ in range(CHUNK):
            os.write(fd, packet)
        return time.perf_counter_ns() - start

    async def send(self) -> int:
        tun, packet = self.tun, self.packet
        start = time.perf_counter_ns()
        for _ in range(CHUNK):
            await tun.send(packet)
        return time.perf_counter_ns() - start

    async def send_many(self) -> int:
        tun, batch = self.tun, [self.packet] * BATCH
        start = time.perf_counter_ns()
        for _ in range(CHUNK // BATCH):
            await tun.send_many(batch)
        return time.perf_counter_ns() - start


async def measure(loop: str, runs: int) -> Table:
    async with aiotun.open_tun("bench0", addresses=[f"{HERE}/24"]) as tun, asyncio.timeout(120):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((HERE, 0))
            # The kernel charges a packet with several times its size. rmem_max limits this value.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, CHUNK * 4096)
            sender = Sender(tun, sock)
            cases = {
                "C write()": sender.case(sender.c_write),
                "os.write()": sender.case(sender.os_write),
                "await send()": sender.case(sender.send),
                "await send_many(64)": sender.case(sender.send_many),
            }
            samples = await interleave(cases, runs * 5)
    targets = {"await send()": 1.5, "await send_many(64)": 1.3}
    c = samples["C write()"]
    rows = [
        Row(name, "ns/packet", values, None if values is c else c, target=targets.get(name))
        for name, values in samples.items()
    ]
    return Table("send", loop, f"{CHUNK * CHUNKS} packets of 84 bytes to a UDP socket", rows)


def run(runs: int, loops: Sequence[str]) -> Iterator[Table]:
    native()
    with pinned(LAST_CORE):
        for loop in loops:
            yield run_on(loop, measure(loop, runs))
