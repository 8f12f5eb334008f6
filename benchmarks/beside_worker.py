"""beside_worker.py NUMBER LOOP: runs the case that each line on stdin names, prints its figures.

`beside` runs this program on each checkout that it compares, perhaps an old one. So it is a single
file, and uses only public names of aiotun. First it prints `ready NUMBER`, and a line with the path
from which aiotun was imported. Each case takes some milliseconds and prints numbers: nanoseconds of
this thread's processor time for each packet and, if the case sends, how many packets the interface
counted.

It measures processor time because that does not include what other programs do on a busy machine
while this one waits for the core.
"""

import asyncio
import contextlib
import os
import socket
import struct
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiotun
from aiotun.capture import PcapWriter

COUNT = 2048  # packets waiting in the ring
BATCH = 64
CHUNK = 256  # packets that fit into a socket's buffer
SEGMENT = 1000  # bytes of each TCP segment

Case = Callable[[], Awaitable[tuple[float, ...]]]


def fold(total: int) -> int:
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def checksum(data: bytes) -> int:
    return 0xFFFF - fold(sum(struct.unpack(f"!{len(data) // 2}H", data)))


def ip_packet(protocol: int, source: str, target: str, body: bytes, checksum_at: int) -> bytes:
    """An IPv4 packet, with the checksums of its header and of its body."""
    addresses = socket.inet_aton(source) + socket.inet_aton(target)
    pseudo = addresses + struct.pack("!HH", protocol, len(body))
    sealed = bytearray(body)
    sealed[checksum_at : checksum_at + 2] = checksum(pseudo + body).to_bytes(2, "big")
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0x4000, 64, protocol, 0)
    header = header[:10] + checksum(header + addresses).to_bytes(2, "big")
    return header + addresses + bytes(sealed)


def tcp_segments(source: str, target: str, flows: int = 1) -> list[bytes]:
    """Consecutive segments of each flow, the flows in turn."""
    packets = []
    for number in range(BATCH):
        sequence = 1 + number // flows * SEGMENT
        fields = (1000 + number % flows, 2000, sequence, 1, 0x50, 0x10, 512, 0, 0)
        body = struct.pack("!HHIIBBHHH", *fields) + bytes(SEGMENT)
        packets.append(ip_packet(socket.IPPROTO_TCP, source, target, body, 16))
    return packets


def expect(what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise SystemExit(f"beside_worker.py: {what}: {found} instead of {wanted}")


class Receiving:
    """A device whose ring is filled before each case, and emptied by it."""

    def __init__(self, tun: aiotun.TunDevice, sock: socket.socket) -> None:
        self.tun = tun
        self.sock = sock

    async def timed(self, receive: Callable[[], Awaitable[int]]) -> tuple[float]:
        for _ in range(COUNT):
            self.sock.send(bytes(56))  # 84 with the headers
        start = time.thread_time_ns()
        count = await receive()
        elapsed = time.thread_time_ns() - start
        with contextlib.suppress(BlockingIOError):
            while True:
                self.tun.recv_nowait()
                count += 1
        expect("packets received", count, COUNT)
        return (elapsed / COUNT,)

    async def recv(self) -> tuple[float]:
        async def receive() -> int:
            tun = self.tun
            for _ in range(COUNT):
                await tun.recv()
            return COUNT

        return await self.timed(receive)

    async def async_for(self) -> tuple[float]:
        async def receive() -> int:
            count = 0
            async for _ in self.tun:
                count += 1
                if count == COUNT:
                    break
            return count

        return await self.timed(receive)

    async def recv_many(self) -> tuple[float]:
        async def receive() -> int:
            count, tun = 0, self.tun
            while count < COUNT:
                count += len(await tun.recv_many(BATCH))
            return count

        return await self.timed(receive)

    async def wake(self, many: bool) -> tuple[float]:
        """A task waits for each packet. The time includes a turn of the loop, and the sending."""
        tun, packet = self.tun, bytes(56)

        async def reader() -> None:
            count = 0
            while count < CHUNK:
                count += len(await tun.recv_many(BATCH)) if many else bool(await tun.recv())

        task = asyncio.create_task(reader())
        await asyncio.sleep(0)
        start = time.thread_time_ns()
        for _ in range(CHUNK):
            self.sock.send(packet)
            await asyncio.sleep(0)
        await task
        return ((time.thread_time_ns() - start) / CHUNK,)


class Sending:
    """A device, and a UDP socket that receives what is sent through it."""

    def __init__(self, tun: aiotun.TunDevice, sock: socket.socket, packet: bytes) -> None:
        self.tun = tun
        self.sock = sock
        self.packet = packet

    async def timed(self, chunk: Callable[[], Awaitable[None]]) -> tuple[float, float]:
        elapsed = 0
        before = rx_packets(self.tun.name)
        for _ in range(COUNT // CHUNK):
            start = time.thread_time_ns()
            await chunk()
            elapsed += time.thread_time_ns() - start
            arrived = 0
            with contextlib.suppress(BlockingIOError):
                while True:
                    self.sock.recv(2048, socket.MSG_DONTWAIT)
                    arrived += 1
            expect("packets that arrived", arrived, CHUNK)
        return elapsed / COUNT, rx_packets(self.tun.name) - before

    async def send(self) -> tuple[float, float]:
        async def chunk() -> None:
            tun, packet = self.tun, self.packet
            for _ in range(CHUNK):
                await tun.send(packet)

        return await self.timed(chunk)

    async def send_many(self) -> tuple[float, float]:
        async def chunk() -> None:
            tun, batch = self.tun, [self.packet] * BATCH
            for _ in range(CHUNK // BATCH):
                await tun.send_many(batch)

        return await self.timed(chunk)


def rx_packets(name: str) -> int:
    """Return the interface's counter of packets that reached the kernel."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        interface, _, numbers = line.partition(":")
        if interface.strip() == name:
            return int(numbers.split()[1])
    raise LookupError(name)


async def send_segments(tun: aiotun.TunDevice, segments: list[bytes]) -> tuple[float, float]:
    """Sends packets to a foreign address, which the kernel drops after its IP layer."""
    rounds = 8
    before = rx_packets(tun.name)
    start = time.thread_time_ns()
    for _ in range(rounds):
        await tun.send_many(segments)
    elapsed = time.thread_time_ns() - start
    return elapsed / rounds / BATCH, (rx_packets(tun.name) - before) / rounds


async def main(number: int) -> None:
    off_net, split_net, name = f"10.77.{number}", f"10.78.{number}", f"bench{number}"
    async with contextlib.AsyncExitStack() as stack:
        off = await stack.enter_async_context(
            aiotun.open_tun(f"{name}off", addresses=[f"{off_net}.1/24"], txqueuelen=COUNT)
        )
        split = await stack.enter_async_context(
            aiotun.open_tun(
                f"{name}split",
                addresses=[f"{split_net}.1/24"],
                txqueuelen=COUNT,
                offload="split",
            )
        )
        socks = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(3)]
        for sock in socks:
            stack.enter_context(sock)
        socks[0].connect((f"{off_net}.2", 9))
        socks[1].connect((f"{split_net}.2", 9))
        socks[2].bind((f"{off_net}.1", 0))
        socks[2].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, CHUNK * 4096)
        body = struct.pack("!HHHH", 9, socks[2].getsockname()[1], 64, 0) + bytes(56)
        packet = ip_packet(socket.IPPROTO_UDP, f"{off_net}.2", f"{off_net}.1", body, 6)
        segments = tcp_segments(f"{split_net}.2", "192.0.2.1")
        mixed = tcp_segments(f"{split_net}.2", "192.0.2.1", 4)
        apart = tcp_segments(f"{split_net}.2", "192.0.2.1", BATCH)
        writer = await stack.enter_async_context(PcapWriter(os.devnull))

        async def captured() -> tuple[float, float]:
            with split.capture(writer):
                return await send_segments(split, segments)

        receiving, sending = Receiving(off, socks[0]), Sending(off, socks[2], packet)
        one_by_one = Receiving(split, socks[1])
        cases: dict[str, Case] = {
            "recv": receiving.recv,
            "async-for": receiving.async_for,
            "recv_many": receiving.recv_many,
            "send": sending.send,
            "send_many": sending.send_many,
            "split-recv": one_by_one.recv,
            "wake": lambda: receiving.wake(many=False),
            "wake-many": lambda: receiving.wake(many=True),
            "split-wake": lambda: one_by_one.wake(many=False),
            "split-wake-many": lambda: one_by_one.wake(many=True),
            "split-send_many": lambda: send_segments(split, segments),
            "split-four-flows": lambda: send_segments(split, mixed),
            "split-no-merge": lambda: send_segments(split, apart),
            "captured": captured,
        }
        print(f"ready {number}\n{aiotun.__file__}", flush=True)
        for line in sys.stdin:
            await asyncio.sleep(
                0
            )  # a new turn of the loop, so each case begins with a whole budget
            async with asyncio.timeout(20):
                print(*await cases[line.strip()](), flush=True)


if __name__ == "__main__":
    place, loop = sys.argv[1:]
    if loop == "uvloop":
        import uvloop

        uvloop.run(main(int(place)))
    else:
        asyncio.run(main(int(place)))
