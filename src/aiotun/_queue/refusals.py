"""What the errno of a read or a write means, and what to do about it."""

from __future__ import annotations

import errno
import os

from ..errors import (
    AiotunError,
    DeviceLostError,
    DeviceMismatchError,
    LinkDownError,
    PacketError,
    PacketTruncatedError,
)
from .port import PacketFormat

__all__ = ["link_down", "lost", "meaning", "refused", "truncated", "unread"]

# What only sockets say of a packet; a TUN device says EINVAL.
_SOCKET_ERRORS = {
    errno.ECONNREFUSED: "nobody listens at the other end (ICMP port unreachable)",
    errno.ECONNRESET: "the other end was closed",
    errno.EPIPE: "the other end was closed",
    errno.ENODATA: "the other end was closed",
    errno.ENOTCONN: "the socket is not connected; connect it first",
    errno.EDESTADDRREQ: "the socket is not connected; connect it first",
    errno.ENETUNREACH: "there is no route to the other end",
    errno.EHOSTUNREACH: "the other end can't be reached",
    errno.EMSGSIZE: "it is too long; send a shorter one",
    errno.ENOBUFS: "it is too long, or the kernel has no memory for it; send a shorter one",
}


def meaning(code: int) -> str:
    """What a socket's errno says of a packet."""
    return _SOCKET_ERRORS.get(code) or os.strerror(code)


def lost(code: int | None, name: str) -> DeviceLostError:
    """The interface is gone, or the far end of a Unix socket."""
    if code == errno.ENOTCONN:  # a Unix socket says so from the second time on
        text = f"{name} has no other end: it was closed, or never connected; close this queue"
    elif code in _SOCKET_ERRORS:
        # Only a Unix socket comes to its end this way, and it gets no ICMP.
        why = _SOCKET_ERRORS[errno.ECONNRESET if code == errno.ECONNREFUSED else code]
        text = f"{name} came to its end: {why}; close this queue"
    else:
        text = (
            f"{name} is gone: it was deleted, or its namespace ended; close this device, and open "
            "it again to go on"
        )
    return DeviceLostError(code, text, name)


def link_down(name: str) -> LinkDownError:
    text = "the link is down and the packet was not sent; bring it up: 'await link.up()'"
    return LinkDownError(errno.EIO, text, name)


def unread(error: OSError, name: str) -> Exception:
    """A read failed, and the next one may succeed."""
    why = _SOCKET_ERRORS.get(error.errno or 0)
    if why is not None:
        # An ICMP error, which a connected socket reports to the next read or write.
        return PacketError(error.errno, f"an earlier packet was not delivered: {why}", name)
    return OSError(error.errno, f"reading a packet failed: {error.strerror}", name)


def truncated(length: int, room: int, name: str) -> PacketTruncatedError:
    return PacketTruncatedError(
        errno.EMSGSIZE,
        f"a packet of {length} bytes came into a buffer of {room}, and its end is lost; give "
        "recv_into a larger buffer, or use recv",
        name,
    )


def refused(error: OSError, name: str, packet_format: PacketFormat) -> AiotunError:
    """A write failed, and another packet may succeed."""
    code = error.errno or 0
    if code == errno.EIO:
        return link_down(name)
    if code == errno.EBUSY:  # with IFF_NAPI; without it a disabled queue still sends
        text = "this queue is disabled and the packet was not sent; enable() it first"
        return DeviceMismatchError(code, text, name)
    if code != errno.EINVAL:
        why = meaning(code)
    elif packet_format.header_bytes:
        why = "look at its header, which this device was opened with, and what follows"
        if isinstance(error.__cause__, ValueError):  # from RawPort
            why = f"it can't be sent as a super-packet or as single packets: {error.__cause__}"
    elif packet_format.mode == "tap":
        why = "a frame begins with a 14-byte Ethernet header"
    else:
        why = "it is empty, or its first four bits say neither IPv4 nor IPv6"
    return PacketError(code, f"the kernel refused the packet: {why}", name)
