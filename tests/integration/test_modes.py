"""Every offload mode, with one queue and with three: what a program answers reaches the sender."""

import asyncio
import errno
import socket
import struct
from collections.abc import Iterable
from typing import Any

import pytest

import aiotun
from aiotun import TunDevice, reply
from aiotun.offload import merge, split

from .rig import udp

OURS, THEIRS, PORT = "10.9.0.1", "10.9.0.2", 7
SIZE, COUNT = 1000, 30  # of datagrams that are sent in one call, where the kernel can
_UDP_SEGMENT = 103  # udp.h


def _echo(packet: bytes) -> bytes | None:
    """The answer to a datagram for the echo service."""
    if packet[9] != socket.IPPROTO_UDP:
        return None
    source, target = struct.unpack_from("!HH", packet, 20)
    return udp(THEIRS, target, OURS, source, packet[28:]) if target == PORT else None


async def _respond(tun: TunDevice) -> None:
    raw = tun.offload == "raw"
    async for batch in tun.batches():
        packets: Iterable[bytes] = batch
        if raw:
            packets = [packet for each in batch for packet in split(each)]
        ours = [packet for packet in packets if packet[0] >> 4 == 4]
        answers = [answer for each in ours if (answer := reply.icmp_echo(each) or _echo(each))]
        await tun.send_many(merge(answers) if raw else answers)


def _send(sock: socket.socket, data: bytes) -> None:
    """Send datagrams of SIZE bytes: in one call, or in several before Linux 6.2."""
    sock.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, SIZE)
    try:
        sock.send(data)
    except OSError as error:
        if error.errno != errno.EIO:  # the device takes only packets with checksums
            raise
        sock.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, 0)
        for at in range(0, len(data), SIZE):
            sock.send(data[at : at + SIZE])


@pytest.mark.parametrize("queues", [1, 3])
@pytest.mark.parametrize("offload", ["off", "split", "raw"])
async def test_pings_and_datagrams_are_answered(offload: Any, queues: int) -> None:
    loop = asyncio.get_running_loop()
    async with aiotun.open_tun(
        addresses=[f"{OURS}/24"], offload=offload, queues=queues, txqueuelen=1000
    ) as tun:
        task = asyncio.create_task(_respond(tun))
        ping = await asyncio.create_subprocess_exec(
            "ping", "-c", "2", "-i", "0.2", "-W", "20", "-q", THEIRS, stdout=asyncio.subprocess.PIPE
        )
        said, _ = await ping.communicate()
        assert b"2 packets transmitted, 2 received" in said
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((THEIRS, PORT))
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            sent = [bytes([number]) * SIZE for number in range(COUNT)]
            _send(sock, b"".join(sent))
            async with asyncio.timeout(30):
                got = [await loop.sock_recv(sock, 2 * SIZE) for _ in range(COUNT)]
        assert sorted(got) == sent
        assert not task.done()
        task.cancel()
        await asyncio.wait([task])
