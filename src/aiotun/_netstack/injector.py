"""Sends packets that this program makes as if the stack's kernel had sent them."""

from __future__ import annotations

import asyncio
import errno
import random
import socket
from typing import TYPE_CHECKING

from .._packets.fragments import fragment
from ..errors import DeviceLostError, LinkDownError, PacketError

if TYPE_CHECKING:
    from ..device import TunDevice
    from ..namespaces import Namespace

__all__ = ["Injector", "make_injector"]

# How many hosts' path MTUs are remembered. A forgotten one is learned again from the next error.
_MOST_PATHS = 1024

_IPV6_LEAST_MTU = 1280


async def make_injector(namespace: Namespace, tun: TunDevice) -> Injector:
    """Make an injector for a device.

    Raises:
        OSError: the kernel has no packet sockets, or no descriptor is left.
        LinkError: the namespace was closed.
    """
    # Protocol 0: the socket receives nothing. Raw IP sockets would work, too, but we would need one
    # for each IP version, and their packets would follow the routes, which users may change.
    sock = await namespace.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    try:
        sock.bind((tun.name, 0))
    except BaseException:
        sock.close()
        raise
    return Injector(sock, tun)


class Injector:
    """Sends packets out of the TUN device, so that the program receives them there.

    The packets go through the device's queue like the kernel's own, and are dropped and counted in
    `tx_dropped` if the program does not read them in time.
    """

    def __init__(self, sock: socket.socket, tun: TunDevice) -> None:
        self._sock = sock
        self._tun = tun
        self._paths: dict[bytes, int] = {}
        self._ident = random.getrandbits(32)
        self._waiters: list[asyncio.Future[None]] = []

    def next_ident(self) -> int:
        """Return an identification for an IPv4 packet, 16 bits, different from the last ones."""
        self._ident = (self._ident + 1) & 0xFFFF_FFFF
        return self._ident & 0xFFFF

    def limit(self, host: bytes, mtu: int) -> None:
        """Remember the MTU of the path to an IPv6 host. IPv4 needs none: routers fragment it."""
        if len(self._paths) >= _MOST_PATHS:
            del self._paths[next(iter(self._paths))]
        self._paths[host] = max(mtu, _IPV6_LEAST_MTU)

    def send(self, packet: bytes) -> None:
        """Send an IP packet, in fragments if it is larger than the MTU.

        Raises:
            BlockingIOError: there is no room for the packet, or not for all its fragments. `room`
                waits for room.
            LinkDownError: the link is down.
            DeviceLostError: the interface is gone.
        """
        mtu = self._tun.mtu
        if self._paths and packet[0] >> 4 == 6:
            mtu = min(mtu, self._paths.get(packet[24:40], mtu))
        try:
            if len(packet) <= mtu:
                self._sock.send(packet)
                return
            self.next_ident()
            for each in fragment(packet, mtu, self._ident):
                self._sock.send(each)
        except BlockingIOError:
            raise
        except OSError as error:
            raise self._error(error) from error

    def try_send(self, packet: bytes) -> bool:
        """Send a packet; return whether the kernel took it."""
        try:
            self.send(packet)
        except OSError:
            return False
        return True

    def _error(self, error: OSError) -> OSError:
        name = self._tun.name
        if error.errno == errno.ENETDOWN:
            text = f"{name} is down; bring it up with link.up()"
            return LinkDownError(error.errno, text, name)
        if error.errno in (errno.ENXIO, errno.ENODEV, errno.EBADF):
            text = f"the interface {name} was closed or deleted; open another stack"
            return DeviceLostError(error.errno, text, name)
        return PacketError(error.errno, f"{name} refused a packet: {error.strerror}", name)

    async def room(self) -> None:
        """Wait until there may be room to send. Returns at once after `close`."""
        if self._sock.fileno() < 0:
            return
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        if not self._waiters:
            loop.add_writer(self._sock, self._writable)
        self._waiters.append(waiter)
        await waiter

    def _writable(self) -> None:
        waiters, self._waiters = self._waiters, []
        waiters[0].get_loop().remove_writer(self._sock)
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def close(self) -> None:
        """Close the socket. Idempotent."""
        if self._waiters and not self._waiters[0].get_loop().is_closed():
            self._writable()
        self._sock.close()
