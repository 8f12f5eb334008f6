"""Resets a namespace's TCP connections: SOCK_DESTROY, as ``ss -K`` does.

A connection outlives its TUN device: the kernel retransmits for a quarter of an hour. Listening
sockets are never destroyed: accept(2) would fail with EINVAL forever, and an event loop that
watches one would spin.

Source: sock_diag(7), ``include/uapi/linux/inet_diag.h``.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Collection, Iterator, Sequence

__all__ = ["FAMILY", "Connection", "connections", "destroy"]

FAMILY = 4
"""NETLINK_SOCK_DIAG"""

_SOCK_DIAG_BY_FAMILY, _SOCK_DESTROY = 20, 21
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3

_NLMSGHDR = struct.Struct("=IHHII")  # length, type, flags, sequence number, port
_INET_DIAG_REQ_V2 = struct.Struct("=BBBxI48s")  # family, protocol, extensions, states, id
_INET_DIAG_MSG = struct.Struct("=BBBB48s")  # family, state, timer, retransmissions, id, ...
_INET_DIAG_SOCKID = struct.Struct("!2x2x16s16s4x8x")  # ports, addresses, interface, cookie
_INTERFACE = struct.Struct("=36xI8x")

# tcp_states.h. Not TCP_TIME_WAIT (6), which ends by itself, nor TCP_LISTEN (10).
_STATES = sum(1 << state for state in (1, 2, 3, 4, 5, 8, 9, 11, 12))

Connection = tuple[int, bytes]
"""A connection's family and inet_diag_sockid."""


def connections(
    sock: socket.socket, interface: int = 0, addresses: Collection[bytes] = ()
) -> list[Connection]:
    """List the connections of the socket's namespace. Blocks, a few us for each.

    Args:
        sock: a netlink socket of this family, non-blocking.
        interface, addresses: list only connections that are bound to this interface or to one of
            these addresses (packed). Without both, list all.

    Raises:
        OSError: the kernel has no inet_diag, or refuses.
    """
    found: list[Connection] = []
    for family in (socket.AF_INET, socket.AF_INET6):
        body = _INET_DIAG_REQ_V2.pack(family, socket.IPPROTO_TCP, 0, _STATES, bytes(48))
        _ask(sock, _SOCK_DIAG_BY_FAMILY, _NLM_F_DUMP, body)
        for kind, message in _answers(sock):
            if kind == _NLMSG_DONE:
                break
            if kind == _SOCK_DIAG_BY_FAMILY:
                _, _, _, _, ident = _INET_DIAG_MSG.unpack_from(message)
                found.append((family, ident))
    if not interface and not addresses:
        return found
    return [each for each in found if _concerns(each, interface, addresses)]


def _concerns(connection: Connection, interface: int, addresses: Collection[bytes]) -> bool:
    family, ident = connection
    if _INTERFACE.unpack(ident)[0] == interface:
        return True
    source, _ = _INET_DIAG_SOCKID.unpack(ident)
    return source[: 4 if family == socket.AF_INET else 16] in addresses


def destroy(sock: socket.socket, some: Sequence[Connection]) -> None:
    """Reset connections: their sockets raise ECONNABORTED, and the peers are told.

    Raises:
        OSError: the kernel can't (EOPNOTSUPP, before Linux 4.5), or refuses.
    """
    for family, ident in some:
        body = _INET_DIAG_REQ_V2.pack(family, socket.IPPROTO_TCP, 0, _STATES, ident)
        _ask(sock, _SOCK_DESTROY, 0, body)
    try:
        for _, _ in _answers(sock):
            pass
    except BlockingIOError:
        pass  # all answers are read: the kernel answers errors only
    except FileNotFoundError:
        pass  # a connection has ended meanwhile


def _ask(sock: socket.socket, kind: int, flags: int, body: bytes) -> None:
    head = _NLMSGHDR.pack(16 + len(body), kind, _NLM_F_REQUEST | flags, 0, 0)
    # Name the kernel's address explicitly; `_link.session` says why.
    sock.sendto(head + body, (0, 0))


def _answers(sock: socket.socket) -> Iterator[tuple[int, bytes]]:
    """Read the kernel's answers, which are there by the time that send returns.

    Raises:
        OSError: one of the answers is an error.
        BlockingIOError: there are no more answers.
    """
    while True:
        answers = sock.recv(1 << 17)
        while len(answers) >= _NLMSGHDR.size:
            length, kind, *_ = _NLMSGHDR.unpack_from(answers)
            body = answers[_NLMSGHDR.size : length]
            if kind == _NLMSG_ERROR:
                (code,) = struct.unpack_from("=i", body)
                if code:
                    raise OSError(-code, os.strerror(-code))
            yield kind, body
            answers = answers[(length + 3) & ~3 :]
