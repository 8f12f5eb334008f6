"""Receives the kernel's notifications about links and addresses, in the thread's namespace.

We use a socket of our own, and pyroute2 only parses its messages. pyroute2's socket buffers
messages without a limit, and can't be used any more after an overrun.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Container, Iterator

from .._kernel import ioctl, places
from . import messages
from .session import message_parser, opening
from .state import Change

__all__ = ["Monitor"]

# rtnetlink.h
_GROUPS = 0x1 | 0x10 | 0x100  # RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
_TYPES = (16, 17, 20, 21)  # RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR

# struct nlmsghdr, and the index, which has the same offset in ifinfomsg and ifaddrmsg.
_HEAD = struct.Struct("=IHHII4xI")

# Room for a few thousand messages. The kernel silently gives less if rmem_max is lower.
_RECEIVE_BUFFER_BYTES = 1 << 20

# Larger than any datagram: the kernel truncates a datagram that does not fit.
_DATAGRAM_BYTES = 1 << 16


class Monitor:
    """A netlink socket that receives every change from now on.

    Raises:
        LinkError, ResourceLimitError: netlink could not be opened.
    """

    def __init__(self) -> None:
        self._parse = message_parser()
        with opening(), contextlib.ExitStack() as failing:
            self._socket = places.make_socket(
                socket.AF_NETLINK,
                socket.SOCK_DGRAM | socket.SOCK_NONBLOCK,
                socket.NETLINK_ROUTE,
            )
            failing.callback(self._socket.close)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
            self._socket.bind((0, _GROUPS))
            failing.pop_all()

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def receive(self, wanted: Container[int]) -> list[Change]:
        """Return the next datagram's changes of the links with these indexes; often none.

        Raises:
            BlockingIOError: no datagram waits.
            OSError: ENOBUFS, the socket overran and messages were lost. The waiting messages can
                still be read. The kernel drops new ones until all of them have been read.
        """
        data, (sender, _) = self._socket.recvfrom(_DATAGRAM_BYTES)
        return list(self._changes(data, wanted)) if sender == 0 else []  # 0 is the kernel

    def _changes(self, data: bytes, wanted: Container[int]) -> Iterator[Change]:
        offset = 0
        while offset + _HEAD.size <= len(data):
            length, kind, _, _, _, index = _HEAD.unpack_from(data, offset)
            # pyroute2 takes half a millisecond to parse a link's message. Skip links that nobody
            # watches.
            if kind in _TYPES and index in wanted:
                for message in self._parse(data[offset : offset + length]):
                    change = messages.change(message, _name_of(message.get("master")))
                    if change is not None:
                        yield change
            offset += max(length + 3 & ~3, 16)  # NLMSG_ALIGN, and the header at least


def _name_of(index: int | None) -> str | None:
    if index:
        with contextlib.suppress(OSError):  # it may have been deleted in the meantime
            return ioctl.get_name(index)
    return None
