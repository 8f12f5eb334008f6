"""The mechanism `tproxy`: one socket a family receives everything; see `nftables`."""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING

from .mechanism import Mechanism, Receiver, make_transparent
from .nftables import PORT, RECEIVERS

if TYPE_CHECKING:
    from .._packets.ipheader import IPHeader
    from ..namespaces import Namespace

__all__ = ["Tproxy"]

# Python's socket module has it, but not on every version: asm-generic/socket.h
_SO_BINDTODEVICE = 25


class Tproxy(Mechanism):
    """Sockets at the address that the rules of nf_tables name.

    They are bound to the device, too, so that no program inside can reach them another way. A
    connection that they accept inherits that: its packets leave by the device, whatever the routes.
    """

    def __init__(self, namespace: Namespace, tun: str) -> None:
        self._namespace = namespace
        self._tun = os.fsencode(tun)
        self._started: dict[int, tuple[Receiver, list[socket.socket]]] = {}

    async def start(self, kind: int, receiver: Receiver) -> None:
        made: list[socket.socket] = []
        try:
            for family, address in RECEIVERS.items():
                try:
                    sock = await self._namespace.socket(family, kind)
                except OSError as error:
                    if family == socket.AF_INET6 and error.errno == errno.EAFNOSUPPORT:
                        continue  # a kernel without IPv6
                    raise
                made.append(sock)
                make_transparent(sock)
                sock.setsockopt(socket.SOL_SOCKET, _SO_BINDTODEVICE, self._tun)
                sock.bind((address, PORT))
                if kind == socket.SOCK_STREAM:
                    sock.listen(receiver.backlog)
        except BaseException:
            for sock in made:
                sock.close()
            raise
        self._started[kind] = receiver, made
        for sock in made:
            receiver.add(sock)

    def ready(self, kind: int, header: IPHeader) -> bool:
        return True

    async def prepare(self, kind: int, header: IPHeader) -> None:
        """Nothing is missing."""

    def stop(self, kind: int) -> None:
        receiver, made = self._started.pop(kind, (None, []))
        for sock in made:
            if receiver is not None:
                receiver.remove(sock)
            sock.close()
