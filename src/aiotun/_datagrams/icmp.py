"""ICMP errors: the kernel's queue of them, and which destination each is about."""

from __future__ import annotations

import socket

from .._kernel.udp import CONTROL_BYTES, EXTENDED_ERROR, ORIGINS_ICMP, RECVERR
from .addresses import Address

__all__ = ["read_errors", "report_errors"]

# How many errors one call reads. The queue is part of the receive buffer; further errors stay there
# until the next call.
_MOST = 64

_HEADERS = frozenset(RECVERR.values())


def report_errors(sock: socket.socket) -> None:
    """Have the kernel queue the ICMP errors about a socket's datagrams.

    Without this the kernel reports none on a socket that is not connected.
    """
    sock.setsockopt(*RECVERR[sock.family], 1)


def read_errors(sock: socket.socket) -> list[tuple[Address, int]]:
    """Take ICMP errors out of the queue; return the destination and the errno of each."""
    errors: list[tuple[Address, int]] = []
    for _ in range(_MOST):
        try:
            _, ancillary, _, destination = sock.recvmsg(0, CONTROL_BYTES, socket.MSG_ERRQUEUE)
        except OSError:
            break  # there are no more
        for level, kind, value in ancillary:
            if (level, kind) in _HEADERS and len(value) >= EXTENDED_ERROR.size:
                code, origin, *_ = EXTENDED_ERROR.unpack_from(value)
                if origin in ORIGINS_ICMP and destination:
                    errors.append((destination, code))
    return errors
