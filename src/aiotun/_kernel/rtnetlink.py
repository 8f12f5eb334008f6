"""One question to rtnetlink(7): the flags of a TUN or TAP device, packet information among them.

TUNGETIFF does not tell whether packets come with packet information (see `Iff.NO_PI`), and
`Queue.from_fd` has to know while an event loop waits. Importing pyroute2 would take a hundred
milliseconds; this takes some microseconds.

Sources: ``linux/netlink.h``, ``linux/rtnetlink.h``, ``linux/if_link.h`` (IFLA_LINKINFO, IFLA_TUN).
"""

import socket
import struct

from . import places
from .abi import Iff
from .limits import LIMITS, limit_error

__all__ = ["get_flags"]

_NLMSGHDR = struct.Struct("=IHHII")  # length, type, flags, sequence number, port
_IFINFOMSG = struct.Struct("=BxHiII")  # family, type, index, flags, change
_RTATTR = struct.Struct("=HH")  # length, type
_NLA_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER

_NLM_F_REQUEST = 1
_RTM_NEWLINK, _RTM_GETLINK = 16, 18
_IFLA_LINKINFO = 18
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
_IFLA_TUN_TYPE, _IFLA_TUN_PI, _IFLA_TUN_VNET_HDR = 3, 4, 5
_IFLA_TUN_PERSIST, _IFLA_TUN_MULTI_QUEUE = 6, 7


def get_flags(index: int) -> Iff | None:
    """RTM_GETLINK: what TUNSETIFF was asked for when this device was made.

    Args:
        index: the interface's number in the calling thread's namespace.

    Returns:
        Of TUN, TAP, VNET_HDR, PERSIST, MULTI_QUEUE and NO_PI those that hold; here NO_PI says what
        its name says. None where netlink may not be used or does not tell (gVisor's does not).

    Raises:
        ResourceLimitError: no file descriptor is left to ask with.
    """
    body = _IFINFOMSG.pack(0, 0, index, 0, 0)
    request = _NLMSGHDR.pack(16 + len(body), _RTM_GETLINK, _NLM_F_REQUEST, 0, 0) + body
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    try:
        with places.make_socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE) as sock:
            sock.send(request)
            # The kernel has answered by the time that send returns.
            answer = sock.recv(1 << 16, socket.MSG_DONTWAIT)
    except OSError as error:
        if error.errno in LIMITS:
            raise limit_error(error.errno, "could not open netlink") from error
        return None
    if len(answer) < 32 or _NLMSGHDR.unpack_from(answer)[1] != _RTM_NEWLINK:
        return None
    about = _attributes(_attributes(answer[32:]).get(_IFLA_LINKINFO, b""))
    if about.get(_IFLA_INFO_KIND, b"").rstrip(b"\0") != b"tun":  # a TAP device, too
        return None
    data = _attributes(about.get(_IFLA_INFO_DATA, b""))
    if _IFLA_TUN_PI not in data:
        return None
    flags = Iff.TAP if data.get(_IFLA_TUN_TYPE) == bytes([Iff.TAP]) else Iff.TUN
    for attribute, flag in (
        (_IFLA_TUN_VNET_HDR, Iff.VNET_HDR),
        (_IFLA_TUN_PERSIST, Iff.PERSIST),
        (_IFLA_TUN_MULTI_QUEUE, Iff.MULTI_QUEUE),
    ):
        if any(data.get(attribute, b"")):
            flags |= flag
    return flags if any(data[_IFLA_TUN_PI]) else flags | Iff.NO_PI


def _attributes(data: bytes) -> dict[int, bytes]:
    """Take a run of attributes apart."""
    found = {}
    while len(data) >= _RTATTR.size:
        length, kind = _RTATTR.unpack_from(data)
        if length < _RTATTR.size:
            break
        found[kind & _NLA_TYPE_MASK] = data[_RTATTR.size : length]
        data = data[(length + 3) & ~3 :]
    return found
