"""How a stack catches what is sent to addresses that are not its own: the seam of two mechanisms.

The kernel delivers a packet only to a socket, and has to be shown which. There are two ways:

- `tproxy`: nf_tables gives every packet to one socket a family, whatever its port.
- `listeners`: the program sees the packets that it sends to the TUN, and makes a socket for a port
  when the first packet for that port comes. For kernels without nf_tables.

A *receiver* does not see the difference. It is given sockets, and watches them: listening ones for
TCP, unconnected ones for UDP. ::

    class Everything:                            # a receiver
        backlog = 128
        def add(self, sock): loop.add_reader(sock, self._ready, sock)
        def remove(self, sock): loop.remove_reader(sock)

    await core.mechanism.start(socket.SOCK_DGRAM, Everything())
    ...
    core.mechanism.stop(socket.SOCK_DGRAM)       # removes each socket, and closes it

Each UDP socket gives the address and port that a datagram was sent to as control data
(IP_ORIGDSTADDR, IPV6_ORIGDSTADDR: a sockaddr), since a `tproxy` socket is bound to neither. An
accepted TCP connection has it as its `getsockname`.

A UDP flow takes a socket of its own: made by `core.namespace.socket`, made transparent by
`make_transparent`, bound to the address and port that were asked for, connected to the peer. Once
it is connected, the kernel gives it the flow's datagrams in both mechanisms.

The kernel answers for the rest (`routing`): a datagram to a port without socket is unreachable, an
echo request is answered.
"""

from __future__ import annotations

import abc
import socket
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .._packets.ipheader import IPHeader

__all__ = ["Mechanism", "Receiver", "make_transparent"]

# in.h, in6.h
_IP_TRANSPARENT, _IP_RECVORIGDSTADDR = 19, 20
_IPV6_TRANSPARENT, _IPV6_RECVORIGDSTADDR = 75, 74


class Receiver(Protocol):
    """What watches the sockets of one kind.

    Attributes:
        backlog: how many connections may wait to be accepted at each listening socket.
    """

    @property
    def backlog(self) -> int: ...

    def add(self, sock: socket.socket) -> None:
        """Watch this socket from now on. It is the mechanism's to close."""

    def remove(self, sock: socket.socket) -> None:
        """Stop watching this socket, which is about to be closed."""


class Mechanism(abc.ABC):
    """One of the two; see above. Belongs to the loop that opened the stack.

    Attributes:
        on_demand: whether sockets are made when a packet for them is seen.
    """

    on_demand = False

    @abc.abstractmethod
    async def start(self, kind: int, receiver: Receiver) -> None:
        """Begin to catch.

        Args:
            kind: SOCK_STREAM for TCP, SOCK_DGRAM for UDP.
            receiver: what the sockets are given to.

        Raises:
            OSError, LinkError: no socket can be made. Nothing is caught then.

        *Cancellation*: nothing is caught.
        """

    @abc.abstractmethod
    def stop(self, kind: int) -> None:
        """Stop catching: the receiver's sockets are removed and closed. Idempotent."""

    @abc.abstractmethod
    def ready(self, kind: int, header: IPHeader) -> bool:
        """Whether a socket waits for what this packet, sent to another address, opens."""

    @abc.abstractmethod
    async def prepare(self, kind: int, header: IPHeader) -> None:
        """Have a socket wait for what this packet opens.

        Raises:
            OSError, LinkError: none can be made.
        """


def make_transparent(sock: socket.socket) -> None:
    """Let a socket be bound to addresses that are not this host's, before `bind`.

    A UDP socket also tells where each datagram was sent to.

    Raises:
        OSError: the kernel refuses.
    """
    datagrams = sock.type == socket.SOCK_DGRAM
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
        if datagrams:
            sock.setsockopt(socket.IPPROTO_IP, _IP_RECVORIGDSTADDR, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
        if datagrams:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVORIGDSTADDR, 1)
