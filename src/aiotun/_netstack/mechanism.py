"""How a stack accepts connections to addresses that are not its own: what two mechanisms share.

The kernel delivers a packet only to a socket, and must be told to which. There are two ways:

- `tproxy`: nf_tables gives packets for any port to one socket for each address family.
- `listeners`: the program sees the packets that it sends to the TUN, and makes a socket for a port
  when the first SYN for that port comes. For kernels without nf_tables.

A *receiver* does not see the difference: it is given listening sockets, and watches them. An
accepted socket's `getsockname` returns the address that the client connected to.

Datagrams need no socket (see `udp`). The kernel refuses packets for which no socket waits (see
`routing`).
"""

from __future__ import annotations

import abc
import socket
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .._packets.ipheader import IPHeader

__all__ = ["SO_BINDTODEVICE", "Mechanism", "Receiver", "make_transparent"]

SO_BINDTODEVICE = 25
"""asm-generic/socket.h. Not every version of Python has it."""

# in.h, in6.h
_IP_TRANSPARENT, _IPV6_TRANSPARENT = 19, 75
_IP_MTU_DISCOVER, _IP_PMTUDISC_DONT = 10, 0

# tcp.h: TCP_MIN_SND_MSS, and the two headers. The kernel sends no smaller segments.
_LEAST_PACKET = 48 + 20 + 20


class Receiver(Protocol):
    """Watches the sockets of a mechanism.

    Attributes:
        backlog: how many connections may wait to be accepted at each.
    """

    @property
    def backlog(self) -> int: ...

    def add(self, sock: socket.socket) -> None:
        """Watch this socket from now on. The mechanism closes it."""

    def remove(self, sock: socket.socket) -> None:
        """Stop watching this socket, which is about to be closed."""


class Mechanism(abc.ABC):
    """One of the two mechanisms. It belongs to the loop that opened the stack.

    Attributes:
        on_demand: whether sockets are made when a SYN for them is seen.
    """

    on_demand = False

    @abc.abstractmethod
    async def start(self, receiver: Receiver) -> None:
        """Begin to listen.

        Raises:
            OSError, LinkError: no socket can be made. Nothing listens then.

        *Cancellation*: nothing listens.
        """

    @abc.abstractmethod
    def stop(self) -> None:
        """Stop listening: the receiver's sockets are removed and closed. Idempotent."""

    @abc.abstractmethod
    def ready(self, header: IPHeader) -> bool:
        """Whether a socket listens for this SYN, which is not to one of the stack's addresses."""

    @abc.abstractmethod
    async def prepare(self, header: IPHeader) -> bool:
        """Make a socket that listens for this SYN.

        Returns:
            False if the kernel can't have such a socket, or if a call that this one waited for had
            no resources to make one (that call raises the error).

        Raises:
            OSError, LinkError: no socket can be made now.
        """

    def shadows(self, header: IPHeader) -> bool:
        """Whether one of the sockets would get this SYN to one of the stack's own addresses."""
        return False

    def give_up(self, port: int) -> None:  # noqa: B027 - nothing to do, mostly
        """Leave a port to a server of the stack."""


def make_transparent(sock: socket.socket, mtu: int) -> None:
    """Let a TCP socket be bound to addresses that are not this host's, before `bind`.

    Args:
        sock: the socket.
        mtu: the device's.

    Raises:
        OSError: the kernel refuses.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
        if mtu < _LEAST_PACKET:
            # The kernel must fragment segments. Otherwise it would tell the sender's address that
            # they are too long, which is not its own, so it would not hear that itself.
            sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DONT)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
