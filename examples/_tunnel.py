"""Code that the tunnel programs share: send packets and datagrams, count what is lost."""

import asyncio
import errno
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable, Sequence

import aiotun
from aiotun.datagrams import Address

__all__ = ["RECEIVE_BYTES", "deliver", "report", "resolve", "send", "send_now"]

# Holds what arrives while this program does not run for some 20 ms. Without CAP_NET_ADMIN the
# kernel grants less.
RECEIVE_BYTES = 16 << 20


def resolve(text: str) -> Address:
    """Resolve HOST:PORT or [HOST]:PORT; raises ValueError and OSError."""
    host, colon, port = text.rpartition(":")
    if not colon:
        raise ValueError(f"{text} is not HOST:PORT")
    found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_DGRAM)
    return found[0][4]  # type: ignore[return-value]  # no other family is asked for


async def deliver(device: aiotun.Device, packets: list[bytes], dropped: Counter[str]) -> None:
    """Send packets to a device; drop and count what the kernel refuses."""
    while packets:
        try:
            if len(packets) == 1:  # as in every ping: this takes half as long
                await device.send(packets[0])
            else:
                await device.send_many(packets)
            break
        except aiotun.LinkDownError as error:
            dropped["the link is down"] += len(error.unsent) if len(packets) > 1 else 1
            break
        except aiotun.PacketError as error:
            dropped["refused by the kernel"] += 1
            packets = error.unsent[1:] if len(packets) > 1 else []


async def send(sock: aiotun.DatagramSocket, datagrams: list[bytes], address: Address) -> None:
    """Send datagrams to one address; drop what the kernel refuses, which the socket counts."""
    while datagrams:
        try:
            if len(datagrams) == 1:
                await sock.send(datagrams[0], address)
            else:
                await sock.send_many(datagrams, address)
            break
        except aiotun.PacketError as error:
            datagrams = error.unsent[1:] if len(datagrams) > 1 else []


def send_now(
    sock: aiotun.DatagramSocket, datagrams: list[bytes], address: Address, dropped: Counter[str]
) -> None:
    """Send datagrams without waiting; drop and count what finds no room."""
    try:
        went = sock.send_many_nowait(datagrams, address)
    except aiotun.PacketError as error:
        went = error.sent + 1  # the socket has counted this one
    if went < len(datagrams):
        dropped["the socket is full"] += len(datagrams) - went


async def report(
    device: aiotun.Device,
    socks: Sequence[aiotun.DatagramSocket],
    show: Callable[[Counter[str]], str],
) -> None:
    """At each SIGUSR1 print the counts of dropped packets on stderr, as `show` formats them.

    Counts what the sockets did not send, and what the kernel dropped before this program read it.
    """
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, asked.set)
    while True:
        await asked.wait()
        asked.clear()
        link = await device.link.stats()
        counts = Counter({"the device's queue was full": link.tx_dropped})
        for stats in (sock.stats for sock in socks):
            counts["the socket's buffer was full"] += stats.overflowed
            for number, count in stats.refused.items():
                counts[errno.errorcode.get(number, "?")] += count
        print(show(counts), file=sys.stderr, flush=True)
