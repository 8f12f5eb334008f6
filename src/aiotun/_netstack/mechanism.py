"""How a stack accepts connections to addresses that are not its own: the seam of two mechanisms.

The kernel delivers a packet only to a socket, and has to be shown which. There are two ways:

- `tproxy`: nf_tables gives every packet to one socket a family, whatever its port.
- `listeners`: the program sees the packets that it sends to the TUN, and makes a socket for a port
  when the first SYN for that port comes. For kernels without nf_tables.

A *receiver* does not see the difference: it is given listening sockets, and watches them. What
they accept has the address that was asked for as its `getsockname`.

Datagrams need no socket (see `udp`), and what no socket waits for the kernel answers (`routing`).
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


class Receiver(Protocol):
    """What watches the sockets.

    Attributes:
        backlog: how many connections may wait to be accepted at each.
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
        """Whether a socket waits for the connection that this SYN, to another address, opens."""

    @abc.abstractmethod
    async def prepare(self, header: IPHeader) -> bool:
        """Have a socket wait for the connection; False where the kernel can't have one.

        Raises:
            OSError, LinkError: none can be made now.
        """

    def shadows(self, header: IPHeader) -> bool:
        """Whether one of the sockets would get this SYN, sent to one of the stack's own."""
        return False

    def give_up(self, port: int) -> None:  # noqa: B027 - nothing to do, mostly
        """Leave a port to a server of the stack."""


def make_transparent(sock: socket.socket) -> None:
    """Let a TCP socket be bound to addresses that are not this host's, before `bind`.

    Raises:
        OSError: the kernel refuses.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
