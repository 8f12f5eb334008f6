"""A TUN device that receives numbered packets, for the tests of receiving."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import pytest

import aiotun
from aiotun import Offloads, PacketIO
from aiotun.runs import Pool

_POOL = Pool(4)

OURS, THEIRS, PORT = "10.9.0.1", "10.9.0.2", 9

# udp.h: the size of the datagrams into which the kernel, or the receiver of a super-packet, cuts
# what a socket sends.
_UDP_SEGMENT = 103


def needs_uso(device: aiotun.Device) -> None:
    """Skip the test if the kernel hands over no UDP super-packets."""
    if Offloads.USO not in device.offloads:
        pytest.skip("this kernel has no USO (before Linux 6.2)")


@dataclass
class Rig:
    """A device, one of its receivers, and a socket whose datagrams the device receives."""

    tun: aiotun.TunDevice
    io: PacketIO
    sock: socket.socket
    count: int = 0
    at_once: int = 1  # packets that come in one super-packet

    def inject(self, packets: int = 1) -> None:
        """Have the kernel put packets into the queue; their numbers follow the last one's."""
        end = self.count + packets
        while self.count < end:
            numbers = range(self.count, min(end, self.count + self.at_once))
            self.sock.send(struct.pack(f"!{len(numbers)}I", *numbers))
            self.count = numbers.stop


def number(packet: bytes) -> int:
    """The number that a packet carries."""
    return int(struct.unpack_from("!I", packet, 28)[0])


def udp(source: str, source_port: int, target: str, target_port: int, data: bytes = b"") -> bytes:
    """An IPv4 packet with a UDP datagram, which has no checksum."""
    length = 28 + len(data)
    head = struct.pack("!BBHHHBBH", 0x45, 0, length, 0, 0, 64, 17, 0)
    head += socket.inet_aton(source) + socket.inet_aton(target)
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    head = head[:10] + struct.pack("!H", total ^ 0xFFFF) + head[12:]
    return head + struct.pack("!HHHH", source_port, target_port, length - 20, 0) + data


@contextlib.asynccontextmanager
async def rig(kind: str = "device", **options: Any) -> AsyncIterator[Rig]:
    """Open a device and yield a rig with a receiver of that kind.

    Args:
        kind: ``"device"`` with one queue; its ``"queue"``; a ``"group"``, a device of four queues;
            ``"member"``, the one of four queues that gets the packets. ``"split"`` and
            ``"split group"`` are a device and a group that get super-packets.
        options: more for `open_tun`.
    """
    options.setdefault("queues", 4 if kind in ("group", "member", "split group") else 1)
    if kind.startswith("split"):
        options.setdefault("offload", "split")
    options.setdefault("txqueuelen", 1000)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        async with aiotun.open_tun("rig0", addresses=[f"{OURS}/24"], **options) as tun:
            sock.bind((OURS, 0))
            sock.connect((THEIRS, PORT))
            io: PacketIO = tun
            if kind == "queue":
                io = tun.queues[0]
            if kind == "member":
                # The kernel sends a flow's packets to the queue that the flow came from.
                io = tun.queues[1]
                await io.send(udp(THEIRS, PORT, OURS, sock.getsockname()[1]))
                sock.recv(1)
            made = Rig(tun, io, sock)
            if kind.startswith("split"):
                sock.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, 4)
                made.at_once = 20
            yield made


KINDS = ["device", "queue", "group", "member", "split", "split group"]

Receive = Callable[[PacketIO], Coroutine[Any, Any, bytes]]


async def _recv_into(io: PacketIO) -> bytes:
    buffer = bytearray(2048)
    length = await io.recv_into(buffer)
    return bytes(buffer[:length])


async def _recv_many(io: PacketIO) -> bytes:
    (packet,) = await io.recv_many(1)
    return packet


async def _next(io: PacketIO) -> bytes:
    return await anext(aiter(io))


async def _next_batch(io: PacketIO) -> bytes:
    (packet,) = await anext(io.batches(1))
    return packet


async def _next_decoded(io: PacketIO) -> bytes:
    return bytes(await anext(io.decoded()))


async def _recv_run(io: PacketIO) -> bytes:
    with await io.recv_run(_POOL, limit=1) as run:
        (packet,) = run.segments()
    return packet


async def _recv(io: PacketIO) -> bytes:
    return await io.recv()


# Every way to receive one packet.
RECEIVE: dict[str, Receive] = {
    "recv": _recv,
    "recv_into": _recv_into,
    "recv_many": _recv_many,
    "anext": _next,
    "batches": _next_batch,
    "decoded": _next_decoded,
    "recv_run": _recv_run,
}


async def waiting(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Start a task and let it run until it waits."""
    task = asyncio.create_task(coroutine)
    await asyncio.sleep(0)
    assert not task.done()
    return task


async def rest(io: PacketIO, count: int) -> list[int]:
    """Return the numbers of the next `count` packets; no packet may be left after them."""
    found = [number(await asyncio.wait_for(io.recv(), 5)) for _ in range(count)]
    try:
        extra = io.recv_nowait()
    except BlockingIOError:
        return found
    raise AssertionError(f"one too many: {extra!r}")
