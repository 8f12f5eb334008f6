"""The mechanism `tproxy`: one socket for each family receives everything; see `nftables`."""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING

from .mechanism import SO_BINDTODEVICE, Mechanism, Receiver, make_transparent
from .nftables import PORT, RECEIVERS

if TYPE_CHECKING:
    from .._packets.ipheader import IPHeader
    from ..namespaces import Namespace

__all__ = ["Tproxy"]


class Tproxy(Mechanism):
    """Sockets at the addresses to which the nf_tables rules redirect.

    They are also bound to the device, so that no program in the namespace can reach them another
    way. Accepted sockets inherit that: their packets leave by the device, whatever the routes are.
    """

    def __init__(self, namespace: Namespace, tun: str, mtu: int) -> None:
        self._namespace = namespace
        self._tun = os.fsencode(tun)
        self._mtu = mtu
        self._receiver: Receiver | None = None
        self._listening: list[socket.socket] = []

    async def start(self, receiver: Receiver) -> None:
        made: list[socket.socket] = []
        try:
            for family, address in RECEIVERS.items():
                try:
                    sock = await self._namespace.socket(family)
                except OSError as error:
                    if family == socket.AF_INET6 and error.errno == errno.EAFNOSUPPORT:
                        continue  # a kernel without IPv6
                    raise
                made.append(sock)
                make_transparent(sock, self._mtu)
                sock.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, self._tun)
                sock.bind((address, PORT))
                sock.listen(receiver.backlog)
        except BaseException:
            for sock in made:
                sock.close()
            raise
        self._receiver, self._listening = receiver, made
        for sock in made:
            receiver.add(sock)

    def ready(self, header: IPHeader) -> bool:
        return True

    async def prepare(self, header: IPHeader) -> bool:
        return True

    def stop(self) -> None:
        made, self._listening = self._listening, []
        # Forgotten, because it holds the stack that holds this: the namespace would stay open until
        # the garbage collector finds the cycle.
        receiver, self._receiver = self._receiver, None
        for sock in made:
            assert receiver is not None
            receiver.remove(sock)
            sock.close()
