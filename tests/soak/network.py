"""Namespaces and sockets for the soak, without any other program."""

import asyncio
import contextlib
import os
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

from aiotun._kernel.threads import run_blocking
from aiotun.testing import isolated

from .ledger import Flow, drops

__all__ = [
    "allow_ipv6",
    "delete_link",
    "family_of",
    "feed",
    "listening",
    "make_namespace",
    "names",
    "quiet",
    "udp_socket",
]

T = TypeVar("T")

_RTM_DELLINK, _REQUEST_AND_ACK = 17, 5  # rtnetlink.h, netlink.h


def quiet() -> None:
    """Keep the kernel of this thread's namespace quiet: no IPv6, and ARP only once for a host."""
    with contextlib.suppress(OSError):
        where = "/proc/sys/net/ipv4/neigh/default/base_reachable_time_ms"
        Path(where).write_text(str(24 * 3600 * 1000))
    for where in ("all", "default"):
        with contextlib.suppress(OSError):  # this kernel has no IPv6
            Path(f"/proc/sys/net/ipv6/conf/{where}/disable_ipv6").write_text("1")


def make_namespace() -> int:
    """Make a network namespace and return an fd of it; the caller closes the fd."""

    def make() -> int:
        with isolated() as fd:
            quiet()
            return os.dup(fd)

    return run_blocking(make)


def allow_ipv6(name: str, netns: int | None) -> None:
    """Let one interface have IPv6, which `quiet` took from all of its namespace."""
    path = Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6")
    inside(netns, lambda: path.write_text("0"))


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def inside(netns: int | None, function: Callable[[], T]) -> T:
    return function() if netns is None else run_blocking(function, netns)


def udp_socket(netns: int | None, address: str, port: int = 0) -> socket.socket:
    """A bound, non-blocking datagram socket in a namespace."""

    def make() -> socket.socket:
        sock = socket.socket(family_of(address), socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        sock.bind((address, port))
        return sock

    return inside(netns, make)


def names(netns: int | None = None) -> list[str]:
    return inside(netns, lambda: [name for _, name in socket.if_nameindex() if name != "lo"])


def delete_link(index: int, netns: int | None = None) -> None:
    """Delete an interface as ``ip link del`` does, while a program holds it."""

    def ask() -> None:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
            body = struct.pack("=BxHiII", 0, 0, index, 0, 0)
            sock.send(
                struct.pack("=IHHII", 16 + len(body), _RTM_DELLINK, _REQUEST_AND_ACK, 1, 0) + body
            )
            (code,) = struct.unpack_from("=i", sock.recv(4096), 16)
            if code != 0:
                raise OSError(-code, os.strerror(-code))

    inside(netns, ask)


@contextlib.asynccontextmanager
async def listening(sock: socket.socket, take: Callable[[bytes], None]) -> AsyncIterator[None]:
    """Pass each datagram that a socket receives to `take`."""
    loop = asyncio.get_running_loop()

    def readable() -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(64):
                try:
                    data = sock.recv(65536)
                except ConnectionError:  # an ICMP error about a datagram that was sent
                    continue
                take(data)

    loop.add_reader(sock, readable)
    try:
        yield
    finally:
        readable()
        loop.remove_reader(sock)


async def feed(
    flow: Flow, sock: socket.socket, stop: asyncio.Event, rate: float, chance: random.Random
) -> None:
    """Send a flow's datagrams at this rate a second, and now and then far too many at once."""
    while not stop.is_set():
        number = 400 if chance.random() < 0.01 else max(1, round(rate * 0.02))
        for _ in range(number):
            flow.send(sock)
        await asyncio.sleep(chance.uniform(0.01, 0.03))


def dropped_by(*socks: socket.socket) -> int:
    return sum(drops(sock) for sock in socks)
