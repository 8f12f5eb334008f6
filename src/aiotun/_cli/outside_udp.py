"""Carries the datagrams of one client inside: one port outside for all hosts that it talks to.

So a host answers at the port that another one has seen, which STUN, games and torrents need.
"""

import asyncio
import errno
import os
import socket
from types import TracebackType
from typing import Self

from aiotun.netstack import UdpFlow

from .access import Address, NotPermittedError
from .outside import Outside, as_text

__all__ = ["UdpOutside"]

_LONGEST = 65_535
_BATCH = 64  # datagrams, then others have a turn
_REMEMBERED = 256  # destinations

_ANYWHERE = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}


class UdpOutside:
    """One client's sockets outside, one for each address family that it uses."""

    def __init__(self, flow: UdpFlow[tuple[bytes, Address]], outside: Outside) -> None:
        self.sent = 0
        self.received = 0
        self.dropped = 0
        self._flow = flow
        self._outside = outside
        self._sockets: dict[socket.AddressFamily, socket.socket] = {}
        self._targets: dict[Address, Address | None] = {}
        self._names: dict[Address, Address] = {}  # as the client calls them

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        loop = asyncio.get_running_loop()
        for sock in self._sockets.values():
            loop.remove_reader(sock)
            sock.close()

    async def run(self) -> None:
        """Send what the client sends, until its flow ends."""
        async for data, local in self._flow:
            if local not in self._targets:
                self._look_up(local)
            target = self._targets[local]
            if target is None or not self._send(data, target):
                self.dropped += 1
            else:
                self.sent += 1

    def _look_up(self, local: Address) -> None:
        while len(self._targets) >= _REMEMBERED:
            del self._targets[next(iter(self._targets))]
        try:
            target = self._targets[local] = self._outside.target(local)
        except NotPermittedError:
            self._targets[local] = None
            self._outside.log(f"udp {as_text(local)} denied")
        except OSError as error:
            self._targets[local] = None
            self._outside.log(f"udp {as_text(local)} failed: {os.strerror(error.errno or 0)}")
        else:
            if target != local:
                self._names[target] = local

    def _send(self, data: bytes, target: Address) -> bool:
        family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
        try:
            self._socket(family).sendto(data, target)
        except OSError as error:
            # A route that has gone may come back. What the kernel refuses is lost here, as on a
            # network.
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._outside.log(f"udp {as_text(target)} failed: no file descriptor is left")
            return False
        return True

    def _socket(self, family: socket.AddressFamily) -> socket.socket:
        if (sock := self._sockets.get(family)) is None:
            sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            self._sockets[family] = sock
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((_ANYWHERE[family], 0))
            asyncio.get_running_loop().add_reader(sock, self._receive, sock)
        return sock

    def _receive(self, sock: socket.socket) -> None:
        for _ in range(_BATCH):
            try:
                data, source = sock.recvfrom(_LONGEST)
            except BlockingIOError:
                return
            except OSError:  # an ICMP error for something that was sent; the kernel clears it
                continue
            address = source[:2]
            try:
                self._flow.send_nowait(data, source=self._names.get(address, address))
                self.received += 1
            except BlockingIOError:
                self.dropped += 1
